"""Reinforcement learning: a model learns from rewards for its own answers: GRPO, RLOO, PPO.

    python finetune.py --dataset=arithmetic --out_dir=out/sums --max_epochs=10 --learning_rate=1e-3
    python rl.py config/grpo.py                         # sums of two digits: the reward rises
    python rl.py config/rloo.py                         # the same, each answer against the others
    python rl.py --method=ppo --model=out/sft --reward=out/reward --out_dir=out/rl
    torchrun --nproc_per_node=8 rl.py --model=out/sft --reward=mine.py:score --out_dir=out/rl

A step: roll out (sample answers to prompts), reward each, make advantages of the rewards, update.
Reads the prompts of data/<dataset>/sft_{train,val}.jsonl; data set `arithmetic` needs no file.
Writes out_dir/ as finetune.py does. Ctrl-C and SIGTERM save and exit.
"""

from config import configure, defaults, settings

# what, from what, to where
method = "grpo"  # grpo (Shao et al. 2024), rloo (Ahmadian et al. 2024), ppo (Schulman 2017)
model = "out/sft"  # the checkpoint folder to start from
dataset = "python"  # data/<dataset> has sft_{train,val}.jsonl; or arithmetic
out_dir = "out/rl"  # where the result is written
init_from = "base"  # base, resume (go on where out_dir was stopped), or auto: what there is
overwrite = False  # let base replace the run that out_dir holds
seed = 0  # of the order of the data, dropout and samples

# the samples
reward = "overlap"  # overlap, arithmetic, gsm8k, a reward model's folder, or FILE.py:function
batch_size = 16  # prompts per step, over all processes
group_size = 8  # grpo, rloo: samples of each prompt, which are compared with each other
max_new_tokens = 64  # of a sample
temperature = 1.0  # of the samples
seq_len = 0  # tokens of prompt and answer, at most; 0: the model's context

# the loss
rl_epochs = 1  # passes over the samples of a step (ppo wants 4)
minibatches = 1  # updates in a pass
clip = 0.2  # the ratio of probabilities stays within 1 - clip and 1 + clip
kl_weight = 0.0  # of the divergence from the model at the start
value_weight = 0.5  # ppo: of the value head's loss
gae_lambda = 0.95  # ppo: generalized advantage estimation
gamma = 1.0  # ppo: the discount

# how long: the first of these that is reached ends the run
max_steps: int | None = None  # steps
max_epochs: float | None = 1.0  # passes over the prompts
max_minutes: float | None = None  # minutes of wall clock, validation included
early_stopping = 0  # end after so many validations without a new best; 0: never

# which weights learn
adapt = "full"  # full, lora, qlora, adapter (bottlenecks) or prompt (soft prompts; not ppo)
train_last: int | None = 0  # the last so many blocks, final norm and head; 0: all; none: the head
lora_rank = 8  # r of lora and qlora
lora_alpha = 16.0  # the added matrices' product is scaled by alpha / r
lora_dropout = 0.0  # on the input of the added matrices
lora_targets = "q_proj,k_proj,v_proj,o_proj"  # layers by name; gate_proj,up_proj,down_proj too
adapter_size = 16  # width of the bottlenecks
prompt_tokens = 8  # number of soft prompts
merge: bool | str = False  # write merged/ too, a plain folder; quantized: of qlora's 4 bits

# the optimizer
optimizer = "adamw"  # any of train.py's
learning_rate = 3e-4  # the peak
lr_schedule = "linear"  # linear, cosine, trapezoid or constant, after the warm-up
warmup_steps = 10  # steps of linear warm-up
min_lr = 0.0  # the last learning rate, as a fraction of the peak
decay_fraction = 0.4  # trapezoid: the part of the run that decays
layer_decay = 1.0  # the learning rate of a block over that of the one behind it
weight_decay = 0.0  # decoupled
grad_clip = 1.0  # the largest gradient norm; 0: no clipping
dropout = 0.0  # in the network

# several processes: who holds what (docs/scale.md)
parallel = "ddp"  # ddp: each holds all; fsdp: a part of every matrix; hsdp: fsdp within a machine
replicas = 0  # hsdp: copies of the whole; 0: one a machine

# the machine
device = "auto"  # auto, cpu, mps, cuda, cuda:1
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
dtype = "auto"  # auto, float32, bfloat16, float16
micro_tokens = 4096  # tokens at once on a device, at most, but one sample at least
compile: bool | None = None  # torch.compile of the blocks; none: where it pays
fast = True  # false: model.py's plain mathematics alone, a referee for a doubtful result
deterministic = False  # a text's bits do not depend on the batch: slower (docs/determinism.md)
checkpoint_blocks: int | bool = False  # recompute so many blocks (bare: all): less memory, slower

# looking on
eval_every = 100  # steps between validations; there is one at the start and one at the end
eval_examples = 400  # validation prompts each time, the first ones; 0: all
save_every = 200  # steps between checkpoints

if __name__ == "__main__":
    configure(globals())

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from barelm.adapters import AdaptConfig, choose_weights
from barelm.checkpoint import refuse_source
from barelm.devices import widen
from barelm.ending import after_tuning, say_end
from barelm.examples import (
    IGNORED,
    batch_of,
    count_targets,
    load_examples,
    micro_batches,
    n_tokens,
    padded,
    padded_length,
    places_of_targets,
    share_of,
)
from barelm.fitting import (
    Load,
    flops_of_run,
    generate_all,
    prepare_network,
    say_memory,
    why_not_compile,
)
from barelm.generation import check_generates
from barelm.invariant import be_deterministic
from barelm.mesh import open_mesh
from barelm.optim import n_params
from barelm.pace import TimeLeft
from barelm.parallel import divide_again, parallelize, whole_weights
from barelm.resume import (
    RESUME_IGNORES,
    RESUME_MAY_CHANGE,
    RunFolder,
    choose_start,
    fingerprint,
    locked_folder,
)
from barelm.rewards import open_reward, reward_of
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
    end_process,
    make_scaler,
    setup,
    step_seed,
    to_device,
)
from barelm.tasks import GSM8K_STOP
from barelm.tuning import (
    begin_part,
    check_adapt,
    check_choice,
    check_equal_weights,
    check_numbers,
    check_parallel,
    check_share,
    count_steps,
    divide,
    facts_of,
    failing_together,
    finish_adapter,
    load_state,
    log_row,
    make_optimizers,
    open_learner,
    place,
    restore,
    rounds,
    save_run,
    save_weights,
    saved_on_failure,
    say_plan,
    say_wrote,
    show_step,
    step_row,
    stop,
    stop_at_turns,
    trial,
    update,
    words,
)
from barelm.watch import lost_process, start_watch

# --------------------------------------------------------------------------------------------------
# Roll out: prompts become samples


def read_prompt(row, tok, limit):
    """A conversation up to its last answer, and that answer, which a reward may look at."""
    *messages, answer = row["messages"]
    if answer["role"] != "assistant" or not isinstance(answer["content"], str):
        raise UserError("its last message is no assistant's text")
    ids, _ = tok.chat(messages, add_generation_prompt=True)
    if len(ids) + max_new_tokens > limit:
        raise UserError(f"the prompt and max_new_tokens take more than {limit} tokens")
    return {"ids": ids, "messages": messages, "answer": answer["content"]}


def roll_out(net, tok, prompts, judge, seed, cast, n=1):
    """Sample n answers to each prompt: examples with inputs, targets (IGNORED on the prompt), a
    reward by the function `judge`, and `group`, the number of the prompt."""
    repeated = []
    for prompt in prompts:
        repeated += [prompt] * n
    # As in the evaluation: an answer ends where the model asks itself the next question.
    stops = GSM8K_STOP if reward == "gsm8k" else ()
    with cast, whole_weights(net):
        generations = generate_all(
            net,
            tok,
            [prompt["ids"] for prompt in repeated],
            max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop=stops,
        )
    samples = []
    for i, (prompt, g) in enumerate(zip(repeated, generations)):
        # The last token of the prompt is asked for the first of the answer.
        sample = {
            "ids": (prompt["ids"] + g.ids)[:-1],
            "targets": [IGNORED] * (len(prompt["ids"]) - 1) + g.ids,
            "reward": reward_of(judge, reward, prompt, g.text),
            "group": i // n,
        }
        samples.append(sample)
    return samples


def look(net, samples, n_vocab):
    """Of the N answer tokens of the samples, one sample after the other, under the distribution
    that they are drawn from: log p (N,), the entropy (N,), and the values (N,) or None.
    n_vocab: ids from here on are padding, which is never sampled."""
    places, targets = places_of_targets(samples, net)  # (N,)
    h = net.hidden(padded(samples, "ids", net))  # (B, T, C)
    h = h.flatten(0, 1).index_select(0, places)  # (N, C)
    logits = net.logits(h)[:, :n_vocab].float() / temperature
    log_probs = logits.log_softmax(-1)  # (N, n_vocab)
    log_p = log_probs.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    if net.score is None:
        return log_p, entropy, None
    return log_p, entropy, net.ops.project(h, net.score).float()[:, 0]


@torch.no_grad()
def add_log_probs(run, net, reference, samples, n_vocab, cast):
    """Put into each sample of T answer tokens their log-probabilities (T,) `old` under the network
    as it is now and `ref` under the reference, and with a value head their values (T,)."""
    samples = sorted(samples, key=n_tokens)
    seen = {"old": [], "ref": [], "value": []}  # of each group, on the device
    net.eval()  # dropout would take the old log-probabilities from another network
    for group, counts in rounds(run, micro_batches(samples, micro_tokens, net)):
        with cast:
            old, _, value = look(net, group, n_vocab)
            ref = old
            if reference is not None:
                ref, _, _ = look(reference, group, n_vocab)
        if not counts:
            continue
        seen["old"].append(old)
        seen["ref"].append(ref)
        if value is not None:
            seen["value"].append(value)
    net.train()
    divide_again(net)
    lengths = [count_targets([sample]) for sample in samples]
    for key, of_groups in seen.items():
        if of_groups:
            values = torch.cat(of_groups).cpu()  # the first of these waits for the device
            for sample, part in zip(samples, values.split(lengths)):
                sample[key] = part


# --------------------------------------------------------------------------------------------------
# Advantage: how much better than expected each token of an answer was


def add_group_advantages(run, samples):
    """GRPO: each answer's reward against those of the other answers to its prompt."""
    rewards = [sample["reward"] for sample in samples]
    groups = [sample["group"] for sample in samples]
    for sample, advantage in zip(samples, group_advantages(rewards, groups)):
        sample["advantage"] = torch.full_like(sample["old"], float(advantage))


def group_advantages(rewards, groups):
    """(N,) float: each reward less its group's mean, over its deviation (Shao et al. 2024); exactly
    0 in a group of equal rewards, which says nothing."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    groups = torch.tensor(groups)
    advantages = torch.zeros_like(rewards)
    for g in groups.unique():
        group = rewards[groups == g]
        if group.min() < group.max():  # else the mean's rounding would count as a difference
            deviation = group.std(unbiased=False)
            advantages[groups == g] = (group - group.mean()) / (deviation + 1e-4)
    return advantages.float()


def add_leave_one_out(run, samples):
    """RLOO: each answer's reward against the mean of the other answers' to its prompt. A whole
    answer is one action: it has one advantage, (1,), and its divergence from the reference is taken
    off its reward."""
    rewards = []
    for sample in samples:
        divergence = float((sample["old"] - sample["ref"]).sum())
        rewards.append(sample["reward"] - kl_weight * divergence)
    groups = [sample["group"] for sample in samples]
    for sample, advantage in zip(samples, leave_one_out(rewards, groups)):
        sample["advantage"] = advantage.reshape(1)


def leave_one_out(rewards, groups):
    """(N,) float: R_i - 1 / (k - 1) sum of R_j over the k - 1 others of its group: a baseline that
    does not depend on the answer that it judges (Kool et al. 2019; Ahmadian et al. 2024, the RLOO
    estimator); exactly 0 in a group of equal rewards."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    groups = torch.tensor(groups)
    advantages = torch.zeros_like(rewards)
    for g in groups.unique():
        group = rewards[groups == g]
        if group.min() < group.max():
            others = (group.sum() - group) / (len(group) - 1)
            advantages[groups == g] = group - others
    return advantages.float()


def add_gae(run, samples):
    """PPO: generalized advantage estimates, by the value head; whitened over all processes."""
    for sample in samples:
        rewards = -kl_weight * (sample["old"] - sample["ref"])  # (T,): a price for each token
        rewards[-1] += sample["reward"]  # for the whole answer, at its end
        sample["advantage"] = gae(rewards, sample["value"])
        sample["return"] = sample["advantage"] + sample["value"]
    advantages = torch.zeros(0)  # a process may have no sample
    if samples:
        advantages = torch.cat([sample["advantage"] for sample in samples])
    # Of large rewards that are nearly alike, float32 would keep no difference.
    mean, deviation = mean_and_deviation(run, widen(advantages))
    for sample in samples:
        white = (widen(sample["advantage"]) - mean) / deviation
        sample["advantage"] = white.float()


def gae(rewards, values):
    """Generalized advantage estimates (T,) of one answer's rewards and values (T,) (Schulman et al.
    2016, equation 16); behind the last token the value is 0."""
    advantages = torch.zeros_like(rewards)
    next_advantage = 0.0
    next_value = 0.0
    for t in reversed(range(len(rewards))):
        error = rewards[t] + gamma * next_value - values[t]
        advantages[t] = error + gamma * gae_lambda * next_advantage
        next_advantage = advantages[t]
        next_value = values[t]
    return advantages


def mean_and_deviation(run, values):
    """Of the values (N,) of all processes together."""
    n, total = run.sum(len(values), values.sum())
    n = max(1, n)
    mean = total / n
    [squares] = run.sum((values - mean).square().sum())
    return mean, math.sqrt(max(squares / n, 1e-8))  # 1e-8: all are equal


# --------------------------------------------------------------------------------------------------
# Loss: (net, samples, n_vocab) -> (the sum over their answer tokens, or answers, {figure: its sum})


def policy_loss(log_p, old, advantages):
    """PPO's clipped objective (Schulman et al. 2017, equation 7), negated, per token."""
    ratio = (log_p - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * advantages, clipped * advantages)


def joined(samples, key, like):
    """The values (N,) that the samples have under a key, one sample after the other."""
    return to_device(torch.cat([sample[key] for sample in samples]), like.device)


def policy_figures(log_p, old, entropy):
    """What all should see, per token, or of rloo per answer: the k3 estimate of the divergence from
    the policy that drew the samples (Schulman 2020), and the share whose ratio is clipped."""
    ratio = (log_p - old).exp()
    return {
        "entropy": entropy,
        "approx_kl": ratio - 1 - (log_p - old),
        "clipfrac": (ratio - 1).abs() > clip,
    }


def summed(figures):
    return {name: widen(values.detach()).sum() for name, values in figures.items()}


def grpo_loss(net, samples, n_vocab):
    """The clipped objective, and kl_weight times the divergence from the reference (Shao et al.
    2024, equation 4)."""
    log_p, entropy, _ = look(net, samples, n_vocab)
    old = joined(samples, "old", log_p)
    loss = policy_loss(log_p, old, joined(samples, "advantage", log_p))
    if kl_weight:
        log_ratio = joined(samples, "ref", log_p) - log_p
        loss = loss + kl_weight * (log_ratio.exp() - log_ratio - 1)
    return loss.sum(), summed(policy_figures(log_p, old, entropy))


def rloo_loss(net, samples, n_vocab):
    """REINFORCE of whole answers, -A log p(y | x) (Ahmadian et al. 2024): the gradient of the ratio
    of p(y | x) to what it was when y was drawn, which is 1 in the first update of a step. In later
    ones it is clipped as PPO's, of the answer and not of each token. The sum is over answers."""
    log_p, entropy, _ = look(net, samples, n_vocab)
    old = joined(samples, "old", log_p)
    advantages = joined(samples, "advantage", log_p)  # (B,)
    lengths = [count_targets([sample]) for sample in samples]
    log_p = sums_of(log_p, lengths)  # (B,), as is `old`
    old = sums_of(old, lengths)
    entropy = sums_of(entropy, lengths) / to_device(torch.tensor(lengths), entropy.device)
    loss = policy_loss(log_p, old, advantages)
    return loss.sum(), summed(policy_figures(log_p, old, entropy))


def sums_of(values, lengths):
    """(B,): the sums of each sample's part of values (N,), one sample's after the other's."""
    return torch.stack([part.sum() for part in values.split(lengths)])


def ppo_loss(net, samples, n_vocab):
    """The clipped objective, and value_weight times the clipped loss of the values. The divergence
    from the reference is in the rewards."""
    log_p, entropy, value = look(net, samples, n_vocab)
    old = joined(samples, "old", log_p)
    loss = policy_loss(log_p, old, joined(samples, "advantage", log_p))
    old_value = joined(samples, "value", log_p)
    returns = joined(samples, "return", log_p)
    near = old_value + (value - old_value).clamp(-clip, clip)
    value_loss = torch.max((value - returns) ** 2, (near - returns) ** 2)
    loss = loss + value_weight * 0.5 * value_loss
    figures = policy_figures(log_p, old, entropy) | {
        "value_loss": value_loss,
        "unexplained": (returns - old_value) ** 2,
        "return": returns,
        "return2": widen(returns) ** 2,
    }
    return loss.sum(), summed(figures)


# --------------------------------------------------------------------------------------------------
# The methods: all that sets one apart from the other


@dataclass
class Method:
    add_advantages: Callable  # (run, samples): puts `advantage` (T,) into each
    loss: Callable  # (net, samples, n_vocab) -> (sum of losses, {figure: sum})
    logs: tuple  # the names of the figures that its loss gives
    size: Callable = count_targets  # (samples) -> what the sums of a whole update are divided by
    has_groups: bool = False  # whether group_size samples of a prompt are compared
    has_value: bool = False  # whether the network gets a head for values


OF_POLICY = ("entropy", "approx_kl", "clipfrac")
OF_VALUES = ("value_loss", "unexplained", "return", "return2")
METHODS = {
    "grpo": Method(add_group_advantages, grpo_loss, OF_POLICY, has_groups=True),
    "rloo": Method(add_leave_one_out, rloo_loss, OF_POLICY, size=len, has_groups=True),
    "ppo": Method(add_gae, ppo_loss, OF_POLICY + OF_VALUES, has_value=True),
}


def adapt_config():
    return AdaptConfig(**{field.name: globals()[field.name] for field in fields(AdaptConfig)})


def check_settings():
    """Refuse settings that no run can have, before anything is read or written."""
    check_choice("method", method, METHODS)
    check_choice("init_from", init_from, ("base", "resume", "auto"))
    check_adapt(adapt_config(), merge)
    check_numbers(globals())
    check_least(globals(), ("clip", "kl_weight", "value_weight"), 0)
    check_least(globals(), ("max_new_tokens", "rl_epochs", "minibatches"), 1)
    check_least(globals(), ("group_size",), 2 if METHODS[method].has_groups else 1)
    check_share(globals(), ("gae_lambda", "gamma"))
    if not 1e-3 <= temperature < math.inf:  # below it the samples of a prompt are all the same
        raise UserError(f"temperature={temperature}: expected 0.001 or more")
    if adapt == "prompt" and (weight_decay or METHODS[method].has_value):
        raise UserError("adapt=prompt: expected --method=grpo or rloo, and no weight_decay")


def check_minibatches(n_samples, run):
    most = math.ceil(batch_size / run.world) * n_samples
    if minibatches > most:
        raise UserError(f"minibatches={minibatches}: a process has {most} samples a step")


# --------------------------------------------------------------------------------------------------
# The run


def open_run():
    """This process among the others, over which the network may be divided."""
    run = setup(device, threads=threads)
    start_watch(run)
    run.mesh = open_mesh(run, parallel, replicas=replicas)
    check_parallel(run, parallel, batch_size, method, adapt_config(), merge)
    return run


def make_reference(learner, computing):
    """The network as it is at the start, where the loss holds the policy near it; else None."""
    if not kl_weight:
        return None
    reference = copy.deepcopy(learner.net).eval()
    if learner.run.is_divided:
        parallelize(reference, learner.run.mesh, computing)
    return reference


def open_policy(run, task):
    """The network and tokenizer to start from, ppo's with a head for values."""
    learner = open_learner(run, model, adapt_config(), seed, dropout, fast)
    if learner.net.score is not None:
        raise UserError(f"{model} has a head for {learner.net.task}, and says no words")
    learner.net.checkpoint = checkpoint_blocks
    if deterministic:
        be_deterministic(learner.net)
    stop_at_turns(learner)
    if task.has_value:
        learner.net.set_score(["value"])
        nn.init.zeros_(learner.net.score.weight)
        learner.has_value_head = True
    return learner


def open_data(learner):
    """The prompts to train on and to validate with."""
    tok = learner.tok
    say = learner.run.say
    n_ctx = learner.net.config.n_ctx
    limit = min(seq_len or n_ctx, n_ctx)
    train = load_examples(dataset, "sft", "train", read_prompt, tok, limit, say)
    val = load_examples(dataset, "sft", "val", read_prompt, tok, limit, say)
    if not train:
        raise UserError(f"data/{dataset}: no example for --method={method}")
    return train, val[: eval_examples or None]


def largest_load(net, prompts, n_samples):
    """The Load of samples of the longest prompt, if each is as long as may be."""
    length = padded_length(net, max(map(n_tokens, prompts)) + max_new_tokens)
    rows = min(batch_size * n_samples, max(1, micro_tokens // length))
    return Load(rows, length, rows * max_new_tokens)


def memory_advice():
    """What to change where memory runs out."""
    length = seq_len or "the model's context"
    return (
        f"lower micro_tokens (now {micro_tokens}), max_new_tokens (now {max_new_tokens}) or "
        f"seq_len (now {length}), set checkpoint_blocks (now {checkpoint_blocks}), or let less "
        f"learn: adapt=lora, adapt=qlora (now {adapt})"
    )


def reward_facts():
    """What `reward` came to: the contents of its file, or of its folder's weights."""
    path = Path(reward.rpartition(":")[0] or reward)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {"reward": fingerprint(files)} if files else {}


def validate(learner, prompts, judge, cast):
    """The mean reward of one sample of each prompt, by all processes together."""
    run = learner.run
    share = share_of(prompts, run)
    samples = roll_out(learner.net, learner.tok, share, judge, 0, cast)
    total, n = run.sum(sum(sample["reward"] for sample in samples), len(share))
    return {"val_reward": total / max(1, n)}


def look_on(learner, prompts, judge, cast, folder, step):
    """Validate, tell and log it."""
    figures = validate(learner, prompts, judge, cast)
    folder.record(log_row({"step": step} | figures))
    learner.run.say(f"step {step}: {words(figures)}")
    return figures


# What a resume may change, and what shapes nothing, beside run.py's: see RunFolder.
MAY_CHANGE = (
    *RESUME_MAY_CHANGE,
    "early_stopping",
    "eval_examples",
    "fast",
    "deterministic",
    "lora_dropout",
    "micro_tokens",
)
IGNORES = (*RESUME_IGNORES, "compile", "merge", "parallel", "replicas")


def make_fast(learner, train, cast, n_steps, n_samples, saved):
    """Let the network compute by what is faster, compared on prompts of the first step."""
    net = learner.net
    lengths = []
    for prompt in train:
        lengths += [n_tokens(prompt) + 1, n_tokens(prompt) + max_new_tokens]
    tokens = batch_size * n_samples * rl_epochs * sum(lengths) / len(lengths)  # of a step
    flops = flops_of_run(net, tokens, n_steps, max_minutes)
    why_not = why_not_compile(compile, learner, saved, flops, lengths)
    first = batch_of(train, 0, batch_size, seed)
    prompts = next(micro_batches(sorted(first, key=n_tokens), micro_tokens, net))
    rows = [prompt["ids"] for prompt in prompts]
    prepare_network(learner, rows, cast, packed=False, why_not=why_not)


def sample_figures(run, samples):
    """The mean reward and length of the samples of all processes."""
    total = sum(sample["reward"] for sample in samples)
    total, length, n = run.sum(total, count_targets(samples), len(samples))
    return {"reward": total / n, "length": length / n}


def explained(figures):
    """ppo's figures, with the share of the returns' variance that the values explained."""
    variance = figures.pop("return2") - figures["return"] ** 2
    unexplained = figures.pop("unexplained")
    return figures | {"explained_variance": 1 - unexplained / max(variance, 1e-9)}


def finish(learner, folder, state, row):
    """What is said and written at the end. row: the last step's figures."""
    run = learner.run
    say_wrote(folder, row, state)
    check_equal_weights(run, learner.params().values())
    finish_adapter(learner, Path(out_dir), state.step, merge)
    if run.is_main:
        say_end(folder, row, after_tuning(method, out_dir, dataset, model))
    run.wait()


def learn(learner, task, samples, updater, cast, step):
    """The updates on the samples of a step: (the last one's figures, and its gradient's norm)."""
    net = learner.net
    loss_of = partial(task.loss, net, n_vocab=learner.tok.n_vocab)
    for _ in range(rl_epochs):
        order = torch.randperm(len(samples)).tolist()
        parts = []
        for i in range(minibatches):
            minibatch = [samples[k] for k in order[i::minibatches]]
            parts.append(sorted(minibatch, key=n_tokens))
        sizes = learner.run.sum(*map(task.size, parts))  # each process has its own samples
        for part, size in zip(parts, sizes):
            groups = micro_batches(part, micro_tokens, net)
            # Of equal rewards a gradient is exactly zero, rightly.
            figures, norm = update(
                updater, groups, loss_of, size, task.logs, cast, step, warmup_steps,
                zero_is_fault=False,
            )  # fmt: skip
            updater.check_bad_steps(learning_rate, warmup_steps)
    return figures, norm


def check_sources():
    """Refuse to write into a folder that is read: the model's, the reward model's."""
    refuse_source(out_dir, model)
    if Path(reward).is_dir():
        refuse_source(out_dir, reward)


def main():
    check_settings()
    task = METHODS[method]
    run = open_run()
    n_samples = group_size if task.has_groups else 1  # of each prompt
    check_minibatches(n_samples, run)
    folder = RunFolder(out_dir, run, settings(globals()), defaults(globals()), MAY_CHANGE, IGNORES)
    start = choose_start(out_dir, init_from, overwrite, fresh="base")
    check_sources()
    saved = load_state(folder.path) if start == "resume" else None

    # the policy, its reference and the prompts
    learner = open_policy(run, task)
    net = learner.net
    check_generates(net, continues=True)
    tok = learner.tok
    train, val = open_data(learner)
    n_steps = count_steps(len(train), batch_size, max_steps, max_epochs)
    computing, reason = choose_dtype(run.device, dtype, net.config.n_embd)
    cast = autocast(run.device, computing)
    facts = facts_of(run, dataset, "sft", model, computing) | reward_facts()
    if saved:
        folder.check_resume(saved, facts)
    n_base = n_params(net)
    choose_weights(net, learner.adapt)
    place(learner)
    judge = open_reward(reward, run.device)
    data = f"{len(train):,} prompts to train on, {len(val):,} to validate"
    batch = f"{batch_size} prompts"
    say_plan(learner, n_base, n_steps, max_minutes, batch, data, (computing, reason), warmup_steps)
    with trial(learner):
        load = largest_load(net, train, n_samples)
        say_memory(learner, load, computing, optimizer, n_copies=int(kl_weight > 0))
        make_fast(learner, train, cast, n_steps, n_samples, saved)
    facts["compiled"] = learner.compiled
    reference = make_reference(learner, computing)
    divide(learner, computing)

    # the optimizer, and where the run stands
    optimizers = make_optimizers(net, optimizer, learning_rate, weight_decay, layer_decay)
    scaler = make_scaler(run.device, computing)
    updater = Updater(run, learner.params().values(), optimizers, scaler, grad_clip)
    horizon = Horizon(max_steps=n_steps, max_minutes=max_minutes)
    schedule = Schedule(lr_schedule, warmup_steps, min_lr, decay_fraction)
    state = restore(saved, learner, updater, folder)
    run.wait()  # nobody writes before everybody has read
    begin_part(folder, state, saved, facts, n_steps)
    signals = StopSignals()
    clock_begin = time.monotonic() - state.seconds
    row = {}  # of the last step
    if val and state.first_verdict is None:
        state.first_verdict = look_on(learner, val, judge, cast, folder, 0)

    progress = state.progress(horizon)
    time_left = TimeLeft(progress)
    stopped = False
    early = False
    while progress < 1 and not stopped and not early:
        step_begin = time.monotonic()
        torch.manual_seed(step_seed(seed, state.step, run.rank))
        updater.set_lr(state.lr_scale(schedule, horizon))
        prompts = share_of(batch_of(train, state.step, batch_size, seed), run)
        sample_seed = (seed * 1_000_003 + state.step) * run.world + run.rank
        with saved_on_failure(learner, updater, state, folder):
            with failing_together(run):
                samples = roll_out(net, tok, prompts, judge, sample_seed, cast, n_samples)
            add_log_probs(run, net, reference, samples, tok.n_vocab, cast)
            task.add_advantages(run, samples)
            figures, norm = learn(learner, task, samples, updater, cast, state.step)
        figures = sample_figures(run, samples) | figures
        if task.has_value:
            figures = explained(figures)
        stopped = state.advance(run, clock_begin, signals)
        progress = state.progress(horizon)
        row = step_row(state, figures, learning_rate * updater.lr_scale, norm, step_begin)
        folder.record(log_row(row))
        show_step(run, row, n_steps, time_left(progress))
        if val and (state.step % eval_every == 0 or progress >= 1):
            figures = look_on(learner, val, judge, cast, folder, state.step)
            row |= figures
            if state.is_best(-figures["val_reward"]):
                save_weights(learner, folder.path / "best", state.step)
            early = state.stops_early(early_stopping, run)
        if state.step % save_every == 0 or progress >= 1 or stopped or early:
            save_run(learner, updater, state, folder)
    run.say("")
    if stopped and progress < 1 and not early:
        return stop(folder, row, state, signals)
    finish(learner, folder, state, row)
    return 0


if __name__ == "__main__":
    with locked_folder(out_dir), lost_process(), advice_on_memory(memory_advice):
        status = main()
    end_process(status)
