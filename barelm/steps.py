"""A run's checkpoints that every process wrote its part of:

    out_dir/shards/step_00000200/    the model's config.json and the tokenizer's files
        mesh.json                    who wrote it, and how large each file is
        state.json                   where the run was
        .metadata, __RANK_0.distcp   torch.distributed.checkpoint's
    out_dir/shards/….tmp             being written, or being removed

A step is whole or not there: all of it is on the disk before the folder has its name, and it loses
the name before anything in it is removed."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from barelm import host
from barelm.files import read_json, sync_folder
from barelm.run import UserError

SHARDS = "shards"
MESH, STATE = "mesh.json", "state.json"


def step_folder(out_dir: Path, step: int) -> Path:
    return Path(out_dir) / SHARDS / f"step_{step:08d}"


def is_step(folder: Path) -> bool:
    """Whether a folder has what was written in parts."""
    return (Path(folder) / ".metadata").is_file()


def step_folders(out_dir: Path) -> list:
    """[(step, its folder)] of what has the name of a whole step, the last step last."""
    folders = []
    for path in (Path(out_dir) / SHARDS).glob("step_*"):
        match = re.fullmatch(r"step_(\d{8,15})", path.name)
        if match and path.is_dir():
            folders.append((int(match[1]), path))
    return sorted(folders)


def why_not_whole(path: Path) -> str:
    """What a step's folder lacks of what was written, or ""."""
    path = Path(path)
    try:
        sizes = read_json(path / MESH).get("files")
    except UserError as error:
        return str(error)
    if not isinstance(sizes, dict):
        return f"{path / MESH}: malformed: no sizes of files"
    for name, size in sizes.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size:,} bytes, not {size:,}"
    return ""


def whole_steps(out_dir: Path) -> list:
    """[(step, its folder)] of the steps that can be gone on from, the last one last."""
    return [(step, path) for step, path in step_folders(out_dir) if not why_not_whole(path)]


def read_step_state(folder: Path) -> dict:
    """The plain values that a step was saved with."""
    return read_json(Path(folder) / STATE)


def sizes_of(folder: Path) -> dict[str, int]:
    """{name: bytes} of a folder's files, but mesh.json, which will hold this."""
    paths = sorted(path for path in Path(folder).iterdir() if path.name != MESH)
    return {path.name: path.stat().st_size for path in paths}


def discard(folder: Path) -> None:
    """Remove a step's folder: first its name, in one moment, then what is in it."""
    folder = Path(folder)
    if folder.suffix != ".tmp" and folder.is_dir():
        doomed = folder.with_name(folder.name + ".old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        host.replace(folder, doomed)
        sync_folder(folder.parent)
        folder = doomed
    shutil.rmtree(folder, ignore_errors=True)


def keep_last(out_dir: Path, keep: int) -> None:
    """Remove all steps of a run but the last `keep` whole ones, and what kills have left."""
    shards = Path(out_dir) / SHARDS
    last_first = [path for _, path in reversed(whole_steps(out_dir))]
    for path in sorted([*shards.glob("step_*"), *shards.glob("*.tmp")]):
        if path not in last_first[:keep]:
            discard(path)
    with contextlib.suppress(OSError):  # something is left in it, or it is not there
        shards.rmdir()
