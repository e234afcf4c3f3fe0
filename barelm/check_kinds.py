"""Is every kind of network right here? Windows, patterns, biases, caps, sinks, encoders, experts:
each as it trains and as it generates, against its formulas in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from barelm.check_attention import gradient
from barelm.check_rows import (
    Worst,
    error,
    exact_network,
    hidden_allowed,
    random_ids,
    small_network,
)
from barelm.run import autocast
from model import KVCache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from barelm.check_rows import Finding, Place
    from model import GPT

WINDOW = dict(window=24)
KINDS: dict[str, dict] = {
    "sliding window, of every other layer": WINDOW | dict(layers="SL"),
    "window with first tokens": WINDOW | dict(sink_tokens=3),
    "local attention": WINDOW | dict(attention="local"),
    "strided attention": WINDOW | dict(attention="strided"),
    "fixed attention": WINDOW | dict(attention="fixed"),
    "learned sinks": dict(sinks=True),
    "soft-capped scores": dict(softcap=4.0),
    "ALiBi": dict(pos="alibi"),
    "relative positions": dict(pos="relative"),
    "encoder": dict(causal=False),
    "encoder with a window": dict(causal=False) | WINDOW,
    "encoder-decoder": dict(n_encoder_layer=2, pos="relative"),
    "experts": dict(n_experts=4, n_experts_per_token=2),
}
LENGTH = 149  # of two rows: no block of 64 or 128 divides it


def check_kinds(place: Place, kinds: dict[str, dict[str, int]] | None = None) -> Iterator[Finding]:
    """Of each kind the loss and the gradients of a small network; and what a cache gives, where
    there is one, against whole passes."""
    for name, shape in (kinds or KINDS).items():
        where = place
        if "n_experts" in shape:  # rounding alone may give a token to another expert
            where = replace(place, dtype=torch.float32)
        net = small_network(place.device, **shape)
        net.pad_id = None
        yield gradients_of_kind(where, net, name)
        if net.config.causal:
            yield cached_kind(where, net, name)


def options_of(net: GPT, length: int) -> dict:
    """What a network is given beside its tokens."""
    if net.config.is_seq2seq:
        return {"encoder_ids": random_ids(2, length - 20, seed=2)}
    return {}


def gradients_of_kind(place: Place, net: GPT, name: str) -> Finding:
    """The Finding on each gradient of the loss."""
    exact = exact_network(net)
    ids = random_ids(2, LENGTH)
    targets = random_ids(2, LENGTH, seed=1)
    options = options_of(net, LENGTH)
    logits = exact(ids, **options)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    on_device = {key: value.to(place.device) for key, value in options.items()}
    # Evaluation leaves out what a router adds to the loss.
    net.eval().zero_grad()
    with autocast(place.device, place.dtype):
        loss, _ = net(ids.to(place.device), targets.to(place.device), **on_device)
    loss.backward()
    worst = Worst()
    for (key, p), truth in zip(net.named_parameters(), exact.parameters()):
        if truth.grad is not None:
            worst.add(error(gradient(p), truth.grad), key)
    return worst.finding(f"{name}, gradients", hidden_allowed(place.dtype, net))


@torch.no_grad()
def cached_kind(place: Place, net: GPT, name: str) -> Finding:
    """The Finding on tokens that are fed to a cache, many at once and one by one."""
    length = LENGTH // 2
    ids = random_ids(2, length).to(place.device)
    options = options_of(net, length)
    exact = exact_network(net)
    truth = exact.hidden(ids.cpu(), **options)  # (2, length, C)
    net = net.to(place.dtype).eval()
    if options:
        options = {"memory": net.encode(options["encoder_ids"].to(place.device))}
    cache = KVCache(net.config, 2, length, place.device, place.dtype)
    states = []
    begin = 0
    for n in (40, 20, *[1] * (length - 60)):
        states.append(net.hidden(ids[:, begin : begin + n], cache=cache, **options))
        begin += n
    worst = Worst()
    worst.add(error(torch.cat(states, 1), truth), f"2 x {length} tokens")
    return worst.finding(f"{name}, cached", hidden_allowed(place.dtype, net))
