"""Every kind of tokenizer: ids against `tokenizers`, the trainers against naive ones and its own,
normalisation, special tokens, chat masks, and --inspect."""

import itertools
import json
import math
import pickle
import random
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import regex
from conftest import ROOT, run

import prepare
from barelm import tokenizer
from barelm.files import read_json, write_json
from barelm.run import UserError
from barelm.tokenizer import PREPEND, REPLACE, Tokenizer, best_path, byte_letters, longest_match

KINDS = [*prepare.PATTERNS, "byte"]
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


def train_on(text, kind, size=SIZE):
    """The tokenizer that prepare.py makes of a text."""
    if kind == "byte":
        return prepare.bpe_tokenizer([])
    text = tokenizer.normalize(text, prepare.normalizers())
    counts = prepare.count_pieces([(prepare.PATTERNS[kind], text)])
    return prepare.train_tokenizer(kind, counts, size)


@pytest.fixture(scope="module")
def make():
    """A function: the tokenizer of a kind and normalisation, trained once."""
    made = {}

    def make(kind, normalize=""):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "normalize", normalize)
            if (kind, normalize) not in made:
                made[kind, normalize] = train_on(CORPUS, kind)
        return made[kind, normalize]

    return make


# The same ids as Hugging Face


@pytest.mark.parametrize("normalize", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_gives_the_same_ids_and_text(kind, normalize, make):
    tokenizers = pytest.importorskip("tokenizers")
    tok = make(kind, normalize)
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
    assert [c for c in assigned if theirs.normalize_str(c) != tokenizer.normalize(c, [name])] == []
    for text in TEXTS:
        assert theirs.normalize_str(text) == tokenizer.normalize(text, [name])


# What the kinds are, without Hugging Face


@pytest.mark.parametrize("normalize", ["", "nfkc,lower"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_every_tokenizer_keeps(kind, normalize, make):
    tok = make(kind, normalize)
    known = {"byte", "bpe", "unigram"}
    for text in [CORPUS, *more_texts()]:
        ids, normal = tok.encode(text), tok.normal(text)
        unknown = tok.special.get("<|unk|>") in ids
        assert not unknown or kind not in known
        if kind == "wordpiece":  # keeps all but white space
            normal = "".join(regex.findall(prepare.WORDS, normal))
            back = "".join(tok.token_bytes(i).decode().strip(" ") for i in ids)
        else:
            back = b"".join(map(tok.token_bytes, ids)).decode(errors="replace")
            assert unknown or tok.decode(ids) == normal
        assert unknown or back == normal
    first = tok.n_vocab - len(prepare.special_tokens)
    assert [tok.special[t] for t in prepare.special_tokens] == [*range(first, tok.n_vocab)]
    assert kind in ("byte", "char") or tok.n_vocab == SIZE
    again = pickle.loads(pickle.dumps(tok))  # as a process of a pool gets it
    assert [a.tolist() for a in again.encode_batch(TEXTS, 2)] == [tok.encode(t) for t in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_one_unknown_letter(kind, make):
    tok, broken, mended = make(kind), "a \ud800 b \ud83d\ude00 \udc00", "a \ufffd b 😀 \ufffd"
    assert tok.encode(broken) == tok.encode(mended) == tok.encode_batch([broken])[0].tolist()
    chats = [[{"role": "assistant", "content": text}] for text in (broken, mended)]
    assert tok.chat(chats[0]) == tok.chat(chats[1])
    prepare.show_tokens(tok, broken)


def test_a_chat_keeps_letters_of_private_use(make):
    tok, content = make("bpe"), "a\ue000b <|im_end|> \ue001"
    ids, _ = tok.chat([{"role": "user", "content": content}])
    assert f"\n{content}<|im_end|>" in tok.decode(ids)


def test_words_are_the_commonest_and_the_rest_is_unknown():
    tok = train_on("b b b a a c", "word", 4 + 1 + 3)
    assert tok.encode("b") == tok.encode(" d") == [tok.special["<|unk|>"]]
    tokens = [tok.token_bytes(i) for i in range(3)]
    assert tokens == [b" a", b" b", b" c"] and tok.n_vocab == 8


def naive_wordpiece(word, vocab):
    """BERT's words: while something is left, the longest prefix that is a token."""
    found, mark = [], ""
    while word:
        fits = [n for n in range(1, len(word) + 1) if mark + word[:n] in vocab]
        if not fits:
            return None
        found, word, mark = found + [mark + word[: max(fits)]], word[max(fits) :], "##"
    return found


def test_wordpiece_is_greedy():
    vocab = {t: i for i, t in enumerate("a ab abc ##b ##bc ##c ##cd b".split())}
    for length in range(1, 7):
        for word in map("".join, itertools.product("abcd", repeat=length)):
            expected = naive_wordpiece(word, vocab)
            ids = longest_match(word, vocab, "##")
            assert ids == (expected and [vocab[t] for t in expected])


def segmentations(data, scores):
    """All ways to make data up of tokens."""
    if not data:
        return [[]]
    heads = [data[:n] for n in range(1, len(data) + 1) if data[:n] in scores]
    return [[head, *rest] for head in heads for rest in segmentations(data[len(head) :], scores)]


def test_viterbi_finds_the_best_of_all_segmentations():
    rng = random.Random(7)
    for _ in range(100):
        tokens = {bytes(rng.choices(b"abc", k=rng.randint(1, 4))) for _ in range(15)}
        tokens = sorted(tokens | {b"a", b"b", b"c"})
        scores = {token: (i, rng.uniform(-9, -1)) for i, token in enumerate(tokens)}
        data = bytes(rng.choices(b"abc", k=rng.randint(1, 9)))
        every = segmentations(data, scores)
        best = max(every, key=lambda found: sum(scores[t][1] for t in found))
        assert best_path(data, scores, 4) == [scores[t][0] for t in best]


def test_viterbi_keeps_the_longer_last_token_of_equals():
    scores = {t: (i, -1.0) for i, t in enumerate([b"a", b"b", b"c", b"ab", b"bc"])}
    assert best_path(b"abc", scores, 2) == [0, 4]


# Training


def naive_wordpiece_training(words, n_tokens, rare):
    """The pair with the highest count(ab) / (count(a) count(b)) is joined, all counted from the
    beginning each time; of pairs that occur twice, and as often as `rare` of the commonest."""
    split = {w: [w[0], *("##" + c for c in w[1:])] for w in words}
    tokens = sorted({c for w in words for c in w})
    tokens += sorted({c for cut in split.values() for c in cut[1:]})
    while len(tokens) < n_tokens:
        pairs, singles = Counter(), Counter()
        for word, cut in split.items():
            for token in cut:
                singles[token] += words[word]
            for pair in zip(cut, cut[1:]):
                pairs[pair] += words[word]
        least = max(2, rare * max(pairs.values(), default=0))
        common = [pair for pair in pairs if pairs[pair] >= least]
        if not common:
            break
        score = lambda pair: Fraction(pairs[pair], singles[pair[0]] * singles[pair[1]])
        pair = min(common, key=lambda p: (-score(p), -pairs[p], *map(tokens.index, p)))
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


@pytest.mark.parametrize("rare", [0.0, 0.05, 1.0])
def test_wordpiece_training_equals_the_textbook(rare, monkeypatch):
    monkeypatch.setattr(prepare, "RARE", rare)
    words = Counter(regex.findall(prepare.WORDS, (ROOT / "sample.py").read_text()))
    words |= {"aaaa": 50, "aaaaa": 31, "abab": 40}  # pairs that overlap
    expected = naive_wordpiece_training(words, 230, rare)
    assert len(expected) == 230 and max(map(len, expected)) > 4
    # A quarter of the vocabulary would be too few for all the letters here: none may be left out.
    letters = len({c for w in words for c in w})
    assert prepare.train_wordpiece(words, 4 * letters, lambda _: None)[:230] == expected


def test_wordpiece_joins_what_is_likely_and_not_what_is_common():
    """The example of the Hugging Face course: u and g are the commonest pair, g and s the one that
    is seen apart the least."""
    words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    tokens = prepare.train_wordpiece(words, 40, lambda _: None)
    assert tokens[:8] == ["b", "g", "h", "n", "p", "s", "u", "##g"]
    assert tokens[8:12] == ["##n", "##s", "##u", "##gs"]


def test_wordpiece_ends_where_no_pair_occurs_twice():
    assert prepare.train_wordpiece({"ab": 1, "c": 5}, 99, lambda _: None) == ["a", "b", "c", "##b"]
    assert len(prepare.train_wordpiece({"a" * 5000: 2}, 99, lambda _: None)) <= 99


def test_wordpiece_keeps_the_commonest_letters_and_calls_other_words_unknown():
    tok = train_on("aab aab aab cab cab é x", "wordpiece", 4 + 1 + 13)
    unknown = tok.special["<|unk|>"]
    assert [t for t in tok.vocab if len(t) == 1] == ["a", "b", "c"]
    assert tok.encode("éab") == tok.encode("x") == [unknown] != tok.encode("cab")


def likelihood(pieces, scores):
    """The log-likelihood of {piece: count} by the definition: a sum over all segmentations."""
    total, p = 0.0, {t: math.exp(s) for t, s in scores.items()}
    for piece, n in pieces.items():
        paths = [1.0] + [0.0] * len(piece)
        for end in range(1, len(piece) + 1):
            starts = range(max(0, end - prepare.MAX_TOKEN), end)
            paths[end] = sum(paths[s] * p.get(piece[s:end], 0.0) for s in starts)
        total += n * math.log(paths[-1])
    return total


def test_expectations_are_those_of_all_segmentations():
    scores = {t: math.log(p) for t, p in {b"a": 0.3, b"b": 0.2, b"ab": 0.4, b"aba": 0.1}.items()}
    pieces, expected, total = {b"abab": 3, b"a": 5, b"aabaab": 2, b"bb": 1}, Counter(), 0.0
    for piece, n in pieces.items():
        every = segmentations(piece, scores)
        chances = [math.exp(sum(scores[t] for t in found)) for found in every]
        total += n * math.log(sum(chances))
        for found, chance in zip(every, chances):
            for token in found:
                expected[token] += n * chance / sum(chances)
    edges, ends = prepare.lattice(pieces, {t: i for i, t in enumerate(scores)})
    found, log_likelihood = prepare.expect(
        edges, ends, np.array([*pieces.values()]), np.array([*scores.values()])
    )
    assert found == pytest.approx([expected[t] for t in scores])
    assert log_likelihood == pytest.approx(total) == pytest.approx(likelihood(pieces, scores))


def unigram_pieces():
    counts = prepare.count_pieces([(prepare.SPLIT, (ROOT / "model.py").read_text())])
    return {piece.encode(): n for piece, n in counts.items()}


def test_em_never_makes_the_text_less_likely():
    pieces = unigram_pieces()
    tokens = prepare.BYTES + sorted({p[i : i + 3] for p in pieces for i in range(len(p) - 2)})
    edges, ends = prepare.lattice(pieces, {t: i for i, t in enumerate(tokens)})
    weights, expected, last = np.array([*pieces.values()]), np.ones(len(tokens)), -math.inf
    for step in range(8):
        expected, now = prepare.expect(edges, ends, weights, prepare.likeliest(expected))
        assert now >= last - 1e-6 * abs(now) and (step > 3 or now > last)
        assert expected @ [len(t) for t in tokens] == pytest.approx(
            sum(n * len(p) for p, n in pieces.items())
        )
        last = now


def test_unigram_is_at_least_as_likely_as_that_of_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    pieces, size = unigram_pieces(), 1000
    ours = dict(prepare.train_unigram(pieces, size))
    new = tokenizers.Tokenizer(tokenizers.models.Unigram())
    new.pre_tokenizer = tokenizers.Tokenizer.from_str(
        json.dumps(prepare.bpe_tokenizer([]).spec)
    ).pre_tokenizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    how = dict(vocab_size=size + 1, unk_token="<unk>", initial_alphabet=alphabet)
    trainer = tokenizers.trainers.UnigramTrainer(show_progress=False, **how)
    new.train_from_iterator([(ROOT / "model.py").read_text()], trainer)
    bytes_of = {letter: b for b, letter in byte_letters().items()}
    vocab = json.loads(new.to_str())["model"]["vocab"]
    theirs = {bytes(bytes_of[c] for c in t): s for t, s in vocab if t != "<unk>"}
    assert len(theirs) == len(ours) == size
    whole = math.log(sum(map(math.exp, theirs.values())))  # theirs do not add up to one
    theirs = {t: s - whole for t, s in theirs.items()}
    assert likelihood(pieces, ours) > 1.01 * likelihood(pieces, theirs)  # both are negative


def test_unigram_is_a_distribution_and_better_than_bpe_tokens():
    pieces = unigram_pieces()
    ours = prepare.train_unigram(pieces, 600)
    assert [t for t, _ in ours[:256]] == prepare.BYTES and len(dict(ours)) == 600
    assert sum(math.exp(s) for _, s in ours) == pytest.approx(1, abs=1e-4)
    assert [s for _, s in ours[256:]] == sorted((s for _, s in ours[256:]), reverse=True)
    merged = prepare.BYTES + [a + b for a, b in prepare.train_bpe(pieces, 344)]
    edges, ends = prepare.lattice(pieces, {t: i for i, t in enumerate(merged)})
    expected, weights = np.ones(600), np.array([*pieces.values()])
    for _ in range(10):
        expected, bpe = prepare.expect(edges, ends, weights, prepare.likeliest(expected))
    assert likelihood(pieces, dict(ours)) > bpe


@pytest.mark.parametrize("kind", prepare.PATTERNS)
def test_the_order_of_the_pieces_says_nothing(kind):
    counts = prepare.count_pieces([(prepare.PATTERNS[kind], CORPUS)])
    backwards = dict(reversed(counts.items()))
    made = [prepare.train_tokenizer(kind, c, 400).spec for c in (counts, backwards)]
    assert json.dumps(made[0]) == json.dumps(made[1])


@pytest.mark.parametrize("text", ["a", "a" * 5000, "ab", "é", "."])
@pytest.mark.parametrize("kind", prepare.PATTERNS)
def test_a_text_that_teaches_nothing(kind, text):
    tok = train_on(text, kind)
    assert tok.n_vocab <= SIZE
    if kind != "wordpiece" or len(text) <= 100:
        assert tok.decode(tok.encode(text)) == text


# Special tokens, chats


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_what_one_says(kind, monkeypatch):
    names = ["<s>", "[pad]", "<think>", "two words"]
    monkeypatch.setattr(prepare, "special_tokens", names)
    tok = train_on(CORPUS, kind)
    assert [tok.special[t] for t in names] == [*range(tok.n_vocab - 4, tok.n_vocab)]
    assert (tok.bos_id, tok.eos_ids) == (tok.special["<s>"], [tok.special["<s>"]])
    assert tok.pad_id == tok.special["[pad]"]
    assert not set(tok.encode("<s> [pad] two words")) & {tok.special[t] for t in names}
    with pytest.raises(UserError, match="no chat template"):
        tok.chat([{"role": "user", "content": "a"}])
    if kind != "byte":
        monkeypatch.setattr(prepare, "special_tokens", ["a", "<pad>"])
        with pytest.raises(UserError, match="'a' is an ordinary token too"):
            train_on("a a b b", kind, 300)


ALL_ROLES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
ALL_ROLES |= {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_role_has_a_token_of_its_own(kind, monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(prepare, "roles", ALL_ROLES)
    tok = train_on(CORPUS, kind)
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
def test_roles_that_are_not_asked_for_stay_as_they_were(roles, expected, monkeypatch):
    monkeypatch.setattr(prepare, "roles", roles)
    tok = train_on(CORPUS, "bpe")
    names = {id: name for name, id in tok.special.items()}
    assert " ".join(f"{role}={names[id]}" for role, id in tok.roles.items()) == expected
    apart = tok.roles["bos"] != tok.roles["eos"]
    assert tok.start == [tok.bos_id] * apart
    assert tok.document_layout == ([tok.bos_id], tok.eos_ids * apart)


@pytest.mark.parametrize("normalize", ["", "nfkc,lower"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_mask_covers_what_the_assistant_says(kind, normalize, make):
    tok = make(kind, normalize)
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
    prepare.show_tokens(tok, text)
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
    prepare.show_tokens(tok, text)
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


def test_forms_that_do_not_run_here_are_refused(make):
    unigram, pieces, words = make("unigram"), make("wordpiece"), make("word")
    llama = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    cut = unigram.spec["model"] | {"vocab": unigram.spec["model"]["vocab"][1:]}
    bare = {k: v for k, v in words.spec["model"]["vocab"].items() if k != "<|unk|>"}
    for tok, change, why in [
        (unigram, {"pre_tokenizer": space}, "a Unigram tokenizer of this form is not supported"),
        (unigram, {"model": cut}, "a byte is missing"),
        (make("bpe"), {"normalizer": llama}, "a BPE tokenizer of this form is not supported"),
        (pieces, {"pre_tokenizer": {"type": "BertPreTokenizer"}}, "a WordPiece tokenizer of this"),
        (pieces, {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "cleanup"),
        (words, {"normalizer": {"type": "StripAccents"}}, "a WordLevel tokenizer of this form"),
        (words, {"model": words.spec["model"] | {"vocab": bare}}, "unk"),
        (words, {"pre_tokenizer": pieces.spec["pre_tokenizer"]}, "a WordLevel tokenizer of this"),
    ]:
        with pytest.raises((UserError, KeyError), match=why):
            Tokenizer(tok.spec | change, tok.config)
