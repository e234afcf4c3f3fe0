"""The views Training and Model: what the server answers, against the files themselves; what a real
browser shows of it, if there is one."""

import csv
import io
import json
import math
import re
import shutil
import signal
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import start
from test_page import browser, open_view  # noqa: F401 (a fixture)
from test_reload import changed

from barelm.checkpoint import load, save
from barelm.optim import flops_per_token

pytest.importorskip("fastapi")

KEY = "secret"
STEPS = 40


def curve(n, tempo):
    """A log whose figures can be told apart: rows, an evaluation every ten steps."""
    rows = []
    for i in range(1, n + 1):
        loss = 2 + 5 / i + 0.3 * math.sin(7 * i * tempo)
        rows.append({"step": i, "tokens": 100 * i, "loss": loss, "lr": 1e-3, "dt": tempo})
        if i % 10 == 0:
            rows.append({"step": i, "tokens": 100 * i, "val_loss": 2 + 5 / i, "val_bpb": 1 / i})
    return rows


def write_log(folder, rows):
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """A server of a copy of out/tiny, with three runs beside it: its url, folder, get and post."""
    out = tmp_path_factory.mktemp("runs") / "out"
    folder = out / "tiny"
    shutil.copytree(tiny / "out/tiny", folder, ignore=lambda *_: ["best"])
    for name, tempo, n in (("a", 2.0, STEPS), ("b & <c>", 90.0, STEPS // 2), ("rl", 1.0, 3)):
        (out / name).mkdir()
        write_log(out / name, curve(n, tempo))
    write_log(out / "rl", [{"step": 1, "reward": 0.5, "grad_norm": 1, "clipfrac": 0, "dt": 1}])
    options = [f"--model={folder}", "--port=0", f"--api_key={KEY}", "--device=cpu"]
    process = start(folder, "serve.py", *options)
    lines = iter(process.stdout.readline, "")
    url = next(m[1] for line in lines if (m := re.search(r"(http://\S+)", line)))
    head = {"Authorization": f"Bearer {KEY}"}
    get = lambda path: requests.get(url + path, headers=head, timeout=60)
    post = lambda path, **body: requests.post(url + path, json=body, headers=head, timeout=60)
    yield SimpleNamespace(url=url, folder=folder, out=out, get=get, post=post)
    process.send_signal(signal.SIGTERM)
    process.wait()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# The server


def test_the_log_is_told_from_a_step_on(server):
    rows = rows_of(server.folder)
    told = server.get("/inspect/log").json()
    assert told["rows"] == rows and told["last"] == 60 and told["every"] == 1
    passed, sums = 0.0, []
    for row in rows:
        passed += row.get("dt", 0)
        sums.append(passed)
    assert told["seconds"] == pytest.approx(sums, abs=1e-3)
    assert told["standing"]["state"] == "finished" and told["standing"]["progress"] == 1
    assert server.get("/inspect/log?after=58").json()["rows"] == [r for r in rows if r["step"] > 58]
    assert server.get("/inspect/log?after=60").json()["rows"] == []
    assert server.get("/inspect/log?run=a").json()["rows"] == rows_of(server.out / "a")


def test_runs_are_those_beside_the_served_one_and_no_other_path_is_read(server):
    told = server.get("/inspect/runs").json()
    assert told["served"] == told["runs"][0] == "tiny"
    assert set(told["runs"]) == {"tiny", "a", "b & <c>", "rl"}
    for name in ("..", "../out/a", "/etc", "a/../a", "tiny/best", "%2e%2e", "none"):
        for path in ("/inspect/log?run=", "/inspect/log.csv?run="):
            answer = server.get(path + name)
            assert answer.status_code == 404 and "no such run" in answer.text, name
    assert requests.get(server.url + "/inspect/runs", timeout=60).status_code == 401
    assert requests.get(server.url + "/inspect/log?run=a", timeout=60).status_code == 401
    assert requests.post(server.url + "/inspect/reload", json={}, timeout=60).status_code == 401
    assert server.get("/inspect/log?after=x").status_code == 400


def test_all_rows_come_as_a_table(server):
    answer = server.get("/inspect/log.csv?run=tiny&run=a")
    assert answer.headers["Content-Type"].startswith("text/csv")
    table = list(csv.DictReader(io.StringIO(answer.text)))
    rows = rows_of(server.folder) + rows_of(server.out / "a")
    assert len(table) == len(rows)
    for told, row in zip(table, rows):
        for key, value in row.items():
            assert told[key] == ("" if value is None else str(value))


def test_new_weights_answer_behind_a_reload(server):
    net, tok = load(server.folder)
    file = server.folder / "model.safetensors"
    before = file.read_bytes()
    wanted = dict(prompt="import os", max_tokens=1, temperature=0, logprobs=3)
    told = []  # the log-probabilities of the most likely tokens

    def answer():
        choice = server.post("/v1/completions", **wanted).json()["choices"][0]
        told.append(sorted(choice["logprobs"]["top_logprobs"][0].values()))
        return server.get("/inspect/runs").json()["weights"]

    now = {"step": 60, "step_on_disk": 60, "are_new": False, "can_reload": True, "busy": False}
    assert answer() == now
    new = changed(net)
    save(server.folder, new, tok, step=80)
    assert answer() == now | {"step_on_disk": 80, "are_new": True}
    assert told[1] == pytest.approx(told[0])  # until somebody asks
    assert server.post("/inspect/reload").json() == {"step": 80}
    assert answer() == now | {"step": 80, "step_on_disk": 80}
    with torch.no_grad():
        logits = new(torch.tensor([tok.encode("import os")]))[0, -1, : tok.n_vocab]
    right = logits.log_softmax(-1).topk(3).values.tolist()[::-1]
    assert told[2] == pytest.approx(right, abs=1e-3)
    assert told[2] != pytest.approx(told[0], abs=1e-3)
    config = server.folder / "config.json"
    settings = config.read_text()
    config.write_text(settings.replace('"rope_theta": ', '"rope_theta": 1'))
    refused = server.post("/inspect/reload")
    assert refused.status_code == 409 and "another model by now (rope_theta" in refused.text
    config.write_text(settings)
    file.write_bytes(before)
    assert server.post("/inspect/reload").json() == {"step": 60}
    assert answer() == now and told[3] == pytest.approx(told[0])


# --------------------------------------------------------------------------------------------------
# The page in a browser


@pytest.fixture
def page(browser, server):  # noqa: F811
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(f"sessionStorage.setItem('key', '{KEY}')")
    page.goto(server.url)
    page.wait_for_selector("#status:text-is('Ready')")
    yield page
    context.close()
    assert not errors


def points_of(line):
    points = [point.split(",") for point in line.get_attribute("points").split()]
    return [(float(x), float(y)) for x, y in points]


def shares(values):
    """Where values are between the first and the last."""
    return [(value - values[0]) / (values[-1] - values[0]) for value in values]


def figure_of(page, title):
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))


def test_curves_are_live(page, server):
    open_view(page, "Training")
    path = server.folder / "log.jsonl"
    before = path.read_text()
    page.wait_for_selector("#run:has-text('60 steps')")
    assert page.locator("#run").text_content().startswith("Finished: 60 steps")
    line = page.locator("#charts svg").first.locator("polyline").first
    assert len(points_of(line)) == 60
    try:
        with path.open("a") as log:
            log.write('{"step": 61, "loss": 1.5}\n{"step": 61, "val_loss": 1.25}\n')
        page.wait_for_selector("#run:has-text('validation 1.25 at step 61')")
        assert len(points_of(line)) == 61
        page.get_by_label("Logarithmic x axis").check()
        x = [x for x, _ in points_of(line)]  # on a logarithmic axis 1 to 8 is as far as 7 to 56
        assert x[7] - x[0] == pytest.approx(x[55] - x[6], abs=0.3)
    finally:
        path.write_text(before)


def axis_values(texts):
    """The numbers that an axis shows: 1.5e-3, 12.5K."""
    scales = {"K": 1e3, "M": 1e6}
    return [float(text.rstrip("KM")) * scales.get(text[-1], 1) for text in texts]


COLUMNS = {  # of a log: what is easily rounded away
    "loss": [2 + 0.0004 * i for i in range(11)],
    "bpb": [0.0075 + 0.0005 * i for i in range(11)],
    "lr": [0.0003 * i for i in range(11)],
    "grad_norm": [0.0012 + 1e-6 * i for i in range(11)],
    "tok_s": [1_000_000 + 40 * i for i in range(11)],
    "gap": [-0.005 + 0.001 * i for i in range(11)],
    "same": [0.00125] * 11,
}


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_label_is_the_number_at_its_place(page, server, logarithmic):
    path = server.folder / "log.jsonl"
    before = path.read_text()
    rows = [{"step": i + 1} | {key: v[i] for key, v in COLUMNS.items()} for i in range(11)]
    write_log(server.folder, rows)
    try:
        open_view(page, "Training")
        page.wait_for_selector("#run:has-text('11 steps')")
        if logarithmic:
            page.get_by_label("Logarithmic x axis").check()
            page.get_by_label("Logarithmic y axis").check()
        for figure, name in zip(page.locator("#charts figure").all(), COLUMNS, strict=True):
            points = points_of(figure.locator("polyline").first)
            for axis, data, anchor in ((0, range(1, 12), "middle"), (1, COLUMNS[name], "end")):
                texts = figure.locator(f"text[text-anchor={anchor}]").all()
                told = axis_values([text.text_content() for text in texts])
                places = [float(text.get_attribute("xy"[axis])) for text in texts]
                assert told and len({*told}) == len(told)
                if data[0] == data[-1]:
                    assert told == [data[0]]
                    continue
                logs = logarithmic and data[0] > 0
                scale = math.log if logs else float
                first, last = scale(data[0]), scale(data[-1])
                for value, place in zip(told, places):
                    share = (scale(value) - first) / (last - first)
                    right = points[0][axis] + share * (points[-1][axis] - points[0][axis])
                    assert place - 4 * axis == pytest.approx(right, abs=0.5), (name, value)
    finally:
        path.write_text(before)


def test_smoothing_and_three_axes(page, server):
    open_view(page, "Training")
    page.get_by_label("b & <c>").check()
    page.get_by_label("tiny (this model)").uncheck()
    figure = figure_of(page, "Loss")
    rows = [row for row in curve(STEPS // 2, 90.0) if "loss" in row]
    page.get_by_label("Smoothing").fill("0.8")
    average, weights, right = 0.0, 0.0, []
    for row in rows:  # all rows so far, each weighted by 0.8 to the power of its age
        average = 0.8 * average + row["loss"]
        weights = 0.8 * weights + 1
        right.append(average / weights)
    raw, smooth = [points_of(line) for line in figure.locator("polyline").all()[:2]]
    heights = [y for _, y in raw]
    losses = [row["loss"] for row in rows]
    scale = (heights[-1] - heights[0]) / (losses[-1] - losses[0])
    expected = [heights[0] + scale * (value - losses[0]) for value in right]
    assert [y for _, y in smooth] == pytest.approx(expected, abs=0.2)
    assert f"smoothed {right[-1]:.4g}" in figure.locator(".readout").text_content()
    figure.locator("svg").focus()
    page.keyboard.press("Home")
    assert f"training {losses[0]:.4g}" in figure.locator(".readout").text_content()
    assert figure.locator("text.axis").text_content() == "steps"

    for name, words in (("Tokens", "tokens"), ("Time", "minutes")):
        page.get_by_label("Horizontal axis").select_option(name)
        assert figure.locator("text.axis").text_content() == words
        raw = points_of(figure.locator("polyline").first)
        assert shares([x for x, _ in raw]) == pytest.approx([i / 19 for i in range(20)], abs=1e-3)
        ticks = axis_values(figure.locator("text[text-anchor=middle]").all_text_contents())
        assert ticks[-1] == {"tokens": 2000, "minutes": 30}[words]  # 20 steps of 100, of 1.5 min
    page.get_by_label("Smoothing").fill("0")
    assert figure.locator("polyline").count() == 2  # training and validation


def test_several_runs_over_each_other_and_their_files(page, server):
    open_view(page, "Training")
    page.get_by_label("a", exact=True).check()
    page.get_by_label("rl", exact=True).check()
    figure = figure_of(page, "Loss")
    page.wait_for_selector("#run-list:has-text('40 steps')")
    rgb = "e => getComputedStyle(e)"
    lines = {line.evaluate(rgb + ".stroke") for line in figure.locator("polyline").all()}
    swatches = [box.evaluate(rgb + ".fill") for box in page.locator("#run-list rect").all()]
    assert len(lines) == 2 < len({*swatches}) == len(swatches) == 4 and lines < {*swatches}
    last = curve(STEPS, 2.0)[-2]["loss"]
    assert f"a training {last:.4g}" in figure.locator(".readout").text_content()
    for title in ("Reward", "Gradient norm", "Clip fraction", "Learning rate", "Bits per byte"):
        assert figure_of(page, title).count() == 1, title
    page.get_by_label("Horizontal axis").select_option("Time")
    assert page.locator("option[value=tokens]").is_disabled()  # rl has none

    with page.expect_download() as told:
        page.get_by_role("button", name="CSV").click()
    assert re.fullmatch(r"tiny-(a-rl|rl-a)\.csv", told.value.suggested_filename)
    table = list(csv.DictReader(told.value.path().open()))
    assert {row["run"] for row in table} == {"tiny", "a", "rl"}
    page.get_by_label("Download").select_option("Loss")
    with page.expect_download() as told:
        page.get_by_role("button", name="SVG").click()
    svg = ET.parse(told.value.path()).getroot()
    names = {element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Loss", "tiny", "a", "rl"} <= names
    lines = list(svg.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == figure.locator("polyline").count()
    assert {line.get("stroke") for line in lines} == {
        line.evaluate(rgb + ".stroke") for line in figure.locator("polyline").all()
    }
    with page.expect_download() as told:
        page.get_by_role("button", name="PNG").click()
    data = told.value.path().read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width = int.from_bytes(data[16:20], "big")
    assert width == 2 * float(svg.get("width"))


def test_new_weights_are_loaded_on_a_click(page, server):
    net, tok = load(server.folder)
    before = (server.folder / "model.safetensors").read_bytes()
    open_view(page, "Training")
    page.wait_for_selector("#run:has-text('60 steps')")
    assert not page.locator("#weights").is_visible()
    save(server.folder, changed(net), tok, step=80)
    page.wait_for_selector("#weights:has-text('are of step 60. The folder holds those of step 80')")
    page.get_by_role("button", name="Load the newer weights").click()
    page.locator("#weights").wait_for(state="hidden")
    assert server.get("/inspect/runs").json()["weights"]["step"] == 80
    (server.folder / "model.safetensors").write_bytes(before)
    page.get_by_role("button", name="Load the newer weights").click()
    page.locator("#weights").wait_for(state="hidden")


def test_the_network_as_a_diagram_whose_parts_open_to_their_tensors(page, server):
    net, _ = load(server.folder)
    panel = open_view(page, "Model")
    n_params = sum(p.numel() for p in net.parameters())
    assert panel.locator("#sum").text_content().startswith(f"{n_params:,} parameters")
    attention = sum(p.numel() for n, p in net.named_parameters() if ".self_attn." in n)
    told = {}
    for row in panel.locator("#shares tbody tr").all():
        told[row.locator("th").text_content().strip()] = row.locator("td").first.text_content()
    share = float(told["Attention"].split()[0])
    assert share == pytest.approx(100 * attention / n_params, abs=0.06)
    assert told["Head"] == "0"  # it has the embedding's matrix
    flops = flops_per_token(net.config, net.config.n_ctx, backward=False)
    cost = re.search(r"A token costs ([\d.]+)\s([kMG])FLOPs", panel.locator("#cost").text_content())
    unit = {"k": 1e3, "M": 1e6, "G": 1e9}[cost[2]]
    assert float(cost[1]) * unit == pytest.approx(flops, rel=0.005)
    boxes = panel.locator("#network summary .name").all_text_contents()
    order = ["Embedding", "Norm", "Attention", "Norm", "MLP", "Final norm", "Head"]
    assert boxes == order
    assert "2 blocks" in panel.locator(".stack-head").text_content()
    summary = panel.locator("summary", has_text="Attention")
    summary.focus()
    page.keyboard.press("Enter")
    rows = panel.locator("details[open] tbody tr")
    q = net.model.layers[0].self_attn.q_proj.weight
    texts = [row.locator("td").all_text_contents() for row in rows.all()]
    assert ["q_proj", "2 of 64 × 64", f"{2 * q.numel():,}"] in texts
    assert sum(int(row[2].replace(",", "")) for row in texts) == attention
