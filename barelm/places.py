"""Where the tokens of a text stand in it: what tagging words and finding answers rest on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from barelm.tokenizer import Tokenizer


def token_places(tok: Tokenizer, text: str) -> list[tuple[int, int, int]]:
    """[(id, begin, end)]: the tokens of a text, each with the characters text[begin:end] that it
    stands for; of none (a blank that is trimmed) begin is end."""
    # A normalizer is given a word at a time. Where it changes how long a word is, each of its
    # characters stands for the whole word.
    normal = ""
    begins = []  # of each character of `normal`: where what it stands for begins in the text
    ends = []
    for word in re.finditer(r"\s+|\S+", text):
        part = tok.encoder.normal(word[0])
        normal += part
        if len(part) == len(word[0]):
            begins += range(word.start(), word.end())
            ends += range(word.start() + 1, word.end() + 1)
        else:
            begins += [word.start()] * len(part)
            ends += [word.end()] * len(part)
    places = []
    for id, begin, end in tok.encoder.spans(normal):
        if begin < end:
            places.append((id, begins[begin], ends[end - 1]))
        else:
            at = ends[begin - 1] if begin else 0
            places.append((id, at, at))
    return places
