"""Deployment: a checkpoint as a server that speaks OpenAI's protocol, with a page to look inside.

    python serve.py                                     # http://127.0.0.1:8000 with out/python
    python serve.py --model=out/sft --port=9000 --max_batch=32
    python serve.py --tp=2                              # over two GPUs, which one is too small for
    python serve.py --quantize=int4                     # weights of half a byte, in memory alone
    python serve.py --host=0.0.0.0 --api_key=SECRET     # open to others: give it a key
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "import os", "max_tokens": 20}'
    curl http://127.0.0.1:8000/v1/embeddings -d '{"input": ["a text", "another"]}'

--model is a run of ours or a Hugging Face folder (Qwen3, Qwen2, Llama, GPT-2). Any client of
OpenAI's works with base_url="http://127.0.0.1:8000/v1". One thread owns the network and advances
all requests by one token a step; they join and leave between steps. Ctrl-C or SIGTERM lets the
running requests finish. It needs fastapi and uvicorn: pip install -r requirements-serve.txt.

What a request meets, from outside inwards, each to be read alone:
    barelm/connections.py  how many connections there may be, and how long one may be silent
    barelm/front.py        who may ask, and what is written down
    this file              the addresses
    barelm/api.py          what a request may say, and the jobs that it becomes
    barelm/engine.py       the thread that owns the network: jobs in (barelm/jobs.py), tokens out
    barelm/answers.py      what a request is answered
    barelm/responses_api.py  the same of /v1/responses, OpenAI's newer protocol
    barelm/vector_api.py   the same of texts that become vectors, or labels
    barelm/openapi.py      what all of this is to programs, barelm/reference.py to readers (/docs)
    barelm/page_routes.py  the addresses of the page (barelm/web), barelm/page.py what it shows
    barelm/metrics.py      what is counted

Smaller models and other formats are export.py's.
"""

from config import configure

model = "out/python"  # a checkpoint folder
name: str | None = None  # what clients call it, "a,b": answers tell the first; or BARELM_NAME
adapters: str | None = None  # of this model, LoRA, by name: a=out/lora1,b=out/lora2
host = "127.0.0.1"  # who may connect: 127.0.0.1 this machine alone, 0.0.0.0 everyone
port = 8000  # 0: any free one
api_key: str | None = None  # asked of every client; or set BARELM_API_KEY, which ps does not show
cors: str | None = None  # web sites that may call, "https://a.org,https://b.org", or "*"
max_batch: int | None = None  # sequences that are made at once; None: 16, on a GPU by its memory
max_len = 0  # tokens of a prompt and its answer, at most; 0: the model's context
max_queue = 256  # sequences that may wait for a place in the batch; more are answered 429
max_connections = 1000  # that clients may have open at once; more are answered 503
prefill_chunk = 0  # tokens of prompts read in one step, which others wait for; 0: by the device
max_body = 4_000_000  # bytes of a request, at most
timeout = 600.0  # seconds that a request may take
client_timeout = 20.0  # seconds that a client may take to send its request, or to read a piece
drain = 30.0  # seconds that running requests have to finish in after SIGTERM
log: str | None = None  # a file that gets a line of JSON for each request
log_prompts = False  # with what was asked and answered
feedback: str | None = None  # a file that gets the page's thumbs up and down, for prepare.py
runs = True  # the page shows the logs of the runs beside the model's too: folders with a log.jsonl
reload = True  # the page may load the weights that a run has saved since (docs/serve.md)
seed: int | None = None  # of requests that bring none; None: another for each
pooling: str | None = None  # /v1/embeddings: first, last or mean; none: the model's own, or mean
device = "auto"  # auto, cpu, mps, cuda, cuda:1
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
dtype = "auto"  # auto (bfloat16 where it is fast, else float32), float32, bfloat16, float16
tool_form: str | None = None  # of calls of tools: hermes, llama3, …; none: the chat template's own
quantize: str | None = None  # int8 or int4: weights of one byte or half of one, other answers
fast = True  # false: model.py's plain mathematics alone, a referee for a doubtful answer
deterministic = False  # a text's bits do not depend on the batch: slower (docs/determinism.md)
tp = 1  # processes, a GPU each, that share each matrix product (docs/tensor_parallel.md)

if __name__ == "__main__":
    configure(globals())

import asyncio
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from barelm import __version__, api, openapi, page, responses_api, vector_api
from barelm.answers import ChatAnswer, CompletionAnswer, usage
from barelm.api import ApiError
from barelm.caller import Caller, no_gradients
from barelm.checkpoint import load
from barelm.embeddings import POOLINGS, batches_of, pooling_of
from barelm.engine import Engine, tell_listeners
from barelm.fast import generating
from barelm.feedback import FeedbackFile
from barelm.invariant import be_deterministic
from barelm.jobs import Updates
from barelm.layouts import cached_numbers
from barelm.many_adapters import Adapters
from barelm.mirror import open_together
from barelm.reference import reference_page
from barelm.reload import Weights
from barelm.responses_api import ResponseAnswer, ResponseEvents
from barelm.run import UserError, choose_dtype, end_process

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from barelm.connections import PatientProtocol, Server, connection_limits, listen
    from barelm.front import (
        Access,
        Front,
        RequestLog,
        Shutdown,
        error_reply,
        event_line,
        is_loopback,
        read_sites,
        reply,
        to_json,
    )
    from barelm.page_routes import PageHandlers
except ImportError as error:
    raise UserError(f"{error}: pip install -r requirements-serve.txt") from None

BATCH_TOKENS = 4096  # of texts that are embedded or classified in one pass, padding counted


@dataclass
class Settings:
    """What the application goes by, beside the engine."""

    served: api.ServedModel
    folder: Path  # the model's, with its log.jsonl
    access: Access  # who may ask
    shutdown: Shutdown  # how the server was told to end
    request_log: RequestLog | None
    max_body: int  # bytes of a request
    timeout: float  # seconds that a request may take
    client_timeout: float  # seconds that a client may take to send or to read a piece
    pooling: str = "mean"  # which state stands for a text
    feedback: FeedbackFile | None = None  # where thumbs up and down go
    weights: Weights | None = None  # which are served, and which the folder holds by now
    beside: bool = True  # whether the page shows the logs of the runs beside the model's
    reload: bool = True  # whether it may load newer weights


class Handlers:
    """What is done for each address of the server, which make_app gives them. A handler reads the
    request, has the engine do what it asks for, and shapes the answer."""

    def __init__(self, engine, settings):
        self.engine = engine
        self.served = settings.served
        self.settings = settings
        self.loop = None  # the event loop, once there was a request
        self.compilers = ThreadPoolExecutor(4, "grammars")
        self.document = {}  # of OpenAPI, once the routes are there
        engine.tell = self.tell

    def tell(self, updates):
        """Bring what is new after a step from the engine's thread to the event loop's: in one call,
        as each of them wakes it."""
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(tell_listeners, updates)

    # ------------------------------------------------------------------ text from the model

    async def completions(self, request: Request):
        body = await self.read_body(request)
        served = api.addressed(self.served, body)
        wanted = api.read_completion(served, body)
        # To tokenize may take long: in a thread, so that the event loop goes on with the others.
        prompts = await asyncio.to_thread(api.read_prompts, served, wanted)
        await self.read_form(served, wanted)
        updates = Updates(at_end=not wanted.stream)
        parts = (served, wanted, prompts, updates.listener)
        jobs = await asyncio.to_thread(api.completion_jobs, *parts)
        answer = CompletionAnswer(served, jobs)
        return await self.generate(request, wanted, jobs, updates, answer)

    async def chat_completions(self, request: Request):
        body = await self.read_body(request)
        served = api.addressed(self.served, body)
        wanted = api.read_chat(served, body)
        updates = Updates(at_end=not wanted.stream)
        jobs = await self.chat_jobs(served, wanted, updates)
        answer = ChatAnswer(served, jobs, wanted.plan)
        return await self.generate(request, wanted, jobs, updates, answer)

    async def chat_jobs(self, served, wanted, updates):
        """The jobs of a Chat; they tell `updates`."""
        ids = await asyncio.to_thread(api.read_conversation, served, wanted)
        await self.read_form(served, wanted)
        parts = (served, wanted, ids, updates.listener)
        return await asyncio.to_thread(api.chat_jobs, *parts)

    async def read_form(self, served, wanted):
        """Compile what the request says of its answer's form: in threads of their own, as
        it may take seconds, and all requests need the usual ones, to tokenize."""
        if api.asks_for_form(wanted):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.compilers, api.read_form, served, wanted)

    async def responses(self, request: Request):
        body = await self.read_body(request)
        served = api.addressed(self.served, body)
        wanted, chat = await asyncio.to_thread(responses_api.read_response, served, body)
        updates = Updates(at_end=not wanted.stream)
        try:
            jobs = await self.chat_jobs(served, chat, updates)
        except ApiError as error:
            raise responses_api.renamed(error) from None
        answer = ResponseAnswer(wanted, ChatAnswer(served, jobs, chat.plan))
        news = self.begin(request, jobs, updates)
        if wanted.stream:
            return self.stream(request, response_lines(ResponseEvents(answer, jobs[0]), news))
        [parts] = await self.collect(jobs, news)
        return reply(answer.whole(*parts))

    async def generate(self, request, wanted, jobs, updates, answer):
        """The response to a request for text: one JSON object, or a stream of them."""
        news = self.begin(request, jobs, updates)
        if wanted.stream:
            lines = stream_lines(answer, jobs, news, wanted.stream_options.include_usage)
            return self.stream(request, lines)
        best = api.likeliest(wanted, await self.collect(jobs, news))
        choices = [answer.whole_choice(*parts) for parts in best]
        for index, choice in enumerate(choices):
            choice["index"] = index
        return reply(answer.head | {"choices": choices, "usage": usage(jobs)})

    def begin(self, request, jobs, updates):
        """Give the jobs to the engine; what is new of them comes from what is returned."""
        self.loop = asyncio.get_running_loop()
        if not self.engine.submit(jobs):
            raise ApiError(429, "the queue is full: try again", code="queue_full")
        request.scope["record"].jobs = jobs  # the Front cancels those that a request leaves
        return self.follow(request, jobs, updates)

    def stream(self, request, lines):
        request.scope["record"].is_stream = True
        return StreamingResponse(lines, media_type="text/event-stream")

    async def collect(self, jobs, news):
        """[(job, its text, its Tokens)] once all are done."""
        texts = [""] * len(jobs)
        tokens = [[] for _ in jobs]
        async for new in news:
            for update in new:
                texts[update.job.index] += update.text
                tokens[update.job.index] += update.tokens
        return list(zip(jobs, texts, tokens))

    async def follow(self, request, jobs, updates):
        """What is new of the jobs, [Update] each time, until all are done, the client has left, or
        the time is over."""

        async def watch():  # whether the client leaves is told only to who asks
            while (await request.receive())["type"] != "http.disconnect":
                pass
            updates.fail(ClientDisconnect())

        seconds = self.settings.timeout
        late = ApiError(
            504, f"the request took more than {seconds:g} s (--timeout)", code="timeout"
        )
        clock = asyncio.get_running_loop().call_later(seconds, updates.fail, late)
        watcher = asyncio.create_task(watch())
        n_running = len(jobs)
        try:
            while n_running:
                new = await updates.take()
                for update in new:
                    if update.error is not None:
                        raise ApiError(400 if update.refused else 500, update.error)
                    n_running -= update.done
                yield new
        finally:
            watcher.cancel()
            clock.cancel()

    async def read_body(self, request):
        """The JSON object of a request."""
        data = bytearray()
        limit = self.settings.max_body
        declared = int(request.headers.get("content-length", "0"))  # h11 has checked that it is one

        async def read():
            async for piece in request.stream():
                data.extend(piece)
                if max(len(data), declared) > limit:
                    raise ApiError(413, f"the body has more than {limit} bytes (--max_body)")

        seconds = self.settings.client_timeout
        try:
            await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body took more than {seconds:g} s") from None
        return api.parse_body(data)

    # ------------------------------------------------------------------ texts as vectors, labels

    async def embeddings(self, request: Request):
        body = await self.read_body(request)
        served = api.addressed(self.served, body)
        wanted = vector_api.read_embeddings(served, body, self.engine.net.config.n_embd)
        inputs = await asyncio.to_thread(vector_api.read_inputs, served, wanted)
        options = (wanted.pooling or self.settings.pooling, served.adapter)
        vectors = await self.in_batches(vector_api.make_vectors, inputs, *options)
        answer = vector_api.embeddings_answer
        return reply(await asyncio.to_thread(answer, served, wanted, inputs, vectors))

    async def classify(self, request: Request):
        net = self.engine.net
        wanted = vector_api.read_classify(self.served, net, await self.read_body(request))
        inputs = await asyncio.to_thread(vector_api.read_inputs, self.served, wanted)
        shares = await self.in_batches(vector_api.make_scores, inputs)
        return reply(vector_api.classes_answer(self.served, net.labels, inputs, shares))

    async def in_batches(self, f, inputs, *args):
        """f(engine, [ids], *args) in the engine's thread, of batches of the inputs: a step of those
        who wait for tokens goes between two of them. A list of what f gives for each input."""
        answers = [None] * len(inputs)
        for batch in batches_of(inputs, BATCH_TOKENS):
            rows = [inputs[i] for i in batch]
            for i, answer in zip(batch, await self.ask_engine(f, self.engine, rows, *args)):
                answers[i] = answer
        return answers

    # ------------------------------------------------------------------ the model and its tokens

    async def models(self):
        return reply({"object": "list", "data": self.served.cards()})

    async def one_model(self, name: str):
        api.model_of(self.served, name)
        [card] = [card for card in self.served.cards() if card["id"] == name]
        return reply(card)

    async def tokenize(self, request: Request):
        body = await self.read_body(request)
        served = api.addressed(self.served, body)
        return reply(await asyncio.to_thread(api.tokenize, served, body))

    async def detokenize(self, request: Request):
        body = await self.read_body(request)
        return reply(api.detokenize(api.addressed(self.served, body), body))

    async def tokenizer_info(self):
        return reply(api.tokenizer_info(self.served.tok))

    # ------------------------------------------------------------------ how it goes

    async def version(self):
        return reply({"version": __version__})

    async def health(self):
        if not self.engine.is_alive():
            raise ApiError(503, "the engine has stopped")
        return reply({"status": "ok"})

    async def metrics(self):
        gauges = {
            "queue_length": len(self.engine.waiting),
            "batch_size": len(self.engine.jobs),
            "batch_limit": self.engine.max_batch,
        }
        text = self.engine.metrics.text(gauges)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def schema(self):
        return reply(self.document)

    async def docs(self):
        html = await asyncio.to_thread(reference_page, self.document)
        return Response(html, headers=page.HEADERS, media_type="text/html")

    async def ask_engine(self, f, *args):
        """f(*args) in the engine's thread, between two steps."""
        try:
            return await asyncio.wrap_future(self.engine.call(f, *args))
        except UserError as error:
            raise ApiError(400, str(error)) from None


async def stream_lines(answer, jobs, news, include_usage):
    """Server-sent events: a chunk for each choice that is new, in the end the usage if wanted. What
    is new at once comes in one piece."""
    head = answer.chunk_head
    # A chunk for each token: only what differs between them is put into JSON each time.
    opening = f'data: {to_json(head)[:-1]}, "choices": ['
    ending = "]}\n\n"
    if include_usage:
        ending = '], "usage": null}\n\n'  # as OpenAI's, in every chunk but the last

    def chunks(choices):
        return "".join([opening + to_json(choice) + ending for choice in choices])

    try:
        first = answer.first_choices(jobs)
        if first:
            yield chunks(first)
        async for new in news:
            choices = []
            for update in new:
                choices += answer.new_choices(update)
            yield chunks(choices)
        if include_usage:
            yield event_line(head | {"choices": [], "usage": usage(jobs)})
        yield "data: [DONE]\n\n"
    except ApiError as error:  # too late for a status
        yield event_line(error.body())


async def response_lines(events, news):
    """Server-sent events of /v1/responses: of each its name and its JSON."""

    def lines(new_events):
        return "".join([f"event: {event['type']}\n{event_line(event)}" for event in new_events])

    try:
        yield lines(events.begin())
        async for new in news:
            for update in new:
                yield lines(events.more(update))
        yield lines(events.end())
    except ApiError as error:  # too late for a status
        yield lines([events.failed(error)])


def routes_of(handlers):
    """[(methods, address, handler)]. What stands of an address in /docs: openapi.ADDRESSES."""
    return [
        ("POST", "/v1/completions", handlers.completions),
        ("POST", "/v1/chat/completions", handlers.chat_completions),
        ("POST", "/v1/responses", handlers.responses),
        ("POST", "/v1/embeddings", handlers.embeddings),
        ("POST", "/classify", handlers.classify),  # vLLM's
        ("GET", "/v1/models", handlers.models),
        ("GET", "/v1/models/{name:path}", handlers.one_model),  # a name may have a slash
        ("POST", "/tokenize", handlers.tokenize),
        ("POST", "/detokenize", handlers.detokenize),
        ("GET", "/tokenizer_info", handlers.tokenizer_info),
        ("GET", "/health", handlers.health),
        ("GET", "/metrics", handlers.metrics),
        ("GET POST", "/ping", handlers.health),  # SageMaker's and vLLM's
        ("GET", "/version", handlers.version),  # vLLM's
        ("GET", "/openapi.json", handlers.schema),
        ("GET", "/docs", handlers.docs),
        *PageHandlers(handlers).routes(),
    ]


def make_app(engine, settings):
    """The application: its addresses, and what every request passes before it comes to one."""
    # FastAPI's own pages would load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    handlers = Handlers(engine, settings)
    routes = routes_of(handlers)
    has_key = bool(settings.access.api_key)
    n_embd = engine.net.config.n_embd
    handlers.document = openapi.describe(routes, settings.served, n_embd, has_key)
    for methods, path, handler in routes:
        # Who may GET may ask for the head alone.
        app.add_api_route(path, handler, methods=methods.replace("GET", "GET HEAD").split())

    async def refused(request, error):
        return error_reply(error)

    paths = {path for _, path, _ in routes}

    async def not_found(request, error):  # the router's own words name no path
        if error.status_code == 405 and request.method == "OPTIONS":
            return Response(status_code=204, headers=error.headers)  # which say what it allows
        path = request.scope["path"]
        why = f"{request.method} {api.short(path)}: {error.detail}"
        if f"/v1{path}" in paths:
            why += f" (did you mean /v1{path}?)"
        return error_reply(ApiError(error.status_code, why), error.headers)

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, not_found)
    app.add_middleware(
        Front,
        engine=engine,
        access=settings.access,
        request_log=settings.request_log,
        client_timeout=settings.client_timeout,
        shutdown=settings.shutdown,
    )
    sites = settings.access.sites
    if sites:  # the last that is added is the first that a request passes
        app.add_middleware(
            CORSMiddleware, allow_origins=sites, allow_methods=["*"], allow_headers=["*"]
        )
    return app


# --------------------------------------------------------------------------------------------------


def read_key():
    """The key that clients are asked for; empty: none is."""
    if api_key is None:
        return os.environ.get("BARELM_API_KEY", "").strip()
    if not api_key.strip():
        raise UserError("--api_key= is empty: it would let everyone in")
    return api_key.strip()


def read_names():
    """What the model is called: the first in answers, all by clients."""
    given = os.environ.get("BARELM_NAME", "") if name is None else name
    if name is None and not given.strip():
        return [Path(model).resolve().name]
    names = list(dict.fromkeys(word.strip() for word in given.split(",")))
    if not all(names) or not all(word.isprintable() for word in names):
        raise UserError(f"--name={given!a}: expected names with commas between them")
    return names


def check_settings(net):
    counts = {
        "max_batch": 16 if max_batch is None else max_batch,
        "max_queue": max_queue,
        "max_connections": max_connections,
        "max_body": max_body,
    }
    for key, n in counts.items():
        if n < 1:
            raise UserError(f"--{key}={n}: expected 1 or more")
    if prefill_chunk < 0:
        raise UserError(f"--prefill_chunk={prefill_chunk}: expected 1 or more, or 0: by the device")
    for key, seconds in dict(timeout=timeout, client_timeout=client_timeout, drain=drain).items():
        if not 0 < seconds < math.inf:
            raise UserError(f"--{key}={seconds}: expected seconds, more than 0")
    if not 0 <= port < 2**16:  # of a greater one the C library takes the last 16 bits
        raise UserError(f"--port={port}: expected 0 to 65535")
    n_ctx = net.config.n_ctx
    if not 0 <= max_len <= n_ctx or max_len == 1:
        raise UserError(f"--max_len={max_len}: expected 2 to {n_ctx}, the context, or 0 for that")
    if pooling not in (None, *POOLINGS):
        raise UserError(f"--pooling={pooling}: expected {', '.join(POOLINGS)}")
    if net.score is not None and net.task != "classify":
        raise UserError(f"{model} has a head for {net.task}, which is not served: see sample.py")


def why_no_text(net):
    """Why a network continues no text, or ""."""
    if net.score is not None:
        return "is a classifier, which continues no text: /classify labels one"
    if not net.config.causal:
        return "is an encoder, which continues no text: /v1/embeddings makes vectors of one"
    return ""


def load_model(run, split=None):
    """(the network, its tokenizer, the dtype that it computes in). split: as `load` takes it."""
    place = run.device
    kind, _ = choose_dtype(place, dtype, n_embd=widest_of_bfloat16())
    net, tok = load(model, place, kind, quantize, fast, split)
    right, _ = choose_dtype(place, dtype, min(net.config.n_embd, widest_of_bfloat16()))
    if right != kind:  # it is too narrow to gain by bfloat16, as is only known now
        net, tok = load(model, place, right, quantize, fast, split)
    return net, tok, right


def widest_of_bfloat16():
    """For choose_dtype: 0 where a CPU gains nothing by bfloat16, as oneDNN has no such products."""
    if not torch.backends.mkldnn.is_available():
        return 0
    return 1 << 20 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 0


def batch_limit(net, length):
    """How many sequences of so many tokens are made at once: on a GPU their keys and values take
    half of the memory that is free, at most."""
    table = net.model.embed_tokens.weight
    if max_batch is not None:
        return max_batch
    if table.device.type != "cuda":
        return 16
    c = net.config
    row = cached_numbers(c, length) * table.element_size()  # bytes
    free, _ = torch.cuda.mem_get_info(table.device)
    return max(1, min(256, free // 2 // row))


def read_adapters(net, tok):
    """The Adapters of --adapters=name=folder,name=folder, or None."""
    if not adapters:
        return None
    folders = {}
    for part in adapters.split(","):
        name, _, folder = part.partition("=")
        if not name or not folder or name in folders:
            why = "expected a=folder,b=folder, each name once"
            raise UserError(f"--adapters={adapters}: {part!r:.60}: {why}")
        folders[name] = folder
    for other, is_on in {"--tp": tp > 1, "--deterministic": deterministic}.items():
        if is_on:
            raise UserError(f"--adapters with {other} is not supported: serve one, as --model")
    if why_no_text(net):
        raise UserError(f"--adapters: {model} {why_no_text(net)}")
    return Adapters(net, tok, folders, model)


def make_engine(net, tok, length, mirror=None, several=None):
    if why_no_text(net):
        return Caller(net, mirror)
    batch = batch_limit(net, length)
    try:
        options = dict(mirror=mirror, adapters=several)
        return Engine(net, tok, batch, length, prefill_chunk, max_queue, **options)
    except RuntimeError:  # torch's word for no memory
        why = f"no memory for the keys and values of {batch} times {length} tokens"
        raise UserError(f"{why}: lower --max_batch or --max_len") from None


def follow(mirror, net, tok):
    """What a process does that is not the first of several: to the end what that one tells it."""
    mirror.knows(net=net, tok=tok, engine=Caller(net))
    with generating(net), no_gradients(net):
        mirror.follow()
    end_process(0)


def open_log(tok):
    """The file that gets a line for each request, or None."""
    if not log:
        return None
    try:
        return RequestLog(log, tok if log_prompts else None)
    except OSError as error:
        raise UserError(f"--log={log}: {error.strerror}") from None


def run_server(app, engine, sock, limits, shutdown, served_name):
    """Answer requests until a signal comes, and those that run then."""
    config = uvicorn.Config(
        app,
        http=partial(PatientProtocol, client_timeout=client_timeout),
        ws="none",  # no websockets
        lifespan="off",  # the application starts and stops nothing
        log_level="error",
        access_log=False,  # --log writes its own
        timeout_graceful_shutdown=drain,
    )
    server = Server(config, *limits, shutdown)
    # From here on no signal may end Python while the engine's thread computes: torch would abort.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    engine.start()
    if isinstance(engine, Engine):
        size = engine.decoder.nbytes / 1e6
        many = f"{engine.max_batch} sequences of up to {engine.max_len} tokens"
        print(f"{many}: {size:,.0f} MB of keys and values")
    else:
        print(f"it {why_no_text(engine.net)}")
    address = f"[{host}]" if ":" in host else host
    print(f"serving {served_name} at http://{address}:{sock.getsockname()[1]}", flush=True)
    server.run(sockets=[sock])
    engine.stop()


def main():
    key = read_key()
    names = read_names()
    weights = Weights(model)  # before they are loaded: what is saved meanwhile is new
    run, mirror, (net, tok, compute_dtype) = open_together(tp, device, load_model, threads)
    if not run.is_main:
        follow(mirror, net, tok)
    if deterministic and tp > 1:
        raise UserError("--deterministic adds in one order, and processes (--tp) in another")
    if deterministic:
        be_deterministic(net)
    n_params = sum(part["params"] for part in page.model_parts(net))
    kind = str(compute_dtype).removeprefix("torch.")
    print(f"{model}: {n_params / 1e6:.1f}M parameters, {kind} on {run.device}")
    print(f"threads: {run.threads.words()}")
    check_settings(net)

    length = max_len or net.config.n_ctx
    served = api.ServedModel(
        names[0],
        tok,
        length,
        max_queue,
        seed,
        refusal=why_no_text(net),
        is_seq2seq=net.config.is_seq2seq,
        aliases=names[1:],
        tool_form=tool_form,
    )
    if mirror:
        mirror.knows(net=net, tok=tok)
    several = read_adapters(net, tok)
    if several:
        served.with_adapters(several)
        print(f"adapters: {', '.join(several.names)}, of rank {', '.join(map(str, several.ranks))}")
    engine = make_engine(net, tok, length, mirror, several)
    weights.serves(engine, tok)
    if mirror:
        mirror.knows(engine=engine)
    request_log = open_log(tok)
    limits = connection_limits(max_connections)
    sock = listen(host, port)
    loopback = is_loopback(sock.getsockname()[0])  # of the address, not of what --host calls it
    shutdown = Shutdown(drain=drain)
    settings = Settings(
        served=served,
        folder=weights.folder,
        access=Access(key, read_sites(cors or ""), loopback),
        shutdown=shutdown,
        request_log=request_log,
        max_body=max_body,
        timeout=timeout,
        client_timeout=client_timeout,
        pooling=pooling or pooling_of(net),
        feedback=FeedbackFile(feedback) if feedback else None,
        weights=weights,
        beside=runs,
        reload=reload,
    )
    app = make_app(engine, settings)
    run_server(app, engine, sock, limits, shutdown, served.name)
    if mirror:
        mirror.end()
        end_process(130 if shutdown.interrupted else 0)
    if shutdown.interrupted:
        sys.exit(130)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt Python's exit
        sys.exit(130)
