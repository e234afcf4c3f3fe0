"""What travels between the processes of a mesh in a step, in bytes by kind, and the lines in which
train.py says who holds what and what travels.

A ring of n processes sums S bytes by 2 (n - 1) / n S sent from each, and gathers or scatters them
by (n - 1) / n S (Patarasuk and Yuan 2009). Formulas: docs/parallel.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from barelm.footprint import footprint, parts_of, total_bytes

if TYPE_CHECKING:
    from barelm.footprint import Step


@dataclass(frozen=True)
class Transfer:
    """What a process sends in a step for one kind of parallelism."""

    sent: float  # bytes
    n: int  # processes of the group
    stride: int  # from one of the group to the next, in ranks

    def on_machine(self, local_world: int) -> int:
        """How many of the group stand on one machine."""
        return max(1, min(self.n, local_world // self.stride))

    def is_local(self, local_world: int) -> bool:
        return self.n * self.stride <= local_world


def ring_sum(n: int, size: int) -> float:
    return 2 * (n - 1) / n * size


def ring_gather(n: int, size: int) -> float:
    return (n - 1) / n * size


def transfers(step: Step) -> dict[str, Transfer]:
    """{kind: Transfer} of the process that sends the most: tensor, context, pipeline, weights,
    gradients, optimizer; what is not used is left out."""
    sizes = step.sizes
    of_kinds = {
        "tensor": Transfer(tensor_bytes(step), sizes.tp, 1),
        "context": Transfer(context_bytes(step), sizes.cp, sizes.tp),
        "weights": Transfer(weight_bytes(step), sizes.shard, sizes.tp),
        "gradient parts": Transfer(scatter_bytes(step), sizes.shard, sizes.tp),
        "gradients": Transfer(gradient_bytes(step), sizes.replica, sizes.tp * sizes.shard),
        "optimizer": optimizer_transfer(step),
        "pipeline": Transfer(
            pipeline_bytes(step), sizes.pp, sizes.tp * sizes.shard * sizes.replica
        ),
    }
    return {kind: transfer for kind, transfer in of_kinds.items() if transfer.sent}


def tensor_bytes(step: Step) -> float:
    """Of each block two sums of x forward, two backward, and two more where it is computed again
    (Shoeybi et al. 2019, figure 4); x behind the embedding, and its gradient before the head."""
    tp = step.sizes.tp
    if tp == 1:
        return 0
    pp = step.sizes.pp
    n_blocks = max(step.blocks)
    n_sums = 4 * n_blocks + 2 * step.recompute / pp + 2 / pp
    x = step.tokens * step.config.n_embd * step.dtype.itemsize
    return step.n_micro * n_sums * ring_sum(tp, x)


def context_bytes(step: Step) -> float:
    """Of each block the keys and values of the other processes' tokens forward, again where it is
    computed again, and their gradients backward."""
    cp = step.sizes.cp
    if cp == 1:
        return 0
    c = step.config
    width = step.dtype.itemsize
    heads = max(1, c.n_kv_head // step.sizes.tp)
    own = step.tokens * 2 * heads * c.head_dim * width
    n_blocks = max(step.blocks)
    passes = 2 * n_blocks + step.recompute / step.sizes.pp
    return step.n_micro * passes * (cp - 1) * own


def whole_numel(step: Step) -> tuple[int, int]:
    """(numbers of the blocks, numbers of the rest) that a stage has, before fully_shard."""
    parts = parts_of(step)
    of_blocks = sum(part.gathered for part in parts if part.block is not None)
    return of_blocks, sum(part.gathered for part in parts if part.block is None)


def weight_bytes(step: Step) -> float:
    """fully_shard's gathering of the weights, forward and backward, with every micro-batch: blocks
    in the products' dtype, the rest once, in full."""
    if step.sizes.shard == 1:
        return 0
    of_blocks, rest = whole_numel(step)
    size = 2 * step.dtype.itemsize * of_blocks + 4 * rest
    return step.n_micro * ring_gather(step.sizes.shard, size)


def scatter_bytes(step: Step) -> float:
    """fully_shard's sums of gradients, of which each process keeps its part."""
    if step.sizes.shard == 1:
        return 0
    size = step.grad_dtype.itemsize * sum(whole_numel(step))
    return step.n_micro * ring_gather(step.sizes.shard, size)


def gradient_bytes(step: Step) -> float:
    """The sums of gradients over copies: DistributedDataParallel's once a step; those of parts
    with every micro-batch, as fully_shard makes them."""
    sizes = step.sizes
    if sizes.replica == 1:
        return 0
    size = step.grad_dtype.itemsize * sum(part.numel for part in parts_of(step))
    times = step.n_micro if step.gathers else 1
    return times * ring_sum(sizes.replica, size)


def optimizer_transfer(step: Step) -> Transfer:
    """ZeRO-1: each process tells the others the weights that it updated. Muon: the updates of the
    matrices that each orthogonalized; of matrices in parts these go to it, and back."""
    sizes = step.sizes
    parts = parts_of(step)
    stride = sizes.tp * sizes.shard
    if step.zero and sizes.replica > 1:
        size = 4 * sum(part.numel for part in parts)
        return Transfer(ring_gather(sizes.replica, size), sizes.replica, stride)
    if step.optimizer != "muon":
        return Transfer(0, 1, 1)
    matrices = 4 * sum(part.numel for part in parts if part.is_matrix)
    if sizes.shard > 1:
        return Transfer(2 * ring_gather(sizes.shard, matrices), sizes.shard, sizes.tp)
    return Transfer(ring_gather(sizes.replica, matrices), sizes.replica, stride)


def pipeline_bytes(step: Step) -> int:
    """x to the next stage and its gradient to the one before, of each micro-batch."""
    if step.sizes.pp == 1:
        return 0
    return 2 * step.n_micro * step.tokens * step.config.n_embd * step.dtype.itemsize


# --------------------------------------------------------------------------------------------------
# In words

WORDS = {
    "tensor": "sums of what shared products give",
    "context": "keys and values of a window's other tokens",
    "weights": "weights, gathered block by block",
    "gradient parts": "gradients, each to who holds the weight",
    "gradients": "gradients, summed over the copies",
    "optimizer": "what the optimizer computes for others",
    "pipeline": "x and its gradient between stages",
}


# Bytes a second that a process sends, for a first idea: a GPU to others of its machine, and to
# other machines; a CPU's.
STATED = {"machine": 100e9, "network": 10e9, "cpu": 1e9}


def stated_bandwidth(step: Step) -> float:
    """Bytes/s of the slowest link of a mesh, as STATED has it."""
    if step.device_type == "cpu":
        return STATED["cpu"]
    return STATED["machine" if step.sizes.world <= step.local_world else "network"]


def describe(step: Step, bandwidth: float | None = None) -> list[str]:
    """The mesh in words, a list of lines: who holds what, the bytes of a process by kind, what it
    sends in a step and how long that takes at `bandwidth`, bytes a second of one process."""
    bandwidth = bandwidth or stated_bandwidth(step)
    lines = holders(step)
    bytes_by_kind = footprint(step)
    kinds = ", ".join(f"{kind} {in_units(size)}" for kind, size in bytes_by_kind.items() if size)
    lines.append(f"a process holds about {in_units(total_bytes(bytes_by_kind))}: {kinds}")
    sent = transfers(step)
    for kind, transfer in sent.items():
        lines.append(
            f"it sends {in_units(transfer.sent)} a step in a group of {transfer.n}, "
            f"{transfer.sent / bandwidth:.2g} s at {bandwidth / 1e9:g} GB/s: {WORDS[kind]}"
        )
    return lines


def holders(step: Step) -> list[str]:
    """Which ranks share what: a line for each way in which the network is divided."""
    sizes = step.sizes
    lines = []
    if sizes.pp > 1:
        per_stage = sizes.world // sizes.pp
        words = " + ".join(map(str, step.blocks))
        lines.append(f"pipeline: {sizes.pp} stages of {words} blocks, {per_stage} rank(s) each")
    if sizes.replica > 1:
        group = ranks(sizes.replica, sizes.tp * sizes.shard, sizes.world)
        lines.append(f"copies: {group} hold the same")
    if sizes.shard > 1:
        group = ranks(sizes.shard, sizes.tp, sizes.world)
        lines.append(f"parts: {group} hold 1/{sizes.shard} of each matrix")
    if sizes.tp > 1:
        lines.append(f"tensor: {ranks(sizes.tp, 1, sizes.world)} share each product of a block")
    if sizes.cp > 1:
        group = ranks(sizes.cp, sizes.tp, sizes.world)
        lines.append(f"context: {group} share each window's tokens")
    return lines


def ranks(n: int, stride: int, world: int) -> str:
    """The first group of n ranks, each so far from the next, in words."""
    numbers = [i * stride for i in range(n)]
    words = ", ".join(map(str, numbers))
    if n > 4:
        words = f"{numbers[0]}, {numbers[1]} ... {numbers[-1]}"
    return f"ranks {words}" + (" (and so on)" if n < world else "")


def in_units(size: float) -> str:
    """Bytes as a person reads them: 12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB"
