"""What a window of tokens asks of a network in pre-training: the next token, masked ones, spans.

    objective = Objective("mlm", vocabulary_of(tok), seed=0, mask_rate=0.3)
    batch = objective.batch(windows, numbers)  # the network's arguments, by their names

causal: each token is the target of those before it. mlm: some tokens are hidden, and are the
targets of all others (Devlin et al. 2019, 3.1). span: some spans are cut out of what an encoder
reads, and are what its decoder writes (Raffel et al. 2020, 3.1.4).

A window's masks depend on the seed and on the window's number alone: not on the micro-batch, the
process, or what was masked before, so that a resume is exact. Every window has the same number of
targets: the loss of a step is divided by a number that all processes know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from barelm.optim import flops_per_token, sequence_flops
from barelm.run import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from barelm.tokenizer import Tokenizer
    from model import GPTConfig

OBJECTIVES = ("causal", "mlm", "span")
MASKED = 0.8  # of the tokens that are targets of mlm so many are hidden by the mask token,
REPLACED = 0.1  # so many by any token of text; the others are left as they are
SPAN_LENGTH = 3.0  # tokens of a span that is cut out, the mean
N_SENTINELS = 100  # of T5's tokenizers
VALIDATION_SEED = 2019  # a validation's masks are always the same, whatever the seed of a run
SHORTEST = 10  # tokens of a text that has room for a span
MASKS = 0x6D61736B  # tells the draws of masks from others that have the same seed


# --------------------------------------------------------------------------------------------------
# The tokens that an objective needs


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What is to be known of a tokenizer's tokens to hide some of them."""

    is_text: np.ndarray  # (n_vocab,) bool: no special token
    begins_word: np.ndarray  # (n_vocab,) bool: no part of the word that the token before it is of
    text_ids: np.ndarray  # (n,) int64: those that are text
    mask_id: int | None
    sentinel_ids: np.ndarray  # (n,) int64: what stands for the first span, the second, …
    start_id: int | None  # what a decoder's input begins with
    end_id: int | None  # the last token of what an encoder reads, and of what a decoder writes


def vocabulary_of(tok: Tokenizer, start_id: int | None = None) -> Vocabulary:
    """The Vocabulary of a tokenizer. start_id: None is padding's, as T5's decoders begin."""
    is_text = np.zeros(tok.n_vocab, bool)
    begins_word = np.ones(tok.n_vocab, bool)  # as special tokens do
    for id, token in tok.bytes.items():
        is_text[id] = True
        begins_word[id] = not continues_word(token)
    sentinel_ids = np.array(tok.sentinel_ids, np.int64)
    return Vocabulary(
        is_text,
        begins_word,
        np.flatnonzero(is_text),
        mask_id=tok.mask_id,
        sentinel_ids=sentinel_ids,
        start_id=tok.pad_id if start_id is None else start_id,
        end_id=tok.eot_id if tok.end_id is None else tok.end_id,
    )


def continues_word(token: bytes) -> bool:
    """Whether a token (bytes) is a part of the word that it stands behind: it begins with a letter,
    or within a character."""
    if token and token[0] >= 0x80:  # not ASCII: perhaps only some bytes of a character
        first = token.decode(errors="ignore")[:1]
        is_cut = not token.startswith(first.encode()) or not first
        return is_cut or first.isalpha()
    return token[:1].isalpha()


def with_mask_token(tok: Tokenizer) -> Tokenizer:
    """A tokenizer that has a mask token: this one, or a copy with [MASK] behind its last token. The
    mask takes the white space before it away, as RoBERTa's: " of" is one token, blank and all."""
    if tok.mask_id is not None:
        return tok
    return tok.with_added(["[MASK]"], {"mask_token": "[MASK]"}, lstrip=True)


def with_sentinels(tok: Tokenizer, n: int) -> Tokenizer:
    """A tokenizer that has n sentinels at least, and T5's number if it had none."""
    if len(tok.sentinel_ids) >= n:
        return tok
    return tok.with_added([f"<extra_id_{i}>" for i in range(max(n, N_SENTINELS))])


def with_tokens_of(objective: str, tok: Tokenizer, seq_len: int, mask_rate: float) -> Tokenizer:
    """The tokenizer with the tokens that a new network of this objective needs."""
    if objective == "mlm":
        return with_mask_token(tok)
    if objective == "span":
        return with_sentinels(tok, n_of_spans(n_noise_tokens(seq_len, mask_rate), seq_len))
    return tok


def n_noise_tokens(n_tokens: int, mask_rate: float) -> int:
    """How many of n_tokens, 2 at least, are cut out."""
    return min(max(round(n_tokens * mask_rate), 1), n_tokens - 1)


def n_of_spans(n_noise: int, n_tokens: int) -> int:
    """In how many spans: between any two of them a token is left."""
    return min(max(round(n_noise / SPAN_LENGTH), 1), n_tokens - n_noise)


# --------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Objective:
    """What pre-training asks of a network, and of which windows."""

    name: str = "causal"  # one of OBJECTIVES
    vocabulary: Vocabulary | None = None  # causal needs none
    seed: int = 0
    mask_rate: float = 0.15  # the part of a window's tokens that is hidden
    whole_words: bool = False  # mlm: all tokens of a word are hidden together, or none

    def check(self, seq_len: int) -> None:
        """Refuse a tokenizer that lacks a token, or windows too short for a span."""
        v = self.vocabulary
        if self.name == "mlm" and v.mask_id is None:
            raise UserError(
                "--objective=mlm: the tokenizer has no mask token (mask_token of its "
                "tokenizer_config.json): --init_from=scratch adds one"
            )
        if self.name != "span":
            return
        n_noise = n_noise_tokens(seq_len, self.mask_rate)
        n_spans = n_of_spans(n_noise, seq_len)
        if n_noise <= n_spans:
            raise UserError(f"seq_len={seq_len}: too short for --objective=span: raise it")
        if len(v.sentinel_ids) < n_spans:
            raise UserError(
                f"--objective=span: {n_spans} spans in windows of {seq_len} tokens, but the "
                f"tokenizer has {len(v.sentinel_ids)} sentinels (<extra_id_0>, <extra_id_1>, …): "
                f"lower seq_len, or --init_from=scratch adds them"
            )
        if v.start_id is None or v.end_id is None:
            raise UserError("--objective=span: the tokenizer has no pad_token, or no end token")

    def n_targets(self, n_tokens: int) -> int:
        """The targets of a window of so many tokens."""
        if self.name == "mlm":
            return max(1, round(n_tokens * self.mask_rate))
        if self.name == "span":
            n_noise = n_noise_tokens(n_tokens, self.mask_rate)
            return n_noise + n_of_spans(n_noise, n_tokens) + 1  # a sentinel before each, the end
        return n_tokens

    def flops_per_token(self, c: GPTConfig, n_tokens: int) -> float:
        """FLOPs of training on a token of windows of so many; of spans, on the source and target
        that are made of them."""
        if self.name != "span":
            return flops_per_token(c, n_tokens)
        n_noise = n_noise_tokens(n_tokens, self.mask_rate)
        n_kept = n_tokens - n_noise + n_of_spans(n_noise, n_tokens) + 1
        return sequence_flops(c, self.n_targets(n_tokens), n_kept) / n_tokens

    def batch(self, windows: np.ndarray, numbers: list[int] | range) -> dict[str, Tensor]:
        """The network's arguments, {name: (B, length) int64 tensor on the host}, of windows
        (B, T + 1) int64, -100 where there is no token, and the number of each window."""
        if self.name == "causal":
            return causal_batch(windows)
        # What follows a window is no part of it here.
        rows = [self.row(window[:-1], number) for window, number in zip(windows, numbers)]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def row(self, tokens: np.ndarray, number: int) -> dict[str, np.ndarray]:
        """The network's arguments, {name: (length,) int64}, of one window's tokens (T,)."""
        rng = np.random.default_rng([self.seed, number, MASKS])
        return self.mask(tokens, rng) if self.name == "mlm" else self.corrupt(tokens, rng)

    def mask(self, tokens: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """ids (T,), targets (n,) and their places (n,) of tokens (T,): where one was chosen, the
        ids have the mask token, any other token, or (one in ten) itself, so that the network has to
        have an opinion of every token."""
        v = self.vocabulary
        chosen = self.choose(tokens, rng)
        kind = rng.random(len(tokens))
        others = v.text_ids[rng.integers(len(v.text_ids), size=len(tokens))]
        ids = np.where(chosen & (kind < MASKED), v.mask_id, tokens)
        is_replaced = chosen & (kind >= MASKED) & (kind < MASKED + REPLACED)
        ids = np.where(is_replaced, others, ids)
        return {"ids": ids, "targets": tokens[chosen], "places": np.flatnonzero(chosen)}

    def choose(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which of tokens (T,) are targets of mlm: `n_targets` of them, bool (T,)."""
        v = self.vocabulary
        is_text = v.is_text[tokens]
        begins = np.ones(len(tokens), bool)
        if self.whole_words:
            # Behind a special token, and at the window's begin, any token begins a word.
            begins = v.begins_word[tokens] | np.append(True, ~is_text[:-1])
        first = np.flatnonzero(begins)  # of each word its first token
        order = rng.permutation(len(first))
        n = self.n_targets(len(tokens))
        # Special tokens are hidden only where a window has hardly anything else.
        is_word = is_text[first[order]]
        words = order[is_word]
        if is_text.sum() < n:
            words = np.append(words, order[~is_word])
        return choose_words(first, words, len(tokens), n)

    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """encoder_ids, ids and targets of tokens (T,): the encoder reads them with a sentinel in
        the place of each span that was cut out, and the decoder writes each sentinel and its
        span."""
        v = self.vocabulary
        is_noise = noise_mask(len(tokens), self.mask_rate, rng)
        source = with_sentinel_spans(tokens, is_noise, v.sentinel_ids)
        targets = with_sentinel_spans(tokens, ~is_noise, v.sentinel_ids)
        targets = np.append(targets, v.end_id)
        return {
            "encoder_ids": np.append(source, v.end_id),
            "ids": np.append(v.start_id, targets[:-1]),
            "targets": targets,
        }


def fills_gaps(c: GPTConfig) -> bool:
    """Whether the network of a GPTConfig tells what is hidden in a text, and not what follows."""
    return not c.causal or c.n_encoder_layer > 0


def check_kind(objective: str, c: GPTConfig) -> None:
    """Refuse an objective that has no meaning for the network of a GPTConfig."""
    has_encoder = c.n_encoder_layer > 0
    if objective == "mlm" and (c.causal or has_encoder):
        raise UserError("--objective=mlm needs an encoder, which sees both sides: --causal=false")
    if objective == "span" and not has_encoder:
        raise UserError("--objective=span needs an encoder beside a decoder: --n_encoder_layer=4")
    if objective == "causal" and has_encoder:
        why = "its encoder would read nothing"
        raise UserError(f"--objective=causal, but this is an encoder-decoder: {why}: take span")
    if objective == "causal" and not c.causal:
        why = "the tokens that it is to predict"
        raise UserError(f"--objective=causal, but an encoder (causal=false) sees {why}: take mlm")


def causal_batch(windows: np.ndarray) -> dict[str, Tensor]:
    """ids and targets (B, T) int64 of windows (B, T + 1): each token's target is the next."""
    windows = torch.from_numpy(windows)
    # Where there is no token, any will do: no target is there.
    return {"ids": windows[:, :-1].clamp(min=0), "targets": windows[:, 1:].contiguous()}


def choose_words(first: np.ndarray, order: np.ndarray, n_tokens: int, n: int) -> np.ndarray:
    """Which of n_tokens tokens are chosen, (n_tokens,) bool, n of them: the words in this order,
    each where it still fits. Where none of those left fits, the next one is cut. first: where each
    word begins, ascending."""
    chosen = np.zeros(n_tokens, bool)
    if len(first) == n_tokens:  # words of one token: all fit
        chosen[order[:n]] = True
        return chosen
    ends = np.append(first[1:], n_tokens)
    sizes = (ends - first)[order]
    left = n
    too_long = []
    for begin, size in zip(first[order].tolist(), sizes.tolist()):
        if size <= left:
            chosen[begin : begin + size] = True
            left -= size
        else:
            too_long.append(begin)
        if left == 0:
            return chosen
    chosen[too_long[0] : too_long[0] + left] = True
    return chosen


def noise_mask(n_tokens: int, mask_rate: float, rng: np.random.Generator) -> np.ndarray:
    """Which of n_tokens tokens are cut out, (n_tokens,) bool: spans of random lengths, of which the
    first does not begin the window and the last ends it (T5's random_spans_noise_mask)."""
    n_noise = n_noise_tokens(n_tokens, mask_rate)
    n_spans = n_of_spans(n_noise, n_tokens)
    noise = segments(n_noise, n_spans, rng)
    between = segments(n_tokens - n_noise, n_spans, rng)
    lengths = np.stack([between, noise], 1).ravel()  # kept, cut out, kept, cut out, …
    return np.repeat(np.arange(2 * n_spans) % 2 == 1, lengths)


def segments(n: int, n_segments: int, rng: np.random.Generator) -> np.ndarray:
    """n divided at random into n_segments lengths of 1 or more, every way as likely as another."""
    cuts = np.sort(rng.choice(n - 1, n_segments - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [n])))


def with_sentinel_spans(
    tokens: np.ndarray, is_cut: np.ndarray, sentinel_ids: np.ndarray
) -> np.ndarray:
    """tokens (T,) without those that are cut, the k-th span of which becomes the k-th sentinel."""
    begins = is_cut & ~np.append(False, is_cut[:-1])
    with_sentinels = tokens.copy()
    with_sentinels[begins] = sentinel_ids[: begins.sum()]
    return with_sentinels[begins | ~is_cut]
