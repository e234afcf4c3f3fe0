"""Thoughts before an answer: which templates have them, and where an answer has its own.

Qwen3 writes <think>, its thought, </think>, then the answer; DeepSeek's R1 the same, but there the
template has written the <think> already. `ThoughtSplitter` takes the text as it comes; what comes
out does not depend on where it is cut."""

from __future__ import annotations

import re
from typing import NamedTuple


class Thoughts(NamedTuple):
    """What a thought begins and ends with."""

    begin: str
    end: str


# In a chat template; adding a kind of thoughts is adding a line.
KINDS = [
    Thoughts("<think>", "</think>"),  # Qwen3, DeepSeek R1, GLM, Nemotron, SmolLM3
    Thoughts("[THINK]", "[/THINK]"),  # Mistral's Magistral
    Thoughts("<seed:think>", "</seed:think>"),  # Seed-OSS
]


def thoughts_of(template: str) -> Thoughts | None:
    """What a chat template says that thoughts stand between; None where it has none."""
    for kind in KINDS:
        if kind.end in template:
            return kind
    return None


def takes(template: str, variable: str) -> bool:
    """Whether a chat template looks at this variable, other than in a comment."""
    program = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    return re.search(rf"(?<![\w.]){re.escape(variable)}\b", program) is not None


class ThoughtSplitter:
    """Tells an answer's thought from its words. inside: the prompt ends within a thought."""

    def __init__(self, kind: Thoughts, inside: bool) -> None:
        self.kind = kind
        self.rest = ""  # not given out yet
        self.blank = (
            ""  # white space at the thought's end, which is no part of it if nothing follows
        )
        self.state = "inside" if inside else "before"
        self.has_thought = False

    def feed(self, text: str, final: bool = False) -> tuple[str, str]:
        """(more of the thought, more of the words) that this text of the answer makes certain."""
        self.rest += text
        thought = ""
        if self.state == "before":
            self.look_for_begin(final)
        if self.state == "inside":
            thought = self.take_thought(final)
        if self.state == "behind":  # the empty lines between a thought and the words
            self.rest = self.rest.lstrip()
            if self.rest:
                self.state = "words"
        words = ""
        if self.state == "words":
            words = self.rest
            self.rest = ""
        return thought, words

    def look_for_begin(self, final: bool) -> None:
        """Whether the answer begins with a thought."""
        begun = self.rest.lstrip()
        if begun.startswith(self.kind.begin):
            self.rest = begun[len(self.kind.begin) :]
            self.state = "inside"
        elif final or not self.kind.begin.startswith(begun):
            self.state = "words"

    def take_thought(self, final: bool) -> str:
        """What is certain of the thought, without the white space around it."""
        end = self.kind.end
        thought, end_of_it, words = self.rest.partition(end)
        if end_of_it:
            self.rest = words
            self.state = "behind"
            final = True
        else:
            n_unsure = 0 if final else unsure(thought, end)
            self.rest = thought[len(thought) - n_unsure :]
            thought = thought[: len(thought) - n_unsure]
        thought = self.blank + thought
        if not self.has_thought:
            thought = thought.lstrip()
        said = thought.rstrip()
        self.blank = thought[len(said) :]
        self.has_thought = self.has_thought or bool(said)
        return said


def unsure(text: str, marker: str) -> int:
    """How many characters at the text's end may be the beginning of the marker."""
    for n in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:n]):
            return n
    return 0
