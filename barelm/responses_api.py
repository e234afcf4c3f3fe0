"""/v1/responses, OpenAI's newer protocol: what a request may say, as a request for a chat
(barelm/api.py), and what it is answered. Nothing here knows HTTP, and nothing is remembered between
requests: a client sends the whole conversation each time.

An answer's message is what barelm/answers.py makes of a chat, in this protocol's form: so that what
a chat can do, such as thoughts and calls of tools, is done here too.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from barelm.answers import ChatAnswer, usage
from barelm.api import IGNORED, NEUTRAL, ApiError, check_value, read_chat, read_fields, short
from barelm.jobs import Sampling, limited

if TYPE_CHECKING:
    from collections.abc import Iterator

    from barelm.api import Chat, ServedModel
    from barelm.jobs import Job, Token, Update

LOGPROBS = "message.output_text.logprobs"  # what `include` may ask for

# --------------------------------------------------------------------------------------------------
# Requests


@dataclass
class Respond(Sampling):
    input: Any = None  # a text, or items: messages, calls of tools and what they gave
    model: str | None = None
    instructions: str | None = None  # a system message before the input
    max_output_tokens: int | None = limited(None, 1, 2**31)
    text: dict = field(default_factory=dict)  # {"format": as response_format, "verbosity"}
    tools: list = field(default_factory=list)  # functions
    tool_choice: Any = None  # auto, none, required, or {"type": "function", "name"}
    parallel_tool_calls: bool | None = None
    reasoning: dict = field(default_factory=dict)  # {"effort"}
    include: list = field(default_factory=list)  # message.output_text.logprobs
    top_logprobs: int = limited(0, 0, 20)
    stream: bool = False
    stream_options: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)  # comes back with the answer


@dataclass
class NoFields:
    """An object of which this server has no field."""


WITHOUT_MEMORY = {"background", "conversation", "previous_response_id", "store"}
RESPONSE_NEUTRAL: dict[str, list] = {
    "background": [False],
    "context_management": [[]],
    "store": [False],
    "truncation": ["disabled"],
}
# The fields of a chat that these stand for.
CHAT_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "verbosity": "text",
    "reasoning_effort": "reasoning",
    "logprobs": "include",
}


def read_response(served: ServedModel, body: dict) -> tuple[Respond, Chat]:
    """A request, and the one for a chat that it stands for."""
    for name in WITHOUT_MEMORY:
        if body.get(name) not in (None, False):
            why = "this server keeps no answers: send what was said before in input"
            raise ApiError(400, f"{name} = {short(body[name])}: {why}", name)
    request = read_fields(body, Respond, NEUTRAL | RESPONSE_NEUTRAL, IGNORED)
    read_fields(request.stream_options, NoFields, {"include_obfuscation": [False]}, {})
    chat = {f.name: body[f.name] for f in fields(Sampling) if f.name in body}
    chat |= {"model": request.model, "stream": request.stream}
    chat |= {"messages": read_input(request.input)}
    if request.instructions is not None:
        chat["messages"].insert(0, {"role": "system", "content": request.instructions})
    chat["max_completion_tokens"] = request.max_output_tokens
    chat |= asked_logprobs(request) | asked_format(request) | asked_tools(request)
    chat |= asked_effort(request)
    try:
        return request, read_chat(served, chat)
    except ApiError as error:
        raise renamed(error) from None


def renamed(error: ApiError) -> ApiError:
    """An error of a chat's request, with the field that this protocol has for it."""
    param = CHAT_NAMES.get(error.param or "", error.param)
    return ApiError(error.status, error.message, param, error.code)


def asked_logprobs(request: Respond) -> dict:
    for one in request.include:
        if one != LOGPROBS:
            raise ApiError(400, f"include: {short(one)}: expected {LOGPROBS}", "include")
    if request.top_logprobs and not request.include:
        why = f"top_logprobs wants include = ['{LOGPROBS}'] beside it"
        raise ApiError(400, why, "top_logprobs")
    if not request.include:
        return {}
    return {"logprobs": True, "top_logprobs": request.top_logprobs}


def asked_format(request: Respond) -> dict:
    """A chat's response_format, whose schema stands in an object of its own, and verbosity."""
    form = request.text.get("format")
    for name, value in request.text.items():
        if name not in ("format", "verbosity") and value is not None:
            raise ApiError(400, f"text: {short(name)} is not supported", "text")
    chat = {"verbosity": request.text.get("verbosity")}
    if form is None:
        return chat
    if not isinstance(form, dict):
        raise ApiError(400, 'text: format: expected an object with a "type"', "text")
    if form.get("type") == "json_schema":
        schema = {name: value for name, value in form.items() if name != "type"}
        form = {"type": "json_schema", "json_schema": schema}
    return chat | {"response_format": form}


def asked_tools(request: Respond) -> dict:
    """A chat's tools and tool_choice, in which a function stands in an object of its own."""
    chat: dict = {}
    if request.parallel_tool_calls is not None:
        chat["parallel_tool_calls"] = request.parallel_tool_calls
    if request.tools:
        chat["tools"] = [chat_tool(tool, i) for i, tool in enumerate(request.tools)]
    choice = request.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    if choice is not None:
        chat["tool_choice"] = choice
    return chat


def chat_tool(tool: Any, index: int) -> dict:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        why = f"tools[{index}]: type {short(kind)} is not supported: expected function"
        raise ApiError(400, why, "tools")
    function = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": function}


def asked_effort(request: Respond) -> dict:
    for name, value in request.reasoning.items():
        if name != "effort" and value is not None:
            raise ApiError(400, f"reasoning: {short(name)} is not supported", "reasoning")
    return {"reasoning_effort": request.reasoning.get("effort")}


# --------------------------------------------------------------------------------------------------
# Items of a request's input, as messages of a chat


def read_input(value: Any) -> list[dict]:
    """The messages of a request's input, a text or items."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ApiError(400, "input: expected a text, or a list of items, not empty", "input")
    messages: list[dict] = []
    for i, item in enumerate(value):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise ApiError(400, f"{where}: expected an object, not {short(item)}", "input")
        add_item(messages, item, where)
    for message in messages:  # thoughts that nothing was said after
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return messages


def add_item(messages: list[dict], item: dict, where: str) -> None:
    """Add an item to the messages. What an answer was made of, thoughts, a text and calls, is one
    message of the assistant's again."""
    kind = item.get("type") or "message"
    if kind == "message":
        message = read_message(item, where)
    elif kind == "reasoning":
        allow(item, where, "content", "summary", "encrypted_content")
        text = text_of(item.get("content") or [], where)
        message = {"role": "assistant", "content": None, "reasoning_content": text}
    elif kind == "function_call":
        allow(item, where, "call_id", "name", "arguments", "namespace")
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    elif kind == "function_call_output":
        allow(item, where, "call_id", "output")
        text = text_of(item.get("output"), where)
        message = {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
    else:
        raise ApiError(400, f"{where}: type {short(kind)} is not supported", "input")
    if messages and continues_answer(messages[-1], message):
        join(messages[-1], message)
    else:
        messages.append(message)


def continues_answer(last: dict, message: dict) -> bool:
    """Whether a message is more of the last one: an assistant's, of which parts were missing."""
    if last["role"] != "assistant" or message["role"] != "assistant":
        return False
    if message["content"] is None:
        return "reasoning_content" not in message
    return last["content"] is None and "tool_calls" not in last


def join(last: dict, message: dict) -> None:
    if message["content"] is not None:
        last["content"] = message["content"]
    if "tool_calls" in message:
        last["tool_calls"] = last.get("tool_calls", []) + message["tool_calls"]


def read_message(item: dict, where: str) -> dict:
    allow(item, where, "role", "content", "phase")
    role = item.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        why = f"role {short(role)}: expected system, developer, user or assistant"
        raise ApiError(400, f"{where}: {why}", "input")
    return {"role": role, "content": text_of(item.get("content"), where)}


def allow(item: dict, where: str, *names: str) -> None:
    """Refuse an item with other fields than these, and those that every answer's item has."""
    for name, value in item.items():
        if value is None:
            continue
        if name not in ("type", "id", "status", *names):
            raise ApiError(400, f"{where}: {short(name)} is not supported", "input")
        if name == "summary":
            expect(f"{where}: summary", value, list)
        elif name not in ("type", "content", "output"):
            expect(f"{where}: {name}", value, str)


def expect(where: str, value: object, wanted: type) -> None:
    """Refuse what is of another type; `where` it stands in the input."""
    try:
        check_value(where, value, wanted, None)
    except ApiError as error:
        raise ApiError(400, error.message, "input") from None


def text_of(content: Any, where: str) -> str:
    """The text of an item's content: a text, or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: expected a text, or a list of parts", "input")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "reasoning_text"):
            raise ApiError(400, f"{where}: a part of type {short(kind)} is not supported", "input")
        expect(f"{where}: text", part.get("text"), str)
        texts.append(part["text"])
    return "".join(texts)


# --------------------------------------------------------------------------------------------------
# Answers


class ResponseAnswer:
    """The JSON of an answer, whole or as a stream's events."""

    def __init__(self, request: Respond, chat: ChatAnswer) -> None:
        self.request = request
        self.chat = chat
        self.head = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": chat.head["model"],
        }

    def response(self, status: str, output: list[dict], jobs: list[Job]) -> dict:
        """The answer as it stands. jobs: empty while there is none."""
        request = self.request
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self.head | {
            "status": status,
            "output": output,
            "error": None,
            "incomplete_details": details,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.get("effort"), "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": request.text | {"format": request.text.get("format") or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools,
            "top_logprobs": request.top_logprobs,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": response_usage(jobs) if jobs else None,
        }

    def whole(self, job: Job, text: str, tokens: list[Token]) -> dict:
        """The answer of the one job that there is."""
        choice = self.chat.whole_choice(job, text, tokens)
        message = choice["message"]
        status = status_of(choice["finish_reason"])
        output = []
        if message.get("reasoning_content"):
            output.append(reasoning_item(message["reasoning_content"]))
        calls = message.get("tool_calls") or []
        if message.get("content") or not calls:
            entries = (choice["logprobs"] or {}).get("content")
            output.append(message_item(message.get("content") or "", entries, status))
        output += [call_item(call["id"], call["function"]) for call in calls]
        return self.response(status, output, [job])


def status_of(finish_reason: str) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def new_id(prefix: str) -> str:
    return prefix + os.urandom(12).hex()


def text_part(text: str, logprobs: list | None) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def message_item(text: str, logprobs: list | None, status: str) -> dict:
    content = [text_part(text, logprobs)]
    head = {"id": new_id("msg_"), "type": "message", "role": "assistant"}
    return head | {"status": status, "content": content}


def reasoning_item(text: str) -> dict:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": content}


def call_item(call_id: str, function: dict, status: str = "completed") -> dict:
    head = {"id": new_id("fc_"), "type": "function_call", "call_id": call_id, "status": status}
    return head | {"name": function["name"], "arguments": function["arguments"]}


def response_usage(jobs: list[Job]) -> dict:
    counts = usage(jobs)
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    thought = counts.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": counts["total_tokens"],
    }


# --------------------------------------------------------------------------------------------------
# Streams


class ResponseEvents:
    """The events of a streamed answer, dicts with a type and a number. An item, thoughts or a
    message or a call, is opened when its first piece comes, and closed when another's comes."""

    def __init__(self, answer: ResponseAnswer, job: Job) -> None:
        self.answer = answer
        self.job = job
        self.number = 0  # of the next event
        self.output: list[dict] = []  # items, the last of which may be open
        self.open = ""  # the kind of the open item; of a call with its number
        self.finish_reason = "stop"

    def event(self, kind: str, **more: Any) -> dict:
        number = self.number
        self.number += 1
        return {"type": f"response.{kind}", "sequence_number": number} | more

    def part_event(self, kind: str, **more: Any) -> dict:
        """An event of the one part of the open item."""
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        return self.event(kind, **place, content_index=0, **more)

    def begin(self) -> Iterator[dict]:
        response = self.answer.response("in_progress", [], [])
        yield self.event("created", response=response)
        yield self.event("in_progress", response=response)

    def more(self, update: Update) -> Iterator[dict]:
        """What an Update makes of them."""
        for choice in self.answer.chat.new_choices(update):
            delta = choice["delta"]
            entries = (choice["logprobs"] or {}).get("content") or []
            if delta.get("reasoning_content"):
                yield from self.thought(delta["reasoning_content"])
            if delta.get("content") or entries:
                yield from self.text(delta.get("content") or "", entries)
            for call in delta.get("tool_calls") or []:
                yield from self.call(call)
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    def thought(self, text: str) -> Iterator[dict]:
        if self.open != "reasoning":
            yield from self.close("completed")
            yield from self.start("reasoning", reasoning_item(""))
        self.output[-1]["content"][0]["text"] += text
        yield self.part_event("reasoning_text.delta", delta=text)

    def text(self, text: str, entries: list) -> Iterator[dict]:
        if self.open != "message":
            yield from self.close("completed")
            yield from self.start("message", message_item("", [], "in_progress"))
        part = self.output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += entries
        yield self.part_event("output_text.delta", delta=text, logprobs=entries)

    def call(self, call: dict) -> Iterator[dict]:
        function = call.get("function") or {}
        kind = f"call {call['index']}"
        if self.open != kind:
            yield from self.close("completed")
            blank = {"name": function.get("name"), "arguments": ""}
            item = call_item(call.get("id") or new_id("call_"), blank, "in_progress")
            yield from self.start(kind, item)
        piece = function.get("arguments") or ""
        item = self.output[-1]
        item["arguments"] += piece
        if piece:
            place = {"item_id": item["id"], "output_index": len(self.output) - 1}
            yield self.event("function_call_arguments.delta", **place, delta=piece)

    def start(self, kind: str, item: dict) -> Iterator[dict]:
        self.open = kind
        self.output.append(item)
        place = {"output_index": len(self.output) - 1}
        shown = dict(item)  # as it is before its first piece
        if "content" in item:
            shown["content"] = []
        yield self.event("output_item.added", **place, item=shown)
        if "content" in item:
            yield self.part_event("content_part.added", part=dict(item["content"][0]))

    def close(self, status: str) -> Iterator[dict]:
        """End the open item, if there is one."""
        if not self.open:
            return
        item = self.output[-1]
        place = {"item_id": item["id"], "output_index": len(self.output) - 1}
        if "status" in item:
            item["status"] = status
        if item["type"] == "function_call":
            more = {"name": item["name"], "arguments": item["arguments"]}
            yield self.event("function_call_arguments.done", **place, **more)
        else:
            part = item["content"][0]
            if item["type"] == "message":
                more = {"text": part["text"], "logprobs": part["logprobs"]}
                yield self.part_event("output_text.done", **more)
            else:
                yield self.part_event("reasoning_text.done", text=part["text"])
            yield self.part_event("content_part.done", part=part)
        yield self.event("output_item.done", output_index=place["output_index"], item=item)
        self.open = ""

    def end(self) -> Iterator[dict]:
        """What closes the stream, once the job is done."""
        if not self.output:
            yield from self.text("", [])
        status = status_of(self.finish_reason)
        yield from self.close(status)
        yield self.event(status, response=self.answer.response(status, self.output, [self.job]))

    def failed(self, error: ApiError) -> dict:
        """The last event where the job failed: too late for a status of HTTP."""
        response = self.answer.response("failed", self.output, [self.job])
        response["error"] = {"code": "server_error", "message": error.message}
        return self.event("failed", response=response)
