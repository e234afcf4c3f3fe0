"""Every kind of tokenizer: ids against `tokenizers`, the trainers, normalisation, special tokens,
chat masks, --inspect, and which of them need the library."""

import itertools
import json
import math
import pickle
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import regex
from conftest import ROOT, run

from barelm.bpe import (
    BY_LIBRARY,
    DEFAULT,
    LETTERS,
    PATTERNS,
    TokenizerSettings,
    bpe_tokenizer,
    count_pieces,
    normal_text,
    show_tokens,
    train_tokenizer,
    train_unigram,
    train_wordpiece,
)
from barelm.encoders import ByteBPE, LibraryEncoder, Words
from barelm.files import read_json, write_json
from barelm.run import UserError
from barelm.splits import BERT_WORDS, normalize
from barelm.tokenizer import Tokenizer

KINDS = [*PATTERNS, "byte"]
FIXTURES = ROOT / "tests/fixtures/tokenizers"
FORMS = ["", "nfc", "nfkc", "lower", "lower,nfc", "nfkc, lower"]
SIZE = 700
TEXTS = [
    "",
    " ",
    "\n",
    "hello",
    "Hello, World!  It's   12345 o'clock.\n\n\n  x",
    "\t\ttabs\r\nCRLF\r\n\r\nold Mac\rend",
    "don't DON'T we'LL they'Ve 'S it'ſ",
    "naïve café Ünïcödé a\u0301 e\u0301 E\u0301 ǅ ﬁ ½ ²",
    "ΟΔΟΣ Σ ΑΣ. İstanbul IŞIK ß ẞ Ω K Å",
    "日本語のテキスト、漢字。한국어 ไทย हिन्दी ＦＵＬＬ ｶﾞ",
    "😀👩\u200d👩\u200d👧🇩🇪 \U0010ffff\ue000",
    "\u200b\ufeff\u00a0x\u2028y\u3000z \u0085w",
    "\x00\x01\x1c\x1f\x7f",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass C:\n\tpass\n",
    "   leading, trailing   ",
    "١٢٣ ४५६ ⅷ² 1234567 3.14e-10",
    "a" * 33 + " " + "a" * 99 + " " + "a" * 100 + " " + "a" * 101 + " " + "b" * 300,
    "##a ### #a## a##b __init__ _x <|endoftext |> <| pad|>",
    "https://example.org/?q=a&b=c#d;\n/e\n\n-- +++ ***\n",
]
CORPUS = "\n".join([*TEXTS * 2, *((ROOT / f).read_text() for f in ("train.py", "sample.py"))])


def more_texts():
    """Random strings: of letters that are awkward, of white space, of any letters."""
    rng = random.Random(5)
    assigned = [c for c in map(chr, range(0x3400)) if unicodedata.category(c) not in ("Cn", "Mn")]
    for letters in ["aé \n\r\t'.,1/漢😀S\u00a0", " \n\t\r\u2003a", "aeinrst ", assigned]:
        yield from ("".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(100))
    yield Path(json.decoder.__file__).read_text()


def train_on(text, kind, size=SIZE, settings=DEFAULT):
    """The tokenizer that prepare.py makes of a text."""
    if kind in BY_LIBRARY:
        pytest.importorskip("tokenizers")
    if kind == "byte":
        return bpe_tokenizer([], settings)
    counts = count_pieces([normal_text(text, settings)], PATTERNS[kind])
    return train_tokenizer(kind, counts, size, settings)


@pytest.fixture(scope="module")
def make():
    """A function: the tokenizer of a kind and normalisation, trained once."""
    made = {}

    def make(kind, normalize=""):
        if (kind, normalize) not in made:
            settings = TokenizerSettings(normalize=normalize)
            made[kind, normalize] = train_on(CORPUS, kind, SIZE, settings)
        return made[kind, normalize]

    return make


# The same ids as Hugging Face


@pytest.mark.parametrize("asked", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_gives_the_same_ids_and_text(kind, asked, make):
    tokenizers = pytest.importorskip("tokenizers")
    tok = make(kind, asked)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tok.spec))
    assert theirs.get_vocab_size() == tok.n_vocab
    for text in [*TEXTS, *more_texts()]:
        ids = tok.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == tok.decode(ids)
    rng = random.Random(6)
    for _ in range(200):  # no text's ids, parts of words at the start and special tokens included
        ids = rng.choices(range(tok.n_vocab), k=rng.randint(0, 5))
        assert theirs.decode(ids, skip_special_tokens=False) == tok.decode(ids)
    for name, id in tok.special.items():
        assert theirs.token_to_id(name) == id


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_the_folder(kind, make, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = make(kind, "nfkc,lower")
    write_json(tmp_path / "tokenizer.json", tok.spec)
    write_json(tmp_path / "tokenizer_config.json", tok.config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tok.encode(text)
    special = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert special == (tok.bos_id, tok.eos_ids[0], tok.pad_id)
    assert theirs.unk_token_id == tok.special.get("<|unk|>")
    messages = [{"role": "user", "content": "Say Hi!"}, {"role": "assistant", "content": "Hi  é"}]
    assert theirs.apply_chat_template(messages)["input_ids"] == tok.chat(messages)[0]


@pytest.mark.parametrize("name", ["NFC", "NFD", "NFKC", "NFKD", "Lowercase"])
def test_normalizers_are_those_of_tokenizers(name):
    normalizers = pytest.importorskip("tokenizers.normalizers")
    theirs = getattr(normalizers, name)()
    # Their tables of compatibility are of Unicode 9; since then a few letters have got one.
    assigned = [c for c in map(chr, range(0x32FF)) if unicodedata.category(c) != "Cn"]
    assert [c for c in assigned if theirs.normalize_str(c) != normalize(c, [name])] == []
    for text in TEXTS:
        assert theirs.normalize_str(text) == normalize(text, [name])


# What the kinds are, without Hugging Face


@pytest.mark.parametrize("asked", ["", "nfkc,lower"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_every_tokenizer_keeps(kind, asked, make):
    tok = make(kind, asked)
    known = {"byte", "bpe", "unigram"}
    names = ["NFKC", "Lowercase"] if asked else []
    for text in [CORPUS, *more_texts()]:
        ids, normal = tok.encode(text), normalize(text, names)
        unknown = tok.special.get("<|unk|>") in ids
        assert not unknown or kind not in known
        if kind == "wordpiece":  # keeps all but white space
            normal = "".join(regex.findall(BERT_WORDS, normal))
            back = "".join(tok.token_bytes(i).decode().strip(" ") for i in ids)
        else:
            back = b"".join(map(tok.token_bytes, ids)).decode(errors="replace")
            assert unknown or tok.decode(ids) == normal
        assert unknown or back == normal
    first = tok.n_vocab - len(DEFAULT.special_tokens)
    assert [tok.special[t] for t in DEFAULT.special_tokens] == [*range(first, tok.n_vocab)]
    assert kind in ("byte", "char") or tok.n_vocab == SIZE
    again = pickle.loads(pickle.dumps(tok))  # as a process of a pool gets it
    assert [a.tolist() for a in again.encode_batch(TEXTS, 2)] == [tok.encode(t) for t in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_one_unknown_letter(kind, make):
    tok, broken, mended = make(kind), "a \ud800 b \ud83d\ude00 \udc00", "a \ufffd b 😀 \ufffd"
    assert tok.encode(broken) == tok.encode(mended) == tok.encode_batch([broken])[0].tolist()
    chats = [[{"role": "assistant", "content": text}] for text in (broken, mended)]
    assert tok.chat(chats[0]) == tok.chat(chats[1])
    show_tokens(tok, broken)


def test_a_chat_keeps_letters_of_private_use(make):
    tok, content = make("bpe"), "a\ue000b <|im_end|> \ue001"
    ids, _ = tok.chat([{"role": "user", "content": content}])
    assert f"\n{content}<|im_end|>" in tok.decode(ids)


def test_words_are_the_commonest_and_the_rest_is_unknown():
    tok = train_on("b b b a a c", "word", 4 + 1 + 3)
    assert tok.encode("b") == tok.encode(" d") == [tok.special["<|unk|>"]]
    tokens = [tok.token_bytes(i) for i in range(3)]
    assert tokens == [b" a", b" b", b" c"] and tok.n_vocab == 8


# Training


def naive_wordpiece_training(words, n_tokens):
    """The commonest pair is joined, of equals that with the lowest ids, all counted from the
    beginning each time; of pairs that occur twice."""
    split = {w: [w[0], *("##" + c for c in w[1:])] for w in words}
    tokens = sorted({c for w in words for c in w})
    tokens += sorted({c for cut in split.values() for c in cut[1:]})
    while len(tokens) < n_tokens:
        pairs = Counter()
        for word, cut in split.items():
            for pair in zip(cut, cut[1:]):
                pairs[pair] += words[word]
        common = [pair for pair in pairs if pairs[pair] > 1]
        if not common:
            break
        pair = min(common, key=lambda p: (-pairs[p], *map(tokens.index, p)))
        joined = pair[0] + pair[1].removeprefix("##")
        if joined not in tokens:
            tokens.append(joined)
        for cut in split.values():
            i = 0
            while i < len(cut) - 1:
                if (cut[i], cut[i + 1]) == pair:
                    cut[i : i + 2] = [joined]
                i += 1
    return tokens


def test_wordpiece_training_equals_the_textbook():
    pytest.importorskip("tokenizers")
    words = Counter(regex.findall(BERT_WORDS, (ROOT / "sample.py").read_text()))
    words |= {"aaaa": 50, "aaaaa": 31, "abab": 40}  # pairs that overlap
    expected = naive_wordpiece_training(words, 230)
    assert len(expected) == 230 and max(map(len, expected)) > 4
    # A quarter of the vocabulary would be too few for all the letters here: none may be left out.
    letters = len({c for w in words for c in w})
    assert train_wordpiece(words, 4 * letters)[:230] == expected


def test_wordpiece_ends_where_no_pair_occurs_twice():
    pytest.importorskip("tokenizers")
    assert train_wordpiece({"ab": 1, "c": 5}, 99) == ["a", "b", "c", "##b"]
    assert len(train_wordpiece({"a" * 5000: 2}, 99)) <= 99


def test_wordpiece_keeps_the_commonest_letters_and_calls_other_words_unknown():
    tok = train_on("aab aab aab cab cab é x", "wordpiece", 4 + 1 + 13)
    unknown = tok.special["<|unk|>"]
    vocab = tok.spec["model"]["vocab"]
    assert [t for t in vocab if len(t) == 1] == ["a", "b", "c"]
    assert tok.encode("éab") == tok.encode("x") == [unknown] != tok.encode("cab")


def unigram_counts():
    return count_pieces([(ROOT / "model.py").read_text()])


def likelihood(counts, scores):
    """The log-likelihood of {piece: count} by the definition: a sum over all segmentations."""
    total = 0.0
    p = {token: math.exp(score) for token, score in scores.items()}
    for piece, n in counts.items():
        letters = "".join(LETTERS[byte] for byte in piece.encode())
        paths = [1.0] + [0.0] * len(letters)
        for end in range(1, len(letters) + 1):
            starts = range(max(0, end - 16), end)
            paths[end] = sum(paths[s] * p.get(letters[s:end], 0.0) for s in starts)
        total += n * math.log(paths[-1])
    return total


def test_unigram_has_all_bytes_and_then_the_likeliest():
    pytest.importorskip("tokenizers")
    counts = unigram_counts()
    scores = train_unigram(counts, 600)
    tokens = [*scores]
    assert tokens[:256] == [LETTERS[byte] for byte in range(256)] and len(scores) == 600
    others = [scores[token] for token in tokens[256:]]
    assert others == sorted(others, reverse=True) and max(map(len, tokens)) <= 16
    assert scores[LETTERS[0]] == scores[LETTERS[255]] == min(scores.values())  # of no use here
    bytes_alone = Counter()
    for piece, n in counts.items():
        for byte in piece.encode():
            bytes_alone[LETTERS[byte]] += n
    total = sum(bytes_alone.values())
    alone = {letter: math.log(n / total) for letter, n in bytes_alone.items()}
    assert likelihood(counts, scores) > 0.8 * likelihood(counts, alone)  # both are negative


def test_unigram_takes_a_common_word_that_is_part_of_no_other():
    pytest.importorskip("tokenizers")
    scores = train_unigram(Counter({" hello": 60, " world": 40, "rare": 1}), 300)
    assert {"Ġhello", "Ġworld"} < scores.keys() and "rare" not in scores
    assert not any(" " in token for token in scores)


def test_a_text_of_too_many_pieces_keeps_its_shares(monkeypatch):
    monkeypatch.setattr("barelm.bpe.MAX_PIECES", 10)
    from barelm.bpe import repeated

    counts = {"b": 60, "a": 40, "c": 1}
    assert Counter(repeated(counts)) == {"a": 3, "b": 5}
    assert Counter(repeated(counts, "!")) == {"a": 2, "a!": 1, "b": 4, "b!": 1}


@pytest.mark.parametrize("kind", PATTERNS)
def test_the_order_of_the_pieces_says_nothing(kind):
    if kind in BY_LIBRARY:
        pytest.importorskip("tokenizers")
    counts = count_pieces([CORPUS], PATTERNS[kind])
    backwards = dict(reversed(counts.items()))
    made = [train_tokenizer(kind, c, 400).spec for c in (counts, backwards)]
    assert json.dumps(made[0]) == json.dumps(made[1])


@pytest.mark.parametrize("text", ["a", "a" * 5000, "ab", "é", "."])
@pytest.mark.parametrize("kind", PATTERNS)
def test_a_text_that_teaches_nothing(kind, text):
    tok = train_on(text, kind)
    assert tok.n_vocab <= SIZE
    if kind != "wordpiece" or len(text) <= 100:
        assert tok.decode(tok.encode(text)) == text


# Special tokens, chats


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_what_one_says(kind):
    names = ["<s>", "[pad]", "<think>", "two words"]
    tok = train_on(CORPUS, kind, SIZE, TokenizerSettings(names))
    assert [tok.special[t] for t in names] == [*range(tok.n_vocab - 4, tok.n_vocab)]
    assert (tok.bos_id, tok.eos_ids) == (tok.special["<s>"], [tok.special["<s>"]])
    assert tok.pad_id == tok.special["[pad]"]
    assert not set(tok.encode("<s> [pad] two words")) & {tok.special[t] for t in names}
    with pytest.raises(UserError, match="no chat template"):
        tok.chat([{"role": "user", "content": "a"}])
    if kind != "byte":
        with pytest.raises(UserError, match="'a' is an ordinary token too"):
            train_on("a a b b", kind, 300, TokenizerSettings(["a", "<pad>"]))


ALL_ROLES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
ALL_ROLES |= {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_role_has_a_token_of_its_own(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = train_on(CORPUS, kind, SIZE, TokenizerSettings(roles=ALL_ROLES))
    assert kind in ("byte", "char") or tok.n_vocab == SIZE
    write_json(tmp_path / "tokenizer.json", tok.spec)
    write_json(tmp_path / "tokenizer_config.json", tok.config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert len({*again.roles.values()}) == 7
    for role, name in ALL_ROLES.items():
        assert getattr(theirs, f"{role}_token") == name
        assert getattr(theirs, f"{role}_token_id") == again.roles[role] == tok.special[name]
    assert (again.bos_id, again.eos_ids, again.pad_id) == (
        theirs.bos_token_id,
        [theirs.eos_token_id],
        theirs.pad_token_id,
    )
    assert again.document_layout == ([theirs.bos_token_id], [theirs.eos_token_id])
    for text in TEXTS:  # transformers puts bos before a text, as `prompt` does
        assert theirs(text)["input_ids"] == again.prompt(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == again.encode(text)
    pair = theirs("a", "b")["input_ids"]
    assert pair == again.prompt("a") + again.prompt("b")
    named = "<s></s><pad><unk>[CLS][SEP][MASK]"  # none of them is read from text
    assert not {*again.encode(named)} & {again.roles[r] for r in ALL_ROLES if r != "unk"}
    if kind in ("char", "word", "wordpiece"):
        assert again.encode("\U0010fffe\u0378") == [again.roles["unk"]] * (1 + (kind != "word"))


@pytest.mark.parametrize(
    "roles, expected",
    [
        ({"mask": "[MASK]"}, "bos=<|endoftext|> eos=<|endoftext|> pad=<|pad|> mask=[MASK]"),
        ({"eos": "</s>"}, "bos=<|endoftext|> eos=</s> pad=<|pad|>"),
        ({"pad": "<|endoftext|>"}, "bos=<|endoftext|> eos=<|endoftext|> pad=<|endoftext|>"),
        ({"bos": "<s>", "eos": "<s>"}, "bos=<s> eos=<s> pad=<|pad|>"),
    ],
)
def test_roles_that_are_not_asked_for_stay_as_they_were(roles, expected):
    tok = train_on(CORPUS, "bpe", SIZE, TokenizerSettings(roles=roles))
    names = {id: name for name, id in tok.special.items()}
    assert " ".join(f"{role}={names[id]}" for role, id in tok.roles.items()) == expected
    apart = tok.roles["bos"] != tok.roles["eos"]
    assert tok.start == [tok.bos_id] * apart
    assert tok.document_layout == ([tok.bos_id], tok.eos_ids * apart)


@pytest.mark.parametrize("asked", ["", "nfkc,lower"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_mask_covers_what_the_assistant_says(kind, asked, make):
    tok = make(kind, asked)
    messages = [
        {"role": "user", "content": "Return\tthe FILE of e\u0301 ﬁ İ <|im_end|>"},
        {"role": "assistant", "content": "The file is read.\n x"},
        {"role": "user", "content": "漢 and more"},
        {"role": "assistant", "content": " Return it<|im_start|>"},
    ]
    ids, mask = tok.chat(messages)
    end, unknown = tok.special["<|im_end|>"], tok.special.get("<|unk|>")
    real = [i for i in ids if i in tok.special.values() and i != unknown]
    assert len(real) == 8  # the template's own, none of the contents'
    runs = [
        [i for i, _ in run] for on, run in itertools.groupby(zip(ids, mask), itemgetter(1)) if on
    ]
    assert len(runs) == 2 and all(run[-1] == end and run.count(end) == 1 for run in runs)
    for here, message in zip(runs, (messages[1], messages[3])):
        alone = tok.encode(message["content"])
        # A token that the template's line break begins belongs to the template: " x" loses none.
        assert here[:-1][-3:] == alone[-3:] and len(alone) - 1 <= len(here) - 1 <= len(alone)


def test_a_mask_splits_words_where_the_assistant_begins(make):
    tok = make("wordpiece")
    template = "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant{% endif %}"
    joined = Tokenizer(tok.spec, tok.config | {"chat_template": template})
    ids, mask = joined.chat([{"role": "assistant", "content": "!  the file"}])
    said = [tok.token_bytes(i) for i, m in zip(ids, mask) if m]
    assert said[0] == b" !" and b"".join(said) == b" ! the file"


def test_roles_of_others_are_read(tmp_path):
    """As RoBERTa's files have them: a mask token that eats the blank before it, in text alone."""
    spec = read_json(ROOT / "tests/fixtures/tokenizers/gpt2/tokenizer.json")
    mask = spec["added_tokens"][0] | {"id": 331, "content": "<mask>", "lstrip": True}
    spec["added_tokens"] = [*spec["added_tokens"], mask]
    names = {"bos_token": "<|endoftext|>", "cls_token": {"content": "<|endoftext|>"}}
    tok = Tokenizer(spec, names | {"mask_token": "<mask>"})
    assert tok.roles == {"bos": 330, "cls": 330, "mask": 331}
    assert tok.decode(tok.encode("a <mask>")) == "a <mask>" and 331 not in tok.encode("a <mask>")
    with pytest.raises(UserError, match="<mask> with lstrip"):
        Tokenizer(spec, names)


# The command


def test_the_real_command_for_every_kind(tmp_path):
    (tmp_path / "text.txt").write_text(CORPUS, newline="")
    for kind in ("word", "wordpiece", "unigram"):
        if kind in BY_LIBRARY:
            pytest.importorskip("tokenizers")
        args = ["--source=text.txt", f"--tokenizer={kind}", "--vocab_size=500", "--threads=1"]
        for dataset in ("one", "two"):
            run(tmp_path, "prepare.py", *args, "--normalize=lower", f"--dataset={dataset}")
        one, two = (
            {p.name: p.read_bytes() for p in (tmp_path / "data" / d).iterdir()}
            for d in ("one", "two")
        )
        assert json.loads(one.pop("meta.json"))["settings"]["normalize"] == "lower"
        assert two.pop("meta.json") and one == two
        tok = Tokenizer.from_folder(tmp_path / "data" / "one")
        shard = np.frombuffer(one["train_000000.bin"][1024:], np.uint16).tolist()
        start = len(CORPUS) - round(len(CORPUS) * 0.1)
        assert shard == [tok.bos_id, *tok.encode(CORPUS[:start])]
    shown = run(tmp_path, "prepare.py", "--dataset=one", "--inspect=The FILE").stdout
    assert shown.split("\n")[1].split() == [str(i) for i in tok.encode("The FILE")]


def test_inspect_shows_tokens_ids_and_statistics(make, capsys, monkeypatch):
    tok, text = make("bpe"), "return\n\tx漢\x1b[0m"
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    show_tokens(tok, text)
    lines = capsys.readouterr().out.split("\n")
    ids = tok.encode(text)
    assert lines[1] == " ".join(map(str, ids))
    assert lines[0].count("|") == len(ids) - 1
    raw = lines[0].replace("|", "").encode().decode("unicode_escape").encode("latin-1")
    assert raw.decode() == text.replace("漢", raw.decode()[9]) and "\x1b" not in lines[0]
    assert f"tokens: {len(ids)}" in lines
    assert any(f"vocabulary: {tok.n_vocab}, of them 4 special, 256 of one byte" in n for n in lines)
    histogram = [re.fullmatch(r" *(\d+) bytes +([\d,]+) #*", line) for line in lines]
    histogram = {int(m[1]): int(m[2]) for m in histogram if m}
    assert sum(histogram.values()) == tok.n_vocab - 4 and histogram[1] == 256
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_tokens(tok, text)
    coloured = capsys.readouterr().out.split("\n")
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in coloured]
    assert plain[0] == lines[0].replace("|", "") and plain[1:] == lines[1:]
    assert "\x1b" in coloured[0]


BAD = [
    ("--normalize=nfx", "normalize=nfx: expected some of nfc, nfkc, lower"),
    ("--special_tokens=['<a>']", "special_tokens=['<a>']: expected two or more different names"),
    ("--special_tokens=['a','a']", "special_tokens=['a', 'a']: expected two or more different"),
    ("--special_tokens=['a',1]", "special_tokens=['a', 1]: expected two or more different names"),
    ("--tokenizer=word --vocab_size=5", "vocab_size=5: expected 6 or more"),
    ("--tokenizer=unigram --vocab_size=259", "vocab_size=259: expected 260 or more"),
    ("--tokenizer=words", "--tokenizer=words: expected bpe, byte, char, unigram, word, wordpiece,"),
    ("--normalize=lower --tokenizer=folder", "normalize=lower: the tokenizer in folder is taken"),
    ("--normalize=nfc --source=fineweb10B", "normalize=nfc: the tokenizer of fineweb10B is taken"),
    ("--roles={'bot':'<s>'}", "roles={'bot': '<s>'}: 'bot': expected some of bos, eos, pad, unk"),
    ("--roles={'cls':1}", "roles={'cls': 1}: cls: expected the name of a token"),
    ("--roles={'cls':'[C]'} --tokenizer=folder", "roles={'cls': '[C]'}: the tokenizer in folder"),
    ("--roles={'cls':'[C]'} --tokenizer=word --vocab_size=6", "vocab_size=6: expected 7 or more"),
    ("--inspect=x", "data/python: no tokenizer.json here"),
]


@pytest.mark.parametrize("args, message", BAD)
def test_bad_settings_are_a_line(args, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("some text")
    done = run(tmp_path, "prepare.py", "--source=text.txt", *args.split(), check=False)
    assert done.returncode == 1 and done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1 and not (tmp_path / "data").exists()


def test_bpe_splits_by_the_patterns_of_rust(make):
    spec = json.loads(json.dumps(make("bpe").spec))
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\x{4E00}|\w+|\W"}
    tok = Tokenizer(spec, {})
    assert tok.decode(tok.encode("one 一, two")) == "one 一, two"


# What our own encoders run, and what the library does

OWN = ["gpt2", "llama3", "qwen3", "smollm2"]
WITHOUT_LIBRARY = """
import json, sys
sys.modules["tokenizers"] = None  # import raises ImportError
from pathlib import Path
from barelm.bpe import finished_tokenizer
from barelm.run import UserError
from barelm.tokenizer import Tokenizer
fixtures = Path(sys.argv[1])
golden = json.loads((fixtures / "expected.json").read_text())
for name in sys.argv[2:]:
    tok = Tokenizer.from_folder(fixtures / name)
    assert [tok.encode(text) for text in golden["texts"]] == golden[name]["ids"]
    assert [tok.decode(ids) for ids in golden[name]["ids"]] == golden[name]["decoded"]
for ask, name in ((Tokenizer.from_folder, fixtures / "llama2"), (finished_tokenizer, "unigram")):
    try:
        ask(name)
    except UserError as error:
        print(error)
"""


def test_byte_level_bpe_needs_no_library_and_others_name_it():
    args = [sys.executable, "-c", WITHOUT_LIBRARY, str(FIXTURES), *OWN]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True)
    llama2, unigram = done.stdout.splitlines()
    install = "needs tokenizers: pip install tokenizers"
    assert llama2 == f"{FIXTURES}/llama2/tokenizer.json: the normalizer Prepend {install}"
    assert unigram == f"--tokenizer=unigram {install}"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_encoder(kind, make):
    expected = {"bpe": ByteBPE, "byte": ByteBPE, "char": Words, "word": Words}
    assert type(make(kind).encoder) is expected.get(kind, LibraryEncoder)


def test_each_family_has_its_encoder():
    for path in FIXTURES.iterdir():
        if path.is_dir() and path.name in OWN:
            assert type(Tokenizer.from_folder(path).encoder) is ByteBPE
        elif path.is_dir():
            pytest.importorskip("tokenizers")
            assert type(Tokenizer.from_folder(path).encoder) is LibraryEncoder


SPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
WORDPIECE = {"type": "WordPiece", "prefix": "##", "cleanup": False}
CTC = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
BERT |= {"strip_accents": None, "lowercase": True}


def changed(name, make):
    """A tokenizer.json that our encoders do not run, of an unusual form: (spec, config)."""
    bpe, unigram, pieces, words = (make(k).spec for k in ("bpe", "unigram", "wordpiece", "word"))
    model = lambda spec, **change: {"model": spec["model"] | change}
    vocab = [[" " if t == "Ġ" else t, s] for t, s in unigram["model"]["vocab"]]
    vocab = [[t.replace("Ġ", "▁").replace(" ", "▁"), s] for t, s in vocab]
    plain = [bpe["added_tokens"][0] | {"id": SIZE, "content": "<x>", "special": False}]
    forms = {
        "T5": unigram | {"pre_tokenizer": SPACE, "decoder": SPACE, "normalizer": None}
        | model(unigram, vocab=vocab, unk_id=0),
        "BERT": pieces | {"pre_tokenizer": {"type": "BertPreTokenizer"}, "normalizer": BERT},
        "RoBERTa": bpe | {"pre_tokenizer": LEVEL | {"add_prefix_space": True}},
        "dropped suffixes": bpe | model(bpe, end_of_word_suffix="</w>"),
        "merges in another order": bpe | model(bpe, merges=bpe["model"]["merges"][::-1]),
        "a merge less": bpe | model(bpe, merges=bpe["model"]["merges"][:-1]),
        "accents": words | {"normalizer": {"type": "StripAccents"}},
        "words": words | {"pre_tokenizer": pieces["pre_tokenizer"]},
        "no decoder": pieces | {"decoder": None},
        "lstrip": bpe | {"added_tokens": [*bpe["added_tokens"], plain[0] | {"lstrip": True}]},
        "single": bpe | {"added_tokens": [*bpe["added_tokens"], plain[0] | {"single_word": True}]},
        "borders": bpe | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\b"}, "behavior": "Isolated", "invert": False},
            LEVEL | {"use_regex": False}]}},
    }  # fmt: skip
    return forms[name]


UNUSUAL = ["T5", "BERT", "RoBERTa", "dropped suffixes", "merges in another order", "a merge less"]
UNUSUAL += ["accents", "words", "no decoder", "lstrip", "single", "borders"]


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_ours_runs_by_the_library(name, make):
    tokenizers = pytest.importorskip("tokenizers")
    spec = changed(name, make)
    tok = Tokenizer(spec, make("bpe").config)
    assert type(tok.encoder) is LibraryEncoder
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    texts = [*TEXTS, "a  <x> b<x>c", "e\u0301t\u00e9 Déjà"]
    for text in texts:
        ids = tok.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        assert [id for id, _, _ in tok.encoder.spans(text)] == ids
        # What is streamed is what is decoded, but for the space before the first word.
        unknown = {tok.special.get("<|unk|>")}.intersection(ids)
        stream = b"".join(map(tok.token_bytes, ids)).decode(errors="replace")
        if not unknown and "\ufffd" not in stream:
            assert tok.decode(ids) in (stream, stream.removeprefix(" "))
    named = "".join(tok.special)  # no special token is read from text, in a process of a pool too
    special = {tok.special[name] for name in tok.special if name != "<x>"} - {
        tok.special.get("<|unk|>")
    }
    for same in (tok, pickle.loads(pickle.dumps(tok))):
        assert not special.intersection(same.encode(named))
        assert [a.tolist() for a in same.encode_batch(texts, 2)] == [tok.encode(t) for t in texts]
    talk = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "It is"}]
    ids, mask = tok.chat(talk)
    said = tok.decode([id for id, m in zip(ids, mask) if m])
    assert said.replace(" ", "").replace("\n", "").endswith("<|im_end|>")
    assert tok.special["<|im_end|>"] in ids and "user" not in said


def test_a_space_is_put_before_the_first_words_of_a_chat_alone():
    pytest.importorskip("tokenizers")
    tok = Tokenizer.from_folder(FIXTURES / "mistral")  # whose prepend_scheme is "first"
    first, later = (tok.encoder.spans("a b", first) for first in (True, False))
    assert len(first) == len(later) + 1 and first[1:] == later
    assert [begin for _, begin, _ in later] == [0, 1, 2]


def test_roles_of_bert_begin_a_text(make):
    tokenizers = pytest.importorskip("tokenizers")
    spec = make("bpe").spec
    name, id = spec["added_tokens"][1]["content"], spec["added_tokens"][1]["id"]
    post = {"type": "RobertaProcessing", "cls": [name, id], "sep": [name, id]}
    spec = spec | {"post_processor": post | {"trim_offsets": True, "add_prefix_space": False}}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert Tokenizer(spec, {}).prompt("a text") == theirs.encode("a text").ids[:-1]


def test_what_the_library_refuses_is_a_line(make, capfd):
    pytest.importorskip("tokenizers")
    unigram, words = make("unigram"), make("word")
    bare = {k: v for k, v in words.spec["model"]["vocab"].items() if k != "<|unk|>"}
    for tok, change, why in [
        (unigram, {"model": unigram.spec["model"] | {"unk_id": 9999}}, "tokenizers refuses it"),
        (unigram, {"pre_tokenizer": {"type": "Guess"}}, "tokenizers refuses it"),
        (unigram, {"decoder": CTC}, "CTC"),
        (make("bpe"), {"model": make("bpe").spec["model"] | {"dropout": 0.1}}, "dropout"),
        (unigram, {"added_tokens": [unigram.spec["added_tokens"][0] | {"id": 9}]}, "both token 9"),
        (
            unigram,
            {"added_tokens": [unigram.spec["added_tokens"][0] | {"id": 9999}]},
            "the id 9999",
        ),
        (words, {"model": words.spec["model"] | {"vocab": bare}}, "unk"),
        (words, {"model": words.spec["model"] | {"vocab": {}}}, "a model with a vocab"),
    ]:
        with pytest.raises((UserError, KeyError), match=why) as refusal:
            Tokenizer(tok.spec | change, tok.config)
        assert "\n" not in str(refusal.value)


def test_errors_and_panics_of_the_library_are_a_line():
    from barelm.encoders import library_errors

    class PanicException(BaseException):  # as pyo3's is
        pass

    for error in (PanicException("called `unwrap()`\non None"), ValueError("x\ny")):
        with pytest.raises(UserError, match="^tokenizer.json: tokenizers refuses it: [^\n]*$"):
            with library_errors():
                raise error
    with pytest.raises(KeyboardInterrupt), library_errors():
        raise KeyboardInterrupt


def test_a_fork_after_the_library_ran_prints_no_warning(tmp_path):
    """As prepare.py's processes are: a warning of each would stand in the output."""
    pytest.importorskip("tokenizers")
    program = "import os, sys; from barelm.tokenizer import Tokenizer\n"
    program += "tok = Tokenizer.from_folder(sys.argv[1]); tok.encode_batch(['a b'] * 9, 2)\n"
    program += "child = os.fork()\nids = tok.encode('a b')\nif child: os.wait()\n"
    args = [sys.executable, "-c", program, str(FIXTURES / "llama2")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
