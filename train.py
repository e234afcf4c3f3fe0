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

from config import command_of, configure, defaults, same_recipes, settings

# Each of these names is a key: a global of this file that recipes and flags override, and that
# every function below may read.

# data and run
dataset = "python"  # data/<dataset>, made by prepare.py; or streamed: hf://owner/name, https://…
mix = ""  # several instead, by weights from steps on: "0:web=0.8,code=0.2;5000:web=0.6,code=0.4"
shuffle_chunks = 0  # shuffle within so many chunks of 2**19 tokens; 0: all, or of a stream 256
cache_gb = 16.0  # of a streamed data set, so many GB are kept in data/cache
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

# several processes: who holds what (docs/scale.md)
parallel = "ddp"  # ddp: each holds all; fsdp: a part of every matrix; hsdp: fsdp within a machine
replicas = 0  # hsdp: copies of the whole; 0: one a machine
tp = 1  # processes that share each matrix product
pp = 1  # stages of the network, each of some blocks
cp = 1  # processes that share each window
zero = 0  # with ddp, 1: each process holds a part of the optimizer's state (ZeRO-1)
grad_dtype = "float32"  # in which gradients are exchanged and kept: float32 or bfloat16
offload = False  # the optimizer's state lives in the host's memory

# the checkpoints (docs/checkpoints.md)
keep = 1  # the last checkpoints that are kept; above 1, or of parts, they are in out_dir/shards
async_save = False  # write checkpoints beside the training

# several processes: who is lost, or wrong (docs/cluster.md)
timeout = 120.0  # seconds in which a process that does not come to an exchange is taken for lost
checksum_every = 0  # steps between checks that all copies of the weights are the same; 0: none

# the machine
device = "auto"  # auto, cpu, mps, cuda, cuda:1
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
dtype = "auto"  # auto, float32, bfloat16, float16
compile: bool | None = None  # torch.compile; none: where it pays
fast = True  # false: model.py's plain mathematics alone, a referee for a doubtful result
deterministic = False  # a text's bits do not depend on the batch: slower (docs/determinism.md)
checkpoint_blocks: int | bool = False  # recompute so many blocks (bare: all): less memory, slower
float8 = False  # the blocks' products in float8, on GPUs that have them

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
import math
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch

from barelm import datasets
from barelm.batching import is_narrow, mesh_words, plan_batch
from barelm.checkpoint import load, refuse_source, save
from barelm.chunks import check_chunks
from barelm.cluster import StepTimes, check_copies, check_shared, lock_patience, start_of_launch
from barelm.compiled import check_fast, try_compile
from barelm.devices import memory_used, why_not_on_mps
from barelm.ending import after_training, gap_prompt, resume_command, say_end
from barelm.experts import RoutingLog
from barelm.families import family
from barelm.filling import ids_with_gaps
from barelm.float8 import use_float8, why_not_float8
from barelm.invariant import be_deterministic
from barelm.mesh import open_mesh
from barelm.mixture import JoinedWindows, MixedWindows, check_same_until, names_of, parse_mix
from barelm.objectives import (
    OBJECTIVES,
    Objective,
    check_kind,
    vocabulary_of,
    with_tokens_of,
)
from barelm.optim import (
    StatePlan,
    make_optimizer,
    n_active,
    n_params,
    peak_flops,
    restore_optimizers,
)
from barelm.pace import TimeLeft, step_words
from barelm.parallel import (
    check_divided,
    divide_again,
    exchanging,
    parallelize,
    shortened,
)
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
    newest_step,
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
    make_scaler,
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
from barelm.steps import keep_last, read_step_state
from barelm.tokenizer import Tokenizer
from barelm.validation import evaluate, remarks, sample_text
from barelm.watch import lost_process, start_watch
from model import GPT, GPTConfig

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
    "mix",  # from here on: see check_same_until
    "grad_dtype",
    "float8",
)
IGNORES = (
    *RESUME_IGNORES,
    "cache_gb",
    "compile",
    "micro_batch",
    "sample_tokens",
    "sample_prompt",
    "timeout",
    "checksum_every",
    "tensorboard",
    "wandb_project",
    "parallel",
    "replicas",
    "tp",
    "pp",
    "cp",
    "zero",
    "offload",
    "keep",
    "async_save",
)
COMPILE_FLOPS = 1e14  # a process's work from which compiling pays on a CPU (30 s, and 20 % faster)


# --------------------------------------------------------------------------------------------------
# The data


@dataclass
class Data:
    """What prepare.py made: the tokenizer and windows of the shards, of a folder or of several."""

    tok: Tokenizer
    train: Windows
    val: Windows
    val_of_source: dict[str, Windows]  # of a mix
    digest: str  # it names the data
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
    """The Data of `dataset`, or of those of `mix`; a UserError where there is none, or too
    little."""
    stages = parse_mix(mix)
    sets = []
    for name in names_of(stages) or [dataset]:
        source = "" if name == "python" else "--source=... "
        make = f"{command_of('prepare')} {same_recipes() or source}--dataset={name}"
        sets.append(datasets.open_dataset(name, seq_len, stride, cache_gb, make))
    datasets.check_alike(sets)
    tok = sets[0].tok
    train = {each.name: each.training(seq_len, seed, stride, shuffle_chunks) for each in sets}
    # The last window of a shard is a short one, so that every token is scored; where tokens are
    # masked of whole windows alone, all of which have as many targets.
    partial = objective == "causal"
    val = {each.name: each.validation(seq_len, partial) for each in sets}
    if stages:
        all_train = MixedWindows(train, stages, batch_tokens // seq_len, seed)
        all_val, val_of_source = JoinedWindows(val), val
    else:
        all_train = train[dataset]
        all_val = val[dataset]
        sources = sets[0].sources
        val_of_source = {name: sets[0].validation(seq_len, partial, name) for name in sources}
    begin, end = document_layout(sets[0].folder, tok)
    sizes = torch.tensor([len(tok.token_bytes(id)) for id in range(tok.n_vocab)]).to(device)
    digest = datasets.digest_of(sets)
    return Data(tok, all_train, all_val, val_of_source, digest, begin, end, sizes)


# --------------------------------------------------------------------------------------------------
# Settings


def keys():
    """The keys of this run by name, for the leaves that ask for many of them."""
    return SimpleNamespace(**settings(globals()))


def check_settings(config):
    """Refuse numbers that no run can have, before anything is read or written."""
    from_0 = ("seed", "micro_batch", "warmup_steps", "sample_tokens", "eval_tokens", "stride")
    from_0 += ("checksum_every", "checkpoint_blocks", "learning_rate", "weight_decay")
    from_0 += ("grad_clip", "min_lr", "decay_fraction")
    check_least(config, from_0, 0)
    check_least(config, ("seq_len", "batch_tokens", "eval_every", "save_every"), 1)
    check_least(config, ("timeout", "keep"), 1)
    for name in ("dropout", "momentum", "beta1", "beta2"):
        if not 0 <= config[name] < 1:
            raise UserError(f"{name}={config[name]}: expected 0 or more, and less than 1")
    check_chunks(shuffle_chunks, cache_gb)
    if mix and dataset != defaults(globals())["dataset"]:
        raise UserError(f"dataset={dataset}: --mix names the data sets itself: leave one out")
    if objective not in OBJECTIVES:
        raise UserError(f"objective={objective}: expected {', '.join(OBJECTIVES)}")
    if not 0 < mask_rate < 1:
        raise UserError(f"mask_rate={mask_rate}: expected more than 0, and less than 1")
    if zero not in (0, 1):
        raise UserError(f"zero={zero}: expected 0 or 1; --parallel=fsdp divides the rest too")
    if grad_dtype not in ("float32", "bfloat16"):
        raise UserError(f"grad_dtype={grad_dtype}: expected float32 or bfloat16")
    if n_experts and n_experts_per_token == 1 and norm_topk:
        why = "the one weight would always be 1, and teach the router nothing"
        raise UserError(f"--n_experts_per_token=1: {why}: --norm_topk=false")
    if objective == "causal" and mask_rate != defaults(globals())["mask_rate"]:
        raise UserError(f"mask_rate={mask_rate}: for --objective=mlm and span, and not {objective}")
    if whole_words and objective != "mlm":
        raise UserError(f"--whole_words: for --objective=mlm, and not {objective}")
    if document_mask and objective == "span":
        raise UserError("--document_mask: not with --objective=span: a window is one text there")


def make_schedule():
    """(where the run ends, its learning rate until then), checked."""
    horizon = Horizon(max_steps, max_tokens, max_epochs, max_minutes)
    schedule = Schedule(lr_schedule, warmup_steps, min_lr, decay_fraction)
    horizon.check()
    schedule.check()
    return horizon, schedule


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


def read_saved(out, say):
    """The dict that `save_run` wrote last, into a state.pt or a step's folder, checked to be one.
    Of a step it lacks the optimizers, and has its `folder`."""
    step = newest_step(out, say)
    # A sample of each entry: the type must be its; a number 0 or more if it is; NaN only if it is.
    kinds = dict(step=0, windows=0, seconds=0.0, best=-1.0, mean_loss=math.nan, history=[])
    kinds |= dict(warmed=[], micro=0, compiled=True, parts=[])
    if step is None:
        saved = load_state(out) | {"folder": out}
        path = out / "state.pt"
        kinds["optimizers"] = []
    else:
        saved = read_step_state(step) | {"folder": step, "temporary": False}
        path = step
    check_state(saved, kinds, path)
    check_rows(saved["history"], [0, 0.0, 0.0], path)
    kinds = {"warmed step": 0, "warmed windows": 0, "warmed seconds": 0.0}
    check_state(dict(zip(kinds, saved["warmed"])), kinds, path)
    check_parts(saved["parts"], path)
    return saved


def open_network(data, folder):
    """(network, its tokenizer, the saved state to go on from or None), by init_from."""
    start = choose_start(out_dir, *start_of_launch(folder.run, out_dir, init_from, overwrite))
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
        saved = read_saved(Path(out_dir), folder.run.say)
        source = saved["folder"]
        folder.check_resume(saved, {"dataset": data.digest})
        check_mix(saved)
    else:
        refuse_source(out_dir, source)
    net, tok = load(source, fast=fast)
    if (tok.bytes, tok.eot_id) != (data.tok.bytes, data.tok.eot_id):
        mend = f"prepare the data with --tokenizer={source}"
        raise UserError(f"data/{mix or dataset} and {source} have different tokenizers: {mend}")
    if not saved and net.score is not None:
        why = f"it has a head for {net.task}, which no pre-training reads: start from its base"
        raise UserError(f"--init_from={source}: {why}")
    if not saved:
        check_shape(net.config, source)
    net.config.dropout = dropout
    return net, tok, saved


def check_mix(saved):
    """Refuse a resume with a mix by which other windows would have been read until now."""
    before = saved["parts"][-1]["config"]
    then = (before.get("mix", ""), before["batch_tokens"] // before["seq_len"])
    check_same_until(saved["windows"], then, (mix, batch_tokens // seq_len))


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
            f"{command_of('prepare')} writes one"
        )


def save_run(folder, net, tok, state, batch, compiled, updater):
    """Write the checkpoint, and the state beside it."""
    entries = asdict(state) | {
        "micro": batch.device_batch_size,
        "compiled": compiled,
        "parts": folder.parts,
        "scaler": updater.scaler.state_dict() if updater.scaler else None,
    }
    if folder.saver:
        folder.saver.save(net, tok, updater.optimizers, entries)
        return
    if folder.run.is_main:
        entries["optimizers"] = [optimizer.state_dict() for optimizer in updater.optimizers]
        save(folder.path, net, tok, state.step, entries)
        keep_last(folder.path, 0)  # steps of before, when processes wrote parts
    folder.run.wait_for_main()


def make_saver(run):
    """The StepSaver of a run whose processes each write a part; None of another, of which one
    writes all."""
    if not (run.mesh.sizes.is_sharded or zero or keep > 1 or async_save):
        return None
    from barelm.saving import StepSaver  # a second of imports, which others are spared

    return StepSaver(out_dir, run, asdict(run.mesh.sizes), keep, async_save)


def restore(saved, net, updater, run):
    """The State in a saved dict, with the optimizers and the scaler as they were; a new one for a
    run that begins, where saved is None."""
    state = State()
    if saved:
        path = saved["folder"] / "state.pt"
        if "optimizers" in saved and not (run.mesh.sizes.is_sharded or zero):
            restore_optimizers(updater.optimizers, saved["optimizers"], path)
        else:
            restore_parts(saved, net, updater, path)
        if updater.scaler and saved.get("scaler"):
            check_state(saved["scaler"], updater.scaler.state_dict(), path)
            updater.scaler.load_state_dict(saved["scaler"])
        fields = [name for name in State.__dataclass_fields__ if name in saved]
        state = State(**{name: saved[name] for name in fields})
        run.say(f"resumed {out_dir} at step {state.step}")
    if run.sum(state.step) != [state.step * run.world]:
        raise UserError(f"{out_dir}: another checkpoint on another node: share the folder")
    return state


def restore_parts(saved, net, updater, path):
    """Give the optimizers what this process has of their state: of a step that was saved in parts,
    or of a state.pt."""
    from barelm import sharded

    if "optimizers" in saved:
        names = sharded.numbered_names(net, optimizer)
        sharded.load_whole_states(saved["optimizers"], names, net, updater.optimizers, path)
    else:
        sharded.load_states(saved["folder"], net, updater.optimizers)


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
    if why_not_on_mps(run.device):
        return why_not_on_mps(run.device)
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


def begin_training(net, run):
    """Put a network that is not divided on its device, and let it compute as the keys say."""
    if not run.mesh.sizes.is_sharded:  # else part by part, by prepare_network
        net.to(run.device)
    net.train()
    net.checkpoint = checkpoint_blocks
    if deterministic:
        be_deterministic(net)


def make_batches(data, run, batch):
    """This process's micro-batches; those of a step as one where they flow through a pipeline."""
    rows = batch.device_batch_size
    if run.mesh.pipeline:
        rows *= batch.grad_accum_steps
    mesh = run.mesh
    return MicroBatches(
        data.train, run.device, rows, mesh.data_rank, mesh.data_world, data.objective
    )


def make_updater(net, run, dtype_used):
    """The optimizers, and what they do in a step."""
    betas = (beta1, beta2)
    muon_dtype = torch.bfloat16 if dtype_used == torch.bfloat16 else torch.float32
    plan = StatePlan.of(run.mesh, zero, offload, is_narrow(keys(), run))
    optimizers = make_optimizer(
        net, optimizer, learning_rate, weight_decay, betas, momentum, muon_dtype, plan
    )
    scaler = make_scaler(run.device, dtype_used)
    return Updater(run, net.parameters(), optimizers, scaler, grad_clip)


def prepare_network(net, run, data, batch, dtype_used, saved):
    """(the network that the loop calls, whether it is compiled): net, computing by what is faster
    where that pays and gives the same, and of several processes divided over them."""
    cast = autocast(run.device, dtype_used)
    if float8:
        choose_float8(net, run)
    if not run.mesh.sizes.is_sharded:
        is_compiled = speed_up(net, run, data, batch, cast, saved)
    else:
        check_divided(net, dtype_used, run.mesh.sizes)
        net.ops.joins = run.mesh.sizes.shard == 1  # as it will be
        with shortened(net, run.device):
            is_compiled = speed_up(net, run, data, batch, cast, saved)
    network = parallelize(net, run.mesh, dtype_used, getattr(torch, grad_dtype))
    if saved and isinstance(network, torch.nn.parallel.DistributedDataParallel):
        pass_once(network, run, data, batch, cast)
    return network, is_compiled


def pass_once(network, run, data, batch, cast):
    """A forward and backward pass whose gradients are dropped. DistributedDataParallel exchanges
    gradients from its second pass on in the order in which the first one had them, and of three
    processes or more that changes the last bits of their sums. So a resumed run has a first pass
    before its first step, and sums as it would have done without the break."""
    first = [i % data.train.n for i in range(batch.device_batch_size)]
    rows = data.train.rows(first)
    inputs = batch_to_device(data.objective.batch(rows, first), run.device)
    with cast:
        loss, _ = network(**inputs, docs=data.documents(inputs["ids"]))
    loss.backward()
    network.zero_grad()


def choose_float8(net, run):
    """Let the blocks multiply in float8, where this device can."""
    if tp > 1:
        raise UserError("--float8: not with --tp: each process would scale its part by another")
    if deterministic:
        raise UserError("--float8: not with --deterministic: a batch shares one scale")
    why_not = why_not_float8(run.device)
    words = f"off: {why_not}" if why_not else f"on, in {use_float8(net)} linear layers"
    run.say(f"float8: {words}")


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
    own_windows = run.mesh.data_world  # who share a window, a product or a network count once
    readers = "process(es)" if own_windows == run.world else "group(s) of processes"
    run.say(
        f"model: {family(c)}, {n_params(net):,} parameters{active}: {c.n_layer} layers of width "
        f"{c.n_embd}, context {c.n_ctx}, vocabulary {c.vocab_size:,}\n"
        f"batch: {batch_tokens:,} tokens = {own_windows} {readers} x "
        f"{batch.grad_accum_steps} micro-batch(es) x {batch.device_batch_size} window(s) x "
        f"{seq_len} tokens\n"
        f"data: {data.train.n:,} windows an epoch, {data.train.n * seq_len:,} tokens; "
        f"{data.val.n:,} to validate\n"
        f"{memory}\n"
        f"processes: {run.mesh.sizes.words()}\n"
        f"{mesh_words(keys(), net, run, batch, dtype_used)}"
        f"device: {run.device}, computing in {str(dtype_used).removeprefix('torch.')}: {reason}\n"
        f"threads: {run.threads.words()}"
    )


def say_notes(run, horizon, batch, data):
    """What of the horizon a user may not expect."""
    for note in horizon.notes(batch_tokens, data.train.n * seq_len):
        run.say(f"note: {note}")
    if dropout and run.world > 1:
        run.say("note: dropout draws other masks on another number of processes, or another mesh")
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
        "mesh": run.mesh.sizes.words(),
        "torch": str(torch.__version__),
    }


# --------------------------------------------------------------------------------------------------
# Validation, and what is said of it


def validate(net, data, run, cast, device_batch_size):
    """The figures of a validation, as a row of the log has them."""
    val_loss, second = evaluate(net, data.val, data, run, cast, device_batch_size, eval_tokens)
    name = "val_bpb" if objective == "causal" else "val_acc"
    figures = {"val_loss": val_loss, "val_ppl": math.exp(min(val_loss, 700)), name: second}
    for name, windows in data.val_of_source.items():
        if windows.n == 0:
            continue
        source_loss, _ = evaluate(net, windows, data, run, cast, device_batch_size, eval_tokens)
        figures[f"val_loss.{name}"] = source_loss
    return figures


def validate_and_keep_best(net, tok, data, folder, state, cast, batch, saves):
    """Validate: the figures, which are recorded and told with what they mean; the best model so far
    is kept in best/. saves: whether the run is saved next."""
    run = folder.run
    figures = validate(net, data, run, cast, batch.device_batch_size)
    folder.record({"step": state.step, "tokens": state.windows * seq_len} | figures)
    state.history.append([state.step, state.mean_loss, figures["val_loss"]])
    words = [f"{key} {value:.4f}" for key, value in figures.items()]
    run.say(f"step {state.step}: {'  '.join(words)}")
    for remark in remarks(keys(), state.history, math.log(net.config.vocab_size)):
        run.say(f"note: {remark}")
    if figures["val_loss"] < state.best:
        state.best = figures["val_loss"]
        if folder.saver:
            folder.saver.save_best(net, tok, state.step, saves)
        elif run.is_main:
            save(folder.path / "best", net, tok, state.step)
        run.wait_for_main()
    return figures


def look_on(net, tok, data, folder, state, cast, batch, progress, saves):
    """Validate, and show what the model writes by now: the figures of the validation. saves: as
    `validate_and_keep_best` takes it."""
    figures = validate_and_keep_best(net, tok, data, folder, state, cast, batch, saves)
    if sample_tokens and progress < 1:  # sample.py shows the last one
        show_sample(net, tok, data, folder.run, cast)
    return figures


def show_sample(net, tok, data, run, cast):
    """A few tokens of what the model writes by now, each line set off: of an encoder what it sees
    behind masks, of an encoder-decoder the spans of a window. Of a network in parts every process
    computes its own."""
    if not (run.is_main or run.mesh.sizes.is_sharded) or not can_sample(run):
        return
    with cast:
        text = sample_text(keys(), net, tok, data, run.mesh.pipeline)
    divide_again(run.mesh.pipeline.submodule if run.mesh.pipeline else net)
    run.say("  | " + text.replace("\n", "\n  | "))


def can_sample(run):
    """Whether the network's parts can write: stages of a pipeline do by a pass for each token."""
    alone = objective == "causal" and run.mesh.sizes.cp == 1
    return alone or run.mesh.pipeline is None


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
        with exchanging(network, run.mesh.sizes, is_last):
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
    words = [
        f"step {row['step']} ({100 * progress:.0f} %)",
        f"loss {row['loss']:.4f}",
        f"left {duration(seconds_left)}",
        f"{row['tok_s']:,.0f} tok/s",
    ]
    if row["dt"] >= 1:  # a slow one
        words.append(step_words(row["dt"]))
    words += [f"norm {row['grad_norm']:.2f}", f"lr {row['lr']:.2e}"]
    if row["mfu"]:  # of a device whose peak is known
        words.append(f"mfu {100 * row['mfu']:.1f} %")
    if row["mem"]:
        words.append(f"mem {row['mem'] / 2**30:.2f} GiB")
    run.progress("  ".join(words))


def memory_advice():
    """What to change where memory runs out."""
    size = micro_batch or "as many as seem to fit"
    return (
        f"lower micro_batch (now {size}), lower seq_len (now {seq_len}), or set checkpoint_blocks "
        f"(now {checkpoint_blocks})"
    )


def finish(folder, net, tok, data, row, state, progress, signals):
    """The curves and the last lines of a run, `key: value`, and its exit status."""
    run = folder.run
    run.say("")
    if not row and max_steps == 0 and state.step == 0:
        run.say(f"wrote {out_dir}, as it is before the first step (max_steps=0)")
    elif not row:
        at = f"{out_dir} is at its horizon (step {state.step})"
        run.say(f"nothing to do: {at}; raise max_steps to go on")
    elif progress < 1:
        run.say(f"stopped at step {state.step} and saved; --init_from=resume goes on")
    else:
        run.say(f"wrote {out_dir} in {duration(state.seconds)}")
    if run.is_main:
        say_end(folder, row, next_commands(net, tok, data, progress < 1))
    run.wait()  # for the last save, or the launcher would end it
    return signals.exit_status if progress < 1 else 0


def next_commands(net, tok, data, stopped):
    """{word: command} that may come next."""
    if stopped:
        return {"next": resume_command(out_dir)}
    gap = ""
    if objective != "causal":
        gap = sample_prompt
    if objective != "causal" and not gap:
        gap_id = tok.mask_id if objective == "mlm" else tok.sentinel_ids[0]
        text = tok.decode(data.train.rows([0])[0].tolist())
        gap = gap_prompt(tok, text, gap_id)
    return after_training(net, out_dir, dataset, gap)


def main():
    config = settings(globals())  # as the user gave it
    check_settings(config)
    horizon, schedule = make_schedule()
    run = setup(device, timedelta(seconds=timeout), threads)
    start_watch(run, timeout)
    run.mesh = open_mesh(run, parallel, tp, pp, cp, replicas)
    folder = RunFolder(out_dir, run, config, defaults(globals()), MAY_CHANGE, IGNORES)
    data = open_dataset(run.device)
    check_shared(run, out_dir, data.digest)
    net, tok, saved = open_network(data, folder)
    set_objective(data, net, tok)
    add_end_tokens(tok, data, run)
    run.wait()  # nobody writes before everybody has read
    begin_training(net, run)
    dtype_used, reason = choose_dtype(run.device, dtype, net.config.n_embd)
    cast = autocast(run.device, dtype_used)
    batch, memory = plan_batch(keys(), net, run, dtype_used, saved)
    say_plan(net, run, data, batch, memory, dtype_used, reason)
    clock_begin = time.monotonic()
    network, compiled = prepare_network(net, run, data, batch, dtype_used, saved)
    updater = make_updater(net, run, dtype_used)
    state = restore(saved, net, updater, run)
    clock_begin -= state.seconds
    folder.saver = make_saver(run)
    folder.horizon = {"epoch_tokens": data.train.n * seq_len}
    if run.is_main:
        folder.trackers = make_trackers(out_dir, config, tensorboard, wandb_project)
    begin_part(folder, state, saved, facts_of(data, run, dtype_used, batch, compiled))
    signals = StopSignals()
    routing = RoutingLog(net, run.world, run.mesh.pipeline)
    times = StepTimes(run, network)

    say_notes(run, horizon, batch, data)
    if max_steps == 0 and not saved:
        save_run(folder, net, tok, state, batch, compiled, updater)

    batches = make_batches(data, run, batch)
    gc.freeze()  # what is here by now lives to the end: to search it for cycles would stall a step
    n_windows = data.train.n
    progress = state.progress(horizon, n_windows)
    step_begin = time.monotonic()
    clock = step_begin - clock_begin
    time_left = TimeLeft(progress_at(horizon, state.step, state.windows, clock, n_windows))
    stopped = False
    row = {}
    while progress < 1 and not stopped:
        times.begin()
        torch.manual_seed(step_seed(seed, state.step, run.mesh.dropout_rank))
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
        row |= times.end_step()
        if net.config.mtp and is_finite:
            row["mtp_loss"] = mtp_sum / data.n_targets(batch.size)  # a mean over depths
        folder.record(row if is_finite else row | {"loss": None, "grad_norm": None})
        if not stopped:
            show_progress(run, row, progress, time_left(progress))
        updater.check_bad_steps(learning_rate, warmup_steps)
        saves = state.step % save_every == 0 or progress >= 1 or stopped
        if checksum_every and (state.step % checksum_every == 0 or saves):
            check_copies(run, net, state.step)
        if data.val.n and (state.step % eval_every == 0 or progress >= 1):
            row |= look_on(net, tok, data, folder, state, cast, batch, progress, saves)
        if saves:
            save_run(folder, net, tok, state, batch, compiled, updater)
        step_begin = time.monotonic()
    if folder.saver:
        folder.saver.finish()
    return finish(folder, net, tok, data, row, state, progress, signals)


if __name__ == "__main__":
    with locked_folder(out_dir, lock_patience()), lost_process(), advice_on_memory(memory_advice):
        status = main()
    end_process(status, threads_may_run=tensorboard or bool(wandb_project))
