"""LoRA adapters in PEFT's format, read: what adapter_config.json may say, and the products added to
the weights of a network. checkpoint.py finds the base; adapters.py holds what is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from barelm.families import family, table_of
from barelm.files import read_json
from barelm.run import UserError
from barelm.safetensors import check_finite, read_safetensors
from barelm.shapes import LARGEST
from barelm.tensor_names import names_in_file, parted

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from barelm.tensor_names import TensorNames
    from model import GPT

# Of an adapter_config.json: what may be anything, since it changes no product or is checked apart.
NOTES = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "runtime_config",
    "target_modules",
    "task_type",
}
# What else may be there with a value; any other key with one changes the product.
EXACT = {
    "bias": ("none",),
    "revision": ("main",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # the others change the base
}


# --------------------------------------------------------------------------------------------------
# adapter_config.json


def read_adapter_config(path: Path) -> dict:
    """An adapter_config.json as a dict; a UserError where it is no plain LoRA's."""
    d = read_json(path)
    named = d.get("base_model_name_or_path")
    if not named or not isinstance(named, str) or d.get("peft_type") != "LORA":
        raise UserError(f"{path}: no LoRA adapter, or one that does not name its base")
    odd = []
    for key, value in d.items():
        if key not in NOTES and value and value not in EXACT.get(key, ()):
            odd.append(f"{key}={value!r:.60}")
    if odd:
        what = "only plain LoRA is read, not rsLoRA, DoRA, modules_to_save or other kinds"
        raise UserError(f"{path}: {', '.join(odd[:3])}: {what}")
    check_numbers(path, d)
    return d


def check_numbers(path: Path, d: dict) -> None:
    """Refuse ranks and alphas, of all layers or of those that a pattern names, that are no numbers
    or have no product."""
    ranks = read_patterns(path, d, "rank_pattern")
    alphas = read_patterns(path, d, "alpha_pattern")
    for rank in (d.get("r"), *ranks.values()):
        if type(rank) is not int or not 1 <= rank <= LARGEST:  # a bool is no int here
            raise UserError(f"{path}: r={rank!r:.60}: expected a whole number above 0")
    for alpha in (d.get("lora_alpha"), *alphas.values()):
        if type(alpha) not in (int, float) or not abs(alpha) <= LARGEST:  # NaN is not, either
            why = f"expected a number, at most {LARGEST}"
            raise UserError(f"{path}: lora_alpha={alpha!r:.60}: {why}")


def read_patterns(path: Path, d: dict, key: str) -> dict:
    """{regular expression: value} of an adapter_config.json's rank_pattern or alpha_pattern."""
    patterns = {} if d.get(key) is None else d[key]
    if not isinstance(patterns, dict):
        raise UserError(f"{path}: {key}: expected names with a number each")
    for pattern in patterns:
        check_pattern(path, pattern)
    return patterns


def check_pattern(path: Path, pattern: str) -> None:
    """Refuse what is no regular expression, or repeats a group, which may take for ever."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: {pattern!r:.60}: no regular expression: {error}") from None
    if re.search(r"\)[*+{]", pattern):  # (a+)+ tries every way to part a name
        raise UserError(f"{path}: {pattern!r:.60}: a repeated group is not supported")


def of_pattern(patterns: dict, name: str, usual: float) -> float:
    """What patterns, {regular expression: value}, have for a layer's name, or for what follows a
    dot in it; `usual` where none matches. As in PEFT the first that matches counts."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return usual


# --------------------------------------------------------------------------------------------------
# The matrices


@dataclass
class Pair:
    """A layer's two matrices: its weight becomes W + (alpha / rank) B A (Hu et al. 2021, 4.1)."""

    key: str  # A's name in the file
    layer: str  # the layer's name in the base's file
    A: torch.Tensor  # (rank, in)
    B: torch.Tensor  # (out, rank)


def add_lora(net: GPT, folder: Path, base: Path, d: dict) -> None:
    """Add to the weights of a network, that of the folder `base`, the products of the adapter in
    `folder`, in place. d: what read_adapter_config gave."""
    file = folder / "adapter_model.safetensors"
    weights = dict(net.named_parameters())
    table = table_of(family(net.config), net.config)
    names = adapter_names(table, weights)
    for pair in read_pairs(folder, file):
        # Several where the base's file has q, k and v as one: their rows are below each other.
        targets = [weights[name] for name in names.get(f"{pair.layer}.weight", ())]
        check_fit(folder, base, pair, targets)
        delta = scale_of(folder, d, pair) * (pair.B.float() @ pair.A.float())  # (out, in)
        delta = delta.to(targets[0].device)
        parts = parted(delta, len(targets), table) if len(targets) > 1 else [delta]
        for p, part in zip(targets, parts):
            with torch.no_grad():  # p is a leaf that wants gradients
                p += part.to(p.dtype)
            check_finite(file, {pair.key: p}, p.dtype)


def scale_of(folder: Path, d: dict, pair: Pair) -> float:
    """alpha / rank of a layer, by an adapter_config.json's patterns: what its product is times."""
    path = folder / "adapter_config.json"
    rank = of_pattern(d.get("rank_pattern"), pair.layer, d["r"])
    if rank != len(pair.A):
        raise UserError(f"{path}: r={rank!r:.60}, but {pair.key} has {len(pair.A)} rows")
    return of_pattern(d.get("alpha_pattern"), pair.layer, d["lora_alpha"]) / rank


def adapter_names(table: TensorNames, weights: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    """{a weight's name in an adapter: those of ours that it holds}: as the base's file has it, and
    as transformers' AutoModel does, without the prefix."""
    names = names_in_file(weights, table)
    short = {}
    for theirs, ours in names.items():
        short[theirs.removeprefix(table.prefix).removeprefix("model.")] = ours
    return names | short


def read_pairs(folder: Path, file: Path) -> list[Pair]:
    """The [Pair] of an adapter's file, whose matrices are finite."""
    tensors, _ = read_safetensors(file)
    others = {key: key.replace("lora_A", "lora_B") for key in tensors if ".lora_A.weight" in key}
    if tensors.keys() != {*others, *others.values()}:
        why = "only LoRA's two matrices a layer are read, not rsLoRA, DoRA or modules_to_save"
        raise UserError(f"{folder}: {why}")
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise UserError(f"{file}: {name} has whole numbers, no weights")
    check_finite(file, tensors)
    pairs = []
    for key, other in others.items():
        layer = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        pairs.append(Pair(key, layer, tensors[key], tensors[other]))
    return pairs


def check_fit(folder: Path, base: Path, pair: Pair, targets: list[nn.Parameter]) -> None:
    """Refuse a pair whose product has not the shape of the weights that it is for."""
    fits = targets and pair.A.ndim == 2 and targets[0].shape[1] == pair.A.shape[1]
    if not fits or pair.B.shape != (sum(len(p) for p in targets), len(pair.A)):
        why = f"an adapter for another base than {base}: {pair.key} does not fit"
        raise UserError(f"{folder}: {why}")
