"""The addresses of the view Training (barelm/web/training.js): runs, their logs, and the reloading
of the model's weights. What they answer is made by barelm/runs.py and barelm/reload.py."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import Response

from barelm.api import ApiError, short
from barelm.front import reply
from barelm.run import UserError
from barelm.runs import Runs, csv_text, standing

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class RunHandlers:
    """What is done for each of them. server: serve.py's Handlers."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.engine = server.engine
        settings = server.settings
        self.runs = Runs(settings.folder, settings.beside)
        self.weights = settings.weights  # a barelm.reload.Weights; None: nothing is said of them
        self.may_reload = settings.reload

    def routes(self) -> list[tuple]:
        """[(methods, address, handler)]"""
        return [
            ("GET", "/inspect/runs", self.list_runs),
            ("GET", "/inspect/log", self.log),
            ("GET", "/inspect/log.csv", self.table),
            ("POST", "/inspect/reload", self.reload),
        ]

    async def list_runs(self) -> Response:
        """{"served": the name of the model's run, "runs": the names of all that have a log, the
        served one first; "weights": what is served, and what the folder holds by now}."""
        names = await asyncio.to_thread(self.runs.names)
        answer: dict = {"served": self.runs.served, "runs": names, "weights": None}
        if self.weights is not None:
            answer["weights"] = await asyncio.to_thread(self.described_weights)
        return reply(answer)

    def described_weights(self) -> dict:
        weights = self.weights
        are_new = weights.are_new()
        step = weights.step_on_disk() if are_new else weights.step
        return {
            "step": None if weights.step < 0 else weights.step,
            "step_on_disk": None if step < 0 else step,
            "are_new": are_new,
            "can_reload": self.may_reload,
            "busy": weights.busy,
        }

    async def log(self, request: Request) -> Response:
        """?run=a name (the served one's, if none is) &after=a step → the rows of the run's
        log.jsonl behind it, the seconds of each, the last step; and how far the run is."""
        query = request.query_params
        after = query.get("after", "-1")
        if not (after.removeprefix("-").isdecimal() and len(after) < 16):
            raise ApiError(400, f"after = {short(after)}: expected a step", "after")
        return reply(await self.read(self.answer, query.get("run"), int(after)))

    def answer(self, name: str | None, after: int) -> dict:
        name = name or self.runs.served
        log = self.runs.log(name)
        answer = log.answer(after)
        here = standing(self.runs.folder(name), log)
        return answer | {"standing": here and asdict(here)}

    async def table(self, request: Request) -> Response:
        """?run=a name &run=another → all rows of these runs' logs as comma-separated values."""
        names = request.query_params.getlist("run") or [self.runs.served]
        text = await self.read(csv_text, self.runs, list(dict.fromkeys(names)))
        headers = {"Content-Disposition": 'attachment; filename="runs.csv"'}
        # A name may have half a surrogate pair, which has no UTF-8.
        return Response(text.encode(errors="replace"), headers=headers, media_type="text/csv")

    async def read(self, f: Callable, *args: Any) -> Any:
        """f(*args), which reads logs, in a thread."""
        try:
            return await asyncio.to_thread(f, *args)
        except OSError as error:
            raise ApiError(500, f"log.jsonl cannot be read: {short(str(error))}") from None

    async def reload(self, request: Request) -> Response:
        """{} → {"step": of the weights that the folder held, and that are served now}."""
        await self.server.read_body(request)
        weights = self.weights
        if weights is None or not self.may_reload:
            raise ApiError(403, "this server keeps its weights (--reload=false)")
        if weights.busy:
            raise ApiError(409, "new weights are being loaded already")
        weights.busy = True
        try:
            await asyncio.to_thread(weights.read)
            step = await asyncio.wrap_future(self.engine.when_idle(weights.take))
        except UserError as error:
            raise ApiError(409, str(error)) from None
        finally:
            weights.busy = False
            weights.new = None
        self.engine.metrics.add("reloads_total")
        return reply({"step": None if step < 0 else step})
