"""Mixture of experts: the ways to compute it against each other and against a naive loop, what
keeps the load even, training and its resume, and the families of transformers that have experts."""

import json
import math

import pytest
import test_model
import torch
from conftest import run
from test_model import FIXTURES, make_net, random_ids, tok  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from barelm import experts
from barelm.adapters import AdaptConfig, choose_weights
from barelm.checkpoint import load, save
from barelm.experts import Experts, expert_layers, update_bias
from barelm.families import family, from_hf_config
from barelm.invariant import be_deterministic
from barelm.muon import Muon
from barelm.operations import Operations
from barelm.optim import flops_per_token, make_optimizer, n_active, n_params
from barelm.quantized import quantize_weights
from barelm.run import UserError
from model import GPT, GPTConfig, KVCache

SMALL = dict(n_head=4, n_kv_head=2, n_embd=32, n_experts=5, expert_hidden=16)
KINDS = {
    "plain": SMALL,
    "shared-bias": SMALL | dict(n_shared_experts=2, balance="bias", norm_topk=False),
    "relu2": SMALL | dict(mlp="relu2", n_experts_per_token=3),
    "geglu": SMALL | dict(mlp="geglu", n_experts_per_token=1, expert_layers="DE"),
}
FOREIGN = {
    "mixtral": SMALL | dict(qk_norm=False, tie=False),
    "qwen3_moe": SMALL | dict(norm_topk=False, n_layer=4, expert_layers="DEE", n_hidden=40),
    "olmoe": SMALL | dict(qk_norm_all=True, norm_topk=False, n_experts_per_token=3),
}


def make_experts(**shape):
    """The Experts of a layer, with a bias that is not zero."""
    torch.manual_seed(0)
    c = GPTConfig(64, 32, 2, **SMALL | shape)
    layer = Experts(c, Operations(fast=True))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if c.balance == "bias":
        layer.expert_bias.copy_(torch.randn(c.n_experts))
    return layer


def naive(layer, x):
    """What one token x (C,) gets, expert by expert, as the papers write it."""
    c = layer.c
    probabilities = (layer.gate.weight @ x).softmax(0)
    order = probabilities + layer.expert_bias if c.balance == "bias" else probabilities
    chosen = sorted(range(c.n_experts), key=lambda e: -order[e])[: c.n_experts_per_token]
    total = sum(probabilities[e] for e in chosen) if c.norm_topk else 1
    y = torch.zeros_like(x)
    for e in chosen:
        up = layer.experts.up_proj[e] @ x
        h = up.relu() ** 2
        if c.mlp == "swiglu":
            gate = layer.experts.gate_proj[e] @ x
            h = gate * gate.sigmoid() * up
        y = y + probabilities[e] / total * (layer.experts.down_proj[e] @ h)
    return y if not c.n_shared_experts else y + layer.shared(x)


@pytest.mark.parametrize("kind", ["plain", "shared-bias", "relu2"])
def test_a_token_gets_the_weighted_sum_of_its_experts(kind):
    layer = make_experts(**KINDS[kind]).eval()
    x = torch.randn(2, 7, 32)
    for fast in (False, True):
        layer.ops.fast = fast
        y, _ = layer(x)
        for token, expected in zip(x.flatten(0, 1), y.flatten(0, 1)):
            torch.testing.assert_close(naive(layer, token), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 3, 64])
def test_all_ways_give_the_same_with_gradients(dtype, n_tokens, monkeypatch):
    layer = make_experts().train()
    results = {}
    names = ["formula", "loop"]
    if experts.try_grouped(torch.device("cpu"), dtype):  # a torch may be without it
        names.append("grouped")
    monkeypatch.setattr(experts, "pays_to_pick", lambda *_: False)
    for name in names:
        monkeypatch.setattr(experts, "can_group", lambda *_, name=name: name == "grouped")
        layer.ops.fast = name != "formula"
        x = torch.linspace(-1, 1, n_tokens * 32).view(1, n_tokens, 32).sin().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            y, routing = layer(x)
        (y.float().square().sum() + routing[5:7].sum()).backward()
        grads = [x.grad, *(p.grad for p in layer.parameters())]  # none is missing
        results[name] = [y.float(), routing, *grads]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in names[1:]:
        for ours, formula in zip(results[name], results["formula"]):
            error = (ours - formula).abs().max()
            assert error <= tolerance * formula.abs().max() + 1e-6, name


def test_experts_nobody_chose_get_gradients_of_zero():
    layer = make_experts().train()
    y, routing = layer(torch.ones(1, 4, 32))  # all choose the same
    y.sum().backward()
    assert routing[:5].tolist().count(0) == 3
    for e, count in enumerate(routing[:5].tolist()):
        assert (layer.experts.up_proj.grad[e].abs().max() > 0) == (count > 0)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no device to pretend")
def test_grouped_products_wait_for_no_device(monkeypatch):
    c = GPTConfig(64, 32, 2, **SMALL | dict(n_shared_experts=1, balance="bias"))
    with FakeTensorMode():
        with torch.device("cuda"):
            layer = Experts(c, Operations(fast=True))
        x = torch.empty(2, 8, 32, device="cuda", dtype=torch.bfloat16)
        monkeypatch.setitem(experts.GROUPED, (x.device, torch.bfloat16), True)
        with torch.no_grad():  # autograd would look for the device
            y, routing = layer(x)  # to read a number in it is an error
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        assert routing.shape == (8,) and routing.device == x.device


def test_a_deterministic_token_does_not_depend_on_the_others():
    net = make_net(**KINDS["shared-bias"])
    be_deterministic(net)
    ids = random_ids(4, 12)
    with torch.no_grad():
        together = net(ids)
        alone = torch.cat([net(row[None]) for row in ids])
    assert torch.equal(together, alone)


# --------------------------------------------------------------------------------------------------
# The load


def test_losses_are_those_of_the_papers_and_of_transformers():
    layer = make_experts(n_experts_per_token=2).train()
    x = torch.randn(1, 40, 32)
    _, routing = layer(x)
    scores = x[0] @ layer.gate.weight.T
    probabilities = scores.softmax(-1)
    chosen = probabilities.topk(2).indices
    f = torch.stack([(chosen == e).sum() / 40 for e in range(5)])
    torch.testing.assert_close(routing[:5], 40 * f)
    torch.testing.assert_close(routing[5], 5 * (f * probabilities.mean(0)).sum())
    torch.testing.assert_close(routing[6], scores.exp().sum(-1).log().square().mean())
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    torch.testing.assert_close(routing[7], entropy)
    transformers = pytest.importorskip("transformers")
    mixtral = transformers.models.mixtral.modeling_mixtral
    theirs = mixtral.load_balancing_loss_func((scores,), num_experts=5, top_k=2)
    torch.testing.assert_close(routing[5], theirs)


def test_the_loss_of_training_has_them_and_validation_has_not():
    net = make_net(**KINDS["geglu"], balance_weight=0.5, z_weight=0.25)
    ids = random_ids(2, 20)
    targets = ids.clone()
    targets[0, :5] = -100
    plain, n = net(ids, targets)
    net.train()
    loss, n = net(ids, targets)
    balance, z, _ = net.routing.mean(0)[-3:]
    assert len(net.routing) == 1  # of layers D and E
    torch.testing.assert_close(loss, plain + n * (0.5 * balance + 0.25 * z))
    net.config.balance = "none"
    torch.testing.assert_close(net(ids, targets)[0], plain + n * 0.25 * z)


def test_the_bias_evens_the_load_out():
    layer = make_experts(balance="bias", norm_topk=False).train()
    layer.expert_bias.zero_()
    with torch.no_grad():
        layer.gate.weight[0] += 0.1  # a favourite, for tokens of one sign
    x = torch.randn(1, 512, 32) + 0.6
    first = layer(x)[1][:5]
    for _ in range(400):
        counts = layer(x)[1][:5]
        update_bias(layer, counts[None], rate=2e-3)
    assert first.max() / first.mean() > 1.5
    assert counts.max() / counts.mean() < 1.1


# --------------------------------------------------------------------------------------------------
# The network: parameters, FLOPs, decoding, saving


@pytest.mark.parametrize("init", ["scaled", "xavier", "he"])
def test_every_tensor_is_drawn_and_learned(init):
    torch.manual_seed(0)
    shape = SMALL | dict(n_embd=64, n_shared_experts=1, expert_layers="DE", init=init)
    net = GPT(GPTConfig(64, 32, 2, **shape))
    stacks = {name: p for name, p in net.named_parameters() if p.ndim == 3}
    assert len(stacks) == 3
    for name, p in net.named_parameters():
        assert p.isfinite().all()
        assert p.ndim == 1 or p.std() > 1e-4, name
    for name, p in stacks.items():  # each expert as if it were the only one
        single = torch.empty(p.shape[1:])
        net.init_weight(f"{name}.weight", single)
        for matrix in p:
            assert 0.8 < matrix.std() / single.std() < 1.25
    for optimizer in ("muon", "adamw"):
        optimizers = make_optimizer(net, optimizer)
        groups = [group for o in optimizers for group in o.param_groups]
        learned = [p for group in groups for p in group["params"]]
        assert len(learned) == len(set(learned)) == len(list(net.parameters()))
    muon = [o for o in make_optimizer(net, "muon") if isinstance(o, Muon)]
    assert set(stacks.values()) <= set(muon[0].param_groups[0]["params"])


def test_flops_are_those_of_the_products(monkeypatch):  # which torch does not count of groups
    monkeypatch.setitem(experts.GROUPED, (torch.device("cpu"), torch.float32), False)
    for shape in KINDS.values():
        net = make_net(n_layer=2, **shape | dict(n_kv_head=4))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(random_ids(2, 32))
        counted = sum(n for op, n in counter.get_flop_counts()["Global"].items())
        attention = 64 * 2 * 2 * 32 * 32 * 2  # 2 layers: torch does not count the CPU's kernel
        assert counted + attention == 64 * flops_per_token(net.config, 32, backward=False)


def test_active_parameters_are_those_of_a_smaller_network():
    net = make_net(**SMALL, expert_layers="DE")
    fewer = make_net(**SMALL | dict(n_experts=2), expert_layers="DE")
    router = (5 - 2) * 32
    assert n_active(net) == n_params(fewer) + router


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_and_a_saved_folder_give_the_same(kind, tok, tmp_path):  # noqa: F811
    net = make_net(**KINDS[kind])
    for layer in expert_layers(net):
        if net.config.balance == "bias":
            layer.expert_bias.normal_(std=0.1)
    ids = random_ids(2, 12)
    with torch.no_grad():
        whole = net(ids)
        cache = KVCache(net.config, 2, 12, "cpu", torch.float32)
        parts = [net(ids[:, :4], cache=cache)]
        parts += [net(ids[:, i : i + 1], cache=cache) for i in range(4, 12)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
        save(tmp_path, net, tok)
        back, _ = load(tmp_path)
        assert back.config == net.config
        assert torch.equal(back(ids), whole)


@pytest.mark.parametrize("kind, allowed", [("int8", 0.01), ("int4", 0.15)])
def test_quantized_experts_compute_and_are_saved(kind, allowed, tok, tmp_path):  # noqa: F811
    net = quantize_weights(make_net(**KINDS["shared-bias"]), kind)
    before = make_net(**KINDS["shared-bias"])
    ids = random_ids(2, 12)
    with torch.no_grad():
        packed = net(ids)
        save(tmp_path, net, tok)
        assert torch.equal(load(tmp_path)[0](ids), packed)
        for layer, whole in zip(expert_layers(net), expert_layers(before)):
            for name, stack in list(layer.experts.named_children()):
                weights = stack(torch.float32)  # what the codes stand for
                error = weights - whole.experts.get_parameter(name)
                assert error.norm() < allowed * weights.norm()
                delattr(layer.experts, name)
                setattr(layer.experts, name, torch.nn.Parameter(weights))
        torch.testing.assert_close(net(ids), packed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adapt", ["lora", "qlora", "adapter"])
def test_adapters_learn_beside_experts(adapt):
    net = make_net(**KINDS["plain"])
    with pytest.raises(UserError, match="all experts"):
        choose_weights(net, AdaptConfig(adapt="lora", lora_targets="q_proj,up_proj"))
    choose_weights(net, AdaptConfig(adapt=adapt))
    ids = random_ids(2, 12)
    net.train()(ids, ids)[0].backward()
    learn = [name for name, p in net.named_parameters() if p.requires_grad]
    assert learn and all("self_attn" in name for name in learn)
    assert any(net.get_parameter(name).grad.abs().max() > 0 for name in learn)


def test_what_has_no_meaning_is_a_line():
    for shape in (dict(bias=True), dict(n_experts_per_token=6), dict(expert_layers="D")):
        with pytest.raises(UserError, match=next(iter(shape)).split("_")[0]):
            GPTConfig(64, 32, 2, **SMALL | shape)


# --------------------------------------------------------------------------------------------------
# transformers' families


@pytest.mark.parametrize("name", FOREIGN)
def test_fixture(name, tok, tmp_path):  # noqa: F811
    test_model.test_fixture_made_by_transformers(name, tok, tmp_path)


@pytest.mark.parametrize("name", FOREIGN)
def test_opens_in_transformers_and_back(name, tok, tmp_path):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    net = make_net(**dict(n_layer=2) | FOREIGN[name])
    assert family(net.config) == name
    ids = random_ids(2, 16)
    save(tmp_path / "ours", net, tok)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        torch.testing.assert_close(net(ids), expected, atol=2e-5, rtol=1e-4)
    greedy = theirs.generate(ids[:1, :4], max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert greedy.tolist() == [greedy_ids(net, ids[:1, :4], 12)]
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / file).write_bytes((tmp_path / "ours" / file).read_bytes())
    back, _ = load(tmp_path / "theirs")
    assert back.config == net.config
    with torch.no_grad():
        torch.testing.assert_close(back(ids), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def greedy_ids(net, ids, n):
    """ids (1, T) and n more, with a cache."""
    cache = KVCache(net.config, 1, ids.shape[1] + n, "cpu", torch.float32)
    out = ids[0].tolist()
    new = ids
    for _ in range(n):
        new = net(new, cache=cache)[:, -1:].argmax(-1)
        out += new[0].tolist()
    return out


@pytest.mark.parametrize(
    "name, change",
    [
        ("olmoe", {"clip_qkv": 8.0}),
        ("olmoe", {"head_dim": 6}),
        ("mixtral", {"hidden_act": "gelu"}),
        ("mixtral", {"num_experts": 3}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
        ("qwen3_moe", {"decoder_sparse_step": 0}),
        ("qwen3_moe", {"num_local_experts": 0}),
    ],
)
def test_what_is_not_exact_is_refused_by_name(name, change):
    d = json.loads((FIXTURES / name / "config.json").read_text()) | change
    with pytest.raises(UserError, match="not supported"):
        from_hf_config(d)


def test_a_bias_for_the_choice_is_no_family_s():
    c = GPTConfig(64, 32, 2, **SMALL)
    assert family(c) == "qwen3_moe"
    c.balance = "none"
    assert family(c) == "qwen3_moe"
    c.balance = "bias"
    assert family(c) == "barelm"


# --------------------------------------------------------------------------------------------------
# Training


def test_training_resumes_bit_for_bit_and_logs_the_router(tiny, tmp_path):
    data = tmp_path / "data"
    data.symlink_to(tiny / "data")
    args = ["config/tiny.py", "--n_experts=4", "--expert_hidden=32", "--balance=bias"]
    args += ["--expert_layers=DE", "--lr_schedule=constant", "--sample_tokens=0"]
    args += ["--eval_every=9", "--eval_tokens=512"]
    run(tmp_path, "train.py", *args, "--max_steps=6", "--out_dir=out/whole")
    run(tmp_path, "train.py", *args, "--max_steps=3", "--out_dir=out/parts")
    again = ["--max_steps=6", "--out_dir=out/parts", "--init_from=resume"]
    run(tmp_path, "train.py", *args, *again)
    whole = (tmp_path / "out/whole/model.safetensors").read_bytes()
    assert whole == (tmp_path / "out/parts/model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "out/whole/log.jsonl").open()]
    row = rows[0]
    assert row["dropped"] == 0 and row["load_max"] >= 1
    assert 0 < row["router_entropy"] <= math.log(4) + 1e-6
    net, _ = load(tmp_path / "out/whole")
    [layer] = expert_layers(net)
    assert 0 < layer.expert_bias.abs().max() <= 6 * 1.001e-3
