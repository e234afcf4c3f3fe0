"""Tokenizers of all four forms that llama.cpp has, for the tests of GGUF."""

import base64
import json
import zlib
from pathlib import Path

from barelm.bpe import bpe_tokenizer, split_step
from barelm.llama_ids import PATTERNS
from barelm.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
# A table of SentencePiece's: tabs, ends of lines, U+00A0, U+2009 and U+3000 become blanks.
CHARSMAP = (
    "eNol03WsEFQUB+D7GPxBPLq7OwQEAQHp7k4pkVIBUUBQuru7u5RHo6C0xOhGSelNUiUlvgd3+3bO9rs79253N8QMIW"
    "QMIXbsEOLECtFrwIJ0IUSm0mSMEUYmUmPGCANyhRBXGIdI4pGA+NgSEpKExCQjKSlIjlEhJWlIjfEhLRlIT6b3VwhZ"
    "yEw2spKD7Dg65CQPuclHXgqQn4J8QGEKUYQP+YiiFKcYH1OCUpTkE0pTljKUpxwVqUBlKlGVKlSnGjWpQW1qUZc61K"
    "ceDWlAYxrRlCY0pxktaUErPqUNrWlHW9rzGR34nE50pAud+ZIv6MpXdKcbPfiab/mGXvTkO3rTlz78wPf0px8Dox+d"
    "wQxiKEMYzjBGMoLRjGIsYxjPOCYygclMYipTmM40ZjKD2cxiLnOYzzwWsoDFLGIpS1jOMlaygtWs4kfWsJafWEcUG1"
    "jPJjayhc38zFa28Qu/sp0d/MYudrKH3exjL/v5nYMciM62RoRD6hEOc4yjnOA4pzjJGU5zjrNc4Dx/8geXuMgVLnON"
    "q1znL25yg9vc4i53orOoiHB9TES4p/+bB9znEQ/5h8f8x7885QnPecZLXvCK/3nD63d/7y36D4Vl"
)
CHARSMAP = base64.b64encode(zlib.decompress(base64.b64decode(CHARSMAP))).decode()


def added(*names):
    usual = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return [dict(id=i, content=name) | usual for i, name in enumerate(names)]


def wordpiece():
    """BERT's, with the steps that its files have."""
    words = "the quick brown fox jump over dog hello world de return main we see one two".split()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    signs = "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*names, *words, *letters, *signs, *(f"##{x}" for x in letters), "##ing", "##s", "##f"]
    vocab = {token: i for i, token in enumerate(tokens)}
    steps = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    steps += [{"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    tokens = {name: dict(id=name, ids=[vocab[name]], tokens=[name]) for name in ("[CLS]", "[SEP]")}
    spec = {
        "added_tokens": added(*names),
        "normalizer": dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True,
                           strip_accents=None, lowercase=True),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": dict(type="TemplateProcessing", single=steps, pair=steps,
                               special_tokens=tokens),
        "decoder": dict(type="WordPiece", prefix="##", cleanup=True),
        "model": dict(type="WordPiece", unk_token="[UNK]", continuing_subword_prefix="##",
                      max_input_chars_per_word=100, vocab=vocab),
    }  # fmt: skip
    config = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    return Tokenizer(spec, config | dict(mask_token="[MASK]"))


def unigram():
    """T5's, with the steps that its files have but for the table of letters."""
    mark = "\u2581"
    names = ["<pad>", "</s>", "<unk>"]
    pairs = [[name, 0.0] for name in names] + [[mark, -3.0]]
    words = "the quick brown fox return main one two times hello world see".split()
    for i, word in enumerate(words):
        pairs += [[f"{mark}{word}", -4.0 - i / 10], [word, -6.0 - i / 10]]
    for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789.,:;!?'()\"=-+*/_<>"):
        pairs.append([letter, -8.0 - i / 50])
    steps = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
    spec = {
        "added_tokens": added(*names),
        "normalizer": dict(type="Precompiled", precompiled_charsmap=CHARSMAP),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": mark, "prepend_scheme": "always", "split": True},
        ]},
        "post_processor": dict(type="TemplateProcessing", single=steps, pair=steps,
            special_tokens={"</s>": dict(id="</s>", ids=[1], tokens=["</s>"])}),
        "decoder": dict(type="Metaspace", replacement=mark, prepend_scheme="always", split=True),
        "model": dict(type="Unigram", unk_id=2, vocab=pairs, byte_fallback=False),
    }  # fmt: skip
    return Tokenizer(spec, dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>"))


def named_tokenizer(name):
    if name == "wordpiece":
        return wordpiece()
    if name == "unigram":
        return unigram()
    return Tokenizer.from_folder(ROOT / "tests/fixtures/tokenizers" / name)


def with_pattern(name):
    """A byte-level BPE whose text is cut by the patterns that llama.cpp has a name for."""
    merges = [b"t h", b"th e", b"i n", b"o n", b"1 2", b"12 3", b"3 4", b"' s", b"! !", b"a n"]
    pairs = [tuple(merge.split(b" ")) for merge in merges]
    pairs += [(b" ", b"t"), (b"\n", b"\n"), (b" ", b" "), (b".", b"."), (b"\r", b"\n")]
    spec = json.loads(json.dumps(bpe_tokenizer(pairs).spec))
    spec["model"]["ignore_merges"] = name in ("llama-bpe", "tekken")
    spec["pre_tokenizer"]["pretokenizers"][:1] = [split_step(p) for p in PATTERNS[name]]
    return Tokenizer(spec, bpe_tokenizer(pairs).config)
