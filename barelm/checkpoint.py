"""A checkpoint is a Hugging Face folder: found, loaded, saved.

`load` opens ours and Hugging Face's folders, adapters (peft.py) and models of the Hub by name. The
formats are in families.py (config.json and tensor names) and safetensors.py."""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from barelm import host
from barelm.adapters import add_adapters
from barelm.download import HUB, download
from barelm.embeddings import POOLING_FILE, read_pooling, write_pooling
from barelm.families import FAMILIES, from_hf_config, table_of, task_of, to_hf_config
from barelm.files import read_json, write_json
from barelm.int4 import GROUP, OLD_GROUP
from barelm.packed import Packing, packing_of
from barelm.parts import part_like
from barelm.peft import add_lora, read_adapter_config
from barelm.quantized import quantize_weights, tie_embedding
from barelm.resume import PARTS, make_folder, write_weights
from barelm.run import UserError
from barelm.safetensors import INDEX
from barelm.shapes import LARGEST
from barelm.steps import SHARDS, is_step
from barelm.tensor_names import (
    TensorNames,
    renamed,
    tensors_from_file,
    tensors_in_file,
)
from barelm.tokenizer import Tokenizer
from barelm.weights import (
    check_entries,
    check_layers,
    complete_head,
    has_coded_table,
    names_here,
    read_entries,
    read_weights,
    saved_tensors,
    weights_of,
)
from model import GPT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from model import GPTConfig

# --------------------------------------------------------------------------------------------------
# Find: a folder here, or a model of the Hub


def is_hub_name(name: Path | str) -> bool:
    """Whether a name that is no folder here may be a Hub model's (owner/name, or name)."""
    owner = str(name).partition("/")[0]
    if owner == "out" or Path(owner).exists():
        return False  # a misspelt folder of one's own is not looked for in the network
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)))


def find(name: Path | str) -> Path | None:
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


def download_model(name: str, folder: Path) -> None:
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
    for file in ("modules.json", POOLING_FILE):
        get(file, optional=True)
    Tokenizer.from_folder(part)
    if not get("model.safetensors", optional=True):
        get(INDEX, optional=True)
        for path in weights_of(part):
            get(path.name)
    host.replace(part, folder)


# --------------------------------------------------------------------------------------------------
# Load


def load(folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
         quantize: str | None = None, fast: bool = True,
         split: str | None = None) -> tuple[GPT, Tokenizer]:  # fmt: skip
    """Open a checkpoint folder, ours or Hugging Face's, or a model of the Hub by its name: (GPT in
    eval mode, Tokenizer).
    quantize: int8 or int4 for the linear layers; what is left of the network stays in dtype.
    fast: as GPT takes it. split(net): leaves this process its part of an empty network, which alone
    is then filled (barelm/tensor_parallel.py)."""
    folder = find(folder)
    if is_adapter(folder) and split:
        raise UserError(f"{folder}: an adapter, which is not split: --tp=1")
    if is_adapter(folder):
        return load_adapted(folder, device, dtype, quantize, fast)
    settings, config = read_config(folder)
    kind = settings["model_type"]
    tok = Tokenizer.from_folder(folder)
    begin_texts(tok, config)
    if tok.n_vocab > config.vocab_size:
        raise UserError(f"{folder}: {tok.n_vocab} tokens, but the model knows {config.vocab_size}")

    # The names and shapes in the files' headers come first: what does not fit is refused before
    # anything of the size that config.json, or a file, claims is built.
    table = table_of(kind, config, task_of(settings))
    if is_step(folder):  # of a run that was written in parts, under our own names
        table = TensorNames()
    packing = packing_here(folder, settings, table)
    entries = read_entries(folder, table, packing)
    table = without_model(table, entries)
    check_layers(folder, entries, config, table)
    if kind in FAMILIES and FAMILIES[kind].tie_by_files:
        config = replace(config, tie="lm_head.weight" not in entries)
    if config.causal and not config.tie and is_trunk(settings):
        config = replace(config, tie=True)  # it has no head; what it says of next tokens is nothing
    head = read_head(folder, settings, entries, table)
    net = empty_network(config, settings, head, fast)
    check_entries(folder, entries, net, table)

    tensors = read_weights(folder, table, dtype, packing)
    tensors = tensors_from_file(tensors, names_here(net), table)
    if not config.tie and kind in FAMILIES and FAMILIES[kind].tie_by_files:
        net = tied_again(net, settings, tensors, head, fast)
    complete_head(folder, tensors, net)
    if split:
        split(net)
    fill(net, tensors, device, dtype)
    read_token_ids(folder, settings, net)
    if quantize:
        quantize_weights(net, quantize)
    read_embedding(folder, net)
    return net.eval(), tok


def packing_here(folder: Path, settings: dict, table: TensorNames) -> Packing | None:
    """The Packing of a folder with these settings and names; None of plain weights."""
    packing = packing_of(settings, folder / "config.json")
    if packing is None:
        return None
    return replace(packing, transposed=table.transposed)


def begin_texts(tok: Tokenizer, config: GPTConfig) -> None:
    """Let the texts of an encoder begin as its documents did in training, where the tokenizer does
    not say how."""
    if not config.causal and not tok.start and tok.eot_id is not None:
        tok.start = [tok.eot_id]


def is_trunk(settings: dict) -> bool:
    """Whether a config.json is that of a network without any head, such as a MistralModel: what
    models of vectors are saved as."""
    names = settings.get("architectures")
    is_one = isinstance(names, list) and len(names) == 1
    return is_one and bool(re.fullmatch(r"\w*(?<!LMHead)Model", str(names[0])))


def without_model(table: TensorNames, entries: dict) -> TensorNames:
    """The TensorNames of a file of these names, whose trunk may stand by itself: without `model.`
    before each."""
    bare = any(name.startswith(("layers.", "embed_tokens.", "embeddings.")) for name in entries)
    if bare and not table.prefix and not any(name.startswith("model.") for name in entries):
        return replace(table, prefix="model.")
    return table


def read_embedding(folder: Path, net: GPT) -> None:
    """Take over which state stands for a text, where the folder says so."""
    pooling = read_pooling(folder)
    if pooling is not None and net.score is None:
        net.pooling = pooling
        net.task = "embed"


def tied_again(
    net: GPT, settings: dict, tensors: dict[str, Tensor], head: HeadHere, fast: bool
) -> GPT:
    """The network with a tied head where a file whose config.json says so has a copy of it."""
    said = settings.get("tie_word_embeddings", True)
    if said and tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"]):
        return empty_network(replace(net.config, tie=True), settings, head, fast)
    return net


def read_token_ids(folder: Path, settings: dict, net: GPT) -> None:
    """Take over the ids that a network itself needs: of padding, and of an encoder-decoder's first
    token."""
    c = net.config
    ids = read_json(folder / "generation_config.json", {})
    ids |= {key: value for key, value in settings.items() if value is not None}
    names = ["pad_token_id"] if not c.causal or c.n_encoder_layer else []
    names += ["decoder_start_token_id"] if c.n_encoder_layer else []
    for name in names:
        id = ids.get(name)
        good = id is None or type(id) is int and 0 <= id < c.vocab_size
        if not good:
            why = f"expected the number of a token below {c.vocab_size:,}"
            raise UserError(f"{folder}/config.json: {name}={id!r:.60}: {why}")
    if names:
        net.pad_id = ids.get("pad_token_id")
    if c.n_encoder_layer:
        start = ids.get("decoder_start_token_id")
        net.start_id = net.pad_id if start is None else start  # T5's way
        if net.start_id is None:
            raise UserError(f"{folder}/config.json: decoder_start_token_id missing")


def read_config(folder: Path) -> tuple[dict, GPTConfig]:
    """A folder's config.json, as a dict and as a GPTConfig."""
    path = folder / "config.json"
    d = read_json(path)
    packing_of(d, path)  # which refuses what is packed otherwise; the rest is as without it
    plain = {key: value for key, value in d.items() if key != "quantization_config"}
    try:
        config = from_hf_config(plain, path)
    except (TypeError, ValueError, AttributeError) as error:  # such as a list where a text is due
        raise UserError(f"{path}: malformed: {error}") from None
    size = d.get("adapter_size")
    int4_group = d.get("int4_group", OLD_GROUP)
    checks = {
        "adapter_size": size is None or type(size) is int and 0 <= size <= LARGEST,
        "pooling": d.get("pooling", "last") in poolings_of(d),
        "classifier_pooling": d.get("classifier_pooling", "cls") in ("cls", "mean"),
        "pooler": d.get("pooler", "") in ("", "tanh", "gelu_norm"),
        "task": d.get("task", "classify") in ("classify", "tag", "span"),
        "quantize": d.get("quantize") in (None, "int8", "int4"),
        "int4_group": type(int4_group) is int and int4_group in (GROUP, OLD_GROUP),
    }
    for key, good in checks.items():
        if not good:
            raise UserError(f"{path}: {key}={d[key]!r:.60} not supported")
    return d, config


def poolings_of(d: dict) -> tuple[str, ...]:
    """What a classifier of a config.json's family may read of a text."""
    if d["model_type"] == "barelm":
        return ("last", "first", "mean")
    heads = FAMILIES[d["model_type"]].heads
    return (*heads["classify"].poolings, "last") if "classify" in heads else ("last",)


@dataclass
class HeadHere:
    """What a folder's files say of its head, as GPT.set_score takes it."""

    labels: list[str]
    task: str
    pooling: str
    pooler: str
    bias: bool


def read_head(folder: Path, d: dict, entries: dict, table: TensorNames) -> HeadHere | None:
    """The HeadHere of a folder, by a config.json's dict d; None of a language model's."""
    task = task_of(d)
    if not task:
        return None
    name = renamed("score.weight", table)
    _, shape = entries.get(name, (None, []))
    if len(shape) != 2 or shape[0] == 0:
        raise UserError(f"{folder}: a classifier by its config.json, but without a {name}")
    if task == "span" and shape[0] != 2:
        raise UserError(f"{folder}: {shape[0]} scores of a token: expected a start and an end")
    labels = ["start", "end"] if task == "span" else read_labels(folder, d, shape[0])
    bias = renamed("score.bias", table) in entries
    if d["model_type"] == "barelm":
        return HeadHere(labels, task, d.get("pooling", "last"), d.get("pooler", ""), bias)
    head = FAMILIES[d["model_type"]].heads[task]
    pooling = head.poolings[0]
    if d.get("classifier_pooling") == "mean" and "mean" in head.poolings:
        pooling = "mean"
    return HeadHere(labels, task, pooling, head.pooler, head.bias)


def read_labels(folder: Path, d: dict, n_labels: int) -> list[str]:
    """The names of a head's labels by a config.json's dict d."""
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


def empty_network(config: GPTConfig, settings: dict, head: HeadHere | None, fast: bool) -> GPT:
    """The network of a config.json, whose tensors have shapes and types but no memory."""
    with torch.device("meta"):
        net = GPT(config, fast)
        if settings.get("adapter_size"):
            add_adapters(net, settings["adapter_size"])
        if head is not None:
            pad_id = settings.get("pad_token_id")
            net.set_score(**asdict(head), pad_id=pad_id)
        if settings.get("quantize"):
            int4_group = settings.get("int4_group", OLD_GROUP)
            quantize_weights(net, settings["quantize"], int4_group)
    return net


def empty_of_step(folder: Path, fast: bool = True) -> GPT:
    """The network of a step's folder in a run's shards/, without memory."""
    settings, config = read_config(folder)
    table = TensorNames()
    head = read_head(folder, settings, read_entries(folder, table), table)
    return empty_network(config, settings, head, fast)


def fill(
    net: GPT, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype
) -> None:
    """Make {name: tensor} the tensors of an empty network: its floats in dtype, codes and their
    scales as they are."""
    state = {}
    for name, empty in net.state_dict().items():
        if name == "model.embed_tokens.weight" and has_coded_table(net):
            continue  # the file has only the head's codes: tie_embedding makes the table
        kept_dtype = dtype if empty.dtype == torch.float32 else empty.dtype
        state[name] = part_like(tensors[name], empty).to(device, kept_dtype)
    # assign: what is on meta has no memory to copy into. It also parts what was tied.
    net.load_state_dict(state, strict=False, assign=True)
    tie_embedding(net, dtype)


# --------------------------------------------------------------------------------------------------
# Load an adapter: a PEFT folder and its base


def is_adapter(folder: Path) -> bool:
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


def load_adapted(folder: Path, device: str | torch.device, dtype: torch.dtype, quantize: str | None,
                 fast: bool, above: Sequence = ()) -> tuple[GPT, Tokenizer]:  # fmt: skip
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
        begin_texts(tok, net.config)
    read_embedding(folder, net)
    if tok.n_vocab > net.config.vocab_size:
        why = f"{tok.n_vocab} tokens, but the base knows {net.config.vocab_size}"
        raise UserError(f"{folder}: {why}")
    return net, tok


def adapter_tokenizer(folder: Path, base_ends: list[int]) -> Tokenizer:
    """The tokenizer in an adapter's folder; base_ends: the ids at which the base's texts end."""
    tok = Tokenizer.from_folder(folder)
    if not (folder / "generation_config.json").is_file():  # as PEFT leaves it: the base's count
        for id in base_ends:
            if id not in tok.eos_ids:
                tok.eos_ids = [*tok.eos_ids, id]
    return tok


def find_base(folder: Path, name: str) -> Path:
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


def save(folder: Path, net: GPT, tok: Tokenizer, step: int = 0, state: dict | None = None,
         tensors: dict[str, Tensor] | None = None) -> None:  # fmt: skip
    """Write a checkpoint folder; with `state` (tensors and plain values) also state.pt, to resume.
    The weights, without which nothing opens the folder, come last. The folder is new, or of this
    very model: another model's is taken apart first (`clear_folder`). tensors: the network's, where
    it is divided and they were brought together (`saved_tensors`)."""
    folder = Path(folder)
    make_folder(folder)
    config = write_companions(folder, net, tok)
    task = net.task if net.score is not None else ""
    table = table_of(config["model_type"], net.config, task)
    tensors = tensors_in_file(saved_tensors(net) if tensors is None else tensors, table)
    write_weights(folder / "model.safetensors", tensors, step, state)


def write_companions(folder: Path, net: GPT, tok: Tokenizer) -> dict:
    """Write what a checkpoint folder has beside its weights; what config.json says."""
    config = to_hf_config(net, tok)
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)  # what transformers' generate reads
    write_json(folder / "tokenizer.json", tok.spec)
    if net.task == "embed":
        write_pooling(folder, net.pooling, net.config.n_embd)
    length = {"model_max_length": net.config.n_ctx}  # where transformers warns of long texts
    write_json(folder / "tokenizer_config.json", tok.config | length)
    return config


# --------------------------------------------------------------------------------------------------
# What a run must not write into


def model_and_bases(name: str) -> list[Path]:
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


def refuse_source(out_dir: str, name: str) -> None:
    """Refuse to write into a folder that the model of this name is read from: what is replaced
    before the first save would be lost with a kill."""
    places = [Path(out_dir), *(Path(out_dir) / part for part in PARTS)]
    written = [place.resolve() for place in places]
    for source in model_and_bases(name):
        if source.resolve() in written or written[0] / SHARDS in source.resolve().parents:
            raise UserError(f"--out_dir={out_dir}: it is the model to start from: take another")
