"""The tensors in a folder's safetensors files: which there are, whether they are the network's, and
under which of our names. What is computed with them is checkpoint.py's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from barelm.families import FAMILIES
from barelm.files import read_json
from barelm.packed import matrices, unpack_complete, unpacked_entries
from barelm.quantized import QuantizedLinear
from barelm.run import UserError
from barelm.safetensors import INDEX, check_finite, entries_of, read_safetensors
from barelm.steps import is_step
from barelm.tensor_names import TensorNames, layer_numbers, tensors_in_file, todays_names

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from barelm.packed import Packing
    from model import GPT, GPTConfig


def weights_of(folder: Path) -> list[Path]:
    """The paths of the files that hold a folder's tensors: one, or those that an index names."""
    whole = folder / "model.safetensors"
    index = folder / INDEX
    if whole.is_file():
        return [whole]
    if not index.is_file():
        why = "no model.safetensors here, nor its index (a pytorch_model.bin is a pickle, "
        raise UserError(f"{folder}: {why}which may run code: convert it where you trust it)")
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else [""]
    if not all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names):  # no ../ either
        raise UserError(f"{index}: malformed: expected names of safetensors files")
    return [folder / name for name in names]


def read_entries(
    folder: Path, table: TensorNames, packing: Packing | None = None
) -> dict[str, tuple[torch.dtype, list[int]]]:
    """{name: (dtype, shape)} of the tensors in a folder's files, of which each holds others, but
    for those that are not read; packed ones as what they are unpacked to."""
    if is_step(folder):
        return step_entries(folder)
    entries = {}
    for path in weights_of(folder):
        for name, entry in todays_names(entries_of(path), table).items():
            if name in entries:
                raise UserError(f"{path}: {name} is in another file of the folder too")
            if not name.endswith(table.unread):
                entries[name] = entry
    if packing is not None:
        entries = unpacked_entries(entries, packing, folder)
    return without_copies(entries, table)


def step_entries(folder: Path) -> dict[str, tuple]:
    """{name: (dtype, shape)} of the weights in a step of a run that was written in parts."""
    from barelm.sharded import StepReader  # which a second of imports stands before

    shapes = StepReader(folder).shapes
    return {key.removeprefix("model."): shape for key, shape in shapes.items() if is_weight(key)}


def is_weight(key: str) -> bool:
    """Whether a key in a step is of the network, and not of its optimizers."""
    return key.startswith("model.")


def read_step(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """{name: tensor} of the weights in such a step."""
    from barelm.sharded import StepReader

    reader = StepReader(folder)
    tensors = {}
    for key, (kind, shape) in reader.shapes.items():
        if is_weight(key):
            tensors[key] = torch.empty(shape, dtype=kind)
    reader.fill(tensors)
    tensors = {key.removeprefix("model."): t for key, t in tensors.items()}
    check_finite(folder, tensors, dtype)
    return tensors


def without_copies(tensors: dict, table: TensorNames) -> dict:
    """{name: value} without the second copies that some files have of a tensor."""
    for copy, name in table.copies:
        short = name.removeprefix(table.prefix)
        if name in tensors or short in tensors:
            tensors.pop(copy, None)
            tensors.pop(copy.removeprefix(table.prefix), None)
    return tensors


def check_layers(folder: Path, entries: dict, config: GPTConfig, table: TensorNames) -> None:
    """Refuse files whose names are those of another number of layers than config.json's."""
    # By the names of every family: of files of another one, too, there is a number to tell.
    tables = [table]
    for entry in FAMILIES.values():
        if isinstance(entry.tensors, TensorNames):
            tables.append(entry.tensors)
    n_found = len(layer_numbers(entries, tables))
    if n_found != config.n_layer:
        why = f"{config.n_layer} layers in config.json, {n_found} in its weights"
        raise UserError(f"{folder}: {why}")
    n_found = len(layer_numbers(entries, [table], "model.encoder.layers."))
    if config.n_encoder_layer and n_found != config.n_encoder_layer:
        why = f"{config.n_encoder_layer} layers in config.json, {n_found} in its weights"
        raise UserError(f"{folder}: an encoder of {why}")


def check_entries(folder: Path, entries: dict, net: GPT, table: TensorNames) -> None:
    """Refuse files whose tensors, {name: (dtype, shape)}, are not the network's."""
    prefix = table.prefix
    want = tensors_in_file(saved_tensors(net), table)
    want = {name.removeprefix(prefix): t for name, t in want.items()}
    given = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    if len(given) < len(entries):
        raise UserError(f"{folder}: tensors with and without the prefix {prefix}")
    # Of a tied head, or beside a classifier's.
    spare = {name: t for name, t in net.state_dict().items() if is_of_lm_head(name)}
    spare = tensors_in_file(spare, table)
    bad = []
    for name, t in (spare | want).items():
        if name in want or name in given:
            dtype, shape = given.get(name, (torch.bool, []))  # missing: unlike any tensor of ours
            # Any float becomes load's dtype; codes must be what they are.
            both_float = dtype.is_floating_point and t.is_floating_point()
            if shape != list(t.shape) or not (both_float or dtype == t.dtype):
                bad.append(name)
    for name in given:
        if name not in want and name not in spare:
            bad.append(name)
    if bad:
        raise UserError(f"{folder}: tensors that config.json does not fit: {', '.join(bad[:3])}")


def read_weights(
    folder: Path, table: TensorNames, dtype: torch.dtype, packing: Packing | None = None
) -> dict[str, Tensor]:
    """{name: tensor} of a folder's files, but for those that are not read; packed ones unpacked, in
    dtype. What is not finite as dtype is a UserError."""
    if is_step(folder):
        return read_step(folder, dtype)
    tensors = {}
    layers = {} if packing is None else packed_layers(folder, table, packing)
    for path in weights_of(folder):
        part, _ = read_safetensors(path)
        part = todays_names(part, table)
        part = {name: t for name, t in part.items() if not name.endswith(table.unread)}
        check_finite(path, part, dtype)
        tensors |= part
        if packing is not None:
            del part  # which would keep what is unpacked
            unpack_complete(tensors, layers, packing, folder, dtype)
    for copy, name in table.copies:
        check_copy(folder, tensors, copy, name, table.prefix)
    return without_copies(tensors, table)  # in the files' own dtypes


def packed_layers(folder: Path, table: TensorNames, packing: Packing) -> dict[str, dict[str, str]]:
    """The `matrices` of a folder's files, by their heads alone."""
    names: dict = {}
    for path in weights_of(folder):
        names |= todays_names(entries_of(path), table)
    return matrices(names, packing)


def check_copy(folder: Path, tensors: dict, copy: Tensor, name: str, prefix: str) -> None:
    """Refuse a second copy of a tensor that is another."""
    first = tensors.get(name, tensors.get(name.removeprefix(prefix)))
    second = tensors.get(copy, tensors.get(copy.removeprefix(prefix)))
    if first is None or second is None:
        return
    if first.dtype != second.dtype or not first.equal(second):
        raise UserError(f"{folder}: {copy} is not the {name} that it should be a copy of")


def complete_head(folder: Path, tensors: dict[str, Tensor], net: GPT) -> None:
    """Add the head to {name: tensor} where the file has none: a tied one's is the embedding."""
    table = tensors.get("model.embed_tokens.weight")  # (V, C)
    if net.config.tie and table is not None:
        head = tensors.get("lm_head.weight", table)
        if head.dtype != table.dtype or not head.equal(table):
            raise UserError(f"{folder}: lm_head.weight is not the embedding that it is tied to")
        tensors["lm_head.weight"] = table
    if net.score is not None:  # a classifier's file: nothing reads it
        for name, empty in net.state_dict().items():
            if is_of_lm_head(name) and name not in tensors:
                tensors[name] = torch.zeros(empty.shape)


def names_here(net: GPT) -> dict[str, Tensor]:
    """{name: tensor} of what a network's file may hold: with another head in its place the language
    model's has no name."""
    tensors = net.state_dict()
    if net.score is None:
        return tensors
    return {name: t for name, t in tensors.items() if not is_of_lm_head(name)}


def is_of_lm_head(name: str) -> bool:
    """Whether a tensor is the language model's head's alone."""
    return name.startswith(("lm_head.", "head_dense.", "head_norm."))


def saved_tensors(net: GPT) -> dict[str, Tensor]:
    """The tensors that a network's file holds, by our names: of tied ones, the one that is read."""
    tensors = net.state_dict()
    if has_coded_table(net):
        tensors.pop("model.embed_tokens.weight")
    elif net.score is not None:  # a classifier's language model's head is read by nothing
        tensors = {name: t for name, t in tensors.items() if not is_of_lm_head(name)}
    elif net.config.tie:
        tensors.pop("lm_head.weight")
    return tensors


def has_coded_table(net: GPT) -> bool:
    """Whether the embedding is tied to a head of int8 codes, and so is in no file."""
    return net.config.tie and isinstance(net.lm_head, QuantizedLinear)
