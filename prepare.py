"""Raw text in; a trained tokenizer and token shards out.

    python prepare.py                                   # the default: Python's own standard library
    python prepare.py --source=notes.txt --dataset=notes
    python prepare.py config/shakespeare.py             # a named download
    python prepare.py --source=corpus.jsonl.gz --tokenizer=gpt2 --dataset=mine
    python prepare.py --inspect="def f(x):"             # its tokens, once the data is there

Writes data/<dataset>/: tokenizer.json, tokenizer_config.json, train_*.bin and val_*.bin (llm.c's
format), meta.json. The same input gives the same bytes. All tokenizers but wordpiece, which keeps
no white space, give back a text whose words and characters they know.
"""

from config import configure, settings

source = "python"  # python, shakespeare, tinystories, fineweb10B, a file or a folder
dataset = "python"  # the result is data/<dataset>
tokenizer = "bpe"  # bpe, unigram, wordpiece, word, char, byte, a tiktoken name, a folder with one
vocab_size = 4096  # tokens of a tokenizer trained here, special ones included
normalize = ""  # of the text before it is tokenized: nfc or nfkc, lower, or both with a comma
special_tokens = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]  # start, pad, chat's
inspect: str | None = None  # print this text's tokens and the vocabulary's statistics, no more
val_fraction = 0.1  # of the documents, by their hash; of the characters under 20 documents
separator: str | None = None  # a text file is cut into documents here
max_documents: int | None = None  # stop after so many
shards = 103  # of fineweb10B: training shards of 100M tokens to download, of 103
shard_tokens = 100_000_000  # tokens of a shard written here
threads = 0  # for counting and encoding; 0: all cores
seed = 0  # unused here, as yet: nothing is drawn
device = "cpu"  # unused here, as yet

if __name__ == "__main__":
    configure(globals())

import gc
import gzip
import hashlib
import heapq
import json
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
import time
import zlib
from collections import Counter, defaultdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex
import requests
import tiktoken

import model
from model import UserError

BATCH = 2_000_000  # characters that are in hand at once, for each thread

# --------------------------------------------------------------------------------------------------
# Downloads

HUB = "https://huggingface.co/datasets/"
FINEWEB = HUB + "kjj0/fineweb10B-gpt2/resolve/main/"
DOWNLOADS = {  # name: (address, sha256 or None, what separates its documents or None)
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        None,
    ),
    "tinystories": (
        HUB + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
        None,
        "<|endoftext|>",
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
# Documents

SUITES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
CUT = regex.compile(r"(?<=\S\n)(?=\p{L})")  # no split pattern has a piece that spans this


def documents(skipped):
    """Yield the texts of `source`, always in the same order; files left out go to `skipped`."""
    path = Path(source)
    if source == "python":
        yield from read_folder(sysconfig.get_path("stdlib"), skipped, ".py", SUITES)
    elif source in DOWNLOADS:
        url, sha256, between = DOWNLOADS[source]
        path = download(url, Path("data/downloads") / f"{source}.txt", sha256)
        yield from read_text(path, separator or between)
    elif path.is_dir():
        yield from read_folder(path, skipped)
    elif not path.is_file():
        names = ", ".join(["python", *DOWNLOADS, "fineweb10B"])
        raise UserError(f"--source={source}: no such file or folder, nor one of {names}")
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from read_jsonl(path)
    else:
        yield from read_text(path, separator)


def read_text(path, between):
    """The documents of a text file: what is `between` them cuts it, or else it is one."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            held = "" if between else file.read()
            while block := file.read(1 << 20):
                *whole, held = (held + block).split(between)
                yield from (text.strip("\n") for text in whole)
            yield held.strip("\n") if between else held
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}): convert it") from None


def read_folder(folder, skipped, ending="", avoid=()):
    """Every file of this ending in and below a folder, in the order of their names; hidden ones,
    those in folders to avoid and those that are no UTF-8 are left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in avoid)
        for path in (Path(place, name) for name in sorted(files) if name.endswith(ending)):
            if path.name[0] != "." and path.is_file():
                try:
                    yield path.read_bytes().decode()
                except UnicodeDecodeError:
                    skipped.append(str(path.relative_to(folder)))


def read_jsonl(path):
    """The `text` fields of a JSONL file, gzipped where its name says so."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    text = json.loads(line)["text"]
                    # Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.
                    yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged after line {number}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        found = line[:60].decode(errors="replace")
        raise UserError(f'{path}:{number}: expected {{"text": "..."}}, found {found!r}') from None


def divide(texts):
    """Yield (split, text): to val by the document's hash, so that it stays where it is when others
    are added; of fewer than 20 documents the last val_fraction of all characters."""
    texts = islice((text for text in texts if text.strip()), max_documents)
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
        yield from ((s, part) for s, part in (("train", text[:cut]), ("val", text[cut:])) if part)


def pieces_of(text):
    """Cut a long text into parts that are tokenized alone as they are in the whole."""
    at = 0
    while len(text) - at > BATCH and (cut := CUT.search(text, at + BATCH)):
        yield text[at : cut.start()]
        at = cut.start()
    yield text[at:]


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
    floor, heap = 4 * max(pairs.values(), default=0), []  # the heap: pairs from floor up
    while len(merges) < n_merges and (heap or floor > 2):
        if not heap:
            floor = max(floor // 4, 2)
            heap = sorted((-n, pair) for pair, n in pairs.items() if n >= floor)  # is a heap
            continue
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n:  # an old count: counts only fall after a pair was pushed
            if pairs[pair] >= floor:
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
            if n >= floor:
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


def forward(edges, ends, scores, best=False):
    """The log-probability of reaching each node, by all paths or by the best; scores: of tokens."""
    reach, cuts = np.zeros(ends[-1] + 1), np.flatnonzero(np.diff(edges[3], prepend=0, append=-1))
    for a, b in zip(cuts, cuts[1:]):
        first, last, token, _ = edges[:, a:b]
        sums, new = reach[first] + scores[token], np.flatnonzero(np.diff(last, prepend=-1))
        top = np.maximum.reduceat(sums, new)
        if not best:
            parts = np.exp(sums - np.repeat(top, np.diff(new, append=b - a)))
            top += np.log(np.add.reduceat(parts, new))
        reach[last[new]] = top
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
        loss = expected * (scores - forward(inner, bounds, scores, best=True)[0][bounds])
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
    pre = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    decoder, unknown = {"type": "Fuse"}, UNKNOWN if UNKNOWN in special else None
    if kind in ("BPE", "Unigram"):
        decoder = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        pre = {"type": "Sequence", "pretokenizers": [pre, decoder]}
    if kind == "WordPiece":
        pre |= {
            "behavior": "Removed",
            "invert": True,
        }  # what is no piece goes, which is white space
        decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    if kind == "Unigram":
        body |= {"unk_id": None, "byte_fallback": False, "vocab": [*map(list, vocab.items())]}
    else:
        # Special tokens that the vocabulary lacks get other ids where it has gaps (cl100k_base).
        body = {"unk_token": unknown} | body | {"vocab": vocab | special}
    steps = [{"type": name} for name in normalizers()]
    normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    spec = dict(version="1.0", truncation=None, padding=None)
    spec |= {"added_tokens": [{"id": id, "content": t} | flags for t, id in special.items()]}
    spec |= dict(normalizer=normalizer, pre_tokenizer=pre, post_processor=None, decoder=decoder)
    spec |= {"model": {"type": kind} | body}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special_tokens[0]}
    config |= {"eos_token": special_tokens[0], "pad_token": special_tokens[1]}
    config |= {"unk_token": unknown, "clean_up_tokenization_spaces": False}
    if {"<|im_start|>", "<|im_end|>"} <= special.keys():
        config |= {"chat_template": model.CHATML}
    return model.Tokenizer(spec, config)


def spell(token):
    """A token of bytes in GPT-2's letters, as tokenizer.json has it."""
    return "".join(map(LETTERS.__getitem__, token))


def bpe_files(ranks, special, merges, split, ignore_merges=False):
    """The files of a byte-level BPE tokenizer: ranks {bytes: id}, merges as pairs of bytes."""
    body = dict(dropout=None, continuing_subword_prefix=None, end_of_word_suffix=None)
    body |= dict(fuse_unk=False, byte_fallback=False, ignore_merges=ignore_merges)
    body |= {"merges": [[spell(a), spell(b)] for a, b in merges]}
    return tokenizer_files("BPE", {spell(t): i for t, i in ranks.items()}, special, split, **body)


def special_ids(at, *more):
    """Ids from `at` up: of `more`, then of the special tokens (the first starts a document, the
    second pads, and only with <|im_start|> and <|im_end|> among them is there a chat template)."""
    return {t: at + i for i, t in enumerate(dict.fromkeys([*more, *special_tokens]))}


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
    pieces, room = {piece.encode(): n for piece, n in counts.items()}, size - len(special_tokens)
    if kind == "char":
        return char_tokenizer(counts)
    gc.disable()  # it would walk a million lists again and again, and none is in a cycle
    try:
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
    names = [t for t in special_tokens if isinstance(t, str) and t]
    if len(names) < 2 or len({*names}) < len(special_tokens):
        raise UserError(f"special_tokens={special_tokens}: expected two or more different names")
    least = {"bpe": 256, "unigram": 256, "word": 2, "wordpiece": 3}.get(tokenizer)
    if least is not None and vocab_size < least + len(special_tokens):
        least += len(special_tokens)
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
    colour = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
    ids, names = tok.encode(text), {i: name.encode() for name, i in tok.special.items()}
    paint = lambda i, s: f"\x1b[30;48;5;{(152, 223, 182)[i % 3]}m{s}\x1b[0m" if colour else s

    def visible(id):
        token = (names.get(id) or tok.token_bytes(id)).decode(errors="backslashreplace")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)

    bar = "" if colour else "|"
    print(bar.join(paint(i, visible(id)) for i, id in enumerate(ids)))
    print(" ".join(paint(i, str(id)) for i, id in enumerate(ids)))
    print(f"tokens: {len(ids):,}")
    print(f"bytes per token: {len(text.encode()) / max(1, len(ids)):.2f}")
    lengths = Counter(len(tok.token_bytes(i)) for i in range(tok.n_vocab))
    ordinary = [i for i in range(tok.n_vocab) if tok.token_bytes(i)]
    single = sum(len(tok.token_bytes(i)) == 1 for i in ordinary)
    print(f"vocabulary: {tok.n_vocab:,}, of them {len(names)} special, {single:,} of one byte")
    longest = sorted(ordinary, key=lambda i: -len(tok.token_bytes(i)))[:10]
    print("longest:", "|".join(map(visible, longest)))
    most = max(lengths[n] for n in lengths if n)
    for n in sorted(lengths.keys() - {0}):
        print(f"{n:4} bytes {lengths[n]:7,} {'#' * round(50 * lengths[n] / most)}")


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
                self.file, self.held = open(self.folder / f"{self.names[-1]}.tmp", "wb"), 0
                self.file.write(bytes(1024))
            here, ids = ids[: shard_tokens - self.held], ids[shard_tokens - self.held :]
            self.file.write(here.astype(self.dtype))
            self.held, self.tokens = self.held + len(here), self.tokens + len(here)
            if self.held == shard_tokens:
                self.close()

    def close(self):
        if self.file is not None:
            self.file.seek(0)
            self.file.write(np.array([*self.kind, self.held], "<i4").tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


def write_shards(folder, tok, texts, size, workers):
    """Encode (split, text) pairs of `size` bytes: {split: ShardWriter}, closed, not yet renamed."""
    writers = {split: ShardWriter(folder, split, tok.n_vocab > 65536) for split in ("train", "val")}
    start = np.array([tok.eot_id])
    show, begun, done = model.Progress(), time.monotonic(), 0
    parts = ((s, i == 0, p) for s, text in texts for i, p in enumerate(pieces_of(text)))
    for group in in_rounds(parts, BATCH * workers):
        encoded = tok.encode_batch([text for *_, text in group], workers)
        for (split, first, text), ids in zip(group, encoded):
            if first:
                writers[split].write(start)
            writers[split].write(ids)
            done += len(text.encode())
        tokens, seconds = sum(w.tokens for w in writers.values()), time.monotonic() - begun
        speed = f"{done / seconds / 1e6:.1f} MB/s, {done / tokens:.2f} bytes per token"
        show(f"encoding: {done / 1e6:,.1f} of {size / 1e6:,.1f} MB, {speed}", last=done == size)
    for writer in writers.values():
        writer.close()
    return writers


def commit(folder, tok, meta):
    """Make finished temporary shards the dataset. meta.json goes first and comes last: a folder
    without it is no dataset, so that a process killed in between leaves nothing that loads."""
    aside = ("threads", "device", "seed", "inspect")
    kept = {k: v for k, v in settings(globals()).items() if k not in aside}
    meta = {"settings": kept, "n_vocab": tok.n_vocab} | meta
    texts = {"tokenizer.json": tok.spec, "tokenizer_config.json": tok.config, "meta.json": meta}
    for name, value in texts.items():
        model.write_json(folder / f"{name}.tmp", value)
    (folder / "meta.json").unlink(missing_ok=True)
    for old in [*folder.glob("train_*.bin"), *folder.glob("val_*.bin")]:
        old.unlink()
    for name in meta["train"]["shards"] + meta["val"]["shards"] + list(texts):
        os.replace(folder / f"{name}.tmp", folder / name)
    for split in ("train", "val"):
        print(
            f"{split}: " + ", ".join(f"{n:,} {k}" for k, n in meta[split].items() if k != "shards")
        )


# --------------------------------------------------------------------------------------------------
# Putting it together


def use_fineweb(folder):
    """Download FineWeb shards that are tokenized already, as they are."""
    global tokenizer
    tokenizer = "gpt2"  # whatever was asked: it made them
    tok, meta, kept = finished_tokenizer(), {}, Path("data/downloads/fineweb10B")
    for split, numbers in {"val": [0], "train": range(1, shards + 1)}.items():
        meta[split] = {"tokens": 0, "shards": [f"{split}_{i:06d}.bin" for i in numbers]}
        for name in meta[split]["shards"]:
            path = download(f"{FINEWEB}fineweb_{name}", kept / name)
            header = np.fromfile(path, "<i4", 3).tolist()
            if header[:2] != [20240520, 1] or path.stat().st_size != 1024 + 2 * header[-1]:
                path.unlink()
                raise UserError(f"{path}: removed: not the token shard that was expected")
            meta[split]["tokens"] += header[-1]
    folder.mkdir(parents=True, exist_ok=True)
    for name in meta["train"]["shards"] + meta["val"]["shards"]:
        try:
            os.link(kept / name, folder / f"{name}.tmp")  # the same bytes on the disk, not a copy
        except OSError:  # another file system, or one without links
            shutil.copyfile(kept / name, folder / f"{name}.tmp")
    commit(folder, tok, meta)


def survey(workers):
    """One pass over the documents, for what there is and what a tokenizer is trained on: (totals
    {split: Counter}, {piece or character: count}, sha256, names of files skipped)."""
    totals, counts = {"train": Counter(), "val": Counter()}, Counter()
    digest, skipped, show = hashlib.sha256(), [], model.Progress()
    pattern, forms = PATTERNS.get(tokenizer), normalizers()
    with multiprocessing.Pool(workers if pattern else 1) as pool:
        for group in in_rounds(divide(documents(skipped)), BATCH * workers):
            for split, text in group:
                data = text.encode()
                digest.update(len(data).to_bytes(8, "big") + data)
                special = any(name in text for name in special_tokens)
                totals[split] += Counter(documents=1, bytes=len(data), special=special)
            if pattern:
                texts = (model.normalize(t, forms) for split, t in group if split == "train")
                parts = ((pattern, part) for text in texts for part in pieces_of(text))
                for some in pool.imap(count_pieces, in_rounds(parts, BATCH // 4)):
                    counts.update(some)
            show(f"reading: {(totals['train'] + totals['val'])['bytes'] / 1e6:,.1f} MB")
    return totals, counts, digest.hexdigest(), skipped


def build(folder, tok, workers):
    """Read the source, train the tokenizer unless there is one, write data/<dataset>."""
    totals, counts, sha256, skipped = survey(workers)
    total = totals["train"] + totals["val"]
    if not totals["train"]["bytes"]:
        raise UserError(f"--source={source}: no text for training in it")
    if skipped:
        print(f"skipped {len(skipped)} files that are not UTF-8, such as {skipped[0]}")
    if total["special"]:
        print(f"{total['special']} documents hold the name of a special token: it is taken as text")
    if tok is None:
        tok = train_tokenizer(tokenizer, counts, vocab_size, model.Progress())
        if tok.n_vocab < vocab_size and tokenizer != "char":
            print(
                "the tokenizer is smaller than vocab_size: the text has no more that occurs twice"
            )
    print(f"tokenizer: {tokenizer}, {tok.n_vocab:,} tokens")
    folder.mkdir(parents=True, exist_ok=True)
    writers = write_shards(folder, tok, divide(documents([])), total["bytes"], workers)
    meta = {"source_sha256": sha256, "skipped": skipped}
    for split, writer in writers.items():
        meta[split] = {key: totals[split][key] for key in ("documents", "bytes")}
        meta[split] |= {"tokens": writer.tokens, "shards": writer.names}
    commit(folder, tok, meta)


def main():
    limits = {"shard_tokens": 1, "threads": 0, "max_documents": 1, "shards": 1}
    for key, least in limits.items():
        if (value := globals()[key]) is not None and value < least:
            raise UserError(f"{key}={value}: expected {least} or more")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: expected 0 or more and less than 1")
    check_tokenizer()
    folder, begun = Path("data") / dataset, time.monotonic()
    if inspect is not None:
        tok = finished_tokenizer() or model.Tokenizer.from_folder(folder)
        return show_tokens(tok, inspect)
    clear = lambda: [left.unlink() for left in folder.glob("*.tmp")]
    clear()  # what a killed run left, which may be a link to a download
    try:
        if source == "fineweb10B":
            use_fineweb(folder)
        else:
            build(folder, finished_tokenizer(), threads or os.cpu_count() or 1)
    except OSError as error:  # a full disk, a file that may not be read
        why = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"{why}; nothing was changed") from None
    finally:
        clear()
    took = model.duration(time.monotonic() - begun)
    print(f"wrote {folder} in {took}: python train.py --dataset={dataset}")


if __name__ == "__main__":
    main()
