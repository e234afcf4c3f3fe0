"""The families of family_table.py as llama.cpp's architectures: keys, names and forms of tensors.

A new one is a line of ARCHITECTURES, and what it has in another form than the others. What
llama.cpp's architecture does not compute as ours does is refused by `check_network`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from barelm.checkpoint import saved_tensors
from barelm.families import family
from barelm.gguf_tokenizer import refusal
from barelm.positions import rope_frequencies, rope_length, rotary_size

if TYPE_CHECKING:
    from torch import Tensor

    from model import GPT, GPTConfig


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's file of a family has otherwise than most."""

    name: str  # llama.cpp's
    turns_neighbours: bool = False  # RoPE turns dimensions 2i and 2i + 1: q and k are reordered
    joins_qkv: bool = False  # q, k and v are one tensor
    own_head: bool = False  # a tied head is written a second time
    renames: tuple[tuple[str, str], ...] = ()  # (usual, its own): of names in the file


LLAMA = Architecture("llama", turns_neighbours=True)
BERT = Architecture(
    "bert", renames=((".attn_norm.", ".attn_output_norm."), (".ffn_norm.", ".layer_output_norm."))
)
T5 = Architecture(
    "t5", renames=((".attn_output.", ".attn_o."), ("^output_norm", "dec.output_norm"))
)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "olmoe": Architecture("olmoe", own_head=True),
    "stablelm": Architecture("stablelm", own_head=True),
    "gpt2": Architecture("gpt2", joins_qkv=True),
    "bloom": Architecture("bloom", joins_qkv=True),
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "modernbert": Architecture("modern-bert", joins_qkv=True),
    "t5": T5,
}
# Our names in the file, outside and inside a block.
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.embed_types": "token_types",
    "model.embed_norm": "token_embd_norm",
    "model.norm": "output_norm",
    "model.encoder.norm": "enc.output_norm",
    "model.relative_bias": "dec.blk.0.attn_rel_b",
    "model.encoder.relative_bias": "enc.blk.0.attn_rel_b",
    "lm_head": "output",
}
INNER = {
    "input_layernorm": "attn_norm",
    "cross_layernorm": "cross_attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "cross_attn.o_proj": "cross_attn_o",
    "mlp.gate": "ffn_gate_inp",
}
OUR_HEADS = ("lm_head.", "head_dense.", "head_norm.")  # that an encoder has for masked words


@dataclass
class Entry:
    """A tensor of the file, made when it is written: `sources`, one below the other, then
    changed."""

    name: str
    sources: list[Tensor]
    change: Callable | None = None
    first_row: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(len(t) for t in self.sources) - self.first_row
        return (rows, *self.sources[0].shape[1:])

    def value(self) -> Tensor:
        t = self.sources[0] if len(self.sources) == 1 else torch.cat(self.sources)
        t = t[self.first_row :].detach().float()
        return t if self.change is None else self.change(t)


# --------------------------------------------------------------------------------------------------
# What cannot be held


def check_network(c: GPTConfig, kind: str) -> list[str]:
    """Refuse a GPTConfig of a family that llama.cpp's architecture would compute otherwise; [what
    the user should know of one that it holds]."""
    name = ARCHITECTURES[kind].name
    notes = []
    unlike = {}  # {field: (its value, the one that llama.cpp has)}
    if c.n_experts and name != "olmoe" and not c.norm_topk:
        unlike["norm_topk"] = (False, True)
    if name == "olmoe" and c.norm_topk:
        unlike["norm_topk"] = (True, False)
    if name == "olmoe" and c.n_kv_head != c.n_head:
        unlike["n_kv_head"] = (c.n_kv_head, c.n_head)
    if c.n_experts and not all(c.has_experts):
        unlike["expert_layers"] = (c.expert_layers, "")
    if name == "modern-bert" and c.norm_bias:
        unlike["norm_bias"] = (True, False)
    if name == "t5" and c.max_distance != 128:
        unlike["max_distance"] = (c.max_distance, 128)
    if name == "t5" and c.mlp not in ("relu", "geglu"):
        unlike["mlp"] = (c.mlp, "relu or geglu")
    if name == "t5" and c.n_layer > c.n_encoder_layer:
        unlike["n_layer"] = (c.n_layer, f"at most {c.n_encoder_layer}, as many as its encoder")
    for field, (value, wanted) in unlike.items():
        raise refusal(f"llama.cpp's {name} has {field}={wanted!r}, this model {value!r}")
    check_rope(c, name)
    if c.window and c.causal and c.window < c.n_ctx:
        why = f"the file says a context of {c.window:,} tokens, within which nothing differs"
        notes.append(f"llama.cpp's {name} has no window: {why}")
    if c.mlm_head:
        why = "it gives states and vectors of texts"
        notes.append(f"llama.cpp's {name} has no head for masked words, which is left out: {why}")
    if c.mlp in ("gelu_erf", "geglu_erf"):
        notes.append("llama.cpp computes GELU by tanh: states differ in the fourth digit")
    return notes


def check_rope(c: GPTConfig, name: str) -> None:
    scaling = c.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind == "llama3" and name != "llama":
        raise refusal(f"llama.cpp has rope_scaling llama3 for llama, not {name}")
    if kind == "yarn" and not scaling.get("truncate", True):
        raise refusal("llama.cpp's YaRN rounds its first and last pairs: truncate=false is not so")
    if kind == "yarn" and scaling["factor"] <= 1:
        raise refusal("llama.cpp's YaRN has a factor above 1")


# --------------------------------------------------------------------------------------------------
# Keys


def add_network(writer: Any, gguf: Any, net: GPT, kind: str) -> None:
    """Add the keys of a GGUF file that describe the network, of a family that `check_network` let
    pass."""
    c = net.config
    n_ctx = c.n_ctx
    if c.window and c.causal:
        n_ctx = min(n_ctx, c.window)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_encoder_layer or c.n_layer)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    if c.norm == "rms":
        writer.add_layer_norm_rms_eps(float(c.norm_eps))
    else:
        writer.add_layer_norm_eps(float(c.norm_eps))
    if c.pos == "rope":
        add_rope(writer, gguf, c)
    if c.n_experts:
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.n_experts_per_token)
        writer.add_expert_feed_forward_length(c.expert_hidden)
    if not c.causal:
        add_encoder(writer, gguf, net)
    if not c.causal or net.task == "embed":
        add_pooling(writer, gguf, net)
    if c.is_seq2seq:
        writer.add_decoder_block_count(c.n_layer)
        writer.add_relative_attn_buckets_count(c.n_buckets)
        start_id = net.pad_id if net.start_id is None else net.start_id
        writer.add_decoder_start_token_id(start_id or 0)


def add_rope(writer: Any, gguf: Any, c: GPTConfig) -> None:
    """Add what turns queries and keys. Llama 3's scaling is the tensor rope_freqs."""
    scaling = c.rope_scaling or {}
    kind = scaling.get("rope_type")
    size = rotary_size(c)
    theta = c.rope_theta
    if kind == "ntk":  # a larger base, as barelm/positions.py has it
        theta = theta * scaling["factor"] ** (size / (size - 2))
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(theta))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(scaling.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(scaling.get("beta_slow") or 1))
        usual = rope_length(replace(c, rope_scaling=plain_yarn(scaling)))
        writer.add_rope_scaling_attn_factors(rope_length(c) / usual)


def plain_yarn(scaling: dict) -> dict:
    """YaRN with the usual length of its queries and keys, which llama.cpp multiplies by."""
    return {
        key: scaling[key] for key in ("rope_type", "factor", "original_max_position_embeddings")
    }


def add_pooling(writer: Any, gguf: Any, net: GPT) -> None:
    """Add which state is a text's vector; of an encoder that was made for none, the mean."""
    pooling = {"first": gguf.PoolingType.CLS, "mean": gguf.PoolingType.MEAN}
    if net.task == "embed":
        pooling["last"] = gguf.PoolingType.LAST
    writer.add_pooling_type(pooling.get(net.pooling, gguf.PoolingType.MEAN))


def add_encoder(writer: Any, gguf: Any, net: GPT) -> None:
    """Add who sees whom in an encoder."""
    c = net.config
    writer.add_causal_attention(False)
    if c.n_types:
        writer.add_token_type_count(c.n_types)
    if c.pos != "rope":
        return
    if c.window:
        writer.add_sliding_window(c.window)
        writer.add_sliding_window_pattern([pattern.window > 0 for pattern in c.patterns])
    writer.add_rope_freq_base_swa(float(c.local_rope_theta or c.rope_theta))
    if c.mlp == "swiglu":
        writer.add_string(f"{writer.arch}.hidden_activation", "silu")


# --------------------------------------------------------------------------------------------------
# Tensors


def entries_of(net: GPT) -> list[Entry]:
    """The tensors of a network's file, as Entries, in the order of the network."""
    c = net.config
    kind = family(c)
    architecture = ARCHITECTURES[kind]
    entries = {}
    for name, t in saved_tensors(net).items():
        if not c.causal and name.startswith(OUR_HEADS):
            continue
        theirs = name_in_file(name, architecture)
        if theirs in entries:  # k joins q, and v both: state_dict has them in this order
            entries[theirs].sources.append(t)
            continue
        entry = Entry(theirs, [t])
        if architecture.turns_neighbours and re.search(r"\.[qk]_proj\.", name):
            entry.change = half_split_to_pairs(c.head_dim)
        if theirs == "position_embd.weight":
            entry.first_row = c.position_offset
        if name == "model.norm.weight" and c.logit_scale != 1:
            entry.change = scaled_by(c.logit_scale)  # T5's: there is no key for it
        entries[theirs] = entry
    out = list(entries.values())
    if architecture.own_head and c.tie:
        out.append(Entry("output.weight", entries["token_embd.weight"].sources))
    if (c.rope_scaling or {}).get("rope_type") == "llama3":  # what each frequency is divided by
        plain = rope_frequencies(replace(c, rope_scaling=None), torch.device("cpu"))
        factors = plain / rope_frequencies(c, torch.device("cpu"))
        out.append(Entry("rope_freqs.weight", [factors]))
    return out


def name_in_file(name: str, architecture: Architecture) -> str:
    """The name in a GGUF file of one of our tensors."""
    stem, _, end = name.rpartition(".")
    if end not in ("weight", "bias"):  # a stack of experts
        stem = name
        end = "weight"
    if stem in OUTER:
        theirs = OUTER[stem]
    else:
        theirs = name_in_block(stem, architecture)
    theirs = f"{theirs}.{end}"
    for usual, own in architecture.renames:
        theirs = re.sub(usual, own, theirs)
    return theirs


def name_in_block(stem: str, architecture: Architecture) -> str:
    match = re.fullmatch(r"model\.(encoder\.)?layers\.(\d+)\.(.*)", stem)
    if match is None:
        raise refusal(f"llama.cpp's {architecture.name} has no tensor for {stem}")
    encoder, number, inner = match.groups()
    block = f"blk.{number}"
    if architecture.name == "t5":
        block = f"enc.{block}" if encoder else f"dec.{block}"
    if inner in INNER:
        return f"{block}.{INNER[inner]}"
    inner = re.sub(r"^mlp\.experts\.(\w+)_proj$", r"ffn_\1_exps", inner)
    inner = re.sub(r"^mlp\.(\w+)_proj$", r"ffn_\1", inner)
    inner = re.sub(r"^self_attn\.([qkv])_(proj|norm)$", r"attn_\1_\2", inner)
    inner = re.sub(r"^cross_attn\.([qkv])_proj$", r"cross_attn_\1", inner)
    inner = inner.removesuffix("_proj")
    if architecture.joins_qkv:
        inner = re.sub(r"^attn_[qkv]$", "attn_qkv", inner)
    if architecture.name == "modern-bert" and inner == "ffn_gate":  # above the other in one tensor
        inner = "ffn_up"
    return f"{block}.{inner}"


def half_split_to_pairs(head_dim: int) -> Callable:
    """Of a matrix (heads * D, C) the same rows in Meta's order, in which a head's 2i and 2i + 1 are
    turned together; in ours it is i and i + D / 2."""

    def change(t):
        halves = t.view(-1, 2, head_dim // 2, *t.shape[1:])  # (heads, 2, D / 2, C)
        return halves.transpose(1, 2).reshape(t.shape)

    return change


def scaled_by(factor: float) -> Callable:
    def change(t):
        return t * factor

    return change
