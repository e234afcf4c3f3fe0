"""The network as mathematics, then its cache of keys and values, and how text is generated.

    net = GPT(GPTConfig(vocab_size=4096, n_ctx=256, n_layer=4, n_head=3, n_embd=192))
    logits = net(ids)  # ids (B, T) int64; logits (B, T, V)
    loss_sum, n_targets = net(ids, targets)
    [answer] = generate(net, tokenizer, ["Once upon a time"], max_new_tokens=50)

B rows of T tokens, C: n_embd, H: heads of queries, G: of keys and values, D: head_dim, S: tokens
to look at, V: vocab_size. The formulas of attention, norm and activation are in
barelm/operations.py, where what is only there for speed is chosen; GPT(config, fast=False) does
without. Who sees whom: barelm/patterns.py; where tokens stand: barelm/positions.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from barelm import invariant
from barelm.fast import (
    SparseMask,
    generating,
)
from barelm.generation import check_generates, decode_rows
from barelm.layouts import layout_for
from barelm.operations import GATED, Operations, activation, attention_probabilities
from barelm.patterns import Pattern, with_bias
from barelm.positions import (
    alibi,
    alibi_slopes,
    document_positions,
    relative,
    rope_angles,
    sinusoids,
)
from barelm.run import UserError, compute_dtype
from barelm.sampling import check_sampling, choose_tokens, draws, penalize
from barelm.shapes import check_fields, check_shape
from barelm.speculate import check_speculation, speculate_rows
from barelm.texts import Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from barelm.caches import SlotCache
    from barelm.context_parallel import SharedWindow
    from barelm.texts import Generation
    from barelm.tokenizer import Tokenizer


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
    norm_bias: bool = False  # LayerNorm has one even where linear layers have none
    qk_norm: bool = True  # RMSNorm on each head's query and key, before the rotation
    qk_norm_all: bool = False  # on all heads at once
    qkv_bias: bool = False
    bias: bool = False  # biases in every linear layer but the head, and in LayerNorm
    mlp: Literal["swiglu", "geglu", "geglu_erf", "gelu", "gelu_erf", "relu", "relu2"] = "swiglu"
    tie: bool = True  # the head's weights are the embedding's
    dropout: float = 0.0
    init: Literal["scaled", "xavier", "he"] = "scaled"

    # Who reads what: a decoder as it stands here; an encoder; a decoder beside an encoder
    causal: bool = True  # false: an encoder, in which every token sees all
    n_encoder_layer: int = 0  # above 0: so many blocks read a source, which the decoder looks at
    mlm_head: bool = False  # a dense layer and a norm before the head, as BERT has

    # Positions
    pos: Literal["rope", "relative", "alibi", "learned", "sinusoidal", "none"] = "rope"
    rope_theta: float = 10000.0
    local_rope_theta: float = 0.0  # of the layers with a window; 0: rope_theta
    rope_fraction: float = 1.0  # of a head, its first dimensions, that are turned
    rope_scaling: dict | None = None  # Hugging Face's dict: rope_type linear, llama3, yarn; or ntk
    n_buckets: int = 32  # of relative positions (T5)
    max_distance: int = 128  # the buckets grow up to it
    position_offset: int = 0  # rows of the learned positions before the first (RoBERTa)

    # Who sees whom, and what is done to the scores
    window: int = 0  # tokens that a token sees, itself counted; 0: all
    attention: Literal["sliding", "local", "strided", "fixed"] = "sliding"  # which tokens
    layers: str | list = ""  # S with the window, L without, which repeat: SSSL; none: all S
    sink_tokens: int = 0  # first tokens that are seen in spite of a window
    sinks: bool = False  # each head has a score that takes its share and gives nothing
    softcap: float = 0.0  # scores end there, by tanh (Gemma Team 2024, 2); 0: they do not
    logit_softcap: float = 0.0  # the same of the logits
    scale_scores: bool = True  # by 1 / sqrt(D)

    # The embedding and the head
    embed_scale: bool = False  # the embedding times sqrt(C) (Vaswani et al. 2017, 3.4)
    embed_norm: bool = False  # a norm behind it
    n_types: int = 0  # of tokens, in BERT: all are of the first
    first_norm: bool = True  # false: none before the first block's attention
    logit_scale: float = 1.0  # what the head reads is multiplied by it

    # Experts
    n_experts: int = 0  # 0: an MLP a block
    n_experts_per_token: int = 2
    n_shared_experts: int = 0  # that every token goes to
    expert_hidden: int = 0  # their width; 0: n_hidden
    expert_layers: str = ""  # D with an MLP, E with experts, which repeat; none: all E
    norm_topk: bool = True  # the weights of a token's experts add up to 1
    balance: Literal["loss", "bias", "none"] = "loss"  # what keeps experts equally loaded
    balance_weight: float = 0.01
    z_weight: float = 0.001  # of the router's z-loss

    # More tokens ahead
    mtp: int = 0  # so many beside the next one are predicted in training
    mtp_weight: float = 0.3

    def __post_init__(self):
        check_fields(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_hidden == 0 and self.n_encoder_layer == 0 and "D" not in self.expert_layers:
            self.n_hidden = self.expert_hidden  # where no block has another MLP
        if self.n_hidden == 0 and self.mlp in GATED:
            self.n_hidden = -(-self.n_embd * 8 // (3 * 64)) * 64  # it has a third matrix
        elif self.n_hidden == 0:
            self.n_hidden = 4 * self.n_embd
        if self.n_experts and self.expert_hidden == 0:
            self.expert_hidden = self.n_hidden
        check_shape(self)

    @property
    def patterns(self) -> list[Pattern]:
        """What each block's tokens see: [Pattern]."""
        return self.patterns_of(self.n_layer, self.causal)

    @property
    def encoder_patterns(self) -> list[Pattern]:
        return self.patterns_of(self.n_encoder_layer, causal=False)

    def patterns_of(self, n_layer: int, causal: bool) -> list[Pattern]:
        letters = self.layers or ("S" if self.window else "L")
        windowed = Pattern(causal, self.attention, self.window, self.sink_tokens)
        kinds = {"S": windowed, "L": Pattern(causal)}
        return [kinds[letters[i % len(letters)]] for i in range(n_layer)]

    @property
    def has_experts(self) -> list[bool]:
        """Which blocks have experts: [bool]."""
        letters = self.expert_layers or "E"
        n = self.n_layer
        return [self.n_experts > 0 and letters[i % len(letters)] == "E" for i in range(n)]

    @property
    def is_seq2seq(self) -> bool:
        return self.n_encoder_layer > 0

    @property
    def is_plain(self) -> bool:
        """Whether attention is softmax(q k^T / sqrt(D)) v of all that came before."""
        biased = self.pos in ("relative", "alibi") or self.softcap or self.sinks
        unusual = self.window or biased or self.is_seq2seq or not self.scale_scores
        return self.causal and not unusual


class GPT(nn.Module):
    """A transformer: a decoder, an encoder, or a decoder beside an encoder. Its state_dict is, name
    by name, the Hugging Face file's.

    fast=False computes everything as it stands in this file, to compare with."""

    def __init__(self, config: GPTConfig, fast: bool = True) -> None:
        super().__init__()
        c = config
        self.config = config
        self.ops = Operations(fast)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        if c.pos == "learned":
            self.model.embed_positions = nn.Embedding(c.position_offset + c.n_ctx, c.n_embd)
        if c.n_types:
            self.model.embed_types = nn.Embedding(c.n_types, c.n_embd)
        if c.embed_norm:
            self.model.embed_norm = make_norm(c, self.ops)
        self.model.layers = make_blocks(c, self.ops, c.patterns)
        # With norms after the sums the last block's output is normed already.
        post = c.norm_place == "post"
        self.model.norm = nn.Identity() if post else make_norm(c, self.ops)
        if c.is_seq2seq:
            self.model.encoder = nn.Module()
            self.model.encoder.layers = make_blocks(c, self.ops, c.encoder_patterns, True)
            self.model.encoder.norm = nn.Identity() if post else make_norm(c, self.ops)
        if c.pos == "relative":
            self.model.relative_bias = nn.Embedding(c.n_buckets, c.n_head)
        if c.pos == "relative" and c.is_seq2seq:
            self.model.encoder.relative_bias = nn.Embedding(c.n_buckets, c.n_head)
        if c.mtp:
            self.model.mtp = nn.Module()
            self.model.mtp.layers = nn.ModuleList(Ahead(c, self.ops) for _ in range(c.mtp))
        if c.mtp and c.pos == "relative":
            self.model.mtp.relative_bias = nn.Embedding(c.n_buckets, c.n_head)
        if c.mlm_head:
            self.head_dense = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
            self.head_norm = make_norm(c, self.ops)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=c.mlm_head)
        if c.tie:
            self.lm_head.weight = self.model.embed_tokens.weight
        # A tied matrix is drawn under both its names: drawn once, each seed would mean others.
        for name, p in self.named_parameters(remove_duplicate=False):
            self.init_weight(name, p)
        self.routing: torch.Tensor | None = None  # of the last `hidden`: see barelm/experts.py
        self.mtp_loss: torch.Tensor | None = None  # of the last `forward`: a sum, as the loss is

        # How it is trained: all of these may be set by whoever trains it.
        self.checkpoint: int = 0  # blocks that are computed again in backward; True: all
        self.train_block: Callable = call_block  # or torch.compile(call_block); not with a cache
        self.eval_block: Callable = call_block  # the same of eval mode
        self.tokens = None  # of processes that share windows: see barelm/context_parallel.py
        # What may be added to it: a classifier's head (`set_score`), adapters, quantized weights.
        self.score: nn.Linear | None = None  # (n_labels, C)
        self.score_dense: nn.Linear | None = None  # (C, C), before it, and its norm
        self.score_norm: nn.Module | None = None
        self.labels: list[str] | None = None  # of the rows of score
        self.task: str = "classify"  # what score is for: texts; or "tag": tokens, "span": answers
        self.pooling: str = "last"  # what score reads of a text: its last state, first, or "mean"
        self.pooler: str = ""  # what stands before score: "tanh" or "gelu_norm"
        self.pad_id: int | None = None  # the token that is no text's last one
        self.start_id: int | None = None  # with which an encoder-decoder's targets begin
        self.adapter_size: int = 0  # width of the bottlenecks of barelm.adapters.add_adapters
        self.quantize: str | None = None  # int8 or int4, by barelm.quantized
        self.int4_group: int = 0  # weights of a row that share their levels

    def init_weight(self, name: str, p: Tensor) -> None:
        """Draw a parameter's first values; norms keep their ones."""
        c = self.config
        if p.ndim == 3:  # a stack of matrices, experts': each is drawn for itself
            for matrix in p.detach():
                self.init_weight(f"{name}.weight", matrix)
            return
        if name.endswith(".bias"):
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
    def fast(self) -> bool:
        """Whether barelm/fast.py is used where it can be; may be set at any time."""
        return self.ops.fast

    @fast.setter
    def fast(self, value: bool) -> None:
        self.ops.fast = value

    @property
    def deterministic(self) -> bool:
        """Whether barelm/invariant.py computes, instead of both; see its `be_deterministic`."""
        return self.ops.deterministic

    @deterministic.setter
    def deterministic(self, value: bool) -> None:
        self.ops.deterministic = value
        self.ops.fast = self.ops.fast and not value

    @property
    def checkpoint(self) -> int:
        """How many blocks are computed again in backward: less memory, more time."""
        return sum(block.recompute for block in self.blocks())

    @checkpoint.setter
    def checkpoint(self, n: int | bool) -> None:
        # The first ones: when backward comes to them, what the others have kept is free again.
        for i, block in enumerate(self.blocks()):
            block.recompute = n is True or i < n

    def blocks(self) -> list[Block | Ahead]:
        """All blocks, in the order in which they compute."""
        blocks = []
        if self.config.is_seq2seq:
            blocks += self.model.encoder.layers
        blocks += self.model.layers
        if self.config.mtp and self.model.mtp is not None:  # the last pipeline stage has it
            blocks += self.model.mtp.layers
        return blocks

    @property
    def block(self) -> Callable:
        """What computes a block where there is no cache, in the mode that the network is in."""
        return self.train_block if self.training else self.eval_block

    def hidden(self, ids: Tensor | None, *, cache: KVCache | SlotCache | None = None,
               n_new: Tensor | None = None, docs: Tensor | None = None,
               embeds: Tensor | None = None, lengths: Tensor | None = None,
               encoder_ids: Tensor | None = None, encoder_lengths: Tensor | None = None,
               memory: Memory | None = None,
               window: SharedWindow | None = None) -> Tensor:  # fmt: skip
        """The final hidden states (B, T, C), normalized, of ids (B, T) int64 or embeds (B, T, C).

        With a cache, row b's first n_new[b] tokens (all T where n_new is None) continue that row.
        docs (B, T) int64: a token attends to its own document, where positions start anew. lengths
        (B,): an encoder's rows have so many tokens, and padding behind them. An encoder-decoder has
        its source as encoder_ids (B, S), or what `encode` made of them, or in the cache. window: of
        ids that are some of a window's tokens, all of it."""
        c = self.config
        if encoder_ids is not None:
            memory = self.encode(encoder_ids, encoder_lengths)
        if c.is_seq2seq and memory is None and cache is None:
            raise ValueError("an encoder-decoder reads a source: encoder_ids")
        x = self.model.embed_tokens(ids) if embeds is None else embeds  # (B, T, C)
        if lengths is not None:
            docs = padding_apart(x.shape[1], lengths, docs)
        length = x.shape[1]
        is_spread = self.deterministic and cache is None and docs is not None
        if is_spread:
            x, docs, places = invariant.spread(x, docs)
        T = x.shape[1]
        if cache is not None:
            positions = cache.extend(T, n_new)
        elif window is not None:
            positions = window.own_positions
        elif c.pos == "learned" and length > c.n_ctx:
            raise ValueError(f"{length} tokens, but the model has {c.n_ctx} learned positions")
        else:
            positions = torch.arange(T, device=x.device)[None]  # (1, T)
        if docs is not None:
            positions = document_positions(positions, docs)
        x = self.embed(x, positions)
        looks = self.looks(self.model, x, positions, docs, cache, window)
        x = self.run_blocks(self.model.layers, x, looks, cache, memory)
        if is_spread:
            x = x[torch.arange(len(x), device=x.device)[:, None], places]  # (B, length, C)
        return self.model.norm(x)

    def encode(self, ids: Tensor, lengths: Tensor | None = None) -> Memory:
        """Read a source, ids (B, S) int64, of which row b's first lengths[b] are real (None: all up
        to the last that is not pad_id): the Memory that `hidden` takes."""
        part = self.model.encoder
        S = ids.shape[1]
        if lengths is None and self.pad_id is not None:
            numbers = torch.arange(1, S + 1, device=ids.device)
            lengths = ((ids != self.pad_id) * numbers).amax(1).clamp(min=1)  # (B,)
        docs = mask = None
        if lengths is not None:
            docs = padding_apart(S, lengths)  # (B, S)
            mask = (docs >= 0)[:, None, None]  # (B, 1, 1, S)
        positions = torch.arange(S, device=ids.device)[None]
        x = self.embed(self.model.embed_tokens(ids), positions)
        x = self.run_blocks(part.layers, x, self.looks(part, x, positions, docs))
        return Memory(part.norm(x), mask)

    def cross_kv(self, memory: Memory) -> list[tuple[Tensor, Tensor]]:
        """The keys and values (B, G, S, D) that each block makes of a source: [(k, v)]."""
        return [block.cross_attn.source(memory.h) for block in self.model.layers]

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads, of the tokens' embeddings x (B, T, C)."""
        c = self.config
        if c.embed_scale:
            x = x * math.sqrt(c.n_embd)
        if c.n_types:
            x = x + self.model.embed_types.weight[0]
        if c.pos == "learned":
            # A cache's padding may lie behind the last position; nothing reads it.
            places = positions.clamp(max=c.n_ctx - 1) + c.position_offset
            x = x + self.model.embed_positions(places)
        elif c.pos == "sinusoidal":
            x = x + sinusoids(positions, c.n_embd).to(x.dtype)
        if c.embed_norm:
            x = self.model.embed_norm(x)
        return F.dropout(x, c.dropout, self.training)

    def looks(self, part: nn.Module, x: Tensor, positions: Tensor, docs: Tensor | None = None,
              cache: KVCache | SlotCache | None = None,
              window: SharedWindow | None = None) -> dict[Pattern, tuple]:  # fmt: skip
        """{Pattern: (the angles to turn by, the mask)} for the blocks of a part, the decoder or the
        encoder, whose tokens are at positions (B or 1, T), or are some of a window's."""
        c = self.config
        is_biased = c.pos in ("alibi", "relative")  # a mask of numbers, then
        is_changed = is_biased or c.softcap > 0 or c.sinks
        alone = True
        key_positions = None
        looks = {}
        ropes = {}
        for block in part.layers:
            pattern = block.pattern
            if pattern in looks:
                continue
            if cache is not None and docs is None:  # documents in a cache are whole, and all new
                key_positions, alone = cache.keys(pattern)
            theta = c.local_rope_theta if pattern.kind != "full" else 0.0
            if c.pos == "rope" and theta not in ropes:
                ropes[theta] = rope_angles(c, positions, compute_dtype(x), theta)
            in_order = alone and not is_biased
            if window is None:
                mask = self.ops.mask(pattern, positions, docs, in_order, is_changed, key_positions)
            else:
                key_positions = window.positions
                mask = window.mask(pattern, in_order)
            if is_biased:
                keys = positions if key_positions is None else key_positions
                mask = self.biased(mask, part, positions, keys, pattern.causal)
            if window is not None:
                mask = window.shared(mask)
            looks[pattern] = (ropes.get(theta), mask)
        return looks

    def biased(self, mask: Tensor | SparseMask | None, part: nn.Module, positions: Tensor,
               key_positions: Tensor, causal: bool) -> Tensor | SparseMask:  # fmt: skip
        """A mask with what is added to the scores, `score_bias`."""
        c = self.config
        if not isinstance(mask, SparseMask):
            return with_bias(mask, self.score_bias(part, positions, key_positions, causal))
        if c.pos == "alibi":
            slopes = alibi_slopes(c.n_head, positions.device)
            return mask._replace(slopes=self.ops.of_heads(slopes))
        buckets = (c.n_buckets, c.max_distance, causal)
        table = self.ops.of_heads(part.relative_bias.weight, 1)
        return mask._replace(table=table, buckets=buckets)

    def score_bias(
        self, part: nn.Module, positions: Tensor, key_positions: Tensor, causal: bool
    ) -> Tensor | None:
        """What is added to the scores of queries at positions (B or 1, T) and keys at key_positions
        (B or 1, S): (B or 1, H, T, S) float32, or None."""
        c = self.config
        if c.pos == "alibi":
            slopes = self.ops.of_heads(alibi_slopes(c.n_head, positions.device))
            return alibi(positions, key_positions, slopes)
        if c.pos == "relative":
            table = self.ops.of_heads(part.relative_bias.weight, 1)
            return relative(positions, key_positions, table, c, causal)
        return None

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, looks: dict,
                   cache: KVCache | SlotCache | None = None,
                   memory: Memory | None = None) -> Tensor:  # fmt: skip
        """x (B, T, C) through the blocks."""
        source = () if memory is None else (memory.h, memory.mask)
        routing = []
        for i, block in enumerate(blocks):
            rope, mask = looks[block.pattern]
            if cache is not None and self.config.is_seq2seq and memory is None:
                cross = partial(cache.cross, i)
                write = partial(cache.write, i)
                x = block(x, rope, mask, write, None, cache.cross_mask, cross)
            elif cache is not None:
                x = block(x, rope, mask, partial(cache.write, i), *source)
            elif self.training and block.recompute:
                x = checkpoint(self.block, block, x, rope, mask, *source, use_reentrant=False)
            else:
                x = self.block(block, x, rope, mask, *source)
            if block.has_experts:
                x, figures = x
                routing.append(figures)
        if routing:
            self.routing = torch.stack(routing)  # (blocks with experts, E + 3)
        return x

    def logits(self, h: Tensor) -> Tensor:
        """The logits (…, V) of hidden states (…, C)."""
        logits = self.ops.project(self.head_input(h), self.lm_head)
        softcap = self.config.logit_softcap
        if softcap:
            logits = softcap * (logits.float() / softcap).tanh()
        return logits

    def head_input(self, h: Tensor) -> Tensor:
        """What the head's matrix multiplies."""
        if self.config.mlm_head:
            h = self.head_norm(self.ops.gelu(self.ops.project(h, self.head_dense), "none"))
        if self.config.logit_scale != 1:
            h = h * self.config.logit_scale
        return h

    def forward(self, ids: Tensor, targets: Tensor | None = None, places: Tensor | None = None,
                **options: Any) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """logits (B, T, V); or with targets (B, T) int64, -100 meaning none, (the sum of -log p in
        nats, float32; their count). places (B, n): where in a row the targets (B, n) are, so that
        logits are made there alone. `options` are those of `hidden`. Pre-training and SFT come by
        here, and get what is added to the loss; other methods take `hidden` and `logits`."""
        if self.tokens is not None and targets is not None:
            ids, targets, options = self.tokens.cut(ids, targets, options)
        h = self.hidden(ids, **options)
        if targets is None:
            return self.logits(h)
        if places is not None:
            h = at_places(h, places)  # (B, n, C)
        # A sum, and a count beside it: those of micro-batches and processes then add up exactly.
        loss = self.loss_of(h, targets)
        n_targets = (targets != -100).sum()
        if self.training and self.config.n_experts:
            loss = loss + n_targets * self.routing_loss()
        if self.training and self.config.mtp:
            ahead = self.ahead_loss(h, ids, targets, options.get("docs"))
            self.mtp_loss = ahead.detach()
            # The gradient is that of both; the value stays the next tokens', as in validation.
            loss = loss + self.config.mtp_weight * (ahead - self.mtp_loss)
        return loss, n_targets

    def loss_of(self, h: Tensor, targets: Tensor) -> Tensor:
        """The sum of -log p of targets (B, T), by the states h (B, T, C) before each."""
        h = h.flatten(0, 1)  # (B T, C)
        head = None if self.config.logit_softcap else self.lm_head
        return self.ops.cross_entropy(h, head, targets.flatten(), self.logits, self.head_input)

    def routing_loss(self) -> Tensor:
        """What the routers add to the mean loss: means over the blocks with experts."""
        c = self.config
        balance, z, _ = self.routing[:, c.n_experts :].mean(0)
        weight = c.balance_weight if c.balance == "loss" else 0.0
        return weight * balance + c.z_weight * z

    def ahead(self, k: int, h: Tensor, ids: Tensor, looks: dict,
              cache: KVCache | SlotCache | None = None) -> Tensor:  # fmt: skip
        """The states (B, T, C) by which depth k of multi-token prediction, 0 and up, predicts the
        token k + 2 places on: from those of the depth before, h (B, T, C), `hidden`'s for the
        first, and the tokens k + 1 places on, ids (B, T)."""
        block = self.model.mtp.layers[k]
        x = block.join(h, self.model.embed_tokens(ids))
        if cache is None:
            x = self.run_blocks([block], x, looks)
        else:
            x = block(x, *looks[block.pattern], partial(cache.write, k))
        return block.norm(x)

    def ahead_loss(
        self, h: Tensor, ids: Tensor, targets: Tensor, docs: Tensor | None = None
    ) -> Tensor:
        """The sum of -log p of the tokens further ahead than targets (B, T), a mean over depths;
        h (B, T, C) are the states of ids. What is behind the end of its document does not count."""
        T = ids.shape[1]
        positions = torch.arange(T, device=ids.device)[None]
        if docs is not None:
            positions = document_positions(positions, docs)
        looks = self.looks(self.model.mtp, h, positions, docs)
        loss = 0.0
        for k in range(min(self.config.mtp, T - 1)):
            n = k + 1
            # What comes around from the beginning stands at the end, where no target is.
            h = self.ahead(k, h, ids.roll(-n, 1), looks)
            wanted = F.pad(targets[:, n:], (0, n), value=-100)
            if docs is not None:
                wanted = wanted.masked_fill(docs.roll(-n, 1) != docs, -100)
            loss = loss + self.loss_of(h, wanted)
        return loss / self.config.mtp

    def make_cache(
        self, batch: int, max_len: int, config: GPTConfig | None = None, slack: int = 0
    ) -> KVCache:
        """An empty KVCache for generation, of `batch` rows of at most max_len tokens."""
        table = self.model.embed_tokens.weight
        # A CPU attends to float32 faster than to less: it has to convert the rest.
        dtype = torch.float32 if table.device.type == "cpu" else compute_dtype(table)
        whole = self.deterministic  # keys in the order that they have without a cache
        config = self.ops.own_heads(config or self.config)
        return KVCache(config, batch, max_len, table.device, dtype, slack, whole)

    def set_score(self, labels: list[str], pooling: str = "last", pad_id: int | None = None, *,
                  task: str = "classify", pooler: str = "",
                  bias: bool | None = None) -> None:  # fmt: skip
        """Give the network a head of so many scores: of a text (a classifier's, or a reward model's
        with its one label), of each token (task "tag"), or of each token as the start and the end
        of an answer ("span"). pooler: a layer before it, as encoders have one (`score_states`).
        bias: of the scores; None: as transformers' classes have it. pad_id: a token that is no
        text's last one."""
        c = self.config
        device = self.model.embed_tokens.weight.device
        if bias is None:
            bias = task != "classify" or not c.causal
        self.score_dense = None
        self.score_norm = None
        if pooler:
            has_norm = pooler == "gelu_norm"
            self.score_dense = nn.Linear(c.n_embd, c.n_embd, bias=not has_norm, device=device)
            nn.init.normal_(self.score_dense.weight, std=0.02)
            if has_norm:
                self.score_norm = make_norm(c, self.ops).to(device)
            else:
                nn.init.zeros_(self.score_dense.bias)
        self.score = nn.Linear(c.n_embd, len(labels), bias=bias, device=device)
        nn.init.normal_(self.score.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.score.bias)
        self.labels = labels
        self.pooling = pooling
        self.pooler = pooler
        self.pad_id = pad_id
        self.task = task

    def scores(self, texts: list[list[int]]) -> Tensor:
        """(B, labels) float32 of texts, lists of ids: by the state of the last token that is no
        padding, as transformers finds it (the first where all are), the first one's, or the
        mean's."""
        device = self.score.weight.device
        texts = [self.without_padding(ids) for ids in texts]
        lengths = torch.tensor([len(ids) for ids in texts], device=device)  # (B,)
        rows = [torch.tensor(ids) for ids in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
        return self.scores_of(ids.to(device), lengths)

    def scores_of(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`scores` of the first lengths (B,) tokens of each row of ids (B, T)."""
        h = self.states(ids, lengths)  # (B, T, C)
        return self.score_states(pooled(h, lengths, self.pooling))

    def score_states(self, h: Tensor) -> Tensor:
        """The scores (…, labels) float32 of states h (…, C), of tokens or of whole texts."""
        if self.pooler == "tanh":  # BERT's
            h = self.score_dense(h).tanh()
        elif self.pooler == "gelu_norm":  # ModernBERT's
            h = self.score_norm(F.gelu(self.score_dense(h)))
        return self.score(h).float()

    def states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The hidden states (B, T, C) of texts, the first lengths (B,) tokens of each row of ids
        (B, T); what stands behind them is seen by none of them. Of an encoder-decoder, its
        encoder's."""
        if self.config.is_seq2seq:
            return self.encode(ids, lengths).h
        if self.config.causal:  # then nobody looks at the padding anyway
            return self.hidden(ids)
        return self.hidden(ids, lengths=lengths)

    def without_padding(self, ids: list[int]) -> list[int]:
        """The ids up to the last one that is no padding, and one at least."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self.pad_id:
            end -= 1
        return ids[:end]


# --------------------------------------------------------------------------------------------------
# Its parts


class RMSNorm(nn.RMSNorm):
    def __init__(self, size: int, eps: float, ops: Operations) -> None:
        super().__init__(size, eps)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


def make_norm(c: GPTConfig, ops: Operations) -> nn.Module:
    """The norm of a block's input or output."""
    if c.norm == "rms":
        return RMSNorm(c.n_embd, c.norm_eps, ops)
    return nn.LayerNorm(c.n_embd, c.norm_eps, bias=c.bias or c.norm_bias)


class Attention(nn.Module):
    """Grouped-query attention: H heads of queries, G of keys and values. is_cross: to a source."""

    def __init__(
        self, c: GPTConfig, ops: Operations, pattern: Pattern, is_cross: bool = False
    ) -> None:
        super().__init__()
        self.c = c
        self.ops = ops
        qkv_bias = c.bias or c.qkv_bias
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        if c.qk_norm:
            heads = (c.n_head, c.n_kv_head) if c.qk_norm_all else (1, 1)
            self.q_norm = RMSNorm(heads[0] * c.head_dim, c.norm_eps, ops)
            self.k_norm = RMSNorm(heads[1] * c.head_dim, c.norm_eps, ops)
        # What is not as usual of the scores, as `Operations.attend` takes it:
        self.options = {}
        if not pattern.causal or is_cross:
            self.options["causal"] = False
        if not c.scale_scores:
            self.options["scale"] = 1.0
        if c.softcap:
            self.options["softcap"] = c.softcap
        if pattern.reach is not None and not is_cross:
            self.options["reach"] = pattern.reach
        if c.sinks and not is_cross:
            self.sinks = nn.Parameter(torch.zeros(c.n_head))

    def scoring(self) -> dict:
        """`options`, with the parameters among them."""
        if self.c.sinks and hasattr(self, "sinks"):
            return self.options | {"sinks": self.ops.of_heads(self.sinks)}
        return self.options

    def qkv(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
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
            qk = self.normed(qk)
        if rope is not None:
            qk = self.ops.rotate(qk, rope)
        q, k = qk.transpose(1, 2).split((H, G), 1)
        return q, k, v.transpose(1, 2)

    def normed(self, qk: Tensor) -> Tensor:
        """Queries and keys (B, T, H + G, D), none of them long, so that no score runs away (Henry
        et al. 2020)."""
        c = self.c
        H = c.n_head
        G = c.n_kv_head
        if c.qk_norm_all:
            q, k = qk.split((H, G), 2)
            q = self.q_norm(q.flatten(2)).unflatten(2, (H, -1))
            k = self.k_norm(k.flatten(2)).unflatten(2, (G, -1))
            return torch.cat((q, k), 2)
        weights = (self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(G, -1))
        return self.ops.rms_norm(qk, torch.cat(weights), c.norm_eps)  # weights (H + G, D)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None,
                mask: Tensor | None = None, cache: Callable | None = None) -> Tensor:  # fmt: skip
        """What each token of x (B, T, C) gathers (B, T, C). cache(k, v) stores what is new and
        returns all keys and values that may be looked at."""
        q, k, v = self.qkv(x, rope)
        if cache is not None:
            k, v = cache(k, v)  # (B, G, S, D)
        return self.gather(q, k, v, mask)

    def gather(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) of q (B, H, T, D), k and v (B, G, S, D)."""
        dropout = self.c.dropout if self.training else 0.0
        y = self.ops.attend(q, k, v, mask, dropout, **self.scoring())  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H D)
        return self.ops.project(y, self.o_proj)

    def source(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, S, D) of a source's hidden states (B, S, C)."""
        c = self.c
        kv = self.ops.project(memory, self.k_proj, self.v_proj)
        kv = kv.unflatten(2, (2 * c.n_kv_head, c.head_dim)).transpose(1, 2)
        k, v = kv.chunk(2, 1)
        if c.qk_norm:
            k = self.one_normed(k, self.k_norm)
        return k, v

    def cross(self, x: Tensor, memory: Tensor | None, mask: Tensor | None,
              cached: Callable | None = None) -> Tensor:  # fmt: skip
        """What each token of x (B, T, C) gathers of a source's hidden states (B, S, C), or of its
        keys and values, which cached() gives."""
        c = self.c
        q = self.ops.project(x, self.q_proj).unflatten(2, (c.n_head, c.head_dim)).transpose(1, 2)
        if c.qk_norm:
            q = self.one_normed(q, self.q_norm)
        k, v = self.source(memory) if cached is None else cached()
        return self.gather(q, k, v, mask)

    def one_normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """x (B, heads, T, D) by q_norm or k_norm."""
        if not self.c.qk_norm_all:
            return norm(x)
        heads = x.shape[1]
        return norm(x.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2)

    def probabilities(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """By how much each token of x looks at each (B, H, T, T) float32, for people to look at."""
        q, k, _ = self.qkv(x, rope)
        options = dict(self.scoring())
        options.pop("reach", None)  # which the mask says too
        return attention_probabilities(q, k, mask, **options)


class MLP(nn.Module):
    """What is done with each token by itself."""

    def __init__(self, c: GPTConfig, ops: Operations, n_hidden: int = 0) -> None:
        super().__init__()
        self.kind = c.mlp
        self.ops = ops
        n_hidden = n_hidden or c.n_hidden
        if c.mlp in GATED:
            self.gate_proj = nn.Linear(c.n_embd, n_hidden, bias=c.bias)
        self.up_proj = nn.Linear(c.n_embd, n_hidden, bias=c.bias)
        self.down_proj = nn.Linear(n_hidden, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in GATED:
            gate_up = self.ops.project(x, self.gate_proj, self.up_proj)
            h = self.gated(gate_up)  # (B, T, n_hidden)
        else:
            h = activation(self.kind, self.ops.project(x, self.up_proj), self.ops)
        return self.ops.project(h, self.down_proj)

    def gated(self, gate_up: Tensor) -> Tensor:
        """act(gate) * up (Shazeer 2020), of both side by side (…, 2 n_hidden)."""
        if self.kind == "swiglu":
            return self.ops.swiglu(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return activation(self.kind, gate, self.ops) * up


def make_mlp(c: GPTConfig, ops: Operations, has_experts: bool) -> nn.Module:
    if not has_experts:
        return MLP(c, ops)
    from barelm.experts import make_experts  # it imports this file

    return make_experts(c, ops)


class Block(nn.Module):
    """Attention, attention to a source where there is one, then an MLP, each added to x. The norms
    have Hugging Face's names: with norm_place "post" they stand behind these, and not before."""

    def __init__(self, c: GPTConfig, ops: Operations, pattern: Pattern, is_first: bool = False,
                 has_cross: bool = False, has_experts: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.c = c
        self.pattern = pattern
        self.has_experts = has_experts
        self.recompute = False  # in backward: see GPT.checkpoint
        both = c.norm_place == "both"
        self.self_attn = Attention(c, ops, pattern)
        self.mlp = make_mlp(c, ops, has_experts)
        no_norm = is_first and not c.first_norm
        self.input_layernorm = nn.Identity() if no_norm else make_norm(c, ops)
        self.post_attention_layernorm = make_norm(c, ops)
        self.attn_out_norm = make_norm(c, ops) if both else nn.Identity()
        self.mlp_out_norm = make_norm(c, ops) if both else nn.Identity()
        if has_cross:
            self.cross_attn = Attention(c, ops, pattern, is_cross=True)
            self.cross_layernorm = make_norm(c, ops)
            self.cross_out_norm = make_norm(c, ops) if both else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None,
                mask: Tensor | None = None, cache: Callable | None = None,
                memory: Tensor | None = None, memory_mask: Tensor | None = None,
                cross: Callable | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """x (B, T, C); of a block with experts also what its router did, (E + 3,) float32. memory
        (B, S, C) and its mask, or cross(), which gives its keys and values: the source."""
        y = self.self_attn(self.before(x, self.input_layernorm), rope, mask, cache)
        x = self.after(x, y, self.input_layernorm, self.attn_out_norm)
        if memory is not None or cross is not None:
            y = self.before(x, self.cross_layernorm)
            y = self.cross_attn.cross(y, memory, memory_mask, cross)
            x = self.after(x, y, self.cross_layernorm, self.cross_out_norm)
        y = self.mlp(self.before(x, self.post_attention_layernorm))
        routing = None
        if self.has_experts:
            y, routing = y
        x = self.after(x, y, self.post_attention_layernorm, self.mlp_out_norm)
        return (x, routing) if self.has_experts else x

    def before(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a part of the block reads."""
        return x if self.c.norm_place == "post" else norm(x)

    def after(self, x: Tensor, y: Tensor, norm: nn.Module, out_norm: nn.Module) -> Tensor:
        """x and what a part made of it, y."""
        if self.c.norm_place == "post":
            return norm(x + self.dropout(y))
        return x + self.dropout(out_norm(y))

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.c.dropout, self.training)


class Ahead(Block):
    """Multi-token prediction's block (DeepSeek-AI 2024, 2.2), which looks a token further ahead
    than the one before it."""

    def __init__(self, c: GPTConfig, ops: Operations) -> None:
        super().__init__(c, ops, Pattern())
        self.ops = ops
        self.hidden_norm = make_norm(c, ops)
        self.token_norm = make_norm(c, ops)
        self.joint_proj = nn.Linear(2 * c.n_embd, c.n_embd, bias=c.bias)
        self.norm = make_norm(c, ops)

    def join(self, h: Tensor, e: Tensor) -> Tensor:
        """What the block reads (B, T, C): states h (B, T, C), and embeddings e (B, T, C)."""
        x = torch.cat((self.hidden_norm(h), self.token_norm(e)), -1)
        return self.ops.project(x, self.joint_proj)


@dataclass
class Memory:
    """A source that was read: h (B, S, C), and mask (B, 1, 1, S) bool, true where there is a token
    (None: everywhere)."""

    h: torch.Tensor
    mask: torch.Tensor | None = None


def make_blocks(
    c: GPTConfig, ops: Operations, patterns: list[Pattern], is_encoder: bool = False
) -> nn.ModuleList:
    """A block for each Pattern."""
    blocks = nn.ModuleList()
    has_cross = c.is_seq2seq and not is_encoder
    for i, pattern in enumerate(patterns):
        has_experts = c.has_experts[i] if not is_encoder else False
        blocks.append(Block(c, ops, pattern, i == 0, has_cross, has_experts))
    return blocks


def pooled(h: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """One state for each text (B, C), of the states h (B, T, C) of its first lengths (B,) tokens:
    the "first" one's, the "last" one's, or their "mean"."""
    if pooling == "first":
        return h[:, 0]
    if pooling == "last":
        return h[torch.arange(len(h), device=h.device), lengths - 1]
    real = torch.arange(h.shape[1], device=h.device) < lengths[:, None]  # (B, T)
    return (h * real[..., None]).sum(1) / lengths[:, None]


def padding_apart(T: int, lengths: Tensor, docs: Tensor | None = None) -> Tensor:
    """Documents (B, T) in which what is behind the first lengths (B,) tokens is document -1."""
    numbers = torch.arange(T, device=lengths.device)
    docs = torch.zeros_like(numbers) if docs is None else docs
    return docs.where(numbers < lengths[:, None], -1)


def call_block(block: Block, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None,
               memory: Tensor | None = None,
               memory_mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """What torch.compile is given: one compiled block then serves them all."""
    return block(x, rope, mask, None, memory, memory_mask)


def at_places(h: Tensor, places: Tensor) -> Tensor:
    """The states (B, n, C) at places (B, n) of the rows of h (B, T, C)."""
    return h.gather(1, places[..., None].expand(-1, -1, h.shape[-1]))


def logprobs(net: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """log p(targets) (B, T) float32 under net at each position of ids (B, T); 0 where -100, and
    no logits are made there."""
    wanted = targets != -100
    logits = net.logits(net.hidden(ids)[wanted]).float()  # (N, V)
    logp = -F.cross_entropy(logits, targets[wanted], reduction="none")
    return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(wanted, logp)


# --------------------------------------------------------------------------------------------------
# The cache, and generation


class KVCache:
    """Keys and values of past tokens, every row with a length of its own.

    stores: of each layer (2, batch, G, S + 1, D), with as many places S as barelm/layouts.py finds
    that its pattern needs: a ring for a window, else max_len, a token's place being its position.
    lengths (batch,) int64 on the device; who changes them makes `even` False. slack: by so many
    tokens rows may be cut (`truncate`). whole: a ring for none."""

    def __init__(self, config: GPTConfig, batch: int, max_len: int, device: str | torch.device,
                 dtype: torch.dtype, slack: int = 0, whole: bool = False) -> None:  # fmt: skip
        self.max_len = max_len
        self.patterns = config.patterns
        # What the host knows by itself, so that no step waits for the device to tell its lengths:
        self.used = 0  # no row is longer
        self.even = True  # all rows are that long, so that slices do for indices and masks
        self.layouts = {p: layout_for(p, max_len, slack, whole) for p in self.patterns}
        self.stores = []
        for pattern in self.patterns:
            # One place more than there are: where writes that belong to no token go.
            n = self.layouts[pattern].n + 1
            shape = (2, batch, config.n_kv_head, n, config.head_dim)
            self.stores.append(torch.zeros(shape, device=device, dtype=dtype))
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.reached = self.lengths  # the most that each row had before it was cut
        # Of an encoder-decoder: a source's keys and values, which no step changes.
        self.source: list | None = None  # [(k, v)] (batch, G, S, D), one a layer
        self.cross_mask: torch.Tensor | None = None  # (batch, 1, 1, S) bool

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    def extend(self, T: int, n_new: Tensor | None = None) -> Tensor:
        """Make room for T tokens a row, of which the first n_new[b] of row b are real (None: all).
        Returns the positions of the tokens (B or 1, T)."""
        device = self.lengths.device
        begin = self.used
        end = begin + T
        if begin == 0 and end > self.max_len:
            raise ValueError(f"{T} tokens do not fit a cache of {self.max_len}")
        self.used = min(end, self.max_len)
        self.fresh = begin == 0  # there is nothing to look at but the new tokens themselves
        self.before = self.lengths
        if n_new is not None or end > self.max_len:  # some rows grow by less than others
            self.even = False
        if self.even:
            self.positions = torch.arange(begin, end, device=device)[None]
            self.lengths = self.lengths + T
            slots = slice(begin, end)
        else:
            steps = torch.arange(T, device=device)
            self.positions = self.lengths[:, None] + steps  # (B, T)
            real = self.positions < self.max_len
            if n_new is not None:
                real = real & (steps < n_new[:, None])
            self.lengths = self.lengths + real.sum(1)
            # A row's padding comes after its tokens, which do not look there; where all rows are
            # new, its place is free again.
            slots = slice(0, end) if self.fresh else self.positions.where(real, self.max_len)
        self.slots = {}  # of each layout: where the new tokens go, a slice or (B, T)
        for layout in self.layouts.values():
            if layout.whole:
                self.slots[layout] = slots
            else:
                self.slots[layout] = layout.to_write(self.positions, self.lengths)
        return self.positions

    def keys(self, pattern: Pattern) -> tuple[Tensor, bool]:
        """Of what `write` returns for layers of this pattern: the positions (B or 1, S), and
        `attention_mask`'s alone."""
        layout = self.layouts[pattern]
        if self.fresh:
            return self.positions[:1], True  # the same in every row
        if layout.whole:
            T = self.positions.shape[1]
            key_positions = torch.arange(self.used, device=self.lengths.device)[None]
            return key_positions, self.even and T == 1  # nothing is behind the last token
        before = layout.positions(self.before[:1] if self.even else self.before)
        return torch.cat((before, self.positions), 1), False

    def write(self, i: int, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """Store layer i's new k and v (B, G, T, D); return all that there is to look at."""
        layout = self.layouts[self.patterns[i]]
        slots = self.slots[layout]
        seen = []
        for stored, new in zip(self.stores[i], (k, v)):
            if not (self.fresh or layout.whole):  # the new tokens take the places of old ones
                seen.append(torch.cat((stored[:, :, : layout.n], new.to(stored.dtype)), 2))
            if isinstance(slots, slice):
                stored[:, :, slots] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]  # (B, 1)
                # Two indices with a slice between them give (B, T, G, D).
                stored[rows, :, slots] = new.transpose(1, 2).to(stored.dtype)
        if self.fresh:  # as they came: not yet rounded to the cache's type
            return k, v
        if layout.whole:
            return self.stores[i][:, :, :, : self.used].unbind(0)
        return seen

    def set_source(
        self, keys_values: list[tuple[Tensor, Tensor]], mask: Tensor | None = None
    ) -> None:
        """Let each row look at a source: keys_values are `GPT.cross_kv`'s, mask is its Memory's."""
        dtype = self.stores[0].dtype
        self.source = [(k.to(dtype), v.to(dtype)) for k, v in keys_values]
        self.cross_mask = mask

    def cross(self, i: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the source for layer i."""
        return self.source[i]

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was (beam search)."""
        self.stores = [store[:, rows] for store in self.stores]
        self.lengths = self.lengths[rows]
        self.reached = self.reached[rows]
        if self.source is not None:
            self.source = [(k[rows], v[rows]) for k, v in self.source]
        if self.cross_mask is not None:
            self.cross_mask = self.cross_mask[rows]

    def truncate(self, lengths: Tensor) -> None:
        """Row b keeps its first lengths[b] tokens (a list): speculation takes back what was not
        accepted. A ring that has come round allows `slack` tokens, or all of them."""
        self.reached = self.reached.maximum(self.lengths)
        rings = [layout for layout in self.layouts.values() if not layout.whole]
        for layout in rings:
            for length, reached in zip(lengths, self.reached.tolist()):
                if not layout.can_cut(length, reached):
                    words = f"a row of {reached} tokens is not cut to {length}"
                    raise ValueError(f"{words}: its ring has a slack of {layout.slack}")
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self.reached = self.reached.masked_fill(self.lengths == 0, 0)
        self.used = max(lengths)
        self.even = len(set(lengths)) == 1


@torch.no_grad()
def generate(net: GPT, tok: Tokenizer, prompts: list, *, max_new_tokens: int = 100,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
             repetition_penalty: float = 1.0, seed: int = 0, first: int = 0,
             stop: Sequence[str] = (), num_beams: int = 1, speculate: int = 0,
             draft: GPT | str | None = None,
             on_text: Callable | None = None) -> list[Generation]:  # fmt: skip
    """Continue each prompt (a text, or token ids); returns [Generation], one a prompt. For an
    encoder-decoder a prompt is a source, which is answered: as ids, its end token among them.

    temperature 0 is greedy. A row ends at one of tok.eos_ids, at a stop string, after
    max_new_tokens, or when prompt and answer fill the context. Row i draws from (seed, first + i)
    alone: prompts may come in batches of any size.
    on_text(i, piece) gets the text as it is made. A beam search neither draws nor filters.
    speculate: so many tokens are drafted for each pass (barelm/speculate.py), by `draft`: a smaller
    network, "heads" (the network's own: mtp) or "lookup"; None: by its heads, or else by lookup."""
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    options = dict(repetition_penalty=repetition_penalty, num_beams=num_beams, speculate=speculate)
    check_sampling(**filters, **options)
    check_generates(net)
    if speculate:
        check_speculation(net, tok.n_vocab, speculate, draft, num_beams)
    stop = [stop] if isinstance(stop, str) else [text for text in stop if text]
    is_seq2seq = net.config.is_seq2seq
    prompts = [prompt_ids(net, tok, prompt) for prompt in prompts]
    n_ctx = net.config.n_ctx
    rows = []
    for i, prompt in enumerate(prompts):
        n = len(prompt)
        longest = n_ctx if is_seq2seq else n_ctx - 1
        if not 0 < n <= longest:
            raise UserError(f"a prompt of {n} tokens: expected 1 to {longest}, the context")
        limit = min(max_new_tokens, n_ctx - len(decoder_prompt(net, prompt)))
        emit = None if on_text is None else partial(on_text, i)
        rows.append(Row(tok, limit, stop, emit, number=first + i))
    if not rows or max_new_tokens < 1:
        return [row.out for row in rows]
    with generating(net):
        if num_beams > 1:
            for prompt, row in zip(prompts, rows):
                best = beam_search(net, tok, prompt, row.limit, num_beams)
                for token, logprob in zip(best.ids, best.logprobs):
                    row.take(token, logprob)
        elif speculate:
            settings = (seed, repetition_penalty, filters, speculate, draft)
            speculate_rows(net, tok, prompts, rows, *settings)
        elif net.fast:
            decode_rows(net, tok, prompts, rows, seed, repetition_penalty, filters)
        else:
            sample_rows(net, tok, prompts, rows, seed, repetition_penalty, filters)
    return [row.out for row in rows]


def sample_rows(net: GPT, tok: Tokenizer, prompts: list[list[int]], rows: list[Row], seed: int,
                penalty: float, filters: dict) -> None:  # fmt: skip
    """Feed `rows` until all are done. On a GPU the host reads the tokens of step t - 1 while the
    device computes step t, so that neither waits for the other."""
    limit = max(row.limit for row in rows)
    begins = [decoder_prompt(net, prompt) for prompt in prompts]
    longest = max(len(begin) + row.limit for begin, row in zip(begins, rows))
    logits, cache = prefill(net, tok, prompts, longest)  # (B, V)
    device = logits.device
    uniform = torch.stack([draws(seed, row.number, limit) for row in rows]).to(device)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for i, begin in enumerate(begins):
        seen[i, torch.tensor(begin, device=device)] = True
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


def to_host(*tensors: Tensor) -> Callable:
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


def feed(net: GPT, tok: Tokenizer, cache: KVCache | SlotCache, ids: Tensor,
         n_new: Tensor | None = None) -> Tensor:  # fmt: skip
    """The logits (B, V) float32 of what follows ids (B, T), -inf for padding of the vocabulary."""
    h = net.hidden(ids, cache=cache, n_new=n_new)  # (B, T, C)
    if n_new is None:
        h = h[:, -1]
    else:
        h = h[torch.arange(len(h), device=h.device), n_new - 1]
    return head(net, tok, h)


def head(net: GPT, tok: Tokenizer, h: Tensor) -> Tensor:
    """The logits (…, V) float32 of hidden states, -inf for padding of the vocabulary."""
    logits = net.logits(h).float()
    logits[..., tok.n_vocab :] = -math.inf
    return logits


def prefill(
    net: GPT, tok: Tokenizer, prompts: list[list[int]], max_len: int
) -> tuple[Tensor, KVCache]:
    """Feed the prompts, lists of ids, to a new cache: the logits (B, V) after each, the cache. For
    an encoder-decoder they are sources, which are read once; what is fed is the start token."""
    cache = net.make_cache(len(prompts), max_len)
    device = cache.lengths.device
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T), padded at the right
    lengths = [len(prompt) for prompt in prompts]
    if net.config.is_seq2seq:
        memory = net.encode(ids, torch.tensor(lengths, device=device))
        cache.set_source(net.cross_kv(memory), memory.mask)
        begin = torch.full_like(ids[:, :1], net.start_id)  # (B, 1)
        return feed(net, tok, cache, begin), cache
    n_new = None  # equal lengths keep the cache even
    if len(set(lengths)) > 1:
        n_new = torch.tensor(lengths, device=device)
    return feed(net, tok, cache, ids, n_new), cache


def prompt_ids(net: GPT, tok: Tokenizer, prompt: str | list[int]) -> list[int]:
    """The ids of a prompt, or of a source, that is a text or ids."""
    if not isinstance(prompt, str):
        return list(prompt)
    return tok.source(prompt) if net.config.is_seq2seq else tok.prompt(prompt)


def decoder_prompt(net: GPT, prompt: list[int]) -> list[int]:
    """The ids that are continued: the prompt, or where it is a source the start token alone."""
    return [net.start_id] if net.config.is_seq2seq else prompt


@dataclass
class Beam:
    """A continuation that a beam search looks at."""

    row: int  # of the cache: the beam that it continues
    ids: list[int]
    logprobs: list[float]

    def score(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)


def beam_search(net: GPT, tok: Tokenizer, prompt: list[int], limit: int, num_beams: int) -> Beam:
    """The Beam with the best mean log p per token that a search of this width finds in `limit`
    tokens, or until num_beams continuations have ended: transformers' search with early_stopping
    and a length_penalty of 1."""
    logits, cache = prefill(net, tok, [prompt], len(decoder_prompt(net, prompt)) + limit)
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
