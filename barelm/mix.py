"""What goes into the shards: which documents of each source, how often, and where one is cut, so
that a mix has the shares that were asked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from barelm.run import UserError
from barelm.tokenizer import Tokenizer

SPLITS = ("train", "val")
# Of an encoded document: which of SPLITS it is in, its hash, its numbers of tokens and of bytes.
TOKENS = np.dtype([("split", "u1"), ("hash", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
MISS = 0.02  # of what is wanted of a source: documents are cut where whole ones miss by more
REACH = 50_000  # tokens before and after the place where to cut that are looked through
# The end of a line or of a sentence, and of a word, in UTF-8.
SENTENCE_ENDS = re.compile("\\n+|[.!?][\"')\\]]*(?=\\s)|。|！|？".encode())
WORD_ENDS = re.compile(rb"\S(?=\s)")


class Cut(NamedTuple):
    """What is left out of a document: its tokens from `begin` to before `end`."""

    begin: int
    end: int
    n_bytes: int


@dataclass
class Part:
    """Documents of one unit that a split takes."""

    unit: int
    taken: np.ndarray  # (documents of the unit,) bool
    cuts: dict[int, Cut] = field(default_factory=dict)  # by the document's number in the unit


@dataclass
class Encoded:
    """The documents of all units as tokens: <unit>.tokens in a folder, one after another."""

    folder: Path
    tok: Tokenizer
    dtype: np.dtype
    documents: list[np.ndarray]  # of each unit, of dtype TOKENS

    def tokens(self, unit: int) -> np.ndarray:
        return map_rows(self.folder / f"{unit}.tokens", self.dtype)

    def count(self, parts: list[Part]) -> dict[str, int]:
        """How many documents, bytes and tokens these Parts hold."""
        numbers = {"documents": 0, "bytes": 0, "tokens": 0}
        for part in parts:
            rows = self.documents[part.unit][part.taken]
            numbers["documents"] += len(rows)
            numbers["bytes"] += int(rows["bytes"].sum())
            numbers["tokens"] += int(rows["tokens"].sum())
            for cut in part.cuts.values():
                numbers["bytes"] -= cut.n_bytes
                numbers["tokens"] -= cut.end - cut.begin
        return numbers


def map_rows(path: Path, dtype: Any) -> np.ndarray:
    """A file of rows of this dtype, mapped into memory."""
    if not path.stat().st_size:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")


def in_split(rows: np.ndarray, split: str) -> np.ndarray:
    """Which of the encoded documents, of dtype TOKENS, are in this split: (n,) bool."""
    return rows["split"] == SPLITS.index(split)


def plan_splits(encoded: Encoded, unit_sources: list[str], weights: dict[str, int],
                mix_tokens: int | None, is_mix: bool) -> tuple[dict, dict]:  # fmt: skip
    """What the shards hold: ({split: [Part]}, {source: {split: numbers}}).

    unit_sources: the source of each unit; weights: {source: weight}; mix_tokens: of the training
    split, None: as many as there are. A mix takes each source as often as its share wants: whole
    first, then a part of it. Its val keeps the shares, without repeats; val.<source> is all of a
    source's."""
    plans = {}
    numbers = {name: {} for name in weights}
    for split in SPLITS:
        plans[split] = []
        whole = {name: [] for name in weights}  # every document of the source in this split
        for i, name in enumerate(unit_sources):
            whole[name].append(Part(i, in_split(encoded.documents[i], split)))
        available = {}  # tokens of each source
        for name, parts in whole.items():
            available[name] = encoded.count(parts)["tokens"]
        shares = shares_of(weights, available, split)
        total = total_tokens(available, shares, mix_tokens, split)
        for name, share in shares.items():
            wanted = round(total * share)  # tokens
            repeats, rest = divmod(wanted, available[name])
            parts = whole[name] * repeats + some_of(encoded, whole[name], rest, wanted)
            plans[split] += parts
            written = encoded.count(parts)["tokens"]
            numbers[name][split] = {
                "share": 0.0,  # as soon as all are known
                "asked": share,
                "tokens": available[name],
                "written": written,
                "epochs": written / available[name],
            }
        all_written = sum(numbers[name][split]["written"] for name in shares)
        for name in shares:
            entry = numbers[name][split]
            entry["share"] = entry["written"] / max(1, all_written)
            if split == "val" and is_mix:
                plans[f"val.{name}"] = whole[name]
    return plans, numbers


def shares_of(weights: dict, available: dict[str, int], split: str) -> dict[str, float]:
    """{source: share} of those that have tokens; a UserError for one that has none to train on."""
    empty = [name for name in weights if not available[name]]
    if split == "train" and empty:
        raise UserError(f"sources: no text for training in {', '.join(empty)}")
    shares = {name: weight for name, weight in weights.items() if available[name]}
    total = sum(shares.values())
    for name in shares:
        shares[name] /= total
    return shares


def total_tokens(
    available: dict[str, int], shares: dict[str, float], mix_tokens: int | None, split: str
) -> float:
    """The tokens of a split: for val as many as keep the shares without repeating a document."""
    if split == "train":
        return mix_tokens or sum(available.values())
    most = [available[name] / share for name, share in shares.items()]  # by each source alone
    return min(most, default=0)


def some_of(encoded: Encoded, whole: list[Part], n_tokens: int, wanted: int) -> list[Part]:
    """Parts with about n_tokens of a source, of which `wanted` are wanted in all: the documents
    with the lowest hashes. Where whole ones miss, as few long ones do, the last is cut."""
    if not n_tokens:
        return []
    # Of every document of the source: its unit, its number in there, its row.
    columns = []
    for part in whole:
        rows = encoded.documents[part.unit][part.taken]
        columns.append((np.full(len(rows), part.unit), np.flatnonzero(part.taken), rows))
    units, numbers, rows = map(np.concatenate, zip(*columns))
    order = np.lexsort((numbers, units, rows["hash"]))  # by hash; of equals as they come
    sums = np.append(0, np.cumsum(rows["tokens"][order]))  # of none, one, two ... documents
    n_documents = int(np.abs(sums - n_tokens).argmin())  # so many are nearest
    last = None
    cut = None
    if abs(int(sums[n_documents]) - n_tokens) > MISS * wanted:
        n_documents = int(np.searchsorted(sums, n_tokens, "right"))  # the last goes too far
        last = order[n_documents - 1]
        unit = int(units[last])
        begin = int(encoded.documents[unit]["tokens"][: numbers[last]].sum())
        left = n_tokens - int(sums[n_documents - 1])  # tokens of the last one
        cut = cut_document(encoded, unit, begin, rows[last], left)
    parts = []
    chosen = order[:n_documents]
    for unit in np.unique(units[chosen]).tolist():
        taken = np.zeros(len(encoded.documents[unit]), bool)
        taken[numbers[chosen][units[chosen] == unit]] = True
        part = Part(unit, taken)
        if cut and units[last] == unit:
            part.cuts[int(numbers[last])] = cut
        parts.append(part)
    return parts


def cut_document(encoded: Encoded, unit: int, begin: int, row: np.void, wanted: int) -> Cut:
    """The Cut that leaves about `wanted` tokens of a document: at the nearest end of a line or a
    sentence, else of a word. It begins at token `begin` of its unit; row: of dtype TOKENS."""
    tok = encoded.tok
    ids = encoded.tokens(unit)[begin : begin + int(row["tokens"])]
    token_sizes = np.array([len(tok.token_bytes(id)) for id in range(tok.n_vocab)])  # in bytes
    sizes = token_sizes[ids]
    # What stands behind the text, as an end token does, stays.
    n_body = len(ids) - 1 if len(ids) > 1 and not sizes[-1] else len(ids)
    keep = min(max(wanted, 1), n_body)
    first = max(0, keep - REACH)
    last = min(keep + REACH, n_body)
    # As bytes: a token may end within a character.
    text = b"".join(tok.token_bytes(int(id)) for id in ids[first:last])
    token_ends = np.cumsum(sizes[first:last])
    for pattern in (WORD_ENDS, SENTENCE_ENDS):  # the second, where it finds a place, is better
        text_ends = [match.end() for match in pattern.finditer(text)]
        places = first + 1 + np.flatnonzero(np.isin(token_ends, text_ends))
        if len(places):  # else the text has no such end nearby
            keep = int(places[np.abs(places - wanted).argmin()])  # of equals the first
    share_left_out = float(sizes[keep:].sum() / max(1, sizes.sum()))
    return Cut(keep, n_body, round(int(row["bytes"]) * share_left_out))
