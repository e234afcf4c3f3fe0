"""prepare.py as a pipeline: what is collected, what is the same, what is mixed, what becomes a task
set, on one process and on two, whole and killed."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, join, run, stalled
from test_prepare import (
    SHARED,
    documents_of,
    done_well,
    files,
    made_up_documents,
    main_here,
    prepare_py,
    read_split,
    source_texts,
    start_py,
    write_jsonl,
)

import barelm
import finetune
import prepare
from barelm import clean, corpus, corpus_report, dedup, sources
from barelm.bpe import bpe_tokenizer
from barelm.checkpoint import load
from barelm.run import UserError, setup
from barelm.shards import Windows
from barelm.tasksets import functions_in
from barelm.tokenizer import Tokenizer

BYTES = "--tokenizer=byte", "--val_fraction=0"


def made_up_pages(n, words=80, seed=0):
    """Texts of random words, no two alike."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=2 + i % 8)) for i in range(3000)]
    return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(n)]


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def altered(text, wanted, rng):
    """The text with words replaced until its Jaccard similarity to itself falls to `wanted`."""
    words = text.split()
    for place in rng.sample(range(len(words)), len(words)):
        if jaccard(text, " ".join(words)) <= wanted:
            break
        words[place] = "".join(rng.choices(string.ascii_lowercase, k=9))
    return " ".join(words)


def kept(cwd, *args):
    """The documents that prepare.py keeps, in order."""
    done_well(prepare_py(cwd, *args, *BYTES))
    return documents_of(cwd / "data/python", "train")


# --------------------------------------------------------------------------------------------------
# Collecting


@pytest.mark.parametrize("mark", ["\n", "<|endoftext|>", "ab", "---"])
def test_ranges_of_a_file_are_its_parts(mark, tmp_path):
    rng = random.Random(1)
    text = "".join(rng.choice(["a", "b", "é", "-", "\n", mark, mark]) for _ in range(400))
    (tmp_path / "f").write_bytes(text.encode())
    size = len(text.encode())
    whole = text.encode().split(mark.encode())
    assert list(sources.read_parts(str(tmp_path / "f"), mark)) == whole
    if mark == "---":  # overlaps itself: such a file is not divided
        return
    for step in (1, 2, 7, 50, 1000):
        borders = [*range(0, size, step), size]
        ranges = itertools.pairwise(borders)
        parts = [p for a, b in ranges for p in sources.read_parts(str(tmp_path / "f"), mark, a, b)]
        assert parts == (whole if whole[-1] else whole[:-1])


def test_the_size_of_units_changes_nothing(tmp_path, monkeypatch):
    texts = made_up_documents(300)
    made = []
    for unit in (2_000_000, 500):
        place = tmp_path / str(unit)
        place.mkdir()
        write_jsonl(place / "docs.jsonl", texts)
        main_here(
            monkeypatch, place, source="docs.jsonl", vocab_size=300, unit_bytes=unit, threads=1
        )
        made.append(files(place / "data"))
    assert made[0] == made[1]


def test_a_bad_line_in_a_later_range_has_its_number(tmp_path, monkeypatch):
    lines = [json.dumps({"text": t}) for t in made_up_documents(300)]
    lines[222] = "{"
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"docs.jsonl:223: expected .* found '\{'"):
        main_here(monkeypatch, tmp_path, source="docs.jsonl", unit_bytes=500, threads=1)


def test_globs_and_every_kind_of_file(tmp_path):
    texts = made_up_pages(6)
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    write_jsonl(folder / "c.jsonl", texts[2:3])
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[3]}).encode()))
    (folder / "e.json").write_text(json.dumps([{"text": texts[4]}]))
    (folder / "f.html").write_text(f"<html><script>x</script><body><p>{texts[5]}</body>")
    assert kept(tmp_path, "--source=in") == texts
    assert kept(tmp_path, "--source=in/**/*.txt*") == texts[:2]
    assert kept(tmp_path, "--source=in/**/*.jsonl*", "--field=text") == texts[2:4]
    result = prepare_py(tmp_path, "--source=in/*.nothing")
    assert result.stderr.startswith("--source=in/*.nothing: no such file or folder, nor one of ")


@pytest.fixture
def texts_in(tmp_path, monkeypatch):
    """A function: the documents that prepare.py reads from a source in tmp_path, by its functions
    in this process, with some of its settings."""
    monkeypatch.chdir(tmp_path)

    def read(source, **settings):
        for key, value in {"source": source, **settings}.items():
            monkeypatch.setattr(prepare, key, value)
        units = prepare.plan(setup("cpu"))
        tallies = defaultdict(clean.Tally)
        limit = prepare.max_documents
        texts = []
        for unit in units:
            cleaning = prepare.cleaning_settings()
            read = prepare.clean_documents(unit, cleaning, prepare.field, limit, tallies, [])
            texts += [text for _, text in read]
        return texts

    return read


def refusal(function, *args, **kwargs):
    """The one line with which the function refuses."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def packed(ending, data):
    """The bytes compressed as a file with this ending is."""
    if ending == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as file:
            file.write(data)
        return sink.getvalue().to_pybytes()
    plain = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return plain[ending](data)


@pytest.mark.parametrize("packing", ["", ".gz", ".BZ2", ".xz", ".Zst"])
def test_a_name_says_what_it_holds_in_any_case_and_compressed(packing, tmp_path, texts_in):
    texts = made_up_documents(20)
    rows = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["id", "text"])
    writer.writeheader()
    writer.writerows({"id": i, "text": text} for i, text in enumerate(texts))
    pages = "".join(f"<p>{i}</p>" for i in range(20)).encode()
    files_in = {"a.JSONL": lines, "b.ndjson": lines, "c.JsonLines": lines}
    files_in |= {"d.Json": json.dumps(rows).encode(), "e.CSV": table.getvalue().encode()}
    files_in |= {"f.Txt": texts[0].encode(), "g.MD": texts[0].encode(), "h.HTM": pages}
    for name, data in files_in.items():
        (tmp_path / (name + packing)).write_bytes(packed(packing.lower(), data))
        one = {"f.Txt": texts[:1], "g.MD": texts[:1]}
        one["h.HTM"] = ["\n\n".join(map(str, range(20)))]
        assert texts_in(name + packing) == one.get(name, texts), name


def test_parquet_in_capital_letters(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    texts = made_up_pages(3)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "A.PARQUET")
    assert kept(tmp_path, "--source=A.PARQUET") == texts


def test_records_under_the_name_of_a_text_are_asked_about(tmp_path, texts_in):
    rows = [{"text": text} for text in made_up_pages(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.log.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.md").write_text("\ufeff" + json.dumps(rows))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "d.html").write_text("\n" + lines)
    why = ": its first line is JSON, but its name says text: --input_format="
    for name, kind in (("a.txt", "jsonl"), ("b.log.gz", "jsonl"), ("c.md", "json")):
        assert refusal(texts_in, name, input_format=None).startswith(f"{name}{why}{kind} reads its")
        texts = texts_in(name, input_format=kind)
        assert texts == [row["text"] for row in rows]
    assert refusal(texts_in, "in", input_format=None).startswith(f"in/d.html{why}jsonl reads its")
    assert texts_in("a.txt", input_format="text") == [lines]
    assert line_of(tmp_path, "--source=a.txt", "--input_format=xml").startswith("input_format=xml")
    # what only begins like JSON is text
    for text in ("{a} is a set", "[1] first reference", "{}\nbody {}", '["a", "b"]', '{"a": 1} b'):
        (tmp_path / "a.txt").write_text(text)
        assert texts_in("a.txt", input_format=None) == [text]


def test_tables_of_cells(tmp_path, texts_in):
    rows = [["id", "text"], ["1", 'says "a, b",\r\nthen c'], ["2", "  é\u2028 "]]
    with open(tmp_path / "a.csv", "w", encoding="utf-16", newline="") as file:
        csv.writer(file).writerows(rows)
    assert texts_in("a.csv") == [row[1] for row in rows[1:]]
    (tmp_path / "b.tsv").write_text("text\tid\none\t1\n\ntwo, three\t2")
    assert texts_in("b.tsv") == ["one", "two, three"]
    for data, message in [
        ("text,id\na,1\na, b,2\n", 'c.csv:3: expected {"text": "..."}, found \'["a", " b"'),
        ("body,id\na,1\n", 'c.csv:2: expected {"text": "..."}, found \'{"body": "a"'),
        ('text\n"a\nb', "c.csv: damaged after record 1: unexpected end of data"),
        ('text\n"a"b\n', "c.csv: damaged after record 1: "),
    ]:
        (tmp_path / "c.csv").write_text(data)
        assert refusal(texts_in, "c.csv").startswith(message)


def test_lists_may_begin_with_a_byte_order_mark(tmp_path, monkeypatch):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "urls").write_text("https://a.org/1\n", encoding=encoding)
        assert sources.addresses(f"@{tmp_path}/urls") == ["https://a.org/1"]
        (tmp_path / encoding).write_text("a.org\nword\n", encoding=encoding)
        assert clean.read_blocklist(str(tmp_path / encoding)) == ({"a.org"}, {"word"}, [])
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    write_jsonl(tmp_path / "d.jsonl", ["text"])
    line = line_of(tmp_path, "--source=d.jsonl", "--steps=blocklist", "--blocklist=latin")
    assert line.startswith("--blocklist=latin: not UTF-8 text (")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_byte_order_mark_is_no_text(encoding, tmp_path, texts_in):
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    texts = ["Grüße, 世界 😀", "two"]
    rows = [{"text": text} for text in texts]
    contents = {"a.txt": texts[0], "b.html": f"<p>{texts[0]}</p>", "c.json": json.dumps(rows)}
    contents["d.jsonl"] = "\n".join(map(json.dumps, rows))
    contents["e.csv"] = 'text\n"Grüße, 世界 😀"\ntwo\n'
    contents["f.txt"] = f"{texts[0]}---two"
    for name, content in contents.items():
        (tmp_path / name).write_bytes((mark + content).encode(encoding))
        whole = name in ("a.txt", "b.html")
        got = texts_in(name, separator="---")
        assert got == (texts[:1] if whole else texts), name
    (tmp_path / "g.txt").write_bytes((mark + "abcé").encode(encoding)[:-1])
    assert refusal(texts_in, "g.txt").startswith("g.txt: not UTF-8 text (")
    assert clean.html_to_text("\ufeff<p>x") == "x"


def test_ranges_of_a_file_with_a_byte_order_mark(tmp_path, monkeypatch):
    texts = [text.strip("\n") for text in made_up_documents(60)]
    settings = {"tokenizer": "byte", "val_fraction": 0, "threads": 1, "unit_bytes": 300}
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.txt").write_text("\n===\n".join(texts), encoding=encoding)
        main_here(monkeypatch, tmp_path, source="a.txt", separator="\n===\n", **settings)
        assert documents_of(tmp_path / "data/python", "train") == texts
    path = str(tmp_path / "f")
    for size in range(4, 12):  # wherever the ranges begin, behind the mark
        data = b"\xef\xbb\xbfa--b--c--"
        Path(path).write_bytes(data)
        borders = [*range(0, len(data), size), len(data)]
        ranges = itertools.pairwise(borders)
        parts = [p for a, b in ranges for p in sources.read_parts(path, "--", a, b)]
        assert [part for part in parts if part] == [b"a", b"b", b"c"]


def test_a_separator_as_a_shell_has_it(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\ntwo")
    assert kept(tmp_path, "--source=a.txt", r"--separator=\n\n") == ["one\nline", "two"]
    (tmp_path / "a.txt").write_bytes(b"one\r\nline\r\n\r\ntwo")  # the line ends of Windows
    assert kept(tmp_path, "--source=a.txt", r"--separator=\n\n") == ["one\r\nline", "two"]
    (tmp_path / "a.txt").write_text("one\\ntwo\fthree")
    assert kept(tmp_path, "--source=a.txt", r"--separator=\\n") == ["one", "two\fthree"]
    assert kept(tmp_path, "--source=a.txt", r"--separator=\f") == ["one\\ntwo", "three"]
    (tmp_path / "r.py").write_text('separator = "\\\\n"')  # a recipe says what it means
    assert kept(tmp_path, "--source=a.txt", "r.py") == ["one", "two\fthree"]


def test_links_are_followed_and_each_file_counts_once(tmp_path):
    for name in ("in/a/1.txt", "far/2.txt", "far/deep/3.txt", "4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"this is {name}")
    links = {"in/0": "in/a", "in/b": "far", "in/c": "far", "in/5.txt": "4.txt", "in/6.txt": "4.txt"}
    links |= {"in/a/up": "in", "far/deep/round": "far", "in/7.txt": "in/a/1.txt", "in/8": "nowhere"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    (tmp_path / "in/self").symlink_to("self")
    found, broken = sources.walk(tmp_path / "in")
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["in/5.txt", "in/a/1.txt", "in/b/2.txt", "in/b/deep/3.txt"]
    assert [os.path.basename(path) for path in broken] == ["8", "self"]
    done = prepare_py(tmp_path, "--source=in", "--steps=", *BYTES)
    assert "in: left out 2 links to nothing, such as in/8\n" in done.stdout
    four = documents_of(tmp_path / "data/python", "train")
    assert four == [
        f"this is {name}" for name in ("4.txt", "in/a/1.txt", "far/2.txt", "far/deep/3.txt")
    ]
    # a pattern comes to a file by many ways, too
    (tmp_path / "far/deep/round").unlink()
    assert sorted(kept(tmp_path, "--source=in/**/*.txt", "--steps=")) == sorted(four)


def test_parquet_or_a_line_that_says_what_it_needs(tmp_path):
    path = tmp_path / "a.parquet"
    texts = made_up_pages(30)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        result = prepare_py(tmp_path, "--source=a.parquet")
        assert result.stderr == "a.parquet: parquet needs pyarrow: pip install pyarrow\n"
        return
    far = pyarrow.array([10**15] * 30, pyarrow.timestamp("s"))  # a year that Python lacks
    table = pyarrow.table({"id": list(range(30)), "text": texts, "not read": far})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    assert kept(tmp_path, "--source=a.parquet") == texts
    path.write_bytes(b"PAR1 nothing")
    assert "a.parquet: no parquet: " in prepare_py(tmp_path, "--source=a.parquet").stderr


# --------------------------------------------------------------------------------------------------
# The same


def test_words_have_the_same_hash_where_they_are_the_same_word():
    rng = random.Random(2)
    letters = "abAB1é ÉßΣ .,-\n\t\0"
    texts = ["".join(rng.choices(letters, k=rng.randint(0, 40))) for _ in range(300)]
    texts += ["日本の", "日 本,の", "한국어 abc한", "x日y"]
    words = []
    for i, text in enumerate(texts):
        found = re.findall(r"[\u3000-\ud7ff]|[^\W_\u3000-\ud7ff]+", text.lower())
        words += [(word, i) for word in found]
    hashes, owners = dedup.word_hashes(texts)
    assert [i for _, i in words] == owners.tolist()
    by_word = {}
    for (word, _), value in zip(words, hashes.tolist()):
        assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)


def test_signatures_agree_as_often_as_shingles():
    rng = random.Random(3)
    pages = made_up_pages(40, 300)
    errors = []
    for page, wanted in zip(pages, np.linspace(0.2, 0.95, 40)):
        other = altered(page, wanted, rng)
        a, b = dedup.minhash(*dedup.word_hashes([page, other]), 2)
        errors.append((a == b).mean() - jaccard(page, other))
    # of 128 draws with probability p the mean has a standard deviation of up to 0.044
    assert abs(np.mean(errors)) < 0.02 and 0.015 < np.std(errors) < 0.05


def test_near_duplicates_as_well_as_datasketch(tmp_path, monkeypatch):
    rng, pages, pairs = random.Random(4), made_up_pages(1200, 250), {}
    for page in pages[:400]:
        other = altered(page, rng.uniform(0.5, 0.95), rng)
        pairs[page, other] = jaccard(page, other)
    texts = pages + [other for _, other in pairs]
    rng.shuffle(texts)
    write_jsonl(tmp_path / "docs.jsonl", texts)
    result = done_well(prepare_py(tmp_path, "--source=docs.jsonl", *BYTES, "--report"))
    left = set(documents_of(tmp_path / "data/python", "train"))
    assert all(page in left or other in left for page, other in pairs)
    found = {pair for pair in pairs if not left.issuperset(pair)}
    assert len(left) + len(found) == len(texts)  # no page was taken for one that it is not like
    truth = {pair for pair, similarity in pairs.items() if similarity >= 0.8}
    f1 = lambda found: 2 * len(found & truth) / (len(found) + len(truth))
    assert f1(found) > 0.8, result.stdout
    clusters = f"{len(found):,} clusters, {len(found):,} documents left out."
    assert clusters in (tmp_path / "data/python/report.md").read_text()
    datasketch = pytest.importorskip("datasketch")
    lsh, theirs = datasketch.MinHashLSH(threshold=0.8, num_perm=128), set()
    for text in texts:
        signature = datasketch.MinHash(128)
        signature.update_batch([" ".join(s).encode() for s in shingles(text)])
        for other in lsh.query(signature):
            theirs |= {(text, other), (other, text)} & set(pairs)
        lsh.insert(text, signature)
    assert f1(found) >= f1(theirs)


def test_the_first_of_the_same_texts_and_urls_stays(tmp_path):
    pages = made_up_pages(30, 20)
    rows = [{"text": t, "url": f"https://example.org/{i}"} for i, t in enumerate(pages)]
    same_text = rows[3] | {"text": "  " + pages[3].upper() + "\n", "url": "https://a.org"}
    same_url = {"text": "another text for once", "url": "http://www.Example.org/7/#top"}
    rows = [*rows[:10], same_text, same_url, *rows[10:], {"text": "no url"}, {"text": "none"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    everything = [row["text"] for row in rows]
    assert kept(tmp_path, "--source=d.jsonl", "--steps=") == everything
    without = lambda *some: [row["text"] for row in rows if row not in some]
    assert kept(tmp_path, "--source=d.jsonl", "--steps=exact") == without(same_text)
    assert kept(tmp_path, "--source=d.jsonl", "--steps=url") == without(same_url)
    assert kept(tmp_path, "--source=d.jsonl", "--steps=url,exact") == without(same_text, same_url)
    assert kept(tmp_path, "--source=d.jsonl", "--steps=exact,near,near") == without(same_text)


def test_a_component_keeps_its_first_member():
    edges = np.array([[5, 4], [4, 9], [1, 2], [9, 3], [7, 7]])
    assert dedup.components(10, edges).tolist() == [0, 1, 1, 3, 3, 3, 6, 7, 8, 3]
    rng = np.random.default_rng(5)
    for _ in range(30):
        edges = rng.integers(0, 60, (rng.integers(0, 50), 2))
        label = list(range(60))
        for _ in range(60):
            for a, b in edges:
                label[a] = label[b] = min(label[a], label[b])
        assert dedup.components(60, edges).tolist() == label


def test_documents_with_thirteen_words_of_an_evaluation_are_dropped(tmp_path):
    pages = [page.split() for page in made_up_pages(5, 60)]
    question = {"question": " ".join(pages[0][:30]), "choices": [" ".join(pages[1][:20])]}
    (tmp_path / "test.jsonl").write_text(json.dumps(question))
    (tmp_path / "plain.txt").write_text(" ".join(pages[4][5:25]).upper())
    texts = {
        "clean": " ".join(pages[2]),
        "13 of a question": " ".join(pages[2][:9] + pages[0][10:23] + pages[2][9:]),
        "12 of a question": " ".join(pages[3][:9] + pages[0][10:22] + pages[3][9:]),
        "13 of a choice": "(" + "; ".join(pages[1][3:16]).upper() + "!)",
        "13 of a text": " ".join(pages[4][5:18]),
    }
    write_jsonl(tmp_path / "d.jsonl", texts.values())
    args = "--source=d.jsonl", "--decontaminate=test.jsonl,plain.txt", "--steps=near", "--report"
    assert kept(tmp_path, *args) == [texts["clean"], texts["12 of a question"]]
    report = (tmp_path / "data/python/report.md").read_text()
    assert "**decontaminate: 13 words in a row of an evaluation**: 3 documents" in report
    result = prepare_py(tmp_path, "--source=d.jsonl", "--decontaminate=nothing.txt")
    assert result.stderr == "--decontaminate=nothing.txt: no such file\n"


def test_perplexity_under_a_model_of_ours(tiny, tmp_path):
    net, tok = load(tiny / "out" / "tiny")
    texts = [
        "def f(self):\n    return self.x\n" * 4,
        "qzxjv " * 30,
        "import os\n",
        made_up_pages(1)[0],
    ]
    perplexities = []
    for text in texts:
        ids = torch.tensor([[tok.eot_id, *tok.encode(text)][: net.config.n_ctx + 1]])
        with torch.no_grad():
            logits = net(ids[:, :-1]).float().log_softmax(-1)[0]
        perplexities.append(math.exp(-logits.gather(1, ids[0, 1:, None]).mean()))
    low, high = sorted(perplexities)[1] - 1e-3, sorted(perplexities)[2] + 1e-3
    write_jsonl(tmp_path / "d.jsonl", texts)
    args = "--source=d.jsonl", f"--perplexity_model={tiny / 'out/tiny'}", "--steps=perplexity"
    expected = [text for text, p in zip(texts, perplexities) if low < p < high]
    assert len(expected) == 2
    assert kept(tmp_path, *args, f"--perplexity_band=[{low}, {high}]") == expected
    result = prepare_py(tmp_path, "--source=d.jsonl", "--steps=perplexity")
    assert "the step perplexity needs --perplexity_model=FOLDER" in result.stderr


# --------------------------------------------------------------------------------------------------
# Mixes


MIX = 'sources = {"web": (0.75, "web.jsonl"), "code": (0.25, "code.jsonl")}\nmix_tokens = 30000\n'


def mixed(cwd):
    web = made_up_pages(200, 40, seed=1)
    code = [f"def f{i}(): return {page}" for i, page in enumerate(made_up_pages(40, 30, seed=2))]
    write_jsonl(cwd / "web.jsonl", web)
    write_jsonl(cwd / "code.jsonl", code)
    (cwd / "mix.py").write_text(MIX + 'tokenizer = "byte"\ndataset = "mix"\nval_fraction = 0.2\n')
    done_well(prepare_py(cwd, "mix.py", "--report"))
    return web, code


def test_a_mix_has_the_shares_that_were_asked(tmp_path):
    web, code = mixed(tmp_path)
    folder = tmp_path / "data" / "mix"
    docs, meta = documents_of(folder, "train"), json.loads((folder / "meta.json").read_text())
    counts = {"web": Counter(), "code": Counter()}
    for doc in docs:
        counts["code" if doc.startswith("def") else "web"][doc] += 1
    size = {name: sum(n * (1 + len(d)) for d, n in c.items()) for name, c in counts.items()}
    assert abs(size["web"] - 22_500) < 400 and abs(size["code"] - 7_500) < 400
    assert meta["train"]["tokens"] == sum(size.values()) == len(read_split(folder, "train"))
    for name, all_texts in (("web", web), ("code", code)):
        said, val = meta["sources"][name]["train"], documents_of(folder, f"val.{name}")
        training = set(all_texts) - set(val)
        epochs = size[name] / sum(1 + len(text) for text in training)
        assert abs(said["epochs"] - epochs) < 0.1
        times = {counts[name][text] for text in training}
        assert times <= {int(epochs), int(epochs) + 1} and not counts[name].keys() & set(val)
    both = documents_of(folder, "val")
    assert set(both) <= {*documents_of(folder, "val.web"), *documents_of(folder, "val.code")}
    shares = sum(1 + len(d) for d in both if d.startswith("def")) / len(read_split(folder, "val"))
    assert abs(shares - 0.25) < 0.06 and len(both) == len(set(both))
    assert "epochs" in (folder / "report.md").read_text()


@pytest.mark.parametrize("packing", ["jsonl.gz", "jsonl.bz2", "jsonl.zst"])
def test_cleaned_documents_are_written_and_read_again(packing, tmp_path, monkeypatch):
    if packing == "jsonl.zst":
        pytest.importorskip("pyarrow")
    pages = made_up_pages(60)
    write_jsonl(tmp_path / "d.jsonl", [f"\x07{page}  é " for page in pages] + pages[:9])
    settings = {"tokenizer": "byte", "threads": 1, "steps": "unicode,whitespace,near"}
    settings |= {"save_cleaned": packing, "unit_bytes": 9000}
    monkeypatch.setattr(corpus, "CLEANED_SIZE", 3000)
    main_here(monkeypatch, tmp_path, source="d.jsonl", dataset="a", **settings)
    folder = tmp_path / "data/a"
    names = json.loads((folder / "meta.json").read_text())["cleaned"]
    assert names == sorted(p.name for p in folder.glob("cleaned_*")) and len(names) > 6
    before = {split: documents_of(folder, split) for split in ("train", "val")}
    assert sorted(before["train"] + before["val"]) == sorted(f"{page} é" for page in pages)
    settings |= {"save_cleaned": "", "val_fraction": 0, "steps": ""}
    for split, texts in before.items():
        source = f"data/a/cleaned_{split}_*"
        main_here(monkeypatch, tmp_path, source=source, dataset="b", **settings)
        assert documents_of(tmp_path / "data/b", "train") == texts
    if packing == "jsonl.gz":
        datasets = pytest.importorskip("datasets")
        found = [str(folder / name) for name in names if "_train_" in name]
        rows = datasets.load_dataset("json", data_files=found, cache_dir=str(tmp_path / "cache"))
        assert rows["train"]["text"][:] == before["train"]
    # the next run without them takes the old ones away; another's file of a like name stays
    (folder / "cleaned_mine.jsonl").write_text("{}")
    main_here(monkeypatch, tmp_path, source="d.jsonl", dataset="a", **settings)
    assert [p.name for p in folder.glob("cleaned_*")] == ["cleaned_mine.jsonl"]


def test_cleaned_documents_of_a_mix_name_their_source(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(30)])
    mix = "--sources={'a': (1, 'a.jsonl'), 'b': (3, 'b.jsonl')}", "--save_cleaned=jsonl"
    kept(tmp_path, *mix, "--field=text")
    rows = []
    for path in (tmp_path / "data/python").glob("cleaned_*"):
        rows += map(json.loads, path.read_text().splitlines())
    assert len(rows) == 60 and all(row["text"].startswith(row["source"]) for row in rows)
    message = line_of(tmp_path, *mix[:1], "--save_cleaned=zip")
    assert message.startswith("save_cleaned=zip: expected one of jsonl, jsonl.gz, ")


def test_diversity_is_the_naive_one(tmp_path, monkeypatch):
    texts = [text.lower() for text in made_up_documents(40, 30)] + ["one", "Two two TWO"]
    write_jsonl(tmp_path / "d.jsonl", texts)
    seen = []
    function = corpus_report.diversity
    noted = lambda left: seen.append(function(left)) or seen[-1]
    monkeypatch.setattr(corpus_report, "diversity", noted)
    main_here(monkeypatch, tmp_path, source="d.jsonl", tokenizer="byte", report=True, steps="")
    words = [re.findall(r"[一-龥]|[^\W_一-龥]+", t.lower()) for t in texts]
    [found] = seen
    assert (found["documents"], found["bytes"]) == (42, sum(len(t.encode()) for t in texts))
    for n in (1, 2, 3):
        grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        assert found["distinct"][n] == len(set(grams)) / len(grams)
    packed = gzip.compress("".join(text + "\n" for text in texts).encode())
    assert abs(found["compression"] - (found["bytes"] + 42) / len(packed)) < 0.02
    report = (tmp_path / "data/python/report.md").read_text()
    assert f"- distinct-2: {found['distinct'][2]:.3f} of all 2 words in a row" in report
    monkeypatch.setattr(corpus_report, "DIVERSITY_BYTES", 2000)
    main_here(monkeypatch, tmp_path, source="d.jsonl", tokenizer="byte", report=True, steps="")
    assert 1000 < seen[-1]["bytes"] <= 2000
    assert "of 42, a sample by hash" in (tmp_path / "data/python/report.md").read_text()


BOOK = "Call me {}. Some years ago, never mind how long; I went to sea.\n"


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_source_of_one_document_is_cut_to_its_share(tokenizer, tmp_path):
    books = {name: "".join(BOOK.format(f"{name} {i}") for i in range(900)) for name in "ab"}
    for name, book in books.items():
        (tmp_path / f"{name}.txt").write_text(book)
    for weights in ((3, 7), (1, 3)):
        mix = f"--sources={{'a': ({weights[0]}, 'a.txt'), 'b': ({weights[1]}, 'b.txt')}}"
        args = mix, f"--tokenizer={tokenizer}", "--vocab_size=300", "--mix_tokens=20000"
        done = done_well(prepare_py(tmp_path, *args, "--report", "--shard_tokens=7000"))
        folder = tmp_path / "data/python"
        meta = json.loads((folder / "meta.json").read_text())
        assert abs(meta["train"]["tokens"] - 20_000) < 100
        tok = Tokenizer.from_folder(folder)
        docs = dict(zip("ab", documents_of(folder, "train")))
        sizes = {name: 1 + len(tok.encode(doc)) for name, doc in docs.items()}
        assert sum(sizes.values()) == meta["train"]["tokens"] == len(read_split(folder, "train"))
        assert meta["train"]["bytes"] == sum(len(doc.encode()) for doc in docs.values())
        for name, weight in zip("ab", weights):
            assert books[name].startswith(docs[name]) and docs[name].rstrip().endswith(".")
            said, share = meta["sources"][name]["train"], weight / sum(weights)
            assert said["asked"] == share and said["written"] == sizes[name]
            assert said["share"] == sizes[name] / meta["train"]["tokens"]
            assert abs(said["share"] - share) < 0.005
            assert said["epochs"] == sizes[name] / said["tokens"]
            line = f"{said['share']:.1%} of the mix, {share:.1%} was asked"
            assert line in done.stdout and line in (folder / "report.md").read_text()
        val = documents_of(folder, "val")
        assert sum(map(len, val)) > 3000 and meta["val"]["tokens"] == len(read_split(folder, "val"))


def test_equal_documents_are_counted_one_by_one_in_a_mix(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["the same text"] * 100)
    write_jsonl(tmp_path / "b.jsonl", ["another text "] * 100)
    mix = "--sources={'a': (1, 'a.jsonl'), 'b': (3, 'b.jsonl')}", "--mix_tokens=1120"
    got = Counter(kept(tmp_path, *mix, "--steps="))
    assert got == {"the same text": 20, "another text ": 60}


def test_a_document_is_cut_at_a_line_a_sentence_or_a_word(tmp_path):
    cases = {
        "one two. three four. five six. seven" * 30: r".*[.]",
        "line after line\n" * 60: r".*\n",
        "你好。世界！" * 100: r".*[。！]",
        "words without an end " * 60: r".*\S",
        "x" * 900: r"x+",
    }
    for text, expected in cases.items():
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "b.txt").write_text("b" * 900)
        mix = "--sources={'a': (1, 'a.txt'), 'b': (1, 'b.txt')}", "--mix_tokens=801"
        [doc] = [doc for doc in kept(tmp_path, *mix) if not doc.startswith("b")]
        assert text.startswith(doc) and re.fullmatch(expected, doc, re.S)
        assert abs(1 + len(doc.encode()) - 400) <= 12
        if expected == r".*\S":
            assert text[len(doc)] == " "


def test_train_tells_the_loss_of_each_source(tmp_path):
    mixed(tmp_path)
    args = "--dataset=mix", "--max_steps=2", "--seq_len=64", "--batch_tokens=256", "--eval_every=2"
    shape = "--n_layer=1", "--n_embd=32", "--n_head=2", "--n_kv_head=2", "--eval_tokens=0"
    run(tmp_path, "train.py", *args, *shape)
    row = json.loads((tmp_path / "out/python/log.jsonl").read_text().splitlines()[-1])
    net, _ = load(tmp_path / "out/python")
    for name in ("val", "val.web", "val.code"):
        paths = sorted((tmp_path / "data/mix").glob(f"{name}_*.bin"))
        windows = Windows(paths, 64, partial=True)
        ids, targets = windows.batch(range(windows.n), next(net.parameters()).device)
        loss, n = (float(x) for x in net.requires_grad_(False)(ids, targets))
        key = "val_loss" + name.removeprefix("val")
        assert abs(row[key] - loss / n) < 1e-4


def test_bad_mixes_are_a_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", made_up_pages(30))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "nothing").mkdir()
    for mix, message in [
        ("{'a b': 1}", "sources: 'a b': 1: expected a name and a weight above 0"),
        ("{'a': 0}", "sources: 'a': 0: expected"),
        ("{'a': (1, 'nowhere')}", "--source=nowhere: no such file"),
        ("{'a': (1, 'a.jsonl'), 'b': (1, 'empty.jsonl')}", "sources: no text for training in"),
        ("{'a': (1, 'a.jsonl'), 'b': (1, 'nothing')}", "--source=nothing: no file in it"),
    ]:
        result = prepare_py(tmp_path, f"--sources={mix}", "--tokenizer=byte")
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert result.stderr.startswith(message)


@pytest.mark.parametrize("stride", [0, 3, 8, 11])
def test_windows_begin_every_stride_tokens(stride, tmp_path):
    tokens = [100, 9, 8, 45]
    for i, n in enumerate(tokens):
        shard = np.array([20240520, 1, n, *[0] * 253], "<i4").tobytes()
        shard += np.arange(1000 * i, 1000 * i + n).astype("<u2").tobytes()
        (tmp_path / f"{i}.bin").write_bytes(shard)
    windows = Windows(sorted(tmp_path.glob("*.bin")), 8, stride=stride)
    expected = [
        list(range(1000 * i + first, 1000 * i + first + 9))
        for i, n in enumerate(tokens)
        for first in range(0, n - 8, stride or 8)
    ]
    assert [windows.window(i).tolist() for i in range(windows.n)] == expected
    assert sorted(windows.at(i) for i in range(windows.n)) == list(range(windows.n))


# --------------------------------------------------------------------------------------------------
# Task sets


def task(cwd, name, records, *args):
    """What prepare.py makes of some records: (rows of both splits, what it prints)."""
    (cwd / "r.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    result = prepare_py(cwd, f"--task={name}", "--source=r.jsonl", "--dataset=t", *args)
    done_well(result)
    rows = []
    for split in ("train", "val"):
        lines = (cwd / f"data/t/{name}_{split}.jsonl").read_text().splitlines()
        rows += map(json.loads, lines)
    return rows, result.stdout


def said(*contents):
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


SYSTEM = {"role": "system", "content": "S"}
SFT = [
    ({"messages": said("q", "a")}, said("q", "a")),
    ({"messages": [SYSTEM, *said("q", "a", "b", "c")]}, [SYSTEM, *said("q", "a", "b", "c")]),
    ({"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},)
    + (said("h", "g"),),
    ({"instruction": "i", "input": "", "output": "o"}, said("i", "o")),
    ({"instruction": "i", "input": "x", "output": "o"}, said("i\n\nx", "o")),
    ({"instruction": "i", "context": "c", "response": "r", "category": 1}, said("i\n\nc", "r")),
    ({"prompt": "p", "completion": "c"}, said("p", "c")),
    ({"prompt": said("p2"), "completion": said("", "c")[1:]}, said("p2", "c")),
    ({"question": "2+2?", "answer": "#### 4"}, said("2+2?", "#### 4")),
    ({"instruction": "i", "output": "o", "system": "S", "history": [["u", "v"]]},)
    + ([SYSTEM, *said("u", "v", "i", "o")],),
]
HH = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
PREFERENCES = [
    ({"prompt": "p1", "chosen": "c", "rejected": "r"}, said("p1")),
    ({"prompt": "p2", "chosen": said("p2", "c"), "rejected": said("p2", "r")}, said("p2")),
    ({"chosen": said("p3", "c"), "rejected": said("p3", "r")}, said("p3")),
    ({"instruction": "i", "input": "x", "output": "?", "chosen": "c", "rejected": "r"},)
    + (said("i\n\nx"),),
    ({"chosen": HH + " c", "rejected": HH + " r"}, said("one", "two", "three")),
]


def test_instructions_of_every_known_form(tmp_path):
    rows, _ = task(tmp_path, "sft", [record for record, _ in SFT])
    assert [row["messages"] for row in rows] == [messages for _, messages in SFT]
    assert [set(row) == {"messages"} for row in rows] == [
        i in (0, 1, 2, 7) for i in range(len(SFT))
    ]


def test_the_parts_of_an_instruction_reach_a_template(tmp_path, monkeypatch):
    records = [
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"question": "2+2?", "context": "sums", "answer": "4"},
        {"prompt": "p", "completion": "c", "template": "own {output}"},
        {"instruction": "i", "output": "o", "system": "S", "history": [["u", "v"]]},
        {"messages": [SYSTEM, *said("q", "a", "b", "c")]},
    ]
    rows, _ = task(tmp_path, "sft", records)
    tok = bpe_tokenizer([])
    monkeypatch.setattr(finetune, "template", "{instruction}|{input}|{output}")
    texts = []
    for row in rows:
        e = finetune.read_sft(row, tok, 999)
        texts.append(tok.decode(e["ids"][1:]).replace("<|endoftext|>", "."))
    assert texts == ["add|1 2|3", "2+2?|sums|4", "own c", "S\n\nu||v.i||o", "S\n\nq||a.b||c"]


def test_preferences_of_every_known_form(tmp_path):
    rows, _ = task(tmp_path, "preference", [record for record, _ in PREFERENCES])
    wanted = [{"prompt": prompt, "chosen": "c", "rejected": "r"} for _, prompt in PREFERENCES]
    assert rows == wanted


def test_labels_and_pairs(tmp_path):
    records = [
        {"text": "t", "label": 1},
        {"sentence": "s", "label": "x"},
        {"text": "u", "category": "c"},
    ]
    rows, _ = task(tmp_path, "classify", records)
    assert rows == [{"text": t, "label": y} for t, y in (("t", "1"), ("s", "x"), ("u", "c"))]
    records = [{"source": "a", "target": "b"}, {"article": "c", "highlights": "d"}]
    rows, _ = task(tmp_path, "seq2seq", records)
    assert rows == [{"source": "a", "target": "b"}, {"source": "c", "target": "d"}]


def test_bad_records_are_counted_and_shown(tmp_path):
    good = {"instruction": "i", "output": "o"}
    records = [good, {"instruction": "i"}, {"body": 1}, {"body": 2}, {"messages": []}, good]
    records += [{"messages": [{"role": "robot", "content": "x"}]}, {"messages": said("q")}]
    (tmp_path / "r.jsonl").write_text(
        "".join(f"{json.dumps(r)}\n" for r in records) + "{broken\n[1]\n"
    )
    result = prepare_py(tmp_path, "--task=sft", "--source=r.jsonl", "--dataset=t")
    out = done_well(result).stdout
    for line in [
        'sft: 1 bad records: an empty answer, such as {"instruction": "i"',
        'sft: 2 bad records: no messages, instruction, prompt or question, such as {"body": 1',
        "sft: 1 bad records: messages are no list of turns",
        "sft: 1 bad records: a role that is none of system, user, assistant, tool",
        "sft: 1 bad records: the last turn is not the assistant's",
        "sft: 2 bad records: no JSON object, such as r.jsonl:9: {broken",
        "sft: 1 records came before, word for word",
        "sft_train.jsonl: 1 records",
    ]:
        assert line in out, (line, out)
    result = prepare_py(tmp_path, "--task=classify", "--source=r.jsonl", "--dataset=t")
    assert result.stderr == "--source=r.jsonl: no record for --task=classify in it\n"
    assert sorted(os.listdir(tmp_path / "data/t")) == ["sft_train.jsonl", "sft_val.jsonl"]


@pytest.mark.parametrize(
    "name, file",
    [
        ("sft", "sft/instruction-data.json"),
        ("preference", "preference/instruction-data-with-preference.json"),
    ],
)
def test_real_task_files(name, file, tmp_path):
    if not (SHARED / file).exists():
        pytest.skip("no such file here")
    done_well(prepare_py(tmp_path, f"--task={name}", f"--source={SHARED / file}", "--dataset=t"))
    rows = []
    for split in ("train", "val"):
        lines = (tmp_path / f"data/t/{name}_{split}.jsonl").read_text().splitlines()
        rows += map(json.loads, lines)
    records = json.loads((SHARED / file).read_text())
    assert 0.97 * len(records) < len(rows) <= len(records)
    answers = {r["chosen" if name == "preference" else "output"] for r in records}
    for row in rows:
        assert (
            row["chosen"] if name == "preference" else row["messages"][-1]["content"]
        ) in answers


def test_a_task_set_says_which_settings_it_does_not_use(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    args = ["--task=sft", "--source=a.jsonl", "--dataset=a", "--val_fraction=0"]
    assert "note:" not in run(tmp_path, "prepare.py", *args).stdout
    args += ["--save_cleaned=jsonl", '--roles={"mask": "[MASK]"}', "--clean_symbols"]
    told = run(tmp_path, "prepare.py", *args).stdout
    assert "note: roles, save_cleaned, clean_symbols: of documents alone" in told


def test_the_default_source_makes_task_sets(tiny):
    folder = tiny / "data" / "tiny"
    library = "\n".join(source_texts())
    flat = " ".join(library.split())
    for name, check in {
        "sft": lambda r: r["messages"][0]["content"].startswith("Write the docstring"),
        "preference": lambda r: r["chosen"] != r["rejected"] and r["rejected"] in flat,
        "kto": lambda r: r["completion"] in flat and isinstance(r["label"], bool),
        "classify": lambda r: f"{r['label']}/" in str(list(prepare.plan(setup("cpu")))),
        "seq2seq": lambda r: r["target"] in flat and r["source"].split("\n")[0] in library,
        "embed": lambda r: r["anchor"] in flat and r["positive"].split("\n")[0] in library,
        "tag": lambda r: r["entities"][0]["label"] in ("function", "call", "parameter"),
    }.items():
        rows = [
            json.loads(line) for line in (folder / f"{name}_train.jsonl").read_text().splitlines()
        ]
        assert len(rows) > 20 and all(map(check, rows[::50]))


# --------------------------------------------------------------------------------------------------
# At scale


def test_two_processes_write_the_same_bytes(tmp_path):
    rng, pages = random.Random(7), made_up_pages(150, 60)
    pages += [altered(page, 0.9, rng) for page in pages[:40]] + pages[:10]
    made = []
    for processes in (1, 2):
        place = tmp_path / str(processes)
        (place / "in").mkdir(parents=True)
        for i in range(5):
            write_jsonl(place / "in" / f"{i}.jsonl", pages[i::5])
        args = "--source=in/*.jsonl", "--vocab_size=300", "--shard_tokens=3000", "--report"
        # five files of 2 MB would be five units; here a glob of small ones is one, so mix them
        mix = "--sources={'a': (0.6, 'in/[0-2].jsonl'), 'b': (0.4, 'in/[34].jsonl')}"
        run(place, "prepare.py", *args, mix, processes=processes)
        made.append(files(place / "data"))
    assert made[0] == made[1] and len(made[0]) > 8


def test_processes_that_inherit_nothing_do_the_same(tmp_path):
    """As on macOS and Windows, where working processes know no setting but what they are given."""
    pages = [f"★ {page}" for page in made_up_pages(40, 60)]
    for place in ("alone", "spawned"):
        (tmp_path / place / "in").mkdir(parents=True)
        for name, part in (("a", pages[:20]), ("b", pages[20:])):
            rows = [{"body": text, "prompt": text, "completion": "c"} for text in part]
            write_records(tmp_path / place / "in" / f"{name}.jsonl", rows)
    # two sources are two units; every setting here differs from its default
    args = ["--sources={'a': (1, 'in/a.jsonl'), 'b': (1, 'in/b.jsonl')}", "--field=body"]
    args += ["--steps=symbols,length,near", "--clean_symbols=dingbats", "--min_chars=300"]
    args += ["--near_threshold=0.7", "--normalize=lower", "--vocab_size=300", "--val_fraction=0.3"]
    args += ["--save_cleaned=jsonl", "--special_tokens=['<a>', '<b>']"]
    done_well(prepare_py(tmp_path / "alone", *args, "--threads=1"))
    spawn = lambda: multiprocessing.set_start_method("spawn", force=True)
    done_well(prepare_py(tmp_path / "spawned", *args, "--threads=2", before=spawn))
    made, spawned = (files(tmp_path / place / "data") for place in ("alone", "spawned"))
    assert made == spawned and b"\xe2\x98\x85" not in b"".join(made.values())


def small_units():
    """Some documents are several units in this process and its forks, as some hundred MB are."""
    sources.UNIT_BYTES = 50_000


def test_a_killed_run_goes_on_from_its_finished_parts(tmp_path):
    for place in ("whole", "killed"):
        (tmp_path / place).mkdir()
        write_jsonl(tmp_path / place / "docs.jsonl", made_up_pages(400))
    args = "--source=docs.jsonl", "--vocab_size=300", "--threads=1"
    done_well(prepare_py(tmp_path / "whole", *args, before=small_units))
    cwd = tmp_path / "killed"
    rename, renamed = os.replace, tmp_path / "renamed"

    def noting(last):
        """Note each name that a file gets; and end without a word after this many parts."""

        def replace(a, b):
            rename(a, b)
            with open(renamed, "a") as file:
                print(Path(b).name, file=file)
            if len(parts()) == last:
                os.kill(os.getpid(), signal.SIGKILL)

        small_units()
        os.replace = replace

    parts = lambda: [line for line in renamed.read_bytes().splitlines() if b".json" in line]
    killed = prepare_py(cwd, *args, before=lambda: noting(2))
    assert killed.returncode == -signal.SIGKILL
    assert not (cwd / "data/python/meta.json").exists()
    finished = parts()
    assert len(finished) == 2
    renamed.write_text("")
    # The parts that were finished are not made again: each was once renamed to its name.
    done_well(prepare_py(cwd, *args, before=lambda: noting(10**9)))
    assert len(parts()) > 2 and not {*finished} & {*parts()}
    assert files(cwd / "data") == files(tmp_path / "whole/data")


@pytest.mark.skipif(sys.platform != "linux", reason="its /proc")
def test_a_killed_worker_is_a_line(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", made_up_pages(400))
    args = "--source=docs.jsonl", "--threads=2"
    stall = stalled(".json")
    before = lambda: (small_units(), stall())
    process, _, err = start_py(tmp_path, *args, before=before)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    while not (found := open(children).read().split()):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(int(found[0]), signal.SIGKILL)
    join(process, err)
    err.seek(0)
    assert process.exitcode == 1 and "a process was killed" in err.read()
    done_well(prepare_py(tmp_path, "--source=docs.jsonl", "--threads=2", "--tokenizer=byte"))


# --------------------------------------------------------------------------------------------------
# What once went wrong


def line_of(cwd, *args):
    """The one line with which prepare.py refuses."""
    result = prepare_py(cwd, *args)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    return result.stderr


def write_records(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_url_that_is_no_text_or_cannot_be_encoded_is_none(tmp_path):
    rows = [{"text": f"text {i}", "url": url} for i, url in enumerate([5, None, "\ud800", ["u"]])]
    write_records(tmp_path / "d.jsonl", [row | {"path": 1} for row in rows])
    steps = "--steps=html,url,exact,near"
    assert kept(tmp_path, "--source=d.jsonl", steps) == [row["text"] for row in rows]


def test_the_name_of_a_file_need_not_be_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in ((b"caf\xe9.txt", b"text"), (b"\xff.txt", b"\xff")):
        with open(os.fsencode(tmp_path / "in") + b"/" + name, "wb") as file:
            file.write(text)
    assert kept(tmp_path, "--source=in") == ["text"]
    skipped = json.loads((tmp_path / "data/python/meta.json").read_text())["skipped"]
    assert skipped == ["\ufffd.txt"]


def test_a_name_with_several_endings_is_of_the_last(tmp_path, monkeypatch):
    texts = made_up_documents(60)
    (tmp_path / "d.jsonl.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "e.json").write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    settings = {"tokenizer": "byte", "val_fraction": 0, "threads": 1, "unit_bytes": 500}
    for source in ("d.jsonl.json", "e.json"):
        main_here(monkeypatch, tmp_path, source=source, steps="", **settings)
        assert documents_of(tmp_path / "data/python", "train") == texts


def test_nested_too_deeply_is_a_line(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n' + "[" * 200_000)
    assert line_of(tmp_path, "--source=d.jsonl").startswith("d.jsonl:2: JSON nested too")
    (tmp_path / "d.json").write_text("[" * 200_000)
    assert line_of(tmp_path, "--source=d.json") == "d.json: JSON nested too deeply to read\n"


def test_a_part_without_documents_is_not_done_twice(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    part = sources.FilePart(str(tmp_path / "blank.txt"), 0, 2, None, 0)
    unit = sources.Unit("all", None, "text", [part], name="0f")
    cleaning = prepare.cleaning_settings()
    read = lambda: prepare.clean_unit(tmp_path, cleaning, [], "text", None, unit)
    assert [read(), read()] == [0, 0]


class Watched:
    """A file that counts what may have been looked at: with each read, all from its beginning."""

    looked = 0

    def __init__(self, path, mode):
        self.file, self.start = open(path, mode), 0

    def __enter__(self):
        return self

    def __exit__(self, *why):
        self.file.close()

    def seek(self, place):
        self.start = place
        return self.file.seek(place)

    def tell(self):
        return self.file.tell()

    def peek(self, size):
        return self.file.peek(size)

    def close(self):
        self.file.close()

    def read(self, *size):
        data = self.file.read(*size)
        Watched.looked += self.file.tell() - self.start
        return data


def test_a_part_is_found_by_work_that_grows_with_the_file(tmp_path, monkeypatch):
    """Of files of one part, all ranges together look at each byte a few times, of 8 MB as of 64."""
    monkeypatch.setattr("barelm.files.open", Watched, raising=False)
    for size in (8, 64):
        (tmp_path / "f").write_bytes(b"x" * (size << 20))
        Watched.looked = 0
        ranges = [range(n << 20, (n + 1) << 20) for n in range(size)]
        found = (sources.read_parts(str(tmp_path / "f"), "mark", r.start, r.stop) for r in ranges)
        assert [sum(map(len, parts)) for parts in found] == [size << 20] + [0] * (size - 1)
        assert size << 20 <= Watched.looked <= 8 * size << 20


def test_other_files_beside_the_source_are_another_run(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "d.jsonl", made_up_documents(5))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "source", "d.jsonl")
    names = []
    for key, place in (("blocklist", "list"), ("decontaminate", "list"), ("tokenizer", "folder")):
        monkeypatch.setattr(prepare, key, place)
        for content in ("a", "b"):
            path = tmp_path / place / "tokenizer.json" if key == "tokenizer" else tmp_path / place
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
            os.utime(path, ns=(1, len(names)))
            names.append(prepare.plan(setup("cpu"))[0].name)
    (tmp_path / "changed.py").write_text(Path(prepare.__file__).read_text() + "# a step does more")
    monkeypatch.setattr(prepare, "__file__", "changed.py")
    names.append(prepare.plan(setup("cpu"))[0].name)
    # and another filter, though the script is the same
    shutil.copytree(Path(barelm.__file__).parent, tmp_path / "barelm")
    monkeypatch.setattr(barelm, "__file__", str(tmp_path / "barelm" / "__init__.py"))
    assert prepare.plan(setup("cpu"))[0].name == names[-1]
    with open(tmp_path / "barelm" / "clean.py", "a") as file:
        file.write("# a step does more")
    names.append(prepare.plan(setup("cpu"))[0].name)
    assert len(set(names)) == 8


def test_max_documents_counts_over_all_parts(tmp_path, monkeypatch, capsys):
    texts = made_up_documents(200)
    rows = [{"text": text, "prompt": text, "completion": "c"} for text in texts]
    write_records(tmp_path / "d.jsonl", rows)
    settings = {"source": "d.jsonl", "threads": 1, "unit_bytes": 500, "max_documents": 70}
    main_here(monkeypatch, tmp_path, tokenizer="byte", val_fraction=0, **settings)
    assert documents_of(tmp_path / "data/python", "train") == texts[:70]
    assert "read: 70 of 70 documents" in capsys.readouterr().out
    main_here(monkeypatch, tmp_path, task="sft", **settings)
    made = (tmp_path / "data/python/sft_train.jsonl").read_text().splitlines()
    assert [json.loads(row)["messages"][0]["content"] for row in made] == texts[:70]
    settings |= {"source": "python", "sources": {"a": (1, "d.jsonl"), "b": (2, "d.jsonl")}}
    main_here(monkeypatch, tmp_path, task="sft", **settings)  # of a mix, too: here the same twice
    assert "sft: 70 records came before, word for word" in capsys.readouterr().out


def test_a_bad_task_record_of_a_later_range_has_its_number(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"prompt": t, "completion": "c"}) for t in made_up_documents(300)]
    lines[222] = "{"
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    main_here(monkeypatch, tmp_path, source="docs.jsonl", task="sft", unit_bytes=500, threads=1)
    assert "1 bad records: no JSON object, such as docs.jsonl:223: {" in capsys.readouterr().out


def test_fields_that_prepare_gives_records_itself(tmp_path):
    rows = [{"text": "t", "label": "x", "split_by": "s", "path": 3}, {"text": "u", "label": ""}]
    made, out = task(tmp_path, "classify", rows)
    assert made == [{"text": "t", "label": "x"}] and "no text or no label" in out
    other = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
    lonely = {"chosen": said("", "b")[1:], "rejected": said("", "c")[1:]}
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    made, out = task(tmp_path, "preference", [other, lonely, good])
    assert len(made) == 1 and "chosen and rejected do not answer the same" in out


def test_an_evaluation_in_parquet_or_damaged(tmp_path):
    pages = made_up_pages(3)
    write_jsonl(tmp_path / "d.jsonl", pages)
    (tmp_path / "bad.jsonl").write_text("{}\n{\n")
    args = "--source=d.jsonl", "--decontaminate="
    message = line_of(tmp_path, args[0], args[1] + "bad.jsonl")
    assert message == "--decontaminate=bad.jsonl:2: {: expected a JSON object\n"
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["short"], "question": [pages[1]]})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    assert kept(tmp_path, args[0], args[1] + "e.parquet") == [pages[0], pages[2]]


def test_settings_and_places_that_cannot_be_are_a_line(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", made_up_documents(5))
    (tmp_path / "urls").write_bytes(b"caf\xe9")
    for mix in ("{'a': (1, 5)}", "{'a': (1,)}", "{5: 1}", "{'a': 1e999}"):
        assert line_of(tmp_path, f"--sources={mix}").startswith("sources: ")
    assert line_of(tmp_path, "--source=@urls").endswith(": is the address right?\n")
    for key, value in [("max_documents", 10**30), ("threads", 10**30), ("shard_tokens", 2**31)]:
        line = line_of(tmp_path, "--source=d.jsonl", f"--{key}={value}")
        assert line.startswith(f"{key}={value}: expected ") and line.endswith(" or less\n")
    assert "expected two numbers" in line_of(tmp_path, "--perplexity_band=[1, 'a']")
    fineweb = line_of(tmp_path, "--source=fineweb10B", "--shards=104", "--dataset=f")
    assert fineweb == "shards=104: expected up to 103\n"
    (tmp_path / "data/kept").parent.mkdir(exist_ok=True)
    (tmp_path / "data/kept").write_text("no folder")
    assert "data/kept" in line_of(tmp_path, "--source=d.jsonl", "--dataset=kept")
    too_few = line_of(tmp_path, "--source=d.jsonl", "--tokenizer_bytes=1", "--dataset=f")
    assert too_few == "tokenizer_bytes=1: the documents are too long for so few\n"
    shutil.rmtree(tmp_path / "data/f")
    assert os.listdir(tmp_path / "data") == ["kept"]


def test_places_where_no_data_can_be_are_a_line_and_nothing_changes(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", made_up_documents(5))
    args = "--source=d.jsonl", "--tokenizer=byte", "--threads=1"
    for name in ("", ".", "..", "../..", "/", str(tmp_path), "x/.."):
        line = line_of(tmp_path, *args, f"--dataset={name}")
        assert line == f"dataset={name!r}: expected a name: the result is data/<dataset>\n"
    assert os.listdir(tmp_path) == ["d.jsonl"]
    (tmp_path / "data/m/meta.json").mkdir(parents=True)
    (tmp_path / "data/t/sft_val.jsonl").mkdir(parents=True)
    (tmp_path / "data/file").write_text("x")
    (tmp_path / "data/loop").symlink_to("loop")
    (tmp_path / "data/empty").mkdir()
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    before = sorted(tmp_path.rglob("*"))
    for name, why in [
        ("file", "data/file/work: Not a directory; nothing was changed"),
        ("file/x", "data/file/x/work: Not a directory; nothing was changed"),
        ("x" * 300, ": File name too long; nothing was changed"),
        ("y/" + "x" * 300, ": File name too long; nothing was changed"),
        ("loop", "data/loop"),
        ("m", "data/m/meta.json: a folder where a file is to be: move it; nothing was changed"),
    ]:
        assert why in line_of(tmp_path, *args, f"--dataset={name}")
    sft = "--task=sft", "--source=p.jsonl", "--dataset=t"
    assert "data/t/sft_val.jsonl: a folder where a file" in line_of(tmp_path, *sft)
    short = "--source=data/file", "--steps=length", "--dataset=empty"
    assert "no text for training" in line_of(tmp_path, *short)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_no_utf8_come_back_from_the_settings(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("some text " * 30)
    done_well(prepare_py(tmp_path, f"--source={name}", f"--dataset={name}", *BYTES, "--report"))
    meta = json.loads((tmp_path / "data" / name / "meta.json").read_text())
    assert meta["settings"]["source"] == name


def test_a_reader_that_left_is_no_error(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", made_up_documents(50))
    command = [sys.executable, str(ROOT / "prepare.py"), "--source=d.jsonl", *BYTES]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh"]  # a standard output that is none
    reader, writer = os.pipe()
    os.close(reader)
    for begin, stdout, code in (([], writer, 141), (closed, None, 0)):
        done = subprocess.run(
            [*begin, *command], cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True
        )
        assert (done.returncode, done.stderr) == (code, "")
        assert (tmp_path / "data/python/meta.json").exists() == (code == 0)
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*command[:2], "--inspect=some text", "--tokenizer=byte"],
                cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "cannot be written: No space left on device" in done.stderr


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="Permission denied"):
        sources.walk(tmp_path)


def test_a_users_own_file_beside_the_result_stays(tmp_path):
    (tmp_path / "data/python").mkdir(parents=True)
    write_jsonl(tmp_path / "data/python/my_train.jsonl", made_up_documents(5))
    (tmp_path / "data/python/sft_train.jsonl").write_text("of an older run")
    kept(tmp_path, "--source=data/python/my_train.jsonl")
    left = sorted(path.name for path in (tmp_path / "data/python").glob("*.jsonl"))
    assert left == ["my_train.jsonl"]


def test_the_numbers_of_a_mix_are_those_of_its_shards(tmp_path):
    mixed(tmp_path)
    folder = tmp_path / "data" / "mix"
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val", "val.web", "val.code"):
        docs = documents_of(folder, split)
        assert meta[split]["documents"] == len(docs)
        assert meta[split]["bytes"] == sum(len(doc.encode()) for doc in docs)
        assert meta[split]["tokens"] == meta[split]["documents"] + meta[split]["bytes"]


def test_downloads_of_like_names(tmp_path):
    urls = [
        f"https://a.org/{name}" for name in ("x/d.jsonl?download=true", "x_d.jsonl", "d?f=e.gz")
    ]
    paths = [sources.download_path(url) for url in urls]
    assert len(set(paths)) == 3 and [path.suffix for path in paths] == [".jsonl", ".jsonl", ".gz"]


def hub(monkeypatch, names):
    answer = SimpleNamespace(raise_for_status=lambda: 0)
    answer.json = lambda: {"siblings": [{"rfilename": name} for name in names]}
    monkeypatch.setattr(sources.requests, "get", lambda url, timeout: answer)


def test_the_files_of_a_hub_data_set(monkeypatch):
    names = ["README.md", "info.json", "s/10/a.parquet", "s/100/b.parquet", "t/train#1.jsonl"]
    hub(monkeypatch, names)
    urls = lambda spec: [url.partition("/datasets/")[2] for url in sources.addresses(spec)]
    assert urls("hf:o/n/s/10") == ["o/n/resolve/main/s/10/a.parquet"]
    assert urls("hf:n") == ["n/resolve/main/t/train%231.jsonl"]
    with pytest.raises(UserError, match="no JSONL, parquet or text file in it"):
        urls("hf:o/n/nowhere")
    hub(monkeypatch, ["README.md", "A.NDJSON.zst", "b.JSONL", "c.csv", "d.parquet"])
    assert urls("hf:o/n") == ["o/n/resolve/main/A.NDJSON.zst", "o/n/resolve/main/b.JSONL"]
    hub(monkeypatch, ["README.md", "c.CSV", "test.xyz"])
    assert urls("hf:o/n") == ["o/n/resolve/main/c.CSV"]


def test_ctrl_c_is_a_line(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", made_up_pages(400))
    stall = stalled(".json")
    # Where the tests run in a shell's background, its processes ignore Ctrl-C.
    hear = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    before = lambda: (os.setsid(), hear(), small_units(), stall())
    process, _, err = start_py(tmp_path, "--source=docs.jsonl", "--threads=2", before=before)
    work = tmp_path / "data/python/work"
    while len(list(work.glob("*.txt"))) < 2:  # both are past their start
        assert process.is_alive()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    join(process, err)
    err.seek(0)
    assert err.read() == "stopped: the same command goes on from here\n"


def test_two_processes_share_the_shards_and_the_tasks(tmp_path, monkeypatch):
    write_records(tmp_path / "d.jsonl", [{"prompt": t, "completion": t} for t in made_up_pages(9)])
    args = "--task=sft", "--source=d.jsonl", "--dataset=t", "--threads=1"
    run(tmp_path, "prepare.py", *args, processes=2)
    assert sorted(os.listdir(tmp_path / "data/t")) == ["sft_train.jsonl", "sft_val.jsonl"]
    fetched = []
    monkeypatch.setattr(prepare, "shards", 2)
    monkeypatch.setattr(prepare, "tiktoken_tokenizer", lambda name, settings: None)
    monkeypatch.setattr(prepare, "wait", lambda *args: None)
    monkeypatch.setattr(prepare, "read_fineweb", fetched.append)
    prepare.use_fineweb(SimpleNamespace(rank=1, world=2, is_main=False), tmp_path, tmp_path)
    assert fetched == ["train_000001.bin"]


def test_a_string_further_left_does_not_keep_a_method_indented():
    method = '    def page(self):\n        """Doc."""\n'
    source = f"class C:\n{method}        return '''<a>\n<b>\n'''\n"
    [(code, docstring)] = functions_in(source)
    assert code == "def page(self):\n    return '''<a>\n<b>\n'''"
    assert docstring == "Doc."
