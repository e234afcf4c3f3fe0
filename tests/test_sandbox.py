"""barelm/sandbox.py and confine.py: what a program may do, and every way out of it that we know."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from barelm import confine, sandbox
from barelm.run import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(holes):
    """run_program where the sandbox is complete; elsewhere a test that it is refused."""

    def run(source, timeout=100, **settings):  # no honest program waits for it, however busy
        if holes:
            with pytest.raises(UserError, match="allow_weak_sandbox"):
                sandbox.run_program(source, timeout, **settings)
            pytest.skip(f"refused here: {holes}")
        return sandbox.run_program(source, timeout, **settings)

    return run


def test_honest_programs(run):
    """Those that come to their end pass, whatever they print, import or leave behind in threads."""
    assert run("import dataclasses, json, decimal, sqlite3, hashlib\nassert 1") == "passed"
    assert run("from threading import Thread\nt = Thread(target=print)\nt.start(); t.join()") == (
        "passed"
    )
    source = "import typing\nclass A:\n    x: 'A'\nassert typing.get_type_hints(A)['x'] is A"
    assert run(source + "\nassert __name__ == '__main__' and 'é' == chr(233)") == "passed"
    assert run("assert 1 == 2, 'no\\nway'") == "failed: AssertionError: no way"
    assert run("x = nope") == "failed: NameError: name 'nope' is not defined"
    assert run("def f(:").startswith("failed: SyntaxError")
    assert run("x = '\ud800'") == "passed"  # what a model may write and no file can hold


def test_a_program_cannot_say_that_there_is_no_sandbox(run):
    """Which would end the evaluation, and advise the user to do without one."""
    verdict = run("raise type('no sandbox', (Exception,), {})('landlock')")
    assert verdict == "failed: no sandbox: landlock"


def test_verdict_is_not_forged(run):
    for source in (
        "print('passed'); raise ValueError",
        "import sys; print('passed'); sys.exit(0)",
        "import os; os._exit(0)",
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'passed')\n  except OSError: 0",
        "import os; os.closerange(0, 64)",
        "raise SystemExit",
        "import atexit, os; atexit.register(os._exit, 0); quit()",
    ):
        assert run(source).startswith("failed: "), source


def test_endless(run):
    for source in (
        "while True: pass",
        "import time; time.sleep(99)",
        "import os; os.closerange(0, 64)\nwhile True: pass",
        "import signal\nfor s in (2, 15, 24): signal.signal(s, print)\nwhile True: pass",
    ):
        assert run(source, timeout=0.5) == "timed out", source


def test_memory(run):
    assert run("x = []\nwhile True: x.append(bytes(1 << 20))", memory_mb=200) == (
        "failed: MemoryError:"
    )
    assert run("x = ['']\nwhile True: x.append(x * 9)", memory_mb=200) == "failed: MemoryError:"
    source = "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))"
    assert run(source, memory_mb=200).startswith("failed: OSError: [Errno 12]")


def test_floods(run):
    assert run("import os\nx = 'x' * (1 << 20)\nfor i in range(2000): print(x)") == "passed"
    flood = "import os\nfor fd in range(3, 9):\n  try:\n    while True: os.write(fd, b'x' * 4096)\n"
    verdict = run(flood + "  except OSError: 0", timeout=2)
    assert verdict.startswith(("failed: ", "timed out")) and len(verdict) < 1100


def test_no_processes(run):
    """None by any road: no fork bomb, no background process, no escape by setsid."""
    call = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{} >= 0"
    for source in (
        "import os\nwhile True: os.fork()",
        "import subprocess, sys; subprocess.Popen([sys.executable], start_new_session=True)",
        "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
        "import os; os.system('true') == 0 or 1 / 0",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; m.Process(target=print).start()",
        call.format("fork()"),
        call.format("vfork()"),
        call.format("syscall(435, bytes(64), 64)"),  # clone3
        call.format("unshare(0x10000000)"),
    ):
        assert run(source).startswith("failed: "), source


def test_no_reach(run, tmp_path):
    """Files, modes, sockets and processes outside are as they were."""
    file, victim = tmp_path / "file", subprocess.Popen(["sleep", "60"])
    file.write_text("mine")
    for place, mode in ((file, 0o666), (tmp_path, 0o777)):
        place.chmod(mode)
    server = socket.create_server(("127.0.0.1", 0))
    local = socket.socket(socket.AF_UNIX)
    local.bind(str(tmp_path / "socket"))
    local.listen()
    libc = "import ctypes; libc = ctypes.CDLL(None)\nassert libc."
    for source in (
        f"open({str(file)!r}).read()",
        f"open({str(file)!r}, 'w')",
        f"open({str(tmp_path)!r} + '/new', 'x')",
        f"import os; os.remove({str(file)!r})",
        f"import os; os.rename({str(file)!r}, {str(tmp_path)!r} + '/b')",
        f"import os; os.chmod({str(file)!r}, 0)",
        f"import os; os.utime({str(file)!r}, (1, 1))",
        f"import os; os.truncate({str(file)!r}, 0)",
        f"import os; os.symlink('/', {str(tmp_path)!r} + '/link')",
        f"import os; os.listdir({str(tmp_path)!r})",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "open('/dev/shm/barelm', 'x')",
        "open('mine', 'x')",
        f"import socket; socket.create_connection({server.getsockname()})",
        f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / 'socket')!r})",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        f"import os; os.kill({victim.pid}, 9)",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import os; os.killpg(0, 9)",
        f"import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {victim.pid})",
        f"import os; os.setpriority(os.PRIO_PROCESS, {victim.pid}, 19)",
        f"{libc}ptrace(16, {victim.pid}, 0, 0) == 0",
        f"{libc}syscall(434, {victim.pid}, 0) >= 0",  # pidfd_open
        f"{libc}shmget(0, 4096, 0o1600) >= 0",
        f"{libc}prctl(36, 1) == 0",  # PR_SET_CHILD_SUBREAPER
        f"{libc}prctl(4, 1) == 0",  # PR_SET_DUMPABLE
        f"{libc}prctl(1, 0) == 0",  # PR_SET_PDEATHSIG
        "import os; os.environ['HOME']",
        "import os; assert os.geteuid() == 0",
    ):
        assert run(source).startswith("failed: "), source
    assert victim.poll() is None and file.read_text() == "mine" and len([*tmp_path.iterdir()]) == 2
    assert file.stat().st_mode & 0o777 == 0o666 and file.stat().st_mtime > 2
    for listener in (server, local):
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()
    victim.kill()
    victim.wait()


def test_nothing_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run("while True: pass", timeout=0.3), run("1"), run("import ctypes; ctypes.string_at(0)")
    assert not [*tmp_path.iterdir()]


def test_leave_is_needed(holes):
    with pytest.raises(UserError, match="--allow_code_exec"):
        sandbox.require_sandbox(allowed=False, allow_weak=False)
    if not holes:
        sandbox.require_sandbox(allowed=True, allow_weak=False)


OUTLIVE = {  # what a program does before it loops, so as to go on when eval.py is gone
    "nothing": "",
    "the signal": "libc.prctl(1, 0, 0, 0, 0)",
    "the signal, by x32's number": "libc.syscall(0x40000000 + 157, 1, 0, 0, 0, 0)",
    "another session": "libc.setsid(), libc.setpgid(0, 0)",
    "another user": "libc.setfsuid(1), libc.setfsgid(1), libc.setresuid(1, 1, 1)",
    "no first thread": "threading.Thread(target=loop).start(), libc.syscall(EXIT, 0)",
}


def test_no_life_after_eval(run, tmp_path):
    """A program dies with the process that started it, whatever it tries before."""
    run("1")
    loop = "import ctypes, threading\nlibc = ctypes.CDLL(None)\ndef loop():\n    while True: pass\n"
    loop += f"EXIT = {93 if os.uname().machine == 'aarch64' else 60}\n"
    sources = [f"{loop}{attempt}\nloop()" for attempt in OUTLIVE.values()]
    script = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
from barelm import sandbox
with ThreadPoolExecutor({len(sources)}) as pool:
    list(pool.map(lambda source: sandbox.run_program(source, 60), {sources}))
"""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script, str(ROOT)], env=env)
    tasks = Path(f"/proc/{parent.pid}/task")

    def children():
        return [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]

    def busy(pid):  # one of its threads loops: all that comes before took less
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return max(int(stat.rpartition(")")[2].split()[11]) for stat in stats) > 20

    def lives(pid):
        tasks = Path(f"/proc/{pid}/task")
        try:
            return any(") Z " not in (task / "stat").read_text() for task in tasks.iterdir())
        except OSError:
            return False

    while len(children()) < len(sources) or not all(map(busy, children())):
        assert parent.poll() is None
        time.sleep(0.1)
    programs = children()
    parent.kill()
    parent.wait()
    for _ in range(600):  # long before the limit of their time would end them, which is no proof
        if not any(map(lives, programs)):
            return
        time.sleep(0.05)
    for pid in filter(lives, programs):
        os.kill(int(pid), 9)
    raise AssertionError(f"{programs} live on")


def test_no_life_where_eval_is_gone_before(run, tmp_path):
    """Killed before its child has asked for the signal: the child sees that it is an orphan."""
    run("1")
    (tmp_path / "program.py").write_text("while True: pass")
    command = [sys.executable, "-I", sandbox.CONFINE, "60", "1024", "weak", str(os.getpid() + 1)]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's rules are Linux's")
def test_weak_machine_is_refused(tmp_path):
    """A kernel without Landlock (its calls answered ENOSYS by a filter): said, and refused."""
    script = f"""
import ctypes, struct, sys
sys.path.insert(0, {str(ROOT)!r})
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, 0x50000 | 38), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
libc, long = ctypes.CDLL(None), ctypes.c_long
assert libc.prctl(38, long(1), long(0), long(0), long(0)) == 0
filter = struct.pack("@HP", 4, ctypes.addressof(code))
assert libc.prctl(22, long(2), filter, long(0), long(0)) == 0
from barelm import sandbox
print(*[sandbox.run_program(source, 100, weak=True) for source in ("1", "import os; os.fork()")])
try:
    sandbox.require_sandbox(allowed=True, allow_weak=False)
except SystemExit as error:
    print("refused:", error)
sandbox.run_program("1")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "syscall is refused here" in done.stderr, done.stderr
    assert "--allow_weak_sandbox" in done.stderr and "Traceback" not in done.stderr
    assert "sandbox: a program can read your files" in done.stdout and "refused:" in done.stdout
    assert "passed failed: PermissionError" in done.stdout  # what the kernel has still holds


def answer_of(filter_code, number, *args, architecture=0xC000003E):
    """What a seccomp filter answers to a system call: classic BPF, interpreted."""
    fields = {0: number, 4: architecture, 16: 0, 24: 0}
    fields |= {16 + 8 * i: value for i, value in enumerate(args)}
    word, at = None, 0
    while True:
        operation, if_so, if_not, operand = filter_code[at]
        if operation == confine.LOAD:
            word = fields[operand]
            at += 1
        elif operation == confine.RETURN:
            return operand
        else:
            compared = {
                confine.IF_EQUAL: word == operand,
                confine.IF_AT_LEAST: word >= operand,
                confine.IF_HAS_BIT: bool(word & operand),
            }
            at += 1 + (if_so if compared[operation] else if_not)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_answers_as_its_table_says(machine):
    """For every number that Linux has, on both machines, without the kernel."""
    code = confine.filter_program(machine)
    arm = machine == "aarch64"
    own = {"architecture": 0xC00000B7 if arm else 0xC000003E}
    clone, fcntl, prctl = (220, 25, 167) if arm else (56, 72, 157)
    denied = set(confine.denied_numbers(int(arm)))
    assert len(denied) > 60 and not denied & {0, 1, clone, fcntl, prctl}
    for number in range(424):
        if number not in (clone, fcntl, prctl):
            expected = confine.EPERM if number in denied else confine.ALLOW
            assert answer_of(code, number, **own) == expected, number
    for number in (424, 435, 0x40000000 + 157):  # clone3; prctl by x32's number
        assert answer_of(code, number, **own) == confine.ENOSYS
    assert answer_of(code, 1, architecture=0x40000003) == confine.EPERM  # 32-bit x86
    assert answer_of(code, clone, 0x3D0F00, **own) == confine.ALLOW  # as threads are made
    assert answer_of(code, clone, 17, **own) == confine.EPERM  # as fork does
    for request, expected in ((8, confine.EPERM), (15, confine.EPERM), (3, confine.ALLOW)):
        assert answer_of(code, fcntl, 0, request, **own) == expected
    for option, expected in ((15, confine.ALLOW), (16, confine.ALLOW), (1, confine.EPERM)):
        assert answer_of(code, prctl, option, **own) == expected
    with pytest.raises(OSError, match="no table of system calls for riscv64"):
        confine.filter_program("riscv64")
