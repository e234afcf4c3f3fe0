"""What a cache keeps where layers see a window: the same answers from fewer bytes."""

import random

import pytest
import torch
from test_model import QWEN3, make_net, random_ids

import model
from barelm.bpe import char_tokenizer
from barelm.decode import Decoder
from barelm.engine import Engine
from barelm.fast import generating
from barelm.jobs import Job, Sampling
from barelm.layouts import Layout, layout_for
from barelm.patterns import PATTERNS, Pattern, may_look
from barelm.scoring import Request, plain_scores, shared_scores
from barelm.tokenizer import Tokenizer
from model import KVCache

N_CTX = 48
ALIBI = dict(pos="alibi", norm="layer", mlp="gelu", bias=True, qk_norm=False)
NETS = {
    "sliding": dict(window=6),
    "mixed": dict(window=5, layers="SSSL", n_layer=4, local_rope_theta=100.0, rope_theta=1e6),
    "first tokens": dict(window=5, sink_tokens=3, layers="SL"),
    "local": dict(window=6, attention="local", layers="LS"),
    "strided": dict(window=4, attention="strided"),
    "fixed": dict(window=8, attention="fixed", sink_tokens=1),
    "alibi": ALIBI | dict(window=7, layers="SL"),
    "relative": dict(window=6, pos="relative", scale_scores=False, n_buckets=8, max_distance=9),
    "scores": dict(window=6, sinks=True, softcap=5.0, logit_softcap=4.0, layers="SL"),
}
PROMPTS = {
    "uneven": [[1, 2, 3], [5], [4, 9] * 13, [7, 8, 9, 10, 11, 12, 1, 2]],
    "even": [[9, 2] * 8, [1, 5] * 8],
    "packed": [[9, 3] * 14, [1], [2], [3], [4], [5]],
}


def net_of(name):
    return make_net(n_ctx=N_CTX, **QWEN3 | NETS[name])


@pytest.fixture(scope="module")
def tok():
    tok = char_tokenizer("abcdefghijklmnopqrstuvwxyz \n.?!😀é")
    endless = Tokenizer(tok.spec, tok.config)
    endless.eos_ids = []
    return endless


# --------------------------------------------------------------------------------------------------
# The arithmetic


def seen_in(places, pattern, query):
    """The positions that a query sees, of [(position that a place is said to hold, position that
    it was given last)]."""
    seen = []
    for said, given in places:
        if said >= 0 and may_look(pattern, torch.tensor(query), torch.tensor(said)):
            assert said == given
            seen.append(said)
    return sorted(seen)


@pytest.mark.parametrize("kind", ["full", *PATTERNS])
def test_every_place_that_is_seen_holds_what_it_is_said_to_hold(kind):
    """Against a list of what each place was given, in rows that grow and are cut."""
    draw = random.Random(kind)
    for _ in range(7):
        window = draw.randint(1, 12) if kind != "full" else 0
        pattern = Pattern(True, kind, window, draw.choice([0, 0, 1, 3]) if window else 0)
        slack = draw.randint(0, 3)
        max_len = draw.randint(4, 50)
        layout = layout_for(pattern, max_len, slack)
        given = [None] * (layout.n + 1)
        length = reached = 0
        for _ in range(12):
            T = min(draw.choice([1, 1, 1, 2, slack + 1, 9]), max_len - length)
            new = range(length, length + T)
            end = torch.tensor([length + T])
            places = layout.to_write(torch.arange(length, length + T)[None], end)[0].tolist()
            assert len({p for p in places if p < layout.n}) == sum(p < layout.n for p in places)
            before = list(zip(layout.positions(torch.tensor([length]))[0].tolist(), given))
            for place, position in zip(places, new):
                given[place] = position
            after = list(zip(layout.positions(end)[0].tolist(), given))
            assert all(said < 0 for said, _ in after[layout.first(length + T) :])
            for query in new:
                keys = torch.arange(query + 1)
                expected = keys[may_look(pattern, torch.tensor(query), keys)].tolist()
                assert seen_in(before + list(zip(new, new)), pattern, query) == expected
                if T <= slack + 1:
                    assert seen_in(after, pattern, query) == expected
            length += T
            reached = max(reached, length)
            cut = draw.randint(max(0, length - slack - 1), length)
            if draw.random() < 0.4 and layout.can_cut(cut, reached):
                length = cut


def test_a_ring_has_no_more_places_than_its_pattern_sees():
    assert layout_for(Pattern(True, "sliding", 16, 4), 999) == Layout(20, 4, 16)
    assert layout_for(Pattern(True, "local", 16), 999).n == 16
    assert layout_for(Pattern(True, "fixed", 32), 320).n == 32 + 10 * 4
    for pattern in (Pattern(), Pattern(True, "strided", 16), Pattern(True, "sliding", 1000)):
        assert layout_for(pattern, 999) == Layout(999, 999)


# --------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("name", NETS)
def test_rows_read_in_pieces_are_what_they_are_without_a_cache(name):
    net = net_of(name)
    cache = KVCache(net.config, 3, N_CTX, "cpu", torch.float32, slack=2)
    rows = random_ids(3, N_CTX)
    whole = KVCache(net.config, 3, N_CTX, "cpu", torch.float32, whole=True)
    assert (cache.nbytes < whole.nbytes) == (name != "strided")
    lengths = [0, 0, 0]
    with torch.no_grad():
        full = net(rows)
        pieces = [(14, 9, 2), (1, 1, 1), (3, 1, 2), (9, 20, 3), (1, 0, 1), *7 * [(1, 1, 1)]]
        for counts in pieces:
            n_new = torch.tensor(counts)
            ids = torch.full((3, max(counts)), 39)  # padding that must not be seen
            for b, n in enumerate(counts):
                ids[b, :n] = rows[b, lengths[b] : lengths[b] + n]
            logits = net(ids, cache=cache, n_new=n_new)
            for b, n in enumerate(counts):
                expected = full[b, lengths[b] : lengths[b] + n]
                torch.testing.assert_close(logits[b, :n], expected, atol=1e-4, rtol=1e-3)
                lengths[b] += n
            if counts == (3, 1, 2):  # what was only a draft is taken back
                lengths = [lengths[0] - 2, lengths[1], lengths[2] - 1]
                cache.truncate(lengths)
    assert cache.lengths.tolist() == lengths


def test_a_ring_is_cut_by_its_slack_and_no_more():
    net = net_of("mixed")
    cache = KVCache(net.config, 2, N_CTX, "cpu", torch.float32, slack=3)
    with torch.no_grad():
        net(random_ids(2, 20), cache=cache)
        cache.truncate([18, 17])
        with pytest.raises(ValueError, match="of 20 tokens is not cut to 16: .* slack of 3"):
            cache.truncate([18, 16])
        cache.truncate([0, 17])  # nothing is left that could be wrong
        assert cache.lengths.tolist() == [0, 17]


@pytest.mark.parametrize(
    "name, prompts", [(name, "uneven") for name in NETS] + [("mixed", "packed"), ("fixed", "even")]
)
def test_generation_is_that_of_whole_passes_without_a_cache(name, prompts, tok, monkeypatch):
    net = net_of(name)
    if prompts == "packed":
        monkeypatch.setattr("barelm.decode.pays_to_pack", lambda *_: True)
    prompts = PROMPTS[prompts]
    expected = [without_cache(net, tok, prompt, 13) for prompt in prompts]
    for net.fast in (True, False):
        answers = model.generate(net, tok, prompts, max_new_tokens=13, temperature=0)
        assert [answer.ids for answer in answers] == [ids for ids, _ in expected]
        for answer, (_, logprobs) in zip(answers, expected):
            assert answer.logprobs == pytest.approx(logprobs, abs=2e-4)


def test_a_mistral_goes_on_beyond_its_window_as_transformers(tok):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    config = transformers.MistralConfig(**shape, sliding_window=6, eos_token_id=None)
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.lm_head.weight.data[tok.n_vocab :] = 0  # ids of no token
    own = dict(qk_norm=False, tie=False, n_hidden=48, window=6)
    net = make_net(n_ctx=N_CTX, **QWEN3 | own)
    net.load_state_dict(theirs.state_dict())
    for net.fast in (True, False):
        answers = model.generate(net, tok, PROMPTS["uneven"], max_new_tokens=18, temperature=0)
        for prompt, answer in zip(PROMPTS["uneven"], answers):
            options = dict(max_new_tokens=18, do_sample=False, pad_token_id=0)
            ids = torch.tensor([prompt])
            [out] = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()
            assert answer.ids == out[len(prompt) :] and len(set(answer.ids)) > 4


@pytest.mark.parametrize("name", ["first tokens", "fixed"])
def test_beams_and_scores_are_those_of_a_cache_that_keeps_all(name, tok, monkeypatch):
    net = net_of(name)
    prompts = [[4, 9] * 9, [7, 8, 9]]
    beams = model.generate(net, tok, prompts, max_new_tokens=16, num_beams=3)
    requests = []
    for i in range(4):  # one context of its own, several continuations of a common one
        ends = random_ids(3, 12).tolist()
        requests.append(
            Request("", [1, 2] * 12 + [i], [ids[: 3 * n + 1] for n, ids in enumerate(ends)])
        )
    with torch.no_grad():
        for ours, plain in zip(shared_scores(net, requests), plain_scores(net, requests)):
            assert ours == pytest.approx(plain, abs=1e-3)
    monkeypatch.setattr(model, "layout_for", lambda pattern, n, *_: Layout(n, n))
    for a, b in zip(beams, model.generate(net, tok, prompts, max_new_tokens=16, num_beams=3)):
        assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def without_cache(net, tok, prompt, n):
    """(ids, log p) of the n likeliest tokens, by a whole pass for each."""
    ids = list(prompt)
    logprobs = []
    for _ in range(n):
        with torch.no_grad():
            logits = model.head(net, tok, net.hidden(torch.tensor([ids]))[0, -1])
        ids.append(logits.argmax().item())
        logprobs.append(logits.log_softmax(-1).max().item())
    return ids[len(prompt) :], logprobs


# --------------------------------------------------------------------------------------------------
# Slots


@pytest.mark.parametrize("name", ["mixed", "first tokens", "local", "fixed"])
def test_a_slot_goes_on_from_where_it_is_and_not_from_before(name, tok):
    net = net_of(name)
    ids = random_ids(1, 40)[0].tolist()
    with generating(net), torch.no_grad():
        full = net.hidden(torch.tensor([ids]))[0]
        decoder = Decoder(net, tok, 3, N_CTX, slack=2)
        decoder.set(1, ids[:30], 4)
        for begin, end in ((0, 4), (4, 25), (25, 30)):  # chunks shorter and longer than the ring
            states = decoder.read({1: ids[begin:end]})[1]
            torch.testing.assert_close(states, full[begin:end], atol=1e-4, rtol=1e-3)
        assert [n for n in range(31) if decoder.can_begin(1, n)] == [0, 28, 29, 30]
        decoder.copy(2, 1, 29)
        for slot, begin in ((2, 29), (1, 28)):
            decoder.set(slot, ids, 4, n_cached=begin)
            states = decoder.read({slot: ids[begin:]})[slot]
            torch.testing.assert_close(states, full[begin:], atol=1e-4, rtol=1e-3)
        decoder.set(2, ids[:3], 4)  # what the slot held before is forgotten
        torch.testing.assert_close(decoder.read({2: ids[:3]})[2], full[:3], atol=1e-4, rtol=1e-3)
        assert all(decoder.can_begin(2, n) for n in range(4))
        decoder.wipe(2)
        assert not any(group.store[:, :, 2].any() for group in decoder.stores.groups)


def test_layers_keep_no_more_than_they_need(tok):
    net = net_of("mixed")
    decoder = Decoder(net, tok, 2, N_CTX)
    a_place = 2 * 2 * net.config.n_kv_head * net.config.head_dim * 4  # k and v, slots, float32
    assert decoder.nbytes == a_place * (3 * (5 + 1) + N_CTX + 1)
    net.deterministic = True  # to the bit as without a cache: keys in their order
    assert Decoder(net, tok, 2, N_CTX).nbytes == a_place * 4 * (N_CTX + 1)


@pytest.mark.parametrize("one_behind", [False, True])
def test_an_engine_reuses_what_a_ring_still_has(one_behind, tok):
    """Chats that go on, prompts that begin alike: as if each were alone."""
    net = net_of("mixed")
    engine = Engine(net, tok, max_batch=4, max_len=N_CTX, prefill_chunk=9)
    engine.pass_cost = 1
    engine.on_gpu = one_behind
    draw = random.Random(1)
    first = random_ids(1, 12)[0].tolist()
    jobs = []

    def ask(ids):
        jobs.append(Job(tok, ids, draw.randint(1, 4), Sampling(temperature=0.0), ignore))
        engine.submit(jobs[-1:])
        return jobs[-1]

    with generating(net), torch.inference_mode():
        chats = [ask(first[:n]) for n in (12, 12, 3, 12)]
        for _ in range(150):
            engine.step()
            for i, job in enumerate(chats):
                if job.row.done and len(job.ids) < 32:  # the next turn, or a second one like it
                    more = draw.choices(range(30), k=draw.randint(1, 4))
                    again = job.ids + job.row.out.ids
                    if draw.random() < 0.3:  # another turn in place of an earlier one
                        again = job.ids[: draw.randint(1, len(job.ids))]
                    chats[i] = ask(again + more)
    assert len(jobs) > 12 and all(job.row.done for job in jobs)
    assert sum(job.n_reused for job in jobs if len(job.ids) > 16) > 100
    for job in jobs:
        [answer] = model.generate(net, tok, [job.ids], max_new_tokens=job.row.limit, temperature=0)
        assert job.row.out.ids == answer.ids
        assert job.row.out.logprobs == pytest.approx(answer.logprobs, abs=1e-4)


def ignore(update):
    pass
