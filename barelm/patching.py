"""Activation patching: what a network has of one text is put into its pass over another, and the
answer shows where the difference between the two is made (Meng et al. 2022, "causal tracing", with
noise in the place of the second text; Wang et al. 2023, between two prompts).

    patching = Patching(net, clean_ids, corrupted_ids, position=4)
    patching.compare(answer=9, other=12)
    patching.restored("residual", layer=2)  # of each position, 0 to 1

Of an encoder-decoder it is the encoder that is patched, which reads the texts.

T tokens, C: n_embd, H: heads, V: vocabulary, L: blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from barelm.lens import check_finite, exact, plainly, run, run_encoder, states
from barelm.run import UserError
from model import Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.nn as nn
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from barelm.lens import Trace
    from model import GPT

KINDS = ("residual", "attention", "mlp", "heads")  # what can be patched


class Patching:
    """Two texts of as many tokens, of which one is patched into the other: clean, corrupted are
    their ids. position: where the logits are read. start: of an encoder-decoder the decoder's ids,
    while clean and corrupted are sources.

    answer, other: two tokens; the clean text should speak for the first. The figure is the
    difference of their logits, log p(answer) - log p(other): `clean_difference`,
    `corrupted_difference`."""

    def __init__(
        self,
        net: GPT,
        clean: list[int],
        corrupted: list[int],
        position: int,
        start: list[int] | None = None,
    ) -> None:
        check_pair(clean, corrupted)
        self.net = net
        self.position = position
        self.start = start
        look = run if start is None else run_encoder
        self.clean = look(net, clean)
        self.corrupted = look(net, corrupted)
        with plainly(net):
            ends = [states(trace)[-1] for trace in (self.clean, self.corrupted)]
            self.logits = self.read(torch.stack(ends))  # (2, V), of the two
        check_finite(self.logits)

    def read(self, x: Tensor) -> Tensor:
        """The logits (n, V) float32 of states x (n, T, C) behind the last block."""
        if self.start is None:
            return self.net.logits(self.net.model.norm(x[:, self.position])).float()
        memory = Memory(self.net.model.encoder.norm(x))
        ids = torch.tensor([self.start], device=x.device).expand(len(x), -1)
        return self.net.logits(self.net.hidden(ids, memory=memory)[:, self.position]).float()

    def likeliest(self, n_vocab: int) -> tuple[int, int]:
        """Two tokens to compare: what the clean text goes on with, and what the corrupted one does,
        or its second choice where that is the same token."""
        choices = self.logits[:, :n_vocab].topk(2).indices.tolist()  # of both texts
        answer = choices[0][0]
        other = choices[1][0]
        return answer, choices[1][1] if other == answer else other

    def compare(self, answer: int, other: int) -> None:
        """Choose the two tokens."""
        self.answer = answer
        self.other = other
        differences = exact(self.logits[:, answer] - self.logits[:, other])
        self.clean_difference, self.corrupted_difference = differences.tolist()
        if abs(self.clean_difference - self.corrupted_difference) < 1e-4:
            raise UserError(
                "both prompts give these two answers the same difference of logits, so there is "
                "nothing to restore: choose other answers or prompts"
            )

    def restored(self, kind: str, layer: int) -> list[float]:
        """Of each patch of `patch_layer`: how much of the way from the corrupted to the clean
        difference it goes, a list: 0 as if nothing were patched, 1 as in the clean text. Those of
        positions before the first difference, at which a patch changes nothing, are 0."""
        logits = patch_layer(self.net, self.clean, self.corrupted, kind, layer, self.read)
        check_finite(logits)
        difference = exact(logits[:, self.answer] - logits[:, self.other])
        way = self.clean_difference - self.corrupted_difference
        shares = ((difference - self.corrupted_difference) / way).tolist()
        if kind == "heads":
            return shares
        return [0.0] * (len(self.clean.ids) - len(shares)) + shares


def check_pair(clean: list[int], corrupted: list[int]) -> None:
    """Refuse two lists of ids that cannot be patched into one another."""
    if len(clean) != len(corrupted):
        raise UserError(
            f"the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}: states "
            "are swapped place by place, so word them so that both have as many"
        )
    if clean == corrupted:
        raise UserError("the two prompts are the same: change what the answer hangs on in one")


# --------------------------------------------------------------------------------------------------
# One patched pass


def first_difference(clean: list[int], corrupted: list[int]) -> int:
    """The first place in which two lists of ids differ; their length where none does."""
    for i, (one, other) in enumerate(zip(clean, corrupted)):
        if one != other:
            return i
    return len(corrupted)


def patch_layer(
    net: GPT, clean: Trace, corrupted: Trace, kind: str, layer: int, read: Callable
) -> Tensor:
    """The logits (n, V) float32 of n passes over the corrupted text, in each of which one thing is
    as in the clean one. read(x): the logits (n, V) of states x (n, T, C) behind the last block.

    residual   the state at one position that block `layer` reads (L: behind the last): n = T
    attention  what the block's attention gives at one position: n = T
    mlp        the same of its MLP
    heads      what one head gives at all positions: n = H

    clean, corrupted: Traces of the same length. What is before the first token in which a causal
    network's texts differ is the same in both: n then counts from there."""
    T = len(corrupted.ids)
    begin = first_difference(clean.ids, corrupted.ids) if is_causal(corrupted) else 0
    places = list(range(begin, T))
    is_last = layer == len(corrupted.blocks)
    block = None if is_last else corrupted.blocks[layer]
    with plainly(net):
        if kind == "residual":
            x = states(corrupted)[layer].repeat(len(places), 1, 1)  # (n, T, C)
            x = with_clean(x, states(clean)[layer], places)
            return read(through_blocks(corrupted, layer, x))
        n = block.self_attn.c.n_head if kind == "heads" else len(places)
        x = corrupted.inputs[block].repeat(n, 1, 1)
        if kind == "heads":
            hook = patch_heads(block.self_attn.o_proj, clean, n)
        else:
            module = block.mlp if kind == "mlp" else block.self_attn
            hook = patch_output(module, clean, places)
        try:
            x = through_blocks(corrupted, layer, x, 1)
        finally:
            hook.remove()
        return read(through_blocks(corrupted, layer + 1, x))


def is_causal(trace: Trace) -> bool:
    return trace.blocks[0].pattern.causal


def with_clean(x: Tensor, clean: Tensor, places: Tensor) -> Tensor:
    """x (n, T, C) in whose row i the state at places[i] is that of clean (T, C)."""
    x = x.clone()
    rows = torch.arange(len(places), device=x.device)
    x[rows, places] = clean[places].to(x.dtype)
    return x


def patch_output(module: nn.Module, clean: Trace, places: Tensor) -> RemovableHandle:
    """A hook that puts what the module gave in the clean pass into row i at places[i]."""

    def patch(module, args, output):
        if isinstance(output, tuple):  # of experts
            return with_clean(output[0], clean.outputs[module], places), *output[1:]
        return with_clean(output, clean.outputs[module], places)

    return module.register_forward_hook(patch)


def patch_heads(o_proj: nn.Module, clean: Tensor, n_head: int) -> RemovableHandle:
    """A hook that puts what head i gave in the clean pass into row i."""
    rows = torch.arange(n_head)

    def patch(module, args):
        y = args[0].unflatten(2, (n_head, -1)).clone()  # (n, T, H, D)
        given = clean.inputs[module].unflatten(1, (n_head, -1))  # (T, H, D)
        y[rows, :, rows] = given.transpose(0, 1)
        return (y.flatten(2),)

    return o_proj.register_forward_pre_hook(patch)


def through_blocks(trace: Trace, first: int, x: Tensor, n: int | None = None) -> Tensor:
    """x (B, T, C) through n blocks of a Trace from number `first` on (None: all that there are),
    with the rotations and masks of its pass."""
    end = len(trace.blocks) if n is None else first + n
    for block in trace.blocks[first:end]:
        x = block(x, *trace.beside[block])
        if block.has_experts:
            x, _ = x
    return x
