"""What a request says of its answer's form: OpenAI's response_format, vLLM's guided_* and
structured_outputs, llama.cpp's json_schema and grammar; and its bias on single tokens. What the
form asks becomes a Grammar (barelm/grammar.py)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from barelm.errors import UserError

if TYPE_CHECKING:
    from barelm.grammar import Grammar
    from barelm.tokenizer import Tokenizer

FORMS = {  # a field of a request, and the kind of grammar that its value is the source of
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "ebnf",
    "json_schema": "json_schema",
    "grammar": "ebnf",
}
STRUCTURED = {  # the same of the entries of structured_outputs
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
}
LARGEST_BIAS = 100


class FormError(Exception):
    """What is wrong with a field of a request."""

    def __init__(self, field: str, why: object) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field.split(".")[0]


def has_form(request: Any) -> bool:
    """Whether a request says anything of its answer's form."""
    names = (*FORMS, "structured_outputs", "response_format")
    return any(getattr(request, name) is not None for name in names)


def forms_of(request: Any) -> list[tuple[str, str, Any]]:
    """[(field, kind of grammar, its source)] of what a request asks for."""
    forms = []
    for field, kind in FORMS.items():
        value = getattr(request, field)
        if value is not None and value != "":
            forms.append((field, kind, value))
    if request.structured_outputs is not None:
        forms += structured_forms(request.structured_outputs)
    if request.response_format is not None:
        forms += response_forms(request.response_format)
    return forms


def response_forms(value: Any) -> list[tuple[str, str, Any]]:
    """The same of OpenAI's response_format."""
    field = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    keys = {"text": set(), "json_object": {"schema"}, "json_schema": {"json_schema"}}
    if not isinstance(kind, str) or kind not in keys:
        raise FormError(field, "expected {'type': text, json_object or json_schema}")
    refuse_others(field, value, {"type"} | keys[kind])
    if kind == "text":
        return []
    if kind == "json_object":  # with a schema in it, as llama.cpp has it
        if value.get("schema") is not None:
            return [(field, "json_schema", value["schema"])]
        return [(field, "json_object", None)]
    entry = value.get("json_schema")
    if not isinstance(entry, dict) or not isinstance(entry.get("schema"), dict):
        raise FormError(field, "expected json_schema = {'name': …, 'schema': a JSON schema}")
    refuse_others(f"{field}.json_schema", entry, {"name", "description", "schema", "strict"})
    return [(field, "json_schema", entry["schema"])]  # held strictly, whatever strict says


def structured_forms(value: Any) -> list[tuple[str, str, Any]]:
    """The same of vLLM's structured_outputs."""
    field = "structured_outputs"
    if not isinstance(value, dict):
        raise FormError(field, f"expected an object with one of {', '.join(STRUCTURED)}")
    refuse_others(field, value, set(STRUCTURED))
    forms = []
    for name, kind in STRUCTURED.items():
        if value.get(name) not in (None, False):
            forms.append((f"{field}.{name}", kind, value[name]))
    return forms


def refuse_others(field: str, value: dict, names: set[str]) -> None:
    for name, other in value.items():
        if name not in names and other not in (None, False):
            raise FormError(field, f"{name[:60]!r} is not supported")


def read_grammar(tok: Tokenizer, request: Any) -> Grammar | None:
    """The Grammar that a request asks for, or None; FormError. It may take long, so the server
    calls it in a thread of its own."""
    forms = forms_of(request)
    if not forms:
        return None
    if len(forms) > 1:
        names = " and ".join(field for field, _, _ in forms)
        raise FormError(forms[1][0], f"{names}: expected one of them")
    [(field, kind, source)] = forms
    from barelm.grammar import compile_grammar  # here, since most requests ask for none

    try:
        if kind == "json_schema" and isinstance(source, str):
            source = json.loads(source)
        return compile_grammar(tok, kind, source)
    except UserError as error:
        raise FormError(field, error) from None
    except (ValueError, RecursionError) as error:
        raise FormError(field, f"no JSON: {error}") from None


def read_bias(tok: Tokenizer, value: Any) -> dict[int, float]:
    """{id: what is added to its logit} of a request's logit_bias, whose ids are texts in JSON."""
    if value == []:  # llama.cpp's form of nothing
        value = {}
    if not isinstance(value, dict):
        raise FormError("logit_bias", "expected an object of ids and numbers")
    bias = {}
    for name, number in value.items():
        is_number = name.isascii() and name.isdecimal() and len(name) < 10
        if not is_number or int(name) >= tok.n_vocab:
            raise FormError("logit_bias", f"{name[:20]!r}: expected ids below {tok.n_vocab}")
        if type(number) not in (int, float) or not -LARGEST_BIAS <= number <= LARGEST_BIAS:
            limits = f"expected numbers from -{LARGEST_BIAS} to {LARGEST_BIAS}"
            raise FormError("logit_bias", f"of {name[:20]}: {limits}")
        bias[int(name)] = float(number)
    return bias
