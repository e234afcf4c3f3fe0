"""A run that goes on takes its own settings: flags given again must agree, or are told."""

import json
import platform
import shutil

import pytest
from conftest import ROOT, run

from barelm.saved_settings import goes_on, saved_settings
from config import fit, script_keys

KEYS = script_keys(ROOT / "train.py")
SMALL = ["--dataset=tiny", "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16"]
SMALL += ["--seq_len=32", "--batch_tokens=128", "--device=cpu", "--dtype=float32", "--seed=3"]
SMALL += ["--sample_tokens=0", "--eval_tokens=256", "--warmup_steps=2", "--save_every=2"]
SMALL += ["--max_steps=4", "--optimizer=adamw", "--dropout=0.1", "--lr_schedule=constant"]
SMALL += ["--out_dir=out/own"]


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def own(tiny):
    """A folder with out/own, a run of settings that are not the defaults."""
    run(tiny, "train.py", *SMALL)
    return tiny


@pytest.fixture
def copy(own):
    """out/copy, the same run, to go on with; and the means to do so with some arguments."""
    folder = own / "out/copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(own / "out/own", folder)

    def resume(*args, **options):
        words = [*args, "--out_dir=out/copy"]
        return run(own, "train.py", "--init_from=resume", *words, check=False, **options)

    return resume


def edit(own, change):
    """Change out/copy/run.json by a function of its entries."""
    path = own / "out/copy/run.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


def test_a_run_that_goes_on_without_flags_is_the_one_that_was_never_stopped(own, copy):
    """Bit for bit, and with its settings."""
    run(own, "train.py", *SMALL, "--out_dir=out/whole_settings", "--max_steps=6")
    done = copy("--max_steps=6")
    assert done.returncode == 0, done.stderr
    assert "settings: those of out/copy/run.json" in done.stdout
    assert "changed since the first part: max_steps 4 -> 6\n" in done.stdout
    weights = [own / f"out/{name}/model.safetensors" for name in ("whole_settings", "copy")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    whole, copied = (json.loads((path.parent / "run.json").read_text()) for path in weights)
    others = {key for key, value in whole["config"].items() if copied["config"][key] != value}
    assert others == {"out_dir", "init_from"}
    assert [row["step"] for row in rows(own / "out/copy") if "loss" in row] == [*range(1, 7)]


def test_a_flag_that_disagrees_is_refused_with_both_values(copy):
    done = copy("--seed=8", "--max_steps=8")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "no resume with another seed" in line and "seed 3 -> 8" in line


def test_a_recipe_that_disagrees_is_refused_and_one_that_agrees_is_not(own, copy):
    recipe = own / "mine.py"
    recipe.write_text("n_embd = 32\n")
    done = copy("mine.py", "--max_steps=8")
    assert done.returncode == 1 and "n_embd 16 -> 32" in done.stderr
    recipe.write_text("n_embd = 16\nout_dir = 'elsewhere'\nlearning_rate = 1e-3\n")
    done = copy("mine.py", "--max_steps=5", "--eval_every=3")
    assert done.returncode == 0, done.stderr
    assert "given here: max_steps 4 -> 5, learning_rate 0.005 -> 0.001, eval_every 100 -> 3\n" in (
        done.stdout
    )
    assert "learning_rate 0.005 -> 0.001" in done.stdout  # it may change, and is told


def test_auto_takes_them_where_there_is_a_run(copy):
    again = copy("--init_from=auto").stdout
    assert "settings: those of out/copy/run.json" in again and "nothing to do" in again


def test_two_processes_take_the_same(own, copy):
    done = copy("--max_steps=6", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("settings: those of") == 1
    assert [row["step"] for row in rows(own / "out/copy") if "loss" in row] == [*range(1, 7)]


def test_a_data_set_that_is_gone_is_one_line(own, copy):
    edit(own, lambda entries: entries["config"].update(dataset="gone"))
    done = copy()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "data/gone" in done.stderr and "prepare.py" in done.stderr


def test_a_run_of_an_older_version_and_one_of_a_fork(own, copy):
    def change(entries):
        del entries["config"]["float8"]  # a key that was not yet there
        entries["config"]["width_of_fork"] = 7

    edit(own, change)
    done = copy("--max_steps=5")
    assert done.returncode == 0, done.stderr
    assert "note: made with width_of_fork=7, which this train.py does not have" in done.stdout


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is damaged: no settings"),
        ("[]", "is damaged: no settings"),
        ('{"config": 5}', "is damaged: no settings"),
        (None, "there is no"),
    ],
)
def test_a_run_json_that_says_nothing_is_told(tmp_path, text, words):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    settings, [line] = saved_settings(tmp_path, "train.py", KEYS, fit)
    assert settings == {} and words in line and "run.json" in line


def write_run(folder, config, **more):
    entries = {"config": config, "command": "train.py config/x.py", "host": platform.node()}
    entries["parts"] = [{"facts": {"processes": 1}}]
    (folder / "run.json").write_text(json.dumps(entries | more))


def test_a_value_of_another_kind_names_the_file(tmp_path):
    write_run(tmp_path, {"seed": "many"})
    with pytest.raises(ValueError, match=r"run.json: seed = 'many': expected int: give --seed"):
        saved_settings(tmp_path, "train.py", KEYS, fit)


def test_how_a_run_began_is_not_how_it_goes_on(tmp_path):
    write_run(tmp_path, {"out_dir": "x", "init_from": "scratch", "overwrite": True, "seed": 4})
    assert saved_settings(tmp_path, "train.py", KEYS, fit)[0] == {"seed": 4}


def test_a_machine_keeps_what_is_its_own(tmp_path):
    config = {"device": "cuda:1", "compile": True, "dtype": "float32", "seed": 4}
    write_run(tmp_path, config)
    assert saved_settings(tmp_path, "train.py", KEYS, fit)[0] == config
    for before in ({"host": "elsewhere"}, {"host": None}):  # another one, or of an older version
        write_run(tmp_path, config, **before)
        settings, lines = saved_settings(tmp_path, "train.py", KEYS, fit)
        assert settings == {"dtype": "float32", "seed": 4}
        said = "\n".join(lines)
        assert "--device=cuda:1, --compile=True not taken" in said and "--dtype=float32" in said
    write_run(tmp_path, {"seed": 4, "device": "auto"}, host="elsewhere")
    assert len(saved_settings(tmp_path, "train.py", KEYS, fit)[1]) == 1  # nothing to tell


def test_a_mesh_is_taken_by_as_many_processes(tmp_path, monkeypatch):
    config = {"tp": 2, "pp": 1, "parallel": "fsdp"}
    write_run(tmp_path, config, parts=[{"facts": {"processes": 4}}])
    settings, lines = saved_settings(tmp_path, "train.py", KEYS, fit)
    assert settings == {"parallel": "fsdp"} and "4 process(es) -> 1: --tp=2 not taken" in lines[-1]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert saved_settings(tmp_path, "train.py", KEYS, fit)[0] == config


@pytest.mark.parametrize("script, other", [("finetune.py", "train.py"), ("train.py", "rl.py")])
def test_a_run_of_another_script_is_refused(tmp_path, script, other):
    write_run(tmp_path, {"seed": 4}, command=f"/somewhere/{other} --x=1")
    with pytest.raises(ValueError, match=f"is a run of {other}, which alone"):
        saved_settings(tmp_path, script, KEYS, fit)
    assert saved_settings(tmp_path, f"my_{script}", KEYS, fit)[0] == {"seed": 4}  # a fork's


def test_what_goes_on(tmp_path):
    assert goes_on(tmp_path, "resume") and not goes_on(tmp_path, "scratch")
    assert not goes_on(tmp_path, "auto")
    (tmp_path / "run.json").touch()  # killed before its first save
    assert not goes_on(tmp_path, "auto")
    (tmp_path / "adapter_model.safetensors").touch()
    assert goes_on(tmp_path, "auto")


def test_a_tuning_goes_on_without_flags(tiny):
    args = ["--model=out/tiny", "--dataset=tiny", "--method=classify", "--pooling=mean"]
    args += ["--max_steps=2", "--eval_examples=2", "--batch_size=4", "--device=cpu"]
    run(tiny, "finetune.py", *args, "--out_dir=out/class-own", "--train_last=1")
    again = ["--init_from=resume", "--out_dir=out/class-own", "--max_steps=4"]
    assert "resumed out/class-own at step 2" in run(tiny, "finetune.py", *again).stdout
    assert [row["step"] for row in rows(tiny / "out/class-own") if "loss" in row] == [1, 2, 3, 4]
    done = run(tiny, "finetune.py", *again, "--pooling=last", check=False)
    assert done.returncode == 1 and "pooling 'mean' -> 'last'" in done.stderr
