"""eval.py and sample.py on what users give them: rows that are alike, headers, rows, results, logs
and texts of other forms, full disks; each is a right result or one line."""

import json
import random
import re
import resource
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import run

import eval as evaluation
import model
from barelm import questions, tasks
from barelm.benchmarks import TASKS
from barelm.rows import read_text
from barelm.run import Run, UserError
from barelm.scores import read_scores
from barelm.scoring import Request, score_by_position

DEEP = "[" * 100_000


def own_task(rows, **header):
    return tasks.own_task("own", {"kind": "generate"} | header, rows)


def question(text, **more):
    return {"question": text, "answer": f"answer of {text}"} | more


def shots_of(task):
    """For each row (its question, the questions of its shots)."""
    found = []
    for row, before in questions.with_shots(task, 0, 1234):
        asked = [block.removeprefix("Question: ") for block in before.split("\n\n") if block]
        found.append((row["question"], [block.partition("\n")[0] for block in asked]))
    return found


# ------------------------------------------------------------------------------------------- shots


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("order", ["01200", "00012", "0110", "012345", "00000000000001234"])
def test_shots_are_as_many_as_asked_and_none_asks_the_same(order, numbered):
    rows = [question(f"Q{digit}") for digit in order]
    rows = [row | ({"id": i} if numbered else {}) for i, row in enumerate(rows)]
    for n in range(1, len(order) - max(map(order.count, order)) + 1):
        shots = shots_of(own_task(rows, shots=n))
        assert len(shots) == len(rows)
        for asked, before in shots:
            assert len(before) == n and asked not in before


def harness_shots(rows, n, seed):
    """The draw of lm-evaluation-harness 0.4.13, of examples from the split that is asked: one more
    than asked for, without the row itself; where copies leave too few, again without them all."""
    draw, found = random.Random(seed), []
    for row in rows:
        drawn = [other for other in draw.sample(rows, n + 1) if other != row][:n]
        if len(drawn) < n:
            drawn = draw.sample([other for other in rows if other != row], n)
        found.append((row["question"], [other["question"] for other in drawn]))
    return found


@pytest.mark.parametrize("order", ["0123456789", "01200", "000111222", "0102030405"])
def test_shots_are_the_harness_s_draw(order):
    rows = [question(f"Q{digit}") for digit in order]
    for n in (1, 2, 3):
        if n <= len(order) - max(map(order.count, order)):
            assert shots_of(own_task(rows, shots=n)) == harness_shots(rows, n, 1234)


def test_too_few_different_rows_are_a_line():
    rows = [question("Q0"), question("Q1"), question("Q0", id=3)]
    with pytest.raises(UserError, match="2 shots, but only 1 rows ask something else than .*Q0"):
        shots_of(own_task(rows, shots=2))
    assert [before for _, before in shots_of(own_task(rows, shots=1))] == [["Q1"], ["Q0"], ["Q1"]]


def test_questions_that_a_file_of_examples_holds_are_told(tmp_path, monkeypatch, capsys):
    """The harness's draw keeps them, so that numbers compare: a line counts them."""
    task = replace(TASKS["gsm8k"], name="gsm8k", shots=1, judge=None)
    task.rows, task.examples = [question("Q0"), question("Q1")], [question("Q1")]
    tok = SimpleNamespace(start=[], eot_id=0, encode=lambda text: [*text.encode()])
    net = SimpleNamespace(config=SimpleNamespace(n_ctx=999, is_seq2seq=False))
    items, n_cut, n_solved = evaluation.make_items(task, net, tok)
    assert (len(items), n_cut, n_solved) == (2, 0, 1)


# ------------------------------------------------------------------- results, logs, texts, answers


def entry(**figures):
    return json.dumps({"results": {"t": {"acc": 0.5, "acc_stderr": 0.1, "n": 3} | figures}})


RESULTS = [
    "", "{", "[]", "5", "null", DEEP, entry()[:40], '{"results": []}', '{"results": null}', "{}",
    '{"results": {"t": 5}}', '{"results": {"t": [1]}}', '{"results": {"t": "acc acc_stderr"}}',
    entry(acc="0.5"), entry(acc=True), entry(acc=[1]), entry(acc=10**400), entry(acc_stderr="0.1"),
    entry(acc_stderr=[1]), entry(n="3"), entry(n=None), entry(acc_stderr=-1),
]  # fmt: skip


@pytest.mark.parametrize("text", RESULTS, ids=lambda text: text[:60])
def test_results_of_another_form_are_a_line(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match="remove it, and evaluate again") as error:
        read_scores(tmp_path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    path.write_text(entry())
    assert read_scores(tmp_path) == {("t", "acc"): (0.5, 0.1, 3)}
    path.write_text(entry(acc=float("nan")))  # a loss may be none
    assert read_scores(tmp_path) == {}
    path.write_text(entry(acc_stderr=None))
    assert read_scores(tmp_path) == {("t", "acc"): (0.5, None, 3)}


def test_an_evaluation_refuses_results_of_another_form_before_it_begins(tiny, tmp_path):
    (tmp_path / "results.json").write_text(RESULTS[7])
    flags = ["--model=out/tiny", "--dataset=tiny", f"--out_dir={tmp_path}"]
    done = run(tiny, "eval.py", *flags, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert (tmp_path / "results.json").read_text() == RESULTS[7]


TEXTS = {
    "a.txt": (b"\xff\xff", "cannot be read as text"),
    "b.txt": (b'{"text": "x"}\n', "name it .jsonl"),
    "c.jsonl": (b'{"text": 5}', "record 1: expected a text"),
    "d.jsonl": (b'{"text": "x"}\n{"x": "a"}', "record 2: expected a text"),
    "e.jsonl": (DEEP.encode(), "nested too deeply"),
    "f.jsonl": (b'{"text": "\\ud800"}', "record 1: expected a text"),
    "g.jsonl": (b"", "no text in it"),
}


def test_texts_of_other_forms_are_a_line(tmp_path):
    for name, (data, message) in TEXTS.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            read_text(tmp_path / name)
        assert "\n" not in str(error.value)
    for name in ("h.JSONL", "h.ndjson"):
        (tmp_path / name).write_text('{"text": "a\\nb"}\n{"text": ""}\n')
        assert read_text(tmp_path / name) == ["a\nb"]
    (tmp_path / "i.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read_text(tmp_path / "i.txt") == ["one"]


def test_answers_of_any_form_are_read_and_a_full_disk_ends_in_a_line(tmp_path):
    """Torn, deep and foreign lines are left out; what was answered before the end stays."""
    lines = [DEEP, "[1]", "{}", "5", '[["x"], 2]', '{"torn', '["key", 7]']
    (tmp_path / "answers_3.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    answers = evaluation.Answers(tmp_path, "m", Run(torch.device("cpu")))
    assert answers.answered == {"key": 7}
    work = lambda batch: [[0.5] * 30 for _ in batch]
    requests = [Request("", [i], [[]]) for i in range(9)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(UserError, match="answers_0.jsonl: cannot be written: .*run it again"):
            answers("task", "settings", requests, work, max_tokens=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = evaluation.Answers(tmp_path, "m", Run(torch.device("cpu")))
    assert [0.5] * 30 in again.answered.values() and len(again.answered) < 9
    found = again("task", "settings", requests, work, max_tokens=1)
    assert found == [[0.5] * 30] * 9


PROMPTS = {
    "a.txt": (b"\xff", "no UTF-8"),
    "a.jsonl": (b"5", "a.jsonl:1: expected"),
    "b.jsonl": (b'{"prompt": "x"}\n{"prompt": 5}', "b.jsonl:2: expected"),
    "c.jsonl": (DEEP.encode(), "c.jsonl:1: JSON nested too deeply"),
    "d.jsonl": (b'{"prompt": "\\ud800"}', "d.jsonl:1: half a surrogate pair"),
    "e.jsonl": (b"", "no prompt in it"),
}


def test_prompts_of_other_forms_are_a_line(tmp_path, monkeypatch):
    import sample

    for name, (data, message) in PROMPTS.items():
        (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(sample, "prompt_file", str(tmp_path / name))
        with pytest.raises(UserError, match=message) as error:
            sample.read_prompts()
        assert "\n" not in str(error.value)
    (tmp_path / "f.NDJSON").write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "c"}')
    monkeypatch.setattr(sample, "prompt_file", str(tmp_path / "f.NDJSON"))
    assert sample.read_prompts() == ["a\u2028b", "c"]  # a separator of lines within a text


# -------------------------------------------------------------------------- beyond the context


def small_net(pos):
    torch.manual_seed(0)
    shape = dict(n_ctx=8, n_layer=2, n_head=2, n_embd=16, pos=pos)
    return model.GPT(model.GPTConfig(vocab_size=32, **shape)).eval()


@pytest.mark.parametrize("pos", ["rope", "sinusoidal", "none"])
@torch.no_grad()
def test_the_loss_by_position_is_a_plain_loop_s(pos):
    net = small_net(pos)
    ids = torch.randint(0, 32, (3, 21)).tolist()
    requests = [Request("", row[:1], [row[1:]]) for row in ids[:2]]
    requests += [Request("", ids[2][:6], [ids[2][6:11]])]
    sums = score_by_position(net, requests, 5)
    expected = {}
    for _, before, [after] in requests:
        logp = net(torch.tensor([before + after])).log_softmax(-1)[0]
        for place in range(len(before) - 1, len(before + after) - 1):
            nats = -logp[place, (before + after)[place + 1]].item()
            expected.setdefault(place // 5, []).append(nats)
    by = evaluation.loss_by_position(requests, sums, 5)
    assert [*by] == [f"positions {5 * k} to {5 * k + 4}" for k in range(4)]
    for part, figures in enumerate(by.values()):
        assert figures["n"] == len(expected[part])
        mean = sum(expected[part]) / len(expected[part])
        assert figures["loss"] == pytest.approx(mean, abs=1e-5)


def test_a_longer_context_is_asked_for_and_learned_positions_refuse_it(monkeypatch):
    for pos in ("rope", "learned"):
        net = small_net(pos)
        monkeypatch.setattr(evaluation, "context", None)
        monkeypatch.setattr(evaluation, "seq_len", 9)
        with pytest.raises(UserError, match="seq_len=9, but the context .*--context=9"):
            evaluation.window_length(net)
        monkeypatch.setattr(evaluation, "seq_len", 0)
        assert evaluation.window_length(net) == 8
        monkeypatch.setattr(evaluation, "context", 8)
        assert evaluation.window_length(net) == 8
        monkeypatch.setattr(evaluation, "context", 9)
        if pos == "rope":
            assert evaluation.window_length(net) == 9
        else:
            with pytest.raises(UserError, match="learned ones, which end at 8"):
                evaluation.window_length(net)


def test_the_command_says_the_loss_beyond_the_context(tiny, tmp_path):
    flags = ["--model=out/tiny", "--dataset=tiny", f"--out_dir={tmp_path}", "--eval_tokens=1500"]
    out = run(tiny, "eval.py", *flags, "--context=128").stdout
    found = json.loads((tmp_path / "results.json").read_text())["results"]["loss"]
    assert len(found["by"]) == 8 and "| positions 112 to 127 | " in out
    tokens = sum(figures["n"] for figures in found["by"].values())
    nats = sum(figures["n"] * figures["loss"] for figures in found["by"].values())
    assert nats / tokens == pytest.approx(found["loss"], abs=1e-6)


def test_a_subject_may_hold_half_a_surrogate_pair(tiny, tmp_path):
    rows = []
    for subject in ("\ud800x", "y"):
        rows.append({"subject": subject, "question": "q", "choices": ["a", "b"], "answer": 0})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model=out/tiny", f"--tasks={tmp_path}/own.jsonl", f"--out_dir={tmp_path}"]
    done = run(tiny, "eval.py", *flags)
    assert "\n| \\ud800x " in done.stdout
    [entry] = json.loads((tmp_path / "results.json").read_text())["results"].values()
    assert [*entry["by"]] == ["y", "\ud800x"]


def test_a_context_beyond_all_numbers_is_a_line(monkeypatch):
    monkeypatch.setattr(evaluation, "context", 10**25)
    with pytest.raises(UserError, match="context=1.*: expected less than"):
        evaluation.check_settings()


def test_the_loss_by_the_length_of_a_window(tiny, tmp_path):
    """Of the same tokens, for which a longer one has seen more; a table and a picture."""
    flags = ["--model=out/tiny", "--dataset=tiny", "--eval_tokens=2048"]
    out = run(tiny, "eval.py", *flags, f"--out_dir={tmp_path}/own", "--lengths=32,64,128").stdout
    by_length = re.findall(r"^\| length (\d+) +\| ([0-9.]+)", out, re.M)
    assert [length for length, _ in by_length] == ["32", "64", "128"]
    assert float(by_length[0][1]) > float(by_length[1][1])  # its context is 64
    own = json.loads((tmp_path / "own/results.json").read_text())["results"]["loss"]["by"]
    per_token = {figures["bits_per_byte"] / figures["loss"] for figures in own.values()}
    assert max(per_token) == pytest.approx(min(per_token))  # so many bytes have as many tokens
    scaling = '--rope_scaling={"rope_type": "linear", "factor": 2.0}'
    run(tiny, "eval.py", *flags, f"--out_dir={tmp_path}/scaled", "--lengths=64", scaling)
    for name in ("own", "scaled"):
        shutil.copy(tiny / "out/tiny/log.jsonl", tmp_path / name)
    runs = f"--compare={tmp_path}/own,{tmp_path}/scaled"
    out = run(tmp_path, "report.py", runs).stdout
    lines = out.splitlines()
    [begin] = [i for i, line in enumerate(lines) if "loss at 32" in line]
    [head, _, own, scaled] = lines[begin : begin + 4]
    assert "loss at 128" in head
    assert own.count("|") == scaled.count("|") and by_length[2][1][:4] in own
    assert "loss by the length of a window" in (tmp_path / "out/compare/report.svg").read_text()
    for bad, words in {
        "--lengths=64,x": "numbers of tokens",
        "--rope_scaling={'rope_type': 'own'}": "rope_scaling",
    }.items():
        done = run(tiny, "eval.py", *flags, bad, check=False)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
