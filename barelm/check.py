"""`bench.py --check`: does this machine compute right? Runs the checks, prints their table.

The checks run in a process of their own, which tells its findings a line of JSON each. Where it
dies of one (a kernel that this processor lacks, a GPU that gives up) or is never done, that check
has failed, and another process goes on with the rest.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from barelm import SCRIPTS, host
from barelm.check_attention import check_attention
from barelm.check_guided import check_guided
from barelm.check_kinds import check_kinds
from barelm.check_network import (
    check_compiled,
    check_float16,
    check_gradients,
    check_head,
    check_waiting,
)
from barelm.check_rows import Place, Skip
from barelm.check_runs import check_parts, check_processes, check_resume
from barelm.check_speed import check_speed
from barelm.check_tokens import (
    check_decode,
    check_invariance,
    check_quantized,
    check_server,
)
from barelm.run import duration, made_with
from barelm.timing import rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from subprocess import Popen
    from typing import TextIO

LIMIT = 600.0  # seconds from one finding to the next: a busy machine compiles for minutes


@dataclass
class Check:
    """One of `--only`'s names: its function, of a Place, and what it looks at."""

    function: object
    title: str
    in_float32: bool = False  # also in float32, where the machine's dtype is another
    apart: bool = False  # in a process of its own: it changes how torch computes


CHECKS = {
    "attention": Check(check_attention, "each mask, fast and plain, against float64", True),
    "kinds": Check(check_kinds, "every kind of attention and layer, against float64", True),
    "head": Check(check_head, "the head and its loss, against float64", True),
    "gradients": Check(check_gradients, "the eager network, against finite differences", True),
    "float16": Check(check_float16, "float16 and its scaler, against float32"),
    "waiting": Check(check_waiting, "no wait of the host within a step"),
    "decode": Check(check_decode, "generation, against the plain loop"),
    "server": Check(check_server, "a server's engine, against the plain loop"),
    "guided": Check(check_guided, "the masks of grammars, against every token tried"),
    "quantized": Check(check_quantized, "int8 and int4, against the weights they stand for"),
    "invariance": Check(
        check_invariance, "--deterministic: the same bits in any batch", in_float32=True, apart=True
    ),
    "resume": Check(check_resume, "train.py killed and resumed, against uninterrupted"),
    "processes": Check(check_processes, "train.py on two processes, against one"),
    "parts": Check(check_parts, "train.py, its network divided over two processes, against one"),
    "compiled": Check(check_compiled, "the compiled network, against the eager one"),
    "speed": Check(check_speed, "shares of what this machine can do"),
}

# --------------------------------------------------------------------------------------------------
# The process that checks


def work() -> None:
    """Read {"names", "place"} from standard input, run the checks, and write what they find to
    standard output. Whatever else is printed goes to standard error."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event):
        print(json.dumps(event), file=output, flush=True)

    order = json.load(sys.stdin)
    place = read_place(order["place"])
    if place.is_cuda:
        torch.cuda.set_device(place.device)
    for i, name in enumerate(order["names"]):
        check = CHECKS[name]
        if check.apart and i > 0:
            return  # another process goes on from here
        tell(begins=name)
        sound = run_check(check, place, tell)
        tell(ends=name)
        if check.apart or (place.is_cuda and not sound):  # a GPU that failed once fails for good
            return


def write_place(place: Place) -> dict:
    """A Place as JSON holds it."""
    return dict(vars(place), device=str(place.device), dtype=place.dtype_name)


def read_place(fields: dict) -> Place:
    """The Place that `write_place` wrote."""
    device = torch.device(fields["device"])
    return Place(**(fields | {"device": device, "dtype": getattr(torch, fields["dtype"])}))


def run_check(check: Check, place: Place, tell: Callable) -> bool:
    """Tell the rows of a check: whether it came to its end."""
    dtypes = [place.dtype]
    if check.in_float32 and place.dtype != torch.float32:
        dtypes.append(torch.float32)
    sound = True
    for dtype in dtypes:
        suffix = f", {str(dtype).removeprefix('torch.')}" if check.in_float32 else ""
        begun = time.perf_counter()
        row = {}
        try:
            for finding in check.function(replace(place, dtype=dtype)):
                row = asdict(finding) | {"name": finding.name + suffix, "verdict": finding.verdict}
                row["seconds"] = round(time.perf_counter() - begun, 2)
                tell(row=row)
                begun = time.perf_counter()
        except Skip as why:
            tell(row=failure(f"all{suffix}", "SKIP", str(why)))
        except (Exception, SystemExit) as error:  # of a script of ours: UserError
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            frame = traceback.extract_tb(error.__traceback__)[-1]
            words += f" ({Path(frame.filename).name}, line {frame.lineno})"
            behind = f"behind {row['name']}" if row else f"all{suffix}"
            tell(row=failure(behind, "FAIL", words))
            sound = False
    return sound


def failure(name: str, verdict: str, words: str) -> dict[str, str | None]:
    """A row without a figure."""
    return dict(name=name, figure=None, allowed=None, words=words, unit="", verdict=verdict)


# --------------------------------------------------------------------------------------------------
# The process that was called


def run_checks(names: list[str], place: Place, show: Callable,
               command: Sequence = (sys.executable, "-m", "barelm.check")) -> None:  # fmt: skip
    """Run the checks of these names; show(event) as each begins, has a row, or ends. The rows so
    far are kept by whoever shows them. command: what the checking process is started by."""
    left = list(names)
    while left:
        begun = None  # the check that is not done
        n_left = len(left)
        with checking_process(command, left, place) as (process, errors):  # type: ignore[arg-type]
            for event in events_of(process):
                show(event)
                begun = event.get("begins", begun)
                if "ends" in event:
                    left.remove(event["ends"])
                    begun = None
            words = how_it_ended(process, errors)
        if begun is None and len(left) < n_left:
            continue  # with what is left, in a new process
        if begun is None:  # it did not come to the first check
            begun = left[0]
            show({"begins": begun})
        show({"row": failure("ended", "FAIL", words)})
        show({"ends": begun})
        left.remove(begun)


@contextlib.contextmanager
def checking_process(
    command: tuple[str, str, str], names: list[str], place: Place
) -> Iterator[tuple[Popen, TextIO]]:
    """(its Popen, the file of its errors) of a process that is given its order; it ends with the
    block, and what it started with it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), *sys.path])}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,  # so that all it starts can be ended at once
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                json.dump({"names": names, "place": write_place(place)}, process.stdin)
                process.stdin.close()
            yield process, errors
        finally:
            host.end_group(process)


def events_of(process: Popen) -> Iterator[dict]:
    """The lines of a checking process, parsed, until it ends: by itself, or if none comes in
    LIMIT."""
    while True:
        timer = threading.Timer(LIMIT, host.end_group, [process])
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            process.wait()
            return
        with contextlib.suppress(ValueError):  # half a line, of a process that died
            yield json.loads(line)


def how_it_ended(process: Popen, errors: TextIO) -> str:
    """In words: the signal or exit status of a process, and the last line of its errors."""
    status = process.returncode
    ending = f"ended with exit status {status}"
    if status == host.KILLED:
        ending = f"was killed, by the system or since nothing came in {LIMIT:.0f} s"
    elif status < 0:
        ending = f"was ended by {host.signal_name(status)}"
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    return ": ".join([f"the checking process {ending}", *lines[-1:]])


# --------------------------------------------------------------------------------------------------
# The table


class Table:
    """The rows of all checks, kept and printed as they come."""

    def __init__(self) -> None:
        self.rows = []
        self.check = ""

    def show(self, event: dict) -> None:
        if "begins" in event:
            self.check = event["begins"]
            print(f"\n{self.check}: {CHECKS[self.check].title}", flush=True)
        elif "row" in event:
            row = {"check": self.check} | event["row"]
            print(in_a_line(row), flush=True)
            if row["figure"] is not None and not math.isfinite(row["figure"]):
                row |= {"figure": None, "words": f"not finite; {row['words']}"}  # JSON has no NaN
            self.rows.append(rounded(row))

    def count(self, verdict: str) -> int:
        return sum(row["verdict"] == verdict for row in self.rows)


def in_a_line(row: dict) -> str:
    """A row as it is printed: verdict, name, figure, what it may be, words."""
    figure = ""
    if row["figure"] is not None:
        figure = f"{row['figure']:.3g} {row['unit']}".strip()
    allowed = ""
    if row["allowed"] is not None:
        allowed = f"of {row['allowed']:.2g}"
    return (
        f"  {row['verdict']}  {row['name']:<46} {figure:>12} {allowed:<10} {row['words']}".rstrip()
    )


def check_machine(names: list[str], place: Place) -> tuple[list[dict], int]:
    """Run the checks of these names and print their table: (rows, exit status)."""
    table = Table()
    begun = time.monotonic()
    status = 0
    print("the largest error, or what a row names, and the most that it may be; speeds are told")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end what was started
    try:
        run_checks(names, place, table.show)
    except KeyboardInterrupt:
        print("\nstopped: what there is follows")
        status = 128 + signal.SIGINT
    for row in table.rows:
        if row["verdict"] == "FAIL":
            status = status or 1
    counts = [f"{table.count(verdict)} {verdict}" for verdict in ("PASS", "SKIP", "FAIL")]
    print(f"\n{', '.join(counts)}, in {duration(time.monotonic() - begun)}")
    for row in table.rows:
        if row["verdict"] == "FAIL":
            print(f"  FAIL  {row['check']}: {row['name']}")
    return table.rows, status


def versions(place: Place) -> dict:
    """What a bug report needs to know beside bench.py's record of the machine."""
    capability = torch.backends.cpu.get_cpu_capability()
    if place.is_cuda:
        capability = ".".join(map(str, torch.cuda.get_device_capability(place.device)))
    return made_with() | {"cuda": torch.version.cuda, "capability": capability}


if __name__ == "__main__":
    work()
