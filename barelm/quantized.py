"""Linear layers whose weights take one byte or half of one: their codes, the weights that these
stand for, and their products with x.

`quantize_weights` makes a network's layers such; `fast.joined_product` multiplies with them.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from barelm.run import UserError


def quantize_weights(net, kind):
    """Make the network's linear layers int8 or int4, in place: the head too (a tied embedding then
    has the head's values), but not a classifier's."""
    if kind not in ("int8", "int4"):
        raise UserError(f"--quantize={kind}: expected int8 or int4")
    if net.quantize not in (None, kind):
        raise UserError(f"--quantize={kind}: this model is {net.quantize} already")
    for name, layer in list(net.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is net.score:
            continue
        if name == "lm_head" and net.score is not None:  # nothing reads it
            continue
        # The head (and embedding) of a small model is much of it, and int4 costs it most.
        width = "int8" if name == "lm_head" else kind
        net.set_submodule(name, QuantizedLinear(layer, width))
    net.quantize = kind
    tie_embedding(net, net.model.embed_tokens.weight.dtype)
    return net


def tie_embedding(net, dtype):
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
    On its own it computes the plain product; `joined_product` has faster ones."""

    def __init__(self, layer, kind):
        super().__init__()
        self.shape = layer.weight.shape
        make_codes = int8_codes if kind == "int8" else int4_codes
        codes, scale = make_codes(layer.weight.detach().float())
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x):
        weight = dequantize(self.weight, self.scale)[:, : x.shape[-1]]
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), weight, bias).to(x.dtype)


def int8_codes(w):
    """int8 codes (out, in) of w (out, in) and a scale a row (out,), its largest weight over 127."""
    scale = w.abs().amax(1).clamp(min=1e-30) / 127  # (out,); of a row of zeros no 0 / 0
    scale = scale.bfloat16()  # as the CPU's product takes it
    codes = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scale


def int4_codes(w):
    """Codes of w (out, in), two a byte (out, in / 2) uint8, and for each group of 64 in a row a
    step and a middle (out, in / 64, 2), by which the group's minimum and maximum are kept: a weight
    is (code - 8) step + middle. Rows are padded to whole groups."""
    padding = (0, -w.shape[1] % 64)
    groups = F.pad(w, padding).unflatten(1, (-1, 64))  # (out, in / 64, 64)
    has_zero = F.pad(w == 0, padding).unflatten(1, (-1, 64)).any(2)  # (out, in / 64)
    low = groups.amin(2)
    high = groups.amax(2)
    step = ((high - low) / 15).clamp(min=1e-30)
    step = step.bfloat16().where(~has_zero, few_bits(step))
    middle = low + 8 * step.float()
    # Where a weight is zero, so is a level: the middle is a whole number of steps.
    whole = (middle / step.float()).round().clamp(-7, 8) * step.float()
    middle = middle.where(~has_zero, whole).bfloat16()
    codes = (groups - middle.float()[..., None]) / step.float()[..., None] + 8
    codes = codes.round().clamp(0, 15).to(torch.uint8).flatten(1)  # (out, in)
    pairs = codes[:, ::2] | codes[:, 1::2] << 4
    return pairs, torch.stack((step, middle), 2)


def few_bits(step):
    """Positive steps as bfloat16, rounded up to 5 bits: the product of one and a whole number below
    8 has no more than bfloat16's 8 bits, so that it is exact."""
    fraction, exponent = torch.frexp(step)  # from 1/2 to 1
    return torch.ldexp((fraction * 32).ceil() / 32, exponent).bfloat16()


def unpack_int4(codes):
    """The codes (out, in) uint8 of two a byte (out, in / 2)."""
    return torch.stack((codes & 15, codes >> 4), 2).flatten(1)


def dequantize(codes, scale):
    """The weights (out, in) float32 that a QuantizedLinear's codes stand for."""
    if codes.dtype == torch.int8:
        return codes.float() * scale.float()[:, None]
    step, middle = scale.float().split(1, 2)
    return ((unpack_int4(codes).float() - 8).unflatten(1, (-1, 64)) * step + middle).flatten(1)


def quantized_product(x, codes, scale, bias, packed=None):
    """x (..., in) times a quantized weight, plus bias. packed: int4's codes and scale in the layout
    of torch's product on a CPU. It and int8's take bfloat16 and make no copy of the weights, which
    pays for a few rows (measured at 4096 x 768)."""
    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    if codes.dtype == torch.int8:
        y = int8_product(rows, codes, scale)
    else:
        y = int4_product(rows, codes, scale, packed)
    y = y.view(*x.shape[:-1], len(codes))  # not -1: of no rows torch could not tell it
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y


def int8_product(rows, codes, scale):
    whole = rows.shape[1] % 16 == 0  # other widths torch's product reads beyond their end
    if rows.device.type == "cpu" and whole and len(rows) <= 16:
        return torch._weight_int8pack_mm(rows.bfloat16(), codes, scale).to(rows.dtype)
    return F.linear(rows, codes.to(rows.dtype)) * scale.to(rows.dtype)


def int4_product(rows, codes, scale, packed):
    rows = F.pad(rows, (0, -rows.shape[1] % 64))
    if rows.device.type == "cpu" and packed and len(rows) <= 512:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(rows.bfloat16(), packed[0], 64, packed[1]).to(rows.dtype)
    return F.linear(rows, dequantize(codes, scale).to(rows.dtype))


def packed_int4(codes, scale):
    """(codes, scale) of int4 in the layout of torch's product on a CPU, which takes a multiple of
    16 rows; None of others and of int8."""
    if codes.dtype != torch.uint8 or len(codes) % 16:
        return None
    unpacked = unpack_int4(codes).int()
    inner_tiles = 2  # which the CPU's product ignores
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, inner_tiles)
    return packed, scale.transpose(0, 1).contiguous()
