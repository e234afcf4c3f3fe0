"""The run that a served model is of, and those beside it: their logs, and how far each has come.

    runs = Runs(Path("out/python"))
    runs.names()                         # ["python", "wide", …]: folders of out/ with a log.jsonl
    runs.log("wide").answer(after=-1)    # {"rows": […], "seconds": […], "last": 300, "every": 1}
    standing(runs.folder("wide"), runs.log("wide"))
    csv_text(runs, ["python", "wide"])

Nothing here changes a run, and no name leads out of the folder that holds the served one."""

import bisect
import csv
import io
import json
import math
import os
import threading
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from barelm.api import ApiError, short
from barelm.resume import PARTS
from barelm.run import Horizon
from barelm.scores import is_finite

LOG = "log.jsonl"
LOG_ROWS = 2000  # the most rows of training in one answer: of more, one in so many
MOST_RUNS = 100  # that are listed: those that were written to last
QUIET = 60.0  # seconds without a row behind which a run without a lock is taken to have stopped


# --------------------------------------------------------------------------------------------------
# Which runs there are


class Runs:
    """The run of the model in `folder`, and where beside=True the runs beside it: folders of the
    same folder that hold a log.jsonl. Links that lead elsewhere are none of them."""

    def __init__(self, folder: str | Path, beside: bool = True) -> None:
        folder = Path(folder).resolve()
        if folder.name in PARTS and (folder.parent / LOG).is_file():
            folder = folder.parent  # out/python/best is of the run out/python
        self.served = folder.name
        self.parent = folder.parent
        self.beside = beside
        self.logs = {}  # {name: RunLog}

    def folder(self, name: str) -> Path:
        return self.parent / name

    def has_log(self, name: str) -> bool:
        """Whether a folder of this name is here, and has a log of its own."""
        log = self.folder(name) / LOG
        return log.is_file() and log.resolve() == log

    def names(self) -> list[str]:
        """The served run's name first, if it has a log; then the others', the newest first."""
        names = [self.served] if self.has_log(self.served) else []
        if not self.beside:
            return names
        others = []
        try:
            entries = [path.name for path in self.parent.iterdir()]
        except OSError:  # one may read a folder, and not the one that it is in
            return names
        for name in entries:
            if name != self.served and not name.startswith(".") and self.has_log(name):
                with suppress(OSError):  # removed in this moment
                    others.append((self.folder(name).joinpath(LOG).stat().st_mtime, name))
        others = [name for _, name in sorted(others, reverse=True)]
        return names + others[: MOST_RUNS - len(names)]

    def log(self, name: str) -> "RunLog":
        """The RunLog of a run that `names` lists, which alone can be asked for."""
        if name != self.served and name not in self.names():
            raise ApiError(404, f"run {short(name)}: no such run beside the served one", "run")
        return self.logs.setdefault(name, RunLog(self.folder(name) / LOG))


# --------------------------------------------------------------------------------------------------
# A log that grows


def null(word: str) -> None:
    return None


def finite_or_null(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None  # 1e999 is JSON, and no float


def read_row(line: bytes) -> dict:
    # NaN and Infinity are no JSON of a browser's.
    return json.loads(line, parse_constant=null, parse_float=finite_or_null)


class RunLog:
    """A log.jsonl, of which each line is parsed once: what is asked again is only what is new. A
    row that is being written waits for the next time. A resume, or another run, replaces the file,
    which is then read anew.

    Of each row: steps; tokens (-1: not logged); seconds, the sum of `dt` up to it: what the steps
    took, without validation, saves and the time between a run's parts. A resume cuts the log to the
    checkpoint that it goes on from, so that no step counts twice."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = threading.Lock()  # several requests may ask at once
        self.forget()

    def forget(self) -> None:
        self.file_number = None
        self.end = 0  # bytes that were read
        self.last_line = b""
        self.steps = array("q")
        self.tokens = array("q")
        self.seconds = array("d")
        self.begins = array("q")  # where in the file a row begins
        self.is_evaluation = array("b")
        self.total = 0.0  # seconds
        self.keys = {}  # in the order of their coming; a dict, since a set has no order

    def update(self) -> None:
        """Take in what is new in the file: its bytes from the first new one on."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            self.forget()
            return
        with file:
            if not self.goes_on_in(file):
                self.forget()
            self.file_number = file_number(file)
            file.seek(self.end)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    break
                self.add(line)

    def goes_on_in(self, file: BinaryIO) -> bool:
        """Whether what was read is still the beginning of the open file."""
        if file_number(file) != self.file_number:
            return False
        file.seek(self.end - len(self.last_line))
        return file.read(len(self.last_line)) == self.last_line

    def add(self, line: bytes) -> None:
        """Take in a line; one that is no row is passed over."""
        begin = self.end
        self.end += len(line)
        self.last_line = line
        try:
            row = read_row(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if type(step) is not int or abs(step) >= 1 << 60:
            return
        dt = row.get("dt")
        if is_finite(dt) and dt > 0:
            self.total += dt
        tokens = row.get("tokens")
        self.steps.append(step)
        self.tokens.append(tokens if type(tokens) is int and 0 <= tokens < 1 << 60 else -1)
        self.seconds.append(self.total)
        self.begins.append(begin)
        self.is_evaluation.append(any(key.startswith("val_") for key in row))
        self.keys |= dict.fromkeys(row)

    def answer(self, after: int) -> dict:
        """What is new behind step `after`, as /inspect/log tells it: rows; seconds, of each row;
        last, the last step there is, or -1; every: of many rows one in so many is there, and all
        evaluations."""
        with self.lock:
            self.update()
            n = len(self.steps)
            first = bisect.bisect_right(self.steps, after)
            every = max(1, math.ceil((n - first) / LOG_ROWS))
            chosen = []
            for i in range(first, n):
                if (i - first) % every == 0 or self.is_evaluation[i] or i == n - 1:
                    chosen.append(i)
            chosen = chosen[-2 * LOG_ROWS :]
            return {
                "rows": self.read_rows(chosen),
                "seconds": [round(self.seconds[i], 3) for i in chosen],
                "last": self.steps[-1] if n else -1,
                "every": every,
            }

    def read_rows(self, numbers: Sequence[int]) -> list[dict]:
        """The rows of these numbers, rising, read from the file."""
        if not numbers:
            return []
        replaced = ApiError(503, f"{self.path.name} is being replaced: try again")
        rows = []
        with open(self.path, "rb") as file:
            if file_number(file) != self.file_number:  # in this moment
                raise replaced
            for i in numbers:  # one by one: a log may be larger than the memory
                file.seek(self.begins[i])
                try:
                    rows.append(read_row(file.readline()))
                except ValueError:
                    raise replaced from None
        return rows

    def all_rows(self) -> tuple[list[dict], list[float]]:
        """(the rows, the seconds of each)."""
        with self.lock:
            self.update()
            return self.read_rows(range(len(self.steps))), list(self.seconds)

    def at(self, step: int) -> tuple[int, int, float]:
        """(step, tokens or 0, seconds) of the last row up to a step; zeros where there is none."""
        i = bisect.bisect_right(self.steps, step) - 1
        if i < 0:
            return 0, 0, 0.0
        return self.steps[i], max(0, self.tokens[i]), self.seconds[i]


def file_number(file: BinaryIO) -> tuple[int, int]:
    """What tells one open file from another that has its name later."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


# --------------------------------------------------------------------------------------------------
# How far a run has come


@dataclass
class Standing:
    """How far a run has come.

    state: "running"; "finished": it has reached its horizon; "stopped" before that; "over": it does
    not go on, and whether it reached its horizon is not known. progress: 0 to 1, or None where
    run.json does not say enough. seconds_left: by the rate of the part that runs, validation and
    saves included; age: since the last row."""

    state: str
    step: int
    progress: float | None
    seconds_left: float | None
    age: float
    seconds: float  # that its steps took


def standing(folder: str | Path, log: RunLog, now: float | None = None) -> Standing | None:
    """The Standing of the run in a folder, whose RunLog was asked just now; None without a row."""
    if not log.steps:
        return None
    folder = Path(folder)
    written = log.path.stat().st_mtime
    age = max(0.0, (time.time() if now is None else now) - written)
    step, tokens, seconds = log.at(log.steps[-1])
    entries = read_entries(folder / "run.json")
    horizon, epoch_tokens = horizon_of(entries)
    progress = left = None
    if horizon is not None:
        # The clock of the part that runs or ran last, which began when run.json was written.
        begun = (folder / "run.json").stat().st_mtime
        clock = max(0.0, written - begun)
        first = log.at(first_step(entries))
        before = first[2]
        progress = progress_at(horizon, epoch_tokens, step, tokens, before + clock)
        gained = progress - progress_at(horizon, epoch_tokens, *first)
        if gained > 0 and clock > 0:
            left = max(0.0, (1 - progress) * clock / gained - age)
    state = state_of(folder, progress, age, seconds / max(1, step))
    if state != "running":
        left = None
        if horizon is not None and horizon.max_minutes:
            # A clock that a copy, or a pause, has changed does not say whether it had run out.
            progress = progress_at(
                replace(horizon, max_minutes=None), epoch_tokens, step, tokens, 0
            )
            state = "finished" if progress >= 1 else "over"
            progress = progress if progress >= 1 else None
    return Standing(state, step, progress, left, age, seconds)


def read_entries(path: Path) -> dict:
    """A run.json's dict, or {}."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def first_step(entries: dict) -> int:
    """The step at which a run's last part began, by its run.json."""
    parts = entries.get("parts")
    if isinstance(parts, list) and parts and isinstance(parts[-1], dict):
        step = parts[-1].get("step")
        return step if type(step) is int else 0
    return 0


def horizon_of(entries: dict) -> tuple[Horizon | None, float | None]:
    """(the Horizon by a run.json's dict, tokens of an epoch or None); (None, None) where it does
    not say where the run ends."""
    config = entries.get("config")
    said = entries.get("horizon")  # what the settings came to, with these data
    if not isinstance(config, dict):
        return None, None
    said = said if isinstance(said, dict) else {}
    limits = {}
    for name in ("max_steps", "max_tokens", "max_epochs", "max_minutes"):
        value = config.get(name)
        limits[name] = value if is_finite(value) and value >= 0 else None
    if is_finite(said.get("max_steps")):  # of so many epochs, over so many examples
        limits |= {"max_steps": said["max_steps"], "max_epochs": None}
    epoch_tokens = said.get("epoch_tokens")
    if not (is_finite(epoch_tokens) and epoch_tokens > 0):
        epoch_tokens = None
    if limits["max_epochs"] and epoch_tokens is None:  # which may end it before the others
        return None, None
    if limits["max_steps"] != 0 and not any(limits.values()):
        return None, None
    return Horizon(**limits), epoch_tokens


def progress_at(
    horizon: Horizon, epoch_tokens: float | None, step: int, tokens: int, seconds: float
) -> float:
    epochs = tokens / epoch_tokens if epoch_tokens else 0.0
    return horizon.progress(step, tokens, epochs, seconds)


def state_of(folder: Path, progress: float | None, age: float, seconds_per_step: float) -> str:
    """A Standing's state. The lock that a run holds on its folder says whether it goes on; where
    there is none, such as on another system, the age of the log does."""
    goes_on = is_locked(folder)
    if goes_on is None:
        unfinished = progress is None or progress < 1
        goes_on = unfinished and age < max(QUIET, 20 * seconds_per_step)
    if goes_on:
        return "running"
    if progress is None:
        return "over"
    return "finished" if progress >= 1 else "stopped"


def is_locked(folder: str | Path) -> bool | None:
    """Whether a process holds a run's lock (`barelm.resume.locked_folder`); None where that cannot
    be known."""
    try:
        import fcntl  # not on every system
    except ImportError:
        return None
    try:
        file = open(Path(folder) / ".lock", "rb")
    except OSError:
        return None
    with file:
        try:  # a shared lock, for this moment: a run that begins now waits longer for its own
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:  # there are no locks here
            return None
    return False


# --------------------------------------------------------------------------------------------------
# As a table


def csv_text(runs: Runs, names: list[str]) -> str:
    """All rows of these runs as comma-separated values, a head first: the run, its step, the
    seconds that its steps took by then, and every other key of the logs, in their order."""
    keys = {"step": None}
    tables = []
    for name in names:
        log = runs.log(name)
        rows, seconds = log.all_rows()
        keys |= log.keys
        tables.append((name, rows, seconds))
    others = [key for key in keys if key != "step"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "step", "seconds", *others])
    for name, rows, seconds in tables:
        for row, passed in zip(rows, seconds):
            values = ["" if row.get(key) is None else row[key] for key in others]
            writer.writerow([name, row["step"], round(passed, 3), *values])
    return text.getvalue()
