"""What each of two processes does for tests/test_tensor_parallel.py, in a folder with out/tiny."""

import sys
from functools import partial

import torch

from barelm.attention_maps import attention_maps
from barelm.caller import Caller, no_gradients
from barelm.checkpoint import load
from barelm.engine import Engine
from barelm.fast import generating
from barelm.jobs import Job, Sampling
from barelm.mesh import open_mesh
from barelm.mirror import Mirror
from barelm.optim import make_optimizer
from barelm.parallel import exchanging, parallelize
from barelm.parts import sum_partial_gradients, whole_tensor
from barelm.run import Run, Updater, end_process, setup
from barelm.tensor_parallel import split_heads
from model import GPT, GPTConfig

ROWS = 4
LENGTH = 32
BASE = dict(vocab_size=64, n_ctx=LENGTH, n_layer=2, n_head=4, n_embd=32, n_hidden=64)
# Each has several of what is computed with a process's own heads, or tokens.
KINDS = {
    "windows, grouped": dict(n_kv_head=2, window=8, layers="SL"),
    "gpt2": dict(norm="layer", bias=True, mlp="gelu", pos="learned", qk_norm=False, tie=False),
    "one head of keys": dict(n_kv_head=1, qkv_bias=True, attention="strided", window=8),
    "t5, an odd vocabulary": dict(pos="relative", scale_scores=False, vocab_size=63),
    "alibi, norms behind": dict(pos="alibi", norm_place="both"),
    "sinks, caps": dict(sinks=True, softcap=20.0, logit_softcap=9.0, window=9, sink_tokens=2),
}


def train(run, kind, n_steps, has_docs=False, fast=True, recompute=False, **sizes):
    """[loss, norm of the gradients] of each step, and the weights in the end, {name: tensor}."""
    run.mesh = open_mesh(run, **sizes)
    torch.manual_seed(0)
    net = GPT(GPTConfig(**BASE | KINDS[kind]), fast=fast)
    net.checkpoint = recompute
    network = parallelize(net, run.mesh)
    updater = Updater(run, net.parameters(), make_optimizer(net, "adamw", 3e-3), grad_clip=1.0)
    figures = []
    vocabulary = net.config.vocab_size
    docs = (torch.arange(LENGTH) // 10).expand(ROWS, -1) if has_docs else None
    n_exchanging = run.mesh.sizes.replica * run.mesh.sizes.shard
    for step in range(n_steps):
        torch.manual_seed(step)
        ids = torch.randint(0, vocabulary, (ROWS, LENGTH))
        targets = (ids * 3 + 1) % vocabulary
        targets[0, :5] = -100
        n_targets = ROWS * LENGTH - 5
        with exchanging(network, run.mesh.sizes, is_last=True):
            loss, _ = network(ids, targets, docs=docs)
            updater.backward(loss * (n_exchanging / n_targets))
        norm = float(updater.clip_gradients())
        [loss] = run.sum(loss.detach() * run.mesh.counts)
        updater.step(step, loss / n_targets, norm)
        figures.append([loss / n_targets, norm])
    weights = {name: whole_tensor(p.detach()) for name, p in net.named_parameters()}
    return torch.tensor(figures), weights


def compare(run, kind, n_steps, sizes, **options):
    """Check that the processes together compute what one computes alone."""
    alone, weights_alone = train(Run(run.device), kind, n_steps, **options)
    figures, weights = train(run, kind, n_steps, **options, **sizes)
    words = f"{kind} {sizes} {options}"
    assert alone[-1, 0] < alone[0, 0], words
    torch.testing.assert_close(figures, alone, atol=1e-5, rtol=1e-5, msg=lambda m: f"{words}: {m}")
    for name, weight in weights.items():
        difference = (weight - weights_alone[name]).abs().max()
        assert difference < 2e-4, (words, name, difference)


def compare_others(run):
    """The same of the gradients of an encoder with a head of its own, and of an encoder-decoder."""
    bert = dict(causal=False, mlm_head=True, norm="layer", bias=True, norm_place="post")
    t5 = dict(n_encoder_layer=1, pos="relative", n_kv_head=2)
    for shape in (bert, t5):
        nets = []
        for sizes in ({}, dict(tp=2), dict(parallel="fsdp")):
            here = run if sizes else Run(run.device)
            torch.manual_seed(0)
            net = GPT(GPTConfig(**BASE | shape))
            parallelize(net, open_mesh(here, **sizes))
            ids = torch.randint(0, 64, (2, 12))
            options = {"encoder_ids": ids.flip(1)} if net.config.is_seq2seq else {}
            loss, _ = net(ids, (ids * 3 + 1) % 64, **options)
            loss.backward()
            sum_partial_gradients(net.parameters())
            nets.append((loss.detach(), net))
        loss_alone, alone = nets[0]
        for loss, net in nets[1:]:
            torch.testing.assert_close(loss, loss_alone)
            same_gradients(net, alone)


def same_gradients(net, alone):
    """Check that a divided network has the gradients of one that is whole."""
    for (name, p), p_alone in zip(net.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(
            whole_tensor(p.grad),
            p_alone.grad,
            atol=1e-5,
            rtol=1e-4,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def generate_all(engine, tok):
    """The ids of some texts, in one batch; the Tokens of a prompt; what its tokens look at."""
    tokens = {}  # {index of a job: its tokens}

    def listen(update):
        tokens.setdefault(update.job.index, []).extend(update.tokens)

    jobs = []
    for index, prompt in enumerate(("import os", "def f(", "import sys")):
        sampling = Sampling(temperature=float(index > 0))
        jobs.append(Job(tok, tok.encode(prompt), 8, sampling, listen, index))
    options = dict(n_alternatives=1, echo="class A")  # its prompt is scored
    jobs.append(Job(tok, tok.encode("class A"), 2, Sampling(), listen, len(jobs), **options))
    engine.start()
    engine.submit(jobs)
    maps = engine.call(attention_maps, engine.net, tok.encode("a = b"), 1).result()
    while engine.jobs or engine.waiting:
        engine.call(len, ()).result()
    engine.stop()
    return [job.row.out.ids for job in jobs], tokens[len(jobs) - 1], maps


def serve(run):
    """Check that an Engine over both processes gives the tokens of one alone."""
    mesh = open_mesh(run, tp=2)
    net, tok = load("out/tiny", split=partial(split_heads, mesh=mesh))
    q_proj = net.model.layers[0].self_attn.q_proj.weight
    assert q_proj.to_local().numel() * 2 == q_proj.numel()
    mirror = Mirror()
    mirror.knows(net=net, tok=tok)
    if not run.is_main:
        mirror.knows(engine=Caller(net))
        with generating(net), no_gradients(net):
            mirror.follow()
        return
    engine = Engine(net, tok, max_batch=3, max_len=32, mirror=mirror)
    mirror.knows(engine=engine)
    ids, scored, maps = generate_all(engine, tok)
    mirror.end()
    net, tok = load("out/tiny")
    ids_alone, scored_alone, maps_alone = generate_all(Engine(net, tok, 3, 32), tok)
    assert ids == ids_alone
    torch.testing.assert_close(maps, maps_alone)
    for token, alone in zip(scored, scored_alone, strict=True):
        assert abs((token.logprob or 0) - (alone.logprob or 0)) < 1e-4  # the first has none


run = setup("cpu")
torch.set_num_threads(1)
if sys.argv[1] == "train":
    compare(run, "windows, grouped", 20, dict(tp=2), has_docs=True)
    compare(run, "windows, grouped", 20, dict(cp=2), has_docs=True, recompute=True)
    for kind in KINDS:
        compare(run, kind, 2, dict(tp=2), fast=kind != "gpt2", recompute=kind == "gpt2")
        compare(run, kind, 2, dict(cp=2))
    compare_others(run)
else:
    serve(run)
run.say("the same")
run.wait()
end_process(0)
