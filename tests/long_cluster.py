"""Several machines on this one: network namespaces as hosts, with names and addresses of their own.

    sudo python tests/long_cluster.py             # all shows, some minutes
    sudo python tests/long_cluster.py cut_long    # one of them

Linux, as root, with `ip` and `unshare`. Each show prints what it did and found; one that finds
something else raises.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--dataset=words", "--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=32"]
SMALL += ["--n_hidden=64", "--seq_len=32", "--batch_tokens=512", "--warmup_steps=3", "--seed=7"]
SMALL += ["--sample_tokens=0", "--device=cpu", "--compile=false", "--eval_tokens=2048"]
NET = "10.77.0"


class Hosts:
    """So many hosts on one bridge, host0 to host<n - 1>: a namespace each."""

    def __init__(self, n, folder):
        self.names = [f"host{i}" for i in range(n)]
        self.folder = Path(folder)
        self.tag = f"b{os.getpid() % 10000}"  # of this script's namespaces and links
        self.processes = []

    def __enter__(self):
        lines = ["127.0.0.1 localhost"]
        ip(f"link add {self.tag} type bridge")
        ip(f"link set {self.tag} up")
        for i, name in enumerate(self.names):
            space = self.space(i)
            ip(f"netns add {space}")
            ip(f"link add {self.link(i)} type veth peer name eth0 netns {space}")
            ip(f"link set {self.link(i)} master {self.tag} up")
            ip(f"-n {space} addr add {NET}.{i + 1}/24 dev eth0")
            ip(f"-n {space} link set eth0 up")
            ip(f"-n {space} link set lo up")
            lines.append(f"{NET}.{i + 1} {name}")
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        return self

    def __exit__(self, *error):
        for process in self.processes:
            end_group(process)
        for i in range(len(self.names)):
            ip(f"netns del {self.space(i)}", check=False)
            ip(f"link del {self.link(i)}", check=False)
        ip(f"link del {self.tag}", check=False)

    def space(self, i):
        return f"{self.tag}h{i}"

    def link(self, i):
        return f"{self.tag}v{i}"

    def cut(self, i):
        ip(f"link set {self.link(i)} down")

    def mend(self, i):
        ip(f"link set {self.link(i)} up")

    def start(self, i, command, before="true"):
        """Start a command on a host; before: a shell line within its mounts."""
        script = f"hostname {self.names[i]}; mount --bind hosts /etc/hosts; {before}; exec $0 $@"
        inside = ["unshare", "--uts", "--mount", "sh", "-c", script]
        output = open(self.folder / f"{self.names[i]}.txt", "a")
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.space(i), *inside, *map(str, command)],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def train(self, i, *args, nnodes=None, restarts=0, before="true"):
        """Start torchrun with train.py on a host; they meet at the first one."""
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={nnodes or len(self.names)}",
        ]
        launch += ["--nproc_per_node=1", f"--max_restarts={restarts}", "--rdzv_backend=c10d"]
        launch += ["--rdzv_endpoint=host0:29400", f"--rdzv_id={self.tag}"]
        return self.start(i, [*launch, ROOT / "train.py", *SMALL, *args], before)

    def said(self, i):
        return (self.folder / f"{self.names[i]}.txt").read_text()


def ip(words, check=True):
    subprocess.run(
        ["ip", *words.split()], check=check, stderr=None if check else subprocess.DEVNULL
    )


def end_group(process):
    """Kill a process with all that it started; torchrun's workers have sessions of their own."""
    for pid in [*children(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def children(pid):
    """The ids of all processes below one."""
    below = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                below += [int(child), *children(child)]
    return below


def worker_of(process):
    """The id of the train.py that a torchrun runs, or None."""
    for pid in children(process.pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            if "train.py" in command and "torch.distributed.run" not in command:
                return pid
    return None


def rows(folder, out):
    """{step: row} of a log."""
    try:
        lines = (Path(folder) / out / "log.jsonl").read_text().splitlines()
    except OSError:
        return {}
    read = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if "loss" in row:
                read[row["step"]] = row
    return read


def wait_until(what, ready, seconds=240, said=str):
    """Wait for ready() to be true: the seconds that it took. said(): what to show if it is not."""
    begin = time.monotonic()
    while not ready():
        if time.monotonic() - begin > seconds:
            raise AssertionError(f"{what}: not within {seconds} s\n{said()}")
        time.sleep(0.1)
    return time.monotonic() - begin


def finish(hosts, processes, seconds=240):
    for i, process in enumerate(processes):
        if process.wait(timeout=seconds):
            raise AssertionError(f"host{i} ended with {process.returncode}:\n{hosts.said(i)}")


def greatest_difference(folder, one, two):
    a, b = rows(folder, one), rows(folder, two)
    assert a.keys() == b.keys() and a, (len(a), len(b))
    return max(abs(a[step]["loss"] - b[step]["loss"]) for step in a)


# --------------------------------------------------------------------------------------------------
# The shows


def alone(folder, *args):
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)


def same_curve(folder, n):
    """n hosts have the losses of one process."""
    args = ["--max_steps=20", "--optimizer=adamw"]
    alone(folder, *args, "--out_dir=out/one")
    with Hosts(n, folder) as hosts:
        finish(hosts, [hosts.train(i, *args, "--out_dir=out/many") for i in range(n)])
    difference = greatest_difference(folder, "out/one", "out/many")
    print(f"{n} hosts: 20 losses as one process's, to {difference:.1g}")


def two_hosts(folder):
    same_curve(folder, 2)


def four_hosts(folder):
    same_curve(folder, 4)


def unshared(folder):
    """A host whose out/ is its own is refused, at once and by all."""
    with Hosts(2, folder) as hosts:
        args = ["--max_steps=20", "--out_dir=out/private"]
        (folder / "out").mkdir(exist_ok=True)
        own = "mount -t tmpfs none out"
        processes = [hosts.train(0, *args), hosts.train(1, *args, before=own)]
        for i, process in enumerate(processes):
            ended = lambda process=process: process.poll() is not None
            wait_until(f"host{i}'s end", ended, said=lambda i=i: hosts.said(i))
            assert process.returncode != 0
        for i in (0, 1):
            assert "is not the folder of process 0: share it" in hosts.said(i), hosts.said(i)
        [line] = {line for line in hosts.said(0).splitlines() if "share it" in line}
        print(f"unshared: refused: {line}")
    assert not rows(folder, "out/private")


def killed(folder):
    """kill -9 on one host: the other notices, torchrun goes on from the last checkpoint."""
    args = ["--max_steps=60", "--save_every=10", "--optimizer=adamw"]
    alone(folder, *args, "--out_dir=out/whole")
    with Hosts(2, folder) as hosts:
        processes = [hosts.train(i, *args, "--out_dir=out/killed", restarts=2) for i in range(2)]
        wait_until("25 steps", lambda: len(rows(folder, "out/killed")) >= 25)
        workers = [worker_of(process) for process in processes]
        os.kill(workers[1], signal.SIGKILL)
        noticed = wait_until("host0's process ends", lambda: worker_of(processes[0]) != workers[0])
        print(f"killed: host0 gave up after {noticed:.1f} s")
        finish(hosts, processes)
        print("killed:", [line for line in hosts.said(0).splitlines() if "resumed" in line])
    difference = greatest_difference(folder, "out/whole", "out/killed")
    print(f"killed: losses of the whole run to {difference:.1g}")


def cut_short(folder, seconds=6):
    """A link that is down for some seconds: the run waits, and goes on."""
    args = ["--max_steps=60", "--save_every=100", "--out_dir=out/short"]
    with Hosts(2, folder) as hosts:
        processes = [hosts.train(i, *args) for i in range(2)]
        wait_until("20 steps", lambda: len(rows(folder, "out/short")) >= 20)
        hosts.cut(1)
        time.sleep(seconds)
        hosts.mend(1)
        finish(hosts, processes)
        longest = max(row["dt"] for row in rows(folder, "out/short").values())
        print(f"cut for {seconds} s: no restart; the longest step took {longest:.1f} s")


def cut_long(folder, seconds=40):
    """A host cut off and back: both sides end their processes within seconds, and go on together
    from the last checkpoint when the link is back."""
    args = ["--max_steps=60", "--save_every=10", "--optimizer=adamw"]
    if not rows(folder, "out/whole"):
        alone(folder, *args, "--out_dir=out/whole")
    with Hosts(2, folder) as hosts:
        processes = [hosts.train(i, *args, "--out_dir=out/cut", restarts=3) for i in range(2)]
        wait_until("25 steps", lambda: len(rows(folder, "out/cut")) >= 25)
        workers = [worker_of(process) for process in processes]
        hosts.cut(1)
        begin = time.monotonic()
        for i in (0, 1):
            wait_until(f"host{i}", lambda i=i: worker_of(processes[i]) != workers[i])
            print(f"cut: host{i}'s process ended {time.monotonic() - begin:.1f} s after the cut")
        time.sleep(max(0, seconds - (time.monotonic() - begin)))
        hosts.mend(1)
        print(
            f"cut: the link is back after {time.monotonic() - begin:.0f} s; torchrun on host1 is "
            f"{'there' if processes[1].poll() is None else 'gone'}"
        )
        if processes[1].poll() is not None:  # a cluster starts it again
            processes[1] = hosts.train(1, *args, "--out_dir=out/cut", restarts=3)
        finish(hosts, processes)
    print(
        f"cut: losses of the whole run to {greatest_difference(folder, 'out/whole', 'out/cut'):.1g}"
    )


def gone_for_good(folder):
    """A host that never comes back: with --nnodes=1:2 the other one goes on alone."""
    args = ["--max_steps=60", "--save_every=10", "--out_dir=out/good"]
    with Hosts(2, folder) as hosts:
        processes = [hosts.train(i, *args, nnodes="1:2", restarts=3) for i in range(2)]
        wait_until("25 steps", lambda: len(rows(folder, "out/good")) >= 25)
        begin = time.monotonic()
        hosts.cut(1)
        worker = worker_of(processes[0])
        noticed = wait_until("host0", lambda: worker_of(processes[0]) != worker)
        finish(hosts, processes[:1])
        took = time.monotonic() - begin
        print(
            f"gone: host0 noticed after {noticed:.1f} s, and ended the run alone after {took:.0f} s"
        )
    assert max(rows(folder, "out/good")) == 60


SHOWS = [two_hosts, four_hosts, unshared, killed, cut_short, cut_long, gone_for_good]


def show(names=()):
    """Hosts of network namespaces: they meet; a kill, a link cut and back, a folder not shared."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        sys.exit("network namespaces need Linux, root and iproute2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = random.Random(0)
        words = ["cat", "dog", "sees", "hears", "the", "a", "old", "young", "and", "sleeps", "runs"]
        text = ".\n".join(" ".join(rng.choices(words, k=8)) for _ in range(600))
        (folder / "words.txt").write_text(text)
        prepare = [sys.executable, str(ROOT / "prepare.py"), "--source=words.txt"]
        prepare += ["--dataset=words", "--tokenizer=byte"]
        subprocess.run(prepare, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for one in SHOWS:
            if not names or one.__name__ in names:
                shutil.rmtree(folder / "out", ignore_errors=True)  # of the show before
                one(folder)
                sys.stdout.flush()


if __name__ == "__main__":
    show(sys.argv[1:])
