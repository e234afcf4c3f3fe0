"""The chat about Python: its answers are Python's own, what is held out is in no conversation."""

import ast
import builtins
import importlib
import inspect
import json
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run

from barelm import python_chat as chat
from barelm.python_expressions import EXPRESSIONS, draw_expression, value_of
from barelm.python_facts import OWN_WORDS, facts, pairs_of
from barelm.python_functions import checks_of, functions, write_function
from barelm.python_ways import ways
from barelm.python_wordings import AWAY, TALK, WORDINGS, wordings
from barelm.run import UserError
from barelm.sandbox import run_programs


def questions(messages):
    return [message["content"] for message in messages if message["role"] == "user"]


@pytest.fixture(scope="module")
def conversations():
    rng = random.Random(3)
    return [chat.draw_conversation(rng) for _ in range(3000)]


@pytest.mark.parametrize("kind", EXPRESSIONS)
def test_another_python_gives_the_same_values(kind):
    expressions = [draw_expression(kind, random.Random(seed)) for seed in range(60)]
    program = "import json, sys\nfor e in json.load(sys.stdin):\n"
    program += "    try:\n        print(json.dumps(['value', repr(eval(e))]))\n"
    program += "    except Exception as x:\n        print(json.dumps([type(x).__name__, str(x)]))\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(expressions),
        capture_output=True,
        text=True,
        timeout=60,
    )
    for expression, line in zip(expressions, done.stdout.splitlines(), strict=True):
        name, text = json.loads(line)
        said = f"`{text}`" if name == "value" else f"It raises `{name}`: {text}"
        assert value_of(expression) == said
        assert (name == "value") == (kind != "errors")


def named(name):
    """The object of this name, found in another way than facts() goes."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        break
    else:
        n, value = 0, builtins
    for part in parts[n:]:
        value = getattr(value, part)
    return value


def test_facts_are_in_the_docstrings():
    own_words = dict(pairs_of(OWN_WORDS))
    assert len(facts()) > 500
    assert len({fact.name for fact in facts()}) == len(facts())
    for fact in facts():
        value = named(fact.name)
        if fact.name not in own_words:
            docstring = " ".join(inspect.cleandoc(value.__doc__).split()).lower()
            assert fact.summary.removesuffix(".").lower() in docstring
        if fact.base:
            assert issubclass(value, getattr(builtins, fact.base))


def test_examples_give_what_they_show():
    shown = [fact for fact in facts() if fact.example]
    assert len(shown) > 100
    for fact in shown:
        *lines, value = fact.example.split("\n")
        names = {}
        for module in ("os", "urllib.parse", fact.module, "pathlib"):
            if module:
                names[module.partition(".")[0]] = importlib.import_module(module.partition(".")[0])
        *statements, expression = [line.removeprefix(">>> ") for line in lines]
        exec("\n".join(statements), names)
        assert repr(eval(expression, names)) == value


def test_functions_pass_their_checks_under_any_name():
    for function in functions():
        assert len(function.purposes) >= 2
        for argument in function.arguments:
            names = {}
            exec(write_function(function, "named", argument), names)
            exec(checks_of(function, "named"), names)
            assert callable(names["named"])


def test_ways_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "input", lambda prompt: "x")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    before = "items = [3, 1, 2]; other = [4]; numbers = [1, 2]; words = ['a']; text = 'a1b'; "
    before += "d = {'a': 1}; name = 'ann'; age = 3; rows = [[1], [2]]; a = 1; b = 2\n"
    (tmp_path / "notes.txt").write_text("one\n")
    for wordings_of, code in ways():
        compile_only = ("python -m", "import subprocess", "import sys", "raise")
        if not code.startswith("python -m"):
            ast.parse(code)
        if not code.startswith(compile_only):
            exec(before + code, {})
        assert all(wordings_of)


def test_nothing_held_out_is_in_a_conversation(conversations):
    asked = [text.lower() for messages in conversations for text in questions(messages)]
    every = "\n".join(asked)
    rows = chat.held_out()["rows"]
    seen = ("talk",)
    kinds = [*EXPRESSIONS, "words", "functions", "ways", "unknown names", "other topics", "what"]
    for row in rows:
        if row["subject"] in seen or row["history"]:
            continue
        assert row["question"].lower().removesuffix("?") not in every, row
    subjects = {row["subject"] for row in rows}
    assert subjects >= {*kinds, "follow-ups", "signature", "example", "where", "talk"}
    # Expressions, whatever the words around them.
    for text in asked:
        for match in re.findall(r"(?:[\d]+ [-+*/%]+ \d+)", text):
            if text.removeprefix("what is ").strip("`? ") == match:
                assert not chat.is_held_out(match)
    for block in (*WORDINGS.values(), AWAY):
        assert not set(wordings(block, True)) & set(wordings(block, False))


def test_conversations_take_turns_and_fit_a_small_context(conversations):
    for messages in conversations:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in messages)
    answers = {message["content"] for messages in conversations for message in messages}
    assert {answer for _, answer in TALK} <= answers
    assert sum(map(len, map(str, conversations))) / len(conversations) < 1000


def test_the_same_seed_gives_the_same_records_in_another_process():
    program = "import json\nfrom barelm.python_chat import chat_records\n"
    program += "print(json.dumps(list(chat_records(200))))"
    # Another order of sets: Python's hashes have a seed, too.
    env = os.environ | {"PYTHONHASHSEED": "5", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300
    )
    assert json.loads(done.stdout) == list(chat.chat_records(200))


def test_names_of_sources():
    assert chat.chat_size("pychat:12") == 12
    assert chat.chat_size("pychat") == chat.CONVERSATIONS
    assert chat.chat_size("pychats") is None
    with pytest.raises(UserError, match="expected pychat:NUMBER"):
        chat.chat_size("pychat:0")


def test_a_name_that_is_known_is_never_called_unknown():
    draw = chat.Draw(random.Random(0))
    known = {fact.name for fact in facts()}
    for held_out in (False, True):
        draw.held_out = held_out
        for _ in range(300):
            ((_, answer),) = chat.unknown_name(draw)
            assert answer.split("`")[1] not in known


def test_answers_are_judged(holes):
    row = {"answer": "`3`"}
    assert chat.judge(row, ["`3`\n"]) == {"exact": 1.0}
    assert chat.judge(row, ["3"]) == {"exact": 0.0}
    rows = chat.programs()["rows"]
    assert {row["subject"] for row in rows} == {"functions", "functions, other words"}
    row = {"checks": "assert f('ab') == 'ba'"}
    code = "```python\ndef f(x):\n    return {}\n```"
    answers = [rows[0]["answer"], code.format("x[::-1]"), code.format("x"), "no code"]
    sources = [chat.program(rows[0], answers[0])]
    sources += [chat.program(row, answer) for answer in answers[1:]]
    if holes:
        pytest.skip("; ".join(holes))
    verdicts = [verdict.partition(":")[0] for verdict in run_programs(sources)]
    assert verdicts == ["passed", "passed", "failed", "failed"]


def test_one_recipe_from_prepare_to_eval(tmp_path):
    recipe = "config/chat.py"
    small = ["--n_embd=32", "--n_layer=1", "--n_head=1", "--n_kv_head=1"]
    run(tmp_path, "prepare.py", recipe, "--source=pychat:300", "--vocab_size=400")
    rows = []
    for split in ("train", "val"):
        lines = (tmp_path / f"data/chat/sft_{split}.jsonl").read_text().splitlines()
        rows += [json.loads(line)["messages"] for line in lines]
    records = list(chat.chat_records(300))
    assert {str(row) for row in rows} == {str(r["messages"]) for r in records if r["messages"]}
    assert len(rows) == 60
    run(tmp_path, "train.py", recipe, *small, "--max_steps=0")
    done = run(tmp_path, "finetune.py", recipe, "--max_steps=2", "--check_memorized=0")
    assert "left out" not in done.stdout
    tasks = f"--tasks={ROOT}/barelm/python_chat.py:held_out"  # by its place below the project
    done = run(tmp_path, "eval.py", recipe, tasks, "--limit=1", "--max_new_tokens=2")
    for subject in ("functions, other words", "follow-ups"):
        assert re.search(rf"\| {subject} +\| 0 ", done.stdout), subject
    tasks = f"--tasks={ROOT}/barelm/python_chat.py:programs"
    done = run(tmp_path, "eval.py", recipe, tasks, check=False)
    assert done.stderr.startswith("this task runs programs that the model wrote: --allow_code_exec")
