"""What is predicted where a text has gaps: by an encoder behind its masks, by an encoder-decoder
where spans were cut out.

    [best] = fill(net, tok, "The [MASK] of France", 5)  # a list for each mask
    best[0]  # (" capital", 0.43): the likeliest token's text, and its probability
    text = fill_spans(net, tok, "The <extra_id_0> of France", 20)

C: n_embd, V: the vocabulary.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from barelm.compiled import Ways
from barelm.devices import wide_dtype, widen
from barelm.examples import IGNORED, device_of
from barelm.fast import head_rows
from barelm.run import UserError
from model import at_places

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from model import GPT


@torch.no_grad()
def score_targets(net: GPT, batch: dict[str, Tensor], docs: Tensor | None = None) -> Tensor:
    """(B, 3) float64 of a batch, the network's arguments by name with their targets: of each row
    the sum of -log p(target) in nats, the number of targets, how many are the likeliest token."""
    inputs = {name: t for name, t in batch.items() if name not in ("targets", "places")}
    return score_states(net, net.hidden(**inputs, docs=docs), batch)


def score_states(net: GPT, h: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """`score_targets` of the final states h (B, T, C) of a batch."""
    if "places" in batch:
        h = at_places(h, batch["places"])  # (B, n, C)
    is_target = batch["targets"] != IGNORED
    states = h[is_target]  # (N, C)
    targets = batch["targets"][is_target]  # (N,)
    rows = is_target.nonzero()[:, 0]  # (N,): the row that each is of
    size = head_rows(h.device.type, h.dtype, net.config.vocab_size)  # logits of so many at once
    totals = torch.zeros(len(h), 3, dtype=wide_dtype(h.device), device=h.device)
    for part, right, row in zip(states.split(size), targets.split(size), rows.split(size)):
        logits = net.logits(part).float()  # (size, V)
        logp = logits.log_softmax(-1).gather(1, right[:, None])[:, 0]
        is_right = logits.argmax(-1) == right
        figures = torch.stack([widen(-logp), widen(torch.ones_like(logp)), widen(is_right)])
        totals.index_add_(0, row, figures.T)
    return totals


def padded_batch(rows: list[dict], device: torch.device) -> dict[str, Tensor]:
    """Rows of an Objective, {name: (length,)}, of any lengths, as one batch of the network's
    arguments: padded on the right, with the lengths of what an encoder reads."""
    batch = {}
    for name in rows[0]:
        pad = IGNORED if name == "targets" else 0
        tensors = [torch.from_numpy(row[name]) for row in rows]
        batch[name] = pad_sequence(tensors, batch_first=True, padding_value=pad).to(device)
    read = "encoder_ids" if "encoder_ids" in batch else "ids"
    lengths = torch.tensor([len(row[read]) for row in rows], device=device)
    batch[read.replace("ids", "lengths")] = lengths
    return batch


@contextmanager
def eager(net: GPT) -> Iterator[None]:
    """Within this a network is in eval mode, and its blocks are not compiled ones: these would be
    compiled anew for a text of another length."""
    was_training = net.training
    ways = Ways.of(net)
    Ways().give(net)
    net.eval()
    try:
        yield
    finally:
        ways.give(net)
        net.train(was_training)


# --------------------------------------------------------------------------------------------------
# Gaps in a text


def ids_with_gaps(tok: Tokenizer, text: str, gap_ids: Iterable[int]) -> tuple[list[int], list[int]]:
    """The ids of a text in which the names of these special tokens, such as [MASK], stand for them,
    with what the tokenizer puts before a text and behind it; and their places."""
    entries = {}
    for entry in tok.spec.get("added_tokens", []):
        if entry["id"] in gap_ids:
            entries[entry["content"]] = entry
    pieces = re.split(f"({'|'.join(map(re.escape, entries))})", text)  # text, name, text, …, text
    ids = list(tok.start)
    places = []
    for i, piece in enumerate(pieces):
        if piece in entries:
            places.append(len(ids))
            ids.append(entries[piece]["id"])
            continue
        if i + 1 < len(pieces) and entries[pieces[i + 1]].get("lstrip"):
            piece = piece.rstrip()  # what stands for a token, stands for the blank in it too
        if i > 0 and entries[pieces[i - 1]].get("rstrip"):
            piece = piece.lstrip()
        ids += [id for id, _, _ in tok.encoder.spans(tok.encoder.normal(piece), i == 0)]
    if not places:
        names = ", ".join(list(entries)[:2])
        raise UserError(f"nothing to fill: expected {names} in the prompt {text[:60]!r}")
    return ids + tok.end, places


@torch.no_grad()
def fill(net: GPT, tok: Tokenizer, text: str, k: int) -> list[list[tuple[str, float]]]:
    """For each mask of a text the k likeliest tokens there, [[(text, probability)]], the likeliest
    first. Each mask is filled by itself, with the others as masks."""
    if tok.mask_id is None:
        raise UserError("this tokenizer has no mask token: its model was not trained to fill masks")
    ids, places = ids_with_gaps(tok, text, [tok.mask_id])
    check_length(net, ids)
    with eager(net):
        h = net.hidden(torch.tensor([ids], device=device_of(net)))[0, places]  # (masks, C)
        logits = net.logits(h).float()[:, : tok.n_vocab]
    best = logits.softmax(-1).topk(min(k or tok.n_vocab, tok.n_vocab))
    fills = []
    for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist()):
        pieces = [shown_text(tok, [token]) for token in tokens]
        fills.append(list(zip(pieces, probabilities)))
    return fills


def fill_masks(net: GPT, tok: Tokenizer, text: str) -> str:
    """A text with the likeliest token in the place of each mask."""
    [name] = [name for name, id in tok.special.items() if id == tok.mask_id]
    first, *others = text.split(name)
    filled = first
    for [(token, _)], piece in zip(fill(net, tok, text, 1), others):
        filled = (filled.rstrip() if token.startswith(" ") else filled) + token + piece
    return filled


def fill_spans(net: GPT, tok: Tokenizer, text: str, n: int) -> str:
    """A text with what an encoder-decoder writes, greedily and n tokens in all, for each sentinel
    in it (<extra_id_0>, <extra_id_1>, …)."""
    ids, _ = ids_with_gaps(tok, text, tok.sentinel_ids)
    if not tok.end and tok.end_id is not None:
        ids.append(tok.end_id)
    check_length(net, ids)
    start_id = tok.pad_id if net.start_id is None else net.start_id
    source = torch.tensor([ids], device=device_of(net))
    written = spans_of(tok, write(net, source, start_id, n))
    spans = {id: shown_text(tok, span) for id, span in written.items()}
    for name, id in tok.special.items():
        if id in tok.sentinel_ids:
            text = text.replace(name, spans.get(id, ""))
    return text


# The tokens before a text's beginning, before its end, and before what was between, which comes
# last ("PSM": Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle").
MIDDLE_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen 2.5 Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)  # the last: DeepSeek Coder's


def middle_tokens(tok: Tokenizer) -> tuple[int, ...] | None:
    """The ids of a tokenizer's three tokens of a text with a gap in it, or None."""
    for names in MIDDLE_NAMES:
        if all(name in tok.special for name in names):
            return tuple(tok.special[name] for name in names)
    return None


def check_length(net: GPT, ids: list[int]) -> None:
    if len(ids) > net.config.n_ctx:
        raise UserError(f"a prompt of {len(ids)} tokens: the context is {net.config.n_ctx}")


@torch.no_grad()
def write(net: GPT, source: Tensor, start_id: int, n: int) -> list[int]:
    """The n likeliest ids, one after another, that an encoder-decoder writes of a source (1, S):
    without a cache, since they are few."""
    with eager(net):
        memory = net.encode(source)
        ids = torch.full((1, 1), start_id, device=source.device)
        for _ in range(min(n, net.config.n_ctx - 1)):
            logits = net.logits(net.hidden(ids, memory=memory)[:, -1])  # (1, V)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, 1:].tolist()


def spans_of(tok: Tokenizer, ids: list[int]) -> dict[int, list[int]]:
    """{sentinel: the ids behind it} of what a decoder writes, up to its end."""
    spans = {}
    sentinels = set(tok.sentinel_ids)
    span = []  # what stands before the first sentinel belongs to none
    for id in ids:
        if id in tok.eos_ids:
            break
        if id in sentinels:
            span = spans.setdefault(id, [])
        else:
            span.append(id)
    return spans


def shown_text(tok: Tokenizer, ids: list[int]) -> str:
    """The text of ids as it stands within a text: with the blank before its first word."""
    return b"".join(tok.shown.get(id, b"") for id in ids).decode(errors="replace")


# --------------------------------------------------------------------------------------------------
# What train.py shows at a validation


@torch.no_grad()
def filled_line(net: GPT, tok: Tokenizer, batch: dict[str, Tensor], n: int) -> str:
    """The first n tokens of a batch's first window, with the likeliest token at each target: [it],
    or [it|the right one]."""
    ids = batch["ids"][:1]
    with eager(net):
        guesses = net.logits(net.hidden(ids))[0].argmax(-1).tolist()  # (T,)
    right = dict(zip(batch["places"][0].tolist(), batch["targets"][0].tolist()))
    text = ""
    for place, token in enumerate(ids[0, :n].tolist()):
        if place in right:
            text += gap_text(tok, [guesses[place]], [right[place]])
        else:
            text += shown_text(tok, [token])
    return text


def spans_line(net: GPT, tok: Tokenizer, batch: dict[str, Tensor], n: int) -> str:
    """The first n tokens of what the encoder reads in a batch's first window, with what the decoder
    writes for each span, n tokens in all: [it], or [it|the right one]."""
    source = batch["encoder_ids"][:1]
    written = spans_of(tok, write(net, source, int(batch["ids"][0, 0]), n))
    right = spans_of(tok, batch["targets"][0].tolist())
    text = ""
    for token in source[0, :n].tolist():
        if token in right:
            text += gap_text(tok, written.get(token, []), right[token])
        else:
            text += shown_text(tok, [token])
    return text


def gap_text(tok: Tokenizer, guess: list[int], right: list[int]) -> str:
    """[guess], or where it is not right [guess|right]; both are lists of ids."""
    guess_text = shown_text(tok, guess).replace("\n", "\\n")
    right_text = shown_text(tok, right).replace("\n", "\\n")
    return f"[{guess_text}]" if guess == right else f"[{guess_text}|{right_text}]"
