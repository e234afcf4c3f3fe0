"""What the names in a Python function are: entities to learn tagging from without a download."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ast import Call, Constant, FunctionDef, JoinedStr, Name, alias, arg


DEFINITION = re.compile(r"(?:async\s+)?(?:def|class)\s+")


def entities_of(code: str) -> list[dict]:
    """[{"start", "end", "label"}] of a function's source, in characters: `function` where one (or a
    class) is defined, its `parameter`s and their uses, `call` what is called, `string`s, and what
    it `import`s. A SyntaxError where the source is none."""
    finder = EntityFinder(code)
    finder.visit(ast.parse(code))
    return sorted(finder.entities, key=lambda entity: entity["start"])


class EntityFinder(ast.NodeVisitor):
    def __init__(self, code: str) -> None:
        self.code = code
        self.lines = [line.encode() for line in code.split("\n")]
        self.begins = [0]  # of each line
        for line in code.split("\n"):
            self.begins.append(self.begins[-1] + len(line) + 1)
        self.parameters = set()
        self.called = set()  # where names that are called end
        self.entities = []

    def place(self, number: int, column: int) -> int:
        """The character at a line and column, which ast counts in bytes."""
        return self.begins[number - 1] + len(self.lines[number - 1][:column].decode())

    def begin(self, node: Any) -> int:
        return self.place(node.lineno, node.col_offset)

    def end(self, node: Any) -> int:
        return self.place(node.end_lineno, node.end_col_offset)

    def add(self, label: str, start: int, end: int) -> None:
        self.entities.append({"start": start, "end": end, "label": label})

    def visit_definition(self, node: FunctionDef) -> None:
        start = DEFINITION.match(self.code, self.begin(node)).end()
        self.add("function", start, start + len(node.name))
        # Before the body, where they are used.
        self.parameters.update(arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg))
        self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_definition

    def visit_arg(self, node: arg) -> None:
        self.add("parameter", self.begin(node), self.begin(node) + len(node.arg))
        self.generic_visit(node)  # its annotation

    def visit_Call(self, node: Call) -> None:
        if isinstance(node.func, (ast.Name, ast.Attribute)):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            end = self.end(node.func)
            self.add("call", end - len(name), end)
            self.called.add(end)
        self.generic_visit(node)

    def visit_Name(self, node: Name) -> None:
        if node.id in self.parameters and self.end(node) not in self.called:
            self.add("parameter", self.begin(node), self.end(node))

    def visit_Constant(self, node: Constant) -> None:
        if isinstance(node.value, (str, bytes)):
            self.add("string", self.begin(node), self.end(node))

    def visit_JoinedStr(
        self, node: JoinedStr
    ) -> None:  # as a whole: what places its parts have depends on Python
        self.add("string", self.begin(node), self.end(node))

    def visit_alias(self, node: alias) -> None:
        self.add("import", self.begin(node), self.begin(node) + len(node.name))
