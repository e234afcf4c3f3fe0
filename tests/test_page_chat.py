"""The page's Chat in a real browser, if there is one: what is shown is what the server says, what
is kept is what was said, and what is exported is what prepare.py takes."""

import json
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import requests
from conftest import run, start

pytest.importorskip("fastapi")
from test_page import browser, open_view, set_greedy  # noqa: F401

from barelm.files import read_json, write_json
from barelm.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
ONE = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """A server of a model that ends its answers as a tuned one does, with a longer context than it
    learned and a file of feedback."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny / "out/tiny", folder / "tuned")
    (folder / "tuned/run.json").unlink()
    tok = Tokenizer(read_json(folder / "tuned/tokenizer.json"), {})
    ids = read_json(folder / "tuned/generation_config.json")
    ends = [ids["eos_token_id"], tok.special["<|im_end|>"]]
    write_json(folder / "tuned/generation_config.json", ids | {"eos_token_id": ends})
    config = read_json(folder / "tuned/config.json")
    write_json(folder / "tuned/config.json", config | {"max_position_embeddings": 256})
    options = ["--model=tuned", "--port=0", "--device=cpu", "--feedback=thumbs.jsonl"]
    process = start(folder, "serve.py", *options)
    lines = iter(process.stdout.readline, "")
    url = next(m[1] for line in lines if (m := re.search(r"(http://\S+)", line)))
    post = lambda path, **body: requests.post(url + path, json=body, timeout=60).json()
    yield SimpleNamespace(url=url, folder=folder, post=post)
    process.send_signal(signal.SIGTERM)
    process.wait()


@pytest.fixture
def page(browser, tuned):  # noqa: F811
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(tuned.url)
    ready(page)
    yield page
    context.close()
    assert not errors


def ready(page):
    page.wait_for_selector("#status:text-is('Ready')")


def say(page, text):
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    page.locator(".turn.user", has_text=text).last.wait_for()
    page.wait_for_selector("#send:text-is('Send')")


def click(page, name, turn):
    turn.get_by_role("button", name=name, exact=True).click()
    page.wait_for_selector("#send:text-is('Send')")


def exported(page):
    """The messages of the conversation that is shown, as its file has them."""
    page.locator("#chat-menu summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export this one").click()
    return json.loads(download.value.path().read_text())["messages"]


def answer(tuned, messages, n, **more):
    told = tuned.post(CHAT, messages=messages, max_tokens=n, temperature=0, **more)
    return told["choices"][0]["message"]["content"]


def test_a_conversation_from_the_first_word_to_a_task_set(page, tuned):
    assert page.get_by_role("tab", name="Chat", selected=True).count() == 1
    assert not page.locator("#untuned").is_visible()
    set_greedy(page, 6)
    page.locator("#system-box summary").click()
    assert page.locator("#opening").text_content() == "<|im_start|>user\n"
    page.get_by_label("System prompt").fill("Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for text in ("Hi <b>you</b>", "And?"):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(tuned, messages, 6)})
        say(page, text)
    assert exported(page) == messages
    assert page.locator(".turn b").count() == 0
    turns = page.locator(".turn")
    assert re.match(
        r"6 tokens in .* ended at the limit", turns.nth(1).locator(".note").inner_text()
    )

    # Its tokens, each with its alternatives, and back.
    click(page, "Tokens", turns.nth(1))
    tokens = page.get_by_role("listbox", name="Tokens of the answer")
    assert tokens.text_content() == messages[2]["content"]
    tokens.focus()
    page.keyboard.press("ArrowRight")
    first = tuned.post(
        CHAT, messages=messages[:2], max_tokens=1, temperature=0, logprobs=True, top_logprobs=5
    )
    best = first["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    rows = page.locator("#chosen table").first.locator("tbody tr")  # of a slow reader's one piece
    assert rows.count() == len(best) == 5  # may have several tokens
    click(page, "Tokens", turns.nth(1))

    # Another answer from the middle; what was there comes back.
    click(page, "Again", turns.nth(1))
    assert turns.count() == 2
    page.locator("#undo button").click()
    assert exported(page) == messages
    turns.nth(2).get_by_role("button", name="Edit").click()
    page.get_by_label("Edit this message").fill("Or?")
    click(page, "Send", turns.nth(2))
    other = [*messages[:3], {"role": "user", "content": "Or?"}]
    other.append({"role": "assistant", "content": answer(tuned, other, 6)})
    assert exported(page) == other
    turns.nth(3).get_by_role("button", name="Edit").click()
    page.get_by_label("Edit this message").fill("No.")
    click(page, "Save", turns.nth(3))
    assert exported(page)[-1]["content"] == "No."
    turns.nth(3).get_by_role("button", name="Earlier answer").click()
    assert exported(page) == other
    click(page, "Delete", turns.nth(2))
    assert exported(page) == messages[:3]

    # It is there after a reload, beside a second one, and prepare.py takes both.
    page.reload()
    ready(page)
    assert exported(page) == messages[:3]
    assert turns.nth(1).locator(".note").inner_text().startswith("1 of 2: 6 tokens in")
    assert turns.nth(1).get_by_role("button", name="Tokens").is_disabled()
    page.get_by_role("button", name="New", exact=True).click()
    set_greedy(page, 6)
    say(page, "Second")
    turns.nth(1).get_by_role("button", name="Edit").click()
    page.get_by_label("Edit this message").fill("Yes.")  # the model's may be nothing but blanks
    click(page, "Save", turns.nth(1))
    page.locator("#chat-menu summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    download.value.save_as(tuned.folder / "chats.jsonl")
    rows = [json.loads(line) for line in (tuned.folder / "chats.jsonl").read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 3] and rows[1]["messages"] == messages[:3]
    (tuned.folder / "one.json").write_text(json.dumps({"messages": messages}, indent=2))
    for name, n in (("chats.jsonl", 2), ("one.json", 1)):
        run(tuned.folder, "prepare.py", "--task=sft", f"--source={name}", "--dataset=chats",
            "--val_fraction=0")  # fmt: skip
        made = (tuned.folder / "data/chats/sft_train.jsonl").read_text().splitlines()
        assert len(made) == n
    assert json.loads(made[0])["messages"] == messages

    # And the files come in again.
    page.get_by_label("Conversations", exact=True).last.set_input_files(tuned.folder / "one.json")
    page.wait_for_selector("#chat-note:has-text('1 conversation imported')")
    assert exported(page) == messages
    (tuned.folder / "bad.jsonl").write_text('{"messages": [{"role": "tool", "content": "a"}]}\n')
    page.locator("#import-file").set_input_files(tuned.folder / "bad.jsonl")
    page.wait_for_selector("#error:has-text('bad.jsonl: conversation 1: message 1: expected')")
    assert exported(page) == messages


def test_a_conversation_that_is_too_large_takes_no_other_with_it(page):
    script = """async () => {
      const { begin, keep, kept } = await import("/page/conversations.js");
      const one = (id, content) => ({ ...begin(), id, turns: [{ role: "user", content }] });
      keep("another model", one("a", "Hi"));
      const isWhole = keep("another model", one("large", "x".repeat(2500000)), one("b", "Hi"));
      return [isWhole, kept("another model").map(({ id }) => id)];
    }"""
    assert page.evaluate(script) == [False, ["b", "a"]]


def test_what_does_not_fit_leaves_no_turn_behind(page):
    set_greedy(page, 4)
    say(page, "Hi")
    before = exported(page)
    for long in ("import os " * 200, "import os " * 100_000):  # of tokens, and of characters alone
        page.get_by_label("Your message").fill(long)
        page.keyboard.press("Enter")
        page.wait_for_selector("#error:has-text('fills the context of 256 tokens')")
        ready(page)
        assert page.get_by_label("Your message").input_value() == long
        assert exported(page) == before
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, body="{}"))
    page.get_by_label("Your message").fill("Still there?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:has-text('The server answered 500')")
    ready(page)
    assert page.get_by_label("Your message").input_value() == "Still there?"
    assert exported(page) == before
    page.unroute("**/v1/chat/completions")
    page.get_by_label("Your message").press("Enter")
    page.locator(".turn.user").nth(1).wait_for()
    ready(page)
    assert [m["content"] for m in exported(page)][2] == "Still there?"


def test_a_cut_answer_goes_on(page, tuned):
    set_greedy(page, 5)
    say(page, "Hi")
    begun = [*ONE, {"role": "assistant", "content": answer(tuned, ONE, 5)}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    rest = answer(tuned, begun, 5, **more)
    turn = page.locator(".turn.assistant")
    click(page, "Continue", turn)
    assert exported(page) == [*ONE, begun[1] | {"content": begun[1]["content"] + rest}]
    n = len(tuned.post("/tokenize", prompt=rest)["tokens"])
    count = int(turn.locator(".note").inner_text().split()[0])
    assert 5 < count <= 10 and count >= 5 + min(n, 1)


def test_thumbs_are_rows_of_the_answers_that_they_are_of(page, tuned):
    path = tuned.folder / "thumbs.jsonl"
    path.write_text("")
    rows = lambda: [json.loads(line) for line in path.read_text().splitlines()]
    set_greedy(page, 5)
    page.get_by_label("Temperature").fill("2")
    say(page, "Hi")
    first = exported(page)[-1]["content"]
    turn = page.locator(".turn.assistant")
    good = turn.get_by_role("button", name="Good answer")
    good.click()
    page.wait_for_selector("[aria-label='Good answer'][aria-pressed=true]")
    click(page, "Again", turn)
    second = exported(page)[-1]["content"]
    assert good.get_attribute("aria-pressed") == "false"
    turn.get_by_role("button", name="Bad answer").click()
    page.wait_for_selector("[aria-label='Bad answer'][aria-pressed=true]")
    turn.get_by_role("button", name="Earlier answer").click()
    assert good.get_attribute("aria-pressed") == "true"
    good.click()  # takes it back
    page.wait_for_selector("[aria-label='Good answer'][aria-pressed=false]")
    told = [(row["prompt"], row["response"], row["rating"]) for row in rows()]
    assert told == [(ONE, first, 1), (ONE, second, -1), (ONE, first, 0)]


EVIL = """# A <script>alert(1)</script> &amp; b

<img src=x onerror=alert(1)> [a](javascript:alert(1)) [b](https://a.b) ![c](http://d/e.png)
second line, `x &lt; <i>`

<iframe src=//a.b></iframe>

- one
- [x] two

| a | b |
|--:|---|
| 1 | **2** |

```py
print("<b>")
```"""
MADE = """async (text) => {
  const { showMarkdown } = await import("/page/markdown.js");
  const place = document.createElement("div");
  document.body.append(place);
  let first = null, isSame = true;
  for (let n = 1; n <= text.length; n++) { // as it comes, a character at a time
    showMarkdown(place, text.slice(0, n));
    if (n === 60) first = place.firstElementChild;
    if (n > 60) isSame &&= place.firstElementChild === first;
  }
  const tags = [...place.querySelectorAll("*")].map((e) => e.localName);
  return { tags, isSame, text: place.textContent, links: [...place.querySelectorAll("a")]
    .map((a) => a.href), code: place.querySelector("pre")?.textContent,
    cells: [...place.querySelectorAll("td")].map((e) => e.textContent) };
}"""


def test_markdown_is_elements_and_never_html(page):
    made = page.evaluate(MADE, EVIL)
    allowed = set(
        "h3 p a br code ul li div table thead tbody tr th td strong span button pre".split()
    )
    assert set(made["tags"]) == allowed
    assert made["links"] == ["https://a.b/", "http://d/e.png"]
    assert made["code"] == 'print("<b>")' and made["cells"] == ["1", "2"]
    for part in (
        "A <script>alert(1)</script> & b",
        "<img src=x onerror=alert(1)>",
        "\u2611 two",
        "[a](javascript:alert(1))",
        "x &lt; <i>",
        "<iframe src=//a.b></iframe>",
    ):
        assert part in made["text"]
    assert made["isSame"]  # what is done is not made anew
    deep = page.evaluate(
        MADE.replace("n = 1;", "n = text.length;"), ">" * 20_000 + "\n\n```\na\n```"
    )
    assert ">>>>" in deep["text"] or deep["tags"].count("blockquote") > 100
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".code button").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("<b>")'


@pytest.mark.parametrize("size", [(360, 640), (1280, 800)])
def test_the_composer_is_at_the_end_and_covers_nothing(page, size):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    bottom = lambda selector: page.locator(selector).last.evaluate(
        "(e) => e.getBoundingClientRect().bottom"
    )
    top = lambda selector: page.locator(selector).last.evaluate(
        "(e) => e.getBoundingClientRect().top"
    )
    assert size[1] - 120 < bottom("#composer") <= size[1]  # with nothing said yet
    if size[0] < 736:
        assert top("#composer") < top("#sampling")
    set_greedy(page, 8)
    page.get_by_text("Sampling", exact=True).click()
    for text in ("one\ntwo\nthree\nfour", "five", "six\nseven\neight"):
        page.get_by_label("Your message").fill(text)
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:text-is('Stop')")
        page.wait_for_selector("#send:text-is('Send')")
    assert bottom(".turn .actions") <= top("#composer") + 1
    assert bottom("#composer") <= size[1] + 1
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(50)
    assert abs(bottom("#composer") - size[1]) < 2  # wherever one reads
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    open_view(page, "Complete")
    if size[0] < 736:
        assert top("#prompt") < top("#sampling") and top("#go") < top("#sampling")
