"""Who of a run's processes is still there: the others end within seconds of one that is gone.

Every process has a connection to the first one, and a thread that reads it. A process that is
killed closes it; a machine that is cut off no longer answers the system's keep-alive probes, which
need no Python: however busy a process is, its system answers for it. The first process tells all
others. Whoever hears of a loss and is still there a moment later, as in a GPU's exchange that will
never end, is ended by its thread, so that torchrun starts all anew (docs/cluster.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from barelm.run import Run

# Seconds in which a process may end by itself, with its own words, once another is gone.
GRACE = 3.0
# A machine is lost after so many seconds without an answer, where no timeout says it.
PATIENCE = 15.0
# The longest line that is read.
LONGEST = 4096


def start_watch(run: Run, timeout: float = 8 * PATIENCE) -> None:
    """Watch the other processes from here on: `run.watch`. An eighth of `timeout` seconds without
    an answer from its machine, and a process is lost. Called by all processes together."""
    if run.world == 1:
        return
    port, token = 0, 0
    listener = None
    if run.is_main:
        listener = open_listener()
        port = listener.getsockname()[1]
        token = secrets.randbits(48)  # float64, in which the numbers travel, holds it
    port, token = map(int, run.sum(port, token))
    watch = Watch(run, token, timeout / 8)
    if run.is_main:
        joined = watch.listen(listener)
    else:
        joined = watch.join(os.environ["MASTER_ADDR"], port)
    if run.least(joined) == 0:
        watch.end()
        run.say(
            "note: some processes do not reach the first one's port, so that one which is lost is "
            "noticed by the exchanges alone: open the ports between the machines"
        )
        return
    run.watch = watch
    WATCHES.append(watch)


def open_listener() -> socket.socket:
    """A socket at which this machine can be reached, by IPv4 and IPv6 where there is both."""
    backlog = 4096
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a system that has it turned off
            family = socket.AF_INET6
            return socket.create_server(
                ("", 0), family=family, backlog=backlog, dualstack_ipv6=True
            )
    return socket.create_server(("", 0), backlog=backlog)


def keep_alive(connection: socket.socket, patience: float) -> None:
    """Let the system ask the other one's system whether it is there, and give the connection up
    after `patience` seconds without an answer."""
    idle = max(1, round(patience / 3))
    every = max(1, round(patience / 6))
    options = {"TCP_KEEPIDLE": idle, "TCP_KEEPINTVL": every, "TCP_KEEPCNT": 4}
    options["TCP_USER_TIMEOUT"] = round(1000 * patience)  # of what was sent, in ms
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Watch:
    """A process's view of the others. Lines travel: `hello`, `done` and `failed` to the first
    process; `welcome`, `go`, `lost` and `done` from it."""

    def __init__(self, run: Run, token: int, patience: float) -> None:
        self.run = run
        self.listener = None  # the first process's
        self.token = token  # that a stranger who finds the port does not know
        self.patience = patience
        self.names = {run.rank: name_of_process(run)}  # {rank: machine and device}; all on rank 0
        self.connections = {}  # {rank: socket}
        self.buffers = {}  # {socket: what was read of a line that is not whole yet}
        self.selector = selectors.DefaultSelector()
        self.lock = threading.Lock()  # of what two threads send
        self.left = set()  # ranks that ended in order
        self.lost = ""  # who is gone, in words
        self.heard = threading.Event()  # that someone is
        self.has_ended = False
        self.gone_on = threading.Condition()
        self.n_gone_on = 0  # how often the first process has gone on, as it told
        self.n_waits = 0
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
            os.register_at_fork(after_in_child=self.forget)

    # ----------------------------------------------------------------------------------------------
    # Joining

    def listen(self, listener: socket.socket) -> bool:
        """On the first process: take the others' connections. Whether all came in time."""
        listener.setblocking(False)
        self.listener = listener
        self.selector.register(listener, selectors.EVENT_READ)
        self.start()
        give_up = time.monotonic() + 2 * self.patience
        while len(self.connections) < self.run.world - 1 and time.monotonic() < give_up:
            time.sleep(0.005)
        return len(self.connections) == self.run.world - 1

    def join(self, address: str, port: int) -> bool:
        """On another process: connect to the first one, at most for the patience. Whether it
        worked."""
        try:
            connection = socket.create_connection((address, port), timeout=self.patience)
        except OSError:
            return False
        connection.settimeout(None)
        self.add(0, connection)
        self.names[0] = address
        self.send(
            0, {"hello": self.run.rank, "token": self.token, "name": self.names[self.run.rank]}
        )
        self.start()
        return True

    def add(self, rank: int, connection: socket.socket) -> None:
        keep_alive(connection, self.patience)
        self.connections[rank] = connection
        self.buffers.setdefault(connection, b"")
        if connection not in self.selector.get_map():
            self.selector.register(connection, selectors.EVENT_READ)

    def start(self) -> None:
        threading.Thread(target=self.read_all, name="watch", daemon=True).start()

    # ----------------------------------------------------------------------------------------------
    # Reading: the thread

    def read_all(self) -> None:
        """Read what the others say until the end."""
        try:
            while not self.has_ended:
                for key, _ in self.selector.select(timeout=1.0):
                    if key.fileobj is self.listener:
                        self.accept()
                    else:
                        self.read(key.fileobj)  # type: ignore[arg-type]
        except Exception as error:  # nobody may wait for a thread that is no more
            self.give_up(f"the watch over the others ended by {error!r}")

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self.listener.accept()
            connection.setblocking(True)
            self.buffers[connection] = b""
            self.selector.register(connection, selectors.EVENT_READ)

    def read(self, connection: socket.socket) -> None:
        """What a connection has: whole lines, or its end."""
        try:
            data = connection.recv(LONGEST)
            why = ""
        except OSError as error:  # reset, or the keep-alive's time is over
            data = b""
            why = f" ({error.strerror})"
        *lines, rest = (self.buffers[connection] + data).split(b"\n")
        self.buffers[connection] = rest
        for line in lines:
            self.take(connection, line)
        if not data or len(rest) > LONGEST:
            self.close(connection, why)

    def take(self, connection: socket.socket, line: bytes) -> None:
        """Do what a line asks. One that is none of ours closes the connection."""
        rank = self.rank_of(connection)
        try:
            [(word, value), *more] = json.loads(line).items()
        except (ValueError, AttributeError, RecursionError):
            return self.close(connection, "")
        if rank is None:  # on the first process: someone new
            more = dict(more)
            if word != "hello" or more.get("token") != self.token:
                return self.close(connection, "")
            self.names[value] = more["name"]
            self.add(value, connection)
            self.send(value, {"welcome": self.names[0]})
        elif word == "welcome":
            self.names[0] = value
        elif word == "done":
            self.left.add(rank)
        elif word == "failed":
            self.lose(rank, f"failed: {value}")
        elif word == "lost":
            self.give_up(value)
        elif word == "go":
            with self.gone_on:
                self.n_gone_on = value
                self.gone_on.notify_all()

    def rank_of(self, connection: socket.socket) -> int | None:
        for rank, other in self.connections.items():
            if other is connection:
                return rank
        return None

    def close(self, connection: socket.socket, why: str) -> None:
        """A connection has ended: whose, and was it time?"""
        if connection not in self.selector.get_map():  # it is closed already
            return
        rank = self.rank_of(connection)
        self.selector.unregister(connection)
        connection.close()
        if rank is None or rank in self.left:
            return
        self.lose(rank, f"is gone{why}")

    # ----------------------------------------------------------------------------------------------
    # A loss

    def lose(self, rank: int, what: str) -> None:
        """Tell everyone that a process is lost, and give up."""
        if self.lost or self.has_ended:
            return
        words = f"process {rank} ({self.names.get(rank, 'of unknown name')}) {what}"
        if self.run.is_main:
            for other in self.connections:
                if other != rank:
                    self.send(other, {"lost": words})
        self.give_up(words)

    def give_up(self, words: str) -> None:
        """End this process, unless it ends by itself in a moment."""
        if self.lost or self.has_ended:
            return
        self.lost = words
        self.heard.set()
        with self.gone_on:
            self.gone_on.notify_all()
        threading.Thread(target=self.end_soon, name="watch-end", daemon=True).start()

    def end_soon(self) -> None:
        time.sleep(GRACE)
        if self.has_ended:  # it has said so; what it may still wait for, such as the others' parts
            time.sleep(GRACE)  # of a checkpoint that is written beside the training, never comes
        elif int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one voice a machine
            print(gone(self.run.rank, self.lost), file=sys.stderr, flush=True)
        os._exit(1)

    # ----------------------------------------------------------------------------------------------
    # What the main thread calls

    def send(self, rank: int, words: dict) -> None:
        """Send a line; to one that is no longer there, nothing."""
        with self.lock, contextlib.suppress(OSError):
            self.connections[rank].sendall(json.dumps(words).encode() + b"\n")

    def tell(self, words: dict[str, int]) -> None:
        """Tell the first process, or of the first process all others."""
        for rank in list(self.connections):
            self.send(rank, words)

    def wait_for_main(self) -> None:
        """The others wait here for what the first process does alone, however long it takes: no
        exchange's timeout runs meanwhile. If it is gone, that is a UserError."""
        self.n_waits += 1
        if self.run.is_main:
            return self.tell({"go": self.n_waits})
        with self.gone_on:
            while self.n_gone_on < self.n_waits and not self.lost:
                self.gone_on.wait()
        if self.lost:
            raise UserError(gone(self.run.rank, self.lost))

    def end(self, failure: str = "") -> None:
        """Leave in order, or with the words of a failure, for which all others end too."""
        if self.has_ended:
            return
        self.has_ended = True
        if not failure or self.lost:  # the others know of the loss by now
            self.tell({"done": 1})
        elif self.run.is_main:
            name = self.names[self.run.rank]
            self.tell({"lost": f"process {self.run.rank} ({name}) failed: {failure}"})
        else:
            self.tell({"failed": failure})

    def forget(self) -> None:
        """In a fork: the connections are the parent's alone, and end with it."""
        self.has_ended = True
        sockets = list(self.connections.values())
        if self.listener:
            sockets.append(self.listener)
        for each in sockets:
            with contextlib.suppress(OSError):
                each.close()


WATCHES = []  # this process's watch, once it has one


def name_of_process(run: Run) -> str:
    """Where a process is, in words: its machine, and its GPU or number there."""
    where = f"GPU {run.device.index}" if run.device.type == "cuda" else f"pid {os.getpid()}"
    return f"{socket.gethostname()}, {where}"


def gone(rank: int | str, what: str) -> str:
    """The last line of a process that cannot go on alone."""
    return f"process {rank}: {what}, so that none can go on; what was saved is kept"


# --------------------------------------------------------------------------------------------------
# The end of a script

# What gloo, and then NCCL, say when another process has ended.
LOST_PROCESS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "remote worker",
    "remote process exited",
    "Timed out waiting",
)


@contextlib.contextmanager
def lost_process() -> Iterator[None]:
    """Around a script's main(): the others hear how it ended; and a line stands in the place of
    torch.distributed's traceback where another process is gone."""
    try:
        yield
    except SystemExit as error:  # a UserError too
        leave("" if error.code in (None, 0) else first_line(error))
        raise
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_PROCESS):
            leave(first_line(error))
            raise
        who = who_is_lost(error)
        leave(who)
        raise UserError(gone(os.environ.get("RANK", "0"), who)) from None
    except BaseException as error:
        leave(first_line(error))
        raise
    leave()


def leave(failure: str = "") -> None:
    """End this process's watch, if it has one."""
    for watch in WATCHES:
        watch.end(failure)


def who_is_lost(error: BaseException) -> str:
    """Why an exchange failed: who is gone, if this process hears of it within a moment."""
    for watch in WATCHES:
        watch.heard.wait(GRACE / 2)
        if watch.lost:
            return watch.lost
    if "Timed out" in str(error):
        return "another process did not come to an exchange in time (--timeout)"
    return "another process of this run is gone: its own last lines, or the system's log, say why"


def first_line(error: BaseException) -> str:
    """An exception in a line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
