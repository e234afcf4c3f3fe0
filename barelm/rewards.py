"""What an answer of the model is worth: the rewards of rl.py.

A reward is a function (messages, text, answer) -> number: the conversation so far, what the model
said, and the answer that the data has. One is named by a word, by a reward model's folder, or by
FILE.py:function, a function of the user's own."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import os
import runpy
import traceback
from collections import Counter
from typing import TYPE_CHECKING

import torch

from barelm.checkpoint import load
from barelm.examples import conversation_ids
from barelm.run import UserError
from barelm.tasks import gsm8k_answer, last_number

if TYPE_CHECKING:
    from collections.abc import Callable


def overlap(messages: list[dict], text: str, answer: str) -> float:
    """F1 of the words of a text and of the answer that was expected."""
    # How often each word is there: one that is said twice counts twice.
    text_words = Counter(text.lower().split())
    answer_words = Counter(answer.lower().split())
    n_shared = (text_words & answer_words).total()
    return 2 * n_shared / max(1, text_words.total() + answer_words.total())


def arithmetic(messages: list[dict], text: str, answer: str) -> float:
    """1 where the text's last number is that of the answer, else 0."""
    number = last_number(text)
    return float(number is not None and number == last_number(answer))


def gsm8k(messages: list[dict], text: str, answer: str) -> float:
    """1 where the number behind the first #### (or, without that mark, the last one) is that of the
    answer, else 0."""
    number = gsm8k_answer(text)
    return float(number is not None and number == gsm8k_answer(answer))


REWARDS = {"overlap": overlap, "arithmetic": arithmetic, "gsm8k": gsm8k}


def open_reward(name: str, device: str) -> Callable:
    """The function (messages, text, answer) -> number that `name` stands for."""
    if name in REWARDS:
        return REWARDS[name]
    # At the last colon: a path may have others.
    file, _, function_name = name.rpartition(":")
    if name.endswith(".py"):
        raise UserError(f"--reward={name}: expected {name}:FUNCTION")
    if file.endswith(".py"):
        return open_function(name, file, function_name)
    return open_reward_model(name, device)


def open_reward_model(folder: str, device: str) -> Callable:
    """The score of a conversation by the reward model in a folder, as a reward."""
    net, tok = load(folder, device)
    if net.score is None or len(net.labels) != 1:
        raise UserError(f"--reward={folder}: no reward model (--method=reward makes one)")

    def score(messages, text, answer):
        ids = conversation_ids([*messages, {"role": "assistant", "content": text}], tok)
        with torch.no_grad():
            return float(net.scores([ids[-net.config.n_ctx :]]))  # its end, where it is read

    return score


def open_function(name: str, file: str, function_name: str) -> Callable:
    """The function of this name that a file of the user's defines, if it fits a reward."""
    if not os.path.isfile(file):
        raise UserError(f"--reward={name}: no such file")
    # The file is the user's own code, which may raise anything, or exit.
    try:
        function = runpy.run_path(file).get(function_name)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward={name}: {describe(error, file)}") from None
    if not callable(function):
        raise UserError(f"--reward={name}: no function {function_name!r} in it")
    if inspect.iscoroutinefunction(function):  # it would give no number, but a promise of one
        raise UserError(f"--reward={name}: an async function: expected a plain one")
    with contextlib.suppress(ValueError):  # one that is written in C may have no signature
        try:  # now, and not after the first samples were made
            inspect.signature(function).bind([], "", "")
        except TypeError as error:
            call = f"{function_name}(messages, text, answer)"
            raise UserError(f"--reward={name}: it cannot be called as {call}: {error}") from None
    return function


def describe(error: BaseException, file: str) -> str:
    """One line on an exception: its kind, what it says, and the last line of `file` it came by."""
    frames = traceback.extract_tb(error.__traceback__)  # the outermost first
    lines = [frame.lineno for frame in frames if frame.filename == file]
    place = f" (line {lines[-1]})" if lines else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{place}"


def reward_of(function: Callable, name: str, prompt: dict, text: str) -> float:
    """The reward of an answer to a prompt, a dict with `messages`, `answer` and the `row` that it
    came from: a finite float, or a UserError that says what the function gave and where."""
    where = f"for {prompt.get('row', 'a prompt')}, where the model says {shorten(text)}"
    try:
        value = function(prompt["messages"], text, prompt["answer"])
    except UserError:  # of a reward model: already a line
        raise
    except (Exception, SystemExit) as error:
        file = name.rpartition(":")[0]
        raise UserError(f"--reward={name}: {describe(error, file)}, {where}") from None
    number = to_float(value)
    # What float32 has no place for would make infinite advantages.
    if not abs(number) <= torch.finfo(torch.float32).max:  # NaN is not, either
        raise UserError(f"--reward={name}: {shorten(value)} {where}: expected a finite number")
    return number


def to_float(value: object) -> float:
    """A number of Python's, numpy's or torch's as a float; NaN of anything else."""
    if inspect.iscoroutine(value):
        value.close()  # or Python would warn that nobody has awaited it
    try:
        number = value.item() if hasattr(value, "item") else value  # numpy's and torch's
        if isinstance(number, numbers.Number):
            return float(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # of several elements, complex
        pass
    return math.nan


def shorten(value: object) -> str:
    """A value as a line shows it."""
    text = " ".join(repr(value).split())
    if len(text) <= 60:
        return text
    return f"{text[:60]}…"
