"""What a request is answered, in OpenAI's protocol: what the jobs tell in, JSON out. Nothing here
knows HTTP; barelm/api.py has the way in."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from barelm.texts import TextStream
from barelm.tool_use import ChatPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from barelm.api import ServedModel
    from barelm.jobs import Job, Token, Update
    from barelm.tokenizer import Tokenizer
    from barelm.tool_calls import CallPiece


def usage(jobs: list[Job]) -> dict:
    """The tokens of a request: of its prompts, each counted once, and of its answers."""
    # The n jobs of a prompt share one list of ids. Of these the first says what was reused.
    seen = set()
    n_prompt = 0
    n_reused = 0
    n_generated = 0
    for job in jobs:
        n_generated += job.n_generated
        if id(job.ids) not in seen:
            seen.add(id(job.ids))
            n_prompt += len(job.ids)
            n_reused += job.n_reused
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": n_reused},
    }


def decode(tok: Tokenizer, ids: list[int]) -> str:
    """The text of ids without special tokens."""
    return b"".join(map(tok.token_bytes, ids)).decode(errors="replace")


def namer(tok: Tokenizer, job: Job) -> Callable[[int], str]:
    """name(id): a token as this job's request wants it shown."""
    if job.sampling.return_tokens_as_token_ids:
        return lambda id: f"token_id:{id}"
    return lambda id: token_name(tok, id)


def ids_of(job: Job, tokens: Sequence[Token]) -> dict:
    """What vLLM's return_token_ids adds to a choice."""
    if not job.sampling.return_token_ids:
        return {}
    return {"token_ids": [token.id for token in tokens]}


def token_name(tok: Tokenizer, id: int) -> str:
    """A token as the protocol shows it: as its bytes where they are no whole UTF-8."""
    data = tok.shown.get(id, b"")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionAnswer:
    """The JSON of the answer to a Completion, whole or in a stream's chunks."""

    def __init__(self, served: ServedModel, jobs: list[Job]) -> None:
        self.tok = served.tok
        self.head = answer_head("cmpl-", "text_completion", served.name)
        self.chunk_head = self.head  # OpenAI's chunks of a completion have no kind of their own
        self.texts = [TextStream() for _ in jobs]  # of the tokens told so far, for their places
        self.name = namer(self.tok, jobs[0])

    def whole_choice(self, job: Job, text: str, tokens: list[Token]) -> dict:
        choice = self.choice(job, text, tokens, job.row.out.finish_reason) | ids_of(job, tokens)
        if job.sampling.return_token_ids:
            choice["prompt_token_ids"] = job.ids
        return choice

    def first_choices(self, jobs: list[Job]) -> list:
        """What a stream begins with: of a completion, nothing."""
        return []

    def new_choices(self, update: Update) -> list[dict]:
        """What a stream tells of an Update."""
        finish_reason = update.job.row.out.finish_reason if update.done else None
        choice = self.choice(update.job, update.text, update.tokens, finish_reason)
        return [choice | ids_of(update.job, update.tokens)]

    def choice(self, job: Job, text: str, tokens: list[Token], finish_reason: str | None) -> dict:
        logprobs = None  # null where none were asked for
        if tokens and job.n_alternatives is not None:
            logprobs = self.logprobs(job, tokens, self.texts[job.index])
        return {
            "index": job.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def logprobs(self, job: Job, tokens: list[Token], text: TextStream) -> dict[str, list]:
        """OpenAI's arrays of a completion's tokens; `text` is what was told before them."""
        arrays = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            name = self.name(token.id)
            arrays["tokens"].append(name)
            arrays["token_logprobs"].append(token.logprob)
            arrays["top_logprobs"].append(self.alternatives(name, token))
            arrays["text_offset"].append(len(text.text))
            text.feed(job.row.token_bytes(token.id))
        return arrays

    def alternatives(self, name: str, token: Token) -> dict[str, float]:
        """{name: log p} of the token and its alternatives; of a text's first token None."""
        if token.logprob is None:
            return None
        by_name = {name: token.logprob}  # the token is there even if it was not among the likeliest
        for id, logprob in reversed(token.alternatives.items()):
            by_name[self.name(id)] = logprob  # of tokens that look alike the likeliest
        return by_name


class ChatAnswer:
    """The JSON of the answer to a Chat, whole or in a stream's chunks. plan: of its tools and
    thoughts, by which each answer is taken apart."""

    def __init__(self, served: ServedModel, jobs: list[Job], plan: ChatPlan | None = None) -> None:
        plan = plan or ChatPlan()
        self.parsers = [plan.parser() for _ in jobs]
        first = jobs[0]
        self.tells_tokens = first.n_alternatives is not None or first.sampling.return_token_ids
        self.tok = served.tok
        self.head = answer_head("chatcmpl-", "chat.completion", served.name)
        self.chunk_head = self.head | {"object": "chat.completion.chunk"}
        if jobs[0].sampling.return_token_ids:
            self.head["prompt_token_ids"] = jobs[0].ids  # of the whole, as vLLM has it
        self.name = namer(self.tok, jobs[0])

    def whole_choice(self, job: Job, text: str, tokens: list[Token]) -> dict:
        parser = self.parsers[job.index]
        parts = parser.feed(text, final=True)
        message = {"role": "assistant", "content": parts.text}
        if parts.thought:
            message["reasoning_content"] = parts.thought
        if parts.calls:
            message["tool_calls"] = whole_calls(parts.calls)
            message["content"] = parts.text or None
        choice = self.choice(job, "message", message, tokens, self.finish_reason(job))
        return choice | ids_of(job, tokens)

    def finish_reason(self, job: Job) -> str:
        """Why a job ended; OpenAI's word where it ended with calls."""
        reason = job.row.out.finish_reason
        if reason == "stop" and self.parsers[job.index].n_calls:
            return "tool_calls"
        return reason

    def first_choices(self, jobs: list[Job]) -> list[dict]:
        """What a stream begins with: who speaks, before the first token is there."""
        opening = {"role": "assistant", "content": ""}
        return [self.choice(job, "delta", opening) for job in jobs]

    def new_choices(self, update: Update) -> list[dict]:
        """What a stream tells of an Update."""
        job = update.job
        parser = self.parsers[job.index]
        parts = parser.feed(update.text, update.done)
        deltas = []
        if parts.thought:
            deltas.append({"reasoning_content": parts.thought})
        if parts.text:
            deltas.append({"content": parts.text})
        deltas += [{"tool_calls": [piece_of_call(piece)]} for piece in parts.calls]
        # A token may have no text yet, such as half a character; its log p is told at once.
        # Of what may become a call nothing else is to be told yet.
        if update.tokens and not deltas and (self.tells_tokens or not parser.calls):
            deltas.append({"content": ""})
        choices = []
        tokens = update.tokens  # told with the first of its pieces
        for delta in deltas:
            choices.append(self.choice(job, "delta", delta, tokens) | ids_of(job, tokens))
            tokens = []
        if update.done:
            # In a chunk of its own, as OpenAI's.
            choices.append(self.choice(job, "delta", {}, finish_reason=self.finish_reason(job)))
        return choices

    def choice(self, job: Job, key: str, message: dict[str, str], tokens: Sequence[Token] = (),
               finish_reason: str | None = None) -> dict:  # fmt: skip
        logprobs = None
        if tokens and job.n_alternatives is not None:
            logprobs = {"content": [self.token_entry(token) for token in tokens]}
        return {
            "index": job.index,
            key: message,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def token_entry(self, token: Token) -> dict:
        others = [self.entry(id, logprob) for id, logprob in token.alternatives.items()]
        return self.entry(token.id, token.logprob) | {"top_logprobs": others}

    def entry(self, id: int, logprob: float) -> dict:
        data = list(self.tok.shown.get(id, b""))  # what a client joins where a name is no UTF-8
        return {"token": self.name(id), "logprob": logprob, "bytes": data}


def whole_calls(pieces: list[CallPiece]) -> list[dict]:
    """The calls that these are the pieces of, as OpenAI has them."""
    calls: list[dict] = []
    for piece in pieces:
        if piece.name is not None:
            calls.append(new_call(piece.name))
        calls[-1]["function"]["arguments"] += piece.arguments
    return calls


def new_call(name: str) -> dict:
    function = {"name": name, "arguments": ""}
    return {"id": "call_" + os.urandom(12).hex(), "type": "function", "function": function}


def piece_of_call(piece: CallPiece) -> dict:
    """A piece of a call in a stream: the first has its id and name."""
    if piece.name is not None:
        return {"index": piece.index} | new_call(piece.name)
    return {"index": piece.index, "function": {"arguments": piece.arguments}}


def answer_head(prefix: str, kind: str, model_name: str) -> dict:
    """What every chunk of an answer begins with."""
    return {
        "id": prefix + os.urandom(12).hex(),
        "object": kind,
        "created": int(time.time()),
        "model": model_name,
    }
