"""serve.py's look inside against naive references, and its page in a real browser if there is one
(Python's playwright and a chromium)."""

import json
import math
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import start
from test_model import QWEN3, make_net

import model as core
from barelm import page as inside
from barelm.attention_maps import attention_maps
from barelm.checkpoint import load
from barelm.optim import n_params
from barelm.quantized import quantize_weights

pytest.importorskip("fastapi")

KEY = "sésame, ouvre-toi"
TEXT = 'def f(x):\n    return "<b>é</b>"'


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """A server of a copy of out/tiny: its url, its folder, get and post with the key; net, tok."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny / "out/tiny", folder)
    options = [f"--model={folder}", "--port=0", f"--api_key={KEY}", "--device=cpu"]
    process = start(folder, "serve.py", *options)
    lines = iter(process.stdout.readline, "")
    url = next(m[1] for line in lines if (m := re.search(r"(http://\S+)", line)))
    head = {"Authorization": f"Bearer {KEY}".encode()}
    get = lambda path: requests.get(url + path, headers=head, timeout=60)
    post = lambda path, **body: requests.post(url + path, json=body, headers=head, timeout=60)
    net, tok = load(folder)
    yield SimpleNamespace(url=url, folder=folder, get=get, post=post, net=net.eval(), tok=tok)
    process.send_signal(signal.SIGTERM)
    process.wait()


def naive_attention(net, ids, layer):
    """The weights of each head as lists, one query, one key at a time; rotations by complex
    numbers (Su et al. 2021), dimension i paired with i + D/2."""
    c, inputs = net.config, []
    block = net.model.layers[layer]
    hook = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        net(torch.tensor([ids]))
    hook.remove()
    rms = lambda v, w: [
        x * g / math.sqrt(sum(y * y for y in v) / len(v) + c.norm_eps) for x, g in zip(v, w)
    ]
    x = [rms(v, block.input_layernorm.weight.tolist()) for v in inputs[0][0].tolist()]

    def heads(linear, norm):
        out, D = [], c.head_dim
        for t, v in enumerate(x):
            y = [sum(a * b for a, b in zip(row, v)) for row in linear.weight.tolist()]
            row = []
            for h in range(0, len(y), D):
                u = rms(y[h : h + D], norm.weight.tolist())
                turn = [
                    math.cos(a) + 1j * math.sin(a)
                    for a in (t * c.rope_theta ** (-2 * i / D) for i in range(D // 2))
                ]
                row.append([complex(*u[i :: D // 2]) * turn[i] for i in range(D // 2)])
            out.append(row)
        return out

    a = block.self_attn
    q, k = heads(a.q_proj, a.q_norm), heads(a.k_proj, a.k_norm)
    maps = []
    for h in range(c.n_head):
        g = h * c.n_kv_head // c.n_head
        dot = lambda i, j: sum((a * b.conjugate()).real for a, b in zip(q[i][h], k[j][g]))
        rows = [
            [math.exp(dot(i, j) / math.sqrt(c.head_dim)) for j in range(i + 1)]
            for i in range(len(x))
        ]
        maps.append([[e / sum(row) for e in row] for row in rows])
    return maps


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_the_softmax_of_q_times_k(server, layer):
    told = server.post("/inspect/attention", text=TEXT, layer=layer).json()
    assert told["tokens"] == server.tok.encode(TEXT)
    assert b"".join(map(server.tok.token_bytes, told["tokens"])).decode() == TEXT
    expected = naive_attention(server.net, told["tokens"], layer)
    assert len(told["heads"]) == len(expected) == server.net.config.n_head
    for rows, naive in zip(told["heads"], expected):
        assert [len(row) for row in rows] == [i + 1 for i in range(len(told["tokens"]))]
        for row, right in zip(rows, naive):
            assert sum(row) == pytest.approx(1, abs=1e-4 * len(row))
            assert row == pytest.approx(right, abs=2e-5)


@pytest.mark.parametrize("pos", ["rope", "learned", "sinusoidal", "none"])
def test_a_map_is_what_the_values_are_weighed_by(pos):
    config = core.GPTConfig(64, 16, n_layer=2, n_head=4, n_embd=32, n_kv_head=2, pos=pos)
    net = core.GPT(config, fast=False).eval()
    attention = net.model.layers[1].self_attn
    values, gathered = [], []
    attention.v_proj.register_forward_hook(lambda layer, args, v: values.append(v[0]))
    attention.o_proj.register_forward_pre_hook(lambda layer, args: gathered.append(args[0][0]))
    with torch.no_grad():
        maps = attention_maps(net, [3, 1, 4, 1, 5, 9, 2, 6], layer=1)
    v = values[0].view(8, 2, 8).repeat_interleave(2, 1)  # (T, n_head, D)
    expected = torch.einsum("hts,shd->thd", maps, v).flatten(1)
    torch.testing.assert_close(gathered[0], expected)


def test_attention_does_not_change_with_what_follows(server):
    whole = server.post("/inspect/attention", text=TEXT, layer=1).json()
    part = {"ids": whole["tokens"][:5], "layer": 1, "head": 2}
    [rows] = server.post("/inspect/attention", **part).json()["heads"]
    for row, same in zip(rows, whole["heads"][2]):
        assert row == pytest.approx(same, abs=2e-5)


def test_parts_are_those_of_the_file_and_add_up(server):
    told = server.get("/inspect/model").json()
    data = (server.folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    shapes = {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    assert told["params"] == sum(math.prod(shape) for shape in shapes.values())
    assert told["params"] == sum(part["params"] for part in told["parts"])
    parts = {f"{part['name']}.weight": part for part in told["parts"]}
    assert parts.pop("lm_head.weight")["tied"]
    assert {name: part["shape"] for name, part in parts.items()} == shapes
    assert told["bytes"] == 4 * told["params"]
    assert told["config"]["n_kv_head"] == 2


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tie", [True, False])
def test_parts_of_quantized_networks_have_the_shapes_of_their_weights(kind, tie, tmp_path):
    net = make_net(**QWEN3 | dict(n_hidden=40, tie=tie))
    before = inside.model_parts(net)
    assert inside.model_parts(quantize_weights(net, kind)) == before
    assert sum(part["params"] for part in before) == n_params(make_net(**net.config.__dict__))


def test_neighbours_have_the_greatest_cosines(server):
    table = server.net.model.embed_tokens.weight[: server.tok.n_vocab].tolist()
    [token] = server.tok.encode(" return")
    length = lambda v: math.sqrt(sum(x * x for x in v))
    cosine = lambda v: (
        sum(a * b for a, b in zip(v, table[token])) / length(v) / length(table[token])
    )
    naive = sorted(((cosine(v), i) for i, v in enumerate(table) if i != token), reverse=True)[:7]
    for body in {"token": token}, {"text": " return"}:
        told = server.post("/inspect/neighbours", n=7, **body).json()["neighbours"]
        assert [near["token"] for near in told] == [i for _, i in naive]
        assert [near["cosine"] for near in told] == pytest.approx([c for c, _ in naive], abs=1e-5)


@pytest.mark.parametrize(
    "path, body, said",
    [
        ("attention", {"text": "a", "layer": 2}, "layer = 2: expected a whole number from 0 to 1"),
        (
            "attention",
            {"text": "a", "head": "0"},
            "head = '0': expected a whole number from 0 to 3",
        ),
        ("attention", {"ids": [10**6]}, "expected a text, or ids from 0 to"),
        ("attention", {"ids": []}, "0 tokens: attention is shown of 1 to 64"),
        ("attention", {"ids": [1] * 65}, "65 tokens"),
        ("neighbours", {"token": -1}, "token = -1"),
        ("neighbours", {"token": 1, "n": 101}, "n = 101"),
        ("neighbours", {"text": "def f"}, "2 tokens: neighbours are of one"),
        ("neighbours", {}, "expected a text"),
        ("neighbours", {"tokn": 1}, "did you mean 'token'"),
    ],
)
def test_bad_questions_are_answered_in_words(server, path, body, said):
    answer = server.post(f"/inspect/{path}", **body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_the_page_allows_itself_alone(server):
    page = requests.get(server.url, timeout=60)
    policy = dict(
        rule.split(" ", 1) for rule in page.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"<script>|<style>|style=| on\w+=", page.text)
    names = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    for name in inside.FOLDER.rglob("*.js"):
        names.append("page/" + name.relative_to(inside.FOLDER).as_posix())
    for name in set(names) - {"data:,"}:
        file = requests.get(f"{server.url}/{name}", timeout=60)
        assert file.status_code == 200, name
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        if "vendor" in name:
            continue
        assert set(re.findall(r"https?://[^\"\s]+", file.text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", file.text), name


@pytest.mark.parametrize("name", ["..%2Fpage.py", "%2e%2e/page.py", "main", "", "nosuch.js"])
def test_nothing_but_the_page_s_files_is_given_out(server, name):
    assert requests.get(f"{server.url}/page/{name}", timeout=60).status_code == 404


# --------------------------------------------------------------------------------------------------
# The page in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium on this machine")
    flags = "--no-sandbox --disable-gpu --disable-background-networking"
    flags += " --disable-component-update --disable-sync"
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, its key given; it may not log an error."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#error:has-text('This server wants an API key.')")
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use").click()
    page.wait_for_selector("#error:has-text('does not accept this API key')")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use").click()
    page.wait_for_selector("#status:text-is('Ready')")
    yield page
    context.close()
    assert not errors


def open_view(page, name):
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel", name=name)


def set_greedy(page, tokens):
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens, at most").fill(str(tokens))


def test_a_completion_and_the_alternatives_of_its_tokens(page, server):
    prompt = "<img src=x onerror=alert(1)>\ndef"
    open_view(page, "Complete")
    [g] = core.generate(server.net, server.tok, [prompt], max_new_tokens=9, temperature=0)
    set_greedy(page, 9)
    page.get_by_label("Text to continue").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#made-note:has-text('9 tokens')")
    assert page.locator("#result").text_content().strip() == (prompt + g.text).strip()
    assert page.locator("img").count() == 0
    tokens = page.get_by_role("listbox", name="Tokens of the completion")
    tokens.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    with torch.no_grad():
        ids = server.tok.prompt(prompt) + g.ids[:2]
        logits = server.net(torch.tensor([ids]))[0, -1, : server.tok.n_vocab]
    best = logits.softmax(0).topk(5)
    rows = page.locator("#chosen tbody tr").all()
    shares = [row.locator("td").nth(1).text_content() for row in rows]
    expected = [100 * p for p in best.values.tolist()]
    assert [float(share.split()[0]) for share in shares] == pytest.approx(expected, abs=0.051)
    assert page.locator("#chosen tr.here").count() == 1


def test_a_model_without_chat_training_opens_on_complete_and_says_so(page):
    assert page.get_by_role("tab", name="Complete", selected=True).count() == 1
    open_view(page, "Chat")
    told = page.locator("#untuned").text_content()
    assert "no chat training" in told and "train.py" in told
    assert page.get_by_role("button", name="Good answer").count() == 0


def test_tokens_attention_and_parts(page, server):
    panel = open_view(page, "Tokens")
    panel.get_by_label("Text").fill(TEXT)
    ids = server.tok.encode(TEXT)
    page.wait_for_selector(f"#raw-note:has-text('{len(ids)} tokens')")
    assert panel.locator("small").all_text_contents() == [str(id) for id in ids]
    panel.get_by_role("option").nth(1).click()
    near = server.post("/inspect/neighbours", token=ids[1], n=12).json()["neighbours"]
    page.locator("#near td").first.wait_for()
    told = page.locator("#near td:nth-child(2)").all_text_contents()
    assert told == [str(n["token"]) for n in near]

    panel = open_view(page, "Attention")
    panel.get_by_label("Text").fill(TEXT)
    page.wait_for_selector(f"#looked-note:has-text('{len(ids)} tokens')")
    panel.get_by_role("gridcell", name="Layer 1, head 0", exact=True).click()
    page.wait_for_selector("#map[aria-label^='Layer 1, head 0']")
    panel.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    row = server.post("/inspect/attention", text=TEXT, layer=1).json()["heads"][0][-2]
    told = page.locator("#pair-text").text_content()
    assert f"at {len(ids) - 2} looks at" in told and " at 1 with" in told
    share = float(re.search(r"with ([\d.]+)", told)[1])
    assert share == pytest.approx(100 * row[1], abs=0.051)

    panel = open_view(page, "Model")
    total = server.get("/inspect/model").json()["params"]
    assert panel.locator("#sum").text_content().startswith(f"{total:,} parameters")


def test_nothing_of_an_older_text_stays_under_an_error(page, server):
    long = "import " * 200
    open_view(page, "Complete")
    page.wait_for_selector("#prompt-size:has-text('tokens of 64')")
    page.get_by_label("Text to continue").fill(long * 20)
    page.wait_for_selector("#error:has-text('do not fit')")
    assert page.locator("#prompt-size").text_content() == ""

    panel = open_view(page, "Attention")
    panel.get_by_label("Text").fill(TEXT)
    page.wait_for_selector(f"#looked-note:has-text('{len(server.tok.encode(TEXT))} tokens')")
    panel.get_by_label("Text").fill(long)
    page.wait_for_selector("#error:has-text('attention is shown of 1 to 64')")
    assert not panel.locator("#map").is_visible() and not panel.locator("#heads").is_visible()
    assert panel.locator("#looked-note").text_content() == ""
    panel.get_by_label("Text").fill("import")
    panel.locator("#map").wait_for()
    assert not page.locator("#error").is_visible()

    panel = open_view(page, "Tokens")
    panel.get_by_label("Text").fill(TEXT)
    panel.get_by_role("option").nth(1).click()
    page.locator("#near td").first.wait_for()
    panel.get_by_label("Text").fill("import os")
    page.wait_for_selector(f"#raw-note:has-text('{len(server.tok.encode('import os'))} tokens')")
    assert not page.locator("#near").is_visible()
    panel.get_by_label("Text").fill(long * 20)
    page.wait_for_selector("#error:has-text('do not fit')")
    assert panel.locator("#raw-note").text_content() == ""
    assert panel.get_by_role("option").count() == 0


# The first answer of an address comes when `late` says so, even to a request called off since.
LATE = """(address) => {
  const real = window.fetch;
  let count = 0, begun, ended;
  window.begun = new Promise((f) => begun = f);
  window.fetch = async (path, how) => {
    const first = path === address && !count++;
    const response = await real(path, { ...how, signal: undefined });
    if (first) {
      begun();
      await new Promise((f) => window.late = f);
    }
    return response;
  };
}"""


def test_an_answer_that_comes_late_is_not_shown(page, server):
    panel = open_view(page, "Tokens")
    panel.get_by_label("Text").fill("import os")
    page.wait_for_selector(f"#raw-note:has-text('{len(server.tok.encode('import os'))} tokens')")
    names = [option.text_content() for option in panel.get_by_role("option").all()]
    page.evaluate(LATE, "/inspect/neighbours")
    panel.get_by_role("option").nth(0).click()
    page.evaluate("window.begun")
    panel.get_by_role("option").nth(1).click()
    page.locator("#near td").first.wait_for()
    shown = page.locator("#near h2").text_content()
    page.evaluate("window.late()")
    page.wait_for_timeout(100)
    assert page.locator("#near h2").text_content() == shown
    assert names[1].startswith(shown.removeprefix("Nearest to "))

    panel = open_view(page, "Attention")
    page.locator("#map").wait_for()
    page.evaluate(LATE, "/inspect/grid")
    panel.get_by_label("Text").fill("import os, sys")
    page.evaluate("window.begun")
    panel.get_by_label("Text").fill("import")
    page.wait_for_selector(f"#looked-note:has-text('{len(server.tok.encode('import'))} token')")
    shown = page.locator("#looked-text").text_content()
    page.evaluate("window.late()")
    page.wait_for_timeout(100)
    assert page.locator("#looked-text").text_content() == shown == "import"


def test_by_keyboard_on_a_phone_and_without_the_server(page):
    page.get_by_role("tab", name="Chat").focus()
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    for name in ("Complete", "Tokens", "Next token", "Attention", "Layers", "Training", "Model"):
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("tab", name=name, selected=True).count() == 1
        assert page.get_by_role("tabpanel", name=name).is_visible()
        page.wait_for_load_state("networkidle")
        assert not page.evaluate(wide), name
    open_view(page, "Complete")
    page.context.set_offline(True)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#error:has-text('The server does not answer')")
    assert page.locator("#status").text_content() == "No connection"
    page.context.set_offline(False)
    page.wait_for_selector("#status:text-is('Ready')")
    assert not page.locator("#error").is_visible()


def test_a_browser_that_forbids_storage_shows_the_page(browser, server):
    page = browser.new_context().new_page()
    page.add_init_script("""
      for (const name of ["localStorage", "sessionStorage"]) {
        const get = () => { throw new DOMException("", "SecurityError"); };
        Object.defineProperty(window, name, { get });
      }""")
    page.goto(server.url)
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use").click()
    page.wait_for_selector("#status:text-is('Ready')")
    page.evaluate("location.hash = '#next'")  # as a link, or somebody who writes the address
    page.wait_for_selector("#next:visible")
    page.context.close()
