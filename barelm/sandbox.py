"""A sandbox for programs that a model wrote: run one, learn whether it came to its end.

Whom this guards against: a program that was written by a language model, which may be careless or
hostile, and is run to see whether its tests pass. It may read Python's library and compute, and
nothing else. What it must not do, whatever it tries, and what stops it (barelm/confine.py, which
has the rules and the reason of their order):

- read, change or make files of the user's: Landlock; it cannot write at all, so nothing is left
- reach a network, or a local service by a socket: seccomp
- start another process: seccomp; so nothing outlives it, and no fork bomb grows
- signal, trace or slow down other processes: seccomp
- take the machine's memory or time: limits, and this process's clock
- live on when this process is gone: the signal of a parent's death, which it cannot take back
- be root: it becomes a user that nothing belongs to

What is not promised. A program shares its process with its own tests, and one that is made to
deceive (an object equal to everything, a search for the token's pipe) can pass them. It can see
which paths exist. It runs on the kernel of this machine: a fault in that is a way out, so that
somebody who expects attackers runs all of this in a virtual machine. Where the machine cannot
enforce a rule, `run_program` refuses to run anything unless weak=True, and `check_sandbox` says
what is missing: it attacks each promise with a program of its own.
"""

from __future__ import annotations

import math
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from barelm import host
from barelm.run import UserError

CONFINE = Path(__file__).resolve().with_name("confine.py")  # what the child runs


def run_program(source: str, timeout: int = 10, memory_mb: int = 1024, weak: bool = False) -> str:
    """Run a program in the sandbox, its output thrown away → "passed" if it came to its end, else
    "failed: NameError: …", "timed out" (after so many seconds) or "killed: SIGSEGV".

    What it prints and how it exits say nothing; a random token does, which no program meets by
    accident. weak: run it where the sandbox is incomplete, too; else that is a UserError."""
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.py").write_bytes(source.encode("utf-8", "replace"))
        report, status = run_child(folder, token, timeout, memory_mb, weak)
    text = " ".join(report.decode("utf-8", "replace").split())
    if text.startswith("no sandbox:"):
        if not source:
            raise UserError(f"{text}; --allow_weak_sandbox runs programs without it")
        # A program can report this too, to end the evaluation: an empty one reports the truth.
        run_program("", timeout, memory_mb, weak)
    if report == token:
        return "passed"
    if report:
        return f"failed: {text}"
    if status is None:
        return "timed out"
    if status < 0:
        return f"killed: {host.signal_name(status)}"
    return f"failed: exited with status {status} before its end"


def run_child(folder: str, token: bytes, timeout: float, memory_mb: int, weak: bool) -> tuple:
    """Run confine.py in a folder with program.py: (what it reports, its exit status), where the
    status is None if the time was up first. It is dead when this returns."""
    strictness = "weak" if weak else "strict"
    limits = [str(math.ceil(timeout)), str(memory_mb), strictness, str(os.getpid())]
    report = b""
    status = None
    with subprocess.Popen(
        [sys.executable, "-I", str(CONFINE), *limits],  # -I: no variables, folders of the user's
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"OMP_NUM_THREADS": "1"},  # numpy's threads would take memory on a large machine
        start_new_session=True,  # a group of its own, to be killed as one
    ) as process:
        deadline = time.monotonic() + timeout
        try:
            with suppress(BrokenPipeError):  # it may be dead by now
                process.stdin.write(token)
                process.stdin.close()
            # One read, and no more: a program that floods its report is not waited for.
            if select.select([process.stdout], [], [], timeout)[0]:
                report = os.read(process.stdout.fileno(), 1000)
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(max(0, deadline - time.monotonic()))
        finally:
            host.end_group(process)
    return report, status


def run_programs(sources: list[str], timeout: int = 10, weak: bool = False) -> list[str]:
    """The verdicts of many programs, as many at once as this process may use cores."""

    def run_one(source):
        return run_program(source, timeout, weak=weak)

    with ThreadPoolExecutor(host.usable_cores()) as pool:
        return list(pool.map(run_one, sources))


def check_sandbox() -> list[str]:
    """What the sandbox could not enforce here, one sentence each: every protection is tried by a
    program that attacks it. A UserError where not even a harmless program runs."""
    if host.is_windows():
        why = "Windows has nothing that would hold them: run this in WSL 2, which is Linux"
        raise UserError(f"programs that a model wrote are not run here: {why}")
    verdict = run_program("import math, re, typing, dataclasses\nassert 1 + 1 == 2", weak=True)
    if verdict != "passed":
        raise UserError(f"no program can be run here with {sys.executable} ({verdict})")
    holes = []
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        private = Path(folder, "private")
        private.write_text("x", encoding="utf-8")
        # Open to everybody, so that only the sandbox forbids it.
        os.chmod(folder, 0o777)
        os.chmod(private, 0o666)
        for what, source, expected in attacks(str(private), server.getsockname()):
            verdict = run_program(source, 2, weak=True)
            if not verdict.startswith(expected):
                holes.append(f"a program can {what} (its attempt: {verdict})")
    return holes


def attacks(private: str, address: tuple) -> list[tuple[str, str, str]]:
    """[(what a program would do, its source, how its verdict begins where it cannot)]: a file that
    is there for all to read and write, and a server's address, are what they are aimed at."""
    refused = "failed: PermissionError"
    no_process = (refused, "failed: BlockingIOError")  # by seccomp, or by the limit without it
    connect = f"import socket\nsocket.create_connection({address})"
    forget_signal = "import ctypes\nassert ctypes.CDLL(None).prctl(1, 0) == -1"  # -1: refused
    return [
        ("run as root", "import os\nos.geteuid() and 1 / 0", "failed: ZeroDivisionError"),
        ("open connections", connect, refused),
        ("read your files", f"open({private!r}).read()", refused),
        ("write your files", f"open({private!r}, 'a').write('y')", refused),
        ("create files", f"open({private!r} + '2', 'x')", refused),
        ("fill its folder", "open('y', 'wb').write(b'y')", refused),
        ("start processes", "import os\nos.fork() or os._exit(0)", no_process),
        ("signal processes", "import os\nos.kill(os.getppid(), 0)", refused),
        ("take more memory than its share", "bytearray(2 << 30)", "failed: MemoryError"),
        ("outlive this process", forget_signal, "passed"),
        ("run for ever", "while True:\n    pass", "timed out"),
    ]


def require_sandbox(allowed: bool, allow_weak: bool) -> None:
    """An error without the user's leave to run programs, or in a sandbox with holes that the user
    has not allowed (allow_weak); the holes are printed."""
    if not allowed:
        why = "this task runs programs that the model wrote"
        raise UserError(f"{why}: --allow_code_exec allows it, sandboxed")
    holes = check_sandbox()
    for hole in holes:
        print(f"sandbox: {hole}")
    if holes and not allow_weak:
        raise UserError("the sandbox is incomplete here (above); --allow_weak_sandbox runs anyway")
