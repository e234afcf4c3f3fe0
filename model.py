"""The network as mathematics, then its cache of keys and values, and how text is generated.

    net = GPT(GPTConfig(vocab_size=4096, n_ctx=256, n_layer=4, n_head=3, n_embd=192))
    logits = net(ids)  # ids (B, T) int64; logits (B, T, V)
    loss_sum, n_targets = net(ids, targets)
    [answer] = generate(net, tokenizer, ["Once upon a time"], max_new_tokens=50)

B rows of T tokens, C: n_embd, H: heads of queries, G: of keys and values, D: head_dim, S: tokens
to look at, V: vocab_size. What is only there for speed stands in barelm/fast.py and
barelm/elementwise.py and is chosen in `Operations`; GPT(config, fast=False) does without.
"""

import codecs
import copy
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Literal, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from barelm import invariant
from barelm.elementwise import FusedRMSNorm, FusedRotation, FusedSwiGLU, can_fuse
from barelm.fast import (
    block_mask,
    blocked_attention,
    can_block,
    can_piece,
    cross_entropy_sum,
    generating,
    head_piece,
    joined_product,
    sparse_attention,
)
from barelm.generation import decode_rows
from barelm.run import UserError, compute_dtype
from barelm.sampling import check_sampling, choose_tokens, draws, penalize
from barelm.speculate import check_speculation, speculate_rows


@dataclass
class GPTConfig:
    """The shape of a network. Zero for n_kv_head, head_dim or n_hidden means the usual value."""

    vocab_size: int
    n_ctx: int
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0  # 0: n_head; fewer is grouped-query attention (Ainslie et al. 2023)
    head_dim: int = 0  # 0: n_embd / n_head
    n_hidden: int = 0  # 0: 8/3 n_embd rounded up to 64 for swiglu, else 4 n_embd
    norm: Literal["rms", "layer"] = "rms"
    norm_place: Literal["pre", "post", "both"] = "pre"  # post: after the sum, as in Vaswani et al.
    norm_eps: float = 1e-6
    qk_norm: bool = True  # RMSNorm on each head's query and key, before the rotation
    qkv_bias: bool = False
    bias: bool = False  # biases in every linear layer but the head, and in LayerNorm
    pos: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Hugging Face's dict: rope_type linear or llama3
    mlp: Literal["swiglu", "gelu", "relu", "relu2"] = "swiglu"
    tie: bool = True  # the head's weights are the embedding's
    dropout: float = 0.0
    init: Literal["scaled", "xavier", "he"] = "scaled"

    def __post_init__(self):
        check_fields(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_hidden == 0 and self.mlp == "swiglu":
            self.n_hidden = -(-self.n_embd * 8 // (3 * 64)) * 64  # it has a third matrix
        elif self.n_hidden == 0:
            self.n_hidden = 4 * self.n_embd
        check_shape(self)


def rms_norm(x, weight, eps):
    """RMSNorm (Zhang and Sennrich 2019) of x (…, D) by weight (D,), or (H, D) for x (…, H, D)."""
    # Weights are float32 in training: without the cast, bfloat16 would become float32 here.
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    def __init__(self, size, eps, ops):
        super().__init__(size, eps)
        self.ops = ops

    def forward(self, x):
        return self.ops.rms_norm(x, self.weight, self.eps)


def make_norm(c, ops):
    """The norm of a block's input or output."""
    if c.norm == "rms":
        return RMSNorm(c.n_embd, c.norm_eps, ops)
    return nn.LayerNorm(c.n_embd, c.norm_eps, bias=c.bias)


def rotate(x, rope):
    """Rotate the pairs (j, j + D / 2) of x (B, T, H, D) by the angles rope, `rope_angles`'."""
    cos, sin = rope
    a, b = x.chunk(2, -1)  # (B, T, H, D / 2) each
    return x * cos + torch.cat((b, a), -1) * sin  # a cos - b sin, and b cos + a sin


class Operations:
    """The operations of a network, each as its formula. Where `fast` is true, barelm/fast.py or
    barelm/elementwise.py is asked first; what they have no faster way for, they leave to the
    formula. Who changes a formula deletes the `if` above it: before its first step train.py
    compares the two. `deterministic`: by barelm/invariant.py, so that a token's bits do not depend
    on what else is in the batch."""

    def __init__(self, fast):
        self.fast = fast
        self.deterministic = False
        self.packed: dict | None = None  # within `generating`: weights in a layout of the CPU's
        # Both by barelm/compiled.py, which compares before it sets them:
        self.sparse = False  # skip what documents hide: pays in compiled blocks on a GPU
        self.head_piece: Callable = head_piece  # or that compiled
        self.attend_cached: Callable | None = None  # within a Decoder's step on a GPU

    def project(self, x, *layers):
        """The outputs of linear layers that read the same x (…, C), side by side."""
        if self.deterministic:
            return invariant.project(x, layers)
        if self.fast:
            y = joined_product(x, layers, self.packed)
            if y is not None:
                return y
        if len(layers) == 1:
            return layers[0](x)
        return torch.cat([layer(x) for layer in layers], -1)

    def rms_norm(self, x, weight, eps):
        if self.fast and can_fuse(x):
            return FusedRMSNorm.apply(x, weight, eps)
        return rms_norm(x, weight, eps)

    def rotate(self, x, rope):
        if self.fast and can_fuse(x):
            return FusedRotation.apply(x, *rope)
        return rotate(x, rope)

    def swiglu(self, gate_up):
        """silu(gate) * up (Shazeer 2020), of both side by side (…, 2 n_hidden)."""
        if self.fast and can_fuse(gate_up):
            return FusedSwiGLU.apply(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return self.silu(gate) * up

    def mask(self, c, positions, docs):
        """What `attend` takes to let tokens at positions (1, T) look at one another."""
        if self.fast and self.sparse and docs is not None:
            return block_mask(partial(may_look, c), docs)
        return attention_mask(c, positions, positions, docs)

    def attend(self, q, k, v, mask=None, dropout=0.0):
        """softmax(q k^T / sqrt(D)) v (B, H, T, D), of q (B, H, T, D), k and v (B, G, S, D); mask is
        `attention_mask`'s, or a `block_mask`."""
        if self.deterministic and not dropout:
            return invariant.attention(q, k, v, mask, partial(self.plain_attend, mask=mask))
        if self.attend_cached is not None:
            return self.attend_cached(q, k, v, mask)
        if mask is not None and not isinstance(mask, torch.Tensor):
            return sparse_attention(q, k, v, mask)
        if self.fast and can_block(q, k, mask, dropout):
            return blocked_attention(q, k, v, mask)
        return self.plain_attend(q, k, v, mask, dropout)

    def plain_attend(self, q, k, v, mask=None, dropout=0.0):
        """`attend` by torch's own."""
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(k.dtype)  # torch adds it to scores of this type
        causal = False
        if mask is None and q.shape[2] > 1:  # one token sees all that there is
            causal = True  # a literal: in torch.compile and torch.export T may be a symbol
        # A head of k and v for H / G heads of q. Where G is H it is off: some kernels lack it.
        grouped = q.shape[1] != k.shape[1]
        if grouped and k.device.type == "cuda" and not self.deterministic:
            # There flash attention alone has it, which has no mask and no float32: what torch does
            # in its place keeps all T x S scores in float32 (but always adds in the same order).
            has_flash = mask is None and compute_dtype(k) == torch.bfloat16
            if not has_flash:
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, S, D)
                v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
                grouped = False
        like_k = q.to(k.dtype)  # a cache may be float32 where the network is not
        y = F.scaled_dot_product_attention(like_k, k, v, mask, dropout, causal, enable_gqa=grouped)
        return y.to(q.dtype)

    def silu(self, x):
        return invariant.silu(x) if self.deterministic else F.silu(x)

    def gelu(self, x):
        """As GPT-2's: by tanh."""
        return invariant.gelu(x) if self.deterministic else F.gelu(x, approximate="tanh")

    def cross_entropy(self, h, head, targets, logits):
        """The sum of -log softmax(logits(h))[target], float32: h (N, C), targets (N,), -100 meaning
        none. The faster way makes head(h) a piece at a time, and no `logits`."""
        if self.fast and can_piece(head):
            return cross_entropy_sum(h, head.weight, targets, self.head_piece)
        return F.cross_entropy(logits(h).float(), targets, reduction="sum")  # of (N, V)


class Attention(nn.Module):
    """Grouped-query attention: H heads of queries, G of keys and values."""

    def __init__(self, c, ops):
        super().__init__()
        self.c = c
        self.ops = ops
        qkv_bias = c.bias or c.qkv_bias
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps, ops)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps, ops)

    def qkv(self, x, rope=None):
        """q (B, H, T, D), k and v (B, G, T, D) of x (B, T, C)."""
        c = self.c
        B, T, _ = x.shape
        H = c.n_head
        G = c.n_kv_head
        qkv = self.ops.project(x, self.q_proj, self.k_proj, self.v_proj)  # (B, T, (H + 2 G) D)
        qkv = qkv.view(B, T, H + 2 * G, c.head_dim)
        # Queries and keys are normed and rotated alike: as one tensor of H + G heads it takes half
        # the calls, which is what a single token's time goes to.
        qk, v = qkv.split((H + G, G), 2)
        if c.qk_norm:
            # No query or key is long, so that no score runs away (Henry et al. 2020).
            weights = (self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(G, -1))
            qk = self.ops.rms_norm(qk, torch.cat(weights), c.norm_eps)  # weights (H + G, D)
        if rope is not None:
            qk = self.ops.rotate(qk, rope)
        q, k = qk.transpose(1, 2).split((H, G), 1)
        return q, k, v.transpose(1, 2)

    def forward(self, x, rope=None, mask=None, cache=None):
        """What each token of x (B, T, C) gathers (B, T, C). cache(k, v) stores what is new and
        returns all keys and values that may be looked at."""
        q, k, v = self.qkv(x, rope)
        if cache is not None:
            k, v = cache(k, v)  # (B, G, S, D)
        dropout = self.c.dropout if self.training else 0.0
        y = self.ops.attend(q, k, v, mask, dropout)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H D)
        return self.ops.project(y, self.o_proj)

    def probabilities(self, x, rope=None, mask=None):
        """By how much each token of x looks at each (B, H, T, T) float32, for people to look at."""
        q, k, _ = self.qkv(x, rope)
        return attention_probabilities(q, k, mask)


class MLP(nn.Module):
    """What is done with each token by itself."""

    def __init__(self, c, ops):
        super().__init__()
        self.kind = c.mlp
        self.ops = ops
        if c.mlp == "swiglu":
            self.gate_proj = nn.Linear(c.n_embd, c.n_hidden, bias=c.bias)
        self.up_proj = nn.Linear(c.n_embd, c.n_hidden, bias=c.bias)
        self.down_proj = nn.Linear(c.n_hidden, c.n_embd, bias=c.bias)

    def forward(self, x):
        if self.kind == "swiglu":
            gate_up = self.ops.project(x, self.gate_proj, self.up_proj)
            h = self.ops.swiglu(gate_up)  # (B, T, n_hidden)
        elif self.kind == "gelu":
            h = self.ops.gelu(self.ops.project(x, self.up_proj))
        elif self.kind == "relu":
            h = F.relu(self.ops.project(x, self.up_proj))
        else:  # relu2: So et al. 2021
            h = F.relu(self.ops.project(x, self.up_proj)).square()
        return self.ops.project(h, self.down_proj)


class Block(nn.Module):
    """Attention, then an MLP, each added to x. The norms have Hugging Face's names: with
    norm_place "post" they stand behind the two, and not before."""

    def __init__(self, c, ops):
        super().__init__()
        self.c = c
        self.self_attn = Attention(c, ops)
        self.mlp = MLP(c, ops)
        self.input_layernorm = make_norm(c, ops)
        self.post_attention_layernorm = make_norm(c, ops)
        both = c.norm_place == "both"
        self.attn_out_norm = make_norm(c, ops) if both else nn.Identity()
        self.mlp_out_norm = make_norm(c, ops) if both else nn.Identity()

    def forward(self, x, rope=None, mask=None, cache=None):
        if self.c.norm_place == "post":
            x = x + self.dropout(self.self_attn(x, rope, mask, cache))
            x = self.input_layernorm(x)
            return self.post_attention_layernorm(x + self.dropout(self.mlp(x)))
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache)
        x = x + self.dropout(self.attn_out_norm(y))
        y = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(self.mlp_out_norm(y))

    def dropout(self, x):
        return F.dropout(x, self.c.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer. Its state_dict is, name by name, the Hugging Face file's.

    fast=False computes everything as it stands in this file, to compare with."""

    def __init__(self, config, fast=True):
        super().__init__()
        c = config
        self.config = config
        self.ops = Operations(fast)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        if c.pos == "learned":
            self.model.embed_positions = nn.Embedding(c.n_ctx, c.n_embd)
        self.model.layers = nn.ModuleList(Block(c, self.ops) for _ in range(c.n_layer))
        # With norms after the sums the last block's output is normed already.
        post = c.norm_place == "post"
        self.model.norm = nn.Identity() if post else make_norm(c, self.ops)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie:
            self.lm_head.weight = self.model.embed_tokens.weight
        # A tied matrix is drawn under both its names: drawn once, each seed would mean others.
        for name, p in self.named_parameters(remove_duplicate=False):
            self.init_weight(name, p)

        # How it is trained: all of these may be set by whoever trains it.
        self.checkpoint: bool = False  # recompute each block in backward: less memory, more time
        self.train_block: Callable = call_block  # or torch.compile(call_block); not with a cache
        self.eval_block: Callable = call_block  # the same of eval mode
        # What may be added to it: a classifier's head (`set_score`), adapters, quantized weights.
        self.score: nn.Linear | None = None  # (n_labels, C)
        self.labels: list[str] | None = None  # of the rows of score
        self.pooling: str = "last"  # what score reads: the last token's state, or the "mean"
        self.pad_id: int | None = None  # the token that is no text's last one
        self.adapter_size: int = 0  # width of the bottlenecks of barelm.adapters.add_adapters
        self.quantize: str | None = None  # int8 or int4, by barelm.quantized

    def init_weight(self, name, p):
        """Draw a parameter's first values; norms keep their ones."""
        c = self.config
        if name.endswith("proj.bias"):
            nn.init.zeros_(p)
        elif "proj" in name and c.init == "xavier":
            nn.init.xavier_uniform_(p)
        elif "proj" in name and c.init == "he":
            nn.init.kaiming_normal_(p)
        elif p.ndim > 1 and name.endswith(("o_proj.weight", "down_proj.weight")):
            # Each block adds to x twice: so the sum of all has the variance of one (GPT-2).
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))
        elif p.ndim > 1:
            nn.init.normal_(p, std=0.02)

    @property
    def fast(self):
        """Whether barelm/fast.py is used where it can be; may be set at any time."""
        return self.ops.fast

    @fast.setter
    def fast(self, value):
        self.ops.fast = value

    @property
    def deterministic(self):
        """Whether barelm/invariant.py computes, instead of both; see its `be_deterministic`."""
        return self.ops.deterministic

    @deterministic.setter
    def deterministic(self, value):
        self.ops.deterministic = value
        self.ops.fast = self.ops.fast and not value

    @property
    def block(self):
        """What computes a block where there is no cache, in the mode that the network is in."""
        return self.train_block if self.training else self.eval_block

    def hidden(self, ids, *, cache=None, n_new=None, docs=None, embeds=None):
        """The final hidden states (B, T, C), normalized, of ids (B, T) int64 or embeds (B, T, C).

        With a cache, row b's first n_new[b] tokens (all T where n_new is None) continue that row.
        docs (B, T) int64: a token attends to its own document, where positions start anew."""
        c = self.config
        x = self.model.embed_tokens(ids) if embeds is None else embeds  # (B, T, C)
        length = x.shape[1]
        is_spread = self.deterministic and cache is None and docs is not None
        if is_spread:
            x, docs, places = invariant.spread(x, docs)
        T = x.shape[1]
        if cache is None:
            positions = torch.arange(T, device=x.device)[None]  # (1, T)
            mask = self.ops.mask(c, positions, docs)
        else:
            positions, key_positions, causal = cache.extend(T, n_new)
            mask = attention_mask(c, positions, key_positions, docs, causal)
        if docs is not None:
            positions = document_positions(positions, docs)

        rope = None
        if c.pos == "rope":
            rope = rope_angles(c, positions, compute_dtype(x))
        elif c.pos == "learned":
            if cache is None and length > c.n_ctx:
                raise ValueError(f"{length} tokens, but the model has {c.n_ctx} learned positions")
            # A cache's padding may lie behind the last position; nothing reads it.
            x = x + self.model.embed_positions(positions.clamp(max=c.n_ctx - 1))
        elif c.pos == "sinusoidal":
            x = x + sinusoids(positions, c.n_embd).to(x.dtype)
        x = F.dropout(x, c.dropout, self.training)

        for i, block in enumerate(self.model.layers):
            if cache is not None:
                x = block(x, rope, mask, partial(cache.write, i))
            elif self.training and self.checkpoint:
                x = checkpoint(self.block, block, x, rope, mask, use_reentrant=False)
            else:
                x = self.block(block, x, rope, mask)
        if is_spread:
            x = x[torch.arange(len(x), device=x.device)[:, None], places]  # (B, length, C)
        return self.model.norm(x)

    def logits(self, h):
        """The logits (…, V) of hidden states (…, C)."""
        return self.ops.project(h, self.lm_head)

    def forward(self, ids, targets=None, **options):
        """logits (B, T, V); or with targets (B, T) int64, -100 meaning none, (the sum of -log p in
        nats, float32; their count). `options` are those of `hidden`. Pre-training and SFT come by
        here, and get what is added to the loss; other methods take `hidden` and `logits`."""
        h = self.hidden(ids, **options)
        if targets is None:
            return self.logits(h)
        # A sum, and a count beside it: those of micro-batches and processes then add up exactly.
        h = h.flatten(0, 1)  # (B T, C)
        loss = self.ops.cross_entropy(h, self.lm_head, targets.flatten(), self.logits)
        return loss, (targets != -100).sum()

    def make_cache(self, batch, max_len):
        """An empty cache for `batch` rows of at most max_len tokens."""
        table = self.model.embed_tokens.weight
        # A CPU attends to float32 faster than to less: it has to convert the rest.
        dtype = torch.float32 if table.device.type == "cpu" else compute_dtype(table)
        return KVCache(self.config, batch, max_len, table.device, dtype)

    def set_score(self, labels, pooling="last", pad_id=None):
        """Give the network a classifier's head, or a reward model's with its one label. pad_id: a
        token that is no text's last one."""
        device = self.model.embed_tokens.weight.device
        self.score = nn.Linear(self.config.n_embd, len(labels), bias=False, device=device)
        nn.init.normal_(self.score.weight, std=0.02)
        self.labels = labels
        self.pooling = pooling
        self.pad_id = pad_id

    def scores(self, texts):
        """(B, labels) float32 of texts, lists of ids: by the state of the last token that is no
        padding, as transformers finds it (the first where all are), or by the mean's."""
        device = self.score.weight.device
        texts = [self.without_padding(ids) for ids in texts]
        lengths = torch.tensor([len(ids) for ids in texts], device=device)  # (B,)
        rows = [torch.tensor(ids) for ids in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
        return self.scores_of(ids.to(device), lengths)

    def scores_of(self, ids, lengths):
        """`scores` of the first lengths (B,) tokens of each row of ids (B, T)."""
        h = self.hidden(ids)  # (B, T, C)
        if self.pooling == "mean":
            real = torch.arange(h.shape[1], device=h.device) < lengths[:, None]  # (B, T)
            h = (h * real[..., None]).sum(1) / lengths[:, None]  # (B, C)
        else:
            h = h[torch.arange(len(h), device=h.device), lengths - 1]  # (B, C)
        return self.score(h).float()

    def without_padding(self, ids):
        """The ids up to the last one that is no padding, and one at least."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self.pad_id:
            end -= 1
        return ids[:end]


def call_block(block, x, rope, mask):
    """What torch.compile is given: one compiled block then serves them all."""
    return block(x, rope, mask)


def logprobs(net, ids, targets):
    """log p(targets) (B, T) float32 under net at each position of ids (B, T); 0 where -100, and
    no logits are made there."""
    wanted = targets != -100
    logits = net.logits(net.hidden(ids)[wanted]).float()  # (N, V)
    logp = -F.cross_entropy(logits, targets[wanted], reduction="none")
    return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(wanted, logp)


# --------------------------------------------------------------------------------------------------
# Where tokens stand, and what they may look at


def rope_frequencies(c, device):
    """Radians per position of each pair of dimensions (D / 2,) float32 (Su et al. 2021)."""
    exponents = torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim
    frequencies = c.rope_theta**-exponents
    scaling = c.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # llama3: slow frequencies are divided by the factor, fast ones kept, those between blended.
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rope_angles(c, positions, dtype):
    """(cos and cos, -sin and sin), each (B, T, 1, D), of the angles by which RoPE turns at
    positions (B, T): for the first half of a head's dimensions and for the second."""
    # The angles are float32: bfloat16 has no whole numbers above 256.
    angles = positions[:, :, None, None] * rope_frequencies(c, positions.device)
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def sinusoids(positions, size):
    """Fixed position embeddings (…, size): sines, then cosines (Vaswani et al. 2017, 3.5)."""
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size
    angles = positions[..., None] / 10000.0**exponents
    return torch.cat((angles.sin(), angles.cos()), -1)[..., :size]


def document_positions(positions, docs):
    """Positions (B, T) that begin at 0 in each document of docs (B, T)."""
    begins = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0))  # a row's first is at 0 anyway
    return positions - (begins * positions).cummax(1).values


def may_look(c, query, key, query_doc=None, key_doc=None):
    """Whether a token at position `query` may look at one at position `key`, of these documents:
    bool, of int tensors that broadcast. c is for what the configuration says of it, such as a
    window. It is asked of whole squares of tokens, and by kernels of one pair at a time."""
    seen = key <= query
    if query_doc is not None:
        seen = seen & (key_doc == query_doc)
    return seen


def attention_mask(c, positions, key_positions, docs=None, causal=True):
    """What the tokens at positions (B or 1, T) may look at, of those at key_positions (B or 1, S):
    None, or a mask that broadcasts to (B, H, T, S), either bool (true: it may) or float (added to
    the scores: ALiBi's biases, say). Who may look at whom is decided here and in `may_look`, and
    nowhere else.

    docs (B, T): they look at their own document only. causal: by their order in the tensors alone
    every token sees itself and what is before it, so that attention needs no mask (None)."""
    if causal and docs is None:
        return None
    query = positions[:, :, None]  # (B or 1, T, 1)
    key = key_positions[:, None, :]  # (B or 1, 1, S)
    if docs is None:
        mask = may_look(c, query, key)
    else:
        mask = may_look(c, query, key, docs[:, :, None], docs[:, None, :])
    return mask[:, None]  # (B or 1, 1, T, S): the same for all heads


def attention_probabilities(q, k, mask=None):
    """softmax(q k^T / sqrt(D)) (B, H, T, S) float32: how much each token looks at each, by which
    `Operations.attend` weighs v. It takes the same q, k and mask, and O(T S) memory."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, S, D)
    scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask is None and q.shape[2] > 1:
        mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (scores + mask).softmax(-1)


# --------------------------------------------------------------------------------------------------
# What a configuration may hold


LARGEST = 1 << 28  # of a config's whole numbers, so that torch can count the bytes of a product
SCALING_KEYS = {  # of rope_scaling, by its rope_type
    "linear": ["factor"],
    "llama3": [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ],
}


def check(c, name, good, expected):
    if not good:
        raise UserError(f"{name}={getattr(c, name)!r}: expected {expected}")


def check_fields(c):
    """Refuse a value that is not of its field's type, or that no field of the type can have."""
    for f in fields(c):
        value = getattr(c, f.name)
        if f.type is int:
            # 0 means the usual value where 0 is the default. A bool is no int here.
            least = 1 if f.default is MISSING else min(1, f.default)
            good = type(value) is int and least <= value <= LARGEST
            check(c, f.name, good, f"a whole number from {least} to {LARGEST}")
        elif f.type is float:
            # Computed in float32, which ends at 3.4e38. NaN is less than nothing.
            good = type(value) in (int, float) and abs(value) < 3e38
            check(c, f.name, good, "a finite number")
            setattr(c, f.name, float(value))
        elif f.type is bool:
            check(c, f.name, type(value) is bool, "true or false")
        elif get_origin(f.type) is Literal:
            allowed = get_args(f.type)
            check(c, f.name, value in allowed, " or ".join(map(str, allowed)))
    check(c, "n_embd", c.head_dim or c.n_embd % c.n_head == 0, "n_head to divide it")


def check_shape(c):
    """Refuse values that do not go together, of a config whose zeros are filled in."""
    check(c, "n_hidden", c.n_hidden <= LARGEST, f"at most {LARGEST}")
    check(c, "n_head", c.n_head * c.head_dim <= LARGEST, "a width that a machine holds")
    check(c, "n_kv_head", c.n_head % c.n_kv_head == 0, "to divide n_head")
    check(c, "head_dim", c.pos != "rope" or c.head_dim % 2 == 0, "an even number")
    # Of a row of zeros, as a padding token's may be, 0 would make NaN.
    check(c, "norm_eps", 1e-30 <= c.norm_eps < 1, "a number above 0 and less than 1")
    check(c, "rope_theta", c.rope_theta >= 1, "1 or more")
    check(c, "dropout", 0 <= c.dropout < 1, "0 or more and less than 1")
    if c.rope_scaling is not None:
        check_scaling(c, c.rope_scaling)


def check_scaling(c, scaling):
    """Refuse a rope_scaling of unknown type, or with numbers that scale to nothing."""
    expected = f"a dict with rope_type and the keys of {SCALING_KEYS}"
    check(c, "rope_scaling", isinstance(scaling, dict), expected)
    check(c, "rope_scaling", scaling.get("rope_type") in list(SCALING_KEYS), expected)
    for key in SCALING_KEYS[scaling["rope_type"]]:
        value = scaling.get(key)
        good = type(value) in (int, float) and 0 < value <= LARGEST
        check(c, "rope_scaling", good, f"{expected}, {key} a number above 0")
    if scaling["rope_type"] == "llama3":
        ordered = scaling["low_freq_factor"] < scaling["high_freq_factor"]
        check(c, "rope_scaling", ordered, "high_freq_factor above low_freq_factor")


# --------------------------------------------------------------------------------------------------
# The cache, and generation


class KVCache:
    """Keys and values of past tokens, every row with a length of its own.

    k, v (n_layer, batch, G, max_len, D); lengths (batch,) int64 on the device. A token's place is
    its position. Who changes lengths makes `even` False; length 0 empties a row."""

    def __init__(self, config, batch, max_len, device, dtype):
        self.max_len = max_len
        # What the host knows by itself, so that no step waits for the device to tell its lengths:
        self.used = 0  # no row is longer
        self.even = True  # all rows are that long, so that slices do for indices and masks
        # One place more than max_len: where writes that belong to no token go.
        shape = (2, config.n_layer, batch, config.n_kv_head, max_len + 1, config.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def k(self):
        return self.store[0, ..., : self.max_len, :]

    @property
    def v(self):
        return self.store[1, ..., : self.max_len, :]

    def extend(self, T, n_new=None):
        """Make room for T tokens a row, of which the first n_new[b] of row b are real (None: all).
        Returns what `attention_mask` asks for: the positions of the tokens (B or 1, T), those of
        what is there to look at (1, S), and whether causal attention is enough."""
        device = self.lengths.device
        begin = self.used
        end = begin + T
        if begin == 0 and end > self.max_len:
            raise ValueError(f"{T} tokens do not fit a cache of {self.max_len}")
        self.used = min(end, self.max_len)
        self.fresh = begin == 0  # there is nothing to look at but the new tokens themselves
        if n_new is not None or end > self.max_len:  # some rows grow by less than others
            self.even = False
        key_positions = torch.arange(self.used, device=device)[None]  # (1, S)

        if self.even:
            self.slots = slice(begin, end)
            self.lengths = self.lengths + T
            # Nothing is behind the last token: alone, it sees all.
            return key_positions[:, begin:], key_positions, self.fresh or T == 1

        steps = torch.arange(T, device=device)
        positions = self.lengths[:, None] + steps  # (B, T)
        real = positions < self.max_len
        if n_new is not None:
            real = real & (steps < n_new[:, None])
        self.lengths = self.lengths + real.sum(1)
        if self.fresh:
            # Padding comes after all real tokens, which do not look there; its place is free again.
            self.slots = slice(0, end)
        else:
            self.slots = torch.where(real, positions, self.max_len)  # (B, T)
        return positions, key_positions, self.fresh

    def write(self, i, k, v):
        """Store layer i's new k and v (B, G, T, D); return all that there is to look at."""
        for stored, new in ((self.store[0, i], k), (self.store[1, i], v)):
            if isinstance(self.slots, slice):
                stored[:, :, self.slots] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]  # (B, 1)
                # Two indices with a slice between them give (B, T, G, D).
                stored[rows, :, self.slots] = new.transpose(1, 2).to(stored.dtype)
        if self.fresh:  # as they came: not yet rounded to the cache's type
            return k, v
        return self.store[0, i, :, :, : self.used], self.store[1, i, :, :, : self.used]

    def reorder(self, rows):
        """Row i becomes what row rows[i] was (beam search)."""
        self.store, self.lengths = self.store[:, :, rows], self.lengths[rows]

    def part(self, begin, lengths):
        """The rows from `begin` on as a cache of their own, in the same memory: as many as there
        are lengths (a list), which it starts with."""
        part = copy.copy(self)
        part.store = self.store[:, :, begin : begin + len(lengths)]
        part.lengths = torch.tensor(lengths, device=self.store.device)
        part.used, part.even = max(lengths), len(set(lengths)) == 1
        return part

    def truncate(self, lengths):
        """Forget what is behind the first lengths[b] tokens of each row (a list)."""
        self.lengths = torch.tensor(lengths, device=self.store.device)
        self.used, self.even = max(lengths), len(set(lengths)) == 1

    def copy(self, to, rows, length):
        """The first `length` places of the rows `to` become what they were in `rows` (lists)."""
        self.store[:, :, to, :, :length] = self.store[:, :, rows, :, :length]


@dataclass
class Generation:
    """ids end with the end token, if one came; logprobs are the model's own, one an id, in nats."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"  # or "stop": an end token, or a stop string (not part of text)
    passes: int = 0  # of speculative decoding: how often the network was asked for it,
    drafted: int = 0  # the tokens that were proposed to it
    accepted: int = 0  # and those of them that it accepted


class TextStream:
    """Bytes in, text out: never half a character, nothing that may become a stop string."""

    def __init__(self, stop=()):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop = stop
        self.text = ""  # all of it, up to a stop string
        self.sent = 0  # so many of its characters were returned
        self.stopped = False

    def feed(self, data, final=False):
        """The text that `data` makes certain."""
        self.text += self.decoder.decode(data, final)
        places = [self.text.find(stop, self.sent) for stop in self.stop]
        places = [place for place in places if place >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.stopped = True
        end = len(self.text)
        if not self.stopped and not final:
            end -= self.unsure()
        piece = self.text[self.sent : end]
        self.sent = max(end, self.sent)
        return piece

    def unsure(self):
        """How many characters at the end may be the beginning of a stop string."""
        longest = 0
        for stop in self.stop:
            for n in range(1, len(stop)):
                if self.text.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest


class Row:
    """A sequence in the making: it ends at an end token (one of `ends`, or else the tokenizer's),
    a stop string, or `limit` tokens. emit(piece) gets its text as it becomes certain. number: which
    draws are its own."""

    def __init__(self, tok, limit, stop, emit=None, ends=None, number=0):
        self.tok = tok
        self.limit = limit
        self.number = number
        self.emit = emit
        self.ends = tok.eos_ids if ends is None else ends
        self.out = Generation()
        self.stream = TextStream(stop)
        self.done = False

    def take(self, token, logprob):
        """Add a token; after the end nothing is added."""
        if self.done:
            return
        self.out.ids.append(token)
        self.out.logprobs.append(logprob)
        ended = token in self.ends
        last = ended or len(self.out.ids) == self.limit
        piece = self.stream.feed(self.tok.token_bytes(token), final=last)
        self.out.text = self.stream.text
        self.done = last or self.stream.stopped
        if ended or self.stream.stopped:
            self.out.finish_reason = "stop"
        if piece and self.emit is not None:
            self.emit(piece)


@torch.no_grad()
def generate(net, tok, prompts, *, max_new_tokens=100, temperature=1.0, top_k=0, top_p=1.0,
             min_p=0.0, repetition_penalty=1.0, seed=0, first=0, stop=(), num_beams=1,
             speculate=0, draft=None, on_text=None):  # fmt: skip
    """Continue each prompt (a text, or token ids); returns [Generation], one a prompt.

    temperature 0 is greedy. A row ends at one of tok.eos_ids, at a stop string, after
    max_new_tokens, or when prompt and answer fill the context. Row i draws from (seed, first + i)
    alone: prompts may come in batches of any size.
    on_text(i, piece) gets the text as it is made. A beam search neither draws nor filters.
    speculate: so many tokens are drafted for each pass (barelm/speculate.py), by `draft`: a smaller
    network, "heads" (the network's own: mtp) or "lookup"; None: by its heads, or else by lookup."""
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    options = dict(repetition_penalty=repetition_penalty, num_beams=num_beams, speculate=speculate)
    check_sampling(**filters, **options)
    if speculate:
        check_speculation(net, tok.n_vocab, speculate, draft, num_beams)
    stop = [stop] if isinstance(stop, str) else [text for text in stop if text]
    prompts = [tok.prompt(p) if isinstance(p, str) else list(p) for p in prompts]
    n_ctx = net.config.n_ctx
    rows = []
    for i, prompt in enumerate(prompts):
        n = len(prompt)
        if not 0 < n < n_ctx:
            raise UserError(f"a prompt of {n} tokens: expected 1 to {n_ctx - 1}, the context")
        emit = None if on_text is None else partial(on_text, i)
        rows.append(Row(tok, min(max_new_tokens, n_ctx - n), stop, emit, number=first + i))
    if not rows or max_new_tokens < 1:
        return [row.out for row in rows]
    with generating(net):
        if num_beams > 1:
            for prompt, row in zip(prompts, rows):
                best = beam_search(net, tok, prompt, row.limit, num_beams)
                for token, logprob in zip(best.ids, best.logprobs):
                    row.take(token, logprob)
        elif speculate:
            options = (seed, repetition_penalty, filters, speculate, draft)
            speculate_rows(net, tok, prompts, rows, *options)
        elif net.fast:
            decode_rows(net, tok, prompts, rows, seed, repetition_penalty, filters)
        else:
            sample_rows(net, tok, prompts, rows, seed, repetition_penalty, filters)
    return [row.out for row in rows]


def sample_rows(net, tok, prompts, rows, seed, penalty, filters):
    """Feed `rows` until all are done. On a GPU the host reads the tokens of step t - 1 while the
    device computes step t, so that neither waits for the other."""
    limit = max(row.limit for row in rows)
    longest = max(len(prompt) + row.limit for prompt, row in zip(prompts, rows))
    logits, cache = prefill(net, tok, prompts, longest)  # (B, V)
    device = logits.device
    uniform = torch.stack([draws(seed, row.number, limit) for row in rows]).to(device)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        seen[i, torch.tensor(prompt, device=device)] = True
    pending = []  # functions that wait for a step's tokens
    for t in range(limit):
        likely = logits if penalty == 1 else penalize(logits, seen, penalty)
        tokens = choose_tokens(likely, uniform[:, t], **filters)  # (B,)
        seen.scatter_(1, tokens[:, None], True)
        logp = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]  # (B,)
        pending.append(to_host(tokens, logp))
        one_behind = device.type == "cuda" and t + 1 < limit
        while len(pending) > int(one_behind):
            wait = pending.pop(0)
            for row, token, logprob in zip(rows, *wait()):
                row.take(token, logprob)
        if all(row.done for row in rows):
            return
        logits = feed(net, tok, cache, tokens[:, None])


def to_host(*tensors):
    """Start copying tensors to the host; returns a function that waits for them: their lists."""
    copies = [t.to("cpu", non_blocking=True) for t in tensors]  # from a GPU: to pinned memory
    copied = None
    if tensors[0].device.type == "cuda":
        copied = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait():
        if copied is not None:
            copied.synchronize()
        return [t.tolist() for t in copies]

    return wait


def feed(net, tok, cache, ids, n_new=None):
    """The logits (B, V) float32 of what follows ids (B, T), -inf for padding of the vocabulary."""
    h = net.hidden(ids, cache=cache, n_new=n_new)  # (B, T, C)
    if n_new is None:
        h = h[:, -1]
    else:
        h = h[torch.arange(len(h), device=h.device), n_new - 1]
    return head(net, tok, h)


def head(net, tok, h):
    """The logits (…, V) float32 of hidden states, -inf for padding of the vocabulary."""
    logits = net.logits(h).float()
    logits[..., tok.n_vocab :] = -math.inf
    return logits


def prefill(net, tok, prompts, max_len):
    """Feed the prompts, lists of ids, to a new cache: the logits (B, V) after each, the cache."""
    cache = net.make_cache(len(prompts), max_len)
    device = cache.lengths.device
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T), padded at the right
    lengths = [len(prompt) for prompt in prompts]
    n_new = None  # equal lengths keep the cache even
    if len(set(lengths)) > 1:
        n_new = torch.tensor(lengths, device=device)
    return feed(net, tok, cache, ids, n_new), cache


@dataclass
class Beam:
    """A continuation that a beam search looks at."""

    row: int  # of the cache: the beam that it continues
    ids: list[int]
    logprobs: list[float]

    def score(self):
        return sum(self.logprobs) / len(self.logprobs)


def beam_search(net, tok, prompt, limit, num_beams):
    """The Beam with the best mean log p per token that a search of this width finds in `limit`
    tokens, or until num_beams continuations have ended: transformers' search with early_stopping
    and a length_penalty of 1."""
    logits, cache = prefill(net, tok, [prompt], len(prompt) + limit)
    beams = [Beam(0, [], [])]
    ended = []
    # So many candidates that, whichever of them end, num_beams are left to go on with.
    width = num_beams * max(2, 1 + len(set(tok.eos_ids)))
    for t in range(limit):
        logp = logits.log_softmax(-1)  # (beams, V)
        sums = [[sum(beam.logprobs)] for beam in beams]
        totals = logp + torch.tensor(sums, device=logits.device)
        candidates = totals.flatten().topk(min(width, totals.numel())).indices.tolist()
        grown = []
        for rank, candidate in enumerate(candidates):
            row, token = divmod(candidate, totals.shape[1])
            logprob = logp[row, token].item()
            if not math.isfinite(logprob):  # padding of the vocabulary
                continue
            beam = Beam(row, beams[row].ids + [token], beams[row].logprobs + [logprob])
            last = token in tok.eos_ids or t + 1 == limit
            if last and rank < num_beams:  # an end that ranks lower is not one of the search's
                ended.append(beam)
            elif not last and len(grown) < num_beams:
                grown.append(beam)
        beams = grown
        if len(ended) >= num_beams or not beams:
            break
        cache.reorder(torch.tensor([beam.row for beam in beams], device=logits.device))
        tokens = torch.tensor([beam.ids[-1] for beam in beams], device=logits.device)
        logits = feed(net, tok, cache, tokens[:, None])
    if not ended:
        raise UserError("no beam search: the model's probabilities are not numbers")
    return max(ended, key=Beam.score)
