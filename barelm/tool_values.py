"""Calls of tools whose arguments are no JSON object: each is a value between tags, a text as it is
and anything else as JSON, as Qwen3-Coder, Qwen3.5 and Nemotron 3 write them, and GLM with others:

    <parameter=city>
    Paris
    </parameter>

A form (barelm/tool_forms.py) with a key_begin is such a one. Which of the two a value is, the
function's schema says."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from barelm.grammar import json_rule
from barelm.run import UserError

if TYPE_CHECKING:
    from barelm.tool_forms import ToolForm

PYTHONS = {"True": True, "False": False, "None": None}  # as some templates show them
SAID = {"title", "description", "default", "examples", "type", "enum", "const", "anyOf", "oneOf"}


def takes_text(schema: dict) -> bool:
    """Whether a value of this schema may be a text."""
    kind = schema.get("type")
    if kind == "string" or (isinstance(kind, list) and "string" in kind):
        return True
    others = [*schema.get("anyOf", []), *schema.get("oneOf", [])]
    if any(isinstance(other, dict) and takes_text(other) for other in others):
        return True
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return any(isinstance(value, str) for value in values)


def write_values(form: ToolForm, arguments: dict) -> str:
    """The arguments as a model writes them."""
    text = ""
    for key, value in arguments.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text += form.key_begin + key + form.key_end + shown + form.value_end
    return text


def read_values(form: ToolForm, body: str, schema: dict) -> dict | None:
    """The arguments that a call's body has; None where it is something else."""
    key_end = r"\s*".join(map(re.escape, form.key_end.split()))
    pair = rf"{re.escape(form.key_begin)}(.*?){key_end}(.*?){re.escape(form.value_end.strip())}"
    arguments = {}
    for match in re.finditer(pair, body, re.DOTALL):
        key, text = match[1].strip(), match[2]
        if form.key_end.endswith("\n"):  # a line of its own
            text = text.removeprefix("\n").removesuffix("\n")
        own = (schema.get("properties") or {}).get(key, {})
        arguments[key] = read_value(text, own if isinstance(own, dict) else {})
    if re.sub(pair, "", body, flags=re.DOTALL).strip():
        return None
    return arguments


def read_value(text: str, schema: dict) -> Any:
    """A value by its schema: a text as it is, another as JSON where it is that."""
    if takes_text(schema) and text not in ("null", "None"):
        return text
    if schema.get("type") == "string":
        return text
    if text.strip() in PYTHONS:
        return PYTHONS[text.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def value_rules(form: ToolForm, schema: dict, name: str) -> list[str]:
    """Rules of Lark's for the arguments of a function by its schema; `name` is the first's, and
    what the others' begin with. UserError: of what cannot be enforced here."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    missing = [key for key in required if key not in properties]
    if missing:
        raise UserError(f"required: {missing[0]!r:.60} is not among the properties")
    lines = []
    pairs = []
    for number, (key, own) in enumerate(properties.items()):
        rule = f"{name}_{number}"
        pairs.append(rule if key in required else f"{rule}?")
        head = json.dumps(form.key_begin + key + form.key_end, ensure_ascii=False)
        lines.append(f"{rule}: {head} {rule}_value")
        lines.append(value_rule(form, own, f"{rule}_value", schema))
    return [f"{name}: " + (" ".join(pairs) or '""'), *lines]


def value_rule(form: ToolForm, schema: Any, name: str, root: dict) -> str:
    """The rule of one value, and of what ends it."""
    end = json.dumps(form.value_end)
    if not isinstance(schema, dict):
        schema = {}
    if not takes_text(schema):
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return f"{name}: {name}_json {end}\n{name}_json: {json_rule(schema | definitions, True)}"
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return f"{name}: ({options}) {end}"
    others = schema.keys() - SAID
    if others:
        raise UserError(f"{sorted(others)[0]!r:.60} of a text cannot be enforced in this form")
    return rf"{name}[lazy]: /(.|\n)*/ {end}"
