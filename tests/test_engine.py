"""barelm/engine.py alone, without a server: jobs in, tokens out."""

import asyncio
import copy
import random

import pytest
import torch
from conftest import ROOT

import model
from barelm.checkpoint import load
from barelm.engine import NOT_FINITE, Engine
from barelm.jobs import Job, Sampling, Update, Updates

CODE = (ROOT / "sample.py").read_text(encoding="utf-8")
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def loaded(tiny):
    return load(tiny / "out" / "tiny")


def ignore(update):
    pass


def test_an_engine_needs_no_server(loaded):
    net, tok = loaded
    engine = Engine(net, tok, max_batch=2, max_len=64)
    engine.start()
    jobs, done = [], []
    for i in range(5):
        listener = lambda update: update.done and done.append(update.job)
        sampling = Sampling(top_k=8, seed=i)
        jobs.append(Job(tok, tok.encode("import"), 9, sampling, listener))
    try:
        assert engine.submit(jobs)
        assert engine.call(max, 1, 2).result() == 2  # between two steps
        while len(done) < len(jobs):
            assert engine.is_alive()
    finally:
        engine.stop()
    for i, job in enumerate(jobs):
        how = dict(max_new_tokens=9, top_k=8, seed=i)
        [g] = model.generate(net, tok, ["import"], **how)
        assert job.row.out.text == g.text


@pytest.mark.parametrize("one_behind", [False, True])
def test_slots_that_come_and_go_keep_what_they_hold(loaded, one_behind):
    net, tok = loaded
    engine = Engine(net, tok, max_batch=9, max_len=64, prefill_chunk=40, max_queue=99)
    engine.pass_cost = 4
    engine.on_gpu = one_behind  # tokens are told when the step behind them has begun
    jobs = []
    draw = random.Random(0)
    beginnings = [tok.encode(CODE[i : i + 70])[:30] for i in (0, 400, 800)]
    with torch.inference_mode():
        for _ in range(600):
            if len(jobs) < 60 and draw.random() < 0.15:
                ids = draw.choice(beginnings)[: draw.choice([0, 0, 5, 28, 30])]
                ids += draw.choices(range(500), k=draw.randrange(1, 4))
                jobs.append(Job(tok, ids, draw.choice([1, 2, 25]), GREEDY, listener=ignore))
                engine.submit(jobs[-1:])
            if draw.random() < 0.01 and engine.jobs:
                engine.cancel([draw.choice([*engine.jobs.values()])])
            engine.step()
    done = [job for job in jobs if not job.cancelled]
    assert 40 < len(done) < len(jobs) == 60 and sum(job.n_reused for job in done) > 200
    for job in done:
        [g] = model.generate(net, tok, [job.ids], max_new_tokens=job.row.limit, temperature=0)
        assert job.row.done and job.row.out.ids[: len(g.ids)] == g.ids[: len(job.row.out.ids)]


def test_a_network_of_bfloat16_answers_whoever_comes_and_goes(loaded):
    net, tok = copy.deepcopy(loaded[0]).bfloat16(), loaded[1]
    engine = Engine(net, tok, max_batch=5, max_len=64)
    updates = []
    jobs = []
    for i in range(12):
        sampling = Sampling(seed=i, frequency_penalty=i % 2 / 2)
        jobs.append(Job(tok, [*range(1 + i, 9), i], 1 + i, sampling, updates.append))
    engine.submit(jobs)
    with torch.inference_mode():
        while engine.waiting or engine.jobs:
            engine.step()
    assert [job.n_generated for job in jobs] == [1 + i for i in range(12)]
    assert sum(update.done for update in updates) == 12 and not any(u.error for u in updates)


def test_a_row_without_numbers_leaves_the_others_as_they_are(loaded):
    net, tok = copy.deepcopy(loaded[0]), loaded[1]
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
    prompts = [tok.encode(CODE[i : i + 40])[:12] for i in (0, 200, 400, 600)]
    odd = next(i for i in range(tok.n_vocab) if not any(i in p for p in prompts))
    truth = model.generate(net, tok, prompts, max_new_tokens=9, temperature=0)
    net.model.embed_tokens.weight.data[odd] = torch.nan
    engine = Engine(net, tok, max_batch=3, max_len=64, prefill_chunk=9, max_queue=99)
    updates = {}

    def remember(update):
        updates.setdefault(update.job.index, []).append(update)

    asked = [prompts[0], [*prompts[1], odd], prompts[1], [odd], prompts[2], [*prompts[1], odd]]
    asked += [prompts[3], prompts[1]]
    for i, ids in enumerate(asked):
        engine.submit([Job(tok, ids, 9, GREEDY, remember, index=i)])
    with torch.inference_mode():
        while engine.waiting or engine.jobs:
            engine.step()
    for i, ids in enumerate(asked):
        if odd in ids:
            [update] = updates[i]
            assert update.done and update.error == NOT_FINITE and not update.text
        else:
            text = "".join(update.text for update in updates[i])
            assert text == truth[prompts.index(ids)].text


def test_each_row_has_its_own_filters():
    torch.manual_seed(0)
    logits, uniform = 3 * torch.randn(8, 50), torch.rand(8)
    t, k = [0, 0.5, 1, 2] * 2, [0, 5, 0, 1, 7, 0, 60, 3]
    p, m = [1, 1, 0.5, 1, 0.9, 0.3, 1, 0.8], [0, 0.1, 0, 0, 0, 0, 0.2, 0.05]
    together = model.choose_tokens(logits, uniform, t, k, p, m)
    for i, how in enumerate(zip(t, k, p, m)):
        assert model.choose_tokens(logits[i : i + 1], uniform[i : i + 1], *how) == together[i]


def test_what_a_slow_client_has_not_read_is_one_update(loaded):
    job = Job(loaded[1], [5], 9, GREEDY, ignore)

    async def read():
        waiting = Updates()
        for text, done in (("a", False), ("b", False), ("c", True)):
            waiting.listener(Update(job, text, [text], done))
        [update] = await waiting.take()
        assert (update.text, update.tokens, update.done) == ("abc", ["a", "b", "c"], True)
        at_end = Updates(at_end=True)
        at_end.listener(Update(job, "a", [], False))
        assert not at_end.is_new.is_set()
        at_end.fail(ValueError())
        with pytest.raises(ValueError):
            await at_end.take()

    asyncio.run(read())
