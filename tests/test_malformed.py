"""Folders that are not what they say: each opens with the results that it had, or is refused in one
line, before anything large is built. The fixtures, changed in one place at a time."""

import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from barelm.bpe import char_tokenizer
from barelm.checkpoint import load, save
from barelm.files import write_json
from barelm.quantized import quantize_weights
from barelm.run import UserError
from barelm.safetensors import INDEX, read_safetensors, write_safetensors
from barelm.shards import open_shard
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm2"]
TOKENIZERS = ["gpt2", "llama3", "qwen3", "smollm2", "llama2", "mistral"]
TOK = char_tokenizer("abcdefghijklmnopqrstuvwxyz \n.?!😀é")
IDS = torch.tensor([[1, 5, 3, 30, 7, 7, 2]])
DEEP = "[" * 100_000 + "]" * 100_000
RAW = "@raw@"  # stands for a text that json.dumps does not write
VALUES = {
    **{name: name for name in ("None", "-1", "0", "1", "1.5", "[]", "{}", "NaN", "true", "8.0")},
    **{"None": "null", "text": '"x"', "digits": '"8"', "inf": "1e400", "2**70": str(2**70)},
    **{"10**9": str(10**9), "deep": DEEP, "missing": None},
}


@pytest.fixture
def folder(tmp_path):
    """A function that copies a fixture, with a tokenizer, to a folder of its own."""

    def copy(name):
        to = shutil.copytree(FIXTURES / name, tmp_path / name)
        write_json(to / "tokenizer.json", TOK.spec)
        write_json(to / "tokenizer_config.json", TOK.config)
        return to

    return copy


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def put(path, place, text):
    """Write the JSON file anew with the value at a place, a list of keys, given as JSON text; None
    takes the key away."""
    whole = at = read(path)
    for key in place[:-1]:
        at = at[key]
    if text is None:
        at.pop(place[-1])
    else:
        at[place[-1]] = RAW
    path.write_text(json.dumps(whole, ensure_ascii=False).replace(json.dumps(RAW), str(text)))


def rewrite(path, change):
    """Write the safetensors file anew, its {name: tensor} changed in place."""
    tensors, metadata = read_safetensors(path)
    change(tensors)
    with open(path, "wb") as file:
        write_safetensors(file, tensors, metadata)


def results(folder):
    """What a folder computes: logits, ids of a text, the tokens that end and begin one."""
    net, tok = load(folder)
    with torch.no_grad():
        return net(IDS), tok.encode("abc é"), tok.eos_ids, tok.bos_id


def refusal(f, *args):
    """The one line that f(*args) is refused with."""
    with pytest.raises(UserError) as error:
        f(*args)
    line = str(error.value)
    assert "\n" not in line and len(line) < 1000
    return line


# A few of all pairs of key and value, in every file

# Other values of these are another model, or another end of a text, which is what the file says.
OTHERS = "rms_norm_eps layer_norm_epsilon rope_theta factor low_freq_factor high_freq_factor n_head"
OTHERS += " original_max_position_embeddings rope_parameters eos_token_id bos_token_id"
OTHERS = OTHERS.split()


def places(d, depth=0):
    """The places in a JSON value, of long lists and dicts the first and last few."""
    keys = []
    if isinstance(d, dict):
        keys = list(d)
    elif isinstance(d, list):
        keys = range(len(d))
    if depth:
        keys = [*keys[:6], *keys[6:][-2:]]
    for key in keys:
        yield [key]
        if depth < 4:
            yield from ([key, *rest] for rest in places(d[key], depth + 1))


def cases(path, share):
    """(place, JSON text) of one of `share` of all pairs, always the same ones."""
    for place in places(read(path)):
        for name, text in VALUES.items():
            if zlib.crc32(f"{path.parent.name} {path.name} {place} {name}".encode()) % share == 0:
                yield place, text


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_config_is_refused_or_harmless(name, file, folder):
    there, counts = folder(name), [0, 0]
    before, good = results(there), (there / file).read_bytes()
    for place, text in [*cases(there / file, 10)]:
        put(there / file, place, text)
        try:
            after = results(there)
        except UserError as error:
            assert "\n" not in str(error)
            counts[0] += 1
        else:
            assert place[-1] in OTHERS or after[0].equal(before[0]) and after[1:] == before[1:]
            assert after[0].isfinite().all(), (place, text)
            counts[1] += 1
        (there / file).write_bytes(good)
    assert min(counts) > 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_changed_tokenizer_is_refused_or_is_what_tokenizers_makes_of_it(name, tmp_path):
    there = shutil.copytree(FIXTURES / "tokenizers" / name, tmp_path / name)
    texts = ["def f(x):\n    return x", "naïve café 😀", "  two  spaces", "<s>a</s>"]
    ids = lambda: [Tokenizer.from_folder(there).encode(text) for text in texts]
    before, good, refused = ids(), (there / "tokenizer.json").read_text(encoding="utf-8"), 0
    for place, text in [*cases(there / "tokenizer.json", 30)]:
        put(there / "tokenizer.json", place, text)
        try:
            after = ids()
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            if after != before:
                library = pytest.importorskip("tokenizers")
                theirs = library.Tokenizer.from_file(str(there / "tokenizer.json"))
                theirs.encode_special_tokens = True
                expected = [theirs.encode(t, add_special_tokens=False).ids for t in texts]
                assert after == expected, (place, text)
        (there / "tokenizer.json").write_text(good, encoding="utf-8")
    assert refused


# config.json


@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_another_size_than_its_weights_builds_nothing(name, folder):
    there = folder(name)
    config, expected = read(there / "config.json"), results(there)
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    for number in (1, 3, 20_000, 2**28):
        put(there / "config.json", [layers], number)
        line = refusal(load, there)
        assert f"{number} layers in config.json, 2 in its weights" in line
    for key, value in config.items():
        if type(value) is int and not key.endswith("token_id") and value >= 1:
            for number in (10**9, 2**28, -1, value + 0.5, f'"{value}"', f"{value}.0", 2**70):
                write_json(there / "config.json", config)
                put(there / "config.json", [key], number)
                if key in ("max_window_layers", "pretraining_tp"):  # which nothing reads
                    continue
                try:
                    loaded = results(there)
                except UserError as error:
                    assert "\n" not in str(error)
                else:  # a longer context, or a wider window, changes nothing within it
                    assert key in ("max_position_embeddings", "sliding_window")
                    assert loaded[0].equal(expected[0])


def test_what_a_config_gets_wrong_is_told_by_the_name_that_it_has_there(folder):
    there = folder("llama")
    config = read(there / "config.json")
    rope = config["rope_parameters"]
    for change, words in [
        ({"rms_norm_eps": math.nan}, "config.json: rms_norm_eps=nan: expected"),
        ({"rms_norm_eps": math.inf}, "config.json: rms_norm_eps=inf: expected"),
        ({"rms_norm_eps": -1}, "config.json: rms_norm_eps=-1.0: expected"),
        ({"rope_parameters": rope | {"rope_theta": math.nan}}, "rope_theta=nan"),
        ({"rope_parameters": rope | {"rope_theta": -1}}, "rope_theta=-1.0"),
        ({"rope_parameters": rope | {"rope_theta": 0}}, "rope_theta=0.0"),
        ({"rope_parameters": rope | {"factor": 0}}, "factor a number above 0"),
        ({"rope_parameters": {"full_attention": rope}}, "rope_parameters="),
        ({"rope_parameters": "linear"}, "rope_parameters='linear'"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings='true': expected true or false"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True: expected a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"is_causal": False}, "is_causal=False not supported"),
        ({"original_max_position_embeddings": 4}, "original_max_position_embeddings=4"),
        ({"pooling": "mean"}, "pooling='mean' not supported"),
        ({"model_type": "mistral", "sliding_window": "16"}, "sliding_window='16'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        ({"model_type": ["llama"]}, "is not supported"),
    ]:
        write_json(there / "config.json", config | change)
        assert words in refusal(load, there)


FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("file", [*FILES, INDEX, "adapter_config.json"])
def test_json_that_is_none_or_nests_too_deeply_is_a_line(file, folder):
    there = folder("qwen2")
    if file == "adapter_config.json":
        (there / "config.json").unlink()
    for text in (DEEP, '{"a":' * 100_000 + "1" + "}" * 100_000, "", "[]", "null", '{"a": '):
        (there / file).write_text(text)
        assert str(there / file) in refusal(load, there)
    (there / file).write_bytes(b"\xff\xfe")
    assert str(there / file) in refusal(load, there)
    (there / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refusal(load, there)


# The ids that end and begin a text


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_of_no_token_are_refused_by_their_file(file, folder):
    there = folder("llama")
    (there / "generation_config.json").unlink()
    n = TOK.n_vocab
    for ids in ("0", True, n, -1, 0.0, [0, n], [0, "1"], [True], [None], [[0]], {}, 2**70, "x"):
        for key in ("eos_token_id", "bos_token_id"):
            write_json(there / file, read(FIXTURES / "llama" / "config.json") | {key: ids})
            assert f"{there / file}: {key}=" in refusal(load, there)
    for ids, expected in ((3, [3]), ([3, n - 1], [3, n - 1]), ([], []), (None, TOK.eos_ids)):
        config = read(FIXTURES / "llama" / "config.json")
        write_json(there / file, config | {"eos_token_id": ids})
        assert load(there)[1].eos_ids == expected


# tokenizer.json


def test_a_tokenizer_with_malformed_ids_is_refused_by_the_token():
    spec, config = read(FIXTURES / "tokenizers/gpt2/tokenizer.json"), {}
    vocab, added = spec["model"]["vocab"], spec["added_tokens"][0]
    for id in (-1, 2**32, 2**20, 1.0, True, "5", None, [5], vocab["a"]):
        changed = {"model": spec["model"] | {"vocab": vocab | {"b": id}}}
        assert "'b'" in refusal(Tokenizer, spec | changed, config)
        changed = {"added_tokens": [added, added | {"content": "<new>", "id": id}]}
        assert "<new>" in refusal(Tokenizer, spec | changed, config)
    changed = {"added_tokens": [added | {"id": added["id"] + 1}]}  # its own in the vocabulary
    assert "<|endoftext|>" in refusal(Tokenizer, spec | changed, config)
    for flag in ("special", "lstrip"):
        assert "malformed" in refusal(
            Tokenizer, spec | {"added_tokens": [added | {flag: "no"}]}, config
        )
    for key in ("eos_token", "bos_token", "pad_token", "chat_template"):
        for name in (3, True, ["x"], {"content": 3}, {}):
            assert f"{key}=" in refusal(Tokenizer, spec, {key: name})


def test_an_end_token_that_is_none_is_refused_where_nothing_else_names_one(folder):
    there = folder("gpt2")
    for key in ("eos_token", "bos_token"):
        write_json(there / "tokenizer_config.json", TOK.config | {key: "<nothing>"})
        load(there)  # generation_config.json has the ids
        for file in ("config.json", "generation_config.json"):
            config = read(FIXTURES / "gpt2" / file)
            write_json(there / file, config | {f"{key}_id": None})
        assert f"tokenizer_config.json: {key}='<nothing>'" in refusal(load, there)
        for file in ("config.json", "generation_config.json"):
            shutil.copy(FIXTURES / "gpt2" / file, there / file)


@pytest.mark.parametrize("kind, score", [("inf", -math.inf), ("nan", math.nan), ("text", "1")])
def test_a_score_that_is_no_number_is_refused(kind, score):
    vocab = [[chr(letter), -1.0] for letter in range(97, 123)] + [["ab", score]]
    line = refusal(Tokenizer, {"model": {"type": "Unigram", "vocab": vocab}}, {})
    assert "'ab' has the score" in line


# Weights


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_weights_are_finite_and_of_their_kind(name, folder):
    there = folder(name)
    path = there / "model.safetensors"
    good = path.read_bytes()
    for i, (key, t) in enumerate(read_safetensors(path)[0].items()):
        number = (math.nan, math.inf, -math.inf)[i % 3]
        rewrite(path, lambda tensors: tensors[key].view(-1)[-1:].fill_(number))
        assert f"{key} has numbers that are not finite" in refusal(load, there)
        path.write_bytes(good)
        whole = {4: torch.int32, 2: torch.int16}[t.element_size()]
        rewrite(path, lambda tensors: tensors.update({key: tensors[key].view(whole)}))
        assert key.split(".")[-2] in refusal(load, there)
        path.write_bytes(good)
        rewrite(path, lambda tensors: tensors.pop(key))
        refusal(load, there)
        path.write_bytes(good)
    largest = torch.tensor(1e38)
    rewrite(path, lambda tensors: tensors.update({key: largest.expand_as(tensors[key])}))
    load(there)
    assert "not finite in torch.float16" in refusal(load, there, "cpu", torch.float16)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_and_scales_are_of_their_kind(kind, tmp_path):
    net = GPT(GPTConfig(40, 16, 1, 2, 64))
    quantize_weights(net, kind)
    save(tmp_path, net, TOK)
    path = tmp_path / "model.safetensors"
    good, name = path.read_bytes(), "model.layers.0.self_attn.q_proj"
    for key, change in [
        (f"{name}.weight", lambda t: t.view(torch.bool if kind == "int4" else torch.uint8)),
        (f"{name}.weight", lambda t: t.float()),
        (f"{name}.scale", lambda t: t.view(torch.int16)),
        (f"{name}.scale", lambda t: t * math.nan),
    ]:
        rewrite(path, lambda tensors: tensors.update({key: change(tensors[key])}))
        assert key in refusal(load, tmp_path)
        path.write_bytes(good)
    changes = [{"quantize": "int2"}, {"quantize": True}, {"adapter_size": 2**40}]
    for change in (*changes, {"int4_group": 48}, {"int4_group": [32]}, {"int4_group": 64.0}):
        config = read(tmp_path / "config.json")
        write_json(tmp_path / "config.json", config | change)
        assert f"{[*change][0]}=" in refusal(load, tmp_path)
        write_json(tmp_path / "config.json", config)


def test_a_tensor_that_is_there_twice_is_refused(folder):
    there = folder("qwen2")
    first, second = sorted(there.glob("*.safetensors"))
    extra = read_safetensors(first)[0]
    name = [*extra][0]
    rewrite(second, lambda tensors: tensors.update({name: extra[name] + 1}))
    assert f"{name} is in another file" in refusal(load, there)
    there = folder("smollm2")  # whose head is its embedding
    path, name = there / "model.safetensors", "model.embed_tokens.weight"
    before = results(there)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    assert results(there)[0].equal(before[0])
    rewrite(path, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert "lm_head.weight is not the embedding" in refusal(load, there)


# Classifiers


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_a_classifier_has_its_head_and_a_name_for_each_score(name, folder, tmp_path):
    net, tok = load(folder(name))
    net.set_score(["a", "b", "c"])
    save(tmp_path / "c", net, tok)
    config = read(tmp_path / "c/config.json")
    for labels in ([], ["a", "b", "c"], {"0": "a", "1": "b"}, {"0": 0, "1": 1, "2": 2}, "abc"):
        write_json(tmp_path / "c/config.json", config | {"id2label": labels})
        assert "id2label=" in refusal(load, tmp_path / "c")
    for labels in ({"0": "a", "1": "b", "3": "c"}, {"0": "a", "1": "a", "2": "c"}, 3, True):
        write_json(tmp_path / "c/config.json", config | {"id2label": labels})
        assert "id2label=" in refusal(load, tmp_path / "c")
    write_json(tmp_path / "c/config.json", config | {"id2label": None})
    back, _ = load(tmp_path / "c")
    assert back.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with torch.no_grad():
        assert torch.equal(back.scores(IDS.tolist()), net.scores(IDS.tolist()))
        assert back(IDS).isfinite().all()  # whose head a classifier's file has not
    write_json(tmp_path / "c/config.json", config)
    rewrite(tmp_path / "c/model.safetensors", lambda tensors: tensors.pop("score.weight"))
    assert "without a score.weight" in refusal(load, tmp_path / "c")


# Adapters


def adapt(folder, base, **changes):
    """Write a LoRA adapter of rank 2 for a qwen3 base."""
    folder.mkdir()
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    torch.manual_seed(0)
    tensors = {f"{name}A.weight": torch.randn(2, 8), f"{name}B.weight": torch.randn(12, 2)}
    with open(folder / "adapter_model.safetensors", "wb") as file:
        write_safetensors(file, tensors, {"format": "pt"})
    config = dict(peft_type="LORA", r=2, lora_alpha=4, base_model_name_or_path=base)
    config |= dict(target_modules=["q_proj"], bias="none", init_lora_weights=True) | changes
    config = {key: value for key, value in config.items() if value != "missing"}
    write_json(folder / "adapter_config.json", config)
    return folder


def test_an_adapter_that_is_not_plain_is_refused_by_the_key(folder, tmp_path):
    folder("qwen3")
    for key, values in {
        "lora_alpha": [math.nan, math.inf, "4", True, None, [4], 2**70, "missing"],
        "r": [0, -2, 2.0, True, "2", None, 3, 2**70, "missing"],
        "rank_pattern": [{"q_proj": 4}, {"q_proj": "2"}, [2], {"(": 2}, {"(a+)+": 2}],
        "alpha_pattern": [{"q_proj": math.nan}, {"q_proj": None}, "q_proj", {"*": 4}],
        "use_rslora": [True],
        "use_dora": [True],
        "modules_to_save": [["lm_head"]],
        "bias": ["all"],
        "lora_bias": [True],
        "init_lora_weights": ["pissa", "olora", "loftq"],
        "layer_replication": [[[0, 1]]],
        "alora_invocation_tokens": [[1]],
        "revision": ["v2"],
        "peft_type": ["IA3", None, [], "missing"],
        "base_model_name_or_path": [None, "", 3, ["../qwen3"], {}, "missing"],
        "a_key_of_later_days": [True],
    }.items():
        for value in values:
            there = adapt(tmp_path / "a", "../qwen3", **{key: value})
            line = refusal(load, there)
            assert "adapter_config.json: " in line, (key, value, line)
            shutil.rmtree(there)


def test_an_adapter_finds_its_base_or_says_what_it_found(folder, tmp_path):
    base = folder("qwen3")
    weights = lambda path: load(path)[0].model.layers[1].self_attn.q_proj.weight
    one = adapt(tmp_path / "one", "../qwen3")
    two = adapt(tmp_path / "two", "../one")  # an adapter of an adapted model
    torch.testing.assert_close(weights(two) - weights(one), weights(one) - weights(base))
    assert "is made with it" in refusal(load, adapt(tmp_path / "self", "."))
    adapt(tmp_path / "there", "../back")
    assert "is made with it" in refusal(load, adapt(tmp_path / "back", "../there"))
    for name, words in [
        ("adapter_config.json", "is a file"),
        ("a\0b", "folder"),
        ("x" * 5000, "no name of a folder"),
        ("../nowhere", "no such folder"),
    ]:
        there = adapt(tmp_path / "odd", name)
        assert words in refusal(load, there)
        shutil.rmtree(there)
    shutil.copy(base / "config.json", one)  # as trainers leave one beside an adapter
    assert torch.equal(weights(one), weights(tmp_path / "one"))
    shutil.copy(base / "model.safetensors", one)
    assert "a model, or an adapter?" in refusal(load, one)


def test_an_adapters_matrices_are_finite_and_of_their_rank(folder, tmp_path):
    folder("qwen3")
    there = adapt(tmp_path / "a", "../qwen3")
    path = there / "adapter_model.safetensors"
    good = path.read_bytes()
    A, B = read_safetensors(path)[0]
    for change, words in [
        (lambda t: t[A][0, :1].fill_(math.nan), "not finite"),
        (lambda t: t[B][0, :1].fill_(math.inf), "not finite"),
        (lambda t: t.update({A: t[A] * 1e30, B: t[B] * 1e30}), "not finite"),
        (lambda t: t.update({A: t[A].view(torch.int32)}), "whole numbers"),
        (lambda t: t.pop(B), "two matrices"),
        (lambda t: t.update({A: t[A][:1], B: t[B][:, :1]}), "r=2, but"),
        (lambda t: t.update({A: t[A][:0], B: t[B][:, :0]}), "r=2, but"),
        (lambda t: t.update({A: t[A][0]}), "does not fit"),
    ]:
        rewrite(path, change)
        assert words in refusal(load, there)
        path.write_bytes(good)
    spec = TOK.spec | {"added_tokens": [*TOK.spec["added_tokens"]]}
    spec["added_tokens"].append(spec["added_tokens"][0] | {"content": "<new>", "id": 40})
    write_json(there / "tokenizer.json", spec)
    assert "41 tokens, but the base knows 40" in refusal(load, there)


# Token shards


def write_shard(path, tokens, count=None, magic=20240520, version=1, kind="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, kind).tobytes())


def test_a_shard_is_what_its_header_says(tmp_path):
    path = tmp_path / "train_000000.bin"
    for tokens in ([], [3], [3, 4], [*range(30)]):
        write_shard(path, tokens)
        assert open_shard(path).tolist() == tokens
        windows = train.Windows([path], 4)
        assert windows.n == max(0, len(tokens) - 1) // 4
        part = train.Windows([path], 4, partial=True)
        targets = [t for i in range(part.n) for t in part.window(i)[1:] if t >= 0]
        assert targets == tokens[1:]
    for count in (-1, -5, 29, 31, 2**31 - 1, -(2**31)):
        write_shard(path, [*range(30)], count)
        assert "cut short" in refusal(open_shard, path)
    for magic, version in ((20240520, 7), (20240801, 1), (1, 1)):
        write_shard(path, [*range(30)], magic=magic, version=version)
        assert "not a token shard" in refusal(open_shard, path)
    good = path.read_bytes()
    for length in (0, 3, 8, 12, 1023, 1024):
        path.write_bytes(good[:length])
        refusal(open_shard, path)
    assert "cannot be read" in refusal(open_shard, tmp_path)


@pytest.mark.parametrize("where", [0, 13, 29])
@pytest.mark.parametrize("id, form", [(64, {}), (2**32 - 1, dict(magic=20240801, version=7))])
def test_an_id_of_no_token_is_told_with_its_shard(id, form, where, tmp_path):
    paths = [tmp_path / f"train_{i:06}.bin" for i in range(3)]
    form = form | dict(kind="<u4" if form else "<u2")
    for path in paths:
        write_shard(path, [63] * 30, **form)
    windows = train.Windows(paths, 5, n_vocab=64)
    cpu = torch.device("cpu")
    every = list(range(windows.n))
    assert windows.batch(every, cpu)[1].max() == 63
    tokens = [63] * 30
    tokens[where] = id
    write_shard(paths[1], tokens, **form)
    line = refusal(train.Windows(paths, 5, n_vocab=64, partial=True).batch, range(18), cpu)
    assert line.startswith(f"{paths[1]}: token {id}, but the tokenizer has 64 tokens")
