"""The folder of a run: whose it is, what it goes on from, its log and its settings."""

import contextlib
import hashlib
import json
import os
import time
import zipfile
from pathlib import Path

import torch

from barelm.files import parse_json, sync_folder, whole_file
from barelm.run import UserError
from barelm.safetensors import read_header, write_safetensors

# What a folder of weights has beside them. The last four only other people's folders have.
COMPANIONS = ["config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"]
COMPANIONS += ["generation_config.json", "special_tokens_map.json", "chat_template.jinja"]
COMPANIONS += ["added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"]
WEIGHTS = ["*.safetensors.index.json", "*.bin.index.json"]  # these name the other files
WEIGHTS += ["*.safetensors", "pytorch_model*.bin", "adapter_model.bin"]
STATES = ["state.pt", "state.pt.tmp"]
PARTS = ["best", "merged"]  # a run's folders within its own: models of their own


def holds_model(folder):
    """The files of a folder that a new run would replace, or leave beside itself as if they were
    its own: configs, tokenizers, weights, indexes and states, in best/ and merged/ too."""
    found = []
    for place in (Path(folder), *(Path(folder) / part for part in PARTS)):
        for pattern in [*WEIGHTS, *STATES, *COMPANIONS]:
            found += sorted(place.glob(pattern))
    return found


def clear_folder(folder):
    """Take a model's folder apart, its best/ and merged/ with it: what vouches goes first. Files
    that are no part of a model stay."""
    folder = Path(folder)
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


def move_files(source, folder, last):
    """Move the files of one folder into another of the same disk, that named `last` last."""
    for path in sorted(Path(source).iterdir()):
        if path.name != last:
            os.replace(path, Path(folder) / path.name)
    sync_folder(folder)
    os.replace(Path(source) / last, Path(folder) / last)
    sync_folder(folder)


def make_folder(folder, flag="--out_dir"):
    """Make a folder, and the ones above it; a name that cannot be one is a UserError."""
    if not str(folder):
        raise UserError(f"{flag} is empty: expected the name of a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{flag}={folder}: File exists, but is no folder: take another") from None
    except OSError as error:
        raise UserError(f"{flag}={folder}: {error.strerror}: take another") from None
    except ValueError as error:  # a zero byte, half a character
        raise UserError(f"{flag}={str(folder)!r}: {error}: take another") from None


@contextlib.contextmanager
def locked_folder(folder, patience=3.0):
    """Make a run's folder and be the only run that writes into it while the context lasts. The lock
    is the system's, on the file .lock: it ends with the process, however that ends. Of several
    processes the first has it. A folder that stays empty is removed again.
    patience: seconds to wait for another run's lock; one that was killed takes a moment to end."""
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    if not str(folder):
        raise UserError("--out_dir is empty: expected the name of a folder")
    folder, new = Path(folder), not os.path.lexists(folder)
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
        with contextlib.suppress(OSError):
            if new and os.listdir(folder) == [".lock"]:
                os.unlink(folder / ".lock")
                os.rmdir(folder)
        lock.close()  # which gives the lock back


def take_lock(lock, folder, patience):
    """Lock an open file for this process, or say why there is no lock on this system."""
    try:
        import fcntl  # not on every system
    except ImportError:
        return say_no_lock(folder, "this system has none")
    give_up = time.monotonic() + patience
    while True:
        try:  # lockf, unlike flock, is not passed on to a process that this one leaves behind
            return fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() > give_up:
                why = "wait for its end, or take another --out_dir"
                raise UserError(f"{folder}: another run is writing into it: {why}") from None
            time.sleep(0.1)
        except OSError as error:
            return say_no_lock(folder, error.strerror)


def say_no_lock(folder, why):
    print(f"{folder}: no lock ({why}): see to it that no other run writes into it", flush=True)


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(paths):
    """A hash that names the contents of files: of each its size and 64 pieces of 256 KiB, evenly
    spread, so that a large model takes no longer than a small one."""
    digest, piece = hashlib.sha256(), 1 << 18
    for path in paths:
        size = os.path.getsize(path)
        digest.update(f"{Path(path).name} {size} ".encode())
        with open(path, "rb") as file:
            for i in range(min(64, -(-size // piece))):
                file.seek(max(0, size - piece) * i // 63 if size > 64 * piece else i * piece)
                digest.update(file.read(piece))
    return digest.hexdigest()


def write_weights(path, tensors, step, state=None):
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


def write_state(file, state):
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


def read_state(path):
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


def load_state(folder):
    """The training state that belongs to the weights in a folder. Its entry `temporary` says that
    it still has the temporary name: the save was cut between its two renames."""
    folder, reasons = Path(folder), []
    files = [folder / name for name in ("model.safetensors", "adapter_model.safetensors")]
    files = [path for path in files if path.is_file()]
    if not files:
        raise UserError(f"{folder}: no checkpoint to resume: start a run without --init_from")
    weights = files[0]
    digest = file_sha256(weights)
    with open(weights, "rb") as file:
        step = read_header(weights, file)[1].get("step")
    for name in STATES:
        state, why = read_state(folder / name)
        if state and state.get("weights_file") == weights.name:
            if state["weights_sha256"] == digest and str(state.get("step")) == step:
                return state | {"temporary": name.endswith(".tmp")}
            why = f"of step {state.get('step')}"
            if str(state.get("step")) == step:
                raise UserError(
                    f"{weights}: not as it was saved at step {step}: changed since, or damaged, so "
                    f"that no resume would be exact; start anew in another --out_dir"
                )
        reasons.append(f"{name} is {why or 'of other weights'}")
    raise UserError(
        f"{folder}: no state.pt of the weights' step {step}, so that no resume would be exact "
        f"({', '.join(reasons)}); start from these weights in another --out_dir"
    )


def check_state(state, kinds, path):
    """Refuse a state that lacks an entry or has one of another kind. kinds: {name: a value of the
    kind}; a number is 0 or more where that value is, and NaN only where that is."""
    for name, like in kinds.items():
        value = state.get(name)
        right = type(value) is type(like)
        if right and isinstance(like, (int, float)) and like == like:  # of NaN any float will do
            right = 0 <= value < 1 << 60 if like >= 0 else value == value
        if not right:
            shown = repr(value)[:40]
            raise UserError(f"{path}: {name} is {shown}, as no run saves it: damaged, or foreign")


def check_rows(rows, like, path):
    """Refuse a list from a state whose items are not lists of the same kinds as `like`."""
    for row in rows:
        if type(row) is not list or [type(x) for x in row] != [type(x) for x in like]:
            raise UserError(f"{path}: {row!r:.40} is no row of a run's: damaged, or foreign")


def restore_optimizers(optimizers, saved, path):
    """Put saved state_dicts into optimizers, whose settings stay this run's: its learning rate may
    be another. What does not fit the parameters is a UserError."""
    entries = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum"}}
    wrong = UserError(f"{path}: its optimizers are not this run's: damaged, or foreign")
    if not isinstance(saved, list) or len(saved) != len(optimizers):
        raise wrong
    for optimizer, before in zip(optimizers, saved):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = before.get("state") if isinstance(before, dict) else None
        if not isinstance(state, dict):
            raise wrong
        for number, entry in state.items():
            if type(number) is not int or not 0 <= number < len(params):
                raise wrong
            p, names = params[number], entries[type(optimizer).__name__]
            if not isinstance(entry, dict) or set(entry) != names:
                raise wrong
            for name, value in entry.items():
                if not same_kind(value, torch.zeros(()) if name == "step" else p):
                    raise wrong
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def same_kind(value, like):
    """Whether a value is a plain tensor of the shape and dtype of the tensor `like`."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return value.shape == like.shape and value.dtype == like.dtype


def open_log(path, step, say):
    """A run's log.jsonl to append rows to (`write_row`), cut to its rows up to `step`: later ones
    belong to steps that will run again. Lines that are no rows are left out."""
    rows, bad = [], 0
    data = Path(path).read_bytes() if Path(path).exists() else b""
    for line in data.split(b"\n")[:-1]:  # behind the last end of line is what a kill cut
        try:
            row_step = parse_json(line.decode(), path)["step"]
            if row_step <= step:
                rows.append(line + b"\n")
        except (UserError, ValueError, KeyError, TypeError):
            bad += 1
    if bad:
        say(f"{path}: {bad} lines that are no rows of a log are left out")
    with whole_file(path) as file:
        file.write(b"".join(rows))
    return open(path, "ab", buffering=0)  # no buffer that a full disk would leave half written


def write_row(log, row):
    """Append a row to a run's log. On a full disk there is nothing of it, and a UserError."""
    line, end = (json.dumps(row) + "\n").encode(), log.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[log.write(line) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            log.truncate(end)
        why = f"cannot be written: {error.strerror}; the last save is kept"
        raise UserError(f"{log.name}: {why}") from None


# A run has parts: its start begins one, each resume another. run.json and state.pt list them, each
# a dict: the step at which it began, its config (every key's value), its facts (what that came to
# on the machine, such as the dtype), its command and versions.
def changed_settings(part, config, facts):
    """What is no longer as it was in that part of a run: {key: "key old -> new"}."""
    changed, before = {}, part["config"] | part["facts"]
    for key, value in (config | facts).items():
        old, new = (" ".join(repr(x).split())[:40] for x in (before.get(key), value))
        if old != new or key not in before:
            changed[key] = f"{key} {old} -> {new}"
    return changed


def refuse_changes(changed, fixed, out, but=""):
    """Refuse to resume a run where one of the `fixed` settings has changed."""
    names = [key for key in fixed if key in changed]
    if names:
        raise UserError(
            f"{out}: no resume with another {', '.join(names)}, which would make it another curve "
            f"({', '.join(changed[key] for key in names)}): use the run's own settings "
            f"({out}/run.json has them){but}, or start anew in another --out_dir"
        )


def say_changes(changed, parts, say):
    """Tell what a resume changes in a run of these parts, in a line."""
    since = "the first part" if len(parts) == 1 else f"the part from step {parts[-1]['step']}"
    if changed:
        say(f"changed since {since}: {', '.join(changed.values())}")


def check_parts(parts, path):
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


def weights_step(folder):
    """The step that the weights in a folder are of, or -1 where none says it."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        path = Path(folder) / name
        if path.is_file():
            with open(path, "rb") as file:
                step = str(read_header(path, file)[1].get("step"))
            return int(step) if step.isdecimal() else -1
    return -1
