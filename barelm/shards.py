"""Token shards: llm.c's .bin files."""

import os
from pathlib import Path

import numpy as np

from barelm.files import read_json
from barelm.run import UserError


def open_shard(path):
    """The tokens of an llm.c .bin shard, as a memory map (N,) uint16 or uint32."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=256), os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    kinds = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
    kind = kinds.get(tuple(header[:2].tolist()))
    if len(header) < 256 or kind is None:
        raise UserError(f"{path}: not a token shard (python prepare.py makes them)")
    count = int(header[2])
    if count < 0 or size != 1024 + count * kind.itemsize:
        why = f"{size:,} bytes are not the {count:,} tokens that were written"
        raise UserError(f"{path}: cut short, or damaged: {why}; prepare it again")
    if count == 0:  # which no memory map can be of
        return np.empty(0, kind)
    return np.memmap(path, dtype=kind, mode="r", offset=1024, shape=(count,))


def check_tokens(ids, n_vocab, path):
    """Refuse ids, an array of the shard at path, that are not below n_vocab."""
    if len(ids) and ids.max() >= n_vocab:
        why = f"the tokenizer has {n_vocab:,} tokens: prepare it again"
        raise UserError(f"{path}: token {ids.max()}, but {why}")


def document_layout(folder, tok):
    """(ids before a document, ids behind it) in the shards of a dataset, as its meta.json has them;
    shards of an earlier version, which say nothing, have `eot_id` before each document."""
    layout = read_json(Path(folder) / "meta.json").get("document")
    if layout is None:
        return [tok.eot_id], []
    try:
        begin, end = layout["begin"], layout["end"]
        ids = begin + end
        if ids and all(type(id) is int and 0 <= id < tok.n_vocab for id in ids):
            return begin, end
    except (KeyError, TypeError):
        pass
    why = f"document: expected lists of ids, begin and end, and not {layout}"
    raise UserError(f"{folder}/meta.json: {why}")
