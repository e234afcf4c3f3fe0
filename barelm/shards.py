"""Token shards, llm.c's .bin files: opened, cut into windows, and told apart by document.

A shard is 256 little-endian int32, of which the first three are a magic number, a version and the
count of tokens, and then the tokens, uint16 or uint32.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F

from barelm.files import read_json
from barelm.objectives import Objective, causal_batch
from barelm.run import UserError, to_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from barelm.tokenizer import Tokenizer

HEADER_SIZE = 1024  # bytes
TOKEN_DTYPES = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # magic, version


def open_shard(path: Path) -> np.ndarray:
    """The tokens of an llm.c .bin shard, as a memory map (N,) uint16 or uint32."""
    try:
        header = np.fromfile(path, dtype="<i4", count=256)
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    count, dtype = shard_format(header, size, path)
    if count == 0:  # which no memory map can be of
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_SIZE, shape=(count,))


def shard_format(header: np.ndarray, size: int, path: Path | str) -> tuple[int, np.dtype]:
    """(tokens, their dtype) of the shard at path, by its header (256,) int32 and its size in
    bytes."""
    dtype = TOKEN_DTYPES.get(tuple(header[:2].tolist()))
    if len(header) < 256 or dtype is None:
        from config import command_of  # here, since the scripts alone need it

        raise UserError(f"{path}: not a token shard ({command_of('prepare')} makes them)")
    count = int(header[2])
    if count < 0 or size != HEADER_SIZE + count * dtype.itemsize:
        why = f"{size:,} bytes are not the {count:,} tokens that were written"
        raise UserError(f"{path}: cut short, or damaged: {why}; prepare it again")
    return count, dtype


def check_tokens(ids: np.ndarray, n_vocab: int, path: Path) -> None:
    """Refuse ids, an array of the shard at path, that are not below n_vocab."""
    if len(ids) and ids.max() >= n_vocab:
        why = f"the tokenizer has {n_vocab:,} tokens: prepare it again"
        raise UserError(f"{path}: token {ids.max()}, but {why}")


class Windows:
    """Windows of seq_len tokens from shards, in one global sequence: position i is window
    permutation(seed, epoch)[i mod n] of epoch i // n. How many were consumed is all its state.
    Another loader needs n, `at` and `batch`, and to be a function of the position alone: then a
    resume is exact, on any number of processes.

    stride: tokens from the beginning of a window to that of the next; 0: seq_len, so that none
    overlap. partial: the last window of a shard may be short, so that every token is a target once.
    n_vocab: a batch with an id from here on is refused, by its shard's name (0: not looked at).
    shards: the opened shards, where they are no files here (barelm/stream.py); paths are their
    names then."""

    def __init__(self, paths: list[Path], seq_len: int, seed: int = 0, partial: bool = False,
                 stride: int = 0, n_vocab: int = 0, shards: Any = None) -> None:  # fmt: skip
        self.paths = list(paths)
        self.shards = shards
        self.cache = None  # of shards that are elsewhere
        if shards is None:
            self.shards = [open_shard(path) for path in self.paths]
        elif shards:
            self.cache = shards[0].cache
        self.seq_len = seq_len
        self.seed = seed
        self.stride = stride or seq_len
        self.n_vocab = n_vocab
        sizes = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        shortest = 1 if partial else seq_len  # targets that a window has at least
        last_begin = sizes - 1 - shortest  # a window reads one token more than it has targets
        n_windows = np.maximum(last_begin + self.stride, 0) // self.stride
        self.ends = np.cumsum(n_windows)  # of shard s: windows ends[s - 1] to ends[s]
        self.n = int(self.ends[-1]) if self.paths else 0  # windows an epoch
        self.epoch = -1  # whose order it is:
        self.order = None

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds window i."""
        return int(np.searchsorted(self.ends, i, side="right"))

    def place(self, i: int) -> tuple[int, int]:
        """Where window i begins: (the number of its shard, the token)."""
        s = self.shard_of(i)
        first_window = int(self.ends[s - 1]) if s > 0 else 0
        return s, (i - first_window) * self.stride

    def window(self, i: int) -> np.ndarray:
        """Inputs and targets (seq_len + 1,) int64 of window i, -100 past the shard's end."""
        s, begin = self.place(i)
        tokens = self.shards[s][begin : begin + self.seq_len + 1]
        window = np.full(self.seq_len + 1, -100, dtype=np.int64)
        window[: len(tokens)] = tokens
        return window

    def at(self, position: int) -> int:
        """The window at a position of the global sequence."""
        epoch, i = divmod(position, self.n)
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            self.epoch = epoch
        return int(self.order[i])

    def rows(self, indices: list[int]) -> np.ndarray:
        """The windows of these indices, as `window` has them: (len(indices), seq_len + 1) int64."""
        if self.cache:  # all that is missing at once, rather than one after another
            self.cache.want(self.remote_chunks(indices))
        windows = np.stack([self.window(i) for i in indices])
        if self.n_vocab and windows.max() >= self.n_vocab:  # on the host: no device has to wait
            for i, window in zip(indices, windows):
                check_tokens(window, self.n_vocab, self.paths[self.shard_of(i)])
        return windows

    def remote_chunks(self, indices: list[int]) -> list:
        """The cache's chunks with these windows, each once."""
        chunks = {}
        for i in indices:
            s, begin = self.place(i)
            chunks[self.shards[s].chunk(begin)] = None
        return list(chunks)

    def batch(self, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The windows of these indices: (ids, targets) int64 (len(indices), seq_len)."""
        batch = batch_to_device(causal_batch(self.rows(indices)), device)
        return batch["ids"], batch["targets"]


def batch_to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """{name: tensor of the host} on the device, copied while the host goes on."""
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


class MicroBatches:
    """The micro-batches of one process: of `rows` windows each, every world-th of the global
    sequence, from the rank-th on. They depend on their position there, and on nothing else.
    objective: what the network is asked of them, such as an Objective; none is the next token.

    A GPU computes while the host goes on: the next micro-batch is best made then, and copied, so
    that it is there when it is wanted."""

    def __init__(self, windows: Windows, device: torch.device, rows: int, rank: int = 0,
                 world: int = 1, objective: Objective | None = None) -> None:  # fmt: skip
        self.windows = windows
        self.device = device
        self.rows = rows
        self.rank = rank
        self.world = world
        self.objective = objective or Objective()
        self.size = rows * world  # windows from one micro-batch to the next
        self.next_position = 0  # behind the one that was taken last
        self.ahead = {}  # {position: micro-batch}: the next one, where it is made

    def make(self, position: int) -> dict[str, Tensor]:
        """The network's arguments of the micro-batch that begins at this window: {name: tensor}."""
        first = position + self.rank
        positions = range(first, first + self.size, self.world)
        windows = self.windows.rows([self.windows.at(i) for i in positions])
        return batch_to_device(self.objective.batch(windows, positions), self.device)

    def take(self, position: int) -> dict[str, Tensor]:
        """The micro-batch at a position, made now if it was not made ahead."""
        self.next_position = position + self.size
        if position in self.ahead:
            return self.ahead.pop(position)
        return self.make(position)

    def make_ahead(self) -> None:
        """Make the one behind that which was taken last."""
        self.ahead = {}
        with contextlib.suppress(UserError):  # which is told when it is taken, if it ever is
            self.ahead[self.next_position] = self.make(self.next_position)


def document_layout(folder: Path, tok: Tokenizer) -> tuple[list[int], list]:
    """(ids before a document, ids behind it) in the shards of a dataset, as its meta.json has them;
    shards of an earlier version, which say nothing, have `eot_id` before each document."""
    layout = read_json(Path(folder) / "meta.json").get("document")
    if layout is None:
        return [tok.eot_id], []
    try:
        begin = layout["begin"]
        end = layout["end"]
        ids = begin + end
        if ids and all(type(id) is int and 0 <= id < tok.n_vocab for id in ids):
            return begin, end
    except (KeyError, TypeError):
        pass
    why = f"document: expected lists of ids, begin and end, and not {layout}"
    raise UserError(f"{folder}/meta.json: {why}")


def document_numbers(ids: np.ndarray, begin: int, end: int) -> Tensor:
    """Which document each token of ids (B, T) is of, counted along its row: (B, T) int64. begin and
    end are what `document_layout` gave. The end token is the last of its document; where there is
    none, what stands before a document is the first of it."""
    if not end:
        return (ids == begin[0]).cumsum(1)
    ended = (ids == end[-1]).cumsum(1)  # from the end token on
    return F.pad(ended[:, :-1], (1, 0))  # from the token behind it on
