"""The container's files and the README against the scripts that they speak of."""

import json
import re
import shlex

import pytest
from conftest import ROOT

import model
from config import script_keys

README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
SCRIPTS = {path.name: script_keys(path) for path in ROOT.glob("*.py")}
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")


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


# Flags of docker and of others whose line in the README begins with another name than python's.
OTHERS = "build build-arg cap-drop gpus help init model_args nproc_per_node read-only rm"
OTHERS = {*OTHERS.split(), "stop-timeout", "tmpfs"}


def test_every_flag_of_the_readme_exists():
    """Behind `python SCRIPT` that script has it; elsewhere some script."""
    known = {key for keys in SCRIPTS.values() for key in keys} | OTHERS
    assert {*re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)} <= known
    commands = re.findall(r"^(?:\w+=\w+ )?(?:torchrun|python) .*?(\w+\.py)(.*)", README, re.M)
    assert len(commands) > 40
    for script, rest in commands:
        words = [word for word in shlex.split(rest, comments=True) if word.startswith("--")]
        assert {word[2:].partition("=")[0] for word in words} <= SCRIPTS[script].keys(), rest


def rows(title):
    """The last cells of the table under a heading, one by one."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## )", README, re.M | re.S)[1]
    cells = re.findall(r"^\|.*\| (.+) \|$", section, re.M)[2:]
    assert len(cells) > 10
    return cells


def test_every_advice_names_a_setting_of_the_script_before_it():
    for cell in rows("When it goes wrong"):
        script, flags = None, 0
        for name, flag in re.findall(r"`(\w+\.py)`|`--(\w+)", cell):
            script, flags = name or script, flags + bool(flag)
            assert name in SCRIPTS or flag in SCRIPTS[script], cell
        assert flags, cell


def test_every_term_has_its_place():
    for cell in rows("Glossary"):
        script = None
        for name in re.findall(r"`(.+?)`", cell):
            script = name if name in SCRIPTS else script
            kind, _, defined = name.partition("model.")
            if defined and name not in SCRIPTS:
                assert hasattr(model, defined), cell
            else:
                assert name in SCRIPTS or name in SCRIPTS[script], cell
