"""What the tests share: the scripts run as a user runs them, in a folder of their own."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(cwd, script, *args, check=True, stdin="", env=None, processes=1, **popen):
    """`python script.py args` in the folder cwd (under torchrun for several processes)."""
    launch = [sys.executable, str(ROOT / script)]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc_per_node={processes}", str(ROOT / script)]
    args = [str(ROOT / a) if str(a).startswith("config/") else str(a) for a in args]
    done = subprocess.run(
        [*launch, *args],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        **popen,
    )
    if check and done.returncode:
        raise AssertionError(
            f"{script} {args}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


def run_all(cwd, script, *commands, **how):
    """`run` for each list of arguments, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda args: run(cwd, script, *args, **how), commands))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with data/tiny prepared and out/tiny trained by the real commands."""
    folder = tmp_path_factory.mktemp("tiny")
    run(folder, "prepare.py", "config/tiny.py")
    run(folder, "train.py", "config/tiny.py")
    return folder
