"""barelm/speculate.py: the text is distributed as without a draft, and greedy text is the same."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_model import OURS, QWEN3, SHAPES, make_net, random_ids
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from barelm import speculate
from barelm.bpe import char_tokenizer
from barelm.checkpoint import load, save
from barelm.families import family
from barelm.invariant import be_deterministic
from barelm.muon import Muon
from barelm.optim import flops_per_token, make_optimizer, memory_estimate
from barelm.run import UserError
from barelm.speculate import HeadsDraft, verify, what_followed
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate

SMALL = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 1, 2]]


@pytest.fixture(scope="module")
def tok():
    return char_tokenizer("abcdefghijklmnopqrstuvwxyz \n.?!😀é")


# The rule


def random_distribution(generator, sharpness):
    return (sharpness * torch.randn(5, generator=generator)).softmax(0)


PAIRS = {"even": (0.5, 0.5), "sharp": (3.0, 3.0), "sure": (90.0, 1.0), "a sure draft": (1.0, 90.0)}


@pytest.mark.parametrize("is_proposed", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_an_accepted_or_replaced_draft_is_distributed_by_p(name, is_proposed):
    generator = torch.Generator().manual_seed(4)
    of_p, of_q = PAIRS[name]
    p = random_distribution(generator, of_p)
    q = random_distribution(generator, of_q)
    n = 256  # draws, evenly over [0, 1): each cut between two outcomes is at most 1 / n off
    steps = (torch.arange(n) + 0.5) / n
    grid = torch.cartesian_prod(torch.arange(5.0), steps, steps)  # draft, decision, last draw
    drafts = grid[:, :1].long()
    both = torch.stack((p, random_distribution(generator, 1.0))).expand(len(grid), -1, -1)
    proposed = torch.full_like(drafts, is_proposed, dtype=torch.bool)
    n_accepted, behind = verify(both, q.expand(len(grid), 1, -1), drafts, proposed, grid[:, 1:])
    first = drafts[:, 0].where(n_accepted > 0, behind)
    weights = q[drafts[:, 0]].double() / n**2
    found = torch.zeros(5, dtype=torch.float64).scatter_add_(0, first, weights)
    # Two cuts for each draft: where it is accepted, and between the tokens in its place.
    assert (found - p).abs().max() <= 3 / n
    assert (n_accepted > 0).any() == is_proposed
    # What follows an accepted draft is distributed by the network's next p.
    followed = torch.zeros(5, dtype=torch.float64).scatter_add_(
        0, behind, weights * (n_accepted > 0)
    )
    share = torch.minimum(p, q).sum() if is_proposed else torch.tensor(0.0)
    assert (followed - share * both[0, 1]).abs().max() <= 3 / n


def naive_probabilities(logits, ids, options):
    """What one token is drawn by, written out for a single row."""
    logits = logits.clone()
    for i in set(ids):
        factor = options.get("repetition_penalty", 1.0)
        logits[i] = logits[i] / factor if logits[i] > 0 else logits[i] * factor
    probs = (logits / options.get("temperature", 1.0)).softmax(0)
    order = probs.argsort(descending=True).tolist()
    kept = order[: options.get("top_k") or len(order)]
    total = sum(probs[i] for i in kept)
    before = 0.0
    left = torch.zeros_like(probs)
    for i in kept:
        if before < options.get("top_p", 1.0) * total:
            left[i] = probs[i]
        before += probs[i]
    left[left < options.get("min_p", 0.0) * left.max()] = 0
    return left / left.sum()


def chances_of_texts(net, tok, prompt, n, options):
    """{ids: probability} of all texts of at most n tokens behind a prompt."""
    chances = {}
    texts = [((), 1.0)]
    while texts:
        ids, chance = texts.pop()
        if len(ids) == n or (ids and ids[-1] in tok.eos_ids):
            chances[ids] = chance
            continue
        said = [*prompt, *ids]
        logits = net(torch.tensor([said]))[0, -1, : tok.n_vocab]
        probs = naive_probabilities(logits, said, options)
        texts += [((*ids, i), chance * p) for i, p in enumerate(probs.tolist()) if p > 0]
    return chances


def chi_squared(generations, chances):
    """(the statistic, its degrees of freedom) of counts against chances; texts that are expected
    less than 5 times count as one. Infinite where a text came that cannot."""
    counts = dict.fromkeys(chances, 0)
    for g in generations:
        if tuple(g.ids) not in counts:
            return math.inf, 1
        counts[tuple(g.ids)] += 1
    cells = []
    rare = [0, 0.0]
    for ids, chance in chances.items():
        expected = chance * len(generations)
        if expected >= 5:
            cells.append((counts[ids], expected))
        else:
            rare = [rare[0] + counts[ids], rare[1] + expected]
    if rare[1] > 0:
        cells.append(rare)
    return sum((count - expected) ** 2 / expected for count, expected in cells), len(cells) - 1


OPTIONS = [
    dict(temperature=0.8, repetition_penalty=1.4),
    dict(temperature=2.0, top_k=6, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("draft", ["lookup", "network", "heads"])
@torch.no_grad()
def test_texts_are_distributed_as_without_a_draft(draft, options):
    tok = char_tokenizer("abcd")
    net = make_net(vocab_size=16, **QWEN3, mtp=2)
    net.lm_head.weight.div_(2)  # or nearly all is on a few texts
    small = make_net(vocab_size=16, **SMALL)
    prompt = [1, 2, 0, 1, 2]
    chances = chances_of_texts(net, tok, prompt, 3, options)
    n = 4000
    how = options | dict(max_new_tokens=3, seed=7)
    other = small if draft == "network" else draft
    texts = generate(net, tok, [prompt] * n, **how, speculate=2, draft=other)
    statistic, freedom = chi_squared(texts, chances)
    # Its mean is the degrees of freedom, its variance twice as much.
    limit = freedom + 5 * math.sqrt(2 * freedom)
    assert freedom > 20 and statistic < limit
    assert 0 < sum(g.accepted for g in texts) < sum(g.drafted for g in texts)
    # What the draft says by itself is far from it: the statistic tells.
    if draft == "network":
        statistic, _ = chi_squared(generate(small, tok, [prompt] * n, **how), chances)
        assert statistic > 10 * limit


# Whole generations


def drafts_for(net):
    drafts = {"network": make_net(**SMALL), "itself": net, "lookup": "lookup"}
    return drafts | ({"heads": "heads"} if net.config.mtp else {})


ALL = SHAPES | OURS
ALL |= {
    "windows": QWEN3 | dict(window=5, layers="SL"),
    "alibi": QWEN3 | dict(pos="alibi", window=6, attention="strided"),
    "relative": QWEN3 | dict(pos="relative", softcap=5.0, logit_softcap=3.0),
    "experts": QWEN3 | dict(n_experts=4),
}


@pytest.mark.parametrize("name", ALL)
def test_greedy_texts_are_the_same(name, tok):
    shape = ALL[name]
    net = make_net(**shape, mtp=0 if shape.get("norm_place") == "post" else 3)
    how = dict(max_new_tokens=24, temperature=0)
    expected = generate(net, tok, PROMPTS, **how)
    for which, draft in drafts_for(net).items():
        texts = generate(net, tok, PROMPTS, **how, speculate=3, draft=draft)
        assert [g.ids for g in texts] == [g.ids for g in expected], which
        assert [g.finish_reason for g in texts] == [g.finish_reason for g in expected]
        for g, right in zip(texts, expected):
            assert g.logprobs == pytest.approx(right.logprobs, abs=1e-4)
            if which == "itself":
                assert g.accepted == g.drafted and g.passes <= 2 + len(g.ids) // 4


def test_texts_end_at_end_tokens_stop_strings_and_the_context(tok):
    net = make_net(**QWEN3)
    [free] = generate(net, tok, [[1, 2, 3]], max_new_tokens=12, temperature=0)
    ended = Tokenizer(tok.spec, tok.config)
    ended.eos_ids = [free.ids[5]]
    prompts = [[1, 2, 3], [4] * 30]
    for tokenizer, stop in ((ended, ()), (tok, free.text[3:5])):
        how = dict(max_new_tokens=12, temperature=0, stop=stop)
        expected = generate(net, tokenizer, prompts, **how)
        pieces = [""] * 2

        def emit(i, piece):
            pieces[i] += piece

        # The net as its own draft: whatever ends a text ends it among accepted drafts.
        texts = generate(net, tokenizer, prompts, **how, speculate=4, draft=net, on_text=emit)
        assert [g.ids for g in texts] == [g.ids for g in expected]
        assert [g.text for g in texts] == [g.text for g in expected] == pieces
        assert [g.finish_reason for g in texts] == ["stop", "length"]


@pytest.mark.parametrize("draft", ["network", "lookup", "heads"])
def test_texts_do_not_depend_on_their_batch_and_repeat_by_seed(draft, tok):
    net = make_net(**QWEN3, mtp=3)
    how = dict(temperature=1.0, top_k=8, repetition_penalty=1.1, seed=3, speculate=3)
    how |= dict(max_new_tokens=10, draft=drafts_for(net)[draft])
    texts = generate(net, tok, PROMPTS, **how)
    assert [g.ids for g in generate(net, tok, PROMPTS, **how)] == [g.ids for g in texts]
    for i, prompt in enumerate(PROMPTS):
        [alone] = generate(net, tok, [prompt], **how, first=i)
        assert alone.ids == texts[i].ids
    how["seed"] = 4
    assert [g.ids for g in generate(net, tok, PROMPTS, **how)] != [g.ids for g in texts]


def test_deterministic_texts_have_the_bits_of_ordinary_ones(tok):
    net = make_net(**QWEN3)
    be_deterministic(net)
    how = dict(max_new_tokens=20, temperature=0)
    texts = generate(net, tok, PROMPTS, **how, speculate=3, draft=make_net(**SMALL))
    for g, right in zip(texts, generate(net, tok, PROMPTS, **how)):
        assert (g.ids, g.logprobs) == (right.ids, right.logprobs)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "alibi", "relative"])
@torch.no_grad()
def test_heads_with_a_cache_say_what_they_do_without(name, tok):
    net = make_net(**ALL[name], mtp=3)
    asked = []

    class Recorder(HeadsDraft):
        def propose(self, texts, k, uniform):
            q, is_proposed = super().propose(texts, k, uniform)
            for i, length in enumerate(texts.lengths):
                asked.append((texts.ids[i, : length + k].tolist(), length, q[i]))
            return q, is_proposed

    def make(draft, target, choose, n_vocab, n_rows, room, k):
        return Recorder(net, choose, n_vocab, n_rows, room, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate, "make_draft", make)
        # Even draws: some drafts are accepted, some are not, at other places in each row.
        generate(net, tok, PROMPTS, max_new_tokens=20, temperature=1.5, speculate=3, seed=1)
    assert len(asked) > 20
    for ids, length, q in asked:
        text = torch.tensor([ids])
        T = length - 1  # places with a state
        h = net.hidden(text[:, :T])
        positions = torch.arange(T)[None]
        looks = net.looks(net.model.mtp, h, positions)
        for j in range(len(q)):
            h = net.ahead(j, h, text[:, j + 1 : j + 1 + T], looks)
            expected = (net.logits(h)[0, -1, : tok.n_vocab] / 1.5).softmax(-1)
            assert (q[j] - expected).abs().max() < 1e-4


def test_a_lookup_finds_what_followed_the_longest_and_latest_match():
    assert what_followed([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert what_followed([2, 3, 7, 1, 3, 8, 2, 3], 3) == [7, 1, 3]  # two tokens count before one
    assert what_followed([5, 1, 5, 2, 5], 1) == [2]
    assert what_followed([1, 2, 3], 4) == what_followed([1], 4) == []
    assert what_followed([4, 4], 3) == [4]


# Multi-token prediction


def naive_ahead_loss(net, ids, targets):
    """DeepSeek-V3's equations 21 to 25 for one row, each depth by slices: (sum of all depths)."""
    T = ids.shape[1]
    h = net.hidden(ids)
    total = 0.0
    for k, block in enumerate(net.model.mtp.layers, 1):
        h = h[:, : T - k]
        e = net.model.embed_tokens(ids[:, k:])
        x = block.joint_proj(torch.cat((block.hidden_norm(h), block.token_norm(e)), -1))
        positions = torch.arange(T - k)[None]
        h = block.norm(block(x, *net.looks(net.model.mtp, x, positions)[block.pattern]))
        total = total + F.cross_entropy(net.logits(h)[0], targets[0, k:], reduction="sum")
    return total


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "relative", "windows"])
def test_the_loss_of_tokens_further_ahead_is_the_papers(name):
    net = make_net(**ALL[name], mtp=3, mtp_weight=0.5)
    ids = random_ids(1, 17)
    targets = ids.roll(-1, 1).masked_fill(ids % 7 == 0, -100)
    plain, n_targets = net(ids, targets)
    net.train()
    loss, n = net(ids, targets)
    expected = naive_ahead_loss(net, ids, targets) / 3
    assert n == n_targets
    torch.testing.assert_close(net.mtp_loss, expected.detach(), rtol=1e-5, atol=1e-4)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)  # what is logged stays comparable
    loss.backward()
    gradients = [p.grad for p in net.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in net.model.mtp.parameters())
    net.zero_grad()
    (net.eval()(ids, targets)[0] + 0.5 * naive_ahead_loss(net, ids, targets) / 3).backward()
    for ours, p in zip(gradients, net.parameters(), strict=True):
        assert (ours - p.grad).norm() <= 1e-4 * (p.grad.norm() + 0.02)


@torch.no_grad()
def test_documents_look_ahead_as_they_do_alone():
    net = make_net(**QWEN3, mtp=2).train()
    ids = random_ids(1, 20)
    targets = ids.roll(-1, 1)
    docs = torch.tensor([[0] * 7 + [1] * 12 + [2]])
    net(ids, targets, docs=docs)
    packed = net.mtp_loss
    alone = 0.0
    for part in (slice(0, 7), slice(7, 19)):  # that of one token looks at nothing
        net(ids[:, part], targets[:, part])
        alone = alone + net.mtp_loss
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


def test_heads_are_counted_trained_initialized_and_saved(tok, tmp_path):
    shape = QWEN3 | dict(vocab_size=64, n_ctx=32, n_layer=2)
    torch.manual_seed(0)
    net = GPT(GPTConfig(**shape, mtp=2))
    matrices = {n: p for n, p in net.model.mtp.named_parameters() if p.ndim == 2}
    assert len(matrices) == 2 * 8  # of attention 4, of the MLP 3, and what joins
    for name, p in matrices.items():
        expected = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert p.std().item() == pytest.approx(expected, rel=0.15)
    muon = make_optimizer(net, "muon")[-1].param_groups[0]["params"]
    held = [id(p) for p in muon]
    assert isinstance(make_optimizer(net, "muon")[-1], Muon)
    assert set(map(id, matrices.values())) <= set(held)
    ids = random_ids(2, 16)
    net.train()
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        net(ids, ids)[0].backward()
    assert counted.get_total_flops() == 32 * flops_per_token(net.config, 16)
    save(tmp_path, net, tok)
    back, _ = load(tmp_path)
    assert family(net.config) == "barelm" and back.config == net.config
    for name, t in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], t), name
    for kind in (dict(causal=False), dict(n_encoder_layer=2), dict(norm_place="post")):
        with pytest.raises(UserError, match="mtp=2: expected 0"):
            GPTConfig(**shape, mtp=2, **kind)


def test_memory_of_heads_is_estimated_near_what_autograd_keeps():
    shape = dict(vocab_size=256, n_ctx=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
    kept = []
    estimates = []
    for mtp in (0, 4):
        net = make_net(**shape, mtp=mtp).train()
        own = {p.data_ptr() for p in net.parameters()}
        storages = {}

        def keep(t, own=own, storages=storages):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss, _ = net(random_ids(4, 128), random_ids(4, 128))
        kept.append(sum(storages.values()))
        estimates.append(memory_estimate(net.config, 0, 4, 128)[1])
    assert 0.6 < (estimates[1] - estimates[0]) / (kept[1] - kept[0]) < 1.7


def test_train_logs_the_loss_ahead_and_sample_drafts_by_the_heads(tiny):
    options = ["config/tiny.py", "--max_steps=4", "--mtp=2", "--out_dir=out/mtp"]
    said = run(tiny, "train.py", *options).stdout
    assert "mtp_loss: " in said and "val_loss: " in said
    rows = [json.loads(line) for line in (tiny / "out/mtp/log.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "mtp_loss" in row]
    assert len(losses) == 4
    # Before the first update all is a guess, one token ahead or three; the last have no target.
    guess = math.log(load(tiny / "out" / "mtp")[0].config.vocab_size)
    assert losses[0]["loss"] == pytest.approx(guess, rel=0.05)
    assert 0.9 * guess < losses[0]["mtp_loss"] < 1.05 * guess
    greedy = ["--model=out/mtp", "--max_new_tokens=20", "--temperature=0"]
    expected = run(tiny, "sample.py", *greedy).stdout
    done = run(tiny, "sample.py", *greedy, "--speculate=2")
    assert done.stdout == expected and "drafts accepted" in done.stderr


# sample.py


def test_sample_says_the_same_and_counts(tiny):
    options = ["--model=out/tiny", "--max_new_tokens=20", "--temperature=0", "--prompt=def f("]
    expected = run(tiny, "sample.py", *options).stdout
    for draft in ([], ["--draft=out/tiny"]):
        done = run(tiny, "sample.py", *options, "--speculate=3", *draft)
        assert done.stdout == expected
        assert "drafts accepted (" in done.stderr and "tokens a pass" in done.stderr
    assert "accepted (100 %)" in done.stderr
    chat = ["--model=out/tiny", "--chat", "--max_new_tokens=6", "--speculate=2"]
    done = run(tiny, "sample.py", *chat, stdin="hi\nand\n")
    assert done.stdout.count("model> ") == 2 and done.stderr.count("drafts accepted") == 1


def test_heads_draft_beside_a_window_with_angles_of_its_own(tok):
    net = make_net(**QWEN3, mtp=2, window=5, layers="SL", local_rope_theta=100.0)
    options = dict(max_new_tokens=9, temperature=0)
    plain = generate(net, tok, PROMPTS, **options)
    drafted = generate(net, tok, PROMPTS, speculate=2, draft="heads", **options)
    assert [answer.ids for answer in drafted] == [answer.ids for answer in plain]


def test_drafts_without_meaning_are_refused_in_a_line(tiny, tok):
    net, own = load(tiny / "out" / "tiny")
    save(tiny / "out" / "other", make_net(**SMALL), tok)
    refusals = {
        "its tokenizer is not that of out/tiny": ["--speculate=2", "--draft=out/other"],
        "for how many tokens?": ["--draft=lookup"],
        "no heads for it": ["--speculate=2", "--draft=heads"],
        "a beam search draws no tokens": ["--speculate=2", "--num_beams=2"],
        "expected a number from 0 to 64": ["--speculate=65"],
        "no such folder": ["--speculate=2", "--draft=out/none"],
    }
    for message, options in refusals.items():
        done = run(tiny, "sample.py", "--model=out/tiny", *options, check=False)
        assert done.returncode == 1 and done.stdout == "", message
        assert message in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="expected a network or one of"):
        generate(net, own, ["a"], speculate=2, draft="small")
    with pytest.raises(UserError, match="2 tokens ahead, not further"):
        generate(make_net(**QWEN3, mtp=2), tok, ["a"], speculate=3)
    judge = make_net(vocab_size=net.config.vocab_size, **SMALL)
    judge.set_score(["a", "b"])
    with pytest.raises(UserError, match="a classifier"):
        generate(net, own, ["a"], speculate=2, draft=judge)
