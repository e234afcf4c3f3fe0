"""What the tests share: the scripts run as a user runs them, in a folder of their own."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: no threads that a fork would lose
# What torch compiled for one kind of CPU, it would run as another kind too, and crash.
KIND_OF_CPU = os.environ.get("ATEN_CPU_CAPABILITY", "native")
COMPILED = f"{tempfile.gettempdir()}/barelm_compiled_{os.getuid()}_{KIND_OF_CPU}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", COMPILED)
# Its threads would be lost in a fork too, which would wait for them for ever.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
import pytest
import torch
from torch.optim import AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook

torch.set_num_threads(1)  # whatever MKL_NUM_THREADS says
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for scripts that stand elsewhere
from barelm.workers import end_with_the_parent

# Seconds after which a command that a test waits for hangs: no machine is so slow. It is ended, and
# what it said is shown. (pyproject.toml ends pytest itself where one test takes twice as long.)
LONGEST = 300
# Where a fork is safe the commands below start as one, which spares each the import of torch.
FORK = sys.platform == "linux" and not torch.cuda.is_available()
if FORK:
    # At its first gradient autograd starts a thread for each device that there is, and none later:
    # a test of tensors without numbers, on a "cuda" that there is not, must not come before it.
    torch.ones(1, requires_grad=True).sum().backward()


# Folders of fixtures whose tokenizers the package `tokenizers` runs.
RUN_BY_LIBRARY = ("llama2", "mistral", "tinyllama")


def pytest_runtest_setup(item):
    """A test of such a folder is left out where that package is not installed."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(value in RUN_BY_LIBRARY for value in params if isinstance(value, str)):
        pytest.importorskip("tokenizers")


@pytest.fixture(scope="session")
def holes():
    """What the sandbox of eval.py cannot stop on this machine; empty where it is whole."""
    from barelm.sandbox import check_sandbox

    return check_sandbox()


def alone():
    """The Run of one process on a CPU, in a grid of one."""
    from barelm.mesh import Mesh, Sizes
    from barelm.run import Run

    process = Run(torch.device("cpu"))
    process.mesh = Mesh(process, Sizes())
    return process


def run(cwd, script, *args, check=True, stdin="", env=None, processes=1, **popen):
    """`python script.py args` in the folder cwd (for several processes, what torchrun starts)."""
    args = [str(ROOT / a) if str(a).startswith("config/") else str(a) for a in args]
    if FORK and not env and not popen:
        done = run_forked(cwd, script, args, stdin, processes)
    else:
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*launch, str(ROOT / script), *args],
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            env=os.environ | (env or {}),
            timeout=LONGEST,
            **popen,
        )
    if check and done.returncode:
        raise AssertionError(
            f"{script} {args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


def run_forked(cwd, script, args, stdin, processes):
    """The same command in forks of this process."""
    forks, out, err = start_forked(cwd, script, args, stdin, processes)
    while alive := [process for process in forks if process.is_alive()]:
        if not wait([process.sentinel for process in alive], LONGEST):
            end_hanging(alive, [out, err])
        if any(process.exitcode for process in forks):  # one that fails ends the others
            for process in alive:
                process.terminate()
    out.seek(0), err.seek(0)
    failed = [process.exitcode for process in forks if process.exitcode]
    return SimpleNamespace(returncode=[*failed, 0][0], stdout=out.read(), stderr=err.read())


def start_forked(cwd, script, args, stdin="", processes=1, before=lambda: None):
    """Start the command in forks of this process, in each of which `before` is called first: (the
    forks, the file of their stdout, of their stderr)."""
    streams = [tempfile.TemporaryFile("w+") for _ in range(3)]
    streams[0].write(stdin)
    streams[0].seek(0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def child(rank):
        end_with_the_parent()
        if processes > 1:
            os.environ.update(
                ranks, WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank)
            )
        os.chdir(cwd)
        for number, stream in enumerate(streams):
            os.dup2(stream.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, m) for n, m in enumerate("rww"))
        sys.argv = [str(ROOT / script), *map(str, args)]
        before()
        runpy.run_path(sys.argv[0], run_name="__main__")

    fork = multiprocessing.get_context("fork")
    forks = [fork.Process(target=child, args=(rank,)) for rank in range(processes)]
    for process in forks:
        process.start()
    return forks, streams[1], streams[2]


class Forked:
    """What Popen is to `python script.py args` in the folder cwd, of a fork of this process: its
    stdout is a pipe, with its stderr unless that goes into a file."""

    def __init__(self, cwd, script, *args, stderr=None, env=None):
        self.args = [script, *args]
        read, write = os.pipe()

        def child():
            end_with_the_parent()
            no_sockets_of_the_parent()
            os.chdir(cwd)
            os.environ.update(env or {})
            os.dup2(write, 1)
            os.dup2(stderr.fileno() if stderr else 1, 2)
            os.close(read), os.close(write)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = [str(ROOT / script), *map(str, args)]
            runpy.run_path(sys.argv[0], run_name="__main__")

        self.process = multiprocessing.get_context("fork").Process(target=child)
        self.process.start()
        os.close(write)
        self.pid, self.stdout = self.process.pid, os.fdopen(read)
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stdout.close()
        self.wait()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=LONGEST):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout=LONGEST):
        said = self.stdout.read()
        self.wait(timeout)
        return said, None


def no_sockets_of_the_parent():
    """Or their other ends would not see that this process's parent closed them."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                os.dup2(null, int(number))


def start(cwd, script, *args, env=None, stderr=None):
    """Start `python script.py args` in the background: a Popen with a pipe of its stdout as text,
    and of its stderr unless that goes into a file; as a fork where that is safe."""
    if FORK:
        return Forked(cwd, script, *args, env=env, stderr=stderr)
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *args],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=stderr or subprocess.STDOUT,
        text=True,
    )


def join(process, *streams):
    """Wait for the end of a fork of this process, which writes into these files."""
    process.join(LONGEST)
    if process.is_alive():
        end_hanging([process], streams)


def end_hanging(processes, streams):
    """End forks that do not end by themselves: an error with what they wrote into these files."""
    for process in processes:
        os.kill(process.pid, signal.SIGABRT)  # pytest's faulthandler prints where it is
        process.join(5)
        process.kill()
        process.join()
    for stream in streams:
        stream.seek(0)
    said = "\n".join(stream.read() for stream in streams)
    raise AssertionError(f"no end within {LONGEST} s\n{said}")


def kill_itself(ending, times):
    """Make this process kill itself (SIGKILL) when it has renamed a file to a name with this
    ending, or after a `step` of AdamW, so many times."""
    calls, rename = [], os.replace

    def kill():
        calls.append(1)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace(a, b):
        rename(a, b)
        if str(b).endswith(ending):
            kill()

    os.replace = replace
    if ending == "step":
        register_optimizer_step_post_hook(lambda o, *_: isinstance(o, AdamW) and kill())


KILLED = """
import runpy, sys
_, tests, script, ending, times, *args = sys.argv
sys.path.insert(0, tests)
from conftest import kill_itself
kill_itself(ending, int(times))
sys.argv = [script, *args]
runpy.run_path(script, run_name="__main__")
"""


def run_killed(cwd, script, *args, ending, times=1, processes=1):
    """`python script.py args` in a process that kills itself, as kill_itself has it: the first of
    several, with which the others are killed. A busy machine moves that moment not, as it would a
    kill from without."""
    if FORK or processes > 1:
        before = lambda: kill_itself(ending, times)
        [process, *others], out, err = start_forked(cwd, script, args, "", processes, before)
        join(process, out, err)
        for other in others:
            other.kill()
            other.join()
        out.seek(0), err.seek(0)
        status, said = process.exitcode, (out.read(), err.read())
    else:
        words = [str(ROOT / "tests"), str(ROOT / script), ending, str(times), *map(str, args)]
        command = [sys.executable, "-c", KILLED, *words]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LONGEST)
        status, said = done.returncode, (done.stdout, done.stderr)
    assert status == -signal.SIGKILL, (status, *said)


def stalled(ending):
    """A function that makes this process and its forks wait for ever before they rename a file to
    a name with this ending, so that whoever wants to kill them in their work comes in time."""
    rename = os.replace

    def replace(a, b):
        while str(b).endswith(ending):
            signal.pause()
        rename(a, b)

    return lambda: setattr(os, "replace", replace)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with data/tiny prepared and out/tiny trained by the real commands."""
    folder = tmp_path_factory.mktemp("tiny")
    run(folder, "prepare.py", "config/tiny.py")
    run(folder, "train.py", "config/tiny.py")
    return folder
