"""Configuration: the lower-case literals at the top of a script, overridden in order by recipe files
and by flags: `python train.py config/tiny.py --max_steps=20 --compile=false`.

A script calls `configure(globals())` under `if __name__ == "__main__":`, before `import torch`, so
that --help is instant. A recipe is plain Python that assigns keys and may be given to every script:
a key of another script is skipped, a key of none is refused. Names that start with _ are its own.
"""

import ast
import difflib
import os
import re
import sys
from pathlib import Path
from types import ModuleType


def script_keys(path):
    """The keys of the script at `path`, read with `ast`: {name: (default, types allowed, comment)}."""
    source = Path(path).read_text(encoding="utf-8")
    lines, keys = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            break
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or not target.id.islower() or target.id[0] == "_":
            continue
        try:
            default = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            continue
        types = ["none" if default is None else type(default).__name__]
        if isinstance(node, ast.AnnAssign):
            types = re.sub(r"\[.*?\]|\s", "", ast.unparse(node.annotation)).lower().split("|")
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        keys[target.id] = (default, types, comment.strip(" #"))
    return keys


def fit(value, types):
    """`value` as one of `types`: an int becomes a float where one is expected, 1e3 a whole int."""
    name = "none" if value is None else type(value).__name__
    if name in types:
        return value
    if name == "int" and "float" in types:
        return float(value)
    if name == "float" and "int" in types and value.is_integer():
        return int(value)
    raise ValueError


def parse(text, types):
    """The value of a flag: a Python literal, or the text as it stands where the key is a string."""
    if text.lower() in ("none", "true", "false"):
        text = text.capitalize() if "str" not in types or text.lower() in types else text
    if "str" in types and not (text == "None" and "none" in types):
        return text
    return fit(ast.literal_eval(text), types)


def stop(code, where, key, value, types=(), names=()):
    """Say in one line what is wrong with a key (its type, or that it is unknown), and exit."""
    near = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
    message = f"{key} = {value!r}: expected {' or '.join(types)}"
    if os.environ.get("RANK", "0") == "0":
        print(f"{where}: {message if types else f'unknown key {key!r} ({hint})'}", file=sys.stderr)
    raise SystemExit(code)


def run_recipe(path, keys, others):
    """What the recipe at `path` assigns to `keys`, run with the values so far as its namespace."""
    space = {key: default for key, (default, *_) in (others | keys).items()}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), space)
    except Exception as error:  # whatever the recipe's own code raises, or its file
        sys.exit(f"{path}: {type(error).__name__}: {error}")
    for key, value in space.items():
        if key[0] == "_" or isinstance(value, ModuleType) or callable(value):
            continue
        if key not in keys and key not in others:
            stop(1, path, key, value, names=[*keys, *others])
        try:
            space[key] = fit(value, (others | keys)[key][1])
        except ValueError:
            stop(1, path, key, value, types=(others | keys)[key][1])
    return {key: space[key] for key in keys}


def settings(space):
    """The present value of every key of the script whose globals are `space` (for run.json)."""
    return {key: space[key] for key in script_keys(space["__file__"])}


def configure(space):
    """Override the globals `space` of the running script by the command line's recipes and flags."""
    script, argv = Path(space["__file__"]), sys.argv[1:]
    keys, others = script_keys(script), {}
    for path in sorted(script.resolve().parent.glob("*.py")):
        others |= {k: v for k, v in script_keys(path).items() if k not in keys}
    if "--help" in argv or "-h" in argv:
        print(f"{(space.get('__doc__') or '').strip()}\n\nkeys, with their defaults:\n")
        print(
            "\n".join(f"  {f'--{key}={default}':<32} {c}" for key, (default, _, c) in keys.items())
        )
        sys.exit(0)
    while argv:
        arg = argv.pop(0)
        if not arg.startswith("--"):
            if not arg.endswith(".py") or not os.path.isfile(arg):
                print(
                    f"{arg}: no such recipe (config/NAME.py; a flag is --key=value)",
                    file=sys.stderr,
                )
                sys.exit(2)
            values = run_recipe(arg, keys, others)
            keys = {key: (values[key], *rest) for key, (_, *rest) in keys.items()}
            continue
        key, equals, text = arg[2:].partition("=")
        key = key.replace("-", "_")
        if key == "local_rank":  # torch.distributed.launch passes it; torchrun's RANK says the same
            continue
        if key not in keys:
            stop(2, arg.partition("=")[0], key, text, names=keys)
        _, types, comment = keys[key]
        if not equals:
            text = "true" if "bool" in types else ""
            following = argv[0].lower() if argv else "--"
            if following in ("true", "false", "none") or not (
                "bool" in types or following[:2] == "--"
            ):
                text = argv.pop(0)
        try:
            keys[key] = (parse(text, types), types, comment)
        except (ValueError, SyntaxError):
            stop(2, f"--{key}", key, text, types=types)
    space.update({key: value for key, (value, *_) in keys.items()})
