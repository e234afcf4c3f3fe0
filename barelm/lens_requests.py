"""What the page's view Layers asks and is answered: a JSON object in, one out. What is computed is
in barelm/lens.py and barelm/patching.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from barelm import lens
from barelm.answers import token_name
from barelm.api import ApiError, encode_text, is_ids, read_fields, short
from barelm.jobs import limited
from barelm.page import read_ids
from barelm.patching import KINDS, Patching, check_pair
from barelm.run import UserError

if TYPE_CHECKING:
    from barelm.api import ServedModel
    from barelm.lens import Attribution, Guesses
    from barelm.tokenizer import Tokenizer
    from model import GPT

LENS_TOKENS = 64  # the longest text that the lens reads
PATCH_TOKENS = 24  # the longest that is patched: each token costs a pass a layer


@dataclass
class Reading:
    """What the network is given, and where its logits are of interest."""

    ids: list  # of the decoder, where there is one beside an encoder
    source: list | None  # of the encoder then
    position: int


def read_text(
    served: ServedModel,
    net: GPT,
    text: str | None,
    ids: list[int] | None,
    name: str = "text",
    most: int = LENS_TOKENS,
) -> tuple[list[int], int | None]:
    """(the ids of a request's text or ids; the place of its first mask, or None). An encoder reads
    masks by their name, such as [MASK]."""
    place = None
    tok = served.tok
    is_encoder = not net.config.causal and not net.config.is_seq2seq
    if is_encoder and text is not None and ids is None:
        encode_text(served, text)  # refuses what is too long
        ids, place = lens.encoder_ids(tok, text)
    else:
        ids = read_ids(served, text, ids)
    most = min(most, served.max_len)
    if not 0 < len(ids) <= most:
        raise ApiError(400, f"{len(ids)} tokens: layers are shown of 1 to {most}", name)
    return ids, place


def read_target(served: ServedModel, net: GPT, target: str) -> list[int]:
    """What the decoder of an encoder-decoder has behind it: its start token and the text."""
    if net.start_id is None:
        raise ApiError(400, "an encoder-decoder without a start token: config.json has none")
    return [net.start_id, *encode_text(served, target, add_special_tokens=False)]


def read_reading(served: ServedModel, net: GPT, request: LensRequest | SharesRequest) -> Reading:
    """The Reading of a request with text or ids, target and position."""
    lens.check_lens(net)
    ids, place = read_text(served, net, request.text, request.ids)
    source = None
    if net.config.is_seq2seq:
        source = ids
        ids = read_target(served, net, request.target)
        if len(ids) > LENS_TOKENS:
            why = f"{len(ids)} tokens: layers are shown of {LENS_TOKENS} at most"
            raise ApiError(400, why, "target")
    elif request.target:
        raise ApiError(400, "target: only an encoder-decoder has one beside its text", "target")
    return Reading(ids, source, chosen_position(ids, place, request.position))


def chosen_position(ids: list[int] | None, place: int | None, position: int | None) -> int:
    """The position that was asked about, or else that of a mask, or else the last."""
    if position is None:
        return len(ids) - 1 if place is None else place
    if not 0 <= position < len(ids):
        why = f"position = {position}: expected 0 to {len(ids) - 1}"
        raise ApiError(400, why, "position")
    return position


def read_token(served: ServedModel, value: int | str, name: str) -> int:
    """The id that a request's field is: an id, or the text of one token."""
    tok = served.tok
    if not isinstance(value, str):
        if not is_ids(tok, [value]):
            why = f"{name} = {short(value)}: expected a token, or an id below {tok.n_vocab}"
            raise ApiError(400, why, name)
        return value
    ids = encode_text(served, value, add_special_tokens=False)
    if len(ids) != 1:
        hint = ", which mostly begins with a space" if not value.startswith(" ") else ""
        why = f"{name} = {short(value)}: {len(ids)} tokens, expected one{hint}"
        raise ApiError(400, why, name)
    return ids[0]


def names_of(tok: Tokenizer, ids: list[int] | None) -> list[str]:
    return [token_name(tok, id) for id in ids]


def part_of(net: GPT) -> str:
    """Which part of the network is looked at."""
    if net.config.is_seq2seq:
        return "decoder"
    return "decoder-only" if net.config.causal else "encoder"


def reading_head(served: ServedModel, net: GPT, reading: Reading) -> dict:
    """What every answer about a Reading begins with."""
    tok = served.tok
    masks = [name for name, id in tok.special.items() if id == tok.mask_id]
    return {
        "part": part_of(net),
        "mask": masks[0] if masks else None,
        "tokens": reading.ids,
        "token_strs": names_of(tok, reading.ids),
        "position": reading.position,
    }


# --------------------------------------------------------------------------------------------------
# The logit lens


@dataclass
class LensRequest:
    text: str | None = None
    ids: list | None = None  # instead of a text
    target: str = ""  # of an encoder-decoder: what it has written so far
    position: int | None = None  # None: the last, an encoder's first mask
    k: int = limited(5, 1, 20)  # tokens of each layer and position


def read_lens(served: ServedModel, net: GPT, body: dict) -> tuple[LensRequest, Reading]:
    """(a LensRequest, its Reading)."""
    request = read_fields(body, LensRequest, neutral={}, ignored={})
    return request, read_reading(served, net, request)


def lens_head(served: ServedModel, net: GPT, reading: Reading, last: Guesses) -> dict:
    """What is answered beside the rows. last: the Guesses of the last layer."""
    wanted = [tokens[0] for tokens in last.tokens]
    answers = {"answers": wanted, "answer_strs": names_of(served.tok, wanted)}
    return reading_head(served, net, reading) | answers


def lens_row(served: ServedModel, guesses: Guesses) -> dict:
    """What one layer says, at each position: its tokens with their probabilities; the probability
    and the rank, 0 the likeliest, of what the last layer says there; the entropy in bits."""
    return {
        "top": [names_of(served.tok, tokens) for tokens in guesses.tokens],
        "ids": guesses.tokens,
        "probabilities": [rounded(row, 5) for row in guesses.probabilities],
        "answer": rounded(guesses.wanted, 5),
        "rank": guesses.ranks,
        "entropy": rounded(guesses.entropies, 3),
    }


def rounded(values: list[float], digits: int) -> list[float]:
    return [round(value, digits) for value in values]


# --------------------------------------------------------------------------------------------------
# Direct logit attribution


@dataclass
class SharesRequest:
    text: str | None = None
    ids: list | None = None
    target: str = ""
    position: int | None = None
    token: Any = None  # an id, or the text of one token; None: the likeliest
    against: Any = None  # its logit is taken off; None: nothing is


def read_shares(served: ServedModel, net: GPT, body: dict) -> tuple[SharesRequest, Reading]:
    """(a SharesRequest with ids for token and against, its Reading)."""
    request = read_fields(body, SharesRequest, neutral={}, ignored={})
    for name in ("token", "against"):
        value = getattr(request, name)
        if value is not None:
            setattr(request, name, read_token(served, value, name))
    return request, read_reading(served, net, request)


def compute_shares(
    net: GPT, n_vocab: int, reading: Reading, token: int | None, against: int | None
) -> tuple[int, Attribution]:
    """(the token, its Attribution): of the likeliest where token is None."""
    trace = lens.run(net, reading.ids, reading.source)
    if token is None:
        x = lens.states(trace)[-1][reading.position, None]  # (1, C)
        token = lens.logit_lens(net, x, n_vocab, 1).tokens[0][0]
    if token == against:
        raise UserError("a token against itself: the difference is 0; choose another")
    return token, lens.attribute(net, trace, reading.position, token, against)


def shares_answer(
    served: ServedModel,
    net: GPT,
    request: SharesRequest,
    reading: Reading,
    token: int,
    result: Attribution,
) -> dict:
    """The shares by layer, which with those before, behind and the rounding add up to the logit."""
    against = request.against
    layers = [{} for _ in net.model.layers]
    before = {}
    behind = {}
    for share in result.shares:
        value = round(share.value, 6)
        if share.layer is None:
            place = before if share.kind in ("token", "position") else behind
            place[share.kind] = round(place.get(share.kind, 0.0) + value, 6)
        elif share.head is not None:
            layers[share.layer].setdefault(share.kind + "s", []).append(value)
        else:
            row = layers[share.layer]
            row[share.kind] = round(row.get(share.kind, 0.0) + value, 6)
    return reading_head(served, net, reading) | {
        "token": token,
        "token_str": token_name(served.tok, token),
        "against": against,
        "against_str": None if against is None else token_name(served.tok, against),
        "logit": round(result.logit, 6),
        "capped": None if result.capped is None else round(result.capped, 6),
        "before": before,
        "layers": layers,
        "behind": behind,
    }


# --------------------------------------------------------------------------------------------------
# Activation patching


@dataclass
class PatchRequest:
    clean: str = ""
    corrupted: str = ""
    target: str = ""  # of an encoder-decoder: what it has written so far
    kind: str = "residual"
    position: int | None = None
    answer: Any = None  # an id, or the text of one token; None: the clean prompt's likeliest
    other: Any = None  # None: the corrupted one's, or its second choice
    stream: bool = False  # an event for each layer


def read_patch(served: ServedModel, net: GPT, body: dict) -> tuple[PatchRequest, tuple]:
    """(a PatchRequest, what `start_patching` takes)."""
    request = read_fields(body, PatchRequest, neutral={}, ignored={})
    lens.check_lens(net)
    if request.kind not in KINDS:
        why = f"kind = {short(request.kind)}: expected {', '.join(KINDS)}"
        raise ApiError(400, why, "kind")
    for name in ("answer", "other"):
        value = getattr(request, name)
        if value is not None:
            setattr(request, name, read_token(served, value, name))
    clean, place = read_text(served, net, request.clean, None, "clean", PATCH_TOKENS)
    corrupted, _ = read_text(served, net, request.corrupted, None, "corrupted", PATCH_TOKENS)
    check_pair(clean, corrupted)
    start = read_target(served, net, request.target) if net.config.is_seq2seq else None
    position = chosen_position(start or clean, place, request.position)
    return request, (clean, corrupted, position, start)


def start_patching(net: GPT, n_vocab: int, request: PatchRequest, pair: tuple) -> Patching:
    """The Patching of a request, both texts read and the answers chosen."""
    patching = Patching(net, *pair)
    answer, other = patching.likeliest(n_vocab)
    answer = answer if request.answer is None else request.answer
    other = other if request.other is None else request.other
    if answer == other:
        raise UserError("the answer and the other are the same token: name two to compare")
    patching.compare(answer, other)
    return patching


def patch_head(served: ServedModel, net: GPT, request: PatchRequest, patching: Patching) -> dict:
    """What is answered before the rows."""
    tok = served.tok
    n_layer = len(patching.corrupted.blocks)
    best = patching.logits[:, : tok.n_vocab].argmax(-1).tolist()
    return {
        "part": "encoder" if net.config.is_seq2seq else part_of(net),
        "kind": request.kind,
        "clean_strs": names_of(tok, patching.clean.ids),
        "corrupted_strs": names_of(tok, patching.corrupted.ids),
        "likeliest_strs": names_of(tok, best),
        "answer": patching.answer,
        "answer_str": token_name(tok, patching.answer),
        "other": patching.other,
        "other_str": token_name(tok, patching.other),
        "position": patching.position,
        "clean_difference": round(patching.clean_difference, 5),
        "corrupted_difference": round(patching.corrupted_difference, 5),
        "n_rows": n_layer + (request.kind == "residual"),
    }
