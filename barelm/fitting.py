"""What of a fine-tuning depends on the machine: what is compiled, how much memory it takes, and how
many sequences are generated at once."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from barelm.compiled import check_fast, try_compile
from barelm.devices import free_memory, why_not_on_mps
from barelm.examples import IGNORED, device_of, rounded_length
from barelm.layouts import cached_numbers
from barelm.optim import MOMENTS, flops_per_token, memory_estimate
from barelm.run import to_device
from model import generate

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from barelm.texts import Generation
    from barelm.tokenizer import Tokenizer
    from barelm.tuning import Learner
    from model import GPT

# --------------------------------------------------------------------------------------------------
# What is faster, trusted where it computes the same

COMPILE_FLOPS = 1e14  # a process's work from which compiling for a length pays on a CPU


def flops_of_run(net: GPT, tokens: float, n_steps: int, max_minutes: float | None) -> float:
    """About how many FLOPs a run takes, of so many tokens a step."""
    flops = math.inf
    if n_steps:
        flops = n_steps * tokens * flops_per_token(net.config, net.config.n_ctx)
    if max_minutes:
        flops = min(flops, 60 * max_minutes * 5e11)  # what two cores with bfloat16 do in a second
    return flops


def why_not_compile(asked: bool | None, learner: Learner, saved: dict | None, flops: float,
                    lengths: Iterable[int]) -> str:  # fmt: skip
    """Why the blocks are not to be compiled, or "". asked: the key `compile`; saved: the state to
    resume, which is computed as before; lengths: of the rows, each of which a CPU compiles for."""
    device = learner.run.device
    if asked is False:
        return "as asked"
    if why_not_on_mps(device):
        return why_not_on_mps(device)
    if learner.net.deterministic:
        return "a compiler chooses the order of sums by the shape (--deterministic)"
    if not learns_in_network(learner.net):
        return "the head alone learns"
    if asked is None and saved and saved["step"] > 0:
        return "" if saved["compiled"] else "as before"
    if asked or device.type == "cuda":
        return ""
    n_lengths = len({rounded_length(n, learner.net.config.n_ctx) for n in lengths})
    if flops >= COMPILE_FLOPS * learner.run.world * n_lengths:
        return ""
    return "on a CPU it would take longer than it saves here (--compile turns it on)"


def learns_in_network(net: GPT) -> bool:
    """Whether more learns than a score on top."""
    learning = [name for name, p in net.named_parameters() if p.requires_grad]
    return not all(name.startswith("score") for name in learning)


def prepare_network(learner: Learner, rows: list[list[int]], cast: AbstractContextManager,
                    packed: bool, why_not: str,
                    sources: list[list[int]] | None = None) -> None:  # fmt: skip
    """Let the network compute by what is faster, where that gives the same on these rows, lists of
    ids; what came of it is said. packed: whether rows will hold several examples. why_not: why its
    blocks are not to be compiled, or "". sources: of an encoder-decoder, a list of ids a row."""
    net = learner.net
    run = learner.run
    batch = batch_to_compare(rows, net, sources)
    documents = halves if packed else None
    if net.fast and learns_in_network(net):
        fault = check_fast(net, run, batch, cast, documents)
        if fault:
            run.say(f"note: {fault}")
    words = f"off: {why_not}"
    if not why_not:
        hook = ask_all_blocks_alike(net)
        learner.compiled, words = try_compile(net, run, batch, cast, documents, dynamic=True)
        if hook and not learner.compiled:
            hook.remove()
    run.say(f"compile: {words}")


def batch_to_compare(
    rows: list[list[int]], net: GPT, sources: list[list[int]] | None = None
) -> dict[str, Tensor]:
    """ids and targets (B, T) by name, of rows, lists of ids, by which two ways to compute are
    compared: any targets will do. B is two at least: for a single row torch compiles anew."""
    if len(rows) == 1:
        rows = rows * 2
        sources = sources and sources * 2
    batch = {"ids": filled_up(rows, net, 0), "targets": filled_up(rows, net, IGNORED)}
    if sources:
        batch["encoder_ids"] = filled_up(sources, net, 0)
        lengths = torch.tensor([len(source) for source in sources])
        batch["encoder_lengths"] = to_device(lengths, device_of(net))
    return batch


def filled_up(rows: list[list[int]], net: GPT, pad: int) -> Tensor:
    """(B, T) int64 of rows, lists of ids, as long as those that are computed with."""
    T = rounded_length(max(map(len, rows)), net.config.n_ctx)
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows])
    return to_device(ids, device_of(net))


def halves(ids: Tensor) -> Tensor:
    """Two documents in each row of ids (B, T)."""
    T = ids.shape[1]
    second = torch.arange(T, device=ids.device) >= T // 2
    return second.long().expand_as(ids)


def ask_all_blocks_alike(net: GPT) -> object:
    """Of a frozen embedding's output no gradient is asked, so that torch would compile the first
    block apart from the others. Where that block learns, let one be asked: a hook, or None."""
    table = net.model.embed_tokens
    block_learns = any(p.requires_grad for p in net.model.layers[0].parameters())
    if table.weight.requires_grad or not block_learns:
        return None

    def ask(module, args, output):
        return output.requires_grad_() if torch.is_grad_enabled() else output

    return table.register_forward_hook(ask)


# --------------------------------------------------------------------------------------------------
# Memory


@dataclass
class Load:
    """The largest micro-batch of a run, as far as one can tell."""

    rows: int
    length: int  # tokens of a row, padding counted
    n_logits: int  # tokens whose logits exist at once, in float32; 0: the head works by pieces


def say_memory(
    learner: Learner, load: Load, dtype: torch.dtype, optimizer: str, n_copies: int = 0
) -> None:
    """How much memory training will take beside the weights, and how much there is. n_copies: of
    the whole network, such as a reference. The numbers are estimates."""
    run = learner.run
    net = learner.net
    moments = MOMENTS.get(optimizer, 2)
    n_learning = sum(p.numel() for p in learner.params().values())
    head, activations = memory_estimate(
        net.config,
        0,
        rows=load.rows,
        seq_len=load.length,
        dtype=dtype,
        recompute=net.checkpoint,
        moments=moments,
        device_type=run.device.type,
    )
    if load.n_logits:  # in the dtype and in float32; log p, and the gradient of both
        head = load.n_logits * net.config.vocab_size * (2 * dtype.itemsize + 12)
    needed = 4 * n_learning * (1 + moments) + head + activations + n_copies * bytes_of(net)
    free = free_memory(run.device)
    if run.device.type == "cpu":  # all processes of a machine share it
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", run.world))
    text = f"memory: about {needed / 2**30:.2f} GiB a process, beside the weights, of "
    text += f"{free / 2**30:.1f} GiB free"
    if needed > free:
        text += ": it may not fit (micro_tokens, seq_len, checkpoint_blocks, adapt make it less)"
    run.say(text)


def bytes_of(net: GPT) -> int:
    """The bytes of a network's weights and buffers, each once."""
    return sum(t.nbytes for t in (*net.parameters(), *net.buffers()))


def rows_that_fit(net: GPT, longest: int) -> int:
    """How many sequences of `longest` tokens can be generated at once: their keys and values, and
    logits, in half of the memory that is free."""
    row = 4 * (cached_numbers(net.config, longest) + 4 * net.config.vocab_size)  # bytes
    return max(1, int(free_memory(device_of(net)) / 2 / row))


def generate_all(
    net: GPT,
    tok: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    first: int = 0,
    **options: Any,
) -> list[Generation]:
    """model.generate's answers, with as many rows at once as fit the memory."""
    if not prompts:
        return []
    longest = min(net.config.n_ctx, max(map(len, prompts)) + max_new_tokens)
    n = rows_that_fit(net, longest)
    generations = []
    for i in range(0, len(prompts), n):
        options |= {"first": first + i, "max_new_tokens": max_new_tokens}
        generations += generate(net, tok, prompts[i : i + n], **options)
    return generations
