"""Processes as on a cluster: one that is gone, restarts, folders, slow ones, weights that drift."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from barelm import cluster, watch
from barelm.mesh import Mesh, choose_sizes
from barelm.rendezvous import store_of_start
from barelm.run import Progress, Run, UserError, setup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks of a process with torch")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def told(text, call, *args):
    """Assert that a call raises a UserError with this text in it."""
    with pytest.raises(UserError, match=text):
        call(*args)


def process(rank, folder, port):
    """One of three: what they find goes into a file; the last one then kills itself."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    watch.GRACE = 0.5
    run = setup("cpu")
    watch.start_watch(run)
    run.mesh = Mesh(run, choose_sizes(3))

    # The folder that all see, and one of each; data of each.
    shared = folder / "shared"
    cluster.check_shared(run, shared, "a" * 64)
    if run.is_main:
        assert list(shared.iterdir()) == []
    cluster.LOOK = 0.0
    told("process 1, 2|process 1 .*, 2 ", cluster.check_shared, run, folder / str(rank), "a" * 64)
    told("the data of process 2", cluster.check_shared, run, shared, f"{rank // 2}" * 64)

    # A copy that drifts by the least that float32 shows.
    net = torch.nn.Linear(3, 4)
    torch.nn.init.ones_(net.weight)
    torch.nn.init.ones_(net.bias)
    cluster.check_copies(run, net, 1)
    if rank == 1:
        net.bias.data[2] = net.bias.data[2].nextafter(torch.tensor(2.0))
    told("step 2: the weights of process 1 .*, first in bias", cluster.check_copies, run, net, 2)

    # What the first process does alone, the others wait for.
    if run.is_main:
        time.sleep(0.3)
        (folder / "alone").touch()
    run.wait_for_main()
    assert (folder / "alone").exists()

    (folder / f"all-{rank}").touch()
    with watch.lost_process():
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # as in an exchange that never ends: the thread has to end this process


def test_three_processes(tmp_path):
    """Folders, copies and what one does alone are checked by all; one is killed while the others
    wait for ever, and they end."""
    for name in ("shared", "0", "1", "2"):
        (tmp_path / name).mkdir()
    fork = multiprocessing.get_context("fork")
    port = free_port()
    processes = [fork.Process(target=process, args=(rank, tmp_path, port)) for rank in range(3)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(50)
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    assert sorted(path.name for path in tmp_path.glob("all-*")) == ["all-0", "all-1", "all-2"]
    assert codes == [1, 1, -signal.SIGKILL]


@pytest.mark.parametrize("launch", ["none", "one"])
def test_a_launch_goes_on_with_its_own_run_alone(launch, tmp_path, monkeypatch):
    run = Run(torch.device("cpu"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    as_asked = ("scratch", True, "scratch")
    assert cluster.start_of_launch(run, tmp_path, "scratch", True) == as_asked
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    goes_on = ("auto", False, "scratch")
    if launch == "one":  # it had not begun: what is there may be an older run
        (tmp_path / "run.json").write_text(json.dumps({"launch": "another"}))
        assert cluster.start_of_launch(run, tmp_path, "scratch", True) == as_asked
        (tmp_path / "run.json").write_text(json.dumps({"launch": "one"}))
    assert cluster.start_of_launch(run, tmp_path, "scratch", True) == goes_on
    assert cluster.start_of_launch(run, tmp_path, "out/base", False) == ("auto", False, "out/base")
    assert cluster.start_of_launch(run, tmp_path, "resume", False)[0] == "resume"


def test_processes_of_one_start_meet_apart_from_an_earlier_one(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert store_of_start(0, 2) is None  # no torchrun: the store is this start's alone
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store.set("barelm/call/1", "of one that is gone")
    for _ in range(2):
        stores = {}
        meet = lambda rank, stores=stores: stores.update({rank: store_of_start(rank, 2)})
        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not stores[1].check(["address"])
        stores[0].set("address", "of a process")
        assert stores[1].get("address") == b"of a process"  # waits until the store has it


def test_the_slow_one_is_named(capsys):
    run = Run(torch.device("cpu"), 0, 4, Progress())
    run.mesh = SimpleNamespace(sizes=choose_sizes(4))
    times = cluster.StepTimes(run, torch.nn.Linear(1, 1))
    even = [0.1, 0.11, 0.1, 0.12]
    slow = [0.1, 0.11, 0.3, 0.12]
    figures = times.compare(slow)
    assert figures == {"alone_min": 0.1, "alone_median": 0.11, "alone_max": 0.3, "slowest": 2}
    for seconds in (even, slow, slow):
        times.compare(seconds)
    assert not capsys.readouterr().out  # not three in a row
    for seconds in (slow, slow, slow):
        times.compare(seconds)
    assert capsys.readouterr().out.count("process 2 is slow: 0.3 s") == 1
