"""A checkpoint is a Hugging Face folder: found, loaded, saved.

`load` opens ours and Hugging Face's folders, adapters (peft.py) and models of the Hub by name. The
formats are in families.py (config.json and tensor names) and safetensors.py."""

import os
import re
import time
from pathlib import Path

import torch

from barelm.adapters import add_adapters
from barelm.download import HUB, download
from barelm.families import (
    FAMILIES,
    from_hf_config,
    layer_numbers,
    tensor_names,
    tensors_from_file,
    tensors_in_file,
    to_hf_config,
)
from barelm.files import read_json, write_json
from barelm.peft import add_lora, read_adapter_config
from barelm.quantized import QuantizedLinear, quantize_weights, tie_embedding
from barelm.resume import PARTS, make_folder, write_weights
from barelm.run import UserError
from barelm.safetensors import INDEX, check_finite, entries_of, read_safetensors
from barelm.shapes import LARGEST
from barelm.tokenizer import Tokenizer
from model import GPT

# --------------------------------------------------------------------------------------------------
# Find: a folder here, or a model of the Hub


def is_hub_name(name):
    """Whether a name that is no folder here may be a Hub model's (owner/name, or name)."""
    owner = str(name).partition("/")[0]
    if owner == "out" or Path(owner).exists():
        return False  # a misspelt folder of one's own is not looked for in the network
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)))


def find(name):
    """The folder of a model: one that is here, or else a Hub model's (owner/name, or name), which
    is downloaded once, to ~/.cache/barelm. Environment: HF_ENDPOINT, HF_TOKEN."""
    folder = Path(name)
    try:
        if folder.is_dir():
            return folder
        on_the_hub = is_hub_name(name)
    except (OSError, ValueError):  # too long a name, or one with a NUL
        raise UserError(f"{str(name)[:60]!r}: no name of a folder") from None
    if not on_the_hub:
        raise UserError(f"{folder}: no such folder (train.py and finetune.py write out/NAME)")
    cached = Path.home() / ".cache/barelm" / str(name).replace("/", "--")
    is_local_main = int(os.environ.get("LOCAL_RANK", 0)) == 0
    while not is_local_main and not cached.is_dir():
        time.sleep(1)  # the machine's first process downloads; where it fails, torchrun ends all
    if not cached.is_dir():
        download_model(str(name), cached)
    return cached


def download_model(name, folder):
    """Fetch the files of a Hub model that are read here. The folder has its name when it has all;
    what was refused, or cut, goes on from where it was."""
    part = folder.with_name(folder.name + ".part")
    place = f"{HUB}{name}/resolve/main/"
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def get(file, **options):
        return download(place + file, part / file, headers=headers, **options)

    try:
        get("config.json", tries=1)  # a name that is none is told at once
    except UserError as error:
        why = str(error).removeprefix(f"{place}config.json: ")
        raise UserError(f"{name}: neither a folder here nor a model from {HUB}: {why}") from None
    # What does not run here is refused before its weights come.
    read_config(part)
    for file in ("tokenizer", "tokenizer_config", "special_tokens_map", "generation_config"):
        get(f"{file}.json", optional=True)
    get("chat_template.jinja", optional=True)
    Tokenizer.from_folder(part)
    if not get("model.safetensors", optional=True):
        get(INDEX, optional=True)
        for path in weights_of(part):
            get(path.name)
    os.replace(part, folder)


# --------------------------------------------------------------------------------------------------
# Load


def load(folder, device="cpu", dtype=torch.float32, quantize=None, fast=True):
    """Open a checkpoint folder, ours or Hugging Face's, or a model of the Hub by its name: (GPT in
    eval mode, Tokenizer).
    quantize: int8 or int4 for the linear layers; what is left of the network stays in dtype.
    fast: as GPT takes it."""
    folder = find(folder)
    if is_adapter(folder):
        return load_adapted(folder, device, dtype, quantize, fast)
    settings, config = read_config(folder)
    kind = settings["model_type"]
    tell_window(folder, settings, config)
    tok = Tokenizer.from_folder(folder)
    if tok.n_vocab > config.vocab_size:
        raise UserError(f"{folder}: {tok.n_vocab} tokens, but the model knows {config.vocab_size}")

    # The names and shapes in the files' headers come first: what does not fit is refused before
    # anything of the size that config.json, or a file, claims is built.
    entries = read_entries(folder, kind)
    check_layers(folder, entries, config.n_layer)
    labels = read_labels(folder, settings, entries)
    net = empty_network(config, settings, labels, fast)
    check_entries(folder, entries, net, kind)

    tensors = read_weights(folder, kind, dtype)
    tensors = tensors_from_file(tensors, net.state_dict(), kind)
    complete_head(folder, tensors, net)
    fill(net, tensors, device, dtype)
    if config.is_seq2seq:
        net.pad_id = settings.get("pad_token_id")
        net.start_id = settings.get("decoder_start_token_id", net.pad_id)  # T5's way
    if quantize:
        quantize_weights(net, quantize)
    return net.eval(), tok


def read_config(folder):
    """A folder's config.json, as a dict and as a GPTConfig."""
    path = folder / "config.json"
    d = read_json(path)
    try:
        config = from_hf_config(d, path)
    except (TypeError, ValueError, AttributeError) as error:  # such as a list where a text is due
        raise UserError(f"{path}: malformed: {error}") from None
    size = d.get("adapter_size")
    poolings = ("last", "mean") if d["model_type"] == "barelm" else ("last",)
    checks = {
        "adapter_size": size is None or type(size) is int and 0 <= size <= LARGEST,
        "pooling": d.get("pooling", "last") in poolings,
        "quantize": d.get("quantize") in (None, "int8", "int4"),
    }
    for key, good in checks.items():
        if not good:
            raise UserError(f"{path}: {key}={d[key]!r:.60} not supported")
    return d, config


def tell_window(folder, settings, config):
    """Say so where the context is shorter than config.json's, for the sake of a sliding window."""
    entry = FAMILIES.get(settings["model_type"])
    if entry is None or entry.sliding_window is None:
        return
    if config.n_ctx < settings[entry.keys["n_ctx"]]:
        print(f"{folder}: the context ends with the sliding window, at {config.n_ctx} tokens")


def weights_of(folder):
    """The paths of the files that hold a folder's tensors: one, or those that an index names."""
    whole = folder / "model.safetensors"
    index = folder / INDEX
    if whole.is_file():
        return [whole]
    if not index.is_file():
        why = "no model.safetensors here, nor its index (a pytorch_model.bin is a pickle, "
        raise UserError(f"{folder}: {why}which may run code: convert it where you trust it)")
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else [""]
    if not all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names):  # no ../ either
        raise UserError(f"{index}: malformed: expected names of safetensors files")
    return [folder / name for name in names]


def read_entries(folder, kind):
    """{name: (dtype, shape)} of the tensors in a folder's files, of which each holds others, but
    for those that are not read."""
    unread = tensor_names(kind).unread
    entries = {}
    for path in weights_of(folder):
        for name, entry in entries_of(path).items():
            if name in entries:
                raise UserError(f"{path}: {name} is in another file of the folder too")
            if not name.endswith(unread):
                entries[name] = entry
    return entries


def check_layers(folder, entries, n_layer):
    """Refuse files whose names are those of another number of layers than config.json's."""
    n_found = len(layer_numbers(entries))
    if n_found != n_layer:
        raise UserError(f"{folder}: {n_layer} layers in config.json, {n_found} in its weights")


def read_labels(folder, d, entries):
    """The labels of a folder's classifier, by a config.json's dict d; none of a text model's."""
    if "ForSequenceClassification" not in str(d.get("architectures")):
        return []
    _, shape = entries.get("score.weight", (None, []))
    if len(shape) != 2 or shape[0] == 0:
        raise UserError(f"{folder}: a classifier by its config.json, but without a score.weight")
    n_labels = shape[0]
    usual = {str(i): f"LABEL_{i}" for i in range(n_labels)}  # transformers' names
    labels = usual if d.get("id2label") is None else d["id2label"]
    good = (
        isinstance(labels, dict)
        and labels.keys() == usual.keys()
        and all(isinstance(label, str) for label in labels.values())
        and len(set(labels.values())) == n_labels
    )
    if not good:
        why = f"{labels!r:.60}: expected a name of its own for each of 0 to {n_labels - 1}"
        raise UserError(f"{folder}/config.json: id2label={why}")
    return [labels[number] for number in usual]


def empty_network(config, settings, labels, fast):
    """The network of a config.json, whose tensors have shapes and types but no memory."""
    with torch.device("meta"):
        net = GPT(config, fast)
        if settings.get("adapter_size"):
            add_adapters(net, settings["adapter_size"])
        if labels:
            net.set_score(labels, settings.get("pooling", "last"), settings.get("pad_token_id"))
        if settings.get("quantize"):
            quantize_weights(net, settings["quantize"])
    return net


def check_entries(folder, entries, net, kind):
    """Refuse files whose tensors, {name: (dtype, shape)}, are not the network's."""
    prefix = tensor_names(kind).prefix
    want = tensors_in_file(saved_tensors(net), kind)
    want = {name.removeprefix(prefix): t for name, t in want.items()}
    given = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    if len(given) < len(entries):
        raise UserError(f"{folder}: tensors with and without the prefix {prefix}")
    spare = {"lm_head.weight": net.lm_head.weight}  # of a tied head, or beside a classifier's
    bad = []
    for name, t in (spare | want).items():
        if name in want or name in given:
            dtype, shape = given.get(name, (torch.bool, []))  # missing: unlike any tensor of ours
            # Any float becomes load's dtype; codes must be what they are.
            both_float = dtype.is_floating_point and t.is_floating_point()
            if shape != list(t.shape) or not (both_float or dtype == t.dtype):
                bad.append(name)
    for name in given:
        if name not in want and name not in spare:
            bad.append(name)
    if bad:
        raise UserError(f"{folder}: tensors that config.json does not fit: {', '.join(bad[:3])}")


def read_weights(folder, kind, dtype):
    """{name: tensor} of a folder's files, but for those that are not read. What is not finite as
    dtype is a UserError."""
    unread = tensor_names(kind).unread
    tensors = {}
    for path in weights_of(folder):
        part, _ = read_safetensors(path)
        part = {name: t for name, t in part.items() if not name.endswith(unread)}
        check_finite(path, part, dtype)
        tensors |= part
    return tensors  # in the files' own dtypes


def complete_head(folder, tensors, net):
    """Add the head to {name: tensor} where the file has none: a tied one's is the embedding."""
    table = tensors.get("model.embed_tokens.weight")  # (V, C)
    if net.config.tie and table is not None:
        head = tensors.get("lm_head.weight", table)
        if head.dtype != table.dtype or not head.equal(table):
            raise UserError(f"{folder}: lm_head.weight is not the embedding that it is tied to")
        tensors["lm_head.weight"] = table
    if net.labels and "lm_head.weight" not in tensors:  # a classifier's file: nothing reads it
        shape = (net.config.vocab_size, net.config.n_embd)
        tensors["lm_head.weight"] = torch.zeros(shape)


def fill(net, tensors, device, dtype):
    """Make {name: tensor} the tensors of an empty network: its floats in dtype, codes and their
    scales as they are."""
    state = {}
    for name, empty in net.state_dict().items():
        if name == "model.embed_tokens.weight" and has_coded_table(net):
            continue  # the file has only the head's codes: tie_embedding makes the table
        kept_dtype = dtype if empty.dtype == torch.float32 else empty.dtype
        state[name] = tensors[name].to(device, kept_dtype)
    # assign: what is on meta has no memory to copy into. It also parts what was tied.
    net.load_state_dict(state, strict=False, assign=True)
    tie_embedding(net, dtype)


def has_coded_table(net):
    """Whether the embedding is tied to a head of int8 codes, and so is in no file."""
    return net.config.tie and isinstance(net.lm_head, QuantizedLinear)


# --------------------------------------------------------------------------------------------------
# Load an adapter: a PEFT folder and its base


def is_adapter(folder):
    """Whether a folder holds an adapter, and no model of its own."""
    if not (folder / "adapter_config.json").is_file():
        return False
    weights = [name for name in ("model.safetensors", INDEX) if (folder / name).is_file()]
    if not (folder / "config.json").is_file() or not weights:
        return True  # trainers may leave the base's config.json beside an adapter
    if (folder / "adapter_model.safetensors").is_file():
        why = f"{weights[0]} and adapter_model.safetensors are here: move one of them away"
        raise UserError(f"{folder}: a model, or an adapter? {why}")
    return False


def load_adapted(folder, device, dtype, quantize, fast, above=()):
    """Open a PEFT folder of LoRA: its base (a path as seen from the folder, or what `find` takes),
    with the adapter's products added to its weights. above: the adapters that have it as base."""
    path = folder / "adapter_config.json"
    d = read_adapter_config(path)
    base = find_base(folder, d["base_model_name_or_path"])
    above = (*above, folder.resolve())
    if base.resolve() in above:  # a circle, which would be followed for ever
        raise UserError(f"{path}: the base {base} is this adapter, or is made with it")
    # The base is not quantized: the products are added to its weights first.
    if is_adapter(base):
        net, tok = load_adapted(base, device, dtype, None, fast, above)
    else:
        net, tok = load(base, device, dtype, fast=fast)
    add_lora(net, folder, base, d)
    if quantize:
        quantize_weights(net, quantize)
    if (folder / "tokenizer.json").is_file():
        tok = adapter_tokenizer(folder, tok.eos_ids)
    if tok.n_vocab > net.config.vocab_size:
        why = f"{tok.n_vocab} tokens, but the base knows {net.config.vocab_size}"
        raise UserError(f"{folder}: {why}")
    return net, tok


def adapter_tokenizer(folder, base_ends):
    """The tokenizer in an adapter's folder; base_ends: the ids at which the base's texts end."""
    tok = Tokenizer.from_folder(folder)
    if not (folder / "generation_config.json").is_file():  # as PEFT leaves it: the base's count
        for id in base_ends:
            if id not in tok.eos_ids:
                tok.eos_ids = [*tok.eos_ids, id]
    return tok


def find_base(folder, name):
    """The folder of an adapter's base, by the name that the adapter in `folder` has for it."""
    try:
        beside = folder / name
        if beside.is_dir():
            return beside
        exists = beside.exists()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        raise UserError(f"{folder}: the base {name!r:.60} is no name of a folder") from None
    if exists:
        raise UserError(f"{folder}: the base {name!r:.60} is a file, not a folder")
    return find(name)


# --------------------------------------------------------------------------------------------------
# Save


def saved_tensors(net):
    """The tensors that a network's file holds, by our names: of tied ones, the one that is read."""
    if has_coded_table(net):
        absent = "model.embed_tokens.weight"
    elif net.config.tie or net.score is not None:  # a classifier's head is read by nothing
        absent = "lm_head.weight"
    else:
        absent = None
    return {name: t for name, t in net.state_dict().items() if name != absent}


def save(folder, net, tok, step=0, state=None):
    """Write a checkpoint folder; with `state` (tensors and plain values) also state.pt, to resume.
    The weights, without which nothing opens the folder, come last. The folder is new, or of this
    very model: another model's is taken apart first (`clear_folder`)."""
    folder = Path(folder)
    make_folder(folder)
    config = to_hf_config(net, tok)
    tensors = tensors_in_file(saved_tensors(net), config["model_type"])
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)  # what transformers' generate reads
    write_json(folder / "tokenizer.json", tok.spec)
    length = {"model_max_length": net.config.n_ctx}  # where transformers warns of long texts
    write_json(folder / "tokenizer_config.json", tok.config | length)
    write_weights(folder / "model.safetensors", tensors, step, state)


# --------------------------------------------------------------------------------------------------
# What a run must not write into


def model_and_bases(name):
    """The folders that a model is read from: its own and, of an adapter, those of its base."""
    folder = find(name)
    folders = []
    while folder not in folders:
        folders.append(folder)
        path = folder / "adapter_config.json"
        if not path.is_file() or (folder / "config.json").is_file():
            break
        base = read_json(path).get("base_model_name_or_path")
        if not isinstance(base, str):  # which `load` refuses
            break
        folder = folder / base if (folder / base).is_dir() else find(base)
    return folders


def refuse_source(out_dir, name):
    """Refuse to write into a folder that the model of this name is read from: what is replaced
    before the first save would be lost with a kill."""
    places = [Path(out_dir), *(Path(out_dir) / part for part in PARTS)]
    written = [place.resolve() for place in places]
    for source in model_and_bases(name):
        if source.resolve() in written:
            raise UserError(f"--out_dir={out_dir}: it is the model to start from: take another")
