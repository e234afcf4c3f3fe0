"""log p of what may follow a context: the plain way, and a faster one that gives the same."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn

from barelm.fast import head_rows
from barelm.run import compute_dtype
from model import KVCache

if TYPE_CHECKING:
    from torch import Tensor

    from model import GPT


class Request(NamedTuple):
    """What is asked at once: log p of each continuation after the context, or as many answers to it
    as there are continuations, which are empty then.

    Programs to run are requests too, with the source for a context; ratings, with the question and
    the answer."""

    shared: str  # what the questions of a subject begin with, so that they come into one batch
    context: list  # token ids
    continuations: list  # a list of token ids for each


# --------------------------------------------------------------------------------------------------
# Batches


def make_batches(requests: dict[str, Request], max_tokens: int) -> list[list[str]]:
    """Lists of keys of requests {key: Request}, of max_tokens at most when padded, but of one
    request at least. The longest come first, so that the time left is no surprise; what shares its
    beginning stays together."""

    def order(key: str) -> tuple:
        request = requests[key]
        return request.shared, -len(request.context), -longest_continuation(request)

    batches = []
    widest = 0  # tokens of the largest request of the last batch, which all are padded to
    shared = None  # what its requests begin with
    for key in sorted(requests, key=order):  # sorted keeps the order of equals
        request = requests[key]
        size = request_tokens(request)
        widest = max(widest, size)
        if request.shared == shared and widest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(key)
        else:
            batches.append([key])
            widest = size
            shared = request.shared
    return batches


def longest_continuation(request: Request) -> int:
    return max(map(len, request.continuations), default=0)


def request_tokens(request: Request) -> int:
    """The tokens that a request takes, each of its continuations behind the context."""
    longest = longest_continuation(request)
    rows = max(1, len(request.continuations))
    if longest == 1:  # single tokens are read off the context's last place
        rows = 1
    return (len(request.context) + longest) * rows


# --------------------------------------------------------------------------------------------------
# The plain way


def plain_scores(net: GPT, requests: list[Request], greedy: bool = False) -> list[list]:
    """For each request the sums of log p of its continuations, in nats: lists of floats; with
    `greedy` of pairs [sum, whether each of its tokens is the likeliest one]. A row for each
    continuation, behind its context."""
    device = net.model.embed_tokens.weight.device
    sums = []
    for request in requests:
        rows = [request.context + ids[:-1] for ids in request.continuations]
        h = net.hidden(padded(rows, device)[0])  # (B, T, C)
        first = len(request.context) - 1  # the place that predicts a continuation's first token
        request_sums = []
        for b, ids in enumerate(request.continuations):
            states = h[b, first : first + len(ids)]
            logp, hits = token_scores(net, states, torch.tensor(ids, device=device))
            request_sums.append(total(logp.cpu(), hits.cpu(), greedy))
        sums.append(request_sums)
    return sums


def total(logp: Tensor, hits: Tensor, greedy: bool) -> float | list:
    """What is said of a continuation: the sum of its tokens' log p (n,), or with `greedy` [that,
    whether all of `hits` (n,) are true]."""
    if greedy:
        return [logp.sum().item(), bool(hits.all())]
    return logp.sum().item()


def score_by_position(net: GPT, requests: list[Request], width: int) -> list[list[float]]:
    """For each request of one continuation the sums of log p of the tokens that are predicted at
    its places 0 to width - 1, width to 2 width - 1, …: lists of nats."""
    device = net.model.embed_tokens.weight.device
    trunks = [trunk_of(request) for request in requests]
    hidden = net.hidden(padded(trunks, device)[0])  # (B, T, C)
    sums = []
    for h, trunk, request in zip(hidden, trunks, requests):
        first = len(request.context) - 1  # the place that predicts the continuation's first token
        tokens = torch.tensor(request.continuations[0], device=device)
        logp = token_scores(net, h[first : len(trunk)], tokens)[0].cpu()
        ranges = torch.arange(first, len(trunk)) // width
        n_ranges = len(trunk) // width + 1
        sums.append(torch.zeros(n_ranges).index_add(0, ranges, logp).tolist())
    return sums


def target_scores(net: GPT, requests: list[Request]) -> list[float]:
    """For each request the sum of log p of its one continuation, in nats, under an encoder-decoder
    that reads the context as its source: a list of floats."""
    device = net.model.embed_tokens.weight.device
    sources, lengths = padded([request.context for request in requests], device)
    targets = [request.continuations[0] for request in requests]
    inputs = [[net.start_id, *target[:-1]] for target in targets]
    ids, _ = padded(inputs, device)
    hidden = net.hidden(ids, encoder_ids=sources, encoder_lengths=lengths)  # (B, T, C)
    states = [h[: len(target)] for h, target in zip(hidden, targets)]
    tokens = torch.cat([torch.tensor(target, device=device) for target in targets])
    logp = token_scores(net, torch.cat(states), tokens)[0].cpu()
    return [part.sum().item() for part in logp.split([*map(len, targets)])]


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) int64 of lists of ids, padded on the right; their lengths (B,)."""
    ids = nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    return ids.to(device), torch.tensor(list(map(len, rows)), device=device)


def token_scores(net: GPT, h: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """log p of tokens (N,) float32, each after a hidden state of h (N, C); and whether each is the
    likeliest one there (N,) bool."""
    size = head_rows(h.device.type, h.dtype, net.config.vocab_size)  # logits of so many at once
    logps = []
    hits = []
    for states, ids in zip(h.split(size), tokens.split(size)):
        logits = net.logits(states).float()  # (size, V)
        logps.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1))
        hits.append(logits.argmax(-1) == ids)
    return torch.cat(logps), torch.cat(hits)


# --------------------------------------------------------------------------------------------------
# Of many questions with the same shots, or many choices of one question, in fewer products


def shared_scores(net: GPT, requests: list[Request], greedy: bool = False) -> list[list]:
    """The same, faster: the batch's common beginning is computed once, a context once for all that
    continue it, and all logits together.

    Three passes, each on the cache of the one before: the common beginning (1 row), the trunks (a
    row for each request), the branches (a row for each of several continuations)."""
    device = net.model.embed_tokens.weight.device
    trunks = [trunk_of(request) for request in requests]
    branches = branches_of(requests)
    n_common = common_length(requests, trunks)
    h, cache = read_trunks(net, trunks, n_common, branches)
    branch_states = read_branches(net, cache, branches)
    states = []  # (n, C) each: at what predicts the tokens, in their order
    tokens = []
    lengths = []
    for b, request in enumerate(requests):
        last = len(request.context) - 1 - n_common  # this place predicts a continuation's first
        for i, continuation in enumerate(request.continuations):
            rest = branch_states.get((b, i), h[b, last + 1 :])
            states += [h[b, last : last + 1], rest[: len(continuation) - 1]]
            tokens += continuation
            lengths.append(len(continuation))
    logp, hits = token_scores(net, torch.cat(states), torch.tensor(tokens, device=device))
    parts = zip(logp.cpu().split(lengths), hits.cpu().split(lengths))  # of each continuation
    sums = []
    for request in requests:
        sums.append([total(*next(parts), greedy) for _ in request.continuations])
    return sums


def trunk_of(request: Request) -> list[int]:
    """The ids of a request that are read in a row of their own: the context and, where a single
    continuation follows, that too. The last token predicts nothing that is scored."""
    if len(request.continuations) == 1:
        return request.context + request.continuations[0][:-1]
    return request.context


def branches_of(requests: list[Request]) -> dict[tuple[int, int], list[int]]:
    """{(request, which of its continuations): ids} of what is read behind a trunk, the longest
    first: of several continuations all but the last token."""
    branches = {}
    for b, request in enumerate(requests):
        if len(request.continuations) > 1:
            for i, continuation in enumerate(request.continuations):
                if len(continuation) > 1:
                    branches[b, i] = continuation[:-1]
    return dict(sorted(branches.items(), key=branch_order))


def branch_order(item: tuple[tuple[int, int], list[int]]) -> int:
    return -len(item[1])


def common_length(requests: list[Request], trunks: list[list[int]]) -> int:
    """How many ids all trunks begin with, before the last of any context, whose state is needed;
    0 where a cache for them costs more than it saves."""
    n_common = len(os.path.commonprefix(trunks))
    for request in requests:
        n_common = min(n_common, len(request.context) - 1)
    if len(requests) == 1 or 4 * n_common < max(map(len, trunks)):
        return 0
    return n_common


def read_trunks(
    net: GPT, trunks: list[list[int]], n_common: int, branches: dict[tuple[int, int], list[int]]
) -> tuple[Tensor, KVCache | None]:
    """Hidden states (B, T, C) of what follows the trunks' n_common first ids, and the cache that
    branches go on from; None where nothing does."""
    table = net.model.embed_tokens.weight
    ids, lengths = padded([trunk[n_common:] for trunk in trunks], table.device)  # (B, T), (B,)
    if not n_common and not branches:
        return net.hidden(ids), None
    B, T = ids.shape
    longest_branch = max(map(len, branches.values()), default=0)
    dtype = torch.float32 if table.device.type == "cpu" else compute_dtype(table)
    rows = 1 if n_common else B
    size = n_common + T + longest_branch
    cache = KVCache(net.config, rows, size, table.device, dtype, whole=net.deterministic)
    if n_common:
        net.hidden(torch.tensor([trunks[0][:n_common]], device=table.device), cache=cache)
        cache.reorder(torch.zeros(B, dtype=torch.int64, device=table.device))  # its row, B times
    return net.hidden(ids, cache=cache, n_new=lengths), cache


def read_branches(
    net: GPT, cache: KVCache | None, branches: dict[tuple[int, int], list[int]]
) -> dict[tuple[int, int], Tensor]:
    """{(request, which): hidden states (T, C)} of the branches, each behind its request's trunk."""
    device = net.model.embed_tokens.weight.device
    keys = list(branches)
    states = {}
    for begin in range(0, len(keys), 64):  # alike in length, so that little is padding
        batch = keys[begin : begin + 64]
        rows = [b for b, _ in batch]
        ids, lengths = padded([branches[key] for key in batch], device)  # (B, T), (B,)
        branch_cache = copy.copy(cache)  # reorder gives it tensors of its own; the trunks' stay
        branch_cache.reorder(torch.tensor(rows, device=device))
        states.update(zip(batch, net.hidden(ids, cache=branch_cache, n_new=lengths)))
    return states
