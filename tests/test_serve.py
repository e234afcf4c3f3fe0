"""serve.py as its clients see it: the real server in a process of its own, on a free port."""

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

import pytest
import requests
import torch
from conftest import ROOT, run

import model

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
CODE = (ROOT / "sample.py").read_text(encoding="utf-8")


@contextlib.contextmanager
def served(folder, *args, env=None):
    """A server of folder/out/tiny: its address, and its process as `.process`."""
    command = [sys.executable, ROOT / "serve.py", "--model=out/tiny", "--port=0", *args]
    pipe = dict(stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}))
    with subprocess.Popen(command, cwd=folder, **pipe) as process:
        try:
            lines = iter(process.stdout.readline, "")
            url = next(m[1] for line in lines if (m := re.search(r"serving tiny at (\S+)", line)))
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
    return model.load(tiny / "out" / "tiny")


def test_many_at_once_get_what_generate_gives_each_alone(site, loaded):
    net, tok = loaded
    asked = []
    for i in range(24):
        begin = 0 if i % 4 == 0 else 37 * i  # some share their beginnings
        prompt = CODE[begin : begin + 20 + i]
        how = dict(temperature=0.9 * (i % 2), top_k=20 * (i % 3 == 0), top_p=1 - i % 5 / 10)
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


def test_rows_that_move_keep_what_they_hold(loaded):
    net, tok = loaded
    import serve

    engine, jobs = serve.Engine(net, tok, max_batch=9, max_len=64, chunk=9, max_queue=99), []
    options = dict(serve.read_options({}, serve.COMPLETION), temperature=0.0, seed=0)
    draw = random.Random(0)
    beginnings = [tok.encode(CODE[i : i + 70])[:30] for i in (0, 400, 800)]
    with torch.inference_mode():
        for _ in range(900):
            if len(jobs) < 60 and draw.random() < 0.15:
                ids = draw.choice(beginnings)[: draw.choice([0, 0, 5, 28, 30])]
                ids += draw.choices(range(500), k=draw.randrange(1, 4))
                jobs.append(serve.Job(tok, ids, draw.choice([1, 2, 25]), options))
                jobs[-1].notify = lambda *event: None
                engine.submit(jobs[-1:])
            if draw.random() < 0.01 and engine.jobs:
                engine.cancel([draw.choice(engine.jobs)])
            engine.step()
    done = [job for job in jobs if not job.gone]
    assert 40 < len(done) < len(jobs) == 60 and sum(job.reused for job in done) > 200
    for job in done:
        [g] = model.generate(net, tok, [job.ids], max_new_tokens=job.row.limit, temperature=0)
        assert job.row.done and job.row.out.ids[: len(g.ids)] == g.ids[: len(job.row.out.ids)]


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


def test_each_row_has_its_own_filters():
    torch.manual_seed(0)
    logits, uniform = 3 * torch.randn(8, 50), torch.rand(8)
    t, k = [0, 0.5, 1, 2] * 2, [0, 5, 0, 1, 7, 0, 60, 3]
    p, m = [1, 1, 0.5, 1, 0.9, 0.3, 1, 0.8], [0, 0.1, 0, 0, 0, 0, 0.2, 0.05]
    together = model.choose_tokens(logits, uniform, t, k, p, m)
    for i, how in enumerate(zip(t, k, p, m)):
        assert model.choose_tokens(logits[i : i + 1], uniform[i : i + 1], *how) == together[i]


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


def test_a_stream_says_what_the_whole_answer_says(site):
    body = dict(prompt=["def f(", "import"], max_tokens=20, n=2, seed=3, logprobs=2, echo=True)
    whole = site.complete(**body)
    chunks = site.stream("/v1/completions", **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 80
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks[:-1]]
        parts = [p for p in parts if p["index"] == choice["index"]]
        assert "".join(p["text"] for p in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            told = [x for p in parts if p["logprobs"] for x in p["logprobs"][name]]
            assert told[:9] == values[:9] and len(told) == len(values)
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
    whole = client.chat.completions.create(logprobs=True, top_logprobs=2, **how).choices[0]
    usage = {"include_usage": True}
    chunks = [*client.chat.completions.create(stream=True, stream_options=usage, **how)]
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.message.content and len(whole.logprobs.content) == 8
    assert chunks[-1].usage.completion_tokens == 8
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
    ('{"prompt": "a", "best_of": 3}', "best_of is not supported"),
    ('{"prompt": "a", "temprature": 1}', "did you mean 'temperature'?"),
    ('{"prompt": "a", "logit_bias": {"1": 5}}', "'logit_bias' is not supported"),
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


def test_fields_that_ask_for_nothing_are_passed_over(site):
    neutral = dict(response_format={"type": "text"}, suffix="", tools=[], logit_bias={}, user="me")
    assert site.complete(prompt="import", max_tokens=1, **neutral)["choices"]


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
    with served(tiny, "--max_batch=1", "--max_queue=40") as site:
        with site.post("/v1/completions", LONG, stream=True) as answer:
            lines = answer.iter_lines()  # which closes the connection when it is let go
            next(lines)
            refused = site.post("/v1/completions", LONG)
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert site.metric("batch_size") == 1 and site.metric("queue_length") > 0
        site.until("batch_size", 0)
        address = site.url.removeprefix("http://").split(":")
        with socket.create_connection(address) as wire:  # one that wants its answer whole
            body = json.dumps(LONG | {"stream": False})
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            wire.sendall(f"{head}\r\n\r\n{body}".encode())
            site.until("batch_size", 1)
        site.until("batch_size", 0)
        assert site.metric("queue_length") == 0
        assert site.metric("generated_tokens_total") < 2 * 40 * 60  # neither was finished
        assert site.complete(prompt="import", max_tokens=2)["choices"]
        made = site.metric("first_token_seconds_count")
        assert site.metric('first_token_seconds_bucket{le="+Inf"}') == made >= 3


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
    options = ["--cors=https://a.org", "--log=l.jsonl", "--log_prompts", "--client_timeout=0.5"]
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
    assert [r["prompts"] for r in rows if r["status"] == 200 and "prompts" in r] == [["import"]] * 2


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
    ask = lambda site, **headers: (
        site.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers).status_code
    )
    for name in (
        "localhost:80",
        "127.0.0.1",
        "[::1]:80",
        "10.0.0.7",
        "box",
        "host.docker.internal",
    ):
        assert ask(site, Host=name) == 200
    for name in ("evil.com", "EVIL.com.:8000"):  # whose DNS says 127.0.0.1
        assert ask(site, Host=name) == 403
        assert site.get("/inspect/log", headers={"Host": name}).status_code == 403
    cross = {"Sec-Fetch-Site": "cross-site", "Origin": "https://b.org"}
    assert ask(site, **cross) == 403 and ask(site, **cross | {"Sec-Fetch-Site": "same-site"}) == 200
    assert site.get("/", headers=cross).status_code == 200  # a link
    with served(tiny, "--cors=https://a.org, https://b.org") as site:
        assert ask(site, **cross) == 200 and ask(site, **cross | {"Origin": "https://c.org"}) == 403


def test_connections_that_end_in_the_middle_leave_nothing(tiny):
    import asyncio
    import gc

    import uvicorn

    import serve

    async def never(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def count():
        quiet = dict(log_level="critical", lifespan="off", port=0)
        server = uvicorn.Server(uvicorn.Config(never, http=serve.PatientProtocol, **quiet))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        for _ in range(5):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.read(12)
            writer.close()
        await asyncio.sleep(10 * serve.client_timeout)
        gc.collect()
        left = sum(type(o) is serve.PatientProtocol for o in gc.get_objects())
        server.should_exit = True
        await task
        return left

    before, serve.client_timeout = serve.client_timeout, 0.05
    try:
        assert asyncio.run(count()) == 0
    finally:
        serve.client_timeout = before


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="Linux tells of its sockets")
def test_a_client_that_reads_nothing_is_cut_off(tiny):
    with served(tiny, "--client_timeout=0.3", "--max_batch=32") as site, socket.socket() as wire:
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
    import serve

    monkeypatch.setattr(model, "TEMPLATE_SECONDS", 0.3)
    net, tok = loaded
    # An answer has another header than the prompt for one: where it begins cannot be told.
    other = """{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}
{% if add_generation_prompt %}<|im_start|>{% endif %}"""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    several = [{"name": "tools", "template": other}]
    for template in (other, "{% for m in %}", "{{ 'a' * 10**10 }}", endless, several):
        odd = model.Tokenizer(tok.spec, tok.config | {"chat_template": template})
        assert serve.Engine(net, odd, 1, 64, 9, 9).turn_ends == []
        assert "chat ends at the end token alone: " in capsys.readouterr().out
    assert len(serve.Engine(net, tok, 1, 64, 9, 9).turn_ends) == 1


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
    net, tok = model.load(tiny / "out" / "tiny")
    net.set_score(["a", "b"])
    model.save(tmp_path / "labels", net, tok)
    assert "is a classifier" in refusal(f"--model={tmp_path}/labels")
