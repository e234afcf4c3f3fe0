"""A text as a vector: embedded by any network, compared by cosines, learned from pairs.

    vectors = embed(net, tok, ["a text", "another"], pooling="mean")  # (2, C), each of length 1
    vectors @ vectors.T  # cosines

Which state stands for a text (`model.pooled`) is written beside a model as sentence-transformers
has it, so that a folder opens there, and theirs here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from barelm.files import parse_json, read_input, read_json, write_json
from barelm.run import UserError, in_full, to_device
from model import pooled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from model import GPT

POOLINGS = ("first", "last", "mean")

# --------------------------------------------------------------------------------------------------
# Texts to vectors


def pooling_of(net: GPT) -> str:
    """Which state of a network stands for a text: the one that it was trained with, or the mean."""
    return net.pooling if net.task == "embed" else "mean"


def embed(
    net: GPT, tok: Tokenizer, texts: list[str], pooling: str = "mean", micro_tokens: int = 8192
) -> Tensor:
    """Unit vectors (N, C) float32, on the CPU, of texts or lists of ids. A text has what the
    tokenizer puts before and behind one; it is cut to the context. At most micro_tokens tokens are
    read at once, padding counted, but one text at least."""
    limit = net.config.n_ctx
    rows = []
    for text in texts:
        ids = tok.whole_text(text, limit)[0] if isinstance(text, str) else list(text)[:limit]
        if not ids:
            raise UserError("an empty text has no vector")
        rows.append(ids)
    vectors = torch.empty(len(rows), net.config.n_embd)
    for batch in batches_of(rows, micro_tokens):
        with torch.no_grad():
            vectors[batch] = vectors_of(net, [rows[i] for i in batch], pooling).cpu()
    return vectors


def batches_of(rows: list[list[int]], micro_tokens: int) -> Iterator[list[int]]:
    """Lists of indices of rows, lists of ids: those of like length together."""
    batch = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and len(rows[i]) * (len(batch) + 1) > micro_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def vectors_of(net: GPT, rows: list[list[int]], pooling: str, pad: int | None = None) -> Tensor:
    """Unit vectors (B, C) float32 of lists of ids, in one pass. pad: to how many tokens rows are
    padded; None: the longest one's."""
    T = pad or max(map(len, rows))
    device = net.model.embed_tokens.weight.device
    ids = to_device(torch.tensor([row + [0] * (T - len(row)) for row in rows]), device)  # (B, T)
    lengths = to_device(torch.tensor([len(row) for row in rows]), device)
    states = pooled(net.states(ids, lengths), lengths, pooling)  # (B, C)
    return F.normalize(states.float(), dim=-1)


# --------------------------------------------------------------------------------------------------
# Pairs to a loss


def contrast(anchors: Tensor, candidates: Tensor, same: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, equation 4) of each anchor, (N,) float32: -log of the
    share that its own candidate, of the same index, has among all of them. anchors (N, C) and
    candidates (M, C), M >= N, are unit vectors; same (N, M) bool: candidates that are copies of an
    anchor's own, and so no counter-examples of it."""
    with in_full(anchors):  # a temperature makes roundings large
        scores = anchors @ candidates.T / temperature  # (N, M)
    scores = scores.masked_fill(same, -math.inf)
    right = torch.arange(len(anchors), device=anchors.device)
    return F.cross_entropy(scores, right, reduction="none")


def copies(candidates: list[list[int]], n: int) -> Tensor:
    """(n, M) bool: which of M candidates, lists of ids, are copies of candidate i and not i."""
    numbers = {}
    for ids in candidates:
        numbers.setdefault(tuple(ids), len(numbers))
    numbered = torch.tensor([numbers[tuple(ids)] for ids in candidates])
    same = numbered[:n, None] == numbered  # (n, M)
    same[torch.arange(n), torch.arange(n)] = False
    return same


def candidates_of(examples: list[dict]) -> list[list[int]]:
    """The candidates of examples {"texts": [anchor, positive, negative or nothing]}, lists of ids:
    the positives in their order, then all negatives."""
    negatives = [e["texts"][2] for e in examples if len(e["texts"]) > 2]
    return [e["texts"][1] for e in examples] + negatives


def read_embed_pair(row: dict[str, str]) -> list[str]:
    """[anchor, positive] or [anchor, positive, negative] of a row; of a row with one text alone
    that text twice, which dropout makes a pair of (SimCSE: Gao et al. 2021)."""
    for names in (("anchor", "positive"), ("query", "positive"), ("a", "b")):
        if names[0] in row and names[1] in row:
            texts = [row[name] for name in names]
            if row.get("negative") is not None:
                texts.append(row["negative"])
            return checked_texts(texts)
    if "text" in row:
        return checked_texts([row["text"], row["text"]])
    raise UserError("no anchor and positive, query and positive, a and b, nor text")


def checked_texts(texts: list[str]) -> list[str]:
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError("a text that is empty, or none")
    return texts


# --------------------------------------------------------------------------------------------------
# How good vectors are


def right_ranks(queries: Tensor, documents: Tensor, right: Tensor) -> Tensor:
    """(N,) int64: the rank, from 1, of document right[i] for query i, by cosine; of equal ones the
    right one is the last. queries (N, C), documents (M, C): unit vectors; right (N,)."""
    ranks = []
    for part, numbers in zip(queries.split(1024), right.split(1024)):  # (1024, M) at once
        cosines = part @ documents.T
        own = cosines.gather(1, numbers[:, None])
        ranks.append((cosines >= own).sum(1))
    return torch.cat(ranks)


def pearson(a: Any, b: Any) -> float:
    """The correlation of two lists of numbers; NaN where one of them is constant."""
    a = np.asarray(a, np.float64) - np.mean(a)
    b = np.asarray(b, np.float64) - np.mean(b)
    size = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else math.nan


def spearman(a: Any, b: Any) -> float:
    """The correlation of their ranks; equal numbers share the mean of theirs."""
    return pearson(mean_ranks(a), mean_ranks(b))


def mean_ranks(numbers: Any) -> np.ndarray:
    """(N,) the ranks of numbers, from 0."""
    numbers = np.asarray(numbers, np.float64)
    _, group, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)  # behind the last of each group of equals
    return (ends - (sizes + 1) / 2)[group.reshape(-1)]


# --------------------------------------------------------------------------------------------------
# On disk, as sentence-transformers has it

POOLING_FILE = "1_Pooling/config.json"
MODULES = (
    ("", "sentence_transformers.models.Transformer"),
    ("1_Pooling", "sentence_transformers.models.Pooling"),
    ("2_Normalize", "sentence_transformers.models.Normalize"),
)
MODES = {  # of pooling: their key
    "first": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def write_pooling(folder: Path, pooling: str, size: int) -> None:
    """Say in a model's folder which of its states, of this size, stands for a text."""
    folder = Path(folder)
    modules = []
    for number, (path, kind) in enumerate(MODULES):
        modules.append({"idx": number, "name": str(number), "path": path, "type": kind})
    modes = {key: name == pooling for name, key in MODES.items()}
    (folder / POOLING_FILE).parent.mkdir(exist_ok=True)
    write_json(folder / POOLING_FILE, {"word_embedding_dimension": size} | modes)
    write_json(folder / "modules.json", modules)


def check_modules(path: Path) -> None:
    """Refuse a model of vectors that does more with them than we do, such as another layer."""
    usual = [last_word(kind) for _, kind in MODULES]
    if not path.is_file():
        return
    modules = parse_json(read_input(path), path)
    if not isinstance(modules, list):
        raise UserError(f"{path}: malformed: expected a list")
    kinds = [str(m.get("type")) if isinstance(m, dict) else "?" for m in modules]
    others = [kind for kind in kinds if last_word(kind) not in usual]
    if others:
        raise UserError(f"{path}: not supported: {others[0]:.80}")


def last_word(name: str) -> str:
    return name.rpartition(".")[2]


def read_pooling(folder: Path) -> str | None:
    """Which state stands for a text in this folder's model, or None where it does not say."""
    path = Path(folder) / POOLING_FILE
    if not path.is_file():
        return None
    check_modules(Path(folder) / "modules.json")
    settings = read_json(path)
    on = [name for name, key in MODES.items() if settings.get(key)]
    others = [key for key, value in settings.items() if "pooling_mode_" in key and value is True]
    if len(on) != 1 or len(others) != 1:
        raise UserError(f"{path}: expected one of {', '.join(MODES.values())}")
    return on[0]
