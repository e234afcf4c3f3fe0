"""Where the processes of one start meet, apart from those of an earlier start.

torchrun has one store of keys for all the times that it starts its processes, and each time they
put their addresses under the same keys: a process could call at the address of one that is gone.
Its count of restarts does not tell the starts apart, since each machine counts for itself
(pytorch/pytorch#135712).
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore

USUAL = timedelta(minutes=30)  # how long processes wait for each other, where nothing says it


def store_of_start(rank: int, world: int, timeout: timedelta | None = None) -> Any:
    """torchrun's store under a name of this start's own; None where there is no such store.

    The first process makes up the name. Each other one calls under its rank with a number that
    nobody had before, and takes what is answered to that number alone: of no earlier start."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    timeout = timeout or USUAL
    store = TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    if rank == 0:
        name = secrets.token_hex(8)
        answer_all(store, name, world, timeout)
    else:
        call = secrets.token_hex(8)
        store.set(f"barelm/call/{rank}", call)
        name = store.get(f"barelm/answer/{rank}/{call}").decode()  # waits for it
        store.set(f"barelm/took/{rank}/{name}", "")
    return PrefixStore(f"barelm/{name}", store)


def answer_all(store: Any, name: str, world: int, timeout: timedelta) -> None:
    """Answer every process's call with a name, until all have taken it."""
    give_up = time.monotonic() + timeout.total_seconds()
    answered = {}  # {rank: the call that was answered}; one of an earlier start may come first
    missing = list(range(1, world))
    while missing:
        for rank in missing:
            if not store.check([f"barelm/call/{rank}"]):
                continue
            call = store.get(f"barelm/call/{rank}").decode()
            if answered.get(rank) != call:
                store.set(f"barelm/answer/{rank}/{call}", name)
                answered[rank] = call
        missing = [r for r in missing if not store.check([f"barelm/took/{r}/{name}"])]
        if missing and time.monotonic() > give_up:
            raise RuntimeError(f"Timed out waiting for process {missing[0]} to start")
        time.sleep(0.005)
