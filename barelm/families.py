"""Hugging Face's config.json and tensor names, to ours and back."""

from dataclasses import MISSING, asdict, fields

import torch

from barelm.run import UserError
from model import GPTConfig

# GPTConfig's name = config.json's, for the numbers; what GPTConfig must say for each model_type.
LLAMA_KEYS = """vocab_size=vocab_size n_ctx=max_position_embeddings n_layer=num_hidden_layers
n_head=num_attention_heads n_kv_head=num_key_value_heads head_dim=head_dim n_embd=hidden_size
n_hidden=intermediate_size norm_eps=rms_norm_eps tie=tie_word_embeddings"""
GPT2_KEYS = """vocab_size=vocab_size n_ctx=n_positions n_layer=n_layer n_head=n_head n_embd=n_embd
n_hidden=n_inner norm_eps=layer_norm_epsilon tie=tie_word_embeddings"""
HF_KEYS = {"gpt2": GPT2_KEYS} | dict.fromkeys(("qwen3", "qwen2", "llama", "mistral"), LLAMA_KEYS)
HF_KEYS = {kind: dict(k.split("=") for k in keys.split()) for kind, keys in HF_KEYS.items()}
LLAMA = dict(norm="rms", norm_place="pre", pos="rope", mlp="swiglu", bias=False)
LLAMA |= dict(qk_norm=False, qkv_bias=False)
GPT2 = LLAMA | dict(norm="layer", pos="learned", mlp="gelu", bias=True)
FAMILIES = {"qwen3": LLAMA | dict(qk_norm=True), "qwen2": LLAMA | dict(qkv_bias=True)}
# Mistral is Llama with a sliding window, within which it is saved as Llama.
FAMILIES |= {"llama": LLAMA, "mistral": LLAMA, "gpt2": GPT2}
# The values of these keys with which we are exact, the first one that of an absent key.
EXACT = dict(activation_function=(None, "gelu_new", "gelu_pytorch_tanh"))
EXACT |= dict(hidden_act=(None, "silu", "swish"), partial_rotary_factor=(None, 1))
EXACT |= dict(scale_attn_weights=(True,), is_causal=(True,))
EXACT |= dict(original_max_position_embeddings=(None,))  # which would count before the dict's
OFF = "attention_bias mlp_bias use_sliding_window scale_attn_by_inverse_layer_idx"
EXACT |= dict.fromkeys(f"{OFF} add_cross_attention quantization_config".split(), (None, False))
# What shapes training alone: written under our own names, which transformers passes over.
TRAINING = ("dropout", "init")
PDROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # GPT-2's names for our one dropout
# What a config.json of ours has beside GPTConfig's fields.
BESIDE = """model_type torch_dtype dtype bos_token_id eos_token_id pad_token_id architectures
id2label label2id pooling adapter_size quantize transformers_version"""


def default_of(f):
    """The default of a dataclass's field; MISSING where it has none."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def misfits(c, kind):
    """{field: the value it would have to have} of the fields of a GPTConfig that a config.json of
    this model_type cannot hold. A field that the mapping does not name fits at its default."""
    wanted, held = dict(FAMILIES[kind]), {*HF_KEYS[kind], *TRAINING}
    if kind == "gpt2":
        wanted |= {"n_kv_head": c.n_head, "head_dim": c.n_embd / c.n_head}
    else:
        held |= {"rope_theta", "rope_scaling"}
    for f in fields(c):
        if f.name not in held:
            wanted.setdefault(f.name, default_of(f))
    return {name: value for name, value in wanted.items() if getattr(c, name) != value}


def family(c):
    """The Hugging Face model_type that holds this architecture, or "barelm" where none does."""
    for kind in FAMILIES:
        if not misfits(c, kind):
            return kind
    return "barelm"


def to_hf_config(net, tok):
    """config.json for a network and its tokenizer, as a dict."""
    c, kind, dtype = net.config, family(net.config), str(net.model.embed_tokens.weight.dtype)[6:]
    kind = "barelm" if net.pooling != "last" or net.adapter_size or net.quantize else kind
    ends = tok.eos_ids if len(tok.eos_ids) != 1 else tok.eos_ids[0]
    out = {"model_type": kind, "torch_dtype": dtype, "dtype": dtype}
    out |= {"bos_token_id": tok.bos_id, "eos_token_id": ends, "pad_token_id": tok.pad_id}
    name = "GPT2LMHeadModel" if kind == "gpt2" else f"{kind.capitalize()}ForCausalLM"
    if net.score is not None:
        name = f"{kind.upper() if kind == 'gpt2' else kind.capitalize()}ForSequenceClassification"
        numbered = {str(i): label for i, label in enumerate(net.labels)}
        out |= {"id2label": numbered, "label2id": {label: int(i) for i, label in numbered.items()}}
        pad_id = tok.pad_id if net.pad_id is None else net.pad_id
        out |= {"pooling": net.pooling, "pad_token_id": pad_id}
    out |= {"architectures": [name]}
    if kind == "barelm":
        return out | asdict(c) | {"adapter_size": net.adapter_size, "quantize": net.quantize}
    out |= {hf: getattr(c, ours) for ours, hf in HF_KEYS[kind].items()}
    for f in fields(c):
        if f.name in TRAINING and getattr(c, f.name) != f.default:
            out[f.name] = getattr(c, f.name)
    if kind == "gpt2":
        drop = dict.fromkeys(PDROPS, c.dropout)
        return out | drop | {"activation_function": "gelu_new", "n_ctx": c.n_ctx}
    out |= {"rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling, "hidden_act": "silu"}
    return out | {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


def from_hf_config(d, where="config.json"):
    """The GPTConfig of a config.json, given as a dict; UserError where we cannot be exact."""
    kind = d.get("model_type")
    if kind == "barelm":
        names = {f.name for f in fields(GPTConfig)}
        odd = [key for key in d if key not in names and key not in BESIDE.split()]
        if odd:
            why = "no fields of GPTConfig: a fork's, or a later version's"
            raise UserError(f"{where}: {', '.join(odd[:3])}: {why}")
        return checked_config({name: d[name] for name in names if name in d}, {}, where)
    if kind not in [*FAMILIES]:
        why = f"is not supported: {', '.join(FAMILIES)} are"
        raise UserError(f"{where}: model_type {kind!r:.60} {why}")
    keys = HF_KEYS[kind]
    # What transformers takes for a key that is absent, where that follows from the others.
    usual = {"tie": True, "n_hidden": 0} if kind == "gpt2" else {"tie": False}
    usual |= {"head_dim": 0} if kind != "qwen3" else {}
    usual |= {"n_kv_head": 0} if kind == "llama" else {}
    given = {ours: d[hf] for ours, hf in keys.items() if d.get(hf) is not None}
    c = usual | given
    faults = [f"{hf} missing" for ours, hf in keys.items() if ours not in c]
    for ours in ("n_kv_head", "head_dim", "n_hidden"):  # where 0 is our word, not theirs
        if given.get(ours) == 0:
            faults.append(f"{keys[ours]}=0 not supported")
    window = d.get("sliding_window", 4096) if kind == "mistral" else None
    if window is not None:
        if type(window) is not int or window < 1:
            faults.append(f"sliding_window={window!r:.60} not supported")
        elif type(c.get("n_ctx")) is int:
            c["n_ctx"] = min(c["n_ctx"], window)
    # One dict in transformers 5; below it, keys beside it.
    rope = d.get("rope_scaling") or d.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        faults.append(f"rope_parameters={rope!r:.60} not supported")
        rope = {}
    rope = dict(rope)
    d = d | {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    d.pop("hidden_act" if kind == "gpt2" else "activation_function", None)  # which it never reads
    odd = [key for key, exact in EXACT.items() if d.get(key, exact[0]) not in exact]
    faults += [f"{key}={d[key]!r:.60} not supported" for key in odd]
    layers = set(d.get("layer_types") or ()) - {"full_attention"} if kind != "mistral" else ()
    faults += [f"layers of {name} not supported" for name in layers]
    if faults:
        raise UserError(f"{where}: {', '.join(faults)}")
    plain = rope.setdefault("rope_type", rope.get("type", "default")) == "default"
    theta = d.get("rope_theta")
    c |= FAMILIES[kind] | {"rope_theta": 10000.0 if theta is None else theta}
    c["rope_scaling"] = None if plain else rope
    c |= {name: d[name] for name in TRAINING if name in d}
    drops = [d.get(name, 0.1) for name in PDROPS]  # 0.1: what transformers takes
    if kind == "gpt2" and "dropout" not in d and drops == drops[:1] * 3:
        c["dropout"] = drops[0]
    return checked_config(c, keys, where)


def checked_config(values, names, where):
    """GPTConfig(**values). What it refuses is told by the file, and by the name that the field has
    there: names[field], or its own."""
    try:
        return GPTConfig(**values)
    except UserError as error:
        name, _, rest = str(error).partition("=")
        raise UserError(f"{where}: {names.get(name, name)}={rest}") from None


# GPT-2 has its own names, writes matrices (in, out), and q, k and v as one.
GPT2_NAMES = """model.=transformer. embed_tokens=wte embed_positions=wpe .layers.=.h. .norm.=.ln_f.
input_layernorm=ln_1 post_attention_layernorm=ln_2 self_attn.q_proj=attn.c_attn
self_attn.k_proj=attn.c_attn self_attn.v_proj=attn.c_attn self_attn.o_proj=attn.c_proj
up_proj=c_fc mlp.down_proj=mlp.c_proj"""
GPT2_NAMES = [pair.split("=") for pair in GPT2_NAMES.split()]
GPT2_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks of old files


def gpt2_names(names):
    """{name in a GPT-2 file: those of our names that it holds: q, k and v, or one}."""
    out = {}
    for name in names:
        theirs = name
        for old, new in GPT2_NAMES:
            theirs = theirs.replace(old, new)
        out.setdefault(theirs, []).append(name)
    return out


def from_gpt2(tensors, names):
    """A GPT-2 file's tensors (with or without the prefix `transformer.`) under our names."""
    tensors, out = {n.removeprefix("transformer."): t for n, t in tensors.items()}, {}
    for theirs, ours in gpt2_names(names).items():
        if theirs.removeprefix("transformer.") not in tensors:
            continue  # a tied head, or a classifier's
        t = tensors.pop(theirs.removeprefix("transformer."))
        t = t.t().contiguous() if ours[0].endswith("_proj.weight") else t
        out |= zip(ours, t.chunk(len(ours)))
    return out | tensors


def to_gpt2(state):
    """Our tensors under a GPT-2 file's names."""
    out = {}
    for theirs, ours in gpt2_names(state).items():
        t = torch.cat([state[n] for n in ours])
        out[theirs] = t.t() if ours[0].endswith("_proj.weight") else t
    return out
