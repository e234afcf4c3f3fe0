"""Processes that share products (--tp) or windows (--cp) compute what one computes alone."""

import pytest
from conftest import run

from barelm.context_parallel import check_tokens
from barelm.run import UserError
from barelm.tensor_parallel import check_split
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=64, n_ctx=32, n_layer=1, n_head=6, n_embd=48, n_hidden=96)


def test_two_processes_learn_what_one_learns(tmp_path):
    """Losses, norms of gradients and weights of all kinds of networks, step by step."""
    done = run(tmp_path, "tests/tensor_parallel_worker.py", "train", processes=2)
    assert "the same" in done.stdout


def test_two_processes_serve_what_one_serves(tiny):
    done = run(tiny, "tests/tensor_parallel_worker.py", "serve", processes=2)
    assert "the same" in done.stdout


def test_sample_by_two_processes(tiny):
    options = ("--model=out/tiny", "--max_new_tokens=4", "--seed=5")
    alone = run(tiny, "sample.py", *options)
    together = run(tiny, "sample.py", *options, "--tp=2", processes=2)
    assert together.stdout == alone.stdout


@pytest.mark.parametrize(
    "shape, tp, words",
    [
        ({}, 4, "--tp=4 does not divide 6 heads.*the nearest is --tp=3"),
        (dict(n_kv_head=2), 3, "the nearest is --tp=2"),
        (dict(n_kv_head=1), 3, None),  # a single head of keys is whole in each process
        (dict(qk_norm_all=True), 2, "norm over all heads"),
        (dict(n_experts=4), 2, "experts"),
    ],
)
def test_what_cannot_be_split_is_refused(shape, tp, words):
    net = GPT(GPTConfig(**SHAPE | shape))
    if words is None:
        check_split(net, tp)
        return
    with pytest.raises(UserError, match=words):
        check_split(net, tp)


@pytest.mark.parametrize("shape", [dict(causal=False), dict(mtp=1), dict(n_experts=4)])
def test_windows_that_cannot_be_shared_are_refused(shape):
    with pytest.raises(UserError, match="--cp=2"):
        check_tokens(GPTConfig(**SHAPE | shape), 2)
