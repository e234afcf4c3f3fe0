"""The addresses of the page (barelm/web): its files, and what its views ask for. Each handler reads
the request (barelm/page.py and its kin check it), has the engine's thread look into the network
between two steps, and shapes the answer."""

import asyncio

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from barelm import lens, lens_requests, page
from barelm.api import ApiError, short
from barelm.front import event_line, reply
from barelm.run import UserError


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
            ("POST", "/inspect/lens", self.lens),
            ("POST", "/inspect/shares", self.shares),
            ("POST", "/inspect/patch", self.patch),
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

    # ------------------------------------------------------------------ Layers

    async def lens(self, request: Request):
        """{"text" or "ids", "k"} → what each layer would say at each position. A layer is one call
        of the engine: tokens of others go between two of them."""
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        body = await self.server.read_body(request)
        wanted, reading = await self.in_thread(lens_requests.read_lens, net, body)
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
        return reply(head | {"layers": rows})

    async def shares(self, request: Request):
        """{"text" or "ids", "position", "token", "against"} → what each part adds to its logit."""
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        body = await self.server.read_body(request)
        wanted, reading = await self.in_thread(lens_requests.read_shares, net, body)
        token, result = await self.server.ask_engine(
            lens_requests.compute_shares, net, n_vocab, reading, wanted.token, wanted.against
        )
        answer = lens_requests.shares_answer
        return reply(answer(self.served, net, wanted, reading, token, result))

    async def patch(self, request: Request):
        """{"clean", "corrupted", "kind", "answer", "other"} → how much of the difference each patch
        restores: {"rows"}, or with "stream" an event a layer."""
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        body = await self.server.read_body(request)
        wanted, pair = await self.in_thread(lens_requests.read_patch, net, body)
        patching = await self.server.ask_engine(
            lens_requests.start_patching, net, n_vocab, wanted, pair
        )
        head = lens_requests.patch_head(self.served, net, wanted, patching)
        if wanted.stream:
            lines = self.patch_lines(head, patching)
            return StreamingResponse(lines, media_type="text/event-stream")
        rows = [row async for row in self.patch_rows(head, patching)]
        return reply(head | {"rows": rows})

    async def patch_rows(self, head, patching):
        """What is restored in each layer, the first one first, as it is computed."""
        for layer in range(head["n_rows"]):
            row = await self.server.ask_engine(patching.restored, head["kind"], layer)
            yield [round(share, 5) for share in row]

    async def patch_lines(self, head, patching):
        yield event_line(head)
        try:
            async for row in self.patch_rows(head, patching):
                yield event_line({"row": row})
            yield "data: [DONE]\n\n"
        except ApiError as error:  # too late for a status
            yield event_line(error.body())

    async def in_thread(self, read, net, body):
        """read(served, net, body), which tokenizes, beside the event loop."""
        try:
            return await asyncio.to_thread(read, self.served, net, body)
        except UserError as error:
            raise ApiError(400, str(error)) from None

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
