"""Thumbs up and down: from the server into a file, from there into pairs, from pairs into dpo."""

import json
import multiprocessing
import os
import signal

import pytest
from conftest import run

pytest.importorskip("fastapi")
from test_serve import served

from barelm import feedback
from barelm.api import ApiError
from barelm.feedback import FeedbackFile
from barelm.ratings import PAIRS_OF_PROMPT, demonstrations_of, pairs_of
from barelm.run import UserError


def rating(response, thumb, question="Hi"):
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "response": response, "rating": thumb}


def test_pairs_are_liked_and_disliked_answers_to_the_same_messages():
    ratings = [
        rating("good", 1), rating("lone", 1, "What?"), rating("bad", -1), rating("worse", -1),
        rating("withdrawn", -1), rating("withdrawn", 0), rating("turned", -1), rating("turned", 1),
        rating("bad", -1, "Who?"),
    ]  # fmt: skip
    told = {(row["chosen"], row["rejected"]) for row in pairs_of(ratings)}
    naive = set()
    for good in ("good", "turned"):
        naive |= {(good, "bad"), (good, "worse")}
    assert told == naive
    assert all(row["prompt"] == rating("", 1)["prompt"] for row in pairs_of(ratings))
    liked = [row["messages"][-1]["content"] for row in demonstrations_of(ratings)]
    assert liked == ["good", "turned", "lone"]
    many = [rating(f"{i}", 1 if i % 2 else -1) for i in range(40)]
    rows = pairs_of(many)
    assert len(rows) == PAIRS_OF_PROMPT and rows[0]["chosen"] == "39"


def test_what_a_killed_server_left_harms_no_line(tmp_path, monkeypatch):
    path = tmp_path / "feedback.jsonl"
    file = FeedbackFile(path)
    file.append({"n": 1})
    with path.open("a") as torn:
        torn.write('{"n": 2, "resp')
    FeedbackFile(path).append({"n": "\ud800é"})  # half a surrogate pair, as a browser may send
    one, torn, three = path.read_text().splitlines()
    assert json.loads(one) == {"n": 1} and torn == '{"n": 2, "resp'
    assert json.loads(three) == {"n": "\ud800é"}
    path.rename(tmp_path / "old")  # as log rotation does
    file.append({"n": 4})
    assert path.read_text() == '{"n": 4}\n'
    monkeypatch.setattr(feedback, "FEEDBACK_BYTES", 20)
    file.append({"n": 5})
    with pytest.raises(ApiError, match="full"):
        file.append({"n": 6})
    assert path.read_text() == '{"n": 4}\n{"n": 5}\n'
    with pytest.raises(UserError, match="--feedback=.*: Is a directory"):
        FeedbackFile(tmp_path)


def write_many(path, name):
    file = FeedbackFile(path)
    for i in range(50):
        file.append({"name": name, "i": i, "text": "x" * 5000})


def test_several_servers_write_one_file(tmp_path):
    path = tmp_path / "feedback.jsonl"
    fork = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    writers = [fork.Process(target=write_many, args=(path, name)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((row["name"], row["i"]) for row in rows) == [
        (name, i) for name in "abcd" for i in range(50)
    ]


QUICK = "--device=cpu --max_steps=2 --batch_size=1 --eval_every=2 --out_dir=out/rated --overwrite"


def test_thumbs_become_pairs_that_dpo_learns(tiny):
    """The loop: asked, answered, rated, prepared, tuned."""
    ask = [{"role": "user", "content": "import?"}]
    key = {"Authorization": "Bearer secret"}
    with served(tiny, "--feedback=thumbs.jsonl", "--api_key=secret") as site:
        rate = lambda **body: site.post("/feedback", body, headers=key)
        assert site.post("/feedback", {}).status_code == 401
        assert site.get("/inspect/model", headers=key).json()["feedback"] is True
        answers = []
        for seed in (1, 2, 3):
            body = {"messages": ask, "max_tokens": 8, "seed": seed}
            told = site.post("/v1/chat/completions", body, headers=key).json()
            answers.append(told["choices"][0]["message"]["content"])
        assert len({*answers}) == 3
        for answer, thumb in zip(answers, (1, -1, 1)):
            assert rate(messages=ask, response=answer, rating=thumb).json() == {"rating": thumb}
        other = [{"role": "user", "content": "def?"}]  # a lone thumb
        assert rate(messages=other, response="pass", rating=1).status_code == 200
        for body, why in [
            ({"messages": ask, "response": "a"}, "rating: expected"),
            ({"messages": ask, "response": "a", "rating": 2}, "from -1 to 1"),
            ({"messages": ask, "response": "a", "rating": True}, "rating = True"),
            ({"messages": ask, "response": " ", "rating": 1}, "response: expected"),
            ({"messages": [], "response": "a", "rating": 1}, "messages: expected"),
            ({"messages": [{"role": "x"}], "response": "a", "rating": 1}, "messages[0]: expected"),
            ({"messages": ask, "response": "a" * 100_000, "rating": 1}, "do not fit"),
            ({"messages": ask, "response": "a", "rating": 1, "model": "b"}, "no model 'b'"),
        ]:
            answer = rate(**body)
            assert answer.status_code in (400, 404) and why in answer.json()["error"]["message"]
        site.process.send_signal(signal.SIGKILL)
        site.process.wait()
    rows = [json.loads(line) for line in (tiny / "thumbs.jsonl").read_text().splitlines()]
    assert [row["rating"] for row in rows] == [1, -1, 1, 1]
    assert all(row["model"] == "tiny" and row["time"] > 0 for row in rows)
    with (tiny / "thumbs.jsonl").open("a") as torn:
        torn.write('{"time": 1')
    prepared = ["--source=thumbs.jsonl", "--dataset=thumbs", "--val_fraction=0"]
    done = run(tiny, "prepare.py", "--task=preference", *prepared)
    assert "4 ratings of answers: 2 rows; 1 rated alone" in done.stdout
    assert "no JSON object" in done.stdout
    pairs = (tiny / "data/thumbs/preference_train.jsonl").read_text().splitlines()
    assert [json.loads(pair) for pair in pairs] == [
        {"prompt": ask, "chosen": answers[i], "rejected": answers[1]} for i in (2, 0)
    ]
    run(tiny, "prepare.py", "--task=sft", *prepared)
    liked = (tiny / "data/thumbs/sft_train.jsonl").read_text().splitlines()
    assert {json.loads(row)["messages"][-1]["content"] for row in liked} == {
        answers[0], answers[2], "pass"
    }  # fmt: skip
    done = run(
        tiny, "finetune.py", "--method=dpo", "--model=out/tiny", "--dataset=thumbs", *QUICK.split()
    )
    log = [json.loads(line) for line in (tiny / "out/rated/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2 and (tiny / "out/rated/model.safetensors").is_file()


def test_a_server_without_a_file_keeps_nothing(tiny):
    with served(tiny) as site:
        assert site.get("/inspect/model").json()["feedback"] is False
        body = {"messages": [{"role": "user", "content": "a"}], "response": "b", "rating": 1}
        answer = site.post("/feedback", body)
        assert answer.status_code == 404 and "--feedback=FILE" in answer.json()["error"]["message"]
