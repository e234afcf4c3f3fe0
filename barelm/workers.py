"""Processes to work in, that may be killed at any moment. Each has a pipe of its own, of which
this process sees the end at once, be it in the middle of an answer. (concurrent.futures has one
queue for all: it waits for ever for the rest of an answer that a killed process began to write,
and before Python 3.12 for those that it forgot to end while it told of the killed one.)"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import traceback
from contextlib import suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from barelm.run import UserError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    import numpy as np

    from barelm.clean import Tally


class WorkerKilled(Exception):
    """A working process has ended in its work."""


class Workers:
    """Up to so many processes, started when there is work for them; they end with the block."""

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self.processes = []
        self.idle = []  # this end of the pipe of each that has nothing to do
        self.busy = {}  # {that of one at work: the number of its item}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()  # not terminate: a process that has just started may miss that
        for process in self.processes:
            process.join()

    def map(
        self, function: Callable, items: list | range
    ) -> Iterator[Counter | dict[str, tuple[dict[str, int], Tally]] | np.ndarray]:
        """As Python's map, of items that are computed at the same time: the results in their order.
        Raises what a call raises, in its turn, and WorkerKilled. One map at a time, to its end."""
        items = list(items)
        while len(self.processes) < min(self.n_workers, len(items)):
            self.start_one()
        answers = {}  # those that wait for their turn
        n_sent = 0
        for number in range(len(items)):
            while number not in answers:
                while self.idle and n_sent < len(items):
                    pipe = self.idle.pop()
                    send(pipe, (function, items[n_sent]))
                    self.busy[pipe] = n_sent
                    n_sent += 1
                for pipe in wait(self.busy):
                    answers[self.busy.pop(pipe)] = receive(pipe)
                    self.idle.append(pipe)
            error, trace, result = pickle.loads(answers.pop(number))
            if error is not None:
                raise error from RuntimeError(f"in a working process\n{trace}")
            yield result

    def start_one(self) -> None:
        try:
            here, there = multiprocessing.Pipe()
            # A daemon, which Python ends where even __exit__ was interrupted.
            process = multiprocessing.Process(target=work, args=(there,), daemon=True)
            process.start()
        except OSError as error:  # too many processes or open files
            why = error.strerror or error
            raise UserError(f"no processes to work in ({why}): --threads=1 needs none") from None
        there.close()  # or its end would not be seen
        self.processes.append(process)
        self.idle.append(here)


def send(pipe: Connection, call: tuple) -> None:
    try:
        pipe.send(call)
    except OSError:
        raise WorkerKilled from None


def receive(pipe: Any) -> bytes:
    """The bytes of an answer."""
    try:
        return pipe.recv_bytes()
    except (EOFError, OSError):  # nothing, or half an answer
        raise WorkerKilled from None


def work(pipe: Connection) -> None:
    """Answer calls until the process that asks has ended. Ctrl-C is that one's, which then ends
    this one: were this one to go first, it would be taken for killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_the_parent()
    with suppress(EOFError, OSError):
        while True:
            call = pipe.recv_bytes()
            pipe.send_bytes(answer_to(call))


def answer_to(call: bytes) -> bytes:
    """The answer to a call, both pickled: what it raised, its traceback, its result."""
    try:
        function, item = pickle.loads(call)
        return pickle.dumps((None, "", function(item)))
    except BaseException as error:  # UserError is no Exception
        trace = traceback.format_exc()
        try:
            return pickle.dumps((error, trace, None))
        except Exception:  # an exception that cannot be pickled
            return pickle.dumps((RuntimeError(repr(error)), trace, None))


def end_with_the_parent() -> None:
    """This process ends with the one that started it, however that ends."""
    pr_set_pdeathsig = 1
    with suppress(Exception):  # Linux alone
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():  # it ended before that
        os._exit(1)
