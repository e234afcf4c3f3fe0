"""Who holds what: the processes of a run as a grid, torch's DeviceMesh.

A network is divided in up to four ways at once, whose sizes multiply to the number of processes:

    pp       stages of the network, each of some blocks         (pipeline parallel)
    replica  copies of what is below                            (data parallel)
    shard    parts of every matrix                              (fully sharded data parallel)
    tp       parts of each matrix product                       (tensor parallel)

Of neighbours in rank those of one tensor parallel group come first, since they say most to each
other; stages come last. Copies and parts read windows of their own, or cp of them together read one
(context parallel). `Sizes` are numbers alone, to plan with; a `Mesh` is this process's place.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from barelm.run import UserError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup

    from barelm.run import Run

PARALLEL = ("ddp", "fsdp", "hsdp")
# The dimensions of the grid, the slowest first.
DIMENSIONS = ("pp", "replica", "shard", "tp")


@dataclass(frozen=True)
class Sizes:
    """How many processes there are along each dimension of the grid, and that share a window."""

    pp: int = 1
    replica: int = 1
    shard: int = 1
    tp: int = 1
    cp: int = 1  # it divides replica x shard

    @property
    def world(self) -> int:
        return self.pp * self.replica * self.shard * self.tp

    @property
    def data(self) -> int:
        """How many processes, or groups of cp, read windows of their own."""
        return self.replica * self.shard // self.cp

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of the network alone."""
        return self.pp > 1 or self.shard > 1 or self.tp > 1

    def words(self) -> str:
        """The grid in a line: 2 pipeline stages x 4 copies ..."""
        names = {
            "pp": "pipeline stages",
            "replica": "copies",
            "shard": "parts of every matrix (FSDP)",
            "tp": "parts of each product",
        }
        factors = []
        for key, name in names.items():
            size = getattr(self, key)
            if size > 1:
                factors.append(f"{size} {name}")
        words = " x ".join(factors) or "one process"
        if self.cp > 1:
            words += f"; {self.cp} share a window"
        return words


def choose_sizes(world: int, parallel: str = "ddp", tp: int = 1, pp: int = 1, cp: int = 1,
                 replicas: int = 0, local_world: int | None = None) -> Sizes:  # fmt: skip
    """The Sizes of a run of `world` processes, local_world of them on a machine; a UserError with
    the nearest that fits where these do not."""
    local_world = local_world or world
    if parallel not in PARALLEL:
        raise UserError(f"parallel={parallel}: expected {', '.join(PARALLEL)}")
    for name, size in (("tp", tp), ("pp", pp), ("cp", cp)):
        if size < 1:
            raise UserError(f"{name}={size}: expected 1 or more")
    if replicas and parallel != "hsdp":
        raise UserError(f"replicas={replicas}: for --parallel=hsdp, and not {parallel}")
    if replicas < 0:
        raise UserError(f"replicas={replicas}: expected 1 or more, or 0: one a machine")
    product = tp * pp * cp
    if world % product:
        raise UserError(
            f"tp={tp} x pp={pp} x cp={cp} = {product}, which does not divide the {world} "
            f"process(es) that there are: {nearest_sizes(world, tp, pp, cp)}"
        )
    if tp > local_world or local_world % tp:
        near = nearest([n for n in divisors(local_world) if n <= tp], tp)
        why = f"a machine has {local_world} process(es), and no product is shared between machines"
        raise UserError(f"tp={tp}: {why}: --tp={near}")
    rest = world // (pp * tp)  # copies and parts
    if parallel == "ddp":
        return Sizes(pp, rest, 1, tp, cp)
    if parallel == "fsdp":
        return Sizes(pp, 1, rest, tp, cp)
    if not replicas:  # a copy a machine
        per_machine = max(1, local_world // tp)
        replicas = max(1, rest // per_machine)
    if rest % replicas:
        near = nearest(divisors(rest), replicas)
        why = f"no divisor of the {rest} processes that hold a stage"
        raise UserError(f"replicas={replicas}: {why}: --replicas={near}")
    return Sizes(pp, replicas, rest // replicas, tp, cp)


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def nearest(values: list[int], wanted: int) -> int:
    """The value whose ratio to the one that was wanted is nearest to 1."""
    return min(values, key=lambda value: abs(math.log(value / wanted)))


def nearest_sizes(world: int, tp: int, pp: int, cp: int) -> str:
    """What to ask for in the place of sizes whose product does not divide `world`: words."""
    best = None
    for new_tp in divisors(world):
        for new_pp in divisors(world // new_tp):
            for new_cp in divisors(world // new_tp // new_pp):
                ratios = (new_tp / tp, new_pp / pp, new_cp / cp)
                distance = sum(abs(math.log(ratio)) for ratio in ratios)
                if best is None or distance < best[0]:
                    best = (distance, new_tp, new_pp, new_cp)
    _, tp, pp, cp = best
    return f"the nearest that do are --tp={tp} --pp={pp} --cp={cp}"


class Mesh:
    """This process's place among those of a run. Of one process there is no group."""

    def __init__(self, run: Run, sizes: Sizes) -> None:
        if sizes.world != run.world:
            raise UserError(f"{sizes.words()}: {sizes.world} processes, but {run.world} run")
        self.run = run
        self.sizes = sizes
        self.device_mesh = None
        self.window_mesh = None  # the same processes by windows: (pp, data, cp, tp)
        self.pipeline = None  # of a network in stages: `parallelize` sets it
        if run.world == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh  # some systems lack it

        device_type = run.device.type
        if device_type == "cpu":  # that gloo exchanges by another way than NCCL is no news
            logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        shape = (sizes.pp, sizes.replica, sizes.shard, sizes.tp)
        self.device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=DIMENSIONS)
        if sizes.cp > 1:
            shape = (sizes.pp, sizes.data, sizes.cp, sizes.tp)
            names = ("pp", "data", "cp", "tp")
            self.window_mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)

    def rank_of(self, name: str) -> int:
        """This process's place along a dimension: pp, replica, shard, tp, cp."""
        if self.device_mesh is None or (name == "cp" and self.window_mesh is None):
            return 0
        if name == "cp":
            return self.window_mesh.get_local_rank("cp")
        return self.device_mesh.get_local_rank(name)

    def group_of(self, name: str) -> ProcessGroup | None:
        """The processes along a dimension, this one among them; None where it is alone."""
        if getattr(self.sizes, name) == 1:
            return None
        mesh = self.window_mesh if name == "cp" else self.device_mesh
        return mesh.get_group(name)

    @property
    def data_rank(self) -> int:
        """Which of the processes with windows of their own this one is, or belongs to."""
        place = self.rank_of("replica") * self.sizes.shard + self.rank_of("shard")
        return place // self.sizes.cp

    @property
    def data_world(self) -> int:
        return self.sizes.data

    @property
    def dropout_rank(self) -> int:
        """Which masks of dropout this process draws: another one's for other windows, for other
        tokens of a window and in other stages; of processes that share products the same, since
        what they add up is one."""
        place = self.data_rank * self.sizes.cp + self.rank_of("cp")
        return place * self.sizes.pp + self.rank_of("pp")

    @property
    def is_last_stage(self) -> bool:
        return self.rank_of("pp") == self.sizes.pp - 1

    @property
    def counts(self) -> bool:
        """Whether the losses and targets that this process computes are counted, when all
        processes' are added up: of those that compute the same, one's."""
        return self.rank_of("tp") == 0 and self.is_last_stage

    @property
    def shard_mesh(self) -> Any:
        """What `fully_shard` takes: the copies, if there are, and the parts."""
        if self.sizes.replica > 1:
            return self.device_mesh["replica", "shard"]
        return self.device_mesh["shard"]


def open_mesh(
    run: Run, parallel: str = "ddp", tp: int = 1, pp: int = 1, cp: int = 1, replicas: int = 0
) -> Mesh:
    """The Mesh of a run by its keys."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", run.world))
    return Mesh(run, choose_sizes(run.world, parallel, tp, pp, cp, replicas, local_world))
