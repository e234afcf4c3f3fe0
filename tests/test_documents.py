"""What stands around a document in token shards, and that a model of them learns to stop."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import model
from barelm.files import read_json, write_json
from barelm.run import UserError
from barelm.shards import document_layout, document_numbers, open_shard
from barelm.tokenizer import Tokenizer

FAMILIES = ["gpt2", "llama2", "llama3", "mistral", "qwen3", "smollm2", "tinyllama"]
# What a text begins with and ends with: the post-processor's words of each file, and its eos_token.
BEGIN = {"gpt2": "<|endoftext|>", "llama2": "<s>", "llama3": "<|begin_of_text|>", "mistral": "<s>"}
BEGIN |= {"tinyllama": "<s>"}
END = {"llama2": "</s>", "llama3": "<|eot_id|>", "mistral": "</s>", "qwen3": "<|im_end|>"}
END |= {"smollm2": "<|im_end|>", "tinyllama": "</s>"}
LINES = ["one cat", "two dogs.", "all the cows!", "no?"]


def fixture(name):
    return ROOT / "tests/fixtures/tokenizers" / name


def prepared(folder, name, lines=LINES, copies=100):
    """A dataset of one-line documents made by the real command: its folder."""
    rows = [json.dumps({"text": line}) + "\n" for line in lines * copies]
    (folder / "lines.jsonl").write_text("".join(rows))
    args = ["--source=lines.jsonl", "--steps=", "--threads=1", f"--dataset={name}"]
    run(folder, "prepare.py", *args, "--val_fraction=0", f"--tokenizer={fixture(name)}")
    return folder / "data" / name


def ids_of(data):
    return open_shard(data / "train_000000.bin").astype(np.int64)


def learn(ids, tok, steps=120):
    """A tiny network trained on random windows of a shard."""
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=32, n_ctx=64)
    net = model.GPT(model.GPTConfig(vocab_size=tok.n_vocab, **shape))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for step in range(steps):
        starts = torch.randint(len(ids) - 25, (8,)).tolist()
        rows = torch.from_numpy(np.stack([ids[i : i + 25] for i in starts]))
        loss, n = net(rows[:, :-1], rows[:, 1:].contiguous())
        (loss / n).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_learns_to_stop(name, tmp_path):
    data = prepared(tmp_path, name)
    tok = Tokenizer.from_folder(data)
    begin = [tok.special[BEGIN[name]]] if name in BEGIN else []
    end = [tok.special[END[name]]] if name in END else []
    meta = read_json(data / "meta.json")
    assert meta["document"] == {"begin": begin, "end": end}
    assert tok.prompt("") == [*end, *begin][-1:]  # what stands before a document's first token
    ids = ids_of(data).tolist()
    assert ids == [i for line in LINES * 100 for i in [*begin, *tok.encode(line), *end]]
    assert meta["train"]["tokens"] == len(ids)

    net = learn(np.array(ids), tok)
    answers = model.generate(net, tok, LINES, max_new_tokens=40, temperature=0)
    assert [(g.text, g.finish_reason) for g in answers] == [("", "stop")] * len(LINES)


def test_the_commands_learn_to_stop(tmp_path):
    prepared(tmp_path, "llama3")
    shape = (
        "--n_layer=1 --n_head=2 --n_kv_head=1 --n_embd=32 --seq_len=32 --device=cpu --dtype=float32"
    )
    args = [*shape.split(), "--batch_tokens=256", "--max_steps=80", "--sample_tokens=0"]
    args += ["--learning_rate=1e-2", "--document_mask", "--dataset=llama3", "--out_dir=out/a"]
    run(tmp_path, "train.py", *args)
    ask = ["--model=out/a", "--num_samples=2", "--temperature=0", "--device=cpu"]
    shown = run(tmp_path, "sample.py", *ask, "--prompt=all the cows!").stdout
    assert shown.count("stop)\nall the cows!\n") == 2


# Where a document ends, in shards of each kind


@pytest.mark.parametrize("begin, end", [([7], []), ([], [9]), ([7], [9]), ([7, 8], [9])])
def test_the_mask_parts_documents(begin, end):
    documents = [[1, 2, 3], [4], [5, 6, 1, 2]]
    ids = [[*begin, *document, *end] for document in documents]
    expected = [number for number, document in enumerate(ids) for _ in document]
    for first in range(6):  # a window may begin within a document
        row = torch.tensor([sum(ids, [])[first:]])
        numbers = document_numbers(row, begin, end)[0]
        wanted = torch.tensor(expected[first:])
        assert torch.equal(numbers - numbers[0], wanted - wanted[0])


def test_shards_of_an_earlier_version_keep_their_borders(tmp_path):
    data = prepared(tmp_path, "llama3", copies=30)
    tok = Tokenizer.from_folder(data)
    meta = read_json(data / "meta.json")
    old = np.array([i for line in LINES * 30 for i in [tok.bos_id, *tok.encode(line)]], "<u2")
    header = np.array([20240520, 1, len(old), *[0] * 253], "<i4")
    (data / "train_000000.bin").write_bytes(header.tobytes() + old.tobytes())
    del meta["document"]
    write_json(data / "meta.json", meta)
    assert document_layout(data, tok) == ([tok.bos_id], [])
    args = "--n_layer=1 --n_head=1 --n_kv_head=1 --n_embd=16 --seq_len=16 --batch_tokens=64"
    args += " --device=cpu --max_steps=2 --document_mask --dataset=llama3 --out_dir=out/a"
    told = run(tmp_path, "train.py", *args.split()).stdout
    assert "note: these shards hold no end token" in told


@pytest.mark.parametrize(
    "layout", [5, [], {}, {"begin": [1]}, {"begin": [], "end": []}, {"begin": [999], "end": []},
               {"begin": ["<s>"], "end": []}, {"begin": 1, "end": 2}, {"begin": [1.0], "end": []},
               {"begin": [], "end": [True]}]
)  # fmt: skip
def test_a_malformed_layout_is_one_line(layout, tmp_path):
    write_json(tmp_path / "meta.json", {"document": layout})
    tok = Tokenizer.from_folder(fixture("llama3"))
    with pytest.raises(UserError, match="meta.json: document: expected lists of ids"):
        document_layout(tmp_path, tok)


# Tokenizers of folders that name their end elsewhere, or have none


@pytest.mark.parametrize(
    "names, ids, expected",
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, {"eos_token_id": [0, 2]}, ([1], [2])),
        ({"bos_token": "<s>"}, {"eos_token_id": 2}, ([1], [2])),
        ({"bos_token": "<s>", "eos_token": "<unk>"}, {"eos_token_id": 2}, ([1], [2])),
        ({}, {"bos_token_id": 1, "eos_token_id": 2}, ([1], [2])),
        ({"bos_token": "<s>"}, {}, ([1], [])),
        ({"bos_token": "<s>", "eos_token": "<s>"}, {}, ([1], [])),
    ],
)
def test_a_folder_that_names_its_end_elsewhere(names, ids, expected, tmp_path):
    pytest.importorskip("tokenizers")  # which runs Llama 2's
    spec = read_json(fixture("llama2") / "tokenizer.json")
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_json(folder / "tokenizer.json", spec)
    write_json(folder / "tokenizer_config.json", names)
    write_json(folder / "config.json", ids)
    (tmp_path / "a.txt").write_text("one text\n" * 30)
    args = ["--source=a.txt", "--dataset=d", "--threads=1", f"--tokenizer={folder}"]
    run(tmp_path, "prepare.py", *args)
    begin, end = expected
    data = tmp_path / "data/d"
    shard, tok = ids_of(data).tolist(), Tokenizer.from_folder(data)
    assert document_layout(data, tok) == (begin, end)
    assert shard[: len(begin)] == begin and shard[len(shard) - len(end) :] == end
    assert tok.eos_ids == (end or begin)  # where generation stops
