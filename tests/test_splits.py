"""How a tokenizer.json splits text: every Split gives the ids of `tokenizers`, whatever lies
between its matches; very long runs, and patterns without an end."""

import itertools
import json
import random

import numpy as np
import pytest
from conftest import ROOT, run

from barelm.bpe import bpe_tokenizer
from barelm.encoders import LibraryEncoder
from barelm.files import read_json
from barelm.run import UserError
from barelm.shards import open_shard
from barelm.splits import QWEN2_SPLIT, compile_pattern, split_at
from barelm.tokenizer import Tokenizer

BEHAVIORS = ["Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"]
PATTERNS = [
    r"\p{L}+",
    r"\s+",
    r"x",
    r"zzz",
    r"\p{N}{1,3}+",  # which Oniguruma repeats
    r"\p{L}*",  # nothing is matched between others
    r"(?=\p{Lu})",
    r"$",
    r"\s+$",  # at the end of each line
    r"^\s+",
    r"a|(?=b)|b",
    r"(\w+)|(\s)",
    r"[\w.]+",
    r"\W+",
    r"[a-z&&[^aeiou]]+",
    r"[^(\s|[.,!?])]+",
    r"(?i:ab|s)",
    r"\x{4E00}|\w+|\W",
    r"\s+(?!\S)|\s+",
    QWEN2_SPLIT,
    QWEN2_SPLIT.replace(r"|\s+(?!\S)|\s+", ""),
]
LETTERS = [
    "aé \n\r\t'.,1/漢b😀Sx",
    " \n\t\r\u2003a",
    "ab s'1",
    "Aab bB12 \n",
    "\x00\x1c\x85\u0301e \u200d",
]


def spec_of(name, steps, **change):
    """A family's tokenizer.json with another way to split."""
    spec = read_json(ROOT / "tests/fixtures/tokenizers" / name / "tokenizer.json")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [*steps, level | {"use_regex": False}]
    return spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}} | change


def words_of(steps, vocab="def f(x): ret42 \n"):
    """A tokenizer.json of single letters and some words."""
    tokens = {
        token: i for i, token in enumerate(["<unk>", *sorted({*vocab}), "def", "  ", "return"])
    }
    unknown = {"id": 0, "content": "<unk>", "special": True, "single_word": False}
    unknown |= {"lstrip": False, "rstrip": False, "normalized": False}
    body = {"type": "WordLevel", "vocab": tokens, "unk_token": "<unk>"}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "model": body,
    }
    spec |= {"added_tokens": [unknown], "post_processor": None, "decoder": {"type": "Fuse"}}
    return spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def more_texts(rng, n):
    for _ in range(n):
        yield "".join(rng.choices(rng.choice(LETTERS), k=rng.randint(0, 30)))


def assert_same(spec, texts):
    tokenizers = pytest.importorskip("tokenizers")
    theirs, tok = tokenizers.Tokenizer.from_str(json.dumps(spec)), Tokenizer(spec, {})
    texts = list(texts)
    batch = tok.encode_batch(texts)
    for text, ids in zip(texts, batch):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == ids.tolist() == expected, (text, spec["pre_tokenizer"])


# What lies between the matches


def test_no_text_is_lost_between_the_matches():
    text = "def f(x): return 42"
    for steps in ([split(r"\p{L}+")], [split(r"\p{L}+"), split(r"\d", "Contiguous")]):
        for name in ("gpt2", "llama3", "qwen3", "smollm2"):
            tok = Tokenizer(spec_of(name, steps), {})
            assert tok.decode(tok.encode(text)) == text
            assert tok.decode(tok.encode_batch([text])[0].tolist()) == text
        tok = Tokenizer(words_of(steps), {})
        assert tok.decode(tok.encode("def f x)")) == "def f x)"


def naive_split(text, letters, behavior):
    """Split by a set of letters, by the words of Hugging Face's documentation."""
    match behavior:
        case "Isolated":  # every delimiter stands alone, and so does what is between two
            runs = itertools.groupby(enumerate(text), lambda at: at[0] if at[1] in letters else -1)
        case "Contiguous":  # delimiters in a row stand together
            runs = itertools.groupby(enumerate(text), lambda at: at[1] in letters)
        case "Removed":
            pieces = naive_split(text, letters, "Isolated")
            return [piece for piece in pieces if piece not in letters]
    return ["".join(letter for _, letter in run) for _, run in runs]


@pytest.mark.parametrize("behavior", ["Isolated", "Contiguous", "Removed"])
def test_pieces_are_as_documented(behavior):
    pattern = compile_pattern("[-.]")
    for text in map("".join, itertools.product("ab-.", repeat=5)):
        pieces = [text[a:b] for a, b in split_at(text, pattern, behavior, False)]
        assert pieces == naive_split(text, {"-", "."}, behavior)


def test_merged_pieces_are_as_documented():
    pattern, text = compile_pattern("-"), "the-final--countdown"  # their own example
    pieces = lambda behavior: [text[a:b] for a, b in split_at(text, pattern, behavior, False)]
    assert pieces("MergedWithPrevious") == ["the-", "final-", "-", "countdown"]
    assert pieces("MergedWithNext") == ["the", "-final", "-", "-countdown"]
    assert pieces("Contiguous") == ["the", "-", "final", "--", "countdown"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_split_gives_the_ids_of_tokenizers(pattern):
    rng = random.Random(pattern)
    for behavior in BEHAVIORS:
        for invert in (False, True):
            steps = [split(pattern, behavior, invert)]
            name = rng.choice(["gpt2", "llama3", "qwen3", "smollm2"])
            assert_same(spec_of(name, steps), more_texts(rng, 8))
            if behavior != "Removed":
                assert_same(words_of(steps), more_texts(rng, 4))


def test_several_splits_strings_and_digits_give_the_ids_of_tokenizers():
    rng = random.Random(3)
    norms = [None, {"type": "NFC"}, {"type": "NFKC"}, {"type": "NFD"}, {"type": "Lowercase"}]
    for _ in range(60):
        steps = []
        for _ in range(rng.randint(1, 3)):
            options = dict(behavior=rng.choice(BEHAVIORS), invert=rng.random() < 0.3)
            digits = {"type": "Digits", "individual_digits": rng.random() < 0.5}
            plain = split(rng.choice([" ", "ab", "\n", "'", ".", ""]), kind="String", **options)
            steps.append(rng.choice([digits, plain, split(rng.choice(PATTERNS), **options)]))
        name = rng.choice(["gpt2", "llama3", "qwen3", "smollm2"])
        assert_same(spec_of(name, steps, normalizer=rng.choice(norms)), more_texts(rng, 6))


@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_a_chat_masks_what_the_assistant_says_however_it_is_split(behavior):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    tok = Tokenizer(spec_of("smollm2", [split(r"[ .]", behavior)]), config)
    talk = [{"role": "user", "content": "a b. c"}, {"role": "assistant", "content": "De f. g"}]
    ids, mask = tok.chat(talk)
    said = [id for id, m in zip(ids, mask) if m]
    assert said == [*tok.encode("De f. g"), tok.special["<|im_end|>"]]


# Runs of a million letters


def tokenizer_of(name):
    return Tokenizer.from_folder(ROOT / "tests/fixtures/tokenizers" / name)


def test_a_million_blanks_are_bytes_to_the_tokenizer_of_bytes(capfd):
    tok, text = bpe_tokenizer([]), "x" + " " * 1_000_000 + "end"
    ids = tok.encode(text)
    assert len(ids) == 1_000_004 and ids == list(text.encode())
    shorter = " " * 300_001  # and still too long a run for tiktoken's splitter to be asked
    assert len(tok.encode_batch([shorter])[0]) == 300_001
    _, said = tok.chat([{"role": "assistant", "content": shorter}])
    assert sum(said) == 300_002  # and its end
    assert capfd.readouterr().err == ""  # nor does Rust's panic say anything


@pytest.mark.parametrize("run_of", [" ", "\n", " \t"])
def test_a_million_of_one_kind_give_the_ids_of_tokenizers(run_of):
    text = "x" + (run_of * 1_000_000)[:1_000_000] + "end"
    assert_same(read_json(ROOT / "tests/fixtures/tokenizers/qwen3/tokenizer.json"), [text])


@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3", "smollm2"])
def test_a_million_blanks_come_back(name):
    text = "x" + " " * 1_000_000 + "end"
    tok = tokenizer_of(name)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    short = tok.encode("x" + " " * 1_000 + "end")  # the same tokens of blanks, more often
    assert set(ids) == set(short)


def test_the_commands_take_a_run_of_a_million_blanks(tmp_path):
    rows = ["x" + " " * 1_000_000 + "end", "a b c " * 50, "\n" * 1_000_000 + "b"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    args = ["--source=d.jsonl", "--steps=", "--threads=1", "--vocab_size=270", "--val_fraction=0"]
    run(tmp_path, "prepare.py", *args)
    tok = Tokenizer.from_folder(tmp_path / "data/python")
    shard = open_shard(tmp_path / "data/python/train_000000.bin").astype(np.int64)
    borders = [*np.flatnonzero(shard == tok.bos_id).tolist(), len(shard)]
    texts = [tok.decode(shard[a + 1 : b].tolist()) for a, b in itertools.pairwise(borders)]
    assert sorted(texts) == sorted(rows)


# Patterns that are not taken


def test_a_pattern_without_an_end_is_one_line(monkeypatch):
    monkeypatch.setattr("barelm.splits.SPLIT_SECONDS", 0.1)
    for behavior, invert in (("Isolated", False), ("Removed", False), ("Removed", True)):
        tok = Tokenizer(spec_of("gpt2", [split(r"(?:a|aa)+$(?!d)c|b", behavior, invert)]), {})
        assert tok.decode(tok.encode("bb")) == (
            "" if (behavior, invert) == ("Removed", False) else "bb"
        )
        for encode in (tok.encode, lambda text: tok.encode_batch([text])):
            with pytest.raises(
                UserError, match="the split pattern .* does not end on a text of 99"
            ):
                encode("a" * 99)


@pytest.mark.parametrize("pattern", [r"a(", r"[a", r"a{99999999999}", r"(?<=a*)b("])
def test_patterns_that_are_none_are_a_line(pattern):
    for spec in (spec_of("gpt2", [split(pattern)]), words_of([split(pattern)])):
        with pytest.raises(UserError, match="split pattern") as refusal:
            Tokenizer(spec, {})
        assert str(refusal.value).count("\n") == 0 and "tokenizer.json" in str(refusal.value)


ODD = [
    r"(?R)|a",
    r"(a\g<0>?b)",
    r"(?P>x)",
    r"\ba",
    r"\X",
    r"(a)\1",
    r"(?m:a.b)",
    r"[[:alpha:]]+",
    r"a{2,3}+",
    r"(?<name>a)",
]


@pytest.mark.parametrize("pattern", ODD)
def test_patterns_that_others_read_otherwise_are_for_the_library(pattern):
    pytest.importorskip("tokenizers")
    texts = ["", "aa ab", "a\nb aaa", "漢 aab aaaa\r\n a.b"]
    for spec in (spec_of("gpt2", [split(pattern)]), words_of([split(pattern)])):
        try:
            assert type(Tokenizer(spec, {}).encoder) is LibraryEncoder
        except UserError as refusal:  # Oniguruma's
            assert str(refusal).count("\n") == 0 and "tokenizer.json" in str(refusal)
        else:
            assert_same(spec, texts)


def test_words_that_lose_text_are_as_tokenizers_has_them():
    spec = words_of([split(r"\s", "Removed")])
    assert_same(spec, ["def f(x)", "return  42\n"])
    assert type(Tokenizer(spec, {}).encoder) is LibraryEncoder
    assert Tokenizer(spec, {}).decode(Tokenizer(spec, {}).encode("return def")) == "returndef"
