"""The addresses of the page (barelm/web): its files, and what its views ask for. Each handler reads
the request (barelm/page.py and its kin check it), has the engine's thread look into the network
between two steps, and shapes the answer."""

import asyncio

from fastapi import Request
from fastapi.responses import Response

from barelm import page
from barelm.api import ApiError, short
from barelm.front import reply


class PageHandlers:
    """What is done for each of them. server: serve.py's Handlers, which reads bodies and asks the
    engine."""

    def __init__(self, server):
        self.server = server
        self.engine = server.engine
        self.served = server.served
        self.folder = server.settings.folder  # the model's, with its log.jsonl

    def routes(self):
        """[(methods, address, handler)], a view behind the other."""
        return [
            ("GET HEAD", "/", self.index),
            ("GET HEAD", "/page/{name:path}", self.file),
            ("GET", "/inspect/model", self.model),
            ("POST", "/inspect/neighbours", self.neighbours),
            ("POST", "/inspect/attention", self.attention),
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

    # ------------------------------------------------------------------ Attention

    async def attention(self, request: Request):
        """{"text" or "ids", "layer", "head": one, or all} → of each head a row for each token."""
        net = self.engine.net
        body = await self.server.read_body(request)
        wanted = await asyncio.to_thread(page.read_attention, self.served, net.config, body)
        maps = await self.server.ask_engine(page.attention_maps, net, wanted.ids, wanted.layer)
        return reply(page.attention_answer(self.served.tok, wanted, maps))

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
