"""Decontamination: training text may not share words in a row with an evaluation (Brown et al.
2020, appendix C)."""

from __future__ import annotations

import math
import os
import time
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.dedup import shingles, word_hashes
from barelm.run import UserError
from barelm.sources import FilePart, Unit, format_of, raw_records

if TYPE_CHECKING:
    from collections.abc import Iterable

    from barelm.clean import Tally

GRAM = 13  # words in a row


def is_no_evaluation(
    texts: list[str], hashes: np.ndarray, owners: np.ndarray, paths: str, tally: Tally
) -> np.ndarray:
    """Which of the texts share no GRAM words in a row with the evaluation files "a,b": (n,) bool.
    hashes and owners: of their words, as `word_hashes` returns them."""
    begun = time.perf_counter()
    grams, gram_owners = shingles(hashes, owners, GRAM)
    is_known = np.isin(grams, evaluation_grams(paths), kind="sort")
    stays = np.ones(len(texts), bool)
    stays[gram_owners[is_known]] = False
    for text, stay in zip(texts, stays):
        reason = None if stay else f"{GRAM} words in a row of an evaluation"
        tally.count(text, text, reason)
    tally.seconds += time.perf_counter() - begun
    return stays


@lru_cache(1)  # a process reads them once
def evaluation_grams(paths: str) -> np.ndarray:
    """The hashes, sorted, of every GRAM words in a row of the files "a,b"."""
    hashes = []
    for path in paths.split(","):
        if not os.path.isfile(path):
            raise UserError(f"--decontaminate={path}: no such file")
        bad = []
        # As the name says: a text that begins like JSON is a text here.
        unit = Unit("", None, format_of(path), [FilePart(path, 0, math.inf, None, 0)])
        rows = raw_records(unit, "text", bad)
        texts = ["\n".join(strings_in(row | {"path": None})) for row in rows]
        if bad:
            raise UserError(f"--decontaminate={bad[0]}: expected a JSON object")
        values, _ = shingles(*word_hashes(texts), GRAM)
        hashes.append(values)
    return np.unique(np.concatenate(hashes))


def strings_in(value: Any) -> Iterable[str]:
    """Every text within a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return chain.from_iterable(map(strings_in, value.values()))
    if isinstance(value, list):
        return chain.from_iterable(map(strings_in, value))
    return []
