"""Several LoRA adapters of one network, served together: each row of a batch has its own, or none.

    adapters = Adapters(net, tok, {"a": "out/lora1", "b": "out/lora2"}, base="out/python")
    with adapters.used(net, numbers):  # (B, 1) int64: 0 is none, 1 the first
        h = net.hidden(ids)

The base's products are one for all rows, whatever the base is (quantized too). Beside them, all
rows go through the narrow matrices of all adapters at once, which stand side by side; of what comes
out each row keeps its own adapter's columns (a mask), and a second product adds the rest:
y = W x + B (mask * (A x)). All is of fixed shape, and for a few adapters of small rank it costs
less than to gather matrices for each row (as Chen et al. 2023, "Punica", and Sheng et al. 2023,
"S-LoRA", do for thousands).

R: columns of the adapters in use, the largest rank of each one's layers; L: layers that read the
same x and are computed as one product.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from barelm.checkpoint import adapter_tokenizer, find, find_base, is_adapter
from barelm.families import family, table_of
from barelm.peft import Pair, adapter_names, read_adapter_config, read_pairs, scale_of
from barelm.quantized import QuantizedLinear
from barelm.run import UserError, compute_dtype
from barelm.tensor_names import parted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from barelm.tokenizer import Tokenizer
    from model import GPT

Matrices = tuple[torch.Tensor, torch.Tensor]


class Adapters:
    """The adapters of a network by name, numbered from 1 in their order. folders: {name: a PEFT
    folder}; base: the network's own folder, which each has to name as its base.

    names: [str]; toks: [the Tokenizer of each]: its chat template may be its own."""

    def __init__(self, net: GPT, tok: Tokenizer, folders: dict[str, str], base: str | Path) -> None:
        if not net.config.causal or net.config.is_seq2seq:
            raise UserError("--adapters: of decoders alone")
        self.names = list(folders)
        self.toks = []
        self.pairs: list[dict[nn.Module, Matrices]] = []  # of each adapter, by layer
        for name, folder in folders.items():
            path = find(folder)
            if not is_adapter(path):
                raise UserError(f"--adapters: {name}={folder}: no folder of a LoRA adapter")
            config = read_adapter_config(path / "adapter_config.json")
            check_base(path, config["base_model_name_or_path"], Path(find(base)), str(base))
            self.pairs.append(layer_pairs(net, path, config))
            self.toks.append(tokenizer_of(path, tok))
        self.ranks = [max(len(A) for A, _ in pairs.values()) for pairs in self.pairs]
        self.joints: dict[tuple, Matrices | None] = {}
        self.tables: dict[tuple, Tensor] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(range(1, len(self) + 1))

    @contextlib.contextmanager
    def used(
        self, net: GPT, numbers: Tensor | int, active: tuple[int, ...] | None = None
    ) -> Iterator[None]:
        """Within, the network computes with the adapters that `numbers` has for each row, (B, 1)
        int64, or for each token (B, T), or all: a number. active: which there may be among them; a
        row with another one has none. Nothing is changed where there is none."""
        active = self.all if active is None else active
        if not active:
            yield
            return
        net.ops.adapted = Adapted(self, active, numbers)
        try:
            yield
        finally:
            net.ops.adapted = None

    def table(self, active: tuple[int, ...], device: torch.device) -> Tensor:
        """(number of an adapter, R) bool: its own columns of those that are active."""
        key = (active, device)
        if key not in self.tables:
            columns = [number for number in active for _ in range(self.ranks[number - 1])]
            numbers = torch.arange(len(self) + 1)[:, None]
            table = numbers == torch.tensor(columns)  # (n + 1, R)
            self.tables[key] = table.to(device)
        return self.tables[key]

    def joint(
        self, layers: Sequence[nn.Module], active: tuple[int, ...], dtype: torch.dtype
    ) -> Matrices | None:
        """(A (L R, in), B (out of all, L R)) of layers that read the same x, by the active
        adapters; None where none of these adapts any."""
        key = (layers[0], len(layers), active, dtype)
        if key not in self.joints:
            with torch.inference_mode(False):  # they are used within it and outside
                self.joints[key] = self.make_joint(layers, active, dtype)
        return self.joints[key]

    def make_joint(
        self, layers: Sequence[nn.Module], active: tuple[int, ...], dtype: torch.dtype
    ) -> Matrices | None:
        if not any(layer in self.pairs[i - 1] for layer in layers for i in active):
            return None
        narrow = []  # (R, in) of each layer
        wide = []  # (out, R)
        for layer in layers:
            n_out, n_in = shape_of(layer)
            device = layer.weight.device
            A = torch.zeros(sum(self.ranks[i - 1] for i in active), n_in, device=device)
            B = torch.zeros(n_out, len(A), device=device)
            begin = 0
            for i in active:
                if layer in self.pairs[i - 1]:
                    own_A, own_B = self.pairs[i - 1][layer]
                    A[begin : begin + len(own_A)] = own_A
                    B[:, begin : begin + len(own_A)] = own_B
                begin += self.ranks[i - 1]
            narrow.append(A)
            wide.append(B)
        return torch.cat(narrow).to(dtype), torch.block_diag(*wide).to(dtype)


class Adapted:
    """What `Operations.project` adds to a product, as `Adapters.used` has it."""

    def __init__(self, adapters: Adapters, active: tuple[int, ...], numbers: Tensor | int) -> None:
        self.adapters = adapters
        self.active = active
        self.numbers = numbers
        self.mask: Tensor | None = None  # (B, T or 1, 1, R) in the dtype of what it multiplies

    def add(self, y: Tensor, x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        """y (B, T, out), the product of x (B, T, in) with layers, plus each row's adapter's."""
        dtype = compute_dtype(x)
        joint = self.adapters.joint(layers, self.active, dtype)
        if joint is None:
            return y
        A, B = joint
        if self.mask is None:
            self.mask = self.adapters.table(self.active, x.device)[self.numbers][..., None, :]
            self.mask = self.mask.to(dtype)
        narrow = F.linear(x.to(dtype), A).unflatten(-1, (len(layers), -1))  # (B, T, L, R)
        return y + F.linear((narrow * self.mask).flatten(-2), B).to(y.dtype)


# --------------------------------------------------------------------------------------------------
# Reading


def check_base(folder: Path, named: str, model: Path, served: str) -> None:
    """Refuse an adapter whose base is another than the served model."""
    try:
        base = find_base(folder, named) if (folder / named).is_dir() else None
    except (OSError, ValueError):
        base = None
    if base is not None:
        is_same = base.resolve() == model.resolve()
    else:  # a name on the Hub, or a folder of another machine
        last = Path(named).name
        is_same = named == served or last.lower() == model.resolve().name.lower()
    if not is_same:
        why = f"the base of {folder} is {named}, not {served}"
        out = "if they are the same, put this folder's path into base_model_name_or_path of"
        raise UserError(f"--adapters: {why} ({out} its adapter_config.json)")


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, quantized or not."""
    shape = layer.shape if isinstance(layer, QuantizedLinear) else layer.weight.shape
    return tuple(shape)


def layer_pairs(net: GPT, folder: Path, config: dict) -> dict[nn.Module, Matrices]:
    """{layer: (A (rank, in), B (out, rank), with the scale)} float32 of an adapter's folder."""
    layers = {}
    for name, layer in net.named_modules():
        if isinstance(layer, (torch.nn.Linear, QuantizedLinear)):
            layers[f"{name}.weight"] = layer
    table = table_of(family(net.config), net.config)
    names = adapter_names(table, layers)
    pairs: dict[nn.Module, Matrices] = {}
    for pair in read_pairs(folder, folder / "adapter_model.safetensors"):
        # Several where the base's file has q, k and v as one: their rows are below each other.
        targets = [layers[name] for name in names.get(f"{pair.layer}.weight", ())]
        check_pair(folder, net, pair, targets)
        B = pair.B.float() * scale_of(folder, config, pair)
        parts = parted(B, len(targets), table) if len(targets) > 1 else [B]
        for layer, part in zip(targets, parts):
            device = layer.weight.device
            pairs[layer] = (pair.A.float().to(device), part.to(device))
    if not pairs:
        raise UserError(f"--adapters: {folder}: adapter_model.safetensors has no matrices")
    return pairs


def check_pair(folder: Path, net: GPT, pair: Pair, targets: Sequence[nn.Module]) -> None:
    shapes = [shape_of(layer) for layer in targets]
    fits = bool(shapes) and pair.A.ndim == 2 and shapes[0][1] == pair.A.shape[1]
    if not fits or pair.B.shape != (sum(n for n, _ in shapes), len(pair.A)):
        raise UserError(f"--adapters: {folder}: {pair.key} does not fit the served model")
    if any(layer is net.lm_head for layer in targets):
        raise UserError(f"--adapters: {folder}: {pair.key}: an adapted head is not served")


def tokenizer_of(folder: Path, tok: Tokenizer) -> Tokenizer:
    """The tokenizer of an adapter, whose template may be another, but not its tokens."""
    if not (folder / "tokenizer.json").is_file():
        return tok
    own = adapter_tokenizer(folder, tok.eos_ids)
    if own.bytes != tok.bytes or own.special != tok.special:
        raise UserError(f"--adapters: {folder}: its tokenizer has other tokens than the model's")
    return own
