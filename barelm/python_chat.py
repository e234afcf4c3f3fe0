"""Conversations with a helper that knows Python's standard library a little: made up, every answer
taken from the running Python or computed by it, without a network.

    python prepare.py config/chat.py     # --source=pychat
    python eval.py config/chat.py        # --tasks=barelm/python_chat.py:held_out --chat
    python eval.py config/chat.py --tasks=barelm/python_chat.py:programs --allow_code_exec

A small model that is to know a little of everything knows nothing. One that is asked about 800
names, small expressions, 35 functions and 100 ways to do things can know these, and can learn to
say of anything else that it does not know. `held_out` measures how far it got, with wordings,
expressions, names and topics that no conversation for training has.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from barelm.dedup import digest
from barelm.files import whole_file
from barelm.python_expressions import EXPRESSIONS, draw_expression, value_of
from barelm.python_facts import facts, modules, pairs_of
from barelm.python_functions import NAMES, checks_of, functions, write_function
from barelm.python_ways import ways
from barelm.python_wordings import (
    AWAY,
    CONCEPTS,
    DONT_KNOW,
    FILLING,
    FOLLOW,
    FOREIGN,
    KEYWORDS,
    MADE_UP,
    RENAME,
    TALK,
    UNKNOWN_NAME,
    USE,
    WORDINGS,
    filling,
    wordings,
)
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from barelm.python_facts import Fact
    from barelm.python_functions import Function

CONVERSATIONS = 60_000  # whose text is for pre-training, where the source does not say
WITH_ROLES = 5  # one of so many is for fine-tuning, too
FOLDER = Path("data/synthetic")
QUESTIONS = 100  # of each subject that `held_out` asks
HELD_OUT = 8  # one expression of so many, by hash, is for validation alone

# --------------------------------------------------------------------------------------------------
# Turns. Each function draws [(question, answer), ...], those behind the first depending on it.


def loosely(rng: random.Random, question: str) -> str:
    """The question as people type it: without a capital, a question mark, with a please."""
    if rng.random() < 0.3:
        question = question.removesuffix("?")
    if rng.random() < 0.5 and question[:2].isalpha():
        question = question[0].upper() + question[1:]
    if rng.random() < 0.05:
        question = f"please {question}"
    return question


def in_code(rng: random.Random, name: str) -> str:
    """A name as people type it: bare, in backticks, with brackets."""
    return rng.choice([name, name, name, f"`{name}`", f"`{name}`", f"{name}()"])


@dataclass
class Draw:
    """What turns are drawn with."""

    rng: random.Random
    held_out: bool = False  # of what is for validation alone
    subject: str = ""  # what was drawn, for the table of `held_out`
    checks: str = ""  # of a function that was drawn

    def words(self, block: str, x: str = "") -> str:
        wording = self.rng.choice(wordings(block, self.held_out))
        return loosely(self.rng, wording).replace("{x}", x)

    def pick(self, train: Sequence, held_out: Sequence) -> Any:
        return self.rng.choice(held_out if self.held_out else train)


def fact_answer(fact: Fact, question: str) -> str:
    """What is said of a Fact, in Markdown."""
    if question == "what":
        return f"`{fact.name}`: {fact.summary}"
    if question == "signature":
        return f"`{fact.signature}`" if fact.signature else no_signature(fact)
    if question == "example":
        if not fact.example:
            return f"I know no example of `{fact.name}`."
        return f"```python\n{fact.example}\n```"
    if question == "base":
        return f"`{fact.name}` is a kind of `{fact.base}`."
    if not fact.module:
        return f"`{fact.name}` is built in: no import is needed."
    return f"`import {fact.module}`, then `{fact.name}`."


def no_signature(fact: Fact) -> str:
    return f"I do not know the arguments of `{fact.name}`."


@lru_cache(1)
def short_names() -> dict[str, Fact]:
    """{short name: Fact} of those that only one of a module has: Counter, not copy."""
    count = {}
    for fact in facts():
        count.setdefault(fact.short, []).append(fact)
    return {short: of[0] for short, of in count.items() if len(of) == 1}


@lru_cache(1)
def full_names() -> set[str]:
    return {fact.name for fact in facts()}


def called(rng: random.Random, fact: Fact) -> str:
    """A name as it is asked about: mostly whole, or its last part where no other has it."""
    name = fact.name
    if fact.short in short_names() and rng.random() < 0.3:
        name = fact.short
    return name if fact.base else in_code(rng, name)


@lru_cache(1)
def weighted_facts() -> list[Fact]:
    """The facts, those that beginners meet more often twice."""
    often = ("str.", "list.", "dict.", "set.", "os.path.", "collections.", "itertools.", "random.")
    weighted = []
    for fact in facts():
        is_common = not fact.module or fact.name.startswith(often) or fact.example
        weighted += [fact] * (2 if is_common else 1)
    return weighted


def about_name(draw: Draw) -> list[tuple[str, str]]:
    """What a name is, its arguments, an example, its module; then perhaps more of the same name."""
    rng = draw.rng
    fact = rng.choice(weighted_facts())
    question = rng.choices(["what", "signature", "example", "where"], [6, 2, 2, 1])[0]
    if question == "example" and not fact.example and rng.random() < 0.7:
        question = "what"
    if fact.base and rng.random() < 0.4:
        question = "base"
    draw.subject = question
    asked = draw.words(WORDINGS[question], called(rng, fact))
    turns = [(asked, fact_answer(fact, question))]
    while rng.random() < 0.3 and len(turns) < 3:
        following = rng.choice(list(FOLLOW))
        if following == question:
            continue
        if following == "signature" and fact.base:
            break
        turns.append((draw.words(FOLLOW[following]), fact_answer(fact, following)))
        question = following
    return turns


def about_word(draw: Draw) -> list[tuple[str, str]]:
    """A keyword, an operator, or what something is."""
    rng = draw.rng
    draw.subject = "words"
    if rng.random() < 0.5:
        keyword, text = rng.choice(pairs_of(KEYWORDS))
        shown = rng.choice([keyword, f"`{keyword}`", f"the keyword {keyword}"])
        if not keyword.isalpha():
            shown = rng.choice([keyword, f"`{keyword}`", f"the operator {keyword}"])
        return [(draw.words(WORDINGS["what"], shown), f"`{keyword}`: {text}")]
    names, text = rng.choice(pairs_of(CONCEPTS))
    return [(draw.words(WORDINGS["what"], rng.choice(names.split("|"))), text)]


def is_held_out(text: str) -> bool:
    return digest(text.encode()) % HELD_OUT == 0


def expression(draw: Draw) -> list[tuple[str, str]]:
    """A small expression and its value."""
    kinds = list(EXPRESSIONS)
    weights = [len(of) for of in EXPRESSIONS.values()]
    kind = draw.rng.choices(kinds, weights)[0]
    draw.subject = kind
    turns = []
    while not turns:
        text = draw_expression(kind, draw.rng)
        if is_held_out(text) == draw.held_out:
            shown = draw.rng.choice([text, text, f"`{text}`"])
            turns.append((draw.words(WORDINGS["value"], shown), value_of(text)))
    return turns


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def short_function(draw: Draw) -> list[tuple[str, str]]:
    """A function, perhaps under a name that is asked for; then perhaps another name, or its use."""
    rng = draw.rng
    draw.subject = "functions"
    function = rng.choice(functions())
    purpose = rng.choice(function.purposes[:-1])
    return function_turns(draw, function, purpose)


def other_function(draw: Draw) -> list[tuple[str, str]]:
    """A function that is asked for in words of which training has none."""
    draw.subject = "functions, other words"
    function = draw.rng.choice(functions())
    return function_turns(draw, function, function.purposes[-1])


def function_turns(draw: Draw, function: Function, purpose: str) -> list[tuple[str, str]]:
    rng = draw.rng
    name = function.name
    argument = function.arguments[0]
    if rng.random() < 0.4:
        name = drawn_name(draw)
        purpose += draw.pick([f", called {name}", f" called {name}", f" and call it {name}"],
                             [f", named {name}"])  # fmt: skip
    asked = draw.words(WORDINGS["function"], purpose)
    turns = [(asked, fenced(write_function(function, name, argument)))]
    draw.checks = checks_of(function, name)
    if rng.random() < 0.2:
        name = drawn_name(draw)
        turns.append((draw.words(RENAME, name), fenced(write_function(function, name, argument))))
    if rng.random() < 0.25 and function.calls:
        given, _, value = function.calls[0].partition(" -> ")
        turns.append((draw.words(USE), fenced(f">>> {name}({given})\n{value}")))
    return turns


def drawn_name(draw: Draw) -> str:
    """A name for a function: words of NAMES, one or two together."""
    names = NAMES
    while True:
        words = draw.rng.sample(names, draw.rng.choice([1, 2, 2]))
        name = "_".join(words)
        if is_held_out(name) == draw.held_out and name.isidentifier():
            return name


def way(draw: Draw) -> list[tuple[str, str]]:
    """How to do something; held out are the wordings of the question, not those of what to do."""
    draw.subject = "ways"
    names, code = draw.rng.choice(ways())
    names = names[:-1] or names
    return [(draw.words(WORDINGS["way"], draw.rng.choice(names)), fenced(code))]


def other_way(draw: Draw) -> list[tuple[str, str]]:
    """How to do something, in words of which training has none."""
    draw.subject = "ways, other words"
    names, code = draw.rng.choice([pair for pair in ways() if len(pair[0]) > 1])
    wording = wordings(WORDINGS["way"], False)
    return [(loosely(draw.rng, draw.rng.choice(wording)).replace("{x}", names[-1]), fenced(code))]


def talk(draw: Draw) -> list[tuple[str, str]]:
    """A greeting, a thanks, a question about the helper itself. None is held out: there are few."""
    draw.subject = "talk"
    questions, answer = draw.rng.choice(TALK)
    return [(loosely(draw.rng, draw.rng.choice(questions.split("|"))), answer)]


def away(draw: Draw) -> list[tuple[str, str]]:
    """What has nothing to do with Python."""
    draw.subject = "other topics"
    question = draw.words(AWAY)
    for kind in FILLING:
        if f"{{{kind}}}" in question:
            word = draw.rng.choice(filling(kind, draw.held_out))
            question = question.replace(f"{{{kind}}}", word)
    return [(question, DONT_KNOW)]


def unknown_name(draw: Draw) -> list[tuple[str, str]]:
    """A name that does not exist, or is none of the standard library's."""
    rng = draw.rng
    draw.subject = "unknown names"
    while True:
        owner = rng.choice([*modules(), "str", "list", "dict", "set", ""])
        last = rng.choice([*MADE_UP.split(), *MADE_UP.split(), rng.choice(facts()).short])
        name = f"{owner}.{last}" if owner else rng.choice(FOREIGN.split() + MADE_UP.split())
        is_new = name not in full_names() and name not in short_names()
        if is_new and is_held_out(name) == draw.held_out:
            break
    question = rng.choice(["what", "what", "signature", "example"])
    asked = draw.words(WORDINGS[question], in_code(rng, name))
    return [(asked, UNKNOWN_NAME.replace("{x}", name))]


# What a conversation is drawn from, and how often.
SUBJECTS = {
    about_name: 38,
    about_word: 5,
    expression: 26,
    short_function: 8,
    way: 9,
    talk: 4,
    away: 5,
    unknown_name: 5,
}


def draw_conversation(rng: random.Random) -> list[dict]:
    """The messages of a conversation of about one to six turns."""
    draw = Draw(rng)
    messages = []
    for _ in range(rng.randint(1, 4)):
        subject = rng.choices(list(SUBJECTS), list(SUBJECTS.values()))[0]
        for question, answer in subject(draw):
            messages.append(as_user(question))
            messages.append({"role": "assistant", "content": answer})
    return messages


def chat_size(spec: str) -> int | None:
    """The conversations of a source `pychat` or `pychat:NUMBER`, or None for another one."""
    match = re.fullmatch(r"pychat(?::(\d+))?", spec)
    if match is None:
        return None
    n = int(match[1] or CONVERSATIONS)
    if not 1 <= n <= 10_000_000:
        raise UserError(f"--source={spec}: expected pychat:NUMBER with 1 to 10000000 conversations")
    return n


def chat_records(n: int, seed: int = 0) -> Iterator[dict]:
    """Yield n records: the text of a conversation, and of one in WITH_ROLES its messages."""
    rng = random.Random(seed)
    for i in range(n):
        messages = draw_conversation(rng)
        text = "\n".join(message["content"] for message in messages)
        yield {"text": text, "messages": None if i % WITH_ROLES else messages}


def chat_path(n: int) -> Path:
    return FOLDER / f"pychat_{n}.jsonl"


def chat_file(n: int) -> Path:
    """The file of n records: written, if it is not there as it should be."""
    path = chat_path(n)
    data = "".join(json.dumps(record) + "\n" for record in chat_records(n)).encode()
    if path.is_file() and path.read_bytes() == data:
        return path  # its time stays too: what prepare.py made of it counts still
    FOLDER.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data)
    return path


# --------------------------------------------------------------------------------------------------
# How good it is: a task for eval.py

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def held_out(seed: int = 1) -> dict:
    """Questions that no conversation for training has, by subject; `exact`: whether the answer is
    right letter by letter."""
    subjects = [about_name] * 8 + [expression] * 8
    subjects += [about_word, short_function, other_function, way, other_way]
    subjects += [talk, away, unknown_name]
    rows = []
    count = Counter()
    draw = Draw(random.Random(seed), held_out=True)
    for subject in subjects * QUESTIONS:
        history = []
        for question, answer in subject(draw):
            name = "follow-ups" if history else draw.subject
            count[name] += 1
            if count[name] <= QUESTIONS:
                row = {"subject": name, "question": question, "answer": answer}
                rows.append(row | {"history": history})
            history = [*history, as_user(question), {"role": "assistant", "content": answer}]
    return task_of(rows) | {"judge": judge}


def programs(seed: int = 2) -> dict:
    """Functions in words, and under names, that no conversation for training has: whether the code
    of the answer passes its checks. It is the model's code, so that it runs in the sandbox alone,
    with --allow_code_exec."""
    rows = []
    draw = Draw(random.Random(seed), held_out=True)
    for subject in [short_function, other_function] * QUESTIONS:
        question, answer = subject(draw)[0]
        if draw.checks:
            row = {"subject": draw.subject, "question": question, "answer": answer}
            rows.append(row | {"checks": draw.checks})
    return task_of(rows) | {"program": program}


def as_user(question: str) -> dict:
    return {"role": "user", "content": question}


def task_of(rows: list[dict]) -> dict:
    """What eval.py is to ask, with --chat: `history` are the messages before a question."""
    header = {"kind": "generate", "prompt": "{question}", "stop": [], "max_new_tokens": 120}
    return header | {"rows": rows}


def judge(row: dict, answers: list[str]) -> dict[str, float]:
    return {"exact": float(answers[0].strip() == row["answer"])}


def program(row: dict, answer: str) -> str:
    """The code in an answer, and the checks behind it."""
    code = CODE.search(answer)
    if code is None:
        return "raise ValueError('no code')"
    return f"{code[1]}\n{row['checks']}"
