"""Continuous batching: one thread, one network, one cache, and a batch that changes between steps.

    engine = Engine(net, tok, max_batch=16, max_len=256)
    engine.start()
    job = Job(tok, tok.encode("import"), limit=9, sampling=Sampling(seed=1), listener=print)
    engine.submit([job])  # prints an Update as each token comes
    engine.stop()

Jobs in, tokens out; who asks for them, and how, is not known here. Every step gives each sequence
of the batch one token, so that sequences join and leave between steps (iteration-level scheduling:
Yu et al. 2022, "Orca"). In the same step new prompts are read, several in one pass, a chunk of one
if it is long, so that the others never wait for the whole (chunked prefills: Agrawal et al. 2023,
"Sarathi"). A prompt that begins like one that the cache still has is read from where they part.
An encoder-decoder's prompt is a source, which is read whole.

What is computed is barelm/decode.py's: a sequence has a slot of its Decoder, where it stays. On a
GPU the tokens of a step are told while the device computes the next one.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch

from barelm.caller import Caller, answer, no_gradients
from barelm.decode import Decoder
from barelm.fast import generating
from barelm.generation import check_generates
from barelm.jobs import Token, Update
from barelm.mirror import MirroredDecoder
from barelm.run import UserError
from barelm.sampling import power_of_two

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from barelm.chosen import Chosen
    from barelm.jobs import Job
    from barelm.many_adapters import Adapters
    from barelm.mirror import Mirror
    from barelm.tokenizer import Tokenizer
    from model import GPT

NOT_FINITE = (
    "the network gives NaN or infinity here: its weights are damaged, or --dtype is too narrow for "
    "them (--dtype=float32 is the widest)"
)


def tell_listeners(updates: list[Update]) -> None:
    for update in updates:
        update.job.listener(update)


class Engine(Caller):
    """The thread that owns the network.

    prefill_chunk: how many tokens of prompts are read in a step; 0: by the device. max_queue: how
    many jobs may wait. tell(updates): called by the thread with what is new after a step, [Update];
    it must not wait. mirror: of several processes that compute together (barelm/mirror.py)."""

    def __init__(self, net: GPT, tok: Tokenizer, max_batch: int, max_len: int,
                 prefill_chunk: int = 0, max_queue: int = 256, tell: Callable = tell_listeners,
                 mirror: Mirror | None = None,
                 adapters: Adapters | None = None) -> None:  # fmt: skip
        super().__init__(net, mirror)
        self.tok = tok
        check_generates(net)
        self.max_batch = max_batch
        self.max_len = max_len  # tokens of a prompt and its answer
        self.max_queue = max_queue
        self.tell = tell
        # A chat's next turn begins like the one before but for its last tokens, at most so many: as
        # far back a ring can be continued from.
        options: dict = dict(check=True, slack=8, max_source=max_len)
        self.adapters = adapters
        if mirror is None:
            self.decoder = Decoder(net, tok, max_batch, max_len, adapters=adapters, **options)
        else:
            self.decoder = MirroredDecoder(mirror, net, tok, max_batch, max_len, **options)
        self.on_gpu = self.decoder.on_gpu
        self.prefill_chunk = prefill_chunk or (2048 if self.on_gpu else 128)
        # What a pass of the network costs beside its tokens, in tokens: less is not worth one.
        self.pass_cost = 256 if self.on_gpu else 32
        # A GPU reads many prompts in hardly more time than one: so they may gather, for so many
        # times as long as the last pass took, while others get their tokens.
        self.rest = 3 if self.on_gpu else 0
        self.next_pass = 0.0  # time.monotonic()
        self.n_steps = 0
        self.jobs = {}  # {slot: job}; changed by this thread alone, as is what follows
        self.reading = []  # jobs of which a chunk was read, and not the whole prompt
        self.under_way = deque()  # Chosen whose tokens nobody was given
        self.updates = []  # not told yet
        self.cached_ids = [[] for _ in range(max_batch)]  # whose keys and values each slot has
        self.cached_by = [0] * max_batch  # the adapter that made them
        self.last_used = [0] * max_batch  # the step in which a slot's last job left
        self.waiting = deque()  # jobs without a slot, under the lock of `wake`

    # ------------------------------------------------------------------ what other threads call

    def submit(self, jobs: list[Job]) -> bool:
        """Queue the jobs, all or none: whether there was room."""
        with self.wake:
            # A request may be longer than the queue, but then it comes alone.
            if self.waiting and len(self.waiting) + len(jobs) > self.max_queue:
                return False
            self.waiting.extend(jobs)
            self.wake.notify()
        return True

    def cancel(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more: they leave before the next step."""
        with self.wake:
            for job in jobs:
                job.cancelled = True
                with suppress(ValueError):  # it is in the batch, or done
                    self.waiting.remove(job)
            self.wake.notify()

    # ------------------------------------------------------------------ the thread

    def run(self) -> None:
        with generating(self.net), no_gradients(self.net):
            self.first_step()
            while self.wait_for_work():
                if self.calls:  # one a step: many do not hold up the tokens
                    self.answer_call(*self.calls.popleft())
                if self.idle_calls and not self.jobs:
                    answer(*self.idle_calls.popleft())
                try:
                    self.step()
                except Exception as error:  # no memory, say: the batch is lost, the server is not
                    print(f"serve.py: a step failed: {error!r}", file=sys.stderr, flush=True)
                    self.recover()

    def recover(self) -> None:
        """Go on without the batch; a GPU that computes no more ends the server, for whoever watches
        it to start it anew."""
        try:
            self.drop_all("the step that this sequence was in failed")
        except Exception as error:
            print(f"serve.py: nor can another one begin: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def first_step(self) -> None:
        """Make a token of nothing, so that no client waits while the weights are packed, and on a
        GPU the graphs of the usual steps."""
        decoder = self.decoder
        try:
            decoder.set(0, [0], limit=1, options={"temperature": 0})
            decoder.read({0: [0]})
            decoder.choose().wait()
            decoder.clear(0)
            if self.on_gpu:
                words = decoder.capture(
                    powers_of_two(1, self.max_batch),
                    powers_of_two(128, self.max_len),
                    [{}, {"temperature": 0}],
                )
                if not decoder.graphs.failed:  # else it has said why
                    print(f"captured {words}", flush=True)
        except Exception as error:  # then no other step would succeed
            print(f"serve.py: the first step failed: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def wait_for_work(self) -> bool:
        """Sleep until there is something to do: whether to go on."""
        with self.wake:
            while not (self.jobs or self.waiting or self.calls or self.idle_calls or self.stopped):
                self.wake.wait()
        return not self.stopped

    def step(self) -> None:
        """Every sequence whose prompt is read gets its next token; then prompts are read."""
        self.n_steps += 1
        self.metrics.add("steps_total")
        self.drop_cancelled()
        decoder = self.decoder
        guided = self.allow_tokens()
        if decoder.ready:
            self.under_way.append(decoder.choose())
            if self.on_gpu:  # it computes the next step while we see to the tokens of the last one
                decoder.feed()
        # What a grammar allows next depends on the tokens of this step: then nobody is behind, and
        # the device computes the logits while the host finds it out.
        n_behind = int(self.on_gpu and bool(decoder.ready) and not guided)
        while len(self.under_way) > n_behind:
            self.add_tokens(self.under_way.popleft())
        self.tell_updates()  # who writes to the clients has the time of the computation for it
        if not self.on_gpu:
            decoder.feed()
        self.read_prompts()
        self.tell_updates()

    def tell_updates(self) -> None:
        if self.updates:
            updates = self.updates
            self.updates = []
            self.tell(updates)

    # ------------------------------------------------------------------ prompts

    def read_prompts(self) -> None:
        """Read at most prefill_chunk tokens of prompts: first of those that were begun."""
        begun = time.monotonic()
        if self.decoder.ready and begun < self.next_pass:
            return
        self.read_for(self.prefill_chunk)
        now = time.monotonic()
        self.next_pass = now + self.rest * (now - begun)

    def read_for(self, room: int) -> None:
        """Read at most `room` tokens of prompts."""
        for job in list(self.reading):
            if room <= 0:
                return
            room -= self.read([job], room)
        pack = []  # jobs whose prompts are read whole, in one pass
        while room > 0:
            job = self.admit(pack, room)
            if job is None:
                break
            n = len(job.ids) - job.n_read
            if job.n_read == 0 and n <= room:
                pack.append(job)
                room -= n
            else:
                room -= self.read([job], room)
        self.read(pack, self.prefill_chunk)

    def admit(self, pack: list[Job], room: int) -> Job | None:
        """The next job that waits, with a slot, which starts with the longest beginning of the
        prompt that any slot has; None where there is no job, no slot, or too little room for it in
        this step. pack: jobs whose prompts are about to be read: they are, where this one begins
        like one of them."""
        with self.wake:
            if not self.waiting or len(self.jobs) == self.max_batch or self.idle_calls:
                return None
            job = self.waiting[0]
            if room < len(job.ids) <= self.prefill_chunk:  # the next step reads it whole
                return None
            self.waiting.popleft()
        n_known, source = self.longest_beginning(job)
        for other in pack:
            if other.adapter != job.adapter:
                continue
            n_common = common_beginning(other.ids, job.ids, self.reusable(job))
            if n_common >= n_known + self.pass_cost:
                self.read(pack, self.prefill_chunk)
                pack.clear()
                n_known, source = self.longest_beginning(job)
                break
        if n_known < self.pass_cost and (pack or self.waiting):
            n_known = 0  # in one pass with the others' it costs less than in one of its own
        self.take_slot(job, n_known, source)
        self.metrics.add("prompt_tokens_total", len(job.ids))
        self.metrics.add("reused_tokens_total", job.n_reused)
        return job

    def reusable(self, job: Job) -> int:
        """How many of the prompt's first tokens need not be read, where the cache has them."""
        # One token at least has to be fed, for the logits after it; to score a prompt, all. What an
        # encoder makes of a source's beginning depends on the rest.
        if job.scores_prompt or self.decoder.is_seq2seq:
            return 0
        return len(job.ids) - 1

    def longest_beginning(self, job: Job) -> tuple[int, int]:
        """(how many of the prompt's first tokens a slot has, which slot): the most there are."""
        most = self.reusable(job)
        best = (0, 0)
        for slot in range(self.max_batch):
            if self.adapter_of(slot) != job.adapter:  # its keys and values are others
                continue
            n_common = common_beginning(self.known_ids(slot), job.ids, most)
            if self.decoder.can_begin(slot, n_common):
                best = max(best, (n_common, slot))
        return best

    def adapter_of(self, slot: int) -> int:
        """The adapter that made what a slot has."""
        job = self.jobs.get(slot)
        return self.cached_by[slot] if job is None else job.adapter

    def known_ids(self, slot: int) -> list[int]:
        """The ids whose keys and values a slot has for certain."""
        job = self.jobs.get(slot)
        if job is None:
            return self.cached_ids[slot]
        if job.n_read < len(job.ids):
            return job.ids[: job.n_read]
        return job.ids + job.row.out.ids[:-1]  # the newest may not have been fed

    def take_slot(self, job: Job, n_known: int, source: int) -> None:
        """Give the job a slot, with the first n_known tokens of its prompt, which `source` has."""
        n_low = max(16, len(self.jobs) + 4)  # low slots serve best: see Decoder
        free = [slot for slot in range(min(n_low, self.max_batch)) if slot not in self.jobs]
        if n_known and source in free and 2 * n_known >= len(self.cached_ids[source]):
            slot = source  # no job has it, and this prompt continues most of it
        else:
            slot = min(free, key=self.last_used.__getitem__)
            if n_known:
                self.decoder.copy(slot, source, n_known)
        self.jobs[slot] = job
        job.slot = slot
        job.n_read = job.n_reused = n_known
        self.set_slot(job)

    def set_slot(self, job: Job) -> None:
        self.decoder.set(
            job.slot,
            job.ids,
            job.row.limit,
            options=job.options(),
            uniform=job.uniform,
            ends=job.row.ends,
            n_alternatives=job.n_alternatives or 0,
            n_cached=job.n_read,
            bias=job.sampling.logit_bias,
            guided=job.guide is not None,
            adapter=job.adapter,
            owner=job,
        )

    def read(self, jobs: list[Job], room: int) -> int:
        """Read what is left of the prompts of jobs, or at most `room` tokens of each: how many."""
        if not jobs:
            return 0
        if self.decoder.is_seq2seq:
            chunks = {job.slot: job.ids for job in jobs}
        else:
            chunks = {job.slot: job.ids[job.n_read : job.n_read + room] for job in jobs}
        states = self.decoder.read(chunks)  # {slot: (T, C)}
        finite = self.all_finite(states)
        if len(jobs) > 1 and not all(finite):
            # In one pass NaN is not only its own prompt's: each has a pass of its own.
            for job in jobs:
                self.decoder.wipe(job.slot)
                self.set_slot(job)
            return sum(self.read([job], room) for job in jobs)
        for job, is_finite in zip(jobs, finite):
            self.after_chunk(job, states[job.slot], is_finite, len(chunks[job.slot]))
        return sum(map(len, chunks.values()))

    def all_finite(self, states: dict[int, Tensor]) -> list[bool]:
        """Whether the states (T, C) of each slot are finite, [bool]. It waits for the device, so
        that no other prompt begins with what one without numbers left in the cache."""
        finite = torch.cat(list(states.values())).isfinite().all(-1).tolist()
        answers = []
        begin = 0
        for h in states.values():
            answers.append(all(finite[begin : begin + len(h)]))
            begin += len(h)
        return answers

    def after_chunk(self, job: Job, h: Tensor, is_finite: bool, n: int) -> None:
        """The next n tokens of the job's prompt were read; h (T, C): their hidden states."""
        if is_finite and job.scores_prompt:
            is_finite = self.score_prompt(job, h)
        if not is_finite:
            self.fail(job)
            return
        job.n_read += n
        is_reading = job.n_read < len(job.ids)
        if is_reading and job not in self.reading:
            self.reading.append(job)
        elif not is_reading and job in self.reading:
            self.reading.remove(job)
        if not is_reading and job.row.limit == 0:  # only the prompt was asked about
            job.row.done = True
            self.updates.append(job.news())
            self.release(job)

    def score_prompt(self, job: Job, h: Tensor) -> bool:
        """Score the prompt's tokens that follow those whose hidden states are h (T, C): whether the
        logits are finite."""
        begin = job.n_read + 1
        targets = job.ids[begin : begin + len(h)]  # none behind the prompt's last token
        if not targets:
            return True
        logits = self.decoder.prompt_logits(job.slot, len(targets))
        logprobs = logits.log_softmax(-1)  # (T, V)
        of_targets = logprobs.gather(1, torch.tensor(targets, device=h.device)[:, None])[:, 0]
        best = logprobs.topk(min(job.n_alternatives, self.tok.n_vocab))
        values = zip(targets, of_targets.tolist(), best.indices.tolist(), best.values.tolist())
        for id, logprob, ids, others in values:
            job.tokens.append(Token(id, logprob, dict(zip(ids, others))))
        return bool(logits[:, : self.tok.n_vocab].isfinite().all())

    # ------------------------------------------------------------------ new tokens

    def allow_tokens(self) -> list[Job]:
        """Tell the decoder which tokens may come next, where a grammar says so: the jobs."""
        guided = [self.jobs[slot] for slot in self.decoder.ready if self.jobs[slot].guide]
        if guided:
            masks = torch.from_numpy(np.stack([job.mask() for job in guided]))
            self.decoder.allow([job.slot for job in guided], masks)
        return guided

    def add_tokens(self, chosen: Chosen) -> None:
        """Give each job its token of those that were chosen."""
        tokens = chosen.wait()
        now = time.monotonic()
        values = zip(tokens.tokens, tokens.logprobs, tokens.finite, tokens.alternatives)
        for job, (id, logprob, is_finite, alternatives) in zip(chosen.owners, values):
            if job.slot is None:  # it left while the token was under way
                continue
            if not is_finite:
                self.fail(job)
                continue
            self.deliver(job, Token(id, logprob, alternatives), now)
            if job.guide is not None:
                self.guide(job, id)
            if job.row.done:
                self.release(job)

    def deliver(self, job: Job, token: Token, now: float) -> None:
        """Add the token to the job; tell what is certain of the text."""
        self.metrics.add("generated_tokens_total")
        if job.first_token_at is None:
            job.first_token_at = now
            self.metrics.observe("first_token_seconds", now - job.arrived)
        else:
            self.metrics.observe("between_tokens_seconds", now - job.last_token_at)
        job.last_token_at = now
        job.tokens.append(token)
        job.row.take(token.id, token.logprob)
        if any(job.pieces) or job.row.done:
            self.updates.append(job.news())

    def guide(self, job: Job, id: int) -> None:
        """The job goes on in its grammar by this token, or ends where that does."""
        was_done = job.row.done
        if was_done and job.row.out.finish_reason == "stop":
            return
        try:
            job.guide.take(id)
        except UserError as error:  # beyond the library's limits: its own request fails alone
            job.row.done = True
            if not was_done:
                why = f"its grammar: {error}"
                self.updates.append(Update(job, "", [], done=True, error=why, refused=True))
            return
        if job.guide.done:
            job.row.finish()
            if not was_done:  # else its last token is the limit's too
                self.updates.append(job.news())

    # ------------------------------------------------------------------ who leaves

    def release(self, job: Job) -> None:
        """The job leaves. Its slot keeps what it had, for prompts that begin alike."""
        slot = job.slot
        self.cached_ids[slot] = self.known_ids(slot)
        self.cached_by[slot] = job.adapter
        self.last_used[slot] = self.n_steps
        self.decoder.clear(slot)
        del self.jobs[slot]
        job.slot = None
        job.uniform = None  # a slow client may hold the job for long
        if job in self.reading:
            self.reading.remove(job)

    def fail(self, job: Job) -> None:
        """The job leaves with an error, and its keys and values with it: attention gives what is
        behind a row's end no weight, but 0 times NaN is NaN."""
        self.updates.append(Update(job, "", [], done=True, error=NOT_FINITE))
        slot = job.slot
        self.release(job)
        self.cached_ids[slot] = []
        self.decoder.wipe(slot)

    def drop_cancelled(self) -> None:
        for job in list(self.jobs.values()):
            if job.cancelled:
                self.release(job)

    def forget(self) -> None:
        self.under_way.clear()  # of sequences that have left
        self.cached_ids = [[] for _ in range(self.max_batch)]
        self.decoder.forget()

    def drop_all(self, why: str) -> None:
        """Every job of the batch fails, and what the cache has is trusted no more."""
        self.under_way.clear()
        for job in list(self.jobs.values()):
            self.updates.append(Update(job, "", [], done=True, error=why))
            self.release(job)
        self.cached_ids = [[] for _ in range(self.max_batch)]
        self.tell_updates()


def powers_of_two(least: int, most: int) -> list[int]:
    """[least, 2 least, 4 least ...], of which the last is the first that is no less than most."""
    powers = [power_of_two(least)]
    while powers[-1] < most:
        powers.append(2 * powers[-1])
    return powers


def common_beginning(a: list[int], b: list[int], most: int) -> int:  # type: ignore[return]
    """How many items two lists have in common from their beginnings on, at most `most`."""
    most = min(most, len(a), len(b))
    if a[:most] == b[:most]:
        return most
    for i in range(most):
        if a[i] != b[i]:
            return i
