"""Files read and written: compressed text, JSON, and files that appear only when they are whole."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from barelm import host
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType
    from typing import BinaryIO

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSONL = (".jsonl", ".ndjson", ".jsonlines")
# Each mark and its encoding; UTF-32's stands first, since it begins as UTF-16's does.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8",
}
# What decompressors raise; their OSErrors have no number, unlike those of a disk.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError)


# --------------------------------------------------------------------------------------------------
# Text, compressed or not


def file_ending(path: Path | str) -> str:
    """The ending that says what a file holds, in lower case and without that of its compression:
    .jsonl of Rows.JSONL.gz."""
    stem, ending = os.path.splitext(str(path).lower())
    if ending in COMPRESSED:
        return os.path.splitext(stem)[1]
    return ending


def is_compressed(path: str | Path) -> bool:
    return str(path).lower().endswith(COMPRESSED)


def encoding_of(head: bytes) -> str | None:
    """The encoding that the first bytes of a file name by a byte order mark, or None."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    return None


def require_zst(where: Path | str) -> ModuleType:
    """pyarrow, which reads and writes .zst."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{where}: .zst needs pyarrow: pip install pyarrow") from None
    return pyarrow


def open_compressed(path: Path | str) -> Any:
    """A binary file to read, decompressed as the end of its name says."""
    ending = os.path.splitext(str(path))[1].lower()
    if ending == ".gz":
        return gzip.open(path)
    if ending == ".bz2":
        return bz2.open(path)
    if ending == ".xz":
        return lzma.open(path)
    if ending == ".zst":
        pyarrow = require_zst(path)
        packed = pyarrow.OSFile(os.fspath(path))
        unpacked = pyarrow.CompressedInputStream(packed, "zstd")
        return io.BufferedReader(unpacked)  # which can peek, as the others can
    return open(path, "rb")


def open_input(path: Path | str) -> Any:
    """A text file's bytes to read, as UTF-8 without a byte order mark, decompressed by its name.
    What such a mark says is UTF-16 or UTF-32 is read whole; a UnicodeDecodeError if it is not."""
    file = open_compressed(path)
    try:
        encoding = encoding_of(file.peek(4)[:4])  # looks ahead: the place stays the beginning
        if encoding == "utf-8":
            file.read(len(codecs.BOM_UTF8))  # past the mark
        if encoding in ("utf-16", "utf-32"):
            with file:
                return io.BytesIO(file.read().decode(encoding).encode())
    except BaseException:  # a damaged file, or Ctrl-C: nobody else can close it
        file.close()
        raise
    return file


def read_input(path: Path | str) -> bytes:
    """All bytes of a text file, as `open_input` has them. A UserError where they cannot be had."""
    try:
        with open_input(path) as file:
            return file.read()
    except (*DAMAGE, OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {why}") from None


# --------------------------------------------------------------------------------------------------
# JSON


def parse_json(text: str | bytes, where: Path | str) -> Any:
    """The value of a JSON text (str or bytes). What is no JSON, or nests beyond what Python reads,
    is a UserError that begins with `where`, such as "rows.jsonl:7"."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply to read") from None
    except ValueError as error:
        begin = text[:60].decode(errors="replace") if isinstance(text, bytes) else text[:60]
        raise UserError(f"{where}: no JSON: {begin!r} ({error})") from None


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON object in the file, or the list where `default` is one; `default`, if given, where
    there is no file."""
    if default is not None and not Path(path).exists():
        return default
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: is {Path(path).parent} what was meant?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    value = parse_json(text, path)
    if isinstance(default, list) and not isinstance(value, list):
        raise UserError(f"{path}: expected a JSON list")
    if not isinstance(default, list) and not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON; a file that says it already, byte for byte, is left alone."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    data = text.encode(errors="backslashreplace")  # JSON's way to write half a surrogate
    with contextlib.suppress(OSError):  # no such file yet
        if Path(path).read_bytes() == data:
            return
    with whole_file(path) as file:
        file.write(data)


# --------------------------------------------------------------------------------------------------
# Files that are whole, or not there


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that appears under `path` when all of it is on the disk, or never. Its
    name is on the disk, too, before anything that comes after it."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes first: a name without them would be half a file
        host.replace(temporary, path)
        sync_folder(Path(path).parent)
    except BaseException as error:  # of whoever writes, too: Ctrl-C leaves no temporary
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):  # a full disk, no such folder, no right to write
            raise unwritable(path, error) from None
        raise


def unwritable(path: str | Path, error: BaseException) -> UserError:
    """A UserError for the file that an OSError names, or else path."""
    name = str(error.filename)
    name = name.removesuffix(".tmp") if name.endswith(".tmp") else path
    why = error.strerror or str(error)
    return UserError(f"{name}: cannot be written: {why}; nothing was changed")


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: what is renamed or removed before this call
    is so after a power failure too, whatever is done behind it."""
    with contextlib.suppress(OSError):  # a system whose folders cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
