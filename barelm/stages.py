"""Which blocks of a network each stage of a pipeline has, so that the slowest one has the least to
do; the last has the head too. Pipelines (pipeline.py) and plans (footprint.py) ask here."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from barelm.optim import attention_products, mlp_weights
from barelm.patterns import Pattern

if TYPE_CHECKING:
    from model import GPTConfig


def block_costs(c: GPTConfig, seq_len: int) -> list[float]:
    """Multiplications of a token in each block: [float]."""
    heads = 2 * c.head_dim * c.n_embd * (c.n_head + c.n_kv_head)  # q and o, k and v
    costs = []
    for i, pattern in enumerate(c.patterns):
        costs.append(heads + attention_products(c, pattern, seq_len) + mlp_weights(c, i))
    return costs


def head_cost(c: GPTConfig, seq_len: int) -> int:
    """The same of what stands behind the blocks. What stands before them multiplies nothing: the
    embedding is looked up."""
    cost = c.n_embd * c.vocab_size
    if c.mlm_head:
        cost += c.n_embd**2
    if c.mtp:
        heads = 2 * c.head_dim * c.n_embd * (c.n_head + c.n_kv_head)
        block = heads + attention_products(c, Pattern(), seq_len) + 2 * c.n_embd**2
        cost += c.mtp * (block + mlp_weights(c, 0) + c.n_embd * c.vocab_size)
    return cost


@lru_cache(1024)  # a plan asks often
def split_blocks(
    costs: tuple[int, ...], n_stages: int, last_cost: float = 0.0
) -> list[tuple[int, int]]:
    """Which blocks each stage has, [(begin, end)], so that the slowest stage has the least to do.
    costs: a tuple, of each block; last_cost: what the last stage does besides."""
    n = len(costs)
    before = [0.0]  # the costs of the first blocks
    for cost in costs:
        before.append(before[-1] + cost)
    # Of the first `end` blocks in so many stages: (the slowest stage, the sum of squares, which
    # chooses the evenest of those that are as fast; where the last of these stages begins).
    best = [{0: (0.0, 0.0, 0)}]
    for stage in range(1, n_stages + 1):
        extra = last_cost if stage == n_stages else 0.0
        ends = {}
        for end in range(stage, n + 1):
            ways = []
            for begin in range(stage - 1, end):
                if begin not in best[-1]:
                    continue
                slowest, squares, _ = best[-1][begin]
                cost = before[end] - before[begin] + extra
                ways.append((max(slowest, cost), squares + cost**2, begin))
            if ways:
                ends[end] = min(ways)
        best.append(ends)
    stages = []
    end = n
    for stage in range(n_stages, 0, -1):
        begin = best[stage][end][2]
        stages.append((begin, end))
        end = begin
    return stages[::-1]


def stages_of(c: GPTConfig, n_stages: int, seq_len: int = 0) -> list[tuple[int, int]]:
    """Which blocks each stage of a network has: [(begin, end)]. The longest context decides, so
    that a checkpoint of another seq_len is split alike."""
    seq_len = seq_len or c.n_ctx
    if n_stages == 1:
        return [(0, c.n_layer)]
    return split_blocks(tuple(block_costs(c, seq_len)), n_stages, head_cost(c, seq_len))


def stage_blocks(c: GPTConfig, n_stages: int) -> list[int]:
    """[how many blocks each stage has]."""
    return [end - begin for begin, end in stages_of(c, n_stages)]
