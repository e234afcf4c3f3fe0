"""How much of a long run's time is training, where processes fail, and how often to save.

    best_interval(mtbf=3 * 3600, save=30, restart=600)     # seconds
    simulate(interval, mtbf, save, restart, seed=0)        # the part of the time that is kept

A run trains for `interval` seconds, saves for `save`, and so on. Failures come at random, on
average every `mtbf` seconds of the whole machine; what was done since the last save is lost, and
`restart` seconds go by before training goes on."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Goodput:
    """What failures leave of a run that saves as often as is best. In seconds."""

    mtbf: float  # between failures, of all devices together
    save: float  # for which training waits
    restart: float
    interval: float  # of training between two saves
    goodput: float  # the part of the time that is kept

    @staticmethod
    def of(mtbf: float, save: float, restart: float) -> Goodput:
        interval = best_interval(mtbf, save, restart)
        return Goodput(mtbf, save, restart, interval, goodput(interval, mtbf, save, restart))


def machine_mtbf(device_mtbf: float, n: int) -> float:
    """Of n devices any of which stops the run, the mean time between failures."""
    return device_mtbf / n


def goodput(interval: float, mtbf: float, save: float, restart: float) -> float:
    """The part of the time that is training that is kept: exact for failures that come as a Poisson
    process, also while saving and restarting (Daly 2006, equation 20)."""
    if (interval + save + restart) / mtbf > 500:  # no interval is ever completed
        return 0.0
    spent = mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf)
    return interval / spent


def young(mtbf: float, save: float) -> float:
    """The best interval to first order, sqrt(2 save mtbf) (Young 1974)."""
    return math.sqrt(2 * save * mtbf)


def daly(mtbf: float, save: int) -> float:
    """The same to higher order, but for saves longer than half of mtbf (Daly 2006, equation 37)."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return young(mtbf, save) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def best_interval(mtbf: float, save: float, restart: float) -> float:
    """The interval of the highest goodput, by search: on a grid of ratios of 2 %."""
    first = young(mtbf, save)
    candidates = [first * 1.02**i for i in range(-150, 100)]
    return max(candidates, key=lambda interval: goodput(interval, mtbf, save, restart))


def simulate(interval: float, mtbf: float, save: int, restart: int, seed: int = 0,
             n_failures: int = 10000) -> float:  # fmt: skip
    """The part of the time that is kept in a run with so many failures, drawn from the seed."""
    draw = random.Random(seed)
    trained = 0.0
    spent = 0.0
    starting = 0.0  # seconds of the restart that are still to come
    for _ in range(n_failures):
        until = draw.expovariate(1 / mtbf)
        spent += until
        at_work = until - starting
        starting = restart  # behind the failure; one within a restart begins it anew
        if at_work > 0:
            trained += interval * (at_work // (interval + save))
    return trained / spent
