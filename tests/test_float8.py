"""Products in float8: the format's formula, number by number, and what a network makes of them."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from barelm.float8 import (
    E4M3,
    E5M2,
    can_float8,
    float8_product,
    narrowed,
    scaled_product,
    use_float8,
    why_not_float8,
)
from barelm.run import UserError
from model import GPT, GPTConfig


def rounded(x, bits, lowest, largest):
    """x to the nearest number of a format with so many bits behind the point, whose lowest normal
    exponent is `lowest`, ties to even (IEEE 754)."""
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))), lowest)
    step = 2.0 ** (exponent - bits)
    return math.copysign(min(round(abs(x) / step) * step, largest), x)


def naive_narrowed(x, bits, lowest, largest):
    """A tensor as the format has it, in float64: over its scale, rounded, and times it again."""
    scale = torch.tensor(x.abs().max().item() / largest, dtype=torch.float32).item()
    values = [rounded((v / scale).item(), bits, lowest, largest) for v in x.flatten()]
    return torch.tensor(values, dtype=torch.float64).view_as(x) * scale


NAIVE = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e9])
def test_a_tensor_is_rounded_as_the_format_says(dtype, size):
    torch.manual_seed(0)
    x = size * torch.randn(8, 16) * torch.logspace(-6, 0, 16)  # the least are below its reach
    x[0, 0] = 0
    x8, scale = narrowed(x, dtype)
    got = x8.double() * scale.double()
    torch.testing.assert_close(got, naive_narrowed(x, *NAIVE[dtype]), rtol=1e-6, atol=0)
    assert x8.float().abs().max() == torch.finfo(dtype).max
    zeros, scale = narrowed(torch.zeros(4, 4), dtype)
    assert (zeros.float() == 0).all() and scale > 0


def layers_of(n_in, sizes, bias=False):
    layers = [nn.Linear(n_in, size, bias=bias) for size in sizes]
    for layer in layers:
        layer.float8 = True
    return layers


@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_rounded_factors(bias):
    torch.manual_seed(0)
    layers = layers_of(48, (32, 16, 16), bias)
    x = torch.randn(2, 16, 48, requires_grad=True)
    y = float8_product(x, layers)
    assert y.shape == (2, 16, 64) and y.dtype == torch.float32
    dy = torch.randn_like(y)
    y.backward(dy)

    weight = torch.cat([layer.weight for layer in layers]).detach()
    x8 = naive_narrowed(x.detach().flatten(0, 1), *NAIVE[E4M3])
    w8 = naive_narrowed(weight, *NAIVE[E4M3])
    g8 = naive_narrowed(dy.flatten(0, 1), *NAIVE[E5M2])
    expected = x8 @ w8.T
    if bias:
        expected = expected + torch.cat([layer.bias for layer in layers]).double()
    close = dict(rtol=1e-4, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(y.flatten(0, 1), expected, **close)
    torch.testing.assert_close(x.grad.flatten(0, 1), g8 @ w8, **close)
    got = torch.cat([layer.weight.grad for layer in layers])
    torch.testing.assert_close(got, g8.T @ x8, **close)
    if bias:
        got = torch.cat([layer.bias.grad for layer in layers])
        torch.testing.assert_close(got, dy.flatten(0, 1).sum(0).double(), **close)


def test_it_is_near_the_product_and_computes_in_the_dtype_of_autocast():
    torch.manual_seed(0)
    [layer] = layers_of(64, (64,))
    x = torch.randn(32, 64)
    plain = F.linear(x, layer.weight)
    error = (float8_product(x, [layer]) - plain).norm() / plain.norm()
    assert 1e-3 < error < 0.06  # 2^-4 at most in each factor
    with torch.autocast("cpu", torch.bfloat16):
        assert float8_product(x, [layer]).dtype == torch.bfloat16


def make_net(**more):
    torch.manual_seed(0)
    shape = dict(n_ctx=16, n_layer=2, n_head=2, n_embd=32, n_hidden=96)
    return GPT(GPTConfig(vocab_size=64, **shape | more))


def test_the_blocks_layers_alone_and_in_training_alone():
    net = make_net(bias=True)
    assert use_float8(net) == 2 * 7
    assert not hasattr(net.lm_head, "float8")
    attention = net.model.layers[0].self_attn
    x = torch.randn(2, 16, 32)
    assert can_float8(x, [attention.q_proj, attention.k_proj])
    assert not can_float8(x[:, :15], [attention.q_proj])  # 30 tokens
    assert not can_float8(x, [net.lm_head])
    ids = torch.randint(64, (2, 16))
    with torch.no_grad():
        saved = net(ids)
    net.ops.float8 = False
    torch.testing.assert_close(saved, net(ids), rtol=0, atol=1e-5)
    net.ops.float8 = True
    assert (net(ids) - saved).abs().max() > 1e-3
    with pytest.raises(UserError, match="multiples of 16"):
        use_float8(make_net(n_embd=24, n_head=2, n_hidden=40))
    assert "CPU" in why_not_float8(torch.device("cpu"))


def test_a_network_learns_with_it_recomputed_or_not():
    losses = {}
    for kind in ("plain", "float8", "recomputed"):
        net = make_net().train()
        if kind != "plain":
            use_float8(net)
        net.checkpoint = kind == "recomputed"
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        for step in range(8):
            torch.manual_seed(step)
            ids = torch.randint(0, 16, (4, 17)).cumsum(1) % 64
            loss, n = net(ids[:, :-1], ids[:, 1:])
            (loss / n).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[kind] = (loss / n).item()
    assert losses["recomputed"] == pytest.approx(losses["float8"], rel=1e-6)
    assert losses["float8"] != losses["plain"]
    assert losses["float8"] == pytest.approx(losses["plain"], rel=0.05)


def test_it_is_one_graph_for_a_compiler():
    torch.manual_seed(0)
    layers = layers_of(32, (32, 16))
    x = torch.randn(16, 32, requires_grad=True)
    results = []
    compiled = torch.compile(lambda x: float8_product(x, layers), backend="aot_eager",
                             fullgraph=True)  # fmt: skip
    for f in (lambda x: float8_product(x, layers), compiled):
        x.grad = None
        f(x).square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


def test_the_emulation_of_a_product_is_torchs():
    torch.manual_seed(0)
    a, a_scale = narrowed(torch.randn(16, 32), E5M2)
    b, b_scale = narrowed(torch.randn(48, 32), E4M3)
    ours = scaled_product(a, b, a_scale, b_scale, torch.float32)
    try:
        theirs = torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.float32)
    except RuntimeError as error:  # not on every CPU
        pytest.skip(str(error))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
