"""An optimizer's state in the host's memory: what comes to the device is a part of it at a time
(Ren et al. 2021, ZeRO-Offload; there the step itself is the host's, here it is the device's).

    memory = HostMemory()
    m = memory.keep(momentum)             # its values, in the host's memory
    [copy] = memory.fetch([m], device)    # on the device
    copy.lerp_(grad, 0.1)
    memory.put_back([m], [copy])
    memory.wait()                         # m is whole again

On a CPU the two memories are one: it computes the same, and saves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

PART = 1 << 24  # numbers of a parameter's kind that are on the device at once: 64 MiB in float32


def parts_of(params: list[nn.Parameter], size: Callable) -> list[list[nn.Parameter]]:
    """Parameters in lists of at most PART numbers together, or of one that is larger; size(p): how
    many numbers are held of p."""
    parts = []
    room = 0
    for p in params:
        if not parts or size(p) > room:
            parts.append([])
            room = PART
        parts[-1].append(p)
        room -= size(p)
    return parts


class HostMemory:
    """State in the host's memory, pinned, so that a GPU copies by itself. What is fetched stands in
    one of two buffers in turn: while one is computed with, what was in the other goes back."""

    def __init__(self) -> None:
        self.buffers = [None, None]  # flat, of the dtype of the state
        self.free = [None, None]  # events: what stood in a buffer is back in the host's memory
        self.turn = 0
        self.back = None  # the stream of what goes back; None on a CPU

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor's values in this memory."""
        pinned = torch.cuda.is_available()
        pinned_copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return pinned_copy.copy_(tensor)

    def fetch(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Copies on the device of tensors of one dtype, which `put_back` has to take back before
        the next but one are fetched."""
        if self.back is None and device.type == "cuda":
            self.back = torch.cuda.Stream(device)
        self.turn = 1 - self.turn
        sizes = [tensor.numel() for tensor in tensors]
        buffer = self.buffers[self.turn]
        if buffer is None or buffer.numel() < sum(sizes):
            buffer = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=device)
            self.buffers[self.turn] = buffer
        elif self.back is not None:
            torch.cuda.current_stream(device).wait_event(self.free[self.turn])
        copies = []
        for tensor, flat in zip(tensors, buffer[: sum(sizes)].split(sizes)):
            copies.append(flat.view(tensor.shape).copy_(tensor, non_blocking=True))
        return copies

    def put_back(self, tensors: Sequence[Tensor], copies: list[Tensor]) -> None:
        """Write copies over the tensors that they were fetched of."""
        if self.back is None:
            torch._foreach_copy_(tensors, copies)
            return
        self.back.wait_stream(torch.cuda.current_stream(self.back.device))
        with torch.cuda.stream(self.back):
            for tensor, copy in zip(tensors, copies):
                copy.record_stream(self.back)
                tensor.copy_(copy, non_blocking=True)
            self.free[self.turn] = self.back.record_event()

    def wait(self) -> None:
        """Go on when all is back: the host may read its memory then."""
        if self.back is not None:
            self.back.synchronize()


def load_to_host(optimizer: torch.optim.Optimizer, saved: dict, memory: HostMemory) -> None:
    """`optimizer.load_state_dict(saved)`, without its state coming by the device."""
    torch.optim.Optimizer.load_state_dict(optimizer, saved | {"state": {}})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entry in saved["state"].items():
        p = params[number]
        for name, value in entry.items():
            if name == "step":  # a number, beside its parameter
                optimizer.state[p][name] = value.to(p.device)
            else:
                optimizer.state[p][name] = memory.keep(value)
