"""Encoder-decoders in use: sources and targets as rows, how they learn, how they generate, how an
answer is compared with the one that was wanted."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import run

import finetune
import model
from barelm.bpe import char_tokenizer
from barelm.checkpoint import load, save
from barelm.clean import Reject
from barelm.dedup import digest
from barelm.examples import micro_batches, n_tokens
from barelm.number_words import draw_numbers, in_english, in_german
from barelm.optim import make_optimizer
from barelm.run import Schedule
from barelm.similarity import chrf, chrf_counts, common_subsequence, rouge_l
from barelm.sources import cut_into_units
from barelm.tasksets import Reading, as_seq2seq, convert_unit, translation_of
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate

# --------------------------------------------------------------------------------------------------
# Scores of a text beside the one that was wanted


def test_rouge_l_by_hand():
    # Lin 2004, section 3.1: police, killed, the, gunman in common order of 4 words each.
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    # 2 of 3 words against 2 of 5: F1 of 2/3 and 2/5.
    assert rouge_l("The CAT, sat!", "a cat quietly sat down") == pytest.approx(1 / 2)
    assert rouge_l("", reference) == rouge_l("so", "") == rouge_l("für", "") == 0


def test_the_longest_common_subsequence_is_the_longest():
    """Beside all subsequences of one of the lists."""
    rng = random.Random(0)
    for _ in range(50):
        a = rng.choices("abc", k=rng.randrange(8))
        b = rng.choices("abc", k=rng.randrange(8))
        best = 0
        for chosen in range(2 ** len(a)):
            wanted = [letter for i, letter in enumerate(a) if chosen >> i & 1]
            rest = iter(b)
            if all(letter in rest for letter in wanted):
                best = max(best, len(wanted))
        assert common_subsequence(a, b) == best


def test_chrf_by_hand():
    # "ab c" and "abd": one run of 3 a side, runs in common: a, b; ab; none.
    precision = recall = (2 / 3 + 1 / 2 + 0) / 3
    assert chrf(chrf_counts("ab c", "abd")) == pytest.approx(precision)
    # Of "ab" and "abab" recall, which counts more: 2/4, 1/3; precision 1, 1.
    precision, recall = 1, (2 / 4 + 1 / 3) / 2
    expected = 5 * precision * recall / (4 * precision + recall)
    assert chrf(chrf_counts("ab", "abab")) == pytest.approx(expected)
    assert chrf(chrf_counts("", "abd")) == chrf(chrf_counts("x", "abd")) == 0
    assert chrf(chrf_counts("the same ones", "the same\nones")) == pytest.approx(1)


def random_pairs(n):
    rng = random.Random(1)
    vocab = [*"the a cat Cat sat_on mat. Größe x1 'don't' é -- 日本".split(), "İ", "\n", "ſ"]
    for _ in range(n):
        yield [" ".join(rng.choices(vocab, k=rng.randrange(9))) for _ in range(2)]


def test_rouge_l_is_rouge_scores():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for text, reference in random_pairs(300):
        expected = scorer.score(reference, text)["rougeL"].fmeasure
        assert rouge_l(text, reference) == pytest.approx(expected), (text, reference)


def test_chrf_is_sacrebleus():
    metric = pytest.importorskip("sacrebleu.metrics").CHRF()
    pairs = list(random_pairs(300))
    for text, reference in pairs:
        expected = metric.sentence_score(text, [reference]).score / 100
        assert chrf(chrf_counts(text, reference)) == pytest.approx(expected), (text, reference)
    texts, references = zip(*pairs)
    counts = np.sum([chrf_counts(text, reference) for text, reference in pairs], 0)
    expected = metric.corpus_score(texts, [references]).score / 100
    assert chrf(counts.tolist()) == pytest.approx(expected)


# What sacrebleu 2.6 and rouge_score 0.1.2 give, for machines without them: text, reference, both.
GIVEN = [
    ("a cat sat", "the cat sat", 2 / 3, 0.5360977),
    ("Returns the value of x.", "Return the value for x, or None.", 0.5, 0.4247746),
    ("dreihunderteins", "einhundertdrei", 0.0, 0.5721645),
]


@pytest.mark.parametrize("text, reference, rouge, character", GIVEN)
def test_scores_that_others_gave(text, reference, rouge, character):
    assert rouge_l(text, reference) == pytest.approx(rouge, abs=1e-6)
    assert chrf(chrf_counts(text, reference)) == pytest.approx(character, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# The toy translation, and the original schedule


@pytest.mark.parametrize(
    "number, english, german",
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (16, "sixteen", "sechzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (101, "one hundred and one", "einhunderteins"),
        (1001, "one thousand and one", "eintausendeins"),
        (101_030, "one hundred and one thousand and thirty", "einhunderteintausenddreißig"),
        (
            777_345,
            "seven hundred and seventy-seven thousand three hundred and forty-five",
            "siebenhundertsiebenundsiebzigtausenddreihundertfünfundvierzig",
        ),
    ],
)
def test_numbers_in_words(number, english, german):
    assert (in_english(number), in_german(number)) == (english, german)


def test_the_numbers_are_different_and_always_the_same():
    numbers = draw_numbers(2000, seed=0)
    assert len(set(numbers)) == 2000 and numbers == draw_numbers(2000, seed=0)
    assert len({in_german(n) for n in numbers}) == len({in_english(n) for n in numbers}) == 2000


def test_rows_of_the_hub_and_the_split_of_a_records_text(tmp_path):
    translation = {"id": "0", "translation": {"en": "a cat", "fr": "un chat"}}
    assert as_seq2seq(translation) == {"source": "a cat", "target": "un chat"}
    assert as_seq2seq({"dialogue": "A: hi", "summary": "They talk."})["target"] == "They talk."
    given = translation_of(translation, ["fr", "en"])
    assert given == {"source": "un chat", "target": "a cat"}
    assert translation_of({"de": "Katze", "en": "cat"}, ["de", "en"])["source"] == "Katze"
    for record in ({"translation": {"en": "a cat"}}, {"translation": "none"}, {"de": "Katze"}):
        with pytest.raises(Reject):
            translation_of(record, ["en", "de"])
    with pytest.raises(Reject):
        as_seq2seq({"translation": {"en": "a cat"}})
    # Row and document of a number are in the same split: no shard holds what validation asks.
    path = tmp_path / "numbers.jsonl"
    records = []
    for number in range(100):
        source, target = in_english(number), in_german(number)
        records.append({"text": f"{source} = {target}", "source": source, "target": target})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    [unit] = cut_into_units("all", [path], None, None, None, False)
    reading = Reading("text", None, False, 0, by_text=True)
    rows, _, _ = convert_unit(["seq2seq"], reading, unit)["seq2seq"]
    for record, (row, split_by) in zip(records, rows.items()):
        assert json.loads(row) == {"source": record["source"], "target": record["target"]}
        assert split_by == digest(record["text"].encode())


def test_the_schedule_of_vaswani_et_al():
    """Equation 3, over its own peak."""
    warmup, width = 40, 64
    schedule = Schedule("inverse_sqrt", warmup_steps=warmup)
    peak = width**-0.5 * warmup**-0.5
    for step in range(200):
        n = step + 1  # the paper counts from 1
        expected = width**-0.5 * min(n**-0.5, n * warmup**-1.5)
        assert peak * schedule.scale(step, step / 200, 0.2) == pytest.approx(expected)
    assert Schedule("inverse_sqrt").scale(8, 0.5) == pytest.approx(1 / 3)


# --------------------------------------------------------------------------------------------------
# The network: all is initialised, all is learned

VASWANI = dict(n_head=4, n_embd=32, n_hidden=48, norm="layer", norm_place="post", bias=True)
VASWANI |= dict(qk_norm=False, pos="sinusoidal", mlp="relu", embed_scale=True)
T5 = dict(n_head=4, n_embd=32, n_hidden=48, qk_norm=False, pos="relative", scale_scores=False)
T5 |= dict(mlp="relu", tie=False)
ROTARY = dict(n_head=4, n_kv_head=1, n_embd=32)  # the default network beside an encoder
SHAPES = {"vaswani": VASWANI, "t5": T5, "rotary": ROTARY}


@pytest.fixture(scope="module")
def tok():
    return char_tokenizer("abcdefghijklmnopqrstuvwxyz ")


def make_net(tok, seed=0, **shape):
    """A small encoder-decoder whose answers depend on the source."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(tok.n_vocab, n_ctx=32, n_layer=2, n_encoder_layer=2, **shape))
    for p in net.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
    net.start_id = net.pad_id = tok.pad_id
    return net.eval()


@pytest.mark.parametrize("init", ["scaled", "xavier", "he"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_is_initialised_as_the_paper_says(name, init):
    torch.manual_seed(0)
    shape = SHAPES[name] | dict(n_embd=64, init=init)
    net = GPT(GPTConfig(320, 32, n_layer=2, n_encoder_layer=3, **shape))
    for part, p in net.named_parameters():
        if part.endswith(".bias"):
            assert (p == 0).all(), part
            continue
        if p.ndim == 1:  # of a norm
            assert (p == 1).all(), part
            continue
        fan_out, fan_in = p.shape
        expected = 0.02
        if "proj" in part and init == "xavier":  # Glorot and Bengio 2010, equation 16
            expected = math.sqrt(2 / (fan_in + fan_out))
            assert p.abs().max() <= math.sqrt(6 / (fan_in + fan_out)), part
        elif "proj" in part and init == "he":  # He et al. 2015, equation 10
            expected = math.sqrt(2 / fan_in)
        elif "o_proj" in part or "down_proj" in part:
            expected = 0.02 / math.sqrt(2 * 2)
        assert p.std().item() == pytest.approx(expected, rel=0.15), part
        assert abs(p.mean().item()) < 0.15 * expected, part


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_in_one_optimizer_and_learns(optimizer, tok):
    net = make_net(tok, **T5).train()
    optimizers = make_optimizer(net, optimizer, lr=1e-2)
    params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, params)) == sorted(map(id, net.parameters()))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    loss, _ = finetune.seq2seq_loss(net, examples_of(tok, *PAIRS))
    loss.backward()
    for o in optimizers:
        o.step()
    for name, p in net.named_parameters():
        assert p.grad.abs().max() > 0 and not p.equal(before[name]), name


# --------------------------------------------------------------------------------------------------
# Examples and their loss

PAIRS = [("abc", "cba"), ("a longer source", "no"), ("x", "a longer target"), ("he said", "so")]


def examples_of(tok, *pairs, limit=32):
    rows = [{"source": source, "target": target} for source, target in pairs]
    return [finetune.read_seq2seq(row, tok, limit) for row in rows]


def test_an_example_is_a_source_and_what_ends_its_target(tok, monkeypatch):
    [e] = examples_of(tok, ("abc", "cba"))
    assert e == {"source": tok.encode("abc") + tok.eos_ids, "cut": False} | {
        "targets": tok.encode("cba") + tok.eos_ids
    }
    # What is too long is cut, but a source keeps its end, as it always has one.
    [e] = examples_of(tok, ("abcdefgh", "hgfedcba"), limit=4)
    assert e["source"] == tok.encode("abc") + tok.eos_ids and e["cut"]
    assert e["targets"] == tok.encode("hgfe")
    monkeypatch.setattr(finetune, "source_template", "turn: {source}")
    [e] = examples_of(tok, ("a{b}c", "x"))
    assert tok.decode(e["source"][:-1]) == tok.decode(tok.encode("turn: a{b}c"))


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_of_a_batch_is_that_of_its_pairs_alone(name, tok, monkeypatch):
    net = make_net(tok, **SHAPES[name])
    examples = examples_of(tok, *PAIRS)
    expected = 0
    for e in examples:
        ids = torch.tensor([[net.start_id, *e["targets"][:-1]]])
        logits = net(ids, encoder_ids=torch.tensor([e["source"]]))[0]  # (T, V)
        expected -= logits.log_softmax(-1).gather(1, torch.tensor(e["targets"])[:, None]).sum()
    loss, _ = finetune.seq2seq_loss(net, examples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    # A pad token within a source is a token as any other: its length is given.
    padded = copy.deepcopy(examples[:1])
    padded[0]["source"] += [tok.pad_id, tok.pad_id]
    assert not finetune.seq2seq_loss(net, padded)[0].isclose(
        finetune.seq2seq_loss(net, examples[:1])[0]
    )


def test_label_smoothing_is_the_papers_and_of_training_alone(tok, monkeypatch):
    net = make_net(tok, **VASWANI)
    examples = examples_of(tok, *PAIRS)
    plain = finetune.seq2seq_loss(net, examples)[0]
    expected = 0
    for e in examples:
        ids = torch.tensor([[net.start_id, *e["targets"][:-1]]])
        logp = net(ids, encoder_ids=torch.tensor([e["source"]]))[0].log_softmax(-1)
        for row, target in zip(logp, e["targets"]):
            wanted = torch.full_like(row, 0.1 / len(row))  # u(k) of Szegedy et al. 2016, section 7
            wanted[target] += 0.9
            expected -= (wanted * row).sum()
    monkeypatch.setattr(finetune, "label_smoothing", 0.1)
    assert finetune.seq2seq_loss(net, examples)[0].equal(plain)
    smoothed, _ = finetune.seq2seq_loss(net.train(), examples)  # no dropout in this one
    torch.testing.assert_close(smoothed, expected, rtol=1e-5, atol=1e-4)
    assert finetune.METHODS["seq2seq"].n_logits(examples) == sum(
        len(e["targets"]) for e in examples
    )


def test_micro_batches_of_pairs_hold_what_they_may_padded(tok):
    rng = random.Random(0)
    words = lambda: "".join(rng.choices("abc ", k=rng.randint(1, 30)))
    examples = examples_of(tok, *[(words(), words()) for _ in range(60)])
    net = make_net(tok, **ROTARY)
    groups = list(micro_batches(sorted(examples, key=n_tokens), 200, net))
    assert sum(map(len, groups)) == 60 and 5 < len(groups) < 60
    for group in groups:
        width = max(len(e["source"]) for e in group) + max(len(e["targets"]) for e in group)
        assert len(group) * width <= 200


# --------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def greedy_ids(net, tok, source, limit):
    """Without a cache, and each source alone."""
    ids = []
    while len(ids) < limit and not (ids and ids[-1] in tok.eos_ids):
        given = torch.tensor([[net.start_id, *ids]])
        logits = net(given, encoder_ids=torch.tensor([source]))[0, -1]
        ids.append(logits[: tok.n_vocab].argmax().item())
    return ids


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_generation_with_a_cache_is_generation_without(name, fast, tok):
    net = make_net(tok, **SHAPES[name])
    net.fast = fast
    texts = ["abc", "a longer source, this", "x", "abcabc"]
    sources = [tok.source(text) for text in texts]
    expected = [greedy_ids(net, tok, source, 12) for source in sources]
    found = generate(net, tok, texts, max_new_tokens=12, temperature=0)
    assert [g.ids for g in found] == expected
    assert len({tuple(ids) for ids in expected}) > 1  # the source makes a difference
    found = generate(net, tok, sources, max_new_tokens=12, temperature=0)
    assert [g.ids for g in found] == expected
    # Draws depend on the row's number, whatever is beside it.
    drawn = generate(net, tok, texts, max_new_tokens=8, seed=3)
    [alone] = generate(net, tok, texts[1:2], max_new_tokens=8, seed=3, first=1)
    assert alone.ids == drawn[1].ids


def test_an_answer_fills_the_context_and_a_source_may(tok):
    net = make_net(tok, **ROTARY)
    no_end = copy.copy(tok)
    no_end.eos_ids = []
    [g] = generate(net, no_end, [[5] * 32], max_new_tokens=100, temperature=0)
    assert (len(g.ids), g.finish_reason) == (31, "length")
    with pytest.raises(model.UserError, match="a prompt of 33 tokens: expected 1 to 32"):
        generate(net, tok, [[5] * 33])


@pytest.fixture(scope="module")
def theirs(tok):
    """A small random T5 of transformers, and the same network as ours."""
    transformers = pytest.importorskip("transformers")
    net = make_net(tok, seed=1, **T5 | dict(tie=True, logit_scale=32**-0.5))
    with torch.no_grad():
        net.lm_head.weight *= 3
        net.lm_head.weight[[2, 3, 5, 7]] *= 2
    c = net.config
    config = transformers.T5Config(
        vocab_size=tok.n_vocab, d_model=c.n_embd, d_kv=c.head_dim, d_ff=c.n_hidden, num_layers=2,
        num_decoder_layers=2, num_heads=c.n_head, dropout_rate=0.0, feed_forward_proj="relu",
        tie_word_embeddings=False, pad_token_id=tok.pad_id, decoder_start_token_id=net.start_id,
        relative_attention_num_buckets=c.n_buckets, layer_norm_epsilon=c.norm_eps,
        relative_attention_max_distance=c.max_distance, eos_token_id=tok.eos_ids[0],
    )  # fmt: skip
    config.scale_decoder_outputs = config.tie_word_embeddings = True  # as T5 1.0
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    state = net.state_dict()
    tensors = {}
    for name in t5.state_dict():
        tensors[name] = state[our_name(name)]
    t5.load_state_dict(tensors)
    return net, t5


def our_name(name):
    """Our name of a tensor of T5."""
    if name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        return "model.embed_tokens.weight"
    if name == "lm_head.weight":
        return name
    part, _, rest = name.partition(".")
    prefix = "model.encoder." if part == "encoder" else "model."
    if rest == "final_layer_norm.weight":
        return f"{prefix}norm.weight"
    _, layer, _, number, *kind = rest.split(".")
    if "relative_attention_bias" in kind:
        return f"{prefix}relative_bias.weight"
    mlp_number = "1" if part == "encoder" else "2"
    if kind[0] == "layer_norm":
        norms = {
            "0": "input_layernorm",
            "1": "cross_layernorm",
            mlp_number: "post_attention_layernorm",
        }
        return f"{prefix}layers.{layer}.{norms[number]}.weight"
    if number == mlp_number:
        kinds = {"wi": "up_proj", "wo": "down_proj"}
        return f"{prefix}layers.{layer}.mlp.{kinds[kind[1]]}.weight"
    block = "self_attn" if number == "0" else "cross_attn"
    return f"{prefix}layers.{layer}.{block}.{kind[1]}_proj.weight"


def test_logits_and_loss_are_transformers(theirs, tok):
    net, t5 = theirs
    examples = examples_of(tok, *PAIRS)
    for e in examples:
        source = torch.tensor([e["source"]])
        with torch.no_grad():
            out = t5(input_ids=source, labels=torch.tensor([e["targets"]]))
            loss, _ = finetune.seq2seq_loss(net, [e])
        assert loss.item() / len(e["targets"]) == pytest.approx(out.loss.item(), rel=1e-5)


def test_greedy_answers_and_beams_are_transformers(theirs, tok):
    net, t5 = theirs
    draw = random.Random(0)
    how = dict(do_sample=False, early_stopping=True, length_penalty=1.0)
    n_ended = 0
    for i in range(16):
        source = draw.choices(range(tok.n_vocab - 4), k=draw.randint(1, 12))
        ids = torch.tensor([source])
        width = draw.choice([1, 2, 3, 4])
        penalty = draw.choice([1.0, 1.3]) if width == 1 else 1.0
        limit = draw.choice([1, 3, 8, 18])
        tok = copy.copy(tok)
        tok.eos_ids = [[2], [2, 5], [7]][i % 3]
        options = how | dict(max_new_tokens=limit, num_beams=width, eos_token_id=tok.eos_ids)
        [out] = t5.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=penalty,
                            **options).tolist()  # fmt: skip
        [g] = generate(net, tok, [source], max_new_tokens=limit, num_beams=width, temperature=0,
                       repetition_penalty=penalty)  # fmt: skip
        assert out[1 : 1 + len(g.ids)] == g.ids, (i, width)
        assert len(out) == 1 + len(g.ids)
        n_ended += g.finish_reason == "stop"
    assert 0 < n_ended < 16


# --------------------------------------------------------------------------------------------------
# The commands

QUICK = ["--method=seq2seq", "--model=out/pairs", "--dataset=tiny", "--max_steps=4"]
QUICK += ["--batch_size=4", "--eval_examples=8", "--eval_every=4", "--check_memorized=2"]
QUICK += ["--warmup_steps=0", "--dtype=float32", "--learning_rate=1e-2"]


@pytest.fixture(scope="module")
def pairs(tiny):
    """The folder of `tiny`, with an encoder-decoder in out/pairs."""
    tok = Tokenizer.from_folder(tiny / "data/tiny")
    shape = ROTARY | dict(n_ctx=48, init="xavier")
    torch.manual_seed(0)
    net = GPT(GPTConfig(-(-tok.n_vocab // 64) * 64, n_layer=2, n_encoder_layer=2, **shape))
    net.start_id = net.pad_id = tok.pad_id
    save(tiny / "out/pairs", net, tok)
    return tiny


def log(folder, out):
    return [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]


CROSS = ["--adapt=lora", "--lora_targets=cross_attn.q_proj,cross_attn.v_proj"]
ADAPTS = {
    "full": ["--dropout=0.1", "--label_smoothing=0.1", "--layer_decay=0.8", "--beta2=0.98"],
    "lora": [*CROSS, "--lora_dropout=0.1"],
    "qlora": ["--adapt=qlora"],
    "adapter": ["--adapt=adapter"],
    "prompt": ["--adapt=prompt", "--prompt_tokens=3", "--learning_rate=0.1"],
    "last": ["--train_last=1", "--lr_schedule=inverse_sqrt"],
}


@pytest.mark.parametrize("name", ADAPTS)
def test_every_adapt_learns_and_its_folder_answers(name, pairs):
    out = f"out/pairs_{name}"
    done = run(pairs, "finetune.py", *QUICK, *ADAPTS[name], f"--out_dir={out}")
    rows = log(pairs, out)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert "memory: about" in done.stdout and "come back word for word" in done.stdout
    net, tok = load(pairs / out)
    base, _ = load(pairs / "out/pairs")
    assert (net.start_id, net.pad_id) == (tok.pad_id, tok.pad_id)
    if name == "lora":
        changed = [n for n, p in net.named_parameters() if not p.equal(base.get_parameter(n))]
        assert len(changed) == 4 and all(".cross_attn." in n for n in changed)
    if name == "prompt":  # three tokens before each source, whose rows alone are others
        prompts = [tok.special[f"<|prompt_{i}|>"] for i in range(3)]
        assert tok.source("x") == [*prompts, *tok.encode("x"), *tok.eos_ids]
        table = net.model.embed_tokens.weight
        before = base.model.embed_tokens.weight
        n = min(prompts)
        assert table[:n].equal(before[:n]) and not table[prompts].equal(before[:3])
    # eval.py of the folder finds the loss that training saw last.
    run(pairs, "eval.py", f"--model={out}", "--tasks=seq2seq", "--dataset=tiny", "--limit=8",
        "--max_new_tokens=6", f"--out_dir={out}_scores")  # fmt: skip
    scores = json.loads((pairs / f"{out}_scores/results.json").read_text())["results"]["seq2seq"]
    if name != "qlora":  # which opens on the full weights
        assert scores["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-4)
    assert {"perplexity", "exact_match", "rouge_l", "chrf", "chrf_stderr"} < scores.keys()
    if name == "prompt":
        library = pytest.importorskip("tokenizers").Tokenizer
        theirs = library.from_file(str(pairs / out / "tokenizer.json"))
        assert theirs.encode("x = 1").ids == tok.source("x = 1")


def test_a_resumed_run_is_a_run_that_was_never_stopped(pairs):
    args = [*QUICK, "--dropout=0.1", "--label_smoothing=0.1", "--lr_schedule=inverse_sqrt"]
    run(pairs, "finetune.py", *args, "--out_dir=out/whole", "--max_steps=6")
    run(pairs, "finetune.py", *args, "--out_dir=out/cut", "--max_steps=3")
    run(pairs, "finetune.py", *args, "--out_dir=out/cut", "--max_steps=6", "--init_from=resume")
    for name in ("model.safetensors", "config.json"):
        assert (pairs / "out/cut" / name).read_bytes() == (pairs / "out/whole" / name).read_bytes()


def test_two_processes_and_any_micro_batch_make_the_same_steps(pairs):
    run(pairs, "finetune.py", *QUICK, "--out_dir=out/by_one", "--micro_tokens=100000")
    run(pairs, "finetune.py", *QUICK, "--out_dir=out/by_two", "--micro_tokens=100", processes=2)
    for a, b in zip(log(pairs, "out/by_one"), log(pairs, "out/by_two"), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4)


def test_a_decoder_answers_the_same_rows(pairs):
    """Its loss is that of the assistant's turn in a conversation about the source."""
    ask = "--source_template=Document it: {source}"
    run(pairs, "eval.py", "--model=out/tiny", "--tasks=seq2seq", "--dataset=tiny", "--limit=12",
        ask, "--max_new_tokens=6", "--out_dir=out/decoder_scores", "--samples")  # fmt: skip
    net, tok = load(pairs / "out/tiny")
    lines = (pairs / "out/decoder_scores/samples_seq2seq.jsonl").read_text().splitlines()
    n_compared = 0
    for sample in map(json.loads, lines):
        talk = [{"role": "user", "content": f"Document it: {sample['source']}"}]
        ids, said = tok.chat([*talk, {"role": "assistant", "content": sample["target"]}])
        last = max(i for i, is_said in enumerate(said) if is_said)
        if last > net.config.n_ctx:  # it is cut
            continue
        n_compared += 1
        assert sum(said) == sample["tokens"]
        with torch.no_grad():
            logp = net(torch.tensor([ids[:last]]))[0].log_softmax(-1)
        nats = -sum(logp[i - 1, ids[i]].item() for i in range(1, last + 1) if said[i])
        assert sample["nats"] == pytest.approx(nats, rel=1e-4)
    assert len(lines) == 12 and n_compared


@pytest.mark.parametrize(
    "script, args, message",
    [
        ("finetune.py", ["--model=out/tiny"], "out/tiny is a decoder alone: --method=sft"),
        ("finetune.py", ["--method=sft"], "an encoder-decoder: expected --method=seq2seq"),
        ("finetune.py", ["--method=classify"], "an encoder-decoder: expected --method=seq2seq"),
        ("finetune.py", ["--source_template=x"], "source_template='x': expected {source} in it"),
        ("eval.py", ["--tasks=mine.jsonl"], "an encoder-decoder answers a source"),
        ("eval.py", ["--tasks=seq2sek"], "did you mean 'seq2seq'?"),
        ("prepare.py", ["--languages=en"], "languages=en: expected two fields, such as en,de"),
    ],
)
def test_bad_input_is_a_line(script, args, message, pairs):
    choice = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
    (pairs / "mine.jsonl").write_text(json.dumps(choice) + "\n")
    if script == "finetune.py":
        args = [*QUICK, "--out_dir=out/refused", *args]
    elif script == "eval.py":
        args = ["--model=out/pairs", *args]
    done = run(pairs, script, *args, check=False)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_numbers_are_prepared_as_shards_and_rows(tmp_path):
    args = ["--source=numbers", "--dataset=numbers", "--steps=exact", "--vocab_size=300"]
    run(tmp_path, "prepare.py", *args, "--max_documents=200", "--threads=1")
    rows = {}
    for split in ("train", "val"):
        path = tmp_path / f"data/numbers/seq2seq_{split}.jsonl"
        rows[split] = [json.loads(line) for line in path.read_text().splitlines()]
    counts = json.loads((tmp_path / "data/numbers/meta.json").read_text())
    for split, split_rows in rows.items():
        assert len(split_rows) == counts[split]["documents"] > 0
    texts = [{row["source"] for row in split_rows} for split_rows in rows.values()]
    assert not texts[0] & texts[1]
