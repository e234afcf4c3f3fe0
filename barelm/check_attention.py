"""Is attention right here? Each way to attend against the formula in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from barelm.check_rows import (
    Worst,
    allowed_error,
    error,
    exact_loss,
    exact_network,
    hidden_allowed,
    random_ids,
    small_network,
)
from barelm.operations import Operations
from model import KVCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from test_check import Stale
    from torch import Tensor

    from barelm.check_rows import Finding, Place
    from model import GPT

# Rows, heads of queries, heads of keys, tokens, width of a head: a width that every kernel takes
# and two that some do not; lengths that no block of 64 or 128 divides.
SHAPES = [(2, 4, 4, 200, 64), (2, 6, 2, 129, 40), (1, 3, 1, 70, 33), (1, 1, 1, 1030, 64)]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, every step written out: q (B, H, T, D), k and v (B, G, S,
    D), mask (…, T, S) bool or numbers."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)  # (B, H, S, D)
    v = v.repeat_interleave(group, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    else:
        scores = scores + mask.double()
    return scores.softmax(-1) @ v


def attention_cases(B: int, H: int, T: int) -> dict[str, tuple[Tensor | None, Tensor]]:
    """{name: (mask that attention is given, the mask that it means)} of T tokens that look at
    themselves and what is before them."""
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    distance = torch.arange(T)[:, None] - torch.arange(T)  # (T, T), to what is before
    generator = torch.Generator().manual_seed(T)
    seen = torch.rand(B, 1, T, T, generator=generator) < 0.7
    holes = causal & (seen | (distance == 0))  # every token sees itself
    docs = (torch.rand(B, T, generator=generator) < 0.05).cumsum(1)
    documents = causal & (docs[:, None, :, None] == docs[:, None, None, :])
    window = (causal & (distance < 17)).expand(B, 1, T, T)
    slopes = 0.5 ** torch.arange(1, H + 1)
    biases = (-slopes[:, None, None] * distance).masked_fill(~causal, -math.inf)[None]
    return {
        "causal": (None, causal),
        "a mask of holes": (holes, holes),
        "a sliding window": (window, window),
        "packed documents": (documents, documents),
        "biases added": (biases, biases),
    }


def random_heads(place: Place, seed: int, *shapes: tuple[int, int, int, int]) -> list[Tensor]:
    """Normal numbers of these shapes, on the device in the place's dtype, which learn."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator).to(place.dtype)
        tensors.append(x.to(place.device).requires_grad_())
    return tensors


def with_gradients(
    attend: Callable, inputs: Sequence, mask: Tensor | None, dy: Tensor
) -> list[Tensor]:
    """What attention gives of inputs (q, k, v), and the gradients of q, k and v, where its own is
    dy."""
    y = attend(*inputs, mask)
    return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def attention_error(place: Place, attend: Callable, qkv: Sequence[Tensor], dy: Tensor,
                    mask: Tensor | None, dense_mask: Tensor) -> tuple[float, str]:  # fmt: skip
    """(error, of what) of attend(q, k, v, mask), forward and backward. dense_mask: what
    mask, or None, stands for."""
    exact = [x.detach().cpu().double().requires_grad_() for x in qkv]
    truth = with_gradients(exact_attention, exact, dense_mask, dy.detach().cpu().double())
    if mask is not None:
        mask = mask.to(place.device)
    ours = with_gradients(attend, qkv, mask, dy)
    errors = [error(*pair) for pair in zip(ours, truth)]
    worst = max(errors, key=lambda x: math.inf if math.isnan(x) else x)
    return worst, ("forward", "gradient of q", "of k", "of v")[errors.index(worst)]


def attention_ways() -> dict[str, Callable]:
    return {"fast": Operations(fast=True).attend, "plain": Operations(fast=False).attend}


def check_attention(place: Place, ways: dict[str, Callable] | None = None) -> Iterator[Finding]:
    """Each mask through `ways`, {name: function of q, k, v, mask}: fast.py's and model.py's."""
    ways = ways or attention_ways()
    findings = {}
    for B, H, G, T, D in SHAPES:
        qkv_dy = random_heads(place, T, (B, H, T, D), (B, G, T, D), (B, G, T, D), (B, H, T, D))
        for kind, masks in attention_cases(B, H, T).items():
            for way, attend in ways.items():
                figure, of = attention_error(place, attend, qkv_dy[:3], qkv_dy[3], *masks)
                where = f"{way}, {of}, {B} x {T} tokens, {H} heads over {G} of {D}"
                findings.setdefault(kind, Worst()).add(figure, where)
                if G != H:
                    findings.setdefault("grouped heads", Worst()).add(figure, f"{kind}, {where}")
    # The longest sums are over the keys of a query, or the queries of a key. Back to q the scores,
    # their softmax, its gradient and the product are rounded one after the other.
    allowed = allowed_error(place.dtype, max(shape[3] for shape in SHAPES), layers=4)
    for kind, worst in findings.items():
        yield worst.finding(kind, allowed)
    yield one_token(place, ways, allowed)
    yield packed_documents(place)
    yield cached(place)


def one_token(place: Place, ways: dict[str, Callable], allowed: float) -> Finding:
    """A token that looks at all that there is, as in decoding, and rows that hold unlike many."""
    worst = Worst()
    for B, H, G, S, D in SHAPES:
        q, k, v, dy = random_heads(place, S, (B, H, 1, D), (B, G, S, D), (B, G, S, D), (B, H, 1, D))
        every = torch.ones(B, 1, 1, S, dtype=torch.bool)
        first = torch.arange(S) < torch.tensor([S, S // 3])[:B, None, None, None]
        for mask, dense_mask in ((None, every), (first, first)):
            for way, attend in ways.items():
                figure, of = attention_error(place, attend, (q, k, v), dy, mask, dense_mask)
                worst.add(figure, f"{way}, {of}, {B} x {S} tokens, {H} heads over {G} of {D}")
    return worst.finding("one token over many", allowed)


# --------------------------------------------------------------------------------------------------
# Whole networks: what a document or a cache holds is what it is alone


def packed_documents(place: Place, net: GPT | None = None) -> Finding:
    """Documents side by side, with `docs`, against each of them alone: the gradients of weights."""
    net = net or small_network(place.device)
    lengths = (70, 1, 101, 28)
    ids = random_ids(1, sum(lengths))
    targets = random_ids(1, sum(lengths), seed=1)
    docs = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]  # (1, T)
    exact = exact_network(net)
    loss = 0.0
    for x, y in zip(ids.split(lengths, 1), targets.split(lengths, 1)):
        loss = loss + y.numel() * exact_loss(exact, x, y)
    loss.backward()
    worst = Worst()
    for way in ("fast", "plain"):
        net.fast = way == "fast"
        net.train()
        net.zero_grad()
        with place.cast():
            ours, _ = net(*(t.to(place.device) for t in (ids, targets)), docs=docs.to(place.device))
        ours.backward()
        worst.add(abs(ours.item() / loss.item() - 1), f"{way}, loss")
        for (name, p), truth in zip(net.named_parameters(), exact.parameters()):
            worst.add(error(gradient(p), truth.grad), f"{way}, gradient of {name}")
    net.fast = True
    return worst.finding("network, packed documents", hidden_allowed(place.dtype, net))


def gradient(p: Tensor) -> Tensor:
    """A parameter's gradient, or zeros where it has none."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def cached(
    place: Place, net: GPT | None = None, cache_class: type[KVCache | Stale] = KVCache
) -> Finding:
    """Rows of unlike lengths, read into a cache in pieces and token by token, against each row
    alone, whole and without a cache."""
    net = (net or small_network(place.device)).to(place.dtype).eval()
    lengths = [(40, 9, 1, 1, 1), (7, 2, 1, 1, 1), (64, 16, 1, 1, 1)]  # of each row's pieces
    ids = random_ids(3, 96)
    cache = cache_class(net.config, 3, 96, place.device, place.dtype)
    pieces = [[], [], []]
    begins = [0, 0, 0]
    with torch.no_grad():
        for counts in zip(*lengths):
            rows = [ids[b, begins[b] : begins[b] + n] for b, n in enumerate(counts)]
            batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(place.device)
            n_new = torch.tensor(counts, device=place.device)
            h = net.hidden(batch, cache=cache, n_new=None if len(set(counts)) == 1 else n_new)
            for b, n in enumerate(counts):
                pieces[b].append(h[b, :n])
                begins[b] += n
        exact = exact_network(net)
        worst = Worst()
        for b, row in enumerate(pieces):
            truth = exact.hidden(ids[b : b + 1, : begins[b]])[0]
            worst.add(error(torch.cat(row), truth), f"row {b + 1}, of {begins[b]} tokens")
    return worst.finding("network, cached", hidden_allowed(place.dtype, net))
