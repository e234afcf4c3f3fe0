"""What a network is made of, as a block diagram: its parts in the order in which they compute,
equal blocks together, with their tensors, parameters and FLOPs.

    picture = diagram(net, model_parts(net))
    picture["flow"]     # [part or stack of blocks, …], as the view Model draws them
    picture["shares"]   # {"attention": {"params": …, "flops": …}, …}: all there is

A part: {"name", "kind", "words", "params", "flops", "tensors": [{"name", "shape", "n", "params",
"tied"}]}. A stack: {"blocks": [block, …], "repeat": so often they follow each other, "name",
"prefix": of its tensors' names, "layers": the first's and the last's number, "params", "flops"};
a block: {"n": so many equal ones, "layers": the first's and the last's number,
"branches"}, a branch being what is computed of x and added to it: {"parts", "behind": norms of the
sum}. The params and flops of a part in a block are those of all blocks that its stack has of it.

FLOPs are those of a token's forward pass in a text that fills the context, as `flops_per_token`
counts them: products of matrices, a multiplication and an addition each."""

import math
import re

from barelm.optim import MLP_MATRICES, attention_products, mlp_weights
from barelm.patterns import Pattern
from model import GPT, GPTConfig

KINDS = ("embedding", "attention", "mlp", "norm", "head", "other")
# Of a block: what stands in a branch, by the beginnings of names, in the order of computing.
PRE = [
    (["input_layernorm", "self_attn", "attn_out_norm"], []),
    (["cross_layernorm", "cross_attn", "cross_out_norm"], []),
    (["post_attention_layernorm", "mlp", "mlp_out_norm"], []),
]
POST = [  # norms that have the same names, and stand behind the sums
    (["self_attn"], ["input_layernorm"]),
    (["cross_attn"], ["cross_layernorm"]),
    (["mlp"], ["post_attention_layernorm"]),
]
EMBEDDING = ("model.embed_tokens", "model.embed_positions", "model.embed_types", "model.embed_norm")
TABLES = ("model.relative_bias", "model.encoder.relative_bias", "model.mtp.relative_bias")
BEFORE = ("hidden_norm", "token_norm", "joint_proj")  # of multi-token prediction's block


def diagram(net: GPT, tensors: list[dict]) -> dict:
    """The diagram of a network, whose tensors are `barelm.page.model_parts`'s."""
    c = net.config
    rest = [dict(t) for t in tensors]
    stacks = {}
    for prefix in ("model.encoder.layers", "model.layers", "model.mtp.layers"):
        stacks[prefix], rest = blocks_of(net, prefix, rest)
    flow = [embedding_part(c, take(rest, *EMBEDDING))]
    tables = take(rest, *TABLES)
    if tables:
        words = f"{c.n_buckets} distances, for each head"
        flow.append(make_part("Relative positions", "attention", words, tables))
    flow += stacks["model.encoder.layers"]
    norm = take(rest, "model.encoder.norm")
    if norm:
        flow.append(norm_part(c, "Encoder's final norm", norm))
    flow += stacks["model.layers"]
    norm = take(rest, "model.norm")
    if norm:
        flow.append(norm_part(c, "Final norm", norm))
    flow += heads_of(net, rest)
    flow += stacks["model.mtp.layers"]
    if rest:
        flow.append(make_part("Other", "other", "", rest))
    return {"length": c.n_ctx, "flow": flow, "shares": shares_of(flow)}


def take(rest: list[dict], *names: str) -> list[dict]:
    """Those of the tensors `rest` that have one of these names, or are within such a module; they
    leave it."""
    taken = []
    left = []
    for t in rest:
        own = any(t["name"] == name or t["name"].startswith(name + ".") for name in names)
        (taken if own else left).append(t)
    rest[:] = left
    return taken


def make_part(name: str, kind: str, words: str, tensors: list[dict], flops: float = 0) -> dict:
    rows = []
    for t in tensors:
        rows.append({"n": 1} | t)
    params = sum(t["params"] for t in tensors)
    return {
        "name": name,
        "kind": kind,
        "words": words,
        "params": params,
        "flops": flops,
        "tensors": rows,
    }


# --------------------------------------------------------------------------------------------------
# What stands before and behind the blocks


def embedding_part(c: GPTConfig, tensors: list[dict]) -> dict:
    words = f"{c.vocab_size:,} tokens, a row of {c.n_embd:,} each"
    positions = {"learned": "learned positions", "sinusoidal": "sinusoidal positions"}
    if c.pos in positions:
        words += f"; {positions[c.pos]}"
    return make_part("Embedding", "embedding", words, tensors)


def norm_part(c: GPTConfig, name: str, tensors: list[dict]) -> dict:
    return make_part(name, "norm", "RMSNorm" if c.norm == "rms" else "LayerNorm", tensors)


def heads_of(net: GPT, rest: list[dict]) -> list[dict]:
    """The parts that read the last states: of a language model its head, else what it has."""
    c = net.config
    parts = []
    reads_head = net.score is None and net.task != "embed"
    dense = take(rest, "head_dense", "head_norm")
    matrix = take(rest, "lm_head")
    if reads_head:
        words = f"a score for each of {c.vocab_size:,} tokens"
        if c.tie:
            words += ", by the embedding's matrix"
        flops = 2 * c.n_embd * c.vocab_size
        flops += 2 * c.n_embd**2 if c.mlm_head else 0
        parts.append(make_part("Head", "head", words, dense + matrix, flops))
    elif sum(t["params"] for t in matrix):
        parts.append(make_part("Language head", "head", "which nothing reads here", dense + matrix))
    score = take(rest, "score_dense", "score_norm", "score")
    if score:
        labels = ", ".join(net.labels[:4]) + (", …" if len(net.labels) > 4 else "")
        parts.append(make_part("Head", "head", f"{net.task}: {labels}", score))
    return parts


# --------------------------------------------------------------------------------------------------
# Blocks


def blocks_of(net: GPT, prefix: str, tensors: list[dict]) -> tuple[list[dict], list[dict]]:
    """(the stacks of the blocks whose names begin so, the other tensors)."""
    inner = {}  # {number of the block: its tensors, named within it}
    others = []
    for t in tensors:
        match = re.fullmatch(re.escape(prefix) + r"\.(\d+)\.(.+)", t["name"])
        if match:
            inner.setdefault(int(match[1]), []).append(t | {"name": match[2]})
        else:
            others.append(t)
    if not inner:
        return [], others
    kinds = []
    for i in sorted(inner):
        pattern = pattern_of(net, prefix, i)
        shapes = [(t["name"], tuple(t["shape"]), t["params"]) for t in inner[i]]
        kinds.append((pattern, tuple(shapes)))
    stacks = []
    for first, repeat, runs in periods(kinds):
        blocks = []
        at = first
        for n in runs:
            numbers = [at, at + n - 1]
            every = {"prefix": prefix, "first": at, "n": n * repeat}
            blocks.append(block_of(net, every, inner[at], numbers, n))
            at += n
        stack = {"blocks": blocks, "repeat": repeat, "name": name_of_stack(net, prefix)}
        stack["prefix"] = prefix
        stack["layers"] = [first, first + repeat * sum(runs) - 1]
        stack["params"] = sum(block["params"] for block in blocks)
        stack["flops"] = sum(block["flops"] for block in blocks)
        stacks.append(stack)
    return stacks, others


def pattern_of(net: GPT, prefix: str, i: int) -> Pattern:
    c = net.config
    if prefix == "model.encoder.layers":
        return c.encoder_patterns[i]
    if prefix == "model.mtp.layers":
        return net.model.mtp.layers[i].pattern
    return c.patterns[i]


def name_of_stack(net: GPT, prefix: str) -> str:
    if prefix == "model.mtp.layers":
        return "Multi-token prediction, in training alone"
    if not net.config.is_seq2seq:
        return ""
    return "Encoder" if "encoder" in prefix else "Decoder"


def periods(kinds: list) -> list[tuple[int, int, list[int]]]:
    """How a list of blocks' kinds repeats: [(number of the first block, how often a pattern comes,
    lengths of the runs of equal blocks in it)]. SSSLSSSL is a pattern of runs 3 and 1, twice."""
    n = len(kinds)
    for period in range(1, n // 2 + 1):
        if n % period == 0 and kinds == kinds[:period] * (n // period):
            return [(0, n // period, runs_of(kinds[:period]))]
    return [(0, 1, runs_of(kinds))]


def runs_of(kinds: list) -> list[int]:
    """The lengths of runs of equal items."""
    runs = []
    for i, kind in enumerate(kinds):
        if i and kind == kinds[i - 1]:
            runs[-1] += 1
        else:
            runs.append(1)
    return runs


def block_of(net: GPT, every: dict, tensors: list[dict], numbers: list[int], n: int) -> dict:
    """A block, of tensors named within it. every: which blocks are like it, in all repetitions."""
    c = net.config
    rest = [dict(t) for t in tensors]
    branches = []
    joins = take(rest, *BEFORE)
    if joins:
        parts = [block_part(net, every, "joint", joins)]
        branches.append({"parts": parts, "behind": [], "adds": False})
    for names, behind in POST if c.norm_place == "post" else PRE:
        parts = [block_part(net, every, name, take(rest, name)) for name in names]
        norms = [block_part(net, every, name, take(rest, name)) for name in behind]
        parts = [part for part in parts if part]
        norms = [part for part in norms if part]
        if parts:
            branches.append({"parts": parts, "behind": norms, "adds": True})
    norm = take(rest, "norm")  # of multi-token prediction's block, behind all
    if norm:
        parts = [block_part(net, every, "norm", norm)]
        branches.append({"parts": parts, "behind": [], "adds": False})
    if rest:
        parts = [block_part(net, every, "other", rest)]
        branches.append({"parts": parts, "behind": [], "adds": False})
    parts = [part for branch in branches for part in branch["parts"] + branch["behind"]]
    return {
        "n": n,
        "layers": numbers,
        "branches": branches,
        "params": sum(part["params"] for part in parts),
        "flops": sum(part["flops"] for part in parts),
    }


def block_part(net: GPT, every: dict, name: str, tensors: list[dict]) -> dict | None:
    """A part of a block with these tensors, counted as often as there are such blocks; None where
    there is none, such as a norm that is not."""
    if not tensors:
        return None
    rows = []
    for t in tensors:
        rows.append(t | {"n": every["n"], "params": t["params"] * every["n"]})
    describe = {"self_attn": attention_words, "cross_attn": attention_words, "mlp": mlp_words}
    kind = {"self_attn": "attention", "cross_attn": "attention", "mlp": "mlp"}.get(name, "norm")
    title, words, flops = "Norm", "RMSNorm" if net.config.norm == "rms" else "LayerNorm", 0
    if name in describe:
        title, words, flops = describe[name](net, every, name)
    elif name == "joint":
        kind, title, words = "other", "Join", "states beside the embedding of the token ahead"
    elif name == "other":
        kind, title, words = "other", "Other", ""
    return make_part(title, kind, words, rows, flops * every["n"])


def attention_words(net: GPT, every: dict, name: str) -> tuple[str, str, float]:
    """(title, words, FLOPs of a token) of a block's attention."""
    c = net.config
    heads = f"{c.n_head} heads of {c.head_dim}"
    if c.n_kv_head != c.n_head:
        heads += f", {c.n_kv_head} of keys and values"
    if name == "cross_attn":
        # q and o of the target's token; k and v of a source's, which has as many.
        numbers = 2 * c.head_dim * c.n_head * (c.n_embd + c.n_ctx)
        numbers += 2 * c.head_dim * c.n_kv_head * c.n_embd
        return "Cross-attention", f"to the source, {heads}", 2 * numbers
    pattern = pattern_of(net, every["prefix"], every["first"])
    words = [heads, seen_words(pattern)]
    if c.pos in ("rope", "relative", "alibi"):
        words.append({"rope": "RoPE", "relative": "relative positions", "alibi": "ALiBi"}[c.pos])
    if "mtp" in every["prefix"]:  # which no forward pass computes, but a training step's
        return "Attention", ", ".join(words), 0
    numbers = 2 * c.head_dim * c.n_embd * (c.n_head + c.n_kv_head)  # q and o, k and v
    numbers += attention_products(c, pattern, c.n_ctx)
    return "Attention", ", ".join(words), 2 * numbers


def seen_words(pattern: Pattern) -> str:
    """What a token sees."""
    if pattern.window:
        return f"{pattern.kind} window of {pattern.window:,}"
    return "all before" if pattern.causal else "all tokens"


def mlp_words(net: GPT, every: dict, name: str) -> tuple[str, str, float]:
    c = net.config
    kind = {"swiglu": "SwiGLU", "geglu": "GeGLU", "geglu_erf": "GeGLU", "relu2": "ReLU²"}
    kind = kind.get(c.mlp, {"relu": "ReLU"}.get(c.mlp, "GELU"))
    is_decoder = every["prefix"] == "model.layers"
    if is_decoder and c.has_experts[every["first"]]:
        words = f"{c.n_experts} of {c.expert_hidden:,}, {c.n_experts_per_token} for each token"
        if c.n_shared_experts:
            words += f", and {c.n_shared_experts} shared by all"
        return "Experts", f"{words}; {kind}", 2 * mlp_weights(c, every["first"])
    words = f"{kind}, {c.n_hidden:,} hidden units"
    if "mtp" in every["prefix"]:
        return "MLP", words, 0
    return "MLP", words, 2 * MLP_MATRICES[c.mlp] * c.n_embd * c.n_hidden


# --------------------------------------------------------------------------------------------------
# Shares


def parts_of(flow: list[dict]) -> list[dict]:
    """All parts of a diagram, those of its blocks among them."""
    parts = []
    for item in flow:
        if "blocks" not in item:
            parts.append(item)
            continue
        for block in item["blocks"]:
            for branch in block["branches"]:
                parts += branch["parts"] + branch["behind"]
    return parts


def shares_of(flow: list[dict]) -> dict[str, dict[str, float]]:
    """{kind: {"params", "flops"}} of what there is, in the order of KINDS."""
    parts = parts_of(flow)
    shares = {}
    for kind in KINDS:
        own = [part for part in parts if part["kind"] == kind]
        if own:
            flops = math.fsum(part["flops"] for part in own)
            shares[kind] = {"params": sum(part["params"] for part in own), "flops": flops}
    return shares
