"""What finetune.py and rl.py do alike, beyond what every run does (run.py, resume.py): opening the
model to start from, the optimizer step, where the run stands, and writing what was learned."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from barelm import checkpoint, resume
from barelm.adapters import (
    AdaptConfig,
    add_prompts,
    add_tokens,
    merge_adapters,
    save_adapter,
    unquantize,
)
from barelm.chat import CHATML, TemplateRefusal
from barelm.checkpoint import load, model_and_bases
from barelm.devices import wide_dtype, widen
from barelm.ending import resume_command, say_end
from barelm.optim import make_optimizer, restore_optimizers, same_kind
from barelm.pace import step_words
from barelm.parallel import check_divided, parallelize, shortened
from barelm.parts import part_like, state_on_host
from barelm.resume import check_parts, check_state, clear_folder, fingerprint, weights_step
from barelm.run import Run, Schedule, UserError, check_least, duration, sync_grads
from barelm.tokenizer import Tokenizer
from barelm.weights import saved_tensors
from model import GPT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim.adamw import AdamW

    from barelm.resume import RunFolder
    from barelm.run import Horizon, StopSignals, Updater

# --------------------------------------------------------------------------------------------------
# Settings

ADAPTS = ("full", "lora", "qlora", "adapter", "prompt")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"--{key}={value}: expected {', '.join(choices)}")


def check_share(config: dict, names: tuple[str, ...]) -> None:
    """Refuse the settings of these names that are no part of one."""
    for name in names:
        if not 0 <= config[name] <= 1:
            raise UserError(f"{name}={config[name]}: expected 0 to 1")


def check_numbers(config: dict) -> None:
    """Refuse numbers that no run can have. config: {key: value} of all keys that the scripts share,
    at least."""
    from_0 = ("seed", "seq_len", "early_stopping", "eval_examples", "train_last", "lora_alpha")
    from_0 += ("learning_rate", "layer_decay", "warmup_steps", "min_lr", "weight_decay")
    check_least(config, (*from_0, "grad_clip"), 0)
    from_1 = ("batch_size", "micro_tokens", "eval_every", "save_every")
    from_1 += ("lora_rank", "adapter_size", "prompt_tokens")
    check_least(config, from_1, 1)
    check_share(config, ("dropout", "lora_dropout", "decay_fraction"))
    limits = {name: config[name] for name in ("max_steps", "max_epochs", "max_minutes")}
    for name, value in limits.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value}: expected more than 0, or none")
    if all(value is None for value in limits.values()):
        raise UserError(f"no horizon: set {', '.join(limits)}: one of them at least")
    names = ("lr_schedule", "warmup_steps", "min_lr", "decay_fraction")
    Schedule(*(config[name] for name in names)).check()


def check_adapt(config: AdaptConfig, merge: bool) -> None:
    """Refuse settings of what learns, an AdaptConfig, and of --merge, that do not go together."""
    check_choice("adapt", config.adapt, ADAPTS)
    if config.train_last != 0 and config.adapt != "full":
        raise UserError(f"train_last={config.train_last}: of --adapt=full, not of {config.adapt}")
    if merge not in (False, True, "quantized"):  # any text is a value of a bool | str
        raise UserError(f"--merge={merge}: expected nothing behind it, or quantized")
    if merge and not config.is_lora:
        raise UserError(f"--merge: there is no adapter to merge of --adapt={config.adapt}")
    if merge == "quantized" and config.adapt != "qlora":
        raise UserError("--merge=quantized: only qlora has weights in 4 bits")


def count_steps(n_examples: int, batch_size: int, max_steps: int, max_epochs: float) -> int:
    """The optimizer steps of a run; None where neither is set, so that its clock alone ends it."""
    limits = []  # the first that is reached ends the run
    if max_steps:
        limits.append(max_steps)
    if max_epochs:
        limits.append(math.ceil(n_examples / batch_size * max_epochs))  # the last may begin another
    return min(limits, default=None)


# --------------------------------------------------------------------------------------------------
# The model to start from


@dataclass
class Learner:
    """A network that is being adapted, and what is needed to write it."""

    run: Run
    net: GPT
    tok: Tokenizer
    base: str  # the model that it was: a folder, or a name on the Hub
    adapt: AdaptConfig
    has_value_head: bool = False  # PPO's score: saved to resume, but no part of the model
    compiled: bool = False  # whether its blocks are

    def params(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of those that learn."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}


def open_learner(run: Run, base: str, adapt: AdaptConfig, seed: int, dropout: float = 0.0,
                 fast: bool = True, add_markers: bool = False) -> Learner:  # fmt: skip
    """The model `base` with its tokenizer, and with soft prompts if AdaptConfig asks for them.
    seed: of all that is drawn from here on. fast: as GPT takes it.
    add_markers: give a model without a chat template ChatML's, and rows for its markers."""
    # Of qlora the 4 bits alone go to the device, once they are made, and of a network that is
    # divided a part.
    by_parts = adapt.adapt == "qlora" or run.is_divided
    net, tok = load(base, "cpu" if by_parts else run.device, fast=fast)
    if add_markers and not tok.config.get("chat_template"):
        if adapt.is_lora:  # a PEFT folder has no place for new rows of the embedding
            raise UserError(f"{base} has no chat template, and new tokens need --method=sft first")
        tok = add_tokens(net, tok, ("<|im_start|>", "<|im_end|>"), CHATML)
        run.say(f"{base} has no chat template: ChatML's is added")
    torch.manual_seed(seed)  # of the prompts, and later of LoRA's matrices or a head
    if adapt.adapt == "prompt":
        tok = add_prompts(net, tok, adapt.prompt_tokens)
    net.config.dropout = dropout
    return Learner(run, net, tok, base, adapt)


def stop_at_turns(learner: Learner, learns_end: bool = False) -> None:
    """Let generation end where the chat template ends an answer, too. learns_end: whether the
    network learns that end, so that a template without one is worth a word."""
    tok = learner.tok
    ends = []
    try:
        ends = tok.end_of_turn()
    except TemplateRefusal as error:  # a reward model needs none, and templates may replace it
        learner.run.say(f"{learner.base}: answers end at the end token alone: {error}")
    else:
        if not ends and learns_end:
            learner.run.say(
                f"{learner.base}: its chat template ends no answer with a special token: the model "
                "learns no end (put {{ eos_token }} behind an assistant's content in it)"
            )
    for token in ends:
        if token not in tok.eos_ids:
            tok.eos_ids = [*tok.eos_ids, token]


def facts_of(run: Run, dataset: str, data: str, base: str, dtype: torch.dtype) -> dict:
    """What the settings came to: the data, the model to start from, what it is computed in. A
    resume with other ones is refused, or told."""
    files = sorted((Path("data") / dataset).glob(f"{data}_*.jsonl"))
    patterns = (
        "config.json",
        "adapter_config.json",
        "tokenizer.json",
        "*.safetensors",
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    model_files = []
    for folder in model_and_bases(base):  # an adapter is as much its base
        for pattern in patterns:
            model_files += sorted(folder.glob(pattern))
    return {
        "dataset": dataset if dataset == "arithmetic" else fingerprint(files),
        "model": fingerprint(model_files),
        "processes": run.world,
        "mesh": run.mesh.sizes.words(),
        "computed_in": str(dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def make_optimizers(net: GPT, name: str, learning_rate: float, weight_decay: float,
                    layer_decay: float, beta2: float = 0.99) -> list[AdamW]:  # fmt: skip
    """`make_optimizer`'s; with a layer_decay other than 1 each block learns at the rate of the one
    behind it times that, the embedding slowest of all (Howard and Ruder 2018, section 3.2)."""
    optimizers = make_optimizer(net, name, learning_rate, weight_decay, (0.9, beta2))
    if layer_decay == 1:
        return optimizers
    n_encoder_layer = net.config.n_encoder_layer
    n_layer = n_encoder_layer + net.config.n_layer
    depths = {}
    for name, p in net.named_parameters():
        depths[p] = depth_of(name, n_layer, n_encoder_layer)
    for optimizer in optimizers:
        groups = []
        for group in optimizer.param_groups:  # with weight decay, and without
            for depth in sorted({depths[p] for p in group["params"]}):
                params = [p for p in group["params"] if depths[p] == depth]
                peak = group["initial_lr"] * layer_decay ** (n_layer + 1 - depth)
                groups.append(group | {"params": params, "initial_lr": peak})
        optimizer.param_groups = groups
    return optimizers


def depth_of(name: str, n_layer: int, n_encoder_layer: int = 0) -> int:
    """The place of a parameter on the way up: 0 the embedding, then the blocks, those of an encoder
    before the decoder's, then the rest."""
    _, in_layers, place = name.partition(".layers.")
    if in_layers:
        before = 0 if ".encoder." in name else n_encoder_layer
        return before + int(place.split(".")[0]) + 1
    return 0 if "embed" in name else n_layer + 1


# --------------------------------------------------------------------------------------------------
# A step


def sum_figures(
    run: Run, figures: Counter | dict[str | tuple[int, int], float]
) -> Counter | dict[str | tuple[int, int], float]:
    """{name: number} summed over all processes, of which each may have other names."""
    if run.world == 1:
        return figures
    # As objects, not as a tensor: a process without an example has no names to agree on.
    everyone = [None] * run.world
    dist.all_gather_object(everyone, figures)
    total = Counter()
    for of_one in everyone:
        total.update(of_one)
    return total


def say_plan(learner: Learner, n_params: int, n_steps: int, max_minutes: float | None, batch: str,
             data: str, computing: tuple[torch.dtype, str], warmup_steps: int) -> None:  # fmt: skip
    """What a run is about to do. batch: what a step has, such as "16 examples"; data: what there
    is; computing: the dtype, and why."""
    run = learner.run
    n_learning = sum(p.numel() for p in learner.params().values())
    horizon = f"{n_steps:,} steps" if n_steps else f"{max_minutes:g} minutes of steps"
    dtype, reason = computing
    run.say(
        f"model: {learner.base}, {n_params:,} parameters; {n_learning:,} learn "
        f"({learner.adapt.adapt})\n"
        f"data: {data}; {horizon} of {batch}\n"
        f"device: {run.device}, computing in {str(dtype).removeprefix('torch.')}: {reason}\n"
        f"threads: {run.threads.words()}"
    )
    if n_steps and warmup_steps >= n_steps:
        run.say(
            f"note: warmup_steps={warmup_steps} is the whole run: no step has the learning rate"
        )


def check_parallel(
    run: Run, parallel: str, batch_size: int, name: str, adapt: AdaptConfig, merge: bool
) -> None:
    """Refuse what is not done with a network that is divided. name: the method's."""
    if parallel == "ddp":
        return
    if batch_size % run.world:
        near = max(1, round(batch_size / run.world)) * run.world
        why = f"no multiple of the {run.world} processes, which compute together"
        raise UserError(f"batch_size={batch_size}: {why}: --batch_size={near}")
    if name == "embed":
        why = "its batch goes through the network twice, and by other parts on each process"
        raise UserError(f"--method=embed --parallel={parallel}: {why}: --parallel=ddp")
    if adapt.is_lora and name in ("classify", "tag", "span", "reward", "ppo"):
        why = "its folder is a merged copy of the whole network"
        raise UserError(f"--method={name} --adapt={adapt.adapt} --parallel={parallel}: {why}")
    if merge == "quantized":
        raise UserError(f"--merge=quantized --parallel={parallel}: merge it on one process")


def place(learner: Learner) -> None:
    """Put the network on the device; of one that will be divided, a part comes there then."""
    if not learner.run.is_divided:
        learner.net.to(learner.run.device)
    learner.net.train()


def divide(learner: Learner, dtype: torch.dtype) -> None:
    """Divide the network over the processes, where it is to be."""
    run = learner.run
    if not run.is_divided:
        return
    check_divided(learner.net, dtype, run.mesh.sizes)
    parallelize(learner.net, run.mesh, dtype)


def trial(learner: Learner) -> AbstractContextManager:
    """The context in which a network is tried: all of it, or of one that will be divided a few
    blocks."""
    run = learner.run
    if run.is_divided:
        return shortened(learner.net, run.device)
    return contextlib.nullcontext(learner.net)


def rounds(run: Run, groups: Iterable[list[dict]], spare: Sequence[dict] = ()) -> list:
    """[(group, whether it counts)] of this process's groups of examples. Where the network is
    divided every process has as many: what is missing is filled up with the first, or with the
    examples of `spare`."""
    groups = [(group, True) for group in groups]
    if not run.is_divided:
        return groups
    n_missing = run.most(len(groups)) - len(groups)
    filling = groups[0][0] if groups else list(spare)
    return groups + [(filling, False)] * n_missing


def update(updater: Updater, groups: Iterator, loss_of: Callable, size: float,
           names: tuple[str, ...], cast: AbstractContextManager, step: int, warmup_steps: int,
           zero_is_fault: bool = True) -> tuple[dict[str, float], float]:  # fmt: skip
    """One optimizer step on this process's groups of examples (micro-batches): ({figure: its mean
    over all processes}, the gradient's norm).

    loss_of(group) gives a sum of losses, and {figure: its sum}; names: the figures', which a
    process without an example could not tell. size: what the sums of all processes together are
    sums of, such as targets; the loss is divided by it, so that neither micro-batches nor processes
    change the gradient. zero_is_fault: see Updater.step."""
    size = max(size, 1e-9)  # a batch without a target: no loss, and no NaN
    sums = accumulate_gradients(updater, groups, loss_of, size, names, cast)
    # The gradients are sums already, of losses over the whole batch's size: no mean is taken.
    if not updater.run.is_divided:
        sync_grads(updater.params)
    norm = updater.clip_gradients()
    # The one exchange of a step's figures, and its one wait for the device.
    totals = updater.run.sum(*sums.values())
    norm = float(norm)
    means = {name: total / size for name, total in zip(sums, totals)}
    updater.step(step, means["loss"], norm, step < warmup_steps, zero_is_fault)
    return means, norm


def accumulate_gradients(updater: Updater, groups: Iterable[list[dict]], loss_of: Callable,
                         size: float, names: tuple[str, ...],
                         cast: AbstractContextManager) -> dict[str, Tensor]:  # fmt: skip
    """Forward and backward of each group: {figure: its sum}, of the loss and of these names, 0-dim
    float64 tensors. Nothing here waits for the device."""
    device = updater.run.device
    sums = {}
    for name in ("loss", *names):
        sums[name] = torch.zeros((), dtype=wide_dtype(device), device=device)
    # Parts are exchanged as means over all processes.
    n_exchanging = updater.run.world if updater.run.is_divided else 1
    for group, counts in rounds(updater.run, groups):
        with cast:
            loss, figures = loss_of(group)
        updater.backward(loss * (counts * n_exchanging / size))
        if counts:
            add_figures(sums, figures | {"loss": loss})
    return sums


def add_figures(sums: Counter | dict[str, Tensor], figures: dict[str, Tensor]) -> None:
    """Add figures, {name: number or 0-dim tensor}, to the sums of these names: in float64, and
    where they are, so that nothing waits for the device."""
    for name, value in figures.items():
        if isinstance(value, torch.Tensor):
            value = widen(value.detach())
        sums[name] = sums[name] + value


def read_figures(sums: Counter) -> dict[str | tuple[int, int], float]:
    """The same with numbers for the tensors, all of which one wait reads."""
    tensors = {name: v for name, v in sums.items() if isinstance(v, torch.Tensor)}
    numbers = torch.stack([*tensors.values()]).tolist() if tensors else []
    return sums | dict(zip(tensors, numbers))


@contextlib.contextmanager
def saved_on_failure(
    learner: Learner, updater: Updater, state: State, folder: RunFolder
) -> Iterator[None]:
    """Save the run where a reward or an update ends it: nothing was learned in this step."""
    try:
        yield
    except UserError:
        if state.step:  # else there is nothing that the base has not
            save_run(learner, updater, state, folder)
            learner.run.say(f"saved at step {state.step}; --init_from=resume goes on")
            learner.run.wait()  # all have failed: see failing_together
        raise


@contextlib.contextmanager
def failing_together(run: Run) -> Iterator[None]:
    """A UserError of one process, whose samples alone are at fault, is one of all processes at the
    end of this context: they can still save what they hold together."""
    error = None
    try:
        yield
    except UserError as own_error:
        error = own_error
    [n_failed] = run.sum(error is not None)
    if error is not None:
        raise error
    if n_failed:
        raise UserError(f"{n_failed:.0f} of the other processes failed: their last lines say why")


def step_row(
    state: State, figures: dict[str, float], lr: float, norm: float, step_begin: float
) -> dict[str, float]:
    """The figures of a step that has just ended, and began at step_begin (time.monotonic)."""
    dt = time.monotonic() - step_begin
    return {"step": state.step} | figures | {"lr": lr, "grad_norm": norm, "dt": dt}


def show_step(run: Run, row: dict, n_steps: int, seconds_left: float | None) -> None:
    """The line of progress of a step: its row of the log, and the time that is left."""
    if not run.is_main:
        return
    others = ("step", "lr", "grad_norm", "dt")  # which the line has in its own way
    figures = {key: value for key, value in row.items() if key not in others}
    of = f" of {n_steps}" if n_steps else ""
    run.progress(
        f"step {row['step']}{of}  {words(figures)}  left {duration(seconds_left)}  "
        f"{step_words(row['dt'])}  norm {row['grad_norm']:.2f}  lr {row['lr']:.2e}"
    )


def log_row(figures: dict[str, float]) -> dict[str, float]:
    """A row for log.jsonl, which as JSON has no number that is not finite."""
    row = {}
    for name, value in figures.items():
        row[name] = value if math.isfinite(value) else None
    return row


def words(figures: dict[str, float]) -> str:
    """Figures as a line shows them."""
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items())


def check_equal_weights(run: Run, params: Iterable) -> None:
    """End a run of several processes whose weights have come apart."""
    if run.world == 1 or run.is_divided:  # of parts no process has another's
        return
    # The sum of all weights, in the same order everywhere: equal or not at all.
    own_sum = float(sum(p.detach().double().sum() for p in params))
    sums = [None] * run.world
    dist.all_gather_object(sums, own_sum)
    if len(set(sums)) > 1:
        raise UserError(f"the processes' weights have come apart: {sums}")
    run.say(f"weights: equal on {run.world} processes")


# --------------------------------------------------------------------------------------------------
# Where a run stands, and what it writes


@dataclass
class State:
    """Where a run stands: what state.pt has beside the weights and the optimizers."""

    step: int = 0  # optimizer steps done
    best: float = math.inf  # the best validation's score, the lower the better
    since_best: int = 0  # validations since then
    first_verdict: dict | None = None  # the figures of the one before the first step
    seconds: float = 0.0  # of the main process's clock
    warm_seconds: float = 0.0  # the seconds when the warm-up ended; the present ones while it lasts

    def is_best(self, score: float) -> bool:
        """Note the score of a validation: whether no other was as good."""
        self.since_best += 1
        if not score < self.best:  # nor is a NaN
            return False
        self.best = score
        self.since_best = 0
        return True

    def stops_early(self, early_stopping: int, run: Run) -> bool:
        """Whether so many validations had no new best; 0: never."""
        early = 0 < early_stopping <= self.since_best
        if early:
            n = self.since_best
            run.say(f"no new best in {n} validations: stopped; best/ has the best")
        return early

    def progress(self, horizon: Horizon) -> float:
        """The part of the run that is done, 0 to 1."""
        return horizon.progress(self.step, seconds=self.seconds)

    def advance(self, run: Run, clock_begin: float, signals: StopSignals) -> bool:
        """Count a step: whether a signal to any process stops the run. The main process's clock,
        which began at clock_begin, is everyone's."""
        clock = time.monotonic() - clock_begin if run.is_main else 0.0
        n_signals, self.seconds = run.sum(signals.received > 0, clock)
        self.step += 1
        return n_signals > 0  # a save is one of all processes

    def lr_scale(self, schedule: Schedule, horizon: Horizon) -> float:
        """The factor of the learning rate in the step that begins."""
        warm_step = min(self.step, schedule.warmup_steps)
        if self.step == warm_step:
            self.warm_seconds = self.seconds
        progress = self.progress(horizon)
        warm_end = horizon.progress(warm_step, seconds=self.warm_seconds)
        return schedule.scale(self.step, progress, warm_end)


def load_state(folder: Path) -> dict:
    """What save_run wrote into a folder: a dict."""
    saved = resume.load_state(folder)
    path = folder / "state.pt"
    older = {"warm_seconds": 0.0, "scaler": None, "compiled": False}  # what they did not save
    saved = older | saved
    kinds = dict(step=0, since_best=0, seconds=0.0, warm_seconds=0.0, compiled=True)
    kinds["best"] = -1.0  # any number: that of a reward is below 0
    kinds |= dict(weights={}, optimizers=[], parts=[])
    check_state(saved, kinds, path)
    check_parts(saved["parts"], path)
    first = saved.get("first_verdict", "")
    is_right = first is None  # before any validation
    if isinstance(first, dict):
        is_right = all(type(figure) is float for figure in first.values())
    if not is_right:
        raise UserError(f"{path}: first_verdict is none of a run's: damaged, or foreign")
    return saved


def restore(saved: dict | None, learner: Learner, updater: Updater, folder: RunFolder) -> State:
    """The State of a run that goes on, from what load_state gave. Weights, optimizers and scaler
    are put back. With None: the State of a run that begins."""
    if saved is None:
        return State()
    path = folder.path / "state.pt"
    params = learner.params()
    weights = saved["weights"]
    same_names = params.keys() == weights.keys()
    if not same_names or not all(same_kind(weights[name], p) for name, p in params.items()):
        raise UserError(f"{path}: its weights are not those that learn here: damaged, or foreign")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(part_like(weights[name], p))
    restore_optimizers(updater.optimizers, saved["optimizers"], path)
    # A part of the run in another dtype has no scaler.
    if updater.scaler and saved["scaler"]:
        check_state(saved["scaler"], updater.scaler.state_dict(), path)
        updater.scaler.load_state_dict(saved["scaler"])
    learner.run.say(f"resumed {folder.path} at step {saved['step']}")
    return State(**{field.name: saved[field.name] for field in fields(State)})


def begin_part(
    folder: RunFolder, state: State, saved: dict | None, facts: dict, n_steps: int
) -> None:
    """Begin a part of the run, of n_steps in all, in its folder; a best that a resume's changes
    have made none is forgotten."""
    folder.horizon = {"max_steps": n_steps}
    changed = folder.begin(state.step, facts, saved)
    if "eval_examples" in changed:  # a loss of other examples: the best is another
        state.best = math.inf
    # best/ is of a later step, which will now be another. Read on a resume alone: where a run is
    # replaced, the main process is deleting it meanwhile.
    if changed and weights_step(folder.path / "best") > state.step:
        state.best = math.inf


def say_wrote(folder: RunFolder, row: dict, state: State) -> None:
    """Say that a run has come to its end, or was there already."""
    if row:
        folder.run.say(f"wrote {folder.path} in {duration(state.seconds)}")
    else:
        at = f"{folder.path} is at its horizon (step {state.step})"
        folder.run.say(f"nothing to do: {at}; raise max_steps or max_epochs to go on")


def stop(folder: RunFolder, row: dict, state: State, signals: StopSignals) -> int:
    """The curves and last lines of a run that was told to stop, and has saved: its exit status."""
    run = folder.run
    run.say(f"stopped at step {state.step} and saved; --init_from=resume goes on")
    if run.is_main:
        say_end(folder, row, {"next": resume_command(folder.path)})
    run.wait()  # or the launcher would end the save
    return signals.exit_status


def save_run(learner: Learner, updater: Updater, state: State, folder: RunFolder) -> None:
    """Write a run's folder, a RunFolder, with all that a resume needs."""
    if learner.run.is_main:
        clear_folder(folder.path / "merged")  # of the adapter that is replaced
    saved = asdict(state) | {"parts": folder.parts}
    # Beside the folder's: an adapter that is merged, or a value head, is in no file of it.
    saved["weights"] = {name: p.detach() for name, p in learner.params().items()}
    saved["compiled"] = learner.compiled
    saved["optimizers"] = [optimizer.state_dict() for optimizer in updater.optimizers]
    if learner.run.is_divided:  # the main process's host has the whole
        for name in ("weights", "optimizers"):
            saved[name] = state_on_host(saved[name], learner.run.is_main)
    saved["scaler"] = updater.scaler.state_dict() if updater.scaler else None
    save_weights(learner, folder.path, state.step, saved)


def save_weights(learner: Learner, folder: Path, step: int, saved: dict | None = None) -> None:
    """Write what was learned: a checkpoint folder, or an adapter; with `saved` also state.pt."""
    net = learner.net
    tok = learner.tok
    is_main = learner.run.is_main
    is_divided = learner.run.is_divided
    if not is_main and not is_divided:
        return
    score = net.score
    if learner.has_value_head:  # taken off while the policy is written
        net.score = None
    if not learner.adapt.is_lora:
        tensors = saved_tensors(net)
        if is_divided:
            tensors = state_on_host(tensors, is_main)
        if is_main:
            checkpoint.save(folder, net, tok, step, saved, tensors)
    elif net.score is None:
        save_adapter(folder, net, tok, learner.base, learner.adapt, step, saved, is_main)
    else:  # PEFT's file has no place for our score; the copy is merged, training goes on
        checkpoint.save(folder, merge_adapters(copy.deepcopy(net)), tok, step, saved)
    net.score = score


def finish_adapter(learner: Learner, out: Path, step: int, merge: bool) -> None:
    """Write merged/ if asked for, and say on which weights each folder stands: qlora has learned on
    4 bits, while a reader of its adapter adds it to the weights that these were made of. The
    network is a plain one then."""
    if not learner.run.is_main or not learner.adapt.is_lora:
        return
    net = learner.net
    base = learner.base
    say = learner.run.say
    if learner.has_value_head:
        net.score = None
    full = f"the weights of {base}"
    packed = f"the 4 bits of {base} that it was trained on"
    is_packed = learner.adapt.adapt == "qlora"
    if net.score is None:
        say(f"adapter: {out}, which opens on {full}")
    else:
        say(f"plain folder: {out}, merged into {packed if is_packed else full}")
    if not merge:
        return
    if learner.run.is_divided:
        net, _ = load(out, "cpu")
    elif is_packed and merge != "quantized":  # the products go onto the weights as they were
        base_net, _ = load(base, net.model.embed_tokens.weight.device)
        unquantize(net, base_net)
    clear_folder(out / "merged")
    checkpoint.save(out / "merged", merge_adapters(net).eval(), learner.tok, step)
    say(f"merged: {out / 'merged'}, into {packed if merge == 'quantized' else full}")
