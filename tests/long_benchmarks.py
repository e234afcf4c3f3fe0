"""Benchmarks of a real model beside lm-evaluation-harness, and CORE beside a naive loop, on rows
that the tests have made. Minutes on a CPU; needs lm_eval.

    python tests/long_benchmarks.py path/to/a/hugging-face-folder
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
from benchmark_rows import FILES, core_rows_by_kind, harness_task, split_rows
from conftest import ROOT
from test_benchmarks import Naive, write_rows

from barelm.benchmarks import TASKS
from barelm.checkpoint import load
from barelm.core_tasks import CORE
from barelm.scores import metrics_of

MAX_NEW_TOKENS = 32


def ours(model, folder, *args):
    """(eval.py's results, its seconds)."""
    command = [sys.executable, str(ROOT / "eval.py"), f"--model={model}", f"--data={folder}/rows"]
    begun = time.monotonic()
    subprocess.run([*command, f"--out_dir={folder}/out", "--samples", *args], check=True)
    seconds = time.monotonic() - begun
    return json.loads((folder / "out/results.json").read_text())["results"], seconds


def samples(folder, name):
    return [json.loads(line) for line in (folder / f"out/samples_{name}.jsonl").open()]


def theirs(model, shots):
    """(lm_eval's results, its samples)."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    limit = {"max_gen_toks": MAX_NEW_TOKENS, "until": ["\n", ".", ","], "do_sample": False}
    tasks = []
    for name in FILES:
        more = {"generation_kwargs": limit} if name == "triviaqa" else {}
        tasks.append(harness_task(name, shots, **more))
    lm = HFLM(str(model), device="cpu", dtype="float32", batch_size=4)
    said = simple_evaluate(lm, tasks=tasks, bootstrap_iters=10, log_samples=True)
    return said["results"], said["samples"]


def compare(model, folder, shots):
    tasks = f"--tasks={','.join(FILES)}"
    our_results, seconds = ours(
        model, folder, tasks, f"--shots={shots}", f"--max_new_tokens={MAX_NEW_TOKENS}"
    )
    begun = time.monotonic()
    results, their_samples = theirs(model, shots)
    print(f"\n{shots} shots: eval.py {seconds:.0f} s, lm_eval {time.monotonic() - begun:.0f} s")
    for name in FILES:
        log = samples(folder, name)
        differences = []
        for sample, their_sample in zip(log, their_samples[name], strict=True):
            replies = [reply[0] for reply in their_sample["resps"]]
            if name == "triviaqa":
                differences.append(float(sample["answers"][0].strip() != replies[0].strip()))
            else:
                logprobs = sample.get("logprobs", [sample.get("logprob")])
                for logprob, reply in zip(logprobs, replies, strict=True):
                    differences.append(abs(logprob - reply[0]))
        what = "answers that differ" if name == "triviaqa" else "largest difference of log p"
        for metric in metrics_of(our_results[name]):
            keys = [key for key in results[name] if key.split(",")[0] == metric]
            value = our_results[name][metric]
            their_value = float(results[name][keys[0]])
            print(
                f"{name}.{metric}: eval.py {value:.6g}, lm_eval {their_value:.6g}; "
                f"{what} {max(differences):.2g}"
            )
            assert abs(value - their_value) <= 1e-4 * abs(their_value)


def compare_core(model, folder):
    rows = core_rows_by_kind()
    for task in CORE:
        write_rows(folder / f"rows/core/{task.file}", rows[task.kind])
    our_results, seconds = ours(model, folder, "--tasks=core")
    begun = time.monotonic()
    naive = Naive(*load(str(model)))
    for task in CORE:
        expected = naive.accuracy(task, rows[task.kind])
        value = our_results["core"]["by"][task.name]["accuracy"]
        print(f"core.{task.name}: eval.py {value:.6g}, naive loop {expected:.6g}")
        assert abs(value - expected) < 1e-9
    print(f"CORE: eval.py {seconds:.0f} s, naive loop {time.monotonic() - begun:.0f} s")


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/long_benchmarks.py path/to/a/hugging-face-folder")
    model = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in FILES:
            examples, questions = split_rows(task)
            write_rows(folder / f"rows/{task}_{TASKS[task].split}.jsonl", questions)
            write_rows(folder / f"rows/{task}_train.jsonl", examples)
        for shots in (0, 2):
            compare(model, folder, shots)
        compare_core(model, folder)


if __name__ == "__main__":
    main()
