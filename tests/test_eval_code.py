"""eval.py on answers that are run or rated: code in its sandbox, instructions, a judge."""

import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import run as run_script

from barelm.benchmarks import humaneval_program
from barelm.ifeval import ifeval_verdicts
from barelm.judge import ask_judge
from barelm.run import UserError
from barelm.sandbox import run_program

# ------------------------------------------------------------------------------------------- judge


@pytest.fixture
def judge(monkeypatch):
    """A server that gives the replies (status, text) in turn, and keeps what it was asked."""
    replies, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            status, text = replies.pop(0)
            data = text if status != 200 else {"choices": [{"message": {"content": text}}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(data).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr("barelm.judge.JUDGE_WAIT", 0.01)
    monkeypatch.setitem(os.environ, "NO_PROXY", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", replies, asked
    server.shutdown()
    server.server_close()


def test_judge(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "k")
    url, replies, asked = judge
    replies += [(503, "busy"), (429, "wait"), (200, "I saw [[1]]. Rating: [[10]]")]
    assert ask_judge(url, "m", "why?", "because [[7]]", "Be strict.") == 10
    path, key, body = asked[-1]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer k", "m") and not replies
    said = body["messages"][0]["content"]
    assert all(text in said for text in ("why?", "because [[7]]", "Be strict."))


@pytest.mark.parametrize(
    "given, why",
    [
        ([(401, "no key")], "status 401"),
        ([(500, "x")] * 4, "four attempts .status 500"),
        ([(200, "Rating: [[11]]")], "without Rating"),
        ([(200, None)], "not a chat completion"),
    ],
)
def test_judge_fails_clearly(judge, given, why):
    url, replies, _ = judge
    replies += given
    with pytest.raises(UserError, match=why):
        ask_judge(url, "m", "q", "a", "r")
    assert not replies


def test_judge_is_away(judge):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="four attempts .ConnectionError"):
            ask_judge(url, "m", "q", "a", "r")


# ------------------------------------------------------------------------------------- The command


def test_code_instructions_and_ratings_by_the_command(tiny, tmp_path, judge, holes):
    url, replies, asked = judge
    replies += [(200, "Rating: [[3]]"), (200, "Rating: [[6]]")]
    rows = {
        "humaneval": [{"prompt": "x = 1\n", "canonical_solution": "", "entry_point": "abs"}
                      | {"test": f"def check(f):\n    assert f(-1) == {i}"} for i in (1, 2)],
        "ifeval": [{"prompt": "Write.", "instruction_id_list": ids, "kwargs": [{}] * len(ids)}
                   for ids in (["punctuation:no_comma"], ["startend:quotation"] * 2)],
        "mine": [{"kind": "generate", "rubric": "Be kind."}] + [{"question": q} for q in "ab"],
    }  # fmt: skip
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    mine = str(tmp_path / "mine.jsonl")
    flags = [
        "--model=out/tiny",
        f"--data={tmp_path}",
        f"--out_dir={tmp_path}",
        "--max_new_tokens=8",
    ]
    flags += [f"--tasks=humaneval,ifeval,{mine}", f"--judge_url={url}", "--judge_model=m"]
    refused = run_script(tiny, "eval.py", *flags, check=False)
    assert refused.returncode == 1 and "--allow_code_exec allows it" in refused.stderr
    weak = ["--allow_weak_sandbox"] if holes else []
    run_script(tiny, "eval.py", *flags, "--allow_code_exec", "--samples", *weak)
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    samples = lambda name: [json.loads(line) for line in open(tmp_path / f"samples_{name}.jsonl")]
    passed = [sample["verdicts"] == ["passed"] for sample in samples("humaneval")]
    for sample, row in zip(samples("humaneval"), rows["humaneval"]):
        program = humaneval_program(row, sample["answers"][0])
        assert [run_program(program, timeout=100, weak=True)] == sample["verdicts"]
    assert found["humaneval"]["pass@1"] == sum(passed) / 2
    strict = [ifeval_verdicts(row, sample["answers"][0])[0]
              for row, sample in zip(rows["ifeval"], samples("ifeval"))]  # fmt: skip
    assert found["ifeval"]["prompt_level_strict_acc"] == sum(map(all, strict)) / 2
    assert found["ifeval"]["inst_level_strict_acc"] == pytest.approx(sum(sum(strict, [])) / 3)
    assert found[mine]["rating"] == 4.5 and "Be kind." in asked[0][2]["messages"][0]["content"]


def test_ratings_that_were_given_are_not_asked_again(tiny, tmp_path, judge):
    url, replies, asked = judge
    mine = tmp_path / "mine.jsonl"
    header = {"kind": "generate", "rubric": "Be kind."}
    mine.write_text(
        "".join(json.dumps(r) + "\n" for r in [header, {"question": "a"}, {"question": "b"}])
    )
    flags = ["--model=out/tiny", f"--out_dir={tmp_path}", "--max_new_tokens=4", f"--tasks={mine}"]
    flags += [f"--judge_url={url}", "--judge_model=m"]
    replies += [(200, "Rating: [[3]]"), (400, "")]
    assert run_script(tiny, "eval.py", *flags, check=False).returncode == 1
    replies += [(200, "Rating: [[6]]")]
    run_script(tiny, "eval.py", *flags)
    assert len(asked) == 3 and asked[1] == asked[2] != asked[0] and not replies
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert found[str(mine)]["rating"] == 4.5
