"""The page's views of tokens, the next token, attention and experts: each number against one that
is computed from the weights in another way; then in a real browser, if there is one."""

import base64
import json
import math
import re
import signal

import pytest
import torch
from conftest import ROOT, start
from test_experts import KINDS as EXPERT_KINDS
from test_model import make_net, random_ids
from test_page import KEY, TEXT, browser, naive_attention, open_view, page, server  # noqa: F401

from barelm import attention_maps as attention
from barelm import next_token, routing
from barelm.api import ApiError
from barelm.bpe import TokenizerSettings, count_pieces, show_tokens, train_tokenizer
from barelm.checkpoint import save
from barelm.encoders import LibraryEncoder
from barelm.experts import expert_layers
from barelm.splits import QWEN2_SPLIT
from barelm.token_steps import TokenSteps
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate

FIXTURES = ROOT / "tests/fixtures/tokenizers"

# --------------------------------------------------------------------------------------------------
# Attention


def test_every_mean_is_that_of_the_naive_maps(server):  # noqa: F811
    ids = server.tok.encode(TEXT)
    T = len(ids)
    naive = torch.zeros(2, 4, T, T)  # layers, heads
    for layer in range(2):
        for head, rows in enumerate(naive_attention(server.net, ids, layer)):
            for i, row in enumerate(rows):
                naive[layer, head, i, : i + 1] = torch.tensor(row)
    expected = {
        "": naive[1],
        "heads": naive[1].mean(0, keepdim=True),
        "layers": naive.mean(0),
        "both": naive.mean((0, 1))[None],
    }
    for mean, maps in expected.items():
        told = server.post("/inspect/attention", text=TEXT, layer=1, mean=mean).json()
        assert len(told["heads"]) == len(maps)
        for rows, right in zip(told["heads"], maps):
            for i, row in enumerate(rows):
                assert row == pytest.approx(right[i, : i + 1].tolist(), abs=2e-5)
    one = server.post("/inspect/attention", text=TEXT, head=2, mean="layers").json()["heads"]
    assert len(one) == 1 and one[0][-1] == pytest.approx(naive.mean(0)[2, -1].tolist(), abs=2e-5)

    told = server.post("/inspect/grid", text=TEXT).json()
    side, block = told["side"], told["block"]
    data = torch.frombuffer(bytearray(base64.b64decode(told["maps"])), dtype=torch.uint8)
    grid = data.view(3, 5, side, side)
    assert (told["n_layer"], told["n_head"], block) == (2, 4, 1) and side == T
    whole = torch.cat((naive, naive.mean(1, keepdim=True)), 1)  # (2, 5, T, T)
    whole = torch.cat((whole, whole.mean(0, keepdim=True)))  # (3, 5, T, T)
    # Half a step of the root at most, and what rounding adds.
    assert ((grid / 255) - whole.sqrt()).abs().max() <= 0.5 / 255 + 1e-3


def test_a_long_text_has_a_grid_of_the_largest_weights():
    config = GPTConfig(64, 128, n_layer=3, n_head=2, n_embd=32)
    net = GPT(config).eval()
    [ids] = random_ids(1, 70).tolist()
    with torch.no_grad():
        grid = attention.attention_grid(net, ids)
        maps = attention.attention_maps(net, ids, layer=2)
        means = attention.attention_maps(net, ids, mean="both")
    assert (grid.block, grid.side) == (3, 24)
    cells = torch.frombuffer(bytearray(grid.data), dtype=torch.uint8).view(4, 3, 24, 24)
    for shown, weights in ((cells[2, :2], maps), (cells[3, 2:], means)):
        for i, j in ((0, 0), (10, 3), (23, 23), (23, 0)):
            largest = weights[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].flatten(1).amax(1)
            assert (shown[:, i, j] / 255 - largest.sqrt()).abs().max() <= 0.5 / 255 + 1e-6


def test_an_encoder_decoder_shows_its_encoder():
    config = GPTConfig(64, 16, n_layer=1, n_encoder_layer=2, n_head=4, n_embd=32)
    net = GPT(config).eval()
    with torch.no_grad():
        grid = attention.attention_grid(net, [3, 1, 4, 1, 5])
        maps = attention.attention_maps(net, [3, 1, 4, 1, 5], layer=1)
    assert grid.n_layer == 2 and maps.triu(1).any()
    torch.testing.assert_close(maps.sum(-1), torch.ones(4, 5))


# --------------------------------------------------------------------------------------------------
# The next token

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6, "top_k": 9},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0, "top_k": 5},
]


def naive_steps(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """{token: (probability, after the temperature, what is drawn by)} of a list of logits, and
    {token: the filter that took it away}, as the papers write them."""

    def softmax(values):
        total = sum(math.exp(value - max(values.values())) for value in values.values())
        return {t: math.exp(v - max(values.values())) / total for t, v in values.items()}

    values = dict(enumerate(logits))
    plain = softmax(values)
    order = sorted(values, key=lambda t: -values[t])
    cut = {}
    if temperature == 0:
        scaled = {t: float(t == order[0]) for t in values}
        return plain, scaled, scaled, {t: "temperature" for t in order[1:]}
    scaled = softmax({t: v / temperature for t, v in values.items()})
    left = order[: top_k or len(order)]
    cut |= {t: "top_k" for t in order if t not in left}
    total = sum(scaled[t] for t in left)
    nucleus = []
    for t in left:
        if top_p < 1 and sum(scaled[u] for u in nucleus) >= top_p * total and nucleus:
            cut[t] = "top_p"
        else:
            nucleus.append(t)
    final = [t for t in nucleus if scaled[t] >= min_p * scaled[order[0]]]
    cut |= {t: "min_p" for t in nucleus if t not in final}
    total = sum(scaled[t] for t in final)
    return plain, scaled, {t: scaled[t] / total if t in final else 0.0 for t in values}, cut


@pytest.mark.parametrize("options", OPTIONS)
def test_the_next_token_is_drawn_as_told(server, options):  # noqa: F811
    with torch.no_grad():
        logits = server.net(torch.tensor([server.tok.prompt(TEXT)]))[0, -1, : server.tok.n_vocab]
    plain, scaled, drawn, cut = naive_steps(logits.tolist(), **options)
    told = server.post("/inspect/next", text=TEXT, n=60, **options).json()
    order = logits.argsort(descending=True).tolist()
    rows = told["candidates"]
    assert [row["token"] for row in rows] == order[:60]
    for row in rows:
        token = row["token"]
        numbers = [plain[token], scaled[token], drawn[token]]
        shown = [row["probability"], row["scaled"], row["drawn"]]
        assert shown == pytest.approx(numbers, rel=1e-3, abs=1e-7)
        assert row["cut"] == cut.get(token)
    counts = [sum(value == name for value in cut.values()) for name in next_token.FILTERS]
    left = [len(logits) - sum(counts[: i + 1]) for i in range(4)]
    assert told["left"] == dict(zip(next_token.FILTERS, left))
    assert told["covered"] == pytest.approx(sum(plain[t] for t in drawn if drawn[t] > 0), rel=1e-3)
    bits = [-sum(p * math.log2(p) for p in shares.values() if p) for shares in (plain, drawn)]
    assert [told["entropy"], told["entropy_drawn"]] == pytest.approx(bits, abs=1e-3)


def test_step_by_step_it_is_what_is_generated(server):  # noqa: F811
    options = {"temperature": 1.1, "top_k": 30, "top_p": 0.95, "seed": 7}
    [answer] = generate(server.net, server.tok, [TEXT], max_new_tokens=8, **options)
    then = []
    for _ in answer.ids:
        told = server.post("/inspect/next", text=TEXT, then=then, draw=True, **options).json()
        then.append(told["token"]["token"])
    assert then == answer.ids
    told = server.post("/inspect/next", text=TEXT, then=then).json()
    ids = server.tok.prompt(TEXT) + then
    with torch.no_grad():
        best = server.net(torch.tensor([ids]))[0, -1].softmax(-1).max()
    assert told["count"] == len(ids)
    assert told["candidates"][0]["probability"] == pytest.approx(best.item(), rel=1e-3)
    assert "".join(told["then_strs"]) == "".join(map(server.tok.decode, [[id] for id in then]))


def test_draws_come_as_often_as_told():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])
    options = {"temperature": 1.5, "top_k": 4, "top_p": 1.0, "min_p": 0.2}
    expected = next_token.filter_steps(logits, options).drawn
    drawn = [next_token.draw(logits, options, seed, 3) for seed in range(1500)]
    shares = torch.tensor(drawn).bincount(minlength=5) / 1500
    assert expected[3:].tolist() == [0, 0]
    assert (shares - expected).abs().max() < 0.052  # four standard deviations


def test_logits_are_kept_of_the_last_texts():
    recent = next_token.RecentLogits()
    for i in range(next_token.RECENT_TEXTS + 1):
        recent.put((0, i), i)
    assert recent.get((0, 0)) is None and recent.get((0, 1)) == 1
    recent.put((0, 99), 99)
    assert recent.get((0, 1)) == 1 and recent.get((0, 2)) is None  # what is asked for stays


# --------------------------------------------------------------------------------------------------
# A tokenizer's steps


def replayed(steps):
    """The ids that the page comes to: each merge made in each piece, from the left."""
    ids = []
    for piece in steps["pieces"]:
        symbols = list(piece)
        for _, left, right, new in steps["merges"]:
            i = 0
            while i < len(symbols) - 1:
                if symbols[i] == left and symbols[i + 1] == right:
                    symbols[i : i + 2] = [new]
                i += 1
        ids += symbols
    return ids


@pytest.mark.parametrize("name", ["gpt2", "llama3", "smollm2", "qwen3", "llama2", "mistral"])
def test_merges_in_their_order_give_the_tokens(name):
    tok = Tokenizer.from_folder(FIXTURES / name)
    steps = TokenSteps(tok)
    for text in (TEXT, "", "the theme\r\n\t漢字 1234 aaaaa", "x" * 40, "  a  b ", "İß\u00a0<b>"):
        told = json.loads(json.dumps(steps.of(text)))
        assert told["kind"] == "BPE" and replayed(told) == list(tok.encode(text))
        ranks = [merge[0] for merge in told["merges"]]
        assert ranks == sorted(set(ranks))
        for rank, left, right, new in told["merges"]:
            merge = tok.spec["model"]["merges"][rank]
            parts = merge.split(" ") if isinstance(merge, str) else merge
            vocab = tok.spec["model"]["vocab"]
            assert [vocab[part] for part in (*parts, "".join(parts))] == [left, right, new]
        if not isinstance(tok.encoder, LibraryEncoder):
            first = b"".join(tok.token_bytes(id) for piece in told["pieces"] for id in piece)
            assert first == b"".join(map(tok.token_bytes, tok.encode(text)))
    assert steps.of("a" * 2001)["pieces"] is None


def train(kind):
    text = (ROOT / "sample.py").read_text()
    settings = TokenizerSettings()
    pattern = QWEN2_SPLIT if kind != "wordpiece" else r"\w+|\S"
    return train_tokenizer(kind, count_pieces([text], pattern), 420, settings)


def test_unigram_takes_the_best_of_all_cuts():
    pytest.importorskip("tokenizers")
    tok = train("unigram")
    scores = dict(tok.spec["model"]["vocab"])
    steps = TokenSteps(tok)
    told = steps.of("temperature of prompts")

    def cuts(piece):  # all there are
        if not piece:
            yield []
        for end in range(1, len(piece) + 1):
            if piece[:end] in scores:
                for rest in cuts(piece[end:]):
                    yield [piece[:end], *rest]

    pieces = [piece for piece, _ in steps.cut("temperature of prompts")]
    assert len(pieces) == len(told["pieces"]) == 3
    for piece, row in zip(pieces, told["pieces"]):
        best, second = sorted((sum(map(scores.get, cut)) for cut in cuts(piece)), reverse=True)[:2]
        assert sum(row["scores"]) == pytest.approx(best, abs=1e-4)
        assert sum(row["other"]["scores"]) == pytest.approx(second, abs=1e-4)
    assert sum((row["ids"] for row in told["pieces"]), []) == tok.encode("temperature of prompts")


def test_other_kinds_are_told_in_words(capsys):
    for kind in ("word", "char"):
        tok = train(kind)
        told = TokenSteps(tok).of("import é")
        assert "whole pieces" in told["words"] and told["pieces"][0]["texts"][0] in "import"
    pytest.importorskip("tokenizers")
    tok = train("wordpiece")
    told = TokenSteps(tok).of("imports import")
    assert sum((row["ids"] for row in told["pieces"]), []) == tok.encode("imports import")
    assert "longest" in told["words"]
    show_tokens(tok, "imports import")
    assert "steps: WordPiece" in capsys.readouterr().out


def test_inspect_prints_the_merges(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    tok = Tokenizer.from_folder(FIXTURES / "gpt2")
    show_tokens(tok, "the then")
    lines = capsys.readouterr().out.split("\n")
    rows = [re.fullmatch(r" *([\d,]+) +([\d,]+)  (\S.*)", line) for line in lines]
    rows = [row for row in rows if row]
    told = TokenSteps(tok).of("the then")
    assert [int(row[1].replace(",", "")) for row in rows] == [m[0] for m in told["merges"]]
    assert [int(row[2].replace(",", "")) for row in rows] == [m[3] for m in told["merges"]]
    assert 'pieces: "t|h|e" " |t|h|e|n"' in lines
    made = [tok.decode([id]) for _, *ids in told["merges"] for id in ids]
    for row, (left, right, new) in zip(rows, zip(made[::3], made[1::3], made[2::3])):
        assert row[3].startswith(f'"{left}" + "{right}" ') and new in row[3].split("+", 1)[1]


# --------------------------------------------------------------------------------------------------
# Experts


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_a_token_goes_where_its_router_says(kind):
    net = make_net(**EXPERT_KINDS[kind]).eval()
    c = net.config
    for layer in expert_layers(net):
        torch.nn.init.normal_(layer.gate.weight, std=0.5)
        if c.balance == "bias":
            layer.expert_bias.copy_(0.2 * torch.randn(c.n_experts))
    [ids] = random_ids(1, 9).tolist()
    read = []
    blocks = [(i, block.mlp) for i, block in enumerate(net.model.layers) if block.has_experts]
    for _, mlp in blocks:
        mlp.register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
    with torch.no_grad():
        routes = routing.expert_routes(net, ids)
    assert [route.layer for route in routes] == [i for i, _ in blocks] and routes
    for route, (_, mlp), x in zip(routes, blocks, read):
        matrix = mlp.gate.weight.detach()
        load = [0] * c.n_experts
        for token, experts, weights in zip(x, route.experts, route.weights):
            scores = [math.exp(float(row @ token)) for row in matrix]
            shares = [score / sum(scores) for score in scores]
            order = shares
            if c.balance == "bias":
                order = [share + b for share, b in zip(shares, mlp.expert_bias.tolist())]
            best = sorted(range(c.n_experts), key=lambda e: -order[e])[: c.n_experts_per_token]
            total = sum(shares[e] for e in best) if c.norm_topk else 1
            assert experts == best
            assert weights == pytest.approx([shares[e] / total for e in best], abs=1e-5)
            for e in best:
                load[e] += 1
        assert route.load == load


# --------------------------------------------------------------------------------------------------
# Bad questions


@pytest.mark.parametrize(
    "path, body, words",
    [
        ("attention", {"text": "a", "mean": "all"}, 'mean: expected "heads", "layers" or "both"'),
        ("attention", {"text": "a", "mean": "heads", "head": 1}, "a mean of heads is of no head"),
        ("grid", {"ids": [1] * 65}, "65 tokens: attention is shown of 1 to 64"),
        ("grid", {"text": "a", "layer": 1}, "'layer' is not supported"),
        ("routing", {"text": "a"}, "has no experts to show"),
        ("steps", {}, "expected a text"),
        ("next", {"ids": []}, "0 tokens: nothing stands before the next one"),
        ("next", {"text": "a", "then": [-1]}, "then: expected ids from 0 to"),
        ("next", {"ids": [1] * 65}, "65 tokens do not fit"),
        ("next", {"text": "a", "temperature": -1}, "temperature = -1"),
        ("next", {"text": "a", "n": 0}, "n = 0: expected a whole number from 1 to 200"),
    ],
)
def test_bad_questions_are_answered_in_words(server, path, body, words):  # noqa: F811
    answer = server.post(f"/inspect/{path}", **body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_what_continues_no_text_has_no_next_token(server):  # noqa: F811
    class Served:
        name = "encoder"
        refusal = "is an encoder, which continues no text"
        is_seq2seq = False

    with pytest.raises(ApiError, match="encoder is an encoder"):
        next_token.read_next(Served, {"text": "a"})


# --------------------------------------------------------------------------------------------------
# In a browser


def numbers_of(texts):
    return [float(re.search(r"[\d.]+", text)[0]) for text in texts]


def test_a_map_is_opened_from_the_grid_by_keyboard(page, server):  # noqa: F811
    panel = open_view(page, "Attention")
    panel.get_by_label("Text").fill(TEXT)
    ids = server.tok.encode(TEXT)
    page.wait_for_selector(f"#looked-note:has-text('{len(ids)} tokens, 2 layers of 4 heads')")
    cells = panel.get_by_role("gridcell")
    assert cells.count() == 3 * 5
    cells.first.focus()
    for name in ("Layer 0, head 1", "Layer 1, head 1", "Head 1, mean of all layers"):
        # On a phone heads are rows, as they are more than the layers.
        page.keyboard.press("ArrowDown" if name == "Layer 0, head 1" else "ArrowRight")
        page.wait_for_selector(f"#map-name:text-is('{name}')")
        focused = "document.activeElement.getAttribute('aria-label')"
        assert page.evaluate(focused) == name
    page.wait_for_selector("#map[aria-label^='Head 1, mean of all layers']")
    told = server.post("/inspect/attention", text=TEXT, head=1, mean="layers").json()
    row = told["heads"][0][-1]
    panel.get_by_role("option").last.click()
    best = sorted(row, reverse=True)[:5]
    shares = numbers_of(page.locator("#targets td:nth-child(3)").all_text_contents())
    assert shares == pytest.approx([100 * share for share in best], abs=0.051)
    positions = page.locator("#targets td:nth-child(2)").all_text_contents()
    assert [row[int(i)] for i in positions] == pytest.approx(best, abs=1e-6)

    # The colours are those that the key says: of a weight w sqrt(w), or w.
    alpha = """([layer, head, i, j]) => {
      const canvas = document.getElementById(`map-${layer}-${head}`).firstChild;
      return canvas.getContext("2d").getImageData(j, i, 1, 1).data[3] / 255;
    }"""
    maps = server.post("/inspect/attention", text=TEXT, layer=1).json()["heads"]
    place = [1, 2, len(ids) - 1, 0]
    assert page.evaluate(alpha, place) == pytest.approx(maps[2][-1][0] ** 0.5, abs=0.006)
    panel.get_by_label("Colour: linear").check()
    assert page.evaluate(alpha, place) == pytest.approx(maps[2][-1][0], abs=0.006)
    assert panel.get_by_role("img", name="Colours from the weight 0 to 1, by the linear").count()


def test_filters_are_drawn_on_the_next_token(page, server):  # noqa: F811
    panel = open_view(page, "Next token")
    panel.get_by_label("Text", exact=True).fill(TEXT)
    page.wait_for_selector(f"#next-note:has-text('{len(server.tok.prompt(TEXT))} tokens')")
    options = {"temperature": 1.5, "top_k": 12, "top_p": 0.7, "min_p": 0.1}
    for label, value in zip(("Temperature", "Top k", "Top p", "Min p"), options.values()):
        panel.get_by_label(label).fill(str(value))
    told = server.post("/inspect/next", text=TEXT, n=30, **options).json()
    left = told["left"]["min_p"]
    page.wait_for_selector(f"#next-sum:has-text('{left} of')")
    panel.locator("tr.end").nth(1).wait_for()
    rows = panel.locator("tbody tr:not(.end)")
    assert rows.count() == 30 and panel.locator("tr.cut").count() == 30 - left
    shares = panel.locator("tbody tr:not(.end) td:nth-child(4)").all_text_contents()
    expected = [100 * row["drawn"] for row in told["candidates"][:left]]
    assert numbers_of(shares[:left]) == pytest.approx(expected, abs=0.051)
    assert set(shares[left:]) == {"cut"}
    own = numbers_of(panel.locator("tbody td.own").all_text_contents())
    assert own == pytest.approx([100 * r["probability"] for r in told["candidates"]], abs=0.051)

    # A token by a click, then two that are drawn: what a completion has with the same seed.
    [first] = [row["token"] for row in told["candidates"]][2:3]
    rows.nth(2).get_by_role("button").click()
    page.wait_for_selector("#next-note:has-text('was appended')")
    panel.get_by_label("Seed").fill("5")
    then = [first]
    marks = panel.locator("mark")
    for _ in range(2):
        more = server.post("/inspect/next", text=TEXT, then=then, draw=True, seed=5, **options)
        then.append(more.json()["token"]["token"])
        panel.get_by_role("button", name="Draw a token").click()
        marks.nth(len(then) - 1).wait_for(state="attached")
    names = server.post("/inspect/next", text=TEXT, then=then).json()["then_strs"]
    assert marks.all_text_contents() == [n.removeprefix("bytes:") for n in names]
    panel.get_by_role("button", name="Take back").click()
    marks.nth(2).wait_for(state="detached")
    assert marks.count() == 2
    panel.get_by_role("button", name="Start again").click()
    page.wait_for_selector("#next-then", state="hidden")


def test_merges_one_by_one(page, server):  # noqa: F811
    panel = open_view(page, "Tokens")
    panel.get_by_label("Text", exact=True).fill("the return of the values")
    steps = server.post("/inspect/steps", text="the return of the values").json()
    n = len(steps["merges"])
    assert n > 3
    page.wait_for_selector(f"#step-count:text-is('{n} of {n}')")
    slider = panel.get_by_label("Merges made")
    ids = server.tok.encode("the return of the values")
    shown = panel.locator("#step-pieces .symbol")
    assert shown.count() == len(ids)
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_selector(f"#step-count:text-is('0 of {n}')")
    assert "".join(shown.all_text_contents()) == "the·return·of·the·values"
    assert shown.count() == len("the return of the values")
    page.keyboard.press("ArrowRight")
    rank, left, right, new = steps["merges"][0]
    text = panel.locator("#step-text").text_content()
    assert text.startswith(f"Rank {rank:,}: ") and f"token {new}" in text
    pairs = [list(zip(piece, piece[1:])).count((left, right)) for piece in steps["pieces"]]
    assert panel.locator("#step-pieces .new").count() == sum(pairs)


@pytest.fixture
def with_experts(tiny, tmp_path):
    """A served network with experts: its url, net, tok."""
    torch.manual_seed(3)
    tok = Tokenizer.from_folder(tiny / "out/tiny")
    config = GPTConfig(512, 64, n_layer=3, n_head=2, n_embd=32, n_experts=5, expert_hidden=16)
    net = GPT(config).eval()
    for layer in expert_layers(net):
        torch.nn.init.normal_(layer.gate.weight, std=0.5)
    save(tmp_path / "experts", net, tok, 1)
    options = ["--model=experts", "--port=0", "--device=cpu", "--dtype=float32"]
    process = start(tmp_path, "serve.py", *options)
    lines = iter(process.stdout.readline, "")
    url = next(m[1] for line in lines if (m := re.search(r"(http://\S+)", line)))
    yield url, net, tok
    process.send_signal(signal.SIGTERM)
    process.wait()


def test_where_tokens_went_is_shown(browser, with_experts):  # noqa: F811
    url, net, tok = with_experts
    ids = tok.encode(TEXT)
    with torch.no_grad():
        routes = routing.expert_routes(net, ids)
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()  # noqa: F811
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#status:text-is('Ready')")
    panel = open_view(page, "Experts")
    panel.get_by_label("Text", exact=True).fill(TEXT)
    page.wait_for_selector(f"#routed-note:has-text('{len(ids)} tokens, each to 2 of 5 experts')")
    panel.get_by_role("listbox", name="Layers: choose one").focus()
    page.keyboard.press("End")
    page.wait_for_selector("#route-name:text-is('Layer 2')")
    route = routes[2]
    loads = panel.locator("#load td:nth-child(2)").all_text_contents()
    assert [int(load) for load in loads] == route.load
    under = panel.locator("#route-tokens small").all_text_contents()
    assert under == [" ".join(map(str, experts)) for experts in route.experts]
    panel.locator("#route-tokens").get_by_role("option").nth(2).click()
    text = panel.locator("#route-text").text_content()
    assert f"at 2 goes to expert {route.experts[2][0]} with the weight" in text
    share = numbers_of([text.split("weight")[1]])[0]
    assert share == pytest.approx(100 * route.weights[2][0], abs=0.051)
    table = panel.locator("#route-layers td:nth-child(2)").all_text_contents()
    names = [re.findall(r"(\d+) \(", row) for row in table]
    assert names == [[str(expert) for expert in r.experts[2]] for r in routes]
    panel.locator("#route-map").focus()
    page.keyboard.press("ArrowDown")
    assert " at 3 " in panel.locator("#route-text").text_content()
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(wide)
    context.close()
    assert not errors
