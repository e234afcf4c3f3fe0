"""What a request may say, in OpenAI's protocol: a JSON object in, jobs for the engine out. Nothing
here knows HTTP; barelm/answers.py has the way back.

A request is a dataclass below: a field's name, type, default and limits stand in one line, and
`read_fields` checks them. Whatever else a client sends is refused by name rather than ignored, but
for the values that ask for what is done anyway (NEUTRAL). A new field that changes how tokens are
chosen, such as min_tokens, is a line in `jobs.Sampling`, one in `sampling.OFF` with its part in
`kinds_of` and its use there, and where a type and limits do not check it, a line in
`finish_reading`: what the engine's thread raises ends all requests of the batch.
"""

from __future__ import annotations

import difflib
import json
import random
import time
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from barelm import messages
from barelm.answers import decode, token_name
from barelm.filling import middle_tokens
from barelm.guided import FormError, has_form, read_bias, read_grammar
from barelm.jobs import Job, Sampling, limited, one_of
from barelm.messages import FieldError
from barelm.run import UserError
from barelm.tool_forms import form_named
from barelm.tool_use import plan_chat, read_text_rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from barelm.many_adapters import Adapters
    from barelm.tokenizer import Tokenizer


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and what OpenAI's clients read of it. param: the
    field that is wrong. code: a word for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict:
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def short(value: object) -> str:
    """A value as an error message shows it."""
    text = type(value).__name__ if isinstance(value, (list, dict)) else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class ServedModel:
    """The model that requests are answered by, and the limits of one."""

    name: str  # what answers call it: by default its folder's
    tok: Any  # its Tokenizer
    max_len: int  # tokens of a prompt and its answer
    max_queue: int  # sequences of a request, at most
    seed: int | None = None  # of requests that bring none; None: another for each
    refusal: str = ""  # why it continues no text; "": it does
    is_seq2seq: bool = False  # a prompt is a source of max_len tokens, and so may its answer be
    tool_form: str | None = None  # of calls, where the chat template is not to say it
    aliases: list = field(default_factory=list)  # other names that requests may call it by
    adapter: int = 0  # which of the engine's adapters it is; 0: the base, without any
    parent: str | None = None  # an adapter's base
    adapters: dict = field(default_factory=dict)  # {name: ServedModel} of a base's
    longest_token: int = field(init=False)  # in bytes
    turn_ends: list = field(init=False)  # ids that end an answer in a chat
    card: dict = field(init=False)  # what /v1/models shows of it

    def __post_init__(self):
        if self.tool_form:
            form_named(self.tool_form)
        self.longest_token = max(len(token) for token in self.tok.bytes.values())
        self.turn_ends = chat_ends(self.tok)
        self.card = {
            "id": self.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "barelm",
            "max_model_len": self.max_len,
        }

    def cards(self) -> list[dict]:
        """What /v1/models shows: a model for each name, the first of which answers tell."""
        others = [self.card | {"id": alias, "root": self.name} for alias in self.aliases]
        for adapter in self.adapters.values():  # vLLM's fields of one
            others.append(adapter.card | {"root": adapter.name, "parent": self.name})
        return [self.card | {"root": self.name}, *others]

    def with_adapters(self, adapters: Adapters) -> ServedModel:
        """Serve adapters by their names beside this model, in place."""
        for i, (name, tok) in enumerate(zip(adapters.names, adapters.toks)):
            if name in (self.name, *self.aliases):
                raise UserError(f"--adapters: {name} is a name of the base (--name)")
            one = replace(self, name=name, tok=tok, aliases=[], adapter=i + 1, parent=self.name)
            one.adapters = {}
            self.adapters[name] = one
        return self


def chat_ends(tok: Tokenizer) -> list[int]:
    """The ids that end an answer in a chat, beside the tokenizer's end tokens."""
    if not tok.config.get("chat_template"):
        return []
    try:
        return tok.end_of_turn()
    except UserError as error:  # completions need no template
        print(f"chat ends at the end token alone: {error}")
        return []


# --------------------------------------------------------------------------------------------------
# The requests. A default of None: null, or nothing. A field of type object is checked where it is
# read.


@dataclass
class StreamOptions:
    include_usage: bool = False


@dataclass
class Generation(Sampling):
    """What both kinds of requests for text have, beside the fields of Sampling."""

    model: str | None = None
    max_tokens: int | None = limited(None, 0, 2**31)
    n: int = limited(1, 1, 128)  # answers to each prompt
    ignore_eos: bool = False  # go on behind an end token
    truncate_prompt_tokens: int | None = limited(None, -1, 2**31)  # keep so many; -1: what fits
    truncation_side: str | None = one_of("left", "right")  # left, the usual: it keeps the last
    return_token_ids: bool = False  # the prompt's and the answer's, beside the text
    return_tokens_as_token_ids: bool = False  # in log-probabilities a token is called token_id:7
    # What the answer may be: barelm/guided.py. None of these is looked at before read_form.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    json_schema: Any = None
    grammar: Any = None
    stream: bool = False
    stream_options: dict = field(default_factory=dict)  # StreamOptions, when read

    compiled = None  # no field of a request: its Grammar, by read_form
    plan = None  # no field either: the ChatPlan of a chat, by read_conversation


@dataclass
class Completion(Generation):
    prompt: Any = None  # a text, ids, or a list of either
    echo: bool = False  # answer with the prompt before the text
    logprobs: int | None = limited(None, 0, 20)  # alternatives of each token
    best_of: int | None = limited(None, 1, 128)  # make so many, answer with the n likeliest
    suffix: str | None = None  # what stands behind the answer: the prompt and it have a gap
    add_special_tokens: bool = True


@dataclass
class TemplateFields:
    """What a chat says beside its messages to the template, and of how to read its answers."""

    tools: list = field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True  # more calls in an answer than one
    chat_template_kwargs: dict = field(default_factory=dict)  # the template's own variables
    reasoning_effort: str | None = None
    include_reasoning: bool = True  # answer with the thoughts, in reasoning_content
    reasoning_format: str | None = None  # none: thoughts are part of the text


@dataclass
class Chat(TemplateFields, Generation):
    messages: list = field(default_factory=list)
    logprobs: bool = False
    top_logprobs: int = limited(0, 0, 20)
    max_completion_tokens: int | None = limited(None, 0, 2**31)
    add_generation_prompt: bool | None = None  # false where the last answer is continued
    continue_final_message: bool = False  # go on with the last message, an assistant's


@dataclass
class Tokenize(TemplateFields):
    prompt: str | None = None
    messages: list | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool = False


@dataclass
class Detokenize:
    tokens: Any = None
    model: str | None = None


# What changes no answer, so that any value of its type may be there: names of the client's own, and
# llama.cpp's settings of samplers that are off here (NEUTRAL refuses to turn them on).
IGNORED: dict[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "metadata": dict,
    "prediction": dict,  # it would make the same answer faster
    "prompt_cache_options": dict,
    "session_id": str,
    "guided_decoding_backend": str,
    "dry_sequence_breakers": list,
    "dry_base": float,
    "mirostat_tau": float,
    "mirostat_eta": float,
    "xtc_threshold": float,
    "dry_allowed_length": int,
    "dry_penalty_last_n": int,
    "dynatemp_exponent": float,
}
# What this server does not have, with the values that ask for what it does anyway. These may be
# there; any other is refused, so that none is taken and ignored.
NEUTRAL: dict[str, list] = {
    # OpenAI's
    "function_call": ["none", "auto"],
    "functions": [[]],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],  # no tool is called
    "reasoning_effort": ["none"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "verbosity": ["medium"],
    # vLLM's
    "add_generation_prompt": [True],
    "add_special_tokens": [False],  # of a chat, whose template puts what it wants
    "bad_words": [[]],
    "chat_template_kwargs": [{}],
    "continue_final_message": [False],  # of a prompt, which is continued anyway
    "detokenize": [True],
    "documents": [[]],
    "early_stopping": [False],
    "echo": [False],
    "flat_logprobs": [False],
    "include_reasoning": [True, False],  # none is told apart from the answer
    "include_stop_str_in_output": [False],
    "length_penalty": [1, 1.0],
    "logits_processors": [[]],
    "mm_processor_kwargs": [{}],
    "priority": [0],
    "return_token_ids": [False],
    "return_tokens_as_token_ids": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True, False],  # the text has no special tokens
    "routed_experts_prompt_start": [0],
    "return_mm_kwargs": [True, False],  # of images, which none are read
    "return_prompt_text": [False],
    "return_token_offsets": [False],
    "stream_interval": [1],
    "thinking_token_budget": [-1],
    "use_beam_search": [False],
    "vllm_xargs": [{}],
    "watermarking": [False],
    # llama.cpp's
    "cache_prompt": [True],
    "dry_multiplier": [0, 0.0],
    "dynatemp_range": [0, 0.0],
    "id_slot": [-1],
    "lora": [[]],
    "min_keep": [0],
    "mirostat": [0],
    "n_cache_reuse": [0],
    "n_cmpl": [1],
    "n_discard": [0],
    "n_indent": [0],
    "n_keep": [0],
    "n_probs": [0],
    "parse_tool_calls": [False],
    "penalize_nl": [False],
    "post_sampling_probs": [False],
    "reasoning_format": ["none"],
    "repeat_last_n": [-1],
    "repeat_penalty": [1, 1.0],
    "response_fields": [[]],
    "return_progress": [False],
    "return_tokens": [False],
    "sse_ping_interval": [-1],
    "t_max_predict_ms": [0],
    "tfs_z": [1, 1.0],
    "thinking_forced_open": [False],
    "timings_per_token": [False],
    "top_n_sigma": [-1, -1.0],
    "typical_p": [1, 1.0],
    "xtc_probability": [0, 0.0],
}
NEWER = {"functions": "tools", "function_call": "tool_choice"}  # these are not done
STREAM_NEUTRAL = {"include_obfuscation": [False], "continuous_usage_stats": [False]}

TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def is_one_of(value: object, others: Iterable) -> bool:
    """Whether it is one of these values of JSON, of the same type too: True is not 1."""
    return any(type(value) is type(other) and value == other for other in others)


def is_type(value: object, wanted: type) -> bool:
    """Whether a value of JSON is of this type; a whole number is a number too, true is neither."""
    return type(value) is wanted or (wanted is float and type(value) is int)


@lru_cache
def field_types(request_type: type) -> dict[str, Any]:
    """{field: its type} of a dataclass, also where its module's hints are text (PEP 563)."""
    return get_type_hints(request_type)


def read_fields(
    body: dict,
    request_type: type,
    neutral: dict[str, list] = NEUTRAL,
    ignored: dict[str, type] = IGNORED,
    limits: dict[str, tuple] | None = None,
) -> Any:
    """A request_type made of the JSON object `body`, checked; null asks for the default.
    neutral, ignored: what other fields may be. limits: {field: (least, most)} that only the model
    knows."""
    own_fields = {f.name: f for f in fields(request_type)}
    for name, value in body.items():
        if name not in own_fields:
            check_other(name, value, own_fields, neutral, ignored)
    values = {}
    types = field_types(request_type)
    for name, f in own_fields.items():
        value = body.get(name)
        if value is None:
            continue
        wanted = types[name]
        if get_args(wanted):  # the int of `int | None`
            wanted = get_args(wanted)[0]
        if wanted not in (Any, object):
            own_limits = f.metadata.get("limits")
            check_value(name, value, wanted, (limits or {}).get(name, own_limits))
        words = f.metadata.get("words")
        if words and value not in words:
            why = f"{name} = {short(value)}: expected {' or '.join(words)}"
            raise ApiError(400, why, name)
        values[name] = value
    return request_type(**values)


def check_value(name: str, value: object, wanted: type, limits: tuple | None) -> None:
    if is_type(value, wanted) and (limits is None or limits[0] <= value <= limits[1]):
        return
    expected = TYPE_NAMES[wanted]
    if limits is not None:
        expected += f" from {limits[0]} to {limits[1]}"
    raise ApiError(400, f"{name} = {short(value)}: expected {expected}", name)


def check_other(
    name: str,
    value: object,
    own_names: Iterable[str],
    neutral: dict[str, list],
    ignored: dict[str, type],
) -> None:
    """Refuse a field that the request does not have, unless it asks for nothing that is not done
    anyway."""
    if value is None or is_one_of(value, neutral.get(name, [])):
        return
    if name in ignored:
        check_value(name, value, ignored[name], None)
        return
    name = name[:60]
    hint = ""
    if name in NEWER:
        hint = f": OpenAI's older form; {NEWER[name]} is the newer one"
    elif name in neutral:
        expected = " or ".join(json.dumps(other) for other in neutral[name])
        hint = f": expected {expected}, not {short(value)}"
    else:
        near = difflib.get_close_matches(name, own_names, 1)
        if near:
            hint = f" (did you mean {near[0]!r}?)"
    raise ApiError(400, f"{short(name)} is not supported{hint}", name)


def parse_body(data: bytes) -> dict:
    """The JSON object of a request's bytes."""

    def refuse(word):  # NaN and Infinity, which json.loads would take
        raise ValueError(f"{word} is no number of JSON's")

    try:
        body = json.loads(data.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {short(str(error))}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"expected a JSON object, not {short(body)}")
    return body


def check_model(served: ServedModel, name: str | None) -> None:
    """Refuse a request for a model that is not here, or for an adapter where only its base
    answers."""
    if model_of(served, name) is not None:
        why = f"{name} is an adapter, which this address does not know: ask for {served.name!r}"
        raise ApiError(400, why, "model")


def addressed(served: ServedModel, body: dict) -> ServedModel:
    """Which model a request's body asks for: this one, or one of its adapters."""
    name = body.get("model")
    return served.adapters.get(name, served) if isinstance(name, str) else served


def model_of(served: ServedModel, name: str | None) -> str | None:
    """Which adapter a request's `model` asks for; None: the model itself, as no name is too."""
    if name is None or name == served.name or name in served.aliases:
        return None
    if name in served.adapters:
        return name
    all_names = [served.name, *served.aliases, *served.adapters]
    names = " or ".join(repr(one) for one in all_names)
    why = f"no model {short(name)} here: this server has {names}"
    raise ApiError(404, why, "model", "model_not_found")


def check_continues(served: ServedModel) -> None:
    if served.refusal:
        raise ApiError(400, f"{served.name} {served.refusal}", code="model_not_supported")


def read_completion(served: ServedModel, body: dict) -> Completion:
    check_continues(served)
    request = read_fields(body, Completion)
    if request.echo and served.is_seq2seq:
        raise ApiError(400, "echo: a source is no part of its answer", "echo")
    check_best_of(request)
    check_suffix(served, request)
    finish_reading(served, request)
    for name in ("truncate_prompt_tokens", "return_token_ids"):
        if request.echo and getattr(request, name):
            why = f"not with {name}: a prompt is answered whole, as it was given"
            raise ApiError(400, f"echo: {why}", "echo")
    return request


def check_best_of(request: Completion) -> None:
    if request.best_of is None:
        return
    if request.best_of < request.n:
        why = f"expected n = {request.n} or more, of which the n likeliest are answered"
        raise ApiError(400, f"best_of = {request.best_of}: {why}", "best_of")
    if request.stream and request.best_of > request.n:
        why = "not in a stream: which are the likeliest is known at the end"
        raise ApiError(400, f"best_of = {request.best_of}: {why}", "best_of")


def check_suffix(served: ServedModel, request: Completion) -> None:
    if not request.suffix:
        return
    if middle_tokens(served.tok) is None:
        why = "this model's tokenizer has no tokens for a text with a gap (<|fim_middle|>)"
        raise ApiError(400, f"suffix: {why}", "suffix")
    if request.echo:
        raise ApiError(400, "suffix: not with echo, which tells of the text before", "suffix")


def read_chat(served: ServedModel, body: dict) -> Chat:
    check_continues(served)
    request = read_fields(body, Chat)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs wants logprobs = true beside it", "top_logprobs")
    finish_reading(served, request)
    check_prompt_kind(request)
    if request.max_tokens is None:  # OpenAI's older name for a chat's limit
        request.max_tokens = request.max_completion_tokens
    if request.max_completion_tokens not in (None, request.max_tokens):
        why = "max_tokens and max_completion_tokens are two names of one limit: give one of them"
        raise ApiError(400, why, "max_tokens")
    return request


def check_prompt_kind(request: Chat) -> None:
    """A chat's prompt ends with the header of a new answer, or inside the last one."""
    wants_header = request.add_generation_prompt
    name = "add_generation_prompt"
    if wants_header and request.continue_final_message:
        why = "a new answer and continue_final_message: expected one of the two"
        raise ApiError(400, f"{name} = true: {why}", name)
    if wants_header is False and not request.continue_final_message:
        why = "only with continue_final_message = true: the model writes an answer"
        raise ApiError(400, f"{name} = false: {why}", name)


def finish_reading(served: ServedModel, request: Generation) -> None:
    """What is more than types and limits, of both kinds of Generation."""
    request.stream_options = read_fields(
        request.stream_options, StreamOptions, neutral=STREAM_NEUTRAL, ignored={}
    )
    request.stop = read_stop(request.stop)
    check_token_ids(served, "stop_token_ids", request.stop_token_ids)
    try:
        request.logit_bias = read_bias(served.tok, request.logit_bias)
    except FormError as error:
        raise ApiError(400, str(error), error.field) from None
    request.top_k = max(request.top_k, 0)  # -1 is vLLM's for all
    if request.seed is None:
        request.seed = random.getrandbits(48) if served.seed is None else served.seed
    check_model(served, request.model)


def check_token_ids(served: ServedModel, name: str, ids: list) -> None:
    if len(ids) > 256 or not is_ids(served.tok, ids):
        why = f"expected up to 256 ids from 0 to {served.tok.n_vocab - 1}"
        raise ApiError(400, f"{name}: {why}", name)


def asks_for_form(request: Generation) -> bool:
    """Whether there is something for read_form."""
    return bool(request.plan and request.plan.tools) or has_form(request)


def read_form(served: ServedModel, request: Generation) -> None:
    """Compile what the request says of its answer's form. It may take long: the server calls it in
    a thread of its own."""
    plan = request.plan
    try:
        if plan is not None and (plan.tools or plan.thoughts):
            text_rule = checked(read_text_rule, served.tok, request, bool(plan.tools))
            request.compiled = checked(plan.compile, served.tok, text_rule)
            if plan.tools or text_rule:
                return
        request.compiled = read_grammar(served.tok, request)
    except FormError as error:
        raise ApiError(400, str(error), error.field) from None


def read_stop(stop: str | list[str] | None) -> list[str]:
    """The texts of `stop`, one or several; an empty one stops nothing."""
    texts = [stop] if isinstance(stop, str) else stop
    good = isinstance(texts, list) and len(texts) <= 16
    if not good or not all(isinstance(text, str) and len(text) <= 256 for text in texts):
        raise ApiError(400, "stop: expected a string, or up to 16, of up to 256 characters", "stop")
    return [text for text in texts if text]


# --------------------------------------------------------------------------------------------------
# Prompts. What tokenizes may take long: the server calls these in a thread of their own.


def too_long(served: ServedModel, what: str) -> ApiError:
    both = "each of a source and its answer" if served.is_seq2seq else "a prompt and its answer"
    why = f"{what} do not fit the {served.max_len} tokens for {both}"
    return ApiError(400, why, code="context_length_exceeded")


def check_length(served: ServedModel, n_characters: int) -> None:
    """Refuse a text that is sure not to fit, before it costs the time to tokenize it."""
    # A token has longest_token bytes at most, and a character one at least. Four times as long, to
    # be sure where a normalizer shortens the text.
    if n_characters > 4 * served.longest_token * served.max_len:
        raise too_long(served, f"{n_characters} characters")


def tokenized(f: Callable, *args: Any) -> Any:
    """f(*args), which tokenizes; what it refuses is the client's error."""
    try:
        return f(*args)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    except BaseException as error:  # tiktoken panics where its regular expressions fail
        raise ApiError(400, f"not to be tokenized: {short(str(error))}") from None


def is_ids(tok: Tokenizer, value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < tok.n_vocab for i in value)


def encode_text(served: ServedModel, text: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text that is to be continued, or answered, or of the bare text."""
    check_length(served, len(text))
    if served.is_seq2seq and add_special_tokens:
        return tokenized(served.tok.source, text)
    return tokenized(served.tok.prompt if add_special_tokens else served.tok.encode, text)


def read_prompts(served: ServedModel, request: Completion) -> list[list[int]]:
    """The prompts of a completion, [ids]: given as a text, as ids, or as a list of either."""
    value = request.prompt
    # A list of whole numbers is one prompt as ids. type(): true is an int to isinstance.
    is_one = not isinstance(value, list) or (value and type(value[0]) is int)
    prompts = [value] if is_one else value
    if len(prompts) > served.max_queue:
        raise ApiError(400, f"{len(prompts)} prompts: expected {served.max_queue} at most")
    if prompts and all(isinstance(prompt, str) for prompt in prompts):
        check_length(served, max(len(text) for text in prompts))
        prompts = [encode_text(served, text, request.add_special_tokens) for text in prompts]
    if not prompts or not all(ids and is_ids(served.tok, ids) for ids in prompts):
        why = f"expected a text, or ids from 0 to {served.tok.n_vocab - 1}, or a list of either"
        raise ApiError(400, f"prompt: {why}; none of them empty", "prompt")
    if request.suffix:
        return with_suffix(served, request, prompts)
    return prompts


def with_suffix(
    served: ServedModel, request: Completion, prompts: list[list[int]]
) -> list[list[int]]:
    """The ids of texts with a gap before the suffix, which the answer fills."""
    tok = served.tok
    prefix_id, suffix_id, middle_id = middle_tokens(tok)
    check_length(served, len(request.suffix))
    behind = [suffix_id, *tokenized(tok.encode, request.suffix), middle_id]
    joined = []
    for ids in prompts:
        n_start = 0  # what the tokenizer begins a text with stays the first
        if request.add_special_tokens and ids[: len(tok.start)] == tok.start:
            n_start = len(tok.start)
        joined.append([*ids[:n_start], prefix_id, *ids[n_start:], *behind])
    return joined


def truncated(served: ServedModel, request: Generation, ids: list[int]) -> list[int]:
    """What stays of a prompt, as vLLM has it: its last tokens, or its first."""
    n = request.truncate_prompt_tokens
    if n is None:
        return ids
    if n == -1:
        n = served.max_len - max(request.max_tokens or 1, 1)
    if n < 1:
        why = "expected 1 or more, or -1: as many as fit before max_tokens"
        raise ApiError(400, f"truncate_prompt_tokens: {why}", "truncate_prompt_tokens")
    return ids[:n] if request.truncation_side == "right" else ids[-n:]


def read_message(message: Any, where: str) -> dict:
    """A message with what it says; `where` it stands, for what is wrong."""
    return checked(messages.read_message, message, where)


def checked(f: Callable, *args: Any) -> Any:
    """f(*args), which reads a part of a request; what it refuses is the client's error."""
    try:
        return f(*args)
    except FieldError as error:
        raise ApiError(400, str(error), error.field) from None


TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")  # that the template shows


def read_conversation(served: ServedModel, request: Chat | Tokenize) -> list[int]:
    """The ids of a conversation, ready for the answer, or for more of the last one."""
    if served.is_seq2seq:
        why = "this model reads a source and answers it: ask /v1/completions, the source as prompt"
        raise ApiError(400, why, "messages")
    given = request.messages
    if not given:
        raise ApiError(400, "messages: expected a list of {'role', 'content'}", "messages")
    if len(given) > served.max_len:
        raise too_long(served, f"{len(given)} messages")
    talk = [read_message(message, f"messages[{i}]") for i, message in enumerate(given)]
    sizes = [checked(messages.size_of, talk)]
    sizes += [checked(messages.size_of, getattr(request, name), name) for name in TEMPLATE_FIELDS]
    check_length(served, sum(sizes))
    plan = checked(plan_chat, served.tok, request, served.tool_form)
    request.plan = plan
    talk = plan.messages(talk)
    if request.continue_final_message:
        if talk[-1]["role"] != "assistant" or talk[-1].get("tool_calls"):
            why = "continue_final_message: expected an assistant's message of text at the end"
            raise ApiError(400, why, "continue_final_message")
        ids = tokenized(served.tok.chat_to_continue, talk, plan.extra())
    else:
        # True: ready for the answer
        ids, _ = tokenized(served.tok.chat, talk, True, "none", plan.extra())
    begun = talk[-1]["content"] if request.continue_final_message else None
    plan.see_prompt(served.tok.decode(ids[-64:]), begun)
    return ids


def tokenize(served: ServedModel, body: dict) -> dict:
    """The answer to /tokenize: the ids of {"prompt"}, a text (bare where "add_special_tokens" is
    false), or of {"messages"}. A bare prompt that is the name of a special token is that token: so
    lm-eval finds out its id."""
    request = read_fields(body, Tokenize)
    check_model(served, request.model)
    text = request.prompt
    is_bare = request.add_special_tokens is False
    if text is None and request.add_special_tokens:
        why = "the chat template alone adds special tokens to messages"
        raise ApiError(400, f"add_special_tokens = True: {why}", "add_special_tokens")
    if text is not None and request.messages is not None:
        raise ApiError(400, "expected prompt or messages, not both", "messages")
    check_prompt_kind(request)
    if text is not None and request.continue_final_message:
        raise ApiError(400, "continue_final_message: of messages alone", "continue_final_message")
    if text is None:
        ids = read_conversation(served, request)
    elif is_bare and text in served.tok.special:
        ids = [served.tok.special[text]]
    else:
        ids = encode_text(served, text, not is_bare)
    answer = {"tokens": ids, "count": len(ids), "max_model_len": served.max_len}
    if request.return_token_strs:
        answer["token_strs"] = [token_name(served.tok, id) for id in ids]
    return answer


def detokenize(served: ServedModel, body: dict) -> dict:
    tok = served.tok
    request = read_fields(body, Detokenize)
    check_model(served, request.model)
    if not is_ids(tok, request.tokens):
        raise ApiError(400, f"tokens: expected ids from 0 to {tok.n_vocab - 1}", "tokens")
    return {"prompt": tok.decode(request.tokens)}


def tokenizer_info(tok: Tokenizer) -> dict:
    """The names of the special tokens, null for one that there is not, and the chat template."""
    end_id = tok.eos_ids[0] if tok.eos_ids else None
    special = {"bos_token": tok.bos_id, "eos_token": end_id, "pad_token": tok.pad_id}
    names = {role: None if id is None else tok.decode([id]) for role, id in special.items()}
    return names | {"chat_template": tok.config.get("chat_template")}


# --------------------------------------------------------------------------------------------------
# Jobs


def completion_jobs(
    served: ServedModel, request: Completion, prompts: list[list[int]], listener: Callable
) -> list[Job]:
    """n jobs for each prompt, [ids]; a job's index is its choice's."""
    echoes = [None] * len(prompts)
    if request.echo:
        echoes = [decode(served.tok, ids) for ids in prompts]
        if isinstance(request.prompt, str):
            echoes = [request.prompt]
        elif isinstance(request.prompt[0], str):
            echoes = request.prompt
    ends = [*served.tok.eos_ids]
    if request.suffix:
        ends += middle_tokens(served.tok) or ()  # another gap
    return make_jobs(
        served,
        request,
        prompts,
        listener,
        echoes,
        ends=ends,
        n_alternatives=request.logprobs,
        usual_limit=16,  # OpenAI's
        n_each=request.best_of or request.n,
    )


def chat_jobs(served: ServedModel, request: Chat, ids: list[int], listener: Callable) -> list[Job]:
    """n jobs that answer a conversation, whose ids these are."""
    return make_jobs(
        served,
        request,
        [ids],
        listener,
        echoes=[None],
        ends=[*served.tok.eos_ids, *served.turn_ends],
        n_alternatives=request.top_logprobs if request.logprobs else None,
        usual_limit=served.max_len,  # all the room there is
        n_each=request.n,
    )


def make_jobs(
    served: ServedModel,
    request: Generation,
    prompts: list[list[int]],
    listener: Callable,
    echoes: list,
    ends: Iterable[int],
    n_alternatives: int | None,
    usual_limit: int,
    n_each: int,
) -> list[Job]:
    if len(prompts) * n_each > served.max_queue:
        why = f"{len(prompts)} prompts, each {n_each} times: expected {served.max_queue} at most"
        raise ApiError(400, why, "n")
    grammar = request.compiled
    if request.ignore_eos and grammar is None:  # as benchmarks ask, to get answers of one length
        ends = []
    ends = [*ends, *request.stop_token_ids]
    jobs = []
    for whole, echo in zip(prompts, echoes):
        ids = truncated(served, request, whole)
        room = served.max_len - (1 if served.is_seq2seq else len(ids))  # 1: the start token
        if served.is_seq2seq and len(ids) > served.max_len:
            raise too_long(served, f"a source of {len(ids)} tokens")
        limit = request.max_tokens
        if limit is None:
            limit = max(min(room, usual_limit), 1)  # 1, so that no room is told as an error below
        if limit > room:
            raise too_long(served, f"a prompt of {len(ids)} tokens and {limit} more")
        if request.min_tokens > limit:
            why = f"min_tokens = {request.min_tokens}: the answer has {limit} tokens at most"
            raise ApiError(400, why, "min_tokens")
        for _ in range(n_each):
            index = len(jobs)
            guide = None if grammar is None else grammar.begin()
            job = Job(
                served.tok,
                ids,
                limit,
                request,
                listener,
                index,
                ends,
                n_alternatives,
                echo,
                guide=guide,
                goes_on=request.ignore_eos,
                shown=request.plan.marks() if request.plan else (),
                adapter=served.adapter,
            )
            jobs.append(job)
    return jobs


def likeliest(request: Generation, parts: list[tuple]) -> list[tuple]:
    """Of best_of answers to each prompt, [(its job, more of it)], the n whose tokens have the
    highest mean log-probability, the highest first; all of them where there is no more than n."""
    n_each = getattr(request, "best_of", None) or request.n
    if n_each == request.n:
        return parts
    best = []
    for begin in range(0, len(parts), n_each):
        of_prompt = parts[begin : begin + n_each]
        of_prompt.sort(key=lambda part: -mean(part[0].row.out.logprobs))  # stable: seeds repeat it
        best += of_prompt[: request.n]
    return best


def mean(numbers: list[float]) -> float:
    return sum(numbers) / max(len(numbers), 1)
