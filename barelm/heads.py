"""Fine-tuning on hidden states beside whole texts' labels: tags of words, answers that stand in a
text, and vectors of texts. finetune.py's METHODS name what is here.

A loss is a function of the network and a group of examples that gives the sum of their losses, and
{figure: its sum}. Tags are read and counted in tagging.py, answers in extraction.py, vectors
compared in embeddings.py."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from barelm.devices import widen
from barelm.embeddings import (
    batches_of,
    candidates_of,
    contrast,
    copies,
    read_embed_pair,
    right_ranks,
    vectors_of,
)
from barelm.examples import (
    IGNORED,
    device_of,
    padded,
    padded_length,
    places_of_targets,
    share_of,
)
from barelm.extraction import LABELS, answer_scores, best_span, choose_answer
from barelm.run import UserError, step_seed, to_device
from barelm.tagging import (
    count_spans,
    guessed_tags,
    is_bio,
    span_scores,
    span_table,
    tag_labels,
    target_labels,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from barelm.tuning import Learner
    from model import GPT


def states_of(net: GPT, rows: list[list[int]]) -> Tensor:
    """The hidden states (B, T, C) of rows, lists of ids, padded as this network's batches are."""
    ids = padded([{"ids": row} for row in rows], "ids", net)  # (B, T)
    lengths = torch.tensor([len(row) for row in rows])
    return net.states(ids, to_device(lengths, ids.device))


def usual_pooler(net: GPT, task: str) -> str:
    """What stands before a new head's scores: BERT's classifiers of texts have a dense layer and
    tanh, ModernBERT's heads its masked model's dense layer and norm, decoders nothing."""
    c = net.config
    if c.causal:
        return ""
    if c.norm_place == "pre":
        return "gelu_norm"
    return "tanh" if task == "classify" else ""


def set_head(
    net: GPT, labels: list[str], task: str, pooling: str = "last", pad_id: int | None = None
) -> None:
    """Give the network a new head for this task; what a masked model has before its own scores, a
    head of the same form begins with."""
    pooler = usual_pooler(net, task)
    net.set_score(labels, pooling, pad_id, task=task, pooler=pooler)
    if pooler == "gelu_norm" and net.config.mlm_head:
        net.score_dense.load_state_dict(net.head_dense.state_dict(), strict=False)
        net.score_norm.load_state_dict(net.head_norm.state_dict(), strict=False)


# --------------------------------------------------------------------------------------------------
# Tags of words


def add_tag_head(net: GPT, tok: Tokenizer, train: list[dict], val: list, say: Callable) -> list:
    """Give the network scores of each token for the tags in training; examples get their targets.
    The validation examples: all, for a tag that training lacks is missed."""
    labels = tag_labels(train)
    if len(labels) < 2:
        raise UserError(f"every word is tagged {labels[0]}: expected two tags or more")
    unseen = {tag for e in val for tag in e["tags"]} - set(labels)
    if unseen:
        say(f"val: tags unseen in training, which count as missed: {sorted(unseen)}")
    set_head(net, labels, "tag", pad_id=tok.pad_id)
    for e in [*train, *val]:
        e["targets"] = target_labels(e, labels, IGNORED)
    return val


def tag_loss(net: GPT, examples: list[dict]) -> tuple[Tensor, dict]:
    """Cross-entropy of the first token of each word. In validation also what `count_spans` counts
    of the guesses."""
    h = states_of(net, [e["ids"] for e in examples])  # (B, T, C)
    places, targets = places_of_targets(examples, net)  # (N,) each
    scores = net.score_states(h.flatten(0, 1).index_select(0, places))  # (N, labels)
    loss = F.cross_entropy(scores, targets, reduction="sum")
    if net.training:
        return loss, {}
    counts = Counter()
    guesses = iter(scores.argmax(1).tolist())
    for e in examples:
        labels = {}  # of the tokens that have a target
        for place, target in enumerate(e["targets"]):
            if target != IGNORED:
                labels[place] = net.labels[next(guesses)]
        tags = guessed_tags(e["firsts"], labels)
        count_spans(counts, e["tags"], tags, of_spans=is_bio(net.labels))
    return loss, counts


def tag_figures(counts: Counter, size: int) -> dict[str, float]:
    """Micro F1 of the spans, where there are any, and the accuracy of the tags."""
    figures = {"accuracy": counts.get("right", 0) / max(1, counts.get("words", 0))}
    if any(isinstance(key, tuple) for key in counts):
        figures["f1"] = span_scores(counts)[2]
    return figures


def tag_table(counts: Counter, labels: list[str]) -> str:
    return span_table(counts)


@torch.no_grad()
def tag_tokens(net: GPT, rows: list[list[int]]) -> list[list[tuple[str, float]]]:
    """For each row, a list of ids, the label of each token, and its probability: [(label, p)]."""
    h = states_of(net, rows)  # (B, T, C)
    best = net.score_states(h).softmax(-1).max(-1)
    answers = []
    for row, shares, numbers in zip(rows, best.values.tolist(), best.indices.tolist()):
        labels = [net.labels[number] for number in numbers]
        answers.append(list(zip(labels, shares))[: len(row)])
    return answers


# --------------------------------------------------------------------------------------------------
# Answers that stand in a text


def add_span_head(net: GPT, tok: Tokenizer, train: list[dict], val: list, say: Callable) -> list:
    """Give the network two scores of each token: as an answer's start, and as its end."""
    set_head(net, list(LABELS), "span", pad_id=tok.pad_id)
    may_lack = any(not e["answers"] for e in train)
    for e in val:
        e["may_lack"] = may_lack
    return val


def span_loss(net: GPT, examples: list[dict]) -> tuple[Tensor, dict]:
    """The mean of two cross-entropies over the tokens of a row: of the right start, and of the
    right end. In validation also SQuAD's exact match and F1 of the likeliest answers, for which
    all windows are read."""
    scores = token_scores(net, [e["ids"] for e in examples])  # (B, T, 2)
    targets = torch.tensor([e["span"] for e in examples])  # (B, 2)
    targets = to_device(targets, scores.device)
    loss = F.cross_entropy(scores, targets, reduction="sum") / 2
    if net.training:
        return loss, {}
    sums = Counter(exact_match=0.0, f1=0.0)
    for e in examples:
        guess, _ = find_answer(net, e["context"], e["windows"], e["may_lack"])
        exact, f1 = answer_scores(guess, e["answers"])
        sums.update(exact_match=exact, f1=f1)
    return loss, sums


def token_scores(net: GPT, rows: list[list[int]]) -> Tensor:
    """(B, T, labels) float32 of rows, lists of ids; -inf behind a row's end."""
    scores = net.score_states(states_of(net, rows))
    lengths = to_device(torch.tensor([len(row) for row in rows]), scores.device)
    padding = torch.arange(scores.shape[1], device=scores.device) >= lengths[:, None]  # (B, T)
    return scores.masked_fill(padding[..., None], -torch.inf)


@torch.no_grad()
def read_windows(net: GPT, windows: list) -> list:
    """`best_span` of each window, all read in one pass."""
    scores = token_scores(net, [window.ids for window in windows]).cpu()  # (B, T, 2)
    return [best_span(window, of_window) for window, of_window in zip(windows, scores)]


def find_answer(net: GPT, context: str, windows: list, may_lack: bool = False) -> tuple[str, float]:
    """(the likeliest answer in a context, its score), by windows that are read one by one."""
    spans = []
    for window in windows:
        spans += read_windows(net, [window])
    return choose_answer(context, windows, spans, may_lack)


# --------------------------------------------------------------------------------------------------
# Vectors of texts


def read_texts(row: dict[str, str], tok: Tokenizer, limit: int) -> dict:
    """An example of texts: an anchor, what belongs to it, and perhaps what does not."""
    texts = read_embed_pair(row)
    rows = [tok.whole_text(text, limit) for text in texts]
    if not all(ids for ids, _ in rows):
        raise UserError("a text without a token")
    return {"texts": [ids for ids, _ in rows], "cut": any(cut for _, cut in rows)}


def add_embed_pooling(
    pooling: str, net: GPT, tok: Tokenizer, train: list[dict], val: list, say: Callable
) -> list:
    """Let the network's state of this place stand for a text."""
    alike = sum(e["texts"][0] == e["texts"][1] for e in train)
    if alike and not net.config.dropout:
        why = "only dropout makes a pair of a text alone (SimCSE): set --dropout=0.1"
        raise UserError(f"{alike:,} of {len(train):,} examples are a text and itself: {why}")
    net.score = net.score_dense = net.score_norm = net.labels = None  # of what it was before
    net.pooler = ""
    net.pooling = pooling
    net.task = "embed"
    return val


def rows_of(examples: list[dict]) -> list[list[int]]:
    """All texts of examples, lists of ids: the anchors, then the candidates."""
    return [e["texts"][0] for e in examples] + candidates_of(examples)


def text_places(examples: list[dict]) -> list:
    """Of each example, where its texts stand among `rows_of` all of them."""
    n = len(examples)
    n_rows = 2 * n
    places = []
    for i, e in enumerate(examples):
        own = [i, n + i]
        if len(e["texts"]) > 2:
            own.append(n_rows)
            n_rows += 1
        places.append(own)
    return places


def numbers_of(places: list) -> Tensor:
    """Where `rows_of` some examples stand among all texts; places: of each example its texts'."""
    numbers = [own[0] for own in places] + [own[1] for own in places]
    return torch.tensor(numbers + [own[2] for own in places if len(own) > 2])


def texts_to_vectors(net: GPT, rows: list[list[int]]) -> Tensor:
    """Unit vectors (B, C) of lists of ids, by the network's own pooling."""
    return vectors_of(net, rows, net.pooling, padded_length(net, max(map(len, rows))))


def losses_of(vectors: Tensor, examples: list[dict], temperature: float) -> Tensor:
    """(N,) the losses of examples, whose candidates are each other's, by the vectors of `rows_of`
    them."""
    n = len(examples)
    same = to_device(copies(candidates_of(examples), n), vectors.device)
    return contrast(vectors[:n], vectors[n:], same, temperature)


def embed_loss(temperature: float, net: GPT, examples: list[dict]) -> tuple[Tensor, dict]:
    """The sum of `contrast` over examples that are a whole batch; or over a group of them, by the
    gradients that `with_gradients` has found."""
    if "gradients" in examples[0]:
        return loss_of_gradients(net, examples), {}
    vectors = texts_to_vectors(net, rows_of(examples))
    return losses_of(vectors, examples, temperature).sum(), {}


def with_gradients(temperature: float, learner: Learner, examples: list[dict],
                   make_groups: Callable, cast: AbstractContextManager,
                   seed: int) -> list:  # fmt: skip
    """This process's examples of a step in groups, which know the loss's gradient by their vectors.
    So the candidates of an anchor are those of the whole batch, on any number of processes, however
    few examples fit the memory at once (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch
    Size under Memory Limited Setup"). A batch that one pass holds is left as it is.

    examples: of all processes; make_groups(examples) -> groups of them; seed: of the step. Each
    text is read twice, with the same dropout: for its vector, then for the gradient."""
    run = learner.run
    net = learner.net
    places = text_places(examples)
    numbered = [e | {"places": own} for e, own in zip(examples, places)]
    groups = list(make_groups(share_of(numbered, run)))
    if run.world == 1 and len(groups) == 1:
        return groups
    vectors = torch.zeros(sum(map(len, places)), net.config.n_embd, device=device_of(net))
    numbers = []  # of each group, where its texts stand among the step's
    for number, group in enumerate(groups):
        group[0]["seed"] = step_seed(seed, number, run.rank)
        torch.manual_seed(group[0]["seed"])
        with torch.no_grad(), cast:
            group_vectors = texts_to_vectors(net, rows_of(group))
        own = numbers_of([e["places"] for e in group])
        numbers.append(to_device(own, vectors.device))
        vectors[numbers[-1]] = group_vectors
    if run.world > 1:
        dist.all_reduce(vectors)  # each process has filled rows of its own
    vectors.requires_grad_()
    losses = losses_of(vectors, examples, temperature)
    [gradients] = torch.autograd.grad(losses.sum(), vectors)
    losses = losses.detach()
    for group, own in zip(groups, numbers):
        group[0]["gradients"] = gradients[own]
        group[0]["loss"] = losses[own[: len(group)]].sum()  # the anchors stand first
    return groups


def loss_of_gradients(net: GPT, examples: list[dict]) -> Tensor:
    """The sum of the losses of a group that `with_gradients` made; its gradient is that of the
    whole batch's loss by these texts."""
    torch.manual_seed(examples[0]["seed"])
    vectors = texts_to_vectors(net, rows_of(examples))
    product = (vectors * examples[0]["gradients"]).sum()
    return examples[0]["loss"] + product - product.detach()


@torch.no_grad()
def validate_vectors(temperature: float, batch_size: int, micro_tokens: int, learner: Learner,
                     examples: list[dict],
                     cast: AbstractContextManager) -> tuple[dict, dict]:  # fmt: skip
    """({figure: value}, {}) of validation examples: the loss of batches like those of training, and
    how often an anchor's own is the nearest of all (accuracy), and the mean of 1 / its rank."""
    run = learner.run
    net = learner.net
    rows = rows_of(examples)
    vectors = torch.zeros(len(rows), net.config.n_embd, device=device_of(net))
    net.eval()
    for batch in list(batches_of(rows, micro_tokens))[run.rank :: run.world]:
        with cast:
            own = texts_to_vectors(net, [rows[i] for i in batch])
        vectors[to_device(torch.tensor(batch), vectors.device)] = own
    net.train()
    if run.world > 1:
        dist.all_reduce(vectors)
    places = text_places(examples)
    total = 0.0
    for begin in range(0, len(examples), batch_size):
        end = begin + batch_size
        numbers = to_device(numbers_of(places[begin:end]), vectors.device)
        total += losses_of(vectors[numbers], examples[begin:end], temperature).sum().item()
    figures = {"val_loss": total / len(examples)}
    if any(e["texts"][0] != e["texts"][1] for e in examples):
        ranks = ranks_of_candidates(vectors, examples)
        figures["val_accuracy"] = float(widen(ranks == 1).mean())
        figures["val_mrr"] = float((1 / widen(ranks)).mean())
    return figures, {}


def ranks_of_candidates(vectors: Tensor, examples: list[dict]) -> Tensor:
    """(N,) the ranks of the examples' positives among all different candidates."""
    n = len(examples)
    first = {}  # {ids of a candidate: its place among the vectors}
    for place, ids in enumerate(candidates_of(examples), n):
        first.setdefault(tuple(ids), place)
    documents = torch.tensor([*first.values()], device=vectors.device)
    order = {ids: number for number, ids in enumerate(first)}
    right = [order[tuple(e["texts"][1])] for e in examples]
    right = torch.tensor(right, device=vectors.device)
    return right_ranks(vectors[:n], vectors[documents], right)
