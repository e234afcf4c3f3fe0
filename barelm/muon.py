"""Muon, and the orthogonalization that it is made of.

Equal shapes are stacked, so that a step is a few large products whatever the number of layers."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from barelm.offload import HostMemory, load_to_host, parts_of
from barelm.parts import gradient_part, is_divided, local_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

# Of x -> a x + b x^3 + c x^5, a step after the other (Jordan et al. 2024): singular values from
# 0.002 to 1 land between 0.68 and 1.2. (docs/experiments.md has four other steps.)
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5


ROUND = 1 << 28  # bytes of whole matrices that a process holds at once, of divided ones


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for matrices; equal shapes go together. A
    parameter of three dimensions is a stack of matrices: experts.

    Steps are scaled by 0.2 sqrt(max(rows, columns)), which gives them AdamW's usual size (Liu et
    al. 2025, section 2.2), so that one learning rate serves both.

    Of parameters that every process holds whole, each process of `group` (None: all that there are)
    orthogonalizes some, or with shares=False all of them. Of divided ones it holds its part of the
    momentum alone: see `orthogonalize_divided`. offload: the momentum lives in the host's memory;
    of a divided parameter it is this process's part, a plain tensor."""

    def __init__(self, params: Iterable, lr: float = 1e-3, momentum: float = 0.95,
                 weight_decay: float = 0.0, dtype: torch.dtype = torch.float32, group: Any = None,
                 shares: bool = True, offload: bool = False) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype  # of the Newton-Schulz products
        self.group = group
        self.shares = shares
        self.memory = HostMemory() if offload else None
        self.stacks = {}  # {what the parameters have in common: Stack}

    @torch.no_grad()
    def step(self) -> None:
        for number, group in enumerate(self.param_groups):
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((number, p.shape, layout_of(p)), []).append(p)
            for key, params in alike.items():
                for i, part in enumerate(self.at_once(params)):
                    self.step_of_shape(part, group, self.moments((*key, i), part))
        if self.memory is not None:
            self.memory.wait()

    def at_once(self, params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Parameters of one shape in lists of those that are stepped together."""
        if self.memory is None:
            return [params]
        return parts_of(params, lambda p: local_part(p).numel())

    def moments(self, key: tuple, params: list[nn.Parameter]) -> tuple[Tensor, Sequence[Tensor]]:
        """The momentum of n parameters of one shape, in one tensor (n, …, rows, columns), and its
        n parts, which `state` has by parameter, as a state.pt does. Of divided parameters it is
        what this process holds of them."""
        momenta = [self.state[p].get("momentum") for p in params]
        whole, parts = self.stacks.get(key, (None, ()))
        if len(momenta) == len(parts):
            if all(m is not None and local_part(m) is part for m, part in zip(momenta, parts)):
                return whole, parts
        # The first step, one behind a resume, or other parameters than before have gradients.
        values = []
        for p, m in zip(params, momenta):
            values.append(torch.zeros_like(local_part(p)) if m is None else local_part(m))
        whole = torch.stack(values)
        if self.memory is not None:
            whole = self.memory.keep(whole)
        parts = whole.unbind()
        for p, part in zip(params, parts):
            is_offloaded = self.memory is not None
            self.state[p]["momentum"] = part if is_offloaded else divided_like(p, part)
        self.stacks[key] = whole, parts
        return whole, parts

    def step_of_shape(self, params: list[nn.Parameter], group: dict, moments: tuple) -> None:
        """A step of n parameters of one shape (…, rows, columns), in one batch of products."""
        lr = group["lr"]
        beta = group["momentum"]
        home, parts = moments
        whole = home
        if self.memory is not None:
            [whole] = self.memory.fetch([home], params[0].device)
            parts = whole.unbind()
        weights = [local_part(p) for p in params]
        grads = [gradient_part(p) for p in params]
        torch._foreach_lerp_(parts, grads, 1 - beta)  # m = beta m + (1 - beta) g
        ahead = torch.stack(grads).lerp_(whole, beta)  # Nesterov: as if one step further
        if self.memory is not None:
            self.memory.put_back([home], [whole])
        updates = self.orthogonal(ahead, params[0])
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(params[0].shape[-2:]))
        torch._foreach_add_(weights, updates.unbind(), alpha=-lr * scale)

    def orthogonal(self, ahead: Tensor, like: Tensor) -> Tensor:
        """The updates of `ahead` (n, …, rows, columns), n matrices as the parameter `like`."""
        orthogonal = partial(orthogonalize, dtype=self.dtype)
        if layout_of(like) is not None:
            return orthogonalize_divided(ahead, like, orthogonal, self.dtype)
        matrices = ahead.flatten(0, -3)  # (n or n E, rows, columns)
        if not self.shares:
            return orthogonal(matrices).view_as(ahead)
        return split_over_processes(matrices, orthogonal, self.group).view_as(ahead)

    def load_state_dict(self, state_dict: dict) -> None:
        if self.memory is None:
            super().load_state_dict(state_dict)
        else:
            load_to_host(self, state_dict, self.memory)


def orthogonalize(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
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


def iterate(x: Tensor) -> Tensor:
    """The steps of COEFFICIENTS on x (n, rows, columns), whose singular values are at most 1."""
    for step in COEFFICIENTS:
        x = factor(x @ x.mT, *step) @ x
    return x


def iterate_square(x: Tensor) -> Tensor:
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


def factor(s: Tensor, a: float, b: float, c: float) -> Tensor:
    """q = a + b s + c s s of s = x x^T (n, rows, rows): q x is a x + b x^3 + c x^5."""
    q = torch.baddbmm(s, s, s, beta=b, alpha=c)
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    return q


def split_over_processes(x: Tensor, f: Callable, group: Any = None) -> Tensor:
    """f(x), where f works on each x[i] alone: every process of the group does a part of x, which
    all have."""
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world == 1:
        return f(x)
    padding = -len(x) % world  # so that all parts are of one size
    whole = F.pad(x, (0, 0) * (x.ndim - 1) + (0, padding))
    part = f(whole.chunk(world)[dist.get_rank(group)])
    # torch 2.13 has a new name for it, and a warning for the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, part.contiguous(), group=group)
    return whole[: len(x)]


# --------------------------------------------------------------------------------------------------
# Divided parameters: DTensors, of which a process holds a part (FSDP, tensor parallel, or both)


def layout_of(p: Tensor) -> tuple | None:
    """How a parameter is divided: (its mesh, its placements); None of one that is not."""
    return (p.device_mesh, p.placements) if is_divided(p) else None


def divided_like(p: Tensor, part: Tensor) -> Tensor:
    """The tensor that is divided as the parameter p is, of which `part` is this process's part."""
    return as_dtensor(part, p.device_mesh, p.placements, p.shape) if is_divided(p) else part


def as_dtensor(part: Tensor, mesh: Any, placements: Sequence, shape: tuple[int, ...]) -> Tensor:
    """The DTensor of this shape of which each process has given its part."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def orthogonalize_divided(ahead: Tensor, like: Tensor, f: Callable, dtype: torch.dtype) -> Tensor:
    """f of n matrices, of which this process has its parts, ahead (n, …, rows, columns), each
    divided as the DTensor `like`: its parts of the results. They are gathered some at a time, so
    that each is whole on one process alone, and travel in `dtype`, in which f multiplies."""
    from torch.distributed.tensor import Shard

    mesh = like.device_mesh
    divided = []  # of the n matrices in one tensor, where all dimensions are one further on
    whole = []
    for place in like.placements:
        divided.append(one_further(place))
        # What divides a stack of experts leaves its matrices whole, and stays.
        is_of_experts = place.is_shard() and place.dim < like.ndim - 2
        whole.append(one_further(place) if is_of_experts else Shard(0))
    n_at_once = mesh.size() * max(1, ROUND // (like.numel() * dtype.itemsize))
    updates = []
    for part in ahead.to(dtype).split(n_at_once):
        shape = (len(part), *like.shape)
        x = as_dtensor(part, mesh, divided, shape).redistribute(placements=whole).to_local()
        y = f(x.flatten(0, -3)).view_as(x) if x.numel() else x
        y = as_dtensor(y, mesh, whole, shape).redistribute(placements=divided).to_local()
        updates.append(y.to(ahead.dtype))
    return torch.cat(updates)


def one_further(place: Any) -> Any:
    """A placement, of a tensor that has got a dimension before its others."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(place, _StridedShard):  # FSDP's, of what tensor parallelism has divided before
        return _StridedShard(place.dim + 1, split_factor=place.split_factor)
    return Shard(place.dim + 1) if place.is_shard() else place
