"""How the next token is chosen from logits: penalties, filters, draws.

    kinds = kinds_of(columns)  # on the host, once for a batch of options
    tokens = draw_tokens(logits, uniform, columns, kinds)  # (B,), nothing waits for the device

Each row of a batch has options of its own, `columns`: a dict of (B, 1) tensors beside the logits.
What the host knows of them, `Kinds`, decides which operations there are: so that no operation looks
at the device's numbers, and a CUDA graph can hold them all. V: the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from barelm.run import UserError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_FLOAT = torch.finfo(torch.float32).max
GREEDY = 1e-20  # below it a temperature counts as 0: what it divides would overflow float32
SAMPLING = {  # what `generate` takes: (least, most)
    "temperature": (0, LARGEST_FLOAT),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 1e6),
    "num_beams": (1, math.inf),
    "speculate": (0, 64),
}
OFF = {  # the options of a row, as they change nothing but that it draws
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}
FILTERS = ("temperature", "top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def check_sampling(**options: Any) -> None:
    """Refuse an option of `generate` that is beyond its range, or no number."""
    for name, value in options.items():
        least, most = SAMPLING[name]
        if least <= value <= most:  # NaN is neither
            continue
        limits = f"from {least} to {most}"
        if most >= LARGEST_FLOAT:
            limits = f"{least} or more, and finite"
        raise UserError(f"{name}={value!r}: expected a number {limits}")


@dataclass(frozen=True)
class Kinds:
    """What is done to a batch's logits, as the host knows it from the rows' options."""

    sampled: bool = False  # a row draws; where none does, the likeliest tokens are taken
    top_k: int = 0  # no row's is larger; 0: none has one
    top_p: bool = False  # a row has one below 1
    min_p: bool = False  # a row has one above 0
    penalized: bool = False  # a row has a penalty
    prolonged: bool = False  # a row has min_tokens
    biased: bool = False  # a row has a bias on some tokens
    guided: bool = False  # a row may have certain tokens alone: barelm/grammar.py


def kinds_of(options: list[dict[str, float]]) -> Kinds:
    """The Kinds of rows, of which each has a dict like OFF, or a part of one."""
    sampled = [o for o in options if o.get("temperature", 1.0) >= GREEDY]
    penalized = False
    for name in PENALTIES:
        penalized = penalized or any(o.get(name, OFF[name]) != OFF[name] for o in options)
    return Kinds(
        sampled=bool(sampled),
        # A power of two: so that there are few kinds, each of which is a CUDA graph.
        top_k=power_of_two(max([0, *(o.get("top_k", 0) for o in sampled)])),
        top_p=any(o.get("top_p", 1.0) < 1 for o in sampled),
        min_p=any(o.get("min_p", 0.0) > 0 for o in sampled),
        penalized=penalized,
        prolonged=any(o.get("min_tokens", 0) > 0 for o in options),
    )


def power_of_two(n: float) -> int:
    """The least power of two that is n or more; 0 of 0 and of less."""
    return 1 << (int(n) - 1).bit_length() if n > 0 else 0


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float | list[float] = 1.0,
                  top_k: int | list[int] = 0, top_p: float | list[float] = 1.0,
                  min_p: float | list[float] = 0.0) -> Tensor:  # fmt: skip
    """`draw_tokens` by options that are numbers, or lists with one for each row."""
    values = (temperature, top_k, top_p, min_p)
    rows = torch.stack([option_row(value, len(logits)) for value in values], 1)  # (B, 4)
    options = [dict(zip(FILTERS, row)) for row in rows.tolist()]
    rows = rows.to(logits.device)
    columns = {name: rows[:, i : i + 1] for i, name in enumerate(FILTERS)}
    return draw_tokens(logits, uniform, columns, kinds_of(options))


def option_row(option: float | list, batch: int) -> Tensor:
    """A number, or a list with one for each row, as (batch,) float32 on the host."""
    return torch.tensor(option, dtype=torch.float32).expand(batch)


def draw_tokens(
    logits: Tensor, uniform: Tensor | None, columns: dict[str, Tensor] | None, kinds: Kinds
) -> Tensor:
    """One token a row (B,) from logits (B, V), the distribution inverted at uniform (B,), so that
    no draw depends on the rest of the batch. top_k, top_p (Holtzman et al. 2020) and min_p (Nguyen
    et al. 2024) filter in this order, as in transformers; temperature 0, or below GREEDY, takes the
    likeliest. columns: the options of FILTERS, (B, 1) float32 each."""
    if not kinds.sampled:
        return logits.argmax(-1)
    draws_one = columns["temperature"] >= GREEDY  # (B, 1)
    drawn = invert(filtered(logits, columns, kinds), uniform)
    return drawn.where(draws_one[:, 0], logits.argmax(-1))


def filtered(logits: Tensor, columns: dict[str, Tensor], kinds: Kinds) -> Tensor:
    """By what probabilities (B, V) `draw_tokens` draws, but for a factor; arguments are its own."""
    temperature = columns["temperature"]
    draws_one = temperature >= GREEDY  # (B, 1)
    # The likeliest becomes 0, so that no quotient is beyond float32 but by being very unlikely.
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled = scaled / temperature.where(draws_one, 1.0)
    if kinds.top_k:
        scaled = keep_top_k(scaled, logits, columns["top_k"], kinds.top_k)
    probs = scaled.softmax(-1)  # (B, V)
    if kinds.top_p:
        probs = keep_top_p(probs, columns["top_p"])
    if kinds.min_p:
        probs = keep_min_p(probs, columns["min_p"])
    return probs


def invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the sum of probs (B, V), of any total, passes the part uniform (B,)
    of it."""
    mass = probs.cumsum(-1)
    # The mass may end a rounding below 1: no threshold lies beyond its end.
    threshold = uniform[:, None] * (1 - 2**-20) * mass[:, -1:]
    return (mass <= threshold).sum(-1)


def distribution(logits: Tensor, columns: dict[str, Tensor], kinds: Kinds) -> Tensor:
    """The probabilities (B, V) by which `draw_tokens` chooses: all on one token where greedy."""
    greedy = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if not kinds.sampled:
        return greedy
    probs = filtered(logits, columns, kinds)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs.where(columns["temperature"] >= GREEDY, greedy)


def keep_top_k(scaled: Tensor, logits: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """scaled (B, V), -inf but for each row's top_k (B, 1) largest logits; 0 keeps all. No row's
    top_k is above `largest`."""
    k = min(largest, logits.shape[-1])
    best = logits.topk(k).values  # (B, k)
    last = best.gather(1, top_k.long().clamp(1, k) - 1)  # (B, 1): each row's own k-th
    # By the logits: where the temperature rounds two to the same, they are still apart.
    return scaled.masked_fill((logits < last) & (top_k > 0), -math.inf)


def keep_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """probs (B, V), 0 but for each row's likeliest tokens that reach top_p (B, 1) together; all of
    a row whose top_p is 1."""
    if probs.device.type == "cpu":  # where a sort is slow, and to look at top_p costs nothing
        rows = (top_p[:, 0] < 1).nonzero()[:, 0]
        return probs.index_copy(0, rows, likeliest(probs[rows], top_p[rows]))
    return likeliest(probs, top_p).where(top_p < 1, probs)


def likeliest(probs: Tensor, top_p: Tensor) -> Tensor:
    """probs (N, V), 0 but for each row's likeliest tokens that reach top_p (N, 1) together."""
    ordered, order = probs.sort(descending=True, stable=True)  # (N, V)
    before = ordered.cumsum(-1) - ordered  # what is likelier than each
    beyond = before >= top_p
    beyond[:, :1] = False  # whatever top_p, the likeliest stays
    ordered = ordered.masked_fill(beyond, 0)
    return torch.zeros_like(ordered).scatter(-1, order, ordered)


def keep_min_p(probs: Tensor, min_p: Tensor) -> Tensor:
    """probs (B, V), 0 where below min_p (B, 1) of the row's likeliest."""
    least = min_p * probs.amax(-1, keepdim=True)
    return probs.masked_fill(probs < least, 0.0)


def penalize(logits: Tensor, seen: Tensor, repetition: float | Tensor, counts: Tensor = 0,
             presence: float | Tensor = 0.0,
             frequency: float | Tensor = 0.0) -> Tensor:  # fmt: skip
    """Logits (B, V), lower where a token is `seen` (B, V) bool (Keskar et al. 2019), and by how
    often it was said, `counts` (B, V): once `presence`, each time `frequency` (OpenAI's). Each
    penalty is a number, or (B, 1)."""
    lower = torch.where(logits > 0, logits / repetition, logits * repetition)
    # An infinite logit would make every probability NaN; padding of the vocabulary stays at -inf.
    lower = lower.clamp(-LARGEST_FLOAT, LARGEST_FLOAT)
    logits = torch.where(seen & (logits > -math.inf), lower, logits)
    return logits - presence * (counts > 0) - frequency * counts


def hold_ends(logits: Tensor, ends: Tensor, is_early: Tensor) -> Tensor:
    """Logits (B, V), -inf at the ids `ends` (B, E) of rows that may not end yet, is_early (B, 1)
    bool; -1 is no id."""
    B, V = logits.shape
    is_end = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
    is_end = is_end.scatter(1, ends + 1, True)[:, 1:]
    return logits.masked_fill(is_end & is_early, -math.inf)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """(B, n) bool from bits (B, bytes) uint8, the lowest of each byte first; false behind them."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] >> places & 1).flatten(1)[:, :n].bool()
    return torch.nn.functional.pad(bits, (0, n - bits.shape[1]))


def draws(seed: int, i: int, n: int) -> Tensor:
    """The n uniform numbers of row i: they depend on nothing else."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
    return torch.rand(n, generator=generator)
