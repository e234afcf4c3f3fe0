"""AdamW that steps a part of the parameters after another: torch's own function, with state in the
host's memory, or with gradients of another dtype than the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.adamw import adamw

from barelm.offload import HostMemory, load_to_host, parts_of
from barelm.parts import gradient_part, local_part

if TYPE_CHECKING:
    from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWInParts(torch.optim.AdamW):
    """torch.optim.AdamW, bit for bit, for parameters and gradients of any dtype, divided ones too:
    what stands on the device beside the parameters and their gradients is a part's gradients in
    float32, and with `offload` its two moments. Then the moments live in the host's memory; of a
    divided parameter they are this process's part, a plain tensor."""

    def __init__(
        self, groups: list, lr: float, betas: tuple[float, float], offload: bool = False
    ) -> None:
        super().__init__(groups, lr, betas, fused=True)
        self.memory = HostMemory() if offload else None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for part in parts_of(params, lambda p: local_part(p).numel()):
                self.step_of_part(part, group)
        if self.memory is not None:
            self.memory.wait()

    def step_of_part(self, params: list[nn.Parameter], group: dict) -> None:
        """A step of some parameters of a group."""
        entries = [self.entry_of(p) for p in params]
        moments = [local_part(entry[name]) for name in MOMENTS for entry in entries]
        used = moments
        if self.memory is not None:
            used = self.memory.fetch(moments, params[0].device)
        weights = [local_part(p) for p in params]
        grads = [gradient_part(p) for p in params]
        steps = [entry["step"] for entry in entries]
        beta1, beta2 = group["betas"]
        n = len(params)
        adamw(
            weights, grads, used[:n], used[n:], [], steps, fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
        if self.memory is not None:
            self.memory.put_back(moments, used)

    def entry_of(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter; before its first step, zeros."""
        entry = self.state[p]
        if not entry:
            entry["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in MOMENTS:
                entry[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        is_elsewhere = entry["exp_avg"].device.type != "cpu"  # new, or behind a resume
        if self.memory is not None and is_elsewhere:
            for name in MOMENTS:
                entry[name] = self.memory.keep(local_part(entry[name]))
        return entry

    def load_state_dict(self, state_dict: dict) -> None:
        if self.memory is None:
            super().load_state_dict(state_dict)
        else:
            load_to_host(self, state_dict, self.memory)
