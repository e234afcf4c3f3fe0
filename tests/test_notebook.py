"""notebooks/: their code cells run in order, with fewer steps than a reader takes. No Jupyter is
needed: this stands for what of it they use."""

import contextlib
import io
import json
import os
import subprocess
import sys
import types

import pytest
from conftest import ROOT
from test_package import copy_of_the_source

NOTEBOOK = ROOT / "notebooks/first_hour.ipynb"
# What takes a reader minutes, and what stands for it here.
QUICKER = {
    "prepare.py\n": "prepare.py --max_documents=60 --vocab_size=512\n",
    "prepare.py --task=sft\n": "prepare.py --task=sft --max_documents=60\n",
    "--max_steps=200 --eval_every=50": "--max_steps=4 --eval_every=2 --n_layer=2 --n_embd=48",
    "--max_steps=80": "--max_steps=2",
}


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def as_python(cell):
    """A cell whose shell lines, !…, are calls."""
    lines = []
    for line in cell.split("\n"):
        lines.append(f"shell({line[1:]!r})" if line.startswith("!") else line)
    return "\n".join(lines)


def shell(command):
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.fixture
def pictures(monkeypatch):
    """What cells display, in the place of IPython's."""
    shown = []
    module = types.ModuleType("IPython.display")
    module.SVG = module.HTML = str
    module.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_the_cells_run_in_order(tmp_path, monkeypatch, pictures):
    copy_of_the_source(tmp_path)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    cells = "\n\n# the next cell\n\n".join(code_cells()) + "\n"
    for slow, quick in QUICKER.items():
        assert cells.count(slow) == 1, slow
        cells = cells.replace(slow, quick)
    said = io.StringIO()
    space = {"shell": shell}
    with contextlib.redirect_stdout(said):
        for cell in cells.split("# the next cell"):
            exec(compile(as_python(cell.strip()), NOTEBOOK.name, "exec"), space)
    assert (tmp_path / "out/hour_sft/model.safetensors").is_file()
    curve, bars, heat = pictures
    assert curve.startswith("<svg") and "<circle" in curve and "<polyline" in curve
    assert bars.count("<tr>") == 10
    assert heat.startswith("<svg") and heat.count("<rect") > 20
    assert "out/hour_sft (" in said.getvalue() and "block 2" in said.getvalue()


def test_the_file_is_a_notebook_without_what_others_machines_said():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with contextlib.suppress(ImportError):
        import nbformat

        nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 100_000
    outputs = json.dumps([cell.get("outputs") for cell in notebook["cells"]])
    assert "Traceback" not in outputs and "/root/" not in outputs and "/work/" not in outputs
