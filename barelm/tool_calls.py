"""Calls of tools in a model's answer: text in as it comes, pieces of text and of calls out.

    parser = CallParser(form_named("hermes"), {"weather": {"type": "object"}})
    parser.feed('It is <tool_call>{"name": "weather", "argum')      # ["It is"]
    parser.feed('ents": {"city": "Paris"}}</tool_call>', final=True)  # [a CallPiece or two]

What comes out is the same wherever the answer is cut into pieces. What looks like a call and is
none (broken JSON, a tool that there is not, an end in the middle) is text, letter by letter. So a
call is given out when it is whole; where a grammar makes sure that it will be one (`certain`), its
arguments come as they are written."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import regex

from barelm.reasoning import unsure
from barelm.tool_values import read_values

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from barelm.tool_forms import ToolForm


@dataclass
class CallPiece:
    """A piece of call number `index`: of the first the tool's name, then more of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


class JsonValue:
    """Finds where a JSON object or list ends: its text, piece by piece."""

    # What may stand outside a string: a sign of anything else is a sign that it is no JSON.
    OUTSIDE = set(' \t\r\n,:-+.0123456789eE"{}[]') | set("truefalsn")
    CLOSES = {"}": "{", "]": "["}

    def __init__(self) -> None:
        self.is_broken = False
        self.is_whole = False
        self.open: list[str] = []  # braces and brackets
        self.in_string = False
        self.is_escaped = False  # the last character was a backslash

    def feed(self, text: str) -> int:
        """How many of the characters belong to the value."""
        for place, letter in enumerate(text):
            if self.in_string:
                self.take_in_string(letter)
            elif letter not in self.OUTSIDE:
                self.is_broken = True
            elif letter == '"':
                self.in_string = True
            elif letter in "{[":
                self.open.append(letter)
            elif letter in "}]":
                self.is_broken = self.open.pop() != self.CLOSES[letter]
                self.is_whole = not self.open
            if self.is_broken:
                return place
            if self.is_whole:
                return place + 1
        return len(text)

    def take_in_string(self, letter: str) -> None:
        if self.is_escaped:
            self.is_escaped = False
        elif letter == "\\":
            self.is_escaped = True
        elif letter == '"':
            self.in_string = False


class CallParser:
    """Finds the calls in one answer. schemas: {name: JSON Schema of the arguments} of the tools
    that there are. certain: a grammar makes sure that what begins as a call is one. most: calls at
    most; what follows is text."""

    def __init__(
        self,
        form: ToolForm,
        schemas: dict[str, dict],
        certain: bool = False,
        most: int | None = None,
    ) -> None:
        self.form = form
        self.names = schemas
        self.certain = certain
        self.most = most
        self.n_calls = 0
        self.pieces: list[str | CallPiece] = []  # to be given out
        self.rest = ""  # of the answer, not yet understood
        self.blank = ""  # white space that is part of the text if more text follows
        self.n_said = 0  # characters of text
        self.has_text = False  # other than white space
        self.is_behind_call = False  # and no text since
        self.step: Callable = self.outside  # what is done with the rest: whether to go on
        self.final = False
        self.retry = 0  # characters of the rest that are text, if this is no call
        self.value = JsonValue()
        self.value_begin = 0  # in the rest
        self.name = ""  # of the tool that is called
        self.closing = ""  # what may follow a call
        self.n_scanned = 0  # characters of the rest that the value has seen
        self.head = regex.compile(self.head_pattern())
        # Of a call with tags: behind a value, or where there is none, since values are any text.
        end = r"\s*".join(map(regex.escape, form.end.split()))
        self.end = regex.compile(rf"(?:\A|{regex.escape(form.value_end.strip())})\s*({end})")
        self.markers = [form.marker] if form.marker else ["<|python_tag|>"]

    def head_pattern(self) -> str:
        """What stands before the arguments of a call; group 1 is the tool's name."""
        form = self.form
        if form.is_json:
            key = r'"(?:arguments|parameters)"'
            return rf'\s*\[?\s*\{{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*{key}\s*:\s*(?=\{{)'
        # The marker, which may be all that there is, was read before.
        begin = regex.escape(form.begin.removeprefix(form.marker))
        middle = regex.escape(form.middle.strip())
        behind = r"\s*(?=\{)"  # the arguments, a JSON object
        if form.key_begin:
            behind = "" if middle else r"(?=[\s<])"
        begin = r"\s*".join(begin.split(r"\n"))
        return rf"\s*{begin}\s*([^\s\[\]{{}}<>]+)\s*{middle}{behind}"

    def feed(self, text: str, final: bool = False) -> list[str | CallPiece]:
        """The pieces that this text of the answer makes certain."""
        self.rest += text
        self.final = final
        while self.step():
            pass
        if final and not self.n_calls and self.blank:
            self.pieces.append(self.blank)
            self.blank = ""
        pieces = self.pieces
        self.pieces = []
        return pieces

    # ------------------------------------------------------------------ outside calls

    def say(self, n: int) -> None:
        """The first n characters of the rest are text."""
        text = self.blank + self.rest[:n]
        self.rest = self.rest[n:]
        self.n_said += n
        if self.is_behind_call and text.strip():  # a line of its own
            text = ("\n" if self.has_text else "") + text.lstrip()
            self.is_behind_call = False
        said = text.rstrip()
        self.blank = text[len(said) :]
        if said:
            self.has_text = True
            self.pieces.append(said)

    def outside(self) -> bool:
        """Find where the next call begins; whether there is one."""
        if self.most is not None and self.n_calls >= self.most:
            self.say(len(self.rest))
            return False
        if not self.form.marker and self.may_be_bare():
            return self.look_for_brace()
        places = [(self.rest.find(marker), marker) for marker in self.markers]
        places = [(place, marker) for place, marker in places if place >= 0]
        if not places:
            n_unsure = max(unsure(self.rest, marker) for marker in self.markers)
            self.say(len(self.rest) if self.final else len(self.rest) - n_unsure)
            return False
        place, marker = min(places)
        self.say(place)
        return self.begin(len(marker))

    def may_be_bare(self) -> bool:
        """Whether a call without a marker may begin here: before any text."""
        return not self.n_said

    def look_for_brace(self) -> bool:
        """A call without a marker, at the beginning or behind another call."""
        between = r"[\s;]*" if self.n_calls else r"\s*"
        n_blank = re.match(between, self.rest).end()  # type: ignore[union-attr]
        if n_blank == len(self.rest):
            if self.final and not self.n_calls:
                self.say(n_blank)
            return False
        if self.rest[n_blank] == "{":
            return self.begin(n_blank)
        if not self.final and any(m.startswith(self.rest[n_blank:]) for m in self.markers):
            return False
        for marker in self.markers:
            if self.rest.startswith(marker, n_blank):
                return self.begin(n_blank + len(marker))
        self.say(n_blank + 1)
        return True

    # ------------------------------------------------------------------ a call

    def begin(self, n_marker: int) -> bool:
        """A call may begin behind so many characters of the rest."""
        self.retry = max(n_marker, 1)
        self.n_scanned = n_marker
        if self.form.is_json and not self.certain:
            self.step = self.before_value
        else:
            self.step = self.read_head
        return True

    def broken(self) -> bool:
        """This is no call: its marker is text, and what follows is looked at again."""
        self.say(min(self.retry, len(self.rest)))
        self.step = self.outside
        return True

    def wait(self) -> bool:
        """More is needed; where nothing more comes, it is no call."""
        return self.broken() if self.final else False

    def before_value(self) -> bool:
        """JSON whose fields may be in any order: it is read when it is whole."""
        behind = self.rest[self.n_scanned :]
        n_blank = len(behind) - len(behind.lstrip())
        if n_blank == len(behind):
            return self.wait()
        if behind[n_blank] not in "{[":
            return self.broken()
        self.n_scanned += n_blank
        self.value_begin = self.n_scanned
        self.value = JsonValue()
        self.step = self.read_value
        return True

    def read_value(self) -> bool:
        self.n_scanned += self.value.feed(self.rest[self.n_scanned :])
        if self.value.is_broken:
            return self.broken()
        if not self.value.is_whole:
            return self.wait()
        calls = read_calls(self.rest[self.value_begin : self.n_scanned], self.names)
        if not calls:
            return self.broken()
        for name, arguments in calls:
            self.give(CallPiece(self.n_calls, name))
            self.give(CallPiece(self.n_calls, None, arguments))
            self.n_calls += 1
        return self.leave(self.n_scanned, self.closing_text())

    def give(self, piece: CallPiece) -> None:
        self.blank = ""
        self.is_behind_call = True
        self.pieces.append(piece)

    def leave(self, n: int, closing: str) -> bool:
        """So many characters of the rest were a call, which may be followed by this text."""
        self.rest = self.rest[n:]
        self.closing = closing
        self.step = self.read_closing
        return True

    def closing_text(self) -> str:
        """What follows the JSON of a call, or of all of them."""
        form = self.form
        return form.closing.lstrip("]") if form.closing else form.end.lstrip("}").strip()

    def read_closing(self) -> bool:
        """Pass over what closes a call, where it is there."""
        behind = self.rest.lstrip()
        if behind.startswith(self.closing):
            self.rest = behind[len(self.closing) :]
        elif self.closing.startswith(behind) and not self.final:
            return False
        self.step = self.outside
        return True

    # ------------------------------------------------------------------ name first, then arguments

    def read_head(self) -> bool:
        """The tool's name, which comes before the arguments."""
        match = self.head.match(self.rest, self.n_scanned, partial=True)
        if match is None:
            if self.form.is_json:
                self.step = self.before_value  # such as with the arguments first
                return True
            return self.broken()
        if match.partial:
            return self.wait()
        if match[1] not in self.names:
            return self.broken()
        self.name = match[1]
        if self.form.key_begin:
            self.n_scanned = match.end()
            self.step = self.read_tagged
            return True
        self.value = JsonValue()
        self.n_scanned = match.end()
        self.value_begin = match.end()
        if self.certain:
            self.give(CallPiece(self.n_calls, self.name))
            self.rest = self.rest[match.end() :]
            self.step = self.pass_arguments
        else:
            self.step = self.read_arguments
        return True

    def read_tagged(self) -> bool:
        """Arguments between tags, when they are whole."""
        behind = self.rest[self.n_scanned :]
        end = self.end.search(behind)
        if end is None:
            return self.wait()
        arguments = read_values(self.form, behind[: end.start(1)], self.names[self.name])
        if arguments is None:
            return self.broken()
        self.give(CallPiece(self.n_calls, self.name))
        self.give(CallPiece(self.n_calls, None, json.dumps(arguments, ensure_ascii=False)))
        self.n_calls += 1
        self.rest = behind[end.end() :]
        self.step = self.outside
        return True

    def pass_arguments(self) -> bool:
        """Arguments that are sure to be JSON, as they come."""
        n = self.value.feed(self.rest)
        if n:
            self.give(CallPiece(self.n_calls, None, self.rest[:n]))
        self.rest = self.rest[n:]
        if not self.value.is_whole and not self.value.is_broken:
            return False
        self.n_calls += 1
        self.step = self.read_tail
        return True

    def read_arguments(self) -> bool:
        """Arguments that may be none, until they are whole."""
        self.n_scanned += self.value.feed(self.rest[self.n_scanned :])
        if self.value.is_broken:
            return self.broken()
        if not self.value.is_whole:
            return self.wait()
        arguments = self.rest[self.value_begin : self.n_scanned]
        if not isinstance(parsed(arguments), dict):
            return self.broken()
        self.give(CallPiece(self.n_calls, self.name))
        self.give(CallPiece(self.n_calls, None, arguments))
        self.n_calls += 1
        self.rest = self.rest[self.n_scanned :]
        self.step = self.read_tail
        return True

    def read_tail(self) -> bool:
        """Behind the arguments: the end of the call, and perhaps another."""
        form = self.form
        behind = self.rest.lstrip()
        end = form.end.strip()
        if end and not behind.startswith(end):
            if end.startswith(behind) and not self.final:
                return False
            self.step = self.outside
            return True
        behind = behind[len(end) :].lstrip()
        if not form.opening:
            self.rest = behind
            self.step = self.outside
            return True
        return self.next_of_list(behind)

    def next_of_list(self, behind: str) -> bool:
        """Behind a call of those that one opening has: another call, or the closing."""
        form = self.form
        between = form.between.strip()
        if behind.startswith(form.closing):
            self.rest = behind[len(form.closing) :]
            self.step = self.outside
            return True
        may_be = between.startswith(behind) or form.closing.startswith(behind)
        if may_be and not self.final:
            return False
        self.rest = behind
        if not behind.startswith(between):
            self.step = self.outside
            return True
        self.retry = len(between) or 1
        self.n_scanned = len(between)
        self.step = self.read_head
        return True


# --------------------------------------------------------------------------------------------------
# The JSON of calls


def parsed(text: str) -> object:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def read_calls(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """[(name, arguments as JSON)] of a call, or of a list of them; [] unless all are calls."""
    value = parsed(text)
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        call = read_call(entry, names)
        if call is None:
            return []
        calls.append(call)
    return calls


def read_call(entry: object, names: Collection[str]) -> tuple[str, str] | None:
    """(name, arguments as JSON) of a call; None where it is none of these tools."""
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("function"), dict):  # as OpenAI's protocol nests it
        entry = entry["function"]
    name = entry.get("name")
    if not isinstance(name, str) or name not in names:
        return None
    arguments = entry.get("arguments", entry.get("parameters"))
    if isinstance(arguments, str):  # JSON in JSON
        arguments = parsed(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
