"""One prepare.py on many machines, with files as all that they exchange (prepare.py --part=2/8).

The machines share the folder data/, and nothing else: no port is opened, no address is known. Each
does its share of every step; where a step needs what others do, it waits for their files, each of
which appears when it is whole. So a part that was killed is started again by itself, on any
machine, and goes on from its own files; those that wait for it go on when they are there.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from barelm import host
from barelm.files import read_json, whole_file
from barelm.run import Run, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def parse_part(part: str) -> tuple[int, int]:
    """(which, of how many) that "2/8" says, counted from 0: (1, 8)."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= 100_000:
        raise UserError(f"--part={part}: expected which one of how many, such as 2/8")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"--part={part}: not under torchrun: a part is one process on its machine")
    return int(match[1]) - 1, int(match[2])


class Part(Run):
    """One part, as a Run with its rank and world. Of the things that a step makes, part k of n
    (from 0) makes those with the numbers k, k + n, k + 2 n, …"""

    def __init__(self, part: str, work: Path) -> None:
        rank, world = parse_part(part)
        super().__init__(torch.device("cpu"), rank, world)
        self.work = Path(work)
        self.lock = None  # the open file that is locked while this part is at work

    def name(self, rank: int | None = None) -> str:
        rank = self.rank if rank is None else rank
        return f"part {rank + 1} of {self.world}"

    def file(self, ending: str, rank: int | None = None) -> Path:
        """This part's file in the working folder, or another's: .lock, .failed, .plan."""
        rank = self.rank if rank is None else rank
        return self.work / f"part_{rank + 1}.{ending}"

    def take_lock(self, patience: float = 3.0) -> None:
        """Be the only process that is this part."""
        self.lock = open(self.file("lock"), "a+b")
        give_up = time.monotonic() + patience  # others look at it for a moment, see is_running
        while not locked(self.lock, exclusive=True):
            if time.monotonic() > give_up:
                raise UserError(f"{self.work.parent}: {self.name()} is at work there already")
            time.sleep(0.1)
        self.file("failed").unlink(missing_ok=True)

    def is_running(self, rank: int) -> bool:
        """Whether a process is another part; True where the system does not tell."""
        try:
            with open(self.file("lock", rank), "rb") as file:
                return not locked(file, exclusive=False)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def begin(self, plan: str, folder: Path) -> bool:
        """Begin with the work of this plan, a name for all that it depends on. False where the data
        set in the folder is what all parts of this plan have made."""
        parts = read_json(folder / "parts.json", {})
        if parts.get("plan") == plan and (folder / "meta.json").exists():
            return False
        with whole_file(self.file("plan")) as file:
            file.write(f"{plan} {self.world}\n".encode())
        return True

    def wait_for(self, things: Sequence, is_there: Callable) -> None:
        """Wait until is_there(thing) of all these things, and say for which parts."""
        missing = list(enumerate(things))
        last_line = ""
        pause = 0.05  # seconds
        while True:
            missing = [(i, thing) for i, thing in missing if not is_there(thing)]
            if not missing:
                return
            if not self.work.is_dir():
                raise UserError(f"{self.name(0)} has ended: see what it says")
            ranks = sorted({i % self.world for i, _ in missing})
            line = f"waiting for {'; '.join(map(self.state_of, ranks))}"
            if line != last_line and pause > 1:
                self.progress.note(line)
                last_line = line
            time.sleep(pause)
            pause = min(2.0, 1.5 * pause)

    def state_of(self, rank: int) -> str:
        """A part's name, and why it may take long to come."""
        name = self.name(rank)
        if self.is_running(rank):
            with contextlib.suppress(OSError):
                if self.file("plan").read_bytes() != self.file("plan", rank).read_bytes():
                    return f"{name}, which has other settings, files or code"
            return name
        with contextlib.suppress(OSError):
            words = self.file("failed", rank).read_text(encoding="utf-8").strip()
            return f"{name}, which has stopped ({words})"
        return f"{name}, which is not running: start it, again if need be"

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Leave a word for the others where this part ends with a UserError."""
        try:
            yield
        except UserError as error:
            with contextlib.suppress(OSError):
                self.file("failed").write_text(f"{error}\n", encoding="utf-8")
            raise


def locked(file: Any, exclusive: bool) -> bool:
    """Lock an open file as long as it is open: whether that was possible. True where the system has
    no locks."""
    try:
        return host.lock(file, exclusive)
    except OSError:  # a folder without locks
        return True
