"""What every run does alike: devices, processes, precision, progress, the checks of a step."""

import contextlib
import ctypes
import math
import os
import re
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist


class UserError(SystemExit):
    """Something the user can mend, told in one line: what, where, what to do. Unhandled: exit 1."""


def setup(device="auto", timeout=None):
    """Choose the device and join the other processes, if torchrun started several: (device, rank,
    world, main) by these names; `main` is the one process that writes files. timeout: a timedelta,
    how long processes wait for each other before they give up."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device={device}: expected auto, cpu, cuda or cuda:1")
    place = torch.device(device)
    if place.type == "cuda":
        index = place.index or 0 if world == 1 else int(os.environ.get("LOCAL_RANK", rank))
        if index >= (count := torch.cuda.device_count()):
            raise UserError(f"--device={device}: GPU {index} of {count} on this machine: use cpu")
        place = torch.device("cuda", index)
        torch.cuda.set_device(place)
    elif sys.platform == "linux":
        # Freed memory stays with the process: no page faults when the next step takes it again.
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
                ctypes.CDLL(None).mallopt(option, value)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timeout)
    return SimpleNamespace(device=place, rank=rank, world=world, main=rank == 0)


@contextlib.contextmanager
def lost_process():
    """A line in the place of torch.distributed's traceback where another process is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo's words, then NCCL's
        words = ("closed by peer", "reset by peer", "Broken pipe", "remote worker")
        words += ("remote process exited", "Timed out waiting")
        if not any(word in str(error) for word in words):
            raise
        rank = os.environ.get("RANK", "0")
        raise UserError(
            f"process {rank}: another process of this run is gone, so that none can go on: its own "
            f"last lines, or the system's log, say why; what was saved is kept"
        ) from None


def choose_dtype(device, want="auto", n_embd=0):
    """The dtype to compute in, and why: (dtype, reason). In training, parameters are float32; a CPU
    gains by less only then, so that only training says its n_embd."""
    if want in ("float32", "bfloat16", "float16"):
        return getattr(torch, want), "as asked"
    if want != "auto":
        raise UserError(f"--dtype={want}: expected auto, float32, bfloat16 or float16")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "this GPU has fast bfloat16"
        return torch.float16, "this GPU has no fast bfloat16; gradients are scaled"
    has = torch.cpu.get_capabilities()
    if not (has.get("avx512_bf16") or has.get("amx_bf16")):
        return torch.float32, "this CPU has no fast bfloat16"
    if n_embd < 128:
        return torch.float32, "below width 128 the casts cost more than bfloat16 gains"
    return torch.bfloat16, "this CPU has fast bfloat16 and the model is wide enough to gain"


def compute_dtype(x):
    """The dtype that matrix products of x are computed in: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def autocast(device, dtype):
    """Compute in `dtype` inside this context; float32 is the plain path."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Progress:
    """One line of progress: rewritten in place on a terminal, printed every 5 s in a log."""

    def __init__(self):
        self.last, self.open = -math.inf, False  # when a line was printed; whether one is unended

    def __call__(self, line, last=False):
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
            self.open = not last
        elif last or time.monotonic() - self.last >= 5:
            print(line, flush=True)
            self.last = time.monotonic()

    def note(self, text):
        """Print `text` on lines of its own, between two states of the progress line."""
        print(("\n" if self.open else "") + text, flush=True)
        self.open = False


def duration(seconds):
    """Seconds as a person reads them: 42s, 3m10s, 2h05m."""
    m, s = divmod(int(seconds), 60)
    return f"{s}s" if m == 0 else f"{m}m{s:02d}s" if m < 60 else f"{m // 60}h{m % 60:02d}m"


def check_gradient(norm, step):
    """End a run whose gradient norm is exactly zero: it would go on, and learn nothing."""
    if norm == 0:
        raise UserError(
            f"step {step}: the gradient norm is exactly zero, so that nothing is learned: look at "
            f"what the loss depends on (in train.py try --compile=false); the last save stands"
        )


def weight_sums(params):
    """A number for each tensor (n,) int64 that another value of any of its elements changes: the
    sum of their bits, read as integers."""
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack([p.detach().view(views[p.element_size()]).sum() for p in params])


def check_moved(before, params, lr):
    """End a run whose step, at learning rate lr, left every weight as it was: `before` is what
    weight_sums gave."""
    if torch.equal(before, weight_sums(params)):
        raise UserError(
            f"the first step moved no weight (learning rate {lr:g}): raise learning_rate, or look "
            f"at what the optimizer was given; the last save stands"
        )


def sync_grads(params):
    """Sum the gradients over all processes, in one flat all-reduce (none counts as zero)."""
    if not dist.is_initialized():
        return
    params = [p for p in params if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p)
