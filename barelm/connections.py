"""uvicorn with bounds: how many connections there may be, how long one may be silent, and an end in
order at a signal."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from barelm.api import ApiError
from barelm.front import FULL
from barelm.run import UserError

if TYPE_CHECKING:
    from asyncio.selector_events import _SelectorSocketTransport
    from collections.abc import Iterator
    from types import FrameType, ModuleType

    from uvicorn.config import Config
    from uvicorn.protocols.http.h11_impl import RequestResponseCycle

    from barelm.front import Shutdown

SPARE_CONNECTIONS = 100  # beyond max_connections, to answer 503 on
OWN_FILES = 32  # that the process has open at times, connections apart


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection where for client_timeout seconds no request is under way
    and none begins, or the head of one does not end. A connection too many waits for its request
    no more than a moment."""

    def __init__(self, *args: Any, client_timeout: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.client_timeout = client_timeout
        self.is_full = self.app_state.get("full", False)  # a connection too many

    def connection_made(self, transport: _SelectorSocketTransport) -> None:
        super().connection_made(transport)
        self.patience = min(self.client_timeout, 0.2) if self.is_full else self.client_timeout
        self.loop.call_later(self.patience, self.look_again, self.cycle)

    def look_again(self, cycle_before: RequestResponseCycle | None) -> None:
        """Close the connection if nothing has happened on it. cycle_before: what was its newest
        request a while ago, done or under way; None: it had none."""
        if self not in self.connections:  # it has ended
            return
        if self.transport.is_closing():  # and its client does not read what is left
            self.transport.abort()
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is cycle_before:
            if self.is_full and self.cycle is None:
                self.write_error(FULL)
            self.transport.close()
        self.loop.call_later(self.patience, self.look_again, self.cycle)

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else another is under way
            self.write_error(ApiError(400, msg))
        self.transport.close()

    def write_error(self, error: BaseException) -> None:
        """An answer where there is no request that it belongs to."""
        body = json.dumps(error.body()).encode()
        lines = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


class Server(uvicorn.Server):
    """uvicorn's, which accepts so many connections alone as there may be. asyncio's own way takes
    all that come, and writes a traceback for each that finds no file descriptor left.

    limit: connections that are served; n_spare: how many more are answered 503. shutdown: a
    front.Shutdown, which the signals change."""

    def __init__(self, config: Config, limit: int, n_spare: int, shutdown: Shutdown) -> None:
        super().__init__(config)
        self.limit = limit
        self.n_spare = n_spare
        self.stopping = shutdown

    def handle_exit(self, sig: int, frame: FrameType) -> None:
        """The first signal lets requests finish, a Ctrl-C behind it ends them, a third everything,
        such as a thread that does not come back."""
        if self.force_exit:
            os._exit(128 + sig)
        if sig == signal.SIGINT:
            self.stopping.interrupted = True
            self.stopping.forced = self.should_exit
            self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's would raise the signals again when all is done; serve.py has set ours."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # no socket: uvicorn would accept for itself
        self.listening = sockets[0]
        self.accepting = asyncio.create_task(self.accept(self.listening))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A connection that comes in this very moment would be told to what is cancelled.
        with suppress(NotImplementedError):  # Windows
            asyncio.get_running_loop().remove_reader(self.listening)
        self.accepting.cancel()
        with suppress(asyncio.CancelledError):
            await self.accepting
        await super().shutdown(sockets)
        tasks = list(self.server_state.tasks)  # uvicorn has ended them where --drain was too short
        if self.force_exit:
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)  # they tell their clients

    async def accept(self, sock: socket.socket) -> None:
        connections = self.server_state.connections
        sock.setblocking(False)
        told_at = -math.inf  # when a failure was printed
        while True:
            while len(connections) >= self.limit + self.n_spare:
                await asyncio.sleep(0.05)
            try:
                await self.accept_one(sock)
            except Exception as error:  # no descriptor left on the machine, say
                if time.monotonic() > told_at + 60:
                    print(f"serve.py: accept: {error}", file=sys.stderr, flush=True)
                    told_at = time.monotonic()
                await asyncio.sleep(0.5)

    async def accept_one(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        client, _ = await loop.sock_accept(sock)
        is_full = len(self.server_state.connections) >= self.limit
        protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state={"full": is_full}
        )
        await loop.connect_accepted_socket(lambda: protocol, client)


def connection_limits(max_connections: int) -> tuple[int, int]:
    """How many connections are served, and on how many more 503 is answered, further ones waiting
    in the kernel: max_connections, or fewer where the system lets a process open fewer files."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return max_connections, SPARE_CONNECTIONS
    wanted = max_connections + SPARE_CONNECTIONS + OWN_FILES
    n_files = raise_file_limit(resource, wanted)
    if n_files == resource.RLIM_INFINITY or n_files >= wanted:
        return max_connections, SPARE_CONNECTIONS
    n_spare = min(SPARE_CONNECTIONS, (n_files - OWN_FILES) // 4)
    limit = n_files - OWN_FILES - n_spare
    why = f"a process may open {n_files} files here (ulimit -n)"
    if n_spare < 1:
        raise UserError(f"{why}: serve.py wants {OWN_FILES + 4} at least")
    if limit < max_connections:
        print(f"{why}: --max_connections={limit}")
    return min(limit, max_connections), n_spare


def raise_file_limit(resource: ModuleType, wanted: int) -> int:
    """Let this process open as many files as wanted, or as its user may: the limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):  # macOS has a lower one beside it
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def reuse_option() -> tuple[int, int]:
    """Of a port whose last server has just ended, so that it can be had again. Windows would give a
    port to two servers by that, and has the opposite to forbid it."""
    if sys.platform == "win32":
        return socket.SO_EXCLUSIVEADDRUSE, 1
    return socket.SO_REUSEADDR, 1


def listen(host: str, port: int) -> socket.socket:
    """The socket that clients will connect to."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = addresses[0]
        # asyncio sends at once (TCP_NODELAY) where a socket names its protocol.
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, *reuse_option())
        sock.bind(address)
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        why = f"{error}; --port=0 takes a free one"
        raise UserError(f"--host={host} --port={port}: {why}") from None
    return sock
