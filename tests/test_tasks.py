"""barelm/tasks.py: rows, headers, answers and how they are judged; barelm/ifeval.py."""

import importlib.util
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from barelm import benchmarks, ifeval, tasks
from barelm.run import UserError
from barelm.sandbox import run_program, run_programs
from barelm.scores import mean

ROOT = Path(__file__).resolve().parent.parent
HUMANEVAL = ROOT.parent / "shared/data/humaneval/HumanEval.jsonl"


def own_task(rows, **header):
    return tasks.own_task("own", {"kind": "generate"} | header, rows)


def question(text, **more):
    return {"question": text, "answer": f"answer of {text}"} | more


# ------------------------------------------------------------------------------ headers and rows

HEADERS = [
    ("stop", [1]), ("stop", "x"), ("stop", [""]), ("stop", None), ("stop", [["a"]]),
    ("shots", "2"), ("shots", -1), ("shots", 1.5), ("shots", True), ("max_new_tokens", 0),
    ("max_new_tokens", "9"), ("which", "x"), ("extract", "("), ("extract", 5), ("ignore", ["("]),
    ("ignore", [1]), ("ignore", "x"), ("lower", 1), ("judge", "f"), ("rubric", 3), ("prompt", 5),
    ("answer", 3), ("description", ["a"]), ("delimiter", None), ("kind", 5), ("kind", "CHOICE"),
    ("choices", 5), ("choices", []), ("choices", [1, 2]), ("choices", {}), ("colour", 1),
    ("extract", "(" * 5000),
]  # fmt: skip


@pytest.mark.parametrize("key, value", HEADERS)
def test_a_header_of_another_form_is_a_line(key, value):
    with pytest.raises(UserError, match=f"own: header: .*{key}") as error:
        own_task([question("Q")], **{key: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_match_that_is_not_there_is_invalid():
    """Of two matches the eighth: an answer of the wrong form, not an error."""
    assert tasks.extract("([0-9])", "1 2", 7) == "[invalid]"
    assert tasks.extract("([0-9])", "1 2", -3) == "[invalid]"
    assert [tasks.extract("([0-9])", "1 2", k) for k in (1, -1, -2)] == ["2", "2", "1"]


CHOICE_ROWS = [
    {}, {"question": "a"}, {"question": "a", "choices": ["x"]},
    {"question": "a", "choices": ["x", "y"], "answer": None},
    {"question": "a", "choices": ["x", "y"], "answer": True},
    {"question": "a", "choices": ["x", "y"], "answer": 1.0},
    {"question": "a", "choices": ["x", "y"], "answer": 10**400},
    {"question": "a", "choices": ["x", 1], "answer": 0},
    {"question": "a", "choices": None, "answer": 0},
    {"question": "a", "choices": {"text": ["x"]}, "answer": 0},
    {"question": "a", "choices": {"text": ["x", "y"], "label": 5}, "answer": "A"},
    {"question": None, "choices": ["x", "y"], "answer": 0},
]  # fmt: skip
ROWS = {
    "generate": [{"question": "a"}, question("a", answer=None), question("a", answer=["x"])],
    "mmlu": [question(5), {"question": "q"}, {"question": "q", "choices": ["a"] * 27, "answer": 3}],
    "hellaswag": [
        {"ctx_a": "x"},
        {"activity_label": "a", "ctx_a": "a", "ctx_b": "b", "label": "0"},
    ],
    "ifeval": [{}, {"prompt": 5}],
    "mbpp": [{"code": "c", "test_list": ["x"]}, {"text": "t", "code": "c", "test_list": 5}],
}


@pytest.mark.parametrize("row", CHOICE_ROWS, ids=str)
def test_a_choice_row_of_another_form_is_a_line(row):
    with pytest.raises(UserError, match="^own: .*in the row") as error:
        tasks.read_row(own_task([row], kind="choice"), row)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_other_forms_are_a_line(name):
    for row in ROWS[name]:
        if name == "generate":
            task = own_task([row])
        else:
            task = replace(benchmarks.TASKS[name], name=name)
        with pytest.raises(UserError, match="in the row") as error:
            tasks.read_row(task, row)
        assert "\n" not in str(error.value)


def test_a_program_is_made_of_texts():
    task = replace(benchmarks.TASKS["humaneval"], name="humaneval")
    for row in ({"prompt": "p"}, {"prompt": "p", "test": None, "entry_point": "f"}):
        with pytest.raises(UserError, match="humaneval: .*test"):
            tasks.write_program(task, row, "")


def test_subjects_are_texts_and_zero_is_one(tmp_path):
    rows = [{"subject": 0}, {"subject": [1]}, {"subject": None}, {}, {"subject": 0}]
    assert [*map(tasks.subject_of, rows)] == ["0", "[1]", "", "", "0"]


JUDGES = {
    "lambda row, texts: 1 / 0": "ZeroDivisionError: division by zero, line 1",
    "lambda row: {'a': 1}": "TypeError",
    "lambda row, texts: None": "expected {metric: number}",
    "lambda row, texts: {'a': 'x'}": "a='x': no number",
    "lambda row, texts: {'a': float('nan')}": "a=nan: no number",
    "lambda row, texts: {'a': [1, None]}": "a=None: no number",
}
FILES = {
    "def f(: pass": "SyntaxError",
    "raise ValueError('two\\nlines')": "ValueError: two lines",
    "def f(): return 1 / 0": "ZeroDivisionError: division by zero, line 1",
    "def f(): return 5": "expected a dict with rows",
    "def f(): return {'rows': [5]}": "expected a list of dicts",
    "def g(): return {}": "no function 'f'",
}


def test_what_a_task_in_python_raises_is_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for judge, message in JUDGES.items():
        (tmp_path / "t.py").write_text(f"def f(): return {{'kind': 'generate', 'judge': {judge}}}")
        task = tasks.own_task("t.py:f", *tasks.run_own_file("t.py:f"))
        with pytest.raises(UserError) as error:
            tasks.checked_judgement(task, {"question": "q"}, ["text"])
        assert message in str(error.value) and "\n" not in str(error.value)
    for text, message in FILES.items():
        (tmp_path / "t.py").write_text(text)
        with pytest.raises(UserError) as error:
            tasks.run_own_file("t.py:f")
        assert message in str(error.value) and "\n" not in str(error.value)
    assert mean([]) == (None, None)  # of a judge's empty list


# ------------------------------------------------------------------------------- other shapes


def test_rows_of_other_shapes():
    lines = {"question": "q", "options": "A. x y\nB. z", "answer": "B. z"}
    assert tasks.choices_of(lines) == (["x y", "z"], 1)
    arc = {"choices": {"text": ["u", "v"], "label": ["1", "2"]}, "answerKey": "2"}
    assert tasks.choices_of(arc) == (["u", "v"], 1)
    assert tasks.choices_of({"choices": ["B", "A"], "answer": "A"}) == (["B", "A"], 1)
    row = dict(activity_label="Cut", ctx_a="He [x] takes.", ctx_b="she", endings=["a [title] b"])
    expected = tasks.Question("Cut: He takes. She", 0, ["a. b"])
    assert benchmarks.read_hellaswag(row | {"label": "0"}) == expected
    with pytest.raises(ValueError):
        tasks.choices_of({"choices": ["a", "b"], "answer": 2})
    with pytest.raises(ValueError):  # not an ending that is never chosen
        benchmarks.read_hellaswag(row | {"label": "1"})


MATH = """\\frac12=\\frac{1}{2} \\dfrac{3}{4}=\\frac{3}{4} 1/2=\\frac{1}{2} .5=\\frac{1}{2}
\\sqrt3=\\sqrt{3} x=5=5 90^\\circ=90 \\frac1{72}=\\frac{1}{72} 10\\%=10 \\left(1,2\\right)=(1,2)"""


def test_mathematics_is_compared_in_one_spelling():
    for pair in MATH.split():
        text, _, plain = pair.rpartition("=")
        assert benchmarks.normal_math(text) == plain
    assert benchmarks.boxed(r"so \boxed{1} or \boxed{\frac{a}{b}}.") == r"\frac{a}{b}"
    assert benchmarks.boxed(r"\boxed 5$ x") == "5" and benchmarks.boxed(r"\boxed{1") is None
    if importlib.util.find_spec("lm_eval"):
        from lm_eval.tasks.hendrycks_math.utils import strip_string

        more = [r"5\text{ cm}", r"\$3", "0.5", "-1/2", r"a\!b", "k = 2", r"\frac ab"]
        for text in [*more, *(pair.rpartition("=")[0] for pair in MATH.split())]:
            assert benchmarks.normal_math(text) == strip_string(text), text


# -------------------------------------------------------------------------------------- code tasks


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="no HumanEval here")
def test_humaneval(holes):
    rows = [json.loads(line) for line in HUMANEVAL.read_text(encoding="utf-8").splitlines()]
    right = [benchmarks.humaneval_program(row, row["canonical_solution"]) for row in rows]
    assert run_programs(right, timeout=100, weak=bool(holes)) == ["passed"] * 164
    wrong = [benchmarks.humaneval_program(row, "    return None\n") for row in rows[::2]]
    wrong += [benchmarks.humaneval_program(row, "    pass\n") for row in rows[1::2]]
    assert "passed" not in run_programs(wrong, weak=bool(holes))


def test_humaneval_program_ends_at_a_stop():
    row = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    answer = "    return 1\n\nprint(f())\nraise ValueError\n"
    assert benchmarks.humaneval_program(row, answer) == (
        "def f():\n    return 1\n\ndef check(f):\n    assert f() == 1\ncheck(f)\n"
    )
    assert (
        run_program(benchmarks.humaneval_program(row, answer), timeout=100, weak=True) == "passed"
    )


def test_mbpp():
    shot = {"text": "Add.", "code": "def a(x, y):\n    return x + y", "test_list": ["assert 1"] * 3}
    row = {"text": "Double.", "test_list": [f"assert d({i}) == {2 * i}" for i in range(3)]}
    head = "You are an expert Python programmer, and here is your task: "
    middle = " Your code should pass these tests:\n\n"
    solved = benchmarks.TASKS["mbpp"].read(shot)
    assert f"{solved.prompt}{solved.answer}\n\n{benchmarks.mbpp_prompt(row)}" == (
        f"{head}Add.{middle}assert 1\nassert 1\nassert 1\n[BEGIN]\ndef a(x, y):\n    return x + y\n"
        f"[DONE]\n\n{head}Double.{middle}assert d(0) == 0\nassert d(1) == 2\nassert d(2) == 4\n"
        "[BEGIN]\n"
    )
    for body, verdict in (("2 * x", "passed"), ("x", "failed: AssertionError:")):
        program = benchmarks.mbpp_program(row, f"def d(x):\n    return {body}\n[DONE]\nnonsense(")
        assert run_program(program, timeout=100, weak=True) == verdict


def test_pass_at_k():
    """The share of all subsets of k samples that have a right one."""
    for n, c, k in ((5, 0, 2), (5, 2, 1), (6, 2, 3), (6, 5, 2), (4, 4, 4)):
        subsets = [any(i < c for i in s) for s in itertools.combinations(range(n), k)]
        assert tasks.pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


# ------------------------------------------------------------------------------------------ IFEval

CASES = [  # instruction, arguments, a text that follows, one that does not
    ("keywords:existence", {"keywords": ["c++", "Cat"]}, "C++ cats", "C+ cat"),
    ("keywords:frequency", dict(keyword="no", frequency=2, relation="at least"), "No, no", "no"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "cats", "a CAT."),
    ("keywords:letter_frequency", dict(letter="a", let_frequency=2, let_relation="less than"),
     "Abc", "Aa"),
    ("language:response_language", {"language": "de"}, "Das ist nicht der Hund und die Katze.",
     "This is not the dog and the cat."),
    ("language:response_language", {"language": "ko"}, "안녕하세요 hi", "こんにちは"),
    ("language:response_language", {"language": "fa"}, "سلام دنیا", "שלום עולם"),
    ("length_constraints:number_sentences", dict(num_sentences=3, relation="at least"),
     "Mr. X. Y met e.g. me. Did he? “Yes!” I said", "One. Two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a\n\nb"),
    ("length_constraints:number_words", dict(num_words=3, relation="less than"), "a b", "a-b c"),
    ("length_constraints:nth_paragraph_first_word",
     dict(num_paragraphs=2, nth_paragraph=2, first_word="Two"), 'One\n\n"two, x', "Two\n\nOne"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\np. p.s: y", "P.S. y"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n**b**"),
    ("detectable_format:constrained_response", {}, "So: My answer is no.", "My answer is no"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* *b*", "*a* **"),
    ("detectable_format:multiple_sections", dict(section_spliter="SECTION", num_sections=2),
     "SECTION 1 a\nSECTION 2 b", "SECTION 1\nSection 2"),
    ("detectable_format:json_format", {}, '```JSON\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A>>\ntext", "<<>>"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, " say IT: x", "It: say it"),
    ("startend:end_checker", {"end_phrase": "The End."}, 'x the end."', "The end. x"),
    ("startend:quotation", {}, ' "a\nb" ', '"'),
    ("change_case:capital_word_frequency", dict(capital_frequency=2, capital_relation="at least"),
     "NO WAY-OUT", "NO Way WAY-out"),
    ("change_case:english_capital", {}, "THIS IS IT", "THIS IS It"),
    ("change_case:english_lowercase", {}, "this is it", "das ist der hund und die katze"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments, yes, no", CASES)
def test_instruction(name, arguments, yes, no):
    arguments = arguments | {"an_argument_of_another": None}  # as the published rows have them
    assert (
        ifeval.follows(name, arguments, yes) is True
        and ifeval.follows(name, arguments, no) is False
    )
    assert ifeval.follows(name, arguments, " \n") is False


def test_instructions_are_all_there_or_refused():
    assert len(ifeval.INSTRUCTIONS) == 25 and set(ifeval.INSTRUCTIONS) == {
        case[0] for case in CASES
    }
    with pytest.raises(UserError, match="keywords:nothing: not one"):
        ifeval.follows("keywords:nothing", {}, "x")
    with pytest.raises(UserError, match="keyword"):
        ifeval.follows("keywords:existence", {"keywords": None}, "x")
    with pytest.raises(UserError, match="around"):
        arguments = {"num_words": 3, "relation": "around"}
        ifeval.follows("length_constraints:number_words", arguments, "x")


def test_strict_and_loose():
    rows = [
        {"instruction_id_list": ["startend:quotation", "punctuation:no_comma"], "kwargs": [{}, {}]},
        {"instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]},
    ]
    verdicts = [
        ifeval.judge_ifeval(row, [text])
        for row, text in zip(rows, ['Sure, here:\n*"yes"*', "Here it is:\n[1]\nEnjoy!"])
    ]
    assert [list(v.values()) for v in verdicts] == [
        [False, [False, False], True, [True, True]],
        [False, [False], True, [True]],
    ]


def test_instructions_as_lm_eval(monkeypatch):
    """Random texts: the same verdicts, strict and loose, for all that need no language library."""
    pytest.importorskip("langdetect")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: True)  # it would want the network
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.ifeval.utils import process_results

    draw = random.Random(0)
    pieces = 'Yes no [x] <<T>> *a* **b** *** ****** P.S. , " {"a":1} SECTION 1 2 3'.split(" ")
    pieces += ["\n", "\n\n", "- a\n", "* b\n", "My answer is yes.", "The End.", "cat"]
    ours = [c for c in CASES if not c[0].startswith(("language", "change_case"))]
    ours = [c for c in ours if c[0] != "length_constraints:number_sentences"]
    for _ in range(150):
        text = "".join(draw.choice(pieces) + draw.choice(["", " ", "\n"]) for _ in range(9))
        texts = [text, draw.choice(ours)[2] + draw.choice(["", "\nbye"])]
        for text in texts:
            row = {"key": 0, "prompt": "", "instruction_id_list": [c[0] for c in ours]}
            row["kwargs"] = [c[1] for c in ours]
            row["kwargs"][0] = {"keywords": ["cat"]}  # lm-eval reads c++ as a pattern, and dies
            theirs = process_results(row, [text])
            strict, loose = ifeval.ifeval_verdicts(row, text)
            assert strict == theirs["inst_level_strict_acc"], text
            assert loose == theirs["inst_level_loose_acc"], text
