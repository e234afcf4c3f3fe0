"""Clients of a server, many at once: what each waits for its first token and between two.

A way to ask is a function of a prompt, a list of ids, that returns ([when it began, when each token
came, in seconds], how many tokens were made)."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from http.client import HTTPConnection, HTTPSConnection
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch

from barelm.timing import rounded

if TYPE_CHECKING:
    from collections.abc import Callable

    from barelm.timing import Bench

PROMPT = (32, 96)  # tokens that a client sends, at least and at most
ANSWER = 64  # tokens that it gets
LOAD = ["clients", "tokens_per_s", "ratio", "first_p50", "first_p95", "between_p50", "between_p95"]


def ask(url: str, prompt: Any) -> tuple[list[float], int]:
    """One client's request: ([when it began, when each event came, in seconds], tokens made). While
    the answer comes it is only counted: what a client computes, on the server's own machine, is
    missing to the server."""
    body = dict(prompt=prompt, max_tokens=ANSWER, ignore_eos=True, stream=True)
    body["stream_options"] = {"include_usage": True}
    key = f"Bearer {os.environ.get('BARELM_API_KEY')}"  # serve.py reads it too
    parts = urlsplit(url)
    if not parts.netloc:
        raise ValueError(f"No host in {url}")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    times = [time.perf_counter()]
    pieces = []
    with closing(kind(parts.netloc)) as connection:
        headers = {"Authorization": key, "Content-Type": "application/json"}
        connection.request("POST", parts.path, json.dumps(body), headers)
        answer = connection.getresponse()
        piece = answer.read1()
        while piece:
            pieces.append(piece)
            times += [time.perf_counter()] * piece.count(b'"text"')  # of an event, with some text
            piece = answer.read1()
    return times, tokens_made(b"".join(pieces))


def tokens_made(answer: bytes) -> int:
    """How many tokens a streamed answer has, by the usage in the end of it."""
    *_, last, done, _ = [b"", b"", *answer.split(b"\n\n")]
    if done != b"data: [DONE]":
        raise ValueError(answer.decode(errors="replace"))
    return json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]


def ask_alone(hf: Any, lock: Any, prompt: Any) -> tuple[list[float], int]:
    """The same of transformers' generate, which knows one request at a time; HTTP costs nothing."""
    times = [time.perf_counter()]
    ids = torch.tensor([prompt], device=hf.device)

    def put(_):
        times.append(time.perf_counter())

    with lock:
        hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            streamer=SimpleNamespace(put=put, end=lambda: None),
        )
    begun, _, *tokens_came = times  # the streamer is given the prompt first
    return [begun, *tokens_came], len(tokens_came)


def crowd(bench: Bench, name: str, way: Callable, prompts: list, n_clients: int) -> None:
    """A row of n clients, each asking anew when it has its answer, while prompts are left."""
    way([0] * PROMPT[0])  # warm-up
    begun = time.perf_counter()
    with ThreadPool(n_clients) as pool:  # which waits for nobody where it is cut off
        answers = pool.map(way, prompts, 1)
    spent = time.perf_counter() - begun
    n_made = sum(n for _, n in answers)
    firsts = [times[1] - times[0] for times, _ in answers]
    gaps = np.concatenate([np.diff(times[1:]) for times, _ in answers])
    rate = n_made / spent
    alone = next((r["tokens_per_s"] for r in bench.rows if r["name"] == name), rate)
    cells = [n_clients, rate, rate / alone]
    for waits in (firsts, gaps):
        cells += [1e3 * wait for wait in np.percentile(waits, [50, 95]).tolist()]
    row = dict(part="serve", name=name, requests=len(prompts), tokens=n_made, seconds=spent)
    bench.rows.append(rounded(row | dict(zip(LOAD, cells))))
    print(f"  {name:<19}" + "".join(f"{round(x, 2):>13,}" for x in cells), flush=True)
