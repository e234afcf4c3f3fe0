"""eval.py as a user runs it; its figures against lm-evaluation-harness where that is installed, and
against what it said (fixtures/lm_eval.json) where it is not."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import eval as evaluation
import model
import prepare

FIXTURE = ROOT / "tests" / "fixtures" / "lm_eval.json"
WORDS = "the cat sat on a mat because it was warm and number answer question is of five".split()


def rows_of_choices():
    """Questions with two to five choices, unicode, an empty choice, one longer than the model."""
    rows = []
    for i in range(24):
        pick = lambda k: " ".join(WORDS[(i * 7 + k * 5 + j * 3) % len(WORDS)] for j in range(1 + k))
        choices = [pick(k) for k in range(2 + i % 4)]
        rows.append({"question": pick(6) + "?", "choices": choices, "answer": i % len(choices)})
    rows[3]["choices"][0], rows[5]["choices"][1] = "", "né à 東京 🙂"
    rows[7]["question"] = " ".join(WORDS * 20)
    return rows


def rows_to_generate():
    rows = [{"question": " ".join(WORDS[i : i + 4]) + "?", "answer": "#### 7"} for i in range(8)]
    rows[2]["question"] = " ".join(WORDS * 20)
    return rows


TEXTS = [" ".join(WORDS * 9) + ".\n", "né à 東京 🙂", "it was warm"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model whose weights are a formula, which likes to write digits; and files of tasks."""
    folder = tmp_path_factory.mktemp("eval")
    tok = prepare.bpe_tokenizer(
        prepare.train_bpe({f" {w}".encode(): 9 - i % 4 for i, w in enumerate(WORDS)}, 60)
    )
    shape = dict(n_ctx=192, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64, tie=False)
    net = model.GPT(model.GPTConfig(vocab_size=-(-tok.n_vocab // 64) * 64, **shape))
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            if p.ndim > 1:
                wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) ** 1.5 + k)
                p.copy_(wave.view(p.shape) * (0.8 if k else 0.3))
        for byte in b"0123456789# $":
            net.lm_head.weight[tok.encode(chr(byte))[0]] *= 1.5
    model.save(folder / "net", net, tok)
    write = lambda name, rows: (folder / name).write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    (folder / "rows").mkdir()
    write("rows/mmlu_test.jsonl", [r | {"subject": "cats"} for r in rows_of_choices()])
    write("rows/mmlu_dev.jsonl", [r | {"subject": "cats"} for r in rows_of_choices()[1:3]])
    write("rows/arc_easy.jsonl", rows_of_choices())
    write("rows/gsm8k_test.jsonl", rows_to_generate())
    write("rows/gsm8k_train.jsonl", rows_to_generate()[3:7])
    write("text.jsonl", [{"text": t} for t in TEXTS])
    return folder


def harness(folder):
    """What lm_eval says of the same model and files: {task: {metric: value}, "logprobs": ...}."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    load = lambda name: {"dataset_path": "json", "test_split": "test", "dataset_kwargs": name}
    files = lambda **names: {"data_files": {k: str(folder / v) for k, v in names.items()}}
    metric = lambda *names: [{"metric": n, "higher_is_better": True} for n in names]
    letters = "{% for c in choices %}{{'\n' + 'ABCDE'[loop.index0] + '. ' + c}}{% endfor %}"
    about = "The following are multiple choice questions (with answers) about cats.\n\n"
    ignore = [",", r"\$", r"(?s).*#### ", r"\.$"]
    regex = lambda name, pattern, which: {
        "name": name,
        "filter": [
            {"function": "regex", "regex_pattern": pattern, "group_select": which},
            {"function": "take_first"},
        ],
    }
    tasks = [
        load(files(test="rows/arc_easy.jsonl"))
        | dict(task="arc_easy", output_type="multiple_choice", num_fewshot=0)
        | dict(doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{answer}}")
        | dict(doc_to_choice="{{choices}}", metric_list=metric("acc", "acc_norm")),
        load(files(test="rows/mmlu_test.jsonl", dev="rows/mmlu_dev.jsonl"))
        | dict(task="mmlu", output_type="multiple_choice", num_fewshot=2, description=about)
        | dict(fewshot_split="dev", fewshot_config={"sampler": "first_n"})
        | dict(doc_to_text="{{question.strip()}}" + letters + "\nAnswer:")
        | dict(doc_to_choice="{{['A','B','C','D','E'][:choices|length]}}")
        | dict(doc_to_target="{{answer}}", metric_list=metric("acc", "acc_norm")),
        load(files(test="rows/gsm8k_test.jsonl", train="rows/gsm8k_train.jsonl"))
        | dict(task="gsm8k", output_type="generate_until", num_fewshot=2, fewshot_split="train")
        | dict(doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{answer}}")
        | dict(generation_kwargs={"until": ["Question:"], "do_sample": False, "max_gen_toks": 24})
        | dict(metric_list=[metric("exact_match")[0] | {"regexes_to_ignore": ignore, "ignore_case": True}])
        | dict(filter_list=[
            regex("strict_match", r"#### (\-?[0-9\.\,]+)", 0),
            regex("flexible_match", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
        ]),
        load(files(test="text.jsonl"))
        | dict(task="loss", output_type="loglikelihood_rolling", doc_to_text="")
        | dict(doc_to_target="{{text}}")
        | dict(metric_list=metric("word_perplexity", "byte_perplexity", "bits_per_byte")),
    ]  # fmt: skip
    lm = HFLM(str(folder / "net"), device="cpu", dtype="float32", batch_size=4)
    how = dict(bootstrap_iters=10, log_samples=True, task_manager=TaskManager())
    said = simple_evaluate(lm, tasks=tasks, **how)
    clean = lambda d: {k.replace(",none", ""): v for k, v in d.items()}
    out = {name: clean(found) for name, found in said["results"].items()}
    texts = [s["resps"][0][0] for s in said["samples"]["gsm8k"]][: len(rows_to_generate())]
    sums = {
        name: [[r[0][0] for r in s["resps"]] for s in said["samples"][name]]
        for name in ("arc_easy", "mmlu")
    }
    return {"scores": out, "logprobs": sums, "texts": texts}


@pytest.fixture(scope="module")
def reference(small):
    """What `harness` says, in a process of its own (its threads would not survive a fork)."""
    if not importlib.util.find_spec("lm_eval"):
        return json.loads(FIXTURE.read_text())
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(small / "cache")}
    command = [sys.executable, __file__, str(small)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    return json.loads((small / "lm_eval.json").read_text())


def results(folder, out):
    found = json.loads((folder / out / "results.json").read_text())["results"]
    return found


def test_scores_are_the_harness_s(small, reference):
    """acc, acc_norm, exact matches and bits per byte; each log-likelihood to 1e-4, each answer."""
    common = ["--model=net", "--data=rows", "--samples", "--out_dir=one"]
    run(small, "eval.py", *common, "--tasks=arc_easy,loss", "--text=text.jsonl")
    run(small, "eval.py", *common, "--tasks=mmlu,gsm8k", "--shots=2", "--max_new_tokens=24")
    ours, theirs = results(small, "one"), reference["scores"]
    for task, metrics in {"arc_easy": ["acc", "acc_norm"], "mmlu": ["acc", "acc_norm"]}.items():
        for metric in metrics:
            assert ours[task][metric] == pytest.approx(theirs[task][metric], abs=1e-12)
            error = theirs[task][f"{metric}_stderr"]
            assert ours[task][f"{metric}_stderr"] == pytest.approx(error, abs=1e-12)
        log = [json.loads(x) for x in (small / f"one/samples_{task}.jsonl").open()]
        for sample, logprobs in zip(log, reference["logprobs"][task], strict=True):
            assert sample["logprobs"] == pytest.approx(logprobs, abs=1e-4)
    for name in ("strict_match", "flexible_match"):
        assert ours["gsm8k"][name] == float(theirs["gsm8k"][f"exact_match,{name}"])
    log = [json.loads(x) for x in (small / "one/samples_gsm8k.jsonl").open()]
    assert [s["answers"][0] for s in log] == reference["texts"]
    for metric in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        assert ours["loss"][metric] == pytest.approx(theirs["loss"][metric], rel=1e-6)


if __name__ == "__main__":  # the child of `reference`; copy its file to FIXTURE to renew that
    found = json.dumps(harness(Path(sys.argv[1])), indent=1, default=float)
    (Path(sys.argv[1]) / "lm_eval.json").write_text(found + "\n")
