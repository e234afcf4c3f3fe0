"""finetune.py's reinforcement learning: every formula against a naive one, what is sampled against
what is learned from it, and rewards that rise."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run
from test_finetune import net_for, talk
from test_model import QWEN3, make_net

import finetune
import model
from model import UserError


@pytest.fixture
def tok(tiny):
    return model.Tokenizer.from_folder(tiny / "out/tiny")


def options(monkeypatch, **values):
    for key, value in values.items():
        monkeypatch.setattr(finetune, key, value)


# --------------------------------------------------------------------------------------------------
# Formulas


def test_group_advantages_are_within_each_group():
    rewards, groups = [1.0, 0.0, 5.0, 3.0, 0.5, 2.0, 2.0], [0, 0, 1, 1, 0, 2, 2]
    for got, reward, group in zip(finetune.group_advantages(rewards, groups), rewards, groups):
        mine = [r for r, g in zip(rewards, groups) if g == group]
        mean = sum(mine) / len(mine)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in mine) / len(mine))
        assert float(got) == pytest.approx((reward - mean) / (deviation + 1e-4), abs=1e-5)
    assert len(finetune.group_advantages([], [])) == 0  # a process may have no sample


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma, lam, monkeypatch):
    options(monkeypatch, gamma=gamma, gae_lambda=lam)
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 7)
    later = [*values.tolist()[1:], 0.0]
    errors = [float(rewards[t]) + gamma * later[t] - float(values[t]) for t in range(7)]
    expected = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, 7)) for t in range(7)]
    torch.testing.assert_close(finetune.gae(rewards, values), torch.tensor(expected))


def test_policy_loss_is_ppos_equation_7_and_flat_where_clipped():
    ratios = torch.tensor([0.5, 0.5, 0.9, 0.9, 1.0, 1.1, 1.1, 1.5, 1.5]).double()
    advantages = torch.tensor([2.0, -2.0, 1.0, -1.0, 3.0, 1.0, -1.0, 2.0, -2.0]).double()
    old = torch.randn(9).double()
    logp = (ratios.log() + old).requires_grad_()
    loss = finetune.policy_loss(logp, old, advantages)
    loss.sum().backward()
    loss = loss.detach()
    eps = finetune.clip
    for r, a, got, slope in zip(ratios.tolist(), advantages.tolist(), loss, logp.grad):
        clipped = min(max(r, 1 - eps), 1 + eps) * a
        assert float(got) == pytest.approx(-min(r * a, clipped))
        assert float(slope) == pytest.approx(-r * a if r * a <= clipped else 0.0)
    assert (logp.grad == 0).sum() == 2  # beyond 1 + clip where good, below 1 - clip where bad


def sample_of(tok, asked, said, **more):
    ids = tok.encode(asked) + tok.encode(said)
    n = len(tok.encode(asked)) - 1
    return {"ids": ids[:-1], "targets": [-100] * n + ids[n + 1 :]} | more


def naive_logp(net, tok, example, temperature=1.0):
    logits = net(torch.tensor([example["ids"]]))[0, :, : tok.n_vocab] / temperature
    logp = logits.log_softmax(-1)
    return torch.stack([logp[i, t] for i, t in enumerate(example["targets"]) if t != -100])


def test_grpo_adds_schulmans_k3(tok, monkeypatch):
    net = net_for(tok).eval()
    net.n_vocab = tok.n_vocab
    group = [sample_of(tok, "def", " return x"), sample_of(tok, "a long question", " y")]
    options(monkeypatch, method="grpo")
    for e in group:
        with torch.no_grad():
            logp = naive_logp(net, tok, e)
        e["old"], e["ref"] = logp, logp + 0.3 * torch.randn(len(logp))
        e["advantage"] = torch.randn(len(logp))
    with torch.no_grad():
        plain, stats = finetune.rl_loss(net, group)
        options(monkeypatch, kl_weight=0.7)
        loss, _ = finetune.rl_loss(net, group)
    assert float(plain) == pytest.approx(-sum(float(e["advantage"].sum()) for e in group), abs=1e-4)
    ratio = torch.cat([(e["ref"] - e["old"]).exp() for e in group])  # pi_ref / pi
    k3 = (ratio - 1 - ratio.log()).sum()
    assert float(loss - plain) == pytest.approx(0.7 * float(k3), abs=1e-4)
    assert stats["clipfrac"] == 0 and stats["approx_kl"] == pytest.approx(0, abs=1e-4)


def test_ppos_value_loss_and_whitened_advantages(tok, monkeypatch):
    net = net_for(tok).eval()
    net.n_vocab = tok.n_vocab
    net.set_score(["value"])
    options(monkeypatch, method="ppo", kl_weight=0.2)
    group = [sample_of(tok, "def", " return x", reward=1.0)]
    group += [sample_of(tok, "a long question", " y", reward=-0.5)]
    one, reference = SimpleNamespace(world=1), net_for(tok).eval()
    reference.n_vocab = tok.n_vocab
    cast = finetune.core.autocast(torch.device("cpu"), torch.float32)
    finetune.judge_samples(one, net, reference, group, cast)
    raw = []
    for e in group:
        with torch.no_grad():
            old, ref = naive_logp(net, tok, e), naive_logp(reference, tok, e)
            h = net.hidden(torch.tensor([e["ids"]]))[0]
        value = torch.stack([net.score(x)[0] for x, t in zip(h, e["targets"]) if t != -100])
        torch.testing.assert_close(e["value"], value.detach(), rtol=1e-4, atol=1e-5)
        rewards = 0.2 * (ref - old)
        rewards[-1] += e["reward"]
        raw.append(finetune.gae(rewards, e["value"]))
        torch.testing.assert_close(e["return"], raw[-1] + e["value"], rtol=1e-4, atol=1e-4)
    every = torch.cat(raw)
    white = (every - every.mean()) / every.std(unbiased=False)
    got = torch.cat([e["advantage"] for e in group])
    torch.testing.assert_close(got, white, rtol=1e-3, atol=1e-3)
    for e in group:
        e["value"] = e["value"] + 0.5  # farther than clip from the value now
    loss, stats = finetune.rl_loss(net.eval(), group)
    before, goal = (torch.cat([e[k] for e in group]) for k in ("value", "return"))
    now = before - 0.5
    clipped = torch.max((now - goal) ** 2, (before - 0.2 - goal) ** 2).sum()
    expected = -float(got.sum()) + 0.5 * finetune.value_weight * float(clipped)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-3, abs=1e-3)


# --------------------------------------------------------------------------------------------------
# Rewards

CASES = [
    ("arithmetic", "it is 12", "12", 1),
    ("arithmetic", "12, or rather 13.", "13", 1),
    ("arithmetic", "1,200", "1200.0", 1),
    ("arithmetic", "-3", "3", 0),
    ("arithmetic", "no idea", "3", 0),
    ("arithmetic", "no idea", "none", 0),
    ("gsm8k", "3 + 4 = 7\n#### 7", "so\n#### 7", 1),
    ("gsm8k", "#### 8 apples", "#### 7", 0),
    ("gsm8k", "so it is 7", "4 + 3\n#### 7", 1),
    ("gsm8k", "#### 7 and then 9", "#### 7", 0),
    ("overlap", "the cat", "the cat", 1),
    ("overlap", "The dog", "the cat", 0.5),
    ("overlap", "the the the the", "the cat", 1 / 3),
    ("overlap", "", "the cat", 0),
    ("overlap", "", "", 0),
]


@pytest.mark.parametrize("name, text, answer, expected", CASES)
def test_rewards(name, text, answer, expected, monkeypatch):
    options(monkeypatch, reward=name)
    assert finetune.open_reward(None)([], text, answer) == pytest.approx(expected)


def test_a_reward_is_a_function_of_a_file(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("def longer(messages, text, answer):\n    return len(text) - len(answer)\n")
    options(monkeypatch, reward=f"{file}:longer")
    assert finetune.open_reward(None)([], "abc", "a") == 2
    for named, why in (
        (f"{file}:lnger", "no function 'lnger' in it"),
        (f"{file}", "expected .*:F"),
    ):
        options(monkeypatch, reward=named)
        with pytest.raises(UserError, match=why):
            finetune.open_reward(None)
    options(monkeypatch, reward=f"{tmp_path}/none.py:f")
    with pytest.raises(UserError, match="no such file"):
        finetune.open_reward(None)


# --------------------------------------------------------------------------------------------------
# Samples


@pytest.mark.parametrize("method, temperature", [("grpo", 1.0), ("ppo", 1.0), ("grpo", 0.6)])
def test_what_is_learned_from_is_what_was_sampled(tok, method, temperature, monkeypatch):
    options(monkeypatch, method=method, group_size=3, max_new_tokens=9, temperature=temperature)
    shape = QWEN3 | {"n_ctx": 64, "vocab_size": 2 * tok.n_vocab}  # half is never sampled
    net = make_net(**shape, dropout=0.3).train()
    net.n_vocab = tok.n_vocab
    tok.eos_ids = [*tok.eos_ids, *range(0, tok.n_vocab, 8)]  # some samples end early
    rows = [{"messages": talk(asked, "yes")} for asked in ("what", "a longer question")]
    prompts = [finetune.read_prompt(row, tok, 64) for row in rows]
    made, real = [], finetune.core.generate
    keep = lambda *args, **how: made.extend(real(*args, **how)) or made
    monkeypatch.setattr(finetune.core, "generate", keep)
    cast = finetune.core.autocast(torch.device("cpu"), torch.float32)
    judge = lambda messages, text, answer: len(text)
    n = 3 if method == "grpo" else 1
    samples = finetune.roll_out(net, tok, prompts, judge, 5, cast, n)
    assert len(samples) == len(made) == 2 * n
    assert [e["group"] for e in samples] == [i // n for i in range(2 * n)]
    for i, (e, g) in enumerate(zip(samples, made)):
        asked = prompts[i // n]["ids"]
        assert e["ids"] == asked + g.ids[:-1] and e["reward"] == len(g.text)
        assert e["targets"] == [-100] * (len(asked) - 1) + g.ids
    if method == "grpo":
        assert {g.finish_reason for g in made} == {"stop", "length"}
        finetune.judge_samples(SimpleNamespace(world=1), net, None, samples, cast)
    net.eval()
    for e, g in zip(samples, made):
        with torch.no_grad():
            got = finetune.look(net, [e])[0]
            expected = naive_logp(net, tok, e, temperature)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        if temperature == 1:
            assert len(got) == len(g.logprobs)
            torch.testing.assert_close(got, torch.tensor(g.logprobs), rtol=1e-3, atol=1e-3)
        if method == "grpo":  # the old log-probabilities are free of dropout
            torch.testing.assert_close(e["old"], got, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# The commands: more of one letter

RL = [
    "--model=out/tiny",
    "--dataset=tiny",
    "--dtype=float32",
    "--warmup_steps=0",
    "--check_memorized=0",
]
RL += ["--batch_size=8", "--group_size=4", "--max_new_tokens=12", "--learning_rate=3e-3"]
RL += ["--eval_examples=32", "--eval_every=1000", "--reward=letters.py:share"]
SHARE = "def share(messages, text, answer):\n    return text.count('e') / max(1, len(text))\n"


@pytest.fixture
def toy(tiny, tmp_path):
    (tmp_path / "letters.py").write_text(SHARE)
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny").symlink_to(tiny / name / "tiny")
    return tmp_path


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


METHODS = {"grpo": ["--kl_weight=0.01"], "ppo": ["--rl_epochs=4", "--minibatches=2"]}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_the_reward_rises(method, processes, toy):
    started = time.monotonic()
    args = [*RL, f"--method={method}", *METHODS[method], "--out_dir=out/rl", "--max_steps=30"]
    done = run(toy, "finetune.py", *args, processes=processes)
    assert ("weights: equal on 2 processes" in done.stdout) == (processes == 2)
    rows = log(toy / "out/rl")
    first, *_, last = [row["val_reward"] for row in rows if "val_reward" in row]
    print(f"{method}, {processes}: {first:.3f} -> {last:.3f}, {time.monotonic() - started:.1f} s")
    assert last > 2 * first
    keys = {"loss", "reward", "length", "entropy", "approx_kl", "clipfrac", "grad_norm"}
    keys |= {"value_loss", "explained_variance"} if method == "ppo" else set()
    assert keys <= rows[1].keys()
    net, _ = model.load(toy / "out/rl")
    assert net.score is None  # the value head is not the policy's


def test_killed_and_resumed_is_never_stopped(toy):
    args = [*RL, "--method=grpo", "--kl_weight=0.1", "--max_steps=12", "--save_every=2"]
    args += ["--dropout=0.1"]
    run(toy, "finetune.py", *args, "--out_dir=whole")
    command = [sys.executable, str(ROOT / "finetune.py"), *args, "--out_dir=cut"]
    process = subprocess.Popen(command, cwd=toy, stdout=subprocess.PIPE)
    while not (toy / "cut/state.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert torch.load(toy / "cut/state.pt")["step"] < 12
    run(toy, "finetune.py", *args, "--out_dir=cut", "--init_from=resume")
    cut, whole = (toy / name / "model.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()
