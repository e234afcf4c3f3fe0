"""train.py as a user runs it: exact resume, one loss curve on any number of processes, refusals."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import LONGEST, ROOT, run, run_killed, start

import model
import train
from barelm import validation
from barelm.checkpoint import load
from barelm.resume import load_state, make_trackers
from barelm.run import Horizon, Schedule, UserError, step_seed
from barelm.safetensors import read_header
from barelm.shards import Windows

# A network and a data set for the runs below: some milliseconds a step.
SMALL = ["--dataset=words", "--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=32"]
SMALL += ["--n_hidden=64", "--seq_len=32", "--batch_tokens=512", "--warmup_steps=3", "--seed=7"]
SMALL += ["--sample_tokens=0", "--device=cpu", "--compile=false", "--eval_tokens=2048"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with data/words: 20 kB of made-up sentences, byte by byte."""
    folder, rng = tmp_path_factory.mktemp("words"), random.Random(0)
    some = ["cat", "dog", "sees", "hears", "the", "a", "old", "young", "and", "sleeps", "runs"]
    text = ".\n".join(" ".join(rng.choices(some, k=8)) for _ in range(600))
    (folder / "words.txt").write_text(text)
    run(folder, "prepare.py", "--source=words.txt", "--dataset=words", "--tokenizer=byte")
    return folder


def log(folder, out, key="loss"):
    """The log's (step, value) rows of a key, in the order of the file."""
    rows = map(json.loads, (folder / out / "log.jsonl").read_text().splitlines())
    return [(row["step"], row[key]) for row in rows if key in row]


def weights(folder, out):
    return (folder / out / "model.safetensors").read_bytes()


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)


def rows_of(path):
    return path.read_text().count("\n") if path.exists() else 0


# Exact resume


@pytest.mark.parametrize(
    "name, options",
    [
        ("plain", ["--max_steps=150", "--optimizer=muon"]),
        ("dropout", ["--max_steps=150", "--optimizer=adamw", "--dropout=0.2"]),
        ("epochs", ["--max_steps=none", "--max_epochs=4", "--dtype=bfloat16"]),
        ("compiled", ["--max_steps=115", "--compile", "--dropout=0.1", "--n_layer=1"]),
    ],
)
def test_killed_and_resumed_equals_never_stopped(words, name, options):
    options = [*options, "--save_every=20", "--eval_every=50"]
    killed = f"out/{name}-killed"
    if name != "compiled":  # which is quicker behind the others: torch keeps what it compiled
        whole = start(words, "train.py", *SMALL, *options, f"--out_dir=out/{name}")
    moment = random.Random(name).randint(45, 110)
    args = [*SMALL, *options, f"--out_dir={killed}"]
    run_killed(words, "train.py", *args, ending="step", times=moment)
    at = load_state(words / killed)["step"]
    assert at == moment // 20 * 20
    said = run(words, "train.py", *SMALL, *options, f"--out_dir={killed}", "--init_from=resume")
    assert f"resumed {killed} at step {at}" in said.stdout
    if name == "compiled":
        whole = start(words, "train.py", *SMALL, *options, f"--out_dir=out/{name}")
    assert whole.wait(LONGEST) == 0, whole.stdout.read()
    if name == "compiled":  # and compared with the eager network before it was trusted
        assert re.search(r"compile: on, after \S+; equal to eager within \S+ %\n", said.stdout)
    assert weights(words, f"out/{name}") == weights(words, killed)
    for key in ("loss", "lr", "grad_norm", "val_loss"):
        assert log(words, f"out/{name}", key) == log(words, killed, key)
    steps = [step for step, _ in log(words, killed)]
    assert steps == list(range(1, len(steps) + 1))
    assert weights(words, f"out/{name}/best") == weights(words, f"{killed}/best")


def test_killed_between_the_two_renames_of_a_save(words):
    options = [*SMALL, "--max_steps=30", "--save_every=10", "--eval_every=1000"]
    run(words, "train.py", *options, "--out_dir=out/whole")
    args = [*options, "--out_dir=out/cut"]
    run_killed(words, "train.py", *args, ending="out/cut/model.safetensors", times=2)
    cut = words / "out" / "cut"
    assert torch.load(cut / "state.pt")["step"] == 10 and (cut / "state.pt.tmp").exists()
    shutil.copytree(cut, words / "out" / "lost")
    os.truncate(words / "out" / "lost" / "state.pt.tmp", 5000)
    # Both halves of the second save are there: resumed from step 20, not from a mixture.
    said = run(words, "train.py", *options, "--out_dir=out/cut", "--init_from=resume")
    assert "at step 20" in said.stdout
    assert weights(words, "out/cut") == weights(words, "out/whole")
    # One half is lost: refused.
    said = run(words, "train.py", *options, "--out_dir=out/lost", "--init_from=resume", check=False)
    assert said.returncode == 1 and "no state.pt of the weights' step 20" in said.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(words, number, code):
    out = f"out/signal{code}"
    process = start(
        words, "train.py", *SMALL, "--max_steps=100000", "--save_every=100000", f"--out_dir={out}"
    )
    wait_for(process, lambda: rows_of(words / out / "log.jsonl") >= 20)
    process.send_signal(number)
    said = process.communicate(timeout=LONGEST)[0]
    assert process.returncode == code and "--init_from=resume goes on" in said
    step = load_state(words / out)["step"]
    assert step == len(log(words, out)) >= 20


def test_a_second_interrupt_ends_at_once(words, tmp_path):
    (tmp_path / "stop.py").write_text(
        "import time\n"
        "from barelm.run import StopSignals\n"
        "signals = StopSignals()\n"
        "print('ready', flush=True)\n"
        "while not signals.received: time.sleep(0.01)\n"
        "print('noted', signals.exit_status, flush=True)\n"
        "time.sleep(1000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, tmp_path / "stop.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted 130\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT


# Several processes


@pytest.mark.parametrize("optimizer, tolerance", [("adamw", 1e-5), ("muon", 2e-3)])
def test_two_processes_have_the_losses_of_one(words, optimizer, tolerance):
    options = [*SMALL, "--max_steps=20", f"--optimizer={optimizer}", "--dtype=float32"]
    options += ["--eval_every=10"]
    for processes in (1, 2):
        out = f"--out_dir=out/{optimizer}{processes}"
        run(words, "train.py", *options, out, processes=processes)
    for key in ("loss", "val_loss", "val_bpb"):
        one, two = (log(words, f"out/{optimizer}{n}", key) for n in (1, 2))
        assert [s for s, _ in one] == [s for s, _ in two]
        assert [v for _, v in two] == pytest.approx([v for _, v in one], abs=tolerance)
    assert len(log(words, f"out/{optimizer}2")) == 20


def test_started_on_two_resumed_on_one_goes_on_with_the_same_windows(words):
    options = [*SMALL, "--max_steps=none", "--max_epochs=1", "--optimizer=adamw", "--save_every=10"]
    run(words, "train.py", *options, "--out_dir=out/alone")
    total = len(log(words, "out/alone"))
    moved = [*options, "--out_dir=out/moved"]
    run_killed(words, "train.py", *moved, ending="moved/state.pt", processes=2)
    run(words, "train.py", *options, "--out_dir=out/moved", "--init_from=resume")
    one, two = log(words, "out/alone"), log(words, "out/moved")
    assert [s for s, _ in two] == list(range(1, total + 1))
    assert [v for _, v in two] == pytest.approx([v for _, v in one], abs=1e-5)


def children_running(word):
    """Pids of the processes that have `word` in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                command = file.read()
        except OSError:
            continue
        if word in command and "torch.distributed.run" not in command and int(pid) != os.getpid():
            found.append(int(pid))
    return found


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_signal_to_one_process_takes_the_others_along(words, which):
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(ROOT / "train.py"), *SMALL, "--max_steps=1000000", f"--out_dir=out/both-{which}"],
        cwd=words,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(process, lambda: rows_of(words / "out" / f"both-{which}" / "log.jsonl") >= 10)
    ranks = children_running(f"out/both-{which}")
    assert len(ranks) == 2
    for rank in ranks[:1] if which == "one" else ranks:
        os.kill(rank, signal.SIGTERM)
    said = process.communicate(timeout=LONGEST)[0]
    assert "stopped at step" in said
    assert load_state(words / "out" / f"both-{which}")["step"] == len(
        log(words, f"out/both-{which}")
    )


FAULT = """
import os, runpy, sys
sys.argv[0] = {script!r}
import model
forward, calls = model.GPT.forward, []
def faulty(self, ids, targets=None, **how):
    out = forward(self, ids, targets, **how)
    calls.append(1)
    return (out[0] * float("nan"), out[1]) if len(calls) > 6 and self.training else out
if os.environ.get("RANK", "0") == {rank!r}:
    model.GPT.forward = faulty
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_nan_on_one_process_is_skipped_and_stops_all(words, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULT.format(script=str(ROOT / "train.py"), rank="1"))
    done = run(
        words,
        script,
        *[*SMALL, "--max_steps=30", "--save_every=2", "--eval_every=1000", "--out_dir=out/nan"],
        processes=2,
        check=False,
    )
    assert done.returncode == 1
    assert "5 steps in a row were not finite: lower learning_rate" in done.stderr
    losses = [loss for _, loss in log(words, "out/nan")]
    assert None not in losses[:3] and losses[-5:] == [None] * 5
    net, _ = load(words / "out" / "nan")
    assert all(p.isfinite().all() for p in net.parameters())


def test_the_clock_ends_all_processes(words):
    options = ["--max_steps=none", "--max_minutes=0.03", "--out_dir=out/clock"]
    said = run(words, "train.py", *SMALL, *options, processes=2)
    steps = len(log(words, "out/clock"))
    assert re.search(rf"^step: +{steps}$", said.stdout, re.M)
    assert load_state(words / "out" / "clock")["step"] == steps


def test_sync_grads_sums_over_processes(tmp_path):
    (tmp_path / "sums.py").write_text(
        "import torch\n"
        "from barelm.run import setup, sync_grads\n"
        "run = setup('cpu')\n"
        "a, b, c = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 1))\n"
        "a.grad = torch.tensor([1.0, 2.0]) * (run.rank + 1)\n"
        "if run.rank: b.grad = torch.ones(3)\n"
        "sync_grads([a, b, c])\n"
        "line = f'{run.rank} {a.grad.tolist()} {b.grad.tolist()} {c.grad.tolist()}\\n'\n"
        "print(line, end='', flush=True)\n"
    )
    said = run(tmp_path, tmp_path / "sums.py", processes=2).stdout
    for rank in (0, 1):
        assert f"{rank} [3.0, 6.0] [1.0, 1.0, 1.0] [0.0]" in said


# What a run does


def test_validation_scores_every_position_once(words):
    options = [*SMALL, "--max_steps=5", "--eval_tokens=0", "--out_dir=out/eval"]
    run(words, "train.py", *options)
    [(_, val_loss)] = log(words, "out/eval", "val_loss")
    [(_, val_bpb)] = log(words, "out/eval", "val_bpb")
    [(_, val_ppl)] = log(words, "out/eval", "val_ppl")
    net, tok = load(words / "out" / "eval")
    tokens = np.fromfile(words / "data" / "words" / "val_000000.bin", "<u2", offset=1024)
    nll = []
    for first in range(0, len(tokens) - 1, 32):  # the last window is short
        ids = torch.tensor(tokens[first : first + 33].astype(np.int64))[None]
        with torch.no_grad():
            chances = net(ids[:, :-1]).log_softmax(-1)
        nll += (-chances.gather(2, ids[:, 1:, None]).flatten()).tolist()
    size = len(tok.decode(tokens[1:].tolist()).encode())
    assert len(nll) == len(tokens) - 1 == size
    assert val_loss == pytest.approx(sum(nll) / len(nll), abs=1e-5)
    assert val_bpb == pytest.approx(sum(nll) / size / math.log(2), abs=1e-5)
    assert val_ppl == pytest.approx(math.exp(val_loss))


def test_accumulation_and_precision(words):
    options = [*SMALL, "--max_steps=10", "--optimizer=adamw", "--eval_every=1000"]
    kinds = {
        "micro16": ["--dtype=float32"],
        "micro4": ["--dtype=float32", "--micro_batch=5"],  # 4 divides the 16 windows
        "recompute": ["--dtype=float32", "--checkpoint_blocks"],
        "bf16": ["--dtype=bfloat16"],
        "fp16": ["--dtype=float16"],
    }
    commands = [[*options, *extra, f"--out_dir=out/{name}"] for name, extra in kinds.items()]
    said = [run(words, "train.py", *command) for command in commands]
    assert "4 micro-batch(es) x 4 window(s)" in said[1].stdout
    base = dict(log(words, "out/micro16"))
    for name, tolerance in {"micro4": 1e-5, "recompute": 1e-5, "bf16": 0.02, "fp16": 0.2}.items():
        losses = dict(log(words, f"out/{name}"))
        assert losses[10] is not None and losses[10] == pytest.approx(base[10], abs=tolerance)


def test_best_is_the_lowest_validation_and_a_plain_folder(words):
    options = [*SMALL, "--max_steps=60", "--eval_every=10", "--learning_rate=0.2"]
    run(words, "train.py", *options, "--lr_schedule=linear", "--out_dir=out/best-of")
    scores = log(words, "out/best-of", "val_loss")
    best = min(scores, key=lambda row: row[1])[0]
    path = words / "out" / "best-of" / "best"
    with open(path / "model.safetensors", "rb") as file:
        assert read_header(path, file)[1]["step"] == str(best)
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors"]
        + ["tokenizer.json", "tokenizer_config.json"]
    )


def test_starts_from_a_folder_and_overwrites_only_when_told(words):
    options = [*SMALL, "--max_steps=40", "--eval_every=40"]
    run(words, "train.py", *options, "--out_dir=out/base")
    again = run(words, "train.py", *options, "--out_dir=out/base", check=False)
    assert again.returncode == 1 and "--overwrite replaces it" in again.stderr
    run(words, "train.py", *options, "--out_dir=out/next", "--init_from=out/base", "--max_steps=2")
    (_, last), (_, first) = log(words, "out/base")[-1], log(words, "out/next")[0]
    assert first == pytest.approx(last, abs=0.3)
    run(words, "train.py", *options, "--out_dir=out/next", "--overwrite", "--max_steps=3")
    assert len(log(words, "out/next")) == 3 and log(words, "out/next")[0][1] > 4
    more = ["--out_dir=out/next", "--init_from=auto", "--max_steps=5", "--learning_rate=0.001"]
    run(words, "train.py", *options, *more, "--lr_schedule=trapezoid", "--decay_fraction=0")
    assert len(log(words, "out/next")) == 5
    assert log(words, "out/next", "lr")[-1] == (5, 0.001)  # the new learning rate, not the old
    record = json.loads((words / "out" / "next" / "run.json").read_text())
    assert record["config"]["max_steps"] == 5 and record["versions"]["torch"] == torch.__version__


REFUSALS = {
    "n_layer=5, but out/held has 2: leave it out": ["--init_from=out/held", "--n_layer=5"],
    "stride=-1: expected 0 or more": ["--stride=-1"],
    "beta2=1.0: expected 0 or more, and less than 1": ["--beta2=1"],
    "decay_fraction=-1.0: expected 0 or more": ["--decay_fraction=-1"],
    "no checkpoint to resume": ["--init_from=resume"],
    "no resume with another n_layer": ["--init_from=resume", "--out_dir=out/held", "--n_layer=3"],
    "another seed, optimizer": ["--init_from=resume", "--out_dir=out/held", "--seed=8"]
    + ["--optimizer=adamw"],
    "--overwrite replaces it": ["--out_dir=out/held"],
    "no such folder": ["--init_from=out/nowhere"],
    "python prepare.py --source=... --dataset=nothing": ["--dataset=nothing"],
    "config/tiny.py --dataset=nothing first": ["config/tiny.py", "--dataset=nothing"],
    "such as 480 or 512": ["--batch_tokens=500"],
    "lr_schedule=cubic: expected": ["--lr_schedule=cubic"],
    "no horizon": ["--max_steps=none"],
    "eval_every=0: expected 1 or more": ["--eval_every=0"],
    "micro_batch=-1: expected 0 or more": ["--micro_batch=-1"],
    "learning_rate=inf: expected 0 or more": ["--learning_rate=1e400"],
    "norm_eps=inf: expected": ["--norm_eps=1e400"],
    "rope_theta=-1.0: expected": ["--rope_theta=-1"],
    "teach the router nothing": ["--n_experts=4", "--n_experts_per_token=1"],
    "lower --seq_len": ["--seq_len=32768", "--batch_tokens=32768"],
    "have different tokenizers": ["--init_from=out/held", "--dataset=letters"],
}


def test_refusals_are_one_line(words):
    letters = ["--source=words.txt", "--dataset=letters", "--tokenizer=char"]
    run(words, "prepare.py", *letters)
    run(words, "train.py", *SMALL, "--max_steps=2", "--out_dir=out/held")
    commands = [[*SMALL, "--out_dir=out/none", *options] for options in REFUSALS.values()]
    for message, command in zip(REFUSALS, commands):
        said = run(words, "train.py", *command, check=False)
        assert said.returncode == 1, (message, said.stdout)
        assert message in said.stderr and said.stderr.count("\n") == 1


@pytest.mark.parametrize("name, key", [("tensorboard", "tensorboard"), ("wandb", "wandb_project")])
def test_a_tracker_that_is_missing_is_a_line(name, key, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"{name} is not installed: pip install {name}"):
        make_trackers("out/none", {}, **{key: "x"})


def test_tensorboard_gets_the_log(words):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(words, "train.py", *SMALL, "--max_steps=3", "--tensorboard", "--out_dir=out/board")
    events = reader.EventAccumulator(str(words / "out/board"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = log(words, "out/board")
    assert [step for step, _ in told] == [step for step, _ in expected]
    values = [value for _, value in expected]
    assert [value for _, value in told] == pytest.approx(values, rel=1e-5)


def test_a_shard_cut_short_is_refused(words):
    shutil.copytree(words / "data" / "words", words / "data" / "short")
    os.truncate(words / "data" / "short" / "train_000000.bin", 5000)
    said = run(words, "train.py", *SMALL, "--dataset=short", "--out_dir=out/none", check=False)
    assert said.returncode == 1 and "train_000000.bin: cut short" in said.stderr


def test_a_shard_of_another_vocabulary_is_refused(words):
    folder = shutil.copytree(words / "data" / "words", words / "data" / "other")
    path = folder / "train_000000.bin"
    data = np.fromfile(path, "<u2")
    data[512:] = 60_000  # every token
    data.tofile(path)
    said = run(words, "train.py", *SMALL, "--dataset=other", "--out_dir=out/none", check=False)
    assert said.returncode == 1 and said.stderr.count("\n") == 1
    assert "train_000000.bin: token 60000, but the tokenizer has" in said.stderr


def test_out_of_memory_names_what_to_change(words):
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    options = ["--batch_tokens=524288", "--micro_batch=16384", "--out_dir=out/none"]
    said = run(words, "train.py", *SMALL, *options, check=False, preexec_fn=limit)
    assert said.returncode == 1
    for word in ("micro_batch (now 16384)", "seq_len (now 32)", "checkpoint_blocks (now False)"):
        assert word in said.stderr


# Functions


def test_every_window_comes_once_an_epoch_on_any_number_of_processes(words):
    shards = sorted((words / "data" / "words").glob("train_*.bin"))
    windows = Windows(shards, 32, seed=3)
    n = windows.n
    assert n == (len(windows.shards[0]) - 1) // 32
    epochs = [[windows.at(e * n + i) for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(n))
    assert [Windows(shards, 32, seed=3).at(i) for i in range(n)] == epochs[0]
    assert [Windows(shards, 32, seed=4).at(i) for i in range(n)] != epochs[0]
    ids, targets = windows.batch([0, 5], torch.device("cpu"))
    raw = np.fromfile(shards[0], "<u2", offset=1024)
    assert ids[1].tolist() == raw[160:192].tolist() and targets[1].tolist() == raw[161:193].tolist()


@pytest.mark.parametrize("name", ["cosine", "linear", "trapezoid", "constant"])
def test_schedules_equal_their_formulas(name):
    schedule = Schedule(name, warmup_steps=10, min_lr=0.1, decay_fraction=0.25)
    for step, p in ((0, 0.0), (4, 0.02), (9, 0.05), (50, 0.3), (75, 0.75), (90, 0.9), (99, 1.0)):
        fall = {
            "cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * p)),
            "linear": 0.1 + 0.9 * (1 - p),
            "trapezoid": 1.0 if p <= 0.75 else 0.1 + 0.9 * (1 - p) / 0.25,
            "constant": 1.0,
        }[name]
        warm = (step + 1) / 10 if step < 10 else 1
        assert schedule.scale(step, p) == pytest.approx(warm * fall)
        # Behind a warm-up that took a fifth of the run, the fall has what is left.
        if p >= 0.2 and name in ("cosine", "linear"):
            late = schedule.scale(step, p, warm_end=0.2)
            assert late == pytest.approx(schedule.scale(step, (p - 0.2) / 0.8))


def test_the_first_horizon_reached_ends_the_run():
    horizon = Horizon(max_steps=10, max_tokens=1000, max_epochs=2.0, max_minutes=1.0)
    assert horizon.progress(5, 100, 0.5, 6.0) == 0.5
    assert horizon.progress(1, 900, 0.9, 6.0) == 0.9
    assert horizon.progress(1, 300, 1.5, 6.0) == 0.75
    assert horizon.progress(1, 100, 0.5, 59.0) == pytest.approx(59 / 60)
    assert horizon.progress(30, 100, 0.5, 6.0) == 1.0
    assert Horizon(max_epochs=4.0).progress(30, 100, 1.0, 6.0) == 0.25
    assert Horizon(max_steps=0, max_epochs=4.0).progress() == 1.0


def test_any_seed_is_one_of_torch():
    for seed in (0, 7, 2**40, 10**18):
        torch.manual_seed(step_seed(seed, 12, 3))
    assert step_seed(7, 12, 3) == (7 * 1_000_003 + 12) * 65_537 + 3


def test_a_limit_that_never_comes_is_told():
    assert Horizon(max_steps=300).notes(4096, 1_000_000) == []
    assert Horizon(max_steps=300, max_epochs=1.0).notes(4096, 1_000_000) == []  # 244 steps
    [note] = Horizon(max_steps=300, max_epochs=4.0).notes(4096, 1_000_000)
    assert "max_steps=300 ends the run before max_epochs=4.0 does, which would be 977" in note
    [note] = Horizon(max_steps=10, max_tokens=409_600).notes(4096, 1_000_000)
    assert "before max_tokens=409600" in note and "100 steps" in note


def test_remarks_name_what_happens():
    remarks = partial(validation.remarks, train.keys())
    rising = [[1, 2.0, 2.0], [2, 1.5, 2.1], [3, 1.0, 2.2]]
    assert "over-fitting" in remarks(rising)[0]
    assert "explodes" in remarks([[1, 2.0, 2.0], [2, 2.0, 2.0], [3, 5.0, 5.0]])[0]
    assert "plateau" in remarks([[1, 2.0, 2.0], [2, 2.0, 2.001], [3, 2.0, 2.0]])[0]
    assert remarks([[1, 3.0, 3.0], [2, 2.5, 2.6], [3, 2.0, 2.3]]) == []
    # An explosion is said at once, and of a run that never was below guessing.
    assert "explodes" in remarks([[1, 2.0, 2.0], [2, 5.0, 5.0]])[0]
    assert "ln(vocabulary)" in remarks([[1, 9.0, 9.0]], math.log(256))[0]
    assert "ln(vocabulary)" in remarks([[1, 9.0, math.nan]], math.log(256))[0]
    assert remarks([[1, 5.54, 5.55]], math.log(256)) == []  # ln 256 is 5.545
    for advice in ("learning_rate", "warmup_steps", "optimizer"):
        assert advice in remarks([[1, 2.0, 2.0], [2, 2.0, 2.001], [3, 2.0, 2.0]])[0]


@pytest.mark.parametrize("horizon", ["--max_epochs=3", "--max_minutes=1"])
def test_no_step_writes_the_untrained_model(words, horizon):
    out = f"out/untrained{len(horizon)}"
    done = run(words, "train.py", *SMALL, "--max_steps=0", horizon, f"--out_dir={out}")
    assert f"wrote {out}, as it is before the first step" in done.stdout
    assert "warmup_steps" not in done.stdout
    net, tok = load(words / out)
    torch.manual_seed(7)  # as --seed of SMALL
    untrained = model.GPT(net.config)
    for name, p in untrained.state_dict().items():
        assert torch.equal(net.state_dict()[name], p), name
    run(words, "train.py", *SMALL, "--max_steps=2", f"--out_dir={out}", "--init_from=resume")
    run(words, "train.py", *SMALL, "--max_steps=2", f"--out_dir={out}-at-once")
    assert weights(words, out) == weights(words, f"{out}-at-once")


def test_a_resume_in_the_last_of_a_schedule_may_move_nothing(words):
    out = ["--out_dir=out/last", "--lr_schedule=cosine"]
    run(words, "train.py", *SMALL, *out, "--max_steps=4")
    state = torch.load(words / "out/last/state.pt", weights_only=True)
    n = Windows(sorted((words / "data/words").glob("train_*.bin")), 32).n
    epochs = state["windows"] / n * (1 + 1e-10)  # of which the present step is all but the whole
    horizon = ["--max_steps=none", f"--max_epochs={epochs!r}", "--init_from=resume"]
    done = run(words, "train.py", *SMALL, *out, *horizon)
    assert re.search(r"^step: +5$", done.stdout, re.M)


def test_no_step_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(train, "max_steps", 0)
    net = model.GPT(model.GPTConfig(64, 8, 1, 2, 16))
    assert train.flops_of_run(net, 10**9) == 0  # a resume of it decides anew, by its horizon
    monkeypatch.setattr(train, "max_steps", 10**9)
    assert train.flops_of_run(net, 10**9) > train.COMPILE_FLOPS


def test_two_machines_have_the_curve_of_one_process(words):
    """Two launchers, as on two machines that share a folder (docs/scale.md)."""
    options = [*SMALL, "--max_steps=6", "--eval_every=3"]
    run(words, "train.py", *options, "--out_dir=out/one-machine")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launch += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [*launch, f"--node_rank={rank}", str(ROOT / "train.py"), *options]
            + ["--out_dir=out/two-machines"],
            cwd=words,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [machine.communicate(timeout=LONGEST)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "2 process(es)" in said[0] and "step 6" not in said[1]  # the first one speaks
    for key in ("loss", "val_loss"):
        one, two = (log(words, f"out/{name}", key) for name in ("one-machine", "two-machines"))
        assert len(one) == len(two) > 0
        for (step, a), (other_step, b) in zip(one, two):
            assert step == other_step and abs(a - b) < 1e-3 * a
