"""What takes minutes to show of data at scale; not a part of the suite.

    python tests/long_data.py            # all of it
    python tests/long_data.py machines   # prepare.py on four machines, one killed again and again
    python tests/long_data.py stream     # two processes stream from a server that goes and comes

Machines are network namespaces without any interface (`unshare --net`, which wants root): whatever
they exchange goes through files.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
N_MACHINES = 4
N_KILLS = 8
LIMIT = 600  # seconds that a command may take


def start(cwd, *command, log):
    """A command in a session of its own, so that all its processes can be ended."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=cwd,
            env=ENV,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process, log):
    """Wait until a command ends well."""
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        end(process)
        status = "none: too long"
    if status:
        raise SystemExit(f"{log}: exit status {status}\n{log.read_text()[-2000:]}")


# --------------------------------------------------------------------------------------------------


def machines(place):
    """prepare.py --part on four machines that share a folder alone. One is killed at a random
    moment, and started again, N_KILLS times: the data set has the bytes of one process's."""
    rng = random.Random(0)
    prepare = [sys.executable, ROOT / "prepare.py", "--threads=1", "--vocab_size=1024"]
    log = place / "one.log"
    begun = time.monotonic()
    finish(start(place, *prepare, "--dataset=one", log=log), log)
    seconds = time.monotonic() - begun
    print(f"one process: {seconds:.0f} s")

    def start_part(k):
        part = f"--part={k}/{N_MACHINES}"
        command = ["unshare", "--net", *prepare, "--dataset=many", part]
        return start(place, *command, log=place / f"part_{k}.log")

    parts = {k: start_part(k) for k in range(1, N_MACHINES + 1)}
    for number in range(N_KILLS):
        time.sleep(rng.uniform(0.2, seconds / N_KILLS))
        k = rng.randint(1, N_MACHINES)
        was_running = parts[k].poll() is None
        end(parts[k])
        left = sorted(path.name for path in (place / "data/many").glob("work/*.json"))
        print(f"kill {number + 1}: part {k}, running: {was_running}; {len(left)} units were read")
        parts[k] = start_part(k)
    for k, process in parts.items():
        finish(process, place / f"part_{k}.log")
    compare(place / "data/one", place / "data/many")


def compare(one, many):
    """Two data sets are the same, but for their names."""
    names = sorted(path.name for path in one.iterdir())
    for name in names:
        first = (one / name).read_bytes()
        second = (many / name).read_bytes()
        if name == "meta.json":
            second = second.replace(b'"dataset": "many"', b'"dataset": "one"')
        if first != second:
            raise SystemExit(f"{name}: not the same bytes")
    print(f"the same bytes in {len(names)} files: {', '.join(names)}")


# --------------------------------------------------------------------------------------------------


def stream(place):
    """Two processes train on a data set that a server has, which is killed for some seconds in the
    middle: the losses are those of two processes that read the files, to the last bit."""
    log = place / "prepare.log"
    tiny = ROOT / "config/tiny.py"
    finish(start(place, sys.executable, ROOT / "prepare.py", tiny, log=log), log)
    options = [tiny, "--shuffle_chunks=256", "--sample_tokens=0", "--optimizer=adamw"]
    options += ["--dtype=float32", "--max_steps=60", "--eval_every=20"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train = [*torchrun, ROOT / "train.py", *options]
    log = place / "here.log"
    finish(start(place, *train, "--out_dir=here", log=log), log)

    def start_server():
        command = [sys.executable, "-c", SERVER, place, 8745]
        return start(place, *command, log=place / "server.log")

    server = start_server()
    time.sleep(2)
    log = place / "there.log"
    address = "--dataset=http://127.0.0.1:8745/data/tiny/meta.json"
    trained = start(place, *train, address, "--out_dir=there", log=log)
    cache = place / "data/cache"
    while not list(cache.glob("*/val_*")) and trained.poll() is None:
        time.sleep(0.05)
    shutil.rmtree(cache, ignore_errors=True)  # all that was kept is gone, and the server too
    end(server)
    time.sleep(3)
    server = start_server()
    try:
        finish(trained, log)
    finally:
        end(server)
    here = losses(place / "here")
    if losses(place / "there") != here:
        raise SystemExit("not the same losses")
    print(f"the same {len(here)} losses, the last one {here[-1]}")


def losses(out):
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


SERVER = """
import re, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = Path(sys.argv[1], self.path.lstrip("/"))
        body = path.read_bytes()
        size = len(body)
        wanted = re.fullmatch("bytes=(\\\\d+)-(\\\\d+)", self.headers.get("Range", ""))
        self.send_response(206 if wanted else 200)
        if wanted:
            begin, end = map(int, wanted.groups())
            body = body[begin : end + 1]
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{size}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
SHOWS = {"machines": machines, "stream": stream}


def show(names=()):
    """prepare.py on four machines, one killed again and again; a stream from a server that goes."""
    for name in names or SHOWS:
        print(f"--- {name}: {' '.join(SHOWS[name].__doc__.split())}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            SHOWS[name](Path(place))


if __name__ == "__main__":
    show(sys.argv[1:])
