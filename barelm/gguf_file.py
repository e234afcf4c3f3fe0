"""GGUF, llama.cpp's one file of weights, tokenizer and settings.

The package gguf, llama.cpp's own, knows the types and where each byte goes. Which of our tensors is
which of theirs says gguf_network.py, and of our tokens gguf_tokenizer.py."""

from __future__ import annotations

import math
import re
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from barelm.families import family
from barelm.gguf_network import ARCHITECTURES, Entry, add_network, check_network, entries_of
from barelm.gguf_tokenizer import add_tokenizer, llama_vocab, refusal
from barelm.k_quants import K_QUANTS, quantize
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from barelm.llama_ids import LlamaVocab
    from barelm.tokenizer import Tokenizer
    from model import GPT, GPTConfig

# Of the matrices; the numbers are llama_ftype's. _M: a mixture, in which what counts most has more
# bits.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q4_K_M": 15,
    "Q4_0": 2,
}
# What a type of blocks of 256 becomes where 256 does not divide a row: one of blocks of 32.
SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Small, or looked up by position: float32 in every file.
KEPT = ("position_embd.weight", "token_types.weight", "ffn_gate_inp.weight", "attn_rel_b.weight")


def require_gguf() -> Any:
    """The package gguf."""
    try:
        import gguf
    except ImportError:
        raise UserError("--export=gguf needs the package gguf: pip install gguf") from None
    return gguf


def check_gguf(c: GPTConfig, tok: Tokenizer) -> LlamaVocab:
    """Refuse a GPTConfig, which some Hugging Face family holds, or a Tokenizer that llama.cpp could
    not read; else the tokenizer as the file has it, with notes of both."""
    kind = family(c)
    if kind not in ARCHITECTURES:
        raise refusal(f"{kind}: expected one of {', '.join(ARCHITECTURES)}")
    notes = check_network(c, kind)
    if tok.eot_id is None:
        raise UserError("--export=gguf: the tokenizer names no end token (tokenizer_config.json)")
    if len(tok.start) > 1 or len(tok.end) > 1:
        raise refusal("llama.cpp puts one token before and one behind a text, this tokenizer more")
    if len(tok.eos_ids) > 3:
        notes.append(f"a GGUF file names three tokens that end an answer, not {len(tok.eos_ids)}")
    vocab = llama_vocab(tok, c.vocab_size)
    vocab.notes = notes + vocab.notes
    return vocab


# --------------------------------------------------------------------------------------------------
# Types


def tensor_type(name: str, shape: tuple[int, ...], gguf_type: str, c: GPTConfig) -> str:
    """The name of a tensor's type in a file of one of FILE_TYPES. Vectors stay float32, as
    llama.cpp wants them; a row that blocks of 32 do not fill is float16."""
    if len(shape) == 1 or name.endswith(KEPT):
        return "F32"
    if gguf_type in ("F32", "F16"):
        return gguf_type
    wanted = gguf_type
    is_table = name in ("token_embd.weight", "output.weight")
    if gguf_type == "Q4_0" and is_table:  # 4 bits cost them most
        wanted = "Q8_0"
    if gguf_type in ("Q4_K_M", "Q5_K_M"):
        wanted = mixture_type(name, gguf_type.removesuffix("_M"), c)
    if wanted in SMALLER_BLOCKS and shape[-1] % 256:
        wanted = SMALLER_BLOCKS[wanted]
    return wanted if shape[-1] % 32 == 0 else "F16"


def mixture_type(name: str, usual: str, c: GPTConfig) -> str:
    """A matrix's type in Q4_K_M or Q5_K_M, by llama.cpp's rules (src/llama-quant.cpp): more bits
    for the head, and in some layers for what writes values and leaves the MLP."""
    is_head = name == "output.weight" or (name == "token_embd.weight" and c.tie)
    if is_head:
        return "Q6_K"
    match = re.search(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return usual
    i = int(match[1])
    part = match[2]
    n_layer = c.n_encoder_layer if name.startswith("enc.") else c.n_layer
    eighth = n_layer // 8
    gets_more = i < eighth or i >= 7 * n_layer // 8 or (i - eighth) % 3 == 2
    if c.n_experts == 8 and part in ("attn_k", "attn_v"):  # beside the experts they are nothing
        return "Q8_0"
    if c.n_experts == 8 and part == "attn_output":
        return "Q5_K"
    if part == "attn_qkv":
        return "Q5_K" if usual == "Q4_K" else "Q6_K"
    if part in ("attn_v", "ffn_down", "ffn_down_exps") and gets_more:
        return "Q6_K"
    return usual


def as_array(gguf: Any, t: Tensor, type_name: str) -> np.ndarray:
    """A tensor as a NumPy array of one of GGUF's types; what is no float is bytes (…, bytes of a
    row). UserError where a weight is too large for it."""
    values = t.detach().float().contiguous().numpy()
    # The step of a block of codes is a float16 as well.
    if type_name != "F32" and np.abs(values).max() > np.finfo(np.float16).max:
        raise UserError(f"--export=gguf: a weight is beyond float16 ({type_name}): --gguf_type=F32")
    if type_name in K_QUANTS:
        return quantize(values, type_name)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name])


# --------------------------------------------------------------------------------------------------
# The file


def make_writer(gguf: Any, path: Path, architecture: str) -> Any:
    """The package's writer of a file."""

    class Writer(gguf.GGUFWriter):  # type: ignore[name-defined]
        """The package's, which refuses an empty array: a tokenizer of bytes alone has no merges,
        and llama.cpp wants to read that."""

        def _pack_val(self, val, vtype, *args, **options):
            if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
                return struct.pack("<IIQ", vtype, gguf.GGUFValueType.STRING, 0)
            return super()._pack_val(val, vtype, *args, **options)

    return Writer(path, architecture)


def add_keys(writer: Any, gguf: Any, net: GPT, gguf_type: str) -> None:
    writer.add_custom_alignment(32)  # bytes; the usual one, said
    writer.add_file_type(FILE_TYPES[gguf_type])
    if gguf_type not in ("F32", "F16"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_network(writer, gguf, net, family(net.config))


def add_tensors(writer: Any, gguf: Any, entries: list[Entry], types: dict[str, str]) -> None:
    """Say which tensors come, of which types and shapes."""
    for entry in entries:
        raw_dtype = gguf.GGMLQuantizationType[types[entry.name]]
        nbytes = math.prod(gguf.quant_shape_to_byte_shape(entry.shape, raw_dtype))
        # np.float32 says that the shape counts numbers; of np.uint8 it would count bytes.
        writer.add_tensor_info(entry.name, entry.shape, np.float32, nbytes, raw_dtype)


def write_gguf(net: GPT, tok: Tokenizer, path: Path, gguf_type: str,
               vocab: LlamaVocab | None = None, show: Callable | None = None) -> None:  # fmt: skip
    """Write a GGUF file of a network on the CPU, in any dtype, and its tokenizer, which
    `check_gguf` let pass, its matrices in gguf_type, one of FILE_TYPES. vocab: what check_gguf
    returned. Tensors are converted one by one as they are written; show(line, last) is told."""
    gguf = require_gguf()
    c = net.config
    if vocab is None:
        vocab = check_gguf(c, tok)
    writer = make_writer(gguf, path, ARCHITECTURES[family(c)].name)
    writer.add_name(path.stem.removesuffix(f"-{gguf_type}"))  # the model's own name
    add_keys(writer, gguf, net, gguf_type)
    add_tokenizer(writer, gguf, tok, vocab)
    entries = entries_of(net)
    types = {entry.name: tensor_type(entry.name, entry.shape, gguf_type, c) for entry in entries}
    add_tensors(writer, gguf, entries, types)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, entry in enumerate(entries):  # in the order of add_tensor_info
            writer.write_tensor_data(as_array(gguf, entry.value(), types[entry.name]))
            if show is not None:
                line = f"{i + 1} of {len(entries)} tensors  {entry.name} {types[entry.name]}"
                show(line, i + 1 == len(entries))
    finally:
        writer.close()
