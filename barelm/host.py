"""This machine: the cores and the memory that a process may take, and what Linux, macOS and Windows
each do in a way of their own (docs/platforms.md). Nothing but the standard library is imported.

Every question is asked anew of `sys.platform`, so that a test can put another system's facts here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import IO


def is_linux() -> bool:
    return sys.platform == "linux"


def is_windows() -> bool:
    return sys.platform == "win32"


# --------------------------------------------------------------------------------------------------
# Cores


def allowed_cores() -> int:
    """How many cores the system lets this process run on: those of its affinity, where a system has
    such a thing; else all."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """`allowed_cores`, or fewer where a container's quota is less: at least 1."""
    quota = cpu_quota()
    cores = allowed_cores()
    return cores if quota is None else min(cores, whole_cores(quota))


def whole_cores(quota: float) -> int:
    """The number of threads for a quota of cores, to the nearest: 2 for 1.5, 1 for 1.2. Measured on
    two cores: 2 threads were 1.2 times as fast as one under a quota of 1.5, and 0.86 times under
    1.2, since whoever waits for the other spends the quota too."""
    return max(1, int(quota + 0.5))


def cpu_quota(proc: str = "/proc/self") -> float | None:
    """How many cores' time the control groups of this process allow it, a container's say: the
    least of all levels, such as 1.5; None where nothing limits it, or no Linux says so."""
    try:
        groups = Path(proc, "cgroup").read_text(encoding="utf-8", errors="replace")
        mounts = Path(proc, "mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    quotas = []
    for folder, top in cpu_groups(groups, mounts):
        while True:
            quota = quota_of(folder)
            if quota is not None:
                quotas.append(quota)
            if folder == top or folder == folder.parent:
                break
            folder = folder.parent  # a group has no more than the one that it is in
    return min(quotas, default=None)


def cpu_groups(groups: str, mounts: str) -> list[tuple[Path, Path]]:
    """[(this process's folder of a hierarchy that limits cores, the folder where that is mounted)]:
    of /proc/self/cgroup and /proc/self/mountinfo (cgroups(7), proc_pid_mountinfo(5))."""
    own_path = {}  # {"": version 2's, "cpu": version 1's}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            own_path["cpu" if controllers else ""] = path
    folders = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        shown, place = map(unescape_mount, before.split(" ")[3:5])
        version = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if version is None or version not in own_path:
            continue
        if version == "cpu" and "cpu" not in options.split(","):
            continue
        # A container sees the part of the hierarchy below its own group, at the mount itself.
        below = os.path.relpath(own_path[version], shown)
        top = Path(place)
        folders.append((top if below.startswith("..") else top / below, top))
    return folders


def unescape_mount(text: str) -> str:
    """A path of mountinfo, where spaces are \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def quota_of(folder: Path) -> float | None:
    """The cores' time that one control group allows: version 2's cpu.max, or version 1's."""
    with suppress(OSError, ValueError):  # the root has none; "max" is no number
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        if quota > 0:  # -1: none
            return quota / period
    return None


def seconds_waited(proc: str = "/proc/self") -> float | None:
    """Seconds that this process's threads have stood ready to run, and had no core: others had it,
    or the quota was spent. The sum over all threads; None where the system does not say."""
    total = 0
    try:
        for thread in os.listdir(f"{proc}/task"):
            with suppress(FileNotFoundError):  # a thread that has just ended
                words = Path(proc, "task", thread, "schedstat").read_bytes().split()
                total += int(words[1])
    except (OSError, ValueError, IndexError):  # no Linux, or one without these figures
        return None
    return total / 1e9


# --------------------------------------------------------------------------------------------------
# Memory


def memory_used() -> int:
    """The most memory that this process has had resident, in bytes; 0 on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def free_memory() -> int:
    """Bytes that a process may still take here; on macOS all that the machine has."""
    if is_windows():
        return windows_memory()
    try:  # what the kernel could free counts too
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"MemAvailable: +(\d+)", text)[1])
    except OSError:  # not Linux: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows's sysinfoapi.h."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("percent_used", ctypes.c_uint32),
        ("physical", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    ]


def windows_memory() -> int:
    """Bytes that are free, or of a small machine where Windows does not say it."""
    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    with suppress(AttributeError, OSError):
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return status.free
    return 4 * 2**30


# --------------------------------------------------------------------------------------------------
# Files

PATIENCE = 2.0  # seconds that a file which another program holds is waited for, on Windows


def replace(source: str | Path, target: str | Path) -> None:
    """os.replace. Windows refuses it while any program has the target open, as one that searches
    for viruses has each new file for a moment."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if not is_windows() or time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def lock(file: IO, exclusive: bool = True) -> bool:
    """Lock an open file for this process as long as it is open: whether no other has it. An OSError
    where there are no locks; Windows has no shared ones, so that there each one is exclusive."""
    try:
        import fcntl
    except ImportError:  # Windows
        return lock_byte(file)
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:  # lockf, unlike flock, is not passed on to a process that this one leaves behind
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def lock_byte(file: IO) -> bool:
    """`lock` on Windows: of a byte far behind the file's end, so that others may read the file."""
    try:
        import msvcrt
    except ImportError:
        raise OSError(errno.ENOTSUP, "this system has none") from None
    file.seek(1 << 30)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


# Names that are no files on Windows, whatever their ending, and signs that no name has there.
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
FORBIDDEN = '<>:"|?*'


def why_no_name(path: Path | str) -> str:
    """Why Windows can have no file of this path; "" where it can, and on other systems."""
    if not is_windows():
        return ""
    _, below = os.path.splitdrive(str(path))
    for name in re.split(r"[\\/]", below):
        forbidden = [sign for sign in name if sign in FORBIDDEN]
        if forbidden:
            return f"Windows has no file name with {forbidden[0]}"
        if RESERVED.fullmatch(name):
            return f"Windows keeps the name {name} for itself"
        if name not in (".", "..") and name.endswith((".", " ")):
            return f"a file name on Windows ends with no {name[-1]!r}"
    return ""


# --------------------------------------------------------------------------------------------------
# Processes and signals

# The exit status of what ended itself by the first of these that the system has.
KILLED = -signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM


def end_group(process: subprocess.Popen) -> None:
    """End a process that was started with start_new_session=True, and all that it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # none is left
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:  # Windows: a process and its children, by its own program
        command = ["taskkill", "/T", "/F", "/PID", str(process.pid)]
        with suppress(OSError):
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process.kill()
    process.wait()


def signal_name(status: int) -> str:
    """The signal of an exit status below 0, in words."""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


# --------------------------------------------------------------------------------------------------
# Output


def print_everything() -> None:
    """Let nothing that is printed end the script: a sign that the console's or a pipe's encoding
    lacks (cp1252 on Windows) is written as \\u2026."""
    if is_windows():
        os.system("")  # which lets an old console obey the codes that rewrite a line
    for stream in (sys.stdout, sys.stderr):
        if stream is None or is_unicode(getattr(stream, "encoding", None)):
            continue
        with suppress(AttributeError, ValueError, OSError):  # a stream of another kind
            stream.reconfigure(errors="backslashreplace")


def is_unicode(encoding: str | None) -> bool:
    """Whether an encoding has every sign."""
    return str(encoding).lower().replace("_", "-").startswith("utf")
