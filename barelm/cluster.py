"""What a run on many processes and machines checks: that it goes on after torchrun has started it
anew, that all machines see one folder, which process is slow, that all copies of the weights are
the same (docs/cluster.md).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from barelm.files import parse_json
from barelm.parts import is_divided
from barelm.run import UserError, weight_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from barelm.mesh import Mesh
    from barelm.run import Run
    from model import GPT


# --------------------------------------------------------------------------------------------------
# A launch of torchrun, which may start its processes several times


def launch_id() -> str:
    """What names this launch of torchrun among others (its --rdzv-id); "" where nothing does."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def is_restart(run: Run, out_dir: str) -> bool:
    """Whether torchrun started these processes anew, after some were lost or joined: then the run
    in out_dir is this launch's own. All processes decide together, since the machines count their
    restarts each for itself, and one that joins late has counted none."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    before = recorded_launch(out_dir) if run.is_main else ""
    is_own = bool(before) and before == launch_id()
    n_restarts, n_own = run.sum(count, is_own)
    if not launch_id():
        return n_restarts > 0
    return n_own > 0


def recorded_launch(out_dir: str) -> str:
    """The launch that run.json says wrote it; "" where it says none."""
    path = Path(out_dir) / "run.json"
    try:
        return parse_json(path.read_text(encoding="utf-8"), path).get("launch", "")
    except (OSError, UserError, ValueError, AttributeError):
        return ""


def start_of_launch(
    run: Run, out_dir: str, init_from: str, overwrite: bool
) -> tuple[str, bool, str]:
    """(init_from, overwrite, fresh) as `choose_start` takes them: as the user gave them, or after a
    restart by torchrun "auto", so that the run goes on from its last checkpoint."""
    if init_from == "resume" or not is_restart(run, out_dir):
        return init_from, overwrite, "scratch"
    run.say("torchrun started this run anew: it goes on from its last checkpoint")
    fresh = "scratch" if init_from == "auto" else init_from
    return "auto", False, fresh


def lock_patience() -> float:
    """Seconds to wait for the lock of out_dir: in a start after a restart so long as a network's
    folder takes to forget the lock of a machine that is gone."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return 100.0 if restarts else 3.0


# --------------------------------------------------------------------------------------------------
# One folder for all machines

LOOK = 10.0  # seconds in which a file that one machine wrote has to appear on the others


def check_shared(run: Run, out_dir: str, data_digest: str) -> None:
    """Refuse a run whose machines have different data, or an out_dir each of its own: nothing is
    ever mixed. Called by all processes together. data_digest: a hash of the data, in hexadecimal"""
    if run.world == 1:
        return
    # 48 bits, which float64, in which the numbers travel, holds.
    digests = run.of_all(int(data_digest[:12], 16))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"the data of {of_processes(run, others)} is not that of process 0: copy or share the "
            f"folder data/"
        )
    folder = Path(out_dir)
    [token] = run.sum(secrets.randbits(48) if run.is_main else 0)
    path = folder / f".shared-{int(token):012x}"
    try:
        if run.is_main:
            path.touch()
        run.wait()
        is_seen = appears(path)
        seen = run.of_all(is_seen)
    finally:
        if run.is_main:
            with contextlib.suppress(OSError):
                path.unlink()
    blind = [rank for rank, is_seen in enumerate(seen) if not is_seen]
    if blind:
        raise UserError(
            f"--out_dir={out_dir} of {of_processes(run, blind)} is not the folder of process 0: "
            f"share it between the machines (NFS will do), or start all on one"
        )


def appears(path: Path) -> bool:
    """Whether a file is there within a moment: a network's folder may show it late."""
    give_up = time.monotonic() + LOOK
    while not path.exists():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


def of_processes(run: Run, ranks: Sequence[int]) -> str:
    """Processes in words: the first few, with the machines that they are on."""
    names = run.watch.names if run.watch else {}
    shown = []
    for rank in ranks[:4]:
        name = f" ({names[rank]})" if rank in names else ""
        shown.append(f"{rank}{name}")
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"process {', '.join(shown)}{more}"


# --------------------------------------------------------------------------------------------------
# Who is slow


EVERY = 10  # steps between two comparisons of the processes
SLOW = 1.5  # so many times the median is slow
IN_A_ROW = 3  # comparisons in which the same process has to be the slow one


class StepTimes:
    """The seconds that each process computes by itself. A step takes as long everywhere, since all
    wait for the slowest, so that only what a process does before it waits tells them apart: in DDP
    its forward passes, which exchange nothing. Where these exchange too (`waits`), each process
    times a small product instead. The GPU's clock is read behind the step's exchange, where the
    host has waited for it anyway."""

    def __init__(self, run: Run, network: GPT) -> None:
        self.run = run
        self.waits = run.mesh.sizes.is_sharded or run.mesh.sizes.cp > 1
        self.is_cuda = run.device.type == "cuda"
        self.begun = None  # the time at which the step began, or its event
        self.end = None  # the same of the end of its last forward pass
        self.seconds = []  # since the last comparison, of each step
        self.n_steps = 0
        self.slow_for = {}  # {rank: comparisons in a row}
        if run.world > 1 and not self.waits:
            network.register_forward_hook(self.on_forward)

    def on_forward(self, network: GPT, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        if network.training:
            self.end = self.now()

    def now(self) -> float:
        """The time on the device: seconds, or an event in its stream."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """A step begins."""
        if self.run.world > 1:
            self.begun = self.now()

    def between(self, begin: float, end: float) -> float:
        if self.is_cuda:
            return begin.elapsed_time(end) / 1000
        return end - begin

    def end_step(self) -> dict:
        """The step's figures for the log's row, every EVERY steps; else none. Called behind the
        step's exchange, at which the device has caught up."""
        if self.run.world == 1:
            return {}
        self.n_steps += 1
        if not self.waits:
            self.seconds.append(self.between(self.begun, self.end))
        if self.n_steps % EVERY:
            return {}
        alone = self.time_product() if self.waits else statistics.median(self.seconds)
        self.seconds = []
        return self.compare(self.run.of_all(alone))

    def time_product(self, width: int = 512) -> float:
        """Seconds of a product of two matrices, the least of five tries."""
        x = torch.ones(width, width, device=self.run.device)
        tries = []
        for _ in range(5):
            begin = self.now()
            torch.mm(x, x)
            end = self.now()
            if self.is_cuda:
                end.synchronize()
            tries.append(self.between(begin, end))
        return min(tries)

    def compare(self, seconds: Sequence[float]) -> dict:
        """Figures of the processes' seconds; a slow one is named when it has been so for a while,
        once until it recovers."""
        median = statistics.median_low(seconds)
        most = max(seconds)
        slowest = seconds.index(most)
        n_before = self.slow_for.get(slowest, 0)
        self.slow_for = {}
        if most > SLOW * median:
            self.slow_for[slowest] = n_before + 1
        if self.slow_for.get(slowest) == IN_A_ROW:
            what = "a small product" if self.waits else "the forward passes of a step"
            self.run.say(
                f"note: {of_processes(self.run, [slowest])} is slow: {most:.3g} s for {what}, "
                f"where the median is {median:.3g} s; all others wait for it"
            )
        figures = {"alone_min": min(seconds), "alone_median": median, "alone_max": most}
        return figures | {"slowest": slowest}


# --------------------------------------------------------------------------------------------------
# Whether all copies of the weights are the same


def check_copies(run: Run, net: GPT, step: int) -> None:
    """End a run in which copies of the weights, the same at the start, have drifted apart: a fault
    of a memory or of a device, or of the exchange of gradients. Called by all processes together.
    """
    differ = set()
    name_of_first = ""
    for group, named in copies(net, run.mesh):
        sums = weight_sums([p for _, p in named])
        # The greatest of x and of -x - 1: the same everywhere if, and only if, all x are.
        both = torch.cat([sums, ~sums])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        most, least = both.chunk(2)
        wrong = (most != ~least).tolist()
        if any(wrong):
            name_of_first = named[wrong.index(True)][0]
            differ |= minority(sums, group)
    flags = run.of_all(bool(name_of_first))
    if not any(flags):
        return
    named = run.of_all(run.rank in differ)
    ranks = [rank for rank, is_named in enumerate(named) if is_named]
    if ranks:
        who = f"the weights of {of_processes(run, ranks)} are not those of the others"
    else:  # two copies, and nobody to decide between them
        ranks = [rank for rank, flag in enumerate(flags) if flag]
        who = f"the copies of the weights of {of_processes(run, ranks)} differ"
    where = f", first in {name_of_first}" if name_of_first else ""
    raise UserError(
        f"step {step}: {who}{where}: they drifted apart since the last check, by a fault of a "
        f"device or of what it exchanges; the last save, which was checked, is kept"
    )


def copies(net: GPT, mesh: Mesh) -> list:
    """(group, [(name, parameter)]) for each group of processes that hold the same values."""
    groups = []
    for axis in ("replica", "shard", "tp"):
        if getattr(mesh.sizes, axis) == 1:
            continue
        same = [(name, p) for name, p in net.named_parameters() if axis not in axes_of(p)]
        if same:
            groups.append((mesh.group_of(axis), same))
    return groups


def axes_of(p: Tensor) -> set[str]:
    """The names of the mesh's axes over which a parameter is divided."""
    if not is_divided(p):
        return set()
    axes = set()
    for name, placement in zip(p.device_mesh.mesh_dim_names, p.placements):
        if not placement.is_replicate():  # a Shard, or the strided one of FSDP behind tp
            axes.add(name)
    return axes


def minority(sums: Tensor, group: Any) -> set[int]:
    """The global ranks of a group's processes whose sums are not those of most; none where no
    value is that of more than half."""
    world = dist.get_world_size(group)
    all_sums = [torch.empty_like(sums) for _ in range(world)]
    dist.all_gather(all_sums, sums, group=group)
    rows = [tuple(row.tolist()) for row in all_sums]
    usual = max(rows, key=rows.count)
    if 2 * rows.count(usual) <= world:
        return set()
    ranks = dist.get_process_group_ranks(group)
    return {rank for rank, row in zip(ranks, rows) if row != usual}
