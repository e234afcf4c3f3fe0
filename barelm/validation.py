"""The loss of windows that train.py validates with, what a run's validations say in
words, and what the model writes by then."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from barelm.devices import wide_dtype, widen
from barelm.examples import device_of
from barelm.filling import (
    fill_masks,
    fill_spans,
    filled_line,
    score_states,
    score_targets,
    spans_line,
)
from barelm.objectives import VALIDATION_SEED
from barelm.parallel import divide_again
from barelm.shards import batch_to_device
from model import call_block, generate

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import SimpleNamespace

    from torch import Tensor

    from barelm.pipeline import Pipeline
    from barelm.run import Run
    from barelm.tokenizer import Tokenizer
    from model import GPT


@torch.no_grad()
def evaluate(net: GPT, windows: Any, data: Any, run: Run, cast: AbstractContextManager,
             device_batch_size: int, eval_tokens: int = 0) -> tuple[float, float]:  # fmt: skip
    """(loss in nats per target, bits per byte, or where tokens are masked the part of the targets
    that is the likeliest token) over eval_tokens of the windows (0: all), evenly spread, each
    target scored once, shared out over all processes. The masks are always the same."""
    n = windows.n
    if eval_tokens:
        n = min(n, math.ceil(eval_tokens / windows.seq_len))
    asked = replace(data.objective, seed=VALIDATION_SEED)
    # Loss, targets, bytes of the targets; or how many are right.
    totals = torch.zeros(3, dtype=wide_dtype(run.device), device=run.device)
    mesh = run.mesh
    n_micro = 1
    if mesh.pipeline:
        n_micro = 2 * mesh.sizes.pp  # go through it together
        device_batch_size *= n_micro
    indices = [i * windows.n // n for i in range(mesh.data_rank, n, mesh.data_world)]
    n_batches = math.ceil(math.ceil(n / mesh.data_world) / device_batch_size)
    net.eval()
    is_compiled = net.block is not call_block
    for i in range(n_batches):  # as many on each process: parts of a network compute together
        part = indices[i * device_batch_size : (i + 1) * device_batch_size]
        is_idle = not part
        part = part or [0]
        batch = batch_to_device(asked.batch(windows.rows(part), part), run.device)
        if is_idle:
            batch["targets"].fill_(-100)
        if is_compiled or mesh.pipeline:  # for one size: a short batch would be compiled for
            batch = filled_up(batch, device_batch_size)
        docs = data.documents(batch["ids"])
        with cast:
            if mesh.pipeline:
                score = score_of(asked.name, data.token_bytes)
                totals += mesh.pipeline.evaluate(batch, docs, n_micro, score, 3).sum(0)
            elif asked.name == "causal":
                totals += causal_totals(net, batch, docs, data.token_bytes)
            else:
                totals += score_targets(net, batch, docs).sum(0)
    net.train()
    divide_again(mesh.pipeline.submodule if mesh.pipeline else net)
    loss_sum, n_targets, n_bytes_or_right = run.sum(*(totals * mesh.counts))
    loss = loss_sum / max(n_targets, 1)
    if asked.name == "causal":
        return loss, loss_sum / max(n_bytes_or_right, 1) / math.log(2)
    return loss, n_bytes_or_right / max(n_targets, 1)


def filled_up(batch: dict[str, Tensor], n_rows: int) -> dict[str, Tensor]:
    """A batch of n_rows rows: those that are missing have no targets."""
    filled = {}
    for name, tensor in batch.items():
        missing = (0, 0, 0, n_rows - len(tensor))
        filled[name] = F.pad(tensor, missing, value=-100 if name == "targets" else 0)
    return filled


def causal_totals(
    net: GPT, batch: dict[str, Tensor], docs: Tensor | None, token_bytes: Tensor
) -> Tensor:
    """The loss of a batch, its targets, and the bytes that they stand for: (3,), `widen`ed."""
    loss_sum, n_targets = net(**batch, docs=docs)
    targets = batch["targets"]
    if net.tokens is not None:  # of windows that several processes share (--cp)
        targets = net.tokens.own(targets)
    figures = loss_sum, n_targets, bytes_of(targets, token_bytes)
    return torch.stack([widen(figure) for figure in figures])


def bytes_of(targets: Tensor, token_bytes: Tensor) -> Tensor:
    """The bytes that the targets (B, T) stand for, ()."""
    bytes_of_targets = token_bytes[targets.clamp(min=0)]  # (B, T)
    return bytes_of_targets.where(targets >= 0, 0).sum()


def score_of(name: str, token_bytes: Tensor) -> Callable:
    """What the last stage of a pipeline makes of a micro-batch's final states in a validation."""

    def causal_figures(net, h, batch):
        targets = batch["targets"]
        figures = net.loss_of(h, targets), (targets >= 0).sum(), bytes_of(targets, token_bytes)
        return torch.stack([widen(figure) for figure in figures])[None]  # (1, 3)

    def filled_figures(net, h, batch):
        return score_states(net, h, batch).sum(0)[None]

    return causal_figures if name == "causal" else filled_figures


def remarks(keys: SimpleNamespace, history: list, guessing: float = math.inf) -> list[str]:
    """What the validations say, in words: history [(step, training loss, validation loss)];
    guessing: the loss of a uniform guess among all ids, ln(vocabulary), in nats. keys:
    train.py's by name, which what is to be changed is said with."""
    _, train_loss, val_loss = history[-1]
    lower = (
        f"lower learning_rate ({keys.learning_rate:g}) or raise warmup_steps ({keys.warmup_steps})"
    )
    if not val_loss <= 1.02 * guessing:  # nor is a NaN
        worse = f"the loss is above {guessing:.2f}, what guessing gives, ln(vocabulary)"
        return [f"{worse}: it explodes or never learned; {lower}"]
    best = min(val for _, _, val in history)
    if val_loss > 1.5 * best:
        return [f"the loss is half as much again as its best: it explodes; {lower}"]
    if len(history) < 3:
        return []
    _, _, val_two_before = history[-3]
    _, train_before, val_before = history[-2]
    if val_loss > val_before > val_two_before and train_loss < train_before:
        return ["validation loss rises while training loss falls: over-fitting; best/ has the best"]
    if abs(val_two_before - val_loss) < 2e-3 * val_two_before:
        other = "adamw" if keys.optimizer == "muon" else "muon"
        return [
            "validation loss moved by less than 0.2 % in two validations: a plateau; if it came "
            f"early, raise learning_rate ({keys.learning_rate:g}), lengthen warmup_steps "
            f"({keys.warmup_steps}) where grad_norm jumps, or try --optimizer={other}; if late, a "
            "larger network or more data"
        ]
    return []


def sample_text(
    keys: SimpleNamespace, net: GPT, tok: Tokenizer, data: Any, pipeline: Pipeline | None = None
) -> str:
    """A few tokens of what the model writes by now: of an encoder what it sees behind masks, of an
    encoder-decoder the spans of a window."""
    if keys.objective == "mlm" and keys.sample_prompt:
        return fill_masks(net, tok, keys.sample_prompt)
    if keys.objective == "span" and keys.sample_prompt:
        return fill_spans(net, tok, keys.sample_prompt, keys.sample_tokens)
    if keys.objective != "causal":
        window = data.val.rows([0])
        batch = replace(data.objective, seed=VALIDATION_SEED).batch(window, [0])
        line = filled_line if keys.objective == "mlm" else spans_line
        return line(net, tok, batch_to_device(batch, device_of(net)), keys.sample_tokens)
    prompt = tok.encode(keys.sample_prompt)[-(net.config.n_ctx // 2) :]
    if not prompt:  # as a document of the shards begins
        prompt = [*data.end, *data.begin][-1:]
    options = dict(max_new_tokens=keys.sample_tokens, temperature=0.8, top_k=50)
    if pipeline:
        return keys.sample_prompt + pipeline.generate(tok, prompt, keys.seq_len, **options)
    [sample] = generate(net, tok, [prompt], **options)
    return keys.sample_prompt + sample.text
