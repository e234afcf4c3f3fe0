"""The documents that are under way, on the disk, between reading them and writing shards.

In the working folder each unit has
    <unit>.txt         the texts of its documents, one after another
    <unit>.rows        a ROW for each
    <unit>.signatures  their MinHash (n, N_PERMUTATIONS) uint16, where near-duplicates are wanted
    <unit>.json        what was counted, and the sizes of the others: it comes last, so that the
                       files of a run that was killed count only where they are whole
A Corpus is a folder in there, of all units together: rows and signatures, cuts.npy, and for the
i-th unit <i>.tokens and <i>.npy.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from barelm.clean import Tally
from barelm.dedup import N_PERMUTATIONS
from barelm.files import read_json, require_zst, whole_file, write_json
from barelm.mix import SPLITS, map_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

# What is known of a document: its unit's name (16 hex digits), the bytes before it in the unit's
# .txt and its own; the hashes of its text, of its words in lower case and of its URL.
COLUMNS = ("unit", "begin", "size", "hash", "exact", "url")
ROW = np.dtype([(name, "<u8") for name in COLUMNS])
UNIT_FILES = (".txt", ".rows", ".signatures")
ALL = 2**62  # a cut behind any text


def sync(file: BinaryIO) -> None:
    """Wait until what was written to the file is on the disk: before another file says so."""
    file.flush()
    os.fsync(file.fileno())


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save, which says why where the disk is full."""
    buffer = io.BytesIO()  # into a file numpy writes by itself, and loses the system's reason
    np.save(buffer, array)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def batches(items: Iterable, size: int) -> Iterator[list[tuple]]:
    """Group tuples, whose last value is a text, into lists of about `size` characters."""
    batch = []
    n_chars = 0
    for item in items:
        batch.append(item)
        n_chars += len(item[-1])
        if n_chars >= size:
            yield batch
            batch = []
            n_chars = 0
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------------
# One unit


def unit_sizes(work: Path, name: str) -> list[int]:
    return [os.path.getsize(work / f"{name}{ending}") for ending in UNIT_FILES]


def is_clean(work: Path, name: str) -> bool:
    """Are a unit's files there, and as large as <unit>.json says?"""
    try:
        notes = json.loads((work / f"{name}.json").read_bytes())
        return notes["sizes"] == unit_sizes(work, name)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def write_notes(work: Path, name: str, tallies: dict, skipped: list[str], n_special: int) -> None:
    """<unit>.json, once the unit's other files are on the disk."""
    notes = {"skipped": skipped, "special": n_special, "sizes": unit_sizes(work, name)}
    notes["tallies"] = {step: asdict(tally) for step, tally in tallies.items()}
    write_json(work / f"{name}.json", notes)


def read_notes(work: Path, name: str) -> dict:
    """{"skipped": files that are not UTF-8, "special": documents that hold the name of a special
    token, "tallies": {step: Tally}} of a unit."""
    notes = read_json(work / f"{name}.json")
    notes["tallies"] = {step: Tally(**counts) for step, counts in notes["tallies"].items()}
    return notes


# --------------------------------------------------------------------------------------------------
# All units


@dataclass(frozen=True)
class Job:
    """A unit among all: its number, its source, its documents from `begin` to before `end`."""

    number: int
    source: str
    begin: int
    end: int


@dataclass(frozen=True)
class Corpus:
    """The documents of all units together, whose files are in `folder` and in the one above."""

    folder: Path

    def gather(self, names: list[str]) -> None:
        """Put the rows and signatures of these units after one another."""
        for kind in ("rows", "signatures"):
            with whole_file(self.folder / kind) as file:  # other parts may have the old one open
                for name in names:
                    with open(self.folder.parent / f"{name}.{kind}", "rb") as part:
                        shutil.copyfileobj(part, file)

    def rows(self) -> np.ndarray:
        """(N,) of dtype ROW."""
        return map_rows(self.folder / "rows", ROW)

    def signatures(self) -> np.ndarray:
        """(N, N_PERMUTATIONS) uint16."""
        flat = map_rows(self.folder / "signatures", np.dtype("<u2"))
        return flat.reshape(-1, N_PERMUTATIONS)

    def cuts(self) -> np.ndarray:
        """(N,) int64: how many characters of each document are for training, the rest being for
        validation (ALL; 0: none; -1: it is left out)."""
        return np.load(self.folder / "cuts.npy", mmap_mode="r")

    def texts(self, rows: Iterable) -> Iterator[str]:
        """Yield the texts, as the local steps left them, of the documents with these rows."""
        for unit, unit_rows in groupby(rows, itemgetter("unit")):  # one file open at a time
            with open(self.folder.parent / f"{unit:016x}.txt", "rb") as file:
                for row in unit_rows:
                    file.seek(row["begin"])
                    yield file.read(row["size"]).decode()

    def split_texts(self, job: Job) -> Iterator[tuple[str, int, str]]:
        """Yield (split, hash, text) of the job's documents that stay."""
        rows = self.rows()[job.begin : job.end]
        cuts = self.cuts()[job.begin : job.end]
        numbers = np.flatnonzero(cuts >= 0)
        for i, text in zip(numbers, self.texts(rows[i] for i in numbers)):
            parts = {"train": text[: cuts[i]], "val": text[cuts[i] :]}  # one is mostly empty
            for split, part in parts.items():
                if part:
                    yield split, rows["hash"][i], part


# --------------------------------------------------------------------------------------------------
# The cleaned documents as files of their own

CLEANED = ("jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst")
CLEANED_SIZE = 64_000_000  # characters of a file of them, about


def write_cleaned(corpus: Corpus, text_field: str, ending: str, is_mix: bool, job: Job) -> int:
    """Write the documents of a unit that stay, as they are before the tokenizer: records with the
    text in text_field and in a mix their source, in files of about CLEANED_SIZE characters. Returns
    the bytes of text."""
    note = cleaned_note(corpus, job)
    note.unlink(missing_ok=True)
    for path in cleaned_paths(corpus, ending, job):  # of a run that was killed
        path.unlink()
    n_bytes = 0
    for split in SPLITS:
        # Tuples of one, as `batches` has them.
        texts = ((text,) for name, _, text in corpus.split_texts(job) if name == split)
        for number, batch in enumerate(batches(texts, CLEANED_SIZE)):
            path = corpus.folder / f"cleaned_{split}_{job.number:06d}_{number:03d}.{ending}"
            with whole_file(path) as file, compressed(file, path.name) as packing:
                for (text,) in batch:
                    record = {text_field: text}
                    if is_mix:
                        record["source"] = job.source
                    n_bytes += len(text.encode())
                    packing.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    write_json(note, {"bytes": n_bytes})
    return n_bytes


def cleaned_note(corpus: Corpus, job: Job) -> Path:
    """The file that says that all of a unit's cleaned documents are written."""
    return corpus.folder / f"{job.number}.cleaned"


def cleaned_paths(corpus: Corpus, ending: str, job: Job) -> list[Path]:
    return sorted(corpus.folder.glob(f"cleaned_*_{job.number:06d}_*.{ending}"))


@contextmanager
def compressed(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """A binary file to write into, whose bytes are compressed into `file` as the name says."""
    ending = os.path.splitext(name)[1]
    if ending == ".zst":
        pyarrow = require_zst(name)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as packing:
            yield packing
        file.write(sink.getvalue())
    elif ending == ".gz":  # without a time, so that the same text gives the same bytes
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as packing:
            yield packing
    elif ending == ".bz2":
        with bz2.open(file, "wb") as packing:
            yield packing
    elif ending == ".xz":
        with lzma.open(file, "wb") as packing:
            yield packing
    else:
        yield file
