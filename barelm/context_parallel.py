"""Context parallelism: several processes share the tokens of each window.

    split_tokens(net, mesh)  # in place; barelm/parallel.py calls it
    loss_sum, n_targets = net(ids, targets)  # of this process's tokens; ids, targets are whole

A window of T tokens is cut into 2 n chunks, n being the processes that share it, and process r has
the chunks r and 2 n - 1 - r: a causal token looks at those before it, so that all processes have as
much to do. What is computed for each token by itself needs no other process. Attention does: the
keys and values of all tokens are gathered (Llama Team 2024, "The Llama 3 Herd of Models", 3.3.2),
and backward their gradients are added up where they came from. Queries are not sent: each process
has its own tokens' alone, and of scores, which grow with T^2, the n-th part.

B rows, H heads of queries, G of keys and values, D: head_dim, t: tokens of a process, T / n."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Shard

from barelm.patterns import attention_mask
from barelm.positions import document_positions
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from barelm.mesh import Mesh
    from barelm.patterns import Pattern
    from model import GPT, GPTConfig


def check_tokens(c: GPTConfig, cp: int) -> None:
    """Refuse a network whose windows cp processes cannot share."""
    why = ""
    if not c.causal or c.is_seq2seq:
        why = "encoders read windows whole: causal networks alone share them"
    elif c.mtp:
        why = "multi-token prediction looks at tokens that other processes have: --mtp=0"
    elif c.n_experts:
        why = "experts are balanced over windows that are whole"
    if why:
        raise UserError(f"--cp={cp}: {why}")


def check_length(seq_len: int, cp: int) -> None:
    """Refuse windows of so many tokens that cp processes cannot share."""
    n = 2 * cp
    if seq_len % n:
        near = max(1, seq_len // n) * n
        raise UserError(f"--cp={cp} cuts windows into {n} chunks: --seq_len={near}")


def split_tokens(net: GPT, mesh: Mesh) -> None:
    """Let a network with targets compute this process's tokens of each window alone, where the
    processes of mesh's "cp" share them."""
    cp = mesh.sizes.cp
    if cp == 1:
        return
    check_tokens(net.config, cp)
    net.tokens = TokenShare(mesh.window_mesh["cp"], mesh.rank_of("cp"), cp)


class TokenShare:
    """Which tokens of a window this process has: the process `rank` of `size` on mesh, a DeviceMesh
    of the one dimension "cp"."""

    def __init__(self, mesh: Mesh, rank: int, size: int) -> None:
        self.mesh = mesh
        self.rank = rank
        self.size = size

    @property
    def chunks(self) -> tuple[int, int]:
        """The numbers of this process's two chunks of a window."""
        return self.rank, 2 * self.size - 1 - self.rank

    def own(self, x: Tensor) -> Tensor:
        """This process's tokens (B, t) of those of a window, x (B, T)."""
        check_length(x.shape[1], self.size)
        chunks = x.chunk(2 * self.size, 1)
        return torch.cat([chunks[number] for number in self.chunks], 1)

    def cut(self, ids: Tensor, targets: Tensor, options: dict) -> tuple:
        """What `GPT.forward` goes on with: this process's ids and targets (B, t), and `hidden`'s
        options."""
        docs = options.pop("docs", None)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if docs is not None:
            positions = document_positions(positions, docs)
        options["window"] = SharedWindow(self, positions, docs)
        return self.own(ids), self.own(targets), options

    def gather(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """The keys and values (B, G, T, D) of a window's tokens, in their order, of those that each
        process has (B, G, t, D)."""
        kv = torch.stack((k, v))  # (2, B, G, t, D): one exchange
        whole = DTensor.from_local(kv, self.mesh, [Shard(3)], run_check=False)
        # Each process has a part of their gradients, by its own queries.
        whole = whole.full_tensor(grad_placements=[Partial()])  # (2, B, G, T, D)
        chunks = whole.chunk(2 * self.size, 3)  # process by process: 0, 2 n - 1, 1, 2 n - 2, …
        in_order = chunks[::2] + chunks[1::2][::-1]
        return torch.cat(in_order, 3).unbind(0)


class SharedWindow(NamedTuple):
    """All tokens of windows that several processes share."""

    share: TokenShare
    positions: torch.Tensor  # (B or 1, T), in their documents
    docs: torch.Tensor | None  # (B, T)

    @property
    def own_positions(self) -> Tensor:
        return self.share.own(self.positions)

    def mask(self, pattern: Pattern, in_order: bool = True) -> Tensor | None:
        """What this process's tokens may look at, of all: as `attention_mask` gives it, (B or 1,
        1, t, T), or None where that is all before them; in_order: where there may be none."""
        if in_order and self.docs is None and pattern.sees_all(self.positions.shape[1]):
            return None
        own = self.own_positions
        if self.docs is None:
            return attention_mask(pattern, own, self.positions, alone=False)
        own_docs = self.share.own(self.docs)
        return attention_mask(pattern, own, self.positions, own_docs, self.docs, alone=False)

    def shared(self, mask: Tensor) -> SharedMask:
        """The SharedMask of a mask."""
        return SharedMask(self.share, mask)


class SharedMask(NamedTuple):
    """A mask (B or 1, 1 or H, t, T) bool, or numbers to add to the scores, or None, for the tokens
    of this process; it says that keys and values are to be gathered. A tuple, so that a block that
    is recomputed in backward knows it too."""

    share: TokenShare
    mask: torch.Tensor | None

    def attend(self, plain: Callable, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0,
               reach: int | None = None, **options: Any) -> Tensor:  # fmt: skip
        """`Operations.attend` of causal tokens, of which this process has q (B, H, t, D), k and v
        (B, G, t, D). plain: `Operations.plain_attend`; options: its."""
        return shared_attention(plain, q, k, v, self.share, self.mask, dropout, reach, **options)


def shared_attention(attend: Callable, q: Tensor, k: Tensor, v: Tensor, share: TokenShare,
                     mask: Tensor, dropout: float = 0.0, reach: int | None = None,
                     **options: Any) -> Tensor:  # fmt: skip
    """What SharedMask.attend gives."""
    k, v = share.gather(k, v)
    size = q.shape[2] // 2  # of a chunk
    outputs = []
    for half, number in enumerate(share.chunks):
        # A chunk looks at no token behind it, nor at what is out of reach.
        begin = number * size
        end = begin + size
        low = 0 if reach is None else max(0, begin - reach)
        queries = q[:, :, half * size : (half + 1) * size]
        keys = k[:, :, low:end]
        values = v[:, :, low:end]
        if mask is not None:
            seen = mask[:, :, half * size : (half + 1) * size, low:end]
            y = attend(queries, keys, values, seen, dropout=dropout, **options)
        else:
            y = prefix_attention(attend, queries, keys, values, dropout, **options)
        outputs.append(y)
    return torch.cat(outputs, 2)


def prefix_attention(
    attend: Callable, q: Tensor, k: Tensor, v: Tensor, dropout: float, **options: Any
) -> Tensor:
    """Attention of the last tokens q (B, H, T, D) of a row to all of it, k and v (B, G, S, D): to
    themselves and to what is before them."""
    T = q.shape[2]
    S = k.shape[2]
    usual = not options.get("softcap") and options.get("sinks") is None
    if q.device.type == "cuda" and usual:
        from torch.nn.attention.bias import causal_lower_right

        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, S, D)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        scale = options.get("scale")
        mask = causal_lower_right(T, S)  # flash attention's own, which no memory is taken for
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return attend(q, k, v, mask[None, None], dropout=dropout, **options)
