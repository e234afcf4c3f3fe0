"""GGUF of every family and kind of tokenizer, against its own package, transformers' reader and
naive loops. llama.cpp itself: tests/long_llama.py."""

import json

import numpy as np
import pytest
import torch
from conftest import run
from llama_tokenizers import named_tokenizer, with_pattern

gguf = pytest.importorskip("gguf")
from barelm.bpe import bpe_tokenizer, char_tokenizer, split_step, wordpiece_tokenizer
from barelm.checkpoint import load, save
from barelm.families import from_hf_config
from barelm.gguf_file import FILE_TYPES, as_array, check_gguf, tensor_type, write_gguf
from barelm.gguf_network import ARCHITECTURES
from barelm.gguf_tokenizer import llama_vocab, trial_texts
from barelm.k_quants import K_QUANTS, quantize
from barelm.llama_ids import PATTERNS, llama_ids
from barelm.run import UserError
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig

WIDE = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
WIDE |= dict(max_position_embeddings=40, vocab_size=448, rms_norm_eps=1e-5, layer_norm_eps=1e-5)
GROUPED = WIDE | dict(num_key_value_heads=2, tie_word_embeddings=False)
EXPERTS = GROUPED | dict(num_local_experts=3, num_experts_per_tok=2)
OLD = dict(n_layer=2, n_head=4, vocab_size=448, layer_norm_epsilon=1e-5)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=10)
T5 = dict(d_model=32, d_ff=56, d_kv=6, num_heads=4, num_layers=3, num_decoder_layers=2)
FAMILIES = {
    "llama": ("tinyllama", GROUPED),
    "mistral": ("mistral", GROUPED | dict(sliding_window=30)),
    "ministral": (
        "llama3",
        GROUPED
        | dict(head_dim=6, sliding_window=30, layer_types=["sliding_attention", "full_attention"]),
    ),
    "mixtral": ("llama2", EXPERTS),
    "qwen2": ("qwen3", GROUPED),
    "qwen3": ("qwen3", GROUPED | dict(head_dim=128, rope_parameters=YARN)),
    "qwen3_moe": (
        "qwen3",
        EXPERTS | dict(head_dim=128, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "olmoe": ("gpt2", WIDE | dict(num_experts=3, num_experts_per_tok=2)),
    "stablelm": ("gpt2", GROUPED | dict(partial_rotary_factor=0.5, use_qkv_bias=True)),
    "gpt2": ("gpt2", OLD | dict(n_embd=32, n_positions=1024)),
    "bloom": ("smollm2", OLD | dict(hidden_size=32)),
    "bert": ("wordpiece", WIDE),
    "roberta": ("gpt2", WIDE | dict(pad_token_id=1)),
    "xlm-roberta": ("unigram", WIDE | dict(pad_token_id=1)),
    "modernbert": ("gpt2", WIDE | dict(local_attention=8)),
    "t5": ("unigram", T5 | dict(vocab_size=448)),
}


def network(settings):
    """A random GPT whose every tensor counts."""
    torch.manual_seed(0)
    net = GPT(from_hf_config(settings)).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(float(p.ndim == 1 and not name.endswith("bias")), 0.3)
    net.start_id = 0 if net.config.is_seq2seq else None
    return net


def written(kind, folder, gguf_type="F32", **change):
    """(the network, its tokenizer, the file's {key: value}, {name: values float32})."""
    tokenizer, settings = FAMILIES[kind]
    net = network(dict(model_type=kind) | settings | change)
    tok = named_tokenizer(tokenizer)
    path = folder / f"m-{gguf_type}.gguf"
    write_gguf(net, tok, path, gguf_type)
    return net, tok, *contents(path)


def contents(path):
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return keys, tensors


# --------------------------------------------------------------------------------------------------
# Families


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_has_the_tensors_of_llama_cpps_architecture(kind, tmp_path):
    net, _, keys, tensors = written(kind, tmp_path)
    architecture = keys["general.architecture"]
    assert architecture == ARCHITECTURES[kind].name
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[known]}
    allowed = {name.format(bid=i) for name in names for i in range(net.config.n_layer + 1)}
    assert {name.rpartition(".")[0] for name in tensors} <= allowed
    # As many numbers as the network has, but for what the file has twice, or not.
    n_numbers = sum(p.numel() for p in net.parameters())
    lost = 0
    if not net.config.causal:
        lost = net.lm_head.bias.numel()
        lost += sum(p.numel() for p in (*net.head_dense.parameters(), *net.head_norm.parameters()))
        lost += net.config.position_offset * net.config.n_embd
        lost += 0 if net.config.tie else net.lm_head.weight.numel()
    assert sum(values.size for values in tensors.values()) == n_numbers - lost
    n_layer = net.config.n_encoder_layer or net.config.n_layer
    assert keys[f"{architecture}.block_count"] == n_layer


def test_the_table_has_every_family_that_opens_here():
    from barelm.families import FAMILIES as opening

    assert ARCHITECTURES.keys() == opening.keys() == FAMILIES.keys()


def test_transformers_reads_the_same_bloom(tmp_path):
    pytest.importorskip("accelerate")  # which transformers wants for GGUF
    transformers = pytest.importorskip("transformers")
    net, _, _, _ = written("bloom", tmp_path)
    opener = transformers.AutoModelForCausalLM
    theirs = opener.from_pretrained(tmp_path, gguf_file="m-F32.gguf", dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, net(ids), atol=1e-4, rtol=1e-4)


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def naive_llama(keys, tensors, ids):
    """Logits (T, V) of llama.cpp's `llama`, from a file alone, a token and a head at a time. RoPE
    turns neighbours there."""
    get = lambda name: keys[f"llama.{name}"]
    n_head, n_kv, d = (
        get(f"attention.{name}") for name in ("head_count", "head_count_kv", "key_length")
    )
    eps, theta = get("attention.layer_norm_rms_epsilon"), get("rope.freq_base")
    angles = np.arange(len(ids))[:, None] * theta ** -(np.arange(0, d, 2) / d)  # (T, d / 2)

    def turned(x):  # (T, d)
        a, b = x[:, 0::2], x[:, 1::2]
        out = np.empty_like(x)
        out[:, 0::2] = a * np.cos(angles) - b * np.sin(angles)
        out[:, 1::2] = a * np.sin(angles) + b * np.cos(angles)
        return out

    x = tensors["token_embd.weight"][ids]
    for i in range(get("block_count")):
        w = {name: tensors[f"blk.{i}.{name}.weight"] for name in ("attn_norm", "ffn_norm")}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            w[name] = tensors[f"blk.{i}.{name}.weight"]
        y = rms(x, w["attn_norm"], eps)
        q, k, v = (y @ w[f"attn_{name}"].T for name in "qkv")
        heads = []
        for h in range(n_head):
            g = h * n_kv // n_head
            a, b = turned(q[:, h * d : (h + 1) * d]), turned(k[:, g * d : (g + 1) * d])
            scores = a @ b.T / np.sqrt(d)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            shares = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(shares / shares.sum(1, keepdims=True) @ v[:, g * d : (g + 1) * d])
        x = x + np.concatenate(heads, 1) @ w["attn_output"].T
        y = rms(x, w["ffn_norm"], eps)
        x = x + naive_mlp(y, tensors, f"blk.{i}", get)
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return rms(x, tensors["output_norm.weight"], eps) @ head.T


def naive_mlp(y, tensors, block, get):
    if f"{block}.ffn_gate.weight" in tensors:
        gate, up, down = (tensors[f"{block}.ffn_{name}.weight"] for name in ("gate", "up", "down"))
        return silu(y @ gate.T) * (y @ up.T) @ down.T
    out = np.zeros_like(y)
    stacks = [tensors[f"{block}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")]
    for t, row in enumerate(y @ tensors[f"{block}.ffn_gate_inp.weight"].T):
        chosen = row.argsort()[::-1][: get("expert_used_count")]
        shares = np.exp(row[chosen]) / np.exp(row[chosen]).sum()
        for share, e in zip(shares, chosen):
            gate, up, down = (stack[e] for stack in stacks)
            out[t] += share * (silu(y[t] @ gate.T) * (y[t] @ up.T) @ down.T)
    return out


@pytest.mark.parametrize("kind", ["llama", "ministral", "mixtral"])
def test_a_naive_llama_computes_our_logits_from_the_file(kind, tmp_path):
    net, tok, keys, tensors = written(kind, tmp_path)
    ids = tok.encode("The quick brown fox")[:25]
    with torch.no_grad():
        ours = net(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(naive_llama(keys, tensors, ids), ours, atol=1e-4, rtol=1e-4)


def test_a_window_limits_the_context_and_says_so(tmp_path):
    net, tok, keys, _ = written("mistral", tmp_path)
    assert keys["llama.context_length"] == net.config.window == 30
    [note] = [note for note in check_gguf(net.config, tok).notes if "window" in note]
    assert "llama has no window: the file says a context of 30 tokens" in note


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("olmoe", dict(norm_topk_prob=True), "norm_topk=False, this model True"),
        ("olmoe", dict(num_key_value_heads=2), "n_kv_head=4, this model 2"),
        ("qwen3_moe", dict(norm_topk_prob=False), "norm_topk=True, this model False"),
        ("qwen3_moe", dict(mlp_only_layers=[1]), "expert_layers='', this model 'ED'"),
        ("modernbert", dict(norm_bias=True), "norm_bias"),
        ("t5", dict(relative_attention_max_distance=64), "max_distance=128, this model 64"),
        ("t5", dict(num_decoder_layers=4), "at most 3"),
        ("t5", dict(feed_forward_proj="gated-silu"), "relu or geglu"),
    ],
)
def test_what_an_architecture_computes_otherwise_is_refused(kind, change, words):
    tokenizer, settings = FAMILIES[kind]
    c = from_hf_config(dict(model_type=kind) | settings | change)
    with pytest.raises(UserError, match=words):
        check_gguf(c, named_tokenizer(tokenizer))


def test_yarn_of_another_length_and_a_scaled_head(tmp_path):
    rope = YARN | dict(attention_factor=1.5, beta_fast=8.0)
    _, _, keys, _ = written("qwen3", tmp_path, rope_parameters=rope)
    get = lambda name: keys[f"qwen3.rope.scaling.{name}"]
    assert [get("type"), get("factor"), get("yarn_beta_fast")] == ["yarn", 4, 8]
    usual = 0.1 * np.log(4) + 1  # which llama.cpp multiplies by
    assert get("attn_factor") * usual == pytest.approx(1.5)
    net, _, _, tensors = written("t5", tmp_path)
    expected = net.model.norm.weight.detach().numpy() * 32**-0.5
    np.testing.assert_allclose(tensors["dec.output_norm.weight"], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_the_state_that_stands_for_a_text_is_named(kind, tmp_path):
    tokenizer, settings = FAMILIES[kind]
    net = network(dict(model_type=kind) | settings)
    net.task = "embed"
    numbers = {"mean": 1, "first": 2, "last": 3}  # llama.cpp's
    for net.pooling, number in numbers.items():
        write_gguf(net, named_tokenizer(tokenizer), tmp_path / "m.gguf", "F32")
        keys, _ = contents(tmp_path / "m.gguf")
        assert keys[f"{kind}.pooling_type"] == number


def test_a_weight_too_large_for_a_type_is_a_line():
    wide = torch.zeros(1, 256)
    wide[0, 3] = 1e5
    for name in ("F16", "Q8_0", "Q4_0", "Q5_1", *K_QUANTS):
        with pytest.raises(UserError, match=f"beyond float16 .{name}.: --gguf_type=F32"):
            as_array(gguf, wide, name)
        assert as_array(gguf, wide / 2, name).size
    assert as_array(gguf, wide, "F32")[0, 3] == 1e5


def test_any_dtype_is_written_as_its_own_values(tmp_path):
    """Without a float32 copy of the whole network."""
    net, tok, _, _ = written("llama", tmp_path)
    net.bfloat16()
    write_gguf(net, tok, tmp_path / "half.gguf", "F32")
    _, tensors = contents(tmp_path / "half.gguf")
    down = net.model.layers[1].mlp.down_proj.weight
    assert down.dtype == torch.bfloat16
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], down.detach().float().numpy())


# --------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("name", PATTERNS)
def test_a_split_pattern_is_found_by_its_name(name):
    tokenizers = pytest.importorskip("tokenizers")
    tok = with_pattern(name)
    vocab = llama_vocab(tok, tok.n_vocab)
    assert vocab.pre == name
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tok.spec))
    for text in trial_texts(tok):
        assert llama_ids(vocab, text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "name, form",
    [
        ("smollm2", "gpt2 smollm"),
        ("gpt2", "gpt2 gpt-2"),
        ("llama3", "gpt2 llama-bpe"),
        ("qwen3", "gpt2 qwen2"),
        ("llama2", "llama default"),
        ("mistral", "llama default"),
        ("unigram", "t5 default"),
        ("wordpiece", "bert default"),
    ],
)
def test_published_tokenizers_have_their_form(name, form):
    tok = named_tokenizer(name)
    vocab = llama_vocab(tok, tok.n_vocab + 5)
    assert f"{vocab.model} {vocab.pre}" == form
    assert vocab.tokens[-1] == f"[PAD{tok.n_vocab + 4}]" and vocab.types[-1] == "UNUSED"
    for text in trial_texts(tok):
        assert llama_ids(vocab, text) == tok.encode(text)


def test_llama_2_has_scores_bytes_and_a_blank_before(tmp_path):
    _, tok, keys, _ = written("mixtral", tmp_path)
    get = lambda name: keys[f"tokenizer.ggml.{name}"]
    body = tok.spec["model"]
    assert get("model") == "llama" and get("add_space_prefix") is True
    assert get("add_bos_token") is True and get("bos_token_id") == tok.bos_id
    scores, types = get("scores"), get("token_type")
    firsts = []  # the token that each merge makes, in their order
    for merge in body["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        firsts.append(body["vocab"][left + right])
    falling = [scores[id] for id in dict.fromkeys(firsts)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == len(falling)
    assert types[body["vocab"]["<0x0A>"]] == int(gguf.TokenType.BYTE)
    assert types[body["vocab"]["<unk>"]] == int(gguf.TokenType.UNKNOWN)
    assert types[body["vocab"]["</s>"]] == int(gguf.TokenType.CONTROL)


def changed(tok, **parts):
    return Tokenizer(tok.spec | parts, tok.config)


def test_what_llama_cpp_reads_otherwise_is_refused_with_the_reason():
    bpe = bpe_tokenizer([(b"i", b"n"), (b" ", b"x")])
    steps = json.loads(json.dumps(bpe.spec["pre_tokenizer"]))
    steps["pretokenizers"][0] = split_step(r"[a-m]+|[^a-m]+")
    lower = changed(bpe, normalizer={"type": "Lowercase"})
    cases = [
        (changed(bpe, pre_tokenizer=steps), "no such split pattern: the nearest of its own"),
        (lower, "no normalizer Lowercase"),
        (char_tokenizer("abc \n"), "no WordLevel tokenizer"),
    ]
    with pytest.raises(UserError, match="the tokenizer has 262 ids, the model 100"):
        llama_vocab(bpe, 100)
    for tok, words in cases:
        with pytest.raises(UserError, match=words) as error:
            llama_vocab(tok, tok.n_vocab)
        assert "retrain" not in str(error.value) and "--export=hf" in str(error.value)


def test_wordpiece_of_prepare_and_of_cased_bert():
    tok = wordpiece_tokenizer(["the", "fox", "##es", "a", "##a", "b", ","])
    vocab = llama_vocab(tok, tok.n_vocab)
    assert (vocab.model, vocab.lowercase) == ("bert", False)
    assert llama_ids(vocab, "the foxes, a") == tok.encode("the foxes, a")
    spec = json.loads(json.dumps(named_tokenizer("wordpiece").spec))
    spec["normalizer"]["lowercase"] = False
    cased = Tokenizer(spec, named_tokenizer("wordpiece").config)
    vocab = llama_vocab(cased, cased.n_vocab)
    assert (vocab.lowercase, vocab.strip_accents) == (False, False)


def test_unigram_as_todays_files_have_it():
    """Blanks in a row become one by the normalizer, and the last one stays."""
    base = named_tokenizer("unigram")
    blanks = dict(type="Replace", pattern={"Regex": " {2,}"}, content="\u2581")
    steps = {"type": "Sequence", "normalizers": [base.spec["normalizer"], blanks]}
    tok = changed(base, normalizer=steps, pre_tokenizer=base.spec["decoder"])
    vocab = llama_vocab(tok, tok.n_vocab)
    assert vocab.one_space and vocab.notes and "end of a text" in vocab.notes[0]
    text = "the  quick   brown fox"
    assert llama_ids(vocab, text) == tok.encode(text)
    assert llama_ids(vocab, f"{text} ") == tok.encode(f"{text} ")[:-1]


def test_several_ends_and_templates(tmp_path):
    tok = named_tokenizer("llama3")
    tok.eos_ids = [333, 331, 332]
    templates = [dict(name="default", template="{{ a }}"), dict(name="tool_use", template="b")]
    tok.config["chat_template"] = templates
    write_gguf(network(dict(model_type="llama") | GROUPED), tok, tmp_path / "m.gguf", "F32")
    keys, _ = contents(tmp_path / "m.gguf")
    ids = [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ids == tok.eos_ids
    config = network(dict(model_type="llama") | GROUPED).config
    assert not any("end an answer" in note for note in check_gguf(config, tok).notes)
    tok.eos_ids = [333, 331, 332, 330]
    assert "three tokens that end an answer, not 4" in str(check_gguf(config, tok).notes)
    assert keys["tokenizer.chat_template"] == "{{ a }}"
    assert keys["tokenizer.chat_template.tool_use"] == "b"


# --------------------------------------------------------------------------------------------------
# K-quants


def naive_line(x, top, lowest, n_tries):
    """make_qkx2_quants of llama.cpp for one group, number by number: (scale, minimum)."""
    weights = [float(np.sqrt((x * x).mean()) + abs(v)) for v in x]
    low, high = min(0.0, float(x.min())), float(x.max())
    if low == high:
        return 0.0, -low
    scale = (high - low) / top

    def codes_of(factor):
        return [min(top, max(0, round(factor * (float(v) - low)))) for v in x]

    def error_of(scale, low, codes):
        return sum(w * (scale * c + low - float(v)) ** 2 for w, c, v in zip(weights, codes, x))

    best = error_of(scale, low, codes_of(1 / scale))
    for i in range(n_tries):
        codes = codes_of((lowest + 0.1 * i + top) / (high - low))
        fit = np.array([[c, 1.0] for c in codes]) * np.sqrt(weights)[:, None]
        if np.linalg.matrix_rank(fit) < 2:
            continue
        (new_scale, new_low), *_ = np.linalg.lstsq(fit, x * np.sqrt(weights), rcond=None)
        if new_low > 0:
            new_low = 0.0
            new_scale = sum(w * c * float(v) for w, c, v in zip(weights, codes, x))
            new_scale /= sum(w * c * c for w, c in zip(weights, codes))
        error = error_of(new_scale, new_low, codes)
        if error < best:
            best, scale, low = error, new_scale, new_low
    return scale, -low


@pytest.mark.parametrize(
    "name, top, lowest, n_tries", [("Q4_K", 15, -1, 21), ("Q5_K", 31, -0.5, 16)]
)
def test_lines_are_those_of_a_naive_search(name, top, lowest, n_tries):
    x = np.random.default_rng(1).standard_t(4, (2, 256)).astype(np.float32)
    back = gguf.quants.dequantize(quantize(x, name), gguf.GGMLQuantizationType[name])
    for block, ours in zip(x, back):
        lines = [naive_line(group, top, lowest, n_tries) for group in block.reshape(8, 32)]
        steps = []  # scales and minima are rounded to 6 bits of the block's largest
        for numbers in zip(*lines):
            step = max(numbers) / 63
            steps.append([float(np.float16(step)) * round(n / step) for n in numbers])
        expected = []
        for group, scale, low in zip(block.reshape(8, 32), *steps):
            codes = np.rint((group + low) / scale).clip(0, top)
            expected.append(scale * codes - low)
        expected = np.concatenate(expected)
        np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(block).max())


@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quants_err_as_little_as_their_bits_allow(name):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(8, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    codes = quantize(x, name)
    assert codes.shape == gguf.quant_shape_to_byte_shape(x.shape, kind) and codes.dtype == np.uint8
    error = np.sqrt(((gguf.quants.dequantize(codes, kind) - x) ** 2).mean())
    # llama.cpp's own quantizer has 0.0715, 0.0362 and 0.0178 of normal weights.
    assert error < {"Q4_K": 0.073, "Q5_K": 0.037, "Q6_K": 0.0182}[name]
    for special in (np.zeros((1, 256)), np.full((1, 256), 0.5), np.full((1, 256), -3.0)):
        values = special.astype(np.float32)
        back = gguf.quants.dequantize(quantize(values, name), kind)
        np.testing.assert_allclose(back, values, atol=0.02)
    stack = draw.normal(size=(3, 2, 256)).astype(np.float32)  # experts
    assert np.array_equal(quantize(stack, name)[2], quantize(stack[2], name))


def test_mixtures_give_more_bits_where_llama_cpp_does():
    c = GPTConfig(vocab_size=64, n_ctx=16, n_layer=8, n_head=2, n_embd=512, tie=False)
    kinds = [tensor_type(f"blk.{i}.ffn_down.weight", (512, 512), "Q4_K_M", c) for i in range(8)]
    assert [i for i, kind in enumerate(kinds) if kind == "Q6_K"] == [0, 3, 6, 7]
    assert set(kinds) == {"Q4_K", "Q6_K"}
    cases = {
        ("output.weight", (64, 512)): "Q6_K",
        ("token_embd.weight", (64, 512)): "Q4_K",
        ("blk.1.attn_v.weight", (64, 512)): "Q4_K",
        ("blk.3.attn_v.weight", (64, 512)): "Q6_K",
        ("blk.1.attn_qkv.weight", (64, 512)): "Q5_K",
        ("blk.1.attn_q.weight", (64, 352)): "Q5_0",  # 256 does not divide it
        ("blk.3.attn_v.weight", (64, 352)): "Q8_0",
        ("blk.1.attn_q.weight", (64, 40)): "F16",
        ("blk.1.ffn_gate_inp.weight", (4, 512)): "F32",
        ("blk.1.attn_norm.weight", (512,)): "F32",
    }
    for (name, shape), wanted in cases.items():
        assert tensor_type(name, shape, "Q4_K_M", c) == wanted, name


@pytest.mark.parametrize("gguf_type", FILE_TYPES)
def test_every_type_is_read_back_near_its_weights(gguf_type, tmp_path):
    net, _, keys, tensors = written("qwen2", tmp_path, gguf_type, intermediate_size=256)
    assert keys["general.file_type"] == FILE_TYPES[gguf_type]
    down = net.model.layers[1].mlp.down_proj.weight.detach().numpy()
    error = np.sqrt(((tensors["blk.1.ffn_down.weight"] - down) ** 2).mean() / (down**2).mean())
    assert error < {"F32": 1e-9, "F16": 1e-3, "Q8_0": 0.01, "Q6_K": 0.025}.get(gguf_type, 0.12)


def test_the_command_names_the_types_and_leaves_one_file(tmp_path):
    tok = named_tokenizer("smollm2")
    save(tmp_path / "m", network(dict(model_type="llama") | GROUPED), tok)
    failed = run(
        tmp_path, "export.py", "--model=m", "--export=gguf", "--gguf_type=Q4_K", check=False
    )
    assert failed.returncode == 1 and ", ".join(FILE_TYPES) in failed.stderr
    done = run(tmp_path, "export.py", "--model=m", "--export=gguf", "--gguf_type=Q4_K_M")
    assert [p.name for p in (tmp_path / "m-gguf").glob("*.gguf")] == ["m-Q4_K_M.gguf"]
    assert "tensors" in done.stdout
    net, _ = load(tmp_path / "m", torch.device("cpu"), torch.float32)
    _, tensors = contents(tmp_path / "m-gguf" / "m-Q4_K_M.gguf")
    assert as_array(gguf, net.lm_head.weight, "Q8_0").shape == (448, 34)
    assert tensors["output.weight"].shape == net.lm_head.weight.shape
