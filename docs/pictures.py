"""The pictures of the README and of docs/page.md, from runs that are there: none is drawn by hand.

    python docs/pictures.py                     # out/python's curves, and the page with out/chat
    python docs/pictures.py --page=FOLDER       # the page with another model

It wants playwright (pip install playwright) and a chromium on this machine. It writes
docs/pictures/: curves.svg, and of each view a PNG in light and dark colours.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs/pictures"
WIDTH, HEIGHT = 1200, 760  # of the window, in pixels
QUESTIONS = ["What does os.path.join do?", "How do I read a file line by line?", "what is 17 + 25?"]
TEXT = "def mean(values):\n    return sum(values) / len(values)\n"


def serve(model):
    """(the process, its address) of a server of this model."""
    command = [sys.executable, "serve.py", f"--model={model}", "--port=0", "--max_batch=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        match = re.search(r"http://\S+", line)
        if match:
            return process, match[0]
    raise SystemExit(f"serve.py --model={model} did not start")


def open_view(page, address, name):
    page.goto(address)
    page.wait_for_selector("#status:text-is('Ready')")
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel", name=name, exact=True)


def chat(page, address):
    """A conversation, made by the model while we look."""
    panel = open_view(page, address, "Chat")
    for n, question in enumerate(QUESTIONS):
        panel.get_by_label("Your message").fill(question)
        page.keyboard.press("Enter")
        panel.locator(".turn.assistant").nth(n).wait_for()
        page.wait_for_selector("#status:text-is('Ready')")


def attention(page, address):
    panel = open_view(page, address, "Attention")
    panel.get_by_label("Text", exact=True).fill(TEXT)
    page.wait_for_load_state("networkidle")


def layers(page, address):
    open_view(page, address, "Layers")
    page.wait_for_load_state("networkidle")


def next_token(page, address):
    open_view(page, address, "Next token")
    page.wait_for_load_state("networkidle")


def training(page, address):
    open_view(page, address, "Training")
    page.locator("#charts svg").first.wait_for()


def model(page, address):
    open_view(page, address, "Model")
    page.wait_for_load_state("networkidle")


def take(browser, address, scheme):
    """A picture of each view in these colours."""
    suffix = "" if scheme == "light" else "-dark"
    for view in (chat, next_token, attention, layers, training, model):
        context = browser.new_context(
            viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme
        )
        page = context.new_page()
        view(page, address)
        page.wait_for_timeout(500)  # what is drawn once a frame
        path = PICTURES / f"{view.__name__}{suffix}.png"
        page.screenshot(path=path)
        print(f"wrote {path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")
        context.close()


def main():
    PICTURES.mkdir(exist_ok=True)
    served = "out/chat"
    for flag in sys.argv[1:]:
        served = flag.removeprefix("--page=")
    shutil.copy(ROOT / "out/python/curves.svg", PICTURES / "curves.svg")
    process, address = serve(served)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    flags = ["--no-sandbox", "--disable-gpu"]
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=chromium, args=flags)
            for scheme in ("light", "dark"):
                take(browser, address, scheme)
            browser.close()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
