"""Adapt a model: instructions, classes, preferences, rewards; all weights or a few added ones.

    python finetune.py config/sft.py                    # out/python learns to write docstrings
    python finetune.py --method=lora --model=out/python --dataset=python --out_dir=out/lora
    python finetune.py --method=classify --out_dir=out/classify
    python finetune.py config/tag.py                    # names, calls, strings ... in a function
    python finetune.py config/embed.py                  # vectors: which function a docstring is of
    python finetune.py --method=dpo --model=out/sft --out_dir=out/dpo
    python finetune.py config/kto.py                    # thumbs up and down, one by one
    python finetune.py --method=distill --teacher=out/sft --model=out/pupil --out_dir=out/distill
    python finetune.py config/seq2seq.py                # an encoder-decoder: a source, its target
    torchrun --nproc_per_node=8 finetune.py config/sft.py --model=path/to/a/hugging-face-folder

Reads data/<dataset>/<task>_{train,val}.jsonl (prepare.py makes them; the default source has all).
Writes out_dir/: a checkpoint folder (for lora and qlora a PEFT adapter, with --merge a plain one),
best/, state.pt (to resume), log.jsonl, run.json. Ctrl-C and SIGTERM save and exit.

A method is a loss over examples: one entry of METHODS, below the losses. GRPO, RLOO and PPO are in
rl.py.
"""

from config import command_of, configure, defaults, settings

# what, from what, to where
method = "sft"  # sft, seq2seq, classify, tag, span, embed, dpo, simpo, orpo, kto, reward, distill
model = "out/python"  # the checkpoint folder to start from
dataset = "python"  # data/<dataset> has the task's JSONL
out_dir = "out/sft"  # where the result is written
init_from = "base"  # base, resume (go on where out_dir was stopped), or auto: what there is
overwrite = False  # let base replace the run that out_dir holds
seed = 0  # of the order of the data, dropout and samples

# the batch: one number
batch_size = 16  # examples (or pairs) per optimizer step, over all processes
micro_tokens = 4096  # tokens at once on a device, at most, but one example at least
seq_len = 0  # tokens of an example, at most; 0: the model's context
too_long = "truncate"  # or drop: what happens to longer examples
pack = True  # several examples in a row, which do not see each other; false: a padded row each

# how long: the first of these that is reached ends the run
max_steps: int | None = None  # optimizer steps
max_epochs: float | None = 1.0  # passes over the training examples
max_minutes: float | None = None  # minutes of wall clock, validation included
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
optimizer = "adamw"  # any of train.py's
learning_rate = 3e-4  # the peak
lr_schedule = "linear"  # linear, cosine, trapezoid, constant or inverse_sqrt, after the warm-up
warmup_steps = 10  # steps of linear warm-up
min_lr = 0.0  # the last learning rate, as a fraction of the peak
decay_fraction = 0.4  # trapezoid: the part of the run that decays
layer_decay = 1.0  # the learning rate of a block over that of the one behind it
weight_decay = 0.0  # decoupled
beta2 = 0.99  # AdamW's: a fine-tuning is short, and an average over 1,000 steps never warms up
grad_clip = 1.0  # the largest gradient norm; 0: no clipping
neftune = 0.0  # noise on the embeddings of sft (Jain et al. 2023): its alpha, 5 or so
dropout = 0.0  # in the network

# the methods
template: str | list | None = None  # sft of plain records: "Q: {instruction} {input} A: {output}"
pooling = "last"  # classify, embed: the state that is read: last (a decoder's), first, or mean
embed_temperature = 0.05  # embed: of the softmax over a batch's cosines
class_weights = False  # classify: rare labels count as much as frequent ones
beta = 0.1  # dpo, ipo, kto: the weight of the reference
dpo_loss = "sigmoid"  # sigmoid (Rafailov et al. 2023) or ipo (Azar et al. 2023)
label_smoothing = 0.0  # dpo: the share of pairs that are the wrong way round; seq2seq: see there
source_template = "{source}"  # seq2seq: what the encoder reads, such as "summarize: {source}"
reference_free = False  # dpo: without the reference
simpo_beta = 2.0  # simpo: the reward of an answer is its mean log p a token, times this
simpo_gamma = 1.0  # simpo: by how much the chosen answer's reward is to be the larger
orpo_weight = 0.1  # orpo: lambda, of the odds ratio beside the chosen answer's own loss
desirable_weight = 1.0  # kto: of an answer that is liked
undesirable_weight = 1.0  # kto: of one that is not
teacher: str | None = None  # distill: the checkpoint folder to learn from, of the same tokenizer
teacher_weights = "float32"  # distill: as what the teacher is held; or bfloat16, int8, int4
distill_beta = 0.0  # distill: 0 forward KL, 1 reverse KL, between them the generalized JSD
distill_temperature = 1.0  # distill: the logits of both are divided by it
hard_weight = 0.0  # distill: the part of the loss that is sft's, on the data's own tokens
on_policy = 0.0  # distill: the share of examples whose answer is the student's own (GKD's lambda)
max_new_tokens = 64  # distill: of such an answer

# several processes: who holds what (docs/scale.md)
parallel = "ddp"  # ddp: each holds all; fsdp: a part of every matrix; hsdp: fsdp within a machine
replicas = 0  # hsdp: copies of the whole; 0: one a machine

# the machine
device = "auto"  # auto, cpu, mps, cuda, cuda:1
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
dtype = "auto"  # auto, float32, bfloat16, float16
compile: bool | None = None  # torch.compile of the blocks; none: where it pays
fast = True  # false: model.py's plain mathematics alone, a referee for a doubtful result
deterministic = False  # a text's bits do not depend on the batch: slower (docs/determinism.md)
checkpoint_blocks: int | bool = False  # recompute so many blocks (bare: all): less memory, slower

# looking on
eval_every = 100  # steps between validations; there is one at the start and one at the end
eval_examples = 400  # validation examples each time, the first ones; 0: all
save_every = 200  # steps between checkpoints
check_memorized = 40  # examples of each split that are tried word for word at the end; 0: none

if __name__ == "__main__":
    configure(globals())

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from barelm.adapters import AdaptConfig, choose_weights
from barelm.checkpoint import model_and_bases, refuse_source
from barelm.distillation import TEACHER_WEIGHTS, distill_sums, open_teacher, with_own_answers
from barelm.embeddings import POOLINGS
from barelm.ending import after_tuning, say_end
from barelm.examples import (
    IGNORED,
    batch_of,
    check_template,
    conversation_ids,
    count_targets,
    device_of,
    epoch_order,
    fill_template,
    is_compiled,
    load_examples,
    longest_row,
    micro_batches,
    n_rows,
    n_tokens,
    pack_rows,
    padded,
    padded_length,
    parse_templates,
    places_of_targets,
    share_of,
    targets_of,
)
from barelm.extraction import read_answer
from barelm.fitting import (
    Load,
    flops_of_run,
    generate_all,
    prepare_network,
    say_memory,
    why_not_compile,
)
from barelm.heads import (
    add_embed_pooling,
    add_span_head,
    add_tag_head,
    embed_loss,
    read_texts,
    set_head,
    span_loss,
    tag_figures,
    tag_loss,
    tag_table,
    validate_vectors,
    with_gradients,
)
from barelm.invariant import be_deterministic
from barelm.mesh import open_mesh
from barelm.optim import n_params
from barelm.pace import TimeLeft
from barelm.parallel import divide_again, whole_weights
from barelm.resume import (
    RESUME_IGNORES,
    RESUME_MAY_CHANGE,
    RunFolder,
    choose_start,
    fingerprint,
    locked_folder,
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
    end_process,
    make_scaler,
    setup,
    step_seed,
    to_device,
)
from barelm.tagging import read_tagged
from barelm.tool_use import for_training
from barelm.tuning import (
    ADAPTS,
    add_figures,
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
    finish_adapter,
    load_state,
    log_row,
    make_optimizers,
    open_learner,
    place,
    read_figures,
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
    sum_figures,
    trial,
    update,
    words,
)
from barelm.unpaired import add_mismatched, balance_note
from barelm.watch import lost_process, start_watch

# --------------------------------------------------------------------------------------------------
# Records become examples: (row, tok, limit) -> a dict, of `limit` tokens at most


def read_sft(row, tok, limit):
    """Inputs and targets of a conversation, or of a plain record by the template: the loss is on
    what the assistant says (or {output}) and what ends it, nothing else."""
    if template is None:
        messages, variables = for_training(tok, row)
        ids, loss_mask = tok.chat(messages, extra=variables)
    else:
        ids, loss_mask = fill_template(row, tok, parse_templates(template))
    if not any(loss_mask):
        raise UserError("no response in it")
    return fit(ids, loss_mask, limit)


def fit(ids, loss_mask, limit):
    """An example of these tokens and the mask of those that are to be learned."""
    inputs, targets = targets_of(ids, loss_mask)
    cut = is_too_long(inputs, limit)
    example = {"ids": inputs[:limit], "targets": targets[:limit], "cut": cut}
    if all(t == IGNORED for t in example["targets"]):
        raise UserError("no token of the response is within the context")
    return example


def is_too_long(ids, limit):
    """Whether an example is to be cut; with too_long=drop it is no example then."""
    if len(ids) > limit and too_long == "drop":
        raise UserError(f"longer than {limit} tokens")
    return len(ids) > limit


def read_seq2seq(row, tok, limit):
    """A source with its end token, for the encoder; the target with the start token before it as
    inputs and with the end token behind it as targets. net.start_id comes with the batch."""
    source = tok.source(source_template.replace("{source}", row["source"]))
    target = tok.encode(row["target"])
    if tok.end_id is not None:
        target = [*target, tok.end_id]
    if not source or not target:
        raise UserError("an empty source or target")
    cut = is_too_long(source, limit) or is_too_long(target, limit)
    return {"source": cut_before_end(source, limit, tok), "targets": target[:limit], "cut": cut}


def cut_before_end(source, limit, tok):
    """A source of `limit` tokens at most, the end token still at its end."""
    if len(source) <= limit or tok.end_id is None:
        return source[:limit]
    return [*source[: limit - 1], tok.end_id]


def read_class(row, tok, limit):
    """The first tokens of a text, and its label."""
    ids, cut = tok.whole_text(row["text"], limit)
    if not ids:
        raise UserError("an empty text")
    return unless_dropped({"ids": ids, "label": str(row["label"]), "cut": cut}, limit)


def read_tags(row, tok, limit):
    """The first tokens of a text, and the tags of its words."""
    return unless_dropped(read_tagged(row, tok, limit), limit)


def read_vectors(row, tok, limit):
    """The first tokens of each of two or three texts."""
    return unless_dropped(read_texts(row, tok, limit), limit)


def unless_dropped(example, limit):
    """An example that was cut to `limit` tokens; with too_long=drop it is none."""
    if example["cut"] and too_long == "drop":
        raise UserError(f"longer than {limit} tokens")
    return example


def read_pair(row, tok, limit):
    """Two answers to one prompt: the inputs and targets of each."""
    pair = {}
    for which, messages in both_conversations(row).items():
        ids, loss_mask = tok.chat(messages, answers="last")
        pair[which] = fit(ids, loss_mask, limit)
    return checked_pair(pair, limit)


def read_scored_pair(row, tok, limit):
    """Two answers to one prompt, each the ids of the whole conversation. A score is read where it
    ends: of a longer one the end is kept."""
    pair = {}
    for which, messages in both_conversations(row).items():
        ids = conversation_ids(messages, tok)
        pair[which] = {"ids": ids[-limit:], "cut": is_too_long(ids, limit)}
    return checked_pair(pair, limit)


def both_conversations(row):
    """{"chosen": messages, "rejected": messages} of a record."""
    return {which: conversation_of(row, which) for which in ("chosen", "rejected")}


def conversation_of(row, which):
    """The messages of a record's prompt, a text or messages, and of the answer in this field."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise UserError("prompt: expected a text or a list of messages")
    if not isinstance(row[which], str):
        raise UserError(f"{which}: expected a text")
    if not row[which].strip():
        raise UserError(f"{which} is empty")
    return [*prompt, {"role": "assistant", "content": row[which]}]


def read_rated(row, tok, limit):
    """An answer that somebody liked, or not: its inputs and targets, and which of the two."""
    if not isinstance(row["label"], bool):
        raise UserError("label: expected true or false")
    ids, loss_mask = tok.chat(conversation_of(row, "completion"), answers="last")
    return fit(ids, loss_mask, limit) | {"desirable": row["label"]}


def checked_pair(pair, limit):
    if pair["chosen"]["ids"] == pair["rejected"]["ids"]:  # its gradient is zero
        raise UserError(f"chosen and rejected are the same within {limit} tokens")
    return pair | {"cut": pair["chosen"]["cut"] or pair["rejected"]["cut"]}


# --------------------------------------------------------------------------------------------------
# Losses: (net, a group of examples) -> (the sum of their losses, {figure: its sum})


def sft_loss(net, rows):
    """The sum of -log p over the targets of packed rows, and nothing else to log."""
    ids = padded(rows, "ids", net)  # (B, T), as are targets and docs
    targets = padded(rows, "targets", net, IGNORED)
    docs = docs_of(net, rows)
    embeds = None
    if neftune and net.training:
        embeds = net.model.embed_tokens(ids)  # (B, T, C)
        longest = max(map(longest_row, rows))  # whatever it is padded to
        reach = neftune / math.sqrt(longest * embeds.shape[2])
        embeds = embeds + torch.empty_like(embeds).uniform_(-reach, reach)
    loss, _ = net(ids, targets, docs=docs, embeds=embeds)
    return loss, {}


def docs_of(net, rows):
    """The numbers (B, T) of the examples in packed rows, or None where each has but one."""
    several = any(max(row["docs"]) > 1 for row in rows)
    if several or (pack and is_compiled(net)):  # blocks are compiled for a mask, or for none
        return padded(rows, "docs", net)
    return None


def distill_loss(teacher, n_vocab, net, rows):
    """What the student is to say as its teacher does, over the targets of packed rows: the sum of

        (1 - hard_weight) T^2 D(teacher, student) + hard_weight (-log p(target))

    D: `divergence` at the temperature T, whose gradients shrink by T^2 (Hinton et al. 2015,
    section 2)."""
    ids = padded(rows, "ids", net)  # (B, T)
    docs = docs_of(net, rows)
    places, labels = places_of_targets(rows, net)  # (N,) each
    if "labels" in rows[0]:  # which an answer of the student's own has not
        all_labels = padded(rows, "labels", net, IGNORED)
        labels = all_labels.flatten().index_select(0, places)
    with torch.no_grad():
        teacher_h = teacher.hidden(ids, docs=docs).flatten(0, 1).index_select(0, places)
    h = net.hidden(ids, docs=docs).flatten(0, 1).index_select(0, places)  # (N, C)
    distance, nll = distill_sums(
        net, teacher, h, teacher_h, labels, n_vocab, distill_beta, distill_temperature
    )
    loss = (1 - hard_weight) * distill_temperature**2 * distance + hard_weight * nll
    if net.training and net.config.n_experts:  # as `forward` adds it
        loss = loss + len(places) * net.routing_loss()
    return loss, {"divergence": distance, "nll": nll}


def seq2seq_loss(net, examples):
    """The sum of -log p over the targets, each of which sees its source and the targets before it;
    in training with label_smoothing: the right token is to have 1 - label_smoothing, and all tokens
    an equal part of the rest (Szegedy et al. 2016; Vaswani et al. 2017, 5.4)."""
    inputs = [{"ids": [net.start_id, *e["targets"][:-1]], "source": e["source"]} for e in examples]
    lengths = torch.tensor([len(e["source"]) for e in examples])
    batch = {
        "ids": padded(inputs, "ids", net),  # (B, T)
        "encoder_ids": padded(inputs, "source", net),  # (B, S)
        "encoder_lengths": to_device(lengths, device_of(net)),
    }
    if not (label_smoothing and net.training):
        targets = padded(examples, "targets", net, IGNORED)  # (B, T)
        loss, _ = net(**batch, targets=targets)
        return loss, {}
    places, targets = places_of_targets(examples, net)  # (N,) each
    h = net.hidden(**batch).flatten(0, 1).index_select(0, places)  # (N, C)
    logits = net.logits(h).float()
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    if net.config.n_experts:  # as `forward` adds it
        loss = loss + len(targets) * net.routing_loss()
    return loss, {}


def classify_loss(net, examples):
    """Cross-entropy, weighted by label where class_weights says so. In validation also {(label,
    guess): count}; of one batch they would say little."""
    scores = text_scores(net, [e["ids"] for e in examples])  # (B, n_labels)
    labels = [net.labels.index(e["label"]) for e in examples]
    weights = to_device(torch.tensor([e.get("weight", 1.0) for e in examples]), scores.device)
    targets = to_device(torch.tensor(labels), scores.device)
    loss = (F.cross_entropy(scores, targets, reduction="none") * weights).sum()
    if net.training:
        return loss, {}
    return loss, Counter(zip(labels, scores.argmax(1).tolist()))


def text_scores(net, texts):
    """`net.scores` of texts, lists of ids, padded as this net's batches are."""
    texts = [net.without_padding(ids) for ids in texts]
    lengths = torch.tensor([len(ids) for ids in texts])
    ids = padded([{"ids": ids} for ids in texts], "ids", net)  # (B, T)
    return net.scores_of(ids, to_device(lengths, ids.device))


def response_logprobs(net, sequences):
    """(B,) float32: the sum of log p over the targets of each sequence."""
    ids = padded(sequences, "ids", net)  # (B, T)
    places, targets = places_of_targets(sequences, net)  # (N,)
    h = net.hidden(ids).flatten(0, 1).index_select(0, places)  # (N, C): no other logits are made
    log_p = -F.cross_entropy(net.logits(h).float(), targets, reduction="none")
    by_place = torch.zeros(ids.numel(), device=ids.device).scatter(0, places, log_p)
    return by_place.view_as(ids).sum(1)


def both_logprobs(net, pairs):
    """(B,) float32 twice: response_logprobs of the chosen and of the rejected answers."""
    sequences = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    return response_logprobs(net, sequences).chunk(2)  # all in one forward pass


def preference_loss(chosen, rejected, ref_chosen, ref_rejected):
    """(B,) losses of DPO (Rafailov et al. 2023, equation 7), with label smoothing as in cDPO, or of
    IPO (Azar et al. 2023, equation 17), from (B,) log-probabilities; and the two rewards."""
    reward_chosen = beta * (chosen - ref_chosen)
    reward_rejected = beta * (rejected - ref_rejected)
    margin = reward_chosen - reward_rejected
    if dpo_loss == "ipo":
        loss = (margin / beta - 1 / (2 * beta)) ** 2
    else:
        right = -F.logsigmoid(margin)
        wrong_way_round = -F.logsigmoid(-margin)
        loss = right * (1 - label_smoothing) + wrong_way_round * label_smoothing
    return loss, reward_chosen, reward_rejected


def dpo(net, pairs):
    """DPO's loss over pairs, whose log-probabilities under the reference were computed once."""
    chosen, rejected = both_logprobs(net, pairs)
    reference = torch.tensor([pair["reference"] for pair in pairs])  # (B, 2)
    reference = to_device(reference, chosen.device)
    loss, good, bad = preference_loss(chosen, rejected, reference[:, 0], reference[:, 1])
    return loss.sum(), reward_figures(good, bad)


def reward_figures(good, bad):
    """The sums of two answers' rewards (B,), of their difference, and of whose is the larger."""
    return {
        "reward_chosen": good.sum(),
        "reward_rejected": bad.sum(),
        "margin": (good - bad).sum(),
        "accuracy": ((good > bad) + 0.5 * (good == bad)).sum(),  # at dpo's start all are equal
    }


def both_means(net, pairs):
    """(B,) float32 twice: the mean of log p over the targets of the chosen, and of the rejected
    answers."""
    means = []
    for which, log_p in zip(("chosen", "rejected"), both_logprobs(net, pairs)):
        lengths = torch.tensor([count_targets([pair[which]]) for pair in pairs])
        means.append(log_p / to_device(lengths, log_p.device))
    return means


def simpo_loss(chosen, rejected):
    """(B,) losses of SimPO (Meng et al. 2024, equation 6), from (B,) means of log p a token:

    -log sigmoid(beta / |y_w| log p(y_w | x) - beta / |y_l| log p(y_l | x) - gamma)"""
    return -F.logsigmoid(simpo_beta * chosen - simpo_beta * rejected - simpo_gamma)


def simpo(net, pairs):
    """SimPO's loss over pairs, which knows no reference."""
    chosen, rejected = both_means(net, pairs)
    figures = reward_figures(simpo_beta * chosen, simpo_beta * rejected)
    return simpo_loss(chosen, rejected).sum(), figures


def log_odds(log_p):
    """log(p / (1 - p)) by log p (Hong et al. 2024, equation 4)."""
    log_p = log_p.clamp(max=-1e-6)  # of a p of 1 there are no odds
    return log_p - torch.log(-torch.expm1(log_p))


def odds_ratio_loss(chosen, rejected):
    """(B,) L_OR of ORPO (Hong et al. 2024, equation 7), from (B,) means of log p a token:

    -log sigmoid(log(odds(y_w | x) / odds(y_l | x)))"""
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def orpo(net, pairs):
    """ORPO's loss over pairs, L_SFT + lambda L_OR (Hong et al. 2024, equation 6): L_SFT is the mean
    -log p of a chosen answer's tokens."""
    chosen, rejected = both_means(net, pairs)
    loss = -chosen + orpo_weight * odds_ratio_loss(chosen, rejected)
    margin = log_odds(chosen) - log_odds(rejected)
    figures = {"nll": -chosen.sum(), "margin": margin.sum(), "accuracy": (margin > 0).sum()}
    return loss.sum(), figures


def kto_loss(log_ratio, kl, desirable):
    """(B,) losses of KTO (Ethayarajh et al. 2024, equations 7 and 8), lambda_y - v(x, y):

        lambda_D (1 - sigmoid(beta (r - z_0)))  of a desirable answer
        lambda_U (1 - sigmoid(beta (z_0 - r)))  of an undesirable one

    log_ratio: r, log p / p_ref of each answer (B,); kl: z_0; desirable (B,) bool."""
    liked = desirable_weight * (1 - torch.sigmoid(beta * (log_ratio - kl)))
    disliked = undesirable_weight * (1 - torch.sigmoid(beta * (kl - log_ratio)))
    return torch.where(desirable, liked, disliked)


def kto(net, examples):
    """KTO's loss over single answers, whose log-probabilities under the reference were computed
    once, and the step's z_0 by `with_kl`. The margin is that of the mean rewards of both kinds."""
    log_p = response_logprobs(net, examples)
    # An example that fills up a round, and counts for nothing, has met no with_kl.
    columns = [
        [e["reference"][0], e.get("kl", 0.0), e.get("sign", 0.0), e["desirable"]] for e in examples
    ]
    columns = to_device(torch.tensor(columns, dtype=torch.float32), log_p.device)
    reference, kl, sign, desirable = columns.unbind(1)
    log_ratio = log_p - reference
    loss = kto_loss(log_ratio, kl, desirable > 0)
    alike = (log_ratio - kl).abs() < 1e-3  # nats: at the start all are, but for rounding
    above = torch.where(alike, 0.5, (log_ratio > kl).float())
    figures = {
        "kl": kl.sum(),
        "margin": (sign * beta * log_ratio).sum(),
        "accuracy": torch.where(desirable > 0, above, 1 - above).sum(),
    }
    return loss.sum(), figures


def add_rated_reference(learner, examples, cast):
    """Put into each example its prompt with another's answer, and the log-probabilities of both
    answers under the network as it is now."""
    n_ctx = learner.net.config.n_ctx
    add_mismatched(examples, min(seq_len or n_ctx, n_ctx))
    pairs = [{"chosen": e, "rejected": e["mismatched"]} for e in examples]
    add_reference(learner, pairs, cast)
    for example, pair in zip(examples, pairs):
        example["reference"] = pair["reference"]


@torch.no_grad()
def with_kl(learner, examples, make_groups, cast, step_begin):
    """This process's examples in groups, with the divergence from the reference that the loss
    compares them to: z_0, the mean of log p / p_ref of the batch's mismatched pairs, 0 at least
    (Ethayarajh et al. 2024, section 4). No gradient goes through it."""
    net = learner.net
    run = learner.run
    mismatched = []
    for example in share_of(examples, run):
        mismatched.append(example["mismatched"] | {"log_p": example["reference"][1]})
    mismatched.sort(key=n_tokens)
    spare = [examples[0]["mismatched"]] if examples else []
    total = torch.zeros((), device=device_of(net))
    net.eval()  # as the reference was
    for group, counts in rounds(run, micro_batches(mismatched, micro_tokens, net), spare):
        with cast:
            log_p = response_logprobs(net, group)
        if counts:
            total = total + log_p.sum() - sum(e["log_p"] for e in group)
    net.train()
    divide_again(net)
    [total] = run.sum(total)
    kl = max(0.0, total / max(1, len(examples)))
    n_liked = sum(e["desirable"] for e in examples)
    signs = {True: len(examples) / max(1, n_liked)}
    signs[False] = -len(examples) / max(1, len(examples) - n_liked)
    share = share_of(examples, run)
    return make_groups([e | {"kl": kl, "sign": signs[e["desirable"]]} for e in share])


@torch.no_grad()
def add_reference(learner, pairs, cast):
    """Put the log-probabilities of both answers under the network as it is now into each pair. It
    is the reference: with the numbers at hand, no copy of it has to stay in memory."""
    net = learner.net
    run = learner.run
    for number, pair in enumerate(pairs):
        pair["number"] = number
    share = [] if reference_free else sorted(share_of(pairs, run), key=n_tokens)
    of_groups = []  # (2, B) each
    net.eval()  # dropout is for the network that learns
    groups = [] if reference_free else micro_batches(share, micro_tokens, net)
    for group, counts in rounds(run, groups, pairs[:1]):
        with cast:
            both = both_logprobs(net, group)
        if counts:
            of_groups.append(torch.stack(both))
    net.train()
    divide_again(net)
    log_probs = Counter()  # {(number of the pair, which answer): log p}; without a reference all 0
    if of_groups:
        both = torch.cat(of_groups, 1).tolist()  # the one wait for the device
        for pair, chosen, rejected in zip(share, *both):
            log_probs[pair["number"], "chosen"] = chosen
            log_probs[pair["number"], "rejected"] = rejected
    log_probs = sum_figures(run, log_probs)  # each is of one process
    for number, pair in enumerate(pairs):
        pair["reference"] = [log_probs[number, "chosen"], log_probs[number, "rejected"]]


def in_batch_loss(net, examples):
    """InfoNCE of vectors, each anchor's own candidate among all of the batch."""
    return embed_loss(embed_temperature, net, examples)


def join_batch(learner, examples, make_groups, cast, step_begin):
    return with_gradients(embed_temperature, learner, examples, make_groups, cast, step_begin)


def validate_batches(learner, examples, cast):
    return validate_vectors(embed_temperature, batch_size, micro_tokens, learner, examples, cast)


def reward_loss(net, pairs):
    """Bradley and Terry's: -log sigmoid of the difference of the two answers' scores."""
    rows = [pair["chosen"]["ids"] for pair in pairs] + [pair["rejected"]["ids"] for pair in pairs]
    good, bad = text_scores(net, rows).chunk(2)  # (B, 1) each
    margins = good - bad
    loss = -F.logsigmoid(margins).sum()
    return loss, {"margin": margins.sum(), "accuracy": (margins > 0).sum()}


# --------------------------------------------------------------------------------------------------
# Heads, and the figures of a classifier


def add_class_head(net, tok, train, val, say):
    """Give the network a score for each label in training. The validation examples: those whose
    label is among them."""
    counts = Counter(e["label"] for e in train)
    if len(counts) < 2:  # a softmax over one label is 1, whatever the network says
        why = f"the one label of all examples is {[*counts][0]!r:.60}"
        raise UserError(f"data/{dataset}: {why}: expected two labels or more")
    unseen = Counter(e["label"] for e in val if e["label"] not in counts)
    if unseen:
        say(f"val: {unseen.total()} examples left out: labels unseen in training: {[*unseen]}")
    val = [e for e in val if e["label"] in counts]
    set_head(net, sorted(counts), "classify", pooling, tok.pad_id)
    if pooling != "last" and net.config.causal:
        say(
            f"pooling={pooling}: the folder is model_type barelm, for these scripts alone: "
            "transformers' sequence classifiers read the last token, as --pooling=last does"
        )
    if class_weights:
        for e in [*train, *val]:
            e["weight"] = len(train) / (len(counts) * counts[e["label"]])
    return val


def add_pooling(net, tok, train, val, say):
    """Let one state, or the mean, stand for a text."""
    return add_embed_pooling(pooling, net, tok, train, val, say)


def add_reward_head(net, tok, train, val, say):
    """Give the network one score, a reward."""
    net.set_score(["reward"], pad_id=tok.pad_id)
    return val


def accuracies(pairs, size):
    """Accuracy and macro F1 of {(label, guess): count}."""
    n_right = Counter()
    n_labeled = Counter()
    n_guessed = Counter()
    for (label, guess), n in pairs.items():
        n_labeled[label] += n
        n_guessed[guess] += n
        if label == guess:
            n_right[label] += n
    f1 = [2 * n_right[i] / (n_labeled[i] + n_guessed[i]) for i in n_labeled]
    accuracy = n_right.total() / max(1, n_labeled.total())
    return {"accuracy": accuracy, "f1": sum(f1) / max(1, len(f1))}


def confusion(pairs, labels):
    """The table of {(label, guess): count}: a line for each label that there is."""
    numbers = range(len(labels))
    width = max(map(len, labels))
    cell = max(4, len(str(max(pairs.values()))) + 1)
    lines = ["confusion (a row: the label, a column: the guess)"]
    lines.append(" " * (width + 4) + "".join(f"{j:{cell}}" for j in numbers))
    for i in numbers:
        counts = [pairs.get((i, j), 0) for j in numbers]
        if any(counts):
            cells = "".join(f"{n or '.':>{cell}}" for n in counts)
            lines.append(f"{i:3} {labels[i]:{width}}{cells}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The methods: all that sets one apart from another


def total_weight(examples):
    return sum(e.get("weight", 1.0) for e in examples)


def means(sums, size):
    return {name: total / size for name, total in sums.items()}


def no_logits(group):
    return 0


def smoothed_targets(examples):
    return count_targets(examples) if label_smoothing else 0


def pair_targets(pairs):
    return sum(count_targets([pair["chosen"], pair["rejected"]]) for pair in pairs)


@dataclass
class Method:
    """A way of fine-tuning. A new one is a loss and an entry here."""

    data: str  # it reads data/<dataset>/<data>_{train,val}.jsonl
    read_row: Callable  # (row, tok, limit) -> an example
    loss: Callable  # (net, a group of examples) -> (sum of losses, {figure: sum})
    n_logits: Callable = no_logits  # (a group) -> of how many tokens it makes logits, all at once
    size: Callable = total_weight  # (examples) -> what the loss of a whole batch is divided by
    logs: tuple = ()  # the names of the figures that its loss gives in training
    reads_chats: bool = True  # it needs a chat template, and answers end where the template says
    # Whether it learns to say whole responses: they are packed into rows, and tried at the end.
    learns_responses: bool = False
    has_source: bool = False  # for an encoder-decoder, in rows of their own; for no other network
    add_head: Callable | None = None  # (net, tok, train, val, say) -> val: gives the net a score
    prepare: Callable | None = None  # (learner, examples, cast): before the first step
    # (learner, a step's examples of all processes, make_groups, cast, the step's seed) -> groups of
    # this process's, for a loss that is not a sum over examples
    join: Callable | None = None
    has_teacher: bool = False  # (teacher, n_vocab) come before the arguments of its loss
    validate: Callable | None = None  # (learner, examples, cast): in the place of `validate`'s loop
    figures: Callable = means  # (sums over the validation examples, their size) -> {figure: value}
    table: Callable | None = None  # (the same sums, labels) -> a text for the end


METHODS = {
    "sft": Method(
        "sft",
        read_sft,
        sft_loss,
        size=count_targets,
        learns_responses=True,
    ),
    "seq2seq": Method(
        "seq2seq",
        read_seq2seq,
        seq2seq_loss,
        n_logits=smoothed_targets,
        size=count_targets,
        reads_chats=False,
        learns_responses=True,
        has_source=True,
    ),
    "classify": Method(
        "classify",
        read_class,
        classify_loss,
        reads_chats=False,
        add_head=add_class_head,
        figures=accuracies,
        table=confusion,
    ),
    "tag": Method(
        "tag",
        read_tags,
        tag_loss,
        size=count_targets,
        reads_chats=False,
        add_head=add_tag_head,
        figures=tag_figures,
        table=tag_table,
    ),
    "span": Method("span", read_answer, span_loss, reads_chats=False, add_head=add_span_head),
    "embed": Method(
        "embed",
        read_vectors,
        in_batch_loss,
        reads_chats=False,
        add_head=add_pooling,
        join=join_batch,
        validate=validate_batches,
    ),
    "dpo": Method(
        "preference",
        read_pair,
        dpo,
        n_logits=pair_targets,
        logs=("reward_chosen", "reward_rejected", "margin", "accuracy"),
        prepare=add_reference,
    ),
    "simpo": Method(
        "preference",
        read_pair,
        simpo,
        n_logits=pair_targets,
        logs=("reward_chosen", "reward_rejected", "margin", "accuracy"),
    ),
    "orpo": Method(
        "preference",
        read_pair,
        orpo,
        n_logits=pair_targets,
        logs=("nll", "margin", "accuracy"),
    ),
    "kto": Method(
        "kto",
        read_rated,
        kto,
        n_logits=count_targets,
        logs=("kl", "margin", "accuracy"),
        prepare=add_rated_reference,
        join=with_kl,
    ),
    "distill": Method(
        "sft",
        read_sft,
        distill_loss,
        size=count_targets,
        logs=("divergence", "nll"),
        learns_responses=True,
        has_teacher=True,
    ),
    "reward": Method(
        "preference",
        read_scored_pair,
        reward_loss,
        logs=("margin", "accuracy"),
        add_head=add_reward_head,
    ),
}


def method_and_adapt():
    """The name of the method and an AdaptConfig, by the settings. A method may be named by what it
    adapts: lora is an sft with adapt=lora."""
    values = {field.name: globals()[field.name] for field in fields(AdaptConfig)}
    if method in ADAPTS and method != "full":
        if adapt not in ("full", method):
            raise UserError(f"--method={method} --adapt={adapt}: give one of the two")
        return "sft", AdaptConfig(**values | {"adapt": method})
    return method, AdaptConfig(**values)


def check_settings(name, config):
    """Refuse settings that no run can have, before anything is read or written."""
    if name in ("grpo", "rloo", "ppo"):
        print(f"finetune.py: --method={name} is rl.py's: {command_of('rl')}", file=sys.stderr)
        sys.exit(2)
    check_choice("method", name, [*METHODS, *ADAPTS[1:]])
    check_adapt(config, merge)
    check_numbers(globals())
    check_least(globals(), ("check_memorized", "neftune"), 0)
    check_share(globals(), ("label_smoothing", "beta2"))
    if "{source}" not in source_template:
        raise UserError(f"source_template={source_template!r}: expected {{source}} in it")
    if not 0 < beta < math.inf:  # by which IPO divides
        raise UserError(f"beta={beta}: expected more than 0")
    check_choice("init_from", init_from, ("base", "resume", "auto"))
    check_choice("too_long", too_long, ("truncate", "drop"))
    check_choice("pooling", pooling, POOLINGS)
    if not 0 < embed_temperature < math.inf:
        raise UserError(f"embed_temperature={embed_temperature}: expected more than 0")
    check_choice("dpo_loss", dpo_loss, ("sigmoid", "ipo"))
    check_least(globals(), ("simpo_beta", "simpo_gamma", "orpo_weight"), 0)
    check_least(globals(), ("desirable_weight", "undesirable_weight"), 0)
    check_distillation(name, config)
    if template is not None:
        check_templates(name)
    no_prompt = template or weight_decay or METHODS[name].add_head  # decay would move frozen rows
    if config.adapt == "prompt" and no_prompt:
        raise UserError("adapt=prompt: expected a chat method, no template and no weight_decay")


def check_distillation(name, config):
    """Refuse settings of a teacher that no run can have."""
    check_share(globals(), ("distill_beta", "hard_weight", "on_policy"))
    check_least(globals(), ("max_new_tokens",), 1)
    check_choice("teacher_weights", teacher_weights, TEACHER_WEIGHTS)
    if not 0 < distill_temperature < math.inf:
        raise UserError(f"distill_temperature={distill_temperature}: expected more than 0")
    has_teacher = METHODS[name].has_teacher
    if has_teacher and not teacher:
        raise UserError("--method=distill: expected --teacher=FOLDER")
    if teacher and not has_teacher:
        raise UserError(f"--teacher={teacher}: it is of --method=distill, not of {name}")
    if has_teacher and config.adapt == "prompt":
        raise UserError("adapt=prompt: the teacher does not know the new tokens")


def check_templates(name):
    if name not in ("sft", "distill"):
        raise UserError(f"template: it is of --method=sft and distill, not of {name}")
    templates = parse_templates(template)
    if not templates:
        raise UserError("template: an empty list")
    for text in templates:
        check_template(text)


# --------------------------------------------------------------------------------------------------
# The run


def open_run(name, config):
    """This process among the others, over which the method's network may be divided."""
    run = setup(device, threads=threads)
    start_watch(run)
    run.mesh = open_mesh(run, parallel, replicas=replicas)
    check_parallel(run, parallel, batch_size, name, config, merge)
    return run


def open_model(run, task, config):
    """The network and tokenizer to start from, with chat markers where the method wants them."""
    chats = task.reads_chats and template is None
    learner = open_learner(run, model, config, seed, dropout, fast, add_markers=chats)
    check_network(learner.net, task)
    learner.net.checkpoint = checkpoint_blocks
    if deterministic:
        be_deterministic(learner.net)
    if chats:
        stop_at_turns(learner, learns_end=task.learns_responses)
    if template is not None and not learner.tok.eos_ids:
        run.say(f"{model}: its tokenizer has no end token: the model learns no end of an answer")
    return learner


def check_network(net, task):
    """Refuse a network that is none for the method."""
    if not net.config.causal and (task.has_source or task.add_head is None):
        raise UserError(
            f"{model} is an encoder, which sees the tokens that it would learn to say: expected "
            "--method=classify, tag, span, embed or reward"
        )
    if task.add_head is None and net.score is not None:
        why = f"has a head for {net.task}, and says no words: start from what it was made of"
        raise UserError(f"{model} {why}")
    if task.has_source and not net.config.is_seq2seq:
        raise UserError(
            f"{model} is a decoder alone: --method=sft teaches it source and target as a "
            "conversation (--method=seq2seq needs an encoder: n_encoder_layer of train.py)"
        )
    if net.config.is_seq2seq and not task.has_source:
        raise UserError(f"{model} is an encoder-decoder: expected --method=seq2seq")
    if task.has_source and net.start_id is None:
        raise UserError(f"{model}: its config.json has no decoder_start_token_id")


def largest_load(task, net, train, limit):
    """The Load of a batch of the longest examples, of which one process has all."""
    longest = sorted(train, key=n_tokens)[-batch_size:]
    loads = []
    for group in groups_of(task, net, longest, limit):
        rows = sum(map(n_rows, group))
        length = padded_length(net, max(map(longest_row, group)))
        loads.append(Load(rows, length, task.n_logits(group)))
    return max(loads, key=lambda load: load.rows * load.length)


def memory_advice():
    """What to change where memory runs out."""
    length = seq_len or "the model's context"
    _, config = method_and_adapt()
    return (
        f"lower micro_tokens (now {micro_tokens}) or seq_len (now {length}), set checkpoint_blocks "
        f"(now {checkpoint_blocks}), or let less learn: adapt=lora, adapt=qlora (now "
        f"{config.adapt})"
    )


def open_data(learner, task, limit):
    """The examples to train on and to validate with; the network gets the head that they need."""
    tok = learner.tok
    say = learner.run.say
    train = load_examples(dataset, task.data, "train", task.read_row, tok, limit, say)
    val = load_examples(dataset, task.data, "val", task.read_row, tok, limit, say)
    if not train:
        raise UserError(f"data/{dataset}: no example for --method={method}")
    if task.add_head:
        val = task.add_head(learner.net, tok, train, val, say)
    if task.data == "kto":
        n_liked = sum(e["desirable"] for e in train)
        note = balance_note(n_liked, len(train) - n_liked, desirable_weight, undesirable_weight)
        if note:
            say(note)
    return train, val[: eval_examples or None]


def groups_of(task, net, examples, limit):
    """The examples in micro-batches, those of like length together."""
    if task.learns_responses and not task.has_source:
        rows = pack_rows(examples, limit, several=pack)
    else:
        rows = sorted(examples, key=n_tokens)
    return micro_batches(rows, micro_tokens, net)


def groups_of_step(learner, task, examples, limit, cast, step):
    """This process's micro-batches of a step's examples."""
    make_groups = partial(groups_of, task, learner.net, limit=limit)
    if task.join:
        step_begin = step_seed(seed, step, 0)
        return task.join(learner, examples, make_groups, cast, step_begin)
    return make_groups(share_of(examples, learner.run))


@torch.no_grad()
def validate(learner, task, examples, limit, cast):
    """The method's loss and figures over some examples, shared out over all processes: ({figure:
    value}, the sums that they were made of)."""
    if task.validate:
        return task.validate(learner, examples, cast)
    net = learner.net
    run = learner.run
    share = share_of(examples, run)
    sums = Counter(loss=0.0, size=task.size(share))
    groups = groups_of_step(learner, task, examples, limit, cast, 0)
    filling = next(groups_of(task, net, examples[:1], limit))
    net.eval()
    for group, counts in rounds(run, groups, filling):
        with cast:
            loss, figures = task.loss(net, group)
        if counts:
            add_figures(sums, figures | {"loss": loss})
    net.train()
    divide_again(net)
    sums = sum_figures(run, read_figures(sums))
    size = max(sums.pop("size"), 1e-9)
    val_loss = sums.pop("loss") / size
    figures = {f"val_{name}": value for name, value in task.figures(sums, size).items()}
    return {"val_loss": val_loss} | figures, sums


def repeated(net, tok, examples, cast):
    """Of the examples' (first) responses the share that greedy generation reproduces word for word,
    their end included, and the share that it ends at all."""
    prompts = []
    answers = []
    for e in examples:
        if "source" in e:
            prompts.append(e["source"])
            answers.append(e["targets"])
            continue
        first = next(i for i, t in enumerate(e["targets"]) if t != IGNORED)
        end = first
        while end < len(e["targets"]) and e["targets"][end] != IGNORED:
            end += 1
        if first + 1 < net.config.n_ctx:
            prompts.append(e["ids"][: first + 1])
            answers.append(e["targets"][first:end])
    longest = max(map(len, answers), default=0)
    with cast:
        generations = generate_all(net, tok, prompts, longest + 1, temperature=0)
    n_same = 0
    n_ended = 0
    for g, answer in zip(generations, answers):
        text = tok.decode([t for t in answer if t not in tok.special.values()])
        ended = g.finish_reason == "stop"
        n_ended += ended
        n_same += ended and g.text.strip() == text.strip()
    return n_same / max(1, len(answers)), n_ended / max(1, len(answers))


def try_memorized(learner, train, val, cast, row):
    """Say how many responses come back word for word. `row`, the run's last figures, gets them."""
    net = learner.net
    tok = learner.tok
    same, ended = repeated(net, tok, train[:check_memorized], cast)
    row |= {"repeated_training": same, "ended_training": ended}
    text = f"memorization: {same:.0%} of training"
    ends = f"{ended:.0%}"
    if val:
        same, ended = repeated(net, tok, val[:check_memorized], cast)
        row |= {"repeated_validation": same, "ended_validation": ended}
        text += f" and {same:.0%} of validation"
        ends += f" and {ended:.0%}"
    text += f" responses come back word for word and end; {ends} end at all"
    if "val_loss" in row and "loss" in row:
        gap = row["val_loss"] - row["loss"]
        text += f"; validation loss is {gap:+.2f} from the last training loss"
    learner.run.say(text)


# What a resume may change, and what shapes nothing, beside run.py's: see RunFolder.
MAY_CHANGE = (
    *RESUME_MAY_CHANGE,
    "early_stopping",
    "eval_examples",
    "fast",
    "deterministic",
    "lora_dropout",
    "micro_tokens",
    "neftune",
)
IGNORES = (*RESUME_IGNORES, "compile", "merge", "check_memorized", "parallel", "replicas")


def first_epoch(train, n_steps):
    """The training examples that a run of so many steps comes to; None: all of them."""
    n = len(train)
    if n_steps:
        n = min(n, n_steps * batch_size)
    return [train[i] for i in epoch_order(seed, 0, len(train))[:n]]


def teacher_facts():
    """What `teacher` came to: the contents of its folder's weights, and of an adapter's base."""
    if teacher is None:
        return {}
    files = []
    for folder in model_and_bases(teacher):
        files += sorted(folder.glob("*.safetensors"))
    return {"teacher": fingerprint(files)}


def prepared(task, learner, train, val, limit, cast, computing):
    """The method with its teacher, where it has one; examples get what their loss has to know."""
    if task.prepare:
        task.prepare(learner, train, cast)
        task.prepare(learner, val, cast)
    if not task.has_teacher:
        return task
    net = open_teacher(teacher, teacher_weights, learner, limit, computing)
    return replace(task, loss=partial(task.loss, net, learner.tok.n_vocab))


def examples_of_step(learner, task, train, limit, cast, step):
    """The examples of a step, over all processes; of a distillation on-policy some with answers of
    the student's own."""
    examples = batch_of(train, step, batch_size, seed)
    if not task.has_teacher or not on_policy:
        return examples
    own_seed = seed * 1_000_003 + step
    return with_own_answers(learner, examples, on_policy, limit, max_new_tokens, own_seed, cast)


def make_fast(learner, task, train, limit, cast, n_steps, saved):
    """Let the network compute by what is faster, compared on a micro-batch of the first step."""
    net = learner.net
    packed = task.learns_responses and not task.has_source and pack
    lengths = [limit] if packed else map(longest_row, train)
    tokens = batch_size * sum(map(n_tokens, train)) / len(train)  # of a step
    flops = flops_of_run(net, tokens, n_steps, max_minutes)
    why_not = why_not_compile(compile, learner, saved, flops, lengths)
    first = next(groups_of(task, net, batch_of(train, 0, batch_size, seed), limit))
    rows = []
    sources = []
    for example in first:
        if "chosen" in example:
            rows += [example["chosen"]["ids"], example["rejected"]["ids"]]
        elif "texts" in example:
            rows += example["texts"]
        elif "source" in example:
            rows.append(example["targets"])
            sources.append(example["source"])
        else:
            rows.append(example["ids"])
    prepare_network(learner, rows, cast, packed, why_not, sources)


def look_on(learner, task, val, limit, cast, folder, step):
    """Validate, tell and log it: what `validate` gives."""
    figures, sums = validate(learner, task, val, limit, cast)
    folder.record(log_row({"step": step} | figures))
    learner.run.say(f"step {step}: {words(figures)}")
    return figures, sums


def finish(learner, task, folder, state, row, sums, train, val, cast):
    """What is said and written at the end. row: the last step's figures, and those of its
    validation; sums: what these were made of."""
    run = learner.run
    say_wrote(folder, row, state)
    if task.table and sums:
        run.say(task.table(sums, learner.net.labels))
    if task.learns_responses and check_memorized:
        with whole_weights(learner.net):
            if run.is_main:
                try_memorized(learner, train, val, cast, row)
    check_equal_weights(run, learner.params().values())
    finish_adapter(learner, Path(out_dir), state.step, merge)
    if run.is_main:
        prompt = shortest_prompt(learner.tok, val or train) if template is not None else ""
        name, _ = method_and_adapt()
        commands = after_tuning(name, out_dir, dataset, model, prompt, source_template)
        say_end(folder, row, commands)
    run.wait()


def shortest_prompt(tok, examples):
    """How a plain record begins that the model is to go on with, to try it."""
    prompts = []
    for example in examples:
        first = next(i for i, target in enumerate(example["targets"]) if target != IGNORED)
        ids = [id for id in example["ids"][: first + 1] if id not in tok.special.values()]
        prompts.append(tok.decode(ids))
    return min(prompts, key=len)


def check_sources():
    """Refuse to write into a folder that is read: the model's, the teacher's."""
    refuse_source(out_dir, model)
    if teacher is not None:
        refuse_source(out_dir, teacher)


def main():
    name, config = method_and_adapt()
    check_settings(name, config)
    task = METHODS[name]
    run = open_run(name, config)
    chosen = settings(globals()) | {"method": name, "adapt": config.adapt}
    folder = RunFolder(out_dir, run, chosen, defaults(globals()), MAY_CHANGE, IGNORES)
    start = choose_start(out_dir, init_from, overwrite, fresh="base")
    check_sources()
    saved = load_state(folder.path) if start == "resume" else None

    # the network and the examples
    learner = open_model(run, task, config)
    net = learner.net
    limit = min(seq_len or net.config.n_ctx, net.config.n_ctx)
    train, val = open_data(learner, task, limit)
    n_steps = count_steps(len(train), batch_size, max_steps, max_epochs)
    computing, reason = choose_dtype(run.device, dtype, net.config.n_embd)
    cast = autocast(run.device, computing)
    facts = facts_of(run, dataset, task.data, model, computing) | teacher_facts()
    if saved:
        folder.check_resume(saved, facts)
    n_base = n_params(net)
    choose_weights(net, config, reads_head=net.score is None and net.task != "embed")
    place(learner)
    data = f"{len(train):,} examples to train on, {len(val):,} to validate"
    batch = f"{batch_size} examples"
    say_plan(learner, n_base, n_steps, max_minutes, batch, data, (computing, reason), warmup_steps)
    with trial(learner):
        say_memory(learner, largest_load(task, net, train, limit), computing, optimizer)
        make_fast(learner, task, train, limit, cast, n_steps, saved)
    divide(learner, computing)
    facts["compiled"] = learner.compiled
    task = prepared(task, learner, first_epoch(train, n_steps), val, limit, cast, computing)

    # the optimizer, and where the run stands
    optimizers = make_optimizers(net, optimizer, learning_rate, weight_decay, layer_decay, beta2)
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
    sums = {}  # of the last validation
    if val and state.first_verdict is None:
        state.first_verdict, sums = look_on(learner, task, val, limit, cast, folder, 0)

    loss_of = partial(task.loss, net)
    progress = state.progress(horizon)
    time_left = TimeLeft(progress)
    stopped = False
    early = False
    while progress < 1 and not stopped and not early:
        step_begin = time.monotonic()
        torch.manual_seed(step_seed(seed, state.step, run.rank))
        updater.set_lr(state.lr_scale(schedule, horizon))
        examples = examples_of_step(learner, task, train, limit, cast, state.step)
        groups = groups_of_step(learner, task, examples, limit, cast, state.step)
        size = task.size(examples)
        with saved_on_failure(learner, updater, state, folder):
            figures, norm = update(
                updater, groups, loss_of, size, task.logs, cast, state.step, warmup_steps
            )
            updater.check_bad_steps(learning_rate, warmup_steps)
        stopped = state.advance(run, clock_begin, signals)
        progress = state.progress(horizon)
        row = step_row(state, figures, learning_rate * updater.lr_scale, norm, step_begin)
        folder.record(log_row(row))
        show_step(run, row, n_steps, time_left(progress))
        if val and (state.step % eval_every == 0 or progress >= 1):
            figures, sums = look_on(learner, task, val, limit, cast, folder, state.step)
            row |= figures
            if state.is_best(figures["val_loss"]):
                save_weights(learner, folder.path / "best", state.step)
            early = state.stops_early(early_stopping, run)
        if state.step % save_every == 0 or progress >= 1 or stopped or early:
            save_run(learner, updater, state, folder)
    run.say("")
    if stopped and progress < 1 and not early:
        return stop(folder, row, state, signals)
    finish(learner, task, folder, state, row, sums, train, val, cast)
    return 0


if __name__ == "__main__":
    with locked_folder(out_dir), lost_process(), advice_on_memory(memory_advice):
        status = main()
    end_process(status)
