"""What a run leaves at its end: readable lines, curves as a picture, the next command."""

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
from conftest import LONGEST, ROOT, run, start

import config
from barelm import ending, pace
from barelm.chart import make_axis, picture, run_charts, running_mean
from barelm.run import Progress, fitting

SVG = "{http://www.w3.org/2000/svg}"
TRAIN = ["config/tiny.py", "--max_steps=6", "--eval_every=3", "--sample_tokens=0", "--device=cpu"]
TRAIN += ["--eval_tokens=512"]


def last_lines(text):
    """{key: value} of the `key: value` lines behind the last empty one."""
    lines = text.rstrip("\n").rpartition("\n\n")[2].split("\n")
    return dict(re.fullmatch(r"(\S+): +(.*)", line).groups() for line in lines if ": " in line)


def texts(path):
    tree = ET.parse(path)
    return [element.text for element in tree.iter(SVG + "text")]


# Lines


def test_lines_are_aligned_and_what_there_is_not_has_none():
    figures = {"step": 12345, "tokens": 1228800, "loss": 3.25, "mfu": None, "mem": 3 * 2**29}
    figures |= {"dt": 0.12345, "curves": "out/x y/curves.svg", "next": None}
    assert ending.figure_lines(figures) == [
        "step:   12345",
        "tokens: 1,228,800",
        "loss:   3.25",
        "mem:    1.50 GiB",
        "dt:     0.123 s",
        "curves: out/x y/curves.svg",
    ]
    assert ending.figure_lines({"mfu": 0.4125}) == ["mfu: 41.2 %"]
    assert ending.figure_lines({"loss": None}) == []


def test_a_table_of_scores_has_errors_and_no_empty_columns():
    by = {"a": {"acc": 0.5, "acc_stderr": 0.0312, "n": 1200}, "b": {"acc": None, "n": 0}}
    lines = ending.score_table("mmlu", by)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["mmlu", "acc", "n"]
    assert cells[2:] == [["a", "0.5 ± 0.031", "1,200"], ["b", "", "0"]]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "dt, expected",
    [(0.05, "20.0 steps/s"), (0.999, "1.0 steps/s"), (1.0, "1.0 s/step"), (51.04, "51.0 s/step")]
    + [(1234.5, "1234 s/step"), (0.0, "")],
)
def test_a_slow_step_has_its_seconds(dt, expected):
    assert pace.step_words(dt) == expected


def test_the_time_left_is_by_this_loop_without_its_first_step(monkeypatch):
    """Of a resume at one half, whose first step takes 60 s, and each of the others 2 s."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock.now)
    left = pace.TimeLeft(0.5)
    clock.now += 60
    assert left(0.51) == pytest.approx(60 * 49)
    for step in range(2, 11):
        clock.now += 2
        seconds = left(0.5 + step / 100)
    assert seconds == pytest.approx(2 * 40)
    assert left(0.5) == 0  # no progress, no guess


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_of_progress_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys, "stdout", Terminal())
    Progress()("step 1 (50 %)  loss 3.25  left 8s  mem 1.00 GiB")
    assert sys.stdout.getvalue() == "\r\033[Kstep 1 (50 %)  loss 3.25"
    assert fitting("x" * 40, 30) == "x" * 30 and fitting("a  b", 4) == "a  b"


# Curves


def log_rows(n, every, **more):
    rows = []
    for step in range(1, n + 1):
        row = {"step": step, "tokens": 64 * step, "loss": 5 - step / n, "lr": 1e-3, "dt": 0.1}
        row |= {"grad_norm": 1.0, "tok_s": 640.0, "mfu": None, "mem": 1 << 30} | more
        rows.append(row)
        if step % every == 0:
            rows.append({"step": step, "val_loss": 4.5 - step / n, "val_ppl": 9.0, "val_bpb": 1.5})
    return rows


def test_the_charts_of_a_log():
    charts = {chart.title: chart for chart in run_charts(log_rows(200, 50))}
    assert [*charts] == ["Loss", "Bits per byte", "Learning rate", "Gradient norm"] + [
        "Tokens a second"
    ]
    raw, smoothed, validation = charts["Loss"].series
    assert raw.kind == "raw" and raw.points[0] == (2, 4.99)  # the first 100th is left out
    assert raw.points[-1] == (200, 4.0) and smoothed.name.startswith("training, smoothed: 4.0")
    assert validation.points == [(step, 4.5 - step / 200) for step in (50, 100, 150, 200)]
    assert validation.name == "validation: 3.5" and validation.colour != smoothed.colour
    first = {"step": 0, "val_loss": 9.0}  # a tuning's: it counts
    assert run_charts([first, *log_rows(200, 50)])[0].series[-1].points[0] == (0, 9.0)
    ends = {chart.span for chart in charts.values()}
    assert ends == {(1, 200)}  # below each other the same step is at the same place
    svg = picture(charts.values())
    ET.fromstring(svg)
    assert "prefers-color-scheme:dark" in svg and "href" not in svg and "url(" not in svg


def test_the_running_mean_is_over_a_twentieth_of_the_points_so_far():
    """Where a line rises by 1 a step, the mean over the last n / 20 is behind by so many."""
    points = [(i, float(i)) for i in range(1, 2001)]
    means = running_mean(points)
    assert means[:20] == points[:20]
    for i in (199, 1999):
        _, mean = means[i]
        behind = i + 1 - mean
        assert behind == pytest.approx((i + 1) / 20, rel=0.2)
    flat = make_axis([0.1, 0.1 + 1e-17, 0.1 - 1e-17], 160, 40, 4, 0.05)
    assert flat.high - flat.low > 0.005  # what rounding left is no range


def test_of_rl_the_reward_is_the_large_chart_and_sources_are_told_apart():
    rows = log_rows(40, 20, reward=0.5, kl=0.1)
    rows.append({"step": 40, "val_reward": 0.7})
    charts = run_charts(rows)
    assert charts[0].title == "Reward" and not charts[0].is_small
    assert "kl" in [chart.title for chart in charts[1:]]  # what nobody has named yet is drawn too
    rows = log_rows(10, 5)
    rows.append({"step": 10, "val_loss": 3.0, "val_loss.web": 2.0, "val_loss.code": 4.0})
    [loss, *_] = run_charts(rows)
    names = [series.name for series in loss.series]
    assert names == ["training: 4", "validation: 3", "validation, code: 4", "validation, web: 2"]
    assert len({series.colour for series in loss.series}) == 4


def test_an_empty_log_has_no_picture_and_a_full_disk_no_failure(tmp_path):
    said = []
    assert ending.draw_curves(tmp_path, said.append) is None and not said
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    (tmp_path / "curves.svg.tmp").mkdir()  # no file can be written there
    assert ending.draw_curves(tmp_path, said.append) is None
    assert "curves.svg: cannot be written" in said[0]
    (tmp_path / "curves.svg.tmp").rmdir()
    assert ending.draw_curves(tmp_path, said.append) == str(tmp_path / "curves.svg")
    assert "training: 2" in texts(tmp_path / "curves.svg")


# Commands


@pytest.fixture
def line(monkeypatch, tmp_path):
    """The command line of a script of ours, run in tmp_path with some recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "GIVEN_RECIPES", {})
    monkeypatch.setattr(ending, "python_word", lambda: "python")

    def given(script, *recipes):
        monkeypatch.setattr(sys, "argv", [str(ROOT / script)])
        for recipe in recipes:
            config.GIVEN_RECIPES[str(ROOT / recipe)] = None

    return given


def plain(command):
    return command and command.replace(f"{ROOT}/", "")


def test_a_command_has_what_recipes_and_defaults_do_not_say(line):
    line("train.py")
    sample = lambda model: plain(ending.command("sample.py", {"model": model}))
    assert sample("out/python") == "python sample.py"
    assert sample("out/a b") == "python sample.py '--model=out/a b'"
    assert plain(ending.command("none.py", {})) is None
    line("train.py", "config/shakespeare.py")
    assert sample("out/shakespeare") == "python sample.py config/shakespeare.py"
    assert sample("out/x") == "python sample.py config/shakespeare.py --model=out/x"
    with_gap = ending.command("sample.py", {}, {"prompt": "a [MASK]"})
    assert "[MASK]" not in with_gap  # the recipe has a prompt
    assert plain(ending.command("sample.py", {"chat": True}, with_recipes=False)) == (
        "python sample.py --chat"
    )


def test_a_resume_is_by_as_many_processes(line, monkeypatch):
    line("train.py", "config/tiny.py")
    resume = "train.py --init_from=resume --out_dir=out/x"
    assert plain(ending.resume_command("out/x")) == f"python {resume}"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert plain(ending.resume_command("out/x")) == f"torchrun --nproc_per_node=4 {resume}"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert "on each machine" in ending.resume_command("out/x")


def test_a_prompt_with_a_gap_is_of_the_longest_line_and_of_no_special_token():
    tok = SimpleNamespace(special={"<|end|>": 9, "[MASK]": 7})
    text = "a b\n<|end|>one two three four five six seven eight nine\ttab"
    assert ending.gap_prompt(tok, text, 7) == "a [MASK]"  # what is not printable is no line
    assert ending.gap_prompt(tok, "x<|end|>one two three", 7) == "one [MASK] three"
    assert ending.gap_prompt(tok, "", 7) == "[MASK]"


NETS = {
    "causal": (SimpleNamespace(is_seq2seq=False, causal=True), ""),
    "encoder": (SimpleNamespace(is_seq2seq=False, causal=False), "a [MASK] b"),
    "seq2seq": (SimpleNamespace(is_seq2seq=True, causal=True), "a <extra_id_0>"),
}


@pytest.mark.parametrize(
    "kind, task, sample, tune",
    [
        ("causal", "sft", "--model=out/x", "--model=out/x --dataset=d --out_dir=out/x-sft"),
        ("encoder", "classify", "--model=out/x '--prompt=a [MASK] b'",
         "--method=classify --model=out/x --dataset=d --out_dir=out/x-classify"),
        ("seq2seq", "seq2seq", "--model=out/x '--prompt=a <extra_id_0>'",
         "--method=seq2seq --model=out/x --dataset=d --out_dir=out/x-seq2seq"),
    ],
)  # fmt: skip
def test_what_comes_behind_a_training(line, tmp_path, kind, task, sample, tune):
    line("train.py")
    of_config, gap = NETS[kind]
    net = SimpleNamespace(config=of_config)
    after = ending.after_training(net, "out/x", "d", gap)
    assert plain(after["next"]) == f"python sample.py {sample}" and after["then"] is None
    (tmp_path / "data/d").mkdir(parents=True)
    (tmp_path / f"data/d/{task}_train.jsonl").touch()
    after = ending.after_training(net, "out/x", "d", gap)
    assert plain(after["then"]) == f"python finetune.py {tune}"
    folder = tmp_path / after["then"].rpartition("=")[2]
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()  # it would be refused
    assert ending.after_training(net, "out/x", "d", gap)["then"] is None


def test_the_next_stage_of_a_recipe_comes_first(line, tmp_path):
    line("train.py", "config/sft.py")  # it tunes out/python
    net = SimpleNamespace(config=NETS["causal"][0])
    after = ending.after_training(net, "out/python", "python")
    assert plain(after["next"]) == "python finetune.py config/sft.py"
    assert plain(ending.after_training(net, "out/x", "python")["next"]).startswith(
        "python sample.py"
    )


@pytest.mark.parametrize(
    "method, expected",
    [
        ("sft", "sample.py --model=out/y --chat"),
        ("dpo", "sample.py --model=out/y --chat"),
        ("grpo", "sample.py --model=out/y --chat"),
        ("classify", "eval.py --model=out/y --tasks=classify --dataset=d"),
        ("tag", "eval.py --model=out/y --tasks=tag --dataset=d"),
        ("embed", "eval.py --model=out/y --tasks=neighbours --dataset=d"),
        ("reward", "rl.py --model=base --dataset=d --out_dir=out/y-rl --reward=out/y"),
    ],
)
def test_what_comes_behind_a_tuning(line, tmp_path, method, expected):
    line("finetune.py")
    for path, text in {"data/d/sft_train.jsonl": "", "base/chat_template.jinja": "x"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    command = plain(ending.after_tuning(method, "out/y", "d", "base")["next"])
    assert sorted(command.split()) == sorted(["python", *expected.split()])


def test_a_reward_model_of_what_cannot_chat_has_no_next_command(line):
    line("finetune.py")
    assert ending.after_tuning("reward", "out/y", "d", "base")["next"] is None


# Whole runs


def pasted(folder, command):
    """Run a command as a shell does."""
    words = shlex.split(command)
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=LONGEST)


def test_what_a_run_ends_with_works_when_pasted(tiny, tmp_path):
    out = run(tiny, "train.py", *TRAIN, "--out_dir=out/end").stdout
    assert "n/a" not in out and "mfu" not in out
    last = last_lines(out)
    assert (last["step"], last["curves"]) == ("6", "out/end/curves.svg")
    assert float(last["val_loss"]) > 0 and last["tokens"] == "6,144"
    shown = texts(tiny / "out/end/curves.svg")
    assert f"validation: {float(last['val_loss']):.4g}" in shown
    done = pasted(tiny, last["next"] + " --max_new_tokens=4 --device=cpu")
    assert done.returncode == 0 and done.stdout.startswith("import os"), done.stderr


def test_a_stopped_run_draws_its_curves_and_the_next_command_goes_on(tiny):
    out = "out/stopped"
    args = [str(ROOT / "config/tiny.py"), *TRAIN[1:], "--max_steps=100000", f"--out_dir={out}"]
    process = start(tiny, "train.py", *args, "--eval_every=100000", "--seed=5")
    log = tiny / out / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    last = last_lines(process.communicate(LONGEST)[0])
    n_done = int(last["step"])
    assert (tiny / out / "curves.svg").exists() and "--init_from=resume" in last["next"]
    more = f" --max_steps={n_done + 2}"
    done = pasted(tiny, last["next"] + more)
    assert done.returncode == 0, done.stderr
    assert last_lines(done.stdout)["step"] == str(n_done + 2)
    points = ET.parse(tiny / out / "curves.svg").iter(SVG + "path")
    assert f"max_steps 100000 -> {n_done + 2}" in done.stdout and len([*points]) > 4
    # A new run in its place leaves nothing of the old one's.
    run(tiny, "train.py", *TRAIN, f"--out_dir={out}", "--overwrite", "--max_steps=0")
    assert not (tiny / out / "curves.svg").exists()


def test_a_tuning_and_an_evaluation_end_alike(tiny):
    args = ["--model=out/tiny", "--dataset=tiny", "--max_steps=2", "--device=cpu"]
    args += ["--eval_examples=4", "--check_memorized=2", "--out_dir=out/end-sft"]
    out = run(tiny, "finetune.py", *args).stdout
    last = last_lines(out)
    assert last["step"] == "2" and last["curves"] == "out/end-sft/curves.svg"
    assert last["next"].endswith("sample.py --model=out/end-sft --chat")
    again = run(tiny, "finetune.py", *args, "--init_from=resume").stdout
    assert "nothing to do: out/end-sft is at its horizon (step 2)" in again
    flags = ["--model=out/end-sft", "--dataset=tiny", "--eval_tokens=512", "--device=cpu"]
    said = run(tiny, "eval.py", *flags).stdout
    assert "n/a" not in said and "_stderr" not in said
    last = last_lines(said)
    assert re.fullmatch(r"[\d.]+ ± [\d.]+", last["loss.loss"])
    assert last["results"] == "out/end-sft/results.json" and "report.py" in last["next"]
    assert pasted(tiny, last["next"]).returncode == 0
