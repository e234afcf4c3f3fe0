"""The rules that a model-written program runs under, and the program run under them.

    python -I confine.py SECONDS MEMORY_MB strict|weak PARENT_PID

barelm/sandbox.py starts this file as a process of its own, in a folder that holds program.py alone;
its docstring says against whom. Nothing but the standard library is imported here, so that all that
a program can reach in its process is on this page. Each step gives up a right for good:

| step | what the kernel is asked for | what the program can no longer do |
| --- | --- | --- |
| limit | setrlimit(2), POSIX | take more memory, time or open files; write; dump core |
| forbid_new_privileges | prctl(2), Linux 3.5 | gain rights by starting a program |
| hide_files | landlock(7), Linux 5.13 | read anything but Python's library; write |
| leave_root | setresuid(2) | act as root, in a container too |
| drop_capabilities | capabilities(7), Linux 2.6.26 | use what root had beyond its name |
| die_with_parent | prctl(2), Linux 2.1.57 | outlive the process that started it |
| filter_system_calls | seccomp(2), Linux 3.17 | fork, open sockets, signal, trace, ... (DENIED) |

All of them work for an unprivileged user and in a container. The order: limits need no right, and
hold for the steps too. No new privileges comes before Landlock and seccomp, which an unprivileged
process gets only with it. Files are hidden before root is left: a folder that only root may enter,
where Python is installed in one, can still be opened then. The parent's death is watched after root
is left, since the kernel forgets that signal when the user changes. System calls are filtered last:
the filter refuses what the steps themselves need.

strict: where the machine lacks one of these, the program is not run, and a line says which. weak:
it is run under those that the machine has; without seccomp, with no right to a further process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Numbers from Linux's headers: linux/prctl.h, linux/landlock.h, linux/capability.h.
PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_GET_NAME = 16
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SIGKILL = 9
# Landlock's three system calls have these numbers on every machine.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_CREATE_RULESET_VERSION = 1  # the flag that asks for the version
LANDLOCK_RULE_PATH_BENEATH = 1
# How many rights to files each version of Landlock can withhold; versions from 5 on: 16.
LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_READ_SEARCH = 1 << 2

# System calls that a program may not make: each name with its number on x86_64 and on aarch64 (-:
# it has none there).
DENIED = {
    "other processes and programs": """
        fork 57 -, vfork 58 -, execve 59 221, execveat 322 281""",
    "sockets": """
        socket 41 198, socketpair 53 199""",
    "signals, tracing and priorities of others": """
        kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138,
        rt_tgsigqueueinfo 297 240, ptrace 101 117, process_vm_readv 310 270,
        process_vm_writev 311 271, prlimit64 302 261, setpriority 141 140, sched_setparam 142 118,
        sched_setscheduler 144 119, ioprio_set 251 30, sched_setaffinity 203 122,
        sched_setattr 314 274""",
    "what Landlock does not bind: modes, owners, times and attributes of files, shared memory": """
        chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -,
        fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,
        setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15,
        fremovexattr 199 16, truncate 76 45, flock 73 32, shmget 29 194, shmat 30 196,
        shmctl 31 195, semget 64 190, semctl 66 191, msgget 68 186, msgctl 71 187, mq_open 240 180,
        mq_unlink 241 181""",
    "wide doors into the kernel": """
        unshare 272 97, add_key 248 217, request_key 249 218, keyctl 250 219,
        perf_event_open 298 241, open_by_handle_at 304 265, bpf 321 280, userfaultfd 323 282""",
    # With another user the kernel forgets the signal that this process gets when its parent dies.
    "sessions and users": """
        setsid 112 157, setpgid 109 154, setuid 105 146, setgid 106 144, setreuid 113 145,
        setregid 114 143, setresuid 117 147, setresgid 119 149, setfsuid 122 151, setfsgid 123 152,
        setgroups 116 159, capset 126 91""",
}


# --------------------------------------------------------------------------------------------------
# The steps, in the order in which they are taken


def confine(seconds: float, memory_mb: int, strict: bool, parent: int) -> None:
    """Give up this process's rights for good, in the order that the docstring explains.

    seconds of wall clock that the parent waits; memory_mb: MiB of address space; parent: its
    process's number. strict: an OSError or ValueError at the first step that the machine refuses;
    else such a step is left out."""
    attempt(strict, limit, "AS", memory_mb << 20)
    attempt(strict, limit, "CPU", 2 * seconds)  # twice: the parent's clock is the one that counts
    attempt(strict, limit, "FSIZE", 0)
    attempt(strict, limit, "NOFILE", 64)
    attempt(strict, limit, "CORE", 0)
    attempt(strict, forbid_new_privileges)
    attempt(strict, hide_files)
    if os.geteuid() == 0:
        attempt(strict, leave_root)
    attempt(strict, drop_capabilities)
    attempt(strict, die_with_parent, parent)
    if not attempt(strict, filter_system_calls):
        attempt(strict, limit, "NPROC", 0)  # no process more for this user, at least


def attempt(strict: bool, step: Callable, *args: Any) -> bool:
    """Whether the machine grants a step; strict: what it says when it does not is raised."""
    try:
        step(*args)
    except (OSError, ValueError):
        if strict:
            raise
        return False
    return True


def call(name: str, *args: Any) -> int:
    """The result of a function of the C library; an OSError where it is below 0."""
    if sys.platform != "linux":
        raise OSError(f"{name}: only Linux has it")
    libc = ctypes.CDLL(None, use_errno=True)
    # prctl and syscall are variadic: what is passed as a 32-bit int has undefined upper halves.
    words = [ctypes.c_long(arg) if type(arg) is int else arg for arg in args]
    result = getattr(libc, name)(*words)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name} is refused here")
    return result


def limit(name: str, value: int) -> None:
    """Set a resource's limit for good: the hard one, which none but root may raise again."""
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def forbid_new_privileges() -> None:
    """Programs with the set-user-ID bit give nothing more. Landlock and seccomp ask for this, so
    that nobody confines a program that has more rights than himself."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def hide_files() -> None:
    """Landlock: of all files, Python's library and program.py may be read, /dev/null written too;
    nothing can be made, changed or removed. Paths can still be told to exist or not."""
    version = call("syscall", LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    every_right = (1 << LANDLOCK_RIGHTS.get(version, 16)) - 1
    # A right that is named here is withheld everywhere, but where a rule grants it.
    rules = call("syscall", LANDLOCK_CREATE_RULESET, struct.pack("<Q", every_right), 8, 0)
    grant(rules, os.devnull, WRITE_FILE | READ_FILE)
    grant(rules, ".", READ_FILE | READ_DIR)
    # Shared libraries are in /lib ("") and /usr, Python's own modules below its prefixes.
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix, "", "/usr", "/usr/local"}:
        grant(rules, f"{prefix}/lib", READ_FILE | READ_DIR)
        grant(rules, f"{prefix}/lib64", READ_FILE | READ_DIR)
    call("syscall", LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def grant(rules: int, path: str, rights: int) -> None:
    """Add to a Landlock ruleset the rights to a path and to all below it, if it is there."""
    if not os.path.exists(path):
        return
    place = os.open(path, os.O_PATH)
    rule = struct.pack("<Qi", rights, place)
    call("syscall", LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    os.close(place)


def leave_root() -> None:
    """Become a user that nothing belongs to, with no groups. Capabilities are kept until
    drop_capabilities, which leaves at most one."""
    user = 61184 + os.getpid() % 4096  # among those that systemd.exec(5) keeps free
    call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def drop_capabilities() -> None:
    """No right of root stays. But where only root can read Python's library, the right to read
    does (CAP_DAC_READ_SEARCH), within what Landlock allows."""
    remaining = 0
    if not os.access(os.__file__, os.R_OK):
        remaining = CAP_DAC_READ_SEARCH
    header = struct.pack("<Ii", CAPABILITY_VERSION_3, 0)  # 0: of this process
    # Effective, permitted and inheritable ones: the lower 32 of each, then the upper.
    call("capset", header, struct.pack("<6I", remaining, remaining, 0, 0, 0, 0))


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the thread that started it ends, however that ends."""
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the signal was asked for
        os._exit(1)


# --------------------------------------------------------------------------------------------------
# The last step: seccomp's filter, a program in classic BPF that the kernel runs at each system call

# An instruction is (operation, lines to skip if so, lines to skip if not so, operand).
LOAD = 0x20  # a word of struct seccomp_data, at the offset that is the operand
IF_EQUAL = 0x15  # is the word that was loaded last the operand
IF_AT_LEAST = 0x35
IF_HAS_BIT = 0x45
RETURN = 0x06
# Offsets in struct seccomp_data; of an argument, its lower half, which both machines put first.
NUMBER = 0
ARCHITECTURE = 4
ARGUMENT_0 = 16
ARGUMENT_1 = 24
ALLOW = 0x7FFF0000
EPERM = 0x50000 | 1  # refused, with this errno
ENOSYS = 0x50000 | 38
F_SETOWN = 8
F_SETOWN_EX = 15
CLONE_THREAD = 0x10000
ARCHITECTURES = ("x86_64", "aarch64")  # whose numbers are below, and in DENIED, in this order
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
CLONE = (56, 220)
FCNTL = (72, 25)
PRCTL = (157, 167)
SECCOMP_MODE_FILTER = 2


def filter_system_calls() -> None:
    """seccomp: the calls of DENIED fail with EPERM, those from 424 on with ENOSYS."""
    code = b"".join(struct.pack("<HBBI", *line) for line in filter_program(os.uname().machine))
    lines = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(lines))  # struct sock_fprog
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def filter_program(machine: str) -> list:
    """The instructions of the filter, for x86_64 or aarch64; an OSError for other machines."""
    if machine not in ARCHITECTURES:
        raise OSError(f"no table of system calls for {machine}")
    column = ARCHITECTURES.index(machine)
    # Calls of another architecture (32-bit ones) have other numbers: none is allowed.
    code = [(LOAD, 0, 0, ARCHITECTURE)]
    code += [(IF_EQUAL, 1, 0, AUDIT_ARCH[column]), (RETURN, 0, 0, EPERM)]
    code += [(LOAD, 0, 0, NUMBER)]
    # From 424 on (io_uring, pidfd, clone3, what is to come, and x32's) calls do not exist: the C
    # library then uses their elders, and makes a thread by clone, whose flags are here to see.
    code += [(IF_AT_LEAST, 0, 1, 424), (RETURN, 0, 0, ENOSYS)]
    for number in denied_numbers(column):
        code += answer_if(number, EPERM)
    # fcntl may not name the process that a pipe signals.
    owners = answer_if(F_SETOWN, EPERM) + answer_if(F_SETOWN_EX, EPERM)
    code += block_if(FCNTL[column], [(LOAD, 0, 0, ARGUMENT_1), *owners, (RETURN, 0, 0, ALLOW)])
    # prctl may set and read a thread's name; with PR_SET_PDEATHSIG it would undo die_with_parent.
    names = answer_if(PR_SET_NAME, ALLOW) + answer_if(PR_GET_NAME, ALLOW)
    code += block_if(PRCTL[column], [(LOAD, 0, 0, ARGUMENT_0), *names, (RETURN, 0, 0, EPERM)])
    # clone may make a thread, and no process.
    thread = [(IF_HAS_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW)]
    code += block_if(CLONE[column], [(LOAD, 0, 0, ARGUMENT_0), *thread, (RETURN, 0, 0, EPERM)])
    return [*code, (RETURN, 0, 0, ALLOW)]


def denied_numbers(column: int) -> list[int]:
    """The numbers of the denied system calls on a machine, by its place in ARCHITECTURES."""
    numbers = []
    for entry in ",".join(DENIED.values()).split(","):
        number = entry.split()[1 + column]
        if number != "-":
            numbers.append(int(number))
    return numbers


def answer_if(value: int, answer: int) -> list:
    """Instructions that end the filter with `answer` if the word that was loaded is `value`."""
    return [(IF_EQUAL, 0, 1, value), (RETURN, 0, 0, answer)]


def block_if(number: int, block: list) -> list:
    """Instructions that run the block, which always ends the filter, for this system call: a block
    loads another word, so that what follows it could not look at the number any more."""
    return [(IF_EQUAL, 0, len(block), number), *block]


# --------------------------------------------------------------------------------------------------
# The program


def run(seconds: float, memory_mb: int, strict: bool, parent: int) -> None:
    """Run program.py of this folder under the rules, and write to standard output how it ended: the
    token that waits in standard input if it came to its end, else the error. The token enters this
    process only then, so that a program cannot find it in memory before."""
    # Copies of both pipes under other numbers; the program's own three streams lead nowhere.
    token_pipe = os.dup(0)
    report_pipe = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    try:
        confine(seconds, memory_mb, strict, parent)
    except (OSError, ValueError) as error:
        os.write(report_pipe, f"no sandbox: {error}".encode())
        os._exit(1)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main  # where typing and pickle look its classes up
    sys.argv = ["program.py"]
    spare = bytearray(1 << 20)  # for the last words of a program that has filled the memory
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), main.__dict__)
        ending = os.read(token_pipe, 100)
    except BaseException as error:  # SystemExit too: it did not come to its end
        del spare
        ending = f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:300]
    os.write(report_pipe, ending)
    os._exit(0)  # without what it registered for its exit, and whatever its threads do


if __name__ == "__main__":
    seconds, memory_mb, strictness, parent = sys.argv[1:]
    run(int(seconds), int(memory_mb), strictness == "strict", int(parent))
