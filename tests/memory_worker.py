"""What a process holds on a mesh, measured and estimated: a line of JSON a mesh, from rank 0.

torchrun --nproc_per_node=2 tests/memory_worker.py ddp fsdp zero tp
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from live_bytes import LiveBytes

from barelm.footprint import Step, footprint, shapes_of, total_bytes
from barelm.mesh import Mesh, Sizes
from barelm.optim import make_optimizer
from barelm.parallel import exchanging, parallelize
from barelm.run import end_process, setup
from model import GPT, GPTConfig

SIZES = {
    "ddp": Sizes(replica=2),
    "zero": Sizes(replica=2),
    "fsdp": Sizes(shard=2),
    "tp": Sizes(tp=2),
}
SHAPE = dict(vocab_size=1024, n_ctx=128, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, n_hidden=384)


def measure(name, run, optimizer, recompute=False, rows=4):
    """The bytes at the peak of a second step on this mesh, by kind, and the estimate of them."""
    torch.manual_seed(0)
    sizes = SIZES[name]
    mesh = Mesh(run, sizes)
    run.mesh = mesh
    config = GPTConfig(**SHAPE)
    net = GPT(config).train()
    net.checkpoint = recompute
    shapes = shapes_of(net)
    network = parallelize(net, mesh)
    options = {}
    if name == "zero":
        from barelm.optim import StatePlan

        options["plan"] = StatePlan.of(mesh, zero=1)
    optimizers = make_optimizer(net, optimizer, **options)
    ids = torch.randint(0, config.vocab_size, (rows, config.n_ctx))

    def step():
        for micro in range(2):
            with exchanging(network, run.mesh.sizes, micro == 1):
                loss, n = network(ids, ids)
                (loss / n).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()

    step()
    live = LiveBytes(net, optimizers)
    with live:
        step()
    planned = Step(
        config,
        sizes,
        shapes,
        config.n_ctx,
        rows,
        2,
        torch.float32,
        optimizer,
        zero=int(name == "zero"),
        recompute=config.n_layer if recompute else 0,
        device_type="cpu",
        local_world=2,
    )
    held = footprint(planned)
    result = {"mesh": name, "optimizer": optimizer, "recompute": recompute}
    result |= {"measured": live.peak, "estimated": total_bytes(held)}
    return result | {"measured_by_kind": live.at_peak, "estimated_by_kind": held}


def main():
    run = setup("cpu")
    for name in sys.argv[1:]:
        name, optimizer, *rest = name.split(":")
        result = measure(name, run, optimizer, "again" in rest)
        if run.is_main:
            print(json.dumps(result), flush=True)
    dist.barrier()
    end_process(0)


if __name__ == "__main__":
    main()
