"""The page's view Layers: what the server answers of each picture, against the network itself; what
an encoder and an encoder-decoder are asked; and the view in a browser. The mathematics are
tests/test_lens.py's."""

import json
import re

import pytest
import torch
from conftest import run
from test_model import make_net
from test_page import browser, open_view, page, server  # noqa: F401

from barelm import lens, lens_requests
from barelm.api import ApiError, ServedModel
from barelm.bpe import char_tokenizer
from barelm.objectives import with_mask_token
from barelm.run import UserError

pytest.importorskip("fastapi")

TEXT = 'def f(x):\n    return "<b>é</b>"'
CLEAN = "def f(x):\n    return x"
CORRUPTED = "def f(y):\n    return x"


def near(value, digits):
    """Within what rounding to so many digits leaves."""
    return pytest.approx(value, abs=0.6 * 10**-digits)


def sum_of(answer):
    """All the shares of an answer together."""
    values = [*answer["before"].values(), *answer["behind"].values()]
    for layer in answer["layers"]:
        for value in layer.values():
            values += value if isinstance(value, list) else [value]
    return sum(values)


# --------------------------------------------------------------------------------------------------
# What is answered


def test_the_last_layer_of_the_lens_is_what_the_network_says(server):  # noqa: F811
    told = server.post("/inspect/lens", text=TEXT, k=3).json()
    ids = server.tok.encode(TEXT)
    assert told["tokens"] == ids and told["part"] == "decoder-only" and told["mask"] is None
    assert told["position"] == len(ids) - 1
    assert len(told["layers"]) == server.net.config.n_layer + 1
    with torch.no_grad():
        p = server.net(torch.tensor([ids]))[0, :, : server.tok.n_vocab].softmax(-1)  # (T, V)
    last = told["layers"][-1]
    best = p.topk(3)
    assert last["ids"] == best.indices.tolist() and told["answers"] == p.argmax(-1).tolist()
    for t, row in enumerate(best.values.tolist()):
        assert last["probabilities"][t] == near(row, 5)
        assert last["answer"][t] == near(row[0], 5) and last["rank"][t] == 0
        names = [server.tok.shown[id].decode(errors="replace") for id in last["ids"][t]]
        for name, shown in zip(names, last["top"][t]):
            assert shown == name or "�" in name
    # Each layer's row, of the states that hooks of torch's see.
    states = []
    layer = server.net.model.layers[0]
    hook = layer.register_forward_hook(lambda block, args, x: states.append(x[0]))
    with torch.no_grad():
        server.net(torch.tensor([ids]))
        hook.remove()
        logits = server.net.lm_head(server.net.model.norm(states[0]))[:, : server.tok.n_vocab]
    answers = torch.tensor(told["answers"])[:, None]
    told_p = torch.tensor(told["layers"][1]["answer"])
    torch.testing.assert_close(
        told_p, logits.softmax(-1).gather(1, answers)[:, 0], atol=2e-5, rtol=0
    )


def test_the_shares_that_are_told_add_up_to_the_logit(server):  # noqa: F811
    ids = server.tok.encode(TEXT)
    with torch.no_grad():
        logits = server.net(torch.tensor([ids]))[0]
    told = server.post("/inspect/shares", text=TEXT, position=3).json()
    assert told["token"] == logits[3, : server.tok.n_vocab].argmax()
    assert told["logit"] == pytest.approx(logits[3].max().item(), abs=1e-4)
    assert sum_of(told) == pytest.approx(told["logit"], abs=1e-4)
    c = server.net.config
    assert [len(layer["heads"]) for layer in told["layers"]] == [c.n_head] * c.n_layer
    told = server.post("/inspect/shares", ids=ids, token=ids[0], against=" ").json()
    other = server.tok.encode(" ")[0]
    difference = (logits[-1, ids[0]] - logits[-1, other]).item()
    assert told["position"] == len(ids) - 1 and told["against"] == other
    assert sum_of(told) == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("kind", ["residual", "heads"])
def test_patches_are_told_at_once_or_one_after_another(server, kind):  # noqa: F811
    clean, corrupted = [server.tok.encode(text) for text in (CLEAN, CORRUPTED)]
    assert len(clean) == len(corrupted)
    body = dict(clean=CLEAN, corrupted=CORRUPTED, kind=kind, answer=clean[0], other=clean[1])
    told = server.post("/inspect/patch", **body).json()
    with torch.no_grad():
        logits = server.net(torch.tensor([clean, corrupted]))[:, -1]
    differences = (logits[:, clean[0]] - logits[:, clean[1]]).tolist()
    assert told["clean_difference"] == pytest.approx(differences[0], abs=1e-4)
    assert told["corrupted_difference"] == pytest.approx(differences[1], abs=1e-4)
    c = server.net.config
    assert len(told["rows"]) == told["n_rows"] == c.n_layer + (kind == "residual")
    width = c.n_head if kind == "heads" else len(clean)
    assert {len(row) for row in told["rows"]} == {width}
    if kind == "residual":
        assert told["rows"][-1] == near([0.0] * (width - 1) + [1.0], 4)
    text = server.post("/inspect/patch", **body, stream=True).text
    *events, last = [part.removeprefix("data: ") for part in text.strip().split("\n\n")]
    head, *rows = [json.loads(event) for event in events]
    assert last == "[DONE]" and head | {"rows": [row["row"] for row in rows]} == told


@pytest.mark.parametrize(
    "path, body, said",
    [
        ("lens", {"ids": []}, "0 tokens: layers are shown of 1 to 64"),
        ("lens", {"ids": [1] * 65}, "65 tokens"),
        ("lens", {"text": "a", "k": 21}, "k = 21"),
        ("lens", {"text": "a", "target": "b"}, "only an encoder-decoder has one"),
        ("shares", {"text": "a", "position": 1}, "position = 1: expected 0 to 0"),
        ("shares", {"text": "a", "token": "def f(x):"}, "expected one, which mostly begins with"),
        ("shares", {"text": "a", "token": 10**6}, "expected a token, or an id below"),
        ("shares", {"text": "a", "token": True}, "expected a token, or an id below"),
        ("shares", {"text": "a", "token": 1, "against": 1}, "a token against itself"),
        ("patch", {"clean": "a", "corrupted": "def f(x): pass"}, "both have as many"),
        ("patch", {"clean": CLEAN, "corrupted": CLEAN}, "the two prompts are the same"),
        ("patch", {"clean": CLEAN, "corrupted": CORRUPTED, "kind": "x"}, "expected residual, att"),
        ("patch", {"clean": CLEAN, "corrupted": "a" * 9000}, "tokens"),
        (
            "patch",
            {"clean": CLEAN, "corrupted": CORRUPTED, "answer": 5, "other": 5},
            "name two to compare",
        ),
    ],
)
def test_bad_questions_are_answered_in_words(server, path, body, said):  # noqa: F811
    answer = server.post(f"/inspect/{path}", **body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


# --------------------------------------------------------------------------------------------------
# Other kinds of networks


def served_of(net, tok):
    options = dict(max_len=32, max_queue=1, is_seq2seq=net.config.is_seq2seq)
    return ServedModel("net", tok, **options)


def test_an_encoder_is_read_at_its_mask():
    tok = with_mask_token(char_tokenizer("abcdefghijklmnopqrstuvwxyz "))
    [name] = [name for name, id in tok.special.items() if id == tok.mask_id]
    shape = dict(n_head=2, n_embd=16, causal=False, norm="layer", bias=True, mlm_head=True)
    net = make_net(**shape, vocab_size=tok.n_vocab)
    served = served_of(net, tok)
    body = {"text": f"ab{name}de"}
    request, reading = lens_requests.read_lens(served, net, body)
    assert reading.ids[reading.position] == tok.mask_id
    trace = lens.run(net, reading.ids)
    last = lens.logit_lens(net, lens.states(trace)[-1], tok.n_vocab, request.k)
    head = lens_requests.lens_head(served, net, reading, last)
    assert head["part"] == "encoder" and head["mask"] == name
    pair = {"clean": f"ab{name}de", "corrupted": f"cb{name}de"}
    request, parts = lens_requests.read_patch(served, net, pair | {"answer": "a", "other": "b"})
    patching = lens_requests.start_patching(net, tok.n_vocab, request, parts)
    assert patching.position == reading.position
    assert patching.restored("residual", 2)[patching.position] == pytest.approx(1, abs=1e-4)
    with pytest.raises(UserError, match="activation"):
        request, reading = lens_requests.read_shares(served, net, body)
        lens_requests.compute_shares(net, tok.n_vocab, reading, None, None)


def test_an_encoder_decoder_has_a_text_and_what_it_wrote():
    tok = char_tokenizer("abcdefghijklmnopqrstuvwxyz ")
    net = make_net(n_head=2, n_embd=16, n_encoder_layer=2, vocab_size=tok.n_vocab)
    served = served_of(net, tok)
    with pytest.raises(ApiError, match="without a start token"):
        lens_requests.read_lens(served, net, {"text": "abc"})
    net.start_id = tok.eos_ids[0]
    request, reading = lens_requests.read_shares(served, net, {"text": "abc", "target": "de"})
    assert reading.source == tok.source("abc") and reading.ids == [net.start_id, *tok.encode("de")]
    token, result = lens_requests.compute_shares(net, tok.n_vocab, reading, None, None)
    told = lens_requests.shares_answer(served, net, request, reading, token, result)
    with torch.no_grad():
        source = torch.tensor([reading.source])
        logits = net(torch.tensor([reading.ids]), encoder_ids=source)[0, -1]
    assert told["part"] == "decoder" and sum_of(told) == pytest.approx(
        logits[token].item(), abs=1e-4
    )
    assert all({"heads", "cross_heads", "mlp"} <= layer.keys() for layer in told["layers"])
    body = {"clean": "abc", "corrupted": "abd", "target": "de", "answer": "a", "other": "b"}
    request, pair = lens_requests.read_patch(served, net, body)
    patching = lens_requests.start_patching(net, tok.n_vocab, request, pair)
    head = lens_requests.patch_head(served, net, request, patching)
    assert head["part"] == "encoder" and head["n_rows"] == 3
    assert len(patching.restored("mlp", 1)) == len(tok.source("abc"))


def test_what_has_no_logits_is_refused_in_words():
    net = make_net(n_head=2, n_embd=16)
    net.set_score(["a", "b"])
    with pytest.raises(UserError, match="in the place of logits"):
        lens.check_lens(net)


# --------------------------------------------------------------------------------------------------
# The terminal


def test_sample_prints_the_layers_of_a_prompt(tiny):
    options = ["--model=out/tiny", "--lens", f"--prompt={CLEAN}", "--device=cpu", "--dtype=float32"]
    printed = run(tiny, "sample.py", *options, f"--lens_against={CORRUPTED}").stdout
    rows = re.findall(r"^(embedding|layer \d+) +(\d+)  '", printed, re.M)
    assert [name for name, _ in rows] == ["embedding", "layer 0", "layer 1"]
    assert rows[-1][1] == "1"  # the answer's rank in the last layer
    shares = re.findall(r"^ +(-?\d+\.\d{3})  (.*)$", printed, re.M)
    logit = float(re.search(r"the logit of .* is (-?\d+\.\d+);", printed)[1])
    assert sum(float(value) for value, _ in shares) == pytest.approx(logit, abs=0.02)
    assert "percent of the difference come back:" in printed
    assert re.search(r"^layer 1 +(0 +)+100$", printed, re.M)  # the last state is the clean text's


@pytest.mark.parametrize(
    "options, said",
    [
        (["--lens_against=a"], "give both"),
        (["--lens", "--chat"], "--chat: out/tiny is looked into by --lens"),
        (["--lens", "--lens_against=def f(x): pass", "--prompt=a"], "both have as many"),
    ],
)
def test_sample_refuses_a_lens_with_what_it_does_not_do(tiny, options, said):
    done = run(tiny, "sample.py", "--model=out/tiny", "--device=cpu", *options, check=False)
    assert done.returncode == 1 and said in done.stderr


# --------------------------------------------------------------------------------------------------
# The view


def fits(page):  # noqa: F811
    width = "document.documentElement.scrollWidth <= innerWidth"
    return page.evaluate(width)


def test_the_lens_by_keyboard_on_a_phone(page, server):  # noqa: F811
    panel = open_view(page, "Layers")
    panel.get_by_label("Text", exact=True).fill(TEXT)
    told = server.post("/inspect/lens", text=TEXT).json()
    page.wait_for_selector(f"#lens-note:has-text('{len(told['tokens'])} tokens')")
    cells = panel.locator("#lens-grid tbody tr").last.locator("td")
    assert cells.count() == len(told["tokens"])
    assert panel.locator("#lens-grid tbody tr").count() == len(told["layers"])
    chosen = panel.locator("#lens-grid [aria-selected=true]")
    assert chosen.count() == 1 and page.evaluate("scrollY") == 0  # nothing moves before its reader
    chosen.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    row = told["layers"][-2]
    shown = panel.locator("#lens-cell td:nth-child(2)").all_text_contents()
    expected = row["probabilities"][-2]
    for text, p in zip(shown, expected, strict=True):
        assert float(re.sub("[^0-9.]", "", text)) / 100 == pytest.approx(p, abs=6e-4)
    assert f"number {row['rank'][-2] + 1:,}" in panel.locator("#lens-cell").text_content()
    assert fits(page)


def test_the_shares_and_two_prompts_on_a_phone(page, server):  # noqa: F811
    panel = open_view(page, "Layers")
    panel.get_by_label("Text", exact=True).fill(CLEAN)
    panel.get_by_label("Shares of a logit").check()
    panel.locator("#shares-tokens [role=option]").nth(2).click()
    told = server.post("/inspect/shares", text=CLEAN, position=2).json()
    page.wait_for_selector("#shares-tokens [aria-selected=true] >> nth=0")
    name = "sum" if not told["logit"] else f"is {abs(told['logit']):.2f}"[3:7]
    page.wait_for_selector(f"#shares-sum:has-text('{name}')")
    largest = max(abs(v) for layer in told["layers"] for v in [*layer["heads"], layer["mlp"]])
    values = panel.locator("#shares-grid td").all_text_contents()
    numbers = [abs(float(value.replace("\u2212", "-"))) for value in values]
    assert any(value == pytest.approx(largest, abs=0.06) for value in numbers)
    assert fits(page)

    panel.get_by_label("Two prompts").check()
    panel.get_by_label("Clean prompt").fill(CLEAN)
    panel.get_by_label("Corrupted prompt").fill(CLEAN + " + 1")
    panel.get_by_role("button", name="Compare").click()
    page.wait_for_selector("#error:has-text('both have as many')")
    panel.get_by_label("Corrupted prompt").fill(CORRUPTED)
    panel.get_by_label("Answer to the clean one").fill(" ")
    panel.get_by_label("Answer to the other").fill("(")
    panel.get_by_role("button", name="Compare").click()
    body = dict(clean=CLEAN, corrupted=CORRUPTED, answer=" ", other="(")
    rows = server.post("/inspect/patch", **body).json()["rows"]
    page.wait_for_selector(f"#patch-grid tr:nth-child({len(rows)}) td >> nth=0")
    shown = panel.locator("#patch-grid td").all_text_contents()
    expected = [round(100 * share) for row in rows for share in row]
    for text, share in zip(shown, expected, strict=True):
        assert abs(int(text.replace("\u2212", "-")) - share) <= 1
    assert fits(page)
