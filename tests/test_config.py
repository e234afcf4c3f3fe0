"""config: recipes and flags override a script's keys, and every mistake is refused in one line."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run

import config
from barelm.examples import read_rows
from barelm.run import UserError
from barelm.tokenizer import Tokenizer

SCRIPT = '''"""What the script is for."""

from config import configure, settings

steps = 10  # how many
rate = 0.5  # per step; a # in the comment stays
name = "a # b"  # what to call it
fast = False  # hurry
words: list[str] | None = None  # some words
limit: int | None = None  # at most
warmth: float | None = 1.5  # degrees
shape = (2, 3)  # rows, columns
runs: str | list = ""  # a,b or words
site: bool | str = False  # one, or which
letters = sorted("ab")  # no literal: no key
_mine = 1

if __name__ == "__main__":
    configure(globals())

import json


def main():
    print(json.dumps(settings(globals())))


below = 1
if __name__ == "__main__":
    main()
'''
OTHER = """
width: int = 4  # of another script
rate = "a string here, a number in the other script"

if __name__ == "__main__":
    configure(globals())
"""
DEFAULTS = {"steps": 10, "rate": 0.5, "name": "a # b", "fast": False, "words": None}
DEFAULTS |= {"limit": None, "warmth": 1.5, "shape": [2, 3], "runs": "", "site": False}


@pytest.fixture
def script(tmp_path):
    """A folder with two scripts, and the means to run the first: (exit code, keys, stderr)."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "other.py").write_text(OTHER)
    # Neighbours that must not stop a script, nor count as one.
    (tmp_path / "edited.py").write_text("def (:\n# configure(globals())\n")
    (tmp_path / "notes.py").write_text("def (:\n")
    (tmp_path / "r.py").write_text("steps = 7\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")

    def call(*args, **env):
        env = os.environ | {"PYTHONPATH": str(ROOT)} | env
        command = [sys.executable, str(tmp_path / "script.py"), *args]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        keys = json.loads(done.stdout) if done.returncode == 0 else None
        return done.returncode, keys, done.stderr

    return call


SCRIPTS = "prepare train finetune rl eval report sample serve export".split()
NO_RECIPE = "no such recipe (config/NAME.py or NAME.json; a flag is --key=value)"


def changed(keys):
    return {key: value for key, value in keys.items() if value != DEFAULTS[key]}


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], {}),
        (["--steps=20", "--steps=30"], {"steps": 30}),  # the last one counts
        (["--steps", "20", "--name", "x"], {"steps": 20, "name": "x"}),
        (["--steps=1e3"], {"steps": 1000}),
        (["--steps=-5"], {"steps": -5}),
        (["--rate", "-1"], {"rate": -1.0}),
        (["--rate=3"], {"rate": 3.0}),
        (["--warmth=2"], {"warmth": 2.0}),
        (["--limit=2e1"], {"limit": 20}),
        (["--name=k=v=w"], {"name": "k=v=w"}),
        (["--name="], {"name": ""}),
        (["--name=12"], {"name": "12"}),
        (["--name=True"], {"name": "True"}),
        (["--name=none"], {"name": "none"}),  # a string that is not optional
        (["--name=--x"], {"name": "--x"}),
        (["--name", "-"], {"name": "-"}),
        (["--fast"], {"fast": True}),
        (["--fast", "--steps=1"], {"fast": True, "steps": 1}),
        (["--fast=true"], {"fast": True}),
        (["--fast", "--fast=false"], {}),
        (["--fast", "--fast", "False"], {}),
        (["--warmth=none"], {"warmth": None}),
        (["--warmth", "None"], {"warmth": None}),
        (['--words=["a", "b"]'], {"words": ["a", "b"]}),
        (["--shape=(4, 5)"], {"shape": [4, 5]}),
        (["--runs", "a", "b", "c", "--steps=1"], {"runs": "a,b,c", "steps": 1}),
        (["--runs", "a", "r.py"], {"runs": "a", "steps": 7}),  # a recipe is no word of a list
        (["--runs=a,b"], {"runs": "a,b"}),
        (["--site"], {"site": True}),
        (["--site", "--site=false"], {}),
        (["--site=out/a"], {"site": "out/a"}),
        (["--local-rank=0", "--local_rank=1", "--steps=1"], {"steps": 1}),
    ],
)
def test_flags(script, args, expected):
    code, keys, stderr = script(*args)
    assert (code, stderr) == (0, "")
    assert changed(keys) == expected


def test_values_have_the_types_of_their_keys(script):
    _, keys, _ = script("--steps=2.0", "--rate=1")
    assert (repr(keys["steps"]), repr(keys["rate"])) == ("2", "1.0")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--steps=ten"], "--steps: steps = 'ten': expected int"),
        (["--steps=1.5"], "--steps: steps = 1.5: expected int"),
        (["--steps=1e999"], "--steps: steps = inf: expected int"),
        (["--steps=none"], "--steps: steps = None: expected int"),
        (["--steps=true"], "--steps: steps = True: expected int"),
        (["--steps="], "--steps: steps = '': expected int"),
        (["--steps=007"], "--steps: steps = '007': expected int"),
        (["--steps={[]: 1}"], "--steps: steps = '{[]: 1}': expected int"),
        (["--limit=1.5"], "--limit: limit = 1.5: expected int or none"),
        (["--rate=x"], "--rate: rate = 'x': expected float"),
        (["--rate=" + "9" * 400], "--rate: int too large to convert to float"),
        (["--fast=1"], "--fast: fast = 1: expected bool"),
        (["--words=a"], "--words: words = 'a': expected list or none"),
        (["--name"], "--name: no value: expected str"),
        (["--name", "--steps=1"], "--name: no value: expected str"),
        (["--steps"], "--steps: no value: expected int"),
        (["--step=5"], "--step: unknown key 'step' (did you mean 'steps'?)"),
        (["--step", "5"], "--step: unknown key 'step' (did you mean 'steps'?)"),
        (["--zzz=5"], "--zzz: unknown key 'zzz' (--help lists the keys)"),
        (["--"], "--: unknown key '' (--help lists the keys)"),
        (
            ["--width=5"],
            "--width: unknown key 'width' (it is a key of other.py; --help lists this script's)",
        ),
        (["--letters=5"], "--letters: unknown key 'letters' (--help lists the keys)"),
        (["--below=5"], "--below: unknown key 'below' (--help lists the keys)"),
        (
            ["nothing.py"],
            f"nothing.py: {NO_RECIPE}",
        ),
        (
            ["--runs=a", "b"],
            f"b: {NO_RECIPE}",
        ),
        (["steps=5"], f"steps: {NO_RECIPE}"),
        (
            ["-steps=5"],
            f"-steps: {NO_RECIPE}",
        ),
    ],
)
def test_a_wrong_command_line_is_a_line_and_exit_2(script, args, message):
    assert script(*args) == (2, None, message + "\n")


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("steps = 20\nname = 'x=y'\n", {"steps": 20, "name": "x=y"}),
        ("steps = 1e3\nrate = 2\n", {"steps": 1000, "rate": 2.0}),
        ("steps = steps * 2 + width\n", {"steps": 24}),  # width is of another script
        ("width = 9\nsteps = width\n", {"steps": 9}),
        ("if _script == 'script.py':\n    steps = 3\n", {"steps": 3}),
        ("if _script == 'other.py':\n    steps = 3\n", {}),
        ("width = 'no int, which is for other.py to say'\n", {}),
        ("warmth = None\nwords = ['a']\n", {"warmth": None, "words": ["a"]}),
        (
            "import math\nfrom math import floor\n\n\ndef half(n):\n    return floor(n / 2)\n\n\n"
            "class C:\n    pass\n\n\n_h = 2.0\nsteps = half(math.pi * _h)\n",
            {"steps": 3},
        ),
    ],
)
def test_recipes(script, tmp_path, recipe, expected):
    (tmp_path / "recipe.py").write_text(recipe)
    code, keys, stderr = script("recipe.py")
    assert (code, stderr) == (0, "")
    assert changed(keys) == expected


def test_recipes_and_flags_count_in_their_order(script, tmp_path):
    (tmp_path / "a.py").write_text("steps = 2\nwidth = 7\n")
    (tmp_path / "b.py").write_text("steps = steps * width\n")
    assert script("a.py", "b.py")[1]["steps"] == 14
    assert script("a.py", "--steps=3", "b.py")[1]["steps"] == 21
    assert script("b.py", "a.py")[1]["steps"] == 2
    assert script("a.py", "--steps=3")[1]["steps"] == 3


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("steps = 'many'\n", "steps = 'many': expected int"),
        ("steps = 2.5\n", "steps = 2.5: expected int"),
        ("fast = 1\n", "fast = 1: expected bool"),
        ("limit = 'x'\n", "limit = 'x': expected int or none"),
        ("name = len\n", "name = <built-in function len>: expected str"),
        ("step = 5\n", "unknown key 'step' (did you mean 'steps'?)"),
        ("widht = 5\n", "unknown key 'widht' (did you mean 'width'?)"),
        ("letters = 5\n", "unknown key 'letters' (--help lists the keys)"),
        ("steps = \n", "SyntaxError: invalid syntax (recipe.py, line 1)"),
        ("steps = 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("steps = nobody\n", "NameError: name 'nobody' is not defined"),
    ],
)
def test_a_wrong_recipe_is_a_line_and_exit_1(script, tmp_path, recipe, message):
    (tmp_path / "recipe.py").write_text(recipe)
    assert script("recipe.py") == (1, None, f"recipe.py: {message}\n")


def test_under_torchrun_the_first_process_speaks(script, tmp_path):
    (tmp_path / "recipe.py").write_text("step = 1\n")
    for args, code in (["--step=1"], 2), (["recipe.py"], 1), (["nothing.py"], 2):
        assert script(*args, RANK="0")[2].count("\n") == 1
        assert script(*args, RANK="1") == (code, None, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_key_and_imports_no_torch(name, tmp_path):
    done = run(
        tmp_path, f"{name}.py", "--help", "--no_such_key", env={"PYTHONPROFILEIMPORTTIME": "1"}
    )
    assert "torch" not in done.stderr and "numpy" not in done.stderr and "config" in done.stderr
    source = (ROOT / f"{name}.py").read_text()
    assert done.stdout.startswith(ast.get_docstring(ast.parse(source), clean=False).strip())
    lines = [line.strip() for line in done.stdout.splitlines()]
    top = source[: source.index("configure(globals())")].splitlines()
    keys = [line for line in top if line[:1].islower() and " = " in line]
    assert len(keys) > 10
    for line in keys:
        code, _, comment = line.partition("  # ")
        key, _, default = code.partition(" = ")
        shown = f"--{key.partition(':')[0]}={ast.literal_eval(default)!r}"
        assert comment and [x for x in lines if x.split("  ")[0] == shown and x.endswith(comment)]


def test_ctrl_c_and_a_reader_that_left_are_quiet(script, tmp_path):
    (tmp_path / "c.py").write_text("raise KeyboardInterrupt\n")  # wherever it comes
    code, _, said = script("c.py")
    assert code != 0 and said == ""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""


ENDS = """from config import configure
lines = 1
if __name__ == "__main__":
    configure(globals())
import os
try:
    print("a line" * lines)
finally:
    open("finished", "w").close()
"""


@pytest.mark.parametrize("lines", [1, 100_000])  # met at the very end, and on the way
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_no_more_ends_a_script_in_silence(tmp_path, lines, unbuffered):
    """As the C programs of a pipe: `| head` says nothing (141), a full disk says a line (1)."""
    (tmp_path / "s.py").write_text(ENDS)
    command = [sys.executable, "s.py", f"--lines={lines}"]
    how = dict(cwd=tmp_path, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, text=True)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, **how)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "finished").exists()  # nothing is cut short that would be done otherwise
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, **how)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "standard output" in done.stderr and "No space left on device" in done.stderr


def test_a_pipe_of_the_script_s_own_is_no_output(tmp_path):
    """Its end is a fault of the script, and told."""
    own = "read, write = os.pipe(); os.close(read); os.write(write, b'x')"
    (tmp_path / "s.py").write_text(ENDS.replace('print("a line" * lines)', own))
    done = subprocess.run([sys.executable, "s.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_an_argument_that_is_no_utf_8_is_a_line(script):
    code, _, said = script("--name=caf\udce9")
    assert code == 2 and said.count("\n") == 1 and "no UTF-8" in said


def test_real_scripts_refuse_and_skip(tmp_path):
    done = run(tmp_path, "train.py", "--learning_rat=1", check=False)
    message = "--learning_rat: unknown key 'learning_rat' (did you mean 'learning_rate'?)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    # prepare.py has no learning rate: train.py's is skipped in a recipe, refused as a flag
    (tmp_path / "r.py").write_text("learning_rate = 1e-4\nmax_steps = int(1 / learning_rate)\n")
    done = run(tmp_path, "prepare.py", "r.py", "--vocab_siz=3", check=False)
    assert done.stderr == "--vocab_siz: unknown key 'vocab_siz' (did you mean 'vocab_size'?)\n"
    (tmp_path / "r.py").write_text("learning_rat = 1e-4\n")
    done = run(tmp_path, "prepare.py", "r.py", check=False)
    message = "r.py: unknown key 'learning_rat' (did you mean 'learning_rate'?)\n"
    assert (done.returncode, done.stderr) == (1, message)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("recipe", sorted((ROOT / "config").glob("[!_]*.py")))
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_recipe_fits_every_script(name, recipe, tmp_path):
    # Recipes are read before the flag that ends the run.
    done = run(tmp_path, f"{name}.py", recipe, "--seed=x", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"--seed: seed = 'x': expected int{' or none' * (name == 'serve')}\n",
    )


TRAINING = """{
  "batch_size": 4, "gradient_accumulation_steps": 2, "seq_len": 32, "learning_rate": 1e-3,
  "warmup_steps": 2, "max_steps": 3, "weight_decay": 0.01, "lr_scheduler": "linear",
  "eval_interval": 3, "max_grad_norm": 0.5, "dropout": 0.0, "max_minutes": null
}"""


def test_a_json_recipe_with_the_names_of_other_programs_trains(tiny):
    (tiny / "training.json").write_text(TRAINING)
    run(tiny, "train.py", "config/tiny.py", "training.json", "--out_dir=out/json")
    config = json.loads((tiny / "out/json/run.json").read_text())["config"]
    said = {"batch_tokens": 4 * 2 * 32, "micro_batch": 4, "lr_schedule": "linear"}
    said |= {"learning_rate": 1e-3, "warmup_steps": 2, "max_steps": 3, "weight_decay": 0.01}
    said |= {"eval_every": 3, "grad_clip": 0.5, "max_minutes": None}
    assert {key: config[key] for key in said} == said
    rows = [json.loads(line) for line in (tiny / "out/json/log.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows if "loss" in row] == [256, 512, 768]


def test_a_json_recipe_of_finetune_counts_examples(tmp_path):
    (tmp_path / "r.json").write_text('{"batch_size": 3, "gradient_accumulation_steps": 4}')
    values = {"batch_size": 16, "seq_len": 0}
    got = config.read_json_recipe(str(tmp_path / "r.json"), values, values)
    assert got == {"batch_size": 12}


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "expected a JSON object"),
        ('{"steps": 1', "no JSON: "),
        ("[" * 100_000, "JSON nested too deeply"),
        ('{"step": 1}', "unknown key 'step' (did you mean 'steps'?)"),
        ('{"steps": "many"}', "steps = 'many': expected int"),
        ('{"lr": 1, "learning_rate": 2}', "learning_rate is given twice"),
        ('{"batch_size": 0}', "batch_size = 0: expected a whole number, 1 or more"),
        ('{"batch_size": true}', "batch_size = True: expected a whole number, 1 or more"),
        ('{"gradient_accumulation_steps": 2}', "expected batch_size beside it"),
    ],
)
def test_json_recipes_are_refused_in_one_line(script, tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    code, _, stderr = script("r.json")
    assert code == 1
    assert stderr.startswith("r.json: ") and message in stderr
    assert stderr.count("\n") == 1


def test_a_json_recipe_is_no_word_of_a_list(script, tmp_path):
    (tmp_path / "r.json").write_text('{"steps": 7, "warmth": null}')
    _, keys, _ = script("--runs", "a", "r.json")
    assert changed(keys) == {"runs": "a", "steps": 7, "warmth": None}


def test_a_json_recipe_counts_windows_of_whatever_length_a_flag_sets(tmp_path):
    (tmp_path / "r.json").write_text('{"batch_size": 3, "gradient_accumulation_steps": 4}')
    code = """from config import configure
seq_len = 256
batch_tokens = 4096
micro_batch = 0
if __name__ == "__main__":
    configure(globals())
print(batch_tokens, micro_batch)
"""
    (tmp_path / "script.py").write_text(code)
    for flags, expected in [
        (["--seq_len=32"], "384 3"),
        (["--seq_len=32", "--batch_tokens=3072"], "3072 3"),  # what it was, on purpose
        (["--batch_tokens=640", "--seq_len=32"], "640 3"),
        ([], "3072 3"),
    ]:
        command = [sys.executable, "script.py", "r.json", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_marks_and_templates_may_have_line_ends_as_a_shell_types_them():
    text = (None, ["str", "none"], "")
    keys = {"separator": text, "template": text, "prompt": text}
    for typed, meant in [
        (r"\n\n", "\n\n"),
        (r"Q: {q}\nA: {a}", "Q: {q}\nA: {a}"),
        (r"\t\x41\u00e9é", "\tAéé"),
        (r"C:\\new \d \ ", "C:\\new \\d \\ "),
        ("\n", "\n"),
    ]:
        assert config.read_flag(f"--separator={typed}", [], keys) == {"separator": meant}
        assert config.read_flag("--template", [typed], keys) == {"template": meant}
        assert config.read_flag(f"--prompt={typed}", [], keys) == {"prompt": typed}
    keys = {"template": (None, ["str", "list", "none"], "")}
    typed = r'--template=["Q: {q}\nA: {a}", "{q}"]'
    assert config.read_flag(typed, [], keys) == {"template": ["Q: {q}\nA: {a}", "{q}"]}
    assert config.read_flag("--template=[{q}] {a}", [], keys) == {"template": "[{q}] {a}"}


def texts_of(path):
    """The texts of a file's code, its docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node not in docstrings:
                yield node.value


def test_commands_are_named_as_the_user_runs_them(monkeypatch, tmp_path):
    assert config.command_of("prepare") == "python prepare.py"
    monkeypatch.setattr(config, "BY_NAME", True)
    assert config.command_of("prepare") == "barelm prepare"
    with pytest.raises(UserError, match=r"no tokenizer.json here \(barelm prepare makes one\)"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(UserError, match="barelm prepare --task=sft .* makes it"):
        read_rows("nowhere", "sft", "train")
    for path in [*ROOT.glob("*.py"), *(ROOT / "barelm").glob("*.py")]:
        for text in texts_of(path):
            assert not re.search(r"\bpython \w+\.py\b", text), f"{path.name}: {text}"
