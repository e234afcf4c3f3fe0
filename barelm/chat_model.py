"""What the page says of a model's chat: whether it was trained to converse, and what its template
puts before a conversation by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from barelm.files import read_json
from barelm.run import UserError
from barelm.tokenizer import unused_letters

if TYPE_CHECKING:
    from barelm.tokenizer import Tokenizer


@dataclass
class ChatModel:
    """As /inspect/model tells it."""

    tuned: bool  # it was trained to converse
    why: str = ""  # it was not, or it cannot
    possible: bool = True  # there is a template to render messages by
    opening: str = ""  # what the template writes before the words of a first user
    system: str = ""  # the system prompt in that, where the template brings one


def describe_chat(tok: Tokenizer, folder: Path) -> ChatModel:
    """The ChatModel of a tokenizer and of the folder that it came with.

    A model is taken for one that was trained to converse where generation ends at the token that
    its template ends an answer with: finetune.py writes that into generation_config.json when it
    learns by the template, and so do those who publish such models, while base models, which often
    have a template too, end at the end of a text alone. A run that train.py began from scratch has
    learned texts alone, whatever its tokenizer brought."""
    try:
        tok.chat_template()
    except UserError:
        return ChatModel(False, "its tokenizer has no chat template", possible=False)
    try:
        opening, system = opening_of(tok)
        ends = tok.end_of_turn()
    except UserError as error:
        return ChatModel(False, f"its chat template cannot be asked: {error}")
    why = ""
    if is_pretrained(folder):
        why = "train.py taught it to continue texts alone"
    elif not ends or ends[0] not in tok.eos_ids:
        why = "nothing that it learned ends an answer"
    return ChatModel(not why, why, True, opening, system)


def is_pretrained(folder: Path) -> bool:
    """Whether a folder is a run of train.py that began with no other model."""
    try:
        run = read_json(Path(folder) / "run.json", {})
    except UserError:
        return False
    parts = run.get("parts")
    first = parts[0] if isinstance(parts, list) and parts else run  # before a resume
    config = first.get("config") if isinstance(first, dict) else None
    if not isinstance(config, dict):
        return False
    return config.get("init_from") == "scratch" and "method" not in config


def opening_of(tok: Tokenizer) -> tuple[str, str]:
    """(what the chat template puts before the words of a first user, the system prompt in it that
    it brings by itself, or "")."""
    user, system = unused_letters([], 2)
    question = {"role": "user", "content": user}
    opening, separator, _ = tok.render([question]).partition(user)
    if not separator:
        raise UserError("it does not write what a user says")
    try:
        given = tok.render([{"role": "system", "content": system}, question])
    except UserError:  # it takes no system prompt
        return opening, ""
    # The same with a system prompt of ours shows where one stands in it.
    head, separator, tail = given.partition(user)[0].partition(system)
    is_there = bool(separator) and opening.startswith(head) and opening.endswith(tail)
    if not is_there or len(opening) < len(head) + len(tail):
        return opening, ""
    return opening, opening[len(head) : len(opening) - len(tail)]
