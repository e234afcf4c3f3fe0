"""The README and the chapters in docs/: their code runs, and what they point at exists."""

import importlib
import re

import pytest
from conftest import ROOT

from config import script_keys

CHAPTERS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *CHAPTERS]
FILE_ENDINGS = ("py", "md", "svg", "html", "json", "safetensors", "onnx", "onnx_data")
OTHERS = ("help", "gpus")  # flags of every script, and of docker
SCRIPTS = {path.stem: script_keys(path) for path in ROOT.glob("*.py")}


def page(path):
    return path.read_text(encoding="utf-8").replace("\\\n", " ")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_code_of_a_chapter_runs(path):
    for code in re.findall(r"^```python\n(.*?)^```", page(path), re.S | re.M):
        exec(compile(code, str(path), "exec"), {})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_names_of_a_page_exist(path):
    """`train.remarks`, `model.GPT.hidden`, `barelm.run.Run.sum`."""
    leaves = "|".join(p.stem for p in (ROOT / "barelm").glob("*.py"))
    for module, name in re.findall(
        rf"`((?:barelm\.(?:{leaves})|{'|'.join(SCRIPTS)}))\.([A-Za-z_][\w.]*)`", page(path)
    ):
        if name in FILE_ENDINGS:  # a file: `report.md`
            continue
        value = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_have_their_flags(path):
    text = page(path)
    commands = re.findall(r"^(?:\w+=\w+ )?(?:torchrun|python) .*?(\w+)\.py(.*)", text, re.M)
    commands += re.findall(r"`(\w+)\.py ((?:--[\w=.:,*/' ]+)+)`", text)
    for script, rest in commands:
        for flag in re.findall(r"--([a-z]\w*)", rest.partition("#")[0]):
            assert flag in SCRIPTS[script], (script, flag)
    for flag in re.findall(r"`--([a-z]\w*)", text):
        assert flag in OTHERS or any(flag in keys for keys in SCRIPTS.values()), flag


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_files_of_a_page_exist(path):
    for name in re.findall(r"`((?:config|barelm|docs|tests)/\w+\.\w+)`", page(path)):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", page(path)):
        assert (path.parent / name).exists(), name


def test_every_chapter_is_in_the_contents_and_they_in_the_readme():
    contents = page(ROOT / "docs/README.md")
    for path in CHAPTERS:
        assert path.name == "README.md" or f"({path.name})" in contents
    assert "(docs/README.md)" in page(ROOT / "README.md")
