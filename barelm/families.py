"""transformers' config.json and tensor names, to ours and back: one entry of FAMILIES a model_type.

A new family is one `Family` in the table below. What it must say is where its config.json has each
field of GPTConfig that differs from model to model (`keys`), what all its models have in common
(`fixed`), and how its files name their tensors (`tensors`). What the entry does not mention is not
lost: `family` answers "barelm" for a network with a field that no entry holds."""

import re
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields

import torch

from barelm.run import UserError
from model import GPTConfig


@dataclass(frozen=True)
class TensorNames:
    """How a family's files name and lay out the tensors of our state_dict. Where one of their
    tensors has several of ours (GPT-2's q, k and v), these stand one below the other in it."""

    renames: tuple[tuple[str, str], ...] = ()  # (ours, theirs), replaced one after another
    transposed: bool = False  # matrices of linear layers are (in, out) there
    prefix: str = ""  # that the names in some files lack
    unread: tuple[str, ...] = (".rotary_emb.inv_freq",)  # ends of names: what is computed here


@dataclass(frozen=True)
class Family:
    """How the models of one model_type say in config.json what GPTConfig says here."""

    causal_lm: str  # the classes that config.json's `architectures` names
    classifier: str
    keys: dict[str, str]  # GPTConfig's field: its key, for what differs from model to model
    fixed: dict  # GPTConfig's field: the value that every model of the family has
    absent: dict  # GPTConfig's field: what transformers takes where its key is absent
    # GPTConfig's field: a function of the config, for a value that follows from others there.
    derived: dict[str, Callable] = field(default_factory=dict)
    # Key: the values with which we are exact, that of an absent key first.
    exact: dict[str, tuple] = field(default_factory=dict)
    dropout_keys: tuple[str, ...] = ()  # their names for our one dropout
    sliding_window: int | None = None  # where the key is absent; None: the family has no window
    written: dict = field(default_factory=dict)  # keys that we write for other readers
    copies: dict[str, str] = field(default_factory=dict)  # GPTConfig's field: a second key, written
    tensors: TensorNames = TensorNames()

    @property
    def has_rope(self):
        return self.fixed["pos"] == "rope"


# --------------------------------------------------------------------------------------------------
# The table

LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie": "tie_word_embeddings",
}
GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "n_ctx": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_hidden": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "tie": "tie_word_embeddings",
}
LLAMA_FIXED = {
    "norm": "rms",
    "norm_place": "pre",
    "pos": "rope",
    "mlp": "swiglu",
    "bias": False,
    "qk_norm": False,
    "qkv_bias": False,
}
LLAMA_EXACT = {"hidden_act": (None, "silu", "swish")}
LLAMA_WRITTEN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
GPT2_TENSORS = TensorNames(
    renames=(
        ("model.", "transformer."),
        ("embed_tokens", "wte"),
        ("embed_positions", "wpe"),
        (".layers.", ".h."),
        (".norm.", ".ln_f."),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("self_attn.q_proj", "attn.c_attn"),
        ("self_attn.k_proj", "attn.c_attn"),
        ("self_attn.v_proj", "attn.c_attn"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("up_proj", "c_fc"),
        ("mlp.down_proj", "mlp.c_proj"),
    ),
    transposed=True,  # its layers are Conv1D
    prefix="transformer.",
    unread=(".attn.bias", ".attn.masked_bias"),  # causal masks of old files
)


def heads_of_queries(c):
    """n_kv_head of a family without grouped-query attention."""
    return c.n_head


def width_of_a_head(c):
    """head_dim of a family whose heads share the width among them."""
    return c.n_embd / c.n_head


# Of several that hold a network the first is written: Mistral's, within its window, is Llama's.
FAMILIES = {
    "qwen3": Family(
        causal_lm="Qwen3ForCausalLM",
        classifier="Qwen3ForSequenceClassification",
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED | {"qk_norm": True},
        absent={"tie": False},  # transformers' head_dim is 128 there, whatever the width: refuse
        exact=LLAMA_EXACT,
        written=LLAMA_WRITTEN,
    ),
    "qwen2": Family(
        causal_lm="Qwen2ForCausalLM",
        classifier="Qwen2ForSequenceClassification",
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED | {"qkv_bias": True},
        absent={"tie": False, "head_dim": 0},
        exact=LLAMA_EXACT,
        written=LLAMA_WRITTEN,
    ),
    "llama": Family(
        causal_lm="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED,
        absent={"tie": False, "head_dim": 0, "n_kv_head": 0},
        exact=LLAMA_EXACT,
        written=LLAMA_WRITTEN,
    ),
    "mistral": Family(
        causal_lm="MistralForCausalLM",
        classifier="MistralForSequenceClassification",
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED,
        absent={"tie": False, "head_dim": 0},
        exact=LLAMA_EXACT,
        sliding_window=4096,
        written=LLAMA_WRITTEN,
    ),
    "gpt2": Family(
        causal_lm="GPT2LMHeadModel",
        classifier="GPT2ForSequenceClassification",
        keys=GPT2_KEYS,
        fixed=LLAMA_FIXED | {"norm": "layer", "pos": "learned", "mlp": "gelu", "bias": True},
        absent={"tie": True, "n_hidden": 0},
        derived={"n_kv_head": heads_of_queries, "head_dim": width_of_a_head},
        exact={"activation_function": (None, "gelu_new", "gelu_pytorch_tanh")},
        dropout_keys=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        written={"activation_function": "gelu_new"},
        copies={"n_ctx": "n_ctx"},
        tensors=GPT2_TENSORS,
    ),
}

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
ROPE_FIELDS = ("rope_theta", "rope_scaling")
# What shapes training alone: written under our own names, which transformers passes over.
TRAINING = ("dropout", "init")
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
    "pooling",
    "adapter_size",
    "quantize",
    "transformers_version",
)


# --------------------------------------------------------------------------------------------------
# Which family holds a network


def default_of(f):
    """The default of a dataclass's field; MISSING where it has none."""
    if f.default_factory is not MISSING:
        return f.default_factory()
    return f.default


def misfits(c, kind):
    """{field: the value it would have to have} of the fields of a GPTConfig that a config.json of
    this model_type cannot hold. A field that the mapping does not name fits at its default."""
    entry = FAMILIES[kind]
    wanted = dict(entry.fixed)
    for name, value_of in entry.derived.items():
        wanted[name] = value_of(c)
    in_file = {*entry.keys, *TRAINING}
    if entry.has_rope:
        in_file.update(ROPE_FIELDS)
    for f in fields(c):
        # A field that was added to GPTConfig and not to the table comes by here: never lost.
        if f.name not in in_file and f.name not in wanted:
            wanted[f.name] = default_of(f)
    return {name: value for name, value in wanted.items() if getattr(c, name) != value}


def family(c):
    """The Hugging Face model_type that holds this architecture, or "barelm" where none does."""
    for kind in FAMILIES:
        if not misfits(c, kind):
            return kind
    return "barelm"


# --------------------------------------------------------------------------------------------------
# Ours to config.json


def to_hf_config(net, tok):
    """config.json for a network and its tokenizer, as a dict."""
    kind = family(net.config)
    if net.pooling != "last" or net.adapter_size or net.quantize:
        kind = "barelm"  # no class of transformers has these
    dtype = str(net.model.embed_tokens.weight.dtype).removeprefix("torch.")
    out = {"model_type": kind, "torch_dtype": dtype, "dtype": dtype}  # before transformers 5, after
    out["bos_token_id"] = tok.bos_id
    out["eos_token_id"] = tok.eos_ids[0] if len(tok.eos_ids) == 1 else tok.eos_ids
    out["pad_token_id"] = tok.pad_id
    if net.config.n_encoder_layer:
        out["decoder_start_token_id"] = net.start_id
    if net.score is not None:
        out |= classifier_keys(net, tok)
    out["architectures"] = [architecture(kind, net.score is not None)]
    if kind != "barelm":
        return out | family_keys(net.config, kind)
    return out | asdict(net.config) | {"adapter_size": net.adapter_size, "quantize": net.quantize}


def classifier_keys(net, tok):
    """What config.json says of a classifier: its labels, and how a text's last token is found."""
    return {
        "id2label": {str(i): label for i, label in enumerate(net.labels)},
        "label2id": {label: i for i, label in enumerate(net.labels)},
        "pooling": net.pooling,
        "pad_token_id": tok.pad_id if net.pad_id is None else net.pad_id,
    }


def architecture(kind, is_classifier):
    """The name of the class that opens such a folder."""
    if kind == "barelm":
        return "BarelmForSequenceClassification" if is_classifier else "BarelmForCausalLM"
    return FAMILIES[kind].classifier if is_classifier else FAMILIES[kind].causal_lm


def family_keys(c, kind):
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
    if entry.has_rope:
        out |= {name: getattr(c, name) for name in ROPE_FIELDS}
    out |= entry.written
    for name, key in entry.copies.items():
        out[key] = getattr(c, name)
    return out


# --------------------------------------------------------------------------------------------------
# config.json to ours


def from_hf_config(d, where="config.json"):
    """The GPTConfig of a config.json, given as a dict; UserError where we cannot be exact."""
    kind = d.get("model_type")
    if kind == "barelm":
        return from_our_config(d, where)
    if kind not in list(FAMILIES):  # a list, since a dict refuses to look for some JSON types
        why = f"is not supported: {', '.join(FAMILIES)} are"
        raise UserError(f"{where}: model_type {kind!r:.60} {why}")
    entry = FAMILIES[kind]
    values, faults = read_keys(d, entry)
    faults += end_at_window(values, d, entry)
    d, rope, rope_faults = flat_rope(d)
    faults += rope_faults
    faults += not_exact(d, entry)
    if faults:
        raise UserError(f"{where}: {', '.join(faults)}")
    values |= entry.fixed
    values |= rope_values(d, rope)
    values |= training_values(d, entry)
    return checked_config(values, entry.keys, where)


def from_our_config(d, where):
    """The GPTConfig of a config.json of model_type barelm, whose keys are its fields."""
    names = {f.name for f in fields(GPTConfig)}
    odd = [key for key in d if key not in names and key not in BESIDE]
    if odd:
        why = "no fields of GPTConfig: a fork's, or a later version's"
        raise UserError(f"{where}: {', '.join(odd[:3])}: {why}")
    return checked_config({name: d[name] for name in names if name in d}, {}, where)


def read_keys(d, entry):
    """({field: value} by the family's keys, [what is wrong with them])."""
    # null counts as absent, as in transformers.
    given = {name: d[key] for name, key in entry.keys.items() if d.get(key) is not None}
    values = entry.absent | given
    faults = [f"{key} missing" for name, key in entry.keys.items() if name not in values]
    for name in ("n_kv_head", "head_dim", "n_hidden"):
        if given.get(name) == 0:  # "the usual value" is our meaning of 0, not theirs
            faults.append(f"{entry.keys[name]}=0 not supported")
    return values, faults


def end_at_window(values, d, entry):
    """Cut n_ctx of {field: value} to the sliding window, within which it changes nothing; [what is
    wrong with the window]."""
    if entry.sliding_window is None:
        return []
    window = d.get("sliding_window", entry.sliding_window)
    if window is None:  # the file says that there is none
        return []
    if type(window) is not int or window < 1:
        return [f"sliding_window={window!r:.60} not supported"]
    if type(values.get("n_ctx")) is int:
        values["n_ctx"] = min(values["n_ctx"], window)
    return []


def flat_rope(d):
    """(d with rope_theta and partial_rotary_factor as keys of its own, the rope's scaling, [what is
    wrong]): all is one dict in transformers 5, and apart in those before it."""
    rope = d.get("rope_scaling") or d.get("rope_parameters") or {}
    nested = isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values())
    if not isinstance(rope, dict) or nested:  # nested: another rope for each type of layer
        return d, {}, [f"rope_parameters={rope!r:.60} not supported"]
    scaling = dict(rope)
    beside = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in scaling:
            beside[key] = scaling.pop(key)
    return d | beside, scaling, []


def not_exact(d, entry):
    """[what a config.json asks for that we would not compute exactly]."""
    faults = []
    for key, values in (entry.exact | EXACT).items():
        if d.get(key, values[0]) not in values:
            faults.append(f"{key}={d[key]!r:.60} not supported")
    if entry.sliding_window is None:  # else the context ends where the window would count
        kinds = set(d.get("layer_types") or ()) - {"full_attention"}
        faults += [f"layers of {kind} not supported" for kind in kinds]
    return faults


def rope_values(d, rope):
    """rope_theta and rope_scaling, as GPTConfig has them."""
    theta = d.get("rope_theta")
    # `type` is the key's name in old files.
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    return {
        "rope_theta": 10000.0 if theta is None else theta,
        "rope_scaling": None if kind == "default" else rope,
    }


def training_values(d, entry):
    """What shapes training alone: by our own keys, or else by the family's, if they agree."""
    values = {name: d[name] for name in TRAINING if name in d}
    if entry.dropout_keys and "dropout" not in d:
        rates = [d.get(key, 0.1) for key in entry.dropout_keys]  # 0.1: what transformers takes
        if rates.count(rates[0]) == len(rates):
            values["dropout"] = rates[0]
    return values


def checked_config(values, names, where):
    """GPTConfig(**values). What it refuses is told by the file, and by the name that the field has
    there: names[field], or its own."""
    try:
        return GPTConfig(**values)
    except UserError as error:
        name, _, rest = str(error).partition("=")
        raise UserError(f"{where}: {names.get(name, name)}={rest}") from None


# --------------------------------------------------------------------------------------------------
# Tensors


def tensor_names(kind):
    """The TensorNames of a model_type's files; barelm's are our own."""
    return FAMILIES[kind].tensors if kind in FAMILIES else TensorNames()


def renamed(name, table):
    """A name of ours, as a table's files have it."""
    for ours, theirs in table.renames:
        name = name.replace(ours, theirs)
    return name


def names_in_file(names, kind):
    """{name in a file of this model_type: those of our names that it holds: q, k and v, or one}."""
    table = tensor_names(kind)
    groups = {}
    for name in names:
        groups.setdefault(renamed(name, table), []).append(name)
    return groups


def gpt2_names(names):
    """`names_in_file` of GPT-2, whose layers an adapter of PEFT's names."""
    return names_in_file(names, "gpt2")


def is_transposed(name, table):
    return table.transposed and name.endswith("_proj.weight")


def tensors_from_file(tensors, names, kind):
    """A file's tensors (with or without the family's prefix) under our names; what is under none of
    `names` keeps its own."""
    table = tensor_names(kind)
    rest = {name.removeprefix(table.prefix): t for name, t in tensors.items()}
    out = {}
    for theirs, ours in names_in_file(names, kind).items():
        t = rest.pop(theirs.removeprefix(table.prefix), None)
        if t is None:
            continue  # a tied head, or a classifier's
        if is_transposed(ours[0], table):
            t = t.t().contiguous()
        if len(ours) == 1:
            out[ours[0]] = t  # (out, in)
        else:
            out.update(zip(ours, t.chunk(len(ours))))  # equal parts: no grouped-query attention
    return out | rest


def tensors_in_file(state, kind):
    """Our tensors under the names of a file of this model_type."""
    table = tensor_names(kind)
    out = {}
    for theirs, ours in names_in_file(state, kind).items():
        t = state[ours[0]]
        if len(ours) > 1:  # their rows below each other: (out of q + of k + of v, in)
            t = torch.cat([state[name] for name in ours])
        out[theirs] = t.t() if is_transposed(ours[0], table) else t
    return out


def layer_numbers(names):
    """The numbers of the layers that the tensors of a file belong to, by their names in any of the
    families: of files that are none of config.json's family, too, there is a number to tell."""
    begins = set()
    for entry in FAMILIES.values():
        begin = renamed("model.layers.", entry.tensors)
        begins.add(re.escape(begin))
        begins.add(re.escape(begin.removeprefix(entry.tensors.prefix)))
    # Nine digits, since int() refuses thousands of them, which a name may have.
    pattern = re.compile(rf"(?:{'|'.join(sorted(begins))})(\d{{1,9}})\.")
    matches = [pattern.match(name) for name in names]
    return {int(match[1]) for match in matches if match}
