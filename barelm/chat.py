"""Chat templates: conversations to text, and which of it is to be learned."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from datetime import datetime
from functools import lru_cache, partial

from barelm.run import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def veiled(value, veil):
    """The value, with `veil` applied to every text in it."""
    if isinstance(value, str):
        return veil(value)
    if isinstance(value, dict):
        return {key: veiled(v, veil) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [veiled(v, veil) for v in value]
    return value


def marks_answers(template):
    """Whether a chat template has {% generation %}, other than in a comment."""
    program = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    return re.search(r"\{%[-+]?\s*generation\b", program) is not None


def marked_spans(text, begin, end):
    """The text without the two marks, and [(from, to)] of what was between them."""
    spans, out, at, start = [], [], 0, None
    for piece in re.split(f"([{begin}{end}])", text):
        if piece == begin and start is None:
            start = at
        elif piece == end and start is not None:
            spans.append((start, at))
            start = None
        elif piece not in (begin, end):
            out.append(piece)
            at += len(piece)
    return "".join(out), spans


def common(a, b):
    """How many characters two texts have in common at their beginning."""
    return len(os.path.commonprefix([a, b]))


class TemplateRefusal(UserError):
    """A chat template does not take a conversation, or fits no loss mask."""


class TurnFinder:
    """Finds the assistants' words in `text`, which a template without {% generation %} made of
    `messages`: a turn begins behind what the template writes as the generation prompt, and ends
    where the next one's header begins.

    Templates may write earlier turns in another way than the last one (without their thoughts).
    What is around a content is therefore found by writing letters that occur nowhere in its place.
    """

    def __init__(self, render, marks, ends, letters, messages, text):
        self.render, self.messages, self.text = render, messages, text
        self.marks, self.ends = marks, ends  # patterns of the special and of the end tokens
        self.letters = letters

    def beside(self, messages):
        """The same for other messages."""
        text = self.render(messages)
        return TurnFinder(self.render, self.marks, self.ends, self.letters, messages, text)

    def span(self, i):
        """(from, to) of message i in the text."""
        begin, end = self.begin(i), self.end(i)
        if end < begin:
            raise self.refusal("writes an answer before the generation prompt")
        found = [*self.marks.finditer(self.text, begin, end)]
        if found and not self.text[found[-1].end() : end].strip():
            return begin, found[-1].end()  # the line end behind the last marker is layout
        following = self.ends.match(self.text, end)
        return begin, following.end() if following else end

    def refusal(self, why):
        return TemplateRefusal(
            f"the chat template {why}: no loss mask fits it "
            "({% generation %} around the answers in the template would mark them)"
        )

    def begin(self, i):
        """Where message i begins."""
        asked = i > 0 and self.messages[i - 1].get("role") in ("user", "tool")
        try:
            before = self.render(self.messages[:i], True)
            if i and not asked:  # a template may have no generation prompt there
                asked = before != self.render(self.messages[:i])
            if asked and self.text.startswith(before):
                return len(before)
            if asked:
                return self.begin_behind(i)[1]
        except TemplateRefusal:  # such as of a template that wants a question
            before = None
        try:
            return self.begin_unasked(i)
        except TemplateRefusal:
            if i == 0 and before and self.text.startswith(before):
                return len(before)
            raise

    def begin_behind(self, i):
        """Where the generation prompt before message i begins, and where it ends, by what follows
        the content of message i - 1."""
        prompted, at = self.content_end(self.messages[:i], i - 1, prompt=True)
        bare = self.render(self.messages[:i])
        prompt_at = self.outside(bare, common(bare, prompted)) - at
        _, here = self.content_end(self.messages, i - 1, text=self.text)
        other = self.render(self.with_content(self.messages, i, self.letters[0]))
        size = min(common(prompted[at:], text[here:]) for text in (self.text, other))
        size = self.outside(self.text, here + size) - here
        whole = size == len(prompted) - at
        if other[:here] != self.text[:here] or not whole and size <= prompt_at:
            raise self.refusal("writes another header before an answer than it asks for one with")
        return here + prompt_at, here + size

    def begin_unasked(self, i):
        """Where message i begins, to which nothing asks: by the prompt that there is where a
        question is put before it."""
        other = self.beside([*self.messages[:i], self.question(), *self.messages[i:]])
        begin, end = other.begin_behind(i + 1)
        header = other.text[begin:end]
        here = self.content_end(self.messages, i - 1, text=self.text)[1] if i else 0
        variants = [self.render(self.with_content(self.messages, i, c)) for c in self.letters]
        before = os.path.commonprefix([*variants, self.text])
        here = here if here <= len(before) else 0  # of what is written behind the answer
        before = before[here:]
        if header and header in before:
            return here + before.rindex(header) + len(header)
        upto = self.render(self.messages[:i]) if i and not header else ""
        if upto and self.text.startswith(upto):
            return max(here, len(upto))
        if header or self.marks.sub("", before).strip():
            raise self.refusal("has no generation prompt before an answer that nothing asked for")
        marks = [0] + [mark.end() for mark in self.marks.finditer(before)]
        return here + marks[-1]

    def end(self, i, unasked=True):
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
        _, here = self.content_end(self.messages, i, text=self.text)
        whole, at = self.content_end(upto, i, text=whole)
        if self.text.startswith(whole[at:], here):
            return here + len(whole) - at
        # The last turn ends in another way: take the footer before a generation prompt.
        asked = [k + 1 for k in range(i) if self.messages[k].get("role") != "assistant"]
        asked = self.messages[: asked[-1]] if asked else [self.question()]
        prompted, bare = self.render(asked, True), self.render(asked)
        prompt = prompted[self.outside(bare, common(bare, prompted)) :]
        whole, at = self.content_end(upto, i, prompt=True)
        footer = whole[at:].removesuffix(prompt)
        if self.text.startswith(footer, here):
            return here + len(footer)
        _, after = self.content_end(self.messages, i + 1, text=self.text)
        found = self.ends.search(self.text, here, after)
        if found:  # an end token before the next turn's words
            return found.end()
        raise self.refusal("ends an answer in another way once there is a next turn")

    def end_unasked(self, i):
        """Where message i ends, by what follows its content where a question is put before it."""
        other = self.beside([*self.messages[:i], self.question(), *self.messages[i:]])
        _, at = other.content_end(other.messages, i + 1, text=other.text)
        footer = other.text[at : other.end(i + 1, unasked=False)]
        _, here = self.content_end(self.messages, i, text=self.text)
        if not self.text.startswith(footer, here):
            raise self.refusal("ends an answer in another way where nothing asks for it")
        return here + len(footer)

    def content_end(self, messages, i, prompt=False, text=None):
        """(The text of messages, where the content of message i ends in it)."""
        text = self.render(messages, prompt) if text is None else text
        a, b = (self.render(self.with_content(messages, i, c), prompt) for c in self.letters)
        size = common(a[::-1], b[::-1])
        if a == b or not text.endswith(a[len(a) - size :]):
            role = messages[i].get("role")
            raise self.refusal(
                f"does not write what the {role} says at one place, in its own words"
            )
        return text, len(text) - size

    def question(self):
        """A user's message, in the form that the others have."""
        parts = any(isinstance(m.get("content"), list) for m in self.messages)
        return {"role": "user", "content": [{"type": "text", "text": "?"}] if parts else "?"}

    def with_content(self, messages, i, text):
        """The messages, message i having this text."""
        content = messages[i].get("content")
        if isinstance(content, list) and content and isinstance(content[-1], dict):
            content = [*content[:-1], content[-1] | {"text": text}]
        else:
            content = text
        return [*messages[:i], messages[i] | {"content": content}, *messages[i + 1 :]]

    def outside(self, text, at):
        """The place, or the beginning of the special token that it would cut."""
        cut = [m.start() for m in self.marks.finditer(text) if m.start() < at < m.end()]
        return cut[0] if cut else at


TEMPLATE_SECONDS = 2  # of processor time for a rendering; one more for a million characters given
TEMPLATE_MEMORY = 1 << 30  # bytes that the process has, on Linux
TEMPLATE_GROWTH = 20  # characters out for one in, beside a million


class TemplateLimit(UserError):
    """A chat template took more time, memory or room than a rendering may."""


@lru_cache(8)
def compile_template(text):
    """A chat template in jinja2's sandbox, with what transformers lets a template use. What
    {% generation %} surrounds stands between two marks, generation_begin and generation_end."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            begin, end = (
                nodes.Output([nodes.Name(f"generation_{side}", "load")], lineno=line)
                for side in ("begin", "end")
            )
            return nodes.Scope([begin, *body, end], lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    loops = ["jinja2.ext.loopcontrols", Generation]
    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    room.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    room.globals |= {"tools": None, "documents": None, "raise_exception": raise_exception}
    room.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return room.from_string(text)


def render_template(text, given):
    """The text that a chat template makes of its variables."""
    return compile_template(text).render(given)


def template_worker(memory):
    """The process beside: it reads a request a line (JSON) and writes an answer a line. A rendering
    that takes more than its seconds ends the process, whatever it is at."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    if sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            text = render_template(request["template"], request["given"])
            answer = {"text": text} if len(text) <= request["room"] else {"limit": "room"}
        except MemoryError:
            answer = {"limit": "memory"}
        except Exception as error:
            kind = type(error).__name__
            known = kind in ("TemplateError", "SecurityError", "UndefinedError")
            answer = {"error": str(error)[:1000] if known else f"{kind}: {error}"[:1000]}
        print(json.dumps(answer), flush=True)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)


class Renderer:
    """Renders chat templates in a process of its own, which has little time and memory; it is
    started when it is first needed, and again after a rendering has ended it."""

    def __init__(self):
        self.process, self.owner, self.lock = None, os.getpid(), threading.Lock()
        self.overran = {}  # how often in a row a template was over a limit

    def start(self):
        needs = "import json, signal, sys\nfrom datetime import datetime\n"
        needs += "from functools import lru_cache, partial\n"
        parts = (compile_template, render_template, template_worker)
        program = needs + "\n".join(inspect.getsource(part) for part in parts)
        program += f"\nsys.path[:] = {[*map(str, sys.path)]!r}\n"
        program += f"template_worker({TEMPLATE_MEMORY})\n"
        # Without what this process has loaded, and ready in a tenth of a second.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def render(self, template, given):
        """The text that the template makes of its variables; ValueError with the template's own
        words if it raises, TemplateLimit beyond a limit."""
        if self.owner != os.getpid():  # a fork has a process of its own
            self.__init__()
        if self.overran.get(template, 0) >= 3:
            raise TemplateLimit(
                "the chat template was over its limits three times: it is not tried"
            )
        size = len(given_text := json.dumps(given, default=str))
        request = {"seconds": TEMPLATE_SECONDS + size / 1e6, "template": template}
        request["room"] = 1_000_000 + TEMPLATE_GROWTH * size
        line = f'{json.dumps(request)[:-1]}, "given": {given_text}}}\n'.encode()
        with self.lock:
            try:
                answer = self.ask(line, request["seconds"])
            except OSError as error:
                raise TemplateLimit(f"no process to render the chat template: {error}") from None
            except BaseException:  # Ctrl-C: its answer must not be taken for the next one's
                if self.process is not None:
                    self.process.kill()
                self.process = None
                raise
        if limit := answer.get("limit"):
            self.overran[template] = self.overran.get(template, 0) + 1
            over = {
                "memory": f"takes more than {TEMPLATE_MEMORY >> 20} MiB of memory",
                "room": f"makes more than {request['room']:,} characters of {size:,}",
                "time": f"takes more than {request['seconds']:.1f} seconds",
            }
            raise TemplateLimit(f"the chat template {over.get(limit, limit)}: it is refused")
        self.overran.pop(template, None)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def ask(self, line, seconds):
        """The process's answer to a request. One that ended before is replaced."""
        for _ in range(2):
            if self.process is None:
                self.start()
            process, timer = self.process, None
            if not hasattr(signal, "setitimer"):  # no limit of processor time there: by the clock
                timer = threading.Timer(10 * seconds, process.kill)
                timer.start()
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = b""
            if timer:
                timer.cancel()
            if answer.endswith(b"\n"):
                return json.loads(answer)
            self.process = None
            process.kill()
            code = process.wait()
            if timer or code == -signal.SIGPROF:
                return {"limit": "time"}
        return {"limit": f"ends the process that renders it ({code})"}


RENDERER = Renderer()
