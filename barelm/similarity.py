"""How near a text comes to the one that was wanted: ROUGE-L (Lin 2004) and chrF (Popović 2015).

Both are 0 to 1. They count what two texts have in common, not what they mean: a summary in other
words scores low. ROUGE-L is rouge_score's rougeL, chrF is sacrebleu's chrF2 over 100.
"""

from __future__ import annotations

import re
from collections import Counter

MAX_N = 6  # chrF's longest runs of characters
BETA = 2  # chrF: recall counts so much more than precision


def rouge_l(text: str, reference: str) -> float:
    """The F1 of the longest common subsequence of words (Lin 2004, section 3; with beta 1)."""
    words = words_of(text)
    reference_words = words_of(reference)
    common = common_subsequence(words, reference_words)
    if common == 0:
        return 0.0
    precision = common / len(words)
    recall = common / len(reference_words)
    return 2 * precision * recall / (precision + recall)


def words_of(text: str) -> list[str]:
    """The words that rouge_score compares: runs of a-z and 0-9, capitals as small letters. Letters
    of other alphabets are blanks to it."""
    return re.findall(r"[a-z0-9]+", text.lower())


def common_subsequence(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence of two lists: some of the entries, in order."""
    lengths = [0] * (len(b) + 1)  # of a's beginning and each beginning of b
    for x in a:
        before = lengths
        lengths = [0]
        for j, y in enumerate(b):
            if x == y:
                lengths.append(before[j] + 1)
            else:
                lengths.append(max(before[j + 1], lengths[j]))
    return lengths[-1]


def chrf_counts(text: str, reference: str) -> list[list[int]]:
    """What chrF counts in a pair of texts, a list (MAX_N, 3): for each n the runs of n characters
    in the text, in the reference, and in both. White space does not count."""
    text = "".join(text.split())
    reference = "".join(reference.split())
    counts = []
    for n in range(1, MAX_N + 1):
        runs = runs_of(text, n)
        reference_runs = runs_of(reference, n)
        n_runs = runs.total()
        if not reference_runs:  # longer than the whole reference: not held against a text
            n_runs = 0
        counts.append([n_runs, reference_runs.total(), (runs & reference_runs).total()])
    return counts


def runs_of(text: str, n: int) -> Counter:
    """{run of n characters: how often} in a text."""
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def chrf(counts: list[list[int]]) -> float:
    """chrF of chrf_counts, or of the sum of many: a corpus's chrF is that of all its runs, no mean
    over its texts. Precision and recall are means over the lengths that both sides have."""
    precisions = []
    recalls = []
    for n_text, n_reference, n_both in counts:
        if n_text and n_reference:
            precisions.append(n_both / n_text)
            recalls.append(n_both / n_reference)
    if not any(precisions):
        return 0.0
    precision = sum(precisions) / len(precisions)
    recall = sum(recalls) / len(recalls)
    weight = BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall)
