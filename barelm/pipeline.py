"""Pipeline parallelism: each process holds some of a network's blocks, and micro-batches flow
through them (Huang et al. 2019), by torch.distributed.pipelining.

    net = keep_stage(net, index, n_stages)        # of a whole GPT what this process computes
    stage = Stage(net, index, n_stages, cast)     # may be wrapped: DDP, fully_shard
    pipeline = Pipeline(stage, group, n_micro, rows, seq_len)
    losses = pipeline.step(batch, docs, scale)    # forward and backward of all micro-batches
    sum_shared(net, groups)                       # gradients of what two stages hold

Names of parameters stay those of the whole network, so that a checkpoint knows of no stages. The
order of work is 1F1B (Narayanan et al. 2021, 2.2): a stage keeps the activations of at most
n_stages micro-batches, and waits for (n_stages - 1) / (n_micro + n_stages - 1) of the time.

B rows of T tokens, C: n_embd, E: n_experts.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from barelm.optim import attention_products, mlp_weights
from barelm.patterns import Pattern
from barelm.positions import document_positions
from barelm.run import UserError
from model import at_places

# Micro-batches of a step for each stage, where the user leaves their size open: a stage then waits
# for less than a fifth of the time.
MICRO_BATCHES = 4


# --------------------------------------------------------------------------------------------------
# Which stage has which blocks


def refuse_pipeline(c, n_stages, deterministic=False, dtype=torch.float32):
    """Refuse what a pipeline cannot do. c: the network's GPTConfig."""
    if n_stages > c.n_layer:
        raise UserError(f"--pp={n_stages}: the network has {c.n_layer} blocks: --pp={c.n_layer}")
    if c.is_seq2seq:
        why = (
            "every block of a decoder reads the last of the encoder's: use --tp or --parallel=fsdp"
        )
        raise UserError(f"--pp={n_stages}: not of an encoder beside a decoder: {why}")
    if deterministic:
        raise UserError(f"--pp={n_stages}: not with --deterministic, whose rows are no micro-batch")
    if dtype == torch.float16:
        why = "its scaler would see the overflows of one stage alone: --dtype=bfloat16"
        raise UserError(f"--pp={n_stages}: not in float16: {why}")


def block_costs(c, seq_len):
    """Multiplications of a token in each block: [float]."""
    heads = 2 * c.head_dim * c.n_embd * (c.n_head + c.n_kv_head)  # q and o, k and v
    costs = []
    for i, pattern in enumerate(c.patterns):
        costs.append(heads + attention_products(c, pattern, seq_len) + mlp_weights(c, i))
    return costs


def head_cost(c, seq_len):
    """The same of what stands behind the blocks. What stands before them multiplies nothing: the
    embedding is looked up."""
    cost = c.n_embd * c.vocab_size
    if c.mlm_head:
        cost += c.n_embd**2
    if c.mtp:
        heads = 2 * c.head_dim * c.n_embd * (c.n_head + c.n_kv_head)
        block = heads + attention_products(c, Pattern(), seq_len) + 2 * c.n_embd**2
        cost += c.mtp * (block + mlp_weights(c, 0) + c.n_embd * c.vocab_size)
    return cost


def split_blocks(costs, n_stages, last_cost=0.0):
    """Which blocks each stage has, [(begin, end)], so that the slowest stage has the least to do.
    costs: of each block; last_cost: what the last stage does besides."""
    n = len(costs)
    before = [0.0]  # the costs of the first blocks
    for cost in costs:
        before.append(before[-1] + cost)
    # Of the first `end` blocks in so many stages: (the slowest stage, the sum of squares, which
    # chooses the evenest of those that are as fast; where the last of these stages begins).
    best = [{0: (0.0, 0.0, 0)}]
    for stage in range(1, n_stages + 1):
        extra = last_cost if stage == n_stages else 0.0
        found = {}
        for end in range(stage, n + 1):
            ways = []
            for begin in range(stage - 1, end):
                if begin not in best[-1]:
                    continue
                slowest, squares, _ = best[-1][begin]
                cost = before[end] - before[begin] + extra
                ways.append((max(slowest, cost), squares + cost**2, begin))
            if ways:
                found[end] = min(ways)
        best.append(found)
    stages = []
    end = n
    for stage in range(n_stages, 0, -1):
        begin = best[stage][end][2]
        stages.append((begin, end))
        end = begin
    return stages[::-1]


def stages_of(c, n_stages, seq_len=0):
    """Which blocks each stage of a network has: [(begin, end)]. The longest context decides, so
    that a checkpoint of another seq_len is split alike."""
    seq_len = seq_len or c.n_ctx
    return split_blocks(block_costs(c, seq_len), n_stages, head_cost(c, seq_len))


def keep_stage(net, index, n_stages):
    """Take from a whole network, in place, what other stages have. What two stages need both keep:
    `shared_names`."""
    c = net.config
    refuse_pipeline(c, n_stages)
    begin, end = stages_of(c, n_stages)[index]
    blocks = nn.ModuleList()
    for i in range(begin, end):
        blocks.add_module(str(i), net.model.layers[i])  # under its number in the whole
    net.model.layers = blocks
    is_first = index == 0
    is_last = index == n_stages - 1
    if not is_first:
        for name in ("embed_positions", "embed_types", "embed_norm"):
            drop(net.model, name)
    if not is_first and not (is_last and last_needs_embedding(c)):
        drop(net.model, "embed_tokens")
    if not is_last:
        for name in ("norm", "mtp"):
            drop(net.model, name)
        for name in ("head_dense", "head_norm", "lm_head"):
            drop(net, name)
    return net


def drop(module, name):
    """Let a module go, if there is one of this name."""
    if name in module._modules:
        setattr(module, name, None)


def last_needs_embedding(c):
    """Whether the last stage reads the embedding too: as its head, or of tokens further ahead."""
    return c.tie or c.mtp > 0


def shared_names(c, n_stages):
    """The parameters that several stages hold, and which: {name: [stage]}."""
    shared = {}
    if last_needs_embedding(c):
        shared["model.embed_tokens.weight"] = [0, n_stages - 1]
    if c.pos == "relative":
        shared["model.relative_bias.weight"] = list(range(n_stages))
    return shared


def shared_groups(c, lines):
    """The groups of processes that hold a parameter together: {name: this process's group, or None
    where it holds none}. lines: the ranks of each pipeline, [[rank of stage 0, of stage 1…]]. All
    processes call it."""
    groups = {}
    for name, stages in shared_names(c, len(lines[0])).items():
        holders = [[line[stage] for stage in stages] for line in lines]
        groups[name], _ = dist.new_subgroups_by_enumeration(holders)
    return groups


def sum_shared(net, groups):
    """Sum the gradients of parameters that several stages hold over these: their copies then stay
    the same. groups: `shared_groups`'."""
    params = dict(net.named_parameters())
    for name, group in groups.items():
        if name not in params:
            continue
        p = params[name]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(local(p.grad), group=group)


def local(tensor):
    """This process's part of a DTensor; a plain tensor is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# --------------------------------------------------------------------------------------------------
# What a stage computes


class Stage(nn.Module):
    """A part of a network as a function of what the stage before gives.

    forward: the states x (B, T, C) float32, on the first stage ids (B, T) int64; of a network with
    experts also the sum of the routers' losses so far, (). By name the micro-batch, which every
    stage reads for itself: ids, targets, docs and places, as `GPT.forward` takes them.

    It returns what the next stage takes; the last one the sum of the losses (), in training, or in
    eval mode what `score(net, h, batch)` makes of the states h: a row of figures (1, n)."""

    def __init__(self, net, index, n_stages, cast):
        super().__init__()
        self.net = net
        self.cast = cast  # within which it computes: run.autocast's
        self.is_first = index == 0
        self.is_last = index == n_stages - 1
        self.score = None
        self.after = None  # called behind each forward of training
        self.mtp_sum = 0.0  # of the micro-batches of a step
        c = net.config
        # Of the blocks that have experts: how many stand before this stage, and how many there are.
        begin, _ = stages_of(c, n_stages)[index]
        self.experts_before = sum(c.has_experts[:begin])
        self.n_expert_blocks = sum(c.has_experts)

    def forward(self, x, router_loss=None, *, ids, targets=None, docs=None, places=None):
        batch = {"ids": ids, "targets": targets, "docs": docs, "places": places}
        net = self.net
        with self.cast:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
            if docs is not None:
                positions = document_positions(positions, docs)
            if self.is_first:
                x = net.embed(net.model.embed_tokens(ids), positions)
            net.routing = None
            looks = net.looks(net.model, x, positions, docs)
            x = net.run_blocks(net.model.layers, x, looks)
            if self.n_expert_blocks:
                router_loss = self.add_routing(router_loss, x)
            if self.is_last and self.training:
                x = self.loss(net.model.norm(x), router_loss, **batch)
            elif self.is_last:
                return self.score(net, net.model.norm(x), batch)
        if self.training and self.after is not None:
            self.after()
        if self.is_last or not self.n_expert_blocks:
            return x
        return x, router_loss

    def loss(self, h, router_loss, ids, targets, docs, places):
        """What `GPT.forward` gives of the final states h (B, T, C): a sum, () float32."""
        net = self.net
        c = net.config
        if places is not None:
            h = at_places(h, places)
        loss = net.loss_of(h, targets)
        if self.n_expert_blocks:
            loss = loss + (targets != -100).sum() * (router_loss / self.n_expert_blocks)
        if c.mtp:
            ahead = net.ahead_loss(h, ids, targets, docs)
            net.mtp_loss = ahead.detach()
            self.mtp_sum = self.mtp_sum + net.mtp_loss
            loss = loss + c.mtp_weight * (ahead - net.mtp_loss)
        return loss.float()

    def add_routing(self, router_loss, x):
        """The sum of the routers' losses, () float32, with those of this stage. net.routing becomes
        that of the whole network, (blocks with experts, E + 3), zeros where others have them."""
        c = self.net.config
        if router_loss is None:  # the first stage; of x, so that it has a gradient in any case
            router_loss = 0.0 * x[0, 0, 0].float()
        whole = x.new_zeros(self.n_expert_blocks, c.n_experts + 3, dtype=torch.float32)
        own = self.net.routing
        if own is not None:
            balance, z, _ = own[:, c.n_experts :].sum(0)
            weight = c.balance_weight if c.balance == "loss" else 0.0
            router_loss = router_loss + weight * balance + c.z_weight * z
            whole[self.experts_before : self.experts_before + len(own)] = own.detach()
        self.net.routing = whole
        return router_loss


class Whole(nn.Module):
    """A module within another, so that torch.distributed.pipelining sees no FSDP nor DDP in it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# The pipeline


class Pipeline:
    """The stages of all processes of a pipeline as one network, for steps of n_micro micro-batches
    of `rows` windows of seq_len tokens each. All of its processes call each method together."""

    def __init__(self, module, index, n_stages, group, device, n_micro, rows, seq_len):
        self.submodule = module  # a Stage, or what wraps it
        self.stage = module.module if hasattr(module, "module") else module
        self.net = self.stage.net
        self.index = index
        self.n_stages = n_stages
        self.group = group
        self.device = device
        self.n_micro = n_micro
        self.rows = rows
        self.seq_len = seq_len
        self.scale = None  # of the loss that is computed at present
        self.loss_sum = None
        if n_micro < n_stages:
            raise UserError(
                f"--pp={n_stages}: {n_micro} micro-batch(es) a step, fewer than stages: raise "
                f"batch_tokens, or lower micro_batch (now {rows})"
            )
        loss_shape = ()
        stage = self.make_stage(module, rows, loss_shape, learns=True)
        self.train_schedule = Schedule1F1B(stage, n_micro, self.scaled_loss, scale_grads=False)
        self.forward_schedules = {}  # by (micro-batches, rows): without backward

    def make_stage(self, module, rows, last_shape, learns):
        """torch's stage, which is told of what shape its inputs and outputs are."""
        c = self.net.config

        def like(*shape, dtype=torch.float32, grad=learns):
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

        between = [like(rows, self.seq_len, c.n_embd)]
        if self.stage.n_expert_blocks:
            between.append(like())
        first = (like(rows, self.seq_len, dtype=torch.int64, grad=False),)
        last = like(*last_shape) if learns else like(*last_shape, dtype=torch.float64)
        is_last = self.index == self.n_stages - 1
        return PipelineStage(
            module,
            self.index,
            self.n_stages,
            self.device,
            input_args=first if self.index == 0 else tuple(between),
            output_args=(last,) if is_last else tuple(between),
            group=self.group,
        )

    def scaled_loss(self, loss, targets):
        """What the last stage goes backward from."""
        self.loss_sum += loss.detach()
        return self.scale(loss)

    def step(self, batch, docs, scale):
        """Forward and backward of a step's micro-batches, which batch {name: (n_micro rows, …)} has
        one behind the other; docs (n_micro rows, T) or None. scale: a function of a micro-batch's
        summed loss, of which the gradient is taken.

        Returns (2,) float32: the sums of the losses, and of those of the tokens further ahead
        (mtp); zeros but on the last stage."""
        self.scale = scale
        self.loss_sum = torch.zeros((), device=self.device)
        self.stage.mtp_sum = torch.zeros((), device=self.device)
        args, kwargs = self.arguments(batch, docs)
        targets = batch["targets"] if self.stage.is_last else None
        self.train_schedule.step(*args, target=targets, return_outputs=False, **kwargs)
        return torch.stack([self.loss_sum, self.stage.mtp_sum])

    def arguments(self, batch, docs):
        """The arguments of torch's schedules: what the first stage takes in the place of states,
        and what every stage is told by name."""
        kwargs = dict(batch)
        if docs is not None:
            kwargs["docs"] = docs
        args = (batch["ids"],) if self.index == 0 else ()
        return args, kwargs

    @torch.no_grad()
    def evaluate(self, batch, docs, score, n_figures, n_micro=None):
        """The figures (n_micro, n_figures) float64 that score(net, h, batch) -> (1, n_figures)
        gives of each micro-batch, on the last stage, elsewhere None. The network is in eval mode."""
        n_micro = n_micro or self.n_micro
        rows = len(batch["ids"]) // n_micro
        key = (n_micro, rows, n_figures)
        if key not in self.forward_schedules:
            stage = self.make_stage(Whole(self.submodule), rows, (1, n_figures), learns=False)
            self.forward_schedules[key] = ScheduleGPipe(stage, n_micro)
        self.stage.score = score
        args, kwargs = self.arguments(batch, docs)
        return self.forward_schedules[key].step(*args, **kwargs)
