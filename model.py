"""The network: config, attention, blocks, the KV cache, generation."""

import codecs
import copy
import math
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Literal, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from barelm.fast import attend, cross_entropy_sum, generating, joint
from barelm.run import UserError, compute_dtype

ROPE_KEYS = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
ROPE_KEYS = {"linear": ROPE_KEYS[:1], "llama3": ROPE_KEYS}  # of rope_scaling, by its rope_type
LARGEST = 1 << 28  # of a config's whole numbers, so that torch can count the bytes of a product


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
        for f in fields(self):
            self.check_kind(f)
        self.check("n_embd", self.head_dim or self.n_embd % self.n_head == 0, "n_head to divide it")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        wide = -(-self.n_embd * 8 // (3 * 64)) * 64 if self.mlp == "swiglu" else 4 * self.n_embd
        self.n_hidden = self.n_hidden or wide
        self.check("n_hidden", self.n_hidden <= LARGEST, f"at most {LARGEST}")
        self.check("n_head", self.n_head * self.head_dim <= LARGEST, "a width that a machine holds")
        self.check("n_kv_head", self.n_head % self.n_kv_head == 0, "to divide n_head")
        self.check("head_dim", self.pos != "rope" or self.head_dim % 2 == 0, "an even number")
        # Of a row of zeros, as a padding token's may be, 0 would make NaN.
        self.check("norm_eps", 1e-30 <= self.norm_eps < 1, "a number above 0 and less than 1")
        self.check("rope_theta", self.rope_theta >= 1, "1 or more")
        self.check("dropout", 0 <= self.dropout < 1, "0 or more and less than 1")
        if self.rope_scaling is not None:
            self.check_scaling(self.rope_scaling)

    def check_kind(self, f):
        """Refuse a value that is not of its field's type, or that no field of the type can have."""
        value = getattr(self, f.name)
        if f.type is int:
            least = 1 if f.default is MISSING else min(1, f.default)
            good = type(value) is int and least <= value <= LARGEST  # a bool is no int here
            self.check(f.name, good, f"a whole number from {least} to {LARGEST}")
        elif f.type is float:
            # Computed in float32, which ends at 3.4e38. NaN is less than nothing.
            good = type(value) in (int, float) and abs(value) < 3e38
            self.check(f.name, good, "a finite number")
            setattr(self, f.name, float(value))
        elif f.type is bool:
            self.check(f.name, type(value) is bool, "true or false")
        elif get_origin(f.type) is Literal:
            allowed = get_args(f.type)
            self.check(f.name, value in allowed, " or ".join(map(str, allowed)))

    def check_scaling(self, scaling):
        """Refuse a rope_scaling of unknown type, or with numbers that scale to nothing."""
        expected = f"a dict with rope_type and the keys of {ROPE_KEYS}"
        self.check("rope_scaling", isinstance(scaling, dict), expected)
        self.check("rope_scaling", scaling.get("rope_type") in [*ROPE_KEYS], expected)
        for key in ROPE_KEYS[scaling["rope_type"]]:
            value = scaling.get(key)
            good = type(value) in (int, float) and 0 < value <= LARGEST
            self.check("rope_scaling", good, f"{expected}, {key} a number above 0")
        if scaling["rope_type"] == "llama3":
            apart = scaling["low_freq_factor"] < scaling["high_freq_factor"]
            self.check("rope_scaling", apart, "high_freq_factor above low_freq_factor")

    def check(self, name, good, expected):
        if not good:
            raise UserError(f"{name}={getattr(self, name)!r}: expected {expected}")


def rms_norm(x, weight, eps):
    """RMSNorm (Zhang and Sennrich 2019) of x (…, C) by weight (C,) or (H, C)."""
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def make_norm(c):
    """The norm of a block's input or output."""
    if c.norm == "rms":
        return RMSNorm(c.n_embd, c.norm_eps)
    return nn.LayerNorm(c.n_embd, c.norm_eps, bias=c.bias)


def rope_frequencies(c, device):
    """Radians per position of each pair of dimensions (head_dim / 2,) float32 (Su et al. 2021)."""
    f = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if not (s := c.rope_scaling):
        return f
    if s["rope_type"] == "linear":
        return f / s["factor"]
    # llama3: slow frequencies are divided by the factor, fast ones kept, those between blended.
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * f / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return f * (keep + (1 - keep) / s["factor"])


def sinusoids(positions, size):
    """Fixed position embeddings (…, size): sines, then cosines (Vaswani et al. 2017, 3.5)."""
    exponent = torch.arange(0, size, 2, device=positions.device).float() / size
    angles = positions[..., None] / 10000.0**exponent
    return torch.cat((angles.sin(), angles.cos()), -1)[..., :size]


def rotate(x, rope):
    """Rotate the pairs (j, j + head_dim/2) of x (B, T, H, head_dim) by the angles (cos, sin)."""
    (a, b), (cos, sin) = x.chunk(2, -1), rope
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        heads = lambda n: nn.Linear(c.n_embd, n * c.head_dim, bias=c.bias or c.qkv_bias)
        self.q_proj, self.k_proj, self.v_proj = map(heads, (c.n_head, c.n_kv_head, c.n_kv_head))
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.norm_eps) for _ in "qk")

    def qkv(self, x, rope):
        """q (B, n_head, T, D), k and v (B, n_kv_head, T, D) of x (B, T, C), normed and turned."""
        B, T, _ = x.shape
        H, G = self.c.n_head, self.c.n_kv_head
        qkv = joint(x, self.q_proj, self.k_proj, self.v_proj).view(B, T, H + 2 * G, -1)
        qk, v = qkv.split((H + G, G), 2)
        if self.c.qk_norm:
            scales = self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(G, -1)
            qk = rms_norm(qk, torch.cat(scales), self.c.norm_eps)
        if rope is not None:
            qk = rotate(qk, rope)
        return *qk.transpose(1, 2).split((H, G), 1), v.transpose(1, 2)

    def forward(self, x, rope, mask, cache=None):
        q, k, v = self.qkv(x, rope)
        if cache is not None:
            k, v = cache(k, v)
        y = attend(q, k, v, mask, self.c.dropout if self.training else 0.0)
        return joint(y.transpose(1, 2).flatten(2), self.o_proj)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.kind = c.mlp
        if c.mlp == "swiglu":
            self.gate_proj = nn.Linear(c.n_embd, c.n_hidden, bias=c.bias)
        self.up_proj = nn.Linear(c.n_embd, c.n_hidden, bias=c.bias)
        self.down_proj = nn.Linear(c.n_hidden, c.n_embd, bias=c.bias)

    def forward(self, x):
        if self.kind == "swiglu":  # Shazeer 2020
            gate, h = joint(x, self.gate_proj, self.up_proj).chunk(2, -1)
            return joint(F.silu(gate) * h, self.down_proj)
        h = joint(x, self.up_proj)
        h = F.gelu(h, approximate="tanh") if self.kind == "gelu" else F.relu(h)
        return joint(h.square() if self.kind == "relu2" else h, self.down_proj)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = make_norm(c), make_norm(c)
        out_norm = partial(make_norm, c) if c.norm_place == "both" else nn.Identity
        self.attn_out_norm, self.mlp_out_norm = out_norm(), out_norm()

    def forward(self, x, rope, mask, cache=None):
        attend = lambda h: self.self_attn(h, rope, mask, cache)
        x = self.add(x, attend, self.input_layernorm, self.attn_out_norm)
        return self.add(x, self.mlp, self.post_attention_layernorm, self.mlp_out_norm)

    def add(self, x, f, norm, out_norm):
        if self.c.norm_place == "post":
            return norm(x + F.dropout(f(x), self.c.dropout, self.training))
        return x + F.dropout(out_norm(f(norm(x))), self.c.dropout, self.training)


def call_block(block, x, rope, mask):
    return block(x, rope, mask)


class GPT(nn.Module):
    """A decoder-only transformer. Its state_dict is, name by name, the Hugging Face file's."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.checkpoint = False  # recompute each block in backward: less memory, more time
        self.train_block = call_block  # or that function compiled, once for all blocks
        self.score = self.labels = None  # a classifier's head (n_labels, C) and its labels
        self.pooling = "last"  # which hidden state it reads: the last token's, or the mean
        self.pad_id = None  # which token is no text's last
        self.adapter_size = 0  # of add_adapters
        self.quantize = None  # or what quantize_weights made of it: int8 or int4
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        if c.pos == "learned":
            self.model.embed_positions = nn.Embedding(c.n_ctx, c.n_embd)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.model.norm = make_norm(c) if c.norm_place != "post" else nn.Identity()
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters(remove_duplicate=False):  # the seeds count both
            if name.endswith("proj.bias"):
                nn.init.zeros_(p)
            elif "proj" in name and c.init != "scaled":
                {"xavier": nn.init.xavier_uniform_, "he": nn.init.kaiming_normal_}[c.init](p)
            elif p.ndim == 2:  # scaled is GPT-2's, with less where a block adds to x
                outward = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer if outward else 1))

    def set_score(self, labels, pooling="last", pad_id=None):
        """Give the network a classifier's head, or a reward model's with its one label. pad_id: a
        token that is no text's last one."""
        like = self.model.embed_tokens.weight
        self.score = nn.Linear(self.config.n_embd, len(labels), bias=False, device=like.device)
        nn.init.normal_(self.score.weight, std=0.02)
        self.labels, self.pooling, self.pad_id = labels, pooling, pad_id

    def scores(self, rows):
        """(B, labels) float32 of texts, lists of ids: by the state of the last token that is no
        padding, as transformers finds it (the first where all are), or by the mean's."""
        device = self.score.weight.device
        rows = [self.without_padding(ids) for ids in rows]
        n = torch.tensor([len(ids) for ids in rows], device=device)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
        h = self.hidden(ids.to(device))
        if self.pooling == "mean":
            real = torch.arange(h.shape[1], device=device) < n[:, None]
            h = (h * real[..., None]).sum(1) / n[:, None]
        else:
            h = h[torch.arange(len(h), device=device), n - 1]
        return self.score(h).float()

    def without_padding(self, ids):
        """The ids up to the last one that is no padding, and one at least."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self.pad_id:
            end -= 1
        return ids[:end]

    def hidden(self, ids, *, cache=None, n_new=None, docs=None, embeds=None):
        """The final hidden states (B, T, C), normalized, of ids (B, T) int64 or embeds (B, T, C).

        With a cache, row b's first n_new[b] tokens (all T where n_new is None) continue that row.
        docs (B, T) int64: a token attends to its own document, where positions start anew."""
        c = self.config
        x = self.model.embed_tokens(ids) if embeds is None else embeds
        T, mask, rope = x.shape[1], None, None
        if cache is not None:
            positions, mask = cache.extend(T, n_new)
        else:
            positions = torch.arange(T, device=x.device)[None]
        if docs is not None:
            mask = (docs[:, None, :, None] == docs[:, None, None, :]).tril()
            new = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0))
            positions = positions - (new * positions).cummax(1).values
        if c.pos == "rope":
            angles = positions[:, :, None, None] * rope_frequencies(c, x.device)
            rope = [f.to(compute_dtype(x)) for f in (angles.cos(), angles.sin())]
        elif c.pos == "learned":
            if cache is None and T > c.n_ctx:
                raise ValueError(f"{T} tokens, but the model has {c.n_ctx} learned positions")
            x = x + self.model.embed_positions(positions.clamp(max=c.n_ctx - 1))
        elif c.pos == "sinusoidal":
            x = x + sinusoids(positions, c.n_embd).to(x.dtype)
        x = F.dropout(x, c.dropout, self.training)
        run = self.train_block
        if self.checkpoint:
            run = partial(checkpoint, run, use_reentrant=False)
        for i, block in enumerate(self.model.layers):
            if self.training and cache is None:
                x = run(block, x, rope, mask)
            else:
                x = block(x, rope, mask, cache and partial(cache.write, i))
        return self.model.norm(x)

    def forward(self, ids, targets=None, **how):
        """logits (B, T, V); or with targets (B, T) int64, -100 meaning none, (the sum of -log p in
        nats, float32; their count). `how` is passed on to `hidden`."""
        h = self.hidden(ids, **how)
        if targets is None:
            return joint(h, self.lm_head)
        h, t = h.flatten(0, 1), targets.flatten()
        if type(self.lm_head) is nn.Linear:
            nll = cross_entropy_sum(h, self.lm_head.weight, t)
        else:  # quantized or adapted
            nll = F.cross_entropy(self.lm_head(h).float(), t, reduction="sum")
        return nll, (t != -100).sum()


def logprobs(net, ids, targets):
    """log p(targets) (B, T) float32 under net at each position of ids (B, T); 0 where -100, and
    no logits are made there."""
    wanted = targets != -100
    logits = joint(net.hidden(ids)[wanted], net.lm_head).float()
    found = -F.cross_entropy(logits, targets[wanted], reduction="none")
    return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(wanted, found)


class KVCache:
    """Keys and values of past tokens, every row with a length of its own.

    k, v (n_layer, batch, n_kv_head, max_len, head_dim); lengths (batch,) int64 on the device.
    `used` is known without asking the device: no row is longer. `even`: all rows are that long, so
    that slices do for indices and masks; who changes lengths makes it False. Length 0 empties one.
    """

    def __init__(self, config, batch, max_len, device, dtype):
        self.max_len, self.used, self.even = max_len, 0, True
        # One place more than max_len: where writes that belong to no token go.
        shape = (2, config.n_layer, batch, config.n_kv_head, max_len + 1, config.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    k = property(lambda self: self.store[0, ..., : self.max_len, :])
    v = property(lambda self: self.store[1, ..., : self.max_len, :])

    def extend(self, T, n_new=None):
        """Make room for T tokens a row: their positions (B, T), and the mask (B, 1, T, used), or
        None for the first ones: they are right-padded, so that causal attention is enough."""
        begin, device = self.used, self.lengths.device
        if begin == 0 and T > self.max_len:
            raise ValueError(f"{T} tokens do not fit a cache of {self.max_len}")
        self.first, self.used = begin == 0, min(begin + T, self.max_len)
        self.even = self.even and n_new is None and begin + T <= self.max_len
        self.slots = slice(begin, self.used)
        if self.even:
            positions = torch.arange(begin, self.used, device=device)[None]
            self.lengths = self.lengths + T
        else:
            steps = torch.arange(T, device=device)
            positions = self.lengths[:, None] + steps
            kept = positions < self.max_len
            if n_new is not None:
                kept &= steps < n_new[:, None]
            if not self.first:
                self.slots = torch.where(kept, positions, self.max_len)
            self.lengths = self.lengths + kept.sum(1)
        if self.first or self.even and T == 1:  # one query sees all
            return positions, None
        seen = torch.arange(self.used, device=device)
        return positions, (seen <= positions[:, :, None])[:, None]

    def write(self, i, k, v):
        """Store layer i's new k and v; return all that its queries may see."""
        for place, new in zip(self.store[:, i], (k, v)):
            if isinstance(self.slots, slice):
                place[:, :, self.slots] = new
            else:
                rows = torch.arange(len(k), device=k.device)[:, None]
                place[rows, :, self.slots] = new.transpose(1, 2).to(place.dtype)
        return (k, v) if self.first else self.store[:, i, :, :, : self.used]

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

    def copy(self, to, rows, length):
        """The first `length` places of the rows `to` become what they were in `rows` (lists)."""
        self.store[:, :, to, :, :length] = self.store[:, :, rows, :, :length]


@dataclass
class Generation:
    """ids end with the end token, if one came; logprobs are the model's own, one an id, in nats."""

    ids: list = field(default_factory=list)
    text: str = ""
    logprobs: list = field(default_factory=list)
    finish_reason: str = "length"  # or "stop": an end token, or a stop string (not part of text)


class TextStream:
    """Bytes in, text out: never half a character, nothing that may become a stop string."""

    def __init__(self, stop=()):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop, self.text, self.sent, self.stopped = stop, "", 0, False

    def feed(self, data, final=False):
        """The text that `data` makes certain."""
        self.text += self.decoder.decode(data, final)
        ends = [at for s in self.stop if (at := self.text.find(s, self.sent)) >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
        end = len(self.text)
        if not self.stopped and not final:
            held = [n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])]
            end -= max(held, default=0)
        piece, self.sent = self.text[self.sent : end], max(end, self.sent)
        return piece


class Row:
    """A sequence in the making: it ends at an end token (one of `ends`, or else the tokenizer's),
    a stop string, or `limit` tokens."""

    def __init__(self, tok, limit, stop, emit, ends=None):
        self.tok, self.limit, self.emit = tok, limit, emit
        self.ends = tok.eos_ids if ends is None else ends
        self.out, self.stream, self.done = Generation(), TextStream(stop), False

    def take(self, token, logprob):
        if self.done:
            return
        g, ended = self.out, token in self.ends
        g.ids.append(token)
        g.logprobs.append(logprob)
        last = ended or len(g.ids) == self.limit
        piece, g.text = self.stream.feed(self.tok.token_bytes(token), last), self.stream.text
        self.done = last or self.stream.stopped
        if ended or self.stream.stopped:
            g.finish_reason = "stop"
        if piece:
            self.emit(piece)


LARGEST_FLOAT = torch.finfo(torch.float32).max
GREEDY = 1e-20  # below it a temperature counts as 0: what it divides would overflow float32


def penalize(logits, seen, repetition, counts=0, presence=0.0, frequency=0.0):
    """Logits (B, V), lower where a token is `seen` (B, V) bool (Keskar et al. 2019), and by how
    often it was said, `counts` (B, V): once `presence`, each time `frequency` (OpenAI's). Each
    penalty is a number, or (B, 1)."""
    lower = torch.where(logits > 0, logits / repetition, logits * repetition)
    lower = lower.clamp(
        -LARGEST_FLOAT, LARGEST_FLOAT
    )  # an infinite logit would make every chance NaN
    logits = torch.where(seen & (logits > -math.inf), lower, logits)
    return logits - presence * (counts > 0) - frequency * counts


def choose_tokens(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One token a row (B,) from logits (B, V), the distribution inverted at uniform (B,), so that
    no draw depends on the rest of the batch. top_k, top_p (Holtzman et al. 2020) and min_p (Nguyen
    et al. 2024) filter in this order, as in transformers. Each is a number, or a list with one for
    each row; temperature 0, or below GREEDY, takes the likeliest."""
    host = [torch.tensor(o, dtype=torch.float32) for o in (temperature, top_k, top_p, min_p)]
    host = [o.expand(len(logits))[:, None] for o in host]  # on the host, which waits for no device
    host[0] = host[0].where(host[0] >= GREEDY, 0.0)
    if not host[0].any():
        return logits.argmax(-1)
    temperature, top_k, top_p, min_p = (o.to(logits.device) for o in host)
    # The likeliest becomes 0, so that no quotient is beyond float32 but by being very unlikely.
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled = scaled / temperature.where(temperature > 0, 1.0)
    if k := min(int(host[1].max()), logits.shape[-1]):
        best = logits.topk(k).values
        kth = best.gather(1, top_k.long().clamp(1, k) - 1)
        scaled = scaled.masked_fill((logits < kth) & (top_k > 0), -math.inf)
    probs = scaled.softmax(-1)
    some = (host[2][:, 0] < 1).nonzero()[:, 0].to(logits.device)  # to sort is slow
    if len(some):
        ordered, order = probs[some].sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p[some]
        beyond[:, 0] = False  # whatever top_p, the likeliest stays
        probs[some] = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0))
    if host[3].any():
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    mass = probs.cumsum(-1)
    drawn = (mass <= uniform[:, None] * (1 - 2**-20) * mass[:, -1:]).sum(-1)
    return drawn.where(temperature[:, 0] > 0, logits.argmax(-1))


SAMPLING = {  # what `generate` takes: (least, most)
    "temperature": (0, LARGEST_FLOAT),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 1e6),
    "num_beams": (1, math.inf),
}


def check_sampling(**options):
    """Refuse an option of `generate` that is beyond its range, or no number."""
    for name, value in options.items():
        least, most = SAMPLING[name]
        if not least <= value <= most:  # NaN is neither
            limits = (
                f"from {least} to {most}"
                if most < LARGEST_FLOAT
                else f"{least} or more, and finite"
            )
            raise UserError(f"{name}={value!r}: expected a number {limits}")


def draws(seed, i, n):
    """The n uniform numbers of row i: they depend on nothing else."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
    return torch.rand(n, generator=generator)


@torch.no_grad()
def generate(net, tok, prompts, *, max_new_tokens=100, temperature=1.0, top_k=0, top_p=1.0,
             min_p=0.0, repetition_penalty=1.0, seed=0, stop=(), num_beams=1,
             on_text=None):  # fmt: skip
    """Continue each prompt (a text, or token ids); returns [Generation], one a prompt.

    temperature 0 is greedy. A row ends at one of tok.eos_ids, at a stop string, after
    max_new_tokens, or when prompt and answer fill the context. Row i draws from (seed, i) alone.
    on_text(i, piece) gets the text as it is made. A beam search neither draws nor filters."""
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_sampling(**filters, repetition_penalty=repetition_penalty, num_beams=num_beams)
    stop = [stop] if isinstance(stop, str) else [s for s in stop if s]
    prompts = [tok.prompt(p) if isinstance(p, str) else list(p) for p in prompts]
    n_ctx, rows = net.config.n_ctx, []
    for i, p in enumerate(prompts):
        if not 0 < len(p) < n_ctx:
            raise UserError(f"a prompt of {len(p)} tokens: expected 1 to {n_ctx - 1}, the context")
        emit = partial(on_text, i) if on_text else lambda piece: None
        rows.append(Row(tok, min(max_new_tokens, n_ctx - len(p)), stop, emit))
    if not rows or max_new_tokens < 1:
        return [row.out for row in rows]
    with generating(net):
        if num_beams > 1:
            for prompt, row in zip(prompts, rows):
                for token, logprob in zip(*beam_search(net, tok, prompt, row.limit, num_beams)):
                    row.take(token, logprob)
        else:
            sample_rows(net, tok, prompts, rows, seed, repetition_penalty, filters)
    return [row.out for row in rows]


def sample_rows(net, tok, prompts, rows, seed, penalty, filters):
    """Feed `rows` until all are done. On a GPU the host reads the tokens of step t - 1 while the
    device computes step t, so that neither waits for the other."""
    limit = max(row.limit for row in rows)
    longest = max(len(p) + row.limit for p, row in zip(prompts, rows))
    logits, cache = prefill(net, tok, prompts, longest)
    device, pending = logits.device, []
    uniform = torch.stack([draws(seed, i, limit) for i in range(len(rows))]).to(device)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for i, p in enumerate(prompts):
        seen[i, torch.tensor(p, device=device)] = True
    for t in range(limit):
        likely = penalize(logits, seen, penalty) if penalty != 1 else logits
        tokens = choose_tokens(likely, uniform[:, t], **filters)
        seen.scatter_(1, tokens[:, None], True)
        chances = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        pending.append(to_host(tokens, chances))
        while len(pending) > (device.type == "cuda" and t + 1 < limit):
            for row, *new in zip(rows, *pending.pop(0)()):
                row.take(*new)
        if all(row.done for row in rows):
            return
        logits = feed(net, tok, cache, tokens[:, None])


def to_host(*tensors):
    """Start copying tensors to the host; the function returned waits for them, as lists."""
    copies = [t.to("cpu", non_blocking=True) for t in tensors]  # from a GPU: to pinned memory
    wait = lambda: None
    if tensors[0].device.type == "cuda":
        wait = torch.cuda.current_stream(tensors[0].device).record_event().synchronize
    return lambda: wait() or [copy.tolist() for copy in copies]


def feed(net, tok, cache, ids, n_new=None):
    """The logits (B, V) float32 of what follows ids (B, T), -inf for padding of the vocabulary."""
    h = net.hidden(ids, cache=cache, n_new=n_new)
    h = h[:, -1] if n_new is None else h[torch.arange(len(h), device=h.device), n_new - 1]
    return head(net, tok, h)


def head(net, tok, h):
    """The logits (…, V) float32 of hidden states, -inf for padding of the vocabulary."""
    logits = joint(h, net.lm_head).float()
    logits[..., tok.n_vocab :] = -math.inf
    return logits


def prefill(net, tok, prompts, max_len):
    """Feed the prompts, lists of ids, to a new cache: the logits (B, V) after each, the cache."""
    table, lengths = net.model.embed_tokens.weight, {len(p) for p in prompts}
    # A CPU attends to float32 faster than to less: it has to convert the rest.
    dtype = torch.float32 if table.device.type == "cpu" else compute_dtype(table)
    cache = KVCache(net.config, len(prompts), max_len, table.device, dtype)
    rows = [torch.tensor(p, device=table.device) for p in prompts]
    n_new = torch.tensor([*map(len, rows)], device=table.device) if len(lengths) > 1 else None
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return feed(net, tok, cache, ids, n_new), cache


def beam_search(net, tok, prompt, limit, num_beams):
    """(ids, logprobs) of the continuation with the best mean log p per token that a search of this
    width finds in `limit` tokens, or until num_beams continuations have ended: transformers' search
    with early_stopping and a length_penalty of 1."""
    logits, cache = prefill(net, tok, [prompt], len(prompt) + limit)
    beams, ended = [([], [])], []  # (ids, logprobs) of each
    # So many candidates that, whichever of them end, num_beams are left to go on with.
    width = num_beams * max(2, 1 + len(set(tok.eos_ids)))
    for t in range(limit):
        chances = logits.log_softmax(-1)
        totals = chances + torch.tensor([[sum(lp)] for _, lp in beams], device=logits.device)
        best = totals.flatten().topk(min(width, totals.numel())).indices.tolist()
        grown = []
        for rank, place in enumerate(best):
            row, token = divmod(place, totals.shape[1])
            ids, logprobs = beams[row]
            beam = (ids + [token], logprobs + [chances[row, token].item()])
            if not math.isfinite(beam[1][-1]):  # padding of the vocabulary
                continue
            last = token in tok.eos_ids or t + 1 == limit
            if last and rank < num_beams:  # an end that ranks lower is not one of the search's
                ended.append(beam)
            elif not last and len(grown) < num_beams:
                grown.append((row, beam))
        beams = [beam for _, beam in grown]
        if len(ended) >= num_beams or not beams:
            break
        cache.reorder(torch.tensor([row for row, _ in grown], device=logits.device))
        tokens = torch.tensor([ids[-1] for ids, _ in beams], device=logits.device)
        logits = feed(net, tok, cache, tokens[:, None])
    if not ended:
        raise UserError("no beam search: the model's probabilities are not numbers")
    return max(ended, key=lambda beam: sum(beam[1]) / len(beam[1]))
