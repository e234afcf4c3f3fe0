"""Deployment: a checkpoint as a server that speaks OpenAI's protocol, with a page to look inside;
quantized, pruned, and exported to other formats.

    python serve.py                                     # http://127.0.0.1:8000 with out/python
    python serve.py --model=out/sft --port=9000 --max_batch=32
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "import os", "max_tokens": 20}'
    python serve.py --host=0.0.0.0 --api_key=SECRET     # open to others: give it a key
    python serve.py --quantize=int4 --report            # size, bits per byte, tokens/s, and ends
    python serve.py --quantize=int4 --export=barelm     # out/python-int4, for every script here
    python serve.py --prune=2:4 --export=hf             # out/python-2of4, a plain folder
    python serve.py --model=out/lora --export=hf        # a LoRA adapter merged into its base
    python serve.py --export=gguf --gguf_type=Q8_0      # out/python-gguf/python-Q8_0.gguf
    python serve.py --export=onnx                       # out/python-onnx/model.onnx, checked

--model is a run of ours or a Hugging Face folder (Qwen3, Qwen2, Llama, GPT-2). Any client of
OpenAI's works with base_url="http://127.0.0.1:8000/v1". One thread owns the network and advances
all requests by one token a step; they join and leave between steps. Ctrl-C or SIGTERM lets the
running requests finish. The server alone needs fastapi and uvicorn: pip install -r
requirements-serve.txt. An export of a quantized or pruned model prints the report first.
"""

from config import configure

model = "out/python"  # a checkpoint folder
host = "127.0.0.1"  # who may connect: 127.0.0.1 this machine alone, 0.0.0.0 everyone
port = 8000  # 0: any free one
api_key: str | None = None  # asked of every client; or set BARELM_API_KEY, which ps does not show
cors: str | None = None  # web sites that may call, "https://a.org,https://b.org", or "*"
max_batch = 16  # sequences that are generated at once
max_len = 0  # tokens of a prompt and its answer, at most; 0: the model's context
max_queue = 256  # sequences that may wait for a place in the batch; more are answered 429
max_connections = 1000  # that clients may have open at once; more are answered 503
prefill_chunk = 128  # tokens of prompts read in one step, which the others wait for
max_body = 4_000_000  # bytes of a request, at most
timeout = 600.0  # seconds that a request may take
client_timeout = 20.0  # seconds that a client may take to send its request, or to read a piece
drain = 30.0  # seconds that running requests have to finish in after SIGTERM
log: str | None = None  # a file that gets a line of JSON for each request
log_prompts = False  # with what was asked and answered
seed: int | None = None  # of requests that bring none; None: another for each
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16
quantize: str | None = None  # int8 or int4: weights of one byte or half of one

# smaller, and in other formats
prune: str | None = None  # make weights zero: 0.5, the smaller half of each matrix; or 2:4
report = False  # with quantize or prune: print what they cost and gain, and end
export: str | None = None  # hf, barelm (a quantized model), gguf or onnx: write it, and end
gguf_type = "F16"  # F32, F16 or Q8_0, of a GGUF file's matrices
out_dir: str | None = None  # where an export goes; None: beside the model, by what was done
overwrite = False  # let an export replace what out_dir holds
dataset = "python"  # data/<dataset>, whose validation shards the report measures on
eval_tokens = 65536  # so many of their tokens, evenly spread

if __name__ == "__main__":
    configure(globals())

import asyncio
import base64
import bisect
import copy
import difflib
import hashlib
import hmac
import importlib
import ipaddress
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import model as core
from barelm import families
from barelm.checkpoint import find, is_adapter, load, refuse_source, save, saved_tensors, weights_of
from barelm.families import FAMILIES, misfits
from barelm.fast import QuantizedLinear, dequantize, generating, quantize_weights, tie_embedding
from barelm.files import whole_file, write_json
from barelm.resume import clear_folder, holds_model, locked_folder, make_folder, move_files
from barelm.run import UserError, choose_dtype, setup
from barelm.safetensors import entries_of
from barelm.shards import check_tokens, open_shard
from barelm.splits import GPT2_SPLIT
from barelm.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# Smaller: pruning and quantization, and what they cost and gain


def matrices(net):
    """The matrices that are pruned: the blocks' linear layers, not the embedding nor the head."""
    return [m for m in net.model.layers.modules() if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
def prune_weights(net, how):
    """Make the smallest weights of each matrix zero, in place (Han et al. 2015). how: the share of
    them, "0.5"; or "2:4": two of each four neighbours in a row, which GPUs multiply faster."""
    if how != "2:4":
        with suppress(ValueError):
            how = float(how)
        if not isinstance(how, float) or not 0 < how < 1:
            raise UserError(f"--prune={how}: expected a share between 0 and 1, such as 0.5, or 2:4")
    for layer in matrices(net):
        w = layer.weight
        if how == "2:4" and w.shape[1] % 4:
            raise UserError(f"--prune=2:4: a matrix of {w.shape[1]} columns has no groups of four")
        rows = w.view(-1, 4) if how == "2:4" else w.view(1, -1)
        count = 2 if how == "2:4" else round(how * w.numel())
        rows.scatter_(1, rows.abs().topk(count, largest=False).indices, 0.0)


def zeros_share(net):
    """The share of zeros among the weights of the blocks' matrices."""
    total = zeros = 0
    for layer in net.model.layers.modules():
        if isinstance(layer, (torch.nn.Linear, QuantizedLinear)):
            w = layer.weight
            w = w if w.is_floating_point() else dequantize(w, layer.scale)
            total, zeros = total + w.numel(), zeros + int((w == 0).sum())
    return zeros / total


def stored_dtype():
    """The dtype of the model's files, or float32 where an adapter is merged into a base."""
    folder, kinds = find(model), set()
    for path in weights_of(folder) if not is_adapter(folder) else ():
        entries = entries_of(path)
        kinds |= {kind for kind, _ in entries.values() if kind.is_floating_point}
    return torch.float32 if len(kinds) != 1 else kinds.pop()


def cast(net, kind):
    """The parameters in another dtype, in place; the scales of quantized weights keep theirs."""
    for p in net.parameters():
        p.data = p.data.to(kind)


def compressed(run):
    """(network, tokenizer): the model, pruned and quantized if asked for, as an export holds it."""
    net, tok = load(model, run.device, stored_dtype())
    if prune and net.quantize:
        raise UserError(f"{model} is quantized: prune what it was made of")
    if prune:
        prune_weights(net, prune)
    if quantize:
        quantize_weights(net, quantize)
        cast(net, torch.bfloat16)  # what is left beside the codes
    return net, tok


def validation_windows(tok, width):
    """Windows (n, width + 1) int64 of the validation shards, eval_tokens at most, evenly spread."""
    folder, rows = Path("data") / dataset, []
    paths = sorted(folder.glob("val_*.bin"))
    if not paths or Tokenizer.from_folder(folder).bytes != tok.bytes:
        why = "its tokens are another tokenizer's" if paths else "no validation shards"
        print(f"{folder}: {why}: bits per byte n/a (--dataset names another)")
        return None
    for path in paths:
        tokens = open_shard(path)
        check_tokens(tokens, tok.n_vocab, path)
        rows += [tokens[i : i + width + 1] for i in range(0, len(tokens) - width, width)]
    count = min(len(rows), -(-eval_tokens // width))
    if not count:
        raise UserError(f"{folder}: no window of {width + 1} validation tokens")
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    return torch.from_numpy(np.stack(chosen).astype(np.int64))


@torch.no_grad()
def bits_per_byte(net, tok, windows):
    """The loss in bits per byte of text over windows (n, T + 1)."""
    device, nats, size = net.model.embed_tokens.weight.device, 0.0, 0
    sizes = torch.tensor([len(tok.token_bytes(i)) for i in range(net.config.vocab_size)])
    rows = max(1, (1 << 25) // (windows.shape[1] * net.config.vocab_size))  # logits at once
    for part in windows.split(rows):
        targets = part[:, 1:].contiguous()
        nats += net(part[:, :-1].to(device), targets.to(device))[0].item()
        size += int(sizes[targets].sum())
    return nats / size / math.log(2)


def decoding_rate(net, tok):
    """Tokens a second of one greedy sequence: the median of three, end tokens passed over."""
    tok, rates = copy.copy(tok), []
    tok.eos_ids, prompt = [], [tok.eot_id or 0]
    n = min(64, net.config.n_ctx - 1)
    with generating(net):
        core.generate(net, tok, [prompt], max_new_tokens=2, temperature=0)
        for _ in range(3):
            start = time.perf_counter()  # generate waits for its last token
            core.generate(net, tok, [prompt], max_new_tokens=n, temperature=0)
            rates.append(n / (time.perf_counter() - start))
    return sorted(rates)[1]


def show_report(run):
    """The table of the model as it is and as compressed: size, bits per byte, tokens/s, zeros."""
    kind, _ = choose_dtype(run.device, dtype)
    net, tok = load(model, run.device, kind)
    if net.score is not None:
        return print(f"{model} is a classifier: no bits per byte; eval.py measures it")
    windows = validation_windows(tok, min(net.config.n_ctx, 1024))
    print(f"{'':<22}{'MB':>10}{'bits/byte':>11}{'tokens/s':>10}{'zeros':>8}")
    names = " ".join(f"{a}{b}" for a, b in (("pruned ", prune), ("", quantize)) if b)
    for name in ("as it is", names):
        if name == names:
            net, tok = compressed(run)
            cast(net, kind)
            tie_embedding(net, kind)
        size = sum(t.nbytes for t in saved_tensors(net).values()) / 1e6
        bits = "n/a" if windows is None else f"{bits_per_byte(net, tok, windows):.4f}"
        rate, zeros = decoding_rate(net, tok), f"{zeros_share(net):.1%}"
        print(f"{name:<22}{size:>10,.2f}{bits:>11}{rate:>10,.1f}{zeros:>8}", flush=True)
    print(f"computed in {str(kind)[6:]} on {run.device}, one sequence; MB of tensors")


# --------------------------------------------------------------------------------------------------
# Export: Hugging Face folders


def check_family(net):
    """The Hugging Face model_type that holds the network; where none does, the options that would
    have to be others."""
    c = net.config
    if net.quantize:
        mend = "--export=barelm saves it, --gguf_type=Q8_0 is GGUF's own 8 bits"
        raise UserError(f"--export={export} cannot hold {net.quantize} weights: {mend}")
    if net.adapter_size or net.pooling != "last":
        odd = "bottleneck adapters" if net.adapter_size else "mean pooling"
        raise UserError(f"--export={export}: no Hugging Face architecture has {odd}")
    if (kind := families.family(c)) != "barelm":
        return kind
    kind = min(FAMILIES, key=lambda kind: len(misfits(c, kind)))
    differ = misfits(c, kind)
    wanted = ", ".join(f"{k}={v!r} (here {getattr(c, k)!r})" for k, v in differ.items())
    raise UserError(f"--export={export} cannot hold this architecture: {kind} wants {wanted}")


# --------------------------------------------------------------------------------------------------
# Export: GGUF

# The split patterns that llama.cpp knows, and its names for them.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_GPT2 = (  # the same pieces as GPT2_SPLIT's; its cl100k_base has no such name
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
GGUF_PRE = {GPT2_SPLIT: "gpt-2", TIKTOKEN_GPT2: "gpt-2", QWEN2_SPLIT: "qwen2"}
GGUF_PRE[QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")] = "llama-bpe"
GGUF_NAMES = """model.layers=blk model.embed_tokens=token_embd model.embed_positions=position_embd
model.norm=output_norm lm_head=output input_layernorm=attn_norm post_attention_layernorm=ffn_norm
self_attn.o_proj=attn_output self_attn.=attn_ _proj= mlp.=ffn_"""
GGUF_NAMES = [pair.split("=") for pair in GGUF_NAMES.split()]
GGUF_TYPES = {"F32": (0, 0), "F16": (1, 1), "Q8_0": (8, 7)}  # of a tensor, of a file


def gguf_tokenizer(tok, vocab_size):
    """The keys that hold the tokenizer; UserError where llama.cpp has none such."""
    split = tok.split_pattern
    if tok.kind != "BPE" or split not in GGUF_PRE:
        what = "split pattern" if tok.kind == "BPE" else f"{tok.kind} tokenizer"
        mend = "prepare.py --tokenizer=bpe makes one that it knows (--export=hf holds any)"
        raise UserError(f"--export=gguf: llama.cpp has no name for this {what}: {mend}")
    if odd := [n for n in tok.normalizers if n != "NFC"]:
        raise UserError(f"--export=gguf: llama.cpp has no normalizer {odd[0]}: --export=hf")
    if tok.normalizers:
        print("note: llama.cpp does not normalise: text that is not NFC gets other ids there")
    if tok.eot_id is None:
        raise UserError("--export=gguf: the tokenizer names no end token (tokenizer_config.json)")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [5] * vocab_size  # unused
    for token, id in tok.spec["model"]["vocab"].items():
        tokens[id], types[id] = token, 1
    for added in tok.spec.get("added_tokens", []):
        tokens[added["id"]], types[added["id"]] = added["content"], 3 if added["special"] else 4
    merges = [m if isinstance(m, str) else " ".join(m) for m in tok.spec["model"]["merges"]]
    keys = {"model": "gpt2", "pre": GGUF_PRE[split], "tokens": tokens, "token_type": types}
    keys |= {"merges": merges, "bos_token_id": tok.bos_id, "padding_token_id": tok.pad_id}
    keys |= {"eos_token_id": [*tok.eos_ids, tok.eot_id][0], "add_bos_token": bool(tok.start)}
    keys = {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}
    if isinstance(template := tok.config.get("chat_template"), str):
        keys["tokenizer.chat_template"] = template
    return keys


def gguf_keys(c, kind, name):
    """The keys of a GGUF file that describe the network."""
    scaling = c.rope_scaling or {}
    keys = {"context_length": c.n_ctx, "embedding_length": c.n_embd, "block_count": c.n_layer}
    keys |= {"feed_forward_length": c.n_hidden, "attention.head_count": c.n_head}
    if kind == "gpt2":
        keys |= {"attention.layer_norm_epsilon": float(c.norm_eps)}
    else:
        keys |= {"attention.head_count_kv": c.n_kv_head, "rope.dimension_count": c.head_dim}
        keys |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
        keys |= {"attention.layer_norm_rms_epsilon": float(c.norm_eps)}
        keys |= {"rope.freq_base": float(c.rope_theta), "vocab_size": c.vocab_size}
    if scaling.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    elif scaling and kind != "llama":
        raise UserError(f"--export=gguf: llama.cpp has rope_scaling llama3 for llama, not {kind}")
    general = {"general.architecture": kind, "general.name": name, "general.alignment": 32}
    general["general.file_type"] = GGUF_TYPES[gguf_type][1]
    if gguf_type == "Q8_0":
        general["general.quantization_version"] = 2
    return general | {f"{kind}.{key}": value for key, value in keys.items()}


def gguf_tensors(net, kind):
    """{name in a GGUF file: tensor}: q and k are in Meta's order for a Llama, whose rotation pairs
    neighbours; GPT-2's q, k and v are one."""
    c, out = net.config, {}
    for name, t in saved_tensors(net).items():
        theirs = name
        for old, new in GGUF_NAMES:
            theirs = theirs.replace(old, new)
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            t = t.view(-1, 2, c.head_dim // 2, c.n_embd).transpose(1, 2).reshape(t.shape)
        if kind == "gpt2":
            for letter in "qkv":
                theirs = theirs.replace(f"attn_{letter}.", "attn_qkv.")
        out[theirs] = torch.cat((out[theirs], t)) if theirs in out else t
    if (c.rope_scaling or {}).get("rope_type") == "llama3":
        plain, scaled = (
            core.rope_frequencies(x, "cpu") for x in (replace(c, rope_scaling=None), c)
        )
        out["rope_freqs.weight"] = plain / scaled
    return out


def gguf_dtype(name, t):
    """The type of a tensor: vectors and positions stay float32, as llama.cpp wants them; a row that
    blocks of 32 do not fill is float16."""
    if t.ndim == 1 or name == "position_embd.weight":
        return "F32"
    return "F16" if gguf_type == "Q8_0" and t.shape[1] % 32 else gguf_type


def gguf_bytes(t, kind):
    """A tensor's bytes. Q8_0: blocks of 32, a float16 scale (the largest over 127) and 32 int8."""
    t = t.detach().float().cpu().contiguous()
    if kind == "F16":
        if not (half := t.half()).isfinite().all():
            raise UserError("--gguf_type=F16: a weight is beyond float16: --gguf_type=F32")
        return half.numpy().tobytes()
    if kind == "F32":
        return t.numpy().tobytes()
    blocks = t.view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    x = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    codes = x.trunc() + (2 * x.frac()).trunc()  # to the nearest, halves away from zero
    codes = codes.to(torch.int8).view(torch.uint8)
    return torch.cat((scale.half().view(torch.uint8), codes), 1).numpy().tobytes()


def gguf_value(value, typed=True):
    """A key's value, its type before it: bool, uint32, float32, string, or an array of strings or
    int32."""
    if isinstance(value, list):
        kind, pack = (8, gguf_value) if isinstance(value[:1] and value[0], str) else (5, None)
        items = [pack(v, False) if pack else struct.pack("<i", v) for v in value]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)
    if isinstance(value, str):
        data = value.encode()
        return (struct.pack("<I", 8) if typed else b"") + struct.pack("<Q", len(data)) + data
    kind, code = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{code}", kind, value)


def export_gguf(net, tok, path):
    """Write a GGUF file (version 3: a header, keys, tensor places, then data)."""
    kind, c = check_family(net), net.config
    if net.score is not None:
        raise UserError(f"{model} is a classifier: --export=gguf has text models only")
    keys = gguf_keys(c, kind, path.stem.removesuffix(f"-{gguf_type}")) | gguf_tokenizer(
        tok, c.vocab_size
    )
    tensors = gguf_tensors(net, kind)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys.items():
        header += gguf_value(key, False) + gguf_value(value)
    at = 0
    for n, t in tensors.items():
        as_type, dims = gguf_dtype(n, t), t.shape[::-1]
        header += gguf_value(n, False) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        header += struct.pack("<IQ", GGUF_TYPES[as_type][0], at)
        bits = {"F32": 32, "F16": 16, "Q8_0": 8.5}[as_type]
        at += -(-int(t.numel() * bits / 8) // 32) * 32
    with whole_file(path) as file:
        file.write(header + b"\0" * (-len(header) % 32))
        for n, t in tensors.items():
            data = gguf_bytes(t, gguf_dtype(n, t))
            file.write(data + b"\0" * (-len(data) % 32))


# --------------------------------------------------------------------------------------------------
# Export: ONNX


def export_onnx(net, tok, path):
    """Write an ONNX file (ids -> logits, any batch and length) and the tokenizer beside it, after
    onnxruntime has computed our logits from it."""
    if net.quantize or net.score is not None:
        what = f"{net.quantize} weights" if net.quantize else "a classifier"
        raise UserError(f"--export=onnx is for text models as trained: {model} has or is {what}")
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{error}: pip install onnx onnxscript onnxruntime") from None
    import onnxruntime

    c, size = net.config, sum(t.nbytes for t in saved_tensors(net).values())
    draw = torch.Generator().manual_seed(seed or 0)
    ids = lambda *shape: torch.randint(tok.n_vocab, shape, generator=draw)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=c.n_ctx)}
    how = dict(input_names=["ids"], output_names=["logits"], dynamic_shapes=(sizes,))
    how |= dict(dynamo=True, verbose=False, external_data=size > 1.5e9)  # protobuf ends at 2 GB
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(net, (ids(2, min(8, c.n_ctx)),), path, **how)
        except torch.onnx.OnnxExporterError as error:
            why = str(error).strip().splitlines()[-1]
            raise UserError(f"--export=onnx: torch cannot export this network: {why}") from None
    session, worst = onnxruntime.InferenceSession(str(path)), 0.0
    for given in (ids(1, 3), ids(3, min(c.n_ctx, 64)), ids(1, c.n_ctx)):
        with torch.no_grad():
            ours = net(given)
        theirs = torch.from_numpy(session.run(None, {"ids": given.numpy()})[0])
        worst = max(worst, ((theirs - ours).abs().max() / ours.abs().max()).item())
    print(f"largest difference of onnxruntime's logits: {worst:.1e} of the largest logit")
    if not worst < 1e-4:
        raise UserError("--export=onnx: these are not the model's logits; nothing was written")
    write_json(path.with_name("tokenizer.json"), tok.spec)
    write_json(path.with_name("tokenizer_config.json"), tok.config)


def convert(run):
    """Print the report and write the export that the settings ask for."""
    if export not in (None, "hf", "barelm", "gguf", "onnx"):
        raise UserError(f"--export={export}: expected hf, barelm, gguf or onnx")
    if gguf_type not in GGUF_TYPES:
        raise UserError(f"--gguf_type={gguf_type}: expected {', '.join(GGUF_TYPES)}")
    if report and not (prune or quantize):
        raise UserError("--report compares: add --quantize=int8, --quantize=int4 or --prune=0.5")
    done = [prune and prune.replace(":", "of"), quantize, export if export != "barelm" else None]
    done = [word for word in done if word and (word != "hf" or not prune)]
    if not export:
        return show_report(run)
    folder = out_dir if out_dir is not None else "-".join([str(Path(model)), *done])
    with locked_folder(folder):
        write_export(run, Path(folder))


def write_export(run, folder):
    """Write the export into the folder. It is made whole in a folder of its own, then what was
    there is taken apart, then it is moved: killed or out of space, this leaves the old, the new or
    what no reader opens."""
    files = {"gguf": f"{Path(model).resolve().name}-{gguf_type}.gguf", "onnx": "model.onnx"}
    path, part = folder / files.get(export, "model.safetensors"), folder / "export.tmp"
    found = [path] if path.exists() else []
    if export != "gguf":  # which is one file and may stand beside a model
        found += holds_model(folder)
    if found and not overwrite:
        raise UserError(f"{found[0]} is there already: --overwrite, or another --out_dir")
    if export != "gguf":
        refuse_source(folder, model)
    net, tok = compressed(run)
    if export == "hf":
        check_family(net)
    if prune or quantize:
        show_report(run)
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    try:
        make_folder(part)
        if export in ("hf", "barelm"):
            save(part, net, tok)
        else:
            writer = {"gguf": export_gguf, "onnx": export_onnx}[export]
            writer(net.float().cpu(), tok, part / path.name)
        if export != "gguf":
            path.unlink(missing_ok=True)
            clear_folder(folder)
        move_files(part, folder, last=path.name)
    except OSError as error:  # of the ONNX exporter, which writes its file itself
        why = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written: {why}; nothing was changed") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{path}: {os.path.getsize(path) / 1e6:,.2f} MB")


if __name__ == "__main__" and (report or export):
    convert(setup(device))
    sys.exit()

try:
    import h11
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise UserError(f"{error}: pip install -r requirements-serve.txt") from None

# --------------------------------------------------------------------------------------------------
# Metrics

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, math.inf)
METRICS = {  # name: (type, what it counts)
    "requests_total": ("counter", "Requests answered."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "reused_tokens_total": ("counter", "Of these, those that the cache held already."),
    "generated_tokens_total": ("counter", "Tokens generated."),
    "steps_total": ("counter", "Steps of the engine."),
    "queue_length": ("gauge", "Sequences that wait for a place in the batch."),
    "batch_size": ("gauge", "Sequences in the batch."),
    "batch_limit": ("gauge", "Places in the batch."),
    "first_token_seconds": ("histogram", "From a sequence's arrival to its first token."),
    "between_tokens_seconds": ("histogram", "From one token of a sequence to its next."),
    "request_seconds": ("histogram", "From a generating request's arrival to its end."),
}


class Metrics:
    """What /metrics shows. Each number is written by one thread."""

    def __init__(self):
        self.counts = Counter()  # by the line's name with its labels
        self.sums = Counter()  # of the histograms

    def observe(self, name, seconds):
        self.sums[name] += seconds
        self.counts[name, next(bound for bound in BOUNDS if seconds <= bound)] += 1

    def text(self, gauges):
        """The Prometheus text format, version 0.0.4."""
        lines, values = [], Counter({**self.counts, **gauges})
        for name, (kind, what) in METRICS.items():
            lines += [f"# HELP barelm_{name} {what}", f"# TYPE barelm_{name} {kind}"]
            if kind == "histogram":
                total = 0
                for bound in BOUNDS:
                    total += values[name, bound]
                    le = "+Inf" if bound == math.inf else bound
                    lines.append(f'barelm_{name}_bucket{{le="{le}"}} {total}')
                lines += [f"barelm_{name}_sum {self.sums[name]}", f"barelm_{name}_count {total}"]
                continue
            labels = sorted(key for key in values if str(key).startswith(name + "{"))
            lines += [f"barelm_{key} {values[key]}" for key in labels or [name]]
        return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# The engine: one thread, one network, one cache, and a batch that changes between steps


NOT_FINITE = "the network gives NaN or infinity here: its weights are damaged, or --dtype is too "
NOT_FINITE += "narrow for them (--dtype=float32 is the widest)"


class Job:
    """One sequence in the making.

    ids: the prompt. options: those of `choose_tokens` and `penalize`, with seed and stop. top: how
    many alternatives of each token to tell; None: no log-probabilities either. echo: the prompt's
    text where it belongs to the answer. What is new is told in the engine's thread by notify(job,
    text, tokens, done), tokens being (id, log p, {alternative: log p}); text is None where the job
    failed."""

    def __init__(self, tok, ids, limit, options, index=0, ends=(), top=None, echo=None):
        self.ids, self.options, self.index, self.top, self.echo = ids, options, index, top, echo
        self.scored = echo is not None and top is not None  # the prompt gets log-probabilities
        self.pieces, self.tokens = [echo or ""], [(ids[0], None, {})] if self.scored else []
        self.row = core.Row(tok, limit, options["stop"], self.pieces.append, ends)
        self.uniform = core.draws(options["seed"], index, limit)
        self.arrived, self.first, self.last = time.monotonic(), None, None  # of its tokens
        self.notify, self.gone, self.reused = None, False, 0
        self.error = "the step that this sequence was in failed"  # said where the text is None
        self.placed = core.TextStream()  # the text of all tokens told so far
        neutral = dict(repetition_penalty=1, presence_penalty=0, frequency_penalty=0)
        self.penalized = any(options[name] != value for name, value in neutral.items())
        self.counts = None  # (2, V): whether each token was seen, how often it was generated

    def tell(self, done):
        text, tokens, self.tokens = "".join(self.pieces), self.tokens, []
        self.pieces.clear()
        self.notify(self, text, tokens, done)

    def fail(self, why):
        self.error, self.row.done = why, True
        self.notify(self, None, [], True)


class Engine(threading.Thread):
    """The thread that owns the network.

    jobs[i] has row i of the cache: first those that decode, then at most one whose prompt is being
    read. Rows without a job keep what they held, for prompts that begin alike."""

    def __init__(self, net, tok, max_batch, max_len, chunk, max_queue):
        super().__init__(daemon=True)
        self.net, self.tok, self.metrics = net, tok, Metrics()
        self.max_batch, self.max_len, self.chunk = max_batch, max_len, chunk
        self.max_queue = max_queue
        self.longest = max(map(len, tok.bytes.values()))  # bytes of a token, at most
        self.turn_ends = []  # the token that ends an answer in a chat
        try:
            self.turn_ends = tok.end_of_turn() if tok.config.get("chat_template") else []
        except UserError as error:  # completions need no template
            print(f"chat ends at the end token alone: {error}")
        table = net.model.embed_tokens.weight
        kind = torch.float32 if table.device.type == "cpu" else table.dtype  # as in core.prefill
        self.cache = core.KVCache(net.config, max_batch, max_len, table.device, kind)
        self.jobs, self.waiting, self.calls = [], deque(), deque()
        self.held = [[] for _ in range(max_batch)]  # the ids whose keys and values a row has
        self.used_at = [0] * max_batch  # the step in which a row's last job left
        self.wake, self.stopped = threading.Condition(), False

    def submit(self, jobs):
        """Queue the jobs, all or none: whether there was room."""
        with self.wake:
            room = not self.waiting or len(self.waiting) + len(jobs) <= self.max_queue
            self.waiting.extend(jobs if room else ())
            self.wake.notify()
        return room

    def cancel(self, jobs):
        """Nobody waits for these any more: they leave before the next step."""
        with self.wake:
            for job in jobs:
                job.gone = True
                with suppress(ValueError):
                    self.waiting.remove(job)
            self.wake.notify()

    def call(self, f, *args):
        """A Future of f(*args), called between two steps: for whoever else needs the network."""
        future = Future()
        with self.wake:
            self.calls.append((future, f, args))
            self.wake.notify()
        return future

    def stop(self):
        """End the thread after its step: Python may not end while torch computes."""
        with self.wake:
            self.stopped = True
            self.wake.notify()
        self.join()

    def run(self):
        with generating(self.net), torch.inference_mode():
            # The first step packs the weights, for which no client should wait.
            try:
                core.feed(self.net, self.tok, self.cache.part(0, [0]), self.cache.lengths[:1, None])
            except Exception as error:  # then no other would succeed
                print(f"serve.py: the first step failed: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            while True:
                with self.wake:
                    while not (self.jobs or self.waiting or self.calls or self.stopped):
                        self.wake.wait()
                if self.stopped:
                    return
                if self.calls:  # one a step: many do not hold up the tokens
                    self.answer(*self.calls.popleft())
                try:
                    self.step()
                except Exception as error:  # no memory, say: the batch is lost, the server is not
                    print(f"serve.py: a step failed: {error!r}", file=sys.stderr, flush=True)
                    for job in self.jobs:
                        job.notify(job, None, [], True)
                    self.jobs, self.held = [], [[] for _ in self.held]

    def answer(self, future, f, args):
        """Make the call, for a Future that may have been given up meanwhile."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(f(*args))
        except UserError as error:
            future.set_exception(ApiError(400, str(error)))
        except Exception as error:
            future.set_exception(error)

    def step(self):
        """Every sequence gets its next token, those too whose prompts a chunk completes."""
        self.metrics.counts["steps_total"] += 1
        for i in reversed(range(len(self.jobs))):
            if self.jobs[i].gone:
                self.release(i)
        ready = [job for job, ids in zip(self.jobs, self.held) if len(ids) >= len(job.ids)]
        logits, room = [], self.chunk
        if ready:
            part = self.cache.part(0, [len(ids) for ids in self.held[: len(ready)]])
            for ids, job in zip(self.held, ready):
                ids.append(job.row.out.ids[-1])
            new = torch.tensor([ids[-1:] for ids in self.held[: len(ready)]])
            logits.append(core.feed(self.net, self.tok, part, new.to(part.lengths.device)))
        while room > 0 and (len(self.jobs) > len(ready) or self.admit()):
            room -= self.read_prompt(room, ready, logits)
        if ready:
            self.take(ready, torch.cat(logits))

    def admit(self):
        """Give the next job that waits the first free row: whether there were both. The row starts
        with the longest beginning of the prompt that any row holds."""
        n = len(self.jobs)
        with self.wake:
            if not self.waiting or n == self.max_batch:
                return False
            job = self.waiting.popleft()
            self.jobs.append(job)
        most = 0 if job.scored else len(job.ids) - 1  # logits come from what is fed
        found, source = max((common(ids, job.ids, most), i) for i, ids in enumerate(self.held))
        # A row that is to be continued is taken; else the one that was idle longest.
        row = min(range(n, self.max_batch), key=self.used_at.__getitem__)
        if source >= n and 2 * found >= len(self.held[source]):
            row = source
        elif found:
            self.cache.copy([row], [source], found)
        self.held[row] = job.ids[:found]
        self.swap(n, row)
        job.reused = found
        self.metrics.counts["prompt_tokens_total"] += len(job.ids)
        self.metrics.counts["reused_tokens_total"] += found
        return True

    def swap(self, i, j):
        """Exchange two rows of the cache."""
        if i != j:
            self.cache.copy([i, j], [j, i], max(len(self.held[i]), len(self.held[j])))
            for rows in (self.held, self.used_at):
                rows[i], rows[j] = rows[j], rows[i]

    def release(self, i):
        """The job in row i leaves: those that decode stay together, before the one that reads."""
        self.used_at[i], n = self.metrics.counts["steps_total"], len(self.jobs)
        decoding = n - (len(self.held[n - 1]) < len(self.jobs[n - 1].ids))
        for j in (decoding - 1, n - 1):
            if i < j:
                self.swap(i, j)
                self.jobs[i], self.jobs[j], i = self.jobs[j], self.jobs[i], j
        self.jobs.pop().counts = None

    def read_prompt(self, room, ready, logits):
        """Feed at most `room` tokens of the last job's prompt: how many. With the prompt's end the
        job is ready, and the logits after it are added."""
        job, held = self.jobs[-1], self.held[len(self.jobs) - 1]
        begin, new = len(held), job.ids[len(held) : len(held) + room]
        part = self.cache.part(len(self.jobs) - 1, [begin])
        h = self.net.hidden(torch.tensor([new], device=part.lengths.device), cache=part)
        held += new
        if not h.isfinite().all():  # before another prompt begins with what this one left
            self.fail(len(self.jobs) - 1)
            return len(new)
        if job.scored and (targets := job.ids[begin + 1 : len(held) + 1]):
            scores = core.head(self.net, self.tok, h[0, : len(targets)])
            job.tokens += self.describe(scores, targets, [job.top] * len(targets))
            if not all(self.finite(scores)):
                self.fail(len(self.jobs) - 1)
                return len(new)
        if len(held) == len(job.ids) and job.row.limit:
            ready.append(job)
            logits.append(core.head(self.net, self.tok, h[:, -1]))
        elif len(held) == len(job.ids):  # only the prompt was asked about
            job.tell(True)
            self.release(len(self.jobs) - 1)
        return len(new)

    def take(self, ready, logits):
        """Choose each ready job's token by its row of logits, and tell those who wait for it."""
        likely, some = logits, [i for i, job in enumerate(ready) if job.penalized]
        if some:
            likely = logits.clone()
            likely[some] = self.penalize([ready[i] for i in some], logits[some])
        names = ("temperature", "top_k", "top_p", "min_p")
        filters = {name: [job.options[name] for job in ready] for name in names}
        uniform = torch.stack([job.uniform[len(job.row.out.ids)] for job in ready])
        tokens = core.choose_tokens(likely, uniform.to(logits.device), **filters).tolist()
        told, now = self.describe(logits, tokens, [job.top for job in ready]), time.monotonic()
        self.metrics.counts["generated_tokens_total"] += len(ready)
        broken = [job for job, finite in zip(ready, self.finite(logits)) if not finite]
        for job, token in zip(ready, told):
            if job in broken:
                continue
            name = "between_tokens_seconds" if job.first else "first_token_seconds"
            self.metrics.observe(name, now - (job.last or job.arrived))
            job.first, job.last = job.first or now, now
            job.tokens.append(token)
            job.row.take(*token[:2])
            if job.counts is not None:
                job.counts[0, token[0]] = 1
                job.counts[1, token[0]] += 1
            if any(job.pieces) or job.row.done:
                job.tell(job.row.done)
        for i in reversed(range(len(self.jobs))):
            if self.jobs[i] in broken:
                self.fail(i)
            elif self.jobs[i].row.done:
                self.release(i)

    def finite(self, logits):
        """Of each row (V,) whether it has a finite number for every token: [bool]."""
        return logits[:, : self.tok.n_vocab].isfinite().all(-1).tolist()

    def fail(self, i):
        """The job in row i leaves with an error, and its keys and values with it: attention gives
        what is behind a row's end no weight, but 0 times NaN is NaN."""
        self.jobs[i].fail(NOT_FINITE)
        self.release(i)
        row = len(self.jobs)  # where release puts it
        self.held[row] = []
        self.cache.store[:, :, row] = 0

    def describe(self, logits, ids, tops):
        """[(id, log p, {alternative: log p})] of ids by their rows of logits; of as many
        alternatives as `tops` says for each row, None: nothing."""
        if all(top is None for top in tops):
            return [(id, 0.0, {}) for id in ids]
        chances = logits.log_softmax(-1)
        chosen = chances.gather(1, torch.tensor(ids, device=chances.device)[:, None])[:, 0]
        best = chances.topk(min(max(top or 0 for top in tops), self.tok.n_vocab))
        rows = zip(ids, chosen.tolist(), tops, best.indices.tolist(), best.values.tolist())
        return [(id, lp, dict(zip(other[: top or 0], v))) for id, lp, top, other, v in rows]

    def penalize(self, jobs, logits):
        for job in jobs:
            if job.counts is None:
                job.counts = logits.new_zeros(2, logits.shape[1])
                job.counts[0, torch.tensor(job.ids, device=logits.device)] = 1
        seen, counts = torch.stack([job.counts for job in jobs], 1)
        column = lambda name: logits.new_tensor([[job.options[name]] for job in jobs])
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        repetition, presence, frequency = map(column, names)
        return core.penalize(logits, seen > 0, repetition, counts, presence, frequency)


def common(a, b, most):
    """How many items two lists have in common from their beginnings on, at most `most`."""
    most = min(most, len(a), len(b))
    return most if a[:most] == b[:most] else next(i for i in range(most) if a[i] != b[i])


# --------------------------------------------------------------------------------------------------
# The protocol: what a request may say, and how it is answered


class ApiError(HTTPException):
    """An answer that is an error: its status, and what OpenAI's clients read of it."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(status, message)
        self.param, self.code = param, code


def reply(value, status=200, headers=None):
    """A response of JSON, in ASCII: half a surrogate pair has no UTF-8."""
    text = json.dumps(value, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def event_line(value):
    """A server-sent event of JSON."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


def error_body(error):
    kind = {429: "rate_limit_error"}.get(error.status_code, "invalid_request_error")
    kind = "server_error" if error.status_code >= 500 else kind
    more = {"param": getattr(error, "param", None), "code": getattr(error, "code", None)}
    return {"error": {"message": error.detail, "type": kind} | more}


def error_reply(error):
    extra = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    extra[503] = {"Retry-After": "1", "Connection": "close"}
    return reply(error_body(error), error.status_code, extra.get(error.status_code, error.headers))


def short(value):
    """A value as an error message shows it."""
    text = type(value).__name__ if isinstance(value, (list, dict)) else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


async def read_body(request):
    """The JSON object of a request."""
    data, declared = bytearray(), request.headers.get("content-length", "0")

    async def read():
        async for piece in request.stream():
            data.extend(piece)
            if max(len(data), int(declared)) > max_body:
                raise ApiError(413, f"the body has more than {max_body} bytes (--max_body)")

    def refuse(word):
        raise ValueError(f"{word} is no number of JSON's")

    try:
        await asyncio.wait_for(read(), client_timeout)
        body = json.loads(data.decode(), parse_constant=refuse)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took more than {client_timeout:g} s") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {short(str(error))}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"expected a JSON object, not {short(body)}")
    return body


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
NAMES |= {list: "a list", dict: "an object"}
PENALTIES = {"presence_penalty": (float, 0.0, -2, 2), "frequency_penalty": (float, 0.0, -2, 2)}
PENALTIES |= {"repetition_penalty": (float, 1.0, 0.01, 100)}
BOTH = PENALTIES | {  # name: (type, default, least, most)
    "model": (str, None),
    "max_tokens": (int, None, 0, 2**31),
    "temperature": (float, 1.0, 0, 100),
    "top_k": (int, 0, -1, 2**31),
    "top_p": (float, 1.0, 0, 1),
    "min_p": (float, 0.0, 0, 1),
    "n": (int, 1, 1, 128),
    "seed": (int, None, -(2**63), 2**63 - 1),
    "stop": (object, []),
    "ignore_eos": (bool, False),
    "stream": (bool, False),
    "stream_options": (dict, {}),
}
COMPLETION = {"prompt": (object, None), "echo": (bool, False), "logprobs": (int, None, 0, 20)}
COMPLETION |= BOTH | {"best_of": (int, None, 1, 128), "add_special_tokens": (bool, True)}
CHAT = {"messages": (list, []), "logprobs": (bool, False), "top_logprobs": (int, 0, 0, 20)}
CHAT |= BOTH | {"max_completion_tokens": (int, None, 0, 2**31)}
STREAM_OPTIONS = {"include_usage": (bool, False)}
TOKENIZE = {"prompt": (str, None), "messages": (list, None), "model": (str, None)}
TOKENIZE |= {"add_special_tokens": (bool, None), "return_token_strs": (bool, False)}
DETOKENIZE = {"tokens": (object, None), "model": (str, None)}

# What changes no answer, so that any value of its type may be there: names of the client's own, and
# llama.cpp's settings of samplers that are off here (AS_IT_IS refuses to turn them on).
IGNORED = dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), str)
IGNORED |= {"prompt_cache_retention": str, "metadata": dict, "dry_sequence_breakers": list}
IGNORED |= dict.fromkeys(("dry_base", "mirostat_tau", "mirostat_eta", "xtc_threshold"), float)
IGNORED |= {"dry_allowed_length": int, "dry_penalty_last_n": int, "dynatemp_exponent": float}
# What this server does not have, with the values that ask for what it does anyway. These may be
# there; any other is refused, so that none is taken and ignored.
AS_IT_IS = {  # OpenAI's
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}, []],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],  # no tool is called
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "verbosity": ["medium"],
}
AS_IT_IS |= {  # vLLM's
    "add_generation_prompt": [True],
    "add_special_tokens": [False],  # of a chat, whose template puts what it wants
    "bad_words": [[]],
    "chat_template_kwargs": [{}],
    "continue_final_message": [False],
    "detokenize": [True],
    "documents": [[]],
    "early_stopping": [False],
    "echo": [False],
    "flat_logprobs": [False],
    "include_reasoning": [True, False],  # none is told apart from the answer
    "include_stop_str_in_output": [False],
    "length_penalty": [1, 1.0],
    "logits_processors": [[]],
    "min_tokens": [0],
    "mm_processor_kwargs": [{}],
    "priority": [0],
    "return_token_ids": [False],
    "return_tokens_as_token_ids": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True, False],  # the text has no special tokens
    "stop_token_ids": [[]],
    "use_beam_search": [False],
    "vllm_xargs": [{}],
}
AS_IT_IS |= {  # llama.cpp's
    "cache_prompt": [True],
    "dry_multiplier": [0, 0.0],
    "dynatemp_range": [0, 0.0],
    "grammar": [""],
    "id_slot": [-1],
    "lora": [[]],
    "min_keep": [0],
    "mirostat": [0],
    "n_discard": [0],
    "n_indent": [0],
    "n_keep": [0],
    "n_probs": [0],
    "parse_tool_calls": [False],
    "penalize_nl": [False],
    "post_sampling_probs": [False],
    "reasoning_format": ["none"],
    "repeat_last_n": [-1],
    "repeat_penalty": [1, 1.0],
    "response_fields": [[]],
    "return_progress": [False],
    "return_tokens": [False],
    "tfs_z": [1, 1.0],
    "thinking_forced_open": [False],
    "timings_per_token": [False],
    "top_n_sigma": [-1, -1.0],
    "typical_p": [1, 1.0],
    "xtc_probability": [0, 0.0],
}
OF_STREAMS = {"include_obfuscation": [False], "continuous_usage_stats": [False]}


def is_one_of(value, others):
    """Whether it is one of these values of JSON, of the same type too: True is not 1."""
    return any(type(value) is type(other) and value == other for other in others)


def is_kind(value, kind):
    """Whether a value of JSON is of this type; a whole number is a number too, true is neither."""
    return type(value) is kind or kind is float and type(value) is int


def check_other(name, value, known, neutral):
    """Refuse a field that the request's table `known` does not have, unless it asks for nothing
    that is not done anyway."""
    if value is None or is_one_of(value, neutral.get(name, [])):
        return
    if neutral is AS_IT_IS and name in IGNORED:
        if not is_kind(value, IGNORED[name]):
            why = f"{name} = {short(value)}: expected {NAMES[IGNORED[name]]}"
            raise ApiError(400, why, name)
        return
    name = name[:60]
    hint = ""
    if name in neutral:
        expected = " or ".join(json.dumps(other) for other in neutral[name])
        hint = f": expected {expected}, not {short(value)}"
    elif near := difflib.get_close_matches(name, known, 1):
        hint = f" (did you mean {near[0]!r}?)"
    raise ApiError(400, f"{short(name)} is not supported{hint}", name)


def read_fields(body, known, neutral=AS_IT_IS):
    """The request's values by name, checked, with the defaults of `known`. neutral: the values that
    other fields may have."""
    for name, value in body.items():
        if name not in known:
            check_other(name, value, known, neutral)
    o = {}
    for name, (kind, default, *ends) in known.items():
        value = o[name] = default if body.get(name) is None else body[name]
        if value is default or kind is object:
            continue
        if not is_kind(value, kind) or ends and not ends[0] <= value <= ends[1]:
            limits = f" from {ends[0]} to {ends[1]}" if ends else ""
            raise ApiError(400, f"{name} = {short(value)}: expected {NAMES[kind]}{limits}", name)
    return o


def read_options(body, known):
    """The same for a request to generate."""
    o = read_fields(body, known)
    if o.get("best_of") not in (None, o["n"]):
        raise ApiError(400, "best_of is not supported: ask for n, with logprobs", "best_of")
    if o.get("top_logprobs") and not o["logprobs"]:
        raise ApiError(400, "top_logprobs wants logprobs = true beside it", "top_logprobs")
    o["stream_options"] = read_fields(o["stream_options"], STREAM_OPTIONS, OF_STREAMS)
    stop = [o["stop"]] if isinstance(o["stop"], str) else o["stop"]
    texts = isinstance(stop, list) and all(isinstance(s, str) and len(s) <= 256 for s in stop)
    if not texts or len(stop) > 16:
        raise ApiError(400, "stop: expected a string, or up to 16, of up to 256 characters", "stop")
    o["stop"], o["top_k"] = [s for s in stop if s], max(o["top_k"], 0)
    if o["seed"] is None:
        o["seed"] = random.getrandbits(48) if seed is None else seed
    return o


def too_long(engine, what):
    why = f"{what} do not fit the {engine.max_len} tokens for a prompt and its answer"
    return ApiError(400, why, code="context_length_exceeded")


async def tokenized(engine, size, f, *args):
    """f(*args), which tokenizes about `size` characters, in another thread; what it refuses is the
    client's error."""
    if size > 4 * engine.longest * engine.max_len:
        raise too_long(engine, f"{size} characters")

    def plainly():
        try:
            return f(*args)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        except BaseException as error:  # tiktoken panics where its regular expressions fail
            raise ApiError(400, f"not to be tokenized: {short(str(error))}") from None

    return await asyncio.to_thread(plainly)


def is_ids(tok, value):
    return isinstance(value, list) and all(type(i) is int and 0 <= i < tok.n_vocab for i in value)


async def read_prompts(engine, value, bare=False):
    """The prompts of a completion as ids: a text, ids, or a list of either. bare: a text gets no
    special token before it."""
    one = not isinstance(value, list) or value and type(value[0]) is int
    prompts = [value] if one else value
    if len(prompts) > engine.max_queue:
        raise ApiError(400, f"{len(prompts)} prompts: expected {engine.max_queue} at most")
    if prompts and all(isinstance(p, str) for p in prompts):
        encode, size = engine.tok.encode if bare else engine.tok.prompt, max(map(len, prompts))
        prompts = await tokenized(engine, size, lambda: [encode(p) for p in prompts])
    if not prompts or not all(p and is_ids(engine.tok, p) for p in prompts):
        why = f"expected a text, or ids from 0 to {engine.tok.n_vocab - 1}, or a list of either"
        raise ApiError(400, f"prompt: {why}; none of them empty", "prompt")
    return prompts


def message_text(content):
    """The text of a message's content, a text or a list of parts; None where it is neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        # cache_control, some clients', says what is worth keeping, and changes no answer.
        if not isinstance(part, dict) or part.keys() - {"type", "text", "cache_control"}:
            return None
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


def read_message(message, where):
    """A message with the role and the text that it has; `where` it stands, for what is wrong."""
    why = "expected {'role': system, user or assistant, 'content': a text}"
    if not isinstance(message, dict):
        raise ApiError(400, f"{where}: {why}", "messages")
    for name, value in message.items():
        # An earlier answer comes back with all its fields, most of which are empty.
        empty = value is None or is_one_of(value, ["", [], {}])
        if name not in ("role", "content", "name") and not empty:
            raise ApiError(400, f"{where}: {short(name)} is not supported", "messages")
    role, text = message.get("role"), message_text(message.get("content"))
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant") or text is None:
        raise ApiError(400, f"{where}: {why}", "messages")
    speaker = message.get("name")
    if speaker is None or speaker == "":
        return {"role": role, "content": text}
    if not isinstance(speaker, str):
        raise ApiError(400, f"{where}: name: expected a text", "messages")
    return {"role": role, "content": text, "name": speaker}  # which some templates show


async def read_messages(engine, messages):
    """The ids of a conversation, ready for the answer."""
    if not messages:
        raise ApiError(400, "messages: expected a list of {'role', 'content'}", "messages")
    if len(messages) > engine.max_len:
        raise too_long(engine, f"{len(messages)} messages")
    safe = [read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    size = sum(len(text) for m in safe for text in m.values())
    ids, _ = await tokenized(engine, size, engine.tok.chat, safe, True)
    return ids


def make_jobs(engine, prompts, o, chat):
    """n jobs for each prompt by the request's options o; a job's index is its choice's."""
    tok, jobs = engine.tok, []
    if len(prompts) * o["n"] > engine.max_queue:
        why = f"{len(prompts)} prompts, each {o['n']} times: expected {engine.max_queue} at most"
        raise ApiError(400, why, "n")
    top = o["logprobs"] if not chat else o["top_logprobs"] if o["logprobs"] else None
    ends = [] if o["ignore_eos"] else [*tok.eos_ids, *engine.turn_ends[: int(chat)]]
    texts = o["prompt"] if not chat and isinstance(o["prompt"], list) else [o.get("prompt")]
    for i, ids in enumerate(prompts):
        room, limit = engine.max_len - len(ids), o["max_tokens"]
        if limit is None:
            limit = max(min(room, room if chat else 16), 1)
        if limit > room:
            raise too_long(engine, f"a prompt of {len(ids)} tokens and {limit} more")
        echo = None
        if o.get("echo"):
            echo = texts[i] if isinstance(texts[0], str) else decode(tok, ids)
        for _ in range(o["n"]):
            jobs.append(Job(tok, ids, limit, o, len(jobs), ends, top, echo))
    return jobs


def start(request, jobs):
    """Queue the jobs: an asyncio.Queue of what they tell."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()

    def notify(*event):
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(queue.put_nowait, event)

    for job in jobs:
        job.notify = notify
    if not app.state.engine.submit(jobs):
        raise ApiError(429, "the queue is full: try again", code="queue_full")
    request.scope["record"].jobs = jobs  # the Front cancels what is not done at the end
    return queue


async def follow(request, jobs, queue):
    """What the jobs tell, (job, text, tokens, done), until all are done, the client has left, or
    the time is over."""

    async def watch():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        queue.put_nowait(ClientDisconnect())

    late = ApiError(504, f"the request took more than {timeout:g} s (--timeout)", code="timeout")
    clock = asyncio.get_running_loop().call_later(timeout, queue.put_nowait, late)
    watcher, left = asyncio.create_task(watch()), len(jobs)
    try:
        while left:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event[1] is None:
                raise ApiError(500, event[0].error)
            left -= event[3]
            yield event
    finally:
        watcher.cancel()
        clock.cancel()


def usage(jobs):
    """The tokens of a request: of its prompts, each counted once, and of its answers."""
    first = {id(job.ids): job for job in reversed(jobs)}.values()
    asked, made = sum(len(j.ids) for j in first), sum(len(j.row.out.ids) for j in jobs)
    out = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    return out | {"prompt_tokens_details": {"cached_tokens": sum(j.reused for j in first)}}


def decode(tok, ids):
    """The text of ids without special tokens."""
    return b"".join(map(tok.token_bytes, ids)).decode(errors="replace")


def name_of(tok, id):
    """A token as the protocol shows it: as its bytes where they are no whole UTF-8."""
    data = tok.shown.get(id, b"")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def completion_logprobs(tok, job, tokens):
    """OpenAI's arrays for (id, log p, alternatives); a text's first token has no log p."""
    out = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for id, lp, tops in tokens:
        out["tokens"].append(name_of(tok, id))
        out["token_logprobs"].append(lp)
        # Of tokens that look alike the likeliest is told.
        named = {name_of(tok, i): p for i, p in [(id, lp), *reversed(tops.items())]}
        out["top_logprobs"].append(None if lp is None else named)
        out["text_offset"].append(len(job.placed.text))
        job.placed.feed(tok.token_bytes(id))
    return out


def chat_logprobs(tok, job, tokens):
    def entry(id, lp):
        data = list(tok.shown.get(id, b""))
        return {"token": name_of(tok, id), "logprob": lp, "bytes": data}

    tops = lambda others: {"top_logprobs": [entry(*other) for other in others.items()]}
    return {"content": [entry(id, lp) | tops(others) for id, lp, others in tokens]}


def check_model(name):
    if name not in (None, app.state.name):
        why = f"no model {short(name)} here: this server has {app.state.name!r}"
        raise ApiError(404, why, "model", "model_not_found")


app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@app.exception_handler(HTTPException)
async def refused(request, error):
    if not isinstance(error, ApiError):  # the router's own words name no path
        error.detail = f"{request.method} {short(request.scope['path'])}: {error.detail}"
    return error_reply(error)


@app.post("/v1/completions")
async def completions(request: Request):
    o = read_options(await read_body(request), COMPLETION)
    check_model(o["model"])
    prompts = await read_prompts(app.state.engine, o["prompt"], not o["add_special_tokens"])
    return await answer(request, o, prompts, chat=False)


@app.post("/v1/chat/completions")
async def chat_completions(request: Request):
    o = read_options(await read_body(request), CHAT)
    check_model(o["model"])
    if o["max_tokens"] is None:
        o["max_tokens"] = o["max_completion_tokens"]
    if o["max_completion_tokens"] not in (None, o["max_tokens"]):
        why = "max_tokens and max_completion_tokens are two names of one limit: give one of them"
        raise ApiError(400, why, "max_tokens")
    prompt = await read_messages(app.state.engine, o["messages"])
    return await answer(request, o, [prompt], chat=True)


async def answer(request, o, prompts, chat):
    """The response to a request of options o: one JSON object, or a stream of them."""
    engine, stream = app.state.engine, o["stream"]
    jobs = make_jobs(engine, prompts, o, chat)
    queue = start(request, jobs)
    kind = "chat.completion" + ".chunk" * stream if chat else "text_completion"
    head = {"id": ("chatcmpl-" if chat else "cmpl-") + os.urandom(12).hex(), "object": kind}
    head |= {"created": int(time.time()), "model": app.state.name}
    describe = chat_logprobs if chat else completion_logprobs

    def choice(job, said, tokens=(), done=False):
        logprobs = describe(engine.tok, job, tokens) if tokens and job.top is not None else None
        finish = job.row.out.finish_reason if done else None
        return {"index": job.index} | said | {"logprobs": logprobs, "finish_reason": finish}

    if stream:
        choices = stream_choices(request, jobs, queue, choice, chat)
        counted = o["stream_options"]["include_usage"]
        lines = stream_lines(head, choices, counted, jobs)
        request.scope["record"].streams = True
        return StreamingResponse(lines, media_type="text/event-stream")
    texts, told = [""] * len(jobs), [[] for _ in jobs]
    async for job, text, tokens, _ in follow(request, jobs, queue):
        texts[job.index] += text
        told[job.index] += tokens
    if chat:
        said = [{"message": {"role": "assistant", "content": text}} for text in texts]
    else:
        said = [{"text": text} for text in texts]
    choices = [choice(job, *more, True) for job, *more in zip(jobs, said, told)]
    return reply(head | {"choices": choices, "usage": usage(jobs)})


async def stream_choices(request, jobs, queue, choice, chat):
    """The choices of a stream's chunks, as choice(job, what is said, tokens, done) makes them."""
    for job in jobs if chat else ():
        yield choice(job, {"delta": {"role": "assistant", "content": ""}})
    async for job, text, tokens, done in follow(request, jobs, queue):
        if not chat:
            yield choice(job, {"text": text}, tokens, done)
            continue
        if text or tokens:
            yield choice(job, {"delta": {"content": text}}, tokens)
        if done:
            yield choice(job, {"delta": {}}, (), True)


async def stream_lines(head, choices, counted, jobs):
    """Server-sent events of a stream: a chunk for each choice, at the end the usage if counted."""
    try:
        async for choice in choices:
            yield event_line(head | {"choices": [choice]} | ({"usage": None} if counted else {}))
        if counted:
            yield event_line(head | {"choices": [], "usage": usage(jobs)})
        yield "data: [DONE]\n\n"
    except ApiError as error:  # too late for a status
        yield event_line(error_body(error))


@app.get("/v1/models")
async def models():
    return reply({"object": "list", "data": [app.state.card]})


@app.get("/v1/models/{name:path}")
async def one_model(name: str):
    check_model(name)
    return reply(app.state.card)


@app.post("/tokenize")
async def tokenize(request: Request):
    """The ids of {"prompt"}, a text (bare where "add_special_tokens" is false), or of {"messages"}.
    A bare prompt that is the name of a special token is that token: so lm-eval finds out its id."""
    engine = app.state.engine
    o = read_fields(await read_body(request), TOKENIZE)
    check_model(o["model"])
    text, bare = o["prompt"], o["add_special_tokens"] is False
    if text is None and o["add_special_tokens"]:
        why = "the chat template alone adds special tokens to messages"
        raise ApiError(400, f"add_special_tokens = True: {why}", "add_special_tokens")
    if text is not None and o["messages"] is not None:
        raise ApiError(400, "expected prompt or messages, not both", "messages")
    if text is None:
        ids = await read_messages(engine, o["messages"])
    elif bare and text in engine.tok.special:
        ids = [engine.tok.special[text]]
    else:
        encode = engine.tok.encode if bare else engine.tok.prompt
        ids = await tokenized(engine, len(text), encode, text)
    out = {"tokens": ids, "count": len(ids), "max_model_len": engine.max_len}
    if o["return_token_strs"]:
        out["token_strs"] = [name_of(engine.tok, id) for id in ids]
    return reply(out)


@app.post("/detokenize")
async def detokenize(request: Request):
    tok, o = app.state.engine.tok, read_fields(await read_body(request), DETOKENIZE)
    check_model(o["model"])
    if not is_ids(tok, o["tokens"]):
        raise ApiError(400, f"tokens: expected ids from 0 to {tok.n_vocab - 1}", "tokens")
    return reply({"prompt": tok.decode(o["tokens"])})


@app.get("/tokenizer_info")
async def tokenizer_info():
    tok = app.state.engine.tok
    special = {"bos_token": tok.bos_id, "eos_token": [*tok.eos_ids, None][0]}
    special["pad_token"] = tok.pad_id
    named = {key: None if id is None else tok.decode([id]) for key, id in special.items()}
    return reply(named | {"chat_template": tok.config.get("chat_template")})


@app.api_route("/health", methods=["GET", "HEAD"])
async def health():
    if not app.state.engine.is_alive():
        raise ApiError(503, "the engine has stopped")
    return reply({"status": "ok"})


@app.get("/metrics")
async def metrics():
    engine = app.state.engine
    gauges = {"queue_length": len(engine.waiting), "batch_size": len(engine.jobs)}
    text = engine.metrics.text(gauges | {"batch_limit": engine.max_batch})
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


class Front:
    """What every request passes: the key, the time for each write, the books."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = SimpleNamespace(jobs=[], status=None, streams=False, begun=time.monotonic())
        scope["record"] = record

        async def patient_send(message):
            record.status = message.get("status", record.status)
            await asyncio.wait_for(send(message), client_timeout)

        try:
            answer = self.app if (wrong := refusal(scope)) is None else error_reply(wrong)
            await answer(scope, receive, patient_send)
        except (ClientDisconnect, asyncio.TimeoutError):
            record.status = record.status or 499  # nginx's: the client left before the answer
        except (Exception, asyncio.CancelledError) as error:
            wrong, why = ApiError(500, "the server failed at this request"), repr(error)
            if isinstance(error, asyncio.CancelledError):  # uvicorn stops
                wrong = ApiError(503, "the server is stopping")
                why = f"cut off after --drain={drain:g} s"
                if app.state.server.force_exit:
                    why = "cut off by a second Ctrl-C"
            print(f"serve.py: {scope['path']!r}: {why}", file=sys.stderr, flush=True)
            if record.status is None:
                await error_reply(wrong)(scope, receive, patient_send)
            elif record.streams:  # too late for a status
                last = {
                    "type": "http.response.body",
                    "body": event_line(error_body(wrong)).encode(),
                }
                with suppress(asyncio.TimeoutError):  # a client that does not read
                    await asyncio.wait_for(send(last), 1)
        finally:
            app.state.engine.cancel(record.jobs)
            book(scope, record)
            record.jobs = []  # the connection may keep the record for a while


FULL = ApiError(503, "all connections are taken (--max_connections): try again", code="full")


def refusal(scope):
    """The ApiError of a request on a connection too many, without the key, or which a web page of
    another site makes its visitor's browser send to this machine; None where it may pass."""
    headers = dict(scope["headers"])
    if scope.get("state", {}).get("full") and scope["path"] not in ("/health", "/metrics"):
        return FULL
    if api_key:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        known = kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), api_key.encode())
        if not known and scope["path"] not in ("/", "/health", "/metrics"):
            return ApiError(401, "expected Authorization: Bearer KEY", code="invalid_api_key")
        return None
    named = headers.get(b"host", b"").decode("latin-1").lower()
    # No browser leaves it out, as HTTP/1.0 may.
    if app.state.loopback and b"host" in headers and not is_local(named):  # DNS rebinding
        return ApiError(
            403, f"{short(named)} is no name of this machine's: --api_key lets others in"
        )
    if scope["method"] == "POST" and from_elsewhere(scope["headers"]):
        return ApiError(403, "a page of another site asks: --cors=SITE lets it")
    return None


def is_local(authority):
    """Whether a name with or without a port, in lower case, may be this machine's: an address, one
    word, or a name in .localhost, .local or .internal, which no stranger can register."""
    form = r"(\[[0-9a-f:.]+\]|[a-z0-9_-]+(\.[a-z0-9_-]+)*)\.?(:[0-9]*)?"
    if not (match := re.fullmatch(form, authority)):
        return False
    words = match[1].split(".")
    if words[0].startswith("[") or len(words) == 1:
        return True
    return words[-1].isdigit() or words[-1] in ("localhost", "local", "internal")


def from_elsewhere(headers):
    """Whether a page of a site asks that is neither this server's, nor on this machine, nor named
    by --cors. Browsers say so, older ones by the Origin alone; others say nothing. headers: ASGI's
    pairs of bytes; of a name that is there twice all count."""
    values = lambda name: b",".join(value for key, value in headers if key == name)
    site = values(b"sec-fetch-site").decode("latin-1").lower()
    origin = values(b"origin").decode("latin-1").lower()
    if site in ("same-origin", "same-site", "none") or not site and not origin:
        return False
    if not site and is_local(origin.partition("://")[2]):
        return False
    return "*" not in cors_sites() and origin not in cors_sites()


def cors_sites():
    """The origins that --cors names."""
    sites = [site.strip().lower().rstrip("/") for site in (cors or "").split(",")]
    return [site for site in sites if site]


def book(scope, record):
    """Count a request that has ended, and write its line to the log."""
    engine, jobs, took = app.state.engine, record.jobs, time.monotonic() - record.begun
    path = getattr(scope.get("route"), "path", "other")  # wrong ones are no names of metrics
    engine.metrics.counts[f'requests_total{{path="{path}",status="{record.status}"}}'] += 1
    if jobs:
        engine.metrics.observe("request_seconds", took)
    if not app.state.log:
        return
    row = {"time": round(time.time(), 3), "client": (scope["client"] or ["?"])[0]}
    row |= {"method": scope["method"], "path": scope["path"], "status": record.status}
    row |= {"seconds": round(took, 4)}
    if jobs:
        firsts = [job.first - record.begun for job in jobs if job.first]
        row |= usage(jobs) | {"first_token": round(min(firsts), 4) if firsts else None}
        row["finish"] = [job.row.out.finish_reason if job.row.done else None for job in jobs]
        if log_prompts:
            row["prompts"] = [decode(engine.tok, job.ids) for job in jobs]
            row["answers"] = [job.row.out.text for job in jobs]
    try:
        app.state.log.write(json.dumps(row) + "\n")
        app.state.log.flush()
    except OSError as error:  # a full disk ends no answer; said once, not by each request
        if not app.state.log_failed:
            print(f"serve.py: --log={log}: {error.strerror}", file=sys.stderr, flush=True)
        app.state.log_failed = True
    else:
        app.state.log_failed = False


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection where for client_timeout seconds no request is under way
    and none begins, or the head of one does not end. A connection too many waits for its request
    no more than a moment."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.full = self.app_state.get("full", False)
        self.patience = min(client_timeout, 0.2) if self.full else client_timeout
        self.look(None)

    def look(self, before):
        if self not in self.connections:  # it has ended
            return
        if self.transport.is_closing():  # and its client does not read what is left
            return self.transport.abort()
        idle = self.cycle is None or self.cycle.response_complete
        if before and idle and before == [self.cycle]:
            if self.full and self.cycle is None:
                self.write_error(FULL)
            self.transport.close()
        self.loop.call_later(self.patience, self.look, [self.cycle])

    def send_400_response(self, msg):
        """The answer to what is no HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else another is under way
            self.write_error(ApiError(400, msg))
        self.transport.close()

    def write_error(self, error):
        """An answer where there is no request that it belongs to."""
        body = json.dumps(error_body(error)).encode()
        head = f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write((head + "Connection: close\r\n\r\n").encode() + body)


SPARE_CONNECTIONS = 100  # beyond max_connections, to answer 503 on
OWN_FILES = 32  # that the process has open at times, connections apart


class Server(uvicorn.Server):
    """uvicorn's, which accepts so many connections alone as there may be. asyncio's own way takes
    all that come, and writes a traceback for each that finds no file descriptor left."""

    def __init__(self, config, most, spare):
        super().__init__(config)
        self.most, self.spare, self.interrupted = most, spare, False

    def handle_exit(self, sig, frame):
        """The first signal lets requests finish, a Ctrl-C behind it ends them, a third everything,
        such as a thread that does not come back."""
        if self.force_exit:
            os._exit(128 + sig)
        if sig == signal.SIGINT:
            self.interrupted, self.force_exit = True, self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self):
        """uvicorn's would raise the signals again when all is done; `serve` has set ours."""
        yield

    async def startup(self, sockets=None):
        await super().startup([])
        self.accepting = asyncio.create_task(self.accept(sockets[0]))

    async def shutdown(self, sockets=None):
        self.accepting.cancel()
        with suppress(asyncio.CancelledError):
            await self.accepting
        await super().shutdown(sockets)
        tasks = [*self.server_state.tasks]  # uvicorn has ended them where --drain was too short
        for task in tasks if self.force_exit else ():
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)  # they tell their clients

    async def accept(self, sock):
        loop, connections = asyncio.get_running_loop(), self.server_state.connections
        sock.setblocking(False)
        told = -math.inf  # when a failure was told
        while True:
            while len(connections) >= self.most + self.spare:
                await asyncio.sleep(0.05)
            try:
                client, _ = await loop.sock_accept(sock)
                state = {"full": len(connections) >= self.most}
                protocol = PatientProtocol(self.config, self.server_state, state)
                await loop.connect_accepted_socket(lambda: protocol, client)
            except Exception as error:  # no descriptor left on the machine, say
                if time.monotonic() > told + 60:
                    print(f"serve.py: accept: {error}", file=sys.stderr, flush=True)
                    told = time.monotonic()
                await asyncio.sleep(0.5)


# --------------------------------------------------------------------------------------------------
# Looking inside: the page, and what it shows of the network and its run. Nothing here changes them

MAP_TOKENS = 128  # the longest text whose attention is shown
LOG_ROWS = 2000  # the most rows of training in one answer: of more, every so manieth


def model_parts(net):
    """The network's layers in their order, each with its shape and number of parameters, which is
    0 for a head whose matrix is the embedding's: together, all parameters there are."""
    parts = []
    for name, layer in net.named_modules():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if weight is None:
            continue
        quantized, tied = isinstance(layer, QuantizedLinear), net.config.tie
        shape, tied = layer.shape if quantized else weight.shape, tied and name == "lm_head"
        params = 0 if tied else math.prod(shape) + (0 if bias is None else bias.numel())
        parts.append(dict(name=name, shape=list(shape), params=params, tied=tied))
    return parts


def attention_maps(net, ids, layer):
    """softmax(q k^T / sqrt(D)) (n_head, T, T) float32 of one layer, from the q and k that it makes
    in a pass over ids, a list: row i is what token i looks at."""
    attention, seen = net.model.layers[layer].self_attn, []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.extend(args[:2]))
    try:
        net.hidden(torch.tensor([ids], device=net.model.embed_tokens.weight.device))
    finally:
        hook.remove()
    q, k = (x[0].float() for x in attention.qkv(*seen)[:2])
    scores = q @ k.repeat_interleave(len(q) // len(k), 0).mT / math.sqrt(q.shape[-1])
    if not scores.isfinite().all():
        raise ApiError(500, NOT_FINITE)
    behind = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(behind, -math.inf).softmax(-1).cpu()


def nearest(net, n_vocab, token, n):
    """[(id, cosine)] of the n tokens whose embeddings point most nearly where that of `token` does,
    itself left out."""
    table = net.model.embed_tokens.weight[:n_vocab]
    parts = table.split(8192)  # not all of them in float32 at once
    cosines = [F.cosine_similarity(part.float(), table[token].float(), dim=-1) for part in parts]
    cosines = torch.cat(cosines)
    if not cosines.isfinite().all():
        raise ApiError(500, NOT_FINITE)
    cosines[token] = -math.inf
    found = cosines.topk(min(n, n_vocab - 1))
    return list(zip(found.indices.tolist(), found.values.tolist()))


def log_rows(path, after):
    """(the rows of a log.jsonl behind step `after`, the last step there is or -1). Many are
    thinned, but for the evaluations; a row that is being written waits for the next time."""
    data = path.read_bytes() if path.is_file() else b""
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    row = lambda line: json.loads(line, parse_constant=lambda word: None)  # NaN is no JSON
    new = lines[bisect.bisect_right(lines, after, key=lambda line: row(line)["step"]) :]
    every = max(1, -(-len(new) // LOG_ROWS))
    kept = [line for i, line in enumerate(new) if i % every == 0 or b'"val_' in line]
    return [row(line) for line in kept[-2 * LOG_ROWS :]], row(lines[-1])["step"] if lines else -1


async def read_text(engine, o, encode):
    """The ids of the request's text by `encode`, or its ids."""
    if o["text"] is not None and o["ids"] is not None:
        raise ApiError(400, "expected a text or ids, not both", "text")
    if o["text"] is not None:
        return await tokenized(engine, len(o["text"]), encode, o["text"])
    if not is_ids(engine.tok, o["ids"]):
        why = f"expected a text, or ids from 0 to {engine.tok.n_vocab - 1}"
        raise ApiError(400, why, "text")
    return o["ids"]


@app.get("/inspect/model")
async def inspect_model():
    """What the network is made of."""
    net, parts = app.state.engine.net, model_parts(app.state.engine.net)
    tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}.values()
    table = net.model.embed_tokens.weight
    out = app.state.card | {"config": asdict(net.config), "parts": parts}
    out |= {"params": sum(p["params"] for p in parts), "bytes": sum(t.nbytes for t in tensors)}
    return reply(out | {"dtype": str(table.dtype)[6:], "device": str(table.device)})


@app.post("/inspect/attention")
async def inspect_attention(request: Request):
    """{"text" or "ids", "layer", "head": one, or all} → of each head a row for each token: what it
    looks at, up to itself."""
    engine = app.state.engine
    c, tok, most = engine.net.config, engine.tok, min(MAP_TOKENS, engine.max_len)
    known = {"text": (str, None), "ids": (list, None), "layer": (int, 0, 0, c.n_layer - 1)}
    known["head"] = (int, None, 0, c.n_head - 1)
    o = read_fields(await read_body(request), known, {})
    ids = await read_text(engine, o, tok.prompt)
    if not 0 < len(ids) <= most:
        raise ApiError(400, f"{len(ids)} tokens: attention is shown of 1 to {most}", "text")
    maps = await asyncio.wrap_future(engine.call(attention_maps, engine.net, ids, o["layer"]))
    heads = range(c.n_head) if o["head"] is None else [o["head"]]
    cut = lambda rows: [[round(w, 5) for w in row[: i + 1]] for i, row in enumerate(rows)]
    names = [name_of(tok, id) for id in ids]
    told = {"tokens": ids, "token_strs": names, "layer": o["layer"]}
    return reply(told | {"heads": [cut(maps[h].tolist()) for h in heads]})


@app.post("/inspect/neighbours")
async def inspect_neighbours(request: Request):
    """{"token": an id, or "text" of one token, "n"} → the n tokens with the nearest embeddings."""
    engine = app.state.engine
    net, tok, last = engine.net, engine.tok, engine.tok.n_vocab - 1
    known = {"text": (str, None), "token": (int, None, 0, last), "n": (int, 10, 1, 100)}
    o = read_fields(await read_body(request), known, {})
    if o["token"] is not None and o["text"] is not None:
        raise ApiError(400, "expected a token or a text, not both", "text")
    o["ids"] = None if o["token"] is None else [o["token"]]
    ids = await read_text(engine, o, tok.encode)
    if len(ids) != 1:
        raise ApiError(400, f"{len(ids)} tokens: neighbours are of one", "text")
    found = await asyncio.wrap_future(engine.call(nearest, net, tok.n_vocab, ids[0], o["n"]))
    near = [{"token": i, "text": name_of(tok, i), "cosine": round(c, 6)} for i, c in found]
    return reply({"token": ids[0], "text": name_of(tok, ids[0]), "neighbours": near})


@app.get("/inspect/log")
async def inspect_log(request: Request):
    """?after=a step → the rows of the run's log.jsonl behind it, and its last step."""
    after = request.query_params.get("after", "-1")
    if not (after.removeprefix("-").isdecimal() and len(after) < 16):
        raise ApiError(400, f"after = {short(after)}: expected a step", "after")
    path = Path(model) / "log.jsonl"
    try:
        rows, last = await asyncio.to_thread(log_rows, path, int(after))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ApiError(500, f"log.jsonl cannot be read: {short(str(error))}") from None
    return reply({"rows": rows, "last": last})


def page_policy(html):
    """The Content-Security-Policy of the page: its own script and style, by their hashes, and this
    server; nothing else is run, loaded or sent to, and no site may put it into a frame."""
    allow = {}
    for tag in ("script", "style"):
        inner = html[html.index(f"<{tag}>") + len(tag) + 2 : html.index(f"</{tag}>")]
        allow[tag] = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
    policy = [f"{tag}-src 'sha256-{digest}'" for tag, digest in allow.items()]
    policy += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    return "; ".join(["default-src 'none'", *policy, "frame-ancestors 'none'"])


@app.api_route("/", methods=["GET", "HEAD"])
async def page():
    if not (file := Path(__file__).with_name("serve.html")).is_file():
        raise ApiError(404, "serve.html is not beside serve.py: the API is at /v1")
    html = file.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": page_policy(html), "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(html, headers=headers, media_type="text/html")


# --------------------------------------------------------------------------------------------------


def check_settings(n_ctx):
    for name in ("max_batch", "max_queue", "max_connections", "prefill_chunk", "max_body"):
        if globals()[name] < 1:
            raise UserError(f"--{name}={globals()[name]}: expected 1 or more")
    for name in ("timeout", "client_timeout", "drain"):
        if not 0 < globals()[name] < math.inf:
            raise UserError(f"--{name}={globals()[name]}: expected seconds, more than 0")
    if not 0 <= port < 2**16:  # of a greater one the C library takes the last 16 bits
        raise UserError(f"--port={port}: expected 0 to 65535")
    if not 0 <= max_len <= n_ctx or max_len == 1:
        raise UserError(f"--max_len={max_len}: expected 2 to {n_ctx}, the context, or 0 for that")


def connection_limits():
    """How many connections are served, and on how many more 503 is answered, further ones waiting
    in the kernel: max_connections, or fewer where the system lets a process open fewer files."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return max_connections, SPARE_CONNECTIONS
    wanted = max_connections + SPARE_CONNECTIONS + OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):  # macOS has a lower one beside it
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections, SPARE_CONNECTIONS
    spare = min(SPARE_CONNECTIONS, (soft - OWN_FILES) // 4)
    limit = soft - OWN_FILES - spare
    why = f"a process may open {soft} files here (ulimit -n)"
    if spare < 1:
        raise UserError(f"{why}: serve.py wants {OWN_FILES + 4} at least")
    if limit < max_connections:
        print(f"{why}: --max_connections={limit}")
    return min(limit, max_connections), spare


def listen():
    """The socket that clients will connect to."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        # asyncio sends at once (TCP_NODELAY) where a socket names its protocol.
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        why = f"{error}; --port=0 takes a free one"
        raise UserError(f"--host={host} --port={port}: {why}") from None
    return sock


def is_loopback(address):
    """Whether only this machine reaches the address, as the system writes it."""
    address = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def serve(net, tok):
    """Answer requests until a signal comes, and those that run then."""
    check_settings(net.config.n_ctx)
    if net.score is not None:
        raise UserError(f"{model} is a classifier, which continues no text: sample.py labels one")
    length, state = max_len or net.config.n_ctx, app.state
    try:
        state.engine = Engine(net, tok, max_batch, length, prefill_chunk, max_queue)
    except RuntimeError:  # torch's word for no memory
        why = f"no memory for the keys and values of {max_batch} times {length} tokens"
        raise UserError(f"{why}: lower --max_batch or --max_len") from None
    state.name = Path(model).resolve().name
    state.card = {"id": state.name, "object": "model", "created": int(time.time())}
    state.card |= {"owned_by": "barelm", "max_model_len": length}
    state.log_failed = False
    try:
        state.log = open(log, "a", encoding="utf-8") if log else None
    except OSError as error:
        raise UserError(f"--log={log}: {error.strerror}") from None
    app.add_middleware(Front)
    if sites := cors_sites():
        every = dict.fromkeys(("allow_methods", "allow_headers"), ["*"])
        app.add_middleware(CORSMiddleware, allow_origins=sites, **every)
    limits, sock = connection_limits(), listen()
    state.loopback = is_loopback(sock.getsockname()[0])
    how = dict(http=PatientProtocol, ws="none", lifespan="off", log_level="error", access_log=False)
    config = uvicorn.Config(app, timeout_graceful_shutdown=drain, **how)
    server = state.server = Server(config, *limits)
    # From here on no signal may end Python while the engine's thread computes: torch would abort.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    state.engine.start()
    size = state.engine.cache.store.nbytes / 1e6
    print(f"{max_batch} sequences of up to {length} tokens: {size:,.0f} MB of keys and values")
    where = f"[{host}]" if ":" in host else host
    print(f"serving {state.name} at http://{where}:{sock.getsockname()[1]}", flush=True)
    server.run(sockets=[sock])
    state.engine.stop()
    if server.interrupted:
        sys.exit(130)


def main():
    global api_key
    if api_key is not None and not api_key.strip():
        raise UserError("--api_key= is empty: it would let everyone in")
    api_key = (api_key or os.environ.get("BARELM_API_KEY", "")).strip()
    run = setup(device)
    if prune:
        raise UserError(f"--prune={prune} serves nothing: --export=hf, and serve what that writes")
    kind, _ = choose_dtype(run.device, dtype)
    net, tok = load(model, run.device, kind, quantize)
    params = sum(part["params"] for part in model_parts(net))
    print(f"{model}: {params / 1e6:.1f}M parameters, {str(kind)[6:]} on {run.device}")
    serve(net, tok)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt Python's exit
        sys.exit(130)
