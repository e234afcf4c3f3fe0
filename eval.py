"""How good: loss and bits per byte, multiple choice, generation, classes, a task of your own.

    python eval.py                                       # out/python on data/python's validation
    python eval.py --text=book.txt                       # bits per byte of any text, or JSONL
    python eval.py --lengths=256,512,1024                # the loss by the length of a window
    python eval.py --tasks=mmlu,arc_easy --data=FOLDER --shots=0 --limit=100 --samples
    python eval.py --tasks=gsm8k,math --download         # rows from the Hub, kept in --data
    python eval.py --tasks=core --limit=500              # CORE, of 500 rows a task
    python eval.py --tasks=mine.jsonl,mine.py:function   # the README shows both
    python eval.py --model=out/classify --tasks=classify    # likewise tag, span
    python eval.py --tasks=neighbours                    # vectors: which function a docstring is of
    python eval.py --tasks=sts --rows_file=FILE.jsonl    # ... how alike two sentences are
    python eval.py --model=out/seq2seq --tasks=seq2seq --num_beams=4
    python eval.py --tasks=humaneval --allow_code_exec   # programs, in a sandbox
    torchrun --nproc_per_node=8 eval.py --model=path/to/a/hugging-face-folder --tasks=mmlu

Tasks: loss; mmlu, arc_easy, arc_challenge, hellaswag, winogrande, piqa, boolq, openbookqa, copa,
commonsense_qa (multiple choice); lambada_openai (the last word); gsm8k, math, bbh, triviaqa
(generation); humaneval, mbpp (code); ifeval (instructions); core (DCLM's 22, as nanochat runs
them); classify, tag, span (of a head); neighbours, sts (of vectors); seq2seq (a source, its
target). Prompts, truncation and scores are lm-evaluation-harness's, so that numbers compare.
Writes results.json (and with --samples each
prompt, answer and verdict) into out_dir. A run that was stopped continues: what was answered is
kept there until the end.

The file tells how an evaluation goes, in this order: rows become requests, requests are answered by
the network, answers become scores; then the tasks that have no questions (loss, classify), and
main(). What a task is, how its rows are read and its answers judged is in barelm/tasks.py, what
stands before a question and what is a score in barelm/questions.py, what was answered is kept by
barelm/replies.py; a benchmark is added in barelm/benchmarks.py. Programs run in barelm/sandbox.py.
report.py compares what was evaluated.
"""

from config import command_of, configure, settings

model = "out/python"  # a checkpoint folder
tasks = "loss"  # by name, or files of your own, with commas
data = "data/eval"  # folder with the tasks' rows: TASK_test.jsonl, TASK_train.jsonl (shots) ...
download = False  # fetch the rows that data lacks from the Hub (HF_ENDPOINT names another)
out_dir: str | None = None  # where results.json is written; none: the model's folder
samples = False  # also write each prompt, answer and verdict, as JSONL
limit = 0  # rows of each task (of each subject), the first ones; 0: all
seed = 1234  # of the shots that are drawn (the harness's) and of sampled answers

# loss
dataset = "python"  # data/<dataset>, whose validation shards loss reads; of a head: its task set
text: str | None = None  # loss of this text file, or of the field `text` of a JSONL, instead
seq_len = 0  # tokens of a window; 0: the model's context
context: int | None = None  # the same, beyond the model's context too, with the loss by position
lengths = ""  # also the loss of windows of these lengths, with commas between them: 256,512,1024
rope_scaling: dict | None = None  # of a rotary model instead of its own: yarn, ntk, linear
eval_tokens = 131072  # tokens of the shards that are scored, as in train.py; 0: all
mask_rate = 0.15  # of a model that fills gaps: the part of the tokens that is hidden

# heads and vectors
rows_file: str | None = None  # classify, tag, span, neighbours, sts: a JSONL, not the task set
pooling: str | None = None  # neighbours, sts: first, last or mean; none: the model's own, or mean

# multiple choice and generation
shots: int | None = None  # examples before a question; none: as many as are usual for the task
chat = False  # generation: the prompt as a user's turn of the model's chat template
max_new_tokens = 0  # of an answer; 0: the task's
num_samples = 1  # answers to each prompt, for pass@k
temperature = 0.0  # of the answers; 0 is greedy
num_beams = 1  # seq2seq: beams of a search for the likeliest answer; 1: none
source_template = "{source}"  # seq2seq: what the model reads, such as "summarize: {source}"

# code, and answers that another model judges
allow_code_exec = False  # run the programs that the model writes, in a sandbox
allow_weak_sandbox = False  # ... even where the machine cannot enforce all of it
judge_url: str | None = None  # of an OpenAI-compatible server (.../v1), for a header's rubric
judge_model = ""  # its model; JUDGE_API_KEY in the environment is its key

# the machine
micro_tokens = 8192  # tokens at once on a device, at most, but one request at least
device = "auto"  # auto, cpu, mps, cuda, cuda:1
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16
quantize: str | None = None  # int8 or int4: weights of one byte or half of one
fast = True  # false: plain mathematics, a row for each choice: a referee for a doubtful score
deterministic = False  # a text's bits do not depend on the batch: slower (docs/determinism.md)

if __name__ == "__main__":
    configure(globals())

import difflib
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from barelm.benchmarks import TASKS
from barelm.checkpoint import load
from barelm.core_tasks import fetch_core, is_core, open_core, run_core
from barelm.embeddings import POOLINGS, pooling_of
from barelm.ending import after_scores, figure_lines, score_table, score_words
from barelm.examples import device_of
from barelm.fast import generating
from barelm.files import JSONL, file_ending, whole_file
from barelm.filling import padded_batch, score_targets
from barelm.head_tasks import run_neighbours, run_span, run_sts, run_tag
from barelm.invariant import be_deterministic
from barelm.judge import ask_judge
from barelm.objectives import SHORTEST, VALIDATION_SEED, Objective, fills_gaps, vocabulary_of
from barelm.questions import (
    Item,
    Result,
    judge_choice,
    judge_continuation,
    limited,
    score_requests,
    total_scores,
    with_shots,
)
from barelm.replies import Answers
from barelm.rows import fetch_rows, find_rows, read_rows, read_text
from barelm.run import (
    UserError,
    check_least,
    choose_dtype,
    is_out_of_memory,
    setup,
)
from barelm.sampling import GREEDY
from barelm.sandbox import require_sandbox, run_programs
from barelm.scores import (
    divided,
    flat,
    mean,
    model_mark,
    perplexity,
    read_results,
    write_results,
)
from barelm.scoring import (
    Request,
    plain_scores,
    score_by_position,
    shared_scores,
    target_scores,
)
from barelm.shards import Windows, check_tokens, open_shard
from barelm.similarity import chrf, chrf_counts, rouge_l
from barelm.tasks import (
    ROW_ERRORS,
    checked_judgement,
    own_task,
    pass_at_k,
    read_row,
    run_own_file,
    write_program,
)
from barelm.tokenizer import Tokenizer
from barelm.watch import lost_process
from model import generate

SEQ2SEQ_TOKENS = 128  # of an answer of task seq2seq, where max_new_tokens does not say

# --------------------------------------------------------------------------------------------------
# Tasks with their rows: of the table, or your own


def open_task(name, run):
    """The task of this name, JSONL file or FILE.py:function, with its rows."""
    if file_ending(name) in JSONL:
        rows = read_rows(Path(name))
        header = rows.pop(0) if rows and "kind" in rows[0] else {}
        task = own_task(name, header, rows)
    elif name.rpartition(":")[0].endswith(".py"):
        task = own_task(name, *run_own_file(name))
        if task.program and run.is_main:
            require_sandbox(allow_code_exec, allow_weak_sandbox)
    elif name in TASKS:
        task = open_benchmark(name, run)
    else:
        near = difflib.get_close_matches(name, [*TASKS, *WITHOUT_QUESTIONS, "core"], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are loss, core, {', '.join(TASKS)}"
        raise UserError(f"--tasks={name}: unknown ({hint}); or FILE.jsonl, FILE.py:function")
    # What a task lacks is told now, not when the model has answered.
    if task.rubric and not judge_url:
        raise UserError(f"{name}: its rubric needs --judge_url and --judge_model")
    if not task.rows:
        hint = "expected one below the header"
        if not task.is_own:
            hint = f"{data}/{name}*.jsonl has them, or --download gets them"
        raise UserError(f"{name}: no rows: {hint}")
    if shots is not None:
        task.shots = shots
    return task


def open_core_rows(name, run):
    """CORE's tasks of a name of `tasks` with their rows, which process 0 downloads if it may."""
    if download and run.is_main:
        fetch_core(name, data)
    run.wait()
    return open_core(name, data, limit, shots)


def open_benchmark(name, run):
    """A task of the table with its rows, which process 0 downloads if it may."""
    task = replace(TASKS[name], name=name)
    if download and run.is_main:
        fetch_rows(task, data)
    run.wait()  # nobody reads what is not there yet
    task.rows, task.examples = find_rows(task, data)
    if task.program and run.is_main:
        require_sandbox(allow_code_exec, allow_weak_sandbox)
    return task


# --------------------------------------------------------------------------------------------------
# Requests: rows become token ids


def make_items(task, net, tok):
    """[Item] of a task's rows, how many prompts are cut from the left, and how many questions stand
    among their own shots, solved."""
    n_ctx = net.config.n_ctx
    answer_tokens = max_new_tokens or task.max_new_tokens
    if task.kind == "generate" and answer_tokens >= n_ctx:
        why = f"{answer_tokens} new tokens leave no room for a prompt in the context of {n_ctx}"
        raise UserError(f"{task.name}: {why}: lower --max_new_tokens")
    items = []
    n_cut = 0
    n_solved = 0
    for row, before in with_shots(task, limit, seed):
        item = Item(row, before, read_row(task, row), [])
        if f"{item.question.stem()}{task.delimiter}" in before:
            n_solved += 1
        if task.kind != "generate":
            item.requests, was_cut = score_requests(task, tok, item, n_ctx)
        else:
            room = n_ctx - answer_tokens
            if net.config.is_seq2seq:
                ids = tok.source(item.prompt)
            else:
                ids = prompt_ids(task, tok, item.prompt, row.get("history", []))
            was_cut = len(ids) > room
            # An empty continuation for each answer that is to be made.
            item.requests = [Request("", ids[-room:], [[]] * num_samples)]
        n_cut += was_cut
        items.append(item)
    return items, n_cut, n_solved


def prompt_ids(task, tok, prompt, history=()):
    """The ids of a prompt that an answer follows; of a chat, behind the messages of `history`."""
    try:
        if chat:
            turn = {"role": "user", "content": prompt}
            return tok.chat([*history, turn], add_generation_prompt=True)[0]
        ids = tok.start + tok.encode(prompt)
    except UnicodeEncodeError as error:  # half a pair of surrogates, which JSON can hold
        raise UserError(f"{task.name}: {error}: {prompt[:80]!r}") from None
    if not ids and tok.eot_id is None:
        raise UserError(f"{task.name}: an empty prompt, and no token that starts a document")
    return ids or [tok.eot_id]


# --------------------------------------------------------------------------------------------------
# The network answers


def score(net, requests, greedy=False):
    """For each request the sums of log p of its continuations, in nats: lists of floats; with
    `greedy` of [sum, whether the network would say just that]."""
    if fast:
        return shared_scores(net, requests, greedy)
    return plain_scores(net, requests, greedy)


def complete(net, tok, task, requests):
    """num_samples answers to each prompt, as lists of texts."""
    prompts = []
    for request in requests:
        prompts += [request.context] * num_samples
    # A batch draws by its first prompt: as before in a run that continues, and the same on any
    # number of processes, but not as another batch does.
    digest = hashlib.sha256(json.dumps([seed, prompts[0]]).encode()).hexdigest()
    generations = generate(
        net,
        tok,
        prompts,
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        temperature=temperature,
        seed=int(digest[:7], 16),
        stop=task.stop,
    )
    texts = iter([generation.text for generation in generations])
    return [list(islice(texts, num_samples)) for _ in requests]


# --------------------------------------------------------------------------------------------------
# Scores of tasks of questions


def run_questions(task, net, tok, answers, say):
    """Scores of a task of questions, overall and by subject, and its samples."""
    items, n_cut, n_solved = make_items(task, net, tok)
    if n_solved:
        why = "the examples hold them, and the harness draws them too"
        say(f"{task.name}: {n_solved} of {len(items)} questions stand among their own shots, "
            f"solved: {why}")  # fmt: skip
    if n_cut:
        say(f"{task.name}: {n_cut} of {len(items)} prompts are cut from the left to the context")
    if task.kind == "choice":
        return total_scores(items, judge_choices(task, net, answers, items))
    if task.kind == "continue":
        return total_scores(items, judge_continuations(task, net, answers, items))
    texts = answer_texts(task, net, tok, answers, items)
    if task.program:
        judgements = judge_programs(task, answers, items, texts)
    elif task.rubric and not task.judge:
        judgements = judge_by_rubric(task, answers, items, texts)
    else:
        judgements = judge_texts(task, items, texts)
    return total_scores(items, judgements)


def judge_choices(task, net, answers, items):
    """For each item, ({metric: value}, what --samples shows), of choices."""
    requests = []
    for item in items:
        requests += item.requests

    def work(batch):
        return score(net, batch)

    replies = iter(answers(task.name, "score", requests, work))
    judgements = []
    for item in items:
        logprobs = []  # of each choice, in nats
        for _ in item.requests:
            logprobs += next(replies)
        judgements.append(judge_choice(task, item.question, logprobs))
    return judgements


def judge_continuations(task, net, answers, items):
    """For each item the same, of an answer that is compared with the likeliest one."""
    requests = [item.requests[0] for item in items]

    def work(batch):
        return score(net, batch, greedy=True)

    replies = answers(task.name, "greedy", requests, work)
    return [judge_continuation(reply) for [reply] in replies]


def answer_texts(task, net, tok, answers, items):
    """The model's answers to each question: lists of num_samples texts."""
    answer_tokens = max_new_tokens or task.max_new_tokens
    depends_on = ["complete", num_samples, temperature, seed, task.stop, answer_tokens]

    def work(batch):
        return complete(net, tok, task, batch)

    requests = [item.requests[0] for item in items]
    return answers(task.name, depends_on, requests, work)


def judge_texts(task, items, texts):
    """For each item the same, of answers that a function judges."""
    judgements = []
    for item, item_texts in zip(items, texts):
        metrics = checked_judgement(task, item.row, item_texts)
        judgements.append((metrics, {"answers": item_texts}))
    return judgements


def judge_programs(task, answers, items, texts):
    """For each item the same, of code: pass@k, by running each answer's program in the sandbox."""
    requests = []
    for item, item_texts in zip(items, texts):
        for answer in item_texts:
            requests.append(Request("", [write_program(task, item.row, answer)], []))

    def work(batch):
        sources = [request.context[0] for request in batch]
        return run_programs(sources, weak=allow_weak_sandbox)

    # 32 at a time: no more than that is lost with a kill.
    replies = iter(answers(f"{task.name}, programs", "run", requests, work, max_tokens=32))
    judgements = []
    for item_texts in texts:
        n = len(item_texts)
        verdicts = list(islice(replies, n))
        n_passed = verdicts.count("passed")
        metrics = {}
        for k in (1, 10, 100):
            if k <= n:
                metrics[f"pass@{k}"] = pass_at_k(n, n_passed, k)
        judgements.append((metrics, {"answers": item_texts, "verdicts": verdicts}))
    return judgements


def judge_by_rubric(task, answers, items, texts):
    """For each item the same, of its first answer, which the model at judge_url rates."""
    requests = []
    for item, item_texts in zip(items, texts):
        requests.append(Request("", [item.question.prompt, item_texts[0]], []))

    def work(batch):
        ratings = []
        for request in batch:
            question, answer = request.context
            ratings.append(ask_judge(judge_url, judge_model, question, answer, task.rubric))
        return ratings

    depends_on = ["rate", judge_url, judge_model, task.rubric]
    # One at a time (a question and an answer are two), so that what was paid for is kept.
    ratings = answers(f"{task.name}, ratings", depends_on, requests, work, max_tokens=2)
    judgements = []
    for rating, item_texts in zip(ratings, texts):
        judgements.append(({"rating": rating}, {"answers": item_texts}))
    return judgements


def run_core_rows(name, opened, net, tok, answers, say):
    """The scores of CORE, or of one of its tasks."""

    def work(batch):
        return score(net, batch, greedy=True)

    return run_core(name, opened, tok, net.config.n_ctx, seed, answers, work, say)


# --------------------------------------------------------------------------------------------------
# Loss of validation shards, or of any text


@dataclass
class Piece:
    """A document, or a window of the validation shards: what the standard error takes to be
    independent of the others."""

    requests: list  # its windows, each of one continuation
    n_bytes: int
    n_words: int = 0  # of documents


def run_loss(net, tok, answers, say):
    """Loss (nats per token), perplexity and bits per byte of validation shards, by source, or of
    texts, whose first token follows the one that starts a document."""
    if fills_gaps(net.config):
        if asked_lengths():
            raise UserError(f"lengths={lengths}: expected a model that predicts the next token")
        return run_gaps(net, tok, answers)
    length = window_length(net)
    if text:
        pieces = {"": text_pieces(tok, length)}
    else:
        pieces = shard_pieces(tok, length)
    requests = []
    for source_pieces in pieces.values():
        for piece in source_pieces:
            requests += piece.requests
    by_position = {}
    if length > net.config.n_ctx:
        logprobs, by_position = score_beyond(net, answers, requests, length)
    else:
        sums = answers("loss", "score", requests, lambda batch: score(net, batch))
        logprobs = [window_sums[0] for window_sums in sums]
    replies = iter(logprobs)
    scores = {}
    by = {}
    log = []
    for source, source_pieces in pieces.items():
        rows = piece_rows(source, source_pieces, replies)
        log += rows
        if rows:
            scores[source] = score_source(source_pieces, rows)
            if source:
                by[source] = flat(scores[source]) | {"n": len(source_pieces)}
    if not scores:
        raise UserError(f"data/{dataset}: no token to score: its shards hold one, or none")
    # Shards that are all of a source have none of all together: the first source stands for it.
    whole = "" if "" in scores else next(iter(scores))
    by |= by_position | loss_by_length(net, tok, answers)
    return Result(scores[whole], len(pieces[whole]), by, log)


def loss_by_length(net, tok, answers):
    """{"length 512": its loss, flat} of windows of each of `lengths`, beyond the model's context
    too: of the same tokens for each, so that only what stands before them differs."""
    by = {}
    for length in asked_lengths():
        if text:
            pieces = text_pieces(tok, length)
        else:
            pieces = pieces_of_length(tok, length)
        requests = []
        for piece in pieces:
            requests += piece.requests

        def work(batch):
            return score_by_position(net, batch, length)

        sums = answers(f"loss at {length:,}", ["by position", length], requests, work)
        rows = piece_rows("", pieces, iter([sum(parts) for parts in sums]))
        if rows:
            by[f"length {length}"] = flat(score_source(pieces, rows)) | {"n": len(pieces)}
    return by


def pieces_of_length(tok, length):
    """[Piece] of the validation shards' windows of the longest of `lengths`, of all sources or the
    first, each cut into windows of this length."""
    by_source = shard_pieces(tok, max(asked_lengths()))
    pieces = by_source.get("") or next(iter(by_source.values()))
    for piece in pieces:
        [window] = piece.requests
        ids = window.context + window.continuations[0]
        piece.requests = []
        for begin in range(0, len(ids) - 1, length):
            part = ids[begin : begin + length + 1]
            piece.requests.append(Request("", part[:1], [part[1:]]))
    return pieces


def asked_lengths():
    """The numbers that `lengths` has."""
    numbers = []
    for word in lengths.split(","):
        if not word.strip():
            continue
        if not word.strip().isdecimal() or not 0 < int(word) < 2**31:
            raise UserError(f"--lengths={lengths}: expected numbers of tokens, such as 256,512")
        numbers.append(int(word))
    return numbers


def piece_rows(source, pieces, replies):
    """[{source, nats, tokens, bytes}] of one source's pieces, by the log p of their windows, which
    are the next of `replies`; [] where they hold no token to score."""
    rows = []
    n_tokens_in_all = 0
    for piece in pieces:
        logprob = sum(islice(replies, len(piece.requests)))
        n_tokens = 0
        for request in piece.requests:
            n_tokens += len(request.continuations[0])
        n_tokens_in_all += n_tokens
        n_bytes = max(piece.n_bytes, 1e-9)  # special tokens alone have none
        rows.append({"source": source, "nats": -logprob, "tokens": n_tokens, "bytes": n_bytes})
    return rows if n_tokens_in_all else []


def score_source(pieces, rows):
    """{metric: (value, error)} of one source's pieces and of what piece_rows says of them."""
    nats = [row["nats"] for row in rows]
    loss = mean(nats, [row["tokens"] for row in rows])
    nats_per_byte = mean(nats, [row["bytes"] for row in rows])
    scores = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": divided(nats_per_byte, math.log(2)),
    }
    if text:
        # As the harness has them, of documents alone: shards do not say where a word ends.
        scores["byte_perplexity"] = perplexity(nats_per_byte)
        scores["word_perplexity"] = perplexity(mean(nats, [piece.n_words for piece in pieces]))
    return scores


def window_length(net):
    """The tokens of a window; more than the model was trained with only where `context` asks."""
    n_ctx = net.config.n_ctx
    if context is None and seq_len > n_ctx:
        hint = f"--context={seq_len} looks beyond it"
        raise UserError(f"seq_len={seq_len}, but the context of {model} is {n_ctx}: {hint}")
    longest = max([context or 0, *asked_lengths()])
    if longest > n_ctx and net.config.pos == "learned":
        why = f"the positions of {model} are learned ones, which end at {n_ctx}"
        key = "context" if longest == context else "lengths"
        raise UserError(f"{key}={globals()[key]}: {why}")
    return context or seq_len or n_ctx


def shard_pieces(tok, length):
    """{source: [Piece]} of the validation shards, a window each; "" is all sources together."""
    pieces = {}
    for source, source_paths in shard_paths(tok).items():
        pieces[source] = []
        for window in shard_windows(source_paths, length, tok.n_vocab):
            n_bytes = sum(len(tok.token_bytes(token)) for token in window.continuations[0])
            pieces[source].append(Piece([window], n_bytes))
    return pieces


def shard_paths(tok):
    """{source: the paths of its validation shards}; "" is all sources together."""
    folder = Path("data") / dataset
    paths = {}
    for path in sorted(folder.glob("val_*.bin")):
        paths.setdefault("", []).append(path)
    for path in sorted(folder.glob("val.*.bin")):  # val.SOURCE_000000.bin
        source = path.name.removeprefix("val.").rpartition("_")[0]
        paths.setdefault(source, []).append(path)
    if not paths:
        raise UserError(f"{folder}: no validation shards ({command_of('prepare')} makes them)")
    if Tokenizer.from_folder(folder).bytes != tok.bytes:
        raise UserError(f"{folder} and {model} have different tokenizers: score --text instead")
    return paths


def shard_windows(paths, length, n_vocab):
    """The requests of eval_tokens of the shards, evenly spread: train.py's validation windows."""
    shards = [open_shard(path) for path in paths]
    starts = []  # (which shard, where) of every window
    for s, shard in enumerate(shards):
        for begin in range(0, len(shard) - 1, length):  # - 1: the last token has no next one
            starts.append((s, begin))
    n = len(starts)
    if eval_tokens:
        n = min(n, math.ceil(eval_tokens / length))
    for k in range(n):
        s, begin = starts[k * len(starts) // n]
        window = shards[s][begin : begin + length + 1]
        check_tokens(window, n_vocab, paths[s])
        ids = window.tolist()
        yield Request("", ids[:1], [ids[1:]])


def text_pieces(tok, length):
    """[Piece] of the documents of `text`."""
    if tok.eot_id is None:
        raise UserError("this tokenizer has no token that could stand before a text")
    pieces = []
    for document in read_text(Path(text)):
        windows = text_windows(tok.start + tok.encode(document), tok.eot_id, length)
        n_words = len(re.split(r"\s+", document))  # as the harness counts them
        pieces.append(Piece(list(windows), len(document.encode()), n_words))
    return pieces


def text_windows(ids, prefix, length):
    """The requests that score each of a document's ids once: full windows, the last one with as
    much before it as fits (the harness's rolling log-likelihood)."""
    for begin in range(0, len(ids), length):
        end = min(begin + length, len(ids))
        before = ids[max(0, end - length - 1) : begin]
        yield Request("", before or [prefix], [ids[begin:end]])


# Of an encoder behind its masks, of an encoder-decoder where spans are cut out


def run_gaps(net, tok, answers):
    """Loss (nats per hidden token), perplexity and accuracy (the likeliest token is the right one)
    of validation shards, by source, with the masks of train.py's validation, or of texts."""
    length = window_length(net)
    name = "span" if net.config.is_seq2seq else "mlm"
    vocabulary = vocabulary_of(tok, net.start_id)
    objective = Objective(name, vocabulary, VALIDATION_SEED, mask_rate)
    objective.check(length)
    windows = {"": text_gap_windows(tok, length)} if text else shard_gap_windows(tok, length)
    requests = [request for of_source in windows.values() for request in of_source]

    def work(batch):
        rows = []
        for request in batch:
            [[number]] = request.continuations
            rows.append(objective.row(np.array(request.context), number))
        return score_targets(net, padded_batch(rows, device_of(net))).tolist()

    replies = iter(answers("loss", [name, mask_rate], requests, work))
    scores = {}
    by = {}
    for source, of_source in windows.items():
        figures = np.array([next(replies) for _ in of_source])  # (windows, 3)
        if len(figures) == 0:
            continue
        nats, n_targets, n_right = figures.T
        loss = mean(nats, n_targets)
        scores[source] = {"loss": loss, "perplexity": perplexity(loss)}
        scores[source]["accuracy"] = mean(n_right, n_targets)
        if source:
            by[source] = flat(scores[source]) | {"n": len(of_source)}
    if not scores:
        raise UserError(f"data/{dataset}: no window of {length} tokens: lower --seq_len")
    whole = "" if "" in scores else next(iter(scores))
    return Result(scores[whole], len(windows[whole]), by)


def shard_gap_windows(tok, length):
    """{source: [Request]} of windows of the validation shards, as train.py's: the ids, and instead
    of a continuation the window's number, by which it is masked."""
    requests = {}
    for source, paths in shard_paths(tok).items():
        windows = Windows(paths, length, n_vocab=tok.n_vocab)
        n = windows.n
        if eval_tokens:
            n = min(n, math.ceil(eval_tokens / length))
        numbers = [i * windows.n // n for i in range(n)]
        rows = windows.rows(numbers)[:, :-1].tolist() if n else []
        requests[source] = [Request("", ids, [[i]]) for ids, i in zip(rows, numbers)]
    return requests


def text_gap_windows(tok, length):
    """The same of the documents of `text`; what is left at a document's end, too, but for less than
    what a span needs."""
    requests = []
    room = length - len(tok.start) - len(tok.end)
    if room < SHORTEST:
        raise UserError(f"windows of {length} tokens: expected {SHORTEST + length - room} or more")
    for document in read_text(Path(text)):
        ids = tok.encode(document)
        for begin in range(0, len(ids), room):
            part = ids[begin : begin + room]
            if len(part) >= SHORTEST:
                window = tok.start + part + tok.end
                requests.append(Request("", window, [[len(requests)]]))
    if not requests:
        raise UserError(f"{text}: expected texts of {SHORTEST} tokens, to hide some of them")
    return requests


# Beyond the context: how the loss grows with the position, where a model was not trained


def score_beyond(net, answers, requests, length):
    """(log p of each window's tokens; {"positions 0 to …": its loss, flat}) of windows longer than
    the context. A range of positions is a quarter of the context, at most 16 of them in all."""
    width = math.ceil(net.config.n_ctx / 4)
    if length > 4 * net.config.n_ctx:
        width = math.ceil(length / 16)

    def work(batch):
        return score_by_position(net, batch, width)

    sums = answers("loss", ["by position", width], requests, work)
    return [sum(parts) for parts in sums], loss_by_position(requests, sums, width)


def loss_by_position(requests, sums, width):
    """{"positions 0 to …": its loss and the number of its tokens}, all windows together."""
    nats = {}  # {range: [a number for each window]}
    tokens = {}
    for request, parts in zip(requests, sums):
        first = len(request.context) - 1
        places = range(first, first + len(request.continuations[0]))
        for part, n in Counter(place // width for place in places).items():
            nats.setdefault(part, []).append(-parts[part])
            tokens.setdefault(part, []).append(n)
    by = {}
    for part in sorted(nats):
        name = f"positions {part * width} to {(part + 1) * width - 1}"
        by[name] = flat({"loss": mean(nats[part], tokens[part])}) | {"n": sum(tokens[part])}
    return by


# --------------------------------------------------------------------------------------------------
# Heads and vectors: a classifier's labels; the rest by barelm/head_tasks.py

OF_HEADS = ("classify", "tag", "span")  # which need a head of that task


def own_rows(name):
    """(the rows, their path) of a task set: of the data set, or those of `rows_file`."""
    path = Path(rows_file) if rows_file else Path("data") / dataset / f"{name}_val.jsonl"
    return list(limited(read_rows(path), limit)), path


def run_tags(net, tok, answers, say):
    scores, n, log = run_tag(net, tok, answers, *own_rows("tag"), seed)
    return Result(scores, n, samples=log)


def run_spans(net, tok, answers, say):
    scores, n, log = run_span(net, tok, answers, *own_rows("span"))
    return Result(scores, n, samples=log)


def run_nearest(net, tok, answers, say):
    of_text = pooling or pooling_of(net)
    scores, n, log = run_neighbours(net, tok, answers, *own_rows("embed"), of_text, say)
    return Result(scores, n, samples=log)


def run_likeness(net, tok, answers, say):
    of_text = pooling or pooling_of(net)
    scores, n, log = run_sts(net, tok, answers, *own_rows("sts"), of_text, seed)
    return Result(scores, n, samples=log)


def run_classify(net, tok, answers, say):
    """Accuracy and macro F1 (the mean over the labels that occur), its error by bootstrap."""
    task_rows, path = own_rows("classify")
    requests = []
    labels = []
    try:
        for row in task_rows:
            ids, _ = tok.whole_text(row["text"], net.config.n_ctx)
            requests.append(Request("", ids, []))
            labels.append(str(row["label"]))
    except ROW_ERRORS as error:
        raise UserError(f"{path}: expected text and label in each record: {error!r}") from None
    names = [str(label) for label in net.labels]
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise UserError(f"{path}: label {unknown[0]!r} is none of {model}'s: {', '.join(names)}")
    if not task_rows or not all(request.context for request in requests):
        raise UserError(f"{path}: an empty text has no label")

    def work(batch):
        return net.scores([request.context for request in batch]).tolist()

    label_scores = answers("classify", "classify", requests, work)  # a list for each text
    right = np.array([names.index(label) for label in labels])
    guesses = np.argmax(label_scores, axis=1)
    scores = {"accuracy": mean(right == guesses)}
    scores["f1"] = macro_f1(right, guesses), f1_error(right, guesses)
    log = []
    for row, label, guess, row_scores in zip(task_rows, labels, guesses, label_scores):
        sample = {"text": row["text"], "label": label, "answer": names[guess]}
        log.append(sample | {"scores": row_scores})
    return Result(scores, len(task_rows), samples=log)


def macro_f1(right, guesses):
    """The mean F1 of the labels that occur in `right`."""
    f1 = []
    for label in np.unique(right):
        hits = ((right == label) & (guesses == label)).sum()
        f1.append(2 * hits / ((right == label).sum() + (guesses == label).sum()))
    return float(np.mean(f1))


def f1_error(right, guesses):
    """Its standard error: the spread over 200 samples of the rows, drawn with replacement."""
    rng = np.random.default_rng(abs(seed))  # as random.Random, which draws the shots
    values = []
    for _ in range(200):
        drawn = rng.integers(0, len(right), len(right))
        values.append(macro_f1(right[drawn], guesses[drawn]))
    return float(np.std(values, ddof=1))


# --------------------------------------------------------------------------------------------------
# A source and its target: of an encoder-decoder, or of a decoder as a conversation


def run_seq2seq(net, tok, answers, say):
    """Loss of the targets (nats per token, the end token among them); exact match, ROUGE-L and chrF
    of what is generated from the sources."""
    path = Path("data") / dataset / "seq2seq_val.jsonl"
    rows = list(limited(read_rows(path), limit))
    pairs = []  # (ids of the source, ids of the target) of each row
    try:
        for row in rows:
            pairs.append(pair_ids(net, tok, row["source"], row["target"]))
    except ROW_ERRORS as error:
        raise UserError(f"{path}: expected source and target in each record: {error!r}") from None
    nats, tokens = target_nats(net, answers, pairs, say)
    texts = generated_texts(net, tok, answers, [source for source, _ in pairs], say)
    counts = []  # what chrF counts in each text
    log = []
    for row, text, row_nats, n_tokens in zip(rows, texts, nats, tokens):
        text = text.strip()
        target = row["target"].strip()
        counts.append(chrf_counts(text, target))
        figures = {"exact_match": float(text == target), "rouge_l": rouge_l(text, target)}
        figures |= {"chrf": chrf(counts[-1]), "nats": row_nats, "tokens": n_tokens}
        log.append({"source": row["source"], "target": target, "answer": text} | figures)
    loss = mean(nats, tokens)
    scores = {"loss": loss, "perplexity": perplexity(loss)}
    for metric in ("exact_match", "rouge_l"):
        scores[metric] = mean([sample[metric] for sample in log])
    scores["chrf"] = corpus_chrf(counts)
    return Result(scores, len(rows), samples=log)


def pair_ids(net, tok, source, target):
    """(what the network reads, what it is to answer) of a row, as ids. A decoder reads the source
    as a user's turn, where its tokenizer has a chat template."""
    text = source_template.replace("{source}", source)
    if not net.config.is_seq2seq and tok.config.get("chat_template"):
        talk = [{"role": "user", "content": text}, {"role": "assistant", "content": target}]
        ids, is_said = tok.chat(talk)
        first = is_said.index(1)
        end = first + sum(is_said)
        return ids[:first], ids[first:end]
    end_ids = [] if tok.end_id is None else [tok.end_id]
    answer = tok.encode(target) + end_ids
    if net.config.is_seq2seq:
        return tok.source(text), answer
    return tok.prompt(text), answer


def target_nats(net, answers, pairs, say):
    """-log p of each target, and its tokens: of each pair of ids (source, target)."""
    requests = []
    n_cut = 0
    n_ctx = net.config.n_ctx
    for source, target in pairs:
        room = n_ctx
        if not net.config.is_seq2seq:  # both are in one row
            room = max(1, n_ctx + 1 - len(target))
        n_cut += len(source) > room or len(target) > n_ctx
        requests.append(Request("", cut_source(net, source, room), [target[:n_ctx]]))
    if n_cut:
        say(f"seq2seq: {n_cut} of {len(pairs)} sources or targets are cut to the context")

    def work(batch):
        if net.config.is_seq2seq:
            return [[logp] for logp in target_scores(net, batch)]
        return score(net, batch)

    sums = answers("seq2seq, targets", "targets", requests, work)
    lengths = [len(request.continuations[0]) for request in requests]
    return [-row_sums[0] for row_sums in sums], lengths


def cut_source(net, source, room):
    """A source of `room` tokens at most: an encoder's without the last ones before its end token,
    as in training, a decoder's without the first."""
    if len(source) <= room:
        return source
    if net.config.is_seq2seq:
        return [*source[: room - 1], source[-1]]
    return source[-room:]


def generated_texts(net, tok, answers, sources, say):
    """What the network answers to each source, greedily, by a beam search, or drawn."""
    n_new = max_new_tokens or SEQ2SEQ_TOKENS
    room = net.config.n_ctx
    if not net.config.is_seq2seq:
        n_new = min(n_new, room // 2)
        room -= n_new
    requests = [Request("", cut_source(net, source, room), [[]]) for source in sources]

    def work(batch):
        generations = generate(
            net,
            tok,
            [request.context for request in batch],
            max_new_tokens=n_new,
            temperature=temperature,
            num_beams=num_beams,
            seed=abs(seed),
        )
        return [generation.text for generation in generations]

    depends_on = ["complete", n_new, temperature, num_beams, seed]
    return answers("seq2seq, answers", depends_on, requests, work)


def corpus_chrf(counts):
    """chrF of all texts together, and its standard error by bootstrap; counts: [chrf_counts]."""
    counts = np.array(counts)  # (n, MAX_N, 3)
    rng = np.random.default_rng(abs(seed))
    values = []
    for _ in range(200):
        drawn = rng.integers(0, len(counts), len(counts))
        values.append(chrf(counts[drawn].sum(0).tolist()))
    return chrf(counts.sum(0).tolist()), float(np.std(values, ddof=1))


# --------------------------------------------------------------------------------------------------
# The run

WITHOUT_QUESTIONS = {
    "loss": run_loss,
    "classify": run_classify,
    "tag": run_tags,
    "span": run_spans,
    "neighbours": run_nearest,
    "sts": run_likeness,
    "seq2seq": run_seq2seq,
}


def check_settings():
    """Refuse what no run can have before anything is read."""
    config = settings(globals())
    counts = ["limit", "shots", "seq_len", "eval_tokens", "max_new_tokens", "temperature"]
    check_least(config, counts, 0)
    if pooling not in (None, *POOLINGS):
        raise UserError(f"--pooling={pooling}: expected {', '.join(POOLINGS)}")
    check_least(config, ["context", "num_samples", "micro_tokens", "num_beams"], 1)
    if "{source}" not in source_template:
        raise UserError(f"source_template={source_template!r}: expected {{source}} in it")
    if not 0 < mask_rate < 1:
        raise UserError(f"mask_rate={mask_rate}: expected more than 0, and less than 1")
    if context is not None and context >= 2**31:  # no text is so long
        raise UserError(f"context={context}: expected less than 2,147,483,648")
    if num_samples > 1 and temperature < GREEDY:
        raise UserError("num_samples: greedy answers are all the same: give --temperature=0.8")


def task_names():
    """The names that `tasks` has."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks={tasks}: expected a task, or some with commas between them")
    if context and "loss" not in names:
        raise UserError(f"context={context}: it is for --tasks=loss alone")
    if asked_lengths() and "loss" not in names:
        raise UserError(f"lengths={lengths}: it is for --tasks=loss alone")
    return names


def check_head(net, names):
    """Refuse tasks that a network's last layer does not fit: a classifier has no words to say."""
    for name in names:
        if name in ("neighbours", "sts"):  # of any network
            continue
        if net.score is None and name in OF_HEADS:
            raise UserError(f"{model} with --tasks={tasks}: expected a model of {name}")
        if net.score is not None and name != net.task:
            expected = f"--tasks={net.task}, and no other"
            raise UserError(f"{model} with --tasks={tasks}: expected {expected}")


def scale_rope(net):
    """Give a rotary network the `rope_scaling` that was asked for, and its config's checks."""
    if net.config.pos != "rope":
        raise UserError(f"rope_scaling: {model} has pos={net.config.pos}: expected rope")
    net.config.rope_scaling = replace(net.config, rope_scaling=rope_scaling).rope_scaling


def check_order(net, names, opened):
    """Refuse tasks for which a network reads text in another order. opened: {name: Task}, those of
    questions."""
    for name in names:
        if name == "seq2seq" or name in opened or is_core(name):
            if not net.config.causal:
                why = "an encoder fills masks, and continues no prompt: expected --tasks=loss"
                raise UserError(f"{model} with --tasks={name}: {why}")
            is_scored = is_core(name) or (name in opened and opened[name].kind != "generate")
            if net.config.is_seq2seq and is_scored:
                why = "an encoder-decoder answers a source: expected seq2seq, or generation"
                raise UserError(f"{model} with --tasks={name}: {why}")


def results_folder():
    """The folder where results.json is written."""
    if out_dir == "":
        raise UserError("--out_dir is empty: expected the name of a folder")
    folder = Path(out_dir or model)
    if not out_dir and not folder.is_dir():
        raise UserError(f"{model}: no folder here to write results.json into: give --out_dir")
    return folder


def write_samples(folder, name, rows):
    """samples_TASK.jsonl, a question a line; of a task's name, what a file's name may hold."""
    plain_name = re.sub(r"[^\w.-]+", "_", name)[-200:]
    with whole_file(folder / f"samples_{plain_name}.jsonl") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
            file.write(line.encode(errors="replace"))  # halves of surrogate pairs, which JSON had


def say_scores(run, net, folder, entries):
    """The last lines: each score with its standard error, where they are, what comes next.
    entries: {task: its entry of results.json}."""
    lines = {}
    for name, entry in entries.items():
        for key, value in entry.items():
            if isinstance(value, dict) or key.endswith("_stderr"):
                continue
            lines[f"{name}.{key}"] = score_words(entry, key) or None
    lines["results"] = str(folder / "results.json")
    if samples:
        lines["samples"] = str(folder / "samples_*.jsonl")
    run.say("")
    for line in figure_lines(lines | after_scores(net, model, folder)):
        run.say(line)


def main():
    # Some processes are done long before others.
    run = setup(device, timedelta(days=30), threads)
    run.threads.note()
    # Whatever can be refused is, before the weights are read.
    check_settings()
    names = task_names()
    cores = {name: open_core_rows(name, run) for name in names if is_core(name)}
    others = {*WITHOUT_QUESTIONS, *cores}
    opened = {name: open_task(name, run) for name in names if name not in others}
    compute, _ = choose_dtype(run.device, dtype)
    net, tok = load(model, run.device, compute, quantize, fast)
    if deterministic:
        be_deterministic(net)
    check_head(net, names)
    if rope_scaling:
        scale_rope(net)
    check_order(net, names, opened)
    folder = results_folder()
    mark = model_mark(model, compute, quantize, fast, deterministic, rope_scaling)
    answers = Answers(folder, mark, run, micro_tokens)
    mark_before, results = read_results(folder)
    if mark_before != mark:  # of another model: not to be mixed with this one's
        results = {}

    for name in names:
        begun = time.monotonic()
        with torch.inference_mode(), generating(net):
            if name in WITHOUT_QUESTIONS:
                result = WITHOUT_QUESTIONS[name](net, tok, answers, run.say)
            elif name in cores:
                result = run_core_rows(name, cores[name], net, tok, answers, run.say)
            else:
                result = run_questions(opened[name], net, tok, answers, run.say)
        entry = flat(result.scores) | {"n": result.n}
        entry["seconds"] = round(time.monotonic() - begun, 3)
        entry["settings"] = settings(globals())
        # Those that were used: a task has a usual number of its own.
        if name not in cores:  # whose 22 have as many as each has
            entry["settings"]["shots"] = opened[name].shots if name in opened else None
        if result.by:
            entry["by"] = result.by
            run.say("\n".join(score_table(name, result.by)))
        results[name] = entry
        if samples and run.is_main:
            write_samples(folder, name, result.samples)
        if run.is_main:  # after each task: what is done is done
            write_results(folder, model, mark, results)

    answers.close()
    if run.is_main:
        say_scores(run, net, folder, {name: results[name] for name in names})


if __name__ == "__main__":
    if sys.stdout is not None:  # closed by whoever started this
        sys.stdout.reconfigure(errors="backslashreplace")  # a subject may hold half a letter
    try:
        with lost_process():
            main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: lower micro_tokens (now {micro_tokens})") from None
