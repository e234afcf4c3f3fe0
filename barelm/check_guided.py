"""Are constrained answers right here? The masks of a grammar against trying every token, and an
engine's answers by them against the plain loop's."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import torch

from barelm.bpe import bpe_tokenizer
from barelm.check_rows import N_VOCAB, Finding, Skip, endless_tokenizer
from barelm.check_tokens import (
    engine_answers,
    logits_after,
    random_prompts,
    same_greedy,
    speaking_network,
)
from barelm.errors import UserError
from barelm.grammar import Guide, compile_grammar, import_llguidance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from barelm.check_rows import Place
    from barelm.tokenizer import Tokenizer

SCHEMAS: list[dict] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 7, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["ab", "a", "é", None]}, "maxItems": 2},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"anyOf": [{"const": "yes"}, {"const": "yes sir"}, {"type": "number", "maximum": 3.5}]},
    {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
]
PATTERNS = ["(ab|ba)+c{2,4}", "[a-e]*(é|[0-9]{2})x?", "a{3,9}|b+"]
WALKS = 4  # of each grammar
LONGEST = 30  # tokens of a walk


def check_guided(place: Place, serve: Callable | None = None) -> Iterator[Finding]:
    """Each mask along random walks through a few grammars: of JSON schemas against what the
    automaton says of each token's bytes, one after another; of regular expressions against the
    package regex, which matches text in part. Then answers of the engine, guided and free ones in
    one batch. serve: as `engine_answers`."""
    try:
        import_llguidance()
    except UserError as error:
        raise Skip(str(error)) from None
    tok = many_tokens()
    right = [masks_of_schema(tok, schema) for schema in SCHEMAS]
    yield counted("masks of JSON schemas", right)
    right = [masks_of_pattern(tok, pattern) for pattern in PATTERNS]
    yield counted("masks of regular expressions", right)
    yield guided_answers(place, serve or engine_answers)


def many_tokens() -> Tokenizer:
    """A byte-level tokenizer with tokens that cross what a grammar has as one."""
    pairs = [
        '{"',
        '":',
        '",',
        '"a',
        "a ",
        "ab",
        "ba",
        "12",
        "[[",
        "]]",
        "[]",
        "é",
        "ye",
        "es",
        "aa",
    ]
    merges = []
    for pair in pairs:
        data = pair.encode()
        merges.append((data[:1], data[1:]))
    merges += [(b'"', b'":'), (b"ye", b"s"), (b"aa", b"aa"), (b"ab", b"ab"), (b"1", b"12")]
    return bpe_tokenizer(merges)


def counted(name: str, pairs: list[tuple[int, int]]) -> Finding:
    """The Finding of [(wrong bits, bits)]."""
    n = sum(of for _, of in pairs)
    n_wrong = sum(wrong for wrong, _ in pairs)
    return Finding(name, float(n_wrong), 0.0, f"of {n:,} tokens at their places {n_wrong} differ")


def bits(guide: Guide, n: int) -> np.ndarray:
    """(n,) bool of a guide's mask."""
    return np.unpackbits(guide.mask, bitorder="little")[:n].astype(bool)


def walk(tok: Tokenizer, guide: Guide, draw: random.Random) -> Iterator[tuple[bytes, np.ndarray]]:
    """(text so far, the mask (n_vocab,) bool of what may follow), along a random text."""
    text = b""
    for _ in range(LONGEST):
        if guide.done:
            return
        mask = bits(guide, tok.n_vocab)
        yield text, mask
        allowed = mask.nonzero()[0].tolist()
        if not allowed:
            return
        id = draw.choice(allowed)
        guide.take(id)
        text += tok.token_bytes(id)


def masks_of_schema(tok: Tokenizer, schema: dict) -> tuple[int, int]:
    """(bits that differ from what a vocabulary of the 256 bytes allows one after another, bits)."""
    single = bpe_tokenizer([])
    byte_id = {data: id for id, data in single.bytes.items()}
    by_tokens = compile_grammar(tok, "json_schema", schema)
    by_bytes = compile_grammar(single, "json_schema", schema)
    n_wrong = 0
    n = 0
    for seed in range(WALKS):
        for text, mask in walk(tok, by_tokens.begin(), random.Random(seed)):
            plain = by_bytes.begin()
            for byte in text:
                plain.take(byte_id[bytes([byte])])
            for id in range(tok.n_vocab):
                data = [byte_id[bytes([byte])] for byte in tok.token_bytes(id)]
                is_right = bool(data) and plain.matcher.validate_tokens(data) == len(data)
                n_wrong += int(is_right != mask[id])
            n += tok.n_vocab
    return n_wrong, n


def masks_of_pattern(tok: Tokenizer, pattern: str) -> tuple[int, int]:
    """(bits that differ from what the package regex says of the text and each token, bits)."""
    grammar = compile_grammar(tok, "regex", pattern)
    n_wrong = 0
    n = 0
    for seed in range(WALKS):
        for text, mask in walk(tok, grammar.begin(), random.Random(seed)):
            for id in range(tok.n_vocab):
                data = tok.token_bytes(id)
                n_wrong += int((bool(data) and may_begin(pattern, text + data)) != mask[id])
            n += tok.n_vocab
    return n_wrong, n


def may_begin(pattern: str, data: bytes) -> bool:
    """Whether bytes, of which the last letter may be half there, begin a match of the pattern."""
    letters = [data.decode(errors="ignore")]
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return False
        # Of the letters that may become of the half the pattern names one, or none.
        whole = [letter for letter in pattern if letter.encode().startswith(data[error.start :])]
        letters = [letters[0] + letter for letter in whole]
    return any(regex.fullmatch(pattern, text, partial=True) for text in letters)


def guided_answers(place: Place, serve: Callable) -> Finding:
    """The Finding on greedy answers by schemas, in one batch with free ones, by the engine against
    the plain loop."""
    net = speaking_network(place, torch.float32)
    tok = endless_tokenizer()
    grammars = [compile_grammar(tok, "json_schema", schema) for schema in SCHEMAS]
    prompts = random_prompts((3, 17, 8, 30, 1, 12))
    chosen: list[Any] = [grammars[0], None, grammars[1], grammars[2], None, grammars[0]]
    guides = [grammar and grammar.begin() for grammar in chosen]
    greedy = [dict(temperature=0.0)] * len(prompts)
    ours = serve(net, prompts, greedy, at_once=True, guides=guides)
    right = []
    net.fast = False
    for prompt, grammar, answer in zip(prompts, chosen, ours):
        right.append(plain_answer(net, prompt, grammar and grammar.begin(), len(answer)))
    net.fast = True
    return same_greedy("greedy, guided and free in one batch", net, prompts, ours, right)


def plain_answer(net: Any, prompt: list[int], guide: Guide | None, n: int) -> list[int]:
    """The ids of a greedy answer of n tokens at most, by whole passes of the network."""
    ids: list[int] = []
    while len(ids) < n and not (guide and guide.done):
        logits = logits_after(net, prompt + ids)
        if guide is not None:
            mask = torch.from_numpy(bits(guide, N_VOCAB))
            logits = logits.masked_fill(~mask, -torch.inf)
        ids.append(int(logits.argmax()))
        if guide is not None:
            guide.take(ids[-1])
    return ids
