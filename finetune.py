"""Adapt a model: instructions, classes, preferences, rewards; all weights or a few added ones.

    python finetune.py config/sft.py                    # out/python learns to write docstrings
    python finetune.py --method=lora --model=out/python --dataset=python --out_dir=out/lora
    python finetune.py --method=classify --out_dir=out/classify
    python finetune.py --method=dpo --model=out/sft --out_dir=out/dpo
    torchrun --nproc_per_node=8 finetune.py config/sft.py --model=path/to/a/hugging-face-folder

Reads data/<dataset>/<task>_{train,val}.jsonl (prepare.py makes them; the default source has all).
Writes out_dir/: a checkpoint folder (for lora and qlora a PEFT adapter, with --merge a plain one),
best/, state.pt (to resume), log.jsonl, run.json. Ctrl-C and SIGTERM save and exit.
"""

from config import configure, settings

# what, from what, to where
method = "sft"  # sft, classify, dpo, reward, grpo, ppo; or sft of added weights, by adapt's names
model = "out/python"  # the checkpoint folder to start from
dataset = "python"  # data/<dataset> has the task's JSONL
out_dir = "out/sft"  # where the result is written
init_from = "base"  # base, or resume: go on where out_dir was stopped
overwrite = False  # let base replace the run that out_dir holds
seed = 0  # of the order of the data, dropout and samples

# the batch: one number
batch_size = 16  # examples (or pairs, prompts) per optimizer step, over all processes
micro_tokens = 4096  # tokens at once on a device, at most, but one example at least
seq_len = 0  # tokens of an example, at most; 0: the model's context
too_long = "truncate"  # or drop: what happens to longer examples
pack = True  # several examples in a row, which do not see each other; false: a padded row each

# how long
max_steps: int | None = None  # optimizer steps
max_epochs: float | None = 1.0  # passes over the training examples
early_stopping = 0  # end after so many validations without a new best; 0: never

# which weights learn
adapt = "full"  # full, lora, qlora, adapter (bottlenecks) or prompt (soft prompts), of any method
train_last: int | None = 0  # the last so many blocks, final norm and head; 0: all; none: the head
lora_rank = 8  # r of lora and qlora
lora_alpha = 16.0  # the added matrices' product is scaled by alpha / r
lora_dropout = 0.0  # on the input of the added matrices
lora_targets = "q_proj,k_proj,v_proj,o_proj"  # layers by name; gate_proj,up_proj,down_proj too
adapter_size = 16  # width of the bottlenecks
prompt_tokens = 8  # number of soft prompts
merge: bool | str = False  # write merged/ too, a plain folder; quantized: of qlora's 4 bits

# the optimizer
optimizer = "adamw"  # adamw or muon
learning_rate = 3e-4  # the peak
lr_schedule = "linear"  # linear, cosine or constant, after the warm-up
warmup_steps = 10  # steps of linear warm-up
layer_decay = 1.0  # the learning rate of a block over that of the one behind it
weight_decay = 0.0  # decoupled
grad_clip = 1.0  # the largest gradient norm; 0: no clipping
neftune = 0.0  # noise on the embeddings of sft (Jain et al. 2023): its alpha, 5 or so
dropout = 0.0  # in the network

# the methods
template: str | list | None = None  # sft of plain records: "Q: {instruction} {input} A: {output}"
pooling = "last"  # classify: last (as transformers) or mean, which hidden state is read
class_weights = False  # classify: rare labels count as much as frequent ones
beta = 0.1  # dpo, ipo: the weight of the reference
dpo_loss = "sigmoid"  # sigmoid (Rafailov et al. 2023) or ipo (Azar et al. 2023)
label_smoothing = 0.0  # dpo: the share of pairs that are the wrong way round
reference_free = False  # dpo: without the reference

# reinforcement learning: grpo and ppo
reward = "overlap"  # overlap, arithmetic, gsm8k, a reward model's folder, or FILE.py:function
group_size = 8  # grpo: samples of each prompt, which are compared with each other
max_new_tokens = 64  # of a sample
temperature = 1.0  # of the samples
rl_epochs = 1  # passes over the samples of a step (ppo wants 4)
minibatches = 1  # updates in a pass
clip = 0.2  # the ratio of probabilities stays within 1 - clip and 1 + clip
kl_weight = 0.0  # of the divergence from the model at the start
value_weight = 0.5  # ppo: of the value head's loss
gae_lambda = 0.95  # ppo: generalized advantage estimation
gamma = 1.0  # ppo: the discount

# the machine
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto, float32, bfloat16
checkpoint_blocks = False  # recompute blocks in backward: less memory, a third more time

# looking on
eval_every = 100  # steps between validations; there is one at the start and one at the end
eval_examples = 400  # validation examples each time, the first ones; 0: all
save_every = 200  # steps between checkpoints
check_memorized = 40  # examples of each split that are tried word for word at the end; 0: none

if __name__ == "__main__":
    configure(globals())

import ast
import contextlib
import copy
import ctypes
import functools
import inspect
import json
import math
import numbers
import os
import runpy
import signal
import string
import sys
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import model as core
from barelm import checkpoint, optim, resume
from barelm.adapters import add_adapters
from barelm.chat import CHATML, TemplateRefusal
from barelm.checkpoint import load, model_and_bases, refuse_source
from barelm.families import family, gpt2_names
from barelm.files import parse_json, write_json
from barelm.optim import make_optimizer, restore_optimizers, same_kind
from barelm.resume import (
    changed_settings,
    check_parts,
    check_state,
    clear_folder,
    fingerprint,
    holds_model,
    locked_folder,
    make_folder,
    open_log,
    say_changes,
    weights_step,
    write_row,
    write_weights,
)
from barelm.run import (
    Progress,
    UserError,
    autocast,
    check_gradient,
    check_moved,
    choose_dtype,
    compute_dtype,
    duration,
    lost_process,
    setup,
    sync_grads,
    weight_sums,
)
from barelm.tasks import GSM8K_STOP, gsm8k_answer, last_number
from barelm.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# Added weights


class LoRA(nn.Module):
    """A frozen linear layer plus a product of two narrow matrices (Hu et al. 2021): at the start B
    is zero and nothing is added. `base` is nn.Linear, or NF4Linear for QLoRA."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        out, width = base.weight.shape
        self.base, self.scale, self.dropout = base, alpha / rank, dropout
        self.lora_A = nn.Linear(width, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, out, bias=False, device=base.weight.device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self):
        """The sum (out, in), which a plain layer would have."""
        return self.base.weight + self.scale * self.lora_B.weight @ self.lora_A.weight

    def forward(self, x):
        added = self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training)))
        return self.base(x) + self.scale * added


NF4 = [-1, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0]
NF4 += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1]
NF4 = torch.tensor(NF4)  # quantiles of the normal distribution: QLoRA (Dettmers et al. 2023), E


class NF4Linear(nn.Module):
    """A frozen linear layer in 4 bits a weight: blocks of 64 with a scale each, the scales in 8
    bits by blocks of 256 (double quantization), 4.13 bits a weight in all."""

    def __init__(self, layer):
        super().__init__()
        self.bias, w = layer.bias, layer.weight.detach().float()
        self.shape, self.n = w.shape, w.numel()
        blocks = F.pad(w.flatten(), (0, -self.n % 64)).view(-1, 64)
        scale = blocks.abs().amax(1)
        self.register_buffer("mean", scale.mean())
        groups = F.pad(scale - self.mean, (0, -len(scale) % 256)).view(-1, 256)
        top = groups.abs().amax(1, keepdim=True).clamp(min=1e-30)
        self.register_buffer("top", top)
        self.register_buffer("scale", (groups / top * 127).round().to(torch.int8))
        pairs = torch.cartesian_prod(NF4, NF4)  # of each byte, one complex number to the machine
        self.register_buffer("pairs", torch.view_as_complex(pairs).to(w.device))
        unit = blocks / self.scales()[: len(blocks), None].clamp(min=1e-30)
        middles = (NF4[1:] + NF4[:-1]).to(w.device) / 2
        codes = torch.bucketize(unit.flatten(), middles).to(torch.uint8)
        self.register_buffer("codes", codes[0::2] << 4 | codes[1::2])

    def scales(self):
        return ((self.scale.float() / 127) * self.top).flatten() + self.mean

    @property
    def weight(self):
        """The matrix (out, in) that the codes stand for, made anew."""
        blocks = torch.view_as_real(self.pairs.index_select(0, self.codes.int())).view(-1, 64)
        return (blocks * self.scales()[: len(blocks), None]).flatten()[: self.n].view(self.shape)

    def forward(self, x):
        y = Dequantized.apply(x, self)
        return y if self.bias is None else y + self.bias


class Dequantized(torch.autograd.Function):
    """x @ weight.T for a packed weight, which is unpacked in forward and again in backward, so that
    only its 4 bits are kept between the two."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        x = x.to(compute_dtype(x))
        return x @ layer.weight.to(x.dtype).T

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.weight.to(dy.dtype), None


def adapt_network(net, how):
    """Freeze the network and add LoRA to the layers that lora_targets names; of qlora, the other
    linear layers go to 4 bits too."""
    names = set(lora_targets.split(","))
    found = [n for n, m in net.named_modules() if n.rpartition(".")[2] in names]
    if missing := names - {n.rpartition(".")[2] for n in found}:
        raise UserError(f"lora_targets: this model has no layer {', '.join(sorted(missing))}")
    net.requires_grad_(False)
    linear = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    for name in found:
        if name not in linear or (name == "lm_head" and net.config.tie):
            raise UserError(f"lora_targets: {name} is no linear layer, or is the embedding too")
    for name in linear:
        layer = net.get_submodule(name)
        if how == "qlora" and name.startswith("model."):
            layer = NF4Linear(layer)
        if name in found:
            layer = LoRA(layer, lora_rank, lora_alpha, lora_dropout)
        net.set_submodule(name, layer)
    if how == "qlora" and sys.platform == "linux":  # the machine gets back what the layers took
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


def unquantize(net):
    """Give the layers in 4 bits back the weights that they were made of, in place."""
    packed = [name for name, m in net.named_modules() if isinstance(m, NF4Linear)]
    full, _ = load(model, net.model.embed_tokens.weight.device)
    for name in packed:
        net.set_submodule(name, full.get_submodule(name.removesuffix(".base")))
    return net


def merged(net):
    """Make plain layers of adapted and of packed ones, in place."""
    for name, layer in list(net.named_modules()):
        if isinstance(layer, (LoRA, NF4Linear)) and not name.endswith(".base"):
            weight, bias = layer.weight.detach(), getattr(layer, "base", layer).bias
            plain = nn.Linear(*reversed(weight.shape), bias=bias is not None, device=weight.device)
            plain.weight, plain.bias = nn.Parameter(weight), bias
            net.set_submodule(name, plain)
    return net


# --------------------------------------------------------------------------------------------------
# Examples: records become token ids once, when they are loaded


BAD_STEPS = 5  # updates in a row that are not finite end a run
TASK = {"sft": "sft", "classify": "classify", "dpo": "preference", "reward": "preference"}
TASK |= {"grpo": "sft", "ppo": "sft"}


def read_rows(split):
    """The records of a split of the task's file; of data set `arithmetic`, which is none, sums."""
    if dataset == "arithmetic":
        sums = [divmod(n, 10) for n in range(100)]
        sums = [(a, b) for a, b in sums if ((3 * a + b) % 7 == 0) == (split == "val")]
        turns = lambda a, b: zip(("user", "assistant"), (f"{a} + {b} =", str(a + b)))
        return [{"messages": [{"role": r, "content": c} for r, c in turns(a, b)]} for a, b in sums]
    path = Path("data") / dataset / f"{TASK[method]}_{split}.jsonl"
    if not path.is_file():
        if split == "val":
            return []
        make = f"python prepare.py --task={TASK[method]} --source=... --dataset={dataset}"
        raise UserError(f"{path}: no such file: {make} makes it")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # at \n and \r alone
        rows.append(parse_json(line, f"{path}:{number}"))
    return rows


def load_examples(split, tok, limit, say):
    """What the method makes of each record of a split; what is no example is counted and shown."""
    examples, bad = [], {}
    read = {"sft": read_sft, "classify": read_class}
    read = read.get(method, read_prompt if method in ("grpo", "ppo") else read_pair)
    source = f"data/{dataset}/{TASK[method]}_{split}.jsonl"
    source = "sums" if dataset == "arithmetic" else source
    for number, row in enumerate(read_rows(split), 1):
        try:
            examples.append(read(row, tok, limit) | {"row": f"{source}:{number}"})
        except (UserError, LookupError, TypeError, ValueError, AttributeError) as why:
            missing = f"no field {why}" if isinstance(why, KeyError) else f"malformed: {why}"
            reason = str(why) if isinstance(why, UserError) else missing
            bad.setdefault(reason, []).append(row)
    for reason, rows in bad.items():
        say(f"{split}: {len(rows):,} records left out: {reason}, such as {str(rows[0])[:80]}")
    cut = sum(example.get("cut", False) for example in examples)
    if cut:
        say(f"{split}: {cut:,} examples cut to {limit} tokens")
    return examples


def fit(ids, targets, limit):
    """An example of these inputs and targets, of `limit` tokens at most."""
    if len(ids) > limit and too_long == "drop":
        raise UserError(f"longer than {limit} tokens")
    example = {"ids": ids[:limit], "targets": targets[:limit], "cut": len(ids) > limit}
    if all(t == -100 for t in example["targets"]):
        raise UserError("no token of the response is within the context")
    return example


def read_sft(row, tok, limit):
    """Inputs and targets of a conversation, or of a plain record by the template: the loss is on
    what the assistant says (or {output}) and what ends it, nothing else."""
    ids, said = tok.chat(row["messages"]) if template is None else fill_template(row, tok)
    if not any(said):
        raise UserError("no response in it")
    targets = [id if s else -100 for id, s in zip(ids, said)]
    return fit(ids[:-1], targets[1:], limit)


def template_parts(row):
    """The fields of each turn of a record, for a template: instruction, input, output, system. Of a
    conversation each question and its answer are a turn; the last has the record's own fields."""
    empty = {"system": "", "instruction": "", "input": ""}
    row = {key: "" if value is None else value for key, value in row.items()}
    if "messages" not in row:
        return [empty | row]
    turns, turn = [], dict(empty)
    for message in row["messages"]:
        role, content = message["role"], message["content"]
        if role == "assistant":
            turns.append(turn | {"output": content})
            turn = dict(empty)
        else:
            key = "system" if role == "system" else "instruction"
            turn[key] = f"{turn[key]}\n\n{content}" if turn[key] else content
    own = {k: v for k, v in row.items() if k not in ("messages", "system", "output")}
    return [*turns[:-1], turns[-1] | own] if turns else []


def fill_template(row, tok):
    """(ids, loss mask) of a record by its own template, or else the one of `template` that its text
    chooses. Turns follow each other, each with the end token behind it; a system prompt that the
    template does not name stands before the first."""
    among = templates()
    chosen = among[zlib.crc32(str(row).encode()) % len(among)]
    if "{output}" in str(row.get("template")):
        chosen = row["template"]
        check_template(chosen)
    before, _, after = chosen.partition("{output}")
    ids = [tok.eot_id] if tok.eot_id is not None else []
    said = [0] * len(ids)
    for parts in template_parts(row):
        asked = before.format(**parts)
        if parts["system"] and "{system}" not in before:
            asked = f"{parts['system']}\n\n{asked}"
        answer = tok.encode(parts["output"] + after.format(**parts)) + tok.eos_ids[:1]
        asked = tok.encode(asked)
        ids += asked + answer
        said += [0] * len(asked) + [1] * len(answer)
    return ids, said


def templates():
    """The templates to choose from: one, or those of a list, which a flag gives as a text."""
    if not isinstance(template, str):
        return template
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        if isinstance(several := ast.literal_eval(template), list):
            return several
    return [template]


def check_template(text):
    """Refuse a template that is none."""
    try:
        names = [name for _, name, *_ in string.Formatter().parse(text) if name is not None]
    except (ValueError, TypeError) as error:
        raise UserError(f"template {text!r}: {error}") from None
    plain = names.count("output") == text.count("{output}") == 1
    if not plain or not all(name.isidentifier() for name in names):
        fields = "{output} once, and others by name: {instruction}, {input}, {system}"
        raise UserError(f"template {text!r}: expected {fields}")


def read_class(row, tok, limit):
    """The first `limit` tokens of a text, and its label."""
    ids = tok.start + tok.encode(row["text"])
    if not ids:
        raise UserError("an empty text")
    if len(ids) > limit and too_long == "drop":
        raise UserError(f"longer than {limit} tokens")
    return {"ids": ids[:limit], "label": str(row["label"]), "cut": len(ids) > limit}


def read_pair(row, tok, limit):
    """Two answers to one prompt: the inputs and targets of each, or for a reward model the whole
    conversations, which end where its score is read: of longer ones the end is kept."""
    prompt = row["prompt"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    pair, cut = {}, False
    for which in ("chosen", "rejected"):
        if not row[which].strip():
            raise UserError(f"{which} is empty")
        talk = [*prompt, {"role": "assistant", "content": row[which]}]
        if method == "reward":
            ids = conversation_ids(talk, tok)
            if len(ids) > limit and too_long == "drop":
                raise UserError(f"longer than {limit} tokens")
            pair[which] = {"ids": ids[-limit:]}
            cut |= len(ids) > limit
            continue
        ids, said = tok.chat(talk, answers="last")
        targets = [id if s else -100 for id, s in zip(ids, said)]
        pair[which] = fit(ids[:-1], targets[1:], limit)
        cut |= pair[which]["cut"]
    if pair["chosen"]["ids"] == pair["rejected"]["ids"]:  # its gradient is zero
        raise UserError(f"chosen and rejected are the same within {limit} tokens")
    return pair | {"cut": cut}


def conversation_ids(messages, tok):
    """The ids of a conversation as a reward model reads them: what transformers'
    apply_chat_template gives. The score is read at the last one that is no padding."""
    return tok.chat(messages, answers="none")[0]


def read_prompt(row, tok, limit):
    """A conversation up to its last answer, and that answer, which a reward may look at."""
    *prompt, answer = row["messages"]
    if answer["role"] != "assistant" or not isinstance(answer["content"], str):
        raise UserError("its last message is no assistant's text")
    ids, _ = tok.chat(prompt, add_generation_prompt=True)
    if len(ids) + max_new_tokens > limit:
        raise UserError(f"the prompt and max_new_tokens take more than {limit} tokens")
    return {"ids": ids, "messages": prompt, "answer": answer["content"]}


def padded(sequences, device, pad=0, key="ids"):
    """(B, T) int64 of the lists, padded on the right."""
    T = max(len(s[key]) for s in sequences)
    rows = [s[key] + [pad] * (T - len(s[key])) for s in sequences]
    return torch.tensor(rows, device=device)


def packed(examples, limit):
    """The examples in rows of up to `limit` tokens, each numbered by its place in the row."""
    rows = []
    for e in sorted(examples, key=lambda e: -len(e["ids"])):  # first fit, decreasing
        n = len(e["ids"])
        row = next((r for r in rows if len(r["ids"]) + n <= limit), None) if pack else None
        if row is None:
            rows.append(row := {"ids": [], "targets": [], "docs": []})
        row["docs"] += [1 + max(row["docs"], default=0)] * n
        row["ids"] += e["ids"]
        row["targets"] += e["targets"]
    return rows


# --------------------------------------------------------------------------------------------------
# Methods: each has a size (what its loss sum is divided by, over the global batch) and a loss


def sft_size(examples):
    return sum(t != -100 for e in examples for t in e["targets"])


def sft_loss(net, rows):
    """The sum of -log p over the targets of packed rows, and nothing else to log."""
    device = net.model.embed_tokens.weight.device
    ids, targets = padded(rows, device), padded(rows, device, -100, "targets")
    docs = padded(rows, device, 0, "docs") if any(max(r["docs"]) > 1 for r in rows) else None
    embeds = None
    if neftune and net.training:
        embeds = net.model.embed_tokens(ids)
        reach = neftune / math.sqrt(ids.shape[1] * embeds.shape[2])
        embeds = embeds + torch.empty_like(embeds).uniform_(-reach, reach)
    return net(ids, targets, docs=docs, embeds=embeds)[0], Counter()


def classify_loss(net, examples):
    """Cross-entropy, weighted by label where class_weights says so; the pairs (label, guess)."""
    scores = net.scores([e["ids"] for e in examples])
    labels = torch.tensor([net.labels.index(e["label"]) for e in examples], device=scores.device)
    weights = torch.tensor([e.get("weight", 1.0) for e in examples], device=scores.device)
    loss = (F.cross_entropy(scores, labels, reduction="none") * weights).sum()
    guesses = scores.argmax(1)
    return loss, Counter(zip(labels.tolist(), guesses.tolist()))


def response_logprobs(net, sequences):
    """(B,) float32: the sum of log p over the targets of each sequence."""
    device = net.model.embed_tokens.weight.device
    ids, targets = padded(sequences, device), padded(sequences, device, -100, "targets")
    return core.logprobs(net, ids, targets).sum(1)


def both_logprobs(net, pairs):
    """(B,) float32 twice: response_logprobs of the chosen and of the rejected answers."""
    return response_logprobs(net, [p[w] for w in ("chosen", "rejected") for p in pairs]).chunk(2)


def preference_loss(chosen, rejected, ref_chosen, ref_rejected):
    """(B,) losses of DPO (Rafailov et al. 2023, equation 7), with label smoothing as in cDPO, or of
    IPO (Azar et al. 2023, equation 17), from (B,) log-probabilities; and the two rewards."""
    reward_chosen, reward_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = reward_chosen - reward_rejected
    if dpo_loss == "ipo":
        return (margin / beta - 1 / (2 * beta)) ** 2, reward_chosen, reward_rejected
    loss = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    return loss, reward_chosen, reward_rejected


def dpo(net, pairs):
    """DPO's loss over pairs, whose log-probabilities under the reference were computed once."""
    logp = both_logprobs(net, pairs)
    reference = [torch.tensor([p["reference"][i] for p in pairs]).to(logp[0]) for i in (0, 1)]
    loss, good, bad = preference_loss(*logp, *reference)
    stats = {"reward_chosen": good, "reward_rejected": bad, "margin": good - bad}
    stats["accuracy"] = (good > bad) + 0.5 * (good == bad)  # at the start all are equal
    return loss.sum(), Counter({k: float(v.detach().sum()) for k, v in stats.items()})


def reward_loss(net, pairs):
    """Bradley and Terry's: -log sigmoid of the difference of the two answers' scores."""
    rows = [p[which]["ids"] for which in ("chosen", "rejected") for p in pairs]
    good, bad = net.scores(rows).chunk(2)
    margins = (good - bad).detach()
    stats = {"margin": float(margins.sum()), "accuracy": int((margins > 0).sum())}
    return -F.logsigmoid(good - bad).sum(), Counter(stats)


# --------------------------------------------------------------------------------------------------
# Reinforcement learning: roll out, advantage, loss


def overlap(prompt, text, answer):
    """F1 of the words of a text and of the answer that was expected."""
    a, b = Counter(text.lower().split()), Counter(answer.lower().split())
    both = (a & b).total()
    return 2 * both / max(1, a.total() + b.total())


def same_number(said, right):
    return float(said is not None and said == right)


def arithmetic(prompt, text, answer):
    """1 where the text's last number is that of the answer, else 0."""
    return same_number(last_number(text), last_number(answer))


def gsm8k(prompt, text, answer):
    """1 where the number behind the first #### (or, without that mark, the last one) is that of the
    answer, else 0."""
    return same_number(gsm8k_answer(text), gsm8k_answer(answer))


def open_reward(run):
    """A function (messages, text, answer) -> float of what `reward` names."""
    known = {"overlap": overlap, "arithmetic": arithmetic, "gsm8k": gsm8k}
    if reward in known:
        return known[reward]
    file, _, name = reward.rpartition(":")
    if reward.endswith(".py"):
        raise UserError(f"--reward={reward}: expected {reward}:FUNCTION")
    if file.endswith(".py"):
        return open_function(file, name)
    judge, tok = load(reward, run.device)
    if judge.score is None or len(judge.labels) != 1:
        raise UserError(f"--reward={reward}: no reward model (--method=reward makes one)")

    def score(messages, text, answer):
        ids = conversation_ids([*messages, {"role": "assistant", "content": text}], tok)
        with torch.no_grad():
            return float(judge.scores([ids[-judge.config.n_ctx :]]))

    return score


def open_function(file, name):
    """The function of this name that a file of the user's defines, if it fits a reward."""
    if not os.path.isfile(file):
        raise UserError(f"--reward={reward}: no such file")
    try:
        function = runpy.run_path(file).get(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward={reward}: {blame(error, file)}") from None
    if not callable(function):
        raise UserError(f"--reward={reward}: no function {name!r} in it")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"--reward={reward}: an async function: expected a plain one")
    with contextlib.suppress(ValueError):  # some that are written in C tell no signature
        try:
            inspect.signature(function).bind([], "", "")
        except TypeError as error:
            why = f"it cannot be called as {name}(messages, text, answer): {error}"
            raise UserError(f"--reward={reward}: {why}") from None
    return function


def blame(error, file):
    """One line on an exception: its kind, what it says, and the last line of `file` it came by."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"


def score_of(judge, prompt, text):
    """The reward of an answer to a prompt: a finite number, or a line that says what it was."""
    row = f"for {prompt.get('row', 'a prompt')}, where the model says {short(text)}"
    try:
        value = judge(prompt["messages"], text, prompt["answer"])
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        file = reward.rpartition(":")[0]
        raise UserError(f"--reward={reward}: {blame(error, file)}, {row}") from None
    number = to_float(value)
    if not abs(number) <= core.LARGEST:  # NaN is not, nor what float32 has no place for
        raise UserError(f"--reward={reward}: {short(value)} {row}: expected a finite number")
    return number


def to_float(value):
    """A number of Python's, numpy's or torch's as a float; NaN of anything else."""
    if inspect.iscoroutine(value):
        value.close()  # or Python would warn that nobody has awaited it
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, numbers.Number) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):  # of several elements, complex
        return math.nan


def short(value):
    """A value as a line shows it."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def roll_out(net, tok, prompts, judge, seed, cast, n=1):
    """Sample n answers to each prompt: examples with inputs, targets (-100 on the prompt), a
    reward, and the number of the prompt."""
    many = [p for p in prompts for _ in range(n)]
    how = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    # As in the evaluation: an answer ends where the model asks itself the next question.
    how["stop"] = GSM8K_STOP if reward == "gsm8k" else ()
    with cast:
        made = core.generate(net, tok, [p["ids"] for p in many], **how)
    examples = []
    for i, (p, g) in enumerate(zip(many, made)):
        whole = p["ids"] + g.ids
        targets = [-100] * (len(p["ids"]) - 1) + g.ids
        score = score_of(judge, p, g.text)
        examples.append({"ids": whole[:-1], "targets": targets, "reward": score, "group": i // n})
    return examples


def group_advantages(rewards, groups):
    """(N,) float: each reward less its group's mean, over its deviation (Shao et al. 2024); exactly
    0 in a group of equal rewards, which says nothing."""
    rewards, groups = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    out = torch.zeros_like(rewards)
    for g in groups.unique():
        group = rewards[groups == g]
        if group.min() < group.max():  # else the mean's rounding would count as a difference
            out[groups == g] = (group - group.mean()) / (group.std(unbiased=False) + 1e-4)
    return out.float()


def gae(rewards, values):
    """Generalized advantage estimates (T,) of one answer's rewards and values (Schulman et al.
    2016, equation 16); behind the last token the value is 0."""
    advantages, last, after = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        last = rewards[t] + gamma * after - values[t] + gamma * gae_lambda * last
        advantages[t], after = last, values[t]
    return advantages


def policy_loss(logp, old, advantages):
    """PPO's clipped objective (Schulman et al. 2017, equation 7), negated, per token."""
    ratio = (logp - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def look(net, group):
    """Of the N targets of a group, sample after sample, under the distribution that they are drawn
    from: log p (N,), the entropy (N,) and the values (N,) or None."""
    device = net.model.embed_tokens.weight.device
    h = net.hidden(padded(group, device))[padded(group, device, -100, "targets") >= 0]
    logits = net.logits(h)[:, : net.n_vocab].float() / temperature
    logp = logits.log_softmax(-1)
    ids = torch.tensor([t for e in group for t in e["targets"] if t != -100], device=device)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    value = net.score(h).float()[:, 0] if net.score is not None else None
    return logp.gather(1, ids[:, None])[:, 0], entropy, value


def judge_samples(run, net, reference, examples, cast):
    """Put what an update needs into each sample: the log-probabilities now and under the reference,
    advantages and, for ppo, values and returns. Advantages are whitened over all processes."""
    net.eval()  # dropout would take the old log-probabilities from another network
    with torch.no_grad(), cast:
        for group in chunks(examples, net.config.n_ctx):
            old, _, value = look(net, group)
            found = {"old": old, "ref": look(reference, group)[0] if reference else old}
            found |= {"value": value} if value is not None else {}
            lengths = [sft_size([e]) for e in group]
            for key, all_of_them in found.items():
                for e, mine in zip(group, all_of_them.cpu().split(lengths)):
                    e[key] = mine
    net.train()
    if method == "grpo":
        found = group_advantages([e["reward"] for e in examples], [e["group"] for e in examples])
        for e, a in zip(examples, found):
            e["advantage"] = torch.full_like(e["old"], float(a))
        return
    for e in examples:
        rewards = -kl_weight * (e["old"] - e["ref"])
        rewards[-1] += e["reward"]
        e["advantage"] = gae(rewards, e["value"])
        e["return"] = e["advantage"] + e["value"]
    every = torch.cat([e["advantage"] for e in examples]) if examples else torch.zeros(0)
    every = every.double()  # of large rewards that are nearly alike, float32 keeps no difference
    sums = summed(run, Counter(n=len(every), a=float(every.sum())))
    count = max(1, sums["n"])
    mean = sums["a"] / count
    square = summed(run, Counter(square=float((every - mean).square().sum())))["square"]
    spread = math.sqrt(max(square / count, 1e-8))
    for e in examples:
        e["advantage"] = ((e["advantage"].double() - mean) / spread).float()


def rl_loss(net, group):
    """The sum over the samples' tokens of the clipped objective, the divergence from the reference
    (grpo: Shao et al. 2024, equation 4) and ppo's clipped value loss; and what all should see."""
    logp, entropy, value = look(net, group)
    join = lambda key: torch.cat([e[key] for e in group]).to(logp)
    old, advantage = join("old"), join("advantage")
    loss = policy_loss(logp, old, advantage)
    if method == "grpo" and kl_weight:
        apart = join("ref") - logp
        loss = loss + kl_weight * (apart.exp() - apart - 1)
    stats = {"entropy": entropy, "approx_kl": (logp - old).exp() - 1 - (logp - old)}
    stats["clipfrac"] = ((logp - old).exp() - 1).abs() > clip
    if method == "ppo":
        before, goal = join("value"), join("return")
        near = before + (value - before).clamp(-clip, clip)
        value_loss = torch.max((value - goal) ** 2, (near - goal) ** 2)
        loss = loss + value_weight * 0.5 * value_loss
        stats |= {"value_loss": value_loss, "unexplained": (goal - before) ** 2}
        stats |= {"return": goal, "return2": goal.double() ** 2}
    return loss.sum(), Counter({k: float(v.detach().double().sum()) for k, v in stats.items()})


LOSS = {"sft": sft_loss, "classify": classify_loss, "dpo": dpo, "reward": reward_loss}
LOSS |= {"grpo": rl_loss, "ppo": rl_loss}


def size_of(examples):
    """What the loss over the global batch is divided by: targets, weights, or pairs."""
    if method in ("sft", "grpo", "ppo"):
        return sft_size(examples)
    return sum(e.get("weight", 1.0) for e in examples)


def tokens_of(example):
    if "chosen" in example:
        return 2 * max(len(example[which]["ids"]) for which in ("chosen", "rejected"))
    return len(example["ids"])


def chunks(examples, limit):
    """The examples in groups of about micro_tokens padded tokens; of sft packed into rows."""
    rows = packed(examples, limit) if method == "sft" else sorted(examples, key=tokens_of)
    group, longest = [], 0
    for row in rows:
        longest = max(longest, tokens_of(row))
        if group and longest * (len(group) + 1) > micro_tokens:
            yield group
            group, longest = [], tokens_of(row)
        group.append(row)
    if group:
        yield group


def summed(run, values):
    """{name: number} summed over all processes."""
    if run.world == 1:
        return values
    everyone = [None] * run.world
    dist.all_gather_object(everyone, values)
    total = Counter()
    for some in everyone:
        for key, value in some.items():
            total[key] += value
    return total


def verdict(run, net, examples, limit, cast):
    """The method's loss and figures over some examples, shared out over all processes."""
    total, training = Counter(), net.training
    net.eval()
    with torch.no_grad(), cast:
        for group in chunks(examples[run.rank :: run.world], limit):
            loss, stats = LOSS[method](net, group)
            total.update(stats)
            total["loss"] += float(loss)
    net.train(training)
    total["size"] = size_of(examples[run.rank :: run.world])
    total = summed(run, total)
    size = max(total.pop("size"), 1e-9)
    out = {"val_loss": total.pop("loss") / size}
    if method == "classify":
        net.guesses = total  # for the table at the end
        return out | accuracies(total, net.labels)
    return out | {f"val_{key}": value / size for key, value in total.items()}


def accuracies(pairs, labels):
    """Accuracy and macro F1 of {(label, guess): count}."""
    total = sum(pairs.values())
    right = {i: pairs[i, i] for i in range(len(labels))}
    seen = Counter(), Counter()
    for (label, guess), n in pairs.items():
        seen[0][label] += n
        seen[1][guess] += n
    f1 = [2 * right[i] / (seen[0][i] + seen[1][i]) for i in seen[0]]
    accuracy = sum(right.values()) / max(1, total)
    return {"val_accuracy": accuracy, "val_f1": sum(f1) / max(1, len(f1))}


def confusion(pairs, labels):
    """The table of {(label, guess): count}: a line for each label that there is."""
    numbers = range(len(labels))
    width, cell = max(map(len, labels)), max(4, len(str(max(pairs.values()))) + 1)
    lines = ["confusion (a row: the label, a column: the guess)"]
    lines += [" " * (width + 4) + "".join(f"{j:{cell}}" for j in numbers)]
    for i in numbers:
        if any(pairs[i, j] for j in numbers):
            cells = "".join(f"{pairs[i, j] or '.':>{cell}}" for j in numbers)
            lines.append(f"{i:3} {labels[i]:{width}}{cells}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_adapter(folder, net, tok, step=0, state=None):
    """Write the added matrices as a PEFT adapter, and the tokenizer; with `state` also state.pt.
    GPT-2's file has q, k and v as one layer: their three products are one of three times the rank,
    with blocks of zeros."""
    make_folder(folder)
    layers = {f"{n}.weight": m for n, m in net.named_modules() if isinstance(m, LoRA)}
    gpt2 = family(net.config) == "gpt2"
    groups = gpt2_names(layers) if gpt2 else {name: [name] for name in layers}
    tensors, ranks = {}, {}
    for theirs, ours in groups.items():
        place = theirs.removesuffix(".weight")
        A = torch.cat([layers[name].lora_A.weight for name in ours])
        B = torch.block_diag(*[layers[name].lora_B.weight for name in ours])
        tensors[f"base_model.model.{place}.lora_A.weight"] = A
        tensors[f"base_model.model.{place}.lora_B.weight"] = B
        # GPT-2 has a c_proj in attention and one in the MLP: two names tell them apart.
        ranks[".".join(place.split(".")[-2 if gpt2 else -1 :])] = len(A)
    base = os.path.relpath(model, folder) if os.path.isdir(model) else model  # a Hub model's name
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    config |= {"r": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    config |= {"bias": "none", "target_modules": sorted(ranks), "fan_in_fan_out": gpt2}
    config |= {"inference_mode": True, "init_lora_weights": True, "modules_to_save": None}
    wide = {name: rank for name, rank in ranks.items() if rank != lora_rank}
    alphas = {name: lora_alpha * rank / lora_rank for name, rank in wide.items()}
    config |= {"rank_pattern": wide, "alpha_pattern": alphas}
    write_json(folder / "tokenizer.json", tok.spec)
    write_json(folder / "tokenizer_config.json", tok.config)
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_ids, "pad_token_id": tok.pad_id}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "adapter_config.json", config)
    write_weights(folder / "adapter_model.safetensors", tensors, step, state)


def add_tokens(net, tok, names, template):
    """A tokenizer with more special tokens and this chat template; the network gets rows for those
    that it has none for, each the mean of the others."""
    spec, rows = json.loads(json.dumps(tok.spec)), net.config.vocab_size
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    new = [name for name in names if name not in tok.special]
    more = [{"id": tok.n_vocab + i, "content": name} | flags for i, name in enumerate(new)]
    spec["added_tokens"] = spec.get("added_tokens", []) + more
    added = Tokenizer(spec, tok.config | {"chat_template": template})
    added.eos_ids = tok.eos_ids
    if added.n_vocab > rows:
        net.config.vocab_size = -(-added.n_vocab // 64) * 64
        for layer in (net.model.embed_tokens, net.lm_head):
            w = layer.weight.data
            extra = w[:rows].mean(0, keepdim=True).repeat(net.config.vocab_size - rows, 1)
            layer.weight = nn.Parameter(torch.cat([w, extra]))
        if net.config.tie:
            net.lm_head.weight = net.model.embed_tokens.weight
    return added


def add_prompts(net, tok):
    """Soft prompts (Lester et al. 2021) as tokens of their own before every conversation: rows of
    the embedding, which alone learn, so that every reader of the folder has them."""
    names = [f"<|prompt_{i}|>" for i in range(prompt_tokens)]
    tok = add_tokens(net, tok, names, "".join(names) + tok.chat_template())
    ids = [tok.special[name] for name in names]
    weight = net.model.embed_tokens.weight
    with torch.no_grad():
        weight[ids] = weight[torch.randint(min(ids), (len(ids),))]
    mine = torch.zeros(len(weight), 1, device=weight.device)
    mine[ids] = 1
    net.requires_grad_(False)
    weight.requires_grad_(True)
    weight.register_hook(lambda grad: grad * mine)
    return tok


def check_settings():
    if method not in TASK:
        known = [*TASK, "lora", "qlora", "adapter", "prompt"]
        raise UserError(f"--method={method}: expected {', '.join(known)}")
    for key, known in {
        "adapt": ("full", "lora", "qlora", "adapter", "prompt"), "init_from": ("base", "resume"),
        "too_long": ("truncate", "drop"), "pooling": ("last", "mean"),
        "dpo_loss": ("sigmoid", "ipo"), "lr_schedule": ("linear", "cosine", "constant"),
    }.items():  # fmt: skip
        if globals()[key] not in known:
            raise UserError(f"--{key}={globals()[key]}: expected {', '.join(known)}")
    least = "batch_size micro_tokens lora_rank eval_every save_every max_new_tokens rl_epochs"
    least = dict.fromkeys(f"{least} minibatches adapter_size prompt_tokens".split(), 1)
    least |= {"train_last": 0, "group_size": 2 if method == "grpo" else 1}
    for key, number in least.items():
        if globals()[key] is not None and globals()[key] < number:
            raise UserError(f"{key}={globals()[key]}: expected {number} or more")
    if not 1e-3 <= temperature < math.inf:  # below it the samples of a prompt are all the same
        raise UserError(f"temperature={temperature}: expected 0.001 or more")
    if train_last != 0 and adapt != "full":
        raise UserError(f"train_last={train_last}: of --adapt=full, not of {adapt}")
    if template is not None and method != "sft":
        raise UserError(f"template: it is of --method=sft, not of {method}")
    if template is not None and not templates():
        raise UserError("template: an empty list")
    for text in templates() if template is not None else ():
        check_template(text)
    if adapt == "prompt" and (weight_decay or template or method in ("classify", "reward", "ppo")):
        raise UserError("adapt=prompt: expected a chat method, no template and no weight_decay")
    if merge not in (False, True, "quantized"):
        raise UserError(f"--merge={merge}: expected nothing behind it, or quantized")
    if merge and adapt not in ("lora", "qlora"):
        raise UserError(f"--merge: there is no adapter to merge of --adapt={adapt}")
    if merge == "quantized" and adapt != "qlora":
        raise UserError("--merge=quantized: only qlora has weights in 4 bits")
    for key in ("max_steps", "max_epochs"):
        if globals()[key] is not None and globals()[key] <= 0:
            raise UserError(f"{key}={globals()[key]}: expected more than 0, or none")
    if max_steps is None and max_epochs is None:
        raise UserError("no horizon: set max_steps or max_epochs")


def verdict_of_samples(run, net, tok, prompts, judge, cast):
    """The mean reward of one sample of each prompt, by all processes together."""
    mine, total = prompts[run.rank :: run.world], Counter(n=0)
    for i in range(0, len(mine), 32):
        samples = roll_out(net, tok, mine[i : i + 32], judge, i, cast)
        total["reward"] += sum(e["reward"] for e in samples)
        total["n"] += len(samples)
    total = summed(run, total)
    return {"val_reward": total["reward"] / max(1, total["n"])}


def lr_scale(step, steps):
    """The learning rate over its peak: a warm-up to 1, then a schedule that falls from 1 to 0."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    after = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
    down = {"linear": 1 - after, "cosine": (1 + math.cos(math.pi * after)) / 2, "constant": 1.0}
    return warm * down[lr_schedule]


# What a resume may change, and is told; what shapes nothing, or only by what it comes to, which a
# part's facts have. A resume with another of all other settings would draw another curve.
FREE = """learning_rate lr_schedule warmup_steps weight_decay grad_clip neftune dropout lora_dropout
max_steps max_epochs early_stopping eval_examples micro_tokens""".split()
ASIDE = """out_dir init_from overwrite device dtype checkpoint_blocks eval_every save_every merge
check_memorized""".split()


def facts_of(run, kind):
    """What the settings came to: the data, the model to start from, what it is computed in."""
    paths = sorted((Path("data") / dataset).glob(f"{TASK[method]}_*.jsonl"))
    facts = {"dataset": dataset if dataset == "arithmetic" else fingerprint(paths)}
    read = ("config.json", "adapter_config.json", "tokenizer.json", "*.safetensors")
    read += ("tokenizer_config.json", "chat_template.jinja")
    paths = [path for folder in model_and_bases(model) for name in read
             for path in sorted(folder.glob(name))]  # fmt: skip
    facts |= {"model": fingerprint(paths), "processes": run.world}
    judge = Path(reward.rpartition(":")[0] or reward)  # FILE.py:function, or a model's folder
    judge = [judge] if judge.is_file() else sorted(judge.glob("*.safetensors"))
    if method in ("grpo", "ppo") and judge:
        facts["reward"] = fingerprint(judge)
    facts |= {"computed_in": str(kind).removeprefix("torch."), "torch": str(torch.__version__)}
    return facts


def changes(state, facts):
    """What this resume changes in what shapes the run: {key: "key old -> new"}."""
    config = {key: value for key, value in settings(globals()).items() if key not in ASIDE}
    part = state["parts"][-1]
    return changed_settings(part["config"] | part["facts"], config | facts)


def choose_weights(net):
    """Which parameters learn: the adapter's, those of the last blocks, or all; a score's always."""
    if adapt in ("lora", "qlora"):
        adapt_network(net, adapt)
    elif adapt == "adapter":
        net.requires_grad_(False)
        add_adapters(net, adapter_size)
    elif train_last != 0:
        net.requires_grad_(False)
        last = () if train_last is None else (*net.model.layers[-train_last:], net.model.norm)
        for part in last:
            part.requires_grad_(True)
        net.lm_head.requires_grad_(not net.config.tie)
    if net.score is not None:
        net.score.requires_grad_(True)
        if method != "ppo":  # the head is not read; a tied one is the embedding
            learns = net.config.tie and net.model.embed_tokens.weight.requires_grad
            net.lm_head.requires_grad_(learns)
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError(
            f"train_last={train_last}: nothing would learn: the head of this model is its "
            "embedding, which is frozen (--train_last=1 or more, or an untied model)"
        )


def make_optimizers(net):
    """core.make_optimizer's, their groups divided by depth where layer_decay asks for it."""
    optimizers = make_optimizer(net, optimizer, learning_rate, weight_decay, (0.9, 0.99))
    if layer_decay == 1:
        return optimizers
    depth = {}
    for name, p in net.named_parameters():
        inside = name.split(".layers.")[1:]
        outer = 0 if "embed" in name else net.config.n_layer + 1
        depth[p] = int(inside[0].split(".")[0]) + 1 if inside else outer
    for o in optimizers:
        groups = []
        for group in o.param_groups:
            for d in sorted({depth[p] for p in group["params"]}):
                params = [p for p in group["params"] if depth[p] == d]
                peak = group["initial_lr"] * layer_decay ** (net.config.n_layer + 1 - d)
                groups.append(group | {"params": params, "initial_lr": peak})
        o.param_groups = groups
    return optimizers


# --------------------------------------------------------------------------------------------------
# The run


def reference_logprobs(run, net, pairs, cast):
    """Put the log-probabilities under the network as it is now into each pair, once for all."""
    for number, pair in enumerate(pairs):
        pair["number"] = number
    found, training = Counter(), net.training
    net.eval()
    with torch.no_grad(), cast:
        for group in chunks(pairs[run.rank :: run.world], net.config.n_ctx):
            logp = [[0.0] * len(group)] * 2 if reference_free else both_logprobs(net, group)
            for which, values in enumerate(logp):
                found.update({(p["number"], which): float(x) for p, x in zip(group, values)})
    net.train(training)
    found = summed(run, found)
    for number, pair in enumerate(pairs):
        pair["reference"] = [found[number, 0], found[number, 1]]


def repeated(net, tok, examples, cast):
    """Of the examples' (first) responses the share that greedy generation reproduces word for word,
    their end included, and the share that it ends at all."""
    prompts, answers = [], []
    for e in examples:
        first = next(i for i, t in enumerate(e["targets"]) if t != -100)
        last = next((i for i in range(first, len(e["targets"])) if e["targets"][i] == -100), None)
        if first + 1 < net.config.n_ctx:
            prompts.append(e["ids"][: first + 1])
            answers.append(e["targets"][first:last])
    with cast:
        longest = max(map(len, answers), default=0)
        made = core.generate(net, tok, prompts, max_new_tokens=longest + 1, temperature=0)
    ended = [g.finish_reason == "stop" for g in made]
    answers = [[t for t in answer if t not in tok.special.values()] for answer in answers]
    same = [g.text.strip() == tok.decode(a).strip() for g, a in zip(made, answers)]
    same = [equal and end for equal, end in zip(same, ended)]
    return sum(same) / max(1, len(same)), sum(ended) / max(1, len(ended))


def open_model(run, say):
    """The network and tokenizer to start from, with chat markers where the method wants them."""
    net, tok = load(model, "cpu" if adapt == "qlora" else run.device)
    chats = method in ("sft", "dpo", "reward") and template is None
    if chats and not tok.config.get("chat_template"):
        if adapt in ("lora", "qlora"):
            raise UserError(f"{model} has no chat template, and new tokens need --method=sft first")
        tok = add_tokens(net, tok, ("<|im_start|>", "<|im_end|>"), CHATML)
        say(f"{model} has no chat template: ChatML's is added")
    torch.manual_seed(seed)
    if adapt == "prompt":
        tok = add_prompts(net, tok)
    if method != "classify" and template is None:
        try:
            ends = tok.end_of_turn()
        except TemplateRefusal as error:  # a reward needs none, and records may be taken
            ends = []
            say(f"{model}: answers end at the end token alone: {error}")
        else:
            if not ends and method == "sft":
                say(
                    f"{model}: its chat template ends no answer with a special token: the model "
                    "learns no end (put {{ eos_token }} behind an assistant's content in it)"
                )
        tok.eos_ids = list(dict.fromkeys([*tok.eos_ids, *ends]))
    if template is not None and not tok.eos_ids:
        say(f"{model}: its tokenizer has no end token: the model learns no end of an answer")
    net.n_vocab = tok.n_vocab  # ids from here on are padding, which is never sampled
    net.config.dropout, net.checkpoint = dropout, checkpoint_blocks
    return net, tok


def open_data(net, tok, limit, say):
    """The examples to train on and to validate with; the labels of a classifier become its head."""
    train, val = (load_examples(split, tok, limit, say) for split in ("train", "val"))
    if not train:
        raise UserError(f"data/{dataset}: no example for --method={method}")
    if method == "reward":
        net.set_score(["reward"], pad_id=tok.pad_id)
    if method == "classify":
        counts = Counter(e["label"] for e in train)
        unseen = Counter(e["label"] for e in val if e["label"] not in counts)
        if unseen:
            say(f"val: {unseen.total()} examples left out: labels unseen in training: {[*unseen]}")
        val = [e for e in val if e["label"] in counts]
        net.set_score(sorted(counts), pooling, tok.pad_id)
        if pooling == "mean":
            say(
                "pooling=mean: the folder is model_type barelm, for these scripts alone: "
                "transformers' sequence classifiers read the last token, as --pooling=last does"
            )
        for e in [*train, *val] if class_weights else []:
            e["weight"] = len(train) / (len(counts) * counts[e["label"]])
    return train, val[: eval_examples or None]


@functools.lru_cache(2)
def order_of(epoch, n):
    """The order of an epoch's n examples."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def write(folder, run, net, tok, step, state=None):
    """Save what was learned: a checkpoint folder, or an adapter; with `state` also state.pt."""
    head = net.score
    if method == "ppo":  # the value head is no part of the policy
        net.score = None
    if run.main and adapt not in ("lora", "qlora"):
        checkpoint.save(folder, net, tok, step, state)
    elif run.main and net.score is not None:  # PEFT's file has no place for our score
        checkpoint.save(folder, merged(copy.deepcopy(net)), tok, step, state)
    elif run.main:
        save_adapter(folder, net, tok, step, state)
    net.score = head


def finish_adapter(out, net, tok, step, say):
    """Write merged/ if asked for, and say on which weights each folder stands: qlora has learned on
    4 bits, while a reader of its adapter adds it to the weights that these were made of."""
    full, packed = f"the weights of {model}", f"the 4 bits of {model} that it was trained on"
    net.score = None if method == "ppo" else net.score
    if net.score is None:
        say(f"adapter: {out}, which opens on {full}")
    else:
        say(f"plain folder: {out}, merged into {packed if adapt == 'qlora' else full}")
    if not merge:
        return
    if adapt == "qlora" and merge != "quantized":
        unquantize(net)
    clear_folder(out / "merged")
    checkpoint.save(out / "merged", merged(net).eval(), tok, step)
    say(f"merged: {out / 'merged'}, into {packed if merge == 'quantized' else full}")


def words(figures):
    return "  ".join(f"{key} {value:.4f}" for key, value in figures.items())


def main():
    global method, adapt
    if method in ("lora", "qlora", "adapter", "prompt"):
        method, adapt = "sft", method
    check_settings()
    run, progress = setup(device), Progress()
    most = -(-batch_size // run.world) * (group_size if method == "grpo" else 1)
    if minibatches > most:
        raise UserError(f"minibatches={minibatches}: a process has {most} samples a step")
    say = progress.note if run.main else lambda text: None
    out, config = Path(out_dir), settings(globals())
    found = holds_model(out)
    if init_from == "base" and found and not overwrite:
        ways = "--init_from=resume goes on, --overwrite replaces it, or take another --out_dir"
        raise UserError(f"{out} holds a run or a model ({found[0].relative_to(out)}): {ways}")
    refuse_source(out, model)
    if method in ("grpo", "ppo") and Path(reward).is_dir():
        refuse_source(out, reward)
    state = load_state(out) if init_from == "resume" else None
    net, tok = open_model(run, say)
    limit = min(seq_len or net.config.n_ctx, net.config.n_ctx)
    train, val = open_data(net, tok, limit, say)
    by_epochs = math.ceil(len(train) / batch_size * max_epochs) if max_epochs else math.inf
    steps = min(max_steps or math.inf, by_epochs)
    kind, why = choose_dtype(run.device, dtype, net.config.n_embd)
    if kind == torch.float16:
        kind, why = torch.float32, "float16 would need a scaler, which is not here"
    cast = autocast(run.device, kind)
    facts, parts, changed = facts_of(run, kind), [], {}
    if state:
        parts, changed = state["parts"], changes(state, facts)
        refused = [key for key in changed if key in config and key not in FREE]
        if refused:
            raise UserError(
                f"{out}: no resume with another {', '.join(refused)}, which would make it another "
                f"curve ({', '.join(changed[key] for key in refused)})"
            )
    if method == "ppo":
        net.set_score(["value"])
        nn.init.zeros_(net.score.weight)
    n_params = optim.n_params(net)
    choose_weights(net)
    net.to(run.device).train()  # of qlora the 4 bits alone
    if method == "dpo":
        first = order_of(0, len(train))[: min(steps * batch_size, len(train))]
        reference_logprobs(run, net, [train[i] for i in first], cast)
        reference_logprobs(run, net, val, cast)
    judge = open_reward(run) if method in ("grpo", "ppo") else None
    reference = copy.deepcopy(net).eval() if judge and kl_weight else None
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    learn = sum(p.numel() for p in params.values())
    say(
        f"model: {model}, {n_params:,} parameters; {learn:,} learn ({adapt})\n"
        f"data: {len(train):,} examples to train on, {len(val):,} to validate; {steps:,} steps of "
        f"{batch_size} examples\n"
        f"device: {run.device}, computing in {str(kind).removeprefix('torch.')}: {why}"
    )
    optimizers = make_optimizers(net)
    done = dict(step=0, best=math.inf, since_best=0, first_verdict=None, seconds=0.0)
    if state:
        done = {key: state[key] for key in done}
        restore_weights(params, state["weights"])
        restore_optimizers(optimizers, state["optimizers"], out / "state.pt")
        say(f"resumed {out_dir} at step {done['step']}")
        say_changes(changed, parts, say)
        # A best of other examples, or of a future that will not be, is none.
        if "eval_examples" in changed or changed and weights_step(out / "best") > done["step"]:
            done["best"] = math.inf
    if warmup_steps >= steps:
        say(f"note: warmup_steps={warmup_steps} is the whole run: no step has the learning rate")
    summed(run, Counter())  # nobody writes before everybody has read
    if run.main:
        if not state:  # what a replaced run has left must never be taken for this one's
            clear_folder(out)
        elif state["temporary"]:
            os.replace(out / "state.pt.tmp", out / "state.pt")
        step = done["step"]
        part = {"step": step, "config": config, "facts": facts, "command": " ".join(sys.argv)}
        parts = [before for before in parts if before["step"] < step] + [part]
        write_json(
            out / "run.json", {"config": config, "command": " ".join(sys.argv), "parts": parts}
        )
        log = open_log(out / "log.jsonl", step if state else -1, say)
    begun = time.monotonic() - done["seconds"]
    first_update, bad = True, 0  # whether none has been; how many in a row were not finite

    def record(row):
        if run.main:
            write_row(log, row)

    def save():
        if run.main:
            clear_folder(out / "merged")  # of the adapter that is replaced
        saved = done | {"seconds": time.monotonic() - begun, "parts": parts}
        saved["weights"] = {name: p.detach() for name, p in params.items()}
        saved["optimizers"] = [o.state_dict() for o in optimizers]
        write(out, run, net, tok, done["step"], saved)

    def update(examples):
        """One optimizer step on this process's examples: (figures over all processes, norm)."""
        nonlocal first_update, bad
        size, stats = max(summed(run, Counter(size=size_of(examples)))["size"], 1e-9), Counter()
        for group in chunks(examples, limit):
            with cast:
                loss, some = LOSS[method](net, group)
            (loss / size).backward()
            stats.update(some if method != "classify" else {})
            stats["loss"] += float(loss.detach())
        sync_grads(params.values())
        norm = float(nn.utils.clip_grad_norm_(params.values(), grad_clip or math.inf))
        if math.isfinite(norm):
            bad = 0
            if judge is None:  # of equal rewards a gradient is exactly zero, rightly
                check_gradient(norm, done["step"] + 1)
            # The last steps, from which a resume may start, move less than float32 shows.
            early = done["step"] < warmup_steps or lr_scale(done["step"], steps) > 0.01
            must_move = norm > 0 and early
            before = weight_sums(params.values()) if first_update and must_move else None
            for o in optimizers:
                o.step()
            if before is not None:
                check_moved(before, params.values(), optimizers[0].param_groups[0]["lr"])
                first_update = False
        else:
            bad += 1
            say(f"step {done['step'] + 1}: gradient norm {norm}: the update is skipped")
        if bad == BAD_STEPS:
            raise UserError(
                f"{bad} updates in a row were not finite: lower learning_rate ({learning_rate:g}), "
                f"raise warmup_steps ({warmup_steps}) or use --dtype=float32"
            )
        for o in optimizers:
            o.zero_grad()
        return {k: v / size for k, v in summed(run, stats).items()}, norm

    def reinforce(prompts, draw):
        """Samples of these prompts, and updates on them: (figures over all processes, norm)."""
        n = group_size if method == "grpo" else 1
        samples = roll_out(net, tok, prompts, judge, draw, cast, n)
        judge_samples(run, net, reference, samples, cast)
        sums = Counter(reward=sum(e["reward"] for e in samples), n=len(samples))
        sums["length"] = sft_size(samples)
        sums = summed(run, sums)
        for _ in range(rl_epochs):
            order = torch.randperm(len(samples)).tolist()
            for i in range(minibatches):
                figures, norm = update([samples[k] for k in order[i::minibatches]])
        if method == "ppo":
            spread = figures.pop("return2") - figures["return"] ** 2
            figures["explained_variance"] = 1 - figures.pop("unexplained") / max(spread, 1e-9)
        return {key: sums[key] / sums["n"] for key in ("reward", "length")} | figures, norm

    def look_at_val():
        if judge is not None:
            found = verdict_of_samples(run, net, tok, val, judge, cast)
        else:
            found = verdict(run, net, val, limit, cast)
        record({"step": done["step"]} | found)
        say(f"step {done['step']}: {words(found)}")
        return found

    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: caught.append(n))
    if val and done["first_verdict"] is None:
        done["first_verdict"] = look_at_val()
    stop, ended, row = False, False, {}  # ended: early
    while done["step"] < steps and not (stop or ended):
        step, tick = done["step"], time.monotonic()
        torch.manual_seed((seed * 1_000_003 + step) * 65_537 + run.rank)
        rate = learning_rate * lr_scale(step, steps)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["initial_lr"] * lr_scale(step, steps)
        places = range(step * batch_size + run.rank, (step + 1) * batch_size, run.world)
        places = [divmod(i, len(train)) for i in places]
        mine = [train[order_of(epoch, len(train))[i]] for epoch, i in places]
        draw = (seed * 1_000_003 + step) * run.world + run.rank
        try:
            figures, norm = reinforce(mine, draw) if judge else update(mine)
        except UserError:  # of a reward or of an update: nothing was learned in this step
            if done["step"]:
                save()
                say(f"saved at step {done['step']}; --init_from=resume goes on")
            raise
        done["step"] = step = step + 1
        row = {"step": step} | figures | {"lr": rate, "grad_norm": norm}
        row["dt"] = time.monotonic() - tick
        record(row)
        if run.main:
            left = duration((time.monotonic() - begun) * (steps - step) / step)
            shown = f"{words(figures)}  lr {rate:.2e}  norm {norm:.2f}"
            progress(f"step {step} of {steps}  {shown}  {1 / row['dt']:.1f} steps/s  left {left}")
        if val and (step % eval_every == 0 or step == steps):
            row |= (told := look_at_val())
            score = told["val_loss"] if judge is None else -told["val_reward"]
            done["since_best"] += 1
            if score < done["best"]:
                done |= {"best": score, "since_best": 0}
                write(out / "best", run, net, tok, step)
            if ended := bool(early_stopping) and done["since_best"] >= early_stopping:
                count = done["since_best"]
                say(f"no new best in {count} validations: stopped; best/ has the best")
        stop = summed(run, Counter(stop=len(caught)))["stop"] > 0
        if step % save_every == 0 or step == steps or stop or ended:
            save()
    say("")
    if stop and done["step"] < steps and not ended:
        say(f"stopped at step {done['step']} and saved; --init_from=resume goes on")
        summed(run, Counter(saved=1))  # all wait, or the launcher would end the save
        return 128 + (caught or [signal.SIGTERM])[0]
    if method == "classify" and val:
        say(confusion(net.guesses, net.labels))
    if method == "sft" and check_memorized and run.main:
        for name, some in (("training", train), ("validation", val)):
            some = some[:check_memorized]
            if some:
                row[f"repeated_{name}"], row[f"ended_{name}"] = repeated(net, tok, some, cast)
        said = f"memorization: {row['repeated_training']:.0%} of training"
        ended = f"{row['ended_training']:.0%}"
        if val:
            said += f" and {row['repeated_validation']:.0%} of validation"
            ended += f" and {row['ended_validation']:.0%}"
        said += f" responses come back word for word and end; {ended} end at all"
        if "val_loss" in row and "loss" in row:
            gap = row["val_loss"] - row["loss"]
            said += f"; validation loss is {gap:+.2f} from the last training loss"
        say(said)
    if run.world > 1:  # the sum of all weights, in the same order everywhere: equal or not at all
        sums = [None] * run.world
        own_sum = float(sum(p.detach().double().sum() for p in params.values()))
        dist.all_gather_object(sums, own_sum)
        if len(set(sums)) > 1:
            raise UserError(f"the processes' weights have come apart: {sums}")
        say(f"weights: equal on {run.world} processes")
    if run.main and adapt in ("lora", "qlora"):
        finish_adapter(out, net, tok, done["step"], say)
    for key, value in row.items():
        say(f"{key}: {value:.6g}")
    if run.world > 1:
        dist.barrier()
    return 0


def load_state(folder):
    """The state of the run in a folder, of the kinds that main saves."""
    state, path = resume.load_state(folder), folder / "state.pt"
    kinds = dict(step=0, best=-1.0, since_best=0, seconds=0.0, weights={}, optimizers=[], parts=[])
    check_state(state, kinds, path)
    check_parts(state["parts"], path)
    first = state.get("first_verdict", "")  # None before any validation
    figures = first.values() if isinstance(first, dict) else []
    right = first is None or isinstance(first, dict)
    if not right or not all(type(figure) is float for figure in figures):
        raise UserError(f"{path}: first_verdict is none of a run's: damaged, or foreign")
    return state


def restore_weights(params, saved):
    """Copy a state's weights, {name: tensor}, into the parameters that learn."""
    fits = params.keys() == saved.keys()
    if not fits or not all(same_kind(saved[name], p) for name, p in params.items()):
        why = "its weights are not those that learn here: damaged, or foreign"
        raise UserError(f"{out_dir}/state.pt: {why}")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved[name])


if __name__ == "__main__":
    with locked_folder(out_dir), lost_process():
        status = main()
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
