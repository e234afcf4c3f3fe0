"""Chat templates are programs, in the language of jinja2: this runs them, in its sandbox.

As a script it is the process in which strangers' templates run (`Renderer` in chat.py starts it):

    python -I -S render.py '["folder of jinja2", …]' BYTES_OF_MEMORY

It reads a request a line and writes an answer a line, both JSON. It imports nothing of torch or of
barelm: so it is ready in a tenth of a second, and has nothing in memory that is worth stealing."""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from functools import lru_cache, partial
from typing import Any


@lru_cache(8)
def compile_template(text: str) -> Any:
    """A chat template in jinja2's sandbox, with what transformers lets a template use. What
    {% generation %} surrounds stands between two marks, generation_begin and generation_end."""
    # Not above: where this is the process, sys.path comes first.
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}: what is between, with a mark on either side."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            marks = []
            for name in ("generation_begin", "generation_end"):  # variables of the template
                marks.append(nodes.Output([nodes.Name(name, "load")], lineno=line))
            return nodes.Scope([marks[0], *body, marks[1]], lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(form):
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,  # transformers' choice: a line with a tag alone writes nothing
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],  # {% break %}, {% continue %}
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's is for HTML
    environment.globals["tools"] = None
    environment.globals["documents"] = None
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(text)


def render_template(text: str, given: dict) -> str:
    """The text that a chat template makes of its variables."""
    return compile_template(text).render(given)


def limit_memory(n_bytes: int) -> None:
    """No more memory than so many bytes for this process, on Linux: beyond is a MemoryError."""
    if sys.platform != "linux":  # elsewhere the limit is not kept, or there is none
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        n_bytes = min(n_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


def limit_seconds(seconds: float) -> None:
    """End this process after so many seconds of processor time, whatever it is at; 0: no limit.
    (An exception could be caught by the template's program, or come in the middle of C code.)"""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer_to(request: dict) -> dict:
    """The answer to a request {"template", "given", "room"}: {"text"}, {"limit"} or {"error"}."""
    try:
        text = render_template(request["template"], request["given"])
    except MemoryError:
        return {"limit": "memory"}
    except Exception as error:
        kind = type(error).__name__
        if kind in ("TemplateError", "SecurityError", "UndefinedError"):  # these say what is wrong
            return {"error": str(error)[:1000]}
        return {"error": f"{kind}: {error}"[:1000]}
    if len(text) > request["room"]:
        return {"limit": "room"}
    return {"text": text}


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # -I and -S leave it without any package
    limit_memory(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    for line in sys.stdin:
        request = json.loads(line)
        limit_seconds(request["seconds"])
        answer = answer_to(request)
        print(json.dumps(answer), flush=True)
        limit_seconds(0)


if __name__ == "__main__":
    main()
