"""What GPT.hidden sees as its cache when a Decoder calls it: views of the Decoder's stores.

`extend` tells the positions of the new tokens (B or 1, T); `write` stores layer i's k and v (B, G,
T, D) and returns all that there is to look at; `keys` tells the positions of these (B or 1, S) for
the layers of a pattern, and `attention_mask`'s alone. `cross` and `cross_mask` are an
encoder-decoder's: what it made of its source.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from barelm.graphs import one_line
from barelm.layouts import layout_for

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from barelm.decode import Decoder
    from barelm.layouts import Layout
    from barelm.patterns import Pattern
    from model import GPTConfig


class Group:
    """The layers that keep tokens alike. layers: their numbers; layout: where the tokens are; store
    (2, layers, n_slots, G, S + 1, D): one place more than layout.n, for writes that belong to no
    token."""

    def __init__(self, layout: Layout, layers: list[int], c: GPTConfig, n_slots: int,
                 device: torch.device, dtype: torch.dtype) -> None:  # fmt: skip
        self.layout = layout
        self.layers = layers
        n = layout.n + 1
        if device.type == "cuda":  # a token's heads side by side, as FlashAttention takes them
            shape = (2, len(layers), n_slots, n, c.n_kv_head, c.head_dim)
            self.store = torch.zeros(shape, device=device, dtype=dtype).transpose(3, 4)
        else:
            shape = (2, len(layers), n_slots, c.n_kv_head, n, c.head_dim)
            self.store = torch.zeros(shape, device=device, dtype=dtype)


class Stores:
    """Keys and values of all layers, in Groups. of_pattern: {Pattern: Group}; of_layer: of each
    layer its Group and its number there."""

    def __init__(self, c: GPTConfig, n_slots: int, max_len: int, device: torch.device,
                 dtype: torch.dtype, slack: int = 0, whole: bool = False) -> None:  # fmt: skip
        layers = {}  # {Layout: numbers}
        layouts = [layout_for(pattern, max_len, slack, whole) for pattern in c.patterns]
        for i, layout in enumerate(layouts):
            layers.setdefault(layout, []).append(i)
        by_layout = {}
        for layout, numbers in layers.items():
            by_layout[layout] = Group(layout, numbers, c, n_slots, device, dtype)
        self.groups = list(by_layout.values())
        self.n_layer = len(layouts)
        self.of_pattern = dict(zip(c.patterns, [by_layout[layout] for layout in layouts]))
        self.of_layer = []
        for i, layout in enumerate(layouts):
            self.of_layer.append((by_layout[layout], layers[layout].index(i)))
        self.has_rings = any(not layout.whole for layout in layouts)

    @property
    def nbytes(self) -> int:
        return sum(group.store.nbytes for group in self.groups)

    def copy(self, to: int, source: int, length: int) -> None:
        """Slot `to` gets the first `length` tokens of another, of a ring all that it has."""
        for group in self.groups:
            n = length if group.layout.whole else group.layout.n
            group.store[:, :, to, :, :n] = group.store[:, :, source, :, :n]

    def wipe(self, slot: int) -> None:
        for group in self.groups:
            group.store[:, :, slot] = 0

    def can_cut(self, length: int, reached: int) -> bool:
        """Whether a row that has had `reached` tokens may go on behind its first `length`: once its
        ring has come round it is continued, not begun anew from somewhere before."""
        return all(group.layout.can_cut(length, reached) for group in self.groups)

    def by_layer(self, tensors_of: Callable) -> Sequence:
        """tensors_of(Group), (2, layers, …), as a list for all layers, k's and then v's: few calls,
        where a token's time goes to calls."""
        if len(self.groups) == 1:
            return list_of(tensors_of(self.groups[0]))
        tensors = [None] * (2 * self.n_layer)
        for group in self.groups:
            parts = list_of(tensors_of(group))
            for j, i in enumerate(group.layers):
                tensors[i] = parts[j]
                tensors[i + self.n_layer] = parts[j + len(group.layers)]
        return tensors


class Source:
    """What each slot's source was made into by an encoder-decoder: store (2, n_layer, n_slots, G,
    max_source, D); lengths (n_slots,), in tokens."""

    def __init__(self, c: GPTConfig, n_slots: int, max_source: int, device: torch.device,
                 dtype: torch.dtype) -> None:  # fmt: skip
        shape = (2, c.n_layer, n_slots, c.n_kv_head, max_source, c.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(n_slots, dtype=torch.int64, device=device)
        self.places = torch.arange(max_source, device=device)

    def write(
        self, rows: slice | Tensor, cross_kv: list[tuple[Tensor, Tensor]], lengths: Tensor
    ) -> None:
        """Keep `GPT.cross_kv`'s [(k, v)] (B, G, S, D) for the rows, whose sources have lengths
        (B,)."""
        for i, kv in enumerate(cross_kv):
            for stored, new in zip(self.store[:, i], kv):
                stored[rows, :, : new.shape[2]] = new.to(stored.dtype)
        self.lengths[rows] = lengths


class SlotCache:
    """What is common to all: some rows of a Decoder. n_source: places of its Source to look at."""

    def __init__(self, decoder: Decoder, rows: slice | Tensor, n_source: int = 0) -> None:
        self.stores = decoder.stores
        self.positions = decoder.positions
        self.rows = rows
        self.source = decoder.source
        self.n_source = n_source
        self.cross_mask = None
        if n_source:
            n_tokens = decoder.source.lengths[rows][:, None]  # (B, 1)
            self.cross_mask = (decoder.source.places[:n_source] < n_tokens)[:, None, None]

    def cross(self, i: int) -> Tensor:
        """Layer i's keys and values (B, G, n_source, D) of the source."""
        return self.source.store[:, i, self.rows, :, : self.n_source]


class ChunkCache(SlotCache):
    """T tokens for each of the rows, all of which have `begin` tokens. lengths: how many tokens of
    each row are real. Padding is written too where the place is free again; nobody looks at it."""

    def __init__(self, decoder: Decoder, rows: slice | Tensor, begin: int, lengths: list[int],
                 n_source: int = 0) -> None:  # fmt: skip
        super().__init__(decoder, rows, n_source)
        self.begin = begin
        self.slots = {}  # of each ring: (rows (B, 1), ':', places (B, T))
        if self.stores.has_rings:
            self.numbers = decoder.numbers[rows][:, None]
            self.ends = decoder.to_device([begin + n for n in lengths])  # (B,)

    def extend(self, T: int, n_new: Tensor | None = None) -> Tensor:
        self.end = self.begin + T
        positions = self.positions[:, self.begin : self.end]
        for group in self.stores.groups:
            if not group.layout.whole:
                places = group.layout.to_write(positions, self.ends)
                self.slots[group] = (self.numbers, slice(None), places)
        return positions

    def keys(self, pattern: Pattern) -> tuple[Tensor, bool]:
        if self.begin == 0:
            return self.positions[:, : self.end], True
        layout = self.stores.of_pattern[pattern].layout
        if layout.whole:
            return self.positions[:, : self.end], False
        before = layout.positions(self.positions[0, self.begin : self.begin + 1])  # (1, S)
        return torch.cat((before, self.positions[:, self.begin : self.end]), 1), False

    def write(self, i: int, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        group, j = self.stores.of_layer[i]
        if not group.layout.whole:
            return self.write_ring(group, j, k, v)
        store = group.store
        store[0, j, self.rows, :, self.begin : self.end] = k.to(store.dtype)
        store[1, j, self.rows, :, self.begin : self.end] = v.to(store.dtype)
        if self.begin == 0:  # as they came: not yet rounded to the cache's type
            return k, v
        return store[:, j, self.rows, :, : self.end]

    def write_ring(self, group: Group, j: int, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """The new tokens take the places of old ones, at which they look once more."""
        seen = []
        for stored, new in zip(group.store[:, j], (k, v)):  # stored (n_slots, G, S + 1, D)
            new = new.to(stored.dtype)
            if self.begin:
                before = stored[self.rows, :, : group.layout.n]  # (B, G, S, D)
                seen.append(torch.cat((before, new), 2))
            # Two indices with a slice between them give (B, T, G, D).
            stored[self.slots[group]] = new.transpose(1, 2)
        return seen if self.begin else (k, v)


class PackedCache(SlotCache):
    """Whole prompts one after the other in one row. slots (N,): whose each token is."""

    def __init__(self, decoder: Decoder, slots: Tensor, lengths: list[int]) -> None:
        super().__init__(decoder, slots)
        positions = torch.cat([torch.arange(n) for n in lengths])
        ends = torch.cat([torch.full((n,), n) for n in lengths])
        self.index = {}  # of each group: (slots (N,), ':', places (N,))
        for group in self.stores.groups:
            places = group.layout.to_write(positions[:, None], ends)[:, 0]
            places = places.to(slots.device, non_blocking=True)
            self.index[group] = (slots, slice(None), places)

    def extend(self, T: int, n_new: Tensor | None = None) -> Tensor:
        return torch.arange(T, device=self.rows.device)[None]

    def write(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group, j = self.stores.of_layer[i]
        for stored, new in zip(group.store[:, j], (k, v)):
            # Two indices with a slice between them give (N, G, D).
            stored[self.index[group]] = new[0].transpose(0, 1).to(stored.dtype)
        return k, v


class StepCache(SlotCache):
    """A token for each of the rows, of which those with `left` grow. used: tokens that they have at
    most, with the new one. even: all rows hold so many tokens, and all grow. flash: `attend`
    looks."""

    def __init__(self, decoder: Decoder, rows: slice | Tensor, used: int, even: int | None = None,
                 n_source: int = 0, flash: bool = False) -> None:  # fmt: skip
        super().__init__(decoder, rows, n_source)
        self.n_layer = self.stores.n_layer
        self.used = used
        self.even = even
        self.flash = flash
        self.seen = self.stores.by_layer(self.looked_at)  # (B or n, G, S, D) each
        if even is not None:
            self.active = 1
            self.ends = decoder.positions[0, used : used + 1]  # (1,): tokens with the new one
            self.places = self.stores.by_layer(self.new_places)
            return
        self.stored = self.stores.by_layer(store_of)
        self.lengths = decoder.lengths[rows]
        self.ends = self.lengths + 1
        self.active = decoder.left[rows] > 0
        self.index = {}
        for group in self.stores.groups:
            # Of a row that has ended: the spare place, which nobody looks at.
            layout = group.layout
            places = layout.of(self.lengths).where(self.active, layout.n)
            self.index[group] = (decoder.numbers[rows], slice(None), places)
        if flash:
            # As int32: how many tokens each row holds with the new one, and where queries and rows
            # begin.
            self.lengths_now = self.ends.int()
            queries = decoder.positions[0, : len(self.lengths) + 1]
            self.begins = (queries.int(), (queries * (decoder.max_len + 1)).int())

    def looked_at(self, group: Group) -> Tensor:
        """The places that may hold a token, of the rows where these are a slice, else of all."""
        n = group.layout.n + 1 if self.flash else group.layout.first(self.used)  # whole rows
        if isinstance(self.rows, slice):
            return group.store[:, :, self.rows, :, :n]
        return group.store[..., :n, :]

    def new_places(self, group: Group) -> Tensor:
        """Where the new token of even rows goes."""
        place = group.layout.place_of(self.even)
        return group.store[:, :, self.rows, :, place : place + 1]

    def extend(self, T: int, n_new: Tensor | None = None) -> Tensor:
        if self.even is not None:
            return self.positions[:, self.even : self.even + 1]
        return self.lengths[:, None]

    def keys(self, pattern: Pattern) -> tuple[Tensor, bool]:
        layout = self.stores.of_pattern[pattern].layout
        in_order = self.even is not None and layout.in_order(pattern, self.used)
        if layout.whole:
            return self.positions[:, : self.used], in_order
        key_positions = layout.positions(self.ends)[:, : layout.first(self.used)]
        return key_positions, in_order  # alone, the new token has nothing behind it

    def write(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group, _ = self.stores.of_layer[i]
        for j, new in ((i, k), (i + self.n_layer, v)):
            if self.even is not None:
                self.places[j].copy_(new)
            else:
                self.stored[j][self.index[group]] = new[:, :, 0].to(self.stored[j].dtype)
        k = self.seen[i]
        v = self.seen[i + self.n_layer]
        if isinstance(self.rows, slice):
            return k, v
        return k[self.rows], v[self.rows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """FlashAttention (Dao 2023) of q (B, H, 1, D) to what each row holds; k and v (B, G, S, D)
        are all places of the rows, of which no more is read. `flash_agrees` compares it with the
        attention by a mask."""
        queries, rows = self.begins
        k = k.transpose(1, 2).flatten(0, 1)  # (B S, G, D), in the same memory
        v = v.transpose(1, 2).flatten(0, 1)
        like_k = q[:, :, 0].to(k.dtype)  # (B, H, D)
        forward = torch.ops.aten._flash_attention_forward
        y = forward(like_k, k, v, queries, rows, 1, self.used, 0.0, False, False,
                    seqused_k=self.lengths_now)[0]  # fmt: skip
        return y[:, :, None].to(q.dtype)


def store_of(group: Group) -> Tensor:
    return group.store


def list_of(store: Tensor) -> tuple[Tensor, ...]:
    """(2, n_layer, …) as a list of 2 n_layer tensors, in the same memory."""
    return store.flatten(0, 1).unbind(0)


PACK = 2048  # tokens of a packed row, whose mask has the square of them


def pays_to_pack(c: GPTConfig, lengths: Collection[int]) -> bool:
    """Whether prompts of these lengths are read faster packed, where each token is held against all
    of its row, than as rows padded to the longest: by the products of both."""
    linear = 6 * c.n_embd  # of a token, in units of 2 C: those of a token with another
    n = sum(lengths)
    longest = max(lengths)
    # Measured on a CPU: with a mask a product takes half as long again.
    packed = n * (linear + 1.5 * min(n, PACK))
    return packed < len(lengths) * longest * (linear + longest)


def packs(lengths: dict[int, int]) -> list[list[int]]:
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


def flash_agrees(decoder: Decoder) -> bool:
    """Whether `StepCache.attend` computes here what the attention by the mask does, in each layer
    of the decoder's network, of numbers drawn into some rows of its empty store. It is asked of
    networks that are c.is_plain."""
    store = decoder.stores.groups[0].store
    if store.dtype not in (torch.float16, torch.bfloat16):  # it has no other kernels
        return False
    rows = slice(0, min(decoder.n_slots, 8))  # few: the other attention may copy keys and values
    n = min(decoder.max_len, 1024)
    generator = torch.Generator(decoder.device).manual_seed(0)  # not the one that others draw from
    store[:, :, rows].normal_(generator=generator)
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
        store[:, :, rows] = 0
        decoder.lengths.zero_()
    return all(agrees)
