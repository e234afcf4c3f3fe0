"""What GPT.hidden sees as its cache when a Decoder calls it: views of the Decoder's store.

`extend` tells the positions of the new tokens (B or 1, T), those of what there is to look at
(1, S), and whether causal attention is enough; `write` stores layer i's k and v (B, G, T, D) and
returns all that there is to look at.
"""

import sys

import torch

from barelm.graphs import one_line


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
    """A token for each of the rows, of which those with `left` grow. used: places of the cache that
    they may look at. even: all rows hold so many tokens, and all grow. flash: `attend` looks."""

    def __init__(self, decoder, rows, used, even=None, flash=False):
        self.n_layer = len(decoder.store[0])
        self.positions = decoder.positions
        self.rows = rows
        self.used = used
        self.even = even
        # As lists of tensors for each layer, k's and then v's: one call for all of them, where a
        # token's time goes to calls.
        if isinstance(rows, slice):
            width = decoder.max_len + 1 if flash else used  # `attend` wants whole rows
            self.seen = list_of(decoder.store[:, :, rows, :, :width])  # (B, G, S, D) each
        else:
            self.seen = list_of(decoder.store[..., :used, :])  # (n, G, S, D) each
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
        if flash:
            # As int32: how many tokens each row holds with the new one, and where queries and rows
            # begin.
            self.held = (self.lengths + 1).int()
            queries = decoder.positions[0, : len(self.lengths) + 1]
            self.begins = (queries.int(), (queries * (decoder.max_len + 1)).int())

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

    def attend(self, q, k, v, mask):
        """FlashAttention (Dao 2023) of q (B, H, 1, D) to what each row holds; k and v (B, G, S, D)
        are all places of the rows, of which no more is read. `flash_agrees` compares it with the
        attention by a mask."""
        queries, rows = self.begins
        k = k.transpose(1, 2).flatten(0, 1)  # (B S, G, D), in the same memory
        v = v.transpose(1, 2).flatten(0, 1)
        like_k = q[:, :, 0].to(k.dtype)  # (B, H, D)
        forward = torch.ops.aten._flash_attention_forward
        y = forward(like_k, k, v, queries, rows, 1, self.used, 0.0, False, False,
                    seqused_k=self.held)[0]  # fmt: skip
        return y[:, :, None].to(q.dtype)


def list_of(store):
    """(2, n_layer, …) as a list of 2 n_layer tensors, in the same memory."""
    return store.flatten(0, 1).unbind(0)


PACK = 2048  # tokens of a packed row, whose mask has the square of them


def pays_to_pack(c, lengths):
    """Whether prompts of these lengths are read faster packed, where each token is held against all
    of its row, than as rows padded to the longest: by the products of both."""
    linear = 6 * c.n_embd  # of a token, in units of 2 C: those of a token with another
    n = sum(lengths)
    longest = max(lengths)
    # Measured on a CPU: with a mask a product takes half as long again.
    packed = n * (linear + 1.5 * min(n, PACK))
    return packed < len(lengths) * longest * (linear + longest)


def packs(lengths):
    """{slot: length of its prompt} as lists of slots, each of which has at most PACK tokens, or one
    prompt."""
    groups = []
    room = 0
    for slot, length in lengths.items():
        if not groups or length > room:
            groups.append([])
            room = PACK
        groups[-1].append(slot)
        room -= length
    return groups


def flash_agrees(decoder):
    """Whether `StepCache.attend` computes here what the attention by the mask does, in each layer
    of the decoder's network, of numbers drawn into some rows of its empty store."""
    if decoder.store.dtype not in (torch.float16, torch.bfloat16):  # it has no other kernels
        return False
    rows = slice(0, min(decoder.n_slots, 8))  # few: the other attention may copy keys and values
    n = min(decoder.max_len, 1024)
    generator = torch.Generator(decoder.device).manual_seed(0)  # not the one that others draw from
    decoder.store[:, :, rows].normal_(generator=generator)
    lengths = n - 1 - decoder.numbers[rows] * 31 % n
    decoder.lengths[rows] = lengths
    cache = StepCache(decoder, rows, n, flash=True)
    seen = decoder.positions[:, :n] <= lengths[:, None]  # (B, n)
    ops = decoder.net.ops
    agrees = []

    def both(q, k, v, mask):
        itself = ops.attend_cached
        ops.attend_cached = None
        plain = ops.attend(q, k[:, :, :n], v[:, :, :n], mask)
        ops.attend_cached = itself  # by this name: a function that holds itself is freed late
        close = torch.allclose(cache.attend(q, k, v, mask), plain, rtol=0.05, atol=0.02)
        # A network of another mask, a window's say, is not one for this attention.
        agrees.append(close and torch.equal(mask[:, 0, 0], seen))
        return plain

    ops.attend_cached = both
    try:
        decoder.net.hidden(decoder.newest[rows, None], cache=cache)
    except Exception as error:
        print(f"decoding: attention by a mask ({one_line(error)})", file=sys.stderr)
        agrees.append(False)
    finally:
        ops.attend_cached = None
        decoder.store[:, :, rows] = 0
        decoder.lengths.zero_()
    return all(agrees)
