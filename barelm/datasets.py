"""Data sets that prepare.py made, to train on: in a folder here, or streamed from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from barelm.chunks import ChunkedWindows
from barelm.run import UserError
from barelm.shards import Windows, document_layout
from barelm.stream import is_remote, open_remote
from barelm.tokenizer import Tokenizer

STREAMED_CHUNKS = 256  # that are shuffled together where the data is elsewhere


@dataclass
class Dataset:
    """One data set, with the shards of each split: train, val, and of a mix of sources val.NAME."""

    name: str
    folder: Path  # with meta.json and the tokenizer
    tok: Tokenizer
    paths: dict[str, list]  # {split: the paths, or elsewhere the names, of its shards}
    shards: dict[str, list]  # {split: its opened shards}; {} of files here, which are opened later

    @property
    def digest(self) -> str:
        """A hash that names the data."""
        return hashlib.sha256((self.folder / "meta.json").read_bytes()).hexdigest()

    @property
    def sources(self) -> list:
        """The sources that have validation shards of their own."""
        return sorted(split.removeprefix("val.") for split in self.paths if "." in split)

    def training(self, seq_len: int, seed: int, stride: int, shuffle_chunks: int) -> Windows:
        """The windows to train on, one at least."""
        shards = self.shards.get("train")
        options = dict(stride=stride, n_vocab=self.tok.n_vocab, shards=shards)
        paths = self.paths.get("train", [])
        group = shuffle_chunks
        if shards is not None and not group:
            group = STREAMED_CHUNKS
        if group:
            windows = ChunkedWindows(paths, seq_len, seed, group=group, **options)
        else:
            windows = Windows(paths, seq_len, seed, **options)
        if windows.n == 0:
            why = f"under {seq_len + 1} training tokens: lower --seq_len"
            raise UserError(f"{self.folder}: {why}")
        return windows

    def validation(self, seq_len: int, partial: bool, source: str | None = None) -> Windows:
        """The windows to validate with: of all, or of a source. partial: the last one of a shard
        may be short."""
        split = f"val.{source}" if source else "val"
        paths = self.paths.get(split, [])
        shards = self.shards.get(split)
        n_vocab = self.tok.n_vocab
        return Windows(paths, seq_len, partial=partial, n_vocab=n_vocab, shards=shards)


def open_dataset(name: str, seq_len: int, stride: int, cache_gb: float, make: str) -> Dataset:
    """The Dataset of this name: of the folder data/NAME, or of an address. make: the command that
    would make it."""
    if is_remote(name):
        folder, shards_of = open_remote(name, seq_len, stride, cache_gb)
        paths = {split: list(shards) for split, shards in shards_of.items()}
        shards = {split: list(shards.values()) for split, shards in shards_of.items()}
        return Dataset(name, folder, Tokenizer.from_folder(folder), paths, shards)
    folder = Path("data") / name
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder}: no prepared data: {make} first")
    paths = {
        "train": sorted(folder.glob("train_*.bin")),
        "val": sorted(folder.glob("val_*.bin")),
    }
    for path in sorted(folder.glob("val.*.bin")):  # of a mix: val.wikipedia_000000.bin
        paths.setdefault(path.name.rpartition("_")[0], []).append(path)
    return Dataset(name, folder, Tokenizer.from_folder(folder), paths, {})


def check_alike(sets: list[Dataset]) -> None:
    """Refuse data sets that cannot be mixed, since their tokens mean different things."""
    first = sets[0]
    for other in sets[1:]:
        same = (first.tok.bytes, first.tok.eot_id) == (other.tok.bytes, other.tok.eot_id)
        layouts = [document_layout(each.folder, each.tok) for each in (first, other)]
        if not same or layouts[0] != layouts[1]:
            mend = f"prepare one with --tokenizer={first.folder}"
            raise UserError(f"mix: {first.name} and {other.name} have different tokenizers: {mend}")


def digest_of(sets: list[Dataset]) -> str:
    """A hash that names the data of these data sets."""
    if len(sets) == 1:
        return sets[0].digest
    lines = [f"{each.name} {each.digest}\n" for each in sets]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
