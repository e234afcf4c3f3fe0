"""torch.compile, trusted only where it computes what the plain network does.

The compiled network of one torch had gradients of zero: it was fast, and learned nothing. So the
first micro-batch goes through both, and their losses and gradients are compared.
"""

import time

import torch

from barelm.run import duration, is_out_of_memory
from model import call_block


def try_compile(net, run, batch, cast, documents=None):
    """(network, words): the compiled network, once its loss and its gradients on this micro-batch,
    (ids, targets), agree with the eager one's on every process; else net. On a CPU one block is
    compiled for all of them: as fast, and ready in half a minute."""
    begun = time.monotonic()
    # In quarters: an eager network takes more memory than a compiled one.
    pieces = min(4, len(batch[0]))
    eager = loss_and_gradients(net, net, *batch, cast, documents, pieces)
    fault = figures = ""
    network = net
    if run.device.type == "cuda":
        network = torch.compile(net)
    else:
        net.train_block = torch.compile(call_block)
    try:
        compiled = loss_and_gradients(network, net, *batch, cast, documents)
        figures = f"{in_words(compiled)}; eager {in_words(eager)}"
        if compiled_differs(compiled, eager, net.config.dropout):
            fault = f"it computes wrongly here ({figures})"
    except Exception as error:  # no compiler on this machine, or one that fails
        if is_out_of_memory(error):
            raise
        message = str(error).strip() or type(error).__name__
        fault = f"it failed: {message.splitlines()[0]}"
    net.zero_grad()
    [n_faults] = run.sum(bool(fault))
    if n_faults:
        net.train_block = call_block
        return net, f"off, since {fault or 'it failed or differed on another process'}"
    return network, f"on, after {duration(time.monotonic() - begun)}: {figures}"


def in_words(result):
    """What `loss_and_gradients` gave, in a line."""
    loss, norms = result
    return f"loss {loss:.4f}, gradient norm {norms.norm():.4g}"


def loss_and_gradients(network, net, ids, targets, cast, documents=None, pieces=1):
    """The mean loss of a micro-batch, ids and targets (B, T), under `network`, which is net or net
    compiled, and the norm of each parameter's gradient (n_parameters,), float32 on the host.
    documents: a function that numbers the documents of ids. pieces: the batch goes through in so
    many, whose gradients add up to the same."""
    loss_scale = 1024.0  # float16 loses smaller gradients
    net.zero_grad()
    loss_sum = 0.0
    for piece_ids, piece_targets in zip(ids.chunk(pieces), targets.chunk(pieces)):
        docs = documents(piece_ids) if documents else None
        with cast:
            loss, _ = network(piece_ids, piece_targets, docs=docs)
        (loss * (loss_scale / targets.numel())).backward()
        loss_sum += loss.detach().item()
    norms = []
    for p in net.parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        norms.append(grad.float().norm())
    norms = torch.stack(norms).cpu() / loss_scale
    net.zero_grad()
    return loss_sum / targets.numel(), norms


def compiled_differs(compiled, eager, dropout):
    """Whether the losses and gradient norms that `loss_and_gradients` gave differ by more than
    rounding; with dropout, which the two draw differently, by more than chance."""
    loss, norms = compiled
    eager_loss, eager_norms = eager
    floor = 0.01 * eager_norms.norm()  # smaller gradients are mostly rounding
    worst = ((norms - eager_norms).abs() / (eager_norms + floor)).max().item()
    loss_difference = abs(loss - eager_loss) / abs(eager_loss)
    tolerance = 0.5 if dropout else 0.1
    agrees = worst <= tolerance and loss_difference <= tolerance / 5  # of a NaN neither is true
    return not agrees
