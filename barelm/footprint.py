"""What a process holds while it trains, in bytes by kind, on any mesh: the one estimate, by which
train.py chooses its micro-batches and report.py a mesh.

    step = Step(config, Sizes(shard=8), shapes_of(net), seq_len=2048, rows=4)
    by_kind = footprint(step)             # {"weights": ..., "gradients": ..., ...}
    total_bytes(by_kind)

Every formula is in docs/parallel.md; tests/test_plan.py measures them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch

from barelm.fast import head_rows
from barelm.mesh import Sizes
from barelm.optim import MLP_MATRICES, probabilities_kept, score_bytes
from barelm.parallel import needs_fully_shard
from barelm.patterns import Pattern
from barelm.scaling import empty_network
from barelm.stages import stage_blocks

if TYPE_CHECKING:
    from model import GPT, GPTConfig

# Of a block, by what tensor parallelism divides: products' columns, and products' rows.
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Step:
    """A step of training, as far as bytes and FLOPs depend on it."""

    config: GPTConfig
    sizes: Sizes
    shapes: tuple  # Shapes, of the whole network
    seq_len: int
    rows: int = 1  # windows of a micro-batch
    n_micro: int = 1  # micro-batches of a step
    dtype: torch.dtype = torch.bfloat16  # of the products
    optimizer: str = "adamw"
    zero: int = 0
    grad_dtype: torch.dtype = torch.float32
    offload: bool = False
    recompute: int = 0  # so many blocks, the first, are computed again in backward
    device_type: str = "cuda"
    local_world: int = 8  # processes on a machine

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on a process."""
        return self.rows * self.seq_len // self.sizes.cp

    @property
    def step_tokens(self) -> int:
        """Of a step, over all processes."""
        return self.rows * self.seq_len * self.n_micro * self.sizes.data

    @cached_property
    def blocks(self) -> list[int]:
        """[how many blocks each pipeline stage has]."""
        return stage_blocks(self.config, self.sizes.pp)

    @property
    def autocasts(self) -> bool:
        """Whether the products read copies of the weights in another dtype."""
        return self.dtype != torch.float32

    @property
    def gathers(self) -> bool:
        """Whether fully_shard gathers each block's weights when it is its turn."""
        return needs_fully_shard(self.sizes)


class Shapes(tuple):
    """((name, shape), ...): a tuple that is hashed once, as a search asks thousands of times."""

    def __hash__(self):
        if not hasattr(self, "hashed"):
            self.hashed = super().__hash__()
        return self.hashed


def shapes_of(net: GPT) -> Shapes:
    """The Shapes of a network's parameters, a tied one once."""
    return Shapes((name, tuple(p.shape)) for name, p in net.named_parameters())


def planned_shapes(config: GPTConfig) -> Shapes:
    """`shapes_of` a network of this config: of as few blocks as have each of its kinds, which
    repeat."""
    n_kinds = max(len(config.layers), len(config.expert_layers), 1)
    n_made = min(n_kinds, config.n_layer)
    shapes = []
    first = {}  # number of a block: its parameters
    for name, shape in shapes_of(empty_network(replace(config, n_layer=n_made))):
        if not name.startswith("model.layers."):
            shapes.append((name, shape))
            continue
        *_, rest = name.split(".", 3)
        first.setdefault(block_number(name), []).append((rest, shape))
    for block in range(config.n_layer):
        shapes += [(f"model.layers.{block}.{rest}", shape) for rest, shape in first[block % n_made]]
    return Shapes(shapes)


# --------------------------------------------------------------------------------------------------
# Who holds what of the parameters


@dataclass(frozen=True)
class Part:
    """What a process holds of a parameter."""

    name: str
    numel: int  # that it holds
    gathered: int  # when its block computes
    is_matrix: bool  # of a block: Muon's
    block: int | None  # the number of its block; None: it is of no block


def block_number(name: str) -> int | None:
    """The number of the block that a parameter is of, or None."""
    words = name.split(".")
    if "layers" not in words:
        return None
    return int(words[words.index("layers") + 1])


def divided_shape(name: str, shape: tuple[int, ...], tp: int, n_kv_head: int) -> tuple[int, ...]:
    """The shape of a process's part for tensor parallelism of size tp. A single head of keys and
    values is whole in each."""
    module, _, kind = name.rpartition(".")
    module = module.rpartition(".")[2]
    if tp == 1 or len(shape) > 2 or (n_kv_head == 1 and module in ("k_proj", "v_proj")):
        return shape
    if module in COLUMNS or (name in VOCABULARY and shape[0] % tp == 0):
        return (shape[0] // tp, *shape[1:])
    if module in ROWS and kind == "weight":
        return (shape[0], shape[1] // tp)
    return shape


def parts_of(step: Step, stage: int = 0) -> list[Part]:
    """[Part] of each parameter that a process of a pipeline stage holds; of parts that are not
    equal the largest."""
    c = step.config
    counts = tuple(step.blocks)
    return divide(step.shapes, step.sizes, counts, stage, c.tie, c.n_kv_head)


@lru_cache(256)  # a search for the best mesh asks often
def divide(
    shapes: Shapes, sizes: Sizes, counts: tuple[int, ...], stage: int, tie: bool, n_kv_head: int
) -> list[Part]:
    """`parts_of`, where the stages have so many blocks."""
    first = sum(counts[:stage])
    last = first + counts[stage]
    parts = []
    for name, shape in shapes:
        block = block_number(name)
        is_of_decoder = name.startswith("model.layers.")
        if is_of_decoder and not first <= block < last:
            continue
        if not is_of_decoder and not holds(name, stage, sizes.pp, tie):
            continue
        local = divided_shape(name, shape, sizes.tp, n_kv_head)
        rows = math.ceil(local[0] / sizes.shard)  # fully_shard divides the first dimension
        numel = rows * math.prod(local[1:])
        is_matrix = block is not None and len(shape) > 1
        parts.append(Part(name, numel, math.prod(local), is_matrix, block))
    return parts


def holds(name: str, stage: int, pp: int, tie: bool) -> bool:
    """Whether a stage holds a parameter that is of no block: the first has what stands before the
    blocks, the last what stands behind them; a tied matrix is in both."""
    if pp == 1:
        return True
    if name.startswith(("model.norm", "lm_head", "head_")):
        return stage == pp - 1
    if name == "model.embed_tokens.weight" and tie:
        return stage in (0, pp - 1)
    return stage == 0


# --------------------------------------------------------------------------------------------------
# Activations


def block_numbers(c: GPTConfig, tp: int, width: int) -> int:
    """Bytes that a token leaves in a block for backward, but for scores that are kept: x before
    attention and before the MLP, what the products read, and theirs that are not linear in what
    they read. What a product gives that only an addition reads is not kept."""
    D = c.head_dim
    H = c.n_head // tp
    G = max(1, c.n_kv_head // tp)
    stored = 2 * 4 * c.n_embd + 2 * width * c.n_embd  # x twice, in full; norm(x) twice
    stored += width * (H + 2 * G) * D  # q, k and v as they are projected
    stored += width * H * D  # what attention gives
    if c.pos == "rope" or c.qk_norm:
        stored += width * (H + G) * D  # q and k as attention reads them
    if c.qk_norm and width < 4:
        stored += 4 * (H + G) * D  # norms are computed in full
    return stored + 4 * H  # and each softmax's sum


def dense_bytes(c: GPTConfig, tp: int, width: int) -> int:
    """The same of an MLP: what the activation reads, its value, and of a gated one the product."""
    n = 4 if MLP_MATRICES[c.mlp] == 3 else 2
    return width * n * c.n_hidden // tp


def mlp_bytes(c: GPTConfig, layer: int, tp: int, width: int) -> int:
    """The same of a decoder's MLP, or of the experts that a token goes to."""
    if not c.has_experts[layer]:
        return dense_bytes(c, tp, width)
    n = 4 if MLP_MATRICES[c.mlp] == 3 else 2
    k = c.n_experts_per_token
    numbers = (k + c.n_shared_experts) * n * c.expert_hidden + 3 * k * c.n_embd + 2 * c.n_experts
    return width * numbers


def attention_bytes(step: Step, pattern: Pattern) -> float:
    """The same of the scores, where a kernel keeps them, and of the keys that are gathered."""
    c = step.config
    width = step.dtype.itemsize
    tp = step.sizes.tp
    stored = score_bytes(c, step.seq_len, width) / tp
    if not stored and step.device_type == "cpu":
        stored = width * c.n_head / tp * probabilities_kept(pattern, step.seq_len, width)
    cp = step.sizes.cp
    if cp > 1:  # of each token of its own, cp tokens' keys and values
        stored += cp * width * 2 * c.n_kv_head * c.head_dim / tp
    return stored


def token_bytes(step: Step) -> list[float]:
    """[bytes that a token leaves in each block]: of an encoder those of its source's, then the
    decoder's, then those that predict further ahead."""
    c = step.config
    width = step.dtype.itemsize
    tp = step.sizes.tp
    cross = cross_bytes(step) if c.is_seq2seq else 0
    sizes = []
    for pattern in c.encoder_patterns:
        sizes.append(block_numbers(c, tp, width) + attention_bytes(step, pattern))
        sizes[-1] += dense_bytes(c, tp, width)
    of_kind = {}  # blocks that look alike are counted once
    for layer, (pattern, has_experts) in enumerate(zip(c.patterns, c.has_experts)):
        kind = (pattern, has_experts)
        if kind not in of_kind:
            size = block_numbers(c, tp, width) + mlp_bytes(c, layer, tp, width)
            of_kind[kind] = size + attention_bytes(step, pattern) + cross
        sizes.append(of_kind[kind])
    ahead = block_numbers(c, tp, width) + attention_bytes(step, Pattern())
    ahead += dense_bytes(c, tp, width) + 4 * 6 * c.n_embd  # two states, joined
    return sizes + [ahead] * c.mtp


def cross_bytes(step: Step) -> float:
    """The same of attention to a source of as many tokens: x and its norm, q, the source's k and v,
    what attention gives, scores where they are kept."""
    c = step.config
    width = step.dtype.itemsize
    heads = 2 * (c.n_head + c.n_kv_head) * c.head_dim / step.sizes.tp
    return (4 + width) * c.n_embd + width * heads + score_bytes(c, step.seq_len, width)


def stage_bytes(step: Step, stage: int) -> tuple[list[float], list]:
    """(bytes that a token leaves in each block of a stage that keeps them, in each that is computed
    again)."""
    blocks = token_bytes(step)
    first = 0
    if step.sizes.pp > 1:
        counts = step.blocks
        first = sum(counts[:stage])
        blocks = blocks[first : first + counts[stage]]
    n_again = min(max(step.recompute - first, 0), len(blocks))
    return blocks[n_again:], blocks[:n_again]


def activations(step: Step, stage: int = 0) -> float:
    """Bytes of the activations that a process of a stage holds at most, without the head's."""
    c = step.config
    pp = step.sizes.pp
    stored, again = stage_bytes(step, stage)
    of_token = sum(stored) + 4 * c.n_embd * len(again)
    in_flight = min(pp - stage, step.n_micro)  # of 1F1B (Narayanan et al. 2021, 2.2)
    ends = 16  # ids and targets
    if stage == pp - 1:
        ends += (8 + step.dtype.itemsize) * c.n_embd  # x, its norm and the gradient of that
    return step.tokens * (in_flight * of_token + ends)


def head_bytes(step: Step) -> float:
    """Bytes around the logits, which are made by pieces; the gradient of the head's matrix."""
    c = step.config
    width = step.dtype.itemsize
    rows = min(step.tokens, head_rows(step.device_type, step.dtype, c.vocab_size))
    vocab_size = c.vocab_size / step.sizes.tp
    each = width + 4 if width == 4 else width + 8
    logits = rows * vocab_size * each
    if c.logit_softcap:  # not by pieces: those around tanh, log p and its gradient
        logits = step.tokens * vocab_size * (width + 16)
    return logits + 4 * c.n_embd * vocab_size


def backward_bytes(step: Step, stage: int) -> float:
    """Bytes that a block's backward takes for a moment: the gradients of its widest activations; of
    one that is computed again its activations, when those of the blocks behind it are gone."""
    c = step.config
    width = step.dtype.itemsize
    n = 3 if MLP_MATRICES[c.mlp] == 3 else 2
    each = width * n * c.n_hidden / step.sizes.tp + 8 * c.n_embd
    stored, again = stage_bytes(step, stage)
    if again:
        each += max(0, max(again) - sum(stored))
    return step.tokens * each


# --------------------------------------------------------------------------------------------------
# All of it


def footprint(step: Step) -> dict[str, float]:
    """{kind: bytes} of the process that holds the most: weights, gathered, gradients, optimizer,
    activations, passing."""
    stages = {0, step.sizes.pp - 1}
    return max((stage_footprint(step, stage) for stage in sorted(stages)), key=total_bytes)


def total_bytes(bytes_by_kind: dict[str, float]) -> float:
    return sum(bytes_by_kind.values())


def windows_that_fit(step: Step, budget: float) -> int:
    """The most windows of a micro-batch with which a process holds at most `budget` bytes; 0: not
    even one."""

    def fits(rows):
        return total_bytes(footprint(replace(step, rows=rows))) <= budget

    high = 1
    while fits(high) and high < 1 << 20:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def stage_footprint(step: Step, stage: int) -> dict:
    """`footprint` of a process of this stage."""
    parts = parts_of(step, stage)
    n = sum(part.numel for part in parts)
    bytes_by_kind = {"weights": 4 * n}
    bytes_by_kind["gradients"] = gradient_bytes(step, n)
    bytes_by_kind["optimizer"] = 0 if step.offload else optimizer_bytes(step, parts)
    bytes_by_kind["activations"] = activations(step, stage)
    bytes_by_kind["passing"] = passing_bytes(step, stage, parts)
    return bytes_by_kind


def gradient_bytes(step: Step, n: int) -> int:
    """Bytes of the gradients of n numbers. DistributedDataParallel sums them in buckets of its own,
    beside those that earlier micro-batches left."""
    size = step.grad_dtype.itemsize * n
    has_buckets = step.sizes.replica > 1 and not step.gathers
    if has_buckets and step.n_micro > 1:
        size += 4 * n
    return size


def optimizer_bytes(step: Step, parts: list[Part]) -> int:
    """Bytes of the averages: of Muon's matrices one, of all others two."""
    muon = [part.numel for part in parts if part.is_matrix and step.optimizer == "muon"]
    adamw = [part.numel for part in parts if not part.is_matrix or step.optimizer != "muon"]
    if step.zero:  # each optimizer divides its own
        n = step.sizes.replica
        return 4 * largest_share(muon, n) + 8 * largest_share(adamw, n)
    return 4 * sum(muon) + 8 * sum(adamw)


def largest_share(sizes: list[int], n: int) -> int:
    """The most that one of n processes gets where each parameter goes whole to the one with the
    least so far, the largest first: ZeroRedundancyOptimizer's way."""
    shares = [0] * n
    for size in sorted(sizes, reverse=True):
        shares[shares.index(min(shares))] += size
    return max(shares)


def passing_bytes(step: Step, stage: int, parts: list[Part]) -> float:
    """Bytes that live within a step: copies and whole ones of weights, logits, gradients on their
    way. The larger of what is there around the head and within a block's backward."""
    width = step.dtype.itemsize
    of_block = {}
    for part in parts:
        of_block[part.block] = of_block.get(part.block, 0) + part.gathered
    rest = of_block.pop(None, 0)
    largest = max(of_block.values(), default=0)
    always = 0
    in_block = backward_bytes(step, stage)
    if step.gathers:
        always = 4 * rest  # whole from its forward to the end of the backward
        in_block += largest * (2 * width + width + 4)  # this block, the next; its gradients
    elif step.autocasts:
        always = width * sum(of_block.values())
    if step.autocasts:
        always += width * step.config.n_embd * step.config.vocab_size / step.sizes.tp
    at_head = head_bytes(step) if stage == step.sizes.pp - 1 else 0
    return always + max(at_head, in_block)
