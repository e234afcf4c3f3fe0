"""report.md: what every step took away, with examples, and what is left."""

from __future__ import annotations

import zlib
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.clean import one_line
from barelm.corpus import batches
from barelm.dedup import shingles, word_hashes
from barelm.mix import SPLITS

if TYPE_CHECKING:
    from barelm.clean import Tally
    from barelm.corpus import Corpus
    from barelm.tokenizer import Tokenizer

DIVERSITY_BYTES = 20_000_000  # of text that the figures of diversity are of, a sample by hash
BATCH = 1_000_000  # characters whose words are in hand at once
GZIP = 31  # zlib's number for the gzip format with the largest window


def report_lines(corpus: Corpus, tok: Tokenizer, tallies: dict[str, Tally], clusters: list,
                 meta: dict, title: str, source: str, steps: Any) -> list[str]:  # fmt: skip
    """The lines of the report.

    tallies: {step: Tally}; clusters: [(documents, number of the first)] of near-duplicates, the
    largest first; meta: what is written to meta.json; title, source, steps: what was asked."""
    lines = [f"# {title}", "", f"Source: {source}. Steps: {steps}.", ""]
    lines += step_lines(tallies)
    lines += diversity_lines(corpus)
    lines += length_lines(corpus)
    lines += cluster_lines(corpus, clusters)
    lines += token_lines(tok, meta)
    for name, splits in meta.get("sources", {}).items():
        for split, numbers in splits.items():
            lines += ["", f"{name}, {split}: {share_line(numbers)} of {numbers['tokens']:,}"]
    return lines


def share_line(numbers: dict[str, float]) -> str:
    """What a source has in the mix, in words."""
    shares = f"{numbers['share']:.1%} of the mix, {numbers['asked']:.1%} was asked"
    return f"{shares}; {numbers['written']:,} tokens, {numbers['epochs']:.2f} epochs"


def table_row(*cells: Any) -> str:
    shown = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
    return "| " + " | ".join(shown) + " |"


def quoted(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"  # so that no text formats the report


def step_lines(tallies: dict[str, Tally]) -> list[str]:
    """What each step was given and left; and its reasons, with examples."""
    lines = [table_row("step", "documents in", "out", "bytes in", "out")]
    lines.append(table_row(*["---"] * 5))
    for name, tally in tallies.items():
        counts = (tally.docs_in, tally.docs_out, tally.bytes_in, tally.bytes_out)
        lines.append(table_row(name, *counts))
    lines += ["", "## What was left out, and why", ""]
    for name, tally in tallies.items():
        reasons = sorted(tally.reasons.items(), key=lambda item: -item[1][0])
        for reason, (count, examples) in reasons:
            lines += [f"**{name}: {reason}**: {count:,} documents", ""]
            lines += [f"- {quoted(example)}" for example in examples] + [""]
    return lines


def diversity_lines(corpus: Corpus) -> list[str]:
    varied = diversity(corpus)
    n_left = int((corpus.cuts() >= 0).sum())
    extent = "all"
    if varied["documents"] != n_left:
        extent = f"of {n_left:,}, a sample by hash"
    lines = ["## Diversity", ""]
    lines += [f"Of {varied['documents']:,} documents, {varied['bytes']:,} bytes ({extent}).", ""]
    for n, share in varied["distinct"].items():
        words = "words" if n == 1 else f"{n} words in a row"
        lines.append(f"- distinct-{n}: {share:.3f} of all {words} are different")
    return lines + [f"- gzip makes {varied['compression']:.2f} bytes one", ""]


def length_lines(corpus: Corpus) -> list[str]:
    """A histogram of the documents' sizes, a line for each power of two."""
    sizes = corpus.rows()["size"][corpus.cuts() >= 0]
    bins = np.bincount(np.log2(np.maximum(sizes, 1)).astype(int))
    lines = ["## Lengths of the documents that are left, in bytes", "", "```"]
    for power in np.flatnonzero(bins):
        bar = "#" * max(1, round(60 * bins[power] / bins.max()))
        lines.append(f"{2**power:>12,} to {2 ** (power + 1) - 1:>12,} {bins[power]:>9,} {bar}")
    return lines + ["```", ""]


def cluster_lines(corpus: Corpus, clusters: list) -> list[str]:
    n_extra = sum(size - 1 for size, _ in clusters)
    lines = ["## Near-duplicates", ""]
    lines += [f"{len(clusters):,} clusters, {n_extra:,} documents left out.", ""]
    largest = clusters[:10]
    texts = corpus.texts(corpus.rows()[[first for _, first in largest]])
    for (size, _), text in zip(largest, texts):
        lines.append(f"- {size:,} documents like {quoted(one_line(text, 120))}")
    return lines + [""]


def token_lines(tok: Tokenizer, meta: dict) -> list[str]:
    lines = ["## Tokens", "", table_row("split", "documents", "bytes", "tokens", "bytes per token")]
    lines.append(table_row(*["---"] * 5))
    begin, end = tok.document_layout
    n_around = len(begin) + len(end)  # special tokens of a document, which stand for no bytes
    for split in SPLITS:
        numbers = meta[split]
        text_tokens = numbers["tokens"] - numbers["documents"] * n_around
        ratio = f"{numbers['bytes'] / max(text_tokens, 1):.2f}"
        lines.append(
            table_row(split, numbers["documents"], numbers["bytes"], numbers["tokens"], ratio)
        )
    return lines


def diversity(corpus: Corpus) -> dict:
    """How varied the documents that are left are: {"documents", "bytes": of the sample, "distinct":
    {n: share of all n words in a row that differ, for n of 1, 2, 3} (distinct-n, Li et al. 2016,
    without regard to case), "compression": how many bytes gzip makes one of (Shaib et al. 2024)}.
    More text has fewer new words in it, so compare samples of one size."""
    rows = corpus.rows()
    numbers = np.flatnonzero(corpus.cuts() >= 0)
    # Whatever else is in the source, a document is in the sample or not by its own hash.
    by_hash = numbers[np.argsort(rows["hash"][numbers], kind="stable")]
    fits = np.cumsum(rows["size"][by_hash]) <= DIVERSITY_BYTES
    sample = np.sort(by_hash[: max(1, int(fits.sum()))])
    packer = zlib.compressobj(9, zlib.DEFLATED, GZIP)
    packed_size = 0
    size = 0
    grams = {n: [np.empty(0, np.uint64)] for n in (1, 2, 3)}
    texts = ((text,) for text in corpus.texts(rows[sample]))
    for batch in batches(texts, BATCH):
        batch_texts = list(chain.from_iterable(batch))
        hashes, owners = word_hashes(batch_texts)
        for n in grams:
            values, _ = shingles(hashes, owners, n)
            grams[n].append(values)
        data = "".join(text + "\n" for text in batch_texts).encode()  # the \n are taken off below
        size += len(data)
        packed_size += len(packer.compress(data))
    packed_size += len(packer.flush())
    distinct = {}
    for n, parts in grams.items():
        values = np.concatenate(parts)
        distinct[n] = len(np.unique(values)) / max(1, len(values))
    return {
        "documents": len(sample),
        "bytes": size - len(sample),  # without a line end each
        "distinct": distinct,
        "compression": size / packed_size,
    }
