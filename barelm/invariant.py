"""The same bits for a token whatever is computed beside it: batch invariance.

model.py's `Operations` asks for these where `net.deterministic` is true. A library picks its way of
multiplying by the shapes: a row of a product with 1 row has other last bits than among 64 (He 2025,
"Defeating Nondeterminism in LLM Inference"). So here products are made in tiles of one shape, keys
are added in blocks of one size, in their order, and what is computed of each number alone does not
depend on its place. Gradients are the plain network's, right but not invariant.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from barelm.run import UserError, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from model import GPT


# How many rows a product may have. The first says what a row's bits are, if they do not depend on
# its place; larger ones, which are faster, are used where they give the same.
SIZES = {"cpu": (16, 48, 128), "cuda": (64, 256, 1024)}
TILES = {"cpu": (8, 16), "cuda": (64,)}  # rows of a product in attention
BATCH = 8  # matrices of a batched product that says the same
QUERIES = 64  # that look at a block of keys together
KEYS = 64  # of a block
WIDTH = 16  # numbers of a head, or a multiple: some libraries treat the rest of a row otherwise
BELOW_ALL = -1e30  # what the maximum of no score is: finite, so that no difference is inf - inf


def be_deterministic(net: GPT) -> None:
    """Let net compute each token by itself, as said above, and have the device add in one order.
    It is slower, and for tests and roll-outs that must agree with the policy to the bit."""
    if net.model.embed_tokens.weight.device.type == "mps":
        raise UserError("--deterministic: not on mps, whose products are not tried: --device=cpu")
    net.deterministic = True
    if torch.cuda.is_available():
        # cuBLAS reads it when it is first used; torch refuses its products without.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.use_deterministic_algorithms(True, warn_only=True)


# --------------------------------------------------------------------------------------------------
# Linear layers


def project(x: Tensor, layers: tuple[nn.Linear, ...]) -> Tensor:
    """The outputs of linear layers that read the same x (…, C), side by side."""
    outputs = [linear(x, layer) for layer in layers]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x) of x (…, C), a row's bits independent of the others."""
    rows = x.reshape(-1, x.shape[-1])  # (N, C)
    if type(layer) is nn.Linear:
        y = Product.apply(rows.to(compute_dtype(rows)), layer.weight)
        if layer.bias is not None:
            y = y + layer.bias.to(y.dtype)
    else:  # adapted or quantized: whatever it does, it does with so many rows
        tile = SIZES[rows.device.type][0]
        y = torch.cat([layer(part) for part in whole_tiles(rows, tile).split(tile)])[: len(rows)]
    return y.view(*x.shape[:-1], y.shape[-1])


class Product(torch.autograd.Function):
    """x (N, C) times weight (O, C) transposed, in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return tiled_product(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = (dy.T @ x).to(weight.dtype)
        return dx, dw


def tiled_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, C) times weight (O, C) transposed: as many rows at a time as are known to give each
    row the same bits."""
    if len(x) == 0:
        return F.linear(x, weight)
    sizes = row_counts(weight)  # the largest first
    x = aligned(x)
    parts = []
    begin = 0
    with torch.autocast(x.device.type, enabled=False):  # it is in the dtype that it should be
        while begin < len(x):
            half_full = [size for size in sizes if 2 * (len(x) - begin) > size]
            size = half_full[0] if half_full else sizes[-1]
            parts.append(F.linear(whole_tiles(x[begin : begin + size], size), weight))
            begin += size
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y[: len(x)]


def aligned(x: Tensor) -> Tensor:
    """x where a new tensor begins: some libraries compute otherwise from an odd address."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 64 else x


def whole_tiles(x: Tensor, size: int) -> Tensor:
    """x (N, C), with rows of zeros up to a whole number of tiles."""
    missing = -len(x) % size
    return F.pad(x, (0, 0, 0, missing)) if missing else x


KNOWN = {}  # {what a product is like: what was found out about it}


def row_counts(weight: Tensor) -> tuple[int, ...]:
    """By how many rows at a time to multiply with weight (O, C), the largest first: the last is the
    tile, in which a row has the same bits at every place, and of SIZES those with the tile's bits.

    It is tried out: the way that a library takes depends on shapes and addresses, not on values."""
    device = weight.device
    key = (weight.shape, weight.dtype, device, weight.data_ptr() % 64, torch.get_num_threads())
    if key not in KNOWN:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            KNOWN[key] = try_row_counts(weight, SIZES[device.type])
    return KNOWN[key]


def try_row_counts(weight: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    x = torch.empty(2 * sizes[-1], weight.shape[1], dtype=weight.dtype, device=weight.device)
    x = random_like(x)
    for tile in sizes:
        alike = F.linear(x[:1].expand(tile, -1).contiguous(), weight)  # one row, everywhere
        if alike.equal(alike[:1].expand_as(alike)):
            break
    else:
        return (1,)
    n_tiles = -(-sizes[-1] // tile)
    tiles = torch.cat([F.linear(part, weight) for part in x[: n_tiles * tile].split(tile)])
    counts = [tile]
    for size in sizes:
        if size > tile and F.linear(x[:size], weight).equal(tiles[:size]):
            counts.insert(0, size)
    return tuple(counts)


def random_like(x: Tensor) -> Tensor:
    """Numbers around 0 of x's shape, strides and dtype, that leave torch's own draws alone."""
    generator = torch.Generator(x.device).manual_seed(0)
    like_x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return like_x.normal_(generator=generator)


# --------------------------------------------------------------------------------------------------
# Attention


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
              plain: Callable, causal: bool = True, scale: float | None = None,
              softcap: float = 0.0) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(D)) v (B, H, T, D), of q (B, H, T, D), k and v (B, G, S, D), in float32
    inside; the others as `Operations.attend` takes them. plain(q, k, v, mask, sinks): the same,
    whose gradient it has.

    The softmax goes over the keys block by block (Milakov and Gimelshein 2018). A block that a
    query does not see adds exactly zero: neither the cache's length nor padding changes a bit."""
    f = partial(blockwise, causal=causal, scale=scale, softcap=softcap)
    return PlainGradient.apply(f, plain, q, k, v, mask, sinks)


class PlainGradient(torch.autograd.Function):
    """f(*tensors), with the gradient of plain(*tensors), which is computed in backward. A tensor
    may be None."""

    @staticmethod
    def forward(ctx: Any, f: Callable, plain: Callable, *tensors: Tensor | None) -> Tensor:
        ctx.plain = plain
        ctx.save_for_backward(*tensors)
        return f(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        needed = ctx.needs_input_grad[2:]
        inputs = []
        learned = []
        for tensor, is_needed in zip(ctx.saved_tensors, needed):
            if is_needed:
                tensor = tensor.detach().requires_grad_()
                learned.append(tensor)
            inputs.append(tensor)
        with torch.enable_grad():
            y = ctx.plain(*inputs)
        gradients = iter(torch.autograd.grad(y, learned, dy))
        return None, None, *[next(gradients) if is_needed else None for is_needed in needed]


def blockwise(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None = None,
              causal: bool = True, scale: float | None = None,
              softcap: float = 0.0) -> Tensor:  # fmt: skip
    """`attention`, forward."""
    B, H, T, D = q.shape
    G = k.shape[1]
    S = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    if mask is not None:
        mask = mask.expand(-1, -1, T, S)
    if sinks is not None:
        sinks = sinks.detach().float().view(G, -1)  # (G, H / G)
    with torch.autocast(q.device.type, enabled=False):
        q_heads = (q.float() * scale).reshape(B, G, H // G, T, D)  # those that share a k
        q_heads = F.pad(q_heads, (0, -D % WIDTH))  # zeros, which add exactly nothing
        k_blocks = key_blocks(k)
        v_blocks = key_blocks(v)
        y = []
        for i in range(0, T, QUERIES):
            j = min(i + QUERIES, T)
            biases = block_biases(mask, range(i, j), T, S, q.device, causal)
            tile = q_heads[:, :, :, i:j]
            y.append(attend_tile(tile, k_blocks, v_blocks, biases, sinks, softcap))
    return torch.cat(y, 3)[..., :D].reshape(B, H, T, D).to(q.dtype)


def key_blocks(k: Tensor) -> list[Tensor]:
    """k (B, G, S, D) as blocks (B G, KEYS, D) float32 with zeros at the last one's end, and behind
    D up to a multiple of WIDTH."""
    k = F.pad(k.float(), (0, -k.shape[-1] % WIDTH))
    blocks = list(k.flatten(0, 1).split(KEYS, 1))
    missing = KEYS - blocks[-1].shape[1]
    if missing:
        blocks[-1] = F.pad(blocks[-1], (0, 0, 0, missing))
    return blocks


def block_biases(mask: Tensor | None, queries: range, T: int, S: int, device: torch.device,
                 causal: bool = True) -> list[tuple[int, Tensor]]:  # fmt: skip
    """[(number of a block of keys, what is added to its scores)] for a range of the T queries: what
    is added is (B or 1, H or 1, t, KEYS) float32, -inf where they may not look; None: nothing."""
    biases = []
    for begin in range(0, S, KEYS):
        keys = range(begin, min(begin + KEYS, S))
        if mask is not None:
            part = mask[:, :, queries.start : queries.stop, begin : keys.stop]
        elif T == 1 or not causal:  # alone, it sees all that there is
            part = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=device)
        elif begin >= queries.stop:  # causal: no query is behind these keys
            break
        else:
            places = torch.arange(queries.start, queries.stop, device=device)
            part = places[:, None] >= torch.arange(begin, keys.stop, device=device)
            part = part[None, None]  # (1, 1, t, keys)
        bias = None
        if part.dtype != torch.bool:
            bias = part.float()
        elif device.type != "cpu":  # whose host would have to wait for what it says
            bias = torch.zeros(part.shape, device=device).masked_fill(~part, -torch.inf)
        elif not part.any():  # it would add exactly zero
            continue
        elif len(keys) < KEYS or not part.all():
            bias = torch.zeros(part.shape).masked_fill(~part, -torch.inf)
        if bias is not None:
            bias = F.pad(bias, (0, KEYS - len(keys)), value=-torch.inf)
        biases.append((begin // KEYS, bias))
    return biases


def attend_tile(q: Tensor, k_blocks: list[Tensor], v_blocks: list[Tensor],
                biases: list[tuple[int, Tensor]], sinks: Tensor | None = None,
                softcap: float = 0.0) -> Tensor:  # fmt: skip
    """What the queries q (B, G, H / G, t, D), scaled, gather (B, G, H / G, t, D) float32 from
    blocks of keys and values. sinks (G, H / G): what takes its share of the softmax."""
    B, G, n_shared, t, D = q.shape
    q = q.reshape(B * G, n_shared * t, D).contiguous()  # (B G, M, D)
    top = q.new_full((*q.shape[:2], 1), BELOW_ALL)  # the largest score so far
    total = torch.zeros_like(top)  # of exp(score - top)
    y = torch.zeros_like(q)  # the sum of exp(score - top) v
    for number, bias in biases:
        scores = multiply(q, k_blocks[number].mT)  # (B G, M, KEYS)
        if softcap:
            scores = softcap * (scores / softcap).tanh_()
        if bias is not None:
            scores = add_bias(scores, bias, B, G, n_shared)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        p = (scores - new_top).exp_()
        shrink = (top - new_top).exp_()
        total = total * shrink + p.sum(-1, keepdim=True)
        y = y * shrink + multiply(p, v_blocks[number])
        top = new_top
    if sinks is not None:
        sink = sinks[None, :, :, None].expand(B, G, n_shared, t).reshape(top.shape)
        new_top = torch.maximum(top, sink)
        shrink = (top - new_top).exp_()
        total = total * shrink + (sink - new_top).exp_()
        y = y * shrink
    y = y / total.clamp(min=1e-30)  # of one who sees nothing: 0
    return y.view(B, G, n_shared, t, D)


def add_bias(scores: Tensor, bias: Tensor, B: int, G: int, n_shared: int) -> Tensor:
    """scores (B G, M, KEYS), whose rows are those of n_shared heads, plus bias (B or 1, H or 1, t,
    KEYS)."""
    if bias.shape[1] == 1:
        bias = bias[:, :, None].expand(-1, -1, n_shared, -1, -1)
    else:
        bias = bias.unflatten(1, (G, n_shared))
    bias = bias.flatten(2, 3)  # (B or 1, G or 1, M, KEYS)
    return (scores.unflatten(0, (B, G)) + bias).flatten(0, 1)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a (n, M, K) times b (n, K, N), each row with the bits that it has in a product of BATCH
    matrices with one tile of rows, made at once where that is known to give them."""
    rows = a.shape[1]
    tile = tile_rows(b)
    if rows % tile:
        a = F.pad(a, (0, 0, 0, -rows % tile))
    key = (a.shape, b.shape, b.stride(), a.dtype, a.device, torch.get_num_threads())
    if key not in KNOWN:
        x = random_like(a)
        y = random_like(b)
        KNOWN[key] = torch.bmm(x, y).equal(multiply_tiles(x, y, tile))
    y = torch.bmm(a, b) if KNOWN[key] else multiply_tiles(a, b, tile)
    return y[:, :rows]


def multiply_tiles(a: Tensor, b: Tensor, tile: int) -> Tensor:
    """a (n, M, K) times b (n, K, N) by products of BATCH matrices with `tile` rows alone."""
    n, M, _ = a.shape
    a = a.unflatten(1, (-1, tile)).flatten(0, 1)  # (n M / tile, tile, K)
    # Transposed where b is: a library treats the two differently.
    transposed = b.stride(-1) != 1
    b = b.mT if transposed else b
    b = b.repeat_interleave(M // tile, 0)  # (n M / tile, …), contiguous
    missing = -len(a) % BATCH
    a = F.pad(a, (0, 0, 0, 0, 0, missing))
    b = F.pad(b, (0, 0, 0, 0, 0, missing))
    b = b.mT if transposed else b
    parts = [torch.bmm(*pair) for pair in zip(a.split(BATCH), b.split(BATCH))]
    y = torch.cat(parts)[: len(a) - missing]  # (n M / tile, tile, N)
    return y.unflatten(0, (n, -1)).flatten(1, 2)


def tile_rows(b: Tensor) -> int:
    """How many rows a tile of a batched product with b (n, K, N) has: of TILES the first of which a
    row has the same bits at every place, in every matrix, and among many rows; at worst 1."""
    transposed = b.stride(-1) != 1
    key = (b.shape[1:], transposed, b.dtype, b.device, torch.get_num_threads())
    if key not in KNOWN:
        K, N = b.shape[1:]
        shape = (1, N, K) if transposed else (1, K, N)
        one = random_like(torch.empty(shape, dtype=b.dtype, device=b.device))
        many = one.repeat(BATCH, 1, 1)
        KNOWN[key] = try_tiles(many.mT if transposed else many)
    return KNOWN[key]


def try_tiles(b: Tensor) -> int:
    """`tile_rows` for b (BATCH, K, N), of equal matrices."""
    row = random_like(torch.empty_like(b[:1, :, 0]))  # (1, K)
    among_many = torch.bmm(row.expand(BATCH, QUERIES, -1).contiguous(), b)
    placeless = [1]
    for tile in TILES[b.device.type]:
        y = torch.bmm(row.expand(BATCH, tile, -1).contiguous(), b)
        if y.equal(y[:1, :1].expand_as(y)):
            if among_many.equal(y[:, :1].expand_as(among_many)):
                return tile
            placeless.append(tile)
    return placeless[-1]


# --------------------------------------------------------------------------------------------------
# What is computed of each number alone. On a CPU torch's own silu and gelu treat a tensor's last
# numbers otherwise than the others; its exp and tanh do not.


def silu(x: Tensor) -> Tensor:
    return PlainGradient.apply(silu_forward, F.silu, x)


def silu_forward(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide / (1 + (-wide).exp_())).to(x.dtype)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """As F.gelu: by tanh, or exact ("none")."""
    forward = gelu_forward if approximate == "tanh" else exact_gelu
    return PlainGradient.apply(forward, partial(F.gelu, approximate=approximate), x)


def gelu_forward(x: Tensor) -> Tensor:
    wide = x.float()
    inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)  # sqrt(2 / pi)
    return (0.5 * wide * (1 + inner.tanh_())).to(x.dtype)


def exact_gelu(x: Tensor) -> Tensor:
    wide = x.float()
    return (0.5 * wide * (1 + (wide * 0.7071067811865476).erf_())).to(x.dtype)  # 1 / sqrt(2)


# --------------------------------------------------------------------------------------------------
# Packed documents


def spread(x: Tensor, docs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Documents docs (B, T) of a packed x (B, T, C), moved apart so that each begins with a block
    of keys, as it does alone: (x (B, T2, C), docs (B, T2), the places of the T tokens (B, T))."""
    B, T = docs.shape
    places = torch.arange(T, device=docs.device).expand(B, T)
    begins = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0))  # a row's first begins at 0 anyway
    starts = (begins * places).cummax(1).values  # (B, T): where each token's document begins
    lengths = places - F.pad(starts[:, :-1], (1, 0))  # of the document before, where one begins
    gaps = torch.where(begins, -lengths % KEYS, 0)
    places = places + gaps.cumsum(1)
    T2 = int(places[:, -1].max()) + 1
    rows = torch.arange(B, device=docs.device)[:, None]
    wide = x.new_zeros(B, T2, x.shape[-1]).index_put((rows, places), x)
    wide_docs = docs.new_full((B, T2), -1).index_put((rows, places), docs)
    return wide, wide_docs, places
