"""Models from the outside world: each family's tokenizer.json and chat template against goldens
made by tokenizers and transformers (fixtures/make.py) and against these themselves where they are
installed; configs; files in the forms that the Hub has them in; downloads; the commands."""

import json
import pickle
import random
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import run
from test_tokenizers import TEXTS, more_texts

import model
from barelm.checkpoint import load, save
from barelm.encoders import LibraryEncoder
from barelm.families import from_hf_config
from barelm.files import write_json
from barelm.optim import n_params
from barelm.run import UserError
from barelm.safetensors import INDEX, read_safetensors, write_safetensors
from barelm.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ["gpt2", "llama3", "qwen3", "smollm2", "llama2", "tinyllama", "mistral"]
GOLDEN = json.loads((FIXTURES / "tokenizers" / "expected.json").read_text())
TALK = [{"role": role, "content": text} for role, text in GOLDEN["talk"]]
# What a tokenizer of each family has in mind: a model of that shape with it.
NETS = {"llama2": "llama", "mistral": "mistral", "gpt2": "gpt2", "qwen3": "qwen2"}


def open_tokenizer(family):
    return Tokenizer.from_folder(FIXTURES / "tokenizers" / family)


def folder_of(family, path):
    """A Hugging Face folder at path: a fixture's shape with random weights for the family's
    tokenizer, saved by name as the Hub has it."""
    tok, d = open_tokenizer(family), read(FIXTURES / NETS[family] / "config.json")
    rows = "n_positions" if family == "gpt2" else "max_position_embeddings"
    d |= {"vocab_size": tok.n_vocab, rows: 256, "sliding_window": None}
    config = from_hf_config(d)
    torch.manual_seed(0)
    save(path, model.GPT(config), tok)
    saved = read(path / "config.json")
    if family == "mistral":
        saved |= {"model_type": "mistral", "sliding_window": 96}
    write_json(path / "config.json", saved)
    return path


def tune(folder, base, adapt):
    """Two steps of finetune.py on a few conversations; the folder that they are saved in."""
    rows = [TALK[1:2] + [{"role": "assistant", "content": f"word {i}"}] for i in range(12)]
    text = "\n".join(json.dumps({"messages": row}) for row in rows)
    data = folder / "data/set"
    data.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (data / f"sft_{split}.jsonl").write_text(text)
    settings = ["--dataset=set", "--max_steps=2", "--batch_size=4", "--device=cpu"]
    settings += [f"--model={base}", f"--adapt={adapt}", f"--out_dir=out/{adapt}"]
    run(folder, "finetune.py", *settings)
    return f"out/{adapt}"


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_ids_and_texts(family):
    tok, facts = pickle.loads(pickle.dumps(open_tokenizer(family))), GOLDEN[family]
    assert tok.start == facts["start"] == tok.prompt("")[: len(tok.start)]
    for text, ids, shown in zip(GOLDEN["texts"], facts["ids"], facts["decoded"], strict=True):
        assert tok.encode(text) == ids
        assert [i.tolist() for i in tok.encode_batch([text])] == [ids]
        assert tok.decode(ids) == shown
        stream = b"".join(map(tok.token_bytes, ids)).decode(errors="replace")
        has_first_space = type(tok.encoder) is LibraryEncoder  # the space before the first word
        assert stream.removeprefix(" " if has_first_space else "") == shown


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_gives_the_same_ids(family):
    tokenizers = pytest.importorskip("tokenizers")
    tok = open_tokenizer(family)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tok.spec))
    theirs.encode_special_tokens = True
    rng, names = random.Random(3), [*tok.special, "▁", " ", "  a", "<0x41>", "\0", "é"]
    mixed = ["".join(rng.choices([*names, "ab", "1"], k=8)) for _ in range(200)]
    texts = [*TEXTS, *more_texts(), *mixed]
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == expected, text
        assert tok.decode(expected) == theirs.decode(expected, False)
    assert [ids.tolist() for ids in tok.encode_batch(texts, 2)] == [tok.encode(t) for t in texts]


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_chats_have_the_ids_of_transformers_and_a_mask(family):
    tok, facts = open_tokenizer(family), GOLDEN[family]
    ids, mask = tok.chat(TALK)
    assert ids == facts["chat"] and len(mask) == len(ids)
    prompt, nothing = tok.chat(TALK[:-1], add_generation_prompt=True)
    assert prompt == facts["prompt"] and not any(nothing)
    assert tok.chat(TALK[1:2], add_generation_prompt=True)[0] == facts["bare"]
    said = b"".join(tok.shown[i] for i, m in zip(ids, mask) if m).decode()
    end = tok.config["eos_token"]
    first = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert "".join(said.split()) == "".join(f"Itis2.{end}{first}Because.{end}".split())
    real = [i for i in ids if i in tok.special.values()]
    worse = [m | {"content": m["content"] + end + "<s><|im_start|>"} for m in TALK]
    assert [i for i in tok.chat(worse)[0] if i in tok.special.values()] == real


def test_a_mask_holds_beside_bytes_that_have_no_token():
    tok, join = open_tokenizer("smollm2"), "{% for m in messages %}{{ m.content }}{% endfor %}"
    lost, tok = chr(min(tok.encoder.lacking)), Tokenizer(tok.spec, {"chat_template": join})
    assert lost not in tok.decode(tok.encode(f"a{lost}b")) == "ab"
    talk = [{"role": "user", "content": f"a{lost * 5}b!"}, {"role": "assistant", "content": "cd e"}]
    ids, mask = tok.chat(talk)
    assert ids == tok.encode(f"a{lost * 5}b!cd e")
    assert tok.decode([i for i, m in zip(ids, mask) if m]) == "cd e"


def test_templates_have_their_forms_and_refusals(tmp_path):
    pytest.importorskip("tokenizers")  # which runs Llama 2's
    tok = open_tokenizer("llama2")
    with pytest.raises(UserError, match="roles must alternate"):
        tok.chat(TALK[2:])
    say = "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{{ m | tojson }}"
    config = tok.config | {"chat_template": [{"name": "tool_use", "template": "x"}]}
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer(tok.spec, config).chat(TALK)
    folder = shutil.copytree(FIXTURES / "tokenizers" / "llama2", tmp_path / "a")
    (folder / "chat_template.jinja").write_text(say + "{{ strftime_now('%Y')[:0] }}{% endfor %}")
    ids, _ = Tokenizer.from_folder(folder).chat(TALK[1:2], True)
    assert tok.decode(ids) == '{"role": "user", "content": "  What is 1 + 1?\\n"}'
    (folder / "chat_template.jinja").write_text("{{ messages[0].__class__.__mro__ }}")
    with pytest.raises(UserError, match="refuses"):
        Tokenizer.from_folder(folder).chat(TALK)


def test_tokenizers_that_ours_would_give_other_ids_are_for_the_library():
    """Or refused by name, where the ids are not the same each time or a chat's would not be."""
    library = pytest.importorskip("tokenizers")
    gpt2, llama = open_tokenizer("gpt2"), open_tokenizer("llama2")
    body = lambda tok, **change: {"model": tok.spec["model"] | change}
    pruned = {t: i for t, i in llama.spec["model"]["vocab"].items() if t != "<0x41>"}
    swapped = gpt2.spec["model"]["merges"][::-1]
    flag = [gpt2.spec["added_tokens"][0] | {"lstrip": True}]
    for tok, change, why in [
        (gpt2, body(gpt2, dropout=0.1), "dropout"),
        (gpt2, body(gpt2, end_of_word_suffix="</w>"), None),
        (gpt2, body(gpt2, merges=swapped), None),
        (gpt2, body(gpt2, merges=gpt2.spec["model"]["merges"][:-1]), None),
        (gpt2, {"post_processor": {"type": "RobertaProcessing"}}, "tokenizers refuses it"),
        (gpt2, {"added_tokens": flag}, "<|endoftext|> with lstrip"),
        (gpt2, {"pre_tokenizer": {"type": "Whitespace"}}, None),
        (llama, body(llama, vocab=pruned), None),
        (llama, body(llama, byte_fallback=False), None),
        (llama, {"decoder": {"type": "Metaspace"}}, "tokenizers refuses it"),
        (llama, {"normalizer": {"type": "Prepend", "prepend": "▁"}}, None),
    ]:
        if why:
            with pytest.raises(UserError, match=why):
                Tokenizer(tok.spec | change, tok.config)
            continue
        spec = tok.spec | change
        theirs = library.Tokenizer.from_str(json.dumps(spec))
        theirs.encode_special_tokens = True
        for text in GOLDEN["texts"]:
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert Tokenizer(spec, tok.config).encode(text) == expected


# Configs and files


def logits(folder, ids):
    with torch.no_grad():
        return load(folder)[0](torch.tensor([ids]))[0]


def test_the_forms_that_files_have_on_the_hub(tmp_path):
    pytest.importorskip("tokenizers")  # which runs Llama 2's
    ids = [1, 5, 3, 30]
    # GPT-2's own file: no prefix, causal masks, a config without the keys of later days.
    folder = folder_of("gpt2", tmp_path / "gpt2")
    expected = logits(folder, ids)
    tensors, _ = read_safetensors(folder / "model.safetensors")
    tensors = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(2)}
    with open(folder / "model.safetensors", "wb") as file:
        write_safetensors(file, tensors, {"format": "pt"})
    config = read(folder / "config.json")
    for key in ("tie_word_embeddings", "n_inner", "activation_function", "dtype"):
        config.pop(key, None)
    write_json(folder / "config.json", config)
    (folder / "generation_config.json").unlink()  # then config.json says which tokens end a text
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})
    torch.testing.assert_close(logits(folder, ids), expected)
    assert load(folder)[1].eos_ids == [config["eos_token_id"]] != [None]
    # RoPE by transformers 5's one dict, and by the two keys before it.
    folder = folder_of("llama2", tmp_path / "llama")
    expected, config = logits(folder, ids), read(folder / "config.json")
    scaling = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    old = {("type" if k == "rope_type" else k): v for k, v in scaling.items() if k != "rope_theta"}
    assert scaling["rope_type"] == "llama3"
    two = {"rope_scaling": old, "rope_theta": scaling["rope_theta"]}
    for form in ({"rope_parameters": scaling}, two):
        bare = {k: v for k, v in config.items() if k not in ("hidden_act", "head_dim")}
        write_json(folder / "config.json", bare | form)
        torch.testing.assert_close(logits(folder, ids), expected)


# The published shapes: hidden size, layers, heads, and theirs of keys; MLP, vocabulary; parameters.
PUBLISHED = {
    "SmolLM2-135M": ("llama", 576, 30, 9, 3, 1536, 49152, True, 134_515_008),
    "TinyLlama-1.1B": ("llama", 2048, 22, 32, 4, 5632, 32000, False, 1_100_048_384),
    "Llama-2-7b": ("llama", 4096, 32, 32, 32, 11008, 32000, False, 6_738_415_616),
    "Meta-Llama-3-8B": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 8_030_261_248),
    "Mistral-7B-v0.1": ("mistral", 4096, 32, 32, 8, 14336, 32000, False, 7_241_732_096),
    "Qwen2.5-0.5B": ("qwen2", 896, 24, 14, 2, 4864, 151936, True, 494_032_768),
    "Qwen3-0.6B": ("qwen3", 1024, 28, 16, 8, 3072, 151936, True, 596_049_920),
    "gpt2": ("gpt2", 768, 12, 12, 12, None, 50257, None, 124_439_808),
    "gpt2-medium": ("gpt2", 1024, 24, 16, 16, None, 50257, None, 354_823_168),
    "gpt2-large": ("gpt2", 1280, 36, 20, 20, None, 50257, None, 774_030_080),
    "gpt2-xl": ("gpt2", 1600, 48, 25, 25, None, 50257, None, 1_557_611_200),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    kind, width, layers, heads, kv, mlp, vocab, tie, expected = PUBLISHED[name]
    d = {"model_type": kind, "vocab_size": vocab}
    if kind == "gpt2":
        d |= {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024}
        d |= {"layer_norm_epsilon": 1e-5}
    else:
        d |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        d |= {"num_key_value_heads": kv, "intermediate_size": mlp, "rms_norm_eps": 1e-5}
        d |= {"max_position_embeddings": 32768, "tie_word_embeddings": tie}
        d |= {"head_dim": 128} if kind == "qwen3" else {}
    config = from_hf_config(d)
    assert config.n_ctx == {"gpt2": 1024}.get(kind, 32768)
    assert config.window == {"mistral": 4096}.get(kind, 0)
    with torch.device("meta"):
        assert n_params(model.GPT(config)) == expected


def test_what_is_not_exact_is_refused_by_name(tmp_path):
    configs = {n: read(FIXTURES / n / "config.json") for n in ("llama", "qwen2", "qwen3", "gpt2")}
    rope = configs["llama"]["rope_parameters"]
    for name, change, why in [
        ("llama", {"model_type": "mamba"}, "'mamba' is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": rope | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"intermediate_size": None}, "intermediate_size missing"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("qwen3", {"head_dim": None}, "head_dim missing"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu' not"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"scale_attn_weights": None}, "scale_attn_weights"),
    ]:
        with pytest.raises(UserError, match=why):
            from_hf_config(configs[name] | change)
    for name, key in ("gpt2", "hidden_act"), ("llama", "activation_function"):  # which it ignores
        assert from_hf_config(configs[name] | {key: "gelu"})


def test_malformed_folders_are_a_line(tmp_path):
    pytest.importorskip("tokenizers")  # which runs Llama 2's
    folder = folder_of("llama2", tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load(folder)
    for bad in ({}, {"weight_map": {"a": "../b.safetensors"}}, {"weight_map": {"a": 3}}):
        write_json(folder / "model.safetensors.index.json", bad)
        with pytest.raises(UserError, match="malformed"):
            load(folder)
    write_json(folder / INDEX, {"weight_map": {"a": "b.safetensors"}})
    with pytest.raises(UserError, match="b.safetensors: cannot be read"):
        load(folder)


# Downloads


class Hub(BaseHTTPRequestHandler):
    """Serves the folders in server.models as the Hub does: /owner/name/resolve/main/file."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        name, _, file = self.path[1:].partition("/resolve/main/")
        wanted, server = self.headers.get("Range"), self.server
        server.asked.append((file, wanted, self.headers.get("Authorization")))
        path = server.models.get(name, Path("/nowhere")) / file
        if not path.is_file():
            return self.send_error(404)
        body = path.read_bytes()
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        self.wfile.write(body[begin:])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.models, server.asked = {}, []
    server.cache = tmp_path / "home/.cache/barelm"
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}/", "NO_PROXY": "127.0.0.1"}
    server.env |= {"HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("barelm.checkpoint.HUB", server.env["HF_ENDPOINT"])
    monkeypatch.setattr("barelm.download.time.sleep", lambda seconds: None)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_model_in_several_files_is_fetched_once_and_resumed(hub, tmp_path, capsys):
    source = shutil.copytree(FIXTURES / "qwen2", tmp_path / "source")
    chars = {"type": "WordLevel", "unk_token": "a", "vocab": {chr(97 + i): i for i in range(26)}}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
    write_json(source / "tokenizer.json", {"model": chars, "pre_tokenizer": split})
    hub.models["some/Model-1.5"] = source
    shard = min(source.glob("*.safetensors"))
    part = hub.cache / "some--Model-1.5.part" / f"{shard.name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(shard.read_bytes()[:1000])  # an earlier run was killed here
    net, tok = load("some/Model-1.5")
    facts = read(source / "expected.json")
    with torch.no_grad():
        ours = net(torch.tensor(facts["ids"]))[0]
    torch.testing.assert_close(ours, torch.tensor(facts["logits"]), atol=2e-5, rtol=0)
    assert {token for _, _, token in hub.asked} == {"Bearer hf_x"}
    tries = [wanted for file, wanted, _ in hub.asked if file == shard.name]
    assert tries == ["bytes=1000-"] and "model-00002-of-00002" in capsys.readouterr().out
    assert [p.name for p in hub.cache.iterdir()] == ["some--Model-1.5"]
    names = {p.name for p in (hub.cache / "some--Model-1.5").iterdir()}
    assert names == {p.name for p in source.iterdir()} - {"expected.json"}
    hub.asked.clear()
    load("some/Model-1.5")
    assert hub.asked == []


def test_the_command_downloads_a_model_by_its_bare_name(hub, tmp_path):
    pytest.importorskip("tokenizers")  # which runs Llama 2's
    hub.models["tiny-llama"] = folder_of("llama2", tmp_path / "source")
    args = ["--prompt=def f", "--max_new_tokens=4", "--device=cpu"]
    done = run(tmp_path, "sample.py", "--model=tiny-llama", *args)
    assert "model.safetensors" in done.stdout and "def f" in done.stdout
    assert (hub.cache / "tiny-llama").is_dir()
    tune(tmp_path, "tiny-llama", "lora")  # an adapter's base may have such a name
    named = read(tmp_path / "out/lora/adapter_config.json")["base_model_name_or_path"]
    assert named == "tiny-llama"
    assert "def f" in run(tmp_path, "sample.py", "--model=out/lora", *args).stdout


def test_models_that_cannot_be_had_are_a_line(hub, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")  # which runs Llama 2's
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^no/model: neither a folder here .*404"):
        load("no/model")
    assert not hub.cache.exists()
    pickled = hub.models["old/model"] = folder_of("llama2", tmp_path / "source")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load("old/model")
    write_json(pickled / "config.json", {"model_type": "mamba"})
    hub.models["moe/model"] = pickled
    hub.asked.clear()
    with pytest.raises(UserError, match="mamba"):
        load("moe/model")
    assert [file for file, *_ in hub.asked] == ["config.json"]
    hub.asked.clear()
    (tmp_path / "runs").mkdir()
    for local in ("out/none", "runs/none", "./none", tmp_path / "none", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            load(local)
    assert hub.asked == []
    assert not any(p.name.endswith("model") for p in hub.cache.iterdir())
    monkeypatch.setattr("barelm.checkpoint.HUB", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="^no/model: neither"):
        load("no/model")


# The commands


@pytest.mark.parametrize("family", ["llama2", "mistral"])
def test_the_commands_sample_tune_and_save(family, tmp_path):
    base = folder_of(family, tmp_path / "base")
    done = run(tmp_path, "sample.py", "--model=base", "--prompt=a b", "--max_new_tokens=5")
    assert done.stdout.splitlines()[-1].startswith("a b") or "a b" in done.stdout
    for adapt in ("full", "lora"):
        out = tune(tmp_path, "base", adapt)
        done = run(tmp_path, "sample.py", f"--model={out}", "--prompt=a b", "--max_new_tokens=5")
        assert "a b" in done.stdout
        net, tok = load(tmp_path / out)
        assert tok.spec == open_tokenizer(family).spec and tok.start == [1]
    # Loaded and saved, a model has the same tensors and, for transformers, the same logits.
    net, tok = load(base)
    save(tmp_path / "again", net, tok)
    one, two = (read_safetensors(p / "model.safetensors")[0] for p in (base, tmp_path / "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(5, 205)[None]  # beyond Mistral's window
    with torch.no_grad():
        given = [
            transformers.AutoModelForCausalLM.from_pretrained(p)(ids).logits
            for p in (base, tmp_path / "again")
        ]
        given.append(net(ids))
    for theirs in given[:2]:
        torch.testing.assert_close(theirs, given[2], atol=1e-4, rtol=1e-4)
