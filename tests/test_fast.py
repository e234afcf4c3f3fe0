"""barelm/fast.py against model.py's plain mathematics: each piece, and whole networks; what it does
not know is left to the plain way."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_model import OURS, QWEN3, SHAPES, make_net, random_ids
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

import model
from barelm import operations
from barelm.adapters import add_adapters
from barelm.bpe import char_tokenizer
from barelm.checkpoint import load, save
from barelm.fast import (
    LinearCrossEntropy,
    block_mask,
    blocked_attention,
    can_block,
    can_piece,
    compiled_head_rows,
    cross_entropy_sum,
    generating,
    head_piece,
    head_rows,
    joined_product,
    query_blocks,
)
from barelm.operations import Operations, attention_probabilities
from barelm.patterns import Pattern, attention_mask, may_look
from barelm.quantized import quantize_weights
from barelm.run import autocast
from model import KVCache

CPU = torch.device("cpu")
ALL = SHAPES | OURS


@pytest.fixture(scope="module")
def tok():
    return char_tokenizer("abcdefghijklmnopqrstuvwxyz \n.?!😀é")


def fast_and_plain(**shape):
    """Two networks of the same weights, the second of plain mathematics alone."""
    fast = make_net(**shape)
    plain = copy.deepcopy(fast)
    plain.fast = False
    assert fast.fast and not plain.model.layers[0].self_attn.ops.fast
    return fast, plain


# Whole networks


def loss_and_gradients(net, dtype, docs):
    ids = random_ids(2, 32)
    targets = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
    net.train()
    net.zero_grad()
    with autocast(CPU, dtype):
        loss, count = net(ids, targets, docs=docs)
    (loss / count).backward()
    return loss.detach() / count, [p.grad for p in net.parameters()]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_a_fast_network_has_the_losses_and_gradients_of_a_plain_one(name, dtype, documents):
    fast, plain = fast_and_plain(**ALL[name])
    docs = torch.arange(32).div(13, rounding_mode="floor").expand(2, -1) if documents else None
    loss, gradients = loss_and_gradients(fast, dtype, docs)
    right, expected = loss_and_gradients(plain, dtype, docs)
    # bfloat16 has 8 bits, and each path rounds elsewhere.
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(loss, right, rtol=tolerance / 10, atol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        # A key's bias moves all scores of a query alike: its gradient is 0, but for rounding.
        assert (ours - theirs).norm() <= tolerance * (theirs.norm() + 0.02)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ALL)
def test_fast_and_plain_logits_agree(name, quantize):
    fast, plain = fast_and_plain(**ALL[name])
    if quantize:
        quantize_weights(fast, quantize)
        quantize_weights(plain, quantize)
    ids = random_ids(3, 9)
    # Quantized products round x to bfloat16 or to bytes: to 63 levels, 1 to 2 % in each of them.
    tolerance = 1e-4 if quantize is None else 0.2
    with torch.no_grad():
        expected = plain(ids)
        assert (fast(ids) - expected).norm() <= tolerance * expected.norm()
        with generating(fast):
            assert (fast(ids) - expected).norm() <= tolerance * expected.norm()
        with generating(plain):
            assert plain.ops.packed is None
            assert torch.equal(plain(ids), expected)


@pytest.mark.parametrize("name", ALL)
def test_fast_and_plain_networks_say_the_same(name, tok):
    fast, plain = fast_and_plain(**ALL[name])
    prompts = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 1, 2]]
    for options in (dict(temperature=0), dict(seed=2), dict(num_beams=3)):
        ours = model.generate(fast, tok, prompts, max_new_tokens=12, **options)
        theirs = model.generate(plain, tok, prompts, max_new_tokens=12, **options)
        assert [g.text for g in ours] == [g.text for g in theirs]


def test_a_folder_is_opened_fast_or_plain(tok, tmp_path):
    save(tmp_path, make_net(**QWEN3), tok)
    assert load(tmp_path)[0].fast
    assert not load(tmp_path, fast=False)[0].fast


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_packed_for_generation_give_the_same_logits(name, dtype):
    net, ids = make_net(**SHAPES[name]).to(dtype), random_ids(3, 5)
    with torch.no_grad():
        plain = net(ids)
        with generating(net):
            packed = net(ids)
            with torch.no_grad():  # what changes after a generation is seen by the next
                net.lm_head.weight.mul_(2)
        with generating(net):
            assert not torch.equal(net(ids), packed)
    close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.05, atol=0.3)
    torch.testing.assert_close(packed, plain, **close)
    assert net.ops.packed is None
    with pytest.raises(KeyError), generating(net):
        raise KeyError
    assert net.ops.packed is None


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_bfloat16_attention_on_a_cpu_is_near_float32(name):
    net, ids = make_net(**SHAPES[name]).train(), random_ids(2, 32)
    losses, norms = [], []
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), dtype):
            loss, count = net(ids, ids)
        net.zero_grad()
        loss.backward()
        losses.append(loss.item() / count.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item())
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0]
    assert abs(norms[0] - norms[1]) < 0.1 * norms[0]


# Products


def test_joined_layers_are_those_one_by_one():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(24, n) for n in (8, 16, 3)]
    x = torch.randn(2, 5, 24, requires_grad=True)
    weights = [layer.weight for layer in layers]
    expected = torch.cat([layer(x) for layer in layers], -1)
    ours = joined_product(x, layers, None)
    torch.testing.assert_close(ours, expected)
    got = torch.autograd.grad(ours.square().sum(), (x, *weights))
    want = torch.autograd.grad(expected.square().sum(), (x, *weights))
    torch.testing.assert_close(got, want)
    packed = {}
    with torch.no_grad():
        for dtype, close in ((torch.float32, {}), (torch.bfloat16, dict(rtol=0.02, atol=0.05))):
            packed.clear()
            product = joined_product(x.to(dtype), layers, packed)
            if product is not None:
                torch.testing.assert_close(product.float(), expected, **close)
            assert list(packed) == [layers[0]]


def test_layers_of_other_kinds_are_left_to_the_plain_way():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(2, 24)
    usual, doubled = torch.nn.Linear(24, 8), Doubled(24, 8)
    assert joined_product(x, (usual, doubled), {}) is None
    with torch.no_grad():
        assert joined_product(x, (doubled,), {}) is None
    assert not can_piece(doubled) and not can_piece(None)
    net = make_net(**QWEN3)
    add_adapters(net, 3)
    for block in net.model.layers:
        torch.nn.init.normal_(block.mlp.down_proj.up.weight)
    plain = copy.deepcopy(net)
    plain.fast = False
    ids = random_ids(2, 9)
    with torch.no_grad(), generating(net):
        torch.testing.assert_close(net(ids), plain(ids), rtol=1e-4, atol=1e-4)


# Attention


def some_qkv(T, S, dtype=torch.float32, heads=(4, 2)):
    torch.manual_seed(3)
    H, G = heads
    return [torch.randn(2, n, length, 8).to(dtype) for n, length in ((H, T), (G, S), (G, S))]


def masks(T, S):
    """Masks of every kind by a name for each: bool ones and one of numbers."""
    last = torch.arange(S - T, S)[:, None]  # the queries are the last of S tokens
    keys = torch.arange(S)[None]
    causal = (keys <= last).expand(2, 1, T, S)
    heads = torch.arange(1, 5)[:, None, None]
    return {
        "causal": causal,
        "window": causal & (last - keys < 3),
        "both ways": (last - keys).abs().expand(1, 1, T, S) < 3,
        "a window for each head": causal & (last - keys < heads),
        "alibi": (-0.3 * heads * (last - keys)).masked_fill(~causal, -math.inf),
    }


@pytest.mark.parametrize("options", [dict(softcap=9.0), dict(sinks=torch.zeros(2))])
def test_scores_are_not_rounded(options):
    q, k = torch.randn(2, 1, 2, 9, 16, generator=torch.Generator().manual_seed(0)).mul(3).unbind()
    exact = attention_probabilities(q, k, **options)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention_probabilities(q, k, **options), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, S", [(12, 12), (1, 12), (5, 12)])
@pytest.mark.parametrize("kind", [None, *masks(1, 1)])
@pytest.mark.parametrize("fast", [True, False])
def test_attention_weighs_by_the_probabilities_that_are_shown(fast, kind, T, S, dtype):
    if kind is None and 1 < T < S:
        return  # which tokens they were would be for a mask to say
    q, k, v = some_qkv(T, S, dtype)
    mask = None if kind is None else masks(T, S)[kind]
    shown = attention_probabilities(q, k, mask)
    assert shown.shape == (2, 4, T, S) and shown.dtype == torch.float32
    torch.testing.assert_close(shown.sum(-1), torch.ones(2, 4, T))
    y = Operations(fast).attend(q, k, v, mask)
    assert y.dtype == dtype
    close = {} if dtype == torch.float32 else dict(rtol=0.02, atol=0.03)
    torch.testing.assert_close(y.float(), shown @ v.float().repeat_interleave(2, 1), **close)


def test_blocks_are_used_where_they_are_right_and_there_alone():
    q, k, _ = some_qkv(12, 12, torch.bfloat16)
    fits = {kind: can_block(q, k, mask, 0.0) for kind, mask in masks(12, 12).items()}
    assert fits == {"causal": True, "window": True, "both ways": False, "alibi": False} | {
        "a window for each head": False
    }
    assert can_block(q, k, None, 0.0) and not can_block(q, k, None, 0.1)
    assert not can_block(q.float(), k.float(), None, 0.0)
    assert not can_block(q[:, :, :1], k, None, 0.0) and not can_block(q[:, :, :5], k, None, 0.0)


@pytest.mark.parametrize("length", [1, 7, 130, 700])
@pytest.mark.parametrize("documents", [False, True])
def test_blocked_attention_equals_softmax(length, documents):
    torch.manual_seed(3)
    make = lambda heads: torch.randn(2, heads, length, 8, dtype=torch.float64).requires_grad_()
    q, k, v, dy = make(6), make(2), make(2), torch.randn(2, 6, length, 8, dtype=torch.float64)
    unseen = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    if documents:
        ids = torch.randint(0, 3, (2, length)).sort().values
        unseen = unseen | (ids[:, None, :, None] != ids[:, None, None, :])
    scores = q @ k.repeat_interleave(3, 1).mT / math.sqrt(8)
    y = scores.masked_fill(unseen, -math.inf).softmax(-1) @ v.repeat_interleave(3, 1)
    ours = blocked_attention(q, k, v, ~unseen)
    torch.testing.assert_close(ours, y)
    grads = [torch.autograd.grad(out, (q, k, v), dy) for out in (ours, y)]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs)


def test_blocked_attention_gives_its_gradients_twice():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 300, 16, dtype=torch.float64) for n in (4, 2, 2))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    later = torch.ones(1, 1, 300, 300, dtype=torch.bool).triu(1)
    ours = blocked_attention(q, k, v, ~later)
    plain = F.scaled_dot_product_attention(q, k, v, ~later, enable_gqa=True)
    torch.testing.assert_close(ours, plain)
    for _ in range(2):
        got = torch.autograd.grad(ours.square().sum(), (q, k, v), retain_graph=True)
        want = torch.autograd.grad(plain.square().sum(), (q, k, v), retain_graph=True)
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "T, heads, dtype", [(300, (4, 2), torch.float32), (256, (3, 3), torch.bfloat16)]
)
def test_sparse_attention_equals_the_dense_mask(T, heads, dtype, monkeypatch):
    # torch has a backward on a CPU, for uncompiled attention, but does not let it be asked for.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    q, k, v = (x.requires_grad_() for x in some_qkv(T, T, dtype, heads))
    docs = (torch.rand(2, T) < 0.02).cumsum(1)
    positions = torch.arange(T)[None]
    ops = Operations(fast=True)
    dense = ops.mask(Pattern(), positions, docs)
    assert torch.equal(dense, attention_mask(Pattern(), positions, positions, docs))
    ops.sparse = True
    assert ops.mask(Pattern(), positions, None) is None
    blocks = ops.mask(Pattern(), positions, docs)
    # No block that has something to see is left out, and none is whole that has not all.
    padding = (0, -T % 128, 0, -T % 128)
    seen = F.pad(dense, padding).unflatten(3, (-1, 128)).unflatten(2, (-1, 128))
    assert torch.equal(blocks.blocks.to_dense().bool(), seen.any(5).any(3))
    ours = ops.attend(q, k, v, blocks)
    plain = Operations(fast=False).attend(q, k, v, dense)
    assert ours.dtype == dtype
    close = {} if dtype == torch.float32 else dict(rtol=0.02, atol=0.03)
    torch.testing.assert_close(ours, plain, **close)
    got = torch.autograd.grad(ours.float().square().sum(), (q, k, v))
    want = torch.autograd.grad(plain.float().square().sum(), (q, k, v))
    for a, b in zip(got, want):
        assert (a - b).float().norm() <= (1e-5 if dtype == torch.float32 else 0.02) * b.norm()


KINDS_OF_WINDOW = (("full",), ("sliding", 20), ("local", 32), ("strided", 9), ("fixed", 16))
UNUSUAL = {
    "window": dict(window=40, layers="SL", softcap=3.0),
    "local": dict(window=32, attention="local", sinks=True),
    "strided": dict(window=24, attention="strided", sink_tokens=2),
    "fixed": dict(window=32, attention="fixed", pos="none"),
    "alibi": dict(pos="alibi"),
    "relative": dict(pos="relative", softcap=2.0, scale_scores=False),
    "encoder": dict(causal=False, window=30, pos="relative"),
}
REACHING = [Pattern(causal, *kind) for causal in (True, False) for kind in KINDS_OF_WINDOW]


@pytest.mark.parametrize("pattern", REACHING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocked_attention_of_windows_and_encoders_equals_the_formula(pattern, dtype):
    T = 300
    q, k, v = (x.requires_grad_() for x in some_qkv(T, T, dtype))
    places = torch.arange(T)[None]
    # Patterns that restart within a row, as in documents, are within reach too.
    docs = (torch.arange(T) >= 131).long().expand(2, T)
    for mask in (
        attention_mask(pattern, places, places),
        attention_mask(pattern, places, places, docs),
    ):
        options = dict(causal=pattern.causal, scale=0.3)
        if mask is not None and not pattern.causal:
            mask = mask.expand(-1, -1, T, T)
        exact = attention_probabilities(q, k, mask, **options)
        exact = exact @ v.float().repeat_interleave(2, 1)
        ours = blocked_attention(q, k, v, mask, reach=pattern.reach, **options)
        close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.03)
        torch.testing.assert_close(ours.float(), exact, **close)
        got = torch.autograd.grad(ours.float().square().sum(), (q, k, v))
        want = torch.autograd.grad(exact.square().sum(), (q, k, v))
        for a, b in zip(got, want):
            assert (a - b).float().norm() <= (1e-5 if dtype == torch.float32 else 0.03) * b.norm()


def test_blocks_of_queries_leave_out_what_no_query_sees():
    for causal in (True, False):
        for pattern in (Pattern(causal, "sliding", 40), Pattern(causal, "local", 64)):
            places = torch.arange(1000)
            seen = may_look(pattern, places[:, None], places)
            total = 0
            for i, j, low, high in query_blocks(1000, 1000, causal, pattern.reach):
                assert not seen[i:j, :low].any() and not seen[i:j, high:].any()
                total += (j - i) * (high - low)
            assert total < 300 * 1000
    assert query_blocks(256, 256, True, None) == [(0, 128, 0, 128), (128, 256, 0, 256)]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", UNUSUAL)
def test_sparse_attention_of_a_network_equals_the_formulas(name, monkeypatch):
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    torch._dynamo.reset()  # a number that was another before would be a symbol
    net = make_net(n_ctx=300, **(QWEN3 | UNUSUAL[name])).train()
    if net.config.sinks:
        for block in net.model.layers:
            torch.nn.init.normal_(block.self_attn.sinks)
    ids = random_ids(2, 300)
    docs = (torch.arange(300) >= 170).long().expand(2, 300)
    for documents in (None, docs):
        results = []
        for sparse in (False, True):
            net.ops.sparse = sparse
            net.zero_grad()
            loss, _ = net(ids, ids, docs=documents)
            loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
            results.append((loss.item(), gradients))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
        difference = (results[0][1] - results[1][1]).norm()
        assert difference < 1e-4 * results[0][1].norm()
    assert len(net.ops.block_masks) == len(set(net.config.patterns))  # made once


def test_blocks_are_made_without_waiting_for_the_device():
    docs = torch.zeros(2, 300, dtype=torch.int64, device="meta")  # of which nothing can be read
    positions = torch.arange(300, device="meta")[None]
    assert block_mask(partial(may_look, Pattern()), positions, docs).kv_indices.is_meta


# A fork's positions and masks: one function is changed, and everything follows


def alibi(pattern, positions, key_positions, docs=None, key_docs=None, alone=True):
    """`attention_mask` with the biases of Press et al. 2022 in it."""
    seen = attention_mask(pattern, positions, key_positions, docs, key_docs, alone=False)
    distances = positions[:, None, :, None] - key_positions[:, None, None, :]
    n_head = QWEN3["n_head"]
    slopes = 2.0 ** (-8 / n_head * torch.arange(1, n_head + 1))
    return (-slopes[:, None, None] * distances).masked_fill(~seen, -math.inf)


def window(pattern, positions, key_positions, docs=None, key_docs=None, alone=True):
    """`attention_mask` of tokens that see themselves and the four before them."""
    seen = attention_mask(pattern, positions, key_positions, docs, key_docs, alone=False)
    return seen & (positions[:, None, :, None] - key_positions[:, None, None, :] < 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fork", [alibi, window])
def test_a_mask_that_a_fork_makes_holds_everywhere(fork, dtype, tok, monkeypatch):
    shape = QWEN3 | dict(pos="none")
    net, plain = fast_and_plain(**shape)
    ids = random_ids(2, 20)
    close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.05, atol=0.4)
    with torch.no_grad(), autocast(CPU, dtype):
        before = net(ids)
        monkeypatch.setattr(operations, "attention_mask", fork)
        expected = plain(ids)
        assert (expected - before).abs().max() > 1
        torch.testing.assert_close(net(ids), expected, **close)
        # in a cache, whose rows are alike or not
        cache = KVCache(net.config, 2, 24, "cpu", torch.float32)
        parts = [net(part, cache=cache) for part in ids.split([9, 1, 6, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, **close)
        cache = KVCache(net.config, 2, 24, "cpu", torch.float32)
        net(ids[:, :9], cache=cache, n_new=torch.tensor([9, 4]))
        later = torch.stack((ids[0, 9:14], ids[1, 4:9]))
        logits = net(later, cache=cache, n_new=torch.tensor([5, 5]))
        torch.testing.assert_close(logits[0], expected[0, 9:14], **close)
        torch.testing.assert_close(logits[1], expected[1, 4:9], **close)
        # in documents
        docs = (torch.arange(20) >= 7).long()[None].expand(2, -1)
        apart = torch.cat((net(ids[:, :7]), net(ids[:, 7:])), 1)
        torch.testing.assert_close(net(ids, docs=docs), apart, **close)


@pytest.mark.parametrize("fork", [None, alibi, window])
def test_what_a_layer_is_shown_to_look_at_is_what_it_looks_at(fork, monkeypatch):
    if fork:
        monkeypatch.setattr(operations, "attention_mask", fork)
    net = make_net(**QWEN3)
    attention = net.model.layers[1].self_attn
    inputs, outputs = [], []
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args))
    attention.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        net(random_ids(1, 10))
        x, rope, mask, _ = inputs[0]
        shown = attention.probabilities(x, rope, mask)
        _, _, v = attention.qkv(x, rope)
        y = shown @ v.repeat_interleave(2, 1)  # (1, H, T, D)
        torch.testing.assert_close(attention.o_proj(y.transpose(1, 2).flatten(2)), outputs[0])


# The head and its loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, compiled", [(7, False), (64, False), (13, True), (1000, False)])
def test_the_head_equals_cross_entropy(dtype, size, compiled):
    piece = torch.compile(head_piece, backend="eager") if compiled else head_piece
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(65, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 24, generator=generator).requires_grad_()
    targets = torch.randint(50, (65,), generator=generator)
    targets[::5] = -100
    loss = LinearCrossEntropy.apply(h, weight, targets, True, size, piece)
    logits = (h @ weight.to(dtype).T).float()
    reference = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    # A graph that is kept gives the same gradients again: nothing saved was written to.
    for _ in range(2):
        got = torch.autograd.grad(3 * loss, (h, weight), retain_graph=True)
        want = torch.autograd.grad(3 * reference, (h, weight), retain_graph=True)
        for a, b in zip(got, want):
            assert (a - b).float().norm() <= (1e-5 if dtype == torch.float32 else 0.02) * b.norm()
    # Of a frozen head no gradient is made, and h has the same.
    frozen = LinearCrossEntropy.apply(h, weight.detach(), targets, True, size, piece)
    assert torch.equal(frozen, loss) and torch.equal(torch.autograd.grad(3 * frozen, h)[0], got[0])


def test_a_compiled_head_takes_pieces_of_one_size_in_no_more_memory():
    for dtype, V in ((torch.bfloat16, 50304), (torch.float32, 4096), (torch.float16, 151936)):
        rows = head_rows("cuda", dtype, V)
        eager_bytes = rows * V * (dtype.itemsize + 8)
        for n in (1, 1000, 32768, 65536, 7 * 8192):
            size = compiled_head_rows(n, "cuda", dtype, V)
            assert n % size == 0 and n / size <= 2 * math.ceil(n / rows)
            assert size * V * 2 * dtype.itemsize <= eager_bytes and size * V < 2**31
    assert compiled_head_rows(32768, "cuda", torch.bfloat16, 50304) == 16384
    assert compiled_head_rows(100003, "cuda", torch.bfloat16, 50304) > 10000  # a prime number


def test_the_loss_head_in_pieces_equals_cross_entropy():
    torch.manual_seed(4)
    h, w = torch.randn(600, 16).requires_grad_(), torch.randn(5000, 16).requires_grad_()
    targets = torch.randint(5000, (600,)).masked_fill(torch.rand(600) < 0.2, -100)
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    exact = F.cross_entropy(h64 @ w64.T, targets, reduction="sum")
    ours = cross_entropy_sum(h, w, targets)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    for mine, theirs in zip(
        *(torch.autograd.grad(3 * f, x) for f, x in ((ours, (h, w)), (exact, (h64, w64))))
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert cross_entropy_sum(h, w, targets) == ours


class Attends(TorchFunctionMode):
    """Notes with how many heads of k, and whether grouped, torch's attention is called."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is F.scaled_dot_product_attention:
            self.heads = args[1].shape[1], args[2].shape[1], kwargs["enable_gqa"]
            return args[0]
        return f(*args, **(kwargs or {}))


def test_a_gpu_is_given_groups_of_heads_where_it_has_a_kernel_for_them():
    net = Operations(fast=True)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with FakeTensorMode(allow_non_fake_inputs=True), Attends() as noted:
        for device, dtype, mask_given, heads in (
            ("cuda", torch.bfloat16, None, (2, 2, True)),
            ("cuda", torch.bfloat16, mask, (4, 4, False)),
            ("cuda", torch.float32, None, (4, 4, False)),
            ("cpu", torch.float32, mask, (2, 2, True)),
        ):
            q, k, v = (torch.empty(1, n, 6, 8, device=device, dtype=dtype) for n in (4, 2, 2))
            net.plain_attend(q, k, v, mask_given)
            assert noted.heads == heads
        net.deterministic = True
        net.plain_attend(*(torch.empty(1, n, 6, 8, device="cuda") for n in (4, 2, 2)))
        assert noted.heads == (2, 2, True)
