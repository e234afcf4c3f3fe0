"""Chats: loss masks of templates of every form against masks written by hand, transformers' own,
and templates that are programs of strangers."""

import itertools
import json
import os
import re
from pathlib import Path

import pytest
from test_outside import FIXTURES, open_tokenizer

from barelm.chat import TurnFinder, renderer_of
from barelm.chat_model import describe_chat, opening_of
from barelm.encoders import byte_letters
from barelm.files import write_json
from barelm.run import UserError
from barelm.tokenizer import Tokenizer

MARKS = "<BOS> <EOS> <|start|> <|channel|> <|message|> <|end|> <|return|> <|sep|> <User> <Bot>"
MARKS = f"{MARKS} <|call|>".split()


def tokenizer(template, **config):
    """A tokenizer of bytes and marks with this chat template."""
    letters = byte_letters()
    vocab = {letter: i for i, letter in enumerate(letters.values())}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [
        {"id": len(vocab) + i, "content": name, "special": True} | flags
        for i, name in enumerate(MARKS)
    ]
    spec = {"added_tokens": special, "pre_tokenizer": {"type": "ByteLevel"}}
    spec["pre_tokenizer"] |= dict(add_prefix_space=False, trim_offsets=False, use_regex=True)
    spec |= {"decoder": spec["pre_tokenizer"]}
    spec["model"] = {"type": "BPE", "vocab": vocab, "merges": []}
    config = {"bos_token": "<BOS>", "eos_token": "<EOS>", "chat_template": template} | config
    return Tokenizer(spec, config)


def naive(tok, pieces):
    """(ids, mask) of [(text, said)], token by token: no token crosses a piece here."""
    ids, mask = [], []
    for text, said in pieces:
        while text:
            mark = next((m for m in MARKS if text.startswith(m)), None)
            new = [tok.special[mark]] if mark else [*tok.encode(text[0])]
            text = text[len(mark or text[0]) :]
            ids += new
            mask += [said] * len(new)
    return ids, mask


# Each form: a template, and what it writes of a conversation as pieces (text, said or not). They
# are written apart from each other, and from any model's own template.

HARMONY = """{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}
{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>\
<|start|>assistant{% endif %}
<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last and not \
add_generation_prompt else '<|end|>' }}{% else %}<|message|>{{ m.content }}<|end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""


def harmony(talk):
    for i, m in enumerate(talk):
        yield f"<|start|>{m['role']}", 0
        if m["role"] == "assistant":
            last = i + 1 == len(talk)
            if last and "thinking" in m:
                yield f"<|channel|>analysis<|message|>{m['thinking']}<|end|><|start|>assistant", 1
            end = "<|return|>" if last else "<|end|>"
            yield f"<|channel|>final<|message|>{m['content']}{end}", 1
        else:
            yield f"<|message|>{m['content']}<|end|>", 0


TWO_ENDS = """{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}
{{- '<|end|>' + '\n' + '<EOS>' if m.role == 'assistant' else '<|sep|>' }}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def two_ends(talk):
    yield "<BOS>", 0
    for m in talk:
        yield f"{m['role']}: ", 0
        if m["role"] == "assistant":
            yield f"{m['content'].strip()}<|end|>\n<EOS>", 1
            yield "\n", 0
        else:
            yield f"{m['content'].strip()}<|sep|>\n", 0


NO_END = """{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def no_end(talk):
    for m in talk:
        yield f"{m['role']}: ", 0
        yield f"{m['content']}\n\n", m["role"] == "assistant"


# The last turn is closed by the end token, the others by a marker; a prompt closes nothing.
LAST_ENDS = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"""


def last_ends(talk):
    for i, m in enumerate(talk):
        said = m["role"] == "assistant"
        last = i + 1 == len(talk)
        yield f"<|{m['role']}|>", 0
        if said and last:
            yield f"{m['content']}<|end|>\n<EOS>", 1
        else:
            yield f"{m['content']}<|end|>", said
            yield "\n<EOS>" if last else "\n", 0


# Thoughts of an answer are not written again, but the prompt opens one: DeepSeek-R1's way.
STRIPPED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<Bot>
{{- m.content.split('</think>')[-1] }}<EOS>{% elif m.role == 'user' %}<User>{{ m.content }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<Bot><think>\n' }}{% endif %}"""


def stripped(talk):
    yield "<BOS>", 0
    for m in talk:
        if m["role"] == "assistant":
            yield "<Bot>", 0
            yield m["content"].split("</think>")[-1] + "<EOS>", 1
        else:
            yield ("<User>" if m["role"] == "user" else "") + m["content"], 0


# Thoughts are written in the turns behind the last question alone, where they are even if empty,
# and a question there must be: as Qwen3.5 and Nemotron have it.
REWRITTEN = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% if ns.last < 0 %}{{ raise_exception('no question') }}{% endif %}
{% for m in messages %}<|start|>{{ m.role + '\n' }}
{%- set parts = m.content.split('</think>') %}
{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' }}
{{- parts[0].replace('<think>', '').strip() if parts | length > 1 else '' }}
{{- '\n</think>\n\n' }}{% endif %}{{ parts[-1].strip() }}<|end|>{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"""


def rewritten(talk):
    last = max(i for i, m in enumerate(talk) if m["role"] == "user")
    for i, m in enumerate(talk):
        yield f"<|start|>{m['role']}\n", 0
        *thoughts, answer = m["content"].split("</think>")
        if m["role"] == "assistant" and i > last:
            yield "<think>\n", 0
            thought = thoughts[0].replace("<think>", "").strip() if thoughts else ""
            yield f"{thought}\n</think>\n\n{answer.strip()}<|end|>", 1
        else:
            yield f"{answer.strip()}<|end|>", m["role"] == "assistant"
        yield "\n", 0


# No generation prompt: an answer stands right behind the question's closing mark.
BRACKETS = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"""


def brackets(talk):
    yield "<BOS>", 0
    for m in talk:
        if m["role"] == "assistant":
            yield f" {m['content']}<EOS>", 1
        else:
            yield f"[{m['content']}]", 0


# Calls of tools are said, what tools return is not; a call ends otherwise than an answer.
TOOLS = """{% for m in messages %}{% if m.tool_calls %}<|start|>assistant
{%- for call in m.tool_calls %} to={{ call.function.name }}<|message|>
{{- call.function.arguments | tojson }}{% endfor %}<|call|>{% else %}<|start|>{{ m.role }}
{{- '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""


def tools(talk):
    for m in talk:
        yield f"<|start|>{m['role']}", 0
        if "tool_calls" in m:
            for call in m["tool_calls"]:
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                yield f" to={call['function']['name']}<|message|>{arguments}", 1
            yield "<|call|>", 1
        else:
            yield f"<|message|>{m['content']}<|end|>", m["role"] == "assistant"


# The header of an answer is written by the turn before it, and bos before each question.
EACH_BOS = """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}Q: {{ m.content }}
A:{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{{ '\n' }}{% else %}
{{ m.content }}{{ '\n' }}{% endif %}{% endfor %}"""


def each_bos(talk):
    for m in talk:
        if m["role"] == "user":
            yield f"<BOS>Q: {m['content']}\nA:", 0
        elif m["role"] == "assistant":
            yield f" {m['content']}<EOS>", 1
            yield "\n", 0
        else:
            yield f"{m['content']}\n", 0


# The end token is between turns: the last has none.
BETWEEN = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{%- if m.role == 'assistant' and not loop.last %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def between(talk):
    for i, m in enumerate(talk):
        yield f"{m['role']}: ", 0
        if m["role"] != "assistant":
            yield f"{m['content']}\n", 0
        elif i + 1 == len(talk):
            yield f"{m['content']}\n", 1
        else:
            yield f"{m['content']}<EOS>", 1
            yield "\n", 0


# The system prompt is written into the last question: Mistral's way.
SYSTEM_LAST = """{{ bos_token }}{% set ns = namespace(last=0, system='') %}{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{% if m.role == 'system' %}{% set ns.system = m.content + ' & ' %}{% endif %}{% endfor %}
{% for m in messages %}{% if m.role == 'user' %}
{{- '[' + (ns.system if loop.index0 == ns.last else '') + m.content + ']' }}
{%- elif m.role == 'assistant' %} {{ m.content + eos_token }}{% endif %}{% endfor %}"""


def system_last(talk):
    yield "<BOS>", 0
    last = max(i for i, m in enumerate(talk) if m["role"] == "user")
    system = "".join(f"{m['content']} & " for m in talk if m["role"] == "system")
    for i, m in enumerate(talk):
        if m["role"] == "user":
            yield f"[{system if i == last else ''}{m['content']}]", 0
        elif m["role"] == "assistant":
            yield f" {m['content']}<EOS>", 1


FORMS = {
    "harmony": (HARMONY, harmony), "two ends": (TWO_ENDS, two_ends), "no end": (NO_END, no_end),
    "last ends": (LAST_ENDS, last_ends), "stripped": (STRIPPED, stripped),
    "rewritten": (REWRITTEN, rewritten), "brackets": (BRACKETS, brackets),
    "tools": (TOOLS, tools), "each bos": (EACH_BOS, each_bos),
    "system last": (SYSTEM_LAST, system_last), "between": (BETWEEN, between),
}  # fmt: skip


def said(*contents, roles=("user", "assistant")):
    return [{"role": r, "content": c} for r, c in zip(itertools.cycle(roles), contents)]


THOUGHT = "<think>\nwell, 1 + 1\n</think>\n\nIt is 2."
CALL = [{"function": {"name": "add", "arguments": {"text": "é <b>"}}}]
TALKS = [
    said("hi", "hello you"),
    said("hi", "<b>hello</b>.", "more?", "yes"),
    said("hi", "hello.", "more?", "  no ", "so?"),
    said("be kind", "hi", "hello.", "more?", "yes", roles=("system", *["user", "assistant"] * 2)),
    said("hi", THOUGHT, "more?", THOUGHT, "and?", "assistant: no"),
    said("welcome", "hi", "hello.", roles=("assistant", "user")),
    said("be kind", "welcome", "hi", "hello", roles=("system", "assistant", "user", "assistant")),
    said("hi", "hello", "and more", roles=("user", "assistant", "assistant")),
    [*said("hi"), {"role": "assistant", "content": "2", "thinking": "1 + 1"}],
]


ASKED = [*said("add"), {"role": "assistant", "content": "", "tool_calls": CALL}]
WITH_TOOLS = [*ASKED, {"role": "tool", "content": "3"}, *said("It is 3.", roles=("assistant",))]


@pytest.mark.parametrize("form", FORMS)
def test_masks_are_what_a_template_puts_behind_its_prompt(form):
    template, pieces = FORMS[form]
    tok = tokenizer(template)
    for talk in [*TALKS, WITH_TOOLS] if form == "tools" else TALKS:
        ids, mask = tok.chat(talk)
        assert (ids, mask) == naive(tok, pieces(talk)), talk
        if [m["role"] for m in talk[-2:]] == ["user", "assistant"]:  # what preferences are about
            *_, begin = [0] + [i for i, m in enumerate(mask) if m and not mask[i - 1]]
            assert tok.chat(talk, answers="last") == (ids, [0] * begin + mask[begin:])
        assert tok.chat(talk, answers="none") == (ids, [0] * len(ids))


@pytest.mark.parametrize("last_end", ["[end]", "[return]"])
def test_the_worked_example_of_turn_finder(last_end):
    def render(messages, add_generation_prompt=False):
        names = {"user": "[user]", "assistant": "[bot]"}
        turns = [names[m["role"]] + m["content"] + "[end]" for m in messages]
        if add_generation_prompt:
            turns.append("[bot]")
        elif messages[-1]["role"] == "assistant":
            turns[-1] = turns[-1].replace("[end]", last_end)
        return "".join(turns)

    talk = said("2?", "4", "ok", "5", roles=("user", "assistant", "user", "assistant"))
    text = render(talk)
    marks = re.compile(r"\[\w+\]")
    turns = TurnFinder(render, marks, re.compile(r"\[return\]"), ["X", "Y"], talk, text)
    spans = [turns.span(i) for i in (1, 3)]
    assert [text[begin:end] for begin, end in spans] == ["4[end]", f"5{last_end}"]


def test_a_comment_marks_nothing():
    comment = "{#- Without\n{% generation %} and\n{% endgeneration %} -#}"
    for talk in TALKS[:3]:
        assert tokenizer(comment + HARMONY).chat(talk) == tokenizer(HARMONY).chat(talk)


def test_what_cannot_be_told_is_refused_with_its_reason():
    backwards = "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}{% endfor %}"
    other = "{% for m in messages %}<|start|>{{ m.role }}{{ m.content }}<|end|>{% endfor %}"
    other += "{% if add_generation_prompt %}<User>{% endif %}"
    for template in (backwards, other):
        with pytest.raises(UserError, match="no loss mask fits it .{% generation %}"):
            tokenizer(template).chat(TALKS[1])
        assert tokenizer(template).chat(TALKS[1], answers="none")[0]


def test_names_of_special_tokens_in_a_conversation_are_text():
    tok = tokenizer(TOOLS)
    call = {"function": {"name": "<|end|>", "arguments": {"a": ["<|call|>"]}}}
    talk = [*said("add"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids, mask = tok.chat(talk)
    real = [tok.decode([i]) for i in ids if i in tok.special.values()]
    assert real == ["<|start|>", "<|message|>", "<|end|>", "<|start|>", "<|message|>", "<|call|>"]
    text = tok.decode([i for i, m in zip(ids, mask) if m])
    assert text == ' to=<|end|><|message|>{"a": ["<|call|>"]}<|call|>'


def test_two_texts_beside_each_other_make_no_special_token():
    tok = tokenizer(
        "{% for m in messages %}<|start|>{{ m.role }}{{ m.content }}{{ m.name }}<|end|>{% endfor %}"
    )
    for content, name in (("<|en", "d|>"), ("<", "EOS>"), ("a <|end|", ">"), ("<<|end|", ">")):
        ids, _ = tok.chat([{"role": "user", "content": content, "name": name}])
        assert ids == naive(tok, [("<|start|>", 0)])[0] + [
            *tok.encode(f"user{content}"), *tok.encode(name), tok.special["<|end|>"]
        ]  # fmt: skip


@pytest.mark.parametrize(
    "form, end", [("harmony", "<|return|>"), ("two ends", "<|end|>"), ("no end", None),
                  ("last ends", "<|end|>"), ("stripped", "<EOS>"), ("rewritten", "<|end|>")]
)  # fmt: skip
def test_generation_can_stop_at_the_first_end_marker(form, end):
    tok = tokenizer(FORMS[form][0])
    assert tok.end_of_turn() == ([tok.special[end]] if end else [])


MARKED = """{% for m in messages %}<|start|>{{ m.role }}
{% if m.role == 'assistant' %}{% if m.thinking %}{% generation %}({{ m.thinking }})
{%- endgeneration %} so {%- endif %} {%- generation -%} {% set a = m.content | trim %}{{ a }}<|end|>
{%- endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
STRADDLING = """{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}
{{- m.content }} {% endgeneration %}{% else %}Q: {{ m.content }} {% endif %}{% endfor %}"""


@pytest.mark.parametrize("template", [MARKED, STRADDLING])
def test_what_generation_marks_is_the_mask_of_transformers(template, tmp_path):
    transformers = pytest.importorskip("transformers")
    for family in ("smollm2", "llama2", "qwen3"):
        tok = open_tokenizer(family)
        tok = Tokenizer(tok.spec, tok.config | {"chat_template": template})
        for name, value in (("tokenizer.json", tok.spec), ("tokenizer_config.json", tok.config)):
            write_json(tmp_path / name, value)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for talk in TALKS:
            out = theirs.apply_chat_template(
                talk, return_assistant_tokens_mask=True, return_dict=True
            )
            ids, mask = tok.chat(talk)
            assert ids == out["input_ids"] and mask == list(out["assistant_masks"]), family
            ids, mask = tok.chat(talk, answers="last")
            begin = len(ids) - mask[::-1].index(1) - 1 if 1 in mask else 0
            assert not any(m and i < begin - 40 for i, m in enumerate(mask))


def test_masks_of_the_public_training_templates_are_transformers():
    """TRL's templates where it is installed: none is part of this repository."""
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    paths = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))
    if not paths:
        pytest.skip("this version of trl has no training templates")
    fast = tokenizers.Tokenizer.from_str(json.dumps(tokenizer("").spec))
    equal = 0
    for path in paths:
        tok = tokenizer(path.read_text(encoding="utf-8"))
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token="<BOS>", eos_token="<EOS>",
            chat_template=tok.config["chat_template"],
        )  # fmt: skip
        for talk in (TALKS[4], WITH_TOOLS):
            parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in talk]
            for form in (talk, parts):
                try:
                    out = theirs.apply_chat_template(
                        form, return_assistant_tokens_mask=True, return_dict=True
                    )
                except Exception:  # the template's own refusal
                    continue
                ids, mask = tok.chat(form)
                assert (ids, mask) == (out["input_ids"], list(out["assistant_masks"])), path.name
                equal += any(mask)
    assert equal > len(paths)


# --------------------------------------------------------------------------------------------------
# Templates are programs of strangers


BOMBS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "seconds",
    "{{ 10 ** (10 ** 10) }}": "seconds",
    "{{ 'a' * 10 ** 10 }}": "memory",
    "{{ '%10000000000d' % 1 }}": "memory",
    "{{ 'x' | center(10 ** 10) }}": "memory",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}": "memory|seconds",
    "{% set ns = namespace(s='ab') %}{% for i in range(22) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}{{ ns.s }}": "more than 1,0",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% for i in range(1000000) %}{% endfor %}": "OverflowError",
    "{{ 'a'.encode('nope') }}": "LookupError",
    "{{ messages[0].content[9] + 1 }}": "refuses",
    "{{ raise_exception('two\nlines') }}": "two lines",
    "{% for m in %}": "TemplateSyntaxError",
    "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}": "RecursionError",
    "{% generation %}": "TemplateSyntaxError",
    "{% include 'a' %}": "refuses",
}


def test_templates_that_run_wild_are_a_line(monkeypatch):
    monkeypatch.setattr("barelm.chat.TEMPLATE_SECONDS", 0.3)
    for template, words in BOMBS.items():
        with pytest.raises(UserError, match=words) as refused:
            tokenizer(template).chat(TALKS[0])
        assert "\n" not in str(refused.value), template
    assert tokenizer(TOOLS).chat(TALKS[0])[0]  # and what follows is rendered


def test_a_conversation_that_runs_wild_spoils_no_other():
    doubling = "{% set ns = namespace(s='ab') %}{% for c in messages[0].content %}"
    doubling += "{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
    tok = tokenizer(doubling)

    def refused(contents, words):
        with pytest.raises(UserError, match=words):
            tok.chat(said(contents), answers="none")

    for _ in range(3):
        refused("x" * 21, "characters")
        refused("x" * 21, "characters")
        assert tok.decode(tok.chat(said("xx"), answers="none")[0]) == "abababab"
    for _ in range(3):
        refused("x" * 21, "characters")
    refused("xx", "three times")  # a data set of such rows ends


def test_the_template_process_is_replaced_and_belongs_to_one_process():
    tok = tokenizer(TOOLS)
    ids, _ = tok.chat(TALKS[0])
    renderer = renderer_of(os.getpid())
    renderer.process.kill()
    renderer.process.wait()
    assert tok.chat(TALKS[0])[0] == ids
    parent = renderer.process.pid
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        is_same = tok.chat(TALKS[0])[0] == ids
        is_another = renderer_of(os.getpid()).process.pid != parent
        os.write(write, b"1" if is_same and is_another else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"1"
    assert renderer.process.pid == parent
    assert tok.chat(TALKS[0])[0] == ids


def test_a_template_that_is_no_text_is_a_line(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((FIXTURES / "tokenizers/smollm2" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff\xfe' }}")
    with pytest.raises(UserError, match="chat_template.jinja: not UTF-8"):
        Tokenizer.from_folder(tmp_path)
    for template in (5, {"a": "b"}, [1], [{"name": "default", "template": 3}], [["default"]]):
        with pytest.raises(UserError, match="chat.template"):
            tokenizer(template).chat(TALKS[0])


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_goes_on_behind_its_words(form):
    template, pieces = FORMS[form]
    tok = tokenizer(template)
    for talk in TALKS:
        talk = [*talk[:-1], {"role": "assistant", "content": talk[-1]["content"] + " é <|end|>b"}]
        text = tok.decode(tok.chat_to_continue(talk))
        assert text.endswith(talk[-1]["content"])
        # The whole turn begins with the same text: only what ends it is left out.
        assert tok.decode(tok.chat(talk, answers="none")[0]).startswith(text)
        assert tok.chat_to_continue(talk)[-1] not in tok.special.values()


def test_what_writes_an_answer_twice_cannot_be_continued():
    twice = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="cannot be continued"):
        tokenizer(twice).chat_to_continue(said("a"))


@pytest.mark.parametrize("family", ["smollm2", "qwen3"])
def test_what_an_answer_goes_on_behind_is_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = open_tokenizer(family)
    for name, value in (("tokenizer.json", tok.spec), ("tokenizer_config.json", tok.config)):
        write_json(tmp_path / name, value)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for talk in (said("hi", "It is"), said("hi", "It is 2.", "and 3?", "That is é")):
        expected = theirs.apply_chat_template(talk, tokenize=False, continue_final_message=True)
        assert tok.decode(tok.chat_to_continue(talk)) == expected


BRINGS = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}
{%- else %}{% set s = 'Be kind.' %}{% endif %}<|start|>Date: today. {{ s }}<|end|>
{%- for m in messages %}{% if m.role != 'system' %}<|start|>{{ m.role }}: {{ m.content }}<|end|>
{%- endif %}{% endfor %}"""
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}"
NO_SYSTEM += "{% endif %}<|start|>{{ m.content }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    "template, opening, system",
    [
        (BRINGS, "<BOS><|start|>Date: today. Be kind.<|end|><|start|>user: ", "Be kind."),
        (HARMONY, "<|start|>user<|message|>", ""),
        (SYSTEM_LAST, "<BOS>\n\n[", ""),
        (NO_SYSTEM, "<|start|>", ""),
    ],
)
def test_what_a_template_brings_before_the_first_words(template, opening, system):
    told, brought = opening_of(tokenizer(template))
    assert ("".join(told.split()), brought) == ("".join(opening.split()), system)


def test_who_was_trained_to_converse(tmp_path):
    tok = tokenizer(TWO_ENDS)
    tok.eos_ids = [tok.special["<EOS>"]]
    assert not describe_chat(tok, tmp_path).tuned  # a base model with a template
    tok.eos_ids.append(tok.special["<|end|>"])  # as generation_config.json of a tuned one has it
    assert describe_chat(tok, tmp_path).tuned
    write_json(tmp_path / "run.json", {"config": {"method": "sft", "init_from": "base"}})
    assert describe_chat(tok, tmp_path).tuned
    first, later = {"config": {"init_from": "scratch"}}, {"init_from": "resume"}
    write_json(tmp_path / "run.json", {"config": later, "parts": [first, {"config": later}]})
    said_so = describe_chat(tok, tmp_path)
    assert not said_so.tuned and "train.py" in said_so.why
    (tmp_path / "run.json").write_text("[1]")  # somebody else's
    assert describe_chat(tok, tmp_path).tuned
    tok.config.pop("chat_template")
    told = describe_chat(tok, tmp_path)
    assert not told.possible and "no chat template" in told.why
