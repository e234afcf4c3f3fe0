"""Muon: its formula a matrix at a time, SVD, what a resume restores, and no wait for a device."""

import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from barelm.muon import Muon, iterate, iterate_square, orthogonalize

SHAPES = ((8, 8), (8, 8), (4, 12), (12, 4))
STEPS = [(3.4445, -4.7750, 2.0315)] * 5


def naive_muon(p, grads, lr, decay, momentum=0.95):
    """Jordan et al. 2024 with the scale of Liu et al. 2025, a matrix at a time, in float64, each
    polynomial applied to the singular values themselves."""
    p, m = p.double().clone(), torch.zeros_like(p).double()
    for g in grads:
        g = g.double()
        m = momentum * m + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * m
        u, s, v = torch.linalg.svd(x / x.norm(), full_matrices=False)
        for a, b, c in STEPS:
            s = a * s + b * s**3 + c * s**5
        p = p * (1 - lr * decay) - lr * 0.2 * max(p.shape) ** 0.5 * (u * s) @ v
    return p


def random_params():
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def random_grads(params, n):
    return [[torch.randn_like(p) for p in params] for _ in range(n)]


def take_steps(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g
        optimizer.step()


def test_muon_equals_its_formula():
    torch.manual_seed(0)
    params = random_params()
    grads = random_grads(params, 3)
    expected = [naive_muon(p.data, [g[i] for g in grads], 0.1, 0.3) for i, p in enumerate(params)]
    take_steps(Muon(params, lr=0.1, weight_decay=0.3), params, grads)
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.data.double(), e, atol=1e-5, rtol=1e-5)


def test_a_stack_of_experts_is_stepped_matrix_by_matrix():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 4, 12))
    singles = [torch.nn.Parameter(p.detach().clone()) for p in stack]
    grads = torch.randn(2, 3, 4, 12)
    take_steps(Muon([stack], lr=0.1, weight_decay=0.3), [stack], [[g] for g in grads])
    take_steps(Muon(singles, lr=0.1, weight_decay=0.3), singles, list(grads))
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in singles]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_singular_values_land_near_1_and_vectors_stay(shape, dtype):
    torch.manual_seed(0)
    n = min(shape)
    u, _ = torch.linalg.qr(torch.randn(shape[0], n, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], n, dtype=torch.float64))
    values = torch.logspace(0, -2, n, dtype=torch.float64)
    g = u * values @ v.T
    x = orthogonalize(torch.stack([g, -3 * g]).float(), dtype)  # of any size
    torch.testing.assert_close(x[1], -x[0], atol=0.1, rtol=0)
    core = u.T @ x[0].double() @ v  # diagonal, were it exact
    assert 0.65 < core.diagonal().min() and core.diagonal().max() < 1.25
    assert (core - core.diagonal().diag()).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", [0.0, 1e-4, 1e-2])
def test_one_large_singular_value_does_not_run_away(tail, dtype):
    torch.manual_seed(0)
    for columns in (32, 96):
        g = torch.randn(1, 32, 1) * torch.randn(1, 1, columns)
        g = g / g.norm() + tail * torch.randn(1, 32, columns)
        assert torch.linalg.svdvals(orthogonalize(g, dtype)).max() < 1.25


def test_iterating_on_the_square_is_the_iteration():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 64)
    x[0] = x[0, :1] + 1e-3 * x[0]  # nearly of rank 1
    x /= x.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(iterate_square(x), iterate(x), atol=1e-3, rtol=1e-3)


def test_a_resume_of_muon_is_exact_and_state_is_by_parameter():
    torch.manual_seed(0)
    params = random_params()
    grads = random_grads(params, 4)
    grads[1][0] = None  # a parameter that gets no gradient for once
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    whole = Muon(params, lr=0.1)
    take_steps(whole, params, grads)
    first = Muon(copies, lr=0.1)
    take_steps(first, copies, grads[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert [m["momentum"].shape for m in saved["state"].values()] == [p.shape for p in params]
    second = Muon(copies, lr=0.1)
    second.load_state_dict(saved)
    take_steps(second, copies, grads[2:])
    for p, copy in zip(params, copies):
        assert torch.equal(p, copy)


def test_a_step_on_a_gpu_waits_for_nothing():
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES]
        optimizer = Muon(params, lr=0.1, dtype=torch.bfloat16)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
