"""The view Attention: by how much each token of a text looks at each, in all layers and heads.

    maps = attention_maps(net, ids, layer=3)        # (n_head, T, T), each row a softmax
    maps = attention_maps(net, ids, mean="layers")  # the same, the mean of all layers
    grid = attention_grid(net, ids)                 # all of them, small, in bytes

The network computes them itself, in a usual pass, so that the page shows what a fork's attention
does. Layers, heads and positions count from 0. T: the tokens of the text.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from barelm.answers import token_name
from barelm.api import ApiError, read_fields
from barelm.engine import NOT_FINITE
from barelm.page import read_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch.nn as nn
    from torch import Tensor

    from barelm.api import ServedModel
    from barelm.tokenizer import Tokenizer
    from model import GPT, GPTConfig

MAP_TOKENS = 128  # the longest text whose attention is shown
MEANS = ("", "heads", "layers", "both")  # over what a map is averaged
GRID_SIDE = 32  # cells of a small map, at most, in each direction
GRID_BYTES = 500_000  # of all small maps, about


def attentive_part(net: GPT) -> nn.Module:
    """The part of the network whose attention is shown: of an encoder-decoder the encoder, which
    reads a text."""
    return net.model.encoder if net.config.is_seq2seq else net.model


def watch_attention(net: GPT, ids: list[int], layers: Iterable[int], see: Callable) -> None:
    """Call see(layer, maps) for each of the layers, in order, in a pass over ids, a list of T; maps
    (n_head, T, T) float32, on the host: row i is what token i looks at."""

    def hook_of(layer, attention):
        def hook(module, args):
            # What the layer is given in a usual pass, rotations and mask too.
            x, rope, mask = args[:3]
            maps = net.ops.all_heads(attention.probabilities(x, rope, mask)[0])
            see(layer, maps.float().cpu())

        return attention.register_forward_pre_hook(hook)

    blocks = attentive_part(net).layers
    hooks = [hook_of(layer, blocks[layer].self_attn) for layer in layers]
    ids = torch.tensor([ids], device=net.model.embed_tokens.weight.device)
    try:
        if net.config.is_seq2seq:
            net.encode(ids)
        else:
            net.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()


def attention_maps(net: GPT, ids: list[int], layer: int = 0, mean: str = "") -> Tensor:
    """One layer's maps (n_head, T, T) float32 in a pass over ids, a list of T. mean: "heads", of
    that layer's heads (1, T, T); "layers", of all layers, head by head; "both" (1, T, T)."""
    n_layer = len(attentive_part(net).layers)
    layers = range(n_layer) if mean in ("layers", "both") else [layer]
    total = [0.0]

    def add(layer, maps):
        total[0] = total[0] + maps

    watch_attention(net, ids, layers, add)
    maps = total[0] / len(layers)
    if mean in ("heads", "both"):
        maps = maps.mean(0, keepdim=True)
    if not maps.isfinite().all():
        raise ApiError(500, NOT_FINITE)
    return maps


# --------------------------------------------------------------------------------------------------
# All at a glance


@dataclass
class Grid:
    """All maps, small: bytes (n_layer + 1, n_head + 1, side, side), the last of each layer being
    the mean of its heads, the last layer the mean of all. A byte b is the weight (b / 255)^2: in
    steps of the root, small weights keep their differences. A cell has the largest weight of
    `block` x `block` tokens."""

    n_layer: int
    n_head: int
    side: int
    block: int
    data: bytes


def attention_grid(net: GPT, ids: list[int]) -> Grid:
    """The Grid of a text's ids, a list of T, of a single pass."""
    n_layer = len(attentive_part(net).layers)
    n_maps = (n_layer + 1) * (net.config.n_head + 1)
    most = min(GRID_SIDE, max(8, math.isqrt(GRID_BYTES // n_maps)))
    block = math.ceil(len(ids) / most)
    rows = []  # of each layer uint8 (n_head + 1, side, side)
    total: list = [0.0]  # of the layers' maps (n_head, T, T)

    def add(layer, maps):
        rows.append(small_maps(maps, block))
        total[0] = total[0] + maps

    watch_attention(net, ids, range(n_layer), add)
    if not total[0].isfinite().all():
        raise ApiError(500, NOT_FINITE)
    rows.append(small_maps(total[0] / n_layer, block))
    side = rows[0].shape[-1]
    data = torch.stack(rows).numpy().tobytes()
    return Grid(n_layer, len(total[0]), side, block, data)


def small_maps(maps: Tensor, block: int) -> Tensor:
    """maps (n_head, T, T) and their mean as bytes (n_head + 1, side, side) uint8."""
    maps = torch.cat((maps, maps.mean(0, keepdim=True)))  # (n_head + 1, T, T)
    cells = F.max_pool2d(maps, block, ceil_mode=True)
    return cells.clamp(0, 1).sqrt().mul(255).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------------
# Requests and answers


@dataclass
class AttentionRequest:
    text: str | None = None
    ids: list | None = None  # instead of a text
    layer: int = 0
    head: int | None = None  # None: all
    mean: str = ""  # over the heads of the layer, over the layers, or over both


@dataclass
class GridRequest:
    text: str | None = None
    ids: list | None = None


def read_attention(served: ServedModel, config: GPTConfig, body: dict) -> AttentionRequest:
    """An AttentionRequest with its ids."""
    n_layer = config.n_encoder_layer or config.n_layer
    limits = {"layer": (0, n_layer - 1), "head": (0, config.n_head - 1)}
    request = read_fields(body, AttentionRequest, neutral={}, ignored={}, limits=limits)
    if request.mean not in MEANS:
        raise ApiError(400, 'mean: expected "heads", "layers" or "both"', "mean")
    if request.head is not None and request.mean in ("heads", "both"):
        raise ApiError(400, f"head: a mean of {request.mean} is of no head", "head")
    request.ids = ids_to_show(served, request, "attention")
    return request


def read_grid(served: ServedModel, body: dict) -> list[int]:
    """The ids of a GridRequest."""
    return ids_to_show(served, read_fields(body, GridRequest, {}, {}), "attention")


def ids_to_show(
    served: ServedModel, request: AttentionRequest | GridRequest, what: str
) -> list[int]:
    """The ids of a request's text, as few as are shown."""
    ids = read_ids(served, request.text, request.ids)
    most = min(MAP_TOKENS, served.max_len)
    if not 0 < len(ids) <= most:
        why = f"{len(ids)} tokens: {what} is shown of 1 to {most}"
        raise ApiError(400, why, "text")
    return ids


def attention_answer(tok: Tokenizer, request: AttentionRequest, maps: Tensor) -> dict:
    """Of each head, or of the mean, a row for each token: what it looks at; where none sees what is
    behind it, up to itself."""
    is_causal = not maps.triu(1).any()
    shown = maps if request.head is None else maps[request.head : request.head + 1]
    return {
        "tokens": request.ids,
        "token_strs": [token_name(tok, id) for id in request.ids],
        "layer": request.layer,
        "mean": request.mean,
        "heads": [rounded_rows(rows, is_causal) for rows in shown.tolist()],
    }


def rounded_rows(rows: list, is_causal: bool) -> list[list[float]]:
    """The rows, of causal ones row i up to its place i."""
    rounded = []
    for i, row in enumerate(rows):
        end = i + 1 if is_causal else len(row)
        rounded.append([round(weight, 5) for weight in row[:end]])
    return rounded


def grid_answer(tok: Tokenizer, ids: list[int], grid: Grid) -> dict:
    return {
        "tokens": ids,
        "token_strs": [token_name(tok, id) for id in ids],
        "n_layer": grid.n_layer,
        "n_head": grid.n_head,
        "side": grid.side,
        "block": grid.block,
        "maps": base64.b64encode(grid.data).decode(),
    }
