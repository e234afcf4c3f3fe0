"""Optimizers of divided parameters: four processes beside one. tests/optim_worker.py has them;
`torchrun --nproc_per_node=4 tests/optim_worker.py` runs all of them."""

import json

import pytest
import torch
from conftest import run

from barelm import offload
from barelm.adamw import AdamWInParts
from barelm.muon import Muon
from barelm.parallel import narrow_gradients


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """{check: its figures}, of one start of four processes."""
    words = ("muon", "short", "float8")
    done = run(tmp_path_factory.mktemp("optim"), "tests/optim_worker.py", *words, processes=4)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["check"]: row for row in rows}


def test_muon_of_divided_matrices_is_that_of_whole_ones_and_holds_its_part(checks):
    shares = {"fsdp": 0.25, "hsdp": 0.5, "fsdp offload": 0.25}
    for kind in ("fsdp", "hsdp", "tp", "fsdp x tp", "fsdp offload"):
        figures = checks[f"layers {kind}"]
        assert figures["worst"] < 1e-4  # of weights, whose updates are of size 0.02
        if kind in shares:
            assert figures["share"] == pytest.approx(shares[kind], abs=0.01)
    # up and down alone are divided by tensor parallelism.
    assert checks["layers fsdp x tp"]["share"] == pytest.approx(checks["layers tp"]["share"] / 2)


def test_losses_are_those_of_one_process_and_bytes_those_of_the_estimate(checks):
    ways = [name for name in checks if name.split()[0] in ("adamw", "muon")]
    trained = [name for name in ways if "held_to_estimate" in checks[name]]
    assert len(trained) == 6
    for name in trained:
        limit = 2e-3 if "muon" in name else 1e-5
        limit = 0.1 if "bfloat16" in name else limit
        assert checks[name]["worst"] < limit, name
        assert checks[name]["held_to_estimate"] == pytest.approx(1, abs=0.1), name


def test_float8_learns_in_parts_as_in_one_process(checks):
    figures = checks["float8 fsdp"]
    assert figures["last"] == pytest.approx(figures["alone"], rel=0.05)


def parameters(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6,), (6, 4), (3, 3))]


@pytest.mark.parametrize("offloads", [False, True])
def test_adamw_in_parts_is_adamw_through_a_resume(monkeypatch, offloads):
    monkeypatch.setattr(offload, "PART", 30)  # numbers: two of the parameters, or one
    params, copies = parameters(), parameters()
    whole = torch.optim.AdamW(params, 0.1, (0.9, 0.95), fused=True)
    parts = AdamWInParts([{"params": copies}], 0.1, (0.9, 0.95), offload=offloads)
    for step in range(5):
        if step == 3:
            saved = parts.state_dict()
            parts = AdamWInParts([{"params": copies}], 0.1, (0.9, 0.95), offload=offloads)
            parts.load_state_dict(saved)
        for p, copy in zip(params, copies):
            p.grad = torch.randn_like(p)
            copy.grad = p.grad.clone()
        params[1].grad = copies[1].grad = None  # one that gets none
        whole.step()
        parts.step()
    for p, copy in zip(params, copies):
        assert torch.equal(p, copy)
        for key, value in whole.state[p].items():
            assert torch.equal(value, parts.state[copy][key])


def test_muon_offloaded_is_muon(monkeypatch):
    monkeypatch.setattr(offload, "PART", 30)
    results = []
    for offloads in (False, True):
        params = [p for p in parameters() if p.ndim > 1] + [p for p in parameters(1) if p.ndim > 1]
        optimizer = Muon(params, lr=0.1, offload=offloads)
        for step in range(4):
            if step == 2:
                saved = optimizer.state_dict()
                optimizer = Muon(params, lr=0.1, offload=offloads)
                optimizer.load_state_dict(saved)
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(params)
    for p, copy in zip(*results):
        torch.testing.assert_close(p, copy, rtol=1e-5, atol=1e-5)


def test_narrow_gradients_are_added_up_and_stepped_with():
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 8)
    narrow_gradients(net)
    weight = net.weight.detach().clone()
    x = torch.randn(4, 8)
    for _ in range(2):
        net(x).square().sum().backward()
    wide = 2 * torch.autograd.grad(net(x).square().sum(), net.weight)[0]
    assert net.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(net.weight.grad.float(), wide, rtol=0.02, atol=0.02)
    AdamWInParts(list(net.parameters()), 0.1, (0.9, 0.95)).step()
    assert (net.weight - weight).abs().min() > 0.05  # AdamW's first step is of size lr
