"""Who sees whom: one rule, from which come the dense mask, the block mask of a GPU's kernel, what
a cache has to hold, and how many keys a query is held against.

A new pattern is one function of positions: an entry of PATTERNS. B rows, T queries, S keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """What the tokens of a layer see."""

    causal: bool = True  # nothing behind themselves
    kind: str = "full"  # all, or an entry of PATTERNS
    window: int = 0  # its size in tokens
    n_sinks: int = 0  # so many first tokens are seen by all (Xiao et al. 2024, StreamingLLM)

    def sees_all(self, n: int) -> bool:
        """Whether it hides nothing but what is behind a token, of n tokens from position 0 on."""
        if self.kind == "full":
            return True
        reach = self.window if self.causal or self.kind != "sliding" else self.window // 2 + 1
        return n <= reach

    @property
    def reach(self) -> int | None:
        """No token sees one that is further from it; None: any."""
        if self.n_sinks or self.kind not in ("sliding", "local"):
            return None
        if self.kind == "sliding" and not self.causal:
            return self.window // 2
        return self.window - 1


# --------------------------------------------------------------------------------------------------
# The patterns: whether a token at position `query` sees one at `key`, bool, of int tensors that
# broadcast. What is behind a causal token is hidden by `may_look`.


def sliding(query: Tensor, key: Tensor, pattern: Pattern) -> Tensor:
    """The last `window` tokens, itself counted; without causality half of it on each side."""
    if pattern.causal:
        return query - key < pattern.window
    return (query - key).abs() <= pattern.window // 2


def local(query: Tensor, key: Tensor, pattern: Pattern) -> Tensor:
    """Its own block of `window` tokens."""
    return query // pattern.window == key // pattern.window


def strided(query: Tensor, key: Tensor, pattern: Pattern) -> Tensor:
    """The last `window` tokens, and every window-th one before (Child et al. 2019, 4.3)."""
    distance = (query - key).abs()
    return (distance < pattern.window) | (distance % pattern.window == 0)


def fixed(query: Tensor, key: Tensor, pattern: Pattern) -> Tensor:
    """Its own block, and the last eighth of each block, which sums it up (Child et al., 4.3)."""
    size = pattern.window
    return local(query, key, pattern) | (key % size >= size - max(1, size // 8))


PATTERNS = {"sliding": sliding, "local": local, "strided": strided, "fixed": fixed}


def may_look(pattern: Pattern, query: Tensor, key: Tensor, query_doc: Tensor | None = None,
             key_doc: Tensor | None = None) -> Tensor:  # fmt: skip
    """Whether a token at position `query` may look at one at position `key`, both counted from the
    beginning of their documents: bool, of int tensors that broadcast. A key at a negative position
    is a cache's empty place. It is asked of whole squares of tokens, and by kernels of one pair at
    a time."""
    seen = key <= query if pattern.causal else key >= 0
    if pattern.kind != "full":
        near = PATTERNS[pattern.kind](query, key, pattern)
        if pattern.n_sinks:
            near = near | (key < pattern.n_sinks)
        seen = seen & near & (key >= 0)
    if query_doc is not None:
        seen = seen & (key_doc == query_doc)
    return seen


def attention_mask(pattern: Pattern, positions: Tensor, key_positions: Tensor,
                   docs: Tensor | None = None, key_docs: Tensor | None = None,
                   alone: bool = True) -> Tensor | None:  # fmt: skip
    """What the tokens at positions (B or 1, T) may look at, of those at key_positions (B or 1, S):
    a mask (B or 1, 1, T, S) bool, true where one may; or None where attention needs no mask.

    docs (B, T), key_docs (B, S; None: docs): tokens look at their own document only. alone: keys
    and queries are the same tokens in the order of their positions, from 0 on, or there is one
    query, behind all keys: then causality follows from their order in the tensors alone."""
    if alone and docs is None and pattern.sees_all(key_positions.shape[1]):
        return None
    query = positions[:, :, None]  # (B or 1, T, 1)
    key = key_positions[:, None, :]  # (B or 1, 1, S)
    if docs is None:
        mask = may_look(pattern, query, key)
    else:
        key_docs = docs if key_docs is None else key_docs
        mask = may_look(pattern, query, key, docs[:, :, None], key_docs[:, None, :])
    return mask[:, None]  # (B or 1, 1, T, S): the same for all heads


def with_bias(mask: Tensor, bias: Tensor) -> Tensor:
    """A bias (B or 1, H, T, S) float that is added to the scores, and -inf where mask hides."""
    if bias is None:
        return mask
    return bias.masked_fill(~mask, -torch.inf)
