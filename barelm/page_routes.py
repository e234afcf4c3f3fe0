"""The addresses of the page (barelm/web): its files, and what its views ask for. Each handler reads
the request (barelm/page.py and its kin check it), has the engine's thread look into the network
between two steps, and shapes the answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from barelm import attention_maps, lens, lens_requests, next_token, page, routing
from barelm.api import ApiError, tokenized
from barelm.chat_model import ChatModel, describe_chat
from barelm.feedback import read_feedback
from barelm.front import event_line, reply
from barelm.patching import Patching
from barelm.run import UserError
from barelm.run_routes import RunHandlers
from barelm.token_steps import TokenSteps
from model import GPT


class PageHandlers:
    """What is done for each of them. server: serve.py's Handlers, which reads bodies and asks the
    engine."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.engine = server.engine
        self.served = server.served
        self.folder = server.settings.folder  # the model's
        self.feedback_file = server.settings.feedback  # or None
        self.chat: ChatModel | None = None  # once the page has asked
        self.token_steps: TokenSteps | None = None  # once it was asked for
        self.recent_logits = next_token.RecentLogits()

    def routes(self) -> list[tuple]:
        """[(methods, address, handler)], a view behind the other."""
        return [
            ("GET", "/", self.index),
            ("GET", "/page/{name:path}", self.file),
            ("GET", "/inspect/model", self.model),
            ("POST", "/feedback", self.feedback),
            ("POST", "/inspect/neighbours", self.neighbours),
            ("POST", "/inspect/steps", self.steps),
            ("POST", "/inspect/next", self.next_token),
            ("POST", "/inspect/attention", self.attention),
            ("POST", "/inspect/grid", self.grid),
            ("POST", "/inspect/routing", self.routing),
            ("POST", "/inspect/lens", self.lens),
            ("POST", "/inspect/shares", self.shares),
            ("POST", "/inspect/patch", self.patch),
            *RunHandlers(self.server).routes(),
        ]

    # ------------------------------------------------------------------ the page

    async def index(self) -> Response:
        return await self.file("index.html")

    async def file(self, name: str) -> Response:
        # Read each time: who changes the page need not start the server anew.
        data, media_type = await asyncio.to_thread(page.page_file, name)
        return Response(data, headers=page.HEADERS, media_type=media_type)

    # ------------------------------------------------------------------ Model

    async def model(self) -> Response:
        if self.chat is None:
            self.chat = await asyncio.to_thread(describe_chat, self.served.tok, self.folder)
        of_chat = {"chat": asdict(self.chat), "feedback": self.feedback_file is not None}
        return reply(self.served.card | page.describe_model(self.engine.net) | of_chat)

    # ------------------------------------------------------------------ Chat

    async def feedback(self, request: Request) -> Response:
        """{"messages", "response", "rating": 1, -1 or 0} → a line of the feedback file."""
        if self.feedback_file is None:
            raise ApiError(404, "this server keeps no feedback: --feedback=FILE lets it")
        row = read_feedback(self.served, await self.server.read_body(request))
        await asyncio.to_thread(self.feedback_file.append, row)
        return reply({"rating": row["rating"]})

    # ------------------------------------------------------------------ Tokens

    async def neighbours(self, request: Request) -> Response:
        """{"token": an id, or "text" of one token, "n"} → the n tokens with nearest embeddings."""
        body = await self.server.read_body(request)
        wanted = await asyncio.to_thread(page.read_neighbours, self.served, body)
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        neighbours = await self.server.ask_engine(
            page.nearest, net, n_vocab, wanted.token, wanted.n
        )
        return reply(page.neighbours_answer(self.served.tok, wanted, neighbours))

    async def steps(self, request: Request) -> Response:
        """{"text"} → how it became its tokens: the merges of BPE, in their order."""
        body = await self.server.read_body(request)
        text = await asyncio.to_thread(page.read_text, self.served, body)

        def look():
            self.token_steps = self.token_steps or TokenSteps(self.served.tok)
            return self.token_steps.of(text)

        return reply(await asyncio.to_thread(tokenized, look))

    # ------------------------------------------------------------------ Next token

    async def next_token(self, request: Request) -> Response:
        """{"text" or "ids", "then", temperature, top_k, top_p, min_p, "n", "draw", "seed"} → the n
        likeliest tokens to follow, before and after each filter."""
        body = await self.server.read_body(request)
        wanted = await asyncio.to_thread(next_token.read_next, self.served, body)
        # Of other weights (barelm/reload.py) the logits are others, too.
        key = (self.engine.metrics.counts["reloads_total"], *wanted.ids)
        logits = self.recent_logits.get(key)
        if logits is None:
            net, n_vocab = self.engine.net, self.served.tok.n_vocab
            look = next_token.last_logits
            logits = await self.server.ask_engine(look, net, wanted.ids, n_vocab)
            self.recent_logits.put(key, logits)
        answer = await asyncio.to_thread(next_token.next_answer, self.served.tok, wanted, logits)
        return reply(answer)

    # ------------------------------------------------------------------ Attention, Experts

    async def attention(self, request: Request) -> Response:
        """{"text" or "ids", "layer", "head": one, or all, "mean"} → of each head a row for each
        token."""
        net = self.engine.net
        body = await self.server.read_body(request)
        read = attention_maps.read_attention
        wanted = await asyncio.to_thread(read, self.served, net.config, body)
        look = attention_maps.attention_maps
        maps = await self.server.ask_engine(look, net, wanted.ids, wanted.layer, wanted.mean)
        return reply(attention_maps.attention_answer(self.served.tok, wanted, maps))

    async def grid(self, request: Request) -> Response:
        """{"text" or "ids"} → the attention of all layers and heads, small, as bytes."""
        body = await self.server.read_body(request)
        ids = await asyncio.to_thread(attention_maps.read_grid, self.served, body)
        grid = await self.server.ask_engine(attention_maps.attention_grid, self.engine.net, ids)
        return reply(attention_maps.grid_answer(self.served.tok, ids, grid))

    async def routing(self, request: Request) -> Response:
        """{"text" or "ids"} → of each layer with experts which of them each token went to."""
        net = self.engine.net
        body = await self.server.read_body(request)
        ids = await asyncio.to_thread(routing.read_routes, self.served, net.config, body)
        routes = await self.server.ask_engine(routing.expert_routes, net, ids)
        return reply(routing.routes_answer(self.served.tok, net.config, ids, routes))

    # ------------------------------------------------------------------ Layers

    async def lens(self, request: Request) -> Response:
        """{"text" or "ids", "k"} → what each layer would say at each position. A layer is one call
        of the engine: tokens of others go between two of them."""
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        body = await self.server.read_body(request)
        wanted, reading = await self.in_thread(lens_requests.read_lens, net, body)
        stamp = self.weights_stamp()
        trace = await self.server.ask_engine(lens.run, net, reading.ids, reading.source)
        last, *others = reversed(lens.states(trace))
        guesses = await self.server.ask_engine(lens.logit_lens, net, last, n_vocab, wanted.k)
        head = lens_requests.lens_head(self.served, net, reading, guesses)
        rows = [lens_requests.lens_row(self.served, guesses)]
        for x in others:
            guesses = await self.server.ask_engine(
                lens.logit_lens, net, x, n_vocab, wanted.k, head["answers"]
            )
            rows.insert(0, lens_requests.lens_row(self.served, guesses))
        self.check_weights(stamp)
        return reply(head | {"layers": rows})

    async def shares(self, request: Request) -> Response:
        """{"text" or "ids", "position", "token", "against"} → what each part adds to its logit."""
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        body = await self.server.read_body(request)
        wanted, reading = await self.in_thread(lens_requests.read_shares, net, body)
        token, result = await self.server.ask_engine(
            lens_requests.compute_shares, net, n_vocab, reading, wanted.token, wanted.against
        )
        answer = lens_requests.shares_answer
        return reply(answer(self.served, net, wanted, reading, token, result))

    async def patch(self, request: Request) -> Response:
        """{"clean", "corrupted", "kind", "answer", "other"} → how much of the difference each patch
        restores: {"rows"}, or with "stream" an event a layer."""
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        body = await self.server.read_body(request)
        wanted, pair = await self.in_thread(lens_requests.read_patch, net, body)
        stamp = self.weights_stamp()
        patching = await self.server.ask_engine(
            lens_requests.start_patching, net, n_vocab, wanted, pair
        )
        head = lens_requests.patch_head(self.served, net, wanted, patching)
        if wanted.stream:
            lines = self.patch_lines(head, patching, stamp)
            return StreamingResponse(lines, media_type="text/event-stream")
        rows = [row async for row in self.patch_rows(head, patching, stamp)]
        return reply(head | {"rows": rows})

    async def patch_rows(
        self, head: dict, patching: Patching, stamp: Any
    ) -> AsyncIterator[list[float]]:
        """What is restored in each layer, the first one first, as it is computed."""
        for layer in range(head["n_rows"]):
            row = await self.server.ask_engine(patching.restored, head["kind"], layer)
            self.check_weights(stamp)
            yield [round(share, 5) for share in row]

    async def patch_lines(self, head: dict, patching: Patching, stamp: Any) -> AsyncIterator[str]:
        yield event_line(head)
        try:
            async for row in self.patch_rows(head, patching, stamp):
                yield event_line({"row": row})
            yield "data: [DONE]\n\n"
        except ApiError as error:  # too late for a status
            yield event_line(error.body())

    def weights_stamp(self) -> Any:
        """What tells the weights that are served from others (barelm/reload.py)."""
        weights = self.server.settings.weights
        return None if weights is None else weights.stamp

    def check_weights(self, stamp: Any) -> None:
        """Refuse an answer of several calls of the engine between which others were loaded."""
        if self.weights_stamp() != stamp:
            raise ApiError(503, "other weights were loaded meanwhile: ask again")

    async def in_thread(self, read: Callable, net: GPT, body: dict) -> Any:
        """read(served, net, body), which tokenizes, beside the event loop."""
        try:
            return await asyncio.to_thread(read, self.served, net, body)
        except UserError as error:
            raise ApiError(400, str(error)) from None
