"""A checkpoint is a Hugging Face folder: found, loaded, saved."""

import os
import re
import time
from pathlib import Path

import torch

from barelm.adapters import add_adapters
from barelm.download import HUB, download
from barelm.families import (
    GPT2_MASKS,
    family,
    from_gpt2,
    from_hf_config,
    gpt2_names,
    to_gpt2,
    to_hf_config,
)
from barelm.fast import QuantizedLinear, quantize_weights, tie_embedding
from barelm.files import read_json, write_json
from barelm.resume import PARTS, make_folder, write_weights
from barelm.run import UserError
from barelm.safetensors import INDEX, entries_of, read_safetensors
from barelm.tokenizer import Tokenizer
from model import GPT, LARGEST


def is_hub_name(name):
    """Whether a name that is no folder here may be a Hub model's (owner/name, or name)."""
    owner = str(name).partition("/")[0]
    local = owner == "out" or Path(owner).exists()
    return not local and bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)))


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
    while int(os.environ.get("LOCAL_RANK", 0)) and not cached.is_dir():
        time.sleep(1)  # the machine's first process downloads; where it fails, torchrun ends all
    if not cached.is_dir():
        download_model(str(name), cached)
    return cached


def download_model(name, folder):
    """Fetch the files of a Hub model that are read here. The folder has its name when it has all;
    what was refused, or cut, goes on from where it was."""
    token, part = os.environ.get("HF_TOKEN"), folder.with_name(folder.name + ".part")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    get = lambda file, **how: download(
        f"{HUB}{name}/resolve/main/{file}", part / file, headers=headers, **how
    )
    try:
        get("config.json", tries=1)
    except UserError as error:
        why = str(error).removeprefix(f"{HUB}{name}/resolve/main/config.json: ")
        raise UserError(f"{name}: neither a folder here nor a model from {HUB}: {why}") from None
    read_config(part)
    for file in ("tokenizer", "tokenizer_config", "special_tokens_map", "generation_config"):
        get(f"{file}.json", optional=True)
    get("chat_template.jinja", optional=True)
    Tokenizer.from_folder(part)  # what does not run here is refused before its weights come
    if not get("model.safetensors", optional=True):
        get(INDEX, optional=True)
        for path in weights_of(part):
            get(path.name)
    os.replace(part, folder)


def read_config(folder):
    """A folder's config.json, as a dict and as a GPTConfig."""
    path = folder / "config.json"
    d = read_json(path)
    try:
        c = from_hf_config(d, path)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: malformed: {error}") from None
    size = d.get("adapter_size")
    whole = type(size) is int and 0 <= size <= LARGEST
    pooled = ("last", "mean") if d["model_type"] == "barelm" else ("last",)
    checks = {"adapter_size": size is None or whole, "pooling": d.get("pooling", "last") in pooled}
    checks["quantize"] = d.get("quantize") in (None, "int8", "int4")
    for key, good in checks.items():
        if not good:
            raise UserError(f"{path}: {key}={d[key]!r:.60} not supported")
    return d, c


def weights_of(folder):
    """The paths of the files that hold a folder's tensors: one, or those that an index names."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if not whole.is_file() and index.is_file():
        names = read_json(index).get("weight_map")
        names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else [""]
        if not all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names):
            raise UserError(f"{index}: malformed: expected names of safetensors files")
        return [folder / name for name in names]
    if not whole.is_file():
        why = "no model.safetensors here, nor its index (a pytorch_model.bin is a pickle, "
        raise UserError(f"{folder}: {why}which may run code: convert it where you trust it)")
    return [whole]


def load(folder, device="cpu", dtype=torch.float32, quantize=None, fast=True):
    """Open a checkpoint folder, ours or Hugging Face's, or a model of the Hub by its name: (GPT in
    eval mode, Tokenizer).
    quantize: int8 or int4 for the linear layers; what is left of the network stays in dtype.
    fast: as GPT takes it."""
    folder = find(folder)
    if is_adapter(folder):
        return load_adapted(folder, device, dtype, quantize, fast)
    d, c = read_config(folder)
    if d["model_type"] == "mistral" and c.n_ctx < d["max_position_embeddings"]:
        print(f"{folder}: the context ends with the sliding window, at {c.n_ctx} tokens")
    tok = Tokenizer.from_folder(folder)
    if tok.n_vocab > c.vocab_size:
        raise UserError(f"{folder}: {tok.n_vocab} tokens, but the model knows {c.vocab_size}")
    gpt2 = d["model_type"] == "gpt2"
    unread = GPT2_MASKS if gpt2 else (".rotary_emb.inv_freq",)
    entries = read_entries(folder, unread)
    check_layers(folder, entries, c.n_layer)  # before anything of that size is built
    labels = read_labels(folder, d, entries)
    with torch.device("meta"):
        net = GPT(c, fast)
        if size := d.get("adapter_size"):
            add_adapters(net, size)
        if labels:
            net.set_score(labels, d.get("pooling", "last"), d.get("pad_token_id"))
        if d.get("quantize"):
            quantize_weights(net, d["quantize"])
    check_entries(folder, entries, net, gpt2)
    tensors = read_weights(folder, unread, dtype)
    want = net.state_dict()
    if c.tie and isinstance(net.lm_head, QuantizedLinear):
        del want["model.embed_tokens.weight"]
    tensors = from_gpt2(tensors, want) if gpt2 else tensors
    if c.tie and "model.embed_tokens.weight" in tensors:
        table = tensors["model.embed_tokens.weight"]
        tied = tensors.get("lm_head.weight", table)
        if tied.dtype != table.dtype or not tied.equal(table):
            raise UserError(f"{folder}: lm_head.weight is not the embedding that it is tied to")
        tensors["lm_head.weight"] = table
    if labels and "lm_head.weight" not in tensors:  # a classifier's file has none: nothing reads it
        tensors["lm_head.weight"] = torch.zeros(c.vocab_size, c.n_embd)
    for n, t in want.items():  # codes and their scales keep their types
        tensors[n] = tensors[n].to(device, dtype if t.dtype == torch.float32 else t.dtype)
    net.load_state_dict({n: tensors[n] for n in want}, strict=False, assign=True)
    tie_embedding(net, dtype)
    if quantize:
        quantize_weights(net, quantize)
    return net.eval(), tok


def read_entries(folder, unread):
    """{name: (dtype, shape)} of the tensors in a folder's files, of which each holds others, but
    for names that end with one of `unread`."""
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
    found = set()
    for name in entries:
        if match := re.match(r"(?:model\.layers|(?:transformer\.)?h)\.(\d{1,9})\.", name):
            found.add(int(match[1]))
    if len(found) != n_layer:
        raise UserError(f"{folder}: {n_layer} layers in config.json, {len(found)} in its weights")


def read_labels(folder, d, entries):
    """The labels of a folder's classifier, by a config.json's dict d; none of a text model's."""
    if "ForSequenceClassification" not in str(d.get("architectures")):
        return []
    _, shape = entries.get("score.weight", (None, []))
    if len(shape) != 2 or shape[0] == 0:
        raise UserError(f"{folder}: a classifier by its config.json, but without a score.weight")
    usual = {str(i): f"LABEL_{i}" for i in range(shape[0])}
    labels = usual if d.get("id2label") is None else d["id2label"]
    good = isinstance(labels, dict) and labels.keys() == usual.keys()
    good = good and all(isinstance(label, str) for label in labels.values())
    if not good or len(set(labels.values())) < shape[0]:
        why = f"{labels!r:.60}: expected a name of its own for each of 0 to {shape[0] - 1}"
        raise UserError(f"{folder}/config.json: id2label={why}")
    return [labels[number] for number in usual]


def check_entries(folder, entries, net, gpt2):
    """Refuse files whose tensors, {name: (dtype, shape)}, are not the network's."""
    want = saved_tensors(net)
    if gpt2:  # whose own files have no prefix
        want = {name.removeprefix("transformer."): t for name, t in to_gpt2(want).items()}
        short = {name.removeprefix("transformer."): entry for name, entry in entries.items()}
        if len(short) < len(entries):
            raise UserError(f"{folder}: tensors with and without the prefix transformer.")
        entries = short
    spare = {"lm_head.weight": net.lm_head.weight}  # of a tied head, or beside a classifier's
    bad = []
    for name, t in (spare | want).items():
        if name in want or name in entries:
            dtype, shape = entries.get(name, (torch.bool, []))
            both_float = dtype.is_floating_point and t.is_floating_point()
            if shape != list(t.shape) or not (both_float or dtype == t.dtype):
                bad.append(name)
    for name in entries:
        if name not in want and name not in spare:
            bad.append(name)
    if bad:
        raise UserError(f"{folder}: tensors that config.json does not fit: {', '.join(bad[:3])}")


def read_weights(folder, unread, dtype):
    """{name: tensor} of a folder's files, but for names that end with one of `unread`. What is not
    finite as dtype is a UserError."""
    tensors = {}
    for path in weights_of(folder):
        part, _ = read_safetensors(path)
        part = {name: t for name, t in part.items() if not name.endswith(unread)}
        check_finite(path, part, dtype)
        tensors |= part
    return tensors


def check_finite(path, tensors, dtype=torch.float32):
    """Refuse {name: tensor} with a NaN or an infinity, or with a number that dtype has none for."""
    largest = torch.finfo(dtype).max
    for name, t in tensors.items():
        if t.is_floating_point() and t.numel():
            low, high = (x.item() for x in t.detach().aminmax())  # a NaN anywhere is both
            if not (low >= -largest and high <= largest):
                raise UserError(f"{path}: {name} has numbers that are not finite in {dtype}")


def is_adapter(folder):
    """Whether a folder holds an adapter, and no model of its own."""
    if not (folder / "adapter_config.json").is_file():
        return False
    weights = [name for name in ("model.safetensors", INDEX) if (folder / name).is_file()]
    if not (folder / "config.json").is_file() or not weights:
        return True
    if (folder / "adapter_model.safetensors").is_file():
        why = f"{weights[0]} and adapter_model.safetensors are here: move one of them away"
        raise UserError(f"{folder}: a model, or an adapter? {why}")
    return False


def load_adapted(folder, device, dtype, quantize, fast, above=()):
    """Open a PEFT folder of LoRA: its base (a path as seen from the folder, or what `find` takes),
    with the adapter's products added to its weights. above: the adapters that have it as base."""
    path = folder / "adapter_config.json"
    d = read_json(path)
    check_adapter(path, d)
    base, above = find_base(folder, d["base_model_name_or_path"]), (*above, folder.resolve())
    if base.resolve() in above:
        raise UserError(f"{path}: the base {base} is this adapter, or is made with it")
    if is_adapter(base):
        net, tok = load_adapted(base, device, dtype, None, fast, above)
    else:
        net, tok = load(base, device, dtype, fast=fast)
    weights = dict(net.named_parameters())
    names = gpt2_names(weights) if family(net.config) == "gpt2" else {n: [n] for n in weights}
    bare = lambda n: n.removeprefix("transformer.").removeprefix("model.")
    names |= {bare(n): ours for n, ours in names.items()}  # as transformers' AutoModel has them
    file = folder / "adapter_model.safetensors"
    tensors, _ = read_safetensors(file)
    pairs = {key: key.replace("lora_A", "lora_B") for key in tensors if ".lora_A.weight" in key}
    if tensors.keys() != {*pairs, *pairs.values()}:
        why = "only LoRA's two matrices a layer are read, not rsLoRA, DoRA or modules_to_save"
        raise UserError(f"{folder}: {why}")
    if odd := [name for name, t in tensors.items() if not t.is_floating_point()]:
        raise UserError(f"{file}: {odd[0]} has whole numbers, no weights")
    check_finite(file, tensors)
    for key, other in pairs.items():
        A, B = tensors[key], tensors[other]
        name = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        ours = [weights[n] for n in names.get(f"{name}.weight", ())]
        rows = [len(p) for p in ours]
        fits = ours and A.ndim == 2 and ours[0].shape[1] == A.shape[1]
        if not fits or B.shape != (sum(rows), len(A)):
            why = f"an adapter for another base than {base}: {key} does not fit"
            raise UserError(f"{folder}: {why}")
        rank = of_pattern(d.get("rank_pattern"), name, d["r"])
        if rank != len(A):
            raise UserError(f"{path}: r={rank!r:.60}, but {key} has {len(A)} rows")
        alpha = of_pattern(d.get("alpha_pattern"), name, d["lora_alpha"])
        delta = (alpha / rank) * (B.float() @ A.float()).to(device)
        with torch.no_grad():
            for p, part in zip(ours, delta.split(rows)):
                p += part.to(p.dtype)
                check_finite(file, {key: p}, p.dtype)
    if quantize:
        quantize_weights(net, quantize)
    if (folder / "tokenizer.json").is_file():
        base_ends, tok = tok.eos_ids, Tokenizer.from_folder(folder)
        if not (folder / "generation_config.json").is_file():  # as PEFT leaves it: the base's count
            tok.eos_ids = list(dict.fromkeys([*tok.eos_ids, *base_ends]))
    if tok.n_vocab > net.config.vocab_size:
        why = f"{tok.n_vocab} tokens, but the base knows {net.config.vocab_size}"
        raise UserError(f"{folder}: {why}")
    return net, tok


# Of an adapter_config.json: what may be anything, since it changes no product or is checked apart.
PEFT_NOTES = """alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out
inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type
peft_version qalora_group_size r rank_pattern runtime_config target_modules task_type"""
# What else may be there with a value; any other key with one changes the product.
PEFT_EXACT = dict(bias=("none",), revision=("main",))
PEFT_EXACT |= dict(init_lora_weights=(True, "gaussian", "orthogonal", "eva"))


def check_adapter(path, d):
    """Refuse an adapter_config.json that is no plain LoRA's: adapter_config.json at path, as d."""
    named = d.get("base_model_name_or_path")
    if not named or not isinstance(named, str) or d.get("peft_type") != "LORA":
        raise UserError(f"{path}: no LoRA adapter, or one that does not name its base")
    odd = []
    for key, value in d.items():
        if key not in PEFT_NOTES.split() and value and value not in PEFT_EXACT.get(key, ()):
            odd.append(f"{key}={value!r:.60}")
    if odd:
        what = "only plain LoRA is read, not rsLoRA, DoRA, modules_to_save or other kinds"
        raise UserError(f"{path}: {', '.join(odd[:3])}: {what}")
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns[key] = {} if d.get(key) is None else d[key]
        if not isinstance(patterns[key], dict):
            raise UserError(f"{path}: {key}: expected names with a number each")
        for name in patterns[key]:
            check_pattern(path, name)
    for rank in (d.get("r"), *patterns["rank_pattern"].values()):
        if type(rank) is not int or not 1 <= rank <= LARGEST:
            raise UserError(f"{path}: r={rank!r:.60}: expected a whole number above 0")
    for alpha in (d.get("lora_alpha"), *patterns["alpha_pattern"].values()):
        if type(alpha) not in (int, float) or not abs(alpha) <= LARGEST:
            raise UserError(
                f"{path}: lora_alpha={alpha!r:.60}: expected a number, at most {LARGEST}"
            )


def check_pattern(path, pattern):
    """Refuse what is no regular expression, or repeats a group, which may take for ever."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: {pattern!r:.60}: no regular expression: {error}") from None
    if re.search(r"\)[*+{]", pattern):
        raise UserError(f"{path}: {pattern!r:.60}: a repeated group is not supported")


def of_pattern(patterns, name, usual):
    """What patterns, {regular expression: value}, have for a layer's name, or for what follows a
    dot in it; `usual` where none matches. As in PEFT the first that matches counts."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return usual


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


def saved_tensors(net):
    """The tensors that a network's file holds, by our names: of tied ones, the one that is read."""
    absent = "lm_head.weight" if net.config.tie or net.score is not None else None
    if net.config.tie and isinstance(net.lm_head, QuantizedLinear):
        absent = "model.embed_tokens.weight"
    return {n: t for n, t in net.state_dict().items() if n != absent}


def save(folder, net, tok, step=0, state=None):
    """Write a checkpoint folder; with `state` (tensors and plain values) also state.pt, to resume.
    The weights, without which nothing opens the folder, come last. The folder is new, or of this
    very model: another model's is taken apart first (`clear_folder`)."""
    folder, c = Path(folder), net.config
    make_folder(folder)
    tensors, config = saved_tensors(net), to_hf_config(net, tok)
    tensors = to_gpt2(tensors) if config["model_type"] == "gpt2" else tensors
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer.json", tok.spec)
    write_json(folder / "tokenizer_config.json", tok.config | {"model_max_length": c.n_ctx})
    write_weights(folder / "model.safetensors", tensors, step, state)


def model_and_bases(name):
    """The folders that a model is read from: its own and, of an adapter, those of its base."""
    folders, folder = [], find(name)
    while folder not in folders:
        folders.append(folder)
        adapted = (folder / "adapter_config.json").is_file()
        if not adapted or (folder / "config.json").is_file():
            break
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str):  # which `load` refuses
            break
        folder = folder / base if (folder / base).is_dir() else find(base)
    return folders


def refuse_source(out_dir, name):
    """Refuse to write into a folder that the model of this name is read from: what is replaced
    before the first save would be lost with a kill."""
    places = [Path(out_dir)] + [Path(out_dir) / part for part in PARTS]
    for source in model_and_bases(name):
        if source.resolve() in [place.resolve() for place in places]:
            raise UserError(f"--out_dir={out_dir}: it is the model to start from: take another")
