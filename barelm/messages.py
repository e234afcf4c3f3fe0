"""The messages of a chat request, as OpenAI's protocol has them: read and checked.

`read_message` gives a message with what a chat template may look at: its role and text, who speaks,
an answer's calls of tools and thought, and which call a tool's message answers."""

from __future__ import annotations

from typing import Any

ROLES = ("system", "user", "assistant", "tool")
MOST_CALLS = 128  # of one message
DEEPEST = 100  # objects and lists within each other
EMPTY = (None, "", [], {})  # an earlier answer comes back with all its fields, most of them so
OWN_FIELDS = {
    "system": [],
    "user": [],
    "assistant": ["tool_calls", "reasoning_content", "reasoning"],
    "tool": ["tool_call_id"],
}


class FieldError(Exception):
    """What is wrong in a request, and in which field."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


def refusal(where: str, why: str) -> FieldError:
    """What is wrong `where` in the messages."""
    error = FieldError("messages", why)
    error.args = (f"{where}: {why}",)
    return error


def message_text(content: object) -> str | None:
    """The text of a message's content, a text or a list of parts; None where it is neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        # cache_control, some clients', says what is worth keeping, and changes no answer.
        if not isinstance(part, dict) or part.keys() - {"type", "text", "cache_control"}:
            return None
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


def read_message(message: Any, where: str) -> dict:
    """A message with what it says; `where` it stands, for what is wrong. FieldError."""
    why = "expected {'role': system, user, assistant or tool, 'content': a text}"
    if not isinstance(message, dict):
        raise refusal(where, why)
    role = message.get("role")
    if role == "developer":  # OpenAI's newer word
        role = "system"
    if role not in ROLES:
        raise refusal(where, why)
    for name, value in message.items():
        if name in ("role", "content", "name", *OWN_FIELDS[role]) or value in EMPTY:
            continue
        raise refusal(where, f"{ascii(name)[:60]} is not supported")
    checked = {"role": role, "content": message_text(message.get("content"))}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = message.get(name)
        if name == "reasoning_content" and value is None:
            value = message.get("reasoning")
        if value is not None and not isinstance(value, str):
            raise refusal(where, f"{name}: expected a text")
        if value:
            checked[name] = value
    if message.get("tool_calls"):
        checked["tool_calls"] = read_calls(message["tool_calls"], where)
        if message.get("content") in EMPTY:  # beside calls there may be no text
            checked.pop("content")
    if checked.get("content", "") is None:
        raise refusal(where, why)
    return checked


def read_calls(calls: Any, where: str) -> list[dict]:
    """The tool_calls of an assistant's message, checked; their arguments as they came."""
    why = "tool_calls: expected [{'id', 'type': 'function', 'function': {'name', 'arguments'}}]"
    if not isinstance(calls, list) or len(calls) > MOST_CALLS:
        raise refusal(where, why)
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise refusal(where, why)
        name = function.get("name")
        arguments = function.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, (str, dict)):
            raise refusal(where, why)
        id = "" if call.get("id") is None else call["id"]
        if not isinstance(id, str):
            raise refusal(where, "tool_calls: id: expected a text")
        inner = {"name": name, "arguments": arguments}
        checked.append({"id": id, "type": "function", "function": inner})
    return checked


def size_of(value: Any, field: str = "messages") -> int:
    """How many characters the texts of a value of JSON have, names too; FieldError where it is
    nested too deeply for what comes after."""
    size = 0
    level = [value]
    depth = 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise FieldError(field, f"more than {DEEPEST} objects and lists within each other")
        inner: list = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            size += len(item) if isinstance(item, str) else 1
        level = inner
    return size
