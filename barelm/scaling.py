"""Scaling laws: the loss that a size and a length promise, the best size for a budget, a network of
that size, and a law fitted to runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from barelm.optim import n_params
from barelm.run import UserError
from model import GPT, GPTConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


# Expected loss E + A / N^ALPHA + B / D^BETA of N parameters after D tokens: the form of Hoffmann et
# al. 2022 (Chinchilla), approach 3, with the constants that Besiroglu et al. 2024 found for it.
E = 1.8172
A = 482.01
B = 2085.43
ALPHA = 0.3478
BETA = 0.3658
# It is least where 6 N D = c FLOPs at N = G (c / 6)^SHARE (Hoffmann et al. 2022, equation 4).
G = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
SHARE = BETA / (ALPHA + BETA)


def chinchilla_loss(n: int | np.ndarray, d: float | np.ndarray) -> float | np.ndarray:
    """Nats per token of Chinchilla's tokenizer and data, of n parameters after d tokens."""
    return E + A / n**ALPHA + B / d**BETA


def chinchilla_params(flops: float) -> float:
    """The best number of parameters for so many FLOPs."""
    return G * (flops / 6) ** SHARE


def chinchilla_flops(n: float | None = None, d: float | None = None) -> float:
    """The FLOPs for which n parameters, or else d tokens, are the best."""
    if n:
        return 6 * (n / G) ** (1 / SHARE)
    return 6 * (d * G) ** (1 / (1 - SHARE))


def empty_network(config: GPTConfig) -> GPT:
    """A GPT whose tensors have shapes and no memory, to be counted."""
    with torch.device("meta"):
        return GPT(config)


def suggest_shape(n: float, vocab_size: int, seq_len: int) -> tuple[GPTConfig, int]:
    """(a GPTConfig of about n parameters, at most 10 % off; its count of them): near 64 of width a
    layer, which is GPT-2's; the loss hardly depends on it (Kaplan et al. 2020, 3.1)."""
    head_dim = 128
    if n < 3e9:
        head_dim = 64
    if n < 5e6:
        head_dim = 32
    step = 8 if n > 1e9 else 1  # then heads of keys and values are 8, of which n_head is a multiple
    candidates = []
    for n_head in range(step, 257, step):
        shape: dict = dict(
            vocab_size=vocab_size, n_ctx=seq_len, n_head=n_head, n_embd=head_dim * n_head
        )
        shape["n_kv_head"] = 8 if n > 1e9 else n_head
        net = empty_network(GPTConfig(n_layer=1, **shape))
        one_layer = n_params(net)
        more = n_params(net.model.layers[0])  # of each further layer
        if one_layer > 1.1 * n:  # and so are all wider ones
            break
        n_layer = max(1, round((n - one_layer) / more) + 1)
        count = one_layer + (n_layer - 1) * more
        off = abs(math.log(count / n))
        if off < math.log(1.1):
            oddness = abs(math.log(head_dim * n_head / n_layer / 64)) + 5 * off
            candidates.append((oddness, count, GPTConfig(n_layer=n_layer, **shape)))
    if not candidates:
        why = f"no shape of {n:.3g} parameters with a vocabulary of {vocab_size:,}"
        raise UserError(f"{why}: ask for another size, or prepare data with a smaller --vocab_size")
    _, count, config = min(candidates, key=lambda candidate: candidate[0])
    return config, count


@dataclass
class Law:
    """L = offset + sum over k of factors[k] / size_k^powers[k], and its rms error over the runs
    that it was fitted to."""

    error: float
    offset: float
    factors: np.ndarray  # (K,)
    powers: np.ndarray  # (K,)

    def predict(self, sizes: Any) -> float | np.ndarray:
        """The losses of sizes (..., K)."""
        return self.offset + (self.factors / np.asarray(sizes, float) ** self.powers).sum(-1)


def least_squares(columns: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """(rms error, coefficients >= 0 of the columns (runs, k) that come nearest y): of every subset
    of the columns the best whose plain solution has no negative."""
    n_columns = columns.shape[1]
    best_error = math.inf
    best = np.zeros(n_columns)
    for chosen in product((False, True), repeat=n_columns):
        subset = list(chosen)
        solution = np.zeros(n_columns)
        solution[subset] = np.linalg.lstsq(columns[:, subset], y, rcond=None)[0]
        error = float(np.sqrt(np.mean((columns @ solution - y) ** 2)))
        if solution.min() >= 0 and error < best_error:
            best_error = error
            best = solution
    return best_error, best


def fit_powers(sizes: Any, losses: np.ndarray, powers: Sequence[float]) -> Law:
    """The Law of these exponents (K,) that is nearest losses (runs,) of sizes (runs, K): the other
    numbers of it are linear."""
    powers = np.array(powers)
    middle = np.exp(np.log(sizes).mean(0))  # (K,): columns near 1 are solved exactly
    columns = np.c_[np.ones(len(losses)), (middle / sizes) ** powers]  # (runs, 1 + K)
    error, solution = least_squares(columns, losses)
    return Law(error, solution[0], solution[1:] * middle**powers, powers)  # type: ignore[arg-type]


def fit_law(sizes: Any, losses: np.ndarray) -> Law:
    """The Law nearest losses (runs,) of sizes (runs, K), in least squares, its exponents found on
    grids that are ever finer around the best."""
    grids = [np.linspace(0.05, 2, 24)] * sizes.shape[1]
    for spread in 0.09 * 0.4 ** np.arange(14):
        laws = [fit_powers(sizes, losses, powers) for powers in product(*grids)]
        best = min(laws, key=lambda law: law.error)
        grids = [np.clip(p + spread * np.linspace(-1, 1, 7), 0.01, 3) for p in best.powers]
    return best
