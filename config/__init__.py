"""Configuration: the lower-case literals at the top of a script, overridden in order by recipe
files and by flags: `python train.py config/tiny.py --max_steps=20 --compile=false`.

A script calls `configure(globals())` under `if __name__ == "__main__":`, before `import torch`, so
that --help is instant. A recipe is plain Python that assigns keys and may be given to every script:
a key of another script is skipped, a key of none is refused. Names that start with _ are its own,
but for _script, which is there: the script's name, "train.py", where two are to differ in a key.
A recipe may also be a JSON object of keys, in which these names of other programs are read too.
"""

from __future__ import annotations

import ast
import atexit
import difflib
import errno
import json
import os
import re
import select
import sys
from contextlib import suppress
from pathlib import Path

from barelm.host import print_everything

RECIPES = (".py", ".json")  # how the names of recipes end
# In JSON recipes: what other programs call it, and what it is called here.
JSON_NAMES = {
    "eval_interval": "eval_every",
    "eval_steps": "eval_every",
    "save_interval": "save_every",
    "save_steps": "save_every",
    "lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "lr_scheduler_type": "lr_schedule",
    "max_grad_norm": "grad_clip",
    "num_epochs": "max_epochs",
    "block_size": "seq_len",
}
WINDOWS = "_windows"  # of a step, where a JSON recipe counts them: a private name of ours
BY_NAME = False  # whether this script was asked for as `barelm train`: barelm/cli.py sets it


def script_keys(path: str | Path) -> dict:
    """The keys of the script at `path`, read with `ast`: {name: (default, its types, comment)}."""
    text = Path(path).read_text(encoding="utf-8")
    lines = text.partition("\nif __name__ == ")[0].split("\n")  # what is below has no keys
    keys = {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            break
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        else:
            target = getattr(node, "target", None)
        if not isinstance(target, ast.Name) or not target.id.islower() or target.id[0] == "_":
            continue
        with suppress(ValueError, TypeError):  # what is no literal is no key
            default = ast.literal_eval(getattr(node, "value", None))
            types = type(default).__name__
            if isinstance(node, ast.AnnAssign):
                types = ast.unparse(node.annotation).lower()
            types = [name.partition("[")[0] for name in types.split(" | ")]
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            keys[target.id] = (default, types, comment.strip(" #"))
    return keys


# Keys whose flags may hold \n for a line end, which shells do not type. Prompts are not among
# them: a prompt is text, code perhaps, and stays as it was typed.
WITH_ESCAPES = ("separator", "template", "source_template")
FILE_NAMES = ("source", "dataset")  # which may be of any bytes, as a system's names may
ESCAPE = re.compile(r"\\(?:[nrtfv0\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")


def unescape(text: str) -> str:
    """The text with what Python means by \\n, \\t, \\\\ and their like; other backslashes stay."""
    return ESCAPE.sub(lambda match: match[0].encode().decode("unicode_escape"), text)


def read_flag(arg: str, argv: list[str], keys: dict) -> dict:
    """{key: value} of the flag `arg`: a Python literal, or text where it is none or a string is
    expected. Without `=` the next of `argv` is the value, or a boolean is true."""
    flag, equals, text = arg.partition("=")
    key = flag[2:].replace("-", "_")
    if key == "local_rank":  # torch.distributed.launch passes it; torchrun's RANK says the same
        return {}
    types = keys[key][1] if key in keys else ["bool"]  # an unknown one is refused later
    if not equals:
        following = argv[0] if argv else "--"
        is_number = "int" in types and following.isdecimal()
        if "bool" in types and following.lower() not in WORDS and not is_number:
            return {key: True}
        if following.startswith("--"):
            raise ValueError(f"no value: expected {' or '.join(types)}")
        text = argv.pop(0)
        if "list" in types:  # the words up to the next flag or recipe
            while argv and not argv[0].startswith("--") and not is_recipe(argv[0]):
                text += f",{argv.pop(0)}"
    return {key: read_value(key, text, types)}


WORDS = {"true": True, "false": False, "none": None}  # in any case of letters


def read_value(key: str, text: str, types: list[str]) -> object:
    """The value that a flag's text means, for a key of these types."""
    is_word = text.lower() in WORDS
    if "list" in types and text.startswith("["):
        with suppress(ValueError, SyntaxError, TypeError):
            return ast.literal_eval(text)
    if is_word:
        value = WORDS[text.lower()]
        word_type = "none" if value is None else "bool"
        if "str" not in types or word_type in types:
            return value
    if "str" in types:
        return unescape(text) if key in WITH_ESCAPES else text
    with suppress(ValueError, SyntaxError, TypeError):
        return ast.literal_eval(text)
    return text


def is_recipe(argument: str) -> bool:
    return argument.endswith(RECIPES) and not argument.startswith("--")


def read_json_recipe(path: str, values: dict, keys: dict) -> dict:
    """The keys in the JSON object at `path`, where every key has its value in `values` so far, and
    `keys` are the script's own."""
    try:
        given = json.loads(Path(path).read_bytes())
    except RecursionError:
        raise ValueError("JSON nested too deeply to read") from None
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError('expected a JSON object, such as {"learning_rate": 1e-3}')
    recipe = {}
    for name, value in given.items():
        key = JSON_NAMES.get(name, name)
        if key in recipe:
            raise ValueError(f"{key} is given twice")
        recipe[key] = value
    return whole_batch(recipe, values, keys)


def whole_batch(recipe: dict, values: dict, keys: dict) -> dict:
    """The recipe with batch_size and gradient_accumulation_steps made into this script's one number
    for the batch of an optimizer step: batch_tokens of seq_len each, or batch_size."""
    accumulation = recipe.pop("gradient_accumulation_steps", 1)
    if "batch_size" not in recipe:
        if accumulation != 1:
            raise ValueError("gradient_accumulation_steps: expected batch_size beside it")
        return recipe
    size = recipe.pop("batch_size")
    for name, number in (("batch_size", size), ("gradient_accumulation_steps", accumulation)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} = {number!r}: expected a whole number, 1 or more")
    if "batch_tokens" not in keys:
        return recipe | {"batch_size": size * accumulation}
    if "batch_tokens" in recipe:
        raise ValueError("batch_size and batch_tokens both say how large a step is: leave one")
    seq_len = fit("seq_len", recipe.get("seq_len", values["seq_len"]), ["int"])
    windows = size * accumulation  # of whatever seq_len a later flag may set
    return {"micro_batch": size} | recipe | {"batch_tokens": windows * seq_len, WINDOWS: windows}


def run_recipe(path: str, values: dict, keys: dict, script: str = "") -> dict:
    """What the recipe at `path` leaves in its namespace, which are `values` when it starts, and the
    script's name, for keys that several scripts have: `if _script == "train.py": out_dir = ...`."""
    path = find_recipe(path)
    if not path.endswith(RECIPES) or not os.path.isfile(path):
        raise ValueError("no such recipe (config/NAME.py or NAME.json; a flag is --key=value)")
    if path.endswith(".json"):
        return read_json_recipe(path, values, keys)
    space = values | {"_script": script}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), space)
    except Exception as error:  # whatever the recipe's own code raises, or its file
        raise ValueError(f"{type(error).__name__}: {error}") from None
    given = {}
    for key, value in space.items():
        is_private = key[0] == "_" or hasattr(value, "__name__")  # a module, a function
        if key in values or not is_private:
            given[key] = value
    return given


def find_recipe(path: str) -> str:
    """The file of a recipe: as its path says; or else, of config/NAME, that which lies here."""
    folder, name = os.path.split(path)
    here = Path(__file__).with_name(name)
    if folder == "config" and not os.path.exists(path) and here.is_file():
        return str(here)
    return path


def fit(key: str, value: object, types: list[str]) -> object:
    """`value` as one of `types`: an int becomes a float where one is expected, 1e3 a whole int."""
    name = "none" if value is None else type(value).__name__
    if name in types:
        return value
    if name == "int" and "float" in types:
        return float(value)  # type: ignore[arg-type]
    if name == "float" and "int" in types and value.is_integer():
        return int(value)
    raise ValueError(f"{key} = {value!r}: expected {' or '.join(types)}")


def settings(space: dict) -> dict:
    """The present value of every key of the script whose globals are `space` (for run.json)."""
    return {key: space[key] for key in script_keys(space["__file__"])}


def defaults(space: dict) -> dict:
    """The default of every key of the script whose globals are `space`."""
    return {key: default for key, (default, *_) in script_keys(space["__file__"]).items()}


def same_recipes() -> str:
    """The recipes of this command line, each with a space behind it, to name the next command."""
    return "".join(f"{arg} " for arg in sys.argv[1:] if is_recipe(arg))


def command_of(script: str) -> str:
    """How the user runs another script, to name the next command: `python train.py`, or `barelm
    train` where this one was asked for in that way."""
    return f"barelm {script}" if BY_NAME else f"python {script}.py"


def commands_by_name(text: str) -> str:
    """A text in which `python train.py` is `barelm train`, and torchrun's commands are alike."""
    text = re.sub(r"\bpython (\w+)\.py\b", r"barelm \1", text)
    return re.sub(r"\b(torchrun(?: -\S+)*) (\w+)\.py\b", r"\1 -m barelm \2", text)


def reader_is_gone() -> bool:
    """Whether standard output is a pipe whose reader has seen enough, such as `| head`."""
    if not hasattr(select, "poll"):  # Windows, which tells who writes the next line
        return writing_fails()
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def writing_fails() -> bool:
    """Whether standard output takes nothing any more."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"")
    except OSError:
        return True
    return False


def is_broken_pipe(error: BaseException) -> bool:
    """Whether an error is that of a pipe without a reader, which Windows calls EINVAL."""
    if sys.platform == "win32" and isinstance(error, OSError):
        return error.errno in (errno.EPIPE, errno.EINVAL)
    return isinstance(error, BrokenPipeError)


def is_lost_output(error: BaseException) -> bool:
    """Whether an error is standard output's end, or a full disk's, and no fault of a script."""
    if is_broken_pipe(error):
        with suppress(OSError, ValueError, AttributeError):  # a standard output that is no file
            return reader_is_gone()
    full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
    return isinstance(error, OSError) and error.errno in full


def end_output(lost: list) -> None:
    """The last of all at the end of a script. `lost` holds the error that ended it, if there was
    one; or else what is still to be written may meet it. The end is quiet, as other programs' is:
    141 is what a shell calls death by SIGPIPE."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        lost.append(error)
    if not lost:
        return
    if is_broken_pipe(lost[0]):
        os._exit(141)
    where = lost[0].filename or "standard output, or a file of the run"
    print(f"{where}: cannot be written: {lost[0].strerror}", file=sys.stderr, flush=True)
    os._exit(1)


def configure(space: dict) -> None:
    """Override the globals of the running script, `space`, by the command line's recipes, flags. Of
    a run that goes on the settings are its own where these give no others."""
    watch_output()
    script = Path(space["__file__"]).resolve()
    keys = script_keys(script)
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        print_help(space.get("__doc__"), keys)
        raise SystemExit(0)
    owners = keys_of_scripts(script.parent)
    usual = usual_values(keys, owners)
    values = read_arguments(script, sys.argv[1:], usual, keys, owners)
    if "init_from" in keys and values["init_from"] in ("resume", "auto"):
        values = read_resume(script, values, usual, keys, owners)
    space.update({key: values[key] for key in keys})


GIVEN_RECIPES = {}  # those of the command line, in order: a dict, since a set has none


def values_elsewhere(path: Path) -> dict:
    """{key: value} of the keys of the script at `path`, by this command line's recipes."""
    keys = script_keys(path)
    owners = keys_of_scripts(Path(path).parent)
    usual = usual_values(keys, owners)
    values = read_arguments(Path(path), list(GIVEN_RECIPES), usual, keys, owners)
    return {key: values[key] for key in keys}


def usual_values(keys: dict, owners: dict) -> dict:
    """{key: default} of the keys of every script; of a key that several have, that in `keys`."""
    usual = {}
    for other_keys in (*owners.values(), keys):
        usual |= {key: default for key, (default, *_) in other_keys.items()}
    return usual


def read_arguments(script: Path, argv: list[str], usual: dict, keys: dict, owners: dict) -> dict:
    """{key: value} of the keys of every script, as the arguments say, or else as `usual`."""
    values = dict(usual)
    windows = None  # of a step, where a JSON recipe counts them
    while argv:
        arg = argv.pop(0)
        try:
            if arg.startswith("--"):
                given = read_flag(arg, argv, keys)
                check_names(given, keys, owners)
                gives_tokens = "batch_tokens" in given
            else:
                given = run_recipe(arg, values, keys, script.name)
                check_names(given, values, owners)
                GIVEN_RECIPES[arg] = None
                gives_tokens = given.get("batch_tokens") != values.get("batch_tokens")
                gives_tokens = gives_tokens and "batch_tokens" in given
            if WINDOWS in given or gives_tokens:
                windows = given.pop(WINDOWS, None)  # who gives the tokens counts no windows
            for key, value in given.items():
                check_text(key, value)
                values[key] = fit(key, value, keys[key][1]) if key in keys else value
        except (ValueError, OverflowError) as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"{arg.partition('=')[0]}: {error}", file=sys.stderr)
            raise SystemExit(1 if os.path.isfile(find_recipe(arg)) else 2) from None
    if windows and "batch_tokens" in keys:
        values["batch_tokens"] = windows * values["seq_len"]
    return values


def read_resume(script: Path, values: dict, usual: dict, keys: dict, owners: dict) -> dict:
    """The `values` of a command line that may ask for a resume: read again, on top of the settings
    of the run that goes on, if there is one."""
    from barelm.saved_settings import goes_on, saved_settings

    out_dir = values["out_dir"]
    if not goes_on(out_dir, values["init_from"]):
        return values
    try:
        saved, lines = saved_settings(out_dir, script.name, keys, fit)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"--init_from={values['init_from']}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    again = read_arguments(script, sys.argv[1:], usual | saved, keys, owners)
    if again["out_dir"] != out_dir:  # a recipe makes its name of what the run has otherwise
        return values
    others = [key for key in saved if again[key] != saved[key]]
    if others:
        words = [f"{key} {saved[key]!r:.40} -> {again[key]!r:.40}" for key in others]
        lines.append(f"given here: {', '.join(words)}")
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)
    return again


def keys_of_scripts(folder: Path) -> dict[str, dict]:
    """{script's name: its keys} of the scripts of ours in a folder."""
    owners = {}
    for path in sorted(folder.glob("*.py")):
        if b"configure(globals())" in path.read_bytes():  # a script of ours, not a recipe there
            with suppress(SyntaxError):  # a neighbour that is being edited has no keys
                owners[path.name] = script_keys(path)
    return owners


def check_names(given: dict, names: dict, owners: dict) -> None:
    """Refuse a key that is none of `names`, with the script that has it, or the nearest name."""
    for key in given:
        if key in names or key == WINDOWS:
            continue
        elsewhere = [script for script, keys in owners.items() if key in keys]
        near = difflib.get_close_matches(key, names, 1)
        hint = "--help lists the keys"
        if elsewhere:
            hint = f"it is a key of {' and '.join(elsewhere)}; --help lists this script's"
        elif near:
            hint = f"did you mean {near[0]!r}?"
        raise ValueError(f"unknown key {key!r} ({hint})")


def check_text(key: str, value: object) -> None:
    """Refuse text that no file could hold."""
    if not isinstance(value, str) or key in FILE_NAMES:
        return
    if value != value.encode(errors="replace").decode():
        raise ValueError(f"{key} = {value!r}: no UTF-8")


def print_help(doc: str | None, keys: dict) -> None:
    """A script's docstring, and its keys."""
    doc = (doc or "").strip()
    lines = [commands_by_name(doc) if BY_NAME else doc, "\nkeys, with their defaults:\n"]
    for key, (default, _, comment) in keys.items():
        lines.append(f"  {f'--{key}={default!r}':<31}  {comment}")
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:  # `| head` has seen enough, and all is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def watch_output() -> None:
    """End a script quietly where standard output ends, and by a line where a disk is full; and let
    no sign that the console's encoding lacks end it."""
    print_everything()
    lost = []  # the error that ended the script, if it was one of these two
    usual_hook = sys.excepthook
    atexit.register(end_output, lost)

    def hook(kind, error, trace):
        if is_lost_output(error):
            lost.append(error)
        elif kind is not KeyboardInterrupt:  # Ctrl-C needs no word
            usual_hook(kind, error, trace)

    sys.excepthook = hook
