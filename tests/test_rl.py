"""rl.py: every formula against a naive one, what is sampled against
what is learned from it, and rewards that rise."""

import contextlib
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import run, run_killed
from test_finetune import net_for, talk
from test_model import QWEN3, make_net

import rl
from barelm import tasks as evaluation
from barelm.checkpoint import load
from barelm.rewards import open_reward, reward_of
from barelm.run import Run, Updater, UserError, autocast
from barelm.tokenizer import Tokenizer
from barelm.tuning import accumulate_gradients


@pytest.fixture
def tok(tiny):
    return Tokenizer.from_folder(tiny / "out/tiny")


def options(monkeypatch, **values):
    for key, value in values.items():
        monkeypatch.setattr(rl, key, value)


ALONE = Run(torch.device("cpu"))  # one process
FLOAT32 = autocast(torch.device("cpu"), torch.float32)


# --------------------------------------------------------------------------------------------------
# Formulas


def test_group_advantages_are_within_each_group():
    rewards, groups = [1.0, 0.0, 5.0, 3.0, 0.5, 2.0, 2.0], [0, 0, 1, 1, 0, 2, 2]
    for got, reward, group in zip(rl.group_advantages(rewards, groups), rewards, groups):
        mine = [r for r, g in zip(rewards, groups) if g == group]
        mean = sum(mine) / len(mine)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in mine) / len(mine))
        assert float(got) == pytest.approx((reward - mean) / (deviation + 1e-4), abs=1e-5)
    assert len(rl.group_advantages([], [])) == 0  # a process may have no sample


@pytest.mark.parametrize("reward", [12345.67, 0.1, -1e30, 3e38, 1 / 3, 0.0])
def test_equal_rewards_say_nothing_whatever_the_size_of_the_group(reward):
    sizes = [2, 3, 5, 7, 11, 100]
    groups = [i for i, size in enumerate(sizes) for _ in range(size)]
    advantages = rl.group_advantages([reward] * len(groups), groups)
    assert advantages.dtype == torch.float32 and advantages.tolist() == [0.0] * len(groups)
    other = rl.group_advantages([reward] * 6 + [reward + abs(reward) + 1], [0] * 7)
    assert other.tolist() == pytest.approx([-(6**-0.5)] * 6 + [6**0.5], abs=1e-3)


def test_whitened_advantages_of_large_rewards_that_are_alike(tok):
    """7 answers of one token with rewards around 12345: float32 sums of squares lose it all."""
    net = net_for(tok).eval()
    net.set_score(["value"])
    torch.nn.init.zeros_(net.score.weight)
    alike, various = [12345.5] * 7, [12345.5, 12345.0, 12345.25, 12346.0, 12345.5, 12345.5, 12344.0]
    for rewards in (alike, various):
        group = [{"ids": [1], "targets": [2], "reward": reward} for reward in rewards]
        rl.add_log_probs(ALONE, net, None, group, tok.n_vocab, FLOAT32)
        rl.add_gae(ALONE, group)
        got = [float(e["advantage"]) for e in group]
        mean = sum(rewards) / 7
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 7) or 1.0
        assert got == pytest.approx([(r - mean) / deviation for r in rewards], abs=1e-4)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma, lam, monkeypatch):
    options(monkeypatch, gamma=gamma, gae_lambda=lam)
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 7)
    later = [*values.tolist()[1:], 0.0]
    errors = [float(rewards[t]) + gamma * later[t] - float(values[t]) for t in range(7)]
    expected = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, 7)) for t in range(7)]
    torch.testing.assert_close(rl.gae(rewards, values), torch.tensor(expected))


def test_policy_loss_is_ppos_equation_7_and_flat_where_clipped():
    ratios = torch.tensor([0.5, 0.5, 0.9, 0.9, 1.0, 1.1, 1.1, 1.5, 1.5]).double()
    advantages = torch.tensor([2.0, -2.0, 1.0, -1.0, 3.0, 1.0, -1.0, 2.0, -2.0]).double()
    old = torch.randn(9).double()
    logp = (ratios.log() + old).requires_grad_()
    loss = rl.policy_loss(logp, old, advantages)
    loss.sum().backward()
    loss = loss.detach()
    eps = rl.clip
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
    group = [sample_of(tok, "def", " return x"), sample_of(tok, "a long question", " y")]
    for e in group:
        with torch.no_grad():
            logp = naive_logp(net, tok, e)
        e["old"], e["ref"] = logp, logp + 0.3 * torch.randn(len(logp))
        e["advantage"] = torch.randn(len(logp))
    with torch.no_grad():
        plain, stats = rl.grpo_loss(net, group, tok.n_vocab)
        options(monkeypatch, kl_weight=0.7)
        loss, _ = rl.grpo_loss(net, group, tok.n_vocab)
    assert float(plain) == pytest.approx(-sum(float(e["advantage"].sum()) for e in group), abs=1e-4)
    ratio = torch.cat([(e["ref"] - e["old"]).exp() for e in group])  # pi_ref / pi
    k3 = (ratio - 1 - ratio.log()).sum()
    assert float(loss - plain) == pytest.approx(0.7 * float(k3), abs=1e-4)
    assert stats["clipfrac"] == 0 and stats["approx_kl"] == pytest.approx(0, abs=1e-4)


def test_ppos_value_loss_and_whitened_advantages(tok, monkeypatch):
    net = net_for(tok).eval()
    net.set_score(["value"])
    options(monkeypatch, kl_weight=0.2)
    group = [sample_of(tok, "def", " return x", reward=1.0)]
    group += [sample_of(tok, "a long question", " y", reward=-0.5)]
    reference = net_for(tok).eval()
    rl.add_log_probs(ALONE, net, reference, group, tok.n_vocab, FLOAT32)
    rl.add_gae(ALONE, group)
    raw = []
    for e in group:
        with torch.no_grad():
            old, ref = naive_logp(net, tok, e), naive_logp(reference, tok, e)
            h = net.hidden(torch.tensor([e["ids"]]))[0]
        value = torch.stack([net.score(x)[0] for x, t in zip(h, e["targets"]) if t != -100])
        torch.testing.assert_close(e["value"], value.detach(), rtol=1e-4, atol=1e-5)
        rewards = 0.2 * (ref - old)
        rewards[-1] += e["reward"]
        raw.append(rl.gae(rewards, e["value"]))
        torch.testing.assert_close(e["return"], raw[-1] + e["value"], rtol=1e-4, atol=1e-4)
    every = torch.cat(raw)
    white = (every - every.mean()) / every.std(unbiased=False)
    got = torch.cat([e["advantage"] for e in group])
    torch.testing.assert_close(got, white, rtol=1e-3, atol=1e-3)
    for e in group:
        e["value"] = e["value"] + 0.5  # farther than clip from the value now
    loss, _ = rl.ppo_loss(net.eval(), group, tok.n_vocab)
    before, goal = (torch.cat([e[k] for e in group]) for k in ("value", "return"))
    now = before - 0.5
    clipped = torch.max((now - goal) ** 2, (before - 0.2 - goal) ** 2).sum()
    expected = -float(got.sum()) + 0.5 * rl.value_weight * float(clipped)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo"])
def test_a_step_waits_for_no_device(method, tok, monkeypatch):
    """On a device that holds no numbers, as meta does, whoever asks for one fails."""
    options(monkeypatch, kl_weight=0.1)
    task, net = rl.METHODS[method], net_for(tok)
    if task.has_value:
        net.set_score(["value"])
    group = [sample_of(tok, "def", " return x"), sample_of(tok, "a long question", " y")]
    for e in group:
        n = sum(t != -100 for t in e["targets"])
        e |= {key: torch.randn(n) for key in ("old", "ref", "value", "advantage", "return")}
        if method == "rloo":
            e["advantage"] = torch.randn(1)
    net.to("meta")
    updater = Updater(Run(torch.device("meta")), net.parameters(), [])
    loss_of = lambda samples: task.loss(net, samples, tok.n_vocab)
    groups = [[e] for e in group]
    sums = accumulate_gradients(updater, groups, loss_of, 9, task.logs, contextlib.nullcontext())
    assert sums.keys() == {"loss", *task.logs} and all(s.is_meta for s in sums.values())
    assert any(p.grad is not None for p in net.parameters())


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
    ("gsm8k", "#### 7 and then 9", "#### 7", 1),
    ("gsm8k", "#### 42 apples in 3 boxes", "#### 42", 1),
    ("gsm8k", "6 * 7 = 42\n#### 42\n\nQuestion: 3 + 3?\nAnswer: 6\n#### 6", "#### 42", 1),
    ("gsm8k", "6 * 7 = 42\n#### 42\n\nQuestion: 3 + 3?\nAnswer: 6\n#### 6", "#### 6", 0),
    ("gsm8k", "#### 42", "so\n#### 42 apples\nor\n#### 3", 1),
    ("gsm8k", "#### -42", "#### -42", 1),
    ("gsm8k", "#### -42", "#### 42", 0),
    ("gsm8k", "#### \u221242", "#### -42", 1),
    ("gsm8k", "#### \u221242", "#### 42", 0),
    ("gsm8k", "#### +42", "#### 42", 1),
    ("gsm8k", "#### $1,234", "#### 1234", 1),
    ("gsm8k", "#### -$5", "#### $-5", 1),
    ("gsm8k", "#### 1234.", "#### 1,234", 1),
    ("gsm8k", "#### 4.50", "#### 4.5", 1),
    ("gsm8k", "#### 4.5", "#### 4", 0),
    ("gsm8k", "#### .5", "#### 0.5", 1),
    ("gsm8k", "####42", "#### 42", 1),
    ("gsm8k", "#### 12345678901234567890", "#### 12345678901234567891", 0),
    ("gsm8k", "the answer is 42 ####", "#### 42", 0),
    ("gsm8k", "####\n42", "#### 42", 0),  # the next line is no part of the answer
    ("gsm8k", "#### none", "#### none", 0),
    ("gsm8k", "", "#### 42", 0),
    ("arithmetic", "so 5 - 8 = \u22123", "-3", 1),
    ("arithmetic", "that is $.50", "0.5", 1),
    ("overlap", "the cat", "the cat", 1),
    ("overlap", "The dog", "the cat", 0.5),
    ("overlap", "the the the the", "the cat", 1 / 3),
    ("overlap", "", "the cat", 0),
    ("overlap", "", "", 0),
]


@pytest.mark.parametrize("name, text, answer, expected", CASES)
def test_rewards(name, text, answer, expected):
    assert open_reward(name, "cpu")([], text, answer) == pytest.approx(expected)


@pytest.mark.parametrize("text, answer, expected", [c[1:] for c in CASES if c[0] == "gsm8k"])
def test_the_evaluation_judges_gsm8k_as_the_reward_does(text, answer, expected):
    [strict, _] = evaluation.judge_gsm8k({"answer": answer}, [text]).values()
    assert strict == (expected if "####" in text else 0)


def test_gsm8ks_strict_match_finds_what_lm_eval_finds():
    """Its pattern, on answers of the form that the data set has."""
    draw = random.Random(0)
    for _ in range(300):
        number = draw.choice(["7", "-12", "1,234", "3.25", "90"])
        text = draw.choice(["so 5 is it\n", "", "#### ", "1 + 1\n\n"]) + f"#### {number}"
        ends = ["", ".", " apples", "\n\nQuestion: 2\n#### 2", " in 3 boxes", " #### 8"]
        text += draw.choice(ends)
        [found, *_] = re.findall(r"#### (\-?[0-9\.\,]+)", text)  # gsm8k.yaml, strict-match
        plain = found.replace(",", "").removesuffix(".")
        for right in (plain, "8"):
            verdict = evaluation.judge_gsm8k({"answer": f"a\n#### {right}"}, [text])
            assert verdict["strict_match"] == (plain == right)


def test_a_reward_is_a_function_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def longer(messages, text, answer):\n    return len(text) - len(answer)\n")
    assert open_reward(f"{file}:longer", "cpu")([], "abc", "a") == 2
    for named, why in (
        (f"{file}:lnger", "no function 'lnger' in it"),
        (f"{file}", "expected .*:F"),
    ):
        with pytest.raises(UserError, match=why):
            open_reward(named, "cpu")
    with pytest.raises(UserError, match="no such file"):
        open_reward(f"{tmp_path}/none.py:f", "cpu")


HEAD = "import numpy as np, torch, decimal, functools\n"
NUMBERS = {  # what a function may return, and the reward that it is
    "1": 1.0,
    "0.25": 0.25,
    "True": 1.0,
    "False": 0.0,
    "np.float32(0.5)": 0.5,
    "np.int64(-3)": -3.0,
    "np.bool_(True)": 1.0,
    "np.array(2)": 2.0,
    "np.array([2])": 2.0,
    "torch.tensor(0.5)": 0.5,
    "torch.tensor([7])": 7.0,
    "torch.tensor(0.5, requires_grad=True)": 0.5,
    "decimal.Decimal('0.5')": 0.5,
}
NO_NUMBERS = ["None", "float('nan')", "float('inf')", "-float('inf')", "1e39", "10**400", "'1'"]
NO_NUMBERS += ["b'1'", "[1.0]", "{}", "(1,)", "1j", "np.float64('nan')", "np.array([1, 2])"]
NO_NUMBERS += ["torch.tensor([1.0, 2.0])", "torch.tensor(float('nan'))", "np.str_('1')"]
NO_NUMBERS += ["print", "(x for x in [1])", "wait()"]


def write_reward(folder, code):
    """The name of a reward: the function `f` of a file with this code."""
    (folder / "r.py").write_text(code)
    return f"{folder}/r.py:f"


PROMPT = {"messages": [], "answer": "", "row": "train.jsonl:3"}


@pytest.mark.parametrize("value", [*NUMBERS, *NO_NUMBERS])
@pytest.mark.filterwarnings("error")
def test_a_reward_is_a_finite_number(value, tmp_path):
    code = f"{HEAD}async def wait(): pass\ndef f(messages, text, answer):\n    return {value}\n"
    name = write_reward(tmp_path, code)
    judge = open_reward(name, "cpu")
    if value in NUMBERS:
        got = reward_of(judge, name, PROMPT, "text")
        assert type(got) is float and got == NUMBERS[value]
        return
    with pytest.raises(UserError) as refusal:
        reward_of(judge, name, PROMPT, "text")
    said = str(refusal.value)
    shown = repr(eval(value, {"np": np, "torch": torch, "wait": lambda: 0}))[:12]
    assert "r.py:f: " in said and "train.jsonl:3" in said and "finite number" in said
    assert (shown in said or value in ("wait()",)) and "\n" not in said and len(said) < 400


RAISES = {
    "raise KeyError('no answer')": "KeyError: 'no answer' (line 3)",
    "return helper(text)": "ZeroDivisionError: division by zero (line 5)",
    "raise SystemExit(3)": "SystemExit: 3 (line 3)",
    "assert text == 1, 'not\\nequal'": "AssertionError: not equal (line 3)",
    "return f(messages, text, answer)": "RecursionError: ",
}


@pytest.mark.parametrize("body", RAISES)
def test_a_reward_that_raises_is_a_line(body, tmp_path):
    code = f"{HEAD}def f(messages, text, answer):\n    {body}\n"
    code += "def helper(text):\n    return 1 / 0\n"
    name = write_reward(tmp_path, code)
    judge = open_reward(name, "cpu")
    with pytest.raises(UserError) as refusal:
        reward_of(judge, name, PROMPT, "text")
    said = str(refusal.value)
    assert all(part in said for part in ("r.py:f: ", RAISES[body], "train.jsonl:3", "'text'"))
    assert "\n" not in said


MISFITS = {
    "async def f(messages, text, answer): return 1": "an async function",
    "f = functools.partial(lambda a, b: 1, 2)": "cannot be called as f(messages, text, answer)",
    "def f(text): return 1": "cannot be called as f(messages, text, answer): too many positional",
    "def f(a, b, c, d): return 1": "missing a required argument: 'd'",
    "def f(*, messages, text, answer): return 1": "cannot be called as f(messages, text, answer)",
    "f = 5": "no function 'f' in it",
    "g = 5": "no function 'f' in it",
    "def f(:": "SyntaxError: ",
    "import nothing_of_this_name": "ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "raise SystemExit('later')": "SystemExit: later (line 2)",
}


@pytest.mark.parametrize("code", MISFITS)
def test_a_function_that_is_no_reward_is_refused_before_the_run(code, tmp_path):
    name = write_reward(tmp_path, HEAD + code + "\n")
    with pytest.raises(UserError) as refusal:
        open_reward(name, "cpu")
    assert MISFITS[code] in str(refusal.value) and "\n" not in str(refusal.value)


FITTING = ["def f(messages, text, answer, more=1): return 1", "def f(*all): return 1"]
FITTING += ["f = functools.partial(lambda a, b, c, d: 1, 2)", "f = max"]


@pytest.mark.parametrize("code", FITTING)
def test_what_can_be_called_as_a_reward_is_taken(code, tmp_path):
    assert callable(open_reward(write_reward(tmp_path, HEAD + code + "\n"), "cpu"))


# --------------------------------------------------------------------------------------------------
# Samples


@pytest.mark.parametrize("method, temperature", [("grpo", 1.0), ("ppo", 1.0), ("grpo", 0.6)])
def test_what_is_learned_from_is_what_was_sampled(tok, method, temperature, monkeypatch):
    options(monkeypatch, max_new_tokens=9, temperature=temperature)
    shape = QWEN3 | {"n_ctx": 64, "vocab_size": 2 * tok.n_vocab}  # half is never sampled
    net = make_net(**shape, dropout=0.3).train()
    tok.eos_ids = [*tok.eos_ids, *range(0, tok.n_vocab, 8)]  # some samples end early
    rows = [{"messages": talk(asked, "yes")} for asked in ("what", "a longer question")]
    prompts = [rl.read_prompt(row, tok, 64) for row in rows]
    made, real = [], rl.generate_all
    keep = lambda *args, **how: made.extend(real(*args, **how)) or made
    monkeypatch.setattr(rl, "generate_all", keep)
    judge = lambda messages, text, answer: len(text)
    n = 3 if method == "grpo" else 1
    samples = rl.roll_out(net, tok, prompts, judge, 5, FLOAT32, n)
    assert len(samples) == len(made) == 2 * n
    assert [e["group"] for e in samples] == [i // n for i in range(2 * n)]
    for i, (e, g) in enumerate(zip(samples, made)):
        asked = prompts[i // n]["ids"]
        assert e["ids"] == asked + g.ids[:-1] and e["reward"] == len(g.text)
        assert e["targets"] == [-100] * (len(asked) - 1) + g.ids
    if method == "grpo":
        assert {g.finish_reason for g in made} == {"stop", "length"}
        rl.add_log_probs(ALONE, net, None, samples, tok.n_vocab, FLOAT32)
    net.eval()
    for e, g in zip(samples, made):
        with torch.no_grad():
            got = rl.look(net, [e], tok.n_vocab)[0]
            expected = naive_logp(net, tok, e, temperature)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        if temperature == 1:
            assert len(got) == len(g.logprobs)
            torch.testing.assert_close(got, torch.tensor(g.logprobs), rtol=1e-3, atol=1e-3)
        if method == "grpo":  # the old log-probabilities are free of dropout
            torch.testing.assert_close(e["old"], got, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# The commands: more letters

RL = [
    "--model=out/tiny",
    "--dataset=tiny",
    "--dtype=float32",
    "--warmup_steps=0",
]
RL += ["--batch_size=8", "--group_size=4", "--max_new_tokens=6", "--learning_rate=1e-2"]
RL += ["--eval_examples=32", "--eval_every=1000", "--reward=letters.py:share"]
# Many tokens are right, so that every seed and every rounding gets there: from 0.4 or so to 0.95
# and more within four validations, one of which must see 0.7.
SHARE = """def share(messages, text, answer):
    return sum(letter.isalpha() for letter in text) / max(1, len(text))
"""


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
METHODS["rloo"] = ["--kl_weight=0.01", "--rl_epochs=2"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_the_reward_rises(method, processes, toy):
    args = [*RL, f"--method={method}", *METHODS[method], "--out_dir=out/rl", "--max_steps=20"]
    args += ["--eval_every=5"]
    done = run(toy, "rl.py", *args, processes=processes)
    assert ("weights: equal on 2 processes" in done.stdout) == (processes == 2)
    rows = log(toy / "out/rl")
    first, *later = [row["val_reward"] for row in rows if "val_reward" in row]
    print(method, processes, first, *later)
    assert len(later) == 4 and first < 0.5 and max(later) > 0.7
    keys = {"loss", "reward", "length", "entropy", "approx_kl", "clipfrac", "grad_norm"}
    keys |= {"value_loss", "explained_variance"} if method == "ppo" else set()
    assert keys <= rows[1].keys()
    net, _ = load(toy / "out/rl")
    assert net.score is None  # the value head is not the policy's


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_that_fails_in_the_middle_loses_nothing(method, toy):
    """The third step's reward is no number: one line; what was learned until then is saved, and no
    row of the log has it."""
    (toy / "bad.py").write_text(
        "calls = []\n"
        "def share(messages, text, answer):\n"
        "    calls.append(text)\n"
        f"    return len(text) if len(calls) <= {50 if method == 'ppo' else 100} else None\n"
    )
    args = [*RL, f"--method={method}", "--out_dir=out/bad", "--reward=bad.py:share"]
    done = run(toy, "rl.py", *args, "--max_steps=9", check=False)  # 32 or 8 a step, after 32
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("--reward=bad.py:share: None for data/tiny/sft_train.jsonl:")
    assert "saved at step 2; --init_from=resume goes on" in done.stdout
    assert torch.load(toy / "out/bad/state.pt")["step"] == 2
    rows = log(toy / "out/bad")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    # and one that raises, from the first call
    (toy / "bad.py").write_text("def share(messages, text, answer):\n    return text.lenght\n")
    done = run(toy, "rl.py", *args, "--out_dir=out/worse", check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    for part in ("bad.py:share: AttributeError: ", "(line 2)", "data/tiny/sft_val.jsonl:"):
        assert part in done.stderr
    assert not (toy / "out/worse/state.pt").exists()


@torch.no_grad()
def net_that_says(tok, asked, answer):
    """A network that continues any `asked` tokens with the ids of `answer`: its state is the place
    in the text alone, and its head knows what stands there."""
    shape = dict(n_head=4, n_embd=64, pos="learned", qk_norm=False, tie=False)
    net = make_net(vocab_size=tok.n_vocab, n_ctx=64, n_layer=1, **shape)
    for name, p in net.named_parameters():
        p.fill_(1 if "norm" in name else 0)
    net.model.embed_positions.weight.copy_(torch.eye(64))
    for i, token in enumerate(answer):
        net.lm_head.weight[token, asked - 1 + i] = 20
    return net.train()


@pytest.mark.parametrize("reward", ["gsm8k", "arithmetic"])
def test_a_roll_out_ends_where_the_next_question_begins(reward, tok, monkeypatch):
    text = "#### 7\n\nQuestion: 9?\nAnswer: #### 9"
    answer = tok.encode(text) + tok.eos_ids[:1]
    net = net_that_says(tok, 2, answer)
    options(monkeypatch, reward=reward)
    prompt = {"ids": [1, 2], "messages": [], "answer": "#### 7"}
    judge = open_reward(reward, "cpu")
    [sample] = rl.roll_out(net, tok, [prompt], judge, 0, FLOAT32)
    said = sample["ids"][2:] + sample["targets"][-1:]
    if reward == "gsm8k":
        assert tok.decode(said) == "#### 7\n\nQuestion:" and sample["reward"] == 1
    else:
        assert said == answer and sample["reward"] == 0


def test_killed_and_resumed_is_never_stopped(toy):
    args = [*RL, "--method=grpo", "--kl_weight=0.1", "--max_steps=12", "--save_every=2"]
    args += ["--dropout=0.1"]
    run(toy, "rl.py", *args, "--out_dir=whole")
    run_killed(toy, "rl.py", *args, "--out_dir=cut", ending="cut/state.pt", times=2)
    assert torch.load(toy / "cut/state.pt")["step"] == 4
    run(toy, "rl.py", *args, "--out_dir=cut", "--init_from=resume")
    cut, whole = (toy / name / "model.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()


BAD = [
    (["--method=grop"], "--method=grop: expected grpo, rloo, ppo"),
    (["--temperature=1e-40"], "temperature=1e-40: expected 0.001 or more"),
    (["--group_size=1"], "group_size=1: expected 2 or more"),
    (["--seed=-1"], "seed=-1: expected 0 or more"),
    (["--clip=-0.1"], "clip=-0.1: expected 0 or more"),
    (["--gamma=1.5"], "gamma=1.5: expected 0 to 1"),
    (["--method=ppo", "--minibatches=9"], "minibatches=9: a process has 8 samples a step"),
    (["--method=ppo", "--adapt=prompt"], "adapt=prompt: expected --method=grpo"),
]


@pytest.mark.parametrize("args, message", BAD)
def test_bad_input_is_a_line(args, message, toy):
    done = run(toy, "rl.py", *RL, "--out_dir=out/new", *args, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(message)
    assert not (toy / "out/new").exists()


@pytest.mark.parametrize("args", [["--method=grpo", "--group_size=4"], ["config/ppo.py"]])
def test_finetune_names_the_script_that_has_grpo_and_ppo(args, toy):
    done = run(toy, "finetune.py", *args, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "rl.py" in done.stderr
