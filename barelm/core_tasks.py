"""CORE: 22 tasks that DCLM reports of a base model (Li et al. 2024, arXiv:2406.11794), as nanochat
runs them.

Each row is asked behind solved rows of the same file, and scored by log p; nothing is generated:

- multiple_choice: one context, several choices; right is the one with the least loss per token;
- schema: several contexts, one continuation; right is the one behind which that has the least;
- language_modeling: right is a continuation of which each token is the likeliest one.

What is scored begins at a token, not at a character: behind the tokens that all prompts of a row
begin with; of a schema it is the tokens that all end with. An accuracy is centered between guessing
(0) and all right (1); CORE is the mean of the 22.
"""

from __future__ import annotations

import difflib
import math
import os
import random
import zipfile
import zlib
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from barelm.download import download
from barelm.files import file_ending, whole_file
from barelm.questions import Result
from barelm.rows import ROW_FILES, read_rows
from barelm.run import UserError
from barelm.scores import flat, mean
from barelm.scoring import Request
from barelm.tasks import ROW_ERRORS, all_texts, bad_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from barelm.tokenizer import Tokenizer

# The rows, as nanochat publishes them: a folder eval_bundle/eval_data with the files below.
BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHUFFLE_SEED = 1337  # rows are shuffled first, so that --limit's are no file's first ones
ROWS_AT_ONCE = 4096  # so many prompts of thousands of tokens fit into any memory


@dataclass(frozen=True)
class CoreTask:
    """A task: where its rows are, how they are asked, what guessing comes to."""

    name: str
    file: str  # in the bundle
    kind: str  # multiple_choice, schema or language_modeling
    shots: int
    baseline: float  # accuracy of guessing
    n_rows: int  # that the published file has
    delimiter: str = " "  # between a context and what follows it

    @property
    def label(self) -> str:
        """Its name as --tasks has it."""
        return f"core.{self.name}"


ANSWER = "\nAnswer: "
CORE = [
    CoreTask("hellaswag_zeroshot", "language_understanding/hellaswag.jsonl",
             "multiple_choice", 0, 0.25, 10042),
    CoreTask("jeopardy", "world_knowledge/jeopardy_all.jsonl",
             "language_modeling", 10, 0, 2117, ANSWER),
    CoreTask("bigbench_qa_wikidata", "world_knowledge/bigbench_qa_wikidata.jsonl",
             "language_modeling", 10, 0, 20321),
    CoreTask("arc_easy", "world_knowledge/arc_easy.jsonl",
             "multiple_choice", 10, 0.25, 2376, ANSWER),
    CoreTask("arc_challenge", "world_knowledge/arc_challenge.jsonl",
             "multiple_choice", 10, 0.25, 1172, ANSWER),
    CoreTask("copa", "commonsense_reasoning/copa.jsonl",
             "multiple_choice", 0, 0.5, 100),
    CoreTask("commonsense_qa", "commonsense_reasoning/commonsense_qa.jsonl",
             "multiple_choice", 10, 0.2, 1221),
    CoreTask("piqa", "commonsense_reasoning/piqa.jsonl",
             "multiple_choice", 10, 0.5, 1838, ANSWER),
    CoreTask("openbook_qa", "commonsense_reasoning/openbook_qa.jsonl",
             "multiple_choice", 0, 0.25, 500),
    CoreTask("lambada_openai", "language_understanding/lambada_openai.jsonl",
             "language_modeling", 0, 0, 5153),
    CoreTask("hellaswag", "language_understanding/hellaswag.jsonl",
             "multiple_choice", 10, 0.25, 10042),
    CoreTask("winograd", "language_understanding/winograd_wsc.jsonl",
             "schema", 0, 0.5, 273),
    CoreTask("winogrande", "language_understanding/winogrande.jsonl",
             "schema", 0, 0.5, 1267),
    CoreTask("bigbench_dyck_languages", "symbolic_problem_solving/bigbench_dyck_languages.jsonl",
             "language_modeling", 10, 0, 1000),
    CoreTask("agi_eval_lsat_ar", "symbolic_problem_solving/agi_eval_lsat_ar.jsonl",
             "multiple_choice", 3, 0.2, 230),
    CoreTask("bigbench_cs_algorithms", "symbolic_problem_solving/bigbench_cs_algorithms.jsonl",
             "language_modeling", 10, 0, 1320),
    CoreTask("bigbench_operators", "symbolic_problem_solving/bigbench_operators.jsonl",
             "language_modeling", 10, 0, 210),
    CoreTask("bigbench_repeat_copy_logic",
             "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl",
             "language_modeling", 10, 0, 32),
    CoreTask("squad", "reading_comprehension/squad.jsonl",
             "language_modeling", 10, 0, 10570),
    CoreTask("coqa", "reading_comprehension/coqa.jsonl",
             "language_modeling", 0, 0, 7983),
    CoreTask("boolq", "reading_comprehension/boolq.jsonl",
             "multiple_choice", 10, 0.62, 3270, ANSWER),
    CoreTask("bigbench_language_identification",
             "language_understanding/bigbench_language_identification.jsonl",
             "multiple_choice", 10, 0.091, 10000),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Rows


def is_core(name: str) -> bool:
    """Whether --tasks means CORE (core), or one of its tasks (core.NAME)."""
    return name == "core" or name.startswith("core.")


def core_tasks(name: str) -> list[CoreTask]:
    """The tasks that a name of --tasks means: all, or one."""
    if name == "core":
        return CORE
    tasks = [task for task in CORE if task.label == name]
    if not tasks:
        near = difflib.get_close_matches(name, [task.label for task in CORE], 1, 0)
        raise UserError(f"--tasks={name}: expected core or one of its 22, such as {near[0]}")
    return tasks


def open_core(name: str, folder: str, limit: int, shots: int | None) -> list[tuple]:
    """[(task, its rows)] of a name of --tasks, the rows in the order in which they are asked.
    folder: with the rows, as the bundle has them, in core/. All must be there: a mean of fewer
    tasks would be another figure. shots: instead of each task's own, where it is not None."""
    tasks = core_tasks(name)
    paths = {task.file: find_file(Path(folder) / "core", task.file) for task in tasks}
    absent = [task for task in tasks if paths[task.file] is None]
    if absent:
        names = ", ".join(task.name for task in absent[:4])
        if len(absent) > 4:
            names += f" and {len(absent) - 4} more"
        where = f"{folder}/core/{absent[0].file}"
        why = f"no rows of {len(absent)} of {len(tasks)} tasks ({names})"
        raise UserError(f"{name}: {why}: put them where {where} is, or --download gets them all")
    opened = []
    for task in tasks:
        rows = read_rows(paths[task.file])  # type: ignore[arg-type]
        random.Random(SHUFFLE_SEED).shuffle(rows)
        if limit:
            rows = rows[:limit]
        if shots is not None:
            task = replace(task, shots=shots)
        if not rows:
            raise UserError(f"{task.label}: no rows in {paths[task.file]}")
        if task.shots >= len(rows):
            why = f"{task.shots} shots of the other rows, but it has {len(rows)}"
            raise UserError(f"{task.label}: {why}: set --shots, or a higher --limit")
        check_rows(task, rows)
        opened.append((task, rows))
    return opened


def find_file(folder: Path, file: str) -> Path | None:
    """The file of a task below a folder: at its place in the bundle, or of its name anywhere, as
    JSONL, JSON or parquet; None where there is none."""
    stem = Path(file).stem
    candidates = []
    for path in sorted(folder.rglob("*")):
        if file_ending(path) in ROW_FILES and path.name.partition(".")[0] == stem:
            if path.as_posix().endswith(file):
                return path
            candidates.append(path)
    return candidates[0] if candidates else None


def fetch_core(name: str, folder: str) -> None:
    """Download the rows of a name of --tasks that a folder lacks, to core/ in it: the whole bundle,
    of which the files of CORE are unpacked. Each file's checksum (its own in the archive) and its
    number of rows are checked."""
    place = Path(folder) / "core"
    absent = [task for task in core_tasks(name) if find_file(place, task.file) is None]
    if not absent:
        return
    archive_path = place / "eval_bundle.zip"
    download(BUNDLE, archive_path)
    try:
        with zipfile.ZipFile(archive_path) as archive:
            for task in absent:
                unpack(archive, task, place)
    # RuntimeError: of bits that ask for a password, or for another way of compressing.
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError, RuntimeError) as error:
        why = f"cannot be unpacked: {str(error)[:200]}"
        raise UserError(f"{archive_path}: {why}: remove it, and run it again") from None
    os.unlink(archive_path)


def unpack(archive: zipfile.ZipFile, task: CoreTask, place: Path) -> None:
    """Unpack a task's file of the bundle; one of another number of rows is refused."""
    data = archive.read(f"eval_bundle/eval_data/{task.file}")  # which checks its CRC
    n_rows = sum(1 for line in data.splitlines() if line.strip())
    if n_rows != task.n_rows:
        why = f"{task.file} has {n_rows:,} rows, not {task.n_rows:,}"
        raise UserError(f"{archive.filename}: {why}: it is another bundle than the published one")
    path = place / task.file
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data)


# --------------------------------------------------------------------------------------------------
# Requests


def core_prompts(task: CoreTask, row: dict, examples: list[dict]) -> list[str]:
    """The texts of a row behind solved examples: one for each choice, one for each context of a
    schema; of language modeling two, without the continuation and with it."""
    before = ""
    for example in examples:
        before += f"{solved(task, example)}\n\n"
    if task.kind == "multiple_choice":
        stem = f"{before}{row['query']}{task.delimiter}"
        return [stem + choice for choice in row["choices"]]
    if task.kind == "schema":
        ending = f"{task.delimiter}{row['continuation']}"
        return [before + context + ending for context in row["context_options"]]
    # Space before the continuation belongs to its first token.
    stem = f"{before}{row['context'].strip()}{task.delimiter}"
    return [stem.strip(), f"{stem}{row['continuation']}"]


def solved(task: CoreTask, row: dict) -> str:
    """A row with its right answer."""
    if task.kind == "multiple_choice":
        return f"{row['query']}{task.delimiter}{row['choices'][row['gold']]}"
    if task.kind == "schema":
        return f"{row['context_options'][row['gold']]}{task.delimiter}{row['continuation']}"
    return f"{row['context'].strip()}{task.delimiter}{row['continuation']}"


def check_row(task: CoreTask, row: dict) -> None:
    """Refuse a row that has not what its kind needs, with a ValueError or one of ROW_ERRORS."""
    texts = {
        "multiple_choice": ["query"],
        "schema": ["continuation"],
        "language_modeling": ["context", "continuation"],
    }
    for key in texts[task.kind]:
        if not isinstance(row[key], str):
            raise ValueError(f"{key!r} is no text")
    if not row.get("continuation", "-").strip():
        raise ValueError("'continuation' is empty")
    if task.kind == "language_modeling":
        return
    key = "choices" if task.kind == "multiple_choice" else "context_options"
    options = row[key]
    gold = row["gold"]
    if not isinstance(options, list) or len(options) < 2 or not all_texts(options):
        raise ValueError(f"expected two texts or more in {key!r}")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"gold {gold!r} is none of its {len(options)} {key}")


def check_rows(task: CoreTask, rows: list[dict]) -> None:
    """Refuse rows of another form, in a line."""
    for row in rows:
        try:
            check_row(task, row)
        except ROW_ERRORS as error:
            raise bad_row(task.label, row, error) from None


def common_length(rows: list[list[int]]) -> int:
    """How many ids all rows begin with."""
    return len(os.path.commonprefix(rows))


def core_requests(
    task: CoreTask, tok: Tokenizer, prompts: list[str], n_ctx: int
) -> tuple[list[Request], bool]:
    """The requests of a row's prompts, one for each text that is scored or, of one context, one
    with all; and whether a context was cut from the left to the model's."""
    start = tok.start or ([] if tok.eot_id is None else [tok.eot_id])
    try:
        rows = [start + tok.encode(prompt) for prompt in prompts]
    except UnicodeEncodeError as error:  # half a pair of surrogates, which JSON can hold
        raise UserError(f"{task.label}: {error}: {prompts[0][-80:]!r}") from None
    n_common = common_length(rows)
    if task.kind == "schema":
        n_ending = common_length([row[::-1] for row in rows])
        cuts = [len(row) - n_ending for row in rows]
    elif task.kind == "language_modeling":
        # The whole prompt without the continuation, but for a tokenizer that joins the two.
        rows = rows[1:]
        cuts = [n_common]
    else:
        cuts = [n_common] * len(rows)
    contexts = []
    continuations = []
    was_cut = False
    for row, cut in zip(rows, cuts):
        n_over = max(0, len(row) - n_ctx)  # as nanochat, which reads the last token too
        if cut - n_over < 1:
            why = f"a continuation of {len(row) - cut} tokens: the context is {n_ctx}"
            if cut < 1:
                why = "no token stands before what is scored"
            raise UserError(f"{task.label}: {why}: {prompts[0][-80:]!r}")
        contexts.append(row[n_over:cut])
        continuations.append(row[cut:])
        was_cut = was_cut or n_over > 0
    if all(context == contexts[0] for context in contexts):
        return [Request("", contexts[0], continuations)], was_cut
    requests = []
    for context, continuation in zip(contexts, continuations):
        requests.append(Request("", context, [continuation]))
    return requests, was_cut


# --------------------------------------------------------------------------------------------------
# Scores


def drawn_examples(i: int, n_rows: int, shots: int, seed: int) -> list[int]:
    """Which rows stand solved before row i: others, drawn by Random(seed + i), as in nanochat."""
    # Of a range without i sample() draws what it would of a list without it.
    drawn = random.Random(seed + i).sample(range(n_rows - 1), shots)
    return [k + 1 if k >= i else k for k in drawn]


def core_verdict(task: CoreTask, row: dict, requests: list, replies: list) -> tuple[bool, dict]:
    """(whether a row is right, what --samples shows) of the replies to its requests, [[log p, is
    greedy] of each continuation]."""
    if task.kind == "language_modeling":
        [[[logprob, is_greedy]]] = replies
        return is_greedy, {"logprob": logprob}
    losses = []
    for request, its_replies in zip(requests, replies):
        for ids, (logprob, _) in zip(request.continuations, its_replies):
            # A choice that is the beginning of all others has no token of its own, and no loss.
            losses.append(-logprob / len(ids) if ids else math.nan)
    best = losses.index(min(losses))
    shown = [None if math.isnan(loss) else loss for loss in losses]  # JSON has no NaN
    return best == row["gold"], {"losses": shown, "answer": best, "gold": row["gold"]}


def ask(requests: list[Request], name: str, answers: Callable, work: Callable) -> list[list]:
    """For each request [[log p, is greedy] of each continuation]; of one without a token [0, True],
    which no network is asked for."""
    full = []  # the same requests without such continuations
    for request in requests:
        full.append(request._replace(continuations=[ids for ids in request.continuations if ids]))
    asked = [request for request in full if request.continuations]
    answered = iter(answers(name, "greedy", asked, work))
    replies = []
    for request, with_tokens in zip(requests, full):
        of_request = iter(next(answered) if with_tokens.continuations else [])
        replies.append([next(of_request) if ids else [0.0, True] for ids in request.continuations])
    return replies


def run_core_task(task: CoreTask, rows: list[dict], tok: Tokenizer, n_ctx: int, seed: int,
                  answers: Callable, work: Callable, say: Callable) -> Result:  # fmt: skip
    """Accuracy of a task, and centered. answers: eval.py's Answers; work: [Request] -> for each
    [[log p, is greedy] of each continuation]."""
    n_cut = 0
    right = []
    log = []
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        indices = range(begin, min(begin + ROWS_AT_ONCE, len(rows)))
        of_rows = []  # the requests of each
        for i in indices:
            examples = [rows[k] for k in drawn_examples(i, len(rows), task.shots, seed)]
            prompts = core_prompts(task, rows[i], examples)
            requests, was_cut = core_requests(task, tok, prompts, n_ctx)
            of_rows.append(requests)
            n_cut += was_cut
        replies = iter(ask(list(chain(*of_rows)), task.label, answers, work))
        for i, requests in zip(indices, of_rows):
            is_right, shown = core_verdict(
                task, rows[i], requests, list(islice(replies, len(requests)))
            )
            right.append(float(is_right))
            log.append({"task": task.name, "row": rows[i]} | shown | {"acc": right[-1]})
    if n_cut:
        say(f"{task.label}: {n_cut} of {len(rows)} prompts were cut from the left to the context")
    accuracy = mean(right)
    scores = {"accuracy": accuracy, "centered": centered(accuracy, task.baseline)}
    return Result(scores, len(rows), samples=log)


def centered(score: tuple, baseline: float) -> tuple:
    """An accuracy and its standard error between those of guessing (0) and all right (1)."""
    accuracy, error = score
    room = 1 - baseline
    return (accuracy - baseline) / room, None if error is None else error / room


def run_core(name: str, opened: list[tuple], tok: Tokenizer, n_ctx: int, seed: int,
             answers: Callable, work: Callable, say: Callable) -> Result:  # fmt: skip
    """The scores of a name of --tasks: of one task accuracy and centered; of all their mean,
    core_metric, with each task's in `by`. opened: of `open_core`."""
    for line in unlike_published(opened):
        say(f"{name}: note: not the published CORE: {line}")
    results = {}
    log = []
    for task, rows in opened:
        results[task.name] = run_core_task(task, rows, tok, n_ctx, seed, answers, work, say)
        log += results[task.name].samples
    if name != "core":
        return results[opened[0][0].name]
    by = {task: flat(result.scores) | {"n": result.n} for task, result in results.items()}
    scores = {
        "core_metric": core_metric([result.scores["centered"] for result in results.values()])
    }
    return Result(scores, sum(result.n for result in results.values()), by, log)


def core_metric(scores: list[tuple]) -> tuple:
    """The mean of centered accuracies [(value, standard error or None)], and its error: those of
    the tasks, which are independent, add up in squares."""
    value = sum(value for value, _ in scores) / len(scores)
    errors = [error for _, error in scores]
    if None in errors:
        return value, None
    return value, math.sqrt(sum(error**2 for error in errors)) / len(scores)


def unlike_published(opened: list[tuple]) -> list[str]:
    """What of opened tasks is not as published, a line each."""
    usual = {task.name: task.shots for task in CORE}
    others = [(task, rows) for task, rows in opened if len(rows) != task.n_rows]
    lines = []
    if len(others) > 3:
        n_rows = sum(len(rows) for _, rows in opened)
        n_published = sum(task.n_rows for task, _ in opened)
        lines.append(f"{n_rows:,} of {n_published:,} rows")
    for task, rows in others if len(others) <= 3 else []:
        lines.append(f"{task.name}: {len(rows):,} of {task.n_rows:,} rows")
    shots = [f"{task.name} {task.shots}" for task, _ in opened if task.shots != usual[task.name]]
    if shots:
        lines.append(f"shots: {', '.join(shots)}")
    return lines
