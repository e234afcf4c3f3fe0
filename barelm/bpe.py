"""Tokenizers that prepare.py makes: trained on text, or taken from tiktoken or a folder.

Byte-level BPE, words and characters are trained here; Unigram and WordPiece by the library
`tokenizers`. All are written as Hugging Face's tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import gc
import heapq
import json
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import regex
import requests
import tiktoken

from barelm.chat import CHATML
from barelm.download import why_no_answer
from barelm.encoders import byte_letters, import_tokenizers, library_errors
from barelm.run import UserError
from barelm.splits import BERT_WORDS, CHARACTERS, QWEN2_SPLIT, normalize
from barelm.token_steps import show_steps
from barelm.tokenizer import ROLES, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# The kinds that are trained, and what splits text into the pieces that are counted. Qwen2's pattern
# is ours, since every reader of tokenizer.json and of GGUF knows it.
PATTERNS = {"bpe": QWEN2_SPLIT, "unigram": QWEN2_SPLIT, "word": QWEN2_SPLIT}
PATTERNS |= {"wordpiece": BERT_WORDS, "char": CHARACTERS}
BY_LIBRARY = ("unigram", "wordpiece")
WITH_WORDS = ("char", "word", "wordpiece")  # which have a token for all unknown words
UNKNOWN = "<|unk|>"
NORMALIZERS = {"nfc": "NFC", "nfkc": "NFKC", "lower": "Lowercase"}  # in the order they are applied

BYTES = [bytes([byte]) for byte in range(256)]
LETTERS = byte_letters()
# QWEN2_SPLIT on ASCII text, for Python's own re: twice as fast.
ASCII_SPLIT = QWEN2_SPLIT.replace(r"?\p{L}", "?[A-Za-z]")
ASCII_SPLIT = ASCII_SPLIT.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", r"\d")
ASCII = re.compile(ASCII_SPLIT, re.ASCII)

MAX_TOKEN = 16  # bytes of a Unigram token, as in SentencePiece
MAX_PIECE = 256  # bytes of a piece that Unigram is trained on: the head of a longer one
MAX_PIECES = 20_000_000  # pieces that the library is given to count again
MARK = " "  # a character that no piece has in GPT-2's letters


def silent(line: str) -> None:
    """Progress that nobody sees."""


@dataclass
class TokenizerSettings:
    """What prepare.py's keys of these names say of a tokenizer made here."""

    special_tokens: list = field(
        default_factory=lambda: ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    )
    roles: dict | None = None  # {role: token}, roles being bos, eos, pad, unk, cls, sep, mask
    normalize: str = ""  # nfc or nfkc, lower, with commas


DEFAULT = TokenizerSettings()


# --------------------------------------------------------------------------------------------------
# Training


def count_pieces(texts: Iterable[str], pattern: str = QWEN2_SPLIT) -> Counter:
    """{piece: how often it occurs in the texts}, as a Counter."""
    counts = Counter()
    for text in texts:
        if pattern == QWEN2_SPLIT and text.isascii():
            counts.update(ASCII.findall(text))
        else:
            counts.update(regex.findall(pattern, text))
    return counts


def train_bpe(
    pieces: dict[bytes, int], n_merges: int, show: Callable = silent
) -> list[tuple[bytes, bytes]]:
    """Byte-pair encoding (Sennrich et al. 2016) over {piece: count}, pieces being bytes. Returns
    the merges, pairs of bytes, in their order.

    Each time the commonest pair of neighbours becomes a token, of equals that with the lowest ids
    (a byte is its own id, the first token made is 256), until no pair occurs twice. Of
    {b"low": 5, b"lower": 2, b"newest": 6}:

        w e   8 times, in lower and newest, is merged first:  l o w   l o we r   n e we s t
        l o   7 times, where o w and o we are 5 and 2:         lo w   lo we r     n e we s t
        e we  6 times, like n e, s t and we s, of higher ids:  lo w   lo we r     n ewe s t

    A pair whose bytes are a token already, made of other parts, is passed over.
    """
    table = PairTable(pieces)
    merges = []
    while len(merges) < n_merges:
        pair = table.pop_commonest()
        if pair is None:
            break
        left, right = table.tokens[pair[0]], table.tokens[pair[1]]
        if left + right not in table.merged:
            table.merge(pair)
            merges.append((left, right))
            show(f"tokenizer: merge {len(merges):,} of {n_merges:,}")
    return merges


class PairTable:
    """The text that BPE is trained on, and where in it each pair of neighbouring tokens stands.

    A textbook counts all pairs anew for each merge. Here a merge changes the counts of the pairs
    beside the places where it is made, and no others.
    """

    def __init__(self, pieces: dict[bytes, int]) -> None:
        self.tokens = list(BYTES)  # by id
        self.merged = set()  # those of several bytes
        # All pieces in a row, -1 between them. A token's id stands at its first and at its last
        # byte, so that both neighbours see it; what is between is out of date.
        self.symbols = [-1]
        self.weights = [0]  # how often the piece occurs that this byte is in
        for piece, n in pieces.items():
            self.symbols += [*piece, -1]
            self.weights += [n] * (len(piece) + 1)
        # {pair: where its left token begins}. A place is taken off only when it is merged, so some
        # may hold another pair by then.
        self.places = defaultdict(list)
        for i, pair in enumerate(zip(self.symbols, self.symbols[1:])):
            if -1 not in pair:
                self.places[pair].append(i)
        self.counts = defaultdict(int)  # {pair: how often it occurs now}
        for pair, places in self.places.items():
            self.counts[pair] = self.count(places)
        # The commonest pair is first. Counts may have fallen since they were put here.
        self.heap = sorted((-n, pair) for pair, n in self.counts.items() if n > 1)

    def count(self, places: list[int]) -> int:
        """How often the text has what stands at these places."""
        return sum(map(self.weights.__getitem__, places))

    def pop_commonest(self) -> tuple[int, int] | None:
        """The pair that occurs most often, of equals that with the lowest ids; None where none
        occurs twice."""
        while self.heap:
            minus_n, pair = heapq.heappop(self.heap)
            n = self.counts[pair]
            if n == -minus_n:
                return pair
            if n > 1:  # an old count: counts only fall after a pair was pushed
                heapq.heappush(self.heap, (-n, pair))
        return None

    def merge(self, pair: tuple[int, int]) -> None:
        """Make the pair a token wherever it stands, and count its new neighbours."""
        a, b = pair
        new = len(self.tokens)  # its id
        token = self.tokens[a] + self.tokens[b]
        self.tokens.append(token)
        self.merged.add(token)
        size_a = len(self.tokens[a])
        size = len(token)
        symbols = self.symbols
        left_of = defaultdict(list)  # {the token to the left of the new one: where the new begins}
        right_of = defaultdict(list)
        for i in self.places.pop(pair):
            if symbols[i] != a or symbols[i + size_a] != b:
                continue  # another merge took one of the two
            symbols[i + size_a] = -1  # no token begins here any more
            symbols[i] = symbols[i + size - 1] = new
            left_of[symbols[i - 1]].append(i)  # the last byte of the token before
            right_of[symbols[i + size]].append(i)  # the first of the one behind
        for x, places in right_of.items():
            if x >= 0:  # else the piece ends there
                self.replace((b, x), (new, x), places)
        # After the right ones, since in "abab" the left neighbour is the new token itself.
        for x, places in left_of.items():
            if x >= 0:
                size_x = len(self.tokens[x])
                self.replace((x, a), (x, new), [i - size_x for i in places])
        self.counts.pop(pair)

    def replace(self, old: tuple[int, int], new: tuple[int, int], places: list[int]) -> None:
        """At these places the pair `new` now stands where `old` did."""
        n = self.count(places)
        self.counts[old] -= n  # its entry in the heap is put right when it comes up
        if n > 1:
            self.counts[new] = n
            self.places[new] = places
            heapq.heappush(self.heap, (-n, new))


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a tiktoken encoding {bytes: rank}: the pair that each token was made of, which
    is what the merges of lower ranks leave of its bytes."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        rank = ranks[token]
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            best = pair_ranks.index(min(pair_ranks))
            if pair_ranks[best] >= rank:
                break  # no merge before this token's own fits
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def repeated(counts: dict[str, int], mark: str = "") -> Iterator[str]:
    """Each piece as often as it was counted: the library's trainers count by themselves. Of more
    than MAX_PIECES a smaller text, in which the shares are the same. mark: is put behind the first
    of those that occur more than once."""
    total = sum(counts.values())
    for piece, n in sorted(counts.items()):
        if total > MAX_PIECES:
            n = n * MAX_PIECES // total  # none of the rarest
        if mark and n > 1:
            yield piece + mark
            n -= 1
        yield from repeat(piece, n)


def train_unigram(counts: Counter, n_tokens: int) -> dict[str, float]:
    """Unigram (Kudo 2018, section 3.2) over {piece: count}: {token: log-probability}, tokens being
    bytes in GPT-2's letters, all single bytes first, then the likeliest."""
    tokenizers = import_tokenizers("--tokenizer=unigram")
    alphabet = sorted(LETTERS.values())
    spelled = Counter()
    for piece, n in counts.items():
        spelled[spell(piece.encode()[:MAX_PIECE])] += n
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=n_tokens + 1,  # MARK is one
        initial_alphabet=alphabet,
        max_piece_length=MAX_TOKEN,
        # Steps of EM before each pruning. With the library's own 2 a text has 4 % more tokens
        # (2,000 tokens, on the Python source of this project); with 16 as many as with 8.
        n_sub_iterations=8,
        special_tokens=[],
        show_progress=False,
    )
    library = tokenizers.Tokenizer(tokenizers.models.Unigram())
    with library_errors():
        # It looks for its first tokens in a list with each piece once: what occurs there twice, and
        # with different characters behind it. So no word could be a token that is part of no other,
        # however common: the mark makes it stand there twice.
        library.train_from_iterator(repeated(spelled, MARK), trainer)
    scores = dict(json.loads(library.to_str())["model"]["vocab"])  # {token: log-probability}
    scores.pop(MARK, None)
    # Bytes that it found no use for get the least score, and a step more or less for each in an
    # order of chance. Nor are the last bits of a sum over a hash table the same twice.
    least = min(scores.values())
    for letter in alphabet:
        if scores[letter] < least + 0.0001 * len(alphabet):
            scores[letter] = least
    scores = {token: round(score, 6) for token, score in scores.items()}
    others = sorted(scores.keys() - set(alphabet))
    others.sort(key=scores.get, reverse=True)  # stable: equals stay in the order of their letters
    tokens = [*map(LETTERS.get, range(256)), *others]  # which may be more than were asked for
    return {token: scores[token] for token in tokens[:n_tokens]}


def train_wordpiece(counts: Counter, n_tokens: int) -> list[str]:
    """WordPiece's tokens, ## before those within a word, from {word: count}: merges by count, as
    the library trains them. Of the characters the commonest are taken, a quarter of n_tokens at
    most, and words with another teach nothing: they become unknown."""
    tokenizers = import_tokenizers("--tokenizer=wordpiece")
    often = Counter()
    for word, n in counts.items():
        for character in word:
            often[character] += n
    by_count = sorted(often)
    by_count.sort(key=often.get, reverse=True)  # stable, as above
    letters = set(by_count[: max(1, n_tokens // 4)])
    words = {word: n for word, n in counts.items() if letters.issuperset(word)}
    within = {"##" + character for word in words for character in word[1:]}
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=n_tokens,
        min_frequency=2,
        # Given as special tokens, which come first, since else those within words get their ids,
        # by which ties are broken, in an order of chance.
        special_tokens=[*sorted(letters), *sorted(within)],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=UNKNOWN))
    with library_errors():
        library.train_from_iterator(repeated(words), trainer)
    ids = json.loads(library.to_str())["model"]["vocab"]
    return sorted(ids, key=ids.get)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """It would walk a million lists again and again, and none is in a cycle."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def train_tokenizer(kind: str, counts: Counter, size: int, settings: TokenizerSettings = DEFAULT,
                    show: Callable = silent) -> Tokenizer:  # fmt: skip
    """A tokenizer of a kind in PATTERNS with `size` tokens, or fewer where the text has no more,
    from {piece of the kind's pattern: count}. Only `char` takes whatever there is."""
    room = size - len(special_names(settings, kind))  # tokens beside the special ones
    if kind == "char":
        return char_tokenizer(counts, settings)
    if kind == "bpe":
        pieces = {piece.encode(): n for piece, n in counts.items()}
        with no_garbage_collection():
            merges = train_bpe(pieces, room - 256, show)
        return bpe_tokenizer(merges, settings)
    if kind == "word":
        words = sorted(counts)
        words.sort(key=counts.get, reverse=True)  # the commonest, of equals by their letters
        return word_tokenizer(words[:room], QWEN2_SPLIT, settings)
    show(f"tokenizer: training of {size:,} tokens by the library tokenizers")
    if kind == "unigram":
        scores = train_unigram(counts, room)
        return unigram_tokenizer(scores, settings)
    return wordpiece_tokenizer(train_wordpiece(counts, room), settings)


# --------------------------------------------------------------------------------------------------
# tokenizer.json and tokenizer_config.json


def role_tokens(settings: TokenizerSettings) -> dict[str, str]:
    """{role: its special token} of a tokenizer made here: of special_tokens the first is bos and
    the end token and the second pads, where `roles` names no others."""
    start, pad = settings.special_tokens[:2]
    return {"bos": start, "eos": start, "pad": pad} | (settings.roles or {})


def check_role_names(settings: TokenizerSettings) -> None:
    """Refuse `roles` that name no role of a token, or no token."""
    roles = settings.roles or {}
    for role, token in roles.items():
        if role not in ROLES:
            raise UserError(f"roles={roles}: {role!r}: expected some of {', '.join(ROLES)}")
        if not isinstance(token, str) or not token:
            raise UserError(f"roles={roles}: {role}: expected the name of a token")


def special_names(settings: TokenizerSettings, kind: str = "bpe") -> list[str]:
    """The special tokens of a tokenizer made here, in the order of their ids. A kind that has
    words has one for all others."""
    names = []
    if kind in WITH_WORDS:
        names.append(role_tokens(settings).get("unk", UNKNOWN))
    names += settings.special_tokens
    names += (settings.roles or {}).values()
    return list(dict.fromkeys(names))  # each once


def normalizer_names(settings: TokenizerSettings) -> list[str]:
    """The names in tokenizer.json of what `normalize` asks for, in the order of their work."""
    asked = [name.strip() for name in settings.normalize.split(",")]
    for name in asked:
        if name and name not in NORMALIZERS:
            expected = ", ".join(NORMALIZERS)
            raise UserError(f"normalize={settings.normalize}: expected some of {expected}")
    return [NORMALIZERS[name] for name in NORMALIZERS if name in asked]


def normal_text(text: str, settings: TokenizerSettings = DEFAULT) -> str:
    """A text as a tokenizer with these settings is fed it."""
    return normalize(text, normalizer_names(settings))


def spell(token: bytes) -> str:
    """A token of bytes in GPT-2's letters, as tokenizer.json has it."""
    return "".join(map(LETTERS.__getitem__, token))


def numbered(tokens: list[str]) -> dict[str, int]:
    """{token: id}, the ids being their places."""
    return dict(zip(tokens, range(len(tokens))))


def bpe_tokenizer(
    merges: list[tuple[bytes, bytes]], settings: TokenizerSettings = DEFAULT
) -> Tokenizer:
    """A byte-level BPE tokenizer: bytes, merges, special tokens, with ids in this order."""
    spelled = [[spell(left), spell(right)] for left, right in merges]
    tokens = [spell(byte) for byte in BYTES]
    tokens += [left + right for left, right in spelled]
    vocab = numbered(tokens)
    special = special_ids(vocab, special_names(settings))
    body = {"type": "BPE", "unk_token": role_tokens(settings).get("unk")}
    body |= {"merges": spelled, "vocab": vocab | special}
    return byte_level_tokenizer(body, QWEN2_SPLIT, special, settings)


def unigram_tokenizer(scores: dict[str, float], settings: TokenizerSettings = DEFAULT) -> Tokenizer:
    """A Unigram tokenizer over bytes, from {token in GPT-2's letters: log-probability}."""
    special = special_ids(scores, special_names(settings))
    pairs = [[token, score] for token, score in scores.items()]
    body = {"type": "Unigram", "unk_id": None, "vocab": pairs}
    return byte_level_tokenizer(body, QWEN2_SPLIT, special, settings)


def byte_level_tokenizer(
    body: dict, split: str, special: dict[str, int], settings: TokenizerSettings
) -> Tokenizer:
    """A tokenizer of bytes with this model, text being split by a pattern."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split_step(split), level]}
    return tokenizer_files(body, steps, level, special, settings)


def char_tokenizer(characters: Counter | str, settings: TokenizerSettings = DEFAULT) -> Tokenizer:
    """One token a character; a character that training text lacks becomes the unknown token."""
    return word_tokenizer(sorted(characters), CHARACTERS, settings)


def word_tokenizer(
    words: list[str], split: str, settings: TokenizerSettings = DEFAULT
) -> Tokenizer:
    """A token for each of the words, which are pieces of a split pattern."""
    vocab = numbered(words)
    special = special_ids(vocab, special_names(settings, "word"))
    body = {"type": "WordLevel", "unk_token": unknown_token(settings, special)}
    body |= {"vocab": vocab | special}
    return tokenizer_files(body, split_step(split), {"type": "Fuse"}, special, settings)


def wordpiece_tokenizer(tokens: list[str], settings: TokenizerSettings = DEFAULT) -> Tokenizer:
    """A WordPiece tokenizer (BERT's): words and punctuation marks, white space being lost."""
    vocab = numbered(tokens)
    special = special_ids(vocab, special_names(settings, "wordpiece"))
    body = {"type": "WordPiece", "unk_token": unknown_token(settings, special)}
    body |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    body |= {"vocab": vocab | special}
    steps = split_step(BERT_WORDS) | {"behavior": "Removed", "invert": True}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    return tokenizer_files(body, steps, decoder, special, settings)


def split_step(pattern: str) -> dict:
    """The pre-tokenizer that makes each match of a pattern a piece."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def unknown_token(settings: TokenizerSettings, special: dict[str, int]) -> str:
    """The token that stands for what a tokenizer has none for, or None."""
    return role_tokens(settings).get("unk", UNKNOWN if UNKNOWN in special else None)


def special_ids(vocab: dict, names: list[str]) -> dict[str, int]:
    """{special token: id}: behind the vocabulary."""
    special = {name: id for id, name in enumerate(names, len(vocab))}
    both = vocab.keys() & special.keys()
    if both:
        why = f"{min(both)!r} is an ordinary token too: choose a name like <|this|>"
        raise UserError(f"special_tokens: {why}")
    return special


def tokenizer_files(body: dict, pre_tokenizer: dict, decoder: dict, special: dict[str, int],
                    settings: TokenizerSettings) -> Tokenizer:  # fmt: skip
    """tokenizer.json and tokenizer_config.json, as a Tokenizer. body: the model's part of the
    file; special {name: id}. With <|im_start|> and <|im_end|> it has ChatML's chat template."""
    roles = role_tokens(settings)
    if UNKNOWN in special:
        roles.setdefault("unk", UNKNOWN)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    flags |= {"special": True}
    normalizer = None
    names = normalizer_names(settings)
    if names:
        normalizer = {"type": "Sequence", "normalizers": [{"type": name} for name in names]}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name} | flags for name, id in special.items()],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": body,
    }
    if roles["bos"] != roles["eos"]:  # else a text begins with nothing, as GPT-2's
        spec["post_processor"] = bos_first(roles["bos"], special[roles["bos"]])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"unk_token": None}  # said, since transformers' own default is a name
    config |= {f"{role}_token": name for role, name in roles.items()}
    if "<|im_start|>" in special and "<|im_end|>" in special:
        config["chat_template"] = CHATML
    return Tokenizer(spec, config)


def bos_first(bos: str, id: int) -> dict:
    """The post-processor of tokenizer.json that puts bos before a text, and before each of two."""
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    ids = {bos: {"id": bos, "ids": [id], "tokens": [bos]}}
    step = {"type": "TemplateProcessing", "single": first, "pair": first + second}
    return step | {"special_tokens": ids}


# --------------------------------------------------------------------------------------------------
# Tokenizers that are there already


def finished_tokenizer(name: str, settings: TokenizerSettings = DEFAULT) -> Tokenizer | None:
    """The tokenizer that prepare.py's key `tokenizer` names: bytes, tiktoken's, or a folder's; None
    where it is to be trained on the text."""
    if name in BY_LIBRARY:
        import_tokenizers(f"--tokenizer={name}")  # told now, not once the text is cleaned
    if name in PATTERNS:
        return None  # to be trained
    if name == "byte":
        return bpe_tokenizer([], settings)
    if not Path(name).is_dir():
        return tiktoken_tokenizer(name, settings)
    tok = Tokenizer.from_folder(name)
    if tok.eot_id is None:
        raise UserError(f"{name}: tokenizer_config.json names no bos_token and no eos_token")
    return with_own_names(tok, name)


def tiktoken_tokenizer(name: str, settings: TokenizerSettings = DEFAULT) -> Tokenizer | None:
    """A named tiktoken encoding, with the special tokens that it lacks added behind."""
    if name not in tiktoken.list_encoding_names():
        names = ", ".join([*sorted([*PATTERNS, "byte"]), *tiktoken.list_encoding_names()])
        raise UserError(f"--tokenizer={name}: expected {names}, or a folder with tokenizer.json")
    try:
        encoding = tiktoken.get_encoding(name)
    except requests.RequestException as error:
        why = why_no_answer(error, "")
        raise UserError(f"--tokenizer={name}: its table could not be downloaded: {why}") from None
    ranks = encoding._mergeable_ranks  # {bytes: id}
    special = dict(encoding._special_tokens)
    for token in special_names(settings):
        special.setdefault(token, max([*ranks.values(), *special.values()]) + 1)
    # Oniguruma, which reads tokenizer.json, takes {1,3}+ for a repeated repeat.
    split = regex.sub(r"(\{\d+,\d*\})\+", r"\1", encoding._pat_str)
    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [[spell(left), spell(right)] for left, right in recover_merges(ranks)]
    body = {"type": "BPE", "unk_token": role_tokens(settings).get("unk")}
    # A piece that is a token is taken at once, as tiktoken does. And special tokens that the
    # vocabulary lacked would get other ids where it has gaps (cl100k_base).
    body |= {"ignore_merges": True, "merges": merges, "vocab": vocab | special}
    return byte_level_tokenizer(body, split, special, settings)


def with_own_names(tok: Tokenizer, folder: str | Path) -> Tokenizer:
    """A folder's tokenizer with bos and the end token named in tokenizer_config.json, all that a
    dataset keeps of what says them: some folders have them in config.json alone. A tokenizer that
    has no end token ends a text with bos, so that generation stops there."""
    names = {id: name for name, id in tok.special.items()}
    wanted = {"bos_token": tok.bos_id, "eos_token": tok.end_id}
    if tok.end_id is None:
        wanted["eos_token"] = tok.bos_id
        print(f"{folder}: no end token: {names.get(tok.bos_id)} ends a text too")
    for key, id in wanted.items():
        if id is not None and tok.named(key) != id:  # the model's own files say otherwise
            if id not in names:
                raise UserError(f"{folder}: its {key}, id {id}, is none of its added tokens")
            tok.config[key] = names[id]
    return Tokenizer(tok.spec, tok.config)


# --------------------------------------------------------------------------------------------------
# --inspect

COLOURS = [f"\x1b[30;48;5;{n}m%s\x1b[0m" for n in (152, 223, 182)]


def show_tokens(tok: Tokenizer, text: str) -> None:
    """Print a text's tokens, on alternating colours or with bars between them, their ids, the steps
    that made them, and what the vocabulary is made of. What is no text or not to be seen is
    escaped."""
    has_colour = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
    forms = COLOURS if has_colour else ["%s"]
    ids = tok.encode(text)
    tokens = []
    numbers = []
    for id, form in zip(ids, cycle(forms)):
        tokens.append(form % visible(tok, id))
        numbers.append(form % id)
    print(("" if has_colour else "|").join(tokens))
    print(" ".join(numbers))
    n_bytes = len(text.encode(errors="replace"))
    print(f"tokens: {len(ids):,}\nbytes per token: {n_bytes / max(1, len(ids)):.2f}")
    show_steps(tok, text, visible)
    show_vocabulary(tok)


def visible(tok: Tokenizer, id: int) -> str:
    """A token as it can be printed on one line, special ones by their names."""
    text = tok.shown.get(id, b"").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show_vocabulary(tok: Tokenizer) -> None:
    """Print how many tokens there are, which are special, and how many there are of each length."""
    sizes = {id: len(token) for id, token in sorted(tok.bytes.items()) if token}
    counts = Counter(sizes.values())
    n_special = len(tok.special)
    print(f"vocabulary: {tok.n_vocab:,}, of them {n_special} special, {counts[1]:,} of one byte")
    names = {id: name for name, id in tok.special.items()}
    print("roles:", ", ".join(f"{role} {names[id]}" for role, id in tok.roles.items()))
    longest = sorted(sizes, key=sizes.get, reverse=True)[:10]
    print("longest:", "|".join(visible(tok, id) for id in longest))
    for size, n in sorted(counts.items()):
        print(f"{size:4} bytes {n:7,} {'#' * round(50 * n / max(counts.values()))}")
