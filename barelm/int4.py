"""int4 codes of a matrix: 16 levels for each 32 weights of a row, where products change least.

Rounding a weight by e changes what its row makes of an input x by e x. So the square of e counts as
often as the mean square of x says, its importance: a few channels of a network are a hundred times
as large as the others. `input_squares` measures it with random tokens; no text is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from model import GPT

GROUP = 32  # weights of a row that share their levels
OLD_GROUP = 64  # of the folders of int4 weights whose config.json has no int4_group
TILE = 64  # rows are padded to a multiple: a GPU's product reads so many weights together

SPREADS = (1.0, 0.9, 0.8)  # shares of a group's range at which the search begins
REFITS = 2  # lines fitted from each beginning
N_TOKENS = 256  # random ones, by which inputs are measured


def int4_codes(
    w: Tensor, importance: Tensor | None = None, group: int = GROUP
) -> tuple[Tensor, Tensor]:
    """Codes of w (out, in), two a byte (out, in / 2) uint8, and for each group in a row a step and
    a middle (out, in / group, 2) bfloat16: a weight is (code - 8) step + middle. Rows are padded to
    whole tiles. importance (in,): how much the square of a weight's error counts, for the search of
    steps and middles; None: the levels are even from the group's minimum to its maximum."""
    padding = (0, -w.shape[1] % TILE)
    groups = F.pad(w, padding).unflatten(1, (-1, group))  # (out, n, group)
    has_zero = F.pad(w == 0, padding).unflatten(1, (-1, group)).any(2)  # (out, n)
    if importance is None:
        scale = even_levels(groups.amin(2), groups.amax(2), has_zero)
    else:
        counts = F.pad(importance, padding).unflatten(0, (-1, group))  # (n, group)
        scale = best_levels(groups, has_zero, counts)
    codes = (nearest(groups, scale) + 8).to(torch.uint8).flatten(1)  # (out, in)
    pairs = codes[:, ::2] | codes[:, 1::2] << 4
    return pairs, scale


def even_levels(low: Tensor, high: Tensor, has_zero: Tensor) -> Tensor:
    """Steps and middles (out, n, 2) of 16 levels from low to high (out, n)."""
    return levels_through(-8, low, (high - low) / 15, has_zero)


def levels_through(code: Tensor | int, weight: Tensor, step: Tensor, has_zero: Tensor) -> Tensor:
    """Steps (out, n) in bfloat16, and the middles with which a code stands for a weight (out, n):
    (out, n, 2). Where has_zero (out, n) says that a weight is zero, which pruning makes, so is a
    level: there the middle is a whole number of steps."""
    step = step.clamp(min=1e-30)
    rounded = step.bfloat16().where(~has_zero, few_bits(step))
    middle = weight - code * rounded.float()
    whole = (middle / rounded.float()).round().clamp(-7, 8) * rounded.float()
    middle = middle.where(~has_zero, whole)
    return torch.stack((rounded, middle.bfloat16()), 2)


def few_bits(step: Tensor) -> Tensor:
    """Positive steps as bfloat16, rounded up to 5 bits: the product of one and a whole number below
    8 has no more than bfloat16's 8 bits, so that it is exact."""
    fraction, exponent = torch.frexp(step)  # from 1/2 to 1
    return torch.ldexp((fraction * 32).ceil() / 32, exponent).bfloat16()


def nearest(groups: Tensor, scale: Tensor) -> Tensor:
    """The codes (out, n, group), -8 to 7 as float32, of the levels nearest to the weights."""
    step, middle = scale.float().split(1, 2)  # (out, n, 1) each
    return (groups - middle).div_(step).round_().clamp_(-8, 7)


def best_levels(groups: Tensor, has_zero: Tensor, counts: Tensor) -> Tensor:
    """The steps and middles (out, n, 2) of the least error that a search comes by, never a greater
    one than even levels have. groups (out, n, group); counts (n, group): of the errors' squares.

    From the codes of evenly placed levels, the step and the middle that fit the weights best are
    those of a line, weights over codes, by least squares; other codes are then the nearest, and so
    on. It ends where it began near, so it begins at several spreads."""
    low = groups.amin(2)
    high = groups.amax(2)
    best = even_levels(low, high, has_zero)
    codes = nearest(groups, best)
    least = weighted_error(groups, codes, best, counts)
    for spread in SPREADS:
        cut = (high - low) * (1 - spread) / 2
        codes = nearest(groups, even_levels(low + cut, high - cut, has_zero))
        for _ in range(REFITS):
            levels = fitted_levels(groups, codes, counts, has_zero)
            codes = nearest(groups, levels)
            error = weighted_error(groups, codes, levels, counts)
            better = error < least  # (out, n)
            best = torch.where(better[..., None], levels, best)
            least = torch.where(better, error, least)
    return best


def weighted_error(groups: Tensor, codes: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    """The sums (out, n) of counts times the squared errors of the codes' levels."""
    step, middle = scale.float().split(1, 2)
    error = torch.addcmul(middle, codes, step).sub_(groups)
    return error.square_().mul_(counts).sum(2)


def fitted_levels(groups: Tensor, codes: Tensor, counts: Tensor, has_zero: Tensor) -> Tensor:
    """The steps and middles (out, n, 2) of the line through weights over codes, by least squares
    in which each pair counts so often."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1e-30)  # (n, group)
    weighted = codes * shares
    mean_code = weighted.sum(2)  # (out, n)
    mean_weight = (groups * shares).sum(2)
    spread = (weighted * codes).sum(2) - mean_code.square()
    joint = (weighted * groups).sum(2) - mean_code * mean_weight
    step = joint / spread.clamp(min=1e-12)  # of codes that are all alike: 0
    return levels_through(mean_code, mean_weight, step, has_zero)


# --------------------------------------------------------------------------------------------------
# What the inputs of a network's layers weigh


@torch.no_grad()
def input_squares(net: GPT) -> dict[str, Tensor]:
    """{name of a linear layer: the mean squares (in,) float32 of what it reads}, rounded to powers
    of two, of random tokens of the network's vocabulary, the same each time. Layers that do not
    compute then (of tokens further ahead, say) are not among them."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            hooks.append(layer.register_forward_pre_hook(adder(sums, name)))
    training = net.training
    try:
        net.eval()
        read_random_tokens(net)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    # Another thread count adds in another order; rounded so, it seldom makes other codes.
    return {name: total.clamp(min=1e-30).log2().round().exp2() for name, total in sums.items()}


def adder(sums: dict[str, Tensor], name: str) -> Callable:
    """A hook on a layer, which adds the squares of what it reads to sums[name]."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float().flatten(0, -2)  # (N, in)
        sums[name] = sums.get(name, 0) + x.square().sum(0)

    return add


def read_random_tokens(net: GPT) -> None:
    """Compute the hidden states of N_TOKENS random tokens, an encoder-decoder's source as well."""
    length = min(N_TOKENS, net.config.n_ctx)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(net.config.vocab_size, (N_TOKENS // length, length), generator=generator)
    ids = ids.to(net.model.embed_tokens.weight.device)
    if net.config.is_seq2seq:
        net.hidden(ids, encoder_ids=ids)
    else:
        net.hidden(ids)
