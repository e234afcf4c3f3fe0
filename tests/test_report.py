"""report.py: comparisons, plans and look-up of memorized text, against other ways to find them."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
import report
from barelm import overlap
from barelm.adapters import AdaptConfig, NF4Linear, choose_weights
from barelm.bpe import bpe_tokenizer, train_bpe
from barelm.chart import ticks
from barelm.checkpoint import save
from barelm.compare import curve, read_log, smooth
from barelm.costs import finetune_memory, finetune_work, learned_weights
from barelm.optim import flops_per_token, n_params
from barelm.run import UserError
from barelm.safetensors import write_safetensors
from barelm.scaling import (
    chinchilla_loss,
    chinchilla_params,
    fit_law,
    fit_powers,
    least_squares,
)
from config import script_keys


def make_run(folder, name, losses, scores=None, tokens=1000, val=None):
    """A run as its files say it: its folder's name."""
    out = folder / name
    out.mkdir(parents=True)
    rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    if val is not None:
        rows.append({"step": len(losses), "val_loss": val, "val_bpb": val / 2})
    rows = [row | ({"tokens": tokens * row["step"]} if tokens else {}) for row in rows]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    if scores is not None:
        results = {}
        for task, its in scores.items():
            for metric, (value, error, n) in its.items():
                cell = {metric: value, f"{metric}_stderr": error, "n": n, "seconds": 1.5}
                results[task] = results.get(task, {}) | cell
        (out / "results.json").write_text(json.dumps({"model": name, "results": results}))
    return name


def test_compare_says_what_the_errors_allow(tmp_path):
    good = {"mmlu": {"acc": (0.5, 0.03, 100)}, "text": {"loss": (2.0, 0.01, 50)}}
    near = {"mmlu": {"acc": (0.42, 0.03, 100)}, "text": {"loss": (2.5, 0.01, 40)}}
    near["tags"] = {"f1": (0.25, None, 1)}
    make_run(tmp_path, "out/a<&|b", [4, 3, 2], good, val=2.5)
    make_run(tmp_path, "out/b", [4, 3.5, 3], near, val=3.25)
    make_run(tmp_path, "out/c", [5, None, 4], val=4.5)
    words = ["out/a<&|b", "out/b", "out/c"]
    done = run(tmp_path, "report.py", "--compare", *words)
    assert done.stdout == run(tmp_path, "report.py", f"--compare={','.join(words)}").stdout
    # What a run lacks is in words, not a cell.
    assert "out/c: no results.json" in done.stdout and "n/a" not in done.stdout
    assert "out/b alone: tags f1 0.25 (n 1)" in done.stdout
    assert done.stdout.endswith(
        "written: out/compare/report.md\nwritten: out/compare/report.svg\n"
        "written: out/compare/report.json\n"
    )
    folder = tmp_path / "out/compare"
    report = (folder / "report.md").read_text()
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
             for line in report.splitlines() if line.startswith("| ")]  # fmt: skip
    assert cells[0] == ["score", r"out/a<&\|b", "out/b", "n"]
    # 0.08 is under twice sqrt(2) x 0.03 = 0.085; 0.5 is far over twice 0.014, and less is better.
    assert cells[2] == ["mmlu acc", "0.5 ± 0.03 *", "0.42 ± 0.03 ~", "100"]
    assert cells[3] == ["text loss", "2 ± 0.01 *", "2.5 ± 0.01", "50 / 40"]
    assert [c[0] + " " + c[4] for c in cells[6:]] == [r"out/a<&\|b 2.5000", "out/b 3.2500",
                                                      "out/c 4.5000"]  # fmt: skip
    record = json.loads((folder / "report.json").read_text())
    assert record["out/b"]["text loss"] == {"value": 2.5, "stderr": 0.01, "n": 40}

    text = (folder / "report.svg").read_text()
    tree = ET.fromstring(text)  # well formed, so that names are escaped
    assert "prefers-color-scheme:dark" in text
    tag = lambda name: [e for e in tree.iter() if e.tag.endswith("}" + name)]
    shown = [e.text for e in tag("text")]
    assert shown.count("out/a<&|b") == 3 and shown.count("out/c") == 1  # of three panels
    dots = [float(e.get("cy")) for e in tag("circle") if e.get("r") == "3.5"]
    ends = [re.findall(r"[\d.]+", e.get("d"))[1:] for e in tag("path") if e.get("class") == "err"]
    errors = [(float(a) - float(b)) / 2 for a, b in ends]
    assert (dots[1] - dots[0]) / errors[0] == pytest.approx(0.08 / 0.03, 0.02)  # better is higher
    assert (dots[2] - dots[3]) / errors[2] == pytest.approx(0.5 / 0.01, 0.1)
    assert len(errors) == 4
    assert len([e for e in tag("path") if e.get("class") == "thin"]) == 3


def test_models_without_a_log_and_the_parts_of_core_are_compared(tmp_path):
    """A model of the Hub has scores alone; of CORE each of its tasks is of interest."""
    for name, shift in (("a", 0), ("b", 0.1)):
        by = {"copa": {"centered": 0.2 + shift, "centered_stderr": 0.1, "n": 100}}
        by |= {"torn": 5, "other": {"centered": "x", "n": 1}}
        entry = {"core_metric": 0.1 + shift, "core_metric_stderr": 0.01, "n": 100, "by": by}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"results": {"core": entry}}))
    done = run(tmp_path, "report.py", "--compare", "a", "b", "--report=r/s/t.md")
    lines = done.stdout.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[2:] == [
        ["core core_metric", "0.1 ± 0.01", "0.2 ± 0.01 *", "100"],
        ["core.copa centered", "0.2 ± 0.1 ~", "0.3 ± 0.1 *", "100"],
    ]
    assert "a: no log.jsonl, so no loss" in lines and (tmp_path / "r/s/t.json").exists()
    before = (tmp_path / "a/results.json").read_text()
    done = run(tmp_path, "report.py", "--compare", "a", "b", "--report=a/results.md", check=False)
    assert done.returncode == 1 and "a/results.json is there, and of no report" in done.stderr
    assert (tmp_path / "a/results.json").read_text() == before


def test_runs_without_tokens_are_shown_by_step(tmp_path):
    make_run(tmp_path, "a", [4, 3, 2], val=2.5)
    make_run(tmp_path, "b", [1, 0.5], tokens=0, val=0.7)
    (tmp_path / "x").write_text("")
    done = run(tmp_path, "report.py", "--compare", "a", "b", "--report=x/r.md", check=False)
    assert done.returncode == 1 and "--report=x: File exists, but is no folder" in done.stderr
    done = run(tmp_path, "report.py", "--compare", "a", "b", "--report=r.md")
    assert "not logged" in done.stdout and ">step</text>" in (tmp_path / "r.svg").read_text()


def test_smoothing_is_the_bias_corrected_mean():
    points = [(i, float(v)) for i, v in enumerate(np.random.default_rng(0).normal(size=200))]
    smoothed, span = smooth(points), 4
    for i in (0, 7, 199):  # the definition: weights (1 - 1/span)^age, normalized
        weights = [(1 - 1 / span) ** (i - j) for j in range(i + 1)]
        mean = sum(w * y for w, (_, y) in zip(weights, points)) / sum(weights)
        assert smoothed[i] == (i, pytest.approx(mean))
    assert len(smooth([(i, 1.0) for i in range(9999)])) <= 402


@pytest.mark.parametrize("low, high, log", [(0, 1, 0), (3.1, 3.3, 0), (1e4, 3e9, 1), (2, 11, 1)])
def test_ticks_are_round_and_inside(low, high, log):
    marks = ticks(low, high, log)
    assert 2 <= len(marks) <= 11 and marks == sorted(set(marks))
    for mark in marks:
        assert low <= mark <= high * 1.001
        digits = f"{mark:.9e}".split("e")[0].rstrip("0").rstrip(".")
        assert len(digits) <= 4 and (not log or digits in "125")


def test_the_optimum_is_where_a_search_finds_it():
    for c in (1e16, 1e20, 5.76e23):
        n = np.geomspace(1e5, 1e13, 200001)
        best = n[np.argmin(chinchilla_loss(n, c / (6 * n)))]
        assert chinchilla_params(c) == pytest.approx(best, 1e-3)
    # Chinchilla's own budget: about 70B parameters and 20 tokens for each, as Besiroglu et al. say.
    n = chinchilla_params(5.76e23)
    assert 6e10 < n < 8e10 and 15 < 5.76e23 / (6 * n * n) < 22


def recipe_of(text):
    values = {}
    exec(text, values)
    return values


@pytest.mark.parametrize("flag, n", [("flops=1e18", 8.05e7), ("params=124e6", 124e6),
                                     ("tokens=2e9", None), ("params=7e9", 7e9)])  # fmt: skip
def test_a_plan_is_a_recipe_of_that_size(tmp_path, flag, n):
    done = run(tmp_path, "report.py", "--plan", f"--{flag}", "--device=a100", "--devices=3")
    r = recipe_of(done.stdout)
    shape = {k: r[k] for k in ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden")}
    config = model.GPTConfig(vocab_size=50304, n_ctx=r["seq_len"], **shape)
    with torch.device("meta"):
        count = n_params(model.GPT(config))
    n = n or chinchilla_params(6 * 2e9 * 8.05e7)  # near the optimum for that many tokens
    assert abs(count / n - 1) < (0.1 if "tokens" not in flag else 0.3)
    assert f"{count:,} parameters" in done.stdout
    assert r["batch_tokens"] % (3 * r["seq_len"]) == 0
    flops = flops_per_token(config, r["seq_len"])
    if flag == "flops=1e18":
        assert r["max_tokens"] * flops == pytest.approx(1e18, 0.02)
    if flag == "tokens=2e9":
        assert r["max_tokens"] == pytest.approx(2e9, 0.01)
    seconds = r["max_tokens"] * flops / (3 * 0.4 * 312e12)
    hours, minutes = re.search(r"time: (?:(\d+)h)?(\d+)m", done.stdout).groups()
    assert int(hours or 0) * 60 + int(minutes) == pytest.approx(seconds / 60, abs=1 + seconds / 3e3)


def test_a_plan_for_money_is_one_for_the_hours_that_it_buys(tmp_path):
    plan = lambda *flags: run(tmp_path, "report.py", "--plan", "--devices=4", *flags).stdout
    bought, hours = plan("--money=100", "--price=2"), plan("--hours=12.5", "--price=2")
    assert bought == hours
    cost, device_hours, price = re.search(r"cost: ([\d.]+) = ([\d.]+) .* x (\S+)", bought).groups()
    assert float(cost) == pytest.approx(100, 0.02) and float(price) == 2
    assert float(cost) == pytest.approx(2 * float(device_hours), abs=0.02)


def finetune_defaults(**changes):
    values = {}
    for script in ("rl.py", "finetune.py"):
        keys = script_keys(ROOT / script)
        values |= {key: default for key, (default, *_) in keys.items()}
    return SimpleNamespace(**values | changes)


def plan_net():
    torch.manual_seed(0)
    shape = dict(vocab_size=320, n_ctx=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
    return model.GPT(model.GPTConfig(**shape))


@pytest.mark.parametrize("adapt", ["full", "lora", "adapter"])
def test_a_plan_counts_the_products_that_torch_counts(adapt):
    """FLOPs forward and backward by torch's own counter, over the plain kernel of attention, whose
    products it sees."""
    net, s = plan_net(), finetune_defaults(adapt=adapt, batch_size=3)
    work = finetune_work(net, s, count=3, length=64, steps=2)
    learn, _ = learned_weights(net, s)
    choose_weights(net, AdaptConfig(adapt))
    assert learn == sum(p.numel() for p in net.parameters() if p.requires_grad)
    ids = torch.randint(0, 128, (3, 65))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(ids[:, :-1], ids[:, 1:])[0].backward()
    exact = 1e-9 if adapt == "full" else 0.09  # the first block's input has no gradient, ...
    assert work["training"] / 2 == pytest.approx(counter.get_total_flops(), rel=exact)


def test_a_plan_s_four_bits_are_those_that_are_kept():
    net, s = plan_net(), finetune_defaults(adapt="qlora")
    memory = finetune_memory(net, s, 64, 0)
    largest = 4 * net.model.layers[0].mlp.up_proj.weight.numel()  # unpacked while it is used
    learn, _ = learned_weights(net, s)
    choose_weights(net, AdaptConfig("qlora"))
    tensors = [*net.parameters(), *net.buffers()]
    size = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
    packed = [m for m in net.modules() if isinstance(m, NF4Linear)]
    size -= sum(m.pairs.nbytes for m in packed)  # a table of 2 kB a layer, not of a weight
    assert memory["weights"] + 4 * learn == pytest.approx(size + largest, rel=0.02)
    assert memory["what learns"] == 16 * learn  # a value, a gradient and AdamW's two moments


def test_plans_of_fine_tunings(tmp_path):
    """The reference of dpo once for each pair, the roll-outs of grpo by group; a recipe counts."""
    net = plan_net()
    plain = finetune_work(net, finetune_defaults(), 100, 32, 5)["training"]
    dpo = finetune_work(net, finetune_defaults(method="dpo"), 100, 32, 5)
    assert dpo["training"] == 2 * plain
    assert dpo["the reference"] == pytest.approx(2 * plain / 3)  # all 80 pairs forward
    again = finetune_work(net, finetune_defaults(method="dpo"), 40, 32, 5)
    assert again["the reference"] == dpo["the reference"] / 2  # two passes over 40 need them once
    kto = finetune_work(net, finetune_defaults(method="kto"), 100, 32, 5)
    assert kto == {"training": plain, "the divergence": plain / 3} | {
        "the reference": dpo["the reference"]
    }
    for method in ("simpo", "orpo"):
        work = finetune_work(net, finetune_defaults(method=method), 100, 32, 5)
        assert work == {"training": 2 * plain}
    s = finetune_defaults(method="distill", on_policy=0.5, teacher_weights="bfloat16")
    taught = finetune_work(net, s, 100, 32, 5, net)
    assert taught["the teacher"] == pytest.approx(plain / 3) == 2 * taught["own answers"]
    memory = finetune_memory(net, s, 32, 0, net)
    assert memory["teacher"] == 2 * sum(p.numel() for p in net.parameters())
    rloo = finetune_work(net, finetune_defaults(method="rloo"), 100, 32, 5)
    assert rloo == finetune_work(net, finetune_defaults(method="grpo"), 100, 32, 5)
    grpo = finetune_work(net, finetune_defaults(method="grpo", kl_weight=0.1), 100, 32, 5)
    assert grpo["training"] == 8 * plain and grpo["log-probabilities"] == 2 * grpo["roll-outs"]
    tok = bpe_tokenizer(train_bpe({b" some words": 9}, 8))
    save(tmp_path / "net", net, tok)
    (tmp_path / "mine.py").write_text("method = 'grpo'\nmax_steps = 30\nmax_epochs = None\n")
    flags = ["--plan", "--finetune=grpo", "--model=net", "--examples=64", "--tokens=640"]
    out = run(tmp_path, "report.py", "mine.py", *flags, "--price=36").stdout
    assert "64 of 64 tokens" in out and "30 steps of 16" in out and "roll-outs" in out
    recipe = recipe_of(out)
    assert (recipe["method"], recipe["max_steps"], recipe["model"]) == ("grpo", 30, "net")
    for bad, words in {
        "--finetune=nope": "--finetune=nope: expected sft, classify",
        "--model=out/none": "out/none: no such folder",
        "--tokens=none": "data/python/sft_train.jsonl: no such file",
    }.items():
        done = run(tmp_path, "report.py", *flags, bad, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert words in done.stderr


def test_train_takes_the_plan(tiny, tmp_path):
    for what in ("data", "out"):
        (tmp_path / what).symlink_to(tiny / what)
    plan = run(tmp_path, "report.py", "--plan", "--params=1e5", "--dataset=tiny").stdout
    (tmp_path / "mine.py").write_text(plan)
    flags = ["--max_steps=1", "--max_tokens=none", f"--out_dir={tmp_path}/new", "--eval_tokens=256"]
    done = run(tmp_path, "train.py", str(tmp_path / "mine.py"), *flags)
    count = int(re.search(r"([\d,]+) parameters:", done.stdout)[1].replace(",", ""))
    assert abs(count / 1e5 - 1) < 0.1 and re.search(r"^step: +1$", done.stdout, re.M)


def test_a_law_is_found_again():
    n, d = (m.ravel() for m in np.meshgrid([1e6, 4e6, 2e7], [1e7, 1e8, 3e8]))
    law = lambda n, d: 1.5 + 300 / n**0.35 + 900 / d**0.4
    again = fit_law(np.c_[n, d], law(n, d))
    assert again.powers == pytest.approx([0.35, 0.4], 1e-3)
    assert [again.offset, *again.factors] == pytest.approx([1.5, 300, 900], 0.02)
    far = np.array([1e9, 1e10])
    assert again.predict(far) == pytest.approx(law(*far), 1e-3)
    # with the exponents held it is linear least squares, here without a coefficient below zero
    noisy = law(n, d) + np.random.default_rng(0).normal(size=9) / 100
    linear = fit_powers(np.c_[n, d], noisy, [0.3, 0.3])
    terms = np.array([linear.offset, *linear.factors])
    columns = np.c_[np.ones(9), n**-0.3, d**-0.3]
    assert terms == pytest.approx(np.linalg.lstsq(columns, noisy, rcond=None)[0], 1e-6)
    assert linear.error == pytest.approx(np.sqrt(np.mean((columns @ terms - noisy) ** 2)))
    assert least_squares(np.c_[[1.0, 1], [1.0, 2]], np.array([2.0, 1]))[1].min() == 0


def test_a_curve_through_runs(tmp_path):
    losses = {}
    for width in (8, 16, 32, 64):
        net = model.GPT(model.GPTConfig(vocab_size=64, n_ctx=8, n_layer=1, n_head=1, n_embd=width))
        n = n_params(net)
        losses[n] = 1 + 20 / n**0.5
        name = make_run(tmp_path, f"w{width}", [3.0], val=losses[n])
        weights = {k: v for k, v in net.state_dict().items() if k != "lm_head.weight"}  # tied
        with open(tmp_path / name / "model.safetensors", "wb") as file:
            write_safetensors(file, weights, {"step": "1"})
    names = [f"w{width}" for width in (8, 16, 32, 64)]
    done = run(tmp_path, "report.py", "--plan", "--compare", *names)
    e, a, p = map(float, re.search(r"L = ([\d.]+) \+ ([\d.]+) / N\^([\d.]+)", done.stdout).groups())
    assert (e, a, p) == pytest.approx((1, 20, 0.5), rel=0.02)
    for n, loss in losses.items():
        assert f"{n:,}" in done.stdout and f"{loss:.4f}" in done.stdout
    assert "4 runs; rms error 0.0000" in done.stdout
    circles = ET.parse(tmp_path / "out/compare/scaling.svg").iter(
        "{http://www.w3.org/2000/svg}circle"
    )
    assert len([c for c in circles if c.get("r") == "3.5"]) == 4
    done = run(tmp_path, "report.py", "--plan", "--compare", *names[:3])
    assert "exponents held at Chinchilla's" in done.stdout


def naive_longest(text, shards):
    """The longest run of the text's tokens in the shards, by trying every pair of places."""
    best = 0
    for shard in shards:
        for i in range(len(text)):
            for j in range(len(shard)):
                k = 0
                while i + k < len(text) and j + k < len(shard) and text[i + k] == shard[j + k]:
                    k += 1
                best = max(best, k)
    return best


@pytest.mark.parametrize("n, piece", [(3, 1 << 20), (3, 7), (8, 20)])
def test_longest_runs_and_shares_equal_a_naive_search(n, piece, monkeypatch):
    monkeypatch.setattr(overlap, "PIECE", piece)  # runs that lie across pieces too
    rng = np.random.default_rng(n)
    shards = [
        rng.integers(0, 4, size=k).astype(t) for k, t in ((150, "<u2"), (90, "<u4"), (2, "<u2"))
    ]
    texts = [rng.integers(0, 4, size=k) for k in (1, 2, 5, 12, 30)]
    texts += [shards[0][40:75], shards[1][60:], np.full(20, 3), np.array([9, 9, 9, 9])]
    texts.append(np.concatenate([shards[0][-10:], shards[1][:10]]))  # no run goes over shards
    found, runs = overlap.longest_runs(shards, texts, n)
    assert runs.tolist() == [naive_longest(text, shards) for text in texts]
    assert {35, 30, 0} <= set(runs.tolist())
    for text, hits in zip(texts, found):
        grams = [tuple(text[i : i + n].tolist()) for i in range(len(text) - n + 1)]
        there = {tuple(s[i : i + n].tolist()) for s in shards for i in range(len(s) - n + 1)}
        assert hits.tolist() == [gram in there for gram in grams]


def test_memorized_on_a_model(tiny):
    flags = ["--model=out/tiny", "--dataset=tiny", "--num_texts=8", "--prompt_length=8"]
    flags += ["--text_length=16", "--ngram=4"]
    done = run(tiny, "report.py", "--memorized", *flags)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    again = run(tiny, "report.py", "--memorized", *flags).stdout.splitlines()
    assert table == [line for line in again if line.startswith("|")]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table[2:5]]
    assert [row[0] for row in rows] == [
        "prompted by training",
        "without a prompt",
        "validation text",
    ]
    shard = np.fromfile(tiny / "data/tiny/train_000000.bin", "<u2", offset=1024).tolist()
    there = {tuple(shard[i : i + 4]) for i in range(len(shard) - 3)}
    val = np.fromfile(tiny / "data/tiny/val_000000.bin", "<u2", offset=1024).tolist()
    texts = [val[i : i + 16] for i in range(0, len(val), 16)]
    grams = [tuple(t[i : i + 4]) for t in texts for i in range(len(t) - 3)]
    share = sum(gram in there for gram in grams) / len(grams)
    assert rows[2][-1].startswith(f"{share:.4f} ±") and int(rows[2][1]) == len(texts)
    assert re.search(r"\d of 8 continuations of 8 training tokens go on", done.stdout)
    results = json.loads((tiny / "out/tiny/results.json").read_text())["results"]["memorized"]
    assert results["validation text, share of 4-grams"] == pytest.approx(share)
    for bad, words in (("--dataset=none", "data/none: no train"), ("--num_texts=0", "expected 1")):
        done = run(tiny, "report.py", "--memorized", *flags, bad, check=False)
        assert done.returncode == 1 and words in done.stderr


@pytest.mark.parametrize("split, ids, words", [
    ("train", [5, 60_000] * 99, "train_000000.bin: token 60000, but the tokenizer has"),
    ("val", [], "no train and val shards with tokens in them"),
    ("val", [60_000], "val_000000.bin: token 60000, but the tokenizer has"),
])  # fmt: skip
def test_memorized_refuses_shards_of_other_ids_and_of_none(split, ids, words, tiny, tmp_path):
    shutil.copytree(tiny / "data", tmp_path / "data")
    with open(tmp_path / f"data/tiny/{split}_000000.bin", "wb") as file:
        file.write(np.array([20240520, 1, len(ids), *[0] * 253], "<i4"))
        file.write(np.array(ids, "<u2"))
    flags = ["--dataset=tiny", "--num_texts=2", "--prompt_length=8", "--text_length=16"]
    flags += [f"--model={tiny / 'out/tiny'}", "--out_dir=out", "--memorized"]
    done = run(tmp_path, "report.py", *flags, check=False)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_windows_hold_no_token_that_begins_or_ends_a_document():
    document = [1, *range(10, 16), 2]  # of a tokenizer with both, as Llama 3's is
    shard = np.array(document * 50, "<u2")
    for seed in (0, -1):
        windows = overlap.draw_windows([shard], 6, 20, [1, 2], seed, "data/x")
        assert all(window.tolist() == document[1:-1] for window in windows)


@pytest.mark.parametrize("args, words", [
    (["--compare=nobody"], "nobody: no such run"),
    (["--compare=empty"], "no row of a step in it"),
    (["--compare=bare"], "bare: no log.jsonl in this folder"),
    (["--compare", "wrong"], "results.json: not results of eval.py"),
    (["--plan"], "expected --flops or --hours"),
    (["--plan", "--flops=-1"], "flops=-1: expected a number above 0"),
    (["--plan", "--hours=2", "--device=abacus"], "--device=abacus: with --plan expected one"),
    (["--plan", "--hours=2", "--mfu=40"], "mfu=40"),
    (["--plan", "--money=2"], "money=2: expected --price too"),
    (["--plan", "--money=2", "--hours=2", "--price=1"], "expected --flops or --hours"),
    (["--plan", "--hours=2", "--price=0"], "price=0: expected a number above 0"),
    (["--plan", "--flops=1e18", "--dataset=bad"], "meta.json: malformed: 'x' is no count"),
    (["--plan", "--params=50"], "no shape of 50 parameters"),
    (["--plan", "--hours=1", "--flops=1"], "expected --flops or --hours"),
    (["--plan", "--compare=empty"], "needs 3 runs or more, not 1"),
    (["--plan", "--compare", "wrong", "w2", "w3"], "wrong: its log has no val_loss"),
    (["--memorized"], "out/python: no such folder"),
    (["--memorized", "--plan"], "--memorized: expected no --compare and no --plan"),
    (["--plan", "--compare=empty", "--flops=1"], "--plan: either --compare, to fit a curve"),
    ([], "nothing to do: expected --compare, --plan or --memorized"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, args, words):
    make_run(tmp_path, "wrong", [1])
    (tmp_path / "wrong/results.json").write_text('{"results": {"a": {"b": 1, "b_stderr": 1}}}')
    (tmp_path / "bare").mkdir()
    (tmp_path / "data/bad").mkdir(parents=True)
    (tmp_path / "data/bad/meta.json").write_text('{"n_vocab": 300, "train": {"tokens": "x"}}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/log.jsonl").write_text("\n")
    done = run(tmp_path, "report.py", *args, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert words in done.stderr
    assert not [*tmp_path.glob("*.svg")]


DEEP = "[" * 100_000


def test_logs_of_any_form_are_compared(tmp_path):
    lines = [DEEP, '{"step": "1"}', "[1]", "\ufffe", '{"step": 1, "loss": 1e308, "tokens": "9"}']
    lines += ['{"step": 2, "loss": 1' + "0" * 400 + ', "tokens": [1]}', '{"step": 3, "loss": 2.5}']
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert curve(rows, "loss", "step") == [(3, 2.5)]
    done = run(tmp_path, "report.py", "--compare=.")
    assert "2.5000" in done.stdout and (tmp_path / "out/compare/report.svg").exists()


def test_a_task_s_name_may_be_half_a_surrogate_pair(tmp_path):
    make_run(tmp_path, "a", [1])
    results = {"\ud800x": {"acc": 1, "acc_stderr": 0, "n": 2}}
    (tmp_path / "a/results.json").write_text(json.dumps({"results": results}))
    done = run(tmp_path, "report.py", "--compare=a")
    assert (
        "\\ud800x acc" in done.stdout
        and "?x acc" in (tmp_path / "out/compare/report.md").read_text()
    )


REPORTS = {"": "expected a name", "x.svg": "expected a name", "out": "no plain file"}
REPORTS |= {"/dev/null": "no plain file", "f/x.md": "is no folder", "a" * 300: "too long"}


def test_odd_places_for_a_report_are_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 2.5}')
    (tmp_path / "f").write_text("")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(report, "compare", ".")
    for name, message in REPORTS.items():
        monkeypatch.setattr(report, "report", name)
        with pytest.raises(UserError, match=message) as error:
            report.compare_runs()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(report, "compare", ",")
    with pytest.raises(UserError, match="expected the folders of runs"):
        report.compare_runs()
