"""Whether an ONNX file computes what a network does: onnxruntime's numbers beside ours, on text."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from barelm.onnx_file import has_cache
from barelm.run import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from model import GPT

# Both round each of thousands of sums to float32, in another order: 25 eps of the logits' spread
# for the 30 layers of SmolLM2-135M. A mask or an angle that is wrong makes a million of it.
TOLERANCE = 4096 * torch.finfo(torch.float32).eps
N_STEPS = 4  # tokens that are fed one at a time, through the cache
TEXTS = (
    "The house stood at the end of the road, and nobody had lived in it for years. One morning in "
    "spring a light was seen behind the windows, and by noon the whole village knew about it.",
    "def mean(numbers):\n    return sum(numbers) / len(numbers)\n\nprint(mean([1, 2, 3]))\n",
)


@dataclass
class Agreement:
    """How near two sets of logits are."""

    n_rows: int  # tokens, or texts
    difference: float  # the root of the mean square of the differences, over the spread of ours
    n_sure: int  # rows whose largest logit is ahead by more than rounding
    n_other: int  # of these, rows whose largest logit is another's

    @property
    def good(self) -> bool:
        return self.difference < TOLERANCE and self.n_other == 0  # NaN is not below


def require_onnx() -> Any:
    """The package onnxruntime; onnx and onnxscript are what torch's exporter needs."""
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{error}: pip install onnx onnxscript onnxruntime") from None
    return importlib.import_module("onnxruntime")


def agreement(ours: Tensor, theirs: Tensor) -> Agreement:
    """The Agreement of logits (rows, V)."""
    ours = ours.double()
    square = (theirs.double() - ours).square().mean()
    center = ours.mean(1, keepdim=True) if ours.shape[1] > 1 else 0.0
    spread = (ours - center).square().mean().sqrt()
    difference = (square.sqrt() / spread).item()
    margin = torch.full_like(ours[:, 0], torch.inf)
    if ours.shape[1] > 1:
        first, second = ours.topk(2).values.unbind(1)
        margin = first - second
    sure = margin > 8 * TOLERANCE * spread  # both of them may be off, by several times the mean
    other = sure & (ours.argmax(1) != theirs.argmax(1))
    return Agreement(len(ours), difference, int(sure.sum()), int(other.sum()))


def check_texts(net: GPT, tok: Tokenizer) -> list[list[int]]:
    """Two short texts as ids, the second one shorter, as long as the context allows."""
    most = min(48, net.config.n_ctx)
    texts = []
    for text, n in zip(TEXTS, (most, max(most * 2 // 3, 1))):
        ids = tok.encode(text)
        if not ids:
            raise UserError("--export=onnx: the tokenizer has no token of a text to check with")
        times = -(-n // len(ids))
        texts.append((ids * times)[:n])
    return texts


def check_onnx(net: GPT, tok: Tokenizer, path: Path) -> Agreement:
    """Compare an ONNX file at path with the network: two texts of different lengths in one batch,
    and where there is a cache their last tokens one at a time."""
    texts = check_texts(net, tok)
    ids, mask = left_padded(texts)
    with torch.no_grad():
        ours = [our_logits(net, text) for text in texts]  # (rows, V) each
    try:
        theirs = their_logits(net, path, ids, mask)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        why = str(error).strip().splitlines()[0]
        raise UserError(f"--export=onnx: onnxruntime cannot run this network: {why}") from None
    if theirs.ndim == 2:  # a row of scores for each text
        return agreement(torch.cat(ours), theirs)
    return agreement(torch.cat(ours), theirs[mask.bool()])


def their_logits(net: GPT, path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """What onnxruntime makes of ids (B, T): (B, T, V), or of a classifier (B, labels)."""
    onnxruntime = require_onnx()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    if has_cache(net):
        return cached_logits(net, session, ids, mask)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    outputs = [torch.from_numpy(out) for out in session.run(None, feed)]
    if len(outputs) == 1:
        return outputs[0]
    return torch.stack(outputs, -1)  # the scores of each token as a start, and as an end


def our_logits(net: GPT, text: list[int]) -> Tensor:
    """What the network makes of a text by itself: (T, V), or of a classifier (1, labels)."""
    ids = torch.tensor([text])
    if net.score is None:
        return net(ids)[0].float()
    lengths = torch.tensor([len(text)])
    if net.task == "classify":
        return net.scores_of(ids, lengths)
    return net.score_states(net.states(ids, lengths))[0]


def left_padded(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids (B, T), the mask (B, T) int64 that is 0 before each text) of texts."""
    longest = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :] = torch.tensor(text)
        mask[row, longest - len(text) :] = 1
    return ids, mask


def cached_logits(net: GPT, session: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits (B, T, V) of ids (B, T): all but the last few at once, then one at a time."""
    c = net.config
    T = ids.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    names = [f"{i}.{part}" for i in range(c.n_layer) for part in ("key", "value")]
    empty = torch.zeros(len(ids), c.n_kv_head, 0, c.head_dim).numpy()
    past = dict.fromkeys(names, empty)
    first = max(T - N_STEPS, 1)
    logits = []
    for begin, end in [(0, first), *((i, i + 1) for i in range(first, T))]:
        feed = {f"past_key_values.{name}": value for name, value in past.items()}
        feed["input_ids"] = ids[:, begin:end].numpy()
        feed["attention_mask"] = mask[:, :end].numpy()
        feed["position_ids"] = positions[:, begin:end].numpy()
        out, *present = session.run(["logits", *(f"present.{name}" for name in names)], feed)
        past = dict(zip(names, present))
        logits.append(torch.from_numpy(out))
    return torch.cat(logits, 1)
