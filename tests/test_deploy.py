"""The container's files, and the tables of docs/, against the scripts that they speak of."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from config import script_keys

SCRIPTS = {path.name: script_keys(path) for path in ROOT.glob("*.py")}
PAGE = ROOT / "docs/deploy.md"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")


def read_text(path):
    """A text, with the lines of a command joined."""
    return path.read_text(encoding="utf-8").replace("\\\n", " ")


def copied_files():
    """The names of the files and folders that the Dockerfile copies from here."""
    lines = re.findall(r"^COPY (.+) ", DOCKERFILE, re.M)
    return [name.rstrip("/") for line in lines for name in line.split()]


def test_the_image_has_all_that_the_server_imports(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    for name in copied_files():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)
        else:
            shutil.copy(ROOT / name, tmp_path)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = [sys.executable, "-c", "import serve; print(serve.__file__)"]
    done = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "serve.py"), done.stderr


def test_the_image_has_what_it_copies_and_starts():
    [entry] = re.findall(r"^ENTRYPOINT (\[.*\])", DOCKERFILE, re.M)
    [health] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])", DOCKERFILE, re.M)
    python, script, *flags = json.loads(entry)
    assert python == "python" and {flag[2:].partition("=")[0] for flag in flags} <= {
        *SCRIPTS[script]
    }
    compile(json.loads(health)[2], "HEALTHCHECK", "exec")
    copied = copied_files()
    assert script in copied and all((ROOT / name).exists() for name in copied)
    sent = re.findall(r"^!(.+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert sorted(sent) == sorted(copied)


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


def test_what_stands_behind_the_images_name_are_flags_of_the_server():
    text = read_text(PAGE) if PAGE.is_file() else read_text(ROOT / "README.md")
    commands = re.findall(r"^docker run .* barelm (.*)", text, re.M)
    assert commands
    for rest in commands:
        words = [word for word in shlex.split(rest, comments=True) if word.startswith("--")]
        assert {word[2:].partition("=")[0] for word in words} <= SCRIPTS["serve.py"].keys(), rest


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


def kubernetes(name):
    """The objects of a file for Kubernetes, by their kinds."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "deploy/kubernetes" / name).read_text(encoding="utf-8")
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def test_the_job_for_kubernetes_starts_train_py_on_all_its_pods():
    objects = kubernetes("train.yaml")
    job = objects["Job"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"][0] == "torchrun"
    launch = dict(
        word.removeprefix("--").split("=") for word in container["command"] if "=" in word
    )
    script = container["command"].index("train.py")
    assert all(word[2:].partition("=")[0] in SCRIPTS["train.py"] or (ROOT / word).is_file()
               for word in container["command"][script + 1 :])  # fmt: skip
    assert int(launch["nnodes"]) == job["completions"] == job["parallelism"]
    assert int(launch["nproc_per_node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    service = objects["Service"]
    host, port = launch["rdzv_endpoint"].split(":")
    assert host == f"{objects['Job']['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    claim = kubernetes("volume.yaml")["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
    assert "train.py" in copied_files()


def test_the_server_for_kubernetes_is_probed_and_scraped():
    deployment = kubernetes("serve.yaml")["Deployment"]["spec"]["template"]
    [container] = deployment["spec"]["containers"]
    flags = dict(flag.removeprefix("--").split("=") for flag in container["args"])
    keys = SCRIPTS["serve.py"]
    assert flags.keys() <= keys.keys()
    assert deployment["spec"]["terminationGracePeriodSeconds"] > float(flags["drain"])
    assert container["ports"][0]["containerPort"] == keys["port"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    annotations = deployment["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(keys["port"][0])


def test_the_script_for_slurm():
    path = ROOT / "deploy/slurm.sh"
    text = read_text(path)
    [flags] = re.findall(r"train\.py (.*) &$", text, re.M)
    for flag in re.findall(r"--(\w+)", flags):
        assert flag in SCRIPTS["train.py"]
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)
