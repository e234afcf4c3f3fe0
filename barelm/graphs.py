"""CUDA graphs by key, and a fall-back where a capture fails."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MOST = 256  # graphs that are kept: each takes a little of the device's memory


class Graphs:
    """CUDA graphs of functions without arguments, by key, in one pool of memory: no two of them
    run at a time. Where a capture fails, functions are called from then on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs = {}  # {key: (graph, what the function returned)}, the last used at the end
        self.pool = None
        self.stream = None  # one for all: a library keeps a workspace for each
        self.failed = False

    def run(self, key: tuple, function: Callable, at_rest: Callable) -> Any:
        """function() or its graph's replay; what it returns is overwritten by the next one."""
        if key not in self.graphs and not self.failed:
            try:
                if len(self.graphs) >= MOST:
                    self.drop([next(iter(self.graphs))])
                with at_rest():
                    self.graphs[key] = self.capture(function)
            except Exception as error:
                cause = error.__context__ or error  # not that a broken capture could not be ended
                print(
                    f"decoding: no CUDA graphs ({one_line(cause)}), but a launch a kernel",
                    file=sys.stderr,
                )
                self.failed = True
                self.graphs.clear()
        if self.failed:
            return function()
        graph, returned = self.graphs.pop(key)
        self.graphs[key] = (graph, returned)  # at the end
        graph.replay()
        return returned

    def capture(self, function: Callable) -> tuple:
        """(a graph of function(), what it returned)."""
        try:
            with torch.cuda.device(self.device):  # a thread of its own begins on the first one
                return self.capture_there(function)
        except Exception:
            self.end_failed_capture()
            raise

    def capture_there(self, function: Callable) -> tuple:
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        stream = self.stream
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their kernels and make their workspaces
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, for what is none of this graph's.
        options = dict(pool=self.pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(current):  # a capture that fails leaves its own stream behind
            with torch.cuda.graph(graph, **options):
                returned = function()
        return graph, returned

    def end_failed_capture(self) -> None:
        """What torch leaves undone where a capture cannot be ended: its allocator would go on as if
        there were one, and torch 2.11's generator refuse to draw."""
        torch.cuda.synchronize(self.device)
        with contextlib.suppress(RuntimeError):  # then it was ended, or none was begun
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())  # the same, within no capture

    def forget(self, kind: str) -> None:
        """Drop the graphs whose key begins so."""
        self.drop([key for key in self.graphs if key[0] == kind])

    def drop(self, keys: Iterable) -> None:
        if not keys:
            return
        torch.cuda.synchronize(self.device)  # one of them may be running
        for key in keys:
            del self.graphs[key]
        if not self.graphs:
            self.pool = None  # torch gives up a pool that has no graph


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]
