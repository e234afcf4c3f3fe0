"""llama.cpp's K-quants: Q4_K, Q5_K and Q6_K, weights of 4.5, 5.5 and 6.6 bits.

256 weights of a row are a block, which has one or two float16 numbers; its 8 or 16 groups have
scales of 6 or 8 bits that multiply these (llama.cpp, ggml/src/ggml-quants.c). What is here finds
the codes as llama.cpp does: by trying some scales for each group and keeping the best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 256  # weights
AT_ONCE = 64 * BLOCK  # weights whose codes are searched for together: they stay in the cache
TINY = np.float32(1e-15)  # a group whose largest weight is below is zero
Floats = np.ndarray
Bytes = np.ndarray


def quantize(values: Floats, type_name: str) -> Bytes:
    """The bytes (…, rows, bytes of a row) uint8 of values (…, rows, columns) float32 in a type of
    K_QUANTS. columns is a multiple of 256."""
    encode = K_QUANTS[type_name]
    rows = np.ascontiguousarray(values, np.float32)
    blocks = rows.reshape(-1, BLOCK)
    at_once = AT_ONCE // BLOCK
    parts = []
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # of groups that are zero
        for start in range(0, len(blocks), at_once):
            parts.append(encode(blocks[start : start + at_once]))
    codes = np.concatenate(parts)  # (blocks, bytes of one)
    return codes.reshape(*rows.shape[:-1], -1)


# --------------------------------------------------------------------------------------------------
# The search for scales. Groups stand side by side, (weights of a group, groups), so that each sum
# over a group adds rows.


def fit_lines(x: Floats, top: int, lowest: float, n_tries: int) -> tuple[Floats, Floats]:
    """(scales, minima), each (G,) float32, with which scale * code - minimum, of codes 0 to top, is
    nearest to the groups x (n, G). A weight's error counts the more the larger it is. Of each try,
    the codes, the line is the least squares'; tries begin at `lowest` and are 0.1 apart."""
    weight = np.sqrt((x * x).mean(0)) + np.abs(x)
    low = np.minimum(x.min(0), 0)
    high = x.max(0)
    is_flat = high == low
    scale = (high - low) / np.float32(top)
    codes = np.rint((x - low) / scale).clip(0, top)
    error = (weight * (scale * codes + low - x) ** 2).sum(0)
    sum_w = weight.sum(0)
    weighted = weight * x
    sum_x = weighted.sum(0)
    for i in range(n_tries):
        inverse = np.float32(lowest + 0.1 * i + top) / (high - low)
        codes = np.rint(inverse * (x - low)).clip(0, top)
        products = weight * codes
        sum_l = products.sum(0)
        sum_ll = (products * codes).sum(0)
        sum_xl = (weighted * codes).sum(0)
        determinant = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        is_above = new_low > 0  # a minimum is subtracted: it cannot be below zero
        new_scale = np.where(is_above, sum_xl / sum_ll, new_scale)
        new_low = np.where(is_above, 0, new_low)
        new_error = (weight * (new_scale * codes + new_low - x) ** 2).sum(0)
        is_better = (determinant > 0) & (new_error < error)
        error = np.where(is_better, new_error, error)
        scale = np.where(is_better, new_scale, scale)
        low = np.where(is_better, new_low, low)
    return np.where(is_flat, 0, scale).astype(np.float32), -low.astype(np.float32)


def fit_scales(x: Floats, half: int) -> Floats:
    """scales (G,) float32 with which scale * code, of codes -half to half - 1, is nearest to the
    groups x (n, G), in squares that count by the square of the weight."""
    largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    square = x * x
    weighted = square * x
    scale = np.zeros_like(largest)
    best = np.zeros_like(largest)  # by how much the best codes make the error smaller
    for i in [0, *range(-9, 0), *range(1, 10)]:  # 0: the largest weight is the lowest code
        inverse = -np.float32(half + 0.1 * i) / largest
        codes = np.rint(inverse * x).clip(-half, half - 1)
        sum_xl = (weighted * codes).sum(0)
        sum_ll = (square * codes * codes).sum(0)
        is_better = sum_xl * sum_xl > best * sum_ll
        scale = np.where(is_better, sum_xl / sum_ll, scale)
        best = np.where(is_better, scale * sum_xl, best)
    return np.where(np.abs(largest) < TINY, 0, scale)


# --------------------------------------------------------------------------------------------------
# Bytes


def float16_bytes(values: Floats) -> Bytes:
    """(B, 2) uint8 of values (B,)."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def pack_scales(scales: Bytes, minima: Bytes) -> Bytes:
    """12 bytes of the 6-bit scales and minima of 8 groups, (B, 8) uint8 each: the first four of
    both in the low bits of 8 bytes; of the others the low halves in 4 bytes, the two bits above
    them in the high bits of the first 8."""
    first = np.concatenate((scales[:, :4], minima[:, :4]), 1)
    last = np.concatenate((scales[:, 4:], minima[:, 4:]), 1)
    halves = (last[:, :4] & 15) | (last[:, 4:] & 15) << 4
    return np.concatenate((first | (last >> 4) << 6, halves), 1)


def quantize_lines(blocks: Floats, top: int, lowest: float, n_tries: int) -> tuple:
    """(codes (B, 8, 32) uint8, the 16 bytes (B, 16) of scales and minima) of blocks (B, 256)."""
    groups = blocks.reshape(-1, 32)
    scale, low = fit_lines(np.ascontiguousarray(groups.T), top, lowest, n_tries)
    steps = []  # of the block's scales and minima: what a code of 1 is worth
    codes6 = []
    for numbers in (scale.reshape(-1, 8), low.reshape(-1, 8)):
        largest = numbers.max(1).clip(0)
        factor = np.where(largest > 0, np.float32(63) / largest, 0)
        codes6.append(np.rint(factor[:, None] * numbers).clip(0, 63).astype(np.uint8))
        steps.append((largest / np.float32(63)).astype(np.float16))
    head = np.concatenate([*map(float16_bytes, steps), pack_scales(*codes6)], 1)
    rounded = []  # the numbers that a reader will have, (B, 8, 1)
    for step, codes in zip(steps, codes6):
        rounded.append((step.astype(np.float32)[:, None] * codes)[:, :, None])
    scale, low = rounded
    codes = np.rint((blocks.reshape(-1, 8, 32) + low) / scale)
    codes = np.where(scale == 0, 0, codes).clip(0, top)
    return codes.astype(np.uint8), head


def encode_q4_k(blocks: Floats) -> Bytes:
    """(B, 144) uint8 of blocks (B, 256): two groups in the halves of 32 bytes."""
    codes, head = quantize_lines(blocks, 15, -1, 21)
    return np.concatenate((head, two_by_two(codes)), 1)


def two_by_two(codes: Bytes) -> Bytes:
    """The low halves of codes (B, 8, 32) in 128 bytes: of each two groups the first ones below."""
    low = codes[:, 0::2] & 15  # (B, 4, 32)
    high = codes[:, 1::2] & 15
    return (low | high << 4).reshape(-1, 128)


def encode_q5_k(blocks: Floats) -> Bytes:
    """(B, 176) uint8 of blocks (B, 256): the fifth bits of 8 groups in 32 bytes, then as Q4_K."""
    codes, head = quantize_lines(blocks, 31, -0.5, 16)
    places = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = np.bitwise_or.reduce((codes >> 4) << places, 1)  # (B, 32)
    return np.concatenate((head, fifth, two_by_two(codes)), 1)


def encode_q6_k(blocks: Floats) -> Bytes:
    """(B, 210) uint8 of blocks (B, 256): the low halves of codes, their high bits, 16 scales of 8
    bits, the block's step."""
    groups = blocks.reshape(-1, 16)
    scales = fit_scales(np.ascontiguousarray(groups.T), 32).reshape(-1, 16)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(1)[:, None], 1)  # (B, 1)
    is_zero = np.abs(largest) < TINY
    factor = np.where(is_zero, 0, np.float32(-128) / largest)
    codes8 = np.rint(factor * scales).clip(-128, 127).astype(np.int8)
    step = np.where(is_zero, 0, 1 / factor).astype(np.float16)  # (B, 1)
    scale = (step.astype(np.float32) * codes8)[:, :, None]
    codes = np.rint(blocks.reshape(-1, 16, 16) / scale)
    codes = np.where(scale == 0, -32, codes).clip(-32, 31) + 32  # llama.cpp's bytes of nothing: 0
    halves = codes.astype(np.uint8).reshape(-1, 2, 4, 32)  # a half of the block is 4 times 32
    low = (halves[:, :, :2] & 15) | (halves[:, :, 2:] & 15) << 4  # (B, 2, 2, 32)
    places = (2 * np.arange(4, dtype=np.uint8))[:, None]
    high = np.bitwise_or.reduce((halves >> 4) << places, 2)  # (B, 2, 32)
    parts = (low.reshape(-1, 128), high.reshape(-1, 64), codes8.view(np.uint8))
    return np.concatenate((*parts, float16_bytes(step[:, 0])), 1)


K_QUANTS: dict[str, Callable] = {"Q4_K": encode_q4_k, "Q5_K": encode_q5_k, "Q6_K": encode_q6_k}
