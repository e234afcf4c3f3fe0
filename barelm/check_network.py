"""Does the network learn rightly here? Gradients eager, compiled and in float16; the head; and
whether the host waits for the device."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from barelm.check_attention import gradient
from barelm.check_rows import (
    Finding,
    Skip,
    Worst,
    allowed_error,
    error,
    exact_loss,
    exact_network,
    hidden_allowed,
    random_ids,
    small_network,
)
from barelm.compiled import try_compile
from barelm.fast import cross_entropy_sum
from barelm.optim import make_optimizer
from barelm.run import Updater, make_scaler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from barelm.check_rows import Place
    from model import GPT


def random_batch(place: Place, rows: int = 2, length: int = 67) -> tuple[Tensor, Tensor]:
    """ids and targets (rows, length), of which some are none."""
    ids = random_ids(rows, length + 1)
    targets = ids[:, 1:].masked_fill(ids[:, 1:] % 7 == 0, -100)
    return ids[:, :-1].to(place.device), targets.to(place.device)


SCALE = 1024.0  # of a loss before backward: float16 loses smaller gradients


def mean_loss(network: GPT, place: Place, batch: tuple[Tensor, Tensor],
              dtype: torch.dtype | None = None, docs: Tensor | None = None) -> Tensor:  # fmt: skip
    """The mean loss of a batch under a network in dtype, or the place's: a scalar."""
    with place.cast(dtype):
        loss, count = network(*batch, docs=docs)
    return loss / count


# --------------------------------------------------------------------------------------------------
# Gradients

DIRECTIONS = 3  # random ones in each parameter
STEP = 1e-4  # of a central difference, over the size of the weights: its error is of STEP ** 2


def check_gradients(place: Place, net: GPT | None = None) -> Iterator[Finding]:
    """The gradient of each parameter, eager, against differences of the loss in float64: along
    random directions, loss(p + h d) - loss(p - h d) over 2 h is the gradient's product with d."""
    net = (net or small_network(place.device, tie=False)).train()
    batch = random_batch(place)
    exact = exact_network(net)
    exact_batch = [t.cpu() for t in batch]
    net.zero_grad()
    loss = mean_loss(net, place, batch)
    (SCALE * loss).backward()
    allowed = hidden_allowed(place.dtype, net)
    truth = exact_loss(exact, *exact_batch).item()
    # A mean over tokens, whose roundings mostly cancel.
    yield Finding("loss", abs(loss.item() / truth - 1), allowed / 8)
    worst = Worst()
    generator = torch.Generator().manual_seed(0)
    for (name, p), q in zip(net.named_parameters(), exact.parameters()):
        ours = []
        expected = []
        for _ in range(DIRECTIONS):
            direction = torch.randn(q.shape, generator=generator, dtype=torch.float64)
            ours.append((gradient(p).detach().cpu().double() * direction).sum() / SCALE)
            expected.append(slope(exact, exact_batch, q, direction))
        # One direction may be almost level: what is usual is that of all of this parameter's.
        ours = torch.stack(ours)
        expected = torch.tensor(expected, dtype=torch.float64)
        worst.add(error(ours, expected), name)
    yield worst.finding("gradients, along random directions", allowed)


def slope(exact: GPT, batch: list[Tensor], p: Tensor, direction: Tensor) -> float:
    """How steep the loss is along a direction of parameter p, in float64."""
    h = STEP * p.detach().square().mean().sqrt().item()
    losses = []
    with torch.no_grad():
        original = p.clone()
        for sign in (1, -1):
            p.copy_(original + sign * h * direction)
            losses.append(exact_loss(exact, *batch).item())
        p.copy_(original)
    return (losses[0] - losses[1]) / (2 * h)


def document_thirds(ids: Tensor) -> Tensor:
    """Every row of ids (B, T) as three documents of about the same length: their numbers."""
    length = ids.shape[1]
    return (3 * torch.arange(length, device=ids.device) // length).expand(len(ids), -1)


def check_compiled(place: Place, compile_network: Callable = try_compile) -> Iterator[Finding]:
    """The loss and every gradient of a network that is compiled as train.py does it, against the
    eager one's: causal, and of packed documents. On a GPU its steps must not wait either."""
    if not place.compile:
        raise Skip("--compile=false")
    batch = random_batch(place, rows=4, length=128)
    for name, documents in {"causal": None, "packed documents": document_thirds}.items():
        eager = small_network(place.device).train()
        net = small_network(place.device).train()
        arguments = {"ids": batch[0], "targets": batch[1]}
        is_compiled, words = compile_network(net, place.run(), arguments, place.cast(), documents)
        n_wrong = words.count("computes wrongly")  # of the ways that were tried, the fastest first
        if n_wrong:
            yield Finding(f"{name}, ways that are wrong", float(n_wrong), 0.0, words)
        elif not is_compiled:  # it failed: no compiler, say
            raise Skip(f"torch.compile is {words}; train.py goes on without it")
        if is_compiled:
            docs = documents(batch[0]) if documents else None
            finding = compare_gradients(place, net, eager, batch, docs)
            yield replace(finding, name=name, words=f"{finding.words}; {words}")
            if place.is_cuda:
                yield no_wait(f"waits, {name}", place, net, [documents] * 3)
        torch._dynamo.reset()


def loss_and_gradients(
    net: GPT, place: Place, batch: tuple[Tensor, Tensor], docs: Tensor | None = None
) -> dict[str, Tensor]:
    """{name: tensor} of the mean loss and of each parameter's gradient."""
    net.zero_grad()
    loss = mean_loss(net, place, batch, docs=docs)
    (SCALE * loss).backward()
    tensors = {"loss": loss.detach()[None]}
    for name, p in net.named_parameters():
        tensors[f"gradient of {name}"] = gradient(p)
    return tensors


def compare_gradients(
    place: Place, net: GPT, eager: GPT, batch: tuple[Tensor, Tensor], docs: Tensor | None
) -> Finding:
    """The Finding on a network's loss and gradients, where they are to be the eager one's."""
    worst = Worst()
    expected = loss_and_gradients(eager, place, batch, docs)
    for what, tensor in loss_and_gradients(net, place, batch, docs).items():
        worst.add(error(tensor, expected[what]), what)
    # Both are rounded, each in its own way.
    return worst.finding("", math.sqrt(2) * hidden_allowed(place.dtype, net))


# --------------------------------------------------------------------------------------------------
# The head and its loss

# Rows, width, vocabulary: more rows than one piece, and odd numbers of all.
HEADS = [(1100, 64, 1000), (37, 33, 515), (9, 128, 5030)]


def check_head(place: Place, cross_entropy: Callable = cross_entropy_sum) -> Iterator[Finding]:
    """The sum of the losses of rows, some without a target, and the gradients of h and the head's
    matrix, against logits and F.cross_entropy in float64."""
    losses = Worst()
    gradients = Worst()
    scale = 0.37  # what the loss is multiplied with behind the head
    for N, C, V in HEADS:
        generator = torch.Generator().manual_seed(N)
        h = torch.randn(N, C, generator=generator).to(place.dtype)
        weight = (3 * torch.randn(V, C, generator=generator) / math.sqrt(C)).to(place.dtype)
        targets = torch.randint(V, (N,), generator=generator)
        targets[torch.rand(N, generator=generator) < 0.2] = -100
        for kind in ("some targets", "no target"):
            if kind == "no target":
                targets = torch.full_like(targets, -100)
            exact = [h.double().requires_grad_(), weight.double().requires_grad_()]
            truth = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
            truths = torch.autograd.grad(scale * truth, exact)
            ours = [t.float().to(place.device).requires_grad_() for t in (h, weight)]
            with place.cast():
                loss = cross_entropy(*ours, targets.to(place.device))
            where = f"{N} rows of {C}, vocabulary {V}, {kind}"
            losses.add(error(loss[None], truth[None]), where)
            results = torch.autograd.grad(scale * loss, ours)
            for name, result, right in zip(("h", "the matrix"), results, truths):
                gradients.add(error(result, right), f"gradient of {name}, {where}")
    allowed = allowed_error(place.dtype, max(N for N, _, _ in HEADS), layers=4)
    yield losses.finding("loss", allowed / 8)  # a sum over rows, whose roundings mostly cancel
    yield gradients.finding("gradients", allowed)


# --------------------------------------------------------------------------------------------------
# float16

STEPS = 20
FIRST_STEPS = 6  # in which the scaler may skip updates until its scale fits


def check_float16(
    place: Place, net: GPT | None = None, scaler: torch.amp.GradScaler | None = None
) -> Iterator[Finding]:
    """Gradients in float16 against float32's, then steps with the scaler: the loss falls as in
    float32, and no update is skipped once the scale fits."""
    half = torch.float16
    net = net or small_network(place.device)
    net.train()
    batch = random_batch(place, rows=4)
    start = {name: t.clone() for name, t in net.state_dict().items()}
    try:
        yield half_gradients(place, net, batch)
    except RuntimeError as error:
        if "not implemented for 'Half'" in str(error):
            raise Skip(f"no float16 here: {str(error).splitlines()[0]}") from None
        raise
    losses = {}
    for dtype in (torch.float32, half):
        net.load_state_dict(start)
        used = (scaler or make_scaler(place.device, half)) if dtype == half else None
        losses[dtype], skipped = train_steps(place, net, batch, dtype, used)
    late = sum(step >= FIRST_STEPS for step in skipped)
    yield Finding(f"updates skipped after step {FIRST_STEPS}", late, 0.0, f"{len(skipped)} in all")
    first, last = losses[half][0], losses[half][-1]
    full = losses[torch.float32][-1]
    words = f"{first:.3f} to {last:.3f} in {STEPS} steps; in float32 to {full:.3f}"
    yield Finding("loss after training, of the first", last / first, 0.9, words)


def half_gradients(place: Place, net: GPT, batch: tuple[Tensor, Tensor]) -> Finding:
    """The Finding on gradients in float16, of a loss that is scaled as at a run's beginning."""
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        net.zero_grad()
        (SCALE * mean_loss(net, place, batch, dtype)).backward()
        gradients[dtype] = [gradient(p).float() for p in net.parameters()]
    worst = Worst()
    for (name, _), ours, right in zip(net.named_parameters(), *reversed(gradients.values())):
        worst.add(error(ours, right), name)
    return worst.finding("gradients, against float32", hidden_allowed(torch.float16, net))


def train_steps(place: Place, net: GPT, batch: tuple[Tensor, Tensor], dtype: torch.dtype,
                scaler: torch.amp.GradScaler | None) -> tuple[list[float], list[int]]:  # fmt: skip
    """Train on one batch: ([loss of each step], [the steps whose update was skipped])."""
    optimizers = make_optimizer(net, "adamw", lr=1e-3)
    updater = Updater(place.run(), net.parameters(), optimizers, scaler, grad_clip=1.0)
    losses = []
    skipped = []
    for step in range(STEPS):
        loss = mean_loss(net, place, batch, dtype)
        updater.backward(loss)
        norm = updater.clip_gradients()
        losses.append(loss.item())
        if not updater.step(step, loss.item(), float(norm)):
            skipped.append(step)
    return losses, skipped


# --------------------------------------------------------------------------------------------------
# No wait


def check_waiting(place: Place) -> Iterator[None]:
    """The micro-batches of a step, with torch's alarm for whatever makes the host wait."""
    if not place.is_cuda:
        raise Skip("a CPU has nothing to wait for")
    net = small_network(place.device).train()
    yield no_wait("waits in a step, eager", place, net, [None, document_thirds])


def no_wait(name: str, place: Place, net: GPT, documents: Sequence) -> Finding:
    """The Finding on micro-batches, one for each of `documents`: none has to wait for the GPU."""
    micro_batches(place, net, fetch, documents)  # warm-up: what is made once may wait
    torch.cuda.synchronize(place.device)
    with alarm():
        micro_batches(place, net, fetch, documents)
    return Finding(name, 0.0, 0.0, "torch's sync debug mode: error")


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Within, an operation that waits for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def fetch(place: Place) -> Tensor:
    """Two windows (2, 129) of ids on their way to the GPU, as barelm.shards.Windows sends them."""
    return random_ids(2, 129).pin_memory().to(place.device, non_blocking=True)


def micro_batches(place: Place, net: GPT, fetch: Callable,
                  documents: Sequence = (None, document_thirds)) -> Tensor:  # fmt: skip
    """Forward and backward of micro-batches as train.py makes them, one for each of `documents`:
    the sum of the losses. fetch(place): windows (B, T + 1)."""
    loss_sum = torch.zeros((), device=place.device)
    for number in documents:
        windows = fetch(place)
        ids = windows[:, :-1].clamp(min=0)
        targets = windows[:, 1:].contiguous()
        docs = number(ids) if number else None
        with place.cast():
            loss, _ = net(ids, targets, docs=docs)
        (loss / ids.numel()).backward()
        loss_sum += loss.detach()
    return loss_sum
