"""Processes to work in: results in their order, what a call raises, and one that is killed."""

import os
import signal
import threading
import time
from multiprocessing.connection import wait

import pytest

from barelm.run import UserError
from barelm.workers import WorkerKilled, Workers

LARGE = 10_000_000  # bytes: more than a pipe holds


def last_first(number):
    """The number, the sooner the larger it is."""
    time.sleep(0.1 / (1 + number))
    return number


def refuse(number):
    if number == 3:
        raise UserError("three is no number")
    if number == 1:
        raise ValueError(threading.Lock())  # which cannot be pickled
    return number


def after(path):
    """Much, as soon as the file is there."""
    while path and not os.path.exists(path):
        time.sleep(0.001)
    return b"x" * LARGE


def killed(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_their_order():
    with Workers(3) as workers:
        assert list(workers.map(last_first, range(7))) == [*range(7)]
        assert len(workers.processes) == 3
        processes = [*workers.processes]
        assert (
            list(workers.map(last_first, range(2))) == [0, 1] and list(workers.map(abs, [])) == []
        )
        assert workers.processes == processes  # the same work again
    assert not any(process.is_alive() for process in processes)
    with Workers(9) as workers:
        assert list(workers.map(abs, [-1, -2])) == [1, 2] and len(workers.processes) == 2


def test_what_a_call_raises_is_raised_in_its_turn():
    with Workers(2) as workers:
        results = workers.map(refuse, [0, 2, 3, 5])
        assert [next(results), next(results)] == [0, 2]
        with pytest.raises(UserError, match="three is no number") as raised:
            next(results)
        assert "in refuse" in str(raised.value.__cause__)  # where it was raised
    with Workers(2) as workers, pytest.raises(RuntimeError, match="ValueError"):
        list(workers.map(refuse, [1, 1]))


@pytest.mark.parametrize("n_items", [1, 40])
def test_one_that_is_killed_is_an_error(n_items):
    with Workers(2) as workers, pytest.raises(WorkerKilled):
        list(workers.map(killed, range(n_items)))


def test_one_that_is_killed_in_the_middle_of_its_answer_is_an_error(tmp_path):
    """Nobody waits for the other half."""
    ready = tmp_path / "ready"
    with Workers(2) as workers:
        results = workers.map(after, ["", ready])
        assert len(next(results)) == LARGE
        ready.touch()
        wait(workers.busy)  # the answer has begun, and cannot end before it is read
        for process in workers.processes:
            process.kill()
        with pytest.raises(WorkerKilled):
            next(results)


def test_one_that_does_not_end_is_ended_with_the_block(tmp_path):
    with Workers(2) as workers, pytest.raises(KeyboardInterrupt):
        assert len(next(workers.map(after, ["", tmp_path / "never"]))) == LARGE
        raise KeyboardInterrupt
    assert not any(process.is_alive() for process in workers.processes)
