"""Are answers right here? The fixed-shape step, a server's batches and quantized weights, against
the plain loop and float64."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from barelm.alike import batch_invariance
from barelm.check_rows import (
    N_VOCAB,
    Finding,
    Worst,
    allowed_error,
    endless_tokenizer,
    error,
    exact_network,
    hidden_allowed,
    small_network,
)
from barelm.engine import Engine
from barelm.fast import generating
from barelm.int4 import GROUP as INT4_GROUP
from barelm.jobs import Job, Sampling
from barelm.quantized import QuantizedLinear
from model import generate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from barelm.check_rows import Place
    from barelm.grammar import Guide
    from barelm.texts import Generation
    from model import GPT

LENGTHS = (5, 1, 33, 12, 118, 2)  # of prompts, uneven; one passes 128 places of a cache
ANSWER = 24  # tokens of an answer
FILTERS = {  # how answers are drawn, beside greedily
    "temperature 0.8": dict(temperature=0.8),
    "top_k, top_p, a penalty": dict(top_k=20, top_p=0.9, repetition_penalty=1.2),
    "min_p": dict(temperature=1.3, min_p=0.05),
}


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


def speaking_network(place: Place, dtype: torch.dtype | None = None) -> GPT:
    """A network that answers, in weights of a dtype, or of the place's, as sample.py loads them."""
    net = small_network(place.device, seed=1, tie=False)
    return net.to(dtype or place.dtype).eval()


def answers(net: GPT, prompts: list[list[int]], **options: Any) -> list[Generation]:
    """The answers to prompts, in one batch: [Generation]."""
    options = dict(max_new_tokens=ANSWER) | options
    return generate(net, endless_tokenizer(), prompts, **options)


def answers_alone(
    net: GPT, prompts: list[list[int]], ask: Callable = answers, **options: Any
) -> list[Generation]:
    """The answers to prompts, each asked alone."""
    return [ask(net, [prompt], **options)[0] for prompt in prompts]


def plain_answers(
    net: GPT, prompts: list[list[int]], ask: Callable = answers_alone, **options: Any
) -> list[Generation]:
    """The answers to prompts by model.py's plain loop."""
    net.fast = False
    try:
        return ask(net, prompts, **options)
    finally:
        net.fast = True


def ids_of(generations: list[Generation]) -> list[list[int]]:
    return [g.ids for g in generations]


# --------------------------------------------------------------------------------------------------
# Equal ids, or a tie


def differing(ours: list[list[int]], right: list[list[int]]) -> list[tuple[int, int]]:
    """Where the rows of two lists of answers part: [(row, place)]."""
    places = []
    for row, (a, b) in enumerate(zip(ours, right)):
        for i in range(max(len(a), len(b))):
            if a[i : i + 1] != b[i : i + 1]:
                places.append((row, i))
                break
    return places


def logits_after(net: GPT, ids: list[int]) -> Tensor:
    """The logits (n_vocab,) of what follows ids, of the tokens that the tokenizer has."""
    table = net.model.embed_tokens.weight
    with torch.no_grad():
        return net(torch.tensor([ids], device=table.device))[0, -1, :N_VOCAB].cpu().double()


def same_greedy(
    name: str, net: GPT, prompts: list[list[int]], ours: list[list[int]], right: list[list[int]]
) -> Finding:
    """The Finding on greedy answers that are to be equal. Where a row parts from what is right, the
    two tokens have to be so near in float64 that rounding decides: nearer than four times the
    error of the plain network's logits there (each of two logits may be off, in either network)."""
    exact = exact_network(net)
    worst = None
    for row, i in differing(ours, right):
        if i >= min(len(ours[row]), len(right[row])):
            return Finding(name, 1.0, 0.0, f"row {row + 1}: {len(ours[row])} tokens, not {i}")
        before = prompts[row] + right[row][:i]
        truth = logits_after(exact, before)
        noise = (logits_after(net, before) - truth).abs().max().item()
        gap = (truth[right[row][i]] - truth[ours[row][i]]).abs().item()
        words = f"row {row + 1} parts at token {i + 1}: the two are {gap:.2g} apart in the logits"
        finding = Finding(name, gap, 4 * noise, f"{words}, a tie is {4 * noise:.2g}")
        if worst is None or gap - 4 * noise > worst.figure - worst.allowed:
            worst = finding
    n = sum(map(len, right))
    return worst or Finding(name, 0.0, 0.0, f"all {n} ids equal")


def same_drawn(name: str, ours: list[list[int]], right: list[list[int]]) -> Finding:
    """The Finding on drawn answers in float32: every id equal."""
    parted = differing(ours, right)
    words = f"all {sum(map(len, right))} ids equal"
    if parted:
        row, i = parted[0]
        words = f"{len(parted)} rows part; row {row + 1} at token {i + 1}"
    return Finding(name, float(len(parted)), 0.0, words)


# --------------------------------------------------------------------------------------------------
# The step of fixed shape


def check_decode(place: Place, ask: Callable = answers) -> Iterator[Finding]:
    """Answers by the fast step, together and each alone, against those of the plain loop, each
    alone: greedy ones in the place's dtype and in float32, drawn ones in float32. `ask(net,
    prompts, **options)` gives [Generation]."""
    prompts = random_prompts(LENGTHS)
    for dtype in dict.fromkeys((torch.float32, place.dtype)):
        net = speaking_network(place, dtype)
        name = str(dtype).removeprefix("torch.")
        right = ids_of(plain_answers(net, prompts, temperature=0))
        ours = ask(net, prompts, temperature=0)
        yield same_greedy(f"greedy, {name}, together", net, prompts, ids_of(ours), right)
        alone = ids_of(answers_alone(net, prompts, ask, temperature=0))
        yield same_greedy(f"greedy, {name}, alone", net, prompts, alone, right)
        yield same_logprobs(f"log-probabilities, {name}", net, prompts, ours)
    net = speaking_network(place, torch.float32)
    for name, options in FILTERS.items():
        ours = ids_of(ask(net, prompts, seed=3, **options))
        right = ids_of(plain_answers(net, prompts, answers, seed=3, **options))
        yield same_drawn(f"drawn, float32, {name}", ours, right)


def same_logprobs(
    name: str, net: GPT, prompts: list[list[int]], generations: list[Generation]
) -> Finding:
    """The Finding on the log-probabilities that were told with answers, against those that the
    network gives the same ids in float64, read at once."""
    exact = exact_network(net)
    worst = Worst()
    for row, (prompt, g) in enumerate(zip(prompts, generations)):
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + g.ids[:-1]]))[0, len(prompt) - 1 :, :N_VOCAB]
        truth = logits.log_softmax(-1).gather(1, torch.tensor(g.ids)[:, None])[:, 0]  # (n,)
        ours = torch.tensor(g.logprobs, dtype=torch.float64)
        worst.add(error(ours, truth), f"row {row + 1}")
    return worst.finding(name, hidden_allowed(net.lm_head.weight.dtype, net))


# --------------------------------------------------------------------------------------------------
# A server

CROWD = 64  # clients at once


def check_server(
    place: Place, serve: Callable | None = None, n_clients: int = CROWD
) -> Iterator[Finding]:
    """The engine's answers, alone and among many, greedy and drawn, against the plain loop's."""
    serve = serve or engine_answers
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 41, (n_clients,), generator=generator).tolist()
    prompts = random_prompts(lengths, seed=5)
    for dtype in dict.fromkeys((torch.float32, place.dtype)):
        net = speaking_network(place, dtype)
        name = str(dtype).removeprefix("torch.")
        greedy = [dict(temperature=0.0)] * n_clients
        right = ids_of(plain_answers(net, prompts, max_new_tokens=SERVED, temperature=0))
        few = slice(0, 8)
        alone = serve(net, prompts[few], greedy[few], at_once=False)
        yield same_greedy(f"greedy, {name}, alone", net, prompts[few], alone, right[few])
        crowd = serve(net, prompts, greedy, at_once=True)
        yield same_greedy(f"greedy, {name}, among {n_clients}", net, prompts, crowd, right)
    net = speaking_network(place, torch.float32)
    drawn: list[dict] = [dict(temperature=0.9, top_p=0.9, seed=seed) for seed in range(n_clients)]
    right = []
    for prompt, options in zip(prompts, drawn):
        right += ids_of(plain_answers(net, [prompt], max_new_tokens=SERVED, **options))
    crowd = serve(net, prompts, drawn, at_once=True)
    yield same_drawn(f"drawn, float32, among {n_clients}", crowd, right)


SERVED = 10  # tokens of an answer
LONGEST_WAIT = 60.0  # seconds for the engine's answers


def engine_answers(
    net: GPT,
    prompts: list[list[int]],
    options: list[dict],
    at_once: bool,
    guides: Sequence[Guide | None] = (),
) -> list[list[int]]:
    """The ids of an Engine's answers to prompts, all asked at once or one after the other. guides:
    of each, or none."""
    tok = endless_tokenizer()
    engine = Engine(net, tok, max_batch=CROWD, max_len=64, prefill_chunk=128)
    done = queue.Queue()

    def listener(update):
        if update.done:
            done.put(update.error)

    jobs = []
    for prompt, fields, guide in zip(prompts, options, guides or [None] * len(prompts)):
        jobs.append(Job(tok, prompt, SERVED, Sampling(**fields), listener, guide=guide))
    engine.start()
    try:
        for group in [jobs] if at_once else [[job] for job in jobs]:
            engine.submit(group)
            for _ in group:
                failure = done.get(timeout=LONGEST_WAIT)
                if failure:
                    raise RuntimeError(failure)
    finally:
        engine.stop()
    return [job.row.out.ids for job in jobs]


# --------------------------------------------------------------------------------------------------
# Quantized weights

LAYERS = [(128, 256), (72, 48), (100, 37), (200, 515)]  # (in, out): usual widths and odd ones
ROWS = (1, 8, 33)


def check_quantized(place: Place, make_layer: Callable | type[QuantizedLinear] = QuantizedLinear,
                    product: Callable | None = None) -> Iterator[Finding]:  # fmt: skip
    """int8 and int4: the codes against the weights that they stand for, in steps of the code; and
    products with x against those with the decoded weights in float64. make_layer(linear, kind);
    product(x, *layers)."""
    net = small_network(place.device)
    for kind in ("int8", "int4"):
        weights = Worst()
        products = Worst()
        with generating(net), torch.no_grad():
            if place.is_cuda:  # as a Decoder does: or only the plain product would be compared
                net.ops.packed = {}
            multiply = product or net.ops.project
            for n_in, n_out in LAYERS:
                linear = random_layer(n_in, n_out)
                bias = linear.bias.double()  # a copy: the layers share theirs, and take it along
                layer = make_layer(linear, kind).to(place.device)
                twin = make_layer(linear, kind).to(place.device)
                decoded = decoded_weight(layer, n_in, place.device)
                where = f"{n_out} x {n_in}"
                weights.add(code_error(linear.weight.double(), decoded, kind), where)
                for n in ROWS:
                    x = random_rows(n, n_in, place)
                    truth = x.cpu().double() @ decoded.T + bias
                    products.add(error(multiply(x, layer), truth), f"{n} rows times {where}")
                    joined = multiply(x, twin, layer)  # as q, k and v, side by side
                    truth = torch.cat((truth, truth), -1)
                    products.add(error(joined, truth), f"{n} rows times two of {where}")
        # Half a step is between two codes; the steps are rounded themselves, to bfloat16.
        yield weights.finding(f"{kind} codes, error in steps", 0.51 if kind == "int8" else 0.6)
        # Whatever the dtype, products may round x to bfloat16, or row by row to 63 steps on either
        # side of zero: an error of 2 % is then usual, and the worst of many four times that, of
        # which `error` counts half.
        yield products.finding(f"{kind} products", allowed_error(torch.bfloat16, 200))


def random_layer(n_in: int, n_out: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(n_in)
    linear = nn.Linear(n_in, n_out)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n_out, n_in, generator=generator) * n_in**-0.5)
        linear.bias.copy_(torch.randn(n_out, generator=generator))
    return linear


def random_rows(n: int, n_in: int, place: Place) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, n_in, generator=generator).to(place.dtype).to(place.device)


def decoded_weight(layer: QuantizedLinear, n_in: int, device: torch.device) -> Tensor:
    """The weights (out, in) float64 that a layer's codes stand for, by its plain forward pass."""
    rows = layer(torch.eye(n_in, device=device)) - layer(torch.zeros(1, n_in, device=device))
    return rows.T.cpu().double()


def code_error(weight: Tensor, decoded: Tensor, kind: str) -> float:
    """The largest error of a decoded weight (out, in) in steps of the code: a row has 255 from its
    least to its greatest possible number, a group of int4 in a row has 16."""
    n_out, n_in = weight.shape
    if kind == "int8":
        step = weight.abs().amax(1, keepdim=True) / 127
        return ((weight - decoded).abs() / step).max().item()
    worst = 0.0
    padded = nn.functional.pad(weight, (0, -n_in % INT4_GROUP))
    for begin in range(0, n_in, INT4_GROUP):
        group = padded[:, begin : begin + INT4_GROUP]
        step = (group.amax(1, keepdim=True) - group.amin(1, keepdim=True)) / 15
        differences = (weight - decoded)[:, begin : begin + INT4_GROUP].abs() / step
        worst = max(worst, differences.max().item())
    return worst


# --------------------------------------------------------------------------------------------------
# Batch invariance


def check_invariance(place: Place, count: Callable = batch_invariance) -> Iterator[Finding]:
    """With --deterministic, whether a sequence has the same bits alone, in the trainer's forward
    pass and read in pieces as it had among CROWD. count(device, dtype, n_rows=…) counts the answers
    that have not: {"answers": how many were looked at, "alone", "trainer", "chunks"}."""
    counts = count(place.device, place.dtype, n_rows=CROWD)
    n = counts.pop("answers")
    for where, differing in counts.items():
        words = f"answers of {n} with other bits than among {CROWD}"
        yield Finding(f"other bits, {where}", float(differing), 0.0, words)
