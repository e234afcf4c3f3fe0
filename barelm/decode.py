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
from barelm.sampling import (
    GREEDY,
    OFF,
    draw_tokens,
    draws,
    kinds_of,
    penalize,
    power_of_two,
)


@dataclass
class Tokens:
    """A step's tokens, one of each of Chosen.slots."""

    tokens: list[int]
    logprobs: list[float]  # the model's own, in nats: without penalties, temperature and filters
    finite: list[bool]  # whether all logits were finite; true where the decoder does not check
    alternatives: list[dict[int, float]]  # {id: log p} of the likeliest, as many as were asked for


class Chosen:
    """Tokens under way to the host. slots: whose they are, in order; owners: what `set` was given
    for each. Of a row that has ended meanwhile there is a token too, which means nothing."""

    def __init__(self, slots, owners, n_alternatives, values, places, copied=None):
        self.slots = slots
        self.owners = owners
        self.n_alternatives = n_alternatives
        self.values = values  # (B, 3 + 2 n) float64 on the host
        self.places = places  # in it, of each of slots
        self.copied = copied  # the event after which it is there; None: it is
        self.tokens = None

    def wait(self):
        """The Tokens; on a GPU at most two steps later, as there are three buffers for them."""
        if self.tokens is None:
            if self.copied is not None:
                self.copied.synchronize()
            rows = self.values.tolist()
            self.tokens = self.in_words([rows[place] for place in self.places])
        return self.tokens

    def in_words(self, rows):
        n = (self.values.shape[1] - 3) // 2
        alternatives = []
        for row, wanted in zip(rows, self.n_alternatives):
            ids = [int(id) for id in row[3 : 3 + min(wanted, n)]]
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
    are finite. graphs: capture CUDA graphs, on a GPU. Arguments are the caller's to check:
    0 < len(prompt) and len(prompt) + limit <= max_len."""

    def __init__(self, net, tok, n_slots, max_len, *, check=False, graphs=True):
        self.net = net
        self.n_vocab = min(tok.n_vocab, net.config.vocab_size)  # ids from here on are padding
        self.n_slots = n_slots
        self.max_len = max_len
        self.check = check
        self.device = net.model.embed_tokens.weight.device
        self.on_gpu = self.device.type == "cuda"
        with torch.inference_mode(False):  # a tensor made within it is not written to outside
            self.make_state(net.config)
        self.products = {} if net.fast and self.on_gpu else None
        self.graphs = Graphs(self.device) if graphs and self.on_gpu else None
        self.buffers = {}  # pinned memory for what `choose` gives, by its shape
        # What the host knows of each slot:
        self.ready = []  # slots that are to get tokens, in order: their prompts are read
        self.unchosen = set()  # those whose logits no token was chosen by
        self.length = [0] * n_slots  # tokens whose keys and values it has (at most, on a GPU)
        self.n_left = [0] * n_slots  # tokens that may come (at most, on a GPU)
        self.prompt_length = [0] * n_slots
        self.options = [OFF] * n_slots
        self.ends_of = [()] * n_slots
        self.n_alternatives = [0] * n_slots
        self.owners = [None] * n_slots

    def make_state(self, c):
        """The tensors: all there is of a sequence, a row a slot."""
        n = self.n_slots
        device = self.device
        # A CPU attends to float32 faster than to less: it has to convert the rest.
        dtype = torch.float32
        if self.on_gpu:
            dtype = compute_dtype(self.net.model.embed_tokens.weight)
        # One place more than max_len: where writes that belong to no token go.
        shape = (2, c.n_layer, n, c.n_kv_head, self.max_len + 1, c.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(n, *shape, device=device, dtype=dtype)

        self.lengths = zeros()  # tokens in the cache
        self.newest = zeros()  # the token that was chosen last, which is not in the cache
        self.left = zeros()  # how many tokens may still come; 0: nothing changes any more
        self.drawn = zeros()  # how many were chosen
        self.uniform = zeros(self.max_len, dtype=torch.float32)  # their draws
        self.ends = zeros(8) - 1  # ids that end the sequence; -1 is none
        self.columns = zeros(len(OFF), dtype=torch.float32)  # options, in OFF's order
        self.logits = zeros(c.vocab_size, dtype=torch.float32) - torch.inf  # what comes next
        self.seen = None  # (n, V) bool: tokens of the prompt, once a penalty asks
        self.counts = None  # (n, V) float32: how often each was chosen
        self.numbers = torch.arange(n, device=device)
        self.positions = torch.arange(self.max_len + 1, device=device)[None]  # (1, max_len + 1)

    # ------------------------------------------------------------------ slots

    def set(self, slot, prompt, limit, *, options=None, uniform=None, ends=(), n_alternatives=0,
            n_cached=0, owner=None):  # fmt: skip
        """A sequence begins in a slot: prompt (ids, all of it), to which at most `limit` tokens are
        added, until one of `ends`.

        options: what differs from sampling.OFF. uniform: (limit,) float32 on the host, one draw a
        token; not needed where temperature is 0. n_cached: so many of the prompt's first tokens
        have their keys and values in the slot already: `read` goes on from there. owner: anything;
        it is in Chosen.owners."""
        self.clear(slot)
        options = OFF | (options or {})
        self.options[slot] = options
        self.ends_of[slot] = tuple(ends)
        self.n_alternatives[slot] = n_alternatives
        self.owners[slot] = owner
        self.n_left[slot] = limit
        self.prompt_length[slot] = len(prompt)
        self.length[slot] = n_cached
        self.columns[slot] = self.to_device([options[name] for name in OFF], torch.float32)
        self.drawn[slot] = 0
        if uniform is not None:
            self.uniform[slot, : len(uniform)] = uniform.to(self.device, non_blocking=True)
        self.set_ends(slot, list(ends))
        if kinds_of([options]).penalized:
            self.remember(slot, prompt)

    def to_device(self, values, dtype=torch.int64):
        """A list as a tensor on the device, which nobody waits for."""
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    def set_ends(self, slot, ends):
        if len(ends) > self.ends.shape[1]:
            wider = self.ends.new_full((self.n_slots, power_of_two(len(ends))), -1)
            wider[:, : self.ends.shape[1]] = self.ends
            self.replace("ends", wider)
        self.ends[slot] = self.to_device(ends + [-1] * (self.ends.shape[1] - len(ends)))

    def remember(self, slot, prompt):
        """The tokens of a prompt, for penalties; the first one to have a penalty makes the room."""
        if self.counts is None:
            self.replace("seen", torch.zeros_like(self.logits, dtype=torch.bool))
            self.replace("counts", torch.zeros_like(self.logits))
        self.counts[slot] = 0
        self.seen[slot] = False
        self.seen[slot].index_fill_(0, self.to_device(prompt), True)

    def replace(self, name, tensor):
        """Another tensor for a part of the state: graphs that have the old one are gone."""
        setattr(self, name, tensor)
        if self.graphs is not None:
            self.graphs.forget("choose_rows")

    def clear(self, slot):
        """The sequence of a slot has left. What it had read stays until the slot is used again."""
        self.unchosen.discard(slot)
        self.owners[slot] = None
        if slot in self.ready:
            self.ready.remove(slot)
        self.left[slot] = 0

    def copy(self, to, source, length):
        """Slot `to` gets the keys and values of the first `length` tokens of another."""
        self.store[:, :, to, :, :length] = self.store[:, :, source, :, :length]

    def wipe(self, slot):
        """Zeros for what a slot has read: to attend to NaN, with whatever weight, gives NaN."""
        self.store[:, :, slot] = 0

    # ------------------------------------------------------------------ prompts

    def read(self, chunks):
        """Read prompts, {slot: ids}, each a whole or what follows what the slot has read; a slot is
        `ready` where its prompt ends. Call it after `feed`, not between `choose` and `feed`.
        Returns {slot: hidden states (T, C) of its chunk}."""
        slots = list(chunks)
        lengths = [len(chunks[slot]) for slot in slots]
        begins = [self.length[slot] for slot in slots]
        with self.computing():
            if len(slots) > 1 and max(begins) > 0:  # chunks behind others, each with its own mask
                states = {}
                for slot in slots:
                    states.update(self.read_padded([slot], chunks, begins[0]))
            elif pays_to_pack(self.net.config, lengths):
                states = self.read_packed(slots, chunks)
            else:
                states = self.read_padded(slots, chunks, begins[0])
            for slot, n in zip(slots, lengths):
                self.length[slot] += n
            ended = [slot for slot in slots if self.length[slot] == self.prompt_length[slot]]
            if ended:
                self.begin_answers(ended, torch.stack([states[slot][-1] for slot in ended]))
        return states

    def read_padded(self, slots, chunks, begin):
        """Of chunks that all begin at the same place, as rows that are as long as the longest."""
        rows = [torch.tensor(chunks[slot]) for slot in slots]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T), padded at the right
        ids = ids.to(self.device, non_blocking=True)
        h = self.net.hidden(ids, cache=ChunkCache(self, self.index(slots), begin))  # (B, T, C)
        return {slot: h[i, : len(chunks[slot])] for i, slot in enumerate(slots)}

    def read_packed(self, slots, chunks):
        """Of whole prompts, one after the other in one row, each a document."""
        lengths = [len(chunks[slot]) for slot in slots]
        packed = []
        docs = []
        for slot in slots:
            packed += chunks[slot]
            docs += [slot] * len(chunks[slot])
        docs = self.to_device(docs)  # (N,): the slot of each token
        ids = self.to_device(packed)[None]
        h = self.net.hidden(ids, cache=PackedCache(self, docs, lengths), docs=docs[None])[0]
        return dict(zip(slots, h.split(lengths)))

    def begin_answers(self, slots, h):
        """The prompts of these slots are read, the last tokens' hidden states being h (B, C)."""
        rows = self.index(slots)
        self.keep_logits(rows, h)
        self.lengths[rows] = self.to_device([self.length[slot] for slot in slots])
        self.left[rows] = self.to_device([self.n_left[slot] for slot in slots])
        self.ready = sorted(self.ready + slots)
        self.unchosen.update(slots)

    def keep_logits(self, rows, h):
        """Padding of the vocabulary stays at -inf."""
        self.logits[rows, : self.n_vocab] = self.net.logits(h)[:, : self.n_vocab].float()

    def index(self, slots):
        """Slots as an index: a slice, which copies nothing, where they follow one another."""
        first = slots[0]
        if slots == list(range(first, first + len(slots))):
            return slice(first, first + len(slots))
        return self.to_device(slots)

    # ------------------------------------------------------------------ a step

    def choose(self):
        """Choose a token for each ready slot: Chosen. Those of which this was the last that its
        limit allows are ready no more."""
        slots = list(self.ready)
        n = power_of_two(max(self.n_alternatives[slot] for slot in slots))
        n = min(n, self.n_vocab)
        kinds = kinds_of([self.options[slot] for slot in slots])
        rows, places = self.rows_of(slots)
        values = self.run(self.choose_rows, rows, kinds, n)
        copied = None
        if self.on_gpu:
            values, copied = self.to_host(values)
        owners = [self.owners[slot] for slot in slots]
        wanted = [self.n_alternatives[slot] for slot in slots]
        chosen = Chosen(slots, owners, wanted, values, places, copied)
        self.unchosen.clear()
        self.note_chosen(chosen)
        return chosen

    def note_chosen(self, chosen):
        """What the host knows after `choose`. On a CPU it looks for ends too: what has ended costs
        nothing there, and the others' lengths are known."""
        ids = [None] * len(chosen.slots) if self.on_gpu else chosen.wait().tokens
        for slot, id in zip(chosen.slots, ids):
            self.n_left[slot] -= 1
            if self.n_left[slot] == 0 or id in self.ends_of[slot]:
                self.ready.remove(slot)

    def rows_of(self, slots):
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

    def choose_rows(self, rows, kinds, n_alternatives=0):
        """On the device alone: the next token of each of the rows, (B, 3 + 2 n) float64: token,
        log p, whether all is finite, n alternatives, their log p."""
        logits = self.logits[rows]  # (B, V)
        columns = dict(zip(OFF, self.columns[rows].split(1, 1)))  # (B, 1) each
        likely = logits
        if kinds.penalized:
            counts = self.counts[rows]
            seen = self.seen[rows] | (counts > 0)
            likely = penalize(logits, seen, columns["repetition_penalty"], counts,
                              columns["presence_penalty"], columns["frequency_penalty"])  # fmt: skip
        drawn = self.drawn[rows]
        uniform = self.uniform[rows].gather(1, drawn[:, None])[:, 0] if kinds.sampled else None
        tokens = draw_tokens(likely, uniform, columns, kinds)  # (B,)

        left = self.left[rows]
        active = left > 0
        ended = (tokens[:, None] == self.ends[rows]).any(1)
        self.newest[rows] = tokens.where(active, self.newest[rows])
        self.left[rows] = (left - 1).clamp(min=0).masked_fill(ended, 0)
        self.drawn[rows] = (drawn + active).clamp(max=self.max_len - 1)
        if kinds.penalized:
            places = self.numbers[rows] * self.counts.shape[1] + tokens
            self.counts.view(-1).scatter_add_(0, places, active.float())

        logp = logits.log_softmax(-1)  # (B, V)
        values = [tokens[:, None], logp.gather(1, tokens[:, None])]
        if self.check:
            values.append(logits[:, : self.n_vocab].isfinite().all(1, keepdim=True))
        else:
            values.append(torch.ones_like(values[0]))
        if n_alternatives:
            best = logp.topk(n_alternatives)
            values += [best.indices, best.values]
        return torch.cat([value.double() for value in values], 1)

    def feed(self):
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
            self.run(self.feed_rows, rows, used, even)
        for slot in slots:
            self.length[slot] = min(self.length[slot] + 1, self.max_len)

    def feed_rows(self, rows, used, even=None):
        """On the device alone: the newest token of each of the rows goes through the network, which
        looks at `used` places of the cache. even: all rows hold so many tokens, and all grow."""
        cache = StepCache(self, rows, used, even)
        h = self.net.hidden(self.newest[rows][:, None], cache=cache)  # (B, 1, C)
        self.keep_logits(rows, h[:, 0])
        self.lengths[rows] += cache.active

    def run(self, function, rows, *static):
        """function(rows, *static), on a GPU as a graph."""
        if self.graphs is None:
            return function(rows, *static)
        key = (function.__name__, rows.stop, *static)
        return self.graphs.run(key, lambda: function(rows, *static), self.at_rest)

    def to_host(self, values):
        """(values copied to pinned memory, the event after which they are there)."""
        buffers = self.buffers.get(values.shape)
        if buffers is None:
            buffers = [
                torch.empty(values.shape, dtype=values.dtype, pin_memory=True) for _ in "abc"
            ]
            self.buffers[values.shape] = buffers
        buffer = buffers.pop(0)  # the oldest
        buffers.append(buffer)
        buffer.copy_(values, non_blocking=True)
        return buffer, torch.cuda.current_stream(self.device).record_event()

    # ------------------------------------------------------------------ on a GPU

    @contextlib.contextmanager
    def computing(self):
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

    def refresh(self):
        """The weights may have changed, in their places: the copies of them change too."""
        for product in (self.products or {}).values():
            if product is not None:
                product.refresh()

    @contextlib.contextmanager
    def at_rest(self):
        """Within, no row is active, so that a step may be tried and changes nothing but logits."""
        left = self.left.clone()
        self.left.zero_()
        yield
        self.left.copy_(left)

    def capture(self, batches=(), lengths=(), options=()):
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
                    self.run(self.feed_rows, rows, min(length, self.max_len), None)
            for option in options:
                self.run(self.choose_rows, rows, kinds_of([OFF | option]), 0)
        torch.cuda.synchronize(self.device)
        mib = (torch.cuda.memory_reserved(self.device) - before) / 2**20
        seconds = time.monotonic() - begun
        return f"{len(self.graphs.graphs)} CUDA graphs, {seconds:.1f} s, {mib:.0f} MiB"


class Graphs:
    """CUDA graphs of functions without arguments, by key, in one pool of memory: no two of them
    run at a time. Where a capture fails, functions are called from then on."""

    def __init__(self, device):
        self.device = device
        self.graphs = {}  # {key: (graph, what the function returned)}
        self.pool = None
        self.failed = False

    def run(self, key, function, at_rest):
        """function() or its graph's replay; what it returns is overwritten by the next one."""
        if key not in self.graphs and not self.failed:
            try:
                with at_rest():
                    self.graphs[key] = self.capture(function)
            except Exception as error:
                message = str(error).strip() or type(error).__name__
                print(f"no CUDA graphs ({message.splitlines()[0]}): each kernel is launched",
                      file=sys.stderr)  # fmt: skip
                self.failed = True
                self.graphs.clear()
        if self.failed:
            return function()
        graph, returned = self.graphs[key]
        graph.replay()
        return returned

    def capture(self, function):
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their kernels and make their workspaces
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, for what is none of this graph's.
        how = dict(pool=self.pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.graph(graph, **how):
            returned = function()
        return graph, returned

    def forget(self, kind):
        """Drop the graphs whose key begins so."""
        for key in [key for key in self.graphs if key[0] == kind]:
            del self.graphs[key]


# --------------------------------------------------------------------------------------------------
# What GPT.hidden sees as its cache: `extend` tells positions, those of what is there to look at,
# and whether causal attention is enough; `write` stores layer i's k and v (B, G, T, D) and returns
# all that there is to look at.


class ChunkCache:
    """T tokens for each of the rows, all of which have `begin` tokens. Padding at their ends is
    written too: nobody looks at it, and the place is free again."""

    def __init__(self, decoder, rows, begin):
        self.store = decoder.store
        self.positions = decoder.positions
        self.rows = rows
        self.begin = begin

    def extend(self, T, n_new=None):
        self.end = self.begin + T
        positions = self.positions[:, self.begin : self.end]
        return positions, self.positions[:, : self.end], self.begin == 0

    def write(self, i, k, v):
        self.store[0, i, self.rows, :, self.begin : self.end] = k.to(self.store.dtype)
        self.store[1, i, self.rows, :, self.begin : self.end] = v.to(self.store.dtype)
        if self.begin == 0:  # as they came: not yet rounded to the cache's type
            return k, v
        return self.store[:, i, self.rows, :, : self.end]


class PackedCache:
    """Whole prompts one after the other in one row. slots (N,): whose each token is."""

    def __init__(self, decoder, slots, lengths):
        self.store = decoder.store
        self.slots = slots
        places = [torch.arange(n) for n in lengths]
        self.places = torch.cat(places).to(slots.device, non_blocking=True)  # (N,)

    def extend(self, T, n_new=None):
        positions = torch.arange(T, device=self.slots.device)[None]
        return positions, positions, True

    def write(self, i, k, v):
        for stored, new in zip(self.store[:, i], (k, v)):
            # Two indices with a slice between them give (N, G, D).
            stored[self.slots, :, self.places] = new[0].transpose(0, 1).to(stored.dtype)
        return k, v


class StepCache:
    """A token for each of the rows, of which those with `left` grow."""

    def __init__(self, decoder, rows, used, even):
        self.n_layer = len(decoder.store[0])
        self.positions = decoder.positions
        self.rows = rows
        self.used = used
        self.even = even
        # As lists of tensors for each layer, k's and then v's: one call for all of them, where a
        # token's time goes to calls.
        self.seen = list_of(decoder.store[..., :used, :])  # (n, G, S, D) each
        if isinstance(rows, slice):
            self.seen = list_of(decoder.store[:, :, rows, :, :used])  # (B, G, S, D) each
        if even is not None:
            self.active = 1
            self.places = list_of(decoder.store[:, :, rows, :, even : even + 1])
            return
        self.stored = list_of(decoder.store)
        self.lengths = decoder.lengths[rows]
        self.active = decoder.left[rows] > 0
        # Of a row that has ended: the spare place, which nobody looks at.
        spare = self.lengths.where(self.active, decoder.max_len)
        self.index = (decoder.numbers[rows], slice(None), spare)

    def extend(self, T, n_new=None):
        keys = self.positions[:, : self.used]
        if self.even is not None:  # nothing is behind the new token: it sees all
            return keys[:, self.even :], keys, True
        return self.lengths[:, None], keys, False

    def write(self, i, k, v):
        for j, new in ((i, k), (i + self.n_layer, v)):
            if self.even is not None:
                self.places[j].copy_(new)
            else:
                self.stored[j][self.index] = new[:, :, 0].to(self.stored[j].dtype)
        k = self.seen[i]
        v = self.seen[i + self.n_layer]
        if isinstance(self.rows, slice):
            return k, v
        return k[self.rows], v[self.rows]


def list_of(store):
    """(2, n_layer, …) as a list of 2 n_layer tensors, in the same memory."""
    return store.flatten(0, 1).unbind(0)


def pays_to_pack(c, lengths):
    """Whether prompts of these lengths are read faster in one packed row, where each token is held
    against all, than as rows padded to the longest: by the products of both."""
    linear = 6 * c.n_embd  # of a token, in units of 2 C: those of a token with another
    n = sum(lengths)
    longest = max(lengths)
    return n * (linear + n) < len(lengths) * longest * (linear + longest)


# --------------------------------------------------------------------------------------------------
# All of a generation


def decode_rows(net, tok, prompts, rows, seed, options):
    """Feed model.py's `rows` with what follows their prompts until all are done. On a GPU the host
    reads the tokens of step t - 1 while the device computes step t: neither waits for the other."""
    limit = max(row.limit for row in rows)
    longest = max(len(prompt) + row.limit for prompt, row in zip(prompts, rows))
    decoder = decoder_for(net, tok, len(rows), longest)
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        uniform = draws(seed, i, limit) if options["temperature"] >= GREEDY else None
        decoder.set(i, prompt, row.limit, options=options, uniform=uniform, ends=row.ends)
    decoder.read(dict(enumerate(prompts)))
    under_way = []
    while decoder.ready or under_way:
        if decoder.ready:
            under_way.append(decoder.choose())
        if len(under_way) > int(decoder.on_gpu and bool(decoder.ready)):
            take(decoder, rows, under_way.pop(0))
        decoder.feed()


def take(decoder, rows, chosen):
    """Give the rows their tokens; those that are done leave."""
    tokens = chosen.wait()
    for slot, token, logprob in zip(chosen.slots, tokens.tokens, tokens.logprobs):
        rows[slot].take(token, logprob)
        if rows[slot].done:
            decoder.clear(slot)


DECODERS = weakref.WeakKeyDictionary()  # {network: (what it was made for, Decoder)}, on a GPU


def decoder_for(net, tok, n_slots, max_len):
    """A Decoder for a generation. On a GPU it and its graphs serve later ones too: as long as the
    network's weights are in the same places, with what they are by then."""
    if net.model.embed_tokens.weight.device.type != "cuda":
        return Decoder(net, tok, n_slots, max_len)
    tensors = [*net.parameters(), *net.buffers()]
    made_for = (net.fast, tok.n_vocab, compute_dtype(tensors[0]))
    made_for += tuple((t.data_ptr(), t.dtype, t.shape) for t in tensors)
    kept_for, decoder = DECODERS.pop(net, (None, None))
    fits = kept_for == made_for and decoder.n_slots >= n_slots and decoder.max_len >= max_len
    if not fits:
        decoder = None  # its memory is free before another one is made
        decoder = Decoder(net, tok, power_of_two(n_slots), power_of_two(max_len))
    decoder.refresh()
    for slot in range(decoder.n_slots):
        decoder.clear(slot)
    DECODERS[net] = (made_for, decoder)
    return decoder
