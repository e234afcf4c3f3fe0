"""Pre-training: token shards in, a checkpoint that is a Hugging Face folder out.

    python train.py                                   # the default: data/python -> out/python
    python train.py config/shakespeare.py             # a recipe; config/ holds them
    python train.py config/bert.py                    # an encoder, by masked tokens
    python train.py config/t5.py                      # an encoder and a decoder, by spans
    python train.py --init_from=resume                # goes on, bit for bit, where the run stopped
    torchrun --nproc_per_node=8 train.py config/small.py

Writes out_dir/: the checkpoint, best/ (the lowest validation loss), state.pt (to resume),
log.jsonl, run.json. Ctrl-C and SIGTERM save and exit.
"""

from config import configure, defaults, same_recipes, settings

# Each of these names is a key: a global of this file that recipes and flags override, and that
# every function below may read.

# data and run
dataset = "python"  # data/<dataset>, made by prepare.py
out_dir = "out/python"  # where the run is written
init_from = "scratch"  # scratch, resume, auto (resume if there is a run), or a checkpoint folder
overwrite = False  # let scratch replace the run that out_dir holds
seed = 0  # of the weights, the order of the data and dropout

# what is asked of the network (docs/objectives.md)
objective = "causal"  # causal: the next token; mlm: masked tokens; span: spans that were cut out
mask_rate = 0.15  # mlm and span: the part of a window's tokens that is hidden
whole_words = False  # mlm: hide all tokens of a word together

# the network (model.GPTConfig says what each means); 0 is the usual value
n_layer = 4  # blocks
n_head = 3  # attention heads
n_kv_head = 1  # heads of keys and values (grouped-query attention); 0: n_head
n_embd = 192  # width
head_dim = 0  # width of a head; 0: n_embd / n_head
n_hidden = 0  # width of the MLP; 0: 8/3 n_embd for swiglu, else 4 n_embd
causal = True  # false: an encoder, where every token sees all; with objective=mlm
n_encoder_layer = 0  # above 0: an encoder beside the decoder, of so many blocks; objective=span
mlp = "swiglu"  # swiglu, geglu, geglu_erf, gelu, gelu_erf, relu or relu2
tie = True  # share the embedding with the head
dropout = 0.0  # on the embedding, attention and what each block adds
init = "scaled"  # scaled (GPT-2's), xavier or he

# its norms, and biases
norm = "rms"  # rms or layer
norm_place = "pre"  # pre, post or both
norm_eps = 1e-6  # added to the variance
norm_bias = False  # biases in LayerNorm, where linear layers have none
embed_norm = False  # a norm behind the embedding
first_norm = True  # false: none before the first block's attention
qk_norm = True  # normalize queries and keys
qk_norm_all = False  # ... over all heads at once
qkv_bias = False  # biases in q, k and v alone
bias = False  # biases everywhere

# its positions
pos = "rope"  # rope, learned, sinusoidal, relative (T5's), alibi or none
rope_theta = 10000.0  # base of the rotary frequencies
local_rope_theta = 0.0  # the same of layers with a window; 0: rope_theta
rope_fraction = 1.0  # so much of a head is turned, its first dimensions
rope_scaling: dict | None = None  # Hugging Face's dict, for a longer context
n_buckets = 32  # pos=relative: distances that are told apart
max_distance = 128  # ... from here on all are one

# who sees whom, and how scores are weighed
window = 0  # tokens that a layer with a window sees, itself one of them; 0: all
layers = ""  # "SSSL", repeated: S has the window, L sees all; "": all S where there is a window
attention = "sliding"  # what the window means: sliding, local, strided or fixed
sink_tokens = 0  # so many first tokens are always seen
sinks = False  # each head has a score for nothing, which takes its share
softcap = 0.0  # scores stay below this, by tanh; 0: no limit
logit_softcap = 0.0  # the same of the logits
scale_scores = True  # false: scores are not divided by sqrt(head_dim) (T5)
logit_scale = 1.0  # hidden states times this before the head
embed_scale = False  # the embedding times sqrt(n_embd)
mlm_head = False  # an encoder's head has a layer of its own before the logits (BERT)

# a mixture of experts, and more tokens ahead
n_experts = 0  # experts of a layer; 0: a dense MLP
n_experts_per_token = 2  # of which a token goes through so many
n_shared_experts = 0  # and through so many that all tokens share
expert_hidden = 0  # width of an expert; 0: n_hidden
expert_layers = ""  # "DE", repeated: D dense, E experts; "": all E
norm_topk = True  # the weights of a token's experts add up to 1
balance = "loss"  # what spreads the load: loss, bias or none
balance_weight = 0.01  # of the load-balancing loss
z_weight = 0.001  # of the loss that keeps the router's logits small
mtp = 0  # so many tokens behind the next are predicted too: drafts for sample.py --speculate
mtp_weight = 0.3  # of their loss

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
lr_schedule = "cosine"  # cosine, linear, trapezoid (constant, then linear), constant, inverse_sqrt
warmup_steps = 20  # steps of linear warm-up
min_lr = 0.0  # the last learning rate, as a fraction of the peak
decay_fraction = 0.4  # trapezoid: the part of the run that decays
weight_decay = 0.1  # decoupled, on parameters of two dimensions
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
momentum = 0.95  # Muon's
grad_clip = 1.0  # the largest gradient norm; 0: no clipping

# several processes: who holds what (docs/parallel.md)
parallel = "ddp"  # ddp: each holds all; fsdp: a part of every matrix; hsdp: fsdp within a machine
replicas = 0  # hsdp: copies of the whole; 0: one a machine
tp = 1  # processes that share each matrix product
pp = 1  # stages of the network, each of some blocks
cp = 1  # processes that share each window

# the machine
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto, float32, bfloat16, float16
compile: bool | None = None  # torch.compile; none: where it pays
fast = True  # false: model.py's plain mathematics alone, a referee for a doubtful result
deterministic = False  # a text's bits do not depend on the batch: slower (docs/determinism.md)
checkpoint_blocks = False  # recompute blocks in backward: less memory, a third more time

# watching the run
eval_every = 100  # steps between validations
eval_tokens = 131072  # validation tokens each time, always the same; 0: all
save_every = 100  # steps between checkpoints
sample_tokens = 48  # tokens of the sample at each validation; 0: none
sample_prompt = ""  # its prompt; mlm, span: a text with [MASK], or <extra_id_0> in it
tensorboard = False  # also log for TensorBoard, into out_dir
wandb_project: str | None = None  # also log to Weights & Biases

if __name__ == "__main__":
    configure(globals())  # before torch is imported, so that --help is instant

import gc
import hashlib
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from barelm.checkpoint import load, refuse_source, save
from barelm.compiled import Ways, check_fast, try_compile
from barelm.examples import device_of
from barelm.experts import RoutingLog
from barelm.families import family
from barelm.filling import (
    fill_masks,
    fill_spans,
    filled_line,
    ids_with_gaps,
    score_states,
    score_targets,
    spans_line,
)
from barelm.invariant import be_deterministic
from barelm.mesh import open_mesh
from barelm.objectives import (
    OBJECTIVES,
    VALIDATION_SEED,
    Objective,
    check_kind,
    vocabulary_of,
    with_tokens_of,
)
from barelm.optim import (
    MOMENTS,
    free_memory,
    make_optimizer,
    memory_estimate,
    n_active,
    n_params,
    peak_flops,
    restore_optimizers,
)
from barelm.parallel import check_divided, exchanging, parallelize
from barelm.resume import (
    RESUME_IGNORES,
    RESUME_MAY_CHANGE,
    RunFolder,
    check_parts,
    check_rows,
    check_state,
    choose_start,
    load_state,
    locked_folder,
    make_trackers,
    weights_step,
)
from barelm.run import (
    Horizon,
    Schedule,
    StopSignals,
    Updater,
    UserError,
    advice_on_memory,
    autocast,
    check_least,
    choose_dtype,
    duration,
    end_process,
    lost_process,
    make_scaler,
    memory_used,
    setup,
    step_seed,
)
from barelm.shards import (
    MicroBatches,
    Windows,
    batch_to_device,
    document_layout,
    document_numbers,
)
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig, call_block, generate

# The keys that are the network's own: each goes to the field of GPTConfig that has its name.
SHAPE = [key for key in GPTConfig.__dataclass_fields__ if key in globals()]
# Of these, what counts only where another has a value: {key: (the other, its value; none: any but
# 0)}.
COUNTS_WITH = {
    "rope_theta": ("pos", "rope"),
    "local_rope_theta": ("pos", "rope"),
    "rope_scaling": ("pos", "rope"),
    "n_buckets": ("pos", "relative"),
    "max_distance": ("pos", "relative"),
    "norm_bias": ("norm", "layer"),
    "n_experts_per_token": ("n_experts", None),
    "norm_topk": ("n_experts", None),
    "balance": ("n_experts", None),
    "balance_weight": ("balance", "loss"),
    "z_weight": ("n_experts", None),
    "mtp_weight": ("mtp", None),
}
# A new key goes into one of these two, or no resume may change it: see RunFolder.
MAY_CHANGE = (
    *RESUME_MAY_CHANGE,
    "batch_tokens",
    "beta1",
    "beta2",
    "momentum",
    "eval_tokens",
    "fast",
    "deterministic",
)
IGNORES = (
    *RESUME_IGNORES,
    "compile",
    "micro_batch",
    "sample_tokens",
    "sample_prompt",
    "tensorboard",
    "wandb_project",
    "parallel",
    "replicas",
    "tp",
    "pp",
    "cp",
)
# Micro-batches of a step for each stage of a pipeline, where the user leaves their size open: a
# stage then waits for less than a fifth of the time.
MICRO_BATCHES_OF_STAGE = 4
COMPILE_FLOPS = 1e14  # a process's work from which compiling pays on a CPU (30 s, and 20 % faster)


# --------------------------------------------------------------------------------------------------
# The data


@dataclass
class Data:
    """A folder that prepare.py made: its tokenizer and windows of its shards."""

    tok: Tokenizer
    train: Windows
    val: Windows
    val_of_source: dict[str, Windows]  # of a mix of sources
    digest: str  # of meta.json: it names the data
    begin: list[int]  # the ids before each document
    end: list[int]  # and behind it; empty in old shards
    token_bytes: torch.Tensor  # (n_vocab,) int64: how many bytes each token stands for
    objective: Objective = field(default_factory=Objective)  # what is asked of the windows

    def documents(self, ids):
        """With document_mask, which document each token (B, T) is of; else None."""
        if not document_mask:
            return None
        return document_numbers(ids, self.begin, self.end)

    def n_targets(self, n_windows):
        """The targets of so many windows of training."""
        return n_windows * self.objective.n_targets(seq_len)


def open_dataset(device="cpu"):
    """The Data in data/<dataset>; a UserError where there is none, or too little."""
    folder = Path("data") / dataset
    if not (folder / "meta.json").is_file():
        source = "" if dataset == "python" else "--source=... "
        make = f"python prepare.py {same_recipes() or source}--dataset={dataset}"
        raise UserError(f"{folder}: no prepared data: {make} first")
    tok = Tokenizer.from_folder(folder)
    train_paths = sorted(folder.glob("train_*.bin"))
    train = Windows(train_paths, seq_len, seed, stride=stride, n_vocab=tok.n_vocab)
    if train.n == 0:
        raise UserError(f"{folder}: under {seq_len + 1} training tokens: lower --seq_len")
    val = validation_windows(folder.glob("val_*.bin"), tok)
    # Of a mix each source has shards of its own: val.wikipedia_000000.bin.
    names = {path.name[4:].rpartition("_")[0] for path in folder.glob("val.*.bin")}
    val_of_source = {}
    for name in sorted(names):
        val_of_source[name] = validation_windows(folder.glob(f"val.{name}_*.bin"), tok)
    digest = hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()
    begin, end = document_layout(folder, tok)
    token_bytes = torch.tensor([len(tok.token_bytes(id)) for id in range(tok.n_vocab)])
    return Data(tok, train, val, val_of_source, digest, begin, end, token_bytes.to(device))


def validation_windows(paths, tok):
    """Windows of every token of these shards, the last of each shard a short one; where tokens are
    masked of whole windows alone, all of which have as many targets."""
    partial = objective == "causal"
    return Windows(sorted(paths), seq_len, partial=partial, n_vocab=tok.n_vocab)


# --------------------------------------------------------------------------------------------------
# Settings


def check_settings(config):
    """Refuse numbers that no run can have, before anything is read or written."""
    from_0 = ("seed", "micro_batch", "warmup_steps", "sample_tokens", "eval_tokens", "stride")
    from_0 += ("learning_rate", "weight_decay", "grad_clip", "min_lr", "decay_fraction")
    check_least(config, from_0, 0)
    check_least(config, ("seq_len", "batch_tokens", "eval_every", "save_every"), 1)
    for name in ("dropout", "momentum", "beta1", "beta2"):
        if not 0 <= config[name] < 1:
            raise UserError(f"{name}={config[name]}: expected 0 or more, and less than 1")
    if objective not in OBJECTIVES:
        raise UserError(f"objective={objective}: expected {', '.join(OBJECTIVES)}")
    if not 0 < mask_rate < 1:
        raise UserError(f"mask_rate={mask_rate}: expected more than 0, and less than 1")
    if n_experts and n_experts_per_token == 1 and norm_topk:
        why = "the one weight would always be 1, and teach the router nothing"
        raise UserError(f"--n_experts_per_token=1: {why}: --norm_topk=false")
    if objective == "causal" and mask_rate != defaults(globals())["mask_rate"]:
        raise UserError(f"mask_rate={mask_rate}: for --objective=mlm and span, and not {objective}")
    if whole_words and objective != "mlm":
        raise UserError(f"--whole_words: for --objective=mlm, and not {objective}")
    if document_mask and objective == "span":
        raise UserError("--document_mask: not with --objective=span: a window is one text there")


@dataclass
class Batch:
    """An optimizer step's windows, and how they are divided."""

    size: int  # windows over all processes
    device_batch_size: int  # windows at once on a device
    grad_accum_steps: int  # micro-batches of a step on each process


def divide_batch(world, fits, n_stages=1):
    """The Batch of batch_tokens, where `fits` windows at once fit the memory of a device, and a
    pipeline of n_stages wants a micro-batch for each, and better more."""
    unit = seq_len * world  # the least that gives every process a window
    if batch_tokens % unit:
        below = max(1, batch_tokens // unit) * unit
        above = math.ceil(batch_tokens / unit) * unit
        near = " or ".join(map(str, sorted({below, above})))
        raise UserError(
            f"batch_tokens={batch_tokens}: expected a multiple of seq_len={seq_len} x {world} "
            f"processes, such as {near}"
        )
    share = batch_tokens // unit  # windows of a process
    if share < n_stages:
        raise UserError(
            f"batch_tokens={batch_tokens}: {share} window(s) a step for each pipeline, fewer than "
            f"its pp={n_stages} stages: --batch_tokens={n_stages * unit}"
        )
    if n_stages > 1:
        fits = min(fits, share // (n_stages * MICRO_BATCHES_OF_STAGE))
    device_batch_size = min(share // n_stages, micro_batch or max(1, fits))
    while share % device_batch_size:  # of one size: a compiled network is compiled for one
        device_batch_size -= 1
    return Batch(share * world, device_batch_size, share // device_batch_size)


def plan_batch(net, run, dtype_used, saved):
    """(Batch, a line on memory): as large micro-batches as fit, or on a resume those of before,
    whatever memory is free now: the same sums."""
    fixed, per_window = memory_estimate(
        net.config,
        n_params(net),
        rows=1,
        seq_len=seq_len,
        dtype=dtype_used,
        recompute=checkpoint_blocks,
        moments=MOMENTS.get(optimizer, 2),
        device_type=run.device.type,
    )
    sizes = run.mesh.sizes
    fixed /= sizes.pp * sizes.shard * sizes.tp  # who holds a part
    per_window /= sizes.cp  # a stage keeps a part of each, of as many micro-batches as stages
    free = free_memory(run.device)
    if run.device.type == "cpu":  # all processes of a machine share it
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", run.world))
    fits = int((0.8 * free - fixed) / per_window)  # a fifth is left for what is not estimated
    if run.device.type == "cpu":
        fits = min(fits, max(1, 4096 // seq_len))  # more tokens at once are no faster on a CPU
    if saved:
        fits = saved["micro"]
    fits = run.least(fits)  # one number for all processes, as a resume will have it
    batch = divide_batch(run.mesh.data_world, fits, sizes.pp)
    needed = fixed + batch.device_batch_size * per_window
    return batch, (
        f"memory: about {needed / 2**30:.2f} GiB a process of {free / 2**30:.1f} GiB free"
    )


# --------------------------------------------------------------------------------------------------
# The network, and where the run is


@dataclass
class State:
    """Where the run is: what state.pt holds, beside the optimizers, for an exact resume. A new
    field needs a default, which a run that was saved without it has."""

    step: int = 0  # optimizer steps done
    windows: int = 0  # consumed over all processes: the whole state of the loader
    seconds: float = 0.0  # of the clock
    best: float = math.inf  # the lowest validation loss
    mean_loss: float = math.nan  # a running mean of the training loss
    history: list = field(default_factory=list)  # [step, mean_loss, val_loss] of each validation
    # Step, windows and seconds at the end of the warm-up, or while it lasts at present.
    warmed: list = field(default_factory=lambda: [0, 0, 0.0])

    def progress(self, horizon, windows_per_epoch):
        """The part of the run that is done, 0 to 1."""
        return progress_at(horizon, self.step, self.windows, self.seconds, windows_per_epoch)

    def lr_scale(self, schedule, horizon, windows_per_epoch):
        """The factor of the learning rate in the step that begins."""
        if self.step <= schedule.warmup_steps:
            self.warmed = [self.step, self.windows, self.seconds]
        warm_end = progress_at(horizon, *self.warmed, windows_per_epoch)
        return schedule.scale(self.step, self.progress(horizon, windows_per_epoch), warm_end)

    def advance(self, windows, loss, seconds):
        """Count a step of so many windows, and its loss if it is finite."""
        self.step += 1
        self.windows += windows
        self.seconds = seconds
        if not math.isfinite(loss):
            return
        if self.step == 1 or math.isnan(self.mean_loss):
            self.mean_loss = loss
        self.mean_loss += 0.1 * (loss - self.mean_loss)


def progress_at(horizon, step, windows, seconds, windows_per_epoch):
    """The part of the run that is done, 0 to 1, after so many steps, windows and seconds."""
    return horizon.progress(step, windows * seq_len, windows / windows_per_epoch, seconds)


def read_saved(out):
    """The dict in a folder's state.pt, checked to be one that `save_run` writes."""
    saved = load_state(out)
    path = out / "state.pt"
    # A sample of each entry: the type must be its; a number 0 or more if it is; NaN only if it is.
    kinds = dict(step=0, windows=0, seconds=0.0, best=-1.0, mean_loss=math.nan, history=[])
    kinds |= dict(warmed=[], micro=0, compiled=True, parts=[], optimizers=[])
    check_state(saved, kinds, path)
    check_rows(saved["history"], [0, 0.0, 0.0], path)
    kinds = {"warmed step": 0, "warmed windows": 0, "warmed seconds": 0.0}
    check_state(dict(zip(kinds, saved["warmed"])), kinds, path)
    check_parts(saved["parts"], path)
    return saved


def open_network(data, folder):
    """(network, its tokenizer, the saved state to go on from or None), by init_from."""
    start = choose_start(out_dir, init_from, overwrite)
    if start == "scratch":
        check_counts()
        shape = {key: globals()[key] for key in SHAPE}
        tok = with_tokens_of(objective, data.tok, seq_len, mask_rate)
        vocab_size = math.ceil(tok.n_vocab / 64) * 64  # rows in multiples that GPUs like
        config = GPTConfig(vocab_size=vocab_size, n_ctx=seq_len, **shape)
        torch.manual_seed(seed)
        return GPT(config, fast=fast), tok, None
    saved = None
    source = Path(start)
    if start == "resume":
        source = Path(out_dir)
        saved = read_saved(source)
        folder.check_resume(saved, {"dataset": data.digest})
    else:
        refuse_source(out_dir, source)
    net, tok = load(source, fast=fast)
    if (tok.bytes, tok.eot_id) != (data.tok.bytes, data.tok.eot_id):
        mend = f"prepare the data with --tokenizer={source}"
        raise UserError(f"data/{dataset} and {source} have different tokenizers: {mend}")
    if not saved and net.score is not None:
        why = f"it has a head for {net.task}, which no pre-training reads: start from its base"
        raise UserError(f"--init_from={source}: {why}")
    if not saved:
        check_shape(net.config, source)
    net.config.dropout = dropout
    return net, tok, saved


def check_counts():
    """Refuse a key of the network that says nothing beside the others."""
    usual = defaults(globals())
    for key, (other, wanted) in COUNTS_WITH.items():
        has = globals()[other]
        counts = bool(has) if wanted is None else has == wanted
        if globals()[key] != usual[key] and not counts:
            why = f"it says nothing with {other}={has}"
            raise UserError(f"{key}={globals()[key]!r}: {why}: leave it out")


def check_shape(c, source):
    """Refuse a shape that was asked for, and is not that of the network to start from."""
    if seq_len > c.n_ctx:
        raise UserError(f"seq_len={seq_len}, but the context of {source} is {c.n_ctx}")
    usual = defaults(globals())
    for key in SHAPE:
        value = globals()[key]
        if key != "dropout" and value not in (usual[key], getattr(c, key)):
            raise UserError(f"{key}={value!r}, but {source} has {getattr(c, key)!r}: leave it out")


def set_objective(data, net, tok):
    """Let the data ask what `objective` says, which has to suit the network and its tokenizer."""
    check_kind(objective, net.config)
    if objective == "span" and net.start_id is None:  # as T5: a decoder's input begins with padding
        net.pad_id = net.start_id = tok.pad_id
    vocabulary = vocabulary_of(tok, net.start_id)
    data.objective = Objective(objective, vocabulary, seed, mask_rate, whole_words)
    data.objective.check(seq_len)
    if objective != "causal" and sample_prompt:  # which has to have a gap
        gaps = [tok.mask_id] if objective == "mlm" else tok.sentinel_ids
        ids, _ = ids_with_gaps(tok, sample_prompt, gaps)
        n_ctx = net.config.n_ctx
        if len(ids) >= n_ctx:  # an end token may come behind it
            raise UserError(f"sample_prompt: {len(ids)} tokens: expected less than {n_ctx}")


def add_end_tokens(tok, data, run):
    """Let generation stop where the documents of the shards end."""
    for id in data.end:
        if id not in tok.eos_ids:
            tok.eos_ids = [*tok.eos_ids, id]
    stop = (data.end or data.begin)[0]
    if stop not in tok.eos_ids:
        run.say(
            "note: these shards hold no end token: what is trained on them does not learn to stop; "
            "python prepare.py writes one"
        )


def save_run(folder, net, tok, state, batch, compiled, updater):
    """Write the checkpoint, and state.pt beside it."""
    if not folder.run.is_main or folder.run.mesh.sizes.is_sharded:
        return
    entries = asdict(state) | {
        "micro": batch.device_batch_size,
        "compiled": compiled,
        "parts": folder.parts,
        "optimizers": [optimizer.state_dict() for optimizer in updater.optimizers],
        "scaler": updater.scaler.state_dict() if updater.scaler else None,
    }
    save(folder.path, net, tok, state.step, entries)


def restore(saved, updater, run):
    """The State in a saved dict, with the optimizers and the scaler as they were; a new one for a
    run that begins, where saved is None."""
    state = State()
    if saved:
        path = Path(out_dir) / "state.pt"
        restore_optimizers(updater.optimizers, saved["optimizers"], path)
        if updater.scaler and saved.get("scaler"):
            check_state(saved["scaler"], updater.scaler.state_dict(), path)
            updater.scaler.load_state_dict(saved["scaler"])
        fields = [name for name in State.__dataclass_fields__ if name in saved]
        state = State(**{name: saved[name] for name in fields})
        run.say(f"resumed {out_dir} at step {state.step}")
    if run.sum(state.step) != [state.step * run.world]:
        raise UserError(f"{out_dir}: another checkpoint on another node: share the folder")
    return state


def begin_part(folder, state, saved, facts):
    """Begin a part of the run, the first or a resume's: run.json, the log, and what the changes of
    a resume mean for the best loss."""
    changed = folder.begin(state.step, facts, saved)
    if "eval_tokens" in changed:  # a loss of other tokens: the best is another
        state.best = math.inf
        state.history = []
    # best/ is of a later step, which will now be another.
    if changed and weights_step(folder.path / "best") > state.step:
        state.best = math.inf


# --------------------------------------------------------------------------------------------------
# Compilation: trusted only where it computes the same


def flops_of_token(net):
    """FLOPs of training on a token of the data."""
    return Objective(objective, mask_rate=mask_rate).flops_per_token(net.config, seq_len)


def flops_of_run(net, train_tokens):
    """About how many FLOPs the run will take, by the first of its horizons."""
    if max_steps == 0:
        return 0.0
    tokens = math.inf
    if max_steps:
        tokens = min(tokens, max_steps * batch_tokens)
    if max_tokens:
        tokens = min(tokens, max_tokens)
    if max_epochs:
        tokens = min(tokens, max_epochs * train_tokens)
    flops = tokens * flops_of_token(net)
    if max_minutes:
        flops = min(flops, 60 * max_minutes * 5e11)  # what two cores with bfloat16 do in a second
    return flops


def why_not_compile(net, run, train_tokens, saved):
    """Why the network is not to be compiled, or "". A resume does as before, whatever the horizon
    is now: the same sums. On a CPU compiling has to pay for the time it takes."""
    if compile is False:
        return "as asked"
    if deterministic:
        return "a compiler chooses the order of sums by the shape (--deterministic)"
    if compile is None and saved and saved["step"] > 0:
        return "" if saved["compiled"] else "as before"
    if compile is None and (tp > 1 or cp > 1):
        return "what processes exchange within a block parts it (--compile turns it on)"
    if compile or run.device.type == "cuda":
        return ""
    if flops_of_run(net, train_tokens) >= COMPILE_FLOPS * run.world:
        return ""
    return "on a CPU it would take longer than it saves here (--compile turns it on)"


# --------------------------------------------------------------------------------------------------
# Set-up of the loop


def make_updater(net, run, dtype_used):
    """The optimizers, and what they do in a step."""
    betas = (beta1, beta2)
    muon_dtype = torch.bfloat16 if dtype_used == torch.bfloat16 else torch.float32
    optimizers = make_optimizer(
        net, optimizer, learning_rate, weight_decay, betas, momentum, muon_dtype
    )
    scaler = make_scaler(run.device, dtype_used)
    return Updater(run, net.parameters(), optimizers, scaler, grad_clip)


def prepare_network(net, run, data, batch, dtype_used, saved):
    """(the network that the loop calls, whether it is compiled): net, computing by what is faster
    where that pays and gives the same, and of several processes divided over them."""
    cast = autocast(run.device, dtype_used)
    if not run.mesh.sizes.is_sharded:
        is_compiled = speed_up(net, run, data, batch, cast, saved)
    else:
        check_divided(net, dtype_used, run.mesh.sizes)
        # No process may hold the whole: of each kind of block one is tried, and all compute so.
        small = smallest_like(net).to(run.device).train()
        is_compiled = speed_up(small, run, data, batch, cast, saved)
        net.fast = small.fast
        Ways.of(small).give(net)
    return parallelize(net, run.mesh, dtype_used), is_compiled


def smallest_like(net):
    """A network with blocks of each kind that net has, and as few as there can be."""
    c = net.config
    n_kinds = max(len(c.layers), len(c.expert_layers), 1)
    n_encoder_layer = min(c.n_encoder_layer, n_kinds)
    small = replace(c, n_layer=min(c.n_layer, n_kinds), n_encoder_layer=n_encoder_layer)
    torch.manual_seed(seed)
    like = GPT(small, fast=net.fast)
    like.pad_id = net.pad_id
    like.start_id = net.start_id
    like.checkpoint = net.checkpoint
    return like


def speed_up(net, run, data, batch, cast, saved):
    """Let net compute by what is faster where that pays and gives the same: whether that is a
    compiled network."""
    first = [i % data.train.n for i in range(batch.device_batch_size)]
    windows = data.train.rows(first)
    first_batch = batch_to_device(data.objective.batch(windows, first), run.device)
    if net.fast:
        fault = check_fast(net, run, first_batch, cast, data.documents)
        if fault:
            run.say(f"note: {fault}")
    why_not = why_not_compile(net, run, data.train.n * seq_len, saved)
    is_compiled = False
    words = f"off: {why_not}"
    if not why_not:
        documents = data.documents if document_mask else None
        is_compiled, words = try_compile(net, run, first_batch, cast, documents)
    run.say(f"compile: {words}")
    return is_compiled


def say_plan(net, run, data, batch, memory, dtype_used, reason):
    """What the run is, before it begins."""
    c = net.config
    active = f" ({n_active(net):,} of them for a token)" if c.n_experts else ""
    run.say(
        f"model: {family(c)}, {n_params(net):,} parameters{active}: {c.n_layer} layers of width "
        f"{c.n_embd}, context {c.n_ctx}, vocabulary {c.vocab_size:,}\n"
        f"batch: {batch_tokens:,} tokens = {run.mesh.data_world} process(es) x "
        f"{batch.grad_accum_steps} micro-batch(es) x {batch.device_batch_size} window(s) x "
        f"{seq_len} tokens\n"
        f"data: {data.train.n:,} windows an epoch, {data.train.n * seq_len:,} tokens; "
        f"{data.val.n:,} to validate\n"
        f"{memory}\n"
        f"processes: {run.mesh.sizes.words()}\n"
        f"device: {run.device}, computing in {str(dtype_used).removeprefix('torch.')}: {reason}"
    )


def say_notes(run, horizon, batch, data):
    """What of the horizon a user may not expect."""
    for note in horizon.notes(batch_tokens, data.train.n * seq_len):
        run.say(f"note: {note}")
    if sample_tokens and not can_sample(run):
        run.say("note: no samples at validations: the stages of a pipeline write next tokens alone")
    if data.val.n == 0 and objective != "causal":
        run.say(f"note: no validation: its shards hold no window of {seq_len} tokens")
    warmed = progress_at(horizon, warmup_steps, warmup_steps * batch.size, 0.0, data.train.n)
    if warmed >= 1 and max_steps != 0:
        run.say(
            f"note: warmup_steps={warmup_steps} is the whole run: no step has the learning rate"
        )


def facts_of(data, run, dtype_used, batch, compiled):
    """What the settings came to on this machine, for run.json."""
    return {
        "dataset": data.digest,
        "computed_in": str(dtype_used).removeprefix("torch."),
        "micro_batch": batch.device_batch_size,
        "compiled": compiled,
        "processes": run.world,
        "mesh": asdict(run.mesh.sizes),
        "torch": str(torch.__version__),
    }


# --------------------------------------------------------------------------------------------------
# Validation, and what is said of it


@torch.no_grad()
def evaluate(net, windows, data, run, cast, device_batch_size):
    """(loss in nats per target, bits per byte, or where tokens are masked the part of the targets
    that is the likeliest token) over eval_tokens of the windows, evenly spread, each target scored
    once, shared out over all processes. The masks are always the same."""
    n = windows.n
    if eval_tokens:
        n = min(n, math.ceil(eval_tokens / seq_len))
    asked = replace(data.objective, seed=VALIDATION_SEED)
    # Loss, targets, bytes of the targets; or how many are right.
    totals = torch.zeros(3, dtype=torch.float64, device=run.device)
    mesh = run.mesh
    n_micro = 1
    if mesh.pipeline:
        n_micro = 2 * mesh.sizes.pp  # go through it together
        device_batch_size *= n_micro
    indices = [i * windows.n // n for i in range(mesh.data_rank, n, mesh.data_world)]
    n_batches = math.ceil(math.ceil(n / mesh.data_world) / device_batch_size)
    net.eval()
    is_compiled = net.block is not call_block
    for i in range(n_batches):  # as many on each process: parts of a network compute together
        part = indices[i * device_batch_size : (i + 1) * device_batch_size]
        is_idle = not part
        part = part or [0]
        batch = batch_to_device(asked.batch(windows.rows(part), part), run.device)
        if is_idle:
            batch["targets"].fill_(-100)
        if is_compiled or mesh.pipeline:  # for one size: a short batch would be compiled for
            batch = filled_up(batch, device_batch_size)
        docs = data.documents(batch["ids"])
        with cast:
            if mesh.pipeline:
                score = score_of(asked.name, data.token_bytes)
                totals += mesh.pipeline.evaluate(batch, docs, n_micro, score, 3).sum(0)
            elif asked.name == "causal":
                totals += causal_totals(net, batch, docs, data.token_bytes)
            else:
                totals += score_targets(net, batch, docs).sum(0)
    net.train()
    loss_sum, n_targets, n_bytes_or_right = run.sum(*(totals * mesh.counts))
    loss = loss_sum / max(n_targets, 1)
    if asked.name == "causal":
        return loss, loss_sum / max(n_bytes_or_right, 1) / math.log(2)
    return loss, n_bytes_or_right / max(n_targets, 1)


def filled_up(batch, n_rows):
    """A batch of n_rows rows: those that are missing have no targets."""
    filled = {}
    for name, tensor in batch.items():
        missing = (0, 0, 0, n_rows - len(tensor))
        filled[name] = F.pad(tensor, missing, value=-100 if name == "targets" else 0)
    return filled


def causal_totals(net, batch, docs, token_bytes):
    """The loss of a batch, its targets, and the bytes that they stand for: (3,) float64."""
    loss_sum, n_targets = net(**batch, docs=docs)
    targets = batch["targets"]
    if net.tokens is not None:  # of windows that several processes share (--cp)
        targets = net.tokens.own(targets)
    figures = loss_sum, n_targets, bytes_of(targets, token_bytes)
    return torch.stack([figure.double() for figure in figures])


def bytes_of(targets, token_bytes):
    """The bytes that the targets (B, T) stand for, ()."""
    bytes_of_targets = token_bytes[targets.clamp(min=0)]  # (B, T)
    return bytes_of_targets.where(targets >= 0, 0).sum()


def score_of(name, token_bytes):
    """What the last stage of a pipeline makes of a micro-batch's final states in a validation."""

    def causal_figures(net, h, batch):
        targets = batch["targets"]
        figures = net.loss_of(h, targets), (targets >= 0).sum(), bytes_of(targets, token_bytes)
        return torch.stack([figure.double() for figure in figures])[None]  # (1, 3)

    def filled_figures(net, h, batch):
        return score_states(net, h, batch).sum(0)[None]

    return causal_figures if name == "causal" else filled_figures


def validate(net, data, run, cast, device_batch_size):
    """The figures of a validation, as a row of the log has them."""
    val_loss, second = evaluate(net, data.val, data, run, cast, device_batch_size)
    name = "val_bpb" if objective == "causal" else "val_acc"
    figures = {"val_loss": val_loss, "val_ppl": math.exp(min(val_loss, 700)), name: second}
    for name, windows in data.val_of_source.items():
        if windows.n == 0:
            continue
        source_loss, _ = evaluate(net, windows, data, run, cast, device_batch_size)
        figures[f"val_loss.{name}"] = source_loss
    return figures


def validate_and_keep_best(net, tok, data, folder, state, cast, batch):
    """Validate: the figures, which are recorded and told with what they mean; the best model so far
    is kept in best/."""
    run = folder.run
    figures = validate(net, data, run, cast, batch.device_batch_size)
    folder.record({"step": state.step, "tokens": state.windows * seq_len} | figures)
    state.history.append([state.step, state.mean_loss, figures["val_loss"]])
    words = [f"{key} {value:.4f}" for key, value in figures.items()]
    run.say(f"step {state.step}: {'  '.join(words)}")
    for remark in remarks(state.history, math.log(net.config.vocab_size)):
        run.say(f"note: {remark}")
    if figures["val_loss"] < state.best:
        state.best = figures["val_loss"]
        if run.is_main and not run.mesh.sizes.is_sharded:
            save(folder.path / "best", net, tok, state.step)
    return figures


def remarks(history, guessing=math.inf):
    """What the validations say, in words: history [(step, training loss, validation loss)];
    guessing: the loss of a uniform guess among all ids, ln(vocabulary), in nats."""
    _, train_loss, val_loss = history[-1]
    lower = f"lower learning_rate ({learning_rate:g}) or raise warmup_steps ({warmup_steps})"
    if not val_loss <= 1.02 * guessing:  # nor is a NaN
        worse = f"the loss is above {guessing:.2f}, what guessing gives, ln(vocabulary)"
        return [f"{worse}: it explodes or never learned; {lower}"]
    best = min(val for _, _, val in history)
    if val_loss > 1.5 * best:
        return [f"the loss is half as much again as its best: it explodes; {lower}"]
    if len(history) < 3:
        return []
    _, _, val_two_before = history[-3]
    _, train_before, val_before = history[-2]
    if val_loss > val_before > val_two_before and train_loss < train_before:
        return ["validation loss rises while training loss falls: over-fitting; best/ has the best"]
    if abs(val_two_before - val_loss) < 2e-3 * val_two_before:
        other = "adamw" if optimizer == "muon" else "muon"
        return [
            "validation loss moved by less than 0.2 % in two validations: a plateau; if it came "
            f"early, raise learning_rate ({learning_rate:g}), lengthen warmup_steps "
            f"({warmup_steps}) where grad_norm jumps, or try --optimizer={other}; if late, a "
            "larger network or more data"
        ]
    return []


def show_sample(net, tok, data, run, cast):
    """A few tokens of what the model writes by now, each line set off: of an encoder what it sees
    behind masks, of an encoder-decoder the spans of a window. Of a network in parts every process
    computes its own."""
    if not (run.is_main or run.mesh.sizes.is_sharded) or not can_sample(run):
        return
    with cast:
        text = sample_text(net, tok, data, run.mesh.pipeline)
    run.say("  | " + text.replace("\n", "\n  | "))


def can_sample(run):
    """Whether the network's parts can write: stages of a pipeline do by a pass for each token."""
    alone = objective == "causal" and run.mesh.sizes.cp == 1
    return alone or run.mesh.pipeline is None


def sample_text(net, tok, data, pipeline=None):
    """What `show_sample` shows."""
    if objective == "mlm" and sample_prompt:
        return fill_masks(net, tok, sample_prompt)
    if objective == "span" and sample_prompt:
        return fill_spans(net, tok, sample_prompt, sample_tokens)
    if objective != "causal":
        window = data.val.rows([0])
        batch = replace(data.objective, seed=VALIDATION_SEED).batch(window, [0])
        line = filled_line if objective == "mlm" else spans_line
        return line(net, tok, batch_to_device(batch, device_of(net)), sample_tokens)
    prompt = tok.encode(sample_prompt)[-(net.config.n_ctx // 2) :]
    if not prompt:  # as a document of the shards begins
        prompt = [*data.end, *data.begin][-1:]
    options = dict(max_new_tokens=sample_tokens, temperature=0.8, top_k=50)
    if pipeline:
        return sample_prompt + pipeline.generate(tok, prompt, seq_len, **options)
    [sample] = generate(net, tok, [prompt], **options)
    return sample_prompt + sample.text


# --------------------------------------------------------------------------------------------------
# The loop


def accumulate_gradients(network, data, batches, first, n_micro, updater, cast, routing):
    """Forward and backward of this process's n_micro micro-batches of the step that begins at
    window `first` of the global sequence: the sums of their losses, and of those of the tokens
    further ahead (mtp) alone, (2,). Nothing in it waits for the device."""
    run = updater.run
    if run.mesh.pipeline:
        return pipeline_gradients(data, batches, first, n_micro, run.mesh, routing)
    net = getattr(network, "module", network)  # out of DistributedDataParallel
    losses = torch.zeros(2, device=run.device)
    n_targets = data.n_targets(n_micro * batches.size)
    n_exchanging = run.mesh.sizes.replica * run.mesh.sizes.shard
    for micro_step in range(n_micro):
        batch = batches.take(first + micro_step * batches.size)
        is_last = micro_step == n_micro - 1
        with exchanging(network, is_last):
            with cast:
                loss, _ = network(**batch, docs=data.documents(batch["ids"]))
            # The mean over the global batch. Exchanges are means over processes: multiply.
            updater.backward(loss * (n_exchanging / n_targets))
        losses[0] += loss.detach()
        if net.config.mtp:
            losses[1] += net.mtp_loss
        routing.add()
        batches.make_ahead()  # the next, while the device computes this one
    return losses


def pipeline_gradients(data, batches, first, n_micro, mesh, routing):
    """`accumulate_gradients` of a network in stages, whose micro-batches flow through all of them
    at once: `batches` has those of a step as one."""
    batch = batches.take(first)
    n_exchanging = mesh.sizes.replica * mesh.sizes.shard
    scale = n_exchanging / data.n_targets(batches.size)
    mesh.pipeline.stage.after = routing.add
    losses = mesh.pipeline.step(batch, data.documents(batch["ids"]), n_micro, scale)
    batches.make_ahead()
    return losses


def step_row(state, run, net, loss, grad_norm, updater, dt):
    """The log's row of a step that took dt seconds."""
    tok_s = batch_tokens / dt
    peak = peak_flops(run.device)  # None for an unknown device, which has no mfu
    flops = flops_of_token(net) * tok_s
    return {
        "step": state.step,
        "tokens": state.windows * seq_len,
        "loss": loss,
        "lr": learning_rate * updater.lr_scale,
        "grad_norm": grad_norm,
        "dt": dt,
        "tok_s": tok_s,
        "mfu": flops / (peak * run.world) if peak else None,
        "mem": memory_used(run.device),
    }


def show_progress(run, row, progress, seconds_left):
    """Rewrite the line of progress on the terminal; in a log, one every few seconds."""
    if not run.is_main:
        return
    of_peak = f"{100 * row['mfu']:.1f} %" if row["mfu"] else "n/a"
    run.progress(
        f"step {row['step']} ({100 * progress:.0f} %)  loss {row['loss']:.4f}  "
        f"lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  {row['tok_s']:,.0f} tok/s  "
        f"mfu {of_peak}  mem {row['mem'] / 2**30:.2f} GiB  left {duration(seconds_left)}"
    )


def memory_advice():
    """What to change where memory runs out."""
    size = micro_batch or "as many as seem to fit"
    return (
        f"lower micro_batch (now {size}), lower seq_len (now {seq_len}), or set checkpoint_blocks "
        f"(now {checkpoint_blocks})"
    )


def finish(run, row, state, progress, signals):
    """The last lines of a run, `key: value`, and its exit status."""
    run.say("")
    if not row and max_steps == 0 and state.step == 0:
        run.say(f"wrote {out_dir}, as it is before the first step (max_steps=0)")
    elif not row:
        at = f"{out_dir} is at its horizon (step {state.step})"
        run.say(f"nothing to do: {at}; raise max_steps to go on")
    elif progress < 1:
        run.say(f"stopped at step {state.step} and saved; --init_from=resume goes on")
    for key, value in row.items():
        run.say(f"{key}: {'n/a' if value is None else f'{value:.6g}'}")
    run.wait()  # for the last save, or the launcher would end it
    return signals.exit_status if progress < 1 else 0


def main():
    config = settings(globals())  # as the user gave it
    check_settings(config)
    horizon = Horizon(max_steps, max_tokens, max_epochs, max_minutes)
    schedule = Schedule(lr_schedule, warmup_steps, min_lr, decay_fraction)
    horizon.check()
    schedule.check()
    run = setup(device)
    run.mesh = open_mesh(run, parallel, tp, pp, cp, replicas)
    folder = RunFolder(out_dir, run, config, defaults(globals()), MAY_CHANGE, IGNORES)
    data = open_dataset(run.device)
    net, tok, saved = open_network(data, folder)
    set_objective(data, net, tok)
    add_end_tokens(tok, data, run)
    run.wait()  # nobody writes before everybody has read
    if not run.mesh.sizes.is_sharded:  # else part by part, below
        net.to(run.device)
    net.train()
    net.checkpoint = checkpoint_blocks
    if deterministic:
        be_deterministic(net)
    dtype_used, reason = choose_dtype(run.device, dtype, net.config.n_embd)
    cast = autocast(run.device, dtype_used)
    batch, memory = plan_batch(net, run, dtype_used, saved)
    say_plan(net, run, data, batch, memory, dtype_used, reason)
    clock_begin = time.monotonic()
    network, compiled = prepare_network(net, run, data, batch, dtype_used, saved)
    updater = make_updater(net, run, dtype_used)
    state = restore(saved, updater, run)
    clock_begin -= state.seconds
    if run.is_main:
        folder.trackers = make_trackers(out_dir, config, tensorboard, wandb_project)
    begin_part(folder, state, saved, facts_of(data, run, dtype_used, batch, compiled))
    signals = StopSignals()
    routing = RoutingLog(net, run.world, run.mesh.pipeline)

    say_notes(run, horizon, batch, data)
    if max_steps == 0 and not saved:
        save_run(folder, net, tok, state, batch, compiled, updater)

    batches = MicroBatches(
        data.train,
        run.device,
        batch.device_batch_size * (batch.grad_accum_steps if run.mesh.pipeline else 1),
        run.mesh.data_rank,
        run.mesh.data_world,
        data.objective,
    )
    gc.freeze()  # what is here by now lives to the end: to search it for cycles would stall a step
    n_windows = data.train.n
    progress = state.progress(horizon, n_windows)
    loop_begin = step_begin = time.monotonic()
    # The time left is by the rate of this loop: compilation was before it, a resume had its own.
    clock = loop_begin - clock_begin
    first_progress = progress_at(horizon, state.step, state.windows, clock, n_windows)
    stopped = False
    row = {}
    while progress < 1 and not stopped:
        torch.manual_seed(step_seed(seed, state.step, run.mesh.data_rank))
        updater.set_lr(state.lr_scale(schedule, horizon, n_windows))
        losses = accumulate_gradients(
            network, data, batches, state.windows, batch.grad_accum_steps, updater, cast, routing
        )
        grad_norm = updater.clip_gradients()
        # The one exchange of a step and its one wait for the device; rank 0's clock is everyone's.
        clock = time.monotonic() - clock_begin if run.is_main else 0.0
        figures = (*(losses * run.mesh.counts), signals.received > 0, clock, *routing.end_step())
        loss_sum, mtp_sum, n_stops, seconds, *routed = run.sum(*figures)
        loss = loss_sum / data.n_targets(batch.size)
        stopped = n_stops > 0
        grad_norm = float(grad_norm)
        is_finite = updater.step(state.step, loss, grad_norm, state.step < warmup_steps)
        if is_finite:
            routing.update_bias()
        state.advance(batch.size, loss if is_finite else math.nan, seconds)
        progress = state.progress(horizon, n_windows)

        dt = time.monotonic() - step_begin
        row = step_row(state, run, net, loss, grad_norm, updater, dt) | routing.row(routed)
        if net.config.mtp and is_finite:
            row["mtp_loss"] = mtp_sum / data.n_targets(batch.size)  # a mean over depths
        folder.record(row if is_finite else row | {"loss": None, "grad_norm": None})
        if not stopped:
            rate = (progress - first_progress) / (time.monotonic() - loop_begin)
            show_progress(run, row, progress, (1 - progress) / max(rate, 1e-9))
        updater.check_bad_steps(learning_rate, warmup_steps)
        if data.val.n and (state.step % eval_every == 0 or progress >= 1):
            row |= validate_and_keep_best(net, tok, data, folder, state, cast, batch)
            if sample_tokens and progress < 1:  # sample.py shows the last one
                show_sample(net, tok, data, run, cast)
        if state.step % save_every == 0 or progress >= 1 or stopped:
            save_run(folder, net, tok, state, batch, compiled, updater)
        step_begin = time.monotonic()
    return finish(run, row, state, progress, signals)


if __name__ == "__main__":
    with locked_folder(out_dir), lost_process(), advice_on_memory(memory_advice):
        status = main()
    end_process(status, threads_may_run=tensorboard or bool(wandb_project))
