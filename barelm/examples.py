"""Rows become examples: a task's JSONL file is read, tokenized, cut to the context and batched.

An example is a dict. `ids` are the inputs, and `targets`, of the same length, the next tokens to
learn, IGNORED where there is none (`labels` are those among them that the data has, where others
are a network's own); an encoder-decoder's has its `source` and `targets`, a
classifier's has a `label`, a pair of answers has `chosen` and `rejected`, one of vectors `texts`.
`row` names the line that it came from, `cut` says whether it was too long."""

from __future__ import annotations

import ast
import contextlib
import functools
import string
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from barelm.files import parse_json
from barelm.run import UserError, to_device
from model import call_block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from barelm.run import Run
    from barelm.tokenizer import Tokenizer
    from model import GPT

IGNORED = -100  # as F.cross_entropy has it: no target here

# --------------------------------------------------------------------------------------------------
# Reading


def task_file(dataset: str, task: str, split: str) -> Path:
    return Path("data") / dataset / f"{task}_{split}.jsonl"


def read_rows(dataset: str, task: str, split: str) -> list[dict]:
    """The records of a split of a task's file; of data set `arithmetic`, which is none, sums."""
    if dataset == "arithmetic":
        return arithmetic_rows(split)
    path = task_file(dataset, task, split)
    if not path.is_file():
        if split == "val":  # training goes on without validation
            return []
        from config import command_of  # here, since the scripts alone need it

        make = f"{command_of('prepare')} --task={task} --source=... --dataset={dataset}"
        raise UserError(f"{path}: no such file: {make} makes it")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # at \n and \r alone
        rows.append(parse_json(line, f"{path}:{number}"))
    return rows


def arithmetic_rows(split: str) -> list[dict]:
    """Conversations about the sums of two digits; one in seven is held out for validation."""
    rows = []
    for a in range(10):
        for b in range(10):
            held_out = (3 * a + b) % 7 == 0  # spread evenly over both digits
            if held_out == (split == "val"):
                question = {"role": "user", "content": f"{a} + {b} ="}
                answer = {"role": "assistant", "content": str(a + b)}
                rows.append({"messages": [question, answer]})
    return rows


def load_examples(dataset: str, task: str, split: str, read: Callable, tok: Tokenizer, limit: int,
                  say: Callable) -> list[dict]:  # fmt: skip
    """What `read(row, tok, limit)` makes of each record of a split, of `limit` tokens at most. A
    record that is no example is left out; how many were, and why, is said."""
    source = "sums" if dataset == "arithmetic" else task_file(dataset, task, split)
    examples = []
    left_out = {}  # {reason: rows}
    for number, row in enumerate(read_rows(dataset, task, split), 1):
        try:
            example = read(row, tok, limit)
        # What the code of a reader meets where a field is absent, or of another type.
        except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
            left_out.setdefault(reason_of(error), []).append(row)
        else:
            examples.append(example | {"row": f"{source}:{number}"})
    for reason, rows in left_out.items():
        say(f"{split}: {len(rows):,} records left out: {reason}, such as {str(rows[0])[:80]}")
    n_cut = sum(example.get("cut", False) for example in examples)
    if n_cut:
        say(f"{split}: {n_cut:,} examples cut to {limit} tokens")
    return examples


def reason_of(error: BaseException) -> str:
    """Why a record is no example: what a reader said, or what its fields did to Python."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyError):
        return f"no field {error}"
    return f"malformed: {error}"


def targets_of(ids: list[int], loss_mask: list[int]) -> tuple[list[int], list[int]]:
    """(inputs, targets) of tokens and a mask, 1 for those that are to be learned."""
    targets = [token if learn else IGNORED for token, learn in zip(ids, loss_mask)]
    return ids[:-1], targets[1:]  # each input is asked for the token behind it


def conversation_ids(messages: list[dict], tok: Tokenizer) -> list[int]:
    """The ids of a conversation as a reward model reads them: what transformers'
    apply_chat_template gives. The score is read at the last one that is no padding."""
    ids, _ = tok.chat(messages, answers="none")
    return ids


def count_targets(examples: list[dict]) -> int:
    return sum(t != IGNORED for e in examples for t in e["targets"])


# --------------------------------------------------------------------------------------------------
# Templates: plain records without a chat's markers


def parse_templates(template: str) -> list[str]:
    """The templates to choose from: one, or those of a list, which a flag gives as a text."""
    if not isinstance(template, str):
        return template
    # A template is no Python, or none that can be read.
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        value = ast.literal_eval(template)
        if isinstance(value, list):
            return value
    return [template]


def check_template(text: str) -> None:
    """Refuse a template that is none."""
    try:
        names = [name for _, name, *_ in string.Formatter().parse(text) if name is not None]
    except (ValueError, TypeError) as error:
        raise UserError(f"template {text!r}: {error}") from None
    one_output = names.count("output") == text.count("{output}") == 1
    # A name with a dot or a bracket would read attributes of Python's objects.
    if not one_output or not all(name.isidentifier() for name in names):
        fields = "{output} once, and others by name: {instruction}, {input}, {system}"
        raise UserError(f"template {text!r}: expected {fields}")


def fill_template(row: dict, tok: Tokenizer, templates: list[str]) -> tuple[list[int], list[int]]:
    """(ids, mask of what is to be learned) of a record by its own template, or else the one of
    `templates` that its text chooses. Turns follow each other, each with the end token behind it; a
    system prompt that the template does not name stands before the first."""
    # By the record's text, so that every run and every epoch chooses the same.
    template = templates[zlib.crc32(str(row).encode()) % len(templates)]
    if "{output}" in str(row.get("template")):  # some data have other things under this name
        template = row["template"]
        check_template(template)
    before, _, after = template.partition("{output}")
    ids = []
    if tok.eot_id is not None:  # as pre-training begins a document
        ids.append(tok.eot_id)
    loss_mask = [0] * len(ids)
    for fields in template_turns(row):
        question = before.format(**fields)
        if fields["system"] and "{system}" not in before:
            question = f"{fields['system']}\n\n{question}"
        question_ids = tok.encode(question)  # apart from the answer: no token is of both
        answer_ids = tok.encode(fields["output"] + after.format(**fields)) + tok.eos_ids[:1]
        ids += question_ids + answer_ids
        loss_mask += [0] * len(question_ids) + [1] * len(answer_ids)
    return ids, loss_mask


def template_turns(row: dict) -> list[dict]:
    """The fields of each turn of a record, for a template: instruction, input, output, system. Of a
    conversation each question and its answer are a turn; the last has the record's own fields."""
    empty = {"system": "", "instruction": "", "input": ""}
    row = {key: "" if value is None else value for key, value in row.items()}
    if "messages" not in row:
        return [empty | row]
    turns = []
    turn = dict(empty)
    for message in row["messages"]:
        if message.get("tool_calls"):
            raise UserError("calls of tools: the chat template writes them, no --template does")
        content = message["content"]
        if message["role"] == "assistant":  # which ends the turn
            turns.append(turn | {"output": content})
            turn = dict(empty)
        else:
            key = "system" if message["role"] == "system" else "instruction"
            turn[key] = f"{turn[key]}\n\n{content}" if turn[key] else content
    if turns:
        not_own = ("messages", "system", "output")
        turns[-1] |= {key: value for key, value in row.items() if key not in not_own}
    return turns


# --------------------------------------------------------------------------------------------------
# Batches


@functools.lru_cache(2)  # a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order (n,) of the n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_of(examples: list[dict], step: int, batch_size: int, seed: int) -> list[dict]:
    """The examples of a step, over all processes. All steps read one endless sequence, epoch after
    epoch, each in an order of its own."""
    batch = []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(i, len(examples))
        batch.append(examples[epoch_order(seed, epoch, len(examples))[place]])
    return batch


def share_of(examples: list[dict], run: Run) -> list[dict]:
    """Those of the examples that are this process's: every world-th, from its own rank on."""
    return examples[run.rank :: run.world]


def pack_rows(examples: list[dict], limit: int, several: bool = True) -> list[dict[str, list[int]]]:
    """The examples in rows of up to `limit` tokens, first fit, longest first; `docs` numbers those
    of a row, from 1. several: False for a row each."""
    rows = []
    longest_first = sorted(examples, key=lambda e: -len(e["ids"]))  # short ones fill the gaps
    for example in longest_first:
        row = None
        if several:
            most = limit - len(example["ids"])  # tokens of a row that has room for it
            row = next((r for r in rows if len(r["ids"]) <= most), None)
        if row is None:
            row = {"ids": [], "targets": [], "docs": []}
            rows.append(row)
        doc = max(row["docs"], default=0) + 1
        row["docs"] += [doc] * len(example["ids"])
        row["ids"] += example["ids"]
        row["targets"] += example["targets"]
        if "labels" in example:  # all have them, or none
            row["labels"] = row.get("labels", []) + example["labels"]
    return rows


def micro_batches(examples: list[dict], micro_tokens: int, net: GPT) -> Iterator[list[dict]]:
    """The examples in groups of `micro_tokens` tokens at most, padding counted, but one example at
    least. Their order is kept: near each other should stand those of like length."""
    group = []
    longest = [0, 0]  # to which all of the group are padded
    for example in examples:
        lengths = [padded_length(net, n) for n in row_lengths(example)]
        longest = [max(pair) for pair in zip(longest, lengths)]
        if group and n_rows(example) * sum(longest) * (len(group) + 1) > micro_tokens:
            yield group
            group = []
            longest = lengths
        group.append(example)
    if group:
        yield group


def n_rows(example: dict) -> int:
    """How many rows an example takes in a batch; a pair's answers are two."""
    if "texts" in example:
        return len(example["texts"])
    return 2 if "chosen" in example else 1


def row_lengths(example: dict) -> list[int]:
    """The tokens of an example's (longer) row, [n]; of a source and its target both."""
    if "chosen" in example:
        return [max(len(example["chosen"]["ids"]), len(example["rejected"]["ids"]))]
    if "source" in example:
        return [len(example["source"]), len(example["targets"])]
    if "texts" in example:
        return [max(map(len, example["texts"]))]
    return [len(example["ids"])]


def longest_row(example: dict) -> int:
    return max(row_lengths(example))


def n_tokens(example: dict) -> int:
    """How many tokens an example takes in a batch."""
    return n_rows(example) * sum(row_lengths(example))


def padded_length(net: GPT, longest: int) -> int:
    """To how many tokens rows are padded, of which the longest has so many: compiled blocks, and
    the memory that a GPU keeps, are for certain lengths alone: the multiples of 64 up to 512, and
    from there to each power of two four more."""
    if not is_compiled(net) and device_of(net).type != "cuda":
        return longest
    return rounded_length(longest, net.config.n_ctx)


def rounded_length(longest: int, n_ctx: int) -> int:
    unit = 64
    while 8 * unit < longest:
        unit *= 2
    length = -(-longest // unit) * unit
    return max(longest, min(length, n_ctx))  # no position lies behind the context


def is_compiled(net: GPT) -> bool:
    """Whether the network's blocks are, in the mode that it is in."""
    return net.block is not call_block


def device_of(net: GPT) -> torch.device:
    """Where a network is."""
    return net.model.embed_tokens.weight.device


def padded(sequences: list[dict], key: str, net: GPT, pad: int = 0) -> Tensor:
    """(B, T) int64, where the network is, of the lists that the sequences have under a key, padded
    on the right: T is `padded_length`'s."""
    return to_device(padded_on_host(sequences, key, net, pad), device_of(net))


def padded_on_host(sequences: list[dict], key: str, net: GPT, pad: int = 0) -> Tensor:
    T = padded_length(net, max(len(s[key]) for s in sequences))
    # On the right no real token sees the padding, attention being causal.
    rows = [s[key] + [pad] * (T - len(s[key])) for s in sequences]
    return torch.tensor(rows)


def places_of_targets(sequences: list[dict], net: GPT) -> tuple[Tensor, Tensor]:
    """Of a batch of sequences (B, T): the places of its N targets among its B T tokens, and the
    targets, (N,) int64 each. The host finds them: a device that is asked for what is not IGNORED
    has to be waited for, since it has to say how many they are."""
    targets = padded_on_host(sequences, "targets", net, IGNORED).flatten()  # (B T,)
    [places] = (targets != IGNORED).nonzero(as_tuple=True)
    device = device_of(net)
    return to_device(places, device), to_device(targets[places], device)
