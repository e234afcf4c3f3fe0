"""sample.py as a user runs it."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, join, run, start_forked
from test_model import naive_beam_search

import model
import sample
from barelm.checkpoint import load
from barelm.run import UserError


def test_prints_the_prompt_and_what_generate_continues(tiny):
    options = ["--model=out/tiny", "--max_new_tokens=20", "--top_k=0"]
    net, tok = load(tiny / "out" / "tiny")
    how = dict(max_new_tokens=20, temperature=0.8, seed=5)
    [g] = model.generate(net, tok, ["def f(x"], **how)
    said = run(tiny, "sample.py", *options, "--prompt=def f(x", "--seed=5").stdout
    assert said == "def f(x" + g.text + "\n"
    again = run(tiny, "sample.py", *options, "--prompt=-", "--seed=5", stdin="def f(x\n").stdout
    assert again == said
    (tiny / "prompt.txt").write_text("def f(x")
    assert run(tiny, "sample.py", *options, "--prompt_file=prompt.txt", "--seed=5").stdout == said


def test_several_prompts_and_samples_at_once(tiny):
    rows = ["import os\n", "class A:\n    x"]
    (tiny / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in rows))
    options = ["--model=out/tiny", "--max_new_tokens=8", "--temperature=0", "--num_samples=2"]
    said = run(tiny, "sample.py", *options, "--prompt_file=p.jsonl").stdout
    parts = said.split("--- ")[1:]
    assert [p.split(" ")[0] for p in parts] == ["1", "2", "3", "4"]
    bodies = [p.partition("\n")[2] for p in parts]
    assert bodies[0] == bodies[1] and bodies[0].startswith(rows[0])
    assert bodies[2] == bodies[3] and bodies[2].startswith(rows[1])


def test_num_beams_is_a_beam_search(tiny):
    net, tok = load(tiny / "out" / "tiny")
    [beam] = model.generate(net, tok, ["import "], max_new_tokens=10, num_beams=4)
    assert beam.ids == naive_beam_search(net, tok.prompt("import "), tok.eos_ids, 10, 4)
    options = ["--model=out/tiny", "--max_new_tokens=10", "--num_beams=4", "--prompt=import "]
    assert run(tiny, "sample.py", *options).stdout == "import " + beam.text + "\n"


def test_chat_uses_the_template_and_keeps_within_the_context(tiny):
    options = ["--model=out/tiny", "--chat", "--max_new_tokens=6", "--temperature=0"]
    said = run(tiny, "sample.py", *options, stdin="hi\nand\nso\non\nx\n").stdout
    assert said.count("model> ") == 5  # 64 tokens of context: the oldest turns were dropped
    net, tok = load(tiny / "out" / "tiny")
    ids, _ = tok.chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    tok.eos_ids.append(tok.special["<|im_end|>"])
    [g] = model.generate(net, tok, [ids], max_new_tokens=6, temperature=0)
    assert said.startswith("model> " + g.text)
    long = run(tiny, "sample.py", *options, stdin="word " * 80 + "\n", check=False)
    assert long.returncode == 1 and "fit before an answer" in long.stderr


def test_streams_to_a_terminal(tiny):
    parent, child = pty.openpty()
    terminal = lambda: [os.dup2(child, number) for number in range(3)]
    options = ["--model=out/tiny", "--max_new_tokens=5"]
    [process], _, _ = start_forked(tiny, "sample.py", options, before=terminal)
    os.close(child)
    said = b""
    with contextlib.suppress(OSError):  # when nobody writes to it any more
        while True:
            said += os.read(parent, 1000)
    join(process)
    assert process.exitcode == 0 and said.startswith(b"import os\r\n")


REFUSALS = {
    "no such folder": ["--model=out/nothing"],
    "expected 1 to 63, the context": ["--prompt=" + "a b " * 200],
    "nothing.txt: cannot be read": ["--prompt_file=nothing.txt"],
    "top_p": ["--top_p=2"],
    "temperature": ["--temperature=-1"],
    "expected auto, float32": ["--dtype=int3"],
    "GPU 7": ["--device=cuda:7"],
}


def test_quantized_weights_continue_a_prompt(tiny):
    how = ["--model=out/tiny", "--prompt=def ", "--temperature=0", "--max_new_tokens=8"]
    out = run(tiny, "sample.py", *how, "--quantize=int8").stdout
    assert out.startswith("def ") and len(out) > 6
    failed = run(tiny, "sample.py", *how, "--quantize=int9", check=False)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "int9" in failed.stderr


def test_fast_and_plain_mathematics_say_the_same(tiny):
    options = ["--model=out/tiny", "--prompt=def f(", "--max_new_tokens=30", "--seed=3"]
    plain = run(tiny, "sample.py", *options, "--fast=false").stdout
    assert run(tiny, "sample.py", *options).stdout == plain


def test_refusals_are_one_line(tiny):
    commands = [["--model=out/tiny", *options] for options in REFUSALS.values()]
    for message, command in zip(REFUSALS, commands):
        said = run(tiny, "sample.py", *command, check=False)
        assert said.returncode == 1, message
        assert message in said.stderr and said.stderr.count("\n") == 1


def test_a_damaged_checkpoint_is_refused(tiny):
    shutil.copytree(tiny / "out" / "tiny", tiny / "out" / "damaged")
    os.truncate(tiny / "out" / "damaged" / "model.safetensors", 20_000)
    said = run(tiny, "sample.py", "--model=out/damaged", check=False)
    assert said.returncode == 1 and "malformed safetensors file" in said.stderr


def test_a_reader_that_leaves_is_no_error(tiny):
    command = [sys.executable, str(ROOT / "sample.py"), "--model=out/tiny"]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=tiny, **pipe) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_an_empty_prompt_starts_a_document(tiny):
    net, tok = load(tiny / "out" / "tiny")
    [g] = model.generate(net, tok, [""], max_new_tokens=5, temperature=0)
    with torch.no_grad():
        first = net(torch.tensor([[tok.bos_id]]))[0, -1, : tok.n_vocab].argmax().item()
    assert g.ids[0] == first


@pytest.mark.parametrize("name, value", [("chat", True), ("num_samples", 2), ("draft", "lookup")])
def test_what_would_be_passed_over_is_refused(name, value, monkeypatch):
    sample.check_unused("is an encoder")
    monkeypatch.setattr(sample, name, value)
    with pytest.raises(UserError, match=f"--{name}: out/python is an encoder"):
        sample.check_unused("is an encoder")


def test_a_file_of_prompts_by_its_name_in_any_case(tmp_path, monkeypatch):
    for name in ("a.JSONL", "b.ndjson"):
        (tmp_path / name).write_text('{"prompt": "é\\n"}\n{"prompt": "b"}\n', encoding="utf-8-sig")
        monkeypatch.setattr(sample, "prompt_file", str(tmp_path / name))
        assert sample.read_prompts() == ["é\n", "b"]
    (tmp_path / "c.txt").write_text("é", encoding="utf-16")
    monkeypatch.setattr(sample, "prompt_file", str(tmp_path / "c.txt"))
    assert sample.read_prompts() == ["é"]
