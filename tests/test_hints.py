"""Type hints: every public function says what it takes and gives, and mypy finds its callers to
agree."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = [ROOT / "model.py", ROOT / "config/__init__.py", *sorted((ROOT / "barelm").glob("*.py"))]


def public_functions(body, owner=None):
    """(function, class or None): all whose name has no underscore, and how objects are made and
    called; functions within functions are nobody else's."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            of_objects = owner is not None and node.name in ("__init__", "__call__")
            if of_objects or not node.name.startswith("_"):
                yield node, owner
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, node)


def without_hints(path):
    """The names of a file's public functions of which a parameter or the result has no hint."""
    names = []
    for function, owner in public_functions(ast.parse(path.read_text(encoding="utf-8")).body):
        args = function.args
        parameters = [*args.posonlyargs, *args.args]
        is_static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
        if owner is not None and not is_static:
            parameters = parameters[1:]  # self
        parameters += [*args.kwonlyargs, args.vararg, args.kwarg]
        hints = [parameter.annotation for parameter in parameters if parameter is not None]
        if None in [*hints, function.returns]:
            names.append(f"{owner.name}.{function.name}" if owner else function.name)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_public_functions_have_hints(path):
    assert without_hints(path) == []


def test_what_lacks_a_hint_is_seen(tmp_path):
    text = "def a(x: int) -> int: ...\ndef b(x) -> int: ...\ndef c(x: int): ...\ndef _d(x): ...\n"
    text += "class E:\n  def f(self) -> None: ...\n  def g(self, *y) -> None: ...\n"
    path = tmp_path / "some.py"
    path.write_text(text)
    assert without_hints(path) == ["b", "c", "E.g"]


def mypy(*args, cwd=ROOT):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_calls_agree_with_the_hints():
    done = mypy("--cache-dir=.pytest_cache/mypy")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_a_call_that_does_not_agree_is_found(tmp_path):
    path = tmp_path / "some.py"
    text = "def f(n: int) -> str:\n    return 'a' * n\n\n\ndef g() -> int:\n    return f('a')\n"
    path.write_text(text)
    done = mypy("--cache-dir", str(tmp_path / "cache"), str(path), cwd=tmp_path)
    assert '"f" has incompatible type "str"' in done.stdout
    assert 'got "str", expected "int"' in done.stdout
