"""What checkpoints in parts withstand: the shows of long_parallel.py about them."""

import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import socket
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)  # whose pool of threads no fork would have

# What a run brings along late is here once for all forks.
import torch._dynamo  # noqa: F401

import barelm.saving  # noqa: F401
from barelm.checkpoint import load
from barelm.resume import load_state, newest_step
from barelm.run import UserError
from barelm.steps import SHARDS

FORKS = multiprocessing.get_context("fork")
SMALL = ["--dataset=tiny", "--n_layer=2", "--n_embd=64", "--n_head=4", "--n_kv_head=2"]
SMALL += ["--seq_len=64", "--batch_tokens=512", "--micro_batch=2", "--warmup_steps=4"]
SMALL += ["--sample_tokens=0", "--eval_tokens=512", "--dtype=float32", "--device=cpu"]

# What is asked for, and of how many processes.
KINDS = {
    "1 process": (1, ()),
    "1 process, --keep=3": (1, ("--keep=3",)),
    "2 DDP, ZeRO-1": (2, ("--zero=1",)),
    "2 FSDP": (2, ("--parallel=fsdp",)),
    "2 FSDP, --async_save --keep=2": (2, ("--parallel=fsdp", "--async_save", "--keep=2")),
    "2 TP": (2, ("--tp=2",)),
    "2 PP": (2, ("--pp=2",)),
    "4 FSDP x TP": (4, ("--parallel=fsdp", "--tp=2")),
    "4 TP x PP, --async_save": (4, ("--tp=2", "--pp=2", "--async_save")),
    "4 HSDP": (4, ("--parallel=hsdp", "--replicas=2")),
}

# What a resume has to be told, or it would take the mesh of before.
UNDIVIDED = ("--parallel=ddp", "--replicas=0", "--tp=1", "--pp=1", "--cp=1", "--zero=0")
UNDIVIDED += ("--offload=false", "--async_save=false")
# Those that are resumed on each other's meshes.
RESUMED = {
    "1 process": (1, ()),
    "2 DDP": (2, ()),
    "2 DDP, ZeRO-1": (2, ("--zero=1",)),
    "2 FSDP": (2, ("--parallel=fsdp",)),
    "2 FSDP, --offload": (2, ("--parallel=fsdp", "--offload")),
    "2 TP": (2, ("--tp=2",)),
    "2 PP": (2, ("--pp=2",)),
    "2 FSDP x CP": (2, ("--parallel=fsdp", "--cp=2")),
    "4 FSDP x TP": (4, ("--parallel=fsdp", "--tp=2")),
    "4 DDP x PP": (4, ("--pp=2",)),
    "4 TP x PP": (4, ("--tp=2", "--pp=2")),
    "4 HSDP": (4, ("--parallel=hsdp", "--replicas=2")),
    "4 DDP": (4, ()),
    "4 DDP, ZeRO-1": (4, ("--zero=1",)),
}


def start(n, *args):
    """train.py on n processes, as torchrun would start them, but forks: they spare the imports."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(n):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place = {key: str(value) for key, value in place.items()}
        processes.append(FORKS.Process(target=train_here, args=(rank, place, args)))
        processes[-1].start()
    return processes


def train_here(rank, place, args):
    """train.py in this fork, whose words go into rank0.log and so on."""
    os.environ.update(place)
    log = os.open(f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = [str(ROOT / "train.py"), *SMALL, *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def end(processes, limit=300):
    """Wait for processes, and kill what is left of them: their exit statuses."""
    give_up = time.monotonic() + limit
    for process in processes:
        process.join(max(0.1, give_up - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def train(n, *args):
    statuses = end(start(n, *args))
    if any(statuses):
        raise SystemExit(f"{args} on {n}: exits {statuses}\n{Path('rank0.log').read_text()}")


def weights_of(out):
    """A hash of a model's weights by their names: they may be in any order, and in many files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load(out)[0].state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def losses_of(out):
    rows = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def resumes():
    """Four steps of each kind, and two and two: on the same mesh, and on others."""
    print("| kind | the same mesh | losses on other meshes differ by |")
    print("| --- | --- | --- |")
    common = ["--max_steps=4", "--save_every=2", "--eval_every=4", "--optimizer=muon"]
    for number, (name, (n, options)) in enumerate(RESUMED.items()):
        out = f"out/resumes{number}"
        train(n, *common, *options, "--keep=2", f"--out_dir={out}")

        def resumed(place, n, options, out=out):
            shutil.copytree(out, place)
            shutil.rmtree(f"{place}/{SHARDS}/step_00000004")
            resume = ["--init_from=resume", f"--out_dir={place}", *UNDIVIDED]  # not as it was
            train(n, *common, *resume, *options, "--keep=2")
            pairs = zip(losses_of(out), losses_of(place), strict=True)
            return max(abs(a - b) for a, b in pairs)

        difference = resumed(f"{out}same", n, options)
        is_same = weights_of(out) == weights_of(f"{out}same") and difference == 0
        words = "bit for bit" if is_same else "OTHER BITS"
        differences = {}
        for other in others_of(name):
            place = f"{out}to{len(differences)}"
            differences[other] = resumed(place, *RESUMED[other])
        cells = ", ".join(f"{other}: {figure:.1e}" for other, figure in differences.items())
        print(f"| {name} | {words} | {cells} |", flush=True)
        assert is_same and max(differences.values()) < 1e-5


def others_of(name):
    """One process, and in turn one kind of two and one of four: each kind is gone on with from
    some others."""
    number = list(RESUMED).index(name)
    others = []
    for n in (1, 2, 4):
        of_size = [other for other, (size, _) in RESUMED.items() if size == n and other != name]
        if of_size:
            others.append(of_size[number % len(of_size)])
    return others


def what_is_there(out):
    """What a run's folder holds after a kill: words. It has to open, whatever it is."""
    out = Path(out)
    cut = sorted(path.name for path in [*out.rglob("*.tmp"), *out.glob("*.tmp")])
    step = newest_step(out)
    if step is not None:
        load(step)
        found = step.name
    else:
        found = f"state.pt of step {load_state(out)['step']}"
    for place in (out, out / "best"):
        if place.is_dir() and (place / "config.json").is_file():
            try:
                load(place)
            except UserError as error:
                if "no model.safetensors" not in str(error):  # before a first save is whole
                    raise
    return f"{found}; cut: {', '.join(dict.fromkeys(cut)) or 'nothing'}"


def kills(n_kills=30, steps=12):
    """30 kills at random moments over all kinds, what was there after each, and the end."""
    chance = random.Random(0)
    common = [f"--max_steps={steps}", "--save_every=1", "--eval_every=2", "--optimizer=muon"]
    for number, (name, (n, options)) in enumerate(KINDS.items()):
        whole = f"out/whole{number}"
        train(n, *common, *options, f"--out_dir={whole}")
        out = f"out/killed{number}"
        for i in range(n_kills // len(KINDS)):
            args = [*common, *options, "--init_from=auto", f"--out_dir={out}"]
            kill_at_random(start(n, *args), Path(out), chance, one=n > 1 and i == 2)
            print(f"- {name}, kill {i + 1}: {what_is_there(out)}", flush=True)
        train(n, *common, *options, "--init_from=auto", f"--out_dir={out}")
        assert weights_of(out) == weights_of(whole), f"{name}: other weights than without a kill"
        assert losses_of(out) == losses_of(whole)
        print(f"- {name}: at the end the bits of a run without a kill", flush=True)


def kill_at_random(processes, out, chance, one):
    """Kill a run while it saves every step, some steps behind its start: all processes at once, or
    one, of which the others have to notice."""
    log = out / "log.jsonl"
    n_rows = None
    while all(process.is_alive() for process in processes):
        rows = log.read_bytes().count(b"\n") if log.is_file() else 0
        if n_rows is None and Path("rank0.log").read_text().count("step "):
            n_rows = rows
        if n_rows is not None and rows > n_rows + 2:
            break
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 1))
    victims = [chance.choice(processes)] if one else processes
    for process in victims:
        process.kill()
    begin = time.monotonic()
    end(processes, limit=60)
    if one:
        print(f"  (one of them; the others ended in {time.monotonic() - begin:.1f} s)")


def saves():
    """How long a step takes that saves, beside the training or not, to one that does not."""
    from test_sharded import worker

    for in_background in (False, True):
        folder = Path(f"saves{in_background}")
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = []
        for rank in range(2):
            args = (rank, 2, port, time_saves, (folder, in_background))
            processes.append(FORKS.Process(target=worker, args=args))
            processes[-1].start()
        assert end(processes, limit=600) == [0, 0]


def time_saves(run, folder, in_background, every=8, n_saves=4):
    """Steps of two processes by FSDP, of which every 8th saves 100 MB."""
    from test_sharded import TOK, sharded

    from barelm.optim import make_optimizer
    from barelm.saving import StepSaver
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    net = sharded(GPT(GPTConfig(4096, 128, 6, 4, 288)), run.world)
    optimizers = make_optimizer(net, "adamw")
    saver = StepSaver(folder, run, {}, in_background=in_background)
    times, saving = [], []
    for step in range(1 + every * n_saves):
        begin = time.monotonic()
        ids = torch.randint(0, 4096, (4, 129))
        loss, n = net(ids[:, :-1], ids[:, 1:])
        (loss / n).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.sum(loss.detach())
        if step % every == every - 1:
            saver.save(net, TOK, optimizers, {"step": step})
        seconds = time.monotonic() - begin
        (saving if step % every == every - 1 else times).append(seconds)
    saver.finish()
    if run.is_main:
        size = sum(path.stat().st_size for path in folder.rglob("*.distcp"))
        words = "beside the training" if in_background else "in its turn"
        print(
            f"{words}: {size / 1e6:.0f} MB; a step {median(times):.3f} s, one that saves "
            f"{median(saving):.3f} s: {median(saving) / median(times):.2f} x; all steps between "
            f"{sum(times[1:]) / len(times[1:]):.3f} s",
            flush=True,
        )


SHOWS = {"resumes": resumes, "saves": saves, "kills": kills}
