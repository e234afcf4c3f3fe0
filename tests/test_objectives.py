"""What pre-training asks of a window: masked tokens, whole words, spans; and runs by them."""

import json
import random
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ROOT, alone, run
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from barelm.experts import RoutingLog
from barelm.objectives import (
    Objective,
    continues_word,
    noise_mask,
    segments,
    vocabulary_of,
    with_mask_token,
    with_sentinels,
)
from barelm.optim import make_optimizer
from barelm.run import Updater, UserError, autocast
from barelm.shards import MicroBatches
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig

FOLDER = ROOT / "tests" / "fixtures" / "tokenizers" / "qwen3"


@pytest.fixture(scope="module")
def tok():
    tok = Tokenizer.from_folder(FOLDER)
    return with_sentinels(with_mask_token(tok), 40)


@pytest.fixture(scope="module")
def windows(tok):
    """(64, 257) int64 of real text, each window with an end token in it."""
    text = (ROOT / "barelm" / "run.py").read_text().encode("ascii", "ignore").decode()
    ids = np.array(tok.encode(text))
    windows = np.stack([ids[i * 97 : i * 97 + 257] for i in range(64)])
    windows[:, 100] = tok.eos_ids[0]
    return windows


def make(name, tok, seed=0, **options):
    return Objective(name, vocabulary_of(tok), seed, **options)


def recipe_network(recipe, tok):
    """A small network of a recipe's kind, in training."""
    space = {}
    exec((ROOT / "config" / f"{recipe}.py").read_text(), space)
    shape = {key: space[key] for key in GPTConfig.__dataclass_fields__ if key in space}
    shape |= dict(n_embd=48, n_hidden=32, vocab_size=tok.n_vocab, n_ctx=256, n_layer=3)
    return GPT(GPTConfig(**shape)).train()


# Masks


def targets_of(batch):
    """Where the targets of a batch are: (B, T) bool."""
    is_target = np.zeros(batch["ids"].shape, bool)
    np.put_along_axis(is_target, batch["places"].numpy(), True, 1)
    return is_target


@pytest.mark.parametrize("mask_rate", [0.15, 0.3])
def test_of_the_targets_80_10_10_are_masked_replaced_and_left(tok, windows, mask_rate):
    objective = make("mlm", tok, mask_rate=mask_rate)
    counts = np.zeros(3)
    for turn in range(5):
        batch = objective.batch(windows, range(turn * 64, turn * 64 + 64))
        ids = batch["ids"].numpy()
        is_target = targets_of(batch)
        assert batch["targets"].shape[1] == round(256 * mask_rate) == objective.n_targets(256)
        tokens = windows[:, :-1]
        assert (tokens[is_target] == batch["targets"].numpy().ravel()).all()
        assert (ids == tokens)[~is_target].all()
        assert not is_target[:, 100].any()  # a special token is none
        ids, tokens = ids[is_target], tokens[is_target]
        assert vocabulary_of(tok).is_text[ids[ids != tok.mask_id]].all()
        counts += (ids == tok.mask_id).sum(), (ids != tokens).sum(), (ids == tokens).sum()
    counts[1] -= counts[0]
    assert counts / counts.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def words_of(tok, ids):
    """The words of ids, as lists of places, by the rule, one token after another."""
    special = set(tok.special.values())
    words = []
    for place, id in enumerate(ids):
        is_new = place == 0 or id in special or ids[place - 1] in special
        text = tok.token_bytes(id).decode()
        if is_new or text[0] == " " or not text[0].isalpha():
            words.append([])
        words[-1].append(place)
    return words


def test_whole_words_are_masked_or_left_whole(tok, windows):
    objective = make("mlm", tok, whole_words=True)
    batch = objective.batch(windows, range(64))
    n_long = 0
    for tokens, is_target in zip(windows, targets_of(batch)):
        assert is_target.sum() == objective.n_targets(256)
        for word in words_of(tok, tokens[:-1].tolist()):
            assert len(set(is_target[word])) == 1
            n_long += is_target[word[0]] and len(word) > 1
    assert n_long > 20


def test_a_window_of_one_word_or_without_text_has_its_targets_too(tok):
    [a] = tok.encode("a")
    for token in (a, tok.eos_ids[0]):
        batch = make("mlm", tok, whole_words=True).batch(np.full((1, 65), token), [3])
        assert (batch["targets"] == token).sum() == 10


def test_what_continues_a_word():
    assert continues_word(b"ing") and continues_word("é".encode()) and continues_word(b"\xa9")
    assert continues_word("漢".encode()[:2])  # an unfinished letter, as far as one can tell
    assert not any(map(continues_word, (b" the", b"\n", b"_x", b"7", "…".encode(), b"")))


# Spans


def test_every_way_to_divide_is_as_likely():
    rng = np.random.default_rng(0)
    counts = {}
    for _ in range(3000):
        key = tuple(segments(6, 3, rng).tolist())
        counts[key] = counts.get(key, 0) + 1
    cuts = [(a, b - a, 6 - b) for a, b in combinations(range(1, 6), 2)]
    assert counts.keys() == set(cuts) and min(counts.values()) > 220  # 300 are expected


@pytest.mark.parametrize("n_tokens, n_noise, n_spans", [(256, 38, 13), (512, 77, 26), (10, 2, 1)])
def test_spans_are_those_of_the_paper(n_tokens, n_noise, n_spans):
    for seed in range(20):
        mask = noise_mask(n_tokens, 0.15, np.random.default_rng(seed))
        begins = mask[1:] & ~mask[:-1]
        assert (len(mask), mask.sum(), begins.sum()) == (n_tokens, n_noise, n_spans)
        assert not mask[0] and mask[-1]


def test_what_is_read_and_written_gives_the_window_again(tok, windows):
    objective = make("span", tok)
    batch = objective.batch(windows, range(64))
    assert batch["encoder_ids"].shape == (64, 256 - 38 + 13 + 1)
    assert batch["targets"].shape == batch["ids"].shape == (64, objective.n_targets(256))
    for row, window in enumerate(windows):
        source, ids, targets = (
            batch[key][row].tolist() for key in ("encoder_ids", "ids", "targets")
        )
        assert ids == [tok.pad_id, *targets[:-1]]
        assert source[-1] == targets[-1] == tok.end_id
        spans = {}
        for token in targets[:-1]:
            if token in tok.sentinel_ids:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        assert list(spans) == tok.sentinel_ids[:13] and all(spans.values())
        whole = []
        for token in source[:-1]:
            whole += spans.get(token, [token])
        assert whole == window[:-1].tolist()


# A pure function of the seed and the window's number


@pytest.mark.parametrize("name", ["mlm", "span"])
def test_a_windows_masks_depend_on_its_number_and_the_seed_alone(tok, windows, name):
    objective = make(name, tok)
    whole = objective.batch(windows, range(64))
    for row in (0, 7, 63):
        alone = objective.batch(windows[row : row + 1], [row])
        assert all(torch.equal(alone[key][0], whole[key][row]) for key in whole)
        for other, number in ((objective, row + 64), (make(name, tok, seed=1), row)):
            changed = other.batch(windows[row : row + 1], [number])
            assert not torch.equal(changed["ids"][0], whole["ids"][row])


class Sequence:
    """Windows in their own order."""

    n = 64

    def __init__(self, windows):
        self.windows = windows

    def at(self, position):
        return position % self.n

    def rows(self, indices):
        return self.windows[list(indices)]


@pytest.mark.parametrize("name", ["mlm", "span"])
def test_a_step_has_the_same_masks_on_any_number_of_processes(tok, windows, name):
    cpu = torch.device("cpu")
    whole = MicroBatches(Sequence(windows), cpu, 8, objective=make(name, tok)).take(60)
    parts = []
    for rank in range(2):
        batches = MicroBatches(Sequence(windows), cpu, 2, rank, 2, make(name, tok))
        parts.append([batches.take(60 + i * batches.size) for i in range(2)])
    for key, tensor in whole.items():
        rows = [torch.stack([p[i][key] for p in parts], 1).flatten(0, 1) for i in range(2)]
        assert torch.equal(torch.cat(rows), tensor)


@pytest.mark.parametrize("name", ["mlm", "span"])
def test_no_micro_batch_waits_for_the_device(tok, windows, name, monkeypatch):
    monkeypatch.setattr(train, "seq_len", 256)
    cpu = torch.device("cpu")
    data = train.Data(tok, None, None, {}, "", [], [], None, make(name, tok))
    with FakeTensorMode():  # its tensors have no values: who asks for one raises
        net = recipe_network({"mlm": "bert", "span": "t5"}[name], tok)
        net.pad_id = tok.pad_id
        updater = Updater(alone(), net.parameters(), make_optimizer(net, "adamw"))
        batches = MicroBatches(Sequence(windows), cpu, 2, objective=data.objective)
        cast = autocast(cpu, torch.float32)
        routing = RoutingLog(net, 1)
        losses = train.accumulate_gradients(net, data, batches, 0, 2, updater, cast, routing)
        assert losses.shape == (2,) and updater.clip_gradients().shape == ()


# Its tokens


def test_new_tokens_stand_behind_the_last_and_transformers_reads_them(tok, tmp_path):
    n = Tokenizer.from_folder(FOLDER).n_vocab
    assert tok.mask_id == n and tok.sentinel_ids == list(range(n + 1, n + 101))
    assert with_mask_token(tok) is tok and with_sentinels(tok, 100) is tok
    (tmp_path / "tokenizer.json").write_text(json.dumps(tok.spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tok.config))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == tok.mask_id
    assert theirs("a [MASK]<extra_id_1>")["input_ids"][-2:] == [n, n + 2]


def test_a_tokenizer_without_the_tokens_is_refused():
    bare = Tokenizer.from_folder(FOLDER)
    with pytest.raises(UserError, match="no mask token"):
        make("mlm", bare).check(256)
    with pytest.raises(UserError, match="13 spans .* has 0 sentinels"):
        make("span", bare).check(256)
    with pytest.raises(UserError, match="too short"):
        make("span", with_sentinels(bare, 1)).check(8)


# Runs

SMALL = ["--dataset=words", "--n_layer=3", "--n_head=2", "--n_kv_head=2", "--n_embd=32"]
SMALL += ["--n_hidden=64", "--seq_len=32", "--batch_tokens=256", "--warmup_steps=3", "--seed=7"]
SMALL += ["--device=cpu", "--compile=false", "--eval_tokens=512", "--dtype=float32"]
SMALL += ["--save_every=10", "--eval_every=10", "--sample_tokens=8"]
RECIPES = {
    "mlm": ["config/bert.py", *SMALL, "--window=8", "--document_mask", "--whole_words",
            "--sample_prompt=the [MASK]"],
    "span": ["config/t5.py", *SMALL, "--n_encoder_layer=2", "--dropout=0.1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with data/words: 20 kB of made-up sentences, byte by byte."""
    folder, rng = tmp_path_factory.mktemp("words"), random.Random(0)
    some = ["cat", "dog", "sees", "hears", "the", "a", "old", "young", "and", "sleeps", "runs"]
    text = ".\n".join(" ".join(rng.choices(some, k=8)) for _ in range(600))
    (folder / "words.txt").write_text(text)
    run(folder, "prepare.py", "--source=words.txt", "--dataset=words", "--tokenizer=byte")
    return folder


def log(folder, out, key="loss"):
    rows = map(json.loads, (folder / out / "log.jsonl").read_text().splitlines())
    return [(row["step"], row[key]) for row in rows if key in row]


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps_are_ten_and_ten(words, name):
    outs = [f"out/{name}", f"out/{name}-halves"]
    options = [*RECIPES[name], "--lr_schedule=constant"]
    said = run(words, "train.py", *options, f"--out_dir={outs[0]}", "--max_steps=20").stdout
    assert "val_acc" in said and "  | " in said
    assert name == "span" or "\n  | the" in said and "| the [MASK]" not in said
    run(words, "train.py", *options, f"--out_dir={outs[1]}", "--max_steps=10")
    run(words, "train.py", *options, f"--out_dir={outs[1]}", "--max_steps=20", "--init_from=resume")
    files = [(words / out / "model.safetensors").read_bytes() for out in outs]
    assert files[0] == files[1]
    for key in ("loss", "val_loss", "val_acc"):
        assert log(words, outs[0], key) == log(words, outs[1], key)
    use_it(words, name, f"--model={outs[0]}", log(words, outs[0], "val_acc")[-1][1])


def use_it(folder, name, model, val_acc):
    """sample.py fills what is missing, and eval.py hides what train.py's validation does."""
    recipe = RECIPES[name][0]
    options = ["--device=cpu", "--dtype=float32", recipe, model]
    if name == "mlm":
        said = run(folder, "sample.py", *options, "--prompt=the [MASK]at [MASK]ees").stdout
        assert "mask 1: 0." in said and "mask 2: 0." in said
        done = run(folder, "sample.py", *options, "--prompt=the cat", check=False)
        assert "expected [MASK] in the prompt" in done.stderr
        done = run(folder, "eval.py", *options, "--tasks=arc_easy", "--data=.", check=False)
        assert done.returncode == 1
        return
    said = run(folder, "sample.py", *options, "--prompt=the <extra_id_0>at", "--max_new_tokens=9")
    assert "<extra_id" not in said.stdout and said.stdout.startswith("the ")
    options += ["--dataset=words", "--eval_tokens=512", "--seq_len=32"]
    said = run(folder, "eval.py", *options).stdout
    assert float(re.search(r"loss.accuracy: +(\S+)", said)[1]) == pytest.approx(val_acc, abs=1e-5)
    (folder / "some.txt").write_text("the old cat sees the young dog")
    assert "loss.accuracy" in run(folder, "eval.py", *options, "--text=some.txt").stdout


@pytest.mark.parametrize("name", ["span"])
def test_two_processes_have_the_losses_of_one(words, name):
    losses = []
    for processes in (1, 2):
        out = f"out/{name}-{processes}"
        options = [*RECIPES[name], f"--out_dir={out}", "--max_steps=2", "--dropout=0"]
        run(words, "train.py", *options, processes=processes)
        losses.append([loss for key in ("loss", "val_loss") for _, loss in log(words, out, key)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--objective=mlm"], "needs an encoder, which sees both sides: --causal=false"),
        (["--objective=span"], "needs an encoder beside a decoder: --n_encoder_layer=4"),
        (["--causal=false"], "sees the tokens that it is to predict: take mlm"),
        (["--n_encoder_layer=2"], "its encoder would read nothing: take span"),
        (["--objective=bert"], "objective=bert: expected causal, mlm, span"),
        (["config/bert.py", "--mask_rate=1"], "mask_rate=1.0: expected more than 0"),
        (["--mask_rate=0.3"], "mask_rate=0.3: for --objective=mlm and span"),
        (["--pos=alibi", "--rope_theta=500"], "rope_theta=500.0: it says nothing with pos=alibi"),
        (["--whole_words"], "for --objective=mlm, and not causal"),
        (["config/t5.py", "--document_mask"], "not with --objective=span"),
        (["config/t5.py", "--seq_len=8", "--batch_tokens=64"], "seq_len=8: too short"),
        (["config/bert.py", "--sample_prompt=the cat"], "expected [MASK] in the prompt"),
    ],
)
def test_what_has_no_meaning_together_is_refused(words, args, message):
    options = ["--dataset=words", "--out_dir=out/refused", "--max_steps=1", "--device=cpu"]
    done = run(words, "train.py", *args, *options, check=False)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (words / "out/refused").exists()


@pytest.mark.parametrize("recipe", ["bert", "t5"])
def test_every_parameter_of_a_recipe_learns(recipe, tok, windows):
    torch.manual_seed(0)
    net = recipe_network(recipe, tok)
    batch = make({"bert": "mlm", "t5": "span"}[recipe], tok).batch(windows[:4], range(4))
    loss, n_targets = net(**batch)
    (loss / n_targets).backward()
    assert abs(loss.item() / n_targets.item() - np.log(tok.n_vocab)) < 1
    learning = [name for name, p in net.named_parameters() if p.grad.abs().sum() > 0]
    assert learning == [name for name, _ in net.named_parameters()]
    groups = [g for optimizer in make_optimizer(net, "muon") for g in optimizer.param_groups]
    optimized = [id(p) for group in groups for p in group["params"]]
    assert sorted(optimized) == sorted(map(id, net.parameters()))
