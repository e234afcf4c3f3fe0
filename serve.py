"""Deployment: what a checkpoint becomes on its way to whoever runs it.

    python serve.py --quantize=int4 --report             # size, bits per byte, tokens/s, and ends
    python serve.py --quantize=int4 --export=barelm      # out/python-int4, for every script here
    python serve.py --prune=2:4 --export=hf              # out/python-2of4, a plain folder
    python serve.py --model=out/lora --export=hf         # a LoRA adapter merged into its base
    python serve.py --export=gguf --gguf_type=Q8_0       # out/python-gguf/python-Q8_0.gguf
    python serve.py --export=onnx                        # out/python-onnx/model.onnx, checked

An export of a quantized or pruned model prints the same report first.
"""

from config import configure

model = "out/python"  # a checkpoint folder
quantize: str | None = None  # int8 or int4: weights of one byte or half of one
prune: str | None = None  # make weights zero: 0.5, the smaller half of each matrix; or 2:4
report = False  # with quantize or prune: print what they cost and gain, and end
export: str | None = None  # hf, barelm (a quantized model), gguf or onnx: write it, and end
gguf_type = "F16"  # F32, F16 or Q8_0, of a GGUF file's matrices
out_dir: str | None = None  # where an export goes; None: beside the model, by what was done
overwrite = False  # let an export replace what out_dir holds
dataset = "python"  # data/<dataset>, whose validation shards the report measures on
eval_tokens = 65536  # so many of their tokens, evenly spread
seed = 0  # of the ids that an ONNX export is checked with
device = "auto"  # auto, cpu, cuda, cuda:1
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16

if __name__ == "__main__":
    configure(globals())

import contextlib
import copy
import importlib
import logging
import math
import os
import shutil
import struct
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import model as core
from model import UserError

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
        with contextlib.suppress(ValueError):
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
        if isinstance(layer, (torch.nn.Linear, core.QuantizedLinear)):
            w = layer.weight
            w = w if w.is_floating_point() else core.dequantize(w, layer.scale)
            total, zeros = total + w.numel(), zeros + int((w == 0).sum())
    return zeros / total


def stored_dtype():
    """The dtype of the model's file, or float32 where an adapter is merged into a base."""
    path = Path(model) / "model.safetensors"
    if not path.is_file():
        return torch.float32
    with open(path, "rb") as file:
        entries, _ = core.read_header(path, file)
    kinds = {kind for kind, _ in entries.values() if kind.is_floating_point}
    return torch.float32 if len(kinds) != 1 else kinds.pop()


def cast(net, kind):
    """The parameters in another dtype, in place; the scales of quantized weights keep theirs."""
    for p in net.parameters():
        p.data = p.data.to(kind)


def compressed(run):
    """(network, tokenizer): the model, pruned and quantized if asked for, as an export holds it."""
    net, tok = core.load(model, run.device, stored_dtype())
    if prune and net.quantize:
        raise UserError(f"{model} is quantized: prune what it was made of")
    if prune:
        prune_weights(net, prune)
    if quantize:
        core.quantize_weights(net, quantize)
        cast(net, torch.bfloat16)  # what is left beside the codes
    return net, tok


def validation_windows(tok, width):
    """Windows (n, width + 1) int64 of the validation shards, eval_tokens at most, evenly spread."""
    folder, rows = Path("data") / dataset, []
    paths = sorted(folder.glob("val_*.bin"))
    if not paths or core.Tokenizer.from_folder(folder).bytes != tok.bytes:
        why = "its tokens are another tokenizer's" if paths else "no validation shards"
        print(f"{folder}: {why}: bits per byte n/a (--dataset names another)")
        return None
    for path in paths:
        header = np.fromfile(path, "<i4", 256)
        kind = {20240520: "<u2", 20240801: "<u4"}.get(int(header[0]) if len(header) else 0)
        if kind is None:
            raise UserError(f"{path}: not a token shard (python prepare.py makes them)")
        tokens = np.memmap(path, kind, "r", 1024)
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
    with core.generating(net):
        core.generate(net, tok, [prompt], max_new_tokens=2, temperature=0)
        for _ in range(3):
            start = time.perf_counter()  # generate waits for its last token
            core.generate(net, tok, [prompt], max_new_tokens=n, temperature=0)
            rates.append(n / (time.perf_counter() - start))
    return sorted(rates)[1]


def show_report(run):
    """The table of the model as it is and as compressed: size, bits per byte, tokens/s, zeros."""
    kind = torch.float32 if run.device.type == "cpu" else core.choose_dtype(run.device)[0]
    kind = kind if dtype == "auto" else core.choose_dtype(run.device, dtype)[0]
    net, tok = core.load(model, run.device, kind)
    if net.score is not None:
        return print(f"{model} is a classifier: no bits per byte; eval.py measures it")
    windows = validation_windows(tok, min(net.config.n_ctx, 1024))
    print(f"{'':<22}{'MB':>10}{'bits/byte':>11}{'tokens/s':>10}{'zeros':>8}")
    names = " ".join(f"{a}{b}" for a, b in (("pruned ", prune), ("", quantize)) if b)
    for name in ("as it is", names):
        if name == names:
            net, tok = compressed(run)
            cast(net, kind)
            core.tie_embedding(net, kind)
        size = sum(t.nbytes for t in core.saved_tensors(net).values()) / 1e6
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
    if (kind := core.family(c)) != "barelm":
        return kind
    differ = lambda kind: {k: v for k, v in core.FAMILIES[kind].items() if getattr(c, k) != v}
    kind = min(core.FAMILIES, key=lambda kind: len(differ(kind)))
    wanted = ", ".join(f"{k}={v!r} (here {getattr(c, k)!r})" for k, v in differ(kind).items())
    wanted = wanted or "n_kv_head=n_head, head_dim=n_embd/n_head"
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
GGUF_PRE = {core.GPT2_SPLIT: "gpt-2", TIKTOKEN_GPT2: "gpt-2", QWEN2_SPLIT: "qwen2"}
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
    for name, t in core.saved_tensors(net).items():
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
    with core.whole_file(path) as file:
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

    c, size = net.config, sum(t.nbytes for t in core.saved_tensors(net).values())
    draw = torch.Generator().manual_seed(seed)
    ids = lambda *shape: torch.randint(tok.n_vocab, shape, generator=draw)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=c.n_ctx)}
    how = dict(input_names=["ids"], output_names=["logits"], dynamic_shapes=(sizes,))
    how |= dict(dynamo=True, verbose=False, external_data=size > 1.5e9)  # protobuf ends at 2 GB
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="onnx.") as temporary:
        unchecked = Path(temporary) / path.name
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                torch.onnx.export(net, (ids(2, min(8, c.n_ctx)),), unchecked, **how)
            except torch.onnx.OnnxExporterError as error:
                why = str(error).strip().splitlines()[-1]
                raise UserError(f"--export=onnx: torch cannot export this network: {why}") from None
        session, worst = onnxruntime.InferenceSession(str(unchecked)), 0.0
        for given in (ids(1, 3), ids(3, min(c.n_ctx, 64)), ids(1, c.n_ctx)):
            with torch.no_grad():
                ours = net(given)
            theirs = torch.from_numpy(session.run(None, {"ids": given.numpy()})[0])
            worst = max(worst, ((theirs - ours).abs().max() / ours.abs().max()).item())
        print(f"largest difference of onnxruntime's logits: {worst:.1e} of the largest logit")
        if not worst < 1e-4:
            raise UserError("--export=onnx: these are not the model's logits; nothing was written")
        for file in Path(temporary).iterdir():
            os.replace(file, path.with_name(file.name))
    core.write_json(path.with_name("tokenizer.json"), tok.spec)
    core.write_json(path.with_name("tokenizer_config.json"), tok.config)


# --------------------------------------------------------------------------------------------------


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
    folder = Path(out_dir or "-".join([str(Path(model)), *done]))
    files = {"gguf": f"{Path(model).resolve().name}-{gguf_type}.gguf", "onnx": "model.onnx"}
    path, new = folder / files.get(export, "model.safetensors"), not folder.exists()
    if export and path.exists() and not overwrite:
        raise UserError(f"{path} is there already: --overwrite, or another --out_dir")
    if not export:
        return show_report(run)
    net, tok = compressed(run)
    if export == "hf":
        check_family(net)
    if prune or quantize:
        show_report(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if export in ("hf", "barelm"):
            core.save(folder, net, tok)
        else:
            {"gguf": export_gguf, "onnx": export_onnx}[export](net.float().cpu(), tok, path)
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    print(f"{path}: {os.path.getsize(path) / 1e6:,.2f} MB")


def main():
    run = core.setup(device)
    if export or report:
        return convert(run)
    raise UserError("--export or --report: expected one of them")


if __name__ == "__main__":
    main()
