"""The settings of a run that goes on: those of its run.json stand in the place of the defaults, so
that `train.py --init_from=resume --out_dir=out/x` needs no flag again. Recipes and flags come
behind them; what may not change is refused later, by RunFolder.

config.configure asks for them before torch is imported: nothing here needs it.
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

STARTS = ("out_dir", "init_from", "overwrite")  # how a run began, which is not how it goes on
# What a machine has. Taken where the run goes on where it was. (dtype shapes numbers: it is taken
# everywhere, and told.)
OF_THE_MACHINE = ("device", "threads", "compile")
OF_THE_PROCESSES = ("tp", "pp", "cp", "replicas")  # taken where there are as many as before
SCRIPTS = ("train.py", "finetune.py", "rl.py")  # whose runs are each another's to resume


def goes_on(out_dir: str, init_from: str) -> bool:
    """Whether a run with this init_from will go on from what out_dir holds."""
    out = Path(out_dir)
    if init_from == "resume":
        return True
    if init_from != "auto":
        return False
    return any(out.glob("*model.safetensors")) or any(out.glob("shards/step_*/mesh.json"))


def saved_settings(out_dir: str, script: str, keys: dict, fit: Callable) -> tuple[dict, list[str]]:
    """({key: value} of the run in out_dir, as far as a resume takes them; lines to tell).

    script: the name of the one that asks, whose `keys` are as script_keys gives them. fit(key,
    value, types): the value as one of the types, or a ValueError. A run.json that is not there, or
    is damaged, gives nothing: state.pt has the settings too, and refuses others."""
    path = Path(out_dir) / "run.json"
    try:
        entries = json.loads(path.read_bytes())
        saved = dict(entries["config"])
    except FileNotFoundError:
        return {}, [f"note: there is no {path}: no settings are taken from it"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, [f"note: {path} is damaged: no settings are taken from it"]
    refuse_other_script(entries, out_dir, script)
    settings = {}
    for key, value in saved.items():
        if key in keys and key not in STARTS:
            try:
                settings[key] = fit(key, value, keys[key][1])
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{path}: {error}: give --{key}, or mend the file") from None
    lines = [f"settings: those of {path}"]
    unknown = [f"{key}={value!r:.40}" for key, value in saved.items() if key not in keys]
    if unknown:
        lines.append(f"note: made with {', '.join(unknown)}, which this {script} does not have")
    lines += leave_machine(settings, entries, keys)
    lines += leave_processes(settings, entries, keys)
    return settings, lines


def refuse_other_script(entries: dict, out_dir: str, script: str) -> None:
    """A ValueError where another script of ours has made the run."""
    words = str(entries.get("command", "")).split()
    made_by = os.path.basename(words[0]) if words else script
    if made_by != script and {made_by, script} <= set(SCRIPTS):
        raise ValueError(f"{out_dir} is a run of {made_by}, which alone goes on with it")


def leave_machine(settings: dict, entries: dict, keys: dict) -> list[str]:
    """Take the machine's settings out again where this is another one: lines that say so."""
    before = str(entries.get("host") or "unknown")
    here = platform.node()
    if before == here:
        return []
    lines = []
    left = take_out(settings, OF_THE_MACHINE, keys)
    if left:
        lines.append(f"note: another machine ({before} -> {here}): {left} not taken")
    if settings.get("dtype", "auto") != "auto":
        words = f"--dtype={settings['dtype']} as before; --dtype=auto leaves it to this machine"
        lines.append(f"note: another machine ({before} -> {here}): {words}")
    return lines


def leave_processes(settings: dict, entries: dict, keys: dict) -> list[str]:
    """Take what divides a network out again where the processes are not as many as they were."""
    here = int(os.environ.get("WORLD_SIZE", 1))
    try:
        before = entries["parts"][-1]["facts"]["processes"]
    except (LookupError, TypeError):
        before = 1
    if before == here:
        return []
    left = take_out(settings, OF_THE_PROCESSES, keys)
    return [f"note: {before} process(es) -> {here}: {left} not taken"] if left else []


def take_out(settings: dict, names: tuple, keys: dict) -> str:
    """Remove the keys of these names: those that were not at their defaults, as words."""
    words = []
    for key in names:
        if key in settings:
            value = settings.pop(key)
            if value != keys[key][0]:
                words.append(f"--{key}={value}")
    return ", ".join(words)
