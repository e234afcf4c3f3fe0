"""finetune.py: every loss against its formula, every kind of added weight against the plain one,
and the commands from start to end."""

import contextlib
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run, run_killed
from test_model import QWEN3, make_net
from test_outside import FAMILIES, open_tokenizer

import finetune
from barelm import fitting
from barelm.adapters import Adapter, NF4Linear, add_adapters, add_tokens
from barelm.chat import CHATML
from barelm.checkpoint import load, save
from barelm.devices import free_memory
from barelm.examples import (
    check_template,
    count_targets,
    longest_row,
    pack_rows,
    padded_length,
    rounded_length,
)
from barelm.rewards import open_reward
from barelm.run import Run, Updater, UserError, advice_on_memory, autocast, make_scaler
from barelm.safetensors import read_safetensors, write_safetensors
from barelm.tokenizer import Tokenizer
from barelm.tuning import accumulate_gradients, make_optimizers
from model import call_block, generate

CPU = torch.device("cpu")

QUICK = [
    "--max_steps=4",
    "--batch_size=4",
    "--eval_examples=8",
    "--eval_every=4",
    "--check_memorized=0",
]
QUICK += ["--model=out/tiny", "--dataset=tiny", "--warmup_steps=0", "--dtype=float32"]


@pytest.fixture
def tok(tiny):
    return Tokenizer.from_folder(tiny / "out/tiny")


def talk(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


def examples_of(tok, *talks, limit=64):
    return [finetune.read_sft({"messages": talk(*said)}, tok, limit) for said in talks]


TALKS = [("def f", "returns x"), ("a longer question, this time", "no"), ("q", "yes", "z", "no")]
TALKS += [("what", "a rather long answer that has many tokens")]


def net_for(tok, **more):
    net = make_net(vocab_size=-(-tok.n_vocab // 64) * 64, **(QWEN3 | {"n_ctx": 64} | more))
    return net.train()


# --------------------------------------------------------------------------------------------------
# Losses


def test_the_loss_is_on_what_the_assistant_says_alone(tok):
    [e] = examples_of(tok, ("ask one", "say one", "ask two", "say two"))
    said = [t for t in e["targets"] if t != -100]
    end = tok.special["<|im_end|>"]
    assert tok.decode(said) == "say one<|im_end|>say two<|im_end|>" and said.count(end) == 2
    full, mask = tok.chat(talk("ask one", "say one", "ask two", "say two"))
    assert e["ids"] == full[:-1] and sum(mask) == len(said)


def test_prompt_tokens_get_no_gradient(tok):
    net = net_for(tok)
    [e] = examples_of(tok, ("abc", "x"))
    embeds = net.model.embed_tokens(torch.tensor([e["ids"]])).detach().requires_grad_()
    targets = torch.tensor([e["targets"]])
    logits = net.lm_head(net.hidden(None, embeds=embeds))
    logits.retain_grad()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    silent = targets[0] == -100
    assert silent.any() and not silent.all()
    assert logits.grad[0, silent].abs().max() == 0 < logits.grad[0, ~silent].abs().min(0)[0].max()
    loss, _ = finetune.sft_loss(net, pack_rows([e], 64))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("pack", [False, True])
def test_packing_and_chunks_change_no_gradient(tok, pack, monkeypatch):
    net, examples = net_for(tok), examples_of(tok, *TALKS)
    sft = finetune.METHODS["sft"]

    def gradients(groups):
        net.zero_grad()
        for group in groups:
            (finetune.sft_loss(net, group)[0] / count_targets(examples)).backward()
        return [p.grad.clone() for p in net.parameters()]

    alone = gradients([pack_rows([e], 64) for e in examples])  # a row each, no padding
    assert (len(pack_rows(examples, 64, several=pack)) < len(examples)) == pack
    monkeypatch.setattr(finetune, "pack", pack)
    for micro in (8, 70, 10_000):
        monkeypatch.setattr(finetune, "micro_tokens", micro)
        for a, b in zip(alone, gradients(finetune.groups_of(sft, net, examples, 64))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_dpo_is_the_papers_formula(monkeypatch):
    g = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 5, generator=g).double()
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.2)):
        monkeypatch.setattr(finetune, "beta", beta)
        monkeypatch.setattr(finetune, "label_smoothing", smoothing)
        loss, *_ = finetune.preference_loss(chosen, rejected, ref_chosen, ref_rejected)
        for i in range(5):
            ratio = math.exp(chosen[i] - ref_chosen[i]) / math.exp(rejected[i] - ref_rejected[i])
            p = ratio**beta / (1 + ratio**beta)
            expected = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)
            assert abs(loss[i] - expected) < 1e-9
    monkeypatch.setattr(finetune, "dpo_loss", "ipo")
    monkeypatch.setattr(finetune, "beta", 0.25)
    loss, *_ = finetune.preference_loss(chosen, rejected, ref_chosen, ref_rejected)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    torch.testing.assert_close(loss, (h - 1 / (2 * 0.25)) ** 2)


def test_response_logprobs_sum_over_the_answer(tok):
    net = net_for(tok).eval()
    row = {"prompt": "ask", "chosen": "one two three", "rejected": "no"}
    pair = finetune.read_pair(row, tok, 64)
    with torch.no_grad():
        both = finetune.response_logprobs(net, [pair["chosen"], pair["rejected"]])
        for name, got in zip(("chosen", "rejected"), both):
            ids, said = tok.chat(talk("ask", row[name]))
            logp = net(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
            expected = sum(logp[i - 1, ids[i]] for i in range(1, len(ids)) if said[i])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_pairs_of_equal_answers_are_left_out(tok):
    for method in ("dpo", "reward"):
        read = finetune.METHODS[method].read_row
        row = {"prompt": "ask", "chosen": "one two three", "rejected": "one two three"}
        with pytest.raises(UserError, match="chosen and rejected are the same"):
            read(row, tok, 64)
        ids = read(row | {"rejected": "one two four"}, tok, 64)
        assert ids["chosen"] != ids["rejected"]


def test_scores_read_the_last_token_or_the_mean(tok):
    net = net_for(tok).eval()
    examples = [{"ids": tok.encode("one two three")}, {"ids": tok.encode("a")}]
    for pooling in ("last", "mean"):
        net.set_score(["x", "y", "z"], pooling)
        with torch.no_grad():
            scores = net.scores([e["ids"] for e in examples])
            for e, got in zip(examples, scores):
                h = net.hidden(torch.tensor([e["ids"]]))[0]
                expected = net.score(h[-1] if pooling == "last" else h.mean(0))
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_accuracy_and_f1():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    pairs = finetune.Counter(zip(labels.tolist(), guesses.tolist()))
    out = finetune.accuracies(pairs, 200)
    assert out["accuracy"] == pytest.approx((labels == guesses).mean())
    f1 = []
    for k in range(4):
        tp = ((labels == k) & (guesses == k)).sum()
        precision, recall = tp / (guesses == k).sum(), tp / (labels == k).sum()
        f1.append(2 * precision * recall / (precision + recall))
    assert out["f1"] == pytest.approx(np.mean(f1))
    table = [line.split() for line in finetune.confusion(pairs, "abcd").splitlines()[2:]]
    for i, (number, label, *row) in enumerate(table):
        assert (number, label) == (str(i), "abcd"[i])
        assert row == [str(((labels == i) & (guesses == j)).sum()) for j in range(4)]


# --------------------------------------------------------------------------------------------------
# A step, on any device

PAIRS = [("ask", "one two three", "no"), ("a longer question", "yes", "it is not, or is it")]
EVERY = ["sft", "classify", "tag", "span", "embed", "dpo", "ipo", "reward"]
EVERY += ["simpo", "orpo", "kto", "distill"]
ROWS = {
    "tag": [
        {"tokens": ["def", "one", "(", "two", ")"], "tags": ["O", "B-name", "O", "B-arg", "O"]},
        {"text": "print a", "entities": [{"start": 0, "end": 5, "label": "name"}]},
    ],
    "span": [
        {"question": "who", "context": text, "answers": {"text": ["he"], "answer_start": [4]}}
        for text in ("was he", "was he, or was it she")
    ],
    "embed": [
        {"a": "one two", "b": "two one"},
        {"query": "a", "positive": "b, as long as nothing", "negative": "c"},
        {"anchor": "x is", "positive": "is x"},
    ],
}


def prepared(method, tok, monkeypatch, **shape):
    """(task, net, examples) of a method, ready for its loss."""
    monkeypatch.setattr(finetune, "dpo_loss", "ipo" if method == "ipo" else "sigmoid")
    monkeypatch.setattr(finetune, "embed_temperature", 1.0)  # gradients as large as others'
    task = finetune.METHODS["dpo" if method == "ipo" else method]
    net = net_for(tok, **shape)
    if method in ("sft", "distill"):
        if method == "distill":
            task = taught(task, net_for(tok, n_layer=1).eval(), tok)  # not the student itself
        return task, net, examples_of(tok, *TALKS)
    if method == "kto":
        rows = []
        for prompt, chosen, rejected in PAIRS:
            rows.append({"prompt": prompt, "completion": chosen, "label": True})
            rows.append({"prompt": prompt, "completion": rejected, "label": False})
        known = {"reference": [-20.0, -21.0], "kl": 0.3, "sign": 1.0}
        return task, net, [task.read_row(row, tok, 64) | known for row in rows]
    if method == "classify":
        texts = {"one two three": "x", "a": "y", "four and five": "x"}
        rows = [{"text": text, "label": label} for text, label in texts.items()]
        examples = [finetune.read_class(row, tok, 64) for row in rows]
        net.set_score(["x", "y"])
        return task, net, examples
    if method in ROWS:
        examples = [task.read_row(row, tok, 64) for row in ROWS[method]]
        task.add_head(net, tok, examples, [], print)
        return task, net, examples
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in PAIRS]
    examples = [task.read_row(row, tok, 64) | {"reference": [-20.0, -21.0]} for row in rows]
    if method == "reward":
        net.set_score(["reward"])
    return task, net, examples


def taught(task, teacher, tok):
    """A distillation's task with its teacher, which stands where the student does."""

    def loss(net, rows):
        teacher.to(net.lm_head.weight.device)
        return finetune.distill_loss(teacher, tok.n_vocab, net, rows)

    return replace(task, loss=loss)


def accumulated(task, net, examples, cast, scaler=None):
    """The sums of a step, and the gradients (each the whole batch's) that it leaves in net."""
    run_here = Run(net.model.embed_tokens.weight.device)
    updater = Updater(run_here, net.parameters(), [], scaler)
    loss_of = lambda group: task.loss(net, group)
    groups = finetune.groups_of(task, net, examples, 64)
    sums = accumulate_gradients(updater, groups, loss_of, task.size(examples), task.logs, cast)
    return sums


@pytest.mark.parametrize("method", EVERY)
def test_a_step_waits_for_no_device(method, tok, monkeypatch):
    """On a device that holds no numbers, as meta does, whoever asks for one fails."""
    monkeypatch.setattr(finetune, "micro_tokens", 40)  # several micro-batches
    task, net, examples = prepared(method, tok, monkeypatch)
    net.to("meta")
    sums = accumulated(task, net, examples, contextlib.nullcontext())
    assert sums.keys() == {"loss", *task.logs} and all(s.is_meta for s in sums.values())
    assert any(p.grad is not None for p in net.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(sums["loss"])


@pytest.mark.parametrize("method", EVERY)
def test_padding_changes_no_loss_and_no_gradient(method, tok, monkeypatch):
    task, net, examples = prepared(method, tok, monkeypatch, n_ctx=100)
    cast = torch.autocast("cpu", enabled=False)
    results = []
    for block in (call_block, lambda *args: call_block(*args)):
        net.zero_grad()
        net.train_block = block  # one that is not call_block counts as compiled
        [group, *others] = finetune.groups_of(task, net, examples, 64)
        length = padded_length(net, max(map(longest_row, group)))
        assert not others and (length in (64, 100)) == (block is not call_block)
        sums = accumulated(task, net, examples, cast)
        results.append([*sums.values()] + [p.grad for p in net.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True):  # of ipo the larger gradients, on some CPUs
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_memory_that_torch_keeps_of_a_gpu_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_memory(torch.device("cuda")) == 500


def test_lengths_of_batches_are_few():
    lengths = [rounded_length(n, 4000) for n in range(1, 4001)]
    assert lengths == sorted(lengths) and all(n <= T for n, T in enumerate(lengths, 1))
    assert set(lengths[:512]) == set(range(64, 513, 64)) and len(set(lengths)) == 8 + 4 * 3
    assert max(lengths) == 4000  # the context, behind which no position lies


@pytest.mark.parametrize("method", EVERY)
def test_float16_learns_what_float32_learns(method, tok, monkeypatch):
    task, net, examples = prepared(method, tok, monkeypatch)
    gradients = []
    scaler = make_scaler(CPU, torch.float16)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 16.0})  # as it finds after some steps
    for dtype, used, scale in ((torch.float32, None, 1), (torch.float16, scaler, 16)):
        net.zero_grad()
        accumulated(task, net, examples, autocast(CPU, dtype), used)
        grads = [p.grad / scale for p in net.parameters() if p.grad is not None]
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    one, half = gradients
    assert half.isfinite().all() and (half - one).norm() < 0.02 * one.norm()


def test_answers_are_the_same_in_batches_of_any_size(tok, monkeypatch):
    net = net_for(tok).eval()
    prompts = [tok.encode(text) for text in ("one", "a longer one", "two three", "x", "def f")]
    for options in (dict(temperature=0), dict(temperature=1.0, seed=3)):
        together = generate(net, tok, prompts, max_new_tokens=9, **options)
        for n in (1, 2, 9):
            monkeypatch.setattr(fitting, "rows_that_fit", lambda net, longest: n)
            parts = fitting.generate_all(net, tok, prompts, 9, **options)
            assert [g.ids for g in parts] == [g.ids for g in together]


def test_out_of_memory_names_the_settings():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        with pytest.raises(UserError, match=r"^out of memory: lower micro_tokens \(now 4096\)"):
            with advice_on_memory(finetune.memory_advice):
                raise error
    with pytest.raises(RuntimeError, match="other"), advice_on_memory(finetune.memory_advice):
        raise RuntimeError("other")


# --------------------------------------------------------------------------------------------------
# Added weights


def test_bottlenecks_start_as_nothing_and_open_again(tiny):
    before, _ = load(tiny / "out/tiny")
    tune(
        tiny, "--method=adapter", "--adapter_size=4", "--learning_rate=0.01", "--out_dir=out/bottle"
    )
    after, _ = load(tiny / "out/bottle")
    ids = torch.randint(0, 200, (2, 9))
    with torch.no_grad():
        assert (after(ids) - before(ids)).abs().max() > 1e-3
        for m in after.modules():
            if isinstance(m, Adapter):
                m.up.weight.zero_()
                m.up.bias.zero_()
        assert torch.equal(after(ids), before(ids))  # nothing else has changed
        add_adapters(before, 7)
        assert torch.equal(before(ids), after(ids))
        x, bottle = torch.randn(3, 64), before.model.layers[0].mlp.down_proj
        bottle = Adapter(torch.nn.Linear(64, 8), 3)
        torch.nn.init.normal_(bottle.up.weight)
        y = F.linear(x, bottle.base.weight, bottle.base.bias)
        inner = F.gelu(y @ bottle.down.weight.T + bottle.down.bias)
        torch.testing.assert_close(bottle(x), y + inner @ bottle.up.weight.T + bottle.up.bias)


def test_soft_prompts_are_rows_of_the_embedding_that_alone_learn(tiny):
    before, tok = load(tiny / "out/tiny")
    args = ["--method=prompt", "--prompt_tokens=5", "--learning_rate=0.01", "--out_dir=out/prompt"]
    tune(tiny, *args, "--max_steps=20", "--eval_every=20")
    after, new = load(tiny / "out/prompt")
    ids = [new.special[f"<|prompt_{i}|>"] for i in range(5)]
    chat = talk("a", "b")
    assert new.chat(chat)[0] == ids + tok.chat(chat)[0] and new.n_vocab == tok.n_vocab + 5
    rows = before.config.vocab_size
    for (name, a), b in zip(after.named_parameters(), before.parameters()):
        if "embed" in name:
            old = [i for i in range(rows) if i not in ids]
            assert torch.equal(a[old], b[old]) and not torch.equal(a[ids[0]], a[ids[1]])
        else:
            assert torch.equal(a, b), name
    rows = [row for row in log(tiny, "out/prompt") if "val_loss" in row]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


# --------------------------------------------------------------------------------------------------
# The commands


def tune(folder, *args, **how):
    return run(folder, "finetune.py", *QUICK, *args, **how)


def log(folder, out):
    return [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]


ALONE = ["--method=dpo", "--adapt=qlora", "--batch_size=1"]  # a process without a pair


@pytest.mark.parametrize("more", [[], ["--method=classify"], ALONE], ids=["sft", "classify", "dpo"])
def test_two_processes_make_the_same_steps(more, tiny):
    tune(tiny, *more, "--overwrite", "--out_dir=out/one")
    done = tune(tiny, *more, "--overwrite", "--out_dir=out/two", processes=2)
    assert "weights: equal on 2 processes" in done.stdout
    for a, b in zip(log(tiny, "out/one"), log(tiny, "out/two"), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4)
    one, two = (load(tiny / "out" / name)[0] for name in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("more", [["--dropout=0.1"], ["--method=lora", "--lora_dropout=0.1"]])
def test_killed_and_resumed_is_never_stopped(tiny, more, tmp_path):
    args = [a for a in QUICK if "steps=4" not in a] + [*more, "--save_every=2"]
    args += [f"--model={tiny / 'out/tiny'}"]
    (tmp_path / "data").symlink_to(tiny / "data")
    run(tmp_path, "finetune.py", *args, "--max_steps=30", "--out_dir=whole")
    cut = [*args, "--max_steps=30", "--out_dir=cut"]
    run_killed(tmp_path, "finetune.py", *cut, ending="cut/state.pt", times=3)
    assert torch.load(tmp_path / "cut/state.pt")["step"] == 6
    run(tmp_path, "finetune.py", *cut, "--init_from=resume")
    name = "adapter_model.safetensors" if "--method=lora" in more else "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    strip = lambda rows: [{k: v for k, v in row.items() if k != "dt"} for row in rows]
    assert strip(log(tmp_path, "cut")) == strip(log(tmp_path, "whole"))


@pytest.mark.parametrize("method", ["classify", "reward"])
def test_a_score_opens_here_and_in_transformers(method, tiny):
    done = tune(tiny, f"--method={method}", f"--out_dir=out/{method}")
    assert done.stderr == ""  # torch warns where a number is taken from what has a gradient
    net, tok = load(tiny / "out" / method)
    assert len(net.labels) == len(net.score.weight) and (method == "reward") == (
        len(net.labels) == 1
    )
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(tiny / "out" / method).eval()
    examples = [{"ids": tok.encode("def f(x):\n    return x")}]
    with torch.no_grad():
        expected = theirs(torch.tensor([examples[0]["ids"]])).logits
        torch.testing.assert_close(
            net.scores([e["ids"] for e in examples]), expected, rtol=1e-3, atol=1e-3
        )
    if method == "classify":
        assert list(theirs.config.id2label.values()) == net.labels
    prompt = "def f(x):\n    return x"
    done = run(tiny, "sample.py", f"--model=out/{method}", f"--prompt={prompt}")
    shown = dict(line.split("  ") for line in done.stdout.splitlines())
    shares = expected[0].softmax(0) if method == "classify" else expected[0]
    for label, share in zip(net.labels, shares.tolist()):
        assert float(shown[label]) == pytest.approx(share, abs=2e-3)


def logits_of(folder, ids):
    with torch.no_grad():
        return load(folder)[0](ids)


@pytest.mark.parametrize("method", ["sft", "classify"])
def test_qlora_merges_into_the_full_weights_or_into_its_4_bits(method, tiny):
    """The adapter's folder opens on the full weights, and so does merged/; with --merge=quantized
    merged/ is the network that was trained: the same products on the weights in 4 bits."""
    ids, nets, said = torch.randint(0, 200, (2, 9)), {}, {}
    for merge in ("--merge", "--merge=quantized"):
        out = f"out/{method}{merge.replace('=', '-')}"
        args = [f"--method={method}", "--adapt=qlora", "--learning_rate=0.03", f"--out_dir={out}"]
        said[merge] = tune(tiny, *args, merge).stdout
        nets[merge] = load(tiny / out / "merged")[0]
    full, packed = nets["--merge"].state_dict(), nets["--merge=quantized"].state_dict()
    base = load(tiny / "out/tiny")[0]
    adapted = [f"{name}_proj.weight" for name in "qkvo"]
    for name, layer in base.named_modules():
        weight = f"{name}.weight"
        if not isinstance(layer, torch.nn.Linear) or not name.startswith("model."):
            continue
        rounding = NF4Linear(layer).weight - layer.weight
        assert rounding.abs().max() > 1e-3
        added = packed[weight] - full[weight]  # the same products are in both
        torch.testing.assert_close(added, rounding, rtol=1e-4, atol=1e-6)
        changed = (full[weight] - layer.weight).abs().max() > 1e-4
        assert changed == any(weight.endswith(word) for word in adapted), name
    assert "merged, into the weights of out/tiny\n" in said["--merge"]
    assert "merged, into the 4 bits of out/tiny that it was" in said["--merge=quantized"]
    with torch.no_grad():
        same, other = (net.hidden(ids) for net in nets.values())
        opened = load(tiny / f"out/{method}--merge")[0].hidden(ids)
    if method == "sft":
        assert "adapter: out/sft--merge, which opens on the weights of out/tiny" in said["--merge"]
        torch.testing.assert_close(opened, same, rtol=1e-4, atol=1e-4)
    else:  # a score has no place in an adapter's folder
        assert nets["--merge"].labels == nets["--merge=quantized"].labels
        assert "plain folder: out/classify--merge, merged into the 4 bits" in said["--merge"]
        torch.testing.assert_close(opened, other, rtol=1e-4, atol=1e-4)


def test_a_finished_run_is_merged_when_it_is_resumed(tiny):
    args = ["--method=lora", "--out_dir=out/later", "--learning_rate=0.03"]
    tune(tiny, *args)
    assert not (tiny / "out/later/merged").exists()
    tune(tiny, *args, "--merge", "--init_from=resume")
    ids = torch.randint(0, 200, (2, 9))
    merged, adapter = (logits_of(tiny / place, ids) for place in ("out/later/merged", "out/later"))
    torch.testing.assert_close(merged, adapter, rtol=1e-4, atol=1e-4)


def test_dpo_raises_the_margin(tiny):
    args = ["--max_steps=12", "--eval_every=12", "--learning_rate=1e-3", "--eval_examples=40"]
    tune(tiny, "--method=dpo", *args, "--out_dir=out/dpo")
    rows = [row for row in log(tiny, "out/dpo") if "val_loss" in row]
    assert rows[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[0]["val_margin"] == 0 and rows[0]["val_accuracy"] == 0.5  # it is the reference
    assert rows[-1]["val_margin"] > 0 and rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_a_tokenizer_without_a_chat_template_gets_one(tiny):
    net, tok = load(tiny / "out/tiny")
    tok.config.pop("chat_template")
    save(tiny / "out/plain", net, tok)
    done = tune(tiny, "--model=out/plain", "--out_dir=out/chat")
    assert "out/plain has no chat template: ChatML's is added" in done.stdout
    net, tok = load(tiny / "out/chat")
    assert tok.chat(talk("a", "b"))[1].count(1) > 1 and tok.special["<|im_end|>"] in tok.eos_ids
    # and one that lacks the tokens too: they get rows of their own
    spec = tok.spec | {
        "added_tokens": [t for t in tok.spec["added_tokens"] if "im_" not in t["content"]]
    }
    spec["model"] = spec["model"] | {
        "vocab": {k: v for k, v in spec["model"]["vocab"].items() if "im_" not in k}
    }
    bare = Tokenizer(spec, {k: v for k, v in tok.config.items() if k != "chat_template"})
    net = make_net(vocab_size=bare.n_vocab, **(QWEN3 | {"n_ctx": 64}))
    ids = torch.randint(0, bare.n_vocab, (1, 8))
    before = net(ids)
    added = add_tokens(net, bare, ("<|im_start|>", "<|im_end|>"), CHATML)
    assert added.n_vocab == bare.n_vocab + 2 <= net.config.vocab_size == len(net.lm_head.weight)
    torch.testing.assert_close(net(ids)[..., : bare.n_vocab], before)


def test_a_chat_template_that_ends_no_answer_is_told(tiny):
    net, tok = load(tiny / "out/tiny")
    tok.config["chat_template"] = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
    save(tiny / "out/endless", net, tok)
    args = ["--max_steps=1", "--model=out/endless", "--out_dir=out/endless_sft"]
    done = tune(tiny, *args, "--check_memorized=2")
    assert "out/endless: its chat template ends no answer with a special token" in done.stdout
    assert "% end at all" in done.stdout and "ended_training: " in done.stdout
    # Of this one no mask can be told: a reward model and a chat need none.
    tok.config["chat_template"] = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}say: {% endif %}"""
    save(tiny / "out/endless", net, tok)
    told = "answers end at the end token alone: the chat template writes another header"
    args = ["--method=reward", *args[:2], "--out_dir=out/endless_reward"]
    assert told in tune(tiny, *args).stdout
    args = ["--model=out/endless", "--chat", "--max_new_tokens=4"]
    done = run(tiny, "sample.py", *args, stdin="hi\n")
    assert told in done.stderr and "model> " in done.stdout


def test_nothing_is_said_of_validation_where_there_is_none(tiny):
    rows = (tiny / "data/tiny/sft_train.jsonl").read_text().splitlines()[:4]
    (tiny / "data/few").mkdir()
    (tiny / "data/few/sft_train.jsonl").write_text("\n".join(rows))
    (tiny / "data/few/sft_val.jsonl").write_text("")
    args = ["--max_steps=1", "--dataset=few", "--out_dir=out/few", "--check_memorized=2"]
    said = [line for line in tune(tiny, *args).stdout.splitlines() if "memorization:" in line]
    assert len(said) == 1 and "of training responses" in said[0]
    assert "validation" not in said[0] and "nan" not in said[0]


def test_plain_records_by_a_template(tok, monkeypatch):
    monkeypatch.setattr(finetune, "template", "Q: {instruction} {input} A: {output} END")
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    e = finetune.read_sft(row, tok, 64)
    asked = [tok.eot_id, *tok.encode("Q: add 1 2 A: ")]
    answer = [*tok.encode("3 END"), tok.eot_id]
    assert e["ids"] == (asked + answer)[:-1]
    assert e["targets"] == [-100] * (len(asked) - 1) + answer
    again = finetune.read_sft({"messages": talk("add", "3")}, tok, 64)
    assert [t for t in again["targets"] if t != -100] == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_by_a_template_end_where_generation_stops(family, monkeypatch):
    monkeypatch.setattr(finetune, "template", "Q: {instruction} {input} A: {output}")
    tok = open_tokenizer(family)
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    e = finetune.read_sft(row, tok, 99)
    asked, said = tok.encode("Q: add 1 2 A: "), tok.encode("3")
    assert e["ids"][0] == tok.eot_id and e["ids"][1:] == asked + said
    assert e["targets"] == [-100] * len(asked) + said + tok.eos_ids[:1]
    assert e["targets"][-1] in tok.eos_ids
    row = {"messages": talk("add", "3", "and 4?", "7")}  # each answer ends
    targets = finetune.read_sft(row, tok, 99)["targets"]
    runs = "".join("x" if t == -100 else "e" if t in tok.eos_ids else "." for t in targets)
    assert runs.strip("x").count("e") == 2 and runs[-1] == "e" and ".ex" in runs


def test_a_template_loses_nothing_of_a_conversation(tok, monkeypatch):
    def text(row):
        e = finetune.read_sft(row, tok, 999)
        said = tok.decode([t for t in e["targets"] if t != -100])
        return tok.decode([*e["ids"][1:], e["targets"][-1]]), said

    end = tok.decode(tok.eos_ids[:1])
    system = [{"role": "system", "content": "Be kind."}]
    monkeypatch.setattr(finetune, "template", "Q: {instruction}{input}\nA: {output}\n")
    row = {"messages": [*system, *talk("a", "b", "c {d}", "e")]}
    whole = f"Be kind.\n\nQ: a\nA: b\n{end}Q: c {{d}}\nA: e\n{end}"
    assert text(row) == (whole, f"b\n{end}e\n{end}")
    row = {"instruction": "a", "input": None, "system": "Be kind.", "output": "{e}"}
    assert text(row) == (f"Be kind.\n\nQ: a\nA: {{e}}\n{end}", f"{{e}}\n{end}")
    monkeypatch.setattr(finetune, "template", "[{system}] {instruction}: {output}")
    assert text({"messages": [*system, *talk("a", "b")]})[0] == f"[Be kind.] a: b{end}"
    assert text({"messages": talk("a", "b")})[0] == f"[] a: b{end}"


def test_several_templates_in_a_run(tok, monkeypatch):
    several = ["1 {instruction} {output}", "2 {instruction} {output}", "3 {instruction} {output}"]
    rows = [{"instruction": str(i), "output": "x"} for i in range(60)]
    first = lambda row: tok.decode(finetune.read_sft(row, tok, 99)["ids"])[len("<|endoftext|>")]
    for value in (several, json.dumps(several)):  # of a recipe, of a flag
        monkeypatch.setattr(finetune, "template", value)
        chosen = [first(row) for row in rows]
        assert min(chosen.count(n) for n in "123") >= 8
        assert chosen == [first(row) for row in rows]  # by the record alone
        own = [first(row | {"template": "4 {output}"}) for row in rows]
        assert set(own) == {"4"}
        assert [first(row | {"template": "a name"}) for row in rows] != own
    for wrong in (
        "no place",
        "{output} {output}",
        "{output} {0}",
        "{output} {",
        "{output.__class__}",
    ):
        with pytest.raises(UserError, match="^template"):
            check_template(wrong)


def chain(tok, ids):
    """A network that continues each of these tokens by the next one, whatever is before it."""
    net = net_for(tok, tie=False).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) or name == "lm_head.weight":
                p.zero_()
        states = net.model.norm(net.model.embed_tokens.weight)
        for here, after in zip(ids, ids[1:]):
            net.lm_head.weight[after] += states[here]
    return net


def test_an_answer_that_does_not_end_does_not_come_back(tok):
    end = tok.special["<|im_end|>"]
    tok.eos_ids = [end]
    question, answer = tok.encode("?"), tok.encode("abcd")
    assert len({*question, *answer}) == len(question + answer)
    example = {"ids": question + answer, "targets": [*answer, end]}
    cast = torch.autocast("cpu", enabled=False)
    ends = chain(tok, question + answer + [end])
    assert finetune.repeated(ends, tok, [example], cast) == (1, 1)
    other = chain(tok, question + answer[:1] + [end])
    assert finetune.repeated(other, tok, [example], cast) == (0, 1)
    # It says the answer and goes on with tokens that have no text, or was never taught an end.
    start = tok.special["<|im_start|>"]
    endless = chain(tok, question + answer + [start, start])
    untaught = {"ids": question + answer, "targets": [*answer, start]}
    assert finetune.repeated(endless, tok, [example], cast) == (0, 0)
    assert finetune.repeated(endless, tok, [untaught], cast) == (0, 0)


@pytest.mark.parametrize("ends", ["line", "pad", "mark"])
def test_rewards_are_read_where_transformers_reads_them(ends, tmp_path):
    """By training, by --reward=FOLDER, and by transformers on what apply_chat_template gives."""
    tok = open_tokenizer("smollm2")
    template = tok.config["chat_template"]
    pad = "<|endoftext|>" if "<|endoftext|>" in tok.special else [*tok.special][-1]
    template += {"line": "", "pad": f"{pad}{pad}", "mark": "<|im_end|>"}[ends]
    config = tok.config | {"chat_template": template, "pad_token": pad}
    tok = Tokenizer(tok.spec, config)
    net = make_net(vocab_size=tok.n_vocab, **(QWEN3 | {"n_ctx": 128})).eval()
    net.set_score(["reward"], pad_id=tok.pad_id)
    torch.nn.init.normal_(net.score.weight)
    save(tmp_path, net, tok)
    rows = [{"prompt": "hi", "chosen": "hello you", "rejected": "no"},
            {"prompt": talk("a", "b", "c"), "chosen": "d", "rejected": "a longer one"}]  # fmt: skip
    pairs = [finetune.read_scored_pair(row, tok, 128) for row in rows]
    judge = open_reward(str(tmp_path), "cpu")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path)
    scores = {}
    for which in ("chosen", "rejected"):
        prompts = [talk(row["prompt"]) if isinstance(row["prompt"], str) else row["prompt"]
                   for row in rows]  # fmt: skip
        talks = [[*p, {"role": "assistant", "content": r[which]}] for p, r in zip(prompts, rows)]
        batch = their_tok.apply_chat_template(
            talks, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            scores[which] = theirs(**batch).logits[:, 0]
            ours = net.scores([pair[which]["ids"] for pair in pairs])[:, 0]
        torch.testing.assert_close(ours, scores[which], rtol=1e-4, atol=1e-4)
        for prompt, row, score in zip(prompts, rows, scores[which]):
            assert judge(prompt, row[which], "") == pytest.approx(float(score), abs=1e-4)
    loss, stats = finetune.reward_loss(net, pairs)
    margins = scores["chosen"] - scores["rejected"]
    torch.testing.assert_close(loss, -F.logsigmoid(margins).sum(), rtol=1e-4, atol=1e-4)
    short = finetune.read_scored_pair(
        rows[1], tok, 9
    )  # of a longer one the end is kept, which is read
    assert short["cut"] and short["chosen"]["ids"] == pairs[1]["chosen"]["ids"][-9:]


def test_learning_rates_fall_with_depth(tok):
    net = net_for(tok)
    peaks = {}
    for o in make_optimizers(net, "adamw", 0.25, weight_decay=0.0, layer_decay=0.5):
        for group in o.param_groups:
            peaks |= {id(p): group["initial_lr"] / 0.25 for p in group["params"]}
    L = net.config.n_layer
    for name, p in net.named_parameters():
        depth = (
            int(name.split(".")[2]) + 1 if ".layers." in name else 0 if "embed" in name else L + 1
        )
        assert peaks[id(p)] == pytest.approx(0.5 ** (L + 1 - depth)), name


def test_only_the_last_blocks_learn(tiny):
    before, _ = load(tiny / "out/tiny")
    tune(tiny, "--train_last=1", "--out_dir=out/last")
    after, _ = load(tiny / "out/last")
    changed = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters()) if not a.equal(b)
    }
    assert changed and all(".layers.1." in n or n == "model.norm.weight" for n in changed)


def test_the_head_alone_learns(tiny):
    tune(tiny, "--method=classify", "--train_last=none", "--out_dir=out/head", "--pooling=last")
    before, after = (load(tiny / f"out/{name}")[0] for name in ("tiny", "head"))
    trunk = dict(before.model.named_parameters())
    assert all(p.equal(trunk[name]) for name, p in after.model.named_parameters())
    rows = [row for row in log(tiny, "out/head") if "val_loss" in row]
    assert rows[-1]["val_loss"] != rows[0]["val_loss"]
    net, _ = load(tiny / "out/tiny")
    assert net.config.tie  # so that its head is the embedding
    done = tune(tiny, "--train_last=none", "--out_dir=out/new", check=False)
    assert done.stderr.count("\n") == 1 and "nothing would learn" in done.stderr


def test_a_classifier_of_the_mean_is_not_said_to_be_transformers(tiny):
    done = tune(tiny, "--method=classify", "--pooling=mean", "--out_dir=out/mean")
    assert "pooling=mean: the folder is model_type barelm" in done.stdout
    for folder in ("out/mean", "out/mean/best"):
        assert json.loads((tiny / folder / "config.json").read_text())["model_type"] == "barelm"
    args = ["--method=classify", "--pooling=mean", "--adapt=lora", "--merge"]
    tune(tiny, *args, "--out_dir=out/mean_lora")
    for folder in ("out/mean_lora", "out/mean_lora/merged"):
        assert json.loads((tiny / folder / "config.json").read_text())["model_type"] == "barelm"
    net, tok = load(tiny / "out/mean")
    ids = tok.encode("def f(x):\n    return x")
    with torch.no_grad():
        expected = net.score(net.hidden(torch.tensor([ids]))[0].mean(0))
        torch.testing.assert_close(net.scores([ids])[0], expected, rtol=1e-4, atol=1e-5)


BAD = [
    (["--method=dqo"], "--method=dqo: expected sft, "),
    (["--dataset=none"], "data/none/sft_train.jsonl: no such file: python prepare.py --task=sft"),
    (["--model=out/none"], "out/none: no such folder"),
    (["--method=lora", "--lora_targets=q_proj,z_proj"], "lora_targets: this model has no layer z_"),
    (["--batch_size=0"], "batch_size=0: expected 1 or more"),
    (["--max_steps=0"], "max_steps=0: expected more than 0, or none"),
    (["--max_epochs=1e400"], "max_epochs=inf: expected more than 0, or none"),
    (["--max_epochs=none", "--max_steps=none"], "no horizon: set max_steps, max_epochs, max_m"),
    (["--seed=-1"], "seed=-1: expected 0 or more"),
    (["--learning_rate=-1"], "learning_rate=-1.0: expected 0 or more"),
    (["--eval_examples=-1"], "eval_examples=-1: expected 0 or more"),
    (["--check_memorized=-1"], "check_memorized=-1: expected 0 or more"),
    (["--dropout=1.5"], "dropout=1.5: expected 0 to 1"),
    (["--method=lora", "--lora_dropout=-1"], "lora_dropout=-1.0: expected 0 to 1"),
    (["--method=dpo", "--label_smoothing=2"], "label_smoothing=2.0: expected 0 to 1"),
    (["--method=dpo", "--dpo_loss=ipo", "--beta=0"], "beta=0.0: expected more than 0"),
    (["--merge"], "--merge: there is no adapter to merge of --adapt=full"),
    (["--method=qlora", "--merge=full"], "--merge=full: expected nothing behind it, or quantized"),
    (["--method=lora", "--merge=quantized"], "--merge=quantized: only qlora has weights in 4 bits"),
    (["--init_from=resume"], "out/new: no checkpoint to resume"),
    (["--dataset=broken"], "data/broken/sft_train.jsonl:2: no JSON: '{broken'"),
    (["--template=no place"], "template 'no place': expected {output} once"),
    (["--template=[]"], "template: an empty list"),
    (
        ["--method=dpo", "--template={output}"],
        "template: it is of --method=sft and distill, not of dpo",
    ),
    (["--method=lora", "--train_last=1"], "train_last=1: of --adapt=full, not of lora"),
    (["--method=lora", "--adapt=qlora"], "--method=lora --adapt=qlora: give one of the two"),
    (["--dataset=empty"], "data/empty: no example for --method=sft"),
    (
        ["--dataset=alike", "--method=classify"],
        "data/alike: the one label of all examples is 'good': expected two labels or more",
    ),
]


@pytest.mark.parametrize("args, message", BAD)
def test_bad_input_is_a_line(args, message, tiny):
    for name, lines in (("broken", ['{"messages": []}', "{broken"]), ("empty", ['{"text": 1}'])):
        (tiny / "data" / name).mkdir(exist_ok=True)
        (tiny / "data" / name / "sft_train.jsonl").write_text("\n".join(lines))
    (tiny / "data/alike").mkdir(exist_ok=True)
    alike = "".join(f'{{"text": "{word}", "label": "good"}}\n' for word in ("fine", "well"))
    (tiny / "data/alike/classify_train.jsonl").write_text(alike)
    done = tune(tiny, "--out_dir=out/new", *args, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(message)
    assert not (tiny / "out/new").exists()


def test_an_adapter_for_another_base_is_a_line(tiny, tmp_path):
    tune(tiny, "--method=lora", "--out_dir=out/lora")
    small, tok = net_for(Tokenizer.from_folder(tiny / "out/tiny")), None
    tok = Tokenizer.from_folder(tiny / "out/tiny")
    save(tmp_path / "small", small, tok)
    config = json.loads((tiny / "out/lora/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "small")
    (tmp_path / "a").mkdir()
    for file in (tiny / "out/lora").glob("adapter_model*"):
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="an adapter for another base than .*does not fit"):
        load(tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    with pytest.raises(UserError, match="not rsLoRA"):
        load(tmp_path / "a")


def test_an_adapter_for_a_bare_trunk_opens(tiny, tmp_path):
    """transformers' AutoModel has no head: its layers' names begin without `model.`."""
    tune(tiny, "--method=lora", "--out_dir=out/bare")
    tensors, _ = read_safetensors(tiny / "out/bare/adapter_model.safetensors")
    tensors = {name.replace("model.model.", "model."): t for name, t in tensors.items()}
    assert all(name.startswith("base_model.model.layers.") for name in tensors)
    with open(tmp_path / "adapter_model.safetensors", "wb") as file:
        write_safetensors(file, tensors, {"format": "pt"})
    config = json.loads((tiny / "out/bare/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny / "out/tiny")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    state, other = (load(folder)[0].state_dict() for folder in (tmp_path, tiny / "out/bare"))
    assert state.keys() == other.keys() and all(state[n].equal(other[n]) for n in state)


def test_early_stopping_saves_the_last_state(tiny):
    # A rate that grows step by step, from one that is far too large: it only gets worse.
    args = ["--max_steps=9", "--eval_every=1", "--early_stopping=2", "--learning_rate=20"]
    tune(tiny, *args, "--warmup_steps=9", "--out_dir=out/early")
    assert torch.load(tiny / "out/early/state.pt")["step"] == 3
    load(tiny / "out/early")


def test_steps_alone_are_a_horizon(tiny):
    tune(tiny, "--max_epochs=none", "--max_steps=1", "--out_dir=out/steps")
    assert log(tiny, "out/steps")[-1]["step"] == 1


def test_a_bad_record_is_left_out(tiny):
    bad = [
        "5",
        "[]",
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": []}',
        '{"messages": "x"}',
        '{"messages": [5]}',
        '{"text": 1}',
    ]
    good = json.dumps({"messages": talk("a \u2028 b \x85", "c")}, ensure_ascii=False)
    (tiny / "data/mixed").mkdir()
    text = "\n".join([*bad, *[good] * 4]) + "\n"
    (tiny / "data/mixed/sft_train.jsonl").write_text(text, encoding="utf-8")
    args = ["--model=out/tiny", "--dataset=mixed", "--max_steps=1", "--batch_size=4"]
    for script, more in (("finetune.py", []), ("rl.py", ["--group_size=2", "--max_new_tokens=4"])):
        done = run(tiny, script, *args, *more, f"--out_dir=out/mixed_{script}")
        assert re.search("data: 4 (examples|prompts) to train on", done.stdout)


def test_auto_goes_on_and_minutes_end_a_run(tiny):
    args = ["--out_dir=out/auto", "--init_from=auto", "--max_minutes=1e-6"]
    tune(tiny, *args)  # the first step is beyond the limit
    assert log(tiny, "out/auto")[-1]["step"] == 1
    done = tune(tiny, *args, "--max_minutes=none")
    assert "resumed out/auto at step 1" in done.stdout
    assert [row["step"] for row in log(tiny, "out/auto") if "loss" in row] == [1, 2, 3, 4]
    record = json.loads((tiny / "out/auto/run.json").read_text())
    assert "torch" in record["versions"] and "commit" in record and len(record["parts"]) == 2


@pytest.mark.parametrize("method", ["sft", "dpo", "qlora"])
def test_the_plain_mathematics_give_the_same_losses(method, tiny):
    losses = []
    for fast in ("true", "false"):
        tune(tiny, f"--method={method}", f"--fast={fast}", f"--out_dir=out/{method}_{fast}")
        losses.append([row["loss"] for row in log(tiny, f"out/{method}_{fast}") if "loss" in row])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_float16_is_scaled_and_a_bad_step_changes_nothing(tiny):
    tune(tiny, "--dtype=float16", "--out_dir=out/half")
    rows = [row for row in log(tiny, "out/half") if "loss" in row]
    assert all(row["loss"] is not None for row in rows)
    state = torch.load(tiny / "out/half/state.pt")
    assert state["scaler"]["scale"] > 1
    # Five updates in a row that are not finite end the run, and their rows are JSON.
    args = ["--learning_rate=1e30", "--max_steps=20", "--grad_clip=0", "--out_dir=out/bad"]
    done = tune(tiny, *args, check=False)
    assert done.returncode == 1 and done.stderr.startswith("5 steps in a row were not finite")
    assert "the update is skipped" in done.stdout
    assert all("NaN" not in line for line in (tiny / "out/bad/log.jsonl").read_text().splitlines())
