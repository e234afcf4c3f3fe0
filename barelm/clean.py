"""Cleaning one document. Each function takes a text and its settings; it returns the text, changed
perhaps, or raises Reject with the reason why the document is left out.

prepare.py runs the steps that --steps names, in that order, by `apply_step`. A new step is a
function here, its name in STEPS and a case in `apply_step`.
"""

from __future__ import annotations

import ipaddress
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from html import unescape
from typing import TYPE_CHECKING, Any, NamedTuple

import regex
import torch

from barelm.checkpoint import load
from barelm.files import file_ending, read_input
from barelm.run import UserError
from barelm.sources import HTML_ENDINGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from barelm.tokenizer import Tokenizer
    from model import GPT


class Reject(Exception):
    """A document that is left out; args[0] is the reason, without numbers, so that it counts."""


def reject_if(condition: object, reason: str) -> None:
    if condition:
        raise Reject(reason)


@dataclass(frozen=True)
class Cleaning:
    """The settings of all steps: prepare.py's keys of the same names, which say what each means."""

    steps: tuple[str, ...]
    html_documents: bool | None
    clean_symbols: bool | str
    min_chars: int
    max_chars: int
    language: str
    language_score: float
    perplexity_model: str | None
    perplexity_band: tuple[float, float]
    device: str  # of the perplexity model
    blocklist: str | None
    decontaminate: str | None


@dataclass
class Tally:
    """What a step was given and what it left; why it left documents out."""

    docs_in: int = 0
    bytes_in: int = 0
    docs_out: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    # {reason: [number of documents, up to three examples]}
    reasons: dict[str, list] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.docs_in += other.docs_in
        self.bytes_in += other.bytes_in
        self.docs_out += other.docs_out
        self.bytes_out += other.bytes_out
        self.seconds += other.seconds
        for reason, (count, examples) in other.reasons.items():
            self.add_reason(reason, count, examples)

    def add_reason(self, reason: str, count: int, examples: list[str]) -> None:
        old_count, old_examples = self.reasons.get(reason, (0, []))
        self.reasons[reason] = [old_count + count, (old_examples + examples)[:3]]

    def count(self, before: str, after: str, reason: str | None = None) -> None:
        """A document: its text before the step, and after it or the reason why it is left out."""
        size = len(before.encode())
        self.docs_in += 1
        self.bytes_in += size
        if reason:
            self.add_reason(reason, 1, [one_line(before)])
            return
        self.docs_out += 1
        self.bytes_out += size if after is before else len(after.encode())

    def line(self, name: str) -> str:
        speed = ""
        if self.seconds:
            speed = f", {self.bytes_in / self.seconds / 1e6:,.0f} MB/s a process"
        sizes = f"{self.bytes_out / 1e6:,.1f} of {self.bytes_in / 1e6:,.1f} MB"
        return f"{name}: {self.docs_out:,} of {self.docs_in:,} documents, {sizes}{speed}"


def one_line(text: str, n: int = 160) -> str:
    """The first n characters with single blanks: an example to show."""
    return " ".join(text[:n].split())


# The steps, in FineWeb's order. Those that compare all documents are prepare.py's own.
STEPS = ("html", "unicode", "symbols", "whitespace", "length", "language", "blocklist")
STEPS += ("gopher_repetition", "gopher_quality", "c4", "fineweb", "perplexity", "pii")


def apply_step(name: str, text: str, record: dict, settings: Cleaning) -> str:
    """The text after the step of this name, which may look at its record's path and url; Reject
    where the document is to be left out."""
    match name:
        case "html":
            return clean_html(text, record, settings.html_documents)
        case "unicode":
            return clean_unicode(text)
        case "symbols":
            return drop_symbols(text, settings.clean_symbols or True)
        case "whitespace":
            return clean_whitespace(text)
        case "length":
            return check_length(text, settings.min_chars, settings.max_chars)
        case "language":
            return check_language(text, settings.language, settings.language_score)
        case "blocklist":
            return check_blocklist(text, record.get("url"), settings.blocklist)
        case "gopher_repetition":
            return check_gopher_repetition(text)
        case "gopher_quality":
            return check_gopher_quality(text)
        case "c4":
            return check_c4(text)
        case "fineweb":
            return check_fineweb(text)
        case "perplexity":
            net, tok = small_model(settings.perplexity_model, settings.device)
            return check_perplexity(text, net, tok, settings.perplexity_band)
        case "pii":
            return clean_pii(text)
    raise ValueError(name)


# --------------------------------------------------------------------------------------------------
# HTML

# A comment, a tag (its slash, name and attributes) or a declaration. One that does not end goes on
# to the end of the page, as in browsers; so each matches where it begins, and time is linear.
TAG = re.compile(
    r"<!--(?:-?>|.*?(?:--!?>|\Z))|<[!?][^>]*>?|</[^a-zA-Z][^>]*>?"
    r"|<(/?[a-zA-Z][^\s/>]*)((?:[^>=]|=(?:\s*\"[^\"]*\"?|\s*'[^']*'?)?)*)>?",
    re.S,
)
# Elements whose text nobody reads as the page's own.
HIDDEN = set(
    "script style nav header footer aside form noscript svg template title button select textarea "
    "iframe object canvas audio video".split()
)
BLOCKS = set(
    "address article aside blockquote body center dd details div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr html main nav ol p pre section table ul".split()
)
NESTING = HIDDEN | BLOCKS - {"p", "hr", "dd", "dt"} | {"li", "a"}  # what has an end tag to match
NAVIGATION = re.compile(r"\brole\s*=\s*[\"']?navigation\b", re.I)
# What a tag means for the line breaks before the text behind it.
BREAKS = {slash + tag: ["block"] for tag in BLOCKS for slash in ("", "/")}
BREAKS |= {"br": ["line"], "li": ["item"], "tr": ["row"], "td": ["cell"], "th": ["cell"]}
BREAKS |= {"table": ["block", "row"], "/table": ["end", "block"], "/tr": ["end"]}
BREAKS |= {"/ul": ["end", "block"], "/ol": ["end", "block"], "/li": ["end"]}
HTML_NEWLINE = re.compile(r"\r\n?")  # of Windows and of old Macs: \n to an HTML parser
HTML_CONTROL = re.compile("[\0-\x08\x0b\x0e-\x1f]")
# Characters by numbers that Unicode does not have, of any length.
IMPOSSIBLE_REFERENCE = re.compile(r"&#0*[1-9]\d{7,};?")
ROW_START = "\0"  # stands for the begin of a table's row, whose first cell has no " | " before it


def html_tags(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, attributes, the text up to the next) of each tag; an end tag's name is "/p"."""
    name = ""
    attributes = ""
    position = 0
    while tag := TAG.search(text, position):
        yield name, attributes, text[position : tag.start()]
        name = (tag[1] or "").lower()
        attributes = tag[2] or ""
        position = tag.end()
        if name in ("script", "style") and not attributes.endswith("/"):
            # What stands in these is no HTML: go on at their end tag.
            position = re.compile(rf"</{name}|\Z", re.I).search(text, position).start()
    yield name, attributes, text[position:]


class OpenElements:
    """The elements that a place in a page stands in."""

    def __init__(self) -> None:
        self.stack = []  # (name, does it hide its text)
        self.count = Counter()  # how many of each name are open
        self.n_hiding = 0

    def take_tag(self, tag: str, attributes: str) -> None:
        """Open or close what a tag opens or closes."""
        if tag in NESTING and not attributes.endswith("/"):  # <a/> opens nothing
            hides = tag in HIDDEN or bool(NAVIGATION.search(attributes))
            self.stack.append((tag, hides))
            self.count[tag] += 1
            self.n_hiding += hides
        while tag[:1] == "/" and self.count[tag[1:]]:  # it closes what was left open inside, too
            name, hides = self.stack.pop()
            self.count[name] -= 1
            self.n_hiding -= hides
            if name == tag[1:]:
                break


class PageText:
    """The text of a page while it is put together: runs of text, line breaks between them."""

    def __init__(self) -> None:
        self.finished = []
        self.run = []  # the pieces of text since the last break
        self.run_is_pre = False  # is the run in <pre>, where blanks and line ends count?
        self.n_newlines = 0  # due before the next text
        self.lead = ""  # "- " of an item, " | " of a cell: due before the next text

    def add(self, text: str, is_pre: bool) -> None:
        self.run.append(text)
        self.run_is_pre = is_pre

    def end_run(self) -> None:
        """Finish the run, if it says anything, with the breaks that were due before it."""
        text = "".join(self.run)
        self.run.clear()
        if self.run_is_pre:
            text = text.rstrip().lstrip("\n")
        else:
            text = " ".join(text.split())
        if text:
            lead = self.lead.replace(ROW_START + " | ", "").replace(ROW_START, "")
            self.finished.append("\n" * self.n_newlines + lead + text)
            self.n_newlines = 0
            self.lead = ""

    def break_line(self, kind: str, in_list: bool) -> None:
        """What a tag of BREAKS asks for before the next text."""
        if kind == "item":
            self.n_newlines = max(self.n_newlines, 1)
            self.lead = "- "
        elif kind == "row":
            self.n_newlines = max(self.n_newlines, 1)
            self.lead = ROW_START
        elif kind == "cell":
            if not self.lead:  # it follows another cell, on the same line
                self.n_newlines = 0
            self.lead += " | "
        elif kind == "end":
            self.n_newlines = max(self.n_newlines, 1)
            self.lead = ""
        elif self.lead:  # an item or a cell has only just begun: its first block is on its line
            return
        elif kind == "line":
            self.n_newlines = min(self.n_newlines + 1, 2)
        else:  # a block: a blank line before it, but not within a list
            self.n_newlines = max(self.n_newlines, 1 if in_list else 2)


def html_to_text(text: str) -> str:
    """The text of an HTML page without navigation, forms and scripts: paragraphs with a blank line
    between them, list items as "- ", table cells with " | ", <pre> as it is. Never raises."""
    elements = OpenElements()
    page = PageText()
    text = HTML_CONTROL.sub("", text.removeprefix("\ufeff"))  # ROW_START among them
    for tag, attributes, data in html_tags(HTML_NEWLINE.sub("\n", text)):
        if tag == "header" and elements.count["article"]:  # the title of an article, not of a site
            tag = "div"
        elements.take_tag(tag, attributes)
        if elements.n_hiding:  # within a menu, a form, a script
            continue
        if tag in BREAKS:
            page.end_run()
            for kind in BREAKS[tag]:
                page.break_line(kind, in_list=elements.count["li"] > 0)
        data = unescape(IMPOSSIBLE_REFERENCE.sub("\ufffd", data))
        data = HTML_NEWLINE.sub("\n", data)  # those that were written as &#13;
        is_link_to_itself = elements.count["a"] and data in "¶§#"  # of a heading
        if not is_link_to_itself:
            page.add(data, is_pre=elements.count["pre"] > 0)
    page.end_run()
    return "".join(page.finished).lstrip("\n")


def clean_html(text: str, record: dict, is_html: bool | None) -> str:
    """HTML to text, where the document is HTML; is_html None: as its path or URL says."""
    if is_html is None:
        path = record.get("path") or ""
        url, _, _ = (record.get("url") or "").partition("?")
        is_html = file_ending(path) in HTML_ENDINGS or file_ending(url) in HTML_ENDINGS
    return html_to_text(text) if is_html else text


# --------------------------------------------------------------------------------------------------
# Characters

NEWLINE = re.compile(r"\r\n|[\r\v\f\x85\u2028\u2029]")
# Control characters, soft hyphens, byte order marks, zero-width blanks, marks of direction. Not the
# zero-width (non-)joiners of letters, by which Persian, Indic scripts and emoji mean something.
INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f"
    "\u202a-\u202e\u2060-\u206f\ufeff\ufffe\uffff]"
)


def clean_unicode(text: str) -> str:
    """NFC (Unicode Standard Annex 15), \\n for every kind of line end, no invisible characters."""
    text = NEWLINE.sub("\n", text)
    text = INVISIBLE.sub("", text)  # before NFC, which then composes what stood on both sides
    return unicodedata.normalize("NFC", text)


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
def symbols_pattern(names: str | bool) -> Any:
    """The pattern of the kinds in SYMBOLS that `names` has: True for all, or "a,b". A UserError
    for a kind that is none of them."""
    kinds = list(SYMBOLS)
    if names is not True:
        kinds = [name.strip() for name in str(names).split(",")]
    for kind in kinds:
        if kind not in SYMBOLS:
            expected = f"expected true, or some of {','.join(SYMBOLS)}"
            raise UserError(f"clean_symbols={names}: {expected}")
    return regex.compile("|".join(f"(?:{SYMBOLS[kind]})" for kind in kinds))


def drop_symbols(text: str, names: str | bool) -> str:
    """No special characters of these kinds: True, or a string as clean_symbols has it."""
    return symbols_pattern(names).sub("", text)


def clean_whitespace(text: str) -> str:
    """For prose: one blank between words, none at the ends of lines, at most one blank line."""
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def check_length(text: str, min_chars: int, max_chars: int) -> str:
    """min_chars to max_chars characters."""
    reject_if(len(text) < min_chars, "length: under min_chars")
    reject_if(len(text) > max_chars, "length: over max_chars")
    return text


# --------------------------------------------------------------------------------------------------
# Quality: the rules of Gopher, C4 and FineWeb

LETTER = re.compile(r"[^\W\d_]")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}


def check_gopher_quality(text: str) -> str:
    """Rae et al. 2021, section A.1.1. A word is what stands between blanks (datatrove's tokenizers
    make words of punctuation marks, too)."""
    words = text.split()
    lines = text.splitlines()
    n_words = len(words)
    reject_if(n_words < 50, "gopher: fewer than 50 words")
    reject_if(n_words > 100_000, "gopher: more than 100,000 words")
    mean_length = sum(map(len, words)) / n_words
    reject_if(mean_length < 3, "gopher: words too short")
    reject_if(mean_length > 10, "gopher: words too long")
    n_ellipses = text.count("...") + text.count("…")
    reject_if(text.count("#") / n_words > 0.1, "gopher: too many hashes")
    reject_if(n_ellipses / n_words > 0.1, "gopher: too many ellipses")
    n_bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    n_open_lines = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    reject_if(n_bullets / len(lines) > 0.9, "gopher: too many bullet lines")
    reject_if(n_open_lines / len(lines) > 0.3, "gopher: too many lines that end in an ellipsis")
    n_with_letter = sum(map(bool, map(LETTER.search, words)))
    reject_if(n_with_letter / n_words < 0.8, "gopher: too few words with a letter")
    reject_if(len(STOP_WORDS.intersection(words)) < 2, "gopher: too few stop words")
    return text


# {n: the largest share of a text's characters} in its commonest n-gram, and in repeated n-grams
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def count_repeats(parts: Sequence) -> tuple[int, int]:
    """How many of the parts stood before already, and their characters."""
    unique = set(parts)
    n_repeats = len(parts) - len(unique)
    n_chars = sum(map(len, parts)) - sum(map(len, unique))
    return n_repeats, n_chars


def repeated_ngram_chars(repeated: dict, n: int) -> int:
    """The characters in n-grams that stood before already, each word counted once and no blanks.
    repeated: {index of its first word: n-gram} of those that occur twice."""
    seen = set()
    n_chars = 0
    next_free = 0  # the words before this one are counted
    for i, ngram in repeated.items():
        if i < next_free:
            continue
        if ngram in seen:
            n_chars += sum(map(len, ngram))
            next_free = i + n
        else:
            seen.add(ngram)
    return n_chars


def check_gopher_repetition(text: str) -> str:
    """Rae et al. 2021, table A1, as datatrove reads it: a top n-gram counts with its blanks, the
    repeated ones without and without overlap."""
    size = len(text) or 1  # characters; an empty text repeats nothing
    paragraphs = re.split(r"\n{2,}", text.strip())
    lines = [line for line in text.split("\n") if line]
    for kind, parts in (("paragraph", paragraphs), ("line", lines)):
        n_repeats, n_chars = count_repeats(parts)
        reject_if(n_repeats / (len(parts) or 1) > 0.30, f"gopher: duplicate {kind}s")
        reject_if(n_chars / size > 0.20, f"gopher: characters in duplicate {kind}s")

    words = text.split()
    ngrams = dict(enumerate(zip(words, words[1:])))  # {index of its first word: n-gram}, n = 2
    for n in range(2, 11):
        counts = Counter(ngrams.values())
        repeated = {i: ngram for i, ngram in ngrams.items() if counts[ngram] > 1}
        if n in TOP_NGRAM and len(words) >= n:
            top = max(repeated.values(), key=counts.get, default=tuple(words[:n]))  # or the first
            n_chars = len(" ".join(top)) * max(1, counts[top])
            reject_if(n_chars / size > TOP_NGRAM[n], f"gopher: top {n}-gram")
        if n in REPEATED_NGRAMS:
            n_chars = repeated_ngram_chars(repeated, n)
            reject_if(n_chars / size > REPEATED_NGRAMS[n], f"gopher: duplicate {n}-grams")
        # An n-gram can occur twice only where both shorter ones inside it do: few places are left.
        ngrams = {i: tuple(words[i : i + n + 1]) for i in repeated if i + 1 in repeated}
    return text


CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICY = re.compile("terms of use|(?:privacy|cookie) policy|uses cookies|use (?:of )?cookies")
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+(?=[^\sa-z])|[。！？](?=.)")


def check_c4(text: str) -> str:
    """C4's rules (Raffel et al. 2020, section 2.2) as FineWeb used them: without the one that drops
    lines without terminal punctuation. Unlike there blank lines stay, for the paragraphs' sake."""
    lines = []
    n_sentences = 0
    for line in text.split("\n"):
        line = line.strip()
        words = line.split()
        lower = line.lower()
        if 0 < len(words) < 3:
            continue
        if len(line) > 1000 and max(map(len, words)) > 1000:  # no word is so long
            continue
        reject_if("lorem ipsum" in lower, "c4: lorem ipsum")
        if "javascript" in lower:
            continue
        reject_if("{" in line, "c4: curly bracket")
        if POLICY.search(lower):
            continue
        if words:
            n_sentences += 1 + len(SENTENCE_END.findall(line))
        lines.append(CITATION.sub("", line) if "[" in line else line)  # most lines have none
    reject_if(n_sentences < 5, "c4: fewer than 5 sentences")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


TERMINAL = set(".!?\"'”’»。．！？｡؟۔।॥։።")  # quotation marks too, as FineWeb's list of 2024 had


def check_fineweb(text: str) -> str:
    """Penedo et al. 2024, section 3.6, and the ratio of lines to words of datatrove's filter, whose
    limit for duplicate lines is 0.01 where the paper says 0.1. Blank lines do not count."""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    reject_if(not lines, "fineweb: no text")
    n_ended = sum(line[-1] in TERMINAL for line in lines)
    n_short = sum(len(line) <= 30 for line in lines)
    reject_if(n_ended / len(lines) < 0.12, "fineweb: too few lines end in punctuation")
    reject_if(n_short / len(lines) > 0.67, "fineweb: too many short lines")
    _, repeated_chars = count_repeats(lines)
    too_repetitive = repeated_chars / sum(map(len, lines)) > 0.1
    reject_if(too_repetitive, "fineweb: characters in duplicate lines")
    reject_if((len(lines) - 1) / len(text.split()) > 0.3, "fineweb: too few words a line")
    return text


# --------------------------------------------------------------------------------------------------
# Language and perplexity: what a model says


@lru_cache(1)  # a process loads it once
def language_model() -> Any:
    """py3langid's naive Bayes model of 140 languages (Lui & Baldwin 2012)."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("the step language needs py3langid: pip install py3langid") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def guess_language(text: str) -> tuple[str, float, list[str]]:
    """(language, probability, rivals) of a text's first 5,000 characters, as ISO 639-1 codes. The
    rivals are what it can hardly be told from; the probability is theirs, too. "unknown" where
    there are too few letters."""
    sample = text[:5000]  # characters; more say nothing new, and cost time
    if sum(map(str.isalpha, sample)) < 20:
        return "unknown", 0.0, []
    ranked = language_model().rank(sample)  # [(language, probability)], the likeliest first
    top_probability = max(probability for _, probability in ranked)
    near = {name: share for name, share in ranked if share * 2 >= top_probability}
    best, *rivals = sorted(near, key=near.get, reverse=True)  # within a factor of two
    return best, sum(near.values()), rivals


def check_language(text: str, language: str, least_score: float) -> str:
    """Only this language, or what cannot be told from it, with at least this probability: FineWeb's
    filter (Penedo et al. 2024, section 3.3)."""
    best, score, rivals = guess_language(text)
    reject_if(language not in (best, *rivals), f"language: {best}")
    reject_if(score < least_score, "language: under language_score")
    return text


@lru_cache(1)  # a process loads it once
def small_model(folder: str, device: str) -> tuple:
    """(net, tok) of the checkpoint folder for the step perplexity."""
    if not folder:
        raise UserError("the step perplexity needs --perplexity_model=FOLDER, a small model")
    torch.set_num_threads(1)  # the other cores have documents of their own
    return load(folder, device)


@torch.no_grad()
def check_perplexity(text: str, net: GPT, tok: Tokenizer, band: Sequence[float]) -> str:
    """Perplexity of the first window under a small model of ours, as CCNet has it (Wenzek et al.
    2020, "LM filtering"): what is far below the band (low, high) is boilerplate, what is far above
    is no language that the model knows."""
    n_ctx = net.config.n_ctx
    head = text[: 16 * n_ctx]  # more characters than a window holds
    ids = [tok.eot_id, *tok.encode(head)][: n_ctx + 1]
    window = torch.tensor([ids], device=next(net.parameters()).device)  # (1, T + 1)
    loss_sum, n_targets = net(window[:, :-1], window[:, 1:].contiguous())
    mean_loss = float(loss_sum) / max(1, int(n_targets))  # nats a token
    perplexity = math.exp(min(700.0, mean_loss))  # beyond e**700 a float is infinite
    low, high = band
    reject_if(perplexity < low, "perplexity: under the band")
    reject_if(perplexity > high, "perplexity: over the band")
    return text


# --------------------------------------------------------------------------------------------------
# Blocklist and personal data


def bare_url(url: str) -> str:
    """example.com/page of https://user@www.example.com/page/"""
    url = url.strip().casefold()
    url = re.sub(r"^(?:(?:\w+:)?//)?(?:[^/@?#]*@)?(?:www\.)?", "", url)
    return url.rstrip("/?&")


class Blocklist(NamedTuple):
    urls: set[str]  # hosts and the beginnings of URLs, bare
    words: set[str]
    phrases: list[str]  # what is neither


@lru_cache(None)  # a process reads it once
def read_blocklist(path: str | Path) -> Blocklist:
    """The Blocklist in a file, one entry a line; what begins with "# " is a comment."""
    try:
        text = read_input(path).decode().casefold()
    except UnicodeDecodeError as error:
        why = f"not UTF-8 text ({error.reason}): convert it"
        raise UserError(f"--blocklist={path}: {why}") from None
    entries = set()
    for line in text.splitlines():
        parts = line.split()
        if parts and parts[0] != "#":
            entries.add(" ".join(parts))
    urls = {entry for entry in entries if "." in entry and " " not in entry}
    words = {entry for entry in entries if re.fullmatch(r"\w+", entry)}
    return Blocklist(set(map(bare_url, urls)), words, sorted(entries - urls - words))


def check_blocklist(text: str, url: str, path: str | Path) -> str:
    """A host in the file at `path` stands for its subdomains too, a URL for all that begin with it,
    a word or phrase for itself between non-letters, in either case (so not inside of Chinese, say).
    No file: nothing is rejected."""
    if not path:
        return text
    blocklist = read_blocklist(path)
    url = bare_url(url or "")[:2000]  # as there are so many beginnings
    host = re.split(r"[/:?#]", url)[0]
    candidates = {host}
    for dot in re.finditer(r"\.", host):  # b.org and org of a.b.org
        candidates.add(host[dot.end() :])
    candidates |= {url[:end] for end in range(len(host) + 1, len(url) + 1)}
    reject_if(not blocklist.urls.isdisjoint(candidates), "blocklist: URL")
    lower = " ".join(text.casefold().split())  # a phrase may stand on two lines
    reject_if(not blocklist.words.isdisjoint(re.findall(r"\w+", lower)), "blocklist: word")
    for phrase in blocklist.phrases:
        if phrase in lower:  # far faster than the pattern
            match = re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", lower)
            reject_if(match, "blocklist: phrase")
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


def is_public_ip(address: str) -> bool:
    """Does this text name a machine in the open? Four numbers under 32 are rather a version."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return ip.is_global and not ip.is_multicast and max(ip.packed) > 31


def clean_pii(text: str) -> str:
    """E-mail addresses, public IP addresses and telephone numbers become <email>, <ip> and <phone>.
    FineWeb replaces the first two (Penedo et al. 2024, section 3.7)."""

    def replace_ip(match):
        before = max(0, match.start() - 24)  # as far as the longest word of VERSION reaches
        if is_public_ip(match[0]) and not VERSION.search(text, before, match.start()):
            return "<ip>"
        return match[0]

    if "@" in text:  # most texts have none
        text = EMAIL.sub("<email>", text)
    text = IP.sub(replace_ip, text)
    return PHONE.sub("<phone>", text)  # last: an IP address looks like a number, too
