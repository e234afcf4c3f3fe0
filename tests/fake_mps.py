"""A Mac's GPU as far as a machine without one can have it: tensors that say they are on mps and are
computed by the CPU, and refuse what mps refuses: float64, tensors of the host beside them, pinned
memory, to be read by numpy. What it cannot say: which operations Metal lacks, and what it rounds.

    install()  # in this process, from here on
"""

import threading
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

MPS = torch.device("mps")
WIDE = (torch.float64, torch.complex128)
# What takes tensors of the host beside those of the device: copies, and lists of indices.
MIXED = ("copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_")


class OnMPS(torch.Tensor):
    """A tensor on mps; `host` holds its numbers."""

    @staticmethod
    def __new__(cls, host):
        refuse_wide(host.dtype)
        options = dict(strides=host.stride(), storage_offset=host.storage_offset())
        options |= dict(dtype=host.dtype, device=host.device, requires_grad=False)
        return torch.Tensor._make_wrapper_subclass(cls, host.size(), **options)

    def __init__(self, host):
        self.host = host

    device = property(lambda self: MPS)
    is_mps = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"OnMPS({self.host})"

    def __reduce_ex__(self, protocol):
        return self.host.__reduce_ex__(protocol)  # read again on the host, as ours are

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        for leaf in tree_leaves((args, kwargs)):
            is_plain = isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnMPS)
            if is_plain and leaf.dim() and name not in MIXED:
                raise RuntimeError(f"{name}: expected all tensors on mps, but one is on the host")
            if isinstance(leaf, torch.dtype):
                refuse_wide(leaf)
        result = func(*on_host(args), **on_host(kwargs))
        result = tree_map_only(torch.Tensor, OnMPS, result)
        return return_and_correct_aliasing(func, args, kwargs, result)


def refuse_wide(dtype):
    if dtype in WIDE:
        raise TypeError(f"Cannot convert a MPS Tensor to {dtype}: MPS has no float64")


def on_host(values):
    """The same arguments with the numbers of tensors on mps, and with the CPU for mps."""

    def one(value):
        if isinstance(value, OnMPS):
            return value.host
        if isinstance(value, torch.device) and value.type == "mps":
            return torch.device("cpu")
        return value

    return tree_map(one, values)


def names_mps(value):
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "mps"


class FakeMPS(TorchFunctionMode):
    """What asks for device="mps", or brings a tensor there or back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("tolist", "cpu") and isinstance(args[0], OnMPS):
            return getattr(args[0].detach().host, name)()
        if name in ("numpy", "pin_memory", "cuda", "double") and isinstance(args[0], OnMPS):
            raise TypeError(f"{name} of a tensor on mps")
        if name == "to":
            return self.move(*args, **kwargs)
        if name == "pad_sequence" and any(isinstance(x, OnMPS) for x in args[0]):
            # Made of parts in C++, where our tensors are the CPU's.
            return OnMPS(func(*on_host(args), **on_host(kwargs)))
        if names_mps(kwargs.get("device")):
            kwargs["device"] = "cpu"
            refuse_wide(kwargs.get("dtype"))
            return OnMPS(func(*on_host(args), **on_host(kwargs)))
        return func(*args, **kwargs)

    def move(self, tensor, *args, **kwargs):
        """Tensor.to of a device, a dtype, a tensor, or of the first two."""
        kwargs.pop("non_blocking", None)
        device = kwargs.pop("device", None)
        rest = []
        for value in args:
            if isinstance(value, torch.Tensor):
                device = value.device
                rest.append(value.dtype)
            elif isinstance(value, str) or isinstance(value, torch.device):
                device = torch.device(value)
            elif isinstance(value, torch.dtype) or value is None:
                rest.append(value)
        rest = [value for value in rest if value is not None]
        device = tensor.device if device is None else torch.device(device)
        if device.type == "mps" and not isinstance(tensor, OnMPS):
            moved = tensor.detach().to(*rest, **kwargs)
            return OnMPS(moved.clone() if moved is tensor or not rest else moved)
        if device.type == "cpu" and isinstance(tensor, OnMPS):
            tensor = tensor.detach().host.clone()
        return tensor.to(*rest, **kwargs) if rest or kwargs else tensor


def move_module(module, *args, **kwargs):
    """Module.to, which makes new parameters here: those that are one stay one (a tied head)."""
    first = {}
    ties = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            owner, own_name = first.setdefault(id(parameter), (part, name))
            if parameter is not None and owner is not part:
                ties.append((part, name, owner, own_name))
    usual_to(module, *args, **kwargs)
    for part, name, owner, own_name in ties:
        part._parameters[name] = owner._parameters[own_name]
    return module


usual_to = torch.nn.Module.to


def install():
    """Let this process have the device."""
    torch.backends.mps.is_available = lambda: True
    torch.mps.driver_allocated_memory = lambda: 1 << 20
    torch.mps.recommended_max_memory = lambda: 1 << 30
    torch.mps.synchronize = lambda: None
    # A parameter that is moved is another object: its numbers change their kind of tensor.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.nn.Module.to = move_module
    # Its tensors count no writes, which those of another kind than torch's cannot do without.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()
    start = threading.Thread._bootstrap_inner  # which calls `run`, whoever wrote it

    def run_with_device(thread):
        with FakeMPS():  # which each thread has of its own
            start(thread)

    threading.Thread._bootstrap_inner = run_with_device
    FakeMPS().__enter__()
