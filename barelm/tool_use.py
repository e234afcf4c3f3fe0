"""What a chat request says of tools and of thoughts: read, and made a plan for its answers.

    plan = plan_chat(tok, request)      # FieldError: what is wrong, and the field it is in
    messages = plan.messages(messages)  # as the template takes them
    plan.compile(tok, None)             # the Grammar of an answer with calls, or None
    parser = plan.parser()              # of one answer: text in, thought, words and calls out

Nothing here knows HTTP, nor a server: barelm/api.py reads the rest of a request."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from barelm.grammar import compile_grammar, lark_text
from barelm.guided import forms_of
from barelm.messages import FieldError
from barelm.reasoning import Thoughts, ThoughtSplitter, takes, thoughts_of
from barelm.run import UserError
from barelm.tool_calls import CallParser, CallPiece
from barelm.tool_forms import (
    ToolForm,
    call_grammar,
    described,
    form_named,
    form_of,
    takes_tools,
    text_grammar,
)

if TYPE_CHECKING:
    from barelm.grammar import Grammar
    from barelm.tokenizer import Tokenizer

MOST_TOOLS = 128  # as OpenAI's
NAME = re.compile(r"[\w.:/-]{1,128}")
# Variables of a template that are not a client's to choose.
OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "generation_begin", "generation_end")


# --------------------------------------------------------------------------------------------------
# Tools


def read_tools(tools: list) -> list[dict]:
    """The tools of a request, [{"type": "function", "function": {"name", …}}], checked."""
    if len(tools) > MOST_TOOLS:
        raise FieldError("tools", f"{len(tools)}: expected {MOST_TOOLS} at most")
    names = set()
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            expected = "expected {'type': 'function', 'function': {'name', 'parameters'}}"
            raise FieldError("tools", f"{where}: {expected}")
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            why = "name: expected up to 128 letters, digits or any of _ - . : /"
            raise FieldError("tools", f"{where}: {why}")
        if name in names:
            raise FieldError("tools", f"{where}: a second tool of the name {name!r}")
        names.add(name)
        for key, wanted in (("description", str), ("parameters", dict), ("strict", bool)):
            value = function.get(key)
            if value is not None and not isinstance(value, wanted):
                kind = {str: "a string", dict: "a JSON Schema", bool: "true or false"}[wanted]
                raise FieldError("tools", f"{where}: {key}: expected {kind}")
    return [read_tool(tool) for tool in tools]


def read_tool(tool: dict) -> dict:
    """A tool as templates show it: without what is null, or is for the server alone."""
    function = {}
    for key, value in tool["function"].items():
        if value is not None and key != "strict":  # strict: every call is valid by its schema here
            function[key] = value
    return {"type": "function", "function": function}


def read_choice(choice: Any, tools: list[dict]) -> tuple[list[dict], bool]:
    """(the tools that may be called, whether one must be) by a request's tool_choice."""
    if choice is None:
        choice = "auto"
    if choice == "none":
        return [], False
    if choice == "auto":
        return tools, False
    if not tools:
        raise FieldError("tool_choice", "there are no tools to choose from")
    if choice == "required":
        return tools, True
    if isinstance(choice, dict) and choice.get("type") == "function":
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, dict) else choice.get("name")
        return named_tools([name], tools), True
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return read_allowed(choice, tools)
    expected = "none, auto, required or {'type': 'function', 'function': {'name'}}"
    raise FieldError("tool_choice", f"expected {expected}")


def read_allowed(choice: dict, tools: list[dict]) -> tuple[list[dict], bool]:
    """OpenAI's list of those of the tools that may be called now."""
    allowed = choice.get("allowed_tools", choice)
    entries = allowed.get("tools") if isinstance(allowed, dict) else None
    mode = allowed.get("mode") if isinstance(allowed, dict) else None
    if mode not in ("auto", "required") or not isinstance(entries, list):
        expected = "expected {'mode': 'auto' or 'required', 'tools': [{'type', 'function'}]}"
        raise FieldError("tool_choice", f"allowed_tools: {expected}")
    names = []
    for entry in entries:
        inner = entry.get("function") if isinstance(entry, dict) else None
        names.append(inner.get("name") if isinstance(inner, dict) else None)
    if mode == "required" and not names:
        raise FieldError("tool_choice", "allowed_tools: required, and no tool is")
    return named_tools(names, tools), mode == "required"


def named_tools(names: list, tools: list[dict]) -> list[dict]:
    by_name = {tool["function"]["name"]: tool for tool in tools}
    for name in names:
        if not isinstance(name, str) or name not in by_name:
            raise FieldError("tool_choice", f"no tool {str(name)[:60]!r} among the tools")
    return [by_name[name] for name in names]


# --------------------------------------------------------------------------------------------------
# The plan


@dataclass
class ChatPlan:
    """What the tools and thoughts of a request mean for its prompt and its answers.

    shown: the tools that the model is told of. tools: that may be called. required: one must be.
    variables: the template's own, of the client. thoughts: what is told apart from the answer;
    None: nothing. certain: a grammar makes sure that what begins as a call is one."""

    form: ToolForm | None = None
    shown: list[dict] = field(default_factory=list)
    tools: list[dict] = field(default_factory=list)
    required: bool = False
    parallel: bool = True
    variables: dict = field(default_factory=dict)
    template_takes_tools: bool = False
    thoughts: Thoughts | None = None
    shows_thoughts: bool = True
    inside: bool = False  # the prompt ends within a thought
    token_ids: dict[str, int] = field(default_factory=dict)  # of special tokens in the forms
    certain: bool = False

    def messages(self, messages: list[dict]) -> list[dict]:
        """A conversation as the template takes it."""
        if self.form is None:
            return messages
        return for_template(messages, self.shown, self.form, self.template_takes_tools)

    def extra(self) -> dict:
        """The template's variables beside the messages."""
        if self.shown and self.template_takes_tools:
            return self.variables | {"tools": self.shown}
        return self.variables

    def see_prompt(self, text: str, begun: str | None = None) -> None:
        """Whether the thought has begun already, by the end of the prompt. begun: the answer's
        words so far, where it goes on behind them."""
        if self.thoughts is None:
            return
        begin, end = self.thoughts
        if begun is not None:
            self.inside = begun.lstrip().startswith(begin) and end not in begun
        else:
            self.inside = text.rstrip().endswith(begin)

    def compile(self, tok: Tokenizer, text_rule: str | None) -> Grammar | None:
        """The Grammar of the answers; None: anything may be said, and what begins as a call may be
        none. text_rule: of an answer that is text. FieldError: a call is wanted, and what it may be
        cannot be enforced."""
        thought = None
        if self.thoughts is not None:
            thought = Thoughts("" if self.inside else self.thoughts.begin, self.thoughts.end)
        if not self.tools or self.form is None:
            if thought is None or text_rule is None:
                return None
            return compile_grammar(tok, "lark", text_grammar(thought, self.token_ids, text_rule))
        ids = self.token_ids
        args = (self.form, self.tools, ids, self.required, self.parallel, thought, text_rule)
        try:
            source = call_grammar(*args)
            grammar = compile_grammar(tok, "lark", source)
        except UserError as error:
            if self.required or text_rule:
                raise FieldError("tools", str(error)) from None
            return None  # the model may call them yet, if not so surely
        self.certain = True
        return grammar

    def parser(self) -> AnswerParser:
        """For one answer."""
        return AnswerParser(self)

    def marks(self) -> set[int]:
        """The special tokens that are text here, as calls and thoughts are found by them."""
        return set(self.token_ids.values())


def for_template(
    messages: list[dict], tools: list[dict], form: ToolForm, takes_them: bool
) -> list[dict]:
    """A conversation with tools as a template takes it, whether or not it takes tools."""
    if not takes_them:
        return described(messages, tools, form)
    if form.id_length:
        return [with_short_ids(message, form.id_length) for message in messages]
    return messages


def for_training(tok: Tokenizer, row: dict) -> tuple[list[dict], dict]:
    """(messages, variables of the template) of a row {"messages", "tools"}, as the server would
    give them to the template."""
    messages = row["messages"]
    tools = row.get("tools") or []
    uses = any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)
    if not tools and not uses:
        return messages, {}
    template = tok.chat_template({"tools": tools})
    takes_them = takes_tools(template)
    with suppress(UserError):  # a form that the server could not read can be learned all the same
        messages = for_template(messages, tools, form_of(template), takes_them)
    return messages, {"tools": tools} if takes_them and tools else {}


def with_short_ids(message: dict, length: int) -> dict:
    """A message whose calls' ids are as long as a template wants them: their last characters."""

    def cut(id):
        plain = re.sub(r"[^a-zA-Z0-9]", "", id)
        return plain[-length:].rjust(length, "0")

    changed = dict(message)
    if "tool_call_id" in message:
        changed["tool_call_id"] = cut(message["tool_call_id"])
    if message.get("tool_calls"):
        calls = message["tool_calls"]
        changed["tool_calls"] = [call | {"id": cut(call.get("id") or "")} for call in calls]
    return changed


def plan_chat(tok: Tokenizer, request: Any, form_name: str | None = None) -> ChatPlan:
    """The plan of a request with the fields tools, tool_choice, parallel_tool_calls,
    chat_template_kwargs, reasoning_effort, include_reasoning and reasoning_format. form_name: of
    the form of calls, where the template is not to say it."""
    shown = read_tools(request.tools)
    tools, required = read_choice(request.tool_choice, shown)
    if not tools:  # a model that may call none is told of none
        shown = []
    plan = ChatPlan(
        shown=shown, tools=tools, required=required, parallel=request.parallel_tool_calls
    )
    if not tok.config.get("chat_template"):  # the template's absence is told where it is used
        return plan
    template = tok.chat_template({"tools": tools})
    try:
        plan.form = form_named(form_name) if form_name else form_of(template)
    except UserError as error:
        if tools:
            raise FieldError("tools", str(error).removeprefix("tools: ")) from None
    plan.template_takes_tools = takes_tools(template)
    plan.variables = read_variables(request, template)
    if request.reasoning_format not in (None, "none", "auto", "deepseek"):
        raise FieldError("reasoning_format", "expected none, auto or deepseek")
    if request.reasoning_format != "none":
        plan.thoughts = thoughts_of(template)
    plan.shows_thoughts = request.include_reasoning
    plan.token_ids = marks_of(tok, plan)
    return plan


def read_variables(request: Any, template: str) -> dict:
    """The variables that a client gives the template."""
    given = dict(request.chat_template_kwargs)
    for name in given:
        if name in OWN_VARIABLES:
            raise FieldError("chat_template_kwargs", f"{name} is not a client's to give")
        if not name.isidentifier() or not takes(template, name):
            # Clients send this one to every model.
            if name == "enable_thinking" and given[name] is False:
                continue
            raise FieldError("chat_template_kwargs", f"this model's template takes no {name[:60]}")
    effort = request.reasoning_effort
    if effort is None:
        return given
    if takes(template, "reasoning_effort"):
        return {"reasoning_effort": effort} | given
    if effort == "none":  # as far as the template can do without
        return ({"enable_thinking": False} if takes(template, "enable_thinking") else {}) | given
    raise FieldError("reasoning_effort", "this model's template takes none: expected none or null")


def marks_of(tok: Tokenizer, plan: ChatPlan) -> dict[str, int]:
    """{name: id} of the special tokens that calls and thoughts are told by."""
    text = ""
    if plan.form is not None and plan.tools:
        form = plan.form
        text = "".join([form.opening, form.begin, form.middle, form.end, form.closing])
        text += form.marker or "<|python_tag|>"
    if plan.thoughts is not None:
        text += plan.thoughts.begin + plan.thoughts.end
    plain = tok.bytes  # an added token that is text is read as such
    return {
        name: id for name, id in tok.special.items() if name and name in text and id not in plain
    }


def read_text_rule(tok: Tokenizer, request: Any, has_tools: bool) -> str | None:
    """The right side of a grammar's rule for the words of an answer, behind its thought and where
    it calls no tool, by what the request says of their form. None: nothing, or (without tools) what
    is of the whole answer, thoughts and all: a regular expression or a grammar."""
    forms = forms_of(request)
    if not forms:
        return None
    field, kind, source = forms[0]
    field = field.split(".")[0]
    is_one = len(forms) == 1 and kind in ("json_schema", "json_object", "choice")
    if not is_one and has_tools:
        raise FieldError(field, "beside tools: expected one JSON Schema, json_object, or a choice")
    if not is_one:
        return None
    try:
        if isinstance(source, str):
            source = json.loads(source)
        rule = lark_text(kind, source).removeprefix("start: ")
        compile_grammar(tok, "lark", f"start: {rule}")  # what is wrong is told of this field
        return rule
    except (UserError, ValueError, RecursionError) as error:
        raise FieldError(field, str(error)) from None


# --------------------------------------------------------------------------------------------------
# Answers


@dataclass
class Parts:
    """A piece of an answer: more of its thought, its text, its calls."""

    thought: str = ""
    text: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class AnswerParser:
    """Takes one answer apart as it comes. n_calls: the calls so far."""

    def __init__(self, plan: ChatPlan) -> None:
        self.thoughts = None
        if plan.thoughts is not None:
            self.thoughts = ThoughtSplitter(plan.thoughts, plan.inside)
        self.shows_thoughts = plan.shows_thoughts
        self.calls = None
        if plan.tools and plan.form is not None:
            functions = [tool["function"] for tool in plan.tools]
            schemas = {f["name"]: f.get("parameters") or {} for f in functions}
            most = None if plan.parallel else 1
            self.calls = CallParser(plan.form, schemas, plan.certain, most)

    @property
    def n_calls(self) -> int:
        return self.calls.n_calls if self.calls else 0

    def feed(self, text: str, final: bool = False) -> Parts:
        """What this text of the answer makes certain; final: nothing comes after it."""
        parts = Parts()
        if self.thoughts is not None:
            thought, text = self.thoughts.feed(text, final)
            if self.shows_thoughts:
                parts.thought = thought
        if self.calls is None:
            parts.text = text
            return parts
        for piece in self.calls.feed(text, final):
            if isinstance(piece, str):
                parts.text += piece
            else:
                parts.calls.append(piece)
        return parts
