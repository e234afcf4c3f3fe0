"""The tokens of a Decoder's step, on their way to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from barelm.jobs import Job


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

    def __init__(self, slots: list[int], owners: list[Job | None], n_alternatives: list[int],
                 values: Tensor, places: Sequence[int],
                 copied: tuple | None = None) -> None:  # fmt: skip
        self.slots = slots
        self.owners = owners
        self.n_alternatives = n_alternatives
        self.values = values  # `Decoder.choose_rows`', on the host
        self.places = places  # in it, of each of slots
        self.copied = copied  # the event after which it is there; None: it is
        self.tokens = None

    def wait(self) -> Tokens:
        """The Tokens; on a GPU at most two steps later, as there are three buffers for them."""
        if self.tokens is None:
            if self.copied is not None:
                self.copied.synchronize()
            rows = self.values.tolist()
            self.tokens = self.in_words([rows[place] for place in self.places])
        return self.tokens

    def in_words(self, rows: list[list[float]]) -> Tokens:
        n = self.values.shape[1] // 2 - 1
        checked = self.values.shape[1] % 2 == 1
        alternatives = []
        for row, wanted in zip(rows, self.n_alternatives):
            ids = [int(id) for id in row[2 : 2 + min(wanted, n)]]
            alternatives.append(dict(zip(ids, row[2 + n :])))
        return Tokens(
            tokens=[int(row[0]) for row in rows],
            logprobs=[row[1] for row in rows],
            finite=[not checked or bool(row[-1]) for row in rows],
            alternatives=alternatives,
        )
