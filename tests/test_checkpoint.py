"""The table of families: what an entry may say, and that a new one is one entry."""

import json
from dataclasses import fields, replace

import pytest
import torch

from barelm import families
from barelm.bpe import char_tokenizer
from barelm.checkpoint import load, save
from barelm.families import FAMILIES, Family, TensorNames, family, from_hf_config, misfits
from barelm.safetensors import entries_of
from model import GPT, GPTConfig

TOK = char_tokenizer("abcdefghijklmnopqrstuvwxyz \n")
IDS = torch.tensor([[1, 5, 3, 2, 7, 7, 2]])


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_entry_names_fields_of_the_config_and_no_others(kind):
    entry = FAMILIES[kind]
    names = {f.name for f in fields(GPTConfig)}
    of_parts = {name for part in entry.parts for name in part.fields}
    for part in (entry.keys, entry.fixed, entry.absent, entry.derived, entry.copies, of_parts):
        assert set(part) <= names
    assert not {*entry.keys, *of_parts} & set(entry.fixed)  # these differ


def test_a_new_family_is_one_entry(tmp_path, monkeypatch):
    """A family as published ones are: another MLP, keys of its own, q, k and v as one matrix (in,
    out), the same layers under other names, a prefix."""
    entry = Family(
        lm="OwlForCausalLM",
        heads={},
        keys={"vocab_size": "vocab", "n_ctx": "length", "n_layer": "depth", "n_embd": "width"}
        | {"n_head": "heads", "n_hidden": "inner", "norm_eps": "epsilon", "tie": "tied"},
        fixed=FAMILIES["llama"].fixed | {"mlp": "relu2", "bias": True},
        absent={"tie": False},
        derived=FAMILIES["gpt2"].derived,
        written={"rotates": True},
        tensors=TensorNames(
            renames=(("model.layers.", "owl.stack."), ("model.", "owl."))
            + tuple((f"self_attn.{x}_proj", "attention.qkv") for x in "qkv"),
            transposed=True,
            prefix="owl.",
        ),
    )
    config = GPTConfig(64, 32, 2, 4, 16, qk_norm=False, mlp="relu2", bias=True, tie=False)
    assert family(config) == "barelm"
    monkeypatch.setitem(FAMILIES, "owl", entry)
    assert family(config) == "owl"
    assert misfits(replace(config, norm_place="post"), "owl") == {"norm_place": "pre"}
    torch.manual_seed(0)
    net = GPT(config).eval()
    save(tmp_path, net, TOK)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "owl" and written["width"] == 16 and written["rotates"] is True
    entries = entries_of(tmp_path / "model.safetensors")
    assert entries["owl.stack.1.attention.qkv.weight"][1] == [16, 48]  # (in, out)
    back, _ = load(tmp_path)
    assert back.config == config
    with torch.no_grad():
        assert torch.equal(back(IDS), net(IDS))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_family_writes_it_reads(kind):
    fields_of_parts = {name for part in FAMILIES[kind].parts for name in part.fields}
    # In the families that have them:
    needed = {"position_offset": 2, "n_encoder_layer": 3, "n_experts": 4}
    held = {*FAMILIES[kind].keys, *fields_of_parts}
    needed = {name: value for name, value in needed.items() if name in held}
    config = GPTConfig(64, 32, 2, 4, 16, **FAMILIES[kind].fixed, **needed)
    assert not misfits(config, kind)
    written = {"model_type": kind} | families.family_keys(config, kind)
    assert from_hf_config(written) == config
