"""Raw text in; clean, distinct, mixed documents, a trained tokenizer and token shards out.

    python prepare.py                                   # the default: Python's own standard library
    python prepare.py --source=notes.txt --dataset=notes
    python prepare.py config/web.py --source='crawl/**/*.html' --dataset=web --report
    python prepare.py --source=hf:roneneldan/TinyStories --dataset=stories
    python prepare.py --task=sft --source=alpaca --dataset=alpaca
    torchrun --nproc_per_node=8 prepare.py config/fineweb_edu.py
    python prepare.py --source=corpus/ --part=2/8      # the second of eight machines with one data/

Writes data/<dataset>/: tokenizer.json, tokenizer_config.json, train_*.bin and val_*.bin (llm.c's
format), meta.json; for a task, such as sft, sft_{train,val}.jsonl. The same input
gives the same bytes on any number of processes. A run that was killed goes on where it was.
"""

from config import configure, settings

source = "python"  # python, numbers, pychat, copy:48, a download, file, glob, URL, @list, hf:o/n
sources: dict | None = None  # a mix instead: {"name": weight} or {"name": (weight, source)}
dataset = "python"  # the result is data/<dataset>
task: str | None = None  # a task set: sft, preference, kto, classify, seq2seq, tag, embed, span
languages = ""  # seq2seq of translations: the fields of source and target, such as en,de
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
language = "en"  # the ISO 639-1 code that the step of this name keeps: pip install py3langid
language_score = 0.65  # with this probability at least: FineWeb's (Penedo et al. 2024)
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
inspect: str | None = None  # print this text's tokens, the merges that made them, the vocabulary
tokenizer_bytes = 1_000_000_000  # it is trained on so much of the text, a sample by hash

shard_tokens = 100_000_000  # tokens of a shard written here
threads = 0  # processes at work under each rank; 0: as many as it has cores for
part = ""  # 2/8: the second of eight that exchange files alone, in a data/ that all share
seed = 0  # of the examples drawn for the default task sets
device = "cpu"  # of the perplexity model

if __name__ == "__main__":
    configure(globals())

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex

import barelm
from barelm import host
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
    tiktoken_tokenizer,
    train_tokenizer,
)
from barelm.clean import (
    STEPS,
    Cleaning,
    Reject,
    Tally,
    apply_step,
    bare_url,
    language_model,
    one_line,
    symbols_pattern,
)
from barelm.corpus import (
    ALL,
    CLEANED,
    ROW,
    Corpus,
    Job,
    batches,
    cleaned_note,
    cleaned_paths,
    is_clean,
    read_notes,
    save_array,
    sync,
    write_cleaned,
    write_notes,
)
from barelm.corpus_report import report_lines, share_line
from barelm.decontaminate import is_no_evaluation
from barelm.dedup import (
    band_shape,
    digest,
    first_of_clusters,
    first_of_equals,
    hashed_name,
    minhash,
    mix_bits,
    near_pairs,
    word_hashes,
)
from barelm.download import HUB, download
from barelm.files import require_zst, sync_folder, whole_file, write_json
from barelm.machines import Part
from barelm.mix import SPLITS, TOKENS, Encoded, plan_splits
from barelm.number_words import SOURCE as NUMBERS
from barelm.python_chat import chat_size
from barelm.run import Progress, UserError, duration, setup
from barelm.shards import open_shard
from barelm.sources import DOWNLOAD_FOLDER, FORMATS, cut_into_units, documents, files_of
from barelm.tasksets import OF_PYTHON, TASKS, Reading, build_tasks, task_file
from barelm.threads import worker_count
from barelm.tokenizer import Tokenizer
from barelm.working import EmptySource, for_each, start_pool, wait, working_folder

# The way of a text, and the file that a step's details are in:
#   source -> files -> units -> documents     plan             barelm/sources.py
#   documents -> cleaned documents            clean_unit       barelm/clean.py, decontaminate.py
#   all of them -> those that stay            deduplicate      barelm/dedup.py
#   those -> training and validation          divide           barelm/corpus.py
#   training text -> tokenizer                learn_tokenizer  barelm/bpe.py
#   documents -> tokens -> shards             encode_unit, write_shards  barelm/mix.py
#   records -> task sets                      make_tasks       barelm/tasksets.py
#   counts and examples -> report.md          write_report     barelm/corpus_report.py
# `build` goes this way; a run that was killed goes on in barelm/working.py's folder.
#
# What runs in other processes (clean_unit, find_near, count_pieces_of, encode_unit) gets what it
# needs as arguments: the keys above may have their defaults there.

BATCH = 1_000_000  # characters that are in hand at once in each process


# --------------------------------------------------------------------------------------------------
# From the sources to units: what one process works on alone


def mixture():
    """{name: (weight, source)} of what was asked."""
    if sources is None:
        return {"all": (1, source)}
    mix = {}
    for name, value in sources.items():
        # {"python": 3} names its source itself.
        pair = tuple(value) if isinstance(value, (tuple, list)) else (value, name)
        kinds = [type(x) for x in (name, *pair)]
        is_right = kinds in ([str, int, str], [str, float, str]) and 0 < pair[0] < math.inf
        if not is_right or not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"sources: {name!r}: {value!r}: expected a name and a weight above 0")
        mix[name] = pair
    return mix


def plan(run):
    """The Units of all sources, in order. A unit's name is a hash of all that its results depend
    on, so that a run that was killed finds again what it has done, and no other run does."""
    units = []
    for name, (_, spec) in mixture().items():
        paths, folder, mark = files_of(spec, separator, shards, run)
        if not paths:
            raise EmptySource(f"--source={spec}: no file in it")
        undivided = max_documents is not None  # one process reads so many, and no further
        units += cut_into_units(name, paths, folder, mark, input_format, undivided)
    # These change no document; everything else may.
    made_by = settings_but("threads", "part", "device", "dataset", "report")
    made_by["code"] = digest(code_bytes())
    made_by["beside"] = files_beside()
    for unit in units:
        unit.name = hashed_name(json.dumps([asdict(unit), made_by]))
    return units


def settings_but(*names):
    return {key: value for key, value in settings(globals()).items() if key not in names}


def code_bytes():
    """This script and what it imports of ours: another code may make other data."""
    leaves = sorted(Path(barelm.__file__).parent.glob("*.py"))
    return b"".join(path.read_bytes() for path in [Path(__file__), *leaves])


def files_beside():
    """(path, time of its last change) of the files that the settings name, beside the sources."""
    stamps = []
    for name in (tokenizer, perplexity_model, blocklist, *(decontaminate or "").split(",")):
        if not name:
            continue
        for path in (Path(name), *Path(name).glob("*")):  # a file, or a folder's files
            if path.exists():
                stamps.append((str(path), path.stat().st_mtime_ns))
    return sorted(stamps)


# --------------------------------------------------------------------------------------------------
# Cleaning: a unit is read and its documents go through the steps, each alone

# The steps that compare all documents, and why each leaves one out.
COMPARING = {
    "url": "the URL came before",
    "exact": "the text came before",
    "near": "a near-duplicate came before",
}


def asked_steps():
    """The names of all steps, in order. With clean_symbols `symbols` is one, behind those that
    tell what the characters are."""
    names = list(dict.fromkeys(steps.split(",")))  # each once
    if clean_symbols and "symbols" not in names:
        place = 0
        for i, name in enumerate(names):
            if name in ("html", "unicode"):
                place = i + 1
        names.insert(place, "symbols")
    return [name for name in names if name]


def cleaning_settings():
    return Cleaning(
        steps=tuple(asked_steps()),
        html_documents=html_documents,
        clean_symbols=clean_symbols,
        min_chars=min_chars,
        max_chars=max_chars,
        language=language,
        language_score=language_score,
        perplexity_model=perplexity_model,
        perplexity_band=tuple(perplexity_band),
        device=device,
        blocklist=blocklist,
        decontaminate=decontaminate,
    )


def clean_unit(work, cleaning, special_tokens, text_field, limit, unit):
    """Read a unit, run the local steps over its documents and store what they leave, in the files
    that barelm/corpus.py describes. limit: documents to read, or None. Returns the bytes read."""
    place = work / unit.name
    if not is_clean(work, unit.name):
        Path(f"{place}.json").unlink(missing_ok=True)  # before the files that it vouches for change
        tallies = defaultdict(Tally, read=Tally())  # which a unit without documents has too
        skipped = []
        n_special = 0
        n_bytes = 0
        cleaned = clean_documents(unit, cleaning, text_field, limit, tallies, skipped)
        with (
            open(f"{place}.txt", "wb") as text_file,
            open(f"{place}.rows", "wb") as rows_file,
            open(f"{place}.signatures", "wb") as signatures_file,
        ):
            # In batches, since numpy hashes many texts at once, and memory holds no more.
            for batch in batches(cleaned, BATCH):
                texts, rows, signatures = describe(batch, cleaning, tallies)
                ends = n_bytes + np.cumsum(rows["size"])
                rows["unit"] = int(unit.name, 16)
                rows["begin"] = ends - rows["size"]
                n_bytes += text_file.write("".join(texts).encode())
                rows_file.write(rows.tobytes())
                signatures_file.write(signatures.tobytes())
                for text in texts:
                    n_special += any(name in text for name in special_tokens)
            for file in (text_file, rows_file, signatures_file):
                sync(file)
        write_notes(work, unit.name, tallies, skipped, n_special)
    return read_notes(work, unit.name)["tallies"]["read"].bytes_in


def clean_documents(unit, cleaning, text_field, limit, tallies, skipped):
    """Yield (record, text) of the documents of a unit that the local steps leave."""
    local_steps = [name for name in cleaning.steps if name in STEPS]
    records = documents(unit, text_field, skipped)
    not_blank = (
        record for record in records if record[text_field].strip()
    )  # none is read before its turn
    for record in islice(not_blank, limit):
        text = record[text_field]
        tallies["read"].count(text, text)
        for name in local_steps:
            text, reason = clean_text(name, text, record, cleaning, tallies[name])
            if reason:
                break
        else:  # no step left it out
            yield record, text


def clean_text(name, text, record, cleaning, tally):
    """(the text after a step, None), or (the text, the reason why the step leaves it out)."""
    begun = time.perf_counter()
    cleaned = text
    reason = None
    try:
        cleaned = apply_step(name, text, record, cleaning)
        if not cleaned.strip():
            reason = "nothing is left of it"
    except Reject as rejected:
        reason = str(rejected)
    tally.seconds += time.perf_counter() - begun
    tally.count(text, cleaned, reason)
    return cleaned, reason


def describe(batch, cleaning, tallies):
    """(texts, their rows of dtype ROW, their signatures) of (record, text) tuples, without those
    that share GRAM words in a row with the evaluation files."""
    texts = [text for _, text in batch]
    rows = np.zeros(len(batch), ROW)
    for row, (record, text) in zip(rows, batch):
        data = text.encode()
        # Where a visitor came from, and to which place in the page, make no other page.
        page = re.sub(r"\butm_\w+=[^&#]*&?|#.*", "", record.get("url", ""))
        row["size"] = len(data)
        row["hash"] = digest(data)
        # Other blanks and other cases make no other text.
        row["exact"] = digest(" ".join(text.lower().split()).encode())
        row["url"] = digest(bare_url(page).encode())
    signatures = np.zeros((len(batch), 0), np.uint16)  # none: nothing is written
    stays = np.ones(len(batch), bool)
    if "near" in cleaning.steps or cleaning.decontaminate:
        begun = time.perf_counter()
        # Of a book shelf in one document the first books, for memory's sake.
        hashes, owners = word_hashes([text[: 20 * BATCH] for text in texts])
    if "near" in cleaning.steps:
        signatures = minhash(hashes, owners, len(batch))
        tallies["near"].seconds += time.perf_counter() - begun
    if cleaning.decontaminate:
        tally = tallies["decontaminate"]
        stays = is_no_evaluation(texts, hashes, owners, cleaning.decontaminate, tally)
    texts_left = [text for text, stay in zip(texts, stays) if stay]
    return texts_left, rows[stays], signatures[stays]


# --------------------------------------------------------------------------------------------------
# Deduplication and division: among the documents of all units


def deduplicate(corpus, pool_map):
    """Leave out documents whose URL or text came before, in any unit: (which stay, (N,) bool;
    {step: Tally} of these steps; [(documents, number of the first)] of the clusters of
    near-duplicates, the largest first)."""
    rows = corpus.rows()
    stays = np.ones(len(rows), bool)
    tallies = {}
    clusters = []
    asked = asked_steps()
    order = [name for name in asked if name in ("url", "exact")]
    order += [name for name in asked if name == "near"]  # the dearest last, of what is left
    for step in order:
        if step == "near":
            pairs = find_all_near(corpus, stays, pool_map)
            begun = time.perf_counter()
            after, clusters = first_of_clusters(pairs, stays)
        else:
            begun = time.perf_counter()
            after = first_of_equals(rows[step].copy(), stays)  # a column, out of the memory map
        tallies[step] = compare_tally(corpus, step, stays, after)
        tallies[step].seconds = time.perf_counter() - begun
        stays = after
    return stays, tallies, clusters


def find_all_near(corpus, stays, pool_map):
    """The pairs (n, 2) of near-duplicates, in all bands."""
    save_array(corpus.folder / "stays.npy", stays)  # once on the disk, not once for each band
    n_bands, _ = band_shape(near_threshold)
    find = partial(find_near, corpus, near_threshold)
    return np.concatenate([*pool_map(find, range(n_bands))])


def find_near(corpus, threshold, band):
    stays = np.load(corpus.folder / "stays.npy")
    return near_pairs(corpus.signatures(), stays, band, threshold)


def compare_tally(corpus, step, before, after):
    """The Tally of a step that compares all documents; before, after: which stay, (N,) bool."""
    rows = corpus.rows()
    left_out = np.flatnonzero(before & ~after)
    tally = Tally(
        docs_in=int(before.sum()),
        bytes_in=int(rows["size"][before].sum()),
        docs_out=int(after.sum()),
        bytes_out=int(rows["size"][after].sum()),
    )
    if len(left_out):
        examples = [one_line(text) for text in corpus.texts(rows[left_out[:3]])]
        tally.add_reason(COMPARING[step], len(left_out), examples)
    return tally


def divide(corpus, jobs, stays):
    """Divide what stays into training and validation: the cuts, as Corpus has them. A document goes
    to validation by its hash, so that it is there still when others are added; of a source of
    fewer than 20 the last val_fraction of all characters does."""
    rows = corpus.rows()
    is_val = rows["hash"] < np.uint64(val_fraction * 2**64)  # hashes are even over 0 to 2**64
    cuts = np.where(is_val, 0, ALL)
    cuts[~stays] = -1
    for name in mixture():
        of_source = np.zeros(len(rows), bool)
        for job in jobs:
            if job.source == name:
                of_source[job.begin : job.end] = True
        numbers = np.flatnonzero(stays & of_source)
        if len(numbers) < 20:  # too few for chance: one book would have no validation text
            lengths = np.array([len(text) for text in corpus.texts(rows[numbers])], int)
            total = int(lengths.sum())
            n_training = total - round(total * val_fraction)  # characters
            begins = np.cumsum(lengths) - lengths  # of each document in the whole
            cuts[numbers] = np.clip(n_training - begins, 0, lengths)
    save_array(corpus.folder / "cuts.npy", cuts)
    return cuts


# --------------------------------------------------------------------------------------------------
# From the documents to the tokenizer and the shards


def tokenizer_settings():
    """What the keys say of a tokenizer made here."""
    return TokenizerSettings(special_tokens, roles, normalize)


CUT = regex.compile(r"(?<=\S\n)(?=\p{L})")  # no split pattern has a piece that spans this


def pieces_of(text):
    """Cut a long text into parts that are tokenized alone as they are in the whole."""
    begin = 0
    while len(text) - begin > BATCH:
        cut = CUT.search(text, begin + BATCH)
        if not cut:
            break
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:]


def learn_tokenizer(corpus, jobs, pool_map):
    """Train the tokenizer on the training text, or on a sample of it by hash."""
    n_bytes = int(corpus.rows()["size"][corpus.cuts() > 0].sum())  # of training text
    fraction = tokenizer_bytes / max(n_bytes, 1)
    counts = Counter()
    settings = tokenizer_settings()
    count = partial(count_pieces_of, corpus, PATTERNS[tokenizer], settings, fraction)
    for part in pool_map(count, jobs):
        counts.update(part)
    if not counts:
        raise UserError(f"tokenizer_bytes={tokenizer_bytes}: the documents are too long for so few")
    tok = train_tokenizer(tokenizer, counts, vocab_size, settings, Progress())
    # `char` takes whatever there is, whatever vocab_size says.
    if tokenizer != "char" and tok.n_vocab < vocab_size:
        print("the tokenizer is smaller than vocab_size: the text has no more to offer")
    return tok


def count_pieces_of(corpus, pattern, settings, fraction, job):
    """{piece: count} of a sample, by hash, of a unit's training text."""
    counts = Counter()
    for split, text_hash, text in corpus.split_texts(job):
        # Mixed once more: by its hash itself it went to this split.
        is_drawn = int(mix_bits(text_hash[None])[0]) < fraction * 2**64
        if split == "train" and is_drawn:
            counts.update(count_pieces(pieces_of(normal_text(text, settings)), pattern))
    return counts


@lru_cache(1)  # a process opens it once
def open_tokenizer(folder):
    return Tokenizer.from_folder(folder)


def token_dtype(tok):
    """The tokens of a shard have 16 bits where that is enough (llm.c's two formats)."""
    return np.dtype("<u4" if tok.n_vocab > 65536 else "<u2")


def encode_unit(corpus, job):
    """Encode what stays of a unit: <i>.tokens has its tokens and <i>.npy, which comes last and
    vouches for it, the TOKENS of each document. Returns the bytes of text."""
    tok = open_tokenizer(corpus.folder)
    notes = corpus.folder / f"{job.number}.npy"
    if not is_encoded(corpus, job, token_dtype(tok)):
        notes.unlink(missing_ok=True)
        with open(corpus.folder / f"{job.number}.tokens", "wb") as file:
            rows = write_tokens(file, tok, texts_to_encode(corpus, job, tok))
            sync(file)
        save_array(notes, np.array(rows, TOKENS))
    return int(np.load(notes)["bytes"].sum())


def is_encoded(corpus, job, dtype):
    """Are a unit's tokens there, and as many as <i>.npy says?"""
    try:
        n_tokens = int(np.load(corpus.folder / f"{job.number}.npy")["tokens"].sum())
        size = os.path.getsize(corpus.folder / f"{job.number}.tokens")
        return n_tokens * dtype.itemsize == size
    except (OSError, ValueError, IndexError):
        return False


def texts_to_encode(corpus, job, tok):
    """Yield (split, hash, does a document begin here, text); a long text in parts."""
    for split, text_hash, text in corpus.split_texts(job):
        # Others' tokenizers may put a space before a text, or go on behind a line.
        parts = pieces_of(text) if tok.can_cut else [text]
        for i, part in enumerate(parts):
            yield split, text_hash, i == 0, part


def write_tokens(file, tok, texts):
    """Write documents with the special tokens that stand around each: the TOKENS of each, as
    tuples."""
    dtype = token_dtype(tok)
    begin, end = (np.array(ids, dtype) for ids in tok.document_layout)
    rows = []
    for batch in batches(texts, BATCH):
        encoded = tok.encode_batch([text for *_, text in batch])
        for (split, text_hash, is_first, text), ids in zip(batch, encoded):
            if is_first:
                if rows:
                    file.write(end)  # of the document before
                file.write(begin)
                rows.append([SPLITS.index(split), text_hash, len(begin) + len(end), 0])
            file.write(ids.astype(dtype))
            rows[-1][2] += len(ids)  # its tokens
            rows[-1][3] += len(text.encode())  # and bytes, for bits per byte
    if rows:
        file.write(end)
    return [tuple(row) for row in rows]


def write_shards(folder, encoded, plans):
    """Write every split in shards of shard_tokens, in llm.c's format: {split: its numbers}."""
    numbers = {}
    for split, parts in plans.items():
        numbers[split] = encoded.count(parts) | {"shards": []}
        n_tokens = numbers[split]["tokens"]
        blocks = chain.from_iterable(tokens_of(encoded, part) for part in parts)
        rest = np.empty(0, encoded.dtype)  # of the last block: it goes into the next shard
        for begin in range(0, n_tokens, shard_tokens):
            name = f"{split}_{begin // shard_tokens:06d}.bin"
            size = min(shard_tokens, n_tokens - begin)
            with whole_file(folder / name) as file:
                file.write(shard_header(encoded.dtype, size))
                rest = write_block(file, rest, blocks, size)
            numbers[split]["shards"].append(name)
    return numbers


def shard_header(dtype, n_tokens):
    """llm.c's 256 whole numbers: magic, version, count, zeros."""
    magic, version = (20240801, 7) if dtype.itemsize == 4 else (20240520, 1)
    return np.array([magic, version, n_tokens, *[0] * 253], "<i4")


def write_block(file, rest, blocks, size):
    """Write `size` tokens: of `rest`, then of the blocks. Returns what is left of the last one."""
    while size:
        if not len(rest):
            rest = next(blocks)
        file.write(rest[:size])
        n_written = len(rest[:size])
        rest = rest[n_written:]
        size -= n_written
    return rest


def tokens_of(encoded, part):
    """Yield the tokens that a Part takes, some documents at a time."""
    rows = encoded.documents[part.unit]
    tokens = encoded.tokens(part.unit)
    position = 0
    for first in range(0, len(rows), 1000):  # a mask over all tokens would fill the memory
        lengths = rows["tokens"][first : first + 1000]
        is_taken = np.repeat(part.taken[first : first + 1000], lengths)
        for number, cut in part.cuts.items():
            if first <= number < first + len(lengths):
                start = int(lengths[: number - first].sum())
                is_taken[start + cut.begin : start + cut.end] = False
        yield tokens[position : position + len(is_taken)][is_taken]  # (n,) a copy of these
        position += len(is_taken)


# --------------------------------------------------------------------------------------------------
# Task sets: records as rows of text


def is_default_source():
    return source == "python" and sources is None


def tasks_of_source():
    """The task sets that the source's own records make, beside the shards."""
    if is_default_source():  # whose functions and docstrings make all of these
        return OF_PYTHON
    if is_numbers():
        return ["sft", "seq2seq"]
    if is_chat():
        return ["sft"]
    return []


def is_numbers():
    return source == NUMBERS and sources is None


def is_chat():
    return chat_size(source) is not None and sources is None


def make_tasks(folder, pool_map, units, names):
    """The files of these task sets, in the folder: {file name: its rows}."""
    pair = [name.strip() for name in languages.split(",")] if languages else None
    by_text = is_numbers() or is_chat()
    reading = Reading(field, max_documents, is_default_source(), seed, pair, by_text)
    return build_tasks(folder, pool_map, units, names, reading, val_fraction)


def replace_rows(work, folder, name):
    """Make the rows of a task in the working folder those of the data set. Without its training
    rows a task cannot be trained on: they go first and come last, so that no killed run leaves two
    halves."""
    train = task_file(name, "train")
    val = task_file(name, "val")
    (folder / train).unlink(missing_ok=True)
    sync_folder(folder)
    for file in (val, train):
        host.replace(work / file, folder / file)
        sync_folder(folder)


# --------------------------------------------------------------------------------------------------
# The end: what was made takes the place of what was there


def old_files(folder):
    """What an earlier run left in the folder, without meta.json and the tokenizer."""
    patterns = ["train_*.bin", "val_*.bin", "val.*.bin", "report.md", "parts.json"]
    for split in SPLITS:
        patterns += [task_file(name, split) for name in TASKS]
        patterns += [f"cleaned_{split}_*.{ending}" for ending in CLEANED]
    paths = []
    for pattern in patterns:
        paths += folder.glob(pattern)
    return paths


def refuse_folders(folder):
    """A folder in the place of a file of the data set cannot be replaced: say so at once."""
    if not os.path.isdir(folder):
        return
    names = ("meta.json", "tokenizer.json", "tokenizer_config.json")
    for path in [*(folder / name for name in names), *old_files(folder)]:
        if path.is_dir():
            raise UserError(f"{path}: a folder where a file is to be: move it; nothing was changed")


def commit(folder, work, tok, splits, more_meta, more_files=(), used_tokenizer=None):
    """Make the finished files in `work` the data set, and say what it holds.

    splits: {split: its numbers and shards}; used_tokenizer: its name where it isn't the one that
    was asked for."""
    # These change nothing in the data.
    made_by = settings_but("threads", "part", "device", "report")
    if used_tokenizer:
        made_by["tokenizer"] = used_tokenizer
    begin, end = tok.document_layout  # the ids that stand around each document
    meta = {"settings": made_by, "n_vocab": tok.n_vocab} | splits | more_meta
    meta["document"] = {"begin": begin, "end": end}
    write_json(work / "tokenizer.json", tok.spec)
    write_json(work / "tokenizer_config.json", tok.config)
    write_json(work / "meta.json", meta)
    names = [*chain.from_iterable(numbers["shards"] for numbers in splits.values()), *more_files]
    names += ["tokenizer.json", "tokenizer_config.json"]
    try:
        replace_dataset(folder, work, names)
    except OSError as error:
        why = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"{why}; {folder} is not whole: run the same command again") from None
    for split, numbers in splits.items():
        counts = [f"{count:,} {key}" for key, count in numbers.items() if key != "shards"]
        print(f"{split}: {', '.join(counts)}")


def replace_dataset(folder, work, names):
    """Move these files and meta.json into the folder, in the place of all old ones. meta.json goes
    first and comes last: a folder without it is no data set, so that a process killed in between
    leaves nothing that loads."""
    old = old_files(folder)  # listed before new ones of these names are there
    (folder / "meta.json").unlink(missing_ok=True)
    sync_folder(folder)
    for path in old:
        path.unlink()
    for name in names:
        host.replace(work / name, folder / name)
    sync_folder(folder)
    host.replace(work / "meta.json", folder / "meta.json")
    sync_folder(folder)


# --------------------------------------------------------------------------------------------------
# FineWeb's shards, which others have tokenized

FINEWEB = f"{HUB}datasets/kjj0/fineweb10B-gpt2/resolve/main/"
FINEWEB_SHARDS = 103


def use_fineweb(run, folder, work):
    """Download FineWeb shards that are tokenized already, as they are; each rank its share."""
    n_shards = shards or FINEWEB_SHARDS
    if n_shards > FINEWEB_SHARDS:
        raise UserError(f"shards={shards}: expected up to {FINEWEB_SHARDS}")
    tok = tiktoken_tokenizer("gpt2", tokenizer_settings())  # whatever was asked: it made them
    names = {"train": [f"train_{i:06d}.bin" for i in range(1, n_shards + 1)]}
    names["val"] = ["val_000000.bin"]
    all_names = names["val"] + names["train"]
    for name in all_names[run.rank :: run.world]:
        read_fineweb(name)
    wait(run, [DOWNLOAD_FOLDER / "fineweb10B" / name for name in all_names])
    if not run.is_main:
        return
    work.mkdir(exist_ok=True)
    for name in all_names:
        (work / name).unlink(missing_ok=True)
        try:
            # The data set's folder may be removed or replaced without a new download.
            os.link(DOWNLOAD_FOLDER / "fineweb10B" / name, work / name)  # the same bytes on disk
        except OSError:  # another file system, or one without links
            shutil.copyfile(DOWNLOAD_FOLDER / "fineweb10B" / name, work / name)
        with open(work / name, "rb") as file:
            sync(file)  # meta.json, which comes later, says that they are there
    splits = {}
    for split in SPLITS:
        n_tokens = sum(map(read_fineweb, names[split]))
        splits[split] = {"tokens": n_tokens, "shards": names[split]}
    commit(folder, work, tok, splits, {}, used_tokenizer="gpt2")


def read_fineweb(name):
    """Download a shard of FineWeb: how many tokens it has."""
    path = download(f"{FINEWEB}fineweb_{name}", DOWNLOAD_FOLDER / "fineweb10B" / name)
    try:
        return len(open_shard(path))
    except UserError:
        path.unlink()
        raise UserError(f"{path}: removed: not the token shard that was expected") from None


# --------------------------------------------------------------------------------------------------
# Putting it together


def build(run, folder, work, pool_map):
    """From the sources to the shards. Every rank does its share of a step, and all go on together;
    what needs every result at once is rank 0's."""
    tok = finished_tokenizer(tokenizer, tokenizer_settings())
    units = plan(run)
    special = special_names(tokenizer_settings())
    clean = partial(clean_unit, work, cleaning_settings(), special, field, max_documents)
    corpus = Corpus(work / hashed_name("".join(unit.name for unit in units)))
    if part and not run.begin(corpus.folder.name, folder):
        print(f"{run.name()}: {folder} is made already by all parts")
        sys.exit(0)
    is_read = partial(is_clean, work)
    for_each(clean, units, run, pool_map, "reading", lambda unit: is_read(unit.name))

    jobs = number_documents(work, units)
    if run.is_main:  # duplicates are found among all documents, the tokenizer is of all text
        notes = [read_notes(work, unit.name) for unit in units]
        tallies, clusters = choose_documents(corpus, units, jobs, notes, pool_map)
        tok = tok or learn_tokenizer(corpus, jobs, pool_map)
        print(f"tokenizer: {tokenizer}, {tok.n_vocab:,} tokens")
        write_json(corpus.folder / "tokenizer_config.json", tok.config)
        write_json(corpus.folder / "tokenizer.json", tok.spec)
    wait(run, [corpus.folder / "tokenizer.json"])  # the others encode with it

    encode_documents(run, corpus, jobs, pool_map)
    if run.is_main:
        splits, mix = fill_shards(corpus, tok, jobs)
        hashes = hashlib.sha256(corpus.rows()["hash"].tobytes()).hexdigest()
        meta = {"sources": mix} if sources else {}
        meta |= {"source_sha256": hashes, "skipped": skipped_files(notes)}
        files = []
        if save_cleaned:
            files = cleaned_names(corpus, jobs)
            meta["cleaned"] = list(files)
        if tasks_of_source():
            files += make_tasks(corpus.folder, pool_map, units, tasks_of_source())
        if report:
            write_report(corpus, tok, tallies, clusters, splits | meta)
            files.append("report.md")
        if part:  # so that a part that comes late knows
            write_json(corpus.folder / "parts.json", {"plan": corpus.folder.name})
            files.append("parts.json")
        commit(folder, corpus.folder, tok, splits, meta, files)


def encode_documents(run, corpus, jobs, pool_map):
    """Encode what stays, and write it as text where that is asked for; each rank its share. Of
    parts that exchange files alone the first one waits for all."""

    def is_job_encoded(job):
        dtype = token_dtype(open_tokenizer(corpus.folder))
        return not run.is_main or is_encoded(corpus, job, dtype)

    def is_written(job):
        return not run.is_main or cleaned_note(corpus, job).exists()

    encode = partial(encode_unit, corpus)
    for_each(encode, jobs, run, pool_map, "encoding", is_job_encoded)
    if save_cleaned:
        write = partial(write_cleaned, corpus, field, save_cleaned, sources is not None)
        for_each(write, jobs, run, pool_map, "writing the cleaned documents", is_written)


def number_documents(work, units):
    """A Job for each unit: which of all documents are its own."""
    jobs = []
    begin = 0
    for i, unit in enumerate(units):
        n_documents = os.path.getsize(work / f"{unit.name}.rows") // ROW.itemsize
        jobs.append(Job(i, unit.source, begin, begin + n_documents))
        begin += n_documents
    return jobs


def choose_documents(corpus, units, jobs, notes, pool_map):
    """Deduplicate and divide the documents of all units, and say what the steps left: ({step:
    Tally}, clusters of near-duplicates)."""
    corpus.folder.mkdir(exist_ok=True)
    corpus.gather([unit.name for unit in units])
    stays, tallies, clusters = deduplicate(corpus, pool_map)
    for note in notes:
        for name, tally in note["tallies"].items():
            tallies.setdefault(name, Tally()).add(tally)
    cuts = divide(corpus, jobs, stays)
    local_steps = [name for name in asked_steps() if name in STEPS]
    order = ["read", *local_steps, "decontaminate", *COMPARING]
    tallies = {name: tallies[name] for name in order if name in tallies}
    for name, tally in tallies.items():
        print(tally.line(name))
    skipped = skipped_files(notes)
    if skipped:
        print(f"skipped {len(skipped)} files that are not UTF-8, such as {skipped[0]}")
    n_special = sum(note["special"] for note in notes)
    if n_special:
        print(f"{n_special} documents hold the name of a special token: it is taken as text")
    if not (cuts > 0).any():
        raise EmptySource(f"--source={sources or source}: no text for training in it")
    return tallies, clusters


def skipped_files(notes):
    paths = chain.from_iterable(note["skipped"] for note in notes)
    return list(dict.fromkeys(paths))


def fill_shards(corpus, tok, jobs):
    """Write the shards: ({split: its numbers}, {source: {split: its numbers}})."""
    documents_of_units = [np.load(corpus.folder / f"{job.number}.npy") for job in jobs]
    encoded = Encoded(corpus.folder, tok, token_dtype(tok), documents_of_units)
    weights = {name: weight for name, (weight, _) in mixture().items()}
    unit_sources = [job.source for job in jobs]
    plans, mix = plan_splits(encoded, unit_sources, weights, mix_tokens, sources is not None)
    splits = write_shards(corpus.folder, encoded, plans)
    for name in sources or ():
        print(f"{name}: {share_line(mix[name]['train'])}")
    return splits, mix


def cleaned_names(corpus, jobs):
    """The names of all files of cleaned documents."""
    names = []
    for job in jobs:
        names += [path.name for path in cleaned_paths(corpus, save_cleaned, job)]
    names.sort()
    print(f"cleaned: {len(names)} files, such as {names[0]}")
    return names


def write_report(corpus, tok, tallies, clusters, meta):
    """report.md in the corpus's folder."""
    title = f"data/{dataset}"
    lines = report_lines(corpus, tok, tallies, clusters, meta, title, sources or source, steps)
    with whole_file(corpus.folder / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode(errors="replace"))


def make(run, folder, work, pool_map):
    """Whatever was asked for, in `folder`."""
    if source == "fineweb10B" and not task:
        return use_fineweb(run, folder, work / "fineweb")
    if not task:
        return build(run, folder, work, pool_map)
    of_documents = {"roles": roles, "save_cleaned": save_cleaned, "clean_symbols": clean_symbols}
    unused = [name for name, value in of_documents.items() if value]
    if unused and run.is_main:
        print(f"note: {', '.join(unused)}: of documents alone; --task={task} uses none of it")
    units = plan(run)  # which all ranks download for
    if run.is_main:  # a task set is small
        n_rows = make_tasks(work, pool_map, units, [task])
        if not any(n_rows.values()):
            raise EmptySource(f"--source={sources or source}: no record for --task={task} in it")
        replace_rows(work, folder, task)
        for name in reversed(n_rows):  # training first
            print(f"{name}: {n_rows[name]:,} records")


# --------------------------------------------------------------------------------------------------
# Settings with which nothing can be made


def check_settings():
    """Refuse them before anything is read."""
    check_dataset()
    check_special_tokens()
    check_numbers()
    check_names()
    taken = None  # as it is
    if source == "fineweb10B":
        taken = "the tokenizer of fineweb10B"
    elif Path(tokenizer).is_dir():
        taken = f"the tokenizer in {tokenizer}"
    if taken and roles:
        raise UserError(f"roles={roles}: {taken} is taken as it is")
    if normalizer_names(tokenizer_settings()) and taken:
        raise UserError(f"normalize={normalize}: {taken} is taken as it is")


def check_dataset():
    """The data set is a folder below data/, and not data/ itself."""
    data = Path(os.path.realpath("data"))
    place = Path(os.path.realpath(Path("data", dataset.strip("\0"))))
    if "\0" in dataset or place in (data, *data.parents):
        raise UserError(f"dataset={dataset!r}: expected a name: the result is data/<dataset>")


def check_special_tokens():
    names = {name for name in special_tokens if isinstance(name, str) and name}
    if not 2 <= len(names) == len(special_tokens):
        raise UserError(f"special_tokens={special_tokens}: expected two or more different names")
    check_role_names(tokenizer_settings())


def check_numbers():
    check_range("shard_tokens", shard_tokens, 1, 2**31 - 1)  # a shard's header counts in 32 bits
    check_range("threads", threads, 0, 10_000)  # so many processes no machine has
    check_range("max_documents", max_documents, 1)
    check_range("shards", shards, 1)
    check_range("mix_tokens", mix_tokens, 1)
    check_range("tokenizer_bytes", tokenizer_bytes, 1)
    smallest = {"bpe": 256, "unigram": 256, "word": 1, "wordpiece": 2}
    if tokenizer in smallest:
        n_special = len(special_names(tokenizer_settings(), tokenizer))
        check_range("vocab_size", vocab_size, smallest[tokenizer] + n_special)
    numbers = [value for value in perplexity_band if type(value) in (int, float)]
    if len(numbers) != 2 or len(perplexity_band) != 2:
        raise UserError(f"perplexity_band={perplexity_band}: expected two numbers")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: expected 0 or more and less than 1")
    if not 0 < near_threshold <= 1:
        raise UserError(f"near_threshold={near_threshold}: expected above 0 and up to 1")


def check_range(name, value, least, most=2**62):
    if value is None:
        return
    if value < least:
        raise UserError(f"{name}={value}: expected {least} or more")
    if value > most:
        raise UserError(f"{name}={value}: expected {most} or less")


def check_names():
    formats = list(dict.fromkeys(["text", *FORMATS.values()]))
    if input_format not in (None, *formats):
        raise UserError(f"input_format={input_format}: expected one of {', '.join(formats)}")
    symbols_pattern(clean_symbols or True)  # which refuses kinds that it does not know
    if save_cleaned and save_cleaned not in CLEANED:
        raise UserError(f"save_cleaned={save_cleaned}: expected one of {', '.join(CLEANED)}")
    if save_cleaned.endswith(".zst"):
        require_zst(f"save_cleaned={save_cleaned}")
    for name in steps.split(","):
        if name and name not in (*STEPS, *COMPARING):
            raise UserError(f"steps: {name!r}: expected some of {','.join([*STEPS, *COMPARING])}")
        if name == "language":
            language_model()  # or a line that says what to install
    if languages and len(set(languages.split(","))) != 2:
        raise UserError(f"languages={languages}: expected two fields, such as en,de")
    if task is not None and task not in TASKS:
        raise UserError(f"--task={task}: expected {', '.join(TASKS)}")
    if part and task:
        raise UserError(f"--part={part}: a task set is made by one process: leave it out")


# --------------------------------------------------------------------------------------------------


def next_command():
    """The command that trains on what was made here, or None where there is no train.py."""
    from barelm.ending import command  # and with it the network, which no worker needs

    return command("train.py", {"dataset": dataset}, {"out_dir": f"out/{dataset}"})


def main():
    check_settings()
    folder = Path("data") / dataset
    begun = time.monotonic()
    if inspect is not None:
        tok = finished_tokenizer(tokenizer, tokenizer_settings())
        show_tokens(tok or Tokenizer.from_folder(folder), inspect)
        return
    noting = nullcontext()
    if part:
        run = Part(part, folder / "work")
        noting = run.noting_failure()
    else:
        run = setup("cpu", timedelta(days=7))  # so long may a rank wait for another
    if run.is_main:
        refuse_folders(folder)
    n_workers = worker_count(threads)
    with noting, working_folder(folder, run) as work:
        with start_pool(n_workers) as pool:  # None where one process is enough
            make(run, folder, work, pool.map if pool else map)
    seconds = duration(time.monotonic() - begun)
    if part and not run.is_main:
        print(f"{run.name()}: done in {seconds}; {run.name(0)} writes {folder}")
    if run.is_main:
        then = None if task else next_command()
        print(f"wrote {folder} in {seconds}" + (f": {then}" if then else ""))


if __name__ == "__main__":
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    main()
