"""Pre-training: token shards in, a checkpoint that is a Hugging Face folder out.

    python train.py                                   # the default: data/python -> out/python
    python train.py config/shakespeare.py             # a recipe; config/ holds them
    python train.py --init_from=resume                # goes on, bit for bit, where the run stopped
    torchrun --nproc_per_node=8 train.py config/small.py

Writes out_dir/: the checkpoint, best/ (the lowest validation loss), state.pt (to resume), log.jsonl,
run.json. Ctrl-C and SIGTERM save and exit.
"""

from config import configure, settings

# data and run
dataset = "python"  # data/<dataset>, made by prepare.py
out_dir = "out/python"  # where the run is written
init_from = "scratch"  # scratch, resume, auto (resume if there is a run), or a checkpoint folder
overwrite = False  # let scratch replace the run that out_dir holds
seed = 0  # of the weights, the order of the data and dropout

# the network (model.GPTConfig says what each means); 0 is the usual value
n_layer = 4  # blocks
n_head = 4  # attention heads
n_kv_head = 2  # heads of keys and values (grouped-query attention); 0: n_head
n_embd = 256  # width
head_dim = 0  # width of a head; 0: n_embd / n_head
n_hidden = 0  # width of the MLP; 0: 8/3 n_embd for swiglu, else 4 n_embd
norm = "rms"  # rms or layer
norm_place = "pre"  # pre, post or both
norm_eps = 1e-6  # added to the variance
qk_norm = True  # normalize queries and keys
qkv_bias = False  # biases in q, k and v alone
bias = False  # biases everywhere
pos = "rope"  # rope, learned, sinusoidal or none
rope_theta = 10000.0  # base of the rotary frequencies
rope_scaling: dict | None = None  # Hugging Face's dict, for a longer context
mlp = "swiglu"  # swiglu, gelu, relu or relu2
tie = True  # share the embedding with the head
dropout = 0.0  # on the embedding, attention and what each block adds
init = "scaled"  # scaled (GPT-2's), xavier or he

# the batch: one number; micro-batch and accumulation follow from it
batch_tokens = 8192  # tokens per optimizer step, over all processes
seq_len = 256  # tokens of a window, and the model's context
micro_batch = 0  # windows at once on a device, at most; 0: as many as fit its memory
document_mask = False  # attend within a document only

# how long: the first of these that is reached ends the run
max_steps: int | None = 400  # optimizer steps
max_tokens: int | None = None  # tokens
max_epochs: float | None = None  # passes over the data
max_minutes: float | None = None  # minutes of wall clock, evaluation and compilation included

# the optimizer
optimizer = "muon"  # muon (AdamW for what is no matrix of a block) or adamw
learning_rate = 3e-3  # the peak
lr_schedule = "cosine"  # cosine, linear, or trapezoid (constant, then a linear decay)
warmup_steps = 20  # steps of linear warm-up
min_lr = 0.0  # the last learning rate, as a fraction of the peak
decay_fraction = 0.4  # trapezoid: the part of the run that decays
weight_decay = 0.1  # decoupled, on parameters of two dimensions
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
momentum = 0.95  # Muon's
grad_clip = 1.0  # the largest gradient norm; 0: no clipping

# the machine
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto, float32, bfloat16, float16
compile: bool | None = None  # torch.compile; none: where it pays
checkpoint_blocks = False  # recompute blocks in backward: less memory, a third more time

# looking on
eval_every = 100  # steps between validations
eval_tokens = 262144  # validation tokens each time, always the same; 0: all
save_every = 100  # steps between checkpoints
sample_tokens = 48  # tokens of the sample at each validation; 0: none
sample_prompt = ""  # its prompt
tensorboard = False  # also log for TensorBoard, into out_dir
wandb_project: str | None = None  # also log to Weights & Biases

if __name__ == "__main__":
    configure(globals())

import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import model
from model import UserError

BAD_STEPS = 5  # non-finite steps in a row that end a run

# ---------------------------------------------------------------------------------------------------
# Data: windows of token shards, in an order that is a pure function


def open_shard(path):
    """The tokens of an llm.c .bin shard, as a memory map (N,) uint16 or uint32."""
    header = np.fromfile(path, dtype="<i4", count=256)
    kinds = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
    kind = kinds.get(tuple(header[:2].tolist()))
    if len(header) < 256 or kind is None:
        raise UserError(f"{path}: not a token shard (python prepare.py makes them)")
    if os.path.getsize(path) != 1024 + int(header[2]) * kind.itemsize:
        raise UserError(
            f"{path}: cut short: its header promises {header[2]} tokens; prepare it again"
        )
    return np.memmap(path, dtype=kind, mode="r", offset=1024, shape=(int(header[2]),))


class Windows:
    """Windows of seq_len tokens from shards. Position i of the one global sequence is window
    permutation(seed, epoch)[i mod n] of epoch i // n: the number of windows consumed is its state."""

    def __init__(self, paths, seq_len, seed=0, partial=False):
        """partial: the last window of a shard may be short, so that every token is a target once."""
        self.shards, self.seq_len, self.seed = [open_shard(p) for p in paths], seq_len, seed
        count = lambda s: max(
            0, -(-(len(s) - 1) // seq_len) if partial else (len(s) - 1) // seq_len
        )
        self.ends = np.cumsum([count(s) for s in self.shards])
        self.n, self.order = int(self.ends[-1]) if len(paths) else 0, {}

    def window(self, i):
        """Window i: (inputs, targets) int64 (seq_len,), the targets -100 past the shard's end."""
        s = int(np.searchsorted(self.ends, i, side="right"))
        first = (i - (int(self.ends[s - 1]) if s else 0)) * self.seq_len
        tokens = self.shards[s][first : first + self.seq_len + 1].astype(np.int64)
        missing = self.seq_len + 1 - len(tokens)
        return np.pad(tokens[:-1], (0, missing)), np.pad(
            tokens[1:], (0, missing), constant_values=-100
        )

    def at(self, position):
        """The window at a position of the global sequence."""
        epoch, i = divmod(position, self.n)
        if epoch not in self.order:
            self.order = {epoch: np.random.default_rng([self.seed, epoch]).permutation(self.n)}
        return int(self.order[epoch][i])

    def batch(self, indices, device):
        """The windows of these indices: (ids, targets) int64 (len(indices), seq_len)."""
        pairs = [self.window(i) for i in indices]
        both = torch.from_numpy(np.stack([np.stack(column) for column in zip(*pairs)]))
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        return both[0], both[1]


def open_dataset():
    """(tokenizer, training windows, validation windows, a hash that names the data)."""
    folder = Path("data") / dataset
    if not (folder / "meta.json").is_file():
        raise UserError(
            f"{folder}: no prepared data here: run python prepare.py --dataset={dataset} first"
        )
    tok = model.Tokenizer.from_folder(folder)
    train = Windows(sorted(folder.glob("train_*.bin")), seq_len, seed)
    if train.n == 0:
        raise UserError(
            f"{folder}: no window of {seq_len + 1} training tokens: lower --seq_len or add text"
        )
    val = Windows(sorted(folder.glob("val_*.bin")), seq_len, partial=True)
    digest = hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()
    return tok, train, val, digest


# ---------------------------------------------------------------------------------------------------
# The batch, the horizon and the schedule


def split_batch(world, fits):
    """(windows per step, per process, per micro-batch); fits: windows that a device's memory holds."""
    unit = seq_len * world
    if batch_tokens < unit or batch_tokens % unit:
        near = f"{batch_tokens // unit * unit or unit} or {-(-batch_tokens // unit) * unit}"
        near = str(unit) if batch_tokens < unit else near
        raise UserError(
            f"batch_tokens={batch_tokens} is not a multiple of seq_len={seq_len} x {world} processes: use {near}"
        )
    rows = batch_tokens // seq_len
    limit = micro_batch or max(1, fits)
    micro = max(d for d in range(1, rows // world + 1) if rows // world % d == 0 and d <= limit)
    return rows, rows // world, micro


def progress_at(step, tokens, windows_per_epoch, seconds):
    """The part of the run that is done, 0 to 1: the largest over the horizons that are set."""
    parts = [
        step / max_steps if max_steps else 0.0,
        tokens / max_tokens if max_tokens else 0.0,
        tokens / (seq_len * windows_per_epoch * max_epochs) if max_epochs else 0.0,
        seconds / (60 * max_minutes) if max_minutes else 0.0,
    ]
    return min(1.0, max(parts))


def lr_scale(step, progress):
    """The learning rate over its peak: warm-up times a schedule of progress p.

    cosine m + (1 - m)(1 + cos(pi p)) / 2, linear 1 - (1 - m) p, trapezoid 1 until the last
    decay_fraction of the run and then linear to m; m is min_lr.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if lr_schedule == "cosine":
        down = (1 + math.cos(math.pi * progress)) / 2
    elif lr_schedule == "linear":
        down = 1 - progress
    elif lr_schedule == "trapezoid":
        down = min(1.0, (1 - progress) / decay_fraction) if decay_fraction else 1.0
    else:
        raise UserError(f"lr_schedule={lr_schedule}: expected cosine, linear or trapezoid")
    return warm * (min_lr + (1 - min_lr) * down)


# ---------------------------------------------------------------------------------------------------
# The network and its checkpoints


def open_run(run, tok, train, digest):
    """The network, and the state to go on from (None for a new run)."""
    out = Path(out_dir)
    held = (out / "model.safetensors").exists()
    start = init_from if init_from != "auto" else "resume" if held else "scratch"
    fields = {k: globals()[k] for k in model.GPTConfig.__dataclass_fields__ if k in globals()}
    config = model.GPTConfig(vocab_size=-(-tok.n_vocab // 64) * 64, n_ctx=seq_len, **fields)
    if start != "resume" and held and not overwrite:
        raise UserError(
            f"{out} holds a run: --init_from=resume goes on with it, --overwrite replaces it, --out_dir=... keeps it"
        )
    if start == "scratch":
        torch.manual_seed(seed)
        return model.GPT(config), tok, None
    folder = out if start == "resume" else Path(start)
    state = None
    if start == "resume":
        state = model.load_state(folder, finish=run.main)
    net, folder_tok = model.load(folder)
    if folder_tok.spec != tok.spec:
        raise UserError(
            f"data/{dataset} and {folder} have different tokenizers: prepare the data with --tokenizer={folder}"
        )
    if start == "resume":
        differ = [k for k in vars(config) if k not in ("dropout", "init")]
        differ = [k for k in differ if getattr(config, k) != getattr(net.config, k)]
        was = {"data": digest, "seed": seed, "optimizer": optimizer}
        differ += [k for k, v in was.items() if state["settings"][k] != v]
        if differ:
            raise UserError(
                f"{folder}: cannot resume with another {', '.join(differ)}: use the run's own settings "
                f"(run.json has them), or another --out_dir"
            )
    elif seq_len > net.config.n_ctx:
        raise UserError(f"seq_len={seq_len}, but the context of {folder} is {net.config.n_ctx}")
    net.config.dropout = dropout
    return net, folder_tok, state


def cut_log(path, step):
    """Keep the log's rows up to `step`; later or torn ones belong to steps that will be run again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                rows.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with model.whole_file(path) as file:
        file.write("".join(rows).encode())


def run_record():
    """What run.json keeps: the full config, the command, versions, the commit."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {
        "config": settings(globals()),
        "command": " ".join(sys.argv),
        "versions": versions,
        "commit": git.stdout.strip() or None,
    }


# ---------------------------------------------------------------------------------------------------
# Evaluation, and what it says


@torch.no_grad()
def evaluate(net, val, token_bytes, run, cast, rows):
    """(loss in nats per token, bits per byte) over the first eval_tokens of the validation windows,
    each target scored once, shared out over all processes."""
    n = min(val.n, -(-eval_tokens // seq_len)) if eval_tokens else val.n
    total = torch.zeros(3, dtype=torch.float64, device=run.device)
    mine = range(run.rank, n, run.world)
    net.eval()
    for i in range(0, len(mine), rows):
        ids, targets = val.batch(mine[i : i + rows], run.device)
        with cast:
            loss, count = net(ids, targets, docs=documents(ids))
        size = token_bytes[targets.clamp(min=0)][targets >= 0].sum()
        total += torch.stack([loss.double(), count.double(), size.double()])
    net.train()
    if run.world > 1:
        dist.all_reduce(total)
    loss, count, size = total.tolist()
    return loss / max(count, 1), loss / max(size, 1) / math.log(2)


def documents(ids):
    """With document_mask, the document of each token (B, T), counted by end-of-text; else None."""
    return (ids == end_of_text).cumsum(1) if document_mask else None


end_of_text = -1  # the id that starts a document, set by main


def remarks(history):
    """What the validations so far say, in words: [(step, train loss, validation loss)], oldest first."""
    if len(history) < 3:
        return []
    (_, train0, val0), (_, train1, val1), (_, train2, val2) = history[-3:]
    if val2 > val1 > val0 and train2 < train0:
        return [
            "validation loss has risen twice while training loss fell: over-fitting; best/ has the best"
        ]
    if val2 > 1.5 * min(val for *_, val in history):
        return ["the loss is half as much again as its best: exploding; lower learning_rate"]
    if abs(val0 - val2) < 2e-3 * val0:
        return ["validation loss has moved by less than 0.2 % in two validations: a plateau"]
    return []


def show_sample(net, tok, cast):
    with cast:
        start = sample_prompt or ([tok.bos_id] if tok.bos_id is not None else tok.decode([0]))
        [g] = model.generate(
            net, tok, [start], max_new_tokens=sample_tokens, temperature=0.8, top_k=50
        )
    return "  | " + (sample_prompt + g.text).replace("\n", "\n  | ")


class Trackers:
    """TensorBoard and Weights & Biases, where asked for."""

    def __init__(self):
        self.writer = self.wandb = None
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(out_dir)
            if wandb_project:
                import wandb

                self.wandb = wandb.init(
                    project=wandb_project, name=out_dir, config=settings(globals())
                )
        except ImportError as error:
            raise UserError(
                f"{error.name} is not installed: pip install {error.name}, or leave it off"
            ) from None

    def __call__(self, row):
        for key, value in row.items():
            if self.writer and key != "step" and value is not None:
                self.writer.add_scalar(key, value, row["step"])
        if self.wandb:
            self.wandb.log(row, step=row["step"])


# ---------------------------------------------------------------------------------------------------
# The loop


def main():
    global end_of_text
    run = model.setup(device)
    say = print if run.main else lambda *_, **__: None
    progress = model.Progress() if run.main else lambda *_, **__: None
    if not any((max_steps, max_tokens, max_epochs, max_minutes)):
        raise UserError("no horizon: set max_steps, max_tokens, max_epochs or max_minutes")
    lr_scale(0, 0.0)  # refuses an unknown schedule
    tok, train, val, digest = open_dataset()
    end_of_text = tok.bos_id if tok.bos_id is not None else -1
    net, tok, state = open_run(run, tok, train, digest)
    net.to(run.device).train()
    net.checkpoint = checkpoint_blocks
    c = net.config
    kind, why = model.choose_dtype(run.device, dtype, c.n_embd)
    cast = model.autocast(run.device, kind)
    scaler = torch.amp.GradScaler(run.device.type) if kind == torch.float16 else None

    params = model.n_params(net)
    weights, row = model.memory_estimate(
        c, params, 1, seq_len, kind, checkpoint_blocks, 2 if optimizer == "adamw" else 1
    )
    free = model.free_memory(run.device) / (1 if run.device.type == "cuda" else run.world)
    fits = int((0.8 * free - weights) / row)
    if run.device.type == "cpu":
        fits = min(fits, max(1, 4096 // seq_len))  # more at once is no faster on a CPU
    rows, share, micro = split_batch(run.world, fits)
    peak, flops = model.peak_flops(run.device), model.flops_per_token(c, seq_len)
    say(
        f"model: {model.family(c)}, {params:,} parameters, {c.n_layer} layers of width {c.n_embd}, context {c.n_ctx}"
    )
    say(
        f"batch: {batch_tokens:,} tokens = {run.world} process(es) x {share // micro} micro-batch(es) x {micro} "
        f"window(s) x {seq_len} tokens; {train.n:,} windows ({train.n * seq_len:,} tokens) an epoch"
    )
    say(
        f"memory: about {(weights + row * micro) / 2**30:.2f} GiB a process, {free / 2**30:.1f} GiB free"
    )
    say(f"device: {run.device}; computing in {str(kind).removeprefix('torch.')} ({why})")

    optimizers = model.make_optimizer(
        net, optimizer, learning_rate, weight_decay, (beta1, beta2), momentum
    )
    step = windows = bad = 0
    seconds, best, history = 0.0, math.inf, []
    if state:
        step, windows, seconds = state["step"], state["windows"], state["seconds"]
        best, history = state["best"], [tuple(h) for h in state["history"]]
        for o, s in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(s)
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        say(f"resumed {out_dir} at step {step}")

    out = Path(out_dir)
    log, trackers = None, lambda row: None
    if run.main:
        out.mkdir(parents=True, exist_ok=True)
        if not state:
            for old in ("state.pt", "state.pt.tmp", "model.safetensors"):
                (out / old).unlink(missing_ok=True)
        cut_log(out / "log.jsonl", step if state else -1)
        model.write_json(out / "run.json", run_record())
        log, trackers = open(out / "log.jsonl", "a", encoding="utf-8"), Trackers()

    def record(row):
        if run.main:
            log.write(json.dumps(row) + "\n")
            log.flush()
            trackers(row)

    wrap = lambda n: (
        DistributedDataParallel(n, gradient_as_bucket_view=True) if run.world > 1 else n
    )
    forward = wrap(net)
    sizes = [len(tok.token_bytes(i)) for i in range(c.vocab_size)]
    token_bytes = torch.tensor(sizes, device=run.device)

    def micro_step(ids, targets, last):
        """Forward and backward; the loss sum. Gradients are of the loss over the global batch's mean."""
        quiet = forward.no_sync() if run.world > 1 and not last else nullcontext()
        with quiet:
            with cast:
                loss, _ = forward(ids, targets, docs=documents(ids))
            scaled = loss * (run.world / batch_tokens)  # DDP divides by the number of processes
            (scaler.scale(scaled) if scaler else scaled).backward()
        return loss.detach()

    pays = run.device.type == "cuda" or c.n_embd >= 384 and (max_steps or 1000) >= 200
    if compile or (compile is None and pays):
        say("compiling the forward and backward pass ...", flush=True)
        begun = time.monotonic()
        plain, forward = forward, wrap(torch.compile(net))
        try:
            ids, targets = train.batch([0] * micro, run.device)
            micro_step(ids, targets, last=False)
            failed = None
        except Exception as error:  # no compiler on this machine, or one that fails: run without
            failed = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
        net.zero_grad(set_to_none=True)
        if agreed(run, [float(failed is not None)])[0]:
            forward = plain
            say(f"compile: off, since it failed: {failed or 'on another process'}")
        else:
            say(f"compile: on, after {model.duration(time.monotonic() - begun)}")
    elif compile is None:
        say("compile: off, since it gains little at this size on a CPU (--compile turns it on)")

    caught = []  # signals received

    def on_signal(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, on_signal)

    def checkpoint(folder=out, full=True):
        if run.main:
            state = {
                "windows": windows,
                "seconds": seconds,
                "best": best,
                "history": [list(h) for h in history],
                "optimizers": [o.state_dict() for o in optimizers],
                "scaler": scaler.state_dict() if scaler else None,
                "settings": {"data": digest, "seed": seed, "optimizer": optimizer},
            }
            model.save(folder, net, tok, step, state if full else None)

    start, last_row, mean_loss = time.monotonic() - seconds, {}, math.nan
    done = progress_at(step, windows * seq_len, train.n, seconds)
    tick = time.monotonic()
    while done < 1:
        torch.manual_seed((seed * 1_000_003 + step) * 65_537 + run.rank)
        scale = lr_scale(step, done)
        for g in (g for o in optimizers for g in o.param_groups):
            g["lr"] = g["initial_lr"] * scale
        mine = [train.at(windows + i) for i in range(run.rank, rows, run.world)]
        total = torch.zeros((), device=run.device)
        for i in range(0, share, micro):
            ids, targets = train.batch(mine[i : i + micro], run.device)
            total += micro_step(ids, targets, last=i + micro == share)
        for o in optimizers if scaler else ():
            scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
        # The one exchange of a step: loss sum, targets, stop flag, rank 0's clock, and the norm.
        seconds = time.monotonic() - start
        mine = [total, share * seq_len, float(bool(caught)), seconds if run.main else 0.0]
        loss, count, stop, seconds, norm = agreed(run, mine, norm)
        loss, ok = loss / count, math.isfinite(loss) and math.isfinite(norm)
        if ok:
            for o in optimizers:
                o.step()
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        if scaler:
            scaler.update()
        bad = 0 if ok else bad + (scaler is None or scaler.get_scale() < 2)
        step, windows = step + 1, windows + rows
        tokens = windows * seq_len
        before, done = done, progress_at(step, tokens, train.n, seconds)
        mean_loss = (
            loss if mean_loss != mean_loss else 0.9 * mean_loss + 0.1 * loss if ok else mean_loss
        )
        tick, dt = time.monotonic(), time.monotonic() - tick
        mfu = flops * batch_tokens / dt / (peak * run.world) if peak else None
        last_row = {
            "step": step,
            "tokens": tokens,
            "loss": loss if ok else None,
            "lr": learning_rate * scale,
            "grad_norm": norm if math.isfinite(norm) else None,
            "dt": dt,
            "tok_s": batch_tokens / dt,
            "mfu": mfu,
            "mem": memory_used(run.device),
        }
        record(last_row)
        left = seconds * (1 - done) / done
        progress(
            f"step {step} ({100 * done:.0f} %)  loss {loss:.4f}  lr {last_row['lr']:.2e}  norm {norm:.2f}  "
            f"{last_row['tok_s']:,.0f} tok/s  mfu {f'{100 * mfu:.1f} %' if mfu else 'n/a'}  "
            f"mem {last_row['mem'] / 2**30:.2f} GiB  left {model.duration(left)}"
        )
        if not ok:
            say(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: update skipped")
        if bad >= BAD_STEPS:
            raise UserError(
                f"{bad} steps in a row were not finite: lower learning_rate ({learning_rate:g}), raise "
                f"warmup_steps ({warmup_steps}), or use --dtype=float32; {out_dir} keeps the last checkpoint"
            )
        ended = done >= 1 or stop
        if val.n and (step % eval_every == 0 or done >= 1):
            val_loss, bpb = evaluate(net, val, token_bytes, run, cast, micro)
            ppl = math.exp(min(val_loss, 700))
            evaluation = {
                "step": step,
                "tokens": tokens,
                "val_loss": val_loss,
                "val_ppl": ppl,
                "val_bpb": bpb,
            }
            record(evaluation)
            last_row = last_row | evaluation
            history.append((step, mean_loss, val_loss))
            if run.main:
                progress.note(
                    f"step {step}: val_loss {val_loss:.4f}  val_ppl {ppl:.2f}  val_bpb {bpb:.4f}"
                )
                for remark in remarks(history):
                    progress.note(f"note: {remark}")
                if sample_tokens and not ended:
                    progress.note(show_sample(net, tok, cast))
            if val_loss < best:
                best = val_loss
                checkpoint(out / "best", full=False)
        if step % save_every == 0 or ended:
            checkpoint()
        tick = time.monotonic()
        if stop and done < 1:
            say(f"\nstopped at step {step}: saved in {out_dir}; --init_from=resume goes on")
            break
    if run.main and last_row:
        print(f"\nsaved in {out_dir}")
        for key, value in last_row.items():
            print(
                f"{key}: {'n/a' if value is None else f'{value:.6g}' if isinstance(value, float) else value}"
            )
    elif run.main:
        print(f"nothing to do: {out_dir} is at its horizon (step {step}); raise max_steps to go on")
    if run.world > 1:
        dist.destroy_process_group()
    if caught and done < 1:
        sys.exit(128 + caught[0])


def agreed(run, mine, norm=None):
    """`mine` summed over all processes, as floats, with `norm` (the same on all) behind: one sync."""
    parts = [v.double() if torch.is_tensor(v) else v for v in mine]
    vector = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=run.device) for v in parts]
    )
    if run.world > 1:
        dist.all_reduce(vector)
    return (vector if norm is None else torch.cat([vector, norm.double()[None]])).tolist()


def memory_used(device):
    """The largest memory that this process has held, in bytes: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def out_of_memory(error):
    """Whether an exception says that the device's memory is full."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(
        error
    )


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: lower micro_batch (now {micro_batch or 'by memory'}), lower seq_len (now "
            f"{seq_len}), or set checkpoint_blocks (now {checkpoint_blocks})"
        ) from None
