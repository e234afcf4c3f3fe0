"""Muon, and the orthogonalization that it is made of.

Equal shapes are stacked, so that a step is a few large products whatever the number of layers."""

import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Of x -> a x + b x^3 + c x^5, a step after the other (Jordan et al. 2024): singular values from
# 0.002 to 1 land between 0.68 and 1.2. (docs/experiments.md has four other steps.)
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for matrices; equal shapes go together. A
    parameter of three dimensions is a stack of matrices: experts.

    Steps are scaled by 0.2 sqrt(max(rows, columns)), which gives them AdamW's usual size (Liu et
    al. 2025, section 2.2), so that one learning rate serves both."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype  # of the Newton-Schulz products
        self.stacks = {}  # {(number of the group, shape): Stack}

    @torch.no_grad()
    def step(self):
        for number, group in enumerate(self.param_groups):
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                self.step_of_shape(params, group, self.moments((number, shape), params))

    def moments(self, key, params):
        """The momentum of n parameters of one shape, in one tensor (n, …, rows, columns), and its
        n parts, which `state` has by parameter, as a state.pt does."""
        momenta = [self.state[p].get("momentum") for p in params]
        whole, parts = self.stacks.get(key, (None, ()))
        if len(momenta) == len(parts) and all(a is b for a, b in zip(momenta, parts)):
            return whole, parts
        # The first step, one behind a resume, or other parameters than before have gradients.
        whole = torch.stack(
            [torch.zeros_like(p) if m is None else m for p, m in zip(params, momenta)]
        )
        parts = whole.unbind()
        for p, part in zip(params, parts):
            self.state[p]["momentum"] = part
        self.stacks[key] = whole, parts
        return whole, parts

    def step_of_shape(self, params, group, moments):
        """A step of n parameters of one shape (…, rows, columns), in one batch of products."""
        lr = group["lr"]
        beta = group["momentum"]
        whole, parts = moments
        grads = [p.grad for p in params]
        torch._foreach_lerp_(parts, grads, 1 - beta)  # m = beta m + (1 - beta) g
        ahead = torch.stack(grads).lerp_(whole, beta)  # Nesterov: as if one step further
        orthogonal = partial(orthogonalize, dtype=self.dtype)
        matrices = ahead.flatten(0, -3)  # (n or n E, rows, columns)
        updates = split_over_processes(matrices, orthogonal).view_as(ahead)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(params[0].shape[-2:]))
        torch._foreach_add_(params, updates.unbind(), alpha=-lr * scale)


def orthogonalize(g, dtype=torch.float32):
    """Near the closest semi-orthogonal matrices to g (n, rows, columns): the same singular vectors,
    and singular values near 1. Products are computed in `dtype`; the result is of g's."""
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
    x = torch.empty_like(g, dtype=dtype)
    torch.div(g, norm + 1e-7, out=x)  # no singular value above 1
    is_tall = g.shape[-2] > g.shape[-1]
    if is_tall:
        x = x.mT  # so that x x^T is the smaller of the two squares
    rows, columns = x.shape[-2:]
    # Of float32 alone: where products round to bfloat16 (or TensorFloat-32, on a GPU), so do the
    # squares of small singular values, to below zero, from where the iteration runs away.
    if dtype == torch.float32 and g.device.type == "cpu" and columns >= 1.5 * rows:
        x = iterate_square(x)
    else:
        x = iterate(x)
    if is_tall:
        x = x.mT
    # Contiguous, as g is: of other strides the update would be a kernel for each parameter.
    return x.to(g.dtype, copy=True, memory_format=torch.contiguous_format)


def iterate(x):
    """The steps of COEFFICIENTS on x (n, rows, columns), whose singular values are at most 1."""
    for step in COEFFICIENTS:
        x = factor(x @ x.mT, *step) @ x
    return x


def iterate_square(x):
    """`iterate`, on s = x x^T in the place of x: each step multiplies x by q from the left, which
    makes s to q s q. Only the product p of all q meets x again. It pays where x is much wider than
    high."""
    s = x @ x.mT  # (n, rows, rows)
    p = q = factor(s, *COEFFICIENTS[0])
    for step in COEFFICIENTS[1:]:
        s = q @ s @ q  # all of these are symmetric, and commute
        q = factor(s, *step)
        p = q @ p
    return p @ x


def factor(s, a, b, c):
    """q = a + b s + c s s of s = x x^T (n, rows, rows): q x is a x + b x^3 + c x^5."""
    q = torch.baddbmm(s, s, s, beta=b, alpha=c)
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    return q


def split_over_processes(x, f):
    """f(x), where f works on each x[i] alone: every process does a part of x, which all have."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return f(x)
    padding = -len(x) % world  # so that all parts are of one size
    whole = F.pad(x, (0, 0) * (x.ndim - 1) + (0, padding))
    part = f(whole.chunk(world)[dist.get_rank()])
    # torch 2.13 has a new name for it, and a warning for the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, part.contiguous())
    return whole[: len(x)]
