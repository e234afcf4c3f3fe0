"""barelm/diagram.py: every tensor is in the diagram once, and what a token costs is what torch's
counter of FLOPs counts."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from barelm.diagram import diagram, parts_of, periods
from barelm.optim import flops_per_token, n_params
from barelm.page import model_parts
from model import GPT, GPTConfig

SMALL = dict(vocab_size=96, n_ctx=16, n_layer=4, n_head=4, n_embd=32, n_kv_head=2)
NETWORKS = {
    "qwen3": {},
    "gpt2": dict(norm="layer", pos="learned", mlp="gelu", bias=True, qk_norm=False, n_kv_head=4),
    "untied, windows": dict(tie=False, window=4, layers="SL", sinks=True),
    "windows that do not repeat": dict(window=4, layers="SSL", norm_place="both"),
    "experts": dict(n_experts=4, n_shared_experts=1, expert_layers="DE", expert_hidden=24),
    "encoder": dict(
        causal=False, norm_place="post", mlm_head=True, norm="layer", bias=True, n_types=2
    ),
    "encoder-decoder": dict(n_encoder_layer=2, pos="relative", scale_scores=False),
    "tokens ahead": dict(mtp=2),
}


def make(name):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | NETWORKS[name]), fast=False).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_is_there_once_and_the_shares_add_up(name):
    net = make(name)
    picture = diagram(net, model_parts(net))
    parts = parts_of(picture["flow"])
    assert sum(part["params"] for part in parts) == n_params(net)
    assert sum(share["params"] for share in picture["shares"].values()) == n_params(net)
    rows = [row for part in parts for row in part["tensors"]]
    assert sum(row["n"] for row in rows) == len(model_parts(net))
    for row in rows:
        if (
            not row["tied"]
            and row["name"].endswith(("proj", "embed_tokens"))
            and not net.config.bias
        ):
            assert row["params"] == row["n"] * math.prod(row["shape"])
    total = sum(share["flops"] for share in picture["shares"].values())
    assert total == pytest.approx(flops_per_token(net.config, 16, backward=False))
    assert sum(item["flops"] for item in picture["flow"]) == pytest.approx(total)
    assert sum(item["params"] for item in picture["flow"]) == n_params(net)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "encoder", "encoder-decoder"])
def test_what_a_token_costs_is_what_torch_counts(name):
    net = make(name)
    ids = torch.randint(96, (1, 16))
    options = {"encoder_ids": ids} if net.config.is_seq2seq else {}
    # Attention as two products, each of which the counter sees.
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            net(ids, **options)
    shares = diagram(net, model_parts(net))["shares"]
    total = sum(share["flops"] for share in shares.values())
    assert total == pytest.approx(counter.get_total_flops() / 16)


def test_equal_blocks_stand_together():
    stacks = {}
    for name in NETWORKS:
        net = make(name)
        flow = diagram(net, model_parts(net))["flow"]
        stacks[name] = []
        for item in flow:
            if "blocks" in item:
                runs = [block["n"] for block in item["blocks"]]
                stacks[name].append((item["name"], item["layers"], item["repeat"], runs))
    ahead = "Multi-token prediction, in training alone"
    assert stacks == {
        "qwen3": [("", [0, 3], 4, [1])],
        "gpt2": [("", [0, 3], 4, [1])],
        "untied, windows": [("", [0, 3], 2, [1, 1])],
        "windows that do not repeat": [("", [0, 3], 1, [2, 1, 1])],
        "experts": [("", [0, 3], 2, [1, 1])],
        "encoder": [("", [0, 3], 4, [1])],
        "encoder-decoder": [("Encoder", [0, 1], 2, [1]), ("Decoder", [0, 3], 4, [1])],
        "tokens ahead": [("", [0, 3], 4, [1]), (ahead, [0, 1], 2, [1])],
    }
    assert periods(list("SSSLSSSL")) == [(0, 2, [3, 1])]
    assert periods(list("SSLSS")) == [(0, 1, [2, 1, 2])]


def test_norms_stand_before_a_branch_or_behind_its_sum():
    orders = {}
    for name in ("qwen3", "windows that do not repeat", "encoder", "encoder-decoder"):
        net = make(name)
        stacks = [f for f in diagram(net, model_parts(net))["flow"] if "blocks" in f]
        orders[name] = []
        for branch in stacks[-1]["blocks"][-1]["branches"]:
            names = [part["name"] for part in branch["parts"]]
            orders[name].append((names, [part["name"] for part in branch["behind"]]))
    assert orders == {
        "qwen3": [(["Norm", "Attention"], []), (["Norm", "MLP"], [])],
        "windows that do not repeat": [
            (["Norm", "Attention", "Norm"], []),
            (["Norm", "MLP", "Norm"], []),
        ],
        "encoder": [(["Attention"], ["Norm"]), (["MLP"], ["Norm"])],
        "encoder-decoder": [
            (["Norm", "Attention"], []),
            (["Norm", "Cross-attention"], []),
            (["Norm", "MLP"], []),
        ],
    }
