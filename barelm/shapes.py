"""What a GPTConfig may hold: what is no shape of a network is refused in a line."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from barelm.run import UserError

if TYPE_CHECKING:
    from model import GPTConfig

LARGEST = 1 << 28  # of a config's whole numbers, so that torch can count the bytes of a product
SCALING_KEYS = {  # of rope_scaling, by its rope_type
    "linear": ["factor"],
    "ntk": ["factor"],
    "yarn": ["factor", "original_max_position_embeddings"],
    "llama3": [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ],
}
# What else one may have: yarn's choices, and what old files say too.
OTHER_KEYS = ("rope_type", "type", "finetuned", "truncate")
YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
# Hugging Face's words for the two kinds of layers, and our letters.
LAYER_TYPES = {"sliding_attention": "S", "full_attention": "L"}


def check(c: GPTConfig, name: str, good: object, expected: str) -> None:
    if not good:
        raise UserError(f"{name}={getattr(c, name)!r}: expected {expected}")


@lru_cache
def field_types(config_type: Any) -> dict[str, type]:
    """{field: its type} of a dataclass, whose source has them as text."""
    return get_type_hints(config_type)


def check_fields(c: GPTConfig) -> None:
    """Refuse a value that is not of its field's type, or that no field of the type can have."""
    types = field_types(type(c))  # type: ignore[arg-type]
    for f in fields(c):
        value = getattr(c, f.name)
        wanted = types[f.name]
        if wanted is int:
            # 0 means the usual value where 0 is the default. A bool is no int here.
            least = 1 if f.default is MISSING else min(1, f.default)
            good = type(value) is int and least <= value <= LARGEST
            check(c, f.name, good, f"a whole number from {least} to {LARGEST}")
        elif wanted is float:
            # Computed in float32, which ends at 3.4e38. NaN is less than nothing.
            good = type(value) in (int, float) and abs(value) < 3e38
            check(c, f.name, good, "a finite number")
            setattr(c, f.name, float(value))
        elif wanted is bool:
            check(c, f.name, type(value) is bool, "true or false")
        elif get_origin(wanted) is Literal:
            allowed = get_args(wanted)
            check(c, f.name, value in allowed, " or ".join(map(str, allowed)))
    check(c, "n_embd", c.head_dim or c.n_embd % c.n_head == 0, "n_head to divide it")
    if isinstance(c.layers, list):
        letters = [LAYER_TYPES.get(str(word), "?") for word in c.layers]
        good = "?" not in letters and len(letters) == c.n_layer
        check(c, "layers", good, f"a word a layer, of {', '.join(LAYER_TYPES)}")
        c.layers = "".join(letters)
    check_letters(c, "layers", "SL")
    check_letters(c, "expert_layers", "DE")


def check_letters(c: GPTConfig, name: str, letters: str) -> None:
    value = getattr(c, name)
    good = isinstance(value, str) and set(value) <= set(letters)
    check(c, name, good, f"a letter a layer, {' or '.join(letters)}, which repeat")


def check_shape(c: GPTConfig) -> None:
    """Refuse values that do not go together, of a config whose zeros are filled in."""
    check(c, "n_hidden", c.n_hidden <= LARGEST, f"at most {LARGEST}")
    check(c, "n_head", c.n_head * c.head_dim <= LARGEST, "a width that a machine holds")
    check(c, "n_kv_head", c.n_head % c.n_kv_head == 0, "to divide n_head")
    check(c, "head_dim", c.pos != "rope" or c.head_dim % 2 == 0, "an even number")
    # Of a row of zeros, as a padding token's may be, 0 would make NaN.
    check(c, "norm_eps", 1e-30 <= c.norm_eps < 1, "a number above 0 and less than 1")
    check(c, "rope_theta", c.rope_theta >= 1, "1 or more")
    check(c, "dropout", 0 <= c.dropout < 1, "0 or more and less than 1")
    check_positions(c)
    check_patterns(c)
    check_kind(c)
    check_experts(c)
    if c.rope_scaling is not None:
        check_scaling(c, c.rope_scaling)


def check_positions(c: GPTConfig) -> None:
    turned = c.head_dim * c.rope_fraction
    good = 0 < c.rope_fraction <= 1 and (c.pos != "rope" or round(turned) % 2 == 0)
    good = good and round(turned) >= 2 and abs(turned - round(turned)) < 1e-6
    if c.pos == "rope":
        check(c, "rope_fraction", good, "above 0 and at most 1, and an even part of head_dim")
    else:
        check(c, "rope_fraction", c.rope_fraction == 1, f"1 with pos={c.pos}")
    local = c.local_rope_theta
    check(c, "local_rope_theta", local == 0 or local >= 1, "0, or 1 or more")
    check(c, "local_rope_theta", local == 0 or c.window, "0 without a window")
    if c.pos == "relative":
        # Each half, of an encoder each quarter, of the buckets has one at least.
        check(c, "n_buckets", c.n_buckets >= 4 and c.n_buckets % 4 == 0, "a multiple of 4")
        check(c, "max_distance", c.max_distance > c.n_buckets // 2, "more than half of n_buckets")
    check(c, "position_offset", c.position_offset == 0 or c.pos == "learned", "0 but for learned")


def check_patterns(c: GPTConfig) -> None:
    for name in ("softcap", "logit_softcap"):
        check(c, name, getattr(c, name) >= 0, "0 or more")
    check(c, "logit_scale", c.logit_scale > 0, "more than 0")
    check(c, "layers", c.window or "S" not in c.layers, "L alone, or a window (--window=1024)")
    check(c, "attention", c.window or c.attention == "sliding", "a window with it (--window=128)")
    check(c, "sink_tokens", c.window or c.sink_tokens == 0, "0 without a window")
    check(c, "window", "S" in c.layers or not c.layers or not c.window, "0, as no layer is S")
    check(c, "qk_norm_all", c.qk_norm or not c.qk_norm_all, "false without qk_norm")


def check_kind(c: GPTConfig) -> None:
    """What an encoder, or an encoder beside a decoder, cannot be."""
    if c.n_encoder_layer:
        check(c, "causal", c.causal, "true: an encoder-decoder's decoder is causal")
        check(c, "mlm_head", not c.mlm_head, "false with an encoder-decoder")
    for name in ("n_types", "mlm_head"):
        value = getattr(c, name)
        check(c, name, not value or not c.causal, f"{type(value)()} but for encoders")
    if c.mtp:
        check(c, "mtp", c.causal and not c.n_encoder_layer, "0 but for a decoder alone")
        check(c, "mtp", c.norm_place != "post", "0 with norm_place=post")
    check(c, "mtp_weight", c.mtp_weight >= 0, "0 or more")


def check_experts(c: GPTConfig) -> None:
    n = c.n_experts
    check(c, "n_experts", n != 1, "0, or 2 or more")
    for name in ("balance_weight", "z_weight"):
        check(c, name, getattr(c, name) >= 0, "0 or more")
    if n:
        good = 1 <= c.n_experts_per_token <= n
        check(c, "n_experts_per_token", good, f"1 to n_experts={n}")
        check(c, "n_experts", "E" in c.expert_layers or not c.expert_layers, "a layer E with it")
        check(c, "expert_hidden", c.expert_hidden <= LARGEST, f"at most {LARGEST}")
        check(c, "bias", not c.bias, "false with n_experts: they have no biases")
    else:
        check(c, "n_shared_experts", c.n_shared_experts == 0, "0 without n_experts")
        check(c, "expert_hidden", c.expert_hidden == 0, "0 without n_experts")
        check(c, "expert_layers", c.expert_layers == "", "none without n_experts")


def check_scaling(c: GPTConfig, scaling: Any) -> None:
    """Refuse a rope_scaling of unknown type, or with numbers that scale to nothing."""
    expected = f"a dict with rope_type and the keys of {SCALING_KEYS}"
    good = isinstance(scaling, dict) and scaling.get("rope_type") in list(SCALING_KEYS)
    if not good:
        raise UserError(f"rope_scaling={scaling!r}: expected {expected}")
    for key in SCALING_KEYS[scaling["rope_type"]]:
        value = scaling.get(key)
        good = type(value) in (int, float) and 0 < value <= LARGEST
        check(c, "rope_scaling", good, f"{expected}, {key} a number above 0")
    accepted = {*OTHER_KEYS, *YARN_NUMBERS}.union(*SCALING_KEYS.values())
    unknown = [key for key in scaling if key not in accepted]
    check(c, "rope_scaling", not unknown, f"no key but {', '.join(sorted(accepted))}")
    if scaling["rope_type"] == "llama3":
        ordered = scaling["low_freq_factor"] < scaling["high_freq_factor"]
        check(c, "rope_scaling", ordered, "high_freq_factor above low_freq_factor")
    if scaling["rope_type"] == "ntk":
        check(c, "rope_scaling", round(c.head_dim * c.rope_fraction) > 2, "wider heads for ntk")
    if scaling["rope_type"] == "yarn":
        check_yarn(c, scaling)


def check_yarn(c: GPTConfig, scaling: dict) -> None:
    check(c, "rope_theta", c.rope_theta > 1, "more than 1 with yarn")
    for key in YARN_NUMBERS:
        value = scaling.get(key)
        good = value is None or type(value) in (int, float) and 0 < value < math.inf
        check(c, "rope_scaling", good, f"{key} a number above 0, or absent")
    good = type(scaling.get("truncate", True)) is bool
    check(c, "rope_scaling", good, "truncate true or false")
