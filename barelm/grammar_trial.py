"""A process in which a grammar is compiled first: what takes too long, or too much, ends with it.

    trial = Trial(limits)
    trial.check("start: /a+/")  # UserError: what is wrong with it, or that it takes too long

The library cannot be interrupted, and a schema of a few lines may keep it busy for minutes, by
intersections of patterns, say. The process serves for one grammar after another, and another one
takes its place where it had to be ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files are no modules of the library's
else:
    from barelm.errors import UserError

SECONDS = 5.0  # that a grammar may take
MEMORY = 2 << 30  # bytes of the process
WAIT = 20.0  # seconds for those before it
STACK = 1 << 29  # bytes, of address space alone: the library recurses along rules and references


class Trial:
    """limits: of the library's LLParserLimits, a dict."""

    def __init__(self, limits: dict) -> None:
        self.limits = limits
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()

    def check(self, text: str) -> None:
        """Compile a grammar of llguidance's form of Lark; UserError where that fails."""
        if not self.lock.acquire(timeout=WAIT):
            raise UserError("too many grammars are being compiled: try again")
        try:
            error = self.ask(text)
        finally:
            self.lock.release()
        if error:
            raise UserError(error)

    def ask(self, text: str) -> str:
        """What is wrong with a grammar, or ""."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(self.limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the server, whose end ends this one too
            )
            self.read_line(4 * WAIT)  # it has imported the library
        self.process.stdin.write(json.dumps(text) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        line = self.read_line(SECONDS)
        if line is None:
            return f"it takes more than {SECONDS:g} s, or too much memory, to compile"
        return json.loads(line)

    def read_line(self, seconds: float) -> str | None:
        """The next line of the process; None where it ends, or is ended for taking too long."""
        process = self.process
        clock = threading.Timer(seconds, process.kill)  # type: ignore[union-attr]
        clock.start()
        line = process.stdout.readline()  # type: ignore[union-attr]
        clock.cancel()
        if line.endswith("\n"):
            return line
        process.kill()  # type: ignore[union-attr]
        process.wait()  # type: ignore[union-attr]
        self.process = None
        return None


def work() -> None:
    """Read grammars, a line of JSON each, and answer each with a line: what is wrong with it."""
    import llguidance

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # Windows, or a lower limit already
        pass
    limits = llguidance.LLParserLimits(**json.loads(sys.argv[1]))
    print(flush=True)  # ready
    for line in sys.stdin:
        grammar = llguidance.LLMatcher.grammar_from_lark(json.loads(line))
        print(json.dumps(llguidance.LLMatcher.validate_grammar(grammar, limits=limits)), flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK)
    threading.Thread(target=work).start()
