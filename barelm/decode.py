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

On a GPU both halves of a step are CUDA graphs, `feed` one for each bucket of rows and of cache
length, `choose` for rows and Kinds, captured when first needed or ahead by `Decoder.capture`.

C: n_embd, G: heads of keys and values, D: head_dim, V: vocabulary, B: rows of a step, S: places of
the cache that it looks at, T: tokens of a prompt.
"""

import contextlib
import sys
import time
import weakref
from dataclasses import dataclass

import torch
import torch.nn as nn

from barelm.run import compute_dtype
from barelm.sampling import OFF, draw_tokens, kinds_of, penalize, power_of_two


@dataclass
class Tokens:
    """A step's tokens, one of each of Chosen.slots."""

    tokens: list[int]
    logprobs: list[float]  # the model's own, in nats: without penalties, temperature and filters
    finite: list[bool]  # whether all logits were finite; true where the decoder does not check
    alternatives: list[dict[int, float]]  # {id: log p} of the likeliest, as many as were asked for


class Chosen:
    """Tokens under way to the host. slots: whose they are, in order; owners: what `set` was given
    of each. Of a row that has ended meanwhile there is a token too, which means nothing."""

    def __init__(self, slots, owners, n_alternatives, values, copied=None):
        self.slots = slots
        self.owners = owners
        self.n_alternatives = n_alternatives
        self.values = values  # (B, 3 + 2 n) float64 on the host, a row for each of slots
        self.copied = copied  # the event after which they are there; None: they are

    def wait(self):
        """The Tokens; on a GPU at most two steps later, as there are two buffers to read from."""
        if self.copied is not None:
            self.copied.synchronize()
        rows = self.values.tolist()
        n = (self.values.shape[1] - 3) // 2
        alternatives = []
        for row, wanted in zip(rows, self.n_alternatives):
            ids = [int(id) for id in row[3 : 3 + wanted]]
            alternatives.append(dict(zip(ids, row[3 + n :])))
        return Tokens(
            tokens=[int(row[0]) for row in rows],
            logprobs=[row[1] for row in rows],
            finite=[bool(row[2]) for row in rows],
            alternatives=alternatives,
        )


class Decoder:
    """n_slots sequences of at most max_len tokens each, prompt and answer together, of a network.

    All methods want `generating(net)` and no gradients around them. check: look whether all logits
    are finite. graphs: capture CUDA graphs, on a GPU. Raises nothing of its own: arguments are the
    caller's to check (0 < len(prompt) and len(prompt) + limit <= max_len)."""

    def __init__(self, net, tok, n_slots, max_len, *, check=False, graphs=True):
        c = net.config
        table = net.model.embed_tokens.weight
        self.net = net
        self.n_vocab = min(tok.n_vocab, c.vocab_size)  # ids from here on are padding
        self.n_slots = n_slots
        self.max_len = max_len
        self.check = check
        self.device = table.device
        self.on_gpu = table.device.type == "cuda"
        with torch.inference_mode(False):  # tensors made within it could not be written to outside
            self.make_state(c, table)
        # What the host knows of each slot:
        self.ready = []  # slots that are to get tokens, in order: their prompts are read
        self.unchosen = set()  # those of them whose logits are of no token yet
        self.length = [0] * n_slots  # tokens whose keys and values it has (at most, on a GPU)
        self.prompt_length = [0] * n_slots
        self.n_left = [0] * n_slots  # tokens that may come (at most, on a GPU)
        self.options = [{}] * n_slots
        self.owners = [None] * n_slots
        self.ends_of = [()] * n_slots
        self.n_alternatives = [0] * n_slots

    # ------------------------------------------------------------------ slots

    def set(self, slot, prompt, limit, *, options=None, uniform=None, ends=(), n_alternatives=0,
            n_cached=0, owner=None):  # fmt: skip
        """A sequence begins in a slot: prompt (ids, all of it), to which at most `limit` tokens are
        added, until one of `ends`.

        options: what differs from sampling.OFF. uniform: (limit,) float32 on the host, one draw a
        token; not needed where temperature is 0. n_cached: so many of the prompt's first tokens
        have their keys and values in the slot already: `read` goes on from there. owner: anything;
        it is in Chosen.owners."""

    def read(self, chunks):
        """Read prompts, {slot: ids}, each a whole or what follows what the slot has read; a slot is
        `ready` where its prompt ends. Call it after `feed`, not between `choose` and `feed`.
        Returns {slot: hidden states (T, C) of its chunk}."""

    def clear(self, slot):
        """The sequence of a slot has left. What it had read stays until the slot is used again."""

    def copy(self, to, source, length):
        """Slot `to` gets the keys and values of the first `length` tokens of another."""

    def wipe(self, slot):
        """Zeros for what a slot has read: to attend to NaN, with whatever weight, gives NaN."""

    # ------------------------------------------------------------------ a step

    def choose(self):
        """Choose a token for each ready slot: Chosen. Those of which this was the last that its
        limit allows are ready no more."""

    def feed(self):
        """Feed each ready slot its newest token, so that `choose` can choose again."""

    def capture(self, batches=(), lengths=(), options=()):
        """Capture CUDA graphs ahead: for these numbers of rows and cache lengths, and for `choose`
        by each of these options (dicts, as of `set`). Returns words: how many, seconds, MiB."""
