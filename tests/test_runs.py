"""barelm/runs.py: the runs beside a served one, their logs and how far they are, against the
files themselves."""

import json
import multiprocessing
import os

import pytest

from barelm.api import ApiError
from barelm.resume import locked_folder
from barelm.runs import LOG_ROWS, RunLog, Runs, csv_text, standing


def write(folder, rows, config=None, **entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        entries |= {"config": config, "parts": [{"step": 0}]}
        (folder / "run.json").write_text(json.dumps(entries))
    return folder


def steps(n, dt=0.5, first=1):
    return [{"step": i, "tokens": 64 * i, "loss": 9 / i, "dt": dt} for i in range(first, n + 1)]


def test_only_folders_beside_the_served_one_with_a_log_are_runs(tmp_path):
    out = tmp_path / "out"
    for name in ("a", "b", "served/best", "served"):
        write(out / name, steps(2))
    (out / "empty").mkdir()
    write(out / ".hidden", steps(2))
    elsewhere = write(tmp_path / "secret", steps(2))
    os.symlink(elsewhere, out / "link")
    (out / "c").mkdir()
    os.symlink(elsewhere / "log.jsonl", out / "c/log.jsonl")
    os.utime(out / "a/log.jsonl", (1, 1))
    runs = Runs(out / "served")
    assert runs.names() == ["served", "b", "a"]
    assert Runs(out / "served/best").names() == ["served", "b", "a"]
    assert Runs(out / "served", beside=False).names() == ["served"]
    assert set(Runs(out / "empty").names()) == {"b", "served", "a"}
    for name in (
        "link",
        "c",
        "empty",
        ".hidden",
        "..",
        "../secret",
        "a/../../secret",
        "served/best",
    ):
        with pytest.raises(ApiError, match="no such run"):
            runs.log(name)
    with pytest.raises(ApiError, match="no such run"):
        Runs(out / "served", beside=False).log("a")


def test_a_log_is_told_as_it_grows_and_when_a_resume_has_cut_it(tmp_path):
    path = write(tmp_path, steps(3)) / "log.jsonl"
    log = RunLog(path)
    whole = log.answer(-1)
    assert whole == {"rows": steps(3), "seconds": [0.5, 1.0, 1.5], "last": 3, "every": 1}
    with path.open("a") as file:
        file.write('{"step": 3, "val_loss": 2}\nno row\n{"step": 4, "loss": 2, "dt": 2}\n{"ste')
    rows = [{"step": 3, "val_loss": 2}, {"step": 4, "loss": 2, "dt": 2}]
    assert log.answer(2)["rows"] == [steps(3)[2], *rows]
    assert log.answer(2)["seconds"] == [1.5, 1.5, 3.5]
    assert log.answer(4) == {"rows": [], "seconds": [], "last": 4, "every": 1}

    # A resume from step 2 writes the file anew, to its rows up to there: no step counts twice.
    (tmp_path / "new").write_text("".join(json.dumps(r) + "\n" for r in steps(2)))
    os.replace(tmp_path / "new", path)
    with path.open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 1, "dt": 4}) + "\n")
    assert log.answer(-1)["seconds"] == [0.5, 1.0, 5.0]
    path.write_text('{"step": 1, "loss": NaN, "dt": NaN}\n')  # in the same file
    assert log.answer(0)["rows"] == [{"step": 1, "loss": None, "dt": None}]
    path.unlink()
    assert log.answer(-1) == {"rows": [], "seconds": [], "last": -1, "every": 1}


def test_what_is_no_row_is_passed_over(tmp_path):
    lines = [b"[]", b"7", b"\xff", b'{"step": 1.5}', b'{"step": true}', b'{"step": "1"}', b"{}"]
    lines += [b"[" * 10_000, b'{"step": 1' + b"0" * 40 + b"}", b'{"step": 1}\r{"step": 2}']
    (tmp_path / "log.jsonl").write_bytes(
        b"\n".join([*lines, b'{"step": 3, "loss": 1e999, "dt": 1e999}\r', b'{"step": 4'])
    )
    told = RunLog(tmp_path / "log.jsonl").answer(-1)
    rows = [{"step": 3, "loss": None, "dt": None}]  # a browser's JSON has no infinity
    assert told == {"rows": rows, "seconds": [0.0], "last": 3, "every": 1}


def test_a_long_log_is_thinned_and_its_seconds_are_those_of_all_rows(tmp_path):
    rows = steps(10_000, dt=0.25) + [{"step": 10_000, "val_loss": 2}]
    rows.insert(7, {"step": 7, "val_loss": 3})
    told = RunLog(write(tmp_path, rows) / "log.jsonl").answer(-1)
    assert told["last"] == 10_000 and len(told["rows"]) <= LOG_ROWS + 3
    assert [row for row in told["rows"] if "val_loss" in row] == [rows[7], rows[-1]]
    assert told["seconds"] == [0.25 * row["step"] for row in told["rows"]]
    training = [row["step"] for row in told["rows"] if "loss" in row]
    assert {b - a for a, b in zip(training[:-1], training[1:])} <= {
        1,
        told["every"] - 1,
        told["every"],
    }


def test_a_table_has_every_row_of_every_run(tmp_path):
    write(tmp_path / "a", [*steps(2), {"step": 2, "val_loss": 3.5}])
    write(tmp_path / "b, c", [{"step": 1, "loss": None, "reward": 1}])
    lines = csv_text(Runs(tmp_path / "a"), ["a", "b, c"]).splitlines()
    assert lines == [
        "run,step,seconds,tokens,loss,dt,val_loss,reward",
        "a,1,0.5,64,9.0,0.5,,",
        "a,2,1.0,128,4.5,0.5,,",
        "a,2,1.0,,,,3.5,",
        '"b, c",1,0.0,,,,,1',
    ]


@pytest.mark.parametrize(
    "config, entries, progress",
    [
        ({"max_steps": 40}, {}, 10 / 40),
        ({"max_steps": 40, "max_tokens": 1280}, {}, 640 / 1280),
        ({"max_epochs": 2.0}, {"horizon": {"epoch_tokens": 640}}, 1 / 2),
        ({"max_epochs": 3.0}, {"horizon": {"max_steps": 80}}, 10 / 80),
        ({"max_minutes": 5}, {}, 60 / 300),
        ({"max_epochs": 1.0, "max_steps": 90}, {}, None),  # it says not how many steps that is
        ({"max_steps": None}, {}, None),
        ({"max_steps": 10}, {}, 1),
    ],
)
def test_how_far_a_run_is_and_what_is_left(tmp_path, config, entries, progress):
    """Of ten steps, the last of which was written 60 s after the run began and 15 s ago."""
    folder = write(tmp_path, steps(10), config, **entries)
    os.utime(folder / "run.json", (1000, 1000))
    os.utime(folder / "log.jsonl", (1060, 1060))
    log = RunLog(folder / "log.jsonl")
    log.answer(-1)
    here = standing(folder, log, now=1075)
    assert (here.step, here.seconds, here.age) == (10, 5.0, 15)
    assert here.progress == progress
    assert here.state == ("finished" if progress == 1 else "running")  # without a lock, by its age
    left = None if progress in (None, 1) else 60 / progress - 60 - 15
    assert here.seconds_left == pytest.approx(left)
    long_after = standing(folder, log, now=1060 + 3600)
    known = {None: "over", 1: "finished"}.get(progress, "stopped")
    if "max_minutes" in config:  # its clock stands: whether it had run out is not known
        known = "over"
    assert long_after.state == known and long_after.seconds_left is None


def test_the_rate_is_that_of_the_part_that_runs(tmp_path):
    folder = write(tmp_path, steps(30), {"max_steps": 40})
    run = json.loads((folder / "run.json").read_text()) | {"parts": [{"step": 0}, {"step": 20}]}
    (folder / "run.json").write_text(json.dumps(run))
    os.utime(folder / "run.json", (1000, 1000))
    os.utime(folder / "log.jsonl", (1050, 1050))
    log = RunLog(folder / "log.jsonl")
    log.answer(-1)
    assert standing(folder, log, now=1050).seconds_left == pytest.approx(50)  # 10 steps in 50 s


def hold(folder, held, enough):
    with locked_folder(folder):
        held.set()
        enough.wait()


def test_a_lock_says_that_a_run_goes_on(tmp_path):
    pytest.importorskip("fcntl")
    folder = write(tmp_path, steps(10), {"max_steps": 40})
    os.utime(folder / "log.jsonl", (1, 1))  # however long it wrote nothing
    log = RunLog(folder / "log.jsonl")
    log.answer(-1)
    fork = multiprocessing.get_context("fork")
    held, enough = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(folder, held, enough))
    other.start()
    assert held.wait(60)
    assert standing(folder, log).state == "running"
    enough.set()
    other.join()
    assert standing(folder, log).state == "stopped"
