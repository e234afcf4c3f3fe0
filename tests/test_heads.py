"""What is done with hidden states: tags of words, answers that stand in a text, vectors of texts;
each against a naive loop, a formula of its paper, or the library that it has to equal."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_finetune import QUICK, log, net_for, tok
from test_model import QWEN3, make_net

import finetune
from barelm import embeddings, extraction, heads, tagging
from barelm.checkpoint import load, save
from barelm.places import token_places
from barelm.python_names import entities_of
from barelm.run import Run, UserError, autocast
from barelm.tasksets import as_embed, as_span, as_tag

CPU = torch.device("cpu")
ENCODER = QWEN3 | {"causal": False, "n_ctx": 64}
assert tok  # the fixture

# --------------------------------------------------------------------------------------------------
# Tags

# (tags, their spans) as seqeval 1.2.2's get_entities has them, its ends one further
SPANS = [
    ("O B-a I-a O B-a", [("a", 1, 3), ("a", 4, 5)]),
    ("I-a I-a B-a I-b I-b O I-b", [("a", 0, 2), ("a", 2, 3), ("b", 3, 5), ("b", 6, 7)]),
    ("B-a B-a I-a", [("a", 0, 1), ("a", 1, 3)]),
    ("S-a B-b I-b E-b E-b I-b", [("a", 0, 1), ("b", 1, 4), ("b", 4, 5), ("b", 5, 6)]),
    ("", []),
]


def test_spans_of_tags():
    for tags, spans in SPANS:
        assert tagging.spans_of(tags.split()) == spans
        assert tagging.spans_of(tagging.bio_tags(spans, len(tags.split()))) == spans
    assert tagging.spans_of("U-a B-b L-b".split()) == [("a", 0, 1), ("b", 1, 3)]


def test_the_f1_of_spans_is_seqevals():
    rng = np.random.default_rng(0)
    names = ["O", "B-a", "I-a", "B-b", "I-b"]
    draw = lambda: [[names[i] for i in rng.integers(0, 5, 9)] for _ in range(40)]
    right, guessed = draw(), draw()
    counts = Counter()
    n_hits = n_right = n_guessed = 0
    for a, b in zip(right, guessed):
        tagging.count_spans(counts, a, b)
        spans = [set(tagging.spans_of(tags)) for tags in (a, b)]
        n_hits += len(spans[0] & spans[1])
        n_right += len(spans[0])
        n_guessed += len(spans[1])
    precision, recall, f1 = tagging.span_scores(counts)
    assert (precision, recall) == (n_hits / n_guessed, n_hits / n_right)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    figures = heads.tag_figures(counts, 0)
    assert figures["accuracy"] == pytest.approx(np.mean(np.array(right) == np.array(guessed)))
    metrics = pytest.importorskip("seqeval.metrics")
    assert f1 == pytest.approx(metrics.f1_score(right, guessed))
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(right, guessed))


def test_an_f1_by_hand():
    counts = Counter()
    # One of two spans is found whole; of another kind one is guessed that is not there.
    right, guessed = "B-a I-a O B-a O".split(), "B-a I-a O B-b I-b".split()
    tagging.count_spans(counts, right, guessed)
    assert tagging.span_scores(counts) == (0.5, 0.5, 0.5)
    assert tagging.span_scores(counts, "b") == (0.0, 0.0, 0.0)
    assert heads.tag_figures(counts, 5) == {"accuracy": 0.6, "f1": 0.5}


def test_rows_of_every_form_have_the_same_words_and_tags():
    tags = ["B-per", "I-per", "O", "B-loc"]
    tokens = ["Ada", "Lovelace", "in", "London"]
    names = ["O", "B-per", "I-per", "B-loc"]
    rows = [
        {"tokens": tokens, "tags": tags},
        {"tokens": tokens, "tags": ["I-per", "I-per", "O", "I-loc"]},  # IOB1
        {"tokens": tokens, "tags": ["B-per", "L-per", "O", "U-loc"]},  # BILOU
        {"tokens": tokens, "ner_tags": [1, 2, 0, 3], "tag_names": names},
        {
            "text": "Ada Lovelace in London",
            "entities": [
                {"start": 16, "end": 22, "label": "loc"},
                {"start": 0, "end": 12, "label": "per"},
            ],
        },
    ]
    for row in rows:
        text, words, found = tagging.words_of(row)
        assert [text[a:b] for a, b in words] == tokens and found == tags
    columns = as_tag({"text": "Ada NNP I-per\nLovelace NNP I-per\nin IN O\nLondon NNP I-loc\n"})
    assert columns == as_tag(rows[3]) == {"tokens": tokens, "tags": tags}
    with pytest.raises(UserError, match="need their names"):
        tagging.words_of({"tokens": tokens, "ner_tags": [1, 2, 0, 3]})


@pytest.mark.parametrize("tags", ["BO", [0, -1], [0], [0, 2]])
def test_tags_that_are_none_of_the_words_are_refused(tags):
    row = {"tokens": ["a", "b"], "tags": tags, "tag_names": ["O", "B-x"]}
    with pytest.raises((UserError, IndexError)):
        tagging.words_of(row)


def test_vectors_of_a_classifier_have_no_head(tok):
    net = net_for(tok)
    net.set_score(["a", "b"], pad_id=tok.pad_id)
    heads.add_embed_pooling("mean", net, tok, [{"texts": [[1], [2]]}], [], print)
    assert net.score is None and net.labels is None and net.task == "embed"
    assert not any(name.startswith("score") for name in net.state_dict())


@pytest.mark.parametrize(
    "method, causal, labels, message",
    [
        ("sft", False, None, "is an encoder, which sees"),
        ("seq2seq", False, None, "is an encoder, which sees"),
        ("dpo", True, ["a", "b"], "has a head for classify"),
    ],
)
def test_a_network_that_says_nothing_learns_no_answers(method, causal, labels, message, tok):
    net = net_for(tok, causal=causal)
    if labels:
        net.set_score(labels, pad_id=tok.pad_id)
    with pytest.raises(UserError, match=message):
        finetune.check_network(net, finetune.METHODS[method])


def test_a_word_is_asked_at_its_first_token(tok):
    text = "def frobnicate(self, other_thing=None):\n    return  self.x"
    places = token_places(tok, text)
    assert [id for id, _, _ in places] == tok.encode(text)
    assert "".join(text[a:b] for _, a, b in places) == text
    words = [(match.start(), match.end()) for match in tagging.WORD.finditer(text)]
    for (begin, end), first in zip(words, tagging.first_tokens(places, words)):
        inside = [i for i, (_, a, b) in enumerate(places) if a < end and begin < b]
        if first is None:  # its only token stands for more of another word
            assert len(inside) == 1
        else:
            assert first in inside[:2]
    ids, firsts, cut = tagging.tokenize_words(tok, text, words, 8)
    assert cut and len(ids) == 8 and None in firsts and max(filter(None, firsts)) < 8


def test_places_are_of_the_text_before_a_normalizer(tok):
    class Upper:
        def normal(self, text):
            return text.replace("ß", "ss").lower()

        def spans(self, text):
            return [(ord(letter), i, i + 1) for i, letter in enumerate(text)]

    class Tok:
        encoder = Upper()

    text = "Der Fuß A"
    places = token_places(Tok, text)
    assert [(a, b) for _, a, b in places[:4]] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert {(a, b) for _, a, b in places[4:8]} == {(4, 7)} and places[-1] == (ord("a"), 8, 9)


def test_the_loss_of_tags_is_of_first_tokens_alone(tok):
    rows = [
        {"text": "def f(x)", "entities": [{"start": 4, "end": 5, "label": "name"}]},
        {"tokens": ["print", "x"], "tags": ["B-name", "O"]},
    ]
    for more in ({}, {"causal": False}):
        net = net_for(tok, **more)
        examples = [tagging.read_tagged(row, tok, 64) for row in rows]
        heads.add_tag_head(net, tok, examples, [], print)
        assert net.labels == ["O", "B-name", "I-name"]
        expected = 0.0
        for e in examples:
            h = net.hidden(torch.tensor([e["ids"]]))[0]  # without padding
            if more:  # an encoder's head has a layer before the scores
                h = net.score_norm(F.gelu(h @ net.score_dense.weight.T))
            logp = (h @ net.score.weight.T + net.score.bias).log_softmax(-1)
            for first, tag in zip(e["firsts"], e["tags"]):
                if first is not None:
                    expected = expected - logp[first, net.labels.index(tag)]
        loss, figures = heads.tag_loss(net, examples)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert figures == {}
        _, counts = heads.tag_loss(net.eval(), examples)
        assert counts["words"] == sum(len(e["tags"]) for e in examples)


def test_names_in_python():
    code = """@wraps
async def frob(a, b: int = "x", *args, key=None):
    from os.path import join as j
    é = f"hi {a}" + 'z'
    return a.run(b, key=j(key)) + key(é)(args)"""
    found = [(e["label"], code[e["start"] : e["end"]]) for e in entities_of(code)]
    assert found[:3] == [("function", "frob"), ("parameter", "a"), ("parameter", "b")]
    strings = ("string", '"x"'), ("string", 'f"hi {a}"'), ("string", "'z'")
    others = ("import", "join"), ("call", "run"), ("call", "j"), ("call", "key")
    assert set(found) > {*strings, *others, ("parameter", "args"), ("parameter", "key")}
    assert found.count(("call", "key")) == 1 and found[-1] == ("parameter", "args")


# --------------------------------------------------------------------------------------------------
# Answers

CONTEXT = "The river Ouse flows through York. The Foss joins it there, south of the castle. " * 3
ROW = {"question": "Where?", "context": CONTEXT, "answers": {"text": ["York"]}}
ROW["answers"]["answer_start"] = [CONTEXT.index("York")]


def test_windows_hold_a_context_and_its_answer(tok):
    windows = extraction.make_windows(tok, "Where?", CONTEXT, 64)
    ids = tok.encode(CONTEXT)
    assert len(windows) > 2 and all(len(window.ids) <= 64 for window in windows)
    covered = set()
    for window in windows:
        n = len(window.places)
        part = window.ids[window.first : window.first + n]
        at = next(i for i in range(len(ids)) if i not in covered or i == 0)
        assert any(ids[i : i + n] == part for i in range(len(ids))) and at <= len(ids)
        covered |= {i for i in range(len(ids)) if ids[i : i + n] == part}
    assert (
        "".join(CONTEXT[a:b] for a, b in windows[0].places) == CONTEXT[: windows[0].places[-1][1]]
    )
    assert windows[-1].places[-1][1] == len(CONTEXT)
    for before, after in zip(windows, windows[1:]):  # nothing is left out, some stands in both
        assert after.places[0][0] < before.places[-1][1]
    e = extraction.read_answer(ROW, tok, 64)
    first, last = e["span"]
    assert "York" in tok.decode(e["ids"][first : last + 1])
    empty = extraction.read_answer(ROW | {"answers": {"text": [], "answer_start": []}}, tok, 64)
    assert empty["span"] == (0, 0)
    wrong = ROW | {"answers": {"text": ["York"], "answer_start": [3]}}
    with pytest.raises(UserError, match="does not stand where"):
        extraction.read_answer(wrong, tok, 64)


def test_the_likeliest_span_is_a_loops():
    torch.manual_seed(0)
    for n in (1, 5, 60):
        window = extraction.Window(list(range(n + 3)), 2, [(i, i + 1) for i in range(n)])
        scores = torch.randn(n + 3, 2)
        best = (-math.inf, 0, 0)
        for i in range(n):
            for j in range(i, min(n, i + extraction.LONGEST)):
                best = max(best, (float(scores[2 + i, 0] + scores[2 + j, 1]), i, j))
        score, first, last, lacking = extraction.best_span(window, scores)
        assert (first, last) == best[1:] and score == pytest.approx(best[0])
        assert lacking == pytest.approx(float(scores[0, 0] + scores[0, 1]))
    windows = [extraction.Window([], 0, [(0, 3), (4, 7)]), extraction.Window([], 0, [(8, 11)])]
    spans = [[1.0, 0, 1, 5.0], [2.0, 0, 0, 1.5]]
    assert extraction.choose_answer("one two six", windows, spans) == ("six", 2.0)
    assert extraction.choose_answer("one two six", windows, spans, may_lack=True)[0] == "six"
    spans[1][3] = 2.5  # now all windows say that there is none
    assert extraction.choose_answer("one two six", windows, spans, may_lack=True)[0] == ""


def test_squads_figures():
    score = extraction.answer_scores
    assert score("The  Cat!", ["a cat"]) == (1.0, 1.0)
    assert score("the black cat", ["cat", "dog"]) == (0.0, pytest.approx(2 / 3))
    assert score("", []) == (1.0, 1.0) and score("x", []) == (0.0, 0.0)
    assert score("cat cat", ["cat"]) == (0.0, pytest.approx(2 / 3))  # a word counts once


def test_rows_of_answers_are_read():
    squad = {"question": "q", "context": "a b", "answers": [{"text": "b", "answer_start": 2}]}
    assert as_span(squad)["answers"] == {"text": ["b"], "answer_start": [2]}
    assert as_embed({"query": "q", "positive": "p", "negative": "n"}) == {
        "anchor": "q",
        "positive": "p",
        "negative": "n",
    }
    assert as_embed({"text": "alone"}) == {"text": "alone"}


# --------------------------------------------------------------------------------------------------
# Vectors

TEXTS = ["one", "two three, and then some more", "def f(x):", "a", "the last of them"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", embeddings.POOLINGS)
def test_a_vector_is_a_texts_own_in_any_batch(tok, pooling, causal):
    net = net_for(tok, causal=causal).eval()
    vectors = embeddings.embed(net, tok, TEXTS, pooling)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    for text, vector in zip(TEXTS, vectors):
        with torch.no_grad():
            h = net.hidden(torch.tensor([tok.encode(text)]))[0]
        state = {"first": h[0], "last": h[-1], "mean": h.mean(0)}[pooling]
        torch.testing.assert_close(vector, state / state.norm(), rtol=1e-4, atol=1e-5)
    small = embeddings.embed(net, tok, TEXTS, pooling, micro_tokens=1)
    torch.testing.assert_close(small, vectors, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_an_encoder_sees_no_padding(tok):
    net = make_net(vocab_size=-(-tok.n_vocab // 64) * 64, **ENCODER).eval()
    rows = [tok.encode(text) for text in TEXTS]
    for pooling in embeddings.POOLINGS:
        for pooler in ("", "tanh", "gelu_norm"):
            net.set_score(["a", "b"], pooling, pooler=pooler)
            with torch.no_grad():
                together = net.scores(rows)
                alone = torch.cat([net.scores([row]) for row in rows])
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_contrast_is_infonce():
    torch.manual_seed(1)
    anchors, candidates = torch.randn(3, 8), torch.randn(5, 8)
    anchors /= anchors.norm(dim=1, keepdim=True)
    candidates /= candidates.norm(dim=1, keepdim=True)
    rows = [[1], [2], [1], [3], [2]]  # of the candidates 0 and 2, and 1 and 4, are copies
    losses = embeddings.contrast(anchors, candidates, embeddings.copies(rows, 3), 0.1)
    for i in range(3):
        total = 0.0
        for j in range(5):
            if j == i or rows[j] != rows[i]:
                total += math.exp(float(anchors[i] @ candidates[j]) / 0.1)
        right = math.exp(float(anchors[i] @ candidates[i]) / 0.1)
        assert float(losses[i]) == pytest.approx(-math.log(right / total), rel=1e-4)


def embed_examples(tok):
    rows = [
        {"anchor": "one", "positive": "two three"},
        {"anchor": "two", "positive": "four", "negative": "five and more"},
        {"anchor": "x", "positive": "two three"},  # a copy of the first's
        {"text": "the same text twice"},
        {"text": "def f(x): return x"},
    ]
    return [heads.read_texts(row, tok, 64) for row in rows]


def gradients(net, groups):
    """(the loss, its gradients) of groups of examples."""
    net.zero_grad()
    total = 0.0
    for group in groups:
        loss, _ = heads.embed_loss(0.1, net, group)
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_the_contrast_is_not_rounded():
    vectors = F.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    same = torch.zeros(3, 3, dtype=torch.bool)
    exact = embeddings.contrast(vectors[:3], vectors[3:], same, 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert embeddings.contrast(vectors[:3], vectors[3:], same, 0.01).equal(exact)


def test_micro_batches_change_no_loss_of_a_batch(tok):
    """Gradients by cached vectors are those of one pass over the batch."""
    net = net_for(tok)
    net.pooling = "mean"
    examples = embed_examples(tok)
    learner = learner_of(net, tok)
    cast = autocast(CPU, torch.float32)
    whole = gradients(net, [examples])
    for size in (1, 2, 3):
        split = lambda some, n=size: [some[i : i + n] for i in range(0, len(some), n)]
        groups = heads.with_gradients(0.1, learner, examples, split, cast, 5)
        assert len(groups) == math.ceil(5 / size) and "gradients" not in examples[0]
        loss, grads = gradients(net, groups)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        for a, b in zip(grads, whole[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    [group] = heads.with_gradients(0.1, learner, examples, lambda e: [e], cast, 5)
    assert "gradients" not in group[0]  # one pass holds it
    net.to("meta")  # where whoever asks for a number fails: nothing waits for the device
    groups = heads.with_gradients(0.1, learner, examples, lambda e: [[each] for each in e], cast, 5)
    for group in groups:
        heads.embed_loss(0.1, net, group)[0].backward()
    assert all(p.grad.is_meta for p in net.parameters() if p.grad is not None)


def learner_of(net, tok):
    from barelm.tuning import Learner

    return Learner(Run(CPU), net, tok, "", None)


def test_dropout_is_the_same_in_both_passes(tok):
    """The gradient by cached vectors with dropout is that of the function that was cached."""
    net = net_for(tok, dropout=0.3)
    net.pooling = "last"
    examples = embed_examples(tok)[3:]  # texts alone, of which dropout makes pairs
    split = lambda some: [[e] for e in some]
    cast = autocast(CPU, torch.float32)
    learner = learner_of(net, tok)
    groups = heads.with_gradients(0.1, learner, examples, split, cast, 5)
    total = sum(float(group[0]["loss"]) for group in groups)

    def loss_of_all():
        vectors = [None] * 4
        for i, group in enumerate(groups):
            torch.manual_seed(group[0]["seed"])
            vectors[i], vectors[2 + i] = heads.texts_to_vectors(net, heads.rows_of(group))
        return heads.losses_of(torch.stack(vectors), examples, 0.1).sum()

    net.zero_grad()
    loss = loss_of_all()
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    loss.backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    _, grads = gradients(net, groups)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    net.config.dropout = 0.0
    with pytest.raises(UserError, match="only dropout makes a pair"):
        heads.add_embed_pooling("mean", net, tok, examples, [], print)


def test_ranks_and_correlations():
    documents = torch.eye(4)
    queries = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    ranks = embeddings.right_ranks(queries, documents, torch.tensor([0, 1, 2]))
    assert ranks.tolist() == [1, 2, 4]  # of equals the right one comes last
    a, b = [1.0, 2.0, 2.0, 5.0], [2.0, 1.0, 3.0, 3.0]
    assert embeddings.mean_ranks(a).tolist() == [0.0, 1.5, 1.5, 3.0]
    assert embeddings.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert math.isnan(embeddings.pearson([1, 1], [1, 2]))
    stats = pytest.importorskip("scipy.stats")
    assert embeddings.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_a_folder_says_how_a_text_is_embedded(tok, tmp_path):
    net = net_for(tok).eval()
    net.pooling, net.task = "first", "embed"
    save(tmp_path, net, tok)
    again, _ = load(tmp_path)
    assert (again.pooling, again.task) == ("first", "embed")
    assert embeddings.pooling_of(again) == "first"
    path = tmp_path / "1_Pooling/config.json"
    path.write_text('{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match="expected one of pooling_mode_cls_token"):
        load(tmp_path)
    assert embeddings.pooling_of(net_for(tok)) == "mean"


TRUNKS = {
    "BertConfig": {"max_position_embeddings": 64},
    "ModernBertConfig": {"max_position_embeddings": 64, "cls_token_id": 0, "sep_token_id": 0},
    "Qwen3Config": {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_of_others_makes_vectors(name, tok, tmp_path):
    """What sentence-transformers saves: no head, and no prefix before the names."""
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ids = dict(vocab_size=512, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    config = getattr(transformers, name)(**shape, **ids, **TRUNKS[name])
    theirs = transformers.AutoModel.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    for file, content in (("tokenizer.json", tok.spec), ("tokenizer_config.json", tok.config)):
        (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    net, its_tok = load(tmp_path)
    rows = [its_tok.whole_text(text)[0] for text in TEXTS]
    vectors = embeddings.embed(net, its_tok, rows, embeddings.pooling_of(net))
    for row, vector in zip(rows, vectors):
        with torch.no_grad():
            h = theirs(torch.tensor([row])).last_hidden_state[0, 0]
        torch.testing.assert_close(vector, h / h.norm(), rtol=1e-3, atol=1e-5)
    kinds = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Pooling", "Dense")]
    (tmp_path / "modules.json").write_text(json.dumps(kinds))
    with pytest.raises(UserError, match="not supported: sentence_transformers.models.Dense"):
        load(tmp_path)


# --------------------------------------------------------------------------------------------------
# The commands


def span_rows():
    rows = []
    for i in range(12):
        context = f"{'It rained again. ' * (i % 4)}The cat is number {i}. It slept."
        answer = {"text": [f"number {i}"], "answer_start": [context.index("number")]}
        rows.append({"question": "Which cat?", "context": context, "answers": answer})
    return rows


@pytest.fixture(scope="module")
def tuned(tiny):
    """The folder of `tiny` with out/tag, out/span and out/embed, by the real commands."""
    for split in ("train", "val"):
        lines = "".join(json.dumps(row) + "\n" for row in span_rows())
        (tiny / f"data/tiny/span_{split}.jsonl").write_text(lines)
    for method in ("tag", "span"):
        run(tiny, "finetune.py", *QUICK, f"--method={method}", f"--out_dir=out/{method}")
    args = [*QUICK, "--method=embed", "--out_dir=out/embed", "--pooling=mean", "--batch_size=8"]
    run(tiny, "finetune.py", *args, "--micro_tokens=300")
    return tiny


def results(folder, task):
    return json.loads((folder / "results.json").read_text())["results"][task]


@pytest.mark.parametrize("task", ["tag", "span"])
def test_a_head_is_evaluated_sampled_and_opens_in_transformers(task, tuned):
    folder = tuned / "out" / task
    run(tuned, "eval.py", f"--model=out/{task}", f"--tasks={task}", "--dataset=tiny", "--limit=8")
    # The same figure as the run's own: of these validation examples, after the last step.
    last = [row for row in log(tuned, f"out/{task}") if "val_f1" in row][-1]
    found = results(folder, task)
    if task == "tag":
        assert found["accuracy"] == pytest.approx(last["val_accuracy"], abs=1e-6)
    assert found["f1"] == pytest.approx(last["val_f1"], abs=1e-6) and found["f1_stderr"] >= 0
    prompt = "def f(x):\n    return g(x)" if task == "tag" else "Which cat?\nThe cat is number 5."
    shown = run(tuned, "sample.py", f"--model=out/{task}", f"--prompt={prompt}").stdout
    assert all("  " in line for line in shown.splitlines())
    transformers = pytest.importorskip("transformers")
    name = {"tag": "TokenClassification", "span": "QuestionAnswering"}[task]
    theirs = getattr(transformers, f"AutoModelFor{name}").from_pretrained(folder).eval()
    net, tok = load(folder)
    ids = tok.encode("def f(x):\n    return x")
    with torch.no_grad():
        out = theirs(torch.tensor([ids]))
        expected = out.logits if task == "tag" else torch.stack([*out.values()][:2], -1)
        torch.testing.assert_close(heads.token_scores(net, [ids]), expected, rtol=1e-3, atol=1e-4)


def test_neighbours_and_likeness(tuned):
    args = ["--model=out/embed", "--dataset=tiny", "--limit=8"]
    said = run(tuned, "eval.py", *args, "--tasks=neighbours").stdout
    assert "its own is number" in said
    last = [row for row in log(tuned, "out/embed") if "val_mrr" in row][-1]
    found = results(tuned / "out/embed", "neighbours")
    assert found["mrr"] == pytest.approx(last["val_mrr"], abs=1e-6)
    rows = []
    for i, text in enumerate(TEXTS):
        rows.append({"sentence1": text, "sentence2": TEXTS[i - 1], "score": i % 3})
    (tuned / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tuned, "eval.py", *args, "--tasks=sts", "--rows_file=sts.jsonl", "--samples")
    net, tok = load(tuned / "out/embed")
    vectors = embeddings.embed(net, tok, TEXTS, "mean")
    cosines = [float(vectors[i] @ vectors[i - 1]) for i in range(5)]
    expected = np.corrcoef(cosines, [i % 3 for i in range(5)])[0, 1]
    found = results(tuned / "out/embed", "sts")
    assert found["pearson"] == pytest.approx(expected, abs=1e-4)


def test_a_batch_is_one_on_several_processes(tuned):
    args = [*QUICK, "--method=embed", "--out_dir=out/embed_two", "--pooling=mean", "--batch_size=8"]
    run(tuned, "finetune.py", *args, processes=2)
    for a, b in zip(log(tuned, "out/embed"), log(tuned, "out/embed_two"), strict=True):
        for key in ("loss", "val_loss", "val_mrr"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4)


def test_an_adapter_says_how_a_text_is_embedded(tuned):
    args = [*QUICK, "--method=embed", "--adapt=lora", "--pooling=first", "--max_steps=1"]
    run(tuned, "finetune.py", *args, "--out_dir=out/embed-lora", "--eval_examples=4")
    net, _ = load(tuned / "out/embed-lora")
    assert (net.task, net.pooling) == ("embed", "first")


def test_the_wrong_task_is_a_line(tuned):
    def refusal(*args):
        done = run(tuned, "eval.py", "--dataset=tiny", *args, check=False)
        assert done.returncode == 1
        return done.stderr.strip().splitlines()[-1]

    assert "expected a model of tag" in refusal("--model=out/tiny", "--tasks=tag")
    assert "expected --tasks=span, and no other" in refusal("--model=out/span", "--tasks=loss")
    assert "--pooling=max: expected first" in refusal("--tasks=sts", "--pooling=max")


# --------------------------------------------------------------------------------------------------
# The server


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_an_encoder_is_not_taught_to_write(method):
    net = make_net(n_head=2, n_embd=16, causal=False)
    with pytest.raises(
        UserError, match="an encoder, which sees the tokens that it would learn to say"
    ):
        finetune.check_network(net, finetune.METHODS[method])
    finetune.check_network(net, finetune.METHODS["tag"])


def test_an_encoder_and_a_classifier_are_served(tuned, tok):
    pytest.importorskip("fastapi")
    from test_serve import served

    net = make_net(vocab_size=-(-tok.n_vocab // 64) * 64, **ENCODER).eval()
    net.set_score(["yes", "no"], "first")
    save(tuned / "out/encoder", net, tok)
    net, tok = load(tuned / "out/encoder")
    rows = [tok.whole_text(text)[0] for text in TEXTS]
    assert rows[0][0] == tok.eot_id  # as a document begins that it has learned from
    with torch.no_grad():
        expected = net.scores(rows).softmax(-1).numpy()
    with served(tuned, "--model=out/encoder", "--dtype=float32", name="encoder") as site:
        answer = site.post("/classify", {"input": TEXTS}).json()
        probs = [row["probs"] for row in answer["data"]]
        np.testing.assert_allclose(probs, expected, atol=1e-4)
        assert [row["label"] for row in answer["data"]] == [
            ["yes", "no"][i] for i in expected.argmax(1)
        ]
        vectors = site.post("/v1/embeddings", {"input": rows}).json()["data"]
        ours = embeddings.embed(net, tok, rows, "mean")
        np.testing.assert_allclose([r["embedding"] for r in vectors], ours, atol=1e-4)
        refused = site.post("/v1/completions", {"prompt": "a"})
        assert refused.status_code == 400 and "continues no text" in refused.text
