"""`pip install .`: the scripts as `barelm train` in any folder, and nothing in anybody's way."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.request import urlopen

import pytest
from conftest import ROOT

import config
from barelm import cli

OURS = ("*.py", "barelm/*.py", "barelm/web/**/*", "config/*.py", "config/*.json")
BESIDE = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "requirements*.txt")
STAGES = "prepare train finetune rl eval report sample serve export bench".split()


def call(command, cwd, status=0, **env):
    """Run a command without what conftest.py says of the path: (its stdout, its stderr)."""
    environment = os.environ | env
    if not env:
        environment.pop("PYTHONPATH")
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def barelm(cwd, *args, status=0):
    """`python -m barelm` of this checkout."""
    return call([sys.executable, "-m", "barelm", *args], cwd, status, PYTHONPATH=str(ROOT))


def copy_of_the_source(folder):
    for pattern in (*OURS, *BESIDE):
        for path in ROOT.glob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = folder / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A virtual environment into which a source distribution of this checkout was installed: what
    this Python imports can be imported there, too."""
    for name, oldest in (("pip", 22), ("setuptools", 77)):
        try:  # not imported: setuptools changes what others import
            present = int(version(name).partition(".")[0])
        except PackageNotFoundError:
            present = 0
        if present < oldest:
            pytest.skip(f"needs {name} {oldest} or newer")
    folder = tmp_path_factory.mktemp("package")
    copy_of_the_source(folder / "source")
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    call([sys.executable, "-c", build], folder / "source")
    venv.create(folder / "venv", with_pip=False)
    [packages] = folder.glob("venv/lib/python*/site-packages")
    paths = [path for path in sys.path if path.endswith("-packages")]
    (packages / "beside.pth").write_text("\n".join(paths))
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = ["install", "--no-build-isolation", "--no-deps", "--no-index", "--no-compile"]
    [source] = folder.glob("barelm-*.tar.gz")
    call([*pip, *install, source], folder)
    yield packages
    call([*pip, "uninstall", "--yes", "barelm"], folder)
    left = [path for path in packages.rglob("*") if path.suffix != ".pyc"]
    assert {path.name for path in left if path.is_file()} == {"beside.pth"}
    assert not (folder / "venv/bin/barelm").exists()


def test_all_that_is_ours_is_installed_and_nothing_beside_it(site):
    for pattern in OURS:
        for path in ROOT.glob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT)
                inside = "barelm" if name.parts[0] == "barelm" else "barelm/_scripts/"
                copy = site / inside / name.relative_to("barelm" if inside == "barelm" else ".")
                assert copy.read_bytes() == path.read_bytes()
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names - {"__pycache__"} == {"barelm", "beside.pth"}


@pytest.fixture(scope="module")
def trained(site, tmp_path_factory):
    """A folder elsewhere in which a model was trained by the command, and names of the user's are
    names of ours."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "config").mkdir()
    (folder / "config/mine.py").write_text("max_steps = 3\nn_layer = 1\n")
    (folder / "model.py").write_text("raise SystemExit('another model.py')")
    (folder / "notes.txt").write_text("import os\n\n\ndef join(a, b):\n    return a + b\n" * 200)
    program = site.parents[2] / "bin/barelm"
    tiny = ["config/tiny.py", "config/mine.py"]  # the one of the package, and the user's
    call([program, "prepare", *tiny, "--source=notes.txt", "--val_fraction=0.5"], folder)
    call([program, "train", *tiny], folder)
    return folder


def test_the_stages_run_in_another_folder(site, trained):
    program = site.parents[2] / "bin/barelm"
    assert {path.name for path in trained.glob("*/*")} == {"tiny", "mine.py"}
    network = json.loads((trained / "out/tiny/config.json").read_text())
    assert (network["hidden_size"], network["num_hidden_layers"]) == (64, 1)
    command = [program, "sample", "config/tiny.py", "--prompt=import", "--max_new_tokens=3"]
    out, _ = call(command, trained)
    assert "import" in out
    _, words = call([program, "train", "--nothing=1"], trained, status=2)
    assert words.startswith("--nothing: unknown key 'nothing'")


def test_the_server_has_its_page(site, trained):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [site.parents[2] / "bin/barelm", "serve", "--model=out/tiny", f"--port={port}"]
    environment = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH"}}
    server = subprocess.Popen(
        [*map(str, command), "--device=cpu"],
        cwd=trained,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in server.stdout:
            if f":{port}" in line:
                break
        files = {"": "index.html", "page/main.js": "main.js", "page/style.css": "style.css"}
        for address, name in files.items():
            with urlopen(f"http://127.0.0.1:{port}/{address}", timeout=60) as answer:
                assert answer.read() == (ROOT / "barelm/web" / name).read_bytes()
    finally:
        server.kill()
        server.communicate()


def test_its_leaves_are_imported_where_it_is_installed(site, tmp_path):
    (tmp_path / "train.py").write_text("MINE = True\n")
    program = "import barelm.checkpoint, model, train; print(model.__file__, train.MINE)"
    python = site.parents[2] / "bin/python"
    out, _ = call([python, "-c", program], tmp_path)
    assert out.split() == [str(site / "barelm/_scripts/model.py"), "True"]


def test_the_stages_are_listed_in_their_order(tmp_path):
    out, _ = barelm(tmp_path)
    assert re.findall(r"^  (\w+) ", out, re.M) == [*STAGES, "recipes", "where"]
    assert out == barelm(tmp_path, "--help")[0]
    for line in out.splitlines()[2:12]:
        name, text = line.split(maxsplit=1)
        docstring = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
        assert text == docstring.partition("\n")[0]


def test_help_of_a_stage_is_the_scripts_in_the_words_of_the_command(tmp_path):
    ours, _ = barelm(tmp_path, "train", "--help")
    theirs, _ = call([sys.executable, ROOT / "train.py", "--help"], tmp_path)
    assert ours == config.commands_by_name(theirs) != theirs
    assert "torchrun --nproc_per_node=8 -m barelm train config/small.py" in ours


def test_an_unknown_word_is_refused_with_the_nearest(tmp_path):
    assert "did you mean 'train'?" in barelm(tmp_path, "trian", status=2)[1]
    assert "lists the stages" in barelm(tmp_path, "xyz", status=2)[1]
    assert "did you mean 'prepare'?" in barelm(tmp_path, "where", "prepar", status=2)[1]
    assert "no such recipe" in barelm(tmp_path, "train", "config/nothing.py", status=2)[1]


def test_where_a_script_lies(tmp_path):
    assert barelm(tmp_path, "where", "train")[0] == f"{ROOT / 'train.py'}\n"


def test_recipes_are_listed_and_copied(tmp_path):
    out, _ = barelm(tmp_path, "recipes")
    names = {path.name for path in (ROOT / "config").glob("*.py")} - {"__init__.py"}
    assert {line.split()[0] for line in out.splitlines()} == {f"config/{name}" for name in names}
    assert barelm(tmp_path, "recipes", "tiny")[0] == f"wrote {Path('config', 'tiny.py')}\n"
    copy = tmp_path / "config/tiny.py"
    assert copy.read_text() == (ROOT / "config/tiny.py").read_text()
    copy.write_text("max_steps = 3\n")
    assert "is there already" in barelm(tmp_path, "recipes", "tiny", status=1)[1]
    assert copy.read_text() == "max_steps = 3\n"


def test_a_recipe_of_the_current_folder_comes_before_the_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find_recipe("config/tiny.py") == str(ROOT / "config/tiny.py")
    assert config.find_recipe("tiny.py") == "tiny.py"
    (tmp_path / "config").mkdir()
    (tmp_path / "config/tiny.py").write_text("")
    assert config.find_recipe("config/tiny.py") == "config/tiny.py"


def test_a_script_of_a_fork_is_a_stage_too(tmp_path, monkeypatch):
    for name in ("zoo", "train", "model"):
        text = "" if name == "model" else "configure(globals())"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(cli, "SCRIPTS", tmp_path)
    assert list(cli.stage_scripts()) == ["train", "zoo"]


def requirements(name):
    """{package: its Requirement} of a file of requirements."""
    Requirement = pytest.importorskip("packaging.requirements").Requirement
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {Requirement(line).name: Requirement(line) for line in lines if line}


def test_the_package_asks_for_what_the_requirements_have():
    Requirement = pytest.importorskip("packaging.requirements").Requirement
    text = (ROOT / "pyproject.toml").read_text()
    [line] = re.findall(r"^dependencies = (\[.*\])$", text, re.M)
    asked = {Requirement(word).name: Requirement(word) for word in ast.literal_eval(line)}
    pinned = requirements("requirements.txt")
    assert asked.keys() == pinned.keys() - {"pytest"}
    for name, requirement in asked.items():
        for pin in pinned[name].specifier:
            assert requirement.specifier.contains(pin.version)
