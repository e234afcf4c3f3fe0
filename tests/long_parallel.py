"""What takes longer than a test may, of many processes. Each function is a show of its own:

    python tests/long_parallel.py            # all of them
    python tests/long_parallel.py meshes     # the losses of every mesh beside those of one process
    python tests/long_parallel.py resumes    # each mesh on itself and on others
    python tests/long_parallel.py saves      # the step that saves, to one that does not
    python tests/long_parallel.py kills      # 30 kills at random moments, what was there after each
    python tests/long_parallel.py data       # prepare.py on four machines, a stream that breaks off
    sudo python tests/long_parallel.py cluster   # hosts that meet, a kill, a link cut and back

It needs no network and no GPU, and works in a new folder of the system's temporary ones.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import long_checkpoints
import long_cluster
import long_data

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ["--n_layer=4", "--n_embd=64", "--n_head=4", "--n_kv_head=2", "--seq_len=64"]
STEPS = ["--batch_tokens=2048", "--max_steps=20", "--warmup_steps=4", "--eval_every=10"]
STEPS += ["--eval_tokens=4096", "--save_every=100", "--sample_tokens=0", "--dtype=float32"]
STEPS += ["--learning_rate=1e-3"]

# What is asked for, and of how many processes.
MESHES = {
    "1 process": (1, ()),
    "2 DDP": (2, ()),
    "2 DDP, ZeRO-1": (2, ("--zero=1",)),
    "2 FSDP": (2, ("--parallel=fsdp",)),
    "2 TP": (2, ("--tp=2",)),
    "2 PP": (2, ("--pp=2",)),
    "2 CP": (2, ("--cp=2",)),
    "4 FSDP x TP": (4, ("--parallel=fsdp", "--tp=2")),
    "4 DDP x PP": (4, ("--pp=2",)),
    "4 TP x PP": (4, ("--tp=2", "--pp=2")),
    "4 FSDP x PP": (4, ("--parallel=fsdp", "--pp=2")),
    "4 DDP x TP": (4, ("--tp=2",)),
    "4 HSDP (2 x 2)": (4, ("--parallel=hsdp", "--replicas=2")),
    "4 FSDP x CP": (4, ("--parallel=fsdp", "--cp=2")),
}


def launch(script, *args, processes=1):
    """Run a script as a user does, on so many processes; what it printed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / script), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare():
    """data/tiny, where it is not there yet."""
    if not Path("data/tiny/meta.json").is_file():
        launch("prepare.py", str(ROOT / "config/tiny.py"))


def figures_of(out, key):
    rows = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return [row[key] for row in rows if key in row]


def largest_difference(out, reference, key):
    pairs = zip(figures_of(out, key), figures_of(reference, key), strict=True)
    return max(abs(figure - other) for figure, other in pairs)


def meshes():
    """The losses of 20 steps, gradient norms and validations of every mesh beside one process's."""
    print("| processes | AdamW: loss | norm | validation | Muon: loss |")
    print("| --- | --- | --- | --- | --- |")
    worst = {"adamw": 0.0, "muon": 0.0}
    for number, (name, (processes, options)) in enumerate(MESHES.items()):
        cells = [name]
        for optimizer in worst:
            out = f"out/{optimizer}{number}"
            args = ["--dataset=tiny", *NETWORK, *STEPS, *options, f"--out_dir={out}"]
            launch("train.py", *args, f"--optimizer={optimizer}", processes=processes)
            keys = ("loss", "grad_norm", "val_loss") if optimizer == "adamw" else ("loss",)
            for key in keys:
                cells.append(f"{largest_difference(out, f'out/{optimizer}0', key):.1e}")
            difference = largest_difference(out, f"out/{optimizer}0", "loss")
            worst[optimizer] = max(worst[optimizer], difference)
        print(f"| {' | '.join(cells)} |", flush=True)
    assert worst["adamw"] <= 1e-5 and worst["muon"] <= 2e-3, worst


SHOWS = {"meshes": meshes} | long_checkpoints.SHOWS
SHOWS |= {"data": long_data.show, "cluster": long_cluster.show}


def main():
    names = sys.argv[1:] or list(SHOWS)
    unknown = [name for name in names if name not in SHOWS]
    if unknown:
        raise SystemExit(f"{unknown[0]}: expected {', '.join(SHOWS)}")
    folder = tempfile.mkdtemp(prefix="long_parallel_")
    print(f"in {folder}", flush=True)
    os.chdir(folder)
    prepare()
    for name in names:
        print(f"\n## {name}: {SHOWS[name].__doc__.splitlines()[0]}\n", flush=True)
        SHOWS[name]()


if __name__ == "__main__":
    main()
