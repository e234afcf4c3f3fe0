"""bench.py: its rows add up, its helpers are fair, its refusals are one line."""

import json

import pytest
from conftest import run

import bench

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=128", "--seq_len=16"]
TINY += ["--tokens=64", "--device=cpu", "--compile=false", "--seconds=0.01"]


def test_rows_agree_with_the_shapes(tmp_path):
    done = run(tmp_path, "bench.py", *TINY, "--dtype=float32", "--only=attention,head,loader")
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {part: [] for part in ("ceilings", "attention", "head", "loader")}
    for row in result["rows"]:  # another part would be a KeyError
        rows[row["part"]].append(row)
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"] and row["samples"] >= 3
    best = {row["name"]: row for row in rows["ceilings"]}
    assert set(best) == {"float32", "bfloat16", "read", "copy", "update"}
    assert best["float32"]["flops_per_s"] == pytest.approx(
        2e3 * 2048**3 / best["float32"]["ms"], 1e-4
    )
    assert best["copy"]["bytes_per_s"] == pytest.approx(8e3 * 2**27 / best["copy"]["ms"], 1e-4)

    names = ["naive", "fused, torch's choice", "fused, flash", "fused, math", "ours (model.attend)"]
    names += ["fused, n_kv_head 1", "ours, n_kv_head 1"]
    groups = {}
    for row in rows["attention"]:
        groups.setdefault((row["length"], row["direction"]), []).append(row["name"])
        products = 2 if row["direction"] == "forward" else 6  # q k^T and p v; four more back
        pairs = row["length"] ** 2 / 2  # a query sees half of the keys
        flops = row["rows"] * 2 * pairs * products * 2 * 16  # two heads of 16; multiply and add
        percent = 100 * flops / (row["ms"] / 1e3) / best["float32"]["flops_per_s"]
        assert row["percent"] == pytest.approx(percent, 1e-4) and row["ceiling"] == "float32"
        assert row["rows"] * row["length"] == row["tokens"] == 2048
    assert len(groups) == 6
    for group in groups.values():  # more where this machine has more kernels
        assert set(names) <= set(group)

    assert len(rows["head"]) == 2
    for row in rows["head"]:
        flops = 3 * 2 * 64 * 32 * 50304  # 64 rows of 32 against 50304: forward, and twice that back
        percent = 100 * flops / (row["ms"] / 1e3) / best["float32"]["flops_per_s"]
        assert row["percent"] == pytest.approx(percent, 1e-4) and row["peak_bytes"] >= 0
    [row] = rows["loader"]
    assert row["tokens_per_s"] == pytest.approx(64 / (row["ms"] / 1e3), 1e-4)
    assert "cudnn: left out: " in done.stdout  # what this device lacks is said
    assert done.stdout.count("cudnn: left out: ") == 1


def test_wrong_settings_are_refused(tmp_path):
    for flag, words in {
        "--only=foo": "ceilings, attention, model, head, loader, decode, tokenizer",
        "--nanogpt=nowhere": "no model.py there",
        "--optimizer=sgd": "muon or adamw",
        "--n_head=3": "n_head to divide it",
        "--tokens=0": "1 or more",
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
    times = bench.measure(calls, 0, clock=lambda: now[0])
    assert order == ["a", "b"] * 6  # once to warm up, then five rounds
    assert times == {"a": [0.5] * 5, "b": [0.25] * 5}
    times = bench.measure(calls, 6, clock=lambda: now[0])
    assert len(times["a"]) == 8  # eight rounds of 0.75 s fill six seconds
    calls = {"slow": lambda: call("slow", 10.0)}
    assert len(bench.measure(calls, 99, clock=lambda: now[0])["slow"]) == 3
    calls = {"quick": lambda: call("quick", 2**-12)}
    before = len(order)
    assert bench.measure(calls, 0, clock=lambda: now[0])["quick"] == [2**-12] * 5
    assert (len(order) - before - 1) / 5 == 9  # of 0.00024 s nine make 0.002 s


def test_a_row_holds_percentiles_and_rates(capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", [])
    monkeypatch.setattr(bench, "CEILINGS", {"float32": 4e9})
    times = [t / 1000 for t in range(11, 0, -1)]  # 11 to 1 ms
    bench.row("part", "name", times, "float32", 3 << 20, flops=6_000_000, tokens=12)
    [row] = bench.ROWS
    assert [row[k] for k in ("ms_p10", "ms", "ms_p90")] == pytest.approx([2, 6, 10])
    assert (row["flops_per_s"], row["tokens_per_s"]) == pytest.approx((1e9, 2000))
    assert row["percent"] == pytest.approx(25) and row["samples"] == 11
    printed = capsys.readouterr().out
    for words in ("6.000  2.000 to 10.000", "1.0 GFLOP/s", "25.0 % of float32", "2,000 tokens/s"):
        assert words in printed
    assert "peak 3 MiB" in printed


def test_what_fails_is_left_out_with_its_reason(capsys):
    def fails():
        raise RuntimeError("no kernel\nand more")

    good = lambda: None
    assert bench.working({"good": good, "bad": fails}) == {"good": good}
    assert capsys.readouterr().out == "  bad: left out: no kernel\n"
