"""Pipeline parallelism: which stage has which blocks, and that stages learn as one process does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from barelm.pipeline import (
    keep_stage,
    refuse_pipeline,
    shared_names,
)
from barelm.run import UserError
from barelm.stages import block_costs, head_cost, split_blocks, stages_of
from model import GPT, GPTConfig

WORKER = Path(__file__).parent / "pipeline_worker.py"


def shape(**more):
    return GPTConfig(**(dict(vocab_size=64, n_ctx=32, n_layer=4, n_head=2, n_embd=32) | more))


def slowest(stages, costs, last_cost):
    sums = [sum(costs[begin:end]) for begin, end in stages]
    sums[-1] += last_cost
    return max(sums)


def all_splits(n_blocks, n_stages):
    """Every way to divide blocks into stages of one at least."""
    if n_stages == 1:
        return [[(0, n_blocks)]]
    ways = []
    for begin in range(n_stages - 1, n_blocks):
        for way in all_splits(begin, n_stages - 1):
            ways.append([*way, (begin, n_blocks)])
    return ways


@pytest.mark.parametrize("n_stages", [1, 2, 3, 5])
def test_split_is_the_best_of_all(n_stages):
    generator = torch.Generator().manual_seed(n_stages)
    for last_cost in (0.0, 1.5, 20.0):
        costs = torch.rand(7, generator=generator).tolist()
        stages = split_blocks(tuple(costs), n_stages, last_cost)
        assert [begin for begin, _ in stages] == [0] + [end for _, end in stages[:-1]]
        assert stages[-1][1] == 7
        best = min(slowest(way, costs, last_cost) for way in all_splits(7, n_stages))
        assert slowest(stages, costs, last_cost) == pytest.approx(best)


def test_a_large_head_leaves_its_stage_fewer_blocks():
    assert stages_of(shape(n_layer=8), 2) == [(0, 4), (4, 8)]
    c = shape(n_layer=8, vocab_size=2048)
    assert head_cost(c, 32) > 2 * block_costs(c, 32)[0]
    [first, last] = stages_of(c, 2)
    assert first[1] - first[0] > last[1] - last[0]


@pytest.mark.parametrize("more", [{}, {"tie": False}, {"pos": "relative"}, {"mtp": 1}])
def test_stages_have_the_whole_by_its_names(more):
    """Each parameter is on one stage, or on those that `shared_names` says."""
    c = shape(**more)
    whole = GPT(c)
    holders = {}
    for index in range(3):
        torch.manual_seed(0)
        for name, p in keep_stage(GPT(c), index, 3).named_parameters():
            holders.setdefault(name, []).append(index)
            assert p.shape == whole.get_parameter(name).shape
    shared = shared_names(c, 3)
    assert set(holders) == {name for name, _ in whole.named_parameters()}
    for name, stages in holders.items():
        assert len(stages) == 1 or stages == shared[name]


def test_refusals():
    with pytest.raises(UserError, match="--pp=5: the network has 4 blocks: --pp=4"):
        refuse_pipeline(shape(), 5)
    with pytest.raises(UserError, match="encoder"):
        refuse_pipeline(shape(n_encoder_layer=2), 2)
    with pytest.raises(UserError, match="deterministic"):
        refuse_pipeline(shape(), 2, deterministic=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")
def test_stages_learn_what_one_process_does():
    """With copies and experts, with FSDP, with tensor parallelism, and four stages."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    command = [sys.executable, str(WORKER), "ddp", "fsdp", "tp", "four"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    worker = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    try:
        output, _ = worker.communicate(timeout=600)  # against a hang alone
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
    assert worker.returncode == 0, output
    assert output.count("from one process") == 4, output
