"""Folders of GPTQ, AWQ and compressed-tensors: unpacked as the formats say it, weight by weight."""

import json
import re
import shutil

import pytest
import torch
from test_model import QWEN3, SHAPES, make_net

from barelm.bpe import bpe_tokenizer
from barelm.checkpoint import load, save
from barelm.files import write_json
from barelm.packed import Packing, unpacked
from barelm.run import UserError
from barelm.safetensors import INDEX, read_safetensors, write_safetensors

SIZES = dict(n_layer=1, n_embd=64, n_head=4, n_hidden=96)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight neighbours each four bits of a word hold


# The formats, bit by bit: Python's own whole numbers, one weight at a time


def as_words(numbers, bits):
    """Numbers one behind the other from the lowest bit on, as int32 words."""
    whole = sum(number << bits * i for i, number in enumerate(numbers))
    n = -(-len(numbers) * bits // 32)
    words = [(whole >> 32 * i) & 0xFFFFFFFF for i in range(n)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed_rows(matrix, bits):
    return torch.tensor([as_words(row, bits) for row in matrix.tolist()], dtype=torch.int32)


def awq_rows(matrix):
    eights = matrix.reshape(len(matrix), -1, 8)[:, :, AWQ_ORDER]
    return packed_rows(eights.flatten(1), 4)


def random_parts(n_out, n_in, bits, group, generator):
    """(codes (out, in), zeros (out, groups), scales (out, groups)) of a random matrix."""
    groups = -(-n_in // group)
    codes = torch.randint(1 << bits, (n_out, n_in), generator=generator)
    zeros = torch.randint(1 << bits, (n_out, groups), generator=generator)
    scales = torch.rand(n_out, groups, generator=generator).half() / 100 + 0.001
    return codes, zeros, scales


def naive_weights(codes, zeros, scales, group_of):
    out = torch.zeros(codes.shape)
    for o in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            g = group_of[i]
            out[o, i] = (codes[o, i].item() - zeros[o, g].item()) * scales[o, g].item()
    return out


KINDS = {
    "gptq": dict(quant_method="gptq", bits=4, group_size=16, desc_act=False, sym=False),
    "gptq-2": dict(quant_method="gptq", bits=2, group_size=16, checkpoint_format="gptq"),
    "gptq-3": dict(quant_method="gptq", bits=3, group_size=32, checkpoint_format="gptq_v2"),
    "gptq-8": dict(quant_method="gptq", bits=8, group_size=-1),
    "gptq-order": dict(quant_method="gptq", bits=4, group_size=8, desc_act=True),
    "awq": dict(quant_method="awq", bits=4, group_size=16, zero_point=True, version="gemm"),
    "awq-gemv": dict(quant_method="awq", bits=4, group_size=16, zero_point=True, version="gemv"),
    "compressed": dict(
        quant_method="compressed-tensors",
        format="pack-quantized",
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": dict(
                    num_bits=4, type="int", strategy="group", group_size=16, symmetric=False
                ),
            }
        },
    ),
}


def pack(name, weight, generator):
    """({end: tensor} of a matrix of this shape as a folder of KINDS[name] has it, its weights)."""
    q = KINDS[name]
    bits = q.get("bits", 4)
    n_out, n_in = weight.shape
    group = q.get("group_size", 16)
    group = n_in if group == -1 else group
    codes, zeros, scales = random_parts(n_out, n_in, bits, group, generator)
    group_of = [i // group for i in range(n_in)]
    if q.get("desc_act"):
        order = torch.randperm(n_in, generator=generator).tolist()
        group_of = [group_of[i] for i in order]
    if name == "awq":
        parts = {".qweight": awq_rows(codes.t()), ".qzeros": awq_rows(zeros.t())}
        parts[".scales"] = scales.t().contiguous()
    elif name == "awq-gemv":
        wide = torch.zeros(n_out, 8 * (-(-zeros.shape[1] // 8)), dtype=torch.long)
        steps = wide.half()
        wide[:, : zeros.shape[1]] = zeros
        steps[:, : zeros.shape[1]] = scales
        parts = {".qweight": packed_rows(codes, 4), ".qzeros": packed_rows(wide, 4)}
        parts[".scales"] = steps
    elif name == "compressed":
        parts = {".weight_packed": packed_rows(codes, 4), ".weight_scale": scales}
        parts[".weight_zero_point"] = packed_rows(zeros.t(), 4).t().contiguous()
        parts[".weight_shape"] = torch.tensor([n_out, n_in])
    else:
        stored = zeros
        if q.get("checkpoint_format") != "gptq_v2":
            stored = (zeros - 1) % (1 << bits)
        parts = {".qweight": packed_rows(codes, bits).t().contiguous()}
        parts[".qzeros"] = packed_rows(stored.t(), bits)
        parts[".scales"] = scales.t().contiguous()
        if name != "gptq-8":  # which very old files lack
            parts[".g_idx"] = torch.tensor(group_of, dtype=torch.int32)
    return parts, naive_weights(codes, zeros, scales, group_of)


def packed_folder(path, name, shape=QWEN3, files=1):
    """{name: the weights that were packed} of the folder at path: a random network's with its
    matrices packed as KINDS[name]."""
    tok = bpe_tokenizer([(b"a", b"b"), (b" ", b"x")])
    net = make_net(**shape | SIZES | dict(vocab_size=-(-tok.n_vocab // 64) * 64))
    save(path, net, tok)
    config = json.loads((path / "config.json").read_text())
    is_gpt2 = config["model_type"] == "gpt2"
    tensors, metadata = read_safetensors(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    matrices = {}
    out = {}
    for key, tensor in tensors.items():
        is_in_block = ".layers." in key or ".h." in key
        if not is_in_block or tensor.ndim != 2:
            out[key] = tensor
            continue
        weight = tensor.t() if is_gpt2 else tensor  # (out, in)
        parts, weights = pack(name, weight, generator)
        matrices[key] = weights.t() if is_gpt2 else weights
        out |= {key.removesuffix(".weight") + end: part for end, part in parts.items()}
    write_json(path / "config.json", config | {"quantization_config": KINDS[name]})
    (path / "model.safetensors").unlink()
    write_files(path, out, metadata, files)
    return matrices


def write_files(path, tensors, metadata, files):
    """One file of {name: tensor}; or several, the parts of a matrix in different ones."""
    if files == 1:
        with open(path / "model.safetensors", "wb") as file:
            write_safetensors(file, tensors, metadata)
        return
    names = sorted(tensors)
    where = {}
    for n in range(files):
        mine = {name: tensors[name] for name in names[n::files]}
        where |= dict.fromkeys(mine, f"model-{n}.safetensors")
        with open(path / f"model-{n}.safetensors", "wb") as file:
            write_safetensors(file, mine, metadata)
    write_json(path / INDEX, {"weight_map": where})


def same_weights(folder, plain, matrices):
    """The network of a packed folder, after it was compared with the one of the same folder whose
    matrices are those of {name: weights}."""
    shutil.copytree(folder, plain)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    write_json(plain / "config.json", config)
    tensors = {}
    for path in plain.glob("*.safetensors"):
        tensors |= read_safetensors(path)[0]
        path.unlink()
    ends = (".qweight", ".qzeros", ".scales", ".g_idx", "_packed", "_scale", "_point", "_shape")
    tensors = {key: t for key, t in tensors.items() if not key.endswith(ends)}
    tensors |= {key: t.contiguous() for key, t in matrices.items()}
    (plain / INDEX).unlink(missing_ok=True)
    write_files(plain, tensors, {}, 1)
    expected = load(plain)[0].state_dict()
    net, _ = load(folder)
    for key, t in net.state_dict().items():
        assert torch.equal(t, expected[key]), key
    return net


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a folder of `packed_folder`}, which are copied: to pack one takes half a second."""
    places = {}
    for name in ("gptq", "awq", "compressed"):
        places[name] = tmp_path_factory.mktemp("packed") / name
        packed_folder(places[name], name)
    return places


@pytest.mark.parametrize("name", KINDS)
def test_packed_folders_open_as_the_weights_that_were_packed(name, tmp_path):
    files = 3 if name == "gptq-order" else 1
    matrices = packed_folder(tmp_path / "packed", name, files=files)
    assert len(matrices) == 7
    same_weights(tmp_path / "packed", tmp_path / "plain", matrices)


def test_a_family_whose_matrices_stand_the_other_way(tmp_path):
    matrices = packed_folder(tmp_path / "packed", "gptq", SHAPES["gpt2"])
    assert len(matrices) == 4
    same_weights(tmp_path / "packed", tmp_path / "plain", matrices)


def test_the_order_of_inputs_may_stand_in_the_last_file_but_not_be_absent(tmp_path):
    packed_folder(tmp_path, "gptq-order")
    expected = load(tmp_path)[0].state_dict()
    tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    orders = {name: t for name, t in tensors.items() if name.endswith(".g_idx")}
    rest = {name: t for name, t in tensors.items() if name not in orders}
    where = {}
    for number, part in enumerate((rest, orders)):
        where |= dict.fromkeys(part, f"model-{number}.safetensors")
        with open(tmp_path / f"model-{number}.safetensors", "wb") as file:
            write_safetensors(file, part, metadata)
    write_json(tmp_path / INDEX, {"weight_map": where})
    net, _ = load(tmp_path)
    for key, t in net.state_dict().items():
        assert torch.equal(t, expected[key]), key
    write_json(tmp_path / INDEX, {"weight_map": dict.fromkeys(rest, "model-0.safetensors")})
    with pytest.raises(UserError, match="g_idx is missing, of a packed matrix"):
        load(tmp_path)


def test_the_packers_of_compressed_tensors(tmp_path):
    packers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(2)
    for bits in (4, 8):
        packing = Packing("compressed", bits, 16)
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (24, 32), generator=generator)
        zeros = torch.randint(-3, 3, (24, 2), generator=generator)
        steps = torch.rand(24, 2, generator=generator)
        parts = {
            ".weight_packed": packers.pack_to_int32(codes.to(torch.int8), bits),
            ".weight_zero_point": packers.pack_to_int32(zeros.to(torch.int8), bits, packed_dim=0),
            ".weight_scale": steps,
            ".weight_shape": torch.tensor([24, 32]),
        }
        wide_zeros = zeros.repeat_interleave(16, 1)
        expected = (codes - wide_zeros) * steps.repeat_interleave(16, 1)
        torch.testing.assert_close(unpacked(parts, packing, "x"), expected, rtol=0, atol=0)


def test_what_is_trained_and_saved_is_plain(folders, tmp_path):
    net, tok = load(folders["awq"])
    with torch.no_grad():
        net.model.norm.weight.add_(1)
    save(tmp_path / "saved", net, tok)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "qwen3"
    back, _ = load(tmp_path / "saved")
    for name, tensor in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    quantized, _ = load(folders["awq"], quantize="int8")
    assert quantized.quantize == "int8"


# What is not read is a line that names it


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes': gptq, awq"),
        ("gptq", {"quant_method": None}, "quant_method=None"),
        ("gptq", {"quant_method": ["gptq"]}, "quant_method="),
        ("gptq", {"bits": 5}, "bits=5: expected 2, 3, 4, 8"),
        ("gptq", {"bits": "4"}, "bits='4'"),
        ("gptq", {"bits": 8}, "qzeros"),
        ("gptq", {"group_size": 0}, "group_size=0"),
        ("gptq", {"group_size": 32}, "expected"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ("gptq", {"checkpoint_format": [1]}, "checkpoint_format="),
        ("gptq", {"is_marlin_format": True}, "marlin"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "several widths"),
        ("awq", {"version": "gemv_fast"}, "version='gemv_fast': gemm and gemv are read"),
        ("awq", {"version": 3}, "version=3"),
        ("awq", {"bits": 8}, "bits=8: expected 4"),
        ("awq", {"zero_point": False}, "zero_point=False"),
        ("awq", {"version": "gemv"}, "qzeros: [4, 8]: expected [64, 8]"),
        ("compressed", {"format": "marlin-24"}, "pack-quantized is read"),
        ("compressed", {"config_groups": {}}, "config_groups"),
        ("compressed", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ],
)
def test_other_packings_are_refused_by_name(name, change, words, folders, tmp_path):
    shutil.copytree(folders[name], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        load(tmp_path)
    assert len(str(refused.value).splitlines()) == 1


def without(end):
    return lambda tensors: tensors.pop(f"model.layers.0.mlp.up_proj{end}")


def with_tensor(end, tensor):
    return lambda tensors: tensors.update({f"model.layers.0.mlp.up_proj{end}": tensor})


@pytest.mark.parametrize(
    "change, words",
    [
        (without(".scales"), "up_proj.scales is missing"),
        (without(".qweight"), "up_proj.qweight is missing"),
        (with_tensor(".weight", torch.zeros(96, 64)), "packed, and plain too"),
        (with_tensor(".qweight", torch.zeros(8, 96)), "up_proj.qweight: torch.float32 [8, 96]"),
        (with_tensor(".qweight", torch.zeros(8, 0, dtype=torch.int32)), "[8, 0]"),
        (with_tensor(".qweight", torch.zeros(16, 96, dtype=torch.int32)), "up_proj"),
        (with_tensor(".scales", torch.zeros(4, 95)), "[4, 95]: expected [4, 96]"),
        (with_tensor(".scales", torch.full((4, 96), torch.nan)), "not finite"),
        (with_tensor(".g_idx", torch.full((64,), 4)), "g_idx has groups that are not 0 to 3"),
        (with_tensor(".g_idx", torch.zeros(64, 1)), "g_idx: torch.float32 [64, 1]"),
        (lambda tensors: tensors.clear(), "no packed matrix"),
    ],
)
def test_files_that_are_no_packed_matrices_are_a_line(change, words, folders, tmp_path):
    shutil.copytree(folders["gptq"], tmp_path, dirs_exist_ok=True)
    tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
    change(tensors)
    write_files(tmp_path, tensors, metadata, 1)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        load(tmp_path)
    assert len(str(refused.value).splitlines()) == 1
