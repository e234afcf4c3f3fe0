"""Mixture of experts: many MLPs in a block, of which a router chooses few for each token.

`Experts` stands where a block has its MLP. Three ways compute the same: `all_experts` is the
formula, a weighted sum over all of them; `one_by_one` computes each on the tokens that chose it;
`grouped` is that as three products, for which nothing waits for the device. `Experts.mix` chooses.
No token is dropped, whatever the load.

N tokens, C: n_embd, E: n_experts, k: n_experts_per_token, n: expert_hidden, M = N k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from barelm import invariant
from barelm.devices import widen
from barelm.operations import GATED, activation
from barelm.quantized import QuantizedStack
from barelm.run import compute_dtype
from model import MLP

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from barelm.operations import Operations
    from barelm.pipeline import Pipeline
    from model import GPT, GPTConfig


class Router(nn.Module):
    """A score of each expert for each token. Not nn.Linear, so that nothing adapts or quantizes it:
    a small error of a score changes which expert is chosen."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.n_embd))

    def forward(self, x: Tensor, product: Callable) -> Tensor:
        """Scores (N, E) float32 of x (N, C). In float32 whatever autocast says: rounded scores
        choose others, and training becomes unstable (Fedus et al. 2021, section 2.4)."""
        with torch.autocast(x.device.type, enabled=False):
            return product(x.float(), self.weight.float())


class ExpertWeights(nn.Module):
    """The matrices of E experts, each kind in one tensor; an expert is an MLP without biases."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        E = c.n_experts
        n = c.expert_hidden
        self.gated = c.mlp in GATED
        if self.gated:
            self.gate_proj = nn.Parameter(torch.empty(E, n, c.n_embd))
        self.up_proj = nn.Parameter(torch.empty(E, n, c.n_embd))
        self.down_proj = nn.Parameter(torch.empty(E, c.n_embd, n))

    def stacks(self) -> list[nn.Parameter]:
        """[gate, up, down], or [up, down]."""
        gate = [self.gate_proj] if self.gated else []
        return [*gate, self.up_proj, self.down_proj]

    def quantize_stacks(self, kind: str, int4_group: int) -> None:
        """Make them int8 or int4 (so many weights of a row share their levels), in place."""
        for name, stack in list(self.named_parameters()):
            delattr(self, name)
            setattr(self, name, QuantizedStack(stack, kind, int4_group))


def in_dtype(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """An expert's matrix (out, in), or a stack of them: quantized ones are made anew."""
    if isinstance(matrices, torch.Tensor):
        return matrices.to(dtype)
    return matrices(dtype)


class Experts(nn.Module):
    """E MLPs, of which each token is given to k, and adds up what they say of it (Shazeer et al.
    2017); beside them n_shared_experts that see every token (Dai et al. 2024)."""

    def __init__(self, c: GPTConfig, ops: Operations) -> None:
        super().__init__()
        self.c = c
        self.ops = ops
        self.gate = Router(c)
        self.experts = ExpertWeights(c)
        if c.n_shared_experts:  # as one: their sum is an MLP of that width
            self.shared = MLP(c, ops, c.n_shared_experts * c.expert_hidden)
        if c.balance == "bias":
            self.register_buffer("expert_bias", torch.zeros(c.n_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y (B, T, C), routing (E + 3,) float32) of x (B, T, C). routing is what `figures` gives;
        zeros in eval mode, where nobody asks."""
        rows = x.flatten(0, -2)  # (N, C)
        scores = self.gate(rows, self.product())  # (N, E) float32
        probabilities = scores.softmax(-1)
        weights, chosen = self.choose(probabilities)  # (N, k) each
        y = self.mix(rows, weights, chosen).view(x.shape)
        if self.c.n_shared_experts:
            y = y + self.shared(x)
        if self.training:
            return y, figures(scores, probabilities, chosen)
        return y, scores.new_zeros(self.c.n_experts + 3)

    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """(weights (N, k) float32, experts (N, k) int64) of probabilities (N, E): the k likeliest.
        A bias only moves the choice, and no weight (Wang et al. 2024, section 3)."""
        k = self.c.n_experts_per_token
        if self.c.balance == "bias":
            chosen = (probabilities + self.expert_bias.float()).topk(k, -1).indices
            weights = probabilities.gather(-1, chosen)
        else:
            weights, chosen = probabilities.topk(k, -1)
        if self.c.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weighted sum (N, C) of what the chosen experts make of x (N, C)."""
        x = x.to(compute_dtype(x))
        stacks = self.experts.stacks()
        if self.ops.deterministic:  # of each expert's own tokens, in whatever number
            return one_by_one(x, weights, chosen, stacks, self.expert)
        if not self.ops.fast:
            return all_experts(x, weights, chosen, stacks, self.expert)
        if can_group(x, stacks) and not pays_to_pick(x, chosen, stacks):
            return grouped(x, weights, chosen, stacks, self.activate)
        if is_capturing(x):  # a CUDA graph cannot wait for the counts
            return all_experts(x, weights, chosen, stacks, self.expert)
        return one_by_one(x, weights, chosen, stacks, self.expert)

    def product(self) -> Callable:
        """x (N, in) times a matrix (out, in) transposed."""
        if self.ops.deterministic:
            return invariant.Product.apply
        return F.linear

    def expert(self, x: Tensor, *matrices: Tensor) -> Tensor:
        """What one expert makes of x (N, C): an MLP."""
        product = self.product()
        *inner, down = [in_dtype(matrix, x.dtype) for matrix in matrices]
        h = self.activate([product(x, matrix) for matrix in inner])  # (N, n)
        return product(h, down)

    def activate(self, inner: list[Tensor]) -> Tensor:
        """The hidden numbers (N, n) of [gate, up], or of [up]."""
        h = activation(self.c.mlp, inner[0], self.ops)
        return h * inner[1] if len(inner) == 2 else h


# --------------------------------------------------------------------------------------------------
# The formula, and the faster ways


def all_experts(
    x: Tensor, weights: Tensor, chosen: Tensor, stacks: list[nn.Parameter], expert: Callable
) -> Tensor:
    """The formula: the sum over all E of weight times expert(x), the weight of an expert that was
    not chosen being 0. x (N, C), weights and chosen (N, k)."""
    n_experts = stacks[0].shape[0]
    zeros = weights.new_zeros(x.shape[0], n_experts)  # len(x) would be a constant in torch.export
    all_weights = zeros.scatter(1, chosen, weights)  # (N, E)
    y = torch.zeros_like(x)
    for e, matrices in enumerate(zip(*[stack.unbind() for stack in stacks])):
        y = y + all_weights[:, e, None].to(x.dtype) * expert(x, *matrices)
    return y


class Gather(torch.autograd.Function):
    """x[index] of rows x (n, C). sources (n, m): the m places of the result that a row went to, by
    which its gradient is gathered too: the sums are in one order, and no two write to one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(sources)
        return rows_of(x, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        [sources] = ctx.saved_tensors
        parts = rows_of(dy.flatten(0, -2), sources)  # (n, m, C)
        dx = parts[:, 0] if sources.shape[1] == 1 else parts.sum(1)
        return dx, None, None


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x[index] of rows x (n, C): (…, C), twice as fast on a CPU."""
    return x.index_select(0, index.flatten()).view(*index.shape, x.shape[-1])


def by_expert(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x (M, C), each token k times, in the order of the experts; that order (M,): which of the
    choices (N k) stands there; for each choice (N, k) its place in it)."""
    N, k = chosen.shape
    order = chosen.flatten().argsort(stable=True)  # (M,)
    numbers = torch.arange(N * k, device=x.device)
    places = torch.empty_like(order).scatter_(0, order, numbers).view(N, k)
    return Gather.apply(x, order // k, places), order, places


def weighted_sum(y: Tensor, weights: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """y (M, C) in the order of the experts, back at its tokens: (N, C)."""
    parts = Gather.apply(y, places, order[:, None])  # (N, k, C)
    return (parts * weights[..., None].to(y.dtype)).sum(1)


def load(chosen: Tensor, n_experts: int) -> Tensor:
    """How many tokens chose each expert (E,) int64."""
    numbers = torch.arange(n_experts, device=chosen.device)
    return (chosen.reshape(-1, 1) == numbers).sum(0)


def grouped(
    x: Tensor, weights: Tensor, chosen: Tensor, stacks: list[Tensor], activate: Callable
) -> Tensor:
    """`all_experts` as products of rows that lie in groups, an expert's matrix a group."""
    rows, order, places = by_expert(x, chosen)
    ends = load(chosen, stacks[0].shape[0]).cumsum(0).int()  # (E,)
    *inner, down = [in_dtype(stack, x.dtype) for stack in stacks]
    h = activate([F.grouped_mm(rows, stack.mT, offs=ends) for stack in inner])  # (M, n)
    y = F.grouped_mm(h, down.mT, offs=ends)  # (M, C)
    return weighted_sum(y, weights, order, places)


@torch.compiler.disable  # its shapes are known when the counts are
def one_by_one(
    x: Tensor, weights: Tensor, chosen: Tensor, stacks: list[Tensor], expert: Callable
) -> Tensor:
    """`all_experts`, each expert on its own tokens, and only of those that were chosen. The host
    waits for the counts."""
    rows, order, places = by_expert(x, chosen)
    sizes = load(chosen, stacks[0].shape[0]).tolist()
    outputs = []
    separate = [stack.unbind() for stack in stacks]
    for size, part, *matrices in zip(sizes, rows.split(sizes), *separate):
        if size:
            outputs.append(expert(part, *matrices))
    return weighted_sum(torch.cat(outputs), weights, order, places)


# --------------------------------------------------------------------------------------------------
# Whether grouped products run here

GROUPED = {}  # {(device, dtype): whether they were right there, without a wait}


def can_group(x: Tensor, stacks: list[nn.Parameter]) -> bool:
    """Whether `grouped` computes this, and not slower. A kernel wants rows that begin at multiples
    of 16 bytes; the compiler knows bfloat16 alone."""
    compiling = torch.compiler.is_compiling()
    if compiling and x.dtype != torch.bfloat16:
        return False
    if x.device.type == "cpu" and torch.is_grad_enabled() and not compiling:
        return False  # there nobody waits for the counts, and its backward takes longer
    for size in stacks[0].shape[1:]:
        if size * x.element_size() % 16:
            return False
    key = (x.device, x.dtype)
    if key not in GROUPED and not compiling and not is_capturing(x):
        GROUPED[key] = try_grouped(x.device, x.dtype)
    return GROUPED.get(key, False)


def pays_to_pick(x: Tensor, chosen: Tensor, stacks: list[nn.Parameter]) -> bool:
    """Whether few tokens leave most experts alone, which `grouped` would all convert to x's
    dtype. On a GPU to wait costs more."""
    if isinstance(stacks[0], torch.Tensor) and stacks[0].dtype == x.dtype:
        return False
    return x.device.type == "cpu" and chosen.numel() < stacks[0].shape[0]


def is_capturing(x: Tensor) -> bool:
    """Whether what is computed goes into a CUDA graph."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def try_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether F.grouped_mm gives what `one_by_one` does, gradients too, on a small problem with an
    expert that nobody chose, and on a GPU without a wait for it. Where not, a line says why."""
    words = ""
    on_gpu = device.type == "cuda"
    mode = torch.cuda.get_sync_debug_mode() if on_gpu else 0
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device.type, enabled=False):
                inputs = small_problem(device, dtype)
                expected = small_step(one_by_one, inputs)
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("error")
                results = small_step(grouped, inputs)
        if on_gpu:
            torch.cuda.set_sync_debug_mode(mode)
        for result, right in zip(results, expected):
            if not (result - right).abs().max() <= 0.05 * right.abs().max():  # nor is a NaN
                words = "it computes wrongly"
    except (AttributeError, RuntimeError, NotImplementedError) as error:  # a torch without it
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode(mode)
    if words:
        print(f"experts: one after the other, since grouped_mm in {dtype} does not run: {words}")
    return not words


def small_problem(
    device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(x, weights, chosen, [up, down]) of 4 experts, the third of which nobody chose."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        drawn = torch.randn(shape, generator=generator)
        return drawn.to(device, dtype).requires_grad_(True)

    x = numbers(24, 32)
    weights = torch.full((24, 2), 0.5, device=device)
    chosen = torch.tensor([[0, 1], [3, 0], [1, 3]] * 8, device=device)
    poison = torch.full((4, 48, 32), torch.nan, device=device, dtype=dtype)
    del poison  # so that memory that a kernel leaves as it was is not 0 by chance
    return x, weights, chosen, [numbers(4, 48, 32), numbers(4, 32, 48)]


def small_step(way: Callable, inputs: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> list[Tensor]:
    """[y, the gradients of x and of the stacks] of a way to compute experts."""
    x, weights, chosen, stacks = inputs

    def activate(inner):
        return inner[0].relu()

    def expert(x, up, down):
        return F.linear(F.linear(x, up).relu(), down)

    y = way(x, weights, chosen, stacks, activate if way is grouped else expert)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *stacks])]


# --------------------------------------------------------------------------------------------------
# What keeps the load even, and what the log says of it


def figures(scores: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
    """A vector (E + 3,) float32 about tokens with scores (N, E):

    E numbers: how many tokens chose each expert
    the balance loss E sum_e f_e P_e: f_e the choices of e by token, P_e its mean probability, and
      k where all are equal (Fedus et al. 2021, equations 4 to 6; as Mixtral's in transformers)
    the z loss: the mean square of log sum_e exp(score) (Zoph et al. 2022, equation 5)
    the mean entropy of the router, in nats"""
    N, n_experts = scores.shape
    counts = load(chosen, n_experts).float()
    balance = n_experts * (counts / N * probabilities.mean(0)).sum()
    log_sums = scores.logsumexp(-1)  # (N,)
    entropy = (log_sums - (probabilities * scores).sum(-1)).mean().detach()
    return torch.cat([counts, torch.stack([balance, log_sums.square().mean(), entropy])])


def expert_layers(net: GPT) -> list[Experts]:
    """The Experts of a network, in order."""
    return [module for module in net.modules() if isinstance(module, Experts)]


@torch.no_grad()
def update_bias(net: GPT, counts: Tensor, rate: float = 1e-3) -> None:
    """After an optimizer step: less for experts that got more than the mean, more for the others
    (Wang et al. 2024, algorithm 1). counts (layers with experts, E): the tokens of the step."""
    for experts, of_layer in zip(expert_layers(net), counts):
        experts.expert_bias += rate * (of_layer.mean() - of_layer).sign()


class RoutingLog:
    """How a step's tokens were routed, in a trainer's log; of a network without experts nothing.
    Nothing in it waits for the device."""

    # Of the experts of a layer the largest load over the mean one, in the worst layer; of
    # `figures` the means over layers.
    names = ("load_max", "balance_loss", "z_loss", "router_entropy")

    def __init__(self, net: GPT, world: int = 1, pipeline: Pipeline | None = None) -> None:
        self.net = net
        self.world = world
        self.n_stages = 1
        self.own = slice(None)  # which layers with experts are of this process's stage
        if pipeline is not None:
            self.n_stages = pipeline.n_stages
            self.own = pipeline.stage.expert_blocks
        self.total = None  # (layers with experts, E + 3), of the step so far
        self.n = 0  # micro-batches in it

    def add(self) -> None:
        """Count the micro-batch that the network has just computed."""
        if self.net.routing is None:
            return
        routing = widen(self.net.routing.detach())
        self.total = routing if self.total is None else self.total + routing
        self.n += 1

    def end_step(self) -> list[Tensor]:
        """The figures of the step, 0-dim tensors in the order of `names`. All processes call it:
        each has a part of all processes' figure, so that they add up to it."""
        if self.total is None:
            return []
        # Each layer's figures are of one stage; the others add zeros.
        total = self.total / (self.n * self.world / self.n_stages)
        self.total = None
        self.n = 0
        if self.world > 1:
            dist.all_reduce(total)
        self.load = total[:, :-3]  # (layers with experts, E)
        largest = self.load.amax(1) / self.load.mean(1)  # (layers with experts,)
        figures = [largest.max(), *total[:, -3:].mean(0)]
        return [figure / self.world for figure in figures]

    def row(self, figures: list[float]) -> dict[str, float]:
        """What the log has of a step with these figures, numbers."""
        if not figures:
            return {}
        return dict(zip(self.names, figures)) | {"dropped": 0}  # whatever the load

    def update_bias(self) -> None:
        """`update_bias` by the step that has ended."""
        if self.net.routing is not None and self.net.config.balance == "bias":
            update_bias(self.net, self.load[self.own])


def make_experts(c: GPTConfig, ops: Operations) -> Experts:
    """What a block with experts has in the place of its MLP."""
    return Experts(c, ops)
