"""What is faster, trusted only where it computes what the plain network does.

The compiled network of one torch had gradients of zero: it was fast, and learned nothing. So the
first micro-batch goes through both, and their losses and gradients are compared. Likewise a window
goes through barelm/fast.py and through model.py alone: a formula that was changed in one of them
and not in the other is found before the first step.
"""

import time

import torch

from barelm.run import duration, is_out_of_memory
from model import call_block


def try_compile(net, run, batch, cast, documents=None):
    """(network, is it compiled, words): the compiled network, once its loss and its gradients on
    this micro-batch, (ids, targets), agree with the eager one's on every process; else net. On a
    CPU one block is compiled for all of them: as fast, and ready in half a minute."""
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
        # With dropout, which the two draw differently, they differ by chance too.
        if differs(compiled, eager, tolerance=0.5 if net.config.dropout else 0.1):
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
        return net, False, f"off, since {fault or 'it failed or differed on another process'}"
    return network, True, f"on, after {duration(time.monotonic() - begun)}: {figures}"


def check_fast(net, run, batch, cast, documents=None):
    """Leave net.fast true only where barelm/fast.py computes what model.py does: a window of this
    micro-batch, (ids, targets), has the same loss and gradients on every process. Words where it
    has not, else ""."""
    ids = batch[0][:1]  # (1, T): all logits of a whole micro-batch may not fit
    targets = batch[1][:1]
    net.eval()  # without dropout, which the two would draw differently
    fast = loss_and_gradients(net, net, ids, targets, cast, documents)
    net.fast = False
    plain = loss_and_gradients(net, net, ids, targets, cast, documents)
    net.train()
    [n_faults] = run.sum(differs(fast, plain, tolerance=0.05))  # rounding is below 0.01
    net.fast = n_faults == 0
    if net.fast:
        return ""
    return (
        f"barelm/fast.py does not compute what model.py does ({in_words(fast)}; plain "
        f"{in_words(plain)}): model.py alone trains"
    )


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


def differs(result, reference, tolerance):
    """Whether, of two results of `loss_and_gradients`, a parameter's gradient norm differs by more
    than this fraction, or the loss by more than a fifth of it."""
    loss, norms = result
    reference_loss, reference_norms = reference
    floor = 0.01 * reference_norms.norm()  # smaller gradients are mostly rounding
    worst = ((norms - reference_norms).abs() / (reference_norms + floor)).max().item()
    loss_difference = abs(loss - reference_loss) / abs(reference_loss)
    agrees = worst <= tolerance and loss_difference <= tolerance / 5  # of a NaN neither is true
    return not agrees
