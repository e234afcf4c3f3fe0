"""The safetensors format, read and written."""

import json
import math
import os

import torch

from barelm.run import UserError

SAFE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
SAFE_DTYPES |= {"BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
SAFE_DTYPES |= {"I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
INDEX = "model.safetensors.index.json"  # of weights in several files


def write_safetensors(file, tensors, metadata):
    """Write {name: tensor} and {str: str} to a binary file in the safetensors format."""
    codes = {dtype: code for code, dtype in SAFE_DTYPES.items()}
    header, at = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        end = at + t.numel() * t.element_size()
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for t in tensors.values():
        file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_header(path, file):
    """Check an open safetensors file and go to its data: ({name: (dtype, shape)} in their order,
    metadata). Anything that the format forbids is a UserError."""
    size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
        raise UserError(f"{path}: not a whole safetensors file (cut short, or another format)")
    try:
        header = json.loads(file.read(length).decode())
        metadata = dict(header.pop("__metadata__", None) or {})
        entries, at = {}, 0
        for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, place = SAFE_DTYPES[e["dtype"]], e["shape"], e["data_offsets"]
            natural = all(type(n) is int and n >= 0 for n in [*shape, *place])
            if not natural or math.prod(n or 1 for n in shape) >= 1 << 60:  # as of 0 x 2^99
                raise ValueError(f"{name} has no shape or place")
            entries[name], begin = (dtype, shape), at
            at += math.prod(shape) * dtype.itemsize
            if place != [begin, at]:
                raise ValueError(f"{name} does not fill its place")
        if 8 + length + at != size:
            raise ValueError(f"{size} bytes, but the header describes {8 + length + at}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: malformed safetensors file: {error!r:.200}") from None
    return entries, metadata


def entries_of(path):
    """{name: (dtype, shape)} of a safetensors file."""
    try:
        with open(path, "rb") as file:
            return read_header(path, file)[0]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_safetensors(path):
    """({name: tensor}, metadata) of a file; the tensors own their memory."""
    tensors = {}
    try:
        with open(path, "rb") as file:
            entries, metadata = read_header(path, file)
            for name, (dtype, shape) in entries.items():
                tensors[name] = torch.empty(shape, dtype=dtype)
                file.readinto(tensors[name].view(-1).view(torch.uint8).numpy())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return tensors, metadata
