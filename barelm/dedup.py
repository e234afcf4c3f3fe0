"""What is the same: hashes of texts and words, MinHash, near-duplicates. All by numpy over many
documents at once.

Texts become words (`word_hashes`), words in a row become shingles (`shingles`), shingles become a
signature (`minhash`); signatures that agree in a band make two documents candidates (`band_shape`,
`near_pairs`); the pairs make clusters (`components`).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

N_PERMUTATIONS = 128  # values of a signature
SHINGLE = 5  # words of a shingle
BASE = 0x9E3779B97F4A7C15  # of the polynomial hashes; odd, so it has an inverse modulo 2**64

# The same in every run: signatures of different parts are compared.
_draws = np.random.default_rng(20240801)
BYTE_HASHES = _draws.integers(0, 2**64, 256, dtype=np.uint64)
FACTORS, TERMS = _draws.integers(0, 2**32, (2, N_PERMUTATIONS), dtype=np.uint32)
FACTORS |= np.uint32(1)  # an even factor would lose a bit
IN_WORDS = np.array([byte >= 128 or chr(byte).isalnum() for byte in range(256)])


def digest(data: bytes) -> int:
    """A hash of bytes as a whole number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def hashed_name(text: str) -> str:
    """A hash of a text as 16 hex digits."""
    return f"{digest(text.encode()):016x}"


def mix_bits(hashes: np.ndarray) -> np.ndarray:
    """Spread the bits of hashes (uint64) over all 64 (Stafford 2011, as in splitmix64)."""
    h = hashes
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


@lru_cache(1)
def powers_of_base(n: int) -> tuple[np.ndarray, Any]:
    """BASE**i and BASE**-i modulo 2**64, for i from 1 to n: two (n,) uint64."""
    inverse = pow(BASE, -1, 2**64)
    powers = np.cumprod(np.full(n, BASE, np.uint64))
    inverse_powers = np.cumprod(np.full(n, inverse, np.uint64))
    return powers, inverse_powers


def word_bounds(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the words of UTF-8 bytes (uint8) begin and where their last bytes are."""
    inside = IN_WORDS[data]
    is_first = inside.copy()
    is_first[1:] &= ~inside[:-1]
    is_last = inside.copy()
    is_last[:-1] &= ~inside[1:]
    # The first of the three bytes of a Chinese or Japanese character or a Korean syllable.
    lead = (data >= 0xE3) & (data <= 0xED)
    if lead.any():
        third = np.append([False, False], lead[:-2])
        behind_one = np.append(False, third[:-1])
        before_one = np.append(lead[1:], False)
        is_first |= lead | (inside & behind_one)
        is_last |= third | (inside & before_one)
    return np.flatnonzero(is_first), np.flatnonzero(is_last)


def word_hashes(texts: list[str]) -> tuple[np.ndarray, Any]:
    """The hash (uint64) of every word in order, and the number of its text (int64). Words are of
    letters and digits, in lower case; a Chinese or Japanese character or a Korean syllable is a
    word of its own.

    A word's hash is a polynomial in BASE over its bytes: the difference of two sums over all bytes,
    shifted back by the inverse of the power at which the word begins."""
    joined = "".join(text.replace("\0", " ") + "\0" for text in texts).lower()
    data = np.frombuffer(joined.encode(), np.uint8)
    starts, ends = word_bounds(data)
    # A power of two many, so that the next batch finds them in the cache.
    powers, inverse_powers = powers_of_base(1 << len(data).bit_length())
    sums = BYTE_HASHES[data]
    sums *= powers[: len(data)]
    first_terms = sums[starts]
    np.cumsum(sums, out=sums)
    totals = sums[ends] - sums[starts] + first_terms
    hashes = mix_bits(totals * inverse_powers[starts])
    text_ends = np.flatnonzero(data == 0)
    return hashes, np.searchsorted(text_ends, starts)


def shingles(hashes: np.ndarray, owners: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The hash (uint64) of every n words in a row, and the number of its text."""
    m = max(0, len(hashes) - n + 1)  # places where n words begin
    in_one_text = owners[:m] == owners[len(owners) - m :]
    total = np.zeros(m, np.uint64)  # a polynomial in BASE over the hashes of the n words
    for k in range(n):
        total = total * np.uint64(BASE) + hashes[k : k + m]
    return mix_bits(total[in_one_text]), owners[:m][in_one_text]


def minhash(hashes: np.ndarray, owners: np.ndarray, n_texts: int) -> np.ndarray:
    """MinHash (Broder 1997) of the shingles of n texts: (n_texts, N_PERMUTATIONS)
    uint16, 16 bits of each smallest value; a text that is shorter than a shingle has zeros."""
    values, owners = shingles(hashes, owners, SHINGLE)
    values = (values >> np.uint64(32)).astype(np.uint32)  # so many bits tell which is smallest
    first = np.flatnonzero(np.diff(owners, prepend=-1))  # of each text
    signatures = np.zeros((n_texts, N_PERMUTATIONS), np.uint16)
    if not len(first):
        return signatures
    for k in range(N_PERMUTATIONS):  # x * odd + c permutes the numbers of 32 bits
        smallest = np.minimum.reduceat(values * FACTORS[k] + TERMS[k], first)
        signatures[owners[first], k] = mix_bits(smallest.astype(np.uint64)) >> np.uint64(48)
    return signatures


def band_shape(threshold: float) -> tuple[int, int]:
    """(bands, rows): the longest rows with which two texts of this similarity meet in a band with
    a probability of 0.99 (Leskovec et al. 2014, section 3.4)."""
    best = (N_PERMUTATIONS, 1)
    for rows in range(1, 33):
        bands = N_PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.99:
            best = (bands, rows)
    return best


def near_pairs(
    signatures: np.ndarray, is_live: np.ndarray, band: int, threshold: float
) -> np.ndarray:
    """The pairs (n, 2) of documents that meet in this band: the first of those with the same key,
    and another, if their signatures agree in this share of all places.

    signatures: (N, N_PERMUTATIONS) uint16; is_live: (N,) bool, the documents that count."""
    _, width = band_shape(threshold)
    columns = signatures[:, band * width : (band + 1) * width]
    keys = np.zeros(len(signatures), np.uint64)
    for values in columns.copy().T:
        keys = keys * np.uint64(BASE) + values
    live = np.flatnonzero(is_live & (keys > 0))  # 0: too short for a shingle
    order = live[np.argsort(keys[live], kind="stable")]  # documents of one key stand together
    is_head = np.diff(keys[order], prepend=np.uint64(0)) != 0
    heads = order[np.flatnonzero(is_head)[np.cumsum(is_head) - 1]]
    candidates = np.stack([heads, order], 1)[~is_head]
    pairs = []
    for part in np.array_split(candidates, len(candidates) // 100_000 + 1):  # for memory's sake
        similarity = (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(1)
        pairs.append(part[similarity >= threshold])
    return np.concatenate(pairs)


def components(n: int, edges: np.ndarray) -> np.ndarray:
    """The smallest member of each node's component: (n,) int64, for edges (m, 2)."""
    label = np.arange(n)
    while len(edges):
        ends = label[edges]
        is_open = ends[:, 0] != ends[:, 1]
        edges = edges[is_open]  # the others have the same label at both ends
        ends = ends[is_open]
        np.minimum.at(label, ends.max(1), ends.min(1))
        while not np.array_equal(label, label[label]):  # until each one points at a smallest
            label = label[label]
    return label


def first_of_equals(hashes: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Which documents stay: of those with the same hash the first; those of "" are not compared."""
    live = np.flatnonzero(stays & (hashes != digest(b"")))
    _, first = np.unique(hashes[live], return_index=True)
    after = stays.copy()
    after[np.delete(live, first)] = False
    return after


def first_of_clusters(pairs: np.ndarray, stays: np.ndarray) -> tuple[np.ndarray, list]:
    """(which documents stay: of each cluster the first; the clusters)."""
    label = components(len(stays), pairs)  # (N,) the first document of each one's cluster
    sizes = np.bincount(label[stays], minlength=len(stays))
    clusters = [(int(sizes[i]), int(i)) for i in np.flatnonzero(sizes > 1)]
    after = stays & (label == np.arange(len(stays)))
    return after, sorted(clusters, reverse=True)
