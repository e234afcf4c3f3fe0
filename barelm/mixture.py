"""Several data sets in one sequence of windows, by weights that change at steps (train.py --mix).

    --mix="0:web=0.8,code=0.2;5000:web=0.6,code=0.4"

Which data set a position of the sequence takes its window from, and which window of it, depends on
the seed and on the position alone, as everything in barelm/shards.py does. So a resume is exact in
the middle of a stage, on any number of processes, and a batch may straddle a change.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

PERIOD = 1000  # windows in which each data set has exactly its share, in an order drawn for each
EXAMPLE = '"0:web=0.8,code=0.2;5000:web=0.6,code=0.4"'


@dataclass(frozen=True)
class Stage:
    """The weights that hold from a step on."""

    step: int
    weights: dict[str, float]  # {data set: its share}, which add up to 1


def parse_mix(text: str) -> list:
    """The [Stage] that a --mix says, in order; [] of an empty one."""
    stages = []
    for part in text.split(";"):
        if part.strip():
            stages.append(parse_stage(part.strip(), text))
    if not stages:
        return []
    steps = [stage.step for stage in stages]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise UserError(f"mix={text}: its steps are {steps}: expected 0, and then larger ones")
    return stages


def parse_stage(part: str, text: str) -> Stage:
    """The Stage of "5000:web=0.6,code=0.4"; a part without a step holds from step 0."""
    step, weights = re.fullmatch(r"(?:(\d+):)?(.*)", part, re.S).groups()
    shares = {}
    for pair in weights.split(","):
        name, _, number = pair.rpartition("=")  # an address may have an = of its own
        name = name.strip()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in shares or not 0 <= weight < math.inf:
            raise UserError(f"mix={text}: {pair.strip()!r}: expected NAME=WEIGHT, as in {EXAMPLE}")
        shares[name] = weight
    total = sum(shares.values())
    if total == 0:
        raise UserError(f"mix={text}: {part!r}: expected a weight above 0")
    return Stage(int(step or 0), {name: weight / total for name, weight in shares.items()})


def names_of(stages: list) -> list:
    """The data sets of all stages, each once, in the order of their first places."""
    names = {}
    for stage in stages:
        names |= dict.fromkeys(stage.weights)
    return list(names)


def quotas_of(stage: int, names: Sequence[str]) -> np.ndarray:
    """How many of PERIOD windows each of the data sets has: (len(names),) int64, by the method of
    largest remainders."""
    wanted = np.array([PERIOD * stage.weights.get(name, 0.0) for name in names])
    quotas = np.floor(wanted).astype(np.int64)
    missing = PERIOD - int(quotas.sum())
    largest_first = np.argsort(quotas - wanted, kind="stable")
    quotas[largest_first[:missing]] += 1
    for name, weight, quota in zip(names, wanted, quotas):
        if weight > 0 and quota == 0:
            least = f"expected {1 / PERIOD:g} or more, or 0"
            raise UserError(f"mix: {name} has a share of {weight / PERIOD:.2g}: {least}")
    return quotas


class JoinedWindows:
    """The windows of several data sets, numbered one data set after another: n and `rows`, as
    barelm.shards.Windows has them. windows: {name: Windows}."""

    def __init__(self, windows: dict) -> None:
        self.parts = list(windows.values())
        self.seq_len = self.parts[0].seq_len
        self.first_index = np.cumsum([0, *(part.n for part in self.parts)])  # of each, and the end
        self.n = int(self.first_index[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The windows of these indices: (len(indices), seq_len + 1) int64."""
        indices = np.asarray(indices)
        owners = np.searchsorted(self.first_index, indices, side="right") - 1
        rows = None
        for number in np.unique(owners):
            own = indices[owners == number] - self.first_index[number]
            windows = self.parts[number].rows(own.tolist())
            if rows is None:
                rows = np.empty((len(indices), windows.shape[1]), np.int64)
            rows[owners == number] = windows
        return rows


class MixedWindows(JoinedWindows):
    """The same in one global sequence, by weights: `at` too. Each data set goes through its own
    windows in its own order, from one epoch to the next, whatever the stage.

    windows_per_step: of an optimizer step, by which the stages' steps become positions."""

    def __init__(self, windows: dict, stages: list, windows_per_step: int, seed: int = 0) -> None:
        super().__init__(windows)
        self.seed = seed
        self.begins = stage_begins(stages, windows_per_step)
        self.quotas = [quotas_of(stage, list(windows)) for stage in stages]
        self.pattern_of = None  # (stage, period) whose pattern it is:
        self.pattern = None
        # For each stage, the windows that each data set has given before it: (data sets,) int64.
        self.before = [np.zeros(len(windows), np.int64)]
        for stage in range(1, len(stages)):
            length = self.begins[stage] - self.begins[stage - 1]
            taken = self.before[-1] + self.taken_in(stage - 1, length)
            self.before.append(taken)

    def taken_in(self, stage: int, length: int) -> np.ndarray:
        """How many windows each data set gives in the first `length` of a stage."""
        n_periods, rest = divmod(length, PERIOD)
        which, _ = self.pattern_at(stage, n_periods)
        return n_periods * self.quotas[stage] + np.bincount(which[:rest], minlength=len(self.parts))

    def pattern_at(self, stage: int, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a period's windows (PERIOD,) int64 each: the data set of each, and how many windows
        this data set has given before in the period."""
        if self.pattern_of != (stage, period):
            quotas = self.quotas[stage]
            which = np.repeat(np.arange(len(quotas)), quotas)
            which = np.random.default_rng([self.seed, stage, period]).permutation(which)
            nth = np.zeros(PERIOD, np.int64)
            for number, quota in enumerate(quotas):
                nth[which == number] = np.arange(quota)
            self.pattern = which, nth
            self.pattern_of = stage, period
        return self.pattern

    def at(self, position: int) -> int:
        """The window at a position of the global sequence: a number below n."""
        stage = int(np.searchsorted(self.begins, position, side="right")) - 1
        period, k = divmod(position - self.begins[stage], PERIOD)
        which, nth = self.pattern_at(stage, period)
        number = int(which[k])
        own_position = self.before[stage][number] + period * self.quotas[stage][number] + nth[k]
        return int(self.first_index[number]) + self.parts[number].at(int(own_position))


def stage_begins(stages: list, windows_per_step: int) -> list:
    """The position of the global sequence at which each stage begins."""
    return [stage.step * windows_per_step for stage in stages]


def check_same_until(windows: int, before: tuple[str, int], now: tuple[str, int]) -> None:
    """Refuse a mix on a resume that would have read other windows before this position. before,
    now: (mix, windows of a step) of the run until now, and of the resume."""
    plans = []
    for text, windows_per_step in (before, now):
        stages = parse_mix(text)
        plan = []
        for begin, stage in zip(stage_begins(stages, windows_per_step), stages):
            if begin < windows:
                plan.append((begin, stage.weights))
        plans.append(plan)
    if plans[0] != plans[1]:
        why = f"the {windows:,} windows that were read would be others by it"
        was = f"{before[0]!r}, with {before[1]} windows a step"
        raise UserError(f"mix={now[0]!r}: {why}: until there keep its stages ({was})")
