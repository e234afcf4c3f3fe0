"""/v1/embeddings as OpenAI has it, and /classify as vLLM does: what a request may say, what the
engine's thread does for it, and what it is answered. Nothing here knows HTTP."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from barelm.api import ApiError, check_length, check_model, is_ids, read_fields, short, tokenized
from barelm.embeddings import vectors_of
from barelm.engine import NOT_FINITE

if TYPE_CHECKING:
    import numpy as np
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
    encoding_format: str | None = None  # float, or base64: little-endian float32
    dimensions: int | None = None


@dataclass
class Classify:
    input: Any = None
    model: str | None = None


def read_embeddings(served: ServedModel, body: dict, size: int) -> Embeddings:
    """A request for vectors; this model's have `size` numbers."""
    request = read_fields(body, Embeddings, neutral={}, ignored={"user": str})
    check_model(served, request.model)
    if request.encoding_format not in (None, "float", "base64"):
        why = f"encoding_format = {short(request.encoding_format)}: expected float or base64"
        raise ApiError(400, why, "encoding_format")
    if request.dimensions not in (None, size):
        why = f"dimensions = {request.dimensions}: this model's vectors have {size}"
        raise ApiError(400, why, "dimensions")
    return request


def read_classify(served: ServedModel, net: GPT, body: dict) -> Classify:
    """A request for labels."""
    if net.score is None or net.task != "classify":
        raise ApiError(400, f"{served.name} is no classifier of texts")
    request = read_fields(body, Classify, neutral={}, ignored={"user": str})
    check_model(served, request.model)
    return request


def read_inputs(served: ServedModel, value: Any) -> list[list[int]]:
    """The texts of a request, [ids]: given as a text, as ids, or as a list of either. A text gets
    what the tokenizer begins and ends one with. To tokenize may take long."""
    is_one = not isinstance(value, list) or (value and type(value[0]) is int)
    inputs = [value] if is_one else value
    if len(inputs) > MOST_INPUTS:
        raise ApiError(400, f"{len(inputs)} inputs: expected {MOST_INPUTS} at most", "input")
    if inputs and all(isinstance(text, str) for text in inputs):
        check_length(served, max(map(len, inputs)))
        inputs = [tokenized(served.tok.whole_text, text)[0] for text in inputs]
    if not inputs or not all(ids and is_ids(served.tok, ids) for ids in inputs):
        why = f"expected a text, or ids from 0 to {served.tok.n_vocab - 1}, or a list of either"
        raise ApiError(400, f"input: {why}; none of them empty", "input")
    longest = max(map(len, inputs))
    if longest > served.max_len:
        why = f"an input of {longest} tokens: expected {served.max_len} at most"
        raise ApiError(400, why, "input", "context_length_exceeded")
    return inputs


# --------------------------------------------------------------------------------------------------
# In the thread of the engine, which owns the network and its counters


def make_vectors(engine: Engine, rows: list[list[int]], pooling: str) -> np.ndarray:
    """Unit vectors (B, C) of lists of ids, as numpy's float32."""
    engine.metrics.add("prompt_tokens_total", sum(map(len, rows)))
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


def embeddings_answer(
    served: ServedModel, inputs: list[list[int]], vectors: np.ndarray, encoding_format: str
) -> dict:
    data = []
    for index, vector in enumerate(vectors):
        if encoding_format == "base64":
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
