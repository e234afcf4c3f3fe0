"""Constrained text: barelm/grammar.py's masks, an engine's answers by them, the server's fields."""

import json
import random
import re
import types

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
from conftest import ROOT
from long_guided import fuzz
from test_serve import served

from barelm import check_guided, grammar_trial, guided
from barelm.bpe import bpe_tokenizer, char_tokenizer, word_tokenizer
from barelm.check_rows import Place
from barelm.checkpoint import load
from barelm.decode import Decoder
from barelm.engine import Engine
from barelm.errors import UserError
from barelm.fast import generating
from barelm.jobs import Job, Sampling
from barelm.sampling import draws
from barelm.tokenizer import Tokenizer

llguidance = pytest.importorskip("llguidance")
from barelm.grammar import LIMITS, compile_grammar, json_rule, vocabulary_of
from barelm.grammar_trial import Trial

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"enum": [7, 12, 70]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOKENIZERS = ROOT / "tests/fixtures/tokenizers"


@pytest.fixture(scope="module")
def loaded(tiny):
    return load(tiny / "out" / "tiny")


@pytest.fixture(scope="module")
def site(tiny):
    with served(tiny) as site:
        yield site


def test_masks_are_what_trying_every_token_gives():
    findings = list(check_guided.check_guided(Place(torch.device("cpu"), torch.float32)))
    assert len(findings) == 3
    for finding in findings:
        assert finding.verdict == "PASS", finding


def test_the_check_sees_a_mask_that_is_wrong(monkeypatch):
    right = check_guided.bits

    def wrong(guide, n):
        mask = right(guide, n)
        mask[mask.nonzero()[0][0]] = False
        return mask

    monkeypatch.setattr(check_guided, "bits", wrong)
    tok = check_guided.many_tokens()
    assert check_guided.masks_of_schema(tok, PERSON)[0] > 0
    assert check_guided.masks_of_pattern(tok, "a{3,9}|b+")[0] > 0


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "llama3", "smollm2", "llama2", "mistral"])
def test_fuzzed_schemas_give_valid_json_by_every_tokenizer(name):
    pytest.importorskip("jsonschema")
    problems = []
    counts = fuzz(f"random:{TOKENIZERS / name}", n=12, limit=60, seed=1, tell=problems.append)
    assert not problems and counts["valid"] > 5
    assert counts["valid"] + counts["cut"] == counts["schemas"] == 12


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "llama2"])
def test_no_special_token_and_no_padding_is_ever_allowed(name):
    if name == "llama2":
        pytest.importorskip("tokenizers")
    tok = Tokenizer.from_folder(TOKENIZERS / name)
    guide = compile_grammar(tok, "regex", r"(?s:.)*").begin()  # any text
    mask = np.unpackbits(guide.mask, bitorder="little").astype(bool)
    assert guide.may_end and not mask[tok.n_vocab :].any()
    for id in tok.special.values():
        assert mask[id] == (id in tok.bytes)
    allowed = np.unpackbits(guide.allowed([3]), bitorder="little")
    assert allowed[3] == 1 and guide.allowed([3], must_go_on=True)[0] >> 3 & 1 == mask[3]


# --------------------------------------------------------------------------------------------------
# What is asked for


def test_what_cannot_be_held_is_refused_by_name():
    tok = bpe_tokenizer([])
    refused = [
        ({"not": {}}, "not"),
        ({"uniqueItems": True, "type": "array"}, "uniqueItems"),
        ({"properties": {"a": {"type": "string", "format": "blah"}}}, "blah"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"$ref": "https://example.org/schema"}, "example.org"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "integer", "multipleOf": 999983}, "multipleOf"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"$ref": "#"}, "no text"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
        ({"type": "integer", "minimum": 2**64, "maximum": 2**65}, "minimum beyond 2**53"),
        ({"type": "number", "maximum": -(2**53) - 1}, "maximum beyond 2**53"),
        ({"enum": [1, 2**53 + 1]}, "9007199254740993"),
        ([], "object"),
    ]
    for schema, word in refused:
        with pytest.raises(UserError, match=re.escape(word)) as told:
            compile_grammar(tok, "json_schema", schema)
        assert "\n" not in str(told.value) and len(str(told.value)) <= 300
    deep = {"type": "integer"}
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    for kind, source in [("json_schema", deep), ("regex", "("), ("regex", ""), ("choice", [])]:
        with pytest.raises(UserError):
            compile_grammar(tok, kind, source)
    for kind, source in [
        ("choice", ["\ud800"]),
        ("lark", "start"),
        ("ebnf", "root ::= ("),
        ("ebnf", '%llguidance {"no_forcing": false}\nstart: "a"'),
        ("x", 1),
    ]:
        with pytest.raises(UserError):
            compile_grammar(tok, kind, source)
    with pytest.raises(UserError, match="too deeply|nest") as told:  # what is wrong is not cut off
        compile_grammar(tok, "regex", "(" * 999 + "a" + ")" * 999)
    assert len(str(told.value)) <= 300


def test_limits_that_are_rounded_to_narrower_ones_are_taken():
    tok = bpe_tokenizer([])
    limits = {"type": "integer", "minimum": 0, "maximum": 2**64}  # as of an unsigned number
    assert compile_grammar(tok, "json_schema", limits).begin().mask.any()


def test_long_chains_of_references_and_rules_do_not_overflow_the_stack():
    tok = bpe_tokenizer([])
    n = 1400
    definitions = {"d1400": {"type": "integer"}}
    for i in range(n):
        inner = {"a": {"$ref": f"#/$defs/d{i + 1}"}}
        definitions[f"d{i}"] = {"type": "object", "properties": inner, "required": ["a"]}
    schema = {"$defs": definitions, "$ref": "#/$defs/d0"}
    assert compile_grammar(tok, "json_schema", schema).begin().mask.any()
    rules = [f't{i}: "b" t{i + 1} "c"' for i in range(8000)]
    grammar = "\n".join(["start: t0", *rules, 't8000: "a"'])
    assert compile_grammar(tok, "ebnf", grammar).begin().mask.any()


def test_a_grammar_is_compiled_once():
    tok = bpe_tokenizer([])
    first = compile_grammar(tok, "json_schema", dict(PERSON))
    assert compile_grammar(tok, "json_schema", dict(PERSON)) is first
    assert compile_grammar(bpe_tokenizer([]), "json_schema", dict(PERSON)) is not first


def test_a_tokenizer_that_cannot_write_it_is_refused():
    for tok in (char_tokenizer("abc"), word_tokenizer(["{", "}", "a", " ", '"'], r"\S|\s")):
        with pytest.raises(UserError, match="WordLevel"):
            compile_grammar(tok, "json_schema", PERSON)
    tok = char_tokenizer("abc")
    guide = compile_grammar(tok, "choice", ["abba", "c"]).begin()
    guide.take(tok.encode("c")[0])
    assert guide.done
    with pytest.raises(UserError):
        compile_grammar(tok, "choice", ["xa", "y"])  # no token begins so
    letters = "".join(map(chr, range(32, 127)))  # all that JSON needs
    grammar = compile_grammar(char_tokenizer(letters), "json_object", None)
    assert check_guided.bits(grammar.begin(), 99).sum() == 1


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": PERSON}}},
            "json_schema",
        ),
        ({"guided_json": json.dumps(PERSON)}, "json_schema"),
        ({"guided_choice": ["a", "b"]}, "choice"),
        ({"guided_grammar": 'start: "a" | "b"'}, "ebnf"),
        ({"grammar": 'root ::= "a" | [b-c]+'}, "ebnf"),
        ({"structured_outputs": {"regex": "a+", "json": None}}, "regex"),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, "regex"),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_each_form_of_a_request_is_read(fields, kind):
    names = [*guided.FORMS, "structured_outputs", "response_format"]
    request = types.SimpleNamespace(**(dict.fromkeys(names) | fields))
    forms = guided.forms_of(request)
    assert [form[1] for form in forms] == [kind] * (kind is not None)
    assert (guided.read_grammar(bpe_tokenizer([]), request) is None) == (kind is None)


def test_an_id_of_a_bias_is_read_whole():
    tok = bpe_tokenizer([])
    assert guided.read_bias(tok, {"5": 1, "007": 2}) == {5: 1.0, 7: 2.0}
    for name in ("0000000005", "1" * 99, "-1", "²", ""):
        with pytest.raises(guided.FormError, match="expected ids"):
            guided.read_bias(tok, {name: 1})


# --------------------------------------------------------------------------------------------------
# The engine


def run_jobs(engine, jobs, most=400):
    engine.submit(jobs)
    with generating(engine.net), torch.inference_mode():
        for _ in range(most):
            engine.step()
            if all(job.row.done for job in jobs):
                return
    raise AssertionError("the jobs are not done")


@pytest.mark.parametrize("one_behind", [False, True])
def test_guided_and_free_answers_of_one_batch_are_those_of_each_alone(loaded, one_behind):
    net, tok = loaded
    person = compile_grammar(tok, "regex", '[{]"name": "[a-z]{1,9}", "age": (7|12|70)[}]')
    number = compile_grammar(tok, "regex", "-?[0-9]{2,30}")

    def make_jobs():
        jobs = []
        for i, grammar in enumerate([None, person, number, person, None, number, person]):
            sampling = Sampling(temperature=[1.0, 0.0, 2.0][i % 3], seed=i, top_p=0.95)
            guide = grammar and grammar.begin()
            ids = tok.encode("import os" * (i + 1))
            listener = lambda update: None
            jobs.append(Job(tok, ids, 60, sampling, listener, ends=tok.eos_ids, guide=guide))
        return jobs

    engine = Engine(net, tok, max_batch=4, max_len=256, prefill_chunk=16)
    engine.on_gpu = one_behind  # as where the host reads tokens a step later
    together = make_jobs()
    run_jobs(engine, together)
    alone = make_jobs()
    for job in alone:
        run_jobs(Engine(net, tok, max_batch=1, max_len=256), [job])
    for a, b in zip(together, alone):
        assert a.row.out.ids == b.row.out.ids and a.row.out.text == b.row.out.text
        assert a.row.out.finish_reason == b.row.out.finish_reason
        if a.guide is not None and a.row.out.finish_reason == "stop":
            assert a.guide.done or a.row.out.ids[-1] in tok.eos_ids
    texts = [
        job.row.out.text for job in together if job.guide and job.row.out.finish_reason == "stop"
    ]
    assert len(texts) >= 3
    for text in texts:
        assert re.fullmatch("-?[0-9]{2,30}", text) or json.loads(text)["age"] in (7, 12, 70)


def test_a_guide_that_fails_ends_its_own_request_alone(loaded):
    net, tok = loaded
    updates = []
    bad = compile_grammar(tok, "regex", "[a-z ]{40}").begin()
    other = compile_grammar(tok, "regex", "[a-z ]{40}").begin()

    def fail(id, take=bad.take):
        if tok.token_bytes(id):
            raise UserError("too much of it")
        take(id)

    bad.take = fail
    jobs = []
    for guide in (bad, other, None):
        jobs.append(Job(tok, tok.encode("a"), 50, Sampling(), updates.append, guide=guide))
    engine = Engine(net, tok, max_batch=3, max_len=128, tell=lambda new: updates.extend(new))
    run_jobs(engine, jobs)
    errors = {update.job: update.error for update in updates if update.done}
    assert "too much of it" in errors[jobs[0]] and not errors[jobs[1]] and not errors[jobs[2]]
    assert len(jobs[1].row.out.text) == 40 and engine.jobs == {}


def test_a_text_that_is_whole_at_the_limit_is_stopped_and_a_longer_one_cut(loaded):
    net, tok = loaded
    for limit, reason in ((1, "length"), (60, "stop")):
        guide = compile_grammar(tok, "choice", ["{}{}{}", "[][]"]).begin()
        job = Job(tok, tok.encode("a"), limit, Sampling(), lambda update: None, guide=guide)
        run_jobs(Engine(net, tok, max_batch=1, max_len=128), [job])
        assert job.row.out.finish_reason == reason
        assert any(text.startswith(job.row.out.text) for text in ("{}{}{}", "[][]"))
    n = len(job.row.out.ids)
    guide = compile_grammar(tok, "choice", ["{}{}{}", "[][]"]).begin()
    job = Job(tok, tok.encode("a"), n, Sampling(), lambda update: None, guide=guide)
    run_jobs(Engine(net, tok, max_batch=1, max_len=128), [job])
    assert job.row.out.finish_reason == "stop" and len(job.row.out.ids) == n


def test_ends_come_where_the_text_is_whole_and_not_before_min_tokens(loaded):
    net, tok = loaded
    end = tok.eos_ids[0]
    for goes_on, least in ((False, 0), (True, 0), (False, 12)):
        guide = compile_grammar(tok, "regex", "[a-z]{2,300}").begin()
        sampling = Sampling(min_tokens=least, logit_bias={end: 100.0})
        job = Job(
            tok, [5], 30, sampling, lambda update: None, ends=[end], guide=guide, goes_on=goes_on
        )
        run_jobs(Engine(net, tok, max_batch=1, max_len=64), [job])
        out = job.row.out
        assert (end in out.ids) == (not goes_on) and len(out.text) >= 2
        if least:
            assert len(out.ids) == least + 1


def test_stop_token_ids_that_are_text_wait_for_min_tokens(loaded):
    net, tok = loaded
    letters = [tok.encode(letter)[0] for letter in "abcdefghijklm"]
    for stops, n in ((letters, 13), ([*tok.bytes], 1)):  # of the second nothing else is allowed
        guide = compile_grammar(tok, "regex", "[a-z]{90}").begin()
        sampling = Sampling(min_tokens=12, logit_bias={id: 100.0 for id in letters})
        job = Job(tok, [5], 30, sampling, lambda update: None, ends=stops, guide=guide)
        run_jobs(Engine(net, tok, max_batch=1, max_len=64), [job])
        assert len(job.row.out.ids) == n and job.row.out.ids[-1] in stops


# --------------------------------------------------------------------------------------------------
# Bias and min_tokens, against their formulas


def test_a_bias_is_added_to_the_logits_and_ends_wait_for_min_tokens(loaded):
    net, tok = loaded
    end = tok.eos_ids[0]
    prompt = tok.encode("def f(")
    bias = {end: 7.5, 40: 3.0, 41: -100.0, 300: 5.0}
    options = dict(temperature=0.9, min_tokens=4, presence_penalty=0.5)
    uniform = draws(3, 0, 12)
    decoder = Decoder(net, tok, n_slots=3, max_len=64)
    ids = []
    with generating(net), torch.inference_mode():
        decoder.set(0, prompt, 12, options={}, uniform=draws(1, 0, 12))
        decoder.set(2, prompt, 12, options=options, uniform=uniform, ends=[end], bias=bias)
        decoder.read({0: prompt, 2: prompt})
        while 2 in decoder.ready:
            chosen = decoder.choose()
            ids.append(dict(zip(chosen.slots, chosen.wait().tokens))[2])
            decoder.feed()
    plain = []
    with torch.inference_mode():
        for i in range(12):
            logits = net(torch.tensor([prompt + plain]))[0, -1, : tok.n_vocab].double()
            for id, value in bias.items():
                logits[id] += value
            for id in set(plain):
                logits[id] -= 0.5
            if i < 4:
                logits[end] = -torch.inf
            mass = F.softmax(logits / 0.9, 0).cumsum(0)
            plain.append(int((mass <= uniform[i].item() * mass[-1]).sum()))
            if plain[-1] == end:
                break
    assert ids == plain and end not in ids[:4] and 41 not in ids


def test_a_slot_keeps_nothing_of_the_one_before(loaded):
    net, tok = loaded
    engine = Engine(net, tok, max_batch=1, max_len=64)
    free = [Job(tok, [9, 8], 8, Sampling(seed=4), lambda update: None) for _ in range(2)]
    run_jobs(engine, free[:1])
    guide = compile_grammar(tok, "regex", "[0-9]{9}").begin()
    biased = Sampling(seed=4, logit_bias={7: 100.0})
    run_jobs(engine, [Job(tok, [9, 8], 8, biased, lambda update: None)])
    run_jobs(engine, [Job(tok, [9, 8], 8, Sampling(), lambda update: None, guide=guide)])
    run_jobs(engine, free[1:])
    assert free[0].row.out.ids == free[1].row.out.ids


# --------------------------------------------------------------------------------------------------
# The server


SHORT = {"type": "object", "properties": {"a": {"enum": [7, 12, 70]}}, "required": ["a"]}
SHORT["additionalProperties"] = False


def no_blanks(tok):
    """A bias by which answers have no white space: the model of the tests knows 64 tokens."""
    return {str(id): -100 for id, data in tok.bytes.items() if set(data) & set(b" \n\t\r")}


def test_the_server_answers_in_the_form_that_was_asked_for(site, loaded):
    bias = no_blanks(loaded[1])

    def ask(path="chat/completions", **body):
        talk = {"messages": [{"role": "user", "content": "hi"}]}
        if path == "completions":
            talk = {"prompt": "import"}
        body = talk | {"max_tokens": 40, "seed": 1, "logit_bias": bias} | body
        answer = requests.post(f"{site.url}/v1/{path}", json=body)
        return answer.status_code, answer.json()

    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": SHORT, "strict": True}}
    status, answer = ask(response_format=form, n=6, logprobs=True, top_logprobs=2)
    assert status == 200 and len(answer["choices"]) == 6
    for choice in answer["choices"]:
        assert json.loads(choice["message"]["content"])["a"] in (7, 12, 70)
        assert choice["finish_reason"] == "stop"
        shown = choice["logprobs"]["content"]
        assert all(np.isfinite(entry["logprob"]) for entry in shown)
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1
    status, answer = ask("completions", guided_choice=["yes", "no"], ignore_eos=True)
    assert answer["choices"][0]["text"] in ("yes", "no")
    status, answer = ask("completions", guided_regex="[ab]{500}")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert re.fullmatch("[ab]{1,499}", answer["choices"][0]["text"])
    status, answer = ask("completions", logit_bias={"65": 100}, max_tokens=5, temperature=0)
    tokens = requests.post(f"{site.url}/detokenize", json={"tokens": [65] * 5}).json()
    assert answer["choices"][0]["text"] == tokens["prompt"]
    form = {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}
    status, answer = ask(response_format=form)
    assert status == 400 and "not" in answer["error"]["message"]
    assert answer["error"]["param"] == "response_format"
    status, answer = ask(guided_json=PERSON, guided_regex="a")
    assert status == 400 and "one of them" in answer["error"]["message"]
    status, answer = ask(min_tokens=41)
    assert status == 400 and answer["error"]["param"] == "min_tokens"


def test_a_stream_in_a_form_is_the_whole_answer(site, loaded):
    body = {"prompt": "x", "max_tokens": 40, "seed": 3, "guided_json": SHORT}
    body["logit_bias"] = no_blanks(loaded[1])
    whole = requests.post(f"{site.url}/v1/completions", json=body).json()["choices"][0]["text"]
    lines = requests.post(f"{site.url}/v1/completions", json=body | {"stream": True}).text
    pieces = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole
    assert json.loads(whole)["a"] in (7, 12, 70)


def test_hostile_schemas_end_in_time_and_leave_the_server_alive(site):
    doubled = {"d0": {"type": "string"}}
    for i in range(1, 30):
        refs = [{"$ref": f"#/$defs/d{i - 1}"}] * 2
        doubled[f"d{i}"] = {"allOf": [{"anyOf": refs}, {"anyOf": refs}]}
    choices = [{"type": "object", "required": [f"a{j}"]} for j in range(6)]
    hostile = [
        {"$defs": doubled, "$ref": "#/$defs/d29"},
        {"allOf": [{"anyOf": choices}] * 12},
        {"enum": [f"{i}" * 5 for i in range(9999)]},
        {"type": "string", "pattern": "(x+x+)+y.{0,900}[ab]*a[ab]{300}"},
        {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
        {"properties": {f"p{i}": {"type": "string"} for i in range(1500)}, "type": "object"},
    ]
    for schema in hostile:
        body = {"prompt": "x", "max_tokens": 8, "guided_json": schema}
        answer = requests.post(f"{site.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code in (200, 400), answer.text
    random.seed(0)
    assert requests.get(f"{site.url}/health").status_code == 200


def test_a_grammar_that_takes_too_long_is_given_up_and_the_next_one_compiled(monkeypatch):
    trial = Trial(LIMITS)
    trial.check("start: /a+/")
    monkeypatch.setattr(grammar_trial, "SECONDS", 0.5)
    patterns = [{"type": "string", "pattern": f"^.*a.{{{i}}}$"} for i in range(30)]
    with pytest.raises(UserError, match="0.5 s"):
        trial.check("start: " + json_rule({"allOf": patterns}))
    monkeypatch.setattr(grammar_trial, "SECONDS", 60)
    trial.check("start: /b+/")
    with pytest.raises(UserError, match="unclosed"):
        trial.check("start: /(/")


def test_json_in_a_larger_grammar():
    tok = bpe_tokenizer([])
    grammar = compile_grammar(tok, "lark", f'start: "<call>" j "</call>"\nj: {json_rule(PERSON)}')
    guide = grammar.begin()
    text = b'<call>{"name": "Bo", "age": 12}</call>'
    for byte in text:
        assert not guide.done
        guide.take(vocabulary_of(tok).tokens.index(bytes([byte])))
    assert guide.done
