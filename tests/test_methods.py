"""Distillation, KTO, ORPO, SimPO and RLOO: each loss against its paper's formula in float64, and in
runs of the commands. (TRL's numbers for the same batches: test_trl.py.)"""

import contextlib
import itertools
import json
import math

import pytest
import torch
from conftest import alone, run, run_killed
from test_finetune import net_for, talk
from test_model import QWEN3, make_net

import finetune
import rl
from barelm import distillation
from barelm.adapters import AdaptConfig
from barelm.checkpoint import load, save
from barelm.clean import Reject
from barelm.distillation import divergence, last_answer, other_tokens, with_own_answers
from barelm.examples import IGNORED, pack_rows
from barelm.ratings import rows_of_ratings, thumbs_of
from barelm.run import Run, UserError
from barelm.tasksets import as_kto
from barelm.tokenizer import Tokenizer
from barelm.tuning import Learner
from barelm.unpaired import add_mismatched, balance_note, partners

CAST = contextlib.nullcontext()


@pytest.fixture
def tok(tiny):
    return Tokenizer.from_folder(tiny / "out/tiny")


def settings(monkeypatch, module=finetune, **values):
    for key, value in values.items():
        monkeypatch.setattr(module, key, value)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --------------------------------------------------------------------------------------------------
# The formulas, in float64


def test_simpo_and_orpo_are_their_papers_formulas(monkeypatch):
    g = torch.Generator().manual_seed(0)
    chosen, rejected = -torch.rand(2, 6, generator=g).double() * 3
    settings(monkeypatch, simpo_beta=2.5, simpo_gamma=0.7, orpo_weight=0.3)
    simpo = finetune.simpo_loss(chosen, rejected)
    odds = finetune.odds_ratio_loss(chosen, rejected)
    for a, b, got, got_odds in zip(*(x.tolist() for x in (chosen, rejected, simpo, odds))):
        assert got == pytest.approx(-math.log(sigmoid(2.5 * a - 2.5 * b - 0.7)))
        odds_w = math.exp(a) / (1 - math.exp(a))
        odds_l = math.exp(b) / (1 - math.exp(b))
        assert got_odds == pytest.approx(-math.log(sigmoid(math.log(odds_w / odds_l))))
    sure = torch.tensor([0.0], requires_grad=True)  # p = 1 has no odds, and makes no NaN
    loss = finetune.odds_ratio_loss(sure, torch.tensor([-1.0])).sum()
    loss.backward()
    assert loss.isfinite() and sure.grad.isfinite().all()


def test_kto_is_its_papers_formula(monkeypatch):
    g = torch.Generator().manual_seed(0)
    ratio = torch.randn(6, generator=g).double()
    desirable = torch.tensor([True, False, True, True, False, False])
    settings(monkeypatch, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5)
    losses = finetune.kto_loss(ratio, 0.3, desirable)
    for r, is_good, got in zip(ratio.tolist(), desirable.tolist(), losses.tolist()):
        weight = 1.5 if is_good else 0.5
        value = weight * sigmoid(0.4 * (r - 0.3) if is_good else 0.4 * (0.3 - r))
        assert got == pytest.approx(weight - value)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_gkds_equation(beta, temperature):
    g = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 4, 9, generator=g).double()
    got = divergence(student, teacher, beta, temperature)
    for i in range(4):
        p = (teacher[i] / temperature).softmax(0).tolist()
        q = (student[i] / temperature).softmax(0).tolist()
        kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b))
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q)]
        expected = beta * kl(p, m) + (1 - beta) * kl(q, m)
        if beta in (0, 1):  # M is one of the two there: the divergence itself in its place
            expected = kl(q, p) if beta else kl(p, q)
        assert float(got[i]) == pytest.approx(expected)
    same = divergence(teacher, teacher, beta, temperature)
    torch.testing.assert_close(same, torch.zeros_like(same))


def test_leave_one_out_is_the_mean_of_the_others(monkeypatch):
    rewards, groups = [1.0, 0.0, 0.5, 3.0, 0.1, 0.1, 0.1], [0, 0, 0, 0, 1, 1, 1]
    got = rl.leave_one_out(rewards, groups)
    for i in range(4):
        others = [rewards[j] for j in range(4) if j != i]
        assert float(got[i]) == pytest.approx(rewards[i] - sum(others) / 3)
    assert (got[4:] == 0).all()  # no rounding counts as a difference
    settings(monkeypatch, rl, kl_weight=0.5)
    samples = []
    for reward, group in zip(rewards[:4], groups):
        old, ref = torch.randn(2, 3)
        samples.append({"reward": reward, "group": group, "old": old, "ref": ref})
    rl.add_leave_one_out(None, samples)
    shaped = [e["reward"] - 0.5 * float((e["old"] - e["ref"]).sum()) for e in samples]
    expected = rl.leave_one_out(shaped, groups[:4])
    torch.testing.assert_close(torch.cat([e["advantage"] for e in samples]), expected)


def sequence_of(asked, answer):
    """An example: the ids of a prompt, and of its answer, which alone is learned."""
    return {"ids": (asked + answer)[:-1], "targets": [IGNORED] * (len(asked) - 1) + answer}


def log_p_of(net, example, n_vocab=None):
    """The log-probability of each target."""
    logits = net(torch.tensor([example["ids"]]))[0, :, :n_vocab]
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p[i, t] for i, t in enumerate(example["targets"]) if t != IGNORED])


def test_rloo_is_reinforce_of_whole_answers(tok):
    """In the first update of a step: -A times the gradient of log p(y | x)."""
    net = net_for(tok).eval()
    samples = [sequence_of([1, 2, 3], [4, 5, 6, 7]), sequence_of([1, 2], [9])]
    for e, advantage in zip(samples, (0.7, -1.3)):
        with torch.no_grad():
            e["old"] = log_p_of(net, e, tok.n_vocab)
        e["advantage"] = torch.tensor([advantage])
    loss, figures = rl.rloo_loss(net, samples, tok.n_vocab)
    loss.backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    reinforce = 0
    for e in samples:
        reinforce = reinforce - e["advantage"][0] * log_p_of(net, e, tok.n_vocab).sum()
    reinforce.backward()
    for a, b in zip(got, [p.grad for p in net.parameters()]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert rl.METHODS["rloo"].size(samples) == 2
    assert float(figures["clipfrac"]) == 0


# --------------------------------------------------------------------------------------------------
# A batch


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_by_pieces_is_the_plain_sum(tok, monkeypatch, beta):
    """Packed rows, several pieces of them, and two vocabularies of different padding."""
    net = net_for(tok)
    teacher = make_net(vocab_size=2 * tok.n_vocab, **(QWEN3 | {"n_ctx": 64})).eval()
    net.double(), teacher.double()
    talks = [("def f", "returns x"), ("a longer question", "no"), ("q", "yes, or perhaps no")]
    examples = [finetune.read_sft({"messages": talk(*said)}, tok, 64) for said in talks]
    settings(monkeypatch, distill_beta=beta, distill_temperature=2.0, hard_weight=0.3)
    expected = 0
    for e in examples:
        rows = torch.tensor([e["ids"]])
        for i, target in enumerate(e["targets"]):
            if target == IGNORED:
                continue
            logits = net(rows)[0, i]
            with torch.no_grad():
                goal = teacher(rows)[0, i, : tok.n_vocab]
            soft = divergence(logits[None, : tok.n_vocab], goal[None], beta, 2.0)[0]
            hard = -logits.log_softmax(-1)[target]
            expected = expected + 0.7 * 4 * soft + 0.3 * hard
    expected.backward()
    goals = [p.grad.clone() for p in net.parameters()]
    for n_rows, most in itertools.product((1, 3), (3, 1000)):
        net.zero_grad()
        rows = pack_rows(examples, 64, several=n_rows == 1)
        monkeypatch.setattr(distillation, "PIECE_LOGITS", most * net.config.vocab_size)
        loss, figures = finetune.distill_loss(teacher, tok.n_vocab, net, rows)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        for p, goal in zip(net.parameters(), goals):
            torch.testing.assert_close(p.grad, goal, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


def test_mismatched_answers_are_about_another_prompt():
    a, b, c = [1], [2], [3]
    assert partners([a, a, b, b, c]) == [2, 2, 1, 1, 3]
    assert partners([a, b]) == [1, 0] and partners([a, a]) == [1, 0] and partners([a]) == [0]
    grown = partners([a, a, b, b, c, a])
    assert grown[:5] == partners([a, a, b, b, c])  # a longer run pairs as a shorter one did
    examples = [sequence_of([1, 2, 3], [4, 5]), sequence_of([6], [7, 8, 9])]
    add_mismatched(examples, 64)
    assert examples[0]["mismatched"] == sequence_of([1, 2, 3], [7, 8, 9])
    assert examples[1]["mismatched"] == sequence_of([6], [4, 5])
    add_mismatched(examples, 3)
    cut = examples[0]["mismatched"]
    assert cut == {"ids": [1, 2, 3], "targets": [IGNORED, IGNORED, 7]}
    open_end = {"ids": [6, 7, 8, 9], "targets": [7, 8, IGNORED, IGNORED]}  # of a template
    examples = [sequence_of([1, 2, 3], [4, 5]), open_end]
    add_mismatched(examples, 64)
    expected = {"ids": [1, 2, 3, 7, 8], "targets": [IGNORED, IGNORED, 7, 8, IGNORED]}
    assert examples[0]["mismatched"] == expected


def learner_of(net, tok, run_here=None):
    return Learner(run_here or alone(), net, tok, "out/tiny", AdaptConfig())


def rated(tok):
    rows = []
    for prompt, answer, label in [
        ("ask", "one two", True), ("a longer question", "yes", False), ("ask", "no", False),
        ("what", "it is not, or is it", True), ("why", "x", True),
    ]:  # fmt: skip
        row = {"prompt": prompt, "completion": answer, "label": label}
        rows.append(finetune.read_rated(row, tok, 64))
    return rows


def test_kto_compares_with_the_divergence_of_the_whole_batch(tok, monkeypatch):
    """Naively, a sequence at a time; whatever the micro-batches."""
    reference, net = net_for(tok), net_for(tok)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    examples = rated(tok)
    finetune.add_rated_reference(learner_of(reference, tok), examples, CAST)
    ratios, others = [], []
    with torch.no_grad():
        for e in examples:
            ratios.append(float((log_p_of(net, e) - log_p_of(reference, e)).sum()))
            other = e["mismatched"]
            others.append(float((log_p_of(net, other) - log_p_of(reference, other)).sum()))
    kl = max(0.0, sum(others) / 5)
    desirable = [e["desirable"] for e in examples]
    expected = 0.0
    for ratio, is_good in zip(ratios, desirable):
        expected += 1 - sigmoid(0.1 * (ratio - kl) if is_good else 0.1 * (kl - ratio))
    good = [r for r, is_good in zip(ratios, desirable) if is_good]
    bad = [r for r, is_good in zip(ratios, desirable) if not is_good]
    for micro in (8, 10_000):
        settings(monkeypatch, micro_tokens=micro)
        task = finetune.METHODS["kto"]
        learner = learner_of(net, tok)
        groups = list(finetune.groups_of_step(learner, task, examples, 64, CAST, 0))
        assert (len(groups) > 1) == (micro == 8)
        sums = {"loss": 0.0, "kl": 0.0, "margin": 0.0, "accuracy": 0.0}
        for group in groups:
            loss, figures = finetune.kto(net, group)
            for name, value in ({"loss": loss} | figures).items():
                sums[name] += float(value.detach())
        assert sums["loss"] == pytest.approx(expected, rel=1e-4)
        assert sums["kl"] / 5 == pytest.approx(kl, abs=1e-4)
        margin = 0.1 * (sum(good) / 3 - sum(bad) / 2)
        assert sums["margin"] / 5 == pytest.approx(margin, abs=1e-4)
        right = sum((r > kl) == is_good for r, is_good in zip(ratios, desirable))
        assert sums["accuracy"] == right


def test_own_answers_are_the_students_whatever_the_number_of_processes(tok, monkeypatch):
    net = net_for(tok)
    talks = [("def f", "returns x"), ("q", "yes", "z", "no, it is not"), ("what", "a"), ("b", "c")]
    examples = [finetune.read_sft({"messages": talk(*said)}, tok, 64) for said in talks]
    own = with_own_answers(learner_of(net, tok), examples, 1.0, 64, 9, 5, CAST)
    for e, data in zip(own, examples):
        begin = last_answer(data)
        assert e["ids"][: begin + 1] == data["ids"][: begin + 1]
        assert all(t == IGNORED for t in e["targets"][:begin] + e["labels"])
        assert e["targets"][begin:-1] == e["ids"][begin + 1 :]
    some = with_own_answers(learner_of(net, tok), examples, 0.5, 64, 9, 5, CAST)
    n_own = sum(e["labels"] != e["targets"] for e in some)
    assert 0 < n_own < 4
    assert [e["labels"] == d["targets"] for e, d in zip(some, examples)].count(True) == 4 - n_own
    parts = []
    monkeypatch.setattr(distillation, "gathered", lambda _, value: parts.append(value) or [value])
    for rank in range(3):
        process = Run(torch.device("cpu"), rank=rank, world=3)
        process.mesh = alone().mesh
        with_own_answers(learner_of(net, tok, process), examples, 1.0, 64, 9, 5, CAST)
    together = {number: e for part in parts for number, e in part.items()}
    assert [together[i] for i in range(4)] == own


def test_a_teacher_has_the_same_tokens(tok, tiny):
    assert other_tokens(tok, tok) == ""
    other = Tokenizer.from_folder(tiny / "out/tiny")
    other.token_bytes = lambda id: b"?" if id == 7 else tok.token_bytes(id)
    assert other_tokens(other, tok).startswith("token 7 is b'?', not ")
    other.special = {}
    assert other_tokens(other, tok) == "other special tokens"


# --------------------------------------------------------------------------------------------------
# Rows


def test_a_rated_row_that_is_none_is_left_out_with_the_field(tok):
    row = {"prompt": "Hi", "completion": "Hello", "label": True}
    assert finetune.read_rated(row, tok, 64)["desirable"] is True
    bad = {"label": "true", "prompt": 5, "completion": None}
    for key, value in bad.items():
        with pytest.raises(UserError, match=f"^{key}: expected "):
            finetune.read_rated(row | {key: value}, tok, 64)


def test_kto_rows_of_every_known_form():
    prompt = [{"role": "user", "content": "Hi"}]
    row = {"prompt": prompt, "completion": "Hello", "label": True}
    assert as_kto(row) == [row] and as_kto(row | {"prompt": "Hi"}) == [row]
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    assert as_kto(pair) == [row, {"prompt": prompt, "completion": "No", "label": False}]
    for bad in ({"label": 1}, {"label": None}, {"completion": " "}):
        with pytest.raises(Reject):
            as_kto(row | bad)


def test_a_lone_thumb_is_a_row():
    ask = [{"role": "user", "content": "Hi"}]
    ratings = [
        {"prompt": ask, "response": "good", "rating": 1},
        {"prompt": ask, "response": "bad", "rating": -1},
        {"prompt": ask, "response": "withdrawn", "rating": -1},
        {"prompt": ask, "response": "withdrawn", "rating": 0},
        {"prompt": [*ask, *ask], "response": "lone", "rating": 1},
    ]
    rows = thumbs_of(ratings)
    assert [(row["completion"], row["label"]) for row in rows] == [
        ("good", True), ("bad", False), ("lone", True),
    ]  # fmt: skip
    split_by = [*rows_of_ratings("kto", ratings).values()]
    assert split_by[0] == split_by[1] != split_by[2]  # a prompt is in one split


def test_weights_that_balance_both_kinds():
    assert balance_note(100, 100, 1, 1) == balance_note(100, 80, 1, 1) == ""
    assert "--undesirable_weight=3.75 to 5" in balance_note(500, 100, 1, 1)
    assert "--desirable_weight=4 to 5.33" in balance_note(100, 400, 1, 1)
    assert balance_note(100, 400, 4.5, 1) == balance_note(500, 100, 1, 4) == ""
    assert "nothing to tell them from" in balance_note(5, 0, 1, 1)


# --------------------------------------------------------------------------------------------------
# The commands

QUICK = ["--max_steps=4", "--max_epochs=none", "--batch_size=4", "--micro_tokens=150"]
QUICK += ["--eval_examples=7", "--eval_every=4", "--model=out/tiny", "--dataset=tiny"]
QUICK += ["--warmup_steps=0", "--dtype=float32", "--seq_len=64", "--check_memorized=0"]
KINDS = {
    "kto": ["--method=kto", "--learning_rate=1e-3"],
    "distill": ["--method=distill", "--teacher=out/teacher", "--on_policy=0.5"],
}
KINDS["distill"] += ["--max_new_tokens=6", "--hard_weight=0.2", "--distill_beta=0.3"]


@pytest.fixture(scope="session")
def teacher(tiny):
    """The tiny model after a few steps more, by which another can be taught."""
    quick = [*QUICK, "--learning_rate=1e-2", "--out_dir=out/teacher"]
    run(tiny, "finetune.py", *quick)
    return tiny


def log(folder, out):
    rows = map(json.loads, (folder / out / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "dt"} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_and_parts_of_a_network_change_nothing(teacher, kind):
    args = [*QUICK, *KINDS[kind]]
    out = f"out/methods_{kind}"
    done = run(teacher, "finetune.py", *args, f"--out_dir={out}1")
    assert ("teacher: out/teacher, " in done.stdout) == (kind == "distill")
    run(teacher, "finetune.py", *args, f"--out_dir={out}2", processes=2)
    run(teacher, "finetune.py", *args, f"--out_dir={out}3", "--parallel=fsdp", processes=2)
    rows = log(teacher, f"{out}1")
    names = {"kto": {"kl", "margin", "accuracy"}, "distill": {"divergence", "nll"}}[kind]
    assert names <= rows[1].keys() and {f"val_{name}" for name in names} <= rows[0].keys()
    for other in "23":
        for a, b in zip(rows, log(teacher, out + other), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-4), (key, other)
        net, _ = load(teacher / f"{out}1")
        same, _ = load(teacher / (out + other))
        for a, b in zip(net.parameters(), same.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_never_stopped(teacher, kind):
    args = [*QUICK, *KINDS[kind], "--dropout=0.1", "--save_every=2", "--adapt=lora"]
    whole, cut = f"out/whole_{kind}", f"out/cut_{kind}"
    run(teacher, "finetune.py", *args, f"--out_dir={whole}")
    run_killed(teacher, "finetune.py", *args, f"--out_dir={cut}", ending=f"{cut}/state.pt")
    assert torch.load(teacher / cut / "state.pt")["step"] == 2
    run(teacher, "finetune.py", *args, f"--out_dir={cut}", "--init_from=resume")
    name = "adapter_model.safetensors"
    assert (teacher / cut / name).read_bytes() == (teacher / whole / name).read_bytes()
    assert log(teacher, cut) == log(teacher, whole)


@pytest.mark.parametrize("method", ["simpo", "orpo", "kto"])
def test_preferences_are_learned(tiny, method):
    args = [*QUICK, f"--method={method}", "--adapt=qlora", "--lora_rank=16", "--batch_size=8"]
    args += ["--max_steps=20", "--eval_every=20", "--learning_rate=2e-2", "--eval_examples=0"]
    run(tiny, "finetune.py", *args, f"--out_dir=out/learn_{method}")
    first, last = [row for row in log(tiny, f"out/learn_{method}") if "val_loss" in row]
    print(method, first, last)
    assert last["val_loss"] < first["val_loss"] and last["val_margin"] > first["val_margin"]


def test_a_student_comes_nearer_to_its_teacher(teacher):
    """Whose weights are held in fewer bits; the divergence from itself is none."""
    args = [*QUICK, "--method=distill", "--teacher=out/teacher", "--learning_rate=3e-3"]
    args += ["--max_steps=12", "--eval_every=12"]
    for weights in ("bfloat16", "int8"):
        out = f"out/near_{weights}"
        done = run(
            teacher, "finetune.py", *args, f"--teacher_weights={weights}", f"--out_dir={out}"
        )
        assert f"MiB as {weights} on each process" in done.stdout
        first, last = [row for row in log(teacher, out) if "val_loss" in row]
        assert last["val_divergence"] < 0.7 * first["val_divergence"]
    more = ["--model=out/teacher", "--out_dir=out/near_itself", "--max_steps=1"]
    run(teacher, "finetune.py", *args, *more)
    assert log(teacher, "out/near_itself")[0]["val_divergence"] == pytest.approx(0, abs=1e-6)
    changed = ["--init_from=resume", "--out_dir=out/near_int8", "--teacher=out/tiny"]
    done = run(teacher, "finetune.py", *changed, check=False)
    assert done.returncode == 1 and "teacher" in done.stderr


def test_thumbs_that_stand_alone_are_learned_from(tiny):
    lines = []
    for i in range(30):
        prompt = [{"role": "user", "content": f"{i}?"}]
        line = {"prompt": prompt, "response": f"answer {i}", "rating": 1 if i % 3 else -1}
        lines.append(json.dumps(line))
    (tiny / "lone.jsonl").write_text("\n".join(lines))
    done = run(tiny, "prepare.py", "--task=kto", "--source=lone.jsonl", "--dataset=lone")
    assert "kto: 30 ratings of answers: 30 rows, 20 liked and 10 not" in done.stdout
    out = "--out_dir=out/lone"
    done = run(tiny, "finetune.py", *QUICK, "--method=kto", "--dataset=lone", out)
    assert "--undesirable_weight=" in done.stdout
    assert all(math.isfinite(value) for row in log(tiny, "out/lone") for value in row.values())


BAD = [
    (["--method=distill"], "--method=distill: expected --teacher=FOLDER"),
    (["--method=kto", "--teacher=out/tiny"], "--teacher=out/tiny: it is of --method=distill"),
    (["--method=distill", "--teacher=out/none"], "out/none: no such folder"),
    (["--method=distill", "--teacher=out/new"], "--out_dir=out/new"),
    (["--method=distill", "--teacher=out/tiny", "--on_policy=2"], "on_policy=2.0: expected 0 to 1"),
    (["--method=distill", "--teacher=out/tiny", "--adapt=prompt"], "adapt=prompt: the teacher"),
    (["--method=distill", "--teacher=out/tiny", "--distill_temperature=0"], "distill_temperature"),
    (
        ["--method=distill", "--teacher=out/tiny", "--teacher_weights=int3"],
        "--teacher_weights=int3",
    ),
    (["--method=distill", "--teacher=out/other"], "--teacher=out/other: another tokenizer than"),
    (["--method=distill", "--teacher=out/short"], "--teacher=out/short: a context of 16 tokens"),
    (["--method=simpo", "--simpo_beta=-1"], "simpo_beta=-1.0: expected 0 or more"),
    (["--method=kto", "--undesirable_weight=-1"], "undesirable_weight=-1.0: expected 0 or more"),
    (["--method=kto", "--dataset=none"], "data/none/kto_train.jsonl: no such file"),
    (["--method=rloo"], "finetune.py: --method=rloo is rl.py's"),
]


@pytest.fixture(scope="session")
def others(tiny):
    """Beside the tiny model one of another tokenizer, and one of a short context."""
    from test_outside import open_tokenizer

    net, tok = load(tiny / "out/tiny")
    other = open_tokenizer("gpt2")
    shape = QWEN3 | {"n_ctx": 256}
    save(tiny / "out/other", make_net(vocab_size=other.n_vocab, **shape), other)
    save(tiny / "out/short", make_net(vocab_size=512, **(QWEN3 | {"n_ctx": 16})), tok)
    return tiny


@pytest.mark.parametrize("args, message", BAD)
def test_bad_input_is_a_line(args, message, others):
    done = run(others, "finetune.py", *QUICK, "--out_dir=out/new", *args, check=False)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (others / "out/new").exists()
