"""What every request passes before and behind the server's own work: who may ask, how long a client
may be silent, what is written down, and an answer whatever happens.

`Front` is a middleware of ASGI: it is called as `await front(scope, receive, send)` and calls the
application inside in the same way.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from barelm.answers import decode, usage
from barelm.api import ApiError, short

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.middleware.exceptions import ExceptionMiddleware

    from barelm.engine import Engine
    from barelm.tokenizer import Tokenizer


ALWAYS_OPEN = ("/health", "/metrics")  # probes are told the truth without a key or a place
OPEN = ("/", "/docs", "/openapi.json")  # what a browser shows before it has a key
CLIENT_LEFT = 499  # nginx's status for a client that left before its answer
FULL = ApiError(503, "all connections are taken (--max_connections): try again", code="full")


# JSON in ASCII: half a surrogate pair has no UTF-8. (json.dumps would make such an encoder anew.)
to_json = json.JSONEncoder(allow_nan=False).encode


def reply(value: dict, status: int = 200, headers: Any = None) -> Response:
    """A response of JSON."""
    return Response(to_json(value), status, headers, media_type="application/json")


def error_reply(error: BaseException, headers: list[tuple[bytes, bytes]] | None = None) -> Response:
    """The response that an ApiError is."""
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    elif error.status == 429:
        headers = {"Retry-After": "1"}
    elif error.status == 503:
        headers = {"Retry-After": "1", "Connection": "close"}
    return reply(error.body(), error.status, headers)


def event_line(value: dict) -> str:
    """A server-sent event of JSON."""
    return f"data: {to_json(value)}\n\n"


# --------------------------------------------------------------------------------------------------
# Who may ask


@dataclass
class Access:
    """Who may use the server: with a key, whoever has it; without, this machine's own programs, and
    web pages of the sites named. A page that somebody visits could otherwise use a server on their
    machine behind their back."""

    api_key: str  # empty: none is asked
    sites: list  # whose pages may ask, as a browser writes an Origin; "*": all
    loopback: bool  # only this machine reaches the port

    def refusal(self, scope: dict) -> ApiError | None:
        """The ApiError of a request (ASGI's scope) that may not pass, or None."""
        path = scope["path"]
        headers = dict(scope["headers"])
        if scope.get("state", {}).get("full") and path not in ALWAYS_OPEN:
            return FULL
        if self.api_key:
            if self.has_key(headers) or is_open(path):
                return None
            return ApiError(401, "expected Authorization: Bearer KEY", code="invalid_api_key")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        # A name that a stranger registered for this machine's address is DNS rebinding. No browser
        # leaves the header out, as HTTP/1.0 may.
        if self.loopback and b"host" in headers and not is_local(host):
            why = f"{short(host)} is no name of this machine's: --api_key lets others in"
            return ApiError(403, why)
        if scope["method"] == "POST" and self.is_from_elsewhere(scope["headers"]):
            return ApiError(403, "a page of another site asks: --cors=SITE lets it")
        return None

    def has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # The comparison takes as long however much of the key is right.
        return scheme.lower() == b"bearer" and hmac.compare_digest(
            key.strip(), self.api_key.encode()
        )

    def is_from_elsewhere(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether a page of a site asks that is neither this server's, nor on this machine, nor one
        of `sites`. Browsers say so, older ones by the Origin alone; others say nothing. headers:
        ASGI's pairs of bytes; of a name that is there twice all count."""
        fetch_site = header_values(headers, b"sec-fetch-site")
        origin = header_values(headers, b"origin")
        if fetch_site in ("same-origin", "same-site", "none"):
            return False
        if not fetch_site:
            if not origin or is_local(origin.partition("://")[2]):
                return False
        return "*" not in self.sites and origin not in self.sites


def is_open(path: str) -> bool:
    """Whether an address wants no key: the page itself asks for one, and holds nothing."""
    return path in OPEN or path.startswith("/page/") or path in ALWAYS_OPEN


def header_values(headers: list[tuple[bytes, bytes]], name: bytes) -> str:
    """All values of a header, in lower case, with commas between them."""
    values = [value for key, value in headers if key == name]
    return b",".join(values).decode("latin-1").lower()


def read_sites(text: str) -> list[str]:
    """The sites that --cors names, as a browser writes them into Origin."""
    sites = [site.strip().lower().rstrip("/") for site in text.split(",")]
    return [site for site in sites if site]


def is_local(authority: str) -> bool:
    """Whether a name with or without a port, in lower case, may be this machine's: an address, one
    word, or a name in .localhost, .local or .internal, which no stranger can register."""
    form = r"(\[[0-9a-f:.]+\]|[a-z0-9_-]+(\.[a-z0-9_-]+)*)\.?(:[0-9]*)?"
    match = re.fullmatch(form, authority)
    if match is None:
        return False
    words = match[1].split(".")
    if words[0].startswith("[") or len(words) == 1:
        return True
    return words[-1].isdigit() or words[-1] in ("localhost", "local", "internal")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address, as the system writes it."""
    address = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or address).is_loopback


# --------------------------------------------------------------------------------------------------
# What is written down


@dataclass
class Record:
    """What is known of a request while it runs; scope["record"]."""

    begun: float = field(default_factory=time.monotonic)
    jobs: list = field(default_factory=list)  # those of the engine; the Front cancels the rest
    status: int | None = None  # None: nothing was answered yet
    is_stream: bool = False
    gave_up: bool = False  # the client did not read
    id: str = ""  # the client's name for it, or ours: X-Request-Id


def request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """What a request is called in its answer's X-Request-Id and in the log: as the client or a
    proxy calls it, if that is a plain word."""
    given = dict(headers).get(b"x-request-id", b"").decode("latin-1")
    if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given):
        return given
    return "req_" + os.urandom(12).hex()


class RequestLog:
    """A file with a line of JSON for each request; tok: with what was asked and answered too."""

    def __init__(self, path: str, tok: Tokenizer | None = None) -> None:
        self.path = path
        self.tok = tok
        self.file = open(path, "a", encoding="utf-8")
        self.failed = False

    def write(self, scope: dict, record: Record, seconds: float) -> None:
        row = {
            "time": round(time.time(), 3),
            "id": record.id,
            "client": (scope["client"] or ["?"])[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": record.status,
            "seconds": round(seconds, 4),
        }
        if record.jobs:
            row |= self.job_columns(record)
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk ends no answer; said once, not by each request
            if not self.failed:
                print(f"serve.py: --log={self.path}: {error.strerror}", file=sys.stderr, flush=True)
            self.failed = True
        else:
            self.failed = False

    def job_columns(self, record: Record) -> dict:
        jobs = record.jobs
        started = [job.first_token_at for job in jobs if job.first_token_at is not None]
        columns = usage(jobs) | {"first_token": None, "finish": []}
        if started:
            columns["first_token"] = round(min(started) - record.begun, 4)
        for job in jobs:
            columns["finish"].append(job.row.out.finish_reason if job.row.done else None)
        if self.tok is not None:
            columns["prompts"] = [decode(self.tok, job.ids) for job in jobs]
            columns["answers"] = [job.row.out.text for job in jobs]
        return columns


# --------------------------------------------------------------------------------------------------


@dataclass
class Shutdown:
    """How the server was told to end."""

    drain: float  # seconds that running requests have
    interrupted: bool = False  # by Ctrl-C, not by SIGTERM
    forced: bool = False  # a second Ctrl-C: at once


class Front:
    """The middleware. client_timeout: seconds in which a client reads a piece of its answer."""

    def __init__(self, app: ExceptionMiddleware, engine: Engine, access: Access,
                 request_log: RequestLog | None, client_timeout: float,
                 shutdown: Shutdown) -> None:  # fmt: skip
        self.app = app
        self.engine = engine
        self.access = access
        self.request_log = request_log  # or None
        self.client_timeout = client_timeout
        self.shutdown = shutdown

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = Record(id=request_id(scope["headers"]))
        scope["record"] = record

        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def give_up():
            record.gave_up = True
            task.cancel()

        async def patient_send(message):
            record.status = message.get("status", record.status)
            if message["type"] == "http.response.start":
                name = (b"x-request-id", record.id.encode())
                message["headers"] = [*message.get("headers", []), name]
            # Until Python 3.12 asyncio.wait_for makes a task each time: this is once a token.
            clock = loop.call_later(self.client_timeout, give_up)
            try:
                await send(message)
            finally:
                clock.cancel()

        try:
            refusal = self.access.refusal(scope)
            answer = self.app if refusal is None else error_reply(refusal)
            await answer(scope, receive, patient_send)
        except ClientDisconnect:
            record.status = record.status or CLIENT_LEFT
        except asyncio.CancelledError:  # uvicorn stops, or a client does not read
            if record.gave_up:
                record.status = record.status or CLIENT_LEFT
                return
            why = f"cut off after --drain={self.shutdown.drain:g} s"
            if self.shutdown.forced:
                why = "cut off by a second Ctrl-C"
            error = ApiError(503, "the server is stopping")
            await self.end_with(error, why, scope, receive, patient_send, send)
        except Exception as bug:
            error = ApiError(500, "the server failed at this request")
            await self.end_with(error, repr(bug), scope, receive, patient_send, send)
        finally:
            self.close(scope, record)

    async def end_with(self, error: BaseException, why: str, scope: dict, receive: Callable,
                       patient_send: Callable, send: Callable) -> None:  # fmt: skip
        """Tell the client of the error, as far as it can still be told."""
        print(f"serve.py: {scope['path']!r}: {why}", file=sys.stderr, flush=True)
        record = scope["record"]
        if record.status is None:
            await error_reply(error)(scope, receive, patient_send)
        elif record.is_stream:  # too late for a status
            last = {"type": "http.response.body", "body": event_line(error.body()).encode()}
            with suppress(asyncio.TimeoutError):  # a client that does not read
                await asyncio.wait_for(send(last), 1)

    def close(self, scope: dict, record: Record) -> None:
        """Free what the request still has of the engine; count it and write its line."""
        self.engine.cancel(record.jobs)
        seconds = time.monotonic() - record.begun
        path = getattr(scope.get("route"), "path", "other")  # wrong ones are no names of metrics
        self.engine.metrics.add(f'requests_total{{path="{path}",status="{record.status}"}}')
        if record.jobs:
            self.engine.metrics.observe("request_seconds", seconds)
        if self.request_log is not None:
            self.request_log.write(scope, record, seconds)
        record.jobs = []  # the connection may keep the record for a while
