"""The folders of runs and exports: what is never lost, mixed, or written by two at once, what a
resume may change, and what a disk or a name refuses."""

import errno
import fcntl
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, join, run
from test_train import SMALL, log, words  # noqa: F401 (a fixture)

import train
from barelm.checkpoint import load, save
from barelm.optim import restore_optimizers
from barelm.resume import (
    RunFolder,
    clear_folder,
    holds_model,
    load_state,
    locked_folder,
    open_log,
    write_row,
)
from barelm.run import Run, Schedule, UserError
from barelm.tuning import begin_part

RUN = [*SMALL, "--max_steps=4", "--save_every=2", "--eval_every=2", "--dtype=float32"]
TUNE = "--model=out/base --dataset=words --max_steps=4 --save_every=2 --eval_every=2".split()
TUNE += "--batch_size=2 --check_memorized=0 --warmup_steps=0 --dtype=float32 --device=cpu".split()


@pytest.fixture(scope="module")
def base(words):  # noqa: F811
    """The folder with data/words, its sft rows, and the run out/base."""
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"}]
    for split in ("train", "val"):
        row = json.dumps({"messages": talk}) + "\n"
        (words / "data" / "words" / f"sft_{split}.jsonl").write_text(row * 8)
    run(words, "train.py", *RUN, "--out_dir=out/base")
    return words


def with_prelude(folder, script, code):
    """A script that runs `code` and then one of ours."""
    path = folder / f"prelude_{script}"
    start = f"import os, runpy, sys\nsys.argv[0] = {str(ROOT / script)!r}\n"
    path.write_text(f"{start}{code}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    return path


def is_a_line(done, message):
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Nothing is replaced unasked

FILES = """config.json adapter_config.json model.safetensors adapter_model.safetensors state.pt
model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model.bin state.pt.tmp
pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json adapter_model.bin tokenizer.json
chat_template.jinja best/model.safetensors merged/config.json"""


@pytest.mark.parametrize("name", FILES.split())
def test_a_folder_that_has_anything_of_a_model_is_found_and_taken_apart(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    (tmp_path / "notes.txt").write_text("the user's own")
    assert holds_model(tmp_path) == [tmp_path / name]
    clear_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert not holds_model(tmp_path)


@pytest.mark.parametrize("script", ["train.py", "finetune.py"])
@pytest.mark.parametrize("kind", ["copy", "adapter", "shards"])
def test_no_script_replaces_a_model_unasked(script, kind, base):
    out = base / "out" / f"{kind}-{script}"
    out.mkdir()
    names = {
        "copy": ["config.json", "model.safetensors", "tokenizer.json"],
        "adapter": ["adapter_config.json", "adapter_model.safetensors"],
        "shards": ["config.json", "model.safetensors.index.json", "model-1.safetensors"],
    }
    for name in names[kind]:
        (out / name).write_text(name)
    args = RUN if script == "train.py" else TUNE
    done = run(base, script, *args, f"--out_dir={out}", check=False)
    is_a_line(done, "holds a run or a model (")
    assert "--overwrite replaces it" in done.stderr
    for name in names[kind]:
        assert (out / name).read_text() == name


def test_no_run_replaces_what_it_starts_from(base):
    shutil.copytree(base / "out/base", base / "out/source")
    before = (base / "out/source/best/model.safetensors").read_bytes()
    for source in ("out/source", "out/source/best"):
        args = ["--out_dir=out/source", "--overwrite"]
        done = run(base, "train.py", *RUN, f"--init_from={source}", *args, check=False)
        is_a_line(done, "it is the model to start from")
        done = run(base, "finetune.py", *TUNE, f"--model={source}", *args, check=False)
        is_a_line(done, "it is the model to start from")
        done = run(base, "export.py", f"--model={source}", "--export=hf", *args, check=False)
        is_a_line(done, "it is the model to start from")
    assert (base / "out/source/best/model.safetensors").read_bytes() == before
    done = run(base, "train.py", *RUN, "--out_dir=data/words", "--overwrite", check=False)
    is_a_line(done, "it holds prepared data")


def test_an_earlier_merge_goes_before_the_adapter_changes(base):
    lora = [*TUNE, "--method=lora", "--out_dir=out/lora"]
    run(base, "finetune.py", *lora, "--merge")
    assert (base / "out/lora/merged/model.safetensors").is_file()
    rest = ["--init_from=resume", "--max_steps=6", "--max_epochs=none", "--merge=false"]
    run(base, "finetune.py", *lora, *rest)
    assert not (base / "out/lora/merged").exists()


# --------------------------------------------------------------------------------------------------
# Killed at each rename and removal, it leaves the old, the new, or what is refused

DIES = """
count = 0
def dying(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == {moment}:
            os._exit(77)
        return function(*args, **kwargs)
    return call
os.replace, os.unlink, os.rmdir = dying(os.replace), dying(os.unlink), dying(os.rmdir)
"""


COPIES = """
import shutil
rename = os.replace
def replace(a, b):
    rename(a, b)
    if str(b).endswith(".safetensors"):
        shutil.copy(b, f"copies/{len(os.listdir('copies'))}")
os.replace = replace
"""


def content(folder):
    """The weights and tokenizer of a folder that opens, or None where it is refused in a line."""
    try:
        load(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return None
    names = ("model.safetensors", "adapter_model.safetensors")
    [weights] = [folder / name for name in names if (folder / name).exists()]
    return weights.read_bytes(), (folder / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def old(base):
    """A run of another tokenizer, with its best/ and an earlier merged/."""
    run(base, "prepare.py", "--source=words.txt", "--dataset=letters", "--tokenizer=char")
    run(base, "train.py", *RUN, "--dataset=letters", "--out_dir=out/old")
    shutil.copytree(base / "out/old/best", base / "out/old/merged")
    return base / "out/old"


@pytest.mark.parametrize(
    "script, args",
    [
        ("train.py", RUN),
        ("finetune.py", [*TUNE, "--method=lora", "--merge"]),
        ("export.py", ["--model=out/base", "--export=hf"]),
    ],
    ids=["train", "finetune", "export"],
)
def test_killed_at_any_rename_it_leaves_the_old_the_new_or_none(script, args, base, old):
    new, cut = base / "out" / f"new-{script}", base / "out" / f"cut-{script}"
    shutil.rmtree(base / "copies", ignore_errors=True)
    (base / "copies").mkdir()
    run(
        base,
        with_prelude(base, script, COPIES),
        *args,
        f"--out_dir={new}",
    )
    tokenizer = (new / "tokenizer.json").read_bytes()
    fresh = [(path.read_bytes(), tokenizer) for path in (base / "copies").iterdir()]
    stale, states, moment = content(old), [], 1
    while True:
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(old, cut)
        prelude = with_prelude(base, script, DIES.format(moment=moment))
        done = run(base, prelude, *args, f"--out_dir={cut}", "--overwrite", check=False)
        assert done.returncode in (0, 77), done.stderr
        places = [cut, cut / "best", cut / "merged"]
        for place in [place for place in places if place.is_dir()]:
            found = content(place)
            assert (
                found is None
                or found in fresh
                or (place, found) == (cut, stale)
                or (place != cut and found == content(old / place.name))
            ), (moment, place)
            states.append(found)
        if script != "export.py" and moment % 3 == 0 and content(cut) in fresh:
            # what opens also goes on, to the weights of a run that was never stopped
            again = run(base, script, *args, f"--out_dir={cut}", "--init_from=resume")
            assert content(cut) == content(new), again.stdout
        if done.returncode == 0:
            break
        moment += 7  # not each, to be quick
    assert content(cut) == content(new) and stale in states and None in states


@pytest.mark.parametrize("name", ["best/model.safetensors", "torn/model.safetensors"])
def test_auto_begins_a_run_again_that_was_killed_before_its_first_save(name, base):
    """What restarts a killed job, whatever it left, must not need a person."""
    shutil.rmtree(base / "out/torn", ignore_errors=True)
    dies = "rename = os.replace\ndef replace(a, b):\n"
    dies += f"    os._exit(77) if str(b).endswith({name!r}) else rename(a, b)\n"
    prelude = with_prelude(base, "train.py", dies + "os.replace = replace\n")
    args = [*RUN, "--out_dir=out/torn", "--init_from=auto"]
    assert run(base, prelude, *args, check=False).returncode == 77
    assert holds_model(base / "out/torn")
    run(base, "train.py", *args)
    assert content(base / "out/torn") == content(base / "out/base")


# --------------------------------------------------------------------------------------------------
# One run in a folder


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(base):
    hold = "import time\nfrom barelm.resume import locked_folder\nwith locked_folder('out/held'):\n"
    hold += "    open('out/held/ready', 'w')\n    time.sleep(100)\n"
    (base / "hold.py").write_text(hold)
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(base, base / "hold.py"), kwargs={"check": False}
    )
    process.start()
    while not (base / "out/held/ready").exists():
        assert process.is_alive()
        time.sleep(0.01)
    [pid] = children_of(process.pid)
    with pytest.raises(UserError, match="out/held: another run is writing into it"):
        with locked_folder(base / "out/held", patience=0):
            pass
    os.kill(pid, signal.SIGKILL)
    join(process)
    run(base, "train.py", *RUN, "--out_dir=out/held")
    assert len(log(base, "out/held")) == 4


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def test_without_locks_there_is_a_line(tmp_path, monkeypatch, capsys):
    def none_here(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none_here)
    with locked_folder(tmp_path):
        said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no lock (No locks available): see to it" in said


# --------------------------------------------------------------------------------------------------
# What a resume goes on from


def flipped(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_in_weights_or_state_is_refused(base, tmp_path):
    shutil.copytree(base / "out/base", tmp_path / "run")
    assert load_state(tmp_path / "run")["step"] == 4
    draw = random.Random(0)
    for name in ("model.safetensors", "state.pt"):
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        places = [draw.randrange(8 * len(whole)) for _ in range(30)]
        if name == "state.pt":  # within what the records hold: the rest is padding
            state = torch.load(path)
            moment = state["optimizers"][0]["state"][0]["exp_avg"].numpy().tobytes()
            places = [8 * whole.find(moment) + draw.randrange(8 * len(moment)) for _ in range(12)]
            places += [8 * whole.find(b"weights_sha256") + bit for bit in range(12)]
        for bit in places:
            flipped(path, bit)
            with pytest.raises(UserError) as error:
                load_state(tmp_path / "run")
            assert "\n" not in str(error.value)
            path.write_bytes(whole)


WRONG = {
    "step": [None, -1, "4", 1.0, True],
    "windows": [None, -1, 10**400],
    "seconds": [None, -1.0, math.nan, math.inf, "x"],
    "best": [None, math.nan, []],
    "history": [None, "abc", [[1, 2]], [[1, 2.0, "x"]]],
    "warmed": [None, [1], [1, -1, 0.0], [1, 10**400, 0.0], [0, 0, math.nan]],
    "micro": [None, -1, 2.0],
    "compiled": [None, 1],
    "parts": [None, [], ["x"], [{"step": 0}], [{"step": "0", "config": {}, "facts": {}}]],
    "optimizers": [None, {}],
    "weights_sha256": [None, 5, "abc"],
    "weights_file": [None, "other.safetensors"],
}


def test_a_state_of_other_types_is_refused(base, tmp_path):
    shutil.copytree(base / "out/base", tmp_path / "run")
    path = tmp_path / "run" / "state.pt"
    state, ways = torch.load(path), 0
    broken = [state | {key: value} for key, values in WRONG.items() for value in values]
    broken += [{k: v for k, v in state.items() if k != key} for key in WRONG]
    for other in [*broken, [state], torch.zeros(3), {}]:
        torch.save(other, path)
        with pytest.raises(UserError) as error:
            train.read_saved(tmp_path / "run", print)
        assert "\n" not in str(error.value)
        ways += 1
    for data in (b"", b"PK\x03\x04", b"text", path.read_bytes()[:-30]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="no state.pt of the weights' step 4"):
            train.read_saved(tmp_path / "run", print)
        ways += 1
    assert ways > 50
    sums = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.AdamW(sums)
    sum(p.sum() for p in sums).backward()
    optimizer.step()
    good = optimizer.state_dict()
    restore_optimizers([optimizer], [good], path)
    entry = good["state"][0]
    bad = [entry | {"exp_avg": value} for value in (None, 1.0, torch.zeros(3, 2), entry["step"])]
    bad += [{"step": entry["step"]}, None, entry | {"exp_avg": entry["exp_avg"].half()}]
    bad = [[{"state": {0: value}}] for value in bad] + [
        [],
        [good, good],
        [None],
        [{}],
        [{"state": []}],
    ]
    for saved in [*bad, [{"state": {9: entry}}], [{"state": {"0": entry}}]]:
        with pytest.raises(UserError, match="are not this run's"):
            restore_optimizers([optimizer], saved, path)


def test_a_log_with_other_bytes_is_cut_and_said(tmp_path):
    rows = [b'{"step": 0}', b"\xff\xfe", b"[" * 100_000, b"5", b'{"step": "x"}', b'{"step": 3}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*rows, b'{"step": 4}', b'{"step": 2, "los']))
    said = []
    with open_log(tmp_path / "log.jsonl", 3, said.append) as file:
        write_row(file, {"step": 4, "loss": 1.0})
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == [{"step": 0}, {"step": 3}, {"step": 4, "loss": 1.0}]
    assert len(said) == 1 and "4 lines that are no rows" in said[0]


# --------------------------------------------------------------------------------------------------
# What a resume changes


def test_a_resume_says_what_it_changes_and_keeps_each_parts_settings(base):
    args = [*RUN, "--out_dir=out/parts"]
    first = run(base, "train.py", *args).stdout
    assert "changed since" not in first
    more = ["--init_from=resume", "--max_steps=6"]
    same = run(base, "train.py", *args, *more).stdout
    assert "changed since the first part: max_steps 4 -> 6\n" in same
    other = ["--learning_rate=0.001", "--weight_decay=0.2", "--dropout=0.1", "--max_steps=8"]
    other += ["--lr_schedule=linear", "--batch_tokens=1024"]
    said = run(base, "train.py", *args, "--init_from=resume", *other).stdout
    [line] = [line for line in said.splitlines() if line.startswith("changed since")]
    assert line.startswith("changed since the part from step 4: ")
    for change in ("learning_rate 0.005 -> 0.001", "weight_decay 0.1 -> 0.2", "dropout 0.0 -> 0.1"):
        assert change in line
    assert "lr_schedule 'cosine' -> 'linear'" in line and "batch_tokens 512 -> 1024" in line
    record = json.loads((base / "out/parts/run.json").read_text())
    assert [part["step"] for part in record["parts"]] == [0, 4, 6]
    rates = [part["config"]["learning_rate"] for part in record["parts"]]
    assert rates == [0.005, 0.005, 0.001] and record["config"]["learning_rate"] == 0.001
    for flag in ("--document_mask", "--stride=16", "--seed=1", "--optimizer=adamw", "--n_head=1"):
        done = run(base, "train.py", *args, "--init_from=resume", flag, check=False)
        is_a_line(done, f"no resume with another {flag[2:].partition('=')[0]}")
    assert json.loads((base / "out/parts/run.json").read_text()) == record
    meta = base / "data/words/meta.json"
    before = meta.read_text()
    meta.write_text(before + " ")
    done = run(base, "train.py", *args, "--init_from=resume", check=False)
    meta.write_text(before)
    is_a_line(done, "no resume with another dataset")


def test_finetune_says_what_a_resume_changes(base):
    shutil.copytree(base / "out/base", base / "out/start")
    args = [*TUNE, "--model=out/start", "--out_dir=out/tuned"]
    run(base, "finetune.py", *args)
    resume = [*args, "--init_from=resume", "--max_epochs=none", "--max_steps=6"]
    said = run(base, "finetune.py", *resume, "--learning_rate=0.1").stdout
    [line] = [line for line in said.splitlines() if line.startswith("changed since")]
    assert "learning_rate 0.0003 -> 0.1" in line and "max_steps 4 -> 6" in line
    record = json.loads((base / "out/tuned/run.json").read_text())
    assert [part["step"] for part in record["parts"]] == [0, 4]
    for flag in ("--batch_size=4", "--no_pack", "--train_last=1"):
        flag = flag.replace("--no_pack", "--pack=false")
        done = run(base, "finetune.py", *resume, flag, check=False)
        is_a_line(done, f"no resume with another {flag[2:].partition('=')[0]}")
    net, tok = load(base / "out/start")
    with torch.no_grad():
        net.model.norm.weight += 1
    save(base / "out/start", net, tok)  # the same name, another model
    done = run(base, "finetune.py", *resume, check=False)
    is_a_line(done, "no resume with another model")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "trapezoid"])
@pytest.mark.parametrize("steps, warmup", [(20, 10), (20, 19), (7, 3), (50, 0)])
def test_the_peak_is_the_learning_rate(schedule, steps, warmup):
    """And behind the warm-up the rate falls as transformers' schedules do, to 0 at the end."""
    plan = Schedule(schedule, warmup)
    end = min(warmup, steps)
    rates = []
    for step in range(steps):
        rates.append(plan.scale(step, step / steps, min(step, end) / steps))
    assert max(rates) == 1 and rates[max(0, warmup - 1)] == 1
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    left = [(step - warmup) / (steps - warmup) for step in range(warmup, steps)]
    fall = {
        "linear": [1 - x for x in left],
        "cosine": [0.5 + 0.5 * math.cos(math.pi * x) for x in left],
        "constant": [1.0] * len(left),
    }
    if schedule in fall:
        assert rates[warmup:] == pytest.approx(fall[schedule])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


# --------------------------------------------------------------------------------------------------
# Disks and names that refuse

OUT = {
    "out/base/config.json": "File exists",
    "out/base/config.json/x": "Not a directory",
    "/proc/none": "No such file or directory",  # where root too can make nothing
    "n" * 300: "File name too long",
    "": "--out_dir is empty",
}


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "export.py", "eval.py"])
def test_an_out_dir_that_cannot_be_is_a_line(script, base):
    args = {
        "train.py": RUN,
        "finetune.py": TUNE,
        "export.py": ["--model=out/base", "--export=hf", "--overwrite"],
        "eval.py": ["--model=out/base", "--tasks=loss", "--dataset=words", "--device=cpu"],
    }
    before = sorted(path.name for path in base.iterdir())
    for name, why in OUT.items():
        done = run(base, script, *args[script], f"--out_dir={name}", check=False)
        is_a_line(done, why)
    assert sorted(path.name for path in base.iterdir()) == before


FULL_DISK = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"


@pytest.mark.parametrize("script", ["train.py", "finetune.py"])
def test_a_full_disk_is_a_line_and_what_was_saved_stays(script, base):
    """A limit on the size of files stands for the disk: first between that of the weights and that
    of the state, then one that the log outgrows."""
    out = f"out/full-{script}"
    args = [*(RUN if script == "train.py" else TUNE), f"--out_dir={out}"]
    run(base, script, *args)
    folder = base / out
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    sizes = [len(before[name]) for name in ("model.safetensors", "state.pt")]
    more = [*args, "--init_from=resume", "--max_steps=8"]
    more += ["--max_epochs=none"] if script == "finetune.py" else []
    prelude = with_prelude(base, script, FULL_DISK.format(size=sum(sizes) // 2))
    done = run(base, prelude, *more, check=False)
    is_a_line(done, f"{out}/state.pt: cannot be written: File too large; nothing was changed")
    for name in ("model.safetensors", "state.pt"):
        assert (folder / name).read_bytes() == before[name]
    assert not list(folder.glob("*.tmp"))
    size = (folder / "run.json").stat().st_size + 4000
    prelude = with_prelude(base, script, FULL_DISK.format(size=size))
    rows = ["--max_steps=200", "--save_every=1000", "--eval_every=1000"]
    done = run(base, prelude, *more, *rows, check=False)
    is_a_line(done, f"{out}/log.jsonl: cannot be written: File too large; the last save is kept")
    for line in (folder / "log.jsonl").read_bytes().splitlines():
        assert json.loads(line)["step"] > 0 or script == "finetune.py"
    run(base, script, *more)  # the disk has room again
    assert load_state(folder)["step"] == 8


# --------------------------------------------------------------------------------------------------
# Several processes

GOES = """
import torch
norm, calls = torch.nn.utils.clip_grad_norm_, []
def clip(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return norm(*args)
torch.nn.utils.clip_grad_norm_ = clip
"""
LOUD = """
import warnings
for text in (".*deprecated.*", ".*requires_grad=True to a scalar.*"):
    warnings.filterwarnings("error", message=text)
"""


@pytest.mark.parametrize("script", ["train.py", "finetune.py"])
def test_a_killed_process_is_a_line_for_the_others(script, base):
    args = [*(RUN if script == "train.py" else TUNE), f"--out_dir=out/gone-{script}"]
    done = run(base, with_prelude(base, script, GOES), *args, processes=2, check=False)
    assert done.returncode and done.stderr.count("so that none can go on") == 1
    assert "process 0: process 1 (" in done.stderr and "gloo" not in done.stderr


def test_no_warning_of_torch_reaches_the_user(base):
    row = {"prompt": "the cat", "chosen": "sees", "rejected": "runs"}
    for split in ("train", "val"):
        path = base / "data" / "words" / f"preference_{split}.jsonl"
        path.write_text((json.dumps(row) + "\n") * 8)
    script = with_prelude(base, "train.py", LOUD)
    run(base, script, *RUN, "--optimizer=muon", "--out_dir=out/quiet", processes=2)
    script = with_prelude(base, "finetune.py", LOUD)
    reward = [*TUNE, "--method=reward", "--max_steps=2", "--out_dir=out/reward"]
    run(base, script, *reward, processes=2)


def test_a_run_that_replaces_another_reads_nothing_of_it(tmp_path):
    """What the main process is deleting: another one would find half of it."""
    (tmp_path / "best").mkdir()
    (tmp_path / "best/model.safetensors").write_bytes(b"half")
    for begin in (partial(train.begin_part, facts={}), partial(begin_part, facts={}, n_steps=3)):
        other = Run(torch.device("cpu"), rank=1, world=2)
        folder = RunFolder(str(tmp_path), other, {}, {}, (), ())
        begin(folder, train.State(), saved=None)
        assert (tmp_path / "best/model.safetensors").exists()


# --------------------------------------------------------------------------------------------------
# What a resume may change


def run_folder(config, changed=(), aside=()):
    defaults = {"width": 1, "rate": 1, "window": 0}
    return RunFolder("out/x", Run(torch.device("cpu")), config, defaults, changed, aside)


def test_a_resume_may_change_what_is_named_and_no_other_key():
    part = {"step": 0, "config": {"width": 1, "rate": 1}, "facts": {"dtype": "float32"}}
    state = {"parts": [part]}
    same = {"width": 1, "rate": 1, "window": 0}  # the part was made before there was a window
    assert run_folder(same).check_resume(state, {"dtype": "float32"}) == {}
    # What the settings came to on this machine is told, and refuses nothing.
    changed = run_folder(same).check_resume(state, {"dtype": "bfloat16"})
    assert changed == {"dtype": "dtype 'float32' -> 'bfloat16'"}
    faster = same | {"rate": 2}
    assert run_folder(faster, changed=("rate",)).check_resume(state, {}) == {"rate": "rate 1 -> 2"}
    assert run_folder(faster, aside=("rate",)).check_resume(state, {}) == {}
    with pytest.raises(UserError, match="no resume with another rate"):
        run_folder(faster).check_resume(state, {})
    with pytest.raises(UserError, match=r"window 0 -> 64.*out/x/run.json"):  # a key of a fork
        run_folder(same | {"window": 64}, changed=("rate",)).check_resume(state, {})
    # A fact with a key's name stands for it: the data, and not the name of their folder.
    with pytest.raises(UserError, match="width 1 -> 'abc'"):
        run_folder(same).check_resume(state, {"width": "abc"})
