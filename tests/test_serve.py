"""serve.py as its clients see it: the real server in a process of its own, on a free port."""

import base64
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, run, start

import model
from barelm import api
from barelm.checkpoint import load, save
from barelm.embeddings import embed
from barelm.tokenizer import Tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from barelm.connections import PatientProtocol, listen
from barelm.front import is_loopback

PIPE = dict(stdout=subprocess.PIPE, text=True)
CODE = (ROOT / "sample.py").read_text(encoding="utf-8")


@contextlib.contextmanager
def served(folder, *args, env=None, name="tiny", stderr=None, **popen):
    """A server of folder/out/tiny: its address, and its process as `.process`."""
    args = ["--model=out/tiny", "--port=0", *args]
    if popen:  # a process that inherits nothing
        command = [sys.executable, ROOT / "serve.py", *args]
        begun = subprocess.Popen(command, cwd=folder, **PIPE, stderr=stderr, **popen)
    else:
        begun = start(folder, "serve.py", *args, env=env, stderr=stderr)
    with begun as process:
        try:
            lines = iter(process.stdout.readline, "")
            says = re.compile(rf"serving {name} at (\S+)")
            url = next(m[1] for line in lines if (m := says.search(line)))
            yield Site(url, process)
        finally:
            process.kill()


class Site:
    def __init__(self, url, process):
        self.url, self.process = url, process

    def get(self, path, **how):
        return requests.get(self.url + path, **how)

    def post(self, path, body=None, **how):
        return requests.post(self.url + path, **({"json": body} | how))

    def complete(self, **body):
        answer = self.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path, **body):
        """The chunks of a streamed answer."""
        with self.post(path, body | {"stream": True}, stream=True) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith(b"data: ") for line in lines) and lines[-1] == b"data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]

    def metric(self, name):
        text = self.get("/metrics").text
        return float(re.search(rf"^barelm_{re.escape(name)} (\S+)$", text, re.M)[1])

    def until(self, name, value):
        while self.metric(name) != value:
            time.sleep(0.01)


@pytest.fixture(scope="module")
def site(tiny):
    """Few rows and small chunks, so that requests wait, and prompts are read in several steps."""
    with served(tiny, "--max_batch=3", "--prefill_chunk=7") as site:
        yield site


@pytest.fixture(scope="module")
def loaded(tiny):
    return load(tiny / "out" / "tiny")


def test_many_at_once_get_what_generate_gives_each_alone(site, loaded):
    net, tok = loaded
    asked = []
    for i in range(24):
        begin = 0 if i % 4 == 0 else 37 * i  # some share their beginnings
        prompt = CODE[begin : begin + 20 + i]
        # Few candidates: a draw next to the border of two tokens falls on either side by rounding,
        # and a batch of other rows rounds in another way.
        how = dict(temperature=0.9 * (i % 2), top_k=(20, 8, 3)[i % 3], top_p=1 - i % 5 / 10)
        how |= dict(min_p=0.05 * (i % 7 == 0), repetition_penalty=1 + i % 2 / 5, seed=i)
        asked.append((prompt, 1 + i, how | {"stop": ["\n\n", "se"] if i % 3 else []}))
    with ThreadPoolExecutor(24) as pool:
        ask = lambda a: site.complete(prompt=a[0], max_tokens=a[1], logprobs=0, **a[2])
        answers = [*pool.map(ask, asked)]
    for (prompt, n, how), answer in zip(asked, answers):
        [g] = model.generate(net, tok, [prompt], max_new_tokens=n, **how)
        [choice] = answer["choices"]
        assert choice["text"] == g.text and choice["finish_reason"] == g.finish_reason
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(g.logprobs, abs=1e-4)
        assert answer["usage"]["completion_tokens"] == len(g.ids)


def test_a_beginning_that_is_known_is_not_read_again(site, loaded):
    net, tok = loaded
    ids = tok.encode(CODE[300:380])
    for prompt, known in ((ids, None), (ids + [5], len(ids)), (ids[:9] + [7] * 9, 9)):
        answer = site.complete(prompt=prompt, max_tokens=9, temperature=0)
        [g] = model.generate(net, tok, [prompt], max_new_tokens=9, temperature=0)
        assert answer["choices"][0]["text"] == g.text
        assert known in (None, answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("temperature", [1e-46, 1e-45, 1e-40, 1e-38, 1e-30])
def test_temperatures_too_small_to_divide_by_are_greedy(site, temperature):
    body = dict(prompt="import os", max_tokens=9, seed=1)
    greedy = site.complete(temperature=0, **body)["choices"][0]["text"]
    assert site.complete(temperature=temperature, **body)["choices"][0]["text"] == greedy


def test_presence_and_frequency_penalties_are_openais(site, loaded):
    net, tok = loaded
    start, ids = tok.encode("import os\nimport"), []
    for _ in range(30):
        with torch.no_grad():
            logits = net(torch.tensor([start + ids]))[0, -1, : tok.n_vocab]
        for id in set(ids):
            logits[id] -= 0.5 + 0.3 * ids.count(id)
        ids.append(int(logits.argmax()))
    how = dict(presence_penalty=0.5, frequency_penalty=0.3, temperature=0, ignore_eos=True)
    answer = site.complete(prompt=start, max_tokens=30, **how)
    assert answer["choices"][0]["text"] == b"".join(map(tok.token_bytes, ids)).decode()


def test_echo_scores_a_prompt_as_lm_eval_wants_it(site, loaded):
    net, tok = loaded
    ids = tok.encode(CODE[100:200])
    how = dict(max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234)
    first, second = site.complete(prompt=[ids, ids[:9]], **how)["choices"]
    told = first["logprobs"]
    assert len(told["tokens"]) == len(ids) + 1 and told["token_logprobs"][0] is None
    truth = model.logprobs(net, torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0].tolist()
    assert told["token_logprobs"][1:-1] == pytest.approx(truth, abs=1e-4)
    assert second["logprobs"]["token_logprobs"][1:9] == pytest.approx(truth[:8], abs=1e-4)
    greedy = net(torch.tensor([ids]))[0, :, : tok.n_vocab].argmax(-1).tolist()
    for lp, tops, likeliest, id in zip(
        told["token_logprobs"][1:], told["top_logprobs"][1:], greedy, ids[1:] + greedy[-1:]
    ):
        assert (lp == max(tops.values())) == (likeliest == id)
    assert first["text"].startswith(CODE[100:200])
    places = zip(told["text_offset"], told["tokens"])
    assert all(first["text"][at:].startswith(token) for at, token in places)
    only = site.complete(prompt=CODE[:30], max_tokens=0, echo=True)
    assert only["choices"][0]["text"] == CODE[:30] and only["usage"]["completion_tokens"] == 0


def alike(a, b):
    """Whether two log-probabilities (None: the first token's), or two tables of them by token, are
    the same but for rounding."""
    if a is None or b is None:
        return a is b
    if not isinstance(a, dict):
        return a == pytest.approx(b, abs=1e-4)
    # Of alternatives that are equally likely, rounding chooses which is told of.
    least = min([*a.values(), *b.values()])
    return all(alike(a.get(token, least), b.get(token, least)) for token in a.keys() | b.keys())


def test_a_stream_says_what_the_whole_answer_says(site):
    body = dict(prompt=["def f(", "import"], max_tokens=20, n=2, seed=3, logprobs=2, echo=True)
    body |= dict(ignore_eos=True, top_k=8)
    whole = site.complete(**body)
    chunks = site.stream("/v1/completions", **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 80
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks[:-1]]
        parts = [p for p in parts if p["index"] == choice["index"]]
        assert "".join(p["text"] for p in parts) == choice["text"]
        told = {name: [] for name in choice["logprobs"]}
        for part in parts:
            for name, values in (part["logprobs"] or {}).items():
                told[name] += values
        for name in ("tokens", "text_offset"):
            assert told[name] == choice["logprobs"][name]
        # The two answers were computed in batches of other rows, which rounds in another way.
        for name in ("token_logprobs", "top_logprobs"):
            pairs = zip(told[name], choice["logprobs"][name], strict=True)
            assert all(alike(*pair) for pair in pairs)
        assert [p["finish_reason"] for p in parts][-1] == choice["finish_reason"]


def test_chat_is_the_template_and_generate(site, loaded):
    net, tok = loaded
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    ids, _ = tok.chat(messages, add_generation_prompt=True)
    [g] = model.generate(net, tok, [ids], max_new_tokens=9, temperature=0)
    body = dict(messages=messages, max_completion_tokens=9, temperature=0, logprobs=True)
    answer = site.post("/v1/chat/completions", body | {"top_logprobs": 2}).json()
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": g.text}
    told = [t["logprob"] for t in choice["logprobs"]["content"]]
    assert told == pytest.approx(g.logprobs, abs=1e-4)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    parts = [c["choices"][0] for c in site.stream("/v1/chat/completions", **body)]
    assert parts[0]["delta"] == {"role": "assistant", "content": ""} and parts[-1]["delta"] == {}
    assert "".join(p["delta"].get("content", "") for p in parts) == g.text
    assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_the_last_answer_is_continued(site, loaded):
    net, tok = loaded
    ask = [{"role": "user", "content": "hi"}]
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    whole = site.post(CHAT, body | {"messages": ask}).json()["choices"][0]["message"]
    ids, _ = tok.chat(ask, add_generation_prompt=True)
    [g] = model.generate(net, tok, [ids], max_new_tokens=5, temperature=0)
    begun = [*ask, {"role": "assistant", "content": g.text}]
    how = {"continue_final_message": True, "add_generation_prompt": False}
    asked = body | how | {"messages": begun, "max_tokens": 7}
    rest = site.post(CHAT, asked).json()["choices"][0]["message"]["content"]
    # Where the words fall apart into the tokens that they were made of, it is the same answer.
    count = site.post("/tokenize", how | {"messages": begun}).json()["tokens"]
    assert count == tok.chat_to_continue(begun)
    if count == [*ids, *g.ids]:
        assert g.text + rest == whole["content"]
    [more] = model.generate(net, tok, [count], max_new_tokens=7, temperature=0)
    assert rest.startswith(more.text)
    for wrong in (
        {"messages": ask}, {"add_generation_prompt": True}, {"continue_final_message": False}
    ):  # fmt: skip
        assert site.post(CHAT, asked | wrong).status_code == 400, wrong
    assert (
        site.post("/tokenize", {"prompt": "a", "continue_final_message": True}).status_code == 400
    )


def test_embeddings_are_openais(site, loaded):
    net, tok = loaded
    texts = ["one", "two three, and then some more", "def f(x):", "a"]
    expected = embed(net, tok, texts, "mean").numpy()
    answer = site.post("/v1/embeddings", {"input": texts}).json()
    vectors = [row["embedding"] for row in answer["data"]]
    np.testing.assert_allclose(vectors, expected, rtol=1e-3, atol=1e-3)
    ids = [tok.encode(text) for text in texts]
    n_tokens = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    body = {"input": ids, "encoding_format": "base64", "dimensions": net.config.n_embd}
    coded = site.post("/v1/embeddings", body).json()["data"]
    again = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded]
    np.testing.assert_allclose(again, vectors, rtol=1e-4, atol=1e-6)
    for body, why in (
        ({"input": ""}, "none of them empty"),
        ({"input": "a", "dimensions": 65}, "dimensions = 65: expected a whole number from 1 to 64"),
        ({"input": "word " * 80}, "expected 64 at most"),
        ({"input": "a", "encoding_format": "int8"}, "expected float or base64"),
        ({"input": "a", "truncate": 1}, "not supported"),
    ):
        refused = site.post("/v1/embeddings", body)
        assert refused.status_code == 400 and why in refused.text
    assert "is no classifier" in site.post("/classify", {"input": "a"}).text
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
    made = client.embeddings.create(model="tiny", input=texts)  # which asks for base64
    np.testing.assert_allclose([row.embedding for row in made.data], expected, atol=1e-3)


def test_openais_client_works_unchanged(site, loaded):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "barelm"
    how = dict(model="tiny", max_tokens=8, temperature=0)
    whole = client.completions.create(prompt="import os", **how).choices[0].text
    pieces = client.completions.create(prompt="import os", stream=True, **how)
    assert whole and "".join(p.choices[0].text for p in pieces) == whole
    how |= dict(messages=[{"role": "user", "content": "hi"}])
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **how)
    [whole], usage = answer.choices, {"include_usage": True}
    chunks = [*client.chat.completions.create(stream=True, stream_options=usage, **how)]
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    count = answer.usage.completion_tokens
    assert said == whole.message.content and len(whole.logprobs.content) == count > 0
    assert chunks[-1].usage.completion_tokens == count
    with pytest.raises(openai.BadRequestError, match="do not fit the 64 tokens"):
        client.completions.create(model="tiny", prompt="import " * 100)
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="gpt-4", prompt="a")


def test_tokens_there_and_back(site, loaded):
    _, tok = loaded
    text = "é <|endoftext|> import"
    answer = site.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tok.encode(text) and answer["count"] == len(answer["tokens"])
    names = zip(answer["token_strs"], answer["tokens"])
    assert all(
        name in (tok.decode([i]), f"bytes:\\x{tok.token_bytes(i).hex()}") for name, i in names
    )
    assert site.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    name = {"prompt": "<|endoftext|>", "add_special_tokens": False}  # as lm-eval asks
    assert site.post("/tokenize", name).json()["tokens"] == [tok.bos_id]
    talk = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    chat, _ = tok.chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert site.post("/tokenize", talk).json()["tokens"] == chat
    info = site.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>" and "<|im_start|>" in info["chat_template"]


WRONG = [
    ('{"prompt": "a"', "the body is no JSON"),
    (b'{"prompt": "\xff"}', "the body is no JSON"),
    ("[" * 100_000, "the body is no JSON"),
    ('{"prompt": "a", "temperature": NaN}', "the body is no JSON"),
    ("[1]", "expected a JSON object, not list"),
    ("{}", "prompt: expected"),
    ('{"prompt": []}', "prompt: expected"),
    ('{"prompt": ["a", 1]}', "prompt: expected"),
    ('{"prompt": [true]}', "prompt: expected"),
    ('{"prompt": [999999]}', "ids from 0 to 511"),
    ('{"prompt": "a", "max_tokens": -1}', "max_tokens = -1: expected a whole number from 0"),
    ('{"prompt": "a", "max_tokens": 1e999}', "max_tokens = inf"),
    ('{"prompt": "a", "max_tokens": 64}', "do not fit the 64 tokens"),
    ('{"prompt": "a", "n": 100000000000000000000}', "n = 100000000000000000000: expected"),
    ('{"prompt": "a", "n": true}', "n = True"),
    ('{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "the body is no JSON"),
    ('{"prompt": "a", "temperature": "hot"}', "temperature = 'hot': expected a number"),
    ('{"prompt": "a", "stop": [1]}', "stop: expected"),
    ('{"prompt": "a", "stream": 1}', "stream = 1: expected true or false"),
    ('{"prompt": "a", "n": 3, "best_of": 2}', "best_of = 2: expected n = 3 or more"),
    ('{"prompt": "a", "temprature": 1}', "did you mean 'temperature'?"),
    ('{"prompt": "a", "bad_words": ["x"]}', "'bad_words' is not supported"),
    ('{"messages": "hi"}', "messages = 'hi': expected a list"),
    ('{"messages": [{"role": "\\ud800", "content": "a"}]}', "messages[0]: expected"),
    ('{"messages": [{"role": "user", "content": 5}]}', "messages[0]: expected"),
]


@pytest.mark.parametrize(("body", "why"), WRONG, ids=[why for _, why in WRONG])
def test_a_malformed_request_is_told_what_is_wrong(site, body, why):
    path = "/v1/chat/completions" if "messages" in str(body) else "/v1/completions"
    answer = site.post(path, data=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and why in error["message"] and len(error["message"]) < 250
    assert error["type"] == "invalid_request_error" and set(error) >= {"param", "code"}
    assert error["param"] is None or error["param"].isidentifier()


TEXT, TALK = {"prompt": "import"}, {"messages": [{"role": "user", "content": "hi"}]}
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
# What clients send, with the values that ask for what the server does anyway, and those that ask
# for something else: (field, accepted, refused).
OTHERS = [
    ("audio", [], [{"voice": "a"}, {}]),
    ("chat_template", [], ["{{ messages }}", ""]),
    ("chat_template_kwargs", [{}], [{"enable_thinking": True}, {"messages": []}, [], ""]),
    ("continue_final_message", [False], [True, 0, 0.0, ""]),
    ("detokenize", [True], [False, 1, 1.0, 0]),
    ("dry_multiplier", [0, 0.0], [0.8, False]),
    ("early_stopping", [False], [True, 0]),
    ("function_call", ["none", "auto"], [{"name": "f"}, "f"]),
    ("functions", [[]], [[{"name": "f"}], {}, False, ""]),
    ("bad_words", [[]], [["a"], False]),
    ("grammar", [""], ["root ::= x", False]),
    ("guided_choice", [], [[], [1], "a", False]),
    ("guided_json", [], [[], {"type": "text"}, "{", False]),
    ("guided_regex", [""], ["(", 1, False]),
    ("include_stop_str_in_output", [False, True], [1, 0]),
    ("length_penalty", [1, 1.0], [0.0, 0, 2, True]),
    ("logit_bias", [{}, {"1": 5}, {"1": -0.5}], [{"1": 101}, {"1": True}, {"a": 0}, False, 0]),
    ("metadata", [{}, {"a": "b"}], ["a", False, []]),
    ("min_tokens", [0, 1], [3, -1, False, 0.0]),
    ("mirostat", [0], [2, False]),
    ("modalities", [["text"]], [["text", "audio"], ["audio"], "text"]),
    ("n_predict", [], [5, -1]),
    ("parallel_tool_calls", [True, False], [1, "false"]),
    ("prompt_cache_key", ["a"], [1, False]),
    ("prompt_logprobs", [], [0, 1, False]),
    ("reasoning_effort", ["none"], ["high", ""]),
    ("repeat_penalty", [1, 1.0], [1.1, 0, 0.0, True]),
    ("response_format", [{"type": "text"}], [{"type": "json_schema"}, {}, "text", False]),
    ("service_tier", ["auto", "default"], ["flex", 0]),
    ("skip_special_tokens", [True, False], [0, 1, 1.0, "true"]),
    ("stop_token_ids", [[], [1]], [[-1], [512], [True], ["a"], 0, False]),
    ("structured_outputs", [{}, {"regex": None}], [{"regex": "("}, {"a": 1}, [], "", False]),
    ("store", [False], [True, 0, ""]),
    ("tool_choice", ["none", "auto"], ["required", {"type": "function"}, False]),
    ("tools", [[]], [[{"type": "function"}], {}, False, 0]),
    ("top_n_sigma", [-1, -1.0], [1.0, 0]),
    ("truncate_prompt_tokens", [5, -1], [-2, 0, True, "5"]),
    ("typical_p", [1, 1.0], [0.5, 0.0, True]),
    ("use_beam_search", [False], [True, 0, 0.0]),
    ("user", ["me", ""], [5, False, []]),
    ("verbosity", ["medium"], ["low"]),
    ("xtc_probability", [0, 0.0], [0.1, False]),
    ("temprature", [], [0, 1, False, "", [], {}]),
]
OWN = [  # fields of one address
    (COMPLETE, TEXT, "add_special_tokens", [True, False], [0, 1, ""]),
    (COMPLETE, TEXT, "suffix", [""], ["a", False]),
    (COMPLETE, TEXT, "best_of", [1, 2], [0, 129, True, 1.0]),
    (COMPLETE, TEXT, "logprobs", [0, 2], [True, False, 1.0, -1]),
    (COMPLETE, TEXT, "messages", [], [[], TALK["messages"]]),
    (COMPLETE, TEXT, "stop", ["a", ["a"], [], ""], [0, False, {}, [1], [None]]),
    (COMPLETE, TEXT, "stream_options", [{}, {"include_usage": None}], [[], {"include_usage": 1}]),
    (COMPLETE, TEXT, "stream_options", [{"include_usage": True}], [{"usage": True}, False]),
    (COMPLETE, TEXT, "stream_options", [{"include_obfuscation": False}], [{"user": "me"}]),
    (CHAT, TALK, "stream_options", [], [{"include_obfuscation": True}, {"include_usage": "yes"}]),
    (CHAT, TALK, "add_generation_prompt", [True], [False, 1, 0]),
    (CHAT, TALK, "add_special_tokens", [False], [True, 0]),
    (CHAT, TALK, "echo", [False], [True, 0, ""]),
    (CHAT, TALK, "logprobs", [True, False], [0, 1, 2]),
    (CHAT, TALK, "max_completion_tokens", [1], [2, 1.0, True]),
    (CHAT, TALK, "prompt", [], ["a", ""]),
    (CHAT, TALK, "top_logprobs", [0], [1, False, 0.0]),
    ("/tokenize", TEXT, "add_special_tokens", [True, False], [0, 1, "no"]),
    ("/tokenize", TEXT, "return_token_strs", [True, False], [1, 0, "no"]),
    ("/tokenize", TEXT, "model", ["tiny"], [5, "other"]),
    ("/tokenize", TEXT, "parse_special", [], [True, False]),
    ("/tokenize", TEXT, "messages", [], [[], TALK["messages"]]),
    ("/tokenize", TALK, "add_special_tokens", [False], [True]),
    ("/tokenize", TALK, "add_generation_prompt", [True], [False, 1]),
    ("/detokenize", {"tokens": [1]}, "model", ["tiny"], ["other"]),
    ("/detokenize", {"tokens": [1]}, "skip_special_tokens", [True], [False]),
    ("/inspect/neighbours", {"token": 1}, "n", [2], [2.0, True, "2"]),
    ("/inspect/neighbours", {"token": 1}, "text", [], ["a", ""]),
    ("/inspect/attention", {"ids": [1]}, "text", [], ["a", ""]),
    ("/inspect/attention", {"ids": [1]}, "head", [0], [False, "0"]),
    ("/inspect/attention", {"ids": [1]}, "tools", [], [[], False]),
    ("/inspect/attention", {"ids": [1]}, "mean", ["", "both"], ["all", True]),
    ("/inspect/next", {"ids": [1]}, "draw", [True], [1, "true"]),
    ("/inspect/next", {"ids": [1]}, "then", [[], [2]], [2, [-1], "a"]),
    ("/inspect/steps", {"text": "a"}, "ids", [], [[1]]),
]
OWN += [(path, body, *other) for path, body in ((COMPLETE, TEXT), (CHAT, TALK)) for other in OTHERS]


def test_what_is_asked_for_is_done_or_refused_by_name(site):
    session = requests.Session()
    post = lambda path, body: session.post(site.url + path, json=body)
    for path, body, name, accepted, refused in OWN:
        if path in (COMPLETE, CHAT):
            body = body | {"max_tokens": 1}
        for value in [None, *accepted]:
            answer = post(path, body | {name: value})
            assert answer.status_code == 200, (path, name, value, answer.text)
        for value in refused:
            answer = post(path, body | {name: value})
            assert answer.status_code in (400, 404), (path, name, value)
            told = answer.json()["error"]
            inner = value if isinstance(value, dict) and name == "stream_options" else {}
            assert told["param"] in (name, *inner, "max_tokens", "model"), (path, name, value)


def test_parts_of_messages_are_read_or_refused_by_name(site):
    say = {"role": "assistant", "content": "hi"}
    empty = dict(refusal=None, tool_calls=[], annotations=[], audio=None, reasoning_content="")
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    wrong = [say | {"name": name} for name in (["Ann"], [], {}, False, 0)]
    wrong += [say | {"tool_calls": [{"id": "1"}]}, say | {"prefix": True}]
    wrong += [say | {"role": "function"}, say | {"content": None}, say | {"content": [{"text": 1}]}]
    wrong += [say | {"content": [{"type": "image_url", "text": "a"}]}, say | {"prefix": 0}, [], "a"]
    wrong += [
        say | {"content": [part | {"weight": 2}]},
        say | {"role": None},
        say | {"role": ["user"]},
    ]
    ids = site.post("/tokenize", {"messages": [say]}).json()["tokens"]
    for message in (say | empty, say | {"content": [part]}, say | {"name": "Ann"}):
        assert site.post("/tokenize", {"messages": [message]}).json()["tokens"] == ids
    for message in wrong:
        answer = site.post(CHAT, {"messages": [message]})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("messages[0]: "), message


def test_a_prompt_without_special_tokens(site, loaded):
    _, tok = loaded
    # Where nothing stands before the answer, bos does.
    assert site.complete(prompt="", max_tokens=1)["usage"]["prompt_tokens"] == 1
    bare = site.post(COMPLETE, {"prompt": "", "max_tokens": 1, "add_special_tokens": False})
    assert bare.status_code == 400 and "none of them empty" in bare.text
    led = Tokenizer(tok.spec, tok.config)
    led.start = [tok.bos_id]  # as a Llama's tokenizer puts it
    served = api.ServedModel("led", led, max_len=64, max_queue=9)
    for special, before in ((False, []), (True, [tok.bos_id])):
        request = api.Completion(prompt="import os", add_special_tokens=special)
        assert api.read_prompts(served, request) == [before + tok.encode("import os")]


def test_errors_have_one_shape_and_the_server_lives_on(site):
    for answer, status in (
        (site.get("/nothing"), 404),
        (site.get("/v1/models/other"), 404),
        (site.get("/v1/completions"), 405),
        (site.post("/v1/completions", data=b"x" * 4_000_001), 413),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]
    address = site.url.removeprefix("http://").split(":")
    for data in (
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    ):
        with socket.create_connection(address) as wire:
            wire.sendall(data)
    assert site.complete(prompt="import os", max_tokens=1)["choices"]
    assert site.get("/health").json() == {"status": "ok"} and site.get("/").status_code == 200
    for path in ("/", "/health"):  # as probes ask
        seen = requests.head(site.url + path)
        assert seen.status_code == 200 and seen.content == b""


LONG = dict(prompt="import", n=40, max_tokens=60, ignore_eos=True, stream=True)


def test_a_full_queue_refuses_and_a_client_that_leaves_frees_its_place(tiny):
    long = LONG | {"n": 128}  # seconds of work, of which the test sees the beginning
    with served(tiny, "--max_batch=1", "--max_queue=128") as site:
        with site.post("/v1/completions", long, stream=True) as answer:
            lines = answer.iter_lines()  # which closes the connection when it is let go
            next(lines)
            refused = site.post("/v1/completions", long)
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert site.metric("batch_size") == 1 and site.metric("queue_length") > 0
        site.until("batch_size", 0)
        address = site.url.removeprefix("http://").split(":")
        with socket.create_connection(address) as wire:  # one that wants its answer whole
            body = json.dumps(long | {"stream": False})
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            wire.sendall(f"{head}\r\n\r\n{body}".encode())
            site.until("batch_size", 1)
        site.until("batch_size", 0)
        assert site.metric("queue_length") == 0
        assert site.metric("generated_tokens_total") < 2 * 128 * 60  # neither was finished
        assert site.complete(prompt="import", max_tokens=2)["choices"]
        made = site.metric("first_token_seconds_count")
        assert (
            site.metric('first_token_seconds_bucket{le="+Inf"}') == made >= 2
        )  # the second may have left before its first


def test_sigterm_finishes_what_runs_and_the_log_has_it(tiny):
    with served(tiny, "--max_batch=1", "--log=requests.jsonl") as site:
        with site.post("/v1/completions", LONG | {"n": 10}, stream=True) as answer:
            lines = answer.iter_lines()
            next(lines)
            site.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == b"data: [DONE]"
        assert site.process.wait() == 0
        with pytest.raises(requests.ConnectionError):
            site.get("/health")
    [row] = map(json.loads, (tiny / "requests.jsonl").read_text().splitlines())
    assert row["path"] == "/v1/completions" and row["status"] == 200
    assert row["completion_tokens"] == 600 and row["finish"] == ["length"] * 10
    assert "import" not in json.dumps(row)


def test_a_key_a_site_and_time_limits_when_asked_for(tiny):
    options = ["--cors=https://a.org", "--log=l.jsonl", "--log_prompts", "--client_timeout=1"]
    with served(tiny, *options, "--timeout=0.05", env={"BARELM_API_KEY": "secret"}) as site:
        body = {"prompt": "import", "max_tokens": 1}
        refused = site.post("/v1/completions", body)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert site.get("/health").status_code == 200
        key = {"Authorization": "Bearer secret", "Origin": "https://a.org"}
        answer = site.post("/v1/completions", body, headers=key)
        assert answer.headers["access-control-allow-origin"] == "https://a.org"
        other = site.post("/v1/completions", body, headers=key | {"Origin": "https://b.org"})
        assert "access-control-allow-origin" not in other.headers
        late = site.post("/v1/completions", LONG | {"stream": False, "n": 100}, headers=key)
        assert late.status_code == 504
        site.until("batch_size", 0)
        with socket.create_connection(site.url.removeprefix("http://").split(":")) as wire:
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")  # and no more
            assert wire.recv(100) == b""
    rows = [*map(json.loads, (tiny / "l.jsonl").read_text().splitlines())]
    # A busy machine may take longer than the limit for these two: their status says nothing.
    short = [row["prompts"] for row in rows if len(row.get("prompts", [])) == 1]
    assert short == [["import"]] * 2


def test_a_cut_off_request_is_told_so_and_a_key_is_read_as_rfc_9110_has_it(tiny):
    with served(tiny, "--drain=0.1", env={"BARELM_API_KEY": " clé\n"}) as site:
        for given, status in (("bearer  clé", 200), ("Bearer clé", 200), ("clé", 401), ("é", 401)):
            key = {"Authorization": given.encode()}
            answer = site.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=key)
            assert answer.status_code == status
        with ThreadPoolExecutor() as pool:
            key = {"Authorization": "Bearer clé".encode()}
            long = LONG | {"stream": False, "n": 128}
            cut = pool.submit(site.post, "/v1/completions", long, headers=key)
            site.until("batch_size", 16)
            site.process.terminate()
            assert cut.result().status_code == 503
            assert cut.result().json()["error"]["message"] == "the server is stopping"


def test_pages_of_other_sites_cannot_use_a_server_on_this_machine(site, tiny):
    def ask(site, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return site.post(COMPLETE, TEXT | {"max_tokens": 1}, headers=headers).status_code

    names = [
        "localhost:80",
        "127.0.0.1",
        "[::1]:80",
        "[::ffff:127.0.0.1]",
        "10.0.0.7",
        "box",
        "BOX.",
    ]
    for name in [*names, "host.docker.internal", "a.local:1", "my_box:8000", "x.localhost"]:
        assert ask(site, Host=name) == 200, name
    wrong = [
        "evil.com",
        "EVIL.com.:8000",
        "evil.com..",
        "evil.com..:80",
        "evil.com:",
        "localhost..",
        ".",
    ]
    wrong += [
        "localhost@evil.com",
        "evil.com@localhost",
        "localhost:80@evil.com",
        "127.0.0.1.evil.com",
    ]
    wrong += [
        "[::1].evil.com",
        "[::1]evil.com",
        "evil.com/localhost",
        "evil.com:80:80",
        "évil.com",
        "",
    ]
    wrong += ["localhost, evil.com", "evil.com#.local", "evil.com?.local"]
    for name in wrong:  # whose DNS says 127.0.0.1
        name = name.encode()
        assert ask(site, Host=name) == 403, name
        assert site.get("/inspect/log", headers={"Host": name}).status_code == 403, name
    cross = {"Sec_Fetch_Site": "cross-site", "Origin": "https://b.org"}
    assert ask(site, **cross) == 403 and ask(site, **cross | {"Sec_Fetch_Site": "same-site"}) == 200
    for origin in ("null", "", "HTTPS://B.ORG", "https://localhost", "file://"):
        assert ask(site, **cross | {"Origin": origin}) == 403, origin
    for fetch in ("cross-site", "Cross-Site", "cross-origin", "cross-site, same-origin"):
        assert ask(site, Sec_Fetch_Site=fetch) == 403, fetch
    for fetch in ("same-origin", "none", "Same-Site"):
        assert ask(site, Sec_Fetch_Site=fetch) == 200, fetch
    for origin in ("https://b.org", "null", "http://evil.com..", "file://"):  # an older browser's
        assert ask(site, Origin=origin) == 403, origin
    assert ask(site, Origin="http://localhost:3000") == 200
    head = {"Sec-Fetch-Site": "cross-site", "Origin": "https://b.org"}
    assert site.get("/", headers=head).status_code == 200  # a link
    with served(tiny, "--cors=https://a.org, https://B.org/,") as site:
        assert ask(site, **cross) == 200 and ask(site, **cross | {"Origin": "https://c.org"}) == 403
        assert ask(site, Sec_Fetch_Site="cross-site") == 403
        answer = site.post(COMPLETE, TEXT, headers=head)
        assert answer.headers["access-control-allow-origin"] == "https://b.org"


def test_no_form_of_a_request_passes_by_the_check_of_the_host(site):
    body = json.dumps(TEXT | {"max_tokens": 1}).encode()
    port = int(site.url.rpartition(":")[2])

    def status(target, version, *hosts, more=()):
        lines = [f"POST {target} HTTP/{version}", *(f"Host: {host}" for host in hosts), *more]
        lines += [f"Content-Length: {len(body)}", "Connection: close"]
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            return int(wire.recv(1000).split()[1])

    for version in ("1.0", "1.1"):
        assert status(COMPLETE, version, "localhost") == 200
        assert status(COMPLETE, version, "evil.com") == 403
        assert status(COMPLETE, version, "localhost", "evil.com") == 400
        assert status(COMPLETE, version, "evil.com", "localhost") == 400
        assert status(f"http://evil.com{COMPLETE}", version, "evil.com") == 403
        assert status(f"http://evil.com{COMPLETE}", version, "localhost") == 404
    twice = ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-origin"]
    assert status(COMPLETE, "1.1", "localhost", more=twice) == 403
    assert status(COMPLETE, "1.1", "localhost", more=twice[::-1]) == 403
    assert status(COMPLETE, "1.1") == 400  # which must name its host
    assert status(COMPLETE, "1.0") == 200  # which no browser sends


def test_malformed_requests_of_every_kind_are_refused_and_leave_nothing(site):
    draw = random.Random(0)
    port = int(site.url.rpartition(":")[2])
    good = json.dumps(TEXT | {"max_tokens": 1}).encode()
    chunk = lambda data: b"%x\r\n" % len(data) + data + b"\r\n"

    def send(data, path=COMPLETE, head=b"", length=True):
        """The status of the answer to these bytes; None where there is none."""
        head = b"POST " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head
        if length:
            head += b"Content-Length: %d\r\n" % len(data)
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.sendall(head + b"\r\n" + data)
            with contextlib.suppress(ConnectionError):
                if answer := wire.recv(1000):
                    return int(answer.split()[1])

    deep = [b"[" * n + b"]" * n for n in (500, 990, 100_000)]
    deep += [b'{"a":' * n + b"1" + b"}" * n for n in (500, 990, 100_000)]
    wrong = [*deep, b"", b"null", b"\xff", b"\xef\xbb\xbf{}", good + b"x", good * 2, b"1" * 9999]
    for name in (b"prompt", b"messages", b"tools", b"stop", b"stream_options", b"logit_bias", b"x"):
        wrong += [b'{"prompt": "a", "%s": %s}' % (name, value) for value in deep]
    values = [
        None,
        True,
        0,
        -1,
        1.5,
        2**70,
        1e308,
        "",
        "a",
        "\ud800",
        [],
        {},
        [[]],
        {"a": {}},
        [None],
    ]
    names = [
        "prompt",
        "n",
        "seed",
        "stop",
        "top_k",
        "tools",
        "messages",
        "stream",
        "logprobs",
        "model",
    ]
    for _ in range(150):
        fields = {name: draw.choice(values) for name in draw.sample(names, 4)}
        wrong.append(json.dumps({"max_tokens": 1} | fields).encode())
    for body in wrong:
        path = draw.choice([COMPLETE, CHAT, "/tokenize", "/detokenize", "/inspect/attention"])
        assert send(body, path) in (200, 400, 404), (path, body[:200])
    chunked = b"Transfer-Encoding: chunked\r\n"
    assert send(chunk(good[:9]) + chunk(good[9:]) + b"0\r\n\r\n", head=chunked, length=False) == 200
    for body in (b"zz\r\n", b"-1\r\n", b"f" * 40 + b"\r\n", b"0\r\n\r\n", chunk(good) + b"q\r\n"):
        assert send(body, head=chunked, length=False) == 400, body
    heads = [b"X : 1", b": 1", b"X: \0", b"Content-Length: 3"]
    for head in [*heads, b"Content-Length: -1", b"Content-Length: " + b"9" * 30]:
        assert send(good, head=head + b"\r\n") == 400, head[:40]
    for _ in range(20):  # a client that leaves at some byte
        body = json.dumps(TEXT | {"max_tokens": 50, "n": 3}).encode()
        whole = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (
            COMPLETE.encode(),
            len(body),
        )
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.sendall((whole + body)[: draw.randrange(len(whole + body) + 1)])
    assert not re.search('status="5', site.get("/metrics").text)
    site.until("batch_size", 0)
    assert site.complete(**TEXT, max_tokens=1)["choices"]


def test_an_address_of_this_machine_is_one_however_it_is_written():
    for address, loopback in (
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("10.0.0.7", False),
        ("::", False),
        ("fe80::1%eth0", False),
    ):
        assert is_loopback(address) == loopback
    with listen("127.0.0.1", 0) as sock:  # asyncio switches Nagle's algorithm off by this
        assert sock.proto == socket.IPPROTO_TCP


def test_connections_are_bounded_and_a_full_disk_ends_no_answer(tiny, tmp_path):
    resource = pytest.importorskip("resource")
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    options = ["--max_connections=5", "--log=/dev/full"]
    with open(tmp_path / "err", "w+") as err:
        with served(tiny, *options, stderr=err, preexec_fn=few) as site:
            address = ("127.0.0.1", int(site.url.rpartition(":")[2]))
            with contextlib.ExitStack() as stack:
                for _ in range(100):  # more than it may have open files
                    stack.enter_context(socket.create_connection(address))
                refused = site.get("/v1/models")
                assert refused.status_code == 503 and refused.headers["retry-after"]
                assert refused.json()["error"]["type"] == "server_error"
                assert site.get("/health").status_code == 200
            while site.get("/v1/models").status_code == 503:
                pass
            assert site.complete(**TEXT, max_tokens=1)["choices"]
        err.seek(0)
        told = err.read().splitlines()
    if os.path.exists("/dev/full"):
        assert told == ["serve.py: --log=/dev/full: No space left on device"]


def test_signals_at_any_moment_end_it_in_order(tiny, tmp_path):
    with served(tiny) as site:
        site.process.terminate()  # at once
        assert site.process.wait() == 0
    with open(tmp_path / "err", "w+") as err:
        with served(tiny, "--max_batch=1", stderr=err) as site, ThreadPoolExecutor() as pool:
            address = ("127.0.0.1", int(site.url.rpartition(":")[2]))
            whole = pool.submit(site.post, COMPLETE, LONG | {"stream": False, "n": 100})
            site.until("batch_size", 1)
            with site.post(COMPLETE, LONG, stream=True) as answer:
                site.process.send_signal(signal.SIGINT)
                with contextlib.suppress(OSError):  # till the port is closed
                    while True:
                        socket.create_connection(address).close()
                site.process.send_signal(signal.SIGINT)
                told = [line for line in answer.iter_lines() if line]
            assert whole.result().status_code == 503
            assert "the server is stopping" in told[-1].decode()
            assert site.process.wait() == 130
        err.seek(0)
        told = err.read().splitlines()
    assert told == ["serve.py: '/v1/completions': cut off by a second Ctrl-C"] * 2


def test_a_network_that_gives_no_numbers_is_an_error_and_no_text(tiny, loaded, tmp_path):
    net, tok = load(tiny / "out" / "tiny")
    net.model.norm.weight.data.fill_(3e38)  # finite, but the product with it is not
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "tiny", net, tok)
    with served(tmp_path) as site:
        for path, body in ((COMPLETE, TEXT), (CHAT, TALK), (COMPLETE, TEXT | {"echo": True})):
            answer = site.post(path, body | {"max_tokens": 3, "temperature": 0})
            assert answer.status_code == 500 and "NaN or infinity" in answer.text
            assert answer.json()["error"]["type"] == "server_error"
        scored = site.post(COMPLETE, TEXT | {"echo": True, "logprobs": 1, "max_tokens": 0})
        assert scored.status_code == 500
        with site.post(COMPLETE, TEXT | {"stream": True}, stream=True) as answer:
            [line] = [line for line in answer.iter_lines() if line]
        assert "NaN or infinity" in json.loads(line[6:])["error"]["message"]
        assert site.get("/health").status_code == 200
        assert site.metric("batch_size") == 0


def test_connections_that_end_in_the_middle_leave_nothing(tiny):
    import asyncio
    import gc

    import uvicorn

    client_timeout = 0.05
    protocol = partial(PatientProtocol, client_timeout=client_timeout)

    async def never(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def count():
        quiet = dict(log_level="critical", lifespan="off", port=0)
        server = uvicorn.Server(uvicorn.Config(never, http=protocol, **quiet))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        for _ in range(5):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.read(12)
            writer.close()
        await asyncio.sleep(10 * client_timeout)
        gc.collect()
        left = sum(type(o) is PatientProtocol for o in gc.get_objects())
        server.should_exit = True
        await task
        return left

    assert asyncio.run(count()) == 0


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="Linux tells of its sockets")
def test_a_client_that_reads_nothing_is_cut_off(tiny):
    with served(tiny, "--client_timeout=1", "--max_batch=32") as site, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        wire.connect(("127.0.0.1", int(site.url.rsplit(":", 1)[1])))
        body = json.dumps(LONG | {"logprobs": 20, "n": 128})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
        wire.sendall(f"{head}\r\n\r\n{body}".encode())
        ends = [f":{end[1]:04X}" for end in (wire.getpeername(), wire.getsockname())]

        def open_there():
            with open("/proc/net/tcp") as file:
                rows = [line.split() for line in file]
            return any([r[1][-5:], r[2][-5:], r[3]] == [*ends, "01"] for r in rows)

        assert open_there()
        while open_there():
            time.sleep(0.1)


def test_a_model_whose_chat_template_fits_no_mask_can_be_served(loaded, capsys, monkeypatch):
    monkeypatch.setattr("barelm.chat.TEMPLATE_SECONDS", 0.3)
    _, tok = loaded
    # An answer has another header than the prompt for one: where it begins cannot be told.
    other = """{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}
{% if add_generation_prompt %}<|im_start|>{% endif %}"""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    several = [{"name": "tools", "template": other}]
    for template in (other, "{% for m in %}", "{{ 'a' * 10**10 }}", endless, several):
        odd = Tokenizer(tok.spec, tok.config | {"chat_template": template})
        assert api.chat_ends(odd) == []
        assert "chat ends at the end token alone: " in capsys.readouterr().out
    assert len(api.chat_ends(tok)) == 1


def test_what_cannot_be_served_is_refused_at_the_start(tiny, tmp_path):
    def refusal(*args):
        done = run(tiny, "serve.py", *args, check=False)
        assert done.returncode == 1 and done.stdout.count("serving") == 0, done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "no such folder" in refusal("--model=out/none")
    assert "--max_len=65: expected 2 to 64" in refusal("--model=out/tiny", "--max_len=65")
    assert "--max_batch=0" in refusal("--model=out/tiny", "--max_batch=0")
    assert "--api_key= is empty" in refusal("--model=out/tiny", "--api_key=")
    assert "--port=65536" in refusal("--model=out/tiny", "--port=65536")
    assert "no memory for the keys" in refusal("--model=out/tiny", f"--max_batch={10**12}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "--port=0 takes a free one" in refusal("--model=out/tiny", f"--port={port}")
    net, tok = load(tiny / "out" / "tiny")
    net.set_score(["O", "B-x"], task="tag")
    save(tmp_path / "tags", net, tok)
    assert "has a head for tag, which is not served" in refusal(f"--model={tmp_path}/tags")


def test_types_of_fields_that_are_text_are_read(tmp_path, monkeypatch):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "@dataclass\nclass Asked:\n    n: int | None = None\n    name: str = ''\n"
    (tmp_path / "asked_types.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    from asked_types import Asked

    assert api.read_fields({"n": 3, "name": None}, Asked) == Asked(3, "")
    with pytest.raises(api.ApiError, match="n = 'x': expected a whole number"):
        api.read_fields({"n": "x"}, Asked)
    for type_ in (api.Chat, api.Completion, Asked):
        assert not any(isinstance(kind, str) for kind in api.field_types(type_).values())
