"""barelm/invariant.py: the same bits alone, among others and in the trainer; the plain values."""

import copy
import json

import pytest
import torch
from conftest import run
from test_finetune import net_for

from barelm.adapters import AdaptConfig, add_lora
from barelm.alike import Ids, batch_invariance, net_and_prompts
from barelm.engine import Engine
from barelm.invariant import KNOWN, be_deterministic, blockwise, linear
from barelm.jobs import Job, Sampling
from barelm.quantized import quantize_weights
from barelm.tokenizer import Tokenizer
from model import generate

SHAPES = {
    "grouped heads": dict(n_ctx=112),
    "odd widths": dict(vocab_size=97, n_head=3, n_kv_head=3, n_embd=45, head_dim=10, n_hidden=77),
    "like GPT-2": dict(
        n_embd=36, n_head=4, n_kv_head=4, norm="layer", bias=True, qk_norm=False, mlp="gelu",
        pos="learned", n_ctx=150,
    ),
    "sinusoids": dict(n_embd=48, n_head=3, n_kv_head=1, pos="sinusoidal", mlp="relu2", tie=False),
}  # fmt: skip


def deterministic_net(**shape):
    net, prompts = net_and_prompts("cpu", 6, shape)
    be_deterministic(net)
    return net.eval(), prompts


@pytest.mark.parametrize("name", SHAPES)
def test_an_answer_has_the_same_bits_alone_among_others_and_in_the_trainer(name):
    figures = batch_invariance("cpu", n_rows=64 if name == "grouped heads" else 24, **SHAPES[name])
    assert (figures["alone"], figures["trainer"], figures["chunks"]) == (0, 0, 0)


def test_in_bfloat16_too():
    figures = batch_invariance("cpu", torch.bfloat16, n_rows=9, n_ctx=112)
    assert (figures["alone"], figures["trainer"]) == (0, 0)


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_have_the_bits_that_they_have_alone(name):
    net, _ = deterministic_net(**SHAPES[name])
    documents = [torch.randint(97, (n,)) for n in (5, 64, 1, 30, 50)]
    packed = torch.cat(documents)[None]
    lengths = torch.tensor([len(ids) for ids in documents])
    docs = torch.arange(5).repeat_interleave(lengths)[None]
    with torch.no_grad():
        states = net.hidden(packed, docs=docs)[0]
        for ids, state in zip(documents, states.split(lengths.tolist())):
            assert state.equal(net.hidden(ids[None])[0])


@pytest.mark.parametrize("width", [6, 9, 10, 16, 20, 33])
def test_heads_of_any_width_look_alike_alone_and_among_others(width):
    """What a library does with the rest of a row, behind its vectors, differs between CPUs."""
    q, k, v = torch.randn(3, 4, 2, 70, width).unbind()
    whole = blockwise(q, k, v, None)
    for i, t in ((0, 1), (1, 7), (2, 64), (3, 66)):
        one = slice(i, i + 1)
        assert blockwise(q[one, :, :t], k[one, :, :t], v[one, :, :t], None).equal(whole[one, :, :t])


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_the_plain_ones(name):
    net, prompts = deterministic_net(**SHAPES[name])
    plain = copy.deepcopy(net).double()
    plain.deterministic = False
    ids = torch.tensor([ids[:1] * 2 + list(range(90)) for ids in prompts])
    docs = torch.tensor([[0] * 50 + [1] * 42] * len(ids))
    for options in ({}, {"docs": docs}):
        losses = []
        for network in (net, plain):
            network.zero_grad()
            loss, _ = network(ids, ids.roll(-1, 1), **options)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        largest = max(q.grad.norm() for q in plain.parameters())
        for (name, p), q in zip(net.named_parameters(), plain.parameters()):
            # Some gradients are zero: a bias of the keys moves no probability.
            assert (p.grad - q.grad).norm() < 1e-4 * (q.grad.norm() + 0.1 * largest), name


def test_a_mask_of_numbers():
    """Such as ALiBi's, another for each head: blocks of 64 keys against one softmax."""
    net, _ = deterministic_net()
    q, k, v = torch.randn(3, 2, 6, 100, 8)
    bias = torch.randn(1, 6, 100, 100).masked_fill(torch.ones(100, 100).triu(1) > 0, -torch.inf)
    y = net.ops.attend(q, k[:, :2], v[:, :2], bias)
    k, v = (t[:, :2].repeat_interleave(3, 1) for t in (k, v))
    expected = ((q @ k.mT) / 8**0.5 + bias).softmax(-1) @ v
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(128, 48, 16), (16,), (48,), (1,)])
def test_products_in_any_number_of_rows(counts):
    """The counts that another machine may find are right too."""
    layer = torch.nn.Linear(33, 65)
    x = torch.randn(5, 43, 33)
    linear(x, layer)  # finds this machine's
    [key] = [key for key in KNOWN if key[0] == layer.weight.shape]
    before = KNOWN[key]
    KNOWN[key] = counts
    try:
        torch.testing.assert_close(linear(x, layer), layer(x))
    finally:
        KNOWN[key] = before


@pytest.mark.parametrize("kind", ["lora", "int8", "int4"])
def test_adapted_and_quantized_layers(kind):
    net, prompts = deterministic_net()
    if kind == "lora":
        add_lora(net, AdaptConfig(adapt="lora"))
        for name, p in net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    else:
        quantize_weights(net, kind)
    tok = Ids(net.config.vocab_size)
    how = dict(max_new_tokens=4, temperature=0)
    together = generate(net, tok, prompts, **how)
    for prompt, answer in zip(prompts[:2], together):
        assert generate(net, tok, [prompt], **how) == [answer]


def test_a_sampled_answer_and_the_server(tiny):
    """Of an engine that reads prompts in chunks of 7 and decodes 3 sequences at a time."""
    tok = Tokenizer.from_folder(tiny / "out/tiny")
    net = net_for(tok).eval()
    be_deterministic(net)
    texts = ["import os", "def f(x):\n    return x", "class A:", "# a comment of some length"]
    prompts = [tok.encode(text) for text in texts]
    jobs = []
    tokens = {}
    for i, ids in enumerate(prompts):
        tokens[i] = []
        listener = lambda update, i=i: tokens[i].extend(update.tokens)
        sampling = Sampling(seed=5, temperature=0.7 + 0.1 * i)
        jobs.append(Job(tok, ids, 12, sampling, listener, ends=[], n_alternatives=1))
    engine = Engine(net, tok, max_batch=3, max_len=64, prefill_chunk=7)
    with torch.inference_mode():
        assert engine.submit(jobs)
        while engine.jobs or engine.waiting:
            engine.step()
    tok.eos_ids = []
    for i, ids in enumerate(prompts):
        others = prompts[:i] + prompts[i + 1 :]
        how = dict(max_new_tokens=12, temperature=0.7 + 0.1 * i, seed=5)
        [alone] = generate(net, tok, [ids], **how)
        first, *_ = generate(net, tok, [ids, *others], **how)
        assert alone == first
        assert alone.ids == [token.id for token in tokens[i]]
        assert alone.logprobs == [token.logprob for token in tokens[i]]


def test_the_policy_that_drew_is_the_policy_that_learns(tiny, tmp_path):
    """In the first update nothing has changed: not even in the last bit."""
    out = tmp_path / "out"
    run(
        tiny, "rl.py", f"--model={tiny / 'out/tiny'}", "--dataset=arithmetic", f"--out_dir={out}",
        "--deterministic", "--dtype=float32", "--max_steps=1", "--batch_size=3", "--group_size=3",
        "--max_new_tokens=9", "--micro_tokens=100", "--eval_examples=2", "--minibatches=1",
        "--rl_epochs=1",
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "approx_kl" in row]
    assert len(steps) == 1
    for row in steps:
        assert (row["approx_kl"], row["clipfrac"]) == (0, 0)


def test_training_computes_what_sampling_does(tiny, tmp_path):
    """train.py takes the key, and does not compile."""
    args = ["--max_steps=2", "--deterministic", "--compile", f"--out_dir={tmp_path / 'out'}"]
    done = run(tiny, "train.py", "config/tiny.py", *args)
    assert "compile: off" in done.stdout
    args = [f"--model={tmp_path / 'out'}", "--deterministic", "--max_new_tokens=5", "--prompt=def"]
    assert run(tiny, "sample.py", *args).stdout.startswith("def")
