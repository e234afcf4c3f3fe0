"""barelm/decode.py against model.py's plain loop, and against each sequence by itself."""

import contextlib
import itertools
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_model import GPT2, OURS, QWEN3, SHAPES, make_net
from torch.utils._python_dispatch import TorchDispatchMode

import model
from barelm import caches
from barelm import quantized as quantized_layers
from barelm.adapters import add_adapters
from barelm.api import (
    ApiError,
    Chat,
    ServedModel,
    completion_jobs,
    read_completion,
    read_conversation,
    read_prompts,
)
from barelm.bpe import char_tokenizer
from barelm.decode import Decoder
from barelm.engine import Engine
from barelm.fast import PlacedProduct, generating
from barelm.generation import decoder_for
from barelm.graphs import Graphs
from barelm.quantized import quantize_weights
from barelm.run import UserError
from barelm.sampling import FILTERS, Kinds, choose_tokens, draws, kinds_of
from barelm.tokenizer import Tokenizer

SETTINGS = [
    dict(temperature=0),
    dict(seed=2),
    dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
    dict(temperature=0, repetition_penalty=2.0, stop=["a", "yx"]),
]
PROMPTS = {
    "even": [[1, 2, 3], [5, 5, 5], [4, 1, 2]],
    "uneven": [[1, 2, 3], [5], [4] * 29, [7, 8, 9, 10, 11, 12, 1, 2]],
    "one long": [[9] * 28, [1], [2], [3], [4], [5]],  # read as one packed row
}


@pytest.fixture(scope="module")
def tok():
    tok = char_tokenizer("abcdefghijklmnopqrstuvwxyz \n.?!😀é")
    many_ends = Tokenizer(tok.spec, tok.config)
    many_ends.eos_ids = [0, 3, 11, *range(20, 27)]  # more than there is room for at first
    return many_ends


def adapted(net):
    add_adapters(net, 4)
    for name, p in net.named_parameters():
        if "adapter" in name:
            nn.init.normal_(p, std=0.3)
    return net


def quantized(net):
    return quantize_weights(net, "int8")


T5 = dict(n_head=4, n_embd=32, n_encoder_layer=2, pos="relative", n_buckets=8, max_distance=20)
T5 |= dict(scale_scores=False, qk_norm=False, mlp="relu", logit_scale=32**-0.5)
SEQ2SEQ = {
    "t5": T5,
    "vaswani": dict(n_head=4, n_embd=32, n_encoder_layer=1, pos="sinusoidal", norm="layer")
    | dict(norm_place="post", mlp="relu", bias=True, qk_norm=False, embed_scale=True),
    "windows": QWEN3 | dict(n_encoder_layer=1, window=4, layers="SL"),
}
STEPS = SHAPES | OURS | SEQ2SEQ
STEPS["rings"] = QWEN3 | dict(window=5, layers="SSSL", n_layer=4, sink_tokens=2, pos="alibi")
STEPS["blocks"] = QWEN3 | dict(window=8, attention="fixed", sinks=True, softcap=9.0)
NETS = {
    "qwen3": (QWEN3, None),
    "wide heads": (SHAPES["qwen3-untied-wide-heads"], None),
    "sinusoidal": (OURS["post-sinusoidal-relu2"], None),
    "int8": (QWEN3, quantized),
    "adapters": (GPT2, adapted),
}


def compare(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.text, a.finish_reason) == (b.ids, b.text, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=tolerance)


@pytest.mark.parametrize("name", NETS)
def test_generate_is_the_plain_loop(name, tok, monkeypatch):
    shape, change = NETS[name]
    net = make_net(**shape)
    net.lm_head.weight.data[tok.n_vocab :] += 5  # ids of no token, which must never come
    if change is not None:
        net = change(net)
    if name == "wide heads":
        monkeypatch.setattr(caches, "PACK", 28)  # several packed rows, one of a single prompt
    if name == "int8":  # one product, however many rows there are left
        of_all = dict.fromkeys(quantized_layers.ROUNDED_FROM, 1)
        monkeypatch.setattr(quantized_layers, "ROUNDED_FROM", of_all)
    cases = list(itertools.product(SETTINGS, PROMPTS.values()))
    for settings, prompts in cases[:: 1 if name == "qwen3" else 2]:
        net.fast = True
        ours = model.generate(net, tok, prompts, max_new_tokens=9, **settings)
        with monkeypatch.context() as patch:  # the same products, which round alike
            patch.setattr(model, "decode_rows", model.sample_rows)
            compare(ours, model.generate(net, tok, prompts, max_new_tokens=9, **settings))
        if name == "int8":  # its plain product is another
            continue
        net.fast = False
        compare(ours, model.generate(net, tok, prompts, max_new_tokens=9, **settings), 1e-3)


def random_job(chance, i, n_vocab):
    """(prompt, limit, options) of a sequence."""
    options = [
        dict(temperature=0.0),
        dict(),
        dict(top_k=5, top_p=0.9),
        dict(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5),
        dict(min_p=0.1, temperature=0.7),
    ]
    prompt = [chance.randrange(n_vocab) for _ in range(chance.randint(1, 20))]
    return prompt, chance.randint(1, 12), options[i % len(options)]


def run_alone(net, tok, i, prompt, limit, options):
    """[(id, log p)] of a sequence, from one forward pass a token and today's functions."""
    uniform = draws(i, 0, limit)
    ids = list(prompt)
    answer = []
    counts = torch.zeros(1, net.config.vocab_size)
    while len(answer) < limit:
        with torch.no_grad():
            logits = model.head(net, tok, net.hidden(torch.tensor([ids]))[:, -1])  # (1, V)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        penalties = [options.get("repetition_penalty", 1.0), counts]
        penalties += [options.get("presence_penalty", 0.0), options.get("frequency_penalty", 0.0)]
        likely = model.penalize(logits, seen, *penalties)
        filters = {name: options[name] for name in FILTERS if name in options}
        token = choose_tokens(likely, uniform[len(answer) : len(answer) + 1], **filters).item()
        answer.append((token, logits.log_softmax(-1)[0, token].item()))
        ids.append(token)
        counts[0, token] += 1
        if token in tok.eos_ids:
            break
    return answer


def test_slots_set_and_cleared_between_steps_are_sequences_by_themselves(tok):
    """Four slots for 24 sequences, each with its own options and a prompt that is read in chunks;
    some leave before their end; a copied beginning is as good as one that was read."""
    net = make_net(**QWEN3)
    chance = random.Random(3)
    jobs = [random_job(chance, i, tok.n_vocab) for i in range(24)]
    answers = [[] for _ in jobs]
    patience = [chance.choice([2, 99, 99]) for _ in jobs]  # tokens after which its client leaves
    waiting = list(range(len(jobs)))
    slots = {}  # {slot: job}
    with generating(net), torch.no_grad():
        decoder = Decoder(net, tok, 4, 32, check=True)
        while waiting or slots:
            if decoder.ready:
                chosen = decoder.choose()
                tokens = chosen.wait()
                assert all(tokens.finite) and chosen.owners == [slots[s] for s in chosen.slots]
                for n, (slot, i) in enumerate(zip(chosen.slots, chosen.owners)):
                    answers[i].append((tokens.tokens[n], tokens.logprobs[n]))
                    best = tokens.alternatives[n]
                    assert len(best) == i % 4 and sorted(best.values())[::-1] == [*best.values()]
                    done = len(answers[i]) in (jobs[i][1], patience[i])
                    if done or tokens.tokens[n] in tok.eos_ids:
                        decoder.clear(slot)
                        del slots[slot]
                decoder.feed()
            if waiting and len(slots) < 4:
                slot = chance.choice([s for s in range(4) if s not in slots])
                i = slots[slot] = waiting.pop(0)
                prompt, limit, options = jobs[i]
                how = dict(uniform=draws(i, 0, limit), ends=tok.eos_ids, n_alternatives=i % 4)
                decoder.set(slot, prompt, limit, options=options, owner=i, **how)
                decoder.read({slot: prompt[:-1][:9]}) if len(prompt) > 1 else None
            unread = {}
            for slot, i in slots.items():
                if decoder.length[slot] < len(jobs[i][0]):
                    unread[slot] = jobs[i][0][decoder.length[slot] :][:9]
            if unread:
                states = decoder.read(unread)
                assert {slot: len(h) for slot, h in states.items()} == {
                    slot: len(ids) for slot, ids in unread.items()
                }
    for i, answer in enumerate(answers):
        expected = run_alone(net, tok, i, *jobs[i])[: patience[i]]
        assert [id for id, _ in answer] == [id for id, _ in expected], jobs[i]
        assert [p for _, p in answer] == pytest.approx([p for _, p in expected], abs=1e-4)


def test_a_copied_beginning_is_as_good_as_one_that_was_read(tok):
    net = make_net(**QWEN3)
    with generating(net), torch.no_grad():
        decoder = Decoder(net, tok, 5, 32)
        decoder.set(0, [1, 2, 3, 4, 5], 4)
        expected = decoder.read({0: [1, 2, 3, 4, 5]})[0]
        decoder.copy(4, 0, 3)
        decoder.set(4, [1, 2, 3, 4, 5], 4, n_cached=3)
        torch.testing.assert_close(decoder.read({4: [4, 5]})[4], expected[3:])
        torch.testing.assert_close(decoder.logits[4], decoder.logits[0])
        assert decoder.ready == [0, 4]
        with pytest.raises(RuntimeError, match="no token was chosen"):
            decoder.feed()
        decoder.wipe(0)
        assert not decoder.stores.groups[0].store[:, :, 0].any()


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 4)])
def test_a_row_that_has_ended_neither_grows_nor_disturbs_the_others(rows, tok):
    """On a GPU such rows are computed until the host has heard of it."""
    net = make_net(**QWEN3)
    prompts = {1: [1, 2, 3], 2: [4, 5]}
    kinds = kinds_of([{"temperature": 0.0}])
    with generating(net), torch.no_grad():
        both = Decoder(net, tok, 4, 16)
        for slot, limit in ((1, 9), (2, 2)):
            both.set(slot, prompts[slot], limit, options={"temperature": 0.0})
        both.read(prompts)
        alone = Decoder(net, tok, 1, 16)
        alone.set(0, prompts[1], 9, options={"temperature": 0.0})
        alone.read({0: prompts[1]})
        for step in range(9):
            expected = alone.choose().wait()
            values = both.choose_rows(rows, kinds)[1 - rows.start].tolist()
            assert values[0] == expected.tokens[0]
            assert values[1] == pytest.approx(expected.logprobs[0], abs=1e-5)
            alone.feed()
            both.feed_rows(rows, 16)
            if step == 1:  # the last token of the limit is chosen, and not fed
                kept = both.stores.groups[0].store[:, :, 2, :, :16].clone()
        assert both.lengths.tolist() == [0, 3 + 8, 2 + 1, 0] and not both.left.any()
        assert (
            torch.equal(both.stores.groups[0].store[:, :, 2, :, :16], kept)
            and kept[..., 3:, :].eq(0).all()
        )
        assert both.stores.groups[0].store[:, :, [0, 3], :, :16].eq(0).all()


def on_the_device(net, device):
    """The network with weights that are nowhere, on a device that need not be there."""
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            p = torch.empty(p.shape, dtype=torch.bfloat16, device=device)
            module.register_parameter(name, nn.Parameter(p))
    return net


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no device to pretend")
@pytest.mark.parametrize(
    "name", ["qwen3", "gpt2", "post-sinusoidal-relu2", "rings", "blocks", "windows", "t5"]
)
def test_a_step_on_a_gpu_waits_for_nothing(name, tok):
    """Of fake tensors nothing can be read on the host, and devices may not be mixed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    copied = []

    class NoCopies(TorchDispatchMode):
        """Notes what is copied from the host: which a fake tensor allows."""

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
                copied.extend(x for x in args if getattr(x, "is_cpu", False))
            return operation(*args, **(kwargs or {}))

    net = make_net(**STEPS[name])
    net.start_id = 2
    with FakeTensorMode(), generating(net), torch.no_grad():
        net = on_the_device(net, "cuda")
        decoder = Decoder(net, tok, 4, 32, graphs=False, check=True)
        options = dict(repetition_penalty=2.0)
        for slot in range(2):
            uniform = torch.empty(5)
            decoder.set(slot, [1, 2], 5, options=options, uniform=uniform, ends=tok.eos_ids)
        decoder.read({0: [1, 2], 1: [1]})
        if not decoder.is_seq2seq:
            decoder.read({1: [2]})
        every_kind = list(itertools.product((False, True), repeat=5))
        if name != "qwen3":  # where logits come from is one to `choose`
            every_kind = every_kind[-1:]
        for sampled, top_k, top_p, min_p, penalized in every_kind:
            kinds = Kinds(sampled, 8 * top_k, top_p, min_p, penalized)
            with NoCopies():
                values = decoder.choose_rows(slice(0, 4), kinds, 2)
            assert values.device.type == "cuda" and values.shape == (4, 2 + 2 * 2 + 1)
        for flash in (False, True)[: 1 + net.config.is_plain]:
            decoder.flash = flash
            with decoder.computing(), NoCopies():
                decoder.feed_rows(slice(0, 2), 32, None, decoder.source_places([]))
        decoder.refresh()
        with NoCopies():
            decoder.clear(0)
    assert not copied


def test_without_graphs_functions_are_called():
    """Where there is a GPU this is a graph of nothing."""
    graphs = Graphs(torch.device("cuda", 0))
    for _ in range(2):
        assert graphs.run(("choose_rows", 1), lambda: 5, contextlib.nullcontext) == 5
    assert graphs.failed != torch.cuda.is_available()
    graphs.forget("choose_rows")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_after_a_capture_that_failed_the_device_is_as_before():
    device = torch.device("cuda", 0)
    ones = torch.ones(3, device=device)
    graphs = Graphs(device)
    before = torch.cuda.current_stream(device)
    total = graphs.run(("sum",), lambda: ones.sum().item(), contextlib.nullcontext)  # it waits
    assert graphs.failed and total == 3
    assert torch.cuda.current_stream(device) == before
    torch.rand(3, device=device)
    torch.cuda.empty_cache()


def test_a_decoder_may_be_used_within_inference_mode_and_without(tok):
    net = make_net(**QWEN3)
    many = dict(options=dict(repetition_penalty=2.0, temperature=0), ends=range(90, 99))
    answers = []
    with generating(net), torch.no_grad():
        decoder = Decoder(net, tok, 1, 16)
        for within in (True, False):
            with torch.inference_mode(within), torch.no_grad():
                decoder.set(0, [1, 2], 5, **many)
                decoder.read({0: [1, 2]})
                answers.append(decoder.choose().wait().tokens)
    assert answers[0] == answers[1]


def test_a_placed_product_follows_the_weights():
    layers = [nn.Linear(8, 3), nn.Linear(8, 5)]
    product = PlacedProduct(layers, torch.bfloat16)
    place = product.weight.data_ptr()
    x = torch.randn(2, 8).bfloat16()
    with torch.no_grad():
        for layer in layers:
            layer.weight += 1
            layer.bias += 1
        product.refresh()
        expected = [F.linear(x, f.weight.bfloat16(), f.bias.bfloat16()) for f in layers]
        torch.testing.assert_close(product(x), torch.cat(expected, 1), rtol=0.02, atol=0.02)
    assert product.weight.data_ptr() == place


def test_a_decoder_for_a_cpu_is_of_one_generation(tok):
    net = make_net(**QWEN3)
    assert decoder_for(net, tok, 2, 8) is not decoder_for(net, tok, 2, 8)


# --------------------------------------------------------------------------------------------------
# Encoder-decoders: a prompt is a source, which is read once

SOURCES = [[1, 2, 3], [5], [4, 9] * 15, [7, 8, 9, 10, 11, 12, 1, 2]]


def make_seq2seq(name):
    net = make_net(**SEQ2SEQ[name])
    net.start_id = 2
    return net


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_sources_are_answered_as_by_whole_passes(name, tok):
    net = make_seq2seq(name)
    endless = Tokenizer(tok.spec, tok.config)
    endless.eos_ids = []
    expected = [without_cache(net, endless, source, 11) for source in SOURCES]
    for net.fast in (True, False):
        for settings in SETTINGS[2:]:
            options = dict(max_new_tokens=11, **settings)
            together = model.generate(net, tok, SOURCES, **options)
            for i, source in enumerate(SOURCES):
                compare([together[i]], model.generate(net, tok, [source], first=i, **options), 1e-3)
        answers = model.generate(net, endless, SOURCES, max_new_tokens=11, temperature=0)
        assert [answer.ids for answer in answers] == expected
        [full] = model.generate(net, endless, [[3] * 32], max_new_tokens=99, temperature=0)
        assert len(full.ids) == 31  # the contexts of source and answer are two


def without_cache(net, tok, source, n):
    """The likeliest tokens, by a whole pass for each."""
    ids = [net.start_id]
    for _ in range(n):
        with torch.no_grad():
            h = net.hidden(torch.tensor([ids]), encoder_ids=torch.tensor([source]))
        ids.append(model.head(net, tok, h[0, -1]).argmax().item())
    return ids[1:]


def test_an_engine_answers_sources(tok):
    net = make_seq2seq("t5")
    engine = Engine(net, tok, max_batch=3, max_len=32, prefill_chunk=7)
    sources = [*SOURCES, SOURCES[2], [4] * 32]
    served = ServedModel("sources", tok, 32, 9, is_seq2seq=True)
    wanted = read_completion(served, {"prompt": sources, "max_tokens": 9, "temperature": 0})
    jobs = completion_jobs(served, wanted, read_prompts(served, wanted), lambda update: None)
    engine.submit(jobs)
    with generating(net), torch.inference_mode():
        while engine.waiting or engine.jobs:
            engine.step()
    for job in jobs:
        [answer] = model.generate(net, tok, [job.ids], max_new_tokens=9, temperature=0)
        assert job.row.out.ids == answer.ids and job.n_reused == 0
    wanted.prompt = "abc"
    assert read_prompts(served, wanted) == [tok.source("abc")]
    for refused, why in (
        (lambda: read_completion(served, {"prompt": "a", "echo": True}), "echo: a source"),
        (lambda: read_conversation(served, Chat()), "ask /v1/completions"),
        (lambda: completion_jobs(served, wanted, [[1] * 33], print), "a source of 33 tokens"),
    ):
        with pytest.raises(ApiError) as error:
            refused()
        assert why in error.value.message


def test_an_encoder_generates_nothing(tok):
    net = make_net(**QWEN3, causal=False)
    with pytest.raises(UserError, match="an encoder .*generates none"):
        model.generate(net, tok, [[1]])
    with pytest.raises(UserError, match="an encoder .*generates none"):
        Engine(net, tok, max_batch=2, max_len=9)


def t5_name(name):
    """What transformers' T5 calls a parameter of ours."""
    side = "encoder" if ".encoder." in name else "decoder"
    if name.startswith(("lm_head", "model.embed")):
        return name.replace("model.embed_tokens", "shared")
    if name.endswith("relative_bias.weight"):
        return f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if name.endswith(".norm.weight"):
        return f"{side}.final_layer_norm.weight"
    i, part, *matrix, _ = name.split("layers.")[1].split(".")
    layer = {"self": 0, "input": 0, "cross": 1, "mlp": 2, "post": 2}[part.split("_")[0]]
    if side == "encoder" and layer == 2:
        layer = 1
    module = {"self_attn": "SelfAttention.", "cross_attn": "EncDecAttention."}.get(part, "")
    if part == "mlp":
        module = "DenseReluDense."
    names = dict(q_proj="q", k_proj="k", v_proj="v", o_proj="o")
    names |= dict(gate_proj="wi_0", up_proj="wi_1", down_proj="wo")
    module += names[matrix[0]] if matrix else "layer_norm"
    return f"{side}.block.{i}.layer.{layer}.{module}.weight"


def test_greedy_answers_are_those_of_transformers_t5(tok):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    shape = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    shape |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=20)
    shape |= dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, initializer_factor=3.0)
    config = transformers.T5Config(**shape, decoder_start_token_id=2, eos_token_id=None)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    own = dict(mlp="geglu", tie=False, n_hidden=48, logit_scale=1.0)
    net = make_net(**T5 | own, norm_eps=1e-6)
    net.start_id = 2
    weights = theirs.state_dict()
    net.load_state_dict({name: weights[t5_name(name)] for name in net.state_dict()})
    endless = Tokenizer(tok.spec, tok.config)
    endless.eos_ids = []
    net.lm_head.weight.data[tok.n_vocab :] = 0  # ids of no token
    theirs.lm_head.weight.data[tok.n_vocab :] = 0
    for net.fast in (True, False):
        answers = model.generate(net, endless, SOURCES, max_new_tokens=14, temperature=0)
        for source, answer in zip(SOURCES, answers):
            options = dict(max_new_tokens=14, do_sample=False, pad_token_id=0)
            [expected] = theirs.generate(torch.tensor([source]), **options).tolist()
            assert answer.ids == expected[1:] and len(set(answer.ids)) > 1
