"""barelm/quantized.py: each product against the weights that the codes stand for, and against sums
of whole numbers; on a GPU's devices too, without one."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from barelm import quantized
from barelm.quantized import QuantizedLinear, QuantizedProduct, byte_product, dequantize

needs_bytes = pytest.mark.skipif(not quantized.largest_code(), reason="no product of bytes here")


def product_of(kind, height=48, width=200, bias=True):
    """(a QuantizedProduct of random weights, the weights that it stands for (height, width))."""
    torch.manual_seed(7)
    layer = QuantizedLinear(torch.nn.Linear(width, height, bias=bias).requires_grad_(False), kind)
    weight = dequantize(layer.weight, layer.scale)[:, :width]
    return QuantizedProduct(layer.weight, layer.scale, layer.bias), weight


@needs_bytes
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_sums_of_bytes_are_exact(rows):
    """Where two products overflow 16 bits, `largest_code` is one that they do not."""
    torch.manual_seed(7)
    top = quantized.largest_code()
    weight = torch.randint(-127, 128, (64, 192)).to(torch.int8)
    weight[:8] = 127
    x = torch.randint(-top, top + 1, (rows, 192)).to(torch.int8)
    x[0] = top
    y = byte_product(x, top + 1, quantized.pack_bytes(weight), torch.full((64,), 0.5))
    assert torch.equal(y, (x.double() @ weight.double().T / 2).float())


@needs_bytes
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_large_channel_drowns_no_other(kind):
    """Beside one channel a hundred times as large, the others are rounded less than without a
    rotation."""
    product, weight = product_of(kind, bias=False)
    x = torch.randn(64, 200)
    x[:, 70] = 100.0
    right = x @ weight.T
    step = 100.0 / quantized.largest_code()
    without = (x / step).round() * step @ weight.T
    assert (product.rounded(x) - right).norm() < 0.6 * (without - right).norm()


@needs_bytes
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounding_is_small_and_of_each_row_alone(kind):
    product, weight = product_of(kind)
    x = torch.randn(70, 200) * torch.logspace(-6, 6, 70)[:, None]
    right = x @ weight.T
    y = product.rounded(x)
    error = (y - right).norm(dim=1) / right.norm(dim=1)
    assert error.max() < 0.1  # a step of 63 for numbers up to 4 deviations is 2 %
    alone = torch.cat([product.rounded(row) for row in x.split(1)])
    torch.testing.assert_close(alone, y, rtol=0.02, atol=0)
    bad = x.clone()
    bad[3, 5] = float("nan")
    bad[4, 5] = float("inf")
    spoiled = product.rounded(bad)
    assert spoiled[3:5].isnan().all()
    assert torch.equal(spoiled[5:], y[5:])


def test_the_way_is_chosen_by_rows_and_kind(monkeypatch):
    for top, few in ((127, "rounded"), (63, "plain"), (0, "plain")):
        monkeypatch.setattr(quantized, "largest_code", lambda top=top: top)
        assert quantized.way("int8", 1, "cpu") == "plain"
        assert quantized.way("int8", 12, "cpu") == few
        assert quantized.way("int8", 300, "cpu") == ("rounded" if top else "plain")
        assert quantized.way("int4", 1, "cpu") == "int4"
        assert quantized.way("int4", 64, "cpu") == ("rounded" if top else "int4")
    assert quantized.way("int8", 1, "mps") == "plain"


@pytest.mark.parametrize("rows", [1, 3])
def test_sums_of_codes_are_the_plain_product(rows):
    product, weight = product_of("int8", bias=False)
    x = torch.randn(rows, 200)
    got = quantized.sums(x, product.codes, product.scale)
    torch.testing.assert_close(got, F.linear(x, weight), rtol=1e-4, atol=1e-5)


def test_products_stay_on_a_gpu_and_do_not_wait_for_it(monkeypatch):
    monkeypatch.setattr(quantized, "has_int4", lambda: True)
    monkeypatch.setattr(quantized, "compiled_sums", lambda: quantized.sums)
    with FakeTensorMode():
        for kind, codes in (("int8", (64, 128)), ("int4", (64, 64))):
            dtype = torch.int8 if kind == "int8" else torch.uint8
            scale = (64,) if kind == "int8" else (64, 2, 2)
            product = QuantizedProduct(
                torch.zeros(codes, dtype=dtype, device="cuda"),
                torch.zeros(scale, dtype=torch.bfloat16, device="cuda"),
                torch.zeros(64, device="cuda"),
            )
            for rows in (1, 4, 40, 100):
                x = torch.zeros(rows, 1, 128, dtype=torch.bfloat16, device="cuda")
                y = product(x)
                assert y.shape == (rows, 1, 64) and y.dtype == x.dtype
                assert y.device.type == "cuda"
        assert all(quantized.usable.values())
