"""A prompt in, text out: completion, a chat in the terminal, beam search.

    python sample.py                                    # continues a prompt with out/python
    python sample.py --model=out/shakespeare --prompt="ROMEO:" --num_samples=3
    echo "def main(" | python sample.py --prompt=- --temperature=0
    python sample.py --model=out/sft --chat
    python sample.py --speculate=4 --draft=out/small    # the same text by fewer passes
    python sample.py --model=out/classify --prompt="def f(x): ..."   # labels and probabilities
    python sample.py --model=out/tag --prompt="def f(x): ..."   # the names in it, and their kinds
    python sample.py --model=out/bert --prompt="The [MASK] of France"   # an encoder fills masks
    python sample.py --lens --lens_against="import re"  # what each layer would say after a prompt

--model is a run of ours, a Hugging Face folder or a model's name on its Hub (Qwen3, Qwen2, Llama,
SmolLM2, Mistral, GPT-2), which is downloaded once. Prints the prompt and its continuation.
"""

from config import configure, defaults

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
speculate = 0  # tokens that a draft proposes for each pass, which keeps those that fit; 0: none
draft: str | None = None  # a smaller model of the same tokenizer, heads or lookup; none: by --model
stop: list | None = None  # strings that end the text: '["\n\n"]'
chat = False  # a conversation
system: str | None = None  # its system message
lens = False  # print what each layer would say, and what adds to the answer's logit
lens_against: str | None = None  # a prompt of as many tokens: where in the layers the two part
seed = 0  # the same seed gives the same text
device = "auto"  # auto, cpu, mps, cuda, cuda:1
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16
quantize: str | None = None  # int8 or int4: weights of one byte or half of one
fast = True  # false: model.py's plain mathematics alone, a referee for a doubtful result
deterministic = False  # a text's bits do not depend on the batch: slower (docs/determinism.md)
tp = 1  # processes, a GPU each, that share each matrix product (docs/tensor_parallel.md)

if __name__ == "__main__":
    configure(globals())

import sys
from pathlib import Path

import torch

from barelm.chat import TemplateRefusal
from barelm.checkpoint import load
from barelm.extraction import make_windows
from barelm.fast import generating
from barelm.files import JSONL, file_ending, parse_json, read_input
from barelm.filling import fill, fill_spans
from barelm.heads import find_answer, tag_tokens
from barelm.invariant import be_deterministic
from barelm.lens_text import print_lens
from barelm.mirror import open_together
from barelm.run import UserError, choose_dtype, end_process
from barelm.sampling import check_sampling
from barelm.speculate import DRAFTS, check_speculation, network_of, summary
from barelm.tagging import guessed_tags, is_bio, spans_of, tokenize_words, words_of
from model import generate


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
        if not line.strip():
            continue
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


def sampling():
    """The settings that `check_sampling` looks at."""
    return dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        speculate=speculate,
    )


def open_draft(net, tok, device, dtype):
    """What drafts for `speculate`, as `generate` takes it: a network, a name or None."""
    if not speculate:
        if draft:
            raise UserError(f"--draft={draft}: for how many tokens? --speculate=4, say")
        return None
    drafter = draft
    if draft not in (None, *DRAFTS):
        drafter, other = load(draft, device, dtype, fast=fast)
        if other.shown != tok.shown:
            raise UserError(f"--draft={draft}: its tokenizer is not that of {model}")
        if deterministic:
            be_deterministic(drafter)
    check_speculation(net, tok.n_vocab, speculate, drafter, num_beams)
    return drafter


def continue_texts(net, tok, prompts, drafter, mirror, on_text=None):
    """`generate` with all settings: a Generation for each prompt, a text or ids. mirror: where
    several processes compute, what has the others do the same."""
    options = dict(max_new_tokens=max_new_tokens, seed=seed, stop=stop or [], draft=drafter)
    options |= sampling()
    if mirror:
        return mirror(generate, net, tok, prompts, **options, here={"on_text": on_text})
    return generate(net, tok, prompts, **options, on_text=on_text)


def show(text):
    print(text, end="", flush=True)


def show_piece(i, piece):
    """Text of the only prompt, as it is made."""
    show(piece)


def complete(net, tok, texts, drafter, mirror=None):
    """Continue every text num_samples times: one as it is made, several when they are done.
    Returns the Generations."""
    prompts = [text for text in texts for _ in range(num_samples)]
    # An encoder-decoder answers its source, and continues nothing.
    shown = ["" if net.config.is_seq2seq else text for text in prompts]
    if len(prompts) == 1:
        show(shown[0])
        generations = continue_texts(net, tok, prompts, drafter, mirror, show_piece)
        show("\n")
        return generations
    generations = continue_texts(net, tok, prompts, drafter, mirror)
    for i, g in enumerate(generations):
        print(f"--- {i + 1} of {len(prompts)} ({len(g.ids)} tokens, {g.finish_reason})")
        print(shown[i] + g.text)
    return generations


def classify(net, tok, prompts):
    """The labels of each prompt with their probabilities, the likeliest first; a reward model's
    score, which is no probability, as it is."""
    for text in prompts:
        ids, _ = tok.whole_text(text, net.config.n_ctx)
        if not ids:
            raise UserError("an empty text has no label")
        with torch.no_grad():
            scores = net.scores([ids])[0]
        if len(scores) > 1:
            scores = scores.softmax(0)
        for i in scores.argsort(descending=True)[:10].tolist():
            print(f"{net.labels[i]}  {scores[i]:.4f}")


def tag(net, tok, prompts):
    """The spans in each prompt by their kinds; of tags that are of no spans, each word and its."""
    for text in prompts:
        row = {"text": text, "entities": []}
        _, words, _ = words_of(row)
        ids, firsts, _ = tokenize_words(tok, text, words, net.config.n_ctx)
        [tokens] = tag_tokens(net, [ids])
        tags = guessed_tags(firsts, [label for label, _ in tokens])
        if is_bio(net.labels):
            spans = spans_of(tags)
        else:
            spans = [(tag, i, i + 1) for i, tag in enumerate(tags)]
        for kind, begin, end in spans:
            print(f"{kind}  {text[words[begin][0] : words[end - 1][1]]}")


def answer(net, tok, prompts):
    """The part of each prompt that answers its first line, which is the question."""
    for text in prompts:
        question, _, context = text.partition("\n")
        windows = make_windows(tok, question, context.strip(), net.config.n_ctx)
        text, score = find_answer(net, context.strip(), windows)
        print(f"{text}  {score:.4f}")


def fill_masks(net, tok, prompts):
    """The likeliest tokens for each mask of each prompt, top_k of them at most: of those that have
    less than one in a hundred the likeliest alone."""
    for text in prompts:
        print(text)
        for i, tokens in enumerate(fill(net, tok, text, top_k)):
            for rank, (token, probability) in enumerate(tokens):
                if rank == 0 or probability >= 0.01:
                    print(f"mask {i + 1}: {probability:.4f}  {token!r}")


def fill_gaps(net, tok, prompts):
    """Each prompt with what an encoder-decoder writes in the place of the sentinels in it."""
    for text in prompts:
        print(fill_spans(net, tok, text, max_new_tokens))


def has_gaps(net, tok, prompts):
    """Whether the model is an encoder-decoder, and a sentinel in a prompt asks for a span."""
    if not net.config.is_seq2seq:
        return False
    names = [name for name, id in tok.special.items() if id in tok.sentinel_ids]
    return any(name in text for text in prompts for name in names)


def fit_context(net, tok, messages):
    """The ids of a conversation, its oldest turns dropped until an answer fits behind it."""
    first = int(messages[0]["role"] == "system")  # a system message stays
    while True:
        ids, _ = tok.chat(messages, add_generation_prompt=True)
        room = net.config.n_ctx - min(max_new_tokens, net.config.n_ctx // 2)
        if len(ids) <= room:
            return ids
        if len(messages) <= first + 1:
            raise UserError(
                f"this message has {len(ids)} tokens, but only {room} fit before an answer"
            )
        del messages[first : first + 2]  # a question and its answer


def converse(net, tok, drafter, mirror=None):
    """A conversation on the terminal; an empty line or the end of the input ends it. Returns the
    answers as Generations."""
    generations = []
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
            return generations
        messages.append({"role": "user", "content": text})
        show("model> ")
        ids = fit_context(net, tok, messages)
        [g] = continue_texts(net, tok, [ids], drafter, mirror, show_piece)
        generations.append(g)
        show("\n")
        messages.append({"role": "assistant", "content": g.text})


def check_settings():
    if num_samples < 1:
        raise UserError(f"num_samples={num_samples}: expected 1 or more")
    check_sampling(**sampling())
    if lens_against is not None and not lens:
        raise UserError("--lens_against: of what --lens shows: give both")
    if lens and tp > 1:
        raise UserError(f"--lens: of a network that one process has: --tp=1, not {tp}")
    for text in stop or []:
        if not isinstance(text, str) or not text:
            raise UserError(f"--stop={stop}: expected a list of texts, none of them empty")


# Of how a text is continued: no word to who asks for labels, or for what is in a gap.
OF_CONTINUATIONS = ("chat", "system", "num_samples", "num_beams", "speculate", "draft", "stop")


def check_unused(what):
    """Refuse settings that would be passed over, as the model does something else with a text."""
    usual = defaults(globals())
    for name in OF_CONTINUATIONS:
        if globals()[name] != usual[name]:
            raise UserError(f"--{name}: {model} {what}")


def open_model(run, split=None):
    """(the network, its tokenizer). split: as `load` takes it."""
    compute, _ = choose_dtype(run.device, dtype)
    return load(model, run.device, compute, quantize, fast, split)


def look_inside(net, tok, prompts):
    """Print what the layers do with each prompt."""
    check_unused("is looked into by --lens, and continues nothing")
    for text in prompts:
        print_lens(net, tok, text, lens_against)


def check_together(net):
    """Refuse what several processes do not do together."""
    if net.score is not None or not net.config.causal or net.config.is_seq2seq:
        raise UserError(f"--tp={tp}: {model} continues no text: --tp=1")
    if speculate or deterministic:
        raise UserError(f"--tp={tp}: not with --speculate or --deterministic")


def main():
    if sys.stdin is not None:  # bytes that are no text are refused, whatever the locale
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    check_settings()
    run, mirror, (net, tok) = open_together(tp, device, open_model, threads)
    run.threads.note()
    if mirror:
        check_together(net)
        mirror.knows(net=net, tok=tok)
    if not run.is_main:
        mirror.follow()
        end_process(0)
    if deterministic:
        be_deterministic(net)
    if lens:
        look_inside(net, tok, read_prompts())
        return
    if net.score is not None:
        check_unused(f"is a model of {net.task}: it reads the prompt, and continues none")
        {"classify": classify, "tag": tag, "span": answer}[net.task](net, tok, read_prompts())
        return
    if chat and net.config.is_seq2seq:
        raise UserError(f"--chat: {model} is an encoder-decoder, which answers a source: --prompt")
    if not net.config.causal:
        check_unused("is an encoder, which fills masks and does not talk")
        fill_masks(net, tok, read_prompts())
        return
    prompts = [] if chat else read_prompts()
    if has_gaps(net, tok, prompts):
        check_unused("fills the gaps of the prompt, greedily, and continues none")
        fill_gaps(net, tok, prompts)
        return
    compute, _ = choose_dtype(run.device, dtype)
    drafter = open_draft(net, tok, run.device, compute)
    with generating(net), generating(network_of(drafter, net)):  # once for all turns
        if chat:
            generations = converse(net, tok, drafter, mirror)
        else:
            generations = complete(net, tok, prompts, drafter, mirror)
    if speculate:
        print(summary(generations), file=sys.stderr)
    if mirror:
        mirror.end()
        end_process(0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
