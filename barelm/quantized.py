"""Linear layers whose weights take one byte or half of one: their codes, the weights that these
stand for, and their products with x.

`quantize_weights` makes a network's layers such; `fast.joined_product` multiplies with them. The
plain product is F.linear(x, dequantize(codes, scale)). `QuantizedProduct` has the faster ones, and
`way` says which of them is taken.
"""

from __future__ import annotations

import functools
import math
import platform
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

from barelm.int4 import GROUP as INT4_GROUP
from barelm.int4 import TILE, input_squares, int4_codes
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from model import GPT


def quantize_weights(net: GPT, kind: str, int4_group: int = INT4_GROUP) -> GPT:
    """Make the network's linear layers and experts int8 or int4, in place: the head too (a tied
    embedding then has the head's values), but not a classifier's, nor the routers. int4_group: so
    many weights of a row share their levels."""
    if kind not in ("int8", "int4"):
        raise UserError(f"--quantize={kind}: expected int8 or int4")
    if net.quantize not in (None, kind):
        raise UserError(f"--quantize={kind}: this model is {net.quantize} already")
    if net.quantize == kind:
        return net
    squares = {}
    if kind == "int4" and not net.model.embed_tokens.weight.is_meta:  # which has no numbers yet
        squares = input_squares(net)
    for name, layer in list(net.named_modules()):
        if hasattr(layer, "quantize_stacks"):  # experts
            layer.quantize_stacks(kind, int4_group)
        if not isinstance(layer, nn.Linear) or name.startswith("score"):
            continue
        if name == "lm_head" and net.score is not None:  # nothing reads it
            continue
        # The head (and embedding) of a small model is much of it, and int4 costs it most.
        width = "int8" if name == "lm_head" else kind
        net.set_submodule(name, QuantizedLinear(layer, width, squares.get(name), int4_group))
    net.quantize = kind
    net.int4_group = int4_group
    tie_embedding(net, net.model.embed_tokens.weight.dtype)
    return net


def tie_embedding(net: GPT, dtype: torch.dtype) -> None:
    """Make one of the embedding and the head, where the config ties them."""
    table = net.model.embed_tokens
    if net.config.tie and isinstance(net.lm_head, QuantizedLinear):
        weight = dequantize(net.lm_head.weight, net.lm_head.scale)[:, : net.config.n_embd]
        table.weight = nn.Parameter(weight.to(dtype))
    elif net.config.tie:
        net.lm_head.weight = table.weight


class QuantizedLinear(nn.Module):
    """A linear layer of 1 byte or half of one a weight, for inference. weight and scale are what
    `int8_codes` and `int4_codes` return. A weight of zero, which pruning makes, stays exactly zero.
    On its own it computes the plain product; `QuantizedProduct` has faster ones. importance and
    int4_group: as `int4_codes` takes them."""

    def __init__(self, layer: nn.Linear, kind: str, importance: Tensor | None = None,
                 int4_group: int = INT4_GROUP) -> None:  # fmt: skip
        super().__init__()
        self.shape = layer.weight.shape
        weight = layer.weight.detach().float()
        if kind == "int8":
            codes, scale = int8_codes(weight)
        else:
            codes, scale = int4_codes(weight, importance, int4_group)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize(self.weight, self.scale)[:, : x.shape[-1]]
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), weight, bias).to(x.dtype)


class QuantizedStack(nn.Module):
    """A stack of matrices (E, out, in), experts', as codes like QuantizedLinear's. Called with a
    dtype it gives what they stand for; so does each of the functions that `unbind` gives."""

    def __init__(self, stack: Tensor, kind: str, int4_group: int = INT4_GROUP) -> None:
        super().__init__()
        self.shape = stack.shape
        if kind == "int8":
            codes = [int8_codes(matrix) for matrix in stack.detach().float()]
        else:
            codes = [int4_codes(matrix, None, int4_group) for matrix in stack.detach().float()]
        self.register_buffer("weight", torch.stack([weight for weight, _ in codes]))
        self.register_buffer("scale", torch.stack([scale for _, scale in codes]))

    def matrix(self, e: int, dtype: torch.dtype) -> Tensor:
        return dequantize(self.weight[e], self.scale[e])[:, : self.shape[2]].to(dtype)

    def unbind(self) -> list[Callable]:
        return [functools.partial(self.matrix, e) for e in range(self.shape[0])]

    def forward(self, dtype: torch.dtype) -> Tensor:
        return torch.stack([matrix(dtype) for matrix in self.unbind()])


def int8_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (out, in) of w (out, in) and a scale a row (out,), its largest weight over 127."""
    scale = w.abs().amax(1).clamp(min=1e-30) / 127  # (out,); of a row of zeros no 0 / 0
    scale = scale.bfloat16()  # as the CPU's product takes it
    codes = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scale


def unpack_int4(codes: Tensor) -> Tensor:
    """The codes (out, in) uint8 of two a byte (out, in / 2)."""
    return torch.stack((codes & 15, codes >> 4), 2).flatten(1)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The weights (out, in) float32 that a QuantizedLinear's codes stand for."""
    if codes.dtype == torch.int8:
        return codes.float() * scale.float()[:, None]
    step, middle = scale.float().split(1, 2)
    levels = unpack_int4(codes).float() - 8
    return (levels.unflatten(1, (-1, group_of(codes, scale))) * step + middle).flatten(1)


def group_of(codes: Tensor, scale: Tensor) -> int:
    """How many weights of a row share a step and a middle, of int4's codes and scale."""
    return 2 * codes.shape[1] // scale.shape[1]


def quantized_product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times a quantized weight, plus bias, where no other layout of it is kept. A CPU's
    product for few rows takes bfloat16 and makes no copy of the weights."""
    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    whole = rows.shape[1] % 16 == 0  # other widths torch's product reads beyond their end
    if codes.dtype == torch.uint8:
        y = unpacked_product(rows, codes, scale)
    elif rows.device.type == "cpu" and whole and len(rows) <= 16:
        y = torch._weight_int8pack_mm(rows.bfloat16(), codes, scale).to(rows.dtype)
    else:
        y = unpacked_product(rows, codes, scale)
    return shaped(y, x, bias)


def unpacked_product(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """rows (N, in) times the whole weight in their dtype: (N, out)."""
    if codes.dtype == torch.int8:
        return F.linear(rows, codes.to(rows.dtype)) * scale.to(rows.dtype)
    rows = F.pad(rows, (0, -rows.shape[1] % TILE))
    return F.linear(rows, dequantize(codes, scale).to(rows.dtype))


def shaped(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """y (N, out) as the outputs of x (..., in), plus bias."""
    y = y.view(*x.shape[:-1], y.shape[1])  # not -1: of no rows torch could not tell it
    return y if bias is None else y + bias.to(y.dtype)


# --------------------------------------------------------------------------------------------------
# Which product is the fastest


ROUNDED_FROM = {  # rows from which on x is rounded too, by kind and by `largest_code`
    ("int8", 127): 6,  # fewer rows wait for memory, which a product of bytes reads no faster
    ("int8", 63): 20,  # without VNNI: the product of bytes is slow to begin
    ("int4", 127): 10,  # below, int4 reads half as much
    ("int4", 63): 20,
}


def way(kind: str, rows: int, device_type: str) -> str:
    """The product of so many rows with a weight of this kind, int8 or int4, on this machine:

    rounded    both are rotated and rounded to bytes, row by row; bytes times bytes (oneDNN)
    int4       x in bfloat16 times int4 (torch's kernels)
    compiled   x times the codes as they are read, one row at a time (on a GPU)
    plain      `quantized_product`

    By rows and by what the machine can do, never by a clock: the same each time."""
    if device_type == "cuda":
        if kind == "int4" and rows <= 64 and has_int4():
            return "int4"
        few = 0 < rows <= COMPILED_ROWS
        return "compiled" if kind == "int8" and few else "plain"
    if device_type != "cpu":
        return "plain"
    top = largest_code()
    if top and rows >= ROUNDED_FROM[kind, top]:
        return "rounded"
    return "int4" if kind == "int4" and rows <= 512 else "plain"


@functools.cache
def largest_code() -> int:
    """To what x may be rounded: 127 where this CPU multiplies bytes exactly (VNNI, AMX), 63 where
    it adds two products in 16 bits, which then overflow (AVX2's vpmaddubsw), 0 where oneDNN has no
    such product or a slow one (not x86)."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return 0
    codes = torch.full((32, 64), 127, dtype=torch.int8)
    scale = torch.ones(32)
    for top in (127, 63):
        x = torch.full((16, 64), top, dtype=torch.int8)
        try:
            y = byte_product(x, top + 1, pack_bytes(codes), scale)
        except (AttributeError, RuntimeError):  # a torch that lacks it
            return 0
        if (y == 64 * 127 * top).all():
            return top
    return 0


def has_int4() -> bool:
    """Whether the GPU has torch's int4 product: from compute capability 8.0 on."""
    return usable["int4"] and torch.cuda.get_device_capability() >= (8, 0)


usable = {"int4": True, "compiled": True}  # on a GPU, until one of them failed


def fall_back(name: str, error: Exception) -> None:
    """Say once that a way does not work here, and take the plain one from now on."""
    usable[name] = False
    message = str(error).strip() or type(error).__name__
    print(f"{name} product: off, weights are unpacked instead: {message.splitlines()[0]}")


# --------------------------------------------------------------------------------------------------
# The products


class QuantizedProduct:
    """A function of x (..., in), without gradients: x times quantized weights, (..., out) in x's
    dtype. codes, scale: as `int8_codes` or `int4_codes` return them; bias (out,) or None. Each way
    keeps the weights in a layout of its own, a copy that is made when it is first taken; they must
    not change meanwhile."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.codes = codes
        self.scale = scale
        self.bias = bias
        self.kind = "int8" if codes.dtype == torch.int8 else "int4"

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        chosen = way(self.kind, len(rows), x.device.type)
        if chosen == "rounded":
            return shaped(self.rounded(rows), x, self.bias)
        if chosen == "int4" and self.int4 is not None:
            return shaped(self.by_int4(rows), x, self.bias)
        if chosen == "compiled":
            return shaped(few_rows(rows, self.codes, self.scale), x, self.bias)
        return quantized_product(x, self.codes, self.scale, self.bias)

    @functools.cached_property
    def bytes(self) -> tuple[Tensor, Tensor]:
        """(weights, rotated, packed for oneDNN, scale (out,) float32)."""
        codes, scale = int8_codes(rotate(dequantize(self.codes, self.scale)))
        return pack_bytes(codes), scale.float()

    def rounded(self, rows: Tensor) -> Tensor:
        """(N, out) of rows (N, in), each rotated and rounded to `largest_code` levels on either
        side of zero, by its own largest value: it does not depend on the other rows."""
        weight, scale = self.bytes
        top = largest_code()
        x = rotate(rows.float())
        step = x.abs().amax(1, keepdim=True).clamp_(min=1e-30).div_(top)  # (N, 1)
        codes = x.div_(step).round_().to(torch.int8)
        return byte_product(codes, top + 1, weight, scale).mul_(step).to(rows.dtype)

    @functools.cached_property
    def int4(self) -> tuple[Tensor, Tensor] | None:
        """(codes, scale) of int4 in the layout of torch's product, or None where it has none."""
        pack = packed_int4 if self.codes.device.type == "cpu" else packed_int4_cuda
        return pack(self.codes, self.scale)

    def by_int4(self, rows: Tensor) -> Tensor:
        """(N, out) of rows (N, in), in bfloat16 times int4."""
        codes, scale = self.int4
        multiply = torch.ops.aten._weight_int4pack_mm
        if rows.device.type == "cpu":
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        x = F.pad(rows, (0, -rows.shape[1] % TILE)).bfloat16()
        return multiply(x, codes, group_of(self.codes, self.scale), scale).to(rows.dtype)


GROUP = 64  # numbers that are rotated together


def rotate(x: Tensor) -> Tensor:
    """x (N, in) float32, padded with zeros to whole groups, each of which is multiplied by
    `rotation`. Rotated both, x and weights have the same product as before. But a network has
    channels a hundred times as large as the others, beside which all else would be rounded away:
    rotated, each is spread over its group (Ashkboos et al. 2024, QuaRot)."""
    x = F.pad(x, (0, -x.shape[1] % GROUP))
    return (x.reshape(-1, GROUP) @ rotation()).view(x.shape)  # as one product


@functools.cache
def rotation() -> Tensor:
    """An orthogonal matrix (GROUP, GROUP): Hadamard's of 1 and -1, over its rows' length, with
    signs drawn for its rows, so that numbers of one sign do not add up in one place."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        signs = torch.randint(2, (GROUP, 1), generator=generator) * 2 - 1
        H = torch.ones(1, 1)
        while len(H) < GROUP:
            H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
        return signs * H / math.sqrt(GROUP)


def pack_bytes(codes: Tensor) -> Tensor:
    """int8 codes (out, in) in the layout that oneDNN likes best."""
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)


def byte_product(x: Tensor, zero: int, weight: Tensor, scale: Tensor) -> Tensor:
    """x (N, in) int8 times `pack_bytes`'s weight, times scale (out,): (N, out) float32; the sums
    are exact. oneDNN is given x + zero, which is above 0, as uint8: CPUs multiply unsigned bytes by
    signed ones."""
    shifted = x.view(torch.uint8) + zero  # modulo 256: that is x + zero
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, zero, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def packed_int4(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """(codes, scale) of int4 in the layout of torch's product on a CPU, which takes a multiple of
    16 rows; else None."""
    if len(codes) % 16:
        return None
    unpacked = unpack_int4(codes).int()
    inner_tiles = 2  # which the CPU's product ignores
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, inner_tiles)
    return packed, scale.transpose(0, 1).contiguous()


def packed_int4_cuda(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same for torch's product on a GPU ("tinygemm"), which takes a multiple of 8 rows."""
    if len(codes) % 8:
        return None
    swapped = codes << 4 | codes >> 4  # there the first of a pair is in the high half
    inner_tiles = 4  # of 16: a TILE of a row together
    by_group = scale.transpose(0, 1)  # (in / group, out, 2)
    by_group = by_group.clone(memory_format=torch.contiguous_format)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(swapped, inner_tiles)
        x = torch.zeros(1, 2 * codes.shape[1], dtype=torch.bfloat16, device=codes.device)
        torch.ops.aten._weight_int4pack_mm(x, packed, group_of(codes, scale), by_group)
    except RuntimeError as error:  # a GPU or a torch without it
        fall_back("int4", error)
        return None
    return packed, by_group


# --------------------------------------------------------------------------------------------------
# int8 on a GPU


COMPILED_ROWS = 8  # of x, each of which costs as many sums as there are weights


def few_rows(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """(N, out) of a few rows (N, in) times int8 codes, compiled to a kernel that reads the codes
    once, and writes no weights."""
    if not usable["compiled"]:
        return unpacked_product(rows, codes, scale)
    n_rows = len(rows)
    size = 1 << (n_rows - 1).bit_length()  # 1, 2, 4 or 8: a kernel each
    padded = F.pad(rows, (0, 0, 0, size - n_rows))
    try:
        return compiled_sums()(padded, codes, scale).narrow(0, 0, n_rows)
    except Exception as error:  # no compiler, or one that fails
        fall_back("compiled", error)
        return unpacked_product(rows, codes, scale)


@functools.cache
def compiled_sums() -> Callable:
    """`sums`, compiled for whatever shapes."""
    return torch.compile(sums, dynamic=True)


def sums(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """rows (N, in) times codes (out, in), each row a sum of its own, in float32: (N, out)."""
    weight = codes.float()
    outputs = [(weight * row.float()).sum(1) for row in rows.unbind()]
    return (torch.stack(outputs) * scale.float()).to(rows.dtype)
