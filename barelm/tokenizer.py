"""Text to ids and back: Hugging Face's tokenizer.json."""

import json
import math
import os
import re
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from itertools import chain, islice, takewhile
from pathlib import Path

import numpy as np

from barelm.chat import (
    TemplateRefusal,
    TurnFinder,
    marked_spans,
    marks_answers,
    render_chat,
    veiled,
)
from barelm.files import read_json
from barelm.run import UserError

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each numeral apart, then GPT2_SPLIT: white space before a numeral is the end of its piece.
DIGITS_SPLIT = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
CHARACTERS = r"[\s\S]"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Each of these matches something wherever it stands: no text is between their matches.
GAPLESS = {GPT2_SPLIT, DIGITS_SPLIT, QWEN2_SPLIT, LLAMA3_SPLIT, CHARACTERS}
BERT_WORDS = r"(?:(?!\p{Han})[\p{L}\p{M}\p{N}])+|\S"  # punctuation and Chinese stand alone
BEHAVIORS = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"}
SAME_ESCAPES = set("pPdDsSnrtfAzx0")  # letters behind a backslash that all engines read alike
ONIGURUMA_WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}²³¹¼½¾"  # its \w, which others read otherwise
ANY_LETTERS = "aA1 .'\n漢\u0301_ "
LONG_TEXT = 300_000  # characters: a third of the run of blanks that overflows tiktoken
SPLIT_SECONDS = 30  # a pattern that takes longer for a short text has no end
NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
# The models that run here, and by what form of pre-tokenizer each is fed.
FORMS = [("BPE", "ByteLevel"), ("BPE", "Metaspace"), ("Unigram", "ByteLevel")]
FORMS += [("WordLevel", "Split"), ("WordPiece", "Split")]
SUPPORTED = "byte-level or SentencePiece's BPE, Unigram, words, characters, WordPiece; split by "
SUPPORTED += "Split, normalised by " + ", ".join(sorted(NORMALIZERS))
# SentencePiece writes a space as ▁. Llama 2's normalizers and decoders:
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BACK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
BACK = [BACK, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")  # of special tokens, as in transformers
NO_TOKEN = 1 << 20  # from here up: ids for tiktoken's sake, of bytes that a vocabulary lacks


def byte_letters():
    """GPT-2's table: the printable letter that stands for each byte in a tokenizer.json."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}


def normalize(text, names):
    """What Hugging Face's normalizers of these names make of a text, one after another."""
    for name in names:
        if name == "Lowercase":  # letter by letter, so that no sigma is the last of its word
            text = text.replace("Σ", "σ").lower()
        else:
            text = unicodedata.normalize(name, text)
    return text


def longest_match(word, vocab, prefix):
    """WordPiece (Devlin et al. 2019): at each place of a word the longest token of vocab {token:
    id} that fits, `prefix` before those within the word. None where at some place none fits."""
    ids, start = [], 0
    while start < len(word):
        before = prefix if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if before + word[start:end] in vocab), None)
        if end is None:
            return None
        ids.append(vocab[before + word[start:end]])
        start = end
    return ids


def best_path(data, scores, longest):
    """Viterbi for Unigram (Kudo 2018): the ids of the tokens, of at most `longest` bytes, that make
    up data with the greatest sum of scores {bytes: (id, log-probability)}, every byte being one.

    Sums are taken from the left and of equals the longer last token stays, as in `tokenizers`.
    """
    # The best path to each place: its score, and where its last token begins and which it is.
    best = [(0.0, 0, 0)] + [(-math.inf, 0, 0)] * len(data)
    for start in range(len(data)):
        for end in range(start + 1, min(start + longest, len(data)) + 1):
            if token := scores.get(data[start:end]):
                if (score := token[1] + best[start][0]) > best[end][0]:
                    best[end] = (score, start, token[0])
    ids, end = [], len(data)
    while end:
        _, end, id = best[end]
        ids.append(id)
    return ids[::-1]


def merge_pairs(ids, merges):
    """BPE (Sennrich et al. 2016): of all neighbours in ids the pair of least rank in merges {pair:
    (rank, id)}, and of equals the leftmost, becomes that id, until no pair is in merges."""
    ids = list(ids)
    n = len(ids)
    before, after, queue = [*range(-1, n - 1)], [*range(1, n + 1)], []

    def look(i):
        """Queue the pair that begins at place i."""
        if i >= 0 and after[i] < n and (found := merges.get(pair := (ids[i], ids[after[i]]))):
            heappush(queue, (found[0], i, pair, found[1]))

    for i in range(n):
        look(i)
    while queue:
        _, i, pair, new = heappop(queue)
        if (j := after[i]) == n or pair != (ids[i], ids[j]):
            continue  # one of the two is in another token by now
        ids[i], ids[j], after[i] = new, None, after[j]
        if after[i] < n:
            before[after[i]] = i
        look(i)
        look(before[i])
    return [id for id in ids if id is not None]


def any_of(names):
    """A pattern that finds any of these in a text: the leftmost, and there the longest."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len)[::-1])) or "(?!)")


def check_spec(spec):
    """Refuse a tokenizer.json in which an id is no whole number, or is that of two tokens."""
    body, added = spec.get("model") or {}, spec.get("added_tokens", [])
    vocab = body.get("vocab") or {}
    for key, value in (("added_tokens", added), ("merges", body.get("merges", []))):
        if not isinstance(value, list):
            raise UserError(f"tokenizer.json: {key}={value!r:.60}: expected a list")
    longest = body.get("max_input_chars_per_word", 0)
    if type(longest) is not int:
        raise UserError(f"tokenizer.json: max_input_chars_per_word={longest!r:.60}: no number")
    if isinstance(vocab, list):  # Unigram's [token, score], numbered by their places
        for entry in vocab:
            token, score = entry
            if type(score) not in (int, float) or not math.isfinite(score):
                raise UserError(f"tokenizer.json: {token!r:.60} has the score {score!r:.60}")
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
        if len(vocab) != len(body["vocab"]):
            raise UserError("tokenizer.json: two entries of the vocabulary are the same token")
    ids = dict(vocab)
    for t in added:
        content, id = t["content"], t["id"]
        flags = [t.get(k, False) for k in ("lstrip", "rstrip", "single_word", "normalized")]
        if not content or any(type(flag) is not bool for flag in [t["special"], *flags]):
            raise UserError(f"tokenizer.json: the added token {content!r:.60} is malformed")
        if ids.get(content, id) != id:
            why = f"has the ids {ids[content]!r:.60} and {id!r:.60}"
            raise UserError(f"tokenizer.json: {content!r:.60} {why}")
        ids[content] = id
    for token, id in ids.items():
        if not isinstance(token, str) or type(id) is not int or not 0 <= id < NO_TOKEN:
            why = f"expected a whole number below {NO_TOKEN:,}"
            raise UserError(f"tokenizer.json: {token!r:.60} has the id {id!r:.60}: {why}")
    post = spec.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing":
            check_template(step, ids)
    if len(set(ids.values())) != len(ids):
        first = {}
        for token, id in ids.items():
            if first.setdefault(id, token) != token:
                why = f"are both token {id}"
                raise UserError(f"tokenizer.json: {first[id]!r:.60} and {token!r:.60} {why}")


def check_template(step, ids):
    """Refuse a post-processor that does not put the text between tokens of the vocabulary."""
    texts = [part for part in step["single"] if "Sequence" in part]
    if [part["Sequence"]["id"] for part in texts] != ["A"]:
        raise UserError("tokenizer.json: expected a post_processor with one text in its `single`")
    for part in step["single"]:
        name = part["SpecialToken"]["id"] if "SpecialToken" in part else None
        token = step["special_tokens"][name] if name is not None else {"ids": [], "tokens": []}
        if [ids.get(text) for text in token["tokens"]] != token["ids"]:
            why = f"{name!r:.60} has the ids {token['ids']!r:.60}, not the vocabulary's"
            raise UserError(f"tokenizer.json: in its post_processor {why}")


def check_names(config):
    """Refuse a tokenizer_config.json whose special tokens or chat template are of another form."""
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        name = config.get(key)
        text = name.get("content") if isinstance(name, dict) else name
        if not isinstance(text, str) and name is not None:
            raise UserError(f"tokenizer_config.json: {key}={name!r:.60}: expected a token's name")
    template = config.get("chat_template")
    several = template if isinstance(template, list) else [{"name": "", "template": template}]
    for t in several if template is not None else ():
        texts = (t.get("name"), t.get("template")) if isinstance(t, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"tokenizer_config.json: chat_template={template!r:.60}: expected text")


def read_ids(folder, key, n_vocab):
    """The ids, a list, that generation_config.json, or else config.json, has for a key such as
    eos_token_id; None where neither has any."""
    for name in ("generation_config.json", "config.json"):
        d = read_json(folder / name, {})
        if key in d:
            if d[key] is None:
                return None
            ids = d[key] if isinstance(d[key], list) else [d[key]]
            for id in ids:
                if type(id) is not int or not 0 <= id < n_vocab:
                    why = f"{key}={d[key]!r:.60}: expected ids below {n_vocab:,}, the tokenizer's"
                    raise UserError(f"{folder / name}: {why}")
            return ids
    return None


def split_steps(pre_tokenizers):
    """Hugging Face's Split and Digits as a tuple of (pattern, behavior, invert), in their order;
    None where there is another kind among them."""
    import regex

    steps = []
    for step in pre_tokenizers:
        if step["type"] == "Digits":
            behavior = "Isolated" if step.get("individual_digits") else "Contiguous"
            steps.append((r"\p{N}", behavior, False))
        elif step["type"] == "Split" and step["behavior"] in BEHAVIORS:
            pattern = step["pattern"].get("Regex")
            if pattern is None:
                pattern = regex.escape(step["pattern"]["String"], special_only=True)
            steps.append((pattern, step["behavior"], step["invert"]))
        else:
            return None
    return tuple(steps)


def spell_words(pattern):
    """The pattern with what Oniguruma takes for \\w and \\W written out."""
    parts, depth = [], 0
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        depth += {"[": 1, "]": -1}.get(part, 0)
        if part == r"\w":
            part = ONIGURUMA_WORD if depth > 0 else f"[{ONIGURUMA_WORD}]"
        elif part == r"\W" and depth <= 0:
            part = f"[^{ONIGURUMA_WORD}]"
        parts.append(part)
    return "".join(parts)


def portable_pattern(pattern):
    """A split pattern of tokenizer.json, which Oniguruma reads there, as Rust reads it too;
    UserError where the two, or `regex`, would not mean the same."""
    given = pattern
    # {1,3}+ is a repeated repeat there, and a greedy one that gives nothing back elsewhere.
    pattern = spell_words(re.sub(r"\{([01]?),\d*\}\+", r"{\1,}", pattern))
    bare = re.sub(r"\\.", "", pattern, flags=re.DOTALL)
    odd = [f"\\{c}" for c in re.findall(r"\\(.)", pattern) if c.isalnum() and c not in SAME_ESCAPES]
    odd += re.findall(r"\(\?(?!:|=|!|>|<=|<!|-?i[:)])..?", bare)  # other flags, recursion, names
    odd += re.findall(r"\[:\^?\w+:\]|\{[\d,]+\}\+", bare)
    if odd:
        raise UserError(f"tokenizer.json: not supported: {odd[0]} in the split pattern {given!r}")
    bare = bare.replace("[^", "[")
    if "^" in bare or "$" in bare:  # which are of a line there
        return f"(?m:{pattern})"
    return pattern


def compile_pattern(pattern):
    """A pattern that all engines read alike, for the module `regex`."""
    import regex

    letter = lambda match: f"\\U{int(match[1], 16):08x}"
    pattern = re.sub(r"\\x\{([0-9a-fA-F]{1,8})\}", letter, pattern)
    pattern = re.sub(r"\\z", r"\\Z", pattern)
    nested = "&&" in pattern or re.search(r"\[[^\]]*\[", re.sub(r"\\.", "", pattern))
    try:
        return regex.compile(pattern, regex.V1 if nested else regex.V0)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"tokenizer.json: the split pattern {pattern!r}: {error}") from None


def may_match_nothing(pattern):
    """Whether a pattern matches nothing at some place where it is likely to: among usual letters
    and those that it names. tiktoken panics there."""
    try:
        matches = compile_pattern(pattern).finditer(ANY_LETTERS + pattern, timeout=1)
        return any(match.start() == match.end() for match in matches)
    except TimeoutError:
        return True


def split_seconds(text):
    """How long a pattern may take for a text, in seconds: many times what a usual one does."""
    return SPLIT_SECONDS + len(text) / 100_000


def stretches(text, pattern):
    """[(begin, end, does the pattern match it)], one behind the other, of the whole text. A match
    of nothing that stands right behind another is none, as in Oniguruma."""
    parts, begin, covered, last = [], 0, 0, None
    stop = time.monotonic() + split_seconds(text)
    while begin <= len(text):
        match = pattern.search(text, begin, timeout=max(stop - time.monotonic(), 0.001))
        if not match:
            break
        if match.start() == match.end() == last:
            begin += 1
            continue
        if covered < match.start():
            parts.append((covered, match.start(), False))
        parts.append((*match.span(), True))
        begin = covered = last = match.end()
    if covered < len(text):
        parts.append((covered, len(text), False))
    return parts


def split_at(text, pattern, behavior, invert):
    """The pieces [(begin, end)] that Hugging Face's Split makes of a text, none of them empty."""
    parts = [(begin, end, matched != invert) for begin, end, matched in stretches(text, pattern)]
    if behavior == "Isolated":
        return [(begin, end) for begin, end, _ in parts if begin < end]
    if behavior == "Removed":
        return [(begin, end) for begin, end, matched in parts if not matched and begin < end]
    pieces, before = [], False
    if behavior == "MergedWithNext":
        parts.reverse()
    for begin, end, matched in parts:
        joins = matched == before if behavior == "Contiguous" else matched and not before
        before = matched
        if not joins or not pieces:
            pieces.append((begin, end))
        elif behavior == "MergedWithNext":
            pieces[-1] = (begin, pieces[-1][1])
        else:
            pieces[-1] = (pieces[-1][0], end)
    return sorted((begin, end) for begin, end in pieces if begin < end)


class Tokenizer:
    """Text to ids and back. `spec` and `config`: tokenizer.json and tokenizer_config.json, parsed.

    n_vocab counts the ids; bos_id, pad_id (or None) and eos_ids name special ones, roles {bos, eos,
    pad, unk, cls, sep, mask: id} those that tokenizer_config.json names; eot_id is the one
    that starts a document. They are never read from text: only `chat` and `prompt` add them. Added
    tokens that the file does not call special (<think>) are text, and are read as in `tokenizers`.
    """

    def __init__(self, spec, config):
        check_spec(spec)
        check_names(config)
        self.spec, self.config, self.bpe, self.lacking = spec, config, None, b""
        added = spec.get("added_tokens", [])
        self.special = {t["content"]: t["id"] for t in added}
        self.names = any_of(self.special)
        self.marks = any_of(t["content"] for t in added if t["special"])
        plain = {t["id"]: t["content"] for t in added if not t["special"]}
        self.plain = any_of(plain.values()) if plain else None
        steps = spec.get("normalizer") or {"normalizers": []}
        steps = steps.get("normalizers", [steps])
        # Whether a space goes before a text: each (stretch), always or first (if it has none), no.
        self.lead = "each" if steps[-2:] == [PREPEND, REPLACE] else "never"
        self.normalizers = [t["type"] for t in (steps[:-2] if self.lead == "each" else steps)]
        body = spec.get("model") or {}
        # Old files, such as GPT-2's, do not name the kind.
        self.kind, vocab = body.get("type") or "merges" in body and "BPE", body.get("vocab")
        form, split = self._pattern()
        fits = (self.kind, form) in FORMS and (form == "Metaspace" or self.lead == "never")
        # Whether some of the text is lost, as in `tokenizers`.
        self.drops = isinstance(split, tuple) and "Removed" in [step[1] for step in split]
        fits = fits and not (self.drops and self.kind == "WordLevel")
        if not (fits and split and vocab and NORMALIZERS.issuperset(self.normalizers)):
            why = f"a {self.kind} tokenizer of this form is not supported ({SUPPORTED})"
            raise UserError(f"tokenizer.json: {why}")
        post = spec.get("post_processor") or {"type": "ByteLevel"}
        post = post.get("processors", [post])
        self._refuse_others(body, added, {step["type"] for step in post})
        self.by_bytes = form in ("ByteLevel", "Metaspace")  # or a token is a stretch of characters
        if form == "Metaspace":
            split = self._init_sentencepiece(body, vocab, split)
        elif self.kind == "BPE":
            self._init_bpe(body, self._of_bytes(vocab), split)
        else:
            self._init_other(body, vocab)
        # What splits where tiktoken does not: one pattern, or the steps of several.
        self.known = {}  # ids of pieces met before
        self.gapless = form == "Metaspace" or split in GAPLESS
        if self.bpe and not self.gapless:
            self.sizes = np.zeros(1 + max(self.bytes), np.int64)  # of the tokens, in bytes
            for id, token in self.bytes.items():
                self.sizes[id] = len(token)
        if isinstance(split, str):
            split = ((split, "Isolated", False),)
        self.letters = split[0][0] == CHARACTERS and self.gapless  # each alone
        # Whether the matches are the pieces, and the pattern is known to have an end.
        self.matches = self.gapless or split == ((BERT_WORDS, "Removed", True),)
        self.steps = []
        for pattern, behavior, invert in split:
            self.steps.append((compile_pattern(portable_pattern(pattern)), behavior, invert))
        self.n_vocab = 1 + max([*self.bytes, *self.special.values()])
        self.bytes |= {id: content.encode() for id, content in plain.items()}
        self.bos_id, self.pad_id = self._named("bos_token"), self._named("pad_token")
        self.eos_ids = [i for i in [self._named("eos_token")] if i is not None]
        # {role: id} of those that tokenizer_config.json names, and transformers too.
        self.roles = {role: self._named(f"{role}_token") for role in ROLES}
        self.roles = {role: id for role, id in self.roles.items() if id is not None}
        # Whether white space around a token counts as its own, for loss masks as transformers'.
        trims = [step.get("trim_offsets", True) for step in post if step.get("type") == "ByteLevel"]
        self.trims = any(trims) and spec.get("post_processor") is not None
        # Whether a text begins with bos is the post-processor's word, as in Hugging Face.
        leading = lambda step: takewhile(lambda s: "SpecialToken" in s, step.get("single", []))
        before = [s["SpecialToken"]["id"] for step in post for s in leading(step)]
        self.start = [self.special[name] for name in before]
        space = " " if self.kind == "WordPiece" else ""
        self.shown = self.bytes | {i: (space + t).encode() for t, i in self.special.items()}

    @classmethod
    def from_folder(cls, folder):
        """Read tokenizer.json and, where present, the other files that say something of it."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: no tokenizer.json here (python prepare.py makes one)")
        config = read_json(folder / "special_tokens_map.json", {})
        config |= read_json(folder / "tokenizer_config.json", {})
        template, spec = folder / "chat_template.jinja", read_json(folder / "tokenizer.json")
        try:
            if template.is_file():
                config["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{template}: not UTF-8, cannot be read as text: {error}") from None
        try:
            tok = cls(spec, config)
        except UserError as error:
            raise UserError(f"{folder}/{error}") from None
        except Exception as error:  # whatever a file that is no tokenizer makes ours, or tiktoken's
            raise UserError(f"{folder}/tokenizer.json: malformed: {error!r:.200}") from None
        ends, begins = (read_ids(folder, f"{key}_token_id", tok.n_vocab) for key in ("eos", "bos"))
        for key, ids in (("eos_token", ends), ("bos_token", begins)):
            if ids is None and config.get(key) is not None and tok._named(key) is None:
                why = "is no added token of tokenizer.json"
                raise UserError(f"{folder}/tokenizer_config.json: {key}={config[key]!r:.60} {why}")
        if ends is not None:
            tok.eos_ids = ends
        if begins and tok.bos_id is None:
            tok.bos_id = begins[0]
        return tok

    @property
    def eot_id(self):
        """The token that starts a document: bos, or where there is none the end token, or None."""
        return self.bos_id if self.bos_id is not None else [*self.eos_ids, None][0]

    @property
    def end_id(self):
        """The token that ends a text, at which generation stops too, or None: of several that of
        tokenizer_config.json."""
        own = self._named("eos_token")
        return own if own in self.eos_ids or not self.eos_ids else self.eos_ids[0]

    @property
    def document_layout(self):
        """(ids before a document, ids behind it) in the shards that are written today. What begins
        a text is the post-processor's word. Where one token is bos and the end, or there is but
        one, it stands before each document, and so behind the one before."""
        if self.end_id in (None, self.bos_id):
            return self.start or [self.eot_id], []
        return self.start, [self.end_id]

    def _named(self, key):
        name = self.config.get(key)
        return self.special.get(name["content"] if isinstance(name, dict) else name)

    def _refuse_others(self, body, added, post):
        """What would change ids, and is not done here, is refused by its name."""
        parts = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        odd = [part for part in parts if self.kind == "BPE" and body.get(part)]
        odd += post - {"ByteLevel", "TemplateProcessing"}
        changed = self.lead != "never" or self.normalizers
        mask = self._named(
            "mask_token"
        )  # read from text alone, which special tokens never are here
        for t in added:
            if t["id"] == mask and t["special"]:
                continue
            flags = [k for k in ("lstrip", "rstrip", "single_word") if t.get(k)]
            flags += ["normalized"] * bool(changed and t.get("normalized") and not t["special"])
            odd += [f"the added token {t['content']} with {flag}" for flag in flags]
        if odd:
            raise UserError(f"tokenizer.json: not supported: {', '.join(odd[:3])}")

    def _pattern(self):
        """(form, split): Metaspace, ByteLevel or Split; and the pattern that isolates the pieces of
        a text, or a tuple of (pattern, behavior, invert) where one pattern does not say it.
        (None, None): another form."""
        whole, steps = CHARACTERS + "+", self.spec.get("pre_tokenizer") or {}
        if not steps and self.lead == "each":
            return "Metaspace", whole
        usual = dict(add_prefix_space=True, use_regex=True, split=True, invert=False)
        steps = [usual | step for step in steps.get("pretokenizers", [steps])]
        if not steps:
            return None, None
        if [step.get("type") for step in steps] == ["Metaspace"]:
            step = steps[0]
            if step["replacement"] != "▁" or self.lead != "never":
                return None, None
            old = "always" if step["add_prefix_space"] else "never"
            self.lead = step.get("prepend_scheme", old)
            return "Metaspace", " [^ ]*|[^ ]+" if step["split"] else whole
        form, last = "Split", steps[-1]
        if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
            own = {"type": "Split", "pattern": {"Regex": GPT2_SPLIT}}
            own |= {"behavior": "Isolated", "invert": False}
            form, steps = "ByteLevel", steps[:-1] + [own] * last["use_regex"]
        split = split_steps(steps) if steps and "type" in steps[0] else None
        if not split:
            return None, None
        if split == ((r"\p{N}", "Isolated", False), (GPT2_SPLIT, "Isolated", False)):
            return form, DIGITS_SPLIT
        if len(split) == 1 and split[0][1] == "Isolated":
            return form, split[0][0]
        return form, split

    def _of_bytes(self, vocab):
        """{token as bytes: what vocab has for it}, for a vocabulary in GPT-2's letters."""
        letters = {c: b for b, c in byte_letters().items()}
        items = [(t, value) for t, value in vocab.items() if t not in self.special]
        try:
            tokens = {bytes(letters[c] for c in token): value for token, value in items}
        except KeyError as letter:
            why = f"{letter} stands for no byte: no such {self.kind}"
            raise UserError(f"tokenizer.json: {why}") from None
        self.lacking = bytes(b for b in range(256) if bytes([b]) not in tokens)
        if self.lacking and self.kind != "BPE":
            raise UserError("tokenizer.json: a byte is missing from the vocabulary")
        return tokens

    def _init_bpe(self, body, ranks, split):
        import tiktoken  # here, since the other kinds need none of it

        made = [body["vocab"][a + b] for a, b in self._merges(body)]
        whole = body.get("ignore_merges", False)  # then a token may be made in several ways
        ordered = all(a < b or whole and a == b for a, b in zip(made, made[1:]))
        if not ordered or len({*made}) + 256 - len(self.lacking) != len(ranks):
            raise UserError("tokenizer.json: ids are not in merge order")
        self.bytes = {i: token for token, i in ranks.items()}
        ranks = ranks | {bytes([b]): NO_TOKEN + b for b in self.lacking}
        named = dict(mergeable_ranks=ranks, special_tokens=self.special)
        self.rust_splits = isinstance(split, str)
        pattern = portable_pattern(split) if self.rust_splits else CHARACTERS
        if may_match_nothing(pattern):
            pattern, self.rust_splits = CHARACTERS, False
        try:
            self.bpe = tiktoken.Encoding("barelm", pat_str=pattern, **named)
        except ValueError:  # a pattern that Rust cannot read
            self.rust_splits = False
            self.bpe = tiktoken.Encoding("barelm", pat_str=CHARACTERS, **named)

    def _merges(self, body):
        return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in body["merges"]]

    def _init_sentencepiece(self, body, vocab, split):
        """Returns the pattern of the pieces that may be merged apart from each other."""
        steps = (self.spec.get("decoder") or {}).get("decoders", [])
        self.byte_ids = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
        plain = body.get("byte_fallback") and not body.get("ignore_merges")
        known = plain and steps[:3] == BACK and steps[3:] in ([], [STRIP])
        if not known or None in self.byte_ids:
            why = "a SentencePiece BPE is supported with all bytes and Llama 2's decoder alone"
            raise UserError(f"tokenizer.json: {why}")
        self.strip = " " if steps[3:] else ""
        pairs = self._merges(body)
        number = lambda a, b: (vocab[a], vocab[b])
        self.merges = {number(a, b): (i, vocab[a + b]) for i, (a, b) in enumerate(pairs)}
        # A space stands here for ▁: texts with the one and with the other have the same ids.
        self.vocab = {t.replace("▁", " "): i for t, i in vocab.items() if " " not in t}
        tokens = {t: i for t, i in vocab.items() if t not in self.special}
        self.bytes = {i: t.replace("▁", " ").encode() for t, i in tokens.items()}
        self.bytes |= {i: bytes([b]) for b, i in enumerate(self.byte_ids)}
        if split == CHARACTERS + "+" and not any(re.search("[^▁]▁", a + b) for a, b in pairs):
            return " *[^ ]+| +"  # no token goes on behind a word: words apart give the same ids
        return split

    def _init_other(self, body, vocab):
        if self.kind == "Unigram":
            numbered = {token: (i, score) for i, (token, score) in enumerate(vocab)}
            self.vocab = self._of_bytes(numbered)
            self.longest = max(map(len, self.vocab))
            self.bytes = {i: token for token, (i, _) in self.vocab.items()}
            return
        self.vocab = {t: i for t, i in vocab.items() if t not in self.special}
        self.unk = [vocab[body["unk_token"]]]
        self.bytes = {i: token.encode() for token, i in self.vocab.items()}
        if self.kind == "WordPiece":
            self.prefix = body["continuing_subword_prefix"]
            self.longest = body["max_input_chars_per_word"]
            if self.spec["decoder"] != dict(type="WordPiece", prefix=self.prefix, cleanup=False):
                raise UserError("tokenizer.json: a WordPiece decoder with cleanup is not supported")
            shown = lambda t: t[len(self.prefix) :] if t.startswith(self.prefix) else " " + t
            self.bytes = {i: shown(token).encode() for token, i in self.vocab.items()}

    def normal(self, text):
        """The text as the model is fed it: normalised, U+FFFD for half a surrogate pair."""
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = normalize(text, self.normalizers)
        return text.replace("▁", " ") if self.kind == "BPE" and not self.bpe else text

    def encode(self, text):
        """The ids of `text`, which is text alone: nothing is added, no special token is read."""
        ids, at = [], 0
        for match in self.plain.finditer(text) if self.plain else ():
            ids += self._encode(self.normal(text[at : match.start()]), at == 0)
            ids.append(self.special[match[0]])
            at = match.end()
        rest = self._encode(self.normal(text[at:]), at == 0)
        return ids + rest if ids else rest

    def _led(self, text, first):
        """A normal text with the space before it that SentencePiece puts there. first: nothing
        comes before it, not even a special token."""
        has_one = text[:1] == " " and self.lead != "each"
        none = not text or has_one or self.lead == "never" or self.lead == "first" and not first
        return text if none else " " + text

    def _encode(self, text, first=True):
        """The ids of a normal text without added tokens; first: nothing comes before it."""
        if self.bpe and self.rust_splits:
            if self.gapless and len(text) < LONG_TEXT:  # where nothing can fail: the fastest way
                ids = self.bpe.encode_ordinary(text)
                if not self.lacking or max(ids, default=0) < NO_TOKEN:
                    return ids
            elif (array := self._by_tiktoken(text)) is not None:
                return array.tolist()
        ids = []
        for piece in self._pieces(self._led(text, first)):
            piece_ids = self.known.get(piece)
            if piece_ids is None:
                piece_ids = self._segment(piece)
                if len(self.known) > 1_000_000:
                    self.known.clear()
                if len(piece) < 1000:
                    self.known[piece] = piece_ids
            ids += piece_ids
        return ids

    def _by_tiktoken(self, text):
        """The ids (n,) uint32 of a normal text as tiktoken splits it; None where it cannot: its
        regular expressions fail, there is text between their matches, or a byte has no token."""
        try:
            # What encode_to_numpy calls, which reads special tokens in text before tiktoken 0.11.
            data = self.bpe._core_bpe.encode_to_tiktoken_buffer(text, set())
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a ValueError, or a panic of Rust, which is no Exception
            return None
        ids = np.frombuffer(data, np.uint32)
        if self.lacking and (ids >= NO_TOKEN).any():
            return None
        if not self.gapless and self.sizes[ids].sum() != len(text.encode()):
            return None
        return ids

    def _cuts(self, text):
        """Where the pieces of a normal text begin and end: [(begin, end)]."""
        cuts = [(0, len(text))] if text else []
        try:
            for pattern, behavior, invert in self.steps:
                finer = []
                for begin, end in cuts:
                    parts = split_at(text[begin:end], pattern, behavior, invert)
                    finer += [(begin + a, begin + b) for a, b in parts]
                cuts = finer
        except TimeoutError:
            raise self._endless(pattern, text) from None
        return cuts

    def _endless(self, pattern, text):
        why = f"does not end on a text of {len(text):,} characters"
        return UserError(f"tokenizer.json: the split pattern {pattern.pattern!r} {why}")

    def _pieces(self, text):
        """The pieces of a normal text that are encoded apart from each other."""
        if self.letters:
            return text
        if self.matches:
            return self.steps[0][0].findall(text)
        return [text[begin:end] for begin, end in self._cuts(text)]

    def _segment(self, piece):
        """The ids of one piece of text."""
        if self.bpe:  # without the bytes that have no token: what is beside them may merge
            data = piece.encode().translate(None, self.lacking)
            return self.bpe._core_bpe.encode_single_piece(data) if data else []
        if self.kind == "Unigram":
            return best_path(piece.encode(), self.vocab, self.longest)
        if self.kind == "BPE":
            bytes_of = lambda c: [self.byte_ids[b] for b in c.encode()]
            spelt = (bytes_of(c) if c not in self.vocab else [self.vocab[c]] for c in piece)
            return merge_pairs(chain.from_iterable(spelt), self.merges)
        if self.kind == "WordPiece":
            fits = len(piece) <= self.longest
            return fits and longest_match(piece, self.vocab, self.prefix) or self.unk
        return [self.vocab[piece]] if piece in self.vocab else self.unk

    def _placed(self, text, first=True):
        """The ids of a text, each with the index of its first character (or byte, if by_bytes)."""
        if self.by_bytes and not self.drops:
            kept = [i for i, b in enumerate(text.encode()) if b not in self.lacking]
            at = len(text) - len(self._led(text, first))
            for id in self._encode(text, first):
                yield id, kept[max(at, 0)]
                at += len(self.bytes[id])
            return
        covered, place = 0, 0  # characters up to the piece, and how many places they take
        for begin, end in self._cuts(text):
            skipped, piece = text[covered:begin], text[begin:end]
            place += len(skipped.encode() if self.by_bytes else skipped)
            places = range(len(piece))
            if self.by_bytes:
                places = [i for i, b in enumerate(piece.encode()) if b not in self.lacking]
            at = 0
            for id in self._segment(piece):
                yield id, place + places[at]
                token = self.token_bytes(id)
                at += len(token) if self.by_bytes else len(token.decode().strip(" "))
            covered, place = end, place + len(piece.encode() if self.by_bytes else piece)

    def encode_batch(self, texts, threads=1):
        """`encode` for many texts, as arrays, on several threads where the tokenizer can."""
        if not self.bpe or not self.rust_splits:
            return [np.array(self.encode(text), np.uint32) for text in texts]

        def ids(text):
            if self.plain and self.plain.search(text):
                return np.array(self.encode(text), np.uint32)
            normal = self.normal(text)
            array = self._by_tiktoken(normal)
            return np.array(self._encode(normal), np.uint32) if array is None else array

        with ThreadPoolExecutor(threads) as pool:
            return [*pool.map(ids, texts)]

    def prompt(self, text):
        """The ids of a text to be continued: bos before it where the tokenizer puts one. Nothing at
        all is continued from what stands before a document in the shards."""
        if text or self.start or self.eot_id is None:
            return self.start + self.encode(text)
        begin, end = self.document_layout
        return [*end, *begin][-1:]

    def token_bytes(self, id):
        """The bytes that the token stands for; none for a special or unused one."""
        return self.bytes.get(id, b"")

    def decode(self, ids):
        """The text of ids, special tokens by their names; what is no UTF-8 becomes U+FFFD.

        WordPiece keeps no white space: there a space is between words, and none before the first.
        SentencePiece's space before the first word is taken away again.
        """
        text = b"".join(self.shown.get(i, b"") for i in ids).decode(errors="replace")
        if self.kind == "BPE" and not self.bpe:
            return text.removeprefix(self.strip)
        if self.kind != "WordPiece" or not text:
            return text
        return text[1:] if text[0] == " " else self.prefix + text

    def chat(self, messages, add_generation_prompt=False, answers="all"):
        """Render [{"role", "content"}] by the chat template: (ids, loss mask, 0 or 1 an id).

        The mask covers what the template puts between the generation prompt and the next turn, end
        markers included, and nothing of a prompt; answers: of all messages of assistants, of the
        "last" message alone, or of "none". Where the template has {% generation %}, it covers what
        that marks, as transformers' return_assistant_tokens_mask does. Contents are text: the name
        of a special token inside one is broken by a letter of its own while the template runs.
        """
        given = json.dumps(messages, ensure_ascii=False, default=str)
        unused = (c for c in map(chr, range(0xE000, 0xF8FF)) if c not in given)
        hide, begin, end, *letters = islice(unused, 5)
        safe = veiled(messages, lambda s: self.marks.sub(lambda m: m[0][0] + hide + m[0][1:], s))
        if add_generation_prompt:
            answers = "none"
        marked = answers != "none" and marks_answers(self.chat_template())
        text = self._render(safe, add_generation_prompt, (begin, end) if marked else ("", ""))
        spans = []
        if marked:
            text, spans = marked_spans(text, begin, end)
            if answers == "last":
                prompt = self._render(safe[:-1], True)
                asked = len(os.path.commonprefix([prompt, text]))
                spans = [span for span in spans if span[1] > asked]
        elif answers != "none":
            ends = any_of([name for name, id in self.special.items() if id in self.eos_ids])
            turns = TurnFinder(self._render, self.marks, ends, letters, safe, text)
            asked = len(safe) - 1 if answers == "last" else 0
            places = [i for i in range(asked, len(safe)) if safe[i].get("role") == "assistant"]
            spans = [turns.span(i) for i in places]
        said = bytearray(len(text))  # 1 at each character that an assistant says
        for start, stop in spans:
            said[start:stop] = b"\1" * (stop - start)
        ids, mask, at = [], [], 0
        for match in [*self.names.finditer(text), None]:
            stop = match.start() if match else len(text)
            plain, marks, after = "", b"", said[stop : stop + 1] or b"\0"
            for run in re.finditer(b"\0+|\1+", said[at:stop]):
                part = self.normal(text[at + run.start() : at + run.end()].replace(hide, ""))
                marks += run[0][:1] * len(part.encode() if self.by_bytes else part)
                plain += part
            for id, place in self._placed(plain, at == 0):
                ids.append(id)
                mask.append(self._is_said(id, place, marks + after))
            if match:
                ids.append(self.special[match[0]])
                mask.append(said[stop])
                at = match.end()
        return ids, mask

    def _is_said(self, id, place, marks):
        """Whether a token counts as said, 0 or 1: where any of it is, as transformers counts.
        marks: a byte for each of the text's and what follows; place: the token's first."""
        token = self.token_bytes(id)
        if not self.by_bytes:
            return max(marks[place : place + max(len(token.decode().strip(" ")), 1)])
        if place == 0 and token[:1] == b" " and self.lead != "never":
            token = token[1:]  # not the text's own
        if self.trims:
            at = place + len(token) - len(token.lstrip())
            if not token.strip():  # nothing is left of it: a place between two bytes
                return min(marks[max(at - 1, 0) : at + 1])
            return max(marks[at : at + len(token.strip())])
        return max(marks[place : place + max(len(token), 1)])

    def end_of_turn(self):
        """The token (a list of one, or none) that the template ends an assistant's words with: of
        several in a row the first, at which generation can stop."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ids, said = self.chat(talk)
        answer = [i for i, s in zip(ids, said) if s]
        end = []
        while answer and (
            answer[-1] in self.special.values() or not self.decode(answer[-1:]).strip()
        ):
            token = answer.pop()
            end = [token] if token in self.special.values() else end
        return end

    def chat_template(self):
        """The text of the chat template."""
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by their names
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if template and not isinstance(template, str):
            kind = type(template).__name__
            raise UserError(f"tokenizer_config.json: chat_template is a {kind}: expected a text")
        if not template:
            raise UserError("this tokenizer has no chat template: chat needs a model tuned for it")
        return template

    def _render(self, messages, add_generation_prompt=False, marks=("", "")):
        """The text that the chat template makes of messages, with these marks around what is
        between {% generation %} and {% endgeneration %}."""
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"):
            if named := self.config.get(f"{name}_token"):
                given[f"{name}_token"] = named["content"] if isinstance(named, dict) else named
        given["generation_begin"], given["generation_end"] = marks
        template = self.chat_template()
        try:
            return render_chat(template, given)
        except Exception as error:  # whatever the template's program raises
            why = " ".join(str(error).split())[:300]
            why = f"the chat template refuses these messages: {why}"
            raise TemplateRefusal(why) from None
