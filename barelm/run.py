"""What every run does alike: processes, device, precision, progress, schedules, updates, signals.

train.py, finetune.py and rl.py are three loops over these pieces:

    run = setup("auto")                           # this process: device, rank, world
    horizon = Horizon(max_steps=300)              # where the run ends
    schedule = Schedule("cosine", warmup_steps=20)
    updater = Updater(run, params, optimizers, scaler, grad_clip=1.0)
    progress = horizon.progress(step, tokens, epochs, seconds)
    updater.set_lr(schedule.scale(step, progress, warm_end))
    updater.backward(loss)                        # of each micro-batch
    norm = updater.clip_gradients()
    [loss] = run.sum(loss)                        # the one exchange of a step
    updater.step(step, loss, norm)
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from barelm import IS_INSTALLED, host
from barelm.devices import choose_device
from barelm.errors import UserError
from barelm.parts import clip_gradients, is_divided, is_narrow, local_part
from barelm.rendezvous import store_of_start
from barelm.threads import Threads, ThreadWatch, set_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import timedelta

    from torch import Tensor, nn


# --------------------------------------------------------------------------------------------------
# Progress


class Progress:
    """One line of progress: rewritten in place on a terminal, printed every 5 s in a log."""

    def __init__(self) -> None:
        self.last_print = -math.inf  # seconds, of time.monotonic
        self.open_line = False  # whether the terminal's last line is not ended yet

    def __call__(self, line: str, last: bool = False) -> None:
        if sys.stdout.isatty():
            line = fitting(line, shutil.get_terminal_size().columns - 1)
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
            self.open_line = not last
        elif last or time.monotonic() - self.last_print >= 5:
            print(line, flush=True)
            self.last_print = time.monotonic()

    def note(self, text: str) -> None:
        """Print `text` on lines of its own, between two states of the progress line."""
        if self.open_line:
            print()
        print(text, flush=True)
        self.open_line = False


def fitting(line: str, width: int) -> str:
    """A line without the last of its parts, which two blanks part, where it is wider than that: of
    one that goes on in the next line of a terminal, the first would stay at every rewriting."""
    while len(line) > width:
        line = line.rpartition("  ")[0] or line[:width]
    return line


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 42s, 3m10s, 2h05m."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{seconds:02d}s"
    return f"{seconds}s"


# --------------------------------------------------------------------------------------------------
# Processes


@dataclass
class Run:
    """This process and its place among those that torchrun started."""

    device: torch.device
    rank: int = 0  # which process this is, 0 to world - 1
    world: int = 1  # how many there are
    progress: Progress = field(default_factory=Progress)
    mesh: Any = None  # its Mesh (barelm/mesh.py), where a script divides networks
    watch: object = None  # barelm.watch.Watch: whether the others are still there
    threads: Threads = Threads()  # how many it computes with on the CPU, and why

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0

    @property
    def is_divided(self) -> bool:
        """Whether each process holds a part of the network, and computes with all others."""
        return self.mesh is not None and self.mesh.sizes.is_sharded

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            self.progress.note(text)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Numbers, or 0-dim tensors, each summed over all processes: a list of floats. In a step it
        is called once, since it is where the host waits for the device."""
        if self.world == 1 and not any(isinstance(value, torch.Tensor) for value in values):
            return [float(value) for value in values]  # all are here: no device is asked
        if self.device.type == "mps":
            return self.sum_without_float64(values)
        numbers = []
        for value in values:
            numbers.append(torch.as_tensor(value, dtype=torch.float64, device=self.device))
        totals = torch.stack(numbers)
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def sum_without_float64(self, values: Sequence) -> list[float]:
        """`sum` of one process, whose device has float32 alone: what is there is read in one wait,
        and numbers of the host stay as exact as they are."""
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        on_device = [tensor.to(torch.float32).to(self.device) for tensor in tensors]
        read = iter(torch.stack(on_device).tolist())
        return [next(read) if isinstance(v, torch.Tensor) else float(v) for v in values]

    def of_all(self, value: float) -> list:
        """A number of each process, in the order of their ranks: a list of floats."""
        values = [0] * self.world
        values[self.rank] = value
        return self.sum(*values)

    def least(self, value: int) -> int:
        """The least whole number of all processes'."""
        return int(min(self.of_all(value)))

    def most(self, value: int) -> int:
        """The largest whole number of all processes'."""
        return -self.least(-value)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.sum(0)

    def wait_for_main(self) -> None:
        """Where the main process has done something alone, the others wait for it here: however
        long it took, no exchange's timeout counted it."""
        if self.watch:
            self.watch.wait_for_main()


def setup(
    device: str = "auto", timeout: timedelta | None = None, threads: int = 0, can_mps: bool = True
) -> Run:
    """Choose the device and the threads, and join the other processes, if torchrun started several:
    a Run. timeout: a timedelta, how long processes wait for each other before they give up.
    threads: as `set_threads` takes it. can_mps: whether the script runs on a Mac's GPU."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    place = choose_device(device, rank, world, can_mps)
    chosen = set_threads(threads)
    if place.type == "cpu" and host.is_linux():
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        store = store_of_start(rank, world, timeout)
        ranks = {} if store is None else {"store": store, "rank": rank, "world_size": world}
        dist.init_process_group(backend, timeout=timeout, **ranks)
    return Run(place, rank, world, threads=chosen)


def keep_freed_memory() -> None:
    """Let freed memory stay with the process: no page faults when the next step takes it again."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of glibc's malloc.h
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)


def sync_grads(params: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in one flat all-reduce; a missing one is zero."""
    if not dist.is_initialized():
        return
    params = [p for p in params if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    sizes = [p.numel() for p in params]
    for p, part in zip(params, flat.split(sizes)):
        p.grad = part.view_as(p)


def end_process(status: int, threads_may_run: bool = False) -> None:
    """End a script with this exit status. Of several processes each ends at once, since a thread of
    gloo that frees a tensor late aborts a usual exit; not where other threads still send."""
    if dist.is_initialized():
        dist.destroy_process_group()
        if not threads_may_run:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


class StopSignals:
    """Notes Ctrl-C and SIGTERM, so that a loop can save and end. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received = 0  # the signal's number; 0: none yet
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGINT, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        self.received = self.received or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def exit_status(self) -> int:
        """What a shell calls death by this signal, or where another process got it, by SIGTERM."""
        return 128 + (self.received or signal.SIGTERM)


# --------------------------------------------------------------------------------------------------
# Precision


def choose_dtype(
    device: torch.device, want: str = "auto", n_embd: int = 0
) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why: (dtype, reason). In training, parameters are float32; a CPU
    gains by less only then, so that only training says its n_embd."""
    if want in ("float32", "bfloat16", "float16"):
        return getattr(torch, want), "as asked"
    if want != "auto":
        raise UserError(f"--dtype={want}: expected auto, float32, bfloat16 or float16")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:  # from Ampere on
            return torch.bfloat16, "this GPU has fast bfloat16"
        return torch.float16, "this GPU has no fast bfloat16; gradients are scaled"
    if device.type == "mps":
        return torch.float32, "on MPS nothing narrower is tried here: --dtype asks for it"
    cpu = torch.cpu.get_capabilities()
    if not (cpu.get("avx512_bf16") or cpu.get("amx_bf16")):
        return torch.float32, "this CPU has no fast bfloat16"
    if n_embd < 128:
        return torch.float32, "below width 128 the casts cost more than bfloat16 gains"
    return torch.bfloat16, "this CPU has fast bfloat16 and the model is wide enough to gain"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Compute in `dtype` inside this context; float32 is the plain path."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def in_full(x: Tensor) -> AbstractContextManager:
    """Compute in x's own dtype inside this context, whatever autocast asks for."""
    if x.device.type == "meta":  # which it does not know
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler | None:
    """The scaler that keeps small gradients from vanishing in float16; None for other dtypes."""
    if dtype != torch.float16:
        return None
    return torch.amp.GradScaler(device.type)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. A GPU reads pinned memory by itself, so that the host
    goes on at once; of other memory it would wait for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x are computed in: autocast's, or its own."""
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # which knows no meta
        return torch.get_autocast_dtype(device_type)
    return x.dtype


# --------------------------------------------------------------------------------------------------
# How long, and how fast


@dataclass
class Horizon:
    """Where a run ends: at the first of these that is reached; one that is None is not looked at.
    max_steps=0 is a run without a step: it writes the model as it is before the first."""

    max_steps: int | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None  # passes over the data
    max_minutes: float | None = None  # of the clock, evaluation and compilation included

    def check(self) -> None:
        """Refuse negative limits, and a run without an end."""
        limits = vars(self)
        for name, limit in limits.items():
            if limit is not None and not 0 <= limit < math.inf:
                raise UserError(f"{name}={limit}: expected 0 or more")
        if self.max_steps != 0 and not any(limits.values()):
            raise UserError(f"no horizon: set {', '.join(limits)}: one of them at least")

    def notes(self, tokens_per_step: int, tokens_per_epoch: int) -> list[str]:
        """What a user may not expect of several limits, in words: max_steps has a default, and the
        first limit that is reached ends the run."""
        steps = {}
        if self.max_tokens:
            steps["max_tokens"] = self.max_tokens / tokens_per_step
        if self.max_epochs:
            steps["max_epochs"] = self.max_epochs * tokens_per_epoch / tokens_per_step
        notes = []
        for name, n_steps in steps.items():
            if self.max_steps and self.max_steps < n_steps:
                notes.append(
                    f"max_steps={self.max_steps} ends the run before {name}={vars(self)[name]} "
                    f"does, which would be {n_steps:,.0f} steps: --max_steps=none leaves it to that"
                )
        return notes

    def progress(
        self, step: int = 0, tokens: int = 0, epochs: float = 0.0, seconds: float = 0.0
    ) -> float:
        """The part of the run that is done, 0 to 1: the largest over the limits that are set."""
        if self.max_steps == 0:
            return 1.0
        done = 0.0
        if self.max_steps:
            done = max(done, step / self.max_steps)
        if self.max_tokens:
            done = max(done, tokens / self.max_tokens)
        if self.max_epochs:
            done = max(done, epochs / self.max_epochs)
        if self.max_minutes:
            done = max(done, seconds / (60 * self.max_minutes))
        return min(1.0, done)


@dataclass
class Schedule:
    """The learning rate over its peak: a warm-up to 1, then a fall to min_lr, or none."""

    # cosine, linear, trapezoid (constant, then linear), constant or inverse_sqrt
    lr_schedule: str = "cosine"
    warmup_steps: int = 0  # of linear warm-up
    min_lr: float = 0.0  # the last learning rate, as a fraction of the peak
    decay_fraction: float = 0.4  # trapezoid: the part of the run that decays

    def check(self) -> None:
        self.scale(0, 0.0)  # refuses an unknown schedule

    def scale(self, step: int, progress: float, warm_end: float = 0.0) -> float:
        """The factor for a step (from 0) at this progress (0 to 1) of the run. warm_end: the
        progress at which the warm-up ends, or the present one while it lasts."""
        warm = 1.0
        if self.warmup_steps:
            warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * (self.min_lr + (1 - self.min_lr) * self.fall(step, progress, warm_end))

    def fall(self, step: int, progress: float, warm_end: float) -> float:
        """From 1 at the end of the warm-up to 0 at the end of the run."""
        if self.lr_schedule == "inverse_sqrt":  # Vaswani et al. 2017, equation 3: not to 0
            warm = max(1, self.warmup_steps)
            return math.sqrt(warm / max(warm, step + 1))
        left = max(1 - warm_end, 1e-9)  # the part of the run behind the warm-up
        after = max(0.0, progress - warm_end) / left
        if self.lr_schedule == "cosine":
            return (1 + math.cos(math.pi * after)) / 2
        if self.lr_schedule == "linear":
            return 1 - after
        if self.lr_schedule == "trapezoid":
            decay = min(self.decay_fraction, left)
            return min(1.0, (1 - progress) / decay) if decay else 1.0
        if self.lr_schedule == "constant":
            return 1.0
        raise UserError(
            f"lr_schedule={self.lr_schedule}: expected cosine, linear, trapezoid, constant or "
            "inverse_sqrt"
        )


def check_least(config: dict, names: Sequence[str], least: int) -> None:
    """Refuse the settings of these names that are below `least`, or not finite; none is allowed."""
    for name in names:
        value = config[name]
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{name}={value}: expected {least} or more")


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch in a step: dropout and samples depend on nothing else, so that no state of
    a generator has to be saved for a resume to be exact."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63


# --------------------------------------------------------------------------------------------------
# The update of the weights, and the policy on bad steps

BAD_STEPS = 5  # non-finite steps in a row that end a run


class Updater:
    """What an optimizer step does in every run; it refuses updates that would ruin the network.

    A step whose loss or gradient is not finite changes nothing; BAD_STEPS of them in a row end the
    run. So does a gradient of exactly zero, and a first step that moves no weight: such a run would
    go on for hours, and learn nothing."""

    def __init__(self, run: Run, params: Iterable[nn.Parameter], optimizers: list,
                 scaler: torch.amp.GradScaler | None = None,
                 grad_clip: float = 0.0) -> None:  # fmt: skip
        self.run = run
        self.params = list(params)  # those that learn
        self.optimizers = optimizers
        self.scaler = scaler  # float16's; or None
        self.grad_clip = grad_clip  # the largest gradient norm; 0: no clipping
        self.lr_scale = 1.0
        self.bad_steps = 0  # in a row, until now
        self.has_moved = False  # whether a step of this process has moved the weights
        self.threads = ThreadWatch(run)

    def set_lr(self, scale: float) -> None:
        """The learning rate of every group: its own peak, times `scale`."""
        self.lr_scale = scale
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss, a scalar."""
        if self.scaler:
            loss = self.scaler.scale(loss)
        loss.backward()

    def clip_gradients(self) -> Tensor:
        """Clip the sum of the micro-batches' gradients; their norm before, a 0-dim tensor."""
        if self.scaler:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        has_stages = self.run.mesh is not None and self.run.mesh.sizes.pp > 1
        if has_stages or any(is_divided(p) or is_narrow(p.grad) for p in self.params):
            return clip_gradients(self.params, self.grad_clip, self.run.mesh)
        return torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip or math.inf)

    def step(self, step: int, loss: float, norm: float, warming_up: bool = False,
             zero_is_fault: bool = True) -> bool:  # fmt: skip
        """Update the weights, or skip it: whether it was done. step: how many were before. loss and
        norm: floats, the same on all processes. zero_is_fault: False where a gradient may rightly
        be zero, as that of equal rewards is."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.bad_steps = 0
            if zero_is_fault:
                check_gradient(norm, step + 1)
            # The last steps of a schedule, from which a resume may start, move less than float32
            # shows.
            must_move = norm > 0 and (warming_up or self.lr_scale > 0.01)
            self.apply(watch=must_move and not self.has_moved)
        else:
            self.run.say(
                f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}: the update is skipped"
            )
            # A scaler begins with a scale that overflows, and finds the right one in a few steps.
            if self.scaler is None or self.scaler.get_scale() < 2:
                self.bad_steps += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.scaler:
            self.scaler.update()
        self.threads.after_step()
        return finite

    def apply(self, watch: bool) -> None:
        """The optimizers' steps; watch: they have to move a weight."""
        before = weight_sums(self.params) if watch else None
        for optimizer in self.optimizers:
            optimizer.step()
        if watch:
            lr = self.optimizers[0].param_groups[0]["lr"]
            check_moved(before, self.params, lr, self.run)
            self.has_moved = True

    def check_bad_steps(self, learning_rate: float, warmup_steps: int) -> None:
        """End the run after BAD_STEPS steps in a row that were not finite."""
        if self.bad_steps >= BAD_STEPS:
            raise UserError(
                f"{BAD_STEPS} steps in a row were not finite: lower learning_rate "
                f"({learning_rate:g}), raise warmup_steps ({warmup_steps}) or use --dtype=float32; "
                f"the last save is kept"
            )


def check_gradient(norm: float, step: int) -> None:
    """End a run whose gradient norm is exactly zero: it would go on, and learn nothing."""
    if norm == 0:
        raise UserError(
            f"step {step}: the gradient norm is exactly zero, so that nothing is learned: look at "
            f"what the loss depends on (in train.py try --compile=false); the last save stands"
        )


def weight_sums(params: Iterable[nn.Parameter]) -> Tensor:
    """A number for each tensor (n,) int64 that another value of any of its elements changes: the
    sum of their bits, read as integers."""
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = [local_part(p.detach()) for p in params]
    return torch.stack([part.view(views[part.element_size()]).sum() for part in parts])


def check_moved(before: Tensor, params: Iterable[nn.Parameter], lr: float, run: Run) -> None:
    """End a run whose step, at learning rate lr, left every weight of all processes as it was:
    `before` is what weight_sums gave."""
    [n_moved] = run.sum(not torch.equal(before, weight_sums(params)))
    if n_moved == 0:
        raise UserError(
            f"the first step moved no weight (learning rate {lr:g}): raise learning_rate, or look "
            f"at what the optimizer was given; the last save stands"
        )


# --------------------------------------------------------------------------------------------------
# Memory, and what a run was made with


@contextlib.contextmanager
def advice_on_memory(advice: Callable) -> Iterator[None]:
    """A line in the place of a traceback when memory runs out: what advice() says to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice()}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is torch's, or the system's, for memory that is not there."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)  # on a CPU it is the allocator's word alone


def made_with() -> dict:
    """What run.json says beside the settings: the command, the commit, versions."""
    commit = None
    ask = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    if not IS_INSTALLED:  # a repository around an environment is another one
        with contextlib.suppress(OSError):  # no git here
            said = subprocess.run(ask, capture_output=True).stdout
            commit = said.decode(errors="replace").strip() or None
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    return {"command": " ".join(sys.argv), "commit": commit, "versions": versions}
