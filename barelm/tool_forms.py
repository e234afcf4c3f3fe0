"""The forms in which models write calls of tools, and how a model is told of its tools.

A chat template that takes `tools` says in which form its model was taught to call them; `FORMS` is
the table of those forms, and adding one is adding a row. `call_grammar` makes a form and the tools'
schemas a grammar, so that a constrained answer can only be a valid call; barelm/tool_calls.py finds
the calls in an answer.

A model whose template knows no tools is told of them in the system message (`described`), in the
words and the form of Hermes (NousResearch's Hermes 2 Pro; Qwen took it over), the most widely
learned one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from barelm.chat import parsed_json, written_json
from barelm.grammar import json_rule
from barelm.run import UserError
from barelm.tool_values import value_rules, write_values


@dataclass(frozen=True)
class ToolForm:
    """How a call is written: opening, then calls with `between` between two, then closing. A call
    is begin, the tool's name, middle, the arguments as a JSON object, end.

    sign: what stands in a template of this form, a regular expression. marker: what a call, or all
    of them, begins with; "": nothing but the call's own brace at the beginning of the answer.
    is_json: whether name and arguments are the fields of a JSON object, in any order and spacing.
    key_begin, key_end, value_end: around each argument, where they are no JSON
    (barelm/tool_values.py).
    """

    name: str
    sign: str
    marker: str
    begin: str
    middle: str
    end: str
    opening: str = ""
    between: str = ""
    closing: str = ""
    is_json: bool = True
    key_begin: str = ""
    key_end: str = ""
    value_end: str = ""
    id_length: int = 0  # of a call's id, where the template wants one of so many letters and digits

    def call(self, name: str, arguments: str) -> str:
        """A call as the model would write it; arguments: a JSON object's text."""
        if self.key_begin:
            values = parsed_json(arguments)
            arguments = write_values(self, values) if isinstance(values, dict) else arguments
        return self.begin + name + self.middle + arguments + self.end

    def calls(self, calls: list[tuple[str, str]]) -> str:
        """Several, [(name, arguments)]."""
        texts = [self.call(name, arguments) for name, arguments in calls]
        return self.opening + self.between.join(texts) + self.closing


HERMES = ToolForm(
    name="hermes",
    sign="<tool_call>",
    marker="<tool_call>",
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    end="}\n</tool_call>",
    between="\n",
)
# The first whose sign a template has is taken: those with narrower signs come first.
FORMS = [
    ToolForm(  # DeepSeek V3 and R1
        name="deepseek",
        sign="<｜tool▁calls▁begin｜>",
        marker="<｜tool▁calls▁begin｜>",
        opening="<｜tool▁calls▁begin｜>",
        begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        middle="\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
        between="\n",
        closing="<｜tool▁calls▁end｜>",
        is_json=False,
    ),
    ToolForm(  # Mistral's tokenizers from version 11 on: Small 3.2, Magistral, Devstral
        name="mistral_args",
        sign=r"\[ARGS\]",
        marker="[TOOL_CALLS]",
        begin="[TOOL_CALLS]",
        middle="[ARGS]",
        end="",
        is_json=False,
        id_length=9,
    ),
    ToolForm(  # Mistral 7B v0.3, Nemo, Mixtral 8x22B
        name="mistral",
        sign=r"\[TOOL_CALLS\]",
        marker="[TOOL_CALLS]",
        opening="[TOOL_CALLS] [",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        between=", ",
        closing="]",
        id_length=9,
    ),
    ToolForm(  # Phi-4-mini; with no closing Granite 3, whose template names the same token
        name="phi4",
        sign=r"<\|/tool_call\|>",
        marker="<|tool_call|>",
        opening="<|tool_call|>[",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        between=", ",
        closing="]<|/tool_call|>",
    ),
    ToolForm(
        name="granite",
        sign=r"<\|tool_call\|>",
        marker="<|tool_call|>",
        opening="<|tool_call|>[",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        between=", ",
        closing="]",
    ),
    ToolForm(  # Qwen3-Coder, Qwen3.5 and later, Nemotron 3
        name="qwen3_coder",
        sign="<function=",
        marker="<tool_call>",
        begin="<tool_call>\n<function=",
        middle=">\n",
        end="</function>\n</tool_call>",
        between="\n",
        is_json=False,
        key_begin="<parameter=",
        key_end=">\n",
        value_end="\n</parameter>\n",
    ),
    ToolForm(  # GLM-4.5 and later
        name="glm",
        sign="<arg_key>",
        marker="<tool_call>",
        begin="<tool_call>",
        middle="\n",
        end="</tool_call>",
        between="\n",
        is_json=False,
        key_begin="<arg_key>",
        key_end="</arg_key>\n<arg_value>",
        value_end="</arg_value>\n",
    ),
    HERMES,  # and Qwen2.5, Qwen3
    ToolForm(  # Llama 3.1 and 3.2; some answers have <|python_tag|> before the call
        name="llama3",
        sign=r'<\|python_tag\|>|"parameters": dictionary',
        marker="",
        begin='{"name": "',
        middle='", "parameters": ',
        end="}",
        between="; ",
    ),
]
# Templates whose calls are no JSON: what is said of them, rather than a call never found.
UNREAD = {
    r"<\|tool_call>call:": "its calls are in braces of their own (Gemma 4's form)",
    r"<\|tool_call_start\|>": "its calls are Python (LFM2's form)",
    r"<\|channel\|>": "its calls are in channels (gpt-oss's form)",
}


def takes_tools(template: str) -> bool:
    """Whether a chat template has something to say of tools, other than in a comment."""
    program = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    return re.search(r"\btools\b", program) is not None


def form_of(template: str) -> ToolForm:
    """The form of a chat template's calls; Hermes's where it takes no tools, which `described` asks
    for. UserError: it takes tools in a form that is not in the table."""
    if not takes_tools(template):
        return HERMES
    for sign, why in UNREAD.items():
        if re.search(sign, template):
            raise UserError(
                f"tools: not with this chat template: {why}; --tool_form= names another"
            )
    for form in FORMS:
        if re.search(form.sign, template):
            return form
    names = ", ".join(form.name for form in FORMS)
    raise UserError(f"tools: the chat template has none of these forms (--tool_form=): {names}")


def form_named(name: str) -> ToolForm:
    """The form of this name; a UserError that lists them where there is none."""
    for form in FORMS:
        if form.name == name:
            return form
    names = ", ".join(form.name for form in FORMS)
    raise UserError(f"--tool_form={name}: expected one of {names}")


# --------------------------------------------------------------------------------------------------
# A template without tools: they are described

INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments:
{example}"""
RESPONSE = "<tool_response>\n{content}\n</tool_response>"


def described(messages: list[dict], tools: list[dict], form: ToolForm) -> list[dict]:
    """The messages for a template that takes no tools: these stand in the system message, calls in
    the assistants' text as the form has them, and what the tools answered in a user's message."""
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = form.calls([("<function-name>", "<args-json-object>")])
    wanted = INSTRUCTIONS.format(signatures=signatures, example=example)
    plain: list[dict] = []
    for message in messages:
        if message["role"] == "tool":
            text = RESPONSE.format(content=message["content"])
            if plain and plain[-1].get("is_response"):  # those of parallel calls are one turn
                plain[-1]["content"] += "\n" + text
            else:
                plain.append({"role": "user", "content": text, "is_response": True})
            continue
        plain.append(without_calls(message, form))
    for message in plain:
        message.pop("is_response", None)
    if not tools:
        return plain
    if plain and plain[0]["role"] == "system":
        first = plain[0] | {"content": plain[0]["content"] + "\n\n" + wanted}
        return [first, *plain[1:]]
    return [{"role": "system", "content": wanted}, *plain]


def without_calls(message: dict, form: ToolForm) -> dict:
    """A message whose calls are part of its text."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    text = plain.get("content") or ""
    if calls:
        written = form.calls([(call["name"], written_json(call["arguments"])) for call in calls])
        text = f"{text}\n{written}" if text else written
    return plain | {"content": text}


# --------------------------------------------------------------------------------------------------
# Grammars, in llguidance's Lark

MOST_CALLS = 16  # of one answer that is constrained


def quoted(text: str, token_ids: dict[str, int]) -> str:
    """A text as Lark's terminals, special tokens in it as the tokens that they are."""
    if not text:
        return ""
    if not token_ids:
        return json.dumps(text, ensure_ascii=False)
    names = sorted(token_ids, key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    words = []
    for piece in pieces:
        if piece in token_ids:
            words.append(f"<[{token_ids[piece]}]>")
        elif piece:
            words.append(json.dumps(piece, ensure_ascii=False))
    return " ".join(words)


def call_grammar(
    form: ToolForm,
    tools: list[dict],
    token_ids: dict[str, int],
    required: bool,
    parallel: bool = True,
    thought: tuple[str, str] | None = None,
    text_rule: str | None = None,
) -> str:
    """The grammar, as barelm/grammar.py's kind `lark`, of an answer that calls some of the tools.

    token_ids: {name: id} of the special tokens, which are no text to the grammar. required: begin
    with a call; else any text may be, but where a call begins it goes on as one. parallel: more
    calls than one. thought: what a thought that may come first begins and ends with; has it begun
    already, "" and its end, which then has to come. text_rule: the right side of a rule for the
    text of an answer without calls. UserError: of a schema that cannot be enforced."""
    marker, opening, between, begin = form.marker, form.opening, form.between, form.begin
    lead = marker
    if not marker:  # a call at the very beginning of the answer
        lead = begin
    # The answer's first call has its lead apart: in an answer that need not call, it is what the
    # text before it ends with.
    first = (opening + begin).removeprefix(lead)
    more = ""
    if parallel:
        more = f"({quoted(between + begin, token_ids)} call){{0,{MOST_CALLS - 1}}}"
    rest = f"{quoted(first, token_ids)} call {more} {quoted(form.closing, token_ids)}"
    # White space behind a thought belongs to any text that may follow it.
    lines = thought_rules(thought, token_ids, takes_blank=bool(required or text_rule))
    if required:
        lines.append(f"answer: {quoted(lead, token_ids)} {rest}")
    elif text_rule:
        lines.append(f"answer: plain | {quoted(lead, token_ids)} {rest}")
        lines.append(f"plain: {text_rule}")
    else:
        lines.append(f"answer: TEXT | lead {rest}")
        lines += lead_rules(form, lead, token_ids)
        if thought and thought[0]:  # where the first letters are a thought's, nothing else begins
            lines[0] = "start: thought answer | unthought"
            lines.append(f"unthought: UNTHOUGHT_TEXT | unthought_lead {rest}")
            lines += lead_rules(form, lead, token_ids, "unthought_", thought[0])
    names = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        head = quoted(function["name"] + form.middle, token_ids)
        lines.append(f"call_{number}: {head} arguments_{number} {quoted(form.end, token_ids)}")
        lines += arguments_rules(form, function, f"arguments_{number}")
        names.append(f"call_{number}")
    lines.append("call: " + " | ".join(names))
    return "\n".join(lines) + "\n"


def arguments_rules(form: ToolForm, function: dict, name: str) -> list[str]:
    """The rules of a function's arguments, the first of which has this name."""
    schema = {"type": "object"} | (function.get("parameters") or {})
    try:
        if schema["type"] != "object":
            raise UserError("its parameters are no object")
        if form.key_begin:
            return value_rules(form, schema, name)
        return [f"{name}: {json_rule(schema, compact=True)}"]
    except UserError as error:
        raise UserError(f"{function['name']}: {error}") from None


def text_grammar(thought: tuple[str, str], token_ids: dict[str, int], text_rule: str) -> str:
    """The grammar of an answer without calls that has a thought, and then a form."""
    lines = thought_rules(thought, token_ids, takes_blank=True)
    return "\n".join([*lines, f"answer: {text_rule}"]) + "\n"


def thought_rules(
    thought: tuple[str, str] | None, token_ids: dict[str, int], takes_blank: bool
) -> list[str]:
    """The rules of an answer's beginning: of its thought, which ends at the first place that it
    can, and of white space behind it."""
    if thought is None:
        return ["start: answer"]
    begin, end = thought
    lazy = "" if end in token_ids else "[lazy]"  # no text has a token of its own
    inside = rf"thought_text{lazy}: /(.|\n)*/ {quoted(end, token_ids)}"
    blank = r"/\s*/" if takes_blank else ""
    whole = f"thought: {quoted(begin, token_ids)} thought_text {blank}"
    return [f"start: thought{'?' if begin else ''} answer", whole, inside]


def lead_rules(
    form: ToolForm, lead: str, token_ids: dict[str, int], prefix: str = "", without: str = ""
) -> list[str]:
    """The rules of any text without a call, and of what may come before one. prefix: of their
    names. without: what the text does not begin with."""
    before = r"/(.|\n)*/"
    if without and without not in token_ids:
        before += rf" & ~/{regex_text(without)}(.|\n)*/"
    names = [f"{prefix.upper()}TEXT", f"{prefix.upper()}BEFORE", f"{prefix}lead"]
    text, before_name, lead_name = names
    first = quoted(lead, token_ids)
    if form.marker in token_ids:  # no text has it, since it is a token of its own
        return [f"{text}: {before}", f"{lead_name}: {text} {first}"]
    escaped = regex_text(lead)
    if not form.marker:  # text that does not begin as a call does
        text_rule = rf"{text}: {before} & ~/\s*{escaped}(.|\n)*/"
        return [text_rule, rf"{lead_name}: /\s*{escaped}/"]
    return [
        rf"{text}: {before} & ~/(.|\n)*{escaped}(.|\n)*/",
        f"{before_name}: {before}",
        f"{lead_name}[lazy]: {before_name} {first}",
    ]


def regex_text(text: str) -> str:
    """A text as a regular expression of Lark's, between slashes."""
    escaped = re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text)
    return escaped.replace("\n", r"\n")
