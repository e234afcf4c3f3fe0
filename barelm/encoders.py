"""What runs a tokenizer.json: our own byte-level BPE and words, or the library `tokenizers`.

`open_encoder` chooses. All three encoders have the same short interface:

    normal(text)    the text as the encoder is fed it
    encode(text)    the ids of a normal text, in which no special token is read
    spans(text)     [(id, begin, end)], each token with the characters of the normal text it stands
                    for; `first`: nothing comes before this text, not even a special token
    bytes, shown    {id: the bytes that it stands for}: of ordinary tokens; of special ones too
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.run import UserError
from barelm.splits import (
    BERT_WORDS,
    CHARACTERS,
    GAPLESS,
    NotOurs,
    Splitter,
    may_match_nothing,
    normalize,
    portable_pattern,
    read_normalizers,
    read_pre_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

NO_TOKEN = 1 << 20  # from here up: ids for tiktoken's sake, of bytes that a vocabulary lacks


def open_encoder(spec: dict) -> Any:
    """The encoder for a tokenizer.json, parsed and checked: ours where it gives the same ids as
    Hugging Face's library, else that library itself."""
    try:
        return own_encoder(spec)
    except NotOurs as reason:
        return LibraryEncoder(spec, f"tokenizer.json: {reason}")


def own_encoder(spec: dict) -> Any:
    """ByteBPE or Words; NotOurs says what in the file neither of them does."""
    kind = kind_of(spec)
    if kind not in ("BPE", "WordLevel"):
        raise NotOurs(f"a {kind} tokenizer")
    # Each of the following raises NotOurs, too.
    normalizers = read_normalizers(spec)
    form, steps = read_pre_tokenizer(spec)
    for step in post_processors(spec):
        # ByteLevel only trims offsets, and TemplateProcessing says what a text begins with.
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise NotOurs(f"the post-processor {step['type']}")
    for token in spec.get("added_tokens", []):
        if not token["special"]:
            refuse_flags(token, normalizers)
    if kind == "BPE" and form == "ByteLevel":
        return ByteBPE(spec, Splitter(steps), normalizers)
    if kind == "WordLevel" and form == "Split":
        return Words(spec, Splitter(steps), normalizers)
    raise NotOurs(f"a {kind} tokenizer with such a pre-tokenizer")


def kind_of(spec: dict) -> str:
    """BPE, WordLevel, Unigram, WordPiece … Old files, such as GPT-2's, do not name it."""
    body = spec.get("model") or {}
    if "type" not in body and "merges" in body:
        return "BPE"
    return body.get("type")


def post_processors(spec: dict) -> list:
    """The steps of a tokenizer.json's post_processor."""
    step = spec.get("post_processor")
    if not step:
        return []
    return step.get("processors", [step])


def refuse_flags(token: str, normalizers: list) -> None:
    """NotOurs where an added token that is text is found in another way than letter by letter."""
    for flag in ("lstrip", "rstrip", "single_word"):
        if token.get(flag):
            raise NotOurs(f"the added token {token['content']} with {flag}")
    if token.get("normalized") and normalizers:  # it is looked for in the normal text
        raise NotOurs(f"the added token {token['content']} with normalized")


def names_of(spec: dict) -> dict[str, int]:
    """{name: id} of the added tokens, those that the file calls special and the others."""
    return {token["content"]: token["id"] for token in spec.get("added_tokens", [])}


def mend(text: str) -> str:
    """The text with U+FFFD for half a surrogate pair, which is no letter and has no UTF-8."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs are joined


def byte_letters() -> dict[int, str]:
    """GPT-2's table: the printable letter that stands for each byte in a tokenizer.json."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # in Latin-1: themselves
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:  # a space is Ġ, a line end Ċ
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


BYTE_OF_LETTER = {letter: byte for byte, letter in byte_letters().items()}


def show_names(spec: dict, tokens: dict[int, bytes]) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """(bytes, shown) from {id: bytes} of the ordinary tokens: both with the added tokens that are
    text (such as <think>), `shown` with the special ones by their names too."""
    shown = dict(tokens)
    text = dict(tokens)
    for token in spec.get("added_tokens", []):
        shown[token["id"]] = token["content"].encode()
        if not token["special"]:
            text[token["id"]] = token["content"].encode()
    return text, shown


# --------------------------------------------------------------------------------------------------
# Ours


class ByteBPE:
    """Byte-level BPE (Radford et al. 2019, section 2.2): GPT-2's, Llama 3's, Qwen's and what
    prepare.py trains by default. tiktoken merges, in Rust; where it cannot run a file's pattern,
    `Splitter` cuts the text and tiktoken encodes the pieces."""

    can_cut = True  # a long text may be encoded in parts that begin at lines

    def __init__(self, spec: dict, splitter: Splitter, normalizers: list) -> None:
        self.splitter = splitter
        self.split_pattern = splitter.pattern
        self.normalizers = normalizers
        ranks = byte_ranks(spec)  # {bytes: id}: tiktoken's form of the merges
        # Bytes that the vocabulary lacks are lost, as in `tokenizers`. tiktoken wants them all.
        self.lacking = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        check_merges(spec["model"], ranks, 256 - len(self.lacking))
        self.bytes, self.shown = show_names(spec, {id: token for token, id in ranks.items()})
        self.sizes = np.zeros(1 + max(self.bytes), np.int64)  # (n_vocab,), bytes of each token
        for id, token in self.bytes.items():
            self.sizes[id] = len(token)
        # Whether white space around a token is none of its characters, as for transformers' masks.
        self.trims_offsets = False
        for step in post_processors(spec):
            if step["type"] == "ByteLevel" and step.get("trim_offsets", True):
                self.trims_offsets = True

        for byte in self.lacking:
            ranks[bytes([byte])] = NO_TOKEN + byte
        self.tiktoken = None
        if splitter.pattern is not None:
            self.tiktoken = tiktoken_encoding(ranks, portable_pattern(splitter.pattern))
        self.rust_splits = self.tiktoken is not None  # does tiktoken itself cut the text?
        if not self.rust_splits:  # then it gets single pieces, and its own pattern is not used
            self.tiktoken = tiktoken_encoding(ranks, CHARACTERS)

    def normal(self, text: str) -> str:
        return normalize(mend(text), self.normalizers)

    def encode(self, text: str) -> list[int]:
        array = self.encode_array(text)
        if array is not None:
            return array.tolist()
        ids = []
        for piece in self.splitter.pieces(text):
            ids += self.merge(piece)
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """The ids (n,) uint32 of a normal text as tiktoken splits it; None where it does not: its
        regular expressions fail, there is text between their matches, or a byte has no token."""
        if not self.rust_splits:
            return None
        try:
            # What Encoding.encode_to_numpy calls. Unlike encode_ordinary, it raises, and does not
            # panic, on a run of blanks that is too long for its engine.
            data = self.tiktoken._core_bpe.encode_to_tiktoken_buffer(text, set())
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a ValueError, or a panic of Rust, which is no Exception
            return None
        ids = np.frombuffer(data, np.uint32)
        if self.lacking and (ids >= NO_TOKEN).any():
            return None
        # What tiktoken's pattern does not match it leaves out; Hugging Face's Split does not.
        if not self.splitter.is_gapless and self.sizes[ids].sum() != len(text.encode()):
            return None
        return ids

    def merge(self, piece: str) -> list[int]:
        """The ids of one piece of text."""
        # Without the bytes that have no token: what is beside them may merge.
        data = piece.encode().translate(None, self.lacking)
        return self.tiktoken._core_bpe.encode_single_piece(data) if data else []

    def spans(self, text: str, first: bool = True) -> list[tuple[int, int, int]]:
        if not self.splitter.drops_text:  # then all bytes of the text are in its tokens, in order
            return self.place(self.encode(text), text, 0)
        spans = []
        for begin, end in self.splitter.cuts(text):
            piece = text[begin:end]
            spans += self.place(self.merge(piece), piece, begin)
        return spans

    def place(self, ids: list[int], text: str, at: int) -> list[tuple[int, int, int]]:
        """[(id, begin, end)]: the characters of the ids of a text that begins at place `at`."""
        # The character that each byte is of; without the bytes that have no token.
        character = []
        for i, letter in enumerate(text):
            n_bytes = len(letter.encode().translate(None, self.lacking))
            character += [at + i] * n_bytes
        spans = []
        end = 0  # bytes of this token and all before
        for id in ids:
            token = self.bytes[id]
            begin = end
            end += len(token)
            first_byte = begin
            last_byte = end - 1
            if self.trims_offsets:
                first_byte = end - len(token.lstrip())
                last_byte = begin + len(token.rstrip()) - 1
            if first_byte <= last_byte:
                spans.append((id, character[first_byte], character[last_byte] + 1))
            else:  # nothing is left of it: a place behind it, between two characters
                behind = character[end - 1] + 1
                spans.append((id, behind, behind))
        return spans


def tiktoken_encoding(ranks: dict[bytes, int], pattern: str) -> Any:
    """tiktoken's Encoding of {bytes: id} and a split pattern; None where Rust cannot run that."""
    import tiktoken  # here, since the other kinds need none of it

    if may_match_nothing(pattern):
        return None
    # It gets none of the real special tokens, and so reads none in a text.
    special = {"<|none|>": NO_TOKEN + 256}
    try:
        return tiktoken.Encoding(
            "barelm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    except ValueError:
        return None


def byte_ranks(spec: dict) -> dict[bytes, int]:
    """{token as bytes: its id}, for a vocabulary in GPT-2's letters."""
    names = names_of(spec)
    ranks = {}
    for token, id in spec["model"]["vocab"].items():
        if token in names:  # its letters need not stand for bytes
            continue
        try:
            ranks[bytes(BYTE_OF_LETTER[letter] for letter in token)] = id
        except KeyError:
            raise NotOurs(f"the token {token!r:.60}, which is not made of bytes,") from None
    return ranks


def check_merges(body: dict, ranks: dict[bytes, int], n_bytes: int) -> None:
    """NotOurs where tiktoken would merge in another order than the file says: it always joins the
    two tokens that make the one of the lowest id."""
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if body.get(key):
            raise NotOurs(f"a BPE tokenizer with {key}")
    merged_ids = []
    for merge in body["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # two forms of files
        merged_ids.append(body["vocab"][left + right])
    # With ignore_merges a token that is a whole piece is taken at once; its merges may be several.
    may_repeat = body.get("ignore_merges", False)
    is_ordered = True
    for earlier, later in zip(merged_ids, merged_ids[1:]):
        is_ordered &= earlier < later or (earlier == later and may_repeat)
    # Nor may a token be there that no merge makes: tiktoken would make it.
    if not is_ordered or len(set(merged_ids)) + n_bytes != len(ranks):
        raise NotOurs("a BPE tokenizer whose ids are not in merge order")


class Words:
    """WordLevel: a token for each piece of text, which is a character or a word."""

    can_cut = True

    def __init__(self, spec: dict, splitter: Splitter, normalizers: list) -> None:
        decoder = spec.get("decoder") or {"type": "Fuse"}
        if splitter.drops_text or decoder["type"] != "Fuse":
            raise NotOurs("a WordLevel tokenizer that does not keep all of a text")
        self.splitter = splitter
        self.split_pattern = splitter.pattern
        self.normalizers = normalizers
        names = names_of(spec)
        vocab = spec["model"]["vocab"]
        self.unk_id = vocab[spec["model"]["unk_token"]]
        # Without the special tokens, which are in the vocabulary as well: a text has none.
        self.vocab = {word: id for word, id in vocab.items() if word not in names}
        tokens = {id: word.encode() for word, id in self.vocab.items()}
        self.bytes, self.shown = show_names(spec, tokens)

    def normal(self, text: str) -> str:
        return normalize(mend(text), self.normalizers)

    def encode(self, text: str) -> list[int]:
        return [self.vocab.get(piece, self.unk_id) for piece in self.splitter.pieces(text)]

    def spans(self, text: str, first: bool = True) -> list[tuple[int, int, int]]:
        spans = []
        begin = 0
        for piece in self.splitter.pieces(text):  # which leave nothing out
            spans.append((self.vocab.get(piece, self.unk_id), begin, begin + len(piece)))
            begin += len(piece)
        return spans


# --------------------------------------------------------------------------------------------------
# Everyone else's, by the library `tokenizers`


def import_tokenizers(what: str) -> ModuleType:
    """Hugging Face's library; where it is not installed a UserError that says what needs it."""
    # Its threads would be more than there are cores where prepare.py has a process for each, and a
    # fork after they have run makes it print a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{what} needs tokenizers: pip install tokenizers") from None
    return tokenizers


@contextmanager
def library_errors() -> Iterator[None]:
    """What the library raises becomes a UserError of one line: an Exception of no kind of its own,
    or a panic of Rust, which is no Exception at all."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
        raise
    except BaseException as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"tokenizer.json: tokenizers refuses it: {why}") from None


class LibraryEncoder:
    """Any tokenizer.json, by Hugging Face's library: SentencePiece's BPE (Llama 2, Mistral),
    Unigram (T5), WordPiece (BERT), and byte-level BPE with an unusual step before or behind."""

    split_pattern = None  # splitting and normalizing are the library's work
    normalizers = ()

    def __init__(self, spec: dict, reason: str) -> None:
        tokenizers = import_tokenizers(reason)
        self.spec = spec
        if (spec.get("model") or {}).get("dropout"):
            why = "not supported: dropout, which gives other ids each time"
            raise UserError(f"tokenizer.json: {why}")
        self.can_cut = splits_at_lines(spec)
        with library_errors():
            self.whole = library_tokenizer(tokenizers, spec)
            vocab = self.whole.get_vocab(with_added_tokens=True)
            # A chat's text is encoded in parts, of which only the first begins the text.
            later_spec = without_first_space(spec)
            self.later = self.whole
            if later_spec != spec:
                self.later = library_tokenizer(tokenizers, later_spec)
        steps = decoder_steps(spec)
        self.shown = {id: decoded_token(token, steps) for token, id in vocab.items()}
        self.bytes = dict(self.shown)
        for name, id in names_of(spec).items():
            if vocab.get(name) != id:  # it numbers those that the vocabulary lacks by itself
                why = f"the added token {name!r:.60} has the id {id}, and {vocab.get(name)} in"
                raise UserError(f"tokenizer.json: {why} tokenizers")
        for token in spec.get("added_tokens", []):
            if token["special"]:
                del self.bytes[token["id"]]

    def __reduce__(self):
        # Not by the library's own pickle, which forgets encode_special_tokens.
        return LibraryEncoder, (self.spec, "tokenizer.json: this tokenizer")

    def normal(self, text: str) -> str:
        return mend(text)

    def encode(self, text: str) -> list[int]:
        with library_errors():  # such as of a word without a token, where there is no unknown one
            # Without offsets, and so in half the time of the library's plain `encode`.
            [encoding] = self.whole.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def spans(self, text: str, first: bool = True) -> list[tuple[int, int, int]]:
        library = self.whole if first else self.later
        with library_errors():
            encoding = library.encode(text, add_special_tokens=False)
        # Its offsets are in characters of the text as it was given, before any normalizer.
        return [(id, begin, end) for id, (begin, end) in zip(encoding.ids, encoding.offsets)]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens by their names."""
        with library_errors():
            return self.whole.decode(
                [int(id) for id in ids], skip_special_tokens=False
            )  # not numpy's


def library_tokenizer(tokenizers: ModuleType, spec: dict) -> Any:
    """The library's own Tokenizer, which reads no special token in a text."""
    whole_text = {"truncation": None, "padding": None}  # whatever its owner cut texts to
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec | whole_text))
    tokenizer.encode_special_tokens = True  # as text
    return tokenizer


def without_first_space(spec: dict) -> dict:
    """The tokenizer.json without the space that Metaspace puts before the first word alone."""
    text = json.dumps(spec.get("pre_tokenizer"))  # as text, since it may be a step of several
    text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return spec | {"pre_tokenizer": json.loads(text)}


def splits_at_lines(spec: dict) -> bool:
    """Whether the tokenizer cuts text at every line that begins with a letter, as those do that
    prepare.py trains. A space put before a text would stand before each part."""
    try:
        read_normalizers(spec)
        _, steps = read_pre_tokenizer(spec)
    except NotOurs:
        return False  # it may be so, but nobody knows
    pattern, behavior, _ = steps[0]
    return pattern in GAPLESS and behavior == "Isolated" or pattern == BERT_WORDS


DECODERS = "BPEDecoder ByteFallback ByteLevel Fuse Metaspace Replace Strip WordPiece".split()


def decoder_steps(spec: dict) -> list[dict[str, str]]:
    """The steps of a tokenizer.json's decoder; UserError where a token's bytes do not follow."""
    decoder = spec.get("decoder")
    if not decoder:
        return []
    steps = decoder.get("decoders", [decoder])
    for step in steps:
        is_pattern = step["type"] == "Replace" and "String" not in step["pattern"]
        if step["type"] not in DECODERS or is_pattern:
            raise UserError(f"tokenizer.json: not supported: such a decoder: {step['type']}")
    return steps


def decoded_token(token: str, steps: list[dict[str, str]]) -> bytes:
    """The bytes that a token stands for within a text, by the steps of its decoder."""
    kinds = [step["type"] for step in steps]
    if "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    if "ByteLevel" in kinds and BYTE_OF_LETTER.keys() >= set(token):
        return bytes(BYTE_OF_LETTER[letter] for letter in token)
    if not steps:  # the library puts a space between any two
        return f" {token}".encode()
    for step in steps:
        if step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif step["type"] == "BPEDecoder":
            token = token.replace(step["suffix"], " ")
        elif step["type"] == "WordPiece" and token.startswith(step["prefix"]):
            token = token.removeprefix(step["prefix"])  # a part within a word
        elif step["type"] == "WordPiece":
            token = f" {token}"  # white space is lost: a word is shown behind a blank
    return token.encode()  # Fuse and Strip change a whole text alone
