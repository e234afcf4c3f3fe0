"""The one file that every stage shares: set-up, the network and its cache, generation, the tokenizer,
checkpoints, optimizers, accounting. It knows no stage, and imports nothing of ours.

    net, tok = load("out/python")                                # a checkpoint is a Hugging Face folder
    loss_sum, n_targets = net(ids, targets)                      # ids, targets (B, T) int64
    [g] = generate(net, tok, ["import os\\n"], max_new_tokens=50)
    print(g.text, g.finish_reason)
"""

import codecs
import contextlib
import json
import math
import os
import platform
import re
import struct
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class UserError(SystemExit):
    """Something the user can mend, told in one line: what, where, what to do. Unhandled: exit 1."""


# ---------------------------------------------------------------------------------------------------
# Set-up: device, processes, precision, progress


@dataclass
class Setup:
    """Where this process runs. `main` is true on the one process that writes files."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self):
        return self.rank == 0


def setup(device="auto"):
    """Choose the device and join the other processes, if torchrun started several."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device={device}: no such device (auto, cpu, cuda, cuda:1)") from None
    if place.type == "cuda":
        index = place.index if world == 1 else int(os.environ.get("LOCAL_RANK", rank))
        if (index or 0) >= torch.cuda.device_count():
            found = f"this machine has {torch.cuda.device_count()} of them"
            raise UserError(
                f"--device={device}: GPU {index or 0} is not there: {found}; use --device=cpu"
            )
        place = torch.device("cuda", index or 0)
        torch.cuda.set_device(place)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Setup(place, rank, world)


def choose_dtype(device, want="auto", n_embd=0):
    """The dtype to compute in, and why: (dtype, reason). Parameters are float32 in training."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if want != "auto":
        if want not in names:
            raise UserError(f"--dtype={want}: expected auto, {', '.join(names)}")
        return names[want], "as asked"
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        if major >= 8:
            return torch.bfloat16, "this GPU has fast bfloat16"
        return torch.float16, "this GPU has no fast bfloat16; gradients are scaled"
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    if not (has.get("avx512_bf16") or has.get("amx_bf16")):
        return torch.float32, f"this {device.type} has no fast bfloat16"
    if n_embd < 256:
        return torch.float32, "below width 256 the casts cost more than bfloat16 gains"
    return torch.bfloat16, "this CPU has fast bfloat16 and the model is wide enough to gain"


def autocast(device, dtype):
    """Compute in `dtype` inside this context; float32 is the plain path."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class Progress:
    """One line of progress: rewritten in place on a terminal, printed every `every` s in a log."""

    def __init__(self, every=5.0):
        self.every, self.last, self.terminal = every, -math.inf, sys.stdout.isatty()
        self.open = False

    def __call__(self, line, last=False):
        if self.terminal:
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
            self.open = not last
        elif last or time.monotonic() - self.last >= self.every:
            print(line, flush=True)
            self.last = time.monotonic()

    def note(self, text):
        """Print `text` on lines of its own, between two states of the progress line."""
        print(("\n" if self.open else "") + text, flush=True)
        self.open = False


def duration(seconds):
    """Seconds as a person reads them: 42s, 3m10s, 2h05m."""
    if seconds == math.inf or seconds != seconds:
        return "?"
    m, s = divmod(int(seconds), 60)
    return f"{s}s" if m == 0 else f"{m}m{s:02d}s" if m < 60 else f"{m // 60}h{m % 60:02d}m"


# ---------------------------------------------------------------------------------------------------
# The network

CHOICES = {
    "norm": ("rms", "layer"),
    "norm_place": ("pre", "post", "both"),
    "pos": ("rope", "learned", "sinusoidal", "none"),
    "mlp": ("swiglu", "gelu", "relu", "relu2"),
    "init": ("scaled", "xavier", "he"),
}


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
    norm: str = "rms"
    norm_place: str = "pre"
    norm_eps: float = 1e-6
    qk_norm: bool = True  # RMSNorm on each head's query and key, before the rotation
    qkv_bias: bool = False
    bias: bool = False  # biases in every linear layer but the head, and in LayerNorm
    pos: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Hugging Face's dict: rope_type linear or llama3
    mlp: str = "swiglu"
    tie: bool = True  # the head's weights are the embedding's
    dropout: float = 0.0
    init: str = "scaled"

    def __post_init__(self):
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"{key}={getattr(self, key)!r}: expected {' or '.join(allowed)}")
        for key in ("vocab_size", "n_ctx", "n_layer", "n_head", "n_embd"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: expected 1 or more")
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; set head_dim"
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        wide = -(-self.n_embd * 8 // (3 * 64)) * 64 if self.mlp == "swiglu" else 4 * self.n_embd
        self.n_hidden = self.n_hidden or wide
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim}: rotary positions need an even number")
        kind = (self.rope_scaling or {}).get("rope_type", "linear")
        if kind not in ("linear", "llama3"):
            raise UserError(f"rope_scaling of type {kind!r}: expected linear or llama3")


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm over the last dimension."""

    def __init__(self, size, kind, eps, bias=False):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias and kind == "layer" else None

    def forward(self, x):
        if self.kind == "rms":
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rope_frequencies(c, device):
    """Radians per position for each pair of dimensions (head_dim / 2,) float32 (Su et al. 2021)."""
    exponent = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim
    f = 1.0 / c.rope_theta**exponent
    if not c.rope_scaling:
        return f
    factor = c.rope_scaling["factor"]
    if c.rope_scaling["rope_type"] == "linear":
        return f / factor
    # llama3: slow frequencies are divided by the factor, fast ones kept, those between blended.
    low, high = c.rope_scaling["low_freq_factor"], c.rope_scaling["high_freq_factor"]
    turns = c.rope_scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return f * (keep + (1 - keep) / factor)


def sinusoids(positions, size):
    """Fixed position embeddings (…, size) (Vaswani et al. 2017, section 3.5), sines then cosines."""
    half = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = positions[..., None] / 10000.0**half
    return torch.cat((angles.sin(), angles.cos()), -1)[..., :size]


def rotate(x, rope):
    """Rotate the pairs (j, j + head_dim/2) of x (B, H, T, head_dim) by the angles (cos, sin)."""
    cos, sin = (r.to(x.dtype) for r in rope)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        bias = c.bias or c.qkv_bias
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        self.q_norm = Norm(c.head_dim, "rms", c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = Norm(c.head_dim, "rms", c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache=None):
        B, T, _ = x.shape
        q, k, v = (
            p(x).view(B, T, -1, self.c.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = (
                rotate(q, rope),
                rotate(k, rope),
            )  # (B, H, T, head_dim), k and v (B, H_kv, T, head_dim)
        if cache is not None:
            k, v = cache(k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.c.dropout if self.training else 0.0,
            enable_gqa=self.c.n_head != self.c.n_kv_head,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.kind = c.mlp
        self.gate_proj = nn.Linear(c.n_embd, c.n_hidden, bias=c.bias) if c.mlp == "swiglu" else None
        self.up_proj = nn.Linear(c.n_embd, c.n_hidden, bias=c.bias)
        self.down_proj = nn.Linear(c.n_hidden, c.n_embd, bias=c.bias)

    def forward(self, x):
        h = self.up_proj(x)
        if self.kind == "swiglu":  # Shazeer 2020
            h = F.silu(self.gate_proj(x)) * h
        elif self.kind == "gelu":
            h = F.gelu(h, approximate="tanh")
        else:
            h = F.relu(h) if self.kind == "relu" else F.relu(h).square()
        return self.down_proj(h)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = Norm(c.n_embd, c.norm, c.norm_eps, c.bias)
        self.post_attention_layernorm = Norm(c.n_embd, c.norm, c.norm_eps, c.bias)
        both = c.norm_place == "both"
        self.attn_out_norm = Norm(c.n_embd, c.norm, c.norm_eps, c.bias) if both else nn.Identity()
        self.mlp_out_norm = Norm(c.n_embd, c.norm, c.norm_eps, c.bias) if both else nn.Identity()

    def residual(self, x, f, norm, out_norm):
        if self.c.norm_place == "post":
            return norm(x + F.dropout(f(x), self.c.dropout, self.training))
        return x + F.dropout(out_norm(f(norm(x))), self.c.dropout, self.training)

    def forward(self, x, rope, mask, cache=None):
        attend = lambda h: self.self_attn(h, rope, mask, cache)
        x = self.residual(x, attend, self.input_layernorm, self.attn_out_norm)
        return self.residual(x, self.mlp, self.post_attention_layernorm, self.mlp_out_norm)


class GPT(nn.Module):
    """A decoder-only transformer. Its state_dict is, name by name, the Hugging Face file's."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.checkpoint = (
            False  # recompute each block in backward instead of keeping its activations
        )
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.model.embed_positions = nn.Embedding(c.n_ctx, c.n_embd) if c.pos == "learned" else None
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        last = c.norm_place != "post"
        self.model.norm = Norm(c.n_embd, c.norm, c.norm_eps, c.bias) if last else nn.Identity()
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie:
            self.lm_head.weight = self.model.embed_tokens.weight
        if self.lm_head.weight.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """`scaled` is GPT-2's: N(0, 0.02), and 0.02 / sqrt(2 n_layer) where a block adds to x."""
        for name, module in self.named_modules():
            if (
                isinstance(module, nn.Embedding)
                or module is self.lm_head
                or self.config.init == "scaled"
            ):
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    outward = name.endswith(("o_proj", "down_proj"))
                    std = 0.02 / math.sqrt(2 * self.config.n_layer) if outward else 0.02
                    nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.Linear) and self.config.init == "xavier":
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, ids, *, cache=None, n_new=None, docs=None, embeds=None):
        """The final hidden states (B, T, C), normalized: what the head reads.

        ids (B, T) int64, or embeds (B, T, C) in their place. With a cache, row b's first n_new[b]
        tokens (all T where n_new is None) continue that row. docs (B, T) int64: a token attends only
        to tokens of its own document, and positions restart where the document changes.
        """
        c = self.config
        x = self.model.embed_tokens(ids) if embeds is None else embeds
        T, mask = x.shape[1], None
        if cache is not None:
            positions, mask = cache.extend(T, n_new)
        else:
            positions = torch.arange(T, device=x.device)[None]
            if docs is not None:
                mask = (docs[:, None, :, None] == docs[:, None, None, :]).tril()
                new = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0))
                positions = positions - (new * positions).cummax(1).values
        rope = None
        if c.pos == "rope":
            angles = positions[:, None, :, None] * rope_frequencies(
                c, x.device
            )  # (B or 1, 1, T, D/2)
            rope = angles.cos(), angles.sin()
        elif c.pos == "learned":
            if cache is None and T > c.n_ctx:
                raise ValueError(f"{T} tokens, but the model has {c.n_ctx} learned positions")
            x = x + self.model.embed_positions(positions.clamp(max=c.n_ctx - 1))
        elif c.pos == "sinusoidal":
            x = x + sinusoids(positions, c.n_embd).to(x.dtype)
        x = F.dropout(x, c.dropout, self.training)
        for i, block in enumerate(self.model.layers):
            if self.checkpoint and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache.layer(i) if cache is not None else None)
        return self.model.norm(x)

    def forward(self, ids, targets=None, **how):
        """logits (B, T, V); with targets (B, T) int64, -100 meaning none, (loss sum, target count).

        The loss is the sum of -log p in nats, float32; `how` is passed to `hidden`.
        """
        logits = self.lm_head(self.hidden(ids, **how))
        if targets is None:
            return logits
        nll = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        return nll, (targets != -100).sum()


def logprobs(net, ids, targets):
    """log p(targets) (B, T) float32 under net at each position of ids (B, T); 0 where -100."""
    logits = net(ids).float()
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


# ---------------------------------------------------------------------------------------------------
# The KV cache and generation


class KVCache:
    """Keys and values of past tokens, every row with a length of its own.

    k, v (n_layer, batch, n_kv_head, max_len, head_dim); lengths (batch,) int64 on the device. `used`
    is known without asking the device: no row is longer. To empty a row, set its length to 0.
    """

    def __init__(self, config, batch, max_len, device, dtype):
        self.max_len, self.used = max_len, 0
        # One place more than max_len: where writes that belong to no token go.
        shape = (2, config.n_layer, batch, config.n_kv_head, max_len + 1, config.head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.k, self.v = self.store[..., :max_len, :]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    def extend(self, T, n_new=None):
        """Make room for T more tokens: their positions (B, T), and the mask (B, 1, T, used) or None.

        The first tokens need no mask (they are right-padded, so causal attention is enough); later
        ones see what their row holds up to themselves.
        """
        steps = torch.arange(T, device=self.lengths.device)
        positions = self.lengths[:, None] + steps
        self.first = self.used == 0
        if self.first and T > self.max_len:
            raise ValueError(f"{T} tokens do not fit a cache of {self.max_len}")
        self.used = min(self.used + T, self.max_len)
        kept = positions < self.max_len
        if n_new is not None:
            kept &= steps < n_new[:, None]
        self.slots = torch.where(kept, positions, self.max_len)
        self.lengths = self.lengths + kept.sum(1)
        if self.first:
            return positions, None
        seen = torch.arange(self.used, device=self.lengths.device)
        return positions, (seen <= positions[:, :, None])[:, None]

    def layer(self, i):
        """A function that stores layer i's new k and v and returns all that its queries may see."""
        store = self.store[:, i]

        def write(k, v):
            if self.first:
                store[0, :, :, : k.shape[2]], store[1, :, :, : v.shape[2]] = k, v
                return k, v
            rows = torch.arange(len(k), device=k.device)[:, None]
            for new, place in zip((k, v), store):
                place[rows, :, self.slots] = new.transpose(1, 2).to(place.dtype)
            return store[0, :, :, : self.used], store[1, :, :, : self.used]

        return write

    def reorder(self, rows):
        """Row i becomes what row rows[i] was (beam search)."""
        self.store, self.lengths = self.store[:, :, rows], self.lengths[rows]
        self.k, self.v = self.store[..., : self.max_len, :]


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
        ends = [self.text.find(s, max(0, self.sent - len(s))) for s in self.stop]
        ends = [end for end in ends if end >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
        end = len(self.text)
        if not self.stopped and not final:
            held = [n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])]
            end -= max(held, default=0)
        piece, self.sent = self.text[self.sent : end], max(end, self.sent)
        return piece


def choose_tokens(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One token a row (B,) from logits (B, V) float32, by inverting the distribution at uniform (B,).

    top_k, top_p (Holtzman et al. 2020) and min_p (Nguyen et al. 2024) filter in this order, as in
    transformers. A number a row makes the draw independent of the rest of the batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        beyond[:, 0] = False
        probs = probs.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    mass = probs.cumsum(-1)
    below = mass <= uniform[:, None] * (1 - 2**-20) * mass[:, -1:]
    return below.sum(-1)


@torch.no_grad()
def generate(
    net,
    tok,
    prompts,
    *,
    max_new_tokens=100,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    seed=0,
    stop=(),
    num_beams=1,
    on_text=None,
):
    """Continue each prompt (a text, or token ids); returns [Generation], one a prompt.

    temperature 0 is greedy. A row ends at one of tok.eos_ids, at a stop string, after max_new_tokens,
    or when prompt and answer fill the context. Row i draws from (seed, i) alone, whatever its batch.
    on_text(i, piece) gets the text as it is made. On a GPU the host reads step t - 1's tokens while
    the device computes step t, so that it never waits for the newest token.
    """
    stop = [stop] if isinstance(stop, str) else [s for s in stop if s]
    prompts = [tok.prompt(p) if isinstance(p, str) else list(p) for p in prompts]
    n_ctx, device = net.config.n_ctx, net.lm_head.weight.device
    for p in prompts:
        if not 0 < len(p) < n_ctx:
            why = (
                "is empty" if not p else f"has {len(p)} tokens, but the model's context is {n_ctx}"
            )
            raise UserError(f"the prompt {why}: it must leave room for an answer")
    if not prompts or max_new_tokens < 1:
        return [Generation() for _ in prompts]
    training = net.training
    net.eval()
    try:
        if num_beams > 1:
            rows = [beam_search(net, tok, p, max_new_tokens, num_beams, stop) for p in prompts]
            for i, row in enumerate(rows if on_text else ()):
                on_text(i, row.text)
            return rows
        B, limits = len(prompts), [min(max_new_tokens, n_ctx - len(p)) for p in prompts]
        logits, cache = prefill(net, prompts, max(len(p) + n for p, n in zip(prompts, limits)))
        draws = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(B)]
        draws = torch.stack([torch.rand(max(limits), generator=g) for g in draws]).to(device)
        seen = torch.zeros(B, logits.shape[-1], dtype=torch.bool, device=device)
        for i, p in enumerate(prompts):
            seen[i, p] = True
        rows, streams = [Generation() for _ in prompts], [TextStream(stop) for _ in prompts]
        live, pending = set(range(B)), deque()

        def read():
            """Take the oldest step's tokens from the device, and end the rows that are done."""
            tokens, chances, ready = pending.popleft()
            if ready is not None:
                ready.synchronize()
            for i, token, chance in zip(range(B), tokens.tolist(), chances.tolist()):
                if i not in live:
                    continue
                row, stream = rows[i], streams[i]
                row.ids.append(token)
                row.logprobs.append(chance)
                ended = token in tok.eos_ids
                full = len(row.ids) == limits[i]
                piece = stream.feed(tok.token_bytes(token), final=ended or full)
                if piece and on_text:
                    on_text(i, piece)
                if ended or full or stream.stopped:
                    live.discard(i)
                    row.finish_reason = "stop" if ended or stream.stopped else "length"
                    row.text = stream.text

        for t in range(max(limits)):
            logits = logits.float()
            logits[:, tok.n_vocab :] = -math.inf
            plain = logits.log_softmax(-1)
            if repetition_penalty != 1:
                punished = torch.where(
                    logits > 0, logits / repetition_penalty, logits * repetition_penalty
                )
                logits = torch.where(seen, punished, logits)
            tokens = choose_tokens(logits, draws[:, t], temperature, top_k, top_p, min_p)
            seen.scatter_(1, tokens[:, None], True)
            pending.append(to_host(tokens, plain.gather(1, tokens[:, None])[:, 0]))
            if len(pending) > (device.type == "cuda"):
                read()
            if not live or t + 1 == max(limits):
                break
            logits = net.lm_head(net.hidden(tokens[:, None], cache=cache)[:, -1])
        while pending:
            read()
        return rows
    finally:
        net.train(training)


def to_host(tokens, chances):
    """Start copying (tokens, chances) to the host; the third is the event to wait for, or None."""
    if tokens.device.type != "cuda":
        return tokens, chances, None
    copies = [torch.empty_like(t, device="cpu", pin_memory=True) for t in (tokens, chances)]
    for copy, t in zip(copies, (tokens, chances)):
        copy.copy_(t, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return *copies, ready


def prefill(net, prompts, max_len):
    """Run the prompts (lists of ids) into a new cache: the logits (B, V) after each, and the cache."""
    device = net.lm_head.weight.device
    dtype = net.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(net.config, len(prompts), max_len, device, dtype)
    n = torch.tensor([len(p) for p in prompts], device=device)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
    h = net.hidden(ids, cache=cache, n_new=n)
    return net.lm_head(h[torch.arange(len(prompts), device=device), n - 1]), cache


def beam_search(net, tok, prompt, max_new_tokens, num_beams, stop=()):
    """The continuation with the highest mean log-probability that a search of num_beams finds."""
    limit = min(max_new_tokens, net.config.n_ctx - len(prompt))
    logits, cache = prefill(net, [prompt], len(prompt) + limit)
    cache.reorder(torch.zeros(num_beams, dtype=torch.int64, device=logits.device))
    beams, ended = [([], [])], []  # (ids, logprobs) each
    logits = logits.expand(num_beams, -1)
    for t in range(limit):
        logits = logits.float()
        logits[:, tok.n_vocab :] = -math.inf
        chances = logits.log_softmax(-1)[: len(beams)]
        totals = chances + torch.tensor([[sum(lp)] for _, lp in beams], device=logits.device)
        best = totals.flatten().topk(min(2 * num_beams, totals.numel())).indices.tolist()
        grown, origin = [], []
        for row, token in (divmod(b, totals.shape[1]) for b in best):
            if totals[row, token] == -math.inf or len(grown) == num_beams:
                continue
            ids, lp = beams[row]
            beam = (ids + [token], lp + [chances[row, token].item()])
            if token in tok.eos_ids:
                ended.append(beam)
            else:
                grown.append(beam)
                origin.append(row)
        beams = grown
        if len(ended) >= num_beams or not beams or t + 1 == limit:
            break
        rows = torch.tensor(origin + [0] * (num_beams - len(origin)), device=logits.device)
        cache.reorder(rows)
        tokens = torch.tensor([ids[-1] for ids, _ in beams], device=logits.device)
        tokens = F.pad(tokens, (0, num_beams - len(beams)))
        logits = net.lm_head(net.hidden(tokens[:, None], cache=cache)[:, -1])
    whole = ended if len(ended) >= num_beams else ended + beams
    ids, lp = max(whole, key=lambda beam: sum(beam[1]) / len(beam[1]))
    stream = TextStream(stop)
    stream.feed(b"".join(map(tok.token_bytes, ids)), final=True)
    reason = "stop" if stream.stopped or ids[-1] in tok.eos_ids else "length"
    return Generation(ids, stream.text, lp, reason)


# ---------------------------------------------------------------------------------------------------
# The tokenizer: Hugging Face's tokenizer.json, run by tiktoken (byte-level BPE) or here (characters)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHARACTERS = r"[\s\S]"


def byte_letters():
    """GPT-2's table: the printable letter that stands for each byte in a tokenizer.json."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}


class Tokenizer:
    """Text to ids and back. `spec` and `config` are tokenizer.json and tokenizer_config.json, parsed.

    n_vocab counts the ids; bos_id, pad_id (or None) and eos_ids name special ones. Special tokens are
    never read from text: only `chat` and `prompt` add them.
    """

    def __init__(self, spec, config):
        self.spec, self.config = spec, config
        self.special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        model, vocab = spec["model"], spec["model"].get("vocab", {})
        split = self._pattern()
        if model.get("type") == "BPE" and split:
            self._init_bpe(model, split)
        elif model.get("type") == "WordLevel" and split == CHARACTERS:
            self._vocab, self._unk = vocab, vocab.get(model.get("unk_token"))
            self._bytes = {i: c.encode() for c, i in vocab.items() if c not in self.special}
            self._bpe = None
        else:
            raise UserError(
                f"tokenizer.json: a {model.get('type')} tokenizer of this form is not supported"
                " (byte-level BPE and characters are)"
            )
        self.n_vocab = 1 + max([*self._bytes, *self.special.values()])
        self.bos_id, self.pad_id = self._named("bos_token"), self._named("pad_token")
        self.eos_ids = [i for i in [self._named("eos_token")] if i is not None]
        # Whether text begins with bos is the post-processor's word, as in Hugging Face.
        post = spec.get("post_processor") or {}
        single = [p.get("single") for p in post.get("processors", [post])]
        first = [s[0].get("SpecialToken") for s in single if s]
        self._start = [self.special[t["id"]] for t in first if t]

    @classmethod
    def from_folder(cls, folder):
        """Read tokenizer.json, and where present tokenizer_config.json and generation_config.json."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder}: no tokenizer.json here (python prepare.py makes data/python)"
            )
        config = read_json(folder / "tokenizer_config.json", {})
        if (folder / "chat_template.jinja").is_file():
            config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        tok = cls(read_json(folder / "tokenizer.json"), config)
        ends = read_json(folder / "generation_config.json", {}).get("eos_token_id")
        if ends is not None:
            tok.eos_ids = ends if isinstance(ends, list) else [ends]
        return tok

    def _named(self, key):
        name = self.config.get(key)
        return self.special.get(name["content"] if isinstance(name, dict) else name)

    def _pattern(self):
        """The regular expression that splits text into pieces, or None where the form is another."""
        pre = self.spec.get("pre_tokenizer") or {}
        if self.spec.get("normalizer") or self.spec["model"].get("byte_fallback"):
            return None
        steps = pre.get("pretokenizers", [pre])
        last = steps[-1]
        if last.get("type") == "ByteLevel" and last.get("add_prefix_space"):
            return None
        if len(steps) == 1 and last.get("type") == "ByteLevel" and last.get("use_regex", True):
            return GPT2_SPLIT
        whole = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        bytes_after = (
            len(steps) == 2 and last.get("type") == "ByteLevel" and not last.get("use_regex", True)
        )
        if steps[0].get("type") == "Split" and whole and (bytes_after or len(steps) == 1):
            return steps[0]["pattern"].get("Regex")
        return None

    def _init_bpe(self, model, split):
        import tiktoken  # here, since a tokenizer of characters needs none of it

        letters = {c: b for b, c in byte_letters().items()}
        try:
            ranks = {
                bytes(letters[c] for c in t): i
                for t, i in model["vocab"].items()
                if t not in self.special
            }
        except KeyError as letter:
            raise UserError(
                f"tokenizer.json: {letter} stands for no byte: not a byte-level BPE"
            ) from None
        pairs = (m if isinstance(m, list) else m.split(" ") for m in model["merges"])
        made = [model["vocab"]["".join(pair)] for pair in pairs]
        ordered = all(a < b for a, b in zip(made, made[1:])) or model.get("ignore_merges")
        if not ordered or any(bytes([b]) not in ranks for b in range(256)):
            raise UserError(
                "tokenizer.json: ids are not in the order of the merges, or a byte is missing"
            )
        self._bytes = {i: t for t, i in ranks.items()}
        self._bpe = tiktoken.Encoding(
            "barelm", pat_str=split, mergeable_ranks=ranks, special_tokens=self.special
        )

    def encode(self, text):
        """The ids of `text`, which is text alone: nothing is added, no special token is read."""
        if self._bpe:
            return self._bpe.encode_ordinary(text)
        return [self._vocab.get(c, self._unk) for c in text]

    def encode_batch(self, texts, threads=1):
        """`encode` for many texts, on several threads where the tokenizer can."""
        if self._bpe:
            return self._bpe.encode_ordinary_batch(texts, num_threads=threads)
        return [self.encode(t) for t in texts]

    def prompt(self, text):
        """The ids that a text to be continued starts with: bos where the tokenizer says so (or where
        there is nothing else), then the text."""
        start = self._start or ([] if text or self.bos_id is None else [self.bos_id])
        return start + self.encode(text)

    def token_bytes(self, id):
        """The bytes that the token stands for; none for a special or unused one."""
        return self._bytes.get(id, b"")

    def decode(self, ids):
        """The text of ids, special tokens by their names; bytes that are no UTF-8 become U+FFFD."""
        names = {i: name.encode() for name, i in self.special.items()}
        return b"".join(self._bytes.get(i) or names.get(i, b"") for i in ids).decode(
            "utf-8", "replace"
        )

    def chat(self, messages, add_generation_prompt=False):
        """Render [{"role", "content"}] by the chat template: (ids, loss mask of 0 and 1, one an id).

        The mask covers each assistant's text and its end token. Contents are text: a special token's
        name inside one is hidden behind a letter while the template runs.
        """
        hide = next(
            c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in str(m) for m in messages)
        )
        names = re.compile(
            "(" + "|".join(map(re.escape, sorted(self.special, key=len)[::-1])) + ")"
        )
        veil = lambda s: names.sub(lambda m: m[0][0] + hide + m[0][1:], s)
        safe = [{k: veil(v) if isinstance(v, str) else v for k, v in m.items()} for m in messages]
        text = self._render(safe, add_generation_prompt)
        said = bytearray(len(text))  # 1 at each character that an assistant says
        for i, message in enumerate(safe):
            if message["role"] == "assistant":
                begin, end = len(self._render(safe[:i], True)), len(self._render(safe[: i + 1]))
                end = max((m.end() for m in names.finditer(text, begin, end)), default=end)
                said[begin:end] = b"\1" * (end - begin)
        ids, mask, at = [], [], 0
        for stretch in names.split(text):
            inside, at = said[at : at + len(stretch)], at + len(stretch)
            if stretch in self.special:
                ids.append(self.special[stretch])
                mask.append(inside[0])
                continue
            plain = [(c, m) for c, m in zip(stretch, inside) if c != hide]
            new = self.encode("".join(c for c, _ in plain))
            # A token counts as said where its first byte (its character, without bytes) does.
            marks = [m for c, m in plain for _ in (c.encode() if self._bpe else c)]
            for id in new:
                ids.append(id)
                mask.append(marks[0])
                del marks[: len(self._bytes[id]) if self._bpe else 1]
        return ids, mask

    def _render(self, messages, add_generation_prompt=False):
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self.config.get("chat_template")
        if not template:
            raise UserError("this tokenizer has no chat template: chat needs a model tuned for it")

        def raise_exception(message):
            raise TemplateError(message)

        room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        room.globals["raise_exception"] = raise_exception
        text = {
            k: self.decode([i])
            for k in ("bos_token", "eos_token")
            if (i := self._named(k)) is not None
        }
        try:
            return room.from_string(template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **text
            )
        except TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {error}") from None


# ---------------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face folder; safetensors read and written here

SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_json(path, default=None):
    """The JSON object in the file; `default`, if given, where there is no file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


@contextlib.contextmanager
def whole_file(path, keep_temporary=False):
    """A binary file to write that appears under `path` when all of it is on the disk, or not at all.

    With keep_temporary it stays `path`.tmp, complete and synced, for the caller to rename.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not keep_temporary:
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(
                f"{path}: cannot be written: {error.strerror}; nothing was changed"
            ) from None
        raise


def write_json(path, value):
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_safetensors(file, tensors, metadata):
    """Write {name: tensor} and {str: str} to a binary file in the safetensors format."""
    names = {dtype: name for name, dtype in SAFE_DTYPES.items()}
    header, at = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        end = at + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for t in tensors.values():
        file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def safetensors_header(path, file):
    """Check the header of an open file: ({name: (dtype, shape, begin, end)}, metadata).

    Offsets are from the file's start. Anything that the format forbids is a UserError.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
        raise UserError(f"{path}: not a whole safetensors file (cut short, or another format)")

    def unique(pairs):
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=unique)
        metadata = header.pop("__metadata__", {})
        entries, at = {}, 0
        for name, e in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            dtype, shape, (begin, end) = SAFE_DTYPES[e["dtype"]], e["shape"], e["data_offsets"]
            numbers = all(type(n) is int and n >= 0 for n in [*shape, begin, end])
            if not numbers or begin != at or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not fill its place")
            entries[name], at = (dtype, shape, 8 + length + begin, 8 + length + end), end
        if at != size - 8 - length:
            raise ValueError(f"{size - 8 - length} bytes of data where the header has {at}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: malformed safetensors file: {error}") from None
    return entries, metadata


def read_safetensors(path):
    """({name: tensor}, metadata) of a file; the tensors own their memory."""
    try:
        with open(path, "rb") as file:
            entries, metadata = safetensors_header(path, file)
            tensors = {}
            for name, (dtype, shape, begin, end) in entries.items():
                data = bytearray(end - begin)
                file.seek(begin)
                file.readinto(data)
                tensors[name] = (
                    torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                )
                tensors[name] = tensors[name].view(shape)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return tensors, metadata


# GPTConfig field → config.json key, by model_type. Llama, Qwen2 and Qwen3 differ in three options.
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
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
FAMILIES = {  # model_type: (architecture, its keys, what GPTConfig must say for it)
    "qwen3": ("Qwen3ForCausalLM", LLAMA_KEYS, dict(qk_norm=True, bias=False, qkv_bias=False)),
    "qwen2": ("Qwen2ForCausalLM", LLAMA_KEYS, dict(qk_norm=False, bias=False, qkv_bias=True)),
    "llama": ("LlamaForCausalLM", LLAMA_KEYS, dict(qk_norm=False, qkv_bias=False)),
    "gpt2": ("GPT2LMHeadModel", GPT2_KEYS, dict(qk_norm=False, bias=True, qkv_bias=False)),
}
LLAMA_LIKE = dict(norm="rms", norm_place="pre", pos="rope", mlp="swiglu")
GPT2_LIKE = dict(norm="layer", norm_place="pre", pos="learned", mlp="gelu")


def family(c):
    """The Hugging Face model_type that holds this architecture, or "barelm" where none does."""
    for name, (_, keys, options) in FAMILIES.items():
        options = options | (GPT2_LIKE if name == "gpt2" else LLAMA_LIKE)
        heads = name != "gpt2" or c.n_kv_head == c.n_head and c.head_dim * c.n_head == c.n_embd
        if heads and all(getattr(c, k) == v for k, v in options.items()):
            return name
    return "barelm"


def to_hf_config(c, tok=None):
    """config.json for a GPTConfig, as a dict."""
    kind = family(c)
    ids = {"bos_token_id": tok.bos_id, "pad_token_id": tok.pad_id} if tok else {}
    ids |= {"eos_token_id": tok.eos_ids[0] if len(tok.eos_ids) == 1 else tok.eos_ids} if tok else {}
    out = {"model_type": kind, "torch_dtype": "float32", "dtype": "float32", **ids}
    if kind == "barelm":
        return out | asdict(c)
    architecture, keys, _ = FAMILIES[kind]
    out |= {"architectures": [architecture]} | {hf: getattr(c, ours) for ours, hf in keys.items()}
    if kind == "gpt2":
        pdrop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return out | pdrop | {"activation_function": "gelu_new", "n_ctx": c.n_ctx}
    rope = {"rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling}
    bias = {"attention_bias": c.bias, "mlp_bias": c.bias, "attention_dropout": 0.0}
    return out | rope | bias | {"hidden_act": "silu", "use_sliding_window": False}


def from_hf_config(d, where="config.json"):
    """The GPTConfig of a config.json, given as a dict; UserError where we cannot be exact."""
    kind = d.get("model_type")
    if kind == "barelm":
        return GPTConfig(**{f.name: d[f.name] for f in fields(GPTConfig) if f.name in d})
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type {kind!r} is not supported ({', '.join(FAMILIES)} are)"
        )
    _, keys, options = FAMILIES[kind]
    usual = {"tie": kind == "gpt2", "n_kv_head": 0, "head_dim": 0, "n_hidden": 0, "norm_eps": 1e-5}
    usual |= {"norm_eps": 1e-6} if kind != "gpt2" else {}
    c = {ours: d.get(hf) if d.get(hf) is not None else usual.get(ours) for ours, hf in keys.items()}
    missing = [keys[k] for k, v in c.items() if v is None]
    rope = d.get("rope_parameters") or {}
    theta = d.get("rope_theta") or rope.get("rope_theta") or 10000.0
    scaling = d.get("rope_scaling") or rope or None
    if scaling:
        scaling = {"rope_type": scaling.get("rope_type") or scaling.get("type"), **scaling}
        scaling = None if scaling["rope_type"] == "default" else scaling
    odd = [k for k in ("attention_bias", "mlp_bias") if kind != "llama" and d.get(k)]
    if kind == "llama":
        options = options | {"bias": bool(d.get("attention_bias"))}
        odd = ["mlp_bias"] if bool(d.get("mlp_bias")) != options["bias"] else []
    activation = d.get("activation_function", d.get("hidden_act"))
    odd += [] if activation in ("silu", "gelu_new", "gelu_pytorch_tanh") else ["activation"]
    odd += ["sliding_window"] if d.get("use_sliding_window") else []
    if missing or odd:
        raise UserError(
            f"{where}: {', '.join(missing or odd)} {'missing' if missing else 'not supported'}"
        )
    if kind == "gpt2":
        return GPTConfig(**c, **options, **GPT2_LIKE)
    return GPTConfig(**c, **options, **LLAMA_LIKE, rope_theta=theta, rope_scaling=scaling)


# GPT-2 writes its own names, its matrices (in, out), and q, k and v as one.
GPT2_NAMES = {
    "wte.": "model.embed_tokens.",
    "wpe.": "model.embed_positions.",
    "ln_f.": "model.norm.",
    "h.": "model.layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".attn.c_attn.": ".self_attn.qkv_proj.",
    ".mlp.c_fc.": ".mlp.up_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
}
TRANSPOSED = ("qkv_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")


def rename(name, table):
    """`name` with the table's parts replaced; those that begin a name count only at its beginning."""
    for old, new in table.items():
        name = name.replace(old, new) if old[0] == "." else re.sub("^" + re.escape(old), new, name)
    return name


def from_gpt2(tensors):
    """A GPT-2 file's tensors under our names (with or without the prefix `transformer.`)."""
    out = {}
    for name, t in tensors.items():
        name = rename(name.removeprefix("transformer."), GPT2_NAMES)
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks of old files
            continue
        t = t.t().contiguous() if name.endswith(TRANSPOSED) else t
        if "qkv_proj" in name:
            out |= {name.replace("qkv", x): part.clone() for x, part in zip("qkv", t.chunk(3))}
        else:
            out[name] = t
    return out


def to_gpt2(state):
    """Our tensors under a GPT-2 file's names."""
    back, out = {new: old for old, new in GPT2_NAMES.items()}, {}
    for name, t in state.items():
        if re.search(r"\.[kv]_proj\.", name):
            continue
        if ".q_proj." in name:
            name, t = (
                name.replace(".q_", ".qkv_"),
                torch.cat([state[name.replace(".q_", f".{x}_")] for x in "qkv"]),
            )
        t = t.t().contiguous() if name.endswith(TRANSPOSED) else t
        short = rename(name, back)
        out[short if short.startswith("lm_head") else "transformer." + short] = t
    return out


def checkpoint_tensors(folder):
    """All tensors of a folder's model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    if any(Path(n).name != n or not (folder / n).is_file() for n in names):
        raise UserError(f"{folder}: {', '.join(names)} not here: no checkpoint, or not all of one")
    return {k: v for n in names for k, v in read_safetensors(folder / n)[0].items()}


def load(folder, device="cpu", dtype=torch.float32):
    """Open a checkpoint folder, ours or Hugging Face's: (GPT in eval mode, Tokenizer)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (python train.py makes out/python)")
    config = from_hf_config(read_json(folder / "config.json"), folder / "config.json")
    tok = Tokenizer.from_folder(folder)
    if tok.n_vocab > config.vocab_size:
        raise UserError(f"{folder}: {tok.n_vocab} tokens, but the model knows {config.vocab_size}")
    tensors = checkpoint_tensors(folder)
    if family(config) == "gpt2":
        tensors = from_gpt2(tensors)
    if config.tie:
        tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight", torch.empty(0))
    with torch.device("meta"):
        net = GPT(config)
    want = {name: p.shape for name, p in net.state_dict().items()}
    bad = [n for n in want if n not in tensors or tensors[n].shape != want[n]]
    bad += [n for n in tensors if n not in want and not n.endswith("rotary_emb.inv_freq")]
    if bad:
        raise UserError(f"{folder}: tensors that config.json does not fit: {', '.join(bad[:3])}")
    net.load_state_dict({n: tensors[n].to(device, dtype) for n in want}, assign=True)
    if config.tie:
        net.lm_head.weight = net.model.embed_tokens.weight
    return net.requires_grad_().eval(), tok


def save(folder, net, tok, step=0, state=None):
    """Write a checkpoint folder; with `state` (tensors and plain values) also state.pt.

    Both large files are complete on the disk under temporary names before either is renamed, and both
    carry the step: a process killed at any moment leaves a pair that `load_state` can tell.
    """
    folder, c = Path(folder), net.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t for n, t in net.state_dict().items() if not (c.tie and n == "lm_head.weight")}
    tensors = to_gpt2(tensors) if family(c) == "gpt2" else tensors
    write_json(folder / "config.json", to_hf_config(c, tok))
    write_json(folder / "tokenizer.json", tok.spec)
    write_json(folder / "tokenizer_config.json", tok.config | {"model_max_length": c.n_ctx})
    ends = tok.eos_ids[0] if len(tok.eos_ids) == 1 else tok.eos_ids
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": ends, "pad_token_id": tok.pad_id}
    write_json(folder / "generation_config.json", ids)
    with whole_file(folder / "model.safetensors", keep_temporary=True) as file:
        write_safetensors(file, tensors, {"format": "pt", "step": str(step)})
    if state is not None:
        with whole_file(folder / "state.pt", keep_temporary=True) as file:
            torch.save(state | {"step": step}, file)
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    if state is not None:
        os.replace(folder / "state.pt.tmp", folder / "state.pt")


def load_state(folder, finish=True):
    """The training state that belongs to the folder's model.safetensors.

    A save that was cut between its two renames is finished here (by the main process: finish).
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder}: no checkpoint to resume (--init_from=scratch starts one)")
    with open(folder / "model.safetensors", "rb") as file:
        step = safetensors_header(folder / "model.safetensors", file)[1].get("step")
    for name in ("state.pt", "state.pt.tmp"):
        try:
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception:  # absent, cut short, or no file of ours: then it is not the one
            continue
        if str(state.get("step")) == step:
            if name.endswith(".tmp") and finish:
                os.replace(folder / name, folder / "state.pt")
            return state
    raise UserError(
        f"{folder}: no state.pt of the model's step {step}, so it cannot be resumed exactly; "
        f"--init_from={folder} with another --out_dir starts from its weights"
    )


# ---------------------------------------------------------------------------------------------------
# Optimizers


def orthogonalize(g, steps=5):
    """The nearest semi-orthogonal matrices to g (n, rows, columns), by Newton-Schulz iteration.

    The quintic of Muon (Jordan et al. 2024): singular values land between about 0.7 and 1.2.
    """
    x = g.bfloat16() if g.is_cuda else g.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for matrices.

    Steps are scaled by 0.2 sqrt(max(rows, columns)), which gives them AdamW's usual size (Liu et al.
    2025, section 2.2), so that one learning rate serves both. Equal shapes are computed at once.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape, p.device, p.dtype), []).append(p)
            for params in shapes.values():
                grads = [p.grad for p in params]
                moments = [
                    self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params
                ]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, moments, group["momentum"])  # Nesterov
                updates = orthogonalize(torch.stack(ahead)).unbind()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(params[0].shape))
                torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)


def make_optimizer(net, name="muon", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95):
    """The optimizers of a network, a list: AdamW for all, or Muon for the blocks' matrices besides.

    Weight decay is for parameters of two dimensions. Each group keeps its `initial_lr`.
    """
    if name not in ("adamw", "muon"):
        raise UserError(f"--optimizer={name}: expected muon or adamw")
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    inner = [p for n, p in named if p.ndim == 2 and ".layers." in n and name == "muon"]
    rest = [p for n, p in named if not any(p is q for q in inner)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    fused = all(p.device.type in ("cuda", "cpu") for p in rest)
    optimizers = (
        [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)] if groups else []
    )
    if inner:
        optimizers.append(Muon(inner, lr=lr, momentum=momentum, weight_decay=weight_decay))
    covered = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    if sorted(covered) != sorted(id(p) for _, p in named):
        raise AssertionError("the optimizer's groups do not cover every parameter once")
    for g in (g for o in optimizers for g in o.param_groups):
        g["initial_lr"] = lr
    return optimizers


def sync_grads(params):
    """Sum the gradients over all processes, in one flat all-reduce (none counts as zero)."""
    if not dist.is_initialized():
        return
    params = [p for p in params if p.requires_grad]
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params]
    )
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p)


# ---------------------------------------------------------------------------------------------------
# Accounting

PEAK_FLOPS = {  # dense bfloat16 FLOP/s, by a part of the device's name (the makers' data sheets)
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device):
    """The device's peak dense bfloat16 rate in FLOP/s, or None where we do not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def n_params(net):
    return sum(p.numel() for p in net.parameters())


def flops_per_token(c, seq_len, backward=True):
    """FLOPs per token in matrix products, a multiply and an add each counted (Kaplan et al. 2020).

    Attention counts the whole seq_len x seq_len square, as is usual; backward costs twice forward.
    """
    heads = c.n_embd * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head)
    mlp = c.n_embd * c.n_hidden * (3 if c.mlp == "swiglu" else 2)
    weights = c.n_layer * (heads + mlp) + c.n_embd * c.vocab_size
    attention = c.n_layer * 2 * c.n_head * c.head_dim * seq_len
    return 2 * (weights + attention) * (3 if backward else 1)


def memory_estimate(c, params, rows, seq_len, dtype=torch.float32, checkpoint=False, moments=2):
    """Bytes that training needs: (parameters, gradients and optimizer state; activations).

    rows: the micro-batch. An estimate of what autograd keeps, the attention matrix never being one
    of these; checkpoint: gradient checkpointing; moments: optimizer tensors a parameter.
    """
    width = dtype.itemsize
    heads = (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    block = 4 * 4 * c.n_embd + width * (
        2 * c.n_embd + 2 * heads + (4 if c.mlp == "swiglu" else 3) * c.n_hidden
    )
    token = c.n_layer * (4 * c.n_embd) + block if checkpoint else c.n_layer * block
    head = c.vocab_size * (width + 8)  # logits, their float32 copy and its gradient
    return params * 4 * (2 + moments), rows * seq_len * (token + head)


def free_memory(device):
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 2**20
    return pages * (os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096)
