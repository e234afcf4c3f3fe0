"""Where documents come from: files, folders, patterns, downloads; their formats; their records.

A source is files (`files_of`); files are cut into units that one process works on alone
(`cut_into_units`); a unit gives records (`documents`, or `raw_records` for task sets).
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from glob import glob
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import requests

from barelm.dedup import hashed_name
from barelm.download import HUB, download, why_no_answer
from barelm.files import (
    DAMAGE,
    JSONL,
    encoding_of,
    file_ending,
    is_compressed,
    open_input,
    parse_json,
    read_input,
)
from barelm.number_words import PATH as NUMBER_PATH
from barelm.number_words import SOURCE as NUMBERS
from barelm.number_words import number_file
from barelm.python_chat import chat_file, chat_path, chat_size
from barelm.run import UserError
from barelm.synthetic import copy_file, copy_length, copy_path
from barelm.working import wait

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from barelm.run import Run

RAW = "https://raw.githubusercontent.com/"
DATA = HUB + "datasets/"
# A named source is one line here; where a file of it holds many texts, one in SEPARATORS.
DOWNLOADS = {
    "shakespeare": RAW + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinystories": DATA + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
    "alpaca": RAW + "tatsu-lab/stanford_alpaca/main/alpaca_data.json",
    "dolly": DATA + "databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",
    "gsm8k": RAW + "openai/grade-school-math/master/grade_school_math/data/train.jsonl",
    "hh": DATA + "Anthropic/hh-rlhf/resolve/main/harmless-base/train.jsonl.gz",
}
SEPARATORS = {"tinystories": "<|endoftext|>"}
SHA256 = {"shakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
DOWNLOAD_FOLDER = Path("data/downloads")

# What files with these endings hold; all others are text.
FORMATS = dict.fromkeys(JSONL, "jsonl")
FORMATS |= {".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
# What is HTML, by the end of a document's path or URL: a format of web pages belongs here too.
HTML_ENDINGS = (".html", ".htm", ".xhtml", ".xhtm")
# Of a Hub data set the files of one format are taken, of the first one here that it has.
HUB_FORMATS = ("jsonl", "parquet", "text", "json", "csv", "tsv")
# Of Python's library: not its test suites, nor other people's packages.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

BLOCK = 1 << 20  # bytes that are read at once
UNIT_BYTES = 2_000_000  # of a unit, at least
MAX_UNIT_BYTES = 64_000_000


@dataclass
class FilePart:
    """A range of a file's bytes. Parts of a text file that begin in it are the range's own."""

    path: str
    begin: int
    end: int | float  # math.inf: to the end, whatever its size
    separator: str | None  # what cuts a text file into documents; None: it is one
    mtime_ns: int  # so that a changed file is another


@dataclass
class Unit:
    """What one process works on alone: some small files, or a range of a large one."""

    source: str  # its name in the mix
    folder: str | None  # paths are shown as they are below it
    input_format: str | None  # None: as each file's name says
    parts: list[FilePart] = field(default_factory=list)
    name: str = ""  # a hash of all that its results depend on


# --------------------------------------------------------------------------------------------------
# Files


def files_of(spec: str, separator: str | None, max_files: int | None, run: Run) -> tuple | None:
    """(paths, folder they are in or None, separator) of one source, downloads made. Under torchrun
    every rank downloads its part, and waits for the others."""
    if spec == "python":
        return library_files(), sysconfig.get_path("stdlib"), None
    if spec == NUMBERS:
        if run.is_main:
            number_file()
        wait(run, [NUMBER_PATH])  # it is there for all
        return [number_file()], None, None
    length = copy_length(spec)
    if length:
        if run.is_main:
            copy_file(length)
        wait(run, [copy_path(length)])  # it is there for all
        return [copy_file(length)], None, "\n"
    n = chat_size(spec)
    if n:
        if run.is_main:
            chat_file(n)
        wait(run, [chat_path(n)])  # it is there for all
        return [chat_path(n)], None, None
    # A name, an address, a data set of the Hub, a file of addresses.
    if spec in DOWNLOADS or re.match(r"https?://|hf:|@", spec):
        urls = addresses(spec)[:max_files]
        paths = [download_path(url) for url in urls]
        for i in range(run.rank, len(urls), run.world):  # each rank its share
            download(urls[i], paths[i], SHA256.get(spec))
        wait(run, paths)  # the sizes of all files decide how they are cut
        return paths, None, separator or SEPARATORS.get(spec)
    if os.path.isdir(spec):
        paths, broken = walk(spec)
        if broken and run.is_main:
            print(f"{spec}: left out {len(broken)} links to nothing, such as {broken[0]}")
        return paths, spec, separator
    names = [spec]
    if not os.path.exists(spec):
        names = matching(spec)
    paths = [Path(name) for name in sorted(names) if os.path.isfile(name)]
    if not paths:
        named = ", ".join(["python", NUMBERS, "pychat", "copy:48", *DOWNLOADS, "fineweb10B"])
        raise UserError(f"--source={spec}: no such file or folder, nor one of {named}")
    paths.sort(key=is_behind_link)  # a file's own name before those of links
    return each_once(paths), None, separator


def library_files() -> list[Path]:
    """The source files of Python's standard library, without its tests."""
    paths, _ = walk(sysconfig.get_path("stdlib"), ".py", NOT_LIBRARY)
    return paths


def walk(
    folder: str, ending: str = "", avoid: set[str] | tuple = ()
) -> tuple[list[Path], list[str]]:
    """(files of this ending in and below a folder, in the order of their names; links to nothing),
    without hidden ones and those in folders to avoid. Links are followed, but each real file and
    folder counts once: under its own name where that is below the folder, too."""
    folders = [os.fspath(folder)]
    linked_folders = []
    files = []
    linked_files = []
    broken = []
    seen = set()
    while folders or linked_folders:
        # The links come last: by then it is clear which folders have names of their own.
        place = folders.pop() if folders else linked_folders.pop(0)
        identity = os.path.realpath(place)
        if identity in seen:  # by another link, or in a loop of links
            continue
        seen.add(identity)
        # By name: the order on the disk differs from machine to machine.
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            is_link = entry.is_symlink()
            if entry.name[0] == "." or entry.name in avoid:
                continue
            if is_link and not os.path.exists(entry.path):
                broken.append(entry.path)
            elif entry.is_dir():
                (linked_folders if is_link else folders).append(entry.path)
            elif entry.is_file() and entry.name.endswith(ending):
                (linked_files if is_link else files).append(Path(entry.path))
    return each_once([*files, *sorted(linked_files)]), broken


def is_behind_link(path: Path) -> bool:
    return os.path.realpath(path) != os.path.abspath(path)


def each_once(paths: list[Path]) -> list[Path]:
    """The paths, sorted, without those that lead to the same file as one before."""
    first = {}
    for path in paths:
        first.setdefault(os.path.realpath(path), path)
    return sorted(first.values())


def matching(pattern: str) -> list:
    """The paths that a pattern of the shell's kind names. `**` stands for any folders, and goes
    through links as `walk` does: in a loop of links the standard library's glob does not end."""
    parts = pattern.replace(os.sep, "/").split("/")
    if "**" not in parts:
        return glob(pattern)
    start = parts.index("**")
    base = "/".join(parts[:start])  # what stands before the **
    if base:
        folders = glob(base)
    elif start == 0:
        folders = ["."]
    else:  # a pattern that begins with a slash
        folders = ["/"]
    paths = []
    for folder in folders:
        if not os.path.isdir(folder):
            continue
        for file in walk(folder)[0]:
            if fits(file.relative_to(folder).parts, parts[start:]):
                paths.append(file)
    return paths


def fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Do the names of a path match the patterns one by one, where ** is any number of names?"""
    if not patterns:
        return not names
    if patterns[0] == "**":  # none of the names, or one, or more
        return any(fits(names[i:], patterns[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and fits(names[1:], patterns[1:])


# --------------------------------------------------------------------------------------------------
# Downloads


def addresses(spec: str) -> list[str]:
    """The URLs of a named download, of a URL, of a file of URLs (@file), or of a Hub data set's
    training files (hf:owner/name, or hf:owner/name/folder)."""
    if spec.startswith("@"):
        if not os.path.isfile(spec[1:]):
            raise UserError(f"--source={spec}: no such file (it has a URL a line)")
        urls = read_input(spec[1:]).decode(errors="replace").split()
    elif spec.startswith("hf:"):
        urls = hub_addresses(spec)
    else:
        urls = [DOWNLOADS.get(spec, spec)]
    if not urls:
        raise UserError(f"--source={spec}: no JSONL, parquet or text file in it")
    return list(dict.fromkeys(urls))  # each once, in order


def hub_addresses(spec: str) -> list[str]:
    """The URLs of a Hub data set's training files, those of one format."""
    dataset, below = re.fullmatch(r"hf:([^/]*/?[^/]*)/?(.*)", spec, re.S).groups()
    names = []
    for name in hub_files(dataset, spec):
        is_below = not below or name == below or name.startswith(below.rstrip("/") + "/")
        if is_below and file_ending(name) in (*FORMATS, ".txt"):
            names.append(name)
    # Many data sets call a split by its name; one that does not has nothing to leave out.
    training = [name for name in names if "train" in name.lower()]
    by_format = defaultdict(list)
    for name in training or names:
        by_format[format_of(name)].append(name)
    for kind in HUB_FORMATS:
        if by_format[kind]:
            return [f"{DATA}{dataset}/resolve/main/{quote(name)}" for name in by_format[kind]]
    return []


def hub_files(dataset: str, spec: str) -> list[str]:
    """The names of all files of a data set on the Hub, sorted."""
    try:
        answer = requests.get(f"{HUB}api/datasets/{dataset}", timeout=30)  # seconds
        answer.raise_for_status()
        return sorted(str(file["rfilename"]) for file in answer.json()["siblings"])
    except requests.RequestException as error:
        why = why_no_answer(error, HUB)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = repr(error)
    raise UserError(f"--source={spec}: the Hub does not list it: {why}")


def download_path(url: str) -> Path:
    """Where a download is stored: the end of its name says what it is, whatever query follows it,
    and a hash tells it from another of that name."""
    without_query = url.partition("?")[0]
    readable = url
    if Path(without_query).suffix:
        readable = without_query
    name = re.sub(r"[^\w.-]+", "_", readable)
    return DOWNLOAD_FOLDER / f"{hashed_name(url)}_{name[-100:]}"  # a name may have 255 bytes


# --------------------------------------------------------------------------------------------------
# Units


def cut_into_units(source: str, paths: list[Path], folder: str | None, separator: str | None,
                   input_format: str | None, undivided: bool) -> list[Unit]:  # fmt: skip
    """The Units of a source, in order, without names. Undivided: one process reads them all."""
    stats = [path.stat() for path in paths]
    total = sum(stat.st_size for stat in stats)
    # Of one size whatever the number of processes, which so changes nothing in the result.
    share = min(MAX_UNIT_BYTES, max(UNIT_BYTES, total // 64))
    if undivided:
        share = sys.maxsize
    units = []
    filled = share  # bytes in the last unit: none is there, so begin one
    for path, stat in zip(paths, stats):
        kind = input_format or format_of(path)
        size = max(1, stat.st_size)  # an empty file is one part, too
        mark = "\n"
        if kind == "text":
            mark = mark_in(path, separator)
        step = size
        # Only where lines or marks can be found without what stands before them.
        if size > share and kind in ("text", "jsonl") and can_be_cut_at(mark) and is_plain(path):
            step = share
        for begin in range(0, size, step):
            if filled >= share or step < size:
                units.append(Unit(source, folder, input_format))  # a range is a unit alone
                filled = 0
            end = min(begin + step, stat.st_size)
            part = FilePart(str(path), begin, end, mark, stat.st_mtime_ns)
            units[-1].parts.append(part)
            filled += size
    return units


def can_be_cut_at(mark: str) -> bool:
    """Can a range of a file be cut at this mark? One that can overlap itself, as "---" in "----",
    is found from the start of the file alone."""
    if not mark:
        return False
    return not any(mark.endswith(mark[:i]) for i in range(1, len(mark)))


def format_of(path: Path | str) -> str:
    """text, jsonl, json, csv, tsv or parquet, as the end of the name says."""
    return FORMATS.get(file_ending(path), "text")


def is_plain(path: Path | str) -> bool:
    """Can a range of the file's bytes be read alone? Not of a compressed one, nor of UTF-16."""
    if is_compressed(path):
        return False
    with open(path, "rb") as file:
        return encoding_of(file.read(4)) in (None, "utf-8")


def mark_in(path: Path, separator: str | None) -> str:
    """What cuts this text file into documents: the line ends of `separator` as the file has
    them."""
    if not separator or "\n" not in separator or "\r" in separator:
        return separator
    try:
        with open_input(path) as file:
            head = file.read(1 << 16)  # as a rule a file has one kind of line ends
    except (*DAMAGE, OSError, UnicodeDecodeError):
        return separator  # who reads the documents says what is wrong
    is_of_windows = b"\r\n" in head and head.count(b"\n") == head.count(b"\r\n")
    if is_of_windows:
        return separator.replace("\n", "\r\n")
    return separator


# --------------------------------------------------------------------------------------------------
# Records


def documents(unit: Unit, text_field: str, skipped: list) -> Iterator[dict[str, str]]:
    """Yield the documents of a unit as dicts with their text in text_field, their `path` and, of
    records, their `url`. A text file of a folder that is no UTF-8 goes to the list `skipped`; a
    line that is no record with such a text ends all with a UserError."""
    for part in unit.parts:
        shown = shown_path(part.path, unit.folder)
        kind = unit.input_format or format_of(part.path)
        if kind == "text":
            yield from text_documents(unit, part, shown, text_field, skipped)
            continue
        columns = {text_field, "url"}  # of parquet: others may be large
        for number, value in read_records(part, kind, columns):
            try:
                record = as_record(value)
                url = record.get("url")
                if not isinstance(url, str):
                    url = ""
                url = mended(url)
                text = mended(record[text_field])
            except RecursionError:
                place = f"{part.path}:{number + lines_before(part.path, part.begin)}"
                raise UserError(
                    f"{place}: JSON nested too deeply to read: {beginning(value)!r}"
                ) from None
            except (ValueError, TypeError, KeyError, AttributeError):
                place = f"{part.path}:{number + lines_before(part.path, part.begin)}"
                expected = f'expected {{"{text_field}": "..."}}, found {beginning(value)!r}'
                raise UserError(f"{place}: {expected}") from None
            yield {"url": url, text_field: text, "path": shown}


def raw_records(unit: Unit, text_field: str, bad: list) -> Iterator[dict[str, str]]:
    """Yield the records of a unit as they are, with their file's `path`. A line that is none goes
    to the list `bad`, as "path:line: its beginning". The text of a text file is in text_field."""
    for part in unit.parts:
        shown = shown_path(part.path, unit.folder)
        kind = unit.input_format or format_of(part.path)
        if kind == "text":
            yield from text_documents(unit, part, shown, text_field, [])
            continue
        for number, value in read_records(part, kind, columns=None):
            try:
                record = as_record(value) | {"path": shown}
            except (ValueError, TypeError, RecursionError):
                line = number + lines_before(part.path, part.begin)
                bad.append(f"{shown}:{line}: {beginning(value)}")
                continue
            yield record


def text_documents(
    unit: Unit, part: FilePart, shown: str, text_field: str, skipped: list
) -> Iterator[dict[str, str]]:
    """The documents of a range of a text file, as `documents` yields them."""
    if part.begin == 0 and not unit.input_format:
        refuse_hidden_records(part.path)
    try:
        for data in read_parts(part.path, part.separator, part.begin, part.end):
            text = data.decode()
            if part.separator:  # which mostly stands on a line of its own
                text = text.strip("\r\n")
            yield {text_field: text, "path": shown}
    except UnicodeDecodeError as error:
        if not unit.folder:
            why = f"not UTF-8 text ({error.reason}): convert it"
            raise UserError(f"{part.path}: {why}") from None
        skipped.append(shown)  # folders hold images and the like, too


def shown_path(path: str, folder: str | None) -> str:
    """The path, below the folder if there is one, as text that can be encoded."""
    if folder:
        path = os.path.relpath(path, folder).replace(os.sep, "/")  # the same on every system
    return os.fsencode(path).decode(errors="replace")  # names of files need not be UTF-8


def as_record(value: bytes) -> dict[str, str]:
    """A dict as it is, or the JSON object of a line; else one of json's errors or a TypeError."""
    if isinstance(value, dict):
        return value
    record = json.loads(value)
    if not isinstance(record, dict):
        raise TypeError("no JSON object")
    return record


def beginning(value: bytes) -> str:
    """The beginning of a line, or of a value as JSON, to show."""
    data = value
    if not isinstance(value, bytes):
        data = json.dumps(value, default=str).encode()
    return data[:60].decode(errors="replace")


def mended(text: str) -> str:
    """The text with U+FFFD for half a surrogate pair, which UTF-8 lacks."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache(1)  # a range has many bad lines, or none
def lines_before(path: str, begin: int) -> int:
    """How many lines of a file begin before those of its range from `begin`."""
    if begin == 0:
        return 0
    count = 1  # the first line; each line end begins another
    with open(path, "rb") as file:
        for position in range(0, begin - 1, BLOCK):
            count += file.read(min(BLOCK, begin - 1 - position)).count(b"\n")
    return count


def refuse_hidden_records(path: str) -> None:
    """A file of records whose name says text would be read as one text of braces and quotes."""
    try:
        with open_input(path) as file:
            line = file.read(BLOCK).lstrip().partition(b"\n")[0]
        if line[:1] not in (b"{", b"["):
            return
        value = json.loads(line)
    except (*DAMAGE, OSError, ValueError, RecursionError):
        return  # no JSON; if it cannot be read, reading it says so
    kind = "jsonl"
    first = value
    if isinstance(value, list) and value:
        kind = "json"
        first = value[0]
    if isinstance(first, dict) and first:
        why = "its first line is JSON, but its name says text"
        ways = f"--input_format={kind} reads its records, --input_format=text takes it as it is"
        raise UserError(f"{path}: {why}: {ways}")


# --------------------------------------------------------------------------------------------------
# Formats


def read_records(
    part: FilePart, kind: str, columns: set[str] | None
) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line as bytes, or value) of each record of a range of a file. columns: of
    parquet, which to read; None: all."""
    path = part.path
    try:
        if kind == "parquet":
            yield from read_parquet(path, columns)
        elif kind in ("csv", "tsv"):
            delimiter = "," if kind == "csv" else "\t"
            yield from read_table(path, delimiter)
        elif kind == "json":
            yield from read_json_file(part)
        else:
            yield from read_lines(part)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding} text ({error.reason}): convert it") from None


def read_parts(
    path: str, separator: str | None, begin: int = 0, end: float = math.inf
) -> Iterator[bytes]:
    """Yield the parts, bytes, of a file (decompressed by its name) that `separator` cuts: those
    that begin from `begin` to before `end`. None: all of it as one."""
    n_parts = 0
    try:
        with open_input(path) as file:
            if not separator:
                yield file.read()
                return
            # What is compressed or UTF-16 is one range.
            if not is_plain(path):  # begin and end are places in the file as it is
                end = math.inf
            for part in parts_of(file, separator.encode(), begin, end):
                n_parts += 1
                if part is not None:
                    yield part
    except (*DAMAGE, OSError) as error:
        raise damaged(path, n_parts, error) from None


def parts_of(file: BinaryIO, mark: bytes, begin: int, end: float) -> Iterator[bytes]:
    """Yield the parts of an open file that begin from `begin` to before `end`, and None for the
    one that ends in the range but began before it."""
    is_own = begin == 0  # does the part at hand begin in the range?
    position = 0  # where `rest` begins
    rest = b""  # of the last block: a part that has not ended yet
    if end < math.inf:
        # A mark may end where the range begins: look from so much before it.
        position = file.seek(max(0, begin - len(mark))) if begin else file.tell()
    while block := file.read(max(BLOCK, len(rest))):  # twice as much where no mark was
        *whole, rest = (rest + block).split(mark)  # the last part may go on in the next block
        for part in whole:
            if position >= end:
                return
            position += len(part) + len(mark)
            yield part if is_own else None
            is_own = True
        if not is_own and position + len(rest) >= end:
            return  # a range within one part of another range
    if is_own and position < end:
        yield rest


def damaged(path: str, number: int, error: BaseException) -> BaseException:
    """What to raise where a compressed file cannot be read beyond this line."""
    if isinstance(error, OSError) and error.errno is not None:  # the disk's, no decompressor's
        return error
    return UserError(f"{path}: damaged after line {number}: {error}")


def read_lines(part: FilePart) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of a range of a JSONL file, without blank lines."""
    for number, line in enumerate(read_parts(part.path, "\n", part.begin, part.end), 1):
        if line.strip():
            yield number, line


def read_json_file(part: FilePart) -> Iterator[tuple]:
    """Yield (number, value) of a JSON file that is a list, or one value; or the lines of one that
    is JSONL by another name."""
    [data] = read_parts(part.path, None)
    first_line, _, rest = data.strip().partition(b"\n")
    if rest and is_json(first_line) and not is_json(data):
        yield from read_lines(part)
    elif data.strip():
        value = parse_json(data, part.path)
        values = value if isinstance(value, list) else [value]
        yield from enumerate(values, 1)


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def read_table(path: str, delimiter: str) -> Iterator[tuple]:
    """Yield (line, record) of a CSV or TSV file (RFC 4180), whose first row names the fields. A row
    of more or fewer cells is no record but the list of its cells."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 131,072 characters
    number = 0
    names = None
    try:
        # newline="": line ends within quotes stay as they are.
        with io.TextIOWrapper(open_input(path), encoding="utf-8", newline="") as file:
            for cells in csv.reader(file, delimiter=delimiter, strict=True):
                number += 1
                if names is None:
                    names = cells
                elif cells and len(cells) == len(names):
                    yield number, dict(zip(names, cells))
                elif cells:  # refused as no record, with its line
                    yield number, cells
    except (*DAMAGE, OSError) as error:
        raise damaged(path, number, error) from None
    except csv.Error as error:
        raise UserError(f"{path}: damaged after record {number}: {error}") from None


def read_parquet(path: str, columns: set[str]) -> Iterator[tuple]:
    """Yield (number, record) of a parquet file: these of its columns, if it has one of them."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = (columns or set()).intersection(file.schema_arrow.names)
            batches = file.iter_batches(1000, columns=wanted or None)  # rows at once
            rows = (batch.to_pylist() for batch in batches)
            yield from enumerate(chain.from_iterable(rows), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no parquet: {str(error).partition(chr(10))[0]}") from None
