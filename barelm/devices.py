"""Which device a process computes on, and what each kind of device lacks.

cuda: a GPU of NVIDIA's or AMD's. mps: a Mac's GPU, by Metal Performance Shaders; it has no float64,
no collective exchange, no pinned memory, and what is compiled or captured for a GPU is not for it.
cpu: the rest. tests/test_platforms.py holds the mps paths against a device that refuses float64;
no test of ours has run on a Mac (docs/platforms.md)."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import torch

from barelm import host
from barelm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def choose_device(device: str, rank: int = 0, world: int = 1, can_mps: bool = True) -> torch.device:
    """The torch.device for --device; "auto" is the first of cuda, mps, cpu that is here. can_mps:
    whether the script runs on a Mac's GPU."""
    if device == "auto":
        device = best_device(world, can_mps)
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"--device={device}: expected auto, cpu, mps, cuda or cuda:1")
    place = torch.device(device)
    if place.type == "mps":
        check_mps(world, can_mps)
    if place.type == "cuda":
        place = choose_gpu(place, rank, world)
    return place


def best_device(world: int, can_mps: bool) -> str:
    if torch.cuda.is_available():
        return "cuda"
    # Several processes exchange what they have, which torch cannot on mps.
    if can_mps and world == 1 and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def check_mps(world: int, can_mps: bool) -> None:
    """Refuse mps where it is not, or does not do what is asked."""
    if not torch.backends.mps.is_available():
        why = "this torch, or this machine, has none (a Mac of Apple's chips has): use cpu"
        raise UserError(f"--device=mps: {why}")
    if not can_mps:
        raise UserError("--device=mps: this script does not run there: use cpu")
    if world > 1:
        raise UserError("--device=mps: for one process: torch exchanges nothing there: use cpu")


def choose_gpu(place: torch.device, rank: int, world: int) -> torch.device:
    """The GPU of this process: the one that was named, or of several processes each its own."""
    index = place.index or 0
    if world > 1:
        index = int(os.environ.get("LOCAL_RANK", rank))
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(f"--device={place}: GPU {index} of {count} on this machine: use cpu")
    place = torch.device("cuda", index)
    torch.cuda.set_device(place)
    return place


def wide_dtype(device: torch.device) -> torch.dtype:
    """In which sums are kept: float64, or float32 on mps, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def widen(x: Tensor) -> Tensor:
    """A tensor in the dtype in which sums are kept."""
    return x.to(wide_dtype(x.device))


def why_not_on_mps(device: torch.device) -> str:
    """Why nothing is compiled on mps, or ""."""
    if device.type == "mps":
        return "what torch compiles for MPS is not tried here"
    return ""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_used(device: torch.device) -> int:
    """The most memory that this process has held, in bytes: on the GPU, or resident. On mps: what
    it holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return host.memory_used()


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What was freed torch keeps, for whoever asks next.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "mps":  # a part of the memory that it shares with the CPU
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(left, host.free_memory()))
    return host.free_memory()
