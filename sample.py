"""A prompt in, text out: completion, a chat in the terminal, beam search.

    python sample.py                                    # continues a prompt with out/python
    python sample.py --model=out/shakespeare --prompt="ROMEO:" --num_samples=3
    echo "def main(" | python sample.py --prompt=- --temperature=0
    python sample.py --model=out/sft --chat
    python sample.py --model=out/classify --prompt="def f(x): ..."   # labels and probabilities

--model is a run of ours, a Hugging Face folder or a model's name on its Hub (Qwen3, Qwen2, Llama,
SmolLM2, Mistral, GPT-2), which is downloaded once. Prints the prompt and its continuation.
"""

from config import configure

model = "out/python"  # a checkpoint folder, or a Hub model such as HuggingFaceTB/SmolLM2-135M
prompt = "import os\n\n\ndef"  # the text to continue; - reads it from standard input
prompt_file: str | None = None  # a text file with the prompt, or .jsonl with a `prompt` a line
max_new_tokens = 200  # tokens to add, at most
temperature = 0.8  # 0 is greedy; below 1 sharper, above 1 flatter
top_k = 50  # draw among so many likeliest tokens; 0: all
top_p = 1.0  # draw among the likeliest with this much probability together
min_p = 0.0  # draw among those at least this fraction as likely as the likeliest
repetition_penalty = 1.0  # above 1: tokens already there become less likely
num_samples = 1  # continuations of each prompt, made at once
num_beams = 1  # above 1: beam search, the likeliest text it finds
stop: list | None = None  # strings that end the text: '["\n\n"]'
chat = False  # a conversation
system: str | None = None  # its system message
seed = 0  # the same seed gives the same text
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16
quantize: str | None = None  # int8 or int4: weights of one byte or half of one

if __name__ == "__main__":
    configure(globals())

import sys
from pathlib import Path

import torch

import model as core
from barelm.chat import TemplateRefusal
from barelm.checkpoint import load
from barelm.fast import generating
from barelm.files import JSONL, file_ending, parse_json, read_input
from barelm.run import UserError, choose_dtype, setup


def read_prompts():
    """The prompts that the settings name, as a list of texts."""
    if not prompt_file and prompt != "-":
        return [prompt]
    path = Path(prompt_file or "-")
    try:
        if file_ending(path) in JSONL:
            return read_records(path)
        if str(path) == "-":
            return [read_stdin(whole=True).removesuffix("\n")]
        return [read_input(path).decode()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8: {error}") from None


def read_records(path):
    """The field `prompt` of each line of a JSONL file."""
    prompts = []
    for number, line in enumerate(read_input(path).splitlines(), 1):
        if line.strip():
            record = parse_json(line, f"{path}:{number}")
            text = record.get("prompt") if isinstance(record, dict) else None
            if not isinstance(text, str):
                shown = line[:60].decode(errors="replace")
                raise UserError(f'{path}:{number}: expected {{"prompt": "..."}}: {shown!r}')
            if text != text.encode(errors="replace").decode():
                raise UserError(f"{path}:{number}: half a surrogate pair in it, which is no text")
            prompts.append(text)
    if not prompts:
        raise UserError(f"{path}: no prompt in it")
    return prompts


def read_stdin(whole):
    """The whole of standard input, or its next line."""
    if sys.stdin is None:
        raise UserError("-: standard input is closed")
    try:
        return sys.stdin.read() if whole else sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"-: standard input is no UTF-8: {error}") from None


def choices():
    """The settings of a generation, by the names that `generate` has for them."""
    names = "max_new_tokens temperature top_k top_p min_p repetition_penalty seed num_beams"
    return {name: globals()[name] for name in names.split()} | {"stop": stop or []}


def show(text):
    print(text, end="", flush=True)


def complete(net, tok):
    """Continue every prompt num_samples times: one as it is made, several when they are done."""
    prompts = [p for p in read_prompts() for _ in range(num_samples)]
    if len(prompts) == 1:
        show(prompts[0])
        core.generate(net, tok, prompts, **choices(), on_text=lambda i, piece: show(piece))
        show("\n")
        return
    for i, g in enumerate(core.generate(net, tok, prompts, **choices())):
        print(f"--- {i + 1} of {len(prompts)} ({len(g.ids)} tokens, {g.finish_reason})")
        print(prompts[i] + g.text)


def classify(net, tok):
    """The labels of each prompt with their probabilities, the likeliest first; a reward model's
    score, which is no probability, as it is."""
    for text in read_prompts():
        ids = (tok.start + tok.encode(text))[: net.config.n_ctx]
        if not ids:
            raise UserError("an empty text has no label")
        with torch.no_grad():
            scores = net.scores([ids])[0]
        shares = scores.softmax(0) if len(scores) > 1 else scores
        for i in shares.argsort(descending=True)[:10].tolist():
            print(f"{net.labels[i]}  {shares[i]:.4f}")


def fit_context(net, tok, messages):
    """The ids of a conversation, its oldest turns dropped until an answer fits behind it."""
    first = int(messages[0]["role"] == "system")
    while True:
        ids, _ = tok.chat(messages, add_generation_prompt=True)
        room = net.config.n_ctx - min(max_new_tokens, net.config.n_ctx // 2)
        if len(ids) <= room:
            return ids
        if len(messages) <= first + 1:
            raise UserError(
                f"this message has {len(ids)} tokens, but only {room} fit before an answer"
            )
        del messages[first : first + 2]


def converse(net, tok):
    """A conversation on the terminal; an empty line or the end of the input ends it."""
    messages = [{"role": "system", "content": system}] if system else []
    # An answer also ends with the token that the template puts behind an assistant's words.
    try:
        tok.eos_ids = [*tok.eos_ids, *tok.end_of_turn()]
    except TemplateRefusal as error:
        print(f"answers end at the end token alone: {error}", file=sys.stderr)
    while True:
        show("you> " if sys.stdin and sys.stdin.isatty() else "")
        text = read_stdin(whole=False).strip()
        if not text:
            return
        messages.append({"role": "user", "content": text})
        show("model> ")
        ids = fit_context(net, tok, messages)
        [g] = core.generate(net, tok, [ids], **choices(), on_text=lambda i, piece: show(piece))
        show("\n")
        messages.append({"role": "assistant", "content": g.text})


def main():
    if sys.stdin is not None:  # bytes that are no text are refused, whatever the locale
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    run = setup(device)
    kind, _ = choose_dtype(run.device, dtype)
    if num_samples < 1:
        raise UserError(f"num_samples={num_samples}: expected 1 or more")
    core.check_sampling(**{name: globals()[name] for name in core.SAMPLING})
    if not all(isinstance(text, str) and text for text in stop or []):
        raise UserError(f"--stop={stop}: expected a list of texts, none of them empty")
    net, tok = load(model, run.device, kind, quantize)
    if net.score is not None:
        return classify(net, tok)
    with generating(net):  # all turns of a conversation
        converse(net, tok) if chat else complete(net, tok)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
