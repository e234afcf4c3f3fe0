"""CUDA graphs by key, and a fall-back where a capture fails."""

import sys

import torch


class Graphs:
    """CUDA graphs of functions without arguments, by key, in one pool of memory: no two of them
    run at a time. Where a capture fails, functions are called from then on."""

    def __init__(self, device):
        self.device = device
        self.graphs = {}  # {key: (graph, what the function returned)}
        self.pool = None
        self.stream = None  # one for all: a library keeps a workspace for each
        self.failed = False

    def run(self, key, function, at_rest):
        """function() or its graph's replay; what it returns is overwritten by the next one."""
        if key not in self.graphs and not self.failed:
            try:
                with at_rest():
                    self.graphs[key] = self.capture(function)
            except Exception as error:
                print(
                    f"decoding: no CUDA graphs ({one_line(error)}), but a launch a kernel",
                    file=sys.stderr,
                )
                self.failed = True
                self.graphs.clear()
        if self.failed:
            return function()
        graph, returned = self.graphs[key]
        graph.replay()
        return returned

    def capture(self, function):
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(self.device)
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their kernels and make their workspaces
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, for what is none of this graph's.
        how = dict(pool=self.pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.graph(graph, **how):
            returned = function()
        return graph, returned

    def forget(self, kind):
        """Drop the graphs whose key begins so."""
        for key in [key for key in self.graphs if key[0] == kind]:
            del self.graphs[key]


def one_line(error):
    """The first line of what an error says."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]
