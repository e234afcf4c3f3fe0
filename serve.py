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
from dataclasses import asdict, dataclass, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import model as core
from barelm import api, families, page
from barelm.api import ApiError
from barelm.checkpoint import find, is_adapter, load, refuse_source, save, saved_tensors, weights_of
from barelm.families import FAMILIES, misfits
from barelm.engine import Engine
from barelm.fast import QuantizedLinear, dequantize, generating, quantize_weights, tie_embedding
from barelm.files import whole_file, write_json
from barelm.resume import clear_folder, holds_model, locked_folder, make_folder, move_files
from barelm.run import UserError, choose_dtype, setup
from barelm.safetensors import entries_of
from barelm.shards import check_tokens, open_shard
from barelm.tokenizer import GPT2_SPLIT, Tokenizer

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
    split = tok._pattern()[1]
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
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from barelm.connections import PatientProtocol, Server, connection_limits, listen
    from barelm.front import Access, Front, RequestLog, Shutdown
    from barelm.front import error_reply, event_line, is_loopback, read_sites, reply
except ImportError as error:
    raise UserError(f"{error}: pip install -r requirements-serve.txt") from None


@dataclass
class Settings:
    """What the application goes by, beside the engine."""

    served: api.ServedModel
    folder: Path  # the model's, with its log.jsonl
    access: Access  # who may ask
    shutdown: Shutdown  # how the server was told to end
    request_log: RequestLog | None = None
    max_body: int = 4_000_000  # bytes of a request
    timeout: float = 600.0  # seconds that a request may take
    client_timeout: float = 20.0  # seconds that a client may take to send or to read a piece


class Updates(asyncio.Queue):
    """What the jobs of a request tell, brought from the engine's thread to the event loop's."""

    def __init__(self):
        super().__init__()
        self.loop = asyncio.get_running_loop()

    def listener(self, update):
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.put_nowait, update)


class Handlers:
    """What is done for each address of the server, which make_app gives them. A handler reads the
    request, has the engine do what it asks for, and shapes the answer; what may take long is done
    in a thread, so that the event loop goes on with the others."""

    def __init__(self, engine, settings):
        self.engine = engine
        self.served = settings.served
        self.settings = settings

    # ------------------------------------------------------------------ text from the model

    async def completions(self, request: Request):
        wanted = api.read_completion(self.served, await self.read_body(request))
        prompts = await asyncio.to_thread(api.read_prompts, self.served, wanted)
        updates = Updates()
        jobs = api.completion_jobs(self.served, wanted, prompts, updates.listener)
        answer = api.CompletionAnswer(self.served, jobs)
        return await self.generate(request, wanted, jobs, updates, answer)

    async def chat_completions(self, request: Request):
        wanted = api.read_chat(self.served, await self.read_body(request))
        ids = await asyncio.to_thread(api.read_messages, self.served, wanted.messages)
        updates = Updates()
        jobs = api.chat_jobs(self.served, wanted, ids, updates.listener)
        answer = api.ChatAnswer(self.served, jobs)
        return await self.generate(request, wanted, jobs, updates, answer)

    async def generate(self, request, wanted, jobs, updates, answer):
        """The response to a request for text: one JSON object, or a stream of them."""
        if not self.engine.submit(jobs):
            raise ApiError(429, "the queue is full: try again", code="queue_full")
        record = request.scope["record"]
        record.jobs = jobs
        news = self.follow(request, jobs, updates)
        if wanted.stream:
            record.is_stream = True
            lines = stream_lines(answer, jobs, news, wanted.stream_options.include_usage)
            return StreamingResponse(lines, media_type="text/event-stream")
        texts = [""] * len(jobs)
        tokens = [[] for _ in jobs]
        async for update in news:
            texts[update.job.index] += update.text
            tokens[update.job.index] += update.tokens
        choices = [answer.whole_choice(*parts) for parts in zip(jobs, texts, tokens)]
        return reply(answer.head | {"choices": choices, "usage": api.usage(jobs)})

    async def follow(self, request, jobs, updates):
        """The Updates of the jobs, until all are done, the client has left, or the time is over."""

        async def watch():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            updates.put_nowait(ClientDisconnect())

        seconds = self.settings.timeout
        late = ApiError(
            504, f"the request took more than {seconds:g} s (--timeout)", code="timeout"
        )
        clock = asyncio.get_running_loop().call_later(seconds, updates.put_nowait, late)
        watcher = asyncio.create_task(watch())
        n_running = len(jobs)
        try:
            while n_running:
                update = await updates.get()
                if isinstance(update, Exception):
                    raise update
                if update.error is not None:
                    raise ApiError(500, update.error)
                if update.done:
                    n_running -= 1
                yield update
        finally:
            watcher.cancel()
            clock.cancel()

    async def read_body(self, request):
        """The JSON object of a request."""
        data = bytearray()
        limit = self.settings.max_body
        declared = int(request.headers.get("content-length", "0"))

        async def read():
            async for piece in request.stream():
                data.extend(piece)
                if max(len(data), declared) > limit:
                    raise ApiError(413, f"the body has more than {limit} bytes (--max_body)")

        seconds = self.settings.client_timeout
        try:
            await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body took more than {seconds:g} s") from None
        return api.parse_body(data)

    # ------------------------------------------------------------------ the model and its tokens

    async def models(self):
        return reply({"object": "list", "data": [self.served.card]})

    async def one_model(self, name: str):
        api.check_model(self.served, name)
        return reply(self.served.card)

    async def tokenize(self, request: Request):
        body = await self.read_body(request)
        return reply(await asyncio.to_thread(api.tokenize, self.served, body))

    async def detokenize(self, request: Request):
        body = await self.read_body(request)
        return reply(api.detokenize(self.served, body))

    async def tokenizer_info(self):
        return reply(api.tokenizer_info(self.served.tok))

    # ------------------------------------------------------------------ how it goes

    async def health(self):
        if not self.engine.is_alive():
            raise ApiError(503, "the engine has stopped")
        return reply({"status": "ok"})

    async def metrics(self):
        gauges = {
            "queue_length": len(self.engine.waiting),
            "batch_size": len(self.engine.jobs),
            "batch_limit": self.engine.max_batch,
        }
        text = self.engine.metrics.text(gauges)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # ------------------------------------------------------------------ the page, and what it shows

    async def show_page(self):
        file = Path(__file__).with_name("serve.html")
        if not file.is_file():
            raise ApiError(404, "serve.html is not beside serve.py: the API is at /v1")
        html = file.read_text(encoding="utf-8")
        return Response(html, headers=page.page_headers(html), media_type="text/html")

    async def inspect_model(self):
        return reply(self.served.card | page.describe_model(self.engine.net))

    async def inspect_attention(self, request: Request):
        """{"text" or "ids", "layer", "head": one, or all} → of each head a row for each token."""
        net = self.engine.net
        body = await self.read_body(request)
        wanted = await asyncio.to_thread(page.read_attention, self.served, net.config, body)
        maps = await self.ask_engine(page.attention_maps, net, wanted.ids, wanted.layer)
        return reply(page.attention_answer(self.served.tok, wanted, maps))

    async def inspect_neighbours(self, request: Request):
        """{"token": an id, or "text" of one token, "n"} → the n tokens with the nearest embeddings."""
        body = await self.read_body(request)
        wanted = await asyncio.to_thread(page.read_neighbours, self.served, body)
        net, n_vocab = self.engine.net, self.served.tok.n_vocab
        neighbours = await self.ask_engine(page.nearest, net, n_vocab, wanted.token, wanted.n)
        return reply(page.neighbours_answer(self.served.tok, wanted, neighbours))

    async def ask_engine(self, f, *args):
        """f(*args) in the engine's thread, between two steps."""
        try:
            return await asyncio.wrap_future(self.engine.call(f, *args))
        except UserError as error:
            raise ApiError(400, str(error)) from None

    async def inspect_log(self, request: Request):
        """?after=a step → the rows of the run's log.jsonl behind it, and its last step."""
        after = request.query_params.get("after", "-1")
        if not (after.removeprefix("-").isdecimal() and len(after) < 16):
            raise ApiError(400, f"after = {api.short(after)}: expected a step", "after")
        path = self.settings.folder / "log.jsonl"
        try:
            rows, last = await asyncio.to_thread(page.log_rows, path, int(after))
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"log.jsonl cannot be read: {api.short(str(error))}"
            raise ApiError(500, why) from None
        return reply({"rows": rows, "last": last})


async def stream_lines(answer, jobs, updates, include_usage):
    """Server-sent events: a chunk for each choice that is new, at the end the usage if asked for."""
    head = answer.chunk_head

    def chunk(choice):
        usage = {"usage": None} if include_usage else {}
        return event_line(head | {"choices": [choice]} | usage)

    try:
        for choice in answer.first_choices(jobs):
            yield chunk(choice)
        async for update in updates:
            for choice in answer.new_choices(update):
                yield chunk(choice)
        if include_usage:
            yield event_line(head | {"choices": [], "usage": api.usage(jobs)})
        yield "data: [DONE]\n\n"
    except ApiError as error:  # too late for a status
        yield event_line(error.body())


def make_app(engine, settings):
    """The application: its addresses, and what every request passes before it comes to one."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    handlers = Handlers(engine, settings)
    routes = [
        ("POST", "/v1/completions", handlers.completions),
        ("POST", "/v1/chat/completions", handlers.chat_completions),
        ("GET", "/v1/models", handlers.models),
        ("GET", "/v1/models/{name:path}", handlers.one_model),
        ("POST", "/tokenize", handlers.tokenize),
        ("POST", "/detokenize", handlers.detokenize),
        ("GET", "/tokenizer_info", handlers.tokenizer_info),
        ("GET HEAD", "/health", handlers.health),  # HEAD: some probes'
        ("GET", "/metrics", handlers.metrics),
        ("GET HEAD", "/", handlers.show_page),
        ("GET", "/inspect/model", handlers.inspect_model),
        ("POST", "/inspect/attention", handlers.inspect_attention),
        ("POST", "/inspect/neighbours", handlers.inspect_neighbours),
        ("GET", "/inspect/log", handlers.inspect_log),
    ]
    for methods, path, handler in routes:
        app.add_api_route(path, handler, methods=methods.split())

    async def refused(request, error):
        return error_reply(error)

    async def not_found(request, error):  # the router's own words name no path
        where = f"{request.method} {api.short(request.scope['path'])}"
        refusal = ApiError(error.status_code, f"{where}: {error.detail}")
        return error_reply(refusal, error.headers)

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, not_found)
    app.add_middleware(
        Front,
        engine=engine,
        access=settings.access,
        request_log=settings.request_log,
        client_timeout=settings.client_timeout,
        shutdown=settings.shutdown,
    )
    sites = settings.access.sites
    if sites:  # the last that is added is the first that a request passes
        app.add_middleware(
            CORSMiddleware, allow_origins=sites, allow_methods=["*"], allow_headers=["*"]
        )
    return app


# --------------------------------------------------------------------------------------------------


def read_key():
    """The key that clients are asked for; empty: none is."""
    if api_key is None:
        return os.environ.get("BARELM_API_KEY", "").strip()
    if not api_key.strip():
        raise UserError("--api_key= is empty: it would let everyone in")
    return api_key.strip()


def check_settings(net):
    counts = {
        "max_batch": max_batch,
        "max_queue": max_queue,
        "max_connections": max_connections,
        "prefill_chunk": prefill_chunk,
        "max_body": max_body,
    }
    for name, n in counts.items():
        if n < 1:
            raise UserError(f"--{name}={n}: expected 1 or more")
    for name, seconds in dict(timeout=timeout, client_timeout=client_timeout, drain=drain).items():
        if not 0 < seconds < math.inf:
            raise UserError(f"--{name}={seconds}: expected seconds, more than 0")
    if not 0 <= port < 2**16:  # of a greater one the C library takes the last 16 bits
        raise UserError(f"--port={port}: expected 0 to 65535")
    n_ctx = net.config.n_ctx
    if not 0 <= max_len <= n_ctx or max_len == 1:
        raise UserError(f"--max_len={max_len}: expected 2 to {n_ctx}, the context, or 0 for that")
    if net.score is not None:
        raise UserError(f"{model} is a classifier, which continues no text: sample.py labels one")


def make_engine(net, tok, length):
    try:
        return Engine(net, tok, max_batch, length, prefill_chunk, max_queue)
    except RuntimeError:  # torch's word for no memory
        why = f"no memory for the keys and values of {max_batch} times {length} tokens"
        raise UserError(f"{why}: lower --max_batch or --max_len") from None


def open_log(tok):
    """The file that gets a line for each request, or None."""
    if not log:
        return None
    try:
        return RequestLog(log, tok if log_prompts else None)
    except OSError as error:
        raise UserError(f"--log={log}: {error.strerror}") from None


def run_server(app, engine, sock, limits, shutdown):
    """Answer requests until a signal comes, and those that run then."""
    config = uvicorn.Config(
        app,
        http=partial(PatientProtocol, client_timeout=client_timeout),
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,  # --log writes its own
        timeout_graceful_shutdown=drain,
    )
    server = Server(config, *limits, shutdown)
    # From here on no signal may end Python while the engine's thread computes: torch would abort.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    engine.start()
    size = engine.cache.store.nbytes / 1e6
    print(
        f"{max_batch} sequences of up to {engine.max_len} tokens: {size:,.0f} MB of keys and values"
    )
    address = f"[{host}]" if ":" in host else host
    name = Path(model).resolve().name
    print(f"serving {name} at http://{address}:{sock.getsockname()[1]}", flush=True)
    server.run(sockets=[sock])
    engine.stop()


def main():
    key = read_key()
    run = setup(device)
    if prune:
        raise UserError(f"--prune={prune} serves nothing: --export=hf, and serve what that writes")
    compute_dtype, _ = choose_dtype(run.device, dtype)
    net, tok = load(model, run.device, compute_dtype, quantize)
    n_params = sum(part["params"] for part in page.model_parts(net))
    kind = str(compute_dtype).removeprefix("torch.")
    print(f"{model}: {n_params / 1e6:.1f}M parameters, {kind} on {run.device}")
    check_settings(net)

    length = max_len or net.config.n_ctx
    served = api.ServedModel(Path(model).resolve().name, tok, length, max_queue, seed)
    engine = make_engine(net, tok, length)
    request_log = open_log(tok)
    limits = connection_limits(max_connections)
    sock = listen(host, port)
    loopback = is_loopback(sock.getsockname()[0])
    shutdown = Shutdown(drain=drain)
    settings = Settings(
        served=served,
        folder=Path(model),
        access=Access(key, read_sites(cors or ""), loopback),
        shutdown=shutdown,
        request_log=request_log,
        max_body=max_body,
        timeout=timeout,
        client_timeout=client_timeout,
    )
    app = make_app(engine, settings)
    run_server(app, engine, sock, limits, shutdown)
    if shutdown.interrupted:
        sys.exit(130)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt Python's exit
        sys.exit(130)
