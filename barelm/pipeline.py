"""Pipeline parallelism: each process holds some of a network's blocks, and micro-batches flow
through them (Huang et al. 2019), by torch.distributed.pipelining.

    keep_stage(net, index, n_stages)            # of a whole GPT what this process computes
    stage = Stage(net, index, n_stages, dtype)  # which may be wrapped: DDP, fully_shard
    pipeline = Pipeline(stage, mesh)
    losses = pipeline.step(batch, docs, n_micro, scale)  # forward and backward of a whole step

Names of parameters stay those of the whole network, so that a checkpoint knows of no stages. The
order of work is 1F1B (Narayanan et al. 2021, 2.2): a stage keeps the activations of at most
n_stages micro-batches, and waits for (n_stages - 1) / (n_micro + n_stages - 1) of the time.

B rows of T tokens, C: n_embd, E: n_experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from barelm.parts import local_part, sum_partial_gradients
from barelm.positions import document_positions
from barelm.run import UserError, autocast
from barelm.sampling import choose_tokens, draws
from barelm.stages import stages_of
from barelm.texts import Row
from model import at_places, head

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from barelm.mesh import Mesh
    from barelm.tokenizer import Tokenizer
    from model import GPT, GPTConfig

# --------------------------------------------------------------------------------------------------
# Which stage has which blocks


def refuse_pipeline(c: GPTConfig, n_stages: int, deterministic: bool = False) -> None:
    """Refuse what a pipeline cannot do. c: the network's GPTConfig."""
    if n_stages > c.n_layer:
        raise UserError(f"--pp={n_stages}: the network has {c.n_layer} blocks: --pp={c.n_layer}")
    if c.is_seq2seq:
        why = "every block of the decoder reads the encoder: use --parallel=fsdp, or --tp"
        raise UserError(f"--pp={n_stages}: not of an encoder beside a decoder: {why}")
    if deterministic:
        raise UserError(f"--pp={n_stages}: not with --deterministic, which has rows of its own")


def keep_stage(net: GPT, index: Tensor, n_stages: int) -> GPT:
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


def drop(module: nn.Module, name: str) -> None:
    """Let a module go, if there is one of this name."""
    if name in module._modules:
        setattr(module, name, None)


def last_needs_embedding(c: GPTConfig) -> bool:
    """Whether the last stage reads the embedding too: as its head, or of tokens further ahead."""
    return c.tie or c.mtp > 0


def shared_names(c: GPTConfig, n_stages: int) -> dict[str, list[int]]:
    """The parameters that several stages hold, and which: {name: [stage]}."""
    shared = {}
    if last_needs_embedding(c):
        shared["model.embed_tokens.weight"] = [0, n_stages - 1]
    if c.pos == "relative":
        shared["model.relative_bias.weight"] = list(range(n_stages))
    return shared


def shared_parameters(net: GPT, mesh: Mesh) -> list:
    """The parameters that this stage holds together with others: [(p, the group of the processes
    that hold it)]. All processes call it, behind what divides the parameters. Each gets what
    `n_holders` asks of it: how many stages have it."""
    lines = mesh.device_mesh.mesh.flatten(1).T.tolist()  # the ranks of each pipeline
    params = dict(net.named_parameters())
    shared = []
    for name, stages in shared_names(net.config, mesh.sizes.pp).items():
        holders = [[line[stage] for stage in stages] for line in lines]
        group, _ = dist.new_subgroups_by_enumeration(holders)
        if mesh.rank_of("pp") in stages:
            params[name].n_stages = len(stages)
            shared.append((params[name], group))
    return shared


def sum_shared(shared: list) -> None:
    """Sum the gradients of parameters that several stages hold, `shared_parameters`: the copies
    then stay the same."""
    sum_partial_gradients([p for p, _ in shared])
    for p, group in shared:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(local_part(p.grad), group=group)


# --------------------------------------------------------------------------------------------------
# What a stage computes


class Stage(nn.Module):
    """A part of a network as a function of what the stage before gives.

    forward: the states x (B, T, C) float32, on the first stage ids (B, T) int64; of a network with
    experts also the sum of the routers' losses so far, (). By name the micro-batch, which every
    stage reads for itself: ids, targets (B, T), docs and places, as `GPT.forward` takes them.

    It returns what the next stage takes; the last one the sum of the losses (), in training, or in
    eval mode what `score(net, h, batch)` makes of the states h: a row of figures (1, n)."""

    def __init__(
        self, net: GPT, index: Tensor, n_stages: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.net = net
        self.dtype = dtype  # in which it computes
        self.is_first = index == 0
        self.is_last = index == n_stages - 1
        self.score = None
        self.after = None  # called behind each forward of training
        self.mtp_sum = 0.0  # of the micro-batches of a step
        c = net.config
        # Of the blocks that have experts, how many there are, and which are of this stage.
        begin, end = stages_of(c, n_stages)[index]
        self.n_expert_blocks = sum(c.has_experts)
        self.expert_blocks = slice(sum(c.has_experts[:begin]), sum(c.has_experts[:end]))

    def forward(self, x: Tensor, router_loss: Tensor | None = None, *, ids: Tensor,
                targets: Tensor | None = None, docs: Tensor | None = None,
                places: Tensor | None = None) -> Any:  # fmt: skip
        net = self.net
        with autocast(ids.device, self.dtype):
            ids, targets, positions, seen = self.read(ids, targets, docs)
            if self.is_first:
                x = net.embed(net.model.embed_tokens(ids), positions)
            net.routing = None
            looks = net.looks(net.model, x, positions, **seen)
            x = net.run_blocks(net.model.layers, x, looks)
            if self.n_expert_blocks:
                router_loss = self.add_routing(router_loss, x)
            if self.is_last and net.training:
                h = net.model.norm(x)
                x = self.loss(h, router_loss, ids, targets, docs, places)
            elif self.is_last:
                batch = {"targets": targets}
                if places is not None:
                    batch["places"] = places
                return self.score(net, net.model.norm(x), batch)
        if net.training and self.after is not None:
            self.after()
        if self.is_last or not self.n_expert_blocks:
            return x
        return x, router_loss

    def read(self, ids: Tensor, targets: Tensor, docs: Tensor) -> tuple:
        """(ids, targets, positions (B or 1, t), what `GPT.looks` is told besides) of a micro-batch:
        where processes share windows (context_parallel.py) those of this process's t tokens."""
        if self.net.tokens is not None:
            ids, targets, options = self.net.tokens.cut(ids, targets, {"docs": docs})
            return ids, targets, options["window"].own_positions, options
        positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        if docs is not None:
            positions = document_positions(positions, docs)
        return ids, targets, positions, {"docs": docs}

    def loss(self, h: Tensor, router_loss: Tensor | None, ids: Tensor, targets: Tensor,
             docs: Tensor, places: Tensor | None) -> Tensor:  # fmt: skip
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

    def add_routing(self, router_loss: Tensor, x: Tensor) -> Tensor:
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
            whole[self.expert_blocks] = own.detach()
        self.net.routing = whole
        return router_loss


class Whole(nn.Module):
    """A module within another, so that torch.distributed.pipelining sees no FSDP nor DDP in it: of
    these it would wait for gradients, where there are none."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# The pipeline


class Pipeline:
    """The stages of all processes of a pipeline as one network. All of them call each method
    together, with the same micro-batches: what a step has of them, one behind the other."""

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        self.submodule = module  # a Stage, or what wraps it
        self.stage = module.module if isinstance(module, DistributedDataParallel) else module
        self.net = self.stage.net
        self.n_stages = mesh.sizes.pp
        self.index = mesh.rank_of("pp")
        self.group = mesh.group_of("pp")
        self.device = mesh.run.device
        self.shared = shared_parameters(self.net, mesh)
        self.schedules = {}  # torch's, by the shapes of what goes through them
        self.scale = None  # of the losses of the step that is computed
        self.loss_sum = None

    def step(self, batch: dict, docs: Tensor, n_micro: int, scale: float) -> Tensor:
        """Forward and backward of a step's n_micro micro-batches, {name: (n_micro B, ...)}; docs
        (n_micro B, T) or None. scale: the gradient is that of a summed loss times it.

        Returns (2,) float32: the sums of the losses, and of those of the tokens further ahead
        (mtp); zeros but on the last stage."""
        self.scale = scale
        self.loss_sum = torch.zeros((), device=self.device)
        self.stage.mtp_sum = torch.zeros((), device=self.device)
        schedule = self.schedule(batch, n_micro)
        args, kwargs = self.arguments(batch, docs)
        targets = batch["targets"] if self.stage.is_last else None
        schedule.step(*args, target=targets, return_outputs=False, **kwargs)
        sum_shared(self.shared)
        return torch.stack([self.loss_sum, self.stage.mtp_sum])

    @torch.no_grad()
    def evaluate(
        self, batch: dict, docs: Tensor, n_micro: int, score: Callable, n_figures: int
    ) -> Tensor:
        """The figures (n_micro, n_figures) float64 that score(net, h, batch) -> (1, n_figures)
        gives of each micro-batch's final states h (B, T, C), zeros but on the last stage. The
        network is in eval mode."""
        self.stage.score = score
        schedule = self.schedule(batch, n_micro, n_figures)
        args, kwargs = self.arguments(batch, docs)
        figures = schedule.step(*args, **kwargs)
        if figures is None:
            shape = (n_micro, n_figures)
            return torch.zeros(shape, dtype=torch.float64, device=self.device)
        return figures

    @torch.no_grad()
    def generate(self, tok: Tokenizer, prompt: list[int], seq_len: int, max_new_tokens: int,
                 **filters: Any) -> str:  # fmt: skip
        """The text that continues a prompt, a list of ids, in a window of seq_len tokens: as
        `model.generate` gives it, seed 0. There is no cache: every token takes a pass of the whole
        window, which costs less than the validation before it."""
        ids = prompt[-(seq_len - 1) :]
        row = Row(tok, min(max_new_tokens, seq_len - len(ids)), [])
        uniform = draws(0, 0, row.limit).to(self.device)
        was_training = self.net.training
        self.net.eval()

        def next_token(net, h, batch):
            logits = head(net, tok, h[:, len(ids) - 1])  # (1, V)
            drawn = uniform[len(row.out.ids)].view(1)
            return choose_tokens(logits, drawn, **filters)[:, None].double()

        while not row.done:
            window = torch.tensor([ids + [0] * (seq_len - len(ids))], device=self.device)
            chosen = self.evaluate({"ids": window}, None, 1, next_token, 1)
            dist.all_reduce(chosen, group=self.group)  # of the last stage: the others have 0
            ids = [*ids, int(chosen)]
            row.take(ids[-1], 0.0)
        self.net.train(was_training)
        return row.out.text

    def arguments(self, batch: dict, docs: Tensor) -> tuple:
        """The arguments of torch's schedules: what the first stage takes in the place of states,
        and what every stage is told by name."""
        kwargs = dict(batch)
        if docs is not None:
            kwargs["docs"] = docs
        args = (batch["ids"],) if self.stage.is_first else ()
        return args, kwargs

    def schedule(self, batch: dict, n_micro: int, n_figures: int = 0) -> Any:
        """torch's schedule for batches of this shape. n_figures: of a micro-batch, without
        backward; 0: with it."""
        n_rows, T = batch["ids"].shape
        key = (n_rows, T, n_micro, n_figures)
        if key not in self.schedules:
            if n_figures:
                stage = self.make_stage(Whole(self.submodule), n_rows // n_micro, T, n_figures)
                self.schedules[key] = ScheduleGPipe(stage, n_micro)
            else:
                stage = self.make_stage(self.submodule, n_rows // n_micro, T)
                loss = self.scaled_loss
                self.schedules[key] = Schedule1F1B(stage, n_micro, loss, scale_grads=False)
        return self.schedules[key]

    def make_stage(self, module: nn.Module, rows: int, T: int, n_figures: int = 0) -> Any:
        """torch's stage, told of what shape all is that comes and goes, so that it need not try."""
        learns = n_figures == 0

        def like(*shape, dtype=torch.float32, grad=learns):
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

        n_own = T if self.net.tokens is None else T // self.net.tokens.size
        between = [like(rows, n_own, self.net.config.n_embd)]
        if self.stage.n_expert_blocks:
            between.append(like())  # the routers' losses
        inputs = outputs = tuple(between)
        if self.stage.is_first:
            inputs = (like(rows, T, dtype=torch.int64, grad=False),)
        if self.stage.is_last:
            outputs = (like() if learns else like(1, n_figures, dtype=torch.float64),)
        return PipelineStage(
            module,
            self.index,
            self.n_stages,
            self.device,
            input_args=inputs,
            output_args=outputs,
            group=self.group,
        )

    def scaled_loss(self, loss: Tensor, targets: Tensor) -> Tensor:
        """What the last stage goes backward from."""
        self.loss_sum += loss.detach()
        return loss * self.scale
