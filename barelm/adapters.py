"""Small parts that are trained in a network's place: LoRA, QLoRA's 4 bits, bottlenecks, prompts.

A network is changed in place: `choose_weights` freezes it and adds what AdaptConfig asks for,
`merge_adapters` makes plain layers again, `save_adapter` writes the folder that PEFT reads."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from barelm.embeddings import write_pooling
from barelm.families import family, table_of
from barelm.files import write_json
from barelm.parts import whole_tensor
from barelm.resume import make_folder, write_weights
from barelm.run import UserError, compute_dtype
from barelm.tensor_names import joined, names_in_file
from barelm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from barelm.tensor_names import TensorNames
    from model import GPT, GPTConfig


@dataclass
class AdaptConfig:
    """Which weights learn. Each field is a key of finetune.py and rl.py, explained there."""

    adapt: str = "full"  # full, lora, qlora, adapter or prompt
    train_last: int | None = 0
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj"
    adapter_size: int = 16
    prompt_tokens: int = 8

    @property
    def is_lora(self) -> bool:
        """Whether what is trained is LoRA's matrices, which have a folder format of their own."""
        return self.adapt in ("lora", "qlora")


# --------------------------------------------------------------------------------------------------
# LoRA


class LoRA(nn.Module):
    """A frozen linear layer plus a product of two narrow matrices (Hu et al. 2021): y = W x +
    alpha / rank B A x. `base` is nn.Linear, or NF4Linear for QLoRA."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.dropout = dropout
        device = next(iter(base.state_dict().values())).device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # nn.Linear's own, as PEFT's
        nn.init.zeros_(self.lora_B.weight)  # so that at the start nothing is added

    @property
    def weight(self) -> Tensor:
        """The sum (n_out, n_in), which a plain layer would have."""
        return self.base.weight + self.scale * self.lora_B.weight @ self.lora_A.weight

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.lora_A(F.dropout(x, self.dropout, self.training))  # (B, T, rank)
        return self.base(x) + self.scale * self.lora_B(narrow)


def add_lora(net: GPT, config: AdaptConfig) -> None:
    """Freeze the network and put LoRA around the layers that lora_targets names, in place; for
    qlora the blocks' linear layers go to 4 bits too."""
    targets = config.lora_targets.split(",")
    for name, p in net.named_parameters():
        if p.ndim == 3 and any(is_named(name, target) for target in targets):
            why = "the matrices of all experts, which LoRA does not adapt"
            raise UserError(f"lora_targets: {name} is {why}: those of attention are q_proj, …")
    names = []
    missing = set(targets)
    for name, _ in net.named_modules():
        matching = {target for target in targets if is_named(name, target)}
        if matching:
            names.append(name)
        missing -= matching
    if missing:
        raise UserError(f"lora_targets: this model has no layer {', '.join(sorted(missing))}")
    net.requires_grad_(False)
    linear = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    for name in names:
        if name not in linear or (name == "lm_head" and net.config.tie):
            raise UserError(f"lora_targets: {name} is no linear layer, or is the embedding too")
    for name in linear:
        layer = net.get_submodule(name)
        if config.adapt == "qlora" and name.startswith("model."):  # the head and a score stay whole
            layer = NF4Linear(layer)
        if name in names:
            layer = LoRA(layer, config.lora_rank, config.lora_alpha, config.lora_dropout)
        net.set_submodule(name, layer)
    if config.adapt == "qlora":
        return_memory()
        if net.config.n_experts:
            print("note: the experts stay as they are: qlora packs linear layers")


def is_named(name: str, target: str) -> bool:
    """Whether a layer's name ends with these words: q_proj, or cross_attn.q_proj, as PEFT reads
    them."""
    return f".{name}".endswith(f".{target}")


def return_memory() -> None:
    """Give the machine back what freed tensors took: glibc would keep it for this process."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


# --------------------------------------------------------------------------------------------------
# QLoRA: frozen weights in 4 bits (Dettmers et al. 2023)

# The 16 values of a code: quantiles of the normal distribution (appendix E of the paper).
# fmt: off
NF4 = torch.tensor([
    -1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
])
# fmt: on
BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own


class NF4Linear(nn.Module):
    """A frozen linear layer in 4 bits a weight: blocks of 64 with a scale each, the scales in 8
    bits by blocks of 256 (double quantization, section 3): 4.13 bits a weight in all."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self.bias = layer.bias
        self.out_features, self.in_features = weight.shape
        padding = -weight.numel() % BLOCK
        blocks = F.pad(weight.flatten(), (0, padding)).view(-1, BLOCK)  # (n_blocks, 64)
        self.quantize_scales(blocks.abs().amax(1))
        self.quantize_blocks(blocks)
        # A byte holds two codes: their values are a single look-up in a table of 256.
        pairs = torch.cartesian_prod(NF4, NF4)  # (256, 2)
        self.register_buffer("pairs", pairs.to(weight.device))

    def quantize_scales(self, scale: Tensor) -> None:
        """Keep the scales (n_blocks,) as int8, around their mean, which takes away their sign."""
        self.register_buffer("mean", scale.mean())
        padding = (0, -len(scale) % SCALE_BLOCK)
        groups = F.pad(scale - self.mean, padding).view(-1, SCALE_BLOCK)
        top = groups.abs().amax(1, keepdim=True).clamp(min=1e-30)  # 1e-30: all scales are equal
        self.register_buffer("top", top)
        self.register_buffer("scale", (groups / top * 127).round().to(torch.int8))

    def quantize_blocks(self, blocks: Tensor) -> None:
        """Keep each weight of the blocks (n_blocks, 64) as the nearest of the 16 codes."""
        # By the scales as they will be read, rounded: the codes make up for part of their error.
        scale = self.scales()[: len(blocks), None].clamp(min=1e-30)  # a block of zeros
        middles = (NF4[1:] + NF4[:-1]).to(blocks.device) / 2  # between two codes
        codes = torch.bucketize((blocks / scale).flatten(), middles).to(torch.uint8)
        self.register_buffer("codes", codes[0::2] << 4 | codes[1::2])  # two in a byte

    def scales(self) -> Tensor:
        """The scales as they are read: (n_blocks,) and what fills up the last 256."""
        return ((self.scale.float() / 127) * self.top).flatten() + self.mean

    @property
    def weight(self) -> Tensor:
        """The matrix (n_out, n_in) float32 that the codes stand for, made anew."""
        return unpacked(self.codes, self.scales(), self.pairs, self.shape, torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))
        packed = (self.codes, self.scales(), self.pairs, self.shape)
        if torch.compiler.is_compiling():
            # Of the two times that Dequantized unpacks, a compiler makes one, and keeps its result.
            y = checkpoint(product, x, *packed, use_reentrant=False)
        else:
            y = Dequantized.apply(x, *packed)
        if self.bias is None:
            return y
        return y + self.bias


def unpacked(
    codes: Tensor, scales: Tensor, pairs: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The matrix of this shape, (n_out, n_in), and dtype that codes (n_blocks * 32,) uint8 and
    scales (n_blocks or more,) stand for; pairs: an NF4Linear's."""
    if codes.device.type == "cpu" and not torch.compiler.is_compiling():
        flat = unpack_by_pieces(codes, scales, pairs, dtype)
    else:
        flat = unpack(codes, scales, pairs, dtype)
    return flat[: math.prod(shape)].view(shape)


def unpack(codes: Tensor, scales: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights (n_blocks * 64,) of `dtype`: each code's value times the scale of its block, in
    float32. Compiled, it is one kernel that reads codes and writes weights."""
    if torch.compiler.is_compiling():
        values = pairs[codes.int()]  # (n_blocks * 32, 2)
    else:  # two float32 are looked up as one complex number, at half the cost
        values = torch.view_as_complex(pairs).index_select(0, codes.int())
        values = torch.view_as_real(values)
    blocks = values.view(-1, BLOCK)
    return (blocks * scales[: len(blocks), None]).to(dtype).flatten()


PIECE = 1 << 18  # weights: what is made between codes and weights stays in a CPU's cache


def unpack_by_pieces(codes: Tensor, scales: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """What `unpack` gives, two to four times as fast for a large matrix on a CPU, and with a
    piece's memory beside the result."""
    flat = torch.empty(2 * len(codes), dtype=dtype)
    for i in range(0, len(flat), PIECE):
        piece = unpack(codes[i // 2 : (i + PIECE) // 2], scales[i // BLOCK :], pairs, dtype)
        flat[i : i + PIECE] = piece
    return flat


def product(
    x: Tensor, codes: Tensor, scales: Tensor, pairs: Tensor, shape: tuple[int, int]
) -> Tensor:
    """x @ weight.T (..., n_out) for x (..., n_in) and a packed weight, `unpacked`'s."""
    return x @ unpacked(codes, scales, pairs, shape, x.dtype).T


class Dequantized(torch.autograd.Function):
    """x @ weight.T for a packed weight, which is unpacked in forward and again in backward, so that
    only its 4 bits and scales are kept between the two. x (..., n_in); the others are `unpacked`'s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, pairs: Tensor,
                shape: tuple[int, int]) -> Tensor:  # fmt: skip
        ctx.save_for_backward(codes, scales, pairs)
        ctx.shape = shape
        return product(x, codes, scales, pairs, shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight = unpacked(*ctx.saved_tensors, ctx.shape, dy.dtype)  # type: ignore[call-arg]
        return dy @ weight, None, None, None, None


def unquantize(net: GPT, full: GPT) -> None:
    """Give the layers in 4 bits back the weights that they were made of, those of the network
    `full`, in place."""
    for name, layer in list(net.named_modules()):
        if isinstance(layer, NF4Linear):
            net.set_submodule(name, full.get_submodule(name.removesuffix(".base")))


def merge_adapters(net: GPT) -> GPT:
    """Make plain layers of adapted and of packed ones, in place; the network is returned."""
    for name, layer in list(net.named_modules()):
        if name.endswith(".base"):  # goes with the layer around it
            continue
        if isinstance(layer, LoRA):
            net.set_submodule(name, plain_layer(layer.weight, layer.base.bias))
        elif isinstance(layer, NF4Linear):
            net.set_submodule(name, plain_layer(layer.weight, layer.bias))
    return net


def plain_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear with this weight (n_out, n_in) and bias (n_out,) or None."""
    n_out, n_in = weight.shape
    layer = nn.Linear(n_in, n_out, bias=bias is not None, device=weight.device)
    layer.weight = nn.Parameter(weight.detach())
    layer.bias = bias
    return layer


# --------------------------------------------------------------------------------------------------
# Bottleneck adapters


class Adapter(nn.Module):
    """A linear layer and a bottleneck behind it (Houlsby et al. 2019), which starts as nothing."""

    def __init__(self, base: nn.Module, size: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.out_features, size, device=base.weight.device)
        self.up = nn.Linear(size, base.out_features, device=base.weight.device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(F.gelu(self.down(y)))


def add_adapters(net: GPT, size: int) -> None:
    """Put a bottleneck of this size behind each attention and each MLP, in place; of experts behind
    the shared ones alone."""
    net.adapter_size = size
    for name, layer in adapted_layers(net):
        net.set_submodule(name, Adapter(layer, size))


def adapted_layers(net: GPT) -> list[tuple[str, nn.Module]]:
    """[(name, layer)] of the linear layers that bottlenecks stand behind."""
    layers = []
    for name, layer in net.named_modules():
        if ".layers." in name and name.endswith(("o_proj", "down_proj")):
            layers.append((name, layer))
    return layers


# --------------------------------------------------------------------------------------------------
# New tokens, and soft prompts made of them


def add_tokens(net: GPT, tok: Tokenizer, names: Sequence[str], template: str) -> Tokenizer:
    """A tokenizer with more special tokens and this chat template; the network gets rows for those
    that it has none for, each the mean of the others."""
    new_tok = tok.with_added(names, {"chat_template": template})
    if new_tok.n_vocab > net.config.vocab_size:
        add_rows(net, -(-new_tok.n_vocab // 64) * 64)  # a multiple of 64, as of a new network
    return new_tok


def add_rows(net: GPT, vocab_size: int) -> None:
    """Give the embedding and the head `vocab_size` rows, in place: each new one is the mean."""
    n_old = net.config.vocab_size
    net.config.vocab_size = vocab_size
    for layer in (net.model.embed_tokens, net.lm_head):
        weight = layer.weight.data
        mean = weight[:n_old].mean(0, keepdim=True)  # (1, C)
        layer.weight = nn.Parameter(torch.cat([weight, mean.repeat(vocab_size - n_old, 1)]))
    bias = net.lm_head.bias  # which an encoder's head has
    if bias is not None:
        new = bias.data.mean().repeat(vocab_size - n_old)
        net.lm_head.bias = nn.Parameter(torch.cat([bias.data, new]))
    if net.config.tie:
        net.lm_head.weight = net.model.embed_tokens.weight


def add_prompts(net: GPT, tok: Tokenizer, n: int) -> Tokenizer:
    """Add n soft prompts (Lester et al. 2021) as tokens of their own before every conversation, or
    before every source of an encoder-decoder: rows of the embedding, which alone learn, so that
    every reader of the folder has them. Returns the tokenizer that writes them."""
    names = [f"<|prompt_{i}|>" for i in range(n)]
    if net.config.is_seq2seq:
        new_tok = add_tokens(net, tok, names, tok.config.get("chat_template"))
        new_tok = before_sources(new_tok, names)
    else:
        new_tok = add_tokens(net, tok, names, "".join(names) + tok.chat_template())
    ids = [new_tok.special[name] for name in names]
    weight = net.model.embed_tokens.weight
    with torch.no_grad():  # each starts as a token drawn from the vocabulary
        weight[ids] = weight[torch.randint(min(ids), (n,))]
    learns = torch.zeros(len(weight), 1, device=weight.device)  # 1 for the rows that do
    learns[ids] = 1
    net.requires_grad_(False)
    weight.requires_grad_(True)
    weight.register_hook(lambda grad: grad * learns)
    return new_tok


def before_sources(tok: Tokenizer, names: list[str]) -> Tokenizer:
    """A tokenizer like tok whose post-processor puts these special tokens before every text, and
    the end token behind it."""
    name_of = {id: name for name, id in tok.special.items()}
    before = [*names, *[name_of[id] for id in tok.start]]
    behind = [name_of[id] for id in tok.end or tok.eos_ids[:1]]
    tokens = {}
    for name in [*before, *behind]:
        tokens[name] = {"id": name, "ids": [tok.special[name]], "tokens": [name]}
    begin = [special_part(name) for name in before]
    end = [special_part(name) for name in behind]
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [*begin, first, *end],
        "pair": [*begin, first, second, *end],
        "special_tokens": tokens,
    }
    new_tok = Tokenizer(tok.spec | {"post_processor": processor}, tok.config)
    new_tok.eos_ids = tok.eos_ids
    new_tok.bos_id = tok.bos_id
    return new_tok


def special_part(name: str) -> dict[str, dict]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


# --------------------------------------------------------------------------------------------------
# Which weights learn, and the adapter's folder


def choose_weights(net: GPT, config: AdaptConfig, reads_head: bool = True) -> None:
    """Freeze what does not learn, and add what AdaptConfig asks for (but the prompts: add_prompts,
    which need a tokenizer). A score always learns. reads_head: whether the loss depends on the
    language-model head, as PPO's does and that of a classifier or of vectors does not."""
    if config.is_lora:
        add_lora(net, config)
    elif config.adapt == "adapter":
        net.requires_grad_(False)
        add_adapters(net, config.adapter_size)
    elif config.train_last != 0:
        train_last_blocks(net, config.train_last)
    for name, p in net.named_parameters():
        if name.startswith("score"):
            p.requires_grad_(True)
    if not reads_head:
        freeze_head(net)
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError(
            f"train_last={config.train_last}: nothing would learn: the head of this model is its "
            "embedding, which is frozen (--train_last=1 or more, or an untied model)"
        )


def freeze_head(net: GPT) -> None:
    """Freeze what stands between the last hidden states and the logits; the weights of a tied head
    learn as the embedding that they are."""
    as_embedding = net.config.tie and net.model.embed_tokens.weight.requires_grad
    for name, p in net.named_parameters():
        if name.startswith(("lm_head.", "head_")):
            p.requires_grad_(False)
    net.lm_head.weight.requires_grad_(as_embedding)


def train_last_blocks(net: GPT, n: int) -> None:
    """Freeze all but the last n blocks, the final norm and the head; with None all but the head."""
    net.requires_grad_(False)
    if n is not None:
        for block in net.model.layers[-n:]:
            block.requires_grad_(True)
        net.model.norm.requires_grad_(True)
    net.lm_head.requires_grad_(not net.config.tie)


def save_adapter(folder: Path, net: GPT, tok: Tokenizer, base: str, config: AdaptConfig,
                 step: int = 0, state: dict | None = None,
                 is_main: bool = True) -> None:  # fmt: skip
    """Write the added matrices as a PEFT adapter of the model `base` (a folder, or a name on the
    Hub), and the tokenizer; with `state` (tensors and plain values) also state.pt. Of a network
    that is divided all processes call it, and the main one writes."""
    gpt2 = family(net.config) == "gpt2"
    tensors, ranks = adapter_tensors(net)
    if not is_main:
        return
    make_folder(folder)
    # Layers of another rank than the others, each with an alpha that leaves its scale as it is.
    rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.lora_rank}
    alpha_pattern = {}
    for name, rank in rank_pattern.items():
        alpha_pattern[name] = config.lora_alpha * rank / config.lora_rank
    if os.path.isdir(base):
        base = os.path.relpath(base, folder)  # both may be moved together
    if net.task == "embed":
        write_pooling(folder, net.pooling, net.config.n_embd)
    write_json(folder / "tokenizer.json", tok.spec)
    write_json(folder / "tokenizer_config.json", tok.config)
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_ids, "pad_token_id": tok.pad_id}
    write_json(folder / "generation_config.json", ids)
    peft_config = {
        "peft_type": "LORA",
        "task_type": task_type(net.config),
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "target_modules": sorted(ranks),
        "fan_in_fan_out": gpt2,  # its file has matrices (n_in, n_out)
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    write_json(folder / "adapter_config.json", peft_config)
    write_weights(folder / "adapter_model.safetensors", tensors, step, state)


def task_type(c: GPTConfig) -> str:
    """PEFT's word for what a network does; it has none for masked language modelling."""
    if c.is_seq2seq:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if c.causal else None


def adapter_tensors(net: GPT) -> tuple[dict[str, Tensor], dict[str, int]]:
    """({PEFT's name: matrix}, {layer as PEFT names it: rank}) of a network with LoRA. Where a
    family's file has q, k and v as one layer, their three products are one of three times the rank,
    with blocks of zeros."""
    kind = family(net.config)
    table = table_of(kind, net.config)
    layers = {f"{name}.weight": m for name, m in net.named_modules() if isinstance(m, LoRA)}
    tensors = {}
    ranks = {}
    for theirs, ours in names_in_file(layers, table).items():
        place = theirs.removesuffix(".weight")
        A = torch.cat([whole_tensor(layers[name].lora_A.weight) for name in ours])
        B = torch.block_diag(*[whole_tensor(layers[name].lora_B.weight) for name in ours])
        if len(ours) > 1:
            B = joined(B.chunk(len(ours)), table)
        tensors[f"base_model.model.{place}.lora_A.weight"] = A
        tensors[f"base_model.model.{place}.lora_B.weight"] = B
        ranks[peft_target(place, kind, table)] = len(A)
    return tensors, ranks


def peft_target(place: str, kind: str, table: TensorNames) -> str:
    """The end of a layer's name by which PEFT finds it, and no other."""
    words = place.split(".")
    if kind == "gpt2":  # it has a c_proj in attention and one in the MLP
        return ".".join(words[-2:])
    return place if table.renames else words[-1]
