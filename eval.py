"""How good: loss and bits per byte, multiple choice, generation, classes, a task of your own.

    python eval.py                                       # out/python on data/python's validation
    python eval.py --text=book.txt                       # bits per byte of any text, or JSONL
    python eval.py --tasks=mmlu,arc_easy --data=FOLDER --shots=0 --limit=100 --samples
    python eval.py --tasks=gsm8k,math --download         # rows from the Hub, kept in --data
    python eval.py --tasks=mine.jsonl,mine.py:function   # the README shows both
    python eval.py --model=out/classify --tasks=classify
    torchrun --nproc_per_node=8 eval.py --model=path/to/a/hugging-face-folder --tasks=mmlu

Tasks: loss; mmlu, arc_easy, arc_challenge, hellaswag (multiple choice); gsm8k, math, bbh
(generation); classify. Prompts, truncation and scores are lm-evaluation-harness's, so that numbers
compare. Writes results.json (and with --samples each prompt, answer and verdict) into out_dir. A
run that was stopped continues: what was answered is kept there until the end.
"""

from config import configure, settings

model = "out/python"  # a checkpoint folder
tasks = (
    "loss"  # of loss, mmlu, arc_easy, arc_challenge, hellaswag, gsm8k, math, bbh, classify, files
)
data = "data/eval"  # folder with the tasks' rows: TASK_test.jsonl, TASK_train.jsonl (shots) ...
download = False  # fetch the rows that data lacks from the Hub (HF_ENDPOINT names another)
out_dir: str | None = None  # where results.json is written; none: the model's folder
samples = False  # also write each prompt, answer and verdict, as JSONL
limit = 0  # rows of each task (of each subject), the first ones; 0: all
seed = 1234  # of the shots that are drawn (the harness's) and of sampled answers

# loss
dataset = "python"  # data/<dataset>, whose validation shards loss reads; classify: its task set
text: str | None = None  # loss of this text file, or of the field `text` of a JSONL, instead
seq_len = 0  # tokens of a window; 0: the model's context
eval_tokens = 131072  # tokens of the shards that are scored, as in train.py; 0: all

# multiple choice and generation
shots: int | None = None  # examples before a question; none: as many as are usual for the task
chat = False  # generation: the prompt as a user's turn of the model's chat template
max_new_tokens = 0  # of an answer; 0: the task's
num_samples = 1  # answers to each prompt, for pass@k
temperature = 0.0  # of the answers; 0 is greedy

# the machine
micro_tokens = 8192  # tokens at once on a device, at most, but one request at least
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16
quantize: str | None = None  # int8: weights of one byte

if __name__ == "__main__":
    configure(globals())

import copy
import difflib
import hashlib
import json
import math
import os
import platform
import random
import re
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import model as core
from model import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# --------------------------------------------------------------------------------------------------
# A task is a record: how to read a row, and how to judge an answer


@dataclass
class Task:
    """choice: read(row) -> (prompt, [choices], the right one's index), scored by log-likelihood.
    generate: read(row) -> (prompt, right answer); judge(row, [answers]) -> {metric: 0 to 1}."""

    kind: str  # choice or generate
    read: Callable
    hub: str = ""  # owner/name/folder of its rows on the Hub
    split: str = "test"  # which of its files has the questions
    shots: int = 0  # how many examples are usual
    first: bool = False  # they are the subject's first ones; or else drawn anew for each question
    describe: Callable = lambda row: ""  # what comes before them
    delimiter: str = " "  # between a prompt and its answer
    judge: Callable | None = None
    stop: list = field(default_factory=list)  # strings that end an answer
    max_new_tokens: int = 256
    name: str = ""
    rows: list = field(default_factory=list)
    examples: list = field(default_factory=list)  # the rows that shots are taken from


def choices_of(row):
    """(choices, right one's index) of a row with `choices` (a list, or ARC's text and label) or
    `options` (a list, or text with `A. ` before each line) and an `answer` (an index, a label, or
    the choice itself)."""
    given = row["choices"] if "choices" in row else row["options"]
    answer = next(row[k] for k in ("answer", "answerKey", "label", "gold") if k in row)
    labels, texts = LETTERS, given
    if isinstance(given, dict):
        labels, texts = given["label"], given["text"]
    elif isinstance(given, str):
        texts = [t.strip() for t in re.split(r"(?:^|\n)[A-Z][.)] ?", given)[1:]]
        answer = answer[0] if re.match(r"[A-Z]([.)]|$)", answer) else answer
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ValueError("expected a list of choices")
    if isinstance(answer, str):
        known = [list(labels[: len(texts)]), texts]
        known = known if labels is not LETTERS else known[::-1]
        answer = next((k.index(answer) for k in known if answer in k), answer)
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise ValueError(f"answer {answer!r} is none of its {len(texts)} choices")
    return texts, answer


def read_mmlu(row):
    """The question with its choices by letter; what is scored is the letter."""
    choices, right = choices_of(row)
    lines = "".join(f"\n{letter}. {c}" for letter, c in zip(LETTERS, choices))
    return f"{row['question'].strip()}{lines}\nAnswer:", list(LETTERS[: len(choices)]), right


def describe_mmlu(row):
    about = f" about {row['subject'].replace('_', ' ')}" if row.get("subject") else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def read_question(row):
    """A question whose choices are scored as they are, as in ARC."""
    return f"Question: {row['question']}\nAnswer:", *choices_of(row)


def read_hellaswag(row):
    def clean(text):  # WikiHow's headings are in brackets
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(query), [clean(e) for e in row["endings"]], int(row["label"])


def exact_match(text, answer, ignore=(), lower=False):
    """1.0 where the two are equal without what the patterns in `ignore` match."""
    for pattern in ignore:
        text, answer = re.sub(pattern, "", text), re.sub(pattern, "", answer)
    return float(text.lower() == answer.lower() if lower else text == answer)


def extract(pattern, text, which=0):
    """What the pattern (or the first of its groups that is not empty) matches in text, the first
    time or with which=-1 the last; [invalid] where it does not."""
    found = re.findall(pattern, text)
    if not found:
        return "[invalid]"
    parts = [found[which]] if isinstance(found[which], str) else [*filter(None, found[which])]
    return parts[0].strip() if parts else "[invalid]"


def judge_gsm8k(row, texts):
    ignore = [",", r"\$", r"(?s).*#### ", r"\.$"]
    strict = extract(r"#### (\-?[0-9\.\,]+)", texts[0])
    last = extract(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", texts[0], -1)
    match = lambda found: exact_match(found, row["answer"], ignore, lower=True)
    return {"strict_match": match(strict), "flexible_match": match(last)}


def boxed(text):
    r"""What the last \boxed{} (or \fbox{}) of a text holds, or None."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    body, depth = text[start:].partition("box")[2].removeprefix("ed"), 0
    if body[:1] == " ":
        return body[1:].partition("$")[0]
    for i, c in enumerate(body):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return body[1:i] if c == "}" else None
    return None


MATH_FORMS = [  # (what, becomes what), in this order
    (r"\n|\\!", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"), (r"\\left|\\right", ""),
    (r"\^\{\\circ\}|\^\\circ|\\\$", ""), (r"(?s)\\text\{ .*", ""), (r"\\%", ""),
    (r"(^|[ {])\.", r"\g<1>0."), (r"^[^=]{1,2}=([^=]*)$", r"\1"),
    (r"\\sqrt([^{])", r"\\sqrt{\1}"), (r" ", ""), (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{])\{", r"\\frac{\1}{"), (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}"),
]  # fmt: skip


def normal_math(text):
    """One spelling for the ways to write an answer (Hendrycks et al. 2021, their code's rules)."""
    for pattern, becomes in MATH_FORMS:
        text = re.sub(pattern, becomes, text.strip() if "=" in pattern else text)
    return text


def judge_math(row, texts):
    found = boxed(texts[0])
    if found is None:  # Minerva's prompt asks for this sentence
        found = extract(r"[Tt]he final answer is \$?(.*?)\$?\.(?:\s|$)", texts[0])
    right = boxed(row["solution"]) if "solution" in row else row["answer"]
    if right is None:
        raise ValueError("no \\boxed{} in its solution")
    return {"exact_match": exact_match(normal_math(found), normal_math(right))}


def judge_bbh(row, texts):
    found = extract(r"(?<=the answer is )(.*)(?=.)", texts[0])
    return {"exact_match": exact_match(found, row["target"])}


TASKS = {
    "mmlu": Task("choice", read_mmlu, "cais/mmlu/all", shots=5, first=True, describe=describe_mmlu),
    "arc_easy": Task("choice", read_question, "allenai/ai2_arc/ARC-Easy"),
    "arc_challenge": Task("choice", read_question, "allenai/ai2_arc/ARC-Challenge"),
    "hellaswag": Task("choice", read_hellaswag, "Rowan/hellaswag", "validation"),
    "gsm8k": Task(
        "generate",
        lambda row: (f"Question: {row['question']}\nAnswer:", row["answer"]),
        "openai/gsm8k/main",
        shots=5,
        judge=judge_gsm8k,
        stop=["Question:", "</s>", "<|im_end|>"],
    ),
    "math": Task(
        "generate",
        lambda row: (f"Problem:\n{row['problem']}\n\nSolution:", row["solution"]),
        "EleutherAI/hendrycks_math",
        shots=4,
        first=True,
        judge=judge_math,
        stop=["Problem:"],
        max_new_tokens=512,
    ),
    "bbh": Task(
        "generate",
        lambda row: (f"Q: {row['input']}\nA: Let's think step by step.\n", row["target"]),
        "SaylorTwift/bbh",
        shots=3,
        first=True,
        describe=lambda row: row.get("description", ""),
        delimiter="",
        judge=judge_bbh,
        stop=["</s>", "Q", "\n\n"],
        max_new_tokens=1024,
    ),
}

# --------------------------------------------------------------------------------------------------
# Rows: local files, the Hub, a task of your own


def read_rows(path):
    """The records of a JSONL, JSON or parquet file."""
    number = 0
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        elif path.suffix == ".json":
            rows = json.loads(path.read_bytes())
        else:
            rows = []
            for number, line in enumerate(path.read_bytes().splitlines(), 1):  # noqa: B007
                rows += [json.loads(line)] if line.strip() else []
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}:{number or 1}: no JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected an object on each line")
    return rows


def find_rows(name, split):
    """(questions, examples) of a task: from data/NAME.jsonl, data/NAME_*.jsonl, data/NAME/** (or
    .json, .parquet). What has train, dev or shots in its path are examples; of a path with test
    and one with validation the task's split are the questions."""
    found = {"test": [], "validation": [], "examples": []}
    kinds = dict.fromkeys(("train", "dev", "shots"), "examples")
    kinds |= dict.fromkeys(("validation", "valid", "val"), "validation")
    for path in sorted(Path(data).rglob("*")):
        inside = path.relative_to(data)
        mine = re.fullmatch(rf"{name}([_.-].*)?", inside.parts[0])
        if not mine or path.suffix not in (".jsonl", ".json", ".parquet"):
            continue
        words = re.split("[^a-z]+", inside.as_posix().lower())
        kind = next((kinds[word] for word in words if word in kinds), "test")
        topic = inside.parent.name if re.match("test|train|dev|shots", path.stem) else path.stem
        for row in read_rows(path):
            topics = row.get("type", "") if name == "math" else topic if name == "bbh" else ""
            found[kind].append({"subject": topics} | row)
    return found[split] or found["test"] or found["validation"], found["examples"]


def fetch(url, path):
    """Download url into path: resumed, retried, and there only when it is whole."""
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    part, show, trouble = path.with_name(path.name + ".part"), core.Progress(), "no answer"
    part.touch()
    for attempt in range(5):
        have = part.stat().st_size
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
                if answer.status_code == 416:  # more is here than there: begin again
                    os.truncate(part, 0)
                answer.raise_for_status()
                have = have if answer.status_code == 206 else 0
                size = have + int(answer.headers.get("Content-Length", -1 - have))
                with open(part, "ab" if have else "wb") as file:
                    for piece in answer.iter_content(1 << 16):
                        file.write(piece)
                        show(f"{path.name}: {file.tell() / 1e6:,.1f} of {size / 1e6:,.1f} MB")
            if size < 0 or part.stat().st_size == size:
                os.replace(part, path)
                return path
            trouble = f"{part.stat().st_size} of {size} bytes came"
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 500
            if 400 <= status < 500 and status not in (408, 416, 429):
                raise UserError(f"{error}: is the address right?") from None
            trouble = error
        time.sleep(min(2**attempt, 30))
    raise UserError(f"{url}: {trouble}: run it again to go on")


def fetch_rows(name, task):
    """Download the files of a task's folder on the Hub into data/NAME/."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    owner, repo, *below = task.hub.split("/")
    place, listing = Path(data) / name, Path(data) / name / "listing.txt"
    listing.unlink(missing_ok=True)
    fetch(f"{hub}/api/datasets/{owner}/{repo}", listing)
    paths = [f["rfilename"] for f in core.read_json(listing).get("siblings", [])]
    wanted = rf"{'/'.join(below)}.*(^|/)(test|dev|train|{task.split})[^/]*\.(jsonl|parquet)"
    paths = [path for path in paths if re.fullmatch(wanted, path)]
    if not paths:
        raise UserError(f"{name}: {hub}/datasets/{owner}/{repo} lists no JSONL or parquet for it")
    for path in paths:
        if not (place / path).exists():
            fetch(f"{hub}/datasets/{owner}/{repo}/resolve/main/{path}", place / path)


# What the header of a task of your own may say, and what it means when it does not.
HEADER = dict(kind="choice", prompt="Question: {question}\nAnswer:", choices=None, answer="answer")
HEADER |= dict(description="", delimiter=" ", shots=0, stop=["\n"], max_new_tokens=64)
HEADER |= dict(extract="", which=0, ignore=[], lower=False, judge=None)


def own_task(name, header, rows):
    """A task as its header describes it: prompt is a template with fields of a row in braces,
    choices (of kind choice) a list or the name of a field, answer a field's name; of an answer of
    kind generate the pattern `extract` is compared. `judge` can be given by Python only."""
    for key, value in header.items():
        like = HEADER.get(key, "no key of a header")
        if key not in HEADER or like is not None and type(value) is not type(like):
            expected = f"its keys, such as {HEADER}" if key not in HEADER else f"one like {like!r}"
            raise UserError(f"{name}: header: {key}={value!r}: expected {expected}")
    h = HEADER | header
    if h["kind"] not in ("choice", "generate"):
        raise UserError(f"{name}: header: kind={h['kind']!r}: expected choice or generate")
    try:
        [re.compile(pattern) for pattern in (h["extract"], *h["ignore"])]
    except (re.error, TypeError) as error:
        raise UserError(f"{name}: header: extract, ignore: no pattern: {error}") from None

    def read(row):
        prompt = re.sub(r"\{(\w+)\}", lambda m: str(row[m[1]]), h["prompt"])
        if h["kind"] == "generate":
            return prompt, str(row.get(h["answer"], ""))
        if h["choices"] is None:
            return prompt, *choices_of(row)
        choices = row[h["choices"]] if isinstance(h["choices"], str) else h["choices"]
        return prompt, *choices_of({"choices": choices, "answer": row[h["answer"]]})

    def judge(row, texts):
        found = extract(h["extract"], texts[0], h["which"]) if h["extract"] else texts[0].strip()
        return {"exact_match": exact_match(found, str(row[h["answer"]]), h["ignore"], h["lower"])}

    same = {key: h[key] for key in ("kind", "delimiter", "shots", "stop", "max_new_tokens")}
    describe = lambda row: h["description"]
    return Task(read=read, judge=h["judge"] or judge, describe=describe, rows=rows, **same)


def open_task(name, run):
    """The task of this name, JSONL file or FILE.py:function, with its rows."""
    file, _, function = name.rpartition(":")
    if name.endswith(".jsonl"):
        rows = read_rows(Path(name))
        header = rows.pop(0) if rows and "kind" in rows[0] else {}
        task = own_task(name, header, rows)
    elif file.endswith(".py"):
        if not os.path.isfile(file) or not callable(make := runpy.run_path(file).get(function)):
            raise UserError(f"--tasks={name}: no such file, or no function {function!r} in it")
        header = dict(make())
        task = own_task(name, header, header.pop("rows"))
    elif name in TASKS:
        task = replace(TASKS[name])
        if download and run.main:
            fetch_rows(name, task)
        agree(run)
        task.rows, task.examples = find_rows(name, task.split)
    else:
        near = difflib.get_close_matches(name, [*TASKS, "loss", "classify"], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are loss, {', '.join(TASKS)}"
        raise UserError(f"--tasks={name}: unknown ({hint}); or FILE.jsonl, FILE.py:function")
    if not task.rows:
        raise UserError(f"{name}: no rows: {data}/{name}*.jsonl has them, or --download gets them")
    task.name, task.shots = name, task.shots if shots is None else shots
    return task


# --------------------------------------------------------------------------------------------------
# Requests: rows become token ids


def read_row(task, row):
    """What task.read makes of a row; a row that is none is refused in a line."""
    try:
        return task.read(row)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"no field {error}" if isinstance(error, KeyError) else str(error)
        shown = json.dumps(row, ensure_ascii=False, default=str)[:100]
        raise UserError(f"{task.name}: {why}, in the row {shown}") from None


def limited(rows):
    """The first `limit` rows of each subject."""
    seen = Counter()
    for row in rows:
        seen[row.get("subject")] += 1
        if not limit or seen[row.get("subject")] <= limit:
            yield row


def with_shots(task):
    """[(row, what comes before its prompt)]: the description and solved examples, of the harness's
    draw with `seed`."""
    rng, n = random.Random(seed), task.shots
    for row in limited(task.rows):
        pool = task.examples
        if task.first:
            pool = [e for e in pool if e.get("subject") == row.get("subject")][:n]
        if n > len(pool) and (task.hub or n + 1 > len(task.rows)):
            where = f"{data}/{task.name}*train*.jsonl" if task.hub else task.name
            raise UserError(f"{task.name}: {n} shots, but {where} has {len(pool)}: set --shots")
        if not task.hub:  # from its own rows, and never the one that is asked
            pool = [e for e in rng.sample(task.rows, n + 1) if e != row][:n] if n else []
        elif not task.first:
            pool = rng.sample(pool, n)
        before = task.describe(row)
        for example in pool:
            prompt, *answer = read_row(task, example)
            answer = answer[0][answer[1]] if task.kind == "choice" else answer[0]
            before += f"{prompt}{task.delimiter}{answer}\n\n"
        yield row, before


def encode_pair(tok, context, continuation):
    """(ids of the context, ids of the continuation), encoded jointly, the white space at the end
    of the context with what follows it, as in the harness."""
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:
        return [tok.eot_id], tok.encode(continuation)
    ids = tok.start + tok.encode(context)
    return ids, (tok.start + tok.encode(context + continuation))[len(ids) :]


def fit_pair(context, continuation, n_ctx):
    """The pair, its context cut from the left so that every token that is scored has a place."""
    if not continuation:
        raise ValueError("a choice that adds no token to its prompt cannot be scored")
    if len(continuation) > n_ctx or context == [None]:
        raise ValueError(f"a choice of {len(continuation)} tokens: the context is {n_ctx}")
    return context[-(n_ctx + 1 - len(continuation)) :], continuation


def choice_requests(task, net, tok):
    """[(row, prompt, choices, right, its requests)]; a request is (shared, context, [choices]): its
    choices are scored together. shared: what questions with the same beginning have in common."""
    cut, questions = 0, []
    for row, before in with_shots(task):
        prompt, choices, right = read_row(task, row)
        try:
            pairs = [encode_pair(tok, before + prompt, task.delimiter + c) for c in choices]
            whole, n_ctx = pairs[0][0], net.config.n_ctx
            pairs = [fit_pair(*pair, n_ctx) for pair in pairs]
        except ValueError as error:
            raise UserError(f"{task.name}: {error}: {prompt[:80]!r}") from None
        contexts = [context for context, _ in pairs]
        cut += min(map(len, contexts)) < len(whole)
        shared = before if task.first else ""
        if all(c == contexts[0] for c in contexts):
            asked = [(shared, contexts[0], [c for _, c in pairs])]
        else:
            asked = [(shared, context, [c]) for context, c in pairs]
        questions.append((row, before + prompt, choices, right, asked))
    return questions, cut


def prompt_requests(task, net, tok):
    """([(row, prompt, None, right answer, its one request)], how many were cut from the left)."""
    room, questions, cut = net.config.n_ctx - (max_new_tokens or task.max_new_tokens), [], 0
    if room < 1:
        raise UserError(
            f"{task.name}: {net.config.n_ctx - room} new tokens leave no room for a prompt in the "
            f"context of {net.config.n_ctx}: lower --max_new_tokens"
        )
    for row, before in with_shots(task):
        prompt, right = read_row(task, row)
        prompt = before + prompt
        ids = tok.start + tok.encode(prompt)
        if chat:
            ids, _ = tok.chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
        cut += len(ids) > room
        questions.append(
            (row, prompt, None, right, [("", ids[-room:] or [tok.eot_id], [[]] * num_samples)])
        )
    return questions, cut


# --------------------------------------------------------------------------------------------------
# Answers: batches of requests, over all processes, kept until the run is done


class Answers:
    """What was answered, {key: answer}, and the file where this process keeps it."""

    def __init__(self, folder, identity, run):
        self.folder, self.identity, self.run, self.known = folder, identity, run, {}
        for path in folder.glob("answers_*.jsonl"):
            for line in path.read_bytes().splitlines():
                try:
                    self.known.update([json.loads(line)])
                except (ValueError, TypeError):
                    continue  # what a killed process left unfinished
        agree(run)
        self.file = open(folder / f"answers_{run.rank}.jsonl", "a", encoding="utf-8")
        self.file.write("\n")

    def __call__(self, name, how, requests, work):
        """work([request]) -> [answer] for all requests, in batches that are the same whatever the
        number of processes. `how` is what else an answer depends on."""
        seen = lambda r: hashlib.sha256(json.dumps([self.identity, how, *r[1:]]).encode())
        keys, mine = [seen(r).hexdigest()[:32] for r in requests], {}
        groups = batches(requests)[self.run.rank :: self.run.world]
        total, done, begun = sum(map(len, groups)), 0, time.monotonic()
        fresh, show = 0, core.Progress() if self.run.main else lambda line, last=False: None
        for group in groups:
            known = all(keys[i] in self.known for i in group)
            if not known:
                for i, answer in zip(group, work([requests[i] for i in group])):
                    self.known[keys[i]] = answer
                    self.file.write(json.dumps([keys[i], answer]) + "\n")
                self.file.flush()
                fresh += len(group)
            mine |= {i: self.known[keys[i]] for i in group}
            done += len(group)
            left = (time.monotonic() - begun) / max(1, fresh) * (total - done)
            show(f"{name}: {done:,} of {total:,} requests, left {core.duration(left)}")
        show(f"{name}: {done:,} of {total:,} requests, {done - fresh:,} of before", last=True)
        parts = [mine]
        if self.run.world > 1:
            parts = [None] * self.run.world
            dist.all_gather_object(parts, mine)
        every = {i: answer for part in parts for i, answer in part.items()}
        return [every[i] for i in range(len(requests))]

    def close(self):
        """All is in results.json: nothing needs to be kept."""
        self.file.close()
        agree(self.run)
        for path in self.folder.glob("answers_*.jsonl") if self.run.main else ():
            path.unlink()


def batches(requests):
    """Indices of requests in groups of micro_tokens at most, the longest first, so that the time
    left is no surprise; what shares its beginning stays together."""
    width = lambda r: max(map(len, r[2]), default=0)
    rows = lambda r: 1 if width(r) == 1 else max(1, len(r[2]))  # single tokens need no row each
    size = lambda r: (len(r[1]) + width(r)) * rows(r)
    groups, widest = [], 0
    by_length = lambda i: (requests[i][0], -len(requests[i][1]), -width(requests[i]), i)
    for i in sorted(range(len(requests)), key=by_length):
        same = groups and requests[i][0] == requests[groups[-1][0]][0]
        widest = max(widest, size(requests[i]))
        if not same or widest * (len(groups[-1]) + 1) > micro_tokens:
            groups.append([])
            widest = size(requests[i])
        groups[-1].append(i)
    return groups


def padded(rows, device):
    """(B, T) int64 of lists of ids, padded on the right; their lengths (B,)."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids.to(device), torch.tensor([len(row) for row in rows], device=device)


def score(net, requests):
    """For each request (shared, context, continuations) the sums of log p of its continuations, in
    nats. The batch's common beginning is computed once, a context once for all that continue it,
    and logits only where something is scored."""
    table = net.model.embed_tokens.weight
    device = table.device
    trunks = [c + conts[0][:-1] if len(conts) == 1 else c for _, c, conts in requests]
    common = min(len(os.path.commonprefix(trunks)), min(len(r[1]) for r in requests) - 1)
    if 4 * common < max(map(len, trunks)) or len(requests) == 1:  # then a cache costs more
        common = 0
    B, T = len(requests), max(map(len, trunks)) - common
    apart = [(b, i) for b, r in enumerate(requests) for i in range(len(r[2])) if len(r[2]) > 1]
    ahead = lambda key: requests[key[0]][2][key[1]][:-1]  # what of a continuation is fed
    apart = sorted(filter(ahead, apart), key=lambda key: -len(ahead(key)))
    pieces = [apart[i : i + 64] for i in range(0, len(apart), 64)]  # alike in length
    begin, end = {}, B * T  # where the hidden states of each begin, when all are in a row
    for piece in pieces:
        S = len(ahead(piece[0]))
        begin |= {key: end + i * S for i, key in enumerate(piece)}
        end += S * len(piece)
    spots, lengths = [], []  # (index into all hidden states, the token that should follow)
    for b, (_, context, conts) in enumerate(requests):
        last = b * T + len(context) - 1 - common  # the place that predicts a continuation
        for i, cont in enumerate(conts):
            rest = begin.get((b, i), last + 1)
            spots += [(last, cont[0]), *((rest + j, t) for j, t in enumerate(cont[1:]))]
            lengths.append(len(cont))
    cache, n_new = None, None
    ids, n = padded([trunk[common:] for trunk in trunks], device)
    if common or apart:
        room = common + T + (len(ahead(apart[0])) if apart else 0)
        dtype = torch.float32 if device.type == "cpu" else core.compute_dtype(table)
        cache, n_new = core.KVCache(net.config, 1 if common else B, room, device, dtype), n
    if common:
        net.hidden(torch.tensor([trunks[0][:common]], device=device), cache=cache)
        cache.reorder(torch.zeros(B, dtype=torch.int64, device=device))
    states = [net.hidden(ids, cache=cache, n_new=n_new).flatten(0, 1)]
    for piece in pieces:
        branch = copy.copy(cache)  # whose tensors reorder replaces
        branch.reorder(torch.tensor([b for b, _ in piece], device=device))
        ids, n = padded([ahead(key) for key in piece], device)
        states.append(net.hidden(ids, cache=branch, n_new=n).flatten(0, 1))
    h = torch.cat(states)
    sums = iter([part.sum().item() for part in spot_logprobs(net, h, spots).cpu().split(lengths)])
    return [[next(sums) for _ in conts] for _, _, conts in requests]


def spot_logprobs(net, h, spots):
    """log p of tokens (N,) float32, from hidden states h (M, C) and [(index into h, token)]."""
    at, tokens = torch.tensor(spots, device=h.device).T
    rows, at = at.unique(return_inverse=True)
    size = core.head_rows(h.device.type, h.dtype, net.config.vocab_size)
    out = torch.zeros(len(at), device=h.device)
    for i, part in enumerate(rows.split(size)):
        logits, mine = core.joint(h[part], net.lm_head).float(), at // size == i
        row = at[mine] - i * size
        out[mine] = logits[row, tokens[mine]] - logits.logsumexp(-1)[row]
    return out


def complete(net, tok, task, requests):
    """num_samples answers to each prompt, as texts."""
    prompts = [r[1] for r in requests for _ in range(num_samples)]
    draw = int(hashlib.sha256(json.dumps([seed, prompts[0]]).encode()).hexdigest()[:7], 16)
    how = dict(temperature=temperature, seed=draw, stop=task.stop)
    made = core.generate(
        net, tok, prompts, max_new_tokens=max_new_tokens or task.max_new_tokens, **how
    )
    texts = [g.text for g in made]
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def classify(net, requests):
    """The scores of a classifier's labels for each text."""
    ids, n = padded([r[1] for r in requests], net.score.weight.device)
    h = net.hidden(ids)
    if net.pooling == "mean":
        real = torch.arange(h.shape[1], device=h.device) < n[:, None]
        h = (h * real[..., None]).sum(1) / n[:, None]
    else:
        h = h[torch.arange(len(h), device=h.device), n - 1]
    return net.score(h).float().tolist()


# --------------------------------------------------------------------------------------------------
# Scores: {metric: (value, standard error)}


def mean(values):
    """The mean and its standard error; of right and wrong, sqrt(p (1 - p) / (n - 1))."""
    x = np.array(values, dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None


def ratio(amounts, sizes):
    """sum(amounts) / sum(sizes) over independent pieces, and its standard error, linearised."""
    a, b = np.array(amounts, dtype=np.float64), np.array(sizes, dtype=np.float64)
    r, n = a.sum() / b.sum(), len(a)
    error = math.sqrt(n / (n - 1) * ((a - r * b) ** 2).sum()) / b.sum() if n > 1 else None
    return float(r), error


def perplexity(nats):
    """exp of a mean and of its error, to the first order."""
    value, error = math.exp(min(nats[0], 700)), nats[1]
    return value, None if error is None else value * error


def judged(task, questions, answers):
    """({metric: [a value a question]}, [sample])."""
    values, log = {}, []
    for row, prompt, choices, right, asked in questions:
        mine = [next(answers) for _ in asked]
        sample = {"prompt": prompt, "right": right}
        if task.kind == "choice":
            sums = [p for answer in mine for p in answer]
            norms = [p / len(c) if c else -math.inf for p, c in zip(sums, choices)]
            found = {"acc": sums, "acc_norm": norms}
            found = {metric: float(x.index(max(x)) == right) for metric, x in found.items()}
            sample |= {"choices": choices, "logprobs": sums, "answer": sums.index(max(sums))}
        else:
            try:
                found = {metric: float(x) for metric, x in task.judge(row, mine[0]).items()}
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{task.name}: judging {str(row)[:80]}: {error!r}") from None
            sample["answers"] = mine[0]
        for metric, value in found.items():
            values.setdefault(metric, []).append(value)
        log.append(sample | found)
    return values, log


def run_questions(task, net, tok, answers, say):
    """Scores of a task of questions, overall and by subject, and its samples."""
    make = choice_requests if task.kind == "choice" else prompt_requests
    questions, cut = make(task, net, tok)
    if cut:
        say(f"{task.name}: {cut} of {len(questions)} prompts are cut from the left to the context")
    requests = [request for question in questions for request in question[-1]]
    if task.kind == "choice":
        found = answers(task.name, "score", requests, lambda some: score(net, some))
    else:
        how = [num_samples, temperature, seed, task.stop, max_new_tokens or task.max_new_tokens]
        work = lambda some: complete(net, tok, task, some)
        found = answers(task.name, ["complete", *how], requests, work)
    values, log = judged(task, questions, iter(found))
    scores = {metric: mean(x) for metric, x in values.items()}
    subjects = [question[0].get("subject") or "" for question in questions]
    by = {}
    for subject in sorted(set(subjects) - {""}) if len(set(subjects)) > 1 else ():
        mine = [i for i, s in enumerate(subjects) if s == subject]
        by[subject] = {"n": len(mine)}
        by[subject] |= flat({metric: mean([x[i] for i in mine]) for metric, x in values.items()})
    return scores, len(questions), by, log


def open_shard(path):
    """The tokens of an llm.c .bin shard, as a memory map (N,) uint16 or uint32."""
    header = np.fromfile(path, dtype="<i4", count=256)
    kinds = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
    kind = kinds.get(tuple(header[:2].tolist()))
    if kind is None or os.path.getsize(path) != 1024 + int(header[2]) * kind.itemsize:
        raise UserError(f"{path}: no token shard, or cut short (python prepare.py makes them)")
    return np.memmap(path, dtype=kind, mode="r", offset=1024, shape=(int(header[2]),))


def shard_windows(paths, length):
    """The requests of eval_tokens of the shards, evenly spread: train.py's validation windows."""
    shards, starts = [open_shard(path) for path in paths], []
    for s, shard in enumerate(shards):
        starts += [(s, i) for i in range(0, len(shard) - 1, length)]
    n = min(len(starts), -(-eval_tokens // length)) if eval_tokens else len(starts)
    for s, i in (starts[k * len(starts) // n] for k in range(n)):
        ids = shards[s][i : i + length + 1].tolist()
        yield "", ids[:1], [ids[1:]]


def text_windows(ids, prefix, length):
    """The requests that score each of a document's ids once: full windows, the last one with as
    much before it as fits (the harness's rolling log-likelihood)."""
    yield "", [prefix], [ids[:length]]
    for i in range(length, len(ids), length):
        end = min(i + length, len(ids))
        yield "", ids[max(0, end - length - 1) : i], [ids[i:end]]


def run_loss(net, tok, answers, say):
    """Loss (nats per token), perplexity and bits per byte of validation shards, by source, or of
    texts, whose first token follows the one that starts a document."""
    length = seq_len or net.config.n_ctx
    if length > net.config.n_ctx:
        raise UserError(f"seq_len={length}, but the context of {model} is {net.config.n_ctx}")
    if text:
        whole = {"": read_text(Path(text))}
        encoded = [tok.start + tok.encode(document) for document in whole[""]]
        windows = [[*text_windows(ids, tok.eot_id, length)] if ids else [] for ids in encoded]
        if tok.eot_id is None:
            raise UserError("this tokenizer has no token that could stand before a text")
        pieces = {"": [(w, len(d.encode()), d) for w, d in zip(windows, whole[""])]}
    else:
        folder = Path("data") / dataset
        files = {"": sorted(folder.glob("val_*.bin"))}
        for path in sorted(folder.glob("val.*.bin")):
            files.setdefault(path.name[4:].rpartition("_")[0], []).append(path)
        if not any(files.values()):
            raise UserError(f"{folder}: no validation shards (python prepare.py makes them)")
        size = lambda ids: sum(len(tok.token_bytes(id)) for id in ids)
        pieces = {}
        for name, paths in files.items():
            some = list(shard_windows(paths, length)) if paths else []
            pieces[name] = [([w], size(w[2][0]), None) for w in some]
            top = max((max(w[1] + w[2][0]) for w in some), default=0)
            if top >= net.config.vocab_size:
                raise UserError(f"{folder}: token {top}, but {model} knows {net.config.vocab_size}")
    requests = [w for some in pieces.values() for windows, *_ in some for w in windows]
    found = iter(answers("loss", "score", requests, lambda some: score(net, some)))
    by, log = {}, []
    for name, some in pieces.items():
        nats = [-sum(next(found)[0] for _ in windows) for windows, *_ in some]
        tokens = [sum(len(w[2][0]) for w in windows) for windows, *_ in some]
        if not sum(tokens):
            continue
        sizes = [max(size, 1e-9) for _, size, _ in some]
        loss, per_byte = ratio(nats, tokens), ratio(nats, sizes)
        scores = {"loss": loss, "perplexity": perplexity(loss)}
        scores["bits_per_byte"] = tuple(x and x / math.log(2) for x in per_byte)
        if text:
            scores["byte_perplexity"] = perplexity(per_byte)
            words = [len(re.split(r"\s+", document)) for *_, document in some]
            scores["word_perplexity"] = perplexity(ratio(nats, words))
        by[name] = {"n": len(some), "tokens": sum(tokens)} | flat(scores)
        rows = zip(nats, tokens, sizes)
        log += [{"source": name, "nats": x, "tokens": t, "bytes": s} for x, t, s in rows]
    whole = by.pop("", None) or next(iter(by.values()))
    return whole, by, log


def read_text(path):
    """The documents of a text file, or of a JSONL's field `text`."""
    try:
        if path.suffix == ".jsonl":
            found = [row["text"] for row in read_rows(path)]
        else:
            found = [path.read_text(encoding="utf-8")]
        if found := [document for document in found if document]:
            return [str(document) for document in found]
        raise UserError(f"{path}: no text in it")
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as text, or has no field: {error}") from None


def run_classify(net, tok, answers, say):
    """Accuracy and macro F1 (the mean over the labels that occur), its error by bootstrap."""
    path = Path("data") / dataset / "classify_val.jsonl"
    rows = list(limited(read_rows(path)))
    try:
        ids = [(tok.start + tok.encode(row["text"]))[: net.config.n_ctx] for row in rows]
        labels = [str(row["label"]) for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected text and label in each record: {error!r}") from None
    known = [str(label) for label in net.labels]
    if strange := sorted({*labels} - {*known}):
        raise UserError(f"{path}: label {strange[0]!r} is none of {model}'s: {', '.join(known)}")
    if not all(ids) or not rows:
        raise UserError(f"{path}: an empty text has no label")
    requests = [("", some, []) for some in ids]
    found = answers("classify", "classify", requests, lambda some: classify(net, some))
    right = np.array([known.index(label) for label in labels])
    guess = np.array([int(np.argmax(x)) for x in found])
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(right), len(right)) for _ in range(200))
    spread = [macro_f1(right[i], guess[i]) for i in drawn]
    scores = {"accuracy": mean(right == guess)}
    scores["f1"] = macro_f1(right, guess), float(np.std(spread, ddof=1))
    named = zip(rows, labels, guess, found)
    log = [{"text": r["text"], "label": x, "answer": known[g], "scores": s} for r, x, g, s in named]
    return scores, len(rows), {}, log


def macro_f1(right, guess):
    """The mean F1 of the labels that occur in `right`."""
    f1 = []
    for label in np.unique(right):
        hits = ((right == label) & (guess == label)).sum()
        f1.append(2 * hits / ((right == label).sum() + (guess == label).sum()))
    return float(np.mean(f1))


def flat(scores):
    """{metric: value, metric_stderr: its standard error}."""
    out = {}
    for metric, (value, error) in scores.items():
        out |= {metric: value, f"{metric}_stderr": error}
    return out


# --------------------------------------------------------------------------------------------------
# The run


def agree(run):
    """All processes wait for each other."""
    if run.world > 1:
        dist.barrier()


def identity(kind):
    """What tells this model's answers from another's: its files, and what it computes in."""
    parts = [str(kind), quantize, model]
    for path in sorted(Path(model).glob("*")) if Path(model).is_dir() else ():
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"):
            parts += [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_folder(run):
    """Where the results go, which must be possible to write before hours are spent."""
    folder = Path(out_dir or model)
    if out_dir is None and not folder.is_dir():
        raise UserError(f"{model}: no folder here to write results.json into: give --out_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"answers_{run.rank}.jsonl").touch()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}: give another --out_dir") from None
    return folder


def check_settings():
    """Refuse what no run can have before anything is read."""
    least = dict.fromkeys("limit shots seq_len eval_tokens max_new_tokens temperature".split(), 0)
    for key, low in (least | {"num_samples": 1, "micro_tokens": 1}).items():
        if (value := globals()[key]) is not None and value < low:
            raise UserError(f"{key}={value}: expected {low} or more")
    if num_samples > 1 and temperature == 0:
        raise UserError("num_samples: greedy answers are all the same: give --temperature=0.8")


def main():
    run = core.setup(device, timedelta(days=30))
    say = (lambda line: print(line, flush=True)) if run.main else lambda line: None
    check_settings()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    opened = [n if n in ("loss", "classify") else open_task(n, run) for n in names]
    kind = torch.float32 if run.device.type == "cpu" else core.choose_dtype(run.device)[0]
    if dtype != "auto":
        kind = core.choose_dtype(run.device, dtype)[0]
    if quantize and dtype == "auto" and run.device.type == "cpu":
        kind = torch.bfloat16  # what the int8 product takes and gives
    net, tok = core.load(model, run.device, kind, quantize)
    if (net.score is not None) != (names == ["classify"]):
        fit = "--tasks=classify, and no other" if net.score is not None else "a classifier"
        raise UserError(f"{model} with --tasks={tasks}: expected {fit}")
    folder, mark = open_folder(run), identity(kind)
    answers = Answers(folder, mark, run)
    before = core.read_json(folder / "results.json", {})
    results = before.get("results", {}) if before.get("identity") == mark else {}
    for name, task in zip(names, opened):
        begun = time.monotonic()
        with torch.inference_mode(), core.generating(net):
            if name == "loss":
                entry, by, log = run_loss(net, tok, answers, say)
            else:
                do = run_classify if name == "classify" else partial(run_questions, task)
                scores, n, by, log = do(net, tok, answers, say)
                entry = flat(scores) | {"n": n}
        entry |= {"seconds": round(time.monotonic() - begun, 3), "settings": settings(globals())}
        entry["settings"]["shots"] = getattr(task, "shots", None)
        results[name] = entry | ({"by": by} if by else {})
        for subject, some in by.items():
            shown = [f"{k} {v:.6g}" for k, v in some.items() if not k.endswith("_stderr")]
            say(f"  {name} {subject}: {', '.join(shown)}")
        if samples and run.main:
            lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in log]
            plain = re.sub(r"[^\w.-]+", "_", name)
            with core.whole_file(folder / f"samples_{plain}.jsonl") as file:
                file.write("".join(lines).encode(errors="replace"))
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        record = {"model": model, "identity": mark, "results": results, "versions": versions}
        if run.main:  # after each task: what is done is done
            core.write_json(folder / "results.json", record)
    answers.close()
    for name in names:
        for key, value in results[name].items():
            if not isinstance(value, dict):
                shown = "n/a" if value is None else f"{value:.6g}"
                say(f"{name}.{key}: {shown}")


if __name__ == "__main__":
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError):
            if "DefaultCPUAllocator" not in str(error):  # a CPU's allocator says no more
                raise
        raise UserError(f"out of memory: lower micro_tokens (now {micro_tokens})") from None
