"""A checkpoint as a server that speaks OpenAI's protocol, with a page to try it in a browser.

    python serve.py                                     # http://127.0.0.1:8000 with out/python
    python serve.py --model=out/sft --port=9000 --max_batch=32
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "import os", "max_tokens": 20}'
    python serve.py --host=0.0.0.0 --api_key=SECRET     # open to others: give it a key

--model is a run of ours or a Hugging Face folder (Qwen3, Qwen2, Llama, GPT-2). Any client of
OpenAI's works with base_url="http://127.0.0.1:8000/v1". One thread owns the network and advances
all requests by one token a step; they join and leave between steps. Ctrl-C or SIGTERM lets the
running requests finish. Needs fastapi and uvicorn: pip install -r requirements-serve.txt
"""

from config import configure

model = "out/python"  # a checkpoint folder
host = "127.0.0.1"  # who may connect: 127.0.0.1 this machine alone, 0.0.0.0 everyone
port = 8000  # 0: any free one
api_key: str | None = None  # asked of every client; or set BARELM_API_KEY, which ps does not show
cors: str | None = None  # web sites that may call, "https://a.org,https://b.org", or "*"
max_batch = 16  # sequences that are generated at once
max_len = 0  # tokens of a prompt and its answer, at most; 0: the model's context
max_queue = 256  # sequences that may wait for a place in the batch; more are answered 429
prefill_chunk = 128  # tokens of prompts read in one step, which the others wait for
max_body = 4_000_000  # bytes of a request, at most
timeout = 600.0  # seconds that a request may take
client_timeout = 20.0  # seconds that a client may take to send its request, or to read a piece
drain = 30.0  # seconds that running requests have to finish in after SIGTERM
log: str | None = None  # a file that gets a line of JSON for each request
log_prompts = False  # with what was asked and answered
seed: int | None = None  # of requests that bring none; None: another for each
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16
quantize: str | None = None  # int8: weights of one byte, for half the memory or less

if __name__ == "__main__":
    configure(globals())

import asyncio
import codecs
import difflib
import hmac
import json
import math
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch

import model as core
from model import UserError

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise UserError(f"{error}: pip install -r requirements-serve.txt") from None

# --------------------------------------------------------------------------------------------------
# Metrics


class Histogram:
    """How many values were at most each bound, as Prometheus counts them."""

    bounds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, math.inf)

    def __init__(self):
        self.counts, self.sum = [0] * len(self.bounds), 0.0

    def add(self, value):
        self.counts[next(i for i, bound in enumerate(self.bounds) if value <= bound)] += 1
        self.sum += value

    def lines(self, name):
        total = 0
        for bound, count in zip(self.bounds, self.counts):
            total += count
            yield f'{name}_bucket{{le="{"+Inf" if bound == math.inf else bound}"}} {total}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


class Metrics:
    """What /metrics shows. Each number is written by one thread."""

    def __init__(self):
        self.requests = Counter()  # by (path, status)
        self.prompt_tokens = self.reused_tokens = self.generated_tokens = self.steps = 0
        self.first_token, self.between_tokens, self.request = (Histogram() for _ in range(3))

    def text(self, engine):
        """The Prometheus text format, version 0.0.4."""
        out = []

        def show(name, kind, what, lines):
            out.extend((f"# HELP barelm_{name} {what}", f"# TYPE barelm_{name} {kind}", *lines))

        named = [
            f'barelm_requests_total{{path="{path}",status="{status}"}} {n}'
            for (path, status), n in sorted(self.requests.items())
        ]
        show("requests_total", "counter", "Requests answered.", named)
        for name, kind, what, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("reused_tokens_total", "counter", "Of these, found in the cache.", self.reused_tokens),
            ("generated_tokens_total", "counter", "Tokens generated.", self.generated_tokens),
            ("steps_total", "counter", "Steps of the engine.", self.steps),
            ("queue_length", "gauge", "Sequences that wait.", len(engine.waiting)),
            ("batch_size", "gauge", "Sequences in the batch.", len(engine.jobs)),
            ("batch_limit", "gauge", "Sequences that the batch can hold.", engine.max_batch),
        ):
            show(name, kind, what, [f"barelm_{name} {value}"])
        for name, what in (
            ("first_token", "From the arrival of a request to its first token."),
            ("between_tokens", "From one token of a sequence to the next."),
            ("request", "From the arrival of a generating request to its end."),
        ):
            lines = getattr(self, name).lines(f"barelm_{name}_seconds")
            show(f"{name}_seconds", "histogram", what, lines)
        return "\n".join(out) + "\n"


# --------------------------------------------------------------------------------------------------
# The engine: one thread, one network, one cache, a batch that changes between steps


class Job:
    """One sequence: a prompt, how to continue it, and what has become of it.

    ids: the prompt. options: those of `choose_tokens` and `penalize`, by name. top: how many
    alternatives of each token to tell, None for no log-probabilities at all. notify(job, piece,
    tokens, done) is called in the engine's thread: new text, and the tokens since the last call as
    (id, log p, {alternative: log p}); piece is an Exception where the job failed."""

    def __init__(self, tok, ids, limit, options, *, seed=0, index=0, stop=(), ends=(), top=None,
                 echo=False, notify=None):  # fmt: skip
        self.ids, self.options, self.index, self.top, self.echo = ids, options, index, top, echo
        self.pieces, self.tokens, self.prompt_tokens = [], [], []
        self.row = core.Row(tok, limit, stop, self.pieces.append, ends)
        self.uniform = core.draws(seed, index, limit).tolist()
        self.notify, self.gone, self.reused = notify, False, 0
        self.arrived, self.last = time.monotonic(), None  # when the job came; its last token
        self.first = None
        changed = ("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0)
        self.penalized = any(options[name] != usual for name, usual in changed)
        self.seen = self.counts = None


class Busy(Exception):
    """The queue is full."""


class Engine(threading.Thread):
    """The thread that owns the network.

    jobs[i] has row i of the cache: first those that decode, then at most one whose prompt is being
    read. Rows that no job has keep what they held, for prompts that begin alike."""

    def __init__(self, net, tok, max_batch, max_len, chunk, max_queue, metrics):
        super().__init__(daemon=True)
        self.net, self.tok, self.metrics = net, tok, metrics
        self.max_batch, self.max_len, self.chunk = max_batch, max_len, chunk
        self.max_queue = max_queue
        self.longest = max(map(len, tok.bytes.values()))  # bytes of a token, at most
        self.turn_ends = tok.end_of_turn() if tok.config.get("chat_template") else []
        table = net.model.embed_tokens.weight
        kind = torch.float32 if table.device.type == "cpu" else table.dtype  # as in core.prefill
        self.cache = core.KVCache(net.config, max_batch, max_len, table.device, kind)
        self.jobs, self.waiting, self.calls = [], deque(), deque()
        self.held = [[] for _ in range(max_batch)]  # the ids whose keys and values a row holds
        self.used_at = [0] * max_batch  # the step in which a row was last used
        self.wake, self.stopping = threading.Condition(), False

    # What other threads call.

    def submit(self, jobs):
        """Queue the jobs, all or none: Busy where they do not fit."""
        with self.wake:
            if self.waiting and len(self.waiting) + len(jobs) > self.max_queue:
                raise Busy
            self.waiting.extend(jobs)
            self.wake.notify()

    def cancel(self, jobs):
        """Nobody waits for these any more: they leave before the next step."""
        with self.wake:
            for job in jobs:
                job.gone = True
            for job in [job for job in self.waiting if job.gone]:
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
        with self.wake:
            self.stopping = True
            self.wake.notify()

    # What its own thread does.

    def run(self):
        with core.generating(self.net), torch.inference_mode():
            while True:
                with self.wake:
                    while not (self.jobs or self.waiting or self.calls or self.stopping):
                        self.wake.wait()
                if self.stopping:
                    return
                while self.calls:
                    self.answer(*self.calls.popleft())
                try:
                    self.step()
                except Exception as error:  # of memory, say: who is in the batch must know
                    print(f"serve.py: a step failed: {error!r}", file=sys.stderr, flush=True)
                    self.fail(error)

    def answer(self, future, f, args):
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(f(*args))
        except (Exception, UserError) as error:
            future.set_exception(error if isinstance(error, Exception) else ValueError(str(error)))

    def fail(self, error):
        for job in self.jobs:
            job.notify(job, error, [], True)
        self.jobs, self.held = [], [[] for _ in range(self.max_batch)]

    def step(self):
        """Every sequence gets its next token; so do those whose prompts a chunk completes."""
        self.metrics.steps += 1
        for i in reversed(range(len(self.jobs))):
            if self.jobs[i].gone:
                self.release(i)
        ready = [job for i, job in enumerate(self.jobs) if len(self.held[i]) >= len(job.ids)]
        logits = []
        if ready:
            last = [job.row.out.ids[-1] for job in ready]
            part = self.cache.part(0, [len(ids) for ids in self.held[: len(ready)]])
            ids = torch.tensor(last, device=part.lengths.device)[:, None]
            logits.append(core.feed(self.net, self.tok, part, ids))
            for ids, token in zip(self.held, last):
                ids.append(token)
        room = self.chunk
        while room > 0 and (len(self.jobs) > len(ready) or self.admit()):
            room -= self.read_prompt(room, ready, logits)
        if ready:
            self.take(ready, torch.cat(logits))

    def admit(self):
        """Give the next job that waits the first free row: whether there were both. The row starts
        with the longest beginning of the prompt that any row holds."""
        n = len(self.jobs)
        with self.wake:
            if not self.waiting or n == self.max_batch:
                return False
            job = self.waiting.popleft()
            self.jobs.append(job)
        found, source = 0, n
        if not (job.echo and job.top is not None):  # which needs the logits after every token
            most = len(job.ids) - 1
            found, source = max((common(ids, job.ids, most), i) for i, ids in enumerate(self.held))
        oldest = min(range(n, self.max_batch), key=self.used_at.__getitem__)
        # A row that would be continued is taken; else the one that was idle longest is given up.
        row = source if source >= n and 2 * found >= len(self.held[source]) else oldest
        if row != source and found:
            self.cache.copy([row], [source], found)
            self.held[row] = self.held[source][:found]
        self.swap(n, row)
        del self.held[n][found:]
        job.reused = found
        self.metrics.prompt_tokens += len(job.ids)
        self.metrics.reused_tokens += found
        return True

    def swap(self, i, j):
        """Exchange two rows of the cache."""
        if i != j:
            length = max(len(self.held[i]), len(self.held[j]))
            self.cache.copy([i, j], [j, i], length)
            for rows in (self.held, self.used_at):
                rows[i], rows[j] = rows[j], rows[i]

    def release(self, i):
        """The job in row i leaves. Decoding ones stay together, and before the one in prefill."""
        self.used_at[i], n = self.metrics.steps, len(self.jobs)
        decoding = n - (len(self.held[n - 1]) < len(self.jobs[n - 1].ids))
        for j in (decoding - 1, n - 1):
            if i < j:
                self.swap(i, j)
                self.jobs[i], self.jobs[j], i = self.jobs[j], self.jobs[i], j
        self.jobs.pop()

    def read_prompt(self, room, ready, logits):
        """Feed at most `room` tokens of the last job's prompt: how many. With the prompt's end the
        job is ready, and the logits after it are added."""
        row, job = len(self.jobs) - 1, self.jobs[-1]
        held = self.held[row]
        new = job.ids[len(held) : len(held) + room]
        part, begin = self.cache.part(row, [len(held)]), len(held)
        ids = torch.tensor([new], device=part.lengths.device)
        h = self.net.hidden(ids, cache=part)
        held += new
        if job.echo and job.top is not None:
            targets = job.ids[begin + 1 : begin + 1 + len(new)]
            some = core.head(self.net, self.tok, h[0, : len(targets)])
            job.prompt_tokens += self.describe(some, targets, [job.top] * len(targets))
        if len(held) < len(job.ids):
            return len(new)
        if job.row.limit:
            ready.append(job)
            logits.append(core.head(self.net, self.tok, h[:, -1]))
        else:  # only the prompt was asked about
            job.notify(job, "", [], True)
            self.release(row)
        return len(new)

    def describe(self, logits, ids, tops):
        """[(id, log p, {alternative: log p})] of the ids, one a row of logits; the alternatives are
        as many as `tops` says, None: nothing to tell."""
        if not ids or all(top is None for top in tops):
            return [(id, 0.0, {}) for id in ids]
        chances = logits.log_softmax(-1)
        chosen = chances.gather(1, torch.tensor(ids, device=chances.device)[:, None])[:, 0].tolist()
        k = min(max(top or 0 for top in tops), self.tok.n_vocab)
        values, order = (t.tolist() for t in chances.topk(k)) if k else ([[]] * len(ids),) * 2
        rows = zip(ids, chosen, tops, order, values)
        return [(id, lp, dict(zip(o[: top or 0], v))) for id, lp, top, o, v in rows]

    def take(self, ready, logits):
        """Choose a token for each job that is ready, by its row of logits."""
        likely, some = logits, [i for i, job in enumerate(ready) if job.penalized]
        if some:
            likely = logits.clone()
            likely[some] = self.penalized([ready[i] for i in some], logits[some])
        uniform = [job.uniform[len(job.row.out.ids)] for job in ready]
        names = ("temperature", "top_k", "top_p", "min_p")
        filters = {name: [job.options[name] for job in ready] for name in names}
        uniform = torch.tensor(uniform, device=logits.device)
        tokens = core.choose_tokens(likely, uniform, **filters).tolist()
        for job, told in zip(ready, self.describe(logits, tokens, [job.top for job in ready])):
            self.tell(job, told)
        done = {id(job) for job in ready if job.row.done}
        for i in reversed(range(len(self.jobs))):
            if id(self.jobs[i]) in done:
                self.release(i)

    def penalized(self, jobs, logits):
        """The logits after each job's penalties."""
        for job in jobs:
            if job.seen is None:
                job.seen, job.counts = logits.new_zeros(2, logits.shape[1])
                job.seen[torch.tensor(job.ids, device=logits.device)] = 1
        seen, counts = (torch.stack([getattr(j, s) for j in jobs]) for s in ("seen", "counts"))
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        column = lambda name: torch.tensor([[job.options[name]] for job in jobs])
        repetition, presence, frequency = (column(name).to(logits) for name in names)
        return core.penalize(logits, seen > 0, repetition, counts, presence, frequency)

    def tell(self, job, told):
        """A job's next token: its row takes it, whoever waits hears of it."""
        now, token = time.monotonic(), told[0]
        if job.last is None:
            job.first = now
            self.metrics.first_token.add(now - job.arrived)
        else:
            self.metrics.between_tokens.add(now - job.last)
        job.last = now
        self.metrics.generated_tokens += 1
        if job.seen is not None:
            job.seen[token] = 1
            job.counts[token] += 1
        job.row.take(token, told[1])
        job.tokens.append(told)
        if job.pieces or job.row.done:
            piece, tokens, job.tokens = "".join(job.pieces), job.tokens, []
            job.pieces.clear()
            job.notify(job, piece, tokens, job.row.done)


def common(a, b, most):
    """How many items two lists have in common from their beginnings on, at most `most`."""
    most = min(most, len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


# --------------------------------------------------------------------------------------------------
# The protocol: what a request may say, and how it is answered


class ApiError(Exception):
    """An answer that is an error: its HTTP status and what OpenAI's clients read of it."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def reply(value, status=200, headers=None):
    """A response of JSON, in ASCII: half a surrogate pair has no UTF-8."""
    text = json.dumps(value, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def error_body(error):
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    told = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return {"error": told}


def error_reply(error):
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return reply(error_body(error), error.status, headers.get(error.status))


def short(value):
    """A value as an error message shows it."""
    text = ascii(value) if not isinstance(value, (list, dict)) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


async def read_body(request):
    """The JSON object of a request."""
    data = bytearray()

    async def read():
        async for piece in request.stream():
            data.extend(piece)
            if len(data) > max_body:
                raise ApiError(413, f"the body has more than {max_body} bytes (--max_body)")

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    try:
        if int(request.headers.get("content-length", 0)) > max_body:
            raise ApiError(413, f"the body has more than {max_body} bytes (--max_body)")
        await asyncio.wait_for(read(), client_timeout)
        body = json.loads(data.decode(), parse_constant=refuse)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took more than {client_timeout:g} s") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {short(str(error))}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"expected a JSON object, not {short(body)}")
    return body


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
NAMES |= {list: "a list", dict: "an object"}

# What a request may say: name: (type, least, most, default).
COMMON = {
    "model": (str, None, None, None),
    "max_tokens": (int, 0, 2**31, None),
    "temperature": (float, 0, 100, 1.0),
    "top_k": (int, -1, 2**31, 0),
    "top_p": (float, 0, 1, 1.0),
    "min_p": (float, 0, 1, 0.0),
    "repetition_penalty": (float, 0.01, 100, 1.0),
    "presence_penalty": (float, -2, 2, 0.0),
    "frequency_penalty": (float, -2, 2, 0.0),
    "n": (int, 1, 128, 1),
    "seed": (int, -(2**63), 2**63 - 1, None),
    "stop": (object, None, None, None),
    "ignore_eos": (bool, None, None, False),
    "stream": (bool, None, None, False),
    "stream_options": (dict, None, None, {}),
}
COMPLETION = COMMON | {
    "prompt": (object, None, None, None),
    "echo": (bool, None, None, False),
    "logprobs": (int, 0, 20, None),
    "best_of": (int, 1, 128, None),
}
CHAT = COMMON | {
    "messages": (list, None, None, None),
    "max_completion_tokens": (int, 0, 2**31, None),
    "logprobs": (bool, None, None, False),
    "top_logprobs": (int, 0, 20, 0),
}
# What changes no answer, so that it may be there.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
PICKS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
PICKS += ("presence_penalty", "frequency_penalty")  # what a Job takes as its options


def read_options(body, fields):
    """The request's values by name, checked, with the defaults of `fields`."""
    for key, value in body.items():
        if key not in fields and key not in IGNORED and value not in (None, False, [], {}):
            near = difflib.get_close_matches(key, fields, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ApiError(400, f"{short(key)} is not supported{hint}", short(key))
    options = {}
    for name, (kind, least, most, default) in fields.items():
        value = body.get(name)
        if value is None:
            options[name] = default
            continue
        good = type(value) in ((int, float) if kind is float else (kind,)) or kind is object
        if not good or least is not None and not least <= value <= most:
            range_ = f" from {least} to {most}" if least is not None else ""
            expected = f"expected {NAMES[kind]}{range_}"
            raise ApiError(400, f"{name} = {short(value)}: {expected}", name)
        options[name] = value
    options["top_k"] = max(options["top_k"], 0)
    if options.get("best_of") not in (None, options["n"]):
        raise ApiError(400, "best_of is not supported: ask for n, with logprobs", "best_of")
    if options["seed"] is None:
        options["seed"] = random.getrandbits(48) if seed is None else seed
    stop = options["stop"] or []
    options["stop"] = stop = [stop] if isinstance(stop, str) else stop
    texts = isinstance(stop, list) and all(isinstance(s, str) and len(s) <= 256 for s in stop)
    if not texts or len(stop) > 16:
        raise ApiError(400, "stop: expected a string, or up to 16, of up to 256 characters", "stop")
    options["stop"] = [s for s in stop if s]
    return options


def plainly(f, *args):
    """f(*args), whose refusal of its input is the client's error. For another thread."""
    try:
        return f(*args)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    except BaseException as error:  # tiktoken panics at what its regular expressions cannot split
        raise ApiError(400, f"this text cannot be tokenized: {short(str(error))}") from None


def encode_all(engine, texts, bare=False):
    """The ids of texts to be continued; bare: of texts alone."""
    most = 4 * engine.longest * engine.max_len
    for text in texts:
        if len(text) > most:
            raise too_long(engine, f"{len(text)} characters")
    f = engine.tok.encode if bare else engine.tok.prompt
    return plainly(lambda: [f(text) for text in texts])


def too_long(engine, what):
    why = f"{what} do not fit the {engine.max_len} tokens for a prompt and its answer"
    return ApiError(400, why, code="context_length_exceeded")


def is_ids(value, n_vocab):
    return isinstance(value, list) and all(type(i) is int and 0 <= i < n_vocab for i in value)


async def read_prompts(engine, value):
    """The prompts of a completion, as lists of ids: a text or ids, or a list of either."""
    n_vocab = engine.tok.n_vocab
    several = isinstance(value, list) and value and type(value[0]) is not int
    prompts = value if several else [value]
    if len(prompts) > engine.max_queue:
        raise ApiError(400, f"{len(prompts)} prompts: expected {engine.max_queue} at most")
    if all(isinstance(p, str) for p in prompts):
        prompts = await asyncio.to_thread(encode_all, engine, prompts)
    elif not all(is_ids(p, n_vocab) for p in prompts):
        why = f"expected a text, or ids from 0 to {n_vocab - 1}, or a list of either"
        raise ApiError(400, f"prompt: {why}", "prompt")
    if not all(prompts):
        raise ApiError(400, "prompt: an empty one has nothing to continue", "prompt")
    return prompts


async def read_messages(engine, messages):
    """The ids of a conversation, ready for its next turn."""
    safe = []
    for m in messages or []:
        role, content = (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
        if isinstance(content, list):  # of parts
            texts = [p.get("text") if isinstance(p, dict) else None for p in content]
            content = "".join(texts) if all(isinstance(t, str) for t in texts) else None
        if role not in ("system", "developer", "user", "assistant") or not isinstance(content, str):
            why = "expected [{'role': system, user or assistant, 'content': a text}]"
            raise ApiError(400, f"messages: {why}", "messages")
        safe.append({"role": "system" if role == "developer" else role, "content": content})
    if not safe:
        raise ApiError(400, "messages: expected one or more", "messages")
    size = sum(len(m["content"]) for m in safe)
    if len(safe) > engine.max_len or size > 4 * engine.longest * engine.max_len:
        raise too_long(engine, f"{len(safe)} messages of {size} characters")
    ids, _ = await asyncio.to_thread(plainly, engine.tok.chat, safe, True)
    return ids


def make_jobs(engine, prompts, o, usual, ends, top, echo=False):
    """n jobs for each prompt, by the options o; `usual`: the most tokens where the request does
    not say. Their index is the choice's."""
    jobs = []
    if len(prompts) * o["n"] > engine.max_queue:
        raise ApiError(400, f"{len(prompts)} x n = {o['n']}: over --max_queue={engine.max_queue}")
    for ids in prompts:
        room = engine.max_len - len(ids)
        limit = min(usual, room) if o["max_tokens"] is None else o["max_tokens"]
        if room < limit or room < 1 and o["max_tokens"] is None:
            raise too_long(engine, f"{len(ids)} tokens of prompt and {max(limit, 1)} of answer")
        for _ in range(o["n"]):
            how = dict(seed=o["seed"], index=len(jobs), stop=o["stop"], top=top, echo=echo)
            how["ends"] = () if o["ignore_eos"] else ends
            jobs.append(Job(engine.tok, ids, limit, {name: o[name] for name in PICKS}, **how))
    return jobs


def start(request, jobs):
    """Queue the jobs: an asyncio.Queue of what they tell."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()

    def notify(*event):
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(queue.put_nowait, event)

    for job in jobs:
        job.notify = notify
    try:
        request.app.state.engine.submit(jobs)
    except Busy:
        raise ApiError(429, "the queue is full: try again", code="queue_full") from None
    request.scope["barelm"].jobs = jobs  # for the log; and the Front cancels what is not done
    return queue


async def follow(request, jobs, queue):
    """What the jobs tell, (job, piece, tokens, done), until all are done, the client has left, or
    the time is over."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        queue.put_nowait((None, ClientDisconnect(), [], True))

    late = ApiError(504, f"the request took more than {timeout:g} s (--timeout)", code="timeout")
    loop, left = asyncio.get_running_loop(), len(jobs)
    watcher = asyncio.create_task(watch())
    clock = loop.call_later(timeout, queue.put_nowait, (None, late, [], True))
    try:
        while left:
            job, piece, tokens, done = await queue.get()
            if isinstance(piece, (ApiError, ClientDisconnect)):
                raise piece
            if isinstance(piece, Exception):
                raise ApiError(500, "the step that this request was in failed")
            left -= done
            yield job, piece, tokens, done
    finally:
        watcher.cancel()
        clock.cancel()


def usage(jobs):
    """Tokens of a request's prompts, each counted once, and of its answers."""
    n = max(1, len(jobs))
    asked = sum(len(ids) for ids in {id(job.ids): job.ids for job in jobs}.values())
    made = sum(len(job.row.out.ids) for job in jobs[:n])
    reused = {id(job.ids): job.reused for job in reversed(jobs)}
    details = {"cached_tokens": sum(reused.values())}
    out = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    return out | {"prompt_tokens_details": details}


def token_name(tok, id):
    """A token as the protocol shows it: what is no whole UTF-8 as its bytes."""
    data = tok.shown.get(id, b"")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def reason(job):
    return job.row.out.finish_reason


def completion_logprobs(tok, told, decoder):
    """OpenAI's arrays for tokens (id, log p, alternatives); the first of a text has no log p.
    decoder: an incremental one, with `at`, where in the text the next token begins."""
    out = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for id, lp, tops in told:
        out["tokens"].append(token_name(tok, id))
        out["token_logprobs"].append(lp)
        # Two tokens may look alike: the likelier one's number stays.
        named = {token_name(tok, i): p for i, p in [(id, lp), *reversed(tops.items())]}
        out["top_logprobs"].append(None if lp is None else named)
        out["text_offset"].append(decoder.at)
        decoder.at += len(decoder.decode(tok.token_bytes(id)))
    return out


def chat_logprobs(tok, told):
    entry = lambda id, lp: (
        {"token": token_name(tok, id), "logprob": lp} | {"bytes": list(tok.shown.get(id, b""))}
    )
    return {
        "content": [
            entry(id, lp) | {"top_logprobs": [entry(*alternative) for alternative in tops.items()]}
            for id, lp, tops in told
        ]
    }


def check_model(request, name):
    mine = request.app.state.name
    if name not in (None, mine):
        why = f"no model {short(name)} here: this server has {mine!r}"
        raise ApiError(404, why, "model", "model_not_found")


async def stream_reply(request, jobs, queue, chunk, first, last):
    """A response of server-sent events: the chunks first(job) of each job, those of what the jobs
    tell by chunk(job, piece, tokens, done), and `last` when all is done."""
    line = lambda value: f"data: {json.dumps(value, allow_nan=False)}\n\n"

    async def lines():
        try:
            for job in jobs:
                for value in first(job):
                    yield line(value)
            async for event in follow(request, jobs, queue):
                for value in chunk(*event):
                    yield line(value)
            for value in last():
                yield line(value)
            yield "data: [DONE]\n\n"
        except ApiError as error:  # too late for a status
            yield line(error_body(error))

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@app.post("/v1/completions")
async def completions(request: Request):
    engine = request.app.state.engine
    tok = engine.tok
    body = await read_body(request)
    o = read_options(body, COMPLETION)
    check_model(request, o["model"])
    prompts = await read_prompts(engine, o["prompt"])
    jobs = make_jobs(engine, prompts, o, 16, tok.eos_ids, o["logprobs"], o["echo"])
    head = answer_head(request, "cmpl-", "text_completion")
    texts = o["prompt"] if isinstance(o["prompt"], list) else [o["prompt"]]

    def choice(job, text, logprobs, finish):
        named = {"text": text, "index": job.index, "logprobs": logprobs, "finish_reason": finish}
        return named

    def asked(job):
        """The prompt as text."""
        text = texts[job.index // o["n"]] if isinstance(texts[0], str) else None
        return text if text is not None else decode(tok, job.ids)

    def logprobs(job, told):
        if job.top is None:
            return None
        if not hasattr(job, "decoder"):
            job.decoder = codecs.getincrementaldecoder("utf-8")("replace")
            job.decoder.at = 0
            told = ([(job.ids[0], None, {}), *job.prompt_tokens] if job.echo else []) + told
        return completion_logprobs(tok, told, job.decoder)

    queue = start(request, jobs)
    if o["stream"]:
        counted = o["stream_options"].get("include_usage") is True
        extra = {"usage": None} if counted else {}

        def chunk(job, piece, tokens, done):
            fresh = job.echo and not hasattr(job, "echoed")
            job.echoed = True
            text = asked(job) + piece if fresh else piece
            finish = reason(job) if done else None
            yield head | {"choices": [choice(job, text, logprobs(job, tokens), finish)]} | extra

        last = lambda: [head | {"choices": [], "usage": usage(jobs)}] if counted else []
        return await stream_reply(request, jobs, queue, chunk, lambda job: (), last)
    told = await gather(request, jobs, queue)
    choices = []
    for job in jobs:
        text = (asked(job) if job.echo else "") + job.row.out.text
        choices.append(choice(job, text, logprobs(job, told[job.index]), reason(job)))
    return reply(head | {"choices": choices, "usage": usage(jobs)})


@app.post("/v1/chat/completions")
async def chat_completions(request: Request):
    engine = request.app.state.engine
    tok = engine.tok
    body = await read_body(request)
    o = read_options(body, CHAT)
    check_model(request, o["model"])
    if o["max_completion_tokens"] is not None:
        o["max_tokens"] = o["max_completion_tokens"]
    ids = await read_messages(engine, o["messages"])
    top = o["top_logprobs"] if o["logprobs"] else None
    ends = [*tok.eos_ids, *engine.turn_ends]
    jobs = make_jobs(engine, [ids], o, engine.max_len, ends, top)
    head = answer_head(request, "chatcmpl-", "chat.completion" + ".chunk" * o["stream"])
    logprobs = lambda job, told: None if job.top is None else chat_logprobs(tok, told)
    queue = start(request, jobs)
    if o["stream"]:
        counted = o["stream_options"].get("include_usage") is True
        extra = {"usage": None} if counted else {}

        def delta(job, delta, logprobs=None, finish=None):
            choice = {"index": job.index, "delta": delta, "logprobs": logprobs}
            return head | {"choices": [choice | {"finish_reason": finish}]} | extra

        def chunk(job, piece, tokens, done):
            if piece or tokens:
                yield delta(job, {"content": piece}, logprobs(job, tokens))
            if done:
                yield delta(job, {}, None, reason(job))

        first = lambda job: [delta(job, {"role": "assistant", "content": ""})]
        last = lambda: [head | {"choices": [], "usage": usage(jobs)}] if counted else []
        return await stream_reply(request, jobs, queue, chunk, first, last)
    told = await gather(request, jobs, queue)
    choices = []
    for job in jobs:
        message = {"role": "assistant", "content": job.row.out.text}
        choice = {"index": job.index, "message": message, "finish_reason": reason(job)}
        choices.append(choice | {"logprobs": logprobs(job, told[job.index])})
    return reply(head | {"choices": choices, "usage": usage(jobs)})


def decode(tok, ids):
    """The text of ids without special tokens."""
    return b"".join(tok.token_bytes(id) for id in ids).decode(errors="replace")


def answer_head(request, prefix, kind):
    """What all the answers and chunks of a request begin with."""
    name = request.app.state.name
    head = {"id": prefix + os.urandom(12).hex(), "object": kind, "created": int(time.time())}
    return head | {"model": name}


async def gather(request, jobs, queue):
    """Wait for all jobs: the tokens that each told."""
    told = [[] for _ in jobs]
    async for job, _, tokens, _ in follow(request, jobs, queue):
        told[job.index] += tokens
    return told


def described(request):
    state = request.app.state
    named = {"id": state.name, "object": "model", "created": state.created, "owned_by": "barelm"}
    return named | {"max_model_len": state.engine.max_len}


@app.get("/v1/models")
async def models(request: Request):
    return reply({"object": "list", "data": [described(request)]})


@app.get("/v1/models/{name:path}")
async def one_model(request: Request, name: str):
    check_model(request, name)
    return reply(described(request))


@app.post("/tokenize")
async def tokenize(request: Request):
    """{"prompt"} → its ids, bare unless "add_special_tokens"; or {"messages"} by the template."""
    engine, body = request.app.state.engine, await read_body(request)
    if isinstance(body.get("messages"), list):
        ids = await read_messages(engine, body["messages"])
    elif isinstance(text := body.get("prompt"), str):
        bare = body.get("add_special_tokens", True) is False
        [ids] = await asyncio.to_thread(encode_all, engine, [text], bare)
    else:
        raise ApiError(400, "expected a prompt, which is a text, or messages", "prompt")
    out = {"tokens": ids, "count": len(ids), "max_model_len": engine.max_len}
    if body.get("return_token_strs") is True:
        out["token_strs"] = [token_name(engine.tok, id) for id in ids]
    return reply(out)


@app.post("/detokenize")
async def detokenize(request: Request):
    tok, body = request.app.state.engine.tok, await read_body(request)
    if not is_ids(body.get("tokens"), tok.n_vocab):
        why = f"expected a list of ids from 0 to {tok.n_vocab - 1}"
        raise ApiError(400, f"tokens: {why}", "tokens")
    return reply({"prompt": tok.decode(body["tokens"])})


@app.get("/tokenizer_info")
async def tokenizer_info(request: Request):
    tok = request.app.state.engine.tok
    name = lambda id: None if id is None else tok.decode([id])
    ends = {"bos_token": name(tok.bos_id), "eos_token": name([*tok.eos_ids, None][0])}
    ends |= {"pad_token": name(tok.pad_id), "chat_template": tok.config.get("chat_template")}
    return reply({"tokenizer_class": "PreTrainedTokenizerFast"} | ends)


@app.get("/health")
async def health(request: Request):
    if not request.app.state.engine.is_alive():
        raise ApiError(503, "the engine has stopped")
    return reply({"status": "ok"})


@app.get("/metrics")
async def metrics_text(request: Request):
    state = request.app.state
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(state.metrics.text(state.engine), media_type=kind)


@app.get("/")
async def page(request: Request):
    file = Path(__file__).with_name("serve.html")
    if not file.is_file():
        return Response(f"{request.app.state.name} is served at /v1\n", media_type="text/plain")
    return Response(file.read_bytes(), media_type="text/html")


@app.exception_handler(ApiError)
async def on_api_error(request, error):
    return error_reply(error)


@app.exception_handler(HTTPException)
async def on_http_error(request, error):  # of the router: 404, 405
    where = f"{request.method} {short(request.url.path)}"
    return error_reply(ApiError(error.status_code, f"{where}: {error.detail}"))


class Front:
    """What every request passes first: the key, the time for each write; then the books."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = scope["barelm"] = SimpleNamespace(jobs=[], status=None, begun=time.monotonic())

        async def patient_send(message):
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await asyncio.wait_for(send(message), client_timeout)

        try:
            if self.may_pass(scope):
                await self.app(scope, receive, patient_send)
            else:
                wrong = ApiError(401, "wrong API key: Authorization: Bearer KEY", code="no_key")
                await error_reply(wrong)(scope, receive, patient_send)
        except (ClientDisconnect, asyncio.TimeoutError):
            record.status = record.status or 499  # nobody reads the answer
        except Exception as error:
            print(f"serve.py: {scope['path']!r}: {error!r}", file=sys.stderr, flush=True)
            if record.status is None:
                broken = ApiError(500, "the server failed at this request")
                await error_reply(broken)(scope, receive, patient_send)
        finally:
            scope["app"].state.engine.cancel(record.jobs)
            self.book(scope, record)

    def may_pass(self, scope):
        if not api_key or scope["path"] in ("/", "/health", "/metrics"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {api_key}".encode())

    def book(self, scope, record):
        """Count the request, and write its line to the log."""
        state, jobs, took = scope["app"].state, record.jobs, time.monotonic() - record.begun
        known = getattr(scope.get("route"), "path", "other")  # no label for each wrong path
        state.metrics.requests[known, record.status] += 1
        if jobs:
            state.metrics.request.add(took)
        if state.log is None:
            return
        row = {"time": round(time.time(), 3), "client": (scope["client"] or ["?"])[0]}
        row |= {"method": scope["method"], "path": scope["path"], "status": record.status}
        row |= {"seconds": round(took, 4)}
        if jobs:
            first = min((job.first for job in jobs if job.first), default=None)
            row |= usage(jobs) | {"finish": [None if j.gone else reason(j) for j in jobs]}
            row |= {"first_token": first and round(first - record.begun, 4)}
            if log_prompts:
                tok = state.engine.tok
                row |= {"prompts": [decode(tok, job.ids) for job in jobs]}
                row |= {"answers": [job.row.out.text for job in jobs]}
        state.log.write(json.dumps(row) + "\n")
        state.log.flush()


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection on which no request begins for client_timeout seconds, or
    one begins and its head does not end."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.before = None  # the request at the last look
        self.loop.call_later(client_timeout, self.look)

    def look(self):
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self.before:
            self.transport.close()
        else:
            self.before = self.cycle
            self.loop.call_later(client_timeout, self.look)


# --------------------------------------------------------------------------------------------------


def check_settings(n_ctx):
    for name in ("max_batch", "max_queue", "prefill_chunk", "max_body"):
        if globals()[name] < 1:
            raise UserError(f"--{name}={globals()[name]}: expected 1 or more")
    for name in ("timeout", "client_timeout", "drain"):
        if not 0 < globals()[name] < math.inf:
            raise UserError(f"--{name}={globals()[name]:g}: expected seconds, more than 0")
    if not 0 <= max_len <= n_ctx or max_len == 1:
        raise UserError(f"--max_len={max_len}: expected 2 to {n_ctx}, the context, or 0 for that")


def listen():
    """The socket that clients connect to."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        why = "--port=0 takes a free one"
        raise UserError(f"--host={host} --port={port}: {error} ({why})") from None
    return sock


def main():
    global api_key
    api_key = api_key or os.environ.get("BARELM_API_KEY")
    run = core.setup(device)
    kind = torch.float32 if run.device.type == "cpu" else core.choose_dtype(run.device)[0]
    if dtype != "auto":
        kind = core.choose_dtype(run.device, dtype)[0]
    if quantize and dtype == "auto" and run.device.type == "cpu":
        kind = torch.bfloat16  # what the int8 product takes and gives
    net, tok = core.load(model, run.device, kind, quantize)
    if net.score is not None:
        raise UserError(
            f"{model} is a classifier, which generates no text: sample.py labels with it"
        )
    check_settings(net.config.n_ctx)
    length = max_len or net.config.n_ctx
    state = app.state
    state.metrics, state.name = Metrics(), Path(model).resolve().name
    state.created = int((Path(model) / "config.json").stat().st_mtime)
    state.engine = Engine(net, tok, max_batch, length, prefill_chunk, max_queue, state.metrics)
    state.log = open(log, "a", encoding="utf-8") if log else None
    app.add_middleware(Front)
    if cors:
        sites = [site.strip() for site in cors.split(",")]
        app.add_middleware(
            CORSMiddleware, allow_origins=sites, allow_methods=["*"], allow_headers=["*"]
        )
    sock = listen()
    state.engine.start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when it is done
    size = state.engine.cache.store.nbytes / 1e6
    print(f"{model}: {core.n_params(net) / 1e6:.1f}M parameters, {str(kind)[6:]} on {run.device}")
    print(f"{max_batch} sequences of up to {length} tokens: {size:,.0f} MB of keys and values")
    where = f"[{host}]" if ":" in host else host
    print(f"serving {state.name} at http://{where}:{sock.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        app, http=PatientProtocol, ws="none", log_level="error", access_log=False,
        timeout_graceful_shutdown=drain,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[sock])
    state.engine.stop()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
