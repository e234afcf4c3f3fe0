"""Checkpoints that every process writes its part of: on any mesh the same, whole or not there."""

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist
from conftest import FORK
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from barelm.bpe import char_tokenizer
from barelm.checkpoint import load
from barelm.optim import make_optimizer
from barelm.run import Run
from barelm.saving import StepSaver
from barelm.sharded import load_step
from barelm.steps import whole_steps
from model import GPT, GPTConfig

TOK = char_tokenizer("abcdefghijklmnopqrstuvwxyz \n")
CONFIG = GPTConfig(64, 16, 2, 3, 24, n_kv_head=1)  # 24 rows, and 8, 64: over 2 and over 3
CPU = torch.device("cpu")


def in_processes(world, function, *args):
    """Call function(run, *args) in `world` processes of one group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork" if FORK else "spawn")
    processes = []
    for rank in range(world):
        processes.append(context.Process(target=worker, args=(rank, world, port, function, args)))
        processes[-1].start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world


def worker(rank, world, port, function, args):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    function(Run(CPU, rank, world), *args)
    dist.destroy_process_group()


def sharded(net, world):
    """A network in the way of --parallel=fsdp."""
    mesh = init_device_mesh("cpu", (world,))
    for block in net.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def build(seed, world, optimizer="adamw", config=CONFIG):
    torch.manual_seed(seed)
    net = GPT(config)
    if world > 1:
        net = sharded(net, world)
    return net, make_optimizer(net, optimizer, lr=1e-2)


def train(net, optimizers, steps):
    """Steps on the same batch for all processes: (the losses)."""
    for step in steps:
        torch.manual_seed(step)
        ids = torch.randint(0, 28, (2, 17))
        loss, n = net(ids[:, :-1], ids[:, 1:])
        (loss / n).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def whole(net):
    state = {}
    for name, t in net.state_dict().items():
        state[name] = t.full_tensor() if isinstance(t, DTensor) else t.clone()
    return state


def save_and_go_on(run, folder, in_background):
    net, optimizers = build(0, run.world)
    train(net, optimizers, range(3))
    saver = StepSaver(folder, run, {"shard": run.world}, in_background=in_background)
    saver.save(net, TOK, optimizers, {"step": 3, "best": float("inf")})
    train(net, optimizers, range(3, 5))
    saver.finish()
    torch.save(whole(net), folder / f"then{run.rank}.pt")


def resume(run, folder):
    net, optimizers = build(1, run.world)
    [(step, path)] = whole_steps(folder)
    load_step(path, net, optimizers)
    train(net, optimizers, range(3, 5))
    then = torch.load(folder / "then0.pt")
    for name, t in whole(net).items():
        assert torch.equal(t, then[name]), name


@pytest.mark.parametrize("in_background", [False, True])
def test_a(tmp_path, in_background):
    in_processes(2, save_and_go_on, tmp_path, in_background)
    in_processes(2, resume, tmp_path)
    print(os.listdir(tmp_path), os.listdir(tmp_path / "shards"))
    net, tok = load(tmp_path)
    net2, tok = load(whole_steps(tmp_path)[0][1])
    for a, b in zip(net.state_dict().values(), net2.state_dict().values()):
        assert torch.equal(a, b)
