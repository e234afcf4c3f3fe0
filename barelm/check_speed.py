"""How near training and decoding come to what this machine can do: told, not judged."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING

import torch

from barelm.check_rows import Finding, endless_tokenizer, random_ids
from barelm.compiled import try_compile
from barelm.costs import MEMORY_GBS
from barelm.optim import flops_per_token, make_optimizer, peak_flops
from barelm.quantized import quantize_weights
from barelm.timing import Bench, product_size, weight_bytes
from model import GPT, GPTConfig, generate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from barelm.check_rows import Place

PROMPT = 32  # tokens before those whose decoding is timed
DECODED = 32


def check_speed(place: Place) -> Iterator[Finding]:
    """The machine's own ceilings, measured, and the shares of them that a training step of
    bench.py's shape and its decoding at batch 1 reach; of a known GPU those of the data sheet."""
    bench = Bench(place.run(), place.dtype, seconds=place.seconds)
    flops_limit = product_rate(bench)
    bytes_limit = read_rate(bench)
    yield Finding(f"products, {place.dtype_name}", flops_limit / 1e9, unit="GFLOP/s")
    yield Finding("memory, read", bytes_limit / 1e9, unit="GB/s")
    yield training_speed(place, bench, flops_limit)
    for kind in (place.dtype_name, "int8", "int4"):
        yield decoding_speed(place, bench, kind, bytes_limit)


def fastest(bench: Bench, call: Callable) -> float:
    """Seconds of the quickest of several calls."""
    return min(bench.measure({"call": call})["call"])


def product_rate(bench: Bench) -> float:
    """FLOP/s of square matrix products in the bench's dtype."""
    n = product_size(bench, bench.dtype)
    a = torch.randn(n, n, device=bench.device, dtype=bench.dtype)
    return 2 * n**3 / fastest(bench, partial(torch.matmul, a, a))


def read_rate(bench: Bench) -> float:
    """Bytes a second of reading more memory than caches hold."""
    a = torch.ones(1 << 27, device=bench.device)  # 512 MiB
    return a.nbytes / fastest(bench, a.sum)


def training_speed(place: Place, bench: Bench, flops_limit: float) -> Finding:
    """The Finding on a training step: forward, backward, clipping and AdamW."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(n_ctx=place.seq_len, **place.shape)).to(place.device).train()
    rows = max(1, place.tokens // place.seq_len)
    windows = random_ids(rows, place.seq_len + 1, n_vocab=net.config.vocab_size).to(place.device)
    batch = (windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
    words = "eager"
    if place.compile:
        arguments = {"ids": batch[0], "targets": batch[1]}
        is_compiled, why = try_compile(net, place.run(), arguments, place.cast())
        words = "compiled" if is_compiled else f"eager: compile is {why}"
    optimizers = make_optimizer(net, "adamw", lr=1e-5)

    def step():
        net.zero_grad()
        with place.cast():
            loss, _ = net(*batch)
        (loss / batch[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    n_tokens = batch[0].numel()
    seconds = statistics.median(bench.measure({"step": step})["step"])
    rate = n_tokens * flops_per_token(net.config, place.seq_len) / seconds
    words = f"{n_tokens / seconds:,.0f} tokens/s, {rate / 1e9:,.0f} GFLOP/s, {words}"
    peak = peak_flops(place.device)
    if peak:
        words += f"; MFU by the data sheet {100 * rate / peak:.1f} %"
    share = 100 * rate / flops_limit
    return Finding("training step, of the products' rate", share, words=words, unit="%")


def decoding_speed(place: Place, bench: Bench, kind: str, bytes_limit: float) -> Finding:
    """The Finding on greedy decoding at batch 1 with weights of a kind: every token reads them all
    once. The time of the prompt and the first token is taken off."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(n_ctx=max(place.seq_len, PROMPT + DECODED), **place.shape))
    net = net.to(place.device)
    if kind in ("int8", "int4"):
        net = quantize_weights(net, kind)
    else:
        net = net.to(place.dtype)
    n_vocab = min(256, net.config.vocab_size)
    prompts = random_ids(1, PROMPT, n_vocab=n_vocab).tolist()
    decode = partial(generate, net, endless_tokenizer(), prompts, temperature=0)
    calls = {n: partial(decode, max_new_tokens=n) for n in (1, DECODED)}
    times = {n: statistics.median(samples) for n, samples in bench.measure(calls).items()}
    seconds = (times[DECODED] - times[1]) / (DECODED - 1)
    rate = weight_bytes(net) / seconds
    words = f"{1 / seconds:,.1f} tokens/s, {rate / 1e9:.2f} GB/s of weights"
    peak = memory_rate(place)
    if peak:
        words += f"; MBU by the data sheet {100 * rate / peak:.1f} %"
    share = 100 * rate / bytes_limit
    return Finding(f"decoding, {kind}, of the memory's rate", share, words=words, unit="%")


def memory_rate(place: Place) -> float | None:
    """Bytes a second of a GPU's memory by its data sheet, or None for an unknown device."""
    if not place.is_cuda:
        return None
    name = torch.cuda.get_device_name(place.device)
    for part, gigabytes in MEMORY_GBS.items():
        if part in name:
            return 1e9 * gigabytes
    return None
