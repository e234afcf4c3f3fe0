"""How fast this machine can be, and how near to it barelm comes.

    python bench.py                                  # about three minutes on two CPU cores
    python bench.py config/small.py --only=model     # the shape of a recipe, one part
    python bench.py --compare --nanogpt=../nanoGPT   # others beside ours, in the same run
    python bench.py --profile                        # bench_trace.json, of three training steps
    python bench.py config/gpt2.py --serve --compare # a server of this shape, loaded by clients

Measures the ceilings first, then each part against them. What is compared is timed in turn, A B A
B, so that all else on the machine slows all alike. The last line is a JSON object with every row.
"""

from config import configure, settings

# the network, by train.py's names
n_layer = 6  # blocks
n_head = 6  # attention heads
n_kv_head = 0  # heads of keys and values (grouped-query attention); 0: n_head
n_embd = 384  # width
head_dim = 0  # width of a head; 0: n_embd / n_head
n_hidden = 0  # width of the MLP; 0: 8/3 n_embd for swiglu, else 4 n_embd
norm = "rms"  # rms or layer
norm_place = "pre"  # pre, post or both
norm_eps = 1e-6  # added to the variance
qk_norm = True  # normalize queries and keys
qkv_bias = False  # biases in q, k and v alone
bias = False  # biases everywhere
pos = "rope"  # rope, learned, sinusoidal or none
mlp = "swiglu"  # swiglu, gelu, relu or relu2
tie = True  # share the embedding with the head
vocab_size = 4096  # ids that the network knows

# the work
seq_len = 256  # tokens of a window
tokens = 4096  # tokens of one step: tokens / seq_len windows
optimizer = "muon"  # of the whole step: muon or adamw
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto, float32, bfloat16, float16
compile: bool | None = None  # torch.compile; none: where train.py would
seed = 0  # of the weights and the inputs

# what to measure, and how long
only = ""  # parts to run, as in --only=attention,model; empty: all
seconds = 2.0  # time of the rows that are timed in turn, if five rounds fit it
compare = False  # also time transformers, tokenizers, tiktoken; with --serve its generate
nanogpt: str | None = None  # with --compare: a checkout of nanoGPT, to time its step too
profile = False  # write bench_trace.json, and nothing else
serve: bool | str = False  # only load a server: of a random network, of =FOLDER, or at =http://...
clients = "1,4,16,64"  # with --serve: how many ask at once, a row of the table each

if __name__ == "__main__":
    configure(globals())

import contextlib
import ctypes
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from barelm import checkpoint
from barelm.bpe import bpe_tokenizer, count_pieces, train_bpe
from barelm.checkpoint import save
from barelm.compiled import try_compile
from barelm.dedup import minhash, word_hashes
from barelm.families import FAMILIES, family
from barelm.fast import cross_entropy_sum, quantize_weights
from barelm.optim import flops_per_token, make_optimizer, n_params
from barelm.run import UserError, autocast, choose_dtype, duration, memory_used, setup
from barelm.sources import library_files

# No script imports another; this one opens them where it times them: a copy would time the copy.
stage = importlib.import_module

SHORTEST = 0.002  # seconds: a sample of a quicker call is the mean of several
LONGEST = 15.0  # seconds: rows that take longer make do with three rounds, or one
PRODUCT = 0.5  # seconds: a matrix product for a ceiling takes less, or a smaller one is timed
# The work of a call.
UNITS = {"flops": (1e9, "GFLOP/s"), "bytes": (1e9, "GB/s"), "text_bytes": (1e6, "MB/s")}
UNITS |= {"tokens": (1, "tokens/s")}
PROMPT, ANSWER = (32, 96), 64  # tokens that a client sends, at least and at most, and gets
LOAD = ["clients", "tokens_per_s", "ratio", "first_p50", "first_p95", "between_p50", "between_p95"]
ROWS, CEILINGS = [], {}  # all that was measured; {"float32": FLOP/s, "read": byte/s, ...}


def measure(calls, seconds, sync=lambda: None, clock=time.perf_counter):
    """Time the functions of {name: function} in turn: {name: [seconds of a call, one a round]}."""
    times, repeats = {name: [] for name in calls}, {}

    def timed(call, n):
        start = clock()
        for _ in range(n):
            call()
        sync()
        return clock() - start

    for name, call in calls.items():  # which also warms up
        repeats[name] = math.ceil(SHORTEST / max(timed(call, 1), 1e-6))
    begun, n = clock(), 0
    spent = lambda: clock() - begun

    def enough():
        if n < 3:  # one round is enough of what takes a minute
            return n > 0 and spent() >= 3 * LONGEST
        return spent() >= LONGEST or (n >= 5 and spent() >= seconds)

    while not enough():
        n += 1
        for name, call in calls.items():
            times[name].append(timed(call, repeats[name]) / repeats[name])
    return times


def keep(out):
    ROWS.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in out.items()})


def row(part, name, times, ceiling=None, peak=None, **facts):
    """Keep and print a measurement. Those of the facts that UNITS names are the work of one call;
    the first of them is what the ceiling of this name is for."""
    low, mid, high = np.percentile(times, [10, 50, 90]).tolist()
    out = {"part": part, "name": name, "samples": len(times)} | facts
    out |= {"ms": 1e3 * mid, "ms_p10": 1e3 * low, "ms_p90": 1e3 * high}
    rates, told, share = {u: facts[u] / mid for u in UNITS if u in facts}, [], ""
    for unit, rate in rates.items():
        size, name_of_unit = UNITS[unit]
        told.append(f"{rate / size:,.{int(size > 1)}f} {name_of_unit}")
        out[f"{unit}_per_s"] = rate
    if ceiling in CEILINGS:
        rate = next(iter(rates.values()))
        raise_ceiling(ceiling, rate)
        out |= {"ceiling": ceiling, "percent": 100 * rate / CEILINGS[ceiling]}
        share = f"{out['percent']:.1f} % of {ceiling}"
    if peak is not None:
        out["peak_bytes"] = peak
        told.append(f"peak {peak / 2**20:,.0f} MiB")
    keep(out)
    line = f"  {name:<33} {1e3 * mid:>10.3f}  {f'{1e3 * low:.3f} to {1e3 * high:.3f}':<21}"
    line += f" {''.join(told[:1]):>15}  {share:<18}  {'  '.join(told[1:])}"
    print(line.rstrip(), flush=True)


def table(run, part, calls, ceiling=None, peaks=None, factors=False, **facts):
    """Measure calls of equal work; `factors`: say how each compares with the first."""
    times = measure(calls, seconds, run.sync)
    for name in times:
        row(part, name, times[name], ceiling, (peaks or {}).get(name), **facts)
    medians = [(name, np.median(t)) for name, t in times.items()]
    for name, b in medians[1:] if factors else ():
        first, a = medians[0]
        ratio = f"{a / b:.2f} times as fast" if b < a else f"{b / a:.2f} times as slow"
        print(f"  -> {name} is {ratio} as {first}")


def title(text, note=""):
    print(f"\n{text}" + (f"\n  ({note})" if note else ""))
    print(f"  {'':<33} {'ms, median':>10}  {'10 % to 90 %':<21} {'rate':>15}  of the ceiling")


@cache  # the same reason is told once
def skip(name, why):
    print(f"  {name}: left out: {(why.strip() or 'it failed').splitlines()[0]}")


def working(calls):
    """Those of {name: function} that run here; of each other one line says why it does not."""
    for name, call in list(calls.items()):
        try:
            call()
        except RuntimeError as error:
            skip(name, str(error))
            del calls[name]
    return calls


def peak_memory(call, place):
    """The most bytes that are held while call() runs, over those held before."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    with contextlib.suppress(OSError, AttributeError):  # Linux; elsewhere it is the growth alone
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would serve unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before = memory_used(place)
    call()
    return memory_used(place) - before


def product_size(run, kind):
    """How large a square matrix of this dtype can be whose product takes less than PRODUCT seconds:
    a CPU that has no such products needs minutes for what another does in 20 ms."""
    n, largest, spent = 128, 8192 if run.cuda else 2048, 0.0
    while n < largest:
        a = torch.randn(n, n, device=run.device, dtype=kind)
        a @ a  # warm-up
        run.sync()
        begun = time.perf_counter()
        a @ a
        run.sync()
        spent = time.perf_counter() - begun
        if 8 * spent > PRODUCT:  # what twice the size would take
            break
        n *= 2
    return n


def ceilings(run):
    """What no program on this machine can beat by much: the best that was seen."""
    size = 1 << 28 if run.cuda else 1 << 27
    title(f"ceilings: square matrix products, and {4 * size / 2**20:,.0f} MiB of memory")
    for name in ("float32", "bfloat16", "float16")[: 3 if run.cuda else 2]:
        n = product_size(run, getattr(torch, name))
        a = torch.randn(n, n, device=run.device, dtype=getattr(torch, name))
        table(run, "ceilings", {name: lambda: a @ a}, flops=2 * n**3, size=n)
    a, b = (torch.randn(size, device=run.device) for _ in range(2))
    table(run, "ceilings", {"read": a.sum}, bytes=a.nbytes)
    both = {"copy": lambda: b.copy_(a), "update": lambda: a.mul_(0.999)}
    table(run, "ceilings", both, bytes=2 * a.nbytes)  # read and written
    for r in ROWS:
        best = 1e3 / r["ms_p10"]  # calls a second
        CEILINGS[r["name"]] = best * r.get("flops", r.get("bytes"))


def raise_ceiling(name, rate):
    """A row that beats its ceiling is the new one: the products timed above were not the best."""
    if rate > CEILINGS[name]:
        print(f"  -> {name}: {rate / CEILINGS[name]:.2f} of its ceiling, which it now is")
        CEILINGS[name] = rate


def naive_attention(q, k, v):
    """Causal softmax(q k^T / sqrt(D)) v with the whole square in float32, as a textbook has it."""
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1).to(q.dtype) @ v


def fused_attention(q, k, v, backend=None):
    """torch's kernel: its own choice, or one backend."""
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def attention(run):
    """model.attend beside what torch has."""
    lengths = (1024, 4096, 16384) if run.cuda else (128, 512, 2048)
    H, D = run.config.n_head, run.config.head_dim
    attend = model.Operations(fast=True).attend
    few = H // 3 if H % 3 == 0 else 1
    ways = {"naive": (naive_attention, H), "fused, torch's choice": (fused_attention, H)}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        one = partial(fused_attention, backend=getattr(SDPBackend, name))
        ways[f"fused, {name.split('_')[0].lower()}"] = (one, H)
    ways |= {"ours (model.attend)": (attend, H)}
    grouped = {f"fused, n_kv_head {few}": fused_attention, f"ours, n_kv_head {few}": attend}
    ways |= {name: (way, few) for name, way in grouped.items()}
    title(f"attention: {H} heads of {D}, {run.dtype}", "FLOPs: half the square; backward: x 2")
    for T in lengths:
        B = max(tokens, lengths[-1]) // T
        make = lambda heads: torch.randn(B, heads, T, D, device=run.device, dtype=run.kind)
        q, dy = make(H).requires_grad_(), make(H)
        kv = {n: (make(n).requires_grad_(), make(n).requires_grad_()) for n in (H, few)}
        forward = torch.no_grad()(lambda attend, heads: attend(q, *kv[heads]))
        both = lambda attend, heads: torch.autograd.grad(attend(q, *kv[heads]), (q, *kv[heads]), dy)
        for f, label, cost in ((forward, "forward", 2), (both, "forward+backward", 6)):
            print(f"  {B} x {T} tokens, {label}")
            calls = working({name: partial(f, *way) for name, way in ways.items()})
            facts = dict(direction=label, rows=B, length=T, heads=H, head_dim=D, tokens=B * T)
            table(run, "attention", calls, run.dtype, flops=cost * B * H * T * T * D, **facts)


def build(run, n_ctx=0):
    """A random network of the shape that the keys name."""
    torch.manual_seed(seed)
    shape = {k: globals()[k] for k in model.GPTConfig.__dataclass_fields__ if k in globals()}
    return model.GPT(model.GPTConfig(n_ctx=n_ctx or seq_len, **shape)).to(run.device)


def whole_step(loss, net, optimizers):
    """A step as train.py makes it (without its GradScaler, in float16): loss() is a scalar."""
    net.zero_grad(set_to_none=True)
    loss().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    [o.step() for o in optimizers]


def train_step(run):
    """The model: forward, backward, optimizers, whole steps; eager and compiled."""
    title(f"model: windows of {seq_len} tokens, {run.dtype}", "peak: over what was held before")
    net = build(run)
    batch = torch.randint(vocab_size, (2, max(1, tokens // seq_len), seq_len), device=run.device)
    n, params, calls = batch[0].numel(), n_params(net), {}  # batch: ids and targets
    loss = run.cast(lambda network: network(*batch)[0] / n)
    begun = time.perf_counter()
    body, told = net, "off, as asked"
    if compile is not False:
        body, told = try_compile(net, run, batch, run.cast)
    print(f"  {n:,} tokens, {params:,} parameters, compile: {told}")
    networks = {"eager": (net, model.call_block)}
    if told.startswith("on"):
        networks["compiled"] = (body, net.train_block)
        row("model", "compilation, for training", [time.perf_counter() - begun])
    best = [*networks][-1]

    def loss_of(how):
        network, net.train_block = networks[how]
        return loss(network)

    make = partial(make_optimizer, net, lr=1e-5, dtype=run.kind)
    optimizers = {name: make(name) for name in ("muon", "adamw")}
    step = partial(whole_step, net=net, optimizers=optimizers[optimizer])
    if profile:
        step(partial(loss_of, best))  # warm-up
        with torch.profiler.profile() as profiler:  # of the CPU, and of the GPU if there is one
            [step(partial(loss_of, best)) for _ in range(3)]
            run.sync()
        profiler.export_chrome_trace("bench_trace.json")
        return print("wrote bench_trace.json, for https://ui.perfetto.dev or chrome://tracing")
    for how in networks:
        forward = partial(loss_of, how)
        calls[f"forward, {how}"] = torch.no_grad()(forward)
        calls[f"forward+backward, {how}"] = lambda f=forward: net.zero_grad() or f().backward()
        calls[f"whole step, {optimizer}, {how}"] = partial(step, forward)
    calls, peaks = working(calls), {}  # which also compiles the forward pass alone
    for name, call in calls.items():
        net.zero_grad()
        peaks[name] = peak_memory(call, run.device)
    for name, group in optimizers.items():
        calls[f"{name} step"] = lambda group=group: [o.step() for o in group]
    for name, times in measure(calls, seconds, run.sync).items():
        if name == "adamw step":  # four numbers read, three written; caches hold a small net's
            row("model", name, times, "update", bytes=28 * params)
        elif name == "muon step":  # five rounds of x x^T, a a and their product with x
            sizes = [sorted(p.shape) for p in net.model.layers.parameters() if p.ndim == 2]
            flops = sum(5 * 2 * (2 * a * a * b + a**3) for a, b in sizes)
            row("model", name, times, run.dtype, flops=flops)
        else:
            flops = n * flops_per_token(net.config, seq_len, "forward," not in name)
            row("model", name, times, run.dtype, peaks[name], flops=flops, tokens=n)
    if compare:
        compare_steps(run, net, batch, loss_of, best)


def head(run):
    """The head and its loss at a large vocabulary, where the logits are what fills the memory."""
    N, V, C = min(2048, tokens), 50304, n_embd
    title(f"loss head: {N} rows of {C}, vocabulary {V:,}, {run.dtype}, forward+backward")
    h = torch.randn(N, C, device=run.device, requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device=run.device)).requires_grad_()
    targets = torch.randint(V, (N,), device=run.device)
    full = lambda x, w: F.cross_entropy((x @ w.T).float(), targets, reduction="sum")
    ours = lambda x, w: cross_entropy_sum(x, w, targets)
    both = run.cast(lambda f: torch.autograd.grad(f(h, weight), (h, weight)))
    calls = {"all logits, F.cross_entropy": partial(both, full)}
    calls = working(calls | {"ours (model.cross_entropy_sum)": partial(both, ours)})
    peaks = {name: peak_memory(call, run.device) for name, call in calls.items()}
    table(run, "head", calls, run.dtype, peaks, flops=6 * N * V * C, tokens=N, vocabulary=V)


def every_token():
    """A tokenizer with a token for each id of the network, none of which ends a text."""
    pairs = itertools.product((bytes([b]) for b in range(256)), repeat=2)
    tok = bpe_tokenizer(list(itertools.islice(pairs, max(0, vocab_size - 260))))
    tok.eos_ids = []
    return tok


def decode(run):
    """model.generate, greedy; the time of the prompt and the first token is taken off."""
    tok, n, m = every_token(), 64, 128  # new tokens, prompt
    note = "bytes: all weights once, but an embedding only as a tied head; no cache"
    title(f"decode: {n} tokens behind {m}, greedy; a row is a step of its batch", note)
    for kind in ("float32", "bfloat16", "int8", "int4"):
        net = build(run, max(seq_len, m + n))
        if kind.startswith("int"):
            net = quantize_weights(net, kind)
        else:
            net = net.to(getattr(torch, kind))
        readers = [module for module in net.modules() if not isinstance(module, torch.nn.Embedding)]
        tensors = [t for r in readers for t in (*r.parameters(False), *r.buffers(False))]
        weights = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
        for B in (1, 8, 32):
            prompts = torch.randint(min(vocab_size, tok.n_vocab), (B, m)).tolist()
            generate = partial(model.generate, net, tok, prompts, temperature=0)
            calls = {k: partial(generate, max_new_tokens=k) for k in (1, n)}
            name = f"{kind}, batch {B}"
            if working({name: partial(generate, max_new_tokens=2)}):
                times = measure(calls, seconds, run.sync)
                steps = np.subtract(times[n], times[1]) / (n - 1)
                row("decode", name, steps, "read", bytes=weights, tokens=B)
    if compare:
        compare_decode(run, tok, n, m)


def tokenizer(run):
    """prepare.py's BPE and MinHash on the source of the standard library."""
    prepare = stage("prepare")
    texts = [p.read_text(errors="ignore") for p in library_files()[:150]]
    size = sum(len(text.encode()) for text in texts)
    title(f"tokenizer: {size / 1e6:.1f} MB of Python's standard library, vocabulary 4096")

    def learn():
        pieces = count_pieces(texts).items()
        merges = 4096 - 256 - len(prepare.special_tokens)
        return train_bpe({piece.encode(): n for piece, n in pieces}, merges)

    tok = bpe_tokenizer(learn())
    learning = {"training, one core": learn}
    encoding = {"encoding, all cores": lambda: tok.encode_batch(texts, os.cpu_count())}
    if compare:
        bare = partial(
            tok.encoder.tiktoken.encode_ordinary_batch, texts, num_threads=os.cpu_count()
        )
        encoding["encoding, tiktoken alone"] = bare
    if compare and not importlib.util.find_spec("tokenizers"):
        skip("tokenizers", "not installed")
    elif compare:
        import tokenizers as hf

        ours = hf.Tokenizer.from_str(json.dumps(tok.spec))

        def learn_theirs():
            new = hf.Tokenizer(hf.models.BPE())
            new.pre_tokenizer = ours.pre_tokenizer
            how = dict(vocab_size=4096, special_tokens=prepare.special_tokens, show_progress=False)
            how["initial_alphabet"] = hf.pre_tokenizers.ByteLevel.alphabet()
            new.train_from_iterator(texts, hf.trainers.BpeTrainer(**how))

        learning["training, tokenizers, all cores"] = learn_theirs
        encoding["encoding, tokenizers, all cores"] = lambda: ours.encode_batch_fast(texts)
    marking = {"MinHash, one core": lambda: minhash(*word_hashes(texts), len(texts))}
    if compare and importlib.util.find_spec("datasketch"):
        import datasketch

        def mark_theirs():
            for words in (text.lower().split() for text in texts):
                grams = [" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)]
                datasketch.MinHash(128).update_batch(grams)

        marking["MinHash, datasketch, one core"] = mark_theirs
    for calls in (learning, encoding, marking):
        table(run, "tokenizer", calls, factors=True, text_bytes=size)


def hugging_face(run, net):
    """transformers' network of the same architecture and weights, or None where there is none."""
    if not importlib.util.find_spec("transformers"):
        return skip("transformers", "not installed")
    import transformers

    if family(net.config) == "barelm":
        return skip("transformers", "it has no network of this shape")
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(folder, net, bpe_tokenizer([]))
        none = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, **none).to(run.device)
        hf.generation_config.eos_token_id = None  # nothing ends a text early
        return hf


def compare_steps(run, net, batch, loss_of, best):
    """Whole steps of ours and of others in turn, all with AdamW and clipping."""
    print("  the same step by others, all with AdamW:")
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)

    def step(net, loss, kind=run.kind, adamw=None):
        adamw = adamw or torch.optim.AdamW(net.parameters(), 1e-5, fused=True)
        return partial(whole_step, autocast(run.device, kind)(loss), net.train(), [adamw])

    their_logits = lambda hf: hf(batch[0], use_cache=False).logits.flatten(0, 1)
    their_loss = lambda hf: F.cross_entropy(their_logits(hf), batch[1].flatten())
    how = {f"ours, {best}": best, "ours, eager": "eager"}
    calls = {name: step(net, lambda how=how: loss_of(how)) for name, how in how.items()}
    gpt2 = model.GPT(model.GPTConfig(n_ctx=seq_len, **shape, **FAMILIES["gpt2"]))
    for theirs, kind in ((net, run.kind), (gpt2, torch.float32)):
        if hf := hugging_face(run, theirs):
            name = f"{type(hf).__name__}, {str(kind)[6:]}"
            calls[name] = step(hf, partial(their_loss, hf), kind)
    for best in (False, True) if nanogpt else ():
        spec = importlib.util.spec_from_file_location("nanogpt", Path(nanogpt) / "model.py")
        nanos = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanos)
        config = nanos.GPTConfig(block_size=seq_len, dropout=0.0, bias=False, **shape)
        nano = nanos.GPT(config).to(run.device)
        kind, network = (torch.bfloat16, torch.compile(nano)) if best else (torch.float32, nano)
        name = f"nanoGPT, {'bfloat16, compiled' if best else 'float32, eager'}"
        adamw = nano.configure_optimizers(0.1, 1e-5, (0.9, 0.95), run.device.type)
        calls[name] = step(nano, lambda network=network: network(*batch)[1], kind, adamw)
    table(run, "compare", working(calls), factors=True, tokens=batch[0].numel())


def compare_decode(run, tok, n, m):
    """Greedy generation, prompt and all, at batch 1, and whether the ids agree."""
    net = build(run, max(seq_len, m + n))
    with torch.no_grad():  # louder blocks: random ones with a tied head repeat the last token
        [p.mul_(4) for p in net.model.layers.parameters() if p.ndim == 2]
    if not (hf := hugging_face(run, net)):
        return
    hf.eval()
    ids = torch.randint(min(vocab_size, tok.n_vocab), (1, m), device=run.device)
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    ours = lambda: model.generate(net, tok, ids.tolist(), max_new_tokens=n, temperature=0)[0].ids
    theirs = lambda: hf.generate(ids, use_cache=True, pad_token_id=0, **how)[0, m:].tolist()
    mine = ours()
    same = sum(a == b for a, b in zip(mine, theirs()))
    print(f"  float32, batch 1, {n} tokens, {len(set(mine))} different ones; {same} ids the same:")
    calls = {"generate, ours": ours, f"generate, {type(hf).__name__}": theirs}
    table(run, "compare", calls, factors=True, tokens=n, same_ids=same)


@contextlib.contextmanager
def served(folder):
    """The address of serve.py with this folder, on a free port; its process ends with the block."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they end the block
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    command = [sys.executable, Path(__file__).with_name("serve.py"), f"--model={folder}"]
    command += ["--port=0", f"--device={device}", f"--dtype={dtype}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith("serving "):
                    yield line.split()[-1]
                    return
            raise SystemExit(process.wait())  # it has said why
        finally:
            process.kill()


def ask(url, prompt):
    """One client's request: ([when it began, when each token came, in seconds], tokens made)."""
    times, made = [time.perf_counter()], 0
    body = dict(prompt=prompt, max_tokens=ANSWER, ignore_eos=True, stream=True)
    body["stream_options"] = {"include_usage": True}
    key = {"Authorization": f"Bearer {os.environ.get('BARELM_API_KEY')}"}  # serve.py reads it too
    for line in requests.post(url, json=body, headers=key, stream=True).iter_lines():
        if b'"choices"' in line:
            event = json.loads(line.removeprefix(b"data: "))
            times += [time.perf_counter()] * len(event["choices"])
            made = (event.get("usage") or {}).get("completion_tokens", made)
        elif line not in (b"", b"data: [DONE]"):
            raise ValueError(line.decode(errors="replace"))
    return times, made


def ask_alone(hf, lock, prompt):
    """The same of transformers' generate, which knows one request at a time; HTTP costs nothing."""
    times, ids = [time.perf_counter()], torch.tensor([prompt], device=hf.device)
    stream = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    how = dict(max_new_tokens=ANSWER, do_sample=True, top_k=0, pad_token_id=0, streamer=stream)
    with lock:
        hf.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return times[:1] + times[2:], len(times) - 2  # times[1] is the prompt's


def crowd(name, way, prompts, n):
    """A row of n clients, each asking anew when it has its answer, while prompts are left."""
    try:
        way([0] * PROMPT[0])  # warm-up
        begun = time.perf_counter()
        with ThreadPool(n) as pool:  # which waits for nobody where it is cut off
            answers = pool.map(way, prompts, 1)
    except (requests.RequestException, ValueError) as error:
        raise UserError(f"--serve={serve}: {error}") from None
    spent, made = time.perf_counter() - begun, sum(made for _, made in answers)
    firsts = [times[1] - times[0] for times, _ in answers]
    gaps = np.concatenate([np.diff(times[1:]) for times, _ in answers])
    ms = [1e3 * t for x in (firsts, gaps) for t in np.percentile(x, [50, 95]).tolist()]
    alone = next((r["tokens_per_s"] for r in ROWS if r["name"] == name), made / spent)
    cells = dict(zip(LOAD, [n, made / spent, made / spent / alone, *ms]))
    keep(dict(part="serve", name=name, requests=len(prompts), tokens=made, seconds=spent) | cells)
    print(f"  {name:<19}" + "".join(f"{round(x, 2):>13,}" for x in cells.values()), flush=True)


def load(run):
    """serve.py under load, transformers beside it: 16 requests a row, or one of each client."""
    draw, folder = random.Random(seed), serve
    with contextlib.ExitStack() as stack:
        if serve is True:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            save(folder, build(run, max(seq_len, PROMPT[1] + ANSWER)), every_token())
        there = re.match("https?://", folder)
        url = folder.rstrip("/") if there else stack.enter_context(served(folder))
        ways = {"serve.py": partial(ask, f"{url}/v1/completions")}
        if compare and there:
            skip("transformers", "it needs the folder")
        elif compare and (hf := hugging_face(run, checkpoint.load(folder)[0])):
            hf.eval().to(run.kind)
            ways["generate and a lock"] = partial(ask_alone, hf, threading.Lock())
        low, high = PROMPT
        print(f"\nload: {ANSWER} tokens behind {low} to {high}; ms to the first token, between two")
        print(f"  {'':<19}" + "".join(f"{name:>13}" for name in LOAD))
        for n in map(int, clients.split(",")):
            sizes = [draw.randint(low, high) for _ in range(max(16, n))]
            prompts = [draw.choices(range(64), k=size) for size in sizes]  # every model has these
            for name, way in ways.items():
                crowd(name, way, prompts, n)


PARTS = dict(ceilings=ceilings, attention=attention, model=train_step, head=head)
PARTS |= dict(decode=decode, tokenizer=tokenizer)


def main():
    wanted = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    for name in set(wanted) - set(PARTS):
        raise UserError(f"--only={name}: expected some of {', '.join(PARTS)}")
    if min(tokens, seq_len) < 1:
        raise UserError(f"tokens={tokens}, seq_len={seq_len}: expected 1 or more")
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", clients):
        raise UserError(f"--clients={clients}: expected numbers of them, as in 1,4,16")
    if nanogpt and not (Path(nanogpt) / "model.py").is_file():
        raise UserError(f"--nanogpt={nanogpt}: no model.py there; expected its checkout")
    warnings.simplefilter("ignore")  # torch warns of what it then raises, which we tell
    begun, run = time.perf_counter(), setup(device)
    run.cuda, cores = run.device.type == "cuda", os.cpu_count() or 1
    run.sync = torch.cuda.synchronize if run.cuda else lambda: None
    run.kind, why = choose_dtype(run.device, dtype, 0 if serve else n_embd)
    run.dtype, run.cast = str(run.kind)[6:], autocast(run.device, run.kind)
    net = build(run)  # which refuses a wrong shape before anything is timed
    run.config, _ = net.config, make_optimizer(net, optimizer)  # so does this an optimizer
    chip = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):  # Linux names it here
        chip = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    machine = {"cpu": chip, "cores": cores, "threads": torch.get_num_threads()}
    machine["gpu"] = torch.cuda.get_device_name(run.device) if run.cuda else None
    machine |= {"platform": platform.platform(), "python": platform.python_version()}
    print(f"{machine['gpu'] or chip}, {machine['threads']} thread(s) of {cores} core(s)")
    print(f"torch {torch.__version__}, computing in {run.dtype}{'' if serve else f': {why}'}")
    wanted = ["model"] if profile else ["ceilings", *wanted]  # all are compared with the ceilings
    for part in [load] if serve else [PARTS[name] for name in PARTS if name in wanted]:
        part(run)
    for r in ROWS:  # by the ceilings as they are at the end
        if "ceiling" in r:
            rate = r.get("flops_per_s", r.get("bytes_per_s"))
            r["percent"] = float(f"{100 * rate / CEILINGS[r['ceiling']]:.6g}")
    print(f"\nmeasured in {duration(time.perf_counter() - begun)}")
    record = {"machine": machine, "torch": torch.__version__, "dtype": run.dtype}
    print(json.dumps(record | {"settings": settings(globals()), "rows": ROWS}))


if __name__ == "__main__":
    main()
