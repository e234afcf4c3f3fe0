"""The main job by the real commands, from text to a checkpoint that other programs open."""

import json
import math

import pytest
from conftest import run


def test_prepare_train_sample(tiny):
    meta = json.loads((tiny / "data" / "tiny" / "meta.json").read_text())
    assert 120 < meta["train"]["documents"] + meta["val"]["documents"] <= 150
    rows = [json.loads(r) for r in (tiny / "out" / "tiny" / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if "loss" in r]
    scores = [r["val_loss"] for r in rows if "val_loss" in r]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)  # it knew nothing
    assert scores[-1] < losses[0] - 0.8 and scores[-1] <= scores[0]
    said = run(tiny, "sample.py", "config/tiny.py", "--prompt=import os").stdout
    assert said.startswith("import os") and len(said) > 20


def test_transformers_opens_what_was_trained_and_continues_alike(tiny):
    transformers = pytest.importorskip("transformers")
    folder = tiny / "out" / "tiny"
    net = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tok("import os\n\n\ndef main(", return_tensors="pt")
    out = net.generate(**ids, max_new_tokens=12, do_sample=False)
    options = ["--max_new_tokens=12", "--temperature=0", "--prompt=import os\n\n\ndef main("]
    said = run(tiny, "sample.py", "config/tiny.py", *options).stdout
    assert said == tok.decode(out[0], skip_special_tokens=True) + "\n"
