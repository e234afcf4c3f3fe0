"""What eval.py asks: the record of a task, how a row of it is read, how an answer is judged.

The table of benchmarks, with what is special to each, is in barelm/benchmarks.py, where one is
added. A task of the user's own is a JSONL file whose first line may be a Header, or a Python
function that returns one with its rows.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import runpy
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


# What a row of another form raises in the functions that read it.
ROW_ERRORS = (LookupError, TypeError, ValueError, AttributeError)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KINDS = ("choice", "continue", "generate")


# --------------------------------------------------------------------------------------------------
# The record


@dataclass
class Header:
    """What the header of a task of your own may say, and what it means when it does not."""

    kind: str = "choice"  # of several by log p; continue: is the answer the likeliest; generate
    prompt: str = "Question: {question}\nAnswer:"  # with fields of a row in braces
    choices: list | str | None = None  # the same for every row, or their field; or see choices_of
    answer: str = "answer"  # the field with the right one
    description: str = ""  # what comes before the shots
    delimiter: str = " "  # between a prompt and its answer
    shots: int = 0  # how many examples are usual
    stop: list = field(default_factory=lambda: ["\n"])  # strings that end an answer
    max_new_tokens: int = 64
    extract: str = ""  # the pattern of the part of an answer that is compared
    which: int = 0  # of its matches: 0 the first, -1 the last
    ignore: list = field(default_factory=list)  # patterns of what makes no difference
    lower: bool = False  # nor do capitals
    rubric: str = ""  # by which the model at judge_url rates an answer instead
    judge: Callable | None = None  # (row, [answers]) -> {metric: 0 to 1}; in Python only
    program: Callable | None = None  # (row, answer) -> the program that tells whether it is right


@dataclass
class Task(Header):
    """A header, and what those of the table below need beside it."""

    read: Callable | None = None  # row -> Question; none: by prompt, choices and answer
    describe: Callable | None = None  # row -> description
    metrics: tuple = ("acc", "acc_norm")  # of choices: which of the two are its scores
    shot_delimiter: str | None = None  # in the solved examples, where it is not `delimiter`
    hub: str = ""  # owner/name/folder of its rows on the Hub; none for a task of your own
    split: str = "test"  # which of its files has the questions
    fixed_shots: bool = False  # the subject's first examples; or else drawn for each question
    shots_of_questions: bool = False  # a task without examples draws from its questions
    subject_field: str = ""  # the field that names a row's subject, where it is not `subject`
    subject_by_file: bool = False  # or its file's name, or its folder's, does
    name: str = ""
    rows: list = field(default_factory=list)
    examples: list = field(default_factory=list)  # the rows that shots are taken from

    @property
    def is_own(self) -> bool:
        """Whether it is a task of the user's own."""
        return not self.hub


@dataclass
class Question:
    """What is asked of the model: the answer is a text or, where there are choices, the index of
    the right one. Where there is an ending, the choices are beginnings that it may follow."""

    prompt: str
    answer: str | int
    choices: list | None = None
    ending: str | None = None

    def answer_text(self) -> str:
        """What follows the stem when it is solved."""
        if self.ending is not None:
            return self.ending
        return self.answer if self.choices is None else self.choices[self.answer]  # type: ignore

    def stem(self) -> str:
        """What stands before the answer when it is solved."""
        if self.ending is not None:
            return self.choices[self.answer]  # type: ignore
        return self.prompt


# --------------------------------------------------------------------------------------------------
# A row is read


def read_row(task: Task, row: dict) -> Question:
    """The Question of a row; a row that is none is refused in a line."""
    try:
        if task.read:
            question = task.read(row)
            if not isinstance(question.prompt, str):
                raise ValueError(f"its prompt {question.prompt!r} is no text")
            return question
        prompt = re.sub(r"\{(\w+)\}", lambda match: str(filled(row, match[1])), task.prompt)
        if task.kind != "choice":
            return Question(prompt, read_answer(task, row))
        if task.choices is None:
            choices, right = choices_of(row)
        else:
            texts = row[task.choices] if isinstance(task.choices, str) else task.choices
            choices, right = choices_of({"choices": texts, "answer": row[task.answer]})
        return Question(prompt, right, choices)
    except ROW_ERRORS as error:
        raise bad_row(task.name, row, error) from None


def read_answer(task: Task, row: dict) -> str:
    """The right answer of a row of a task of generation, as a text."""
    if task.is_own and (task.judge or task.rubric):  # which may do without a right answer
        return str(row.get(task.answer, ""))
    answer = filled(row, task.answer)
    if not isinstance(answer, (str, int, float)):
        raise ValueError(f"{task.answer!r} is no text or number")
    return str(answer)


def filled(row: dict, key: str) -> str:
    """A field of a row that has something in it."""
    if row[key] is None:
        raise ValueError(f"{key!r} is null")
    return row[key]


def choices_of(row: dict) -> tuple[list[str], int]:
    """(choices, right one's index) of a row with `choices` (a list, or ARC's text and label) or
    `options` (a list, or text with `A. ` before each line) and an `answer` (an index, a label, or
    the choice itself)."""
    given = row["options"] if "options" in row and "choices" not in row else row["choices"]
    keys = [key for key in ("answer", "answerKey", "label", "gold") if key in row]
    if not keys:
        raise ValueError("no field 'answer'")
    answer = row[keys[0]]
    labels = None
    if isinstance(given, dict):
        texts = given["text"]
        labels = given["label"]
    elif isinstance(given, str):
        texts = [text.strip() for text in re.split(r"(?:^|\n)[A-Z][.)] ?", given)[1:]]
        if re.match(r"[A-Z]([.)]|$)", answer):  # a letter, or a choice's whole line
            answer = answer[0]
    else:
        texts = given
    if not isinstance(texts, list) or not all_texts(texts):
        raise ValueError("expected a list of choices")
    right = None
    if isinstance(answer, str):
        right = index_of_choice(answer, texts, labels)
    elif type(answer) is int:  # True is none
        right = answer
    if right is None or not 0 <= right < len(texts):
        raise ValueError(f"answer {answer!r} is none of its {len(texts)} choices")
    return texts, right


def index_of_choice(answer: str, texts: list[str], labels: list[str] | None) -> int:
    """The index of the choice that a text names, or None: by the row's own labels before the texts;
    where it has none by the texts before the letters, for a choice may be a letter itself."""
    if labels is None:
        lists = [texts, list(LETTERS[: len(texts)])]
    else:
        lists = [list(labels[: len(texts)]), texts]
    for names in lists:
        if answer in names:
            return names.index(answer)
    return None


def subject_of(row: dict) -> str:
    """The group of a row's score, as a text; empty where the row names none."""
    subject = row.get("subject")
    return "" if subject is None else str(subject)


def bad_row(name: str, row: dict, error: BaseException) -> UserError:
    """The line that refuses a row of the task of this name."""
    why = " ".join(str(error).split())
    if isinstance(error, KeyError):
        why = f"no field {error}"
    shown = json.dumps(row, ensure_ascii=False, default=str, skipkeys=True)[:100]
    return UserError(f"{name}: {why[:200]}, in the row {shown}")


# --------------------------------------------------------------------------------------------------
# An answer is judged


def judge(task: Task, row: dict, texts: list[str]) -> dict:
    """{metric: value} of the answers to a row's prompt."""
    if task.judge:
        return task.judge(row, texts)
    answer = extract(task.extract, texts[0], task.which) if task.extract else texts[0].strip()
    right = str(row[task.answer])
    return {"exact_match": exact_match(answer, right, task.ignore, task.lower)}


def exact_match(text: str, answer: str, ignore: Sequence[str] = (), lower: bool = False) -> float:
    """1.0 where the two are equal without what the patterns in `ignore` match."""
    for pattern in ignore:  # each on what the one before has left
        text = re.sub(pattern, "", text)
        answer = re.sub(pattern, "", answer)
    if lower:
        return float(text.lower() == answer.lower())
    return float(text == answer)


def extract(pattern: str, text: str, which: int = 0) -> str:
    """What the pattern (or the first of its groups that is not empty) matches in text, the first
    time or with which=-1 the last; [invalid] where it does not."""
    matches = re.findall(pattern, text)
    if not -len(matches) <= which < len(matches):
        return "[invalid]"
    match = matches[which]  # of a pattern of several groups a tuple, of others a text
    if isinstance(match, str):
        return match.strip()
    for group in match:
        if group:
            return group.strip()
    return "[invalid]"


def write_program(task: Task, row: dict, text: str) -> str:
    """The program that tells whether an answer is right."""
    try:
        return task.program(row, text)
    except ROW_ERRORS as error:
        raise bad_row(task.name, row, error) from None


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, have a right one: 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def checked_judgement(task: Task, row: dict, texts: list[str]) -> dict:
    """`judge`'s metrics: finite numbers, or lists of them. What a judge of the user's own raises or
    gives instead is told in a line."""
    where = f"{task.name}: judging {str(row)[:80]}"
    try:
        metrics = judge(task, row, texts)
    except Exception as error:  # the user's code may raise anything, ours what its rows cause
        if task.is_own and task.judge:
            why = described(error, task.name.rpartition(":")[0])
        elif isinstance(error, ROW_ERRORS):
            why = repr(error)
        else:
            raise
        raise UserError(f"{where}: {why}") from None
    if not isinstance(metrics, dict):
        raise UserError(f"{where}: expected {{metric: number}}: {metrics!r}")
    for metric, value in metrics.items():
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, (Real, np.bool_)) or not math.isfinite(number):
                raise UserError(f"{where}: {metric}={number!r}: no number")
    return metrics


# --------------------------------------------------------------------------------------------------
# A task of the user's own


def own_task(name: str, header: dict, rows: list[dict]) -> Task:
    """The task of these rows, as its header (a dict) says."""
    check_header(name, header)
    return Task(name=name, rows=rows, **header)


def check_header(name: str, header: dict) -> None:
    """Refuse a header's keys and values that mean nothing, in a line that names the key."""
    usual = vars(Header())
    for key, value in header.items():
        if key not in usual:
            near = difflib.get_close_matches(str(key), usual, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(usual)}"
            raise UserError(f"{name}: header: unknown key {key!r} ({hint})")
        expected = expected_instead(key, value, usual[key])
        if expected:
            shown = repr(value)[:100]
            raise UserError(f"{name}: header: {key}={shown}: expected {expected}")


def expected_instead(key: str, value: object, usual: int | list[str] | str | None) -> str | None:
    """What is expected in the place of a header's value, in words; None where it is good. Of the
    usual value, most have the type."""
    if key == "choices":
        if isinstance(value, (list, str)) and value and all_texts(value):
            return None
        return "a list of texts, or the name of the rows' field with them"
    if key in ("judge", "program"):
        return None if callable(value) else "a function, which only a task in Python can have"
    if type(value) is not type(usual):
        return f"one like {usual!r}"
    if key == "kind" and value not in KINDS:
        return "choice, continue or generate"
    if key in ("stop", "ignore") and (not all_texts(value) or "" in value):
        return "a list of texts, none of them empty"
    if key == "shots" and value < 0:
        return "0 or more"
    if key == "max_new_tokens" and value < 1:
        return "1 or more"
    if key == "extract" and not is_pattern(value):
        return "regular expressions of Python's re"
    if key == "ignore" and not all(map(is_pattern, value)):  # type: ignore[arg-type]
        return "regular expressions of Python's re"
    return None


def all_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def is_pattern(text: Any) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def run_own_file(name: str) -> tuple[dict, list[dict]]:
    """(header, rows) of a task FILE.py:function. What the user's code raises is told in a line."""
    file, _, function = name.rpartition(":")
    if not os.path.isfile(file):
        raise UserError(f"--tasks={name}: no such file")
    try:
        make_task = runpy.run_path(file).get(function)
        if not callable(make_task):
            raise UserError(f"--tasks={name}: no function {function!r} in it")
        made_task = make_task()
    except Exception as error:
        raise UserError(f"--tasks={name}: {described(error, file)}") from None
    if not isinstance(made_task, dict):
        raise UserError(f"--tasks={name}: expected a dict with rows, not {made_task!r:.80}")
    header = dict(made_task)  # a copy: it may be a dict that the user's module keeps
    rows = header.pop("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--tasks={name}: rows: expected a list of dicts")
    return header, rows


def described(error: BaseException, file: str | Path) -> str:
    """An error of the user's own code in a line: its kind, its message, and the line of `file`."""
    # Other lines are of ours, or of libraries that it calls.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    where = f", line {lines[-1]}" if lines else ""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}{where}"


# --------------------------------------------------------------------------------------------------
# Numbers: GSM8K (Cobbe et al. 2021), also of rewards

NUMBER = r"\d[\d,]*(?:\.\d+)?|\.\d+"
MINUS = "\N{MINUS SIGN}"  # U+2212, which models write as often as the hyphen
GSM8K_STOP = ["Question:", "</s>", "<|im_end|>"]  # where an answer ends: lm-eval's


def to_number(sign: str, digits: str) -> Decimal:
    """The exact value of a sign ("", -, + or MINUS) and digits with commas."""
    value = Decimal(digits.replace(",", ""))
    return -value if sign in ("-", MINUS) else value


def last_number(text: str) -> Decimal | None:
    """The last number of a text as a Decimal, or None."""
    numbers = re.findall(rf"([-{MINUS}]?)\$?({NUMBER})", text)
    return to_number(*numbers[-1]) if numbers else None


def marked_number(text: str) -> Decimal | None:
    """The number right behind the first #### that has one, as a Decimal, or None."""
    sign = f"([-+{MINUS}]?)"
    space = r"[^\S\n]*"
    match = re.search(rf"####{space}{sign}{space}\$?{space}{sign}({NUMBER})", text)
    if match is None:
        return None
    before_dollar, behind_dollar, digits = match.groups()
    return to_number(before_dollar or behind_dollar, digits)


def gsm8k_answer(text: str) -> Decimal:
    """The number that a GSM8K answer gives: the one behind its first ####, or the last one of a
    text without that mark; None where there is none."""
    return marked_number(text) if "####" in text else last_number(text)


def judge_gsm8k(row: dict[str, str], texts: list[str]) -> dict[str, float]:
    """strict: the number behind the first ####, as --reward=gsm8k reads it (a text without that
    mark has none); flexible: lm-eval's last number."""
    number = marked_number(texts[0])
    right = gsm8k_answer(row["answer"])
    # The harness's: what is before the mark, and what is no digit in a number.
    ignore = [",", r"\$", r"(?s).*#### ", r"\.$"]
    last = extract(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", texts[0], -1)
    return {
        "strict_match": float(number is not None and number == right),
        "flexible_match": exact_match(last, row["answer"], ignore, lower=True),
    }
