"""Decoding: a batch grows by a token a step, everything of fixed shape on the device.

    decoder = Decoder(net, tok, n_slots=16, max_len=256)
    with generating(net), torch.no_grad():
        decoder.set(0, prompt, limit=9, options=dict(temperature=0), ends=tok.eos_ids)
        decoder.read({0: prompt})  # or a chunk of it at a time
        while decoder.ready:
            chosen = decoder.choose()  # a token for each slot that is ready
            decoder.feed()  # which is fed: on a GPU before anyone waits for the tokens
            for slot, token in zip(chosen.slots, chosen.wait().tokens):
                ...  # decoder.clear(slot) where its text is complete

A slot is a place for a sequence: a row of the cache and of each tensor of the state. Slots are set
and cleared between steps, and none is ever copied. The lowest serve best: a GPU computes all rows
up to the highest that is ready. What ends at an end token or at its limit is known on the device,
so that the host may read a step's tokens while the next one is computed: such a row neither grows
nor writes over anything, whatever is asked of it until it is cleared.

Layers that see a window keep a ring of it (barelm/layouts.py). An encoder-decoder's prompt is its
source: it is read at once and kept as each layer's keys and values of it, and the tokens begin with
the network's start_id.

On a GPU both halves of a step are CUDA graphs, `feed` one for each bucket of rows and of cache
length, `choose` for rows and Kinds, captured when first needed or ahead by `Decoder.capture`.

C: n_embd, G: heads of keys and values, D: head_dim, V: vocabulary, B: rows of a step, S: places of
the cache that it looks at, T: tokens of a prompt.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from barelm.caches import (
    ChunkCache,
    PackedCache,
    Source,
    StepCache,
    Stores,
    flash_agrees,
    packs,
    pays_to_pack,
)
from barelm.chosen import Chosen
from barelm.devices import widen
from barelm.fast import PlacedProduct
from barelm.graphs import Graphs
from barelm.run import compute_dtype
from barelm.sampling import (
    OFF,
    PENALTIES,
    draw_tokens,
    hold_ends,
    kinds_of,
    penalize,
    power_of_two,
    unpack_bits,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from barelm.jobs import Job
    from barelm.many_adapters import Adapters
    from barelm.sampling import Kinds
    from barelm.tokenizer import Tokenizer
    from model import GPT, GPTConfig


class Decoder:
    """n_slots sequences of at most max_len tokens each, prompt and answer together, of a network.

    All methods want `generating(net)` and no gradients around them. check: look whether all logits
    are finite. graphs: capture CUDA graphs, on a GPU. slack: of the rings (see `can_begin`).
    Arguments are the caller's to check: 0 < len(prompt) and len(prompt) + limit <= max_len; of an
    encoder-decoder len(prompt) <= max_source and 1 + limit <= max_len."""

    def __init__(self, net: GPT, tok: Tokenizer, n_slots: int, max_len: int, *, max_source: int = 0,
                 check: bool = False, graphs: bool = True, slack: int = 0,
                 adapters: Adapters | None = None) -> None:  # fmt: skip
        self.net = net
        self.n_vocab = min(tok.n_vocab, net.config.vocab_size)  # ids from here on are padding
        self.n_slots = n_slots
        self.max_len = max_len
        self.is_seq2seq = net.config.is_seq2seq
        self.check = check
        self.device = net.model.embed_tokens.weight.device
        self.on_gpu = self.device.type == "cuda"
        with torch.inference_mode(False):  # a tensor made within it is not written to outside
            self.make_state(net.config)
            self.make_stores(net.config, max_source, slack)
        self.products = {} if net.fast and self.on_gpu else None
        self.flash = False
        if net.fast and graphs and self.on_gpu and net.config.is_plain:
            with torch.no_grad(), self.computing():
                self.flash = flash_agrees(self)
        self.graphs = Graphs(self.device) if graphs and self.on_gpu else None
        self.buffers = {}  # pinned memory for what `choose` gives, by its shape
        # What the host knows of each slot:
        self.ready = []  # slots that are to get tokens, in order: their prompts are read
        self.unchosen = set()  # those whose logits no token was chosen by
        self.kinds = None  # Kinds of the ready slots' options, and how many alternatives they want
        self.length = [0] * n_slots  # tokens whose keys and values it has (at most, on a GPU)
        self.reached = [0] * n_slots  # the most that it has had since it was empty
        self.source_length = [0] * n_slots  # tokens of an encoder-decoder's source
        self.n_left = [0] * n_slots  # tokens that may come (at most, on a GPU)
        self.prompt_length = [0] * n_slots
        self.options = [OFF] * n_slots
        self.ends_of = [()] * n_slots
        self.n_alternatives = [0] * n_slots
        self.owners = [None] * n_slots
        self.biased = set()  # slots with a bias on some tokens
        self.guided = set()  # those that may have certain tokens alone, which `allow` tells
        self.adapters = adapters  # of which each slot may have one (barelm/many_adapters.py)
        self.adapter = [0] * n_slots  # its number; 0: none
        self.states = {}  # {slot: hidden states (T, C)} of what was read last

    def make_state(self, c: GPTConfig) -> None:
        """The tensors: all there is of a sequence, a row a slot."""
        n = self.n_slots
        device = self.device

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(n, *shape, device=device, dtype=dtype)

        self.lengths = zeros()  # tokens in the cache
        self.newest = zeros()  # the token that was chosen last, which is not in the cache
        self.left = zeros()  # how many tokens may still come; 0: nothing changes any more
        self.drawn = zeros()  # how many were chosen
        self.uniform = zeros(self.max_len + 1, dtype=torch.float32)  # their draws, and one more
        self.ends = zeros(8) - 1  # ids that end the sequence; -1 is none
        self.columns = zeros(len(OFF), dtype=torch.float32)  # options, in OFF's order
        self.logits = zeros(c.vocab_size, dtype=torch.float32).fill_(-torch.inf)  # of what is next
        self.seen = None  # (n, V) bool: tokens of the prompt, once a penalty asks
        self.counts = None  # (n, V) float32: how often each was chosen
        self.bias = None  # (n, V) float32, added to the logits, once a request has one
        self.adapter_of = zeros()  # the number of its adapter
        self.allowed = None  # (n, V) bool: tokens that may come, once a grammar asks
        self.numbers = torch.arange(n, device=device)
        # (1, …): of tokens, and as many as there are slots at least
        self.positions = torch.arange(max(self.max_len, n) + 1, device=device)[None]

    def make_stores(self, c: GPTConfig, max_source: int, slack: int) -> None:
        """Keys and values of what was read, a row a slot."""
        c = self.net.ops.own_heads(c)
        # A CPU attends to float32 faster than to less: it has to convert the rest.
        dtype = torch.float32
        if self.on_gpu:
            dtype = compute_dtype(self.net.model.embed_tokens.weight)
        whole = self.net.deterministic  # keys in the order that they have without a cache
        size = (self.n_slots, self.max_len, self.device, dtype)
        self.stores = Stores(c, *size, slack=slack, whole=whole)
        self.source = None
        if self.is_seq2seq:
            self.source = Source(c, self.n_slots, max_source or c.n_ctx, self.device, dtype)

    @property
    def nbytes(self) -> int:
        """Of all keys and values."""
        return self.stores.nbytes + (self.source.store.nbytes if self.is_seq2seq else 0)

    # ------------------------------------------------------------------ slots

    def set(self, slot: int, prompt: list[int], limit: int, *,
            options: dict[str, float] | None = None, uniform: Tensor | None = None,
            ends: Sequence[int] = (), n_alternatives: int = 0, n_cached: int = 0,
            bias: dict[int, float] | None = None, guided: bool = False, adapter: int = 0,
            owner: Job | None = None) -> None:  # fmt: skip
        """A sequence begins in a slot: prompt (ids, all of it), to which at most `limit` tokens are
        added, until one of `ends`.

        options: what differs from sampling.OFF. uniform: (limit,) float32 on the host, one draw a
        token; not needed where temperature is 0. n_cached: so many of the prompt's first tokens
        have their keys and values in the slot already (`can_begin`): `read` goes on from there.
        bias: {id: what is added to its logit}. guided: before each `choose` `allow` says by which
        tokens the sequence may go on. adapter: the number of its adapter; 0: none.
        owner: anything; it is in Chosen.owners."""
        self.clear(slot)
        options = OFF | (options or {})
        self.options[slot] = options
        self.ends_of[slot] = tuple(ends)
        self.n_alternatives[slot] = n_alternatives
        self.owners[slot] = owner
        self.n_left[slot] = limit
        if self.is_seq2seq:  # what the decoder itself begins with, behind the source
            prompt = [self.net.start_id]
        self.prompt_length[slot] = len(prompt)
        self.length[slot] = n_cached
        if n_cached == 0:
            self.reached[slot] = 0
        self.columns[slot] = self.to_device([options[name] for name in OFF], torch.float32)
        self.drawn[slot].zero_()  # to set a number to 0 would copy it there, and wait
        if uniform is not None:
            self.uniform[slot, : len(uniform)] = uniform.to(self.device, non_blocking=True)
        self.set_ends(slot, list(ends))
        if kinds_of([options]).penalized:
            self.remember(slot, prompt)
        self.adapter[slot] = adapter
        if self.adapters is not None:
            self.adapter_of[slot].fill_(adapter)
        self.set_bias(slot, bias or {})
        self.set_guided(slot, guided)

    def to_device(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        """A list as a tensor on the device, which nobody waits for."""
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    def set_ends(self, slot: int, ends: list[int]) -> None:
        if len(ends) > self.ends.shape[1]:
            with torch.inference_mode(False):  # as in __init__
                wider = self.ends.new_full((self.n_slots, power_of_two(len(ends))), -1)
            wider[:, : self.ends.shape[1]] = self.ends
            self.replace("ends", wider)
        self.ends[slot] = self.to_device(ends + [-1] * (self.ends.shape[1] - len(ends)))

    def remember(self, slot: int, prompt: list[int]) -> None:
        """The tokens of a prompt, for penalties; the first one to have a penalty makes the room."""
        if self.counts is None:
            with torch.inference_mode(False):  # as in __init__
                self.replace("seen", torch.zeros_like(self.logits, dtype=torch.bool))
                self.replace("counts", torch.zeros_like(self.logits))
        self.counts[slot] = 0
        self.seen[slot] = False
        self.seen[slot].index_fill_(0, self.to_device(prompt), True)

    def set_bias(self, slot: int, bias: dict[int, float]) -> None:
        if bias:
            if self.bias is None:
                with torch.inference_mode(False):  # as in __init__
                    self.replace("bias", torch.zeros_like(self.logits))
            self.biased.add(slot)
        if self.bias is not None:
            self.bias[slot].zero_()
            values = self.to_device(list(bias.values()), torch.float32)
            self.bias[slot].index_copy_(0, self.to_device(list(bias)), values)

    def set_guided(self, slot: int, guided: bool) -> None:
        if guided:
            if self.allowed is None:
                with torch.inference_mode(False):  # as in __init__
                    self.replace("allowed", torch.ones_like(self.logits, dtype=torch.bool))
            self.guided.add(slot)
        elif self.allowed is not None:
            self.allowed[slot].fill_(True)

    def allow(self, slots: list[int], masks: Tensor) -> None:
        """The tokens by which guided slots may go on, a bit each: (len(slots), bytes) uint8 on the
        host, as `Guide.allowed` has them. Between `feed` and `choose`."""
        masks = unpack_bits(masks.to(self.device, non_blocking=True), self.allowed.shape[1])
        self.allowed[self.index(slots)] = masks

    def replace(self, name: str, tensor: Tensor) -> None:
        """Another tensor for a part of the state: graphs that have the old one are gone."""
        setattr(self, name, tensor)
        if self.graphs is not None:
            self.graphs.forget("choose_rows")

    def clear(self, slot: int) -> None:
        """The sequence of a slot has left. What it had read stays until the slot is used again."""
        self.unchosen.discard(slot)
        self.biased.discard(slot)
        self.guided.discard(slot)
        self.owners[slot] = None
        if slot in self.ready:
            self.ready.remove(slot)
        self.left[slot].zero_()

    def can_begin(self, slot: int, length: int) -> bool:
        """Whether the first `length` tokens of those that a slot has read last are a beginning to
        go on from: in a ring that has come round the older ones are gone, so that it can only be
        continued from its end, or from `slack` tokens before it."""
        return not self.is_seq2seq and self.stores.can_cut(length, self.reached[slot])

    def copy(self, to: int, source: int, length: int) -> None:
        """Slot `to` gets the keys and values of the first `length` tokens of another."""
        self.stores.copy(to, source, length)
        self.reached[to] = self.reached[source]

    def wipe(self, slot: int) -> None:
        """Zeros for what a slot has read: to attend to NaN, with whatever weight, gives NaN."""
        self.stores.wipe(slot)
        self.reached[slot] = 0
        if self.is_seq2seq:
            self.source.store[:, :, slot] = 0

    # ------------------------------------------------------------------ prompts

    def read(self, chunks: dict[int, list[int]]) -> dict[int, Tensor]:
        """Read prompts, {slot: ids}, each a whole or what follows what the slot has read; a slot is
        `ready` where its prompt ends. Call it after `feed`, not between `choose` and `feed`.
        Returns {slot: hidden states (T, C) of its chunk}; of an encoder-decoder, whose sources are
        read whole, {slot: the start token's (1, C)}."""
        slots = list(chunks)
        lengths = {slot: len(ids) for slot, ids in chunks.items()}
        states = {}
        with self.computing():
            if self.is_seq2seq:
                states = self.read_sources(slots, chunks)
                lengths = dict.fromkeys(slots, 1)
            elif any(self.length[slot] for slot in slots):  # behind others: each by itself
                for slot in slots:
                    states.update(self.read_padded([slot], chunks, self.length[slot]))
            elif pays_to_pack(self.net.config, lengths.values()):
                for group in packs(lengths):
                    # One alone needs no mask, which has the square of its tokens.
                    read_group = self.read_packed if len(group) > 1 else self.read_padded
                    states.update(read_group(group, chunks))
            else:
                states = self.read_padded(slots, chunks)
            for slot in slots:
                self.length[slot] += lengths[slot]
                self.reached[slot] = max(self.reached[slot], self.length[slot])
            ended = [slot for slot in slots if self.length[slot] == self.prompt_length[slot]]
            if ended:
                self.begin_answers(ended, torch.stack([states[slot][-1] for slot in ended]))
        self.states = states
        return states

    def prompt_logits(self, slot: int, n: int) -> Tensor:
        """The logits (n, V) float32 of what follows each of the first n tokens that `read` was last
        given for a slot, -inf for padding of the vocabulary."""
        logits = self.net.logits(self.states[slot][:n]).float()
        logits[:, self.n_vocab :] = -torch.inf
        return logits

    def read_padded(
        self, slots: list[int], chunks: dict[int, list[int]], begin: int = 0
    ) -> dict[int, Tensor]:
        """Of chunks that all begin at the same place, as rows that are as long as the longest."""
        lengths = [len(chunks[slot]) for slot in slots]
        rows = self.index(slots)
        cache = ChunkCache(self, rows, begin, lengths)
        with self.adapted(rows, self.active_adapters(slots)):
            h = self.net.hidden(self.padded(slots, chunks), cache=cache)  # (B, T, C)
        return {slot: h[i, : len(chunks[slot])] for i, slot in enumerate(slots)}

    def padded(self, slots: list[int], chunks: dict[int, list[int]]) -> Tensor:
        """(B, T), padded at the right."""
        rows = [torch.tensor(chunks[slot]) for slot in slots]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids.to(self.device, non_blocking=True)

    def read_sources(self, slots: list[int], chunks: dict[int, list[int]]) -> dict[int, Tensor]:
        """Read whole sources, and behind each of them the start token."""
        lengths = [len(chunks[slot]) for slot in slots]
        for slot, length in zip(slots, lengths):
            self.source_length[slot] = length
        rows = self.index(slots)
        ids = self.padded(slots, chunks)  # (B, S)
        on_device = self.to_device(lengths)
        memory = self.net.encode(ids, on_device)
        self.source.write(rows, self.net.cross_kv(memory), on_device)
        start = torch.full((len(slots), 1), self.net.start_id, device=self.device)
        cache = ChunkCache(self, rows, 0, [1] * len(slots), n_source=max(lengths))
        h = self.net.hidden(start, cache=cache)  # (B, 1, C)
        return dict(zip(slots, h))

    def read_packed(self, slots: list[int], chunks: dict[int, list[int]]) -> dict[int, Tensor]:
        """Of whole prompts, one after the other in one row, each a document."""
        lengths = [len(chunks[slot]) for slot in slots]
        packed = []
        docs = []
        for slot in slots:
            packed += chunks[slot]
            docs += [slot] * len(chunks[slot])
        docs = self.to_device(docs)  # (N,): the slot of each token
        ids = self.to_device(packed)[None]
        cache = PackedCache(self, docs, lengths)
        with self.adapted(docs[None], self.active_adapters(slots), each_token=True):
            h = self.net.hidden(ids, cache=cache, docs=docs[None])[0]
        return dict(zip(slots, h.split(lengths)))

    def begin_answers(self, slots: list[int], h: Tensor) -> None:
        """The prompts of these slots are read, the last tokens' hidden states being h (B, C)."""
        rows = self.index(slots)
        self.keep_logits(rows, h)
        self.lengths[rows] = self.to_device([self.length[slot] for slot in slots])
        self.left[rows] = self.to_device([self.n_left[slot] for slot in slots])
        self.ready = sorted(self.ready + slots)
        self.kinds = None
        self.unchosen.update(slots)

    def keep_logits(self, rows: slice | Tensor, h: Tensor) -> None:
        """Padding of the vocabulary stays at -inf."""
        logits = self.net.logits(h)[:, : self.n_vocab]
        if not isinstance(rows, slice):  # to places by an index torch writes of the same type alone
            logits = logits.to(self.logits.dtype)
        self.logits[rows, : self.n_vocab] = logits

    def index(self, slots: list[int]) -> slice | Tensor:
        """Slots as an index: a slice, which copies nothing, where they follow one another."""
        first = slots[0]
        if slots == list(range(first, first + len(slots))):
            return slice(first, first + len(slots))
        return self.to_device(slots)

    # ------------------------------------------------------------------ a step

    def choose(self) -> Chosen:
        """Choose a token for each ready slot: Chosen. Those of which this was the last that its
        limit allows are ready no more."""
        slots = list(self.ready)
        if self.kinds is None:  # of a slot that has left since they may be too much, never too few
            n = power_of_two(max(self.n_alternatives[slot] for slot in slots))
            kinds = replace(
                kinds_of([self.options[slot] for slot in slots]),
                biased=not self.biased.isdisjoint(slots),
                guided=not self.guided.isdisjoint(slots),
            )
            self.kinds = (kinds, min(n, self.n_vocab))
        rows, places = self.rows_of(slots)
        values = self.run(self.choose_rows, rows, *self.kinds)
        copied = None
        if self.on_gpu:
            values, copied = self.to_host(values)
        owners = [self.owners[slot] for slot in slots]
        wanted = [self.n_alternatives[slot] for slot in slots]
        chosen = Chosen(slots, owners, wanted, values, places, copied)
        self.unchosen.clear()
        self.note_chosen(chosen)
        return chosen

    def note_chosen(self, chosen: Chosen) -> None:
        """What the host knows after `choose`. On a CPU it looks for ends too: what has ended costs
        nothing there, and the others' lengths are known."""
        ids = [None] * len(chosen.slots) if self.on_gpu else chosen.wait().tokens
        for slot, id in zip(chosen.slots, ids):
            self.n_left[slot] -= 1
            if self.n_left[slot] == 0 or id in self.ends_of[slot]:
                self.ready.remove(slot)

    def rows_of(self, slots: list[int]) -> tuple[slice | Tensor, Sequence[int]]:
        """(the rows to compute for these slots; where in them each slot is)."""
        first = 0
        end = slots[-1] + 1
        if self.on_gpu:  # a bucket
            end = min(power_of_two(end), self.n_slots)
        else:
            first = slots[0]
            if end - first >= 2 * len(slots):  # gathering them costs less than rows for nobody
                return self.to_device(slots), range(len(slots))
        return slice(first, end), [slot - first for slot in slots]

    def choose_rows(self, rows: slice | Tensor, kinds: Kinds, n_alternatives: int = 0) -> Tensor:
        """On the device alone: the next token of each of the rows, (B, 2 + 2 n) float64 (on
        mps float32): token, log p, n alternatives, their log p; where `check`, also whether all
        logits are finite."""
        logits = self.logits[rows]  # (B, V)
        columns = uniform = None
        drawn = self.drawn[rows]
        if kinds.sampled or kinds.penalized or kinds.prolonged:
            columns = dict(zip(OFF, self.columns[rows].split(1, 1)))  # (B, 1) each
            uniform = self.uniform[rows].gather(1, drawn[:, None])[:, 0]
        likely = self.changed(logits, rows, kinds, columns, drawn)
        tokens = draw_tokens(likely, uniform, columns, kinds)  # (B,)

        left = self.left[rows]
        active = left.clamp(max=1)  # 0 of a row that has ended
        ended = (tokens[:, None] == self.ends[rows]).any(1)
        self.newest[rows] = tokens
        self.left[rows] = (left - active).masked_fill(ended, 0)
        self.drawn[rows] = drawn + active
        if kinds.penalized:
            places = self.numbers[rows] * self.counts.shape[1] + tokens
            self.counts.view(-1).scatter_add_(0, places, active.float())

        logp = logits.log_softmax(-1)  # (B, V)
        values = [tokens[:, None], logp.gather(1, tokens[:, None])]
        if n_alternatives:
            best = logp.topk(n_alternatives)
            values += [best.indices, best.values]
        if self.check:
            values.append(logits[:, : self.n_vocab].isfinite().all(1, keepdim=True))
        return torch.cat([widen(value) for value in values], 1)

    def changed(
        self,
        logits: Tensor,
        rows: slice | Tensor,
        kinds: Kinds,
        columns: dict | None,
        drawn: Tensor,
    ) -> Tensor:
        """The logits (B, V) that tokens are chosen by, in vLLM's order: bias, min_tokens,
        penalties; then what a grammar does not allow is away."""
        if kinds.biased:
            logits = logits + self.bias[rows]
        if kinds.prolonged:
            is_early = drawn[:, None] < columns["min_tokens"]
            logits = hold_ends(logits, self.ends[rows], is_early)
        if kinds.penalized:
            counts = self.counts[rows]
            seen = self.seen[rows] | (counts > 0)
            repetition, presence, frequency = [columns[name] for name in PENALTIES]
            logits = penalize(logits, seen, repetition, counts, presence, frequency)
        if kinds.guided:
            logits = logits.masked_fill(~self.allowed[rows], -torch.inf)
        return logits

    def feed(self) -> None:
        """Feed each ready slot its newest token, so that `choose` can choose again."""
        if not self.ready:
            return
        if self.unchosen:
            raise RuntimeError(f"slots {self.unchosen} were read, but no token was chosen")
        slots = self.ready
        lengths = [self.length[slot] for slot in slots]
        rows, _ = self.rows_of(slots)
        used = max(lengths) + 1
        even = None
        if self.on_gpu:
            used = min(max(128, power_of_two(used)), self.max_len)
        elif min(lengths) == max(lengths) and rows == slice(slots[0], slots[0] + len(slots)):
            even = used - 1
        with self.computing():
            active = self.active_adapters(slots)
            self.run(self.feed_rows, rows, used, even, self.source_places(slots), active)
        for slot in slots:
            self.length[slot] = min(self.length[slot] + 1, self.max_len)
            self.reached[slot] = max(self.reached[slot], self.length[slot])

    def active_adapters(self, slots: list[int]) -> tuple[int, ...]:
        """The adapters to compute with for these slots: none, the only one, or all. On a GPU all
        where there is one, so that there are but two graphs for a number of rows."""
        numbers = {self.adapter[slot] for slot in slots} - {0}
        if len(numbers) > 1 or (self.on_gpu and numbers):
            return self.adapters.all
        return tuple(numbers)

    def adapted(
        self, rows: slice | Tensor, active: tuple[int, ...], each_token: bool = False
    ) -> contextlib.AbstractContextManager:
        """Within, the network computes with the adapters of these rows' slots; each_token: rows
        (1, N) are the slots of tokens."""
        if not active:
            return contextlib.nullcontext()
        numbers = self.adapter_of[rows]
        return self.adapters.used(self.net, numbers if each_token else numbers[:, None], active)

    def source_places(self, slots: list[int]) -> int:
        """So many places of the sources hold all that these slots have: on a GPU all there are."""
        if not self.is_seq2seq:
            return 0
        if self.on_gpu:
            return len(self.source.places)
        return max(self.source_length[slot] for slot in slots)

    def feed_rows(
        self,
        rows: slice | Tensor,
        used: int,
        even: int | None = None,
        n_source: int = 0,
        active: tuple[int, ...] = (),
    ) -> None:
        """On the device alone: the newest token of each of the rows goes through the network, which
        looks at what `used` tokens have in the cache, and at n_source places of the source. even:
        all rows hold so many tokens, and all grow. active: the adapters that rows may have."""
        cache = StepCache(self, rows, used, even, n_source, self.flash)
        self.net.ops.attend_cached = cache.attend if self.flash else None
        try:
            with self.adapted(rows, active):
                h = self.net.hidden(self.newest[rows][:, None], cache=cache)  # (B, 1, C)
        finally:
            self.net.ops.attend_cached = None
        self.keep_logits(rows, h[:, 0])
        self.lengths[rows] += cache.active

    def run(self, function: Callable, rows: slice | Tensor, *static: object) -> Tensor:
        """function(rows, *static), on a GPU as a graph."""
        if self.graphs is None:
            return function(rows, *static)
        key = (function.__name__, rows.stop, *static)
        return self.graphs.run(key, lambda: function(rows, *static), self.at_rest)

    def to_host(self, values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """(values copied to pinned memory, the event after which they are there)."""
        buffers = self.buffers.get(values.shape)
        if buffers is None:
            empty = partial(torch.empty, values.shape, dtype=values.dtype, pin_memory=True)
            with torch.inference_mode(False):  # as in __init__
                buffers = [empty(), empty(), empty()]
            self.buffers[values.shape] = buffers
        buffer = buffers.pop(0)  # the oldest
        buffers.append(buffer)
        buffer.copy_(values, non_blocking=True)
        return buffer, torch.cuda.current_stream(self.device).record_event()

    # ------------------------------------------------------------------ on a GPU

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Within, the network computes from weights in places that stay: autocast would cast them
        to others, once a block of code, which a graph would go on to read when they are gone."""
        if not self.on_gpu:
            yield
            return
        ops = self.net.ops
        packed = ops.packed
        ops.packed = self.products
        dtype = torch.get_autocast_dtype("cuda")
        enabled = torch.is_autocast_enabled("cuda")
        try:
            with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
                yield
        finally:
            ops.packed = packed

    def refresh(self) -> None:
        """The weights may have changed, in their places: the copies of them change too."""
        for product in (self.products or {}).values():
            if isinstance(product, PlacedProduct):
                product.refresh()

    def forget(self) -> None:
        """The network has other weights, in the places of the old ones: copies of these in other
        layouts are made anew, and with them the graphs that read them."""
        if self.products and self.net.quantize:
            self.products.clear()
        if self.graphs is not None and self.net.quantize:
            self.graphs.drop(list(self.graphs.graphs))
        self.refresh()

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Within, no row is active, so that a step may be tried and changes nothing but logits."""
        left = self.left.clone()
        self.left.zero_()
        try:
            yield
        finally:
            self.left.copy_(left)

    def capture(self, batches: Sequence[int] = (), lengths: Sequence[int] = (),
                options: Sequence[dict] = ()) -> str:  # fmt: skip
        """Capture CUDA graphs ahead, before any slot is set: for these numbers of rows and cache
        lengths, and for `choose` by each of these options (dicts, as of `set`). Returns words: how
        many graphs, seconds, MiB."""
        if self.graphs is None:
            return "no CUDA graphs"
        begun = time.monotonic()
        before = torch.cuda.memory_reserved(self.device)
        for batch in sorted(batches, reverse=True):  # the largest first: the others fit its memory
            rows = slice(0, min(power_of_two(batch), self.n_slots))
            for length in sorted(lengths, reverse=True):
                with self.computing():
                    used = min(length, self.max_len)
                    self.run(self.feed_rows, rows, used, None, self.source_places([]), ())
            for option in options:
                self.run(self.choose_rows, rows, kinds_of([OFF | option]), 0)
        torch.cuda.synchronize(self.device)
        mib = (torch.cuda.memory_reserved(self.device) - before) / 2**20
        seconds = time.monotonic() - begun
        return f"{len(self.graphs.graphs)} CUDA graphs, {seconds:.1f} s, {mib:.0f} MiB"
