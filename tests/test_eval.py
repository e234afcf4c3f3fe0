"""eval.py as a user runs it; its figures against lm-evaluation-harness where that is installed, and
against what it said (fixtures/lm_eval.json) where it is not."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import eval as evaluation
import model
from barelm import checkpoint
from barelm.benchmarks import TASKS
from barelm.bpe import bpe_tokenizer, train_bpe
from barelm.checkpoint import save
from barelm.rows import read_rows, read_text
from barelm.run import Run, UserError
from barelm.scoring import Request, plain_scores, shared_scores
from barelm.tasks import Task

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
    rows[1]["answer"] = rows[7]["answer"] = "#### 95"
    return rows


TEXTS = [" ".join(WORDS * 9) + ".\n", "né à 東京 🙂", "it was warm"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model whose weights are a formula, which likes to write digits; and files of tasks."""
    folder = tmp_path_factory.mktemp("eval")
    tok = bpe_tokenizer(train_bpe({f" {w}".encode(): 9 - i % 4 for i, w in enumerate(WORDS)}, 60))
    shape = dict(n_ctx=192, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64, tie=False)
    net = model.GPT(model.GPTConfig(vocab_size=-(-tok.n_vocab // 64) * 64, **shape))
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            if p.ndim > 1:
                wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) ** 1.5 + k)
                p.copy_(wave.view(p.shape) * (0.8 if k else 0.3))
        net.lm_head.weight[tok.n_vocab :] = 0  # padding, which transformers would write
        for byte in b"0123456789# $":
            net.lm_head.weight[tok.encode(chr(byte))[0]] *= 1.5
    save(folder / "net", net, tok)
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
    same = {"regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"], "ignore_case": True}
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
        | dict(metric_list=[metric("exact_match")[0] | same])
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


def naive(net, context, continuation):
    """log p of one continuation: one row, no cache, no padding."""
    ids = torch.tensor([context + continuation])
    logp = net(ids).log_softmax(-1)[0]
    at = range(len(context) - 1, ids.shape[1] - 1)
    return sum(logp[i, ids[0, i + 1]].item() for i in at)


@torch.no_grad()
def test_shared_beginnings_and_contexts_change_no_score(small):
    net, tok = checkpoint.load(small / "net")
    beginning = tok.encode(" ".join(WORDS * 6))
    requests = []
    for i in range(6):
        context = beginning + tok.encode(" ".join(WORDS[i : 2 * i + 1]))
        choices = [tok.encode(" " + " ".join(WORDS[j : j * 2 + 1])) for j in range(1 + i % 4)]
        requests.append(Request("same", context, choices))
    alone = Request("", beginning, [tok.encode(" " + " ".join(WORDS))])  # longer than any choice
    for batch in (requests, requests[:1], requests[3:4], [alone, requests[3]]):
        expected = [[naive(net, c, cont) for cont in conts] for _, c, conts in batch]
        for score in (shared_scores, plain_scores):
            for ours, theirs in zip(score(net, batch), expected, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)


def test_loss_of_shards_is_the_one_that_training_logs(tiny):
    run(tiny, "eval.py", "config/tiny.py", "--model=out/tiny", "--out_dir=all")
    rows = [json.loads(line) for line in (tiny / "out/tiny/log.jsonl").open()]
    logged = [row for row in rows if "val_bpb" in row][-1]
    ours = results(tiny, "all")["loss"]
    assert ours["loss"] == pytest.approx(logged["val_loss"], abs=1e-5)
    assert ours["bits_per_byte"] == pytest.approx(logged["val_bpb"], abs=1e-5)
    assert ours["loss_stderr"] > 0 and ours["n"] > 1
    run(tiny, "eval.py", "config/tiny.py", "--out_dir=int8", "--quantize=int8")
    assert results(tiny, "int8")["loss"]["loss"] == pytest.approx(logged["val_loss"], rel=0.02)
    words = [f"--source={ROOT / 'model.py'}", "--dataset=words", "--tokenizer=word"]
    run(tiny, "prepare.py", *words)  # whose ids mean nothing to this model
    said = run(tiny, "eval.py", "--model=out/tiny", "--dataset=words", check=False)
    assert said.returncode == 1 and "have different tokenizers" in said.stderr


def test_processes_and_batches_change_no_result(small):
    common = ["--model=net", "--data=rows", "--tasks=mmlu,gsm8k,loss", "--shots=1", "--samples"]
    common += ["--max_new_tokens=5", "--micro_tokens=900", "--text=text.jsonl"]
    run(small, "eval.py", *common, "--out_dir=p1")
    run(small, "eval.py", *common, "--out_dir=p2", processes=2)
    for name in ("samples_mmlu.jsonl", "samples_gsm8k.jsonl", "samples_loss.jsonl"):
        assert (small / "p1" / name).read_bytes() == (small / "p2" / name).read_bytes()
    assert not [*(small / "p2").glob("answers_*")]
    run(small, "eval.py", *common, "--out_dir=plain", "--fast=false")
    ours, plain = results(small, "p1"), results(small, "plain")
    for task, metrics in {"mmlu": ["acc", "acc_norm"], "gsm8k": ["strict_match"]}.items():
        for metric in metrics:
            assert plain[task][metric] == ours[task][metric]


def test_equal_requests_are_answered_once(tmp_path):
    """Or else their answers would hang on which process comes last."""
    asked, run = [], Run(torch.device("cpu"))
    answers = evaluation.Answers(tmp_path, "model", run)
    rows = [Request("", [i], [[]]) for i in (5, 6, 5, 7)]
    work = lambda batch: [asked.append(r.context[0]) or len(asked) for r in batch]
    found = answers("task", "settings", rows, work, max_tokens=2)  # two at once
    assert asked == [5, 6, 7] and found == [1, 2, 1, 3]


def test_a_killed_run_continues(small):
    """What was answered before a kill is read, not computed: a planted answer comes through."""
    args = ["--model=net", "--data=rows", "--tasks=arc_easy", "--shots=0", "--out_dir=cut"]
    command = [sys.executable, "-u", str(ROOT / "eval.py"), *args, "--micro_tokens=1", "--samples"]
    with subprocess.Popen(command, cwd=small, stdout=subprocess.PIPE, text=True) as process:
        while "requests" not in process.stdout.readline():  # the first request is answered
            pass
        process.terminate()
    assert process.returncode == -15 and not (small / "cut/results.json").exists()
    kept = small / "cut/answers_0.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines() if line]
    assert rows
    rows[0][1] = [-1.25 for _ in rows[0][1]]
    kept.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"torn')
    out = run(small, *["eval.py", *args, "--micro_tokens=1", "--samples"]).stdout
    assert f"{len(rows)} of before" in out and not kept.exists()
    log = [json.loads(line) for line in (small / "cut/samples_arc_easy.jsonl").open()]
    assert sum(-1.25 in sample["logprobs"] for sample in log) == 1


OWN = {"kind": "generate", "prompt": "{question} answer:", "extract": "([0-9])", "stop": ["\n"]}


def test_tasks_of_your_own(small):
    rows = [row | {"subject": i % 2} for i, row in enumerate(rows_to_generate()[:4])]
    header = {"kind": "choice", "prompt": "{q}", "choices": ["yes", "no"], "answer": "a"}
    lines = [header, {"q": "is it warm?", "a": "yes"}, {"q": "is it?", "a": 1}]
    (small / "own.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (small / "own.py").write_text(
        "def lengths():\n"
        f"    return {OWN | {'rows': rows, 'shots': 1}!r} | {{'judge': judge}}\n"
        "def judge(row, texts):\n    return {'length': min(1, len(texts[0]) / 100), 'none': []}\n"
    )
    tasks = "--tasks=own.jsonl,own.py:lengths"
    run(small, "eval.py", "--model=net", tasks, "--out_dir=own", "--samples", "--max_new_tokens=9")
    found = results(small, "own")
    [choice, answer] = [found[name] for name in ("own.jsonl", "own.py:lengths")]
    assert choice["n"] == 2 and 0 <= choice["acc"] <= 1
    log = [json.loads(line) for line in (small / "own/samples_own.py_lengths.jsonl").open()]
    lengths = [len(sample["answers"][0]) / 100 for sample in log]
    assert answer["length"] == pytest.approx(sum(lengths) / 4)
    assert answer["by"]["1"]["length"] == pytest.approx((lengths[1] + lengths[3]) / 2)
    assert all(s["prompt"].count("answer:") == 2 for s in log)


def test_rows_come_from_the_hub_on_request(small, monkeypatch):
    """A local server in the Hub's place, which cuts the first answer short."""
    rows = [row | {"note": "x" * 30_000} for row in rows_of_choices()[:4]]
    body = "".join(json.dumps(r) + "\n" for r in rows).encode()
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append((self.path, self.headers.get("Range")))
            names = ["ARC-Easy/test-0.jsonl", "ARC-Challenge/test-0.jsonl", "README.md"]
            data = json.dumps({"siblings": [{"rfilename": n} for n in names]}).encode()
            if "resolve" in self.path:
                data = body
            begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            cut = "resolve" in self.path and not begin
            self.wfile.write(data[begin : 70_000 if cut else None])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("barelm.rows.HUB", f"http://127.0.0.1:{server.server_address[1]}/")
    args = ["--model=net", "--tasks=arc_easy", "--data=fetched", "--download", "--out_dir=hub"]
    run(small, "eval.py", *args)
    assert results(small, "hub")["arc_easy"]["n"] == 4
    assert asked[-1] == (
        "/datasets/allenai/ai2_arc/resolve/main/ARC-Easy/test-0.jsonl",
        "bytes=65536-",
    )
    assert (small / "fetched/arc_easy/ARC-Easy/test-0.jsonl").read_bytes() == body
    before = len(asked)
    run(small, "eval.py", *args[:-2], "--out_dir=hub")  # and none is made unasked
    server.shutdown()
    assert len(asked) == before


def test_a_classifier(tiny):
    rows = [{"text": f"def f(x{i}): return x", "label": "ab"[i % 3 == 0]} for i in range(12)]
    net, tok = checkpoint.load(tiny / "out/tiny")
    net.set_score(["a", "b"])
    save(tiny / "out/classes", net, tok)
    (tiny / "data/classes").mkdir()
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tiny / "data/classes/classify_val.jsonl").write_text(lines)
    run(
        tiny, "eval.py", "--model=out/classes", "--tasks=classify", "--dataset=classes", "--samples"
    )
    found = results(tiny, "out/classes")["classify"]
    log = [json.loads(x) for x in (tiny / "out/classes/samples_classify.jsonl").open()]
    guesses = [s["answer"] for s in log]
    with torch.no_grad():
        h = net.hidden(torch.tensor([tok.start + tok.encode(rows[0]["text"])]))[0, -1]
    assert log[0]["scores"] == pytest.approx(net.score(h).tolist(), abs=1e-4)
    right = sum(g == r["label"] for g, r in zip(guesses, rows))
    assert found["accuracy"] == pytest.approx(right / 12)
    f1 = []
    for label in "ab":
        hits = sum(g == r["label"] == label for g, r in zip(guesses, rows))
        f1.append(2 * hits / (guesses.count(label) + sum(r["label"] == label for r in rows)))
    assert found["f1"] == pytest.approx(sum(f1) / 2)
    said = run(tiny, "eval.py", "--model=out/classes", check=False)
    assert said.returncode == 1 and "--tasks=classify" in said.stderr


def test_one_more_task_of_choices_is_one_entry(small, monkeypatch):
    entry = Task(prompt="Question: {question_stem}\nAnswer:", hub="allenai/openbookqa/main")
    monkeypatch.setitem(TASKS, "openbookqa", entry)
    monkeypatch.setattr(evaluation, "data", str(small / "rows"))
    choices = {"text": ["a mat", "a hat", "a cat"], "label": ["A", "B", "C"]}
    row = {"question_stem": "what is warm", "choices": choices, "answerKey": "B"}
    (small / "rows/openbookqa_test.jsonl").write_text(json.dumps(row))
    net, tok = checkpoint.load(small / "net")
    task = evaluation.open_task("openbookqa", Run(torch.device("cpu")))
    [item], n_cut, n_solved = evaluation.make_items(task, net, tok)
    assert item.prompt == "Question: what is warm\nAnswer:" and (n_cut, n_solved) == (0, 0)
    assert item.question.answer_text() == "a hat"
    [request] = item.requests
    assert [tok.decode(ids) for ids in request.continuations] == [" a mat", " a hat", " a cat"]
    assert tok.decode(request.context) == item.prompt


REFUSALS = {
    "did you mean 'hellaswag'": ["--tasks=helaswag"],
    "no rows": ["--tasks=hellaswag", "--data=rows"],
    "3 shots": ["--tasks=mmlu", "--data=rows", "--shots=3"],
    "leave no room": ["--tasks=gsm8k", "--data=rows", "--shots=1"],
    "bad.jsonl:2: no JSON": ["--tasks=bad.jsonl"],
    "answer 7 is none of its 2 choices": ["--tasks=wrong.jsonl"],
    "the context is 192": ["--tasks=long.jsonl"],
    "colour": ["--tasks=header.jsonl"],
    "own2.py:nothing: no such file": ["--tasks=own2.py:nothing"],
    "none.txt: cannot be read": ["--text=none.txt"],
    "data/python: no validation shards": [],
    "greedy answers": ["--num_samples=3"],
    "limit=-1": ["--limit=-1"],
}


def test_refusals_are_one_line(small):
    (small / "bad.jsonl").write_text('{"a": 1}\n{oops\n')
    row = {"question": "q", "choices": ["a", "b"], "answer": 7}
    (small / "wrong.jsonl").write_text(json.dumps(row))
    row = {"question": "q", "choices": ["a", " ".join(WORDS * 20)], "answer": 0}
    (small / "long.jsonl").write_text(json.dumps(row))
    (small / "header.jsonl").write_text('{"kind": "choice", "colour": 1}\n{"question": 1}')
    for message, args in REFUSALS.items():
        said = run(small, "eval.py", "--model=net", "--out_dir=no", *args, check=False)
        assert said.returncode == 1 and message in said.stderr, (message, said.stderr, said.stdout)
        assert said.stderr.count("\n") == 1
    assert not (small / "no/results.json").exists()


if __name__ == "__main__":  # the child of `reference`; copy its file to FIXTURE to renew that
    found = json.dumps(harness(Path(sys.argv[1])), indent=1, default=float)
    (Path(sys.argv[1]) / "lm_eval.json").write_text(found + "\n")


def test_rows_and_texts_by_their_names_in_any_case(tmp_path):
    rows = [{"text": "é 1"}, {"text": "two"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name in ("a.JSONL", "b.ndjson.gz", "c.jsonlines", "d.Json"):
        data = json.dumps(rows).encode() if name == "d.Json" else b"\xef\xbb\xbf" + lines
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert read_rows(tmp_path / name) == rows
        if name != "d.Json":
            assert read_text(tmp_path / name) == ["é 1", "two"]
    (tmp_path / "e.txt").write_text("é\n", encoding="utf-16")
    assert read_text(tmp_path / "e.txt") == ["é\n"]
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(UserError, match="f.txt.gz: cannot be read: "):
        read_text(tmp_path / "f.txt.gz")
