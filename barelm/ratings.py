"""What people say of answers: thumbs up and down, as serve.py --feedback=FILE writes them down, and
what can be learned from it.

A rating is a line of JSON:

    {"time": 1764316800.5, "model": "sft", "prompt": [{"role": "user", "content": "Hi"}],
     "response": "Hello!", "rating": 1}

rating: 1 for a thumb up, -1 for one down, 0 for one taken back. Of several ratings of one answer to
one prompt the last one counts. prepare.py reads such a file as it is:

    --task=preference  an answer that was liked, and one that was not, to the same messages are a
                       pair for finetune.py --method=dpo
    --task=kto         every answer, liked or not: a thumb that is alone is enough for --method=kto
    --task=sft         the answers that were liked are demonstrations

The lines are never changed: a pair is made when the file is read, so that a thumb that is lone
today is half of a pair tomorrow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from barelm.dedup import digest

if TYPE_CHECKING:
    from collections.abc import Iterable

PAIRS_OF_PROMPT = 32  # at most: one prompt that is often rated must not be all that is learned


def is_rating(record: dict) -> bool:
    """Whether a record, a dict, is a line of a feedback file."""
    rating = record.get("rating")
    is_thumb = type(rating) is int and -1 <= rating <= 1  # type(): true is no thumb
    return is_thumb and isinstance(record.get("prompt"), list) and "response" in record


def settled(ratings: Iterable[dict]) -> dict[str, dict]:
    """{prompt as JSON: {response: rating}} of ratings in their order: the last one of an answer
    counts, and one that was taken back counts for nothing."""
    prompts = {}
    for rating in ratings:
        prompt = json.dumps(rating["prompt"], ensure_ascii=False)
        answers = prompts.setdefault(prompt, {})
        answers.pop(rating["response"], None)  # so that the newest stands last
        if rating["rating"]:
            answers[rating["response"]] = rating["rating"]
    return prompts


def pairs_of(ratings: Iterable[dict]) -> list[dict]:
    """Rows {"prompt", "chosen", "rejected"} of every liked answer with every disliked one to the
    same prompt, the newest first where they are many."""
    rows = []
    for prompt, answers in settled(ratings).items():
        liked = [text for text, rating in answers.items() if rating > 0]
        disliked = [text for text, rating in answers.items() if rating < 0]
        pairs = [(chosen, rejected) for chosen in liked[::-1] for rejected in disliked[::-1]]
        for chosen, rejected in pairs[:PAIRS_OF_PROMPT]:
            rows.append({"prompt": json.loads(prompt), "chosen": chosen, "rejected": rejected})
    return rows


def thumbs_of(ratings: Iterable[dict]) -> list[dict]:
    """Rows {"prompt", "completion", "label"} of every rated answer, label: whether it was liked."""
    rows = []
    for prompt, answers in settled(ratings).items():
        for response, rating in answers.items():
            row = {"prompt": json.loads(prompt), "completion": response, "label": rating > 0}
            rows.append(row)
    return rows


def demonstrations_of(ratings: Iterable[dict]) -> list[dict]:
    """Rows {"messages"} of the answers that were liked."""
    rows = []
    for prompt, answers in settled(ratings).items():
        for response, rating in answers.items():
            if rating > 0:
                answer = {"role": "assistant", "content": response}
                rows.append({"messages": [*json.loads(prompt), answer]})
    return rows


# the tasks that ratings make
OF_RATINGS = {"preference": pairs_of, "kto": thumbs_of, "sft": demonstrations_of}


def rows_of_ratings(task: str, ratings: Iterable[dict]) -> dict[str, int]:
    """{row as JSON: a hash that it is split by} of ratings for a task. The hash is the prompt's: no
    prompt is in training and in validation both."""
    rows = {}
    for row in OF_RATINGS[task](ratings):
        prompt = row["messages"][:-1] if task == "sft" else row["prompt"]
        split_by = digest(json.dumps(prompt, ensure_ascii=False).encode(errors="replace"))
        rows[json.dumps(row, ensure_ascii=False)] = split_by
    return rows


def ratings_summary(task: str, ratings: list[dict], rows: dict) -> str:
    """What was made of ratings, in a line."""
    text = f"{task}: {len(ratings):,} ratings of answers: {len(rows):,} rows"
    if task == "sft":
        return f"{text}, those that were liked"
    if task == "kto":
        n_liked = sum(json.loads(row)["label"] for row in rows)
        return f"{text}, {n_liked:,} liked and {len(rows) - n_liked:,} not"
    n_lone = 0
    for answers in settled(ratings).values():
        if len(set(answers.values())) == 1:
            n_lone += len(answers)
    if n_lone:
        text += f"; {n_lone:,} rated alone: a pair is one liked and one disliked answer to the same"
        text += " messages"
    return text
