"""Tasks of questions: rows become requests, what the network says of them becomes scores.

What stands before a question, how it is cut into tokens and what counts as right are
lm-evaluation-harness's (0.4.13), so that numbers compare."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from barelm.run import UserError
from barelm.scores import flat, mean, perplexity
from barelm.scoring import Request
from barelm.tasks import ROW_ERRORS, Question, bad_row, read_row, subject_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from barelm.tasks import Task
    from barelm.tokenizer import Tokenizer


@dataclass
class Item:
    """A row, what is asked about it, and the requests that the model gets."""

    row: dict
    before: str  # the description and the solved examples
    question: Question
    requests: list  # one; of choices whose contexts are not the same, one for each

    @property
    def prompt(self) -> str:
        """All that the model reads before its answer, or before a choice."""
        return self.before + self.question.prompt


@dataclass
class Result:
    """What a task gives."""

    scores: dict  # {metric: (value, standard error)}
    n: int  # of how many questions, documents or windows
    by: dict = field(default_factory=dict)  # the same, flat, of each subject or source
    samples: list = field(default_factory=list)  # what --samples writes, a dict for each line


# --------------------------------------------------------------------------------------------------
# What stands before a question


def with_shots(task: Task, limit: int, seed: int) -> Iterator[tuple[dict, str]]:
    """For each of the first `limit` rows of a subject (0: all), (row, what comes before its
    prompt): the description and solved examples, drawn with `seed`."""
    rng = random.Random(seed)  # one for all rows, as the harness has one for a task
    delimiter = task.delimiter if task.shot_delimiter is None else task.shot_delimiter
    for row in limited(task.rows, limit):
        examples = draw_shots(task, row, rng)
        try:
            before = str(task.describe(row)) if task.describe else task.description
        except ROW_ERRORS as error:
            raise bad_row(task.name, row, error) from None
        for example in examples:
            solved = read_row(task, example)
            before += f"{solved.stem()}{delimiter}{solved.answer_text()}\n\n"
        yield row, before


def limited(rows: list[dict], limit: int) -> Iterator[dict]:
    """The first `limit` rows of each subject; 0: all."""
    n_seen = Counter()
    for row in rows:
        subject = subject_of(row)
        n_seen[subject] += 1
        if not limit or n_seen[subject] <= limit:  # of MMLU's 57 subjects, so many each
            yield row


def draw_shots(task: Task, row: dict, rng: random.Random) -> list[dict]:
    """The solved examples that stand before a row: the harness's draw (its samplers.py, 0.4.13).
    A task of your own takes them from its own rows."""
    n = task.shots
    if task.is_own:
        return draw_from_rows(task, row, n, rng) if n else []
    pool = task.examples
    if task.shots_of_questions and not pool:
        pool = task.rows
    if task.fixed_shots:
        pool = [example for example in pool if subject_of(example) == subject_of(row)][:n]
    if n > len(pool):
        where = f"{task.name}*train*.jsonl"
        raise UserError(f"{task.name}: {n} shots, but {where} has {len(pool)}: set --shots")
    if task.fixed_shots:
        return pool
    if task.split == "validation" and 0 < n < len(pool):
        return draw_without(task, pool, row, rng)
    return rng.sample(pool, n)


def draw_without(task: Task, pool: list[dict], row: dict, rng: random.Random) -> list[dict]:
    """A task's shots out of a pool, but not `row`: where it has no test split, the harness takes
    one more than asked for, in case the row is among them."""
    n = task.shots
    drawn = [example for example in rng.sample(pool, n + 1) if example != row]
    if len(drawn) < n:  # copies of it were drawn
        pool = [example for example in pool if example != row]
        if n > len(pool):
            why = f"{n} shots, but only {len(pool)} examples are no copy of a question"
            raise UserError(f"{task.name}: {why}: set --shots={len(pool)}")
        drawn = rng.sample(pool, n)
    return drawn[:n]


def draw_from_rows(task: Task, row: dict, n: int, rng: random.Random) -> list[dict]:
    """n of a task's rows, but none that asks what `row` asks, whatever else it holds: with its
    answer the question would be none."""
    prompt = read_row(task, row).stem()

    def others(examples):
        return [example for example in examples if read_row(task, example).stem() != prompt]

    # As the harness draws: one more than asked for, in case the row itself is among them.
    if n < len(task.rows):
        drawn = others(rng.sample(task.rows, n + 1))
        if len(drawn) >= n:
            return drawn[:n]
    pool = others(task.rows)  # copies of the row were drawn: once more, without them
    if n > len(pool):
        why = f"{n} shots, but only {len(pool)} rows ask something else than {prompt[:60]!r}"
        raise UserError(f"{task.name}: {why}: set --shots={len(pool)}, or add rows")
    return rng.sample(pool, n)


# --------------------------------------------------------------------------------------------------
# Requests


def text_pairs(task: Task, before: str, question: Question) -> list[tuple[str, str]]:
    """[(context, continuation)] of which log p is asked: one for each choice, or the answer's."""
    if question.choices is None:
        return [(before + question.prompt, f"{task.delimiter}{question.answer}")]
    pairs = []
    for choice in question.choices:
        if question.ending is None:
            pairs.append((before + question.prompt, task.delimiter + choice))
        else:  # what is scored is the same behind each
            pairs.append((before + choice, task.delimiter + question.ending))
    return pairs


def score_requests(
    task: Task, tok: Tokenizer, item: Item, n_ctx: int
) -> tuple[list[Request], bool]:
    """The requests that score a question's choices or its answer, and whether a context was cut."""
    contexts = []
    continuations = []
    was_cut = False
    for context, continuation in text_pairs(task, item.before, item.question):
        try:
            pair = encode_pair(tok, context, continuation, n_ctx)
        except ValueError as error:
            raise UserError(f"{task.name}: {error}: {item.question.stem()[:80]!r}") from None
        contexts.append(pair[0])
        continuations.append(pair[1])
        was_cut = was_cut or pair[2]
    # Shots that all questions of a subject have are worth a batch of their own.
    shared = item.before if task.fixed_shots else ""
    if all(ids == contexts[0] for ids in contexts):
        return [Request(shared, contexts[0], continuations)], was_cut
    # Beginnings, or a long choice that leaves room for less of the context: a context for each.
    requests = []
    for ids, continuation in zip(contexts, continuations):
        requests.append(Request(shared, ids, [continuation]))
    return requests, was_cut


def encode_pair(
    tok: Tokenizer, context: str, continuation: str, n_ctx: int
) -> tuple[list[int], list[int], bool]:
    """(ids of the context, ids of the continuation, whether the context was cut): encoded jointly,
    the white space at the end of the context with what follows it, as in the harness. The context
    is cut from the left so that every token that is scored has a place. A ValueError for a
    continuation of no tokens, or of more than n_ctx."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        ids = tok.start + tok.encode(stripped)
        # What the continuation adds. Where it also changes the context's last token, that counts
        # for nothing, as in the harness.
        rest = (tok.start + tok.encode(stripped + continuation))[len(ids) :]
    else:
        ids = [tok.eot_id]
        rest = tok.encode(continuation)
    if not rest:
        raise ValueError("a choice that adds no token to its prompt cannot be scored")
    if len(rest) > n_ctx or ids == [None]:  # None: no token can stand before it
        raise ValueError(f"a choice of {len(rest)} tokens: the context is {n_ctx}")
    room = n_ctx + 1 - len(rest)  # + 1: the last token is predicted, never read
    return ids[-room:], rest, len(ids) > room


# --------------------------------------------------------------------------------------------------
# Scores


def judge_choice(task: Task, question: Question, logprobs: list[float]) -> tuple[dict, dict]:
    """({metric: value}, what --samples shows) of the log p of a question's choices, in nats: acc,
    whether the likeliest choice is the right one; acc_norm, whether it is by log p for each
    character."""
    norms = []
    for logprob, choice in zip(logprobs, question.choices or []):
        norms.append(logprob / len(choice) if choice else -math.inf)
    best = logprobs.index(max(logprobs))  # of equals the first, as in the harness
    figures = {
        "acc": float(best == question.answer),
        "acc_norm": float(norms.index(max(norms)) == question.answer),
    }
    metrics = {metric: figures[metric] for metric in task.metrics}
    shown = {"choices": question.choices, "logprobs": logprobs, "answer": best}
    if question.ending is not None:
        shown["ending"] = question.ending
    return metrics, shown


def judge_continuation(reply: list) -> tuple[dict, dict]:
    """The same of the answer of a task of kind `continue`: whether each of its tokens is the
    likeliest, and its nats, of which the perplexity is made. reply: [log p, the former]."""
    logprob, is_greedy = reply
    return {"acc": float(is_greedy), "perplexity": -logprob}, {"logprob": logprob}


# Scores that are made of the mean of their questions' values: of perplexity these are nats.
OF_MEANS = {"perplexity": perplexity}


def total_scores(items: list[Item], judgements: list[tuple[dict, dict]]) -> Result:
    """The Result of items and of what was judged of each, in all and by subject."""
    values = {}  # {subject, or "" for all: {metric: [value]}}
    counts = Counter()  # questions of each subject
    log = []
    for item, (metrics, shown) in zip(items, judgements):
        sample = {"prompt": item.prompt, "right": item.question.answer}
        values_shown = {key: value for key, value in metrics.items() if key not in OF_MEANS}
        log.append(sample | shown | values_shown)
        subject = subject_of(item.row)
        counts[subject] += 1
        for group in {"", subject}:
            group_values = values.setdefault(group, {})
            for metric, value in metrics.items():
                # IFEval's are lists: of each instruction, so that rows count by how many they have.
                numbers = value if isinstance(value, list) else [value]
                group_values.setdefault(metric, []).extend(numbers)
    scores = {}
    for group, group_values in values.items():
        scores[group] = {}
        for metric, numbers in group_values.items():
            score = mean(numbers)
            if metric in OF_MEANS:
                score = OF_MEANS[metric](score)
            scores[group][metric] = score
    by = {}
    if len(counts) > 1:  # one subject is all there is
        for subject in sorted(filter(None, counts)):
            by[subject] = flat(scores[subject]) | {"n": counts[subject]}
    return Result(scores[""], len(items), by, log)
