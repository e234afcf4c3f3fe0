"""The families of transformers that we hold: one entry of FAMILIES a model_type.

A new family is one `Family` below. What it must say is where its config.json has each field of
GPTConfig that differs from model to model (`keys`, and `parts` where a field has another form
there), what all its models have in common (`fixed`), and how its files name their tensors
(`tensors`). What reads and writes by it is families.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from barelm.config_keys import (
    EXPERT_LAYERS,
    OFFSET,
    PARTIAL_ROPE,
    ROPE,
    T5_HEAD,
    T5_LENGTHS,
    T5_MLP,
    TWO_ROPES,
    expert_count,
    mlm_head,
    named,
    with_absent,
)
from barelm.tensor_names import (
    BERT_TENSORS,
    GPT2_TENSORS,
    MIXTRAL_TENSORS,
    MODERNBERT_TENSORS,
    QWEN3_MOE_TENSORS,
    ROBERTA_TENSORS,
    TensorNames,
    bloom_tensors,
    t5_tensors,
)
from barelm.window_keys import (
    BOTH_SIDES,
    LISTED_WINDOW,
    ONE_WINDOW,
    SWITCHED_WINDOW,
    USED_WINDOW,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model import GPTConfig


@dataclass(frozen=True)
class Head:
    """A class of transformers with a head in place of the language model's: the three `task`s."""

    architecture: str
    renames: tuple[tuple[str, str], ...] = ()  # (ours, theirs) of the head's tensors
    bias: bool = True  # of the last layer
    poolings: tuple[str, ...] = ("last",)  # of a classifier: what of a text it may read
    pooler: str = ""  # the layer before the last one: "", "tanh" or "gelu_norm"


@dataclass(frozen=True)
class Family:
    """How the models of one model_type say in config.json what GPTConfig says here."""

    lm: str  # the language model's class, that config.json's `architectures` names
    heads: dict[str, Head]  # of the other classes: "classify", "tag" (tokens), "span" (answers)
    keys: dict[str, str]  # GPTConfig's field: its key, for what differs from model to model
    fixed: dict  # GPTConfig's field: the value that every model of the family has
    absent: dict  # GPTConfig's field: what transformers takes where its key is absent
    parts: tuple = ()  # fields in another form: config_keys.Part
    # GPTConfig's field: a function of the config, for a value that follows from others there.
    derived: dict[str, Callable] = field(default_factory=dict)
    # Key: the values with which we are exact, that of an absent key first.
    exact: dict[str, tuple] = field(default_factory=dict)
    dropout_keys: tuple[str, ...] = ()  # their names for our one dropout
    other_keys: dict[str, str] = field(default_factory=dict)  # {a key's second name: the key}
    written: dict = field(default_factory=dict)  # keys that we write for other readers
    copies: dict[str, str] = field(default_factory=dict)  # GPTConfig's field: a second key, written
    # The names in its files, or a function of the GPTConfig that returns them.
    tensors: TensorNames | Callable = TensorNames()
    tie_by_files: bool = False  # the head is tied where the files have none, whatever the key says


# --------------------------------------------------------------------------------------------------
# What the entries below have in common

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
EXPERT_KEYS = LLAMA_KEYS | {
    "n_experts_per_token": "num_experts_per_tok",
    "balance_weight": "router_aux_loss_coef",
}
BERT_KEYS = {
    "vocab_size": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_hidden": "intermediate_size",
    "norm_eps": "layer_norm_eps",
    "n_types": "type_vocab_size",
}
T5_KEYS = {
    "vocab_size": "vocab_size",
    "n_encoder_layer": "num_layers",
    "n_head": "num_heads",
    "head_dim": "d_kv",
    "n_embd": "d_model",
    "n_hidden": "d_ff",
    "norm_eps": "layer_norm_epsilon",
    "n_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
SECOND_KEYS = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
LLAMA_FIXED = {
    "norm": "rms",
    "norm_place": "pre",
    "pos": "rope",
    "mlp": "swiglu",
    "bias": False,
    "qk_norm": False,
    "qkv_bias": False,
}
GPT2_FIXED = LLAMA_FIXED | {"norm": "layer", "pos": "learned", "mlp": "gelu", "bias": True}
BERT_FIXED = GPT2_FIXED | {
    "norm_place": "post",
    "mlp": "gelu_erf",
    "tie": True,
    "causal": False,
    "embed_norm": True,
}
LLAMA_EXACT = {"hidden_act": (None, "silu", "swish")}
BERT_EXACT = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "tie_word_embeddings": (True, None),
    "is_decoder": (False, None),
    "chunk_size_feed_forward": (0, None),
}
LLAMA_WRITTEN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}


def balance_in_file(c: GPTConfig) -> str:
    """`balance` of a family whose choice of experts has no bias: what shapes training alone."""
    return "loss" if c.balance == "bias" else c.balance


def width_of_an_mlp(c: GPTConfig) -> int:
    """expert_hidden of a family that has no other MLPs than experts."""
    return c.n_hidden


def heads_of_queries(c: GPTConfig) -> int:
    """n_kv_head of a family without grouped-query attention."""
    return c.n_head


def width_of_a_head(c: GPTConfig) -> float:
    """head_dim of a family whose heads share the width among them."""
    return c.n_embd / c.n_head


def four_widths(c: GPTConfig) -> int:
    return 4 * c.n_embd


PLAIN_HEADS = {"n_kv_head": heads_of_queries, "head_dim": width_of_a_head}


def decoder_heads(name: str, tag: str = "score.", span: Sequence = ()) -> dict[str, Head]:
    """The heads of a decoder whose classes begin with a name. tag: what the last layer of the
    tagger is called; span: further renames in the class that answers by spans."""
    return {
        "classify": Head(f"{name}ForSequenceClassification", bias=False),
        "tag": Head(f"{name}ForTokenClassification", (("score.", tag),)),
        "span": Head(f"{name}ForQuestionAnswering", (("score.", "qa_outputs."), *span)),
    }


def llama_heads(name: str) -> dict[str, Head]:
    # Its class with spans has another name for what is beside the head.
    return decoder_heads(name, span=(("model.", "transformer."),))


# --------------------------------------------------------------------------------------------------
# The table

# Of several that hold a network the first is written: Mistral's without a window is Llama's.
FAMILIES = {
    "qwen3": Family(
        lm="Qwen3ForCausalLM",
        heads=llama_heads("Qwen3"),
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED | {"qk_norm": True},
        absent={"tie": False},  # transformers' head_dim is 128 there, whatever the width: refuse
        parts=(ROPE, USED_WINDOW),
        exact=LLAMA_EXACT,
        written=LLAMA_WRITTEN,
    ),
    "qwen2": Family(
        lm="Qwen2ForCausalLM",
        heads=llama_heads("Qwen2"),
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED | {"qkv_bias": True},
        absent={"tie": False, "head_dim": 0},
        parts=(ROPE, USED_WINDOW),
        exact=LLAMA_EXACT,
        written=LLAMA_WRITTEN,
    ),
    "llama": Family(
        lm="LlamaForCausalLM",
        heads=llama_heads("Llama"),
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED,
        absent={"tie": False, "head_dim": 0, "n_kv_head": 0},
        parts=(ROPE,),
        exact=LLAMA_EXACT,
        written=LLAMA_WRITTEN,
    ),
    "mistral": Family(
        lm="MistralForCausalLM",
        heads=decoder_heads("Mistral"),
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED,
        absent={"tie": False, "head_dim": 0},
        parts=(ROPE, ONE_WINDOW),
        exact=LLAMA_EXACT,
        written=LLAMA_WRITTEN,
    ),
    "ministral": Family(
        lm="MinistralForCausalLM",
        heads=llama_heads("Ministral"),
        keys=LLAMA_KEYS,
        fixed=LLAMA_FIXED,
        absent={"tie": False, "head_dim": 0},
        parts=(ROPE, LISTED_WINDOW),
        exact=LLAMA_EXACT,
        written={"hidden_act": "silu"},
    ),
    "stablelm": Family(
        lm="StableLmForCausalLM",
        heads={task: decoder_heads("StableLm")[task] for task in ("classify", "tag")},
        keys={name: key for name, key in LLAMA_KEYS.items() if name != "head_dim"}
        | {"norm_eps": "layer_norm_eps", "qkv_bias": "use_qkv_bias"},
        fixed={name: value for name, value in LLAMA_FIXED.items() if name != "qkv_bias"}
        | {"norm": "layer", "norm_bias": True},
        absent={"tie": False, "qkv_bias": False},
        parts=(PARTIAL_ROPE,),
        derived={"head_dim": width_of_a_head},
        exact=LLAMA_EXACT | {"qk_layernorm": (False, None), "use_parallel_residual": (False, None)},
        written={"hidden_act": "silu", "qk_layernorm": False, "use_parallel_residual": False},
    ),
    "mixtral": Family(
        lm="MixtralForCausalLM",
        heads=decoder_heads("Mixtral"),
        keys=EXPERT_KEYS,
        fixed=LLAMA_FIXED | {"norm_topk": True},
        absent={"tie": False, "head_dim": 0, "n_experts_per_token": 2, "balance_weight": 0.001},
        parts=(
            with_absent(ROPE, rope_theta=1e6),
            with_absent(ONE_WINDOW, sliding_window=None),
            expert_count(8),
        ),
        derived={"balance": balance_in_file, "expert_hidden": width_of_an_mlp},
        exact=LLAMA_EXACT | {"use_sliding_window": (None, False, True)},
        written=LLAMA_WRITTEN,
        tensors=MIXTRAL_TENSORS,
    ),
    "qwen3_moe": Family(
        lm="Qwen3MoeForCausalLM",
        heads=llama_heads("Qwen3Moe"),
        keys=EXPERT_KEYS
        | {"expert_hidden": "moe_intermediate_size", "norm_topk": "norm_topk_prob"},
        fixed=LLAMA_FIXED | {"qk_norm": True},
        absent={"tie": False, "head_dim": 0, "n_experts_per_token": 8, "expert_hidden": 768}
        | {"norm_topk": False, "balance_weight": 0.001},
        parts=(ROPE, SWITCHED_WINDOW, expert_count(128), EXPERT_LAYERS),
        derived={"balance": balance_in_file},
        exact=LLAMA_EXACT | {"use_sliding_window": (None, False, True)},
        written=LLAMA_WRITTEN,
        tensors=QWEN3_MOE_TENSORS,
    ),
    "olmoe": Family(
        lm="OlmoeForCausalLM",
        heads={},
        keys={name: key for name, key in EXPERT_KEYS.items() if name != "head_dim"}
        | {"norm_topk": "norm_topk_prob"},
        fixed=LLAMA_FIXED | {"qk_norm": True, "qk_norm_all": True},
        absent={"tie": False, "n_kv_head": 0, "n_experts_per_token": 8, "norm_topk": False}
        | {"balance_weight": 0.01},
        parts=(ROPE, expert_count(64)),
        derived={"balance": balance_in_file, "expert_hidden": width_of_an_mlp}
        | {"head_dim": width_of_a_head},
        exact=LLAMA_EXACT | {"clip_qkv": (None,), "head_dim": (None,)},
        written=LLAMA_WRITTEN,
        tensors=QWEN3_MOE_TENSORS,
    ),
    "gpt2": Family(
        lm="GPT2LMHeadModel",
        heads=decoder_heads("GPT2", tag="classifier."),
        keys=GPT2_KEYS,
        fixed=GPT2_FIXED,
        absent={"tie": True, "n_hidden": 0},
        derived=PLAIN_HEADS,
        exact={"activation_function": (None, "gelu_new", "gelu_pytorch_tanh")},
        dropout_keys=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        written={"activation_function": "gelu_new"},
        copies={"n_ctx": "n_ctx"},
        other_keys=SECOND_KEYS
        | {"hidden_size": "n_embd"}
        | {"max_position_embeddings": "n_positions"},
        tensors=GPT2_TENSORS,
    ),
    "bloom": Family(
        lm="BloomForCausalLM",
        heads=decoder_heads("Bloom", tag="classifier."),
        keys={
            "vocab_size": "vocab_size",
            "n_ctx": "seq_length",  # which says on what it was trained: nothing limits it
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "hidden_size",
            "norm_eps": "layer_norm_epsilon",
            "tie": "tie_word_embeddings",
        },
        fixed=GPT2_FIXED | {"pos": "alibi", "embed_norm": True},
        absent={"tie": True, "n_ctx": 2048},
        derived=PLAIN_HEADS | {"n_hidden": four_widths},
        exact={"apply_residual_connection_post_layernorm": (False, None)},
        other_keys=SECOND_KEYS | {"n_embed": "hidden_size"},
        tensors=bloom_tensors,
    ),
    "bert": Family(
        lm="BertForMaskedLM",
        heads={
            "classify": Head(
                "BertForSequenceClassification",
                (("score_dense.", "bert.pooler.dense."), ("score.", "classifier.")),
                poolings=("first",),
                pooler="tanh",
            ),
            "tag": Head("BertForTokenClassification", (("score.", "classifier."),)),
            "span": Head("BertForQuestionAnswering", (("score.", "qa_outputs."),)),
        },
        keys=BERT_KEYS,
        fixed=BERT_FIXED,
        absent={"norm_eps": 1e-12, "n_types": 2},
        parts=(mlm_head("BertModel"),),
        derived=PLAIN_HEADS,
        exact=BERT_EXACT,
        dropout_keys=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        written={"hidden_act": "gelu", "position_embedding_type": "absolute"}
        | {"tie_word_embeddings": True},
        tensors=BERT_TENSORS,
    ),
    "roberta": Family(
        lm="RobertaForMaskedLM",
        heads={
            "classify": Head(
                "RobertaForSequenceClassification",
                (("score_dense.", "classifier.dense."), ("score.", "classifier.out_proj.")),
                poolings=("first",),
                pooler="tanh",
            ),
            "tag": Head("RobertaForTokenClassification", (("score.", "classifier."),)),
            "span": Head("RobertaForQuestionAnswering", (("score.", "qa_outputs."),)),
        },
        keys={name: key for name, key in BERT_KEYS.items() if name != "n_ctx"},
        fixed=BERT_FIXED,
        absent={"norm_eps": 1e-12, "n_types": 2},
        parts=(OFFSET, mlm_head("RobertaModel")),
        derived=PLAIN_HEADS,
        exact=BERT_EXACT,
        dropout_keys=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        written={"hidden_act": "gelu", "position_embedding_type": "absolute"}
        | {"tie_word_embeddings": True},
        tensors=ROBERTA_TENSORS,
    ),
    "modernbert": Family(
        lm="ModernBertForMaskedLM",
        heads={
            task: Head(
                f"ModernBertFor{name}",
                (("score_", "head."), ("score.", "classifier.")),
                poolings=("first", "mean"),
                pooler="gelu_norm",
            )
            for task, name in (
                ("classify", "SequenceClassification"),
                ("tag", "TokenClassification"),
                ("span", "QuestionAnswering"),
            )
        },
        keys={name: key for name, key in BERT_KEYS.items() if name != "n_types"}
        | {"norm_eps": "norm_eps", "norm_bias": "norm_bias", "tie": "tie_word_embeddings"},
        fixed={name: value for name, value in BERT_FIXED.items() if name not in ("tie", "mlp")}
        | {"norm_place": "pre", "bias": False, "pos": "rope", "first_norm": False},
        absent={"norm_eps": 1e-5, "norm_bias": False, "tie": True},
        parts=(
            TWO_ROPES,
            BOTH_SIDES,
            mlm_head("ModernBertModel"),
            named(
                "mlp",
                "hidden_activation",
                {"gelu": "geglu_erf", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu"}
                | {"silu": "swiglu", "swish": "swiglu"},
                "gelu",
            ),
        ),
        derived=PLAIN_HEADS,
        exact={
            "decoder_bias": (True, None),
            "classifier_bias": (False, None),
            "classifier_activation": ("gelu", None),
            "head_dim": (None,),
            "sliding_window": (None,),  # which counts for local_attention
        },
        written={"decoder_bias": True, "attention_bias": False, "mlp_bias": False}
        | {"classifier_bias": False, "classifier_activation": "gelu"},
        tensors=MODERNBERT_TENSORS,
    ),
    "t5": Family(
        lm="T5ForConditionalGeneration",
        heads={},
        keys=T5_KEYS,
        fixed={name: value for name, value in LLAMA_FIXED.items() if name != "mlp"}
        | {"pos": "relative", "scale_scores": False},
        absent={"head_dim": 64, "norm_eps": 1e-6, "n_buckets": 32, "max_distance": 128},
        parts=(
            T5_LENGTHS,
            T5_HEAD,
            T5_MLP,
        ),
        derived={"n_kv_head": heads_of_queries},
        exact={"is_encoder_decoder": (True,), "is_decoder": (False, None)},
        dropout_keys=("dropout_rate",),
        other_keys={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
        | {"hidden_size": "d_model", "head_dim": "d_kv"},
        written={"is_encoder_decoder": True},
        tensors=t5_tensors,
        tie_by_files=True,
    ),
}
FAMILIES["xlm-roberta"] = replace(
    FAMILIES["roberta"],
    lm="XLMRobertaForMaskedLM",
    parts=(OFFSET, mlm_head("XLMRobertaModel")),
    heads={
        task: replace(head, architecture=f"XLM{head.architecture}")
        for task, head in FAMILIES["roberta"].heads.items()
    },
)
# Known families that are not here, each with what keeps it from being exact.
REFUSED = {
    "gemma": "norms that multiply by 1 + weight, embeddings scaled in the file's dtype",
    "gemma2": "norms that multiply by 1 + weight (rms_norm_eps), query_pre_attn_scalar",
    "gemma3": "norms that multiply by 1 + weight, query_pre_attn_scalar, vision_config",
    "gemma3_text": "norms that multiply by 1 + weight, query_pre_attn_scalar",
    "gpt_oss": "experts with clamped activations (swiglu_limit) and biases, quantization_config",
    "mt5": "a head that some versions of transformers scale and others do not",
    "umt5": "a relative_attention_bias in every layer",
    "gpt_neox": "use_parallel_residual",
    "phi": "a block whose MLP stands beside its attention",
    "deberta-v2": "relative_attention",
    "electra": "embedding_size",
    "albert": "embedding_size, layers that share their weights",
    "distilbert": "its own names for all keys",
    "bart": "a decoder with learned positions and post-norm",
    "mpt": "attn_config",
    "falcon": "parallel_attn",
}
