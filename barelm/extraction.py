"""Answers that stand in a text: a question and a context become windows of tokens, and what a
network says of where an answer starts and ends becomes a part of the context again (SQuAD:
Rajpurkar et al. 2016, 2018; the two scores of a token: Devlin et al. 2019, section 4.2)."""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from barelm.places import token_places
from barelm.run import UserError
from barelm.tokenizer import pair_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from barelm.tokenizer import Tokenizer

LABELS = ["start", "end"]  # of the two scores of a token
LONGEST = 30  # tokens of an answer
LEAST_CONTEXT = 16  # tokens of the context that a window has at least

# --------------------------------------------------------------------------------------------------
# Rows become windows


@dataclass
class Window:
    """A question with a part of its context, as a network reads them."""

    ids: list[int]
    first: int  # the place of the context's first token among the ids
    places: list[tuple[int, int]]  # of each token of the context: its characters of the context


def make_windows(tok: Tokenizer, question: str, context: str, limit: int) -> list[Window]:
    """[Window] of a question and a context, of `limit` tokens at most: where one does not hold the
    context, each repeats a third of the one before. What stands before, between and behind the two
    is the post-processor's; where it says nothing of pairs, a line end parts them."""
    tokens = token_places(tok, context)
    asked = tok.encode(question)
    parts = pair_tokens(tok.spec, tok.special) or (tok.start, tok.encode("\n"), tok.end)
    before, between, behind = parts
    head = before + asked + between
    room = limit - len(head) - len(behind)
    if room < min(LEAST_CONTEXT, len(tokens)) or not tokens:
        raise UserError(f"a question of {len(asked)} tokens leaves no room in {limit}, or no text")
    step = max(1, room - room // 3)
    windows = []
    for begin in range(0, len(tokens), step):
        part = tokens[begin : begin + room]
        ids = head + [id for id, _, _ in part] + behind
        windows.append(Window(ids, len(head), [(a, b) for _, a, b in part]))
        if begin + room >= len(tokens):
            break
    return windows


def right_answers(row: dict) -> list[tuple[str, int]]:
    """[(text, where it starts in the context)] of a row; [] where it has no answer."""
    answers = row.get("answers") or {}
    if isinstance(answers, list):  # SQuAD's own files have a list of objects
        texts = [answer["text"] for answer in answers]
        starts = [answer["answer_start"] for answer in answers]
    else:
        texts = answers.get("text", [])
        starts = answers.get("answer_start", [])
    pairs = list(zip(texts, starts, strict=True))
    for text, start in pairs:
        if row["context"][start : start + len(text)] != text or not text:
            raise UserError("an answer that does not stand where answer_start says")
    return pairs


def target_in(window: Window, start: int, end: int) -> tuple[int, int]:
    """The places (first, last) among a window's ids of the tokens that hold context[start:end], or
    None where the window does not have all of them."""
    inside = [i for i, (a, b) in enumerate(window.places) if a < end and start < b]
    if not inside:
        return None
    first, last = window.places[inside[0]], window.places[inside[-1]]
    if first[0] > start or last[1] < end:
        return None
    return window.first + inside[0], window.first + inside[-1]


def read_answer(row: dict, tok: Tokenizer, limit: int) -> dict:
    """An example of a row {"question", "context", "answers": {"text", "answer_start"}}: the ids of
    a window with the first answer in it and the places of its first and last token, (0, 0) where
    there is no answer; all windows, for validation."""
    windows = make_windows(tok, row["question"], row["context"], limit)
    answers = right_answers(row)
    window = windows[0]
    target = (0, 0)
    if answers:
        text, start = answers[0]
        targets = [target_in(window, start, start + len(text)) for window in windows]
        having = [i for i, target in enumerate(targets) if target is not None]
        if not having:
            raise UserError("an answer that no window holds whole")
        window = windows[having[0]]
        target = targets[having[0]]
    texts = [text for text, _ in answers]
    example = {"ids": window.ids, "span": target, "windows": windows}
    return example | {"context": row["context"], "answers": texts}


# --------------------------------------------------------------------------------------------------
# Scores of tokens become an answer


def best_span(window: Window, scores: Tensor) -> list:
    """[score, first, last, lacking]: the likeliest answer within a window, as places of its
    context's tokens: the largest sum of a start's and an end's score, the end not before the start,
    nor more than LONGEST tokens. lacking: the sum of the first id's, that there is no answer.
    scores (T, 2) float32: of the window's ids."""
    n = len(window.places)
    begin = window.first
    starts, ends = scores[begin : begin + n].T
    sums = starts[:, None] + ends  # (n, n)
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(LONGEST - 1)
    best = sums.masked_fill(~allowed, -torch.inf).flatten().argmax()
    first, last = divmod(int(best), n)
    return [float(sums[first, last]), first, last, float(scores[0].sum())]


def choose_answer(
    context: str, windows: list, spans: list, may_lack: bool = False
) -> tuple[str, float]:
    """(the answer, its score) by the `best_span`s of all windows of a question. may_lack: "" is an
    answer too, where every window thinks so (SQuAD 2.0)."""
    best = max(range(len(spans)), key=lambda i: spans[i][0])
    score, first, last, _ = spans[best]
    lacking = min(span[3] for span in spans)
    if may_lack and lacking > score:
        return "", lacking
    places = windows[best].places
    return context[places[first][0] : places[last][1]].strip(), score


# --------------------------------------------------------------------------------------------------
# SQuAD's figures, by its evaluation script


def normal_answer(text: str) -> str:
    """The text without capitals, punctuation, articles and superfluous blanks."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(guess: str, right: str) -> float:
    """F1 of the words that two normal texts have in common."""
    guessed, there = normal_answer(guess).split(), normal_answer(right).split()
    if not guessed or not there:
        return float(guessed == there)
    n_common = (Counter(guessed) & Counter(there)).total()
    return 2 * n_common / (len(guessed) + len(there))


def answer_scores(guess: str, right: list[str]) -> tuple[float, float]:
    """(exact match, F1) of a guess: the best over the right answers; of none, the answer is ""."""
    rights = right or [""]
    exact = max(float(normal_answer(guess) == normal_answer(text)) for text in rights)
    return exact, max(word_f1(guess, text) for text in rights)
