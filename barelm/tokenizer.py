"""Text to ids and back: Hugging Face's tokenizer.json, its special tokens, chats and documents.

`Tokenizer` is what the scripts use. What turns plain text into ids is `encoders.open_encoder`'s
choice: our own byte-level BPE, characters and words, or the library `tokenizers` for all others.
"""

from __future__ import annotations

import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.chat import (
    TemplateRefusal,
    TurnFinder,
    marked_spans,
    marks_answers,
    message_forms,
    render_chat,
    veiled,
)
from barelm.encoders import (
    NO_TOKEN,
    ByteBPE,
    LibraryEncoder,
    kind_of,
    open_encoder,
    post_processors,
)
from barelm.files import read_json
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")  # of special tokens, as in transformers


class Tokenizer:
    """Text to ids and back. `spec` and `config`: tokenizer.json and tokenizer_config.json, parsed.

    n_vocab counts the ids; bos_id, pad_id (or None) and eos_ids name special ones, roles {bos, eos,
    pad, unk, cls, sep, mask: id} those that tokenizer_config.json names; eot_id is the one
    that starts a document. They are never read from text: only `chat` and `prompt` add them. Added
    tokens that the file does not call special (<think>) are text, and are read as in `tokenizers`.
    """

    def __init__(self, spec: dict, config: dict) -> None:
        check_spec(spec)
        check_names(config)
        self.spec = spec
        self.config = config
        self.encoder = open_encoder(spec)  # plain text to ids: ours or the library's
        self.read_encoder()
        self.read_added_tokens()
        self.read_roles()
        self.start = leading_tokens(spec, self.special)  # the ids that a text begins with
        self.end = trailing_tokens(spec, self.special)  # those that a text by itself ends with

    def read_encoder(self) -> None:
        """What others ask about the encoder."""
        self.kind = kind_of(self.spec)  # BPE, WordLevel, Unigram, WordPiece
        self.normalizers = list(self.encoder.normalizers)  # by name; the library's own are not here
        self.split_pattern = self.encoder.split_pattern  # if one says it all and is run here
        self.can_cut = self.encoder.can_cut  # may a long text be encoded in parts, cut at lines?
        self.bytes = self.encoder.bytes  # {id: bytes} of all tokens that are text
        self.shown = self.encoder.shown  # {id: bytes}, special tokens by their names too

    def read_added_tokens(self) -> None:
        """The tokens that tokenizer.json adds to the vocabulary."""
        self.special = {}  # {name: id}, the few that are text included
        special_names = []
        plain_names = []
        for token in self.spec.get("added_tokens", []):
            self.special[token["content"]] = token["id"]
            if token["special"]:
                self.refuse_flags(token)
                special_names.append(token["content"])
            else:
                plain_names.append(token["content"])
        self.n_vocab = 1 + max([*self.bytes, *self.special.values()])  # ids may have gaps
        # Finds the special tokens in what a chat template wrote.
        self.marks = any_of(special_names)
        names = [name for name in special_names if not name[:1].isalnum()]  # else a role may be one
        self.longest_name = max(map(len, names), default=0)
        self.name_beginnings = {name[:n] for name in names for n in range(1, len(name))}
        # Finds those that are text before the encoder sees it; None where there are none. The
        # library finds them by itself.
        self.plain = None
        if plain_names and not isinstance(self.encoder, LibraryEncoder):
            self.plain = any_of(plain_names)

    def refuse_flags(self, token: dict) -> None:
        """Refuse a special token that takes white space beside it away, or needs it: a chat, which
        finds them letter by letter, would have other ids."""
        if token["content"] == name_of(self.config.get("mask_token")):
            return  # as RoBERTa's, which is for text alone: no template writes it
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                why = f"the added token {token['content']} with {flag}"
                raise UserError(f"tokenizer.json: not supported: {why}")

    def read_roles(self) -> None:
        """What tokenizer_config.json calls the special tokens."""
        self.bos_id = self.named("bos_token")
        self.pad_id = self.named("pad_token")
        self.eos_ids = []
        self.roles = {}
        for role in ROLES:
            id = self.named(f"{role}_token")
            if id is not None:
                self.roles[role] = id
        if "eos" in self.roles:
            self.eos_ids.append(self.roles["eos"])

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read tokenizer.json and, where present, the other files that say something of it."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            from config import command_of  # here, since the scripts alone need it

            raise UserError(f"{folder}: no tokenizer.json here ({command_of('prepare')} makes one)")
        # Older folders name the special tokens in a file of their own.
        config = read_json(folder / "special_tokens_map.json", {})
        config |= read_json(folder / "tokenizer_config.json", {})
        spec = read_json(folder / "tokenizer.json")
        template = folder / "chat_template.jinja"  # where newer folders have it
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
        tok.read_model_files(folder)
        return tok

    def read_model_files(self, folder: Path) -> None:
        """Take the ids that end and begin a text from the model's own files: they say more than
        tokenizer_config.json, such as that a text may end in one of several ways."""
        end_ids = read_ids(folder, "eos_token_id", self.n_vocab)
        begin_ids = read_ids(folder, "bos_token_id", self.n_vocab)
        for key, ids in (("eos_token", end_ids), ("bos_token", begin_ids)):
            name = self.config.get(key)
            if ids is None and name is not None and self.named(key) is None:
                why = "is no added token of tokenizer.json"
                raise UserError(f"{folder}/tokenizer_config.json: {key}={name!r:.60} {why}")
        if end_ids is not None:  # several, such as Llama 3's end of text and end of turn
            self.eos_ids = end_ids
        if begin_ids and self.bos_id is None:
            self.bos_id = begin_ids[0]

    def named(self, key: str) -> int | None:
        """The id of the token that tokenizer_config.json names by a key such as eos_token, or
        None."""
        return self.special.get(name_of(self.config.get(key)))

    @property
    def eot_id(self) -> int:
        """The token that starts a document: bos, or where there is none the end token, or that of
        the post-processor (BERT's [CLS]), or None."""
        if self.bos_id is not None:
            return self.bos_id
        if self.eos_ids:
            return self.eos_ids[0]
        return self.start[0] if self.start else None

    @property
    def end_id(self) -> int:
        """The token that ends a text, at which generation stops too, or None: of several that of
        tokenizer_config.json."""
        own = self.named("eos_token")
        if own in self.eos_ids or not self.eos_ids:
            return own
        return self.eos_ids[0]

    @property
    def mask_id(self) -> int | None:
        """The token that hides another, or None."""
        return self.roles.get("mask")

    @property
    def sentinel_ids(self) -> list[int]:
        """The tokens that stand for the spans cut out of a text, in their order: <extra_id_0>, …,
        as T5's, whose ids fall. [] where there are none."""
        ids = []
        while f"<extra_id_{len(ids)}>" in self.special:
            ids.append(self.special[f"<extra_id_{len(ids)}>"])
        return ids

    def with_added(
        self, names: Sequence[str], config: dict[str, str] | None = None, **flags: Any
    ) -> Tokenizer:
        """A tokenizer like this one with more special tokens, behind its last; of these names those
        that it has already stay what they are. config: what tokenizer_config.json says anew."""
        spec = json.loads(json.dumps(self.spec))  # a copy, all the way down
        usual = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        new_names = [name for name in names if name not in self.special]
        entries = []
        for i, name in enumerate(new_names):
            entries.append({"id": self.n_vocab + i, "content": name} | usual | flags)
        spec["added_tokens"] = spec.get("added_tokens", []) + entries
        tok = Tokenizer(spec, self.config | (config or {}))
        tok.eos_ids = self.eos_ids
        tok.bos_id = self.bos_id
        return tok

    @property
    def document_layout(self) -> tuple[list[int], list[int]]:
        """(ids before a document, ids behind it) in the shards that are written today. What begins
        a text is the post-processor's word. Where one token is bos and the end, or there is but
        one, it stands before each document, and so behind the one before."""
        if self.end_id is None and self.end:  # BERT's: [CLS] … [SEP]
            return self.start, self.end
        if self.end_id in (None, self.bos_id):  # GPT-2's way
            return self.start or [self.eot_id], []
        return self.start, [self.end_id]  # Llama's: <s> … </s>

    # Text to ids and back

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which is text alone: nothing is added, no special token is read."""
        if self.plain is None:
            return self.encoder.encode(self.encoder.normal(text))
        # <think> and the like are looked for before a normalizer changes their letters.
        ids = []
        at = 0
        for match in self.plain.finditer(text):
            ids += self.encoder.encode(self.encoder.normal(text[at : match.start()]))
            ids.append(self.special[match[0]])
            at = match.end()
        return ids + self.encoder.encode(self.encoder.normal(text[at:]))

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """`encode` for many texts, as arrays (n,) uint32, on several threads where that helps."""
        if not isinstance(self.encoder, ByteBPE):
            return [np.array(self.encode(text), np.uint32) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # tiktoken lets go of Python's lock
            return [*pool.map(self.encode_array, texts)]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` by ByteBPE, as an array: tiktoken's own where it can, without a list between."""
        if self.plain is None or not self.plain.search(text):
            array = self.encoder.encode_array(self.encoder.normal(text))
            if array is not None:
                return array
        return np.array(self.encode(text), np.uint32)

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued: bos before it where the tokenizer puts one. Nothing at
        all is continued from what stands before a document in the shards."""
        if text or self.start or self.eot_id is None:
            return self.start + self.encode(text)
        begin, end = self.document_layout
        return [*end, *begin][-1:]

    def source(self, text: str) -> list[int]:
        """The ids of a text that an encoder-decoder reads: what the post-processor puts before and
        behind it, or else the end token behind it, as T5 has it."""
        end = self.end
        if not end and self.end_id is not None:
            end = [self.end_id]
        return self.start + self.encode(text) + end

    def whole_text(self, text: str, limit: int | None = None) -> tuple[list[int], bool]:
        """(ids of a text that is read by itself, with what begins and ends one; whether it was cut
        to `limit` tokens)."""
        ids = self.encode(text)
        room = len(ids)
        if limit is not None:
            room = max(0, limit - len(self.start) - len(self.end))
        return self.start + ids[:room] + self.end, len(ids) > room

    def token_bytes(self, id: int) -> bytes:
        """The bytes that the token stands for; none for a special or unused one."""
        return self.bytes.get(id, b"")

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens by their names; what is no UTF-8 becomes U+FFFD."""
        if isinstance(self.encoder, LibraryEncoder):
            return self.encoder.decode(ids)  # which takes away a space put before the first word
        return b"".join(self.shown.get(id, b"") for id in ids).decode(errors="replace")

    # Chats

    def chat(
        self,
        messages: list[dict],
        add_generation_prompt: bool = False,
        answers: str = "all",
        extra: dict | None = None,
    ) -> tuple[list[int], list[int]]:
        """Render [{"role", "content"}] by the chat template: (ids, loss mask, 0 or 1 an id).
        extra: more of the template's variables, such as tools.

        The mask covers what the template puts between the generation prompt and the next turn, end
        markers included, and nothing of a prompt; answers: of all messages of assistants, of the
        "last" message alone, or of "none". Where the template has {% generation %}, it covers what
        that marks, as transformers' return_assistant_tokens_mask does. Contents are text: the name
        of a special token inside one is broken by a letter of its own while the template runs.
        """
        refusals = []
        for form in message_forms(messages):
            try:
                return self.chat_of(form, add_generation_prompt, answers, extra or {})
            except TemplateRefusal as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def chat_of(
        self, messages: list[dict], add_generation_prompt: bool, answers: str, extra: dict
    ) -> tuple[list[int], list[int]]:
        """The same for messages in one form."""
        hide, begin, end, *letters = unused_letters([messages, extra], 5)
        safe = self.without_names(messages, hide)
        extra = self.without_names(extra, hide)
        if add_generation_prompt:
            answers = "none"
        # The text, and the spans [(from, to)] of it that assistants say.
        if answers == "none":
            text = self.render(safe, add_generation_prompt, extra=extra)
            spans = []
        elif marks_answers(self.chat_template(extra)):
            text, spans = self.marked_answers(safe, answers, begin, end, extra)
        else:
            text = self.render(safe, extra=extra)
            spans = self.found_answers(safe, answers, text, letters, extra)
        is_said = bytearray(len(text))  # 1 at each character that an assistant says
        for start, stop in spans:
            is_said[start:stop] = b"\1" * (stop - start)
        return self.encode_chat(text, is_said, hide)

    def chat_to_continue(self, messages: list[dict], extra: dict | None = None) -> list[int]:
        """The ids of a conversation whose last message, an assistant's, is to go on: they end right
        behind its words, as with transformers' continue_final_message. Blanks at their end stay,
        even where the template trims them: what comes next continues this very text."""
        [messages, *_] = message_forms(messages)
        extra = extra or {}
        hide, cut = unused_letters([messages, extra], 2)
        safe = self.without_names(messages, hide)
        safe[-1] = safe[-1] | {"content": safe[-1]["content"] + cut}
        text = self.render(safe, extra=self.without_names(extra, hide))
        if text.count(cut) != 1:
            why = "does not write the last answer at one place: it cannot be continued"
            raise TemplateRefusal(f"the chat template {why}")
        text = text[: text.index(cut)]
        ids, _ = self.encode_chat(text, bytes(len(text)), hide)
        return ids

    def without_names(self, messages: Any, hide: str) -> Any:
        """The messages, or another value of JSON, the names of special tokens in them broken by
        the letter `hide`: also where the rest of a name may stand in what the template puts next,
        such as another text."""

        def break_name(match):
            return match[0][0] + hide + match[0][1:]  # <|im_end|> is no name with `hide` behind <

        def veil(text):
            text = self.marks.sub(break_name, text)
            ends = (text[-n:] for n in range(1, self.longest_name))
            return text + hide if any(end in self.name_beginnings for end in ends) else text

        return veiled(messages, veil)

    def marked_answers(
        self, messages: list[dict], answers: str, begin: str, end: str, extra: dict
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, [(from, to)] of what assistants say) by a template with {% generation %}, which
        puts the letters `begin` and `end` around it."""
        text, spans = marked_spans(self.render(messages, False, (begin, end), extra), begin, end)
        if answers == "last":
            prompt = self.render(messages[:-1], True, extra=extra)
            n_prompt = len(os.path.commonprefix([prompt, text]))
            spans = [span for span in spans if span[1] > n_prompt]
        return text, spans

    def found_answers(
        self, messages: list[dict], answers: str, text: str, letters: list[str], extra: dict
    ) -> list[tuple[int, int]]:
        """[(from, to)] of what assistants say in the text of a template without marks."""
        ends = any_of(name for name, id in self.special.items() if id in self.eos_ids)
        render = partial(self.render, extra=extra)
        turns = TurnFinder(render, self.marks, ends, letters, messages, text)
        first = len(messages) - 1 if answers == "last" else 0
        places = range(first, len(messages))
        return [turns.span(i) for i in places if messages[i].get("role") == "assistant"]

    def encode_chat(
        self, text: str, is_said: bytearray | bytes, hide: str
    ) -> tuple[list[int], list[int]]:
        """(ids, loss mask) of a template's text, whose special tokens are real, but for those with
        the letter `hide` in them. is_said: 1 for each character that an assistant says."""
        # Text between these is encoded by itself. The library finds those that are text.
        cuts = self.marks if self.plain is None else any_of(self.special)
        ids = []
        mask = []
        at = 0
        for match in [*cuts.finditer(text), None]:
            stop = match.start() if match else len(text)
            normal = ""
            said = b""  # a byte for each character of `normal`, and one for what follows
            # A normalizer may join letters (e and an accent), and the result is either said or not:
            # each stretch of what is said, and of what is not, is made normal by itself.
            for stretch in re.finditer(b"\0+|\1+", is_said[at:stop]):
                part = text[at + stretch.start() : at + stretch.end()].replace(hide, "")
                part = self.encoder.normal(part)
                normal += part
                said += stretch[0][:1] * len(part)
            said += bytes(is_said[stop : stop + 1]) or b"\0"  # behind the last text: not said
            for id, begin, end in self.encoder.spans(normal, at == 0):
                ids.append(id)
                mask.append(counts_as_said(said, begin, end))
            if match:
                ids.append(self.special[match[0]])
                mask.append(is_said[stop])
                at = match.end()
        return ids, mask

    def end_of_turn(self) -> list[int]:
        """The token (a list of one, or none) that the template ends an assistant's words with: of
        several in a row the first, at which generation can stop."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ids, mask = self.chat(talk)
        answer = [id for id, said in zip(ids, mask) if said]
        special = set(self.special.values())
        end = []
        # From behind: the line end that a template writes after the end token is not the end.
        while answer and (answer[-1] in special or not self.decode(answer[-1:]).strip()):
            token = answer.pop()
            if token in special:
                end = [token]
        return end

    def chat_template(self, extra: dict | None = None) -> str:
        """The text of the chat template; with tools among its variables the one for them, where
        there are several."""
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by their names
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
            if extra and extra.get("tools"):
                template = named.get("tool_use", template)
        if template and not isinstance(template, str):
            kind = type(template).__name__
            raise UserError(f"tokenizer_config.json: chat_template is a {kind}: expected a text")
        if not template:
            raise UserError("this tokenizer has no chat template: chat needs a model tuned for it")
        return template

    def render(self, messages: list[dict], add_generation_prompt: bool = False,
               marks: tuple[str, str] = ("", ""), extra: dict | None = None) -> str:  # fmt: skip
        """The text that the chat template makes of messages and its other variables, with these
        marks around what is between {% generation %} and {% endgeneration %}."""
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        for role in ROLES:
            name = name_of(self.config.get(f"{role}_token"))
            if name:
                given[f"{role}_token"] = name
        given["generation_begin"], given["generation_end"] = marks
        given |= extra or {}
        template = self.chat_template(extra)
        try:
            return render_chat(template, given)
        except Exception as error:  # whatever the template's program raises
            why = " ".join(str(error).split())[:300]
            raise TemplateRefusal(f"the chat template refuses these messages: {why}") from None


def unused_letters(messages: list, n: int) -> list[str]:
    """n letters of private use (U+E000 …) that no message has, to mark places in a text with."""
    given = json.dumps(messages, ensure_ascii=False, default=str)
    unused = (letter for letter in map(chr, range(0xE000, 0xF8FF)) if letter not in given)
    return list(islice(unused, n))


def counts_as_said(said: bytes, begin: int, end: int) -> int:
    """0 or 1: whether a token, of these characters, is the assistant's: where any of it is, as
    transformers counts. One of no characters (of blanks that are trimmed) is where both
    neighbours are. said: a byte for each character, and one for what follows."""
    if begin < end:
        return max(said[begin:end])
    return min(said[max(begin - 1, 0) : begin + 1])


def name_of(token: str | dict | None) -> str | None:
    """The name of a token in tokenizer_config.json: a text, or a dict with flags beside it."""
    return token["content"] if isinstance(token, dict) else token


def any_of(names: Iterable[str]) -> Any:
    """A pattern that finds any of these in a text: the leftmost, and there the longest."""
    longest_first = sorted(names, key=len, reverse=True)  # of alternatives the first one counts
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def leading_tokens(spec: dict, special: dict[str, int]) -> list[int]:
    """The ids that a text begins with, such as [bos]: the post-processor's word, as in Hugging
    Face. What it puts behind a text is left to whoever ends one."""
    names = []
    for step in post_processors(spec):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            names.append(step["cls"][0])
        for part in step.get("single", []):
            if "SpecialToken" not in part:
                break  # the text itself
            names.append(part["SpecialToken"]["id"])
    return [special[name] for name in names]


def trailing_tokens(spec: dict, special: dict[str, int]) -> list[int]:
    """The ids that the post-processor puts behind a text, such as [sep]."""
    names = []
    for step in post_processors(spec):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            names.append(step["sep"][0])
        behind = []
        for part in step.get("single", []):
            if "SpecialToken" in part:
                behind.append(part["SpecialToken"]["id"])
            else:
                behind = []  # the text itself
        names += behind
    return [special[name] for name in names if name in special]


def pair_tokens(spec: dict, special: dict[str, int]) -> tuple | None:
    """(ids before two texts, between them, behind them) as the post-processor puts them, or None
    where it says nothing of pairs."""
    for step in post_processors(spec):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            cls, sep = special[step["cls"][0]], special[step["sep"][0]]
            n = 2 if step["type"] == "RobertaProcessing" else 1
            return [cls], [sep] * n, [sep]
        if step.get("pair"):
            places = [[], [], []]
            n_texts = 0
            for part in step["pair"]:
                if "SpecialToken" in part:
                    places[n_texts].append(special[part["SpecialToken"]["id"]])
                else:
                    n_texts += 1
            return tuple(places)
    return None


# --------------------------------------------------------------------------------------------------
# What is wrong with a file, in one line


def check_spec(spec: dict) -> None:
    """Refuse a tokenizer.json in which an id is no whole number, or is that of two tokens."""
    body = spec.get("model") or {}
    if not body.get("vocab"):
        raise UserError("tokenizer.json: expected a model with a vocab")
    for place, key in ((spec, "added_tokens"), (body, "merges")):
        value = place.get(key, [])
        if not isinstance(value, list):
            raise UserError(f"tokenizer.json: {key}={value!r:.60}: expected a list")
    ids = ids_of_vocab(body["vocab"])
    for token in spec.get("added_tokens", []):
        check_added_token(token, ids)
        ids[token["content"]] = token["id"]
    first_with = {}
    for token, id in ids.items():
        # type, not isinstance: True is an int to Python.
        if not isinstance(token, str) or type(id) is not int or not 0 <= id < NO_TOKEN:
            why = f"expected a whole number below {NO_TOKEN:,}"
            raise UserError(f"tokenizer.json: {token!r:.60} has the id {id!r:.60}: {why}")
        if first_with.setdefault(id, token) != token:
            why = f"are both token {id}"
            raise UserError(f"tokenizer.json: {first_with[id]!r:.60} and {token!r:.60} {why}")
    for step in post_processors(spec):
        if step.get("type") == "TemplateProcessing":
            check_template(step, ids)


def ids_of_vocab(vocab: dict[str, int]) -> dict[str, int]:
    """{token: id} of a model's vocabulary: a dict, or Unigram's [[token, score]], in the order of
    their ids."""
    if not isinstance(vocab, list):
        return dict(vocab)
    ids = {}
    for id, (token, score) in enumerate(vocab):
        if type(score) not in (int, float) or not math.isfinite(score):  # JSON of Python has NaN
            raise UserError(f"tokenizer.json: {token!r:.60} has the score {score!r:.60}")
        ids[token] = id
    if len(ids) != len(vocab):
        raise UserError("tokenizer.json: two entries of the vocabulary are the same token")
    return ids


def check_added_token(token: dict, ids: dict[str, int]) -> None:
    """Refuse an added token that is malformed or has another id in the vocabulary."""
    content = token["content"]
    id = token["id"]
    is_malformed = not content or type(token["special"]) is not bool
    for key in ("lstrip", "rstrip", "single_word", "normalized"):
        is_malformed |= type(token.get(key, False)) is not bool
    if is_malformed:
        raise UserError(f"tokenizer.json: the added token {content!r:.60} is malformed")
    if ids.get(content, id) != id:  # many files have it in both places
        why = f"has the ids {ids[content]!r:.60} and {id!r:.60}"
        raise UserError(f"tokenizer.json: {content!r:.60} {why}")


def check_template(step: dict, ids: dict[str, int]) -> None:
    """Refuse a post-processor that does not put the text between tokens of the vocabulary."""
    sequences = [part["Sequence"]["id"] for part in step["single"] if "Sequence" in part]
    if sequences != ["A"]:
        raise UserError("tokenizer.json: expected a post_processor with one text in its `single`")
    for part in step["single"]:
        if "SpecialToken" not in part:
            continue
        name = part["SpecialToken"]["id"]
        token = step["special_tokens"][name]
        if [ids.get(text) for text in token["tokens"]] != token["ids"]:
            why = f"{name!r:.60} has the ids {token['ids']!r:.60}, not the vocabulary's"
            raise UserError(f"tokenizer.json: in its post_processor {why}")


def check_names(config: dict) -> None:
    """Refuse a tokenizer_config.json whose special tokens or chat template are of another form."""
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        name = config.get(key)
        content = name.get("content") if isinstance(name, dict) else name  # None: malformed
        if not isinstance(content, str) and name is not None:
            raise UserError(f"tokenizer_config.json: {key}={name!r:.60}: expected a token's name")
    template = config.get("chat_template")
    if template is None:
        return
    several = template if isinstance(template, list) else [{"name": "", "template": template}]
    for entry in several:
        is_named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        if not is_named or not isinstance(entry.get("template"), str):
            raise UserError(f"tokenizer_config.json: chat_template={template!r:.60}: expected text")


def read_ids(folder: Path, key: str, n_vocab: int) -> list[int] | None:
    """The ids, a list, that generation_config.json, or else config.json, has for a key such as
    eos_token_id; None where neither has any."""
    for name in ("generation_config.json", "config.json"):
        values = read_json(folder / name, {})
        if key not in values:
            continue
        if values[key] is None:
            return None  # it says that there is none
        ids = values[key] if isinstance(values[key], list) else [values[key]]
        for id in ids:
            if type(id) is not int or not 0 <= id < n_vocab:
                why = f"{key}={values[key]!r:.60}: expected ids below {n_vocab:,}, the tokenizer's"
                raise UserError(f"{folder / name}: {why}")
        return ids
    return None
