"""Folders whose matrices are packed, several weights a number (GPTQ, AWQ, compressed-tensors): they
are unpacked to plain weights when they are loaded.

Of a linear layer X with weights (out, in), in groups of neighbours along `in`, the files hold codes
of a few bits, and for each group g and each output a step and a zero: a weight is
(code - zero) step. What is where:

    GPTQ                X.qweight (in bits / 32, out) int32, X.qzeros (groups, out bits / 32) int32,
                        X.scales (groups, out), X.g_idx (in,): the group of each input
    AWQ, gemm           X.qweight (in, out / 8), X.qzeros (groups, out / 8), X.scales (groups, out)
    AWQ, gemv           X.qweight (out, in / 8), X.qzeros (out, n), X.scales (out, 8 n)
    compressed-tensors  X.weight_packed (out, in bits / 32), X.weight_scale (out, groups),
                        X.weight_zero_point (out bits / 32, groups), X.weight_shape (2,)

Frantar et al. 2022 (GPTQ), Lin et al. 2023 (AWQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from barelm.run import UserError
from barelm.safetensors import check_finite

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How the matrices of a folder are packed, by its config.json."""

    layout: str  # gptq, awq, awq_gemv or compressed
    bits: int
    group_size: int  # inputs that share a step; 0: all of them
    zero_shift: int = 0  # a zero is what is stored plus this
    has_zeros: bool = True  # false: all are the middle of the codes' range, and may be absent
    has_order: bool = False  # groups are no neighbours: the files say the group of each input
    transposed: bool = False  # the family's matrices are (in, out)

    @property
    def parts(self) -> dict[str, bool]:
        """{the end of a tensor's name: whether each packed matrix has it}."""
        if self.layout == "compressed":
            ends = {".weight_packed": True, ".weight_scale": True, ".weight_shape": True}
            return ends | {
                ".weight_zero_point": self.has_zeros,
                ".weight_g_idx": self.has_order,
            }
        return {".qweight": True, ".qzeros": True, ".scales": True, ".g_idx": self.has_order}


# --------------------------------------------------------------------------------------------------
# What config.json says


def packing_of(d: dict, path: Path | str) -> Packing | None:
    """The Packing of a config.json's dict; None of plain weights. What is packed in another way is
    a UserError."""
    q = d.get("quantization_config")
    if q is None or q is False:
        return None
    if not isinstance(q, dict):
        raise UserError(f"{path}: quantization_config={q!r:.60}: expected an object")
    method = q.get("quant_method")
    if method == "gptq":
        return gptq_packing(q, path)
    if method == "awq":
        return awq_packing(q, path)
    if method == "compressed-tensors":
        return compressed_packing(q, path)
    raise refused(path, "quant_method", method, "gptq, awq and compressed-tensors are read")


def refused(path: Path | str, key: str, value: object, why: str) -> UserError:
    """What is raised for a key of quantization_config."""
    advice = ""
    if key in ("quant_method", "format", "version", "checkpoint_format"):
        advice = " (elsewhere: open it in transformers, dequantize(), and save it)"
    return UserError(f"{path}: quantization_config: {key}={value!r:.60}: {why}{advice}")


def number_of_bits(q: dict, key: str, allowed: tuple[int, ...], path: Path | str) -> int:
    bits = q.get(key)
    if type(bits) is not int or bits not in allowed:
        names = ", ".join(map(str, allowed))
        raise refused(path, key, bits, f"expected {names}")
    return bits


def size_of_group(q: dict, key: str, path: Path | str) -> int:
    """A Packing's group_size."""
    size = q.get(key, -1)
    if type(size) is not int or (size != -1 and not 0 < size < 1 << 20):
        raise refused(path, key, size, "expected the number of a group's inputs, or -1 for all")
    return max(size, 0)


def gptq_packing(q: dict, path: Path | str) -> Packing:
    """The Packing of GPTQ's settings. The first format stores each zero less one; gptq_v2 stores it
    as it is."""
    form = q.get("checkpoint_format") or q.get("format") or "gptq"
    if q.get("is_marlin_format") or form not in ("gptq", "gptq_v2"):
        form = "marlin" if q.get("is_marlin_format") else form
        raise refused(path, "checkpoint_format", form, "gptq and gptq_v2 are read")
    if q.get("dynamic"):
        raise refused(path, "dynamic", q["dynamic"], "layers of several widths are not read")
    if q.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise refused(path, "pack_dtype", q["pack_dtype"], "expected int32")
    bits = number_of_bits(q, "bits", (2, 3, 4, 8), path)
    shift = 1 if form == "gptq" else 0
    size = size_of_group(q, "group_size", path)
    has_order = size > 0 and bool(q.get("desc_act"))
    return Packing("gptq", bits, size, shift, has_order=has_order)


def awq_packing(q: dict, path: Path | str) -> Packing:
    """The same of AWQ's."""
    version = q.get("version") or q.get("format") or "gemm"
    layouts = {"gemm": "awq", "gemv": "awq_gemv"}
    name = str(version).lower()
    if name not in layouts:
        raise refused(path, "version", version, "gemm and gemv are read")
    if q.get("zero_point", True) is not True:
        raise refused(path, "zero_point", q["zero_point"], "gemm and gemv have zeros")
    bits = number_of_bits(q, "w_bit" if "w_bit" in q else "bits", (4,), path)
    key = "q_group_size" if "q_group_size" in q else "group_size"
    return Packing(layouts[name], bits, size_of_group(q, key, path))


def compressed_packing(q: dict, path: Path | str) -> Packing:
    """The same of compressed-tensors', whose codes have a sign and are stored plus half a range."""
    if q.get("format") != "pack-quantized":
        raise refused(path, "format", q.get("format"), "pack-quantized is read")
    groups = q.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    weights = schemes[0].get("weights") if schemes and isinstance(schemes[0], dict) else None
    if len(schemes) != 1 or not isinstance(weights, dict):
        raise refused(path, "config_groups", groups, "expected one group, with weights")
    if schemes[0].get("input_activations") is not None:
        why = "what is rounded while it computes is not supported"
        raise refused(path, "input_activations", schemes[0]["input_activations"], why)
    if q.get("kv_cache_scheme") is not None:
        why = "a cache that is rounded is not supported"
        raise refused(path, "kv_cache_scheme", q["kv_cache_scheme"], why)
    if q.get("transform_config"):
        raise refused(path, "transform_config", q["transform_config"], "rotations are not read")
    if weights.get("type", "int") != "int":
        raise refused(path, "type", weights["type"], "expected int")
    if weights.get("strategy") not in ("group", "channel"):
        raise refused(path, "strategy", weights.get("strategy"), "expected group or channel")
    bits = number_of_bits(weights, "num_bits", (4, 8), path)
    size = 0
    if weights["strategy"] == "group":
        size = size_of_group(weights, "group_size", path)
    has_zeros = weights.get("symmetric", True) is False
    has_order = size > 0 and weights.get("actorder") in (True, "group", "dynamic")
    return Packing("compressed", bits, size, has_zeros=has_zeros, has_order=has_order)


# --------------------------------------------------------------------------------------------------
# Which matrices the files hold


def matrices(names: dict, packing: Packing) -> dict[str, dict[str, str]]:
    """{layer: {end: name}} of the tensors that belong to packed matrices, as `Packing.parts` has
    the ends."""
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        for end in packing.parts:
            if name.endswith(end):
                layers.setdefault(name.removesuffix(end), {})[end] = name
    return layers


def unpacked_entries(entries: dict, packing: Packing, folder: Path) -> dict:
    """{name: (dtype, shape)} of a folder's tensors with each packed matrix as the weights (out, in)
    that it stands for. What is missing, or has another shape than the rest, is a UserError."""
    layers = matrices(entries, packing)
    if not layers:
        why = "quantization_config, but no packed matrix in its files"
        raise UserError(f"{folder}/config.json: {why}")
    out = dict(entries)
    for layer, names in layers.items():
        for end, needed in packing.parts.items():
            if needed and end not in names:
                raise UserError(f"{folder}: {layer}{end} is missing, of a packed matrix")
        parts = {end: out.pop(name) for end, name in names.items()}
        name = f"{layer}.weight"
        if name in out:
            raise UserError(f"{folder}: {name} is there packed, and plain too")
        shape = shape_of(parts, packing, f"{folder}: {layer}")
        out[name] = (torch.float32, shape[::-1] if packing.transposed else shape)
    return out


def shape_of(parts: dict, packing: Packing, where: str) -> list[int]:
    """[out, in] of the parts of a packed matrix, {end: (dtype, shape)}, after they were checked."""
    floats = (".scales", ".weight_scale")
    for end, (dtype, shape) in parts.items():
        flat = end in (".g_idx", ".weight_g_idx", ".weight_shape")
        good = dtype.is_floating_point if end in floats else dtype == torch.int32
        if flat:
            good = dtype in (torch.int32, torch.int64)
        if not good or len(shape) != (1 if flat else 2) or 0 in shape:
            raise UserError(f"{where}{end}: {dtype} {shape}: not of a packed matrix")
    shapes = {end: shape for end, (_, shape) in parts.items()}
    n_out, n_in, expected = expected_shapes(shapes, packing, where)
    for end, shape in expected.items():
        if end in shapes and shapes[end] != shape:
            why = f"expected {shape} beside the codes"
            raise UserError(f"{where}{end}: {shapes[end]}: {why} ({packing.bits} bits)")
    return [n_out, n_in]


def expected_shapes(shapes: dict, packing: Packing, where: str) -> tuple[int, int, dict]:
    """(out, in, {end: the shape that it has to have}) by the shape of the codes."""
    rows, columns = shapes[".weight_packed" if packing.layout == "compressed" else ".qweight"]
    if packing.layout == "gptq":
        n_in = weights_in(rows, packing, where)
        n_out = columns
    elif packing.layout == "awq":
        n_in = rows
        n_out = columns * 8
    else:
        n_in = weights_in(columns, packing, where)
        n_out = rows
    size = packing.group_size or n_in
    groups = -(-n_in // size)
    zeros = -(-n_out * packing.bits // 32)  # words
    if packing.layout == "awq_gemv":
        words = shapes[".qzeros"][1]
        if words * 8 < groups:
            raise UserError(f"{where}.qzeros: {words} words for {groups} groups")
        return n_out, n_in, {".qzeros": [n_out, words], ".scales": [n_out, words * 8]}
    if packing.layout == "compressed":
        expected = {".weight_scale": [n_out, groups], ".weight_zero_point": [zeros, groups]}
        return n_out, n_in, expected | {".weight_shape": [2], ".weight_g_idx": [n_in]}
    expected = {".qzeros": [groups, zeros], ".scales": [groups, n_out], ".g_idx": [n_in]}
    return n_out, n_in, expected


def weights_in(words: int, packing: Packing, where: str) -> int:
    """How many weights so many words hold."""
    if words * 32 % packing.bits:
        raise UserError(f"{where}: {words} words are no whole number of {packing.bits}-bit weights")
    return words * 32 // packing.bits


# --------------------------------------------------------------------------------------------------
# The weights


def unpack_complete(
    tensors: dict, layers: dict, packing: Packing, folder: Path, dtype: torch.dtype
) -> None:
    """Replace in {name: tensor}, which is changed, each packed matrix that is complete by its
    weights in dtype, one after another: parts may stand in the next file. layers: the `matrices`
    of all files of the folder."""
    for layer, names in layers.items():
        if not tensors.keys() >= set(names.values()):
            continue
        parts = {end: tensors.pop(name) for end, name in names.items()}
        name = f"{layer}.weight"
        weight = unpacked(parts, packing, f"{folder}: {layer}")
        check_finite(folder, {name: weight}, dtype)
        weight = weight.to(dtype)
        tensors[name] = weight.t().contiguous() if packing.transposed else weight


def unpacked(parts: dict[str, Tensor], packing: Packing, where: str) -> Tensor:
    """The weights (out, in) float32 of the parts of a packed matrix, {end: tensor}."""
    if packing.layout == "compressed":
        return unpacked_compressed(parts, packing, where)
    qweight = parts[".qweight"]
    bits = packing.bits
    scales = parts[".scales"].float()
    if packing.layout == "awq_gemv":
        codes = numbers(qweight, bits)  # (out, in)
        zeros = numbers(parts[".qzeros"], bits)  # (out, 8 n), of which the first are groups
    elif packing.layout == "awq":
        codes = interleaved(qweight).t()  # (out, in)
        zeros = interleaved(parts[".qzeros"]).t()  # (out, groups)
        scales = scales.t()
    else:
        codes = numbers(qweight.t(), bits)
        # The first versions kept -1 in these bits for a zero of 0, which therefore comes round.
        zeros = numbers(parts[".qzeros"], bits)[:, : scales.shape[1]].t()
        zeros = zeros + packing.zero_shift & (1 << bits) - 1
        scales = scales.t()
    group = group_of_inputs(codes.shape[1], parts.get(".g_idx"), packing, scales.shape[1], where)
    return (codes - zeros[:, group]) * scales[:, group]


def unpacked_compressed(parts: dict[str, Tensor], packing: Packing, where: str) -> Tensor:
    """`unpacked` of compressed-tensors' parts."""
    half = 1 << packing.bits - 1
    codes = numbers(parts[".weight_packed"], packing.bits) - half  # (out, in)
    shape = parts[".weight_shape"].tolist()
    if shape != list(codes.shape):
        why = f"expected {list(codes.shape)} by the codes"
        raise UserError(f"{where}.weight_shape: {shape}: {why}")
    scales = parts[".weight_scale"].float()  # (out, groups)
    given = parts.get(".weight_g_idx")
    group = group_of_inputs(codes.shape[1], given, packing, scales.shape[1], where)
    if ".weight_zero_point" in parts:
        zeros = numbers(parts[".weight_zero_point"].t(), packing.bits).t()  # (out, groups)
        codes = codes - (zeros[: len(codes)] - half)[:, group]
    return codes * scales[:, group]


def group_of_inputs(n_in: int, given: Tensor | None, packing: Packing, groups: int,
                    where: str) -> Tensor:  # fmt: skip
    """The group (in,) of each input: as given (desc_act, where the inputs were quantized in another
    order), or else neighbours."""
    if given is None:
        return torch.arange(n_in) // (packing.group_size or n_in)
    if given.min() < 0 or given.max() >= groups:
        raise UserError(f"{where}: g_idx has groups that are not 0 to {groups - 1}")
    return given.long()


def numbers(words: Tensor, bits: int) -> Tensor:
    """The numbers (n, words 32 / bits) int32 that words (n, words) int32 hold: one behind the other
    from the lowest bit on; of 3 bits, some begin in one word and end in the next."""
    n = words.shape[1] * 32 // bits
    begin = torch.arange(n) * bits
    word = begin // 32
    shift = (begin % 32).int()
    left = (32 - shift).clamp(max=bits)  # bits that stand in this word
    out = words[:, word] >> shift & (1 << left) - 1  # the mask takes away the shifted sign
    over = left < bits  # the rest stands in the next word
    if over.any():
        out[:, over] |= words[:, word[over] + 1] << left[over]
    return out & (1 << bits) - 1


def interleaved(words: Tensor) -> Tensor:
    """The numbers (n, 8 words) int32 of AWQ's words (n, words), whose lowest bits hold the first of
    eight, then the third: 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = numbers(words, 4).unflatten(1, (-1, 8))
    # Where each of the eight stands in its word.
    places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    return codes[:, :, places].flatten(1)
