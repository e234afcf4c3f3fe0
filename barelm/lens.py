"""From the residual stream to a logit, layer by layer: the logit lens and direct logit attribution.

    trace = run(net, [5, 17, 3])                  # one pass, and what its modules read and gave
    guesses = logit_lens(net, states(trace)[2], n_vocab, k=5)
    shares = attribute(net, trace, position=2, token=9)       # they add up to the token's logit

The modules themselves compute everything, and hooks look on: what is shown is what the network
does, a fork's too. Nothing of it is changed. Where operations would pass modules by (barelm/fast.py
multiplies with their matrices), model.py's plain mathematics computes instead: `plainly`.

Of an encoder-decoder both are of the decoder, whose states the head reads. barelm/patching.py goes
on from here.

T tokens, C: n_embd, H: heads, D: head_dim, V: vocabulary, L: blocks.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from barelm.engine import NOT_FINITE
from barelm.filling import eager, ids_with_gaps
from barelm.quantized import QuantizedLinear, dequantize
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from model import GPT, Block


def check_lens(net: GPT) -> None:
    """Refuse a network whose residual stream the lens does not read."""
    if net.ops.heads is not None:
        raise UserError("layers are shown of a network that one process has: start it with --tp=1")
    if net.score is not None:
        raise UserError(
            f"a model of {net.task} has scores in the place of logits: no lens reads it"
        )


def encoder_ids(tok: Tokenizer, text: str) -> tuple[list[int], int | None]:
    """(ids, the place of the first mask or None) of a text that an encoder reads."""
    names = [name for name, id in tok.special.items() if id == tok.mask_id]
    if not any(name in text for name in names):
        ids, _ = tok.whole_text(text)
        return ids, None
    ids, places = ids_with_gaps(tok, text, [tok.mask_id])
    return ids, places[0]


# --------------------------------------------------------------------------------------------------
# One pass, looked at


@dataclass
class Trace:
    """What a pass over one text left: of each module that was looked at what it read and gave,
    (T, …), without the dimension of the batch."""

    ids: list  # of the part that was looked at
    blocks: nn.ModuleList  # of this part
    inputs: dict = field(default_factory=dict)  # {module: tensor}
    outputs: dict = field(default_factory=dict)
    beside: dict = field(default_factory=dict)  # {block: its arguments behind x: rotations, mask}


@contextmanager
def plainly(net: GPT) -> Iterator[None]:
    """Within, net computes as model.py stands: each module is called, and so are its hooks."""
    ops = net.ops
    before = (ops.fast, ops.deterministic)
    ops.fast = False
    ops.deterministic = False
    try:
        with eager(net), torch.no_grad():
            yield
    finally:
        ops.fast, ops.deterministic = before


def run(net: GPT, ids: list[int], source: list[int] | None = None) -> Trace:
    """The Trace of a pass over ids, a list. Of an encoder-decoder: the decoder's, which has ids
    behind it, its start token the first, and reads the ids `source`."""
    device = net.model.embed_tokens.weight.device
    rows = torch.tensor([ids], device=device)  # (1, T)
    with plainly(net):
        if source is None:
            return looked_at(net, net.model, ids, lambda: net.hidden(rows))
        memory = net.encode(torch.tensor([source], device=device))
        return looked_at(net, net.model, ids, lambda: net.hidden(rows, memory=memory))


def run_encoder(net: GPT, ids: list[int]) -> Trace:
    """The Trace of an encoder-decoder's encoder."""
    rows = torch.tensor([ids], device=net.model.embed_tokens.weight.device)
    with plainly(net):
        return looked_at(net, net.model.encoder, ids, lambda: net.encode(rows))


def looked_at(net: GPT, part: nn.Module, ids: list[int], compute: Callable) -> Trace:
    """The Trace of compute(), a pass of `part`: the decoder, or the encoder."""
    trace = Trace(ids, part.layers)

    def look(module, args, output):
        if isinstance(output, tuple):  # of experts: with what their router did
            output = output[0]
        trace.inputs[module] = args[0][0]
        trace.outputs[module] = output[0]

    def look_beside(block, args):
        trace.beside[block] = args[1:]

    hooks = [block.register_forward_pre_hook(look_beside) for block in part.layers]
    for module in [net.model.embed_tokens, getattr(net.model, "embed_norm", None), part.norm]:
        if module is not None:
            hooks.append(module.register_forward_hook(look))
    for block in part.layers:
        for module in [block, *parts_of(block)]:
            hooks.append(module.register_forward_hook(look))
    try:
        compute()
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def parts_of(block: Block) -> list[nn.Module]:
    """The modules of a block whose inputs and outputs say what it adds to the residual stream."""
    modules = [block.self_attn, block.self_attn.o_proj, block.mlp]
    if hasattr(block, "cross_attn"):
        modules.append(block.cross_attn.o_proj)
    modules += [module for name, module in block.named_children() if name.endswith("norm")]
    return modules


def states(trace: Trace) -> list[Tensor]:
    """The residual stream [(T, C)] of L + 1 places: what the first block reads, and what each block
    leaves."""
    first = trace.inputs[trace.blocks[0]]
    return [first, *[trace.outputs[block] for block in trace.blocks]]


# --------------------------------------------------------------------------------------------------
# The logit lens (nostalgebraist 2020)


@dataclass
class Guesses:
    """What the head makes of the states of one layer, at each position."""

    tokens: list  # (T, k): the likeliest, the likeliest first
    probabilities: list  # (T, k)
    entropies: list  # (T,) in bits
    wanted: list  # (T,): the probability of a token that was asked about
    ranks: list  # (T,): how many tokens are likelier than it


def logit_lens(
    net: GPT, x: Tensor, n_vocab: int, k: int, wanted: list[int] | None = None
) -> Guesses:
    """The Guesses of states x (T, C): by the final norm, the encoder's head layers where there are
    any, and the head, as if no block came behind. wanted (T,) ids, a list; None: the likeliest."""
    with plainly(net):
        logits = net.logits(net.model.norm(x)).float()[:, :n_vocab]  # (T, V)
    logp = logits.log_softmax(-1)
    check_finite(logp)
    best = logp.topk(min(k, n_vocab), -1)
    places = best.indices[:, :1]  # (T, 1)
    if wanted is not None:
        places = torch.tensor(wanted, device=logp.device)[:, None]
    of_wanted = logp.gather(1, places)  # (T, 1)
    p = logp.exp()
    return Guesses(
        best.indices.tolist(),
        best.values.exp().tolist(),
        (-(p * logp).sum(-1) / math.log(2)).tolist(),
        of_wanted[:, 0].exp().tolist(),
        (logp > of_wanted).sum(-1).tolist(),
    )


def check_finite(tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise UserError(NOT_FINITE)


# --------------------------------------------------------------------------------------------------
# Direct logit attribution (Elhage et al. 2021, "A mathematical framework for transformer circuits")


@dataclass
class Share:
    """What one part of the network adds to a logit."""

    kind: str  # token, position, head, cross_head, attention, cross_attention, mlp, bias, rounding
    layer: int | None  # None: before the first block, or behind the last
    head: int | None
    value: float


@dataclass
class Attribution:
    shares: list  # [Share]: they add up to `logit`
    logit: float  # before a softcap of logits
    capped: float | None  # behind it; None: the network has none


def attribute(
    net: GPT, trace: Trace, position: int, token: int, against: int | None = None
) -> Attribution:
    """The Attribution of the logit of `token` at a position of a Trace, or of its difference to
    that of the token `against`.

    The residual stream is a sum: of the embedding, and of what each head and each MLP adds. Every
    norm on its way divides by one number, the scale of the whole; with this frozen it is linear, so
    that a part's share is what becomes of it alone. A norm behind a sum (norm_place "post") divides
    all parts so far, whose shares then hang on every later scale too. The share "rounding" is what
    the network's own sums lose in its dtype."""
    check_linear(net)
    stream = Stream(trace, position)
    stream.add_embedding(net)
    for i in range(len(trace.blocks)):
        stream.add_block(i)
    stream.through(net.model.norm, None)
    weight = head_row(net.lm_head, token)  # (C,) float64
    bias = head_bias(net.lm_head, token)
    if against is not None:
        weight = weight - head_row(net.lm_head, against)
        bias = bias - head_bias(net.lm_head, against)
    values = stream.vectors @ weight * net.config.logit_scale  # (n,)
    shares = []
    for (kind, layer, head), value in zip(stream.names, values.tolist()):
        shares.append(Share(kind, layer, head, value))
    if bias:
        shares.append(Share("bias", None, None, bias))
    h = trace.outputs[net.model.norm][position]  # (C,)
    logit, capped = own_logits(net, h, token, against)
    rounding = logit - sum(share.value for share in shares)
    check_sum(rounding, shares, h.dtype)
    shares.append(Share("rounding", None, None, rounding))
    return Attribution(shares, logit, capped)


def own_logits(net: GPT, h: Tensor, token: int, against: int | None) -> tuple[float, float | None]:
    """(the logit that the network makes of a final state h (C,), or the difference; the same behind
    a softcap, or None)."""
    with plainly(net):
        logits = net.lm_head(net.head_input(h)).float()  # (V,)
        capped = net.logits(h).float()
    check_finite(logits)
    both = []
    for values in (logits, capped):
        other = 0.0 if against is None else values[against].item()
        both.append(values[token].item() - other)
    return both[0], both[1] if net.config.logit_softcap else None


def check_linear(net: GPT) -> None:
    """Refuse a network whose logits are no sum of what its parts add."""
    if net.config.mlm_head:
        raise UserError(
            "no shares: this encoder's head has a layer with an activation (GELU) before the "
            "logits, which are therefore no sum of shares; the logit lens reads it"
        )


def check_sum(rounding: float, shares: list[Share], dtype: torch.dtype) -> None:
    """Refuse shares that leave more than rounding: a fork's block does something else than add."""
    size = sum(abs(share.value) for share in shares)
    most = 1e-4 if dtype in (torch.float32, torch.float64) else 0.1
    if not abs(rounding) <= most * max(size, 1.0):
        raise UserError(
            f"no shares: those of embedding, heads and MLPs leave {rounding:.3g} of the logit, so "
            "this network's blocks do more than add to the residual stream (barelm/lens.py, "
            "`Stream`, says what it expects)"
        )


class Stream:
    """The residual stream at one position of a Trace as a sum of parts: names [(kind, layer,
    head)], and vectors (n, C), float64."""

    def __init__(self, trace: Trace, position: int) -> None:
        self.trace = trace
        self.position = position
        self.names = []
        self.vectors = None

    def read(self, module: nn.Module) -> Tensor:
        """What a module read at this position, (…) float64."""
        return exact(self.trace.inputs[module][self.position])

    def gave(self, module: nn.Module) -> Tensor:
        return exact(self.trace.outputs[module][self.position])

    def add(self, names: list, vectors: Tensor) -> None:
        self.names = self.names + names
        if self.vectors is None:
            self.vectors = vectors
        else:
            self.vectors = torch.cat([self.vectors, vectors])

    def add_bias(self, layer: int, bias: Tensor) -> None:
        """A vector (C,) that is the same in every text; of zeros none is added."""
        if bias is not None and bias.any():
            self.add([("bias", layer, None)], bias[None])

    def through(self, norm: nn.Module, layer: int) -> None:
        """All parts so far pass a norm."""
        self.vectors, bias = normed(norm, self.read(norm), self.vectors)
        self.add_bias(layer, bias)

    def add_embedding(self, net: GPT) -> None:
        """The token's embedding, and what is added to it: its position, and BERT's type."""
        token = self.trace.outputs[net.model.embed_tokens][self.position]  # (C,)
        if net.config.embed_scale:  # in its dtype, as the network does it
            token = token * math.sqrt(net.config.n_embd)
        token = exact(token)
        has_norm = net.config.embed_norm
        whole = self.read(net.model.embed_norm if has_norm else self.trace.blocks[0])
        self.add([("token", None, None)], token[None])
        rest = whole - token
        if rest.any():
            self.add([("position", None, None)], rest[None])
        if has_norm:
            self.through(net.model.embed_norm, None)

    def add_block(self, i: int) -> None:
        """What block i adds, in the order of model.py's Block.forward."""
        block = self.trace.blocks[i]
        is_post = block.c.norm_place == "post"
        self.add_attention(i, block.self_attn, block.attn_out_norm, "")
        if is_post:
            self.through(block.input_layernorm, i)
        if hasattr(block, "cross_attn"):
            self.add_attention(i, block.cross_attn, block.cross_out_norm, "cross_")
        if hasattr(block, "cross_attn") and is_post:
            self.through(block.cross_layernorm, i)
        if is_post:
            self.add([("mlp", i, None)], self.gave(block.mlp)[None])
            self.through(block.post_attention_layernorm, i)
        else:
            self.add([("mlp", i, None)], self.gave(block.mlp_out_norm)[None])

    def add_attention(self, i: int, attention: nn.Module, out_norm: nn.Module, prefix: str) -> None:
        """Each head's part of what attention adds, and its biases; with a bottleneck behind it,
        which is not linear, one part for all heads."""
        layer = attention.o_proj
        whole = self.gave(layer)[None]  # (1, C)
        if hasattr(layer, "down"):  # an Adapter of barelm/adapters.py
            vectors, bias = normed(out_norm, whole[0], whole)
            self.add([(f"{prefix}attention", i, None)], vectors)
            self.add_bias(i, bias)
            return
        n_head = attention.c.n_head
        mixed = self.trace.inputs[layer][self.position].view(n_head, -1)  # (H, D)
        # A head's part: the matrix of all, of an input that is zero but for this head.
        alone = torch.diag_embed(mixed.T).permute(1, 2, 0).flatten(1)  # (H, H D)
        with torch.no_grad():
            constant = exact(layer(torch.zeros_like(alone[:1])))  # (1, C): the bias
            heads = exact(layer(alone)) - constant
        vectors, bias = normed(out_norm, whole[0], torch.cat([heads, constant]))
        names = [(f"{prefix}head", i, h) for h in range(n_head)]
        self.add(names, vectors[:-1])
        self.add_bias(i, vectors[-1] if bias is None else vectors[-1] + bias)


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64 on the host: not every device has it."""
    return tensor.detach().to("cpu", torch.float64)


def normed(norm: nn.Module, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what becomes of parts, vectors (n, C), as their sum x (C,) passes a norm; the norm's bias
    (C,) or None). Its scale is that of x, frozen."""
    if isinstance(norm, nn.Identity):
        return vectors, None
    if isinstance(norm, nn.LayerNorm):
        vectors = vectors - vectors.mean(-1, keepdim=True)
        size = (x.var(correction=0) + norm.eps).sqrt()
        bias = None if norm.bias is None else exact(norm.bias)
    elif isinstance(norm, nn.RMSNorm):
        size = (x.square().mean() + norm.eps).sqrt()
        bias = None
    else:
        name = type(norm).__name__
        raise UserError(f"no shares: they pass RMSNorm and LayerNorm, and this network has {name}")
    return vectors / size * exact(norm.weight), bias


def head_row(head: nn.Linear, token: int) -> Tensor:
    """The weights (C,) float64 of a token's logit."""
    if isinstance(head, QuantizedLinear):
        row = dequantize(head.weight[token, None], head.scale[token, None])
        return exact(row[0, : head.shape[1]])
    return exact(head.weight[token])


def head_bias(head: nn.Linear, token: int) -> float:
    bias = getattr(head, "bias", None)
    return 0.0 if bias is None else bias[token].item()
