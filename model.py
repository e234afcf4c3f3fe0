"""The one file that every stage shares: set-up, the network and its cache, generation, the
tokenizer, checkpoints, optimizers, accounting. It knows no stage and imports nothing of ours.

    net, tok = load("out/python")            # a Hugging Face folder, or a Hub model's name
    loss_sum, n_targets = net(ids, targets)  # ids, targets (B, T) int64
    [g] = generate(net, tok, ["import os\\n"], max_new_tokens=50)
    print(g.text, g.finish_reason)
"""

import bz2
import codecs
import contextlib
import copy
import ctypes
import gzip
import hashlib
import inspect
import io
import json
import lzma
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime
from decimal import Decimal
from functools import lru_cache, partial
from heapq import heappop, heappush
from itertools import chain, islice, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class UserError(SystemExit):
    """Something the user can mend, told in one line: what, where, what to do. Unhandled: exit 1."""


# --------------------------------------------------------------------------------------------------
# Set-up: device, processes, precision, progress


def setup(device="auto", timeout=None):
    """Choose the device and join the other processes, if torchrun started several: (device, rank,
    world, main) by these names; `main` is the one process that writes files. timeout: a timedelta,
    how long processes wait for each other before they give up."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device={device}: expected auto, cpu, cuda or cuda:1")
    place = torch.device(device)
    if place.type == "cuda":
        index = place.index or 0 if world == 1 else int(os.environ.get("LOCAL_RANK", rank))
        if index >= (count := torch.cuda.device_count()):
            raise UserError(f"--device={device}: GPU {index} of {count} on this machine: use cpu")
        place = torch.device("cuda", index)
        torch.cuda.set_device(place)
    elif sys.platform == "linux":
        # Freed memory stays with the process: no page faults when the next step takes it again.
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
                ctypes.CDLL(None).mallopt(option, value)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timeout)
    return SimpleNamespace(device=place, rank=rank, world=world, main=rank == 0)


@contextlib.contextmanager
def lost_process():
    """A line in the place of torch.distributed's traceback where another process is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo's words, then NCCL's
        words = ("closed by peer", "reset by peer", "Broken pipe", "remote worker")
        words += ("remote process exited", "Timed out waiting")
        if not any(word in str(error) for word in words):
            raise
        rank = os.environ.get("RANK", "0")
        raise UserError(
            f"process {rank}: another process of this run is gone, so that none can go on: its own "
            f"last lines, or the system's log, say why; what was saved is kept"
        ) from None


def choose_dtype(device, want="auto", n_embd=0):
    """The dtype to compute in, and why: (dtype, reason). In training, parameters are float32; a CPU
    gains by less only then, so that only training says its n_embd."""
    if want in ("float32", "bfloat16", "float16"):
        return getattr(torch, want), "as asked"
    if want != "auto":
        raise UserError(f"--dtype={want}: expected auto, float32, bfloat16 or float16")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "this GPU has fast bfloat16"
        return torch.float16, "this GPU has no fast bfloat16; gradients are scaled"
    has = torch.cpu.get_capabilities()
    if not (has.get("avx512_bf16") or has.get("amx_bf16")):
        return torch.float32, "this CPU has no fast bfloat16"
    if n_embd < 128:
        return torch.float32, "below width 128 the casts cost more than bfloat16 gains"
    return torch.bfloat16, "this CPU has fast bfloat16 and the model is wide enough to gain"


def compute_dtype(x):
    """The dtype that matrix products of x are computed in: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def autocast(device, dtype):
    """Compute in `dtype` inside this context; float32 is the plain path."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Progress:
    """One line of progress: rewritten in place on a terminal, printed every 5 s in a log."""

    def __init__(self):
        self.last, self.open = -math.inf, False  # when a line was printed; whether one is unended

    def __call__(self, line, last=False):
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
            self.open = not last
        elif last or time.monotonic() - self.last >= 5:
            print(line, flush=True)
            self.last = time.monotonic()

    def note(self, text):
        """Print `text` on lines of its own, between two states of the progress line."""
        print(("\n" if self.open else "") + text, flush=True)
        self.open = False


def duration(seconds):
    """Seconds as a person reads them: 42s, 3m10s, 2h05m."""
    m, s = divmod(int(seconds), 60)
    return f"{s}s" if m == 0 else f"{m}m{s:02d}s" if m < 60 else f"{m // 60}h{m % 60:02d}m"


# --------------------------------------------------------------------------------------------------
# Downloads

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/"
PATIENCE = 30  # seconds without a byte of a server's


def download(url, path, sha256=None, tries=5, headers=None, optional=False):
    """Fetch url into path: resumed, retried, checked, and under its name only when it is whole.
    None where it is optional and the server has no such file."""
    import requests  # here, since most runs need none of it

    if path.exists():
        return path
    part, show = path.with_name(path.name + ".part"), Progress()
    for attempt in range(1, tries + 1):
        try:
            fetch(url, part, show, headers or {})
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 0
            if optional and status == 404:
                return None
            why = why_no_answer(error, url)
            refused = 400 <= status < 500 and status not in (408, 416, 429)
            if refused or isinstance(error, ValueError):  # requests': what is no URL
                raise UserError(f"{url}: {why}") from None
            if attempt == tries:
                times = f", {tries} times: run it again to go on" if tries > 1 else ""
                raise UserError(f"{url}: {why}{times}") from None
            show.note(f"{url}: {why}; trying again ({attempt + 1} of {tries})")
            time.sleep(min(2 ** (attempt - 1), 30))
        except ValueError as error:  # of urllib3, which a few addresses meet
            raise UserError(f"{url}: {str(error)[:100]}: is the address right?") from None
        except BrokenPipeError:  # of the progress line: the script ends as `config` says
            raise
        except OSError as error:
            raise UserError(f"{part}: cannot be written: {error.strerror}") from None
    show(f"{path.name}: {part.stat().st_size / 1e6:,.1f} MB", last=True)
    if sha256 and (found := hashlib.sha256(part.read_bytes()).hexdigest()) != sha256:
        part.unlink()
        raise UserError(f"{url}: removed: its sha256 is {found}, not {sha256}")
    os.replace(part, path)
    return path


def why_no_answer(error, url):
    """What a requests.RequestException means, in a few words, and what to do about it."""
    from requests import exceptions

    if isinstance(error, exceptions.TooManyRedirects):
        return "it leads in a circle: is the address right?"
    if error.response is not None:
        return why_refused(error.response.status_code)
    if isinstance(error, ValueError):  # what is no URL
        return f"{' '.join(str(error).split())[:100]}: is the address right?"
    asked = error.request.url if error.request is not None else url  # others after a redirect
    host, cause = urlsplit(asked).hostname, system_error(error)
    reason = getattr(cause, "verify_message", None) or getattr(cause, "strerror", None)
    because = f" ({reason})" if reason else ""
    if isinstance(error, exceptions.ProxyError):
        return f"the proxy cannot be reached{because}: are HTTP_PROXY and HTTPS_PROXY right?"
    if isinstance(error, exceptions.SSLError):
        advice = "REQUESTS_CA_BUNDLE names a file of certificates to trust"
        return f"no secure connection to {host}{because}: {advice}"
    if isinstance(error, exceptions.Timeout) or "timed out" in str(error):
        return f"{host} does not answer in time: is there a network?"
    if isinstance(cause, socket.gaierror):
        return f"{host} is not found{because}: is there a network, and the name right?"
    if isinstance(cause, ConnectionResetError):
        return f"{host} cut the connection"
    if cause is not None:
        return f"{host} cannot be reached{because}: is there a network, and the address right?"
    if isinstance(error, exceptions.ContentDecodingError):
        return f"{host} sent what cannot be unpacked"
    if error.args and isinstance(error.args[0], str):
        return error.args[0]  # as `fetch` says it
    return f"{host} cut the connection"


def why_refused(status):
    """What a server's answer of this status means, and what to do about it."""
    if status in (401, 403):
        hint = "it is not there, or not without a token: HF_TOKEN holds the one for the Hub"
    elif status == 404:
        hint = "there is no such file: is the address right?"
    elif status == 407:
        hint = "the proxy wants a name and a password, in HTTPS_PROXY"
    elif status == 429:
        hint = "too many requests: try it later"
    elif status >= 500:
        hint = "the server has failed: try it later"
    else:
        hint = "is the address right?"
    return f"HTTP {status}: {hint}"


def system_error(error):
    """The operating system's OSError below requests' and urllib3's errors, or None."""
    names = ("__cause__", "reason", "original_error")
    for cause in [*(getattr(error, name, None) for name in names), *error.args]:
        found = system_error(cause) if isinstance(cause, Exception) else None
        if found is not None:
            return found
    own = type(error).__module__ in ("builtins", "socket", "ssl")
    return error if own and isinstance(error, OSError) else None


def fetch(url, part, show, headers):
    """Add to the file `part` what it lacks of url, or raise a requests.RequestException."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = headers | ({"Range": f"bytes={have}-"} if have else {})
    headers["Accept-Encoding"] = "identity"  # so that Content-Length counts the bytes we write
    with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as answer:
        if answer.status_code == 416 and have:  # the part is longer than the file, or all of it
            os.truncate(part, 0)
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0  # the server does not resume: from the beginning
        length = answer.headers.get("Content-Length")
        size = have + int(length) if length else None
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if have else "wb") as file:
            for piece in answer.iter_content(1 << 16):
                file.write(piece)
                have += len(piece)
                show(f"{part.stem}: {have / 1e6:,.1f} of {(size or have) / 1e6:,.1f} MB")
            file.flush()
            os.fsync(file.fileno())  # its name will say that it is whole
    if size is not None and have != size:
        raise requests.ConnectionError(f"{have} of {size} bytes came")


# --------------------------------------------------------------------------------------------------
# The network

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


PACKS = None  # while generating: {first layer: the product of it and its neighbours}


@contextlib.contextmanager
def generating(net):
    """Within, net is in eval mode, and a CPU keeps the matrices that it multiplies with in the
    layout that oneDNN reads fastest for a few rows, which takes a second copy of the weights. They
    must not change meanwhile; one thread of a process at a time."""
    global PACKS
    before, training, device = PACKS, net.training, net.model.embed_tokens.weight.device
    if PACKS is None and device.type == "cpu" and torch.backends.mkldnn.is_available():
        PACKS = {}
    net.eval()
    try:
        yield
    finally:
        PACKS = before
        net.train(training)


def joint(x, *layers):
    """The outputs of linear layers that read the same x, side by side: one product for all."""
    kinds, learn = {type(f) for f in layers}, torch.is_grad_enabled()
    if PACKS is not None and not learn and kinds in ({nn.Linear}, {QuantizedLinear}):
        dtype = compute_dtype(x)
        if layers[0] not in PACKS:
            PACKS[layers[0]] = pack(layers, dtype)
        if packed := PACKS[layers[0]]:
            return packed(x.to(dtype))
    if len(layers) == 1:
        return layers[0](x)
    if not learn or kinds != {nn.Linear}:  # to join weights would read them twice; or adapted
        return torch.cat([f(x) for f in layers], -1)
    bias = None if layers[0].bias is None else torch.cat([f.bias for f in layers])
    return F.linear(x, torch.cat([f.weight for f in layers]), bias)


def pack(layers, dtype):
    """A function of x that multiplies with the layers' matrices, joined and packed; or None where
    oneDNN has no such product of this dtype."""
    weight = torch.cat([f.weight for f in layers])
    bias = None if layers[0].bias is None else torch.cat([f.bias for f in layers]).to(dtype)
    if isinstance(layers[0], QuantizedLinear):
        scale, packed = torch.cat([f.scale for f in layers]), None
        if weight.dtype == torch.uint8 and len(weight) % 16 == 0:
            codes = unpack_int4(weight).int()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
            packed = packed, scale.transpose(0, 1).contiguous()
        return lambda x: quantized_product(x, weight, scale, bias, packed)
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and has_bfloat16()):
        return None
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 16)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class QuantizedLinear(nn.Module):
    """A linear layer of 1 byte or half of one a weight, for inference. int8: codes (out, in) and a
    scale a row, its largest weight over 127. int4: two codes a byte (out, in / 2), and for
    each group of 64 in a row a step and a middle (out, in / 64, 2), by which its minimum and its
    maximum are kept: a weight is (code - 8) step + middle. Rows are padded to whole groups. A
    weight of zero, which pruning makes, stays exactly zero in both."""

    def __init__(self, layer, kind):
        super().__init__()
        self.shape = layer.weight.shape
        w = layer.weight.detach().float()
        if kind == "int8":
            scale = (w.abs().amax(1).clamp(min=1e-30) / 127).bfloat16()  # as the product takes it
            codes = (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        else:
            padding = (0, -w.shape[1] % 64)
            groups = F.pad(w, padding).unflatten(1, (-1, 64))
            has_zero = F.pad(w == 0, padding).unflatten(1, (-1, 64)).any(2)
            low, high = groups.amin(2), groups.amax(2)
            step = ((high - low) / 15).clamp(min=1e-30)
            step = step.bfloat16().where(~has_zero, few_bits(step))
            middle = low + 8 * step.float()
            # Where a weight is zero, so is a level: the middle is a whole number of steps.
            whole = (middle / step.float()).round().clamp(-7, 8) * step.float()
            scale = torch.stack((step, middle.where(~has_zero, whole).bfloat16()), 2)
            codes = (groups - scale[..., 1:].float()) / step.float()[..., None] + 8
            codes = codes.round().clamp(0, 15).to(torch.uint8).flatten(1)
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x):
        return quantized_product(x, self.weight, self.scale, self.bias)


def few_bits(step):
    """Positive steps as bfloat16, rounded up to 5 bits: the product of one and a whole number below
    8 has no more than bfloat16's 8 bits, so that it is exact."""
    fraction, exponent = torch.frexp(step)  # from 1/2 to 1
    return torch.ldexp((fraction * 32).ceil() / 32, exponent).bfloat16()


def unpack_int4(codes):
    """The codes (out, in) uint8 of two a byte (out, in / 2)."""
    return torch.stack((codes & 15, codes >> 4), 2).flatten(1)


def dequantize(codes, scale):
    """The weights (out, in) float32 that a QuantizedLinear's codes stand for."""
    if codes.dtype == torch.int8:
        return codes.float() * scale.float()[:, None]
    step, middle = scale.float().split(1, 2)
    return ((unpack_int4(codes).float() - 8).unflatten(1, (-1, 64)) * step + middle).flatten(1)


def quantized_product(x, codes, scale, bias, packed=None):
    """x (..., in) times a quantized weight, plus bias. packed: int4's codes and scale in the layout
    of torch's product on a CPU. It and int8's take bfloat16 and make no copy of the weights, which
    pays for a few rows (measured at 4096 x 768)."""
    rows, cpu = x.reshape(-1, x.shape[-1]), x.device.type == "cpu"
    if codes.dtype == torch.int8:
        whole = rows.shape[1] % 16 == 0  # other widths torch's product reads beyond their end
        if cpu and whole and len(rows) <= 16:
            y = torch._weight_int8pack_mm(rows.bfloat16(), codes, scale).to(x.dtype)
        else:
            y = F.linear(rows, codes.to(x.dtype)) * scale.to(x.dtype)
    else:
        rows = F.pad(rows, (0, -rows.shape[1] % 64))
        if cpu and packed and len(rows) <= 512:
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            y = multiply(rows.bfloat16(), packed[0], 64, packed[1]).to(x.dtype)
        else:
            y = F.linear(rows, dequantize(codes, scale).to(x.dtype))
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(y.dtype)


class Adapter(nn.Module):
    """A linear layer and a bottleneck behind it (Houlsby et al. 2019), which starts as nothing."""

    def __init__(self, base, size):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.out_features, size, device=base.weight.device)
        self.up = nn.Linear(size, base.out_features, device=base.weight.device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        y = self.base(x)
        return y + self.up(F.gelu(self.down(y)))


def add_adapters(net, size):
    """Put a bottleneck of this size behind each attention and each MLP, in place."""
    net.adapter_size = size
    for block in net.model.layers:
        block.self_attn.o_proj = Adapter(block.self_attn.o_proj, size)
        block.mlp.down_proj = Adapter(block.mlp.down_proj, size)


def quantize_weights(net, kind):
    """Make the network's linear layers int8 or int4, in place: the head too (a tied embedding then
    has the head's values), but not a classifier's."""
    if kind not in ("int8", "int4"):
        raise UserError(f"--quantize={kind}: expected int8 or int4")
    if net.quantize not in (None, kind):
        raise UserError(f"--quantize={kind}: this model is {net.quantize} already")
    kept = () if net.score is None else (net.score, net.lm_head)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear) and layer not in kept:
            # The head (and embedding) of a small model is much of it, and int4 costs it most.
            width = "int8" if name == "lm_head" else kind
            net.set_submodule(name, QuantizedLinear(layer, width))
    net.quantize = kind
    tie_embedding(net, net.model.embed_tokens.weight.dtype)
    return net


def tie_embedding(net, dtype):
    """Make one of the embedding and the head, where the config ties them."""
    table = net.model.embed_tokens
    if net.config.tie and isinstance(net.lm_head, QuantizedLinear):
        weight = dequantize(net.lm_head.weight, net.lm_head.scale)[:, : net.config.n_embd]
        table.weight = nn.Parameter(weight.to(dtype))
    elif net.config.tie:
        net.lm_head.weight = table.weight


class BlockedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v as plain matrix products over blocks of queries, without the keys
    that lie behind a block: on a CPU two to three times as fast as its fused kernel in bfloat16.
    Keeps the probabilities, in q's dtype, which the fused one computes twice.

    q (B, H, T, D), k and v (B, n_kv_head, T, D), unseen (1 or B, 1, T, T) bool, true where a query
    may not look (at least at what is behind it). Blocks are joined, not written into a result: see
    LinearCrossEntropy."""

    @staticmethod
    def forward(ctx, q, k, v, unseen):
        B, H, T, D = q.shape
        G, size = k.shape[1], max(128, -(-T // 4))
        q, k, v = (q * D**-0.5).reshape(B, G, -1, T, D), k.contiguous(), v.contiguous()
        y, probabilities = [], []
        for i in range(0, T, size):
            j = min(i + size, T)
            p = q[..., i:j, :].reshape(B, G, -1, D) @ k[:, :, :j].mT
            p = p.view(B, G, -1, j - i, j).masked_fill_(unseen[:, :, None, i:j, :j], -math.inf)
            p = p.softmax(-1).view(B, G, -1, j)  # (B, n_kv_head, H / n_kv_head * (j - i), j)
            y.append((p @ v[:, :, :j]).view(B, G, -1, j - i, D))
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        return torch.cat(y, -2).view(B, H, T, D)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *probabilities = ctx.saved_tensors
        B, G, _, T, D = q.shape
        dy, dq = dy.reshape(q.shape), []
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        i = 0
        for p in probabilities:
            j = p.shape[-1]
            dy_block = dy[..., i:j, :].reshape(B, G, -1, D)
            q_block = q[..., i:j, :].reshape(B, G, -1, D)
            ds = torch._softmax_backward_data(dy_block @ v[:, :, :j].mT, p, -1, p.dtype)
            dq.append((ds @ k[:, :, :j]).view(B, G, -1, j - i, D))
            dk = dk + F.pad(ds.mT @ q_block, (0, 0, 0, T - j))  # no key behind j was seen
            dv = dv + F.pad(p.mT @ dy_block, (0, 0, 0, T - j))
            i = j
        return (torch.cat(dq, -2) * D**-0.5).view(B, -1, T, D), dk, dv, None


def attend(q, k, v, mask=None, dropout=0.0):
    """Attention of q (B, H, T, D) to k and v (B, n_kv_head, S, D): causal where mask is None, else
    where mask (B, 1, T, S) bool is true. The fastest of the ways that this device has."""
    T = q.shape[2]
    halved = q.device.type == "cpu" and q.dtype != torch.float32  # products far faster than sums
    if halved and 1 < T == k.shape[2] <= 1024 and not dropout:
        unseen = torch.ones(1, 1, T, T, dtype=torch.bool).triu(1) if mask is None else ~mask
        return BlockedAttention.apply(q, k, v, unseen)
    grouped, causal = q.shape[1] != k.shape[1], mask is None and bool(T > 1)  # T may be symbolic
    args = (q.to(k.dtype), k, v, mask, dropout, causal)
    return F.scaled_dot_product_attention(*args, enable_gqa=grouped).to(q.dtype)


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


class LinearCrossEntropy(torch.autograd.Function):
    """The head and its loss in one, some rows at a time: no more logits than one piece's exist,
    and since the loss is a sum, each piece's gradients are made with it.

    h (N, C), weight (V, C), targets (N,) int64, -100 meaning none; learn: whether gradients are
    wanted; size: rows of a piece. Returns the sum of -log p in nats, float32.

    What is saved for backward is made whole and is never written to, here or in backward: a
    compiled network of torch 2.11 loses writes into a tensor that its backward reads."""

    @staticmethod
    def forward(ctx, h, weight, targets, learn, size):
        total = torch.zeros((), device=h.device)
        dh, dw = [], 0.0
        grad_dtype, weight = weight.dtype, weight.to(h.dtype)
        for x, t in zip(h.split(size), targets[:, None].split(size)):
            logp = (x @ weight.T).float().log_softmax(-1)  # (size, V)
            valid, t = t >= 0, t.clamp(min=0)
            total = total - logp.gather(1, t).where(valid, 0.0).sum()
            if learn:
                # softmax less one-hot, in the logits' own memory, which nothing else reads
                d = logp.exp_().scatter_add_(1, t, torch.full_like(t, -1, dtype=logp.dtype))
                d = d.mul_(valid).to(h.dtype)
                dh.append(d @ weight)
                dw = dw + (d.T @ x).to(grad_dtype)
        if learn:
            ctx.save_for_backward(torch.cat(dh), dw)
        return total

    @staticmethod
    def backward(ctx, g):
        dh, dw = ctx.saved_tensors
        return (dh.float() * g).to(dh.dtype), dw * g, None, None, None


def head_rows(device_type, dtype, vocab_size):
    """Of how many rows the logits are made at once."""
    rows = max(1024, (1 << (20 if device_type == "cpu" else 29)) // vocab_size)
    # In float16 a piece's sum of gradients comes before the scale: keep it small.
    return min(rows, 4096) if dtype == torch.float16 else rows


def cross_entropy_sum(h, weight, targets):
    """The sum of -log p(target) in nats, float32, under the logits h @ weight.T: h (N, C), weight
    (V, C), targets (N,) int64 of which -100 counts for nothing."""
    h = h.to(compute_dtype(h))
    size = head_rows(h.device.type, h.dtype, len(weight))
    return LinearCrossEntropy.apply(h, weight, targets, torch.is_grad_enabled(), size)


def logprobs(net, ids, targets):
    """log p(targets) (B, T) float32 under net at each position of ids (B, T); 0 where -100, and
    no logits are made there."""
    wanted = targets != -100
    logits = joint(net.hidden(ids)[wanted], net.lm_head).float()
    found = -F.cross_entropy(logits, targets[wanted], reduction="none")
    return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(wanted, found)


# --------------------------------------------------------------------------------------------------
# The KV cache and generation


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


# --------------------------------------------------------------------------------------------------
# Answers that are a number, as GSM8K's (Cobbe et al. 2021), for a reward and for an evaluation

NUMBER = r"\d[\d,]*(?:\.\d+)?|\.\d+"
MINUS = "\N{MINUS SIGN}"  # U+2212, which models write as often as the hyphen
GSM8K_STOP = ["Question:", "</s>", "<|im_end|>"]  # where an answer ends: lm-eval's


def to_number(sign, digits):
    """The exact value of a sign ("", -, + or MINUS) and digits with commas."""
    value = Decimal(digits.replace(",", ""))
    return -value if sign in ("-", MINUS) else value


def last_number(text):
    """The last number of a text as a Decimal, or None."""
    numbers = re.findall(rf"([-{MINUS}]?)\$?({NUMBER})", text)
    return to_number(*numbers[-1]) if numbers else None


def marked_number(text):
    """The number right behind the first #### that has one, as a Decimal, or None."""
    sign, space = f"([-+{MINUS}]?)", r"[^\S\n]*"
    match = re.search(rf"####{space}{sign}{space}\$?{space}{sign}({NUMBER})", text)
    if match is None:
        return None
    before_dollar, behind_dollar, digits = match.groups()
    return to_number(before_dollar or behind_dollar, digits)


def gsm8k_answer(text):
    """The number that a GSM8K answer gives: the one behind its first ####, or the last one of a
    text without that mark; None where there is none."""
    return marked_number(text) if "####" in text else last_number(text)


# --------------------------------------------------------------------------------------------------
# The tokenizer: Hugging Face's tokenizer.json, byte-level BPE run by tiktoken, other kinds here
# (SentencePiece's BPE, Unigram, WordPiece, words and characters)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each numeral apart, then GPT2_SPLIT: white space before a numeral is the end of its piece.
DIGITS_SPLIT = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
CHARACTERS = r"[\s\S]"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Each of these matches something wherever it stands: no text is between their matches.
GAPLESS = {GPT2_SPLIT, DIGITS_SPLIT, QWEN2_SPLIT, LLAMA3_SPLIT, CHARACTERS}
BERT_WORDS = r"(?:(?!\p{Han})[\p{L}\p{M}\p{N}])+|\S"  # punctuation and Chinese stand alone
BEHAVIORS = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"}
SAME_ESCAPES = set("pPdDsSnrtfAzx0")  # letters behind a backslash that all engines read alike
ONIGURUMA_WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}²³¹¼½¾"  # its \w, which others read otherwise
ANY_LETTERS = "aA1 .'\n漢\u0301_ "
LONG_TEXT = 300_000  # characters: a third of the run of blanks that overflows tiktoken
SPLIT_SECONDS = 30  # a pattern that takes longer for a short text has no end
NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
# The models that run here, and by what form of pre-tokenizer each is fed.
FORMS = [("BPE", "ByteLevel"), ("BPE", "Metaspace"), ("Unigram", "ByteLevel")]
FORMS += [("WordLevel", "Split"), ("WordPiece", "Split")]
SUPPORTED = "byte-level or SentencePiece's BPE, Unigram, words, characters, WordPiece; split by "
SUPPORTED += "Split, normalised by " + ", ".join(sorted(NORMALIZERS))
# SentencePiece writes a space as ▁. Llama 2's normalizers and decoders:
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BACK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
BACK = [BACK, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")  # of special tokens, as in transformers
NO_TOKEN = 1 << 20  # from here up: ids for tiktoken's sake, of bytes that a vocabulary lacks


def byte_letters():
    """GPT-2's table: the printable letter that stands for each byte in a tokenizer.json."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}


def normalize(text, names):
    """What Hugging Face's normalizers of these names make of a text, one after another."""
    for name in names:
        if name == "Lowercase":  # letter by letter, so that no sigma is the last of its word
            text = text.replace("Σ", "σ").lower()
        else:
            text = unicodedata.normalize(name, text)
    return text


def longest_match(word, vocab, prefix):
    """WordPiece (Devlin et al. 2019): at each place of a word the longest token of vocab {token:
    id} that fits, `prefix` before those within the word. None where at some place none fits."""
    ids, start = [], 0
    while start < len(word):
        before = prefix if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if before + word[start:end] in vocab), None)
        if end is None:
            return None
        ids.append(vocab[before + word[start:end]])
        start = end
    return ids


def best_path(data, scores, longest):
    """Viterbi for Unigram (Kudo 2018): the ids of the tokens, of at most `longest` bytes, that make
    up data with the greatest sum of scores {bytes: (id, log-probability)}, every byte being one.

    Sums are taken from the left and of equals the longer last token stays, as in `tokenizers`.
    """
    # The best path to each place: its score, and where its last token begins and which it is.
    best = [(0.0, 0, 0)] + [(-math.inf, 0, 0)] * len(data)
    for start in range(len(data)):
        for end in range(start + 1, min(start + longest, len(data)) + 1):
            if token := scores.get(data[start:end]):
                if (score := token[1] + best[start][0]) > best[end][0]:
                    best[end] = (score, start, token[0])
    ids, end = [], len(data)
    while end:
        _, end, id = best[end]
        ids.append(id)
    return ids[::-1]


def merge_pairs(ids, merges):
    """BPE (Sennrich et al. 2016): of all neighbours in ids the pair of least rank in merges {pair:
    (rank, id)}, and of equals the leftmost, becomes that id, until no pair is in merges."""
    ids = list(ids)
    n = len(ids)
    before, after, queue = [*range(-1, n - 1)], [*range(1, n + 1)], []

    def look(i):
        """Queue the pair that begins at place i."""
        if i >= 0 and after[i] < n and (found := merges.get(pair := (ids[i], ids[after[i]]))):
            heappush(queue, (found[0], i, pair, found[1]))

    for i in range(n):
        look(i)
    while queue:
        _, i, pair, new = heappop(queue)
        if (j := after[i]) == n or pair != (ids[i], ids[j]):
            continue  # one of the two is in another token by now
        ids[i], ids[j], after[i] = new, None, after[j]
        if after[i] < n:
            before[after[i]] = i
        look(i)
        look(before[i])
    return [id for id in ids if id is not None]


def any_of(names):
    """A pattern that finds any of these in a text: the leftmost, and there the longest."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len)[::-1])) or "(?!)")


def check_spec(spec):
    """Refuse a tokenizer.json in which an id is no whole number, or is that of two tokens."""
    body, added = spec.get("model") or {}, spec.get("added_tokens", [])
    vocab = body.get("vocab") or {}
    for key, value in (("added_tokens", added), ("merges", body.get("merges", []))):
        if not isinstance(value, list):
            raise UserError(f"tokenizer.json: {key}={value!r:.60}: expected a list")
    longest = body.get("max_input_chars_per_word", 0)
    if type(longest) is not int:
        raise UserError(f"tokenizer.json: max_input_chars_per_word={longest!r:.60}: no number")
    if isinstance(vocab, list):  # Unigram's [token, score], numbered by their places
        for entry in vocab:
            token, score = entry
            if type(score) not in (int, float) or not math.isfinite(score):
                raise UserError(f"tokenizer.json: {token!r:.60} has the score {score!r:.60}")
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
        if len(vocab) != len(body["vocab"]):
            raise UserError("tokenizer.json: two entries of the vocabulary are the same token")
    ids = dict(vocab)
    for t in added:
        content, id = t["content"], t["id"]
        flags = [t.get(k, False) for k in ("lstrip", "rstrip", "single_word", "normalized")]
        if not content or any(type(flag) is not bool for flag in [t["special"], *flags]):
            raise UserError(f"tokenizer.json: the added token {content!r:.60} is malformed")
        if ids.get(content, id) != id:
            why = f"has the ids {ids[content]!r:.60} and {id!r:.60}"
            raise UserError(f"tokenizer.json: {content!r:.60} {why}")
        ids[content] = id
    for token, id in ids.items():
        if not isinstance(token, str) or type(id) is not int or not 0 <= id < NO_TOKEN:
            why = f"expected a whole number below {NO_TOKEN:,}"
            raise UserError(f"tokenizer.json: {token!r:.60} has the id {id!r:.60}: {why}")
    post = spec.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing":
            check_template(step, ids)
    if len(set(ids.values())) != len(ids):
        first = {}
        for token, id in ids.items():
            if first.setdefault(id, token) != token:
                why = f"are both token {id}"
                raise UserError(f"tokenizer.json: {first[id]!r:.60} and {token!r:.60} {why}")


def check_template(step, ids):
    """Refuse a post-processor that does not put the text between tokens of the vocabulary."""
    texts = [part for part in step["single"] if "Sequence" in part]
    if [part["Sequence"]["id"] for part in texts] != ["A"]:
        raise UserError("tokenizer.json: expected a post_processor with one text in its `single`")
    for part in step["single"]:
        name = part["SpecialToken"]["id"] if "SpecialToken" in part else None
        token = step["special_tokens"][name] if name is not None else {"ids": [], "tokens": []}
        if [ids.get(text) for text in token["tokens"]] != token["ids"]:
            why = f"{name!r:.60} has the ids {token['ids']!r:.60}, not the vocabulary's"
            raise UserError(f"tokenizer.json: in its post_processor {why}")


def check_names(config):
    """Refuse a tokenizer_config.json whose special tokens or chat template are of another form."""
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        name = config.get(key)
        text = name.get("content") if isinstance(name, dict) else name
        if not isinstance(text, str) and name is not None:
            raise UserError(f"tokenizer_config.json: {key}={name!r:.60}: expected a token's name")
    template = config.get("chat_template")
    several = template if isinstance(template, list) else [{"name": "", "template": template}]
    for t in several if template is not None else ():
        texts = (t.get("name"), t.get("template")) if isinstance(t, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"tokenizer_config.json: chat_template={template!r:.60}: expected text")


def read_ids(folder, key, n_vocab):
    """The ids, a list, that generation_config.json, or else config.json, has for a key such as
    eos_token_id; None where neither has any."""
    for name in ("generation_config.json", "config.json"):
        d = read_json(folder / name, {})
        if key in d:
            if d[key] is None:
                return None
            ids = d[key] if isinstance(d[key], list) else [d[key]]
            for id in ids:
                if type(id) is not int or not 0 <= id < n_vocab:
                    why = f"{key}={d[key]!r:.60}: expected ids below {n_vocab:,}, the tokenizer's"
                    raise UserError(f"{folder / name}: {why}")
            return ids
    return None


def split_steps(pre_tokenizers):
    """Hugging Face's Split and Digits as a tuple of (pattern, behavior, invert), in their order;
    None where there is another kind among them."""
    import regex

    steps = []
    for step in pre_tokenizers:
        if step["type"] == "Digits":
            behavior = "Isolated" if step.get("individual_digits") else "Contiguous"
            steps.append((r"\p{N}", behavior, False))
        elif step["type"] == "Split" and step["behavior"] in BEHAVIORS:
            pattern = step["pattern"].get("Regex")
            if pattern is None:
                pattern = regex.escape(step["pattern"]["String"], special_only=True)
            steps.append((pattern, step["behavior"], step["invert"]))
        else:
            return None
    return tuple(steps)


def spell_words(pattern):
    """The pattern with what Oniguruma takes for \\w and \\W written out."""
    parts, depth = [], 0
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        depth += {"[": 1, "]": -1}.get(part, 0)
        if part == r"\w":
            part = ONIGURUMA_WORD if depth > 0 else f"[{ONIGURUMA_WORD}]"
        elif part == r"\W" and depth <= 0:
            part = f"[^{ONIGURUMA_WORD}]"
        parts.append(part)
    return "".join(parts)


def portable_pattern(pattern):
    """A split pattern of tokenizer.json, which Oniguruma reads there, as Rust reads it too;
    UserError where the two, or `regex`, would not mean the same."""
    given = pattern
    # {1,3}+ is a repeated repeat there, and a greedy one that gives nothing back elsewhere.
    pattern = spell_words(re.sub(r"\{([01]?),\d*\}\+", r"{\1,}", pattern))
    bare = re.sub(r"\\.", "", pattern, flags=re.DOTALL)
    odd = [f"\\{c}" for c in re.findall(r"\\(.)", pattern) if c.isalnum() and c not in SAME_ESCAPES]
    odd += re.findall(r"\(\?(?!:|=|!|>|<=|<!|-?i[:)])..?", bare)  # other flags, recursion, names
    odd += re.findall(r"\[:\^?\w+:\]|\{[\d,]+\}\+", bare)
    if odd:
        raise UserError(f"tokenizer.json: not supported: {odd[0]} in the split pattern {given!r}")
    bare = bare.replace("[^", "[")
    if "^" in bare or "$" in bare:  # which are of a line there
        return f"(?m:{pattern})"
    return pattern


def compile_pattern(pattern):
    """A pattern that all engines read alike, for the module `regex`."""
    import regex

    letter = lambda match: f"\\U{int(match[1], 16):08x}"
    pattern = re.sub(r"\\x\{([0-9a-fA-F]{1,8})\}", letter, pattern)
    pattern = re.sub(r"\\z", r"\\Z", pattern)
    nested = "&&" in pattern or re.search(r"\[[^\]]*\[", re.sub(r"\\.", "", pattern))
    try:
        return regex.compile(pattern, regex.V1 if nested else regex.V0)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"tokenizer.json: the split pattern {pattern!r}: {error}") from None


def may_match_nothing(pattern):
    """Whether a pattern matches nothing at some place where it is likely to: among usual letters
    and those that it names. tiktoken panics there."""
    try:
        matches = compile_pattern(pattern).finditer(ANY_LETTERS + pattern, timeout=1)
        return any(match.start() == match.end() for match in matches)
    except TimeoutError:
        return True


def split_seconds(text):
    """How long a pattern may take for a text, in seconds: many times what a usual one does."""
    return SPLIT_SECONDS + len(text) / 100_000


def stretches(text, pattern):
    """[(begin, end, does the pattern match it)], one behind the other, of the whole text. A match
    of nothing that stands right behind another is none, as in Oniguruma."""
    parts, begin, covered, last = [], 0, 0, None
    stop = time.monotonic() + split_seconds(text)
    while begin <= len(text):
        match = pattern.search(text, begin, timeout=max(stop - time.monotonic(), 0.001))
        if not match:
            break
        if match.start() == match.end() == last:
            begin += 1
            continue
        if covered < match.start():
            parts.append((covered, match.start(), False))
        parts.append((*match.span(), True))
        begin = covered = last = match.end()
    if covered < len(text):
        parts.append((covered, len(text), False))
    return parts


def split_at(text, pattern, behavior, invert):
    """The pieces [(begin, end)] that Hugging Face's Split makes of a text, none of them empty."""
    parts = [(begin, end, matched != invert) for begin, end, matched in stretches(text, pattern)]
    if behavior == "Isolated":
        return [(begin, end) for begin, end, _ in parts if begin < end]
    if behavior == "Removed":
        return [(begin, end) for begin, end, matched in parts if not matched and begin < end]
    pieces, before = [], False
    if behavior == "MergedWithNext":
        parts.reverse()
    for begin, end, matched in parts:
        joins = matched == before if behavior == "Contiguous" else matched and not before
        before = matched
        if not joins or not pieces:
            pieces.append((begin, end))
        elif behavior == "MergedWithNext":
            pieces[-1] = (begin, pieces[-1][1])
        else:
            pieces[-1] = (pieces[-1][0], end)
    return sorted((begin, end) for begin, end in pieces if begin < end)


class Tokenizer:
    """Text to ids and back. `spec` and `config`: tokenizer.json and tokenizer_config.json, parsed.

    n_vocab counts the ids; bos_id, pad_id (or None) and eos_ids name special ones, roles {bos, eos,
    pad, unk, cls, sep, mask: id} those that tokenizer_config.json names; eot_id is the one
    that starts a document. They are never read from text: only `chat` and `prompt` add them. Added
    tokens that the file does not call special (<think>) are text, and are read as in `tokenizers`.
    """

    def __init__(self, spec, config):
        check_spec(spec)
        check_names(config)
        self.spec, self.config, self.bpe, self.lacking = spec, config, None, b""
        added = spec.get("added_tokens", [])
        self.special = {t["content"]: t["id"] for t in added}
        self.names = any_of(self.special)
        self.marks = any_of(t["content"] for t in added if t["special"])
        plain = {t["id"]: t["content"] for t in added if not t["special"]}
        self.plain = any_of(plain.values()) if plain else None
        steps = spec.get("normalizer") or {"normalizers": []}
        steps = steps.get("normalizers", [steps])
        # Whether a space goes before a text: each (stretch), always or first (if it has none), no.
        self.lead = "each" if steps[-2:] == [PREPEND, REPLACE] else "never"
        self.normalizers = [t["type"] for t in (steps[:-2] if self.lead == "each" else steps)]
        body = spec.get("model") or {}
        # Old files, such as GPT-2's, do not name the kind.
        self.kind, vocab = body.get("type") or "merges" in body and "BPE", body.get("vocab")
        form, split = self._pattern()
        fits = (self.kind, form) in FORMS and (form == "Metaspace" or self.lead == "never")
        # Whether some of the text is lost, as in `tokenizers`.
        self.drops = isinstance(split, tuple) and "Removed" in [step[1] for step in split]
        fits = fits and not (self.drops and self.kind == "WordLevel")
        if not (fits and split and vocab and NORMALIZERS.issuperset(self.normalizers)):
            why = f"a {self.kind} tokenizer of this form is not supported ({SUPPORTED})"
            raise UserError(f"tokenizer.json: {why}")
        post = spec.get("post_processor") or {"type": "ByteLevel"}
        post = post.get("processors", [post])
        self._refuse_others(body, added, {step["type"] for step in post})
        self.by_bytes = form in ("ByteLevel", "Metaspace")  # or a token is a stretch of characters
        if form == "Metaspace":
            split = self._init_sentencepiece(body, vocab, split)
        elif self.kind == "BPE":
            self._init_bpe(body, self._of_bytes(vocab), split)
        else:
            self._init_other(body, vocab)
        # What splits where tiktoken does not: one pattern, or the steps of several.
        self.known = {}  # ids of pieces met before
        self.gapless = form == "Metaspace" or split in GAPLESS
        if self.bpe and not self.gapless:
            self.sizes = np.zeros(1 + max(self.bytes), np.int64)  # of the tokens, in bytes
            for id, token in self.bytes.items():
                self.sizes[id] = len(token)
        if isinstance(split, str):
            split = ((split, "Isolated", False),)
        self.letters = split[0][0] == CHARACTERS and self.gapless  # each alone
        # Whether the matches are the pieces, and the pattern is known to have an end.
        self.matches = self.gapless or split == ((BERT_WORDS, "Removed", True),)
        self.steps = []
        for pattern, behavior, invert in split:
            self.steps.append((compile_pattern(portable_pattern(pattern)), behavior, invert))
        self.n_vocab = 1 + max([*self.bytes, *self.special.values()])
        self.bytes |= {id: content.encode() for id, content in plain.items()}
        self.bos_id, self.pad_id = self._named("bos_token"), self._named("pad_token")
        self.eos_ids = [i for i in [self._named("eos_token")] if i is not None]
        # {role: id} of those that tokenizer_config.json names, and transformers too.
        self.roles = {role: self._named(f"{role}_token") for role in ROLES}
        self.roles = {role: id for role, id in self.roles.items() if id is not None}
        # Whether white space around a token counts as its own, for loss masks as transformers'.
        trims = [step.get("trim_offsets", True) for step in post if step.get("type") == "ByteLevel"]
        self.trims = any(trims) and spec.get("post_processor") is not None
        # Whether a text begins with bos is the post-processor's word, as in Hugging Face.
        leading = lambda step: takewhile(lambda s: "SpecialToken" in s, step.get("single", []))
        before = [s["SpecialToken"]["id"] for step in post for s in leading(step)]
        self.start = [self.special[name] for name in before]
        space = " " if self.kind == "WordPiece" else ""
        self.shown = self.bytes | {i: (space + t).encode() for t, i in self.special.items()}

    @classmethod
    def from_folder(cls, folder):
        """Read tokenizer.json and, where present, the other files that say something of it."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: no tokenizer.json here (python prepare.py makes one)")
        config = read_json(folder / "special_tokens_map.json", {})
        config |= read_json(folder / "tokenizer_config.json", {})
        template, spec = folder / "chat_template.jinja", read_json(folder / "tokenizer.json")
        try:
            if template.is_file():
                config["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{template}: not UTF-8, cannot be read as text: {error}") from None
        try:
            tok = cls(spec, config)
        except UserError as error:
            raise UserError(f"{folder}/{error}") from None
        except Exception as error:  # whatever a file that is no tokenizer makes ours, or tiktoken's
            raise UserError(f"{folder}/tokenizer.json: malformed: {error!r:.200}") from None
        ends, begins = (read_ids(folder, f"{key}_token_id", tok.n_vocab) for key in ("eos", "bos"))
        for key, ids in (("eos_token", ends), ("bos_token", begins)):
            if ids is None and config.get(key) is not None and tok._named(key) is None:
                why = "is no added token of tokenizer.json"
                raise UserError(f"{folder}/tokenizer_config.json: {key}={config[key]!r:.60} {why}")
        if ends is not None:
            tok.eos_ids = ends
        if begins and tok.bos_id is None:
            tok.bos_id = begins[0]
        return tok

    @property
    def eot_id(self):
        """The token that starts a document: bos, or where there is none the end token, or None."""
        return self.bos_id if self.bos_id is not None else [*self.eos_ids, None][0]

    @property
    def end_id(self):
        """The token that ends a text, at which generation stops too, or None: of several that of
        tokenizer_config.json."""
        own = self._named("eos_token")
        return own if own in self.eos_ids or not self.eos_ids else self.eos_ids[0]

    @property
    def document_layout(self):
        """(ids before a document, ids behind it) in the shards that are written today. What begins
        a text is the post-processor's word. Where one token is bos and the end, or there is but
        one, it stands before each document, and so behind the one before."""
        if self.end_id in (None, self.bos_id):
            return self.start or [self.eot_id], []
        return self.start, [self.end_id]

    def _named(self, key):
        name = self.config.get(key)
        return self.special.get(name["content"] if isinstance(name, dict) else name)

    def _refuse_others(self, body, added, post):
        """What would change ids, and is not done here, is refused by its name."""
        parts = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        odd = [part for part in parts if self.kind == "BPE" and body.get(part)]
        odd += post - {"ByteLevel", "TemplateProcessing"}
        changed = self.lead != "never" or self.normalizers
        mask = self._named(
            "mask_token"
        )  # read from text alone, which special tokens never are here
        for t in added:
            if t["id"] == mask and t["special"]:
                continue
            flags = [k for k in ("lstrip", "rstrip", "single_word") if t.get(k)]
            flags += ["normalized"] * bool(changed and t.get("normalized") and not t["special"])
            odd += [f"the added token {t['content']} with {flag}" for flag in flags]
        if odd:
            raise UserError(f"tokenizer.json: not supported: {', '.join(odd[:3])}")

    def _pattern(self):
        """(form, split): Metaspace, ByteLevel or Split; and the pattern that isolates the pieces of
        a text, or a tuple of (pattern, behavior, invert) where one pattern does not say it.
        (None, None): another form."""
        whole, steps = CHARACTERS + "+", self.spec.get("pre_tokenizer") or {}
        if not steps and self.lead == "each":
            return "Metaspace", whole
        usual = dict(add_prefix_space=True, use_regex=True, split=True, invert=False)
        steps = [usual | step for step in steps.get("pretokenizers", [steps])]
        if not steps:
            return None, None
        if [step.get("type") for step in steps] == ["Metaspace"]:
            step = steps[0]
            if step["replacement"] != "▁" or self.lead != "never":
                return None, None
            old = "always" if step["add_prefix_space"] else "never"
            self.lead = step.get("prepend_scheme", old)
            return "Metaspace", " [^ ]*|[^ ]+" if step["split"] else whole
        form, last = "Split", steps[-1]
        if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
            own = {"type": "Split", "pattern": {"Regex": GPT2_SPLIT}}
            own |= {"behavior": "Isolated", "invert": False}
            form, steps = "ByteLevel", steps[:-1] + [own] * last["use_regex"]
        split = split_steps(steps) if steps and "type" in steps[0] else None
        if not split:
            return None, None
        if split == ((r"\p{N}", "Isolated", False), (GPT2_SPLIT, "Isolated", False)):
            return form, DIGITS_SPLIT
        if len(split) == 1 and split[0][1] == "Isolated":
            return form, split[0][0]
        return form, split

    def _of_bytes(self, vocab):
        """{token as bytes: what vocab has for it}, for a vocabulary in GPT-2's letters."""
        letters = {c: b for b, c in byte_letters().items()}
        items = [(t, value) for t, value in vocab.items() if t not in self.special]
        try:
            tokens = {bytes(letters[c] for c in token): value for token, value in items}
        except KeyError as letter:
            why = f"{letter} stands for no byte: no such {self.kind}"
            raise UserError(f"tokenizer.json: {why}") from None
        self.lacking = bytes(b for b in range(256) if bytes([b]) not in tokens)
        if self.lacking and self.kind != "BPE":
            raise UserError("tokenizer.json: a byte is missing from the vocabulary")
        return tokens

    def _init_bpe(self, body, ranks, split):
        import tiktoken  # here, since the other kinds need none of it

        made = [body["vocab"][a + b] for a, b in self._merges(body)]
        whole = body.get("ignore_merges", False)  # then a token may be made in several ways
        ordered = all(a < b or whole and a == b for a, b in zip(made, made[1:]))
        if not ordered or len({*made}) + 256 - len(self.lacking) != len(ranks):
            raise UserError("tokenizer.json: ids are not in merge order")
        self.bytes = {i: token for token, i in ranks.items()}
        ranks = ranks | {bytes([b]): NO_TOKEN + b for b in self.lacking}
        named = dict(mergeable_ranks=ranks, special_tokens=self.special)
        self.rust_splits = isinstance(split, str)
        pattern = portable_pattern(split) if self.rust_splits else CHARACTERS
        if may_match_nothing(pattern):
            pattern, self.rust_splits = CHARACTERS, False
        try:
            self.bpe = tiktoken.Encoding("barelm", pat_str=pattern, **named)
        except ValueError:  # a pattern that Rust cannot read
            self.rust_splits = False
            self.bpe = tiktoken.Encoding("barelm", pat_str=CHARACTERS, **named)

    def _merges(self, body):
        return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in body["merges"]]

    def _init_sentencepiece(self, body, vocab, split):
        """Returns the pattern of the pieces that may be merged apart from each other."""
        steps = (self.spec.get("decoder") or {}).get("decoders", [])
        self.byte_ids = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
        plain = body.get("byte_fallback") and not body.get("ignore_merges")
        known = plain and steps[:3] == BACK and steps[3:] in ([], [STRIP])
        if not known or None in self.byte_ids:
            why = "a SentencePiece BPE is supported with all bytes and Llama 2's decoder alone"
            raise UserError(f"tokenizer.json: {why}")
        self.strip = " " if steps[3:] else ""
        pairs = self._merges(body)
        number = lambda a, b: (vocab[a], vocab[b])
        self.merges = {number(a, b): (i, vocab[a + b]) for i, (a, b) in enumerate(pairs)}
        # A space stands here for ▁: texts with the one and with the other have the same ids.
        self.vocab = {t.replace("▁", " "): i for t, i in vocab.items() if " " not in t}
        tokens = {t: i for t, i in vocab.items() if t not in self.special}
        self.bytes = {i: t.replace("▁", " ").encode() for t, i in tokens.items()}
        self.bytes |= {i: bytes([b]) for b, i in enumerate(self.byte_ids)}
        if split == CHARACTERS + "+" and not any(re.search("[^▁]▁", a + b) for a, b in pairs):
            return " *[^ ]+| +"  # no token goes on behind a word: words apart give the same ids
        return split

    def _init_other(self, body, vocab):
        if self.kind == "Unigram":
            numbered = {token: (i, score) for i, (token, score) in enumerate(vocab)}
            self.vocab = self._of_bytes(numbered)
            self.longest = max(map(len, self.vocab))
            self.bytes = {i: token for token, (i, _) in self.vocab.items()}
            return
        self.vocab = {t: i for t, i in vocab.items() if t not in self.special}
        self.unk = [vocab[body["unk_token"]]]
        self.bytes = {i: token.encode() for token, i in self.vocab.items()}
        if self.kind == "WordPiece":
            self.prefix = body["continuing_subword_prefix"]
            self.longest = body["max_input_chars_per_word"]
            if self.spec["decoder"] != dict(type="WordPiece", prefix=self.prefix, cleanup=False):
                raise UserError("tokenizer.json: a WordPiece decoder with cleanup is not supported")
            shown = lambda t: t[len(self.prefix) :] if t.startswith(self.prefix) else " " + t
            self.bytes = {i: shown(token).encode() for token, i in self.vocab.items()}

    def normal(self, text):
        """The text as the model is fed it: normalised, U+FFFD for half a surrogate pair."""
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = normalize(text, self.normalizers)
        return text.replace("▁", " ") if self.kind == "BPE" and not self.bpe else text

    def encode(self, text):
        """The ids of `text`, which is text alone: nothing is added, no special token is read."""
        ids, at = [], 0
        for match in self.plain.finditer(text) if self.plain else ():
            ids += self._encode(self.normal(text[at : match.start()]), at == 0)
            ids.append(self.special[match[0]])
            at = match.end()
        rest = self._encode(self.normal(text[at:]), at == 0)
        return ids + rest if ids else rest

    def _led(self, text, first):
        """A normal text with the space before it that SentencePiece puts there. first: nothing
        comes before it, not even a special token."""
        has_one = text[:1] == " " and self.lead != "each"
        none = not text or has_one or self.lead == "never" or self.lead == "first" and not first
        return text if none else " " + text

    def _encode(self, text, first=True):
        """The ids of a normal text without added tokens; first: nothing comes before it."""
        if self.bpe and self.rust_splits:
            if self.gapless and len(text) < LONG_TEXT:  # where nothing can fail: the fastest way
                ids = self.bpe.encode_ordinary(text)
                if not self.lacking or max(ids, default=0) < NO_TOKEN:
                    return ids
            elif (array := self._by_tiktoken(text)) is not None:
                return array.tolist()
        ids = []
        for piece in self._pieces(self._led(text, first)):
            piece_ids = self.known.get(piece)
            if piece_ids is None:
                piece_ids = self._segment(piece)
                if len(self.known) > 1_000_000:
                    self.known.clear()
                if len(piece) < 1000:
                    self.known[piece] = piece_ids
            ids += piece_ids
        return ids

    def _by_tiktoken(self, text):
        """The ids (n,) uint32 of a normal text as tiktoken splits it; None where it cannot: its
        regular expressions fail, there is text between their matches, or a byte has no token."""
        try:
            # What encode_to_numpy calls, which reads special tokens in text before tiktoken 0.11.
            data = self.bpe._core_bpe.encode_to_tiktoken_buffer(text, set())
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a ValueError, or a panic of Rust, which is no Exception
            return None
        ids = np.frombuffer(data, np.uint32)
        if self.lacking and (ids >= NO_TOKEN).any():
            return None
        if not self.gapless and self.sizes[ids].sum() != len(text.encode()):
            return None
        return ids

    def _cuts(self, text):
        """Where the pieces of a normal text begin and end: [(begin, end)]."""
        cuts = [(0, len(text))] if text else []
        try:
            for pattern, behavior, invert in self.steps:
                finer = []
                for begin, end in cuts:
                    parts = split_at(text[begin:end], pattern, behavior, invert)
                    finer += [(begin + a, begin + b) for a, b in parts]
                cuts = finer
        except TimeoutError:
            raise self._endless(pattern, text) from None
        return cuts

    def _endless(self, pattern, text):
        why = f"does not end on a text of {len(text):,} characters"
        return UserError(f"tokenizer.json: the split pattern {pattern.pattern!r} {why}")

    def _pieces(self, text):
        """The pieces of a normal text that are encoded apart from each other."""
        if self.letters:
            return text
        if self.matches:
            return self.steps[0][0].findall(text)
        return [text[begin:end] for begin, end in self._cuts(text)]

    def _segment(self, piece):
        """The ids of one piece of text."""
        if self.bpe:  # without the bytes that have no token: what is beside them may merge
            data = piece.encode().translate(None, self.lacking)
            return self.bpe._core_bpe.encode_single_piece(data) if data else []
        if self.kind == "Unigram":
            return best_path(piece.encode(), self.vocab, self.longest)
        if self.kind == "BPE":
            bytes_of = lambda c: [self.byte_ids[b] for b in c.encode()]
            spelt = (bytes_of(c) if c not in self.vocab else [self.vocab[c]] for c in piece)
            return merge_pairs(chain.from_iterable(spelt), self.merges)
        if self.kind == "WordPiece":
            fits = len(piece) <= self.longest
            return fits and longest_match(piece, self.vocab, self.prefix) or self.unk
        return [self.vocab[piece]] if piece in self.vocab else self.unk

    def _placed(self, text, first=True):
        """The ids of a text, each with the index of its first character (or byte, if by_bytes)."""
        if self.by_bytes and not self.drops:
            kept = [i for i, b in enumerate(text.encode()) if b not in self.lacking]
            at = len(text) - len(self._led(text, first))
            for id in self._encode(text, first):
                yield id, kept[max(at, 0)]
                at += len(self.bytes[id])
            return
        covered, place = 0, 0  # characters up to the piece, and how many places they take
        for begin, end in self._cuts(text):
            skipped, piece = text[covered:begin], text[begin:end]
            place += len(skipped.encode() if self.by_bytes else skipped)
            places = range(len(piece))
            if self.by_bytes:
                places = [i for i, b in enumerate(piece.encode()) if b not in self.lacking]
            at = 0
            for id in self._segment(piece):
                yield id, place + places[at]
                token = self.token_bytes(id)
                at += len(token) if self.by_bytes else len(token.decode().strip(" "))
            covered, place = end, place + len(piece.encode() if self.by_bytes else piece)

    def encode_batch(self, texts, threads=1):
        """`encode` for many texts, as arrays, on several threads where the tokenizer can."""
        if not self.bpe or not self.rust_splits:
            return [np.array(self.encode(text), np.uint32) for text in texts]

        def ids(text):
            if self.plain and self.plain.search(text):
                return np.array(self.encode(text), np.uint32)
            normal = self.normal(text)
            array = self._by_tiktoken(normal)
            return np.array(self._encode(normal), np.uint32) if array is None else array

        with ThreadPoolExecutor(threads) as pool:
            return [*pool.map(ids, texts)]

    def prompt(self, text):
        """The ids of a text to be continued: bos before it where the tokenizer puts one. Nothing at
        all is continued from what stands before a document in the shards."""
        if text or self.start or self.eot_id is None:
            return self.start + self.encode(text)
        begin, end = self.document_layout
        return [*end, *begin][-1:]

    def token_bytes(self, id):
        """The bytes that the token stands for; none for a special or unused one."""
        return self.bytes.get(id, b"")

    def decode(self, ids):
        """The text of ids, special tokens by their names; what is no UTF-8 becomes U+FFFD.

        WordPiece keeps no white space: there a space is between words, and none before the first.
        SentencePiece's space before the first word is taken away again.
        """
        text = b"".join(self.shown.get(i, b"") for i in ids).decode(errors="replace")
        if self.kind == "BPE" and not self.bpe:
            return text.removeprefix(self.strip)
        if self.kind != "WordPiece" or not text:
            return text
        return text[1:] if text[0] == " " else self.prefix + text

    def chat(self, messages, add_generation_prompt=False, answers="all"):
        """Render [{"role", "content"}] by the chat template: (ids, loss mask, 0 or 1 an id).

        The mask covers what the template puts between the generation prompt and the next turn, end
        markers included, and nothing of a prompt; answers: of all messages of assistants, of the
        "last" message alone, or of "none". Where the template has {% generation %}, it covers what
        that marks, as transformers' return_assistant_tokens_mask does. Contents are text: the name
        of a special token inside one is broken by a letter of its own while the template runs.
        """
        given = json.dumps(messages, ensure_ascii=False, default=str)
        unused = (c for c in map(chr, range(0xE000, 0xF8FF)) if c not in given)
        hide, begin, end, *letters = islice(unused, 5)
        safe = veiled(messages, lambda s: self.marks.sub(lambda m: m[0][0] + hide + m[0][1:], s))
        if add_generation_prompt:
            answers = "none"
        marked = answers != "none" and marks_answers(self.chat_template())
        text = self._render(safe, add_generation_prompt, (begin, end) if marked else ("", ""))
        spans = []
        if marked:
            text, spans = marked_spans(text, begin, end)
            if answers == "last":
                prompt = self._render(safe[:-1], True)
                asked = len(os.path.commonprefix([prompt, text]))
                spans = [span for span in spans if span[1] > asked]
        elif answers != "none":
            ends = any_of([name for name, id in self.special.items() if id in self.eos_ids])
            turns = TurnFinder(self._render, self.marks, ends, letters, safe, text)
            asked = len(safe) - 1 if answers == "last" else 0
            places = [i for i in range(asked, len(safe)) if safe[i].get("role") == "assistant"]
            spans = [turns.span(i) for i in places]
        said = bytearray(len(text))  # 1 at each character that an assistant says
        for start, stop in spans:
            said[start:stop] = b"\1" * (stop - start)
        ids, mask, at = [], [], 0
        for match in [*self.names.finditer(text), None]:
            stop = match.start() if match else len(text)
            plain, marks, after = "", b"", said[stop : stop + 1] or b"\0"
            for run in re.finditer(b"\0+|\1+", said[at:stop]):
                part = self.normal(text[at + run.start() : at + run.end()].replace(hide, ""))
                marks += run[0][:1] * len(part.encode() if self.by_bytes else part)
                plain += part
            for id, place in self._placed(plain, at == 0):
                ids.append(id)
                mask.append(self._is_said(id, place, marks + after))
            if match:
                ids.append(self.special[match[0]])
                mask.append(said[stop])
                at = match.end()
        return ids, mask

    def _is_said(self, id, place, marks):
        """Whether a token counts as said, 0 or 1: where any of it is, as transformers counts.
        marks: a byte for each of the text's and what follows; place: the token's first."""
        token = self.token_bytes(id)
        if not self.by_bytes:
            return max(marks[place : place + max(len(token.decode().strip(" ")), 1)])
        if place == 0 and token[:1] == b" " and self.lead != "never":
            token = token[1:]  # not the text's own
        if self.trims:
            at = place + len(token) - len(token.lstrip())
            if not token.strip():  # nothing is left of it: a place between two bytes
                return min(marks[max(at - 1, 0) : at + 1])
            return max(marks[at : at + len(token.strip())])
        return max(marks[place : place + max(len(token), 1)])

    def end_of_turn(self):
        """The token (a list of one, or none) that the template ends an assistant's words with: of
        several in a row the first, at which generation can stop."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ids, said = self.chat(talk)
        answer = [i for i, s in zip(ids, said) if s]
        end = []
        while answer and (
            answer[-1] in self.special.values() or not self.decode(answer[-1:]).strip()
        ):
            token = answer.pop()
            end = [token] if token in self.special.values() else end
        return end

    def chat_template(self):
        """The text of the chat template."""
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by their names
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if template and not isinstance(template, str):
            kind = type(template).__name__
            raise UserError(f"tokenizer_config.json: chat_template is a {kind}: expected a text")
        if not template:
            raise UserError("this tokenizer has no chat template: chat needs a model tuned for it")
        return template

    def _render(self, messages, add_generation_prompt=False, marks=("", "")):
        """The text that the chat template makes of messages, with these marks around what is
        between {% generation %} and {% endgeneration %}."""
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"):
            if named := self.config.get(f"{name}_token"):
                given[f"{name}_token"] = named["content"] if isinstance(named, dict) else named
        given["generation_begin"], given["generation_end"] = marks
        template = self.chat_template()
        ours = template.endswith(CHATML) and "{" not in template.removesuffix(CHATML)
        render = render_template if ours else RENDERER.render  # a stranger's program runs apart
        try:
            return render(template, given)
        except Exception as error:  # whatever the template's program raises
            why = " ".join(str(error).split())[:300]
            why = f"the chat template refuses these messages: {why}"
            raise TemplateRefusal(why) from None


def veiled(value, veil):
    """The value, with `veil` applied to every text in it."""
    if isinstance(value, str):
        return veil(value)
    if isinstance(value, dict):
        return {key: veiled(v, veil) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [veiled(v, veil) for v in value]
    return value


# --------------------------------------------------------------------------------------------------
# Loss masks of chats: which part of a rendered conversation an assistant has said


def marks_answers(template):
    """Whether a chat template has {% generation %}, other than in a comment."""
    program = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    return re.search(r"\{%[-+]?\s*generation\b", program) is not None


def marked_spans(text, begin, end):
    """The text without the two marks, and [(from, to)] of what was between them."""
    spans, out, at, start = [], [], 0, None
    for piece in re.split(f"([{begin}{end}])", text):
        if piece == begin and start is None:
            start = at
        elif piece == end and start is not None:
            spans.append((start, at))
            start = None
        elif piece not in (begin, end):
            out.append(piece)
            at += len(piece)
    return "".join(out), spans


def common(a, b):
    """How many characters two texts have in common at their beginning."""
    return len(os.path.commonprefix([a, b]))


class TemplateRefusal(UserError):
    """A chat template does not take a conversation, or fits no loss mask."""


class TurnFinder:
    """Finds the assistants' words in `text`, which a template without {% generation %} made of
    `messages`: a turn begins behind what the template writes as the generation prompt, and ends
    where the next one's header begins.

    Templates may write earlier turns in another way than the last one (without their thoughts).
    What is around a content is therefore found by writing letters that occur nowhere in its place.
    """

    def __init__(self, render, marks, ends, letters, messages, text):
        self.render, self.messages, self.text = render, messages, text
        self.marks, self.ends = marks, ends  # patterns of the special and of the end tokens
        self.letters = letters

    def beside(self, messages):
        """The same for other messages."""
        text = self.render(messages)
        return TurnFinder(self.render, self.marks, self.ends, self.letters, messages, text)

    def span(self, i):
        """(from, to) of message i in the text."""
        begin, end = self.begin(i), self.end(i)
        if end < begin:
            raise self.refusal("writes an answer before the generation prompt")
        found = [*self.marks.finditer(self.text, begin, end)]
        if found and not self.text[found[-1].end() : end].strip():
            return begin, found[-1].end()  # the line end behind the last marker is layout
        following = self.ends.match(self.text, end)
        return begin, following.end() if following else end

    def refusal(self, why):
        return TemplateRefusal(
            f"the chat template {why}: no loss mask fits it "
            "({% generation %} around the answers in the template would mark them)"
        )

    def begin(self, i):
        """Where message i begins."""
        asked = i > 0 and self.messages[i - 1].get("role") in ("user", "tool")
        try:
            before = self.render(self.messages[:i], True)
            if i and not asked:  # a template may have no generation prompt there
                asked = before != self.render(self.messages[:i])
            if asked and self.text.startswith(before):
                return len(before)
            if asked:
                return self.begin_behind(i)[1]
        except TemplateRefusal:  # such as of a template that wants a question
            before = None
        try:
            return self.begin_unasked(i)
        except TemplateRefusal:
            if i == 0 and before and self.text.startswith(before):
                return len(before)
            raise

    def begin_behind(self, i):
        """Where the generation prompt before message i begins, and where it ends, by what follows
        the content of message i - 1."""
        prompted, at = self.content_end(self.messages[:i], i - 1, prompt=True)
        bare = self.render(self.messages[:i])
        prompt_at = self.outside(bare, common(bare, prompted)) - at
        _, here = self.content_end(self.messages, i - 1, text=self.text)
        other = self.render(self.with_content(self.messages, i, self.letters[0]))
        size = min(common(prompted[at:], text[here:]) for text in (self.text, other))
        size = self.outside(self.text, here + size) - here
        whole = size == len(prompted) - at
        if other[:here] != self.text[:here] or not whole and size <= prompt_at:
            raise self.refusal("writes another header before an answer than it asks for one with")
        return here + prompt_at, here + size

    def begin_unasked(self, i):
        """Where message i begins, to which nothing asks: by the prompt that there is where a
        question is put before it."""
        other = self.beside([*self.messages[:i], self.question(), *self.messages[i:]])
        begin, end = other.begin_behind(i + 1)
        header = other.text[begin:end]
        here = self.content_end(self.messages, i - 1, text=self.text)[1] if i else 0
        variants = [self.render(self.with_content(self.messages, i, c)) for c in self.letters]
        before = os.path.commonprefix([*variants, self.text])
        here = here if here <= len(before) else 0  # of what is written behind the answer
        before = before[here:]
        if header and header in before:
            return here + before.rindex(header) + len(header)
        upto = self.render(self.messages[:i]) if i and not header else ""
        if upto and self.text.startswith(upto):
            return max(here, len(upto))
        if header or self.marks.sub("", before).strip():
            raise self.refusal("has no generation prompt before an answer that nothing asked for")
        marks = [0] + [mark.end() for mark in self.marks.finditer(before)]
        return here + marks[-1]

    def end(self, i, unasked=True):
        """Where message i ends: where the text of the conversation up to it does, or, if that is
        written in another way, behind what then follows its content. unasked: a conversation that
        the template refuses may be tried with a question more."""
        if i + 1 == len(self.messages):
            return len(self.text)
        upto = self.messages[: i + 1]
        try:
            whole = self.render(upto)
        except TemplateRefusal:  # such as of a template that wants a question
            if not unasked:
                raise
            return self.end_unasked(i)
        if self.text.startswith(whole):
            return len(whole)
        _, here = self.content_end(self.messages, i, text=self.text)
        whole, at = self.content_end(upto, i, text=whole)
        if self.text.startswith(whole[at:], here):
            return here + len(whole) - at
        # The last turn ends in another way: take the footer before a generation prompt.
        asked = [k + 1 for k in range(i) if self.messages[k].get("role") != "assistant"]
        asked = self.messages[: asked[-1]] if asked else [self.question()]
        prompted, bare = self.render(asked, True), self.render(asked)
        prompt = prompted[self.outside(bare, common(bare, prompted)) :]
        whole, at = self.content_end(upto, i, prompt=True)
        footer = whole[at:].removesuffix(prompt)
        if self.text.startswith(footer, here):
            return here + len(footer)
        _, after = self.content_end(self.messages, i + 1, text=self.text)
        found = self.ends.search(self.text, here, after)
        if found:  # an end token before the next turn's words
            return found.end()
        raise self.refusal("ends an answer in another way once there is a next turn")

    def end_unasked(self, i):
        """Where message i ends, by what follows its content where a question is put before it."""
        other = self.beside([*self.messages[:i], self.question(), *self.messages[i:]])
        _, at = other.content_end(other.messages, i + 1, text=other.text)
        footer = other.text[at : other.end(i + 1, unasked=False)]
        _, here = self.content_end(self.messages, i, text=self.text)
        if not self.text.startswith(footer, here):
            raise self.refusal("ends an answer in another way where nothing asks for it")
        return here + len(footer)

    def content_end(self, messages, i, prompt=False, text=None):
        """(The text of messages, where the content of message i ends in it)."""
        text = self.render(messages, prompt) if text is None else text
        a, b = (self.render(self.with_content(messages, i, c), prompt) for c in self.letters)
        size = common(a[::-1], b[::-1])
        if a == b or not text.endswith(a[len(a) - size :]):
            role = messages[i].get("role")
            raise self.refusal(
                f"does not write what the {role} says at one place, in its own words"
            )
        return text, len(text) - size

    def question(self):
        """A user's message, in the form that the others have."""
        parts = any(isinstance(m.get("content"), list) for m in self.messages)
        return {"role": "user", "content": [{"type": "text", "text": "?"}] if parts else "?"}

    def with_content(self, messages, i, text):
        """The messages, message i having this text."""
        content = messages[i].get("content")
        if isinstance(content, list) and content and isinstance(content[-1], dict):
            content = [*content[:-1], content[-1] | {"text": text}]
        else:
            content = text
        return [*messages[:i], messages[i] | {"content": content}, *messages[i + 1 :]]

    def outside(self, text, at):
        """The place, or the beginning of the special token that it would cut."""
        cut = [m.start() for m in self.marks.finditer(text) if m.start() < at < m.end()]
        return cut[0] if cut else at


# --------------------------------------------------------------------------------------------------
# Chat templates: programs of strangers, rendered in a process of their own, within limits

TEMPLATE_SECONDS = 2  # of processor time for a rendering; one more for a million characters given
TEMPLATE_MEMORY = 1 << 30  # bytes that the process has, on Linux
TEMPLATE_GROWTH = 20  # characters out for one in, beside a million


class TemplateLimit(UserError):
    """A chat template took more time, memory or room than a rendering may."""


@lru_cache(8)
def compile_template(text):
    """A chat template in jinja2's sandbox, with what transformers lets a template use. What
    {% generation %} surrounds stands between two marks, generation_begin and generation_end."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            begin, end = (
                nodes.Output([nodes.Name(f"generation_{side}", "load")], lineno=line)
                for side in ("begin", "end")
            )
            return nodes.Scope([begin, *body, end], lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    loops = ["jinja2.ext.loopcontrols", Generation]
    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    room.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    room.globals |= {"tools": None, "documents": None, "raise_exception": raise_exception}
    room.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return room.from_string(text)


def render_template(text, given):
    """The text that a chat template makes of its variables."""
    return compile_template(text).render(given)


def template_worker(memory):
    """The process beside: it reads a request a line (JSON) and writes an answer a line. A rendering
    that takes more than its seconds ends the process, whatever it is at."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    if sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            text = render_template(request["template"], request["given"])
            answer = {"text": text} if len(text) <= request["room"] else {"limit": "room"}
        except MemoryError:
            answer = {"limit": "memory"}
        except Exception as error:
            kind = type(error).__name__
            known = kind in ("TemplateError", "SecurityError", "UndefinedError")
            answer = {"error": str(error)[:1000] if known else f"{kind}: {error}"[:1000]}
        print(json.dumps(answer), flush=True)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)


class Renderer:
    """Renders chat templates in a process of its own, which has little time and memory; it is
    started when it is first needed, and again after a rendering has ended it."""

    def __init__(self):
        self.process, self.owner, self.lock = None, os.getpid(), threading.Lock()
        self.overran = {}  # how often in a row a template was over a limit

    def start(self):
        needs = "import json, signal, sys\nfrom datetime import datetime\n"
        needs += "from functools import lru_cache, partial\n"
        parts = (compile_template, render_template, template_worker)
        program = needs + "\n".join(inspect.getsource(part) for part in parts)
        program += f"\nsys.path[:] = {[*map(str, sys.path)]!r}\n"
        program += f"template_worker({TEMPLATE_MEMORY})\n"
        # Without what this process has loaded, and ready in a tenth of a second.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def render(self, template, given):
        """The text that the template makes of its variables; ValueError with the template's own
        words if it raises, TemplateLimit beyond a limit."""
        if self.owner != os.getpid():  # a fork has a process of its own
            self.__init__()
        if self.overran.get(template, 0) >= 3:
            raise TemplateLimit(
                "the chat template was over its limits three times: it is not tried"
            )
        size = len(given_text := json.dumps(given, default=str))
        request = {"seconds": TEMPLATE_SECONDS + size / 1e6, "template": template}
        request["room"] = 1_000_000 + TEMPLATE_GROWTH * size
        line = f'{json.dumps(request)[:-1]}, "given": {given_text}}}\n'.encode()
        with self.lock:
            try:
                answer = self.ask(line, request["seconds"])
            except OSError as error:
                raise TemplateLimit(f"no process to render the chat template: {error}") from None
            except BaseException:  # Ctrl-C: its answer must not be taken for the next one's
                if self.process is not None:
                    self.process.kill()
                self.process = None
                raise
        if limit := answer.get("limit"):
            self.overran[template] = self.overran.get(template, 0) + 1
            over = {
                "memory": f"takes more than {TEMPLATE_MEMORY >> 20} MiB of memory",
                "room": f"makes more than {request['room']:,} characters of {size:,}",
                "time": f"takes more than {request['seconds']:.1f} seconds",
            }
            raise TemplateLimit(f"the chat template {over.get(limit, limit)}: it is refused")
        self.overran.pop(template, None)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def ask(self, line, seconds):
        """The process's answer to a request. One that ended before is replaced."""
        for _ in range(2):
            if self.process is None:
                self.start()
            process, timer = self.process, None
            if not hasattr(signal, "setitimer"):  # no limit of processor time there: by the clock
                timer = threading.Timer(10 * seconds, process.kill)
                timer.start()
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = b""
            if timer:
                timer.cancel()
            if answer.endswith(b"\n"):
                return json.loads(answer)
            self.process = None
            process.kill()
            code = process.wait()
            if timer or code == -signal.SIGPROF:
                return {"limit": "time"}
        return {"limit": f"ends the process that renders it ({code})"}


RENDERER = Renderer()


# --------------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face folder; safetensors read and written here

SAFE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
SAFE_DTYPES |= {"BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
SAFE_DTYPES |= {"I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
INDEX = "model.safetensors.index.json"  # of weights in several files


COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSONL = (".jsonl", ".ndjson", ".jsonlines")
# Each mark and its encoding; UTF-32's stands first, since it begins as UTF-16's does.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8",
}


def file_ending(path):
    """The ending that says what a file holds, in lower case and without that of its compression:
    .jsonl of Rows.JSONL.gz."""
    stem, ending = os.path.splitext(str(path).lower())
    if ending in COMPRESSED:
        ending = os.path.splitext(stem)[1]
    return ending


def is_compressed(path):
    return str(path).lower().endswith(COMPRESSED)


# What decompressors raise; their OSErrors have no number, unlike those of a disk.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError)


def encoding_of(head):
    """The encoding that the first bytes of a file name by a byte order mark, or None."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    return None


def require_zst(where):
    """pyarrow, which reads and writes .zst."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{where}: .zst needs pyarrow: pip install pyarrow") from None
    return pyarrow


def open_compressed(path):
    """A binary file to read, decompressed as the end of its name says."""
    ending = os.path.splitext(str(path))[1].lower()
    if ending == ".gz":
        return gzip.open(path)
    if ending == ".bz2":
        return bz2.open(path)
    if ending == ".xz":
        return lzma.open(path)
    if ending == ".zst":
        pyarrow = require_zst(path)
        packed = pyarrow.OSFile(os.fspath(path))
        return io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"))
    return open(path, "rb")


def open_input(path):
    """A text file's bytes to read, as UTF-8 without a byte order mark, decompressed by its name.
    What such a mark says is UTF-16 or UTF-32 is read whole; a UnicodeDecodeError if it is not."""
    file = open_compressed(path)
    try:
        encoding = encoding_of(file.peek(4)[:4])
        if encoding == "utf-8":
            file.read(len(codecs.BOM_UTF8))
        if encoding in ("utf-16", "utf-32"):
            with file:
                return io.BytesIO(file.read().decode(encoding).encode())
    except BaseException:
        file.close()
        raise
    return file


def read_input(path):
    """All bytes of a text file, as `open_input` has them. A UserError where they cannot be had."""
    try:
        with open_input(path) as file:
            return file.read()
    except (*DAMAGE, OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {why}") from None


def parse_json(text, where):
    """The value of a JSON text (str or bytes). What is no JSON, or nests beyond what Python reads,
    is a UserError that begins with `where`, such as "rows.jsonl:7"."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply to read") from None
    except ValueError as error:
        begin = text[:60].decode(errors="replace") if isinstance(text, bytes) else text[:60]
        raise UserError(f"{where}: no JSON: {begin!r} ({error})") from None


def read_json(path, default=None):
    """The JSON object in the file; `default`, if given, where there is no file."""
    if default is not None and not Path(path).exists():
        return default
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: is {Path(path).parent} what was meant?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write that appears under `path` when all of it is on the disk, or never. Its
    name is on the disk, too, before anything that comes after it."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(Path(path).parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):  # a full disk, no such folder, no right to write
            name = str(error.filename)
            name = name.removesuffix(".tmp") if name.endswith(".tmp") else path
            why = error.strerror or str(error)
            raise UserError(f"{name}: cannot be written: {why}; nothing was changed") from None
        raise


def sync_folder(folder):
    """Wait until the names in a folder are on the disk: what is renamed or removed before this call
    is so after a power failure too, whatever is done behind it."""
    with contextlib.suppress(OSError):  # a system whose folders cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path, value):
    """Write a value as JSON; a file that says it already, byte for byte, is left alone."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    data = text.encode(errors="backslashreplace")  # JSON's way to write half a surrogate
    with contextlib.suppress(OSError):
        if Path(path).read_bytes() == data:
            return
    with whole_file(path) as file:
        file.write(data)


def write_safetensors(file, tensors, metadata):
    """Write {name: tensor} and {str: str} to a binary file in the safetensors format."""
    codes = {dtype: code for code, dtype in SAFE_DTYPES.items()}
    header, at = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        end = at + t.numel() * t.element_size()
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for t in tensors.values():
        file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_header(path, file):
    """Check an open safetensors file and go to its data: ({name: (dtype, shape)} in their order,
    metadata). Anything that the format forbids is a UserError."""
    size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
        raise UserError(f"{path}: not a whole safetensors file (cut short, or another format)")
    try:
        header = json.loads(file.read(length).decode())
        metadata = dict(header.pop("__metadata__", None) or {})
        entries, at = {}, 0
        for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, place = SAFE_DTYPES[e["dtype"]], e["shape"], e["data_offsets"]
            natural = all(type(n) is int and n >= 0 for n in [*shape, *place])
            if not natural or math.prod(n or 1 for n in shape) >= 1 << 60:  # as of 0 x 2^99
                raise ValueError(f"{name} has no shape or place")
            entries[name], begin = (dtype, shape), at
            at += math.prod(shape) * dtype.itemsize
            if place != [begin, at]:
                raise ValueError(f"{name} does not fill its place")
        if 8 + length + at != size:
            raise ValueError(f"{size} bytes, but the header describes {8 + length + at}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: malformed safetensors file: {error!r:.200}") from None
    return entries, metadata


def entries_of(path):
    """{name: (dtype, shape)} of a safetensors file."""
    try:
        with open(path, "rb") as file:
            return read_header(path, file)[0]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_safetensors(path):
    """({name: tensor}, metadata) of a file; the tensors own their memory."""
    tensors = {}
    try:
        with open(path, "rb") as file:
            entries, metadata = read_header(path, file)
            for name, (dtype, shape) in entries.items():
                tensors[name] = torch.empty(shape, dtype=dtype)
                file.readinto(tensors[name].view(-1).view(torch.uint8).numpy())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return tensors, metadata


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


def is_hub_name(name):
    """Whether a name that is no folder here may be a Hub model's (owner/name, or name)."""
    owner = str(name).partition("/")[0]
    local = owner == "out" or Path(owner).exists()
    return not local and bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)))


def find(name):
    """The folder of a model: one that is here, or else a Hub model's (owner/name, or name), which
    is downloaded once, to ~/.cache/barelm. Environment: HF_ENDPOINT, HF_TOKEN."""
    folder = Path(name)
    try:
        if folder.is_dir():
            return folder
        on_the_hub = is_hub_name(name)
    except (OSError, ValueError):  # too long a name, or one with a NUL
        raise UserError(f"{str(name)[:60]!r}: no name of a folder") from None
    if not on_the_hub:
        raise UserError(f"{folder}: no such folder (train.py and finetune.py write out/NAME)")
    cached = Path.home() / ".cache/barelm" / str(name).replace("/", "--")
    while int(os.environ.get("LOCAL_RANK", 0)) and not cached.is_dir():
        time.sleep(1)  # the machine's first process downloads; where it fails, torchrun ends all
    if not cached.is_dir():
        download_model(str(name), cached)
    return cached


def download_model(name, folder):
    """Fetch the files of a Hub model that are read here. The folder has its name when it has all;
    what was refused, or cut, goes on from where it was."""
    token, part = os.environ.get("HF_TOKEN"), folder.with_name(folder.name + ".part")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    get = lambda file, **how: download(
        f"{HUB}{name}/resolve/main/{file}", part / file, headers=headers, **how
    )
    try:
        get("config.json", tries=1)
    except UserError as error:
        why = str(error).removeprefix(f"{HUB}{name}/resolve/main/config.json: ")
        raise UserError(f"{name}: neither a folder here nor a model from {HUB}: {why}") from None
    read_config(part)
    for file in ("tokenizer", "tokenizer_config", "special_tokens_map", "generation_config"):
        get(f"{file}.json", optional=True)
    get("chat_template.jinja", optional=True)
    Tokenizer.from_folder(part)  # what does not run here is refused before its weights come
    if not get("model.safetensors", optional=True):
        get(INDEX, optional=True)
        for path in weights_of(part):
            get(path.name)
    os.replace(part, folder)


def read_config(folder):
    """A folder's config.json, as a dict and as a GPTConfig."""
    path = folder / "config.json"
    d = read_json(path)
    try:
        c = from_hf_config(d, path)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: malformed: {error}") from None
    size = d.get("adapter_size")
    whole = type(size) is int and 0 <= size <= LARGEST
    pooled = ("last", "mean") if d["model_type"] == "barelm" else ("last",)
    checks = {"adapter_size": size is None or whole, "pooling": d.get("pooling", "last") in pooled}
    checks["quantize"] = d.get("quantize") in (None, "int8", "int4")
    for key, good in checks.items():
        if not good:
            raise UserError(f"{path}: {key}={d[key]!r:.60} not supported")
    return d, c


def weights_of(folder):
    """The paths of the files that hold a folder's tensors: one, or those that an index names."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if not whole.is_file() and index.is_file():
        names = read_json(index).get("weight_map")
        names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else [""]
        if not all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names):
            raise UserError(f"{index}: malformed: expected names of safetensors files")
        return [folder / name for name in names]
    if not whole.is_file():
        why = "no model.safetensors here, nor its index (a pytorch_model.bin is a pickle, "
        raise UserError(f"{folder}: {why}which may run code: convert it where you trust it)")
    return [whole]


def open_shard(path):
    """The tokens of an llm.c .bin shard, as a memory map (N,) uint16 or uint32."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=256), os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    kinds = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
    kind = kinds.get(tuple(header[:2].tolist()))
    if len(header) < 256 or kind is None:
        raise UserError(f"{path}: not a token shard (python prepare.py makes them)")
    count = int(header[2])
    if count < 0 or size != 1024 + count * kind.itemsize:
        why = f"{size:,} bytes are not the {count:,} tokens that were written"
        raise UserError(f"{path}: cut short, or damaged: {why}; prepare it again")
    if count == 0:  # which no memory map can be of
        return np.empty(0, kind)
    return np.memmap(path, dtype=kind, mode="r", offset=1024, shape=(count,))


def check_tokens(ids, n_vocab, path):
    """Refuse ids, an array of the shard at path, that are not below n_vocab."""
    if len(ids) and ids.max() >= n_vocab:
        why = f"the tokenizer has {n_vocab:,} tokens: prepare it again"
        raise UserError(f"{path}: token {ids.max()}, but {why}")


def document_layout(folder, tok):
    """(ids before a document, ids behind it) in the shards of a dataset, as its meta.json has them;
    shards of an earlier version, which say nothing, have `eot_id` before each document."""
    layout = read_json(Path(folder) / "meta.json").get("document")
    if layout is None:
        return [tok.eot_id], []
    try:
        begin, end = layout["begin"], layout["end"]
        ids = begin + end
        if ids and all(type(id) is int and 0 <= id < tok.n_vocab for id in ids):
            return begin, end
    except (KeyError, TypeError):
        pass
    why = f"document: expected lists of ids, begin and end, and not {layout}"
    raise UserError(f"{folder}/meta.json: {why}")


def load(folder, device="cpu", dtype=torch.float32, quantize=None):
    """Open a checkpoint folder, ours or Hugging Face's, or a model of the Hub by its name: (GPT in
    eval mode, Tokenizer).
    quantize: int8 or int4 for the linear layers; what is left of the network stays in dtype."""
    folder = find(folder)
    if is_adapter(folder):
        return load_adapted(folder, device, dtype, quantize)
    d, c = read_config(folder)
    if d["model_type"] == "mistral" and c.n_ctx < d["max_position_embeddings"]:
        print(f"{folder}: the context ends with the sliding window, at {c.n_ctx} tokens")
    tok = Tokenizer.from_folder(folder)
    if tok.n_vocab > c.vocab_size:
        raise UserError(f"{folder}: {tok.n_vocab} tokens, but the model knows {c.vocab_size}")
    gpt2 = d["model_type"] == "gpt2"
    unread = GPT2_MASKS if gpt2 else (".rotary_emb.inv_freq",)
    entries = read_entries(folder, unread)
    check_layers(folder, entries, c.n_layer)  # before anything of that size is built
    labels = read_labels(folder, d, entries)
    with torch.device("meta"):
        net = GPT(c)
        if size := d.get("adapter_size"):
            add_adapters(net, size)
        if labels:
            net.set_score(labels, d.get("pooling", "last"), d.get("pad_token_id"))
        if d.get("quantize"):
            quantize_weights(net, d["quantize"])
    check_entries(folder, entries, net, gpt2)
    tensors = read_weights(folder, unread, dtype)
    want = net.state_dict()
    if c.tie and isinstance(net.lm_head, QuantizedLinear):
        del want["model.embed_tokens.weight"]
    tensors = from_gpt2(tensors, want) if gpt2 else tensors
    if c.tie and "model.embed_tokens.weight" in tensors:
        table = tensors["model.embed_tokens.weight"]
        tied = tensors.get("lm_head.weight", table)
        if tied.dtype != table.dtype or not tied.equal(table):
            raise UserError(f"{folder}: lm_head.weight is not the embedding that it is tied to")
        tensors["lm_head.weight"] = table
    if labels and "lm_head.weight" not in tensors:  # a classifier's file has none: nothing reads it
        tensors["lm_head.weight"] = torch.zeros(c.vocab_size, c.n_embd)
    for n, t in want.items():  # codes and their scales keep their types
        tensors[n] = tensors[n].to(device, dtype if t.dtype == torch.float32 else t.dtype)
    net.load_state_dict({n: tensors[n] for n in want}, strict=False, assign=True)
    tie_embedding(net, dtype)
    if quantize:
        quantize_weights(net, quantize)
    return net.eval(), tok


def read_entries(folder, unread):
    """{name: (dtype, shape)} of the tensors in a folder's files, of which each holds others, but
    for names that end with one of `unread`."""
    entries = {}
    for path in weights_of(folder):
        for name, entry in entries_of(path).items():
            if name in entries:
                raise UserError(f"{path}: {name} is in another file of the folder too")
            if not name.endswith(unread):
                entries[name] = entry
    return entries


def check_layers(folder, entries, n_layer):
    """Refuse files whose names are those of another number of layers than config.json's."""
    found = set()
    for name in entries:
        if match := re.match(r"(?:model\.layers|(?:transformer\.)?h)\.(\d{1,9})\.", name):
            found.add(int(match[1]))
    if len(found) != n_layer:
        raise UserError(f"{folder}: {n_layer} layers in config.json, {len(found)} in its weights")


def read_labels(folder, d, entries):
    """The labels of a folder's classifier, by a config.json's dict d; none of a text model's."""
    if "ForSequenceClassification" not in str(d.get("architectures")):
        return []
    _, shape = entries.get("score.weight", (None, []))
    if len(shape) != 2 or shape[0] == 0:
        raise UserError(f"{folder}: a classifier by its config.json, but without a score.weight")
    usual = {str(i): f"LABEL_{i}" for i in range(shape[0])}
    labels = usual if d.get("id2label") is None else d["id2label"]
    good = isinstance(labels, dict) and labels.keys() == usual.keys()
    good = good and all(isinstance(label, str) for label in labels.values())
    if not good or len(set(labels.values())) < shape[0]:
        why = f"{labels!r:.60}: expected a name of its own for each of 0 to {shape[0] - 1}"
        raise UserError(f"{folder}/config.json: id2label={why}")
    return [labels[number] for number in usual]


def check_entries(folder, entries, net, gpt2):
    """Refuse files whose tensors, {name: (dtype, shape)}, are not the network's."""
    want = saved_tensors(net)
    if gpt2:  # whose own files have no prefix
        want = {name.removeprefix("transformer."): t for name, t in to_gpt2(want).items()}
        short = {name.removeprefix("transformer."): entry for name, entry in entries.items()}
        if len(short) < len(entries):
            raise UserError(f"{folder}: tensors with and without the prefix transformer.")
        entries = short
    spare = {"lm_head.weight": net.lm_head.weight}  # of a tied head, or beside a classifier's
    bad = []
    for name, t in (spare | want).items():
        if name in want or name in entries:
            dtype, shape = entries.get(name, (torch.bool, []))
            both_float = dtype.is_floating_point and t.is_floating_point()
            if shape != list(t.shape) or not (both_float or dtype == t.dtype):
                bad.append(name)
    for name in entries:
        if name not in want and name not in spare:
            bad.append(name)
    if bad:
        raise UserError(f"{folder}: tensors that config.json does not fit: {', '.join(bad[:3])}")


def read_weights(folder, unread, dtype):
    """{name: tensor} of a folder's files, but for names that end with one of `unread`. What is not
    finite as dtype is a UserError."""
    tensors = {}
    for path in weights_of(folder):
        part, _ = read_safetensors(path)
        part = {name: t for name, t in part.items() if not name.endswith(unread)}
        check_finite(path, part, dtype)
        tensors |= part
    return tensors


def check_finite(path, tensors, dtype=torch.float32):
    """Refuse {name: tensor} with a NaN or an infinity, or with a number that dtype has none for."""
    largest = torch.finfo(dtype).max
    for name, t in tensors.items():
        if t.is_floating_point() and t.numel():
            low, high = (x.item() for x in t.detach().aminmax())  # a NaN anywhere is both
            if not (low >= -largest and high <= largest):
                raise UserError(f"{path}: {name} has numbers that are not finite in {dtype}")


def is_adapter(folder):
    """Whether a folder holds an adapter, and no model of its own."""
    if not (folder / "adapter_config.json").is_file():
        return False
    weights = [name for name in ("model.safetensors", INDEX) if (folder / name).is_file()]
    if not (folder / "config.json").is_file() or not weights:
        return True
    if (folder / "adapter_model.safetensors").is_file():
        why = f"{weights[0]} and adapter_model.safetensors are here: move one of them away"
        raise UserError(f"{folder}: a model, or an adapter? {why}")
    return False


def load_adapted(folder, device, dtype, quantize, above=()):
    """Open a PEFT folder of LoRA: its base (a path as seen from the folder, or what `find` takes),
    with the adapter's products added to its weights. above: the adapters that have it as base."""
    path = folder / "adapter_config.json"
    d = read_json(path)
    check_adapter(path, d)
    base, above = find_base(folder, d["base_model_name_or_path"]), (*above, folder.resolve())
    if base.resolve() in above:
        raise UserError(f"{path}: the base {base} is this adapter, or is made with it")
    if is_adapter(base):
        net, tok = load_adapted(base, device, dtype, None, above)
    else:
        net, tok = load(base, device, dtype)
    weights = dict(net.named_parameters())
    names = gpt2_names(weights) if family(net.config) == "gpt2" else {n: [n] for n in weights}
    bare = lambda n: n.removeprefix("transformer.").removeprefix("model.")
    names |= {bare(n): ours for n, ours in names.items()}  # as transformers' AutoModel has them
    file = folder / "adapter_model.safetensors"
    tensors, _ = read_safetensors(file)
    pairs = {key: key.replace("lora_A", "lora_B") for key in tensors if ".lora_A.weight" in key}
    if tensors.keys() != {*pairs, *pairs.values()}:
        why = "only LoRA's two matrices a layer are read, not rsLoRA, DoRA or modules_to_save"
        raise UserError(f"{folder}: {why}")
    if odd := [name for name, t in tensors.items() if not t.is_floating_point()]:
        raise UserError(f"{file}: {odd[0]} has whole numbers, no weights")
    check_finite(file, tensors)
    for key, other in pairs.items():
        A, B = tensors[key], tensors[other]
        name = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        ours = [weights[n] for n in names.get(f"{name}.weight", ())]
        rows = [len(p) for p in ours]
        fits = ours and A.ndim == 2 and ours[0].shape[1] == A.shape[1]
        if not fits or B.shape != (sum(rows), len(A)):
            why = f"an adapter for another base than {base}: {key} does not fit"
            raise UserError(f"{folder}: {why}")
        rank = of_pattern(d.get("rank_pattern"), name, d["r"])
        if rank != len(A):
            raise UserError(f"{path}: r={rank!r:.60}, but {key} has {len(A)} rows")
        alpha = of_pattern(d.get("alpha_pattern"), name, d["lora_alpha"])
        delta = (alpha / rank) * (B.float() @ A.float()).to(device)
        with torch.no_grad():
            for p, part in zip(ours, delta.split(rows)):
                p += part.to(p.dtype)
                check_finite(file, {key: p}, p.dtype)
    if quantize:
        quantize_weights(net, quantize)
    if (folder / "tokenizer.json").is_file():
        base_ends, tok = tok.eos_ids, Tokenizer.from_folder(folder)
        if not (folder / "generation_config.json").is_file():  # as PEFT leaves it: the base's count
            tok.eos_ids = list(dict.fromkeys([*tok.eos_ids, *base_ends]))
    if tok.n_vocab > net.config.vocab_size:
        why = f"{tok.n_vocab} tokens, but the base knows {net.config.vocab_size}"
        raise UserError(f"{folder}: {why}")
    return net, tok


# Of an adapter_config.json: what may be anything, since it changes no product or is checked apart.
PEFT_NOTES = """alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out
inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type
peft_version qalora_group_size r rank_pattern runtime_config target_modules task_type"""
# What else may be there with a value; any other key with one changes the product.
PEFT_EXACT = dict(bias=("none",), revision=("main",))
PEFT_EXACT |= dict(init_lora_weights=(True, "gaussian", "orthogonal", "eva"))


def check_adapter(path, d):
    """Refuse an adapter_config.json that is no plain LoRA's: adapter_config.json at path, as d."""
    named = d.get("base_model_name_or_path")
    if not named or not isinstance(named, str) or d.get("peft_type") != "LORA":
        raise UserError(f"{path}: no LoRA adapter, or one that does not name its base")
    odd = []
    for key, value in d.items():
        if key not in PEFT_NOTES.split() and value and value not in PEFT_EXACT.get(key, ()):
            odd.append(f"{key}={value!r:.60}")
    if odd:
        what = "only plain LoRA is read, not rsLoRA, DoRA, modules_to_save or other kinds"
        raise UserError(f"{path}: {', '.join(odd[:3])}: {what}")
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns[key] = {} if d.get(key) is None else d[key]
        if not isinstance(patterns[key], dict):
            raise UserError(f"{path}: {key}: expected names with a number each")
        for name in patterns[key]:
            check_pattern(path, name)
    for rank in (d.get("r"), *patterns["rank_pattern"].values()):
        if type(rank) is not int or not 1 <= rank <= LARGEST:
            raise UserError(f"{path}: r={rank!r:.60}: expected a whole number above 0")
    for alpha in (d.get("lora_alpha"), *patterns["alpha_pattern"].values()):
        if type(alpha) not in (int, float) or not abs(alpha) <= LARGEST:
            raise UserError(
                f"{path}: lora_alpha={alpha!r:.60}: expected a number, at most {LARGEST}"
            )


def check_pattern(path, pattern):
    """Refuse what is no regular expression, or repeats a group, which may take for ever."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: {pattern!r:.60}: no regular expression: {error}") from None
    if re.search(r"\)[*+{]", pattern):
        raise UserError(f"{path}: {pattern!r:.60}: a repeated group is not supported")


def of_pattern(patterns, name, usual):
    """What patterns, {regular expression: value}, have for a layer's name, or for what follows a
    dot in it; `usual` where none matches. As in PEFT the first that matches counts."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return usual


def find_base(folder, name):
    """The folder of an adapter's base, by the name that the adapter in `folder` has for it."""
    try:
        beside = folder / name
        if beside.is_dir():
            return beside
        exists = beside.exists()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        raise UserError(f"{folder}: the base {name!r:.60} is no name of a folder") from None
    if exists:
        raise UserError(f"{folder}: the base {name!r:.60} is a file, not a folder")
    return find(name)


def saved_tensors(net):
    """The tensors that a network's file holds, by our names: of tied ones, the one that is read."""
    absent = "lm_head.weight" if net.config.tie or net.score is not None else None
    if net.config.tie and isinstance(net.lm_head, QuantizedLinear):
        absent = "model.embed_tokens.weight"
    return {n: t for n, t in net.state_dict().items() if n != absent}


def save(folder, net, tok, step=0, state=None):
    """Write a checkpoint folder; with `state` (tensors and plain values) also state.pt, to resume.
    The weights, without which nothing opens the folder, come last. The folder is new, or of this
    very model: another model's is taken apart first (`clear_folder`)."""
    folder, c = Path(folder), net.config
    make_folder(folder)
    tensors, config = saved_tensors(net), to_hf_config(net, tok)
    tensors = to_gpt2(tensors) if config["model_type"] == "gpt2" else tensors
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer.json", tok.spec)
    write_json(folder / "tokenizer_config.json", tok.config | {"model_max_length": c.n_ctx})
    write_weights(folder / "model.safetensors", tensors, step, state)


# --------------------------------------------------------------------------------------------------
# Folders of runs. What vouches for a folder, its weights, goes first when the folder is taken apart
# and comes last when it is put together, so that a kill leaves the old, the new, or what no reader
# opens: never one's tokenizer with the other's weights.

# What a folder of weights has beside them. The last four only other people's folders have.
COMPANIONS = ["config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"]
COMPANIONS += ["generation_config.json", "special_tokens_map.json", "chat_template.jinja"]
COMPANIONS += ["added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"]
WEIGHTS = ["*.safetensors.index.json", "*.bin.index.json"]  # these name the other files
WEIGHTS += ["*.safetensors", "pytorch_model*.bin", "adapter_model.bin"]
STATES = ["state.pt", "state.pt.tmp"]
PARTS = ["best", "merged"]  # a run's folders within its own: models of their own


def holds_model(folder):
    """The files of a folder that a new run would replace, or leave beside itself as if they were
    its own: configs, tokenizers, weights, indexes and states, in best/ and merged/ too."""
    found = []
    for place in (Path(folder), *(Path(folder) / part for part in PARTS)):
        for pattern in [*WEIGHTS, *STATES, *COMPANIONS]:
            found += sorted(place.glob(pattern))
    return found


def clear_folder(folder):
    """Take a model's folder apart, its best/ and merged/ with it: what vouches goes first. Files
    that are no part of a model stay."""
    folder = Path(folder)
    for part in PARTS:
        if (folder / part).is_dir():
            clear_folder(folder / part)
    for patterns in (WEIGHTS, STATES, COMPANIONS):
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                path.unlink()
        sync_folder(folder)
    for path in sorted(folder.glob("*.safetensors.tmp")):  # of a run that was killed
        path.unlink()
    if folder.name in PARTS and folder.is_dir():
        with contextlib.suppress(OSError):  # the user's own files are in it
            folder.rmdir()


def move_files(source, folder, last):
    """Move the files of one folder into another of the same disk, that named `last` last."""
    for path in sorted(Path(source).iterdir()):
        if path.name != last:
            os.replace(path, Path(folder) / path.name)
    sync_folder(folder)
    os.replace(Path(source) / last, Path(folder) / last)
    sync_folder(folder)


def make_folder(folder, flag="--out_dir"):
    """Make a folder, and the ones above it; a name that cannot be one is a UserError."""
    if not str(folder):
        raise UserError(f"{flag} is empty: expected the name of a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{flag}={folder}: File exists, but is no folder: take another") from None
    except OSError as error:
        raise UserError(f"{flag}={folder}: {error.strerror}: take another") from None
    except ValueError as error:  # a zero byte, half a character
        raise UserError(f"{flag}={str(folder)!r}: {error}: take another") from None


@contextlib.contextmanager
def locked_folder(folder, patience=3.0):
    """Make a run's folder and be the only run that writes into it while the context lasts. The lock
    is the system's, on the file .lock: it ends with the process, however that ends. Of several
    processes the first has it. A folder that stays empty is removed again.
    patience: seconds to wait for another run's lock; one that was killed takes a moment to end."""
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    if not str(folder):
        raise UserError("--out_dir is empty: expected the name of a folder")
    folder, new = Path(folder), not os.path.lexists(folder)
    make_folder(folder)
    if any(folder.glob("train_*.bin")):
        raise UserError(f"--out_dir={folder}: it holds prepared data: take another")
    try:
        lock = open(folder / ".lock", "a")
    except OSError as error:
        why = f"cannot be written to: {error.strerror}: take another"
        raise UserError(f"--out_dir={folder}: {why}") from None
    try:
        take_lock(lock, folder, patience)
        yield
    finally:
        with contextlib.suppress(OSError):
            if new and os.listdir(folder) == [".lock"]:
                os.unlink(folder / ".lock")
                os.rmdir(folder)
        lock.close()  # which gives the lock back


def take_lock(lock, folder, patience):
    """Lock an open file for this process, or say why there is no lock on this system."""
    try:
        import fcntl  # not on every system
    except ImportError:
        return say_no_lock(folder, "this system has none")
    give_up = time.monotonic() + patience
    while True:
        try:  # lockf, unlike flock, is not passed on to a process that this one leaves behind
            return fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() > give_up:
                why = "wait for its end, or take another --out_dir"
                raise UserError(f"{folder}: another run is writing into it: {why}") from None
            time.sleep(0.1)
        except OSError as error:
            return say_no_lock(folder, error.strerror)


def say_no_lock(folder, why):
    print(f"{folder}: no lock ({why}): see to it that no other run writes into it", flush=True)


def model_and_bases(name):
    """The folders that a model is read from: its own and, of an adapter, those of its base."""
    folders, folder = [], find(name)
    while folder not in folders:
        folders.append(folder)
        adapted = (folder / "adapter_config.json").is_file()
        if not adapted or (folder / "config.json").is_file():
            break
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str):  # which `load` refuses
            break
        folder = folder / base if (folder / base).is_dir() else find(base)
    return folders


def refuse_source(out_dir, name):
    """Refuse to write into a folder that the model of this name is read from: what is replaced
    before the first save would be lost with a kill."""
    places = [Path(out_dir)] + [Path(out_dir) / part for part in PARTS]
    for source in model_and_bases(name):
        if source.resolve() in [place.resolve() for place in places]:
            raise UserError(f"--out_dir={out_dir}: it is the model to start from: take another")


# --------------------------------------------------------------------------------------------------
# What a run goes on from: weights, the state beside them, its log, its settings


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(paths):
    """A hash that names the contents of files: of each its size and 64 pieces of 256 KiB, evenly
    spread, so that a large model takes no longer than a small one."""
    digest, piece = hashlib.sha256(), 1 << 18
    for path in paths:
        size = os.path.getsize(path)
        digest.update(f"{Path(path).name} {size} ".encode())
        with open(path, "rb") as file:
            for i in range(min(64, -(-size // piece))):
                file.seek(max(0, size - piece) * i // 63 if size > 64 * piece else i * piece)
                digest.update(file.read(piece))
    return digest.hexdigest()


def write_weights(path, tensors, step, state=None):
    """Write weights and, with `state`, state.pt beside them. state.pt holds the step and the hash
    of the weights, and both are whole on the disk before the weights are renamed and then the
    state: killed at any moment, a process leaves weights and a state, of either name, that fit."""
    path = Path(path)
    with contextlib.ExitStack() as renamed_last:
        if state is not None:
            state_file = renamed_last.enter_context(whole_file(path.with_name("state.pt")))
        with whole_file(path) as file:
            write_safetensors(file, tensors, {"format": "pt", "step": str(step)})
            file.flush()
            if state is not None:
                names = {"weights_file": path.name, "weights_sha256": file_sha256(file.name)}
                write_state(state_file, state | {"step": step} | names)


def write_state(file, state):
    """torch.save into an open file, whole on the disk when this returns. What is wrong with the
    disk is an OSError, in whose place torch raises an error of its own."""
    try:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, file.name) from None


def read_state(path):
    """The dict that torch.save wrote into a file: (it, "") or (None, why there is none)."""
    if not path.is_file():
        return None, "absent"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
            if archive.testzip() is not None:
                return None, "damaged"
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever zipfile and torch raise at bytes that are no file of theirs
        return None, "damaged, or no file of ours"
    if not isinstance(state, dict) or not isinstance(state.get("weights_sha256"), str):
        return None, "without a hash of its weights"
    return state, ""


def load_state(folder):
    """The training state that belongs to the weights in a folder. Its entry `temporary` says that
    it still has the temporary name: the save was cut between its two renames."""
    folder, reasons = Path(folder), []
    files = [folder / name for name in ("model.safetensors", "adapter_model.safetensors")]
    files = [path for path in files if path.is_file()]
    if not files:
        raise UserError(f"{folder}: no checkpoint to resume: start a run without --init_from")
    weights = files[0]
    digest = file_sha256(weights)
    with open(weights, "rb") as file:
        step = read_header(weights, file)[1].get("step")
    for name in STATES:
        state, why = read_state(folder / name)
        if state and state.get("weights_file") == weights.name:
            if state["weights_sha256"] == digest and str(state.get("step")) == step:
                return state | {"temporary": name.endswith(".tmp")}
            why = f"of step {state.get('step')}"
            if str(state.get("step")) == step:
                raise UserError(
                    f"{weights}: not as it was saved at step {step}: changed since, or damaged, so "
                    f"that no resume would be exact; start anew in another --out_dir"
                )
        reasons.append(f"{name} is {why or 'of other weights'}")
    raise UserError(
        f"{folder}: no state.pt of the weights' step {step}, so that no resume would be exact "
        f"({', '.join(reasons)}); start from these weights in another --out_dir"
    )


def check_state(state, kinds, path):
    """Refuse a state that lacks an entry or has one of another kind. kinds: {name: a value of the
    kind}; a number is 0 or more where that value is, and NaN only where that is."""
    for name, like in kinds.items():
        value = state.get(name)
        right = type(value) is type(like)
        if right and isinstance(like, (int, float)) and like == like:  # of NaN any float will do
            right = 0 <= value < 1 << 60 if like >= 0 else value == value
        if not right:
            shown = repr(value)[:40]
            raise UserError(f"{path}: {name} is {shown}, as no run saves it: damaged, or foreign")


def check_rows(rows, like, path):
    """Refuse a list from a state whose items are not lists of the same kinds as `like`."""
    for row in rows:
        if type(row) is not list or [type(x) for x in row] != [type(x) for x in like]:
            raise UserError(f"{path}: {row!r:.40} is no row of a run's: damaged, or foreign")


def restore_optimizers(optimizers, saved, path):
    """Put saved state_dicts into optimizers, whose settings stay this run's: its learning rate may
    be another. What does not fit the parameters is a UserError."""
    entries = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum"}}
    wrong = UserError(f"{path}: its optimizers are not this run's: damaged, or foreign")
    if not isinstance(saved, list) or len(saved) != len(optimizers):
        raise wrong
    for optimizer, before in zip(optimizers, saved):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = before.get("state") if isinstance(before, dict) else None
        if not isinstance(state, dict):
            raise wrong
        for number, entry in state.items():
            if type(number) is not int or not 0 <= number < len(params):
                raise wrong
            p, names = params[number], entries[type(optimizer).__name__]
            if not isinstance(entry, dict) or set(entry) != names:
                raise wrong
            for name, value in entry.items():
                if not same_kind(value, torch.zeros(()) if name == "step" else p):
                    raise wrong
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def same_kind(value, like):
    """Whether a value is a plain tensor of the shape and dtype of the tensor `like`."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return value.shape == like.shape and value.dtype == like.dtype


def open_log(path, step, say):
    """A run's log.jsonl to append rows to (`write_row`), cut to its rows up to `step`: later ones
    belong to steps that will run again. Lines that are no rows are left out."""
    rows, bad = [], 0
    data = Path(path).read_bytes() if Path(path).exists() else b""
    for line in data.split(b"\n")[:-1]:  # behind the last end of line is what a kill cut
        try:
            row_step = parse_json(line.decode(), path)["step"]
            if row_step <= step:
                rows.append(line + b"\n")
        except (UserError, ValueError, KeyError, TypeError):
            bad += 1
    if bad:
        say(f"{path}: {bad} lines that are no rows of a log are left out")
    with whole_file(path) as file:
        file.write(b"".join(rows))
    return open(path, "ab", buffering=0)  # no buffer that a full disk would leave half written


def write_row(log, row):
    """Append a row to a run's log. On a full disk there is nothing of it, and a UserError."""
    line, end = (json.dumps(row) + "\n").encode(), log.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[log.write(line) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            log.truncate(end)
        why = f"cannot be written: {error.strerror}; the last save is kept"
        raise UserError(f"{log.name}: {why}") from None


# A run has parts: its start begins one, each resume another. run.json and state.pt list them, each
# a dict: the step at which it began, its config (every key's value), its facts (what that came to
# on the machine, such as the dtype), its command and versions.


def changed_settings(part, config, facts):
    """What is no longer as it was in that part of a run: {key: "key old -> new"}."""
    changed, before = {}, part["config"] | part["facts"]
    for key, value in (config | facts).items():
        old, new = (" ".join(repr(x).split())[:40] for x in (before.get(key), value))
        if old != new or key not in before:
            changed[key] = f"{key} {old} -> {new}"
    return changed


def refuse_changes(changed, fixed, out, but=""):
    """Refuse to resume a run where one of the `fixed` settings has changed."""
    names = [key for key in fixed if key in changed]
    if names:
        raise UserError(
            f"{out}: no resume with another {', '.join(names)}, which would make it another curve "
            f"({', '.join(changed[key] for key in names)}): use the run's own settings "
            f"({out}/run.json has them){but}, or start anew in another --out_dir"
        )


def say_changes(changed, parts, say):
    """Tell what a resume changes in a run of these parts, in a line."""
    since = "the first part" if len(parts) == 1 else f"the part from step {parts[-1]['step']}"
    if changed:
        say(f"changed since {since}: {', '.join(changed.values())}")


def check_parts(parts, path):
    """Refuse a list of parts, read from a state, that no run has written."""
    right = len(parts) > 0
    for part in parts:
        right = right and isinstance(part, dict) and type(part.get("step")) is int
        right = right and all(isinstance(part.get(key), dict) for key in ("config", "facts"))
    try:
        json.dumps(parts)
    except (TypeError, ValueError, RecursionError):
        right = False
    if not right:
        raise UserError(f"{path}: its parts are not a run's: damaged, or foreign")


def weights_step(folder):
    """The step that the weights in a folder are of, or -1 where none says it."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        path = Path(folder) / name
        if path.is_file():
            with open(path, "rb") as file:
                step = str(read_header(path, file)[1].get("step"))
            return int(step) if step.isdecimal() else -1
    return -1


# --------------------------------------------------------------------------------------------------
# Optimizers


def orthogonalize(g, dtype=torch.float32, steps=5):
    """The nearest semi-orthogonal matrices to g (n, rows, columns), by Newton-Schulz iteration: the
    quintic of Muon (Jordan et al. 2024), whose singular values land between about 0.7 and 1.2."""
    tall = g.shape[-2] > g.shape[-1]
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


def shared(x, f):
    """f(x), where f works on each x[i] alone: every process does a part of x, which all have."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return f(x)
    whole = F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % world))
    mine = f(whole.chunk(world)[dist.get_rank()])
    # torch 2.13 has a new name for it, and a warning for the old one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, mine.contiguous())
    return whole[: len(x)]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), for matrices; equal shapes go together.

    Steps are scaled by 0.2 sqrt(max(rows, columns)), which gives them AdamW's usual size (Liu et
    al. 2025, section 2.2), so that one learning rate serves both."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, shapes = group["lr"], {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
            for shape, params in shapes.items():
                grads, moments = zip(*[(p.grad, self.state[p]["momentum"]) for p in params])
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, moments, group["momentum"])  # Nesterov
                updates = shared(torch.stack(ahead), partial(orthogonalize, dtype=self.dtype))
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                scale = -lr * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(params, updates.unbind(), alpha=scale)


def make_optimizer(net, name="muon", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95,
                   dtype=torch.float32):  # fmt: skip
    """A list of a network's optimizers: AdamW for all, or Muon, with products in `dtype`, for the
    blocks' matrices. Weight decay is for parameters of two dimensions. Each group keeps the peak as
    `initial_lr`."""
    if name not in ("adamw", "muon"):
        raise UserError(f"--optimizer={name}: expected muon or adamw")
    if net.quantize:
        raise UserError(f"{net.quantize} weights are not trained: start from what they were")
    inner, wide, narrow = [], [], []
    for n, p in net.named_parameters():
        if p.requires_grad:
            muon = name == "muon" and ".layers." in n and p.ndim == 2
            (inner if muon else wide if p.ndim > 1 else narrow).append(p)
    groups = [(wide, weight_decay), (narrow, 0.0)]
    groups = [{"params": params, "weight_decay": decay} for params, decay in groups if params]
    optimizers = [torch.optim.AdamW(groups, lr, betas, fused=True)] if groups else []
    if inner:
        optimizers.append(Muon(inner, lr, momentum, weight_decay, dtype))
    for g in (g for o in optimizers for g in o.param_groups):
        g["initial_lr"] = lr
    return optimizers


def check_gradient(norm, step):
    """End a run whose gradient norm is exactly zero: it would go on, and learn nothing."""
    if norm == 0:
        raise UserError(
            f"step {step}: the gradient norm is exactly zero, so that nothing is learned: look at "
            f"what the loss depends on (in train.py try --compile=false); the last save stands"
        )


def weight_sums(params):
    """A number for each tensor (n,) int64 that another value of any of its elements changes: the
    sum of their bits, read as integers."""
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack([p.detach().view(views[p.element_size()]).sum() for p in params])


def check_moved(before, params, lr):
    """End a run whose step, at learning rate lr, left every weight as it was: `before` is what
    weight_sums gave."""
    if torch.equal(before, weight_sums(params)):
        raise UserError(
            f"the first step moved no weight (learning rate {lr:g}): raise learning_rate, or look "
            f"at what the optimizer was given; the last save stands"
        )


def sync_grads(params):
    """Sum the gradients over all processes, in one flat all-reduce (none counts as zero)."""
    if not dist.is_initialized():
        return
    params = [p for p in params if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p)


# --------------------------------------------------------------------------------------------------
# Accounting

PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A10G": 70}
PEAK_TFLOPS |= {"L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}  # dense bfloat16


def peak_flops(device):
    """The device's peak rate in FLOP/s, from its maker's data sheet, or None for an unknown one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * rate for part, rate in PEAK_TFLOPS.items() if part in name), None)


def n_params(net):
    return sum(p.numel() for p in net.parameters())


def flops_per_token(c, seq_len, backward=True):
    """FLOPs per token in matrix products, a multiply and an add each counted (Kaplan et al. 2020),
    attention as the whole seq_len x seq_len square, as is usual; backward costs twice forward."""
    heads = 2 * c.head_dim * (c.n_embd * (c.n_head + c.n_kv_head) + c.n_head * seq_len)
    mlp = c.n_embd * c.n_hidden * (3 if c.mlp == "swiglu" else 2)
    forward = 2 * (c.n_layer * (heads + mlp) + c.n_embd * c.vocab_size)
    return 3 * forward if backward else forward


def memory_estimate(c, params, rows, seq_len, dtype=torch.float32, recompute=False, moments=2,
                    device_type="cpu"):  # fmt: skip
    """Bytes that training needs, estimated: (parameters with gradients and optimizer state, and the
    head's piece; activations of a micro-batch of `rows`). moments: the optimizer's, a parameter."""
    width, heads = dtype.itemsize, (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    mlp = (4 if c.mlp == "swiglu" else 3) * c.n_hidden
    block = 4 * 4 * c.n_embd + width * (2 * c.n_embd + 2 * heads + mlp)
    if device_type == "cpu" and width == 2 and seq_len <= 1024:  # BlockedAttention's probabilities
        block += width * c.n_head * max(128, 5 * seq_len // 8)
    kept = c.n_layer * 4 * c.n_embd + block if recompute else c.n_layer * block
    # The head's: logits, their float32 copy and its gradient; the gradient of its matrix.
    head = c.vocab_size * ((width + 8) * head_rows(device_type, dtype, c.vocab_size) + 4 * c.n_embd)
    return params * 4 * (2 + moments) + head, rows * seq_len * (kept + (4 + width) * c.n_embd)


def free_memory(device):
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # what the kernel could free counts too
        available = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        return 1024 * int(available[1])
    except OSError:  # not Linux: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
