"""Tensor parallelism: several processes share each matrix product of a network.

    split_heads(net, mesh)  # in place; barelm/parallel.py calls it first of all

Each process has some of the heads and some of an MLP's hidden units: q, k, v, gate and up are cut
by rows of their matrices (outputs), o and down by columns (inputs), so that a block adds up its
processes' parts twice, behind o and behind down (Shoeybi et al. 2019, "Megatron-LM", 3). The
embedding and the head are cut by vocabulary. What is not cut (norms, x itself) is the same in all
processes, to the bit.

torch cuts and exchanges (`parallelize_module`): parameters become DTensors on the mesh's dimension
"tp". What the network asks here instead of computing it alone: `Operations` of
barelm/operations.py, whose `heads` is a HeadShare then.

H: heads of queries, G: of keys and values, C: n_embd, V: vocab_size, N: tokens, n: processes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from barelm.fast import LinearCrossEntropy, head_rows
from barelm.run import UserError, compute_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from barelm.mesh import Mesh
    from model import GPT, GPTConfig


CUT_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
CUT_BY_COLUMNS = ("o_proj", "down_proj")


# --------------------------------------------------------------------------------------------------
# What can be split


def check_split(net: GPT, tp: int) -> None:
    """Refuse a network that tp processes cannot share, with the nearest number that can."""
    c = net.config
    why = why_not_split(net)
    if why:
        raise UserError(f"--tp={tp}: {why}: --parallel=fsdp splits every network")
    if not divides(c, tp):
        nearest = nearest_split(c, tp)
        shape = f"{c.n_head} heads, {c.n_kv_head} of keys and values, {c.n_hidden} hidden units"
        raise UserError(f"--tp={tp} does not divide {shape}: the nearest is --tp={nearest}")


def why_not_split(net: GPT) -> str:
    """Why a network of this kind is not split, or ""."""
    c = net.config
    if c.n_experts:
        return "experts' matrices are stacks, which are not cut by heads"
    if c.qk_norm_all:
        return "qk_norm_all is a norm over all heads, which no process has"
    if net.ops.deterministic:
        return "--deterministic adds in one order, processes in another"
    if net.quantize:
        return f"{net.quantize} codes are not cut"
    for name, module in net.named_modules():
        is_cut = name.endswith((*CUT_BY_ROWS, *CUT_BY_COLUMNS))
        if is_cut and type(module) is not nn.Linear:
            return f"{name} has an adapter"
    return ""


def divides(c: GPTConfig, tp: int) -> bool:
    """Whether tp processes can have as many heads and hidden units each. A single head of keys and
    values is whole in every process."""
    keys_fit = c.n_kv_head % tp == 0 or c.n_kv_head == 1
    return keys_fit and c.n_head % tp == 0 and c.n_hidden % tp == 0


def nearest_split(c: GPTConfig, tp: int) -> int:
    """The number of processes nearest to tp that can share a network: of two the smaller."""
    fits = [n for n in range(1, c.n_head + 1) if divides(c, n)]
    return min(fits, key=lambda n: abs(n - tp))


# --------------------------------------------------------------------------------------------------
# The split


def split_heads(net: GPT, mesh: Mesh) -> None:
    """Leave this process its share of a network, where mesh has a dimension "tp" of more than 1.
    All processes have the same weights (or none yet, on the device meta): nothing is sent."""
    tp = mesh.sizes.tp
    if tp == 1:
        return
    check_split(net, tp)
    tp_mesh = mesh.device_mesh["tp"]
    share = HeadShare(tp_mesh, mesh.rank_of("tp"), tp)
    split_parameters(net, share)
    net.ops.heads = share
    for module in net.modules():
        if hasattr(module, "q_proj"):
            module.c = share.of_config(module.c)


def split_parameters(net: GPT, share: HeadShare) -> None:
    """Make DTensors of the parameters that are cut, or whose gradients are a sum over processes."""
    c = net.config
    plan = {}
    for name, module in net.named_modules():
        kind = name.rpartition(".")[2]
        if kind in ("k_proj", "v_proj") and c.n_kv_head == 1:
            share.replicate(module)
        elif kind in CUT_BY_ROWS:
            plan[name] = ColwiseParallel()
        elif kind in CUT_BY_COLUMNS:
            plan[name] = RowwiseParallel()
        elif kind in ("q_norm", "k_norm", "relative_bias"):
            share.replicate(module)
        if isinstance(getattr(module, "sinks", None), nn.Parameter):
            share.replicate(module, "sinks")
    if c.vocab_size % share.size == 0:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    is_tied = net.lm_head.weight is net.model.embed_tokens.weight
    parallelize_module(net, share.mesh, plan, src_data_rank=None)
    if is_tied:
        net.lm_head.weight = net.model.embed_tokens.weight


class HeadShare:
    """What this process has of the heads, and how `Operations` computes with it: the process `rank`
    of `size` on mesh, a DeviceMesh of the one dimension "tp"."""

    def __init__(self, mesh: Mesh, rank: int, size: int) -> None:
        self.mesh = mesh
        self.group = mesh.get_group()
        self.rank = rank
        self.size = size

    def of_config(self, c: GPTConfig) -> GPTConfig:
        """A GPTConfig with this process's heads alone; a single one of keys and values is whole."""
        own = copy.copy(c)  # no GPTConfig(...): its checks are of whole networks
        own.n_head = c.n_head // self.size
        own.n_kv_head = max(1, c.n_kv_head // self.size)
        return own

    def of_heads(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The part for this process's heads of a tensor that has all heads along dim."""
        return self.own(tensor).chunk(self.size, dim)[self.rank]

    def all_heads(self, tensor: Tensor) -> Tensor:
        """The tensor (H, …) of which each process has its heads'."""
        return DTensor.from_local(tensor, self.mesh, [Shard(0)], run_check=False).full_tensor()

    def own(self, tensor: Tensor) -> Tensor:
        """A tensor of which every process has the whole, to compute with this process's heads:
        its gradient is the sum over the processes, see
        `sum_partial_gradients` of barelm/parts.py."""
        if isinstance(tensor, DTensor):
            return tensor.to_local(grad_placements=[Partial()])
        return tensor

    def replicate(self, module: nn.Module, *names: Any) -> None:
        """Make DTensors of a module's parameters of these names (none: all), whole ones."""
        for name in names or [name for name, _ in module.named_parameters()]:
            p = getattr(module, name)
            whole = distribute_tensor(p, self.mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(whole, requires_grad=p.requires_grad))

    def has_part_of(self, layer: nn.Module) -> bool:
        """Whether a layer is cut; a head whose vocabulary no number of processes divides is not."""
        return isinstance(layer.weight, DTensor)

    def project(self, x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        """The outputs of linear layers that read the same x (…, C), side by side: this process's
        of those that are cut by rows, the sums over all processes of one that is cut by columns."""
        if len(layers) > 1 and self.has_part_of(layers[0]):
            # The gradients by x of all layers are added up, then exchanged once.
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        outputs = [self.own(layer(x)) for layer in layers]
        return torch.cat(outputs, -1) if len(layers) > 1 else outputs[0]

    def cross_entropy(self, h: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        """`Operations.cross_entropy` by a head (V / n, C) a process: nobody has all logits.

        h (N, C) is what the head reads, the same in all processes; targets (N,)."""
        h = h.to(compute_dtype(h))
        # As it came, but its gradient is the sum over the processes.
        h = DTensor.from_local(h, self.mesh, [Replicate()], run_check=False)
        h = h.to_local(grad_placements=[Partial()])
        weight = head.weight.to_local()  # (V / n, C)
        if head.bias is not None:  # as the weights of a number that is always 1
            h = torch.cat((h, torch.ones_like(h[:, :1])), 1)
            weight = torch.cat((weight, head.bias.to_local()[:, None]), 1)
        size = head_rows(h.device.type, h.dtype, len(weight))
        learn = torch.is_grad_enabled()
        return LinearCrossEntropy.apply(h, weight, targets, learn, size, self.head_piece)

    def head_piece(self, x: Tensor, weight: Tensor, targets: Tensor, learn: bool,
                   weight_learns: bool = True) -> tuple:  # fmt: skip
        """`barelm.fast.head_piece` by this process's rows of the head: weight (V / n, C). The loss
        is that of all rows; of the gradient by x (N, C) this is the process's part."""
        logits = (x @ weight.T).float()  # (N, V / n)
        places = targets - self.rank * len(weight)  # (N, 1): where the targets are among the rows
        is_here = (places >= 0) & (places < len(weight))
        places = places.clamp(0, len(weight) - 1)
        largest = logits.amax(1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        logits = logits - largest
        of_targets = logits.gather(1, places).where(is_here, 0.0)
        exp = logits.exp_()
        sums = torch.cat((exp.sum(1, keepdim=True), of_targets), 1)  # (N, 2)
        dist.all_reduce(sums, group=self.group)
        total, of_targets = sums.split(1, 1)
        valid = targets >= 0
        loss = (total.log() - of_targets).where(valid, 0.0).sum()
        if not learn:
            return loss, None, None
        # The gradient of the logits: softmax less one-hot.
        d = exp.div_(total).scatter_add_(1, places, -is_here.to(exp.dtype))
        d = d.to(x.dtype) * valid
        dw = d.T @ x if weight_learns else None
        return loss, d @ weight, dw
