"""Where a cache keeps the keys and values of a token, by who looks at them: its layer's Pattern.

    layout = layout_for(pattern, max_len)
    layout.n                       # how many places there are
    layout.of(positions)           # the place of each position
    layout.positions(lengths)      # the position that each place holds, in rows of so many tokens

A layer that sees all that came before keeps it all: a token's place is its position. A layer that
sees a window needs no more than a ring, in which a new token takes the place of one that is out of
sight; beside it stand the tokens that stay in sight (attention sinks, the ends of blocks), each in
a place of its own. All of it follows from a row's length by arithmetic: a step needs no table, and
nothing that the device would have to tell.

B rows, T tokens, S places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from barelm.patterns import Pattern
    from model import GPTConfig


@dataclass(frozen=True)
class Layout:
    """n: places in all. The first n_first positions stay, each at its own number; those behind take
    turns in a ring of so many places. block, tail: of each block of positions the last ones stay
    too, so many, in places behind the ring; 0: none do.

    slack: by so many tokens at most a row may be cut once the ring has come round; and one more may
    be written at once before anyone looks."""

    n: int
    n_first: int
    ring: int = 0
    block: int = 0
    tail: int = 0
    slack: int = 0

    @property
    def whole(self) -> bool:
        """Whether every position keeps its place for ever, which is its number."""
        return self.ring == 0

    @property
    def turns_at(self) -> int:
        """In rows of more tokens than this a place may have held another position before."""
        return self.n if self.whole else self.n_first + self.ring

    def of(self, positions: Tensor) -> Tensor:
        """The place of each of positions, an int tensor of any shape."""
        if self.whole:
            return positions
        place = self.n_first + (positions - self.n_first) % self.ring
        if self.block:
            of_tail = positions // self.block * self.tail + self.in_tail(positions)
            place = (self.turns_at + of_tail).where(self.in_tail(positions) >= 0, place)
        return positions.where(positions < self.n_first, place)

    def place_of(self, position: int) -> int:
        """`of` a whole number, on the host."""
        return position if self.whole else int(self.of(torch.tensor(position)))

    def in_tail(self, positions: Tensor) -> Tensor:
        """The number of a position among its block's last ones; negative: it is none of them."""
        return positions % self.block - (self.block - self.tail)

    def stays(self, positions: Tensor) -> Tensor:
        """Whether a position has a place of its own."""
        stays = positions < self.n_first
        if self.block:
            stays = stays | (self.in_tail(positions) >= 0)
        return stays

    def positions(self, lengths: Tensor) -> Tensor:
        """The position (B, S) that each place holds in rows of lengths (B,) tokens, -1 where it is
        empty: the newest of those that share it.

        In a row that was cut, a place may hold what stood behind the end: of it an older position
        is said, which nobody sees any more, as long as the row was cut by no more than `slack`."""
        place = torch.arange(self.n, device=lengths.device)
        newest = lengths[:, None] - 1  # (B, 1)
        position = place.expand(len(lengths), -1)  # (B, S)
        if not self.whole:
            in_ring = newest - (newest - place) % self.ring
            in_ring = in_ring.masked_fill(self.stays(in_ring), -1)
            position = position.where(place < self.n_first, in_ring)
        if self.block:
            number = place - self.turns_at  # of those that stay
            end = number // self.tail * self.block + self.block - self.tail + number % self.tail
            end = end.masked_fill(end < self.n_first, -1)
            position = position.where(place < self.turns_at, end)
        return position.masked_fill(position > newest, -1)

    def to_write(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """The places (B, T) for tokens at positions (B or 1, T) of rows that have lengths (B,)
        tokens with them. What is no token's, or is overwritten by another of the same tokens, goes
        to place n, one more than there are: which of two writes to a place is the last is not
        defined."""
        end = lengths[:, None]
        is_read = positions < end
        if not self.whole:
            is_read = is_read & (self.stays(positions) | (positions >= end - self.ring))
        return self.of(positions).where(is_read, self.n)

    def first(self, used: int) -> int:
        """So many places, from the first on, hold all that there is of rows of at most `used`
        tokens."""
        if self.block:
            used = self.turns_at + -(-used // self.block) * self.tail
        return min(used, self.n)

    def can_cut(self, length: int, reached: int) -> bool:
        """Whether a row that has had `reached` tokens may go on behind its first `length`."""
        return length == 0 or reached <= self.turns_at or reached - length <= self.slack

    def in_order(self, pattern: Pattern, length: int) -> bool:
        """Whether the newest of a row's `length` tokens sees all that the row holds, if its pattern
        sees so many at all: what stands in the ring is then no further away than its places say."""
        return length <= self.turns_at or pattern.kind == "sliding"


def layout_for(pattern: Pattern, max_len: int, slack: int = 0, whole: bool = False) -> Layout:
    """The Layout of a layer whose tokens see by this Pattern, in rows of max_len tokens. A kind
    that is not named here keeps all, which is right for each; as does any where `whole` is asked
    for."""
    all_places = Layout(max_len, max_len)
    size = pattern.window
    ring = size + slack
    n_first = pattern.n_sinks
    if pattern.kind in ("sliding", "local"):  # a block of `local` is no longer than the window
        layout = Layout(n_first + ring, n_first, ring, slack=slack)
    elif pattern.kind == "fixed":  # besides its own block it sees the ends of all
        tail = max(1, size // 8)
        n = n_first + ring + -(-max_len // size) * tail
        layout = Layout(n, n_first, ring, size, tail, slack)
    else:  # `strided`: at every distance there is a token that looks so far back
        return all_places
    return layout if layout.n < max_len and not whole else all_places


def cached_numbers(c: GPTConfig, max_len: int) -> int:
    """How many numbers a row of max_len tokens keeps, of a network of this configuration: the keys
    and values of all layers, and where there is an encoder those of a source as long."""
    places = sum(layout_for(pattern, max_len).n for pattern in c.patterns)
    if c.is_seq2seq:
        places += c.n_layer * max_len
    return 2 * places * c.n_kv_head * c.head_dim
