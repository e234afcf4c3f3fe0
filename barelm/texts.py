"""A text in the making: tokens in, characters out, up to what ends it."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from barelm.tokenizer import Tokenizer


@dataclass
class Generation:
    """ids end with the end token, if one came; logprobs are the model's own, one an id, in nats."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"  # or "stop": an end token, or a stop string (not part of text)
    passes: int = 0  # of speculative decoding: how often the network was asked for it,
    drafted: int = 0  # the tokens that were proposed to it
    accepted: int = 0  # and those of them that it accepted


class TextStream:
    """Bytes in, text out: never half a character, nothing that may become a stop string.
    keeps_stop: the text ends with the stop string that ended it, not before."""

    def __init__(self, stop: Sequence[str] = (), keeps_stop: bool = False) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop = stop
        self.keeps_stop = keeps_stop
        self.text = ""  # all of it, up to a stop string
        self.sent = 0  # so many of its characters were returned
        self.stopped = False

    def feed(self, data: bytes, final: bool = False) -> str:
        """The text that `data` makes certain."""
        self.text += self.decoder.decode(data, final)
        spans = []  # (where a stop string begins, where it ends)
        for stop in self.stop:
            place = self.text.find(stop, self.sent)
            if place >= 0:
                spans.append((place, place + len(stop)))
        if spans:
            begin, end = min(spans)
            self.text = self.text[: end if self.keeps_stop else begin]
            self.stopped = True
        end = len(self.text)
        if not self.stopped and not final:
            end -= self.unsure()
        piece = self.text[self.sent : end]
        self.sent = max(end, self.sent)
        return piece

    def unsure(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = 0
        for stop in self.stop:
            for n in range(1, len(stop)):
                if self.text.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest


class Row:
    """A sequence in the making: it ends at an end token (one of `ends`, or else the tokenizer's),
    a stop string, or `limit` tokens. emit(piece) gets its text as it becomes certain. number: which
    draws are its own. least: before so many tokens no stop string ends it. keeps_stop: what ended
    it is part of the text. shows_special: so are special tokens, by their names; else those that
    are `shown`."""

    def __init__(self, tok: Tokenizer, limit: int, stop: list[str], emit: Callable | None = None,
                 ends: list[int] | None = None, number: int = 0, least: int = 0,
                 keeps_stop: bool = False, shows_special: bool = False,
                 shown: Collection[int] = ()) -> None:  # fmt: skip
        self.tok = tok
        self.keeps_stop = keeps_stop
        self.shows_special = shows_special
        self.shown = shown
        self.limit = limit
        self.number = number
        self.emit = emit
        self.ends = tok.eos_ids if ends is None else ends
        self.out = Generation()
        self.least = least
        self.stop = stop
        self.stream = TextStream(() if least else stop, keeps_stop)
        self.done = False

    def token_bytes(self, token: int) -> bytes:
        """What the token adds to the text."""
        if self.shows_special or token in self.shown:
            return self.tok.shown.get(token, b"")
        return self.tok.token_bytes(token)

    def take(self, token: int, logprob: float) -> None:
        """Add a token; after the end nothing is added."""
        if self.done:
            return
        self.out.ids.append(token)
        self.out.logprobs.append(logprob)
        ended = token in self.ends
        last = ended or len(self.out.ids) == self.limit
        if len(self.out.ids) > self.least:  # what was before is not looked through any more
            self.stream.stop = self.stop
        is_shown = self.keeps_stop or not ended
        piece = self.stream.feed(self.token_bytes(token) if is_shown else b"", final=last)
        self.out.text = self.stream.text
        self.done = last or self.stream.stopped
        if ended or self.stream.stopped:
            self.out.finish_reason = "stop"
        if piece and self.emit is not None:
            self.emit(piece)

    def finish(self) -> None:
        """The text is whole, though no end token came, as where a grammar ends."""
        piece = self.stream.feed(b"", final=True)
        self.out.text = self.stream.text
        self.out.finish_reason = "stop"
        self.done = True
        if piece and self.emit is not None:
            self.emit(piece)
