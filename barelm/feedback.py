"""Thumbs up and down that the page sends, into a file: a line of JSON for each. What the lines say,
and what prepare.py makes of them, is barelm/ratings.py's."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from barelm.api import ApiError, check_length, check_model, checked, read_fields, read_message
from barelm.jobs import limited
from barelm.messages import size_of
from barelm.run import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from barelm.api import ServedModel

FEEDBACK_BYTES = 1 << 30  # that the file may have; a full one takes no more


@dataclass
class Feedback:
    """What a client says of an answer to messages."""

    messages: list = field(default_factory=list)  # that were answered
    response: str = ""
    rating: int = limited(0, -1, 1)  # 1: good, -1: bad, 0: takes back what was said before
    model: str | None = None


def read_feedback(served: ServedModel, body: dict) -> dict:
    """The line of the file, a dict, that a request's JSON asks for."""
    request = read_fields(body, Feedback, neutral={}, ignored={})
    check_model(served, request.model)
    if body.get("rating") is None:
        raise ApiError(400, "rating: expected 1, -1 or 0", "rating")
    if not request.messages:
        raise ApiError(400, "messages: expected what was answered", "messages")
    if not request.response.strip():
        raise ApiError(400, "response: expected the answer's text", "response")
    prompt = [read_message(m, f"messages[{i}]") for i, m in enumerate(request.messages)]
    check_length(served, len(request.response) + checked(size_of, prompt))
    return {
        "time": round(time.time(), 3),
        "model": served.name,
        "prompt": prompt,
        "response": request.response,
        "rating": request.rating,
    }


class FeedbackFile:
    """A file of ratings, that several servers may write at once. A line is written at one stroke
    behind all others. What a killed server or a full disk left of one is ended as a line of its
    own, which prepare.py tells and leaves out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        try:
            os.close(self.open())
        except OSError as error:
            raise UserError(f"--feedback={path}: {error.strerror}") from None

    def open(self) -> int:
        """The file's number. It is opened for each line, so that it may be moved away meanwhile."""
        flags = (
            os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        )  # Windows has that
        return os.open(self.path, flags, 0o666)

    def append(self, row: dict) -> None:
        """Write a line; when this returns it is on the disk. An ApiError where it cannot be."""
        line = (json.dumps(row) + "\n").encode()  # ASCII: half a surrogate pair has no UTF-8
        try:
            with self.lock:
                self.append_bytes(line)
        except OSError as error:
            raise ApiError(507, f"the feedback cannot be written: {error.strerror}") from None

    def append_bytes(self, line: bytes) -> None:
        number = self.open()
        try:
            lock_file(number)
            size = os.fstat(number).st_size
            if size + len(line) > FEEDBACK_BYTES:
                raise ApiError(507, f"the feedback file has {FEEDBACK_BYTES >> 20} MiB: it is full")
            if size and last_byte(number, size) != b"\n":
                line = b"\n" + line
            while line:  # one stroke, but where the disk fills up within it
                line = line[os.write(number, line) :]
            os.fsync(number)
        finally:
            os.close(number)  # which frees the lock


def last_byte(number: int, size: int) -> bytes:
    """The byte at the end of an open file of this size."""
    os.lseek(number, size - 1, os.SEEK_SET)
    return os.read(number, 1)


def lock_file(number: int) -> None:
    """Wait until no other server writes this file; where a system has no such locks, it is the
    place of the writing that keeps the lines whole."""
    with suppress(ImportError):
        import fcntl  # not on every system

        fcntl.flock(number, fcntl.LOCK_EX)
