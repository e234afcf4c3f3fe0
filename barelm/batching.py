"""How train.py divides a step's tokens: over processes, and into micro-batches that fit the memory.

`keys` are train.py's, by name: batch_tokens, seq_len, micro_batch, optimizer and what else memory
depends on."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from barelm.devices import free_memory
from barelm.footprint import Step, footprint, shapes_of, total_bytes, windows_that_fit
from barelm.optim import MOMENTS, memory_estimate, n_params
from barelm.parallel import keeps_narrow
from barelm.run import UserError
from barelm.traffic import describe

if TYPE_CHECKING:
    from types import SimpleNamespace

    from barelm.run import Run
    from model import GPT

# Micro-batches of a step for each stage of a pipeline, where the user leaves their size open: a
# stage then waits for less than a fifth of the time.
MICRO_BATCHES_OF_STAGE = 4


@dataclass
class Batch:
    """An optimizer step's windows, and how they are divided."""

    size: int  # windows over all processes
    device_batch_size: int  # windows at once on a device
    grad_accum_steps: int  # micro-batches of a step on each process


def divide_batch(keys: SimpleNamespace, world: int, fits: int, n_stages: int = 1) -> Batch:
    """The Batch of batch_tokens, where `fits` windows at once fit the memory of a device, and a
    pipeline of n_stages wants a micro-batch for each, and better more."""
    unit = keys.seq_len * world  # the least that gives every process a window
    if keys.batch_tokens % unit:
        below = max(1, keys.batch_tokens // unit) * unit
        above = math.ceil(keys.batch_tokens / unit) * unit
        near = " or ".join(map(str, sorted({below, above})))
        raise UserError(
            f"batch_tokens={keys.batch_tokens}: expected a multiple of seq_len={keys.seq_len} x "
            f"{world} processes, such as {near}"
        )
    share = keys.batch_tokens // unit  # windows of a process
    if share < n_stages:
        raise UserError(
            f"batch_tokens={keys.batch_tokens}: {share} window(s) a step for each pipeline, fewer "
            f"than its pp={n_stages} stages: --batch_tokens={n_stages * unit}"
        )
    if n_stages > 1:
        fits = min(fits, share // (n_stages * MICRO_BATCHES_OF_STAGE))
    device_batch_size = min(share // n_stages, keys.micro_batch or max(1, fits))
    while share % device_batch_size:  # of one size: a compiled network is compiled for one
        device_batch_size -= 1
    return Batch(share * world, device_batch_size, share // device_batch_size)


def plan_batch(
    keys: SimpleNamespace, net: GPT, run: Run, dtype_used: torch.dtype, saved: dict | None
) -> tuple[Batch, str]:
    """(Batch, a line on memory): as large micro-batches as fit, or on a resume those of before,
    whatever memory is free now: the same sums."""
    fixed, per_window = memory_estimate(
        net.config,
        n_params(net),
        rows=1,
        seq_len=keys.seq_len,
        dtype=dtype_used,
        recompute=keys.checkpoint_blocks,
        moments=MOMENTS.get(keys.optimizer, 2),
        device_type=run.device.type,
        grad_bytes=2 if is_narrow(keys, run) else 4,
    )
    sizes = run.mesh.sizes
    if sizes.cp > 1:  # refused here, before anything is written
        from barelm.context_parallel import check_length

        check_length(keys.seq_len, sizes.cp)
    if sizes.tp > 1:
        from barelm.tensor_parallel import check_split

        check_split(net, sizes.tp)
    fixed -= state_saved(keys, net, run)
    free = free_memory(run.device)
    if run.device.type == "cpu":  # all processes of a machine share it
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", run.world))
    fits = int((0.8 * free - fixed) / per_window)  # a fifth is left for what is not estimated
    if run.mesh.sizes.is_sharded:
        fits = windows_that_fit(planned_step(keys, net, run, dtype_used), 0.8 * free)
    if run.device.type == "cpu":
        fits = min(fits, max(1, 4096 // keys.seq_len))  # more tokens at once are no faster on a CPU
    if saved:
        fits = saved["micro"]
    fits = run.least(fits)  # one number for all processes, as a resume will have it
    batch = divide_batch(keys, run.mesh.data_world, fits, sizes.pp)
    needed = fixed + batch.device_batch_size * per_window
    if run.mesh.sizes.is_sharded:
        needed = total_bytes(footprint(planned_step(keys, net, run, dtype_used, batch)))
    return batch, (
        f"memory: about {needed / 2**30:.2f} GiB a process of {free / 2**30:.1f} GiB free"
    )


def is_narrow(keys: SimpleNamespace, run: Run) -> bool:
    """Whether gradients are kept in bfloat16."""
    return keys.grad_dtype == "bfloat16" and keeps_narrow(run.mesh.sizes)


def state_saved(keys: SimpleNamespace, net: GPT, run: Run) -> int:
    """Bytes of the optimizer's state that are not on this process's device, where they would be."""
    state = 4 * n_params(net) * MOMENTS.get(keys.optimizer, 2)
    if keys.offload and run.device.type == "cuda":
        return state
    return state * (1 - 1 / run.mesh.sizes.replica) if keys.zero else 0


def planned_step(keys: SimpleNamespace, net: GPT, run: Run, dtype_used: torch.dtype,
                 batch: Batch | None = None) -> Step:  # fmt: skip
    """A step of this run as barelm/footprint.py knows it; without a Batch, of one window."""
    n_blocks = net.config.n_layer + net.config.n_encoder_layer
    again = n_blocks if keys.checkpoint_blocks is True else int(keys.checkpoint_blocks)
    return Step(
        net.config,
        run.mesh.sizes,
        shapes_of(net),
        keys.seq_len,
        rows=batch.device_batch_size if batch else 1,
        n_micro=batch.grad_accum_steps if batch else max(2, run.mesh.sizes.pp),
        dtype=dtype_used,
        optimizer=keys.optimizer,
        zero=keys.zero,
        grad_dtype=getattr(torch, keys.grad_dtype) if is_narrow(keys, run) else torch.float32,
        offload=keys.offload,
        recompute=again,
        device_type=run.device.type,
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", run.world)),
    )


def mesh_words(
    keys: SimpleNamespace, net: GPT, run: Run, batch: Batch, dtype_used: torch.dtype
) -> str:
    """Who holds what, and what travels; nothing of a single process."""
    if run.world == 1:
        return ""
    lines = describe(planned_step(keys, net, run, dtype_used, batch))
    return "".join(f"  {line}\n" for line in lines)
