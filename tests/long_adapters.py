"""What several adapters of one base cost beside one that is merged; not a part of the suite.

    python tests/long_adapters.py MODEL          # four random adapters of rank 8, in a folder here

Tokens a second of CPU time, which other processes change less than the clock's, in turn.
"""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import torch
from long_guided import answers
from test_many_adapters import make_adapter

from barelm.checkpoint import load
from barelm.engine import Engine
from barelm.jobs import Job, Sampling
from barelm.many_adapters import Adapters

ROWS = 4
LENGTH = 64
ROUNDS = 4


def rate(engine, tok, numbers):
    """Tokens a second of CPU time, of an answer by each of these adapters in one batch."""

    def jobs_of(listener):
        jobs = []
        for i, number in enumerate(numbers):
            ids = tok.encode("Once upon a time there was a machine that read")
            job = Job(tok, ids, LENGTH, Sampling(seed=i), listener, adapter=number)
            job.number = i
            jobs.append(job)
        return jobs

    begun = time.process_time()
    jobs, errors = answers(engine, jobs_of, len(numbers))
    seconds = time.process_time() - begun
    assert not any(errors.values())
    return sum(len(job.row.out.ids) for job in jobs) / seconds


def main():
    torch.set_num_threads(1)
    base = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as place:
        folders = {}
        for i in range(4):
            folder = Path(place) / f"adapter{i}"
            targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
            make_adapter(base, folder, i, lora_rank=8, lora_alpha=0.1, lora_targets=targets)
            folders[f"adapter{i}"] = str(folder)
        net, tok = load(base)
        adapters = Adapters(net, tok, folders, base)
        several = Engine(net, tok, max_batch=ROWS, max_len=128, adapters=adapters)
        merged_net, _ = load(folders["adapter0"])
        merged = Engine(merged_net, tok, max_batch=ROWS, max_len=128)
        ways = {
            "one adapter, merged": (merged, [0] * ROWS),
            "no adapter, four loaded": (several, [0] * ROWS),
            "one adapter, four loaded": (several, [1] * ROWS),
            "four adapters, a row each": (several, [1, 2, 3, 4]),
        }
        several.start()
        merged.start()
        rates = {way: [] for way in ways}
        for i in range(ROUNDS + 1):
            for way, (engine, numbers) in ways.items():
                value = rate(engine, tok, numbers)
                if i > 0:  # the first ones pack the weights
                    rates[way].append(value)
        for way, values in rates.items():
            print(f"{way}: {' '.join(f'{value:.1f}' for value in values)} tokens/s", flush=True)
        several.stop()
        merged.stop()


if __name__ == "__main__":
    main()
