"""model.py against independent references: naive loops, the papers' formulas, transformers."""

import copy
import json
import math
import random
import re
import shutil
import struct
from dataclasses import field, make_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import export
import model
from barelm.adapters import add_adapters
from barelm.bpe import bpe_tokenizer, char_tokenizer, train_bpe
from barelm.checkpoint import load, save
from barelm.families import family
from barelm.files import whole_file, write_json
from barelm.optim import (
    Muon,
    flops_per_token,
    make_optimizer,
    memory_estimate,
    n_params,
)
from barelm.quantized import quantize_weights
from barelm.run import UserError
from barelm.safetensors import read_safetensors, write_safetensors
from barelm.texts import TextStream
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig, KVCache

FIXTURES = Path(__file__).parent / "fixtures"
QWEN3 = dict(n_head=4, n_kv_head=2, n_embd=32)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)
GPT2 = dict(n_head=4, n_embd=32, norm="layer", pos="learned", mlp="gelu", bias=True, qk_norm=False)
SHAPES = {
    "qwen3": QWEN3,
    "qwen3-untied-wide-heads": dict(n_head=4, n_kv_head=1, n_embd=24, head_dim=16, tie=False),
    "qwen2": QWEN3 | dict(qk_norm=False, qkv_bias=True),
    "llama": QWEN3 | dict(qk_norm=False, tie=False),
    "llama3": QWEN3 | dict(qk_norm=False, rope_theta=5e5, rope_scaling=LLAMA3),
    "llama-linear": QWEN3 | dict(qk_norm=False, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | dict(tie=False, n_hidden=40),
}
OURS = {  # what no Hugging Face class holds
    "post-sinusoidal-relu2": QWEN3 | dict(norm_place="post", pos="sinusoidal", mlp="relu2"),
    "both-none-relu": QWEN3 | dict(norm_place="both", pos="none", mlp="relu", bias=True),
}


def make_net(vocab_size=64, n_ctx=32, n_layer=2, **shape):
    """A small random network whose norms and biases are not at their start values."""
    torch.manual_seed(1)
    net = GPT(GPTConfig(vocab_size, n_ctx, n_layer, **shape))
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
    return net.eval()


@pytest.fixture(scope="module")
def tok():
    return char_tokenizer("abcdefghijklmnopqrstuvwxyz \n.?!😀é")


def random_ids(*shape, high=40):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(2))


# Checkpoints and formats


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "qwen2", "smollm2", "mistral"])
def test_fixture_made_by_transformers(name, tok, tmp_path):
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    write_json(folder / "tokenizer.json", tok.spec)
    write_json(folder / "tokenizer_config.json", tok.config)
    facts = json.loads((folder / "expected.json").read_text())
    net, loaded = load(folder)
    assert family(net.config) == {"smollm2": "llama"}.get(name, name)
    assert loaded.eos_ids == [0]  # generation_config.json's word
    with torch.no_grad():
        logits = net(torch.tensor(facts["ids"]))[0]
    torch.testing.assert_close(logits, torch.tensor(facts["logits"]), atol=2e-5, rtol=0)
    save(tmp_path / "back", net, loaded)
    files = [read_safetensors(path)[0] for path in folder.glob("*.safetensors")]
    theirs = {n: t.float() for file in files for n, t in file.items()}
    ours, _ = read_safetensors(tmp_path / "back" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)


def test_fixture_made_by_tokenizers():
    tok = Tokenizer.from_folder(FIXTURES / "tokenizer")
    facts = json.loads((FIXTURES / "tokenizer" / "expected.json").read_text())
    for text, ids in zip(facts["texts"], facts["ids"], strict=True):
        assert tok.encode(text) == ids
        assert tok.decode(ids) == text


@pytest.mark.parametrize("name", SHAPES)
def test_opens_in_transformers_and_back(name, tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    net, ids = make_net(**SHAPES[name]), random_ids(2, 20)
    save(tmp_path / "ours", net, tok)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values())
    assert theirs.config.model_type == name.split("-")[0].replace("llama3", "llama")
    theirs.eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(net(ids), expected, atol=2e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "ours" / file, tmp_path / "theirs")
    back, _ = load(tmp_path / "theirs")
    assert back.config == net.config
    with torch.no_grad():
        torch.testing.assert_close(back(ids), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_other_architectures_survive_a_save(name, tok, tmp_path):
    net, ids = make_net(**OURS[name]), random_ids(2, 20)
    save(tmp_path, net, tok)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "barelm"
    with torch.no_grad():
        assert torch.equal(load(tmp_path)[0](ids), net(ids))


# A value that is not its default for each field that a family holds, or may be asked to.
FIELDS = dict(n_ctx=24, n_kv_head=4, head_dim=10, n_hidden=40, norm_eps=1e-3, rope_theta=77.0)
FIELDS |= dict(norm="layer", norm_place="both", qk_norm=False, qkv_bias=True, bias=True)
FIELDS |= dict(pos="none", rope_scaling=LLAMA3, mlp="relu2", tie=False, dropout=0.25, init="he")


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("key", FIELDS)
def test_no_field_is_lost_on_saving(key, name, tok, tmp_path):
    net, ids = make_net(**SHAPES[name] | {"n_ctx": 32} | {key: FIELDS[key]}), random_ids(2, 20)
    save(tmp_path, net, tok)
    back, _ = load(tmp_path)
    assert back.config == net.config
    with torch.no_grad():
        expected = net(ids)
    assert torch.equal(back(ids), expected)
    if family(net.config) != "barelm":
        transformers = pytest.importorskip("transformers")
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not any(report.values())
        torch.testing.assert_close(theirs.eval()(ids).logits, expected, atol=2e-5, rtol=1e-4)


FORKED = [("tilt", float, 0.0), ("n_hubs", int, 0), ("twisted", bool, False)]
FORKED += [("zones", list, field(default_factory=list))]


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "gpt2"])
@pytest.mark.parametrize(
    "key, value", [("tilt", 30.0), ("n_hubs", 4), ("twisted", True), ("zones", [3])]
)
def test_a_field_that_a_fork_adds_is_never_lost(key, value, name, tok, tmp_path, monkeypatch):
    plain = GPTConfig
    forked = make_dataclass("GPTConfig", FORKED, bases=(GPTConfig,))
    shape = dict(vocab_size=64, n_ctx=32, n_layer=1) | SHAPES[name]
    monkeypatch.setattr("barelm.families.GPTConfig", forked)
    assert family(forked(**shape)) == name  # at its default the field asks for nothing
    net = GPT(forked(**shape, **{key: value}))
    assert family(net.config) == "barelm"
    save(tmp_path, net, tok)
    back, _ = load(tmp_path)
    assert back.config == net.config and getattr(back.config, key) == value
    monkeypatch.setattr(export, "export", "hf")
    with pytest.raises(UserError, match=f"{key}=.*here {re.escape(repr(value))}"):
        export.hf_family(net)
    monkeypatch.setattr("barelm.families.GPTConfig", plain)
    with pytest.raises(UserError, match="config.json: tilt, .*no fields of GPTConfig"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.parametrize("pooling", [None, "last", "mean"])
def test_heads_and_adapters_survive_a_save(pooling, adapters, quantize, name, tok, tmp_path):
    net, ids = make_net(**SHAPES[name]), random_ids(1, 9)
    if adapters:
        add_adapters(net, adapters)
        for block in net.model.layers:
            torch.nn.init.normal_(block.mlp.down_proj.up.weight, std=0.3)
    if pooling:
        net.set_score(["no", "yes", "maybe"], pooling)
    if quantize:
        quantize_weights(net, quantize)
    save(tmp_path, net, tok)
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    ours = adapters or quantize or pooling == "mean"
    assert kind == ("barelm" if ours else name.partition("-")[0])
    back, _ = load(tmp_path)
    assert back.config == net.config and back.quantize == quantize
    with torch.no_grad():
        if not pooling:
            return torch.testing.assert_close(back(ids), net(ids), atol=1e-5, rtol=1e-5)
        expected = net.scores(ids.tolist())
        torch.testing.assert_close(back.scores(ids.tolist()), expected, atol=1e-5, rtol=1e-5)
        assert (back.labels, back.pooling) == (["no", "yes", "maybe"], pooling)
        if not ours:
            transformers = pytest.importorskip("transformers")
            kind = transformers.AutoModelForSequenceClassification
            theirs = kind.from_pretrained(tmp_path).eval()
            torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-4)
            assert [*theirs.config.id2label.values()] == back.labels


def test_safetensors_library_agrees(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {
        "a": torch.randn(3, 4),
        "b.c": torch.arange(5, dtype=torch.int64),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "half": torch.randn(7).half(),
        "flag": torch.tensor([True, False]),
    }
    with whole_file(tmp_path / "ours") as file:
        write_safetensors(file, tensors, {"format": "pt"})
    library.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt", "step": "3"})
    assert read_safetensors(tmp_path / "theirs")[1]["step"] == "3"
    for read, path in (
        (library.load_file, "ours"),
        (lambda p: read_safetensors(p)[0], "theirs"),
    ):
        found = read(tmp_path / path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], tensors[k]) for k in tensors)
        assert all(found[k].dtype == tensors[k].dtype for k in tensors)


def test_malformed_safetensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        write_safetensors(file, {"a": torch.ones(2, 3), "b": torch.ones(4)}, {"step": "1"})
    good = path.read_bytes()
    for length in range(len(good)):  # cut short anywhere
        path.write_bytes(good[:length])
        with pytest.raises(UserError):
            read_safetensors(path)
    rng = np.random.default_rng(0)
    for _ in range(2000):  # a damaged header is refused or harmless, never another exception
        broken = bytearray(good)
        for at in rng.integers(0, len(good) - 40, 3):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            read_safetensors(path)
        except UserError:
            pass
    for bad in (
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32"}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        '{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":["x",1000000000000000],"data_offsets":[0,8]}}',
        '{"b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
        '"a":{"dtype":"U8","shape":[0,1000000000000,1000000000000],"data_offsets":[0,0]}}',
        '{"__metadata__":1,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "[1,2]",
    ):
        path.write_bytes(struct.pack("<Q", len(bad)) + bad.encode() + bytes(8))
        with pytest.raises(UserError):
            read_safetensors(path)


def test_unfit_folders_are_refused_in_a_line(tok, tmp_path):
    net = make_net(**QWEN3)
    save(tmp_path, net, tok)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, word in (
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_size": 64}, "embed_tokens"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": 3}, "tokens"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ):
        write_json(tmp_path / "config.json", config | change)
        with pytest.raises(UserError, match=word):
            load(tmp_path)


def test_tokenizers_of_another_kind_are_refused_in_a_line(tok):
    unigram = {"type": "Unigram", "vocab": [["a", -1.0]]}
    for change in ({"model": None}, {"model": unigram}, {"normalizer": {"type": "Unheard"}}):
        with pytest.raises(UserError, match=r"^tokenizer.json: [^\n]+$"):
            Tokenizer(tok.spec | change, {})


def test_nfc_normalizers_are_applied(tok):
    nfc = Tokenizer(tok.spec | {"normalizer": {"type": "NFC"}}, tok.config)
    assert nfc.encode("e\u0301") == tok.encode("é") != tok.encode("e\u0301")
    assert [ids.tolist() for ids in nfc.encode_batch(["e\u0301"])] == [tok.encode("é")]
    message = [{"role": "user", "content": "e\u0301"}, {"role": "assistant", "content": "e\u0301"}]
    ids, mask = nfc.chat(message)
    assert [i for i, m in zip(ids, mask) if m] == tok.encode("é") + [tok.special["<|im_end|>"]]


# The cache and generation


@pytest.mark.parametrize("name", [*SHAPES, *OURS])
def test_ragged_cache_gives_the_logits_of_a_full_forward(name):
    net = make_net(**(SHAPES | OURS)[name])
    rows = [random_ids(n) for n in (3, 11, 7)]
    chunks = [[2, 5, 1], [0, 4, 3], [1, 1, 1], [0, 1, 2]]  # tokens of each row, call by call
    cache = KVCache(net.config, 3, 16, torch.device("cpu"), torch.float32)
    at = [0, 0, 0]
    for sizes in chunks:
        ids = torch.full((3, max(sizes)), 39)  # padding that must not be seen
        for b, n in enumerate(sizes):
            ids[b, :n] = rows[b][at[b] : at[b] + n]
        with torch.no_grad():
            logits = net(ids, cache=cache, n_new=torch.tensor(sizes))
            for b, n in enumerate(sizes):
                full = net(rows[b][None, : at[b] + n])[0, at[b] :]
                torch.testing.assert_close(logits[b, :n], full, atol=1e-5, rtol=1e-4)
        at = [a + n for a, n in zip(at, sizes)]
        assert cache.lengths.tolist() == at
    shape = (2, 3, net.config.n_kv_head, 16 + 1, net.config.head_dim)
    assert [store.shape for store in cache.stores] == 2 * [shape]


@pytest.mark.parametrize("name", [*SHAPES, *OURS])
def test_even_rows_fed_in_parts_equal_a_full_forward(name):
    net, ids = make_net(**(SHAPES | OURS)[name]), random_ids(2, 20)
    cache = KVCache(net.config, 2, 24, "cpu", torch.float32)
    with torch.no_grad():
        parts = [net(part, cache=cache) for part in ids.split([9, 1, 6, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), net(ids), rtol=1e-4, atol=1e-4)
    assert cache.even and cache.lengths.tolist() == [20, 20]


def naive_greedy(net, tok, prompt, n):
    """The oracle: no cache, one row, one full forward a token."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < min(len(prompt) + n, net.config.n_ctx):
            ids.append(net(torch.tensor([ids]))[0, -1, : tok.n_vocab].argmax().item())
            if ids[-1] in tok.eos_ids:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_greedy_batch_equals_naive_generation(name, tok):
    net = make_net(**SHAPES[name])
    net.lm_head.weight.data[tok.n_vocab :] += 5.0  # ids of no token, which must never come
    prompts = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 1, 2], [4] * 30]
    out = model.generate(net, tok, prompts, max_new_tokens=12, temperature=0)
    for prompt, g in zip(prompts, out):
        assert g.ids == naive_greedy(net, tok, prompt, 12)
        assert all(i < tok.n_vocab for i in g.ids)
        assert g.text == "".join(tok.token_bytes(i).decode() for i in g.ids)
        ids = torch.tensor([prompt + g.ids])
        with torch.no_grad():
            logits = net(ids)[0, len(prompt) - 1 : -1, : tok.n_vocab].log_softmax(-1)
        chances = logits.gather(1, torch.tensor(g.ids)[:, None])[:, 0].tolist()
        assert g.logprobs == pytest.approx(chances, abs=1e-4)
    assert out[3].finish_reason == "length" and len(out[3].ids) == 2  # the context's end


def test_generation_ends_at_end_tokens_and_stop_strings(tok):
    net = make_net(**QWEN3)
    [free] = model.generate(net, tok, [[1, 2, 3]], max_new_tokens=12, temperature=0)
    ended = Tokenizer(tok.spec, tok.config)
    ended.eos_ids = [free.ids[4]]
    [g] = model.generate(net, ended, [[1, 2, 3]], max_new_tokens=12, temperature=0)
    first = free.ids.index(free.ids[4])
    assert g.ids == free.ids[: first + 1] and g.finish_reason == "stop"
    stop = free.text[3:5]
    pieces = []
    [g] = model.generate(
        net,
        tok,
        [[1, 2, 3]],
        max_new_tokens=12,
        temperature=0,
        stop=[stop],
        on_text=lambda i, piece: pieces.append(piece),
    )
    assert g.text == free.text[: free.text.index(stop)] == "".join(pieces)
    assert g.finish_reason == "stop"


def test_samples_do_not_depend_on_their_batch_and_repeat_by_seed(tok):
    net = make_net(**QWEN3)
    how = dict(max_new_tokens=10, temperature=1.0, seed=3)
    prompts = [[1, 2, 3], [4, 5]]
    both = model.generate(net, tok, prompts, **how)
    [alone] = model.generate(net, tok, prompts[:1], **how)
    assert both[0].ids == alone.ids
    assert [g.ids for g in model.generate(net, tok, prompts, **how)] == [g.ids for g in both]
    assert model.generate(net, tok, prompts, **(how | dict(seed=4)))[0].ids != alone.ids


@pytest.mark.parametrize(
    "filters",
    [
        dict(),
        dict(temperature=0.5),
        dict(top_k=3),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(temperature=1.7, top_k=8, top_p=0.8, min_p=0.15),
        dict(top_k=100),
        dict(top_p=0.0),
    ],
)
def test_drawn_tokens_follow_the_filtered_distribution(filters):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 2
    t, k, p, m = (
        filters.get(x, d) for x, d in dict(temperature=1, top_k=0, top_p=1, min_p=0).items()
    )
    weights = {i: math.exp(x / t) for i, x in enumerate(logits.tolist())}
    by_weight = sorted(weights, key=weights.get, reverse=True)
    keep = by_weight[: k or None]
    total, kept, run = sum(weights[i] for i in keep), [], 0.0
    for i in keep:  # the smallest set that reaches p
        if run / total < p or not kept:
            kept.append(i)
        run += weights[i]
    kept = [i for i in kept if weights[i] >= m * weights[by_weight[0]]]
    expected = {i: weights[i] / sum(weights[i] for i in kept) for i in kept}
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    drawn = model.choose_tokens(logits.expand(n, -1), uniform, **filters)
    counts = torch.bincount(drawn, minlength=12) / n
    for i in range(12):
        assert counts[i] == pytest.approx(expected.get(i, 0.0), abs=2e-4)


def test_repetition_penalty_is_keskars(tok):
    net = make_net(**QWEN3)
    [g] = model.generate(
        net, tok, [[1, 2, 3]], max_new_tokens=8, temperature=0, repetition_penalty=1.5
    )
    ids = [1, 2, 3]
    for token in g.ids:
        with torch.no_grad():
            logits = net(torch.tensor([ids]))[0, -1, : tok.n_vocab]
        for i in set(ids):
            logits[i] = logits[i] / 1.5 if logits[i] > 0 else logits[i] * 1.5
        assert token == logits.argmax()
        ids.append(token)


def test_streamed_text_never_splits_a_character():
    text = "a😀é漢字!" + "\ud7ff"
    stream, pieces = TextStream(), []
    for byte in text.encode():
        pieces.append(stream.feed(bytes([byte])))
    assert "".join(pieces) == text and "�" not in "".join(pieces)
    stream = TextStream(["END"])
    pieces = [stream.feed(b) for b in (b"one E", b"N", b"X two ", b"EN", b"D three")]
    assert "".join(pieces) == "one ENX two " and stream.stopped
    cut = TextStream()
    assert cut.feed("é".encode()[:1]) + cut.feed(b"", final=True) == "�"


def test_a_wide_enough_beam_search_is_exhaustive(tok):
    small = char_tokenizer("ab")  # 7 ids
    small.eos_ids = [2]
    net = make_net(**QWEN3)
    [found] = model.generate(net, small, [[0, 1]], max_new_tokens=3, num_beams=7**3)

    best = (-math.inf, None)
    stack = [([], 0.0)]
    while stack:
        ids, total = stack.pop()
        if ids and (len(ids) == 3 or ids[-1] == 2):
            best = max(best, (total / len(ids), ids))
            continue
        with torch.no_grad():
            chances = net(torch.tensor([[0, 1, *ids]]))[0, -1, :7].log_softmax(-1)
        stack += [(ids + [i], total + chances[i].item()) for i in range(7)]
    assert found.ids == best[1]
    assert sum(found.logprobs) / len(found.ids) == pytest.approx(best[0], abs=1e-5)


def likely_ends(tok, **shape):
    """A small random network of tok's vocabulary, of which some tokens are likely."""
    net = make_net(vocab_size=tok.n_vocab, **shape)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.6 if p.ndim == 2 else 1)
        net.lm_head.weight[[2, 3, 5, 7]] *= 2.5
    return net


def searches(tok, seed, count):
    """(prompt, end tokens, limit, width) of some beam searches."""
    draw = random.Random(seed)
    for i in range(count):
        prompt = draw.choices(range(tok.n_vocab), k=draw.randint(1, 12))
        ends = [[2], [2, 5], [3, 7, 9, 11, 13], []][i % 4]
        yield prompt, ends, draw.choice([1, 2, 3, 5, 8, 18]), draw.choice([2, 3, 4, 5, 8])


@torch.no_grad()
def naive_beam_search(net, prompt, ends, limit, width):
    """Each step looks at all continuations of all beams. The best `width` that do not end go on; of
    the best `width` of all, those that end are results, and the last step ends all."""
    beams, results = [(0.0, [])], []
    for step in range(1, limit + 1):
        grown = []
        for total, ids in beams:
            chances = net(torch.tensor([prompt + ids]))[0, -1].double().log_softmax(-1)
            grown += [(total + x, [*ids, i]) for i, x in enumerate(chances.tolist())]
        grown.sort(reverse=True)
        done = lambda ids: step == limit or ids[-1] in ends
        results += [(total / step, ids) for total, ids in grown[:width] if done(ids)]
        beams = [(total, ids) for total, ids in grown if not done(ids)][:width]
        if len(results) >= width or not beams:
            break
    return max(results)[1]


def test_beam_search_is_a_search_without_a_cache(tok):
    net, reasons = likely_ends(tok, **QWEN3), set()
    for prompt, ends, limit, width in searches(tok, 1, 24):
        tok = copy.copy(tok)
        tok.eos_ids = ends
        [g] = model.generate(net, tok, [prompt], max_new_tokens=min(limit, 8), num_beams=width)
        assert g.ids == naive_beam_search(net, prompt, ends, min(limit, 8), width)
        reasons.add(g.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_beam_search_is_transformers_with_early_stopping(name, tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok, net = copy.copy(tok), likely_ends(tok, **SHAPES[name])
    save(tmp_path, net, tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    how = dict(do_sample=False, early_stopping=True, length_penalty=1.0, pad_token_id=0)
    for prompt, ends, limit, width in searches(tok, name, 25):
        tok.eos_ids = ends
        [g] = model.generate(net, tok, [prompt], max_new_tokens=limit, num_beams=width)
        ids = torch.tensor([prompt])
        how |= dict(max_new_tokens=limit, num_beams=width, eos_token_id=ends or None)
        [out] = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how).tolist()
        assert out[len(prompt) :] == g.ids


# What float32 cannot divide by: below its normal numbers, and where only the quotient is too large.
COLD = [1e-46, 1e-45, 1e-42, 1e-40, 1e-38, 1e-37, 1e-30, 1e-21]


@pytest.mark.parametrize("temperature", [*COLD, 1e-19, 1e-12])
def test_a_temperature_next_to_nothing_is_greedy(temperature, tok):
    logits = 20 * torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    logits[:, 35:] = -math.inf  # padding of the vocabulary
    uniform, best = torch.rand(6), logits.argmax(-1)
    for filters in ({}, dict(top_k=5), dict(top_p=0.5), dict(min_p=0.1), dict(top_p=0.0)):
        drawn = model.choose_tokens(logits, uniform, temperature, **filters)
        assert drawn.tolist() == best.tolist()
    together = model.choose_tokens(logits, uniform, [temperature, 1.0] * 3)
    warm = model.choose_tokens(logits, uniform, 1.0)
    assert together[0::2].tolist() == best[0::2].tolist()
    assert together[1::2].tolist() == warm[1::2].tolist()
    net = make_net(**QWEN3)
    how = dict(max_new_tokens=9)
    [cold] = model.generate(net, tok, [[1, 2, 3]], temperature=temperature, **how)
    [greedy] = model.generate(net, tok, [[1, 2, 3]], temperature=0, **how)
    assert cold.ids == greedy.ids and len(set(cold.ids)) > 1


def test_a_temperature_beyond_all_measure_draws_evenly():
    logits = torch.tensor([[3.0, -200.0, 7.0, 0.0, -math.inf]]).expand(4000, -1)
    uniform = (torch.arange(4000) + 0.5) / 4000
    counts = torch.bincount(model.choose_tokens(logits, uniform, 1e38), minlength=5)
    assert counts.tolist() == [1000, 1000, 1000, 1000, 0]


@pytest.mark.parametrize("temperature", [0, 1e-40, 0.7])
@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_strongest_penalties_leave_a_distribution(penalty, temperature):
    logits = torch.tensor([[-1e35, 2e35, 1.0, 0.0, -3.0, -math.inf]])
    seen = torch.tensor([[True, True, True, False, True, True]])
    likely = model.penalize(logits, seen, penalty)
    assert not likely.isnan().any() and likely[0, -1] == -math.inf
    drawn = model.choose_tokens(likely, torch.tensor([0.5]), temperature)
    assert drawn.tolist() == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_sampling_by_no_number_is_refused(name, value, tok):
    with pytest.raises(UserError, match=f"{name}={value!r}: expected a number "):
        model.generate(make_net(**QWEN3), tok, [[1]], **{name: value})


@pytest.mark.parametrize("name", ["qwen3", "gpt2", *OURS])
def test_packed_documents_equal_documents_alone(name):
    net = make_net(**(SHAPES | OURS)[name])
    parts = [random_ids(n) for n in (5, 9, 4)]
    docs = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
    with torch.no_grad():
        packed = net(torch.cat(parts)[None], docs=docs[None])[0]
        alone = torch.cat([net(p[None])[0] for p in parts])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_losses_are_sums_over_real_targets():
    net, ids = make_net(**QWEN3), random_ids(2, 9)
    targets = ids.roll(-1, 1)
    targets[1] = -100  # a row with no target contributes nothing
    targets[0, :3] = -100
    loss, count = net(ids, targets)
    logp = net(ids).log_softmax(-1)
    expected = -sum(logp[0, t, targets[0, t]] for t in range(3, 9))
    torch.testing.assert_close(loss, expected)
    assert count == 6
    torch.testing.assert_close(model.logprobs(net, ids, targets).sum(), -loss)
    nothing, zero = net(ids, torch.full_like(ids, -100))
    assert nothing == 0 and zero == 0


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for n in (0, True, 1):
        net = make_net(**QWEN3).train()
        net.checkpoint = n
        assert net.checkpoint == (net.config.n_layer if n is True else n)
        net(random_ids(2, 9), random_ids(2, 9))[0].backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b, c in zip(*grads):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


# Chat


def test_chat_mask_covers_what_the_assistant_says():
    tok = bpe_tokenizer(train_bpe({b" user": 3, b"assistant": 5}, 10))
    messages = [
        {"role": "system", "content": "S<|im_end|>"},
        {"role": "user", "content": "hi <|endoftext|>"},
        {"role": "assistant", "content": "\nyo 😀"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "ok<|im_start|>"},
    ]
    ids, mask = tok.chat(messages)
    text = (
        "<|im_start|>system\nS<|im_end|><|im_end|>\n<|im_start|>user\nhi <|endoftext|><|im_end|>\n"
    )
    text += "<|im_start|>assistant\n\nyo 😀<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
    text += "<|im_start|>assistant\nok<|im_start|><|im_end|>\n"
    assert tok.decode(ids) == text
    said = tok.decode([i for i, m in zip(ids, mask) if m])
    assert said == "\nyo 😀<|im_end|>ok<|im_start|><|im_end|>"
    real = [i for i in ids if i in tok.special.values()]
    assert len(real) == 10  # the template's own, none of the contents'
    prompt, none = tok.chat(messages[:2], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt and not any(none)


def test_chat_ids_are_those_of_transformers(tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe = bpe_tokenizer(train_bpe({b"hello": 5, b" there": 4, b"\n\n": 3}, 12))
    save(tmp_path, make_net(vocab_size=320, **QWEN3), bpe)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "hello there\n"},
        {"role": "assistant", "content": "\nhello"},
        {"role": "user", "content": "a  b"},
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert bpe.chat(messages, add_generation_prompt=True)[0] == expected


def test_a_refused_chat_is_a_line(tok):
    plain = Tokenizer(tok.spec, {k: v for k, v in tok.config.items() if k != "chat_template"})
    with pytest.raises(UserError, match="no chat template"):
        plain.chat([{"role": "user", "content": "a"}])
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        Tokenizer(tok.spec, tok.config | {"chat_template": strict}).chat(
            [{"role": "user", "content": "a"}]
        )


# Optimizers and accounting


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_groups_hold_every_parameter_once(name):
    net = make_net(**GPT2)
    optimizers = make_optimizer(net, name, 1e-3, weight_decay=0.5)
    groups = [g for o in optimizers for g in o.param_groups]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    for g in groups:
        assert {p.ndim > 1 for p in g["params"]} == {g["weight_decay"] == 0.5}
    muon = {id(p) for o in optimizers if isinstance(o, Muon) for p in o.param_groups[0]["params"]}
    inner = {id(p) for n, p in net.named_parameters() if ".layers." in n and p.ndim == 2}
    assert muon == (inner if name == "muon" else set())


@pytest.mark.parametrize("name", [*SHAPES, *OURS])
def test_flops_equal_the_flop_counter(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    net, ids = make_net(**(SHAPES | OURS)[name]), random_ids(2, 16)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        net(ids)
    with FlopCounterMode(display=False) as both, sdpa_kernel(SDPBackend.MATH):
        net(ids, ids)[0].backward()
    c = net.config
    assert forward.get_total_flops() == 32 * flops_per_token(c, 16, backward=False)
    assert both.get_total_flops() == 32 * flops_per_token(c, 16)


@pytest.mark.parametrize("shape", [QWEN3 | dict(n_embd=64), GPT2 | dict(n_embd=64)])
@pytest.mark.parametrize("recompute", [False, 2, True])
def test_memory_estimate_is_near_what_autograd_keeps(shape, recompute):
    net = make_net(vocab_size=256, n_ctx=128, n_layer=6, **shape).train()
    net.checkpoint = recompute
    own, kept = {p.data_ptr() for p in net.parameters()}, {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss, _ = net(random_ids(4, 128), random_ids(4, 128))
    _, estimate = memory_estimate(net.config, 0, 4, 128, recompute=recompute)
    kept_bytes = sum(kept.values())
    if recompute is True:  # one block is computed again at a time, in backward
        _, all_blocks = memory_estimate(net.config, 0, 4, 128)
        kept_bytes += (all_blocks - 4 * 128 * 64 * 8) / 6
    assert 0.6 < estimate / kept_bytes < 1.7


LINEAR = dict(rope_type="linear")
BAD_FACTORS = (0, -2.0, math.nan, math.inf, True, "8", None, [8])


def test_parameters_are_counted_and_initialized_as_gpt2_is():
    torch.manual_seed(0)
    net = GPT(GPTConfig(512, 32, 8, **(GPT2 | dict(n_embd=64))))
    per_block = 12 * 64 * 64 + 13 * 64
    assert n_params(net) == 512 * 64 + 32 * 64 + 8 * per_block + 2 * 64
    block = net.model.layers[0]
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert F.mse_loss(block.mlp.up_proj.bias, torch.zeros(256)) == 0


@pytest.mark.parametrize(
    "bad, word",
    [
        (dict(n_head=3), "n_head"),
        (dict(n_kv_head=3), "n_kv_head"),
        (dict(pos="absolute"), "pos"),
        (dict(n_layer=0), "n_layer"),
        (dict(head_dim=7), "head_dim"),
        (dict(dropout=1.5), "dropout"),
        (dict(n_kv_head=-1), "n_kv_head"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "rope_scaling"),
        *[(dict(n_layer=bad), "n_layer") for bad in (True, 2.0, 2.5, "2", None, [2], 2**63)],
        *[(dict(norm_eps=bad), "norm_eps") for bad in (math.nan, math.inf, -1e-6, 1.0, "0", True)],
        *[(dict(rope_theta=bad), "rope_theta") for bad in (math.nan, math.inf, -1, 0, 10**400)],
        *[(dict(dropout=bad), "dropout") for bad in (math.nan, -0.1, "0.1", None)],
        *[(dict(tie=bad), "tie") for bad in (1, 0, "true", None)],
        *[(dict(norm=bad), "norm") for bad in (None, True, [], "RMS")],
        *[(dict(rope_scaling=bad), "rope_scaling") for bad in ("linear", [], {}, {"factor": 2.0})],
        *[(dict(rope_scaling=LINEAR | dict(factor=bad)), "factor") for bad in BAD_FACTORS],
        *[(dict(rope_scaling=LLAMA3 | dict(factor=bad)), "factor") for bad in BAD_FACTORS],
        (dict(rope_scaling=LLAMA3 | dict(high_freq_factor=1.0)), "high_freq_factor"),
        (dict(rope_scaling=dict(rope_type=[], factor=2.0)), "rope_scaling"),
        (dict(rope_scaling=LLAMA3 | dict(betafast=3)), "no key but"),
        (dict(n_head=2**28, head_dim=2**28), "n_head"),
        (dict(n_head=1, n_kv_head=1, n_embd=2**28, head_dim=2), "n_hidden"),
    ],
)
def test_impossible_shapes_are_refused_by_name(bad, word):
    with pytest.raises(UserError, match=word):
        GPTConfig(**(dict(vocab_size=64, n_ctx=8, n_layer=2) | QWEN3 | bad))
