"""transformers' config.json, to ours and back, by the entries of family_table.py.

What an entry does not mention is not lost: `family` answers "barelm" for a network with a field
that no entry holds."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, replace
from typing import TYPE_CHECKING, Any

from barelm.config_keys import Inexact
from barelm.family_table import FAMILIES, REFUSED, Family
from barelm.run import UserError
from barelm.tensor_names import TensorNames
from model import GPTConfig

if TYPE_CHECKING:
    from pathlib import Path

    from barelm.config_keys import Part
    from barelm.tokenizer import Tokenizer
    from model import GPT

__all__ = ["FAMILIES", "Family", "TensorNames"]

# What no family here may have otherwise: the values with which we are exact, an absent key's first.
EXACT = {
    "partial_rotary_factor": (None, 1),
    "scale_attn_weights": (True,),
    "is_causal": (True,),
    "original_max_position_embeddings": (None,),  # it would count before the one in the rope's dict
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
    "quantization_config": (None, False),
}
# What shapes training alone: written under our own names, which transformers passes over.
TRAINING = ("dropout", "init", "balance", "balance_weight", "z_weight")
# What a config.json of model_type barelm has beside GPTConfig's fields.
BESIDE = (
    "model_type",
    "torch_dtype",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "architectures",
    "id2label",
    "label2id",
    "task",
    "pooling",
    "pooler",
    "adapter_size",
    "quantize",
    "int4_group",
    "transformers_version",
)


# --------------------------------------------------------------------------------------------------
# Which family holds a network


def default_of(f: Any) -> Any:
    """The default of a dataclass's field; MISSING where it has none."""
    if f.default_factory is not MISSING:
        return f.default_factory()
    return f.default


def misfits(c: GPTConfig, kind: str) -> dict:
    """{field: the value it would have to have} of the fields of a GPTConfig that a config.json of
    this model_type cannot hold. A field that the mapping does not name fits at its default."""
    entry = FAMILIES[kind]
    wanted = dict(entry.fixed)
    for name, value_of in entry.derived.items():
        wanted[name] = value_of(c)
    in_file = {*entry.keys, *TRAINING}
    for part in entry.parts:
        wanted |= read_back(c, part)
    for f in fields(c):
        # A field that was added to GPTConfig and not to the table comes by here: never lost.
        if f.name not in in_file and f.name not in wanted:
            wanted[f.name] = default_of(f)
    return {name: value for name, value in wanted.items() if getattr(c, name) != value}


def read_back(c: GPTConfig, part: Part) -> dict:
    """{field: value} of a part's fields as a file would have them, written by a GPTConfig."""
    try:
        return part.read(part.write(c), asdict(c))
    except Inexact:
        return {f.name: default_of(f) for f in fields(c) if f.name in part.fields}


def family(c: GPTConfig) -> str:
    """The Hugging Face model_type that holds this architecture, or "barelm" where none does."""
    for kind in FAMILIES:
        if not misfits(c, kind):
            return kind
    return "barelm"


def family_of(net: GPT) -> str:
    """The model_type that holds a network with what was added to it: its head, adapters, codes."""
    kind = family(net.config)
    if net.adapter_size or net.quantize:
        return "barelm"  # no class of transformers has these
    if net.score is None or kind == "barelm":
        return kind
    return kind if head_fits(net, FAMILIES[kind]) else "barelm"


def head_fits(net: GPT, entry: Family) -> bool:
    """Whether a family has a class with a network's head."""
    head = entry.heads.get(net.task)
    if head is None or net.pooler != head.pooler or head.bias != (net.score.bias is not None):
        return False
    return net.task != "classify" or net.pooling in head.poolings


# --------------------------------------------------------------------------------------------------
# Ours to config.json


def to_hf_config(net: GPT, tok: Tokenizer) -> dict:
    """config.json for a network and its tokenizer, as a dict."""
    kind = family_of(net)
    pad_id = tok.pad_id if net.pad_id is None else net.pad_id
    if net.config.position_offset and pad_id != net.config.position_offset - 1:
        kind = "barelm"  # elsewhere positions begin behind the number of the padding token
    dtype = str(net.model.embed_tokens.weight.dtype).removeprefix("torch.")
    out = {"model_type": kind, "torch_dtype": dtype, "dtype": dtype}  # before transformers 5, after
    out["bos_token_id"] = tok.bos_id
    out["eos_token_id"] = tok.eos_ids[0] if len(tok.eos_ids) == 1 else tok.eos_ids
    out["pad_token_id"] = pad_id
    if net.config.n_encoder_layer:
        out["decoder_start_token_id"] = net.start_id
    if net.score is not None:
        out |= head_keys(net, kind)
    out["architectures"] = [architecture(kind, net)]
    if kind != "barelm" and net.score is not None:
        return family_keys(net.config, kind) | out
    if kind != "barelm":
        return out | family_keys(net.config, kind)
    out |= asdict(net.config) | {"adapter_size": net.adapter_size, "quantize": net.quantize}
    if net.quantize == "int4":
        out["int4_group"] = net.int4_group
    return out


def head_keys(net: GPT, kind: str) -> dict:
    """What config.json says of a head: its labels, and what it reads of a text."""
    out = {
        "id2label": {str(i): label for i, label in enumerate(net.labels)},
        "label2id": {label: i for i, label in enumerate(net.labels)},
        "pooling": net.pooling,
    }
    if kind == "modernbert":
        out["classifier_pooling"] = "mean" if net.pooling == "mean" else "cls"
    if kind == "barelm":
        out |= {"task": net.task, "pooler": net.pooler}
    return out


TASKS = {
    "classify": "ForSequenceClassification",
    "tag": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}


def architecture(kind: str, net: GPT) -> str:
    """The name of the class that opens such a folder."""
    has_head = net.score is not None
    if kind != "barelm":
        entry = FAMILIES[kind]
        return entry.heads[net.task].architecture if has_head else entry.lm
    if has_head:
        return f"Barelm{TASKS[net.task]}"
    if net.config.n_encoder_layer:
        return "BarelmForConditionalGeneration"
    return "BarelmForCausalLM" if net.config.causal else "BarelmForMaskedLM"


def task_of(d: dict) -> str:
    """The task of the head that a config.json's dict says the model has; "" for a language
    model's."""
    names = str(d.get("architectures"))
    for task, ending in TASKS.items():
        if ending in names:
            return task
    return ""


def family_keys(c: GPTConfig, kind: str) -> dict:
    """What a GPTConfig says, under the keys of this model_type, which holds it."""
    entry = FAMILIES[kind]
    out = {}
    for name, key in entry.keys.items():
        out[key] = getattr(c, name)
    for f in fields(c):
        if f.name in TRAINING and getattr(c, f.name) != f.default:
            out[f.name] = getattr(c, f.name)
    for key in entry.dropout_keys:
        out[key] = c.dropout
    out |= entry.written
    for part in entry.parts:
        out |= part.write(c)
    for name, key in entry.copies.items():
        out[key] = getattr(c, name)
    return out


def table_of(kind: str, c: GPTConfig, task: str = "") -> TensorNames:
    """The TensorNames of a model_type's files, for a GPTConfig and a head; barelm's are our own."""
    if kind not in FAMILIES:
        return TensorNames()
    entry = FAMILIES[kind]
    table = entry.tensors if isinstance(entry.tensors, TensorNames) else entry.tensors(c)
    if task in entry.heads:
        head = entry.heads[task]
        # What a head reads is read, though another model's files have it for nothing.
        read = tuple(name + end for _, name in head.renames for end in ("weight", "bias"))
        unread = tuple(end for end in table.unread if not any(n.endswith(end) for n in read))
        table = replace(table.with_head(head.renames), unread=unread)
    return table


# --------------------------------------------------------------------------------------------------
# config.json to ours


def from_hf_config(d: dict, where: Path | str = "config.json") -> GPTConfig:
    """The GPTConfig of a config.json, given as a dict; UserError where we cannot be exact."""
    kind = d.get("model_type")
    if kind == "barelm":
        return from_our_config(d, where)
    if kind in list(REFUSED):  # lists, since a dict refuses to look for some JSON types
        raise UserError(f"{where}: model_type {kind!r} is not supported: {REFUSED[kind]}")
    if kind not in list(FAMILIES):
        why = f"is not supported: {', '.join(FAMILIES)} are"
        raise UserError(f"{where}: model_type {kind!r:.60} {why}")
    entry = FAMILIES[kind]
    d, other_faults = by_first_keys(d, entry)
    values, faults = read_keys(d, entry)
    faults += other_faults
    for part in entry.parts:
        try:
            values |= part.read(d, values)
        except Inexact as error:
            faults.append(str(error))
    faults += not_exact(d, entry)
    if faults:
        raise UserError(f"{where}: {', '.join(faults)}")
    values |= entry.fixed
    values |= training_values(d, entry)
    return checked_config(values, entry.keys, where)


def from_our_config(d: dict, where: str | Path) -> GPTConfig:
    """The GPTConfig of a config.json of model_type barelm, whose keys are its fields."""
    names = {f.name for f in fields(GPTConfig)}
    odd = [key for key in d if key not in names and key not in BESIDE]
    if odd:
        why = "no fields of GPTConfig: a fork's, or a later version's"
        raise UserError(f"{where}: {', '.join(odd[:3])}: {why}")
    return checked_config({name: d[name] for name in names if name in d}, {}, where)


def by_first_keys(d: dict, entry: Family) -> tuple[dict, list]:
    """(d with the first name of what it has by a second one, [what is wrong])."""
    out = dict(d)
    faults = []
    for other, key in entry.other_keys.items():
        value = d.get(other)
        if value is None:
            continue
        if out.get(key) not in (None, value):
            faults.append(f"{other}={value!r:.60} with {key}={out[key]!r:.60} not supported")
        out[key] = value
    return out, faults


def read_keys(d: dict, entry: Family) -> tuple[dict[str, float], list]:
    """({field: value} by the family's keys, [what is wrong with them])."""
    # null counts as absent, as in transformers.
    given = {name: d[key] for name, key in entry.keys.items() if d.get(key) is not None}
    values = entry.absent | given
    faults = [f"{key} missing" for name, key in entry.keys.items() if name not in values]
    for name in ("n_kv_head", "head_dim", "n_hidden"):
        if given.get(name) == 0:  # "the usual value" is our meaning of 0, not theirs
            faults.append(f"{entry.keys[name]}=0 not supported")
    return values, faults


def not_exact(d: dict, entry: Family) -> list[str]:
    """[what a config.json asks for that we would not compute exactly]."""
    read = {key for part in entry.parts for key in part.keys}
    faults = []
    for key, values in (EXACT | entry.exact).items():
        if key not in read and d.get(key, values[0]) not in values:
            faults.append(f"{key}={d.get(key)!r:.60} not supported")
    if "layer_types" not in read:
        kinds = d.get("layer_types") or []
        if not isinstance(kinds, list):
            return [*faults, f"layer_types={kinds!r:.60} not supported"]
        kinds = sorted({str(kind) for kind in kinds} - {"full_attention"})
        faults += [f"layer_types of {kind!r:.60} not supported" for kind in kinds]
    return faults


def training_values(d: dict, entry: Family) -> dict:
    """What shapes training alone: by our own keys, or else by the family's, if they agree."""
    values = {name: d[name] for name in TRAINING if name in d}
    if entry.dropout_keys and "dropout" not in d:
        rates = [d.get(key, 0.1) for key in entry.dropout_keys]  # 0.1: what transformers takes
        if rates.count(rates[0]) == len(rates):
            values["dropout"] = rates[0]
    return values


def checked_config(values: dict, names: dict[str, str], where: str | Path) -> GPTConfig:
    """GPTConfig(**values). What it refuses is told by the file, and by the name that the field has
    there: names[field], or its own."""
    try:
        return GPTConfig(**values)
    except UserError as error:
        name, _, rest = str(error).partition("=")
        raise UserError(f"{where}: {names.get(name, name)}={rest}") from None
