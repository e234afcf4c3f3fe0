"""`barelm train config/tiny.py` is `python train.py config/tiny.py`, from any folder.

    barelm                                  # the stages
    barelm train --help                     # the keys of one
    barelm recipes                          # the recipes that came with it
    barelm recipes tiny                     # a copy to change: config/tiny.py
    torchrun --nproc_per_node=8 -m barelm train config/small.py

Data and runs are in the current folder (data/, out/). Recipes are too, or else those that came with
barelm. A script is run as it stands, as Python would run its file.
"""

import ast
import difflib
import runpy
import sys
import textwrap
from pathlib import Path

from barelm import SCRIPTS, __version__

# The order of a model's life; a script that is none of these (of a fork's) comes behind them.
ORDER = "prepare train finetune rl eval report sample serve export bench".split()
OWN_COMMANDS = {
    "recipes": "the recipes that came with barelm; `recipes NAME` copies one, to change it",
    "where": "the path of a stage's script, for other launchers: `where train`",
}


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for: the exit status. A stage may end the process itself."""
    argv = sys.argv[1:] if argv is None else argv
    scripts = stage_scripts()
    word, *arguments = argv or ["--help"]
    if word in ("--help", "-h", "help"):
        print(overview(scripts))
    elif word == "--version":
        print(f"barelm {__version__}")
    elif word == "recipes":
        return recipes(arguments)
    elif word == "where":
        return where(arguments, scripts)
    elif word in scripts:
        run_script(scripts[word], arguments)
    else:
        return refuse(word, [*scripts, *OWN_COMMANDS], "`barelm --help` lists the stages")
    return 0


def stage_scripts() -> dict[str, Path]:
    """{stage: its script}: all that take keys, in the order of a model's life."""
    scripts = {}
    for path in SCRIPTS.glob("*.py"):
        if b"configure(globals())" in path.read_bytes():
            scripts[path.stem] = path
    names = [name for name in ORDER if name in scripts]
    names += sorted(scripts.keys() - set(ORDER))
    return {name: scripts[name] for name in names}


def overview(scripts: dict[str, Path]) -> str:
    """What `barelm --help` prints."""
    lines = ["barelm STAGE [RECIPE ...] [--key=value ...]", ""]
    for name, path in scripts.items():
        lines.append(f"  {name:<10}{first_line(path)}")
    lines += ["", "`barelm STAGE --help` lists the stage's keys. Beside the stages:", ""]
    for name, title in OWN_COMMANDS.items():
        lines.append(f"  {name:<10}{title}")
    return "\n".join(lines)


def first_line(path: Path) -> str:
    """What a script's docstring, or the comments above a recipe, begin with."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("#"):
        return textwrap.shorten(text.partition("\n")[0].strip("# "), 80, placeholder=" …")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def run_script(path: Path, arguments: list[str]) -> None:
    """Run a script with these arguments as Python runs a file: it is `__main__`, and imports what
    lies beside it."""
    sys.path.insert(0, str(SCRIPTS))
    import config  # of this folder, now that it is the first

    config.BY_NAME = True
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def where(names: list[str], scripts: dict[str, Path]) -> int:
    """Print the path of a stage's script: the exit status."""
    word = " ".join(names)
    if word not in scripts:
        return refuse(word, list(scripts), "expected a stage, as in `barelm where train`")
    print(scripts[word])
    return 0


def recipes(names: list[str]) -> int:
    """List the recipes, or copy those of these names to config/ in the current folder: the exit
    status."""
    shipped = {}
    for path in sorted((SCRIPTS / "config").glob("*.py")):
        if path.stem != "__init__":
            shipped[path.stem] = path
    if not names:
        for name, path in shipped.items():
            print(f"config/{name + '.py':<16}{first_line(path)}")
        return 0
    for name in names:
        name = Path(name).stem
        if name not in shipped:
            return refuse(name, list(shipped), "`barelm recipes` lists them")
        copy = Path("config", f"{name}.py")
        copy.parent.mkdir(exist_ok=True)
        try:
            with open(copy, "x", encoding="utf-8") as file:
                file.write(shipped[name].read_text(encoding="utf-8"))
        except FileExistsError:
            print(f"{copy}: is there already, and stays as it is", file=sys.stderr)
            return 1
        print(f"wrote {copy}")
    return 0


def refuse(word: str, names: list[str], otherwise: str) -> int:
    """Say that a word is none of these names, with the nearest: the exit status."""
    near = difflib.get_close_matches(word, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else otherwise
    print(f"barelm: unknown word {word!r} ({hint})", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
