"""Records of many forms as rows of the kinds of task sets: sft, preference, kto, classify, seq2seq,
tag, embed, span; and the records that Python's own source gives."""

from __future__ import annotations

import ast
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from barelm.clean import Reject, Tally, reject_if
from barelm.dedup import digest
from barelm.extraction import right_answers
from barelm.files import whole_file
from barelm.messages import FieldError, read_calls
from barelm.mix import SPLITS
from barelm.python_names import entities_of
from barelm.ratings import OF_RATINGS, is_rating, ratings_summary, rows_of_ratings
from barelm.run import Progress, UserError
from barelm.sources import raw_records
from barelm.tagging import words_of
from barelm.tool_use import read_tools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from barelm.sources import Unit

# The names that data sets give their fields.
ASK = ("instruction", "prompt", "question")
MORE = ("input", "context")
ANSWER = ("output", "response", "completion", "answer", "chosen")
TEXT = ("text", "sentence", "content", "review")
LABEL = ("label", "category", "class")
PAIRS = [("source", "target"), ("document", "summary"), ("article", "highlights")]
PAIRS += [("text", "summary"), ("dialogue", "summary"), ("article", "summary")]
PAIRS += [("instruction", "output"), ("input", "output")]
PAIRS += [("question", "answer"), ("prompt", "completion")]
EMBED_PAIRS = [("anchor", "positive"), ("query", "positive"), ("a", "b")]
EMBED_PAIRS += [("sentence1", "sentence2"), ("question", "answer"), ("query", "answer")]
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}


def first_text(record: dict, names: Sequence[str]) -> str:
    """The first of these fields that is a text with something in it, or ""."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def turns(value: list[dict[str, str]]) -> list[dict[str, str]]:
    """Messages of [{"role", "content"}] or ShareGPT's [{"from", "value"}]."""
    if not isinstance(value, list) or not value or {type(turn) for turn in value} != {dict}:
        raise Reject("messages are no list of turns")
    messages = []
    for turn in value:
        role = ROLES.get(turn.get("role", turn.get("from")))
        reject_if(role is None, "a role that is none of system, user, assistant, tool")
        content = turn.get("content", turn.get("value"))
        message = {"role": role, "content": content} | tool_fields(turn, role)
        is_empty = not isinstance(content, str) or not content.strip()
        reject_if(is_empty and "tool_calls" not in message, "a turn without text")
        messages.append(message)
    return messages


def tool_fields(turn: dict, role: str) -> dict:
    """What a turn has beside its text: calls of tools, which of them it answers, a thought."""
    fields = {}
    names = {"assistant": ["reasoning_content"], "tool": ["tool_call_id", "name"]}
    for name in names.get(role, []):
        value = turn.get(name)
        reject_if(value is not None and not isinstance(value, str), f"{name} is no text")
        if value:
            fields[name] = value
    if role == "assistant" and turn.get("tool_calls"):
        try:
            fields["tool_calls"] = read_calls(turn["tool_calls"], "a turn")
        except FieldError as error:
            raise Reject(str(error)) from None
    return fields


def tools_of(record: dict) -> dict:
    """{"tools"} of a record that has any: a list, or its JSON; of functions, or OpenAI's objects
    that have one."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise Reject("tools are no JSON") from None
    if not tools:
        return {}
    reject_if(not isinstance(tools, list), "tools are no list")
    nested = []
    for tool in tools:
        is_bare = isinstance(tool, dict) and "function" not in tool
        nested.append({"type": "function", "function": tool} if is_bare else tool)
    try:
        return {"tools": read_tools(nested)}
    except FieldError as error:
        raise Reject(str(error)) from None


def prompt_messages(record: dict) -> list[dict[str, str]]:
    """The messages before the answer: of Alpaca, Dolly, prompt and completion, question and answer;
    `system` and `history` [[user, assistant], ...] as LLaMA-Factory has them."""
    if isinstance(record.get("prompt"), list):  # messages already
        return turns(record["prompt"])
    question = first_text(record, ASK)
    context = first_text(record, MORE)
    reject_if(not question, "no messages, instruction, prompt or question")
    messages = []
    system = first_text(record, ["system"])
    if system:
        messages.append({"role": "system", "content": system})
    for user, assistant in record.get("history") or []:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    content = f"{question}\n\n{context}" if context else question
    messages.append({"role": "user", "content": content})
    return turns(messages)


def answer_text(value: str) -> str:
    """The text of an answer: a string, or messages that end with it."""
    text = value
    if isinstance(value, list):
        text = turns(value)[-1]["content"]
    reject_if(not isinstance(text, str) or not text.strip(), "an empty answer")
    return text


def as_sft(record: dict) -> dict:
    """The messages, and where the record has parts their texts, for finetune.py's --template."""
    parts = tools_of(record)
    conversation = record.get("messages", record.get("conversations"))
    if conversation is not None:
        messages = turns(conversation)
    else:
        # The first that says something: a preference record is a demonstration, too.
        answer = next((record[name] for name in ANSWER if record.get(name)), None)
        messages = prompt_messages(record)
        messages.append({"role": "assistant", "content": answer_text(answer)})
        if not isinstance(record.get("prompt"), list):
            parts["instruction"] = first_text(record, ASK)
            parts["input"] = first_text(record, MORE)
            parts["output"] = messages[-1]["content"]
    if first_text(record, ["template"]):
        parts["template"] = record["template"]
    has_answer = messages[-1]["role"] == "assistant" and len(messages) >= 2
    reject_if(not has_answer, "the last turn is not the assistant's")
    return {"messages": messages} | parts


def split_hh(chosen: str, rejected: str) -> tuple:
    """(messages, chosen answer, rejected one) of two dialogues as Anthropic's HH has them, which
    differ in the last answer."""
    mark = "\n\nAssistant:"
    common = len(os.path.commonprefix([chosen, rejected]))
    cut = chosen.rfind(mark, 0, common)  # the last answer begins where both still agree
    reject_if(cut < 0, "chosen and rejected do not answer the same")
    # "", speaker, text, speaker, text ...
    pieces = re.split(r"\n\n(Human|Assistant): ?", chosen[:cut])
    dialogue = []
    for speaker, text in zip(pieces[1::2], pieces[2::2]):
        dialogue.append({"from": speaker.lower(), "value": text})
    cut += len(mark)  # where the answers begin
    return turns(dialogue), chosen[cut:].strip(), rejected[cut:].strip()


def as_preference(record: dict) -> dict:
    """A prompt with an answer that was chosen and one that was rejected."""
    chosen = record.get("chosen")
    rejected = record.get("rejected")
    is_text = isinstance(chosen, str) and isinstance(rejected, str)
    if is_text and "\n\nAssistant:" in chosen:
        prompt, chosen, rejected = split_hh(chosen, rejected)
    elif isinstance(chosen, list) and not first_text(record, ASK) and not record.get("prompt"):
        prompt = turns(chosen)[:-1]
    else:
        prompt = prompt_messages(record)
    chosen = answer_text(chosen)
    rejected = answer_text(rejected)
    reject_if(not prompt, "no messages, instruction, prompt or question")
    reject_if(chosen == rejected, "chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def as_kto(record: dict) -> list[dict]:
    """A prompt with one answer and whether it is liked, as TRL's unpaired preferences have it; of a
    preference record two such rows."""
    if record.get("chosen") is not None and record.get("rejected") is not None:
        pair = as_preference(record)
        rows = []
        for name, label in (("chosen", True), ("rejected", False)):
            rows.append({"prompt": pair["prompt"], "completion": pair[name], "label": label})
        return rows
    label = record.get("label")
    reject_if(not isinstance(label, bool), "no chosen and rejected, nor a label of true or false")
    answer = next((record[name] for name in ANSWER if record.get(name)), None)
    prompt = prompt_messages(record)
    return [{"prompt": prompt, "completion": answer_text(answer), "label": label}]


def as_classify(record: dict) -> dict[str, str]:
    """A text with its label, as a string."""
    text = first_text(record, TEXT)
    label = next((record[name] for name in LABEL if record.get(name) is not None), None)
    has_label = isinstance(label, (str, int)) and str(label).strip()
    reject_if(not text or not has_label, "no text or no label")
    return {"text": text, "label": str(label)}


def as_seq2seq(record: dict) -> dict[str, str]:
    """A source text with its target: two fields of PAIRS, or the first two languages of a record
    {"translation": {"en": text, "fr": text}}, as the Hub's translations have it."""
    pairs = PAIRS
    translation = record.get("translation")
    if isinstance(translation, dict):
        record = translation
        pairs = [tuple(translation)[:2]]
        reject_if(len(translation) < 2, "a translation of fewer than two languages")
    for source_name, target_name in pairs:
        source = first_text(record, [source_name])
        target = first_text(record, [target_name])
        if source and target:
            return {"source": source, "target": target}
    raise Reject("no source and target, nor another known pair of fields")


def as_tag(record: dict) -> dict:
    """The words of a text with their tags, as BIO; or a text with the characters of its entities.
    A text whose lines are CoNLL's columns (a word first, its tag last) has words, too."""
    try:
        if "entities" in record:
            text, _, _ = words_of(record)  # or an error of what is wrong
            entities = []
            for entity in record["entities"]:
                entities.append({key: entity[key] for key in ("start", "end", "label")})
            return {"text": text, "entities": entities}
        if "tokens" not in record:
            record = columns_of(record.get("text"))
        _, _, tags = words_of(record)
    except KeyError as error:
        raise Reject(f"no field {error}") from None
    except UserError as error:
        raise Reject(str(error)) from None
    return {"tokens": record["tokens"], "tags": tags}


def columns_of(text: str) -> dict:
    """{"tokens", "tags"} of lines in columns."""
    lines = [line.split() for line in str(text).splitlines()]
    lines = [line for line in lines if line and line[0] != "-DOCSTART-"]
    reject_if(not lines or min(map(len, lines)) < 2, "no tokens with tags, nor text with entities")
    return {"tokens": [line[0] for line in lines], "tags": [line[-1] for line in lines]}


def as_embed(record: dict) -> dict[str, str]:
    """Two texts that belong together, and perhaps a third that does not; or one alone."""
    for names in EMBED_PAIRS:
        texts = [first_text(record, [name]) for name in names]
        if all(texts):
            pair = dict(zip(("anchor", "positive"), texts))
            negative = first_text(record, ["negative"])
            return pair | ({"negative": negative} if negative else {})
    text = first_text(record, TEXT)
    reject_if(not text, "no anchor and positive, nor another known pair of fields, nor a text")
    return {"text": text}


def as_span(record: dict) -> dict:
    """A question, a context, and the answers in it, as SQuAD has them."""
    question = first_text(record, ["question"])
    context = record.get("context")
    reject_if(not question or not isinstance(context, str) or not context, "no question or context")
    try:
        answers = right_answers(record)
    except (UserError, KeyError, ValueError) as error:
        raise Reject(str(error)) from None
    texts = [text for text, _ in answers]
    starts = [start for _, start in answers]
    answers = {"text": texts, "answer_start": starts}
    return {"question": question, "context": context, "answers": answers}


def translation_of(record: dict, languages: list[str]) -> dict[str, str]:
    """A record with the texts of these two languages, its own fields or those of its
    `translation`, as source and target."""
    texts = record.get("translation", record)
    reject_if(not isinstance(texts, dict), "a translation that is no dict of languages")
    for language in languages:
        reject_if(not first_text(texts, [language]), f"no text in {language}")
    source, target = languages
    return {"source": texts[source], "target": texts[target]}


TASKS = {
    "sft": as_sft,
    "preference": as_preference,
    "kto": as_kto,
    "classify": as_classify,
    "seq2seq": as_seq2seq,
    "tag": as_tag,
    "embed": as_embed,
    "span": as_span,
}
OF_PYTHON = [name for name in TASKS if name != "span"]  # of which Python's source has records


def rows_of(name: str, record: dict) -> list[dict]:
    """The rows of a task that a record makes: one, but of a pair of answers two of kto."""
    rows = TASKS[name](record)
    return rows if isinstance(rows, list) else [rows]


# --------------------------------------------------------------------------------------------------
# Python's own source


def functions_in(text: str) -> list[tuple[str, str]]:
    """(code without its docstring, first paragraph of the docstring) of each function of a Python
    file that has one; nothing where the text is no Python."""
    lines = text.split("\n")
    functions = []
    with suppress(SyntaxError, ValueError, RecursionError):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue  # or the docstring is all that there is
            docstring = ast.get_docstring(node)
            if not docstring:
                continue
            statement = node.body[0]  # the docstring's
            code = lines[node.lineno - 1 : statement.lineno - 1]
            code += lines[statement.end_lineno : node.end_lineno]
            first_paragraph = docstring.split("\n\n")[0]
            function = "\n".join(without_indent(code, node.col_offset)).strip("\n")
            functions.append((function, " ".join(first_paragraph.split())))
    return functions


def without_indent(lines: list[str], indent: int) -> list[str]:
    """A function's lines as if it were no class's. A string of it may have lines of its own, which
    begin further left, and stay."""
    outer = []
    for line in lines:
        is_indented = not line[:indent].strip()
        outer.append(line[indent:] if is_indented else line)
    return outer


def python_records(files: Iterator, text_field: str, seed: int) -> Iterator[dict[str, str]]:
    """Yield records for every task out of Python files: one of each short function with a
    docstring. The docstring of another function, drawn by the seed, is the rejected answer.
    `split_by`: a hash of the file, so that its functions stay in one split."""
    examples = []
    for file in files:
        split_by = digest(file[text_field].encode())
        for code, docstring in functions_in(file[text_field]):
            examples.append((code, docstring, file["path"], split_by))
    for code, docstring, path, split_by in examples:
        drawn = digest(f"{seed} {code}".encode()) % len(examples)
        _, other_docstring, _, _ = examples[drawn]
        # Short ones, for a small model's window.
        if other_docstring == docstring or len(code) + len(docstring) > 700:
            continue
        folder = path.rpartition("/")[0]
        yield {
            "prompt": f"Write the docstring of this function.\n\n{code}",
            "completion": docstring,
            "chosen": docstring,
            "rejected": other_docstring,
            "text": code,
            "label": folder.split("/")[0],  # the package, or "" for a module in none
            "source": code,
            "target": docstring,
            "anchor": docstring,
            "positive": code,
            "entities": entities_of(code),
            "split_by": split_by,
        }


# --------------------------------------------------------------------------------------------------
# Task sets as files


@dataclass(frozen=True)
class Reading:
    """How the records of a unit are read."""

    text_field: str  # of a text file's record
    limit: int | None  # records of a unit
    is_python: bool  # are they files of Python's own source
    seed: int  # of the examples drawn out of that
    languages: list | None = None  # seq2seq: the fields of source and target
    by_text: bool = False  # a row goes into the split of its record's text


def build_tasks(folder: Path, pool_map: Callable, units: list[Unit],
                names: list[str], reading: Reading,
                val_fraction: float) -> dict[str, int]:  # fmt: skip
    """Make <task>_train.jsonl and <task>_val.jsonl of these tasks: {file name: its rows}. pool_map:
    `map`, perhaps on several processes."""
    parts = []
    show = Progress()
    for part in pool_map(partial(convert_unit, names, reading), units):
        parts.append(part)
        show(f"converting: {len(parts)} of {len(units)} parts", last=len(parts) == len(units))
    n_rows = {}
    for name in names:
        rows = {}  # a dict, so that a row that came before is not there twice
        tally = Tally()
        ratings = []
        for part in parts:
            part_rows, part_tally, part_ratings = part[name]
            rows |= part_rows
            tally.add(part_tally)
            ratings += part_ratings
        print_bad_records(name, tally, rows)
        if ratings:  # the two answers of a pair may stand in two parts
            rated_rows = rows_of_ratings(name, ratings)
            print(ratings_summary(name, ratings, rated_rows))
            rows |= rated_rows
        n_rows |= write_task(folder, name, rows, val_fraction)
    return n_rows


def convert_unit(
    names: list[str], reading: Reading, unit: Unit
) -> dict[str, tuple[dict[str, int], Tally, list[dict]]]:
    """The records of a unit as rows of the tasks: {task: ({row: hash to split by}, Tally, [rating
    of a feedback file])}."""
    bad = []
    records = islice(raw_records(unit, reading.text_field, bad), reading.limit)
    if reading.is_python:
        records = python_records(records, reading.text_field, reading.seed)
    converted = {name: ({}, Tally(), []) for name in names}
    for record in records:
        text = json.dumps(record, default=str)  # parquet has dates and the like
        for name, (rows, tally, ratings) in converted.items():
            if reading.is_python and name == "classify" and not record["label"]:
                continue  # a module that is in no package
            if name == "sft" and record.get("messages", "") is None:
                continue  # a text for pre-training alone
            reason = None
            try:
                if name in OF_RATINGS and is_rating(record):
                    ratings.append(checked_rating(record))
                    continue
                if name == "seq2seq" and reading.languages:
                    record = translation_of(record, reading.languages)
                lines = [json.dumps(row, ensure_ascii=False) for row in rows_of(name, record)]
                split_by = digest("".join(lines).encode(errors="replace"))
                if reading.is_python:
                    split_by = record["split_by"]
                elif reading.by_text:
                    split_by = digest(record[reading.text_field].encode())
                rows |= dict.fromkeys(lines, split_by)
            except Reject as rejected:
                reason = str(rejected)
            except (ValueError, TypeError, AttributeError):
                reason = "fields of another type"
            tally.count(text, text, reason)
    for _, tally, _ in converted.values():
        for line in bad:
            tally.count(line, line, "no JSON object")
    return converted


def checked_rating(record: dict) -> dict:
    """A rating of which rows can be made, without what is beside it."""
    response = answer_text(record["response"])
    return {"prompt": turns(record["prompt"]), "response": response, "rating": record["rating"]}


def print_bad_records(name: str, tally: Tally, rows: dict[str, int]) -> None:
    for reason, (count, examples) in tally.reasons.items():
        print(f"{name}: {count:,} bad records: {reason}, such as {examples[0]}")
    if tally.docs_out > len(rows):
        print(f"{name}: {tally.docs_out - len(rows):,} records came before, word for word")


def write_task(
    folder: Path, name: str, rows: dict[str, int], val_fraction: float
) -> dict[str, int]:
    """Write the rows {row: hash to split by} of a task, divided by their hashes, or where there are
    fewer than 20 the last ones for validation: {file name: its rows}."""
    if len(rows) < 20:
        # By hash too few rows might leave one split empty.
        n_train = len(rows) - round(len(rows) * val_fraction)
        val_rows = set(list(rows)[n_train:])
    else:
        val_rows = {row for row, row_hash in rows.items() if row_hash < val_fraction * 2**64}
    n_rows = {}
    for split in reversed(SPLITS):  # the training rows come last: see replace_rows
        split_rows = [row for row in rows if (row in val_rows) == (split == "val")]
        n_rows[task_file(name, split)] = len(split_rows)
        with whole_file(folder / task_file(name, split)) as file:
            file.write("".join(row + "\n" for row in split_rows).encode(errors="replace"))
    return n_rows


def task_file(name: str, split: str) -> str:
    return f"{name}_{split}.jsonl"
