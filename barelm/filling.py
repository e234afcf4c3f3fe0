"""What is predicted where a text has gaps: by an encoder behind its masks, by an encoder-decoder
where spans were cut out.

    [best] = fill(net, tok, "The [MASK] of France", 5)  # a list for each mask
    best[0]  # (" capital", 0.43): the likeliest token's text, and its probability

C: n_embd, V: the vocabulary.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from barelm.examples import device_of
from barelm.fast import head_rows
from barelm.objectives import IGNORED
from barelm.run import UserError


@torch.no_grad()
def score_targets(net, batch, docs=None):
    """(B, 3) float64 of a batch, the network's arguments by name with their targets: of each row
    the sum of -log p(target) in nats, the number of targets, how many are the likeliest token."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "targets"}
    h = net.hidden(**inputs, docs=docs)  # (B, T, C)
    is_target = batch["targets"] != IGNORED
    states = h[is_target]  # (N, C)
    targets = batch["targets"][is_target]  # (N,)
    rows = is_target.nonzero()[:, 0]  # (N,): the row that each is of
    size = head_rows(h.device.type, h.dtype, net.config.vocab_size)  # logits of so many at once
    totals = torch.zeros(len(h), 3, dtype=torch.float64, device=h.device)
    for part, right, row in zip(states.split(size), targets.split(size), rows.split(size)):
        logits = net.logits(part).float()  # (size, V)
        logp = logits.log_softmax(-1).gather(1, right[:, None])[:, 0]
        is_right = logits.argmax(-1) == right
        figures = torch.stack([-logp.double(), torch.ones_like(logp).double(), is_right.double()])
        totals.index_add_(0, row, figures.T)
    return totals


def padded_batch(rows, device):
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


# --------------------------------------------------------------------------------------------------
# Masks in a text


def masked_ids(tok, text):
    """The ids of a text in which the mask token's name, such as [MASK], stands for that token, with
    what the tokenizer puts before a text and behind it; and the places of the masks in them."""
    if tok.mask_id is None:
        raise UserError("this tokenizer has no mask token: its model was not trained to fill masks")
    [name] = [name for name, id in tok.special.items() if id == tok.mask_id]
    [entry] = [entry for entry in tok.spec["added_tokens"] if entry["content"] == name]
    parts = text.split(name)
    ids = list(tok.start)
    places = []
    for i, part in enumerate(parts):
        if i > 0:
            places.append(len(ids))
            ids.append(tok.mask_id)
        if entry.get("lstrip") and i + 1 < len(parts):
            part = part.rstrip()  # the mask stands for a token, blank and all
        if entry.get("rstrip") and i > 0:
            part = part.lstrip()
        normal = tok.encoder.normal(part)
        ids += [id for id, _, _ in tok.encoder.spans(normal, i == 0)]
    if not places:
        raise UserError(f"nothing to fill: expected {name} in the prompt {text[:60]!r}")
    return ids + tok.finish, places


@torch.no_grad()
def fill(net, tok, text, k):
    """For each mask of a text the k likeliest tokens there, [[(text, probability)]], the likeliest
    first. Each mask is filled by itself, with the others as masks."""
    ids, places = masked_ids(tok, text)
    if len(ids) > net.config.n_ctx:
        raise UserError(f"a prompt of {len(ids)} tokens: the context is {net.config.n_ctx}")
    h = net.hidden(torch.tensor([ids], device=device_of(net)))[0, places]  # (masks, C)
    logits = net.logits(h).float()[:, : tok.n_vocab]
    best = logits.softmax(-1).topk(min(k or tok.n_vocab, tok.n_vocab))
    fills = []
    for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist()):
        pieces = [shown_text(tok, [token]) for token in tokens]
        fills.append(list(zip(pieces, probabilities)))
    return fills


def shown_text(tok, ids):
    """The text of ids as it stands within a text: with the blank before its first word."""
    return b"".join(tok.shown.get(id, b"") for id in ids).decode(errors="replace")


# --------------------------------------------------------------------------------------------------
# What train.py shows at a validation


def gap_text(tok, guess, right):
    """[guess], or where it is not right [guess|right]; both are lists of ids."""
    if guess == right:
        return f"[{shown_text(tok, guess)}]"
    return f"[{shown_text(tok, guess)}|{shown_text(tok, right)}]"


@torch.no_grad()
def filled_line(net, tok, batch, n):
    """The first n tokens of a batch's first window, with the likeliest token at each target: [it],
    or [it|the right one]."""
    ids = batch["ids"][:1]
    net.eval()
    guesses = net.logits(net.hidden(ids))[0].argmax(-1).tolist()  # (T,)
    net.train()
    targets = batch["targets"][0].tolist()
    text = ""
    for token, guess, right in list(zip(ids[0].tolist(), guesses, targets))[:n]:
        if right == IGNORED:
            text += shown_text(tok, [token])
        else:
            text += gap_text(tok, [guess], [right])
    return text


@torch.no_grad()
def spans_line(net, tok, batch, n):
    """The first n tokens of what the encoder reads in a batch's first window, with what the decoder
    writes for each span, n tokens in all: [it], or [it|the right one]."""
    source = batch["encoder_ids"][:1]
    net.eval()
    memory = net.encode(source)
    ids = batch["ids"][:1, :1]  # the start token
    for _ in range(min(n, net.config.n_ctx - 1)):  # greedy, and without a cache: it is short
        logits = net.logits(net.hidden(ids, memory=memory)[:, -1])  # (1, V)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    net.train()
    written = spans_of(tok, ids[0, 1:].tolist())
    right = spans_of(tok, batch["targets"][0].tolist())
    text = ""
    for token in source[0, :n].tolist():
        if token in right:
            text += gap_text(tok, written.get(token, []), right[token])
        else:
            text += shown_text(tok, [token])
    return text


def spans_of(tok, ids):
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
