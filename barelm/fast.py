"""What is faster than model.py's plain mathematics and gives the same.

model.py's `Operations` asks: `joined_product` for linear layers that read the same x, `can_block`
and `blocked_attention`, `block_mask` and `sparse_attention`, `can_piece` and `cross_entropy_sum`.
What these are not sure to compute (an adapted layer, a mask of numbers) is left to the plain way,
with which tests/test_fast.py compares.
"""

import contextlib
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from barelm.run import UserError, compute_dtype


@contextlib.contextmanager
def generating(net):
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


def joined_product(x, layers, packed):
    """The outputs of linear layers that read the same x (..., in), side by side, as one product;
    None where that would not be faster, or where a layer is of another kind (adapted, say).

    packed: within `generating`, {first layer: product}. Hooks on the layers are not called."""
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
    if len(layers) == 1 or not learning:  # to join weights once more would be to read them twice
        return None
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight, joined_bias(layers))


def joined_bias(layers):
    """The biases of layers one after the other, or None where they have none."""
    if layers[0].bias is None:
        return None
    return torch.cat([layer.bias for layer in layers])


def packed_product(layers, dtype):
    """A function of x that multiplies with the layers' matrices, joined and packed; or None where
    oneDNN has no such product of this dtype."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = joined_bias(layers)
    if bias is not None:
        bias = bias.to(dtype)
    if isinstance(layers[0], QuantizedLinear):
        scale = torch.cat([layer.scale for layer in layers])
        return partial(quantized_product, codes=weight, scale=scale, bias=bias,
                       packed=packed_int4(weight, scale))  # fmt: skip
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), ROWS_OF_A_STEP)

    def product(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    return product


def packed_int4(codes, scale):
    """(codes, scale) of int4 in the layout of torch's product on a CPU, which takes a multiple of
    16 rows; None of others and of int8."""
    if codes.dtype != torch.uint8 or len(codes) % 16:
        return None
    unpacked = unpack_int4(codes).int()
    inner_tiles = 2  # which the CPU's product ignores
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, inner_tiles)
    return packed, scale.transpose(0, 1).contiguous()


ROWS_OF_A_STEP = 16  # for how many rows oneDNN is to lay out a matrix


class QuantizedLinear(nn.Module):
    """A linear layer of 1 byte or half of one a weight, for inference. weight and scale are what
    `int8_codes` and `int4_codes` return. A weight of zero, which pruning makes, stays exactly zero.
    On its own it computes the plain product; `joined_product` has faster ones."""

    def __init__(self, layer, kind):
        super().__init__()
        self.shape = layer.weight.shape
        make_codes = int8_codes if kind == "int8" else int4_codes
        codes, scale = make_codes(layer.weight.detach().float())
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x):
        weight = dequantize(self.weight, self.scale)[:, : x.shape[-1]]
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), weight, bias).to(x.dtype)


def int8_codes(w):
    """int8 codes (out, in) of w (out, in) and a scale a row (out,), its largest weight over 127."""
    scale = w.abs().amax(1).clamp(min=1e-30) / 127  # (out,); of a row of zeros no 0 / 0
    scale = scale.bfloat16()  # as the CPU's product takes it
    codes = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scale


def int4_codes(w):
    """Codes of w (out, in), two a byte (out, in / 2) uint8, and for each group of 64 in a row a
    step and a middle (out, in / 64, 2), by which the group's minimum and maximum are kept: a weight
    is (code - 8) step + middle. Rows are padded to whole groups."""
    padding = (0, -w.shape[1] % 64)
    groups = F.pad(w, padding).unflatten(1, (-1, 64))  # (out, in / 64, 64)
    has_zero = F.pad(w == 0, padding).unflatten(1, (-1, 64)).any(2)  # (out, in / 64)
    low = groups.amin(2)
    high = groups.amax(2)
    step = ((high - low) / 15).clamp(min=1e-30)
    step = step.bfloat16().where(~has_zero, few_bits(step))
    middle = low + 8 * step.float()
    # Where a weight is zero, so is a level: the middle is a whole number of steps.
    whole = (middle / step.float()).round().clamp(-7, 8) * step.float()
    middle = middle.where(~has_zero, whole).bfloat16()
    codes = (groups - middle.float()[..., None]) / step.float()[..., None] + 8
    codes = codes.round().clamp(0, 15).to(torch.uint8).flatten(1)  # (out, in)
    pairs = codes[:, ::2] | codes[:, 1::2] << 4
    return pairs, torch.stack((step, middle), 2)


def few_bits(step):
    """Positive steps as bfloat16, rounded up to 5 bits: the product of one and a whole number below
    8 has no more than bfloat16's 8 bits, so that it is exact."""
    fraction, exponent = torch.frexp(step)  # from 1/2 to 1
    return torch.ldexp((fraction * 32).ceil() / 32, exponent).bfloat16()


def unpack_int4(codes):
    """The codes (out, in) uint8 of two a byte (out, in / 2)."""
    return torch.stack((codes & 15, codes >> 4), 2).flatten(1)


def dequantize(codes, scale):
    """The weights (out, in) float32 that a QuantizedLinear's codes stand for."""
    if codes.dtype == torch.int8:
        return codes.float() * scale.float()[:, None]
    step, middle = scale.float().split(1, 2)
    return ((unpack_int4(codes).float() - 8).unflatten(1, (-1, 64)) * step + middle).flatten(1)


def quantized_product(x, codes, scale, bias, packed=None):
    """x (..., in) times a quantized weight, plus bias. packed: int4's codes and scale in the layout
    of torch's product on a CPU. It and int8's take bfloat16 and make no copy of the weights, which
    pays for a few rows (measured at 4096 x 768)."""
    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    if codes.dtype == torch.int8:
        y = int8_product(rows, codes, scale)
    else:
        y = int4_product(rows, codes, scale, packed)
    y = y.view(*x.shape[:-1], len(codes))  # not -1: of no rows torch could not tell it
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y


def int8_product(rows, codes, scale):
    whole = rows.shape[1] % 16 == 0  # other widths torch's product reads beyond their end
    if rows.device.type == "cpu" and whole and len(rows) <= 16:
        return torch._weight_int8pack_mm(rows.bfloat16(), codes, scale).to(rows.dtype)
    return F.linear(rows, codes.to(rows.dtype)) * scale.to(rows.dtype)


def int4_product(rows, codes, scale, packed):
    rows = F.pad(rows, (0, -rows.shape[1] % 64))
    if rows.device.type == "cpu" and packed and len(rows) <= 512:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(rows.bfloat16(), packed[0], 64, packed[1]).to(rows.dtype)
    return F.linear(rows, dequantize(codes, scale).to(rows.dtype))


def quantize_weights(net, kind):
    """Make the network's linear layers int8 or int4, in place: the head too (a tied embedding then
    has the head's values), but not a classifier's."""
    if kind not in ("int8", "int4"):
        raise UserError(f"--quantize={kind}: expected int8 or int4")
    if net.quantize not in (None, kind):
        raise UserError(f"--quantize={kind}: this model is {net.quantize} already")
    for name, layer in list(net.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is net.score:
            continue
        if name == "lm_head" and net.score is not None:  # nothing reads it
            continue
        # The head (and embedding) of a small model is much of it, and int4 costs it most.
        width = "int8" if name == "lm_head" else kind
        net.set_submodule(name, QuantizedLinear(layer, width))
    net.quantize = kind
    tie_embedding(net, net.model.embed_tokens.weight.dtype)
    return net


def tie_embedding(net, dtype):
    """Make one of the embedding and the head, where the config ties them."""
    table = net.model.embed_tokens
    if net.config.tie and isinstance(net.lm_head, QuantizedLinear):
        weight = dequantize(net.lm_head.weight, net.lm_head.scale)[:, : net.config.n_embd]
        table.weight = nn.Parameter(weight.to(dtype))
    elif net.config.tie:
        net.lm_head.weight = table.weight


class BlockedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v as plain matrix products over blocks of queries, without the keys
    that lie behind a block: on a CPU two to three times as fast as its fused kernel in bfloat16.
    Keeps the probabilities, in q's dtype, which the fused one computes twice.

    q (B, H, T, D), k and v (B, n_kv_head, T, D), unseen (1 or B, 1, T, T) bool, true where a query
    may not look (at least at what is behind it). Blocks are joined, not written into a result: see
    LinearCrossEntropy."""

    @staticmethod
    def forward(ctx, q, k, v, unseen):
        B, H, T, D = q.shape
        G = k.shape[1]
        size = max(128, -(-T // 4))  # of a block
        q = (q * D**-0.5).reshape(B, G, -1, T, D)  # the H / G heads that share a k
        k = k.contiguous()
        v = v.contiguous()
        y = []
        probabilities = []
        for i in range(0, T, size):
            j = min(i + size, T)
            # One product for the H / G heads of each k: (B, G, H / G (j - i), D) @ (B, G, D, j)
            p = q[..., i:j, :].reshape(B, G, -1, D) @ k[:, :, :j].mT
            p = p.view(B, G, -1, j - i, j).masked_fill_(unseen[:, :, None, i:j, :j], -math.inf)
            p = p.softmax(-1).view(B, G, -1, j)  # (B, G, H / G (j - i), j)
            y.append((p @ v[:, :, :j]).view(B, G, -1, j - i, D))
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        return torch.cat(y, -2).view(B, H, T, D)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *probabilities = ctx.saved_tensors
        B, G, _, T, D = q.shape
        dy = dy.reshape(q.shape)
        dq = []
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        i = 0
        for p in probabilities:
            j = p.shape[-1]
            dy_block = dy[..., i:j, :].reshape(B, G, -1, D)
            q_block = q[..., i:j, :].reshape(B, G, -1, D)
            dp = dy_block @ v[:, :, :j].mT
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # of the scores
            dq.append((ds @ k[:, :, :j]).view(B, G, -1, j - i, D))
            dk = dk + F.pad(ds.mT @ q_block, (0, 0, 0, T - j))  # no key behind j was seen
            dv = dv + F.pad(p.mT @ dy_block, (0, 0, 0, T - j))
            i = j
        # q was scaled before it was saved: dk has the factor, dq does not yet.
        dq = (torch.cat(dq, -2) * D**-0.5).view(B, -1, T, D)
        return dq, dk, dv, None


def can_block(q, k, mask, dropout):
    """Whether `blocked_attention` computes this attention, and faster than torch: on a CPU in less
    than float32, where products are far faster than sums, of tokens to themselves."""
    T = q.shape[2]
    S = k.shape[2]
    if q.device.type != "cpu" or q.dtype == torch.float32 or dropout:
        return False
    if not 1 < T == S <= 1024:  # it keeps T x T probabilities of each head
        return False
    if mask is None:
        return True
    if mask.dtype != torch.bool or mask.shape[1] != 1:  # numbers to add, or a mask for each head
        return False
    # Keys behind a query are never looked at. (A compiled network is compared with this one.)
    return torch.compiler.is_compiling() or not mask.triu(1).any()


def blocked_attention(q, k, v, mask=None):
    """BlockedAttention where mask (1 or B, 1, T, T) bool is true; causal where it is None."""
    if mask is None:
        T = q.shape[2]
        return BlockedAttention.apply(q, k, v, torch.ones(1, 1, T, T, dtype=torch.bool).triu(1))
    return BlockedAttention.apply(q, k, v, ~mask)


def block_mask(may_look, docs):
    """The mask of `sparse_attention` for documents docs (B, T) int64: which blocks of 128 queries
    and 128 keys are seen in whole, in part, or not at all. Made on the device, in one pass over
    T x T. may_look(query, key, query_doc, key_doc) is model.may_look's rule."""
    from torch.nn.attention.flex_attention import create_block_mask

    docs = docs.int()  # which the kernel reads again for each block

    def seen(row, head, query, key):
        return may_look(query, key, docs[row, query], docs[row, key])

    B, T = docs.shape
    return create_block_mask(seen, B, None, T, T, docs.device)


def sparse_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v under a `block_mask`, without the blocks that it hides; where it
    is not compiled, torch computes all of them. It knows no dropout."""
    from torch.nn.attention.flex_attention import flex_attention

    grouped = q.shape[1] != k.shape[1]
    # One dtype, which autocast does not see to here.
    dtype = compute_dtype(v)
    qkv = (q.to(dtype), k.to(dtype), v.to(dtype))
    return flex_attention(*qkv, block_mask=mask, enable_gqa=grouped).to(q.dtype)


def head_piece(x, weight, targets, learn):
    """The loss of some rows and its gradients, in one: x (N, C), weight (V, C) in x's dtype,
    targets (N, 1) int64, -100 meaning none. Returns (the sum of -log p in nats, float32; and where
    learn, its gradient by x (N, C) and by weight (V, C), else None twice).

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
    return loss, (d @ weight) * valid, d.T @ (x * valid)


class LinearCrossEntropy(torch.autograd.Function):
    """The head and its loss in one, some rows at a time: no more logits than one piece's exist,
    and since the loss is a sum, each piece's gradients are made with it.

    h (N, C), weight (V, C), targets (N,) int64, -100 meaning none; learn: whether gradients are
    wanted; size: rows of a piece; piece: head_piece, or that compiled. Returns the sum of -log p in
    nats, float32.

    What is saved for backward is made whole and is never written to, here or in backward: a
    compiled network of torch 2.11 loses writes into a tensor that its backward reads."""

    @staticmethod
    def forward(ctx, h, weight, targets, learn, size, piece=head_piece):
        grad_dtype = weight.dtype  # float32, where h is bfloat16
        weight = weight.to(h.dtype)
        total = torch.zeros((), device=h.device)
        dh = []
        dw = 0.0
        for x, t in zip(h.split(size), targets[:, None].split(size)):
            loss, dx, dw_piece = piece(x, weight, t, learn)
            total = total + loss
            if learn:
                dh.append(dx)
                dw = dw + dw_piece.to(grad_dtype)
        if learn:
            ctx.save_for_backward(torch.cat(dh), dw)
        return total

    @staticmethod
    def backward(ctx, g):
        dh, dw = ctx.saved_tensors
        # In float32: a gradient's scale may be beyond what float16 holds.
        return (dh.float() * g).to(dh.dtype), dw * g, None, None, None, None


def head_rows(device_type, dtype, vocab_size):
    """Of how many rows the logits are made at once."""
    rows = max(1024, (1 << (20 if device_type == "cpu" else 29)) // vocab_size)
    # In float16 a piece's sum of gradients comes before the scale: keep it small.
    return min(rows, 4096) if dtype == torch.float16 else rows


def compiled_head_rows(n, device_type, dtype, vocab_size):
    """Of how many of n rows a compiled head makes the logits at once: in the memory that an eager
    one's rows take, and in pieces of one size where n has such a divisor, since another size would
    be compiled anew."""
    most = head_rows(device_type, dtype, vocab_size)
    if dtype != torch.float16:
        # The logits and their gradient in this dtype; an eager head has float32 copies of both.
        most = most * (dtype.itemsize + 8) // (2 * dtype.itemsize)
    most = max(1, min(most, (2**31 - 1) // vocab_size))  # kernels count in 32 bits
    fewest = -(-n // most)
    for pieces in range(fewest, 2 * fewest + 1):
        if n % pieces == 0:
            return n // pieces
    return most


def can_piece(head):
    """Whether `cross_entropy_sum` is that of this head's logits."""
    return type(head) is nn.Linear and head.bias is None


def cross_entropy_sum(h, weight, targets, piece=head_piece):
    """The sum of -log p(target) in nats, float32, under the logits h @ weight.T: h (N, C), weight
    (V, C), targets (N,) int64 of which -100 counts for nothing. piece: head_piece, or that
    compiled."""
    h = h.to(compute_dtype(h))
    if piece is head_piece:
        size = head_rows(h.device.type, h.dtype, len(weight))
    else:
        size = compiled_head_rows(len(h), h.device.type, h.dtype, len(weight))
    return LinearCrossEntropy.apply(h, weight, targets, torch.is_grad_enabled(), size, piece)
