"""Rows: of a task's files, here or on the Hub, and the documents of a text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from barelm.download import HUB, download
from barelm.files import JSONL, file_ending, parse_json, read_input, read_json
from barelm.run import UserError
from barelm.tasks import ROW_ERRORS

if TYPE_CHECKING:
    from barelm.tasks import Task

ROW_FILES = (*JSONL, ".json", ".parquet")
# What the words in a file's path say of its rows; of a path with none of them, they are questions.
ROW_KINDS = dict.fromkeys(("train", "dev", "shots", "prompt"), "examples")
ROW_KINDS |= dict.fromkeys(("validation", "valid", "val"), "validation")


def find_rows(task: Task, folder: str) -> tuple[list[dict], list[dict]]:
    """(questions, examples) of a task: from folder/NAME.jsonl, folder/NAME_*.jsonl, folder/NAME/**
    (or .json, .parquet). What has train, dev or shots in its path are examples; of a path with test
    and one with validation the task's split are the questions."""
    rows = {"test": [], "validation": [], "examples": []}
    for path in sorted(Path(folder).rglob("*")):
        inside = path.relative_to(folder)
        # mmlu_test.jsonl and mmlu/... are mmlu's, mmlu2.jsonl is not.
        is_of_task = re.fullmatch(rf"{task.name}([_.-].*)?", inside.parts[0])
        if not is_of_task or file_ending(path) not in ROW_FILES:
            continue
        kind = kind_of_rows(inside)
        for row in read_rows(path):
            subject = ""
            if task.subject_field:
                subject = row.get(task.subject_field, "")
            if task.subject_by_file:
                # BBH's data/bbh/navigate/test.jsonl, or data/bbh/navigate.jsonl
                named_by_folder = re.match("test|train|dev|shots", path.stem)
                subject = inside.parent.name if named_by_folder else path.stem
            rows[kind].append({"subject": subject} | row)  # a field of the row's own comes first
    questions = rows.get(task.split) or rows["test"] or rows["validation"]
    return questions, rows["examples"]


def kind_of_rows(path: Path) -> str:
    """What the rows of a file are: test, validation, or examples. The path's first word decides."""
    for word in re.split("[^a-z]+", path.as_posix().lower()):
        if word in ROW_KINDS:
            return ROW_KINDS[word]
    return "test"


def read_rows(path: Path) -> list[dict]:
    """The records of a JSONL, JSON or parquet file: a list of dicts."""
    ending = file_ending(path)
    if ending == ".parquet":
        rows = read_parquet(path)
    elif ending == ".json":
        rows = parse_json(read_input(path), path)
    else:
        rows = []
        for number, line in enumerate(read_input(path).splitlines(), 1):
            if line.strip():
                rows.append(parse_json(line, f"{path}:{number}"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected an object on each line")
    return rows


def read_parquet(path: Path) -> list[dict]:
    """The records of a parquet file."""
    try:
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # pyarrow's, of another format
        raise UserError(f"{path}: no parquet file: {error}") from None


def fetch_rows(task: Task, folder: str) -> None:
    """Download the files of a task's folder on the Hub into folder/NAME/."""
    owner, repo, *subfolders = task.hub.split("/")
    place = Path(folder) / task.name
    listing = place / "listing.txt"
    listing.unlink(missing_ok=True)  # a download leaves alone what is there, and this may be old
    download(f"{HUB}api/datasets/{owner}/{repo}", listing)
    kinds = f"(test|dev|train|prompt|{task.split})"
    wanted = rf"{'/'.join(subfolders)}.*(^|/){kinds}[^/]*\.(jsonl|parquet)"
    paths = []
    try:
        for file in read_json(listing)["siblings"]:
            path = file["rfilename"]  # relative to the repository
            if re.fullmatch(wanted, path) and ".." not in path:  # which would leave the folder
                paths.append(path)
    except ROW_ERRORS as error:
        why = f"{error!r}: is {HUB} a Hub?"
        raise UserError(f"{task.name}: its list of files is malformed: {why}") from None
    repository = f"{HUB}datasets/{owner}/{repo}"
    if not paths:
        raise UserError(f"{task.name}: {repository} lists no JSONL or parquet for it")
    for path in paths:
        download(f"{repository}/resolve/main/{path}", place / path)


def read_text(path: Path) -> list[str]:
    """The documents of a text file, or of a JSONL's field `text`."""
    if file_ending(path) in JSONL:
        documents = [row.get("text") for row in read_rows(path)]
        for number, document in enumerate(documents, 1):
            if not is_text(document):
                raise UserError(f"{path}: record {number}: expected a text in the field `text`")
    else:
        try:
            documents = [read_input(path).decode()]
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read as text: {why}") from None
        if is_record(documents[0].partition("\n")[0]):
            raise UserError(f"{path}: its first line is a record with `text`: name it .jsonl")
    if not any(documents):
        raise UserError(f"{path}: no text in it")
    return [document for document in documents if document]


def is_text(value: str) -> bool:
    """Whether a value is a text that UTF-8 can write: JSON can hold halves of surrogate pairs."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def is_record(line: str) -> bool:
    """Whether a line is a JSON object with a field `text`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "text" in record
