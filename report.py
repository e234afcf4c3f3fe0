"""What runs came to, and what they would take: runs side by side, plans, memorized text.

    python report.py --compare out/a out/b               # tables and charts, in out/compare
    python report.py --plan --flops=1e18 > config/my.py  # a compute-optimal recipe for train.py
    python report.py --plan --money=100 --price=2.5      # the same for what 40 hours of a GPU buy
    python report.py --plan --params=7e9 --tokens=140e9 --devices=64 --nodes=8   # and a mesh
    python report.py --plan --compare out/a out/b out/c  # a scaling curve through finished runs
    python report.py config/dpo.py --plan --finetune=dpo --price=2.5   # what a fine-tuning takes
    python report.py --memorized                         # text found word for word in the shards

A plan needs no GPU and no data: it is arithmetic, and says where each number is from. --memorized
generates with --model and adds its scores to the results.json of that folder.
"""

from config import command_of, configure, fit, run_recipe, same_recipes, script_keys, settings

# which of the three
compare: str | list = ""  # folders of runs to compare: out/a,out/b, or as words
plan = False  # print a recipe for a budget, or with --compare fit a scaling curve
memorized = False  # look for text of the training shards in what the model generates

model = "out/python"  # a checkpoint folder; with --plan --finetune of the Hub too
dataset = "python"  # data/<dataset>
report = "out/compare/report.md"  # where a comparison is, with a picture (.svg) and JSON beside
out_dir: str | None = None  # where memorized's results.json is; none: the model's folder

# a plan: one of the first four, or two that leave the third of C = 6 N D
flops: float | None = None  # FLOPs of the whole run
hours: float | None = None  # or hours on `devices` of `device` at `mfu`
money: float | None = None  # or what those hours may cost, at `price`
params: float | None = None  # parameters
tokens: float | None = None  # training tokens; of fine-tuning, of all its examples
devices = 1  # how many of them
mfu = 0.4  # the fraction of their peak that training reaches; with --nodes it is predicted
price: float | None = None  # of one device for an hour, in any currency: the plan says the cost
finetune: str | None = None  # plan this method of finetune.py or rl.py, by the recipe given
examples: int | None = None  # ... with so many; none: those of data/<dataset>
seq_len = 0  # tokens of a window; 0: by the size, of fine-tuning --params 1024
batch_tokens = 0  # tokens of a step; 0: by compute

# its mesh (docs/parallel.md)
nodes = 0  # machines that the devices are in; 0: no mesh is planned
parallel: str | None = None  # ddp, fsdp or hsdp; none, here and below: the fastest that fits
tp: int | None = None  # devices that share each product
pp: int | None = None  # pipeline stages
cp: int | None = None  # devices that share each window
optimizer = "muon"  # muon or adamw
network_gbs: float | None = None  # GB/s of a device to other machines; none: the usual of its kind

# its failures
mtbf = 50000.0  # hours between failures of a device: Llama 3's 419 in 54 days of 16,384 GPUs
restart_minutes = 10.0  # from a failure until training goes on
storage_gbs = 2.0  # GB/s with which a machine writes a checkpoint

# memorized text
num_texts = 100  # texts with a prompt from training, and as many without
prompt_length = 50  # tokens of such a prompt
text_length = 50  # tokens of a text; also what counts as reproduced
ngram = 8  # of how many tokens are the n-grams looked up

# the machine
device = "auto"  # auto, cpu, mps, cuda, cuda:1; with --plan h100 (auto) and its like
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16
quantize: str | None = None  # int8 or int4: weights of one byte or half of one
seed = 1234  # of the prompts that are drawn and of sampled texts

if __name__ == "__main__":
    configure(globals())

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from barelm.chart import Chart, Series, picture, short
from barelm.checkpoint import find, is_hub_name, load, read_config, weights_of
from barelm.compare import (
    curve,
    length_chart,
    length_lines,
    loss_chart,
    loss_lines,
    read_log,
    score_charts,
    score_lines,
    score_record,
    table,
)
from barelm.costs import MEMORY_GBS, finetune_memory, finetune_work, learned_weights
from barelm.download import HUB, download
from barelm.ending import score_words
from barelm.fast import generating
from barelm.files import read_json, whole_file
from barelm.footprint import planned_shapes
from barelm.goodput import Goodput, machine_mtbf
from barelm.mesh import PARALLEL, divisors, nearest
from barelm.optim import MOMENTS, PEAK_TFLOPS, flops_per_token, memory_estimate, n_params
from barelm.overlap import draw_windows, longest_runs
from barelm.plan import (
    Hardware,
    best_step,
    failure_lines,
    held_lines,
    mfu_of,
    save_every,
    save_seconds,
    sent_lines,
    step_seconds,
    time_lines,
)
from barelm.resume import make_folder
from barelm.run import UserError, choose_dtype, duration, setup
from barelm.safetensors import entries_of
from barelm.scaling import (
    ALPHA,
    BETA,
    A,
    B,
    E,
    chinchilla_flops,
    chinchilla_loss,
    chinchilla_params,
    empty_network,
    fit_law,
    fit_powers,
    suggest_shape,
)
from barelm.scores import (
    flat,
    mean,
    model_mark,
    read_lengths,
    read_results,
    read_scores,
    write_results,
)
from barelm.shards import check_tokens, document_layout, open_shard
from barelm.tokenizer import Tokenizer
from model import generate

# --------------------------------------------------------------------------------------------------
# Runs side by side


def runs_to_compare():
    """The folders that `compare` names, each once."""
    names = compare.split(",") if isinstance(compare, str) else compare
    runs = []
    for name in names:
        run = str(name).strip().rstrip("/")
        if run and run not in runs:
            runs.append(run)
    if not runs:
        raise UserError(f"--compare={compare}: expected the folders of runs, such as out/a,out/b")
    return runs


def compare_runs():
    """Print the tables of scores and of losses; write them to `report`, a picture and the scores
    as JSON beside it. A folder of scores alone, such as a model of the Hub, has no losses."""
    runs = runs_to_compare()
    path = Path(report)
    check_report(path)
    scores = {run: read_scores(run) for run in runs}
    logs = {}
    without_log = []
    for run in runs:
        if scores[run] and not (Path(run) / "log.jsonl").is_file():
            without_log.append(f"{run}: no log.jsonl, so no loss")
        else:
            logs[run] = read_log(run)
    all_count_tokens = all(curve(log, "loss", "tokens") for log in logs.values())
    x = "tokens" if all_count_tokens else "step"
    losses = {run: read_lengths(run) for run in runs}  # where eval.py --lengths was asked
    lines = score_lines(scores) + length_lines(losses)
    charts = score_charts(scores)
    if any(losses.values()):
        charts.append(length_chart(losses))
    if logs:
        lines += loss_lines(logs, x)
        charts.append(loss_chart(logs, x))
    lines += ["", *without_log] if without_log else []
    print("\n".join(lines))
    svg_path = path.with_suffix(".svg")
    text = ["# Runs compared", "", *lines, "", f"![scores and losses](<{svg_path.name}>)", ""]
    write_report(path, "\n".join(text))
    write_report(svg_path, picture(charts))
    write_report(path.with_suffix(".json"), json.dumps(score_record(scores), indent=1) + "\n")


def check_report(path):
    """Refuse a name beside which no picture and no scores can be written."""
    if not path.name or path.suffix in (".svg", ".json"):
        why = "expected a name such as report.md: the picture, report.svg, stands beside it"
        raise UserError(f"--report={report}: {why}")
    record = path.with_suffix(".json")
    if os.path.exists(record) and not os.path.exists(path):  # such as a run's results.json
        raise UserError(f"--report={report}: {record} is there, and of no report: another name")


def write_report(path, text):
    """Write a file, in a folder that is made for it, and say where it is."""
    if os.path.exists(path) and not os.path.isfile(path):  # no device is replaced by a file
        raise UserError(f"{path}: cannot be written: it is no plain file")
    make_folder(path.parent, "--report")
    with whole_file(path) as file:
        file.write(text.encode(errors="replace"))  # half a surrogate pair has no UTF-8
    print(f"written: {path}")


# --------------------------------------------------------------------------------------------------
# A plan for train.py: how large a network and how much text for a budget


def planned_device():
    """The name of the GPU that a plan is for, as PEAK_TFLOPS and MEMORY_GBS have it; and the
    numbers that every plan needs are checked."""
    numbers = "flops hours money params tokens devices mfu price examples tp pp cp network_gbs"
    for key in [*numbers.split(), "mtbf", "restart_minutes", "storage_gbs"]:
        value = globals()[key]
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key}={value:g}: expected a number above 0")
    if mfu > 1:
        raise UserError(f"mfu={mfu}: expected a fraction of the peak, at most 1")
    names = {name.lower(): name for name in PEAK_TFLOPS}
    gpu = names.get("h100" if device == "auto" else device.lower())
    if not gpu:
        expected = ", ".join(names.values())
        raise UserError(f"--device={device}: with --plan expected one of {expected}")
    return gpu


def budget(peak):
    """(N, D, FLOPs) that the settings ask for, on devices of this peak in FLOP/s; what they leave
    open is compute-optimal."""
    asked = [key for key in ("flops", "hours", "money", "params", "tokens") if globals()[key]]
    compute = [key for key in ("flops", "hours", "money") if key in asked]
    if not 1 <= len(asked) <= 2 or len(compute) > 1:
        expected = "--flops or --hours or --money, --params or --tokens, or one of each"
        raise UserError(f"--plan: expected {expected}")
    if money and not price:
        raise UserError(f"money={money:g}: expected --price too, of one device for an hour")
    c = flops
    if hours:
        c = 3600 * devices * hours * peak * mfu
    if money:
        c = 3600 * (money / price) * peak * mfu
    if not compute:
        if params and tokens:
            c = 6 * params * tokens
        else:  # the budget for which they are best
            c = chinchilla_flops(params, tokens)
    if params:
        n = params
    elif tokens:
        n = c / (6 * tokens)
    else:
        n = chinchilla_params(c)
    return n, tokens or c / (6 * n), c


def cost_line(seconds):
    """The line of a plan that says what it costs."""
    if price is None:
        return "# cost: --price=, of one device for an hour, adds it"
    device_hours = devices * seconds / 3600
    return f"# cost: {device_hours * price:,.2f} = {device_hours:,.2f} device-hours x {price:g}"


def prepared():
    """(the ids of the tokenizer, the training tokens) of data/<dataset>; None for what its
    meta.json does not say."""
    path = Path("data") / dataset / "meta.json"
    meta = read_json(path, {})
    train = meta.get("train", {})
    if not isinstance(train, dict):
        raise UserError(f"{path}: malformed: train={train!r:.60}: prepare it again")
    n_vocab = meta.get("n_vocab")
    n_tokens = train.get("tokens")
    for count, limit in ((n_vocab, 1 << 31), (n_tokens, 1 << 60)):
        if count is not None and (type(count) is not int or not 0 < count < limit):
            raise UserError(f"{path}: malformed: {count!r} is no count: prepare it again")
    return n_vocab, n_tokens


def usual_seq_len(n):
    """The length of windows for a network of n parameters."""
    for length, least in ((2048, 1e9), (1024, 5e7), (512, 1e7)):
        if n >= least:
            return length
    return 256


def make_plan():
    """Print a recipe for train.py, with what speaks for it as comments."""
    gpu = planned_device()
    peak = 1e12 * PEAK_TFLOPS[gpu]
    n, d, c = budget(peak)
    n_vocab, n_prepared = prepared()
    vocab_size = 64 * math.ceil((n_vocab or 50257) / 64)  # or else GPT-2's
    length = seq_len or usual_seq_len(n)
    shape, count = suggest_shape(n, vocab_size, length)
    flops_of_token = flops_per_token(shape, length)
    if (flops or hours or money) and not tokens:
        d = c / flops_of_token  # the budget holds in real FLOPs: 6 N D leaves attention out
    total = flops_of_token * d
    # Batch and peak rate by compute: Bi et al. 2024 (DeepSeek LLM), equation 1.
    unit = length * devices
    power_of_two = 2 ** round(math.log2(0.292 * total**0.3271))
    tokens_of_step = batch_tokens or max(unit, round(power_of_two / unit) * unit)
    steps = max(1, round(d / tokens_of_step))
    seconds = total / (peak * devices * mfu)
    how_fast = f"# time: {duration(seconds)} on {devices} {gpu} at {100 * mfu:.0f} % of the peak"
    mesh_keys = {}
    if nodes:
        mesh = plan_mesh(shape, gpu, length, tokens_of_step)
        how_fast, seconds, mesh_keys = mesh_lines(mesh, gpu, steps)
    else:
        fixed, window = memory_estimate(
            shape, count, 1, length, torch.bfloat16, moments=1, device_type="cuda"
        )
        needs = f"{fixed / 2**30:.2f} GiB + {window / 2**30:.3f} GiB for each window at once"
        how_fast += f"\n# memory: {needs}"
    about = "not prepared" + ("" if n_vocab else ": the vocabulary is GPT-2's")
    if n_prepared:
        epochs = d / n_prepared
        about = f"{epochs:.2g} epochs; beyond 4 little is learned (Muennighoff et al. 2023)"
    print(f"""\
# A plan for {total:.3g} FLOPs: {count:,} parameters on {d:.3g} tokens, {d / count:.1f} for each
# L(N, D) = {E} + {A} / N^{ALPHA} + {B} / D^{BETA} (Hoffmann et al. 2022, approach 3;
#   constants of Besiroglu et al. 2024): asked for or optimal N = {n:.4g}
# expected loss {chinchilla_loss(count, d):.3f}, in nats per token of their data and tokenizer, to
#   compare plans by: it is not the loss that this run will have
{how_fast}
{cost_line(seconds)}
# data/{dataset}: {about}
# batch_tokens and learning_rate: Bi et al. 2024 (DeepSeek LLM), from 1e17 to 2e19 FLOPs""")
    print_recipe(
        dataset=dataset,
        out_dir="out/plan",
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_kv_head=shape.n_kv_head,
        n_embd=shape.n_embd,
        n_hidden=shape.n_hidden,
        seq_len=length,
        batch_tokens=tokens_of_step,
        max_steps=None,
        max_tokens=steps * tokens_of_step,
        learning_rate=float(f"{0.3118 * total**-0.125:.1e}"),
        warmup_steps=min(1000, steps // 20),
        eval_every=math.ceil(steps / 20),
        **({"save_every": math.ceil(steps / 20)} | mesh_keys),
    )


def check_mesh():
    """Refuse what no mesh can be."""
    if nodes < 1 or devices % nodes:
        near = nearest(divisors(devices), max(1, nodes))
        why = f"so many machines do not have {devices} devices, as many each: --nodes={near}"
        raise UserError(f"nodes={nodes}: {why}")
    if parallel not in (None, *PARALLEL):
        raise UserError(f"--parallel={parallel}: expected {', '.join(PARALLEL)}")
    if optimizer not in MOMENTS:
        raise UserError(f"--optimizer={optimizer}: expected {' or '.join(MOMENTS)}")


def plan_mesh(shape, gpu, length, tokens_of_step):
    """The Step of the best mesh for a network of this shape."""
    check_mesh()
    if tokens_of_step % length:
        near = max(1, round(tokens_of_step / length)) * length
        raise UserError(f"batch_tokens={tokens_of_step}: expected a multiple of {length}: {near}")
    return best_step(
        shape,
        planned_shapes(shape),
        planned_hardware(gpu),
        devices,
        devices // nodes,
        tokens_of_step // length,
        length,
        {"parallel": parallel, "tp": tp, "pp": pp, "cp": cp},
        optimizer=optimizer,
    )


def planned_hardware(gpu):
    return Hardware.of(gpu, network_gbs and 1e9 * network_gbs)


def keys_of(step):
    """The keys of train.py that ask for a Step's mesh and micro-batches."""
    sizes = step.sizes
    keys = {"micro_batch": step.rows, "optimizer": step.optimizer}
    if sizes.shard > 1:
        keys["parallel"] = "hsdp" if sizes.replica > 1 else "fsdp"
    if sizes.shard > 1 and sizes.replica > 1:
        keys["replicas"] = sizes.replica
    for key in ("tp", "pp", "cp"):
        if getattr(sizes, key) > 1:
            keys[key] = getattr(sizes, key)
    if step.zero:
        keys["zero"] = step.zero
    if step.recompute:
        keys["checkpoint_blocks"] = True
    return keys


def mesh_lines(step, gpu, steps):
    """(the lines of a plan on its mesh, bytes, traffic, time and failures; the seconds of the whole
    run; the keys of train.py that ask for it)."""
    hardware = planned_hardware(gpu)
    parts = step_seconds(step, hardware)
    seconds = sum(parts.values())
    share = goodput_of(step)
    lines = [
        f"mesh: {step.sizes.words()}, on {nodes} machine(s); {step.n_micro} micro-batch(es) of "
        f"{step.rows} window(s)" + ("; blocks are computed again" if step.recompute else ""),
        *held_lines(step, hardware),
        *sent_lines(step, hardware),
        *time_lines(step, hardware, parts),
        *failure_lines(step, share, seconds),
        f"time: {duration(steps * seconds / share.goodput)} on {devices} {gpu}, failures included",
    ]
    if hours or money:
        reached = mfu_of(step, hardware, seconds / share.goodput)
        lines.append(f"the budget counted {100 * mfu:.0f} % of the peak: --mfu={reached:.2f}")
    keys = keys_of(step) | {"save_every": save_every(share, seconds)}
    return "\n".join(f"# {line}" for line in lines), steps * seconds / share.goodput, keys


def goodput_of(step):
    """The Goodput of a run of this step, by the keys of failures."""
    hours = machine_mtbf(mtbf, devices)
    return Goodput.of(3600 * hours, save_seconds(step, nodes, storage_gbs), 60 * restart_minutes)


def print_recipe(**keys):
    for key, value in keys.items():
        print(f"{key} = {value!r}")


# --------------------------------------------------------------------------------------------------
# A plan for finetune.py or rl.py: what a fine-tuning takes

ADAPTERS = ("lora", "qlora", "adapter", "prompt")  # as a method: an SFT of added weights
SAMPLING = ("grpo", "rloo", "ppo")  # rl.py's methods
METHODS = ("sft", "classify", "dpo", "simpo", "orpo", "kto", "reward", "distill", *SAMPLING)


def finetune_settings():
    """The settings of the planned run, by their names: the defaults of its script, finetune.py or
    rl.py, then the recipes of this command line, then the method that `finetune` names."""
    if finetune not in (*METHODS, *ADAPTERS):
        raise UserError(f"--finetune={finetune}: expected {', '.join((*METHODS, *ADAPTERS))}")
    script = "rl.py" if finetune in SAMPLING else "finetune.py"
    keys = script_keys(Path(__file__).with_name(script))
    chosen = {key: default for key, (default, *_) in keys.items()}
    for path in same_recipes().split():
        values = run_recipe(path, chosen, keys, script)
        try:
            chosen = {key: fit(key, values[key], types) for key, (_, types, _) in keys.items()}
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    if finetune in ADAPTERS or chosen["method"] not in ADAPTERS:
        chosen["method"] = finetune
    if chosen["method"] in ADAPTERS:
        chosen |= {"method": "sft", "adapt": chosen["method"]}
    for key in "batch_size micro_tokens group_size max_new_tokens lora_rank rl_epochs".split():
        if key in chosen and chosen[key] < 1:
            raise UserError(f"{key}={chosen[key]}: expected 1 or more")
    if chosen["seq_len"] < 0:
        raise UserError(f"seq_len={chosen['seq_len']}: expected 0 or more")
    return SimpleNamespace(**chosen)


def planned_shape():
    """The GPTConfig of `model`; with --params that of a network of that size."""
    if params:
        config, _ = suggest_shape(params, 50304, seq_len or 1024)
        return config
    return shape_of(model)


def shape_of(name):
    """The GPTConfig of a folder or a Hub model, of which config.json alone is read."""
    if Path(name).is_dir() or not is_hub_name(name):
        _, config = read_config(find(name))
        return config
    with tempfile.TemporaryDirectory() as folder:
        url = f"{HUB}{name}/resolve/main/config.json"
        try:
            download(url, Path(folder) / "config.json", tries=1)
        except UserError as error:
            raise UserError(f"{name}: no folder here, and {error}") from None
        _, config = read_config(Path(folder))
        return config


def planned_teacher(s):
    """The empty network of a distillation's teacher; else None."""
    if s.method != "distill":
        return None
    if s.teacher is None:
        raise UserError("--finetune=distill: expected a recipe for finetune.py that sets teacher")
    return empty_network(shape_of(s.teacher))


def planned_examples(method):
    """(how many examples, tokens of one, how that is known)."""
    task_set = {"classify": "classify", "kto": "kto"}
    task_set |= dict.fromkeys(("dpo", "simpo", "orpo", "reward"), "preference")
    path = Path("data") / dataset / f"{task_set.get(method, 'sft')}_train.jsonl"
    if examples and tokens:
        return examples, tokens / examples, "as asked"
    if not path.is_file():
        raise UserError(f"{path}: no such file: prepare it, or give --examples and --tokens")
    lines = path.read_bytes().splitlines() or [b""]
    count = examples or len(lines)
    if tokens:
        return count, max(1, tokens / count), str(path)
    length = sum(len(line) for line in lines) / 4 / len(lines)
    return count, max(1, length), f"{path}, at 4 bytes a token"


def planned_steps(s, count):
    """The steps of a fine-tuning on so many examples: the nearest of its two horizons."""
    steps = s.max_steps or math.inf
    if s.max_epochs:
        steps = min(steps, math.ceil(count / s.batch_size * s.max_epochs))
    if not 0 < steps < math.inf:
        raise UserError("no horizon: set max_steps or max_epochs in a recipe for finetune.py")
    return steps


def make_finetune_plan():
    """Print what a fine-tuning takes, by arithmetic, and a recipe for it."""
    gpu = planned_device()
    s = finetune_settings()
    config = planned_shape()
    count, length, source = planned_examples(s.method)
    net = empty_network(config)
    steps = planned_steps(s, count)
    rollouts = 0  # on each device
    new_tokens = 0
    if s.method in SAMPLING:
        group = 1 if s.method == "ppo" else s.group_size
        rollouts = math.ceil(s.batch_size * group / devices)
        new_tokens = s.max_new_tokens
    length = min(length + new_tokens, s.seq_len or config.n_ctx, config.n_ctx)
    teacher = planned_teacher(s)
    memory = finetune_memory(net, s, length, rollouts, teacher)
    work = finetune_work(net, s, count, length, steps, teacher)
    rate = 1e12 * PEAK_TFLOPS[gpu] * devices * mfu
    seconds = {what: total / rate for what, total in work.items()}
    if rollouts:  # a new token reads the weights and the cache, however few rows there are
        bytes_read = steps * new_tokens * (memory["weights"] + memory["roll-outs"])
        seconds["roll-outs"] = max(seconds["roll-outs"], bytes_read / (1e9 * MEMORY_GBS[gpu]))
    total_seconds = sum(seconds.values())
    learn, _ = learned_weights(net, s)
    shares = ", ".join(f"{what} {size / 2**30:.3g}" for what, size in memory.items())
    times = ", ".join(f"{what} {duration(part)}" for what, part in seconds.items())
    name = f"a network of {params:.3g} parameters" if params else model
    print(f"""\
# A plan for {finetune} of {name}: {n_params(net):,} parameters, {learn:,} learn
# examples: {count:,} of {length:.0f} tokens ({source}); {steps:,} steps of {s.batch_size}
# FLOPs: {", ".join(f"{what} {number:.3g}" for what, number in work.items())}
# time: {duration(total_seconds)} on {devices} {gpu} at {100 * mfu:.0f} % of the peak ({times})
{cost_line(total_seconds)}
# memory of each device: {sum(memory.values()) / 2**30:.3g} GiB ({shares})
# validation, saving and the start are not in it""")
    print_recipe(
        method=s.method,
        adapt=s.adapt,
        model=model,
        dataset=dataset,
        batch_size=s.batch_size,
        max_steps=steps,
        max_epochs=None,
    )


# --------------------------------------------------------------------------------------------------
# A scaling curve through finished runs


def finished(run):
    """(parameters, tokens, last validation loss, settings that the loss depends on) of a run."""
    validations = curve(read_log(run), "val_loss", "tokens")
    if not validations:
        raise UserError(f"{run}: its log has no val_loss with tokens: only train.py's runs fit")
    n = 0
    for path in weights_of(Path(run)):
        for _, shape in entries_of(path).values():
            n += math.prod(shape)
    config = read_json(Path(run) / "run.json", {}).get("config", {})
    if not isinstance(config, dict):
        raise UserError(f"{run}/run.json: malformed: config is no object")
    comparable = {key: config.get(key) for key in ("dataset", "seq_len", "eval_tokens")}
    d, loss = validations[-1]
    return n, d, loss, comparable


def read_finished(runs):
    """(N and D (runs, 2), losses (runs,)) of runs whose losses are comparable."""
    sizes = []
    losses = []
    first = None
    differ = []
    for run in runs:
        n, d, loss, comparable = finished(run)
        sizes.append([n, d])
        losses.append(loss)
        first = first or comparable
        differ += [key for key in first if comparable[key] != first[key] and key not in differ]
    if differ:
        raise UserError(f"the runs differ in {', '.join(differ)}: their losses are not comparable")
    return np.array(sizes, float), np.array(losses)


def fit_runs():
    """Fit a scaling curve through the last validation losses of `compare`; print how well, and
    draw it."""
    runs = runs_to_compare()
    if len(runs) < 3:
        raise UserError(f"a scaling curve needs 3 runs or more, not {len(runs)}")
    sizes, losses = read_finished(runs)
    varies = [k for k in (0, 1) if len(set(sizes[:, k])) > 1]  # 0: N, 1: D
    if not varies:
        raise UserError("the runs are all of one size and length: nothing to fit")
    if len(runs) < 2 + len(varies):
        raise UserError(f"{len(runs)} runs that differ in N and D: expected 4 or more")
    powers = None  # free, if there are more runs than numbers to find
    if len(runs) <= 1 + 2 * len(varies):
        powers = [(ALPHA, BETA)[k] for k in varies]  # Chinchilla's

    def fitted(those):
        if powers is None:
            return fit_law(sizes[those][:, varies], losses[those])
        return fit_powers(sizes[those][:, varies], losses[those], powers)

    law = fitted(np.arange(len(runs)))
    guesses = []  # of each run, by the law of the others
    for i in range(len(runs)):
        others = np.delete(np.arange(len(runs)), i)
        guesses.append(fitted(others).predict(sizes[i, varies]))
    terms = [f"{law.offset:.4f}"]
    for k, factor, power in zip(varies, law.factors, law.powers):
        terms.append(f"{factor:.4g} / {'ND'[k]}^{power:.3f}")
    formula = " + ".join(terms)
    print_fit(runs, sizes, losses, law.predict(sizes[:, varies]), guesses)
    print(f"L = {formula}, in nats per token of this data")
    held_powers = "" if powers is None else "; exponents held at Chinchilla's for want of runs"
    print(f"fitted to {len(runs)} runs; rms error {law.error:.4f}{held_powers}")
    off = np.abs(np.array(guesses) - losses)
    print(f"a run is predicted by the others {off.mean():.4f} off, {off.max():.4f} at worst")
    far = law.predict(10 * sizes[:, varies].max(0))
    print(f"at ten times the largest {far:.3f}, a guess: E and the exponents trade off")
    chart = law_chart(sizes, losses, law, varies, f"validation loss and L = {formula}")
    write_report(Path(report).parent / "scaling.svg", picture([chart]))


def print_fit(runs, sizes, losses, fitted, guesses):
    """The table of runs: what they came to, and what the law says of them."""
    rows = [["run", "parameters N", "tokens D", "val_loss", "fitted", "predicted by the others"]]
    for i, run in enumerate(runs):
        row = [run, f"{int(sizes[i, 0]):,}", f"{int(sizes[i, 1]):,}"]
        row += [f"{loss:.4f}" for loss in (losses[i], fitted[i], guesses[i])]
        rows.append(row)
    print("\n".join([*table(rows), ""]))


def law_chart(sizes, losses, law, varies, title):
    """The chart of a law over the first size that varies; where both do, a curve for each value of
    the other."""
    x = varies[0]
    others = sorted(set(sizes[:, 1 - x]))
    along = np.geomspace(sizes[:, x].min() / 1.2, sizes[:, x].max() * 3, 60)
    all_series = []
    for colour, other in enumerate(others):
        drawn = np.full((60, 2), other)
        drawn[:, x] = along
        points = list(zip(along, law.predict(drawn[:, varies])))
        name = "fit"
        if len(others) > 1:
            name = f"{'DN'[x]} = {short(float(f'{other:.3g}'))}"
        dots = [(size[x], loss) for size, loss in zip(sizes, losses) if size[1 - x] == other]
        all_series.append(Series(name, colour, "thin", points))
        all_series.append(Series("", colour, "dots", dots))
    return Chart(title, ("parameters", "tokens")[x], all_series)


# --------------------------------------------------------------------------------------------------
# Memorized: generated text that stands word for word in the training shards


def check_memorized(net):
    """Refuse lengths that no measurement has."""
    if text_length < ngram:
        raise UserError(f"text_length={text_length}: expected {ngram} (ngram) or more")
    if prompt_length + text_length > net.config.n_ctx:
        raise UserError(f"prompt_length + text_length: over {net.config.n_ctx}, the context")


def open_shards(folder, tok):
    """(training shards, validation shards) of a prepared folder, whose ids are this tokenizer's."""
    shards = {}
    for split in ("train", "val"):
        shards[split] = {path: open_shard(path) for path in sorted(folder.glob(f"{split}_*.bin"))}
    if not all(any(len(shard) for shard in split.values()) for split in shards.values()):
        why = "no train and val shards with tokens in them"
        raise UserError(f"{folder}: {why}: {command_of('prepare')} --dataset={dataset}")
    theirs = Tokenizer.from_folder(folder)
    if (theirs.bytes, theirs.eot_id) != (tok.bytes, tok.eot_id):
        raise UserError(f"{folder} and {model} have different tokenizers")
    for path, shard in (shards["train"] | shards["val"]).items():
        check_tokens(shard, tok.n_vocab, path)
    return list(shards["train"].values()), list(shards["val"].values())


def continued(net, tok, prompts, temperature):
    """What the model writes behind each prompt, an array of text_length ids or fewer."""
    texts = []
    for i in range(0, len(prompts), 32):  # so many at once
        generations = generate(
            net,
            tok,
            prompts[i : i + 32],
            max_new_tokens=text_length,
            temperature=temperature,
            seed=seed + i,
        )
        texts += [np.array(generation.ids, np.int64) for generation in generations]
    return texts


def pieces(shards, length):
    """The shards cut into pieces of `length` tokens, the last of each shorter."""
    return [shard[i : i + length] for shard in shards for i in range(0, len(shard), length)]


def row_of_texts(name, texts, hits, runs):
    """(a row of the table, (share of n-grams that stand in training, its standard error)) of texts,
    from what `longest_runs` gave of each."""
    long_enough = [h for h in hits if len(h)] or [np.zeros(1)]  # others hold no n-gram
    share, error = mean([h.sum() for h in long_enough], [len(h) for h in long_enough])
    row = [name, len(texts), sum(len(text) for text in texts)]
    row += [f"{np.median(runs):g}", f"{np.mean(runs):.1f}", max(runs)]
    row.append(f"{share:.4f} ± {error or 0:.4f}")
    return row, (share, error)


def measure_memorized(net, tok, say):
    """Generate with prompts from training and without, and look the texts up in the training
    shards, validation text beside them: {score: (value, standard error)}, shares of n-grams and of
    texts reproduced."""
    folder = Path("data") / dataset
    train, val = open_shards(folder, tok)
    begin, end = document_layout(folder, tok)
    windows = draw_windows(
        train, prompt_length + text_length, num_texts, [*begin, *end], seed, folder
    )
    prompts = [window[:prompt_length].tolist() for window in windows]
    no_prompt = [*end, *begin][-1:]  # what stands before any document
    n_validation = max(num_texts, (1 << 24) // text_length**2)  # 75 MB of trie
    texts = {
        "prompted by training": continued(net, tok, prompts, temperature=0),
        "without a prompt": continued(net, tok, [no_prompt] * num_texts, temperature=1),
        "validation text": pieces(val, text_length)[:n_validation],
    }
    hits, runs = longest_runs(train, [t for kind in texts.values() for t in kind], ngram)
    head = ["text", "texts", "tokens", "longest run: median", "mean", "most"]
    rows = [[*head, f"{ngram}-grams found"]]
    scores = {}
    first = 0  # of the texts of a kind among all
    for name, kind in texts.items():
        last = first + len(kind)
        row, share = row_of_texts(name, kind, hits[first:last], runs[first:last])
        rows.append(row)
        scores[f"{name}, share of {ngram}-grams"] = share
        first = last
    reproduced = []
    for text, window in zip(texts["prompted by training"], windows):
        reproduced.append(np.array_equal(text, window[prompt_length:]))
    say(f"{model} against {sum(len(shard) for shard in train):,} training tokens of {folder}")
    say("\n".join(table(rows)))
    say(
        f"{sum(reproduced)} of {num_texts} continuations of {prompt_length} training tokens go on "
        f"as training does, word for word, for {text_length} tokens"
    )
    scores["reproduced"] = mean(reproduced)
    return scores


def show_memorized():
    """Measure what the model has memorized; print it, and add it to results.json."""
    for key in ("num_texts", "prompt_length", "text_length", "ngram"):
        if globals()[key] < 1:
            raise UserError(f"{key}={globals()[key]}: expected 1 or more")
    run = setup(device, threads=threads)
    run.threads.note()
    compute_dtype, _ = choose_dtype(run.device, dtype)
    net, tok = load(model, run.device, compute_dtype, quantize)
    if net.score is not None:
        raise UserError(f"{model} with --memorized: it is a classifier, which writes no text")
    if out_dir == "":
        raise UserError("--out_dir is empty: expected the name of a folder")
    folder = Path(out_dir or model)
    if not out_dir and not folder.is_dir():
        raise UserError(f"{model}: no folder here to write results.json into: give --out_dir")
    make_folder(folder)
    mark = model_mark(model, compute_dtype, quantize)
    mark_before, results = read_results(folder)
    if mark_before != mark:  # of another model: not to be mixed with this one's
        results = {}
    check_memorized(net)

    def say(line):
        if run.is_main:
            print(line, flush=True)

    begun = time.monotonic()
    with torch.inference_mode(), generating(net):
        scores = measure_memorized(net, tok, say)
    entry = flat(scores) | {"n": num_texts, "seconds": round(time.monotonic() - begun, 3)}
    results["memorized"] = entry | {"settings": settings(globals())}
    if run.is_main:
        write_results(folder, model, mark, results)
    for key in entry:
        words = score_words(entry, key)
        if words and not key.endswith("_stderr"):
            say(f"memorized.{key}: {words}")
    say(f"results: {folder / 'results.json'}")


# --------------------------------------------------------------------------------------------------
# The run


def main():
    if not (compare or plan or memorized):
        raise UserError("nothing to do: expected --compare, --plan or --memorized")
    if memorized:
        if compare or plan:
            raise UserError("--memorized: expected no --compare and no --plan beside it")
        show_memorized()
    elif not plan:
        compare_runs()
    elif compare:
        if any((flops, hours, money, params, tokens, finetune)):
            raise UserError("--plan: either --compare, to fit a curve, or a budget, for a recipe")
        fit_runs()
    elif finetune:
        make_finetune_plan()
    else:
        make_plan()


if __name__ == "__main__":
    if sys.stdout is not None:  # closed by whoever started this
        sys.stdout.reconfigure(errors="backslashreplace")  # names of runs and tasks may be anything
    main()
