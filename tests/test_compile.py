"""A compiled network computes what the plain one does: its loss and the gradient of each parameter,
with every option; and train.py notices where that is not so."""

import math

import numpy as np
import pytest
import torch
from conftest import alone, run
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import flex_attention

import model
import train
from barelm import compiled as compare
from barelm.experts import RoutingLog
from barelm.fast import head_piece
from barelm.optim import make_optimizer
from barelm.run import Run, Updater, UserError, autocast, check_gradient, check_moved, weight_sums
from barelm.shards import MicroBatches, Windows
from barelm.validation import evaluate

CPU = torch.device("cpu")


SHAPE = dict(vocab_size=128, n_ctx=160, n_layer=1, n_head=4, n_kv_head=2, n_embd=32)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= {"original_max_position_embeddings": 64}
OPTIONS = [
    {},
    {"n_kv_head": 4, "head_dim": 16, "n_hidden": 80},
    {"norm": "layer", "bias": True},
    {"norm_place": "post"},
    {"norm_place": "both", "norm_eps": 1e-5},
    {"qk_norm": False, "qkv_bias": True},
    {"pos": "learned", "mlp": "gelu"},
    {"pos": "sinusoidal", "mlp": "relu"},
    {"pos": "none", "mlp": "relu2"},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"tie": False, "init": "xavier"},
    {"dropout": 0.1, "init": "he"},
    {"window": 48, "layers": "SL", "sink_tokens": 2, "local_rope_theta": 100.0},
    {"window": 32, "attention": "strided", "norm": "layer", "norm_bias": True},
    {"pos": "relative", "n_buckets": 8, "max_distance": 32, "scale_scores": False},
    {"pos": "alibi", "mlp": "geglu", "embed_norm": True, "first_norm": False},
    {"softcap": 5.0, "sinks": True, "rope_fraction": 0.5, "qk_norm_all": True},
    {"logit_softcap": 5.0, "logit_scale": 0.5, "embed_scale": True},
]
# Those with a test of their own, or that only say what the others do:
ELSEWHERE = {"causal", "n_encoder_layer", "mlm_head", "n_types", "position_offset"}
ELSEWHERE |= {"n_experts", "n_experts_per_token", "n_shared_experts", "expert_hidden"}
ELSEWHERE |= {"expert_layers", "norm_topk", "balance", "balance_weight", "z_weight"}
ELSEWHERE |= {"mtp", "mtp_weight"}


def name_of(value):
    return ",".join(f"{k}={v}" for k, v in value.items())[:40] or "default"


def loss_and_gradients(network, net, dtype=torch.float32, docs=None, seed=0):
    """The mean loss, and {name: gradient}, of a batch that is the same each time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(128, (2, 160), generator=generator)
    targets = torch.randint(128, (2, 160), generator=generator)
    targets[0, :9] = -100
    net.zero_grad()
    torch.manual_seed(seed)  # of dropout
    with autocast(torch.device("cpu"), dtype):
        loss, count = network(ids, targets, docs=docs)
    (loss / count).backward()
    return (loss / count).detach(), {n: p.grad.clone() for n, p in net.named_parameters()}


def compiled(net, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(net, backend=backend)


def assert_same(got, want, tolerance):
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=0)
    for name, grad in want[1].items():
        assert grad.norm() > 0, name
        assert (got[1][name] - grad).norm() <= tolerance * grad.norm() + 1e-7, name


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_gradients_of_the_whole_network_compiled(options):
    torch.manual_seed(1)
    net = model.GPT(model.GPTConfig(**(SHAPE | options))).train()
    want = loss_and_gradients(net, net)
    assert_same(loss_and_gradients(compiled(net), net), want, 1e-4)


def test_every_option_of_the_config_is_compiled():
    fields = set(model.GPTConfig.__dataclass_fields__)
    varied = set().union(*OPTIONS)
    assert fields - varied - ELSEWHERE <= {"vocab_size", "n_ctx", "n_layer", "n_head", "n_embd"}


def test_documents_recomputed_blocks_and_bfloat16_compiled():
    torch.manual_seed(1)
    net = model.GPT(model.GPTConfig(**SHAPE)).train()
    net.checkpoint = True
    docs = torch.arange(160).div(50, rounding_mode="floor").expand(2, -1)
    want = loss_and_gradients(net, net, torch.bfloat16, docs)
    assert_same(loss_and_gradients(compiled(net), net, torch.bfloat16, docs), want, 0.03)


def test_the_whole_network_in_compiled_kernels():
    torch.manual_seed(1)
    net = model.GPT(model.GPTConfig(**SHAPE, mlp="relu", qk_norm=False)).train()
    want = loss_and_gradients(net, net)
    assert_same(loss_and_gradients(compiled(net, "inductor"), net), want, 1e-3)


def make_windows(folder, n_tokens, seq_len, **options):
    """Windows of a shard of random tokens."""
    header = np.array([20240520, 1, n_tokens, *[0] * 253], "<i4")
    tokens = np.random.default_rng(0).integers(0, 128, n_tokens).astype("<u2")
    (folder / "a.bin").write_bytes(header.tobytes() + tokens.tobytes())
    return Windows([folder / "a.bin"], seq_len, n_vocab=128, **options)


def named(ids, targets):
    return {"ids": ids, "targets": targets}


def make_data(windows, monkeypatch, documents):
    """train.Data of these windows, of which train.py trains all and validates with all."""
    monkeypatch.setattr(train, "seq_len", windows.seq_len)
    monkeypatch.setattr(train, "document_mask", documents)
    token_bytes = torch.arange(128)
    return train.Data(None, windows, windows, {}, "", [5], [], token_bytes)


@pytest.mark.parametrize("documents", [False, True])
def test_nothing_is_compiled_anew_behind_the_first_batch(documents, tmp_path, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # torch has a backward on a CPU for what inductor does not compile, but refuses to be asked.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    torch.manual_seed(1)
    net = model.GPT(model.GPTConfig(**(SHAPE | {"n_layer": 3}))).train()
    net.checkpoint = documents
    windows = make_windows(tmp_path, 160 * 7 + 50, 160, partial=True)
    data = make_data(windows, monkeypatch, documents)
    process = alone()
    cast = autocast(CPU, torch.bfloat16 if documents else torch.float32)
    updater = Updater(process, net.parameters(), make_optimizer(net, "adamw"))

    def step_and_validation():
        """The gradient's norm and the validation's losses; of 8 windows, 3 at once."""
        batches = MicroBatches(windows, CPU, 3)
        net.zero_grad()
        routing = RoutingLog(net, 1)
        losses = train.accumulate_gradients(net, data, batches, 0, 2, updater, cast, routing)
        return (
            losses[0].item(),
            updater.clip_gradients().item(),
            *evaluate(net, windows, data, process, cast, 3),
        )

    eager = step_and_validation()
    block = torch.compile(model.call_block, backend="aot_eager")
    piece = torch.compile(head_piece, backend="aot_eager")
    compare.Ways(block, block, piece, sparse=documents).give(net)
    first = named(*data.train.batch(range(3), CPU))
    compare.loss_and_gradients(net, first, cast, data.documents)
    compare.validation_loss(net, first, cast, data.documents)
    # Blocks and head, for training and for validation: one of each for all layers.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(step_and_validation(), eager, rtol=2e-3, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_blocks_of_every_kind_are_compiled(monkeypatch):
    shape = SHAPE | dict(n_layer=2, n_ctx=32, window=8, layers="SL")
    net = model.GPT(model.GPTConfig(**shape)).train()
    torch._dynamo.reset()
    block = torch.compile(model.call_block, backend="eager")
    ways = compare.Ways(block, block, name="compiled blocks")
    monkeypatch.setattr(compare, "compiled_ways", lambda *args: [ways])
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)  # these are four
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    ids = torch.randint(128, (2, 32))
    cast = autocast(CPU, torch.float32)
    is_compiled, words = compare.try_compile(net, Run(CPU), named(ids, ids), cast)
    assert is_compiled, words


def test_a_cpu_validates_by_eager_blocks_and_a_gpu_by_those_of_training(tmp_path, monkeypatch):
    net = model.GPT(model.GPTConfig(**SHAPE)).train()
    documents = lambda ids: torch.zeros_like(ids)
    [on_cpu] = compare.compiled_ways(net, CPU, documents, None)
    on_gpu = compare.compiled_ways(net, torch.device("cuda"), documents, None)
    assert on_cpu.train_block is not model.call_block and on_cpu.eval_block is model.call_block
    assert len(on_gpu) == 3 and all(ways.eval_block is ways.train_block for ways in on_gpu)

    def compiled(*args):
        raise AssertionError("asked in a validation")

    windows = make_windows(tmp_path, 160 * 7 + 50, 160, partial=True)
    data = make_data(windows, monkeypatch, False)
    cast = autocast(CPU, torch.float32)
    eager = evaluate(net, windows, data, alone(), cast, 3)
    compare.Ways(compiled).give(net)
    assert evaluate(net, windows, data, alone(), cast, 3) == eager
    assert compare.Ways.of(net) == compare.Ways(compiled)


@pytest.mark.parametrize("documents", [False, True])
def test_no_micro_batch_waits_for_the_device(documents, tmp_path, monkeypatch):
    windows = make_windows(tmp_path, 160 * 7 + 50, 160, partial=True)
    data = make_data(windows, monkeypatch, documents)
    process = alone()
    with FakeTensorMode():  # its tensors have no values: who asks for one raises
        data.token_bytes = torch.zeros(128, dtype=torch.int64)
        net = model.GPT(model.GPTConfig(**SHAPE)).train()
        updater = Updater(process, net.parameters(), make_optimizer(net, "adamw"))
        batches = MicroBatches(windows, CPU, 3)
        cast = autocast(CPU, torch.float32)
        routing = RoutingLog(net, 1)
        losses = train.accumulate_gradients(net, data, batches, 0, 2, updater, cast, routing)
        norm = updater.clip_gradients()
        assert losses.shape == (2,) and norm.shape == ()
        with pytest.raises(DataDependentOutputException):
            process.sum(losses[0])
        monkeypatch.setattr(Run, "sum", lambda self, *totals: [1.0] * len(totals))
        evaluate(net, windows, data, process, cast, 3)


def test_micro_batches_are_those_of_their_positions(tmp_path):
    windows = make_windows(tmp_path, 16 * 5 + 1, 16)
    order = [windows.at(i) for i in range(36)]  # of 5 windows an epoch
    for world in (1, 3):
        for rank in range(world):
            ahead = MicroBatches(windows, CPU, 2, rank, world)
            late = MicroBatches(windows, CPU, 2, rank, world)
            # The first is made ahead in vain: a run may begin anywhere.
            for position in (0, 12, 12 + ahead.size, 12 + 2 * ahead.size):
                wanted = [order[position + rank + j * world] for j in range(2)]
                expected = named(*windows.batch(wanted, CPU))
                for got in (ahead.take(position), late.take(position)):
                    assert all(torch.equal(got[name], expected[name]) for name in expected)
                ahead.make_ahead()


# train.py trusts a compiled network only where it agrees with the eager one


class Scaled(torch.autograd.Function):
    """A wrong backward, such as a faulty compiler's: the gradient times a factor."""

    @staticmethod
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@pytest.mark.parametrize(
    "loss_factor, gradient_factor, differs",
    [(1, 1, False), (1.001, 1.01, False), (1, 0, True), (1, 1.5, True), (1.1, 1, True),
     (math.nan, 1, True), (1, math.nan, True)],
)  # fmt: skip
def test_a_network_that_computes_otherwise_is_noticed(loss_factor, gradient_factor, differs):
    net = model.GPT(model.GPTConfig(**SHAPE)).train()
    batch = named(*torch.randint(128, (2, 3, 160)))
    cast = autocast(torch.device("cpu"), torch.float32)

    eager = compare.loss_and_gradients(net, batch, cast, pieces=2)
    right = net.forward

    def wrong(ids, targets, docs):
        loss, count = right(ids, targets, docs=docs)
        return loss_factor * Scaled.apply(loss, gradient_factor), count

    net.forward = wrong
    other = compare.loss_and_gradients(net, batch, cast)
    assert compare.differs(other, eager, tolerance=0.1) == differs
    assert all(p.grad is None for p in net.parameters())


def test_a_wrong_validation_is_noticed_and_one_without_dropout_is_none():
    torch.manual_seed(1)
    net = model.GPT(model.GPTConfig(**(SHAPE | {"dropout": 0.3}))).train()
    with torch.no_grad():
        net.model.embed_tokens.weight.mul_(30)  # what dropout takes away is missed
    ids = torch.randint(128, (2, 160))
    cast = autocast(CPU, torch.float32)
    batch = named(ids, ids)
    eager = compare.loss_and_gradients(net, batch, cast)
    loss = compare.validation_loss(net, batch, cast)
    assert eager[0] > 1.2 * loss
    faults = []
    for block in (
        model.call_block,
        lambda block, x, *rest: -x,
        lambda block, x, *rest: math.nan * x,
    ):
        net.eval_block = block
        # With dropout one draw's gradients are not the other's.
        result = compare.compare_with(eager, loss, net, batch, cast, None, math.inf)
        faults.append(result[1])
    assert faults[0] == "" and all("wrongly here (validation loss" in f for f in faults[1:])


def test_one_layer_without_gradients_is_noticed():
    net = model.GPT(model.GPTConfig(**(SHAPE | {"n_layer": 3}))).train()
    batch = named(*torch.randint(128, (2, 3, 160)))
    cast = autocast(torch.device("cpu"), torch.float32)
    eager = compare.loss_and_gradients(net, batch, cast)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
        index = [n for n, _ in net.named_parameters()].index(name)
        norms = eager[1].clone()
        norms[index] = 0
        assert compare.differs((eager[0], norms), eager, tolerance=0.1)


def test_a_machine_without_a_compiler_computes_eagerly_and_says_why(monkeypatch):
    def missing(*args):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, **options: missing)
    net = model.GPT(model.GPTConfig(**SHAPE)).train()
    batch = named(*torch.randint(128, (2, 3, 160)))
    is_compiled, words = compare.try_compile(net, Run(CPU), batch, autocast(CPU, torch.float32))
    assert not is_compiled and words == "off; without compiled blocks, since it failed: no compiler"
    assert compare.Ways.of(net) == compare.Ways() and net.training
    percents = [compare.in_percent(x) for x in (0, 0.0015, 0.002, 0.0199, 0.12)]
    assert percents == ["0.01 %", "0.2 %", "0.2 %", "2 %", "20 %"]


def test_a_step_that_changes_nothing_ends_the_run():
    params = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.zeros(2))]
    before = weight_sums(params)
    with pytest.raises(UserError, match="moved no weight"):
        check_moved(before, params, 1e-3, alone())
    with torch.no_grad():
        params[1][0] = 1e-45  # the smallest step that there is
    check_moved(before, params, 1e-3, alone())
    with pytest.raises(UserError, match="step 7: the gradient norm is exactly zero"):
        check_gradient(0.0, 7)
    check_gradient(1e-30, 7)


def test_a_run_without_a_learning_rate_ends(tiny):
    command = ["config/tiny.py", "--out_dir=out/still", "--learning_rate=0", "--max_steps=3"]
    done = run(tiny, "train.py", *command, check=False)
    assert done.returncode == 1
    assert "moved no weight" in done.stderr and "Traceback" not in done.stderr


def test_a_formula_that_fast_does_not_know_trains_by_the_formula(monkeypatch):
    """A fork's soft cap of the logits, which fast.py's loss has not."""
    net = model.GPT(model.GPTConfig(**SHAPE)).train()
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 2, 16))
    cast = autocast(torch.device("cpu"), torch.float32)
    run = Run(torch.device("cpu"))
    batch = named(*ids)
    assert compare.check_fast(net, run, batch, cast) == "" and net.fast and net.training
    plain_logits = model.GPT.logits
    monkeypatch.setattr(model.GPT, "logits", lambda self, h: 0.5 * plain_logits(self, h))
    fault = compare.check_fast(net, run, batch, cast)
    assert "does not compute what model.py does" in fault and not net.fast and net.training
    loss, _ = net(*ids)
    capped = torch.nn.functional.cross_entropy(
        net(ids[0]).flatten(0, 1), ids[1].flatten(), reduction="sum"
    )
    assert torch.allclose(loss, capped)
