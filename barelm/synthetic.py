"""Text that is made up, to see what a kind of attention can do and what it cannot.

    python prepare.py --source=copy:48 --steps=exact --tokenizer=char --dataset=copy
    python eval.py --model=out/copy --tasks=barelm/synthetic.py:copied

A document of `copy:48` is 48 random letters, a bar, and the same letters. Who is to write the
second half has to look 49 tokens back, each time: a window of fewer cannot see what to write.
docs/positions.md has what came of it.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from barelm.files import whole_file
from barelm.run import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 48  # letters before the bar, where the source does not say
DOCUMENTS = 20_000
FOLDER = Path("data/synthetic")
ROWS = 64  # documents that `copied` asks for


def copy_length(spec: str) -> int | None:
    """The letters before the bar of a source `copy` or `copy:LENGTH`, or None for another one."""
    match = re.fullmatch(r"copy(?::(\d+))?", spec)
    if match is None:
        return None
    length = int(match[1] or LENGTH)
    if not 1 <= length <= 10_000:
        raise UserError(f"--source={spec}: expected copy:LENGTH with 1 to 10000 letters")
    return length


def copy_documents(n: int, length: int, seed: int) -> list[str]:
    """n texts of random letters, a bar, and the same letters again."""
    rng = random.Random(seed)
    documents = []
    for _ in range(n):
        letters = "".join(rng.choices(LETTERS, k=length))
        documents.append(f"{letters}|{letters}")
    return documents


def copy_path(length: int) -> Path:
    return FOLDER / f"copy_{length}.txt"


def copy_file(length: int) -> Path:
    """The file of these documents, one a line: written, if it is not there as it should be."""
    path = copy_path(length)
    data = "\n".join(copy_documents(DOCUMENTS, length, seed=0)).encode()
    if path.is_file() and path.read_bytes() == data:
        return path  # its time stays too: what prepare.py made of it counts still
    FOLDER.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data)
    return path


def share_of_letters(row: dict[str, str], answers: list[str]) -> dict[str, float]:
    """How many letters of an answer stand where they should: of a guesser 1 / 26."""
    right = row["letters"]
    hits = sum(a == b for a, b in zip(answers[0], right))
    return {"copied": hits / len(right)}


def copied(length: int = LENGTH) -> dict:
    """The task for eval.py: write the second half of documents that no training has."""
    rows = []
    for document in copy_documents(ROWS, length, seed=1):
        rows.append({"letters": document.partition("|")[0]})
    return {
        "kind": "generate",
        "prompt": "{letters}|",
        "answer": "letters",
        "max_new_tokens": length,
        "judge": share_of_letters,
        "rows": rows,
    }
