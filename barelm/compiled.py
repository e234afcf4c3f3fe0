"""What is faster, trusted only where it computes what the plain network does.

The compiled network of one torch had gradients of zero: it was fast, and learned nothing. So the
first micro-batch goes through both, and their losses and gradients are compared. Likewise a window
goes through barelm/fast.py and through model.py alone: a formula that was changed in one of them
and not in the other is found before the first step.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from barelm.fast import head_piece
from barelm.run import duration, is_out_of_memory
from model import call_block

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from barelm.run import Run
    from model import GPT


@dataclass
class Ways:
    """By what a network computes its blocks and its head; as it stands here, eagerly."""

    train_block: Callable = call_block
    eval_block: Callable = call_block  # of validation
    head_piece: Callable = head_piece
    sparse: bool = False  # attention by a kernel that skips what is hidden
    name: str = ""  # what a run that may not compute so goes without

    @classmethod
    def of(cls, net: GPT) -> Ways:
        """Those that net computes by."""
        return cls(net.train_block, net.eval_block, net.ops.head_piece, net.ops.sparse)

    def give(self, net: GPT) -> None:
        """Let net compute by these."""
        net.train_block = self.train_block
        net.eval_block = self.eval_block
        net.ops.head_piece = self.head_piece
        net.ops.sparse = self.sparse


def compiled_ways(
    net: GPT, device: torch.device, documents: Callable | None, dynamic: bool | None
) -> list[Ways]:
    """The Ways to try, the fastest first. One block is compiled for all of them. On a CPU the eager
    head is as fast, and its plain attention too; a validation would save less there than the half
    minute that compiling for it takes."""
    block = torch.compile(call_block, dynamic=dynamic)
    if device.type != "cuda":
        return [Ways(block, name="compiled blocks")]
    piece = torch.compile(head_piece, dynamic=dynamic)
    ways = [Ways(block, block, piece, name="a compiled head")]
    ways.append(Ways(block, block, name="compiled blocks"))
    # The sparse kernel has no dropout, and is made for one length.
    hides = documents or not net.config.is_plain
    if hides and not net.config.dropout and not dynamic:
        ways.insert(0, Ways(block, block, piece, sparse=True, name="sparse attention"))
    return ways


def try_compile(net: GPT, run: Run, batch: dict[str, Tensor], cast: AbstractContextManager,
                documents: Callable | None = None,
                dynamic: bool | None = None) -> tuple[bool, str]:  # fmt: skip
    """(is it compiled, words): let net compute by the fastest of `compiled_ways` whose loss and
    gradients on this micro-batch, {name: tensor}, agree with the eager ones on every process; else
    eagerly. All that is compiled is compiled here, for validation too. dynamic: True compiles for
    batches of any shape, None for this one until another comes."""
    begun = time.monotonic()
    # Blocks of each kind (a window, experts, an encoder's), in training and not, with documents and
    # without, on a CPU for each length: all are compiled for. Over the limit torch goes on eagerly.
    torch._dynamo.config.recompile_limit = 64
    # In quarters: an eager network takes more memory than a compiled one.
    pieces = min(4, len(batch["ids"]))
    eager = loss_and_gradients(net, batch, cast, documents, pieces)
    eager_loss = validation_loss(net, batch, cast, documents, pieces)
    # With dropout, which the two draw differently, they differ by chance too.
    tolerance = 0.5 if net.config.dropout else 0.1
    faults = ""
    for ways in compiled_ways(net, run.device, documents, dynamic):
        ways.give(net)
        difference, fault = compare_with(eager, eager_loss, net, batch, cast, documents, tolerance)
        gc.collect()  # compiling leaves much behind, and a failure what was in memory then
        [n_faults] = run.sum(bool(fault))
        if n_faults == 0:
            seconds = duration(time.monotonic() - begun)
            words = f"on, after {seconds}; equal to eager within {in_percent(difference)}"
            return True, words + faults
        fault = fault or "it failed or differed on another process"
        faults += f"; without {ways.name}, since {fault}"
    Ways().give(net)
    return False, f"off{faults}"


def compare_with(eager: tuple, eager_loss: float, net: GPT, batch: dict[str, Tensor],
                 cast: AbstractContextManager, documents: Callable | None,
                 tolerance: float) -> tuple[float, str]:  # fmt: skip
    """(the largest difference of net, as it now computes, from what `loss_and_gradients` and
    `validation_loss` gave of the eager one, a fraction; what is wrong with it, or "")."""
    try:
        with warnings.catch_warnings():
            # float32 stays float32 where it is asked for; torch would advise TF32.
            warnings.filterwarnings("ignore", "TensorFloat32")
            compiled = loss_and_gradients(net, batch, cast, documents)
            loss = validation_loss(net, batch, cast, documents)
    except Exception as error:  # no compiler on this machine, or one that fails
        if is_out_of_memory(error):
            raise
        message = str(error).strip() or type(error).__name__
        return math.nan, f"it failed: {message.splitlines()[0]}"
    finally:
        net.train()
        net.zero_grad()
    fault = ""
    if differs(compiled, eager, tolerance):
        fault = f"it computes wrongly here ({in_words(compiled)}; eager {in_words(eager)})"
    elif not abs(loss - eager_loss) <= 0.02 * abs(eager_loss):  # without dropout, and a NaN is not
        figures = f"validation loss {loss:.4f}; eager {eager_loss:.4f}"
        fault = f"it computes wrongly here ({figures})"
    return max(differences(compiled, eager)), fault


@torch.no_grad()
def validation_loss(net: GPT, batch: dict[str, Tensor], cast: AbstractContextManager,
                    documents: Callable | None = None, pieces: int = 1) -> float:  # fmt: skip
    """The mean loss of a micro-batch, as a validation computes it; pieces: as in
    `loss_and_gradients`."""
    net.eval()
    loss_sum = 0.0
    for piece in pieces_of(batch, pieces):
        docs = documents(piece["ids"]) if documents else None
        with cast:
            loss, _ = net(**piece, docs=docs)
        loss_sum += loss.item()
    net.train()
    return loss_sum / n_targets_of(batch)


def check_fast(net: GPT, run: Run, batch: dict[str, Tensor], cast: AbstractContextManager,
               documents: Callable | None = None) -> str:  # fmt: skip
    """Leave net.fast true only where barelm/fast.py computes what model.py does: a window of this
    micro-batch, {name: tensor}, has the same loss and gradients on every process. Words where it
    has not, else ""."""
    # (1, T) each: all logits of a whole micro-batch may not fit
    first = {name: tensor[:1] for name, tensor in batch.items()}
    net.eval()  # without dropout, which the two would draw differently
    fast = loss_and_gradients(net, first, cast, documents)
    net.fast = False
    plain = loss_and_gradients(net, first, cast, documents)
    net.train()
    [n_faults] = run.sum(differs(fast, plain, tolerance=0.05))  # rounding is below 0.01
    net.fast = n_faults == 0
    if net.fast:
        return ""
    return (
        f"barelm/fast.py does not compute what model.py does ({in_words(fast)}; plain "
        f"{in_words(plain)}): model.py alone trains"
    )


def in_words(result: tuple) -> str:
    """What `loss_and_gradients` gave, in a line."""
    loss, norms = result
    return f"loss {loss:.4f}, gradient norm {norms.norm():.4g}"


def pieces_of(batch: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """A micro-batch, {name: (B, …) tensor}, in n parts of its rows."""
    chunks = [tensor.chunk(n) for tensor in batch.values()]
    return [dict(zip(batch, parts)) for parts in zip(*chunks)]


def n_targets_of(batch: dict[str, Tensor]) -> int:
    """About how many targets a micro-batch has: for a mean, whatever the network counts."""
    return max(1, int((batch["targets"] >= 0).sum()))


def loss_and_gradients(net: GPT, batch: dict[str, Tensor], cast: AbstractContextManager,
                       documents: Callable | None = None,
                       pieces: int = 1) -> tuple[float, Tensor]:  # fmt: skip
    """The mean loss of a micro-batch, the network's arguments by name (ids and targets (B, T), and
    what else an objective has), and the norm of each parameter's gradient (n_parameters,), float32
    on the host. documents: a function that numbers the documents of ids. pieces: the batch goes
    through in so many, whose gradients add up to the same."""
    loss_scale = 1024.0  # float16 loses smaller gradients
    n_targets = n_targets_of(batch)
    net.zero_grad()
    loss_sum = 0.0
    for piece in pieces_of(batch, pieces):
        docs = documents(piece["ids"]) if documents else None
        with cast:
            loss, _ = net(**piece, docs=docs)
        (loss * (loss_scale / n_targets)).backward()
        loss_sum += loss.detach().item()
    norms = []
    for p in net.parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        norms.append(grad.float().norm())
    norms = torch.stack(norms).cpu() / loss_scale
    net.zero_grad()
    return loss_sum / n_targets, norms


def differences(result: tuple, reference: tuple) -> tuple[float, float]:
    """How far two results of `loss_and_gradients` are apart, as fractions: (the norms of the
    parameter's gradients that differ most, the losses)."""
    loss, norms = result
    reference_loss, reference_norms = reference
    floor = 0.01 * reference_norms.norm()  # smaller gradients are mostly rounding
    worst = ((norms - reference_norms).abs() / (reference_norms + floor)).max().item()
    return worst, abs(loss - reference_loss) / abs(reference_loss)


def differs(result: tuple, reference: tuple, tolerance: float) -> bool:
    """Whether, of two results of `loss_and_gradients`, a parameter's gradient norm differs by more
    than this fraction, or the loss by more than a fifth of it."""
    worst, loss_difference = differences(result, reference)
    agrees = worst <= tolerance and loss_difference <= tolerance / 5  # of a NaN neither is true
    return not agrees


def in_percent(fraction: float) -> str:
    """A fraction in words, rounded up to one digit: 0.2 %; the least is 0.01 %."""
    percent = max(100 * fraction, 0.01)
    unit = 10.0 ** math.floor(math.log10(percent))
    digit = math.ceil(percent / unit - 1e-9)
    return f"{round(digit * unit, 2):g} %"
