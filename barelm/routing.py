"""The view Experts: which token of a text went to which expert, and how much each had to do.

    for route in expert_routes(net, ids):
        route.layer, route.experts, route.weights, route.load

The routers are asked in a usual pass. Layers, experts and positions count from 0. T: the tokens of
the text, E: n_experts, k: n_experts_per_token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from barelm.answers import token_name
from barelm.api import ApiError, read_fields
from barelm.attention_maps import GridRequest, attentive_part, ids_to_show
from barelm.engine import NOT_FINITE
from barelm.experts import Experts, load

if TYPE_CHECKING:
    from barelm.api import ServedModel
    from barelm.tokenizer import Tokenizer
    from model import GPT, GPTConfig


@dataclass
class Route:
    """What the router of a layer did with a text."""

    layer: int
    experts: list  # (T, k): the experts of each token, the likeliest first
    weights: list  # (T, k): by which the sum of what they say is weighted
    load: list  # (E,): how many tokens chose each expert


def expert_routes(net: GPT, ids: list[int]) -> list[Route]:
    """[Route] of the layers that have experts, in a pass over ids, a list of T."""
    routes = []

    def hook_of(layer, experts):
        def hook(router, args, scores):  # scores (T, E) float32, before their softmax
            weights, chosen = experts.choose(scores.softmax(-1))  # (T, k) each
            if not weights.isfinite().all():
                raise ApiError(500, NOT_FINITE)
            counts = load(chosen, net.config.n_experts)
            routes.append(Route(layer, chosen.tolist(), weights.tolist(), counts.tolist()))

        return experts.gate.register_forward_hook(hook)

    hooks = []
    for layer, block in enumerate(attentive_part(net).layers):
        if isinstance(block.mlp, Experts):
            hooks.append(hook_of(layer, block.mlp))
    try:
        net.hidden(torch.tensor([ids], device=net.model.embed_tokens.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return routes


def read_routes(served: ServedModel, config: GPTConfig, body: dict) -> list[int]:
    """The ids of a GridRequest; ApiError where the model has no experts."""
    if not config.n_experts or config.is_seq2seq:
        raise ApiError(400, f"{served.name} has no experts to show")
    return ids_to_show(served, read_fields(body, GridRequest, {}, {}), "routing")


def routes_answer(tok: Tokenizer, config: GPTConfig, ids: list[int], routes: list[Route]) -> dict:
    layers = []
    for route in routes:
        weights = [[round(weight, 5) for weight in row] for row in route.weights]
        row = {"layer": route.layer, "experts": route.experts, "weights": weights}
        layers.append(row | {"load": route.load})
    return {
        "tokens": ids,
        "token_strs": [token_name(tok, id) for id in ids],
        "n_experts": config.n_experts,
        "n_experts_per_token": config.n_experts_per_token,
        "n_shared_experts": config.n_shared_experts,
        "layers": layers,
    }
