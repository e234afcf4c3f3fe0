"""What a run leaves a person with at its end: its last figures in readable lines, its curves as a
picture, and the command that comes next, to be pasted as it is."""

import contextlib
import importlib.util
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import config
from barelm.chart import picture, run_charts
from barelm.compare import read_log, table
from barelm.files import read_json, whole_file
from barelm.resume import RunFolder, holds_model
from barelm.run import UserError
from barelm.tokenizer import Tokenizer
from model import GPT

# --------------------------------------------------------------------------------------------------
# Lines


def figure_lines(figures: dict) -> list[str]:
    """`key: value` lines, the values below each other; a figure that there is not, None, has no
    line. figures: {name, as in the log: number or text}."""
    present = {key: value for key, value in figures.items() if value is not None}
    width = max((len(key) for key in present), default=0) + 1  # the colon's
    return [f"{key + ':':<{width}} {in_words(key, value)}" for key, value in present.items()]


def in_words(key: str, value: float | str) -> str:
    """A figure as a person reads it, with its unit."""
    if isinstance(value, str):
        return value
    if key == "mem":
        return f"{value / 2**30:.2f} GiB"
    if key == "mfu":
        return f"{100 * value:.1f} %"
    if key == "dt":
        return f"{value:.3g} s"
    if key in ("tokens", "tok_s"):
        return f"{value:,.0f}"
    return f"{value:.6g}"


def score_words(figures: dict, metric: str) -> str:
    """A score of results.json with its standard error, as a person reads it; "" where it has no
    value. figures: {metric: value, metric_stderr: its error or None}."""
    value = figures.get(metric)
    if value is None:
        return ""
    if metric == "n":
        return f"{value:,}"
    if metric == "seconds":
        return f"{value:.1f}"
    error = figures.get(f"{metric}_stderr")
    return f"{value:.6g}" if error is None else f"{value:.6g} ± {error:.2g}"


def score_table(name: str, by: dict[str, dict]) -> list[str]:
    """The lines of a table of a task's scores by subject: {subject: its figures}."""
    metrics = {}  # a dict, since a set has no order
    for figures in by.values():
        metrics |= dict.fromkeys(key for key in figures if not key.endswith("_stderr"))
    rows = [[name, *metrics]]
    for subject, figures in by.items():
        rows.append([subject, *(score_words(figures, metric) for metric in metrics)])
    return table(rows)


def say_end(folder: RunFolder, figures: dict, commands: dict) -> None:
    """Draw the curves of a run, and say its last figures, where the curves are, and the commands
    that may come next. folder: its RunFolder. Called by the main process alone."""
    curves = draw_curves(folder.path, folder.run.say)
    for line in figure_lines({**figures, "curves": curves, **commands}):
        folder.run.say(line)


# --------------------------------------------------------------------------------------------------
# The picture

CURVES = "curves.svg"


def draw_curves(out_dir: str | Path, say: Callable[[str], None]) -> str | None:
    """Draw the whole log of a run into its folder: the path of the picture, or None where there is
    nothing to draw, or no place. A run does not fail for a picture."""
    path = Path(out_dir) / CURVES
    try:
        charts = run_charts(read_log(out_dir))
    except UserError:  # no row of it yet
        return None
    try:
        with whole_file(path) as file:
            file.write(picture(charts).encode(errors="replace"))
    except UserError as error:
        say(f"note: {error}")
        return None
    return str(path)


# --------------------------------------------------------------------------------------------------
# Commands


def command(
    script: str, wanted: dict, unless_given: dict | None = None, with_recipes: bool = True
) -> str | None:
    """The command that runs a script beside the running one, for a shell; None where there is no
    such script. wanted: {key: value} that it is to have; unless_given: more, where no recipe says
    otherwise. Recipes of this command line that say something to the script are given again."""
    words = command_words(script, wanted, unless_given or {}, with_recipes)
    return None if words is None else shell_line(words)


def shell_line(words: list[str]) -> str:
    """Words as a line for this system's shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command_words(
    script: str, wanted: dict, unless_given: dict, with_recipes: bool
) -> list[str] | None:
    """The words of `command`, or None. A flag is there only where a recipe, or the default, says
    otherwise."""
    path = script_path(script)
    if not path.is_file():
        return None
    usual = config.defaults({"__file__": path})
    values = values_by_recipes(path) if with_recipes else usual
    words = launch(path)
    if values != usual:
        words += config.GIVEN_RECIPES
    flags = dict(wanted)
    for key, value in unless_given.items():
        if values[key] == usual[key]:
            flags[key] = value
    for key, value in flags.items():
        if values[key] != value:
            words.append(f"--{key}" if value is True else f"--{key}={value}")
    return words


def script_path(name: str) -> Path:
    """A script of ours, where the running one is."""
    return Path(sys.argv[0]).with_name(name)


def values_by_recipes(path: Path) -> dict:
    """{key: value} of the script at `path` by the recipes of this command line, or the defaults
    where these are not for it."""
    usual = config.defaults({"__file__": path})
    if not config.GIVEN_RECIPES:
        return usual
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return config.values_elsewhere(path)
    except SystemExit:
        return usual


def launch(path: Path) -> list[str]:
    """The words that start a script: by the Python of this process, or as `barelm NAME`."""
    if getattr(config, "BY_NAME", False):
        return ["barelm", path.stem]
    return [python_word(), str(path)]


def python_word() -> str:
    """What a shell calls this Python."""
    here = os.path.dirname(sys.executable or "")
    for name in ("python", "python3"):
        path = shutil.which(name)
        if path and os.path.dirname(os.path.abspath(path)) == here:
            return name
    return sys.executable or "python"


def resume_command(out_dir: str | Path) -> str | None:
    """The command that goes on with a run, by as many processes; its settings are in run.json."""
    flags = {"init_from": "resume", "out_dir": str(out_dir)}
    words = command_words(Path(sys.argv[0]).name, flags, {}, with_recipes=False)
    if words is None:
        return None
    world = int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return "the same command on each machine, with --init_from=resume"
    if world > 1:
        is_module = words[0] == "barelm"
        words = ["-m", *words] if is_module else words[1:]
        words = ["torchrun", f"--nproc_per_node={world}", *words]
    return shell_line(words)


def fresh_name(out_dir: str | Path, ending: str) -> str | None:
    """A folder beside a run's for what is made of it next, or None where that holds a model."""
    name = f"{str(out_dir).rstrip('/')}-{ending}"
    return None if holds_model(name) else name


def has_tasks(dataset: str, kind: str) -> bool:
    return (Path("data") / dataset / f"{kind}_train.jsonl").is_file()


def serve_command(model: str | Path) -> str | None:
    """The command that shows a model in a browser, or None where what serves is not installed."""
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            return None
    return command("serve.py", {"model": str(model)})


# --------------------------------------------------------------------------------------------------
# What comes next: {word: command or None}


def after_training(net: GPT, out_dir: str, dataset: str, gap_prompt: str = "") -> dict:
    """Behind a pre-training. gap_prompt: a text with a gap, for a network that fills them."""
    model = {"model": str(out_dir)}
    if gap_prompt:
        sample = command("sample.py", model, {"prompt": gap_prompt})
        page = None
    else:
        sample = command("sample.py", model)
        page = serve_command(out_dir)
    kind = "sft"
    if net.config.is_seq2seq:
        kind = "seq2seq"
    elif not net.config.causal:
        kind = "classify"
    tuning = tuning_by_recipe(out_dir)
    if tuning:  # the next stage of a recipe comes first
        return {"next": tuning, "then": sample}
    return {"next": sample, "then": tuning_command(out_dir, dataset, kind), "page": page}


def tuning_by_recipe(out_dir: str) -> str | None:
    """finetune.py with the recipes of this command line, where they tune what was trained here."""
    path = script_path("finetune.py")
    if not config.GIVEN_RECIPES or not path.is_file():
        return None
    values = values_by_recipes(path)
    is_next = values["model"] == str(out_dir) and values["out_dir"] != str(out_dir)
    if not is_next or holds_model(values["out_dir"]):
        return None
    return command("finetune.py", {})


def tuning_command(out_dir: str, dataset: str, kind: str) -> str | None:
    """finetune.py on a model, where its data set has tasks of this kind."""
    name = fresh_name(out_dir, kind)
    if name is None or not has_tasks(dataset, kind):
        return None
    wanted = {"method": kind, "model": str(out_dir), "dataset": dataset, "out_dir": name}
    return command("finetune.py", wanted, with_recipes=False)


TASKS_OF_METHODS = {"classify": "classify", "tag": "tag", "span": "span", "embed": "neighbours"}
TASKS_OF_METHODS["seq2seq"] = "seq2seq"


def after_tuning(
    method: str,
    out_dir: str,
    dataset: str,
    base: str,
    prompt: str = "",
    source_template: str = "{source}",
) -> dict:
    """Behind finetune.py or rl.py. base: the model before; prompt: how one begins, where a plain
    template is in the place of a chat's."""
    out = str(out_dir)
    if method in TASKS_OF_METHODS:
        wanted = {"model": out, "tasks": TASKS_OF_METHODS[method], "dataset": dataset}
        wanted["source_template"] = source_template
        return {"next": command("eval.py", wanted, with_recipes=False)}
    if method == "reward":
        return {"next": rewarded_command(out, dataset, base)}
    if prompt:
        sample = command("sample.py", {"model": out, "prompt": prompt, "chat": False})
    else:
        sample = command("sample.py", {"model": out, "chat": True})
    return {"next": sample, "page": serve_command(out)}


def rewarded_command(out_dir: str, dataset: str, base: str) -> str | None:
    """rl.py by a reward model, where its base can chat, and there are prompts."""
    name = fresh_name(out_dir, "rl")
    tokenizer = Path(base) / "tokenizer_config.json"
    chats = tokenizer.is_file() and "chat_template" in read_json(tokenizer)
    chats = chats or (Path(base) / "chat_template.jinja").is_file()
    if name is None or not chats or not has_tasks(dataset, "sft"):
        return None
    wanted = {"model": str(base), "reward": str(out_dir), "dataset": dataset, "out_dir": name}
    return command("rl.py", wanted, with_recipes=False)


def after_scores(net: GPT, model: str, folder: str | Path) -> dict:
    """Behind an evaluation whose results.json is in `folder`: the run beside others there that were
    scored; of what is no run of ours, what it writes."""
    model = str(model)
    if not (Path(model) / "log.jsonl").is_file() or Path(folder) != Path(model):
        writes = net.config.causal and net.score is None and not net.config.is_seq2seq
        return {"next": command("sample.py", {"model": model}) if writes else None}
    runs = [str(Path(model))]
    for path in sorted(Path(model).parent.glob("*/results.json")):
        run = str(path.parent)
        if run not in runs and (path.parent / "log.jsonl").is_file():
            runs.append(run)
    return {"next": command("report.py", {"compare": ",".join(runs[:4])}, with_recipes=False)}


def gap_prompt(tok: Tokenizer, text: str, gap: int) -> str:
    """A few words of a text with a gap, the token of this id, in their middle."""
    [name] = [name for name, id in tok.special.items() if id == gap]
    for special in tok.special:  # what stands between documents is no word of theirs
        text = text.replace(special, "\n")
    lines = [line.split() for line in text.splitlines() if line.isprintable()]
    words = max(lines, key=len, default=[])[:8]
    middle = len(words) // 2
    words[middle : middle + 1] = [name]
    return " ".join(words)
