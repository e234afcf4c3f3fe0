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

from config import configure, settings

source = "python"  # python, a named download, file, folder, glob, URL, @list of URLs, hf:owner/name
sources: dict | None = None  # a mix instead: {"name": weight} or {"name": (weight, source)}
dataset = "python"  # the result is data/<dataset>
task: str | None = None  # make a task set instead: sft, preference, classify, seq2seq
field = "text"  # the field of a JSONL or parquet record that is its text
separator: str | None = None  # a text file is cut into documents here
max_documents: int | None = None  # read so many
shards: int | None = None  # of a download in many files: take so many

# Cleaning. One by one: html, unicode, whitespace, length, language, blocklist, gopher_repetition,
# gopher_quality, c4, fineweb, perplexity, pii; then among all: url, exact, near.
steps = "html,exact,near"  # what is done to the documents, in this order (see below)
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

# the mix and the split
val_fraction = 0.1  # of the documents, by their hash; of the characters under 20 documents
mix_tokens: int | None = None  # training tokens of the mix; none: as many as the sources hold

# the tokenizer
tokenizer = "bpe"  # bpe, unigram, wordpiece, word, char, byte, a tiktoken name, a folder with one
vocab_size = 4096  # tokens of a tokenizer trained here, special ones included
normalize = ""  # of the text before it is tokenized: nfc or nfkc, lower, or both with a comma
special_tokens = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]  # start, pad, chat's
inspect: str | None = None  # print this text's tokens and the vocabulary's statistics, no more
tokenizer_bytes = 1_000_000_000  # it is trained on so much of the text, a sample by hash

shard_tokens = 100_000_000  # tokens of a shard written here
threads = 0  # processes at work under each rank; 0: all cores
seed = 0  # of the examples drawn for the default task sets
device = "cpu"  # of the perplexity model

if __name__ == "__main__":
    configure(globals())

import ast
import ctypes
import gc
import gzip
import hashlib
import heapq
import ipaddress
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from glob import glob, has_magic
from html import unescape
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex
import requests
import tiktoken
import torch
import torch.distributed as dist

import model
from model import UserError

UNIT = 2_000_000  # bytes of a part of the input that one process works on alone, at least
BATCH = 1_000_000  # characters that are in hand at once in each process

# --------------------------------------------------------------------------------------------------
# Downloads

HUB = "https://huggingface.co/"
FINEWEB = HUB + "datasets/kjj0/fineweb10B-gpt2/resolve/main/"
RAW = "https://raw.githubusercontent.com/"
DOWNLOADS = {  # name: (address, sha256 or None, what separates its documents or None)
    "shakespeare": (
        RAW + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        None,
    ),
    "tinystories": (
        HUB + "datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
        None,
        "<|endoftext|>",
    ),
    "alpaca": (RAW + "tatsu-lab/stanford_alpaca/main/alpaca_data.json", None, None),
    "dolly": (
        HUB + "datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",
        None,
        None,
    ),
    "gsm8k": (
        RAW + "openai/grade-school-math/master/grade_school_math/data/train.jsonl",
        None,
        None,
    ),
    "hh": (
        HUB + "datasets/Anthropic/hh-rlhf/resolve/main/harmless-base/train.jsonl.gz",
        None,
        None,
    ),
}


def download(url, path, sha256=None, tries=5):
    """Fetch url into path: resumed, retried, checked, and under its name only when it is whole."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, show = path.with_name(path.name + ".part"), model.Progress()
    part.touch()
    for attempt in range(1, tries + 1):
        try:
            fetch(url, part, show)
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 0
            if 400 <= status < 500 and status not in (408, 416, 429):
                raise UserError(f"{error}: is the address right?") from None
            if attempt == tries:
                raise UserError(f"{url}: {error}, {tries} times: run it again to go on") from None
            show.note(f"{path.name}: {error}; trying again ({attempt + 1} of {tries})")
            time.sleep(min(2 ** (attempt - 1), 30))
    show(f"{path.name}: {part.stat().st_size / 1e6:,.1f} MB", last=True)
    if sha256 and (found := hashlib.sha256(part.read_bytes()).hexdigest()) != sha256:
        part.unlink()
        raise UserError(f"{url}: removed: its sha256 is {found}, not {sha256}")
    os.replace(part, path)
    return path


def fetch(url, part, show):
    """Add to the file `part` what it lacks of url, or raise a requests.RequestException."""
    have = part.stat().st_size
    headers = {"Range": f"bytes={have}-"} if have else {}
    headers["Accept-Encoding"] = "identity"  # so that Content-Length counts the bytes we write
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        if answer.status_code == 416:  # the part is longer than the file, or is all of it
            os.truncate(part, 0)
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0  # the server does not resume: from the beginning
        length = answer.headers.get("Content-Length")
        size = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file:
            for piece in answer.iter_content(1 << 16):
                file.write(piece)
                have += len(piece)
                show(f"{part.stem}: {have / 1e6:,.1f} of {(size or have) / 1e6:,.1f} MB")
    if size is not None and have != size:
        raise requests.ConnectionError(f"{have} of {size} bytes came")


# --------------------------------------------------------------------------------------------------
# Collecting: a source is files, files are cut into units, a unit gives records

SUITES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
RECORDS = (".jsonl", ".json", ".parquet")
KEPT = Path("data/downloads")


def files_of(spec, run):
    """([paths], folder they are in or None, separator) of one source, downloads made. Under
    torchrun every rank downloads its part, and waits for the others."""
    if spec == "python":
        folder = Path(sysconfig.get_path("stdlib"))
        return walk(folder, ".py", SUITES), folder, None
    if spec in DOWNLOADS:
        url, sha256, between = DOWNLOADS[spec]
        ending = (
            "".join(Path(url).suffixes[-2:]) if url.endswith(".gz") else Path(url).suffix or ".txt"
        )
        path = KEPT / f"{spec}{ending}"
        if run.main:
            download(url, path, sha256)
        wait(run)
        return [path], None, separator or between
    if re.match(r"https?://|hf:|@", spec):
        urls, paths = addresses(spec), []
        for i, url in enumerate(urls):
            paths.append(KEPT / re.sub(r"[^\w.-]+", "_", url.split("://")[-1]))
            if i % run.world == run.rank:
                download(url, paths[-1])
        wait(run)
        return paths, None, separator
    path = Path(spec)
    if path.is_dir():
        return walk(path), path, separator
    if has_magic(spec) and not path.exists():
        found = [Path(p) for p in sorted(glob(spec, recursive=True)) if os.path.isfile(p)]
        if not found:
            raise UserError(f"--source={spec}: no file has such a name")
        return found, None, separator
    if not path.is_file():
        names = ", ".join(["python", *DOWNLOADS, "fineweb10B"])
        raise UserError(f"--source={spec}: no such file or folder, nor one of {names}")
    return [path], None, separator


def walk(folder, ending="", avoid=()):
    """Every file of this ending in and below a folder, in the order of their names, without hidden
    ones and those in folders to avoid."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name not in avoid]
        paths = (Path(place, name) for name in names if name.endswith(ending))
        found += [path for path in paths if path.name[0] != "." and path.is_file()]
    return sorted(found)


def addresses(spec):
    """The URLs of a URL, of a file of URLs (@file), or of a Hub data set's training files
    (hf:owner/name, or hf:owner/name/folder)."""
    if spec[0] == "@":
        if not os.path.isfile(spec[1:]):
            raise UserError(f"--source={spec}: no such file (it has a URL a line)")
        urls = Path(spec[1:]).read_text(encoding="utf-8").split()
    elif spec.startswith("hf:"):
        owner, name, *below = spec[3:].split("/", 2) if "/" in spec else (spec[3:], "")
        try:
            answer = requests.get(f"{HUB}api/datasets/{owner}/{name}", timeout=30)
            answer.raise_for_status()
            names = sorted(f["rfilename"] for f in answer.json()["siblings"])
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--source={spec}: the Hub does not list it: {error}") from None
        names = [n for n in names if n.startswith(below[0] if below else "")]
        names = [n for n in names if n.removesuffix(".gz").endswith((*RECORDS, ".txt"))]
        names = [n for n in names if "train" in n.lower()] or names
        kinds = [
            [n for n in names if n.removesuffix(".gz").endswith(k)] for k in (*RECORDS, ".txt")
        ]
        names = next((kind for kind in kinds if kind and kind[0][-5:] != ".json"), names)
        urls = [f"{HUB}datasets/{owner}/{name}/resolve/main/{n}" for n in names]
    else:
        urls = [spec]
    if not urls:
        raise UserError(f"--source={spec}: no JSONL, parquet or text file in it")
    return urls[:shards]


def plan(run):
    """The units of all sources, in order: what one process works on alone, and what a run that was
    killed need not do again. A unit is some small files, or a range of bytes of a large one."""
    units = []
    for name, (_, spec) in mixture().items():
        paths, folder, between = files_of(spec, run)
        sizes = [path.stat().st_size for path in paths]
        share = min(64_000_000, max(UNIT, sum(sizes) // 64))
        held = share
        for path, size in zip(paths, sizes):
            cut = between if not is_record(path) else "\n" if ".jsonl" in path.suffixes else None
            # A mark that can overlap itself, as in "---" of "----", is found from the start alone.
            alone = (
                cut
                and path.suffix != ".gz"
                and not any(cut.endswith(cut[:i]) for i in range(1, len(cut)))
            )
            borders = range(0, max(size, 1), share) if alone else [0]
            for begin, end in zip(borders, [*borders[1:], size]):
                if held >= share or len(borders) > 1:
                    units.append({"source": name, "files": [], "under": folder and str(folder)})
                    held = 0
                units[-1]["files"].append([str(path), begin, end, cut, path.stat().st_mtime_ns])
                held += size
    for unit in units:  # its results have this name: other settings, or another file, another name
        aside = ("threads", "device", "dataset", "report")
        kept = {key: value for key, value in settings(globals()).items() if key not in aside}
        unit["name"] = f"{digest(json.dumps([unit, kept]).encode()):016x}"
    return units


def mixture():
    """{name: (weight or None, source)} of what was asked."""
    if sources is None:
        return {"all": (None, source)}
    mix = {}
    for name, value in sources.items():
        weight, spec = value if isinstance(value, (tuple, list)) else (value, name)
        if not isinstance(weight, (int, float)) or weight <= 0 or not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"sources: {name!r}: {value!r}: expected a name and a weight above 0")
        mix[name] = (weight, spec)
    return mix


def is_record(path):
    return path.name.removesuffix(".gz").endswith(RECORDS)


def records(unit, skipped=None, bad=None):
    """Yield the records of a unit as dicts, with their file's `path`; what is no UTF-8 in a folder
    goes to `skipped`. A line that is no record goes to `bad`, or where there is none ends all."""
    for path, begin, end, cut, _ in unit["files"]:
        shown = os.path.relpath(path, unit["under"]) if unit["under"] else path
        if not is_record(Path(path)):
            parts = read_parts(path, cut, begin, end)
            try:
                for part in parts:
                    text = part.decode()
                    text = text.strip("\n") if cut else text
                    yield {field: text, "path": shown}
            except UnicodeDecodeError as error:
                if not unit["under"]:
                    raise UserError(
                        f"{path}: not UTF-8 text ({error.reason}): convert it"
                    ) from None
                skipped.append(shown)
            continue
        lines = read_parquet(path) if path.endswith(".parquet") else read_json(path, begin, end)
        for number, line in lines:
            try:
                record = line if isinstance(line, dict) else json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError
                if bad is None:  # text: half a surrogate pair, which UTF-8 lacks, becomes U+FFFD
                    text = record[field].encode("utf-16", "surrogatepass")
                    record[field] = text.decode("utf-16", "replace")
                yield record | {"path": shown}
            except (ValueError, TypeError, KeyError, AttributeError):
                found = line if isinstance(line, bytes) else json.dumps(line, default=str).encode()
                found = found[:60].decode(errors="replace")
                if bad is None:
                    before = Path(path).read_bytes()[: begin - 1].count(b"\n") + 1 if begin else 0
                    expected = f'expected {{"{field}": "..."}}, found {found!r}'
                    raise UserError(f"{path}:{before + number}: {expected}") from None
                bad.append(f"{shown}:{number}: {found}")


def read_parts(path, between, begin=0, end=None):
    """Yield the parts, bytes, of a file (gzipped by its name) that `between` cuts: those that begin
    from `begin` to before `end`. None: all of it as one."""
    number = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            if not between:
                yield file.read()
                return
            mark, held = between.encode(), b""
            at = max(0, begin - len(mark))  # where `held` begins
            end = math.inf if end is None or path.endswith(".gz") else end
            file.seek(at)
            inside = begin == 0  # else the part before the first mark belongs to another range
            while block := file.read(1 << 20):
                *whole, held = (held + block).split(mark)
                for part in whole:
                    if at >= end:
                        return
                    number += 1
                    at += len(part) + len(mark)
                    if inside:
                        yield part
                    inside = True
            if inside and at < end:
                yield held
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged after line {number}: {error}") from None


def read_json(path, begin=0, end=None):
    """(number, line or dict) of a JSONL file, or of a JSON file that is a list of records."""
    if path.removesuffix(".gz").endswith(".json"):
        (data,) = read_parts(path, None)
        try:
            found = json.loads(data)
        except ValueError:
            found = data.splitlines()  # JSONL by another name
        yield from enumerate(found if isinstance(found, list) else [found], 1)
        return
    for number, line in enumerate(read_parts(path, "\n", begin, end), 1):
        if line.strip():
            yield number, line


def read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [c for c in (field, "url") if c in file.schema_arrow.names]
            wanted = None if task or field not in wanted else wanted
            batches = (batch.to_pylist() for batch in file.iter_batches(1000, columns=wanted))
            yield from enumerate(chain.from_iterable(batches), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no parquet: {str(error).splitlines()[0]}") from None


def documents():
    """Yield the texts of `source`, in order, as they are."""
    alone = model.setup("cpu")
    for unit in plan(alone):
        yield from (record[field] for record in records(unit, []) if record[field].strip())


def wait(run):
    """Wait here until every rank has come."""
    if run.world > 1:
        dist.barrier()


# --------------------------------------------------------------------------------------------------
# Cleaning: each step takes a text and its record, and gives the text or rejects it


class Reject(Exception):
    """A document that is left out; args[0] is the reason, without numbers, so that it counts."""


def reject_if(condition, reason):
    if condition:
        raise Reject(reason)


HTML_NAME = re.compile(r"\.x?html?$", re.I)
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
NESTING = SKIPPED | BLOCKS - {"p", "hr", "dd", "dt"} | {"li", "a"}  # what has an end tag to match
NAVIGATION = re.compile(r"\brole\s*=\s*[\"']?navigation\b", re.I)
# What stands for tags in the text at first: 1 line break, 2 block, 3 item, 4 row, 5 cell, 6 end.
SIGNS = {slash + tag: "\2" for tag in BLOCKS for slash in ("", "/")}
SIGNS |= {"br": "\1", "li": "\3", "tr": "\4", "table": "\2\4", "td": "\5", "th": "\5"}
SIGNS |= {"/li": "\6", "/tr": "\6", "/ul": "\6\2", "/ol": "\6\2", "/table": "\6\2"}
GAP = re.compile("(?<!\\s)\\s*[\1-\7](?:[\\s\1-\7]*[\1-\7])? ?\x1d*")
BLANKS = str.maketrans(" \n\t", "\x1c\x1d\x1e")  # the blanks of <pre>, until all others are done


def html_tags(text):
    """(name, attributes, the text up to the next) of each tag; an end tag's name is "/p"."""
    name, attributes, at = "", "", 0
    while tag := TAG.search(text, at):
        yield name, attributes, text[at : tag.start()]
        name, attributes, at = (tag[1] or "").lower(), tag[2] or "", tag.end()
        if name in ("script", "style") and not attributes.endswith("/"):
            at = re.compile(rf"</{name}|\Z", re.I).search(text, at).start()
    yield name, attributes, text[at:]


def gap(marks):
    """The newlines, and the "- " or " | ", that marks stand for; none is before a first cell."""
    lines, lead = 0, ""
    for mark in marks[0]:
        if mark in "\3\4":
            lines, lead = max(lines, 1), "- " if mark == "\3" else mark
        elif mark == "\5":
            lines, lead = lines if lead else 0, lead + " | "
        elif mark == "\6":
            lines, lead = max(lines, 1), ""
        elif mark in "\1\2\7" and not lead:  # in an item or a cell that has only just begun: none
            lines = min(lines + 1, 2) if mark == "\1" else max(lines, 2 if mark == "\2" else 1)
    return "\n" * lines + lead.replace("\4 | ", "").replace("\4", "")


def html_to_text(text):
    """The text of an HTML page without navigation, forms and scripts: paragraphs with a blank line
    between them, list items as "- ", table cells with " | ", <pre> as it is. Never raises."""
    out, opened, count, hidden = ["\2"], [], Counter(), 0
    for tag, attributes, data in html_tags(re.sub("[\0-\x08\x0b\x0e-\x1f]", "", text)):
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
        mark = SIGNS.get(tag, "")
        out.append(mark.replace("\2", "\7") if count["li"] else mark)  # 7: a block in an item
        data = unescape(re.sub(r"&#0*[1-9]\d{7,};?", "\ufffd", data))
        if not (count["a"] and data in "¶§#"):  # a heading's link to itself
            out.append(data.translate(BLANKS) if count["pre"] else data)
    text = re.sub(r"[^\S\x1c-\x1e]+", " ", "".join(out))
    text = GAP.sub(gap, text).strip("\n\x1d").rstrip()
    return text.translate({kept: blank for blank, kept in BLANKS.items()})


def clean_html(text, doc):
    """HTML to text, where the document is HTML."""
    names = (doc.get("path") or "", (doc.get("url") or "").partition("?")[0])
    is_html = any(map(HTML_NAME.search, names)) if html_documents is None else html_documents
    return html_to_text(text) if is_html else text


NEWLINE = re.compile(r"\r\n|[\r\v\f\x85\u2028\u2029]")
# Control characters, soft hyphens, byte order marks, zero-width blanks, marks of direction. Not the
# zero-width (non-)joiners of letters, by which Persian, Indic scripts and emoji mean something.
INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufffe\uffff]"
)


def clean_unicode(text, doc):
    """NFC, \\n for every kind of line end, no invisible characters, U+FFFD for half a surrogate."""
    text = INVISIBLE.sub("", NEWLINE.sub("\n", text))
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text)


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


def language_scorer_name():
    """Which scorer guess_language uses here; for the records, as the verdicts depend on it."""
    return "py3langid" if langid() else "built-in"


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
    url = url.casefold().strip().rstrip("/")
    return re.sub(r"^(?:(?:\w+:)?//)?(?:[^/@?#]*@)?(?:www\.)?", "", url)


@lru_cache(1)
def small_model():
    if not perplexity_model:
        raise UserError("the step perplexity needs --perplexity_model=FOLDER, a small model")
    torch.set_num_threads(1)  # the other cores have documents of their own
    return model.load(perplexity_model, device)


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
    lines = Path(path).read_text(encoding="utf-8-sig").casefold().splitlines()
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
    """E-mail addresses, public IP addresses and telephone numbers become <email>, <ip> and <phone>;
    their counts go to doc["pii"]. Four numbers under 32 are a version rather than an address."""

    def replace_ip(match):
        try:
            ip = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        public = ip.is_global and not ip.is_multicast and max(ip.packed) > 31
        version = VERSION.search(text, max(0, match.start() - 24), match.start())
        return "<ip>" if public and not version else match[0]

    before = text.count("<ip>")
    text, emails = EMAIL.subn("<email>", text) if "@" in text else (text, 0)
    text = IP.sub(replace_ip, text)
    text, phones = PHONE.subn("<phone>", text)
    doc["pii"] = {"email": emails, "ip": text.count("<ip>") - before, "phone": phones}
    return text


STEPS = (clean_html, clean_unicode, clean_whitespace, check_length, check_language, check_blocklist)
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
        data = b"".join(read_parts(path, None)).decode(errors="replace")
        texts = [data]
        if is_record(Path(path)):
            rows = read_json(path)
            rows = [row if isinstance(row, dict) else json.loads(row) for _, row in rows]
            texts = ["\n".join(strings(row)) for row in rows]
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

LAST = ("url", "exact", "near")  # the steps that compare all documents


def steps_of(names):
    return [name for name in steps.split(",") if name in names]


class Tally:
    """What a step has taken and left: documents, bytes, seconds; and its reasons, with examples."""

    def __init__(self, **saved):
        start = dict(documents=[0, 0], bytes=[0, 0], seconds=0.0, reasons={})
        self.__dict__ = start | saved

    def count(self, before, after=None, reason=None):
        """A document: its text before the step, and after it or the reason why it is left out."""
        size = len(before.encode())
        left = 0 if reason else size if after is before else len(after.encode())
        self.documents = [self.documents[0] + 1, self.documents[1] + (reason is None)]
        self.bytes = [self.bytes[0] + size, self.bytes[1] + left]
        if reason:
            n, examples = self.reasons.get(reason, (0, []))
            example = [" ".join(before[:160].split())] if n < 3 else []
            self.reasons[reason] = [n + 1, examples + example]

    def add(self, other):
        """Add the tally of what came later."""
        self.documents = [a + b for a, b in zip(self.documents, other.documents)]
        self.bytes = [a + b for a, b in zip(self.bytes, other.bytes)]
        self.seconds += other.seconds
        for reason, (n, examples) in other.reasons.items():
            have, mine = self.reasons.get(reason, (0, []))
            self.reasons[reason] = [have + n, (mine + examples)[:3]]

    def line(self, name):
        (docs, left), (size, rest) = self.documents, self.bytes
        speed = f", {size / self.seconds / 1e6:,.0f} MB/s a process" if self.seconds else ""
        size, rest = f"{size / 1e6:,.1f}", f"{rest / 1e6:,.1f}"
        return f"{name}: {left:,} of {docs:,} documents, {rest} of {size} MB{speed}"


def cleaned(unit, tallies, skipped):
    """Yield (number, record, text) of the documents of a unit that the local steps leave."""
    todo = [(tallies[name], STEPS[name]) for name in steps_of(STEPS)]
    for record in records(unit, skipped):
        text = record[field]
        if not text.strip():
            continue
        if tallies["read"].documents[0] == max_documents:
            return
        number = tallies["read"].documents[0]
        tallies["read"].count(text, text)
        for tally, step in todo:
            before, begun, reason = text, time.perf_counter(), None
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
            yield number, record, text


def decontaminated(group, hashes, owners, tally):
    """Which of a group of documents share no GRAM words in a row with the evaluation files."""
    grams, whose = shingles(hashes, owners, GRAM)
    found = set(whose[np.isin(grams, evaluation_grams(), kind="sort")].tolist())
    for i, (*_, text) in enumerate(group):
        tally.count(text, text, f"{GRAM} words in a row of an evaluation" if i in found else None)
    return [i not in found for i in range(len(group))]


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


def digest(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def plain_url(url):
    """A URL without what does not say which page it is: scheme, www, fragment, a last slash."""
    return re.sub(r"^https?://(www\.)?|\butm_\w+=[^&#]*&?|[/?]?(#.*)?$", "", url.strip().lower())


def clean(work, unit):
    """Read a unit, run the local steps over its documents and keep what they leave in work/<name>:
    .txt (the texts), .npz (sizes and hashes), .sig (MinHash), and last .json, which says that the
    others are whole. Returns the bytes read."""
    place = f"{work / unit['name']}"
    if done := model.read_json(f"{place}.json", {}):
        return done["tallies"]["read"]["bytes"][0]
    tallies = defaultdict(Tally)
    skipped, paths, special = [], [], 0
    columns = {k: [] for k in ("size", "number", "hash", "exact", "url")}
    with open(f"{place}.txt", "wb") as texts, open(f"{place}.sig", "wb") as signatures:
        for group in in_rounds(cleaned(unit, tallies, skipped), BATCH):
            begun = time.perf_counter()
            hashes, owners = word_hashes([text for *_, text in group])
            stay = [True] * len(group)
            if decontaminate:
                stay = decontaminated(group, hashes, owners, tallies["decontaminate"])
                tallies["decontaminate"].seconds += time.perf_counter() - begun
            if "near" in steps:
                signatures.write(minhash(hashes, owners, len(group))[stay])
                tallies["near"].seconds += time.perf_counter() - begun
            for number, record, text in (document for document, ok in zip(group, stay) if ok):
                data, url = text.encode(), record.get("url")
                url = url if isinstance(url, str) else ""
                texts.write(data)
                plain = digest(" ".join(text.lower().split()).encode())
                row = (len(data), number, digest(data), plain, digest(plain_url(url).encode()))
                for column, value in zip(columns.values(), row):
                    column.append(value)
                paths.append(url or record["path"])
                special += any(name in text for name in special_tokens)
    np.savez(f"{place}.npz", **{k: np.array(v, np.uint64) for k, v in columns.items()})
    result = {"kept": len(paths), "skipped": skipped, "paths": paths, "special": special}
    result["tallies"] = {name: tally.__dict__ for name, tally in tallies.items()}
    model.write_json(f"{place}.json", result)
    return tallies["read"].bytes[0]


def texts_of(work, name, numbers):
    """Yield the texts with these numbers, in rising order, of what `clean` left of a unit."""
    ends = np.cumsum(np.load(work / f"{name}.npz")["size"].astype(np.int64))
    with open(work / f"{name}.txt", "rb") as file:
        for i in numbers:
            begin = int(ends[i - 1]) if i else 0
            file.seek(begin)
            yield file.read(int(ends[i]) - begin).decode()


def signatures_of(work, names, starts, numbers):
    """The MinHash rows of these documents, sorted numbers among all: (len(numbers), …) uint16."""
    rows = np.empty((len(numbers), PERMUTATIONS), np.uint16)
    borders = np.searchsorted(numbers, starts)
    for name, start, a, b in zip(names, starts, borders, borders[1:]):
        if b > a:
            table = np.memmap(work / f"{name}.sig", np.uint16, "r").reshape(-1, PERMUTATIONS)
            rows[a:b] = table[numbers[a:b] - start]
    return rows


def find_near(work, key, names, band):
    """The pairs of near-duplicates that meet in a band: its first document with this key and the
    others, if their signatures agree in near_threshold of all places; in work/<key>.near<band>."""
    place = work / f"{key}.near{band}.npy"
    if place.exists():
        return 0
    starts, stays = np.load(work / f"{key}.starts.npy"), np.load(work / f"{key}.left.npy")
    rows, keys = band_shape(near_threshold)[1], []
    for name, start, end in zip(names, starts, starts[1:]):
        part = np.zeros(end - start, np.uint64)
        if end > start:
            table = np.memmap(work / f"{name}.sig", np.uint16, "r").reshape(-1, PERMUTATIONS)
            for k in range(band * rows, band * rows + rows):
                part = part * np.uint64(STEP) + table[:, k]
        keys.append(part)
    keys = np.concatenate(keys)
    live = np.flatnonzero(stays & (keys > 0))  # 0: too short for a shingle
    order = live[np.argsort(keys[live], kind="stable")]
    new = np.diff(keys[order], prepend=np.uint64(0)) != 0
    heads = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    pairs, found = np.stack([heads, order], 1)[~new], []
    for some in np.array_split(pairs, len(pairs) // 100_000 + 1):
        numbers, at = np.unique(some, return_inverse=True)
        table, at = signatures_of(work, names, starts, numbers), at.reshape(-1, 2)
        alike = (table[at[:, 0]] == table[at[:, 1]]).mean(1)
        found.append(some[alike >= near_threshold])
    with model.whole_file(place) as file:
        np.save(file, np.concatenate(found))
    return 0


EMPTY, ALL = digest(b""), 2**62


def columns_of(work, names, key):
    """A column of all units' documents, in order: (N,) uint64."""
    return np.concatenate([np.load(work / f"{name}.npz")[key] for name in names])


def tally_of(work, names, starts, sizes, before, after, reason):
    """The Tally of a step that left out, of the documents `before` (N,) bool, all but `after`."""
    numbers = np.flatnonzero(before & ~after)
    examples = []
    for i in numbers[:3]:
        unit = np.searchsorted(starts, i, side="right") - 1
        (text,) = texts_of(work, names[unit], [i - starts[unit]])
        examples.append(" ".join(text[:160].split()))
    count = lambda mask: (int(mask.sum()), int(sizes[mask].sum()))
    (docs, size), (left, rest) = count(before), count(after)
    reasons = {reason: [len(numbers), examples]} if len(numbers) else {}
    return Tally(documents=[docs, left], bytes=[size, rest], reasons=reasons)


def compare(work, key, names):
    """Drop documents whose URL or text came before, in any unit: {step: Tally} of all steps so far,
    a line each. What is left is in work/<key>.left.npy, the units' borders in <key>.starts.npy."""
    done = [model.read_json(work / f"{name}.json") for name in names]
    tallies = defaultdict(Tally)
    for result in done:
        for name, saved in result["tallies"].items():
            tallies[name].add(Tally(**saved))
    starts = np.cumsum([0, *(result["kept"] for result in done)])
    sizes, left = columns_of(work, names, "size"), np.ones(starts[-1], bool)
    if max_documents:
        read = [
            result["tallies"].get("read", {"documents": [0]})["documents"][0] for result in done
        ]
        before = np.repeat(np.cumsum([0, *read])[:-1], np.diff(starts))
        left = before + columns_of(work, names, "number").astype(np.int64) < max_documents
    for step in steps_of(("url", "exact")):
        values, begun = columns_of(work, names, step), time.perf_counter()
        live = np.flatnonzero(left & (values != EMPTY))
        first = np.unique(values[live], return_index=True)[1]
        after = left.copy()
        after[np.delete(live, first)] = False
        why = {"url": "the URL came before", "exact": "the text came before"}[step]
        tallies[step] = tally_of(work, names, starts, sizes, left, after, why)
        tallies[step].seconds, left = time.perf_counter() - begun, after
    np.save(work / f"{key}.starts.npy", starts)
    np.save(work / f"{key}.left.npy", left)
    return tallies


def settle(work, key, units, tallies):
    """Drop near-duplicates and divide what is left: work/<key>.cuts.npy says for each document how
    many of its characters are for training (ALL; 0: none; -1: it is left out). A document goes to
    validation by its hash, so that it stays where it is when others are added; of a source of fewer
    than 20 the last val_fraction of all characters does. Returns the sizes of near-duplicate
    clusters, with the first document of each, the largest first."""
    names = [unit["name"] for unit in units]
    starts, left = np.load(work / f"{key}.starts.npy"), np.load(work / f"{key}.left.npy")
    sizes, clusters = columns_of(work, names, "size"), []
    if steps_of(["near"]):
        begun = time.perf_counter()
        edges = [np.load(path) for path in sorted(work.glob(f"{key}.near*.npy"))]
        label = joined(len(left), np.concatenate(edges))
        after = left & (label == np.arange(len(left)))
        tally = tally_of(work, names, starts, sizes, left, after, "a near-duplicate came before")
        tally.seconds = tallies["near"].seconds + time.perf_counter() - begun
        members = np.bincount(label[left], minlength=len(left))
        clusters = [(int(members[i]), int(i)) for i in np.flatnonzero(members > 1)]
        tallies["near"], left = tally, after
    hashes = columns_of(work, names, "hash")
    cuts = np.where(hashes < np.uint64(val_fraction * 2**64), 0, ALL)
    cuts[~left] = -1
    for name in mixture():
        mine = [i for i, unit in enumerate(units) if unit["source"] == name]
        some = {i: starts[i] + np.flatnonzero(left[starts[i] : starts[i + 1]]) for i in mine}
        if sum(map(len, some.values())) < 20:
            texts = {}
            for i, numbers in some.items():
                texts |= zip(numbers, texts_of(work, names[i], numbers - starts[i]))
            total = sum(map(len, texts.values()))
            rest = total - round(total * val_fraction)  # characters that are for training
            for number, text in texts.items():
                cuts[number] = max(0, min(len(text), rest))
                rest -= len(text)
    np.save(work / f"{key}.cuts.npy", cuts)
    return sorted(clusters, reverse=True)


def chosen(work, key, names, i):
    """Yield (split, number, hash, text) of the documents of unit i that stay, in order."""
    begin, end = np.load(work / f"{key}.starts.npy")[i : i + 2]
    cuts = np.load(work / f"{key}.cuts.npy", mmap_mode="r")[begin:end]
    numbers, hashes = np.flatnonzero(cuts >= 0), np.load(work / f"{names[i]}.npz")["hash"]
    for number, text in zip(numbers, texts_of(work, names[i], numbers)):
        parts = {"train": text[: cuts[number]], "val": text[cuts[number] :]}
        yield from ((split, number, hashes[number], part) for split, part in parts.items() if part)


# --------------------------------------------------------------------------------------------------
# Tokenizers

SPLIT = (  # Qwen2's, which every reader of tokenizer.json and of GGUF knows
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII = SPLIT.replace(r"?\p{L}", "?[A-Za-z]").replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", r"\d")
ASCII = re.compile(ASCII, re.ASCII)  # the same on ASCII text, for Python's own re: twice as fast
WORDS = r"(?:(?!\p{Han})[\p{L}\p{M}\p{N}])+|\S"  # BERT's: punctuation and Chinese stand alone
# Of the kinds that are trained here: what splits text into the pieces that are counted.
PATTERNS = dict(bpe=SPLIT, unigram=SPLIT, word=SPLIT, wordpiece=WORDS, char=model.CHARACTERS)
NORMALIZERS = {"nfc": "NFC", "nfkc": "NFKC", "lower": "Lowercase"}  # in the order they are applied
UNKNOWN = "<|unk|>"  # of the kinds that have words, which are all but those of bytes
BYTES = [bytes([b]) for b in range(256)]
LETTERS = model.byte_letters()
MAX_TOKEN = 16  # bytes of a Unigram token, as in SentencePiece
MAX_PIECES = 1_000_000  # bytes of different pieces it is trained on, the commonest: 1.3 GB used


def count_pieces(parts):
    """How often each piece occurs in (split pattern, text) tuples."""
    fast = lambda pattern, text: pattern == SPLIT and text.isascii()
    finds = (ASCII.findall(t) if fast(p, t) else regex.findall(p, t) for p, t in parts)
    return Counter(chain.from_iterable(finds))


def train_bpe(pieces, n_merges, show=lambda line: None, alphabet=BYTES):
    """Byte-pair encoding (Sennrich et al. 2016) over {piece: count}, pieces being bytes, or else
    sequences of indexes into `alphabet`, which holds sequences of length 1.

    Returns the merges in order, as pairs of bytes: each time the commonest adjacent pair, of equals
    that with the lowest ids (a byte is its own id), until no pair occurs twice. A pair whose bytes
    are a token already is passed over. Only the neighbours of the places merged are counted anew.
    """
    tokens, known, merges = list(alphabet), set(), []
    # All pieces in a row, -1 between them: a token's id stands at its first and at its last byte.
    symbols, weights, places = [-1], [0], defaultdict(list)
    for piece, n in pieces.items():
        symbols += [*piece, -1]
        weights += [n] * (len(piece) + 1)
    for i, pair in enumerate(zip(symbols, symbols[1:])):
        if -1 not in pair:
            places[pair].append(i)
    total = lambda at: sum(map(weights.__getitem__, at))
    pairs = defaultdict(int, {pair: total(at) for pair, at in places.items()})
    heap = sorted((-n, pair) for pair, n in pairs.items() if n > 1)  # which is a heap
    while len(merges) < n_merges and heap:
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n:  # an old count: counts only fall after a pair was pushed
            if pairs[pair] > 1:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        a, b = pair
        token, new = tokens[a] + tokens[b], len(tokens)
        if token in known:
            continue
        merges.append((tokens[a], tokens[b]))
        tokens.append(token)
        known.add(token)
        to_b, to_end = len(tokens[a]), len(token)
        lefts, rights = defaultdict(list), defaultdict(list)
        for i in places.pop(pair):
            if symbols[i] == a and symbols[i + to_b] == b:  # else another merge came first
                symbols[i + to_b] = -1  # no token begins here any more
                symbols[i] = symbols[i + to_end - 1] = new
                lefts[symbols[i - 1]].append(i)
                rights[symbols[i + to_end]].append(i)
        made = [((b, x), (new, x), at) for x, at in rights.items() if x >= 0]
        for x, at in lefts.items():  # after the rights, since x is the new token in "abab"
            if x >= 0:
                size = len(tokens[x])
                made.append(((x, a), (x, new), [i - size for i in at]))
        for old, pair, at in made:
            n = total(at)
            pairs[old] -= n
            if n > 1:
                pairs[pair], places[pair] = n, at
                heapq.heappush(heap, (-n, pair))
        pairs.pop((a, b))
        show(f"tokenizer: merge {len(merges):,} of {n_merges:,}")
    return merges


def recover_merges(ranks):
    """The merges of a tiktoken encoding {bytes: rank}: the pair that each token was made of."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            scores = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            best = min(range(len(scores)), key=scores.__getitem__)
            if scores[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def train_wordpiece(counts, n_tokens, show):
    """WordPiece's tokens, ## before those within a word, from {word: count}: as in Hugging Face the
    characters and what byte-pair encoding makes of them. Of the characters the commonest are kept,
    a quarter of n_tokens at most, and words with another teach nothing: they become unknown."""
    often = Counter()
    for word, n in counts.items():
        for c in word:
            often[c] += n
    letters = sorted(often, key=lambda c: (-often[c], c))[: max(1, n_tokens // 4)]
    words = {w: n for w, n in counts.items() if set(w).issubset(letters)}
    symbols = sorted(letters) + sorted({"##" + c for word in words for c in word[1:]})
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    pieces = {(ids[w[0]], *(ids["##" + c] for c in w[1:])): n for w, n in words.items()}
    singles = [(i,) for i in range(len(symbols))]
    merges = train_bpe(pieces, n_tokens - len(symbols), show, singles)
    spell = lambda token: symbols[token[0]] + "".join(symbols[i][-1] for i in token[1:])
    return symbols + [spell(a + b) for a, b in merges]


def lattice(pieces, ids):
    """Every way to make up pieces, which are bytes, of tokens {bytes: id}: (edges, ends).

    A node stands before each byte of a piece and behind its last, whose node `ends` names. edges
    (4, n) int64: first node, last node, token, and the byte of its piece at which it ends, by which
    they are in order: so one operation goes a byte forward in all pieces at once.
    """

    def found():
        at = 0
        for piece in pieces:
            for end in range(1, len(piece) + 1):
                for start in range(max(0, end - MAX_TOKEN), end):
                    if (id := ids.get(piece[start:end])) is not None:
                        yield at + start, at + end, id, end
            at += len(piece) + 1

    edges = np.fromiter(found(), np.dtype((np.int64, 4))).T
    edges = edges[:, np.argsort(edges[3], kind="stable")]
    return edges, np.cumsum([len(piece) + 1 for piece in pieces]) - 1


def forward(edges, ends, scores, add=np.logaddexp):
    """The log-probability of reaching each node, by all paths or (add: np.maximum) by the best, and
    where in edges the bytes begin."""
    reach, cuts = np.zeros(ends[-1] + 1), np.flatnonzero(np.diff(edges[3], prepend=0, append=-1))
    for a, b in zip(cuts, cuts[1:]):
        first, last, token, _ = edges[:, a:b]
        new = np.flatnonzero(np.diff(last, prepend=-1))
        reach[last[new]] = add.reduceat(reach[first] + scores[token], new)
    return reach, cuts


def expect(edges, ends, weights, scores):
    """EM's first half over pieces that occur `weights` times each: (how often each token is to be
    expected, log-likelihood of them all)."""
    reach, cuts = forward(edges, ends, scores)
    first, last, token, _ = edges
    share = np.exp(reach[first] + scores[token] - reach[last])  # of the paths to its last node
    paths = np.zeros(len(reach))
    paths[ends] = weights
    for b, a in zip(cuts[:0:-1], cuts[-2::-1]):
        share[a:b] *= paths[last[a:b]]
        paths[first[a:b]] += share[a:b]  # edges to one node begin at different ones: none is twice
    return np.bincount(token, share, len(scores)), weights @ reach[ends]


def likeliest(expected):
    """EM's second half: the tokens' log-probabilities, where each is expected so often."""
    expected = np.maximum(expected, 0.01)  # a byte that never occurs is a token for all that
    return np.log(expected / expected.sum())


def train_unigram(counts, n_tokens, show=lambda line: None):
    """Unigram (Kudo 2018, section 3.2) over {piece: count}, pieces being bytes: the tokens with
    their log-probabilities, first all bytes, then the likeliest.

    It begins with the substrings that occur twice, save one that is only ever the beginning of the
    same longer one. A round is two steps of EM, and the quarter of the tokens goes that costs the
    least: how often each is expected, times what the best other way to spell it is less likely.
    """
    pieces, often, size = Counter(), Counter(), 0
    for piece, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        pieces[piece[:256]] += n  # the head of a very long one: a step a byte is what it would cost
        if (size := size + len(piece[:256])) > MAX_PIECES:
            break
    for piece, n in pieces.items():
        for start in range(len(piece)):
            for end in range(start + 1, min(start + MAX_TOKEN, len(piece)) + 1):
                often[piece[start:end]] += n
    begin = {token[:-1] for token, n in often.items() if n == often[token[:-1]]}
    tokens = (t for t, n in often.items() if n > 1 and len(t) > 1 and t not in begin)
    tokens = BYTES + sorted(tokens, key=lambda t: (-often[t], t))
    edges, ends = lattice(pieces, {token: i for i, token in enumerate(tokens)})
    weights, expected = np.array([*pieces.values()], float), np.array([often[t] for t in tokens])
    while True:
        show(f"tokenizer: {len(tokens):,} tokens, to become {n_tokens:,}")
        for _ in range(2):
            scores = likeliest(expected)
            expected, _ = expect(edges, ends, weights, scores)
        if len(tokens) <= n_tokens:
            break
        inner, bounds = lattice(tokens, {token: i for i, token in enumerate(tokens)})
        inner = inner[:, inner[2] != np.searchsorted(bounds, inner[1])]  # not a token by itself
        loss = expected * (scores - forward(inner, bounds, scores, np.maximum)[0][bounds])
        loss[:256] = np.inf
        kept = np.sort(np.argsort(-loss, kind="stable")[: max(n_tokens, len(tokens) * 3 // 4)])
        tokens, expected, new = [tokens[i] for i in kept], expected[kept], np.full(len(tokens), -1)
        new[kept] = range(len(kept))
        edges[2] = new[edges[2]]
        edges = edges[:, edges[2] >= 0]
    # Six decimals, since a reader may round the last bits of a longer number in its own way.
    pairs = [(t, round(score, 6)) for t, score in zip(tokens, likeliest(expected).tolist())]
    return pairs[:256] + sorted(pairs[256:], key=lambda pair: (-pair[1], pair[0]))


def tokenizer_files(kind, vocab, special, split, **body):
    """tokenizer.json and tokenizer_config.json, as a Tokenizer: vocab {token, spelled as there: id,
    or Unigram's score}, special {name: id}; body: more of the model's fields."""
    if both := vocab.keys() & special.keys():
        why = f"{min(both)!r} is an ordinary token too: choose a name like <|this|>"
        raise UserError(f"special_tokens: {why}")
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    pre = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    decoder, unknown = {"type": "Fuse"}, UNKNOWN if UNKNOWN in special else None
    if kind in ("BPE", "Unigram"):
        pre, decoder = {"type": "Sequence", "pretokenizers": [pre, level]}, level
    if kind == "WordPiece":  # what is no piece, which is white space, is lost
        pre |= {"behavior": "Removed", "invert": True}
        decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    if kind == "Unigram":
        body = {"type": kind, "unk_id": None, "vocab": [*vocab.items()]}
    else:
        # Special tokens that the vocabulary lacks get other ids where it has gaps (cl100k_base).
        body = {"type": kind, "unk_token": unknown} | body | {"vocab": vocab | special}
    steps = [{"type": name} for name in normalizers()]
    normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [{"id": id, "content": token} | flags for token, id in special.items()]
    spec = dict(version="1.0", truncation=None, padding=None, added_tokens=added)
    spec |= dict(normalizer=normalizer, pre_tokenizer=pre, post_processor=None, decoder=decoder)
    start, pad = special_tokens[:2]
    config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    config |= dict(bos_token=start, eos_token=start, pad_token=pad, unk_token=unknown)
    if {"<|im_start|>", "<|im_end|>"} <= special.keys():
        config |= {"chat_template": model.CHATML}
    return model.Tokenizer(spec | {"model": body}, config)


def special_ids(at, *more):
    """Ids from `at` up: of `more`, then of the special tokens (the first starts a document, the
    second pads, and only with <|im_start|> and <|im_end|> among them is there a chat template)."""
    return {t: at + i for i, t in enumerate(dict.fromkeys([*more, *special_tokens]))}


def spell(token):
    """A token of bytes in GPT-2's letters, as tokenizer.json has it."""
    return "".join(map(LETTERS.__getitem__, token))


def bpe_files(ranks, special, merges, split, **body):
    """The files of a byte-level BPE tokenizer: ranks {bytes: id}, merges as pairs of bytes."""
    body |= {"merges": [[spell(a), spell(b)] for a, b in merges]}
    return tokenizer_files("BPE", {spell(t): i for t, i in ranks.items()}, special, split, **body)


def bpe_tokenizer(merges):
    """A byte-level BPE tokenizer: bytes, merges, special tokens, with ids in this order."""
    ranks = {t: i for i, t in enumerate(BYTES + [a + b for a, b in merges])}
    return bpe_files(ranks, special_ids(len(ranks)), merges, SPLIT)


def word_tokenizer(kind, tokens, split, **body):
    """A tokenizer of tokens that are text, with the unknown token for text that has none."""
    vocab, special = {t: i for i, t in enumerate(tokens)}, special_ids(len(tokens), UNKNOWN)
    return tokenizer_files(kind, vocab, special, split, **body)


def char_tokenizer(characters):
    """One token a character; a character that training text lacks becomes the unknown token."""
    return word_tokenizer("WordLevel", sorted(characters), model.CHARACTERS)


def train_tokenizer(kind, counts, size, show=lambda line: None):
    """A tokenizer of a kind in PATTERNS with `size` tokens, or fewer where the text has no more,
    from {piece of the kind's pattern: count}. Only `char` takes whatever there is."""
    room = size - len(special_tokens)
    pieces = {piece.encode(): n for piece, n in counts.items()}
    gc.disable()  # it would walk a million lists again and again, and none is in a cycle
    try:
        if kind == "char":
            return char_tokenizer(counts)
        if kind == "bpe":
            return bpe_tokenizer(train_bpe(pieces, room - 256, show))
        if kind == "unigram":
            scores = {spell(token): score for token, score in train_unigram(pieces, room, show)}
            return tokenizer_files("Unigram", scores, special_ids(len(scores)), SPLIT)
        if kind == "word":
            words = sorted(counts, key=lambda word: (-counts[word], word))[: room - 1]
            return word_tokenizer("WordLevel", words, SPLIT)
        form = dict(continuing_subword_prefix="##", max_input_chars_per_word=100)
        return word_tokenizer("WordPiece", train_wordpiece(counts, room - 1, show), WORDS, **form)
    finally:
        gc.enable()


def normalizers():
    """The names in tokenizer.json of what `normalize` asks for, in the order of their work."""
    asked = [name.strip() for name in normalize.split(",") if name.strip()]
    for name in asked:
        if name not in NORMALIZERS:
            raise UserError(f"normalize={normalize}: expected some of {', '.join(NORMALIZERS)}")
    return [NORMALIZERS[name] for name in NORMALIZERS if name in asked]


def check_tokenizer():
    """Refuse settings that no tokenizer can be made with."""
    names = {t for t in special_tokens if isinstance(t, str) and t}
    if not 2 <= len(names) == len(special_tokens):
        raise UserError(f"special_tokens={special_tokens}: expected two or more different names")
    least = {"bpe": 256, "unigram": 256, "word": 2, "wordpiece": 3}.get(tokenizer, -math.inf)
    if vocab_size < (least := least + len(special_tokens)):
        raise UserError(f"vocab_size={vocab_size}: expected {least} or more")
    if normalizers() and (source == "fineweb10B" or Path(tokenizer).is_dir()):
        which = "of fineweb10B" if source == "fineweb10B" else f"in {tokenizer}"
        raise UserError(f"normalize={normalize}: the tokenizer {which} is taken as it is")


def tiktoken_tokenizer(name):
    """A named tiktoken encoding, with the special tokens that it lacks added behind."""
    if name not in tiktoken.list_encoding_names():
        names = ", ".join([*sorted([*PATTERNS, "byte"]), *tiktoken.list_encoding_names()])
        raise UserError(f"--tokenizer={name}: expected {names}, or a folder with tokenizer.json")
    try:
        encoding = tiktoken.get_encoding(name)
    except requests.RequestException as error:
        raise UserError(f"--tokenizer={name}: its table could not be downloaded: {error}") from None
    ranks, special = encoding._mergeable_ranks, dict(encoding._special_tokens)
    for token in special_tokens:
        special.setdefault(token, max([*ranks.values(), *special.values()]) + 1)
    # Oniguruma, which reads tokenizer.json, takes {1,3}+ for a repeated repeat.
    split = regex.sub(r"(\{\d+,\d*\})\+", r"\1", encoding._pat_str)
    return bpe_files(ranks, special, recover_merges(ranks), split, ignore_merges=True)


def finished_tokenizer():
    """The tokenizer that `tokenizer` names, or None where it is to be trained on the text."""
    if tokenizer in PATTERNS:
        return None
    if tokenizer == "byte":
        return bpe_tokenizer([])
    if not Path(tokenizer).is_dir():
        return tiktoken_tokenizer(tokenizer)
    tok = model.Tokenizer.from_folder(tokenizer)
    if tok.eot_id is None:
        raise UserError(f"{tokenizer}: tokenizer_config.json names no bos_token and no eos_token")
    return tok


def show_tokens(tok, text):
    """Print a text's tokens, on alternating colours or with bars between them, their ids, and
    what the vocabulary is made of. What is no text or not to be seen is escaped."""
    names = {i: name.encode() for name, i in tok.special.items()}
    colour = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
    paint = [f"\x1b[30;48;5;{n}m%s\x1b[0m" for n in (152, 223, 182)] if colour else ["%s"] * 3

    def visible(id):
        token = (names.get(id) or tok.token_bytes(id)).decode(errors="backslashreplace")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)

    ids, text = tok.encode(text), text.encode(errors="replace")
    print(("" if colour else "|").join(paint[i % 3] % visible(id) for i, id in enumerate(ids)))
    print(" ".join(paint[i % 3] % id for i, id in enumerate(ids)))
    print(f"tokens: {len(ids):,}\nbytes per token: {len(text) / max(1, len(ids)):.2f}")
    sizes = {i: len(tok.token_bytes(i)) for i in range(tok.n_vocab) if tok.token_bytes(i)}
    counts = Counter(sizes.values())
    print(f"vocabulary: {tok.n_vocab:,}, of them {len(names)} special, {counts[1]:,} of one byte")
    longest = sorted(sizes, key=sizes.get, reverse=True)[:10]
    print("longest:", "|".join(map(visible, longest)))
    for size, n in sorted(counts.items()):
        print(f"{size:4} bytes {n:7,} {'#' * round(50 * n / max(counts.values()))}")


# --------------------------------------------------------------------------------------------------
# Shards


CUT = regex.compile(r"(?<=\S\n)(?=\p{L})")  # no split pattern has a piece that spans this


def pieces_of(text):
    """Cut a long text into parts that are tokenized alone as they are in the whole."""
    at = 0
    while len(text) - at > BATCH and (cut := CUT.search(text, at + BATCH)):
        yield text[at : cut.start()]
        at = cut.start()
    yield text[at:]


def count(work, key, names, fraction, i):
    """{piece: count} of a sample, by hash, of unit i's training text."""
    drawn = (
        text
        for split, _, hashed, text in chosen(work, key, names, i)
        if split == "train" and int(mixed(hashed[None])[0]) < fraction * 2**64
    )
    drawn = (model.normalize(text, normalizers()) for text in drawn)
    return count_pieces((PATTERNS[tokenizer], part) for text in drawn for part in pieces_of(text))


@lru_cache(1)
def finished(folder):
    return model.Tokenizer.from_folder(folder)


def encode(work, key, names, i):
    """Encode what stays of unit i: work/<key>.<i>.train and .val hold the tokens, .npz of every
    document its tokens, hash and bytes. Returns bytes."""
    place, tok = f"{work / key}.{i}", finished(work / f"{key}.tokenizer")
    if not os.path.exists(f"{place}.npz"):
        kind = "<u4" if tok.n_vocab > 65536 else "<u2"
        rows = {"train": [], "val": []}
        with open(f"{place}.train", "wb") as train, open(f"{place}.val", "wb") as val:
            parts = (
                (split, hashed, j == 0, part)
                for split, _, hashed, text in chosen(work, key, names, i)
                for j, part in enumerate(pieces_of(text))
            )
            for group in in_rounds(parts, BATCH):
                encoded = tok.encode_batch([text for *_, text in group])
                for (split, hashed, first, text), ids in zip(group, encoded):
                    file = train if split == "train" else val
                    if first:
                        file.write(np.array([tok.eot_id], kind))
                        rows[split].append([1, hashed, 0])
                    file.write(ids.astype(kind))
                    rows[split][-1][0] += len(ids)
                    rows[split][-1][2] += len(text.encode())
        with model.whole_file(f"{place}.npz") as file:
            np.savez(file, **{s: np.array(r, np.uint64).reshape(-1, 3) for s, r in rows.items()})
    return sum(int(part[:, 2].sum()) for part in np.load(f"{place}.npz").values())


def layout(work, key, units):
    """What the shards hold and its numbers: ({split: [(unit, its split, hash limit)]}, meta).
    A mix takes each source as often as its share wants: whole first, then the documents with the
    lowest hashes. Its val keeps the shares, without repeats; val.<source> is all of a source's."""
    tables = [dict(np.load(work / f"{key}.{i}.npz")) for i in range(len(units))]
    everything, plans, meta = range(len(units)), {}, {}
    rows = lambda split, some: np.concatenate([tables[i][split] for i in some])
    for split in ("train", "val"):
        plans[split] = [(i, split, None) for i in everything]
        table = rows(split, everything)
        meta[split] = {"documents": len(table), "bytes": int(table[:, 2].sum())}
    if sources is None:
        return plans, meta
    meta["sources"] = {name: {} for name in sources}
    weights = {name: weight for name, (weight, _) in mixture().items()}
    mine = {name: [i for i in everything if units[i]["source"] == name] for name in weights}
    for split in ("train", "val"):
        tokens = {name: int(rows(split, some)[:, 0].sum()) for name, some in mine.items()}
        live = {name: w for name, w in weights.items() if tokens[name]}
        if split == "train" and len(live) < len(weights):
            raise UserError(f"sources: no text for training in {set(weights) - set(live)}")
        shares = {name: w / sum(live.values()) for name, w in live.items()}
        total = min((tokens[name] / share for name, share in shares.items()), default=0)
        total = total if split == "val" else mix_tokens or sum(tokens.values())
        plans[split] = []
        for name, share in shares.items():
            table, wanted = rows(split, mine[name]), round(total * share)
            copies, rest = divmod(wanted, tokens[name])
            plans[split] += [(i, split, None) for i in mine[name]] * copies
            order = np.argsort(table[:, 1], kind="stable")
            last = order[np.searchsorted(np.cumsum(table[order, 0]), rest)] if rest else None
            plans[split] += [(i, split, table[last, 1]) for i in mine[name] if rest]
            numbers = {"share": share, "tokens": tokens[name], "epochs": wanted / tokens[name]}
            meta["sources"][name][split] = numbers
            if split == "val":
                plans[f"val.{name}"] = [(i, "val", None) for i in mine[name]]
    return plans, meta


def shard_jobs(work, key, plans):
    """Cut every split into shards of shard_tokens: ({split: [names]}, {split: tokens}, jobs)."""
    names, totals, jobs = {}, {}, []
    for split, plan in plans.items():
        places, at = [], 0
        for i, kind, limit in plan:
            with np.load(work / f"{key}.{i}.npz") as tables:
                table = tables[kind]
            n = int(table[table[:, 1] <= (ALL * 4 - 1 if limit is None else limit), 0].sum())
            places.append((i, kind, limit, at, at + n))
            at += n
        names[split], totals[split] = [], at
        for begin in range(0, at, shard_tokens):
            end = min(at, begin + shard_tokens)
            names[split].append(f"{split}_{begin // shard_tokens:06d}.bin")
            parts = [p for p in places if p[3] < end and p[4] > max(begin, p[3])]
            jobs.append((names[split][-1], parts, begin, end))
    return names, totals, jobs


def write_shard(work, key, job):
    """Write one shard in llm.c's format: the tokens from `begin` to `end` of its split."""
    name, parts, begin, end = job
    wide = finished(work / f"{key}.tokenizer").n_vocab > 65536
    kind, head = ("<u4", (20240801, 7)) if wide else ("<u2", (20240520, 1))
    if not (work / f"{key}.{name}").exists():
        with model.whole_file(work / f"{key}.{name}") as file:
            file.write(np.array([*head, end - begin, *[0] * 253], "<i4"))
            for i, split, limit, first, _ in parts:
                tokens = np.memmap(work / f"{key}.{i}.{split}", kind, "r")
                if limit is not None:
                    table = np.load(work / f"{key}.{i}.npz")[split]
                    tokens = tokens[np.repeat(table[:, 1] <= limit, table[:, 0].astype(np.int64))]
                file.write(tokens[max(0, begin - first) : end - first])
    return 2 * (end - begin)


def commit(folder, work, key, tok, meta, more=()):
    """Make the finished files in `work`, shards named <key>.<name>, the dataset. meta.json goes
    first and comes last: a folder without it is no dataset, so that a process killed in between
    leaves nothing that loads."""
    kept = {
        k: v for k, v in settings(globals()).items() if k not in ("threads", "device", "report")
    }
    meta = {"settings": kept, "n_vocab": tok.n_vocab} | meta
    texts = {"tokenizer.json": tok.spec, "tokenizer_config.json": tok.config, "meta.json": meta}
    for name, value in texts.items():
        model.write_json(work / name, value)
    shown = [split for split in meta if isinstance(meta[split], dict) and "tokens" in meta[split]]
    (folder / "meta.json").unlink(missing_ok=True)
    for pattern in (
        "train_*.bin",
        "val_*.bin",
        "val.*.bin",
        "*_train.jsonl",
        "*_val.jsonl",
        "report.md",
    ):
        for old in folder.glob(pattern):
            old.unlink()
    for name in chain.from_iterable(meta[split]["shards"] for split in shown):
        os.replace(work / f"{key}.{name}", folder / name)
    for name in [*more, *texts]:
        os.replace(work / name, folder / name)
    shutil.rmtree(work)
    for split in shown:
        numbers = ", ".join(f"{n:,} {k}" for k, n in meta[split].items() if k != "shards")
        print(f"{split}: {numbers}")


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


def first_of(record, *names):
    """The first of these fields that is a text with something in it, or ""."""
    found = (record.get(name) for name in names)
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}


def turns(value):
    """Messages of [{"role", "content"}] or ShareGPT's [{"from", "value"}]."""
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(turn, dict) for turn in value)
    ):
        raise Reject("messages are no list of turns")
    result = []
    for turn in value:
        role = ROLES.get(turn.get("role", turn.get("from")))
        content = turn.get("content", turn.get("value"))
        if role is None:
            raise Reject("a role that is none of system, user, assistant, tool")
        if not isinstance(content, str) or not content.strip():
            raise Reject("a turn without text")
        result.append({"role": role, "content": content})
    return result


def asked(r):
    """The messages before the answer: of Alpaca, Dolly, prompt and completion, question and answer;
    `system` and `history` [[user, assistant], ...] as LLaMA-Factory has them."""
    if isinstance(r.get("prompt"), list):
        return turns(r["prompt"])
    ask, more = first_of(r, "instruction", "prompt", "question"), first_of(r, "input", "context")
    if not ask:
        raise Reject("no messages, instruction, prompt or question")
    before = [{"role": "system", "content": first_of(r, "system")}] if first_of(r, "system") else []
    for user, assistant in r.get("history") or []:
        before += turns(
            [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        )
    return [*before, {"role": "user", "content": f"{ask}\n\n{more}" if more else ask}]


def answer_of(value):
    """The text of an answer: a string, or messages that end with it."""
    text = turns(value)[-1]["content"] if isinstance(value, list) else value
    if not isinstance(text, str) or not text.strip():
        raise Reject("an empty answer")
    return text


def as_sft(r):
    if (said := r.get("messages", r.get("conversations"))) is not None:
        messages = turns(said)
    else:
        names = ("output", "response", "completion", "answer", "chosen")
        answer = next((r[name] for name in names if r.get(name)), None)
        messages = [*asked(r), {"role": "assistant", "content": answer_of(answer)}]
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise Reject("the last turn is not the assistant's")
    return {"messages": messages}


def as_preference(r):
    chosen, rejected = r.get("chosen"), r.get("rejected")
    if isinstance(chosen, str) and "\n\nAssistant:" in chosen and isinstance(rejected, str):  # HH
        cut = len(os.path.commonprefix([chosen, rejected]))
        cut = chosen.rfind("\n\nAssistant:", 0, cut + 1) + len("\n\nAssistant:")
        parts = re.split(r"\n\n(Human|Assistant): ?", chosen[:cut].removesuffix("\n\nAssistant:"))
        pairs = zip(parts[1::2], parts[2::2])
        said = [
            {"role": {"Human": "user"}.get(who, "assistant"), "content": text}
            for who, text in pairs
        ]
        prompt, chosen, rejected = turns(said), chosen[cut:].strip(), rejected[cut:].strip()
    elif (
        isinstance(chosen, list)
        and not first_of(r, "instruction", "prompt", "question")
        and not r.get("prompt")
    ):
        prompt = turns(chosen)[:-1]
    else:
        prompt = asked(r)
    chosen, rejected = answer_of(chosen), answer_of(rejected)
    if chosen == rejected:
        raise Reject("chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def as_classify(r):
    label = next((r[k] for k in ("label", "category", "class") if r.get(k) is not None), None)
    text = first_of(r, "text", "sentence", "content", "review")
    if not text or not isinstance(label, (str, int)) or not str(label).strip():
        raise Reject("no text or no label")
    return {"text": text, "label": str(label)}


def as_seq2seq(r):
    for a, b in PAIRS:
        if first_of(r, a) and first_of(r, b):
            return {"source": first_of(r, a), "target": first_of(r, b)}
    raise Reject("no source and target, nor another known pair of fields")


PAIRS = [
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
    ("text", "summary"),
]
PAIRS += [("instruction", "output"), ("input", "output"), ("question", "answer")]
PAIRS += [("prompt", "completion")]
TASKS = {"sft": as_sft, "preference": as_preference, "classify": as_classify, "seq2seq": as_seq2seq}


def convert(work, wanted, unit):
    """The records of a unit as rows of the wanted tasks, in work/<name>.rows.json: {task: [(hash to
    split by, row)]}, and the tallies of the bad ones."""
    place = work / f"{unit['name']}.rows.json"
    if not place.exists():
        rows, tallies, broken = defaultdict(list), defaultdict(Tally), []
        found = islice(records(unit, [], broken), max_documents)
        for record in functions_of(found) if source == "python" else found:
            for name in wanted:
                if name == "classify" and record.get("label") == "":
                    continue  # a module that is in no package
                reason = None
                try:
                    row = json.dumps(TASKS[name](record), ensure_ascii=False)
                    share = record.get("split_by") or digest(row.encode(errors="replace"))
                    rows[name].append((share, row))
                except (Reject, ValueError, TypeError, AttributeError) as why:
                    reason = str(why) if isinstance(why, Reject) else "fields of another type"
                text = json.dumps(record, default=str)
                tallies[name].count(text, text, reason)
        for name, line in ((name, line) for name in wanted for line in broken):
            tallies[name].count(line, line, "no JSON object")
        tallies = {name: tally.__dict__ for name, tally in tallies.items()}
        model.write_json(place, {"rows": rows, "tallies": tallies})
    return sum(end - begin for _, begin, end, *_ in unit["files"])


def build_tasks(run, work, pool, units, wanted):
    """Make <task>_train.jsonl and <task>_val.jsonl of the wanted tasks: {name: rows}."""
    made = {}
    if wanted:
        each(partial(convert, work, wanted), units, run, pool, "converting")
    for name in wanted if run.main else ():
        tally, rows = Tally(), {}
        for unit in units:
            result = model.read_json(work / f"{unit['name']}.rows.json")
            tally.add(Tally(**result["tallies"].get(name, {})))
            rows |= {row: hashed for hashed, row in result["rows"].get(name, [])}
        for reason, (n, examples) in tally.reasons.items():
            print(f"{name}: {n:,} bad records: {reason}, such as {examples[0]}")
        if tally.documents[1] > len(rows):
            print(f"{name}: {tally.documents[1] - len(rows):,} records came before, word for word")
        if not rows and task:
            shutil.rmtree(work)
            raise UserError(f"--source={source}: no record for --task={task} in it")
        last = list(rows)[len(rows) - round(len(rows) * val_fraction) :]
        last = last if len(rows) < 20 else [r for r, h in rows.items() if h < val_fraction * 2**64]
        last = set(last)
        for split in ("train", "val"):
            some = [row for row in rows if (row in last) == (split == "val")]
            made[f"{name}_{split}.jsonl"] = len(some)
            with model.whole_file(work / f"{name}_{split}.jsonl") as file:
                file.write("".join(row + "\n" for row in some).encode(errors="replace"))
    return made


# --------------------------------------------------------------------------------------------------
# Putting it together


def adopt(values):
    """Start a working process: the settings, one thread, and an end with the process it serves."""
    globals().update(values)
    with suppress(Exception):  # Linux alone
        ctypes.CDLL(None).prctl(1, 9)


def each(f, items, run, pool, what=None):
    """[f(item)] for this rank's share of the items, on several processes; f returns the bytes that
    it did. The ranks leave together."""
    mine, results, show, begun = (
        items[run.rank :: run.world],
        [],
        model.Progress(),
        time.monotonic(),
    )
    for result in (pool if len(mine) > 1 else map)(f, mine):
        results.append(result)
        if what and run.main:
            done = sum(results)
            rate = done / 1e6 / max(time.monotonic() - begun, 1e-9)
            n = f"{len(results)} of {len(mine)} parts"
            show(
                f"{what}: {n}, {done / 1e6:,.1f} MB, {rate:,.1f} MB/s",
                last=len(results) == len(mine),
            )
    wait(run)
    return results


def use_fineweb(folder, work):
    """Download FineWeb shards that are tokenized already, as they are."""
    global tokenizer
    tokenizer = "gpt2"  # whatever was asked: it made them
    tok, meta, kept = finished_tokenizer(), {}, KEPT / "fineweb10B"
    for split, numbers in {"val": [0], "train": range(1, (shards or 103) + 1)}.items():
        meta[split] = {"tokens": 0, "shards": [f"{split}_{i:06d}.bin" for i in numbers]}
        for name in meta[split]["shards"]:
            path = download(f"{FINEWEB}fineweb_{name}", kept / name)
            header = np.fromfile(path, "<i4", 3).tolist()
            if header[:2] != [20240520, 1] or path.stat().st_size != 1024 + 2 * header[-1]:
                path.unlink()
                raise UserError(f"{path}: removed: not the token shard that was expected")
            meta[split]["tokens"] += header[-1]
    for name in meta["train"]["shards"] + meta["val"]["shards"]:
        place = work / f"fineweb.{name}"
        place.unlink(missing_ok=True)
        try:
            os.link(kept / name, place)  # the same bytes on the disk, not a copy
        except OSError:  # another file system, or one without links
            shutil.copyfile(kept / name, place)
    commit(folder, work, "fineweb", tok, meta)


def learn_tokenizer(work, key, names, pool):
    """Train the tokenizer on the training text, or on a sample of it by hash."""
    cuts, sizes = np.load(work / f"{key}.cuts.npy"), columns_of(work, names, "size")
    part, counts = tokenizer_bytes / max(int(sizes[cuts > 0].sum()), 1), Counter()
    for some in pool(partial(count, work, key, names, part), range(len(names))):
        counts.update(some)
    return train_tokenizer(tokenizer, counts, vocab_size, model.Progress())


def few_units(work, units, run):
    """The first units, in which there are max_documents documents: no more of them is read."""
    if run.main:
        n = read = 0
        while n < len(units) and read < max_documents:
            clean(work, units[n])
            tallies = model.read_json(work / f"{units[n]['name']}.json")["tallies"]
            read += tallies.get("read", {"documents": [0]})["documents"][0]
            n += 1
        model.write_json(work / "few.json", {"units": n})
    wait(run)
    return units[: model.read_json(work / "few.json")["units"]]


def build(run, folder, work, pool):
    """From the sources to the shards. Every rank does its share of a step, and all go on together;
    what needs every result at once is rank 0's."""
    say = print if run.main else lambda line: None
    tok, units = finished_tokenizer(), plan(run)
    if not units:
        raise UserError(f"--source={source}: no text for training in it")
    units = few_units(work, units, run) if max_documents else units
    each(partial(clean, work), units, run, pool, "reading")
    names = [unit["name"] for unit in units]
    key = f"{digest(''.join(names).encode()):016x}"
    place = work / f"{key}.tokenizer"
    if run.main:
        tallies = compare(work, key, names)
    wait(run)
    if steps_of(["near"]):
        bands = range(band_shape(near_threshold)[0])
        each(partial(find_near, work, key, names), bands, run, pool)
    if run.main:
        clusters = settle(work, key, units, tallies)
        order = ["read", *steps_of(STEPS), "decontaminate", *LAST]
        tallies = {name: tallies[name] for name in order if name in tallies}
        for name, tally in tallies.items():
            say(tally.line(name))
        notes = [model.read_json(work / f"{name}.json") for name in names]
        skipped = [path for note in notes for path in note["skipped"]]
        if skipped:
            say(f"skipped {len(skipped)} files that are not UTF-8, such as {skipped[0]}")
        if special := sum(note["special"] for note in notes):
            say(f"{special} documents hold the name of a special token: it is taken as text")
        if not (np.load(work / f"{key}.cuts.npy") > 0).any():
            shutil.rmtree(work)
            raise UserError(f"--source={source}: no text for training in it")
        if tok is None:
            tok = learn_tokenizer(work, key, names, pool)
            if tokenizer != "char" and tok.n_vocab < vocab_size:
                say("the tokenizer is smaller than vocab_size: the text has no more to offer")
        say(f"tokenizer: {tokenizer}, {tok.n_vocab:,} tokens")
        place.mkdir(exist_ok=True)
        model.write_json(place / "tokenizer_config.json", tok.config)
        model.write_json(place / "tokenizer.json", tok.spec)
    wait(run)
    each(partial(encode, work, key, names), range(len(units)), run, pool, "encoding")
    plans, meta = layout(work, key, units)
    shard_names, tokens, jobs = shard_jobs(work, key, plans)
    each(partial(write_shard, work, key), jobs, run, pool)
    sets = build_tasks(run, work, pool, units, TASKS if source == "python" else [])
    if run.main:
        for split in plans:
            numbers = {"tokens": tokens[split], "shards": shard_names[split]}
            meta[split] = meta.get(split, {}) | numbers
        hashes = columns_of(work, names, "hash")
        meta |= {"source_sha256": hashlib.sha256(hashes.tobytes()).hexdigest(), "skipped": skipped}
        if report:
            write_report(work, key, names, tallies, clusters, meta)
        commit(folder, work, key, tok, meta, [*sets, *["report.md"][:report]])


def write_report(work, key, names, tallies, clusters, meta):
    """report.md: what every step took and left, why, and what is left now."""
    row = lambda *cells: "| " + " | ".join(str(cell) for cell in cells) + " |"
    number = lambda n: f"{n:,}"
    plain = lambda text: " ".join(text.replace("`", "'").split())
    lines = [f"# data/{dataset}", "", f"Source: {sources or source}. Steps: {steps}.", ""]
    lines += [row("step", "documents in", "out", "bytes in", "out"), row(*["---"] * 5)]
    for name, tally in tallies.items():
        lines.append(row(name, *map(number, [*tally.documents, *tally.bytes])))
    lines += ["", "## What was left out, and why", ""]
    for name, tally in tallies.items():
        for reason, (n, examples) in sorted(tally.reasons.items(), key=lambda item: -item[1][0]):
            lines += [f"**{name}: {reason}**: {n:,} documents", ""]
            lines += [f"- `{plain(example)}`" for example in examples] + [""]
    cuts, sizes = np.load(work / f"{key}.cuts.npy"), columns_of(work, names, "size")
    sizes = sizes[cuts >= 0].astype(np.int64)
    lines += ["## Lengths of the documents that are left, in bytes", "", "```"]
    bins = np.bincount(np.log2(np.maximum(sizes, 1)).astype(int))
    for power in np.flatnonzero(bins):
        bar = "#" * max(1, round(60 * bins[power] / bins.max()))
        lines.append(f"{2**power:>12,} to {2 ** (power + 1) - 1:>12,} {bins[power]:>9,} {bar}")
    lines += ["```", "", "## Near-duplicates", ""]
    extra = sum(n - 1 for n, _ in clusters)
    lines += [f"{len(clusters):,} clusters, {extra:,} documents left out.", ""]
    starts = np.load(work / f"{key}.starts.npy")
    for n, i in clusters[:10]:
        unit = np.searchsorted(starts, i, side="right") - 1
        (text,) = texts_of(work, names[unit], [i - starts[unit]])
        lines.append(f"- {n:,} documents like `{plain(text[:120])}`")
    lines += ["", "## Tokens", "", row("split", "documents", "bytes", "tokens", "bytes per token")]
    lines.append(row(*["---"] * 5))
    for split in ("train", "val"):
        m = meta[split]
        cells = [number(m[k]) for k in ("documents", "bytes", "tokens")]
        lines.append(row(split, *cells, f"{m['bytes'] / max(m['tokens'] - m['documents'], 1):.2f}"))
    for name, splits in meta.get("sources", {}).items():
        for split, m in splits.items():
            told = f"{m['share']:.1%} of the mix, {m['tokens']:,} tokens"
            lines += ["", f"{name}, {split}: {told}, {m['epochs']:.2f} epochs"]
    with model.whole_file(work / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())


def check_settings():
    limits = {"shard_tokens": 1, "threads": 0, "max_documents": 1, "shards": 1}
    limits |= {"mix_tokens": 1, "tokenizer_bytes": 1}
    for name, least in limits.items():
        if (value := globals()[name]) is not None and value < least:
            raise UserError(f"{name}={value}: expected {least} or more")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: expected 0 or more and less than 1")
    if not 0 < near_threshold <= 1:
        raise UserError(f"near_threshold={near_threshold}: expected above 0 and up to 1")
    for name in steps.split(","):
        if name and name not in [*STEPS, *LAST]:
            raise UserError(f"steps: {name!r}: expected some of {','.join([*STEPS, *LAST])}")
    if task is not None and task not in TASKS:
        raise UserError(f"--task={task}: expected {', '.join(TASKS)}")
    check_tokenizer()


def main():
    check_settings()
    folder, begun = Path("data") / dataset, time.monotonic()
    if inspect is not None:
        return show_tokens(finished_tokenizer() or model.Tokenizer.from_folder(folder), inspect)
    run = model.setup("cpu", timedelta(days=7))
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    workers = threads or os.cpu_count() or 1
    pool = ProcessPoolExecutor(workers, initializer=adopt, initargs=(settings(globals()),))
    try:
        with pool:
            spread = pool.map if workers > 1 else map
            if source == "fineweb10B":
                use_fineweb(folder, work)
            elif task:
                sets = build_tasks(run, work, spread, plan(run), [task])
                for name, n in sets.items():
                    os.replace(work / name, folder / name)
                    print(f"{name}: {n:,} records")
                if run.main:
                    shutil.rmtree(work)
            else:
                build(run, folder, work, spread)
    except OSError as error:  # a full disk, a file that may not be read
        shutil.rmtree(work, ignore_errors=True)
        why = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"{why}; nothing was changed") from None
    except BrokenProcessPool:
        why = "a process was killed, for want of memory perhaps: --threads=1 takes less"
        raise UserError(f"{why}; the same command goes on from here") from None
    except KeyboardInterrupt:
        raise UserError("stopped: the same command goes on from here") from None
    finally:
        if run.main and not any(work.glob("*.json")):  # no part is finished: nothing to go on from
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # what this run made for itself, and nothing else
                folder.rmdir()
                folder.parent.rmdir()
    if run.main:
        took = model.duration(time.monotonic() - begun)
        print(f"wrote {folder} in {took}: python train.py --dataset={dataset}")


if __name__ == "__main__":
    main()
