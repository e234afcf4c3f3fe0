"""The container's files, the README and the chapters against the scripts that they speak of."""

import ast
import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT

from config import script_keys

SCRIPTS = {path.name: script_keys(path) for path in ROOT.glob("*.py")}
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")


def read_text(path):
    """A text, with the lines of a command joined."""
    return path.read_text(encoding="utf-8").replace("\\\n", " ")


def imported(path):
    """The names of the modules that a file's code imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_image_has_all_that_the_server_imports():
    copied = re.findall(r"^COPY (.+) ", DOCKERFILE, re.M)
    copied = [ROOT / name for line in copied for name in line.split()]
    paths, seen = [ROOT / "serve.py"], set()
    while paths:
        path = paths.pop()
        seen.add(path)
        assert any(path == place or place in path.parents for place in copied), path
        for name in imported(path):
            for file in (f"{name}.py", f"{name}/__init__.py"):
                found = ROOT / file.replace(".", "/", file.count(".") - 1)
                if found.is_file() and found not in seen:
                    paths.append(found)
    assert len(seen) > 5


def test_the_image_has_what_it_copies_and_starts():
    [entry] = re.findall(r"^ENTRYPOINT (\[.*\])", DOCKERFILE, re.M)
    [health] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])", DOCKERFILE, re.M)
    python, script, *flags = json.loads(entry)
    assert python == "python" and {flag[2:].partition("=")[0] for flag in flags} <= {
        *SCRIPTS[script]
    }
    compile(json.loads(health)[2], "HEALTHCHECK", "exec")
    copied = [
        name for line in re.findall(r"^COPY (.+) ", DOCKERFILE, re.M) for name in line.split()
    ]
    assert script in copied and all((ROOT / name).exists() for name in copied)
    sent = re.findall(r"^!(.+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert sorted(sent) == sorted(name.rstrip("/") for name in copied)


def test_compose_names_flags_and_files_that_exist():
    yaml = pytest.importorskip("yaml")
    read = lambda name: yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    services = read("compose.yaml")["services"]
    server, keys = services["barelm"], SCRIPTS["serve.py"]
    flags = dict(flag.removeprefix("--").split("=") for flag in server["command"])
    assert flags.keys() <= keys.keys()
    assert float(server["stop_grace_period"].rstrip("s")) > float(flags["drain"])
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        binds = [v.split(":")[0] for v in service["volumes"] if isinstance(v, str)]
        assert all((ROOT / path).is_file() for path in binds if path.startswith("./"))
    [job] = read("deploy/prometheus.yml")["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"barelm:{keys['port'][0]}"]
    [source] = read("deploy/datasource.yaml")["datasources"]
    panels = json.loads((ROOT / "deploy/dashboard.json").read_text(encoding="utf-8"))["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    [provider] = read("deploy/dashboards.yaml")["providers"]
    mounts = [v.split(":")[1] for v in services["grafana"]["volumes"]]
    assert provider["options"]["path"] + "/dashboard.json" in mounts


def test_the_dashboard_asks_for_what_the_server_tells(tiny):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from test_serve import served

    with served(tiny) as site:
        site.complete(prompt="import", max_tokens=3)
        told = site.get("/metrics").text
    labels = {}  # of each series
    for name, inside in re.findall(r"^(barelm_\w+)(?:\{(.*)\})? \S+$", told, re.M):
        labels.setdefault(name, set()).update(re.findall(r'(\w+)="', inside))
    panels = json.loads((ROOT / "deploy/dashboard.json").read_text(encoding="utf-8"))["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(asked) >= 12
    for expr in asked:
        [name] = re.findall(r"barelm_\w+", expr)
        matched = re.findall(r"(\w+)(?:=|!=|=~|!~)\"", expr)
        grouped = [
            label for group in re.findall(r" by \((.*?)\)", expr) for label in group.split(", ")
        ]
        assert {*matched, *grouped} <= labels[name], expr
        assert ("rate(" in expr) == (not re.search(rf"# TYPE {name} gauge", told)), expr


ALL_KEYS = {key for keys in SCRIPTS.values() for key in keys}
OTHERS = {"gpus", "help"}  # docker's, and every script's


def flags_in(words):
    return {
        word[2:].partition("=")[0] for word in shlex.split(words, comments=True) if word[:2] == "--"
    }


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_flag_of_the_texts_exists(path):
    """Behind `python SCRIPT` that script has it, behind the image's name serve.py, and where a flag
    stands alone some script."""
    text = read_text(path)
    for flag in re.findall(r"`--([a-z][\w-]*)", text):
        assert flag in ALL_KEYS | OTHERS, flag
    commands = re.findall(r"^(?:\w+=\w+ )?(?:torchrun|python) .*?(\w+\.py)(.*)", text, re.M)
    for script, rest in commands:
        assert flags_in(rest) <= SCRIPTS[script].keys(), (script, rest)
    for rest in re.findall(r"^docker run .* barelm (.*)", text, re.M):
        assert flags_in(rest) <= SCRIPTS["serve.py"].keys(), rest


def rows(name, title):
    """The last cells of the table in docs/NAME, or in the README under a heading, one by one."""
    path = ROOT / "docs" / name
    if path.is_file():
        section = read_text(path)
    else:
        readme = read_text(ROOT / "README.md")
        section = re.search(rf"^## {title}\n(.*?)(?=^## )", readme, re.M | re.S)[1]
    return re.findall(r"^\|.*\| (.+) \|$", section, re.M)[2:]


def test_every_advice_names_a_setting_of_the_script_before_it():
    cells = rows("troubleshooting.md", "When it goes wrong")
    assert cells
    for cell in cells:
        script = None
        for name, flag in re.findall(r"`(\w+\.py)`|`--(\w+)", cell):
            script = name or script
            assert name in SCRIPTS or flag in SCRIPTS[script], cell


def is_there(dotted):
    """Whether `model.GPT` or `barelm.fast` is a module of ours, or something in one."""
    try:
        importlib.import_module(dotted)
        return True
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return hasattr(importlib.import_module(module), name)


def test_every_term_has_its_place():
    cells = rows("glossary.md", "Glossary")
    assert cells
    for cell in cells:
        script = None
        for name in re.findall(r"`(.+?)`", cell):
            if name in SCRIPTS:
                script = name
            elif "." in name:
                assert is_there(name), cell
            else:
                assert name in SCRIPTS[script], cell
