"""Quantization, pruning and export, against naive loops and other programs' readers."""

import copy
import json
import math
import re
import struct
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_model import OURS, QWEN3, SHAPES, make_net, random_ids

import export
import model
from barelm.bpe import bpe_tokenizer, char_tokenizer
from barelm.checkpoint import load, save, saved_tensors
from barelm.families import family
from barelm.fast import generating
from barelm.files import whole_file, write_json
from barelm.gguf_file import as_array, write_gguf
from barelm.optim import make_optimizer
from barelm.quantized import QuantizedLinear, dequantize, quantize_weights
from barelm.run import UserError
from barelm.safetensors import read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def tok():
    """A BPE of ours: the 256 bytes, a few merges, special tokens; as many ids as it says."""
    return bpe_tokenizer([(b"a", b"b"), (b"ab", b"c"), (b" ", b"x"), (b"\n", b"\n")])


def saved(folder, tok, **shape):
    """(a random network with tok's vocabulary, the folder that holds it)."""
    net = make_net(vocab_size=-(-tok.n_vocab // 64) * 64, **shape)
    save(folder, net, tok)
    return net, folder


# Quantization


def naive_weights(w, kind):
    """Each weight rounded to one of the levels of its row (int8) or its group of 32 (int4)."""
    bf16, out = lambda x: torch.tensor(x).bfloat16().item(), w.clone()
    for row in out:
        for group in [row] if kind == "int8" else row.split(32):
            edge = [0.0] * (kind == "int4" and len(group) < 32)  # what pads the last group
            low, high = min(group.tolist() + edge), max(group.tolist() + edge)
            if kind == "int8":
                step, middle, codes = bf16(max(-low, high, 1e-30) / 127), 0.0, range(-127, 128)
            else:
                step = bf16(max((high - low) / 15, 1e-30))
                middle, codes = bf16(low + 8 * step), range(-8, 8)
            for i, x in enumerate(group.tolist()):
                group[i] = min((c * step + middle for c in codes), key=lambda level: abs(x - level))
    return out


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width, height", [(24, 24), (72, 16), (128, 48)])
def test_quantized_weights_are_the_nearest_levels(kind, bias, width, height):
    torch.manual_seed(5)
    layer = torch.nn.Linear(width, height, bias=bias)
    with torch.no_grad():
        layer.weight[3], layer.weight[4] = 0, layer.weight[4].abs() + 1
    quantized, expected = QuantizedLinear(layer, kind), naive_weights(layer.weight.data, kind)
    got = dequantize(quantized.weight, quantized.scale)[:, :width]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    net = make_net(**QWEN3)
    for rows in (1, 2, 40):  # the product for a few rows, and for many
        x = torch.randn(rows, width).bfloat16()
        for given in (x, x.float()):
            right = F.linear(x.float(), expected, layer.bias)
            with torch.no_grad(), generating(net):
                packed = net.ops.project(given, quantized, quantized)
            assert quantized(given).dtype == packed.dtype == given.dtype
            torch.testing.assert_close(quantized(given).float(), right, rtol=0.02, atol=0.03)
            # Rounded to bytes, each number of x and of the weights may be off by half a step, which
            # is the largest over 63 (x) or 127; and |a b| <= |a| |b|.
            lengths = x.float().norm(dim=1, keepdim=True) * expected.norm(dim=1)
            bound = 0.03 + 0.02 * right.abs() + lengths * 128**0.5 / 2 * (1 / 63 + 1 / 127)
            for half in packed.float().chunk(2, 1):
                assert ((half - right).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "gpt2-untied", *OURS])
def test_quantized_networks_are_saved_as_they_are(kind, name, tok, tmp_path):
    net, ids = make_net(vocab_size=320, **(SHAPES | OURS)[name]), random_ids(2, 20)
    with torch.no_grad():
        before = net(ids)
        after = quantize_weights(net, kind)(ids)
        assert 0 < (after - before).norm() / before.norm() < dict(int8=0.05, int4=0.5)[kind]
        save(tmp_path, net, tok)
        again, _ = load(tmp_path, quantize=kind)
        assert torch.equal(again(ids), after)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "barelm"
    if net.config.tie:
        assert again.lm_head.weight.shape[0] == 320
        entries, _ = read_safetensors(tmp_path / "model.safetensors")
        assert "model.embed_tokens.weight" not in entries
    [g] = model.generate(again, tok, [[1, 2, 3]], max_new_tokens=5, temperature=0)
    assert len(g.ids) == 5
    other = dict(int8="int4", int4="int8")[kind]
    with pytest.raises(UserError, match=f"{kind} already"):
        load(tmp_path, quantize=other)
    with pytest.raises(UserError, match="not trained"):
        make_optimizer(again)
    with pytest.raises(UserError, match="expected int8 or int4"):
        load(tmp_path, quantize="int3")


@pytest.mark.parametrize("kind", [dict(causal=False), dict(n_encoder_layer=1)])
def test_a_report_of_what_predicts_no_next_token(kind, tok, capsys):
    net = make_net(**(QWEN3 | {"vocab_size": 320} | kind)).eval()
    net.start_id = net.pad_id = tok.pad_id
    export.print_head(net, None)
    export.print_row("as it is", net, tok, None)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["MB", *(["tokens/s"] if net.config.causal else []), "zeros"]
    assert len(head) == len(row) and len(row.split()) == 3 + len(head.split())  # "as it is"


def test_quantized_classifiers_keep_their_labels(tok, tmp_path):
    net, ids = make_net(vocab_size=320, **QWEN3), random_ids(2, 9)
    net.set_score(["no", "yes"])
    quantize_weights(net, "int8")
    save(tmp_path, net, tok)
    again, _ = load(tmp_path)
    assert again.labels == ["no", "yes"] and type(again.score) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(again.score(again.hidden(ids)), net.score(net.hidden(ids)))


def table(text):
    """{row's name: [MB, bits per byte, tokens/s, share of zeros]} of a report."""
    rows = re.findall(r"^(\S.*?)\s{2,}([\d.,]+)\s+([\d.]+)\s+([\d.,]+)\s+([\d.]+)%$", text, re.M)
    return {name: [float(n.replace(",", "")) for n in numbers] for name, *numbers in rows}


def test_the_report_and_the_folder_agree(tiny):
    net, tok = load(tiny / "out" / "tiny")
    width, count = net.config.n_ctx, 12
    args = ["--model=out/tiny", "--dataset=tiny", f"--eval_tokens={count * width}"]
    shown = run(tiny, "export.py", *args, "--quantize=int4", "--prune=0.5", "--report").stdout
    assert not list((tiny / "out").glob("tiny-*"))
    rows = table(shown)
    assert rows["as it is"][3] < 1 and 50 <= rows["pruned 0.5 int4"][3] < 70
    done = run(tiny, "export.py", *args, "--quantize=int8", "--export=barelm").stdout
    rows, folder = table(done), tiny / "out" / "tiny-int8"
    tokens = np.fromfile(tiny / "data" / "tiny" / "val_000000.bin", "<u2")[512:].astype(np.int64)
    sizes = [len(tok.token_bytes(i)) for i in range(tok.n_vocab)]
    starts = range(0, len(tokens) - width, width)
    assert len(starts) > count
    for name, source in (("as it is", "tiny"), ("int8", "tiny-int8")):
        net, nats, size = load(tiny / "out" / source)[0], 0.0, 0
        for i in (starts[n * len(starts) // count] for n in range(count)):
            part = torch.from_numpy(tokens[i : i + width + 1])
            with torch.no_grad():
                logp = net(part[None, :-1])[0].float().log_softmax(-1)
            nats -= logp[range(width), part[1:]].sum().item()
            size += sum(sizes[id] for id in part[1:].tolist())
        assert rows[name][1] == pytest.approx(nats / size / math.log(2), abs=1e-4)
    file = folder / "model.safetensors"
    assert rows["int8"][0] == pytest.approx(file.stat().st_size / 1e6, abs=0.02)
    assert file.stat().st_size < 0.3 * (tiny / "out" / "tiny" / "model.safetensors").stat().st_size
    how = ["--model=out/tiny-int8", "--prompt=def f", "--max_new_tokens=3", "--temperature=0"]
    assert run(tiny, "sample.py", *how).stdout.startswith("def f")


# Pruning


@pytest.mark.parametrize("how", ["0.5", "0.3", "2:4"])
def test_pruning_zeroes_the_smallest(how):
    net, pruned = make_net(**QWEN3), make_net(**QWEN3)
    export.prune_weights(pruned, how)
    size = zeros = 0
    for (name, before), after in zip(net.named_parameters(), pruned.parameters()):
        if ".layers." not in name or before.ndim < 2:
            assert torch.equal(before, after)
            continue
        groups = before.view(-1, 4) if how == "2:4" else before.view(1, -1)
        expected = []
        for group in groups.tolist():
            count = 2 if how == "2:4" else round(float(how) * len(group))
            least = sorted(range(len(group)), key=lambda i: abs(group[i]))[:count]
            expected += [0.0 if i in set(least) else x for i, x in enumerate(group)]
        assert after.flatten().tolist() == expected
        size, zeros = size + len(expected), zeros + expected.count(0.0)
    assert (
        export.zeros_share(pruned)
        == zeros / size
        == pytest.approx(float(how[:3].replace("2:4", "0.5")), abs=1e-3)
    )


@pytest.mark.parametrize("more", [dict(n_encoder_layer=1), dict(mtp=1)])
def test_pruning_reaches_the_blocks_of_every_part(more):
    net = make_net(**QWEN3, **more)
    export.prune_weights(net, "0.5")
    for name, p in net.named_parameters():
        share = (p == 0).float().mean().item()
        assert abs(share - 0.5) < 0.01 if ".layers." in name and p.ndim == 2 else share < 0.1
    assert export.zeros_share(net) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shift", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("how", ["0.05", "0.5", "2:4"])
def test_quantized_zeros_are_zeros(how, shift, kind):
    """Whatever the share of zeros, and where the weights lie around them; at int4's usual error."""
    net = make_net(**QWEN3 | dict(n_embd=72, n_head=2, n_hidden=152))  # no whole groups of 64
    with torch.no_grad():
        for layer in export.block_matrices(net):
            layer.weight += shift
    before = copy.deepcopy(net)
    export.prune_weights(net, how)
    error = {}
    for name, source in (("whole", before), ("pruned", net)):
        squares = []
        for layer in export.block_matrices(source):
            quantized = QuantizedLinear(layer, kind)
            got = dequantize(quantized.weight, quantized.scale)[:, : layer.weight.shape[1]]
            assert (got[layer.weight == 0] == 0).all()
            squares.append((got - layer.weight).square().mean())
        error[name] = torch.stack(squares).mean().sqrt()
    assert error["pruned"] < 1.2 * error["whole"] or shift == -3.0  # there zero widens the grid


# Hugging Face


def test_an_export_keeps_the_dtype_of_a_model_in_several_files(tok, tmp_path):
    net, folder = saved(tmp_path / "whole", tok, **QWEN3)
    tensors, index = saved_tensors(net), {}
    for i, name in enumerate(tensors):
        index[name] = f"model-{i % 2 + 1}.safetensors"
    for file in set(index.values()):
        part = {n: t.bfloat16() for n, t in tensors.items() if index[n] == file}
        with open(folder / file, "wb") as out:
            write_safetensors(out, part, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    run(tmp_path, "export.py", "--model=whole", "--prune=0.5", "--export=hf", "--out_dir=half")
    kept, _ = read_safetensors(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}


def test_hf_export_merges_an_adapter(tok, tmp_path):
    net, base = saved(tmp_path / "base", tok, **QWEN3)
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    folder = tmp_path / "lora"
    folder.mkdir()
    config = dict(peft_type="LORA", r=2, lora_alpha=9, base_model_name_or_path="../base")
    config["alpha_pattern"] = {r"layers\.[1-3]\.self_attn\.q_proj": 6}  # a pattern, as PEFT has it
    write_json(folder / "adapter_config.json", config)
    with whole_file(folder / "adapter_model.safetensors") as file:
        tensors = {f"{name}A.weight": A, f"{name}B.weight": B}
        write_safetensors(file, tensors, {"format": "pt"})
    run(tmp_path, "export.py", "--model=lora", "--export=hf", "--out_dir=merged")
    merged, _ = read_safetensors(tmp_path / "merged" / "model.safetensors")
    for key, t in saved_tensors(net).items():
        added = 3 * B @ A if key == "model.layers.1.self_attn.q_proj.weight" else 0
        torch.testing.assert_close(merged[key], t + added)


# GGUF


def read_gguf(path):
    """({key: value}, {name: (type, shape, bytes)}) of a GGUF file, by its specification."""
    data, at = path.read_bytes(), 0

    def take(code):
        nonlocal at
        values = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return values[0]

    def text():
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind):
        if kind == 9:
            kind, count = take("I"), take("Q")
            return [value(kind) for _ in range(count)]
        return text() if kind == 8 else take("BbHhIif?"[kind])

    assert data[:4] == b"GGUF" and struct.unpack_from("<I", data, 4) == (3,)
    at = 8
    n_tensors, n_keys, places, tensors = take("Q"), take("Q"), {}, {}
    keys = {text(): value(take("I")) for _ in range(n_keys)}
    for _ in range(n_tensors):
        name = text()
        shape = [take("Q") for _ in range(take("I"))][::-1]
        places[name] = (shape, take("I"), take("Q"))
    begin = -(-at // 32) * 32
    for name, (shape, kind, offset) in places.items():
        assert offset % 32 == 0
        size = math.prod(shape) * {0: 4, 1: 2, 2: 18 / 32, 8: 34 / 32}[kind]
        tensors[name] = (kind, shape, data[begin + offset : begin + offset + int(size)])
    return keys, tensors


def naive_q8(values):
    """Blocks of 32 values: a float16 scale and the values over the scale, rounded away from 0."""
    out = b""
    for block in np.float32(values).reshape(-1, 32):
        d = np.abs(block).max() / np.float32(127)
        scaled = block * (np.float32(1) / d if d else np.float32(0))
        codes = [int(math.copysign(math.floor(abs(float(x)) + 0.5), x)) for x in scaled]
        out += np.float16(d).tobytes() + struct.pack("<32b", *codes)
    return out


def naive_q4(values):
    """Blocks of 32 values: a float16 step, by which the largest is -8, and codes from 0, two a
    byte: the first 16 in the low halves."""
    out = b""
    for block in np.float32(values).reshape(-1, 32):
        d = block[np.abs(block).argmax()] / np.float32(-8)
        scaled = block * (np.float32(1) / d if d else np.float32(0))
        codes = [min(15, int(x + np.float32(8.5))) for x in scaled]
        pairs = [low | high << 4 for low, high in zip(codes[:16], codes[16:])]
        out += np.float16(d).tobytes() + bytes(pairs)
    return out


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_gguf_holds_the_tensors_and_the_tokenizer(kind, tok, tmp_path):
    gguf = pytest.importorskip("gguf")
    net, _ = saved(tmp_path / "m", tok, **QWEN3 | dict(n_hidden=40))
    out = run(tmp_path, "export.py", "--model=m", "--export=gguf", f"--gguf_type={kind}").stdout
    path = tmp_path / "m-gguf" / f"m-{kind}.gguf"
    assert str(path.relative_to(tmp_path)) in out
    keys, tensors = read_gguf(path)
    assert keys["general.architecture"] == "qwen3" and keys["qwen3.attention.key_length"] == 8
    assert keys["tokenizer.ggml.pre"] == "qwen2" and "output.weight" not in tensors
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == net.config.vocab_size > tok.n_vocab
    assert [types[i] for i in (0, tok.eot_id, -1)] == [1, 3, 5]
    assert tokens[tok.eot_id] == "<|endoftext|>" and keys["tokenizer.ggml.merges"][1] == "ab c"
    assert keys["tokenizer.ggml.eos_token_id"] == tok.eos_ids[0]
    assert keys["tokenizer.chat_template"] == tok.config["chat_template"]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    ours = net.state_dict()
    for name, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q"),
        ("model.layers.0.self_attn.k_norm", "blk.0.attn_k_norm"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),  # 40 columns are no whole blocks
        ("model.layers.1.post_attention_layernorm", "blk.1.ffn_norm"),
    ):
        values, (code, shape, data) = ours[f"{name}.weight"].numpy(), tensors[f"{theirs}.weight"]
        assert shape == list(values.shape)
        if values.ndim == 1 or kind == "F32":
            assert code == 0 and data == values.tobytes()
        elif kind == "F16" or "down" in name:
            assert code == 1 and data == values.astype(np.float16).tobytes()
        elif kind == "Q4_0" and "embed" not in name:
            assert code == 2 and data == naive_q4(values)
        else:
            assert code == 8 and data == naive_q8(values)
    assert len(tensors) == len(saved_tensors(net))
    reader = gguf.GGUFReader(path)
    assert {t.name for t in reader.tensors} == tensors.keys()
    assert reader.get_field("tokenizer.ggml.tokens").contents() == tokens
    weight = next(t for t in reader.tensors if t.name == "token_embd.weight")
    table = ours["model.embed_tokens.weight"].numpy()
    table_kind = "Q8_0" if kind == "Q4_0" else kind  # which keeps the embedding at 8 bits
    expected = gguf.quants.quantize(table, gguf.GGMLQuantizationType[table_kind])
    assert np.array_equal(weight.data.view(np.uint8), expected.view(np.uint8))
    back = gguf.quants.dequantize(weight.data, weight.tensor_type)
    assert np.abs(back - table).max() <= {"F32": 0, "F16": 1e-3, "Q8_0": 0.01}[table_kind]


def test_q8_rounds_halves_away_from_zero():
    gguf = pytest.importorskip("gguf")
    block = torch.tensor([127.0, 0.5, -0.5, 1.5, -2.5, 0.49999997] + [0.0] * 26)
    codes = as_array(gguf, block[None], "Q8_0").tobytes()[2:]
    assert np.frombuffer(codes, np.int8)[:6].tolist() == [127, 1, -1, 2, -3, 0]
    assert as_array(gguf, torch.zeros(1, 32), "Q8_0").tobytes() == bytes(34)


def test_gguf_refuses_what_float16_cannot_hold():
    gguf = pytest.importorskip("gguf")
    with pytest.raises(UserError, match="a weight is beyond float16 .F16.: --gguf_type=F32"):
        as_array(gguf, torch.full((1, 32), 1e5), "F16")


def test_gguf_of_a_tokenizer_without_merges(tmp_path):
    """llama.cpp wants the list, be it empty."""
    pytest.importorskip("gguf")
    saved(tmp_path / "m", bpe_tokenizer([]), **QWEN3)
    run(tmp_path, "export.py", "--model=m", "--export=gguf")
    keys, _ = read_gguf(tmp_path / "m-gguf" / "m-F16.gguf")
    assert keys["tokenizer.ggml.merges"] == [] and len(keys["tokenizer.ggml.tokens"]) == 320


def test_gguf_says_what_to_install(tok, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        write_gguf(make_net(**QWEN3), tok, tmp_path / "m.gguf", "F16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_gguf_keeps_the_zeros_of_pruning(kind, tok, tmp_path):
    pytest.importorskip("gguf")
    saved(tmp_path / "m", tok, **QWEN3)
    run(tmp_path, "export.py", "--model=m", "--prune=2:4", "--export=gguf", f"--gguf_type={kind}")
    [path] = tmp_path.glob("m-2of4-gguf/*.gguf")
    _, tensors = read_gguf(path)
    _, shape, data = tensors["blk.1.ffn_down.weight"]
    if kind == "Q8_0":
        blocks = np.frombuffer(data, np.uint8).reshape(-1, 34)
        values = blocks[:, 2:].astype(np.int8).reshape(shape)
    else:
        values = np.frombuffer(data, np.float32 if kind == "F32" else np.float16).reshape(shape)
    assert ((values.reshape(-1, 4) == 0).sum(1) >= 2).all()


@pytest.mark.parametrize("name", SHAPES)
def test_gguf_of_every_architecture(name, tok, tmp_path):
    pytest.importorskip("gguf")
    shape = SHAPES[name] | (dict(head_dim=128) if name.startswith("qwen3") else {})
    # transformers' reader takes 1,024 positions for any GPT-2, and heads of 128 for any Qwen3.
    net, _ = saved(tmp_path / "m", tok, **shape, n_ctx=1024 if "gpt2" in name else 32)
    run(tmp_path, "export.py", "--model=m", "--export=gguf", "--gguf_type=F32")
    keys, tensors = read_gguf(tmp_path / "m-gguf" / "m-F32.gguf")
    c, ours = net.config, net.state_dict()
    kind = keys["general.architecture"]
    assert kind == family(c)
    assert ("output.weight" in tensors) is not c.tie
    values = lambda n: np.frombuffer(tensors[n][2], np.float32).reshape(tensors[n][1])
    q, k, v = (ours[f"model.layers.1.self_attn.{x}_proj.weight"].numpy() for x in "qkv")
    if kind == "gpt2":
        assert np.array_equal(values("blk.1.attn_qkv.weight"), np.concatenate((q, k, v)))
    elif kind == "llama":  # rows 2i and 2i + 1 of a head are what it rotates together
        theirs, d = values("blk.1.attn_k.weight"), c.head_dim
        for head in range(c.n_kv_head):
            for i in range(d // 2):
                rows = theirs[head * d + 2 * i], theirs[head * d + 2 * i + 1]
                assert np.array_equal(rows, (k[head * d + i], k[head * d + i + d // 2]))
    else:
        assert np.array_equal(values("blk.1.attn_q.weight"), q)
    if name == "llama3":  # 16 / 2 pi turns of the first pair lie between 1 and 4; the last's under
        keep = (16 / (2 * math.pi) - 1) / (4 - 1)
        first_and_last = [1 / (keep + (1 - keep) / 8), 8]
        assert values("rope_freqs.weight")[[0, -1]].tolist() == pytest.approx(first_and_last)
    elif name == "llama-linear":
        assert keys["llama.rope.scaling.factor"] == 4
    transformers = pytest.importorskip("transformers")
    if c.rope_scaling or not c.tie and kind == "gpt2":  # which its reader passes over
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m-gguf", gguf_file="m-F32.gguf", dtype=torch.float32
    )
    ids = random_ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, net(ids), atol=1e-4, rtol=1e-4)


# What cannot be had


@pytest.mark.parametrize(
    "shape, args, words",
    [
        (OURS["post-sinusoidal-relu2"], "--export=hf", "qwen3 wants norm_place='pre'"),
        (QWEN3 | dict(mlp="gelu"), "--export=gguf", "mlp='swiglu' (here 'gelu')"),
        (QWEN3, "--export=hf --quantize=int4", "cannot hold int4 weights: --export=barelm"),
        (QWEN3, "--export=onnx --quantize=int8", "int8 weights"),
        (QWEN3 | dict(n_encoder_layer=1), "--export=onnx", "an encoder-decoder"),
        (SHAPES["llama3"] | dict(qk_norm=True), "--export=gguf", "rope_scaling llama3"),
        (QWEN3, "--export=gguf --gguf_type=Q2_K", "expected F32, F16, Q8_0, Q6_K, Q5_K_M"),
        (QWEN3, "--export=pickle", "expected hf, barelm, gguf or onnx"),
        (QWEN3, "--export=hf --prune=1.5", "expected a share between 0 and 1"),
        (QWEN3 | dict(n_hidden=38), "--export=hf --prune=2:4", "38 columns"),
        (QWEN3, "--export=barelm --quantize=int3", "expected int8 or int4"),
        (QWEN3, "--report", "--report compares"),
        (QWEN3, "--export=hf --out_dir=m", "--overwrite"),
        (QWEN3, "--export=hf --out_dir=m/config.json", "--out_dir=m/config.json: File exists"),
        (QWEN3, "--prune=0.5", "nothing to do: --export=hf"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(shape, args, words, tok, tmp_path):
    if "rope_scaling" in words:  # what the package gguf has a key for
        pytest.importorskip("gguf")
    saved(tmp_path / "m", tok, **shape)
    failed = run(tmp_path, "export.py", "--model=m", *args.split(), check=False)
    assert failed.returncode == 1 and words in failed.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_gguf_refuses_tokenizers_that_llama_cpp_lacks(tmp_path):
    pytest.importorskip("gguf")
    saved(tmp_path / "m", char_tokenizer("abc \n"), **QWEN3)
    failed = run(tmp_path, "export.py", "--model=m", "--export=gguf", check=False)
    assert failed.returncode == 1 and "WordLevel tokenizer" in failed.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
