"""The view Next token: by what probabilities the token after a text is drawn, filter by filter.

    logits = last_logits(net, ids, n_vocab)                      # (V,), a pass of the network
    steps = filter_steps(logits, {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0})
    steps.drawn                                                  # (V,), what is drawn by

Each step is barelm/sampling.py's own, with the filters behind it left out. Penalties of what was
said before are none of them. V: the tokenizer's vocabulary.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from barelm.answers import token_name
from barelm.api import ApiError, check_continues, is_ids, read_fields, too_long
from barelm.engine import NOT_FINITE
from barelm.jobs import limited
from barelm.page import read_ids
from barelm.sampling import FILTERS, choose_tokens, distribution, draws, filtered, kinds_of

if TYPE_CHECKING:
    from torch import Tensor

    from barelm.api import ServedModel
    from barelm.tokenizer import Tokenizer
    from model import GPT

RECENT_TEXTS = 16  # texts whose logits wait for other settings


def last_logits(net: GPT, ids: list[int], n_vocab: int) -> Tensor:
    """The logits (V,) float32, on the host, of what follows ids, a list of T."""
    ids = torch.tensor([ids], device=net.model.embed_tokens.weight.device)
    logits = net.logits(net.hidden(ids)[:, -1])[0, :n_vocab].float().cpu()
    if not logits.isfinite().all():
        raise ApiError(500, NOT_FINITE)
    return logits


class RecentLogits:
    """The logits of the texts that were asked about last: to change a filter costs no pass of the
    network. A key is whatever they depend on: the ids, and which weights are served."""

    def __init__(self) -> None:
        self.by_key = OrderedDict()  # {key: (V,)}, the newest at the end

    def get(self, key: tuple) -> Tensor | None:
        """The logits of this key, or None."""
        logits = self.by_key.get(key)
        if logits is not None:
            self.by_key.move_to_end(key)
        return logits

    def put(self, key: tuple, logits: Tensor) -> None:
        self.by_key[key] = logits
        while len(self.by_key) > RECENT_TEXTS:
            self.by_key.popitem(last=False)


# --------------------------------------------------------------------------------------------------
# The filters, one after the other


@dataclass
class FilterSteps:
    """What the filters leave of a distribution over V tokens."""

    plain: torch.Tensor  # (V,): the model's own probabilities
    scaled: torch.Tensor  # (V,): after the temperature
    drawn: torch.Tensor  # (V,): what is drawn by: after all filters, of sum 1
    cut_by: torch.Tensor  # (V,) int64: which of FILTERS took the token away; len(FILTERS): none
    left: dict  # {filter: how many tokens it leaves}


def filter_steps(logits: Tensor, options: dict) -> FilterSteps:
    """The FilterSteps of logits (V,) and options {filter: number}, for each of FILTERS."""
    logits = logits[None]  # (1, V): a batch of one
    columns = {name: torch.tensor([[float(options[name])]]) for name in FILTERS}
    kinds = kinds_of([options])
    drawn = distribution(logits, columns, kinds)
    stages = [drawn] * len(FILTERS)  # temperature 0 takes the likeliest, and no filter does more
    if kinds.sampled:
        stages = [
            filtered(logits, columns, replace(kinds, top_k=0, top_p=False, min_p=False)),
            filtered(logits, columns, replace(kinds, top_p=False, min_p=False)),
            filtered(logits, columns, replace(kinds, min_p=False)),
            drawn,
        ]
    remains = torch.cat(stages) > 0  # (4, V): a filter gives nothing back
    left = dict(zip(FILTERS, remains.sum(-1).tolist()))
    return FilterSteps(logits[0].softmax(-1), stages[0][0], drawn[0], remains.sum(0), left)


def draw(logits: Tensor, options: dict, seed: int, place: int) -> int:
    """The token that generation with these options and this seed draws `place` tokens behind its
    prompt, whose logits (V,) these are."""
    uniform = draws(seed, 0, place + 1)[place:]  # (1,)
    return int(choose_tokens(logits[None], uniform, **options))


def entropy(probabilities: Tensor) -> float:
    """In bits, of probabilities (V,)."""
    return float(-(probabilities * probabilities.clamp(min=1e-45).log2()).sum())


# --------------------------------------------------------------------------------------------------
# Requests and answers


@dataclass
class NextRequest:
    text: str | None = None
    ids: list | None = None  # instead of a text
    then: list = field(default_factory=list)  # ids that were drawn behind it
    n: int = limited(30, 1, 200)  # candidates to tell, the likeliest
    temperature: float = limited(1.0, 0, 100)
    top_k: int = limited(0, -1, 2**31)
    top_p: float = limited(1.0, 0, 1)
    min_p: float = limited(0.0, 0, 1)
    draw: bool = False  # tell a token drawn from it, too
    seed: int | None = limited(None, -(2**63), 2**63 - 1)  # of the draw; None: another each time

    def options(self) -> dict:
        values = asdict(self)
        return {name: values[name] for name in FILTERS} | {"top_k": max(self.top_k, 0)}


def read_next(served: ServedModel, body: dict) -> NextRequest:
    """A NextRequest with its ids, those of `then` among them."""
    check_continues(served)
    if served.is_seq2seq:
        raise ApiError(400, "this model reads a source and answers it: it continues no text")
    request = read_fields(body, NextRequest, neutral={}, ignored={})
    if not is_ids(served.tok, request.then):
        raise ApiError(400, f"then: expected ids from 0 to {served.tok.n_vocab - 1}", "then")
    request.ids = read_ids(served, request.text, request.ids) + request.then
    if not request.ids:
        raise ApiError(400, "0 tokens: nothing stands before the next one", "text")
    if len(request.ids) > served.max_len:
        raise too_long(served, f"{len(request.ids)} tokens")
    if request.seed is None:
        request.seed = random.getrandbits(48)
    return request


def next_answer(tok: Tokenizer, request: NextRequest, logits: Tensor) -> dict:
    """The likeliest candidates, each with its probability before and after the filters, and the one
    that took it away."""
    steps = filter_steps(logits, request.options())
    order = logits.argsort(descending=True, stable=True)[: request.n]
    columns = [t[order].tolist() for t in (steps.plain, steps.scaled, steps.drawn)]
    names = [*FILTERS, None]
    candidates = []
    for id, plain, scaled, drawn in zip(order.tolist(), *columns):
        row = {"token": id, "text": token_name(tok, id), "probability": significant(plain)}
        row |= {"scaled": significant(scaled), "drawn": significant(drawn)}
        candidates.append(row | {"cut": names[steps.cut_by[id]]})
    answer = {
        "count": len(request.ids),
        "then_strs": [token_name(tok, id) for id in request.then],
        "vocabulary": len(logits),
        "candidates": candidates,
        "left": steps.left,
        "covered": significant(float(steps.plain[steps.drawn > 0].sum())),
        "entropy": round(entropy(steps.plain), 4),
        "entropy_drawn": round(entropy(steps.drawn), 4),
    }
    if request.draw:
        id = draw(logits, request.options(), request.seed, len(request.then))
        answer["token"] = {"token": id, "text": token_name(tok, id)}
    return answer


def significant(number: float) -> float:
    """With six digits that count."""
    return float(f"{number:.6g}")
