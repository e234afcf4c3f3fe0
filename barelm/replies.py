"""What a network answered, kept until an evaluation is done: batches of requests, shared by all
processes, none of them asked twice."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from barelm.resume import make_folder
from barelm.run import Progress, UserError, duration
from barelm.scoring import make_batches

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from barelm.run import Run
    from barelm.scoring import Request


class Answers:
    """What was answered, {key: answer}, and the file where this process keeps it, a line [key,
    answer] each; a folder that cannot be written is refused before hours are spent.

    identity: of the model; micro_tokens: of a batch at most, when padded."""

    def __init__(self, folder: Path, identity: str, run: Run, micro_tokens: int = 8192) -> None:
        self.folder = folder
        self.identity = identity  # of the model: another one's answers have other keys
        self.run = run
        self.micro_tokens = micro_tokens
        self.path = folder / f"answers_{run.rank}.jsonl"
        self.answered = {}
        make_folder(folder)
        try:
            self.file = open(self.path, "a", encoding="utf-8")
            for path in folder.glob("answers_*.jsonl"):
                self.read(path)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}: give another --out_dir") from None
        run.wait()  # nobody writes before all have read
        self.write("\n")  # behind a line that a killed process left unfinished

    def read(self, path: Path) -> None:
        """Take over what a stopped run answered."""
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError, RecursionError):  # torn, or none of ours
                key, answer = json.loads(line)
                self.answered[key] = answer

    def write(self, lines: str) -> None:
        """Append to the file, at once: a disk that is full ends the run, which can go on later."""
        try:
            self.file.write(lines)
            self.file.flush()
        except OSError as error:
            with suppress(OSError):  # what is left in its buffer fails again
                self.file.close()
            why = f"cannot be written: {error.strerror}: what was answered before is kept there"
            raise UserError(f"{self.path}: {why}: make room, and run it again") from None

    def key(self, depends_on: Any, request: Request) -> str:
        """What tells a request from all others, of this model and with these settings; not with
        whom it shares a beginning, which changes no answer."""
        asked = [self.identity, depends_on, request.context, request.continuations]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    def __call__(self, name: str, depends_on: Any, requests: list[Request], work: Callable,
                 max_tokens: int | None = None) -> list:  # fmt: skip
        """The answers to requests, [answer], each as JSON has it: work([Request]) -> [answer] is
        called with batches, the same whatever the number of processes.

        name: for the line of progress; depends_on: what else an answer depends on, as JSON;
        max_tokens: of a batch, instead of micro_tokens."""
        keys = [self.key(depends_on, request) for request in requests]
        # Equal requests are answered once: no answer depends on which process comes last.
        unique = dict(zip(keys, requests))
        # All processes make the same batches, and each takes every world-th of them.
        batches = make_batches(unique, max_tokens or self.micro_tokens)
        own_batches = batches[self.run.rank :: self.run.world]
        own_keys = []
        total = sum(map(len, own_batches))
        n_new = 0  # answered now, not read from a stopped run's file
        begun = time.monotonic()
        progress = Progress() if self.run.is_main else None
        for batch in own_batches:
            # All of a batch, or nothing: what stands beside a request must not change.
            if not self.answered.keys() >= set(batch):
                self.answer(batch, unique, work)
                n_new += len(batch)
            own_keys += batch
            if progress:
                seconds_each = (time.monotonic() - begun) / max(1, n_new)
                left = duration(seconds_each * (total - len(own_keys)))
                progress(f"{name}: {len(own_keys):,} of {total:,} requests, left {left}")
        if progress:
            line = f"{name}: {total:,} of {total:,} requests, {total - n_new:,} of before"
            progress(line, last=True)
        self.share(own_keys)
        return [self.answered[key] for key in keys]

    def answer(self, batch: list[str], requests: dict[str, Request], work: Callable) -> None:
        """Answer a batch, keys of requests {key: Request}, and keep what was answered."""
        lines = []
        for key, answer in zip(batch, work([requests[key] for key in batch])):
            self.answered[key] = answer
            lines.append(json.dumps([key, answer]) + "\n")
        self.write("".join(lines))

    def share(self, keys: list[str]) -> None:
        """Give all processes what this one has answered to requests with these keys."""
        if self.run.world == 1:
            return
        parts = [None] * self.run.world
        dist.all_gather_object(parts, {key: self.answered[key] for key in keys})
        for part in parts:
            self.answered.update(part)

    def close(self) -> None:
        """All is in results.json: nothing needs to be kept."""
        self.file.close()
        self.run.wait()  # nobody removes a file that another still writes
        if self.run.is_main:
            for path in self.folder.glob("answers_*.jsonl"):
                path.unlink()
