"""How long a step of training takes on a mesh of GPUs, and which mesh is the best, by arithmetic.

    hardware = Hardware.of("H100")
    parts = step_seconds(step, hardware)   # {"products": ..., "attention": ..., ...}
    step = best_step(config, shapes, hardware, world=64, local_world=8, windows=2048, seq_len=2048)

One model for all: the constants below are the same for every network and mesh. barelm/published.py
holds it against runs that were published; docs/parallel.md has the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from barelm.costs import MEMORY_GBS
from barelm.footprint import Step, footprint, total_bytes
from barelm.mesh import Sizes
from barelm.optim import (
    MLP_MATRICES,
    PEAK_TFLOPS,
    attention_products,
    flops_per_token,
    mlp_weights,
)
from barelm.run import UserError
from barelm.traffic import WORDS, transfers

if TYPE_CHECKING:
    from barelm.footprint import Shapes
    from barelm.goodput import Goodput
    from barelm.traffic import Transfer
    from model import GPTConfig

# From the makers' data sheets: memory in GB; what a GPU sends to others of its machine in GB/s, in
# one direction (NVLink, or PCIe); and to other machines (the usual network card beside each).
MEMORY_GB = {
    "B200": 180,
    "H200": 141,
    "H100 PCIe": 80,
    "H100": 80,
    "A100": 80,
    "A10G": 24,
    "L40S": 48,
    "L4": 24,
    "RTX 4090": 24,
    "RTX 3090": 24,
}
LINK_GBS = {"B200": 900, "H200": 450, "H100": 450, "A100": 300}
NETWORK_GBS = {"B200": 50, "H200": 50, "H100": 50, "A100": 25}
PCIE_GBS = 32  # of the others: 16 lanes of PCIe 4
ETHERNET_GBS = 3.1  # 25 Gb/s

# What is reached of those rates. Of the peak in products: found on the seven MPT runs of
# barelm/published.py, two of these numbers for all of them. A newer GPU reaches less of its peak,
# which its power does not sustain.
PRODUCTS = {"A100": 0.75, "RTX 3090": 0.75, "A10G": 0.75}
PRODUCTS_USUAL = 0.67
# Of the peak in attention's kernel: Dao 2023 (FlashAttention-2), figures 5 and 6, forward with
# backward.
ATTENTION = {"A100": 0.55, "RTX 3090": 0.55, "A10G": 0.55}
ATTENTION_USUAL = 0.45
MEMORY_REACHED = 0.8
NETWORK_REACHED = 0.8
SHOWS = 0.2  # of what travels beside the computation so much still delays it
EAGER = 3.0  # without a compiler memory is passed over so many times as often


@dataclass(frozen=True)
class Hardware:
    """What a GPU does in a second, at best."""

    name: str
    flops: float
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s sent to others of its machine
    network: float  # bytes/s sent to other machines

    @staticmethod
    def of(name: str, network: float | None = None) -> Hardware:
        """A GPU of PEAK_TFLOPS; network: bytes/s of its own to other machines."""
        usual = 1e9 * NETWORK_GBS.get(name, ETHERNET_GBS)
        return Hardware(
            name,
            1e12 * PEAK_TFLOPS[name],
            1e9 * MEMORY_GB[name],
            1e9 * MEMORY_GBS[name],
            1e9 * LINK_GBS.get(name, PCIE_GBS),
            network or usual,
        )

    def rate(self, transfer: Transfer, local_world: int) -> float:
        """Bytes/s that a process sends for a Transfer. A ring over machines crosses them with the
        network cards of all members that stand on one."""
        if transfer.is_local(local_world):
            return NETWORK_REACHED * self.link
        cards = transfer.on_machine(local_world)
        return NETWORK_REACHED * min(self.link, cards * self.network)


@dataclass(frozen=True)
class Software:
    """What differs between this trainer and those that published their figures."""

    flash: bool = True  # attention's kernel keeps no scores
    compiled: bool = True  # what is no product is fused
    chunks: int = 1  # of a stage, interleaved (Narayanan et al. 2021, 2.2.2)
    hides_tensor: bool = False  # tensor parallel's sums travel beside the products
    sums_once: bool = False  # gradients are exchanged once a step on any mesh


# --------------------------------------------------------------------------------------------------
# Seconds of a step


def step_seconds(
    step: Step, hardware: Hardware, software: Software | None = None
) -> dict[str, float]:
    """{what: seconds} of a step, which add up: products, attention, memory, what of the exchanges
    shows, bubble, optimizer."""
    software = software or Software()
    micro = compute_seconds(step, hardware, software)
    computing = sum(micro.values())
    once = exchange_seconds(step, hardware, software)
    for kind, seconds in once.items():
        shown = seconds / step.n_micro
        if kind == "tensor":
            shown *= SHOWS if software.hides_tensor else 1
        elif kind in ("context", "pipeline"):
            shown = max(shown - computing, SHOWS * shown)
        else:
            continue
        micro[kind] = shown
    sharded = sharded_seconds(step, once, software)
    if sharded:
        micro["parts"] = max(sharded - computing, SHOWS * sharded)
    total = {what: step.n_micro * seconds for what, seconds in micro.items()}
    if step.sizes.pp > 1:
        total["bubble"] = (step.sizes.pp - 1) / software.chunks * sum(micro.values())
    if "gradients" in once and not exchanges_each(step, software):
        backward = 2 / 3 * computing  # of the last micro-batch
        total["gradients"] = max(once["gradients"] - backward, SHOWS * once["gradients"])
    total["optimizer"] = optimizer_seconds(step, hardware) + once.get("optimizer", 0.0)
    return total


def exchanges_each(step: Step, software: Software) -> bool:
    """Whether gradients of copies are summed with every micro-batch."""
    return step.gathers and not software.sums_once


def exchange_seconds(step: Step, hardware: Hardware, software: Software) -> dict[str, float]:
    """{kind of Transfer: seconds} of a step, as if nothing else was done."""
    seconds = {}
    for kind, transfer in transfers(step).items():
        sent = transfer.sent
        if software.sums_once and kind == "gradients" and step.gathers:
            sent /= step.n_micro
        if kind == "pipeline":
            sent *= software.chunks / step.sizes.tp  # each sends its share, as all have the same x
        seconds[kind] = sent / hardware.rate(transfer, step.local_world)
    return seconds


def sharded_seconds(step: Step, seconds: dict[str, float], software: Software) -> float:
    """Seconds of a micro-batch's exchange of weights and gradients in parts; seconds: of each kind
    of exchange."""
    kinds = ["weights", "gradient parts"]
    if exchanges_each(step, software):
        kinds.append("gradients")
    return sum(seconds.get(kind, 0.0) for kind in kinds) / step.n_micro


def compute_seconds(step: Step, hardware: Hardware, software: Software) -> dict[str, float]:
    """{products, attention, memory: seconds} of a micro-batch on the slowest stage."""
    last = step.sizes.pp - 1
    stages = [(n, i == last) for i, n in enumerate(step.blocks)]
    times = [stage_seconds(step, hardware, software, n, has_head) for n, has_head in stages]
    return max(times, key=lambda parts: sum(parts.values()))


def stage_seconds(
    step: Step, hardware: Hardware, software: Software, n_blocks: int, has_head: bool
) -> dict[str, float]:
    """`compute_seconds` of a stage with so many blocks."""
    c = step.config
    again = step.recompute / c.n_layer  # the part of the blocks that is computed twice
    tokens = step.tokens / step.sizes.tp
    heads = 2 * c.head_dim * c.n_embd * (c.n_head + c.n_kv_head)
    product = 2 * (heads + mlp_weights(c, c.n_layer - 1))  # FLOPs of a token, forward
    flops = n_blocks * product * (3 + again)
    if has_head:
        flops += 3 * 2 * c.n_embd * c.vocab_size
    pattern = c.patterns[-1]
    scores = 2 * attention_products(c, pattern, step.seq_len)
    reached = PRODUCTS.get(hardware.name, PRODUCTS_USUAL)
    if software.flash:  # half of the square; backward computes the scores again (Dao 2023)
        scores *= (3.5 + again) * (0.5 if pattern.causal else 1)
        reached_scores = ATTENTION.get(hardware.name, ATTENTION_USUAL)
    else:
        scores *= 3 + again
        reached_scores = reached
    passed = n_blocks * passed_bytes(step, software, again)
    if has_head:
        passed += step.tokens * 16 * c.vocab_size / step.sizes.tp
    return {
        "products": tokens * flops / (reached * hardware.flops),
        "attention": tokens * n_blocks * scores / (reached_scores * hardware.flops),
        "memory": passed / (MEMORY_REACHED * hardware.bandwidth),
    }


def passed_bytes(step: Step, software: Software, again: float) -> float:
    """Bytes of memory that a micro-batch passes over in a block, beside its products: 30 numbers a
    width for two norms and two sums, 6 for each number of q and k, 9 or 6 for each of the MLP; a
    third of them forward."""
    c = step.config
    tp = step.sizes.tp
    numbers = 30 * c.n_embd + 6 * (c.n_head + c.n_kv_head) * c.head_dim / tp
    numbers += (9 if MLP_MATRICES[c.mlp] == 3 else 6) * c.n_hidden / tp
    if not software.flash:
        numbers += 15 * c.n_head * step.seq_len / tp
    times = 1 + again / 3
    if not software.compiled:
        times *= EAGER
    return step.tokens * 2 * numbers * times


def optimizer_seconds(step: Step, hardware: Hardware) -> float:
    """Of the update: what AdamW reads and writes, 32 bytes a number with the norm of gradients;
    Muon's products."""
    sizes = step.sizes
    holders = sizes.tp * sizes.shard * sizes.pp
    n = sum(math.prod(shape) for _, shape in step.shapes) / holders
    if step.zero:
        n /= sizes.replica
    seconds = 32 * n / (MEMORY_REACHED * hardware.bandwidth)
    if step.optimizer != "muon":
        return seconds
    matrices = [shape for name, shape in step.shapes if ".layers." in name and len(shape) > 1]
    workers = sizes.world // sizes.pp
    each = math.ceil(len(matrices) / sizes.pp / workers) * sizes.pp / len(matrices)
    flops = each / sizes.pp * sum(orthogonalize_flops(shape) for shape in matrices)
    return seconds + flops / (PRODUCTS.get(hardware.name, PRODUCTS_USUAL) * hardware.flops)


def orthogonalize_flops(shape: tuple[int, int]) -> int:
    """Of five steps, each x x^T, its square, and the product with x (barelm/muon.py)."""
    *stack, rows, columns = shape
    m, n = sorted((rows, columns))
    return math.prod(stack) * 5 * (4 * m * m * n + 2 * m**3)


def model_flops(step: Step) -> float:
    """FLOPs of a step as MFU counts them: nothing twice, full attention."""
    return flops_per_token(step.config, step.seq_len) * step.step_tokens


def mfu_of(step: Step, hardware: Hardware, seconds: float) -> float:
    return model_flops(step) / (seconds * step.sizes.world * hardware.flops)


# --------------------------------------------------------------------------------------------------
# The best mesh


ENOUGH_TOKENS = 65536  # of a micro-batch: more at once are no faster


def best_step(config: GPTConfig, shapes: Shapes, hardware: Hardware, world: int, local_world: int,
              windows: int, seq_len: int, wanted: dict, **options: Any) -> Step:  # fmt: skip
    """The Step of `windows` windows that takes the least time of those that fit the memory; wanted:
    {parallel, tp, pp, cp: what is asked for, or None}. options: of Step."""
    best = None
    nearest = math.inf  # bytes of the smallest that did not fit
    for sizes, zero in grids(config, world, local_world, seq_len, wanted):
        if windows % sizes.data:
            continue
        share = windows // sizes.data
        for rows in [2**i for i in range(8) if share % 2**i == 0]:
            for recompute in (0, config.n_layer):
                step = Step(
                    config,
                    sizes,
                    shapes,
                    seq_len,
                    rows,
                    share // rows,
                    zero=zero,
                    recompute=recompute,
                    local_world=local_world,
                    **options,
                )
                size = total_bytes(footprint(step))
                if size > 0.9 * hardware.memory:
                    nearest = min(nearest, size)
                    continue
                seconds = sum(step_seconds(step, hardware).values())
                if best is None or seconds < 0.97 * best[0]:  # the first are the simplest
                    best = (seconds, step)
                elif seconds <= best[0] and fills_more(step, best[1]):
                    best = (seconds, step)
    if best is None:
        raise UserError(refusal(hardware, world, windows, nearest))
    return best[1]


def fills_more(step: Step, other: Step) -> bool:
    """Whether a step is another one in larger micro-batches, up to ENOUGH_TOKENS: a kernel's launch
    takes time too, which `step_seconds` does not count."""
    same_mesh = (step.sizes, step.zero) == (other.sizes, other.zero)
    alike = same_mesh and step.recompute == other.recompute
    return alike and other.tokens < step.tokens <= ENOUGH_TOKENS


def refusal(hardware: Hardware, world: int, windows: int, nearest: float) -> str:
    """Why no mesh fits."""
    if nearest == math.inf:
        return f"no mesh of {world} devices divides a batch of {windows} windows: another devices="
    return (
        f"no mesh of {world} {hardware.name} holds it: the smallest takes {nearest / 1e9:.0f} GB a "
        f"device of {hardware.memory / 1e9:.0f}: more devices, or a smaller network"
    )


def grids(
    config: GPTConfig, world: int, local_world: int, seq_len: int, wanted: dict
) -> list[tuple[Sizes, int]]:
    """[(Sizes, zero)] to try, the simplest first."""
    choices = []
    for tp in factors(world, wanted["tp"]):
        if local_world % tp or not can_share(config, tp):
            continue
        for pp in factors(world // tp, wanted["pp"]):
            if pp > config.n_layer:
                continue
            rest = world // tp // pp
            is_whole = tp == 1 and pp == 1
            asked = wanted["parallel"]
            kinds = kinds_of_copies(rest, tp, local_world, asked, is_whole)
            for replica, shard, zero in kinds:
                for cp in factors(rest, wanted["cp"]):
                    if wanted["cp"] is None and cp > 1 and seq_len < 8192 * cp:
                        continue  # short windows are better kept whole
                    choices.append((Sizes(pp, replica, shard, tp, cp), zero))
    return choices


def can_share(c: GPTConfig, tp: int) -> bool:
    """Whether tp processes can have as many heads and hidden units each."""
    shares_keys = c.n_kv_head == 1 or c.n_kv_head % tp == 0
    return c.n_head % tp == 0 and shares_keys and c.n_hidden % tp == 0


def factors(n: int, wanted: dict | None) -> list[int]:
    """The powers of two that divide n, or what is asked for, if it does."""
    if wanted:
        return [wanted] if n % wanted == 0 else []
    return [2**i for i in range(10) if n % 2**i == 0]


def kinds_of_copies(
    rest: int, tp: int, local_world: int, parallel: str | None, is_whole: bool
) -> list[tuple[int, int, int]]:
    """[(copies, parts, zero)] of so many processes that hold a stage; is_whole: the network."""
    kinds = []
    per_machine = max(1, local_world // tp)
    if parallel in (None, "ddp"):
        kinds.append((rest, 1, 0))
        if rest > 1 and is_whole:
            kinds.append((rest, 1, 1))
    if parallel in (None, "hsdp") and 1 < per_machine < rest and rest % per_machine == 0:
        kinds.append((rest // per_machine, per_machine, 0))
    if parallel in (None, "fsdp") and rest > 1:
        kinds.append((1, rest, 0))
    return kinds


# --------------------------------------------------------------------------------------------------
# In words


def in_gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def held_lines(step: Step, hardware: Hardware) -> list[str]:
    """What a device holds, by kind."""
    bytes_by_kind = footprint(step)
    kinds = ", ".join(f"{kind} {in_gb(size)}" for kind, size in bytes_by_kind.items() if size)
    total = total_bytes(bytes_by_kind)
    return [f"bytes of a device: {in_gb(total)} of {in_gb(hardware.memory)}: {kinds}"]


def sent_lines(step: Step, hardware: Hardware) -> list[str]:
    """What a device sends in a step, a line for each kind of parallelism."""
    software = Software()
    seconds = exchange_seconds(step, hardware, software)
    lines = []
    for kind, transfer in transfers(step).items():
        where = "to other machines"
        if transfer.is_local(step.local_world):
            where = "within a machine"
        lines.append(
            f"on the wire, {kind}: {in_gb(transfer.sent)} a step from each device, {where}, "
            f"{seconds[kind]:.3g} s: {WORDS[kind]}"
        )
    return lines


def time_lines(step: Step, hardware: Hardware, parts: dict[str, float]) -> list[str]:
    """How long a step takes, by what; MFU and the rate."""
    seconds = sum(parts.values())
    words = ", ".join(f"{what} {part:.3g}" for what, part in parts.items() if part)
    rate = step.step_tokens / seconds
    mfu = mfu_of(step, hardware, seconds)
    return [
        f"a step of {step.step_tokens:,} tokens: {seconds:.3g} s, of which {words}",
        f"MFU {100 * mfu:.1f} %, {rate:,.0f} tokens/s, {rate / step.sizes.world:,.0f} a device",
    ]


def save_seconds(step: Step, machines: int, storage_gbs: float) -> float:
    """Seconds in which a checkpoint is written: weights and averages, of a network in parts by all
    machines together, else by one."""
    n = sum(math.prod(shape) for _, shape in step.shapes)
    size = 12 * n
    if step.optimizer == "muon":
        of_blocks = [shape for name, shape in step.shapes if ".layers." in name and len(shape) > 1]
        size -= 4 * sum(math.prod(shape) for shape in of_blocks)
    writers = machines if step.sizes.is_sharded else 1
    return size / (1e9 * storage_gbs * writers)


def failure_lines(step: Step, share: Goodput, seconds: float) -> list[str]:
    """What failures cost, and how often to save. share: a Goodput; seconds: of a step."""
    every = save_every(share, seconds)
    minutes = share.interval / 60
    percent = 100 * share.goodput
    return [
        f"failures: one in {share.mtbf / 3600:.3g} hours; saves, of {share.save:.3g} s, are best "
        f"{every:,} steps apart ({minutes:.3g} min); goodput {percent:.1f} %"
    ]


def save_every(share: Goodput, seconds: float) -> int:
    """The best number of steps between saves, where a step takes so many seconds."""
    return max(1, round(share.interval / seconds))
