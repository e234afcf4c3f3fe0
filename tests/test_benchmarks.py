"""Benchmarks against lm-evaluation-harness, string by string and score by score (where it is not
installed against what it said: fixtures/benchmarks.json); CORE against a naive loop."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from benchmark_rows import FILES, ROWS, harness_task, split_rows
from conftest import ROOT, run

import model
from barelm import core_tasks
from barelm.benchmarks import TASKS
from barelm.bpe import bpe_tokenizer, train_bpe
from barelm.checkpoint import load, save
from barelm.core_tasks import CORE
from barelm.questions import (
    Item,
    judge_choice,
    judge_continuation,
    text_pairs,
    total_scores,
    with_shots,
)
from barelm.run import UserError
from barelm.scoring import Request, plain_scores, shared_scores
from barelm.tasks import checked_judgement, read_row

FIXTURE = ROOT / "tests/fixtures/benchmarks.json"
SHOTS = (0, 2)
# Answers to TriviaQA's questions as a model might give them.
TEXTS = [" Seven", " the pacific", "oxygen!", " Mars ", " water and ice", " leonardo da  vinci"]


def made_reply(i, j):
    """(log p, is greedy) of choice j of question i, as if a network had said so."""
    return -9 * random.Random(f"2 {i} {j}").random(), (i + j) % 3 == 0


# ------------------------------------------------------------------------ lm-evaluation-harness


def harness_says(name, shots):
    """(requests, scores) of lm_eval's task: of its documents [[context, continuation]], and what
    its metrics make of the replies above."""
    task = harness_task(name, shots)
    pairs = []
    values = {}
    for i, doc in enumerate(task.eval_docs):
        context = task.fewshot_context(doc, shots)
        instances = task.construct_requests(doc, context)
        instances = instances if isinstance(instances, list) else [instances]
        if task.OUTPUT_TYPE == "generate_until":
            pairs.append([[instances[0].args[0], ""]])
            instances[0].resps = [TEXTS[i % len(TEXTS)]]
            task._instances = instances
            task.apply_filters()
            replies = [instances[0].filtered_resps["remove_whitespace"]]
        else:
            pairs.append([list(instance.args) for instance in instances])
            replies = [made_reply(i, j) for j in range(len(instances))]
        for metric, value in task.process_results(doc, replies).items():
            values.setdefault(metric, []).append(value)
    scores = {}
    for metric, numbers in values.items():
        scores[metric] = float(task.aggregation()[metric](numbers))
    return {"requests": pairs, "scores": scores}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """What lm_eval says, in a process of its own (its threads would not survive a fork)."""
    if not importlib.util.find_spec("lm_eval"):
        return json.loads(FIXTURE.read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("harness") / "said.json"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(path)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    return json.loads(path.read_text(encoding="utf-8"))


def our_task(name, shots):
    examples, questions = split_rows(name)
    return replace(TASKS[name], name=name, shots=shots, rows=questions, examples=examples)


@pytest.mark.parametrize("shots", SHOTS)
@pytest.mark.parametrize("name", FILES)
def test_requests_and_scores_are_the_harness_s(name, shots, harness):
    task = our_task(name, shots)
    items = []
    judgements = []
    pairs = []
    for i, (row, before) in enumerate(with_shots(task, 0, 1234)):
        item = Item(row, before, read_row(task, row), [])
        items.append(item)
        if task.kind == "generate":
            pairs.append([[item.prompt, ""]])
            text = TEXTS[i % len(TEXTS)]
            judgements.append((checked_judgement(task, row, [text]), {}))
            continue
        pairs.append([list(pair) for pair in text_pairs(task, before, item.question)])
        replies = [made_reply(i, j) for j in range(len(pairs[-1]))]
        if task.kind == "continue":
            judgements.append(judge_continuation(replies[0]))
        else:
            logprobs = [logprob for logprob, _ in replies]
            judgements.append(judge_choice(task, item.question, logprobs))
    theirs = harness[f"{name}, {shots} shots"]
    assert pairs == theirs["requests"]
    ours = {metric: value for metric, (value, _) in total_scores(items, judgements).scores.items()}
    assert ours == pytest.approx(theirs["scores"], rel=1e-12)
    assert 0 < ours.get("acc", 0.5) < 1  # else nothing was told apart


def test_the_fixture_is_what_the_harness_says(harness):
    assert json.loads(FIXTURE.read_text(encoding="utf-8")) == harness


BAD_ROWS = {
    "hellaswag": {
        "activity_label": "a",
        "ctx_a": "a",
        "ctx_b": "b",
        "endings": ["a"],
        "label": "1",
    },
    "winogrande": {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 2},
    "boolq": {"passage": "p", "question": "q", "label": None},
    "copa": {"premise": "p.", "choice1": "", "choice2": "b", "question": "cause", "label": 0},
    "openbookqa": {"question_stem": "q", "choices": ["a"], "answerKey": "B"},
    "commonsense_qa": {"question": "q", "choices": {"text": ["a"]}, "answerKey": "A"},
    "lambada_openai": {"text": None},
    "triviaqa": {"question": "q", "answer": {"aliases": []}},
}


@pytest.mark.parametrize("name", FILES)
def test_bad_rows_are_a_line(name):
    task = replace(TASKS[name], name=name)
    for row in (BAD_ROWS[name], {}, dict.fromkeys(ROWS[name][0])):
        with pytest.raises(UserError, match=f"^{name}: .*in the row") as error:
            read_row(task, row)
        assert "\n" not in str(error.value)


TEXT_FIELDS = {"piqa": ["goal"], "boolq": ["passage", "question"], "triviaqa": ["question"]}


def test_what_is_no_text_is_not_asked_about():
    for name, keys in TEXT_FIELDS.items():
        for key in keys:
            row = ROWS[name][0]
            for value in (None, ["a"]):
                with pytest.raises(UserError, match=f"^{name}: '{key}' is no text, in the row"):
                    read_row(replace(TASKS[name], name=name), row | {key: value})
    row = {"question": "q", "answer": {"aliases": ["a", None]}}  # before hours of answers
    with pytest.raises(UserError, match="no list of aliases"):
        read_row(replace(TASKS["triviaqa"], name="triviaqa"), row)


# ------------------------------------------------------------------------------- a small network

WORDS = "the cat sat on a mat because it was warm and number answer question is of five".split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A network with random weights whose likeliest words vary, and made rows of all tasks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    tok = bpe_tokenizer(train_bpe({f" {w}".encode(): 9 - i % 4 for i, w in enumerate(WORDS)}, 60))
    shape = dict(n_ctx=256, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=64)
    torch.manual_seed(5)
    net = model.GPT(model.GPTConfig(vocab_size=-(-tok.n_vocab // 64) * 64, **shape))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    save(folder / "net", net, tok)
    for name in FILES:
        examples, questions = split_rows(name)
        write_rows(folder / f"rows/{name}_{TASKS[name].split}.jsonl", questions)
        write_rows(folder / f"rows/{name}_train.jsonl", examples or [])
    for task in CORE:
        write_rows(folder / f"rows/core/{task.file}", core_rows(task))
    return folder


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def naive_scores(net, context, continuation):
    """(log p, whether each token is the likeliest) of a continuation: one row, no cache."""
    logits = net(torch.tensor([context + continuation]))[0]
    logprob = 0.0
    is_greedy = True
    for i, token in enumerate(continuation):
        here = logits[len(context) + i - 1]
        logprob += here.log_softmax(-1)[token].item()
        is_greedy = is_greedy and here.argmax().item() == token
    return logprob, is_greedy


@torch.no_grad()
def test_greedy_scores_are_a_naive_loop_s(small):
    net, tok = load(small / "net")
    requests = []
    for i in range(6):
        context = tok.encode(" ".join(WORDS[: 3 + 2 * i]))
        likeliest = net(torch.tensor([context]))[0, -1].argmax().item()
        others = tok.encode(" " + " ".join(WORDS[i : i + 3]))
        requests.append(
            Request("", context, [[likeliest], others, [likeliest, *others]][: 1 + i % 3])
        )
    expected = [[naive_scores(net, r.context, ids) for ids in r.continuations] for r in requests]
    assert {is_greedy for row in expected for _, is_greedy in row} == {True, False}
    for score in (shared_scores, plain_scores):
        for ours, theirs in zip(score(net, requests, greedy=True), expected, strict=True):
            assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
            for (ours_logprob, _), (their_logprob, _) in zip(ours, theirs):
                assert ours_logprob == pytest.approx(their_logprob, abs=1e-4)


def test_beginnings_and_last_words_as_a_user_runs_them(small):
    """Winogrande's endings and LAMBADA's words, one row at a time without a cache."""
    tasks = "--tasks=winogrande,lambada_openai,triviaqa,piqa"
    args = ["--model=net", "--data=rows", "--shots=1", "--max_new_tokens=8", "--samples"]
    run(small, "eval.py", *args, tasks, "--out_dir=some")
    results = json.loads((small / "some/results.json").read_text())["results"]
    net, tok = load(small / "net")
    right = []
    task = our_task("winogrande", 1)
    for row, before in with_shots(task, 0, 1234):
        sums = []
        for option in (row["option1"], row["option2"]):
            beginning, _, ending = row["sentence"].partition("_")
            context = tok.encode(before + beginning + option)
            whole = tok.encode(f"{before}{beginning}{option} {ending.strip()}")
            sums.append(naive_scores(net, context, whole[len(context) :])[0])
        right.append(int(sums[1] > sums[0]) == int(row["answer"]) - 1)
    assert results["winogrande"]["acc"] == pytest.approx(sum(right) / len(right))
    assert "acc_norm" not in results["winogrande"] and "acc_norm" in results["piqa"]
    log = [json.loads(line) for line in (small / "some/samples_lambada_openai.jsonl").open()]
    nats = [-sample["logprob"] for sample in log]
    mean = torch.tensor(nats, dtype=torch.float64).mean()
    assert results["lambada_openai"]["perplexity"] == pytest.approx(mean.exp().item(), rel=1e-6)
    assert log[0]["prompt"].endswith("\n\nShe opened the door, and the dog ran out of the")


def test_a_continuation_of_your_own(small):
    """Behind a header's delimiter."""
    net, tok = load(small / "net")
    rows = [{"text": f"the {word} of", "word": other} for word in WORDS for other in WORDS[:3]]
    header = {"kind": "continue", "prompt": "{text}", "answer": "word", "delimiter": " "}
    write_rows(small / "own.jsonl", [header, *rows])
    run(small, "eval.py", "--model=net", "--tasks=own.jsonl", "--out_dir=own")
    entry = json.loads((small / "own/results.json").read_text())["results"]["own.jsonl"]
    scores = []
    for row in rows:
        context = tok.encode(row["text"])
        whole = tok.encode(f"{row['text']} {row['word']}")
        scores.append(naive_scores(net, context, whole[len(context) :]))
    assert entry["acc"] == pytest.approx(sum(is_greedy for _, is_greedy in scores) / len(rows))
    nats = -torch.tensor([logprob for logprob, _ in scores], dtype=torch.float64).mean()
    assert entry["perplexity"] == pytest.approx(nats.exp().item(), rel=1e-6)


# ------------------------------------------------------------------------------------------ CORE


def core_rows(task):
    """Thirteen rows of a task: more than any needs as examples."""
    draw = random.Random(task.file)
    rows = []
    for i in range(13):
        words = lambda n: " ".join(draw.choice(WORDS) for _ in range(n))
        if task.kind == "multiple_choice":
            choices = [words(1 + draw.randrange(3)) for _ in range(2 + i % 3)]
            if i == 4:  # the second begins with the first, which then has no token of its own
                choices[:2] = ["the cat", "the cat sat"]
            rows.append({"query": words(4) + "?", "choices": choices, "gold": i % 2})
        elif task.kind == "schema":
            contexts = [words(3), words(4)]
            rows.append({"context_options": contexts, "continuation": words(3), "gold": i % 2})
        else:
            rows.append({"context": words(5) + "  ", "continuation": words(1)})
    if task.name == "coqa":
        rows[3]["context"] = " ".join(WORDS * 20)  # longer than the network's context
    return rows


class Naive:
    """CORE as nanochat defines it (core_eval.py, base_eval.py): one row at a time, every prompt
    whole, the loss at each place of it."""

    def __init__(self, net, tok):
        self.net = net
        self.tok = tok

    def accuracy(self, task, rows):
        rows = list(rows)
        random.Random(1337).shuffle(rows)
        right = []
        for i in range(len(rows)):
            rng = random.Random(1234 + i)
            others = [k for k in range(len(rows)) if k != i]
            shots = [rows[k] for k in rng.sample(others, task.shots)] if task.shots else []
            right.append(self.is_right(task, rows[i], shots))
        return sum(right) / len(right)

    def is_right(self, task, row, shots):
        between = task.delimiter
        if task.kind == "multiple_choice":
            before = "".join(f"{s['query']}{between}{s['choices'][s['gold']]}\n\n" for s in shots)
            prompts = [f"{before}{row['query']}{between}{choice}" for choice in row["choices"]]
        elif task.kind == "schema":
            right = [(s["context_options"][s["gold"]], s["continuation"]) for s in shots]
            before = "".join(f"{context}{between}{ending}\n\n" for context, ending in right)
            prompts = [before + c + between + row["continuation"] for c in row["context_options"]]
        else:
            solved = [s["context"].strip() + between + s["continuation"] for s in shots]
            prompt = "\n\n".join([*solved, row["context"].strip() + between])
            prompts = [prompt.strip(), prompt + row["continuation"]]
        first = self.tok.start or [self.tok.eot_id]
        rows = [first + self.tok.encode(prompt) for prompt in prompts]
        if task.kind == "language_modeling":
            assert rows[1][: len(rows[0])] == rows[0]
            losses, hits = self.places(rows[1], len(rows[0]))
            return all(hits)
        shortest = min(map(len, rows))
        if task.kind == "schema":
            n_same = 0
            while n_same < shortest and len({ids[-1 - n_same] for ids in rows}) == 1:
                n_same += 1
            begins = [len(ids) - n_same for ids in rows]
        else:
            n_same = 0
            while n_same < shortest and len({ids[n_same] for ids in rows}) == 1:
                n_same += 1
            begins = [n_same] * len(rows)
        means = []
        for ids, begin in zip(rows, begins):
            losses, _ = self.places(ids, begin)
            means.append(torch.tensor(losses).mean().item())  # of nothing: NaN
        return means.index(min(means)) == row["gold"]

    @torch.no_grad()
    def places(self, ids, begin):
        """The losses of the tokens from `begin` on, and whether each is the likeliest one."""
        n_ctx = self.net.config.n_ctx
        if len(ids) > n_ctx:
            begin -= len(ids) - n_ctx
            ids = ids[-n_ctx:]
        logits = self.net(torch.tensor([ids]))[0]
        losses = torch.nn.functional.cross_entropy(
            logits[begin - 1 : -1], torch.tensor(ids[begin:], dtype=torch.int64), reduction="none"
        )
        hits = logits[begin - 1 : -1].argmax(-1) == torch.tensor(ids[begin:], dtype=torch.int64)
        return losses.tolist(), hits.tolist()


def test_core_is_the_naive_loop_s(small):
    out = run(
        small, "eval.py", "--model=net", "--data=rows", "--tasks=core", "--out_dir=all"
    ).stdout
    entry = json.loads((small / "all/results.json").read_text())["results"]["core"]
    naive = Naive(*load(small / "net"))
    values = []
    for task in CORE:
        accuracy = naive.accuracy(task, core_rows(task))
        assert entry["by"][task.name]["accuracy"] == pytest.approx(accuracy), task.name
        values.append((accuracy - task.baseline) / (1 - task.baseline))
        assert entry["by"][task.name]["centered"] == pytest.approx(values[-1])
        assert f"| {task.name}" in out
    assert entry["core_metric"] == pytest.approx(sum(values) / 22)
    assert "core.core_metric: " in out and "not the published CORE: 286 of 91,037 rows" in out
    assert "core.coqa: 1 of 13 prompts were cut" in out
    assert 0 < entry["by"]["squad"]["accuracy"] + entry["by"]["boolq"]["accuracy"] < 2


def test_a_task_of_core_alone_and_in_plain_mathematics(small):
    args = ["--model=net", "--data=rows", "--tasks=core.winograd,core.piqa", "--samples"]
    run(small, "eval.py", *args, "--out_dir=one", "--fast=false", "--shots=2", "--limit=9")
    results = json.loads((small / "one/results.json").read_text())["results"]
    naive = Naive(*load(small / "net"))
    for name in ("winograd", "piqa"):
        [task] = [replace(task, shots=2) for task in CORE if task.name == name]
        rows = core_rows(task)
        random.Random(1337).shuffle(rows)
        unshuffled = dict(zip(shuffled_places(9), rows[:9]))
        expected = naive.accuracy(task, [unshuffled[i] for i in range(9)])
        assert results[f"core.{name}"]["accuracy"] == pytest.approx(expected)
        assert results[f"core.{name}"]["n"] == 9
    assert len((small / "one/samples_core.piqa.jsonl").read_text().splitlines()) == 9


def shuffled_places(n):
    places = list(range(n))
    random.Random(1337).shuffle(places)
    return places


# The 22 accuracies that a run of nanochat printed, and what it made of them.
PRINTED = {
    "hellaswag_zeroshot": (0.304023, 0.072031), "jeopardy": (0.009920, 0.009920),
    "bigbench_qa_wikidata": (0.320407, 0.320407), "arc_easy": (0.510522, 0.347363),
    "arc_challenge": (0.258532, 0.011377), "copa": (0.6, 0.2),
    "commonsense_qa": (0.285012, 0.106265), "piqa": (0.620239, 0.240479),
    "openbook_qa": (0.296, 0.061333), "lambada_openai": (0.252086, 0.252086),
    "hellaswag": (0.304621, 0.072827), "winograd": (0.553114, 0.106227),
    "winogrande": (0.516180, 0.032360), "bigbench_dyck_languages": (0.143, 0.143),
    "agi_eval_lsat_ar": (0.269565, 0.086956), "bigbench_cs_algorithms": (0.368939, 0.368939),
    "bigbench_operators": (0.109524, 0.109524), "bigbench_repeat_copy_logic": (0, 0),
    "squad": (0.035478, 0.035478), "coqa": (0.078542, 0.078542), "boolq": (0.542813, -0.203123),
    "bigbench_language_identification": (0.252300, 0.177448),
}  # fmt: skip


def test_core_of_a_run_of_nanochat():
    """Its accuracies are whole numbers of rows, its centered ones ours, their mean its CORE."""
    assert [task.name for task in CORE] == list(PRINTED)
    scores = []
    for task in CORE:
        accuracy, centered = PRINTED[task.name]
        n_right = round(accuracy * task.n_rows)
        assert n_right / task.n_rows == pytest.approx(accuracy, abs=6e-7)
        scores.append(core_tasks.centered((accuracy, 0.01), task.baseline))
        assert scores[-1][0] == pytest.approx(centered, abs=2e-6)
    value, error = core_tasks.core_metric(scores)
    assert value == pytest.approx(0.119520, abs=1e-6) and 0 < error < 0.01


def test_the_bundle_is_fetched_checked_and_unpacked(small, tmp_path, monkeypatch):
    """From a server here; a file of other rows than the published ones is refused."""
    few = [replace(task, n_rows=13) for task in CORE]
    monkeypatch.setattr(core_tasks, "CORE", few)
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for path in (small / "rows/core").rglob("*.jsonl"):
            name = path.relative_to(small / "rows/core").as_posix()
            archive.writestr(f"eval_bundle/eval_data/{name}", path.read_bytes())
        archive.writestr("eval_bundle/core.yaml", "icl_tasks: []")
    data = (tmp_path / "bundle.zip").read_bytes()

    class Server(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(core_tasks, "BUNDLE", f"http://127.0.0.1:{server.server_address[1]}/b.zip")
    core_tasks.fetch_core("core", str(tmp_path / "data"))
    found = sorted(path.name for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert found == sorted({Path(task.file).name for task in CORE})
    opened = core_tasks.open_core("core", str(tmp_path / "data"), 0, None)
    assert len(opened) == 22 and not core_tasks.unlike_published(opened[:0])
    few[1] = replace(few[1], n_rows=14)
    with pytest.raises(UserError, match="jeopardy_all.jsonl has 13 rows, not 14"):
        core_tasks.fetch_core("core", str(tmp_path / "again"))
    data = data[:-400]
    (tmp_path / "again/core/eval_bundle.zip").unlink()
    with pytest.raises(UserError, match="eval_bundle.zip: cannot be unpacked"):
        core_tasks.fetch_core("core", str(tmp_path / "again"))
    server.shutdown()


def test_a_bundle_with_a_wrong_bit_is_a_line(tmp_path, monkeypatch):
    task = replace(CORE[5], n_rows=100)
    monkeypatch.setattr(core_tasks, "CORE", [task])
    monkeypatch.setattr(core_tasks, "download", lambda url, path: None)
    rows = "".join(json.dumps({"query": f"{i * 7919 % 1000} words"}) + "\n" for i in range(100))
    path = tmp_path / "core/eval_bundle.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"eval_bundle/eval_data/{task.file}", rows)
    whole = path.read_bytes()
    for place in range(120, len(whole) - 120, 40):
        torn = bytearray(whole)
        torn[place] ^= 8
        path.write_bytes(torn)
        with pytest.raises(UserError, match="eval_bundle.zip: "):
            core_tasks.fetch_core("core", str(tmp_path))


CORE_REFUSALS = {
    "no rows of 2 of 22 tasks (jeopardy, squad)": ["--tasks=core", "--data=fewer"],
    "core.square: expected core or one of its 22, such as core.squad": ["--tasks=core.square"],
    "core.jeopardy: 10 shots of the other rows, but it has 5": ["--tasks=core", "--limit=5"],
    "core.copa: gold 7 is none of its 2 choices, in the row": ["--tasks=core.copa", "--data=bad"],
    "core.winograd: 'continuation' is empty": ["--tasks=core.winograd", "--data=bad"],
    "core.coqa: no field 'continuation', in the row": ["--tasks=core.coqa", "--data=bad"],
    "core.piqa: no rows in": ["--tasks=core.piqa", "--data=bad"],
    "did you mean 'core'": ["--tasks=cor"],
}


def test_refusals_of_core_are_one_line(small):
    for task in CORE:
        if task.name not in ("jeopardy", "squad"):
            write_rows(small / f"fewer/core/{task.file}", core_rows(task))
    bad = {
        "commonsense_reasoning/copa": [{"query": "q", "choices": ["a", "b"], "gold": 7}],
        "language_understanding/winograd_wsc": [
            {"context_options": ["a", "b"], "continuation": " ", "gold": 0}
        ],
        "reading_comprehension/coqa": [{"context": "a"}],
        "commonsense_reasoning/piqa": [],
    }
    for file, rows in bad.items():
        write_rows(small / f"bad/core/{file}.jsonl", rows)
    for words, args in CORE_REFUSALS.items():
        args = args if "--data" in str(args) else [*args, "--data=rows"]
        done = run(small, "eval.py", "--model=net", "--out_dir=no", *args, check=False)
        assert done.returncode == 1 and words in done.stderr, (words, done.stderr)
        assert done.stderr.count("\n") == 1


if __name__ == "__main__":  # the child of `harness`; copy its file to FIXTURE to renew that
    said = {
        f"{name}, {shots} shots": harness_says(name, shots) for name in FILES for shots in SHOTS
    }
    text = json.dumps(said, ensure_ascii=False, indent=0)
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
