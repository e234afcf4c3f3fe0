"""The tensors of our state_dict under the names of a family's files, and back.

What a file has in another form than ours is said by a `TensorNames`, one for each family (in
families.py): other names, matrices (in, out), q, k and v as one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from model import GPTConfig


@dataclass(frozen=True)
class TensorNames:
    """How a family's files name and lay out the tensors of our state_dict. Where one of their
    tensors has several of ours (GPT-2's q, k and v), these stand one below the other in it."""

    renames: tuple[tuple[str, str], ...] = ()  # (ours, theirs), replaced one after another
    patterns: tuple[tuple[str, str], ...] = ()  # before these: regular expressions of ours
    transposed: bool = False  # matrices of linear layers are (in, out) there
    experts_apart: bool = False  # a tensor for each matrix of each expert: `unstacked`
    n_head: int = 0  # of joined q, k and v: each head's three stand together (BLOOM); 0: each whole
    prefix: str = ""  # that the names in some files lack
    unread: tuple[str, ...] = (".rotary_emb.inv_freq",)  # ends of names: what is computed here
    old: tuple[tuple[str, str], ...] = ()  # (in old files, in today's), replaced where one is read
    # {theirs: another of theirs}: a second copy, which some files have.
    copies: tuple[tuple[str, str], ...] = ()

    def with_head(self, renames: Sequence) -> TensorNames:
        """The same for a model with a head whose tensors have other names, which come first."""
        return replace(self, renames=(*renames, *self.renames))


def renamed(name: str, table: TensorNames) -> str:
    """A name of ours, as a table's files have it."""
    for pattern, theirs in table.patterns:
        name = re.sub(pattern, theirs, name)
    for ours, theirs in table.renames:
        name = name.replace(ours, theirs)
    return name


def names_in_file(names: Iterable[str], table: TensorNames) -> dict[str, list[str]]:
    """{name in a table's file: those of our names that it holds: q, k and v, or one}."""
    groups = {}
    for name in names:
        groups.setdefault(renamed(name, table), []).append(name)
    return groups


def is_transposed(name: str, table: TensorNames) -> bool:
    return table.transposed and name.endswith("_proj.weight")


def todays_names(tensors: dict, table: TensorNames) -> dict:
    """{today's name: value} of a file's {name: value}, whose names may be of an older day."""
    out = {}
    for name, value in tensors.items():
        for older, newer in table.old:
            name = name.replace(older, newer)
        out[name] = value
    return out


def tensors_from_file(
    tensors: dict[str, Tensor], names: dict, table: TensorNames
) -> dict[str, Tensor]:
    """A file's tensors (with or without the family's prefix) under our names; what is under none of
    `names` keeps its own."""
    rest = {name.removeprefix(table.prefix): t for name, t in tensors.items()}
    if table.experts_apart:
        names = unstacked(names)
    out = {}
    for theirs, ours in names_in_file(names, table).items():
        t = rest.pop(theirs.removeprefix(table.prefix), None)
        if t is None:
            continue  # a tied head, or a classifier's
        if is_transposed(ours[0], table):
            t = t.t().contiguous()
        if len(ours) == 1:
            out[ours[0]] = t  # (out, in)
        else:
            out.update(zip(ours, parted(t, len(ours), table)))
    return stacked(out) | rest


def tensors_in_file(state: dict[str, Tensor], table: TensorNames) -> dict[str, Tensor]:
    """Our tensors under the names of a table's file."""
    if table.experts_apart:
        state = unstacked(state)
    out = {}
    for theirs, ours in names_in_file(state, table).items():
        t = state[ours[0]]
        if len(ours) > 1:
            t = joined([state[name] for name in ours], table)
        out[theirs] = t.t() if is_transposed(ours[0], table) else t
    return out


def unstacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: tensor} with the matrices of each expert by themselves, experts.{e}.up_proj.weight,
    for what we have as one tensor (E, out, in), experts.up_proj."""
    out = {}
    for name, t in state.items():
        place, _, kind = name.rpartition(".experts.")
        if not place:
            out[name] = t
            continue
        for e, matrix in enumerate(t.unbind()):
            out[f"{place}.experts.{e}.{kind}.weight"] = matrix
    return out


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`unstacked`, back; a stack that lacks an expert has fewer."""
    out = {}
    stacks = {}
    for name, t in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name)
        if match:
            stacks.setdefault(".".join(match.groups()), []).append(t)
        else:
            out[name] = t
    return out | {name: torch.stack(matrices) for name, matrices in stacks.items()}


def parted(t: Tensor, n: int, table: TensorNames) -> Sequence[Tensor]:
    """The n equal parts of a joined tensor (n out, …): there is no grouped-query attention."""
    if not table.n_head:
        return t.chunk(n)
    heads = t.view(table.n_head, n, -1, *t.shape[1:])  # (H, n, D, …)
    return [part.flatten(0, 1).contiguous() for part in heads.unbind(1)]  # (H D, …) each


def joined(parts: Sequence[Tensor], table: TensorNames) -> Tensor:
    """`parted`, back: (n out, …) of n parts (out, …)."""
    if not table.n_head:
        return torch.cat(parts)
    heads = [part.unflatten(0, (table.n_head, -1)) for part in parts]  # (H, D, …) each
    return torch.stack(heads, 1).flatten(0, 2)


def layer_numbers(
    names: Iterable[str], tables: Sequence[TensorNames], stack: str = "model.layers."
) -> set[int]:
    """The numbers of the layers, of a stack, that the tensors of a file belong to, by their names
    in any of the tables: of files that are none of config.json's family, too, there is a number to
    tell."""
    begins = set()
    for table in tables:
        begin = renamed(stack, table)
        begins.add(re.escape(begin))
        begins.add(re.escape(begin.removeprefix(table.prefix)))
    # Nine digits, since int() refuses thousands of them, which a name may have.
    pattern = re.compile(rf"(?:{'|'.join(sorted(begins))})(\d{{1,9}})\.")
    matches = [pattern.match(name) for name in names]
    return {int(match[1]) for match in matches if match}


# --------------------------------------------------------------------------------------------------
# The families' names

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


def bert_tensors(prefix: str, lm_head: tuple, unread: tuple[str, ...]) -> TensorNames:
    """The names of BERT's files and of RoBERTa's, whose layers are alike."""
    return TensorNames(
        renames=(
            *lm_head,
            ("model.layers.", f"{prefix}encoder.layer."),
            ("model.", f"{prefix}embeddings."),
            ("embed_tokens", "word_embeddings"),
            ("embed_positions", "position_embeddings"),
            ("embed_types", "token_type_embeddings"),
            ("embed_norm", "LayerNorm"),
            ("input_layernorm", "attention.output.LayerNorm"),
            ("post_attention_layernorm", "output.LayerNorm"),
            ("self_attn.q_proj", "attention.self.query"),
            ("self_attn.k_proj", "attention.self.key"),
            ("self_attn.v_proj", "attention.self.value"),
            ("self_attn.o_proj", "attention.output.dense"),
            ("mlp.up_proj", "intermediate.dense"),
            ("mlp.down_proj", "output.dense"),
        ),
        prefix=prefix,
        unread=("embeddings.position_ids", *unread),
        old=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
        copies=((f"{lm_head[0][1]}bias", lm_head[1][1]),),
    )


BERT_TENSORS = bert_tensors(
    "bert.",
    (
        ("lm_head.", "cls.predictions.decoder."),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("head_dense.", "cls.predictions.transform.dense."),
        ("head_norm.", "cls.predictions.transform.LayerNorm."),
    ),
    # Of the other task that it was trained with: whether a sentence follows.
    ("pooler.dense.weight", "pooler.dense.bias", "seq_relationship.weight")
    + ("seq_relationship.bias",),
)
ROBERTA_TENSORS = bert_tensors(
    "roberta.",
    (
        ("lm_head.", "lm_head.decoder."),
        ("lm_head.decoder.bias", "lm_head.bias"),
        ("head_dense.", "lm_head.dense."),
        ("head_norm.", "lm_head.layer_norm."),
    ),
    ("pooler.dense.weight", "pooler.dense.bias"),
)
MODERNBERT_TENSORS = TensorNames(
    renames=(
        ("lm_head.", "decoder."),
        ("head_", "head."),
        ("model.embed_tokens", "model.embeddings.tok_embeddings"),
        ("model.embed_norm", "model.embeddings.norm"),
        ("model.norm.", "model.final_norm."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("self_attn.q_proj", "attn.Wqkv"),
        ("self_attn.k_proj", "attn.Wqkv"),
        ("self_attn.v_proj", "attn.Wqkv"),
        ("self_attn.o_proj", "attn.Wo"),
        ("gate_proj", "Wi"),
        ("up_proj", "Wi"),
        ("down_proj", "Wo"),
    ),
    prefix="model.",
    unread=(".inv_freq",),
)
BLOOM_RENAMES = (
    ("model.", "transformer."),
    ("embed_tokens", "word_embeddings"),
    ("embed_norm", "word_embeddings_layernorm"),
    (".layers.", ".h."),
    ("transformer.norm.", "transformer.ln_f."),
    ("self_attn.q_proj", "self_attention.query_key_value"),
    ("self_attn.k_proj", "self_attention.query_key_value"),
    ("self_attn.v_proj", "self_attention.query_key_value"),
    ("self_attn.o_proj", "self_attention.dense"),
    ("up_proj", "dense_h_to_4h"),
    ("down_proj", "dense_4h_to_h"),
)

MIXTRAL_TENSORS = TensorNames(
    renames=(
        (".mlp.", ".block_sparse_moe."),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
    ),
    experts_apart=True,
)
QWEN3_MOE_TENSORS = TensorNames(experts_apart=True)


def bloom_tensors(c: GPTConfig) -> TensorNames:
    return TensorNames(BLOOM_RENAMES, n_head=c.n_head, prefix="transformer.")


def t5_tensors(c: GPTConfig) -> TensorNames:
    """T5's names. A gated MLP has two matrices for the one of the other, and says so."""
    up = "wi"
    if c.mlp in ("geglu", "swiglu"):
        up = "wi_1"
    shared = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias."
    return TensorNames(
        patterns=(
            (r"^model\.encoder\.(layers\.\d+\.post_attention_layernorm)", r"encoder.\1_of_two"),
            (r"^model\.encoder\.(layers\.\d+)\.mlp", r"encoder.\1.layer.1.DenseReluDense"),
        ),
        renames=(
            ("model.embed_tokens.", "shared."),
            ("model.encoder.relative_bias.", f"encoder.{bias}"),
            ("model.relative_bias.", f"decoder.{bias}"),
            ("model.encoder.norm.", "encoder.final_layer_norm."),
            ("model.norm.", "decoder.final_layer_norm."),
            ("model.encoder.", "encoder."),
            ("model.", "decoder."),
            ("coder.layers.", "coder.block."),
            ("input_layernorm", "layer.0.layer_norm"),
            ("cross_layernorm", "layer.1.layer_norm"),
            ("post_attention_layernorm_of_two", "layer.1.layer_norm"),
            ("post_attention_layernorm", "layer.2.layer_norm"),
            ("self_attn.", "layer.0.SelfAttention."),
            ("cross_attn.", "layer.1.EncDecAttention."),
            (".mlp.", ".layer.2.DenseReluDense."),
            ("q_proj", "q"),
            ("k_proj", "k"),
            ("v_proj", "v"),
            ("o_proj", "o"),
            ("gate_proj", "wi_0"),
            ("up_proj", up),
            ("down_proj", "wo"),
        ),
        unread=("EncDecAttention.relative_attention_bias.weight",),  # of old files, without effect
        copies=tuple((copy, "shared.weight") for copy in shared),
    )
