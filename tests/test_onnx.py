"""ONNX files: onnxruntime's numbers beside the network's own, with padding, with a cache and
without; the names that other programs' readers look for."""

import copy
import importlib.util
import json
import sys

import pytest
import torch
from conftest import run
from test_model import GPT2, QWEN3, make_net, random_ids

import export
from barelm.bpe import bpe_tokenizer
from barelm.checkpoint import save
from barelm.onnx_check import TOLERANCE, agreement, check_onnx
from barelm.run import UserError

HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx onnxscript onnxruntime")
WINDOW = QWEN3 | dict(window=8, layers="SL")  # two kinds of blocks


@pytest.fixture(scope="module")
def tok():
    return bpe_tokenizer([(b"a", b"b"), (b"ab", b"c"), (b" ", b"x")])


def net_for(tok, n_layer=3, **shape):
    return make_net(-(-tok.n_vocab // 64) * 64, n_layer=n_layer, **shape)


def feed_of(session, ids, mask, past=None):
    """What a session takes for ids (B, T), after past {name: keys or values}; with none, empty."""
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    for value in session.get_inputs():
        if value.name == "position_ids":
            feed[value.name] = positions.numpy()
        elif value.name.startswith("past") and past is not None:
            feed[value.name] = past[value.name]
        elif value.name.startswith("past"):
            _, heads, _, size = value.shape
            feed[value.name] = torch.zeros(len(ids), heads, 0, size).numpy()
    return feed


def test_an_export_is_what_other_readers_open(tok, tmp_path):
    net = net_for(tok, **WINDOW)
    save(tmp_path / "m", net, tok)
    alone = {"OMP_NUM_THREADS": "1"}  # a new process: onnxruntime's threads are lost in a fork
    done = run(tmp_path, "export.py", "--model=m", "--export=onnx", check=False, env=alone)
    if not HAS_ONNX:
        assert done.returncode == 1 and "pip install onnx onnxscript onnxruntime" in done.stderr
        assert not (tmp_path / "m-onnx").exists()
        return
    assert done.returncode == 0, done.stderr
    assert "the largest is another at 0 of" in done.stdout
    folder = tmp_path / "m-onnx"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx_data",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    genai = json.loads((folder / "genai_config.json").read_text())["model"]
    decoder = genai["decoder"]
    assert genai["eos_token_id"] == tok.eos_ids and genai["vocab_size"] == net.config.vocab_size
    names = list(decoder["inputs"].values()) + list(decoder["outputs"].values())
    names = {name % i for name in names if "%" in name for i in range(3)} | {
        name for name in names if "%" not in name
    }
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    values = [*session.get_inputs(), *session.get_outputs()]
    assert names == {value.name for value in values}
    compare_with_plain(net, session)


def compare_with_plain(net, session):
    """Three rows of other lengths, padded on both sides, then three tokens more by the cache."""
    rows = [random_ids(n)[:n] for n in (5, 17, 11)]
    more = random_ids(3, 3)
    ids = torch.zeros(3, 20, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        begin = (20 - len(row), 1, 4)[i]  # the first at the end, the others between
        ids[i, begin : begin + len(row)] = row
        mask[i, begin : begin + len(row)] = 1
    logits, *present = session.run(None, feed_of(session, ids, mask))
    names = [value.name for value in session.get_outputs()][1:]
    past = {n.replace("present", "past_key_values"): t for n, t in zip(names, present)}
    mask_of_all = torch.cat((mask, torch.ones_like(more)), 1)
    after = session.run(["logits"], feed_of(session, more, mask_of_all, past))[0]
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = net(torch.cat((row, more[i]))[None])[0]
        got = torch.from_numpy(logits[i])[mask[i].bool()]
        torch.testing.assert_close(got, expected[: len(row)], atol=1e-3, rtol=1e-4)
        got = torch.from_numpy(after[i])
        torch.testing.assert_close(got, expected[len(row) :], atol=1e-3, rtol=1e-4)


@needs_onnx
def test_a_network_that_is_a_little_different_is_not_the_files(tok, tmp_path):
    net = net_for(tok, n_layer=1, **GPT2)
    export.export_onnx(net, tok, tmp_path / "model.onnx")
    with torch.no_grad():
        net.model.layers[0].mlp.up_proj.weight[3] *= 1.1
    result = check_onnx(net, tok, tmp_path / "model.onnx")
    assert not result.good and result.difference > TOLERANCE
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="onnxruntime cannot run this network"):
        check_onnx(net, tok, tmp_path / "model.onnx")


@needs_onnx
def test_a_classifier_has_scores_and_no_cache(tok, tmp_path):
    import onnxruntime

    net = net_for(tok, n_layer=1, **QWEN3 | dict(causal=False, pos="learned"))
    net.set_score(["a", "b", "c"], "mean", pad_id=tok.pad_id)
    export.export_onnx(net, tok, tmp_path / "model.onnx")
    assert not (tmp_path / "genai_config.json").exists()
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    texts = [random_ids(n)[:n].tolist() for n in (9, 4)]
    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    ids[0] = torch.tensor(texts[0])
    ids[1, :4] = torch.tensor(texts[1])
    [scores] = session.run(None, feed_of(session, ids, mask))
    with torch.no_grad():
        expected = net.scores(texts)
    torch.testing.assert_close(torch.from_numpy(scores), expected, atol=1e-4, rtol=1e-4)


@needs_onnx
def test_a_tokenizer_without_an_end_and_a_model_of_vectors_are_told(tok, tmp_path, capsys):
    net = net_for(tok, n_layer=1, **QWEN3)
    net.task = "embed"
    endless = copy.copy(tok)
    endless.eos_ids = []
    export.export_onnx(net, endless, tmp_path / "model.onnx")
    assert not (tmp_path / "genai_config.json").exists()
    said = capsys.readouterr().out
    assert "names no end token" in said and "no vectors" in said


def test_agreement_is_by_the_largest_logit_and_the_mean_square():
    torch.manual_seed(0)
    ours = torch.randn(50, 30)
    near = ours + 1e-6 * torch.randn(50, 30)
    assert agreement(ours, near).good
    assert agreement(ours, near).difference == pytest.approx(1e-6, rel=0.1)
    assert not agreement(ours, ours + 1e-3 * torch.randn(50, 30)).good
    assert not agreement(ours, ours * torch.nan).good
    swapped = near.clone()
    first, second = ours[7].topk(2).indices
    swapped[7, [first, second]] = near[7, [second, first]]
    assert agreement(ours, swapped).n_other == 1


def test_onnx_says_what_to_install(tok, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export.export_onnx(net_for(tok, **QWEN3), tok, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
