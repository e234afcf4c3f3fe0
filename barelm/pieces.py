"""A Hugging Face folder made of a run's step, of which nobody holds more than a tensor at a time.

Weights beyond 5 GB come in several files with an index. The names of these have the step in them,
so that the files of two steps never mix: the index, which is renamed last, names those of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from barelm.checkpoint import empty_of_step
from barelm.families import table_of, task_of
from barelm.files import read_json, sync_folder, whole_file, write_json
from barelm.resume import COMPANIONS, make_folder
from barelm.safetensors import INDEX, write_header, write_tensor
from barelm.sharded import StepReader
from barelm.tensor_names import names_in_file, tensors_in_file
from barelm.weights import saved_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from barelm.tensor_names import TensorNames


PIECE = 5 * 10**9  # bytes of a file, as transformers has long cut them
WHOLE = "model.safetensors"


@dataclass
class Group:
    """Tensors of ours that make tensors of the model's files: one and one, but for GPT-2's q, k and
    v, which make one there, and a stack of experts, which makes many."""

    names: list[str]  # ours
    entries: dict[str, torch.Tensor]  # theirs, on meta

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.entries.values())


def write_model(step_folder: Path, folder: Path, step: int) -> None:
    """Write the model of a step's folder into another one, or over the model of an earlier step
    there. Killed at any moment, it leaves the one or the other."""
    step_folder, folder = Path(step_folder), Path(folder)
    make_folder(folder)
    for name in COMPANIONS:
        if (step_folder / name).is_file():
            copy_file(step_folder / name, folder / name)
    reader = StepReader(step_folder)
    table, groups = groups_of(step_folder)
    pieces = cut(groups, PIECE)
    if len(pieces) == 1:
        write_piece(folder / WHOLE, pieces[0], table, reader, step)
        remove_pieces(folder, but=())
        return
    files = {}  # {name of a tensor: its file}
    for i, part in enumerate(pieces):
        name = f"model-step{step}-{i + 1:05d}-of-{len(pieces):05d}.safetensors"
        write_piece(folder / name, part, table, reader, step)
        for group in part:
            files |= dict.fromkeys(group.entries, name)
    about = {"total_size": sum(group.n_bytes for group in groups), "step": str(step)}
    write_json(folder / INDEX, {"metadata": about, "weight_map": files})
    # A file of all weights counts before an index: as long as it is here, it is the model.
    (folder / WHOLE).unlink(missing_ok=True)
    sync_folder(folder)
    remove_pieces(folder, but=set(files.values()))


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file that is not there as it is."""
    data = source.read_bytes()
    if not target.is_file() or target.read_bytes() != data:
        with whole_file(target) as file:
            file.write(data)


def groups_of(step_folder: Path) -> tuple:
    """(the TensorNames of a model's files, its Groups in the order of the network)."""
    settings = read_json(step_folder / "config.json")
    net = empty_of_step(step_folder)
    table = table_of(settings["model_type"], net.config, task_of(settings))
    tensors = saved_tensors(net)
    groups = []
    for names in names_in_file(tensors, table).values():
        entries = tensors_in_file({name: tensors[name] for name in names}, table)
        groups.append(Group(names, entries))
    return table, groups


def cut(groups: list[Group], piece: float) -> list[list[Group]]:
    """The groups in lists of at most `piece` bytes; a larger group is a list of its own."""
    pieces = [[]]
    n_bytes = 0
    for group in groups:
        if pieces[-1] and n_bytes + group.n_bytes > piece:
            pieces.append([])
            n_bytes = 0
        pieces[-1].append(group)
        n_bytes += group.n_bytes
    return pieces


def write_piece(
    path: Path, groups: list[Group], table: TensorNames, reader: StepReader, step: int
) -> None:
    """Write a safetensors file of these groups."""
    entries = {}
    for group in groups:
        entries |= group.entries
    with whole_file(path) as file:
        write_header(file, entries, {"format": "pt", "step": str(step)})
        for group in groups:
            ours = {name: reader.read(f"model.{name}") for name in group.names}
            for t in tensors_in_file(ours, table).values():
                write_tensor(file, t)


def remove_pieces(folder: Path, but: Iterable) -> None:
    """Remove the files of other steps, and their index where none is named in it."""
    if not but:
        (folder / INDEX).unlink(missing_ok=True)
        sync_folder(folder)
    for path in folder.glob("model-step*-of-*.safetensors*"):  # .tmp: of a run that was killed
        if path.name not in but:
            path.unlink()
