"""Checkpoints of which every process writes its part, by torch.distributed.checkpoint (DCP).

A tensor goes by its name in the whole network, whatever mesh it is spread over:

    model.NAME           a parameter or buffer, NAME as in the network's state_dict
    optim.NAME.ENTRY     what an optimizer keeps of it, such as exp_avg

so that any other mesh, of any number of processes, can read it. steps.py says where the files are
and when they count, pieces.py makes a Hugging Face folder of them."""

from __future__ import annotations

import pickle
import re
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from barelm.files import unwritable
from barelm.optim import STATE_NAMES, held_state, split_parameters
from barelm.parts import is_divided, local_part
from barelm.run import UserError
from model import GPT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from barelm.run import Run

# Its word on a process that reads, or is, alone.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

# How long a process waits for the others' files: minutes each, where the disk is slow.
PATIENCE = timedelta(hours=2)


# --------------------------------------------------------------------------------------------------
# The tensors, by name


def names_of(net: GPT) -> dict:
    """{parameter: its name in the whole network} of what this process has."""
    return {p: whole_name(name, net) for name, p in net.named_parameters()}


def whole_name(name: str, net: GPT) -> str:
    """A tensor's name in a network of one process: a tied head is the embedding, also where the
    two are on different stages of a pipeline."""
    if name == "lm_head.weight" and net.config.tie:
        return "model.embed_tokens.weight"
    return name


def model_tensors(net: GPT) -> dict[str, Tensor]:
    """{key: tensor} of what this process has of a network's weights, detached."""
    tensors = {}
    for name, t in net.state_dict().items():
        if net.score is not None and name.startswith(("lm_head.", "head_dense.", "head_norm.")):
            continue  # beside a classifier's head it is read by nothing
        tensors[f"model.{whole_name(name, net)}"] = t.detach()
    return tensors


def inner(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer of those parameters whose state this process has: of a ZeroRedundancyOptimizer
    the one inside, of another itself."""
    return getattr(optimizer, "optim", optimizer)


def params_of(optimizer: torch.optim.Optimizer) -> list:
    """The parameters whose state this process has."""
    return [p for group in inner(optimizer).param_groups for p in group["params"]]


def optimizer_tensors(net: GPT, optimizers: list) -> dict[str, Tensor]:
    """{key: tensor} of what this process has of the optimizers' states."""
    names = names_of(net)
    tensors = {}
    for optimizer in optimizers:
        for p, entries in held_state(optimizer).items():
            for entry, value in entries.items():
                tensors[f"optim.{names[p]}.{entry}"] = divided_as(p, value.detach())
    return tensors


def divided_as(p: Tensor, value: Tensor) -> Tensor:
    """A value of a parameter's shape as a DTensor where the parameter is one, and the value this
    process's part: with --offload an optimizer's state is. It stays in the host's memory."""
    is_part = is_divided(p) and not is_divided(value) and value.ndim > 0
    return DTensor(value, p._spec, requires_grad=False) if is_part else value


# --------------------------------------------------------------------------------------------------
# Save


class ShardWriter:
    """Writes folders of which every process has a part; with in_background beside the training,
    which waits until its tensors are copied, and for the write before.

    complete: what the main process does when all parts are on the disk. It sends the other
    processes nothing, and they go on without it: `wait` is where all know that it is done."""

    def __init__(self, run: Run, in_background: bool = False) -> None:
        self.run = run
        self.pending = None  # the write that is under way: a Future
        self.thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self.stager = HostCopies(run.device) if in_background else None
        # A group of its own, since its messages cross those of the training.
        self.group = None
        if run.world > 1:
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def write(self, folder: Path, tensors: dict[str, Tensor], complete: Callable) -> None:
        """Write {key: tensor}, of which each process gives those that it has, into a folder. All
        processes have to come here."""
        self.wait()
        options = dict(
            storage_writer=FileSystemWriter(folder),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=self.group,
        )
        if self.thread is None:
            saved = try_to(dcp.save, tensors, **options)
            self.pending = try_to(finish_write, saved, complete, self.run.is_main)
            self.wait()
        else:
            saved = dcp.async_save(tensors, async_stager=self.stager, **options)
            self.pending = self.thread.submit(finish_write, saved, complete, self.run.is_main)

    def wait(self) -> None:
        """Until the last write is whole, for all processes; where it failed all of them end."""
        if self.pending is None:
            return
        error = self.pending.exception()
        self.pending = None
        failed = torch.tensor(int(error is not None))
        if self.group is not None:
            dist.all_reduce(failed, group=self.group)
        if error is not None:
            raise as_user_error(error)
        if failed.item():
            raise UserError("a checkpoint could not be written: another process says why")


def try_to(function: Callable, *args: Any, **options: Any) -> Any:
    """A Future of function(*args, **options), which is done."""
    future = Future()
    try:
        future.set_result(function(*args, **options))
    except BaseException as error:  # UserErrors, and those of torch, are no Exceptions
        future.set_exception(error)
    return future


def finish_write(saved: dict, complete: Callable, is_main: bool) -> None:
    """Wait for the Future of a save, and let the main process complete it."""
    saved.result()
    if is_main:
        complete()


class HostCopies(BlockingAsyncStager):
    """Copies tensors to memory that the training leaves alone, and keeps it for the next save:
    pinned for a GPU, which then copies at its link's full speed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.homes = {}  # {key: the copy of what this process has of the tensor}

    def stage(self, tensors: dict[str, Tensor]) -> dict:
        """{key: tensor}, copied, before the training goes on."""
        on_gpu = self.device.type == "cuda"
        staged = {}
        for key, tensor in tensors.items():
            part = local_part(tensor)
            home = self.homes.get(key)
            if home is None or home.shape != part.shape:
                home = torch.empty(part.shape, dtype=part.dtype, pin_memory=on_gpu)
                self.homes[key] = home
            home.copy_(part, non_blocking=on_gpu)
            staged[key] = divided_as(tensor, home)
        if on_gpu:
            torch.cuda.synchronize(self.device)
        return staged


def as_user_error(error: BaseException) -> BaseException:
    """What went wrong in a write, in a line; an error that is none of the disk's stays."""
    if isinstance(error, CheckpointException):  # {rank: (its error, where)}
        error = next(iter(error.failures.values()))[0]
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch.save raises its own for a disk's
    if cause is None:
        return error
    return unwritable(getattr(cause, "filename", None) or "a checkpoint", cause)


# --------------------------------------------------------------------------------------------------
# Read


class StepReader(FileSystemReader):
    """Reads the tensors of a step, whole or in parts. The list of them is a pickle: it may name
    nothing but what such lists are made of."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = Path(folder)
        self.listed = read_listed(self.folder / ".metadata")

    def read_metadata(self, *args: Any, **options: Any) -> Any:
        return self.listed

    @property
    def shapes(self) -> dict[str, tuple]:
        """{key: (dtype, shape)} of all tensors."""
        out = {}
        for key, entry in self.listed.state_dict_metadata.items():
            out[key] = (entry.properties.dtype, list(entry.size))
        return out

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy what is saved into {key: tensor}, DTensors or plain, of this process alone."""
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        dcp.load(tensors, storage_reader=self, planner=planner, no_dist=True)

    def read(self, key: str) -> Tensor:
        """A whole tensor, on the CPU."""
        dtype, shape = self.shapes[key]
        tensor = torch.empty(shape, dtype=dtype)
        self.fill({key: tensor})
        return tensor


ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}


class ListUnpickler(pickle.Unpickler):
    """Reads a step's .metadata, and runs nothing that it names."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_listed(path: Path) -> Any:
    """The Metadata in a step's .metadata; a UserError where it is none, or names other files."""
    try:
        with open(path, "rb") as file:
            listed = ListUnpickler(file).load()
        check_listed(listed)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever pickle raises at bytes that are none of its own
        raise UserError(f"{path}: damaged, or no file of ours: {error!r:.100}") from None
    return listed


def check_listed(listed: Any) -> None:
    """Refuse, with a ValueError, a list of anything but tensors in files beside it."""
    for entry in listed.state_dict_metadata.values():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError("it lists what is no tensor")
    for place in listed.storage_data.values():
        if not re.fullmatch(r"__\d+_\d+\.distcp", place.relative_path):
            raise ValueError(f"it lists {place.relative_path!r}")


# --------------------------------------------------------------------------------------------------
# A network and its optimizers, as they were


def load_step(folder: Path, net: GPT, optimizers: list) -> None:
    """Fill a network and its optimizers with a step's tensors, each process what it has of them;
    what does not fit is a UserError."""
    reader = StepReader(folder)
    fill_checked(reader, model_tensors(net))
    load_states(folder, net, optimizers, reader)


def load_states(folder: Path, net: GPT, optimizers: list, reader: StepReader | None = None) -> None:
    """`load_step` of the optimizers alone."""
    reader = reader or StepReader(folder)
    make_states(reader.shapes, net, optimizers, folder)
    fill_checked(reader, optimizer_tensors(net, optimizers))


def fill_checked(reader: StepReader, tensors: dict[str, Tensor]) -> None:
    shapes = reader.shapes
    for key, tensor in tensors.items():
        if shapes.get(key) != (tensor.dtype, list(tensor.shape)):
            where = f"{reader.folder}: {key}"
            raise UserError(f"{where} is not as this run has it: damaged, or foreign")
    reader.fill(tensors)


def make_states(shapes: dict, net: GPT, optimizers: list, folder: Path) -> None:
    """Give the optimizers empty states of the parameters that {key: (dtype, shape)} has some of."""
    entries = {}  # {name of a parameter: {entry: (dtype, shape)}}
    for key, shape in shapes.items():
        if key.startswith("optim."):
            name, _, entry = key.removeprefix("optim.").rpartition(".")
            entries.setdefault(name, {})[entry] = shape
    names = names_of(net)
    for optimizer in optimizers:
        memory = getattr(inner(optimizer), "memory", None)  # the host's, with --offload
        for p in params_of(optimizer):
            saved = entries.get(names[p], {})
            check_entries(saved, optimizer, f"{folder}: the optimizer's state of {names[p]}")
            if saved:
                state = {}
                for entry, (dtype, shape) in saved.items():
                    state[entry] = empty_entry(p, dtype, shape, memory)
                held_state(optimizer)[p] = state


def check_entries(saved: dict, optimizer: torch.optim.Optimizer, where: Any) -> None:
    """Refuse the entries of another kind of optimizer."""
    usual = STATE_NAMES.get(type(inner(optimizer)))
    if saved and usual and set(saved) != usual:
        raise UserError(f"{where} is another optimizer's: damaged, or foreign")


def empty_entry(p: Tensor, dtype: torch.dtype, shape: Any, memory: Any) -> Any:
    """What an entry of a parameter's state is read into: a number, or divided as p is."""
    if not shape:
        return torch.zeros((), dtype=dtype, device=p.device)
    if memory is not None:
        return memory.keep(torch.zeros(local_part(p).shape, dtype=dtype))
    return torch.zeros_like(p, dtype=dtype, requires_grad=False)


def numbered_names(net: GPT, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of a whole network's parameters, as a state.pt numbers them: a list for each
    optimizer that `make_optimizer` gives."""
    with torch.device("meta"):
        whole = GPT(net.config, fast=False)
    names = names_of(whole)
    matrices, wide, narrow = split_parameters(whole)
    if optimizer == "muon":
        lists = [[*wide, *narrow], matrices]
    else:
        wide = [p for p in whole.parameters() if p.ndim > 1]
        lists = [[*wide, *narrow]]
    return [[names[p] for p in params] for params in lists if params]


def load_whole_states(
    saved: dict, names: Sequence[str], net: GPT, optimizers: list, path: Path
) -> None:
    """Give each process its part of the optimizers' states in a state.pt, `saved`, a list of
    state_dicts whose parameters have these names."""
    if len(saved) != len(names):
        raise UserError(f"{path}: its optimizers are not this run's: damaged, or foreign")
    tensors = {}
    for state, numbered in zip(saved, names):
        for number, entries in state["state"].items():
            for entry, value in entries.items():
                tensors[f"optim.{numbered[number]}.{entry}"] = value
    shapes = {key: (value.dtype, list(value.shape)) for key, value in tensors.items()}
    make_states(shapes, net, optimizers, path)
    for key, part in optimizer_tensors(net, optimizers).items():
        whole = tensors[key]
        if whole.shape != part.shape:
            raise UserError(f"{path}: {key} is not as this run has it: damaged, or foreign")
        copy_part(whole, part)


def copy_part(whole: Tensor, part: str) -> None:
    """Copy what a process has of a tensor into it: `part` is a DTensor, or plain."""
    if not is_divided(part):
        part.copy_(whole)
        return
    for chunk in part.__create_chunk_list__():  # where DCP sees it
        for dim, (begin, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
            whole = whole.narrow(dim, begin, size)
        local_part(part).copy_(whole)
