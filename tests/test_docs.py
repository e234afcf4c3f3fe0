"""The chapters in docs/: their code runs, and what they point at exists."""

import importlib
import re

import pytest
from conftest import ROOT

from config import script_keys

CHAPTERS = sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = {path.stem: script_keys(path) for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_code_of_a_chapter_runs(path):
    for code in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
        exec(compile(code, str(path), "exec"), {})


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_what_a_chapter_points_at_exists(path):
    text = path.read_text(encoding="utf-8")
    for script, name in re.findall(rf"`({'|'.join(SCRIPTS)})\.([\w.]+)`", text):
        if name == "py":
            continue
        value = importlib.import_module(script)
        for part in name.split("."):
            value = getattr(value, part)
    for script, flags in re.findall(r"`(\w+)\.py ((?:--[\w=.:,*/' ]+)+)`", text):
        for flag in re.findall(r"--(\w+)", flags):
            assert flag in SCRIPTS[script], (script, flag)
    for flag in re.findall(r"`--(\w+)", text):
        assert any(flag in keys for keys in SCRIPTS.values()), flag
    for name in re.findall(r"`(config/\w+\.py)`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w./]+)\)", text):
        assert (path.parent / name).is_file(), name


def test_every_chapter_is_in_the_contents_and_they_in_the_readme():
    contents = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for path in CHAPTERS:
        assert path.name == "README.md" or f"({path.name})" in contents
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
