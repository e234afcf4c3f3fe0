"""Optimizers of divided parameters beside those of one process: what tests/test_parallel_optim.py
starts in four processes. Each check prints a line of JSON on the first of them."""

import json
import sys
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh

from barelm.cluster import check_copies
from barelm.float8 import use_float8
from barelm.mesh import open_mesh
from barelm.muon import Muon
from barelm.optim import (
    StatePlan,
    held_bytes,
    held_state,
    make_optimizer,
)
from barelm.parallel import exchanging, keeps_narrow, parallelize
from barelm.parts import local_part, whole_tensor
from barelm.run import Run, Updater, setup
from model import GPT, GPTConfig

STEPS = 20
ONE = StatePlan(alone=True)


def say(name, **figures):
    if dist.get_rank() == 0:
        print(json.dumps({"check": name} | figures), flush=True)


# --------------------------------------------------------------------------------------------------
# Muon on tensors divided in every way


class Layers(nn.Module):
    """Matrices of sizes that four processes divide, and do not; experts; several of one shape."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 56, bias=False)
        self.down = nn.Linear(56, 24, bias=False)
        self.odd = nn.Linear(24, 22, bias=False)
        self.experts = nn.Parameter(torch.randn(6, 20, 12))
        self.squares = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(5))

    def forward(self, x):
        x = self.down(torch.relu(self.up(x)))
        for layer in self.squares:
            x = layer(x)
        y = self.odd(x)
        return y.sum() + y.square().sum() + self.experts.square().sum() * x.mean()


def divide(net, kind):
    """Layers over four processes, by torch alone."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    if kind in ("tp", "fsdp x tp"):
        ways = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(net, grid["tp"], ways)
    shards = {
        "fsdp": init_device_mesh("cpu", (4,)),
        "hsdp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")),
        "fsdp x tp": grid["shard"],
    }
    if kind in shards:
        for layer in net.squares:
            fully_shard(layer, mesh=shards[kind])
        fully_shard(net, mesh=shards[kind])


def muon_on_layers(kind, offload=False):
    """Five steps: (the weights, bytes of the momentum that this process holds)."""
    torch.manual_seed(0)
    net = Layers()
    divide(net, kind)
    optimizer = Muon(net.parameters(), lr=0.02, weight_decay=0.1, shares=False, offload=offload)
    for step in range(5):
        torch.manual_seed(step)
        net(torch.randn(8, 24)).backward()
        optimizer.step()
        optimizer.zero_grad()
    held = sum(local_part(entry["momentum"]).nbytes for entry in optimizer.state.values())
    return [whole_tensor(p).detach() for p in net.parameters()], held


def check_muon(run):
    alone, whole_bytes = muon_on_layers("one process")
    ways = [("fsdp", False), ("hsdp", False), ("tp", False), ("fsdp x tp", False), ("fsdp", True)]
    for kind, offload in ways:
        weights, held = muon_on_layers(kind, offload)
        worst = max((a - b).abs().max().item() for a, b in zip(weights, alone))
        held = torch.tensor([float(held)])
        dist.all_reduce(held)
        share = held.item() / dist.get_world_size() / whole_bytes
        say(f"layers {kind}{' offload' if offload else ''}", worst=worst, share=share)


# --------------------------------------------------------------------------------------------------
# A network


def make_net():
    torch.manual_seed(0)
    shape = dict(n_ctx=16, n_layer=3, n_head=2, n_embd=32, n_hidden=96)
    return GPT(GPTConfig(vocab_size=64, **shape)).train()


def one_process(run, name, float8=False, steps=STEPS):
    """The losses of a network that this process trains alone."""
    mesh = open_mesh(Run(run.device))
    return train(Run(run.device, mesh=mesh), name, ONE, float8=float8, steps=steps)[0]


def train(run, name, plan, dtype=torch.float32, float8=False, steps=STEPS):
    """(losses of all processes, the network, its optimizers) of training on batches that all
    processes share out."""
    net = make_net()
    if float8:
        use_float8(net)
    mesh = run.mesh
    network = parallelize(net, mesh, reduce_dtype=dtype)
    optimizers = make_optimizer(net, name, 1e-2, plan=plan)
    updater = Updater(run, net.parameters(), optimizers, grad_clip=1.0)
    n = 8 // mesh.data_world  # rows of a process
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        ids = torch.randint(0, 16, (8, 17)).cumsum(1) % 64  # something to learn
        ids = ids[mesh.data_rank * n : (mesh.data_rank + 1) * n]
        total = torch.zeros(())
        for i, rows in enumerate(ids.chunk(2)):  # two micro-batches
            with exchanging(network, mesh.sizes, is_last=i == 1):
                loss, _ = network(rows[:, :-1], rows[:, 1:])
                updater.backward(loss * (mesh.data_world / 128))
            total += loss.detach()
        if dtype == torch.bfloat16:
            kept = {local_part(p.grad).dtype for p in net.parameters()}
            assert kept == {torch.bfloat16 if keeps_narrow(mesh.sizes) else torch.float32}
        norm = updater.clip_gradients()
        [loss] = run.sum(total * mesh.counts)
        updater.step(step, loss / 128, float(norm))
        losses.append(loss / 128)
    return losses, net, optimizers


def state_bytes(optimizers):
    """What this process holds, without the counts of steps."""
    total = 0
    for optimizer in optimizers:
        for entry in held_state(optimizer).values():
            total += sum(local_part(t).nbytes for key, t in entry.items() if key != "step")
    return total


WAYS = ("ddp", "ddp zero", "ddp bfloat16", "ddp zero offload", "fsdp", "hsdp", "fsdp bfloat16")
WAYS += ("fsdp tp",)
SHORT = {
    "adamw": ("ddp zero", "fsdp tp", "fsdp bfloat16"),
    "muon": ("ddp zero", "ddp bfloat16", "fsdp"),
}


def check_network(run, ways_of, steps=STEPS):
    for name, ways in ways_of.items():
        alone = one_process(run, name, steps=steps)
        say(f"{name} learns", first=alone[0], last=alone[-1])
        for way in ways:
            kind, *words = way.split()
            tp = 2 if "tp" in words else 1
            run.mesh = open_mesh(run, kind, tp, replicas=2 if kind == "hsdp" else 0)
            dtype = torch.bfloat16 if "bfloat16" in words else torch.float32
            is_narrow = dtype == torch.bfloat16 and keeps_narrow(run.mesh.sizes)
            plan = StatePlan.of(run.mesh, "zero" in words, "offload" in words, is_narrow)
            losses, net, optimizers = train(run, name, plan, dtype, steps=steps)
            check_copies(run, net, steps)
            worst = max(abs(a - b) for a, b in zip(losses, alone))
            [held] = run.sum(state_bytes(optimizers))
            expected = held_bytes(make_net(), name, run.mesh.sizes, plan.zero, plan.offload)
            expected = expected["optimizer"] + expected["host"]
            say(f"{name} {way}", worst=worst, held_to_estimate=held / run.world / expected)


def check_float8(run):
    alone = one_process(run, "adamw", float8=True)
    run.mesh = open_mesh(run, "fsdp")
    losses, _, _ = train(run, "adamw", StatePlan.of(run.mesh), float8=True)
    say("float8 fsdp", last=losses[-1], alone=alone[-1])


def main():
    run = setup("cpu")
    checks = {"muon": check_muon, "float8": check_float8}
    checks["network"] = partial(check_network, ways_of={"adamw": WAYS, "muon": WAYS})
    checks["short"] = partial(check_network, ways_of=SHORT, steps=6)
    for name in sys.argv[1:] or ("muon", "network", "float8"):
        checks[name](run)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
