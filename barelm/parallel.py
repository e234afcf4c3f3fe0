"""How a network is divided over the processes of a Mesh: the wrapping, in one place.

    mesh = open_mesh(run, "fsdp", tp=2)
    network = parallelize(net, mesh)   # what the loop calls; net's parameters are parts now
    optimizers = make_optimizer(net)   # made behind it, of the parts

All of it is torch's: DistributedDataParallel, fully_shard (FSDP2), parallelize_module, pipelining.
A parameter that is divided is a DTensor: see barelm/parts.py.
"""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel

from barelm.run import UserError


def parallelize(net, mesh, compute_dtype=torch.float32, reduce_dtype=torch.float32):
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
        fully_sharded(network, blocks_of(net), mesh, compute_dtype, reduce_dtype)
    network.to(mesh.run.device)
    if sizes.replica > 1 and not needs_fully_shard(sizes):
        group = mesh.group_of("replica")
        network = DistributedDataParallel(
            network, process_group=group, gradient_as_bucket_view=True
        )
    if sizes.pp > 1:
        from barelm.pipeline import Pipeline

        network = mesh.pipeline = Pipeline(network, mesh)
    return network


def needs_fully_shard(sizes):
    """Whether fully_shard exchanges the gradients. DistributedDataParallel knows no parameter that
    is divided for tensor parallelism: its copies are then those of a grid of one part each."""
    return sizes.shard > 1 or (sizes.tp > 1 and sizes.replica > 1)


def fully_sharded(net, blocks, mesh, compute_dtype, reduce_dtype):
    """Divide each block's parameters, and all others of net together, over mesh.shard_mesh; a
    block's are whole while it computes (Rajbhandari et al. 2020, stage 3)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # A block's matrices travel in the dtype that they are multiplied in. What is not a block, the
    # embedding above all, stays in full: it is where the residual stream begins.
    narrow = None if compute_dtype == torch.float32 else compute_dtype
    of_block = MixedPrecisionPolicy(narrow, reduce_dtype, cast_forward_inputs=False)
    of_rest = MixedPrecisionPolicy(None, reduce_dtype, cast_forward_inputs=False)
    grid = mesh.shard_mesh
    for block in blocks:
        fully_shard(block, mesh=grid, mp_policy=of_block)
    fully_shard(net, mesh=grid, mp_policy=of_rest)


def blocks_of(net):
    """The blocks of a network, an encoder's among them."""
    blocks = list(net.model.layers)
    if net.config.is_seq2seq:
        blocks += net.model.encoder.layers
    return blocks


def exchanging(network, is_last):
    """The context of a micro-batch's forward and backward; is_last: of the step. Copies exchange
    their gradients once a step. Parts do with every micro-batch, or each process would hold the
    whole of them in between."""
    if isinstance(network, DistributedDataParallel) and not is_last:
        return network.no_sync()
    return contextlib.nullcontext()


def check_divided(net, dtype, sizes):
    """Refuse what cannot be computed by parts."""
    if sizes.pp > 1:
        from barelm.pipeline import refuse_pipeline

        refuse_pipeline(net.config, sizes.pp, net.deterministic)
    if dtype == torch.float16:
        why = "its scale would have to be found by all processes together"
        raise UserError(f"--dtype=float16: not with a network in parts: {why}: use bfloat16")
    if net.quantize:
        raise UserError(f"{net.quantize} weights are not divided: start from what they were")
