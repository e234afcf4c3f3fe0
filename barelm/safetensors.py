"""The safetensors format, read and written. A file is, in this order:

    8 bytes: the length of the header, little-endian
    the header, JSON: {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …,
                       "__metadata__": {"KEY": "TEXT"}}
    the tensors' bytes, one behind the other without a gap; offsets count from their beginning

It holds no program, unlike a pickle, and all of a header is checked before anything is made of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import TYPE_CHECKING

import torch

from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np
    from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = "model.safetensors.index.json"  # of weights in several files
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


def write_safetensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write {name: tensor} and {str: str} to a binary file in the safetensors format."""
    write_header(file, tensors, metadata)
    for t in tensors.values():
        write_tensor(file, t)


def write_header(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write what stands before the data of {name: tensor}, which may be on the meta device."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header = {"__metadata__": metadata}  # transformers wants {"format": "pt"} in it
    begin = 0
    for name, t in tensors.items():
        end = begin + t.numel() * t.element_size()
        place = [begin, end]
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": place}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)


def write_tensor(file: BinaryIO, t: Tensor) -> None:
    file.write(as_bytes(t.detach().cpu().contiguous()))


def as_bytes(t: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, as an array of bytes."""
    return t.view(-1).view(torch.uint8).numpy()  # flat first: a single number has no bytes to view


def read_header(path: Path, file: BinaryIO) -> tuple[dict, dict]:
    """Check an open safetensors file and go to its data: ({name: (dtype, shape)} in their order,
    metadata). Anything that the format forbids is a UserError."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
        # Nothing is allocated yet: the length is a stranger's word.
        raise UserError(f"{path}: not a whole safetensors file (cut short, or another format)")
    try:
        header = json.loads(file.read(length).decode())
        metadata = dict(header.pop("__metadata__", None) or {})
        entries, n_bytes = read_places(header)
        if 8 + length + n_bytes != size:
            raise ValueError(f"{size} bytes, but the header describes {8 + length + n_bytes}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: malformed safetensors file: {error!r:.200}") from None
    return entries, metadata


def read_places(header: dict) -> tuple[dict[str, tuple[torch.dtype, list]], int]:
    """({name: (dtype, shape)} in the order of their data, the sum of their bytes). An entry without
    a sound shape, or with a gap or an overlap before it, is a ValueError."""

    def place_of(name):
        return header[name]["data_offsets"]

    entries = {}
    end = 0
    for name in sorted(header, key=place_of):  # JSON's order need not be that of the data
        entry = header[name]
        dtype = DTYPES[entry["dtype"]]  # a KeyError for a type that torch has not
        shape = entry["shape"]
        place = entry["data_offsets"]
        # A bool is an int to Python, but not to the format.
        natural = all(type(n) is int and n >= 0 for n in [*shape, *place])
        # Beyond 2^60 torch cannot count, not even 0 x 2^99, which is no byte.
        if not natural or math.prod(n or 1 for n in shape) >= 1 << 60:
            raise ValueError(f"{name} has no shape or place")
        entries[name] = (dtype, shape)
        begin = end
        end += math.prod(shape) * dtype.itemsize
        if place != [begin, end]:
            raise ValueError(f"{name} does not fill its place")
    return entries, end


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[tuple[BinaryIO, dict, dict]]:
    """(The file, at its data, {name: (dtype, shape)}, metadata). What the system refuses is a
    UserError."""
    try:
        with open(path, "rb") as file:
            entries, metadata = read_header(path, file)
            yield file, entries, metadata
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def entries_of(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """{name: (dtype, shape)} of a safetensors file."""
    with open_tensors(path) as (_, entries, _):
        return entries


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({name: tensor}, metadata) of a file; the tensors own their memory."""
    tensors = {}
    with open_tensors(path) as (file, entries, metadata):
        for name, (dtype, shape) in entries.items():  # in the order of the file's bytes
            # Read into memory of its own, not mapped: the file may be replaced by the next save.
            tensors[name] = torch.empty(shape, dtype=dtype)
            file.readinto(as_bytes(tensors[name]))
    return tensors, metadata


def check_finite(
    path: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Refuse {name: tensor} with a NaN or an infinity, or with a number that dtype has none for."""
    largest = torch.finfo(dtype).max
    for name, t in tensors.items():
        if not t.is_floating_point() or t.numel() == 0:
            continue
        low, high = t.detach().aminmax()  # a NaN anywhere is both
        if not (low.item() >= -largest and high.item() <= largest):
            raise UserError(f"{path}: {name} has numbers that are not finite in {dtype}")
