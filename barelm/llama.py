"""llama.cpp beside ours, on the same weights: by node-llama-cpp, which brings it built.

mkdir ../llama && cd ../llama && npm install node-llama-cpp
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from barelm.gguf_file import write_gguf
from barelm.run import UserError

if TYPE_CHECKING:
    from barelm.tokenizer import Tokenizer
    from model import GPT

# Reads [library, file, ids, n_new, threads]; writes, of three runs, the ids and the seconds from
# the first to the last.
SCRIPT = """
const [library, path, ids, count, threads] = JSON.parse(process.argv[2]);
const {getLlama, LlamaLogLevel} = await import(library);
const options = {gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: threads};
const llama = await getLlama(options);
const model = await llama.loadModel({modelPath: path});
const contextSize = ids.length + count + 1;
const context = await model.createContext({contextSize, threads});
const runs = [];
for (let run = 0; run < 3; run++) {
    const sequence = context.getSequence();
    const made = [];
    let begun = 0;
    let ended = 0;
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        ended = performance.now();
        begun = begun || ended;
        made.push(token);
        if (made.length == count) break;
    }
    await sequence.dispose();
    runs.push({ids: made, seconds: (ended - begun) / 1000});
}
console.log(JSON.stringify(runs));
process.exit(0);
"""


LIBRARY = "node_modules/node-llama-cpp/dist/index.js"


def check_llama(folder: Path) -> None:
    """Refuse a folder where node-llama-cpp is not installed."""
    if not (Path(folder) / LIBRARY).is_file():
        what = f"no {LIBRARY} there"
        raise UserError(f"--llama={folder}: {what}; expected where npm installed it")


def llama_generate(folder: Path, net: GPT, tok: Tokenizer, ids: list[int], n_new: int,
                   gguf_type: str, threads: int) -> tuple[list[int], float]:  # fmt: skip
    """llama.cpp's greedy continuation of ids by net's weights, as GGUF of a type: (its n_new ids,
    seconds from the first of them to the last, the best of three)."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"network-{gguf_type}.gguf"
        write_gguf(net, tok, path, gguf_type)
        script = Path(place) / "decode.mjs"  # a file: the library starts a process like its own
        script.write_text(SCRIPT, encoding="utf-8")
        library = (Path(folder) / LIBRARY).resolve().as_uri()
        argument = json.dumps([library, str(path), ids, n_new, threads])
        command = ["node", str(script), argument]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode or not done.stdout.strip():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"llama.cpp failed: {lines[-1]}")
    runs = json.loads(done.stdout.strip().splitlines()[-1])
    return runs[0]["ids"], min(run["seconds"] for run in runs)
