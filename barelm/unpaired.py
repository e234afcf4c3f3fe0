"""Answers that are liked or not, one by one, as KTO learns from: which of them stand in for the
divergence from the reference, and whether both kinds weigh about the same."""

from __future__ import annotations

from barelm.examples import IGNORED

MOST_BALANCE = 4 / 3  # of the desirable side's weight over the other's (Ethayarajh et al. 2024)


def prompt_length(example: dict) -> int:
    """How many tokens of an example stand before its answer."""
    return next(i for i, target in enumerate(example["targets"]) if target != IGNORED) + 1


def add_mismatched(examples: list[dict], limit: int) -> None:
    """Put into each example `mismatched`: its own prompt with the answer of an example that has
    another prompt, as inputs and targets of `limit` tokens at most. It is the nearest one before,
    so that the answers of a batch in this order are about those of its mismatched pairs (the paper
    shifts a batch's answers by one); for the first ones, which have none before, the first behind.
    Where all have one prompt the answer is a neighbour's."""
    prompts = []
    for example in examples:
        prompts.append(example["ids"][: prompt_length(example)])
    for number, partner in enumerate(partners(prompts)):
        other = examples[partner]
        begin = prompt_length(other)
        answer = [*other["ids"][begin:], other["targets"][-1]]  # the last input is asked for it
        if other["targets"][-1] == IGNORED:  # which a template puts behind an answer's end
            answer = other["ids"][begin:]
        targets = other["targets"][begin - 1 :][: len(answer)]
        prompt = prompts[number]
        ids = (prompt + answer)[:-1]
        targets = [IGNORED] * (len(prompt) - 1) + targets
        examples[number]["mismatched"] = {"ids": ids[:limit], "targets": targets[:limit]}


def partners(prompts: list) -> list[int]:
    """For each prompt the number of another one, the nearest before it that differs."""
    before = []
    for number, prompt in enumerate(prompts):
        if number and prompts[number - 1] != prompt:
            before.append(number - 1)
        elif number:
            before.append(before[-1])  # the same prompt: what differs from one differs from both
        else:
            before.append(None)
    first_other = next((n for n, partner in enumerate(before) if partner is not None), None)
    result = []
    for number, partner in enumerate(before):
        if partner is None:
            partner = first_other
        if partner is None:  # all are alike
            partner = (number - 1) % len(prompts)
        result.append(partner)
    return result


def balance_note(
    n_liked: int, n_disliked: int, desirable_weight: float, undesirable_weight: float
) -> str:
    """Why the weights of the two kinds may be wrong for so many answers of each, and what the paper
    would choose, or "": the desirable side is to weigh 1 to 4/3 times as much as the other."""
    counts = f"{n_liked:,} liked and {n_disliked:,} disliked answers"
    if not n_liked or not n_disliked:
        return f"note: {counts}: kto has nothing to tell them from"
    liked = desirable_weight * n_liked
    disliked = undesirable_weight * n_disliked
    if disliked and 0.99 <= liked / disliked <= 1.01 * MOST_BALANCE:
        return ""
    if liked < disliked:
        least = disliked / n_liked
        flag = "desirable_weight"
    else:
        least = liked / n_disliked / MOST_BALANCE
        flag = "undesirable_weight"
    span = f"{least:.3g} to {least * MOST_BALANCE:.3g}"
    return f"note: {counts}: --{flag}={span} would let both kinds weigh about the same"
