"""How a text became its tokens, step by step: the merges of BPE, and what other kinds do instead.

    steps = TokenSteps(tok)
    steps.of("a text")   # JSON: the page's view Tokens
    show_steps(tok, "a text")   # the same in lines: prepare.py --inspect

What is shown gives the very ids of `tok.encode`, or nothing is shown. Ranks count from 0: the merge
that was learned first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from operator import itemgetter
from typing import TYPE_CHECKING

from barelm.answers import token_name
from barelm.encoders import LibraryEncoder, byte_letters
from barelm.tokenizer import any_of, name_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from barelm.tokenizer import Tokenizer

STEP_CHARACTERS = 2000  # the longest text that is shown
LETTERS = byte_letters()
UNKNOWN_PENALTY = 10  # below the least score: SentencePiece's for a letter without a token
SENTENCES = {
    "BPE": "Byte-pair encoding: the text is cut into pieces, of which each begins as its {units}. "
    "Of the neighbours that a merge joins those of the lowest rank are joined, until none is left.",
    "Unigram": "Unigram: there are no merges. Each token has a score, its log-probability, and of "
    "all ways to cut a piece into tokens the one with the largest sum is taken.",
    "WordPiece": "WordPiece: no merges are made here. From each word the longest token that it "
    "begins with is taken, then the longest that the rest begins with, and so on.",
    "WordLevel": "A table of whole pieces: one that is no token is the unknown token.",
}


class TokenSteps:
    """What a tokenizer does with a text, in steps."""

    def __init__(self, tok: Tokenizer) -> None:
        self.tok = tok
        self.kind = tok.kind
        body = tok.spec["model"]
        self.vocab = body["vocab"]  # {token as the file spells it: id}; of Unigram a list
        if self.kind == "BPE":
            self.ranks = read_merges(body)
        if self.kind == "Unigram":
            self.vocab = {token: id for id, (token, _) in enumerate(body["vocab"])}
            self.scores = dict(body["vocab"])  # {token: log-probability}
            self.unknown_score = min(self.scores.values()) - UNKNOWN_PENALTY
            self.longest = max(map(len, self.scores))
        self.unk_id = unknown_id(tok)
        added = [t["content"] for t in tok.spec.get("added_tokens", []) if not t["special"]]
        self.added = any_of(added)

    def of(self, text: str) -> dict:
        """{kind, words, pieces, …} of a text: by kind what `bpe`, `unigram` or `plain` gives;
        pieces are None where no steps are shown, for a reason that `words` says."""
        if len(text) > STEP_CHARACTERS:
            words = f"Steps are shown of texts of up to {STEP_CHARACTERS:,} characters."
            return {"kind": self.kind, "words": words, "pieces": None}
        words = SENTENCES.get(self.kind, f"{self.kind}: its steps are not known here.")
        words = words.format(units="bytes" if self.is_by_bytes else "characters")
        answer = None
        if self.kind in SENTENCES:
            way = {"BPE": self.bpe, "Unigram": self.unigram}.get(self.kind, self.plain)
            answer = way(self.cut(text))
        if answer is None or answer.pop("ids") != list(self.tok.encode(text)):
            words += " This text goes another way, which is not shown."
            return {"kind": self.kind, "words": words, "pieces": None}
        return {"kind": self.kind, "words": words} | answer

    @property
    def is_by_bytes(self) -> bool:
        """Whether the pieces are spelled in GPT-2's letters, one for each byte."""
        encoder = self.tok.encoder
        if not isinstance(encoder, LibraryEncoder):
            return self.kind == "BPE"
        return '"ByteLevel"' in str(self.tok.spec.get("pre_tokenizer")).replace("'", '"')

    # ------------------------------------------------------------------ pieces

    def cut(self, text: str) -> list[tuple]:
        """[(piece, id or None)]: the pieces of a text as tokenizer.json spells them. One with an id
        is an added token, which is found before anything else is done."""
        pieces = []
        at = 0
        for match in self.added.finditer(text):
            pieces += self.cut_plain(text[at : match.start()])
            pieces.append((match[0], self.tok.special[match[0]]))
            at = match.end()
        return pieces + self.cut_plain(text[at:])

    def cut_plain(self, text: str) -> list[tuple]:
        if not text:
            return []
        encoder = self.tok.encoder
        if isinstance(encoder, LibraryEncoder):
            return [(piece, None) for piece in library_pieces(encoder, text)]
        pieces = encoder.splitter.pieces(encoder.normal(text))
        if self.kind == "BPE":
            pieces = ["".join(LETTERS[byte] for byte in piece.encode()) for piece in pieces]
        return [(piece, None) for piece in pieces]

    # ------------------------------------------------------------------ BPE

    def bpe(self, cut: list[tuple]) -> dict | None:
        """{"pieces": [[ids]], as they begin; "merges": [[rank, left, right, new]], by rank, each to
        be made wherever it stands; "names": {id: text}; "ids": what they become}, or None."""
        pieces = []
        used = set()
        for piece, id in cut:
            symbols = [id] if id is not None else self.first_symbols(piece)
            if symbols is None:
                return None
            merged, ranks = self.merge(symbols)
            whole = self.vocab.get(piece)
            # As with ignore_merges: a piece that is a token is taken at once.
            if id is None and whole is not None and merged != [whole]:
                symbols, ranks = [whole], []
            pieces.append(symbols)
            used.update(ranks)
        merges = sorted(merge for merge in self.ranks.values() if merge[0] in used)
        merges = [list(merge) for merge in merges]
        ids = []
        for symbols in pieces:
            for _, left, right, new in merges:
                symbols = joined(symbols, left, right, new)
            ids += symbols
        shown = {id for symbols in pieces for id in symbols} | {merge[3] for merge in merges}
        names = {id: self.name(id) for id in sorted(shown)}
        return {"pieces": pieces, "merges": merges, "names": names, "ids": ids}

    def first_symbols(self, piece: str) -> list[int] | None:
        """The ids that a piece begins as: of its letters, or of the bytes of one that is no token.
        None where there is no way known here."""
        ids = []
        for letter in piece:
            if letter in self.vocab:
                ids.append(self.vocab[letter])
                continue
            if self.is_by_bytes:  # a byte without a token is lost
                continue
            codes = [f"<0x{byte:02X}>" for byte in letter.encode()]
            if not all(code in self.vocab for code in codes):
                return None
            ids += [self.vocab[code] for code in codes]
        return ids

    def merge(self, symbols: list[int]) -> tuple[list[int], list[int]]:
        """(what ids become, the ranks of the merges made)."""
        ranks = []
        while True:
            pairs = zip(symbols, symbols[1:])
            candidates = [self.ranks[pair] for pair in pairs if pair in self.ranks]
            if not candidates:
                return symbols, ranks
            rank, left, right, new = min(candidates)
            symbols = joined(symbols, left, right, new)
            ranks.append(rank)

    # ------------------------------------------------------------------ the other kinds

    def unigram(self, cut: list[tuple]) -> dict | None:
        """{"pieces": [{"ids", "texts", "scores", "other": the second-best cut or None}], "ids"}"""
        rows = {}  # {piece: its row}
        ids = []
        for piece, id in cut:
            if id is not None:
                rows[piece] = self.row([id]) | {"scores": [0.0], "other": None}
            if piece not in rows:
                ways = self.best_cuts(piece)
                if not ways:
                    return None
                best, *others = [self.scored(tokens) for _, tokens in ways]
                rows[piece] = best | {"other": others[0] if others else None}
            ids += rows[piece]["ids"]
        return {"pieces": list(rows.values()), "ids": ids}

    def scored(self, tokens: list[str]) -> dict:
        scores = [round(self.score(token), 6) for token in tokens]
        return self.row([self.id_of(token) for token in tokens]) | {"scores": scores}

    def score(self, token: str) -> float:
        return self.scores.get(token, self.unknown_score)

    def id_of(self, token: str) -> int:
        return self.vocab.get(token, self.unk_id)

    def best_cuts(self, piece: str, n: int = 2) -> list[tuple]:
        """[(score, tokens)] of the n best ways to cut a piece (Viterbi; Kudo 2018, section 3.1)."""
        ways: list = [[(0.0, ())]]  # of its first i letters the n best
        for end in range(1, len(piece) + 1):
            candidates = []
            for begin in range(max(0, end - self.longest), end):
                token = piece[begin:end]
                is_unknown = token not in self.scores
                if is_unknown and (len(token) > 1 or self.unk_id is None):
                    continue
                for score, tokens in ways[begin]:
                    candidates.append((score + self.score(token), (*tokens, token)))
            # By the score alone: of equals the one whose last token is longest, as the library's.
            ways.append(heapq.nlargest(n, candidates, key=itemgetter(0)))
        return ways[-1]

    def plain(self, cut: list[tuple]) -> dict:
        """{"pieces": [{"ids", "texts"}]; "ids"}: of WordPiece the longest beginnings, of WordLevel
        the piece itself."""
        rows = {}
        ids = []
        for piece, id in cut:
            if piece not in rows:
                rows[piece] = self.row([id] if id is not None else self.beginnings(piece))
            ids += rows[piece]["ids"]
        return {"pieces": list(rows.values()), "ids": ids}

    def beginnings(self, word: str) -> list[int]:
        """The ids of a word, the longest token first that it begins with; of a word that cannot be
        cut so the unknown token."""
        if self.kind == "WordLevel":
            return [self.id_of(word)]
        body = self.tok.spec["model"]
        prefix = body.get("continuing_subword_prefix", "##")
        if len(word) > body.get("max_input_chars_per_word", 100):
            return [self.unk_id]
        ids = []
        at = 0
        while at < len(word):
            end = len(word)
            while end > at and (prefix if at else "") + word[at:end] not in self.vocab:
                end -= 1
            if end == at:
                return [self.unk_id]
            ids.append(self.vocab[(prefix if at else "") + word[at:end]])
            at = end
        return ids

    def row(self, ids: list[int]) -> dict:
        return {"ids": ids, "texts": [self.name(id) for id in ids]}

    def name(self, id: int) -> str:
        return token_name(self.tok, id)


def read_merges(body: dict) -> dict:
    """{(left id, right id): (rank, left, right, new id)} of a BPE's merges."""
    vocab = body["vocab"]
    ranks = {}
    for rank, merge in enumerate(body["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # two forms of files
        if left in vocab and right in vocab and left + right in vocab:
            ids = (vocab[left], vocab[right])
            ranks.setdefault(ids, (rank, *ids, vocab[left + right]))
    return ranks


def unknown_id(tok: Tokenizer) -> int | None:
    """The id of the token for what has none, or None."""
    body = tok.spec["model"]
    if body.get("unk_id") is not None:  # Unigram's
        return body["unk_id"]
    name = name_of(body.get("unk_token"))
    if name is None:
        return None
    vocab = body["vocab"]
    return vocab.get(name) if isinstance(vocab, dict) else None


def joined(symbols: list[int], left: int, right: int, new: int) -> list[int]:
    """The ids with each left that a right follows made one, from the left."""
    result = []
    i = 0
    while i < len(symbols):
        if symbols[i : i + 2] == [left, right]:
            result.append(new)
            i += 2
        else:
            result.append(symbols[i])
            i += 1
    return result


def library_pieces(encoder: LibraryEncoder, text: str) -> list[str]:
    """The pieces that the library `tokenizers` cuts a text into, as tokenizer.json spells them."""
    library = encoder.whole
    text = encoder.normal(text)
    if library.normalizer is not None:
        text = library.normalizer.normalize_str(text)
    if library.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(text)]


# --------------------------------------------------------------------------------------------------
# In lines


def show_steps(tok: Tokenizer, text: str, visible: Callable) -> None:
    """Print how a text became its tokens. visible(tok, id): a token as a line shows it."""
    steps = TokenSteps(tok).of(text)
    print(f"steps: {steps['words']}")
    pieces = steps["pieces"]
    if pieces is None:
        return
    if steps["kind"] == "BPE":
        show_merges(tok, pieces, steps["merges"], visible)
        return
    for piece in pieces:
        line = "|".join(visible(tok, id) for id in piece["ids"])
        if "scores" in piece:
            line += f"  {score_line(piece)}"
        if piece.get("other"):
            other = "|".join(visible(tok, id) for id in piece["other"]["ids"])
            line += f"; next best {other}  {score_line(piece['other'])}"
        print(f"  {line}")


def score_line(row: dict) -> str:
    """A sum of scores."""
    return f"{' + '.join(f'{score:.2f}' for score in row['scores'])} = {sum(row['scores']):.2f}"


def show_merges(tok: Tokenizer, pieces: list, merges: list, visible: Callable) -> None:
    """A line for each merge: its rank, the token it makes, and the first piece that it changes,
    with the number of pieces where there are more."""

    def bars(symbols):
        return quoted("|".join(visible(tok, id) for id in symbols))

    def short(id):
        return quoted(visible(tok, id))

    counts = Counter(map(tuple, pieces))
    print(f"pieces: {' '.join(bars(symbols) for symbols in pieces)}")
    states = {symbols: list(symbols) for symbols in counts}
    if merges:
        print("    rank       id  merge")
    for rank, left, right, new in merges:
        changed = []
        for symbols, state in states.items():
            after = joined(state, left, right, new)
            if after != state:
                changed += [symbols] * counts[symbols]
            states[symbols] = after
        line = f"{rank:8,} {new:8,}  {short(left)} + {short(right)}"
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        print(f"{line:40} {bars(states[changed[0]])}{more}")


def quoted(text: str) -> str:
    return f'"{text}"'  # a space at its end is seen
