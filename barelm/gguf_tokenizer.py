"""A tokenizer.json in the four forms of GGUF: byte-level BPE, SentencePiece's BPE and Unigram,
WordPiece. What llama.cpp would read otherwise than the tokenizer itself is refused by name."""

from __future__ import annotations

import base64
import copy
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from barelm.encoders import LibraryEncoder
from barelm.llama_ids import (
    HARD_TEXTS,
    PATTERNS,
    SPACE,
    WHOLE_PIECES,
    LlamaVocab,
    llama_ids,
    pieces_of,
)
from barelm.run import UserError

if TYPE_CHECKING:
    from barelm.tokenizer import Tokenizer

N_SAMPLES = 400  # of the vocabulary's own tokens, that are read too
UNREACHED = -1e4  # the score of what no merge makes
OTHER_FORMATS = "--export=hf holds any"


def refusal(why: str) -> UserError:
    return UserError(f"--export=gguf: {why} ({OTHER_FORMATS})")


def llama_vocab(tok: Tokenizer, vocab_size: int) -> LlamaVocab:
    """The LlamaVocab of a tokenizer, with which llama.cpp has the tokenizer's ids on hard texts;
    UserError where it has none. Ids below vocab_size that the tokenizer lacks are named [PADi]."""
    steps = str(tok.spec.get("pre_tokenizer"))
    if tok.kind == "BPE" and "ByteLevel" in steps:
        return byte_level_vocab(tok, vocab_size)
    if tok.kind == "BPE" and tok.spec["model"].get("byte_fallback"):
        return sentencepiece_vocab(tok, vocab_size)
    if tok.kind == "Unigram" and "ByteLevel" not in steps:
        return unigram_vocab(tok, vocab_size)
    if tok.kind == "WordPiece":
        return wordpiece_vocab(tok, vocab_size)
    what = f"byte-level {tok.kind}" if tok.kind == "Unigram" else tok.kind
    kinds = "byte-level BPE, SentencePiece's BPE and Unigram, WordPiece"
    raise refusal(f"llama.cpp has no {what} tokenizer: it reads {kinds}")


# --------------------------------------------------------------------------------------------------
# What all kinds have


def names_and_types(tok: Tokenizer, vocab: dict[str, int], vocab_size: int) -> tuple[list, list]:
    """([name of each id], [its type]); vocab: {name: id} of the tokens that are not added."""
    if tok.n_vocab > vocab_size:
        raise refusal(f"the tokenizer has {tok.n_vocab:,} ids, the model {vocab_size:,}")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # as llama.cpp's own converter names them
    types = ["UNUSED"] * vocab_size
    for token, id in vocab.items():
        tokens[id] = token
        types[id] = "NORMAL"
    for added in tok.spec.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = "CONTROL" if added["special"] else "USER_DEFINED"
    if len(set(tokens)) < len(tokens):
        [(twice, _)] = Counter(tokens).most_common(1)
        raise refusal(f"llama.cpp wants a name for each token: {twice!r:.60} is two's")
    return tokens, types


def trial_texts(tok: Tokenizer) -> list[str]:
    """What llama.cpp and the tokenizer must read alike: hard texts, and some of its own tokens one
    behind the other."""
    ids = sorted(tok.bytes)
    step = max(1, len(ids) // N_SAMPLES)
    names = []
    for id in ids[::step]:
        try:
            names.append(tok.bytes[id].decode())
        except UnicodeDecodeError:  # a part of a letter
            continue
    texts = list(HARD_TEXTS)
    for start in range(0, len(names), 40):
        texts.append("".join(names[start : start + 40]))
        texts.append(" ".join(names[start : start + 40]))
    if "NFC" in str(tok.spec.get("normalizer")):
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    if spares_a_blank(tok):
        texts = [text.lstrip(" ") for text in texts]
    if ends_with_a_blank(tok):
        texts = [text.rstrip() for text in texts]
    return texts


def spares_a_blank(tok: Tokenizer) -> bool:
    """Whether a blank is put before a text but for one that begins with a blank: Metaspace's way,
    which is neither SentencePiece's nor llama.cpp's."""
    return "Metaspace" in str(tok.spec.get("pre_tokenizer"))


def ends_with_a_blank(tok: Tokenizer) -> bool:
    """Whether a blank at the end of a text is a token, where blanks in a row are one: today's
    XLM-RoBERTa's way, and neither SentencePiece's nor llama.cpp's."""
    is_split = "WhitespaceSplit" in str(tok.spec.get("pre_tokenizer"))
    return tok.kind == "Unigram" and "{2,}" in str(tok.spec.get("normalizer")) and not is_split


def reads_alike(tok: Tokenizer, vocab: LlamaVocab, text: str) -> bool:
    """Whether llama.cpp has the tokenizer's ids of a text; of WordPiece, which loses what it does
    not know, unknown words in a row count as one."""
    try:
        ids = llama_ids(vocab, text)
    except KeyError:  # a byte that the vocabulary lacks
        return False
    if vocab.model == "bert":
        return without_repeats(ids, vocab.unk_id) == without_repeats(tok.encode(text), vocab.unk_id)
    return ids == tok.encode(text)


def without_repeats(ids: list[int], repeated: int | None) -> list[int]:
    """The ids, one of each run of this one."""
    out: list[int] = []
    for id in ids:
        if id != repeated or not out or out[-1] != id:
            out.append(id)
    return out


def checked(tok: Tokenizer, candidates: list[LlamaVocab], what: str) -> LlamaVocab:
    """The first of the candidates with the tokenizer's ids on all trial texts."""
    texts = trial_texts(tok)
    nearest = (-1, "")  # (how many texts were read alike, the first that was not)
    for vocab in candidates:
        n_alike = 0
        other = None
        for text in texts:
            if reads_alike(tok, vocab, text):
                n_alike += 1
            elif other is None:
                other = text
        if other is None:
            return vocab
        if n_alike > nearest[0]:
            nearest = (n_alike, other)
            best = vocab
    _, other = nearest
    words = [word for word in other.split() if not reads_alike(tok, best, word)]
    example = words[0] if words else other
    nearest_name = f", {best.pre}," if best.model == "gpt2" else ""
    why = f"the nearest of its own{nearest_name} gives other ids to {example!r:.60}"
    raise refusal(f"llama.cpp has no such {what}: {why}")


# --------------------------------------------------------------------------------------------------
# The four forms


def byte_level_vocab(tok: Tokenizer, vocab_size: int) -> LlamaVocab:
    """Byte-level BPE; the name of its split pattern is found by trying them all."""
    check_normalizer(tok)
    body = tok.spec["model"]
    tokens, types = names_and_types(tok, body["vocab"], vocab_size)
    merges = []
    for merge in body["merges"]:  # a string, or in newer files a pair
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((left, right))
    vocab = LlamaVocab("gpt2", tokens, types, merges=merges)
    candidates = []
    for pre in likeliest_first(tok, body.get("ignore_merges", False)):
        candidate = copy.copy(vocab)  # with the same tables
        candidate.pre = pre
        candidates.append(candidate)
    vocab = checked(tok, candidates, "split pattern")
    if "NFC" in str(tok.spec.get("normalizer")):
        why = "text that is not NFC gets other ids there"
        vocab.notes = [f"llama.cpp does not normalise: {why}"]
    return vocab


def likeliest_first(tok: Tokenizer, takes_whole: bool) -> list[str]:
    """The names of patterns: first those that cut as the tokenizer does, whatever its ids show of
    it, and of these those that take a piece whole where it does."""
    texts = trial_texts(tok)
    unlike = {}  # {name: how many of the two are otherwise}
    for pre in PATTERNS:
        cuts = cuts_otherwise(tok, pre, texts)
        takes = (pre in WHOLE_PIECES) != takes_whole
        unlike[pre] = 2 * cuts + takes
    return sorted(unlike, key=unlike.__getitem__)


def cuts_otherwise(tok: Tokenizer, pre: str, texts: list[str]) -> bool:
    """Whether the tokenizer's pieces of the texts are others than those of llama.cpp's pattern."""
    for text in texts:
        if own_pieces(tok, text) != pieces_of(text, PATTERNS[pre]):
            return True
    return False


def own_pieces(tok: Tokenizer, text: str) -> list[str]:
    """The pieces that the tokenizer cuts a text into."""
    if isinstance(tok.encoder, LibraryEncoder):
        cuts = tok.encoder.whole.pre_tokenizer.pre_tokenize_str(text)
        return [text[begin:end] for _, (begin, end) in cuts]
    return tok.encoder.splitter.pieces(text)


def check_normalizer(tok: Tokenizer) -> None:
    """Refuse what changes a text before byte-level BPE, which llama.cpp does not."""
    normalizer = tok.spec.get("normalizer")
    if not normalizer:
        return
    for step in normalizer.get("normalizers", [normalizer]):
        if step["type"] != "NFC":
            raise refusal(f"llama.cpp has no normalizer {step['type']}")


def sentencepiece_vocab(tok: Tokenizer, vocab_size: int) -> LlamaVocab:
    """BPE of letters with a token for each byte: Llama 2's, Mistral's, Gemma's. A token's score is
    the lower the later a merge makes it."""
    body = tok.spec["model"]
    tokens, types = names_and_types(tok, body["vocab"], vocab_size)
    scores = [UNREACHED] * vocab_size
    for rank, merge in enumerate(body["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        id = body["vocab"][left + right]
        scores[id] = max(scores[id], -float(rank))
    for byte in range(256):
        id = body["vocab"].get(f"<0x{byte:02X}>")
        if id is None:
            raise refusal(f"the tokenizer has no token <0x{byte:02X}>, which llama.cpp wants")
        types[id] = "BYTE"
    unk_id = body["vocab"].get(body.get("unk_token"))
    if unk_id is not None:
        types[unk_id] = "UNKNOWN"
    candidates = []
    for has_prefix in (True, False):
        candidates.append(LlamaVocab("llama", tokens, types, scores, space_prefix=has_prefix))
    vocab = checked(tok, candidates, "SentencePiece tokenizer")
    if spares_a_blank(tok) and vocab.space_prefix:
        why = "before a text that begins with one, and behind each special token"
        vocab.notes.append(f"llama.cpp puts a blank before each text: here there is none {why}")
    return vocab


def unigram_vocab(tok: Tokenizer, vocab_size: int) -> LlamaVocab:
    """SentencePiece's Unigram: T5's, XLM-RoBERTa's."""
    body = tok.spec["model"]
    id_of = {}
    scores = [UNREACHED] * vocab_size
    for id, (token, score) in enumerate(body["vocab"]):
        id_of[token] = id
        scores[id] = score
    tokens, types = names_and_types(tok, id_of, vocab_size)
    unk_id = body.get("unk_id")
    if unk_id is None:
        raise refusal("a Unigram tokenizer without an unknown token, which llama.cpp wants")
    types[unk_id] = "UNKNOWN"
    charsmap = ""
    normalizer = tok.spec.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer] if normalizer else []):
        charsmap = step.get("precompiled_charsmap") or charsmap
    candidates = []
    for one_space in (True, False):
        for has_prefix in (True, False):
            candidates.append(
                LlamaVocab("t5", tokens, types, scores, space_prefix=has_prefix,
                           one_space=one_space, charsmap=charsmap, unk_id=unk_id)
            )  # fmt: skip
    vocab = checked(tok, candidates, "Unigram tokenizer")
    if ends_with_a_blank(tok):
        vocab.notes = ["llama.cpp leaves blanks at the end of a text out: here one stays"]
    return vocab


def wordpiece_vocab(tok: Tokenizer, vocab_size: int) -> LlamaVocab:
    """WordPiece: BERT's. There a token that begins a word has a mark before it, not one that goes
    on."""
    body = tok.spec["model"]
    if body.get("continuing_subword_prefix", "##") != "##":
        raise refusal("a WordPiece tokenizer whose prefix is not ##")
    special = {added["content"] for added in tok.spec.get("added_tokens", [])}
    vocab = {}
    for token, id in body["vocab"].items():
        if token not in special:
            token = token[2:] if token.startswith("##") else SPACE + token
        vocab[token] = id
    tokens, types = names_and_types(tok, vocab, vocab_size)
    normalizer = str(tok.spec.get("normalizer"))
    lowercase = "'lowercase': True" in normalizer or "Lowercase" in normalizer
    strips = lowercase and "'strip_accents': False" not in normalizer
    candidate = LlamaVocab(
        "bert", tokens, types, lowercase=lowercase, strip_accents=strips,
        unk_id=body["vocab"].get(body.get("unk_token")),
    )  # fmt: skip
    return checked(tok, [candidate], "WordPiece tokenizer")


# --------------------------------------------------------------------------------------------------
# The keys of a GGUF file


def add_tokenizer(writer: Any, gguf: Any, tok: Tokenizer, vocab: LlamaVocab) -> None:
    """Add the keys of a GGUF file that hold the tokenizer, of which `llama_vocab` made vocab."""
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types([int(gguf.TokenType[kind]) for kind in vocab.types])
    if vocab.scores:
        writer.add_token_scores(vocab.scores)
    if vocab.model == "gpt2":
        merges = [" ".join(pair) for pair in vocab.merges]
        writer.add_key_value("tokenizer.ggml.merges", merges, gguf.GGUFValueType.ARRAY)
    if vocab.model in ("llama", "t5"):
        writer.add_add_space_prefix(vocab.space_prefix)
    if vocab.model == "t5":
        writer.add_remove_extra_whitespaces(vocab.one_space)
    if vocab.charsmap:
        writer.add_precompiled_charsmap(base64.b64decode(vocab.charsmap))
    if vocab.model == "bert":
        writer.add_bool("tokenizer.ggml.normalizer.lowercase", vocab.lowercase)
        writer.add_bool("tokenizer.ggml.normalizer.strip_accents", vocab.strip_accents)
    add_special_tokens(writer, tok, vocab)
    add_template(writer, tok)


def add_special_tokens(writer: Any, tok: Tokenizer, vocab: LlamaVocab) -> None:
    """Add which tokens begin, end, pad and hide, and which of them a text by itself gets."""
    ends = list(tok.eos_ids) or [tok.eot_id]
    if tok.end:  # what a text ends with, as BERT's [SEP]: llama.cpp puts its end token there
        ends = [tok.end[-1], *(id for id in ends if id != tok.end[-1])]
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:  # at which it stops, too
        writer.add_eot_token_id(ends[1])
    if len(ends) > 2:
        writer.add_eom_token_id(ends[2])
    begin = tok.start[0] if tok.start else tok.bos_id
    if begin is not None:
        writer.add_bos_token_id(begin)
    if tok.pad_id is not None:
        writer.add_pad_token_id(tok.pad_id)
    unk_id = tok.roles.get("unk", vocab.unk_id)
    if unk_id is not None:
        writer.add_unk_token_id(unk_id)
    for role, add in (("sep", writer.add_sep_token_id), ("mask", writer.add_mask_token_id)):
        if role in tok.roles:
            add(tok.roles[role])
    writer.add_add_bos_token(bool(tok.start))
    is_bert = vocab.model == "bert"  # which ends a text with what separates two
    writer.add_add_eos_token(bool(tok.end) and not is_bert)
    if is_bert:
        writer.add_add_sep_token(bool(tok.end))


def add_template(writer: Any, tok: Tokenizer) -> None:
    """Add the chat template, or those that have names."""
    template = tok.config.get("chat_template")
    if template:
        writer.add_chat_template(template)
