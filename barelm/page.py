"""Looking inside: what the web page (barelm/web) shows of the network and of its run. Nothing here
changes them, and nothing here knows HTTP: a JSON object in, one out."""

import bisect
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from barelm.answers import token_name
from barelm.api import ApiError, encode_text, is_ids, read_fields, short
from barelm.engine import NOT_FINITE
from barelm.jobs import limited
from barelm.parts import whole_tensor
from barelm.quantized import QuantizedLinear

MAP_TOKENS = 128  # the longest text whose attention is shown
LOG_ROWS = 2000  # the most rows of training in one answer: of more, one in so many


# --------------------------------------------------------------------------------------------------
# The network's parts


def model_parts(net):
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


def loose_parameters(net):
    """The same of parameters that are no layer's weight or bias: sinks, stacks of experts."""
    parts = []
    for name, p in net.named_parameters():
        if name.rpartition(".")[2] in ("weight", "bias"):
            continue
        parts.append({"name": name, "shape": list(p.shape), "params": p.numel(), "tied": False})
    return parts


def describe_model(net):
    """What the network is made of, as /inspect/model tells it."""
    parts = model_parts(net)
    tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}  # a tied one counts once
    table = net.model.embed_tokens.weight
    return {
        "config": asdict(net.config),
        "parts": parts,
        "params": sum(part["params"] for part in parts),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "dtype": str(table.dtype).removeprefix("torch."),
        "device": str(table.device),
    }


# --------------------------------------------------------------------------------------------------
# Attention


def attention_maps(net, ids, layer):
    """By how much each token looks at each in one layer (n_head, T, T) float32, in a pass over ids,
    a list: row i is what token i looks at. The network computes them itself, so that the page shows
    what a fork's attention does. Of an encoder-decoder it is the encoder, which reads a text."""
    part = net.model.encoder if net.config.is_seq2seq else net.model
    attention = part.layers[layer].self_attn
    ids = torch.tensor([ids], device=net.model.embed_tokens.weight.device)
    inputs = []
    # What the layer is given in a usual pass, rotations and mask too, is what it is asked about.
    hook = attention.register_forward_pre_hook(lambda module, args: inputs.extend(args[:3]))
    try:
        if net.config.is_seq2seq:
            net.encode(ids)
        else:
            net.hidden(ids)
    finally:
        hook.remove()
    x, rope, mask = inputs
    maps = attention.probabilities(x, rope, mask)[0]
    if not maps.isfinite().all():
        raise ApiError(500, NOT_FINITE)
    return net.ops.all_heads(maps).cpu()


@dataclass
class AttentionRequest:
    text: str | None = None
    ids: list | None = None  # instead of a text
    layer: int = 0
    head: int | None = None  # None: all


def read_attention(served, config, body):
    """An AttentionRequest with its ids."""
    n_layer = config.n_encoder_layer or config.n_layer
    limits = {"layer": (0, n_layer - 1), "head": (0, config.n_head - 1)}
    request = read_fields(body, AttentionRequest, neutral={}, ignored={}, limits=limits)
    request.ids = read_ids(served, request.text, request.ids)
    most = min(MAP_TOKENS, served.max_len)
    if not 0 < len(request.ids) <= most:
        why = f"{len(request.ids)} tokens: attention is shown of 1 to {most}"
        raise ApiError(400, why, "text")
    return request


def attention_answer(tok, request, maps):
    """Of each head a row for each token: what it looks at; where none sees what is behind it, up to
    itself."""
    is_causal = not maps.triu(1).any()
    heads = range(len(maps)) if request.head is None else [request.head]
    return {
        "tokens": request.ids,
        "token_strs": [token_name(tok, id) for id in request.ids],
        "layer": request.layer,
        "heads": [rounded_rows(maps[head].tolist(), is_causal) for head in heads],
    }


def rounded_rows(rows, is_causal):
    """The rows, of causal ones row i up to its place i."""
    rounded = []
    for i, row in enumerate(rows):
        end = i + 1 if is_causal else len(row)
        rounded.append([round(weight, 5) for weight in row[:end]])
    return rounded


def read_ids(served, text, ids, add_special_tokens=True):
    """The ids of a request's text, or its ids."""
    if text is not None and ids is not None:
        raise ApiError(400, "expected a text or ids, not both", "text")
    if text is not None:
        return encode_text(served, text, add_special_tokens)
    if not is_ids(served.tok, ids):
        why = f"expected a text, or ids from 0 to {served.tok.n_vocab - 1}"
        raise ApiError(400, why, "text")
    return ids


# --------------------------------------------------------------------------------------------------
# Embeddings


def nearest(net, n_vocab, token, n):
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


def read_neighbours(served, body):
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


def neighbours_answer(tok, request, neighbours):
    rows = []
    for id, cosine in neighbours:
        rows.append({"token": id, "text": token_name(tok, id), "cosine": round(cosine, 6)})
    name = token_name(tok, request.token)
    return {"token": request.token, "text": name, "neighbours": rows}


# --------------------------------------------------------------------------------------------------
# The run


def null(word):
    return None


def read_row(line):
    return json.loads(line, parse_constant=null)  # NaN and Infinity are no JSON of a browser's


def log_rows(path, after):
    """(the rows of a log.jsonl behind step `after`, the last step there is or -1). Many are
    thinned, but for the evaluations; a row that is being written waits for the next time."""
    if not path.is_file():
        return [], -1
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()  # without what is not ended yet
    if not lines:
        return [], -1
    # Steps rise: of a long log only a few lines are parsed to find where to begin.
    begin = bisect.bisect_right(lines, after, key=lambda line: read_row(line)["step"])
    new = lines[begin:]
    stride = max(1, math.ceil(len(new) / LOG_ROWS))
    thinned = [line for i, line in enumerate(new) if i % stride == 0 or b'"val_' in line]
    rows = [read_row(line) for line in thinned[-2 * LOG_ROWS :]]
    return rows, read_row(lines[-1])["step"]


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


def page_file(name):
    """(the bytes, the media type) of a file of the page. name: "index.html", "vendor/marked.js";
    ApiError 404 for any other: only what lies in barelm/web is given out."""
    files = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*.*")}
    path = files.get(name)
    if path is None or path.suffix not in MEDIA_TYPES:
        raise ApiError(404, f"the page has no file {short(name)}")
    return path.read_bytes(), MEDIA_TYPES[path.suffix]
