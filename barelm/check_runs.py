"""Do whole runs agree here? train.py killed and resumed, on two processes, with a network that two
divide; in a folder of its own with data that is made up."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from barelm import HERE, SCRIPTS, host
from barelm.bpe import bpe_tokenizer
from barelm.check_rows import Finding, Skip, Worst, allowed_error, rounding
from barelm.files import write_json
from barelm.safetensors import read_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from subprocess import Popen

    from torch import Tensor

    from barelm.check_rows import Place

STEPS = 20
SAVED = 10  # the step behind which a run is killed
SETTINGS: dict = dict(dataset="made_up", n_layer=2, n_head=4, n_kv_head=2, n_embd=128, n_hidden=128)
SETTINGS |= dict(seq_len=32, batch_tokens=512, micro_batch=4, dropout=0.1, warmup_steps=2)
SETTINGS |= dict(max_steps=STEPS, save_every=SAVED, eval_every=1000, eval_tokens=512)
SETTINGS |= dict(sample_tokens=0, compile="false")
# Runs a script that kills itself, as no signal from outside could at so certain a point: when it
# has renamed state.pt, the last file of a save, to its name.
KILLED = """
import os, runpy, signal, sys
rename = os.replace
def replace(a, b):
    rename(a, b)
    if str(b).endswith("state.pt"):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
os.replace = replace
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_dataset(folder: Path) -> None:
    """A dataset of 20,000 tokens, as prepare.py would write it: words of letters, drawn at random
    from a few, so that there is something to learn."""
    draw = np.random.default_rng(0)
    words = draw.integers(97, 123, (50, 5))  # ids of bytes are their values' order; any will do
    tokens = words[draw.integers(0, 50, 4000)].ravel()  # (20000,)
    tok = bpe_tokenizer([])
    folder.mkdir(parents=True)
    for split, ids in {"train": tokens[2000:], "val": tokens[:2000]}.items():
        header = np.array([20240520, 1, len(ids), *[0] * 253], "<i4")
        path = folder / f"{split}_000000.bin"
        path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    begin, end = tok.document_layout
    write_json(folder / "tokenizer.json", tok.spec)
    write_json(folder / "tokenizer_config.json", tok.config)
    write_json(folder / "meta.json", {"document": {"begin": begin, "end": end}})


def flags(place: Place, **settings: Any) -> list[str]:
    """The command line of a run on the place's device in its dtype."""
    here = dict(device=str(place.device), dtype=place.dtype_name)
    return [f"--{key}={value}" for key, value in (SETTINGS | here | settings).items()]


def start(folder: Path, place: Place, ranks: dict | None = None, code: str | None = None,
          **settings: Any) -> Popen:  # fmt: skip
    """Start train.py in a folder, on the place's device in its dtype: a Popen. ranks: torchrun's
    variables of one of several processes. code: a program that runs the script."""
    command = [sys.executable, *(["-c", code] if code else []), str(SCRIPTS / "train.py")]
    command += flags(place, **settings)
    ours = os.pathsep.join([str(SCRIPTS), str(HERE.parent)])
    environment = os.environ | {"PYTHONPATH": ours} | (ranks or {})
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output |= dict(encoding="utf-8", errors="replace")
    return subprocess.Popen(command, cwd=folder, env=environment, **output)


LONGEST_RUN = 120.0  # seconds of a run of train.py


def finish(process: Popen, expected: int = 0) -> None:
    """Wait for a Popen, and raise what it said last where its exit status is not the expected."""
    try:
        output, _ = process.communicate(timeout=LONGEST_RUN)
    finally:
        process.kill()  # which a process that has ended does not feel
    if process.returncode != expected:
        last = (output.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"train.py: exit status {process.returncode}: {last}")


def weights(folder: Path, run: str) -> Tensor:
    """All weights of a run's checkpoint, one after the other (N,) float64."""
    tensors, _ = read_safetensors(folder / "out" / run / "model.safetensors")
    return torch.cat([t.flatten().double() for t in tensors.values()])


# --------------------------------------------------------------------------------------------------
# Killed and resumed


def check_resume(place: Place, make_runs: Callable | None = None) -> Iterator[Finding]:
    """A run of STEPS steps against one that was killed after its save at SAVED and resumed. On a
    CPU the weights are the same bits. On a GPU sums are made in any order: there the difference is
    a small part of what the steps since the kill moved. make_runs(folder, place) makes out/whole
    and out/interrupted, and returns the weights that the latter had when it was killed."""
    make_runs = make_runs or whole_and_interrupted
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_dataset(folder / "data" / SETTINGS["dataset"])
        saved = make_runs(folder, place)
        whole = weights(folder, "whole")
        resumed = weights(folder, "interrupted")
    difference = (whole - resumed).norm().item()
    moved = (whole - saved).norm().item()
    differing = int((whole != resumed).sum())
    words = f"{differing:,} of {len(whole):,} weights differ; steps {SAVED} to {STEPS}"
    if moved == 0:
        yield Finding("difference, of what moved", math.inf, 0.0, f"{words} moved none")
        return
    allowed = 0.0 if place.device.type == "cpu" else math.sqrt(rounding(place.dtype))
    yield Finding("difference, of what moved", difference / moved, allowed, words)


def whole_and_interrupted(folder: Path, place: Place) -> Tensor:
    """The two runs of check_resume, at the same time."""
    whole = start(folder, place, out_dir="out/whole")
    try:
        killed = start(folder, place, code=KILLED, out_dir="out/interrupted")
        finish(killed, expected=host.KILLED)
        saved = weights(folder, "interrupted")
        finish(start(folder, place, out_dir="out/interrupted", init_from="resume"))
        finish(whole)
    finally:
        whole.kill()
    return saved


# --------------------------------------------------------------------------------------------------
# Two processes

# Each process draws its own dropout, and rounding grows from step to step.
WITHOUT_CHANCE: dict = dict(dropout=0.0, max_steps=8, dtype="float32")


def check_processes(place: Place, make_runs: Callable | None = None) -> Iterator[Finding]:
    """The losses and gradient norms of two processes against those of one, of the same batches, in
    float32. make_runs(folder, place) makes out/one and out/two."""
    if place.is_cuda and torch.cuda.device_count() < 2:
        raise Skip("one GPU only")
    make_runs = make_runs or one_and_two
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_dataset(folder / "data" / SETTINGS["dataset"])
        make_runs(folder, place)
        rows = [log_rows(folder / "out" / run / "log.jsonl") for run in ("one", "two")]
    for key, title in (("loss", "losses"), ("grad_norm", "gradient norms")):
        yield compared(rows, key, title)


# How two processes divide a network, beside the windows.
WAYS: dict[str, dict] = {
    "fsdp": dict(parallel="fsdp"),
    "tensor": dict(tp=2),
    "pipeline": dict(pp=2),
    "context": dict(cp=2),
}


def check_parts(place: Place, make_runs: Callable | None = None) -> Iterator[Finding]:
    """The losses and gradient norms of a network that two processes divide, in each of WAYS,
    against those of one process. make_runs(folder, place) makes out/one and out/WAY."""
    if place.is_cuda and torch.cuda.device_count() < 2:
        raise Skip("one GPU only")
    make_runs = make_runs or one_and_parts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_dataset(folder / "data" / SETTINGS["dataset"])
        make_runs(folder, place)
        one = log_rows(folder / "out" / "one" / "log.jsonl")
        for way in WAYS:
            rows = one, log_rows(folder / "out" / way / "log.jsonl")
            yield compared(rows, "loss", f"{way}: losses")
            yield compared(rows, "grad_norm", f"{way}: gradient norms")


def compared(runs: Sequence[list[dict[str, float | None]]], key: str, title: str) -> Finding:
    """The Finding of two runs' figures, step by step: the worst ratio, less 1."""
    # A step's update is rounded, and the next one begins there.
    allowed = allowed_error(torch.float32, SETTINGS["batch_tokens"], layers=8)
    worst = Worst()
    for one, two in zip(*runs):
        worst.add(abs(two[key] / one[key] - 1), f"step {one['step']}, {one[key]:.5f}")
    if len(runs[0]) != len(runs[1]) or not runs[0]:
        worst.add(math.inf, f"{len(runs[0])} and {len(runs[1])} steps")
    return worst.finding(title, allowed)


def one_and_parts(folder: Path, place: Place) -> None:
    """The runs of check_parts, one behind the other."""
    settings: dict = WITHOUT_CHANCE | {"max_steps": 4, "micro_batch": 2}
    run_together([start(folder, place, out_dir="out/one", **settings)])
    for way, keys in WAYS.items():
        ranks = two_ranks()
        out = f"out/{way}"
        run_together(
            [start(folder, place, rank, out_dir=out, **settings, **keys) for rank in ranks]
        )


def run_together(processes: list) -> None:
    """Wait for Popens; where one fails all end."""
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()


def one_and_two(folder: Path, place: Place) -> None:
    """The runs of check_processes, all three processes at the same time."""
    processes = [start(folder, place, out_dir="out/one", **WITHOUT_CHANCE)]
    for ranks in two_ranks():
        processes.append(start(folder, place, ranks, out_dir="out/two", **WITHOUT_CHANCE))
    run_together(processes)


def two_ranks() -> list[dict]:
    """What torchrun tells each of two processes, in their environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank in ("0", "1"):
        ranks.append(place | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"})
    return ranks


def log_rows(path: Path) -> list[dict[str, float | None]]:
    """The rows of training steps in a log."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if "grad_norm" in row]
