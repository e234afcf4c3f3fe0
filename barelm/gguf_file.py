"""GGUF, llama.cpp's one file of weights, tokenizer and settings.

The package gguf, llama.cpp's own, knows the names, the types and where each byte goes; what is here
says which of ours is which of theirs."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from barelm.checkpoint import saved_tensors
from barelm.families import family
from barelm.positions import rope_frequencies
from barelm.run import UserError
from barelm.splits import GPT2_SPLIT

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from model import GPT, GPTConfig

GGUF_FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")  # whose names `add_network` writes
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q8_0": 7,
    "Q4_0": 2,
}  # of the matrices; the numbers are llama_ftype's

# The split patterns that llama.cpp knows, and its names for them.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # digits in threes
TIKTOKEN_GPT2 = (  # the same pieces as GPT2_SPLIT's
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
GGUF_PRE = {
    GPT2_SPLIT: "gpt-2",
    TIKTOKEN_GPT2: "gpt-2",
    QWEN2_SPLIT: "qwen2",
    LLAMA3_SPLIT: "llama-bpe",
}


def require_gguf() -> Any:
    """The package gguf."""
    try:
        import gguf
    except ImportError:
        raise UserError("--export=gguf needs the package gguf: pip install gguf") from None
    return gguf


def check_gguf(c: GPTConfig, tok: Tokenizer) -> None:
    """Refuse a GPTConfig, which some Hugging Face family holds, or a Tokenizer that llama.cpp could
    not read."""
    kind = family(c)
    if c.n_experts:
        raise UserError(
            f"--export=gguf: n_experts={c.n_experts}: expected 0 (--export=hf holds any)"
        )
    if kind not in GGUF_FAMILIES:
        raise UserError(f"--export=gguf: {kind}: expected one of {', '.join(GGUF_FAMILIES)}")
    if c.window:
        raise UserError(f"--export=gguf: window={c.window}: llama.cpp reads {kind} without one")
    scaling = c.rope_scaling or {}
    if scaling and scaling.get("rope_type") != "linear" and kind != "llama":
        raise UserError(f"--export=gguf: llama.cpp has rope_scaling llama3 for llama, not {kind}")
    if tok.kind != "BPE" or tok.split_pattern not in GGUF_PRE:
        what = "split pattern" if tok.kind == "BPE" else f"{tok.kind} tokenizer"
        mend = "prepare.py --tokenizer=bpe makes one that it knows (--export=hf holds any)"
        raise UserError(f"--export=gguf: llama.cpp has no name for this {what}: {mend}")
    for name in tok.normalizers:
        if name != "NFC":
            raise UserError(f"--export=gguf: llama.cpp has no normalizer {name}: --export=hf")
    if tok.normalizers:
        print("note: llama.cpp does not normalise: text that is not NFC gets other ids there")
    if tok.eot_id is None:
        raise UserError("--export=gguf: the tokenizer names no end token (tokenizer_config.json)")


def add_network(writer: Any, gguf: Any, c: GPTConfig, gguf_type: str) -> None:
    """Add the keys of a GGUF file that describe the network, a GPTConfig."""
    writer.add_custom_alignment(32)  # bytes; the usual one, said
    writer.add_file_type(FILE_TYPES[gguf_type])
    if gguf_type in ("Q8_0", "Q4_0"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(c.n_ctx)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    if writer.arch == "gpt2":  # as many heads of k and v as of q; no RoPE
        writer.add_layer_norm_eps(float(c.norm_eps))
        return
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(float(c.norm_eps))
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(float(c.rope_theta))
    scaling = c.rope_scaling or {}
    if scaling.get("rope_type") == "linear":  # llama3's is the tensor rope_freqs
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def add_tokenizer(writer: Any, gguf: Any, tok: Tokenizer, vocab_size: int) -> None:
    """Add the keys of a GGUF file that hold the tokenizer. Ids that it lacks are named [PADi]."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # as llama.cpp's own converter names them
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, id in tok.spec["model"]["vocab"].items():
        tokens[id] = token
        types[id] = int(gguf.TokenType.NORMAL)
    for added in tok.spec.get("added_tokens", []):
        token_type = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(token_type)
    merges = []
    for merge in tok.spec["model"]["merges"]:  # a string, or in newer files a pair
        merges.append(merge if isinstance(merge, str) else " ".join(merge))
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for any byte-level BPE
    writer.add_tokenizer_pre(GGUF_PRE[tok.split_pattern])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_key_value("tokenizer.ggml.merges", merges, gguf.GGUFValueType.ARRAY)
    if tok.bos_id is not None:
        writer.add_bos_token_id(tok.bos_id)
    if tok.pad_id is not None:
        writer.add_pad_token_id(tok.pad_id)
    # llama.cpp reads one end token; of a chat model the first is the turn's.
    writer.add_eos_token_id(tok.eos_ids[0] if tok.eos_ids else tok.eot_id)
    writer.add_add_bos_token(bool(tok.start))
    template = tok.config.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def renamed_tensors(net: GPT, names: Any) -> dict[str, Tensor]:
    """{name in a GGUF file: tensor}; names: the package's map from Hugging Face's.

    GPT-2's q, k and v are one tensor there, in this order. A Llama's q and k are in Meta's order,
    in which a head's rows 2i and 2i + 1 are rotated together; in ours it is i and i + head_dim / 2.
    """
    c = net.config
    kind = family(c)
    tensors = {}
    for name, t in saved_tensors(net).items():
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = t.view(-1, 2, c.head_dim // 2, c.n_embd)  # (heads, 2, head_dim / 2, C)
            t = halves.transpose(1, 2).reshape(t.shape)
        if kind == "gpt2":
            name = re.sub(r"\.[qkv]_proj", ".qkv_proj", name)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        # k joins q, and v both: state_dict has them in this order.
        tensors[theirs] = torch.cat((tensors[theirs], t)) if theirs in tensors else t
    if (c.rope_scaling or {}).get("rope_type") == "llama3":  # what each frequency is divided by
        plain = rope_frequencies(replace(c, rope_scaling=None), "cpu")
        tensors["rope_freqs.weight"] = plain / rope_frequencies(c, "cpu")
    return tensors


def tensor_type(name: str, t: Tensor, gguf_type: str) -> str:
    """The name of a tensor's type: vectors and positions stay float32, as llama.cpp wants them; a
    row that blocks of 32 do not fill is float16. Beside Q4_0 the embedding and the head are Q8_0:
    4 bits cost them most."""
    if t.ndim == 1 or name == "position_embd.weight":
        return "F32"
    if gguf_type in ("Q8_0", "Q4_0") and t.shape[1] % 32:
        return "F16"
    if gguf_type == "Q4_0" and name in ("token_embd.weight", "output.weight"):
        return "Q8_0"
    return gguf_type


def as_array(gguf: Any, t: Tensor, type_name: str) -> np.ndarray:
    """A tensor as a NumPy array of one of GGUF's types; Q8_0's and Q4_0's are bytes (rows, bytes of
    a row)."""
    if type_name == "F16" and not t.half().isfinite().all():
        raise UserError("--gguf_type=F16: a weight is beyond float16: --gguf_type=F32")
    values = t.detach().float().contiguous().numpy()
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name])


def write_gguf(net: GPT, tok: Tokenizer, path: Path, gguf_type: str) -> None:
    """Write a GGUF file of a network on the CPU and its tokenizer, which `check_gguf` let pass, its
    matrices in gguf_type, one of FILE_TYPES. Tensors are converted one by one as they are written.
    """
    gguf = require_gguf()

    class Writer(gguf.GGUFWriter):  # type: ignore[name-defined]
        """The package's, which refuses an empty array: a tokenizer of bytes alone has no merges,
        and llama.cpp wants to read that."""

        def _pack_val(self, val, vtype, *args, **options):
            if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
                return struct.pack("<IIQ", vtype, gguf.GGUFValueType.STRING, 0)
            return super()._pack_val(val, vtype, *args, **options)

    c = net.config
    writer = Writer(path, family(c))
    writer.add_name(path.stem.removesuffix(f"-{gguf_type}"))  # the model's own name
    add_network(writer, gguf, c, gguf_type)
    add_tokenizer(writer, gguf, tok, c.vocab_size)
    architecture = gguf.MODEL_ARCH[family(c).upper()]
    tensors = renamed_tensors(net, gguf.get_tensor_name_map(architecture, c.n_layer))
    types = {name: tensor_type(name, t, gguf_type) for name, t in tensors.items()}
    for name, t in tensors.items():
        raw_dtype = gguf.GGMLQuantizationType[types[name]]
        nbytes = math.prod(gguf.quant_shape_to_byte_shape(t.shape, raw_dtype))
        # np.float32 says that the shape counts numbers; of np.uint8 it would count bytes.
        writer.add_tensor_info(name, t.shape, np.float32, nbytes, raw_dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, t in tensors.items():  # in the order of add_tensor_info
            writer.write_tensor_data(as_array(gguf, t, types[name]))
    finally:
        writer.close()
