"""Optimizers, their parameter groups, and what a run costs in FLOPs and memory.

A new optimizer is a class here, an entry of MOMENTS, and a line in `make_optimizer`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from barelm.adamw import AdamWInParts
from barelm.fast import KEPT, head_rows, keys_of_block
from barelm.muon import Muon
from barelm.parts import part_like
from barelm.patterns import Pattern, may_look
from barelm.run import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim.adamw import AdamW

    from barelm.mesh import Mesh, Sizes
    from model import GPT, GPTConfig

# The optimizers by name, and how many numbers each keeps a parameter.
MOMENTS = {"muon": 1, "adamw": 2}


@dataclass(frozen=True)
class StatePlan:
    """Who holds an optimizer's state, and where."""

    group: object = None  # the processes that hold the same parameters whole; None: all
    alone: bool = False  # there is no other process that does
    zero: bool = False  # each process of the group has the state of some of the parameters
    offload: bool = False  # it lives in the host's memory
    narrow: bool = False  # gradients are kept in bfloat16

    @classmethod
    def of(
        cls, mesh: Mesh, zero: int = 0, offload: bool = False, narrow: bool = False
    ) -> StatePlan:
        """That of a run's Mesh, by train.py's keys."""
        alone = mesh.sizes.replica == 1
        if zero and (mesh.sizes.shard > 1 or mesh.sizes.tp > 1):
            raise UserError("zero=1: for --parallel=ddp without --tp: there the state is in parts")
        return cls(mesh.group_of("replica"), alone, bool(zero) and not alone, offload, narrow)

    def make(self, kind: type, params: list, hyper: dict, **options: Any) -> torch.optim.Optimizer:
        """An optimizer of this kind with these hyperparameters."""
        if not self.zero:
            return kind(params, **hyper, **options)
        from torch.distributed.optim import ZeroRedundancyOptimizer

        kind = partial(kind, **options)
        return ZeroRedundancyOptimizer(params, kind, process_group=self.group, **hyper)


def make_optimizer(net: GPT, name: str = "muon", lr: float = 1e-3, weight_decay: float = 0.1,
                   betas: tuple[float, float] = (0.9, 0.95), momentum: float = 0.95,
                   dtype: torch.dtype = torch.float32,
                   plan: StatePlan = StatePlan()) -> list:  # fmt: skip
    """A list of a network's optimizers: AdamW for all, or Muon, with products in `dtype`, for the
    blocks' matrices and AdamW for the rest. Each group keeps the peak as `initial_lr`. plan: who
    holds the state."""
    if name not in MOMENTS:
        raise UserError(f"--optimizer={name}: expected {' or '.join(MOMENTS)}")
    if net.quantize:
        raise UserError(f"{net.quantize} weights are not trained: start from what they were")
    matrices, wide, narrow = split_parameters(net)
    if name == "muon":
        optimizers = [
            *make_adamw(wide, narrow, lr, weight_decay, betas, plan),
            *make_muon(matrices, lr, momentum, weight_decay, dtype, plan),
        ]
    elif name == "adamw":
        # In the order of the network, in which a state.pt of AdamW numbers them.
        wide = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
        optimizers = make_adamw(wide, narrow, lr, weight_decay, betas, plan)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = lr
    return optimizers


def make_adamw(wide: list[nn.Parameter], narrow: list[nn.Parameter], lr: float, weight_decay: float,
               betas: tuple[float, float],
               plan: StatePlan = StatePlan()) -> list[AdamW]:  # fmt: skip
    """AdamW in a list, or none where nothing is to learn; `narrow` parameters do not decay."""
    groups = []
    for params in alike_divided(wide):
        groups.append({"params": params, "weight_decay": weight_decay})
    for params in alike_divided(narrow):
        groups.append({"params": params, "weight_decay": 0.0})
    if not groups:
        return []
    hyper = {"lr": lr, "betas": betas}
    if plan.offload or plan.narrow:
        return [plan.make(AdamWInParts, groups, hyper, offload=plan.offload)]
    return [plan.make(torch.optim.AdamW, groups, hyper, fused=True)]


def alike_divided(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in lists of such as are divided over the same processes, or not at all: a fused
    step takes no others together."""
    lists = {}
    for p in params:
        lists.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return list(lists.values())


def make_muon(matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float,
              dtype: torch.dtype, plan: StatePlan = StatePlan()) -> list[Muon]:  # fmt: skip
    """Muon in a list, or none."""
    if not matrices:
        return []
    hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    shares = not (plan.zero or plan.alone)  # with ZeRO each has matrices of its own
    options = {"dtype": dtype, "group": plan.group, "shares": shares, "offload": plan.offload}
    return [plan.make(Muon, matrices, hyper, **options)]


def split_parameters(net: GPT) -> tuple[list, list, list]:
    """The parameters that learn: the blocks' matrices, and their stacks of matrices (experts); the
    embedding, the head and whatever else has two dimensions; norms and biases, which are not
    decayed."""
    matrices, wide, narrow = [], [], []
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim > 1 and ".layers." in name:
            matrices.append(p)
        elif p.ndim > 1:
            wide.append(p)
        else:
            narrow.append(p)
    return matrices, wide, narrow


# --------------------------------------------------------------------------------------------------
# What is saved, and a resume


def held_state(optimizer: torch.optim.Optimizer) -> dict:
    """What this process holds of an optimizer's state, {parameter: {name: tensor}}."""
    return getattr(optimizer, "optim", optimizer).state  # ZeRO's own is in its `optim`


# What a state.pt has of each parameter. Of an optimizer that is not here, the shapes are checked.
ADAMW_NAMES = {"step", "exp_avg", "exp_avg_sq"}
STATE_NAMES = {torch.optim.AdamW: ADAMW_NAMES, AdamWInParts: ADAMW_NAMES, Muon: {"momentum"}}


def restore_optimizers(optimizers: list, saved: list[dict], path: Path) -> None:
    """Put saved state_dicts into optimizers, whose settings stay this run's: its learning rate may
    be another. What does not fit the parameters is a UserError that begins with `path`."""
    wrong = UserError(f"{path}: its optimizers are not this run's: damaged, or foreign")
    if not isinstance(saved, list) or len(saved) != len(optimizers):
        raise wrong
    for optimizer, before in zip(optimizers, saved):
        state = before.get("state") if isinstance(before, dict) else None
        if not isinstance(state, dict) or not fits_optimizer(state, optimizer):
            raise wrong
        groups = optimizer.state_dict()["param_groups"]
        state = divided_state(state, optimizer)
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def divided_state(
    state: dict[int, dict[str, Tensor]], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """A saved state with, of parameters that are divided, the parts of what it has of them."""
    params = []
    for group in optimizer.param_groups:
        params += group["params"]
    divided = {}
    for number, entry in state.items():
        like = params[number]
        divided[number] = {
            name: part_like(value, like) if value.shape == like.shape else value
            for name, value in entry.items()
        }
    return divided


def fits_optimizer(state: dict[int, dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> bool:
    """Whether a saved state, {number of a parameter: {name: tensor}}, is one of this optimizer."""
    params = []
    for group in optimizer.param_groups:
        params += group["params"]
    names = STATE_NAMES.get(type(optimizer))
    for number, entry in state.items():
        if type(number) is not int or not 0 <= number < len(params):
            return False
        if not isinstance(entry, dict) or (names and set(entry) != names):
            return False
        for name, value in entry.items():
            like = torch.zeros(()) if name == "step" else params[number]
            if not same_kind(value, like):
                return False
    return True


def same_kind(value: Tensor, like: Tensor) -> bool:
    """Whether a value is a plain tensor of the shape and dtype of the tensor `like`."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return value.shape == like.shape and value.dtype == like.dtype


# --------------------------------------------------------------------------------------------------
# FLOPs

# A part of a device's name, and its peak in TFLOP/s of dense bfloat16: the makers' data sheets.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,  # stands before the H100, of whose name it is a part
    "H100": 989,
    "A100": 312,
    "A10G": 70,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's peak rate in FLOP/s, or None for an unknown one."""
    if device.type != "cuda":
        return None
    device_name = torch.cuda.get_device_name(device)
    for part, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{part}\b", device_name):  # whole words: an RTX A1000 is no A100
            return 1e12 * tflops
    return None


def n_params(net: GPT) -> int:
    return sum(p.numel() for p in net.parameters())


def n_active(net: GPT) -> int:
    """How many parameters a token is computed with: of a layer's experts those that it is given
    to."""
    c = net.config
    idle = c.n_experts - c.n_experts_per_token
    expert = MLP_MATRICES[c.mlp] * c.n_embd * c.expert_hidden
    return n_params(net) - sum(c.has_experts) * idle * expert


# How many matrices an MLP of each kind multiplies a token with. One that is not here is counted
# nowhere else: FLOPs, memory and the decision to compile stand on it.
MLP_MATRICES = {"swiglu": 3, "geglu": 3, "geglu_erf": 3, "gelu": 2, "gelu_erf": 2}
MLP_MATRICES |= {"relu": 2, "relu2": 2}


def flops_per_token(c: GPTConfig, seq_len: int, backward: bool = True) -> float:
    """FLOPs per token in matrix products, a multiply and an add each counted (Kaplan et al. 2020);
    backward costs twice forward. Of an encoder-decoder: per token of a target of seq_len, behind a
    source of seq_len."""
    source_len = seq_len if c.is_seq2seq else 0
    return sequence_flops(c, seq_len, source_len, backward) / seq_len


def sequence_flops(c: GPTConfig, length: int, source_len: int = 0, backward: bool = True) -> int:
    """FLOPs of a row of `length` tokens, of an encoder-decoder behind a source of source_len."""
    forward = length * c.n_embd * c.vocab_size  # the head
    if c.mlm_head:
        forward += length * c.n_embd**2
    heads = 2 * c.head_dim * c.n_embd * (c.n_head + c.n_kv_head)  # q and o, k and v
    for i, pattern in enumerate(c.patterns):
        forward += length * (heads + attention_products(c, pattern, length) + mlp_weights(c, i))
    if c.is_seq2seq:
        for pattern in c.encoder_patterns:
            keys = attention_products(c, pattern, source_len)
            forward += source_len * (heads + keys + MLP_MATRICES[c.mlp] * c.n_embd * c.n_hidden)
        # Cross-attention: q and o of the target's tokens, k and v of the source's.
        forward += length * c.n_layer * 2 * c.head_dim * c.n_head * (c.n_embd + source_len)
        forward += source_len * c.n_layer * 2 * c.head_dim * c.n_kv_head * c.n_embd
    if c.mtp and backward:  # in training alone
        block = heads + attention_products(c, Pattern(), length)
        block += MLP_MATRICES[c.mlp] * c.n_embd * c.n_hidden + 2 * c.n_embd**2
        forward += length * c.mtp * (block + c.n_embd * c.vocab_size)
    flops = 2 * forward
    return 3 * flops if backward else flops


def attention_products(c: GPTConfig, pattern: Pattern, length: int) -> float:
    """Numbers that a token is multiplied with in attention: in q k^T, and its softmax times v.
    Biases of scores are looked up, not multiplied."""
    return 2 * c.head_dim * c.n_head * mean_keys(pattern, length)


@lru_cache(1024)  # a run asks at each step
def mean_keys(pattern: Pattern, length: int) -> float:
    """Keys that a token of `length` is held against. Full attention counts as the whole square,
    causal or not, as is usual; others by what they see of what full attention would."""
    n = round(length)
    if pattern.sees_all(n):
        return length
    keys = torch.arange(n)
    every = max(1, n // 2048) | 1  # of long rows some queries, at all places of a block: it is odd
    full = Pattern(causal=pattern.causal)
    n_seen = 0
    n_in_all = 0
    for queries in torch.arange(0, n, every).split(256):
        pairs = torch.ones(len(queries), n, dtype=torch.bool)
        n_seen += (pairs & may_look(pattern, queries[:, None], keys)).sum().item()
        n_in_all += (pairs & may_look(full, queries[:, None], keys)).sum().item()
    return length * n_seen / n_in_all


def mlp_weights(c: GPTConfig, layer: int) -> int:
    """Weights of a decoder layer's MLP that a token is multiplied with: where it has experts the
    router's, and those of the experts that the token is given to."""
    weights = MLP_MATRICES[c.mlp] * c.n_embd
    if not c.has_experts[layer]:
        return weights * c.n_hidden
    n = c.n_experts_per_token + c.n_shared_experts
    return c.n_experts * c.n_embd + n * weights * c.expert_hidden


def mlp_numbers(c: GPTConfig, layer: int) -> int:
    """Numbers that a token leaves for backward in a decoder layer's MLP: before and behind the
    activation; of its experts each has its own, and what it reads and gives."""
    n = MLP_MATRICES[c.mlp] + 1
    if not c.has_experts[layer]:
        return n * c.n_hidden
    k = c.n_experts_per_token
    return (k + c.n_shared_experts) * n * c.expert_hidden + 3 * k * c.n_embd + 2 * c.n_experts


# --------------------------------------------------------------------------------------------------
# Memory


def memory_estimate(c: GPTConfig, params: int, rows: int, seq_len: int,
                    dtype: torch.dtype = torch.float32, recompute: int | bool = False,
                    moments: int = 2, device_type: str = "cpu",
                    grad_bytes: int = 4) -> tuple[int, int]:  # fmt: skip
    """Bytes that training needs, estimated: (parameters with gradients and optimizer state, and the
    head's piece; activations of a micro-batch of `rows`). moments: the optimizer's, a parameter;
    grad_bytes: a gradient's. recompute: so many blocks, the first ones, keep their input alone;
    True: all. An encoder-decoder's rows have a source of seq_len too."""
    width = dtype.itemsize  # bytes of a number within a product; elsewhere it is 4
    blocks = []  # bytes of a token in each, in the order in which they compute
    for i, pattern in enumerate(c.patterns):
        size = block_bytes(c, pattern, seq_len, width, device_type)
        blocks.append(size + width * mlp_numbers(c, i))
    if c.is_seq2seq:
        # Cross-attention: as much as self-attention, whose MLP is counted already.
        cross = 8 * c.n_embd + 2 * width * (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
        cross += score_bytes(c, seq_len, width)
        blocks = [size + cross for size in blocks]
        mlp = width * (MLP_MATRICES[c.mlp] + 1) * c.n_hidden
        encoder = []
        for pattern in c.encoder_patterns:
            encoder.append(block_bytes(c, pattern, seq_len, width, device_type) + mlp)
        blocks = encoder + blocks
    ahead = block_bytes(c, Pattern(), seq_len, width, device_type)
    ahead += width * (MLP_MATRICES[c.mlp] + 1) * c.n_hidden + 4 * 6 * c.n_embd  # two states, joined
    blocks += [ahead] * c.mtp
    n_again = len(blocks) if recompute is True else min(int(recompute), len(blocks))
    # Of a block that is computed again its input alone; and when backward comes to it all of it,
    # where what the blocks behind it have kept is free again.
    largest_again = max(blocks[:n_again], default=0)
    per_token = n_again * 4 * c.n_embd + max(largest_again, sum(blocks[n_again:]))
    # The head's: logits, their float32 copy and its gradient; the gradient of its matrix.
    head = c.vocab_size * ((width + 8) * head_rows(device_type, dtype, c.vocab_size) + 4 * c.n_embd)
    weights = params * (4 + grad_bytes + 4 * moments)
    if c.logit_softcap:  # logits are not made by pieces: those around tanh, log p and its gradient
        per_token += c.vocab_size * (width + 4 * 4)
    embedded = (4 + width) * c.n_embd * (2 if c.is_seq2seq else 1)
    return weights + head, rows * seq_len * (per_token + embedded)


def held_bytes(net: GPT, optimizer: str = "muon", sizes: Sizes | None = None, zero: int = 0,
               offload: bool = False, grad_bytes: int = 4) -> dict[str, float]:  # fmt: skip
    """Bytes that a process holds of a network from step to step, on the average of all: a dict of
    weights, gradients, the optimizer's state on its device, and state in the host's memory. sizes:
    a grid's (barelm.mesh.Sizes); None: one process."""
    matrices, wide, narrow = split_parameters(net)
    n_matrices = sum(p.numel() for p in matrices)
    n_others = sum(p.numel() for p in (*wide, *narrow))
    state = 4 * (MOMENTS[optimizer] * n_matrices + MOMENTS["adamw"] * n_others)
    n_parts = 1
    if sizes is not None:
        n_parts = sizes.pp * sizes.shard * sizes.tp
    spread = n_parts * sizes.replica if zero and sizes is not None else n_parts
    n_learning = n_matrices + n_others
    return {
        "weights": 4 * n_params(net) / n_parts,
        "gradients": grad_bytes * n_learning / n_parts,
        "optimizer": 0 if offload else state / spread,
        "host": state / spread if offload else 0,
    }


def block_bytes(c: GPTConfig, pattern: Pattern, seq_len: int, width: int, device_type: str) -> int:
    """Bytes that a token leaves in a block for backward, without the MLP's inside."""
    heads = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim  # q, k, v, and what attention gives
    # x and its sums and norms in float32, then what the products read.
    block = 4 * 4 * c.n_embd + width * (2 * c.n_embd + 2 * heads)
    plain = score_bytes(c, seq_len, width)
    if not plain and device_type == "cpu":
        block += width * c.n_head * probabilities_kept(pattern, seq_len, width)
    return block + plain


def probabilities_kept(pattern: Pattern, seq_len: int, width: int) -> int:
    """How many probabilities of a head BlockedAttention keeps of a token, on average."""
    reach = pattern.reach
    if reach is not None and 2 * reach < seq_len:
        keys = keys_of_block(seq_len, pattern.causal, reach)
        return keys if seq_len * keys <= KEPT else 0
    if width > 2 or seq_len > 1024:  # torch's kernel keeps none
        return 0
    return max(128, 5 * seq_len // 8 if pattern.causal else seq_len)


def score_bytes(c: GPTConfig, n_keys: int, width: int) -> int:
    """The same of the scores of all keys, where no kernel spares them: none does that caps them,
    has learned sinks, or learns what is added to them."""
    if c.softcap or c.sinks:  # in float32: before and behind tanh, and softmax; in v's dtype
        return c.n_head * n_keys * (4 * (3 if c.softcap else 2) + width)
    if c.pos == "relative":
        return c.n_head * n_keys * 2 * width
    return 0
