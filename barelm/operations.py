"""The operations of a network, each as its formula, and where a faster way is chosen.

B rows of T tokens, C: n_embd, H: heads of queries, G: of keys and values, D: head_dim, S: tokens
to look at, V: vocab_size."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from barelm import invariant
from barelm.elementwise import FusedRMSNorm, FusedRotation, FusedSwiGLU, can_fuse
from barelm.fast import (
    SparseMask,
    block_mask,
    blocked_attention,
    can_block,
    can_piece,
    cross_entropy_sum,
    head_piece,
    joined_product,
    sparse_attention,
)
from barelm.float8 import can_float8, float8_product
from barelm.patterns import attention_mask, may_look
from barelm.run import compute_dtype, in_full

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.attention.flex_attention import BlockMask

    from barelm.patterns import Pattern
    from model import GPTConfig

GATED = ("swiglu", "geglu", "geglu_erf")  # MLPs with a third matrix


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) of x (…, D) by weight (D,), or (H, D) for x (…, H, D)."""
    # Weights are float32 in training: without the cast, bfloat16 would become float32 here.
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight.to(x.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (j, j + D / 2) of x (B, T, H, D) by the angles rope, `rope_angles`'."""
    cos, sin = rope
    a, b = x.chunk(2, -1)  # (B, T, H, D / 2) each
    return x * cos + torch.cat((b, a), -1) * sin  # a cos - b sin, and b cos + a sin


def attention_probabilities(q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = True,
                            scale: float | None = None, softcap: float = 0.0,
                            sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(D)) (B, H, T, S) float32: how much each token looks at each, by which
    `Operations.attend` weighs v. It takes the same q, k and mask, and O(T S) memory.

    softcap: scores s are softcap tanh(s / softcap) (Gemma Team 2024, 2). sinks (H,): a score of
    each head for nothing, so that what a token looks at may add up to less than 1."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, S, D)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with in_full(q):  # bfloat16 would round the scores
        scores = q.float() @ k.float().mT * scale  # (B, H, T, S)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is None and causal and q.shape[2] > 1:
        mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    if sinks is None:
        return scores.softmax(-1)
    nothing = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)  # (B, H, T, 1)
    return torch.cat((scores, nothing), -1).softmax(-1)[..., :-1]


def activation(kind: str, x: Tensor, ops: Operations) -> Tensor:
    """What an MLP of this kind does with each number x, a gated one with those of its gate."""
    if kind == "swiglu":
        return ops.silu(x)
    if kind in ("gelu", "geglu"):
        return ops.gelu(x)
    if kind in ("gelu_erf", "geglu_erf"):
        return ops.gelu(x, "none")
    if kind == "relu":
        return F.relu(x)
    return F.relu(x).square()  # relu2: So et al. 2021


class Operations:
    """The operations of a network, each as its formula. Where `fast` is true, barelm/fast.py or
    barelm/elementwise.py is asked first; what they have no faster way for, they leave to the
    formula. Who changes a formula deletes the `if` above it: before its first step train.py
    compares the two. `deterministic`: by barelm/invariant.py, so that a token's bits do not depend
    on what else is in the batch."""

    def __init__(self, fast: bool) -> None:
        self.fast = fast
        self.deterministic = False
        self.float8 = False  # the blocks' products in training, by barelm/float8.py
        # Join the matrices that read the same x, in training; a joint copy lives until backward,
        # where FSDP has each whole for as long as its block computes.
        self.joins = True
        self.packed: dict | None = None  # within `generating`: weights in a layout of the CPU's
        # Of several processes that share the heads: a HeadShare of barelm/tensor_parallel.py
        self.heads = None
        # Both by barelm/compiled.py, which compares before it sets them:
        self.sparse = False  # skip what no token sees: pays in compiled blocks on a GPU
        self.block_masks: dict = {}  # for it, of patterns without documents, which stay the same
        self.head_piece: Callable = head_piece  # or that compiled
        self.attend_cached: Callable | None = None  # within a Decoder's step on a GPU
        # What each row's adapter adds to a product: an Adapted of barelm/many_adapters.py
        self.adapted: Any = None

    def project(self, x: Tensor, *layers: nn.Module) -> Tensor:
        """The outputs of linear layers that read the same x (…, C), side by side."""
        y = self.product(x, layers)
        return y if self.adapted is None else self.adapted.add(y, x, layers)

    def product(self, x: Tensor, layers: tuple[nn.Module, ...]) -> Tensor:
        """`project` of the layers' own weights."""
        if self.deterministic:
            return invariant.project(x, layers)
        if self.heads is not None:
            return self.heads.project(x, layers)
        if self.float8 and can_float8(x, layers):
            return float8_product(x, layers)
        if self.fast:
            y = joined_product(x, layers, self.packed, self.joins)
            if y is not None:
                return y
        if len(layers) == 1:
            return layers[0](x)
        return torch.cat([layer(x) for layer in layers], -1)

    def of_heads(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Of a tensor that has all heads along dim the part that this process computes with."""
        return tensor if self.heads is None else self.heads.of_heads(tensor, dim)

    def all_heads(self, tensor: Tensor) -> Tensor:
        """All heads' (H, …), of what this process has of its own."""
        return tensor if self.heads is None else self.heads.all_heads(tensor)

    def own_heads(self, c: GPTConfig) -> GPTConfig:
        """A GPTConfig with the heads of this process alone."""
        return c if self.heads is None else self.heads.of_config(c)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self.heads is not None:
            weight = self.heads.own(weight)
        if self.fast and can_fuse(x):
            return FusedRMSNorm.apply(x, weight, eps)
        return rms_norm(x, weight, eps)

    def rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        size = rope[0].shape[-1]
        if size < x.shape[-1]:  # the rest of the head knows no positions
            turned, rest = x.split((size, x.shape[-1] - size), -1)
            return torch.cat((rotate(turned, rope), rest), -1)
        if self.fast and can_fuse(x):
            return FusedRotation.apply(x, *rope)
        return rotate(x, rope)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up (Shazeer 2020), of both side by side (…, 2 n_hidden)."""
        if self.fast and can_fuse(gate_up):
            return FusedSwiGLU.apply(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return self.silu(gate) * up

    def mask(self, pattern: Pattern, positions: Tensor, docs: Tensor | None, alone: bool = True,
             is_changed: bool = False, key_positions: Tensor | None = None) -> Any:  # fmt: skip
        """What `attend` takes to let tokens at positions (B or 1, T) look at those at key_positions
        (B or 1, S), or where this is None at one another. alone: as `attention_mask` has it;
        is_changed: whether scores are more than products, too."""
        if self.fast and self.sparse and key_positions is None:
            hides = docs is not None or not pattern.sees_all(positions.shape[1])
            if hides or is_changed:
                return SparseMask(self.seen_blocks(pattern, positions, docs))
        if key_positions is None:
            key_positions = positions
        return attention_mask(pattern, positions, key_positions, docs, alone=alone)

    def seen_blocks(self, pattern: Pattern, positions: Tensor, docs: Tensor | None) -> BlockMask:
        """The BlockMask of these; where there are no documents, the one that was made before."""
        if docs is not None:
            return block_mask(partial(may_look, pattern), positions, docs)
        key = (pattern, positions.shape[1], positions.device)
        if key not in self.block_masks:
            self.block_masks[key] = block_mask(partial(may_look, pattern), positions)
        return self.block_masks[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | SparseMask | None = None,
               dropout: float = 0.0, causal: bool = True, scale: float | None = None,
               softcap: float = 0.0, sinks: Tensor | None = None,
               reach: int | None = None) -> Tensor:  # fmt: skip
        """softmax(q k^T / sqrt(D)) v (B, H, T, D), of q (B, H, T, D), k and v (B, G, S, D).

        mask: `attention_mask`'s, or a SparseMask, or numbers to add to the scores; where it is
        None, causal says whether tokens see what is behind them. scale: None is 1 / sqrt(D).
        softcap, sinks: as in `attention_probabilities`. reach: no token sees one that is further
        from it, as the mask says too; None: any."""
        if isinstance(mask, SparseMask):
            return sparse_attention(q, k, v, mask, scale, softcap, sinks)
        if hasattr(mask, "share"):  # a SharedMask of processes that share a window
            options = dict(scale=scale, softcap=softcap, sinks=sinks)
            return mask.attend(self.plain_attend, q, k, v, dropout, reach, **options)
        plain = partial(self.plain_attend, causal=causal, scale=scale, softcap=softcap)
        if self.deterministic and not dropout:
            return invariant.attention(q, k, v, mask, sinks, plain, causal, scale, softcap)
        usual = not softcap and sinks is None  # all that the others know
        if self.attend_cached is not None and usual and causal and scale is None:
            return self.attend_cached(q, k, v, mask)
        if self.fast and usual and can_block(q, k, mask, dropout, causal, reach):
            return blocked_attention(q, k, v, mask, scale, causal, reach)
        return plain(q, k, v, mask, sinks, dropout=dropout)

    def plain_attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
                     sinks: Tensor | None = None, dropout: float = 0.0, causal: bool = True,
                     scale: float | None = None, softcap: float = 0.0) -> Tensor:  # fmt: skip
        """`attend` by torch's own, or where that lacks something by the formula."""
        if softcap or sinks is not None:
            p = attention_probabilities(q, k, mask, causal, scale, softcap, sinks)
            p = F.dropout(p, dropout).to(v.dtype)  # (B, H, T, S)
            return (p @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).to(q.dtype)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(k.dtype)  # torch adds it to scores of this type
        is_causal = False
        if causal and mask is None and q.shape[2] > 1:  # one token sees all that there is
            is_causal = True  # a literal: in torch.compile and torch.export T may be a symbol
        # A head of k and v for H / G heads of q. Where G is H it is off: some kernels lack it.
        grouped = q.shape[1] != k.shape[1]
        if grouped and k.device.type == "cuda" and not self.deterministic:
            # There flash attention alone has it, which has no mask and no float32: what torch does
            # in its place keeps all T x S scores in float32 (but always adds in the same order).
            has_flash = mask is None and compute_dtype(k) == torch.bfloat16
            if not has_flash:
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, S, D)
                v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
                grouped = False
        like_k = q.to(k.dtype)  # a cache may be float32 where the network is not
        y = F.scaled_dot_product_attention(
            like_k, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=grouped
        )
        return y.to(q.dtype)

    def silu(self, x: Tensor) -> Tensor:
        return invariant.silu(x) if self.deterministic else F.silu(x)

    def gelu(self, x: Tensor, approximate: str = "tanh") -> Tensor:
        """By tanh, as GPT-2's, or exact ("none")."""
        if self.deterministic:
            return invariant.gelu(x, approximate)
        return F.gelu(x, approximate=approximate)

    def cross_entropy(self, h: Tensor, head: nn.Linear | None, targets: Tensor, logits: Callable,
                      head_input: Callable) -> Tensor:  # fmt: skip
        """The sum of -log softmax(logits(h))[target], float32: h (N, C), targets (N,), -100 meaning
        none. The faster way makes head(head_input(h)) a piece at a time, and no `logits`; where
        there is more to the logits than that, head is None."""
        if self.fast and can_piece(head):
            h = head_input(h)
            if self.heads is not None and self.heads.has_part_of(head):
                return self.heads.cross_entropy(h, head, targets)
            return cross_entropy_sum(h, head.weight, targets, self.head_piece, head.bias)
        return F.cross_entropy(logits(h).float(), targets, reduction="sum")  # of (N, V)
