"""Matrix products in float8 (Micikevicius et al. 2022), on GPUs that have them: train.py --float8.

    y = x W^T          x and W in e4m3: 3 bits behind the point, up to 448
    dx = dy W          dy in e5m2: 2 bits, up to 57344, since gradients are of many sizes
    dW = dy^T x

Before it is rounded each tensor is divided by a scale of its own, so that its largest magnitude is
the format's largest; products add up in float32. Weights, gradients and the residual stream stay
as they are. Of a network the blocks' linear layers compute so in training, and nothing else: a
validation, a sample and what is saved are of the network as it will be used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from barelm.run import UserError, compute_dtype, in_full

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from model import GPT

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
UNIT = 16  # torch's product takes sizes in multiples of it


def why_not_float8(device: torch.device) -> str:
    """Why this device is not to multiply in float8, or ""."""
    if device.type != "cuda":
        return "a CPU has no products of float8 that would be faster"
    if torch.version.hip:
        return "AMD's GPUs have another float8 format"
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has no products of float8: GPUs from Ada and Hopper on have them"
    return ""


def use_float8(net: GPT) -> int:
    """Let the linear layers of a network's blocks multiply in float8 in training, where their sizes
    are multiples of UNIT: how many do."""
    net.ops.float8 = True
    n_layers = 0
    for block in net.blocks():
        for layer in block.modules():
            if type(layer) is nn.Linear and not any(size % UNIT for size in layer.weight.shape):
                layer.float8 = True
                n_layers += 1
    if n_layers == 0:
        raise UserError(f"--float8: no layer whose sizes are multiples of {UNIT}: widen n_embd")
    return n_layers


def can_float8(x: Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether these layers, which read the same x (…, in), multiply it in float8."""
    if not torch.is_grad_enabled() or (x.numel() // x.shape[-1]) % UNIT:
        return False
    return all(getattr(layer, "float8", False) for layer in layers)


def float8_product(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """The outputs of linear layers that read the same x (…, in), side by side (…, out)."""
    weights = [layer.weight for layer in layers]
    y = Float8Product.apply(x.flatten(0, -2), *weights)
    if layers[0].bias is not None:
        y = y + torch.cat([layer.bias for layer in layers]).to(y.dtype)
    return y.view(*x.shape[:-1], -1)


class Float8Product(torch.autograd.Function):
    """x W^T (N, out) for x (N, in) and the rows of W in one or several weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        x8, x_scale = narrowed(x, E4M3)
        w8, w_scale = narrowed(joined(weights), E4M3)
        # x is kept as it was rounded, a byte each; weights as they are, which others keep anyway.
        ctx.save_for_backward(x8, x_scale, *weights)
        ctx.dtypes = (x.dtype, weights[0].dtype)
        return scaled_product(x8, w8, x_scale, w_scale, compute_dtype(x), fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x8, x_scale, *weights = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        g8, g_scale = narrowed(grad, E5M2)  # (N, out)
        w8, w_scale = narrowed(joined(weights), E4M3)
        dx = scaled_product(g8, turned(w8), g_scale, w_scale, x_dtype)
        dw = scaled_product(turned(g8), turned(x8), g_scale, x_scale, w_dtype)
        return dx, *dw.split([len(weight) for weight in weights])


def joined(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat(weights) if len(weights) > 1 else weights[0]


def turned(x: Tensor) -> Tensor:
    """x^T, row after row: both factors of torch's product are read along what is summed over."""
    return x.t().contiguous()


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x over a scale, rounded to float8; the scale, 0-dim float32): the largest magnitude of x
    becomes the format's largest."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-30) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def scaled_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype,
                   fast: bool = False) -> Tensor:  # fmt: skip
    """a b^T (n, m) times both scales, for float8 a (n, k) and b (m, k). fast: sums in less than
    float32 on a GPU, which the outputs of a layer bear and gradients do not."""
    if a.device.type == "cpu":  # the same, for tests: torch's own takes seconds there
        with in_full(a):
            y = a.float() @ b.float().t() * (a_scale * b_scale)
        # A cast to its own dtype would cut a compiled function's gradients in torch 2.11.
        return y if dtype == y.dtype else y.to(dtype)
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
