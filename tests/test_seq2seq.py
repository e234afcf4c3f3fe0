"""Encoder-decoders in use: sources and targets as rows, how they learn, how they generate, how an
answer is compared with the one that was wanted."""

import json
import math
import random

import numpy as np
import pytest
import torch

from barelm.clean import Reject
from barelm.dedup import digest
from barelm.number_words import draw_numbers, in_english, in_german
from barelm.run import Schedule, UserError
from barelm.similarity import chrf, chrf_counts, common_subsequence, rouge_l
from barelm.sources import cut_into_units
from barelm.tasksets import Reading, as_seq2seq, convert_unit, translation_of

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
    rows, _ = convert_unit(["seq2seq"], reading, unit)["seq2seq"]
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
