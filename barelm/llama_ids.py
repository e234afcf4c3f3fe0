"""Text to ids as llama.cpp does it, in plain Python: what an export compares a tokenizer with.

llama.cpp has four ways (src/llama-vocab.cpp), and for the first of them patterns with names. What
is here follows them step by step, and is slow; tests/long_llama.py compares it with llama.cpp."""

from __future__ import annotations

import base64
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import regex

from barelm.encoders import byte_letters

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACE = "\u2581"  # that stands for a blank in SentencePiece's tokens
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{LINES}"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CAMEL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}"
TEKKEN = rf"{UPPER}*{LOWER}+|{UPPER}+{LOWER}*|\p{{N}}|{CAMEL}"
GPT4O = rf"{UPPER}*{LOWER}+{CONTRACTIONS}?|{UPPER}+{LOWER}*{CONTRACTIONS}?|\p{{N}}{{1,3}}|{CAMEL}"
ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
DEEPSEEK3 = (
    rf"{ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}"
)
CASED = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The names of split patterns, each cutting the pieces of the one before. Of several names for one
# pattern the best known: starcoder, refact, command-r, codeshell and exaone cut as smollm does;
# phi-2, mpt, olmo and jais as gpt-2; stablelm2 and megrez as qwen2; smaug-bpe as dbrx.
PATTERNS = {
    "gpt-2": (GPT2,),
    "qwen2": (QWEN2,),
    "llama-bpe": (LLAMA3,),
    "dbrx": (LLAMA3,),
    "smollm": (r"\p{N}", GPT2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-llm": (r"[\r\n]", CASED, SIGNS, r"\s+$", CJK, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3),
    "tekken": (TEKKEN,),
    "gpt-4o": (GPT4O,),
    "qwen35": (QWEN35,),
    "bloom": (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",),
}
WHOLE_PIECES = ("llama-bpe", "tekken")  # a piece that is a token is taken without any merges

# What llama.cpp and a tokenizer must read alike.
HARD_TEXTS = [
    "Hello, world! It's what they'd say: we'll see, I'M SURE, DON'T you've",
    "0 12 123 1234 12345 1234567 3.14159 1,000,000 v2.0 2026-11-28 1a2b x86_64 ١٢٣ ½²",
    "  two   three    four  \t tab\t\ttabs \n\n line\r\nends \n  \n   \n\n\nend  ",
    " one blank before",
    "trailing blanks   ",
    "def f(x, y=None):\n    return {'a': [x**2, y or \"z\"]}  # why?\n\n\n",
    "<|im_not_special|> <b>bold</b> &amp; http://a.b/c?d=e&f=g#h e-mail@x.org $5 50% ~/a\\b a_b",
    "camelCaseWords HTTPServer iPhone XMLHttpRequest McDonald's O'Neill's",
    "café naïve Übergröße Łódź İstanbul Σίσυφος Привет, мир!",
    "你好，世界。東京タワーは高いです 한국어도 가능",
    "مرحبا بالعالم שלום नमस्ते दुनिया สวัสดี",
    "emoji 😀👍🏽 👨\u200d👩\u200d👧 ❤\ufe0f 🇩🇪 ☃",
    "“quotes” ‘single’s’ — dash… €5 £6 © ™ → ∞ ≠",
    "nbsp\u00a0thin\u2009zero\u200bwidth\u3000wide",
    "!!! ... ??? --- ===  ++i; a+=b--; (((x)))[[y]]{{z}}",
]


@dataclass
class LlamaVocab:
    """A tokenizer as a GGUF file has it. model: gpt2 (byte-level BPE), llama (SentencePiece's BPE),
    t5 (Unigram) or bert (WordPiece)."""

    model: str
    tokens: list[str]
    types: list[str]  # NORMAL, UNKNOWN, CONTROL, USER_DEFINED (text, found first), UNUSED, BYTE
    scores: list[float] = field(default_factory=list)  # of llama and t5
    merges: list[tuple[str, str]] = field(default_factory=list)  # of gpt2
    pre: str = "default"  # the name of gpt2's split pattern
    space_prefix: bool = False  # of llama and t5: a blank before a text
    one_space: bool = False  # of t5: no blanks behind blanks
    charsmap: str = ""  # of t5: SentencePiece's normalizer, in base64
    lowercase: bool = False  # of bert
    strip_accents: bool = False  # of bert
    unk_id: int | None = None
    notes: list[str] = field(default_factory=list)  # what llama.cpp does otherwise, for the user

    def __post_init__(self) -> None:
        self.id_of = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}


def llama_ids(vocab: LlamaVocab, text: str) -> list[int]:
    """llama.cpp's ids of a text in which no control token is read."""
    encode = {"gpt2": bpe_ids, "llama": spm_ids, "t5": unigram_ids, "bert": wordpiece_ids}
    ids = []
    for part, id in parts_of(vocab, text):
        if id is not None:
            ids.append(id)
        elif part:
            ids += encode[vocab.model](vocab, part)
    return ids


def parts_of(vocab: LlamaVocab, text: str) -> Iterator[tuple[str, int | None]]:
    """(text, None), or (token, its id) of those that are found before all else, in their order."""
    names = []
    for token, kind in zip(vocab.tokens, vocab.types):
        if kind == "USER_DEFINED":
            names.append(token)
    if not names:
        yield text, None
        return
    names.sort(key=len, reverse=True)
    pattern = "|".join(regex.escape(name) for name in names)
    for i, part in enumerate(regex.split(f"({pattern})", text)):
        yield part, vocab.id_of[part] if i % 2 else None


# --------------------------------------------------------------------------------------------------
# Byte-level BPE


def pieces_of(text: str, patterns: tuple[str, ...]) -> list[str]:
    """The matches of each pattern and what is between them, of each piece of the one before."""
    pieces = [text]
    for pattern in patterns:
        finer = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                finer += [piece[end : match.start()], match[0]]
                end = match.end()
            finer.append(piece[end:])
        pieces = [piece for piece in finer if piece]
    return pieces


LETTERS = byte_letters()


def bpe_ids(vocab: LlamaVocab, text: str) -> list[int]:
    ids = []
    for piece in pieces_of(text, PATTERNS[vocab.pre]):
        letters = "".join(LETTERS[byte] for byte in piece.encode())
        if vocab.pre in WHOLE_PIECES and letters in vocab.id_of:
            ids.append(vocab.id_of[letters])
            continue
        for symbol in merged(list(letters), vocab.ranks):
            if symbol in vocab.id_of:
                ids.append(vocab.id_of[symbol])
                continue
            for letter in symbol:  # a byte without a token is lost
                if letter in vocab.id_of:
                    ids.append(vocab.id_of[letter])
    return ids


def merged(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The symbols, the pair of the lowest rank joined as long as there is one; of equals the
    first."""
    while len(symbols) > 1:
        pair_ranks = [ranks.get(pair, len(ranks)) for pair in zip(symbols, symbols[1:])]
        best = min(pair_ranks)
        if best == len(ranks):
            break
        i = pair_ranks.index(best)
        symbols = symbols[:i] + [symbols[i] + symbols[i + 1]] + symbols[i + 2 :]
    return symbols


# --------------------------------------------------------------------------------------------------
# SentencePiece


def spm_ids(vocab: LlamaVocab, text: str) -> list[int]:
    """BPE whose pairs are any that make a token, the one of the highest score first."""
    if vocab.space_prefix:
        text = f" {text}"
    symbols = list(text.replace(" ", SPACE))
    while len(symbols) > 1:
        scores = []
        for left, right in zip(symbols, symbols[1:]):
            id = vocab.id_of.get(left + right)
            scores.append(float("-inf") if id is None else vocab.scores[id])
        best = max(scores)
        if best == float("-inf"):
            break
        i = scores.index(best)
        symbols = symbols[:i] + [symbols[i] + symbols[i + 1]] + symbols[i + 2 :]
    ids = []
    for symbol in symbols:
        if symbol in vocab.id_of:
            ids.append(vocab.id_of[symbol])
        else:
            ids += [vocab.id_of[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


def sentencepiece_text(vocab: LlamaVocab, text: str) -> str:
    """A text as Unigram gets it: normalized, blanks replaced."""
    if vocab.charsmap:
        from tokenizers import normalizers

        step = normalizers.Precompiled(base64.b64decode(vocab.charsmap))
        text = step.normalize_str(text)
    if vocab.one_space:
        words = [word for word in text.split(" ") if word]
        return "".join(SPACE + word for word in words)
    if vocab.space_prefix and text.strip(" "):
        blanks = len(text) - len(text.lstrip(" "))
        text = f"{text[:blanks]} {text[blanks:]}"
    return text.replace(" ", SPACE)


def unigram_ids(vocab: LlamaVocab, text: str) -> list[int]:
    """The tokens whose scores have the largest sum (Viterbi)."""
    text = sentencepiece_text(vocab, text)
    longest = max(map(len, vocab.tokens))
    usual = []
    for score, kind in zip(vocab.scores, vocab.types):
        if kind == "NORMAL":
            usual.append(score)
    unknown = min(usual) - 10  # a character without a token
    best = [(0.0, 0, -1)] + [(float("-inf"), 0, -1)] * len(text)  # (sum, begin, id) of each end
    for begin in range(len(text)):
        so_far = best[begin][0]
        for end in range(begin + 1, min(len(text), begin + longest) + 1):
            id = vocab.id_of.get(text[begin:end])
            score = unknown
            if id is not None and vocab.types[id] in ("NORMAL", "USER_DEFINED", "UNUSED"):
                score = vocab.scores[id]
            elif end == begin + 1:
                id = vocab.unk_id
            else:
                continue
            if so_far + score > best[end][0]:
                best[end] = (so_far + score, begin, id)
    ids = []
    end = len(text)
    while end > 0:
        _, begin, id = best[end]
        if id != vocab.unk_id or not ids or ids[-1] != id:  # unknown ones in a row are one
            ids.append(id)
        end = begin
    return ids[::-1]


# --------------------------------------------------------------------------------------------------
# WordPiece


def wordpiece_ids(vocab: LlamaVocab, text: str) -> list[int]:
    """The longest token that a word begins with, then the longest of what is left; a word that has
    none somewhere is unknown."""
    ids = []
    for word in bert_words(vocab, text):
        rest = SPACE + word
        word_ids = []
        while rest:
            size = longest_beginning(vocab, rest)
            if size == 0:
                word_ids = [vocab.unk_id]
                break
            word_ids.append(vocab.id_of[rest[:size]])
            rest = rest[size:]
        ids += word_ids
    return ids


def longest_beginning(vocab: LlamaVocab, text: str) -> int:
    """The length of the longest token that a text begins with; 0 where it begins with none."""
    for size in range(len(text), 0, -1):
        if text[:size] in vocab.id_of:
            return size
    return 0


def bert_words(vocab: LlamaVocab, text: str) -> list[str]:
    """Words between blanks, punctuation and Chinese characters, which stand alone."""
    if vocab.strip_accents:
        text = unicodedata.normalize("NFD", text)
    spaced = ""
    for letter in text:
        category = unicodedata.category(letter)
        if letter.isspace():
            spaced += " "
        elif letter in "\0\ufffd" or category in ("Cc", "Cf", "Co", "Cs"):
            continue
        elif vocab.strip_accents and category == "Mn":
            continue
        else:
            is_sign = category[0] == "P" or (letter < "\x7f" and category[0] == "S")
            letter = letter.lower() if vocab.lowercase else letter
            spaced += f" {letter} " if is_sign or is_chinese(letter) else letter
    return spaced.split()


def is_chinese(letter: str) -> bool:
    """BERT's Chinese characters: those of these ranges."""
    ranges = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F))
    ranges += ((0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
    return any(first <= ord(letter) <= last for first, last in ranges)
