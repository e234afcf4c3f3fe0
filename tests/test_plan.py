"""report.py --plan with a mesh: bytes that processes hold and send, seconds, failures."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

from barelm.footprint import (
    Step,
    footprint,
    parts_of,
    planned_shapes,
    shapes_of,
    total_bytes,
    windows_that_fit,
)
from barelm.goodput import best_interval, daly, goodput, simulate, young
from barelm.mesh import Sizes
from barelm.plan import Hardware, best_step, grids, step_seconds
from barelm.published import runs
from barelm.run import UserError
from barelm.scaling import empty_network
from barelm.traffic import describe, ring_gather, ring_sum, transfers
from config import script_keys
from model import GPTConfig

SHAPE = dict(vocab_size=512, n_ctx=64, n_layer=5, n_head=4, n_kv_head=2, n_embd=64, n_hidden=192)
ANY = {"parallel": None, "tp": None, "pp": None, "cp": None}


def step_on(sizes, **options):
    config = GPTConfig(**SHAPE)
    return Step(config, sizes, shapes_of(empty_network(config)), 64, **options)


# --------------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize(
    "sizes", [Sizes(tp=2), Sizes(shard=2, tp=2), Sizes(pp=2), Sizes(pp=5, shard=2)]
)
def test_all_parts_together_are_the_network(sizes):
    step = step_on(sizes)
    held = {}  # name: numbers, over the stages
    for stage in range(sizes.pp):
        for part in parts_of(step, stage):
            held.setdefault(part.name, []).append(part.numel)
    for name, shape in step.shapes:
        numel = math.prod(shape)
        is_cut = name.endswith(("proj.weight", "embed_tokens.weight"))
        ways = sizes.shard * (sizes.tp if is_cut else 1)
        copies = 2 if name.startswith("model.embed") and sizes.pp > 1 else 1  # tied to the head
        assert held[name] == [numel // ways] * copies


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_ring_sends_what_is_counted(n):
    """Each process sends a piece to its neighbour, 2 (n - 1) times until all have all sums."""
    size = 24
    values = [[float(i * 7 + j) for j in range(size)] for i in range(n)]
    total = [sum(column) for column in zip(*values)]
    each = size // n
    sent = [0] * n
    for round_number in range(2 * (n - 1)):
        is_sum = round_number < n - 1
        moving = []
        for i in range(n):
            piece = (i - round_number + (0 if is_sum else 1 - n + n)) % n
            if not is_sum:
                piece = (i - round_number + n) % n
            moving.append((i, piece, values[i][piece * each : (piece + 1) * each]))
        for i, piece, numbers in moving:
            sent[i] += len(numbers)
            to = values[(i + 1) % n]
            for k, number in enumerate(numbers):
                place = piece * each + k
                to[place] = to[place] + number if is_sum else number
    assert values == [total] * n
    assert sent == [ring_sum(n, size)] * n == [2 * ring_gather(n, size)] * n


def test_what_travels_is_counted_by_hand():
    C, T, rows = 64, 64, 2
    options = dict(rows=rows, n_micro=3, dtype=torch.float32, local_world=8)
    n = sum(math.prod(shape) for _, shape in step_on(Sizes()).shapes)
    sent = transfers(step_on(Sizes(replica=4), **options))
    assert sent["gradients"].sent == 2 * 3 / 4 * 4 * n
    assert "weights" not in sent
    embedding = 512 * C
    norms = C
    blocks = n - embedding - norms
    sent = transfers(step_on(Sizes(shard=4), **options))
    assert sent["weights"].sent == 3 * 3 / 4 * (2 * 4 * blocks + 4 * (embedding + norms))
    assert sent["gradient parts"].sent == 3 * 3 / 4 * 4 * n
    x = rows * T * C * 4
    sent = transfers(step_on(Sizes(tp=2), **options))
    assert sent["tensor"].sent == 3 * (4 * 5 + 2) * 2 * 1 / 2 * x
    sent = transfers(step_on(Sizes(pp=2), **options))
    assert sent["pipeline"].sent == 2 * 3 * x
    sent = transfers(step_on(Sizes(shard=2, cp=2), **options))
    own = rows * T // 2 * 2 * 2 * 16 * 4  # keys and values of 2 heads of 16
    assert sent["context"].sent == 3 * 2 * 5 * own


def test_the_mesh_in_words_says_who_holds_what():
    words = "\n".join(describe(step_on(Sizes(pp=2, replica=2, shard=2, tp=2, cp=2)), 10e9))
    for begin in (
        "pipeline: 2 stages",
        "copies: ranks 0, 4",
        "parts: ranks 0, 2",
        "tensor: ranks 0, 1",
    ):
        assert begin in words
    for what in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "at 10 GB/s",
        "context: ranks",
    ):
        assert what in words
    assert len(describe(step_on(Sizes()))) == 1


def test_as_many_windows_as_the_bytes_allow():
    step = step_on(Sizes(shard=2), device_type="cpu", dtype=torch.float32)
    for budget in (6e6, 3e7):
        rows = windows_that_fit(step, budget)
        assert total_bytes(footprint(replace(step, rows=rows))) <= budget
        assert total_bytes(footprint(replace(step, rows=rows + 1))) > budget
    assert windows_that_fit(step, 1000) == 0


@pytest.mark.parametrize(
    "more", [{}, dict(n_experts=4, expert_layers="DE"), dict(tie=False, mtp=1)]
)
def test_shapes_are_those_of_the_network(more):
    config = GPTConfig(**SHAPE | more)
    assert dict(planned_shapes(config)) == dict(shapes_of(empty_network(config)))


MESHES = ["ddp:adamw", "fsdp:adamw"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes over gloo")
def test_measured_bytes_are_those_of_the_estimate():
    meshes = [*MESHES]
    if (ROOT / "barelm/tensor_parallel.py").exists():
        meshes.append("tp:adamw")
    if "zero" in script_keys(ROOT / "train.py"):
        meshes.append("zero:adamw")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(__file__).with_name("memory_worker.py")), *meshes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(rows) == len(meshes)
    for row in rows:
        assert row["estimated"] == pytest.approx(row["measured"], 0.1), row


# --------------------------------------------------------------------------------------------------
# Seconds


def test_published_runs_took_as_long_as_planned():
    checked = runs()
    for published in checked:
        assert published.ours() == pytest.approx(published.seconds, 0.15), published.name
    assert len({published.source for published in checked}) >= 5


def test_the_best_mesh_fits_and_no_other_that_fits_is_much_faster():
    config = GPTConfig(vocab_size=32000, n_ctx=2048, n_layer=24, n_head=16, n_embd=2048)
    shapes = shapes_of(empty_network(config))
    a100 = Hardware.of("A100")
    step = best_step(config, shapes, a100, 16, 8, 256, 2048, ANY)
    assert total_bytes(footprint(step)) < a100.memory
    seconds = sum(step_seconds(step, a100).values())
    assert step.sizes.world == 16 and step.rows * step.n_micro * step.sizes.data == 256
    for wanted in ({"parallel": "fsdp"}, {"tp": 2}):
        other = best_step(config, shapes, a100, 16, 8, 256, 2048, ANY | wanted)
        assert sum(step_seconds(other, a100).values()) > 0.96 * seconds
        for key, value in wanted.items():
            if key != "parallel":
                assert getattr(other.sizes, key) == value
    with pytest.raises(UserError, match="no mesh of 1 RTX 4090 holds it: the smallest takes"):
        best_step(config, shapes, Hardware.of("RTX 4090"), 1, 1, 256, 2048, ANY)


def test_grids_multiply_to_the_devices():
    config = GPTConfig(**SHAPE)
    found = grids(config, 32, 8, 64, ANY)
    assert {sizes.world for sizes, _ in found} == {32}
    assert {sizes.tp for sizes, _ in found} == {1, 2}  # two heads of keys and values
    assert all(sizes.pp <= 5 for sizes, _ in found)


# --------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize(
    "mtbf, save, restart", [(3600, 60, 300), (3 * 3600, 30, 600), (1e5, 5, 60)]
)
def test_simulated_failures_leave_what_the_formula_says(mtbf, save, restart):
    best = best_interval(mtbf, save, restart)
    assert simulate(best, mtbf, save, restart) == pytest.approx(
        goodput(best, mtbf, save, restart), abs=0.01
    )
    assert daly(mtbf, save) == pytest.approx(best, rel=0.03)
    assert daly(mtbf, save) <= young(mtbf, save)
    for factor in (0.3, 3):
        assert simulate(best * factor, mtbf, save, restart) < simulate(best, mtbf, save, restart)


def test_without_failures_only_saves_cost():
    assert goodput(100, 1e12, 25, 60) == pytest.approx(0.8)
    assert goodput(1e6, 60, 1, 1) == 0


# --------------------------------------------------------------------------------------------------
# report.py


def test_a_plan_with_a_mesh_is_a_recipe(tmp_path):
    flags = ["--plan", "--params=7e9", "--tokens=140e9", "--devices=64", "--nodes=8", "--price=2"]
    text = run(tmp_path, "report.py", *flags).stdout
    values = {}
    exec(text, values)
    known = script_keys(ROOT / "train.py")
    assert [key for key in values if key not in known and not key.startswith("__")] == []
    for word in ("# mesh: ", "# bytes of a device: ", "# on the wire, ", "MFU ", "# failures: "):
        assert word in text
    cost, hours = re.search(r"# cost: ([\d,.]+) = ([\d,.]+) device-hours x 2", text).groups()
    assert float(cost.replace(",", "")) == pytest.approx(2 * float(hours.replace(",", "")), abs=0.1)
    assert values["parallel"] in ("fsdp", "hsdp")  # 7e9 parameters do not fit whole


@pytest.mark.parametrize("flags, words", [
    (["--nodes=7"], "nodes=7: so many machines do not have 64 devices"),
    (["--nodes=8", "--batch_tokens=1000"], "batch_tokens=1000: expected a multiple of 2048: 2048"),
    (["--nodes=8", "--tp=3"], "no mesh of 64 devices"),
])  # fmt: skip
def test_meshes_that_cannot_be_are_refused(tmp_path, flags, words):
    plan = ["--plan", "--params=7e9", "--tokens=1e9", "--devices=64"]
    done = run(tmp_path, "report.py", *plan, *flags, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert words in done.stderr
