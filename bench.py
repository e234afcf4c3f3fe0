"""How fast this machine can be, and how near to it barelm comes.

    python bench.py                                  # about three minutes on two CPU cores
    python bench.py config/small.py --only=model     # the shape of a recipe, one part
    python bench.py --compare --nanogpt=../nanoGPT   # others beside ours, in the same run
    python bench.py --compare --only=decode --llama=../llama  # a folder with node-llama-cpp
    python bench.py --profile                        # bench_trace.json, of three training steps
    python bench.py config/gpt2.py --serve --compare # a server of this shape, loaded by clients
    python bench.py --check                          # does this machine compute right?

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
pos = "rope"  # rope, learned, sinusoidal, relative, alibi or none
mlp = "swiglu"  # swiglu, geglu, gelu, relu or relu2
window = 0  # tokens that a layer sees, itself counted; 0: all
layers = ""  # "SSSL", repeated: S has the window, L sees all; "": all S where there is a window
attention = "sliding"  # what the window means: sliding, local, strided or fixed
tie = True  # share the embedding with the head
vocab_size = 4096  # ids that the network knows

# the work
seq_len = 256  # tokens of a window
tokens = 4096  # tokens of one step: tokens / seq_len windows
optimizer = "muon"  # of the whole step: muon or adamw
device = "auto"  # auto, cpu, cuda, cuda:1
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
dtype = "auto"  # auto, float32, bfloat16, float16
compile: bool | None = None  # torch.compile; none: where train.py would
seed = 0  # of the weights and the inputs

# what to measure, and how long
check = False  # compare what is computed here with what is right; exit code 1 if anything is not
only = ""  # parts to run, as in --only=attention,model (or checks: --only=decode); empty: all
seconds = 2.0  # time of the rows that are timed in turn, if five rounds fit it
compare = False  # also time transformers, tokenizers, tiktoken; with --serve its generate
nanogpt: str | None = None  # with --compare: a checkout of nanoGPT, to time its step too
llama: str | None = None  # with --compare: where npm installed node-llama-cpp, to decode beside it
profile = False  # write bench_trace.json, and nothing else
serve: bool | str = False  # only load a server: of a random network, of =FOLDER, or at =http://...
clients = "1,4,16,64"  # with --serve: how many ask at once, a row of the table each

if __name__ == "__main__":
    configure(globals())

import contextlib
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
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from barelm.bpe import DEFAULT, bpe_tokenizer, count_pieces, train_bpe
from barelm.check import CHECKS, check_machine, versions
from barelm.check_rows import Place
from barelm.checkpoint import load, save
from barelm.clients import ANSWER, LOAD, PROMPT, ask, ask_alone, crowd
from barelm.compiled import Ways, try_compile
from barelm.dedup import minhash, word_hashes
from barelm.families import FAMILIES, family
from barelm.fast import cross_entropy_sum, head_piece
from barelm.host import usable_cores
from barelm.llama import check_llama, llama_generate
from barelm.muon import COEFFICIENTS
from barelm.operations import Operations
from barelm.optim import flops_per_token, make_optimizer, n_params
from barelm.patterns import Pattern
from barelm.quantized import quantize_weights
from barelm.run import UserError, autocast, choose_dtype, duration, setup
from barelm.sources import library_files
from barelm.timing import Bench, measure_ceilings, title, weight_bytes
from model import GPT, GPTConfig, generate

# --------------------------------------------------------------------------------------------------
# Attention


def naive_attention(q, k, v):
    """Causal softmax(q k^T / sqrt(D)) v of (B, H, T, D) each, with the whole square in float32, as
    a textbook has it."""
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])  # (B, H, T, T)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1).to(q.dtype) @ v


def fused_attention(q, k, v, backend=None):
    """torch's kernel: its own choice, or one backend."""
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def attention_ways(n_head, n_few):
    """{name: (function of q, k, v, heads of k and v)}: ours beside what torch has; the last two of
    grouped-query attention, with n_few heads."""
    ours = Operations(fast=True).attend
    ways = {"naive": (naive_attention, n_head), "fused, torch's choice": (fused_attention, n_head)}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        one_kernel = partial(fused_attention, backend=getattr(SDPBackend, name))
        ways[f"fused, {name.split('_')[0].lower()}"] = (one_kernel, n_head)
    ways["ours"] = (ours, n_head)
    ways[f"fused, n_kv_head {n_few}"] = (fused_attention, n_few)
    ways[f"ours, n_kv_head {n_few}"] = (ours, n_few)
    return ways


def document_ways(bench, n_rows, length, n_head):
    """On a GPU, attention to documents of about 300 tokens by each kernel, as `attention_ways` has
    its ways."""
    if not bench.is_cuda:
        return {}
    docs = (torch.rand(n_rows, length, device=bench.device) < 1 / 300).cumsum(1)  # (B, T)
    positions = torch.arange(length, device=bench.device)[None]
    ways = {}
    for name in ("dense", "sparse"):
        ops = Operations(fast=True)
        ops.sparse = name == "sparse"
        mask = ops.mask(Pattern(), positions, docs)
        attend = torch.compile(ops.attend) if ops.sparse else ops.attend
        ways[f"documents, {name}"] = (partial(attend, mask=mask), n_head)
    return ways


def window_ways(bench, length, n_head):
    """Attention to a window of an eighth of the length, 64 at least, as `attention_ways` has its
    ways; on a GPU by each kernel."""
    pattern = Pattern(kind="sliding", window=max(64, length // 8))
    positions = torch.arange(length, device=bench.device)[None]
    ways = {}
    for name in ("dense", "sparse") if bench.is_cuda else ("blocks",):
        ops = Operations(fast=True)
        ops.sparse = name == "sparse"
        mask = ops.mask(pattern, positions, None)
        attend = torch.compile(ops.attend) if ops.sparse else ops.attend
        window = partial(attend, mask=mask, reach=pattern.reach)
        ways[f"window {pattern.window}, {name}"] = (window, n_head)
    return ways


def measure_attention(bench):
    """Attention forward, and forward and backward, at three lengths."""
    H = bench.config.n_head
    D = bench.config.head_dim
    n_few = H // 3 if H % 3 == 0 else 1
    note = "FLOPs: half the square, of documents and windows too; backward: x 2"
    title(f"attention: {H} heads of {D}, {bench.dtype_name}", note)
    lengths = (1024, 4096, 16384) if bench.is_cuda else (128, 512, 2048)
    for T in lengths:
        B = max(tokens, lengths[-1]) // T
        ways = attention_ways(H, n_few) | document_ways(bench, B, T, H)
        ways |= window_ways(bench, T, H)

        def random_heads(n, learns=True):
            x = torch.randn(B, n, T, D, device=bench.device, dtype=bench.dtype)
            return x.requires_grad_(learns)

        q = random_heads(H)
        dy = random_heads(H, learns=False)
        keys_values = {n: (random_heads(n), random_heads(n)) for n in (H, n_few)}

        @torch.no_grad()
        def forward(attend, n):
            return attend(q, *keys_values[n])

        def gradients(attend, n):
            inputs = (q, *keys_values[n])
            return torch.autograd.grad(attend(*inputs), inputs, dy)

        # Of a pair of tokens: two products forward, four more back, multiply and add, half of them.
        for direction, label, cost in (
            (forward, "forward", 2),
            (gradients, "forward+backward", 6),
        ):
            print(f"  {B} x {T} tokens, {label}")
            calls = {name: partial(direction, *way) for name, way in ways.items()}
            facts = dict(direction=label, rows=B, length=T, heads=H, head_dim=D, tokens=B * T)
            facts["flops"] = cost * B * H * T * T * D
            bench.table("attention", bench.working(calls), bench.dtype_name, **facts)


# --------------------------------------------------------------------------------------------------
# The model


def build(bench, n_ctx=0):
    """A random network of the shape that the keys name."""
    torch.manual_seed(seed)
    shape = {k: globals()[k] for k in GPTConfig.__dataclass_fields__ if k in globals()}
    return GPT(GPTConfig(n_ctx=n_ctx or seq_len, **shape)).to(bench.device)


def step_all(optimizers):
    for optimizer in optimizers:
        optimizer.step()


def forward_backward(loss, net):
    """loss() is a scalar."""
    net.zero_grad(set_to_none=True)
    loss().backward()


def whole_step(loss, net, optimizers):
    """A step as train.py makes it (without its GradScaler, in float16)."""
    forward_backward(loss, net)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    step_all(optimizers)


def eager_and_compiled(bench, net, batch):
    """{"eager": the Ways that net computes by}, and of "compiled" where it is."""
    begun = time.perf_counter()
    is_compiled = False
    words = "off: as asked"
    if compile is not False:
        arguments = {"ids": batch[0], "targets": batch[1]}
        is_compiled, words = try_compile(net, bench.run, arguments, bench.cast())
    print(f"  {batch[0].numel():,} tokens, {n_params(net):,} parameters, compile: {words}")
    ways = {"eager": Ways()}
    if is_compiled:
        ways["compiled"] = Ways.of(net)
        bench.row("model", "compilation, for training", [time.perf_counter() - begun])
    return ways


def measure_model(bench):
    """The model: forward, backward, optimizers, whole steps; eager and compiled."""
    title(
        f"model: windows of {seq_len} tokens, {bench.dtype_name}",
        "peak: over what was held before",
    )
    net = build(bench)
    shape = (2, max(1, tokens // seq_len), seq_len)  # ids and targets, B, T
    batch = torch.randint(vocab_size, shape, device=bench.device)
    ways = eager_and_compiled(bench, net, batch)

    def loss_of(name):
        ways[name].give(net)
        with bench.cast():
            loss_sum, _ = net(*batch)
            return loss_sum / batch[0].numel()

    optimizers = {}
    for name in ("muon", "adamw"):
        optimizers[name] = make_optimizer(net, name, lr=1e-5, dtype=bench.dtype)
    best = list(ways)[-1]
    if profile:
        write_trace(bench, partial(whole_step, partial(loss_of, best), net, optimizers[optimizer]))
        return
    calls = {}
    for name in ways:
        loss = partial(loss_of, name)
        calls[f"forward, {name}"] = torch.no_grad()(loss)
        calls[f"forward+backward, {name}"] = partial(forward_backward, loss, net)
        step = partial(whole_step, loss, net, optimizers[optimizer])
        calls[f"whole step, {optimizer}, {name}"] = step
    calls = bench.working(calls)  # which also compiles the forward pass alone
    peaks = {}
    for name, call in calls.items():
        net.zero_grad()
        peaks[name] = bench.peak_memory(call)
    for name, group in optimizers.items():
        calls[f"{name} step"] = partial(step_all, group)
    for name, times in bench.measure(calls).items():
        model_row(bench, name, times, peaks.get(name), net, batch[0].numel())
    if compare:
        compare_steps(bench, net, batch, loss_of, best)


def write_trace(bench, step):
    """Write bench_trace.json, of three steps."""
    step()  # warm-up
    with torch.profiler.profile() as profiler:  # of the CPU, and of the GPU if there is one
        for _ in range(3):
            step()
        bench.sync()
    profiler.export_chrome_trace("bench_trace.json")
    print("wrote bench_trace.json, for https://ui.perfetto.dev or chrome://tracing")


def model_row(bench, name, times, peak, net, n_tokens):
    """The row of a call of measure_model, with its work and the ceiling for that."""
    if name == "adamw step":  # four numbers read, three written; caches hold a small net's
        bench.row("model", name, times, "update", bytes=28 * n_params(net))
    elif name == "muon step":  # in each round x x^T, its square and the product of both with x
        work = 0
        for p in net.model.layers.parameters():
            if p.ndim == 2:
                a, b = sorted(p.shape)
                work += len(COEFFICIENTS) * 2 * (2 * a * a * b + a**3)
        bench.row("model", name, times, bench.dtype_name, flops=work)
    else:
        backward = not name.startswith("forward,")
        work = n_tokens * flops_per_token(net.config, seq_len, backward)
        bench.row("model", name, times, bench.dtype_name, peak, flops=work, tokens=n_tokens)


# --------------------------------------------------------------------------------------------------
# The head


def measure_head(bench):
    """The head and its loss at a large vocabulary, where the logits are what fills the memory."""
    N = 32768 if bench.is_cuda else min(2048, tokens)
    V = 50304
    C = n_embd
    what = f"{N} rows of {C}, vocabulary {V:,}, {bench.dtype_name}, forward+backward"
    title(f"loss head: {what}")
    h = torch.randn(N, C, device=bench.device, requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device=bench.device)).requires_grad_()
    targets = torch.randint(V, (N,), device=bench.device)

    def all_logits():
        return F.cross_entropy((h @ weight.T).float(), targets, reduction="sum")

    def ours(piece=head_piece):
        return cross_entropy_sum(h, weight, targets, piece)

    def gradients(loss):
        with bench.cast():
            return torch.autograd.grad(loss(), (h, weight))

    calls = {
        "all logits, F.cross_entropy": partial(gradients, all_logits),
        "ours (fast.cross_entropy_sum)": partial(gradients, ours),
    }
    if bench.is_cuda:  # as train.py does where it compiles
        calls["ours, compiled"] = partial(gradients, partial(ours, torch.compile(head_piece)))
    calls = bench.working(calls)
    peaks = {name: bench.peak_memory(call) for name, call in calls.items()}
    facts = dict(flops=6 * N * V * C, tokens=N, vocabulary=V)
    bench.table("head", calls, bench.dtype_name, peaks, **facts)


# --------------------------------------------------------------------------------------------------
# Decoding


def every_token():
    """A tokenizer with a token for each id of the network, none of which ends a text."""
    pairs = itertools.product((bytes([b]) for b in range(256)), repeat=2)
    n_merges = max(0, vocab_size - 260)  # beside 256 bytes and 4 special tokens
    tok = bpe_tokenizer(list(itertools.islice(pairs, n_merges)))
    tok.eos_ids = []
    return tok


def measure_decode(bench):
    """model.generate, greedy; the time of the prompt and the first token is taken off."""
    tok = every_token()
    n_new = 64
    n_prompt = 128
    note = "bytes: all weights once, but an embedding only as a tied head; no cache"
    what = f"{n_new} tokens behind {n_prompt}, greedy; a row is a step of its batch"
    title(f"decode: {what}", note)
    for kind in ("float32", "bfloat16", "int8", "int4"):
        net = build(bench, max(seq_len, n_prompt + n_new))
        if kind.startswith("int"):
            net = quantize_weights(net, kind)
        else:
            net = net.to(getattr(torch, kind))
        for B in (1, 8, 32):
            prompts = torch.randint(min(vocab_size, tok.n_vocab), (B, n_prompt)).tolist()
            decode = partial(generate, net, tok, prompts, temperature=0)
            name = f"{kind}, batch {B}"
            if bench.working({name: partial(decode, max_new_tokens=2)}):
                calls = {n: partial(decode, max_new_tokens=n) for n in (1, n_new)}
                times = bench.measure(calls)
                steps = np.subtract(times[n_new], times[1]) / (n_new - 1)
                bench.row("decode", name, steps, "read", bytes=weight_bytes(net), tokens=B)
    if compare:
        compare_decode(bench, tok, n_new, n_prompt)
    if compare and llama:
        compare_llama(bench, tok, n_new, n_prompt)


# --------------------------------------------------------------------------------------------------
# The tokenizer


def library_texts():
    """150 files of Python's standard library."""
    return [path.read_text(encoding="utf-8", errors="ignore") for path in library_files()[:150]]


def train_merges(texts):
    """The merges of a BPE of 4,096 tokens, learned as prepare.py does."""
    counts = count_pieces(texts)
    n_merges = 4096 - 256 - len(DEFAULT.special_tokens)
    return train_bpe({piece.encode(): n for piece, n in counts.items()}, n_merges)


def mark(texts):
    """MinHash's signatures of texts, as prepare.py makes them."""
    return minhash(*word_hashes(texts), len(texts))


def measure_tokenizer(bench):
    """prepare.py's BPE and MinHash on the source of the standard library."""
    texts = library_texts()
    n_bytes = sum(len(text.encode()) for text in texts)
    title(f"tokenizer: {n_bytes / 1e6:.1f} MB of Python's standard library, vocabulary 4096")
    tok = bpe_tokenizer(train_merges(texts))
    n_cores = usable_cores()
    learning = {"training, one core": partial(train_merges, texts)}
    encoding = {"encoding, all cores": partial(tok.encode_batch, texts, n_cores)}
    marking = {"MinHash, one core": partial(mark, texts)}
    if compare:
        bare = partial(tok.encoder.tiktoken.encode_ordinary_batch, texts, num_threads=n_cores)
        encoding["encoding, tiktoken alone"] = bare
        if importlib.util.find_spec("tokenizers"):
            train, encode = tokenizers_calls(tok, texts)
            learning["training, tokenizers, all cores"] = train
            encoding["encoding, tokenizers, all cores"] = encode
        else:
            bench.skip("tokenizers", "not installed")
        if importlib.util.find_spec("datasketch"):
            marking["MinHash, datasketch, one core"] = partial(datasketch_mark, texts)
    for calls in (learning, encoding, marking):
        bench.table("tokenizer", calls, factors=True, text_bytes=n_bytes)


def tokenizers_calls(tok, texts):
    """(training, encoding) by Hugging Face's tokenizers: functions without arguments."""
    import tokenizers as hf

    theirs = hf.Tokenizer.from_str(json.dumps(tok.spec))

    def train():
        new = hf.Tokenizer(hf.models.BPE())
        new.pre_tokenizer = theirs.pre_tokenizer
        trainer = hf.trainers.BpeTrainer(
            vocab_size=4096,
            special_tokens=DEFAULT.special_tokens,
            show_progress=False,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        )
        new.train_from_iterator(texts, trainer)

    return train, partial(theirs.encode_batch_fast, texts)


def datasketch_mark(texts):
    """MinHash's signatures of texts by datasketch."""
    import datasketch

    for text in texts:
        words = text.lower().split()
        grams = [" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)]
        datasketch.MinHash(128).update_batch(grams)


# --------------------------------------------------------------------------------------------------
# Others beside ours


def hugging_face(bench, net):
    """transformers' network of the same architecture and weights, or None where there is none."""
    if not importlib.util.find_spec("transformers"):
        return bench.skip("transformers", "not installed")
    import transformers

    if family(net.config) == "barelm":
        return bench.skip("transformers", "it has no network of this shape")
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(folder, net, bpe_tokenizer([]))
        no_ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, **no_ids)
        hf.generation_config.eos_token_id = None  # nothing ends a text early
        return hf.to(bench.device)


def other_step(bench, net, loss, dtype, adamw=None):
    """A whole step of a network, whose loss() is computed in dtype, with AdamW and clipping."""
    net.train()
    if adamw is None:
        adamw = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)
    return partial(whole_step, autocast(bench.device, dtype)(loss), net, [adamw])


def hf_loss(hf, batch):
    """The mean loss of transformers' network on a batch (ids, targets)."""
    logits = hf(batch[0], use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def compare_steps(bench, net, batch, loss_of, best):
    """Whole steps of ours and of others in turn, all with AdamW and clipping."""
    print("  the same step by others, all with AdamW:")
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)
    calls = {}
    for label, name in {f"ours, {best}": best, "ours, eager": "eager"}.items():
        calls[label] = other_step(bench, net, partial(loss_of, name), bench.dtype)
    gpt2 = GPT(GPTConfig(n_ctx=seq_len, **shape, **FAMILIES["gpt2"].fixed))
    for theirs, dtype in ((net, bench.dtype), (gpt2, torch.float32)):
        hf = hugging_face(bench, theirs)
        if hf:
            name = f"{type(hf).__name__}, {str(dtype).removeprefix('torch.')}"
            calls[name] = other_step(bench, hf, partial(hf_loss, hf, batch), dtype)
    if nanogpt:
        calls |= nanogpt_steps(bench, batch, shape)
    n_tokens = batch[0].numel()
    bench.table("compare", bench.working(calls), factors=True, tokens=n_tokens)


def nanogpt_steps(bench, batch, shape):
    """{name: a whole step of nanoGPT}, as it comes and as its README advises for speed."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(nanogpt) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    steps = {}
    for dtype, compiled in ((torch.float32, False), (torch.bfloat16, True)):
        config = module.GPTConfig(block_size=seq_len, dropout=0.0, bias=False, **shape)
        net = module.GPT(config).to(bench.device)
        network = torch.compile(net) if compiled else net
        adamw = net.configure_optimizers(0.1, 1e-5, (0.9, 0.95), bench.device.type)

        def loss(network=network):
            _, mean_loss = network(*batch)
            return mean_loss

        name = f"nanoGPT, {'bfloat16, compiled' if compiled else 'float32, eager'}"
        steps[name] = other_step(bench, net, loss, dtype, adamw)
    return steps


def build_loud(bench, n_ctx):
    """`build`'s with louder blocks: random ones with a tied head repeat the last token."""
    net = build(bench, n_ctx)
    with torch.no_grad():
        for p in net.model.layers.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return net


def compare_decode(bench, tok, n_new, n_prompt):
    """Greedy generation, prompt and all, at batch 1, and whether the ids agree."""
    net = build_loud(bench, max(seq_len, n_prompt + n_new))
    hf = hugging_face(bench, net)
    if not hf:
        return
    hf.eval()
    ids = torch.randint(min(vocab_size, tok.n_vocab), (1, n_prompt), device=bench.device)

    def ours():
        [generation] = generate(net, tok, ids.tolist(), max_new_tokens=n_new, temperature=0)
        return generation.ids

    def theirs():
        both = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return both[0, n_prompt:].tolist()

    our_ids = ours()
    same = sum(a == b for a, b in zip(our_ids, theirs()))
    different = len(set(our_ids))
    print(f"  float32, batch 1, {n_new} tokens, {different} different ones; {same} ids the same:")
    calls = {"generate, ours": ours, f"generate, {type(hf).__name__}": theirs}
    bench.table("compare", calls, factors=True, tokens=n_new, same_ids=same)


def compare_llama(bench, tok, n_new, n_prompt):
    """Greedy steps at batch 1 by llama.cpp and by ours, on the same weights; the prompt's time is
    taken off both."""
    ids = torch.randint(min(vocab_size, tok.n_vocab), (n_prompt,)).tolist()
    print(f"  llama.cpp and ours, batch 1, {n_new} tokens behind {n_prompt}, greedy, steps:")
    for kind, gguf_type in (("float32", "F32"), ("int8", "Q8_0"), ("int4", "Q4_0")):
        net = build_loud(bench, max(seq_len, n_prompt + n_new + 1))
        name = f"llama.cpp, {gguf_type}"
        try:
            threads = torch.get_num_threads()
            theirs, seconds = llama_generate(llama, net, tok, ids, n_new, gguf_type, threads)
        except (OSError, RuntimeError, UserError) as error:
            bench.skip(name, str(error))
            continue
        if kind != "float32":
            net = quantize_weights(net, kind)
        decode = partial(generate, net, tok, [ids], temperature=0)
        [ours] = decode(max_new_tokens=n_new)
        same = sum(a == b for a, b in zip(ours.ids, theirs))
        times = bench.measure({n: partial(decode, max_new_tokens=n) for n in (1, n_new)})
        steps = np.subtract(times[n_new], times[1]) / (n_new - 1)
        bench.row("compare", f"ours, {kind}", steps, tokens=1, same_ids=same)
        bench.row("compare", name, [seconds / (n_new - 1)], tokens=1)


# --------------------------------------------------------------------------------------------------
# A server under load


@contextlib.contextmanager
def served(folder):
    """The address of serve.py with this folder, on a free port; its process ends with the block."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they end the block
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    command = [sys.executable, Path(__file__).with_name("serve.py"), f"--model={folder}"]
    command += ["--port=0", f"--device={device}", f"--dtype={dtype}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith("serving "):
                    yield line.split()[-1]
                    return
            raise SystemExit(process.wait())  # it has said why
        finally:
            process.kill()


def measure_load(bench):
    """serve.py under load, transformers beside it: 16 requests a row, or one of each client."""
    draw = random.Random(seed)
    low, high = PROMPT
    with contextlib.ExitStack() as stack:
        folder = serve
        if serve is True:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            save(folder, build(bench, max(seq_len, high + ANSWER)), every_token())
        runs_elsewhere = re.match("https?://", folder)
        url = folder.rstrip("/") if runs_elsewhere else stack.enter_context(served(folder))
        ways = {"serve.py": partial(ask, f"{url}/v1/completions")}
        if compare and runs_elsewhere:
            bench.skip("transformers", "it needs the folder")
        elif compare:
            net, _ = load(folder)
            hf = hugging_face(bench, net)
            if hf:
                hf.eval().to(bench.dtype)
                ways["generate and a lock"] = partial(ask_alone, hf, threading.Lock())
        print(f"\nload: {ANSWER} tokens behind {low} to {high}; ms to the first token, between two")
        print(f"  {'':<19}" + "".join(f"{name:>13}" for name in LOAD))
        for n_clients in map(int, clients.split(",")):
            sizes = [draw.randint(low, high) for _ in range(max(16, n_clients))]
            prompts = [draw.choices(range(64), k=size) for size in sizes]  # every model has these
            for name, way in ways.items():
                try:
                    crowd(bench, name, way, prompts, n_clients)
                except (OSError, HTTPException, ValueError) as error:
                    raise UserError(f"--serve={serve}: {error}") from None


# --------------------------------------------------------------------------------------------------
# The run

PARTS = {
    "ceilings": measure_ceilings,
    "attention": measure_attention,
    "model": measure_model,
    "head": measure_head,
    "decode": measure_decode,
    "tokenizer": measure_tokenizer,
}


def check_settings():
    """Refuse what cannot be measured, before anything is; the parts that are asked for."""
    names = list(CHECKS if check else PARTS)
    wanted = [name.strip() for name in only.split(",") if name.strip()] or names
    for name in wanted:
        if name not in names:
            raise UserError(f"--only={name}: expected some of {', '.join(names)}")
    if min(tokens, seq_len) < 1:
        raise UserError(f"tokens={tokens}, seq_len={seq_len}: expected 1 or more")
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", clients):
        raise UserError(f"--clients={clients}: expected numbers of them, as in 1,4,16")
    if nanogpt and not (Path(nanogpt) / "model.py").is_file():
        raise UserError(f"--nanogpt={nanogpt}: no model.py there; expected its checkout")
    if llama:
        check_llama(llama)
    return wanted


def place_of(bench):
    """Where the checks compute, and the network whose speed they tell."""
    shape = {k: v for k, v in vars(bench.config).items() if k != "n_ctx"}
    compiles = compile is not False
    return Place(bench.device, bench.dtype, shape, tokens, seq_len, compiles, seconds / 2)


def parts_to_run(wanted):
    """The functions of the parts that were asked for."""
    if serve:
        return [measure_load]
    if profile:
        return [measure_model]
    return [PARTS[name] for name in PARTS if name == "ceilings" or name in wanted]


def describe_machine(bench):
    """The machine, as the record names it."""
    chip = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):  # Linux names it here
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        chip = facts.split("model name\t: ")[1].split("\n")[0]
    return {
        "cpu": chip,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(bench.device) if bench.is_cuda else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def main():
    wanted = check_settings()
    warnings.simplefilter("ignore")  # torch warns of what it then raises, which we tell
    begun = time.perf_counter()
    bench = Bench(setup(device, threads=threads, can_mps=False), seconds=seconds)
    bench.dtype, why = choose_dtype(bench.device, dtype, n_embd)
    net = build(bench)  # which refuses a wrong shape before anything is timed
    make_optimizer(net, optimizer)  # so does this an optimizer
    bench.config = net.config
    del net
    machine = describe_machine(bench)
    parts = f"{machine['threads']} thread(s) of {machine['cores']} core(s)"
    print(f"{machine['gpu'] or machine['cpu']}, {parts}")
    bench.run.threads.note()
    reason = "" if serve else f": {why}"
    print(f"torch {torch.__version__}, computing in {bench.dtype_name}{reason}")
    record = {"machine": machine, "torch": torch.__version__, "dtype": bench.dtype_name}
    status = 0
    if check:
        record |= versions(place_of(bench))
        bench.rows, status = check_machine(wanted, place_of(bench))
    else:
        for part in parts_to_run(wanted):
            part(bench)
    for row in bench.rows:  # by the ceilings as they are at the end
        if "ceiling" in row:
            rate = row.get("flops_per_s", row.get("bytes_per_s"))
            row["percent"] = float(f"{100 * rate / bench.ceilings[row['ceiling']]:.6g}")
    print(f"\nmeasured in {duration(time.perf_counter() - begun)}")
    print(json.dumps(record | {"settings": settings(globals()), "rows": bench.rows}))
    sys.exit(status)


if __name__ == "__main__":
    main()
