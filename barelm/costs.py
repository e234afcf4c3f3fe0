"""What a fine-tuning takes, by arithmetic: weights that learn, memory, FLOPs.

The settings `s` of these functions are finetune.py's or rl.py's keys, by their names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from barelm.adapters import adapted_layers
from barelm.fast import head_rows
from barelm.layouts import cached_numbers
from barelm.optim import (
    MOMENTS,
    attention_products,
    flops_per_token,
    memory_estimate,
    n_params,
)
from barelm.run import UserError

if TYPE_CHECKING:
    from types import SimpleNamespace

    from model import GPT

# Of a GPU's memory, in GB/s, from its maker's data sheet: a token of a roll-out reads all weights.
MEMORY_GBS = {
    "B200": 8000,
    "H200": 4800,
    "H100 PCIe": 2000,
    "H100": 3350,
    "A100": 2039,
    "A10G": 600,
    "L40S": 864,
    "L4": 300,
    "RTX 4090": 1008,
    "RTX 3090": 936,
}
# Of a QLoRA weight: a code of 4 bits; a scale of 8 for 64 weights, and one of 32 for 256 scales.
NF4_BYTES = (4 + 8 / 64 + 32 / 64 / 256) / 8
# Of a teacher's weight, by finetune.py's `teacher_weights`.
TEACHER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}
PAIRED = ("dpo", "simpo", "orpo", "reward")  # methods of a chosen and a rejected answer


def linear_layers(net: GPT) -> list[nn.Linear]:
    """The matrices of the blocks."""
    names = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    return [net.get_submodule(name) for name in names if ".layers." in name]


def learned_weights(net: GPT, s: SimpleNamespace) -> tuple[int, int]:
    """(how many weights learn, how many of them are added ones)."""
    c = net.config
    if s.adapt in ("lora", "qlora"):
        names = s.lora_targets.split(",")
        layers = [m for name, m in net.named_modules() if name.rpartition(".")[2] in names]
        if not layers or not all(isinstance(m, nn.Linear) for m in layers):
            raise UserError(f"lora_targets={s.lora_targets}: expected names of linear layers")
        added = sum(s.lora_rank * (m.in_features + m.out_features) for m in layers)
        return added, added
    if s.adapt == "adapter":
        bottleneck = 2 * c.n_embd * s.adapter_size + s.adapter_size + c.n_embd  # and its biases
        added = len(adapted_layers(net)) * bottleneck  # behind attention and behind the MLP
        return added, added
    if s.adapt == "prompt":  # rows of the embedding, all of which has gradients
        return c.vocab_size * c.n_embd, 0
    if s.train_last:
        last = net.model.layers[-s.train_last :]
        return sum(n_params(block) for block in last), 0
    return n_params(net), 0


def finetune_memory(
    net: GPT, s: SimpleNamespace, length: int, rollouts: int, teacher: GPT | None = None
) -> dict:
    """{what: bytes on each device} of a fine-tuning whose sequences have `length` tokens, which
    holds so many roll-outs at once. teacher: a distillation's."""
    c = net.config
    learn, added = learned_weights(net, s)
    weights = 4 * n_params(net)
    if s.adapt == "qlora":
        sizes = [m.weight.numel() for m in linear_layers(net)]
        unpacked = 4 * max(sizes)  # the one that is used at the moment
        weights += sum(sizes) * (NF4_BYTES - 4) + unpacked
    moments = MOMENTS.get(s.optimizer, 2)
    full_length = min(s.seq_len or c.n_ctx, c.n_ctx)
    device_batch_size = max(1, s.micro_tokens // full_length)
    _, activations = memory_estimate(
        c,
        0,
        device_batch_size,
        full_length,
        torch.bfloat16,
        s.checkpoint_blocks,
        device_type="cuda",
    )
    head = 0
    if s.method not in ("classify", "reward"):  # which do not read it
        # Logits, their float32 copy and its gradient; the gradient of the head's matrix.
        at_once = head_rows("cuda", torch.bfloat16, c.vocab_size)
        rows = min(device_batch_size * full_length, at_once)
        head = c.vocab_size * (10 * rows + 4 * c.n_embd)
    memory = {
        "weights": weights,
        "what learns": 4 * (added + learn * (1 + moments)),  # its gradients and moments
        "activations and head": activations + head,
    }
    if teacher is not None:
        memory["teacher"] = n_params(teacher) * TEACHER_BYTES[s.teacher_weights]
    if rollouts:
        row = 2 * cached_numbers(c, math.ceil(length))  # bytes, in bfloat16
        memory["roll-outs"] = rollouts * row
        if s.kl_weight:
            memory["reference"] = weights
    return memory


def token_flops(net: GPT, s: SimpleNamespace, length: int) -> tuple[float, float]:
    """(FLOPs of a token forward, FLOPs of a token in an update: forward, backward and what is added
    or computed twice). Frozen weights have no gradients: their backward pass costs as much as the
    forward one, not twice."""
    c = net.config
    learn, _ = learned_weights(net, s)
    forward = flops_per_token(c, length, backward=False)
    if s.method in ("classify", "reward"):  # the head is not read
        forward -= 2 * c.n_embd * c.vocab_size
    backward = 2 * forward
    if s.adapt != "full":
        # Attention's products are of activations alone: both of their sides have gradients.
        products = sum(attention_products(c, pattern, length) for pattern in c.patterns)
        backward = forward + 2 * products
    if s.train_last:
        backward *= min(1, s.train_last / c.n_layer)
    update = forward + backward
    if s.adapt in ("lora", "qlora", "adapter"):
        update += 6 * learn
    if s.checkpoint_blocks:
        update += forward
    return forward, update


def finetune_work(
    net: GPT,
    s: SimpleNamespace,
    count: int,
    length: int,
    steps: int,
    teacher: GPT | None = None,
) -> dict[str, float]:
    """{what: FLOPs} of a fine-tuning on `count` examples of `length` tokens, as finetune.py and
    rl.py do it, over all devices."""
    forward, update = token_flops(net, s, length)
    seen = steps * s.batch_size * length
    if s.method in ("grpo", "rloo", "ppo"):
        if s.method != "ppo":
            seen *= s.group_size
        looks = 2 if s.kl_weight else 1  # by the policy of now, and by the reference
        return {
            "roll-outs": seen * forward,
            "log-probabilities": looks * seen * forward,
            "training": s.rl_epochs * seen * update,
        }
    answers = 2 if s.method in PAIRED else 1
    work = {"training": answers * seen * update}
    has_reference = s.method == "kto" or (s.method == "dpo" and not s.reference_free)
    if has_reference:  # both answers of each pair once, before the first step
        pairs = min(steps * s.batch_size, count)
        work["the reference"] = 2 * pairs * length * forward
    if s.method == "kto":  # of mismatched pairs, in each step
        work["the divergence"] = seen * forward
    if teacher is not None:
        work["the teacher"] = seen * flops_per_token(teacher.config, length, backward=False)
        if s.on_policy:
            work["own answers"] = s.on_policy * seen * forward
    return work
