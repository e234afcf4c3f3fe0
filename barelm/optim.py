"""Optimizers, and what a run costs in FLOPs and memory."""

import math
import os
import re
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from barelm.fast import head_rows
from barelm.run import UserError


def orthogonalize(g, dtype=torch.float32, steps=5):
    """The nearest semi-orthogonal matrices to g (n, rows, columns), by Newton-Schulz iteration: the
    quintic of Muon (Jordan et al. 2024), whose singular values land between about 0.7 and 1.2."""
    tall = g.shape[-2] > g.shape[-1]
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


def shared(x, f):
    """f(x), where f works on each x[i] alone: every process does a part of x, which all have."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return f(x)
    whole = F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % world))
    mine = f(whole.chunk(world)[dist.get_rank()])
    # torch 2.13 has a new name for it, and a warning for the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, mine.contiguous())
    return whole[: len(x)]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for matrices; equal shapes go together.

    Steps are scaled by 0.2 sqrt(max(rows, columns)), which gives them AdamW's usual size (Liu et
    al. 2025, section 2.2), so that one learning rate serves both."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, shapes = group["lr"], {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
            for shape, params in shapes.items():
                grads, moments = zip(*[(p.grad, self.state[p]["momentum"]) for p in params])
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, moments, group["momentum"])  # Nesterov
                updates = shared(torch.stack(ahead), partial(orthogonalize, dtype=self.dtype))
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                scale = -lr * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(params, updates.unbind(), alpha=scale)


def make_optimizer(net, name="muon", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95,
                   dtype=torch.float32):  # fmt: skip
    """A list of a network's optimizers: AdamW for all, or Muon, with products in `dtype`, for the
    blocks' matrices. Weight decay is for parameters of two dimensions. Each group keeps the peak as
    `initial_lr`."""
    if name not in ("adamw", "muon"):
        raise UserError(f"--optimizer={name}: expected muon or adamw")
    if net.quantize:
        raise UserError(f"{net.quantize} weights are not trained: start from what they were")
    inner, wide, narrow = [], [], []
    for n, p in net.named_parameters():
        if p.requires_grad:
            muon = name == "muon" and ".layers." in n and p.ndim == 2
            (inner if muon else wide if p.ndim > 1 else narrow).append(p)
    groups = [(wide, weight_decay), (narrow, 0.0)]
    groups = [{"params": params, "weight_decay": decay} for params, decay in groups if params]
    optimizers = [torch.optim.AdamW(groups, lr, betas, fused=True)] if groups else []
    if inner:
        optimizers.append(Muon(inner, lr, momentum, weight_decay, dtype))
    for g in (g for o in optimizers for g in o.param_groups):
        g["initial_lr"] = lr
    return optimizers


PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10G": 70}
PEAK_TFLOPS |= {"L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}  # dense bfloat16


def peak_flops(device):
    """The device's peak rate in FLOP/s, from its maker's data sheet, or None for an unknown one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * rate for part, rate in PEAK_TFLOPS.items() if part in name), None)


def n_params(net):
    return sum(p.numel() for p in net.parameters())


def flops_per_token(c, seq_len, backward=True):
    """FLOPs per token in matrix products, a multiply and an add each counted (Kaplan et al. 2020),
    attention as the whole seq_len x seq_len square, as is usual; backward costs twice forward."""
    heads = 2 * c.head_dim * (c.n_embd * (c.n_head + c.n_kv_head) + c.n_head * seq_len)
    mlp = c.n_embd * c.n_hidden * (3 if c.mlp == "swiglu" else 2)
    forward = 2 * (c.n_layer * (heads + mlp) + c.n_embd * c.vocab_size)
    return 3 * forward if backward else forward


def memory_estimate(c, params, rows, seq_len, dtype=torch.float32, recompute=False, moments=2,
                    device_type="cpu"):  # fmt: skip
    """Bytes that training needs, estimated: (parameters with gradients and optimizer state, and the
    head's piece; activations of a micro-batch of `rows`). moments: the optimizer's, a parameter."""
    width, heads = dtype.itemsize, (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    mlp = (4 if c.mlp == "swiglu" else 3) * c.n_hidden
    block = 4 * 4 * c.n_embd + width * (2 * c.n_embd + 2 * heads + mlp)
    if device_type == "cpu" and width == 2 and seq_len <= 1024:  # BlockedAttention's probabilities
        block += width * c.n_head * max(128, 5 * seq_len // 8)
    kept = c.n_layer * 4 * c.n_embd + block if recompute else c.n_layer * block
    # The head's: logits, their float32 copy and its gradient; the gradient of its matrix.
    head = c.vocab_size * ((width + 8) * head_rows(device_type, dtype, c.vocab_size) + 4 * c.n_embd)
    return params * 4 * (2 + moments) + head, rows * seq_len * (kept + (4 + width) * c.n_embd)


def free_memory(device):
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # what the kernel could free counts too
        available = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        return 1024 * int(available[1])
    except OSError:  # not Linux: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
