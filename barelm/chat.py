"""Chat templates: conversations to text, and which of it is to be learned.

`render_chat` makes a text of a conversation, by the template that came with a tokenizer. The words
of the assistants in it are what {% generation %} marks in the template, where it does
(`marked_spans`); else `TurnFinder` finds them by what the template writes of parts of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from barelm.render import render_template
from barelm.run import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class TemplateRefusal(UserError):
    """A chat template does not take a conversation, or fits no loss mask."""


# --------------------------------------------------------------------------------------------------
# Messages as templates read them


def message_forms(messages: list[dict]) -> list[list[dict]]:
    """The messages in the forms to try with a template, one after another: as transformers gives
    them, null fields left out and the arguments of calls as objects; and, where there are calls, as
    OpenAI's protocol has them, which DeepSeek's templates want."""
    usual = [usual_form(message) for message in messages]
    if not any(message.get("tool_calls") for message in messages):
        return [usual]
    others = []
    for message in usual:
        if message.get("tool_calls"):
            written = [with_arguments(call, written_json) for call in message["tool_calls"]]
            message = {"content": None} | message | {"tool_calls": written}
        others.append(message)
    return [usual, others]


def usual_form(message: Any) -> Any:
    """A message without null fields, its calls' arguments as objects, and its thought by the names
    that templates look for."""
    if not isinstance(message, dict):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("tool_calls"), list):
        calls = [with_arguments(call, parsed_json) for call in message["tool_calls"]]
        message["tool_calls"] = calls
    thought = message.get("reasoning_content", message.get("reasoning"))
    if thought is not None:
        message = {"thinking": thought} | message | {"reasoning_content": thought}
    return message


def with_arguments(call: Any, change: Callable) -> Any:
    """A call of a tool, its arguments changed."""
    if not isinstance(call, dict):
        return call
    inner = call.get("function")
    if isinstance(inner, dict):
        return call | {"function": with_arguments(inner, change)}
    if "arguments" not in call:
        return call
    return call | {"arguments": change(call["arguments"])}


def parsed_json(value: Any) -> Any:
    """The object of a JSON text; another value, or no object's text, as it is."""
    if not isinstance(value, str):
        return value
    try:
        result = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return result if isinstance(result, dict) else value


def written_json(value: Any) -> str:
    """A value as JSON, or the text that it is already."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --------------------------------------------------------------------------------------------------
# Special tokens in what people say, and marks in what a template writes


def veiled(value: Any, veil: Callable) -> Any:
    """The value, with `veil` applied to every text in it."""
    if isinstance(value, str):
        return veil(value)
    if isinstance(value, dict):
        return {veiled(key, veil): veiled(v, veil) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [veiled(v, veil) for v in value]
    return value


def marks_answers(template: str) -> bool:
    """Whether a chat template has {% generation %}, other than in a comment."""
    program = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    return re.search(r"\{%[-+]?\s*generation\b", program) is not None


def marked_spans(text: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the two marks, and [(from, to)] of what was between them."""
    spans, pieces = [], []
    place = 0  # in the text without marks
    start = None  # of the span that is open
    for piece in re.split(f"([{begin}{end}])", text):
        if piece == begin and start is None:
            start = place
        elif piece == end and start is not None:
            spans.append((start, place))
            start = None
        elif piece not in (begin, end):
            pieces.append(piece)
            place += len(piece)
    return "".join(pieces), spans


# --------------------------------------------------------------------------------------------------
# Who says what: the turns of a rendered conversation


def common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return len(os.path.commonprefix([a, b]))


@dataclass
class TurnFinder:
    """Finds the assistants' words in `text`, which a template without {% generation %} made of
    `messages`. A turn begins behind what the template writes as the generation prompt, and ends
    where the next one's header begins.

    Say that a template writes "2?", "4" and "ok" of a user, an assistant and the user again as

        [user]2?[end][bot]4[end][user]ok[end]

    The turn of message 1 (from 0) begins where the messages before it end, with a generation
    prompt: `render(messages[:1], True)` is "[user]2?[end][bot]". It ends where the messages up to
    it do: `render(messages[:2])` is "[user]2?[end][bot]4[end]". The text begins with both, so that
    "4[end]" is said.

    Many templates write a turn in another way when others follow, without its thoughts or with
    another end token, so that the text begins with neither. Say that an answer ends with
    [return] in place of [end] where nothing follows it. Then what is around a content counts.
    Letters that occur nowhere are written in the place of "4", one after another:

        [user]2?[end][bot]X[end][user]ok[end]
        [user]2?[end][bot]Y[end][user]ok[end]

    What both have in common at their end follows the content, which tells where it ends in the text
    (`content_end`). What the text goes on with there is compared with what follows a content in
    shorter conversations, such as one with a generation prompt behind it, "[end][bot]": the text
    goes on with its "[end]". The prompt is found alike, behind the content before it. Where nothing
    asks for an answer, since it is the first message or another answer is before it, the same
    conversation with a question put there shows both. What none of these tells is refused."""

    render: Callable  # (messages, add_generation_prompt=False) to text, or a TemplateRefusal
    marks: re.Pattern  # of special tokens
    ends: re.Pattern  # of those that end a text
    letters: list[str]  # two that occur nowhere in the conversation
    messages: list[dict]
    text: str

    def span(self, i: int) -> tuple[int, int] | None:
        """(from, to) of message i in the text."""
        begin = self.begin(i)
        end = self.end(i)
        if end < begin:
            raise self.refusal("writes an answer before the generation prompt")
        marks = list(self.marks.finditer(self.text, begin, end))
        if marks and not self.text[marks[-1].end() : end].strip():
            return begin, marks[-1].end()  # the line end behind the last marker is layout
        following = self.ends.match(self.text, end)  # an end token that belongs to the next header
        return begin, following.end() if following else end

    def refusal(self, why: str) -> TemplateRefusal:
        return TemplateRefusal(
            f"the chat template {why}: no loss mask fits it "
            "({% generation %} around the answers in the template would mark them)"
        )

    # Where a turn begins

    def begin(self, i: int) -> int | None:
        """Where message i begins."""
        prompted = None
        try:
            prompted = self.render(self.messages[:i], True)
            if self.is_asked(i, prompted):
                if self.text.startswith(prompted):
                    return len(prompted)
                return self.prompt_behind(i)[1]
        except TemplateRefusal:  # such as of a template that wants a question
            prompted = None
        try:
            return self.begin_unasked(i)
        except TemplateRefusal:
            if i == 0 and prompted and self.text.startswith(prompted):
                return len(prompted)
            raise

    def is_asked(self, i: int, prompted: str) -> bool:
        """Whether the template has a generation prompt before message i; prompted: what it writes
        of the messages before it, asked for one."""
        if i == 0:
            return False
        if self.messages[i - 1].get("role") in ("user", "tool"):
            return True  # its header may end as a prompt would, so that there is no difference
        return prompted != self.render(self.messages[:i])

    def prompt_behind(self, i: int) -> tuple[int, int] | None:
        """(from, to) of the generation prompt before message i, by what follows the content of
        message i - 1."""
        before = self.messages[:i]
        prompted = self.render(before, True)
        at = self.content_end(before, i - 1, prompted, prompt=True)
        prompt_at = self.prompt_begin(self.render(before), prompted) - at
        here = self.content_end(self.messages, i - 1, self.text)
        # The prompt may be only in part in the text, such as without a thought's opening. What
        # message i itself begins with does not count: another text in its place has it not.
        other = self.render(self.with_content(self.messages, i, self.letters[0]))
        size = min(common(prompted[at:], text[here:]) for text in (self.text, other))
        size = self.step_back(self.text, here + size) - here
        is_whole = size == len(prompted) - at
        if other[:here] != self.text[:here] or not is_whole and size <= prompt_at:
            raise self.refusal("writes another header before an answer than it asks for one with")
        return here + prompt_at, here + size

    def begin_unasked(self, i: int) -> int | None:
        """Where message i begins, to which nothing asks: by the prompt that there is where a
        question is put before it."""
        other = self.with_question(i)
        header = other.text[slice(*other.prompt_behind(i + 1))]
        here = self.content_end(self.messages, i - 1, self.text) if i else 0
        # What is before message i, whatever it says.
        variants = [self.render(self.with_content(self.messages, i, c)) for c in self.letters]
        before = os.path.commonprefix([*variants, self.text])
        if here > len(before):  # message i - 1 is written behind the answer: no place to begin at
            here = 0
        before = before[here:]
        if header and header in before:
            return here + before.rindex(header) + len(header)
        upto = self.render(self.messages[:i]) if i and not header else ""
        if upto and self.text.startswith(upto):
            return max(here, len(upto))
        if header or self.marks.sub("", before).strip():
            raise self.refusal("has no generation prompt before an answer that nothing asked for")
        begin = here
        for mark in self.marks.finditer(before):  # special tokens, such as bos, are not said
            begin = here + mark.end()
        return begin

    # Where a turn ends

    def end(self, i: int, unasked: bool = True) -> int | None:
        """Where message i ends: where the text of the conversation up to it does, or, if that is
        written in another way, behind what then follows its content. unasked: a conversation that
        the template refuses may be tried with a question more."""
        if i + 1 == len(self.messages):
            return len(self.text)
        upto = self.messages[: i + 1]
        try:
            whole = self.render(upto)
        except TemplateRefusal:  # such as of a template that wants a question
            if not unasked:
                raise
            return self.end_unasked(i)
        if self.text.startswith(whole):
            return len(whole)
        here = self.content_end(self.messages, i, self.text)
        footer = whole[self.content_end(upto, i, whole) :]
        if self.text.startswith(footer, here):
            return here + len(footer)
        footer = self.footer_before_prompt(i)  # the last turn ends in another way
        if self.text.startswith(footer, here):
            return here + len(footer)
        # An end token before the next turn's words.
        next_end = self.content_end(self.messages, i + 1, self.text)
        end_token = self.ends.search(self.text, here, next_end)
        if end_token:
            return end_token.end()
        raise self.refusal("ends an answer in another way once there is a next turn")

    def footer_before_prompt(self, i: int) -> str | None:
        """What follows the content of message i where a generation prompt comes next, without that
        prompt, which is the one behind the last question before it."""
        questions = [k for k in range(i) if self.messages[k].get("role") != "assistant"]
        asked = self.messages[: questions[-1] + 1] if questions else [self.question()]
        prompted = self.render(asked, True)
        prompt = prompted[self.prompt_begin(self.render(asked), prompted) :]
        upto = self.messages[: i + 1]
        whole = self.render(upto, True)
        at = self.content_end(upto, i, whole, prompt=True)
        return whole[at:].removesuffix(prompt)

    def end_unasked(self, i: int) -> int | None:
        """Where message i ends, by what follows its content where a question is put before it."""
        other = self.with_question(i)
        at = other.content_end(other.messages, i + 1, other.text)
        footer = other.text[at : other.end(i + 1, unasked=False)]
        here = self.content_end(self.messages, i, self.text)
        if not self.text.startswith(footer, here):
            raise self.refusal("ends an answer in another way where nothing asks for it")
        return here + len(footer)

    # Places in a text

    def content_end(
        self, messages: list[dict], i: int, text: str, prompt: bool = False
    ) -> int | None:
        """Where the content of message i ends in `text`, which the template made of these messages
        (prompt: and of a generation prompt): before what two renderings with another letter in its
        place have in common at their end."""
        a = self.render(self.with_content(messages, i, self.letters[0]), prompt)
        b = self.render(self.with_content(messages, i, self.letters[1]), prompt)
        size = common(a[::-1], b[::-1])
        behind = a[len(a) - size :]
        if a == b or not text.endswith(behind):
            role = messages[i].get("role")
            raise self.refusal(
                f"does not write what the {role} says at one place, in its own words"
            )
        return len(text) - size

    def prompt_begin(self, bare: str, prompted: str) -> int | None:
        """Where the generation prompt begins in a text that has one, by the same without it."""
        return self.step_back(bare, common(bare, prompted))

    def step_back(self, text: str, at: int) -> int:
        """The place, or the beginning of the special token that it would cut."""
        for mark in self.marks.finditer(text):
            if mark.start() < at < mark.end():
                return mark.start()
        return at

    # Other conversations

    def with_question(self, i: int) -> TurnFinder:
        """The same for a conversation with a question more, before message i."""
        messages = [*self.messages[:i], self.question(), *self.messages[i:]]
        text = self.render(messages)
        return TurnFinder(self.render, self.marks, self.ends, self.letters, messages, text)

    def question(self) -> dict[str, str]:
        """A user's message, in the form that the others have."""
        has_parts = any(isinstance(m.get("content"), list) for m in self.messages)
        content = [{"type": "text", "text": "?"}] if has_parts else "?"
        return {"role": "user", "content": content}

    def with_content(self, messages: list[dict], i: int, text: str) -> list[dict]:
        """The messages, message i having this text."""
        content = messages[i].get("content")
        if isinstance(content, list) and content and isinstance(content[-1], dict):
            changed = [*content[:-1], content[-1] | {"text": text}]
        else:
            changed = text
        return [*messages[:i], messages[i] | {"content": changed}, *messages[i + 1 :]]


# --------------------------------------------------------------------------------------------------
# Rendering: our own template here, strangers' programs in a process apart

TEMPLATE_SECONDS = 2  # of processor time for a rendering; one more for a million characters given
TEMPLATE_MEMORY = 1 << 30  # bytes that the process has, on Linux
TEMPLATE_GROWTH = 20  # characters out for one in, beside a million
TIMES_OVER = 3  # in a row that a template may be over a limit, before it is tried no more


class TemplateLimit(UserError):
    """A chat template took more time, memory or room than a rendering may."""


def render_chat(template: str, given: dict) -> str:
    """The text that a chat template makes of its variables, a dict. Whatever the template's program
    raises comes as an Exception with its words."""
    # Ours may have plain text before it, such as a bos token: a { would begin a program.
    is_ours = template.endswith(CHATML) and "{" not in template.removesuffix(CHATML)
    if is_ours:
        return render_template(template, given)
    return renderer_of(os.getpid()).render(template, given)


@cache
def renderer_of(pid: int) -> Renderer:
    """The Renderer of this process: one for all its tokenizers, since it takes a tenth of a second
    to start. A fork has another pid, so that two processes never read each other's answers."""
    return Renderer()


class Renderer:
    """Renders chat templates in a process of its own, which has little time and memory; it is
    started when it is first needed, and again after a rendering has ended it."""

    def __init__(self) -> None:
        self.process = None
        self.lock = threading.Lock()  # the server's threads ask one after another
        self.times_over = {}  # {template: how often in a row it was over a limit}

    def render(self, template: str, given: dict) -> str:
        """The text that the template makes of its variables; ValueError with the template's own
        words if it raises, TemplateLimit beyond a limit."""
        if self.times_over.get(template, 0) >= TIMES_OVER:
            raise TemplateLimit(
                "the chat template was over its limits three times: it is not tried"
            )
        given_text = json.dumps(given, default=str)
        size = len(given_text)
        request: dict = {
            "seconds": TEMPLATE_SECONDS + size / 1e6,
            "template": template,
            "room": 1_000_000 + TEMPLATE_GROWTH * size,
        }
        # The variables, which may be long, are written as JSON once.
        line = f'{json.dumps(request)[:-1]}, "given": {given_text}}}\n'.encode()
        answer = self.ask(line, request["seconds"])
        if "limit" in answer:
            self.times_over[template] = self.times_over.get(template, 0) + 1
            over = {
                "memory": f"takes more than {TEMPLATE_MEMORY >> 20} MiB of memory",
                "room": f"makes more than {request['room']:,} characters of {size:,}",
                "time": f"takes more than {request['seconds']:.1f} seconds",
            }
            why = over.get(answer["limit"], answer["limit"])
            raise TemplateLimit(f"the chat template {why}: it is refused")
        self.times_over.pop(template, None)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def ask(self, line: bytes, seconds: float) -> dict[str, str]:
        """The process's answer, a dict, to a request, a line."""
        with self.lock:
            try:
                return self.try_twice(line, seconds)
            except OSError as error:
                raise TemplateLimit(f"no process to render the chat template: {error}") from None
            except BaseException:  # Ctrl-C: its answer must not be taken for the next one's
                if self.process is not None:
                    self.process.kill()
                self.process = None
                raise

    def try_twice(self, line: bytes, seconds: float) -> dict[str, str]:
        """The answer to a line. A process that has ended before it, for some other reason than this
        request, is replaced once."""
        for _ in range(2):
            if self.process is None:
                self.start()
            process = self.process
            timer = None
            if not hasattr(signal, "setitimer"):  # no limit of processor time there: by the clock
                timer = threading.Timer(10 * seconds, process.kill)
                timer.start()
            answer = self.exchange(line)
            if timer:
                timer.cancel()
            if answer.endswith(b"\n"):
                return json.loads(answer)
            self.process = None
            process.kill()
            code = process.wait()
            if timer or code == -signal.SIGPROF:  # what ends it when its seconds are over
                return {"limit": "time"}
        return {"limit": f"ends the process that renders it ({code})"}

    def exchange(self, line: bytes) -> bytes:
        """The line that the process answers; less than one where it ended."""
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except OSError:  # it has ended
            return b""

    def start(self) -> None:
        """Start the process: render.py, without what this process has loaded or been told."""
        paths = json.dumps([str(path) for path in sys.path])  # where this process has jinja2 from
        script = Path(__file__).resolve().with_name("render.py")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), paths, str(TEMPLATE_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
