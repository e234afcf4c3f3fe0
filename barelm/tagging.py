"""Tags of words, such as the names in a text: rows with words become tokens with tags, and what a
network says of the tokens becomes spans of words again.

A tag is O (nothing), B-KIND (a span of that kind begins) or I-KIND (it goes on): BIO (Ramshaw and
Marcus 1995). A word has one tag, which the first of its tokens is asked for; its other tokens, and
what stands between words, are asked for nothing (Devlin et al. 2019, section 5.3)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from barelm.places import token_places
from barelm.run import UserError

if TYPE_CHECKING:
    from collections import Counter

    from barelm.tokenizer import Tokenizer


WORD = re.compile(r"\w+|[^\w\s]")  # of a text whose row has no words
PREFIXES = {"U": "S", "L": "E"}  # BILOU's letters for what IOBES calls so

# --------------------------------------------------------------------------------------------------
# Spans, and tags


def split_tag(tag: str) -> tuple[str, str]:
    """(prefix, kind) of a tag: ("B", "person") of B-person, ("O", "") of O."""
    prefix, _, kind = tag.partition("-")
    return PREFIXES.get(prefix, prefix), kind


def is_bio(tags: list[str] | set[str]) -> bool:
    """Whether tags are of spans: O, or a letter and a kind. Others, such as parts of speech, are
    each a word's own."""
    return all(tag == "O" or re.match(r"[BIESLU]-.", tag) for tag in tags)


def spans_of(tags: list[str]) -> list[tuple[str, int, int]]:
    """[(kind, begin, end)]: the spans of words that tags name, as seqeval's get_entities finds
    them. An I- that continues nothing begins a span."""
    spans = []
    open_kind = None  # of the span that the words before belong to
    begin = 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        goes_on = prefix in ("I", "E") and kind == open_kind
        if open_kind is not None and not goes_on:
            spans.append((open_kind, begin, i))
            open_kind = None
        if prefix != "O" and not goes_on:
            open_kind = kind
            begin = i
        if prefix in ("E", "S"):  # the last word of its span
            spans.append((kind, begin, i + 1))
            open_kind = None
    return spans


def bio_tags(spans: list[tuple[str, int, int]], n: int) -> list[str]:
    """The tags of n words, by the spans [(kind, begin, end)] in them."""
    tags = ["O"] * n
    for kind, begin, end in spans:
        tags[begin] = f"B-{kind}"
        tags[begin + 1 : end] = [f"I-{kind}"] * (end - begin - 1)
    return tags


def count_spans(
    counts: Counter, right: list[str], guessed: list[str], of_spans: bool = True
) -> None:
    """Add to a Counter what two lists of tags of the same words have in common: "right" and "words"
    of tags and, where they are of spans, ("hits" or "guessed" or "there", kind)."""
    counts["words"] += len(right)
    counts["right"] += sum(a == b for a, b in zip(right, guessed))
    if not of_spans:
        return
    spans = set(spans_of(right))
    guessed_spans = set(spans_of(guessed))
    for what, group in (("there", spans), ("guessed", guessed_spans)):
        counts.update((what, kind) for kind, _, _ in group)
    counts.update(("hits", kind) for kind, _, _ in spans & guessed_spans)


def span_scores(counts: Counter, kind: str | None = None) -> tuple[float, float, float]:
    """(precision, recall, F1) of what `count_spans` has counted: of one kind of spans, or of all
    together (micro). 0 where there is nothing to divide by, as seqeval has it."""
    sums = {"hits": 0, "guessed": 0, "there": 0}
    for key, n in counts.items():
        if isinstance(key, tuple) and kind in (None, key[1]):
            sums[key[0]] += n
    precision = sums["hits"] / max(1, sums["guessed"])
    recall = sums["hits"] / max(1, sums["there"])
    f1 = 2 * sums["hits"] / max(1, sums["guessed"] + sums["there"])
    return precision, recall, f1


def span_table(counts: Counter) -> str:
    """The scores of each kind of spans, as a text."""
    kinds = sorted({key[1] for key in counts if isinstance(key, tuple)})
    width = max(map(len, kinds), default=0)
    lines = ["spans of each kind: precision, recall, F1, and how many there are"]
    for kind in kinds:
        precision, recall, f1 = span_scores(counts, kind)
        n = counts.get(("there", kind), 0)
        lines.append(f"  {kind:{width}}  {precision:.4f}  {recall:.4f}  {f1:.4f}  {n:,}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Rows


def words_of(row: dict) -> tuple[str, list[tuple[int, int]], list[str]]:
    """(text, [(begin, end)] of its words, [tag] of each) of a row: {"tokens": [...], "tags": [...]}
    (or "ner_tags", which may be numbers of `tag_names`), or {"text", "entities": [{"start", "end",
    "label"}]} in characters. Tags of spans are BIO, whatever scheme the row has them in."""
    if "tokens" in row:
        text, words, tags = words_of_tokens(row)
        if is_bio(tags):
            tags = bio_tags(spans_of(tags), len(tags))
        return text, words, tags
    text = row["text"]
    words = [(match.start(), match.end()) for match in WORD.finditer(text)]
    return text, words, tags_of_entities(text, words, row["entities"])


def words_of_tokens(row: dict[str, list[str]]) -> tuple[str, list[tuple[int, int]], list[str]]:
    """The same of a row whose words stand apart: the text has a blank between them."""
    tokens = row["tokens"]
    tags = row["tags"] if "tags" in row else row["ner_tags"]
    if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags):
        raise UserError("tokens and tags: expected two lists, as long as each other")
    names = row.get("tag_names")
    if names is None and not all(isinstance(tag, str) for tag in tags):
        raise UserError("tags that are numbers need their names in the field tag_names")
    if names is not None:
        if any(not isinstance(tag, str) and tag < 0 for tag in tags):  # which counts from the end
            raise UserError("a tag below 0")
        tags = [tag if isinstance(tag, str) else names[tag] for tag in tags]
    words = []
    at = 0
    for token in tokens:
        words.append((at, at + len(token)))
        at += len(token) + 1
    return " ".join(tokens), words, tags


def tags_of_entities(text: str, words: list[tuple[int, int]], entities: list[dict]) -> list[str]:
    """The tag of each word [(begin, end)] of a text: a word is in an entity where any of its
    characters is. Of entities that share a word the first, and of those the longest, has it."""
    spans = []
    taken = 0  # words that belong to entities
    for entity in sorted(entities, key=lambda e: (e["start"], -e["end"])):
        begin, end = entity["start"], entity["end"]
        if not 0 <= begin < end <= len(text):
            raise UserError(f"an entity from {begin} to {end} in a text of {len(text)} characters")
        inside = [i for i, word in enumerate(words) if word[0] < end and begin < word[1]]
        if inside and inside[0] >= taken:
            spans.append((str(entity["label"]), inside[0], inside[-1] + 1))
            taken = inside[-1] + 1
    return bio_tags(spans, len(words))


# --------------------------------------------------------------------------------------------------
# Tokens


def first_tokens(places: list[tuple[int, int, int]], words: list[tuple[int, int]]) -> list:
    """Of each word [(begin, end)] the index of its first token, None where it has none; places:
    `token_places`. A token that stands for characters of several words (`(self`) is of the one that
    it has most of, of equals the later."""
    firsts = [None] * len(words)
    word = 0
    for i, (_, begin, end) in enumerate(places):
        while word < len(words) and words[word][1] <= begin:
            word += 1
        most = 0
        owner = None
        for number in range(word, len(words)):
            shared = min(end, words[number][1]) - max(begin, words[number][0])
            if words[number][0] >= end:
                break
            if shared >= max(most, 1):
                most = shared
                owner = number
        if owner is not None and firsts[owner] is None:
            firsts[owner] = i
    return firsts


def tokenize_words(
    tok: Tokenizer, text: str, words: list[tuple[int, int]], limit: int
) -> tuple[list[int], list[int], bool]:
    """(ids, the index of each word's first token or None, whether they were cut) of a text with
    what begins and ends one, `limit` tokens at most."""
    places = token_places(tok, text)
    room = max(0, limit - len(tok.start) - len(tok.end))
    before = len(tok.start)
    firsts = []
    for first in first_tokens(places, words):
        is_there = first is not None and first < room
        firsts.append(before + first if is_there else None)
    ids = tok.start + [id for id, _, _ in places[:room]] + tok.end
    return ids, firsts, len(places) > room


def read_tagged(row: dict, tok: Tokenizer, limit: int) -> dict:
    """An example of a row: ids, the tags of its words, and where the first token of each is. A word
    that was cut away, or has no token of its own, counts as O in a score of the guesses."""
    text, words, tags = words_of(row)
    ids, firsts, cut = tokenize_words(tok, text, words, limit)
    if all(first is None for first in firsts):
        raise UserError("no word")
    return {"ids": ids, "tags": tags, "firsts": firsts, "cut": cut}


def tag_labels(examples: list[dict]) -> list[str]:
    """The labels that examples need: O, then of each kind of spans B- and I-; or the tags
    themselves, where they are none of spans."""
    tags = {tag for e in examples for tag in e["tags"]}
    if not is_bio(tags):
        return sorted(tags)
    kinds = sorted({split_tag(tag)[1] for tag in tags} - {""})
    return ["O"] + [f"{prefix}-{kind}" for kind in kinds for prefix in "BI"]


def target_labels(example: dict, labels: list[str], ignored: int) -> list[int]:
    """The number of the label that each token of an example is to have; `ignored` for those that
    are asked for nothing, and for tags that are no label."""
    targets = [ignored] * len(example["ids"])
    for first, tag in zip(example["firsts"], example["tags"]):
        if first is not None and tag in labels:
            targets[first] = labels.index(tag)
    return targets


def guessed_tags(firsts: list, guesses: Any) -> list[str]:
    """The tags of words, by those of the tokens."""
    return [("O" if first is None else guesses[first]) for first in firsts]
