"""What the engine (barelm/engine.py) is asked for, and what it tells: jobs in, updates out.

job = Job(tok, tok.encode("import"), limit=9, sampling=Sampling(seed=1), listener=print)
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from barelm.sampling import GREEDY, OFF, draws
from barelm.texts import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import numpy as np

    from barelm.grammar import Guide
    from barelm.tokenizer import Tokenizer


def limited(default: float | None, least: float, most: float) -> Any:
    """A field of a dataclass that wants numbers from `least` to `most`."""
    return field(default=default, metadata={"limits": (least, most)})


def one_of(*words: str) -> Any:
    """A field of a dataclass that wants one of these words, or nothing."""
    return field(default=None, metadata={"words": words})


@dataclass
class Sampling:
    """How the tokens of a sequence are chosen. What is added here is a field of the server's
    requests too (barelm/api.py), which checks the type and the limits; a number is added to
    barelm/sampling.py's `OFF` as well, and used there."""

    presence_penalty: float = limited(0.0, -2, 2)  # off the logit of a token that was generated
    frequency_penalty: float = limited(0.0, -2, 2)  # the same, each time that it was
    repetition_penalty: float = limited(1.0, 0.01, 100)  # divides the logits of tokens seen
    temperature: float = limited(1.0, 0, 100)  # 0: always the likeliest token
    top_k: int = limited(0, -1, 2**31)  # draw among so many likeliest; 0: all
    top_p: float = limited(1.0, 0, 1)  # draw among the likeliest with this much probability
    min_p: float = limited(0.0, 0, 1)  # draw among those this fraction as likely as the likeliest
    min_tokens: int = limited(0, 0, 2**24)  # no end token, and no `stop`, before so many
    seed: int | None = limited(None, -(2**63), 2**63 - 1)  # of the draws; None: 0
    stop: Any = field(default_factory=list)  # texts that end the answer, which lacks them
    stop_token_ids: list = field(default_factory=list)  # ids that end it, which lacks their text
    include_stop_str_in_output: bool = False  # it ends with what ended it, text or token
    skip_special_tokens: bool = True  # false: the text has special tokens too, by their names
    logit_bias: Any = field(default_factory=dict)  # {id: number that is added to its logit}

    def options(self) -> dict:
        """As a Decoder takes them."""
        return {name: getattr(self, name) for name in OFF}


@dataclass
class Token:
    """A token of an answer, or of a prompt that is scored."""

    id: int
    logprob: float | None  # the network's own, in nats; None: nothing stands before the token
    alternatives: dict  # {id: log p} of the likeliest tokens at this place


@dataclass
class Update:
    """What is new of a job."""

    job: Job
    text: str
    tokens: list  # [Token]
    done: bool  # nothing comes after it
    error: str | None = None  # why the job failed
    refused: bool = False  # by what was asked of it, not by what happened here

    def add(self, later: Update) -> None:
        """Make this and a later Update of the same job one."""
        self.text += later.text
        self.tokens += later.tokens
        self.done = later.done
        self.error = later.error
        self.refused = later.refused


class Job:
    """One sequence in the making.

    ids: the prompt, not empty.
    limit: how many tokens to add at most; 0 asks about the prompt alone.
    listener(update): called with each Update, by the engine's thread unless the engine was given
    another way to tell them; it must not wait.
    index: which of a request's sequences it is, and so which random numbers it draws.
    ends: ids that end the answer.
    n_alternatives: how many to tell of each token; None: no log-probabilities either.
    echo: the prompt's text, where it belongs to the answer, and its tokens' log-probabilities too.
    guide: a Guide (barelm/grammar.py) that says what the answer may be. It ends at its grammar's
    end, whether or not an end token comes; so one of `ends` counts where the text is whole alone.
    adapter: the number of the adapter that makes it (barelm/many_adapters.py); 0: none.
    goes_on: with a guide, no end token comes where the text could go on.
    shown: special tokens whose names are part of the text.
    """

    def __init__(
        self,
        tok: Tokenizer,
        ids: list[int],
        limit: int,
        sampling: Sampling,
        listener: Callable,
        index: int = 0,
        ends: Any = (),
        n_alternatives: int | None = None,
        echo: Any = None,
        guide: Guide | None = None,
        goes_on: bool = False,
        shown: Collection[int] = (),
        adapter: int = 0,
    ) -> None:
        self.ids = ids
        self.sampling = sampling
        self.listener = listener
        self.index = index
        self.n_alternatives = n_alternatives
        self.scores_prompt = echo is not None and n_alternatives is not None
        self.pieces = [echo or ""]  # text that was not told yet
        self.tokens = []  # Tokens that were not told yet
        if self.scores_prompt:
            self.tokens.append(Token(ids[0], None, {}))
        self.adapter = adapter
        self.guide = guide
        self.goes_on = goes_on
        self.row = Row(
            tok,
            limit,
            sampling.stop,
            self.pieces.append,
            ends,
            least=sampling.min_tokens,
            keeps_stop=sampling.include_stop_str_in_output,
            shows_special=not sampling.skip_special_tokens,
            shown=shown,
        )
        self.uniform = None  # (limit,), one draw a token
        if sampling.temperature >= GREEDY:
            self.uniform = draws(sampling.seed or 0, index, limit)
        self.slot: int | None = None  # of the decoder, while it is in the batch
        self.n_read = 0  # tokens of the prompt that the cache has
        self.n_reused = 0  # those of them that it had already
        self.cancelled = False
        self.arrived = time.monotonic()
        self.first_token_at = None
        self.last_token_at = None

    @property
    def n_generated(self) -> int:
        return len(self.row.out.ids)

    def options(self) -> dict:
        """As a Decoder takes them."""
        options = self.sampling.options()
        if self.guide is not None:  # which knows better where the text may end
            options["min_tokens"] = 0
        return options

    def mask(self) -> np.ndarray:
        """The tokens that may come next, by the guide: as `Guide.allowed` has them."""
        too_early = self.n_generated < self.sampling.min_tokens
        return self.guide.allowed(self.row.ends, self.goes_on, too_early)

    def news(self) -> Update:
        """The Update of what was not told yet."""
        update = Update(self, "".join(self.pieces), self.tokens, done=self.row.done)
        self.tokens = []
        self.pieces.clear()  # the row appends to this very list
        return update


class Updates:
    """What the jobs of a request tell, until the coroutine that answers it takes it. What comes
    meanwhile is joined: of each job there is one Update here at most, however slowly the client
    reads. at_end: what is not the end of a job wakes nobody.

    All of it belongs to the event loop's thread."""

    def __init__(self, at_end: bool = False) -> None:
        self.at_end = at_end
        self.by_job = {}  # {index: Update}
        self.problem = None  # an exception, of the watcher or the clock
        self.is_new = asyncio.Event()

    def listener(self, update: Update) -> None:
        earlier = self.by_job.setdefault(update.job.index, update)
        if earlier is not update:
            earlier.add(update)
        if update.done or not self.at_end:
            self.is_new.set()

    def fail(self, problem: Exception) -> None:
        self.problem = problem
        self.is_new.set()

    async def take(self) -> list[Update]:
        """What is new, [Update]."""
        await self.is_new.wait()
        self.is_new.clear()
        if self.problem is not None:
            raise self.problem
        updates = list(self.by_job.values())
        self.by_job.clear()
        return updates
