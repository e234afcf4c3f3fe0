"""Which layers have a window: transformers' keys for it, family by family, to ours and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from barelm.config_keys import (
    FULL,
    SLIDING,
    Inexact,
    Part,
    count_layers,
    refuse,
    repeated,
    shortest,
)

if TYPE_CHECKING:
    from model import GPTConfig


def layer_types(c: GPTConfig) -> list[str]:
    """The kind of each layer of a GPTConfig, in transformers' words."""
    letters = c.layers or "S"
    if not c.window:
        letters = "L"
    return [SLIDING if letters[i % len(letters)] == "S" else FULL for i in range(c.n_layer)]


def shortest_layers(types: list[str]) -> str:
    """GPTConfig's `layers` for the kinds of all layers: the shortest letters that, repeated, give
    them; "" where all have the window."""
    letters = "".join("S" if kind == SLIDING else "L" for kind in types)
    return "" if "L" not in letters else shortest(letters)


def read_layers(d: dict, types: list[str], window: int) -> dict:
    """{window, layers} by the kinds of all layers. Where no layer has the window, there is none.
    Our own key `layers` counts where it says the same in other letters."""
    if SLIDING not in types:
        window = 0
    letters = shortest_layers(types) if window else ""
    own = d.get("layers")
    if isinstance(own, str) and own and not own.strip("SL"):
        if len(types) == 1:  # of all layers
            types = types * len(own)
        letters_of_all = repeated(own, len(types))
        same = [SLIDING if letter == "S" else FULL for letter in letters_of_all]
        if not window or same == list(types):
            letters = own
    return {"window": window, "layers": letters}


def write_letters(c: GPTConfig) -> dict:
    """Our own key for `layers`, where the kinds of all layers do not say its very letters."""
    types = layer_types(c)
    if read_layers({}, types, c.window)["layers"] == c.layers:
        return {}
    return {"layers": c.layers}


def check_window(d: dict, key: str, window: int) -> None:
    if type(window) is not int or window < 1:
        raise Inexact(f"{key}={window!r:.60} not supported")


def check_types(d: dict, n_layer: int) -> list[str]:
    """The kinds of all layers that config.json lists; None where it lists none."""
    types = d.get("layer_types")
    if types is None:
        return None
    good = isinstance(types, list) and len(types) == n_layer
    if not good or any(kind not in (FULL, SLIDING) for kind in types):
        unknown = []
        if isinstance(types, list):
            unknown = [str(kind) for kind in types if kind not in (FULL, SLIDING)]
        what = unknown[0] if unknown else types
        raise Inexact(f"layer_types with {what!r:.60} not supported for {n_layer!r:.60} layers")
    return types


def listed_kinds(d: dict) -> set[str]:
    """The kinds that layer_types names, once each."""
    types = d.get("layer_types")
    if types is None:
        return set()
    if not isinstance(types, list):
        refuse(d, "layer_types")
    return {str(kind) for kind in types}


def read_one_window(d: dict, values: dict) -> dict:
    """Mistral's: sliding_window is every layer's, or none's."""
    window = d.get("sliding_window", 4096)
    kind = FULL
    if window is not None:
        check_window(d, "sliding_window", window)
        kind = SLIDING
    for other in listed_kinds(d) - {kind}:  # which transformers passes over in this family
        why = f"with sliding_window={window!r:.60} not supported: here all layers are alike"
        raise Inexact(f"layer_types of {other!r:.60} {why}")
    return read_layers(d, [kind], window or 0)


def write_one_window(c: GPTConfig) -> dict:
    if not c.window:
        return {"sliding_window": None} | write_letters(c)
    # vLLM reads it for every family.
    return {"sliding_window": c.window, "use_sliding_window": True} | write_letters(c)


def read_listed_window(d: dict, values: dict) -> dict:
    """Ministral's: sliding_window, of the layers that layer_types lists."""
    window = d.get("sliding_window", 4096)
    if window is None:
        for kind in listed_kinds(d) - {FULL}:
            raise Inexact(f"layer_types of {kind!r:.60} not supported without a sliding_window")
        return read_layers(d, [FULL], 0)
    check_window(d, "sliding_window", window)
    types = check_types(d, count_layers(values))
    return read_layers(d, types or [SLIDING], window)


def write_listed_window(c: GPTConfig) -> dict:
    return {
        "sliding_window": c.window or None,
        "layer_types": layer_types(c),
    } | write_letters(c)


def read_used_window(d: dict, values: dict) -> dict:
    """Qwen's: sliding_window counts with use_sliding_window, of the layers that layer_types lists,
    or else of those from max_window_layers on."""
    used = d.get("use_sliding_window") or False
    window = d.get("sliding_window", 4096) if used else None
    if type(used) is not bool:
        refuse(d, "use_sliding_window")
    if window is None:
        for kind in listed_kinds(d) - {FULL}:
            raise Inexact(f"layer_types of {kind!r:.60} not supported without use_sliding_window")
        return read_layers(d, [FULL], 0)
    check_window(d, "sliding_window", window)
    n_layer = count_layers(values)
    types = check_types(d, n_layer)
    if types is None:
        first = d.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            refuse(d, "max_window_layers")
        types = [FULL if i < first else SLIDING for i in range(n_layer)]
    return read_layers(d, types, window)


def write_used_window(c: GPTConfig) -> dict:
    if not c.window:
        return {"use_sliding_window": False} | write_letters(c)
    types = layer_types(c)
    return {
        "use_sliding_window": True,
        "sliding_window": c.window,
        # For transformers before layer_types, as far as it says the same.
        "max_window_layers": types.index(SLIDING) if SLIDING in types else c.n_layer,
        "layer_types": types,
    } | write_letters(c)


def read_both_sides(d: dict, values: dict) -> dict:
    """ModernBERT's: local_attention, half on each side, of the layers that layer_types lists, or
    else of all but every third."""
    n_layer = count_layers(values)
    types = check_types(d, n_layer)
    if types is None:
        every = d.get("global_attn_every_n_layers", 3)
        if type(every) is not int or every < 1:
            refuse(d, "global_attn_every_n_layers")
        types = [SLIDING if i % every else FULL for i in range(n_layer)]
    window = d.get("local_attention", 128)
    check_window(d, "local_attention", window)
    return read_layers(d, types, window)


def write_both_sides(c: GPTConfig) -> dict:
    out = {"local_attention": c.window or 128, "layer_types": layer_types(c)}
    for every in range(1, c.n_layer + 1):  # for transformers before layer_types
        types = [SLIDING if i % every else FULL for i in range(c.n_layer)]
        if types == out["layer_types"]:
            out["global_attn_every_n_layers"] = every
            break
    return out | write_letters(c)


def read_switched_window(d: dict, values: dict) -> dict:
    """Qwen3-MoE's: sliding_window is every layer's, with use_sliding_window."""
    used = d.get("use_sliding_window") or False
    if type(used) is not bool:
        refuse(d, "use_sliding_window")
    window = d.get("sliding_window", 4096) if used else None
    return read_one_window(d | {"sliding_window": window}, values)


WINDOW_KEYS = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")
LOCAL_KEYS = ("local_attention", "layer_types", "global_attn_every_n_layers")
ONE_WINDOW = Part(("window", "layers"), WINDOW_KEYS, read_one_window, write_one_window)
LISTED_WINDOW = Part(("window", "layers"), WINDOW_KEYS, read_listed_window, write_listed_window)
USED_WINDOW = Part(("window", "layers"), WINDOW_KEYS, read_used_window, write_used_window)
SWITCHED_WINDOW = Part(("window", "layers"), WINDOW_KEYS, read_switched_window, write_one_window)
BOTH_SIDES = Part(("window", "layers"), LOCAL_KEYS, read_both_sides, write_both_sides)
