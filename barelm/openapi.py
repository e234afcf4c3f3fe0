"""/openapi.json: what each address of the server takes and answers, as OpenAPI 3.1 has it. What a
request may say is made of the dataclass that reads it: its fields, their types, limits, defaults
and comments.

A new address is a line of ADDRESSES, beside its line in the server's routes."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, get_args

from barelm import __version__, api, responses_api, vector_api
from barelm.answer_schemas import SCHEMAS, answer_schema
from barelm.attention_maps import AttentionRequest, GridRequest
from barelm.feedback import Feedback
from barelm.guided import LARGEST_BIAS
from barelm.jobs import Sampling
from barelm.lens_requests import LensRequest, PatchRequest, SharesRequest
from barelm.next_token import NextRequest
from barelm.page import NeighboursRequest, TextRequest

if TYPE_CHECKING:
    from dataclasses import Field

    from barelm.api import ServedModel


@dataclass
class NoFields:
    """Of a request that says nothing."""


@dataclass
class Address:
    """What stands in the schema beside what the routes say. body: the dataclass that reads it.
    required: the fields that must be there. neutral, ignored: as `read_fields` takes them. answer:
    of answer_schema. query: {parameter: its schema}. streams: "stream" makes events of it."""

    what: str
    body: type | None = None
    required: tuple[str, ...] = ()
    neutral: dict[str, list] = field(default_factory=dict)
    ignored: dict[str, type] = field(default_factory=dict)
    answer: str = "object"
    query: dict[str, dict] = field(default_factory=dict)
    streams: bool = False


CLIENTS: dict[str, Any] = {"neutral": api.NEUTRAL, "ignored": api.IGNORED}
VECTORS: dict[str, Any] = {"neutral": vector_api.NEUTRAL, "ignored": vector_api.IGNORED}
RESPONSES: dict[str, Any] = CLIENTS | {"neutral": api.NEUTRAL | responses_api.RESPONSE_NEUTRAL}
RUN = {"type": "string"}
STEP = {"type": "integer", "minimum": 1 - 10**14, "maximum": 10**15 - 1}
ADDRESSES = {
    "/v1/completions": Address(
        "A text goes on", api.Completion, ("prompt",), **CLIENTS, answer="Completion", streams=True
    ),
    "/v1/chat/completions": Address(
        "A conversation is answered",
        api.Chat,
        ("messages",),
        **CLIENTS,
        answer="ChatCompletion",
        streams=True,
    ),
    "/v1/responses": Address(
        "The same in OpenAI's newer protocol; nothing is kept between requests",
        responses_api.Respond,
        ("input",),
        **RESPONSES,
        answer="Response",
        streams=True,
    ),
    "/v1/embeddings": Address(
        "Texts as unit vectors", vector_api.Embeddings, ("input",), **VECTORS, answer="Embeddings"
    ),
    "/classify": Address(
        "Labels of texts, of a classifier",
        vector_api.Classify,
        ("input",),
        **VECTORS,
        answer="Classes",
    ),  # fmt: skip
    "/v1/models": Address("The names of the model", answer="Models"),
    "/v1/models/{name}": Address("The model by one of its names", answer="Model"),
    "/tokenize": Address(
        "A text, or a conversation, as ids", api.Tokenize, **CLIENTS, answer="Tokens"
    ),
    "/detokenize": Address("Ids as a text", api.Detokenize, ("tokens",), **CLIENTS, answer="Text"),
    "/tokenizer_info": Address("The special tokens and the chat template"),
    "/health": Address("200 while the engine runs"),
    "/ping": Address("The same, as a probe of other servers asks"),
    "/version": Address("The server's version", answer="Version"),
    "/metrics": Address("Counts, for Prometheus", answer="text/plain"),
    "/openapi.json": Address("This"),
    "/docs": Address("This, to be read", answer="text/html"),
    "/": Address("The page", answer="text/html"),
    "/page/{name}": Address("A file of the page", answer="*/*"),
    "/feedback": Address(
        "A thumb up or down, into the file of --feedback",
        Feedback,
        ("messages", "response", "rating"),
    ),
    "/inspect/model": Address("What the network is made of"),
    "/inspect/neighbours": Address("Tokens with nearest embeddings", NeighboursRequest),
    "/inspect/steps": Address("How a text became its tokens", TextRequest, ("text",)),
    "/inspect/next": Address("The likeliest next tokens, before and after filters", NextRequest),
    "/inspect/attention": Address("What each token attends to", AttentionRequest),
    "/inspect/grid": Address("The attention of all layers and heads, small", GridRequest),
    "/inspect/routing": Address("Which experts each token went to", GridRequest),
    "/inspect/lens": Address("What each layer would say", LensRequest),
    "/inspect/shares": Address("What each part adds to a logit", SharesRequest),
    "/inspect/patch": Address(
        "What a patch of a state restores", PatchRequest, ("clean", "corrupted"), streams=True
    ),
    "/inspect/runs": Address("The runs that have a log"),
    "/inspect/log": Address("A run's log", query={"run": RUN, "after": STEP}),
    "/inspect/log.csv": Address("Logs as a table", query={"run": RUN}, answer="text/csv"),
    "/inspect/reload": Address("Load the weights that a run has saved since", NoFields),
}

# --------------------------------------------------------------------------------------------------
# What a field may be


TEXT = {"type": "string"}
SCHEMA = {"type": "object", "properties": {"name": TEXT, "schema": {"type": "object"}}}
FORMAT = {  # of an answer
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": SCHEMA | {"required": ["schema"]},
            },
            "required": ["type", "json_schema"],
            "additionalProperties": False,
        },
    ]
}
FUNCTION = {"name": TEXT, "description": TEXT, "parameters": {"type": "object"}}
KIND = {"const": "function"}
TOOL = {
    "type": "object",
    "properties": {
        "type": KIND,
        "function": {"type": "object", "properties": FUNCTION, "required": ["name"]},
    },
    "required": ["type", "function"],
}
RESPONSE_TOOL = {
    "type": "object",
    "properties": {"type": KIND} | FUNCTION,
    "required": ["type", "name"],
}
REASONING = {
    "type": "object",
    "properties": {"effort": {"type": ["string", "null"]}},
    "additionalProperties": False,
}
RESPONSE_TEXT = {  # the same in /v1/responses, where a schema stands beside its type
    "type": "object",
    "properties": {
        "verbosity": {"enum": ["medium", None]},
        "format": {"type": ["object", "null"], "properties": {"type": TEXT}, "required": ["type"]},
    },
    "additionalProperties": False,
}
NAMES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def any_of(*schemas: dict) -> dict:
    return {"anyOf": list(schemas)}


def list_of(items: dict) -> dict:
    """A list that is not empty."""
    return {"type": "array", "items": items, "minItems": 1}


def component(name: str) -> dict:
    return {"$ref": f"#/components/schemas/{name}"}


NO = {"enum": [False, None]}
STOPS = {"type": "array", "items": TEXT | {"maxLength": 256}, "maxItems": 16}
BIAS = {"type": "number", "minimum": -LARGEST_BIAS, "maximum": LARGEST_BIAS}
# {field, or class and field: its schema} where the dataclass says too little.
SHAPES: dict[str, dict] = {
    "messages": list_of(component("Message")),
    "Respond.input": any_of(TEXT, list_of(component("Item"))),
    "Tokenize.prompt": TEXT,
    "stop": any_of(TEXT | {"maxLength": 256}, STOPS),
    "logit_bias": {"type": "object", "additionalProperties": BIAS},
    "response_format": FORMAT,
    "structured_outputs": {"type": "object"},
    "truncate_prompt_tokens": {
        "type": "integer",
        "minimum": -1,
        "maximum": 2**31,
        "not": {"const": 0},
    },
    "guided_json": any_of({"type": "object"}, TEXT),
    "guided_regex": TEXT,
    "guided_choice": list_of(TEXT),
    "guided_grammar": TEXT,
    "json_schema": any_of({"type": "object"}, TEXT),
    "grammar": TEXT,
    "tools": {"type": "array", "items": TOOL},
    "Respond.tools": {"type": "array", "items": RESPONSE_TOOL},
    "tool_choice": any_of({"enum": ["none", "auto", "required"]}, {"type": "object"}),
    "reasoning": REASONING,
    "reasoning_format": {"enum": ["none", "auto", "deepseek"]},
    "include": {"type": "array", "items": {"const": responses_api.LOGPROBS}},
    "text": TEXT,
    "Respond.text": RESPONSE_TEXT,
    "stream_options": {
        "type": "object",
        "properties": {
            "include_usage": {"type": ["boolean", "null"]},
            "include_obfuscation": NO,
            "continuous_usage_stats": NO,
        },
        "additionalProperties": False,
    },
    "Respond.stream_options": {
        "type": "object",
        "properties": {"include_obfuscation": NO},
        "additionalProperties": False,
    },
}


def shapes_of_ids(n_vocab: int) -> dict[str, dict]:
    """The same of fields that have ids of a tokenizer in them."""
    id = {"type": "integer", "minimum": 0, "maximum": n_vocab - 1}
    ids = {"type": "array", "items": id}
    text = TEXT | {"minLength": 1}
    return {
        "prompt": any_of(TEXT, list_of(id), list_of(TEXT), list_of(list_of(id))),
        "input": any_of(text, list_of(id), list_of(text), list_of(list_of(id))),
        "stop_token_ids": ids | {"maxItems": 256},
        "ids": ids,
        "then": ids,
        "tokens": ids,
        "token": any_of(id, TEXT),
        "NeighboursRequest.token": id,
        "against": any_of(id, TEXT),
        "answer": any_of(id, TEXT),
        "other": any_of(id, TEXT),
    }


def limits_of(served: ServedModel, n_embd: int) -> dict[str, tuple]:
    """{field: (least, most)} that this model and this server's settings make narrower."""
    most = served.max_len
    return {
        "n": (1, min(128, served.max_queue)),
        "best_of": (1, min(128, served.max_queue)),
        "max_tokens": (0, most - 1),
        "max_completion_tokens": (0, most - 1),
        "max_output_tokens": (1, most - 1),
        "min_tokens": (0, most - 1),
        "dimensions": (1, n_embd),
    }


@lru_cache
def comments_of(request_type: type) -> dict[str, str]:
    """{field: the comment behind it} of a dataclass and those that it is made of."""
    comments = {}
    for cls in request_type.__mro__[-2::-1]:  # all but `object`, the class itself last
        if is_dataclass(cls):
            for line in inspect.getsource(cls).splitlines():
                match = re.match(r"    (\w+): .*\S  # (.+)", line)
                if match:
                    comments[match[1]] = match[2]
    return comments


class Bodies:
    """Schemas of requests to one server."""

    def __init__(self, served: ServedModel, n_embd: int) -> None:
        self.shapes = shapes_of_ids(served.tok.n_vocab) | SHAPES
        self.limits = limits_of(served, n_embd)

    def schema(self, address: Address) -> dict:
        """The schema of a request's JSON."""
        request_type: Any = address.body
        comments = comments_of(request_type)
        types = api.field_types(request_type)
        properties = {}
        for f in fields(request_type):
            schema = self.field_schema(request_type, f, types[f.name])
            if f.name not in address.required:
                schema = or_null(schema)
            if f.name in comments:
                schema = schema | {"description": comments[f.name]}
            properties[f.name] = schema
        for name, values in address.neutral.items():
            properties.setdefault(name, {"enum": distinct([*values, None])} | UNCHANGED)
        for name, type_ in address.ignored.items():
            properties.setdefault(name, {"type": [NAMES[type_], "null"]} | UNCHANGED)
        return {
            "type": "object",
            "properties": properties,
            "required": list(address.required),
            # Null asks for nothing, under whatever name.
            "additionalProperties": True if request_type is NoFields else {"type": "null"},
        }

    def field_schema(self, request_type: type, f: Field, wanted: Any) -> dict:
        shape = self.shapes.get(f"{request_type.__name__}.{f.name}", self.shapes.get(f.name))
        default = {}
        if f.default not in (MISSING, None):
            default = {"default": f.default}
        if shape is not None:
            return shape | default
        if f.metadata.get("words"):
            return {"enum": list(f.metadata["words"])} | default
        if get_args(wanted):  # the int of `int | None`
            wanted = get_args(wanted)[0]
        schema: dict = {"type": NAMES[wanted]} if wanted in NAMES else {}
        limits = f.metadata.get("limits")
        if issubclass(request_type, (Sampling, vector_api.Embeddings)):
            limits = self.limits.get(f.name, limits)
        if limits is not None:
            schema |= {"minimum": limits[0], "maximum": limits[1]}
        return schema | default


UNCHANGED = {"x-unchanged": True, "description": "accepted where it changes nothing"}


def or_null(schema: dict) -> dict:
    """The schema, or null, which asks for the default."""
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    if isinstance(schema.get("type"), str):
        return schema | {"type": [schema["type"], "null"]}
    return schema


def distinct(values: list) -> list:
    """The values without those that are the same in JSON, as 1 and 1.0 are."""
    others: list = []
    for value in values:
        if not any(value == other and (value is True) == (other is True) for other in others):
            others.append(value)
    return others


# --------------------------------------------------------------------------------------------------
# The document


def describe(routes: list[tuple], served: ServedModel, n_embd: int, has_key: bool) -> dict:
    """The document for these routes, [(methods, path, handler)]. n_embd: the size of the model's
    vectors. has_key: whether clients are asked for one."""
    bodies = Bodies(served, n_embd)
    paths: dict[str, dict] = {}
    for methods, route, _ in routes:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", route)
        for method in methods.split():
            if method != "HEAD":  # the same as GET, without the body
                address = ADDRESSES.get(path, Address("An address of this server"))
                operation = describe_operation(address, method, path, bodies)
                paths.setdefault(path, {})[method.lower()] = operation
    components: dict = {"schemas": SCHEMAS}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "barelm", "version": __version__},
        "paths": paths,
        "components": components,
    }
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def describe_operation(address: Address, method: str, path: str, bodies: Bodies) -> dict:
    words = re.findall(r"\w+", path)
    operation: dict = {
        "summary": address.what,
        "operationId": "_".join([method.lower(), *words]),
        "responses": {"200": answer_schema(address.answer, address.streams)} | ERRORS,
    }
    names = re.findall(r"\{(\w+)\}", path)
    parameters = [parameter(name, "path", TEXT, True) for name in names]
    for name, schema in address.query.items():
        parameters.append(parameter(name, "query", schema, False))
    if parameters:
        operation["parameters"] = parameters
    if method == "POST" and address.body is not None:
        schema = bodies.schema(address)
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def parameter(name: str, where: str, schema: dict, required: bool) -> dict:
    return {"name": name, "in": where, "required": required, "schema": schema}


ERROR = {
    "description": "What is wrong, in which field",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
ERRORS = {"4XX": ERROR, "5XX": ERROR}
