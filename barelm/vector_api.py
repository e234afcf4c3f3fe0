"""/v1/embeddings as OpenAI has it, and /classify as vLLM does: what a request may say, what the
engine's thread does for it, and what it is answered. Nothing here knows HTTP."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.api import ApiError, check_length, check_model, is_ids, read_fields, tokenized
from barelm.embeddings import POOLINGS, vectors_of
from barelm.engine import NOT_FINITE
from barelm.jobs import limited, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from barelm.api import ServedModel
    from barelm.engine import Engine
    from model import GPT

MOST_INPUTS = 2048  # texts of a request: OpenAI's limit

# --------------------------------------------------------------------------------------------------
# Requests


@dataclass
class Embeddings:
    input: Any = None  # a text, ids, or a list of either
    model: str | None = None
    encoding_format: str | None = one_of("float", "base64")  # base64: little-endian float32
    dimensions: int | None = None  # only so many first numbers, made a unit vector again
    pooling: str | None = one_of(*POOLINGS)  # which state stands for a text
    truncate_prompt_tokens: int | None = limited(None, -1, 2**31)  # keep so many; -1: what fits
    truncation_side: str | None = one_of("left", "right")  # right, the usual: it keeps the first
    add_special_tokens: bool = True  # what the tokenizer begins and ends a text with


@dataclass
class Classify:
    input: Any = None  # a text, ids, or a list of either
    model: str | None = None
    truncate_prompt_tokens: int | None = limited(None, -1, 2**31)
    truncation_side: str | None = one_of("left", "right")
    add_special_tokens: bool = True


IGNORED: dict[str, type] = {"user": str}
# vLLM's and llama.cpp's, with the values that ask for what is done anyway.
NEUTRAL: dict[str, list] = {
    "embd_normalize": [2],  # by the Euclidean length
    "embed_dtype": ["float32"],
    "endianness": ["native", "little"],
    "normalize": [True],
    "priority": [0],
    "use_activation": [True],
}


def read_embeddings(served: ServedModel, body: dict, size: int) -> Embeddings:
    """A request for vectors; this model's have `size` numbers."""
    limits = {"dimensions": (1, size)}
    request = read_fields(body, Embeddings, NEUTRAL, IGNORED, limits)
    check_model(served, request.model)
    return request


def read_classify(served: ServedModel, net: GPT, body: dict) -> Classify:
    """A request for labels."""
    if net.score is None or net.task != "classify":
        raise ApiError(400, f"{served.name} is no classifier of texts", code="model_not_supported")
    request = read_fields(body, Classify, NEUTRAL, IGNORED)
    check_model(served, request.model)
    return request


def read_inputs(served: ServedModel, request: Embeddings | Classify) -> list[list[int]]:
    """The texts of a request, [ids]: given as a text, as ids, or as a list of either. A text gets
    what the tokenizer begins and ends one with. To tokenize may take long."""
    value = request.input
    is_one = not isinstance(value, list) or (value and type(value[0]) is int)
    inputs = [value] if is_one else value
    if len(inputs) > MOST_INPUTS:
        raise ApiError(400, f"{len(inputs)} inputs: expected {MOST_INPUTS} at most", "input")
    if inputs and all(isinstance(text, str) for text in inputs):
        check_length(served, max(map(len, inputs)))
        inputs = [text_ids(served, request, text) for text in inputs]
    if not inputs or not all(ids and is_ids(served.tok, ids) for ids in inputs):
        why = f"expected a text, or ids from 0 to {served.tok.n_vocab - 1}, or a list of either"
        why += "; none of them empty"
        if inputs and isinstance(inputs[0], list):
            why += ". Ids are this tokenizer's (LangChain: check_embedding_ctx_length=False)"
        raise ApiError(400, f"input: {why}", "input")
    inputs = [truncated(served, request, ids) for ids in inputs]
    longest = max(map(len, inputs))
    if longest > served.max_len:
        why = f"an input of {longest} tokens: expected {served.max_len} at most"
        raise ApiError(400, why, "input", "context_length_exceeded")
    return inputs


def text_ids(served: ServedModel, request: Embeddings | Classify, text: str) -> list[int]:
    """The ids of a text, cut so that what begins and ends it stays."""
    tok = served.tok
    if not request.add_special_tokens:
        return tokenized(tok.encode, text)
    ids = tokenized(tok.encode, text)
    if request.truncate_prompt_tokens is not None:
        room = cut_to(served, request) - len(tok.start) - len(tok.end)
        ids = cut(ids, max(room, 0), request.truncation_side)
    return tok.start + ids + tok.end


def truncated(served: ServedModel, request: Embeddings | Classify, ids: list[int]) -> list[int]:
    if request.truncate_prompt_tokens is None:
        return ids
    return cut(ids, cut_to(served, request), request.truncation_side)


def cut(ids: list[int], n: int, side: str | None) -> list[int]:
    """n of the ids: the first, or where the left is cut the last."""
    return ids[max(len(ids) - n, 0) :] if side == "left" else ids[:n]


def cut_to(served: ServedModel, request: Embeddings | Classify) -> int:
    """How many tokens of an input are read."""
    n = request.truncate_prompt_tokens
    if n == 0:
        why = "truncate_prompt_tokens = 0: expected 1 or more, or -1: what fits"
        raise ApiError(400, why, "truncate_prompt_tokens")
    return served.max_len if n == -1 else n


# --------------------------------------------------------------------------------------------------
# In the thread of the engine, which owns the network and its counters


def make_vectors(
    engine: Engine, rows: list[list[int]], pooling: str, adapter: int = 0
) -> np.ndarray:
    """Unit vectors (B, C) of lists of ids, as numpy's float32; adapter: its number, or 0."""
    engine.metrics.add("prompt_tokens_total", sum(map(len, rows)))
    if adapter == 0:
        return finite(vectors_of(engine.net, rows, pooling)).numpy()
    with engine.adapters.used(engine.net, adapter, (adapter,)):
        return finite(vectors_of(engine.net, rows, pooling)).numpy()


def make_scores(engine: Engine, rows: list[list[int]]) -> list[list[float]]:
    """The scores of each label for lists of ids: lists of floats."""
    engine.metrics.add("prompt_tokens_total", sum(map(len, rows)))
    scores = finite(engine.net.scores(rows))
    return scores.softmax(-1).tolist() if scores.shape[1] > 1 else scores.tolist()


def finite(numbers: Tensor) -> Tensor:
    """A tensor on the CPU, whose numbers JSON has."""
    if not numbers.isfinite().all():
        raise ApiError(500, NOT_FINITE)
    return numbers.cpu()


# --------------------------------------------------------------------------------------------------
# Answers


def shortened(vectors: np.ndarray, size: int | None) -> np.ndarray:
    """The first `size` numbers of vectors (N, C), as unit vectors again: what OpenAI's do, and
    Matryoshka learning trains for (Kusupati et al. 2022). All of them where size is None."""
    vectors = np.asarray(vectors, np.float32)[:, :size]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def embeddings_answer(
    served: ServedModel, request: Embeddings, inputs: list[list[int]], vectors: np.ndarray
) -> dict:
    data = []
    for index, vector in enumerate(shortened(vectors, request.dimensions)):
        if request.encoding_format == "base64":
            shown = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        else:
            shown = vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    return {"object": "list", "data": data, "model": served.name, "usage": tokens_of(inputs)}


def classes_answer(
    served: ServedModel, labels: list[str], inputs: list[list[int]], shares: list
) -> dict:
    """shares: of each input the probability of each label; of a reward model, its score."""
    data = []
    for index, probs in enumerate(shares):
        label = labels[probs.index(max(probs))]
        data.append({"index": index, "label": label, "probs": probs, "num_classes": len(labels)})
    head = {"object": "list", "created": int(time.time()), "model": served.name}
    return head | {"data": data, "usage": tokens_of(inputs)}


def tokens_of(inputs: list[list[int]]) -> dict:
    n = sum(map(len, inputs))
    return {"prompt_tokens": n, "total_tokens": n}
