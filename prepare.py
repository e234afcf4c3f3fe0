"""Raw text in; a trained tokenizer and token shards out.

    python prepare.py                                   # the default: Python's own standard library
    python prepare.py --source=notes.txt --dataset=notes
    python prepare.py config/shakespeare.py             # a named download
    python prepare.py --source=corpus.jsonl.gz --tokenizer=gpt2 --dataset=mine

Writes data/<dataset>/: tokenizer.json, tokenizer_config.json, train_*.bin and val_*.bin (llm.c's
format), meta.json. The same input gives the same bytes.
"""

from config import configure, settings

source = "python"  # python, shakespeare, tinystories, fineweb10B, or a file (.txt .jsonl .jsonl.gz) or folder
dataset = "python"  # the result is data/<dataset>
tokenizer = (
    "bpe"  # bpe (trained here), byte, char, a tiktoken name (gpt2), or a folder with tokenizer.json
)
vocab_size = 4096  # tokens of a tokenizer trained here, special ones included
val_fraction = 0.1  # of the documents, by their hash; of the characters under 20 documents
separator: str | None = None  # a text file is cut into documents here
max_documents: int | None = None  # stop after so many
shards: int | None = (
    None  # of fineweb10B: training shards of 100M tokens to download; none: all 103
)
shard_tokens = 100_000_000  # tokens of a shard written here
threads = 0  # for counting and encoding; 0: all cores
seed = 0  # unused here, as yet: nothing is drawn
device = "cpu"  # unused here, as yet

if __name__ == "__main__":
    configure(globals())

import gzip
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex

import model
from model import UserError

SPLIT = (  # Qwen2's, which every reader of tokenizer.json and of GGUF knows
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
BATCH = 2_000_000  # characters that are in hand at once, for each thread

# --------------------------------------------------------------------------------------------------
# Downloads

HUB = "https://huggingface.co/datasets/"
TINY_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
DOWNLOADS = {  # name: [(url, file, sha256 or None)]
    "shakespeare": [
        (
            TINY_SHAKESPEARE,
            "tinyshakespeare.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        )
    ],
    "tinystories": [
        (
            HUB + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
            "tinystories.txt",
            None,
        )
    ],
}
FINEWEB = HUB + "kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"


def download(url, path, sha256=None, tries=5):
    """Fetch url into path: resumed, retried, checked, and under its name only when it is whole."""
    import requests  # here, since nothing else needs the network

    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, show = path.with_name(path.name + ".part"), model.Progress()
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        try:
            headers = {"Range": f"bytes={have}-"} if have else {}
            # identity: a length that counts the bytes we write
            headers |= {"Accept-Encoding": "identity"}
            with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
                if answer.status_code == 416:  # the part is longer than the file, or is all of it
                    part.unlink()
                    continue
                if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
                    raise UserError(
                        f"{url}: answered {answer.status_code} {answer.reason}: is the address right?"
                    )
                answer.raise_for_status()
                if answer.status_code != 206:
                    have = 0  # the server does not resume: from the beginning
                size = (
                    int(answer.headers["Content-Length"]) + have
                    if "Content-Length" in answer.headers
                    else None
                )
                with open(part, "ab" if have else "wb") as file:
                    for piece in answer.iter_content(1 << 20):
                        file.write(piece)
                        have += len(piece)
                        show(
                            f"{path.name}: {have / 1e6:,.1f} of {size / 1e6 if size else 0:,.1f} MB"
                        )
            if size is not None and have != size:
                raise requests.ConnectionError(f"{have} of {size} bytes came")
            break
        except requests.RequestException as error:
            if attempt + 1 == tries:
                raise UserError(
                    f"{url}: {type(error).__name__} after {tries} tries: {error}; run it again to go on from {have:,} bytes"
                ) from None
            show.note(
                f"{path.name}: {type(error).__name__}; trying again ({attempt + 2} of {tries})"
            )
            time.sleep(min(2**attempt, 30))
    else:
        raise UserError(f"{url}: no whole file in {tries} tries")
    show(f"{path.name}: {have / 1e6:,.1f} MB", last=True)
    if sha256:
        digest = hashlib.sha256()
        with open(part, "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
        found = digest.hexdigest()
        if found != sha256:
            part.unlink()
            raise UserError(
                f"{url}: its sha256 is {found}, not {sha256}: removed; another file is at the address now"
            )
    os.replace(part, path)
    return path


# --------------------------------------------------------------------------------------------------
# Documents

SUITES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(skipped):
    """Yield the texts of `source`, in an order of their own; files left out are added to `skipped`."""
    path = Path(source)
    if source == "python":
        path = Path(sysconfig.get_paths()["stdlib"])
        yield from read_folder(
            path, lambda p: p.suffix == ".py" and not SUITES & set(p.parts), skipped
        )
    elif source in DOWNLOADS:
        for url, name, sha256 in DOWNLOADS[source]:
            yield from read_text(download(url, Path("data/downloads") / name, sha256))
    elif path.is_dir():
        yield from read_folder(path, lambda p: not any(part[0] == "." for part in p.parts), skipped)
    elif not path.is_file():
        names = ", ".join(["python", *DOWNLOADS, "fineweb10B"])
        raise UserError(f"--source={source}: no such file or folder, nor one of {names}")
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from read_jsonl(path)
    else:
        yield from read_text(path)


def read_text(path):
    """The documents of a text file: cut at `separator`, or all of it as one."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            held = ""
            while block := file.read(1 << 20 if separator else -1):
                *whole, held = (held + block).split(separator) if separator else (held + block,)
                yield from (text.strip("\n") for text in whole)
            yield held.strip("\n") if separator else held
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start} of what was read): convert it"
        ) from None


def read_folder(folder, wanted, skipped):
    """Every wanted file below a folder as a document, in the order of their names."""
    for path in sorted(
        p for p in folder.rglob("*") if wanted(p.relative_to(folder)) and p.is_file()
    ):
        data = path.read_bytes()
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError:
            skipped.append(str(path.relative_to(folder)))


def read_jsonl(path):
    """The `text` fields of a JSONL file, gzipped where its name says so."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, TypeError, KeyError) as error:
                    why = "no field 'text'" if isinstance(error, (KeyError, TypeError)) else error
                    raise UserError(f'{path}:{number}: {why}: expected {{"text": "..."}}') from None
                if not isinstance(text, str):
                    raise UserError(
                        f'{path}:{number}: \'text\' is no string: expected {{"text": "..."}}'
                    )
                # A lone half of a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.
                yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file: {error}") from None


def divide(texts):
    """Yield (split, text): to val by the document's hash, so that it stays where it is when others are
    added; of fewer than 20 documents the last val_fraction of all characters."""
    texts = (text for text in texts if text.strip())
    texts = islice(texts, max_documents)
    first = list(islice(texts, 20))
    if len(first) == 20:
        for text in chain(first, texts):
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            yield ("val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"), text
        return
    total = sum(map(len, first))
    left = total - round(total * val_fraction)  # characters that are for training
    for text in first:
        cut, left = max(0, min(len(text), left)), left - len(text)
        yield from (
            (split, part) for split, part in (("train", text[:cut]), ("val", text[cut:])) if part
        )


def pieces_of(text):
    """Cut a long text where no token can span: between a line's end and what follows it."""
    at = 0
    while len(text) - at > BATCH:
        cut = CUT.search(text, at + BATCH)
        if cut is None:
            break
        yield text[at : cut.start()]
        at = cut.start()
    yield text[at:]


CUT = regex.compile(r"(?<=\S\n)(?=\S)")


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


# --------------------------------------------------------------------------------------------------
# Tokenizers


def count_pieces(texts):
    """How often each piece of the split pattern occurs in a list of texts."""
    counts, pattern = Counter(), regex.compile(SPLIT)
    for text in texts:
        counts.update(pattern.findall(text))
    return counts


def train_bpe(pieces, n_merges, show=lambda line: None):
    """Byte-pair encoding (Sennrich et al. 2016) over {piece: count}, pieces being bytes.

    Returns the merges in order, as pairs of bytes: each time the commonest adjacent pair, the lowest
    ids among equals (a byte is its own id), until no pair occurs twice. A pair whose bytes are a
    token already is passed over. Counts are kept up to date only in the pieces that hold the pair.
    """
    tokens, known, merges = [bytes([b]) for b in range(256)], set(), []
    words, counts = [list(p) for p in pieces], list(pieces.values())
    pairs, where = Counter(), defaultdict(set)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while heap and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n:  # an old count: counts only fall after a pair was pushed
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if n > -2:
            break
        a, b = pair
        if tokens[a] + tokens[b] in known:
            continue
        new = len(tokens)
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        known.add(tokens[new])
        made = set()
        for w in where.pop(pair):
            word, merged, i = words[w], [], 0
            for p in zip(word, word[1:]):
                pairs[p] -= counts[w]
            while i < len(word):
                together = word[i] == a and word[i + 1 : i + 2] == [b]
                merged.append(new if together else word[i])
                i += 1 + together
            for p in zip(merged, merged[1:]):
                pairs[p] += counts[w]
                if new in p:
                    where[p].add(w)
                    made.add(p)
            words[w] = merged
        for p in made:
            heapq.heappush(heap, (-pairs[p], p))
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


def tokenizer_files(kind, vocab, merges, special, split, ignore_merges=False):
    """tokenizer.json and tokenizer_config.json, as a Tokenizer: vocab {bytes or character: id}."""
    added = dict(id=0, content="", single_word=False, lstrip=False, rstrip=False, normalized=False)
    pre = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    if kind == "BPE":
        letters = model.byte_letters()
        spell = lambda token: "".join(letters[b] for b in token)
        bytelevel = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        pre = {"type": "Sequence", "pretokenizers": [pre, bytelevel]}
        decoder = bytelevel
        body = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
        }
        body |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
        body |= {"ignore_merges": ignore_merges, "vocab": {spell(t): i for t, i in vocab.items()}}
        body |= {"merges": [[spell(a), spell(b)] for a, b in merges]}
    else:
        decoder = {"type": "Fuse"}
        body = {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added | {"id": i, "content": t, "special": True} for t, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": decoder,
        "model": body,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[1],
        "unk_token": UNKNOWN if kind == "WordLevel" else None,
        "clean_up_tokenization_spaces": False,
        "chat_template": model.CHATML,
    }
    return model.Tokenizer(spec, config)


UNKNOWN = "<|unk|>"


def bpe_tokenizer(merges):
    """The byte-level BPE tokenizer with these merges: bytes, merges, special tokens, in this order."""
    vocab = {bytes([b]): b for b in range(256)}
    vocab |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    return tokenizer_files(
        "BPE", vocab, merges, {t: len(vocab) + i for i, t in enumerate(SPECIAL)}, SPLIT
    )


def char_tokenizer(characters):
    """One token a character; a character that training text lacks becomes the unknown token."""
    vocab = {c: i for i, c in enumerate([*sorted(characters), UNKNOWN])}
    special = {t: len(vocab) - 1 + i for i, t in enumerate([UNKNOWN, *SPECIAL])}
    return tokenizer_files("WordLevel", vocab, [], special, model.CHARACTERS)


def tiktoken_tokenizer(name):
    """A named tiktoken encoding, with the special tokens that it lacks added behind."""
    import requests
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        names = ", ".join(["bpe", "byte", "char", *tiktoken.list_encoding_names()])
        raise UserError(
            f"--tokenizer={name}: expected one of {names}, or a folder with tokenizer.json"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except requests.RequestException as error:
        raise UserError(f"--tokenizer={name}: its table could not be downloaded: {error}") from None
    vocab, special = encoding._mergeable_ranks, dict(encoding._special_tokens)
    for token in SPECIAL:
        special.setdefault(token, max([*vocab.values(), *special.values()]) + 1)
    # Oniguruma, which reads tokenizer.json, takes {1,3}+ for a repeated repeat.
    split = regex.sub(r"(\{\d+,\d*\})\+", r"\1", encoding._pat_str)
    return tokenizer_files("BPE", vocab, recover_merges(vocab), special, split, ignore_merges=True)


def make_tokenizer(pieces, characters, show):
    """The tokenizer that `tokenizer` names, trained on the counts where it is trained."""
    if tokenizer == "byte":
        return bpe_tokenizer([])
    if tokenizer == "char":
        return char_tokenizer(characters)
    if tokenizer != "bpe":
        is_folder = Path(tokenizer).is_dir()
        return (
            model.Tokenizer.from_folder(tokenizer) if is_folder else tiktoken_tokenizer(tokenizer)
        )
    merges = train_bpe(pieces, vocab_size - 256 - len(SPECIAL), show)
    return bpe_tokenizer(merges)


# --------------------------------------------------------------------------------------------------
# Shards


class ShardWriter:
    """Token shards of one split in llm.c's format, under temporary names until they are renamed."""

    def __init__(self, folder, split, wide):
        self.folder, self.split, self.file, self.names = folder, split, None, []
        self.dtype, self.kind = ("<u4", (20240801, 7)) if wide else ("<u2", (20240520, 1))
        self.tokens, self.held = 0, 0

    def write(self, ids):
        while len(ids):
            if self.file is None:
                self.names.append(f"{self.split}_{len(self.names):06d}.bin")
                self.file, self.held = open(self.folder / (self.names[-1] + ".tmp"), "wb"), 0
                self.file.write(bytes(1024))
            room = shard_tokens - self.held
            self.file.write(ids[:room].astype(self.dtype).tobytes())
            self.held, self.tokens = self.held + len(ids[:room]), self.tokens + len(ids[:room])
            ids = ids[room:]
            if self.held == shard_tokens:
                self.close()

    def close(self):
        if self.file is None:
            return
        header = np.zeros(256, "<i4")
        header[:3] = (*self.kind, self.held)
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None


def write_shards(folder, tok, texts, totals, workers):
    """Encode (split, text) pairs into shards: {split: ShardWriter}, closed but not yet renamed."""
    writers = {split: ShardWriter(folder, split, tok.n_vocab > 65536) for split in ("train", "val")}
    start = np.array([tok.bos_id if tok.bos_id is not None else tok.eos_ids[0]])
    show, begun, done = model.Progress(), time.monotonic(), 0
    parts = ((s, i == 0, p) for s, text in texts for i, p in enumerate(pieces_of(text)))
    for group in in_rounds(parts, BATCH * workers):
        for (split, first, text), ids in zip(
            group, tok.encode_batch([p[-1] for p in group], workers)
        ):
            if first:
                writers[split].write(start)
            writers[split].write(np.array(ids, dtype=np.int64))
            done += len(text.encode())
        tokens, seconds = sum(w.tokens for w in writers.values()), time.monotonic() - begun
        show(
            f"encoding: {done / 1e6:,.1f} of {totals / 1e6:,.1f} MB, {done / seconds / 1e6:.1f} MB/s, "
            f"{done / tokens:.2f} bytes per token",
            last=done == totals,
        )
    for w in writers.values():
        w.close()
    return writers


def commit(folder, names, tok, meta):
    """Make finished temporary shards the dataset. meta.json goes first and comes last: a folder
    without it is no dataset, so that a process killed in between leaves nothing that loads."""
    (folder / "meta.json").unlink(missing_ok=True)
    for old in [*folder.glob("train_*.bin"), *folder.glob("val_*.bin")]:
        if old.name not in names or (folder / (old.name + ".tmp")).exists():
            old.unlink()
    for name in names:
        with suppress(FileNotFoundError):  # a downloaded shard has its name already
            os.replace(folder / (name + ".tmp"), folder / name)
    model.write_json(folder / "tokenizer.json", tok.spec)
    model.write_json(folder / "tokenizer_config.json", tok.config)
    model.write_json(folder / "meta.json", meta)


def use_fineweb(folder):
    """Download FineWeb shards that are tokenized already, as they are."""
    tok, names, tokens = tiktoken_tokenizer("gpt2"), [], Counter()
    jobs = [("val", 0)] + [("train", i) for i in range(1, 1 + (103 if shards is None else shards))]
    for split, i in jobs:
        path = download(FINEWEB.format(split, i), folder / f"{split}_{i:06d}.bin")
        header = np.fromfile(path, "<i4", 3)
        if tuple(header[:2]) != (20240520, 1) or path.stat().st_size != 1024 + 2 * int(header[2]):
            path.unlink()
            raise UserError(f"{path}: not the token shard that was expected: removed; run it again")
        names.append(path.name)
        tokens[split] += int(header[2])
    commit(
        folder,
        names,
        tok,
        {"settings": kept_settings(), "tokens": dict(tokens), "n_vocab": tok.n_vocab},
    )
    print(f"{folder}: {dict(tokens)} tokens, vocabulary {tok.n_vocab:,}")


def kept_settings():
    """The settings that make the data what they are."""
    return {k: v for k, v in settings(globals()).items() if k not in ("threads", "device", "seed")}


def survey(workers, show):
    """One pass over the documents: per split the counts, and what a tokenizer is trained on.

    Returns (totals {split: Counter}, pieces {bytes: count}, characters, sha256, names skipped).
    """
    totals, pieces, characters = {"train": Counter(), "val": Counter()}, Counter(), set()
    digest, skipped = hashlib.sha256(), []
    with ExitStack() as stack:
        pool = None
        if tokenizer == "bpe":
            pool = stack.enter_context(multiprocessing.Pool(workers))
        for group in in_rounds(divide(documents(skipped)), BATCH * workers):
            for split, text in group:
                data = text.encode()
                digest.update(len(data).to_bytes(8, "big") + data)
                totals[split] += Counter(documents=1, bytes=len(data))
                totals[split]["special"] += any(s in text for s in SPECIAL)
                if tokenizer == "char" and split == "train":
                    characters.update(text)
            if pool:
                parts = ((p,) for split, text in group if split == "train" for p in pieces_of(text))
                batches = [[p for (p,) in b] for b in in_rounds(parts, BATCH // 4)]
                for counts in pool.imap(count_pieces, batches):
                    pieces.update(counts)
            n, size = (sum(t[k] for t in totals.values()) for k in ("documents", "bytes"))
            show(f"reading: {n:,} documents, {size / 1e6:,.1f} MB")
    return (
        totals,
        {p.encode(): n for p, n in pieces.items()},
        characters,
        digest.hexdigest(),
        skipped,
    )


def main():
    folder = Path("data") / dataset
    workers, begun = threads or os.cpu_count() or 1, time.monotonic()
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: expected 0 or more and less than 1")
    if tokenizer == "bpe" and vocab_size < 256 + len(SPECIAL):
        raise UserError(
            f"vocab_size={vocab_size}: 256 bytes and {len(SPECIAL)} special tokens need more"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if source == "fineweb10B":
        return use_fineweb(folder)
    show = model.Progress()
    totals, pieces, characters, sha256, skipped = survey(workers, show)
    size = sum(t["bytes"] for t in totals.values())
    if not totals["train"]["documents"]:
        raise UserError(f"--source={source}: no text for training in it")
    show(
        f"reading: {sum(t['documents'] for t in totals.values()):,} documents, {size / 1e6:,.1f} MB",
        last=True,
    )
    if skipped:
        print(
            f"skipped {len(skipped)} files that are not UTF-8: {', '.join(skipped[:3])}{' ...' * (len(skipped) > 3)}"
        )
    if special := sum(t["special"] for t in totals.values()):
        print(
            f"{special} documents hold the name of a special token: it is encoded as the text that it is"
        )
    tok = make_tokenizer(pieces, characters, show)
    print(
        f"tokenizer: {tokenizer}, {tok.n_vocab:,} tokens, after {model.duration(time.monotonic() - begun)}"
    )
    if tokenizer == "bpe" and tok.n_vocab < vocab_size:
        print(
            f"the text has no more pairs that occur twice: {tok.n_vocab:,} tokens, not {vocab_size:,}"
        )
    try:
        writers = write_shards(folder, tok, divide(documents([])), size, workers)
        names = [name for w in writers.values() for name in w.names]
        splits = {
            split: {k: totals[split][k] for k in ("documents", "bytes")}
            | {"tokens": w.tokens, "shards": w.names}
            for split, w in writers.items()
        }
        meta = {
            "settings": kept_settings(),
            "source_sha256": sha256,
            "n_vocab": tok.n_vocab,
            **splits,
        }
        commit(folder, names, tok, meta | {"skipped": skipped})
    except OSError as error:
        raise UserError(f"{folder}: cannot write: {error.strerror}; nothing was changed") from None
    finally:
        for left in folder.glob("*.bin.tmp"):
            left.unlink()
    for split, s in splits.items():
        print(
            f"{split}: {s['documents']:,} documents, {s['bytes']:,} bytes, {s['tokens']:,} tokens"
        )
    print(
        f"wrote {folder} in {model.duration(time.monotonic() - begun)}: python train.py --dataset={dataset}"
    )


if __name__ == "__main__":
    main()
