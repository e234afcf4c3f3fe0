"""The addresses of the page (barelm/web): its files, and what its views ask for. Each handler reads
the request (barelm/page.py and its kin check it), has the engine's thread look into the network
between two steps, and shapes the answer."""

import asyncio

from fastapi import Request
from fastapi.responses import Response

from barelm import attention_maps, next_token, page, routing
from barelm.api import ApiError, short, tokenized
from barelm.front import reply
from barelm.token_steps import TokenSteps


class PageHandlers:
    """What is done for each of them. server: serve.py's Handlers, which reads bodies and asks the
    engine."""

    def __init__(self, server):
        self.server = server
        self.engine = server.engine
        self.served = server.served
        self.folder = server.settings.folder  # the model's, with its log.jsonl
        self.token_steps = None  # a TokenSteps, once it was asked for
        self.recent_logits = next_token.RecentLogits()

    def routes(self):
        """[(methods, address, handler)], a view behind the other."""
        return [
            ("GET HEAD", "/", self.index),
            ("GET HEAD", "/page/{name:path}", self.file),
            ("GET", "/inspect/model", self.model),
            ("POST", "/inspect/neighbours", self.neighbours),
            ("POST", "/inspect/steps", self.steps),
            ("POST", "/inspect/next", self.next_token),
            ("POST", "/inspect/attention", self.attention),
            ("POST", "/inspect/grid", self.grid),
            ("POST", "/inspect/routing", self.routing),
            ("GET", "/inspect/log", self.log),
        ]

    # ------------------------------------------------------------------ the page

    async def index(self):
        return await self.file("index.html")

    async def file(self, name: str):
        # Read each time: who changes the page need not start the server anew.
        data, media_type = await asyncio.to_thread(page.page_file, name)
        return Response(data, headers=page.HEADERS, media_type=media_type)

    # ------------------------------------------------------------------ Model

    async def model(self):
        return reply(self.served.card | page.describe_model(self.engine.net))

    # ------------------------------------------------------------------ Tokens

    async def neighbours(self, request: Request):
        """{"token": an id, or "text" of one token, "n"} → the n tokens with nearest embeddings."""
        body = await self.server.read_body(request)
        wanted = await asyncio.to_thread(page.read_neighbours, self.served, body)
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        neighbours = await self.server.ask_engine(
            page.nearest, net, n_vocab, wanted.token, wanted.n
        )
        return reply(page.neighbours_answer(self.served.tok, wanted, neighbours))

    async def steps(self, request: Request):
        """{"text"} → how it became its tokens: the merges of BPE, in their order."""
        body = await self.server.read_body(request)
        text = await asyncio.to_thread(page.read_text, self.served, body)

        def look():
            self.token_steps = self.token_steps or TokenSteps(self.served.tok)
            return self.token_steps.of(text)

        return reply(await asyncio.to_thread(tokenized, look))

    # ------------------------------------------------------------------ Next token

    async def next_token(self, request: Request):
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

    async def attention(self, request: Request):
        """{"text" or "ids", "layer", "head": one, or all, "mean"} → of each head a row for each
        token."""
        net = self.engine.net
        body = await self.server.read_body(request)
        read = attention_maps.read_attention
        wanted = await asyncio.to_thread(read, self.served, net.config, body)
        look = attention_maps.attention_maps
        maps = await self.server.ask_engine(look, net, wanted.ids, wanted.layer, wanted.mean)
        return reply(attention_maps.attention_answer(self.served.tok, wanted, maps))

    async def grid(self, request: Request):
        """{"text" or "ids"} → the attention of all layers and heads, small, as bytes."""
        body = await self.server.read_body(request)
        ids = await asyncio.to_thread(attention_maps.read_grid, self.served, body)
        grid = await self.server.ask_engine(attention_maps.attention_grid, self.engine.net, ids)
        return reply(attention_maps.grid_answer(self.served.tok, ids, grid))

    async def routing(self, request: Request):
        """{"text" or "ids"} → of each layer with experts which of them each token went to."""
        net = self.engine.net
        body = await self.server.read_body(request)
        ids = await asyncio.to_thread(routing.read_routes, self.served, net.config, body)
        routes = await self.server.ask_engine(routing.expert_routes, net, ids)
        return reply(routing.routes_answer(self.served.tok, net.config, ids, routes))

    # ------------------------------------------------------------------ Training

    async def log(self, request: Request):
        """?after=a step → the rows of the run's log.jsonl behind it, and its last step."""
        after = request.query_params.get("after", "-1")
        if not (after.removeprefix("-").isdecimal() and len(after) < 16):
            raise ApiError(400, f"after = {short(after)}: expected a step", "after")
        try:
            rows, last = await asyncio.to_thread(
                page.log_rows, self.folder / "log.jsonl", int(after)
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"log.jsonl cannot be read: {short(str(error))}"
            raise ApiError(500, why) from None
        return reply({"rows": rows, "last": last})
