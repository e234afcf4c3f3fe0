"""What tests/test_stages.py starts: networks in stages on four processes, against one process.

python tests/pipeline_worker.py [name of a case ...]"""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parent.parent))

from barelm.mesh import Mesh, Sizes
from barelm.optim import make_optimizer
from barelm.parallel import parallelize
from barelm.run import Updater, end_process, setup
from model import GPT, GPTConfig

STEPS = 3
N_MICRO = 4  # micro-batches of a step
ROWS = 2  # windows of each
T = 32
SHAPE = GPTConfig(vocab_size=64, n_ctx=T, n_layer=4, n_head=2, n_embd=32, n_hidden=64)
MIXED = dict(n_experts=4, expert_hidden=32, expert_layers="DDDE")  # none in the first stage

CASES = {
    "ddp": (Sizes(pp=2, replica=2), replace(SHAPE, mtp=1, **MIXED)),
    "fsdp": (Sizes(pp=2, shard=2), replace(SHAPE, tie=False)),
    "tp": (Sizes(pp=2, tp=2), SHAPE),
    "four": (Sizes(pp=4), replace(SHAPE, pos="relative")),
    # more than the suite has time for
    "cp": (Sizes(pp=2, replica=2, cp=2), replace(SHAPE, window=8, layers="SL")),
    "experts": (Sizes(pp=2, shard=2), replace(SHAPE, n_experts=4, expert_hidden=32)),
}


def step_batch(step, n_windows):
    """A step's windows {ids, targets}, which count on, and their documents."""
    generator = torch.Generator().manual_seed(step)
    begin = torch.randint(0, SHAPE.vocab_size, (n_windows, 1), generator=generator)
    stride = torch.randint(1, 4, (n_windows, 1), generator=generator)
    tokens = (begin + stride * torch.arange(T + 1)) % SHAPE.vocab_size
    docs = (tokens[:, :-1] < 4).cumsum(1)
    return {"ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}, docs


def figures_of_one(c, n_data):
    """[(mean loss, gradient norm)] of the steps of one process, then the loss of a validation."""
    torch.manual_seed(0)
    net = GPT(c).train()
    [optimizer] = make_optimizer(net, "adamw", 3e-3)
    figures = []
    for step in range(STEPS):
        batch, docs = step_batch(step, N_MICRO * ROWS * n_data)
        n_targets = batch["targets"].numel()
        loss_sum = 0.0
        for rows in torch.arange(len(docs)).split(ROWS):
            part = {name: tensor[rows] for name, tensor in batch.items()}
            loss, _ = net(**part, docs=docs[rows])
            (loss / n_targets).backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures.append((loss_sum / n_targets, norm.item()))
    net.eval()
    with torch.no_grad():
        loss, _ = net(**batch, docs=docs)
    return figures, loss.item() / n_targets


def figures_of_stages(c, run):
    """The same of a network in stages."""
    mesh = run.mesh
    torch.manual_seed(0)
    net = GPT(c).train()
    pipeline = parallelize(net, mesh)
    optimizers = make_optimizer(net, "adamw", 3e-3)
    updater = Updater(run, net.parameters(), optimizers, grad_clip=1.0)
    n_exchanging = mesh.sizes.replica * mesh.sizes.shard
    figures = []
    for step in range(STEPS):
        batch, docs = step_batch(step, N_MICRO * ROWS * mesh.data_world)
        n_targets = batch["targets"].numel()
        n_own = N_MICRO * ROWS
        own = slice(mesh.data_rank * n_own, (mesh.data_rank + 1) * n_own)
        batch = {name: tensor[own] for name, tensor in batch.items()}
        losses = pipeline.step(batch, docs[own], N_MICRO, n_exchanging / n_targets)
        norm = updater.clip_gradients()
        [loss_sum] = run.sum(losses[0] * mesh.counts)
        updater.step(step, loss_sum, norm.item())
        figures.append((loss_sum / n_targets, norm.item()))

    def score(net, h, batch):
        return net.loss_of(h, batch["targets"]).double().view(1, 1)

    net.eval()
    losses = pipeline.evaluate(batch, docs[own], N_MICRO, score, 1)
    [loss_sum] = run.sum(losses.sum() * mesh.counts)
    check_copies(pipeline)
    return figures, loss_sum / n_targets


def check_copies(pipeline):
    """What several stages hold has to stay the same in all, to the bit."""
    for p, group in pipeline.shared:
        own = p.detach().to_local() if hasattr(p, "to_local") else p.detach()
        most = own.clone()
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        least = own.clone()
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
        assert torch.equal(most, least)


def compare(rank, names, port):
    """What each process does: all cases, one after the other."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    run = setup("cpu")
    for name in names:
        sizes, c = CASES[name]
        run.mesh = Mesh(run, sizes)
        figures, val_loss = figures_of_stages(c, run)
        if run.is_main:
            expected, expected_val = figures_of_one(c, sizes.data)
        else:
            expected, expected_val = figures, val_loss
        ours = torch.tensor([*figures, (val_loss, 0.0)])
        worst = (ours - torch.tensor([*expected, (expected_val, 0.0)])).abs().max().item()
        run.say(f"{name}: {sizes.words()}: {worst:.1e} from one process, loss {val_loss:.4f}")
        assert worst < 1e-5, (name, figures, expected)
    run.wait()
    end_process(0)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Forked, so that torch is imported once.
    wanted = sys.argv[1:] or list(CASES)
    torch.multiprocessing.start_processes(compare, (wanted, port), nprocs=4, start_method="fork")
