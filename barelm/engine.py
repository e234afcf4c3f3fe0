"""Continuous batching: one thread, one network, one cache, and a batch that changes between steps.

    engine = Engine(net, tok, max_batch=16, max_len=256)
    engine.start()
    job = Job(tok, tok.encode("import"), limit=9, sampling=Sampling(seed=1), listener=print)
    engine.submit([job])  # prints an Update as each token comes
    engine.stop()

Jobs in, tokens out; who asks for them, and how, is not known here. Every step gives each sequence
of the batch one token, so that sequences join and leave between steps (iteration-level scheduling:
Yu et al. 2022, "Orca"). In the same step a new prompt is read, a chunk of it if it is long, so that
the others never wait for the whole (chunked prefills: Agrawal et al. 2023, "Sarathi"). A prompt
that begins like one that the cache still has is read from where they part.
"""

import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from barelm.fast import generating
from barelm.metrics import Metrics
from barelm.run import UserError
from model import KVCache, Row, choose_tokens, draws, feed, head, penalize

NOT_FINITE = (
    "the network gives NaN or infinity here: its weights are damaged, or --dtype is too narrow for "
    "them (--dtype=float32 is the widest)"
)


def limited(default, least, most):
    """A field of a dataclass that wants numbers from `least` to `most`."""
    return field(default=default, metadata={"limits": (least, most)})


@dataclass
class Sampling:
    """How the tokens of a sequence are chosen. What is added here is a field of the server's
    requests too (barelm/api.py), which checks the type and the limits."""

    presence_penalty: float = limited(0.0, -2, 2)  # off the logit of a token that was generated
    frequency_penalty: float = limited(0.0, -2, 2)  # the same, each time that it was
    repetition_penalty: float = limited(1.0, 0.01, 100)  # divides the logits of tokens seen
    temperature: float = limited(1.0, 0, 100)  # 0: always the likeliest token
    top_k: int = limited(0, -1, 2**31)  # draw among so many likeliest; 0: all
    top_p: float = limited(1.0, 0, 1)  # draw among the likeliest with this much probability
    min_p: float = limited(0.0, 0, 1)  # draw among those this fraction as likely as the likeliest
    seed: int | None = limited(None, -(2**63), 2**63 - 1)  # of the draws; None: 0
    stop: object = field(default_factory=list)  # texts that end the answer, which lacks them

    def changes_logits(self):
        penalties = (self.presence_penalty, self.frequency_penalty)
        return self.repetition_penalty != 1 or any(penalties)


FILTERS = ("temperature", "top_k", "top_p", "min_p")  # of Sampling: what choose_tokens takes


@dataclass
class Token:
    """A token of an answer, or of a prompt that is scored."""

    id: int
    logprob: float | None  # the network's own, in nats; None: nothing stands before the token
    alternatives: dict  # {id: log p} of the likeliest tokens at this place


@dataclass
class Update:
    """What is new of a job."""

    job: "Job"
    text: str
    tokens: list  # [Token]
    done: bool  # nothing comes after it
    error: str | None = None  # why the job failed


class Job:
    """One sequence in the making.

    ids: the prompt, not empty.
    limit: how many tokens to add at most; 0 asks about the prompt alone.
    listener(update): called by the engine's thread with each Update; it must not wait.
    index: which of a request's sequences it is, and so which random numbers it draws.
    ends: ids that end the answer.
    n_alternatives: how many to tell of each token; None: no log-probabilities either.
    echo: the prompt's text, where it belongs to the answer, and its tokens' log-probabilities too.
    """

    def __init__(
        self, tok, ids, limit, sampling, listener, index=0, ends=(), n_alternatives=None, echo=None
    ):
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
        self.row = Row(tok, limit, sampling.stop, self.pieces.append, ends)
        self.uniform = draws(sampling.seed or 0, index, limit)  # (limit,), one draw a token
        self.seen = None  # (V,) bool: tokens of prompt and answer, once a penalty asks
        self.counts = None  # (V,): how often each was generated
        self.n_reused = 0  # tokens of the prompt that the cache had already
        self.cancelled = False
        self.arrived = time.monotonic()
        self.first_token_at = None
        self.last_token_at = None

    @property
    def n_generated(self):
        return len(self.row.out.ids)

    def count(self, token):
        """Remember a generated token, for penalties."""
        if self.counts is not None:
            self.seen[token] = True
            self.counts[token] += 1

    def tell(self):
        """What is new, to the listener."""
        update = Update(self, "".join(self.pieces), self.tokens, done=self.row.done)
        self.tokens = []
        self.pieces.clear()  # the row appends to this very list
        self.listener(update)

    def fail(self, why):
        self.listener(Update(self, "", [], done=True, error=why))


class Engine(threading.Thread):
    """The thread that owns the network.

    jobs[i] has row i of the cache. First come the jobs that decode, then at most one whose prompt
    is being read. The rows behind them have no job, but keep what they had, for prompts that begin
    alike. prefill_chunk: how many tokens of prompts are read in a step. max_queue: how many jobs
    may wait."""

    def __init__(self, net, tok, max_batch, max_len, prefill_chunk=128, max_queue=256):
        super().__init__(daemon=True)
        self.net = net
        self.tok = tok
        self.max_batch = max_batch
        self.max_len = max_len  # tokens of a prompt and its answer
        self.prefill_chunk = prefill_chunk
        self.max_queue = max_queue
        self.metrics = Metrics()
        table = net.model.embed_tokens.weight
        self.device = table.device
        # A CPU attends to float32 faster than to less, as in model.prefill.
        dtype = torch.float32 if self.device.type == "cpu" else table.dtype
        self.cache = KVCache(net.config, max_batch, max_len, self.device, dtype)
        self.cached_ids = [[] for _ in range(max_batch)]  # whose keys and values each row has
        self.last_used = [0] * max_batch  # the step in which a row's last job left
        self.n_steps = 0
        self.jobs = []  # changed by this thread alone
        self.waiting = deque()  # jobs without a row; this and the rest under the lock of `wake`
        self.calls = deque()  # (future, f, args)
        self.stopped = False
        self.wake = threading.Condition()

    # ------------------------------------------------------------------ what other threads call

    def submit(self, jobs):
        """Queue the jobs, all or none: whether there was room."""
        with self.wake:
            # A request may be longer than the queue, but then it comes alone.
            if self.waiting and len(self.waiting) + len(jobs) > self.max_queue:
                return False
            self.waiting.extend(jobs)
            self.wake.notify()
        return True

    def cancel(self, jobs):
        """Nobody waits for these any more: they leave before the next step."""
        with self.wake:
            for job in jobs:
                job.cancelled = True
                with suppress(ValueError):  # it is in the batch, or done
                    self.waiting.remove(job)
            self.wake.notify()

    def call(self, f, *args):
        """A Future of f(*args), called between two steps: for whoever else needs the network."""
        future = Future()
        with self.wake:
            self.calls.append((future, f, args))
            self.wake.notify()
        return future

    def stop(self):
        """End the thread after its step: Python may not end while torch computes."""
        with self.wake:
            self.stopped = True
            self.wake.notify()
        self.join()

    # ------------------------------------------------------------------ the thread

    def run(self):
        with generating(self.net), torch.inference_mode():
            self.first_step()
            while self.wait_for_work():
                if self.calls:  # one a step: many do not hold up the tokens
                    self.answer_call(*self.calls.popleft())
                try:
                    self.step()
                except Exception as error:  # no memory, say: the batch is lost, the server is not
                    print(f"serve.py: a step failed: {error!r}", file=sys.stderr, flush=True)
                    self.drop_all("the step that this sequence was in failed")

    def first_step(self):
        """Feed one token, so that no client waits while the weights are packed."""
        try:
            feed(self.net, self.tok, self.cache.part(0, [0]), self.cache.lengths[:1, None])
        except Exception as error:  # then no other step would succeed
            print(f"serve.py: the first step failed: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def wait_for_work(self):
        """Sleep until there is something to do: whether to go on."""
        with self.wake:
            while not (self.jobs or self.waiting or self.calls or self.stopped):
                self.wake.wait()
        return not self.stopped

    def answer_call(self, future, f, args):
        if not future.set_running_or_notify_cancel():  # it was given up meanwhile
            return
        try:
            future.set_result(f(*args))
        except (Exception, UserError) as error:
            future.set_exception(error)

    def step(self):
        """Every sequence gets its next token, those too whose prompts a chunk completes."""
        self.n_steps += 1
        self.metrics.add("steps_total")
        self.drop_cancelled()
        ready = [job for i, job in enumerate(self.jobs) if not self.is_reading(i)]
        logits = []  # of the ready jobs, in their order: pieces (n, V)
        if ready:
            logits.append(self.decode(ready))
        room = self.prefill_chunk
        while room > 0:
            if len(self.jobs) == len(ready) and not self.admit():
                break
            n_read, last_logits = self.read_prompt(room)
            room -= n_read
            if last_logits is not None:
                ready.append(self.jobs[-1])
                logits.append(last_logits)
        if ready:  # ready[i] is jobs[i]
            self.add_tokens(ready, torch.cat(logits))

    def is_reading(self, i):
        """Whether the prompt of job i is not read to its end."""
        return len(self.cached_ids[i]) < len(self.jobs[i].ids)

    def decode(self, ready):
        """The logits (n, V) after the newest token of each of the n first rows' jobs, which is fed
        here: until now only its text was told."""
        lengths = [len(ids) for ids in self.cached_ids[: len(ready)]]
        rows = self.cache.part(0, lengths)
        newest = [job.row.out.ids[-1] for job in ready]
        for ids, token in zip(self.cached_ids, newest):
            ids.append(token)
        return feed(self.net, self.tok, rows, torch.tensor(newest).to(self.device)[:, None])

    # ------------------------------------------------------------------ prompts

    def admit(self):
        """Give the next job that waits the first row without one: whether there were both. The row
        starts with the longest beginning of the prompt that any row has."""
        i = len(self.jobs)
        with self.wake:
            if not self.waiting or i == self.max_batch:
                return False
            job = self.waiting.popleft()
            self.jobs.append(job)
        n_reused, source = self.longest_beginning(job)
        if source >= i and 2 * n_reused >= len(self.cached_ids[source]):
            row = source  # no job has it, and this prompt continues most of it
        else:
            row = min(range(i, self.max_batch), key=self.last_used.__getitem__)
            if n_reused:
                self.cache.copy([row], [source], n_reused)
        self.cached_ids[row] = job.ids[:n_reused]
        self.swap_rows(i, row)
        job.n_reused = n_reused
        self.metrics.add("prompt_tokens_total", len(job.ids))
        self.metrics.add("reused_tokens_total", n_reused)
        return True

    def longest_beginning(self, job):
        """(how many of the prompt's first tokens a row has, which row): the most there are."""
        # One token at least has to be fed, for the logits after it; to score a prompt, all.
        most = 0 if job.scores_prompt else len(job.ids) - 1
        best = (0, 0)
        for row, ids in enumerate(self.cached_ids):
            best = max(best, (common_beginning(ids, job.ids, most), row))
        return best

    def read_prompt(self, room):
        """Feed at most `room` tokens of the last job's prompt: (how many; the logits (1, V) behind
        the prompt if this was its end and tokens are wanted, else None)."""
        i = len(self.jobs) - 1
        job = self.jobs[i]
        begin = len(self.cached_ids[i])
        chunk = job.ids[begin : begin + room]
        row = self.cache.part(i, [begin])
        h = self.net.hidden(torch.tensor([chunk], device=self.device), cache=row)  # (1, T, C)
        self.cached_ids[i] += chunk
        # Checked at once, before another prompt begins with what this one left in the cache.
        finite = bool(h.isfinite().all())
        if finite and job.scores_prompt:
            finite = self.score_prompt(job, begin, h[0])
        if not finite:
            self.fail(i)
            return len(chunk), None
        if self.is_reading(i):
            return len(chunk), None
        if job.row.limit == 0:  # only the prompt was asked about
            job.row.done = True
            job.tell()
            self.release(i)
            return len(chunk), None
        return len(chunk), head(self.net, self.tok, h[:, -1])

    def score_prompt(self, job, begin, h):
        """Score the prompt's tokens that follow those at begin to begin + T, whose hidden states
        are h (T, C): whether the logits are finite."""
        targets = job.ids[begin + 1 : begin + len(h) + 1]  # none behind the prompt's last token
        if not targets:
            return True
        logits = head(self.net, self.tok, h[: len(targets)])
        job.tokens += self.describe(logits, targets, [job.n_alternatives] * len(targets))
        return all(self.finite_rows(logits))

    # ------------------------------------------------------------------ new tokens

    def add_tokens(self, jobs, logits):
        """Give each job its next token by its row of logits (n, V), and tell those who wait."""
        ids = self.choose(jobs, logits)
        tokens = self.describe(logits, ids, [job.n_alternatives for job in jobs])
        finite = self.finite_rows(logits)
        now = time.monotonic()
        self.metrics.add("generated_tokens_total", len(jobs))
        for job, token, is_finite in zip(jobs, tokens, finite):
            if is_finite:
                self.deliver(job, token, now)
        for i in reversed(range(len(jobs))):  # from the end, as rows behind i move when i leaves
            if not finite[i]:
                self.fail(i)
            elif jobs[i].row.done:
                self.release(i)

    def choose(self, jobs, logits):
        """The next token of each job, [id]."""
        logits = self.penalized(jobs, logits)
        filters = {name: [getattr(job.sampling, name) for job in jobs] for name in FILTERS}
        uniform = torch.stack([job.uniform[job.n_generated] for job in jobs])
        return choose_tokens(logits, uniform.to(self.device), **filters).tolist()

    def penalized(self, jobs, logits):
        """The logits with the penalties of those jobs that have one."""
        rows = [i for i, job in enumerate(jobs) if job.sampling.changes_logits()]
        if not rows:
            return logits
        jobs = [jobs[i] for i in rows]
        for job in jobs:
            if job.counts is None:
                job.seen = torch.zeros_like(logits[0], dtype=torch.bool)
                job.seen[torch.tensor(job.ids, device=self.device)] = True
                job.counts = torch.zeros_like(logits[0])

        def column(name):  # (n, 1)
            return logits.new_tensor([[getattr(job.sampling, name)] for job in jobs])

        logits = logits.clone()  # the log-probabilities that are told are the network's own
        logits[rows] = penalize(
            logits[rows],
            torch.stack([job.seen for job in jobs]),
            column("repetition_penalty"),
            torch.stack([job.counts for job in jobs]),
            column("presence_penalty"),
            column("frequency_penalty"),
        )
        return logits

    def describe(self, logits, ids, n_alternatives):
        """[Token] of ids by their rows of logits (n, V), each with so many alternatives; None: its
        log p is of no interest, and 0 if no other's is."""
        if all(n is None for n in n_alternatives):
            return [Token(id, 0.0, {}) for id in ids]
        logprobs = logits.log_softmax(-1)
        of_ids = logprobs.gather(1, torch.tensor(ids, device=self.device)[:, None])[:, 0].tolist()
        most = max(n or 0 for n in n_alternatives)
        best = logprobs.topk(min(most, self.tok.n_vocab))
        tokens = []
        for i, (others, values) in enumerate(zip(best.indices.tolist(), best.values.tolist())):
            n = n_alternatives[i] or 0
            tokens.append(Token(ids[i], of_ids[i], dict(zip(others[:n], values[:n]))))
        return tokens

    def finite_rows(self, logits):
        """Of each row (V,) whether it has a finite number for every token: [bool]."""
        return logits[:, : self.tok.n_vocab].isfinite().all(-1).tolist()

    def deliver(self, job, token, now):
        """Add the token to the job; tell what is certain of the text."""
        if job.first_token_at is None:
            job.first_token_at = now
            self.metrics.observe("first_token_seconds", now - job.arrived)
        else:
            self.metrics.observe("between_tokens_seconds", now - job.last_token_at)
        job.last_token_at = now
        job.tokens.append(token)
        job.row.take(token.id, token.logprob)
        job.count(token.id)
        if any(job.pieces) or job.row.done:
            job.tell()

    # ------------------------------------------------------------------ rows

    def release(self, i):
        """Job i leaves. Its row moves behind those with jobs, and those that decode stay together,
        before the one that reads."""
        self.last_used[i] = self.n_steps
        self.jobs[i].seen = self.jobs[i].counts = None  # a slow client may hold the job for long
        last = len(self.jobs) - 1
        last_decoding = last - 1 if self.is_reading(last) else last
        for j in (last_decoding, last):
            if i < j:
                self.swap_rows(i, j)
                self.jobs[i] = self.jobs[j]
                i = j
        self.jobs.pop()

    def swap_rows(self, i, j):
        """Exchange two rows of the cache."""
        if i == j:
            return
        length = max(len(self.cached_ids[i]), len(self.cached_ids[j]))
        self.cache.copy([i, j], [j, i], length)
        for values in (self.cached_ids, self.last_used):
            values[i], values[j] = values[j], values[i]

    def fail(self, i):
        """Job i leaves with an error, and its keys and values with it: attention gives what is
        behind a row's end no weight, but 0 times NaN is NaN."""
        self.jobs[i].fail(NOT_FINITE)
        self.release(i)
        row = len(self.jobs)  # where release puts it
        self.cached_ids[row] = []
        self.cache.store[:, :, row] = 0

    def drop_cancelled(self):
        for i in reversed(range(len(self.jobs))):
            if self.jobs[i].cancelled:
                self.release(i)

    def drop_all(self, why):
        """Every job of the batch fails, and what the cache has is trusted no more."""
        for job in self.jobs:
            job.fail(why)
        self.jobs = []
        self.cached_ids = [[] for _ in range(self.max_batch)]


def common_beginning(a, b, most):
    """How many items two lists have in common from their beginnings on, at most `most`."""
    most = min(most, len(a), len(b))
    if a[:most] == b[:most]:
        return most
    for i in range(most):
        if a[i] != b[i]:
            return i
