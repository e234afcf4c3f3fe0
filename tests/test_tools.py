"""Calls of tools and thoughts: found wherever the text is cut, templates as transformers fills
them, grammars that allow what the form writes, and the server's answers to OpenAI's client."""

import itertools
import json
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from test_chat import tokenizer
from test_serve import CHAT, served

from barelm.answers import ChatAnswer
from barelm.api import ServedModel, read_chat, read_conversation
from barelm.chat import message_forms
from barelm.checkpoint import save
from barelm.clean import Reject
from barelm.grammar import compile_grammar, json_rule
from barelm.guided import FORMS as FORM_FIELDS
from barelm.jobs import Job, Token
from barelm.messages import FieldError, read_message
from barelm.reasoning import KINDS, ThoughtSplitter, thoughts_of
from barelm.run import UserError
from barelm.tasksets import as_sft
from barelm.tokenizer import Tokenizer
from barelm.tool_calls import CallParser
from barelm.tool_forms import FORMS, call_grammar, described, form_named, form_of
from barelm.tool_use import for_training, plan_chat, read_choice, read_text_rule, read_tools
from model import GPT, GPTConfig

NESTED = '{"city": "Paris </tool_call> \\" }", "n": [1, {"a": null}]}'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "é", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
TALK = [
    {"role": "system", "content": "Be good."},
    {"role": "user", "content": "In Paris? <|end|>"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_0123456789",
                "type": "function",
                "function": {
                    "name": "weather",
                    "arguments": '{"city": "Paris <|end|>", "days": 2}',
                },
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_0123456789", "name": "weather", "content": "rain"},
]


def joined(pieces):
    """(text, [(name, arguments)]) of what a parser gave out."""
    text = ""
    calls = []
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if piece.name is not None:
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        calls[piece.index][1] += piece.arguments
    return text, [tuple(call) for call in calls]


def parsed(form, parts, certain=False, most=None):
    parser = CallParser(form, {"f": {}, "g_2": {}}, certain, most)
    pieces = []
    for part in parts:
        pieces += parser.feed(part)
    return joined(pieces + parser.feed("", final=True))


def cuts(text):
    """The text whole, cut at each place, and letter by letter."""
    yield [text]
    for place in range(len(text) + 1):
        yield [text[:place], text[place:]]
    yield list(text)


TWO = [("f", NESTED), ("g_2", "{}")]


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
@pytest.mark.parametrize("certain", [False, True])
def test_calls_are_found_wherever_the_text_is_cut(form, certain):
    good = form.calls(TWO)
    broken = form.calls([("f", '{"city": x}')])
    unknown = form.calls([("nobody", "{}")])
    cases = [
        (good, "", TWO),
        (f"{good}\nbye", "bye", TWO),
        ('it is {"a": 1}  \n', 'it is {"a": 1}  \n', []),
        (unknown, unknown, []),
        ("", "", []),
        (" ", " ", []),
    ]
    if form.marker:
        cases.append((f"so:\n\n{good}", "so:", TWO))
        cases.append((f"{form.marker} 3", f"{form.marker} 3", []))
    if not certain:
        cases.append((broken, broken, []))
        begun = form.calls(TWO[:1]).partition("null")[0]
        cases.append((begun, begun, []))
    for text, expected, calls in cases:
        for parts in cuts(text):
            assert parsed(form, parts, certain) == (expected, calls), parts


def test_json_may_be_in_any_order_and_spacing():
    hermes, llama, mistral = (form_named(name) for name in ("hermes", "llama3", "mistral"))
    args = '{"a": 1}'
    loose = '<tool_call>{ "arguments" :{"a":1},\n"name":"f" } </tool_call>'
    listed = '[TOOL_CALLS][{"name":"f","arguments":{"a":1},"id":"abc"}, {"name":"g_2"}]'
    double = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}'
    cases = [
        (hermes, loose, "", [("f", args)]),
        (hermes, double, "", [("f", args)]),
        (hermes, f"<tool_call>{{b</tool_call> {loose}", "<tool_call>{b</tool_call>", [("f", args)]),
        (mistral, listed, "", [("f", args), ("g_2", "{}")]),
        (llama, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", args)]),
        (llama, '<|python_tag|>f.call(a=1)', "<|python_tag|>f.call(a=1)", []),
        (llama, 'So {"name": "f", "parameters": {}}', 'So {"name": "f", "parameters": {}}', []),
    ]  # fmt: skip
    for form, text, expected, calls in cases:
        for parts in cuts(text):
            assert parsed(form, parts) == (expected, calls), parts


def test_nothing_of_any_text_is_lost():
    """Of texts made of pieces of every form, whatever is no call is text."""
    rng = random.Random(1)
    for _ in range(300):
        form = rng.choice(FORMS)
        bits = [form.begin, form.middle, form.end, form.opening, form.closing, form.marker]
        bits += ["f", "{", "}", "[", '"', "\\", "x", '{"a": 1}', form.call("f", '{"a": 1}')]
        text = "".join(rng.choices(bits, k=9))
        whole = parsed(form, [text])
        assert parsed(form, list(text)) == whole
        said, calls = whole
        if not calls:
            assert said == text
        n_names = sum(text.count(f"{name}") for name in ("f", "g_2"))
        assert len(calls) <= n_names and all(json.loads(args) is not None for _, args in calls)


def test_one_call_where_more_are_not_wanted():
    hermes = form_named("hermes")
    second = hermes.call("g_2", "{}")
    assert parsed(hermes, [hermes.calls(TWO)], most=1) == (second, TWO[:1])


def test_thoughts_are_told_from_words_wherever_the_text_is_cut():
    cases = [
        ("<think>\nhm, a\n\n</think>\n\nfour ", False, "hm, a", "four "),
        ("hm</think>\n\nfour <think>", True, "hm", "four <think>"),
        ("four </think>", False, "", "four </think>"),
        ("<think>hm", False, "hm", ""),
        ("<think></think>\nfour", False, "", "four"),
        ("<thi", False, "", "<thi"),
        ("  ", False, "", "  "),
    ]
    for text, inside, thought, words in cases:
        for parts in cuts(text):
            splitter = ThoughtSplitter(KINDS[0], inside)
            pairs = [splitter.feed(part) for part in parts] + [splitter.feed("", final=True)]
            assert "".join(pair[0] for pair in pairs) == thought, parts
            assert "".join(pair[1] for pair in pairs) == words, parts


# --------------------------------------------------------------------------------------------------
# Templates


def public_templates():
    """{name: text} of TRL's copies of public templates: none is part of this repository."""
    trl = pytest.importorskip("trl")
    paths = (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def test_public_templates_are_filled_as_transformers_fills_them():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer.from_str(json.dumps(tokenizer("").spec))
    parsed_args = json.loads(TALK[2]["tool_calls"][0]["function"]["arguments"])
    function = {"name": "weather", "arguments": parsed_args}
    theirs_talk = [dict(message) for message in TALK]
    theirs_talk[2]["tool_calls"] = [TALK[2]["tool_calls"][0] | {"function": function}]
    seen = set()
    for name, text in public_templates().items():
        if name not in ("qwen2_5", "qwen3", "llama3_1", "llama3_2", "qwen3_6", "gemma4", "glm4moe"):
            continue
        tok = tokenizer(text)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token="<BOS>", eos_token="<EOS>", chat_template=text
        )
        how = dict(tools=TOOLS[:1], add_generation_prompt=True, tokenize=False)
        for talk, theirs_form in ((TALK, theirs_talk), (TALK[:2], TALK[:2])):
            for more in ({}, {"enable_thinking": False}):
                expected = theirs.apply_chat_template(theirs_form, **how, **more)
                ids, _ = tok.chat(talk, True, extra={"tools": TOOLS[:1]} | more)
                assert tok.decode(ids) == expected, name
                # What a user wrote stays text, in a call's arguments too.
                assert ids.count(tok.special["<|end|>"]) == 0
        seen.add(name)
    assert len(seen) >= 4 or pytest.skip("this version of trl has other templates")


def test_the_form_is_read_off_the_template():
    hermes = "{% if tools %}<tool_call>{% endif %}"
    llama = '{% if tools %}{"name": function name, "parameters": dictionary of}{% endif %}'
    cases = [
        ("{{ messages }}", "hermes"), (hermes, "hermes"), (llama, "llama3"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}[TOOL_CALLS]{{ x }}[ARGS]{% endif %}", "mistral_args"),
        ("{% if tools %}<|tool_call|>{% endif %}", "granite"),
        ("{% if tools %}<tool_call><function={{ x }}>{% endif %}", "qwen3_coder"),
        ("{% if tools %}<tool_call>{{ x }}<arg_key>{% endif %}", "glm"),
        ("{# tools [TOOL_CALLS] #}", "hermes"),
    ]  # fmt: skip
    for template, name in cases:
        assert form_of(template).name == name, template
    with pytest.raises(UserError, match="tools: the chat template has none of these forms"):
        form_of("{{ tools }}")
    with pytest.raises(UserError, match="its calls are Python"):
        form_of("{{ tools }}<|tool_call_start|>")
    with pytest.raises(UserError, match="--tool_form=x: expected one of"):
        form_named("x")


PUBLIC_FORMS = {
    "qwen2_5": "hermes", "qwen3": "hermes", "llama3_1": "llama3", "llama3_2": "llama3",
    "qwen3_6": "qwen3_coder", "nemotron_3_nano": "qwen3_coder", "glm4moe": "glm",
}  # fmt: skip


def test_what_public_templates_write_of_a_call_is_read():
    """A call as a template itself writes it in a conversation, found in that text."""
    templates = public_templates()
    arguments = json.loads(TALK[2]["tool_calls"][0]["function"]["arguments"])
    n_read = 0
    for name, form in PUBLIC_FORMS.items():
        if name not in templates:
            continue
        assert form_of(templates[name]).name == form
        tok = tokenizer(templates[name])
        extra = {"tools": TOOLS[:1]}
        asked, _ = tok.chat(TALK[:2], True, extra=extra | {"enable_thinking": False})
        called, _ = tok.chat(TALK[:3], answers="none", extra=extra)
        whole = tok.decode(called)
        text = whole[len(os.path.commonprefix([tok.decode(asked), whole])) :]
        for closed in ("<|im_end|>", "<|eot_id|>"):
            text = text.partition(closed)[0]
        parser = CallParser(form_named(form), {"weather": SCHEMA})
        said, calls = joined(parser.feed(text, final=True))
        assert [(n, json.loads(a)) for n, a in calls] == [("weather", arguments)], (name, text)
        n_read += 1
    assert n_read or pytest.skip("this version of trl has other templates")
    if "qwen3" in templates:
        assert thoughts_of(templates["qwen3"]).end == "</think>"


def test_values_between_tags_are_texts_or_json_by_their_schema():
    form = form_named("qwen3_coder")
    texts = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    properties = {"s": {"type": "string"}, "n": {"type": "integer"}, "t": texts, "o": {}}
    schema = {"type": "object", "properties": properties}
    for arguments in (
        {"s": "12", "n": 12, "t": "12", "o": [1, "a"]},
        {"s": "null\n\n</function>", "t": None, "o": "free text"},
        {"s": "", "n": -1.5, "o": {"a": {"b": True}}},
        {},
    ):
        text = form.call("f", json.dumps(arguments))
        for parts in cuts(text):
            parser = CallParser(form, {"f": schema})
            pieces = [piece for part in parts for piece in parser.feed(part)]
            said, calls = joined(pieces + parser.feed("", final=True))
            assert not said and [(n, json.loads(a)) for n, a in calls] == [("f", arguments)], parts
    [(_, shown)] = joined(
        CallParser(form, {"f": schema}).feed(form.call("f", "{}").replace(
            "</function>", "<parameter=n>\nTrue\n</parameter>\n</function>"), final=True)
    )[1]  # fmt: skip
    assert json.loads(shown) == {"n": True}
    for wrong, why in (
        ({"required": ["x"]}, "not among the properties"),
        ({"properties": {"s": {"type": "string", "pattern": "a+"}}}, "cannot be enforced"),
        ({"type": "array"}, "no object"),
    ):
        tools = [{"type": "function", "function": {"name": "f", "parameters": wrong}}]
        with pytest.raises(UserError, match=why):
            call_grammar(form, tools, {}, required=True)


def test_a_template_without_tools_is_told_of_them():
    talk = [read_message(message, "here") for message in TALK]
    plain = described(talk, TOOLS, form_named("hermes"))
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"].startswith("Be good.\n\n# Tools")
    assert json.dumps(TOOLS[0], ensure_ascii=False) in plain[0]["content"]
    assert parsed_call(plain[2]["content"]) == [("weather", '{"city": "Paris <|end|>", "days": 2}')]
    assert plain[3]["content"] == "<tool_response>\nrain\n</tool_response>"
    assert described(talk[1:2], [], form_named("hermes")) == talk[1:2]


def parsed_call(text):
    parser = CallParser(form_named("hermes"), {"weather": {}})
    return joined(parser.feed(text, final=True))[1]


def request_of(**fields):
    """A chat's fields with their defaults."""
    usual = dict(tools=[], tool_choice=None, parallel_tool_calls=True, chat_template_kwargs={})
    usual |= dict(reasoning_effort=None, include_reasoning=True, reasoning_format=None)
    return SimpleNamespace(**usual | fields)


def test_the_template_for_tools_and_its_variables():
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with_tools = "{{ tools[0].function.name }}<tool_call>{{ shout }}"
    named = [{"name": "default", "template": plain}, {"name": "tool_use", "template": with_tools}]
    tok = tokenizer(named)
    plan = plan_chat(tok, request_of(tools=TOOLS, chat_template_kwargs={"shout": "!"}))
    ids, _ = tok.chat([{"role": "user", "content": "a"}], True, extra=plan.extra())
    assert tok.decode(ids) == "weather<tool_call>!"
    ids, _ = tok.chat([{"role": "user", "content": "a"}], True)
    assert tok.decode(ids) == "a"
    for field, value in (
        ("chat_template_kwargs", {"messages": []}), ("chat_template_kwargs", {"other": 1}),
        ("reasoning_effort", "high"), ("reasoning_format", "x"),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=field):
            plan_chat(tok, request_of(**{field: value}))
    thinks = tokenizer("{{ messages }}{{ enable_thinking }}</think>")
    assert plan_chat(thinks, request_of(reasoning_effort="none")).variables == {
        "enable_thinking": False
    }


def test_short_ids_where_a_template_wants_them():
    tok = tokenizer("{% if tools %}[TOOL_CALLS]{% endif %}")
    plan = plan_chat(tok, request_of(tools=TOOLS))
    talk = plan.messages([read_message(message, "here") for message in TALK])
    assert talk[2]["tool_calls"][0]["id"] == talk[3]["tool_call_id"] == "123456789"


# --------------------------------------------------------------------------------------------------
# What a request may say

WRONG_TOOLS = [
    [1], [{}], [{"type": "web_search"}], [{"type": "function", "function": {}}],
    [{"function": {"name": "a b"}}], [{"function": {"name": ""}}], [{"function": {"name": 3}}],
    [{"function": {"name": "a", "parameters": []}}], [{"function": {"name": "a"}}] * 2,
    [{"function": {"name": "a", "description": 3}}],
    [{"function": {"name": f"a{i}"}} for i in range(129)],
]  # fmt: skip
WRONG_CHOICES = [
    "any",
    3,
    {},
    {"type": "function"},
    {"type": "function", "function": {"name": "x"}},
]
WRONG_CHOICES += [{"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}]}}, []]
WRONG_CHOICES += [{"type": "allowed_tools", "allowed_tools": 3}, False]
WRONG_CALLS = [3, [1], [{}], [{"function": {"name": "a"}}], [{"type": "x", "function": {}}]]
WRONG_CALLS += [[{"id": 3, "function": {"name": "a", "arguments": "{}"}}]]


def test_what_is_wrong_with_tools_is_told():
    for tools in WRONG_TOOLS:
        with pytest.raises(FieldError, match="^tools"):
            read_tools(tools)
    for choice in WRONG_CHOICES:
        with pytest.raises(FieldError, match="^tool_choice"):
            read_choice(choice, TOOLS)
    for choice in ("required", {"type": "function", "function": {"name": "x"}}):
        with pytest.raises(FieldError, match="no tools"):
            read_choice(choice, [])
    for calls in WRONG_CALLS:
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        with pytest.raises(FieldError, match=r"^messages\[0\]: tool_calls"):
            read_message(message, "messages[0]")
    assert read_choice(None, TOOLS) == (TOOLS, False) and read_choice("none", TOOLS) == ([], False)
    now = {"type": "function", "function": {"name": "now"}}
    assert read_choice(now, TOOLS) == (TOOLS[1:], True)
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [now]}}
    assert read_choice(allowed, TOOLS) == (TOOLS[1:], True)


# --------------------------------------------------------------------------------------------------
# Grammars


def allowed(grammar, tok, text):
    """How many of the text's bytes, each a token, the grammar allows, and whether it may end
    there."""
    guide = grammar.begin()
    ids = tok.encode(text)
    assert len(ids) == len(text.encode())
    for count, token in enumerate(ids):
        if guide.done or not guide.mask[token // 8] >> token % 8 & 1:
            return count, False
        guide.take(token)
    return len(ids), guide.may_end or guide.done


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_a_grammar_allows_what_its_form_writes(form):
    pytest.importorskip("llguidance")
    tok = tokenizer("")  # its tokens are bytes
    good = form.calls([("weather", '{"city": "Paris", "days": 2}'), ("now", "{}")])
    wrong = form.calls([("weather", '{"city": "Paris", "days": "x"}')])
    compiled = lambda **how: compile_grammar(tok, "lark", call_grammar(form, TOOLS, {}, **how))
    required = compiled(required=True)
    either = compiled(required=False)
    n = len(good.encode())
    for grammar in (required, either):
        assert allowed(grammar, tok, good) == (n, True)
        n_right = len(os.path.commonprefix([good, wrong]).encode())
        assert allowed(grammar, tok, wrong) == (n_right, False)
    assert allowed(either, tok, "It rains.") == (9, True)
    assert allowed(required, tok, "It rains.")[0] == 0
    assert allowed(compiled(required=True, parallel=False), tok, good)[0] < n
    json_or_call = compiled(required=False, text_rule=json_rule({"type": "boolean"}))
    assert allowed(json_or_call, tok, "true") == (4, True)
    assert allowed(json_or_call, tok, good) == (n, True)
    thinks = compiled(required=True, thought=("<think>", "</think>"))
    assert allowed(thinks, tok, f"<think>hm</think>\n\n{good}")[1]
    assert allowed(thinks, tok, good)[1]
    inside = compiled(required=True, thought=("", "</think>"))
    assert allowed(inside, tok, f"hm <tool_call></think>{good}")[1]
    assert not allowed(inside, tok, good)[1]
    either = compiled(required=False, thought=("<think>", "</think>"))
    for text in (good, "It rains.", f"<think>{form.marker}</think>\n{good}", "<think>hm</think>a"):
        assert allowed(either, tok, text) == (len(text.encode()), True)
    assert not allowed(either, tok, f"<think>hm</think>\n{wrong}")[1]


def test_a_form_is_of_the_words_behind_a_thought():
    pytest.importorskip("llguidance")
    tok = tokenizer("{{ messages }}<think></think>")
    fields = dict.fromkeys([*FORM_FIELDS, "structured_outputs", "response_format"])
    request = request_of(**fields | {"guided_choice": ["yes", "no"]})
    for inside, good, bad in ((False, "yes", "a"), (True, "hm</think>\n\nno", "yes")):
        plan = plan_chat(tok, request)
        plan.inside = inside
        grammar = plan.compile(tok, read_text_rule(tok, request, False))
        assert allowed(grammar, tok, good)[1] and not allowed(grammar, tok, bad)[1]
        assert allowed(grammar, tok, f"{'' if inside else '<think>'}a</think>yes")[1]
    request.guided_regex, request.guided_choice = "a+", None
    assert read_text_rule(tok, request, False) is None
    with pytest.raises(FieldError, match="guided_regex: beside tools"):
        read_text_rule(tok, request, True)


def test_special_tokens_in_a_form_are_tokens_in_its_grammar():
    pytest.importorskip("llguidance")
    form = form_named("mistral")
    tok = tokenizer("{% if tools %}[TOOL_CALLS]{% endif %}")
    spec = json.loads(json.dumps(tok.spec).replace("<|call|>", "[TOOL_CALLS]"))
    tok = Tokenizer(spec, tok.config)
    mark = tok.special["[TOOL_CALLS]"]
    for required in (True, False):
        choice = "required" if required else "auto"
        plan = plan_chat(tok, request_of(tools=TOOLS, tool_choice=choice))
        assert plan.marks() == {mark}
        guide = plan.compile(tok, None).begin()
        written = form.calls([("now", "{}")]).removeprefix("[TOOL_CALLS]")
        for token in [mark, *tok.encode(written)]:
            assert guide.mask[token // 8] >> token % 8 & 1
            guide.take(token)
        assert guide.may_end or guide.done


def test_without_the_library_calls_may_be_made_but_none_is_sure(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tok = tokenizer("{{ messages }}")
    assert plan_chat(tok, request_of(tools=TOOLS)).compile(tok, None) is None
    with pytest.raises(FieldError, match="pip install -r requirements-serve.txt"):
        plan_chat(tok, request_of(tools=TOOLS, tool_choice="required")).compile(tok, None)


# --------------------------------------------------------------------------------------------------
# The server

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.days }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | length }}<tool_call>{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}{# </think> #}"
)
BOUNDED = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 22, 333]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "In Paris?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": BOUNDED}}
TWO_TOOLS = [WEATHER, {"type": "function", "function": {"name": "now", "parameters": BOUNDED}}]


@pytest.fixture(scope="module")
def talker(tiny):
    """A random network of tiny's tokenizer, with a template that takes tools and has thoughts."""
    old = Tokenizer.from_folder(tiny / "out" / "tiny")
    tok = Tokenizer(old.spec, old.config | {"chat_template": TEMPLATE})
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=512, n_ctx=512, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    save(tiny / "out" / "talker", GPT(config), tok, 0)
    with served(tiny, "--model=out/talker", "--max_batch=4", name="talker") as site:
        yield site


def calls_of(message):
    """[(name, arguments as an object)] of a message's calls, each of which has an id."""
    calls = message["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["id"].startswith("call_") for call in calls)
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


def test_a_call_that_is_required_is_valid_and_streams_as_it_is_whole(talker):
    pytest.importorskip("llguidance")
    for seed in range(1, 4):
        body = dict(messages=ASK, tools=TWO_TOOLS, tool_choice="required", n=2, seed=seed)
        body |= dict(parallel_tool_calls=bool(seed % 2), logprobs=seed > 1, reasoning_format="none")
        answer = talker.post(CHAT, body)
        assert answer.status_code == 200, answer.text
        for choice in answer.json()["choices"]:
            message = choice["message"]
            for name, arguments in calls_of(message):
                assert name in ("weather", "now")
                assert arguments["city"] in ("Paris", "Rome")
                assert arguments["days"] in (1, 22, 333) and len(arguments) == 2
            assert message["content"] is None
            if not seed % 2:
                assert len(message["tool_calls"]) == 1
                assert choice["finish_reason"] == "tool_calls"
            chunks = talker.stream(CHAT, **body)
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            told = ["", []]
            for delta in (part["delta"] for part in own):
                told[0] += delta.get("content") or ""
                for call in delta.get("tool_calls", []):
                    if call["index"] == len(told[1]):
                        told[1].append((call["function"]["name"], []))
                    told[1][call["index"]][1].append(call["function"]["arguments"])
            streamed = [(name, "".join(pieces)) for name, pieces in told[1]]
            whole = [call["function"] for call in message["tool_calls"]]
            assert streamed == [(c["name"], c["arguments"]) for c in whole] and not told[0]
            assert own[-1]["finish_reason"] == choice["finish_reason"]
            assert len(told[1][0][1]) > 2  # the arguments come as they are written
            n_tokens = sum(len((part["logprobs"] or {}).get("content", [])) for part in own)
            expected = len((choice["logprobs"] or {}).get("content", []))
            assert n_tokens == expected and bool(expected) == (seed > 1)


def test_a_text_with_a_form_or_a_call(talker):
    pytest.importorskip("llguidance")
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes"]}}}
    kinds = set()
    for seed in range(8):
        body = dict(messages=ASK, tools=TWO_TOOLS, seed=seed, parallel_tool_calls=False)
        body |= {"reasoning_format": "none"}
        answer = talker.post(CHAT, body | {"response_format": schema})
        assert answer.status_code == 200, answer.text
        message = answer.json()["choices"][0]["message"]
        kinds.add("tool_calls" in message)
        if "tool_calls" in message:
            assert calls_of(message)
        else:
            assert message["content"] == '"yes"'
    assert kinds == {True, False}


def test_any_json_and_an_object_are_two_things_beside_tools():
    pytest.importorskip("llguidance")
    tok = tokenizer(None)
    names = [*FORM_FIELDS, "structured_outputs", "response_format"]
    wrapped = {"type": "json_schema", "json_schema": {"schema": {}}}
    for field, value, rule in (
        ("structured_outputs", {"json_object": True}, {"type": "object"}),
        ("response_format", {"type": "json_object"}, {"type": "object"}),
        ("response_format", wrapped, {}),
    ):
        request = SimpleNamespace(**(dict.fromkeys(names) | {field: value}))
        assert read_text_rule(tok, request, True) == json_rule(rule)


def test_thoughts_are_apart_from_the_answer(talker):
    pytest.importorskip("llguidance")
    body = dict(messages=ASK, guided_regex="<think>\n[a-z]{3}\n</think>\n\n[0-9]{2}", seed=1)
    inside = body | dict(
        guided_regex="[a-z]{3}\n</think>\n\n[0-9]{2}",
        chat_template_kwargs={"enable_thinking": True},
    )
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    begun = [*ASK, {"role": "assistant", "content": "<think>\nso"}]
    going_on = inside | goes_on | {"messages": begun, "chat_template_kwargs": {}}
    for asked in (body, inside, going_on):
        message = talker.post(CHAT, asked).json()["choices"][0]["message"]
        assert re.fullmatch("[a-z]{3}", message["reasoning_content"])
        assert re.fullmatch("[0-9]{2}", message["content"])
        deltas = [chunk["choices"][0]["delta"] for chunk in talker.stream(CHAT, **asked)]
        for key in ("content", "reasoning_content"):
            assert "".join(delta.get(key) or "" for delta in deltas) == message[key]
        hidden = talker.post(CHAT, asked | {"include_reasoning": False}).json()
        assert hidden["choices"][0]["message"] == {
            "role": "assistant", "content": message["content"]
        }  # fmt: skip
        plain = talker.post(CHAT, asked | {"reasoning_format": "none"}).json()["choices"][0]
        assert plain["message"]["content"].endswith(f"</think>\n\n{message['content']}")


def test_what_templates_get_and_what_is_refused(talker):
    tokens = lambda **body: talker.post("/tokenize", {"messages": ASK} | body).json()
    assert tokens(tools=TWO_TOOLS)["count"] > tokens()["count"]
    assert tokens(tools=TWO_TOOLS, tool_choice="none") == tokens(tools=[]) == tokens()
    deep = json.loads('{"a":' * 400 + "1" + "}" * 400)
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nope"}}}
    for body, why in (
        ({"functions": [{"name": "f"}]}, "OpenAI's older form; tools is the newer one"),
        ({"tools": [{}]}, "tools[0]: expected"),
        ({"tool_choice": "required"}, "tool_choice: there are no tools"),
        ({"chat_template_kwargs": {"x": 1}}, "template takes no x"),
        ({"tools": [WEATHER], "guided_regex": "a"}, "guided_regex: beside tools"),
        ({"tools": [WEATHER | {"x": deep}]}, "tools: more than 100 objects"),
        ({"chat_template_kwargs": {"enable_thinking": deep}}, "chat_template_kwargs: more than"),
        ({"tools": [WEATHER], "response_format": wrong}, "response_format: "),
        ({"messages": [*ASK, {"role": "tool", "content": 3}]}, "messages[1]: expected"),
    ):
        answer = talker.post(CHAT, {"messages": ASK} | body)
        assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text
    nothing = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}
    refused = talker.post(CHAT, {"messages": ASK, "tools": TWO_TOOLS, "tool_choice": nothing})
    assert refused.status_code == 400 and "tool_choice: allowed_tools" in refused.text
    loose = [{"type": "function", "function": {"name": "f", "parameters": {"x-guidance": {}}}}]
    how = {"messages": ASK, "tools": loose, "max_tokens": 4}
    assert talker.post(CHAT, how).status_code == 200  # not to be enforced, so it is not
    refused = talker.post(CHAT, how | {"tool_choice": "required"})
    assert refused.status_code == 400 and "tools: f: x-guidance" in refused.text


def test_openais_client_calls_tools(talker):
    pytest.importorskip("llguidance")
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")

    class Weather(pydantic.BaseModel):
        city: Literal["Paris", "Rome"]
        days: Literal[1, 22, 333]

    client = openai.OpenAI(base_url=f"{talker.url}/v1", api_key="none", max_retries=0)
    how = dict(model="talker", messages=ASK, tools=[openai.pydantic_function_tool(Weather)])
    how |= dict(tool_choice="required", parallel_tool_calls=False, seed=3)
    choice = client.chat.completions.parse(**how).choices[0]
    [call] = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert choice.finish_reason == "tool_calls"
    with client.chat.completions.stream(**how) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments
    gave = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    talk = [*ASK, choice.message, gave]
    answer = client.chat.completions.create(model="talker", messages=talk, max_tokens=3)
    assert answer.choices[0].message.tool_calls is None
    count = talker.post("/tokenize", {"messages": [ASK[0], choice.message.to_dict(), gave]})
    assert count.json()["count"] == answer.usage.prompt_tokens


def test_an_answer_with_text_and_calls_is_the_same_in_pieces(tiny):
    """A job's tokens given out one at a time, and the whole."""
    tok = Tokenizer.from_folder(tiny / "out" / "tiny")
    model = ServedModel("a", tok, 512, 9)
    request = read_chat(model, {"messages": ASK, "tools": TWO_TOOLS, "logprobs": True})
    ids = read_conversation(model, request)
    hermes = form_named("hermes")
    broken = hermes.call("now", "{}").replace("}", "", 1)
    text = f"So, é:\n\n{hermes.call('weather', '{}')} and {broken}{hermes.call('now', '{}')}"
    given = tok.encode(text)
    for size in (1, 3, 1000):
        job = Job(tok, ids, 1000, request, print, ends=tok.eos_ids, n_alternatives=0)
        answer = ChatAnswer(model, [job], request.plan)
        choices = []
        for begin in range(0, len(given), size):
            for token in given[begin : begin + size]:
                job.tokens.append(Token(token, -1.0, {}))
                job.row.take(token, -1.0)
            choices += answer.new_choices(job.news())
        job.row.take(tok.eos_ids[0], -1.0)
        choices += answer.new_choices(job.news())
        assert job.row.done
        said = "".join(choice["delta"].get("content") or "" for choice in choices)
        assert said == f"So, é: and {broken}".replace("é: and", "é:\nand")
        assert sum(len((c["logprobs"] or {}).get("content", [])) for c in choices) == len(given)
        names = [
            call["function"]["name"]
            for choice in choices
            for call in choice["delta"].get("tool_calls", [])
            if "id" in call
        ]
        assert names == ["weather", "now"] and choices[-1]["finish_reason"] == "tool_calls"
        whole = ChatAnswer(model, [job], request.plan).whole_choice(job, job.row.out.text, [])
        assert whole["message"]["content"] == said and len(calls_of(whole["message"])) == 2


# --------------------------------------------------------------------------------------------------
# Training


def test_calls_are_learned_and_what_tools_answer_is_not():
    """Masks of public templates, against transformers' own of the same templates with marks."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer.from_str(json.dumps(tokenizer("").spec))
    templates = public_templates()
    talk = [read_message(message, "here") for message in TALK]
    talk.append({"role": "assistant", "content": "It rains."})
    n_compared = 0
    for name in ("qwen2_5", "qwen3", "llama3_1", "llama3_2"):
        if name not in templates:
            continue
        tok = tokenizer(templates[name])
        messages, variables = for_training(tok, {"messages": talk, "tools": TOOLS[:1]})
        ids, mask = tok.chat(messages, extra=variables)
        said = runs_of(tok, ids, mask)
        assert len(said) == 2 and "weather" in said[0] and "days" in said[0]
        assert "It rains." in said[1] and "tool_response" not in "".join(said)
        marked = templates.get(f"{name}_training")
        if marked is None:
            continue
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token="<BOS>", eos_token="<EOS>", chat_template=marked
        )
        how = dict(tools=TOOLS[:1], return_assistant_tokens_mask=True, return_dict=True)
        [usual, *_] = message_forms(messages)
        out = theirs.apply_chat_template(usual, **how)
        expected = runs_of(tok, out["input_ids"], out["assistant_masks"])
        if tok.decode(out["input_ids"]) != tok.decode(ids):  # some write more in training
            continue
        assert [text.strip() for text in said] == [text.strip() for text in expected]
        n_compared += 1
    assert n_compared or pytest.skip("this version of trl has other templates")


def runs_of(tok, ids, mask):
    """The texts of the stretches that a mask has."""
    groups = itertools.groupby(zip(ids, mask), key=lambda pair: pair[1])
    return [tok.decode([id for id, _ in pairs]) for said, pairs in groups if said]


def test_records_with_tools_become_rows():
    row = as_sft({"messages": [*TALK, {"role": "assistant", "content": "Rain."}], "tools": TOOLS})
    assert row["tools"] == TOOLS and row["messages"][2]["tool_calls"] == TALK[2]["tool_calls"]
    assert row["messages"][3]["tool_call_id"] == "call_0123456789"
    bare = as_sft({"messages": row["messages"], "tools": json.dumps([TOOLS[1]["function"]])})
    assert bare["tools"] == TOOLS[1:]
    for change, why in (
        ({"tools": "{"}, "tools are no JSON"), ({"tools": [{"name": "a b"}]}, "tools"),
        ({"messages": [TALK[1], {"role": "assistant", "content": None}]}, "a turn without text"),
        ({"messages": [TALK[1], {"role": "assistant", "tool_calls": [3]}]}, "tool_calls"),
    ):  # fmt: skip
        with pytest.raises(Reject, match=why):
            as_sft(row | change)
    # Our own template takes no tools: they are described, and calls are text that is learned.
    turns = "{% for m in messages %}<|start|>{{ m.role }}|{{ m.content }}<|end|>{% endfor %}"
    tok = tokenizer(turns + "{% if add_generation_prompt %}<|start|>assistant|{% endif %}")
    messages, variables = for_training(tok, row)
    ids, mask = tok.chat(messages, extra=variables)
    called, answered = runs_of(tok, ids, mask)
    assert parsed_call(called)[0][0] == "weather" and answered == "Rain.<|end|>"
    assert not variables and for_training(tok, {"messages": TALK[:2]}) == (TALK[:2], {})
    unread = tokenizer("{{ tools }}<|tool_call_start|>")
    assert for_training(unread, row) == (row["messages"], {"tools": TOOLS})
