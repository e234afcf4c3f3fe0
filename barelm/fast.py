"""What is faster than model.py's plain mathematics and gives the same."""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from barelm.run import UserError, compute_dtype

PACKS = None  # while generating: {first layer: the product of it and its neighbours}


@contextlib.contextmanager
def generating(net):
    """Within, net is in eval mode, and a CPU keeps the matrices that it multiplies with in the
    layout that oneDNN reads fastest for a few rows, which takes a second copy of the weights. They
    must not change meanwhile; one thread of a process at a time."""
    global PACKS
    before, training, device = PACKS, net.training, net.model.embed_tokens.weight.device
    if PACKS is None and device.type == "cpu" and torch.backends.mkldnn.is_available():
        PACKS = {}
    net.eval()
    try:
        yield
    finally:
        PACKS = before
        net.train(training)


def joint(x, *layers):
    """The outputs of linear layers that read the same x, side by side: one product for all."""
    kinds, learn = {type(f) for f in layers}, torch.is_grad_enabled()
    if PACKS is not None and not learn and kinds in ({nn.Linear}, {QuantizedLinear}):
        dtype = compute_dtype(x)
        if layers[0] not in PACKS:
            PACKS[layers[0]] = pack(layers, dtype)
        if packed := PACKS[layers[0]]:
            return packed(x.to(dtype))
    if len(layers) == 1:
        return layers[0](x)
    if not learn or kinds != {nn.Linear}:  # to join weights would read them twice; or adapted
        return torch.cat([f(x) for f in layers], -1)
    bias = None if layers[0].bias is None else torch.cat([f.bias for f in layers])
    return F.linear(x, torch.cat([f.weight for f in layers]), bias)


def pack(layers, dtype):
    """A function of x that multiplies with the layers' matrices, joined and packed; or None where
    oneDNN has no such product of this dtype."""
    weight = torch.cat([f.weight for f in layers])
    bias = None if layers[0].bias is None else torch.cat([f.bias for f in layers]).to(dtype)
    if isinstance(layers[0], QuantizedLinear):
        scale, packed = torch.cat([f.scale for f in layers]), None
        if weight.dtype == torch.uint8 and len(weight) % 16 == 0:
            codes = unpack_int4(weight).int()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
            packed = packed, scale.transpose(0, 1).contiguous()
        return lambda x: quantized_product(x, weight, scale, bias, packed)
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and has_bfloat16()):
        return None
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 16)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class QuantizedLinear(nn.Module):
    """A linear layer of 1 byte or half of one a weight, for inference. int8: codes (out, in) and a
    scale a row, its largest weight over 127. int4: two codes a byte (out, in / 2), and for
    each group of 64 in a row a step and a middle (out, in / 64, 2), by which its minimum and its
    maximum are kept: a weight is (code - 8) step + middle. Rows are padded to whole groups. A
    weight of zero, which pruning makes, stays exactly zero in both."""

    def __init__(self, layer, kind):
        super().__init__()
        self.shape = layer.weight.shape
        w = layer.weight.detach().float()
        if kind == "int8":
            scale = (w.abs().amax(1).clamp(min=1e-30) / 127).bfloat16()  # as the product takes it
            codes = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        else:
            padding = (0, -w.shape[1] % 64)
            groups = F.pad(w, padding).unflatten(1, (-1, 64))
            has_zero = F.pad(w == 0, padding).unflatten(1, (-1, 64)).any(2)
            low, high = groups.amin(2), groups.amax(2)
            step = ((high - low) / 15).clamp(min=1e-30)
            step = step.bfloat16().where(~has_zero, few_bits(step))
            middle = low + 8 * step.float()
            # Where a weight is zero, so is a level: the middle is a whole number of steps.
            whole = (middle / step.float()).round().clamp(-7, 8) * step.float()
            scale = torch.stack((step, middle.where(~has_zero, whole).bfloat16()), 2)
            codes = (groups - scale[..., 1:].float()) / step.float()[..., None] + 8
            codes = codes.round().clamp(0, 15).to(torch.uint8).flatten(1)
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x):
        return quantized_product(x, self.weight, self.scale, self.bias)


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
    rows, cpu = x.reshape(-1, x.shape[-1]), x.device.type == "cpu"
    if codes.dtype == torch.int8:
        whole = rows.shape[1] % 16 == 0  # other widths torch's product reads beyond their end
        if cpu and whole and len(rows) <= 16:
            y = torch._weight_int8pack_mm(rows.bfloat16(), codes, scale).to(x.dtype)
        else:
            y = F.linear(rows, codes.to(x.dtype)) * scale.to(x.dtype)
    else:
        rows = F.pad(rows, (0, -rows.shape[1] % 64))
        if cpu and packed and len(rows) <= 512:
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            y = multiply(rows.bfloat16(), packed[0], 64, packed[1]).to(x.dtype)
        else:
            y = F.linear(rows, dequantize(codes, scale).to(x.dtype))
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


def quantize_weights(net, kind):
    """Make the network's linear layers int8 or int4, in place: the head too (a tied embedding then
    has the head's values), but not a classifier's."""
    if kind not in ("int8", "int4"):
        raise UserError(f"--quantize={kind}: expected int8 or int4")
    if net.quantize not in (None, kind):
        raise UserError(f"--quantize={kind}: this model is {net.quantize} already")
    kept = () if net.score is None else (net.score, net.lm_head)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear) and layer not in kept:
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
        G, size = k.shape[1], max(128, -(-T // 4))
        q, k, v = (q * D**-0.5).reshape(B, G, -1, T, D), k.contiguous(), v.contiguous()
        y, probabilities = [], []
        for i in range(0, T, size):
            j = min(i + size, T)
            p = q[..., i:j, :].reshape(B, G, -1, D) @ k[:, :, :j].mT
            p = p.view(B, G, -1, j - i, j).masked_fill_(unseen[:, :, None, i:j, :j], -math.inf)
            p = p.softmax(-1).view(B, G, -1, j)  # (B, n_kv_head, H / n_kv_head * (j - i), j)
            y.append((p @ v[:, :, :j]).view(B, G, -1, j - i, D))
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        return torch.cat(y, -2).view(B, H, T, D)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *probabilities = ctx.saved_tensors
        B, G, _, T, D = q.shape
        dy, dq = dy.reshape(q.shape), []
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        i = 0
        for p in probabilities:
            j = p.shape[-1]
            dy_block = dy[..., i:j, :].reshape(B, G, -1, D)
            q_block = q[..., i:j, :].reshape(B, G, -1, D)
            ds = torch._softmax_backward_data(dy_block @ v[:, :, :j].mT, p, -1, p.dtype)
            dq.append((ds @ k[:, :, :j]).view(B, G, -1, j - i, D))
            dk = dk + F.pad(ds.mT @ q_block, (0, 0, 0, T - j))  # no key behind j was seen
            dv = dv + F.pad(p.mT @ dy_block, (0, 0, 0, T - j))
            i = j
        return (torch.cat(dq, -2) * D**-0.5).view(B, -1, T, D), dk, dv, None


def attend(q, k, v, mask=None, dropout=0.0):
    """Attention of q (B, H, T, D) to k and v (B, n_kv_head, S, D): causal where mask is None, else
    where mask (B, 1, T, S) bool is true. The fastest of the ways that this device has."""
    T = q.shape[2]
    halved = q.device.type == "cpu" and q.dtype != torch.float32  # products far faster than sums
    if halved and 1 < T == k.shape[2] <= 1024 and not dropout:
        unseen = torch.ones(1, 1, T, T, dtype=torch.bool).triu(1) if mask is None else ~mask
        return BlockedAttention.apply(q, k, v, unseen)
    grouped, causal = q.shape[1] != k.shape[1], mask is None and bool(T > 1)  # T may be symbolic
    args = (q.to(k.dtype), k, v, mask, dropout, causal)
    return F.scaled_dot_product_attention(*args, enable_gqa=grouped).to(q.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """The head and its loss in one, some rows at a time: no more logits than one piece's exist,
    and since the loss is a sum, each piece's gradients are made with it.

    h (N, C), weight (V, C), targets (N,) int64, -100 meaning none; learn: whether gradients are
    wanted; size: rows of a piece. Returns the sum of -log p in nats, float32.

    What is saved for backward is made whole and is never written to, here or in backward: a
    compiled network of torch 2.11 loses writes into a tensor that its backward reads."""

    @staticmethod
    def forward(ctx, h, weight, targets, learn, size):
        total = torch.zeros((), device=h.device)
        dh, dw = [], 0.0
        grad_dtype, weight = weight.dtype, weight.to(h.dtype)
        for x, t in zip(h.split(size), targets[:, None].split(size)):
            logp = (x @ weight.T).float().log_softmax(-1)  # (size, V)
            valid, t = t >= 0, t.clamp(min=0)
            total = total - logp.gather(1, t).where(valid, 0.0).sum()
            if learn:
                # softmax less one-hot, in the logits' own memory, which nothing else reads
                d = logp.exp_().scatter_add_(1, t, torch.full_like(t, -1, dtype=logp.dtype))
                d = d.mul_(valid).to(h.dtype)
                dh.append(d @ weight)
                dw = dw + (d.T @ x).to(grad_dtype)
        if learn:
            ctx.save_for_backward(torch.cat(dh), dw)
        return total

    @staticmethod
    def backward(ctx, g):
        dh, dw = ctx.saved_tensors
        return (dh.float() * g).to(dh.dtype), dw * g, None, None, None


def head_rows(device_type, dtype, vocab_size):
    """Of how many rows the logits are made at once."""
    rows = max(1024, (1 << (20 if device_type == "cpu" else 29)) // vocab_size)
    # In float16 a piece's sum of gradients comes before the scale: keep it small.
    return min(rows, 4096) if dtype == torch.float16 else rows


def cross_entropy_sum(h, weight, targets):
    """The sum of -log p(target) in nats, float32, under the logits h @ weight.T: h (N, C), weight
    (V, C), targets (N,) int64 of which -100 counts for nothing."""
    h = h.to(compute_dtype(h))
    size = head_rows(h.device.type, h.dtype, len(weight))
    return LinearCrossEntropy.apply(h, weight, targets, torch.is_grad_enabled(), size)
