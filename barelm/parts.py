"""Tensors of which each process holds a part: torch's DTensor.

`local_part` is what this process holds of one, and `whole_tensor` what all hold together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from barelm.devices import wide_dtype, widen

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from barelm.mesh import Mesh


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "device_mesh")


def is_narrow(grad: Tensor) -> bool:
    """Whether a gradient has less than float32's precision."""
    return grad is not None and grad.dtype == torch.bfloat16


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; of one that is not divided, itself."""
    return tensor.to_local() if is_divided(tensor) else tensor


def whole_tensor(tensor: Tensor) -> nn.Parameter:
    """All of a tensor, on every process: all of them call it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def on_host(tensor: Tensor, is_main: bool) -> Tensor | None:
    """All of a tensor on the main process's host, None on the others: all processes call it."""
    whole = whole_tensor(tensor.detach())
    return whole.cpu() if is_main else None


def state_on_host(value: Any, is_main: bool) -> Any:
    """A state, dicts and lists around tensors, with each tensor as `on_host` gives it."""
    if isinstance(value, torch.Tensor):
        return on_host(value, is_main)
    if isinstance(value, dict):
        return {key: state_on_host(entry, is_main) for key, entry in value.items()}
    if isinstance(value, list):
        return [state_on_host(entry, is_main) for entry in value]
    return value


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that a process holds of `like`, of whose shape it is; the whole
    one where `like` is not divided."""
    if not is_divided(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # All processes have the whole: nothing is sent.
    whole = whole.to(like.device_mesh.device_type)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def gradient_part(p: Tensor) -> Tensor:
    """What this process holds of a parameter's gradient, divided as the parameter is, and in its
    dtype."""
    grad = p.grad
    if is_divided(p) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local_part(grad).to(p.dtype)


def n_holders(tensor: Tensor, mesh: Mesh) -> int:
    """How many processes hold the same part of a parameter as this one. Some parameters are held
    by several stages of a pipeline, as barelm/pipeline.py notes on them."""
    holders = mesh.sizes.replica * mesh.sizes.shard * mesh.sizes.tp
    holders *= getattr(tensor, "n_stages", 1)
    if is_divided(tensor):
        for dimension, placement in enumerate(tensor.placements):
            if not placement.is_replicate():  # a Shard, or the strided one of FSDP behind tp
                holders //= tensor.device_mesh.size(dimension)
    return holders


def sum_partial_gradients(params: Iterable) -> None:
    """Add up the gradients of which each process has a part: of what all have, and compute with
    their own heads alone (q_norm, k_norm, sinks, the table of relative positions, a single head of
    keys and values). FSDP has done so by itself."""
    for p in params:
        if is_divided(p) and p.grad is not None and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)


def global_norm(params: Sequence, mesh: Mesh) -> Tensor:
    """The norm of the gradients of a network that is divided in any way, a 0-dim tensor that all
    processes have: squares of what each holds, over how many hold the same."""
    device = mesh.run.device
    total = torch.zeros((), dtype=wide_dtype(device), device=device)
    by_holders = {}
    for p in params:
        if p.grad is not None:
            by_holders.setdefault(n_holders(p, mesh), []).append(local_part(p.grad))
    for holders, grads in sorted(by_holders.items()):
        norms = widen(torch.stack(torch._foreach_norm(grads, dtype=torch.float32)))
        total += norms.square().sum() / holders
    if mesh.run.world > 1:
        dist.all_reduce(total)
    return total.sqrt().float()


def clip_gradients(params: Sequence, grad_clip: float, mesh: Mesh) -> Tensor:
    """Clip gradients that are divided, or narrower than their parameters, to this norm (0: leave
    them); their norm before."""
    sum_partial_gradients(params)
    norm = global_norm(params, mesh)
    if grad_clip:
        grads = [local_part(p.grad) for p in params if p.grad is not None]
        scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0)  # as torch's own
        torch._foreach_mul_(grads, scale)
    return norm
