"""Weights that a server takes over from its model's folder while it goes on.

    weights = Weights(engine, Path("out/python"), tok)
    weights.step, weights.step_on_disk()     # 200, 400: the run has saved since
    weights.read()                           # in any thread: the new network, or a UserError
    engine.when_idle(weights.take).result()  # in the engine's, when no sequence is in the batch

Sequences that run end with the weights that they began with; those that wait begin with the new
ones, and nothing that was computed of the old ones is used again. The new weights take the places
of the old ones, tensor by tensor, so that whatever reads them there (a CUDA graph) goes on to. A
network of another shape, or another tokenizer, is refused: that is another model."""

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from barelm.caller import Caller
from barelm.checkpoint import find, load
from barelm.mirror import Mirror
from barelm.parts import local_part, part_like
from barelm.resume import weights_step
from barelm.run import UserError
from barelm.tokenizer import Tokenizer
from model import GPT

Stamp = tuple[tuple[str, int, int, int], ...]
TRIES = 3  # to read one save's weights: a run may save meanwhile


def stamp_of(folder: str | Path) -> Stamp:
    """What tells the weights in a folder from those of another save: ((name, size, time, number of
    the file), …), without reading them."""
    stamp = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            status = path.stat()
        except FileNotFoundError:  # removed since
            continue
        stamp.append((path.name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(stamp)


def step_of(folder: str | Path) -> int:
    """The step that a folder's weights are of, or -1."""
    try:
        return weights_step(folder)
    except (UserError, OSError):  # damaged, or being replaced
        return -1


class Weights:
    """Which weights a server serves, and those that its folder holds by now. What the folder holds
    when this is made is taken to be what is served: make it before `load`, and give it the engine
    and the tokenizer later."""

    def __init__(self, name: str | Path) -> None:
        self.folder = find(name)
        self.stamp = stamp_of(self.folder)
        self.step = step_of(self.folder)
        self.engine = None
        self.tok = None
        self.busy = False  # whether new ones are being read
        self.new = None  # (the network, its tokenizer, its stamp, its step), read and not yet taken

    def serves(self, engine: Caller, tok: Tokenizer) -> None:
        self.engine = engine
        self.tok = tok

    def are_new(self) -> bool:
        """Whether the folder holds others than are served."""
        stamp = stamp_of(self.folder)
        return bool(stamp) and stamp != self.stamp

    def step_on_disk(self) -> int:
        return step_of(self.folder)

    def read(self) -> None:
        """Read what the folder holds, beside what is served. Of a network in parts nothing is read
        here: its processes do in `take`, each its own."""
        if self.engine.mirror is None:
            self.new = read_new(self.engine.net, self.tok, str(self.folder))

    def take(self) -> int:
        """Serve what was read: in the engine's thread, when no sequence is in the batch. The step
        that it is of."""
        engine = self.engine
        if engine.mirror is None:
            net, _, stamp, step = self.new
            self.new = None
            put(engine.net, net.state_dict())
        else:
            stamp, step = engine.mirror(
                read_together, engine.mirror, engine.net, self.tok, str(self.folder)
            )
        engine.forget()
        self.stamp = stamp
        self.step = step
        return step


def read_new(net: GPT, tok: Tokenizer, folder: str) -> tuple[GPT, Tokenizer, Stamp, int]:
    """(the network in a folder, which has the place of `net`, its tokenizer, their stamp and step);
    UserError where it is no other state of the same model."""
    table = net.model.embed_tokens.weight
    for _ in range(TRIES):
        stamp = stamp_of(folder)
        step = step_of(folder)
        # On the host: a GPU that holds the old weights may have no room for others.
        new, new_tok = load(folder, "cpu", table.dtype, net.quantize, net.fast)
        if stamp_of(folder) == stamp:
            break
    else:
        raise UserError(f"{folder}: the run saves faster than its weights are read: try again")
    why = why_another(net, new) or why_another_tokenizer(tok, new_tok)
    if why:
        raise UserError(f"{folder} holds another model by now ({why}): start the server anew")
    return new, new_tok, stamp, step


def read_together(mirror: Mirror, net: GPT, tok: Tokenizer, folder: str) -> tuple[Stamp, int]:
    """`read_new` and `put` in each of several processes, each of which has a part of the network:
    all or none. (stamp, step)."""
    try:
        new, _, stamp, step = read_new(net, tok, folder)
        said = (stamp, None)
    except (Exception, UserError) as error:
        said = (None, str(error))
    all_said = [None] * dist.get_world_size()
    dist.all_gather_object(all_said, said, group=mirror.group)
    for other_stamp, why in all_said:
        if why is not None:
            raise UserError(why)
        if other_stamp != all_said[0][0]:
            raise UserError(f"{folder}: the run has saved while it was read: try again")
    put(net, new.state_dict())
    return stamp, step


def put(net: GPT, tensors: dict[str, torch.Tensor]) -> None:
    """Give the network's tensors the values of {name: whole tensor}, in their places."""
    with torch.no_grad():
        for name, old in net.state_dict().items():
            local_part(old).copy_(local_part(part_like(tensors[name], old)))
    if net.ops.packed is not None:  # copies in other layouts are made anew
        net.ops.packed.clear()


def why_another(net: GPT, new: GPT) -> str:
    """In what a network is another than `net`, in words, or ""."""
    before = asdict(net.config)
    for name, value in asdict(new.config).items():
        if before[name] != value:
            return f"{name} {before[name]} -> {value}"
    for name in ("task", "labels", "pooling", "pooler", "pad_id", "start_id", "adapter_size"):
        if getattr(net, name) != getattr(new, name):
            return f"{name} {getattr(net, name)} -> {getattr(new, name)}"
    tensors = new.state_dict()
    shapes = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    for name, old in net.state_dict().items():
        if shapes.pop(name, None) != (old.shape, old.dtype):
            return f"{name} is not as it was"
    if shapes:
        return f"{next(iter(shapes))} was not there"
    return ""


def why_another_tokenizer(tok: Tokenizer, new: Tokenizer) -> str:
    """In what a tokenizer is another, in words, or ""."""
    for name in ("spec", "config", "eos_ids", "bos_id", "pad_id", "start", "end"):
        if getattr(tok, name, None) != getattr(new, name, None):
            return "another tokenizer or chat template"
    return ""
