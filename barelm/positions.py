"""Where tokens stand: angles to turn by, vectors to add, biases of scores.

B rows, T queries, S keys, H heads, D: head_dim, C: n_embd."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from barelm.devices import wide_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from model import GPTConfig

# --------------------------------------------------------------------------------------------------
# Rotary positions


def rope_frequencies(c: GPTConfig, device: torch.device, theta: float = 0.0) -> Tensor:
    """Radians per position of each pair of dimensions (R / 2,) float32 (Su et al. 2021), R being
    the part of a head that is turned. theta: of another base, without rope_scaling."""
    size = rotary_size(c)
    exponents = torch.arange(0, size, 2, device=device).float() / size
    if theta:
        return theta**-exponents
    scaling = c.rope_scaling
    kind = scaling["rope_type"] if scaling else "none"
    if kind == "ntk":  # a larger base slows what is slow and leaves what is fast (NTK-aware)
        return (c.rope_theta * scaling["factor"] ** (size / (size - 2))) ** -exponents
    frequencies = c.rope_theta**-exponents
    if kind == "none":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "yarn":
        keep = yarn_share(c, scaling, size, device)
    else:
        keep = llama3_share(scaling, frequencies)
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotary_size(c: GPTConfig) -> int:
    """How many dimensions of a head are turned, an even number."""
    return round(c.head_dim * c.rope_fraction)


def llama3_share(scaling: dict, frequencies: Tensor) -> Tensor:
    """How much of each frequency is kept: slow ones are divided, fast ones kept, those between
    blended."""
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_share(c: GPTConfig, scaling: dict, size: int, device: torch.device) -> Tensor:
    """The same of YaRN (Peng et al. 2023, 3.2), whose blend is linear in the pair's number."""
    length = scaling["original_max_position_embeddings"]

    def pair_that_turns(times):
        """The number of the pair that turns so often in `length` tokens."""
        return size * math.log(length / (times * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    first = pair_that_turns(scaling.get("beta_fast") or 32)
    last = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, size - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(size // 2, device=device).float()
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)


def rope_length(c: GPTConfig) -> float:
    """By how much YaRN lengthens turned queries and keys (3.4): the temperature of the softmax."""
    scaling = c.rope_scaling
    if not scaling or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def length(mscale):
        factor = scaling["factor"]
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return length(scaling["mscale"]) / length(scaling["mscale_all_dim"])
    return length(1.0)


def rope_angles(
    c: GPTConfig, positions: Tensor, dtype: torch.dtype, theta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(cos and cos, -sin and sin), each (B, T, 1, R), of the angles by which RoPE turns at
    positions (B, T): for the first half of the R dimensions and for the second."""
    # The angles are float32: bfloat16 has no whole numbers above 256.
    angles = positions[:, :, None, None] * rope_frequencies(c, positions.device, theta)
    cos = angles.cos()
    sin = angles.sin()
    length = 1.0 if theta else rope_length(c)
    if length != 1:
        cos = cos * length
        sin = sin * length
    cos = cos.to(dtype)
    sin = sin.to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


# --------------------------------------------------------------------------------------------------
# Positions that are added


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Fixed position embeddings (…, size): sines, then cosines (Vaswani et al. 2017, 3.5)."""
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size
    angles = positions[..., None] / 10000.0**exponents
    return torch.cat((angles.sin(), angles.cos()), -1)[..., :size]


def document_positions(positions: Tensor, docs: Tensor) -> Tensor:
    """Positions (B, T) that begin at 0 in each document of docs (B, T)."""
    begins = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0))  # a row's first is at 0 anyway
    return positions - (begins * positions).cummax(1).values


# --------------------------------------------------------------------------------------------------
# Biases of scores


def alibi_slopes(n_head: int, device: torch.device | None = None) -> Tensor:
    """(H,) float32, of Press et al. 2022 (3): 2^(-8 / H), its square, …; where H is no power of
    two, those of the power below, and then every second one of the power above."""
    below = 2 ** math.floor(math.log2(n_head))
    wide = torch.float64 if device is None else wide_dtype(device)
    numbers = torch.arange(n_head, device=device, dtype=wide)
    slopes = 2 ** (-8 * (numbers[:below] + 1) / below)
    between = 2 ** (-4 * (2 * numbers[: n_head - below] + 1) / below)
    return torch.cat((slopes, between)).float()


def alibi(positions: Tensor, key_positions: Tensor, slopes: Tensor) -> Tensor:
    """Minus the distance, times each head's slope (H,): (B or 1, H, T, S) float32."""
    distance = (positions[:, :, None] - key_positions[:, None, :]).abs()  # (B or 1, T, S)
    return -slopes[:, None, None] * distance[:, None].float()


def relative_bucket(distance: Tensor, n_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """The bucket 0 to n_buckets - 1 of each distance (key less query), int64: half of them for a
    distance each, half for ranges that grow to max_distance (Raffel et al. 2020, 2.1). Without
    causality keys behind a query have half of the buckets."""
    n = n_buckets
    bucket = torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        n = n // 2
        bucket = (distance > 0).long() * n
        distance = distance.abs()
    exact = n // 2
    ranges = (distance.float() / exact).clamp(min=1).log() / math.log(max_distance / exact)
    far = exact + (ranges * (n - exact)).long()
    return bucket + distance.where(distance < exact, far.clamp(max=n - 1))


def relative(
    positions: Tensor, key_positions: Tensor, table: Tensor, c: GPTConfig, causal: bool
) -> Tensor:
    """T5's bias (B or 1, H, T, S) by a learned table (n_buckets, H)."""
    distance = key_positions[:, None, :] - positions[:, :, None]  # (B or 1, T, S)
    bucket = relative_bucket(distance, c.n_buckets, c.max_distance, causal)
    return F.embedding(bucket, table).permute(0, 3, 1, 2)
