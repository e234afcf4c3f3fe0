"""Whether a token's bits depend on what else is computed: for `bench.py --check`, and for tests."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from barelm.invariant import be_deterministic
from model import GPT, GPTConfig, KVCache, generate, logprobs

if TYPE_CHECKING:
    from torch import Tensor

SHAPE = dict(vocab_size=512, n_ctx=256, n_layer=2, n_head=6, n_kv_head=2, n_embd=192)
N_NEW = 16  # tokens of an answer


class Ids:
    """As much of a tokenizer as `generate` needs for prompts of ids."""

    eos_ids = ()

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def token_bytes(self, id: int) -> bytes:
        return b" "


def batch_invariance(device: torch.device, dtype: torch.dtype = torch.float32,
                     deterministic: bool = True, n_rows: int = 64,
                     **shape: Any) -> dict:  # fmt: skip
    """How many of the answers of a small network, drawn for n_rows prompts of many lengths at once,
    have a token or a log-probability of other bits where its row is alone, where the trainer's
    forward pass computes it, or where it is read in chunks: {"answers": n_rows, "alone": of every
    eighth, "trainer": of all, "chunks": of every eighth}; so 0, 0, 0 if they do not depend on it.

    shape: fields of GPTConfig. dtype: bfloat16 and float16 by autocast, as in rl.py."""
    device = torch.device(device)
    net, prompts = net_and_prompts(device, n_rows, shape)
    if deterministic:
        be_deterministic(net)
    tok = Ids(net.config.vocab_size)
    greedy = dict(max_new_tokens=N_NEW, temperature=0)
    half = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    figures = dict(answers=n_rows, alone=0, trainer=0, chunks=0)
    with half:
        answers = generate(net, tok, prompts, **greedy)
        read = trainer_logprobs(net, prompts, answers)
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            figures["trainer"] += read[i] != answer.logprobs
            if i % 8 == 0:
                [alone] = generate(net, tok, [prompt], **greedy)
                figures["alone"] += alone != answer
                figures["chunks"] += chunk_logprobs(net, prompt, answer) != answer.logprobs
    return figures


def net_and_prompts(device: torch.device, n_rows: int, shape: dict) -> tuple:
    """A network that prefers some tokens to others, and prompts of 1 token to the context."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = GPT(GPTConfig(**SHAPE | shape))
        for p in net.parameters():
            if p.ndim > 1:
                p.data.mul_(4)
        lengths = torch.randint(1, net.config.n_ctx - N_NEW, (n_rows,)).tolist()
        prompts = [torch.randint(net.config.vocab_size, (n,)).tolist() for n in lengths]
    return net.to(device), prompts


def trainer_logprobs(
    net: GPT, prompts: list[list[int]], answers: list[list[int]]
) -> list[list[float]]:
    """The log-probabilities of the answers, lists of floats, in a forward pass for gradients."""
    device = net.model.embed_tokens.weight.device
    ids = []
    targets = []
    for prompt, answer in zip(prompts, answers):
        ids.append(torch.tensor(prompt + answer.ids[:-1]))
        targets.append(torch.tensor([-100] * (len(prompt) - 1) + answer.ids))
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (B, T)
    targets = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    logp = logprobs(net.train(), ids.to(device), targets.to(device))
    return [row[wanted].tolist() for row, wanted in zip(logp.cpu(), targets != -100)]


@torch.no_grad()
def chunk_logprobs(net: GPT, prompt: list[int], answer: list[int], size: int = 37) -> Tensor:
    """The log-probabilities of an answer that is read behind its prompt, some tokens at a time."""
    table = net.model.embed_tokens.weight
    ids = torch.tensor([prompt + answer.ids], device=table.device)  # (1, T)
    whole = net.deterministic
    cache = KVCache(net.config, 1, ids.shape[1], table.device, table.dtype, whole=whole)
    chunks = [net.hidden(part, cache=cache) for part in ids[:, :-1].split(size, 1)]
    states = torch.cat(chunks, 1)[:, len(prompt) - 1 :]
    logp = net.logits(states).float().log_softmax(-1)  # (1, n, V)
    return logp.gather(2, ids[:, len(prompt) :, None]).flatten().tolist()
