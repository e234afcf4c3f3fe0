"""Other machines' facts, put in the place of this one's: how many threads follow from a quota and
an affinity, what a Mac's GPU refuses, what Windows and macOS lack. docs/platforms.md says what of
it was tried on no such machine."""

import ast
import errno
import io
import multiprocessing
import os
import re
import select
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import fake_mps
import pytest
import torch
from conftest import FORK, ROOT, join, run, start_forked
from test_train import SMALL, log, words  # noqa: F401 (a fixture)

from barelm import host, threads
from barelm.devices import choose_device, wide_dtype
from barelm.errors import UserError
from barelm.resume import locked_folder, make_folder
from barelm.run import Run
from barelm.sandbox import check_sandbox
from config import print_everything

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# Cores: the quota of control groups, and the affinity


def make_groups(folder, cgroup, mounts, files):
    """/proc/self of a process in these control groups: a folder. mounts: lines of mountinfo, where
    {root} is the folder; files: {path in the folder: text}."""
    (folder / "proc").mkdir()
    (folder / "proc/cgroup").write_text(cgroup)
    (folder / "proc/mountinfo").write_text(mounts.replace("{root}", str(folder)))
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "proc"


V2 = "31 23 0:28 / {root}/two rw - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "40 23 0:29 / {root}/mem rw - cgroup cgroup rw,memory\n"
    "41 23 0:30 /docker/7f {root}/cpu\\040and rw - cgroup cgroup rw,cpu,cpuacct\n"
)


@pytest.mark.parametrize(
    "cgroup, mounts, files, quota",
    [
        ("0::/\n", V2, {}, None),  # no file: the root of all
        ("0::/\n", V2, {"two/cpu.max": "max 100000\n"}, None),
        ("0::/\n", V2, {"two/cpu.max": "150000 100000\n"}, 1.5),  # a container's own root
        # nested: a slice has less than its service
        ("0::/a/b\n", V2, {"two/a/cpu.max": "50000 50000", "two/a/b/cpu.max": "3 1"}, 1.0),
        ("0::/a/b\n", V2, {"two/a/cpu.max": "max 50000", "two/a/b/cpu.max": "3 1"}, 3.0),
        # version 1 in a container, whose path is the host's
        (
            "4:memory:/docker/7f\n3:cpu,cpuacct:/docker/7f\n",
            V1,
            {"cpu and/cpu.cfs_quota_us": "120000", "cpu and/cpu.cfs_period_us": "100000"},
            1.2,
        ),
        (
            "3:cpu,cpuacct:/docker/7f/x\n",
            V1,
            {"cpu and/x/cpu.cfs_quota_us": "-1", "cpu and/x/cpu.cfs_period_us": "100000"},
            None,
        ),
        # a process of another group than the container's, as the host puts one there
        ("0::/../../elsewhere\n", V2, {"two/cpu.max": "2 1"}, 2.0),
    ],
)
def test_a_quota_is_the_least_of_all_groups(cgroup, mounts, files, quota, tmp_path):
    assert host.cpu_quota(make_groups(tmp_path, cgroup, mounts, files)) == quota


def test_a_machine_that_tells_nothing_has_no_quota(tmp_path):
    assert host.cpu_quota(tmp_path / "none") is None
    assert host.seconds_waited(tmp_path / "none") is None


@pytest.mark.skipif(sys.platform != "linux", reason="its /proc")
def test_waiting_for_a_core_is_counted():
    waited = host.seconds_waited()
    assert waited is None or waited >= 0


@pytest.mark.parametrize(
    "asked, usual, cores, quota, variables, n, words_of_reason",
    [
        (0, 2, 2, None, {}, 2, "2 cores"),  # as torch does
        (0, 4, 8, None, {}, 4, "8 cores"),  # two to a core: torch's own choice stays
        (0, 2, 2, 2.0, {}, 2, "2 cores"),
        (0, 2, 2, 1.5, {}, 2, "2 cores"),  # measured: 1.2 times as fast as one
        (0, 2, 2, 1.2, {}, 1, "a quota of 1.2 of 2 cores"),  # 0.86 times
        (0, 32, 64, 0.5, {}, 1, "a quota of 0.5 of 64 cores"),
        (0, 64, 64, 4.0, {"LOCAL_WORLD_SIZE": "2"}, 2, "a quota of 4 of 64 cores for 2 processes"),
        (0, 8, 8, None, {"LOCAL_WORLD_SIZE": "3"}, 2, "8 cores for 3 processes"),
        (0, 3, 8, 1.0, {"OMP_NUM_THREADS": "3"}, 3, "OMP_NUM_THREADS"),
        (0, 1, 8, None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 1, "--threads=4"),
        (3, 8, 8, None, {"OMP_NUM_THREADS": "1"}, 3, "as asked"),
        (3, 1, 2, None, {}, 3, "they will wait for each other"),
    ],
)
def test_threads_follow_from_the_cores(asked, usual, cores, quota, variables, n, words_of_reason):
    chosen, reason = threads.plan_threads(asked, usual, cores, quota, variables)
    assert chosen == n and words_of_reason in reason


def test_workers_share_the_cores_of_a_machine(monkeypatch):
    monkeypatch.setattr(host, "usable_cores", lambda: 5)
    assert threads.worker_count() == 5 and threads.worker_count(9) == 9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads.worker_count() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert threads.worker_count() == 1


def test_a_number_of_threads_below_0_is_refused():
    with pytest.raises(UserError, match="--threads=-1: expected 1 or more, or 0"):
        threads.set_threads(-1)


def test_steps_that_wait_for_their_threads_are_told_once(monkeypatch):
    """Others take one of two cores: of each second the two threads wait for one, together."""
    now = [100.0]
    monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(host, "cpu_quota", lambda: None)
    monkeypatch.setattr(host, "seconds_waited", lambda: now[0] if now[0] > 110 else 0.0)
    said = []
    monkeypatch.setattr(Run, "say", lambda self, text: said.append(text))
    watch = threads.ThreadWatch(Run(CPU))
    watch.waited = 0.0
    for now[0] in (101.0, 106.0, 112.0, 118.0, 124.0):
        watch.after_step()
        if now[0] == 106.0:
            assert not said
    assert len(said) == 1 and "--threads=1 may be faster" in said[0]


def test_what_a_quota_takes_is_no_loss(monkeypatch):
    monkeypatch.setattr(host, "cpu_quota", lambda: 1.5)
    assert threads.cores_lost(2, 0.0, 5.0, 10.0) == 0.0  # half a core, which nobody has to give
    assert threads.cores_lost(2, 0.0, 12.0, 10.0) == pytest.approx(0.7)


def test_the_advice_leaves_the_cores_that_others_take():
    assert threads.advice(2, 0.1) == ""
    assert "--threads=1 " in threads.advice(2, 0.9)
    assert "--threads=6 " in threads.advice(8, 1.6)
    assert "for 60% of the time" in threads.advice(1, 0.6) and "--threads" not in threads.advice(
        1, 1
    )


def test_train_says_its_threads(words):  # noqa: F811
    done = run(words, "train.py", *SMALL, "--max_steps=1", "--threads=1", "--out_dir=out/one")
    assert "threads: 1 (as asked)" in done.stdout


# --------------------------------------------------------------------------------------------------
# A Mac's GPU


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    assert choose_device("auto", world=2).type == "cpu"  # which exchange
    assert choose_device("auto", can_mps=False).type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU


def test_mps_is_refused_where_it_does_nothing(monkeypatch):
    with pytest.raises(UserError, match="--device=mps: this torch, or this machine, has none"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="for one process: torch exchanges nothing there"):
        choose_device("mps", world=2)
    with pytest.raises(UserError, match="this script does not run there"):
        choose_device("mps", can_mps=False)
    with pytest.raises(UserError, match="expected auto, cpu, mps, cuda or cuda:1"):
        choose_device("tpu")


def test_the_fake_device_refuses_what_mps_refuses():
    with fake_mps.FakeMPS():
        x = torch.ones(2, device="mps")
        refused = [
            lambda: x.double(),
            lambda: x.sum(dtype=torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: x + torch.ones(2),
            lambda: x.numpy(),
            lambda: x.pin_memory(),
        ]
        for call in refused:
            with pytest.raises((TypeError, RuntimeError)):
                call()
        assert (x + 1).tolist() == [2, 2] and x.device.type == "mps"
    assert wide_dtype(torch.device("mps")) == torch.float32
    assert wide_dtype(CPU) == wide_dtype(torch.device("cuda")) == torch.float64


def on_mps(folder, script, *args):
    """What a script says on a fake mps."""
    return forked(folder, fake_mps.install, script, *args)


@pytest.mark.skipif(not FORK, reason="the fake device is for one process alone")
def test_train_and_sample_on_mps(words):  # noqa: F811
    """No float64, nothing of CUDA, no tensor of the host beside one of the device: and the same
    curve as the CPU's, which is what computes here."""
    small = [flag for flag in SMALL if not flag.startswith("--device")]
    small += ["--max_steps=2", "--eval_every=2", "--pos=alibi", "--n_layer=1"]
    small += ["--batch_tokens=128", "--eval_tokens=256"]
    said = on_mps(words, "train.py", *small, "--out_dir=out/mps")
    assert "device: mps, computing in float32: on MPS" in said and "compile: off" in said
    run(words, "train.py", *small, "--out_dir=out/cpu", "--device=cpu", "--dtype=float32")
    for key in ("loss", "grad_norm", "val_loss"):
        ours = [value for _, value in log(words, "out/mps", key)]
        theirs = [value for _, value in log(words, "out/cpu", key)]
        assert ours and ours == pytest.approx(theirs, rel=1e-3)
    on_mps(words, "train.py", *small, "--out_dir=out/mps", "--init_from=resume", "--max_steps=3")
    options = ["--model=out/mps", "--prompt=the", "--max_new_tokens=4", "--temperature=0"]
    options += ["--repetition_penalty=1.2"]
    said = on_mps(words, "sample.py", *options)
    assert said == run(words, "sample.py", *options, "--device=cpu").stdout


# --------------------------------------------------------------------------------------------------
# Windows and macOS


@pytest.fixture
def windows(monkeypatch):
    """What Python on Windows says of itself, as far as ours asks."""
    monkeypatch.setattr(sys, "platform", "win32")
    for module in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, module, None)  # which no import finds
    monkeypatch.delattr(os, "killpg")
    monkeypatch.setattr(host.os, "system", lambda command: 0)


def test_no_text_file_is_opened_without_its_encoding():
    """Windows would take cp1252. Every call of open, read_text, write_text and of a process's text
    in ours, but for those that are of bytes, or of a file without text."""
    harmless = {
        'open(os.devnull, "w")',
        "open(folder / '.lock', 'a')",
        'open(folder / ".lock", "a")',
    }
    faults = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("barelm/*.py"), *ROOT.glob("config/*.py")]:
        source = path.read_text(encoding="utf-8")
        if not re.search(r"\bopen\(|read_text\(|write_text\(|text=|universal_newlines", source):
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or lacks_no_encoding(node):
                continue
            text = ast.get_source_segment(source, node)
            if text not in harmless and "/proc/self/clear_refs" not in text:
                faults.append(f"{path.name}:{node.lineno}: {text[:80]}")
    assert not faults


def lacks_no_encoding(call):
    """Whether a call opens no text, or says in which encoding."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or None in keywords:  # **options
        return True
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    if name in ("Popen", "run", "check_output", "check_call", "call"):  # a process
        return "text" not in keywords and "universal_newlines" not in keywords
    if name in ("read_text", "write_text"):  # a function of ours has the first name too
        return isinstance(call.func, ast.Name)
    if name != "open" or not isinstance(call.func, ast.Name):  # os.open, gzip.open: bytes
        return True
    for node in ast.walk(call.args[1]) if len(call.args) > 1 else ():
        if isinstance(node, ast.Constant) and "b" in str(node.value):
            return True
    return False


def test_a_lock_of_windows_is_of_one_byte(windows, monkeypatch, tmp_path):
    held = []

    def locking(number, mode, n_bytes):
        if held:
            raise OSError(errno.EACCES, "Permission denied")
        held.append(os.lseek(number, 0, os.SEEK_CUR))

    fake = SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    with locked_folder(tmp_path / "run"):
        assert held == [1 << 30]  # behind all that the file holds
        with pytest.raises(UserError, match="another run is writing into it"):
            with locked_folder(tmp_path / "run", patience=0):
                pass
    monkeypatch.setitem(sys.modules, "msvcrt", None)


def test_a_system_without_locks_is_told(windows, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with locked_folder(tmp_path / "run"):
        assert "no lock (this system has none)" in capsys.readouterr().out


def test_a_rename_waits_for_whoever_reads(windows, monkeypatch, tmp_path):
    """Windows renames nothing onto a file that is open; a moment later it is closed."""
    (tmp_path / "new").write_bytes(b"new")
    usual = os.replace
    tries = []

    def replace(source, target):
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "Access is denied")
        usual(source, target)

    monkeypatch.setattr(host.os, "replace", replace)
    host.replace(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new" and len(tries) == 3
    monkeypatch.setattr(host, "PATIENCE", 0)
    tries.clear()
    with pytest.raises(PermissionError):
        host.replace(tmp_path / "old", tmp_path / "other")
    monkeypatch.setattr(sys, "platform", "linux")  # where nobody has to wait
    tries.clear()
    with pytest.raises(PermissionError):
        host.replace(tmp_path / "old", tmp_path / "other")
    assert len(tries) == 1


@pytest.mark.parametrize(
    "name, fault",
    [
        ("out/a:b", "no file name with :"),
        ("out/nul.txt", "keeps the name nul.txt"),
        ("out/COM1", "keeps the name COM1"),
        ("out/run.", "ends with no '.'"),
        ("out/../run", ""),
        ("out/console", ""),
    ],
)
def test_names_that_windows_has_not(name, fault, monkeypatch, tmp_path):
    assert host.why_no_name(name) == ""  # here they are names
    monkeypatch.setattr(sys, "platform", "win32")
    assert fault in host.why_no_name(name) and bool(fault) == bool(host.why_no_name(name))
    if fault:
        with pytest.raises(UserError, match="--out_dir=out/.*: take another"):
            make_folder(name)


def test_a_console_that_lacks_a_sign_ends_nothing(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    print_everything()
    print("naïve \u2713", flush=True)
    assert written.getvalue() == b"na\xefve \\u2713\n"
    unicode = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", unicode)
    print_everything()
    assert unicode.errors == "strict"  # as it was


def test_programs_of_a_model_are_not_run_on_windows(windows):
    with pytest.raises(UserError, match="not run here: Windows .*WSL 2"):
        check_sandbox()


def test_a_process_and_its_children_end_on_windows(windows, monkeypatch):
    """By Windows's own program, and where that is not, itself at least."""
    asked = []
    monkeypatch.setattr(host.subprocess, "run", lambda command, **_: asked.append(command))
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host.end_group(process)
    assert asked == [["taskkill", "/T", "/F", "/PID", str(process.pid)]]
    assert process.returncode == -signal.SIGKILL
    process.stdin.close()


def test_memory_of_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert host.free_memory() == 4 * 2**30  # where it does not say it

    def status(pointer):
        pointer._obj.free = 7 * 2**30
        return 1

    kernel = SimpleNamespace(GlobalMemoryStatusEx=status)
    monkeypatch.setattr(host.ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert host.free_memory() == 7 * 2**30
    monkeypatch.setitem(sys.modules, "resource", None)
    assert host.memory_used() == 0


def test_the_memory_of_a_mac_is_in_bytes(monkeypatch):
    linux = host.memory_used()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert linux == pytest.approx(1024 * host.memory_used(), rel=0.1)


def as_on_windows():
    """Take from this process what Python on Windows lacks."""
    for module in ("fcntl", "resource", "grp", "pwd", "termios"):
        sys.modules[module] = None
    names = "fork killpg register_at_fork sched_getaffinity geteuid getuid sysconf getloadavg"
    for name in (*names.split(), "statvfs", "uname", "mkfifo", "setsid"):
        delattr(os, name)
    names = "SIGKILL SIGALRM SIGPROF SIGHUP setitimer pthread_sigmask alarm"
    for name in names.split():
        delattr(signal, name)
    del select.poll, socket.SO_REUSEPORT
    sys.platform = "win32"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252")


def forked(folder, before, script, *args):
    """What a script says in a fork of this process, in which `before` was called."""
    forks, out, err = start_forked(folder, script, args, before=before)
    join(forks[0], out, err)
    out.seek(0), err.seek(0)
    said = out.read()
    assert forks[0].exitcode == 0, said + err.read()
    return said


def spawn():
    multiprocessing.set_start_method("spawn", force=True)


def bytes_of(folder):
    """{name: bytes} of a data set's files, but for what names the command that made it."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


@pytest.mark.skipif(not FORK, reason="starts as a fork, whose own processes are spawned")
def test_prepare_gives_the_same_bytes_by_spawned_processes(words):  # noqa: F811
    """As on macOS and Windows, where a working process begins with nothing of its parent's."""
    text = (words / "words.txt").read_text(encoding="utf-8").splitlines()
    (words / "texts").mkdir()
    for i in range(6):
        (words / f"texts/{i}.txt").write_text("\n".join(text[i::6]), encoding="utf-8")
    options = ["--source=texts", "--vocab_size=300", "--val_fraction=0.2", "--min_chars=1"]
    forked(words, spawn, "prepare.py", *options, "--threads=2", "--dataset=spawned")
    run(words, "prepare.py", *options, "--threads=1", "--dataset=usual")
    spawned = bytes_of(words / "data/spawned")
    assert spawned and spawned == bytes_of(words / "data/usual")


@pytest.mark.skipif(not FORK, reason="what is taken from a process stays taken")
def test_a_run_with_what_windows_has(words):  # noqa: F811
    """Prepare, train and sample without what Python on Windows lacks: the same bytes."""
    prepare = ["--source=words.txt", "--dataset=won", "--tokenizer=byte", "--threads=1"]
    forked(words, as_on_windows, "prepare.py", *prepare)
    assert bytes_of(words / "data/won") == bytes_of(words / "data/words")
    small = [*SMALL, "--max_steps=2"]
    said = forked(words, as_on_windows, "train.py", *small, "--out_dir=out/won")
    assert "no lock (this system has none)" in said
    run(words, "train.py", *small, "--out_dir=out/here")
    weights = "out/{}/model.safetensors".format
    assert (words / weights("won")).read_bytes() == (words / weights("here")).read_bytes()
    options = ["--model=out/won", "--max_new_tokens=4", "--prompt=the \u2713"]
    assert "\\u2713" in forked(words, as_on_windows, "sample.py", *options)
