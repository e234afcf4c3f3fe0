"""Looking inside: what the web page (barelm/web) shows of the network. Nothing here changes it,
and nothing here knows HTTP: a JSON object in, one out. Of its run: barelm/runs.py."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from barelm.answers import token_name
from barelm.api import ApiError, check_length, encode_text, is_ids, read_fields, short
from barelm.diagram import diagram
from barelm.engine import NOT_FINITE
from barelm.jobs import limited
from barelm.parts import whole_tensor
from barelm.quantized import QuantizedLinear

if TYPE_CHECKING:
    from barelm.api import ServedModel
    from barelm.tokenizer import Tokenizer
    from model import GPT

# --------------------------------------------------------------------------------------------------
# The network's parts


def model_parts(net: GPT) -> list[dict]:
    """The network's layers in their order, each with its shape and number of parameters, which is
    0 for a head whose matrix is the embedding's: together, all parameters there are."""
    parts = []
    for name, layer in net.named_modules():
        weight = getattr(layer, "weight", None)
        if weight is None:
            continue
        # The codes of a quantized layer have another shape than the weights they stand for.
        shape = layer.shape if isinstance(layer, QuantizedLinear) else weight.shape
        tied = net.config.tie and name == "lm_head"  # counted with the embedding
        bias = getattr(layer, "bias", None)
        n_params = 0 if bias is None else bias.numel()
        if not tied:
            n_params += math.prod(shape)
        parts.append({"name": name, "shape": list(shape), "params": n_params, "tied": tied})
    return parts + loose_parameters(net)


def loose_parameters(net: GPT) -> list[dict]:
    """The same of parameters that are no layer's weight or bias: sinks, stacks of experts."""
    parts = []
    for name, p in net.named_parameters():
        if name.rpartition(".")[2] in ("weight", "bias"):
            continue
        parts.append({"name": name, "shape": list(p.shape), "params": p.numel(), "tied": False})
    return parts


def describe_model(net: GPT) -> dict:
    """What the network is made of, as /inspect/model tells it."""
    parts = model_parts(net)
    tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}  # a tied one counts once
    table = net.model.embed_tokens.weight
    return {
        "config": asdict(net.config),
        "parts": parts,
        "diagram": diagram(net, parts),
        "params": sum(part["params"] for part in parts),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "dtype": str(table.dtype).removeprefix("torch."),
        "device": str(table.device),
    }


def read_ids(
    served: ServedModel, text: str | None, ids: list[int] | None, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a request's text, or its ids."""
    if text is not None and ids is not None:
        raise ApiError(400, "expected a text or ids, not both", "text")
    if text is not None:
        return encode_text(served, text, add_special_tokens)
    if not is_ids(served.tok, ids):
        why = f"expected a text, or ids from 0 to {served.tok.n_vocab - 1}"
        raise ApiError(400, why, "text")
    return ids


@dataclass
class TextRequest:
    text: str | None = None


def read_text(served: ServedModel, body: dict) -> str:
    """The text of a TextRequest."""
    request = read_fields(body, TextRequest, neutral={}, ignored={})
    if request.text is None:
        raise ApiError(400, "expected a text", "text")
    check_length(served, len(request.text))
    return request.text


# --------------------------------------------------------------------------------------------------
# Embeddings


def nearest(net: GPT, n_vocab: int, token: int, n: int) -> list[tuple[int, float]]:
    """[(id, cosine)] of the n tokens whose embeddings point most nearly where that of `token` does,
    itself left out."""
    table = whole_tensor(net.model.embed_tokens.weight)[:n_vocab]  # (V, C)
    row = table[token].float()
    parts = []
    for part in table.split(8192):  # not all of them in float32 at once
        parts.append(F.cosine_similarity(part.float(), row, dim=-1))
    cosines = torch.cat(parts)  # (V,)
    if not cosines.isfinite().all():
        raise ApiError(500, NOT_FINITE)
    cosines[token] = -math.inf  # the nearest to itself, which says nothing
    best = cosines.topk(min(n, n_vocab - 1))
    return list(zip(best.indices.tolist(), best.values.tolist()))


@dataclass
class NeighboursRequest:
    text: str | None = None  # of one token
    token: int | None = None  # its id, instead
    n: int = limited(10, 1, 100)


def read_neighbours(served: ServedModel, body: dict) -> NeighboursRequest:
    """A NeighboursRequest with its token."""
    limits = {"token": (0, served.tok.n_vocab - 1)}
    request = read_fields(body, NeighboursRequest, neutral={}, ignored={}, limits=limits)
    if request.token is not None:
        if request.text is not None:
            raise ApiError(400, "expected a token or a text, not both", "text")
        return request
    ids = read_ids(served, request.text, None, add_special_tokens=False)
    if len(ids) != 1:
        raise ApiError(400, f"{len(ids)} tokens: neighbours are of one", "text")
    request.token = ids[0]
    return request


def neighbours_answer(
    tok: Tokenizer, request: NeighboursRequest, neighbours: list[tuple[int, float]]
) -> dict:
    rows = []
    for id, cosine in neighbours:
        rows.append({"token": id, "text": token_name(tok, id), "cosine": round(cosine, 6)})
    name = token_name(tok, request.token)
    return {"token": request.token, "text": name, "neighbours": rows}


# --------------------------------------------------------------------------------------------------
# The page itself

FOLDER = Path(__file__).with_name("web")
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = """default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';
img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"""
# The page may run its own scripts and styles and ask this server; nothing else is run, loaded or
# sent to, and no site may put it into a frame.
HEADERS = {
    "Content-Security-Policy": " ".join(POLICY.split()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # who changes a file need not clear a browser
}


def page_file(name: str) -> tuple[bytes, str]:
    """(the bytes, the media type) of a file of the page. name: "index.html", "vendor/marked.js";
    ApiError 404 for any other: only what lies in barelm/web is given out."""
    files = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*.*")}
    path = files.get(name)
    if path is None or path.suffix not in MEDIA_TYPES:
        raise ApiError(404, f"the page has no file {short(name)}")
    return path.read_bytes(), MEDIA_TYPES[path.suffix]
