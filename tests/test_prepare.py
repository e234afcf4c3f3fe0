"""prepare.py: tokenizers against independent ones, shards byte by byte, downloads from a bad
server, and every way to fail."""

import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex
import tiktoken
from conftest import ROOT, join, run, stalled

import prepare
import train
from barelm import sources, synthetic
from barelm.bpe import ASCII, bpe_tokenizer, train_bpe
from barelm.download import download
from barelm.run import UserError, setup
from barelm.shards import open_shard
from barelm.splits import QWEN2_SPLIT
from barelm.tokenizer import Tokenizer
from barelm.workers import end_with_the_parent

SHARED = ROOT.parent / "shared" / "data"
SHAKESPEARE = SHARED / "tinyshakespeare" / "input.txt"
TIKTOKEN = str(SHARED / "tiktoken")
NAMED = ["gpt2", "cl100k_base"]  # the encodings that lie there
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]

TEXTS = [
    "",
    " ",
    "\n",
    "hello",
    "Hello, world!  It's   12345 o'clock.\n\n\n  x",
    "\t\ttabs\r\nCRLF\r\n\r\nold Mac\rend",
    "don't DON'T we'LL they'Ve 'S it'ſ",
    "naïve café Ünïcödé a\u0301 e\u0301 ǅ",
    "日本語のテキスト、漢字。한국어 ไทย हिन्दी",
    "😀👩\u200d👩\u200d👧🇩🇪 \U0010ffff\ue000",
    "\u200b\ufeff\u00a0x\u2028y\u3000z \u0085w",
    "\x00\x01\x1f\x7f",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass C:\n\tpass\n",
    "   leading, trailing   ",
    "١٢٣ ४५६ ⅷ² 1234567 3.14e-10",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.org/?q=a&b=c#d;\n/e\n\n-- +++ ***\n",
    "<|endoftext |> <| endoftext|> < |pad|>",
]


def start_py(cwd, *args, before=lambda: None):
    """Start `python prepare.py args` in the folder cwd as a fork of this process, which has torch
    loaded already: (process, file of its stdout, of its stderr). `before` is called in the fork."""
    out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")

    def child():
        end_with_the_parent()
        os.chdir(cwd)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["prepare.py", *map(str, args)]
        before()
        runpy.run_path(str(ROOT / "prepare.py"), run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process, out, err


def prepare_py(cwd, *args, **kwargs):
    """Run what start_py starts to its end: returncode, stdout, stderr."""
    process, out, err = start_py(cwd, *args, **kwargs)
    join(process, out, err)
    out.seek(0), err.seek(0)
    return SimpleNamespace(returncode=process.exitcode, stdout=out.read(), stderr=err.read())


def main_here(monkeypatch, cwd, unit_bytes=None, **settings):
    """prepare.py's main in this process, with these of its globals; and with units of so many
    bytes at least."""
    monkeypatch.chdir(cwd)
    if unit_bytes:
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    for key, value in settings.items():
        monkeypatch.setattr(prepare, key, value)
    prepare.main()


def done_well(result):
    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
    return result


def files(folder):
    """{path: bytes} of all that is below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")


def read_shard(path):
    """The ids of a shard, by llm.c's definition of the format, and their width in bytes."""
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    width = {(20240520, 1): 2, (20240801, 7): 4}[header[:2]]
    assert header[3:] == (0,) * 253
    n = header[2]
    return list(struct.unpack(f"<{n}{'H' if width == 2 else 'I'}", data[1024:])), width


def read_split(folder, split):
    """The ids of a split, all its shards after one another."""
    paths = sorted(folder.glob(f"{split}_*.bin"))
    return [id for path in paths for id in read_shard(path)[0]]


def documents_of(folder, split):
    """The documents of a split: what follows each end-of-text token, decoded."""
    tok, docs = Tokenizer.from_folder(folder), []
    ids = read_split(folder, split)
    assert not ids or ids[0] == tok.special["<|endoftext|>"]
    for id in ids:
        docs.append([]) if id == tok.special["<|endoftext|>"] else docs[-1].append(id)
    return [b"".join(map(tok.token_bytes, doc)).decode() for doc in docs]


def source_texts():
    """The texts of prepare.py's `source`, as they are."""
    units = prepare.plan(setup("cpu"))
    documents = [doc for unit in units for doc in sources.documents(unit, "text", [])]
    return [doc["text"] for doc in documents if doc["text"].strip()]


def made_up_documents(n, seed=0):
    """Some documents of some lines each, all different."""
    rng, words = (
        random.Random(seed),
        "the a cat dog sees hears old young größe 猫 and x = f(1)".split(),
    )
    line = lambda: " ".join(rng.choices(words, k=rng.randint(1, 9))) + "\n"
    return [f"{i}: " + "".join(line() for _ in range(rng.randint(1, 6))) for i in range(n)]


# --------------------------------------------------------------------------------------------------
# Tokenizers


def naive_bpe(pieces, n_merges):
    """The textbook: count all pairs, merge the commonest (of equals the lowest ids), repeat."""
    tokens, merges = [bytes([b]) for b in range(256)], []
    words = [(list(piece), n) for piece, n in pieces.items()]
    while len(merges) < n_merges:
        counts = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                counts[pair] += n
        new = [(-n, (a, b)) for (a, b), n in counts.items() if tokens[a] + tokens[b] not in tokens]
        n, (a, b) = min(new, default=(0, (0, 0)))
        if n > -2:
            break
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if word[i : i + 2] == [a, b]:
                    word[i : i + 2] = [len(tokens) - 1]
                i += 1
    return merges


def some_pieces(name):
    rng = random.Random(1)
    texts = {
        "one letter": "a" * 50 + " " + "a" * 37,
        "two letters": " ".join("".join(rng.choices("ab", k=1 + i % 12)) for i in range(300)),
        "abab": "ab" * 40 + " " + "aba" * 30 + " " + "ba" * 9,
        "unicode": "".join(TEXTS) * 2 + "日本語の日本のテキスト" * 3,
        "python": (ROOT / "prepare.py").read_text()[:6000],
        "few pairs": "abc abd xyz",
        "nothing": "",
    }
    return {p.encode(): n for p, n in Counter(regex.findall(QWEN2_SPLIT, texts[name])).items()}


SIZES = {"one letter": 40, "two letters": 400, "abab": 60, "unicode": 150, "python": 200}


@pytest.mark.parametrize("name, n_merges", [*SIZES.items(), ("few pairs", 50), ("nothing", 10)])
def test_bpe_training_equals_the_textbook(name, n_merges):
    pieces = some_pieces(name)
    expected = naive_bpe(pieces, n_merges)
    assert train_bpe(pieces, n_merges) == expected
    backwards = dict(reversed(pieces.items()))  # the order of the pieces says nothing
    assert train_bpe(backwards, n_merges) == expected
    if name in ("unicode", "python"):
        assert len(expected) == n_merges
    if name == "few pairs":  # "ab" and " a" occur twice, and nothing else
        assert expected == [(b"a", b"b")]


def test_bpe_training_is_the_example_of_its_docstring():
    merges = train_bpe({b"low": 5, b"lower": 2, b"newest": 6}, 3)
    assert merges == [(b"w", b"e"), (b"l", b"o"), (b"e", b"we")]


def test_every_byte_is_a_token_and_every_text_comes_back():
    merges = train_bpe(some_pieces("unicode"), 100)
    tok = bpe_tokenizer(merges)
    assert [tok.token_bytes(b) for b in range(256)] == [bytes([b]) for b in range(256)]
    assert [tok.token_bytes(256 + i) for i in range(len(merges))] == [a + b for a, b in merges]
    assert [tok.special[name] for name in SPECIAL] == list(range(tok.n_vocab - 4, tok.n_vocab))
    rng = random.Random(2)
    points = [*range(0x3000), *range(0x3000, 0x110000, 23)]
    characters = [chr(c) for c in points if not 0xD800 <= c < 0xE000]
    rng.shuffle(characters)
    random_texts = ["".join(rng.choices("a \n\r\t'é😀1.<|", k=30)) for _ in range(300)]
    for text in [*TEXTS, *SPECIAL, *random_texts, "".join(characters)]:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert b"".join(map(tok.token_bytes, ids)) == text.encode()
        assert max(ids, default=0) < tok.n_vocab - 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function: the data set that prepare.py makes of a text with a tokenizer, made once."""
    place, made = tmp_path_factory.mktemp("tokenizers"), {}
    (place / "text.txt").write_text(
        "".join(TEXTS) * 2 + (ROOT / "train.py").read_text(), newline=""
    )

    def make(tokenizer):
        if tokenizer in NAMED and not (SHARED / "tiktoken").is_dir():
            pytest.skip("no tiktoken tables here")
        if tokenizer not in made:
            args = "--source=text.txt", f"--dataset={tokenizer}", "--vocab_size=600"
            before = lambda: os.environ.update(TIKTOKEN_CACHE_DIR=TIKTOKEN)
            done_well(prepare_py(place, *args, f"--tokenizer={tokenizer}", before=before))
            made[tokenizer] = place / "data" / tokenizer
        return made[tokenizer]

    return make


@pytest.mark.parametrize("kind", ["bpe", "byte", "char", *NAMED])
def test_tokenizers_reads_our_tokenizer_json_alike(kind, folders):
    tokenizers = pytest.importorskip("tokenizers")
    tok = Tokenizer.from_folder(folders(kind))
    theirs = tokenizers.Tokenizer.from_file(str(folders(kind) / "tokenizer.json"))
    texts = [*TEXTS, (ROOT / "train.py").read_text()]
    if SHAKESPEARE.is_file():
        texts.append(SHAKESPEARE.read_text()[:100_000])
    rng = random.Random(3)
    texts += ["".join(rng.choices("aé \n\r\t'.,1/漢😀S\u00a0", k=25)) for _ in range(200)]
    for text in texts:
        ids = tok.encode(text)
        assert theirs.encode(text).ids == ids
        if kind != "char":  # there an unknown character is lost
            assert theirs.decode(ids, skip_special_tokens=False) == text
    for name, id in tok.special.items():
        assert theirs.token_to_id(name) == id


@pytest.mark.parametrize("kind", ["bpe", "byte", "char", *NAMED])
def test_transformers_reads_our_tokenizer_alike(kind, folders):
    transformers = pytest.importorskip("transformers")
    tok = Tokenizer.from_folder(folders(kind))
    theirs = transformers.AutoTokenizer.from_pretrained(folders(kind))
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tok.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tok.bos_id,
        tok.eos_ids[0],
        tok.pad_id,
    )
    messages = [{"role": "user", "content": "Hi!"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nHi!<|im_end|>\n"
    )


@pytest.mark.parametrize("name", NAMED)
def test_a_named_encoding_is_tiktokens(name, folders, monkeypatch):
    tok = Tokenizer.from_folder(folders(name))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", TIKTOKEN)
    encoding = tiktoken.get_encoding(name)
    for text in [*TEXTS, *SPECIAL, (ROOT / "model.py").read_text()]:
        assert tok.encode(text) == encoding.encode_ordinary(text)
    assert tok.eos_ids == [encoding.eot_token]
    ours = set(range(encoding.n_vocab, encoding.n_vocab + 4))
    assert {tok.special[name] for name in SPECIAL[1:]} < ours  # added behind, none moved
    assert {t: tok.special[t] for t in encoding.special_tokens_set} == encoding._special_tokens


def test_the_tokenizer_of_a_folder_is_taken_as_it_is(folders, tmp_path):
    (tmp_path / "text.txt").write_text("hello world\n" * 30)
    done_well(prepare_py(tmp_path, "--source=text.txt", f"--tokenizer={folders('bpe')}"))
    for name in "tokenizer.json", "tokenizer_config.json":
        ours, theirs = tmp_path / "data/python" / name, folders("bpe") / name
        assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    assert "".join(documents_of(tmp_path / "data/python", "train")).startswith("hello world\n")


@pytest.mark.parametrize("kind", ["bpe", "byte", *NAMED])
def test_a_long_text_is_cut_where_no_token_spans(kind, folders, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 40)
    tok, rng = Tokenizer.from_folder(folders(kind)), random.Random(4)
    texts = ["".join(rng.choices("ab \n\n\r\t1;/.'é", k=3000)) for _ in range(5)]
    for text in [(ROOT / "model.py").read_text()[:20_000], "x\n" * 500, "no end " * 50, *texts]:
        parts = list(prepare.pieces_of(text))
        assert "".join(parts) == text
        assert [id for part in parts for id in tok.encode(part)] == tok.encode(text)
    assert len(parts) > 10


# --------------------------------------------------------------------------------------------------
# Shards


def test_real_command_shards_decode_to_the_documents(tmp_path):
    texts = made_up_documents(200)
    texts[3] = "a\n\n<|endoftext|>\n<|im_start|> is text<|pad|>\r\n  😀\t\n"
    texts[50] = " \n"  # blank: no document
    write_jsonl(tmp_path / "docs.jsonl", texts)
    args = "--source=docs.jsonl", "--dataset=docs", "--vocab_size=300", "--val_fraction=0.3"
    done = run(tmp_path, "prepare.py", *args)
    assert done.stderr == ""
    assert "1 documents hold the name of a special token: it is taken as text" in done.stdout
    folder = tmp_path / "data" / "docs"
    names = ["meta.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(files(folder)) == [*names, "train_000000.bin", "val_000000.bin"]
    split = {s: documents_of(folder, s) for s in ("train", "val")}
    del texts[50]
    assert sorted(split["train"] + split["val"]) == sorted(texts)
    for docs in split.values():  # each split keeps the order of the source
        assert docs == [t for t in texts if t in set(docs)]
    assert 35 < len(split["val"]) < 85  # 60 expected, standard deviation 6.5
    meta = json.loads((folder / "meta.json").read_text())
    for name, docs in split.items():
        ids, width = read_shard(folder / f"{name}_000000.bin")
        assert width == 2
        counts = {"documents": len(docs), "bytes": sum(len(d.encode()) for d in docs)}
        counts |= {"tokens": len(ids), "shards": [f"{name}_000000.bin"]}
        assert meta[name] == counts
    assert meta["n_vocab"] == Tokenizer.from_folder(folder).n_vocab == 300
    assert meta["settings"]["val_fraction"] == 0.3 and meta["settings"]["source"] == "docs.jsonl"
    hashes = b"".join(hashlib.blake2b(t.encode(), digest_size=8).digest()[::-1] for t in texts)
    assert meta["source_sha256"] == hashlib.sha256(hashes).hexdigest()
    # another process does the same
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "docs.jsonl", other)
    done_well(prepare_py(other, *args))
    assert files(other / "data") == files(tmp_path / "data")
    # the tokenizer is trained on the training split alone
    pieces = Counter(p for doc in split["train"] for p in regex.findall(QWEN2_SPLIT, doc))
    merges = naive_bpe({p.encode(): n for p, n in pieces.items()}, 300 - 256 - 4)
    tok = Tokenizer.from_folder(folder)
    assert [tok.token_bytes(256 + i) for i in range(len(merges))] == [a + b for a, b in merges]


def test_documents_stay_in_their_split_when_others_are_added(tmp_path):
    texts = made_up_documents(120)
    write_jsonl(tmp_path / "few.jsonl", texts[::2])
    write_jsonl(tmp_path / "all.jsonl", texts)
    for name in "few", "all":
        args = f"--source={name}.jsonl", f"--dataset={name}", "--tokenizer=byte"
        done_well(prepare_py(tmp_path, *args, "--val_fraction=0.2"))
    for split in "train", "val":
        few, whole = (documents_of(tmp_path / "data" / n, split) for n in ("few", "all"))
        assert few and set(few) == set(whole) & set(texts[::2])


@pytest.mark.parametrize("n", [1, 3, 19])
def test_few_documents_are_cut_at_the_last_characters(n, tmp_path):
    texts = made_up_documents(n)
    write_jsonl(tmp_path / "docs.jsonl", texts)
    done_well(prepare_py(tmp_path, "--source=docs.jsonl", "--tokenizer=byte"))
    whole = "".join(texts)
    cut = len(whole) - round(len(whole) * 0.1)
    assert "".join(documents_of(tmp_path / "data/python", "train")) == whole[:cut]
    assert "".join(documents_of(tmp_path / "data/python", "val")) == whole[cut:]


def test_no_validation_split_when_none_is_wanted(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 9)
    done_well(prepare_py(tmp_path, "--source=text.txt", "--tokenizer=byte", "--val_fraction=0"))
    assert documents_of(tmp_path / "data/python", "train") == ["some text\n" * 9]
    assert not list((tmp_path / "data/python").glob("val*"))


def test_the_same_input_gives_the_same_bytes(tmp_path, monkeypatch):
    made = []
    for place, threads in ("a", 1), ("b", 2), ("c", 2):
        (tmp_path / place).mkdir()
        write_jsonl(tmp_path / place / "docs.jsonl", made_up_documents(400))
        if place != "c":
            args = "--source=docs.jsonl", "--vocab_size=400", f"--threads={threads}"
            done_well(prepare_py(tmp_path / place, *args))
        else:  # in many small rounds, and with documents in several parts
            settings = {"source": "docs.jsonl", "vocab_size": 400, "threads": threads}
            main_here(monkeypatch, tmp_path / place, BATCH=50, **settings)
        made.append(files(tmp_path / place / "data"))
    assert made[0] == made[1] == made[2]


def test_shards_are_cut_at_shard_tokens(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", made_up_documents(60))
    for name, size in ("one", 10**8), ("many", 1000):
        args = "--source=docs.jsonl", f"--dataset={name}", "--tokenizer=byte"
        done_well(prepare_py(tmp_path, *args, f"--shard_tokens={size}"))
    one, many = tmp_path / "data" / "one", tmp_path / "data" / "many"
    for split in "train", "val":
        shards = json.loads((many / "meta.json").read_text())[split]["shards"]
        assert shards == sorted(p.name for p in many.glob(f"{split}_*"))
        lengths = [len(read_shard(many / name)[0]) for name in shards]
        assert set(lengths[:-1]) <= {1000} and 0 < lengths[-1] <= 1000
        assert read_split(many, split) == read_split(one, split)
    assert len(list(many.glob("train_*"))) > 3
    # and a new run leaves nothing of the old one behind
    done_well(prepare_py(tmp_path, "--source=docs.jsonl", "--dataset=many", "--tokenizer=byte"))
    assert set(files(many)) == set(files(one))


def test_a_large_vocabulary_is_written_in_32_bits(folders):
    folder = folders("cl100k_base")
    ids, width = read_shard(folder / "train_000000.bin")
    assert width == 4 and ids[0] == 100257 and max(ids[1:]) > 65535
    assert open_shard(folder / "train_000000.bin").tolist() == ids
    ids, width = read_shard(folders("gpt2") / "train_000000.bin")
    assert width == 2 and ids[0] == 50256


# --------------------------------------------------------------------------------------------------
# Sources


def shards_of(cwd, *args):
    """The documents of both splits that prepare.py makes of a source."""
    done_well(prepare_py(cwd, *args, "--tokenizer=byte", "--val_fraction=0"))
    return documents_of(cwd / "data/python", "train")


def test_a_text_file_is_a_document_or_cut_at_the_separator(tmp_path):
    text = "one\r\nline\n---\n\n  two \n\n---\n---\n\ufeffthree\n"
    (tmp_path / "text.txt").write_bytes(text.encode())
    assert shards_of(tmp_path, "--source=text.txt") == [text]
    cut = shards_of(tmp_path, "--source=text.txt", "--separator=---")
    assert cut == ["one\r\nline", "  two ", "\ufeffthree"]
    cut = shards_of(tmp_path, "--source=text.txt", "--separator=---", "--max_documents=2")
    assert cut == ["one\r\nline", "  two "]
    long = ["ab" * 250_000, "é" * 500_000, "c" * 70_000]  # over the edges of what is read at once
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(long))
    assert shards_of(tmp_path, "--source=text.txt", "--separator=<|endoftext|>") == long


def test_jsonl_plain_and_gzipped(tmp_path):
    lines = [
        '{"text": "one\\n\\ud83d\\ude00", "id": 3}',
        "",
        ' {"text": "tw\\ud800o"} ',
        '{"text": ""}',
    ]
    data = "\n".join(lines).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    for name in "a.jsonl", "b.jsonl.gz":  # half a surrogate pair is no character
        assert shards_of(tmp_path, f"--source={name}") == ["one\n😀", "tw\ufffdo"]


def test_a_folder_in_the_order_of_names_without_what_is_no_text(tmp_path):
    for name in "b/2.txt", "b/10.md", "a.txt", ".hidden", ".git/config", "b/.c":
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(f"this is {name}")
    (tmp_path / "folder" / "b" / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "folder" / "nowhere").symlink_to(tmp_path / "missing")
    result = done_well(prepare_py(tmp_path, "--source=folder", "--tokenizer=byte"))
    assert "skipped 1 files that are not UTF-8, such as b/latin.txt\n" in result.stdout
    assert json.loads((tmp_path / "data/python/meta.json").read_text())["skipped"] == [
        "b/latin.txt"
    ]
    docs = shards_of(tmp_path, "--source=folder")
    assert docs == ["this is a.txt", "this is b/10.md", "this is b/2.txt"]


def test_the_default_source_is_the_standard_library_without_its_tests():
    texts = source_texts()
    library = Path(os.__file__).parent
    expected = {"argparse.py": True, "json/decoder.py": True, "test/support/__init__.py": False}
    found = set(texts)
    for name, wanted in expected.items():
        if (library / name).is_file():
            assert ((library / name).read_text() in found) == wanted
    assert Path(pytest.__file__).read_text() not in found
    assert len(texts) > 300


def test_characters_that_training_lacks_are_one_unknown_token(tmp_path):
    (tmp_path / "text.txt").write_text("abc " * 90 + "Z" * 40)  # the last tenth is for validation
    done_well(prepare_py(tmp_path, "--source=text.txt", "--tokenizer=char"))
    tok = Tokenizer.from_folder(tmp_path / "data/python")
    assert [tok.token_bytes(i) for i in range(4)] == [b" ", b"a", b"b", b"c"]
    unknown = tok.special["<|unk|>"]
    assert tok.n_vocab == 4 + 1 + 4 and tok.encode("aZé") == [1, unknown, unknown]
    assert read_split(tmp_path / "data/python", "val") == [tok.bos_id] + [unknown] * 40


# --------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with a prepared data/kept and inputs that are no good."""
    folder = tmp_path_factory.mktemp("bad")
    write_jsonl(folder / "good.jsonl", made_up_documents(30))
    done_well(prepare_py(folder, "--source=good.jsonl", "--dataset=kept", "--vocab_size=270"))
    good, rng = b'{"text": "some text"}\n', random.Random(6)
    packed = gzip.compress(b"".join(b'{"text": "%x"}\n' % rng.getrandbits(400) for _ in range(300)))
    inputs = {
        "empty.txt": b"",
        "blank.txt": b"\n \n",
        "latin.txt": "café".encode("latin-1"),
        "nofield.jsonl": good * 2 + b'{"body": "x"}\n' + good,
        "broken.jsonl": good * 2 + b'{"text": "x\n' + good,
        "number.jsonl": good * 2 + b'{"text": 5}\n',
        "null.jsonl": good * 2 + b'{"text": null}\n',
        "list.jsonl": good * 2 + b'["text"]\n',
        "latin.jsonl": good * 2 + b'{"text": "caf\xe9"}\n',
        "cut.jsonl.gz": gzip.compress(good * 5000)[:-20],
        "damaged.jsonl.gz": packed[:9000] + bytes(40) + packed[9040:],
        "plain.jsonl.gz": good,
        "pieces/tokenizer.json": b'{"model": {"type": "WordPiece", "vocab": {}}}',
        "latins/a.txt": b"\xff\xfe",
    }
    for name, data in inputs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "nothing").mkdir()
    return folder


EXPECTED = 'expected {"text": "..."}, found '
BAD = [
    ("--source=nowhere", "--source=nowhere: no such file or folder, nor one of python, numbers"),
    ("--source=empty.txt", "--source=empty.txt: no text for training in it"),
    ("--source=blank.txt", "--source=blank.txt: no text for training in it"),
    ("--source=nothing", "--source=nothing: no file in it"),
    ("--source=latins", "--source=latins: no text for training in it"),
    ("--source=latin.txt", "latin.txt: not UTF-8 text (unexpected end of data): convert it"),
    ("--source=nofield.jsonl", f'nofield.jsonl:3: {EXPECTED}\'{{"body": "x"}}'),
    ("--source=broken.jsonl", f'broken.jsonl:3: {EXPECTED}\'{{"text": "x'),
    ("--source=number.jsonl", f'number.jsonl:3: {EXPECTED}\'{{"text": 5}}'),
    ("--source=null.jsonl", f'null.jsonl:3: {EXPECTED}\'{{"text": null}}'),
    ("--source=list.jsonl", f'list.jsonl:3: {EXPECTED}\'["text"]'),
    ("--source=latin.jsonl", f'latin.jsonl:3: {EXPECTED}\'{{"text": "caf\ufffd"}}'),
    ("--source=cut.jsonl.gz", "cut.jsonl.gz: damaged after line "),
    ("--source=damaged.jsonl.gz", "damaged.jsonl.gz: damaged after line "),
    ("--source=plain.jsonl.gz", "plain.jsonl.gz: damaged after line 0: Not a gzipped file"),
    ("--vocab_size=259", "vocab_size=259: expected 260 or more"),
    ("--tokenizer=gpt5", "--tokenizer=gpt5: expected bpe, byte, char, "),
    ("--tokenizer=nothing", "nothing: no tokenizer.json here"),
    ("--tokenizer=pieces", "pieces/tokenizer.json: expected a model with a vocab"),
    ("--val_fraction=1", "val_fraction=1.0: expected 0 or more and less than 1"),
    ("--val_fraction=-0.1", "val_fraction=-0.1: expected 0 or more and less than 1"),
    ("--shard_tokens=0", "shard_tokens=0: expected 1 or more"),
    ("--max_documents=0", "max_documents=0: expected 1 or more"),
    ("--threads=-1", "threads=-1: expected 0 or more"),
]


@pytest.mark.parametrize("arg, message", BAD)
def test_bad_input_is_a_line_and_changes_nothing(bad, arg, message):
    before = files(bad)
    result = prepare_py(bad, "--source=good.jsonl", "--dataset=kept", arg)
    assert result.returncode == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert files(bad) == before


@pytest.mark.parametrize("arg", ["--source=empty.txt", "--source=broken.jsonl", "--tokenizer=gpt5"])
def test_bad_input_makes_no_folder(bad, arg):
    assert prepare_py(bad, "--source=good.jsonl", "--dataset=new", arg).returncode == 1
    assert os.listdir(bad / "data") == ["kept"]


def test_bad_input_of_the_real_command(bad):
    done = run(bad, "prepare.py", "--source=nowhere", "--dataset=new", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    names = ", ".join(["python", "numbers", "pychat", "copy:48", *sources.DOWNLOADS, "fineweb10B"])
    message = "--source=nowhere: no such file or folder, nor one of "
    assert done.stderr == message + names + "\n"
    assert not (bad / "data" / "new").exists()


@pytest.mark.parametrize("limit", [40_000, 60_000])
def test_a_full_disk_is_a_line_and_changes_nothing(bad, tmp_path, limit):
    """The limit stops the texts, or the tokens."""
    write_jsonl(tmp_path / "docs.jsonl", made_up_documents(900))
    shutil.copytree(bad / "data", tmp_path / "data")
    before = files(tmp_path)
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for dataset in "kept", "new":
        source = "--source=docs.jsonl", f"--dataset={dataset}", "--tokenizer=byte", "--steps="
        result = prepare_py(tmp_path, *source, before=limited)
        assert result.returncode == 1
        assert result.stderr.endswith("File too large; nothing was changed\n")
        assert result.stderr.count("\n") == 1
        assert files(tmp_path) == before


def opens(monkeypatch, cwd, name):
    """What train.py loads from data/<name>: its files, or None where it refuses."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(train, "dataset", name)
    monkeypatch.setattr(train, "seq_len", 8)
    try:
        train.open_dataset()
    except UserError as error:
        assert f"{name}: no prepared data" in str(error)
        return None
    return {k: v for k, v in files(Path("data") / name).items() if not k.startswith("work")}


def test_killed_at_any_step_of_the_end_it_leaves_the_old_data_the_new_or_none(
    tmp_path, monkeypatch
):
    write_jsonl(tmp_path / "old.jsonl", made_up_documents(40))
    write_jsonl(tmp_path / "new.jsonl", made_up_documents(50, seed=1))
    args = "--dataset=d", "--shard_tokens=5000", "--threads=1"
    done_well(prepare_py(tmp_path, "--source=old.jsonl", "--tokenizer=byte", *args))
    old = files(tmp_path / "data" / "d")
    shutil.copytree(tmp_path / "data" / "d", tmp_path / "old")

    def killing(step, count):
        """Put SIGKILL in the place of the renaming or removal with this number."""

        def instead(function):
            def call(*args, **kwargs):
                if next(count) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        os.replace, os.unlink = instead(os.replace), instead(os.unlink)

    seen, after = [], None
    for step in itertools.count(0, 2):  # every other, to be quick
        shutil.rmtree(tmp_path / "data" / "d")
        shutil.copytree(tmp_path / "old", tmp_path / "data" / "d")
        before = lambda step=step: killing(step, itertools.count())
        result = prepare_py(
            tmp_path, "--source=new.jsonl", "--tokenizer=char", *args, before=before
        )
        seen.append(opens(monkeypatch, tmp_path, "d"))
        if result.returncode != -signal.SIGKILL:
            done_well(result)
            after = files(tmp_path / "data" / "d")
            break
    assert seen[0] == old and None in seen and seen[-1] == after != old
    assert all(state in (old, None, after) for state in seen)
    assert len(seen) > 10 and not [name for name in after if "/" in name]


def exits_at(step):
    """Let the process end, as if killed, in the place of the renaming, removal or syncing with this
    number: the code that runs is the real one."""
    count = itertools.count()

    def instead(function):
        def call(*args, **kwargs):
            if next(count) == step:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "rmdir", "fsync"):
        setattr(os, name, instead(getattr(os, name)))


CRASHES = {
    "plain": ("--source=docs.jsonl", "--tokenizer=char"),
    "mix": (
        "--sources={'a': (1, 'docs.jsonl'), 'b': (2, 'docs.jsonl')}",
        "--steps=",
        "--tokenizer=byte",
    ),
    "task": ("--source=docs.jsonl", "--task=sft"),
}


@pytest.mark.parametrize("kind", CRASHES)
def test_after_a_crash_anywhere_the_same_command_ends_as_if_there_was_none(kind, tmp_path):
    rows = [{"prompt": t, "completion": t[:9], "text": t} for t in made_up_documents(40)]
    old, new = tmp_path / "old", tmp_path / "new"
    for place, part in ((old, rows[:30]), (new, rows)):
        place.mkdir()
        text = "".join(json.dumps(row) + "\n" for row in part)
        (place / "docs.jsonl").write_text(text)
        done_well(prepare_py(place, *CRASHES[kind], "--threads=1"))
    before, after = files(old / "data"), files(new / "data")
    pair = ["python/sft_train.jsonl", "python/sft_val.jsonl"]
    shutil.copy(new / "docs.jsonl", tmp_path)
    steps = 0
    for step in itertools.count(1, {"plain": 13, "mix": 23, "task": 2}[kind]):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(old / "data", tmp_path / "data")
        args = *CRASHES[kind], "--threads=1"
        result = prepare_py(tmp_path, *args, before=lambda step=step: exits_at(step))
        left = files(tmp_path / "data")
        if kind == "task" and pair[0] in left:  # what can be trained on is the old or the new
            assert [left.get(name) for name in pair] in (
                [before[p] for p in pair],
                [after[p] for p in pair],
            )
        elif kind != "task" and "python/meta.json" in left:
            whole = {name: data for name, data in left.items() if "/work" not in name}
            assert whole in (before, after)
        if result.returncode == 0:
            break
        steps += 1
        done_well(prepare_py(tmp_path, *args))
        assert files(tmp_path / "data") == after
    assert steps > 2


@pytest.mark.skipif(sys.platform != "linux", reason="its /proc")
def test_what_vouches_for_files_is_named_after_they_are_on_the_disk(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "docs.jsonl", made_up_documents(30))
    synced, named, late = set(), [], []
    fsync, replace = os.fsync, os.replace

    def log_sync(number):
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def log_name(source, target):
        source, target = Path(source), Path(target)
        named.append(target.name)
        if target.suffix == ".json" and target.parent.name == "work":
            late.extend({f"{target.stem}.txt", f"{target.stem}.rows"} - synced)
        if target.suffix == ".npy" and target.stem.isdigit():
            late.extend({f"{target.stem}.tokens"} - synced)
        if target.suffix == ".tmp" or source.suffix == ".tmp":
            late.extend({source.name} - synced)
        if target.name == "meta.json" and target.parent.name == "d":
            late.extend({"d"} - synced)  # the names of the others
        replace(source, target)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(os, "replace", log_name)
    settings = {"source": "docs.jsonl", "dataset": "d", "tokenizer": "byte", "threads": 1}
    main_here(monkeypatch, tmp_path, **settings)
    assert late == [] and {"train_000000.bin", "0.npy", "meta.json"} <= set(named)


def test_one_run_at_a_time_has_a_folder(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", made_up_documents(30))
    args = "--source=docs.jsonl", "--tokenizer=byte"
    stops = lambda: os.kill(os.getpid(), signal.SIGSTOP)

    def stop_at_the_end():
        replace = os.replace
        os.replace = lambda *args: stops() or replace(*args)

    process, *_ = start_py(tmp_path, *args, "--threads=1", before=stop_at_the_end)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    before = files(tmp_path / "data")
    second = prepare_py(tmp_path, *args)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("data/python: another prepare.py is at work there: wait for it")
    assert files(tmp_path / "data") == before
    process.kill()
    process.join()
    done_well(prepare_py(tmp_path, *args))  # a killed one leaves no lock


def test_a_damaged_part_of_an_earlier_run_is_made_again(tmp_path):
    """As a full disk or a loss of power may leave it."""
    write_jsonl(tmp_path / "docs.jsonl", made_up_documents(30))
    args = "--source=docs.jsonl", "--tokenizer=byte", "--threads=1"
    done_well(prepare_py(tmp_path, *args))
    whole, damages = files(tmp_path / "data"), 0
    for pattern, cut in (("*.rows", False), ("*.txt", True), ("*.json", True), ("*/0.t*", True)):
        assert prepare_py(tmp_path, *args, before=exits_at_shards).returncode == 9
        for path in (tmp_path / "data/python/work").glob(pattern):
            path.write_bytes(path.read_bytes()[:-1]) if cut else path.unlink()
            damages += 1
        done_well(prepare_py(tmp_path, *args))
        assert files(tmp_path / "data") == whole
    assert damages == 4


def exits_at_shards():
    """End where the first shard would get its name: all parts are there."""
    replace = os.replace

    def call(source, target):
        if str(target).endswith(".bin"):
            os._exit(9)
        replace(source, target)

    os.replace = call


def test_killed_while_writing_it_leaves_the_old_data(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "old.jsonl", made_up_documents(40))
    (tmp_path / "new.txt").write_text("new text, line by line\n" * 200_000)
    done_well(prepare_py(tmp_path, "--source=old.jsonl", "--dataset=d", "--tokenizer=byte"))
    old = files(tmp_path / "data" / "d")
    args = "--source=new.txt", "--dataset=d", "--tokenizer=byte", "--threads=1"
    process, *_ = start_py(tmp_path, *args, before=stalled(".json"))
    part = tmp_path / "data" / "d" / "work"
    while not part.exists():
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert part.exists() and opens(monkeypatch, tmp_path, "d") == old
    # what it left is cleared by the next run
    done_well(prepare_py(tmp_path, "--source=old.jsonl", "--dataset=d", "--tokenizer=byte"))
    assert files(tmp_path / "data" / "d") == old


# --------------------------------------------------------------------------------------------------
# Downloads

BODY = random.Random(5).randbytes(300_000)


class Handler(BaseHTTPRequestHandler):
    """A server whose manners are in the path. What it was asked is in `server.asked`."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        kind, wanted = self.path.split("/")[1], self.headers.get("Range")
        self.server.asked.append((kind, wanted))
        first = [k for k, _ in self.server.asked].count(kind) == 1
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = self.server.files.get(self.path, BODY)
        if kind == "missing":
            return self.send_error(404)
        if kind == "busy" and first:
            return self.send_error(503)
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "/plain/file")
            return self.end_headers()
        if kind == "deaf":  # to Range
            begin = 0
        if kind.isdigit():
            return self.send_error(int(kind))
        if begin >= len(body):
            return self.send_error(416)
        if kind == "packed":  # though it was asked not to
            body = gzip.compress(body)
        self.send_response(206 if begin else 200)
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        if kind != "unmeasured":
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        rest = body[begin:]
        short = kind == "truncated" or (kind in ("dropped", "deaf") and first)
        self.wfile.write(rest[: len(rest) * 2 // 3] if short else rest)


@pytest.fixture
def server(monkeypatch):
    """A local server: `url`, `asked` [(path's first part, Range)], `files` {path: body}; and the
    pauses between tries, which are noted instead of taken."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.files, httpd.pauses = [], {}, []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", httpd.pauses.append)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["plain", "dropped", "deaf", "busy", "redirect", "unmeasured"])
def test_downloads_in_spite_of(kind, server, tmp_path, capsys):
    path = tmp_path / "a" / "file"
    sha256 = hashlib.sha256(BODY).hexdigest()
    assert download(f"{server.url}/{kind}/file", path, sha256) == path
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ["file"]
    again = kind in ("dropped", "deaf", "busy")
    assert server.pauses == [1] * again
    assert ("trying again (2 of 5)" in capsys.readouterr().out) == again
    ranges = [wanted for _, wanted in server.asked]
    if kind in ("dropped", "deaf"):  # it goes on from where it was, and begins again where it must
        begin = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
        assert ranges[0] is None and len(BODY) // 2 < begin <= len(BODY) * 2 // 3
    else:
        assert ranges == [None] * len(ranges)
    # what is there is not fetched again
    server.asked.clear()
    download(f"{server.url}/{kind}/file", path, sha256)
    assert server.asked == []


def test_a_truncating_server_leaves_a_part_that_a_later_run_completes(server, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(UserError, match=", 2 times: run it again to go on"):
        download(f"{server.url}/truncated/file", path, tries=2)
    assert os.listdir(tmp_path) == ["file.part"] and server.pauses == [1]
    have = (tmp_path / "file.part").stat().st_size
    assert 0 < have < len(BODY)
    download(f"{server.url}/plain/file", path)
    assert server.asked[-1] == ("plain", f"bytes={have}-") and path.read_bytes() == BODY


def test_a_length_that_is_not_that_of_the_file_is_refused(server, tmp_path):
    with pytest.raises(UserError, match=f"{len(BODY)} of [0-9]+ bytes came"):
        download(f"{server.url}/packed/file", tmp_path / "file", tries=1)
    assert not (tmp_path / "file").exists()


def test_a_part_longer_than_the_file_is_begun_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY + b"more")
    download(f"{server.url}/plain/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_missing_file_is_refused_at_once(server, tmp_path):
    with pytest.raises(UserError, match="/missing/file: HTTP 404.*is the address right"):
        download(f"{server.url}/missing/file", tmp_path / "file")
    assert len(server.asked) == 1 and server.pauses == [] and not (tmp_path / "file").exists()


FAILURES = {
    "{http}/401/x": "HTTP 401: .*HF_TOKEN",
    "{http}/403/x": "HTTP 403: .*HF_TOKEN",
    "{http}/404/x": "HTTP 404: .*is the address right",
    "{http}/429/x": "HTTP 429: .*try it later",
    "{http}/503/x": "HTTP 503: .*try it later",
    "https{rest}/plain/x": "no secure connection to 127.0.0.1",
    "http://127.0.0.1:{closed}/x": "127.0.0.1 cannot be reached .Connection refused",
    "http://no.invalid/x": "no.invalid is not found .*is there a network",
    "http://10.0.0.1/x": "the proxy cannot be reached",
    "http://[::1": "is the address right",
    "http://" + "a" * 70 + ".invalid": "is the address right",
}


@pytest.mark.parametrize("url, message", FAILURES.items())
def test_a_download_that_fails_is_a_short_line(url, message, server, tmp_path, monkeypatch):
    """Which host, what is wrong and what to do, not the 400 characters of the libraries below."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]

    def resolve(host, *args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    if "no.invalid" in url:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
    if "10.0.0.1" in url:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed}")
    else:
        monkeypatch.setenv("NO_PROXY", "*")
    url = url.format(http=server.url, rest=server.url.removeprefix("http"), closed=closed)
    with pytest.raises(UserError, match=message) as error:
        download(url, tmp_path / "file", tries=1)
    text = str(error.value)
    assert text.startswith(url) and "\n" not in text and len(text) < len(url) + 200
    assert not any(word in text for word in ("HTTPConnectionPool", "urllib3", "object at 0x"))


def test_a_server_that_says_nothing_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr("barelm.download.PATIENCE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/x"
        with pytest.raises(UserError, match="127.0.0.1 does not answer in time"):
            download(url, tmp_path / "file", tries=1)


def test_another_file_than_expected_is_removed(server, tmp_path):
    with pytest.raises(UserError, match=hashlib.sha256(BODY).hexdigest()):
        download(f"{server.url}/plain/file", tmp_path / "file", "0" * 64)
    assert os.listdir(tmp_path) == [] and len(server.asked) == 1


def test_nobody_answers(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="run it again") as error:
        download(f"{server.url}/plain/file", tmp_path / "file", tries=3)
    assert server.pauses == [1, 2] and "\n" not in str(error.value)
    assert not (tmp_path / "file").exists()


def test_a_named_source_is_downloaded_once(server, tmp_path, monkeypatch):
    text = "\n<|endoftext|>\n".join(made_up_documents(30))
    server.files["/plain/stories"] = text.encode()
    monkeypatch.setitem(sources.DOWNLOADS, "stories", f"{server.url}/plain/stories")
    monkeypatch.setitem(sources.SEPARATORS, "stories", "<|endoftext|>")
    main_here(monkeypatch, tmp_path, source="stories", dataset="d", tokenizer="byte")
    docs = documents_of(tmp_path / "data" / "d", "train") + documents_of(tmp_path / "data/d", "val")
    assert sorted(docs) == sorted(doc.strip("\n") for doc in made_up_documents(30))
    (kept,) = (tmp_path / "data/downloads").iterdir()
    assert len(server.asked) == 1 and kept.read_text() == text


def hub(monkeypatch, server, names):
    """A Hub on the server with a data set of these files: {name: bytes}."""
    listing = {"siblings": [{"rfilename": name} for name in names]}
    server.files["/plain/api/datasets/o/n"] = json.dumps(listing).encode()
    server.files |= {f"/plain/datasets/o/n/resolve/main/{k}": v for k, v in names.items()}
    monkeypatch.setattr(sources, "HUB", f"{server.url}/plain/")
    monkeypatch.setattr(sources, "DATA", f"{server.url}/plain/datasets/")
    return {"tokenizer": "byte", "val_fraction": 0.0}


def test_a_data_set_of_the_hub_by_its_name(server, tmp_path, monkeypatch):
    line = lambda text: json.dumps({"text": text}).encode() + b"\n"
    names = {"README.md": b"no", "data/train-1.jsonl": line("one"), "data/train-0.jsonl": line("0")}
    names |= {"data/test.jsonl": line("no"), "extra/train.jsonl.gz": gzip.compress(line("more"))}
    settings = hub(monkeypatch, server, names)
    docs = lambda: documents_of(tmp_path / "data/python", "train")
    main_here(monkeypatch, tmp_path, source="hf:o/n", **settings)
    assert docs() == ["0", "one", "more"]
    main_here(monkeypatch, tmp_path, source="hf:o/n/extra", **settings)
    assert docs() == ["more"]
    main_here(monkeypatch, tmp_path, source="hf:o/n", shards=1, **settings)
    assert docs() == ["0"]
    assert len(server.asked) == 6  # three lists and three files: none is fetched again
    with pytest.raises(UserError, match="--source=hf:o/none: the Hub does not list it"):
        main_here(monkeypatch, tmp_path, source="hf:o/none")


def test_pages_from_a_list_of_addresses(server, tmp_path, monkeypatch):
    for i in range(3):
        page = f"<html><nav>menu</nav><p>page {i}</p></html>"
        server.files[f"/plain/{i}.html"] = page.encode()
    (tmp_path / "list.txt").write_text("".join(f"{server.url}/plain/{i}.html\n" for i in range(3)))
    settings = {"source": f"@{tmp_path}/list.txt", "tokenizer": "byte", "val_fraction": 0.0}
    main_here(monkeypatch, tmp_path, **settings)
    assert documents_of(tmp_path / "data/python", "train") == ["page 0", "page 1", "page 2"]


def test_fineweb_shards_are_taken_as_they_are(server, tmp_path, monkeypatch):
    if not (SHARED / "tiktoken").is_dir():
        pytest.skip("no tiktoken tables here")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", TIKTOKEN)
    shards = {}
    for i, name in enumerate(["val_000000.bin", "train_000001.bin", "train_000002.bin"]):
        ids = [50256, *range(i, 100 + i)]
        shards[name] = struct.pack(f"<256i{len(ids)}H", 20240520, 1, len(ids), *[0] * 253, *ids)
        server.files[f"/plain/fineweb_{name}"] = shards[name]
    # an older dataset with shards of these names must not be taken for the download
    write_jsonl(tmp_path / "docs.jsonl", made_up_documents(30))
    args = "--source=docs.jsonl", "--dataset=d", "--tokenizer=byte", "--shard_tokens=500"
    done_well(prepare_py(tmp_path, *args))
    assert (tmp_path / "data/d/train_000002.bin").is_file()
    settings = {"source": "fineweb10B", "dataset": "d", "FINEWEB": f"{server.url}/plain/"}
    main_here(monkeypatch, tmp_path, **settings, shards=2, tokenizer="bpe")
    made = files(tmp_path / "data" / "d")
    assert {name: data for name, data in made.items() if name.endswith(".bin")} == shards
    meta = json.loads(made["meta.json"])
    assert meta["train"] == {"tokens": 202, "shards": ["train_000001.bin", "train_000002.bin"]}
    assert meta["val"]["tokens"] == 101 and meta["settings"]["tokenizer"] == "gpt2"
    assert opens(monkeypatch, tmp_path, "d") == made
    # a killed run may leave links to the downloads, which another run must not write into
    kept = files(tmp_path / "data" / "downloads")
    work = tmp_path / "data/d/work"
    work.mkdir()
    for name in shards:
        os.link(tmp_path / "data/downloads/fineweb10B" / name, work / name)
    os.link(tmp_path / "data/d/val_000000.bin", work / "train_000000.bin.tmp")
    done_well(prepare_py(tmp_path, *args))
    assert files(tmp_path / "data" / "downloads") == kept
    prepare.main()
    assert files(tmp_path / "data" / "d") == made
    # with a third shard that is none: nothing else is fetched again, nothing is changed
    server.asked.clear()
    server.files["/plain/fineweb_train_000003.bin"] = b"<html>"
    monkeypatch.setattr(prepare, "shards", 3)
    with pytest.raises(UserError, match="removed: not the token shard that was expected"):
        prepare.main()
    assert len(server.asked) == 1 and files(tmp_path / "data" / "d") == made


def test_the_pattern_for_ascii_text_splits_as_the_other_does():
    draw = random.Random(6)
    for letters in ("aZ' \n\r\t09_-", "".join(map(chr, range(128))), "'sSdDtTlLmMrReEvV \n"):
        for _ in range(3000):
            text = "".join(draw.choices(letters, k=draw.randint(0, 12)))
            assert ASCII.findall(text) == regex.findall(QWEN2_SPLIT, text), repr(text)


def test_the_copy_task_is_made_up_and_judged(tmp_path):
    flags = ["--steps=exact", "--tokenizer=char", "--dataset=copy"]
    run(tmp_path, "prepare.py", "--source=copy:5", "--max_documents=50", *flags)
    lines = (tmp_path / "data/synthetic/copy_5.txt").read_text().splitlines()
    assert len(set(lines)) > 19_000
    for line in lines[:50]:
        first, second = line.split("|")
        assert first == second and len(first) == 5 and first.isalpha()
    task = synthetic.copied(length=5)
    assert not {f"{row['letters']}|{row['letters']}" for row in task["rows"]} & set(lines[:50])
    row = {"letters": "abcde"}
    assert task["judge"](row, ["abcde"]) == {"copied": 1.0}
    assert task["judge"](row, ["abxde and more"]) == {"copied": 0.8}
    assert task["judge"](row, [""]) == {"copied": 0.0}
    done = run(tmp_path, "prepare.py", "--source=copy:0", *flags, check=False)
    assert "1 to 10000 letters" in done.stderr
