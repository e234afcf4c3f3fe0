"""How a tokenizer.json prepares text: normalizers, and the patterns that cut it into pieces.

A piece is what a tokenizer encodes by itself: "don't stop" becomes "don", "'t", " stop", and no
token spans two of them. The patterns in a file are written for Oniguruma, the engine of Hugging
Face's library. Here they are run by Rust's (in tiktoken) and by the module `regex`, so a pattern
that the engines do not read alike is `NotOurs`: `tokenizers` itself must run it.
"""

from __future__ import annotations

import re
import time
import unicodedata
from typing import Any

from barelm.run import UserError

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each numeral apart, then GPT2_SPLIT: white space before a numeral is the end of its piece.
DIGITS_SPLIT = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHARACTERS = r"[\s\S]"
BERT_WORDS = r"(?:(?!\p{Han})[\p{L}\p{M}\p{N}])+|\S"  # punctuation and Chinese stand alone
# Each of these matches something wherever it stands: no text is between their matches.
GAPLESS = {GPT2_SPLIT, DIGITS_SPLIT, QWEN2_SPLIT, LLAMA3_SPLIT, CHARACTERS}

NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
BEHAVIORS = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"}
SAME_ESCAPES = set("pPdDsSnrtfAzx0")  # letters behind a backslash that all engines read alike
ONIGURUMA_WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}²³¹¼½¾"  # its \w, which others read otherwise
SAMPLE_TEXT = "aA1 .'\n漢\u0301_ "  # letters that a pattern may match nothing beside
SPLIT_SECONDS = 30  # a pattern that takes longer for a short text has no end


class NotOurs(Exception):
    """What, in a tokenizer.json, is not run here but by the library `tokenizers`: a noun."""


# --------------------------------------------------------------------------------------------------
# Normalizers


def normalize(text: str, names: list[str]) -> str:
    """What Hugging Face's normalizers of these names make of a text, one after another."""
    for name in names:
        if name == "Lowercase":
            # Python writes a sigma at a word's end as ς; Rust goes letter by letter.
            text = text.replace("Σ", "σ").lower()
        else:
            text = unicodedata.normalize(name, text)  # type: ignore[arg-type]
    return text


def read_normalizers(spec: dict) -> list[str]:
    """The names of a tokenizer.json's normalizers, in their order."""
    normalizer = spec.get("normalizer") or {"normalizers": []}
    names = []
    for step in normalizer.get("normalizers", [normalizer]):  # a Sequence, or one step
        if step["type"] not in NORMALIZERS:
            raise NotOurs(f"the normalizer {step['type']}")
        names.append(step["type"])
    return names


# --------------------------------------------------------------------------------------------------
# Patterns


def read_pre_tokenizer(spec: dict) -> tuple[str, list[tuple[str, str, bool]]]:
    """(form, steps) of a tokenizer.json's pre_tokenizer. form: "ByteLevel", where the pieces are
    written as bytes at the end, or "Split"; steps: [(pattern, behavior, invert)], each cutting the
    pieces of the one before."""
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    # Old files leave out what was the only way then.
    defaults = {"add_prefix_space": True, "use_regex": True, "invert": False}
    steps = [defaults | step for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    if not steps or "type" not in steps[0]:
        raise NotOurs("a tokenizer that does not split text")
    last = steps[-1]
    if last["type"] != "ByteLevel":
        return "Split", [read_split(step) for step in steps]
    if last["add_prefix_space"]:
        raise NotOurs("a space put before every text")
    splits = [read_split(step) for step in steps[:-1]]
    if last["use_regex"]:  # ByteLevel splits by itself, too
        splits.append((GPT2_SPLIT, "Isolated", False))
    if not splits:
        raise NotOurs("a tokenizer that does not split text")
    return "ByteLevel", splits


def read_split(step: dict) -> tuple[str, str, bool]:
    """(pattern, behavior, invert) of one step, a Split or Digits."""
    if step["type"] == "Digits":
        behavior = "Isolated" if step.get("individual_digits") else "Contiguous"
        return r"\p{N}", behavior, False
    if step["type"] != "Split" or step["behavior"] not in BEHAVIORS:
        raise NotOurs(f"the pre-tokenizer {step['type']}")
    if "Regex" in step["pattern"]:  # else the text itself, in which a dot is a dot
        return step["pattern"]["Regex"], step["behavior"], step["invert"]
    import regex

    literal = regex.escape(step["pattern"]["String"], special_only=True)
    return literal, step["behavior"], step["invert"]


def spell_words(pattern: str) -> str:
    """The pattern with what Oniguruma takes for \\w and \\W written out."""
    parts = []
    depth = 0  # of brackets: within [...] a class must not open another
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        if part == "[":
            depth += 1
        elif part == "]":
            depth -= 1
        elif part == r"\w":
            part = ONIGURUMA_WORD if depth > 0 else f"[{ONIGURUMA_WORD}]"
        elif part == r"\W" and depth <= 0:
            part = f"[^{ONIGURUMA_WORD}]"
        parts.append(part)
    return "".join(parts)


def portable_pattern(given: str) -> str:
    """A split pattern of tokenizer.json as Rust and `regex` read it; NotOurs where one of the
    three would mean something else by it."""
    # Oniguruma takes {1,3}+ for a repeated repeat; elsewhere it is greedy and gives nothing back.
    pattern = re.sub(r"\{([01]?),\d*\}\+", r"{\1,}", given)
    pattern = spell_words(pattern)
    bare = re.sub(r"\\.", "", pattern, flags=re.DOTALL)  # without what is escaped
    escapes = [c for c in re.findall(r"\\(.)", pattern) if c.isalnum() and c not in SAME_ESCAPES]
    odd = [f"\\{c}" for c in escapes]
    odd += re.findall(r"\(\?(?!:|=|!|>|<=|<!|-?i[:)])..?", bare)  # other flags, recursion, names
    odd += re.findall(r"\[:\^?\w+:\]|\{[\d,]+\}\+", bare)
    if odd:
        raise NotOurs(f"{odd[0]} in the split pattern {given!r}")
    without_negations = bare.replace("[^", "[")
    if "^" in without_negations or "$" in without_negations:
        return f"(?m:{pattern})"  # there they are always a line's
    return pattern


def compile_pattern(pattern: str) -> Any:
    """A portable pattern, for the module `regex`."""
    import regex

    # \x{4E00} and \z are \U00004e00 and \Z there.
    python = re.sub(r"\\x\{([0-9a-fA-F]{1,8})\}", unicode_escape, pattern)
    python = re.sub(r"\\z", r"\\Z", python)
    nested = "&&" in python or re.search(r"\[[^\]]*\[", re.sub(r"\\.", "", python))
    try:
        return regex.compile(python, regex.V1 if nested else regex.V0)  # V1 knows sets in sets
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"tokenizer.json: the split pattern {pattern!r}: {error}") from None


def unicode_escape(match: re.Match) -> str:
    """A hexadecimal number as Python's escape."""
    return f"\\U{int(match[1], 16):08x}"


def may_match_nothing(pattern: str) -> bool:
    """Whether a pattern matches nothing at some place where it is likely to: among usual letters
    and those that it names. tiktoken panics there."""
    try:
        matches = compile_pattern(pattern).finditer(SAMPLE_TEXT + pattern, timeout=1)
        return any(not match[0] for match in matches)
    except TimeoutError:
        return True


# --------------------------------------------------------------------------------------------------
# Cutting


def split_seconds(text: str) -> float:
    """How long a pattern may take for a text, in seconds: many times what a usual one does."""
    return SPLIT_SECONDS + len(text) / 100_000


def stretches(text: str, pattern: Any) -> list[tuple[int, int, bool]]:
    """[(begin, end, does the pattern match it)], one behind the other, of the whole text.
    TimeoutError where the pattern has no end."""
    parts = []
    search_from = 0
    covered = 0  # all before this place is in parts
    last_end = None
    stop = time.monotonic() + split_seconds(text)
    while search_from <= len(text):
        match = pattern.search(text, search_from, timeout=max(stop - time.monotonic(), 0.001))
        if not match:
            break
        if match.start() == match.end() == last_end:
            search_from += 1  # nothing, right behind another match: none, as in Oniguruma
            continue
        if covered < match.start():
            parts.append((covered, match.start(), False))
        parts.append((match.start(), match.end(), True))
        search_from = covered = last_end = match.end()
    if covered < len(text):
        parts.append((covered, len(text), False))
    return parts


def split_at(text: str, pattern: Any, behavior: str, invert: bool) -> list[tuple[int, int]]:
    """The pieces [(begin, end)] that Hugging Face's Split makes of a text, none of them empty.

    "the-final--countdown" at "-" is
        Isolated            the - final - - countdown
        Removed             the final countdown
        Contiguous          the - final -- countdown
        MergedWithPrevious  the- final- - countdown
        MergedWithNext      the -final - -countdown
    invert: what the pattern does not match is the delimiter.
    """
    parts = stretches(text, pattern)
    if behavior == "MergedWithNext":
        parts.reverse()  # then a delimiter is merged with the one before
    pieces = []
    was_delimiter = False
    for begin, end, matched in parts:
        is_delimiter = matched != invert
        if behavior == "Removed" and is_delimiter:
            continue
        if behavior in ("Isolated", "Removed"):
            joins = False
        elif behavior == "Contiguous":
            joins = is_delimiter == was_delimiter
        else:  # a delimiter is merged with a text, and not with another delimiter
            joins = is_delimiter and not was_delimiter
        was_delimiter = is_delimiter
        if joins and pieces:
            other_begin, other_end = pieces[-1]
            pieces[-1] = (min(begin, other_begin), max(end, other_end))
        else:
            pieces.append((begin, end))
    return sorted(piece for piece in pieces if piece[0] < piece[1])  # a match may be of nothing


class Splitter:
    """Cuts normal text by the steps [(pattern, behavior, invert)] of a tokenizer.json."""

    def __init__(self, steps: list[tuple[str, str, bool]]) -> None:
        # SmolLM2's two steps are one pattern, which tiktoken can run.
        if steps == [(r"\p{N}", "Isolated", False), (GPT2_SPLIT, "Isolated", False)]:
            steps = [(DIGITS_SPLIT, "Isolated", False)]
        # The one pattern whose matches, and what is between them, are the pieces; None if several.
        self.pattern = None
        if len(steps) == 1 and steps[0][1] == "Isolated":
            self.pattern = steps[0][0]
        self.is_gapless = self.pattern in GAPLESS
        self.drops_text = False  # is some of the text in no piece?
        self.steps = []  # compiled
        for pattern, behavior, invert in steps:
            self.drops_text |= behavior == "Removed"
            self.steps.append((compile_pattern(portable_pattern(pattern)), behavior, invert))

    def cuts(self, text: str) -> list[tuple[int, int]]:
        """Where the pieces of a text begin and end: [(begin, end)]."""
        pieces = [(0, len(text))] if text else []
        for pattern, behavior, invert in self.steps:
            finer = []
            for begin, end in pieces:
                try:
                    parts = split_at(text[begin:end], pattern, behavior, invert)
                except TimeoutError:
                    why = f"does not end on a text of {len(text):,} characters"
                    line = f"tokenizer.json: the split pattern {pattern.pattern!r} {why}"
                    raise UserError(line) from None
                finer += [(begin + a, begin + b) for a, b in parts]  # places in the whole text
            pieces = finer
        return pieces

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text."""
        if self.pattern == CHARACTERS:
            return list(text)
        if self.is_gapless:  # the matches are all of the text
            return self.steps[0][0].findall(text)
        return [text[begin:end] for begin, end in self.cuts(text)]
