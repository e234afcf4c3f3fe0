"""barelm/quantized.py: each product against the weights that the codes stand for, and against sums
of whole numbers; on a GPU's devices too, without one."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_model import QWEN3, make_net, random_ids
from torch._subclasses.fake_tensor import FakeTensorMode

from barelm import int4, quantized
from barelm.bpe import bpe_tokenizer
from barelm.checkpoint import load, save
from barelm.quantized import (
    QuantizedLinear,
    QuantizedProduct,
    byte_product,
    dequantize,
    quantize_weights,
)

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


# The levels of int4


def bf16(x):
    return torch.tensor(x).bfloat16().item()


def naive_even(group):
    """(step, middle) of 16 levels from the least to the largest of a list of weights."""
    step = bf16(max((max(group) - min(group)) / 15, 1e-30))
    return step, bf16(min(group) + 8 * step)


def naive_codes(group, step, middle):
    return [min(max(round((x - middle) / step), -8), 7) for x in group]


def naive_error(group, counts, step, middle):
    """The sum of counts times the squared distances from the nearest levels."""
    codes = naive_codes(group, step, middle)
    return sum(n * (c * step + middle - x) ** 2 for x, c, n in zip(group, codes, counts))


def naive_search(group, counts):
    """The least error that fitted lines have, as `best_levels` fits them, one number at a time."""
    best = naive_error(group, counts, *naive_even(group))
    total = sum(counts)
    for spread in int4.SPREADS:
        cut = (max(group) - min(group)) * (1 - spread) / 2
        step, middle = naive_even([min(group) + cut, max(group) - cut])
        for _ in range(int4.REFITS):
            codes = naive_codes(group, step, middle)
            mean_code = sum(n * c for n, c in zip(counts, codes)) / total
            mean_weight = sum(n * x for n, x in zip(counts, group)) / total
            across = [n * (c - mean_code) for n, c in zip(counts, codes)]
            spread_of_codes = sum(a * (c - mean_code) for a, c in zip(across, codes))
            step = bf16(sum(a * x for a, x in zip(across, group)) / spread_of_codes)
            middle = bf16(mean_weight - step * mean_code)
            best = min(best, naive_error(group, counts, step, middle))
    return best


@pytest.mark.parametrize("width", [64, 200])
def test_levels_are_those_of_a_naive_search_and_no_worse_than_even_ones(width):
    torch.manual_seed(5)
    w = torch.randn(6, width) ** 3  # some far from the others
    counts = torch.randn(width).mul(2).exp()
    decoded = dequantize(*int4.int4_codes(w, counts))[:, :width]
    errors = (decoded - w).square() * counts
    n_groups = 0
    even = []
    ours = []
    for row, error in zip(w, errors):
        for group, n, e in zip(row.split(32), counts.split(32), error.split(32)):
            if len(group) < 32:  # padded
                continue
            group, n = group.tolist(), n.tolist()
            even.append(naive_error(group, n, *naive_even(group)))
            ours.append(e.sum().item())
            n_groups += 1
            assert ours[-1] <= even[-1] * 1.0001
            # Sums in float32 choose another code here and there, of weights between two levels.
            assert ours[-1] == pytest.approx(naive_search(group, n), rel=0.05)
    assert n_groups == 6 * (width // 32)
    assert sum(ours) < 0.8 * sum(even)


def test_zeros_of_pruned_weights_stay_zeros_in_a_search():
    torch.manual_seed(5)
    w = torch.randn(40, 128) + torch.linspace(-4, 4, 40)[:, None]
    w.view(-1, 4)[:, :2] = 0
    w[0] = 0  # all of a row
    decoded = dequantize(*int4.int4_codes(w, torch.rand(128).exp()))
    assert (decoded[w == 0] == 0).all()
    assert (decoded - w).norm() < 0.2 * w.norm()


def test_inputs_are_measured_as_a_naive_pass_does():
    net = make_net(**QWEN3)
    measured = int4.input_squares(net)
    length = min(int4.N_TOKENS, net.config.n_ctx)
    shape = (int4.N_TOKENS // length, length)
    ids = torch.randint(net.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    layer = net.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(net.model.embed_tokens(ids)).flatten(0, 1)  # (N, C)
    for name in ("q_proj", "k_proj", "v_proj"):
        for value, expected in zip(measured[f"model.layers.0.self_attn.{name}"], x.square().sum(0)):
            assert value == 2.0 ** round(math.log2(expected))
    blocks = {name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    assert measured.keys() == blocks - {"lm_head"}
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_network_whose_channels_differ_loses_less(monkeypatch):
    """Than with even levels, by its hidden states for other tokens."""
    errors = {}
    for kind in ("searched", "even"):
        net = make_net(**QWEN3)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if "layernorm" in name:
                    p.copy_(torch.randn(p.shape).mul(1.5).exp())
            before = net.hidden(random_ids(2, 20))
            if kind == "even":
                monkeypatch.setattr(quantized, "input_squares", lambda net: {})
            after = quantize_weights(net, "int4").hidden(random_ids(2, 20))
        errors[kind] = (after - before).norm() / before.norm()
    assert errors["searched"] < 0.9 * errors["even"]


def test_saved_codes_are_loaded_bit_by_bit(tmp_path):
    tok = bpe_tokenizer([(b"a", b"b")])
    net = quantize_weights(make_net(**QWEN3 | dict(vocab_size=320)), "int4")
    save(tmp_path, net, tok)
    for quantize in (None, "int4"):
        back, _ = load(tmp_path, quantize=quantize)
        assert back.int4_group == 32
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name])


def test_a_folder_with_groups_of_64_still_opens(tmp_path):
    """tests/fixtures/int4 was written before groups had 32 weights: its config.json has none of
    them. Saved again it has, and stays as it is."""
    folder = Path(__file__).parent / "fixtures" / "int4"
    expected = json.loads((folder / "expected.json").read_text())
    net, tok = load(folder)
    ids = torch.tensor(expected["ids"])
    logits = torch.tensor(expected["logits"])
    with torch.no_grad():
        torch.testing.assert_close(net(ids), logits, atol=2e-3, rtol=1e-3)
        save(tmp_path, net, tok)
        assert json.loads((tmp_path / "config.json").read_text())["int4_group"] == 64
        assert torch.equal(load(tmp_path)[0](ids), net(ids))
