"""RMSNorm, rotation and SwiGLU with gradients by hand, for float32 on a CPU: what autograd makes of
their formulas passes over memory twice as often, and a CPU waits for its memory.

model.py's `Operations` asks `can_fuse`; tests/test_elementwise.py compares with the formulas. The
forward passes are theirs, bit for bit, so that training and generation agree. No
tensor that is saved for backward is written to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def can_fuse(x: Tensor) -> bool:
    """Whether the functions below are the faster ones for x: float32 on a CPU, to be learned from,
    and not within torch.compile, which fuses the formulas by itself."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.requires_grad:
        return False
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class FusedRMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight: of x (..., D), weight (D,), or x (..., H, D), weight
    (H, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        D = x.shape[-1]
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = square.div_(D).add_(ctx.eps).rsqrt_()  # (..., 1)
        # Of y_i = x_i r w_i, where dr / dx_j = -r^3 x_j / D.
        product = dy * x
        dot = (product * weight).sum(-1, keepdim=True)  # (..., 1)
        dweight = product.mul_(r).flatten(0, -1 - weight.ndim).sum(0)
        dx = (dy * weight).mul_(r).addcmul_(x, dot.mul_(r**3).div_(-D))
        return dx, dweight, None


class FusedRotation(torch.autograd.Function):
    """model.rotate: its gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        a, b = x.chunk(2, -1)  # (B, T, H, D / 2) each
        return x * cos + torch.cat((b, a), -1) * sin

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # sin: -sin for the first half, sin for the second
        minus_sin, plus_sin = sin.chunk(2, -1)
        a, b = dy.chunk(2, -1)  # (B, T, H, D / 2) each
        dx = dy * cos
        c, d = dx.chunk(2, -1)  # each half is written where it belongs
        c.addcmul_(b, plus_sin)
        d.addcmul_(a, minus_sin)
        return dx, None, None


class FusedSwiGLU(torch.autograd.Function):
    """silu(gate) * up (..., n_hidden) of both side by side (..., 2 n_hidden)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d = torch.empty_like(gate_up)
        dgate, dup = d.chunk(2, -1)
        torch.mul(dh, active, out=dup)
        torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=dgate)
        return d
