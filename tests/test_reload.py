"""barelm/reload.py: a server takes over the weights that a run has saved since."""

import copy
import shutil
import threading

import pytest
import torch

import model
from barelm.checkpoint import load, save
from barelm.engine import Engine
from barelm.jobs import Job, Sampling
from barelm.quantized import quantize_weights
from barelm.reload import Weights
from barelm.run import UserError

PROMPT = "import os\nimport sys\n"


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny / "out/tiny", tmp_path / "tiny", ignore=lambda *_: ["best"])


def changed(net):
    """Another state of the same model."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return net


def ask(engine, tok, n=12, listener=None):
    """A greedy job of PROMPT, submitted, and an event that is set when it has ended."""
    ended = threading.Event()

    def listen(update):
        if listener:
            listener(update)
        if update.done:
            ended.set()

    job = Job(tok, tok.encode(PROMPT), n, Sampling(temperature=0.0), listen)
    assert engine.submit([job])
    return job, ended


def answer(engine, tok):
    job, ended = ask(engine, tok)
    assert ended.wait(60)
    return job.row.out.text, job.n_reused


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("fast", [True, False])
def test_what_is_served_behind_a_reload_is_what_the_folder_holds(folder, quantize, fast):
    weights = Weights(folder)
    net, tok = load(folder, quantize=quantize, fast=fast)
    before = model.generate(net, tok, [PROMPT], max_new_tokens=12, temperature=0)[0].text
    addresses = {name: p.data_ptr() for name, p in net.named_parameters()}
    engine = Engine(net, tok, max_batch=3, max_len=64)
    engine.pass_cost = 1
    engine.start()
    weights.serves(engine, tok)
    try:
        assert not weights.are_new() and weights.step == 60
        assert answer(engine, tok) == (before, 0)
        assert answer(engine, tok)[1] > 0  # of the same prompt keys and values are used again
        new = changed(load(folder)[0])
        save(folder, new, tok, step=90)
        assert weights.are_new() and (weights.step, weights.step_on_disk()) == (60, 90)
        weights.read()
        assert engine.when_idle(weights.take).result(60) == 90
        assert not weights.are_new() and weights.step == 90
        if quantize:
            quantize_weights(new, quantize)
        new.fast = fast
        after = model.generate(new, tok, [PROMPT], max_new_tokens=12, temperature=0)[0].text
        assert after != before
        assert answer(engine, tok) == (after, 0)  # nothing of the old ones is
    finally:
        engine.stop()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name
    # In their places, where a CUDA graph reads them.
    assert {name: p.data_ptr() for name, p in net.named_parameters()} == addresses


def test_who_runs_ends_with_the_old_weights_and_who_waits_begins_with_the_new(folder):
    weights = Weights(folder)
    net, tok = load(folder)
    new = changed(net)
    texts = []
    for one in (net, new):
        [g] = model.generate(one, tok, [PROMPT], max_new_tokens=40, temperature=0)
        texts.append(g.text)
    engine = Engine(net, tok, max_batch=3, max_len=64)
    weights.serves(engine, tok)
    save(folder, new, tok, step=90)
    weights.read()
    taken = []
    first_token = threading.Event()

    def listener(update):  # in the engine's thread: the first job is in the batch
        if not first_token.is_set():
            first_token.set()
            taken.append(engine.when_idle(weights.take))
            jobs.append(ask(engine, tok, 40))

    jobs = [ask(engine, tok, 40, listener)]
    engine.start()
    try:
        assert first_token.wait(60)
        for _, ended in jobs:
            assert ended.wait(60)
        assert taken[0].done()
        assert [job.row.out.text for job, _ in jobs] == texts
    finally:
        engine.stop()


def test_another_model_is_refused_and_the_old_one_goes_on(folder):
    weights = Weights(folder)
    net, tok = load(folder)
    engine = Engine(net, tok, max_batch=1, max_len=64)
    weights.serves(engine, tok)
    state = copy.deepcopy(net.state_dict())
    wider = model.GPT(model.GPTConfig(**net.config.__dict__ | {"n_hidden": 96}))
    save(folder, wider, tok, step=90)
    with pytest.raises(UserError, match=r"another model by now \(n_hidden \d+ -> 96\): start"):
        weights.read()
    other = copy.copy(tok)
    other.config = tok.config | {"chat_template": "{{ messages }}"}
    save(folder, net, other, step=90)
    with pytest.raises(UserError, match="another tokenizer or chat template"):
        weights.read()
    (folder / "model.safetensors").write_bytes(b"\0" * 9)
    assert weights.are_new() and weights.step_on_disk() == -1
    with pytest.raises(UserError):
        weights.read()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])
