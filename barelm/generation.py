"""A whole generation by a Decoder: what model.generate calls for a fast network."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from barelm.decode import Decoder
from barelm.run import UserError, compute_dtype
from barelm.sampling import GREEDY, draws, power_of_two

if TYPE_CHECKING:
    from barelm.chosen import Chosen
    from barelm.texts import Row
    from barelm.tokenizer import Tokenizer
    from model import GPT


def check_generates(net: GPT, continues: bool = False) -> None:
    """Refuse a network that makes no text. continues: nor one whose text answers a source, and
    continues no prompt."""
    c = net.config
    if not c.causal:
        raise UserError(
            "this network is an encoder (causal=false): it fills in masks and reads texts, and "
            "generates none; a decoder or an encoder-decoder does"
        )
    if continues and c.is_seq2seq:
        raise UserError("expected a decoder, which continues prompts, not an encoder-decoder")
    if c.is_seq2seq and net.start_id is None:
        raise UserError("an encoder-decoder without a start token: config.json has none")


def decode_rows(net: GPT, tok: Tokenizer, prompts: list[list[int]], rows: list[Row], seed: int,
                penalty: float, filters: dict[str, float]) -> None:  # fmt: skip
    """Feed model.py's `rows` with what follows their prompts until all are done. On a GPU the host
    reads the tokens of step t - 1 while the device computes step t: neither waits for the other."""
    limit = max(row.limit for row in rows)
    longest = max(len(prompt) + row.limit for prompt, row in zip(prompts, rows))
    longest_source = 0
    if net.config.is_seq2seq:
        longest = 1 + limit  # the start token, and what comes
        longest_source = max(len(prompt) for prompt in prompts)
    decoder = decoder_for(net, tok, len(rows), longest, longest_source)
    options = filters | {"repetition_penalty": penalty}
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        uniform = draws(seed, row.number, limit) if options["temperature"] >= GREEDY else None
        decoder.set(i, prompt, row.limit, options=options, uniform=uniform, ends=row.ends)
    decoder.read(dict(enumerate(prompts)))
    under_way = []
    while decoder.ready or under_way:
        if decoder.ready:
            under_way.append(decoder.choose())
        if len(under_way) > int(decoder.on_gpu and bool(decoder.ready)):
            take(decoder, rows, under_way.pop(0))
        decoder.feed()


def take(decoder: Decoder, rows: list[Row], chosen: Chosen) -> None:
    """Give the rows their tokens; those that are done leave."""
    tokens = chosen.wait()
    for slot, token, logprob in zip(chosen.slots, tokens.tokens, tokens.logprobs):
        rows[slot].take(token, logprob)
        if rows[slot].done:
            decoder.clear(slot)


def a_little_more(n: int, step: int = 1) -> int:
    """n rounded up, by a quarter at most or to a whole `step`: so that a Decoder serves longer."""
    step = max(step, power_of_two(n) // 8)
    return -(-n // step) * step


DECODERS = weakref.WeakKeyDictionary()  # {network: (what it was made for, Decoder)}, on a GPU


def decoder_for(
    net: GPT, tok: Tokenizer, n_slots: int, max_len: int, max_source: int = 0
) -> Decoder:
    """A Decoder for a generation. On a GPU it and its graphs serve later ones too, if it is small,
    as long as the network's weights are in the same places, with what they are by then."""
    kept_for, decoder = DECODERS.pop(net, (None, None))
    if net.model.embed_tokens.weight.device.type != "cuda":
        return Decoder(net, tok, n_slots, max_len, max_source=max_source)
    tensors = [*net.parameters(), *net.buffers()]
    made_for = (net.fast, tok.n_vocab, compute_dtype(tensors[0]))
    made_for += tuple((t.data_ptr(), t.dtype, t.shape) for t in tensors)
    fits = kept_for == made_for and decoder.n_slots >= n_slots and decoder.max_len >= max_len
    if not fits:
        decoder = None  # its memory is free before another one is made
        max_len = min(a_little_more(max_len, 128), net.config.n_ctx)
        decoder = Decoder(net, tok, a_little_more(n_slots), max_len)  # and of the longest sources
        decoder.net = weakref.proxy(net)  # or neither would ever go
    decoder.refresh()
    for slot in range(decoder.n_slots):
        decoder.clear(slot)
    if may_stay(decoder):
        DECODERS[net] = (made_for, decoder)
    return decoder


def may_stay(decoder: Decoder) -> bool:
    """Whether it is small beside the GPU: what it takes is not there for training meanwhile."""
    size = decoder.nbytes + 3 * decoder.logits.nbytes  # with what penalties count
    return size <= torch.cuda.get_device_properties(decoder.device).total_memory // 8
