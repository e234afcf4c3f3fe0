"""How a network is divided over the processes of a Mesh: the wrapping, in one place.

    mesh = open_mesh(run, "fsdp", tp=2)
    network = parallelize(net, mesh)   # what the loop calls; net's parameters are parts now
    optimizers = make_optimizer(net)   # made behind it, of the parts

All of it is torch's: DistributedDataParallel, fully_shard (FSDP2), parallelize_module, pipelining.
A parameter that is divided is a DTensor: see barelm/parts.py.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from barelm.adapters import NF4Linear
from barelm.parts import is_divided
from barelm.run import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from barelm.mesh import Mesh, Sizes
    from model import GPT


def parallelize(net: GPT, mesh: Mesh, compute_dtype: torch.dtype = torch.float32,
                reduce_dtype: torch.dtype = torch.float32) -> GPT:  # fmt: skip
    """What the loop calls of a network that is on the host: net itself, divided in place, or in
    DistributedDataParallel; of one in stages its Pipeline. compute_dtype: in which the blocks'
    matrices are gathered; reduce_dtype: in which gradients are summed."""
    sizes = mesh.sizes
    if sizes.tp > 1:
        from barelm.tensor_parallel import split_heads

        split_heads(net, mesh)
    if sizes.cp > 1:
        from barelm.context_parallel import split_tokens

        split_tokens(net, mesh)
    network = net
    if sizes.pp > 1:
        from barelm.pipeline import Stage, keep_stage

        keep_stage(net, mesh.rank_of("pp"), sizes.pp)
        network = Stage(net, mesh.rank_of("pp"), sizes.pp, compute_dtype)
    if needs_fully_shard(sizes):
        net.ops.joins = sizes.shard == 1
        fully_sharded(network, blocks_of(net), mesh, compute_dtype, reduce_dtype)
    network.to(mesh.run.device)
    if sizes.replica > 1 and not needs_fully_shard(sizes):
        group = mesh.group_of("replica")
        network = DistributedDataParallel(
            network, process_group=group, gradient_as_bucket_view=True
        )
        if reduce_dtype == torch.bfloat16:
            # torch reads a hook's hints, and not such as are text: it is given one without.
            network.register_comm_hook(group, lambda group, bucket: exchange_narrow(group, bucket))
    if reduce_dtype == torch.bfloat16 and keeps_narrow(sizes):
        narrow_gradients(net)
    if sizes.pp > 1:
        from barelm.pipeline import Pipeline

        network = mesh.pipeline = Pipeline(network, mesh)
    return network


def exchange_narrow(group: Any, bucket: Any) -> Any:
    """DistributedDataParallel's exchange of some gradients in bfloat16. (By its own name torch
    refuses it on CPUs, whose gloo can do it too.)"""
    return bf16_compress_hook(group, bucket)


def keeps_narrow(sizes: Sizes) -> bool:
    """Whether gradients of less than float32 are kept so, too. Those of DistributedDataParallel
    stay as wide as its parameters: they are narrow on their way alone."""
    return sizes.replica == 1 or needs_fully_shard(sizes)


def narrow_gradients(net: GPT) -> None:
    """Let gradients be added up, and kept, in bfloat16: half the memory."""

    def narrow(p):
        p.grad = p.grad.to(torch.bfloat16)

    for p in net.parameters():
        if p.requires_grad:
            p.grad_dtype = None  # any, whatever the parameter's
            p.register_post_accumulate_grad_hook(narrow)


def needs_fully_shard(sizes: Sizes) -> bool:
    """Whether fully_shard exchanges the gradients. DistributedDataParallel knows no parameter that
    is divided for tensor parallelism: its copies are then those of a grid of one part each."""
    return sizes.shard > 1 or (sizes.tp > 1 and sizes.replica > 1)


def fully_sharded(
    net: GPT, blocks: list, mesh: Mesh, compute_dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    """Divide each block's parameters, and all others of net together, over mesh.shard_mesh; a
    block's are whole while it computes (Rajbhandari et al. 2020, stage 3)."""
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # A block's matrices travel in the dtype that they are multiplied in. What is not a block, the
    # embedding above all, stays in full: it is where the residual stream begins.
    packed = pack_as_parameters(net)  # codes are gathered as they are
    narrow = None if compute_dtype == torch.float32 or packed else compute_dtype
    of_block = MixedPrecisionPolicy(narrow, reduce_dtype, cast_forward_inputs=False)
    of_rest = MixedPrecisionPolicy(None, reduce_dtype, cast_forward_inputs=False)
    grid = mesh.shard_mesh
    for block in blocks:
        if narrow is not None:
            widen_norms(block)
        fully_shard(block, mesh=grid, mp_policy=of_block)
    fully_shard(net, mesh=grid, mp_policy=of_rest)
    # Who reads states and not logits begins here, and comes to the head with what is whole by then.
    begun = []
    for name in ("hidden", "encode"):
        if hasattr(net, name):
            plain = getattr(net, name)
            register_fsdp_forward_method(net, name)
            setattr(net, name, outermost(plain, getattr(net, name), begun))


def widen_norms(block: nn.Module) -> None:
    """Let LayerNorms compute in the dtype of what they read, whatever their weights come in: torch
    takes no narrower ones."""
    for module in block.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = partial(layer_norm, module)


def layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    weight = module.weight.to(x.dtype)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def outermost(plain: Callable, gathering: Callable, begun: list) -> Callable:
    """Of methods that call each other the one that is called first: `gathering`, which begins
    FSDP's forward; within it another one, `plain`, ends nothing. begun: what they share."""

    def method(*args, **options):
        if begun:
            return plain(*args, **options)
        begun.append(method)
        try:
            return gathering(*args, **options)
        finally:
            begun.clear()

    return method


def pack_as_parameters(net: GPT) -> bool:
    """Make parameters of the codes and scales of layers in 4 bits, which are divided as such:
    whether there are any."""
    layers = [layer for layer in net.modules() if isinstance(layer, NF4Linear)]
    for layer in layers:
        for name in ("codes", "scale", "top"):
            buffer = getattr(layer, name)
            delattr(layer, name)
            setattr(layer, name, torch.nn.Parameter(buffer, requires_grad=False))
    return bool(layers)


def blocks_of(net: GPT) -> list:
    """The blocks of a network, an encoder's among them."""
    blocks = list(net.model.layers)
    if net.config.is_seq2seq:
        blocks += net.model.encoder.layers
    return blocks


@contextlib.contextmanager
def whole_weights(net: GPT) -> Iterator[None]:
    """Each process has all of a fully sharded network in this context, to generate by itself; all
    processes enter it. Another network is as it always is."""
    parts = sharded_modules(net)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not net, recurse=False)
            part.reshard()


def divide_again(net: GPT) -> None:
    """Take back what the last forward without a backward has left whole: then the parameters are
    parts once more."""
    for part in sharded_modules(net):
        part.reshard()


def sharded_modules(net: GPT) -> list:
    """The modules whose parameters fully_shard has divided."""
    if not is_divided(next(net.parameters())) and not hasattr(net, "reshard"):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in net.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def shortened(net: GPT, device: torch.device) -> Iterator[GPT]:
    """As few blocks of a network as there are kinds, on the device: to try there what the whole,
    which no process may hold, will be computed by."""
    c = net.config
    n_kinds = max(len(c.layers), len(c.expert_layers), 1)
    parts = [net.model]
    if c.is_seq2seq:
        parts.append(net.model.encoder)
    layers = [part.layers for part in parts]
    for part in parts:
        part.layers = part.layers[:n_kinds]
    try:
        yield net.to(device)
    finally:
        for part, blocks in zip(parts, layers):
            part.layers = blocks


def exchanging(network: GPT, sizes: Sizes, is_last: bool) -> AbstractContextManager:
    """The context of a micro-batch's forward and backward; is_last: of the step. Copies exchange
    their gradients once a step. Parts do with every micro-batch, or each process would hold the
    whole of them in between."""
    if isinstance(network, DistributedDataParallel) and not is_last:
        return network.no_sync()
    if needs_fully_shard(sizes) and sizes.shard == 1:
        network.set_requires_gradient_sync(is_last)
    elif needs_fully_shard(sizes) and sizes.replica > 1:
        network.set_requires_all_reduce(is_last)
    return contextlib.nullcontext()


def check_divided(net: GPT, dtype: torch.dtype, sizes: Sizes) -> None:
    """Refuse what cannot be computed by parts."""
    if sizes.pp > 1:
        from barelm.pipeline import refuse_pipeline

        refuse_pipeline(net.config, sizes.pp, net.deterministic)
    if dtype == torch.float16:
        why = "its scale would have to be found by all processes together"
        raise UserError(f"--dtype=float16: not with a network in parts: {why}: use bfloat16")
    if net.quantize:
        raise UserError(f"{net.quantize} weights are not divided: start from what they were")
