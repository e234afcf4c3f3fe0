"""How many threads this process computes with on the CPU, and whether they get their cores.

Threads wait for each other at the end of every operation, so that one which has no core stops all:
where another program takes one of two cores, two threads are slower than one (docs/platforms.md).
So the number follows from what this process may use, and it is said where it stays without cores.

The number may change the last bits of a result, since sums are parted among the threads. It depends
on nothing that comes and goes, such as the load: the same seed on the same machine gives the same.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from barelm import host
from barelm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from barelm.run import Run

# What else says how many threads there are to be: OpenMP's variable, and that of MKL.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
EVERY = 5.0  # seconds from one look at the threads to the next
LOST = 0.4  # seconds of waiting for a core, of all threads in a second, from which it is told


@dataclass(frozen=True)
class Threads:
    """How many threads a process computes with, and why."""

    n: int = 1
    reason: str = "as it was"
    is_usual: bool = True  # whether torch would have taken as many

    def words(self) -> str:
        return f"{self.n} ({self.reason})"

    def note(self) -> None:
        """Say it on standard error, where it is not what torch would have taken."""
        if not self.is_usual:
            print(f"threads: {self.words()}", file=sys.stderr)


def worker_count(asked: int = 0) -> int:
    """How many processes to work in: as asked, or 0: a core each, of those that are for this
    process among the others that torchrun started beside it."""
    beside = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    return asked or max(1, host.usable_cores() // beside)


def set_threads(asked: int = 0) -> Threads:
    """Let torch compute with so many threads, 0: as many as this process has cores for. Returns
    Threads. Where the choice is torch's own, torch is left as it is."""
    if asked < 0:
        raise UserError(f"--threads={asked}: expected 1 or more, or 0 for what the cores allow")
    usual = torch.get_num_threads()
    cores = host.allowed_cores()
    n, reason = plan_threads(asked, usual, cores, host.cpu_quota(), os.environ)
    if n != usual:
        torch.set_num_threads(n)
    return Threads(n, reason, is_usual=n == usual)


def plan_threads(
    asked: int, usual: int, cores: int, quota: float | None, variables: Mapping[str, str]
) -> tuple[int, str]:
    """(how many threads, why) for what was asked (0: nothing), what torch would take, the cores of
    this process's affinity, its quota of cores' time or None, and the environment's variables."""
    n_processes = max(1, int(variables.get("LOCAL_WORLD_SIZE") or 1))
    limit = cores
    whose = "1 core" if cores == 1 else f"{cores} cores"
    if quota is not None and host.whole_cores(quota) < cores:
        limit = host.whole_cores(quota)
        whose = f"a quota of {quota:.3g} of {cores} cores"
    if asked:
        too_many = f", for {whose}: they will wait for each other"
        return asked, f"as asked{too_many if asked > limit else ''}"
    share = max(1, limit // n_processes)
    for name in VARIABLES:
        if variables.get(name):
            hint = ""
            if usual < share and n_processes > 1:  # torchrun's 1, most likely
                hint = f"; --threads={share} would take all of {whose}"
            return usual, f"{name}{hint}"
    if n_processes > 1:
        whose += f" for {n_processes} processes"
    return min(usual, share), whose


class ThreadWatch:
    """Looks now and then whether the threads of a loop's steps had cores, and says so once if they
    had not. It costs some microseconds every EVERY seconds."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.n_threads = torch.get_num_threads()
        self.has_spoken = run.device.type != "cpu"  # a GPU's steps do not wait for threads
        self.since = time.monotonic()
        self.waited = host.seconds_waited()

    def after_step(self) -> None:
        """Called behind each step."""
        now = time.monotonic()
        if self.has_spoken or now - self.since < EVERY:
            return
        waited = host.seconds_waited()
        lost = cores_lost(self.n_threads, self.waited, waited, now - self.since)
        self.since = now
        self.waited = waited
        words = advice(self.n_threads, lost)
        if words:
            self.run.say(f"note: {words}")
            self.has_spoken = True


def cores_lost(n_threads: int, before: float | None, after: float | None, seconds: float) -> float:
    """How many cores n_threads were short of, in the mean over so many seconds: by what they waited
    before and after (`host.seconds_waited`), beyond what a quota takes from them in any case; where
    the system tells no such thing, by the machine's load; 0.0 where that is not known either."""
    if after is not None and before is not None:
        quota = host.cpu_quota()
        by_quota = 0.0 if quota is None else max(0.0, n_threads - quota)
        return (after - before) / seconds - by_quota
    if hasattr(os, "getloadavg"):  # macOS: threads that run or would, of the last minute
        return min(n_threads, os.getloadavg()[0] - (os.cpu_count() or 1))
    return 0.0


def advice(n_threads: int, lost: float) -> str:
    """What is said of threads that were short of so many cores; "" where they had them."""
    if lost <= LOST:
        return ""
    if n_threads == 1:
        return (
            f"a step waits for its core for {min(1.0, lost):.0%} of the time: other programs take "
            "it (nice, or another machine)"
        )
    fewer = max(1, int(n_threads - lost))
    return (
        f"steps wait for their threads: of {n_threads} cores others take {min(n_threads, lost):.1f}"
        f", and all threads wait for the one that has none: --threads={fewer} may be faster"
    )
