"""What clients of other servers send serve.py: names of the model, parameters one by one, other
addresses than the usual."""

import base64
import dataclasses
import inspect
import json

import numpy as np
import pytest
import requests
import torch

import model
from barelm import api, responses_api, vector_api
from barelm.checkpoint import load, save
from barelm.run import UserError
from barelm.texts import Row, TextStream

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from test_serve import served

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
EMBED, RESPOND = "/v1/embeddings", "/v1/responses"


def test_a_model_has_the_names_that_it_is_given(tiny):
    ask = {"prompt": "import", "max_tokens": 1}
    with served(tiny, "--name=org/sft, gpt-4o-mini", name="org/sft") as site:
        cards = site.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["org/sft", "gpt-4o-mini"]
        for name in ("org/sft", "gpt-4o-mini"):
            assert site.get(f"/v1/models/{name}").json()["id"] == name
            assert site.complete(**ask, model=name)["model"] == "org/sft"
        assert site.complete(**ask)["model"] == "org/sft"
        refused = site.post(COMPLETE, ask | {"model": "tiny"})
        assert refused.status_code == 404
        assert "this server has 'org/sft' or 'gpt-4o-mini'" in refused.json()["error"]["message"]


def test_names_come_from_a_flag_or_the_environment_or_the_folder(monkeypatch, tmp_path):
    import serve

    monkeypatch.delenv("BARELM_NAME", raising=False)
    monkeypatch.setattr(serve, "model", str(tmp_path / "sft"))
    assert serve.read_names() == ["sft"]
    monkeypatch.setenv("BARELM_NAME", "one, two,one")
    assert serve.read_names() == ["one", "two"]
    monkeypatch.setattr(serve, "name", "org/a")
    assert serve.read_names() == ["org/a"]
    for wrong in ("", "a,,b", "a\nb", " , "):
        monkeypatch.setattr(serve, "name", wrong)
        with pytest.raises(UserError, match="expected names with commas between"):
            serve.read_names()


@pytest.fixture(scope="module")
def site(tiny):
    with served(tiny, "--max_batch=4") as site:
        yield site


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """A random model that chats of tools fit into."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    net, tok = load(tiny / "out" / "tiny")
    net = model.GPT(dataclasses.replace(net.config, n_ctx=1024))
    (folder / "out").mkdir()
    save(folder / "out" / "tiny", net, tok)
    with served(folder, "--max_batch=4", "--max_queue=8") as site:
        yield site


@pytest.fixture(scope="module")
def loaded(tiny):
    return load(tiny / "out" / "tiny")


def greedy(net, tok, prompt, n):
    """The ids that a naive loop makes, over the whole text each time."""
    ids = [*prompt]
    for _ in range(n):
        with torch.no_grad():
            logits = net(torch.tensor([ids]))[0, -1, : tok.n_vocab]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_a_token_ends_an_answer_and_is_shown_where_that_is_asked_for(site, loaded):
    net, tok = loaded
    prompt = tok.encode("import os\nimport")
    drawn = dict(temperature=1.5, top_k=9, seed=4)
    [g] = model.generate(net, tok, [prompt], max_new_tokens=20, **drawn)
    ids = g.ids
    # The first token that was not there before, and is text.
    place = next(i for i in range(4, len(ids)) if ids[i] not in ids[:i] and tok.token_bytes(ids[i]))
    text = b"".join(map(tok.token_bytes, ids[:place])).decode()
    shown = b"".join(map(tok.token_bytes, ids[: place + 1])).decode()
    body = dict(prompt=prompt, max_tokens=20, ignore_eos=True) | drawn
    body |= dict(stop_token_ids=[ids[place]], return_token_ids=True)
    [choice] = site.complete(**body)["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "stop"
    assert choice["token_ids"] == ids[: place + 1] and choice["prompt_token_ids"] == prompt
    [choice] = site.complete(**body, include_stop_str_in_output=True)["choices"]
    assert choice["text"] == shown
    chunks = site.stream(COMPLETE, **body, include_stop_str_in_output=True)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == shown
    assert sum([part["token_ids"] for part in parts], []) == ids[: place + 1]


def test_a_stop_text_is_kept_where_that_is_asked_for():
    for stop, data, kept in (
        (["b"], [b"aab", b"bc"], "aab"),
        (["ca", "bc"], [b"ab", b"ca", b"d"], "abc"),
        (["xy", "x"], [b"aaxyz"], "aax"),  # the one that ends first
        (["xyz"], [b"ax", b"y", b"w"], "axyw"),
    ):
        stream = TextStream(stop, keeps_stop=True)
        told = ""
        for piece in data:
            told += "" if stream.stopped else stream.feed(piece)
        told += "" if stream.stopped else stream.feed(b"", final=True)
        assert told == stream.text == kept


def test_special_tokens_are_part_of_the_text_where_that_is_asked_for(site, loaded):
    net, tok = loaded
    special = tok.special["<|im_end|>"]
    row = Row(tok, 5, [], shows_special=True, ends=[])
    other = tok.encode("a")[0]
    for token in (other, special, other):
        row.take(token, 0.0)
    assert row.out.text == "a<|im_end|>a"
    body = dict(prompt="import", max_tokens=60, seed=5, temperature=2.5, ignore_eos=True)
    body |= dict(return_token_ids=True, logprobs=0, skip_special_tokens=False)
    answers = [site.complete(**body | {"seed": seed})["choices"][0] for seed in range(6)]
    seen = set()
    for choice in answers:
        names = [tok.shown[id] for id in choice["token_ids"]]
        assert choice["text"] == b"".join(names).decode(errors="replace")
        places = [len(b"".join(names[:i]).decode(errors="ignore")) for i in range(len(names))]
        assert choice["logprobs"]["text_offset"][0] == places[0] == 0
        seen |= set(choice["token_ids"]) & set(tok.special.values())
    assert seen  # such a token was drawn


def test_best_of_answers_with_the_likeliest(site):
    body = dict(prompt=["import", "def f("], max_tokens=6, seed=7, logprobs=0, temperature=1.5)
    every = site.complete(**body, n=5)
    best = site.complete(**body, n=2, best_of=5)
    for prompt in range(2):
        of_prompt = every["choices"][5 * prompt : 5 * prompt + 5]
        means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) for c in of_prompt}
        lengths = {c["text"]: len(c["logprobs"]["tokens"]) for c in of_prompt}
        order = sorted(means, key=lambda text: -means[text] / lengths[text])
        chosen = best["choices"][2 * prompt : 2 * prompt + 2]
        assert [c["text"] for c in chosen] == order[:2]
    assert [c["index"] for c in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"] == every["usage"] | {
        "prompt_tokens_details": best["usage"]["prompt_tokens_details"]
    }
    refused = site.post(COMPLETE, body | {"best_of": 2, "stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "best_of"


def test_a_long_prompt_is_cut_to_what_was_asked_for(site, loaded):
    net, tok = loaded
    ids = tok.encode("import os\n" * 40)[:100]
    body = dict(prompt=ids, max_tokens=5, temperature=0, return_token_ids=True, ignore_eos=True)
    for n, side, kept in (
        (9, None, ids[-9:]),
        (9, "left", ids[-9:]),
        (9, "right", ids[:9]),
        (-1, None, ids[-59:]),
        (59, None, ids[-59:]),
    ):
        answer = site.complete(**body, truncate_prompt_tokens=n, truncation_side=side)
        [choice] = answer["choices"]
        assert choice["prompt_token_ids"] == kept and answer["usage"]["prompt_tokens"] == len(kept)
        assert choice["token_ids"] == greedy(net, tok, kept, 5)
    talk = {"messages": [{"role": "user", "content": "import os " * 9}], "max_tokens": 5}
    whole = site.post("/tokenize", {"messages": talk["messages"]}).json()["tokens"]
    more = {"truncate_prompt_tokens": 10, "return_token_ids": True}
    answer = site.post(CHAT, talk | more).json()
    assert answer["prompt_token_ids"] == whole[-10:]
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


def test_tokens_are_called_by_their_ids_where_that_is_asked_for(site):
    body = dict(prompt="import", max_tokens=3, logprobs=2, temperature=0, return_token_ids=True)
    [choice] = site.complete(**body, return_tokens_as_token_ids=True)["choices"]
    names = [f"token_id:{id}" for id in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names
    assert all(name in tops for name, tops in zip(names, choice["logprobs"]["top_logprobs"]))


def test_a_gap_is_filled_by_the_tokens_that_the_tokenizer_has_for_it(loaded):
    _, tok = loaded
    plain = api.ServedModel("plain", tok, max_len=64, max_queue=9)
    with pytest.raises(api.ApiError, match="suffix: this model's tokenizer has no tokens") as error:
        api.read_completion(plain, {"prompt": "a", "suffix": "b"})
    assert error.value.param == "suffix"
    for names in (
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
        (
            "<\uff5cfim\u2581begin\uff5c>",
            "<\uff5cfim\u2581hole\uff5c>",
            "<\uff5cfim\u2581end\uff5c>",
        ),
    ):
        gap = tok.with_added([*names])
        prefix, suffix, middle = (gap.special[name] for name in names)
        described = api.ServedModel("gap", gap, max_len=64, max_queue=9)
        request = api.read_completion(described, {"prompt": "def f(", "suffix": "\n    return"})
        [ids] = api.read_prompts(described, request)
        behind = [suffix, *tok.encode("\n    return"), middle]
        assert ids == [prefix, *tok.encode("def f("), *behind]
        [job] = api.completion_jobs(described, request, [ids], None)
        assert middle in job.row.ends and suffix in job.row.ends
        gap.start = [gap.bos_id]  # as Code Llama's tokenizer begins a text
        [ids] = api.read_prompts(described, request)
        assert ids[:2] == [gap.bos_id, prefix]


def naive_vector(net, ids, pooling, size=None):
    """A text's unit vector, by itself and without padding."""
    with torch.no_grad():
        states = net.states(torch.tensor([ids]), torch.tensor([len(ids)]))[0].double()  # (T, C)
    vector = {"mean": states.mean(0), "last": states[-1], "first": states[0]}[pooling][:size]
    return (vector / vector.norm()).numpy()


def test_vectors_are_pooled_shortened_and_cut_as_asked(site, loaded):
    net, tok = loaded
    texts = ["one", "two three, and then some more", "def f(x):"]
    rows = [tok.encode(text) for text in texts]
    for pooling in ("mean", "last", "first"):
        for size in (None, 7):
            body = {"input": texts, "pooling": pooling, "dimensions": size}
            data = site.post(EMBED, body).json()["data"]
            expected = [naive_vector(net, ids, pooling, size) for ids in rows]
            given = [row["embedding"] for row in data]
            np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4)
            body |= {"encoding_format": "base64"}
            coded = site.post(EMBED, body).json()["data"]
            again = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded]
            np.testing.assert_allclose(again, given, rtol=1e-6)
    long = tok.encode("import os\n" * 40)
    for n, side, kept in ((9, None, long[:9]), (9, "left", long[-9:]), (-1, None, long[:64])):
        for given in (long, "import os\n" * 40):
            body = {"input": given, "truncate_prompt_tokens": n, "truncation_side": side}
            answer = site.post(EMBED, body).json()
            vector = answer["data"][0]["embedding"]
            np.testing.assert_allclose(vector, naive_vector(net, kept, "mean"), atol=1e-4)
            assert answer["usage"]["prompt_tokens"] == len(kept)


def events_of(site, body):
    """The events of a streamed response, whose names are their types."""
    with site.post(RESPOND, body | {"stream": True}, stream=True) as answer:
        assert answer.status_code == 200, answer.text
        lines = [line.decode() for line in answer.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [e["type"] for e in events]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    return events


def test_a_response_says_what_a_chat_says(site):
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    talk += [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
    drawn = dict(temperature=0.9, top_p=0.9, seed=3)
    asked = dict(messages=talk, max_completion_tokens=9, logprobs=True, top_logprobs=2)
    [choice] = (chat := site.post(CHAT, asked | drawn).json())["choices"]
    said = {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "message", "id": "m", "status": "completed", "role": "assistant"}
        | {"content": [said]},
        {"role": "user", "content": "bye"},
    ]
    body = dict(input=items, instructions="be brief", max_output_tokens=9, top_logprobs=2)
    body |= dict(include=["message.output_text.logprobs"], metadata={"a": "b"}) | drawn
    whole = site.post(RESPOND, body).json()
    [message] = whole["output"]
    [part] = message["content"]
    assert part["text"] == choice["message"]["content"] and part["annotations"] == []
    assert [t["token"] for t in part["logprobs"]] == [
        t["token"] for t in choice["logprobs"]["content"]
    ]
    assert all(len(token["top_logprobs"]) == 2 for token in part["logprobs"])
    cut = choice["finish_reason"] == "length"
    assert whole["status"] == message["status"] == ("incomplete" if cut else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    assert whole["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert whole["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    assert whole["metadata"] == {"a": "b"} and whole["store"] is False
    events = events_of(site, body)
    kinds = [event["type"].removeprefix("response.") for event in events]
    n_deltas = kinds.count("output_text.delta")
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", whole["status"]]
    assert kinds == begin + ["output_text.delta"] * n_deltas + end and n_deltas > 1
    deltas = events[4:-4]
    assert "".join(event["delta"] for event in deltas) == part["text"] == events[-4]["text"]
    assert len(sum([event["logprobs"] for event in deltas], [])) == len(part["logprobs"])
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == part["text"]
    assert events[2]["item"]["content"] == [] and events[-2]["item"] == last["output"][0]


def test_a_response_that_ends_by_itself_is_complete(site):
    body = {"input": "hi", "max_output_tokens": 20, "temperature": 0, "stop": [" "]}
    text = site.post(RESPOND, body | {"stop": []}).json()["output"][0]["content"][0]["text"]
    stop = text[1:3]
    whole = site.post(RESPOND, body | {"stop": [stop]}).json()
    assert whole["status"] == "completed" and whole["incomplete_details"] is None
    assert whole["output"][0]["content"][0]["text"] == text[: text.index(stop)]
    assert events_of(site, body | {"stop": [stop]})[-1]["type"] == "response.completed"
    none = events_of(site, body | {"stop": [text[0]]})  # nothing at all is said
    assert none[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_items_become_the_messages_of_a_chat():
    call = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    thought |= {"content": [{"type": "reasoning_text", "text": "hm"}]}
    items = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hi"},
        thought,
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        call,
        call | {"call_id": "c2", "name": "g"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
        {"role": "assistant", "content": "12"},
        {"role": "assistant", "content": "and more"},
    ]
    calls = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for id, name in (("c1", "f"), ("c2", "g"))
    ]
    assert responses_api.read_input(items) == [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "12"},
        {"role": "assistant", "content": "and more"},
    ]
    request = responses_api.Respond(
        tools=[{"type": "function", "name": "f", "parameters": {}, "strict": True}],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": True}},
    )
    chat = responses_api.asked_tools(request)
    assert chat["tools"] == [
        {"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}
    ]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    form = responses_api.asked_format(request)["response_format"]
    assert form == {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {}, "strict": True},
    }


WRONG_INPUT = [
    (None, "expected a text, or a list of items"),
    ([], "expected a text, or a list of items"),
    ([5], "input[0]: expected an object"),
    ([{"role": "tool", "content": "a"}], "input[0]: role 'tool': expected system"),
    ([{"role": "user", "content": 5}], "input[0]: expected a text, or a list of parts"),
    ([{"role": "user", "content": [{"type": "input_image"}]}], "type 'input_image' is not"),
    ([{"role": "user", "content": [{"type": "input_text", "text": 1}]}], "input[0]: text = 1"),
    ([{"role": "user", "content": "a", "name": "b"}], "input[0]: 'name' is not supported"),
    ([{"type": "item_reference", "id": "a"}], "input[0]: type 'item_reference'"),
    ([{"type": ["a"], "id": "a"}], "input[0]: type list"),
    ([{"role": "user", "content": "a", "id": [1]}], "input[0]: id = list: expected a string"),
    ([{"type": "reasoning", "summary": "a"}], "input[0]: summary = 'a': expected a list"),
]


@pytest.mark.parametrize(("value", "why"), WRONG_INPUT, ids=[why for _, why in WRONG_INPUT])
def test_wrong_input_is_refused_by_its_place(value, why):
    with pytest.raises(api.ApiError) as error:
        responses_api.read_input(value)
    assert why in error.value.message and error.value.param == "input"


def test_openais_client_gets_responses(site):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
    asked = dict(model="tiny", input="hi", temperature=0)
    asked |= dict(extra_body={"stop": ["\n"]})
    whole = client.responses.create(**asked, max_output_tokens=9)
    assert whole.output_text == whole.output[0].content[0].text
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = [*client.responses.create(**asked, max_output_tokens=9, stream=True)]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    with client.responses.stream(**asked | {"extra_body": {"stop": [" ", "e"]}}) as stream:
        said = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(said) == stream.get_final_response().output_text
    with pytest.raises(openai.BadRequestError, match="this server keeps no answers"):
        client.responses.create(model="tiny", input="a", previous_response_id=whole.id)
    with pytest.raises(openai.BadRequestError, match="do not fit the 64 tokens"):
        client.responses.create(model="tiny", input="a", max_output_tokens=64)


WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_response_calls_a_tool_and_goes_on_from_what_it_gave(wide):
    pytest.importorskip("llguidance")
    site = wide
    body = {"input": "hi", "tools": [WEATHER], "tool_choice": "required", "seed": 1}
    body |= {"parallel_tool_calls": False}
    whole = site.post(RESPOND, body).json()
    assert whole.get("output"), whole
    calls = [item for item in whole["output"] if item["type"] == "function_call"]
    assert calls and whole["status"] == "completed"
    for call in calls:
        assert call["name"] == "weather" and json.loads(call["arguments"])["city"]
    events = events_of(site, body)
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == [item["type"] for item in whole["output"]]
    pieces = [e["delta"] for e in events if e["type"].endswith("call_arguments.delta")]
    assert "".join(pieces) == "".join(item.get("arguments", "") for item in done)
    given = [{"type": "function_call_output", "call_id": calls[0]["call_id"], "output": "sun"}]
    after = {"input": [{"role": "user", "content": "hi"}, calls[0], *given], "max_output_tokens": 2}
    assert site.post(RESPOND, after | {"tools": [WEATHER]}).status_code == 200


# Of what a client may send: (field, values that are accepted, values that are refused by name).
# test_serve.py has those of completions and chats that stood there first.
BOTH = [
    ("allowed_token_ids", [], [[1]]),
    ("cache_salt", [], ["a"]),
    ("ec_transfer_params", [], [{}]),
    ("include_stop_str_in_output", [True, False], [1]),
    ("kv_transfer_params", [], [{}]),
    ("media_io_kwargs", [], [{}]),
    ("logprob_token_ids", [], [[1]]),
    ("moderation", [], [{"model": "a"}]),
    ("n_cache_reuse", [0], [256]),
    ("n_cmpl", [1], [2]),
    ("prediction", [{"type": "content", "content": "a"}], ["a"]),
    ("priority", [0], [1, -1]),
    ("prompt_cache_options", [{}], ["a"]),
    ("prompt_cache_retention", ["24h"], [24]),
    ("prompt_logprobs", [], [0, 1]),
    ("repetition_detection", [], [{"max_pattern_size": 2}]),
    ("request_id", [], ["a"]),
    ("return_prompt_text", [False], [True]),
    ("return_token_ids", [True, False], [1]),
    ("return_tokens_as_token_ids", [True, False], ["yes"]),
    ("return_token_offsets", [False], [True]),
    ("routed_experts_prompt_start", [0], [1]),
    ("safety_identifier", ["a"], [1]),
    ("samplers", [], [["top_k"]]),
    ("session_id", ["a"], [1]),
    ("spaces_between_special_tokens", [True, False], [1]),
    ("sse_ping_interval", [-1], [5]),
    ("stream_interval", [1], [8]),
    ("t_max_predict_ms", [0], [50]),
    ("thinking_token_budget", [-1], [100]),
    ("truncation_side", ["left", "right"], ["middle", 1]),
    ("watermarking", [False], [True]),
    ("web_search_options", [], [{}]),
]
TEXT, TALK = {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}
FIELDS = [(COMPLETE, TEXT, *row) for row in BOTH] + [(CHAT, TALK, *row) for row in BOTH]
FIELDS += [
    (COMPLETE, TEXT, "best_of", [2, 1], [0]),
    (COMPLETE, TEXT, "prompt_embeds", [], ["a"]),
    (CHAT, TALK, "audio", [], [{"voice": "a", "format": "wav"}]),
    (CHAT, TALK, "best_of", [], [2]),
    (CHAT, TALK, "echo", [False], [True]),
    (CHAT, TALK, "mm_processor_kwargs", [{}], [{"a": 1}]),
    (CHAT, TALK, "modalities", [["text"]], [["audio"]]),
    (CHAT, TALK, "suffix", [""], ["a"]),
    (EMBED, {"input": "a"}, "add_special_tokens", [True, False], [1]),
    (EMBED, {"input": "a"}, "dimensions", [1, 64], [0, 65, 2.0]),
    (EMBED, {"input": "a"}, "embed_dtype", ["float32"], ["float16"]),
    (EMBED, {"input": "a"}, "encoding_format", ["float", "base64"], ["int8", 1]),
    (EMBED, {"input": "a"}, "endianness", ["little"], ["big"]),
    (EMBED, {"input": "a"}, "normalize", [True], [False]),
    (EMBED, {"input": "a"}, "pooling", ["first", "last", "mean"], ["max", 1]),
    (EMBED, {"input": "a"}, "priority", [0], [1]),
    (EMBED, {"input": "a"}, "truncate_prompt_tokens", [1, -1], [0, -2]),
    (EMBED, {"input": "a"}, "truncation_side", ["left", "right"], ["middle"]),
    (EMBED, {"input": "a"}, "user", ["me"], [1]),
]
ASK = {"input": "a", "max_output_tokens": 1}
FIELDS += [
    (RESPOND, ASK, "background", [False], [True]),
    (RESPOND, ASK, "context_management", [[]], [[{"type": "compaction"}]]),
    (RESPOND, ASK, "conversation", [], ["conv_1", {"id": "conv_1"}]),
    (RESPOND, ASK, "include", [[], ["message.output_text.logprobs"]], [["a"], [1], "a"]),
    (RESPOND, ASK, "instructions", ["be brief", ""], [1]),
    (RESPOND, ASK, "max_output_tokens", [2], [0, 1.0]),
    (RESPOND, ASK, "max_tool_calls", [], [1]),
    (RESPOND, ASK, "max_tokens", [], [1]),
    (RESPOND, ASK, "messages", [], [TALK["messages"]]),
    (RESPOND, ASK, "metadata", [{"a": "b"}], ["a"]),
    (RESPOND, ASK, "moderation", [], [{}]),
    (RESPOND, ASK, "n", [], [1]),
    (RESPOND, ASK, "parallel_tool_calls", [True, False], [1]),
    (RESPOND, ASK, "previous_response_id", [], ["resp_1"]),
    (RESPOND, ASK, "prompt", [], [{"id": "a"}]),
    (RESPOND, ASK, "prompt_cache_key", ["a"], [1]),
    (RESPOND, ASK, "prompt_cache_options", [{}], ["a"]),
    (RESPOND, ASK, "prompt_cache_retention", ["24h"], [24]),
    (RESPOND, ASK, "reasoning", [{}, {"effort": None}], [{"summary": "auto"}, {"a": 1}, "a"]),
    (RESPOND, ASK, "safety_identifier", ["a"], [1]),
    (RESPOND, ASK, "service_tier", ["auto"], ["flex"]),
    (RESPOND, ASK, "store", [False], [True]),
    (RESPOND, ASK, "stream_options", [{}, {"include_obfuscation": False}], [{"a": 1}]),
    (RESPOND, ASK, "temperature", [0, 2], [-1, "a"]),
    (RESPOND, ASK, "text", [{}, {"format": {"type": "text"}}], [{"a": 1}, {"format": 1}, "a"]),
    (RESPOND, ASK, "text", [{"verbosity": "medium"}], [{"verbosity": "low"}]),
    (RESPOND, ASK, "tool_choice", ["auto", "none"], ["a", 1]),
    (RESPOND, ASK, "tools", [[]], [[{"type": "web_search"}], [1], {}]),
    (RESPOND, ASK, "top_logprobs", [0], [1, 21]),
    (RESPOND, ASK, "top_p", [0.5], [2]),
    (RESPOND, ASK, "truncation", ["disabled"], ["auto"]),
    (RESPOND, ASK, "user", ["me"], [1]),
]


def test_each_parameter_is_done_or_harmless_or_refused_by_name(site):
    session = requests.Session()
    for path, body, name, accepted, refused in FIELDS:
        short = {"max_tokens": 1} if path in (COMPLETE, CHAT) else {}
        for value in [None, *accepted]:
            answer = session.post(site.url + path, json=body | short | {name: value})
            assert answer.status_code == 200, (path, name, value, answer.text)
        for value in refused:
            answer = session.post(site.url + path, json=body | short | {name: value})
            assert answer.status_code == 400, (path, name, value, answer.text)
            param = answer.json()["error"]["param"]
            inner = value if isinstance(value, dict) else {}
            assert param in (name, *inner), (path, name, value, answer.text)


def test_no_parameter_of_openais_client_is_forgotten():
    openai = pytest.importorskip("openai")
    from test_serve import OWN

    client = openai.OpenAI(api_key="none")
    of_client = {"extra_headers", "extra_query", "extra_body", "timeout"}
    for path, create, request_type in (
        (COMPLETE, client.completions.create, api.Completion),
        (CHAT, client.chat.completions.create, api.Chat),
        (EMBED, client.embeddings.create, vector_api.Embeddings),
        (RESPOND, client.responses.create, responses_api.Respond),
    ):
        names = set(inspect.signature(create).parameters) - of_client
        tested = {row[2] for row in FIELDS + OWN if row[0] == path}
        own = {f.name for f in dataclasses.fields(request_type)}
        assert names <= tested | own, (path, names - tested - own)


# What vLLM's requests for text have beside OpenAI's, and llama.cpp's server beside both, in
# November 2026.
VLLM = """add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt
chat_template
chat_template_kwargs continue_final_message documents echo ec_transfer_params ignore_eos
include_reasoning include_stop_str_in_output kv_transfer_params length_penalty logprob_token_ids
media_io_kwargs min_p min_tokens mm_processor_kwargs priority prompt_logprobs repetition_detection
repetition_penalty request_id return_mm_kwargs return_prompt_text return_token_ids
return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start session_id
skip_special_tokens spaces_between_special_tokens stop_token_ids stream_interval structured_outputs
thinking_token_budget top_k truncate_prompt_tokens truncation_side use_beam_search vllm_xargs
watermarking"""
LLAMA_CPP = """cache_prompt dry_allowed_length dry_base dry_multiplier dry_penalty_last_n
dry_sequence_breakers dynatemp_exponent dynatemp_range grammar id_slot json_schema lora min_keep
mirostat mirostat_eta mirostat_tau n_cache_reuse n_cmpl n_discard n_indent n_keep n_predict n_probs
parse_tool_calls post_sampling_probs reasoning_format repeat_last_n repeat_penalty response_fields
return_progress return_tokens samplers sse_ping_interval t_max_predict_ms thinking_forced_open
timings_per_token typical_p xtc_probability xtc_threshold"""


@pytest.mark.parametrize("request_type", [api.Chat, api.Completion])
def test_no_parameter_of_vllms_or_llama_cpps_is_forgotten(request_type):
    from test_serve import OWN

    names = {*VLLM.split(), *LLAMA_CPP.split()}
    own = {f.name for f in dataclasses.fields(request_type)}
    tested = {row[2] for row in FIELDS + OWN}
    assert names <= own | {*api.NEUTRAL} | {*api.IGNORED} | tested
