"""What a network costs: FLOPs, memory and cached tokens of every kind of layer."""

import pytest
import torch
from test_model import GPT2, QWEN3, make_net, random_ids

from barelm.layouts import cached_numbers
from barelm.objectives import Objective
from barelm.optim import flops_per_token, mean_keys, memory_estimate, sequence_flops
from barelm.patterns import Pattern
from model import GPTConfig

SOURCE = dict(n_encoder_layer=3)
KINDS = {
    "geglu": QWEN3 | dict(mlp="geglu"),
    "gelu_erf": GPT2 | dict(mlp="gelu_erf"),
    "encoder": QWEN3 | dict(causal=False),
    "BERT's head": GPT2 | dict(causal=False, mlm_head=True),
    "relative": QWEN3 | dict(pos="relative", scale_scores=False),
    "encoder-decoder": QWEN3 | SOURCE | dict(pos="relative", mlp="relu"),
    "learned encoder-decoder": GPT2 | SOURCE,
}


@pytest.mark.parametrize("name", KINDS)
def test_flops_of_all_kinds_equal_the_flop_counter(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    net, ids = make_net(**KINDS[name]), random_ids(2, 16)
    options = {}
    source_len = 0
    if net.config.is_seq2seq:
        source_len = 11
        options = {"encoder_ids": random_ids(2, source_len)}
    for backward in (False, not net.config.mlm_head):  # its bias goes with the products of the loss
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            if backward:
                net(ids, ids, **options)[0].backward()
            else:
                net(ids, **options)
        expected = 2 * sequence_flops(net.config, 16, source_len, backward)
        assert counter.get_total_flops() == expected


def sees(kind, causal, window, n_sinks, i, j):
    """Whether query i sees key j, by the papers' words."""
    if causal and j > i:
        return False
    if j < n_sinks:
        return True
    if kind == "sliding":
        return i - j < window if causal else abs(i - j) <= window // 2
    if kind == "local":
        return i // window == j // window
    if kind == "strided":
        return abs(i - j) < window or (i - j) % window == 0
    return i // window == j // window or j % window >= window - max(1, window // 8)


@pytest.mark.parametrize("kind", ["sliding", "local", "strided", "fixed"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_keys_of_a_pattern_are_counted_as_a_loop_counts_them(kind, causal):
    n = 37
    for window, n_sinks in ((5, 0), (8, 3)):
        pairs = [(i, j) for i in range(n) for j in range(n)]
        count = sum(sees(kind, causal, window, n_sinks, i, j) for i, j in pairs)
        # Of what full attention sees, which counts as n keys for each query.
        in_all = n * (n + 1) // 2 if causal else n * n
        keys = mean_keys(Pattern(causal, kind, window, n_sinks), n)
        assert keys == pytest.approx(n * count / in_all)
        # A long row is sampled.
        long = mean_keys(Pattern(causal, kind, 96, n_sinks), 5000)
        assert 0 < long < 5000
    assert mean_keys(Pattern(causal), n) == n
    assert mean_keys(Pattern(causal, "sliding", 2 * n), n) == n


def test_windows_save_flops_and_places_in_a_cache():
    shape = dict(vocab_size=64, n_ctx=256, n_layer=4, n_head=4, n_embd=64)
    full = GPTConfig(**shape)
    mixed = GPTConfig(**shape, window=32, layers="SSSL")
    saved = flops_per_token(full, 256, backward=False) - flops_per_token(mixed, 256, backward=False)
    seen = sum(min(32, t + 1) for t in range(256))  # pairs
    share = seen / (256 * 257 / 2)
    assert saved == pytest.approx(3 * 4 * 64 * 256 * (1 - share))  # 3 of 4 layers, H D = 64
    assert cached_numbers(full, 200) == 2 * 64 * 4 * 200
    assert cached_numbers(mixed, 20) == 2 * 64 * 4 * 20
    assert cached_numbers(mixed, 200) < 2 * 64 * (200 + 3 * 100)


MEMORY = {
    "window": dict(window=16, layers="SL"),
    "relative": dict(pos="relative"),
    "softcap": dict(softcap=20.0),
    "sinks": dict(sinks=True),
    "encoder": dict(causal=False),
    "encoder-decoder": dict(n_encoder_layer=3),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_of_all_kinds_is_near_what_autograd_keeps(name):
    shape = QWEN3 | dict(n_embd=64) | MEMORY[name]
    net = make_net(vocab_size=256, n_ctx=128, n_layer=4, **shape).train()
    own = {p.data_ptr() for p in net.parameters()}
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    options = {"encoder_ids": random_ids(4, 128)} if net.config.is_seq2seq else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net(random_ids(4, 128), random_ids(4, 128), **options)
    _, estimate = memory_estimate(net.config, 0, 4, 128)
    assert 0.6 < estimate / sum(kept.values()) < 1.7


def test_flops_of_spans_are_those_of_the_source_and_target():
    c = GPTConfig(vocab_size=64, n_ctx=100, n_layer=2, n_head=4, n_embd=64, n_encoder_layer=2)
    # Of 100 tokens 15 are cut out in 5 spans; a sentinel stands for each, on both sides.
    of_spans = Objective("span").flops_per_token(c, 100)
    assert 100 * of_spans == pytest.approx(sequence_flops(c, 15 + 5 + 1, 85 + 5 + 1))
    assert Objective("mlm").flops_per_token(c, 100) == flops_per_token(c, 100)
