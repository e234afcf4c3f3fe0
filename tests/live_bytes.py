"""Bytes of the tensors that live at once, by what they are: what the estimates are held against."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def local_tensor(t):
    """The part of a DTensor that is here, or the tensor itself."""
    return getattr(t, "_local_tensor", t)


def storages(tensors):
    """{address of a storage: the storage} of tensors, or of lists and dicts of them."""
    parts = [local_tensor(t) for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]
    parts = [t for t in parts if t.device.type != "meta"]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in parts}


def nbytes(tensors):
    """Their bytes, each storage once."""
    return sum(storage.nbytes() for storage in storages(tensors).values())


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make and that still live; `peak` is the most at once,
    and `at_peak` how that divides: weights, gradients, optimizer, other."""

    def __init__(self, net, optimizers):
        super().__init__()
        self.net = net
        self.optimizers = optimizers
        self.live = {}  # address: a weak reference
        self.peak = 0
        self.at_peak = {}

    def __enter__(self):
        for address, storage in storages(list(self.kinds().values())).items():
            self.live[address] = StorageWeakRef(storage)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t not in (torch.Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a DTensor's: its local operations come here by themselves
        result = func(*args, **(kwargs or {}))
        for address, storage in storages(result).items():
            if address not in self.live or self.live[address].expired():
                self.live[address] = StorageWeakRef(storage)
        total = self.total()
        if total > self.peak:
            self.peak = total
            kinds = {kind: nbytes(tensors) for kind, tensors in self.kinds().items()}
            self.at_peak = kinds | {"other": total - sum(kinds.values())}
        return result

    def total(self):
        """The bytes that live now."""
        size = 0
        for address, reference in list(self.live.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:  # gone
                del self.live[address]
            else:  # fully_shard empties storages, and fills them again
                size += storage.nbytes()
        return size

    def kinds(self):
        params = list(self.net.parameters())
        return {
            "weights": params,
            "gradients": [p.grad for p in params if p.grad is not None],
            "optimizer": [dict(getattr(o, "optim", o).state) for o in self.optimizers],
        }
