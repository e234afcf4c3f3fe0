"""barelm/adapters.py: every kind of added weight against the plain one, and against PEFT."""

import pytest
import torch
import torch.nn.functional as F
from test_finetune import net_for

from barelm import adapters
from barelm.adapters import (
    NF4,
    AdaptConfig,
    LoRA,
    NF4Linear,
    add_lora,
    choose_weights,
    merge_adapters,
    save_adapter,
)
from barelm.checkpoint import load, save
from barelm.fitting import ask_all_blocks_alike
from barelm.tokenizer import Tokenizer
from model import call_block


@pytest.fixture
def tok(tiny):
    return Tokenizer.from_folder(tiny / "out/tiny")


def nearest_code(x):
    return NF4[(x[:, None] - NF4).abs().argmin(1)]


@pytest.mark.parametrize("shape", [(64, 64), (48, 33), (3, 7), (512, 256)])
def test_nf4_is_the_nearest_code_of_each_block(shape):
    torch.manual_seed(1)
    layer = torch.nn.Linear(shape[1], shape[0])
    packed = NF4Linear(layer)
    flat = layer.weight.detach().flatten()
    got, scales = packed.weight.flatten(), packed.scales()
    for i in range(0, len(flat), 64):
        block, top = flat[i : i + 64], flat[i : i + 64].abs().max()
        scale = scales[i // 64]
        assert abs(scale - top) <= packed.top.max() / 127  # the scale itself has 8 bits
        expected = nearest_code(block / scale) * scale
        error = (got[i : i + 64] - block).abs(), (expected - block).abs()
        torch.testing.assert_close(*error, rtol=1e-4, atol=1e-6)
    bits = 8 * sum(b.nbytes for n, b in packed.named_buffers() if n != "pairs") / len(flat)
    assert bits < 4.2 or len(flat) < 100_000
    x = torch.randn(5, shape[1], requires_grad=True)
    y = packed(x)
    torch.testing.assert_close(y, F.linear(x, packed.weight, layer.bias), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-5)


def test_nf4_unpacks_by_pieces_and_keeps_no_weight(monkeypatch):
    torch.manual_seed(1)
    packed = NF4Linear(torch.nn.Linear(96, 128))
    whole = packed.weight
    monkeypatch.setattr(adapters, "PIECE", 640)  # the last one is shorter
    assert torch.equal(packed.weight, whole)
    kept = []
    keep = lambda tensor: kept.append(tensor.nbytes) or tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed(torch.randn(5, 96, requires_grad=True))
    assert sum(kept) - packed.pairs.nbytes < 0.6 * whole.numel()  # bytes a weight; 4 for a float


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapted_blocks_are_one_graph_for_all_shapes(kind, tok):
    net = net_for(tok)
    choose_weights(net, AdaptConfig(kind))
    ask_all_blocks_alike(net)
    torch._dynamo.reset()
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    net.train_block = torch.compile(call_block, backend=count, fullgraph=True, dynamic=True)
    for shape in ((2, 64), (3, 48), (5, 60)):
        ids = torch.randint(0, 200, shape)
        loss, _ = net(ids, ids)
        loss.backward()
        net.train_block, block = call_block, net.train_block
        with torch.no_grad():
            torch.testing.assert_close(net(ids, ids)[0], loss, rtol=1e-4, atol=1e-4)
        net.train_block = block
    assert len(compiled) == 1


def test_compiled_blocks_keep_no_unpacked_weight(tok):
    net = net_for(tok).train()
    choose_weights(net, AdaptConfig("qlora"))
    ask_all_blocks_alike(net)
    ids = torch.randint(0, 200, (2, 24))
    shapes = {m.shape for m in net.modules() if isinstance(m, NF4Linear)}
    results = []
    for block in (call_block, torch.compile(call_block, backend="aot_eager_decomp_partition")):
        torch._dynamo.reset()
        net.train_block = block
        net.zero_grad()
        kept = set()
        keep = lambda tensor: kept.add(tensor.shape) or tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = net(ids, ids)
        loss.backward()
        assert not kept & (shapes | {shape[::-1] for shape in shapes})
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        results.append([loss, *gradients])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "o_proj,gate_proj,up_proj,down_proj"])
def test_an_adapter_starts_as_nothing_and_merges_as_it_is(tok, targets):
    net, ids = net_for(tok).eval(), torch.randint(0, 200, (2, 9))
    with torch.no_grad():
        before = net(ids)
        add_lora(net, AdaptConfig("lora", lora_targets=targets))
        assert torch.equal(net(ids), before)
        layers = [m for m in net.modules() if isinstance(m, LoRA)]
        for layer in layers:
            layer.lora_B.weight.normal_(std=0.1)
        adapted = net(ids)
        assert (adapted - before).abs().max() > 1e-3
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        assert names and all("lora_" in name for name in names)
        merged = merge_adapters(net)
        torch.testing.assert_close(merged(ids), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_peft_reads_our_adapters_and_we_read_peft(kind, tok, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    shape = dict(norm="layer", pos="learned", mlp="gelu", bias=True, qk_norm=False, n_kv_head=0)
    shape |= dict(head_dim=0, n_embd=32, n_head=4)
    net = net_for(tok, **(shape if kind == "gpt2" else {})).eval()
    base = tmp_path / "base"
    save(base, net, tok)
    config = AdaptConfig("lora", lora_rank=4)
    add_lora(net, config)
    for layer in net.modules():
        if isinstance(layer, LoRA):
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    save_adapter(tmp_path / "ours", net, tok, str(base), config)
    ids = torch.randint(0, 200, (2, 9))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    reopened, _ = load(tmp_path / "ours")
    with torch.no_grad():
        expected = net(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(reopened(ids), expected, rtol=1e-3, atol=1e-3)
    # and one that PEFT made
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    other = transformers.AutoModelForCausalLM.from_pretrained(base)
    other = peft.get_peft_model(other, config).eval()
    for name, p in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    other.save_pretrained(tmp_path / "theirs")
    reopened, _ = load(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(reopened(ids), other(ids).logits, rtol=1e-3, atol=1e-3)


def test_an_adapter_keeps_the_tokens_that_end_a_text(tok, tmp_path):
    net, ends = net_for(tok), [*tok.eos_ids, 5]
    tok = Tokenizer(tok.spec, tok.config)
    tok.eos_ids = ends  # the tokenizer's own, and the end of a turn
    save(tmp_path / "base", net, tok)
    config = AdaptConfig("lora")
    add_lora(net, config)
    tok.eos_ids = [*ends, 7]  # one that this training adds
    save_adapter(tmp_path / "a", net, tok, str(tmp_path / "base"), config)
    assert load(tmp_path / "a")[1].eos_ids == [*ends, 7]
    (tmp_path / "a/generation_config.json").unlink()  # a folder of PEFT's has none
    assert load(tmp_path / "a")[1].eos_ids == ends
