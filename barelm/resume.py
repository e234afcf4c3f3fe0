"""The folder of a run: what a new run may replace there, the lock, state.pt, the log, run.json.

What vouches for a folder, its weights, goes first when the folder is taken apart and comes last
when it is put together, so that a kill leaves the old, the new, or what no reader opens: never one
model's tokenizer with the other's weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from barelm import host
from barelm.cluster import launch_id
from barelm.files import parse_json, read_json, sync_folder, whole_file, write_json
from barelm.run import UserError, made_with
from barelm.safetensors import INDEX, read_header, write_safetensors
from barelm.steps import MESH, keep_last, step_folders, whole_steps, why_not_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from barelm.run import Run

WEIGHTS = (
    "*.safetensors.index.json",  # the indexes first: they name the other files
    "*.bin.index.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "model.onnx",
    "model.onnx_data",
)
STATES = ("state.pt", "state.pt.tmp")
# What a folder of weights has beside them.
COMPANIONS = (
    "config.json",
    "modules.json",  # this and the next say how a text is embedded
    "1_Pooling/config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "genai_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",  # this and the next three only other people's folders have
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
PARTS = ("best", "merged")  # a run's folders within its own: models of their own


# --------------------------------------------------------------------------------------------------
# Folders of models


def holds_model(folder: Path | str) -> list[Path]:
    """The files of a folder that a new run would replace, or leave beside itself as if they were
    its own: configs, tokenizers, weights, indexes and states, in best/ and merged/ too, and steps
    in shards/."""
    folder = Path(folder)
    paths = [path / MESH for _, path in step_folders(folder)]
    for place in (folder, *(folder / part for part in PARTS)):
        for pattern in (*WEIGHTS, *STATES, *COMPANIONS):
            paths += sorted(place.glob(pattern))
    return paths


def clear_folder(folder: Path | str) -> None:
    """Take a model's folder apart, its best/ and merged/ with it: what vouches goes first. Files
    that are no part of a model stay."""
    folder = Path(folder)
    keep_last(folder, 0)  # steps, each of which vouches for itself
    for part in PARTS:
        if (folder / part).is_dir():
            clear_folder(folder / part)
    for patterns in (WEIGHTS, STATES, COMPANIONS):
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                path.unlink()
        sync_folder(folder)
    for path in sorted(folder.glob("*.safetensors.tmp")):  # of a run that was killed
        path.unlink()
    if folder.name in PARTS and folder.is_dir():
        with contextlib.suppress(OSError):  # the user's own files are in it
            folder.rmdir()


def move_files(source: Path, folder: Path, last: Iterable[str]) -> None:
    """Move the files of one folder into another of the same disk, that named `last` last."""
    for path in sorted(Path(source).iterdir()):
        if path.name != last:
            host.replace(path, Path(folder) / path.name)
    sync_folder(folder)
    host.replace(Path(source) / last, Path(folder) / last)
    sync_folder(folder)


def make_folder(folder: Path | str, flag: str = "--out_dir") -> None:
    """Make a folder, and the ones above it; a name that cannot be one is a UserError."""
    if not str(folder):
        raise UserError(f"{flag} is empty: expected the name of a folder")
    if host.why_no_name(folder):
        raise UserError(f"{flag}={folder}: {host.why_no_name(folder)}: take another")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{flag}={folder}: File exists, but is no folder: take another") from None
    except OSError as error:
        raise UserError(f"{flag}={folder}: {error.strerror}: take another") from None
    except ValueError as error:  # a zero byte, half a character
        raise UserError(f"{flag}={str(folder)!r}: {error}: take another") from None


# --------------------------------------------------------------------------------------------------
# The lock: one run at a time writes into a folder


@contextlib.contextmanager
def locked_folder(folder: Path | str, patience: float = 3.0) -> Iterator[None]:
    """Make a run's folder and be the only run that writes into it while the context lasts. The lock
    is the system's, on the file .lock: it ends with the process, however that ends. Of several
    processes the first has it. A folder that stays empty is removed again.
    patience: seconds to wait for another run's lock; one that was killed takes a moment to end."""
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    if not str(folder):
        raise UserError("--out_dir is empty: expected the name of a folder")
    folder = Path(folder)
    is_new = not os.path.lexists(folder)
    make_folder(folder)
    if any(folder.glob("train_*.bin")):
        raise UserError(f"--out_dir={folder}: it holds prepared data: take another")
    try:
        lock = open(folder / ".lock", "a")
    except OSError as error:
        why = f"cannot be written to: {error.strerror}: take another"
        raise UserError(f"--out_dir={folder}: {why}") from None
    try:
        take_lock(lock, folder, patience)
        yield
    finally:
        if host.is_windows():  # which removes no open file
            lock.close()
        with contextlib.suppress(OSError):
            if is_new and os.listdir(folder) == [".lock"]:
                os.unlink(folder / ".lock")
                os.rmdir(folder)
        lock.close()  # which gives the lock back


def take_lock(lock: IO, folder: Path, patience: float) -> None:
    """Lock an open file for this process, or say why there is no lock on this system."""
    give_up = time.monotonic() + patience
    try:
        while not host.lock(lock):
            if time.monotonic() > give_up:
                why = "wait for its end, or take another --out_dir"
                raise UserError(f"{folder}: another run is writing into it: {why}")
            time.sleep(0.1)
    except OSError as error:
        say_no_lock(folder, error.strerror)


def say_no_lock(folder: Path, why: str) -> None:
    print(f"{folder}: no lock ({why}): see to it that no other run writes into it", flush=True)


# --------------------------------------------------------------------------------------------------
# Weights, and the state beside them that a run goes on from


def file_sha256(path: Path | str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):  # until nothing is left
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash that names the contents of files: of each its size and 64 pieces of 256 KiB, evenly
    spread, so that a large model takes no longer than a small one."""
    digest = hashlib.sha256()
    piece = 1 << 18
    for path in paths:
        size = os.path.getsize(path)
        digest.update(f"{Path(path).name} {size} ".encode())
        n_pieces = math.ceil(size / piece)
        with open(path, "rb") as file:
            for i in range(min(64, n_pieces)):
                begin = i * piece
                if n_pieces > 64:
                    begin = (size - piece) * i // 63  # the last piece ends with the file
                file.seek(begin)
                digest.update(file.read(piece))
    return digest.hexdigest()


def write_weights(path: Path | str, tensors: dict, step: int, state: dict | None = None) -> None:
    """Write weights and, with `state`, state.pt beside them. state.pt holds the step and the hash
    of the weights, and both are whole on the disk before the weights are renamed and then the
    state: killed at any moment, a process leaves weights and a state, of either name, that fit."""
    path = Path(path)
    with contextlib.ExitStack() as renamed_last:
        if state is not None:
            state_file = renamed_last.enter_context(whole_file(path.with_name("state.pt")))
        with whole_file(path) as file:
            write_safetensors(file, tensors, {"format": "pt", "step": str(step)})
            file.flush()
            if state is not None:
                names = {"weights_file": path.name, "weights_sha256": file_sha256(file.name)}
                write_state(state_file, state | {"step": step} | names)


def write_state(file: IO, state: dict) -> None:
    """torch.save into an open file, whole on the disk when this returns. What is wrong with the
    disk is an OSError, in whose place torch raises an error of its own."""
    try:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, file.name) from None


def read_state(path: Path) -> tuple[Any, str]:
    """The dict that torch.save wrote into a file: (it, "") or (None, why there is none)."""
    if not path.is_file():
        return None, "absent"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
            if archive.testzip() is not None:
                return None, "damaged"
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever zipfile and torch raise at bytes that are no file of theirs
        return None, "damaged, or no file of ours"
    if not isinstance(state, dict) or not isinstance(state.get("weights_sha256"), str):
        return None, "without a hash of its weights"
    return state, ""


def load_state(folder: Path | str) -> dict:
    """The training state that belongs to the weights in a folder. Its entry `temporary` says that
    it still has the temporary name: the save was cut between its two renames."""
    folder = Path(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder}: no checkpoint to resume: start a run without --init_from")
    digest = file_sha256(weights)
    with open(weights, "rb") as file:
        _, metadata = read_header(weights, file)
    step = metadata.get("step")
    reasons = []
    for name in STATES:
        state, why = read_state(folder / name)
        if state and state.get("weights_file") == weights.name:
            same_step = str(state.get("step")) == step
            if same_step and state["weights_sha256"] == digest:
                return state | {"temporary": name.endswith(".tmp")}
            why = f"of step {state.get('step')}"
            if same_step:
                raise UserError(
                    f"{weights}: not as it was saved at step {step}: changed since, or damaged, so "
                    f"that no resume would be exact; start anew in another --out_dir"
                )
        reasons.append(f"{name} is {why or 'of other weights'}")
    raise UserError(
        f"{folder}: no state.pt of the weights' step {step}, so that no resume would be exact "
        f"({', '.join(reasons)}); start from these weights in another --out_dir"
    )


def check_state(state: dict, kinds: dict, path: Path | str) -> None:
    """Refuse a state that lacks an entry or has one of another kind. kinds: {name: a value of the
    kind}; a number is 0 or more where that value is, and NaN only where that is."""
    for name, like in kinds.items():
        value = state.get(name)
        right = type(value) is type(like)
        is_number = isinstance(like, (int, float)) and not math.isnan(like)
        if right and is_number and like >= 0:
            right = 0 <= value < 1 << 60
        elif right and is_number:
            right = not math.isnan(value)
        if not right:
            raise UserError(
                f"{path}: {name} is {value!r:.40}, as no run saves it: damaged, or foreign"
            )


def check_rows(rows: list, like: list, path: Path | str) -> None:
    """Refuse a list from a state whose items are not lists of the same kinds as `like`."""
    kinds = [type(x) for x in like]
    for row in rows:
        if type(row) is not list or [type(x) for x in row] != kinds:
            raise UserError(f"{path}: {row!r:.40} is no row of a run's: damaged, or foreign")


# --------------------------------------------------------------------------------------------------
# The log


def open_log(path: Path, step: int, say: Callable[[str], None]) -> IO:
    """A run's log.jsonl to append rows to (`write_row`), cut to its rows up to `step`: later ones
    belong to steps that will run again. Lines that are no rows are left out."""
    rows, n_bad = [], 0
    data = Path(path).read_bytes() if Path(path).exists() else b""
    for line in data.split(b"\n")[:-1]:  # behind the last end of line is what a kill cut
        try:
            row_step = parse_json(line.decode(), path)["step"]
            if row_step <= step:
                rows.append(line + b"\n")
        except (UserError, ValueError, KeyError, TypeError):
            n_bad += 1
    if n_bad:
        say(f"{path}: {n_bad} lines that are no rows of a log are left out")
    with whole_file(path) as file:
        file.write(b"".join(rows))
    return open(path, "ab", buffering=0)  # no buffer that a full disk would leave half written


def write_row(log: IO, row: dict) -> None:
    """Append a row to a run's log. On a full disk there is nothing of it, and a UserError."""
    line = (json.dumps(row) + "\n").encode()
    end = log.seek(0, os.SEEK_END)
    try:
        while line:
            n_written = log.write(line)
            line = line[n_written:]
    except OSError as error:
        with contextlib.suppress(OSError):
            log.truncate(end)
        raise UserError(
            f"{log.name}: cannot be written: {error.strerror}; the last save is kept"
        ) from None


# --------------------------------------------------------------------------------------------------
# The rules of out_dir: what a run may replace, what it goes on from, what a resume may change

# What a resume may change, and tells; the scripts have some more of their own.
RESUME_MAY_CHANGE = (
    "learning_rate",
    "lr_schedule",
    "warmup_steps",
    "min_lr",
    "decay_fraction",
    "weight_decay",
    "grad_clip",
    "dropout",
    "max_steps",
    "max_tokens",
    "max_epochs",
    "max_minutes",
)
# What shapes no number, or only by what it comes to, which the facts of a part have.
RESUME_IGNORES = (
    "out_dir",
    "init_from",
    "overwrite",
    "device",
    "threads",
    "dtype",
    "checkpoint_blocks",
    "eval_every",
    "save_every",
)


def choose_start(out_dir: str, init_from: str, overwrite: bool, fresh: str = "scratch") -> str:
    """init_from, with auto decided: "resume" where the folder holds weights, else `fresh`. What the
    folder holds is only replaced where that is asked for."""
    out = Path(out_dir)
    files = holds_model(out)
    if init_from == "auto":
        weights = any(path.parent == out and path.match("*model.safetensors") for path in files)
        if weights or whole_steps(out):
            return "resume"
        if is_unfinished(out, files):
            return fresh
    if init_from != "resume" and files and not overwrite:
        ways = "--init_from=resume goes on, --overwrite replaces it, or take another --out_dir"
        raise UserError(f"{out} holds a run or a model ({files[0].relative_to(out)}): {ways}")
    return fresh if init_from == "auto" else init_from


def is_unfinished(out: Path, files: list[Path]) -> bool:
    """Whether a folder is that of a run which was killed before its first save was whole."""
    first_save = [*COMPANIONS, "state.pt.tmp"]  # what such a save leaves: no weights
    saved = [path for path in files if path.parent == out and path.name not in first_save]
    return (out / "run.json").is_file() and not saved and not step_folders(out)


class RunFolder:
    """out_dir: run.json, log.jsonl, and what a resume may change.

    A run has parts: its start begins one, each resume another. run.json and state.pt list them,
    each a dict: the step at which it began, its config (every key's value), its facts (what these
    came to on this machine, such as the dtype; a fact with a key's name stands for it), and the
    command, commit and versions.

    free: keys that a resume may change, and tells. aside: keys that shape nothing. A resume with
    another value of any other key would draw another curve, and is refused. defaults: {key: its
    default}, which a part that was made before the key was, has."""

    def __init__(
        self,
        out_dir: str,
        run: Run,
        config: dict,
        defaults: dict,
        free: Iterable[str],
        aside: Iterable[str],
    ) -> None:
        self.path = Path(out_dir)
        self.run = run
        self.config = config
        self.defaults = defaults
        self.free = free
        self.aside = aside
        self.parts = []
        self.horizon = {}  # what max_epochs comes to with these data, for whoever looks on
        self.log = None
        self.trackers = []  # functions that get each row too, such as TensorBoard's
        self.saver = None  # the StepSaver of a run whose processes each write a part

    def changes(self, state: dict, facts: dict) -> dict[str, str]:
        """What this resume changes in what shapes the run: {key: "key old -> new"}."""
        part = state["parts"][-1]
        before = self.defaults | part["config"] | part["facts"]
        config = {key: value for key, value in self.config.items() if key not in self.aside}
        return changed_settings(before, config | facts)

    def check_resume(self, state: dict, facts: dict) -> dict[str, str]:
        """Refuse a resume that would draw another curve: the changes that are allowed."""
        changed = self.changes(state, facts)
        allowed = (*self.free, *self.aside)
        refused = [key for key in changed if key in self.config and key not in allowed]
        if refused:
            raise UserError(
                f"{self.path}: no resume with another {', '.join(refused)}, which would make it "
                f"another curve ({', '.join(changed[key] for key in refused)}): leave it out, and "
                f"the run's own is taken ({self.path}/run.json), or start anew in another --out_dir"
            )
        return changed

    def begin(self, step: int, facts: dict, state: dict | None = None) -> dict[str, str]:
        """Begin a part of the run at this step, with `state` if it is a resume: what it changes is
        told and returned, the folder made ready, run.json and log.jsonl opened."""
        changed = {}
        if state:
            self.parts = state["parts"]
            changed = self.changes(state, facts)
            say_changes(changed, self.parts, self.run.say)
        part = {"step": step, "config": self.config, "facts": facts} | made_with()
        self.parts = [before for before in self.parts if before["step"] < step] + [part]
        if not self.run.is_main:
            return changed
        if not state:  # what a replaced run has left must never be taken for this one's
            clear_folder(self.path)
            (self.path / "curves.svg").unlink(missing_ok=True)
        elif state["temporary"]:
            host.replace(self.path / "state.pt.tmp", self.path / "state.pt")
        entries = {"config": self.config} | made_with() | {"parts": self.parts}
        entries["host"] = platform.node()  # where settings of a machine may be taken again
        if self.horizon:
            entries["horizon"] = self.horizon
        if launch_id():
            entries["launch"] = launch_id()
        write_json(self.path / "run.json", entries)
        self.log = open_log(self.path / "log.jsonl", step if state else -1, self.run.say)
        return changed

    def record(self, row: dict) -> None:
        """Append a row to log.jsonl."""
        if self.run.is_main:
            write_row(self.log, row)
            for send in self.trackers:
                send(row)


def changed_settings(before: dict, now: dict) -> dict[str, str]:
    """What is no longer as it was, of two dicts of settings: {key: "key old -> new"}."""
    changed = {}
    for key, value in now.items():
        old = one_line(before.get(key))
        new = one_line(value)
        if old != new or key not in before:
            changed[key] = f"{key} {shortened(old)} -> {shortened(new)}"
    return changed


def one_line(value: Any) -> str:
    """A setting in a line."""
    return " ".join(repr(value).split())


def shortened(text: str, longest: int = 60) -> str:
    """A text that may be too long for a line, with what was cut shown as …"""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def say_changes(changed: dict, parts: list[dict], say: Callable[[str], None]) -> None:
    """Tell what a resume changes in a run of these parts, in a line."""
    since = "the first part" if len(parts) == 1 else f"the part from step {parts[-1]['step']}"
    if changed:
        say(f"changed since {since}: {', '.join(changed.values())}")


def check_parts(parts: list, path: Path | str) -> None:
    """Refuse a list of parts, read from a state, that no run has written."""
    right = len(parts) > 0
    for part in parts:
        right = right and isinstance(part, dict) and type(part.get("step")) is int
        right = right and all(isinstance(part.get(key), dict) for key in ("config", "facts"))
    try:
        json.dumps(parts)
    except (TypeError, ValueError, RecursionError):
        right = False
    if not right:
        raise UserError(f"{path}: its parts are not a run's: damaged, or foreign")


def weights_step(folder: Path | str) -> int:
    """The step that the weights in a folder are of, or -1 where none says it."""
    metadata = {}
    for name in ("model.safetensors", "adapter_model.safetensors", INDEX):
        path = Path(folder) / name
        if path.is_file() and name == INDEX:
            metadata = read_json(path).get("metadata") or {}
        elif path.is_file():
            with open(path, "rb") as file:
                _, metadata = read_header(path, file)
        if path.is_file():
            break
    step = str(metadata.get("step"))
    return int(step) if step.isdecimal() else -1


def newest_step(folder: Path | str, say: Callable[[str], None] = print) -> Path | None:
    """The folder of the step that a run goes on from, or None where that is the state.pt in its
    own. A later step that is not whole is told, and passed over."""
    folder = Path(folder)
    plain = -1
    if any((folder / name).is_file() for name in STATES):
        plain = weights_step(folder)
    for step, path in reversed(step_folders(folder)):
        if step < plain:
            return None
        why = why_not_whole(path)
        if not why:
            return path
        say(f"note: no resume from {path}: {why}")
    return None


# --------------------------------------------------------------------------------------------------
# Other logs


def make_trackers(
    out_dir: str, config: dict, tensorboard: bool = False, wandb_project: str | None = None
) -> list[Callable[[dict], None]]:
    """Functions that send a log row to TensorBoard and Weights & Biases, where asked for."""
    trackers: list[Callable[[dict], None]] = []
    try:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            trackers.append(partial(send_to_tensorboard, SummaryWriter(out_dir)))
        if wandb_project:
            import wandb

            wandb_run = wandb.init(project=wandb_project, name=out_dir, config=config)
            trackers.append(lambda row: wandb_run.log(row, step=row["step"]))
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install {error.name}") from None
    return trackers


def send_to_tensorboard(writer: Any, row: dict) -> None:
    for key, value in row.items():
        if key != "step" and value is not None:
            writer.add_scalar(key, value, row["step"])
