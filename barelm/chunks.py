"""An order of windows for data that memory, or the disk, does not hold: chunk by chunk.

A shard is divided into chunks of about CHUNK tokens. An epoch permutes all chunks, takes so many of
them as a group, and permutes the windows of a group. So a stretch of training reads a few hundred
files' ranges, not all of them, and what comes next is known, and can be fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.run import UserError
from barelm.shards import Windows

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 1 << 19  # tokens: 1 MiB of uint16


def windows_per_chunk(stride: int) -> int:
    """How many windows begin in a chunk: as many as fill it, but one at least."""
    return max(1, CHUNK // stride)


def chunk_tokens(stride: int) -> int:
    """Tokens from the beginning of a chunk to that of the next: a whole number of windows."""
    return windows_per_chunk(stride) * stride


class ChunkedWindows(Windows):
    """The same windows, by the same numbers, as `Windows`, in another order, which is a function of
    the seed and the position too. Its memory is a number for each chunk, not for each window.

    group: chunks whose windows are shuffled together. Where the shards are elsewhere, their cache
    is told which chunks come next."""

    def __init__(self, paths: list[Path], seq_len: int, seed: int = 0, stride: int = 0,
                 n_vocab: int = 0, shards: Any = None, group: int = 1) -> None:  # fmt: skip
        super().__init__(paths, seq_len, seed, stride=stride, n_vocab=n_vocab, shards=shards)
        self.group = group
        first_windows = []
        counts = []
        size = windows_per_chunk(self.stride)
        begin = 0
        for end in self.ends.tolist():
            firsts = np.arange(begin, end, size)  # of each chunk of the shard
            first_windows.append(firsts)
            counts.append(np.minimum(firsts + size, end) - firsts)
            begin = end
        self.first_windows = np.concatenate([*first_windows, np.empty(0, np.int64)])  # (chunks,)
        self.counts = np.concatenate([*counts, np.empty(0, np.int64)])  # (chunks,) windows
        self.group_orders = {}  # {(epoch, group): its windows in order}, the last two

    def at(self, position: int) -> int:
        """The window at a position of the global sequence."""
        epoch, i = divmod(position, self.n)
        if epoch != self.epoch:
            self.order, self.group_ends = self.chunk_order(epoch)
            self.epoch = epoch
        number = int(np.searchsorted(self.group_ends, i, side="right"))
        begin = int(self.group_ends[number - 1]) if number > 0 else 0
        return int(self.group_order(epoch, number)[i - begin])

    def chunk_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of an epoch: the chunks in order, and of each group the windows up to its end."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        last_chunks = np.arange(self.group, len(order) + self.group, self.group) - 1
        last_chunks = np.minimum(last_chunks, len(order) - 1)
        return order, np.cumsum(self.counts[order])[last_chunks]

    def chunks_of_group(self, epoch: int, number: int) -> np.ndarray:
        """The numbers of a group's chunks; of a group behind the epoch's last, the next epoch's
        first ones."""
        order = self.order
        if number == len(self.group_ends):
            order, _ = self.chunk_order(epoch + 1)
            number = 0
        return order[number * self.group : (number + 1) * self.group]

    def group_order(self, epoch: int, number: int) -> np.ndarray:
        """The windows of a group, in order: (windows,) int64."""
        key = epoch, number
        if key not in self.group_orders:
            windows = []
            for chunk in self.chunks_of_group(epoch, number):
                first = self.first_windows[chunk]
                windows.append(np.arange(first, first + self.counts[chunk]))
            rng = np.random.default_rng([self.seed, epoch, number])
            while len(self.group_orders) > 1:  # a batch straddles two of them
                del self.group_orders[next(iter(self.group_orders))]
            self.group_orders[key] = rng.permutation(np.concatenate(windows))
            if self.cache:
                ahead = [*self.chunks_of_group(epoch, number)]
                ahead += [*self.chunks_of_group(epoch, number + 1)]
                self.cache.ahead(self.remote_chunks(self.first_windows[ahead]))
        return self.group_orders[key]


def check_chunks(shuffle_chunks: int, cache_gb: float) -> None:
    """Refuse a cache that does not hold the chunks in use, and those that come next."""
    if shuffle_chunks < 0:
        raise UserError(f"shuffle_chunks={shuffle_chunks}: expected 0 or more")
    least = 3 * shuffle_chunks * 4 * CHUNK / 1e9  # a token has 4 bytes at most
    if cache_gb < least:
        why = f"shuffle_chunks={shuffle_chunks} takes {least:.2g}"
        raise UserError(f"cache_gb={cache_gb}: {why}: raise it, or lower that")
