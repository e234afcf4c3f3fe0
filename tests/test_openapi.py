"""/openapi.json against what the server does: field by field, address by address, and by a fuzzer
where that is installed. /docs, which is made of it."""

import json
import re
from functools import partial
from html.parser import HTMLParser
from typing import Any

import pytest
import requests

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from test_serve import served

from barelm import api, openapi

# What a request may be refused for although each of its fields is right: what no schema says of two
# fields together, of a text's tokens, of a grammar, or of a number such as 2.0.
TOGETHER = re.compile(
    r"do not fit|tokens at most|expected one of them|wants logprobs|wants include|only with|beside"
    r"|not with|not in a stream|best_of = |two names of one|expected one of the two|not both"
    r"|is no classifier|of messages alone|the chat template alone|none of them empty|at the end"
    r"|expected \d+ at most|ids from 0 to|expected a list of|not to be tokenized|chat template"
    r"|template takes|'a schema|grammar|schema|regex|tools|tool_choice|guided_|structured_outputs"
    r"|= -?[\d.e+]+: expected a whole number"
)


@pytest.fixture(scope="module")
def site(tiny):
    with served(tiny, "--max_queue=4") as site:
        yield site


@pytest.fixture(scope="module")
def document(site):
    return site.get("/openapi.json").json()


def test_each_address_answers_what_the_schema_says(site, document):
    assert set(document["paths"]) == set(openapi.ADDRESSES)
    for path, methods in document["paths"].items():
        url = site.url + path.replace("{name}", "tiny")
        allowed = {method.upper() for method in methods}
        if "GET" in allowed:
            allowed.add("HEAD")
        refused = requests.delete(url)
        assert refused.status_code == 405 and refused.json()["error"]["message"], path
        assert set(refused.headers["allow"].split(", ")) == allowed, path
        asked = requests.options(url)
        assert asked.status_code == 204 and set(asked.headers["allow"].split(", ")) == allowed
        if "GET" in allowed:
            whole = requests.get(url)
            head = requests.head(url)
            assert head.status_code == whole.status_code and head.content == b""
            if path == "/page/{name}":
                assert whole.status_code == 404
                continue
            kind = whole.headers["content-type"].partition(";")[0]
            assert kind in methods["get"]["responses"]["200"]["content"], path
    missing = requests.post(site.url + "/chat/completions", json={})
    assert missing.status_code == 404 and "did you mean /v1/chat" in missing.text
    assert site.get("/version").json() == {"version": document["info"]["version"]}
    assert site.get("/ping").status_code == site.post("/ping").status_code == 200


def test_the_schema_has_the_fields_and_limits_that_requests_are_read_by(document):
    for path, address in openapi.ADDRESSES.items():
        if address.body in (None, openapi.NoFields):
            continue
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        properties = schema["properties"]
        own = set(api.field_types(address.body))
        assert set(properties) == own | set(address.neutral) | set(address.ignored), path
        assert set(schema["required"]) <= own and schema["additionalProperties"] == {"type": "null"}
        types = api.field_types(address.body)
        for name, field in properties.items():
            for value in accepted_values(field):
                read(address, name, value)
            read_later = types.get(name) in (Any, object)  # by more than its type and limits
            for value in [] if read_later else refused_values(field):
                with pytest.raises(api.ApiError) as error:
                    read(address, name, value)
                assert error.value.param == name


def read(address, name, value):
    return api.read_fields({name: value}, address.body, address.neutral, address.ignored)


def accepted_values(field):
    """The values at a field's limits."""
    if "enum" in field:
        return field["enum"]
    if "minimum" in field:
        return [field["minimum"], field["maximum"]]
    return [field["default"]] if "default" in field else []


def refused_values(field):
    """Values just outside, and of other types."""
    kinds = field.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "enum" in field or not kinds or "anyOf" in field:
        return []
    others = {"boolean": True, "string": "a", "array": [], "object": {}, "number": 0.5}
    wrong = [value for kind, value in others.items() if kind not in kinds]
    if "minimum" in field and field["maximum"] >= 2**31 - 1:
        wrong += [field["minimum"] - 1, field["maximum"] + 1]
    return wrong


class Loads(HTMLParser):
    """What a page loads, and whether it has scripts."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag != "script" and "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        if tag == "link":
            self.sources.append(attributes["href"])


def test_docs_are_a_page_that_loads_nothing_from_elsewhere(site, document):
    answer = site.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Loads()
    page.feed(answer.text)
    for source in page.sources:
        if not source.startswith("data:"):
            assert site.get(f"/{source}").status_code == 200, source
    for path in document["paths"]:
        assert path in answer.text
    assert "how the tokens" not in answer.text and "the likeliest" in answer.text  # the comments


def test_with_a_key_docs_are_open_and_say_so(tiny):
    with served(tiny, "--api_key=secret") as site:
        assert site.get("/docs").status_code == 200
        document = site.get("/openapi.json").json()
        assert document["security"] == [{"key": []}] and "tiny" not in json.dumps(document)
        assert site.get("/v1/models").status_code == 401


def test_a_request_has_the_name_that_it_came_with(site):
    given = site.get("/health", headers={"X-Request-Id": "a-1:b.2"})
    assert given.headers["x-request-id"] == "a-1:b.2"
    for wrong in ("", "a b", "é".encode(), "x" * 129, "a\tb"):
        made = site.get("/health", headers={"X-Request-Id": wrong}).headers["x-request-id"]
        assert re.fullmatch("req_[0-9a-f]{24}", made)
    names = {site.post("/v1/completions", {}).headers["x-request-id"] for _ in range(3)}
    assert len(names) == 3


def fuzz(url, n, paths):
    """Ask each of these addresses n well-formed and n malformed requests, by schemathesis, and
    check each answer: (how many were asked, refusals of two fields together)."""
    import hypothesis
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    counts = {"asked": 0, "together": 0}
    quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]
    quiet += [hypothesis.HealthCheck.data_too_large]

    def ask(case, excluded):
        if excluded and isinstance(case.body, dict):
            keep_short(case.body)
        response = case.call(timeout=60)
        counts["asked"] += 1
        if excluded and response.status_code == 400:
            message = response.json()["error"]["message"]
            assert TOGETHER.search(message), (case.as_curl_command(), message)
            counts["together"] += 1
        case.validate_response(response, excluded_checks=excluded)

    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path not in paths or operation.method != "post":
            continue
        for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:
            is_positive = mode is schemathesis.GenerationMode.POSITIVE
            excluded = [positive_data_acceptance] if is_positive else []
            settings = hypothesis.settings(
                max_examples=n,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=quiet,
                phases=[hypothesis.Phase.generate],
            )
            strategy = operation.as_strategy(generation_mode=mode)
            check_each(hypothesis.given(strategy), settings, partial(ask, excluded=excluded))
    return counts


def check_each(given, settings, ask):
    def run(case):
        ask(case)

    settings(given(run))()


def keep_short(body):
    """Few tokens: what is fuzzed is the protocol."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], 4)


FUZZED = [
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"),
    *("/tokenize", "/detokenize"),
]


def test_a_fuzzer_finds_nothing(site):
    pytest.importorskip("schemathesis")
    counts = fuzz(site.url, 3, FUZZED)
    assert counts["asked"] > 20
    assert not re.search('status="5', site.get("/metrics").text)
