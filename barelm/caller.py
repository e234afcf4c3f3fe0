"""The thread that owns a network, and does one after another what others ask of it."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch

from barelm.fast import generating
from barelm.metrics import Metrics
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from barelm.jobs import Job
    from barelm.mirror import Mirror
    from model import GPT


def no_gradients(net: GPT) -> AbstractContextManager:
    """The context in which a network generates: no tensor can learn. A DTensor, of which this
    process has a part, is not made in inference mode."""
    return torch.inference_mode() if net.ops.heads is None else torch.no_grad()


class Caller(threading.Thread):
    """A network that continues no text, such as an encoder: it is called, and no more. What else a
    server asks of its engine is empty here."""

    def __init__(self, net: GPT, mirror: Mirror | None = None) -> None:
        super().__init__(daemon=True)
        self.net = net
        self.mirror = mirror  # of several processes that compute together: barelm/mirror.py
        self.metrics = Metrics()
        self.max_batch = 0
        self.jobs = {}
        self.waiting = deque()
        self.calls = deque()  # (future, f, args); this and the next three under the lock of `wake`
        self.idle_calls = deque()  # the same, of `when_idle`
        self.stopped = False
        self.wake = threading.Condition()

    def call(self, f: Callable, *args: object) -> Future:
        """A Future of f(*args), called between two steps: for whoever else needs the network."""
        future = Future()
        with self.wake:
            self.calls.append((future, f, args))
            self.wake.notify()
        return future

    def when_idle(self, f: Callable, *args: Any) -> Future:
        """A Future of f(*args), called when no sequence is in the batch: those that wait, or come
        meanwhile, begin behind it. With several processes, f is called in this one alone."""
        future = Future()
        with self.wake:
            self.idle_calls.append((future, f, args))
            self.wake.notify()
        return future

    def forget(self) -> None:
        """The network has other weights: what was computed of the old ones is used no more."""

    def cancel(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more; there are none."""

    def stop(self) -> None:
        """End the thread after its step: Python may not end while torch computes."""
        with self.wake:
            self.stopped = True
            self.wake.notify()
        self.join()

    def run(self) -> None:
        with generating(self.net), no_gradients(self.net):
            while True:
                with self.wake:
                    while not (self.calls or self.idle_calls or self.stopped):
                        self.wake.wait()
                if self.stopped:
                    return
                if self.calls:
                    self.answer_call(*self.calls.popleft())
                else:
                    answer(*self.idle_calls.popleft())

    def answer_call(self, future: Future, f: Callable, args: tuple) -> None:
        if self.mirror is None:
            answer(future, f, args)
        else:
            answer(future, self.mirror, (f, *args))


def answer(future: Future, f: Callable, args: tuple) -> None:
    """Give a Future what f(*args) returns or raises."""
    if not future.set_running_or_notify_cancel():  # it was given up meanwhile
        return
    try:
        future.set_result(f(*args))
    except (Exception, UserError) as error:
        future.set_exception(error)
