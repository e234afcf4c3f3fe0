"""Raw text in; clean, distinct, mixed documents, a trained tokenizer and token shards out.

    python prepare.py                                   # the default: Python's own standard library
    python prepare.py --source=notes.txt --dataset=notes
    python prepare.py config/web.py --source='crawl/**/*.html' --dataset=web --report
    python prepare.py --source=hf:roneneldan/TinyStories --dataset=stories
    python prepare.py --task=sft --source=alpaca --dataset=alpaca
    torchrun --nproc_per_node=8 prepare.py config/fineweb_edu.py

Writes data/<dataset>/: tokenizer.json, tokenizer_config.json, train_*.bin and val_*.bin (llm.c's
format), meta.json; for tasks {sft,preference,classify,seq2seq}_{train,val}.jsonl. The same input
gives the same bytes on any number of processes. A run that was killed goes on where it was.
"""

from config import configure, same_recipes, settings

source = "python"  # python, a named download, file, folder, glob, URL, @list of URLs, hf:owner/name
sources: dict | None = None  # a mix instead: {"name": weight} or {"name": (weight, source)}
dataset = "python"  # the result is data/<dataset>
task: str | None = None  # make a task set instead: sft, preference, classify, seq2seq
field = "text"  # the field of a JSONL, CSV or parquet record that is its text
input_format: str | None = None  # text, jsonl, json, csv, tsv or parquet; none: by the file's name
separator: str | None = None  # a text file is cut into documents here; "\n\n": at blank lines
max_documents: int | None = None  # read so many of each source, in one process
shards: int | None = None  # of a download in many files: take so many

# Cleaning. One by one: html, unicode, symbols, whitespace, length, language, blocklist,
# gopher_repetition, gopher_quality, c4, fineweb, perplexity, pii; then among all: url, exact, near.
steps = "html,exact,near"  # what is done to the documents, in this order (the README says what)
clean_symbols: bool | str = False  # drop special characters: all of SYMBOLS, or those named (a,b)
near_threshold = 0.8  # Jaccard similarity of 5-word shingles from which documents are the same
html_documents: bool | None = None  # are they HTML; none: those named .html, .htm, .xhtml
min_chars = 199  # 50 words of 3 letters and the blanks between them: Gopher's least, as characters
max_chars = 1_099_999  # 100,000 words of 10 letters: its most
language = "en"  # the ISO 639-1 code of the language that the step of this name keeps
language_score = 0.65  # at least this share of the evidence: FineWeb's (Penedo et al. 2024)
perplexity_model: str | None = None  # a checkpoint folder, for the step `perplexity`
perplexity_band: list = [0.0, 1000.0]  # the perplexities that it keeps
blocklist: str | None = None  # a file of hosts, URL prefixes, words and phrases, one on a line
decontaminate: str | None = None  # drop what shares 13 words in a row with these files (a,b)
report = False  # write report.md: what every step took away, with examples
save_cleaned = ""  # as jsonl, jsonl.gz, jsonl.bz2, jsonl.xz or jsonl.zst: the cleaned documents

# the mix and the split
val_fraction = 0.1  # of the documents, by their hash; of the characters under 20 documents
mix_tokens: int | None = None  # training tokens of the mix; none: as many as the sources hold

# the tokenizer
tokenizer = "bpe"  # bpe, unigram, wordpiece, word, char, byte, a tiktoken name, a folder with one
vocab_size = 4096  # tokens of a tokenizer trained here, special ones included
normalize = ""  # of the text before it is tokenized: nfc or nfkc, lower, or both with a comma
special_tokens = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]  # start, pad, chat's
roles: dict | None = None  # tokens for bos, eos, pad, unk, cls, sep, mask: {"mask": "[MASK]"}
inspect: str | None = None  # print this text's tokens and the vocabulary's statistics, no more
tokenizer_bytes = 1_000_000_000  # it is trained on so much of the text, a sample by hash

shard_tokens = 100_000_000  # tokens of a shard written here
threads = 0  # processes at work under each rank; 0: all cores
seed = 0  # of the examples drawn for the default task sets
device = "cpu"  # of the perplexity model

if __name__ == "__main__":
    configure(globals())

import ast
import bz2
import csv
import ctypes
import errno
import gzip
import hashlib
import io
import ipaddress
import json
import lzma
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import textwrap
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from glob import glob
from html import unescape
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from urllib.parse import quote

import numpy as np
import regex
import requests
import torch
import torch.distributed as dist

from barelm import files as files_module
from barelm.bpe import (
    PATTERNS,
    TokenizerSettings,
    check_role_names,
    count_pieces,
    finished_tokenizer,
    normal_text,
    normalizer_names,
    show_tokens,
    special_names,
    train_tokenizer,
)
from barelm.checkpoint import load
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
    require_zst,
    whole_file,
    write_json,
)
from barelm.run import Progress, UserError, duration, setup
from barelm.shards import open_shard
from barelm.tokenizer import Tokenizer

UNIT = 2_000_000  # bytes of a part of the input that one process works on alone, at least
BATCH = 1_000_000  # characters that are in hand at once in each process

# --------------------------------------------------------------------------------------------------
# Downloads

RAW = "https://raw.githubusercontent.com/"
DATA = HUB + "datasets/"
FINEWEB, FINEWEB_SHARDS = DATA + "kjj0/fineweb10B-gpt2/resolve/main/", 103
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


# --------------------------------------------------------------------------------------------------
# Collecting: a source is files, files are cut into units, a unit gives records

SUITES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# What files with these endings hold; all others are text.
FORMATS = dict.fromkeys(JSONL, "jsonl")
FORMATS |= {".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
KEPT = Path("data/downloads")


def files_of(spec, run):
    """([paths], folder they are in or None, separator) of one source, downloads made. Under
    torchrun every rank downloads its part, and waits for the others."""
    if spec == "python":
        folder = sysconfig.get_path("stdlib")
        return walk(folder, ".py", SUITES)[0], folder, None
    if spec in DOWNLOADS or re.match(r"https?://|hf:|@", spec):
        urls = addresses(spec)
        paths = [kept_at(url) for url in urls]
        for i in range(run.rank, len(urls), run.world):
            download(urls[i], paths[i], SHA256.get(spec))
        wait(run)
        return paths, None, separator or SEPARATORS.get(spec)
    if os.path.isdir(spec):
        found, broken = walk(spec)
        if broken and run.main:
            print(f"{spec}: left out {len(broken)} links to nothing, such as {broken[0]}")
        return found, spec, separator
    found = [spec] if os.path.exists(spec) else matching(spec)
    found = [Path(name) for name in sorted(found) if os.path.isfile(name)]
    has_link = lambda path: os.path.realpath(path) != os.path.abspath(path)
    found = each_once(sorted(found, key=has_link))  # a file's own name before those of links
    if not found:
        names = ", ".join(["python", *DOWNLOADS, "fineweb10B"])
        raise UserError(f"--source={spec}: no such file or folder, nor one of {names}")
    return found, None, separator


def walk(folder, ending="", avoid=()):
    """(files of this ending in and below a folder, in the order of their names; links to nothing),
    without hidden ones and those in folders to avoid. Links are followed, but each real file and
    folder counts once: under its own name where that is below the folder, too."""
    folders, links, seen = [os.fspath(folder)], [], set()
    found, linked, broken = [], [], []
    while folders or links:
        # The links come last: by then it is clear which folders have names of their own.
        place = folders.pop() if folders else links.pop(0)
        identity = os.path.realpath(place)
        if identity in seen:
            continue
        seen.add(identity)
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if entry.name[0] == "." or entry.name in avoid:
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                broken.append(entry.path)
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.is_file() and entry.name.endswith(ending):
                (linked if entry.is_symlink() else found).append(Path(entry.path))
    return each_once([*found, *sorted(linked)]), broken


def matching(pattern):
    """The paths that a pattern of the shell's kind names. `**` stands for any folders, and goes
    through links as `walk` does: in a loop of links the standard library's glob does not end."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob(pattern)
    start = parts.index("**")
    base, found = "/".join(parts[:start]), []
    for folder in glob(base or ".") if base or start == 0 else ["/"]:
        files = walk(folder)[0] if os.path.isdir(folder) else []
        found += [file for file in files if fits(file.relative_to(folder).parts, parts[start:])]
    return found


def fits(names, patterns):
    """Do the names of a path match the patterns one by one, where ** is any number of names?"""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(fits(names[i:], patterns[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and fits(names[1:], patterns[1:])


def each_once(paths):
    """The paths, sorted, without those that lead to the same file as one before."""
    first = {}
    for path in paths:
        first.setdefault(os.path.realpath(path), path)
    return sorted(first.values())


def addresses(spec):
    """The URLs of a named download, of a URL, of a file of URLs (@file), or of a Hub data set's
    training files (hf:owner/name, or hf:owner/name/folder)."""
    if spec[0] == "@":
        if not os.path.isfile(spec[1:]):
            raise UserError(f"--source={spec}: no such file (it has a URL a line)")
        urls = read_input(spec[1:]).decode(errors="replace").split()
    elif spec.startswith("hf:"):
        name, below = re.fullmatch(r"hf:([^/]*/?[^/]*)/?(.*)", spec, re.S).groups()
        try:
            answer = requests.get(f"{HUB}api/datasets/{name}", timeout=30)
            answer.raise_for_status()
            names = sorted(str(f["rfilename"]) for f in answer.json()["siblings"])
        except requests.RequestException as error:
            why = why_no_answer(error, HUB)
            raise UserError(f"--source={spec}: the Hub does not list it: {why}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"--source={spec}: the Hub does not list it: {error!r}") from None
        folder = below.rstrip("/") + "/" if below else ""
        names = [n for n in names if n == below or n.startswith(folder)]
        names = [n for n in names if file_ending(n) in (*FORMATS, ".txt")]
        names = [n for n in names if "train" in n.lower()] or names
        by_format = defaultdict(list)
        for n in names:
            by_format[format_of(n)].append(n)
        order = ("jsonl", "parquet", "text", "json", "csv", "tsv")
        chosen = next((by_format[kind] for kind in order if by_format[kind]), [])
        urls = [f"{DATA}{name}/resolve/main/{quote(n)}" for n in chosen]
    else:
        urls = [DOWNLOADS.get(spec, spec)]
    if not urls:
        raise UserError(f"--source={spec}: no JSONL, parquet or text file in it")
    return list(dict.fromkeys(urls))[:shards]


def kept_at(url):
    """Where a download is kept: the end of its name says what it is, whatever query follows it, and
    a hash tells it from another of that name."""
    plain = url.partition("?")[0]
    name = re.sub(r"[^\w.-]+", "_", plain if Path(plain).suffix else url)
    return KEPT / f"{hashed_name(url)}_{name[-100:]}"


def plan(run):
    """The units of all sources, in order: what one process works on alone, and what a run that was
    killed need not do again. A unit is some small files, or a range of bytes of a large one."""
    units = []
    for name, (_, spec) in mixture().items():
        paths, folder, between = files_of(spec, run)
        if not paths:
            raise Nothing(f"--source={spec}: no file in it")
        stats = [path.stat() for path in paths]
        share = min(64_000_000, max(UNIT, sum(stat.st_size for stat in stats) // 64))
        if max_documents:  # one process reads them all, and no further
            share = sys.maxsize
        held = share
        for path, stat in zip(paths, stats):
            kind, size = input_format or format_of(path), max(1, stat.st_size)
            cut = mark_in(path, between) if kind == "text" else "\n"
            # A mark that can overlap itself, as in "---" of "----", is found from the start alone.
            alone = cut and not any(cut.endswith(cut[:i]) for i in range(1, len(cut)))
            alone = alone and kind in ("text", "jsonl") and size > share and is_plain(path)
            borders = range(0, size, share if alone else size)
            for begin in borders:
                if held >= share or len(borders) > 1:
                    units.append({"source": name, "files": [], "under": folder})
                    units[-1]["format"] = input_format
                    held = 0
                end = min(begin + borders.step, stat.st_size)
                units[-1]["files"].append([str(path), begin, end, cut, stat.st_mtime_ns])
                held += size
    # A unit's results have this name: other settings, another file or script, another name.
    kept = settings_but("threads", "device", "dataset", "report")
    beside = [tokenizer, perplexity_model, blocklist, *(decontaminate or "").split(",")]
    found = [path for name in beside if name for path in [Path(name), *Path(name).glob("*")]]
    kept["script"] = digest(Path(__file__).read_bytes())
    kept["beside"] = sorted((str(p), p.stat().st_mtime_ns) for p in found if p.exists())
    for unit in units:
        unit["name"] = hashed_name(json.dumps([unit, kept]))
    return units


def settings_but(*names):
    return {key: value for key, value in settings(globals()).items() if key not in names}


def mixture():
    """{name: (weight, source)} of what was asked."""
    if sources is None:
        return {"all": (1, source)}
    mix = {}
    for name, value in sources.items():
        mix[name] = tuple(value) if isinstance(value, (tuple, list)) else (value, name)
        kinds = [type(x) for x in (name, *mix[name])]
        right = kinds in ([str, int, str], [str, float, str]) and 0 < mix[name][0] < math.inf
        if not right or not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"sources: {name!r}: {value!r}: expected a name and a weight above 0")
    return mix


def format_of(path):
    """text, jsonl, json, csv, tsv or parquet, as the end of the name says."""
    return FORMATS.get(file_ending(path), "text")


def is_plain(path):
    """Can a range of the file's bytes be read alone? Not of a compressed one, nor of UTF-16."""
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(4))
    return not is_compressed(path) and encoding in (None, "utf-8")


def mark_in(path, between):
    """What cuts this text file into documents: the line ends of `between` as the file has them."""
    if not between or "\n" not in between or "\r" in between:
        return between
    try:
        with open_input(path) as file:
            head = file.read(1 << 16)
    except (*DAMAGE, OSError, UnicodeDecodeError):
        return between  # `records` reads it, too, and says what is wrong
    of_windows = b"\r\n" in head and head.count(b"\n") == head.count(b"\r\n")
    return between.replace("\n", "\r\n") if of_windows else between


def refuse_hidden_records(path):
    """A file of records whose name says text would be read as one text of braces and quotes."""
    try:
        with open_input(path) as file:
            line = file.read(1 << 20).lstrip().partition(b"\n")[0]
        value = json.loads(line) if line[:1] in (b"{", b"[") else None
    except (*DAMAGE, OSError, ValueError, RecursionError):
        return  # no JSON; if it cannot be read, reading it says so
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict) and first:
        kind = "json" if isinstance(value, list) else "jsonl"
        why = "its first line is JSON, but its name says text"
        ways = f"--input_format={kind} reads its records, --input_format=text takes it as it is"
        raise UserError(f"{path}: {why}: {ways}")


def records(unit, skipped, bad=None):
    """Yield the records of a unit as dicts, with their file's `path`; what is no UTF-8 in a folder
    goes to `skipped`. A line that is no record goes to `bad`, or where there is none ends all: then
    `field` and `url` are texts that can be encoded."""
    for path, begin, end, cut, _ in unit["files"]:
        shown = os.path.relpath(path, unit["under"]) if unit["under"] else path
        shown = os.fsencode(shown).decode(errors="replace")
        kind = unit.get("format") or format_of(path)
        if kind == "text":
            try:
                if begin == 0 and "format" in unit and not unit["format"]:
                    refuse_hidden_records(path)
                for part in read_parts(path, cut, begin, end):
                    yield {field: part.decode().strip("\r\n" if cut else ""), "path": shown}
            except UnicodeDecodeError as error:
                if not unit["under"]:
                    why = f"not UTF-8 text ({error.reason}): convert it"
                    raise UserError(f"{path}: {why}") from None
                skipped.append(shown)
            continue
        for number, line in read_records(path, kind, begin, end, bad):
            try:
                record = line if isinstance(line, dict) else json.loads(line)
                if bad is None:
                    url = record.get("url")
                    url = mended(url) if isinstance(url, str) else ""
                    record = {"url": url, field: mended(record[field])}
                yield record | {"path": shown}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                found = line if isinstance(line, bytes) else json.dumps(line, default=str).encode()
                found, number = found[:60].decode(errors="replace"), number + lines_to(path, begin)
                if bad is None:
                    expected = f'expected {{"{field}": "..."}}, found {found!r}'
                    if isinstance(error, RecursionError):
                        expected = f"JSON nested too deeply to read: {found!r}"
                    raise UserError(f"{path}:{number}: {expected}") from None
                bad.append(f"{shown}:{number}: {found}")


def mended(text):
    """The text with U+FFFD for half a surrogate pair, which UTF-8 lacks."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache(1)
def lines_to(path, begin):
    """How many lines of a file begin before those of its range from `begin`."""
    with open(path, "rb") as file:
        blocks = (file.read(min(1 << 20, begin - 1 - at)) for at in range(0, begin - 1, 1 << 20))
        return sum(block.count(b"\n") for block in blocks) + (begin > 0)


def damaged(path, number, error):
    """What to raise where a compressed file cannot be read beyond this line."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return UserError(f"{path}: damaged after line {number}: {error}")


def read_parts(path, between, begin=0, end=math.inf):
    """Yield the parts, bytes, of a file (decompressed by its name) that `between` cuts: those that
    begin from `begin` to before `end`. None: all of it as one."""
    number = 0
    try:
        with open_input(path) as file:
            if not between:
                yield file.read()
                return
            mark, held, inside = between.encode(), b"", begin == 0
            end = end if is_plain(path) else math.inf  # which is of the file as it is
            at = 0  # where `held` begins, which matters in a part of a file alone
            if end < math.inf:
                at = file.seek(max(0, begin - len(mark))) if begin else file.tell()
            while block := file.read(max(1 << 20, len(held))):
                *whole, held = (held + block).split(mark)
                for part in whole:
                    if at >= end:
                        return
                    number += 1
                    at += len(part) + len(mark)
                    if inside:  # else it belongs to the range before
                        yield part
                    inside = True
                if not inside and at + len(held) >= end:
                    return
            if inside and at < end:
                yield held
    except (*DAMAGE, OSError) as error:
        raise damaged(path, number, error) from None


def read_records(path, kind, begin, end, bad):
    """(number, line or value) of each record of a file; see `records`."""
    try:
        if kind == "parquet":
            yield from read_parquet(path, bad)
        elif kind in ("csv", "tsv"):
            yield from read_table(path, "," if kind == "csv" else "\t")
        else:
            yield from read_json(path, kind, begin, end)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding} text ({error.reason}): convert it") from None


def read_json(path, kind, begin=0, end=math.inf):
    """(number, line or value) of a JSONL file, or of a JSON file that is a list of records."""
    if kind == "json":
        [data] = read_parts(path, None)
        first, _, rest = data.strip().partition(b"\n")
        if rest and is_json(first) and not is_json(data):
            kind = "jsonl"  # by another name
    if kind == "json":
        found = parse_json(data, path) if data.strip() else []
        yield from enumerate(found if isinstance(found, list) else [found], 1)
        return
    for number, line in enumerate(read_parts(path, "\n", begin, end), 1):
        if line.strip():
            yield number, line


def is_json(data):
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def read_table(path, delimiter):
    """(line, record) of a CSV or TSV file (RFC 4180), whose first row names the fields. A row of
    more or fewer cells is no record but the list of its cells."""
    csv.field_size_limit(2**31 - 1)
    number = 0
    try:
        with io.TextIOWrapper(open_input(path), encoding="utf-8", newline="") as file:
            names = None
            for cells in csv.reader(file, delimiter=delimiter, strict=True):
                number += 1
                if names is None:
                    names = cells
                elif cells:
                    yield number, dict(zip(names, cells)) if len(cells) == len(names) else cells
    except (*DAMAGE, OSError) as error:
        raise damaged(path, number, error) from None
    except csv.Error as error:
        raise UserError(f"{path}: damaged after record {number}: {error}") from None


def read_parquet(path, bad):
    """(number, record) of a parquet file, whose other columns may be large: see `records`."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            some = bad is None and {field, "url"}.intersection(file.schema_arrow.names)
            batches = (batch.to_pylist() for batch in file.iter_batches(1000, columns=some or None))
            yield from enumerate(chain.from_iterable(batches), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no parquet: {str(error).partition(chr(10))[0]}") from None


def wait(run):
    """Wait here until every rank has come."""
    try:
        if run.world > 1:
            dist.barrier()
    except RuntimeError:  # gloo's, when a rank has left
        raise UserError("another process has stopped: see what it says") from None


# --------------------------------------------------------------------------------------------------
# Cleaning: each step takes a text and its record, and gives the text or rejects it


class Reject(Exception):
    """A document that is left out; args[0] is the reason, without numbers, so that it counts."""


def reject_if(condition, reason):
    if condition:
        raise Reject(reason)


HTML_ENDINGS = (".html", ".htm", ".xhtml", ".xhtm")
# A comment, a tag (its slash, name and attributes) or a declaration. One that does not end goes on
# to the end of the page, as in browsers; so each matches where it begins, and time is linear.
TAG = re.compile(
    r"<!--(?:-?>|.*?(?:--!?>|\Z))|<[!?][^>]*>?|</[^a-zA-Z][^>]*>?"
    r"|<(/?[a-zA-Z][^\s/>]*)((?:[^>=]|=(?:\s*\"[^\"]*\"?|\s*'[^']*'?)?)*)>?",
    re.S,
)
SKIPPED = set(
    "script style nav header footer aside form noscript svg template title button select textarea "
    "iframe object canvas audio video".split()
)
BLOCKS = set(
    "address article aside blockquote body center dd details div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr html main nav ol p pre section table ul".split()
)
LINE_END = re.compile(r"\r\n?")  # of Windows and of old Macs: \n to an HTML parser
NESTING = SKIPPED | BLOCKS - {"p", "hr", "dd", "dt"} | {"li", "a"}  # what has an end tag to match
NAVIGATION = re.compile(r"\brole\s*=\s*[\"']?navigation\b", re.I)
# What a tag means for the line breaks before the text behind it.
SIGNS = {slash + tag: ["block"] for tag in BLOCKS for slash in ("", "/")}
SIGNS |= {"br": ["line"], "li": ["item"], "tr": ["row"], "td": ["cell"], "th": ["cell"]}
SIGNS |= {"table": ["block", "row"], "/table": ["end", "block"], "/tr": ["end"]}
SIGNS |= {"/ul": ["end", "block"], "/ol": ["end", "block"], "/li": ["end"]}


def html_tags(text):
    """(name, attributes, the text up to the next) of each tag; an end tag's name is "/p"."""
    name, attributes, at = "", "", 0
    while tag := TAG.search(text, at):
        yield name, attributes, text[at : tag.start()]
        name, attributes, at = (tag[1] or "").lower(), tag[2] or "", tag.end()
        if name in ("script", "style") and not attributes.endswith("/"):
            at = re.compile(rf"</{name}|\Z", re.I).search(text, at).start()
    yield name, attributes, text[at:]


def html_to_text(text):
    """The text of an HTML page without navigation, forms and scripts: paragraphs with a blank line
    between them, list items as "- ", table cells with " | ", <pre> as it is. Never raises."""
    out, run, opened, count, hidden, pre = [], [], [], Counter(), 0, 0  # pre: is the run in <pre>?
    lines, lead = 0, ""  # the line breaks, and the "- " or " | ", that are due before the next text

    def end_run():
        nonlocal lines, lead
        text = "".join(run)
        text = text.rstrip().lstrip("\n") if pre else " ".join(text.split())
        run.clear()
        if text:
            out.append("\n" * lines + lead.replace("\0 | ", "").replace("\0", "") + text)
            lines, lead = 0, ""

    text = re.sub("[\0-\x08\x0b\x0e-\x1f]", "", text.removeprefix("\ufeff"))
    for tag, attributes, data in html_tags(LINE_END.sub("\n", text)):
        if tag == "header" and count["article"]:  # the title of an article, not of the site
            tag = "div"
        if tag in NESTING and not attributes.endswith("/"):
            hides = tag in SKIPPED or bool(NAVIGATION.search(attributes))
            opened.append((tag, hides))
            count[tag] += 1
            hidden += hides
        while tag[:1] == "/" and count[tag[1:]]:  # it closes what was left open inside, too
            name, hides = opened.pop()
            count[name] -= 1
            hidden -= hides
            if name == tag[1:]:
                break
        if hidden:
            continue
        if tag in SIGNS:
            end_run()
        for sign in SIGNS.get(tag, ()):
            if sign in ("item", "row"):
                lines, lead = max(lines, 1), "- " if sign == "item" else "\0"
            elif sign == "cell":  # \0 is before a first one, which has no " | "
                lines, lead = lines if lead else 0, lead + " | "
            elif sign == "end":
                lines, lead = max(lines, 1), ""
            elif not lead:  # else an item or a cell has only just begun
                least = 1 if count["li"] else 2
                lines = min(lines + 1, 2) if sign == "line" else max(lines, least)
        data = LINE_END.sub("\n", unescape(re.sub(r"&#0*[1-9]\d{7,};?", "\ufffd", data)))
        if not (count["a"] and data in "¶§#"):  # a heading's link to itself
            run.append(data)
            pre = count["pre"]
    end_run()
    return "".join(out).lstrip("\n")


def clean_html(text, doc):
    """HTML to text, where the document is HTML."""
    names = (doc.get("path") or "", (doc.get("url") or "").partition("?")[0])
    is_html = any(file_ending(name) in HTML_ENDINGS for name in names)
    is_html = is_html if html_documents is None else html_documents
    return html_to_text(text) if is_html else text


NEWLINE = re.compile(r"\r\n|[\r\v\f\x85\u2028\u2029]")
# Control characters, soft hyphens, byte order marks, zero-width blanks, marks of direction. Not the
# zero-width (non-)joiners of letters, by which Persian, Indic scripts and emoji mean something.
INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f"
    "\u202a-\u202e\u2060-\u206f\ufeff\ufffe\uffff]"
)


def clean_unicode(text, doc):
    """NFC, \\n for every kind of line end, no invisible characters."""
    return unicodedata.normalize("NFC", INVISIBLE.sub("", NEWLINE.sub("\n", text)))


# Kinds of special characters that are to be seen, or stand where something was to be seen.
SYMBOLS = {
    # With skin, hair and joined parts; flags; of a keycap the digit stays. Not ©, ®, ™ and arrows.
    "emoji": r"(?:\p{Emoji_Presentation}|[\U0001f000-\U0001faff]|\p{Extended_Pictographic}\ufe0f)"
    r"(?:[\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]|\u200d\p{Extended_Pictographic})*"
    r"|\p{Regional_Indicator}+|\ufe0f?\u20e3",
    # The colours of terminals, and control characters that are neither blanks nor line ends.
    "control": r"\x1b\[[0-?]*[ -/]*[@-~]|[^\P{Cc}\t\n\v\f\r\x85]",
    # What has no meaning that all readers share, and what stands for characters that were lost.
    "private": r"[\p{Co}\p{Cn}\ufffd]",
    "box": r"[\u2500-\u259f]",  # lines, corners and blocks, of which tables and bars are drawn
    "shapes": r"[\u25a0-\u25ff\u2800-\u28ff]",  # squares, circles; Braille, as in spinners
    "dingbats": r"[\u2600-\u27bf]\ufe0f?",  # and symbols before them: stars, check marks, scissors
}


@lru_cache(None)
def symbols_pattern(names):
    """What the step `symbols` takes away, and each kind's name where it is none of SYMBOLS."""
    names = SYMBOLS if names is True else [name.strip() for name in str(names).split(",")]
    for name in names:
        if name not in SYMBOLS:
            expected = f"expected true, or some of {','.join(SYMBOLS)}"
            raise UserError(f"clean_symbols={clean_symbols}: {expected}")
    return regex.compile("|".join(f"(?:{SYMBOLS[name]})" for name in names))


def drop_symbols(text, doc):
    """No special characters of the kinds that clean_symbols names."""
    return symbols_pattern(clean_symbols or True).sub("", text)


def clean_whitespace(text, doc):
    """For prose: one blank between words, none at the ends of lines, at most one blank line."""
    lines = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


def check_length(text, doc):
    """min_chars to max_chars characters."""
    reject_if(len(text) < min_chars, "length: under min_chars")
    reject_if(len(text) > max_chars, "length: over max_chars")
    return text


LETTER = re.compile(r"[^\W\d_]")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}


def check_gopher_quality(text, doc):
    """Rae et al. 2021, section A.1.1. A word is what stands between blanks (datatrove's tokenizers
    make words of punctuation marks, too)."""
    words, lines = text.split(), text.splitlines()
    n = len(words)
    reject_if(n < 50, "gopher: fewer than 50 words")
    reject_if(n > 100_000, "gopher: more than 100,000 words")
    mean = sum(map(len, words)) / n
    reject_if(mean < 3, "gopher: words too short")
    reject_if(mean > 10, "gopher: words too long")
    dots = text.count("...") + text.count("…")
    reject_if(text.count("#") / n > 0.1, "gopher: too many hashes")
    reject_if(dots / n > 0.1, "gopher: too many ellipses")
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    dotted = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    reject_if(bullets / len(lines) > 0.9, "gopher: too many bullet lines")
    reject_if(dotted / len(lines) > 0.3, "gopher: too many lines that end in an ellipsis")
    letters = sum(map(bool, map(LETTER.search, words)))
    reject_if(letters / n < 0.8, "gopher: too few words with a letter")
    reject_if(len(STOP_WORDS.intersection(words)) < 2, "gopher: too few stop words")
    return text


TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def duplicates(parts):
    """How many of the parts stood before already, and their characters."""
    unique = set(parts)
    return len(parts) - len(unique), sum(map(len, parts)) - sum(map(len, unique))


def check_gopher_repetition(text, doc):
    """Rae et al. 2021, table A1, as datatrove reads it: a top n-gram counts with its blanks, the
    duplicate ones without and without overlap. As an n-gram can occur twice only where both shorter
    ones inside it do, few places are left to look at after the pairs."""
    size = len(text) or 1
    paragraphs = re.split(r"\n{2,}", text.strip())
    lines = [line for line in text.split("\n") if line]
    for kind, parts in {"paragraph": paragraphs, "line": lines}.items():
        count, chars = duplicates(parts)
        reject_if(count / (len(parts) or 1) > 0.30, f"gopher: duplicate {kind}s")
        reject_if(chars / size > 0.20, f"gopher: characters in duplicate {kind}s")
    words = text.split()
    starts, grams = range(len(words)), list(zip(words, words[1:]))
    for n in range(2, 11):
        twice = {gram: count for gram, count in Counter(grams).items() if count > 1}
        if n in TOP and len(words) >= n:
            top = max(twice, key=twice.get, default=words[:n])  # of equals the first
            chars = len(" ".join(top)) * (twice[top] if twice else 1)
            reject_if(chars / size > TOP[n], f"gopher: top {n}-gram")
        found = {i: gram for i, gram in zip(starts, grams) if gram in twice}
        seen, chars, free = set(), 0, 0
        for i, gram in found.items() if n in DUPLICATE else ():
            if i >= free and gram in seen:
                chars, free = chars + sum(map(len, gram)), i + n
            elif i >= free:
                seen.add(gram)
        reject_if(chars / size > DUPLICATE.get(n, 1), f"gopher: duplicate {n}-grams")
        starts = [i for i in found if i + 1 in found]
        grams = [tuple(words[i : i + n + 1]) for i in starts]
    return text


CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICY = re.compile("terms of use|(?:privacy|cookie) policy|uses cookies|use (?:of )?cookies")
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+(?=[^\sa-z])|[。！？](?=.)")


def check_c4(text, doc):
    """C4's rules (Raffel et al. 2020, section 2.2) as FineWeb used them: without the one that drops
    lines without terminal punctuation. Unlike there blank lines stay, for the paragraphs' sake."""
    kept, sentences = [], 0
    for line in text.split("\n"):
        line, words, lower = line.strip(), len(line.split()), line.lower()
        if 0 < words < 3 or len(line) > 1000 and max(map(len, line.split())) > 1000:
            continue
        reject_if("lorem ipsum" in lower, "c4: lorem ipsum")
        if "javascript" in lower:
            continue
        reject_if("{" in line, "c4: curly bracket")
        if POLICY.search(lower):
            continue
        sentences += 1 + len(SENTENCE_END.findall(line)) if words else 0
        kept.append(CITATION.sub("", line) if "[" in line else line)
    reject_if(sentences < 5, "c4: fewer than 5 sentences")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")


TERMINAL = set(".!?\"'”’»。．！？｡؟۔।॥։።")  # quotation marks too, as FineWeb's list of 2024 had


def check_fineweb(text, doc):
    """Penedo et al. 2024, section 3.6, and the ratio of lines to words of datatrove's filter, whose
    limit for duplicate lines is 0.01 where the paper says 0.1. Blank lines do not count."""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    reject_if(not lines, "fineweb: no text")
    ended = sum(line[-1] in TERMINAL for line in lines)
    short = sum(len(line) <= 30 for line in lines)
    reject_if(ended / len(lines) < 0.12, "fineweb: too few lines end in punctuation")
    reject_if(short / len(lines) > 0.67, "fineweb: too many short lines")
    repeated = duplicates(lines)[1] / sum(map(len, lines))
    reject_if(repeated > 0.1, "fineweb: characters in duplicate lines")
    reject_if((len(lines) - 1) / len(text.split()) > 0.3, "fineweb: too few words a line")
    return text


# By the first word of a letter's name; a language that nothing here tells from another has both.
SCRIPTS = """GREEK el HEBREW he ARMENIAN hy GEORGIAN ka ETHIOPIC am THAI th KHMER km HANGUL ko
HIRAGANA ja KATAKANA ja CJK zh DEVANAGARI hi/mr/ne BENGALI bn/as GURMUKHI pa GUJARATI gu TAMIL ta
TELUGU te KANNADA kn MALAYALAM ml""".split()
SCRIPTS = dict(zip(SCRIPTS[::2], SCRIPTS[1::2]))
# Below a script its languages: common words, letters beyond ASCII.
FUNCTION_WORDS = """
LATIN
en the of and to in a is that for it with as was on are this be by or from not you
de der die und das den von zu mit ist des im nicht ein eine auf für sich werden auch oder ß ä ö ü
nl de het een van en in is dat op te zijn voor met die niet aan er om ook wordt of als
sv och att det som en på är av för med den till inte ett om har de kan från eller i å ä ö
da og at det en den til er som på de med af for ikke der et kan eller fra i ved være æ ø å
no/nn og i det som en er på til av for at med har ikke den et kan om fra eller ved være æ ø å
fr de la le et les des en un une du que est pour dans qui par sur pas au ce vous d l é è ê à ç ù
es de la que el en y los se del las un por con una para es no lo como al o si ñ á é í ó ú
ca de la que i el en els per amb les un una del és no es als aquest o com d l ç à è é í ï ò
pt/gl de que e o do da em um para com não uma os no se na por dos as ao é ou ã õ ç á é í ê
it di e che il la un per è in non della una i con sono si le dei gli del o da à è ì ò ù
ro de și a la pe cu care este nu un o se din să pentru sau că ce mai în fi poate ă ș ț ş ţ î â
pl w i na z się do nie jest że to jak przez od dla po za lub są o jeśli może a ł ą ę ś ć ż ń ó
cs a v na se je že s z do to jako pro za by nebo který k jsou není pokud o i ě ř ů š č ž ý í
sk a v na sa je že s z do to ako pre za by alebo ktorý k sú nie ak o i ľ ť ô ä š č ž ý í
hr/bs/sr i u je na se da za su s od o koji to kao ne ili iz će ako može što nije š č ž ć đ
hu a az és hogy nem is egy ez meg van ha csak vagy de kell lehet azt ezt amely által á é ó ö ő ü ű
fi ja on ei että se oli joka tai mutta myös kun ovat sen niin kuin jos voi ole tämä ä ö
tr ve bir bu için ile de da olarak çok daha gibi olan her kadar ne değil sonra veya ise ı ş ğ ç ö ü
id/ms yang dan di untuk dengan ini dari pada tidak dalam adalah atau akan itu ke dapat oleh
vi và của là có được cho không trong một các những với này để khi người từ bạn hoặc đ ơ ư ạ ế ệ ộ
CYRILLIC
ru и в не на что с по как это для из или к от то при если он так может о ы э ё ъ
uk і в не на що з для як це до та за або від у якщо він при є може й і ї є ґ
be і ў не на што з для як гэта да па за або ад у калі ён пры ёсць можа ў і ы э ё
bg и на да не за от се в е с че по са като или при това ще до ако ъ щ
mk и на да не за од се во е со што по са како или ова ќе до ако може ј љ њ ѓ ќ ѕ
sr и у је на се да за су с од који то као не или из ће ако може што ј љ њ ћ ђ џ
ARABIC
ar في من على إلى أن هذا التي لا ما مع هذه عن كان أو الذي كل ذلك بين قد لم ة ي ك ى
fa در به از که این را با است برای آن یک تا بر می هم شده خود نیز یا پ چ گ ی ک
ur کے میں کی ہے اور سے کا کو اس پر کہ ہیں نے یہ بھی ایک نہیں تھا جو ہو ٹ ڈ ے ں ہ ی ک
"""
MARKS = re.compile(r"[^\0-\x7fа-шьюя]")  # what is a mark of a language; the others may be words


@lru_cache(None)
def word_table():
    """{word or letter: the languages that have it}, {script: its languages}"""
    table, languages = defaultdict(list), defaultdict(list)
    for name, *words in map(str.split, FUNCTION_WORDS.strip().split("\n")):
        if name.isupper():
            script = name
            continue
        languages[script].append(name)
        for word in words:
            table[word].append(name)
    return table, languages


def built_in_rank(sample):
    """{language: share of the evidence}. A script has its letters' share, which its languages
    divide by the cubes of their function words; one that n languages have counts 1 / n."""
    words = re.findall(r"[^\W\d_]+", sample.lower())
    (table, languages), evidence, letters = word_table(), Counter(), Counter()
    text = "".join(words)
    for token, n in Counter(words + MARKS.findall(text)).items():
        for name in table.get(token, ()):
            evidence[name] += n / len(table[token])
    for letter, n in Counter(text).items():
        script = unicodedata.name(letter, "?").split(" ")[0]
        letters[SCRIPTS.get(script, script)] += n
    if letters["ja"] * 10 > letters["zh"]:  # kana: then the Chinese characters are Japanese, too
        letters["ja"] += letters.pop("zh", 0)
    for name in ("ja", "zh", "ko"):
        letters[name] *= 3  # a character there says as much as several letters elsewhere
    shares = {name: letters[name] for name in SCRIPTS.values()}
    for script, names in languages.items():
        found = {name: evidence[name] ** 3 for name in names}
        if max(map(evidence.__getitem__, names)) * 300 >= letters[script] > 0:  # a word in so many
            shares |= {k: letters[script] * cube / sum(found.values()) for k, cube in found.items()}
    return {name: share / letters.total() for name, share in shares.items() if share}


@lru_cache(None)
def langid():
    """py3langid's rank(), a naive Bayes model of 140 languages, where it is installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).rank


def guess_language(text):
    """(language, share of the evidence, rivals) of a text's first 5,000 characters. The rivals are
    what it can hardly be told from; the share is theirs, too. "unknown": too few words."""
    sample = text[:5000]
    if sum(map(str.isalpha, sample)) < 20:
        return "unknown", 0.0, []
    shares = dict(langid()(sample)) if langid() else built_in_rank(sample)
    near = [name for name in shares if shares[name] * 2 >= max(shares.values())]
    near.sort(key=shares.get, reverse=True)
    best, *rivals = "/".join(near).split("/") if near else ["unknown"]
    return best, sum(shares[name] for name in near), rivals


def check_language(text, doc):
    """Only `language`, or what cannot be told from it, with at least language_score."""
    best, score, rivals = guess_language(text)
    reject_if(language not in (best, *rivals), f"language: {best}")
    reject_if(score < language_score, "language: under language_score")
    return text


def bare(url):
    """example.com/page of https://user@www.example.com/page/"""
    url = re.sub(r"^(?:(?:\w+:)?//)?(?:[^/@?#]*@)?(?:www\.)?", "", url.strip().casefold())
    return url.rstrip("/?&")


@lru_cache(1)
def small_model():
    if not perplexity_model:
        raise UserError("the step perplexity needs --perplexity_model=FOLDER, a small model")
    torch.set_num_threads(1)  # the other cores have documents of their own
    return load(perplexity_model, device)


@torch.no_grad()
def check_perplexity(text, doc):
    """Perplexity of the first window under a small model of ours, as CCNet (Wenzek et al. 2020) has
    it: what is far below is boilerplate, far above no language that the model knows."""
    net, tok = small_model()
    ids = [tok.eot_id, *tok.encode(text[: 16 * net.config.n_ctx])][: net.config.n_ctx + 1]
    ids = torch.tensor([ids], device=device)
    loss, n = net(ids[:, :-1], ids[:, 1:].contiguous())
    low, high = perplexity_band
    perplexity = math.exp(min(700.0, float(loss) / max(1, int(n))))
    reject_if(perplexity < low, "perplexity: under the band")
    reject_if(perplexity > high, "perplexity: over the band")
    return text


@lru_cache(None)
def read_blocklist(path):
    """The hosts and URL prefixes, the words, and what is neither, of a file. "# " is a comment."""
    try:
        lines = read_input(path).decode().casefold().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--blocklist={path}: not UTF-8 text ({error.reason}): convert it"
        ) from None
    lines = {" ".join(line.split()) for line in lines if line.split()[:1] not in ([], ["#"])}
    urls = {line for line in lines if "." in line and " " not in line}
    words = {line for line in lines if re.fullmatch(r"\w+", line)}
    return set(map(bare, urls)), words, sorted(lines - urls - words)


def check_blocklist(text, doc):
    """A host of `blocklist` stands for its subdomains too, a URL for all that begin with it, a word
    or phrase for itself between non-letters, in either case (so not inside of Chinese, say)."""
    if not blocklist:
        return text
    urls, words, phrases = read_blocklist(blocklist)
    url = bare(doc.get("url") or "")[:2000]  # as there are so many beginnings
    host = re.split(r"[/:?#]", url)[0]
    parts = {host[m.end() :] for m in re.finditer(r"^|\.", host)}
    parts |= {url[:i] for i in range(len(host) + 1, len(url) + 1)}
    reject_if(not urls.isdisjoint(parts), "blocklist: URL")
    lower = " ".join(text.casefold().split())
    reject_if(not words.isdisjoint(re.findall(r"\w+", lower)), "blocklist: word")
    for phrase in filter(lower.__contains__, phrases):
        found = re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", lower)
        reject_if(found, "blocklist: phrase")
    return text


# Not git@host:path, nor image@2x.png. Each pattern begins where a token does, to be linear.
EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+%-]{1,64}@(?!\dx\.)(?:[\w-]+\.)+[^\W\d_]{2,}(?![\w-]|\.\w|:[\w~/])"
)
# Not name-1.2.3.4, Name/1.2.3.4, nor a part of something longer. IPv6: what is allotted, 2000::/3.
IP = re.compile(
    r"(?<![\w.])(?<![a-zA-Z][-/])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\w|-[a-zA-Z])"
    r"|(?<![\w:.])[23][0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])"
)
VERSION = re.compile(r"(?:\b(?:version|release|ver|rev|v|section)|§|[=<>~!]=|~>)[\s.:]*$", re.I)
# +, country code and groups of digits, 9 to 15 in all; or North American, with separators.
PHONE = re.compile(
    r"(?<![\w.+-])(?:\+(?=(?:[ .()-]{0,2}\d){9,15}(?!\d))(?!\d+\.\d+\b(?!\.))[1-9]\d{0,2}"
    r"[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d([.-]))[2-9]\d\d[.-]\d{4})(?![\w-]|[.,]\d)"
)


def clean_pii(text, doc):
    """E-mail addresses, public IP addresses and telephone numbers become <email>, <ip> and <phone>.
    Four numbers under 32 are a version rather than an address."""

    def replace_ip(match):
        try:
            ip = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        public = ip.is_global and not ip.is_multicast and max(ip.packed) > 31
        version = VERSION.search(text, max(0, match.start() - 24), match.start())
        return "<ip>" if public and not version else match[0]

    text = EMAIL.sub("<email>", text) if "@" in text else text
    text = IP.sub(replace_ip, text)
    return PHONE.sub("<phone>", text)


STEPS = (clean_html, clean_unicode, drop_symbols, clean_whitespace)
STEPS += (check_length, check_language, check_blocklist)
STEPS += (check_gopher_repetition, check_gopher_quality, check_c4, check_fineweb)
STEPS += (check_perplexity, clean_pii)
STEPS = {step.__name__.partition("_")[2]: step for step in STEPS}  # by name, in FineWeb's order


# --------------------------------------------------------------------------------------------------
# Words and duplicates, by numpy over batches of documents

PERMUTATIONS, SHINGLE, GRAM = 128, 5, 13  # GRAM: Brown et al. 2020, appendix C
STEP = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_rng = np.random.default_rng(20240801)
BYTE_HASHES = _rng.integers(0, 2**64, 256, dtype=np.uint64)
FACTORS, TERMS = _rng.integers(0, 2**32, (2, PERMUTATIONS), dtype=np.uint32)
FACTORS |= np.uint32(1)
IN_WORDS = np.array([b >= 128 or chr(b).isalnum() for b in range(256)])


def mixed(h):
    """Spread the bits of hashes (uint64) over all 64 (Stafford 2011, as in splitmix64)."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


@lru_cache(1)
def powers(n):
    """STEP**i and STEP**-i modulo 2**64, for i under n."""
    inverse = pow(STEP, -1, 2**64)
    return [np.cumprod(np.full(n, x, np.uint64)) for x in (STEP, inverse)]


def word_hashes(texts):
    """(hash uint64, number of its text) of every word, in order: letters and digits, in lower case;
    a Chinese or Japanese character or a Korean syllable is a word of its own."""
    plain = "".join(text.replace("\0", " ") + "\0" for text in texts).lower()
    data = np.frombuffer(plain.encode(), np.uint8)
    inside = IN_WORDS[data]
    first, last = inside.copy(), inside.copy()
    first[1:] &= ~inside[:-1]
    last[:-1] &= ~inside[1:]
    wide = (data >= 0xE3) & (data <= 0xED)  # the first of the three bytes of such a character
    if wide.any():
        third = np.append([False, False], wide[:-2])
        first |= wide | (inside & np.append(False, third[:-1]))
        last |= third | (inside & np.append(wide[1:], False))
    starts, ends = np.flatnonzero(first), np.flatnonzero(last)
    up, down = (p[: len(data)] for p in powers(1 << len(data).bit_length()))
    sums = BYTE_HASHES[data]
    sums *= up
    own = sums[starts]
    np.cumsum(sums, out=sums)
    hashes = mixed((sums[ends] - sums[starts] + own) * down[starts])
    return hashes, np.searchsorted(np.flatnonzero(data == 0), starts)


def shingles(hashes, owners, n):
    """(hash, number of its text) of every n words in a row."""
    m = max(0, len(hashes) - n + 1)
    whole = owners[:m] == owners[len(owners) - m :]
    total = np.zeros(m, np.uint64)
    for k in range(n):
        total = total * np.uint64(STEP) + hashes[k : k + m]
    return mixed(total[whole]), owners[:m][whole]


def minhash(hashes, owners, n):
    """MinHash (Broder 1997) of the shingles of n texts: (n, PERMUTATIONS) uint16, 16 bits of each
    smallest value; the row of a text that is shorter than a shingle is 0."""
    values, owners = shingles(hashes, owners, SHINGLE)
    values = (values >> np.uint64(32)).astype(np.uint32)
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    signatures = np.zeros((n, PERMUTATIONS), np.uint16)
    for k in range(PERMUTATIONS if len(first) else 0):
        least = np.minimum.reduceat(values * FACTORS[k] + TERMS[k], first)
        signatures[owners[first], k] = mixed(least.astype(np.uint64)) >> np.uint64(48)
    return signatures


def band_shape(threshold):
    """(bands, rows): the longest rows with which two texts of this similarity meet in a band with
    a probability of 0.99 (Leskovec et al. 2014, section 3.4)."""
    shapes = [(PERMUTATIONS // rows, rows) for rows in range(1, 33)]
    return [(b, r) for b, r in shapes if 1 - (1 - threshold**r) ** b >= 0.99 or r == 1][-1]


@lru_cache(1)
def evaluation_grams():
    """The hashes, sorted, of every GRAM words in a row of the files to decontaminate from."""
    found = []
    for path in decontaminate.split(","):
        if not os.path.isfile(path):
            raise UserError(f"--decontaminate={path}: no such file")
        bad = []
        rows = records({"files": [(path, 0, math.inf, None, 0)], "under": None}, [], bad)
        texts = ["\n".join(strings(row | {"path": None})) for row in rows]
        if bad:
            raise UserError(f"--decontaminate={bad[0]}: expected a JSON object")
        found.append(shingles(*word_hashes(texts), GRAM)[0])
    return np.unique(np.concatenate(found))


def strings(value):
    """Every text within a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return chain.from_iterable(map(strings, inner))


def joined(n, edges):
    """The smallest member of each one's component: (n,) int64, for edges (m, 2)."""
    label = np.arange(n)
    while len(edges):
        ends = label[edges]
        edges, ends = edges[ends[:, 0] != ends[:, 1]], ends[ends[:, 0] != ends[:, 1]]
        np.minimum.at(label, ends.max(1), ends.min(1))
        while not np.array_equal(label, label[label]):
            label = label[label]
    return label


# --------------------------------------------------------------------------------------------------
# The pipeline: units are cleaned apart, then duplicates are found among all
#
# `work` is the folder of what is under way: there are <unit>.txt, the texts of the unit's documents
# one after another, <unit>.rows, a row_kind() for each, and <unit>.json. `here` is a folder in it,
# of these units together: its `rows` are those of all, in order, cuts.npy says what becomes of each
# document, and <i>.tokens and <i>.npy are the i-th unit encoded.

# The steps that compare all documents: why each leaves one out.
LAST = {"url": "the URL came before", "exact": "the text came before"}
LAST["near"] = "a near-duplicate came before"
ALL = 2**62


def steps_of(names):
    """Those of the steps that are among these, in their order. With clean_symbols the step
    `symbols` is one, behind those that tell what the characters are."""
    asked = list(dict.fromkeys(steps.split(",")))
    if clean_symbols and "symbols" not in asked:
        after = [i + 1 for i, name in enumerate(asked) if name in ("html", "unicode")]
        asked.insert(max(after, default=0), "symbols")
    return [name for name in asked if name in names]


def row_kind():
    """What is known of a document: its unit's name (16 hex digits), the bytes before it in the
    unit's .txt and its own, the hashes of its text, of its words and of its URL, and where
    near-duplicates are wanted its MinHash."""
    columns = [(name, "<u8") for name in ("unit", "begin", "size", "hash", "exact", "url")]
    return np.dtype([*columns, ("signature", "<u2", (PERMUTATIONS * len(steps_of(["near"])),))])


def table(path, kind):
    """A file of rows of this dtype, mapped into memory."""
    empty = not os.path.getsize(path)  # which cannot be mapped
    return np.empty(0, kind) if empty else np.memmap(path, kind, "r")


def all_rows(here):
    return table(here / "rows", row_kind())


class Tally:
    """What a step was given and what it left, [documents, bytes] each; its seconds; and its reasons
    to leave something out: {reason: [how often, up to three examples]}."""

    def __init__(self):
        self.given, self.left, self.seconds, self.reasons = [0, 0], [0, 0], 0.0, {}

    def add(self, given=(0, 0), left=(0, 0), seconds=0.0, reasons=None):
        self.given = [a + b for a, b in zip(self.given, given)]
        self.left = [a + b for a, b in zip(self.left, left)]
        self.seconds += seconds
        for reason, (n, examples) in (reasons or {}).items():
            have, mine = self.reasons.get(reason, (0, []))
            self.reasons[reason] = [have + n, (mine + examples)[:3]]

    def count(self, before, after, reason=None):
        """A document: its text before the step, and after it or the reason why it is left out."""
        size = len(before.encode())
        if reason:
            self.add([1, size], reasons={reason: [1, [one_line(before)]]})
        else:
            self.add([1, size], [1, size if after is before else len(after.encode())])

    def line(self, name):
        (docs, size), (left, rest) = self.given, self.left
        speed = f", {size / self.seconds / 1e6:,.0f} MB/s a process" if self.seconds else ""
        size, rest = f"{size / 1e6:,.1f}", f"{rest / 1e6:,.1f}"
        return f"{name}: {left:,} of {docs:,} documents, {rest} of {size} MB{speed}"


def one_line(text, n=160):
    return " ".join(text[:n].split())


def digest(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def hashed_name(text):
    """16 hex digits."""
    return f"{digest(text.encode()):016x}"


def in_rounds(items, size):
    """Group (…, text) tuples into lists of about `size` characters."""
    group, held = [], 0
    for item in items:
        group.append(item)
        held += len(item[-1])
        if held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group


def cleaned(unit, tallies, skipped):
    """Yield (record, text) of the documents of a unit that the local steps leave."""
    todo = [(tallies[name], STEPS[name]) for name in steps_of(STEPS)]
    found = (record for record in records(unit, skipped) if record[field].strip())
    for record in islice(found, max_documents):
        text = record[field]
        tallies["read"].count(text, text)
        for tally, step in todo:
            before, begun = text, time.perf_counter()
            try:
                text = step(text, record)
                reason = None if text.strip() else "nothing is left of it"
            except Reject as rejected:
                reason = str(rejected)
            tally.seconds += time.perf_counter() - begun
            tally.count(before, text, reason)
            if reason:
                break
        else:
            yield record, text


def described(group, tallies):
    """(texts, their rows) of a group of (record, text), without those that share GRAM words in a
    row with the evaluation files."""
    texts, begun = [text for _, text in group], time.perf_counter()
    rows, stay = np.zeros(len(group), row_kind()), np.ones(len(group), bool)
    near = steps_of(["near"])
    if near or decontaminate:  # of a book shelf in one document the first books: memory
        hashes, owners = word_hashes([text[: 20 * BATCH] for text in texts])
    if near:
        rows["signature"] = minhash(hashes, owners, len(group))
        tallies["near"].seconds += time.perf_counter() - begun
    if decontaminate:
        begun = time.perf_counter()
        grams, whose = shingles(hashes, owners, GRAM)
        stay[whose[np.isin(grams, evaluation_grams(), kind="sort")]] = False
        for text, ok in zip(texts, stay):
            reason = None if ok else f"{GRAM} words in a row of an evaluation"
            tallies["decontaminate"].count(text, text, reason)
        tallies["decontaminate"].seconds += time.perf_counter() - begun
    for row, (record, text) in zip(rows, group):
        row["size"], row["hash"] = len(data := text.encode()), digest(data)
        row["exact"] = digest(" ".join(text.lower().split()).encode())
        page = re.sub(r"\butm_\w+=[^&#]*&?|#.*", "", record.get("url", ""))
        row["url"] = digest(bare(page).encode())
    return [text for text, ok in zip(texts, stay) if ok], rows[stay]


def sync(file):
    """Wait until what was written to the file is on the disk: before another file says so."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder):
    """Wait until the names of files in the folder are on the disk, where the system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def save_array(path, array):
    """np.save, which says why where the disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def is_clean(place):
    """Are a unit's files there, and as large as <unit>.json says?"""
    try:
        sizes = json.loads(Path(f"{place}.json").read_bytes())["sizes"]
        return sizes == [os.path.getsize(f"{place}{ending}") for ending in (".txt", ".rows")]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def clean(work, unit):
    """Read a unit, run the local steps over its documents and keep what they leave; <unit>.json,
    which comes last, says that the other files are whole. Returns the bytes read."""
    place, at = f"{work / unit['name']}", 0
    if not is_clean(place):
        Path(f"{place}.json").unlink(missing_ok=True)
        tallies, skipped, special = defaultdict(Tally), [], 0
        tallies["read"].add()
        names = special_names(tokenizer_settings())
        with open(f"{place}.txt", "wb") as all_texts, open(f"{place}.rows", "wb") as rows_file:
            for group in in_rounds(cleaned(unit, tallies, skipped), BATCH):
                texts, rows = described(group, tallies)
                ends = at + np.cumsum(rows["size"])
                rows["unit"], rows["begin"] = int(unit["name"], 16), ends - rows["size"]
                at += all_texts.write("".join(texts).encode())
                rows_file.write(rows.tobytes())
                special += sum(any(name in text for name in names) for text in texts)
            sync(all_texts)
            sync(rows_file)
        sizes = [os.path.getsize(f"{place}{ending}") for ending in (".txt", ".rows")]
        result = {"skipped": skipped, "special": special, "sizes": sizes}
        result["tallies"] = {name: vars(tally) for name, tally in tallies.items()}
        write_json(f"{place}.json", result)
    return files_module.read_json(f"{place}.json")["tallies"]["read"]["given"][1]


def texts_of(work, rows):
    """Yield the texts, as `clean` left them, of the documents with these rows."""
    for unit, some in groupby(rows, itemgetter("unit")):
        with open(work / f"{unit:016x}.txt", "rb") as file:
            for row in some:
                file.seek(row["begin"])
                yield file.read(row["size"]).decode()


def find_near(here, band):
    """The pairs of near-duplicates that meet in a band, (n, 2): its first document with this key
    and the others, if their signatures agree in near_threshold of all places."""
    signatures, width = all_rows(here)["signature"], band_shape(near_threshold)[1]
    keys = np.zeros(len(signatures), np.uint64)
    for values in signatures[:, band * width : (band + 1) * width].copy().T:
        keys = keys * np.uint64(STEP) + values
    live = np.flatnonzero(np.load(here / "left.npy") & (keys > 0))  # 0: too short for a shingle
    order = live[np.argsort(keys[live], kind="stable")]
    new = np.diff(keys[order], prepend=np.uint64(0)) != 0
    heads = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    pairs, found = np.stack([heads, order], 1)[~new], []
    for some in np.array_split(pairs, len(pairs) // 100_000 + 1):
        alike = (signatures[some[:, 0]] == signatures[some[:, 1]]).mean(1)
        found.append(some[alike >= near_threshold])
    return np.concatenate(found)


def deduplicate(here, names, pool):
    """Drop documents whose URL or text came before, in any unit: (what is left, (N,) bool; {step:
    Tally} of all steps; the sizes of the clusters of near-duplicates, with the first document of
    each, the largest first)."""
    tallies, clusters = defaultdict(Tally), []
    with open(here / "rows", "wb") as file:
        for name in names:
            with open(here.parent / f"{name}.rows", "rb") as part:
                shutil.copyfileobj(part, file)
            for step, saved in files_module.read_json(here.parent / f"{name}.json")[
                "tallies"
            ].items():
                tallies[step].add(**saved)
    rows = all_rows(here)
    left = np.ones(len(rows), bool)
    for step in [*steps_of(["url", "exact"]), *steps_of(["near"])]:
        if step == "near":
            save_array(here / "left.npy", left)
            bands = range(band_shape(near_threshold)[0])
            pairs = np.concatenate([*pool(partial(find_near, here), bands)])
            begun, label = time.perf_counter(), joined(len(left), pairs)
            members = np.bincount(label[left], minlength=len(left))
            clusters = [(int(members[i]), int(i)) for i in np.flatnonzero(members > 1)]
            after = left & (label == np.arange(len(left)))
        else:
            begun, values, after = time.perf_counter(), rows[step].copy(), left.copy()
            live = np.flatnonzero(left & (values != digest(b"")))
            after[np.delete(live, np.unique(values[live], return_index=True)[1])] = False
        given, rest = ([int(some.sum()), int(rows["size"][some].sum())] for some in (left, after))
        gone = np.flatnonzero(left & ~after)
        examples = [one_line(text) for text in texts_of(here.parent, rows[gone[:3]])]
        reasons = {LAST[step]: [len(gone), examples]} if len(gone) else {}
        tallies[step].add(given, rest, time.perf_counter() - begun, reasons)
        left = after
    return left, tallies, sorted(clusters, reverse=True)


def divide(here, units, starts, left):
    """Divide what is left: cuts.npy says for each document how many of its characters are for
    training (ALL; 0: none; -1: it is left out). A document goes to validation by its hash, so that
    it stays where it is when others are added; of a source of fewer than 20 the last val_fraction
    of all characters does."""
    rows = all_rows(here)
    cuts = np.where(rows["hash"] < np.uint64(val_fraction * 2**64), 0, ALL)
    cuts[~left] = -1
    for name in mixture():
        of_it = np.array([unit["source"] == name for unit in units], bool)
        numbers = np.flatnonzero(left & np.repeat(of_it, np.diff(starts)))
        if len(numbers) < 20:
            lengths = np.array([len(text) for text in texts_of(here.parent, rows[numbers])], int)
            total = int(lengths.sum())
            training = total - round(total * val_fraction)  # characters
            cuts[numbers] = np.clip(training - (np.cumsum(lengths) - lengths), 0, lengths)
    save_array(here / "cuts.npy", cuts)
    return cuts


def chosen(here, begin, end):
    """Yield (split, hash, text) of documents `begin` to before `end` that stay."""
    rows, cuts = all_rows(here)[begin:end], np.load(here / "cuts.npy", mmap_mode="r")[begin:end]
    numbers = np.flatnonzero(cuts >= 0)
    for i, text in zip(numbers, texts_of(here.parent, (rows[i] for i in numbers))):
        parts = {"train": text[: cuts[i]], "val": text[cuts[i] :]}
        yield from ((split, rows["hash"][i], part) for split, part in parts.items() if part)


# --------------------------------------------------------------------------------------------------
# Shards

CUT = regex.compile(r"(?<=\S\n)(?=\p{L})")  # no split pattern has a piece that spans this
SPLITS = ("train", "val")
# Of an encoded document: which of SPLITS it is in, its hash, its numbers of tokens and of bytes.
TOKENS = np.dtype([("split", "u1"), ("hash", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])


def pieces_of(text):
    """Cut a long text into parts that are tokenized alone as they are in the whole."""
    at = 0
    while len(text) - at > BATCH and (cut := CUT.search(text, at + BATCH)):
        yield text[at : cut.start()]
        at = cut.start()
    yield text[at:]


def count(here, fraction, job):
    """{piece: count} of a sample, by hash, of a unit's training text."""
    settings = tokenizer_settings()
    drawn = (
        normal_text(text, settings)
        for split, hashed, text in chosen(here, *job[1:])
        if split == "train" and int(mixed(hashed[None])[0]) < fraction * 2**64
    )
    parts = (part for text in drawn for part in pieces_of(text))
    return count_pieces(parts, PATTERNS[tokenizer])


@lru_cache(1)
def finished(folder):
    tok = Tokenizer.from_folder(folder)
    return tok, "<u4" if tok.n_vocab > 65536 else "<u2"


def is_encoded(here, i, kind):
    """Are the tokens of unit i there, and as many as <i>.npy says?"""
    try:
        tokens = int(np.load(here / f"{i}.npy")["tokens"].sum())
        return tokens * np.dtype(kind).itemsize == os.path.getsize(here / f"{i}.tokens")
    except (OSError, ValueError, IndexError):
        return False


def encode(here, job):
    """Encode what stays of unit i, in a job (i, its first document, their end): <i>.tokens has the
    tokens and <i>.npy the TOKENS of each document. Returns bytes."""
    i, *unit = job
    tok, kind = finished(here)
    before, behind = (np.array(ids, kind) for ids in tok.document_layout)
    if not is_encoded(here, i, kind):
        (here / f"{i}.npy").unlink(missing_ok=True)
        rows = []
        parts = (
            (split, hashed, j == 0, part)
            for split, hashed, text in chosen(here, *unit)
            # Others' tokenizers may put a space before a text, or go on behind a line.
            for j, part in enumerate(pieces_of(text) if tok.can_cut else [text])
        )
        with open(here / f"{i}.tokens", "wb") as file:
            for group in in_rounds(parts, BATCH):
                encoded = tok.encode_batch([text for *_, text in group])
                for (split, hashed, first, text), ids in zip(group, encoded):
                    if first:
                        if rows:
                            file.write(behind)
                        file.write(before)
                        rows.append([SPLITS.index(split), hashed, len(before) + len(behind), 0])
                    file.write(ids.astype(kind))
                    rows[-1][2] += len(ids)
                    rows[-1][3] += len(text.encode())
            if rows:
                file.write(behind)
            sync(file)
        save_array(here / f"{i}.npy", np.array([*map(tuple, rows)], TOKENS))
    return int(np.load(here / f"{i}.npy")["bytes"].sum())


def within(rows, split):
    """Which of the encoded documents are in this split: (n,) bool."""
    return rows["split"] == SPLITS.index(split)


def layout(here, units, documents):
    """What the shards hold, where `documents` are the TOKENS of each unit: ({split: [(unit, which
    of its documents, cuts as of `part_of`)]}, {source: {split: numbers}}). A mix takes each source
    as often as its share wants: whole first, then a part of it. Its val keeps the shares, without
    repeats; val.<source> is all of a source's."""
    plans, told = {}, {name: {} for name in mixture()}
    mine = {name: [i for i, unit in enumerate(units) if unit["source"] == name] for name in told}
    for split in SPLITS:
        plans[split] = []
        whole = {
            name: [(i, within(documents[i], split), {}) for i in some]
            for name, some in mine.items()
        }
        tokens = {name: numbers_of(documents, parts)["tokens"] for name, parts in whole.items()}
        tokens = {name: n for name, n in tokens.items() if n}
        if split == "train" and (missing := [name for name in told if name not in tokens]):
            raise UserError(f"sources: no text for training in {', '.join(missing)}")
        weights = {name: weight for name, (weight, _) in mixture().items() if name in tokens}
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        total = mix_tokens or sum(tokens.values())
        if split == "val":
            total = min((tokens[name] / share for name, share in shares.items()), default=0)
        for name, share in shares.items():
            wanted = round(total * share)
            parts = whole[name] * (wanted // tokens[name])
            parts = parts + part_of(here, documents, whole[name], wanted % tokens[name], wanted)
            plans[split] += parts
            written = numbers_of(documents, parts)["tokens"]
            numbers = {"tokens": tokens[name], "written": written}
            told[name][split] = {"asked": share, **numbers, "epochs": written / tokens[name]}
        written = sum(told[name][split]["written"] for name in shares)
        for name in shares:
            numbers = told[name][split]
            told[name][split] = {"share": numbers["written"] / max(1, written), **numbers}
            if split == "val" and sources:
                plans[f"val.{name}"] = whole[name]
    return plans, told


def numbers_of(documents, parts):
    """How many documents, bytes and tokens the parts of a plan hold."""
    numbers = np.zeros(3, np.int64)
    for i, chosen, cuts in parts:
        rows = documents[i][chosen]
        numbers += len(rows), rows["bytes"].sum(), rows["tokens"].sum()
        for begin, end, size in cuts.values():
            numbers -= 0, size, end - begin
    return dict(zip(("documents", "bytes", "tokens"), numbers.tolist()))


MISS = 0.02  # of what is wanted of a source: documents are cut where whole ones miss by more


def part_of(here, documents, whole, rest, wanted):
    """About `rest` tokens of a source, of which `wanted` are wanted in all: the documents with the
    lowest hashes, as parts of a plan. Where whole ones miss, as few long ones do, the last is cut:
    {its number in the unit: (first token left out, first one after them, bytes left out)}."""
    if not rest:
        return []
    unit = np.concatenate([np.full(chosen.sum(), i) for i, chosen, _ in whole])
    number = np.concatenate([np.flatnonzero(chosen) for _, chosen, _ in whole])
    rows = np.concatenate([documents[i][chosen] for i, chosen, _ in whole])
    order = np.lexsort((number, unit, rows["hash"]))
    sums = np.append(0, np.cumsum(rows["tokens"][order]))
    n, cut = int(np.abs(sums - rest).argmin()), None  # so many are nearest to the rest
    if abs(int(sums[n]) - rest) > MISS * wanted:
        n = int(np.searchsorted(sums, rest, "right"))
        last = order[n - 1]
        begin = int(documents[unit[last]]["tokens"][: number[last]].sum())
        cut = cut_of(here, int(unit[last]), begin, rows[last], rest - int(sums[n - 1]))
    parts = []
    for i in np.unique(unit[order[:n]]).tolist():
        numbers = number[order[:n]][unit[order[:n]] == i]
        chosen = np.zeros(len(documents[i]), bool)
        chosen[numbers] = True
        cuts = {int(number[last]): cut} if cut and unit[last] == i else {}
        parts.append((i, chosen, cuts))
    return parts


# The end of a line or of a sentence, and of a word, in UTF-8.
ENDS = re.compile("\\n+|[.!?][\"')\\]]*(?=\\s)|。|！|？".encode())
BLANK = re.compile(rb"\S(?=\s)")


REACH = 50_000  # tokens before and after the place wanted that are looked through


def cut_of(here, i, begin, row, wanted):
    """Where to cut the document at token `begin` of unit i, which has the TOKENS `row`, so that
    about `wanted` tokens are left: at the nearest end of a line or a sentence, else of a word; a
    cut as in `part_of`."""
    tok, kind = finished(here)
    ids = table(here / f"{i}.tokens", kind)[begin : begin + int(row["tokens"])]
    sizes = np.array([len(tok.token_bytes(id)) for id in range(tok.n_vocab)])[ids]
    # What stands behind the text, as an end token does, stays.
    body = len(ids) - 1 if len(ids) > 1 and not sizes[-1] else len(ids)
    keep = min(max(wanted, 1), body)
    first, last = max(0, keep - REACH), min(keep + REACH, body)
    text = b"".join(tok.token_bytes(int(id)) for id in ids[first:last])
    ends = np.cumsum(sizes[first:last])
    for pattern in (BLANK, ENDS):
        bytes_before = [match.end() for match in pattern.finditer(text)]
        places = first + 1 + np.flatnonzero(np.isin(ends, bytes_before))
        keep = int(min(places, key=lambda place: abs(place - wanted), default=keep))
    left_out = sizes[keep:].sum() / max(1, sizes.sum())
    return keep, body, round(int(row["bytes"]) * float(left_out))


def write_shards(here, plans, documents):
    """Write every split in shards of shard_tokens, in llm.c's format: {split: its numbers}."""
    kind, meta = finished(here)[1], {}
    head = (20240801, 7) if kind == "<u4" else (20240520, 1)

    def tokens_of(i, chosen, cuts):
        tokens, at = table(here / f"{i}.tokens", kind), 0
        for first in range(0, len(documents[i]), 1000):
            rows = documents[i][first : first + 1000]
            taken = np.repeat(chosen[first : first + 1000], rows["tokens"])
            for number, (begin, end, _) in cuts.items():
                if first <= number < first + len(rows):
                    start = int(rows["tokens"][: number - first].sum())
                    taken[start + begin : start + end] = False
            yield tokens[at : at + len(taken)][taken]
            at += len(taken)

    for split, parts in plans.items():
        meta[split] = numbers_of(documents, parts) | {"shards": []}
        found = chain.from_iterable(tokens_of(*part) for part in parts)
        rest = np.empty(0, kind)
        for begin in range(0, meta[split]["tokens"], shard_tokens):
            left = size = min(shard_tokens, meta[split]["tokens"] - begin)
            meta[split]["shards"].append(f"{split}_{begin // shard_tokens:06d}.bin")
            with whole_file(here / meta[split]["shards"][-1]) as file:
                file.write(np.array([*head, size, *[0] * 253], "<i4"))
                while left:
                    rest = rest if len(rest) else next(found)
                    file.write(rest[:left])
                    left, rest = left - len(rest[:left]), rest[left:]
    return meta


CLEANED = ("jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst")
CLEANED_SIZE = 64_000_000  # characters of a file of them, about


@contextmanager
def compressed(file, name):
    """A binary file to write into, whose bytes are compressed into `file` as the name says."""
    ending = os.path.splitext(name)[1]
    if ending == ".zst":
        import pyarrow  # check_settings has seen that it is there

        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as packing:
            yield packing
        file.write(sink.getvalue())
    elif ending == ".gz":  # without a time, so that the same text gives the same bytes
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as packing:
            yield packing
    elif ending in (".bz2", ".xz"):
        with (bz2 if ending == ".bz2" else lzma).open(file, "wb") as packing:
            yield packing
    else:
        yield file


def write_cleaned(here, job):
    """Write the documents of unit i that stay as they are before the tokenizer, in a job (i, its
    first document, their end, the name of its source in a mix or None): records with the text in
    `field`, in files of about CLEANED_SIZE characters. Returns bytes."""
    i, begin, end, name = job
    for path in cleaned_paths(here, i):
        path.unlink()
    size = 0
    for split in SPLITS:
        texts = ((text,) for which, _, text in chosen(here, begin, end) if which == split)
        for number, group in enumerate(in_rounds(texts, CLEANED_SIZE)):
            path = here / f"cleaned_{split}_{i:06d}_{number:03d}.{save_cleaned}"
            with whole_file(path) as file, compressed(file, path.name) as packing:
                for (text,) in group:
                    row = {field: text} | ({"source": name} if name else {})
                    size += len(text.encode())
                    packing.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return size


def cleaned_paths(here, i):
    return sorted(here.glob(f"cleaned_*_{i:06d}_*.{save_cleaned}"))


def old_files(folder):
    """What an earlier run left in the folder, without meta.json and the tokenizer."""
    patterns = ["train_*.bin", "val_*.bin", "val.*.bin", "report.md", *map(task_file, TASKS)]
    patterns += [task_file(name, "val") for name in TASKS]
    patterns += [f"cleaned_{split}_*.{ending}" for split in SPLITS for ending in CLEANED]
    return [path for pattern in patterns for path in folder.glob(pattern)]


def refuse_folders(folder):
    """A folder in the place of a file of the data set cannot be replaced: say so at once."""
    names = ("meta.json", "tokenizer.json", "tokenizer_config.json")
    for path in [*(folder / name for name in names), *old_files(folder)]:
        if path.is_dir():
            raise UserError(f"{path}: a folder where a file is to be: move it; nothing was changed")


def commit(folder, here, tok, meta, more=()):
    """Make the finished files in `here` the dataset. meta.json goes first and comes last: a folder
    without it is no dataset, so that a process killed in between leaves nothing that loads."""
    splits = {key: value for key, value in meta.items() if key.partition(".")[0] in SPLITS}
    kept = settings_but("threads", "device", "report")
    meta = {"settings": kept, "n_vocab": tok.n_vocab} | meta
    before, behind = tok.document_layout
    meta["document"] = {"begin": before, "end": behind}  # the ids that stand around each document
    texts = {"tokenizer.json": tok.spec, "tokenizer_config.json": tok.config, "meta.json": meta}
    for name, value in texts.items():
        write_json(here / name, value)
    old = old_files(folder)
    shard_names = chain.from_iterable(numbers["shards"] for numbers in splits.values())
    new = [*shard_names, *more, *texts]
    try:
        (folder / "meta.json").unlink(missing_ok=True)
        sync_folder(folder)
        for path in old:
            path.unlink()
        for name in new[:-1]:
            os.replace(here / name, folder / name)
        sync_folder(folder)
        os.replace(here / new[-1], folder / new[-1])
        sync_folder(folder)
    except OSError as error:
        why = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"{why}; {folder} is not whole: run the same command again") from None
    for split, numbers in splits.items():
        told = ", ".join(f"{n:,} {key}" for key, n in numbers.items() if key != "shards")
        print(f"{split}: {told}")


# --------------------------------------------------------------------------------------------------
# Task sets


def functions_of(files):
    """Records for every task out of Python files: one of each short function with a docstring."""
    found = []
    for record in files:
        lines, share = record[field].split("\n"), digest(record[field].encode())
        with suppress(SyntaxError, ValueError, RecursionError):
            for node in ast.walk(ast.parse(record[field])):
                said = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
                if said and len(node.body) > 1:
                    rows = lines[node.lineno - 1 : node.body[0].lineno - 1]
                    rows += lines[node.body[0].end_lineno : node.end_lineno]
                    code, said = textwrap.dedent("\n".join(rows)).strip("\n"), said.split("\n\n")[0]
                    found.append((code, " ".join(said.split()), record["path"], share))
    for code, right, path, share in found:
        wrong = found[digest(f"{seed} {code}".encode()) % len(found)][1]
        if wrong != right and len(code) + len(right) <= 700:
            row = {"prompt": f"Write the docstring of this function.\n\n{code}"}
            row |= {"completion": right, "chosen": right, "rejected": wrong, "text": code}
            row |= {"label": path.rpartition("/")[0].split("/")[0], "source": code, "target": right}
            yield row | {"split_by": share}


ASK, MORE = ("instruction", "prompt", "question"), ("input", "context")
ANSWER = ("output", "response", "completion", "answer", "chosen")
TEXT, LABEL = ("text", "sentence", "content", "review"), ("label", "category", "class")
PAIRS = [("source", "target"), ("document", "summary"), ("article", "highlights")]
PAIRS += [("text", "summary"), ("instruction", "output"), ("input", "output")]
PAIRS += [("question", "answer"), ("prompt", "completion")]
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}


def first_of(record, names):
    """The first of these fields that is a text with something in it, or ""."""
    found = (record.get(name) for name in names)
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


def turns(value):
    """Messages of [{"role", "content"}] or ShareGPT's [{"from", "value"}]."""
    if not isinstance(value, list) or not value or {type(turn) for turn in value} != {dict}:
        raise Reject("messages are no list of turns")
    result = []
    for turn in value:
        role = ROLES.get(turn.get("role", turn.get("from")))
        reject_if(role is None, "a role that is none of system, user, assistant, tool")
        content = turn.get("content", turn.get("value"))
        empty = not isinstance(content, str) or not content.strip()
        reject_if(empty, "a turn without text")
        result.append({"role": role, "content": content})
    return result


def asked(r):
    """The messages before the answer: of Alpaca, Dolly, prompt and completion, question and answer;
    `system` and `history` [[user, assistant], ...] as LLaMA-Factory has them."""
    if isinstance(r.get("prompt"), list):
        return turns(r["prompt"])
    ask, more = first_of(r, ASK), first_of(r, MORE)
    reject_if(not ask, "no messages, instruction, prompt or question")
    said = [("system", first_of(r, ["system"]))] if first_of(r, ["system"]) else []
    for user, assistant in r.get("history") or []:
        said += [("user", user), ("assistant", assistant)]
    said.append(("user", f"{ask}\n\n{more}" if more else ask))
    return turns([{"role": role, "content": content} for role, content in said])


def answer_of(value):
    """The text of an answer: a string, or messages that end with it."""
    text = turns(value)[-1]["content"] if isinstance(value, list) else value
    reject_if(not isinstance(text, str) or not text.strip(), "an empty answer")
    return text


def as_sft(r):
    """The messages, and where the record has parts their texts, for finetune.py's --template."""
    parts = {}
    if (said := r.get("messages", r.get("conversations"))) is not None:
        messages = turns(said)
    else:
        answer = next((r[name] for name in ANSWER if r.get(name)), None)
        messages = [*asked(r), {"role": "assistant", "content": answer_of(answer)}]
        if not isinstance(r.get("prompt"), list):
            parts = {"instruction": first_of(r, ASK), "input": first_of(r, MORE)}
            parts["output"] = messages[-1]["content"]
    if first_of(r, ["template"]):
        parts["template"] = r["template"]
    wrong = messages[-1]["role"] != "assistant" or len(messages) < 2
    reject_if(wrong, "the last turn is not the assistant's")
    return {"messages": messages} | parts


def as_preference(r):
    chosen, rejected = r.get("chosen"), r.get("rejected")
    if isinstance(chosen, str) and "\n\nAssistant:" in chosen and isinstance(rejected, str):  # HH
        cut = len(os.path.commonprefix([chosen, rejected]))
        cut = chosen.rfind("\n\nAssistant:", 0, cut)
        reject_if(cut < 0, "chosen and rejected do not answer the same")
        said = re.split(r"\n\n(Human|Assistant): ?", chosen[:cut])
        said = [{"from": who.lower(), "value": text} for who, text in zip(said[1::2], said[2::2])]
        cut += len("\n\nAssistant:")
        prompt, chosen, rejected = turns(said), chosen[cut:].strip(), rejected[cut:].strip()
    elif isinstance(chosen, list) and not first_of(r, ASK) and not r.get("prompt"):
        prompt = turns(chosen)[:-1]
    else:
        prompt = asked(r)
    chosen, rejected = answer_of(chosen), answer_of(rejected)
    reject_if(not prompt, "no messages, instruction, prompt or question")
    reject_if(chosen == rejected, "chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def as_classify(r):
    text, label = first_of(r, TEXT), next((r[k] for k in LABEL if r.get(k) is not None), None)
    known = text and isinstance(label, (str, int)) and str(label).strip()
    reject_if(not known, "no text or no label")
    return {"text": text, "label": str(label)}


def as_seq2seq(r):
    for pair in PAIRS:
        source, target = (first_of(r, [name]) for name in pair)
        if source and target:
            return {"source": source, "target": target}
    raise Reject("no source and target, nor another known pair of fields")


def task_file(name, split="train"):
    return f"{name}_{split}.jsonl"


def replace_rows(here, folder, name):
    """Make the rows of a task in `here` those of the folder. Without its training rows a task
    cannot be trained on: they go first and come last, so that no killed run leaves two halves."""
    train, val = task_file(name), task_file(name, "val")
    (folder / train).unlink(missing_ok=True)
    sync_folder(folder)
    os.replace(here / val, folder / val)
    sync_folder(folder)
    os.replace(here / train, folder / train)
    sync_folder(folder)


TASKS = {"sft": as_sft, "preference": as_preference, "classify": as_classify, "seq2seq": as_seq2seq}


def convert(wanted, unit):
    """The records of a unit as rows of the tasks: {task: ({row: hash to split by}, Tally)}."""
    made, broken = {name: ({}, Tally()) for name in wanted}, []
    python = (source, sources) == ("python", None)
    found = islice(records(unit, [], broken), max_documents)
    for record in functions_of(found) if python else found:
        text = json.dumps(record, default=str)
        for name, (rows, tally) in made.items():
            if python and name == "classify" and not record["label"]:
                continue  # a module that is in no package
            try:
                row = json.dumps(TASKS[name](record), ensure_ascii=False)
                rows[row] = record["split_by"] if python else digest(row.encode(errors="replace"))
                tally.count(text, text)
            except (Reject, ValueError, TypeError, AttributeError) as why:
                reason = str(why) if isinstance(why, Reject) else "fields of another type"
                tally.count(text, text, reason)
    for _, tally in made.values():
        for line in broken:
            tally.count(line, line, "no JSON object")
    return made


def build_tasks(here, pool, units, wanted):
    """Make <task>_train.jsonl and <task>_val.jsonl of the wanted tasks: {file name: its rows}."""
    parts, made, show = [], {}, Progress()
    for part in pool(partial(convert, wanted), units):
        parts.append(part)
        show(f"converting: {len(parts)} of {len(units)} parts", last=len(parts) == len(units))
    for name in wanted:
        rows, tally = {}, Tally()
        for part in parts:
            rows |= part[name][0]
            tally.add(**vars(part[name][1]))
        for reason, (n, examples) in tally.reasons.items():
            print(f"{name}: {n:,} bad records: {reason}, such as {examples[0]}")
        if tally.left[0] > len(rows):
            print(f"{name}: {tally.left[0] - len(rows):,} records came before, word for word")
        if not rows and task:
            raise Nothing(f"--source={sources or source}: no record for --task={task} in it")
        last = set(list(rows)[len(rows) - round(len(rows) * val_fraction) :])
        if len(rows) >= 20:
            last = {row for row, hashed in rows.items() if hashed < val_fraction * 2**64}
        for split in reversed(SPLITS):  # the training rows come last: see replace_rows
            some = [row for row in rows if (row in last) == (split == "val")]
            made[task_file(name, split)] = len(some)
            with whole_file(here / task_file(name, split)) as file:
                file.write("".join(row + "\n" for row in some).encode(errors="replace"))
    return made


# --------------------------------------------------------------------------------------------------
# Putting it together


class Nothing(UserError):
    """The sources hold nothing of use: what was made of them is not kept either."""


def adopt(values):
    """Start a working process: the settings, one thread, and an end with the process it serves."""
    globals().update(values)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: it ends, without a word
    with suppress(Exception):  # Linux alone
        ctypes.CDLL(None).prctl(1, 9)


def each(f, items, run, pool, what):
    """Run f, which returns the bytes that it did, on this rank's share of the items, on several
    processes. The ranks leave together."""
    mine, show, begun, done = items[run.rank :: run.world], Progress(), time.monotonic(), 0
    for n, size in enumerate((pool if len(mine) > 1 else map)(f, mine), 1):
        done += size
        if run.main:
            rate = done / 1e6 / max(time.monotonic() - begun, 1e-9)
            told = f"{n} of {len(mine)} parts, {done / 1e6:,.1f} MB, {rate:,.1f} MB/s"
            show(f"{what}: {told}", last=n == len(mine))
    wait(run)


def use_fineweb(run, folder, here):
    """Download FineWeb shards that are tokenized already, as they are; each rank its share."""
    global tokenizer
    tokenizer = "gpt2"  # whatever was asked: it made them
    wanted = shards or FINEWEB_SHARDS
    if wanted > FINEWEB_SHARDS:
        raise UserError(f"shards={shards}: expected up to {FINEWEB_SHARDS}")
    names = {"train": [f"train_{i:06d}.bin" for i in range(1, wanted + 1)]}
    names["val"] = ["val_000000.bin"]
    tok, every = finished_tokenizer(tokenizer, tokenizer_settings()), names["val"] + names["train"]
    for name in every[run.rank :: run.world]:
        read_fineweb(name)
    wait(run)
    if run.main:
        here.mkdir(exist_ok=True)
        for name in every:
            (here / name).unlink(missing_ok=True)
            try:
                os.link(KEPT / "fineweb10B" / name, here / name)  # the same bytes on the disk
            except OSError:  # another file system, or one without links
                shutil.copyfile(KEPT / "fineweb10B" / name, here / name)
            with open(here / name, "rb") as file:
                sync(file)
        tokens = {split: sum(map(read_fineweb, some)) for split, some in names.items()}
        meta = {split: {"tokens": tokens[split], "shards": names[split]} for split in names}
        commit(folder, here, tok, meta)


def read_fineweb(name):
    """Download a shard of FineWeb: how many tokens it has."""
    path = download(f"{FINEWEB}fineweb_{name}", KEPT / "fineweb10B" / name)
    try:
        return len(open_shard(path))
    except UserError:
        path.unlink()
        raise UserError(f"{path}: removed: not the token shard that was expected") from None


def learn_tokenizer(here, jobs, pool):
    """Train the tokenizer on the training text, or on a sample of it by hash."""
    sizes, counts = all_rows(here)["size"][np.load(here / "cuts.npy") > 0], Counter()
    fraction = tokenizer_bytes / max(int(sizes.sum()), 1)
    for some in pool(partial(count, here, fraction), jobs):
        counts.update(some)
    if not counts:
        raise UserError(f"tokenizer_bytes={tokenizer_bytes}: the documents are too long for so few")
    tok = train_tokenizer(tokenizer, counts, vocab_size, tokenizer_settings(), Progress())
    if tokenizer != "char" and tok.n_vocab < vocab_size:
        print("the tokenizer is smaller than vocab_size: the text has no more to offer")
    return tok


def build(run, folder, work, pool):
    """From the sources to the shards. Every rank does its share of a step, and all go on together;
    what needs every result at once is rank 0's."""
    tok, units = finished_tokenizer(tokenizer, tokenizer_settings()), plan(run)
    each(partial(clean, work), units, run, pool, "reading")
    names = [unit["name"] for unit in units]
    here = work / hashed_name("".join(names))
    sizes = [os.path.getsize(work / f"{name}.rows") for name in names]
    starts = (np.cumsum([0, *sizes]) // row_kind().itemsize).tolist()  # of each unit's documents
    jobs = list(zip(range(len(names)), starts, starts[1:]))
    if run.main:
        here.mkdir(exist_ok=True)
        left, tallies, clusters = deduplicate(here, names, pool)
        cuts = divide(here, units, starts, left)
        order = ["read", *steps_of(STEPS), "decontaminate", *LAST]
        tallies = {name: tallies[name] for name in order if name in tallies}
        for name, tally in tallies.items():
            print(tally.line(name))
        notes = [files_module.read_json(work / f"{name}.json") for name in names]
        skipped = list(dict.fromkeys(path for note in notes for path in note["skipped"]))
        if skipped:
            print(f"skipped {len(skipped)} files that are not UTF-8, such as {skipped[0]}")
        if special := sum(note["special"] for note in notes):
            print(f"{special} documents hold the name of a special token: it is taken as text")
        if not (cuts > 0).any():
            raise Nothing(f"--source={sources or source}: no text for training in it")
        tok = tok or learn_tokenizer(here, jobs, pool)
        print(f"tokenizer: {tokenizer}, {tok.n_vocab:,} tokens")
        write_json(here / "tokenizer_config.json", tok.config)
        write_json(here / "tokenizer.json", tok.spec)
    wait(run)
    each(partial(encode, here), jobs, run, pool, "encoding")
    if save_cleaned:
        labels = [unit["source"] if sources else None for unit in units]
        labelled = [(*job, label) for job, label in zip(jobs, labels)]
        each(partial(write_cleaned, here), labelled, run, pool, "writing the cleaned documents")
    if run.main:
        documents = [np.load(here / f"{i}.npy") for i in range(len(names))]
        plans, mix = layout(here, units, documents)
        meta = write_shards(here, plans, documents)
        for name in sources or ():
            part = mix[name]["train"]
            shares = f"{part['share']:.1%} of the mix, {part['asked']:.1%} was asked"
            print(f"{name}: {shares}; {part['written']:,} tokens, {part['epochs']:.2f} epochs")
        meta |= {"sources": mix} if sources else {}
        hashes = hashlib.sha256(all_rows(here)["hash"].tobytes()).hexdigest()
        meta |= {"source_sha256": hashes, "skipped": skipped}
        more = []
        if save_cleaned:
            paths = chain.from_iterable(cleaned_paths(here, i) for i in range(len(names)))
            more += sorted(path.name for path in paths)
            print(f"cleaned: {len(more)} files, such as {more[0]}")
            meta["cleaned"] = list(more)
        of_python = (source, sources) == ("python", None)
        more += build_tasks(here, pool, units, TASKS) if of_python else []
        if report:
            write_report(here, tallies, clusters, meta)
            more.append("report.md")
        commit(folder, here, tok, meta, more)


def write_report(here, tallies, clusters, meta):
    """report.md: what every step took and left, why, and what is left now."""
    shown = lambda cell: f"{cell:,}" if isinstance(cell, int) else cell
    row = lambda *cells: "| " + " | ".join(map(shown, cells)) + " |"
    quoted = lambda text: "`" + text.replace("`", "'") + "`"
    lines = [f"# data/{dataset}", "", f"Source: {sources or source}. Steps: {steps}.", ""]
    lines += [row("step", "documents in", "out", "bytes in", "out"), row(*["---"] * 5)]
    for name, tally in tallies.items():
        lines.append(row(name, *chain.from_iterable(zip(tally.given, tally.left))))
    lines += ["", "## What was left out, and why", ""]
    for name, tally in tallies.items():
        for reason, (n, examples) in sorted(tally.reasons.items(), key=lambda item: -item[1][0]):
            lines += [f"**{name}: {reason}**: {n:,} documents", ""]
            lines += [f"- {quoted(example)}" for example in examples] + [""]
    varied = diversity(here)
    lines += ["## Diversity", ""]
    stay = int((np.load(here / "cuts.npy") >= 0).sum())
    whole = "all" if varied["documents"] == stay else f"of {stay:,}, a sample by hash"
    lines += [f"Of {varied['documents']:,} documents, {varied['bytes']:,} bytes ({whole}).", ""]
    for n, share in varied["distinct"].items():
        what = "words" if n == 1 else f"{n} words in a row"
        lines.append(f"- distinct-{n}: {share:.3f} of all {what} are different")
    lines += [f"- gzip makes {varied['compression']:.2f} bytes one", ""]
    lines += ["## Lengths of the documents that are left, in bytes", "", "```"]
    rows = all_rows(here)
    sizes = rows["size"][np.load(here / "cuts.npy") >= 0]
    bins = np.bincount(np.log2(np.maximum(sizes, 1)).astype(int))
    for power in np.flatnonzero(bins):
        bar = "#" * max(1, round(60 * bins[power] / bins.max()))
        lines.append(f"{2**power:>12,} to {2 ** (power + 1) - 1:>12,} {bins[power]:>9,} {bar}")
    lines += ["```", "", "## Near-duplicates", ""]
    extra = sum(n - 1 for n, _ in clusters)
    lines += [f"{len(clusters):,} clusters, {extra:,} documents left out.", ""]
    texts = texts_of(here.parent, rows[[i for _, i in clusters[:10]]])
    for (n, _), text in zip(clusters, texts):
        lines.append(f"- {n:,} documents like {quoted(one_line(text, 120))}")
    lines += ["", "## Tokens", "", row("split", "documents", "bytes", "tokens", "bytes per token")]
    lines.append(row(*["---"] * 5))
    around = len(list(chain(*finished(here)[0].document_layout)))  # special tokens of a document
    for split in SPLITS:
        docs, size, tokens, _ = meta[split].values()
        text_tokens = tokens - docs * around
        lines.append(row(split, docs, size, tokens, f"{size / max(text_tokens, 1):.2f}"))
    for name, splits in meta.get("sources", {}).items():
        for split, m in splits.items():
            told = (
                f"{m['share']:.1%} of the mix, {m['asked']:.1%} was asked; {m['written']:,} tokens"
            )
            lines += ["", f"{name}, {split}: {told}, {m['epochs']:.2f} epochs of {m['tokens']:,}"]
    with whole_file(here / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode(errors="replace"))


DIVERSITY_BYTES = 20_000_000  # of text that the figures of diversity are of, a sample by hash


def diversity(here):
    """How varied the documents that are left are: {"documents", "bytes": of the sample, "distinct":
    {n: share of all n words in a row that differ, for n of 1, 2, 3} (distinct-n, Li et al. 2016,
    without regard to case), "compression": how many bytes gzip makes one of (Shaib et al. 2024)}.
    More text has fewer new words in it, so compare samples of one size."""
    rows = all_rows(here)
    numbers = np.flatnonzero(np.load(here / "cuts.npy") >= 0)
    order = numbers[np.argsort(rows["hash"][numbers], kind="stable")]
    within_sample = np.cumsum(rows["size"][order]) <= DIVERSITY_BYTES
    sample = np.sort(order[: max(1, int(within_sample.sum()))])
    packer, packed, size = zlib.compressobj(9, zlib.DEFLATED, 31), 0, 0  # 31: gzip's format
    grams = {n: [] for n in (1, 2, 3)}
    texts = texts_of(here.parent, rows[sample])
    for group in in_rounds(((text,) for text in texts), BATCH):
        group = [text for (text,) in group]
        hashes, owners = word_hashes(group)
        for n, found in grams.items():
            found.append(shingles(hashes, owners, n)[0])
        data = "".join(text + "\n" for text in group).encode()
        size += len(data)
        packed += len(packer.compress(data))
    packed += len(packer.flush())
    distinct = {}
    for n, found in grams.items():
        values = np.concatenate(found) if found else np.empty(0)
        distinct[n] = len(np.unique(values)) / max(1, len(values))
    return {
        "documents": len(sample),
        "bytes": size - len(sample),
        "distinct": distinct,
        "compression": size / packed,
    }


def tokenizer_settings():
    """What the keys say of a tokenizer made here."""
    return TokenizerSettings(special_tokens, roles, normalize)


def check_roles():
    """Refuse roles that no tokenizer has, or that this one cannot be given."""
    check_role_names(tokenizer_settings())
    if roles and (source == "fineweb10B" or Path(tokenizer).is_dir()):
        which = "of fineweb10B" if source == "fineweb10B" else f"in {tokenizer}"
        raise UserError(f"roles={roles}: the tokenizer {which} is taken as it is")


def check_settings():
    """Refuse settings with which nothing can be made."""
    data, place = (os.path.realpath(Path("data", name)) for name in ("", dataset.strip("\0")))
    if "\0" in dataset or Path(place) in (Path(data), *Path(data).parents):
        raise UserError(f"dataset={dataset!r}: expected a name: the result is data/<dataset>")
    limits = dict(shard_tokens=1, threads=0, max_documents=1, shards=1, mix_tokens=1)
    limits |= {"tokenizer_bytes": 1}
    names = {t for t in special_tokens if isinstance(t, str) and t}
    if not 2 <= len(names) == len(special_tokens):
        raise UserError(f"special_tokens={special_tokens}: expected two or more different names")
    # A shard's header counts in 32 bits; so many processes no machine has.
    most = {"shard_tokens": 2**31 - 1, "threads": 10_000}
    check_roles()
    smallest = {"bpe": 256, "unigram": 256, "word": 1, "wordpiece": 2}
    if tokenizer in smallest:
        n_special = len(special_names(tokenizer_settings(), tokenizer))
        limits |= {"vocab_size": smallest[tokenizer] + n_special}
    for name, least in limits.items():
        value = globals()[name]
        if value is not None and value < least:
            raise UserError(f"{name}={value}: expected {least} or more")
        if value is not None and value > most.get(name, 2**62):
            raise UserError(f"{name}={value}: expected {most.get(name, 2**62)} or less")
    numbers = [value for value in perplexity_band if type(value) in (int, float)]
    if len(numbers) != 2 or len(perplexity_band) != 2:
        raise UserError(f"perplexity_band={perplexity_band}: expected two numbers")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: expected 0 or more and less than 1")
    if not 0 < near_threshold <= 1:
        raise UserError(f"near_threshold={near_threshold}: expected above 0 and up to 1")
    if input_format not in (None, "text", *FORMATS.values()):
        formats = ", ".join(dict.fromkeys(["text", *FORMATS.values()]))
        raise UserError(f"input_format={input_format}: expected one of {formats}")
    symbols_pattern(clean_symbols or True)
    if save_cleaned and save_cleaned not in CLEANED:
        raise UserError(f"save_cleaned={save_cleaned}: expected one of {', '.join(CLEANED)}")
    if save_cleaned.endswith(".zst"):
        require_zst(f"save_cleaned={save_cleaned}")
    for name in steps.split(","):
        if name and name not in [*STEPS, *LAST]:
            raise UserError(f"steps: {name!r}: expected some of {','.join([*STEPS, *LAST])}")
    if task is not None and task not in TASKS:
        raise UserError(f"--task={task}: expected {', '.join(TASKS)}")
    is_given = source == "fineweb10B" or Path(tokenizer).is_dir()
    if normalizer_names(tokenizer_settings()) and is_given:
        which = "of fineweb10B" if source == "fineweb10B" else f"in {tokenizer}"
        raise UserError(f"normalize={normalize}: the tokenizer {which} is taken as it is")


def make(run, folder, work, pool):
    """Whatever was asked for, in `folder`."""
    if source == "fineweb10B" and not task:
        return use_fineweb(run, folder, work / "fineweb")
    if not task:
        return build(run, folder, work, pool)
    unused = [name for name in ("roles", "save_cleaned", "clean_symbols") if globals()[name]]
    if unused and run.main:
        print(f"note: {', '.join(unused)}: of documents alone; --task={task} uses none of it")
    units = plan(run)
    if run.main:
        made = build_tasks(work, pool, units, [task])
        replace_rows(work, folder, task)
        for name in reversed(made):
            print(f"{name}: {made[name]:,} records")


STOPPED = "stopped: the same command goes on from here"


def start_pool(workers):
    """That many processes to work in, or none of them where one is enough."""
    if workers == 1:
        return nullcontext()
    try:
        return ProcessPoolExecutor(workers, initializer=adopt, initargs=(settings(globals()),))
    except (OSError, ImportError, NotImplementedError) as error:  # no semaphores, no /dev/shm
        why = str(error).partition(",")[0]
        raise UserError(f"no processes to work in ({why}): --threads=1 needs none") from None


def take_alone(work, fresh):
    """Make the working folder, and lock it as long as the file lives that is returned: to the end
    of the process, however it ends. `fresh` as in `remove_empty`."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = open(work / "lock", "wb")
    except OSError as error:
        remove_empty(fresh)
        why = f"{error.filename or work}: {error.strerror or error}"
        raise UserError(f"{why}; nothing was changed") from None
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        why = "another prepare.py is at work there: wait for it, or choose another --dataset"
        raise UserError(f"{work.parent}: {why}") from None
    except (ImportError, OSError) as error:
        print(f"{work}: no lock here ({error}): see that no second prepare.py works there")
    # What a run left that was killed while it removed its working folder.
    shutil.rmtree(gone_name(work), ignore_errors=True)
    return file


def gone_name(work):
    return work.with_name("work.gone")


def remove(work):
    """Remove the working folder. Its files vouch for each other, so it loses its name first: when
    this is killed in between, the next run takes none of them for whole."""
    shutil.rmtree(gone_name(work), ignore_errors=True)
    with suppress(OSError):
        os.replace(work, gone_name(work))
    shutil.rmtree(gone_name(work), ignore_errors=True)


def remove_empty(fresh):
    """Remove those of the folders, which were not there before this run, that are empty."""
    for folder in fresh:
        with suppress(OSError):
            folder.rmdir()


def main():
    check_settings()
    folder, begun = Path("data") / dataset, time.monotonic()
    if inspect is not None:
        tok = finished_tokenizer(tokenizer, tokenizer_settings())
        return show_tokens(tok or Tokenizer.from_folder(folder), inspect)
    run, work = setup("cpu", timedelta(days=7)), folder / "work"
    fresh = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    if run.main:
        if os.path.isdir(folder):
            refuse_folders(folder)
        run.lock = take_alone(work, fresh)  # until this function ends
    wait(run)
    workers, over = threads or os.cpu_count() or 1, False  # is there nothing to go on from?
    try:
        with start_pool(workers) as pool:
            make(run, folder, work, pool.map if pool else map)
        over = True
    except Nothing:
        over = True
        raise
    except UserError as error:
        over = over or "cannot be written" in str(error)  # a full disk, as model.whole_file says it
        raise
    except BrokenPipeError:  # standard output's: the script ends as `config` says
        raise
    except OSError as error:  # a full disk, a file that may not be read
        over = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        why = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"{why}; nothing was changed") from None
    except BrokenProcessPool:
        try:
            time.sleep(0.5)  # Ctrl-C reaches the workers, too, and may have ended them first
        except KeyboardInterrupt:
            raise UserError(STOPPED) from None
        why = "a process was killed, for want of memory perhaps: --threads=1 takes less"
        raise UserError(f"{why}; the same command goes on from here") from None
    except KeyboardInterrupt:
        raise UserError(STOPPED) from None
    finally:
        if run.main and (over or not any(work.glob("*.json"))):
            remove(work)
            remove_empty(fresh)
    if run.main:
        took = duration(time.monotonic() - begun)
        then = "" if task else f": python train.py {same_recipes()}--dataset={dataset}"
        print(f"wrote {folder} in {took}{then}")


if __name__ == "__main__":
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    main()
