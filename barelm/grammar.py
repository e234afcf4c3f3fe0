"""What a text may be: a grammar, and at each of its places a mask of the tokens that may follow.

    grammar = compile_grammar(tok, "json_schema", {"type": "object", ...})  # kept for the next one
    guide = grammar.begin()  # for one sequence
    guide.allowed(tok.eos_ids)  # (n_bytes,) uint8, a bit a token, the lowest first
    guide.take(id)  # the token that was chosen; guide.done: nothing can follow

The library llguidance does the work: a lexer of derivatives of regular expressions and an Earley
parser (Earley 1970) run over bytes, and over the vocabulary as a tree of bytes, so that a token is
allowed where its bytes go on with what stands there, however it cuts the text. Special tokens are
no text and so are never allowed, nor is padding of the vocabulary; what ends the text is told
apart, and allowed where the text is whole.

A grammar is compiled for a vocabulary; what it takes is bounded (LIMITS), and what it asks for that
the library cannot enforce is refused by name. Method: Willard and Louf 2023 (masks from an
automaton over the vocabulary), Koo et al. 2024 (of tokens as bytes).
"""

from __future__ import annotations

import json
import math
import re
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.errors import UserError
from barelm.grammar_trial import STACK, Trial

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

    from barelm.tokenizer import Tokenizer

KINDS = ("json_schema", "json_object", "regex", "choice", "lark", "ebnf")
LONGEST = 200_000  # characters of a grammar
DEEPEST = 60  # objects and lists of a schema within each other
MOST_STATES = 1000  # of a division
INT64 = (-(2**63), 2**63 - 1)  # the library's integers; its other numbers are doubles
MOST_COMPILED = 32  # grammars that are kept
# Of the library, which gives up beyond them. A state of the lexer takes 1 to 2 kB.
LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # 20 ms
    "step_lexer_fuel": 200_000,  # 14 ms, which the whole batch waits for
    "step_max_items": 50_000,
    "max_items_in_row": 2000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
STACK_SIZE_LOCK = threading.Lock()  # the size is of all threads that begin
# A model that knows no better would write blanks for ever. So many hold a line end and its indent.
BLANKS = r"[\x20\x0A\x0D\x09]{1,20}"
# As Python's json and most chat templates write it.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# As the library has it by default, the text is tokenized in the usual way where it has to be a
# certain one. Here the model chooses among all ways, by its own probabilities.
HEAD = '%llguidance {"no_forcing": true}\n'


def import_llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        why = "constrained text needs llguidance"
        raise UserError(f"{why}: pip install -r requirements-serve.txt") from None
    return llguidance


class Vocabulary:
    """A tokenizer's tokens as bytes, for the library: what it asks a tokenizer for. Behind the last
    id it has one more, which stands for the end of the text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tok: Tokenizer) -> None:
        self.kind = tok.kind
        self.n_vocab = tok.n_vocab
        self.eos_token_id = tok.n_vocab
        self.tokens = []
        self.special_token_ids = [self.eos_token_id]
        for id in range(tok.n_vocab):
            data = tok.bytes.get(id)
            if data is None:  # a special token, or none
                data = tok.shown.get(id, b"")
                if data:
                    self.special_token_ids.append(id)
            self.tokens.append(data)
        self.tokens.append(b"<the end of the text>")
        own = set(tok.bytes.values())
        self.lacking = [chr(i) for i in range(32, 127) if bytes([i]) not in own]
        self.library = import_llguidance().LLTokenizer(self, eos_token=self.eos_token_id)

    def __call__(self, text: str) -> list[int]:
        """The library asks a tokenizer for the ids of a text that has to be: with HEAD, never."""
        raise RuntimeError("no grammar here forces a text")


# What was made last for each tokenizer: the server has one.
@lru_cache(maxsize=4)
def vocabulary_of(tok: Tokenizer) -> Vocabulary:
    return Vocabulary(tok)


def compile_grammar(tok: Tokenizer, kind: str, source: Any) -> Grammar:
    """The Grammar of texts that are

    - json_schema: JSON that `source`, a JSON Schema (draft 2020-12) as a dict, holds valid;
    - json_object: a JSON object (`source` is not looked at);
    - regex: a whole match of `source`, in the syntax of Rust's crate regex;
    - choice: one of `source`, a list of texts;
    - lark: of the grammar `source`, in llguidance's form of Lark's, `json_rule` being a part of it;
    - ebnf: of the grammar `source`, in that form or in llama.cpp's (GBNF).

    UserError: what is wrong with it. It may take seconds, so call it in a thread of its own; what
    takes too many is refused (barelm/grammar_trial.py). The last MOST_COMPILED are kept."""
    if kind not in KINDS:
        raise UserError(f"a grammar of kind {kind!r}: expected one of {', '.join(KINDS)}")
    import_llguidance()
    text = lark_text(kind, source)
    if len(text) > LONGEST:
        raise UserError(f"{len(text):,} characters: expected {LONGEST:,} at most")
    vocabulary = vocabulary_of(tok)
    if kind in ("json_schema", "json_object") and vocabulary.lacking:
        lacking = "".join(vocabulary.lacking[:8])
        why = f"this tokenizer ({vocabulary.kind}) has no token of its own for {lacking!r}"
        raise UserError(f"{why}: it cannot write all of JSON")
    return compile_text(vocabulary, text)


@lru_cache(maxsize=1)
def trial() -> Trial:
    """The process that compiles each grammar before this one does."""
    return Trial(LIMITS)


@lru_cache(maxsize=MOST_COMPILED)
def compile_text(vocabulary: Vocabulary, text: str) -> Grammar:
    """Where a chain of rules or of $ref is long, a usual stack overflows, which ends the process:
    so it is compiled in a thread with a larger one."""
    try:
        trial().check(HEAD + text)
    except UserError as error:
        raise UserError(one_line(error)) from None
    future: Future = Future()

    def compile_it() -> None:
        try:
            future.set_result(Grammar(vocabulary, text))
        except BaseException as error:
            future.set_exception(error)

    with STACK_SIZE_LOCK:
        usual = threading.stack_size(STACK)
        try:
            threading.Thread(target=compile_it, daemon=True).start()
        except RuntimeError:  # a system that gives no such room
            raise UserError("no memory to compile the grammar") from None
        finally:
            threading.stack_size(usual)
    return future.result()


def lark_text(kind: str, source: Any) -> str:
    """A grammar of any kind as llguidance's Lark text."""
    if kind == "json_object":
        return "start: " + json_rule({"type": "object"})
    if kind == "json_schema":
        return "start: " + json_rule(source)
    if kind == "regex":
        check_texts([source], "a regular expression")
        if not source:
            raise UserError("an empty regular expression")
        return f"start: /{import_llguidance().regex_to_lark(source)}/"
    if kind == "choice":
        if not isinstance(source, list) or not source or "" in source:
            raise UserError("expected a list of texts, none of them empty")
        check_texts(source, "a list of texts")
        return "start: " + " | ".join(json.dumps(text) for text in source)
    check_texts([source], "a grammar as text")
    if kind == "ebnf":
        if "%llguidance" in source:
            raise UserError("%llguidance is not supported: these settings are the server's")
        with library_errors():
            from llguidance.gbnf_to_lark import any_to_lark

            return any_to_lark(source)
    return source


def check_texts(texts: list, expected: str) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"expected {expected}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError("half a surrogate pair is no text")


def json_rule(schema: dict, compact: bool = False) -> str:
    """The right side of a rule of Lark's, for JSON that a schema holds valid; UserError where it
    has what cannot be enforced. What the library itself refuses it tells when the whole is
    compiled. compact: on one line, with a blank behind each comma and colon."""
    if not isinstance(schema, dict):
        raise UserError(f"a schema is a JSON object, not {type(schema).__name__}")
    check_depth(schema)
    if "x-guidance" in schema:
        raise UserError("x-guidance is not supported: it would loosen what the schema says")
    check_keywords(schema)
    spacing = COMPACT if compact else {"whitespace_pattern": BLANKS}
    text = json.dumps(schema | {"x-guidance": spacing})
    return f"%json {text}"


def check_depth(value: Any) -> None:
    level = [value]
    depth = 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise UserError(f"more than {DEEPEST} objects and lists within each other")
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = [item for item in inner if isinstance(item, (dict, list))]


def check_keywords(schema: dict) -> None:
    """Refuse what the library would take and not hold, or for long: it tells the rest itself. What
    looks like a keyword inside of a const or as a property's name is looked at as one too, which
    matters where its value is of a keyword's type alone."""
    stack = [schema]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        if not isinstance(value, dict):
            continue
        stack += value.values()
        check_least(value.get("minProperties"), value.get("required"))
        check_multiple(value.get("multipleOf"))
        for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
            check_limit(name, value.get(name))
        options = value.get("enum")
        for one in [value.get("const"), *(options if isinstance(options, list) else [])]:
            if type(one) is int and abs(one) > 2**53:
                raise UserError(f"{str(one):.30} is not supported: beyond 2**53 it is rounded")


def check_least(least: Any, required: Any) -> None:
    """Refuse minProperties where names that are not listed would have to be counted: the library
    lets one of these come twice, and two of a name are one property."""
    n_required = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, (int, float)) and least > max(n_required, 1):
        why = "the same name twice would be counted twice"
        raise UserError(f"minProperties = {least} is not supported: {why}; list them, required")


def check_multiple(number: Any) -> None:
    """Refuse a multipleOf whose automaton, which divides, has too many states to be built."""
    if type(number) not in (int, float) or not 0 < number < math.inf:
        return
    whole = number
    while whole < MOST_STATES and whole != int(whole):
        whole *= 10
    if whole > MOST_STATES:
        why = f"expected {MOST_STATES} at most, counted in its last digit"
        raise UserError(f"multipleOf = {number} is not supported: {why}")


def check_limit(name: str, number: Any) -> None:
    """Refuse a limit that the library would round to one that allows more."""
    if type(number) not in (int, float) or abs(number) <= 2**53:
        return
    rounded = as_library(number)
    if name in ("minimum", "exclusiveMinimum"):
        allows_more = rounded < number
    else:
        allows_more = rounded > number
    if allows_more:
        raise UserError(f"{name} beyond 2**53 is not supported: numbers are rounded there")


def as_library(number: float) -> int:
    """A number beyond 2**53 as the library has it."""
    low, high = INT64
    number = min(max(number, low), high)
    return min(int(float(number)), high)


class Grammar:
    """A compiled grammar, which any number of sequences begin with."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        library = import_llguidance()
        limits = library.LLParserLimits(**LIMITS)
        self.vocabulary = vocabulary
        with library_errors():
            grammar = library.LLMatcher.grammar_from_lark(HEAD + text)
            self.matcher = library.LLMatcher(
                vocabulary.library, grammar, log_level=0, limits=limits
            )
        if self.matcher.is_error():
            raise UserError(one_line(self.matcher.get_error()))
        self.begin()  # it may be that no text begins so

    def begin(self) -> Guide:
        """A Guide for one sequence."""
        with library_errors():
            matcher = self.matcher.deep_copy()
        return Guide(self.vocabulary, matcher)


class Guide:
    """Where a sequence stands in its grammar. UserError, from any of its methods: it is lost, such
    as beyond the library's limits; no other sequence is.

    done: the text is whole, and nothing can follow."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any) -> None:
        self.vocabulary = vocabulary
        self.matcher = matcher
        self.done = False
        self.may_end = False  # the text is whole as it is, whether or not more can follow
        self.mask = None  # (n_bytes,) uint8: of ordinary tokens
        self.look()

    def look(self) -> None:
        """Find out what may follow."""
        with library_errors():
            if self.matcher.is_stopped() and not self.matcher.is_error():
                self.done = True
                return
            data = self.matcher.compute_bitmask()
            is_error = self.matcher.is_error()
        if is_error:
            raise UserError(one_line(self.matcher.get_error()))
        mask = np.frombuffer(data, np.uint8).copy()
        byte, bit = divmod(self.vocabulary.eos_token_id, 8)
        self.may_end = bool(mask[byte] >> bit & 1)
        mask[byte] &= (1 << bit) - 1  # neither it nor what would be behind it is a token
        self.mask = mask[: byte + 1]
        self.mask[byte + 1 :] = 0
        if not self.mask.any():
            if not self.may_end:
                raise UserError("the grammar allows no text from here on by this tokenizer")
            self.done = True

    def allowed(
        self, ends: Sequence[int], must_go_on: bool = False, too_early: bool = False
    ) -> np.ndarray:
        """(ceil((n_vocab + 1) / 8),) uint8, a bit for each token that may follow, of id 0 the
        lowest of the first: `ends` (ids that end a sequence) too where the text is whole, but not
        where it must go on and can. too_early: nor those that are a part of the text, where there
        is another."""
        mask = self.mask.copy()
        if too_early:
            for id in ends:
                mask[id // 8] &= ~np.uint8(1 << id % 8)
            return mask if mask.any() else self.mask.copy()
        if self.may_end and not must_go_on:
            for id in ends:
                mask[id // 8] |= 1 << id % 8
        return mask

    def take(self, id: int) -> None:
        """Go on with a token, none that ends the sequence."""
        with library_errors():
            is_right = self.matcher.consume_token(id)
        if not is_right:
            raise UserError(one_line(self.matcher.get_error() or "a token that it does not allow"))
        self.look()


@contextmanager
def library_errors() -> Iterator[None]:
    """What the library raises becomes a UserError of one line; a panic of Rust is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, UserError):
        raise
    except BaseException as error:
        raise UserError(one_line(error)) from None


def one_line(error: BaseException | str) -> str:
    """What the library says, without the grammar that it shows behind."""
    message = re.split(r"\n *\d+ \|", str(error))[0]
    message = re.sub(r"^(at )?\d+\(\d+\): ", "", message)
    message = message.removeprefix("failed to compile JSON schema: ")
    if message.startswith("NoExtension"):
        return "no text is valid by it"
    message = " ".join(message.split())
    if len(message) > 300:  # what is wrong stands at its end
        message = f"{message[:100]} … {message[-190:]}"
    return message
