"""Speculative decoding (Leviathan et al. 2023, Chen et al. 2023): several tokens by one pass.

    [answer] = generate(net, tok, prompts, speculate=4, draft=small)  # a network, "heads", "lookup"

A draft that costs little proposes tokens, each with the probabilities q it was drawn by. The
network reads all of them in one pass, which gives its own probabilities p at every place. `verify`
accepts a part of them, so that the text is distributed exactly as without a draft: a bad draft
costs time alone. Penalties, temperature and filters are applied to p and to q alike.

Passes of k + 1 tokens round otherwise than those of one: where two tokens are next to equally
likely the text may differ from the ordinary one, but not with --deterministic.

B: rows, k: drafts of a row in a round, V: tokens of the vocabulary, C: n_embd, T: tokens to read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

from barelm.fast import generating
from barelm.run import UserError
from barelm.sampling import FILTERS, distribution, draws, invert, kinds_of, penalize

if TYPE_CHECKING:
    from torch import Tensor

    from barelm.texts import Generation, Row
    from barelm.tokenizer import Tokenizer
    from model import GPT

LONGEST = 3  # tokens that a lookup compares, at most


def check_speculation(
    net: GPT, n_vocab: int, speculate: int, draft: GPT | str, num_beams: int = 1
) -> None:
    """Refuse a draft that the network cannot have; arguments as of model.generate."""
    asked = f"speculate={speculate}"
    if num_beams > 1:
        raise UserError(f"{asked} with num_beams={num_beams}: a beam search draws no tokens")
    c = net.config
    for config in (c, network_of(draft, net).config):
        if not config.causal or config.is_seq2seq:
            raise UserError(f"{asked}: for decoders, not for encoders or encoder-decoders")
    if draft == "heads" and not c.mtp:
        raise UserError(f"{asked}: the model has no heads for it: train.py --mtp={speculate}")
    if c.mtp and draft in (None, "heads") and speculate > c.mtp:
        raise UserError(f"{asked}: the model's heads (mtp) look {c.mtp} tokens ahead, not further")
    if isinstance(draft, nn.Module):
        if draft.score is not None:
            raise UserError(f"{asked}: the draft is a classifier, which says nothing")
        if draft.config.vocab_size < n_vocab:
            why = f"{draft.config.vocab_size} tokens of the tokenizer's {n_vocab}"
            raise UserError(f"{asked}: the draft knows {why}")
    elif draft not in (None, *DRAFTS):
        raise UserError(f"draft={draft!r}: expected a network or one of {', '.join(DRAFTS)}")


def verify(
    p: Tensor, q: Tensor, drafts: Tensor, is_proposed: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """(how many drafts of each row are accepted (B,), the token behind them (B,)).

    p (B, k + 1, V): the network's probabilities before each draft and behind the last; q (B, k, V):
    those by which drafts (B, k) int64 were drawn; is_proposed (B, k) bool: false of what is no
    draft; uniform (B, k + 1): the draws. Leviathan et al. 2023, algorithm 1: a draft x is accepted
    with probability min(1, p(x) / q(x)), up to the first that is not, in whose place a token is
    drawn from max(0, p - q). Behind k accepted ones it is drawn from p."""
    q = q * is_proposed[..., None]
    k = drafts.shape[1]
    p_of_draft = p[:, :k].gather(-1, drafts[..., None])[..., 0]  # (B, k)
    q_of_draft = q.gather(-1, drafts[..., None])[..., 0]
    is_accepted = is_proposed & (uniform[:, :k] * q_of_draft < p_of_draft)
    n_accepted = is_accepted.cumprod(1).sum(1)  # (B,)

    rows = torch.arange(len(p), device=p.device)
    q = F.pad(q, (0, 0, 0, 1))  # behind the last draft nothing was proposed: all of p is left
    p = p[rows, n_accepted]  # (B, V)
    left = (p - q[rows, n_accepted]).clamp(min=0)
    # Where p is q no draft is refused but by a rounding.
    left = left.where(left.sum(-1, keepdim=True) > 0, p)
    return n_accepted, invert(left, uniform[:, k])


class Chooser:
    """How tokens are chosen: the same options for all rows, for the network and for its draft."""

    def __init__(self, penalty: float, filters: dict[str, float]) -> None:
        self.penalty = penalty
        self.filters = filters
        self.kinds = kinds_of([filters])

    def __call__(self, logits: Tensor, texts: Texts, first: int = 0) -> Tensor:
        """The probabilities (B, T, V) by which a token is chosen, from logits (B, T, V) that follow
        each text and its first `first`, `first` + 1 … drafts."""
        B, T, V = logits.shape
        logits = logits.float()
        if self.penalty != 1:
            seen = [texts.seen(first + j, V) for j in range(T)]
            logits = penalize(logits, torch.stack(seen, 1), self.penalty)
        logits = logits.flatten(0, 1)  # (B T, V)
        columns = {name: logits.new_full((B * T, 1), self.filters[name]) for name in FILTERS}
        return distribution(logits, columns, self.kinds).view(B, T, V)


class Texts:
    """The rows' tokens so far, and behind those of each row its drafts.

    tokens: lists, as the host knows them; ids (B, room) int64, the same on the device."""

    def __init__(self, prompts: list[list[int]], room: int, device: torch.device) -> None:
        self.tokens = [list(prompt) for prompt in prompts]
        rows = [torch.tensor(prompt) for prompt in prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self.ids = F.pad(ids, (0, room - ids.shape[1])).to(device)
        self.places = torch.arange(room, device=device)
        self.count()

    def count(self) -> None:
        self.lengths = [len(tokens) for tokens in self.tokens]
        self.ends = torch.tensor(self.lengths, device=self.ids.device)  # (B,)

    def window(self, begins: Tensor, T: int) -> Tensor:
        """The T tokens (B, T) from a place of each row on, begins (B,)."""
        return self.ids.gather(1, begins[:, None] + self.places[:T])

    def put(self, j: int | Tensor, tokens: Tensor) -> None:
        """Make tokens (B,) each row's draft number j, an int or (B,)."""
        self.ids.scatter_(1, (self.ends + j)[:, None], tokens[:, None])

    def seen(self, n_drafts: int, V: int) -> Tensor:
        """Which tokens (B, V) bool each row has, its first n_drafts drafts among them."""
        is_there = self.places < self.ends[:, None] + n_drafts  # (B, room)
        columns = self.ids.where(is_there, V)  # one column more, for places without a token
        seen = torch.zeros(len(self.ids), V + 1, dtype=torch.bool, device=self.ids.device)
        return seen.scatter_(1, columns, True)[:, :V]

    def select(self, rows: list[int], index: Tensor) -> None:
        self.tokens = [self.tokens[row] for row in rows]
        self.ids = self.ids[index]
        self.count()


class Reader:
    """A network with a cache of what it has read of each text."""

    keeps_states = False  # a draft may want them
    states = None  # (B, room, C) of what was read

    def __init__(self, net: GPT, n_rows: int, room: int, k: int) -> None:
        self.net = net
        self.cache = net.make_cache(n_rows, room, slack=k)  # drafts that may have to be forgotten
        self.n_read = [0] * n_rows

    def rewind(self, texts: Texts) -> None:
        """Forget what is no part of the texts, and the last token, which is read again."""
        self.n_read = [min(n, length - 1) for n, length in zip(self.n_read, texts.lengths)]
        self.cache.truncate(self.n_read)

    def read(self, texts: Texts, n_drafts: int, n_states: int) -> Tensor:
        """Read on to the end of n_drafts drafts: the last n_states hidden states of each row."""
        begins, counts, n_new = span(self.n_read, [n + n_drafts for n in texts.lengths], texts)
        T = max(counts)
        h = self.net.hidden(texts.window(begins, T), cache=self.cache, n_new=n_new)  # (B, T, C)
        if self.keeps_states:
            self.keep(h, begins[:, None] + texts.places[:T], len(texts.places))
        self.n_read = [n + n_drafts for n in texts.lengths]
        return last_states(h, counts, n_states)

    def keep(self, h: Tensor, places: Tensor, room: int) -> None:
        """Keep states h (B, T, C) by their places (B, T); padding is written over later."""
        if self.states is None:
            self.states = h.new_zeros(len(h), room, h.shape[-1])
        self.states.scatter_(1, places[..., None].expand_as(h), h)

    def select(self, rows: list[int], index: Tensor) -> None:
        self.n_read = [self.n_read[row] for row in rows]
        self.cache.reorder(index)
        if self.states is not None:
            self.states = self.states[index]


def span(
    begins: list[int], ends: list[int], texts: Texts
) -> tuple[Tensor, list[int], Tensor | None]:
    """(begins (B,) on the device, [tokens up to `ends` of each row], these as `hidden`'s n_new)."""
    counts = [end - begin for begin, end in zip(begins, ends)]
    n_new = None  # equal counts keep a cache even
    if len(set(counts)) > 1:
        n_new = torch.tensor(counts, device=texts.ids.device)
    return torch.tensor(begins, device=texts.ids.device), counts, n_new


def last_states(h: Tensor, counts: list[int], n: int) -> Tensor:
    """The last n (B, n, C) of each row's first counts[b] states of h (B, T, C)."""
    first = torch.tensor(counts, device=h.device) - n
    index = first[:, None] + torch.arange(n, device=h.device)
    return h.gather(1, index[..., None].expand(-1, -1, h.shape[-1]))


# --------------------------------------------------------------------------------------------------
# Drafts: `propose` puts at most k tokens a row into the texts and returns their q (B, k, V), and
# which of them are drafts (B, k) bool


class LookupDraft:
    """What followed the last tokens where they stood before in the text (prompt lookup, Saxena
    2023): it needs no network, and pays where a text repeats itself."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def propose(self, texts: Texts, k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
        followed = [what_followed(tokens, k) for tokens in texts.tokens]
        k = max(map(len, followed))
        padded = [ids + [0] * (k - len(ids)) for ids in followed]
        ids = torch.tensor(padded, dtype=torch.int64, device=texts.ids.device)  # (B, k)
        counts = torch.tensor(list(map(len, followed)), device=ids.device)
        for j in range(k):
            texts.put(j, ids[:, j])
        return F.one_hot(ids, self.n_vocab).float(), texts.places[:k] < counts[:, None]

    def select(self, rows: list[int], index: Tensor) -> None:
        pass


def what_followed(tokens: list[int], k: int, longest: int = LONGEST) -> list[int]:
    """At most k of the tokens that followed where the last ones of a list, as many of them as
    possible, stood most recently; none where even the last one is new."""
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for begin in range(len(tokens) - n - 1, -1, -1):
            if tokens[begin : begin + n] == tokens[-n:]:
                return tokens[begin + n : begin + n + k]
    return []


class NetworkDraft:
    """A smaller network with the same tokenizer."""

    def __init__(
        self, net: GPT, choose: Chooser, n_vocab: int, n_rows: int, room: int, k: int
    ) -> None:
        self.reader = Reader(net, n_rows, room, k)
        self.choose = choose
        self.n_vocab = n_vocab

    def propose(self, texts: Texts, k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
        self.reader.rewind(texts)
        q = []
        for j in range(k):
            h = self.reader.read(texts, j, 1)
            logits = self.reader.net.logits(h)[..., : self.n_vocab]  # (B, 1, V)
            q.append(self.choose(logits, texts, j))
            texts.put(j, invert(q[j][:, 0], uniform[:, j]))
        return torch.cat(q, 1), all_proposed(texts, k)

    def select(self, rows: list[int], index: Tensor) -> None:
        self.reader.select(rows, index)


class HeadsDraft:
    """The network's own heads for tokens further ahead (mtp), one after the other.

    The head of depth d reads, at the place of each token, the state of depth d - 1 and the token d
    places on, which at the end is a draft: what it made of that is read again in the next round."""

    def __init__(
        self, net: GPT, choose: Chooser, n_vocab: int, n_rows: int, room: int, target: Reader
    ) -> None:
        c = net.config
        self.net = net
        self.choose = choose
        self.n_vocab = n_vocab
        self.target = target
        target.keeps_states = True
        whole: dict = dict(
            window=0, layers="", attention="sliding", sink_tokens=0, local_rope_theta=0.0
        )
        plain = replace(c, n_layer=c.mtp, **whole)  # its blocks see all
        self.cache = net.make_cache(n_rows, room, plain)
        self.n_read = [0] * n_rows  # places of which all heads read what is there, and no draft

    def propose(self, texts: Texts, k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
        ends = [length - 1 for length in texts.lengths]  # the last token has no state yet
        begins, counts, n_new = span(self.n_read, ends, texts)
        T = max(counts)
        self.cache.truncate(self.n_read)
        positions = self.cache.extend(T, n_new)
        h = self.states(begins, T)
        net = self.net
        looks = net.looks(net.model.mtp, h, positions, cache=self.cache)
        q = []
        for j in range(k):
            h = net.ahead(j, h, texts.window(begins + j + 1, T), looks, self.cache)
            logits = net.logits(last_states(h, counts, 1))[..., : self.n_vocab]  # (B, 1, V)
            q.append(self.choose(logits, texts, j))
            texts.put(j, invert(q[j][:, 0], uniform[:, j]))
        self.n_read = [max(0, length - net.config.mtp) for length in texts.lengths]
        return torch.cat(q, 1), all_proposed(texts, k)

    def states(self, begins: Tensor, T: int) -> Tensor:
        """The network's own states (B, T, C) from a place of each row on."""
        places = begins[:, None] + torch.arange(T, device=begins.device)
        states = self.target.states
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def select(self, rows: list[int], index: Tensor) -> None:
        self.n_read = [self.n_read[row] for row in rows]
        self.cache.reorder(index)


def all_proposed(texts: Texts, k: int) -> Tensor:
    return torch.ones(len(texts.ids), k, dtype=torch.bool, device=texts.ids.device)


DRAFTS = ("heads", "lookup")


def network_of(draft: GPT | str | None, net: GPT) -> GPT:
    """The network that drafts for net: another, or net itself."""
    return draft if isinstance(draft, nn.Module) else net


def make_draft(draft: GPT | str, target: Reader, choose: Chooser, n_vocab: int, n_rows: int,
               room: int, k: int) -> HeadsDraft | LookupDraft | NetworkDraft:  # fmt: skip
    """The draft that `generate` was given, for the network of a Reader: another network, or one of
    DRAFTS; None is its heads where it has some."""
    if isinstance(draft, nn.Module):
        return NetworkDraft(draft, choose, n_vocab, n_rows, room, k)
    if draft == "lookup" or not target.net.config.mtp:
        return LookupDraft(n_vocab)
    return HeadsDraft(target.net, choose, n_vocab, n_rows, room, target)


# --------------------------------------------------------------------------------------------------
# A generation


def summary(generations: list[Generation]) -> str:
    """What speculation did for these Generations, in words."""
    n_ids = sum(len(g.ids) for g in generations)
    passes = sum(g.passes for g in generations)
    drafted = sum(g.drafted for g in generations)
    accepted = sum(g.accepted for g in generations)
    return (
        f"speculate: {accepted} of {drafted} drafts accepted "
        f"({100 * accepted / max(drafted, 1):.0f} %), {n_ids / max(passes, 1):.2f} tokens a pass"
    )


def speculate_rows(net: GPT, tok: Tokenizer, prompts: list[list[int]], rows: list[Row], seed: int,
                   penalty: float, filters: dict[str, float], k: int,
                   draft: GPT | str) -> None:  # fmt: skip
    """Feed model.py's `rows` with what follows their prompts until all are done, k drafts a pass.
    Each row counts its passes, drafts and those accepted."""
    with generating(network_of(draft, net)):
        speculation = Speculation(net, tok, prompts, rows, penalty, filters, k, draft)
        speculation.run(seed)


class Speculation:
    """The rows that are not done, and what is there to go on with them."""

    def __init__(self, net: GPT, tok: Tokenizer, prompts: list[list[int]], rows: list[Row],
                 penalty: float, filters: dict[str, float], k: int,
                 draft: GPT | str) -> None:  # fmt: skip
        self.net = net
        self.rows = rows
        self.k = k
        self.n_vocab = min(tok.n_vocab, net.config.vocab_size)  # ids from here on are padding
        # The drafts behind a text's last token are read before it is known to be the last.
        room = max(len(prompt) + row.limit for prompt, row in zip(prompts, rows)) + k + 1
        self.texts = Texts(prompts, room, net.model.embed_tokens.weight.device)
        self.choose = Chooser(penalty, filters)
        self.target = Reader(net, len(rows), room, k)
        options = (self.choose, self.n_vocab, len(rows), room, k)
        self.draft = make_draft(draft, self.target, *options)

    def run(self, seed: int) -> None:
        """Rounds until all rows are done. Of a row's draws each round has its own: for k drafts,
        for k decisions on them, and for the token behind those accepted."""
        k = self.k
        limit = max(row.limit for row in self.rows)
        drawn = [draws(seed, row.number, limit * (2 * k + 1)) for row in self.rows]
        uniform = torch.stack(drawn).view(-1, limit, 2 * k + 1).to(self.texts.ids.device)
        q, is_proposed = self.nothing()  # the prompt is read without a draft
        for t in range(limit):
            self.round(q, is_proposed, uniform[:, t, k:])
            live = [i for i, row in enumerate(self.rows) if not row.done]
            if not live:
                return
            if len(live) < len(self.rows):
                uniform = self.leave(live, uniform)
            q, is_proposed = self.propose(uniform[:, t + 1, :k])

    def nothing(self) -> tuple[Tensor, Tensor]:
        """q and is_proposed of no drafts."""
        n = len(self.rows)
        device = self.texts.ids.device
        q = torch.zeros(n, 0, self.n_vocab, device=device)
        return q, torch.zeros(n, 0, dtype=torch.bool, device=device)

    def propose(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, n, V) and is_proposed (B, n) of the drafts of a round, n of them at most k; of a
        row no more than its limit leaves to its last token."""
        most = [min(self.k, row.limit - len(row.out.ids) - 1) for row in self.rows]
        if max(most) == 0:
            return self.nothing()
        q, is_proposed = self.draft.propose(self.texts, max(most), uniform)
        most = torch.tensor(most, device=q.device)
        return q, is_proposed & (self.texts.places[: q.shape[1]] < most[:, None])

    def round(self, q: Tensor, is_proposed: Tensor, uniform: Tensor) -> None:
        """One pass over the drafts: the rows take those accepted, and a token more."""
        texts = self.texts
        n = q.shape[1]
        if any(self.target.n_read):
            self.target.rewind(texts)
        logits = self.net.logits(self.target.read(texts, n, n + 1))  # (B, n + 1, V)
        logits = logits[..., : self.n_vocab].float()
        p = self.choose(logits, texts)
        # A round of fewer drafts has the draws of its decisions, and the last one, as one of k.
        uniform = torch.cat((uniform[:, :n], uniform[:, -1:]), 1)
        drafts = texts.window(texts.ends, n)
        n_accepted, tokens = verify(p, q, drafts, is_proposed, uniform)
        texts.put(n_accepted, tokens)
        ids = texts.window(texts.ends, n + 1)
        logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        self.take(ids.tolist(), logp.tolist(), n_accepted.tolist(), is_proposed.sum(1).tolist())

    def take(self, ids: list[list[int]], logprobs: list[list[float]], n_accepted: list[int],
             n_proposed: list[int]) -> None:  # fmt: skip
        """Give the rows the accepted ones of their ids, and the one behind them."""
        for i, row in enumerate(self.rows):
            n = n_accepted[i] + 1
            for token, logprob in zip(ids[i][:n], logprobs[i][:n]):
                row.take(token, logprob)
            self.texts.tokens[i] += ids[i][:n]
            row.out.passes += 1
            row.out.drafted += n_proposed[i]
            row.out.accepted += n_accepted[i]
        self.texts.count()

    def leave(self, live: list[int], uniform: Tensor) -> Tensor:
        """Go on with the rows of these numbers alone; returns their draws."""
        index = torch.tensor(live, device=self.texts.ids.device)
        self.rows = [self.rows[i] for i in live]
        for part in (self.texts, self.target, self.draft):
            part.select(live, index)
        return uniform[index]
