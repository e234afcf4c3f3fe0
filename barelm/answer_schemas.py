"""What the server's answers look like, in JSON Schema: the other half of barelm/openapi.py."""

from __future__ import annotations

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
NUMBER = {"type": "number"}
IDS = {"type": "array", "items": COUNT}


def ref(name: str) -> dict:
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: dict) -> dict:
    return {"type": "array", "items": items}


def nullable(schema: dict) -> dict:
    return {"anyOf": [schema, {"type": "null"}]}


def of(**properties: dict) -> dict:
    """An object that has these, all of them, and perhaps more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def with_optional(schema: dict, **properties: dict) -> dict:
    """An object that may have these beside what the schema says."""
    return schema | {"properties": schema["properties"] | properties}


REASON = {"enum": ["stop", "length", "tool_calls"]}
USAGE = of(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=of(cached_tokens=COUNT),
)
TOKEN = of(token=TEXT, logprob=NUMBER, bytes=IDS)
COMPLETION_LOGPROBS = of(
    tokens=array(TEXT),
    token_logprobs=array(nullable(NUMBER)),
    top_logprobs=array(nullable({"type": "object", "additionalProperties": NUMBER})),
    text_offset=array(COUNT),
)
CALL = of(id=TEXT, type={"const": "function"}, function=of(name=TEXT, arguments=TEXT))
ANSWER = with_optional(
    of(role={"const": "assistant"}, content={"type": ["string", "null"]}),
    reasoning_content=TEXT,
    tool_calls=array(CALL),
)
COMPLETION_CHOICE = of(
    index=COUNT, text=TEXT, logprobs=nullable(COMPLETION_LOGPROBS), finish_reason=REASON
)
CHAT_LOGPROBS = of(content=array(with_optional(TOKEN, top_logprobs=array(TOKEN))))
CHAT_CHOICE = of(
    index=COUNT, message=ANSWER, logprobs=nullable(CHAT_LOGPROBS), finish_reason=REASON
)


def only(properties: dict, required: list[str]) -> dict:
    """An object of a request: these fields and no others."""
    head = {"type": "object", "properties": properties, "required": required}
    return head | {"additionalProperties": False}


# What messages of a chat, and items of a response's input, may be.
NAME = {"type": ["string", "null"]}
PARTS = array(only({"type": {"const": "text"}, "text": TEXT}, ["text"]))
SAID = {"anyOf": [TEXT, PARTS]}
FUNCTION = of(name=TEXT, arguments={"type": ["string", "object"]})
ASKED_CALL = of(function=FUNCTION)
ASKED_CALL["properties"] |= {"id": NAME, "type": {"const": "function"}}
ASKED = only(
    {"role": {"enum": ["system", "developer", "user"]}, "content": SAID, "name": NAME},
    ["role", "content"],
)
SPOKEN = {
    "role": {"const": "assistant"},
    "content": SAID,
    "name": NAME,
    "reasoning_content": NAME,
    "tool_calls": array(ASKED_CALL) | {"maxItems": 128},
}
CALLED = SPOKEN | {
    "content": {"anyOf": [*SAID["anyOf"], {"type": "null"}]},
    "tool_calls": array(ASKED_CALL) | {"minItems": 1, "maxItems": 128},
}
GIVEN = only(
    {"role": {"const": "tool"}, "content": SAID, "tool_call_id": NAME, "name": NAME},
    ["role", "content"],
)
PART_KINDS = {"enum": ["input_text", "output_text", "text", "reasoning_text"]}
ITEM_PARTS = array(only({"type": PART_KINDS, "text": TEXT}, ["type", "text"]))
ITEM_TEXT = {"anyOf": [TEXT, ITEM_PARTS]}
ID = {"id": NAME, "status": NAME}
ROLES = {"enum": ["system", "developer", "user", "assistant"]}
ITEM = {
    "anyOf": [
        only(
            ID
            | {"type": {"enum": ["message", None]}, "role": ROLES}
            | {"content": ITEM_TEXT, "phase": NAME},
            ["role", "content"],
        ),
        only(
            ID
            | {"type": {"const": "function_call"}, "call_id": TEXT, "name": TEXT}
            | {"arguments": TEXT, "namespace": NAME},
            ["type", "call_id", "name", "arguments"],
        ),
        only(
            ID | {"type": {"const": "function_call_output"}, "call_id": TEXT, "output": ITEM_TEXT},
            ["type", "call_id", "output"],
        ),
        only(
            ID
            | {"type": {"const": "reasoning"}, "content": ITEM_PARTS}
            | {"summary": array({}), "encrypted_content": NAME},
            ["type"],
        ),
    ]
}
MODEL = of(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT, max_model_len=COUNT)

SCHEMAS = {
    "Error": of(
        error=of(
            message=TEXT,
            type=TEXT,
            param={"type": ["string", "null"]},
            code={"type": ["string", "null"]},
        )
    ),
    "Message": {
        "anyOf": [
            ASKED,
            only(SPOKEN, ["role", "content"]),
            only(CALLED, ["role", "tool_calls"]),
            GIVEN,
        ]
    },
    "Item": ITEM,
    "Completion": of(
        id=TEXT,
        object={"const": "text_completion"},
        created=COUNT,
        model=TEXT,
        choices=array(COMPLETION_CHOICE),
        usage=USAGE,
    ),
    "ChatCompletion": of(
        id=TEXT,
        object={"const": "chat.completion"},
        created=COUNT,
        model=TEXT,
        choices=array(CHAT_CHOICE),
        usage=USAGE,
    ),
    "Response": of(
        id=TEXT,
        object={"const": "response"},
        created_at=COUNT,
        model=TEXT,
        status={"enum": ["completed", "incomplete"]},
        output=array({"type": "object", "required": ["id", "type"]}),
        usage=of(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT),
    ),
    "Embeddings": of(
        object={"const": "list"},
        data=array(
            of(
                object={"const": "embedding"},
                index=COUNT,
                embedding={"anyOf": [array(NUMBER), TEXT]},
            )
        ),
        model=TEXT,
        usage=of(prompt_tokens=COUNT, total_tokens=COUNT),
    ),
    "Classes": of(
        object={"const": "list"},
        data=array(of(index=COUNT, label=TEXT, probs=array(NUMBER), num_classes=COUNT)),
        model=TEXT,
        usage=of(prompt_tokens=COUNT, total_tokens=COUNT),
    ),
    "Model": MODEL,
    "Models": of(object={"const": "list"}, data=array(ref("Model"))),
    "Tokens": of(tokens=IDS, count=COUNT, max_model_len=COUNT),
    "Text": of(prompt=TEXT),
    "Version": of(version=TEXT),
}


def answer_schema(answer: str, streams: bool) -> dict:
    """A response of OpenAPI's. answer: a name above, "object" for any JSON, or a media type.
    streams: it may also be events."""
    if "/" in answer:
        content: dict = {answer: {}}
    elif answer == "object":
        content = {"application/json": {"schema": {"type": "object"}}}
    else:
        content = {"application/json": {"schema": ref(answer)}}
    if streams:
        content["text/event-stream"] = {}
    return {"description": "The answer", "content": content}
