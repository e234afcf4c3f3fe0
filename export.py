"""Smaller, and for other programs: a checkpoint quantized, pruned, merged, as GGUF or ONNX.

    python export.py --quantize=int4 --report           # size, bits per byte, tokens/s; no files
    python export.py --quantize=int4 --export=barelm    # out/python-int4, for every script here
    python export.py --prune=2:4 --export=hf            # out/python-2of4, a plain folder
    python export.py --model=out/lora --export=hf       # a LoRA adapter merged into its base
    python export.py --export=gguf --gguf_type=Q4_K_M   # out/python-gguf/python-Q4_K_M.gguf
    python export.py --export=onnx                      # out/python-onnx, with a cache; checked

--model is a run of ours or a Hugging Face folder of a family that opens here. The export of a
quantized or pruned model prints the report first. GGUF needs gguf, and ONNX needs onnx, onnxscript
and onnxruntime: pip install -r requirements-extras.txt.
"""

from config import configure

model = "out/python"  # a checkpoint folder
export: str | None = None  # hf, barelm (a quantized model), gguf or onnx: what to write
report = False  # with quantize or prune: print what they cost and gain, as an export does too
out_dir: str | None = None  # where an export goes; none: beside the model, by what was done
overwrite = False  # let an export replace what out_dir holds

# smaller
quantize: str | None = None  # int8 or int4: weights of one byte or half of one
prune: str | None = None  # make weights zero: 0.5, the smaller half of each matrix; or 2:4
gguf_type = "F16"  # F32, F16, Q8_0, Q6_K, Q5_K_M, Q4_K_M or Q4_0, of a GGUF file's matrices

# the report
dataset = "python"  # data/<dataset>, whose validation shards it measures on
eval_tokens = 65536  # so many of their tokens, evenly spread
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16

device = "auto"  # auto, cpu, cuda, cuda:1
threads = 0  # of the CPU; 0: OMP_NUM_THREADS, or as many as this process has cores for
seed = 0  # as every script has one; nothing here is drawn

if __name__ == "__main__":
    configure(globals())

import copy
import math
import os
import shutil
import time
from pathlib import Path

import torch

from barelm.checkpoint import (
    find,
    is_adapter,
    load,
    refuse_source,
    save,
    saved_tensors,
    weights_of,
    write_companions,
)
from barelm.families import FAMILIES, family, family_of, misfits
from barelm.fast import generating
from barelm.files import write_json
from barelm.gguf_file import FILE_TYPES, check_gguf, require_gguf, write_gguf
from barelm.objectives import fills_gaps
from barelm.onnx_check import check_onnx, require_onnx
from barelm.onnx_file import genai_config, has_cache, write_onnx
from barelm.quantized import QuantizedLinear, dequantize, quantize_weights, tie_embedding
from barelm.resume import clear_folder, holds_model, locked_folder, make_folder, move_files
from barelm.run import UserError, choose_dtype, setup
from barelm.safetensors import entries_of
from barelm.shards import Windows
from barelm.tokenizer import Tokenizer
from model import generate

FORMATS = ("hf", "barelm", "gguf", "onnx")

# --------------------------------------------------------------------------------------------------
# Smaller: pruning and quantization


def block_matrices(net):
    """The linear layers of all blocks: what is pruned. The embedding and the head are not."""
    kinds = (torch.nn.Linear, QuantizedLinear)
    return [m for name, m in net.named_modules() if ".layers." in name and isinstance(m, kinds)]


def read_share(text):
    """The share of weights that --prune asks to make zero, such as "0.5"."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan  # which the next line refuses
    if not 0 < share < 1:
        raise UserError(f"--prune={text}: expected a share between 0 and 1, such as 0.5, or 2:4")
    return share


@torch.no_grad()
def prune_weights(net, sparsity):
    """Make the smallest weights of each matrix zero, in place (Han et al. 2015).

    sparsity: their share, "0.5"; or "2:4", two of each four neighbours in a row, which the sparse
    tensor cores of NVIDIA's GPUs multiply faster (Mishra et al. 2021)."""
    if net.config.n_experts:
        raise UserError(f"--prune={sparsity}: not of a model with experts, most of its weights")
    in_fours = sparsity == "2:4"
    share = 0.5 if in_fours else read_share(sparsity)
    for layer in block_matrices(net):
        weight = layer.weight  # (out_features, in_features)
        columns = weight.shape[1]
        if in_fours and columns % 4:
            raise UserError(f"--prune=2:4: a matrix of {columns} columns has no groups of four")
        groups = weight.view(-1, 4) if in_fours else weight.view(1, -1)  # (groups, weights of one)
        n_zeros = round(share * groups.shape[1])
        smallest = groups.abs().topk(n_zeros, largest=False).indices
        groups.scatter_(1, smallest, 0.0)  # a view: this writes into the layer


def zeros_share(net):
    """The share of zeros among the weights of the blocks' matrices."""
    n_weights = 0
    n_zeros = 0
    for layer in block_matrices(net):
        weight = layer.weight
        if isinstance(layer, QuantizedLinear):
            weight = dequantize(weight, layer.scale)
        n_weights += weight.numel()
        n_zeros += int((weight == 0).sum())
    return n_zeros / n_weights


def stored_dtype():
    """The dtype of the model's files, or float32 where an adapter is merged into a base."""
    folder = find(model)
    if is_adapter(folder):
        return torch.float32
    dtypes = set()
    for path in weights_of(folder):
        for tensor_dtype, _ in entries_of(path).values():
            if tensor_dtype.is_floating_point:  # the codes of quantized weights are not
                dtypes.add(tensor_dtype)
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def cast(net, dtype):
    """The parameters in another dtype, in place; the scales of quantized weights, which are
    buffers, keep theirs."""
    for p in net.parameters():
        p.data = p.data.to(dtype)


def compressed_model(run):
    """(network, tokenizer): the model, pruned and quantized if asked for, as an export has it."""
    net, tok = load(model, run.device, stored_dtype())
    if prune and net.quantize:
        raise UserError(f"{model} is quantized: prune what it was made of")
    if prune:
        prune_weights(net, prune)
    if quantize:
        quantize_weights(net, quantize)
        cast(net, torch.bfloat16)  # what is left beside the codes
    return net, tok


# --------------------------------------------------------------------------------------------------
# The report: what pruning and quantization cost and gain


def validation_windows(tok, seq_len):
    """The Windows of seq_len tokens of the validation shards; None, and a line that says why, where
    data/<dataset> has none for this tokenizer."""
    folder = Path("data") / dataset
    paths = sorted(folder.glob("val_*.bin"))
    why = ""
    if not paths:
        why = "no validation shards"
    elif Tokenizer.from_folder(folder).bytes != tok.bytes:
        why = "its tokens are another tokenizer's"
    if why:
        print(f"{folder}: {why}: no bits per byte (--dataset names another)")
        return None
    windows = Windows(paths, seq_len, n_vocab=tok.n_vocab)
    if windows.n == 0 or eval_tokens < 1:
        raise UserError(f"{folder}: no window of {seq_len + 1} validation tokens")
    return windows


@torch.no_grad()
def bits_per_byte(net, tok, windows):
    """The loss in bits per byte of text, over eval_tokens of the windows, evenly spread."""
    device = net.model.embed_tokens.weight.device
    vocab_size = net.config.vocab_size
    byte_counts = torch.tensor([len(tok.token_bytes(i)) for i in range(vocab_size)])
    n_windows = min(windows.n, math.ceil(eval_tokens / windows.seq_len))
    chosen = [i * windows.n // n_windows for i in range(n_windows)]
    logits_at_once = 1 << 25
    batch_size = max(1, logits_at_once // (windows.seq_len * vocab_size))
    nats = 0.0
    n_bytes = 0
    for start in range(0, n_windows, batch_size):
        ids, targets = windows.batch(chosen[start : start + batch_size], device)  # (B, T) each
        loss_sum, _ = net(ids.to(device), targets.to(device))  # in nats
        nats += loss_sum.item()
        n_bytes += int(byte_counts[targets.cpu()].sum())
    return nats / n_bytes / math.log(2)


def decoding_rate(net, tok):
    """Tokens a second of one greedy sequence: the median of three. End tokens do not end it."""
    endless = copy.copy(tok)
    endless.eos_ids = []
    prompt = [tok.eot_id or 0]  # what begins a document
    n_tokens = min(64, net.config.n_ctx - 1)  # beside the prompt's one
    rates = []
    with generating(net):
        generate(net, endless, [prompt], max_new_tokens=2, temperature=0)  # warm-up
        for _ in range(3):
            start = time.perf_counter()  # generate waits for its last token
            generate(net, endless, [prompt], max_new_tokens=n_tokens, temperature=0)
            rates.append(n_tokens / (time.perf_counter() - start))
    return sorted(rates)[1]


def print_head(net, windows):
    """The head of the report, with the columns that `print_row` has."""
    bits = f"{'bits/byte':>11}" if windows is not None else ""
    rate = f"{'tokens/s':>10}" if net.config.causal else ""
    print(f"{'':<22}{'MB':>10}{bits}{rate}{'zeros':>8}")


def print_row(name, net, tok, windows):
    """A line of the report: MB of tensors, bits per byte where there are windows, tokens a second
    where the network writes (an encoder does not), the share of zeros."""
    megabytes = sum(t.nbytes for t in saved_tensors(net).values()) / 1e6
    bits = ""
    if windows is not None:
        bits = f"{bits_per_byte(net, tok, windows):>11.4f}"
    rate = ""
    if net.config.causal:
        rate = f"{decoding_rate(net, tok):>10,.1f}"
    zeros = f"{zeros_share(net):.1%}"
    print(f"{name:<22}{megabytes:>10,.2f}{bits}{rate}{zeros:>8}", flush=True)


def show_report(run):
    """Print the table of the model as it is and as compressed."""
    compute_dtype, _ = choose_dtype(run.device, dtype)
    net, tok = load(model, run.device, compute_dtype)
    if net.score is not None:
        print(f"{model} is a classifier: no bits per byte; eval.py measures it")
        return
    windows = None
    if fills_gaps(net.config):
        print(f"{model} predicts no next token: no bits per byte; eval.py measures its loss")
    else:
        windows = validation_windows(tok, min(net.config.n_ctx, 1024))
    print_head(net, windows)
    print_row("as it is", net, tok, windows)
    del net  # before the next one is loaded
    net, tok = compressed_model(run)
    cast(net, compute_dtype)
    tie_embedding(net, compute_dtype)  # which reads the codes of a quantized head
    done = []
    if prune:
        done.append(f"pruned {prune}")
    if quantize:
        done.append(quantize)
    print_row(" ".join(done), net, tok, windows)
    name = str(compute_dtype).removeprefix("torch.")
    print(f"computed in {name} on {run.device}, one sequence; MB of tensors")


# --------------------------------------------------------------------------------------------------
# Hugging Face folders


def hf_family(net):
    """The Hugging Face model_type that holds the network. Where none does, a UserError names the
    options that would have to be others."""
    c = net.config
    if net.quantize:
        mend = "--export=barelm saves it, --gguf_type=Q8_0 is GGUF's own 8 bits"
        raise UserError(f"--export={export} cannot hold {net.quantize} weights: {mend}")
    if net.adapter_size:
        raise UserError(f"--export={export}: no Hugging Face architecture has bottleneck adapters")
    kind = family(c)
    if kind != "barelm" and family_of(net) == "barelm":
        what = f"{net.task}, {net.pooling}" + (f", {net.pooler}" if net.pooler else "")
        raise UserError(f"--export={export}: no class of {kind} has such a head ({what})")
    if kind != "barelm":
        return kind
    # The family that the fewest options keep it from.
    nearest = min(FAMILIES, key=lambda kind: len(misfits(c, kind)))
    wanted = []
    for name, value in misfits(c, nearest).items():
        wanted.append(f"{name}={value!r} (here {getattr(c, name)!r})")
    why = f"{nearest} wants {', '.join(wanted)}"
    raise UserError(f"--export={export} cannot hold this architecture: {why}")


# --------------------------------------------------------------------------------------------------
# ONNX


def export_onnx(net, tok, path):
    """Write the files that optimum's and onnxruntime-genai's readers open, of a network on the CPU:
    the graph at path, its weights and the model's other files beside it. Then compare."""
    require_onnx()
    write_onnx(net, path)
    result = check_onnx(net, tok, path)
    rows = "texts" if net.score is not None and net.task == "classify" else "tokens"
    print(f"onnxruntime's logits of {result.n_rows} {rows}:")
    print(f"    root mean square of their difference: {result.difference:.1e} of their spread")
    print(f"    the largest is another at {result.n_other} of {result.n_sure}, beyond rounding")
    if not result.good:
        raise UserError("--export=onnx: these are not the model's logits; nothing was written")
    write_companions(path.parent, net, tok)
    if has_cache(net) and tok.eos_ids:
        write_json(path.with_name("genai_config.json"), genai_config(net, tok))
    elif has_cache(net):
        print("note: the tokenizer names no end token: without it there is no genai_config.json")
    if net.task == "embed":
        print("note: the graph gives logits, and no vectors of texts")


# --------------------------------------------------------------------------------------------------
# The run


def check_settings():
    """Refuse what no export is, before anything is read."""
    if export not in (None, *FORMATS):
        raise UserError(f"--export={export}: expected hf, barelm, gguf or onnx")
    if gguf_type not in FILE_TYPES:
        raise UserError(f"--gguf_type={gguf_type}: expected {', '.join(FILE_TYPES)}")
    if report and not (prune or quantize):
        raise UserError("--report compares: add --quantize=int8, --quantize=int4 or --prune=0.5")
    if not export and not report:
        why = "--export=hf, barelm, gguf or onnx writes a model, --report compares one"
        raise UserError(f"nothing to do: {why}")


def default_folder():
    """The model's folder with what was done to it behind its name: out/python-2of4-gguf."""
    parts = [str(Path(model))]
    if prune:
        parts.append(prune.replace(":", "of"))
    if quantize:
        parts.append(quantize)
    if export in ("gguf", "onnx") or (export == "hf" and not prune):
        parts.append(export)
    return "-".join(parts)


def check_export(net, tok):
    """Refuse what the format cannot hold, or a package that is missing, before the report."""
    if export in ("hf", "gguf"):
        hf_family(net)
    if export == "gguf":
        if net.score is not None:
            raise UserError(f"{model} is a classifier: --export=gguf has text models only")
        require_gguf()
        for note in check_gguf(net.config, tok).notes:
            print(f"note: {note}")
    if export == "onnx":
        if net.quantize:
            why = f"{net.quantize} weights are in codes of our own: export the model of before"
            raise UserError(f"--export=onnx: {model}: {why}")
        if net.config.is_seq2seq:
            why = "whose decoder reads a source beside them"
            raise UserError(f"--export=onnx takes ids alone: {model} is an encoder-decoder, {why}")
        require_onnx()


def write_part(net, tok, path, show):
    """Write the export whose main file is `path`, into an empty folder. show: a line of progress,
    as Run's."""
    if export == "gguf":  # which makes float32 of a tensor at a time
        write_gguf(net.cpu(), tok, path, gguf_type, show=show)
    elif export == "onnx":
        export_onnx(net.float().cpu(), tok, path)
    else:
        save(path.parent, net, tok)


def write_export(run, folder):
    """Write the export into the folder. It is made whole in a folder of its own, then what was
    there is taken apart, then it is moved: killed or out of space, this leaves the old, the new or
    what no reader opens."""
    files = {"gguf": f"{Path(model).resolve().name}-{gguf_type}.gguf", "onnx": "model.onnx"}
    path = folder / files.get(export, "model.safetensors")
    part = folder / "export.tmp"
    replaced = [path] if path.exists() else []
    if export != "gguf":  # which is one file and may stand beside a model
        replaced += holds_model(folder)
    if replaced and not overwrite:  # before hours of work
        raise UserError(f"{replaced[0]} is there already: --overwrite, or another --out_dir")
    if export != "gguf":
        refuse_source(folder, model)
    net, tok = compressed_model(run)
    check_export(net, tok)
    if prune or quantize:
        show_report(run)
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    try:
        make_folder(part)
        write_part(net, tok, part / path.name, run.progress)
        if export != "gguf":
            path.unlink(missing_ok=True)
            clear_folder(folder)
        move_files(part, folder, last=path.name)  # without the last no reader opens the folder
    except OSError as error:  # of the writers of GGUF and ONNX, which write their files themselves
        why = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written: {why}; nothing was changed") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = os.path.getsize(path)
    if export == "onnx":
        size += os.path.getsize(f"{path}_data")
    print(f"{path}: {size / 1e6:,.2f} MB")


def main():
    check_settings()
    run = setup(device, threads=threads, can_mps=False)
    run.threads.note()
    if not export:  # the report alone
        show_report(run)
        return
    folder = default_folder() if out_dir is None else out_dir
    with locked_folder(folder):
        write_export(run, Path(folder))


if __name__ == "__main__":
    main()
