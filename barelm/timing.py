"""Calls timed in turn, A B A B, so that all else on the machine slows all alike, and the rows that
this makes: their times, rates and shares of a ceiling."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from barelm.devices import memory_used, synchronize
from barelm.run import Run, autocast
from model import GPTConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from model import GPT

SHORTEST = 0.002  # seconds: a sample of a quicker call is the mean of several
LONGEST = 15.0  # seconds: rows that take longer make do with three rounds, or one
PRODUCT = 0.5  # seconds: a matrix product for a ceiling takes less, or a smaller one is timed
# What the work of a call is counted in: how many make a unit of the rate, and the unit's name.
UNITS = {
    "flops": (1e9, "GFLOP/s"),
    "bytes": (1e9, "GB/s"),
    "text_bytes": (1e6, "MB/s"),
    "tokens": (1, "tokens/s"),
}


def measure(calls: dict[str, Callable], seconds: float, sync: Callable = lambda: None,
            clock: Callable = time.perf_counter) -> dict[str, list[float]]:  # fmt: skip
    """Time the functions of {name: function} in turn: {name: [seconds of a call, one a round]}.
    sync: waits until the device has done what it was given."""

    def timed(call, n):
        start = clock()
        for _ in range(n):
            call()
        sync()
        return clock() - start

    repeats = {}
    for name, call in calls.items():  # which also warms up
        repeats[name] = math.ceil(SHORTEST / max(timed(call, 1), 1e-6))
    times = {name: [] for name in calls}
    begun = clock()
    rounds = 0
    while not is_enough(rounds, clock() - begun, seconds):
        rounds += 1
        for name, call in calls.items():
            times[name].append(timed(call, repeats[name]) / repeats[name])
    return times


def is_enough(rounds: int, spent: float, seconds: float) -> bool:
    """Whether so many rounds, which took `spent` seconds, are enough."""
    if rounds == 0:
        return False
    if rounds < 3:  # one is enough of what takes a minute
        return spent >= 3 * LONGEST
    return spent >= LONGEST or (rounds >= 5 and spent >= seconds)


def title(text: str, note: str = "") -> None:
    print(f"\n{text}")
    if note:
        print(f"  ({note})")
    print(f"  {'':<33} {'ms, median':>10}  {'10 % to 90 %':<21} {'rate':>15}  of the ceiling")


def rounded(row: dict) -> dict:
    """A row with its floats at six digits."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


@dataclass
class Bench:
    """Where and how all is measured, and what was measured so far."""

    run: Run
    dtype: torch.dtype = torch.float32  # to compute in
    config: GPTConfig | None = None  # the shape of the network
    seconds: float = 2.0  # time of calls that are timed in turn, if five rounds fit it
    rows: list = field(default_factory=list)  # dicts, as the last line prints them
    ceilings: dict = field(default_factory=dict)  # {"float32": FLOP/s, "read": byte/s, ...}
    left_out: set = field(default_factory=set)  # what skip has told

    @property
    def device(self) -> torch.device:
        return self.run.device

    @property
    def is_cuda(self) -> bool:
        return self.run.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def cast(self) -> Any:
        """A context in which the network computes in the bench's dtype."""
        return autocast(self.device, self.dtype)

    def sync(self) -> None:
        synchronize(self.device)

    def measure(self, calls: dict) -> dict:
        return measure(calls, self.seconds, self.sync)

    def row(self, part: str, name: str, times: list[float], ceiling: str | None = None,
            peak: float | None = None, **facts: Any) -> None:  # fmt: skip
        """Keep and print a measurement. Those of the facts that UNITS names are the work of one
        call; the first of them is what the ceiling of this name is for."""
        low, mid, high = np.percentile(times, [10, 50, 90]).tolist()
        row = {"part": part, "name": name, "samples": len(times)} | facts
        row |= {"ms": 1e3 * mid, "ms_p10": 1e3 * low, "ms_p90": 1e3 * high}
        rates = {unit: facts[unit] / mid for unit in UNITS if unit in facts}
        words = []
        for unit, rate in rates.items():
            size, unit_name = UNITS[unit]
            words.append(f"{rate / size:,.{int(size > 1)}f} {unit_name}")
            row[f"{unit}_per_s"] = rate
        share = ""
        if ceiling in self.ceilings:
            rate = next(iter(rates.values()))
            self.raise_ceiling(ceiling, rate)
            row |= {"ceiling": ceiling, "percent": 100 * rate / self.ceilings[ceiling]}
            share = f"{row['percent']:.1f} % of {ceiling}"
        if peak is not None:
            row["peak_bytes"] = peak
            words.append(f"peak {peak / 2**20:,.0f} MiB")
        self.rows.append(rounded(row))
        line = f"  {name:<33} {1e3 * mid:>10.3f}  {f'{1e3 * low:.3f} to {1e3 * high:.3f}':<21}"
        line += f" {''.join(words[:1]):>15}  {share:<18}  {'  '.join(words[1:])}"
        print(line.rstrip(), flush=True)

    def raise_ceiling(self, name: str, rate: float) -> None:
        """A row that beats its ceiling is the new one: the products that were timed for it were not
        the best."""
        if rate > self.ceilings[name]:
            print(f"  -> {name}: {rate / self.ceilings[name]:.2f} of its ceiling, which it now is")
            self.ceilings[name] = rate

    def table(self, part: str, calls: dict, ceiling: str | None = None,
              peaks: dict | None = None, factors: bool = False, **facts: Any) -> None:  # fmt: skip
        """Rows of calls of equal work, timed in turn; `factors`: say how each compares with the
        first."""
        times = self.measure(calls)
        for name in times:
            self.row(part, name, times[name], ceiling, (peaks or {}).get(name), **facts)
        if not factors:
            return
        medians = {name: np.median(t) for name, t in times.items()}
        first, *others = medians
        for name in others:
            ratio = f"{medians[name] / medians[first]:.2f} times as slow"
            if medians[name] < medians[first]:
                ratio = f"{medians[first] / medians[name]:.2f} times as fast"
            print(f"  -> {name} is {ratio} as {first}")

    def skip(self, name: str, why: str) -> None:
        """Say once why a row is left out."""
        if (name, why) not in self.left_out:
            self.left_out.add((name, why))
            print(f"  {name}: left out: {(why.strip() or 'it failed').splitlines()[0]}")

    def working(self, calls: dict[str, Callable]) -> dict[str, Callable]:
        """Those of {name: function} that run here; of each other one line says why it does not."""
        good = {}
        for name, call in calls.items():
            try:
                call()
                good[name] = call
            except RuntimeError as error:
                self.skip(name, str(error))
        return good

    def peak_memory(self, call: Callable) -> int:
        """The most bytes that are in use while call() runs, over those before."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(
            OSError, AttributeError
        ):  # Linux; elsewhere it is the growth alone
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would serve unseen
            Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
        before = memory_used(self.device)
        call()
        return memory_used(self.device) - before


# --------------------------------------------------------------------------------------------------
# The ceilings


def product_size(bench: Bench, dtype: torch.dtype) -> int:
    """How large a square matrix of this dtype can be whose product takes less than PRODUCT seconds:
    a CPU that has no such products needs minutes for what another does in 20 ms."""
    n = 128
    largest = 8192 if bench.is_cuda else 2048
    while n < largest:
        a = torch.randn(n, n, device=bench.device, dtype=dtype)
        a @ a  # warm-up
        bench.sync()
        begun = time.perf_counter()
        a @ a
        bench.sync()
        spent = time.perf_counter() - begun
        if 8 * spent > PRODUCT:  # what twice the size would take
            break
        n *= 2
    return n


def measure_ceilings(bench: Bench) -> None:
    """What no program on this machine can beat by much: the best that was seen."""
    size = 1 << 28 if bench.is_cuda else 1 << 27  # numbers: more than any cache holds
    title(f"ceilings: square matrix products, and {4 * size / 2**20:,.0f} MiB of memory")
    names = ["float32", "bfloat16"]
    if bench.is_cuda:
        names.append("float16")
    for name in names:
        dtype = getattr(torch, name)
        n = product_size(bench, dtype)
        a = torch.randn(n, n, device=bench.device, dtype=dtype)
        bench.table("ceilings", {name: partial(torch.matmul, a, a)}, flops=2 * n**3, size=n)
    a = torch.randn(size, device=bench.device)
    b = torch.randn(size, device=bench.device)
    bench.table("ceilings", {"read": a.sum}, bytes=a.nbytes)
    both = {"copy": partial(b.copy_, a), "update": partial(a.mul_, 0.999)}
    bench.table("ceilings", both, bytes=2 * a.nbytes)  # read and written
    for row in bench.rows:
        calls_a_second = 1e3 / row["ms_p10"]
        bench.ceilings[row["name"]] = calls_a_second * row.get("flops", row.get("bytes"))


def weight_bytes(net: GPT) -> int:
    """The bytes that one step of decoding reads: all weights once, but an embedding only as a tied
    head."""
    tensors = {}
    for module in net.modules():
        if not isinstance(module, torch.nn.Embedding):
            for t in (*module.parameters(False), *module.buffers(False)):
                tensors[t.data_ptr()] = t.nbytes
    return sum(tensors.values())
