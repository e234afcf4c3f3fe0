"""Data at scale: mixtures by weights, orders by chunks, shards that are elsewhere, prepare.py on
many machines. Where a figure is checked, it is against a loop that counts one by one."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT, run

from barelm import chunks, sources, stream
from barelm.chunks import ChunkedWindows
from barelm.mixture import PERIOD, MixedWindows, check_same_until, parse_mix
from barelm.run import UserError
from barelm.shards import Windows
from prepare import shard_header

MIX = "0:a=0.5,b=0.3,c=0.2;300:c=1,a=1"


def write_shard(path, tokens):
    """An llm.c shard of these tokens."""
    tokens = np.asarray(tokens, "<u2")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard_header(tokens.dtype, len(tokens)).tobytes() + tokens.tobytes())
    return path


@pytest.fixture
def shards(tmp_path):
    """Paths of three shards, of 700, 0 and 333 tokens, all different."""
    sizes = [700, 0, 333]
    tokens = np.arange(sum(sizes))
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    return [write_shard(tmp_path / f"s{i}.bin", part) for i, part in enumerate(parts)]


# --------------------------------------------------------------------------------------------------
# Mixtures


def mixed(shards, mix=MIX, seed=3):
    windows = {}
    for name, path, length in (("a", shards[0], 8), ("b", shards[2], 8), ("c", shards[0], 8)):
        windows[name] = Windows([path], length, seed)
    return MixedWindows(windows, parse_mix(mix), 10, seed), list(windows.values())


def test_a_mixture_takes_each_data_set_in_its_own_order_by_its_weights(shards):
    windows, parts = mixed(shards)
    change = 300 * 10  # windows
    counts = Counter()
    by_stage = [Counter(), Counter()]
    for position in range(change + 2 * PERIOD + 77):
        index = windows.at(position)
        number = int(np.searchsorted(windows.first_index, index, side="right")) - 1
        # The next of that data set's own sequence, whatever the stage.
        own = parts[number].at(counts[number])
        assert index == windows.first_index[number] + own
        if position % 10 == 0:
            assert (windows.rows([index])[0] == parts[number].window(own)).all()
        counts[number] += 1
        if position < change + 2 * PERIOD:
            by_stage[position >= change][number] += 1
    assert by_stage[0] == {0: 1500, 1: 900, 2: 600}
    assert by_stage[1] == {0: PERIOD, 2: PERIOD}


def test_a_mixture_depends_on_the_position_alone(shards):
    straight = mixed(shards)[0]
    positions = [straight.at(i) for i in range(5000)]
    for begin in (4999, 3001, 3000, 2999, 1, 0):  # another order of asking, as a resume asks
        assert mixed(shards)[0].at(begin) == positions[begin]
    assert mixed(shards)[0].n == sum(part.n for part in straight.parts)
    assert [mixed(shards, seed=4)[0].at(i) for i in range(50)] != positions[:50]
    rows = straight.rows(positions[2990:3010])  # of several data sets at once, over the change
    for i, row in zip(positions[2990:3010], rows):
        assert (row == straight.rows([i])[0]).all()


def test_a_resume_may_change_what_is_to_come_alone():
    check_same_until(3000, (MIX, 10), (MIX + ";900:b=1", 10))
    check_same_until(3000, (MIX, 10), (MIX.replace("300:", "500:"), 10))
    check_same_until(3001, (MIX, 10), (MIX.replace("300:", "150:"), 20))  # the same window
    with pytest.raises(UserError, match="until there keep its stages"):
        check_same_until(3001, (MIX, 10), (MIX.replace("300:", "500:"), 10))
    with pytest.raises(UserError, match="until there keep its stages"):
        check_same_until(3001, (MIX, 10), (MIX, 20))


@pytest.mark.parametrize(
    "mix, why",
    [
        ("a", "'a': expected NAME=WEIGHT"),
        ("0:a=1,a=2", "'a=2': expected NAME=WEIGHT"),
        ("0:a=-1", "expected NAME=WEIGHT"),
        ("0:a=nan", "expected NAME=WEIGHT"),
        ("0:a=0", "a weight above 0"),
        ("5:a=1", "expected 0, and then larger ones"),
        ("0:a=1;0:b=1", "expected 0, and then larger ones"),
    ],
)
def test_a_mixture_that_says_nothing_is_refused(mix, why):
    with pytest.raises(UserError, match=re.escape(why)):
        parse_mix(mix)


def test_addresses_may_stand_in_a_mixture():
    [stage] = parse_mix("hf://owner/name=3,https://host/x/meta.json?a=b=1")
    assert stage.weights == {"hf://owner/name": 0.75, "https://host/x/meta.json?a=b": 0.25}


# --------------------------------------------------------------------------------------------------
# Chunks


@pytest.mark.parametrize("stride", [0, 3])
@pytest.mark.parametrize("group", [1, 3, 1000])
def test_chunks_give_each_window_once_an_epoch_a_few_chunks_at_a_time(
    shards, monkeypatch, group, stride
):
    monkeypatch.setattr(chunks, "CHUNK", 40)
    plain = Windows(shards, 8, stride=stride)
    windows = ChunkedWindows(shards, 8, seed=5, stride=stride, group=group)
    n = plain.n
    assert windows.n == n and windows.counts.sum() == n
    epochs = [[windows.at(epoch * n + i) for i in range(n)] for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(n))
    assert epochs[0] != epochs[1] != epochs[2]
    assert (windows.rows(epochs[0]) == plain.rows(epochs[0])).all()
    # Whoever asks in another order gets the same.
    again = ChunkedWindows(shards, 8, seed=5, stride=stride, group=group)
    for position in (2 * n + 1, 5, n, n - 1, 0):
        assert again.at(position) == epochs[position // n][position % n]
    # A group's windows come before those of the next.
    chunk_of = np.searchsorted(windows.first_windows, epochs[0], side="right") - 1
    first_group = set(chunk_of[: windows.counts[chunk_of[0]]])
    assert len(first_group) <= group
    changes = np.count_nonzero(np.diff(chunk_of))
    if group == 1:
        assert changes == len(windows.counts) - 1
    else:
        assert changes > len(windows.counts)


# --------------------------------------------------------------------------------------------------
# Shards that are elsewhere


class Handler(BaseHTTPRequestHandler):
    """Files of a folder by HTTP, by ranges; `server.manners` {file's name: how it errs}."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.server.folder / self.path.lstrip("/")
        wanted = self.headers.get("Range")
        self.server.asked.append((path.name, wanted))
        manner = self.server.manners.get(path.name)
        is_first = self.server.asked.count((path.name, wanted)) == 1
        if not path.is_file():
            return self.answer(404, b"")
        if manner == "busy" and is_first:
            return self.answer(503, b"")
        body = path.read_bytes()
        size = len(body)
        if wanted and manner != "deaf":
            begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            body = body[begin : end + 1]
            self.answer(
                206, body, f"bytes {begin}-{begin + len(body) - 1}/{size}", manner, is_first
            )
        else:
            self.answer(200, body)

    def answer(self, status, body, content_range=None, manner=None, is_first=False):
        self.send_response(status)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if manner == "cut" and is_first:
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of tmp_path/served; pauses between tries are left out."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.folder = tmp_path / "served"
    httpd.asked = []
    httpd.manners = {}
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/"
    monkeypatch.setattr(stream.time, "sleep", lambda seconds: None)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def remote(server, cache, rank=0, world=1, group=2, limit=1e9, seq_len=8):
    """(ChunkedWindows of all shards that the server has, their cache)."""
    store = stream.ChunkCache(server.url, cache, limit, rank, world)
    names = sorted(path.name for path in server.folder.glob("*.bin"))
    opened = []
    for name in names:
        opened.append(stream.RemoteShard(store, name, *store.header(name), seq_len))
    return ChunkedWindows(names, seq_len, seed=1, shards=opened, group=group), store


@pytest.fixture
def served(server, shards, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 40)
    for path in shards:
        write_shard(server.folder / path.name, np.fromfile(path, "<u2", offset=1024))
    return server


@pytest.mark.parametrize("manner", [None, "busy", "cut"])
def test_windows_from_elsewhere_are_those_of_files_here(served, shards, tmp_path, manner):
    served.manners = dict.fromkeys(["s0.bin", "s2.bin"], manner)
    here = ChunkedWindows(shards, 8, seed=1, group=2)
    there, store = remote(served, tmp_path / "cache")
    indices = [here.at(i) for i in range(2 * here.n)]
    assert [there.at(i) for i in range(2 * here.n)] == indices
    for i in range(0, len(indices), 5):
        assert (there.rows(indices[i : i + 5]) == here.rows(indices[i : i + 5])).all()
    asked = Counter(served.asked)
    most = 1 if manner is None else 2
    assert max(asked.values()) == most  # a second epoch reads what is here
    # Validation: every token once, the last window of a shard a short one.
    partial = Windows(there.paths, 8, partial=True, shards=there.shards)
    plain = Windows(shards, 8, partial=True)
    assert (partial.rows(range(plain.n)) == plain.rows(range(plain.n))).all()
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_the_cache_keeps_to_its_limit_and_what_is_gone_is_fetched_again(served, shards, tmp_path):
    here = ChunkedWindows(shards, 8, seed=1, group=2)
    there, store = remote(served, tmp_path / "cache", limit=600, rank=1, world=1000)
    for i in range(here.n):
        index = here.at(i)
        assert there.at(i) == index
        assert (there.rows([index]) == here.rows([index])).all()
        store.make_room()
        files = (tmp_path / "cache").glob("*.bin.*-*")
        assert sum(path.stat().st_size for path in files) <= 600
    shutil.rmtree(tmp_path / "cache")  # another process may remove any of it at any time
    assert (there.rows([0, 50]) == here.rows([0, 50])).all()


def test_each_process_fetches_its_share_ahead_and_whatever_it_lacks(served, shards, tmp_path):
    """No process waits for another's file: here the second one never does its share."""
    there, store = remote(served, tmp_path / "cache", rank=0, world=2, group=4)
    there.at(0)  # which tells what comes
    group = [*there.chunks_of_group(0, 0), *there.chunks_of_group(0, 1)]
    wanted = there.remote_chunks(there.first_windows[group])
    limit = time.monotonic() + 60
    while not all(map(store.has, wanted[::2])):
        assert time.monotonic() < limit
        threading.Event().wait(0.01)
    assert not any(map(store.has, wanted[1::2]))
    here = ChunkedWindows(shards, 8, seed=1, group=4)
    indices = [here.at(i) for i in range(20)]
    assert (there.rows(indices) == here.rows(indices)).all()


def test_what_cannot_be_had_is_a_line(served, tmp_path):
    there, _ = remote(served, tmp_path / "cache")
    served.manners = {"s0.bin": "deaf"}
    with pytest.raises(UserError, match="s0.bin: its server sends no ranges"):
        there.rows([0])
    (served.folder / "s0.bin").unlink()
    with pytest.raises(UserError, match="s0.bin: HTTP 404"):
        there.rows([0])
    with pytest.raises(UserError, match="expected hf://owner/name"):
        stream.place_of("hf://owner")
    assert stream.place_of("hf://o/n@v1/a/b").endswith("/datasets/o/n/resolve/v1/a/b/")
    assert stream.place_of("https://h/x/meta.json") == "https://h/x/"


# --------------------------------------------------------------------------------------------------
# Training on it


def losses(folder, out):
    rows = map(json.loads, (folder / out / "log.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss", row.get("val_loss"))) for row in rows]


def test_a_streamed_mixture_trains_as_files_do_and_resumes_exactly(tiny, server, tmp_path):
    server.folder = tiny
    shutil.copytree(tiny / "data/tiny", tmp_path / "data/here")
    shutil.copytree(tiny / "data/tiny", tmp_path / "data/other")
    address = f"{server.url}data/tiny/meta.json"
    mix = "0:{0}=0.7,other=0.3;5:{0}=0.2,other=0.8"
    options = ["config/tiny.py", "--dataset=python", "--shuffle_chunks=256", "--sample_tokens=0"]
    options += ["--lr_schedule=constant", "--eval_every=7", "--save_every=7", "--eval_tokens=640"]
    here = f"--mix={mix.format('here')}"
    there = f"--mix={mix.format(address)}"
    run(tmp_path, "train.py", *options, here, "--max_steps=10", "--out_dir=here")
    said = run(tmp_path, "train.py", *options, there, "--max_steps=7", "--out_dir=there")
    assert f"val_loss.{address}" in said.stdout
    run(
        tmp_path, "train.py", *options, there, "--max_steps=10", "--out_dir=there",
        "--init_from=resume",
    )  # fmt: skip
    resumed = losses(tmp_path, "there")
    assert [row for row in resumed if row in losses(tmp_path, "here")] == losses(tmp_path, "here")
    for name in ("here", "there"):
        assert (tmp_path / name / "model.safetensors").exists()
    here_weights = (tmp_path / "here/model.safetensors").read_bytes()
    assert (tmp_path / "there/model.safetensors").read_bytes() == here_weights
    said = run(
        tmp_path, "train.py", *options, "--mix=0:here=1", "--max_steps=12", "--out_dir=here",
        "--init_from=resume", check=False,
    )  # fmt: skip
    assert said.returncode == 1 and "Traceback" not in said.stderr


# --------------------------------------------------------------------------------------------------
# Many machines


def start(cwd, *args):
    """prepare.py, in a fork of this process, of small units."""

    def child():
        os.chdir(cwd)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        sources.UNIT_BYTES = 2000
        sys.argv = [str(ROOT / "prepare.py"), *args]
        runpy.run_path(sys.argv[0], run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_parts_that_share_files_alone_make_the_same_bytes_though_one_is_killed(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "docs").mkdir()
    for i in range(24):
        words = rng.integers(0, 300, (40, 12))
        lines = [" ".join(f"w{word}" for word in row) for row in words]
        (tmp_path / "docs" / f"{i}.txt").write_text("\n".join(lines))
    args = ["--source=docs", "--vocab_size=300", "--threads=1", "--save_cleaned=jsonl"]
    args += ["--dataset=d", "--shard_tokens=9000"]
    whole = tmp_path / "whole"
    apart = tmp_path / "apart"
    for place in (whole, apart):
        place.mkdir()
        (place / "docs").symlink_to(tmp_path / "docs")
    alone = start(whole, *args)
    parts = [start(apart, *args, f"--part={k}/3") for k in (1, 3)]

    def children_end(processes, limit=120):
        for process in processes:
            process.join(limit)
            assert process.exitcode == 0

    victim = start(apart, *args, "--part=2/3")
    notes = apart / "data/d/work"
    limit = time.monotonic() + 60
    while victim.is_alive() and not list(notes.glob("part_2.plan")):
        assert time.monotonic() < limit
    victim.kill()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert all(part.is_alive() for part in parts)  # they wait
    children_end([start(apart, *args, "--part=2/3"), *parts, alone])
    late = start(apart, *args, "--part=2/3")  # it finds all done
    children_end([late])
    made = {path.name: path.read_bytes() for path in (apart / "data/d").glob("*.*")}
    del made["parts.json"]
    expected = {path.name: path.read_bytes() for path in (whole / "data/d").glob("*.*")}
    assert made == expected
    assert len([name for name in made if name.startswith("train_")]) > 1
