"""Every option of the network through every stage: it works, or is refused in a line that names it.

A new option is a line of OPTIONS."""

import copy
import re
from functools import cache

import pytest
import torch

import export
from barelm.adapters import AdaptConfig, add_prompts, choose_weights, merge_adapters
from barelm.attention_maps import attention_maps
from barelm.bpe import char_tokenizer
from barelm.checkpoint import load, save
from barelm.fast import generating
from barelm.gguf_file import check_gguf
from barelm.invariant import be_deterministic
from barelm.optim import flops_per_token, make_optimizer, memory_estimate, restore_optimizers
from barelm.page import describe_model
from barelm.patterns import may_look
from barelm.quantized import quantize_weights
from barelm.run import UserError
from model import GPT, GPTConfig, generate

SHAPE = dict(vocab_size=64, n_ctx=48, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
SOURCE = dict(n_encoder_layer=2)
EXPERTS = dict(n_experts=4, n_experts_per_token=2)
OPTIONS = {
    "plain": dict(),
    "window": dict(window=8),
    "layers": dict(window=8, layers="SL", local_rope_theta=100.0),
    "sink_tokens": dict(window=8, sink_tokens=2),
    "local": dict(window=8, attention="local"),
    "strided": dict(window=6, attention="strided"),
    "fixed": dict(window=8, attention="fixed"),
    "sinks": dict(sinks=True),
    "softcap": dict(softcap=5.0),
    "logit_softcap": dict(logit_softcap=5.0),
    "scale_scores": dict(scale_scores=False, logit_scale=0.5),
    "relative": dict(pos="relative"),
    "alibi": dict(pos="alibi"),
    "yarn": dict(
        rope_scaling={
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 24,
        }
    ),
    "ntk": dict(rope_scaling={"rope_type": "ntk", "factor": 2.0}),
    "rope_fraction": dict(rope_fraction=0.5),
    "geglu": dict(mlp="geglu"),
    "gelu_erf": dict(mlp="gelu_erf", norm="layer", norm_bias=True),
    "qk_norm_all": dict(qk_norm_all=True),
    "embed_norm": dict(embed_norm=True, embed_scale=True),
    "first_norm": dict(first_norm=False),
    "position_offset": dict(pos="learned", position_offset=2),
    "encoder": dict(causal=False),
    "BERT": dict(causal=False, pos="learned", n_types=2, mlm_head=True, bias=True, norm="layer"),
    "window of an encoder": dict(causal=False, window=8),
    "n_encoder_layer": SOURCE,
    "T5": SOURCE | dict(pos="relative", scale_scores=False, qk_norm=False, mlp="relu", n_kv_head=4),
    "Vaswani": SOURCE | dict(pos="sinusoidal", norm_place="post", norm="layer", embed_scale=True),
    "n_experts": EXPERTS,
    "shared experts": EXPERTS | dict(n_shared_experts=1, expert_layers="DE", balance="bias"),
    "mtp": dict(mtp=2),
}


@cache
def tokenizer():
    return char_tokenizer(LETTERS)


@cache
def built(name):
    """A network of an option, loud enough that its attention looks at something."""
    torch.manual_seed(1)
    net = GPT(GPTConfig(**(SHAPE | OPTIONS[name])))
    for parameter_name, p in net.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0.0, 0.2)
        elif parameter_name.endswith("sinks"):
            torch.nn.init.normal_(p)
    net.start_id = net.pad_id = tokenizer().pad_id
    return net.eval()


def fresh(name):
    return copy.deepcopy(built(name))


def batch(net, seed=0, rows=3, length=20):
    """(ids, targets, what else the network is given)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(28, (rows, length), generator=generator)
    if net.config.is_seq2seq:
        return ids, ids.roll(-1, 1), {"encoder_ids": ids.flip(1)}
    targets = ids.roll(-1, 1) if net.config.causal else ids.masked_fill(ids % 3 > 0, -100)
    return ids, targets, {}


def logits_of(net):
    ids, _, options = batch(net)
    with torch.no_grad():
        return net.eval()(ids, **options)


def step(net, optimizers, seed):
    """One step of training: the mean loss."""
    ids, targets, options = batch(net, seed)
    torch.manual_seed(seed)
    loss, n_targets = net.train()(ids, targets, **options)
    (loss / n_targets).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return (loss / n_targets).item()


@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_a_resume(name, tmp_path):
    whole = fresh(name)
    optimizers = make_optimizer(whole, lr=1e-2)
    losses = [step(whole, optimizers, seed) for seed in (0, 1)]
    assert all(loss > 0 for loss in losses)
    save(tmp_path / "run", whole, tokenizer())
    states = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    step(whole, optimizers, 2)

    resumed, _ = load(tmp_path / "run")
    assert resumed.config == built(name).config
    optimizers = make_optimizer(resumed, lr=1e-2)
    restore_optimizers(optimizers, states, "state.pt")
    step(resumed, optimizers, 2)
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), key
    assert torch.equal(logits_of(whole), logits_of(resumed))


# What is done to each linear layer alike is tried out on networks of unlike parts.
UNLIKE = ["layers", "BERT", "T5", "shared experts", "mtp"]


def every(kinds, more):
    """(a kind, an option): of `kinds` all options, of `more` those of UNLIKE."""
    pairs = [(kind, name) for kind in kinds for name in OPTIONS]
    return pairs + [(kind, name) for kind in more for name in UNLIKE]


@pytest.mark.parametrize("adapt, name", every(["lora", "adapter"], ["qlora", "prompt", "last"]))
def test_fine_tuning(adapt, name, tmp_path):
    net = fresh(name)
    torch.manual_seed(0)
    if adapt == "prompt":
        tok = add_prompts(net, tokenizer(), 2)
        assert tok.n_vocab == tokenizer().n_vocab + 2
        return
    config = AdaptConfig("full", 1) if adapt == "last" else AdaptConfig(adapt)
    choose_weights(net, config)
    frozen = {key: p.clone() for key, p in net.named_parameters() if not p.requires_grad}
    step(net, make_optimizer(net, lr=1e-2), 0)
    for key, p in net.named_parameters():
        if key in frozen:
            assert torch.equal(p, frozen[key]), key
    adapted = logits_of(net)
    merge_adapters(net)
    torch.testing.assert_close(logits_of(net), adapted, rtol=1e-3, atol=1e-3)
    save(tmp_path / "tuned", net, tokenizer())
    loaded, _ = load(tmp_path / "tuned")
    assert torch.equal(logits_of(loaded), logits_of(net))


@pytest.mark.parametrize("kind, name", every(["int8"], ["int4"]))
def test_quantization(kind, name, tmp_path):
    net = fresh(name)
    whole = logits_of(net)
    quantize_weights(net, kind)
    quantized = logits_of(net)
    likeness = torch.nn.functional.cosine_similarity(quantized.flatten(), whole.flatten(), 0)
    assert likeness > (0.99 if kind == "int8" else 0.85)
    save(tmp_path / "quantized", net, tokenizer())
    loaded, _ = load(tmp_path / "quantized")
    assert torch.equal(logits_of(loaded), quantized)


def greedy(net, prompt, n):
    """The likeliest tokens behind a prompt, by whole passes without a cache."""
    options = {}
    ids = list(prompt)
    if net.config.is_seq2seq:
        options = {"encoder_ids": torch.tensor([ids])}
        ids = [net.start_id]
    new = []
    for _ in range(n):
        logits = net(torch.tensor([ids + new]), **options)[0, -1]
        new.append(int(logits[: tokenizer().n_vocab].argmax()))
    return new


@pytest.mark.parametrize("name", OPTIONS)
def test_generation_with_a_cache_equals_none(name):
    net = fresh(name)
    tok = copy.copy(tokenizer())
    tok.eos_ids = []
    prompts = [batch(net)[0][0].tolist(), [5, 9, 2]]
    for net.fast in (True, False):
        try:
            with torch.no_grad(), generating(net):
                answers = generate(net, tok, prompts, max_new_tokens=12, temperature=0)
        except UserError as error:
            assert not net.config.causal and "encoder" in str(error)
            continue
        for prompt, answer in zip(prompts, answers):
            with torch.no_grad():
                assert answer.ids == greedy(net, prompt, 12)


@pytest.mark.parametrize("name", OPTIONS)
def test_determinism(name):
    net = fresh(name)
    plain = logits_of(net)
    be_deterministic(net)
    torch.use_deterministic_algorithms(False)
    ids, targets, options = batch(net)
    together = logits_of(net)
    torch.testing.assert_close(together, plain, rtol=1e-4, atol=1e-4)
    for row in range(len(ids)):
        one = {key: value[row : row + 1] for key, value in options.items()}
        with torch.no_grad():
            assert torch.equal(net(ids[row : row + 1], **one)[0], together[row])
    gradients = []
    for is_deterministic in (True, False):
        net.deterministic = is_deterministic
        net.zero_grad()
        net(ids, targets, **options)[0].backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_export_by_name(name, monkeypatch):
    """A family holds it, or the option is named."""
    net = fresh(name)
    names = {*OPTIONS[name], "tokenizer"}  # check_gguf wants a BPE
    for kind in ("hf", "gguf"):
        monkeypatch.setattr(export, "export", kind)
        try:
            family = export.hf_family(net)
            assert re.fullmatch(r"\w+", family)
            names.add(family)
            if kind == "gguf":
                check_gguf(net.config, tokenizer())
        except UserError as error:
            words = str(error)
            assert "\n" not in words
            assert any(option in words for option in names), words


@pytest.mark.parametrize("name", OPTIONS)
def test_what_it_costs_and_looks_like(name):
    net = built(name)
    c = net.config
    assert flops_per_token(c, 32) > 0
    fixed, activations = memory_estimate(c, 1000, 2, 32)
    assert fixed > 0 and activations > 0
    assert describe_model(net)["params"] == sum(p.numel() for p in net.parameters())
    ids = batch(net)[0][0].tolist()
    maps = attention_maps(net, ids, 1)
    assert maps.shape == (c.n_head, len(ids), len(ids))
    pattern = (c.encoder_patterns or c.patterns)[1]
    places = torch.arange(len(ids))
    seen = may_look(pattern, places[:, None], places).expand(len(ids), len(ids))
    assert maps.masked_select(~seen).eq(0).all()
    sums = maps.sum(-1)
    assert (sums < 1).all() if c.sinks else torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
