"""eval.py's tasks of what is done with hidden states: tags of words, answers that stand in a text,
vectors of texts. Each gives ({metric: (value, standard error)}, how many rows, samples).

answers(name, depends_on, requests, work) is eval.py's `Answers`: it keeps what was answered, and
shares the requests out over all processes."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from barelm.embeddings import embed, pearson, read_embed_pair, right_ranks, spearman
from barelm.extraction import answer_scores, choose_answer, make_windows, right_answers
from barelm.heads import read_windows, tag_figures, tag_tokens
from barelm.run import UserError
from barelm.scores import mean
from barelm.scoring import Request
from barelm.tagging import count_spans, guessed_tags, is_bio, tokenize_words, words_of
from barelm.tasks import ROW_ERRORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from model import GPT

N_SHOWN = 3  # queries whose nearest neighbours are printed


def read_each(rows: list[dict], path: str | Path, read: Callable) -> list:
    """read(row) of each row; what it cannot read is told in a line."""
    if not rows:
        raise UserError(f"{path}: no row in it")
    values = []
    for number, row in enumerate(rows, 1):
        try:
            values.append(read(row))
        except (*ROW_ERRORS, UserError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}: row {number}: {why}") from None
    return values


def bootstrap(values: Sequence, score: Callable, seed: int) -> float:
    """The standard error of score(values): its spread over 200 samples of them, drawn with
    replacement."""
    rng = np.random.default_rng(abs(seed))
    scores = []
    for _ in range(200):
        drawn = rng.integers(0, len(values), len(values))
        scores.append(score([values[i] for i in drawn]))
    return float(np.std(scores, ddof=1))


# --------------------------------------------------------------------------------------------------
# Tags, and answers


def run_tag(
    net: GPT, tok: Tokenizer, answers: Callable, rows: list[dict], path: str | Path, seed: int
) -> tuple:
    """Accuracy of the words' tags and micro F1 of their spans, as seqeval has them."""
    texts = read_each(rows, path, words_of)
    tokenized = [tokenize_words(tok, text, words, net.config.n_ctx) for text, words, _ in texts]
    requests = [Request("", ids, []) for ids, _, _ in tokenized]

    def work(batch):
        tagged = tag_tokens(net, [request.context for request in batch])
        return [[label for label, _ in tokens] for tokens in tagged]

    counts = []
    log = []
    of_spans = is_bio(net.labels)
    for (text, words, right), (_, firsts, _), labels in zip(
        texts, tokenized, answers("tag", "tag", requests, work)
    ):
        guessed = guessed_tags(firsts, labels)
        counts.append(Counter())
        count_spans(counts[-1], right, guessed, of_spans)
        shown = [text[begin:end] for begin, end in words]
        log.append({"words": shown, "right": right, "answer": guessed})

    scores = {}
    for metric in ("accuracy", "f1") if of_spans else ("accuracy",):
        score = partial(tag_score, metric)
        scores[metric] = score(counts), bootstrap(counts, score, seed)
    return scores, len(rows), log


def tag_score(metric: str, counts: Iterable) -> float:
    """One of `tag_figures` of several texts together; counts: a Counter of each."""
    total = Counter()
    for of_text in counts:
        total.update(of_text)
    return tag_figures(total, 0).get(metric, 0.0)


def run_span(
    net: GPT, tok: Tokenizer, answers: Callable, rows: list[dict], path: str | Path
) -> tuple:
    """SQuAD's exact match and F1. Where some rows have no answer, none is an answer too."""
    limit = net.config.n_ctx
    right = read_each(rows, path, right_answers)
    windows = read_each(
        rows, path, lambda row: make_windows(tok, row["question"], row["context"], limit)
    )
    requests = []
    window_of = {}
    for of_row in windows:
        for window in of_row:
            place = [window.first, len(window.places)]
            requests.append(Request("", window.ids, [place]))
            window_of[str([window.ids, place])] = window

    def work(batch):
        read = [window_of[str([r.context, r.continuations[0]])] for r in batch]
        return read_windows(net, read)

    spans = iter(answers("span", "span", requests, work))
    may_lack = not all(right)
    log = []
    for row, of_row, texts in zip(rows, windows, right):
        row_spans = [next(spans) for _ in of_row]
        guess, score = choose_answer(row["context"], of_row, row_spans, may_lack)
        texts = [text for text, _ in texts]
        exact, f1 = answer_scores(guess, texts)
        sample = {"question": row["question"], "right": texts, "answer": guess, "score": score}
        log.append(sample | {"exact_match": exact, "f1": f1})
    scores = {m: mean([sample[m] for sample in log]) for m in ("exact_match", "f1")}
    return scores, len(rows), log


# --------------------------------------------------------------------------------------------------
# Vectors


def vectors_by(
    net: GPT, tok: Tokenizer, answers: Callable, name: str, texts: list[str], pooling: str
) -> Tensor:
    """(N, C) float32 unit vectors of texts."""
    requests = []
    for text in texts:
        ids, _ = tok.whole_text(text, net.config.n_ctx)
        if not ids:
            raise UserError(f"{name}: an empty text has no vector")
        requests.append(Request("", ids, []))

    def work(batch):
        rows = [request.context for request in batch]
        return embed(net, tok, rows, pooling, micro_tokens=1 << 30).tolist()  # a batch is one

    return torch.tensor(answers(name, ["embed", pooling], requests, work))


def run_sts(net: GPT, tok: Tokenizer, answers: Callable, rows: list[dict], path: str | Path,
            pooling: str, seed: int) -> tuple:  # fmt: skip
    """How well cosines agree with people's scores of likeness: Spearman's and Pearson's
    correlation over rows {"sentence1", "sentence2", "score"}."""

    def read(row):
        score = float(row["score"])
        if not math.isfinite(score):
            raise UserError(f"score={score}: expected a number")
        return row["sentence1"] + "", row["sentence2"] + "", score

    read_rows = read_each(rows, path, read)
    texts = [row[0] for row in read_rows] + [row[1] for row in read_rows]
    vectors = vectors_by(net, tok, answers, "sts", texts, pooling)
    first, second = vectors.chunk(2)
    cosines = (first * second).sum(1).tolist()
    pairs = [(cosine, row[2]) for cosine, row in zip(cosines, read_rows)]
    scores = {}
    for correlation in (spearman, pearson):
        score = partial(of_pairs, correlation)
        scores[correlation.__name__] = score(pairs), bootstrap(pairs, score, seed)
    return scores, len(rows), [row | {"cosine": cosine} for row, cosine in zip(rows, cosines)]


def of_pairs(correlation: Callable, pairs: Iterable) -> float:
    return correlation(*zip(*pairs))


def run_neighbours(net: GPT, tok: Tokenizer, answers: Callable, rows: list[dict], path: str | Path,
                   pooling: str, say: Callable) -> tuple:  # fmt: skip
    """Whether the text that belongs to a row's first is the nearest of all that belong to any
    (accuracy@1), and the mean of 1 / its rank (MRR). Rows are those of `finetune.py
    --method=embed`; the nearest of a few are printed."""
    pairs = [texts[:2] for texts in read_each(rows, path, read_embed_pair)]
    if all(query == document for query, document in pairs):
        raise UserError(f"{path}: rows of one text alone: there is nothing to look for")
    documents = list(dict.fromkeys(text for _, text in pairs))
    queries = [query for query, _ in pairs]
    vectors = vectors_by(net, tok, answers, "neighbours", queries + documents, pooling)
    of_queries, of_documents = vectors.split([len(queries), len(documents)])
    number = {text: i for i, text in enumerate(documents)}
    right = torch.tensor([number[text] for _, text in pairs])
    ranks = right_ranks(of_queries, of_documents, right).tolist()
    nearest = (of_queries @ of_documents.T).topk(min(5, len(documents)))
    log = []
    for i, (query, document) in enumerate(pairs):
        near = []
        for cosine, j in zip(nearest.values[i].tolist(), nearest.indices[i].tolist()):
            near.append({"text": documents[j], "cosine": cosine})
        log.append({"text": query, "right": document, "rank": ranks[i], "nearest": near})
        if i < N_SHOWN:
            say(f"{one_line(query)}: its own is number {ranks[i]} of {len(documents)}; nearest:")
            for other in near[:3]:
                say(f"  {other['cosine']:.3f}  {one_line(other['text'])}")
    scores = {"accuracy@1": mean([float(rank == 1) for rank in ranks])}
    scores["mrr"] = mean([1 / rank for rank in ranks])
    return scores, len(rows), log


def one_line(text: str) -> str:
    """The beginning of a text, as a line shows it."""
    line = " ".join(text.split())
    return line if len(line) <= 70 else line[:67] + "..."
