"""Pre-training: token shards in, a checkpoint that is a Hugging Face folder out.

    python train.py                                   # the default: data/python -> out/python
    python train.py config/shakespeare.py             # a recipe; config/ holds them
    python train.py --init_from=resume                # goes on, bit for bit, where the run stopped
    torchrun --nproc_per_node=8 train.py config/small.py

Writes out_dir/: the checkpoint, best/ (the lowest validation loss), state.pt (to resume),
log.jsonl, run.json. Ctrl-C and SIGTERM save and exit.
"""

from config import configure, same_recipes, settings

# data and run
dataset = "python"  # data/<dataset>, made by prepare.py
out_dir = "out/python"  # where the run is written
init_from = "scratch"  # scratch, resume, auto (resume if there is a run), or a checkpoint folder
overwrite = False  # let scratch replace the run that out_dir holds
seed = 0  # of the weights, the order of the data and dropout

# the network (model.GPTConfig says what each means); 0 is the usual value
n_layer = 4  # blocks
n_head = 3  # attention heads
n_kv_head = 1  # heads of keys and values (grouped-query attention); 0: n_head
n_embd = 192  # width
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
batch_tokens = 4096  # tokens per optimizer step, over all processes
seq_len = 256  # tokens of a window, and the model's context
stride = 0  # tokens from one training window to the next; 0: seq_len; less: they overlap
micro_batch = 0  # windows at once on a device, at most; 0: as many as fit its memory
document_mask = False  # attend within a document only

# how long: the first of these that is reached ends the run
max_steps: int | None = 300  # optimizer steps; 0: write the untrained model
max_tokens: int | None = None  # tokens
max_epochs: float | None = None  # passes over the data
max_minutes: float | None = None  # minutes of wall clock, evaluation and compilation included

# the optimizer
optimizer = "muon"  # muon (AdamW for what is no matrix of a block) or adamw
learning_rate = 5e-3  # the peak
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
eval_tokens = 131072  # validation tokens each time, always the same; 0: all
save_every = 100  # steps between checkpoints
sample_tokens = 48  # tokens of the sample at each validation; 0: none
sample_prompt = ""  # its prompt
tensorboard = False  # also log for TensorBoard, into out_dir
wandb_project: str | None = None  # also log to Weights & Biases

if __name__ == "__main__":
    configure(globals())

import hashlib
import math
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import model
from barelm import checkpoint, resume
from barelm.checkpoint import load, refuse_source
from barelm.families import family
from barelm.files import write_json
from barelm.optim import (
    flops_per_token,
    free_memory,
    make_optimizer,
    memory_estimate,
    n_params,
    peak_flops,
)
from barelm.resume import (
    COMPANIONS,
    changed_settings,
    check_parts,
    check_rows,
    check_state,
    clear_folder,
    holds_model,
    locked_folder,
    open_log,
    refuse_changes,
    restore_optimizers,
    say_changes,
    weights_step,
    write_row,
)
from barelm.run import (
    Progress,
    UserError,
    autocast,
    check_gradient,
    check_moved,
    choose_dtype,
    duration,
    lost_process,
    setup,
    weight_sums,
)
from barelm.shards import check_tokens, document_layout, open_shard
from barelm.tokenizer import Tokenizer

SHAPE = [key for key in model.GPTConfig.__dataclass_fields__ if key in globals()]
# A resume with another of these would draw another curve: of another network, on other windows, in
# another order, of another loss. Any other change is told, but for what shapes nothing, or
# only by what it comes to, which a part's facts have (ASIDE).
FIXED = [key for key in SHAPE if key != "dropout"]
FIXED += ["seq_len", "stride", "document_mask", "seed", "optimizer", "dataset"]
ASIDE = """out_dir init_from overwrite device dtype compile micro_batch checkpoint_blocks eval_every
save_every sample_tokens sample_prompt tensorboard wandb_project""".split()
BAD_STEPS = 5  # non-finite steps in a row that end a run
COMPILE_FLOPS = 1e14  # a process's work from which compiling pays on a CPU (30 s, and 20 % faster)

# --------------------------------------------------------------------------------------------------
# Data: windows of token shards, in an order that is a pure function


class Windows:
    """Windows of seq_len tokens from shards, in one global sequence: position i is window
    permutation(seed, epoch)[i mod n] of epoch i // n. How many were consumed is all its state.
    A window begins every `stride` tokens (0: every seq_len).
    partial: the last window of a shard may be short, so that every token is a target once.
    n_vocab: a batch with an id from here on is refused, by its shard's name (0: not looked at)."""

    def __init__(self, paths, seq_len, seed=0, partial=False, stride=0, n_vocab=0):
        self.shards, self.seq_len, self.seed = [open_shard(p) for p in paths], seq_len, seed
        self.stride, self.paths, self.n_vocab = stride or seq_len, list(paths), n_vocab
        tokens = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        spare = tokens - 1 - seq_len + partial * (seq_len - 1)  # behind the first window
        self.ends = np.cumsum(np.maximum(spare + self.stride, 0) // self.stride)
        self.n, self.order = int(self.ends[-1]) if paths else 0, {}

    def window(self, i):
        """Inputs and targets (seq_len + 1,) int64 of window i, -100 past the shard's end."""
        s = int(np.searchsorted(self.ends, i, side="right"))
        first = (i - (int(self.ends[s - 1]) if s else 0)) * self.stride
        out = np.full(self.seq_len + 1, -100, dtype=np.int64)
        tokens = self.shards[s][first : first + self.seq_len + 1]
        out[: len(tokens)] = tokens
        return out

    def at(self, position):
        """The window at a position of the global sequence."""
        epoch, i = divmod(position, self.n)
        if epoch not in self.order:
            self.order = {epoch: np.random.default_rng([self.seed, epoch]).permutation(self.n)}
        return int(self.order[epoch][i])

    def batch(self, indices, device):
        """The windows of these indices: (ids, targets) int64 (len(indices), seq_len)."""
        windows = np.stack([self.window(i) for i in indices])
        if self.n_vocab and windows.max() >= self.n_vocab:  # on the host: no device has to wait
            for i, window in zip(indices, windows):
                shard = int(np.searchsorted(self.ends, i, side="right"))
                check_tokens(window, self.n_vocab, self.paths[shard])
        both = torch.from_numpy(windows)
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        return both[:, :-1].clamp(min=0), both[:, 1:].contiguous()


def open_dataset():
    """(tokenizer, training windows, validation windows, {source: its validation windows} of a mix,
    a hash that names the data)."""
    folder = Path("data") / dataset
    if not (folder / "meta.json").is_file():
        of = same_recipes() or ("" if dataset == "python" else "--source=... ")
        make = f"python prepare.py {of}--dataset={dataset}"
        raise UserError(f"{folder}: no prepared data: {make} first")
    tok = Tokenizer.from_folder(folder)
    shards, n_vocab = sorted(folder.glob("train_*.bin")), tok.n_vocab
    train = Windows(shards, seq_len, seed, stride=stride, n_vocab=n_vocab)
    if train.n == 0:
        raise UserError(f"{folder}: under {seq_len + 1} training tokens: lower --seq_len")
    val = Windows(sorted(folder.glob("val_*.bin")), seq_len, partial=True, n_vocab=n_vocab)
    names = sorted({path.name[4:].rpartition("_")[0] for path in folder.glob("val.*.bin")})
    apart = {name: sorted(folder.glob(f"val.{name}_*.bin")) for name in names}
    for name, paths in apart.items():
        apart[name] = Windows(paths, seq_len, partial=True, n_vocab=n_vocab)
    digest = hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()
    return tok, train, val, apart, digest


# --------------------------------------------------------------------------------------------------
# The batch, the horizon and the schedule


def split_batch(world, fits):
    """(windows per step, per process, per micro-batch), where `fits` windows fit the memory."""
    unit = seq_len * world
    if batch_tokens < unit or batch_tokens % unit:
        near = sorted({max(1, batch_tokens // unit) * unit, -(-batch_tokens // unit) * unit})
        raise UserError(
            f"batch_tokens={batch_tokens}: expected a multiple of seq_len={seq_len} x {world} "
            f"processes, such as {' or '.join(map(str, near))}"
        )
    share, limit = batch_tokens // unit, micro_batch or max(1, fits)
    micro = max(d for d in range(1, share + 1) if share % d == 0 and d <= limit)
    return share * world, share, micro


def progress_at(step, tokens, windows_per_epoch, seconds):
    """The part of the run that is done, 0 to 1: the largest over the horizons that are set."""
    if max_steps == 0:
        return 1.0
    parts = [(step, max_steps), (tokens, max_tokens), (seconds, 60 * (max_minutes or 0))]
    parts.append((tokens, seq_len * windows_per_epoch * (max_epochs or 0)))
    return min(1.0, max(part / whole for part, whole in parts if whole))


def check_settings():
    """Refuse numbers that no run can have, before anything is read or written."""
    from_0 = """seed micro_batch warmup_steps sample_tokens eval_tokens learning_rate weight_decay
    grad_clip min_lr max_steps max_tokens max_epochs max_minutes"""
    least = dict.fromkeys(from_0.split(), 0)
    least |= dict.fromkeys(("seq_len", "batch_tokens", "eval_every", "save_every"), 1)
    for key, low in least.items():
        value = globals()[key]
        if value is not None and not low <= value < math.inf:
            raise UserError(f"{key}={value}: expected {low} or more")
    if max_steps != 0 and not any((max_steps, max_tokens, max_epochs, max_minutes)):
        raise UserError("no horizon: set max_steps, max_tokens, max_epochs or max_minutes")
    lr_scale(0, 0.0)  # refuses an unknown schedule


def lr_scale(step, progress, warmed=0.0):
    """The learning rate over its peak: a warm-up to 1, then a schedule that falls from 1 to min_lr,
    the trapezoid's only in the last decay_fraction of the run. warmed: the progress at which the
    warm-up ends, or the present one while it lasts."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    left = max(1 - warmed, 1e-9)  # the part of the run behind the warm-up
    after = max(0.0, progress - warmed) / left
    decay = min(decay_fraction, left)
    down = {
        "cosine": (1 + math.cos(math.pi * after)) / 2,
        "linear": 1 - after,
        "trapezoid": min(1.0, (1 - progress) / decay) if decay else 1.0,
    }
    if lr_schedule not in down:
        raise UserError(f"lr_schedule={lr_schedule}: expected cosine, linear or trapezoid")
    return warm * (min_lr + (1 - min_lr) * down[lr_schedule])


# --------------------------------------------------------------------------------------------------
# The network and its checkpoints


def starting_point(out):
    """init_from, auto decided. What the folder holds is only replaced where that is asked for."""
    found = holds_model(out)
    if init_from == "auto" and (out / "model.safetensors").exists():
        return "resume"
    unfinished = [*COMPANIONS, "state.pt.tmp"]  # without weights, what a first save leaves
    saved = [path for path in found if path.parent == out and path.name not in unfinished]
    if init_from == "auto" and (out / "run.json").is_file() and not saved:
        return "scratch"  # a run that was killed before its first save begins again
    if init_from != "resume" and found and not overwrite:
        ways = "--init_from=resume goes on, --overwrite replaces it, or take another --out_dir"
        raise UserError(f"{out} holds a run or a model ({found[0].relative_to(out)}): {ways}")
    return "scratch" if init_from == "auto" else init_from


def open_run(tok, digest):
    """(network, its tokenizer, the state to go on from or None): scratch, resume, or a folder."""
    out = Path(out_dir)
    start = starting_point(out)
    shape = {key: globals()[key] for key in SHAPE}
    config = model.GPTConfig(vocab_size=-(-tok.n_vocab // 64) * 64, n_ctx=seq_len, **shape)
    if start == "scratch":
        torch.manual_seed(seed)
        return model.GPT(config), tok, None
    folder, state = Path(start), None
    if start == "resume":
        folder, state = out, load_state(out)
        changed = changes(state, {"dataset": digest})
        refuse_changes(changed, FIXED, out)
    else:
        refuse_source(out, folder)
    net, folder_tok = load(folder)
    if (folder_tok.bytes, folder_tok.eot_id) != (tok.bytes, tok.eot_id):
        mend = f"prepare the data with --tokenizer={folder}"
        raise UserError(f"data/{dataset} and {folder} have different tokenizers: {mend}")
    if not state and seq_len > net.config.n_ctx:
        raise UserError(f"seq_len={seq_len}, but the context of {folder} is {net.config.n_ctx}")
    net.config.dropout = dropout
    return net, folder_tok, state


def load_state(out):
    """The state of the run in a folder, of the kinds that main saves."""
    state = resume.load_state(out)
    kinds = dict(step=0, windows=0, seconds=0.0, best=-1.0, mean_loss=math.nan, history=[])
    kinds |= dict(warmed=[], micro=0, compiled=True, parts=[], optimizers=[])
    check_state(state, kinds, out / "state.pt")
    check_rows(state["history"], [0, 0.0, 0.0], out / "state.pt")
    kinds = {"warmed step": 0, "warmed windows": 0, "warmed seconds": 0.0}
    check_state(dict(zip(kinds, state["warmed"])), kinds, out / "state.pt")
    check_parts(state["parts"], out / "state.pt")
    return state


def changes(state, facts):
    """What this resume changes in what shapes the run: {key: "key old -> new"}."""
    config = {key: value for key, value in settings(globals()).items() if key not in ASIDE}
    return changed_settings(state["parts"][-1], config, facts)


def run_record():
    """What run.json keeps beside the config: the command, versions, the commit."""
    commit, ask = None, ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    with suppress(OSError):  # no git here
        commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() or None
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    record = {"command": " ".join(sys.argv), "commit": commit}
    return record | {"versions": versions | {"numpy": np.__version__}}


# --------------------------------------------------------------------------------------------------
# Evaluation, and what it says


@torch.no_grad()
def evaluate(net, val, token_bytes, run, cast, rows):
    """(loss in nats per token, bits per byte) over eval_tokens of the validation windows, evenly
    spread, each target scored once, shared out over all processes."""
    n = min(val.n, -(-eval_tokens // seq_len)) if eval_tokens else val.n
    total = torch.zeros(3, dtype=torch.float64, device=run.device)
    mine = [i * val.n // n for i in range(run.rank, n, run.world)]
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


document_begin, document_end = [], []  # the ids around each document of the shards, set by main
micro = 0  # the micro-batch that split_batch chose, set by main


def documents(ids):
    """With document_mask, which document each token (B, T) is of: the end token is the last of its
    document; where there is none, what stands before a document is the first of it."""
    if not document_mask:
        return None
    if not document_end:
        return (ids == document_begin[0]).cumsum(1)
    ended = (ids == document_end[-1]).cumsum(1)
    return torch.nn.functional.pad(ended[:, :-1], (1, 0))


def remarks(history, guessing=math.inf):
    """What the validations say, in words: history [(step, training loss, validation loss)];
    guessing: the loss of who guesses among all ids alike, ln(vocabulary), in nats."""
    *_, (_, train_loss, val_loss) = history
    lower = f"lower learning_rate ({learning_rate:g}) or raise warmup_steps ({warmup_steps})"
    if not val_loss <= 1.02 * guessing:  # nor is a NaN
        worse = f"the loss is above {guessing:.2f}, what guessing gives, ln(vocabulary)"
        return [f"{worse}: it explodes or never learned; {lower}"]
    if val_loss > 1.5 * min(val for _, _, val in history):
        return [f"the loss is half as much again as its best: it explodes; {lower}"]
    if len(history) < 3:
        return []
    (_, _, val0), (_, train1, val1) = history[-3:-1]
    if val_loss > val1 > val0 and train_loss < train1:
        return ["validation loss rises while training loss falls: over-fitting; best/ has the best"]
    if abs(val0 - val_loss) < 2e-3 * val0:
        other = "adamw" if optimizer == "muon" else "muon"
        return [
            "validation loss moved by less than 0.2 % in two validations: a plateau; if it came "
            f"early, raise learning_rate ({learning_rate:g}), lengthen warmup_steps "
            f"({warmup_steps}) where grad_norm jumps, or try --optimizer={other}; if late, a "
            "larger network or more data"
        ]
    return []


def show_sample(net, tok, cast):
    """A few tokens of what the model writes by now, each line set off."""
    with cast:
        start = (
            tok.encode(sample_prompt)[-(net.config.n_ctx // 2) :]
            or [*document_end, *document_begin][-1:]
        )
        how = dict(max_new_tokens=sample_tokens, temperature=0.8, top_k=50)
        [g] = model.generate(net, tok, [start], **how)
    return "  | " + (sample_prompt + g.text).replace("\n", "\n  | ")


def make_trackers():
    """A function that sends a log row to TensorBoard and Weights & Biases, where asked for."""
    senders = []
    try:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out_dir)
            numbers = lambda row: [(k, v) for k, v in row.items() if k != "step" and v is not None]
            senders.append(lambda row: [writer.add_scalar(*kv, row["step"]) for kv in numbers(row)])
        if wandb_project:
            import wandb

            run = wandb.init(project=wandb_project, name=out_dir, config=settings(globals()))
            senders.append(lambda row: run.log(row, step=row["step"]))
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install {error.name}") from None
    return lambda row: [send(row) for send in senders]


# --------------------------------------------------------------------------------------------------
# The loop


def agreed(run, mine, norm=0.0):
    """`mine` (numbers or 0-dim tensors) summed over all processes, and `norm`, which is the same on
    all, behind: a list of floats. The one exchange of a step and its one wait for the device."""
    vector = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=run.device) for x in mine])
    if run.world > 1:
        dist.all_reduce(vector)
    return [*vector.tolist(), float(norm)]


def loss_and_gradients(network, net, ids, targets, cast, pieces=1):
    """The mean loss of a micro-batch under `network`, which is net or net compiled, and the norm of
    each parameter's gradient (n_parameters,), float32 on the host. pieces: it goes through in so
    many, whose gradients add up to the same."""
    scale = 1024.0  # float16 loses smaller gradients
    net.zero_grad()
    total = 0.0
    for part_ids, part_targets in zip(ids.chunk(pieces), targets.chunk(pieces)):
        with cast:
            loss, _ = network(part_ids, part_targets, docs=documents(part_ids))
        (loss * (scale / targets.numel())).backward()
        total += loss.detach().item()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    norms = torch.stack([g.float().norm() for g in grads]).cpu() / scale
    net.zero_grad()
    return total / targets.numel(), norms


def compiled_differs(compiled, eager, dropout):
    """Whether the losses and gradient norms that `loss_and_gradients` gave differ by more than
    rounding; with dropout, which the two draw differently, by more than chance."""
    (loss, norms), (eager_loss, eager_norms) = compiled, eager
    floor = 0.01 * eager_norms.norm()  # smaller gradients are mostly rounding
    worst = ((norms - eager_norms).abs() / (eager_norms + floor)).max().item()
    loss_difference = abs(loss - eager_loss) / abs(eager_loss)
    tolerance = 0.5 if dropout else 0.1
    agrees = worst <= tolerance and loss_difference <= tolerance / 5  # of a NaN neither is true
    return not agrees


def try_compile(net, run, train_tokens, batch, cast):
    """(network, words): the compiled network, once its loss and its gradients on this micro-batch,
    (ids, targets), agree with the eager one's on every process; else net. On a CPU one block is
    compiled for all of them: as fast, and ready in half a minute."""
    if compile is False:
        return net, "off, as asked"
    cuda = run.device.type == "cuda"
    if compile is None and not cuda and flops_of_run(net, train_tokens) < COMPILE_FLOPS * run.world:
        return net, "off: on a CPU it would take longer than it saves here (--compile turns it on)"
    begun, fault = time.monotonic(), ""
    # In quarters: an eager network takes more memory than a compiled one.
    eager = loss_and_gradients(net, net, *batch, cast, pieces=min(4, len(batch[0])))
    body = torch.compile(net) if cuda else net
    net.train_block = model.call_block if cuda else torch.compile(model.call_block)
    try:
        compiled = loss_and_gradients(body, net, *batch, cast)
        figures = [
            f"loss {loss:.4f}, gradient norm {n.norm():.4g}" for loss, n in (compiled, eager)
        ]
        if compiled_differs(compiled, eager, net.config.dropout):
            fault = f"it computes wrongly here ({figures[0]}; eager {figures[1]})"
    except Exception as error:  # no compiler on this machine, or one that fails
        if out_of_memory(error):
            raise
        fault = f"it failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    net.zero_grad()
    if agreed(run, [bool(fault)])[0]:
        net.train_block = model.call_block
        return net, f"off, since {fault or 'it failed or differed on another process'}"
    spent = duration(time.monotonic() - begun)
    return body, f"on, after {spent}: {figures[0]}; eager {figures[1]}"


def flops_of_run(net, train_tokens):
    """About how many FLOPs the run has before it, by the first of its horizons."""
    if max_steps == 0:
        return 0.0
    ends = (batch_tokens, max_steps), (1, max_tokens), (train_tokens, max_epochs)
    tokens = min(size * (n or math.inf) for size, n in ends)
    limit = 60 * (max_minutes or math.inf) * 5e11  # what two cores with bfloat16 do
    return min(tokens * flops_per_token(net.config, seq_len), limit)


def memory_used(device):
    """The most memory that this process has held, in bytes: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def out_of_memory(error):
    kinds = (torch.OutOfMemoryError, MemoryError)  # on a CPU it is the allocator's word alone
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def main():
    global document_begin, document_end, micro, compile
    run = setup(device)
    progress = Progress()
    say = progress.note if run.main else lambda text: None
    check_settings()
    config = settings(globals())  # as the user gave it
    tok, train, val, apart, digest = open_dataset()
    document_begin, document_end = document_layout(Path("data") / dataset, tok)
    stops = document_end or document_begin[:1]
    net, tok, state = open_run(tok, digest)
    tok.eos_ids = [*tok.eos_ids, *(id for id in document_end if id not in tok.eos_ids)]
    if stops[0] not in tok.eos_ids:
        say("note: these shards hold no end token: what is trained on them does not learn to stop; "
            "python prepare.py writes one")  # fmt: skip
    agreed(run, [0])  # nobody writes before everybody has read
    net.to(run.device).train()
    net.checkpoint = checkpoint_blocks
    c, params = net.config, n_params(net)
    kind, why = choose_dtype(run.device, dtype, c.n_embd)
    cast = autocast(run.device, kind)
    scaler = torch.amp.GradScaler(run.device.type) if kind == torch.float16 else None

    how = (kind, checkpoint_blocks, 2 if optimizer == "adamw" else 1, run.device.type)
    fixed, per_window = memory_estimate(c, params, 1, seq_len, *how)
    free = free_memory(run.device) / (1 if run.device.type == "cuda" else run.world)
    fits = int((0.8 * free - fixed) / per_window)
    if run.device.type == "cpu":
        fits = min(fits, max(1, 4096 // seq_len))  # more at once is no faster on a CPU
    fits = state["micro"] if state else fits  # whatever memory is free now: the same sums
    rows, share, micro = split_batch(run.world, fits)
    say(
        f"model: {family(c)}, {params:,} parameters: {c.n_layer} layers of width {c.n_embd}, "
        f"context {c.n_ctx}, vocabulary {c.vocab_size:,}\n"
        f"batch: {batch_tokens:,} tokens = {run.world} process(es) x {share // micro} "
        f"micro-batch(es) x {micro} window(s) x {seq_len} tokens\n"
        f"data: {train.n:,} windows an epoch, {train.n * seq_len:,} tokens; {val.n:,} to validate\n"
        f"memory: about {(fixed + micro * per_window) / 2**30:.2f} GiB a process of "
        f"{free / 2**30:.1f} GiB free\n"
        f"device: {run.device}, computing in {str(kind).removeprefix('torch.')}: {why}"
    )
    precision = torch.bfloat16 if kind == torch.bfloat16 else torch.float32  # of Muon's products
    how = (learning_rate, weight_decay, (beta1, beta2), momentum, precision)
    optimizers = make_optimizer(net, optimizer, *how)
    fresh = dict(step=0, windows=0, seconds=0.0, best=math.inf, history=[], mean_loss=math.nan)
    fresh["warmed"] = [0, 0, 0.0]  # step, windows, seconds at the end of the warm-up, or at present
    step, windows, seconds, best, history, mean_loss, warmed = ((state or fresh)[k] for k in fresh)
    begun, bad = time.monotonic() - seconds, 0
    if state:
        where = Path(out_dir) / "state.pt"
        restore_optimizers(optimizers, state["optimizers"], where)
        if scaler and state.get("scaler"):
            check_state(state["scaler"], scaler.state_dict(), where)
            scaler.load_state_dict(state["scaler"])
        say(f"resumed {out_dir} at step {step}")
    if agreed(run, [step])[0] != step * run.world:
        raise UserError(f"{out_dir}: another checkpoint on another node: share the folder")

    def micro_step(network, ids, targets, last=True):
        """Forward, and backward of the loss over the global batch's mean; returns the loss sum."""
        with nullcontext() if last or run.world == 1 else network.no_sync():
            with cast:
                loss, _ = network(ids, targets, docs=documents(ids))
            scaled = loss * (run.world / batch_tokens)  # DDP divides by the number of processes
            (scaler.scale(scaled) if scaler else scaled).backward()
        return loss.detach()

    if step and compile is None:
        compile = state["compiled"]  # as before, whatever the horizon is now: the same sums
    first_batch = train.batch([i % train.n for i in range(micro)], run.device)
    body, told = try_compile(net, run, train.n * seq_len, first_batch, cast)
    say(f"compile: {told}")
    network = DistributedDataParallel(body, gradient_as_bucket_view=True) if run.world > 1 else body
    sizes = [len(tok.token_bytes(i)) for i in range(c.vocab_size)]
    token_bytes = torch.tensor(sizes, device=run.device)

    out, parts = Path(out_dir), []
    facts = dict(dataset=digest, computed_in=str(kind).removeprefix("torch."), micro_batch=micro)
    facts |= dict(compiled=told.startswith("on"), processes=run.world, torch=str(torch.__version__))
    if state:
        parts, changed = state["parts"], changes(state, facts)
        say_changes(changed, parts, say)
        if "eval_tokens" in changed:  # a loss of other tokens: the best is another
            best, history = math.inf, []
        if changed and weights_step(out / "best") > step:  # of a future that will not be
            best = math.inf
    if run.main:
        track = make_trackers()
        if not state:  # what a replaced run has left must never be taken for this one's
            clear_folder(out)
        elif state["temporary"]:
            os.replace(out / "state.pt.tmp", out / "state.pt")
        part = {"step": step, "config": config, "facts": facts} | run_record()
        parts = [before for before in parts if before["step"] < step] + [part]
        write_json(out / "run.json", {"config": config} | run_record() | {"parts": parts})
        log = open_log(out / "log.jsonl", step if state else -1, say)

    def record(row):
        if run.main:
            write_row(log, row)
            track(row)

    def save(folder=out, full=True):
        if run.main:
            state = dict(windows=windows, seconds=seconds, best=best, history=history)
            state |= dict(mean_loss=mean_loss, micro=micro, compiled=told.startswith("on"))
            state |= dict(parts=parts, warmed=warmed)
            state |= dict(optimizers=[o.state_dict() for o in optimizers])
            state["scaler"] = scaler.state_dict() if scaler else None
            checkpoint.save(folder, net, tok, step, state if full else None)

    caught = []  # signals

    def on_signal(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    row, stop, first_update = {}, False, True
    warmed_up = progress_at(warmup_steps, warmup_steps * batch_tokens, train.n, 0.0)
    if warmed_up >= 1 and max_steps != 0:
        say(f"note: warmup_steps={warmup_steps} is the whole run: no step has the learning rate")
    done = progress_at(step, windows * seq_len, train.n, seconds)
    peak, flops = peak_flops(run.device), flops_per_token(c, seq_len)
    tick = loop_begun = time.monotonic()
    done_before = done
    while done < 1 and not stop:
        torch.manual_seed((seed * 1_000_003 + step) * 65_537 + run.rank)
        if step <= warmup_steps:
            warmed = [step, windows, seconds]
        warm_end = progress_at(warmed[0], warmed[1] * seq_len, train.n, warmed[2])
        scale = lr_scale(step, done, warm_end)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * scale
        mine = [train.at(windows + i) for i in range(run.rank, rows, run.world)]
        total = torch.zeros((), device=run.device)
        for i in range(0, share, micro):
            batch = train.batch(mine[i : i + micro], run.device)
            total += micro_step(network, *batch, last=i + micro == share)
        for o in optimizers if scaler else ():
            scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
        clock = time.monotonic() - begun if run.main else 0.0  # rank 0's clock is everyone's
        loss, stop, seconds, norm = agreed(run, [total, bool(caught), clock], norm)
        loss /= batch_tokens
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            check_gradient(norm, step + 1)
        # The last steps of a schedule, from which a resume may start, move less than float32 shows.
        must_move = finite and (step < warmup_steps or scale > 0.01)
        before = weight_sums(net.parameters()) if first_update and must_move else None
        for o in optimizers:
            if finite:
                o.step()
            o.zero_grad()
        if before is not None:
            check_moved(before, net.parameters(), learning_rate * scale)
            first_update = False
        if scaler:
            scaler.update()
        step, windows = step + 1, windows + rows
        done = progress_at(step, windows * seq_len, train.n, seconds)
        dt, tick = time.monotonic() - tick, time.monotonic()
        mfu = flops * batch_tokens / dt / (peak * run.world) if peak else None
        tokens, tok_s, mem = windows * seq_len, batch_tokens / dt, memory_used(run.device)
        row = {"step": step, "tokens": tokens, "loss": loss, "lr": learning_rate * scale}
        row |= {"grad_norm": norm, "dt": dt, "tok_s": tok_s, "mfu": mfu, "mem": mem}
        record(row if finite else row | {"loss": None, "grad_norm": None})
        if run.main and not stop:
            of_peak = f"{100 * mfu:.1f} %" if mfu else "n/a"
            # By the rate of this loop: compilation was before it, and a resume had its own.
            left = (time.monotonic() - loop_begun) * (1 - done) / (done - done_before)
            progress(
                f"step {step} ({100 * done:.0f} %)  loss {loss:.4f}  lr {row['lr']:.2e}  norm "
                f"{norm:.2f}  {tok_s:,.0f} tok/s  mfu {of_peak}  mem {mem / 2**30:.2f} GiB  "
                f"left {duration(left)}"
            )
        if finite:
            bad, mean_loss = 0, loss if step == 1 or mean_loss != mean_loss else mean_loss
            mean_loss += 0.1 * (loss - mean_loss)
        else:
            bad += scaler is None or scaler.get_scale() < 2  # a scaler's first steps may overflow
            say(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: the update is skipped")
        if bad == BAD_STEPS:
            raise UserError(
                f"{bad} steps in a row were not finite: lower learning_rate ({learning_rate:g}), "
                f"raise warmup_steps ({warmup_steps}) or use --dtype=float32; the last save is kept"
            )
        if val.n and (step % eval_every == 0 or done >= 1):
            val_loss, bpb = evaluate(net, val, token_bytes, run, cast, micro)
            verdict = dict(val_loss=val_loss, val_ppl=math.exp(min(val_loss, 700)), val_bpb=bpb)
            for name, some in apart.items():
                verdict[f"val_loss.{name}"] = evaluate(net, some, token_bytes, run, cast, micro)[0]
            record({"step": step, "tokens": tokens} | verdict)
            row |= verdict
            history = [*history, [step, mean_loss, val_loss]]
            say(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in verdict.items()))
            for remark in remarks(history, math.log(c.vocab_size)):
                say(f"note: {remark}")
            if run.main and sample_tokens and done < 1:
                say(show_sample(net, tok, cast))
            if val_loss < best:
                best = val_loss
                save(out / "best", full=False)
        if step % save_every == 0 or done >= 1 or stop:
            save()
        tick = time.monotonic()
    say("")
    if max_steps == 0 and not state:
        save()
        say(f"wrote {out_dir}, as it is before the first step (max_steps=0)")
    elif not row:
        say(f"nothing to do: {out_dir} is at its horizon (step {step}); raise max_steps to go on")
    elif done < 1:
        say(f"stopped at step {step} and saved; --init_from=resume goes on")
    for key, value in row.items():
        say(f"{key}: {'n/a' if value is None else f'{value:.6g}'}")
    agreed(run, [0])  # all wait for the last save, or the launcher would end it
    return 128 + (caught or [signal.SIGTERM])[0] if stop and done < 1 else 0


if __name__ == "__main__":
    try:
        with locked_folder(out_dir), lost_process():
            status = main()
        if dist.is_initialized():
            dist.destroy_process_group()
            if not (tensorboard or wandb_project):  # which still send what they hold
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)  # else a thread of gloo that frees a tensor late aborts the exit
        sys.exit(status)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: lower micro_batch (now {micro}), lower seq_len (now {seq_len}), or "
            f"set checkpoint_blocks (now {checkpoint_blocks})"
        ) from None
