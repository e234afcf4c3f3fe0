"""Distillation: a student learns what another network, its teacher, says of every next token.

finetune.py --method=distill has the loss and its weights; here are the teacher, the divergence of
two distributions, a few rows at a time, and answers of the student's own to learn on."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from barelm.checkpoint import load
from barelm.examples import IGNORED
from barelm.fitting import bytes_of, generate_all
from barelm.invariant import be_deterministic
from barelm.optim import n_params
from barelm.parallel import parallelize, whole_weights
from barelm.run import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from barelm.tuning import Learner
    from model import GPT

# --------------------------------------------------------------------------------------------------
# The teacher

TEACHER_WEIGHTS = ("float32", "bfloat16", "int8", "int4")


def open_teacher(
    folder: str, weights: str, learner: Learner, limit: int, computing: torch.dtype
) -> GPT:
    """The teacher of a learner, frozen, and told with what it takes. weights: one of
    TEACHER_WEIGHTS, as what they are held; limit: the tokens that it has to read at once;
    computing: the dtype of the run."""
    run = learner.run
    is_quantized = weights in ("int8", "int4")
    if is_quantized and run.is_divided:
        why = "codes are not divided over processes: float32 or bfloat16"
        raise UserError(f"--teacher_weights={weights} --parallel=fsdp: {why}")
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    quantize = weights if is_quantized else None
    device = "cpu" if run.is_divided else run.device
    net, tok = load(folder, device, dtype, quantize, fast=learner.net.fast)
    check_teacher(folder, net, tok, learner, limit)
    if learner.net.deterministic:
        be_deterministic(net)
    net.requires_grad_(False)
    size = bytes_of(net)
    where = "shared by all processes" if run.is_divided else "on each process"
    run.say(
        f"teacher: {folder}, {n_params(net):,} parameters, {size / 2**20:,.1f} MiB as {weights} "
        f"{where}"
    )
    if run.is_divided:
        parallelize(net, run.mesh, computing)
    return net.eval()


def check_teacher(folder: str, net: GPT, tok: Tokenizer, learner: Learner, limit: int) -> None:
    """Refuse a teacher from which this learner cannot learn."""
    if net.score is not None or not net.config.causal or net.config.is_seq2seq:
        raise UserError(f"--teacher={folder}: no language model: expected a decoder with its head")
    why = other_tokens(tok, learner.tok)
    if why:
        raise UserError(f"--teacher={folder}: another tokenizer than {learner.base}'s: {why}")
    if net.config.n_ctx < limit:
        n = net.config.n_ctx
        raise UserError(f"--teacher={folder}: a context of {n} tokens: --seq_len={n} at most")


def other_tokens(tok: Tokenizer, other: Tokenizer) -> str:
    """In what the tokens of two tokenizers differ, in words, or "": an id has to mean the same to
    both networks. How texts are cut into tokens is the student's business alone."""
    if tok.n_vocab != other.n_vocab:
        return f"{tok.n_vocab:,} tokens, not {other.n_vocab:,}"
    if tok.special != other.special:
        return "other special tokens"
    for id in range(tok.n_vocab):
        if tok.token_bytes(id) != other.token_bytes(id):
            return f"token {id} is {tok.token_bytes(id)!r}, not {other.token_bytes(id)!r}"
    return ""


# --------------------------------------------------------------------------------------------------
# The loss


PIECE_LOGITS = 1 << 24  # 64 MiB, of which there are some copies; a GPU has room for more


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """(N,): the generalized Jensen-Shannon divergence of the teacher's distribution P and the
    student's Q, by their logits (N, V), both divided by the temperature (Agarwal et al. 2024,
    equation 1):

        beta KL(P || M) + (1 - beta) KL(Q || M), where M = beta P + (1 - beta) Q

    beta 0 is the forward divergence, KL(P || Q), and beta 1 the reverse one, KL(Q || P): what its
    gradient's direction tends to there."""
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N,): KL(P || Q) of log-probabilities (N, V)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def distill_sums(
    net: GPT,
    teacher: GPT,
    h: Tensor,
    teacher_h: Tensor,
    labels: Tensor,
    n_vocab: int,
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The sums over N tokens of the divergence and of -log p(label), float32, by the states h
    (N, C) and teacher_h (N, its C) before them; labels (N,) int64, IGNORED for none. n_vocab: ids
    from here on are padding, of which each network has its own.

    Where the logits (N, V) of both networks would be large they are never there as a whole: a
    piece's are made, and for backward made again."""
    most = PIECE_LOGITS if h.device.type == "cpu" else 4 * PIECE_LOGITS
    size = max(1, most // net.config.vocab_size)
    piece_sums = partial(sums_of_piece, net, teacher, n_vocab, beta, temperature)
    pieces = list(zip(h.split(size), teacher_h.split(size), labels.split(size)))
    if len(pieces) > 1:
        # Their order of computation is the same again, and no random number is drawn in a head.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        piece_sums = partial(again, piece_sums)
    sums = [piece_sums(*piece) for piece in pieces]
    soft = torch.stack([soft for soft, _ in sums]).sum()
    hard = torch.stack([hard for _, hard in sums]).sum()
    return soft, hard


def sums_of_piece(
    net: GPT,
    teacher: GPT,
    n_vocab: int,
    beta: float,
    temperature: float,
    h: Tensor,
    teacher_h: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """`distill_sums` of a few tokens."""
    logits = net.logits(h).float()  # (n, V)
    with torch.no_grad():
        teacher_logits = teacher.logits(teacher_h).float()[:, :n_vocab]
    soft = divergence(logits[:, :n_vocab], teacher_logits, beta, temperature).sum()
    hard = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return soft, hard


# --------------------------------------------------------------------------------------------------
# On-policy: answers of the student's own


def last_answer(example: dict) -> int:
    """Where the last answer of an example begins among its targets."""
    targets = example["targets"]
    begin = max(i for i, target in enumerate(targets) if target != IGNORED)
    while begin > 0 and targets[begin - 1] != IGNORED:
        begin -= 1
    return begin


def with_own_answers(
    learner: Learner,
    examples: list[dict],
    fraction: float,
    limit: int,
    max_new_tokens: int,
    seed: int,
    cast: AbstractContextManager,
) -> list[dict]:
    """The examples of a step, of all processes; about `fraction` of them have in the place of their
    last answer one that the student says now (Agarwal et al. 2024, algorithm 1). All have `labels`:
    the data's targets, of which an own answer has none.

    seed: of the step. Which answers are replaced, and by what, depends on no number of processes:
    each generates a part of them, and all get them all."""
    run = learner.run
    net = learner.net
    examples = [e | {"labels": e["targets"]} for e in examples]
    drawn = np.random.default_rng(seed).random(len(examples)) < fraction
    numbers = []
    for number, example in enumerate(examples):
        if drawn[number] and last_answer(example) + 1 < net.config.n_ctx:
            numbers.append(number)
    begin = len(numbers) * run.rank // run.world
    end = len(numbers) * (run.rank + 1) // run.world
    share = numbers[begin:end]
    prompts = [examples[n]["ids"][: last_answer(examples[n]) + 1] for n in share]
    with cast, whole_weights(net):
        generations = generate_all(
            net, learner.tok, prompts, max_new_tokens, first=begin, temperature=1.0, seed=seed
        )
    own = {}
    for number, prompt, generation in zip(share, prompts, generations):
        targets = [IGNORED] * (len(prompt) - 1) + generation.ids
        ids = (prompt + generation.ids)[:-1]
        own[number] = {"ids": ids[:limit], "targets": targets[:limit]}
        own[number]["labels"] = [IGNORED] * len(own[number]["ids"])
    for of_one in gathered(run, own):
        for number, example in of_one.items():
            examples[number] = example
    return examples


def gathered(run: object, value: object) -> list:
    """What every process has, one value after another."""
    if run.world == 1:
        return [value]
    values = [None] * run.world
    dist.all_gather_object(values, value)
    return values
