"""What is faster than model.py's plain mathematics and gives the same.

model.py's `Operations` asks: `joined_product` for linear layers that read the same x, `can_block`
and `blocked_attention`, `block_mask` and `sparse_attention`, `can_piece` and `cross_entropy_sum`.
What these are not sure to compute (an adapted layer, a mask of numbers) is left to the plain way,
with which tests/test_fast.py compares.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from barelm.positions import relative_bucket
from barelm.quantized import QuantizedLinear, QuantizedProduct, quantized_product
from barelm.run import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

    from model import GPT


@contextlib.contextmanager
def generating(net: GPT) -> Iterator[None]:
    """Within, net is in eval mode, and on a CPU a fast one keeps the matrices that it multiplies
    with in the layout that oneDNN reads fastest for a few rows: a second copy of the weights, which
    must not change meanwhile. One thread at a time may use such a network; calls may be nested."""
    ops = net.ops
    training = net.training
    packed = ops.packed
    on_cpu = net.model.embed_tokens.weight.device.type == "cpu"
    if ops.fast and packed is None and on_cpu and torch.backends.mkldnn.is_available():
        ops.packed = {}  # filled by joined_product, when each product is first needed
    net.eval()
    try:
        yield
    finally:
        ops.packed = packed
        net.train(training)


def joined_product(
    x: Tensor, layers: Sequence[nn.Module], packed: dict | None, joins: bool = True
) -> Tensor | None:
    """The outputs of linear layers that read the same x (..., in), side by side, as one product;
    None where that would not be faster, or where a layer is of another kind (adapted, say).

    packed: within `generating`, {first layer: product}. joins: whether to join weights in training.
    Hooks on the layers are not called."""
    kind = type(layers[0])
    if kind not in (nn.Linear, QuantizedLinear):
        return None
    for layer in layers:
        if type(layer) is not kind:
            return None
    learning = torch.is_grad_enabled()
    if packed is not None and not learning:
        dtype = compute_dtype(x)
        if layers[0] not in packed:
            packed[layers[0]] = packed_product(layers, dtype)
        product = packed[layers[0]]
        if product is not None:
            return product(x.to(dtype))
    if kind is QuantizedLinear:
        outputs = [quantized_product(x, f.weight, f.scale, f.bias) for f in layers]
        return torch.cat(outputs, -1)
    if not learning:  # to join weights once more would be to read them twice
        return None
    if len(layers) == 1 or not joins:
        return None
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight, joined_bias(layers))


def joined_bias(layers: Sequence[nn.Module]) -> Tensor | None:
    """The biases of layers one after the other, or None where they have none."""
    if layers[0].bias is None:
        return None
    return torch.cat([layer.bias for layer in layers])


def packed_product(layers: Sequence[nn.Module], dtype: torch.dtype) -> Callable:
    """A function of x that multiplies with the layers' matrices, joined and packed; or None where
    oneDNN has no such product of this dtype."""
    if isinstance(layers[0], QuantizedLinear):
        weight = torch.cat([layer.weight for layer in layers])
        scale = torch.cat([layer.scale for layer in layers])
        bias = joined_bias(layers)
        return QuantizedProduct(weight, scale, bias if bias is None else bias.to(dtype))
    if layers[0].weight.device.type != "cpu":
        return placed_product(layers, dtype)
    weight = torch.cat([layer.weight for layer in layers])
    bias = joined_bias(layers)
    if bias is not None:
        bias = bias.to(dtype)
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), ROWS_OF_A_STEP)

    def product(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    return product


def placed_product(layers: Sequence[nn.Module], dtype: torch.dtype) -> PlacedProduct | None:
    """A PlacedProduct, or None where it would save nothing: of one layer that has this dtype, or of
    large ones, whose reading takes longer than to start a kernel more."""
    size = sum(layer.weight.numel() for layer in layers)
    large = len(layers) == 1 or size > LARGE
    if layers[0].weight.dtype == dtype and large:
        return None
    return PlacedProduct(layers, dtype)


LARGE = 1 << 23  # weights of layers that are not copied to be joined: 16 MiB, 6 us of an H100's


class PlacedProduct:
    """A function of x that multiplies with a copy of the layers' weights, joined, of dtype, which
    stays in its place on a GPU: a CUDA graph reads it there. `refresh` makes it what they are."""

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.layers = layers
        with torch.inference_mode(False), torch.no_grad():  # so that they may be written to later
            self.weight = torch.cat([layer.weight for layer in layers]).to(dtype)
            self.bias = joined_bias(layers)
            if self.bias is not None:
                self.bias = self.bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def refresh(self) -> None:
        begin = 0
        for layer in self.layers:
            end = begin + len(layer.weight)
            self.weight[begin:end] = layer.weight
            if self.bias is not None:
                self.bias[begin:end] = layer.bias
            begin = end


ROWS_OF_A_STEP = 16  # for how many rows oneDNN is to lay out a matrix


class BlockedAttention(torch.autograd.Function):
    """softmax(scale q k^T) v as plain matrix products over blocks of queries, without the keys
    that no query of a block sees: on a CPU two to three times as fast as its fused kernel in
    bfloat16. Keeps the probabilities, in q's dtype, which the fused one computes twice.

    q (B, H, T, D), k and v (B, n_kv_head, S, D), unseen (1 or B, 1, T, S) bool, true where a query
    may not look, or None: all see all. blocks: `query_blocks`. Blocks are joined, not written into
    a result: see LinearCrossEntropy."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, scale: float,
                blocks: list[tuple[int, int, int, int]]) -> Tensor:  # fmt: skip
        B, H, T, D = q.shape
        G = k.shape[1]
        q = (q * scale).reshape(B, G, -1, T, D)  # the H / G heads that share a k
        k = k.contiguous()
        v = v.contiguous()
        y = []
        probabilities = []
        for i, j, low, high in blocks:
            n = high - low
            # One product for the H / G heads of each k: (B, G, H / G (j - i), D) @ (B, G, D, n)
            p = q[..., i:j, :].reshape(B, G, -1, D) @ k[:, :, low:high].mT
            if unseen is not None:
                hidden = unseen[:, :, None, i:j, low:high]
                p = p.view(B, G, -1, j - i, n).masked_fill_(hidden, -math.inf)
            p = p.softmax(-1).view(B, G, -1, n)  # (B, G, H / G (j - i), n)
            y.append((p @ v[:, :, low:high]).view(B, G, -1, j - i, D))
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale = scale
        ctx.blocks = blocks
        return torch.cat(y, -2).view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        B, G, _, T, D = q.shape
        S = k.shape[2]
        dy = dy.reshape(q.shape)
        dq = []
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for (i, j, low, high), p in zip(ctx.blocks, probabilities):
            dy_block = dy[..., i:j, :].reshape(B, G, -1, D)
            q_block = q[..., i:j, :].reshape(B, G, -1, D)
            dp = dy_block @ v[:, :, low:high].mT
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # of the scores
            dq.append((ds @ k[:, :, low:high]).view(B, G, -1, j - i, D))
            around = (0, 0, low, S - high)  # the keys that this block did not see
            dk = dk + F.pad(ds.mT @ q_block, around)
            dv = dv + F.pad(p.mT @ dy_block, around)
        # q was scaled before it was saved: dk has the factor, dq does not yet.
        dq = (torch.cat(dq, -2) * ctx.scale).view(B, -1, T, D)
        return dq, dk, dv, None, None, None


BLOCK = 128  # queries of the smallest block


def query_blocks(
    T: int, S: int, causal: bool, reach: int | None
) -> list[tuple[int, int, int, int]]:
    """[(i, j, low, high)]: queries i to j - 1 see no key but low to high - 1. reach: how many
    places before a query (and without causality, behind it) it may look; None: all."""
    size = max(BLOCK, -(-T // 4))
    if reach is not None and 2 * reach < T:  # smaller blocks look at less that they do not see
        size = BLOCK
    blocks = []
    for i in range(0, T, size):
        j = min(i + size, T)
        low = 0 if reach is None else max(0, i - reach)
        high = S
        if causal:
            high = j
        elif reach is not None:
            high = min(S, j + reach)
        blocks.append((i, j, low, high))
    return blocks


def keys_of_block(S: int, causal: bool, reach: int | None) -> int:
    """How many of S keys a block of BLOCK queries is held against, at most."""
    if reach is None:
        return S
    sides = 1 if causal else 2
    return min(S, sides * reach + BLOCK)


KEPT = 1024 * 1024  # of a head: so many probabilities are kept at most, and not computed twice


def can_block(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float, causal: bool = True,
              reach: int | None = None) -> bool:  # fmt: skip
    """Whether `blocked_attention` computes this attention, and faster than torch: on a CPU in less
    than float32, where products are far faster than sums, or where tokens see no far ones; of many
    tokens to themselves, or without causality to others."""
    T = q.shape[2]
    S = k.shape[2]
    is_narrow = reach is not None and 2 * reach < T
    if q.device.type != "cpu" or dropout or (q.dtype == torch.float32 and not is_narrow):
        return False
    if k.dtype != q.dtype or T < 2 or (causal and T != S):
        return False
    if T * keys_of_block(S, causal, reach) > KEPT:
        return False
    if mask is None:
        return True
    if mask.dtype != torch.bool or mask.shape[1] != 1:  # numbers to add, or a mask for each head
        return False
    # Keys behind a query are never looked at. (A compiled network is compared with this one.)
    return not causal or torch.compiler.is_compiling() or not mask.triu(1).any()


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
                      scale: float | None = None, causal: bool = True,
                      reach: int | None = None) -> Tensor:  # fmt: skip
    """BlockedAttention where mask (1 or B, 1, T or 1, S) bool is true; where it is None, causal or
    without any. reach: as `query_blocks` has it; the mask hides what is out of it."""
    T = q.shape[2]
    S = k.shape[2]
    unseen = None
    if mask is not None:
        unseen = ~mask.expand(-1, -1, T, S)
    elif causal:
        unseen = torch.ones(1, 1, T, T, dtype=torch.bool).triu(1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BlockedAttention.apply(q, k, v, unseen, scale, query_blocks(T, S, causal, reach))


class SparseMask(NamedTuple):
    """What `sparse_attention` looks at, and what it adds to the scores. A tuple, whose tensors
    torch.compile takes as inputs."""

    blocks: object  # a BlockMask: which blocks of 128 queries and 128 keys are seen
    slopes: torch.Tensor | None = None  # (H,), of ALiBi
    table: torch.Tensor | None = None  # (n_buckets, H), of relative positions
    buckets: tuple = ()  # n_buckets, max_distance, causal: how `relative_bucket` finds its row


def block_mask(may_look: Callable, positions: Tensor, docs: Tensor | None = None) -> BlockMask:
    """The BlockMask for tokens at positions (B or 1, T), in documents docs (B, T) int64 or in one:
    which blocks of 128 queries and 128 keys are seen in whole, in part, or not at all. Made on the
    device, in one pass over T x T. may_look(query, key, query_doc, key_doc) is the rule."""
    from torch.nn.attention.flex_attention import create_block_mask

    if docs is None:

        def seen(row, head, query, key):
            return may_look(query, key)

        T = positions.shape[1]
        return create_block_mask(seen, None, None, T, T, positions.device)

    docs = docs.int()  # which the kernel reads again for each block
    positions = positions.int().expand_as(docs)

    def seen_in_documents(row, head, query, key):
        query_doc = docs[row, query]
        key_doc = docs[row, key]
        return may_look(positions[row, query], positions[row, key], query_doc, key_doc)

    B, T = docs.shape
    return create_block_mask(seen_in_documents, B, None, T, T, docs.device)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: SparseMask, scale: float | None = None,
                     softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    """`Operations.attend` under a SparseMask, without the blocks that it hides; where it is not
    compiled, torch computes all of them. It knows no dropout."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def score(score, row, head, query, key):
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        distance = key - query  # within a document: of tokens, as of positions
        if mask.slopes is not None:
            score = score - mask.slopes[head] * distance.abs()
        if mask.table is not None:
            score = score + mask.table[relative_bucket(distance, *mask.buckets), head]
        return score

    # One dtype, which autocast does not see to here.
    dtype = compute_dtype(v)
    qkv = (q.to(dtype), k.to(dtype), v.to(dtype))
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if softcap or mask.slopes is not None or mask.table is not None:
        options["score_mod"] = score
    if sinks is None:
        return flex_attention(*qkv, block_mask=mask.blocks, **options).to(q.dtype)
    y, aux = flex_attention(
        *qkv, block_mask=mask.blocks, return_aux=AuxRequest(lse=True), **options
    )
    # Of exp(lse) + exp(sink), by which all should have been divided, this is the share of exp(lse).
    share = torch.sigmoid(aux.lse - sinks.float()[:, None])  # (B, H, T)
    return (y * share[..., None]).to(q.dtype)


def head_piece(
    x: Tensor, weight: Tensor, targets: Tensor, learn: bool, weight_learns: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of some rows and its gradients, in one: x (N, C), weight (V, C) in x's dtype,
    targets (N, 1) int64, -100 meaning none. Returns (the sum of -log p in nats, float32; and where
    learn, its gradient by x (N, C) and by weight (V, C), else None twice; None for a frozen weight,
    as LoRA's head is).

    Compiled, it makes no float32 logits: two products, a pass that reads the logits for their sum,
    one that makes their gradient of them, and two products of that."""
    valid = targets >= 0  # (N, 1)
    targets = targets.clamp(min=0)  # gather takes no -100
    logp = (x @ weight.T).float().log_softmax(-1)  # (N, V)
    loss = -logp.gather(1, targets).where(valid, 0.0).sum()
    if not learn:
        return loss, None, None
    # The gradient of the logits: softmax less one-hot.
    if torch.compiler.is_compiling():  # no scatter, so that it is one pass
        columns = torch.arange(len(weight), device=x.device)
        d = logp.exp() - (columns == targets).float()
    else:  # in the logits' own memory, which nothing else reads
        ones = torch.ones_like(targets, dtype=logp.dtype)
        d = logp.exp_().scatter_add_(1, targets, -ones)
    d = d.to(x.dtype)
    # Rows without a target count for nothing: of C columns that is cheaper to say than of V.
    dx = (d @ weight) * valid
    if not weight_learns:
        return loss, dx, None
    return loss, dx, d.T @ (x * valid)


class LinearCrossEntropy(torch.autograd.Function):
    """The head and its loss in one, some rows at a time: no more logits than one piece's exist,
    and since the loss is a sum, each piece's gradients are made with it.

    h (N, C), weight (V, C), targets (N,) int64, -100 meaning none; learn: whether gradients are
    wanted; size: rows of a piece; piece: head_piece, or that compiled. Returns the sum of -log p in
    nats, float32.

    What is saved for backward is made whole and is never written to, here or in backward: a
    compiled network of torch 2.11 loses writes into a tensor that its backward reads."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, learn: bool, size: int,
                piece: Callable = head_piece) -> Tensor:  # fmt: skip
        grad_dtype = weight.dtype  # float32, where h is bfloat16
        weight_learns = ctx.needs_input_grad[1]
        weight = weight.to(h.dtype)
        total = torch.zeros((), device=h.device)
        dh = []
        dw = None
        for x, t in zip(h.split(size), targets[:, None].split(size)):
            loss, dx, dw_piece = piece(x, weight, t, learn, weight_learns)
            total = total + loss
            if learn:
                dh.append(dx)
            if learn and weight_learns:
                dw_piece = dw_piece.to(grad_dtype)
                dw = dw_piece if dw is None else dw + dw_piece
        if learn:
            ctx.save_for_backward(torch.cat(dh), dw)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        dh, dw = ctx.saved_tensors
        # In float32: a gradient's scale may be beyond what float16 holds.
        dh = (dh.float() * g).to(dh.dtype)
        return dh, None if dw is None else dw * g, None, None, None, None


def head_rows(device_type: str, dtype: torch.dtype, vocab_size: int) -> int:
    """Of how many rows the logits are made at once."""
    rows = max(1024, (1 << (20 if device_type == "cpu" else 29)) // vocab_size)
    # In float16 a piece's sum of gradients comes before the scale: keep it small.
    return min(rows, 4096) if dtype == torch.float16 else rows


def compiled_head_rows(n: int, device_type: str, dtype: torch.dtype, vocab_size: int) -> int:
    """Of how many of n rows a compiled head makes the logits at once: in the memory that an eager
    one's rows take, and in pieces of one size where n has such a divisor, since another size would
    be compiled anew."""
    most = head_rows(device_type, dtype, vocab_size)
    if dtype != torch.float16:
        # The logits and their gradient in this dtype; an eager head has float32 copies of both.
        most = most * (dtype.itemsize + 8) // (2 * dtype.itemsize)
    most = max(1, min(most, (2**31 - 1) // vocab_size))  # kernels count in 32 bits
    fewest = max(1, -(-n // most))
    for pieces in range(fewest, 2 * fewest + 1):
        if n % pieces == 0:
            return max(1, n // pieces)
    return most


def can_piece(head: nn.Linear | None) -> bool:
    """Whether `cross_entropy_sum` is that of this head's logits."""
    return type(head) is nn.Linear


def cross_entropy_sum(h: Tensor, weight: Tensor, targets: Tensor, piece: Callable = head_piece,
                      bias: Tensor | None = None) -> Tensor:  # fmt: skip
    """The sum of -log p(target) in nats, float32, under the logits h @ weight.T + bias: h (N, C),
    weight (V, C), targets (N,) int64 of which -100 counts for nothing, bias (V,). piece:
    head_piece, or that compiled."""
    h = h.to(compute_dtype(h))
    if bias is not None:  # as the weights of a number that is always 1, and 7 zeros beside it
        ones = torch.ones_like(h[:, :1])
        h = torch.cat((h, F.pad(ones, (0, 7))), 1)
        weight = torch.cat((weight, F.pad(bias[:, None], (0, 7))), 1)
    if piece is head_piece:
        size = head_rows(h.device.type, h.dtype, len(weight))
    else:
        size = compiled_head_rows(len(h), h.device.type, h.dtype, len(weight))
    return LinearCrossEntropy.apply(h, weight, targets, torch.is_grad_enabled(), size, piece)
