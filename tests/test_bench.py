"""bench.py: its rows add up, its helpers are fair, its refusals are one line."""

import json
import re
import signal
import threading
import time

import pytest
import requests
import torch
from conftest import LONGEST, run, start

import bench
import model
from barelm.bpe import bpe_tokenizer
from barelm.checkpoint import save
from barelm.clients import ask_alone
from barelm.run import Run
from barelm.timing import Bench, measure

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=128", "--seq_len=16"]
TINY += ["--tokens=64", "--device=cpu", "--compile=false", "--seconds=0.01"]


def test_rows_agree_with_the_shapes(tmp_path):
    done = run(tmp_path, "bench.py", *TINY, "--dtype=float32", "--only=attention,head")
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {part: [] for part in ("ceilings", "attention", "head")}
    for row in result["rows"]:  # another part would be a KeyError
        rows[row["part"]].append(row)
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"] and row["samples"] >= 3
    best = {row["name"]: row for row in rows["ceilings"]}
    assert set(best) == {"float32", "bfloat16", "read", "copy", "update"}
    size = best["float32"]["size"]  # of the largest product that this machine makes in a moment
    assert size in (128, 256, 512, 1024, 2048)
    flops_per_s = 2e3 * size**3 / best["float32"]["ms"]
    assert best["float32"]["flops_per_s"] == pytest.approx(flops_per_s, 1e-4)
    assert best["copy"]["bytes_per_s"] == pytest.approx(8e3 * 2**27 / best["copy"]["ms"], 1e-4)

    # A ceiling is the best that was seen, in the rows that were compared with it too.
    compared = [*rows["attention"], *rows["head"]]
    ceiling = 2e3 * size**3 / best["float32"]["ms_p10"]
    ceiling = max([ceiling, *(row["flops_per_s"] for row in compared)])
    assert max(row["percent"] for row in compared) <= 100.001

    names = ["naive", "fused, torch's choice", "fused, flash", "fused, math", "ours"]
    names += ["fused, n_kv_head 1", "ours, n_kv_head 1"]
    groups = {}
    for row in rows["attention"]:
        groups.setdefault((row["length"], row["direction"]), []).append(row["name"])
        products = 2 if row["direction"] == "forward" else 6  # q k^T and p v; four more back
        pairs = row["length"] ** 2 / 2  # a query sees half of the keys
        flops = row["rows"] * 2 * pairs * products * 2 * 16  # two heads of 16; multiply and add
        percent = 100 * flops / (row["ms"] / 1e3) / ceiling
        assert row["percent"] == pytest.approx(percent, 1e-4) and row["ceiling"] == "float32"
        assert row["rows"] * row["length"] == row["tokens"] == 2048
    assert len(groups) == 6
    for group in groups.values():  # more where this machine has more kernels
        assert set(names) <= set(group)

    assert len(rows["head"]) == 2
    for row in rows["head"]:
        flops = 3 * 2 * 64 * 32 * 50304  # 64 rows of 32 against 50304: forward, and twice that back
        percent = 100 * flops / (row["ms"] / 1e3) / ceiling
        assert row["percent"] == pytest.approx(percent, 1e-4) and row["peak_bytes"] >= 0
    assert "cudnn: left out: " in done.stdout  # what this device lacks is said
    assert done.stdout.count("cudnn: left out: ") == 1


def test_wrong_settings_are_refused(tmp_path):
    for flag, words in {
        "--only=foo": "ceilings, attention, model, head, decode, tokenizer",
        "--nanogpt=nowhere": "no model.py there",
        "--llama=nowhere": "no node_modules/node-llama-cpp/dist/index.js there",
        "--optimizer=sgd": "muon or adamw",
        "--n_head=3": "n_head to divide it",
        "--tokens=0": "1 or more",
        "--clients=1,0": "numbers of them",
    }.items():
        done = run(tmp_path, "bench.py", *TINY, flag, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_profile_writes_a_trace(tmp_path):
    done = run(tmp_path, "bench.py", *TINY, "--profile")
    events = json.loads((tmp_path / "bench_trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name == "Optimizer.step#Muon.step" for name in names) == 3
    assert "bench_trace.json" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == []


def test_calls_are_timed_in_turn():
    order, now = [], [0.0]

    def call(name, cost):
        order.append(name)
        now[0] += cost

    calls = {"a": lambda: call("a", 0.5), "b": lambda: call("b", 0.25)}
    times = measure(calls, 0, clock=lambda: now[0])
    assert order == ["a", "b"] * 6  # once to warm up, then five rounds
    assert times == {"a": [0.5] * 5, "b": [0.25] * 5}
    times = measure(calls, 6, clock=lambda: now[0])
    assert len(times["a"]) == 8  # eight rounds of 0.75 s fill six seconds
    calls = {"slow": lambda: call("slow", 10.0)}
    assert len(measure(calls, 99, clock=lambda: now[0])["slow"]) == 3
    calls = {"minute": lambda: call("minute", 60.0)}
    assert len(measure(calls, 99, clock=lambda: now[0])["minute"]) == 1
    calls = {"quick": lambda: call("quick", 2**-12)}
    before = len(order)
    assert measure(calls, 0, clock=lambda: now[0])["quick"] == [2**-12] * 5
    assert (len(order) - before - 1) / 5 == 9  # of 0.00024 s nine make 0.002 s


def test_a_row_holds_percentiles_and_rates(capsys):
    state = Bench(Run(torch.device("cpu")), ceilings={"float32": 4e9})
    times = [t / 1000 for t in range(11, 0, -1)]  # 11 to 1 ms
    state.row("part", "name", times, "float32", 3 << 20, flops=6_000_000, tokens=12)
    [row] = state.rows
    assert [row[k] for k in ("ms_p10", "ms", "ms_p90")] == pytest.approx([2, 6, 10])
    assert (row["flops_per_s"], row["tokens_per_s"]) == pytest.approx((1e9, 2000))
    assert row["percent"] == pytest.approx(25) and row["samples"] == 11
    printed = capsys.readouterr().out
    for words in ("6.000  2.000 to 10.000", "1.0 GFLOP/s", "25.0 % of float32", "2,000 tokens/s"):
        assert words in printed
    assert "peak 3 MiB" in printed
    state.row("part", "better", [1e-3] * 3, "float32", flops=6_000_000)
    assert state.ceilings["float32"] == pytest.approx(6e9)
    assert "1.50 of its ceiling, which it now is" in capsys.readouterr().out


def test_what_fails_is_left_out_with_its_reason(capsys):
    def fails():
        raise RuntimeError("no kernel\nand more")

    good = lambda: None
    state = Bench(Run(torch.device("cpu")))
    for _ in range(2):
        assert state.working({"good": good, "bad": fails}) == {"good": good}
    assert capsys.readouterr().out == "  bad: left out: no kernel\n"  # told once


def test_a_load_is_what_the_server_counts(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from test_serve import served

    config = model.GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=512, n_ctx=160)
    save(tmp_path / "out" / "tiny", model.GPT(config), bpe_tokenizer([]))
    with served(tmp_path) as site:
        begun = time.monotonic()
        done = run(tmp_path, "bench.py", "--device=cpu", f"--serve={site.url}/", "--clients=1,20")
        whole = time.monotonic() - begun  # with what warms up
        asked = site.metric('requests_total{path="/v1/completions",status="200"}')
        names = ("prompt_tokens_total", "generated_tokens_total", "first_token_seconds_count")
        prompts, made, firsts = map(site.metric, names)
        gaps, seconds = map(site.metric, ("between_tokens_seconds_count", "request_seconds_sum"))
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    printed = [line.split() for line in done.stdout.splitlines() if line.startswith("  serve.py")]
    assert [row["clients"] for row in rows] == [1, 20] and len(printed) == 2
    sent = sum(row["requests"] for row in rows)
    assert asked == firsts == sent + 2  # one warms up for each row
    assert made == sum(row["tokens"] for row in rows) + 2 * 64 == asked + gaps
    assert 32 <= (prompts - 2 * 32) / sent <= 96
    assert seconds < 1.1 * sum(row["clients"] * row["seconds"] for row in rows) + whole
    for row, line in zip(rows, printed):
        assert row["tokens"] == 64 * row["requests"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"], 1e-4)
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / rows[0]["tokens_per_s"], 1e-4)
        assert 0 < row["first_p50"] <= row["first_p95"] < 1e3 * row["seconds"]
        assert 0 < row["between_p50"] <= row["between_p95"] < 1e3 * row["seconds"]
        names = ("clients", "tokens_per_s", "ratio", "first_p50", "first_p95")
        names += ("between_p50", "between_p95")
        told = [float(cell.replace(",", "")) for cell in line[1:]]
        assert told == pytest.approx([row[name] for name in names], 1e-4, 0.006)


def test_transformers_is_timed_token_by_token():
    pytest.importorskip("transformers")
    config = model.GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=512, n_ctx=160)
    state = Bench(Run(torch.device("cpu")))
    hf, lock = bench.hugging_face(state, model.GPT(config)), threading.Lock()
    for prompt in ([5] * 32, [5] * 96):
        times, made = ask_alone(hf, lock, prompt)
        assert made == 64 and len(times) == 65 and times == sorted(times)
    assert not lock.locked()


def test_a_server_of_the_bench_ends_with_it(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    command = ["bench.py", *TINY, "--vocab_size=512", "--serve", "--clients=900"]
    with open(tmp_path / "err", "w+") as err, start(tmp_path, *command, stderr=err) as bench:
        lines = iter(bench.stdout.readline, "")
        url = next(m[1] for line in lines if (m := re.search(r"serving \S+ at (\S+)", line)))
        while "batch_size 16" not in requests.get(f"{url}/metrics").text:
            assert bench.poll() is None
        bench.send_signal(signal.SIGTERM)  # Ctrl-C's SIGINT goes the same way
        assert bench.wait(LONGEST) == 128 + signal.SIGTERM
        err.seek(0)
        assert err.read() == ""
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/metrics")


def test_servers_that_there_are_not(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    for where, words in {
        "out/nowhere": "no such folder",
        "http://127.0.0.1:9": "refused",
        "http://": "No host",
    }.items():
        done = run(tmp_path, "bench.py", *TINY, f"--serve={where}", check=False)
        assert done.returncode == 1 and '"rows"' not in done.stdout
        assert words in done.stderr and len(done.stderr.splitlines()) == 1
