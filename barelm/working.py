"""The working folder of a run of prepare.py, and the processes that work in it: locked while a run
lasts, left for the next run where this one is stopped."""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from barelm import host
from barelm.machines import Part
from barelm.run import Progress, UserError
from barelm.workers import WorkerKilled, Workers

if TYPE_CHECKING:
    from _io import BufferedRandom
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from barelm.run import Run

STOPPED = "stopped: the same command goes on from here"
DISK_IS_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class EmptySource(UserError):
    """The sources hold nothing of use: what was made of them is removed."""


def start_pool(n_workers: int) -> Workers | AbstractContextManager:
    """That many processes to work in, or none of them where one is enough."""
    return nullcontext() if n_workers == 1 else Workers(n_workers)


def wait(run: Run, things: Sequence = (), is_there: Callable = os.path.exists) -> Any:
    """Wait here until every rank has come. Parts that exchange files alone wait for these things,
    the i-th of which the part of rank i, modulo their number, makes."""
    if isinstance(run, Part):
        return run.wait_for(things, is_there)
    if run.world == 1:
        return
    try:
        dist.barrier()
    except RuntimeError:  # gloo's, when a rank has left
        raise UserError("another process has stopped: see what it says") from None


def for_each(function: Callable, items: Sequence, run: Run,
             pool_map: Callable, label: str,
             is_done: Callable) -> None:  # fmt: skip
    """Call the function, which returns the bytes that it did, with this rank's share of the items,
    on several processes. The ranks leave together: parts that exchange files alone, when is_done of
    every item."""
    share = items[run.rank :: run.world]
    show = Progress()
    begun = time.monotonic()
    n_bytes = 0
    # One item alone is worth no other process.
    call_all = pool_map if len(share) > 1 else map
    results = call_all(function, share)
    for n_done, size in enumerate(results, 1):
        n_bytes += size
        if run.is_main:
            megabytes = n_bytes / 1e6
            speed = megabytes / max(time.monotonic() - begun, 1e-9)
            state = f"{n_done} of {len(share)} parts, {megabytes:,.1f} MB, {speed:,.1f} MB/s"
            show(f"{label}: {state}", last=n_done == len(share))
    wait(run, items, is_done)


@contextmanager
def working_folder(folder: Path, run: Run) -> Iterator[Path]:
    """data/<dataset>/work, for this run alone. It stays where the run is stopped, so that the same
    command goes on from it; it is removed when all is done, or nothing can go on from it. What ends
    a run is told in one line."""
    work = folder / "work"
    fresh = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    is_part = isinstance(run, Part)
    locked = lock_folder(work, fresh, run) if run.is_main or is_part else nullcontext()
    with locked:
        wait(run)
        is_over = False  # is there nothing to go on from?
        try:
            yield work
            is_over = True
        except EmptySource:
            is_over = True
            raise
        except UserError as error:
            # A full disk, as whole_file says it; but other parts may be at work there.
            is_over = "cannot be written" in str(error) and not is_part
            raise
        except BrokenPipeError:  # standard output's: the script ends as `config` says
            raise
        except OSError as error:  # a full disk, a file that may not be read
            is_over = error.errno in DISK_IS_FULL and not is_part
            why = f"{error.filename or folder}: {error.strerror or error}"
            raise UserError(f"{why}; nothing was changed") from None
        except WorkerKilled:
            raise UserError(why_no_worker()) from None
        except KeyboardInterrupt:
            raise UserError(STOPPED) from None
        finally:
            # Without a finished unit there is nothing to go on from, but for other parts.
            has_nothing = not is_part and not any(work.glob("*.json"))
            if run.is_main and (is_over or has_nothing):
                if host.is_windows():  # which moves no folder that holds an open file
                    locked.close()
                remove(work)
                remove_empty(fresh)


def why_no_worker() -> str:
    """Why a working process is gone: Ctrl-C reaches those too, and may have ended them first."""
    try:
        time.sleep(0.5)
    except KeyboardInterrupt:
        return STOPPED
    why = "a process was killed, for want of memory perhaps: --threads=1 takes less"
    return f"{why}; the same command goes on from here"


def lock_folder(work: Path, fresh: list[Path], run: Run) -> BufferedRandom:
    """Make the working folder, and lock it as long as the file is open that is returned: to the end
    of the process, however it ends. Parts share this lock, and have one of their own each.
    `fresh` as in `remove_empty`."""
    is_part = isinstance(run, Part)
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = open(work / "lock", "a+b")
    except OSError as error:
        remove_empty(fresh)
        why = f"{error.filename or work}: {error.strerror or error}"
        raise UserError(f"{why}; nothing was changed") from None
    try:
        # Parts share this one, but on Windows, where each has its own alone.
        if not (is_part and host.is_windows()) and not host.lock(file, exclusive=not is_part):
            why = "another prepare.py is at work there: wait for it, or choose another --dataset"
            raise UserError(f"{work.parent}: {why}")
    except OSError as error:
        print(f"{work}: no lock here ({error}): see that no second prepare.py works there")
    if is_part:
        run.take_lock()
    if run.is_main:  # what a run left that was killed while it removed its working folder
        shutil.rmtree(gone_name(work), ignore_errors=True)
    return file


def gone_name(work: Path) -> Path:
    return work.with_name("work.gone")


def remove(work: Path) -> None:
    """Remove the working folder. Its files vouch for each other, so it loses its name first: when
    this is killed in between, the next run takes none of them for whole."""
    shutil.rmtree(gone_name(work), ignore_errors=True)
    with suppress(OSError):
        host.replace(work, gone_name(work))
    shutil.rmtree(gone_name(work), ignore_errors=True)


def remove_empty(fresh: list[Path]) -> None:
    """Remove those of the folders, which were not there before this run, that are empty."""
    for folder in fresh:
        with suppress(OSError):  # one that is not empty
            folder.rmdir()
