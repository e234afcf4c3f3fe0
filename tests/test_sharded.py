"""Checkpoints that every process writes its part of: on any mesh the same, whole or not there."""

import math
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import FORK, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from barelm.bpe import char_tokenizer
from barelm.checkpoint import load
from barelm.families import family
from barelm.optim import make_optimizer
from barelm.pieces import PIECE
from barelm.resume import newest_step, weights_step
from barelm.run import Run, UserError
from barelm.saving import StepSaver
from barelm.sharded import load_step
from barelm.steps import read_step_state, step_folder, whole_steps
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
    """Three steps, a save, two more: what the weights are then goes into then.pt."""
    net, optimizers = build(0, run.world)
    train(net, optimizers, range(3))
    saver = StepSaver(folder, run, {"shard": run.world}, in_background=in_background)
    saver.save_best(net, TOK, 3, with_save=True)
    saver.save(net, TOK, optimizers, {"step": 3, "best": math.inf})
    train(net, optimizers, range(3, 5))
    saver.finish()
    then = whole(net)
    if run.is_main:
        torch.save(then, folder / "then.pt")


def resume(run, folder, exact):
    """The two more steps from what was saved, and the same weights."""
    net, optimizers = build(1, run.world)
    [(_, path)] = whole_steps(folder)
    load_step(path, net, optimizers)
    train(net, optimizers, range(3, 5))
    then = torch.load(folder / "then.pt")
    for name, t in whole(net).items():
        if exact:
            assert torch.equal(t, then[name]), name
        torch.testing.assert_close(t, then[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("in_background", [False, True])
def test_what_two_processes_save_in_parts_goes_on_on_any_number_of_them(tmp_path, in_background):
    in_processes(2, save_and_go_on, tmp_path, in_background)
    in_processes(2, resume, tmp_path, True)
    [(_, path)] = whole_steps(tmp_path)
    assert read_step_state(path) == {"step": 3, "best": math.inf}
    if not in_background:
        resume(Run(CPU), tmp_path, False)  # a process alone, without a group
        in_processes(3, resume, tmp_path, False)
    # The model that was made of the parts, and the parts themselves, open as any other does.
    saved, _ = load(tmp_path)
    for folder in (tmp_path / "best", path):
        for name, t in load(folder)[0].state_dict().items():
            assert torch.equal(t, saved.state_dict()[name])
    assert not (tmp_path / "state.pt").exists()


# --------------------------------------------------------------------------------------------------
# Whole, or not there


CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


def killed_in(save, at):
    """Call `save` in a fork that kills itself at its `at`-th change of the disk: how many there
    were, where it came through; else None."""
    counted, told = multiprocessing.Pipe(duplex=False)

    def child():
        calls = []

        def watched(real):
            def change(*args, **options):
                calls.append(real)
                if len(calls) > at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return change

        for name in CHANGES:
            setattr(os, name, watched(getattr(os, name)))
        save()
        told.send(len(calls))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return counted.recv() if counted.poll() else None


def check_kills(folder, every):
    """Kill the save of a second step at every `every`-th change of the disk, and open what is
    there then: how many changes there were."""
    nets = {}
    for step in (1, 2):
        nets[step] = build(step, 1, config=replace(CONFIG, n_layer=1))
        train(*nets[step], range(1))

    def save(step, place):
        saver = StepSaver(place, Run(CPU), {}, keep=1)
        saver.save_best(nets[step][0], TOK, step, with_save=True)
        saver.save(*nets[step][:1], TOK, nets[step][1], {"step": step})

    def is_of(place, step):
        state = load(place)[0].state_dict()
        return all(torch.equal(t, state[name]) for name, t in nets[step][0].state_dict().items())

    save(1, folder / "first")
    n = None
    at = 0
    while n is None:
        place = folder / f"killed{at}"
        shutil.copytree(folder / "first", place)
        n = killed_in(lambda place=place: save(2, place), at)
        path = newest_step(place)
        step = read_step_state(path)["step"]
        assert is_of(path, step)
        load_step(path, *build(0, 1, config=replace(CONFIG, n_layer=1)))
        # The models in the run's folder and in best/ may be of the other step, but of one.
        assert is_of(place, 1) or is_of(place, 2)
        # What a step says of the best is there.
        assert is_of(place / "best", 2) or (step == 1 and is_of(place / "best", 1))
        shutil.rmtree(place)
        at += every
    assert step == 2
    return n


@pytest.mark.skipif(not FORK, reason="needs a safe fork")
def test_a_save_that_is_killed_leaves_the_step_before_or_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr("barelm.pieces.PIECE", 10_000)  # tests/long_parallel.py has every change
    assert check_kills(tmp_path, every=7) > 30


# --------------------------------------------------------------------------------------------------
# The Hugging Face folder, and strangers


GPT2 = dict(norm="layer", norm_bias=True, bias=True, pos="learned", mlp="gelu", qk_norm=False)
EXPERTS = dict(n_experts=4, n_experts_per_token=2, expert_hidden=8)


@pytest.mark.parametrize(
    "change", [{}, GPT2 | {"n_kv_head": 3}, EXPERTS], ids=["qwen3", "gpt2", "experts"]
)
def test_the_model_comes_in_pieces_of_which_none_mixes_two_steps(tmp_path, monkeypatch, change):
    """In one file, then in many, which another reader opens too, then in one again."""
    config = replace(CONFIG, **change)
    saver = StepSaver(tmp_path, Run(CPU), {})
    for step, piece in ((1, PIECE), (2, 6000), (3, 7000), (4, PIECE)):
        monkeypatch.setattr("barelm.pieces.PIECE", piece)
        net, _ = build(step, 1, config=config)
        saver.save(net, TOK, [], {"step": step})
        files = sorted(path.name for path in tmp_path.glob("*.safetensors*"))
        if piece == PIECE:
            assert files == ["model.safetensors"]
        else:
            assert len(files) > 3 and all(f"step{step}-" in name for name in files[:-1])
            assert files[-1] == "model.safetensors.index.json"
        assert weights_step(tmp_path) == step
        for name, t in load(tmp_path)[0].state_dict().items():
            assert torch.equal(t, net.state_dict()[name]), name
        if piece == 7000 and family(config) != "barelm":
            transformers = pytest.importorskip("transformers")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
            ids = torch.tensor([[1, 5, 3, 2, 7, 7, 2]])
            with torch.no_grad():
                torch.testing.assert_close(theirs(ids).logits, net.eval()(ids))


def test_a_step_that_is_damaged_is_passed_over_and_a_foreign_one_runs_nothing(tmp_path):
    net, optimizers = build(0, 1)
    train(net, optimizers, range(1))
    saver = StepSaver(tmp_path, Run(CPU), {}, keep=3)
    for step in range(5):
        saver.save(net, TOK, optimizers, {"step": step})
    assert [step for step, _ in whole_steps(tmp_path)] == [2, 3, 4]
    path = step_folder(tmp_path, 4)
    with open(path / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)
    said = []
    assert newest_step(tmp_path, said.append) == step_folder(tmp_path, 3)
    assert "has 1,000 bytes" in said[0]
    saver.save(net, TOK, optimizers, {"step": 4})  # as a run does that has gone on from step 3
    assert [step for step, _ in whole_steps(tmp_path)] == [2, 3, 4]
    assert len(list((tmp_path / "shards").iterdir())) == 3
    other, of_other = build(0, 1, "muon")
    with pytest.raises(UserError, match="another optimizer's"):
        load_step(step_folder(tmp_path, 3), other, of_other)
    wider, _ = build(0, 1, config=replace(CONFIG, n_hidden=32))
    with pytest.raises(UserError, match="not as this run has it"):
        load_step(step_folder(tmp_path, 3), wider, [])

    class Stranger:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (step_folder(tmp_path, 3) / ".metadata").write_bytes(pickle.dumps(Stranger()))
    with pytest.raises(UserError, match="damaged, or no file of ours"):
        load(step_folder(tmp_path, 3))
    assert not (tmp_path / "ran").exists()


def test_train_goes_on_from_parts_with_the_same_bits_and_by_one_process_again(tiny):
    args = ["config/tiny.py", "--save_every=2", "--eval_every=4", "--eval_tokens=512"]
    args += ["--max_steps=4", "--batch_tokens=256", "--sample_tokens=0", "--dtype=float32"]
    parts = ["--parallel=fsdp", "--keep=2", "--async_save"]
    out = tiny / "out/parts"
    run(tiny, "train.py", *args, *parts, f"--out_dir={out}", processes=2)
    assert [step for step, _ in whole_steps(out)] == [2, 4]
    for other in ("again", "alone"):
        shutil.copytree(out, tiny / "out" / other)
        shutil.rmtree(step_folder(tiny / "out" / other, 4))
    again, alone = tiny / "out/again", tiny / "out/alone"
    resume = "--init_from=auto"
    run(tiny, "train.py", *args, *parts, resume, f"--out_dir={again}", processes=2)
    for name in ("model.safetensors", "best/model.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    plain = ["--parallel=ddp", "--keep=1", "--async_save=false"]  # or it would keep parts, too
    run(tiny, "train.py", *args, *plain, resume, f"--out_dir={alone}")
    assert (alone / "state.pt").exists() and not (alone / "shards").exists()
    ours, theirs = load(out)[0].state_dict(), load(alone)[0].state_dict()
    for name, t in ours.items():
        torch.testing.assert_close(theirs[name], t, rtol=1e-2, atol=1e-3)
