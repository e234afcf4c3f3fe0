"""Fields of GPTConfig whose keys in transformers' config.json are no plain renaming: rotations,
experts, activations by name. Each is a `Part`, of which family_table.py composes a family; those of
windows are in window_keys.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model import GPTConfig

FULL = "full_attention"  # the kinds of layers in layer_types
SLIDING = "sliding_attention"
MOST_LAYERS = 100_000  # of a config.json that names a kind for each of them


class Inexact(Exception):
    """What a config.json asks for that we would not compute exactly, or cannot read."""


@dataclass(frozen=True)
class Part:
    """Some fields of GPTConfig that a family's config.json has in another form.

    read(d, values): {field: value} by the config.json's dict d and the values {field: value} of the
    plain keys; Inexact where d asks for what no value of the fields does exactly.
    write(c): {key: value} by a GPTConfig. What it writes must read as it was, else no file holds
    the network: `families.misfits`."""

    fields: tuple[str, ...]
    keys: tuple[str, ...]  # of config.json, that it reads
    read: Callable
    write: Callable


def refuse(d: dict, key: str, why: str = "not supported") -> None:
    raise Inexact(f"{key}={d.get(key)!r:.60} {why}")


def with_absent(part: Part, **usual: Any) -> Part:
    """The Part of a family in which these are the values of absent keys."""

    def read(d, values):
        return part.read(usual | d, values)

    return Part(part.fields, part.keys, read, part.write)


def shortest(letters: str) -> str:
    """The fewest of these letters, one a layer, that give them when they are repeated."""
    n = len(letters)
    for size in range(1, n + 1):
        if repeated(letters[:size], n) == letters:
            break
    return letters[:size]


def repeated(letters: str, n: int) -> str:
    return (letters * -(-n // len(letters)))[:n]


def count_layers(values: dict) -> int:
    n_layer = values.get("n_layer")
    if type(n_layer) is not int or not 0 < n_layer <= MOST_LAYERS:
        raise Inexact(f"a window for each of {n_layer!r:.60} layers not supported")
    return n_layer


# --------------------------------------------------------------------------------------------------
# Rotations


def flat_rope(d: dict) -> tuple[dict, float | None, float | None]:
    """(the rope's dict without rope_theta and partial_rotary_factor, these two or None): all is one
    dict in transformers 5, and apart in those before it."""
    rope = d.get("rope_scaling") or d.get("rope_parameters") or {}
    nested = isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values())
    if not isinstance(rope, dict) or nested:  # nested: another rope for each type of layer
        raise Inexact(f"rope_parameters={rope!r:.60} not supported")
    scaling = dict(rope)
    beside = []
    for key in ("rope_theta", "partial_rotary_factor"):
        beside.append(scaling.pop(key, d.get(key)))
    # `type` is the key's name in old files.
    scaling.setdefault("rope_type", scaling.get("type", "default"))
    return scaling, *beside


def read_scaling(d: dict, scaling: dict | None) -> dict | None:
    """rope_scaling as GPTConfig has it: None where nothing is scaled."""
    kind = scaling["rope_type"]
    if kind == "default":
        return None
    if kind in ("dynamic", "longrope"):
        why = "which changes with the length of the text"
        raise Inexact(f"rope_type {kind!r}, {why}, not supported")
    length = d.get("max_position_embeddings")
    if kind == "yarn" and type(length) is int:  # as transformers does
        scaling.setdefault("original_max_position_embeddings", length)
    return scaling


def read_rope(d: dict, values: dict) -> dict:
    """One rotation for all layers, of whole heads."""
    scaling, theta, fraction = flat_rope(d)
    if fraction not in (None, 1):
        raise Inexact(f"partial_rotary_factor={fraction!r:.60} not supported")
    theta = 10000.0 if theta is None else theta
    scaling = read_scaling(d, scaling)
    return {"rope_scaling": scaling, "rope_theta": theta} | read_ntk(d, values, scaling, theta)


def write_rope(c: GPTConfig) -> dict:
    scaling = c.rope_scaling
    if not scaling or scaling.get("rope_type") != "ntk":
        return {"rope_theta": c.rope_theta, "rope_scaling": scaling}
    # transformers has no such scaling, but it is another base: that, and our own key beside it.
    theta = ntk_theta(c.rope_theta, scaling["factor"], c.head_dim)
    return {
        "rope_theta": theta,
        "rope_scaling": None,
        "ntk": {"rope_theta": c.rope_theta} | scaling,
    }


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """The base that NTK scaling comes to, as barelm/positions.py computes it."""
    return theta * factor ** (head_dim / (head_dim - 2))


def read_ntk(d: dict, values: dict, scaling: dict | None, theta: float) -> dict:
    """{rope_theta, rope_scaling} by our own key, where it says what the base says; else {}."""
    own = d.get("ntk")
    head_dim = values.get("head_dim")
    if not head_dim and type(values.get("n_embd")) is int and type(values.get("n_head")) is int:
        head_dim = values["n_embd"] // max(1, values["n_head"])
    if scaling or not isinstance(own, dict) or type(head_dim) is not int or head_dim <= 2:
        return {}
    own = dict(own)
    base = own.pop("rope_theta", None)
    factor = own.get("factor")
    numbers = all(type(x) in (int, float) and 0 < x < 1e9 for x in (base, factor))
    if not numbers or ntk_theta(base, factor, head_dim) != theta:
        return {}
    return {"rope_theta": base, "rope_scaling": own}


def read_partial_rope(d: dict, values: dict) -> dict:
    """One rotation for all layers, of a part of each head: StableLM's."""
    scaling, theta, fraction = flat_rope(d)
    return {
        "rope_theta": 10000.0 if theta is None else theta,
        "rope_scaling": read_scaling(d, scaling),
        "rope_fraction": 0.25 if fraction is None else fraction,
    }


def write_partial_rope(c: GPTConfig) -> dict:
    return write_rope(c) | {"partial_rotary_factor": c.rope_fraction}


def read_two_ropes(d: dict, values: dict) -> dict:
    """ModernBERT's: an angle for the layers with a window and one for the others, unscaled."""
    given = d.get("rope_parameters") or {}
    if d.get("rope_scaling"):
        refuse(d, "rope_scaling")
    if not isinstance(given, dict):
        refuse(d, "rope_parameters")
    thetas = []
    usual = {FULL: ("global_rope_theta", 160000.0), SLIDING: ("local_rope_theta", 10000.0)}
    for kind, (key, default) in usual.items():
        rope = given.get(kind) or {}
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
            refuse(d, "rope_parameters")
        theta = rope.get("rope_theta", d.get(key, default))
        if kind == SLIDING and theta is None:  # old files: as in the other layers
            theta = thetas[0]
        thetas.append(theta)
    whole, local = thetas
    return {"rope_theta": whole, "local_rope_theta": 0.0 if local == whole else local}


def write_two_ropes(c: GPTConfig) -> dict:
    local = c.local_rope_theta or c.rope_theta
    return {
        "global_rope_theta": c.rope_theta,  # before transformers 5, and after
        "local_rope_theta": local,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": c.rope_theta},
            SLIDING: {"rope_type": "default", "rope_theta": local},
        },
    }


ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
TWO_KEYS = ("global_rope_theta", "local_rope_theta", "rope_parameters")
ROPE_FIELDS = ("rope_theta", "rope_scaling")
ROPE = Part(ROPE_FIELDS, ROPE_KEYS, read_rope, write_rope)
PARTIAL_ROPE = Part(
    (*ROPE_FIELDS, "rope_fraction"), ROPE_KEYS, read_partial_rope, write_partial_rope
)
TWO_ROPES = Part(("rope_theta", "local_rope_theta"), TWO_KEYS, read_two_ropes, write_two_ropes)


# --------------------------------------------------------------------------------------------------
# Values by another name


def named(field: str, key: str, names: dict, absent: object) -> Part:
    """A Part for a field whose values have names in a config.json, {theirs: ours}: of several for
    one of ours the first is written. absent: what counts where the key is not there."""

    def read(d, values):
        name = d.get(key)
        name = absent if name is None else name
        if name not in list(names):  # a list, since a dict refuses to look for some JSON types
            refuse(d, key)
        return {field: names[name]}

    def write(c):
        for theirs, ours in names.items():
            if ours == getattr(c, field):
                return {key: theirs}
        return {}  # which reads as another value

    return Part((field,), (key,), read, write)


# --------------------------------------------------------------------------------------------------
# Experts


def expert_count(absent: int) -> Part:
    """The Part of the number of experts, for which transformers has two keys. absent: what counts
    where neither is there."""
    keys = ("num_experts", "num_local_experts")

    def read(d, values):
        given = [d[key] for key in keys if d.get(key) is not None] or [absent]
        if given.count(given[0]) < len(given) or given[0] == 0:
            raise Inexact(f"num_experts={given[0]!r:.60} not supported")
        return {"n_experts": given[0]}

    def write(c):
        return dict.fromkeys(keys, c.n_experts)

    return Part(("n_experts",), keys, read, write)


def read_expert_layers(d: dict, values: dict) -> dict:
    """Qwen's: every decoder_sparse_step-th layer has experts, but for mlp_only_layers. Our own key
    counts where it says the same in other letters."""
    n_layer = count_layers(values)
    step = d.get("decoder_sparse_step", 1)
    dense = d.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        refuse(d, "decoder_sparse_step")
    if not isinstance(dense, list):
        refuse(d, "mlp_only_layers")
    letters = ""
    for i in range(n_layer):
        letters += "D" if i in dense or (i + 1) % step else "E"
    if "E" not in letters:
        raise Inexact("mlp_only_layers with all layers not supported")
    own = d.get("expert_layers")
    if isinstance(own, str) and own and repeated(own, n_layer) == letters:
        return {"expert_layers": own}
    return {"expert_layers": shortest(letters) if "D" in letters else ""}


def write_expert_layers(c: GPTConfig) -> dict:
    dense = [i for i, has_experts in enumerate(c.has_experts) if not has_experts]
    out = {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if read_expert_layers(out, {"n_layer": c.n_layer})["expert_layers"] != c.expert_layers:
        out["expert_layers"] = c.expert_layers
    return out


EXPERT_LAYERS = Part(
    ("expert_layers",),
    ("decoder_sparse_step", "mlp_only_layers"),
    read_expert_layers,
    write_expert_layers,
)


# --------------------------------------------------------------------------------------------------
# Encoders without a head


def mlm_head(base: str) -> Part:
    """The Part of whether an encoder's files have the head of masked language modelling: those of
    its class `base` alone, as models that embed texts are published, have none."""

    def read(d, values):
        return {"mlm_head": d.get("architectures") != [base]}

    def write(c):
        return {} if c.mlm_head else {"architectures": [base]}

    return Part(("mlm_head",), ("architectures",), read, write)


# --------------------------------------------------------------------------------------------------
# T5 and RoBERTa


def read_t5_lengths(d: dict, values: dict) -> dict:
    """T5's numbers of layers, the decoder's being the encoder's where there is no key, and its
    context, which nothing in the network limits."""
    n = d.get("num_decoder_layers")
    length = d.get("n_positions")
    return {
        "n_layer": d.get("num_layers", 6) if n is None else n,
        "n_ctx": 512 if length is None else length,
    }


def write_t5_lengths(c: GPTConfig) -> dict:
    return {"num_decoder_layers": c.n_layer, "n_positions": c.n_ctx}


def read_t5_head(d: dict, values: dict) -> dict:
    """Whether the head is the embedding's, and whether states are scaled before it: T5 1.0 is and
    does, 1.1 neither. transformers 5 has a key for each, those before it one."""
    tie = d.get("tie_word_embeddings")
    tie = True if tie is None else tie
    scaled = d.get("scale_decoder_outputs", tie)
    width = values.get("n_embd")
    for key, value in (("tie_word_embeddings", tie), ("scale_decoder_outputs", scaled)):
        if type(value) is not bool:
            refuse(d, key)
    if type(width) is not int or width < 1:
        raise Inexact(f"d_model={width!r:.60} not supported")
    return {"tie": tie, "logit_scale": width**-0.5 if scaled else 1.0}


def write_t5_head(c: GPTConfig) -> dict:
    return {"tie_word_embeddings": c.tie, "scale_decoder_outputs": c.logit_scale != 1}


T5_MLPS = {  # feed_forward_proj: (our name, dense_act_fn)
    "relu": ("relu", "relu"),
    "gated-gelu": ("geglu", "gelu_new"),
    "gated-gelu_new": ("geglu", "gelu_new"),
    "gated-silu": ("swiglu", "silu"),
    "gelu": ("gelu_erf", "gelu"),
    "gelu_new": ("gelu", "gelu_new"),
}


def read_t5_mlp(d: dict, values: dict) -> dict:
    """feed_forward_proj, with which two other keys agree where a file has them."""
    name = d.get("feed_forward_proj", "relu")
    if name not in list(T5_MLPS):
        refuse(d, "feed_forward_proj")
    mlp, activation = T5_MLPS[name]
    for key, value in (("dense_act_fn", activation), ("is_gated_act", name.startswith("gated"))):
        if d.get(key, value) != value:
            refuse(d, key, f"with feed_forward_proj={name!r} not supported")
    return {"mlp": mlp}


def write_t5_mlp(c: GPTConfig) -> dict:
    for name, (mlp, _) in T5_MLPS.items():
        if mlp == c.mlp:
            return {"feed_forward_proj": name}
    return {"feed_forward_proj": None}  # which reads as none of them


def read_offset(d: dict, values: dict) -> dict:
    """RoBERTa's positions, which begin behind the number of its padding token."""
    pad = d.get("pad_token_id", 1)
    rows = d.get("max_position_embeddings", 512)
    if type(pad) is not int or pad < 0 or type(rows) is not int or rows < pad + 2:
        why = f"with pad_token_id={pad!r:.60} not supported"
        raise Inexact(f"max_position_embeddings={rows!r:.60} {why}")
    return {"n_ctx": rows - pad - 1, "position_offset": pad + 1}


def write_offset(c: GPTConfig) -> dict:
    return {
        "max_position_embeddings": c.n_ctx + c.position_offset,
        "pad_token_id": c.position_offset - 1,
    }


LENGTH_KEYS = ("num_layers", "num_decoder_layers", "n_positions")
HEAD_KEYS = ("tie_word_embeddings", "scale_decoder_outputs")
OFFSET_KEYS = ("max_position_embeddings", "pad_token_id")
T5_LENGTHS = Part(("n_layer", "n_ctx"), LENGTH_KEYS, read_t5_lengths, write_t5_lengths)
T5_MLP = Part(("mlp",), ("feed_forward_proj", "dense_act_fn"), read_t5_mlp, write_t5_mlp)
T5_HEAD = Part(("tie", "logit_scale"), HEAD_KEYS, read_t5_head, write_t5_head)
OFFSET = Part(("n_ctx", "position_offset"), OFFSET_KEYS, read_offset, write_offset)
