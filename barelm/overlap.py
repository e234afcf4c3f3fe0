"""Text that stands word for word in the training shards: the longest run of tokens of each text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GAP = 2**32 - 1  # behind every text and every piece of a shard: no id of a token
PIECE = 1 << 20  # tokens of a shard looked through at once
PARENT_SHIFT = np.uint64(32)  # a key of the trie: its parent's number, and a token in 32 bits


def build_trie(tokens: np.ndarray) -> list[np.ndarray]:
    """The trie of all that begins somewhere in tokens (N,) uint64 and ends before a GAP: a list of
    levels. A level is a sorted array of parent * 2^32 + token, and a node's number is its index
    there."""
    levels = []
    starts = np.arange(len(tokens))
    nodes = np.zeros(len(tokens), np.uint64)  # the root of all
    while True:
        inside = tokens[starts + len(levels)] != GAP
        if not inside.any():
            return levels
        starts = starts[inside]
        nodes = nodes[inside]
        keys, node_numbers = np.unique(
            nodes << PARENT_SHIFT | tokens[starts + len(levels)], return_inverse=True
        )
        nodes = node_numbers.astype(np.uint64)
        levels.append(keys)


def walk(levels: list[np.ndarray], ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Walk a trie from all places of ids at once: for each of its levels, (the places from which it
    is reached, the nodes there)."""
    tokens = np.append(ids, GAP).astype(np.uint64)
    starts = np.arange(len(tokens))
    nodes = np.zeros(len(tokens), np.uint64)
    for depth, keys in enumerate(levels):
        wanted = nodes << PARENT_SHIFT | tokens[starts + depth]
        nearest = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        is_there = keys[nearest] == wanted
        starts = starts[is_there]  # none is at the end: a GAP is no key
        nodes = nearest[is_there].astype(np.uint64)
        yield starts, nodes


def longest_runs(
    shards: list[np.ndarray], texts: list[np.ndarray], n: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """For each text, an array of ids: (which of its n-grams stand in the shards; the length of its
    longest run of tokens that does). The texts become a trie, 9 bytes for each of their tokens and
    each level; the shards, whatever their size, are read through once, a piece at a time."""
    tokens = np.concatenate([np.append(text, GAP) for text in texts]).astype(np.uint64)
    levels = build_trie(tokens)
    seen = [np.zeros(len(keys), bool) for keys in levels]  # which nodes stand in a shard
    for shard in shards:
        for start in range(0, len(shard), PIECE):
            overlap = len(levels) - 1  # so that no run is cut between two pieces
            piece = shard[start : start + PIECE + overlap]
            for level_seen, (_, nodes) in zip(seen, walk(levels, piece)):
                level_seen[nodes] = True
    runs = np.zeros(len(tokens), int)  # the longest from each place of the texts
    for depth, (starts, nodes) in enumerate(walk(levels, tokens)):
        runs[starts[seen[depth][nodes]]] = depth + 1
    ends = np.cumsum([len(text) + 1 for text in texts])
    found_ngrams = []
    longest = []
    for text_runs in np.split(runs, ends[:-1]):
        text_runs = text_runs[:-1]  # without the GAP
        found_ngrams.append(text_runs[: max(0, len(text_runs) - n + 1)] >= n)
        longest.append(text_runs.max(initial=0))
    return found_ngrams, np.array(longest)


def draw_windows(shards: list[np.ndarray], size: int, count: int, without: list[int], seed: int,
                 where: Path | str) -> list[np.ndarray]:  # fmt: skip
    """`count` windows of `size` tokens from anywhere in the shards, without the ids `without`.
    where: the folder that an error names."""
    room = [max(0, len(shard) - size) for shard in shards]
    begins = np.cumsum([0, *room])  # of a shard, in the one range that is drawn from
    if begins[-1] == 0:
        draws = []
    else:
        draws = np.random.default_rng(abs(seed)).integers(begins[-1], size=20 * count)
    windows = []
    for place in draws:
        s = int(np.searchsorted(begins, place, side="right")) - 1
        start = place - begins[s]
        window = shards[s][start : start + size].astype(np.int64)
        if not np.isin(window, without).any():
            windows.append(window)
    if len(windows) < count:
        raise UserError(f"{where}: too few stretches of {size} tokens within a document")
    return windows[:count]
