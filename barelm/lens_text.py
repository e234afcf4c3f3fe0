"""What sample.py --lens prints: what each layer would say after a prompt, what adds most to the
logit of its answer, and where it parts from another prompt. Computed by barelm/lens.py and
barelm/patching.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from barelm import lens
from barelm.answers import token_name
from barelm.patching import Patching
from barelm.run import UserError

if TYPE_CHECKING:
    from barelm.lens import Share
    from barelm.tokenizer import Tokenizer
    from model import GPT

N_SHARES = 12  # the largest that are shown
N_COLUMNS = 12  # tokens side by side in a table of patches


def print_lens(net: GPT, tok: Tokenizer, text: str, against: str | None = None) -> None:
    """Print all of it for a text; against: a text of as many tokens to patch it into."""
    lens.check_lens(net)
    ids, source, position = reading_of(net, tok, text)
    print_layers(net, tok, ids, source, position)
    if net.config.mlm_head:
        print("\nno shares: an encoder's head is not linear")
    else:
        print_shares(net, tok, ids, source, position)
    if against is not None:
        print_patches(net, tok, text, against)


def reading_of(net: GPT, tok: Tokenizer, text: str) -> tuple[list[int], list[int] | None, int]:
    """(ids, source or None, the position that is looked at) of a text: an encoder's first mask, or
    the last token; of an encoder-decoder the text is the source."""
    if net.config.is_seq2seq:
        if net.start_id is None:
            raise UserError("an encoder-decoder without a start token: config.json has none")
        ids, source, place = [net.start_id], tok.source(text), 0
    elif net.config.causal:
        ids, source, place = tok.prompt(text), None, None
    else:
        (ids, place), source = lens.encoder_ids(tok, text), None
    n = len(ids if source is None else source)
    if not 0 < n <= net.config.n_ctx:
        raise UserError(
            f"a prompt of {n} tokens: --lens reads 1 to {net.config.n_ctx}, the context"
        )
    return ids, source, len(ids) - 1 if place is None else place


def print_layers(
    net: GPT, tok: Tokenizer, ids: list[int], source: list[int] | None, position: int
) -> None:
    """A line for each layer: the three likeliest tokens, and how likely the model's answer is."""
    rows = [x[position, None] for x in lens.states(lens.run(net, ids, source))]  # (1, C) each
    [answer] = lens.logit_lens(net, rows[-1], tok.n_vocab, 1).tokens[0]
    name = shown(tok, answer)
    print(f"what each layer would say after {shown(tok, ids[position])}, and the rank of {name}")
    for i, x in enumerate(rows):
        guesses = lens.logit_lens(net, x, tok.n_vocab, 3, [answer])
        layer = f"layer {i - 1}" if i else "embedding"
        best = []
        for token, p in zip(guesses.tokens[0], guesses.probabilities[0]):
            best.append(f"{shown(tok, token)} {p:.3f}")
        print(f"{layer:10} {guesses.ranks[0] + 1:6}  {'  '.join(best)}")


def print_shares(
    net: GPT, tok: Tokenizer, ids: list[int], source: list[int] | None, position: int
) -> None:
    """The largest shares of the answer's logit."""
    trace = lens.run(net, ids, source)
    x = lens.states(trace)[-1][position, None]
    [answer] = lens.logit_lens(net, x, tok.n_vocab, 1).tokens[0]
    result = lens.attribute(net, trace, position, answer)
    largest = sorted(result.shares, key=lambda share: -abs(share.value))[:N_SHARES]
    rest = result.logit - sum(share.value for share in largest)
    print(f"\nthe logit of {shown(tok, answer)} is {result.logit:.3f}; the largest shares in it")
    for share in largest:
        print(f"{share.value:9.3f}  {part_name(share)}")
    print(f"{rest:9.3f}  all others")


def part_name(share: Share) -> str:
    name = share.kind.replace("_", " ")
    if share.head is not None:
        name += f" {share.head}"
    return name if share.layer is None else f"layer {share.layer}, {name}"


def print_patches(net: GPT, tok: Tokenizer, clean: str, corrupted: str) -> None:
    """A line for each layer: how much of the difference between the two answers comes back, in
    percent, with the residual stream of one position from the clean text."""
    pair = []
    for text in (clean, corrupted):
        ids, source, position = reading_of(net, tok, text)
        pair.append(ids if source is None else source)
    start = ids if net.config.is_seq2seq else None
    patching = Patching(net, pair[0], pair[1], position, start)
    answers = patching.likeliest(tok.n_vocab)
    patching.compare(*answers)
    answer, other = [shown(tok, id) for id in answers]
    here, there = patching.clean_difference, patching.corrupted_difference
    print(
        f"\nthe logit of {answer} less that of {other}: {here:.3f} after this prompt, {there:.3f}"
    )
    print("after the other. With one state of this prompt in the pass over the other, so many")
    print("percent of the difference come back:")
    columns = range(max(0, len(pair[0]) - N_COLUMNS), len(pair[0]))
    print(f"{'':10} " + " ".join(f"{shown(tok, pair[0][i])[:9]:>9}" for i in columns))
    for i in range(len(patching.corrupted.blocks) + 1):
        shares = patching.restored("residual", i)
        layer = f"layer {i - 1}" if i else "embedding"
        print(f"{layer:10} " + " ".join(f"{round(100 * shares[j]):9}" for j in columns))


def shown(tok: Tokenizer, id: int) -> str:
    return repr(token_name(tok, id))
