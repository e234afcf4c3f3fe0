"""What the checks of `bench.py --check` have in common: where they compute, how an error is
measured, and how large it may be.

A check is a generator of Findings. What it cannot look at here it leaves out by raising Skip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from barelm.bpe import bpe_tokenizer
from barelm.run import Run, autocast
from model import GPT, GPTConfig

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from barelm.tokenizer import Tokenizer

# Of a small network: fewer keys than queries, heads as wide as the fast kernels of GPUs want.
SHAPE = dict(vocab_size=320, n_ctx=256, n_layer=2, n_head=4, n_kv_head=2, head_dim=64, n_embd=128)


N_VOCAB = 260  # ids of `endless_tokenizer`: the network's last 60 rows are padding


class Skip(Exception):
    """Why a check cannot be made here."""


@dataclass
class Place:
    """Where the checks compute, and what bench.py was asked for."""

    device: torch.device
    dtype: torch.dtype  # of the machine: the checks compute in it, and some in float32 too
    shape: dict = field(default_factory=dict)  # GPTConfig's, of the network whose speed is told
    tokens: int = 4096  # of its training step
    seq_len: int = 256
    compile: bool = True  # whether anything is compiled at all
    seconds: float = 1.0  # for which a speed is measured, if five rounds fit it

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def run(self) -> Run:
        """This one process, as the functions of a run want it."""
        return Run(self.device)

    def cast(self, dtype: torch.dtype | None = None) -> AbstractContextManager:
        """A context in which a network of float32 weights computes in dtype, or the place's."""
        return autocast(self.device, dtype or self.dtype)


@dataclass
class Finding:
    """A row of the table: a figure, the most that it may be, and words. A figure of 0.0 may be
    asked for; without `allowed` it may be anything above 0."""

    name: str
    figure: float
    allowed: float | None = None
    words: str = ""
    unit: str = ""

    @property
    def verdict(self) -> str:
        good = self.figure > 0 if self.allowed is None else self.figure <= self.allowed
        return "PASS" if good else "FAIL"  # of a NaN neither is true


class Worst:
    """The largest of several errors, and where it was: one row of the table for many shapes."""

    def __init__(self) -> None:
        self.figure = 0.0
        self.where = ""

    def add(self, figure: float, where: str) -> None:
        if math.isnan(self.figure):  # the worst of all
            return
        if not figure <= self.figure:
            self.figure = figure
            self.where = where

    def finding(self, name: str, allowed: float) -> Finding:
        words = f"worst: {self.where}" if self.where else ""
        return Finding(name, self.figure, allowed, words)


def rounding(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of a dtype, as products are made: those of float32 may
    have been allowed the fewer bits of TensorFloat32 or of bfloat16."""
    eps = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return eps
    narrower = {"high": 2.0**-10, "medium": torch.finfo(torch.bfloat16).eps}
    return narrower.get(torch.get_float32_matmul_precision(), eps)


def allowed_error(dtype: torch.dtype, n: int, layers: int = 1) -> float:
    """How large `error` may be, of what was computed in a dtype with sums of n products.

    A number is rounded when it is stored, by half of `rounding` at most; sums are kept in float32
    (of n terms the roundings add up like a random walk). Some of either meet in each element: of a
    layer the inputs of a softmax, its outputs, the result and the gradients behind it. The factor
    is 8 for their number and for the worst element among thousands, which a normal error brings to
    four or five times the usual one."""
    one = rounding(dtype) + torch.finfo(torch.float32).eps * math.sqrt(n)
    return 8 * one * math.sqrt(layers)


def hidden_allowed(dtype: torch.dtype, net: GPT) -> float:
    """How far what a network computes may be from float64: each block rounds in attention, in its
    MLP, and twice in what they are added to; in attention to a source, which was read, once more
    each."""
    c = net.config
    layers = 4 * c.n_layer
    if c.is_seq2seq:
        layers += 2 * c.n_layer + 4 * c.n_encoder_layer
    return allowed_error(dtype, c.n_hidden, layers)


def error(ours: Tensor, truth: Tensor) -> float:
    """The largest difference of an element of `ours` from float64's truth (…, D), over what is
    usual there: the root mean square of its last dimension and of all elements, added up, so that
    neither large rows hide small ones nor rounding in a row of zeros counts. Infinite where ours
    has another shape, or is not finite."""
    ours = ours.detach().cpu().double()
    truth = truth.detach().cpu().double()
    if ours.shape != truth.shape or not bool(ours.isfinite().all()):
        return math.inf
    if truth.numel() == 0:
        return 0.0
    square = truth.square()
    usual = square.mean(-1, keepdim=True).sqrt() + square.mean().sqrt()
    return ((ours - truth).abs() / usual.clamp(min=1e-30)).max().item()


def small_network(device: str | torch.device = "cpu", seed: int = 0, **shape: Any) -> GPT:
    """A random network, the same on every machine; as loud as a trained one, so that its attention
    looks at something and its answers do not repeat the last token."""
    generator = torch.Generator().manual_seed(seed)
    net = GPT(GPTConfig(**(SHAPE | shape)))
    with torch.no_grad():
        for p in net.parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(draw * p.shape[-1] ** -0.5)
            else:
                p.copy_(1 + 0.1 * draw)
    return net.to(device)


def exact_network(net: GPT) -> GPT:
    """The same weights in float64 on the CPU, computed by model.py's formulas alone."""
    exact = GPT(net.config, fast=False).double()
    with torch.no_grad():
        for ours, theirs in zip(exact.parameters(), net.parameters()):
            ours.copy_(theirs.cpu())
    return exact.eval()


def exact_loss(exact: GPT, ids: Tensor, targets: Tensor, docs: Tensor | None = None) -> Tensor:
    """The mean loss (a scalar, float64) of an exact network: model.py's own sum is float32."""
    logits = exact(ids, docs=docs)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def endless_tokenizer() -> Tokenizer:
    """A tokenizer of 260 ids, none of which ends an answer."""
    tok = bpe_tokenizer([])
    tok.eos_ids = []
    return tok


def random_ids(rows: int, length: int, seed: int = 0, n_vocab: int = 256) -> Tensor:
    """(rows, length) int64 on the CPU, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_vocab, (rows, length), generator=generator)
