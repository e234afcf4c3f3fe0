"""What takes minutes to show of constrained text; not a part of the suite.

    python tests/long_guided.py MODEL               # 500 fuzzed schemas, of answers by a model
    python tests/long_guided.py MODEL --schemas=50
    python tests/long_guided.py MODEL --speed=4     # tokens/s beside unconstrained ones, in turn

MODEL: a folder, or random:FOLDER for small random weights with the folder's tokenizer. Schemas are
drawn at random and answers sampled at temperatures 1 and higher; the package jsonschema, which the
library behind barelm/grammar.py knows nothing of, judges each.
"""

import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from barelm.checkpoint import load
from barelm.engine import Engine
from barelm.errors import UserError
from barelm.grammar import compile_grammar
from barelm.jobs import Job, Sampling
from barelm.run import choose_dtype
from barelm.tokenizer import Tokenizer
from model import GPT, GPTConfig

PATTERNS = [
    "^[a-z]+$",
    "^[A-Z]{2}-[0-9]{3,5}$",
    "ab+",
    "^(red|green|blue)$",
    "^\\d{4}-\\w*$",
    "^.{2,9}$",
]
FORMATS = ["date", "ipv4", "ipv6", "uuid", "email", "time", "date-time", "hostname", "duration"]
NAMES = [
    "name",
    "age",
    "tags",
    "city zip",
    "é",
    'q"uote',
    "$x",
    "a/b",
    "list",
    "id",
    "0",
    "back\\slash",
]
VALUES = [
    "red",
    "",
    0,
    -1.5,
    True,
    None,
    [1, "two"],
    {"a": {"b": []}},
    "ünï😀",
    'say "hi"\n',
    12345678901,
]


class Fuzzer:
    """Random schemas; the same ones of a seed."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.definitions = []
        self.may_refer = True  # else a definition would be itself, in no object or list of its own

    def whole(self):
        """A schema with some definitions, which may call themselves."""
        n = self.draw.choice([0, 0, 1, 2])
        self.definitions = [f"d{i}" for i in range(n)]
        schema = self.schema(self.draw.choice([1, 2, 3, 4]))
        if n:
            self.may_refer = False
            schema["$defs"] = {name: self.schema(2) for name in self.definitions}
            self.may_refer = True
        if self.draw.random() < 0.2:
            schema |= {
                "title": "A title",
                "$schema": "https://json-schema.org/draft/2020-12/schema",
            }
        return schema

    def schema(self, depth):
        kinds = [self.string, self.string, self.number, self.integer, self.literal, self.constant]
        kinds += [self.several_types]
        if depth > 0:
            kinds += [self.object, self.object, self.object, self.array, self.array, self.any_of]
            kinds += [self.all_of, self.one_of]
            if self.definitions and self.may_refer:
                kinds += [self.reference]
        schema = self.draw.choice(kinds)(depth - 1)
        if self.draw.random() < 0.1:
            schema["description"] = "what it is"
        return schema

    def string(self, depth):
        schema = {"type": "string"}
        kind = self.draw.randrange(5)
        if kind == 0:
            schema["pattern"] = self.draw.choice(PATTERNS)
        elif kind == 1:
            schema["format"] = self.draw.choice(FORMATS)
        elif kind < 4:
            least = self.draw.randrange(6)
            schema["minLength"] = least
            if kind == 2:
                schema["maxLength"] = least + self.draw.randrange(20)
        return schema

    def integer(self, depth):
        return self.bounded(
            {"type": "integer"}, lambda: self.draw.randint(-200, 200), [2, 3, 7, 10]
        )

    def number(self, depth):
        draw_bound = lambda: self.draw.choice(
            [self.draw.randint(-50, 50), self.draw.randint(-99, 99) / 4]
        )
        return self.bounded({"type": "number"}, draw_bound, [0.5, 0.25, 2])

    def bounded(self, schema, draw_bound, multiples):
        least = draw_bound()
        most = least + self.draw.choice([8, 20, 1000])
        if self.draw.random() < 0.5:
            schema[self.draw.choice(["minimum", "exclusiveMinimum"])] = least
        if self.draw.random() < 0.5:
            schema[self.draw.choice(["maximum", "exclusiveMaximum"])] = most
        if self.draw.random() < 0.2:
            schema["multipleOf"] = self.draw.choice(multiples)
        return schema

    def literal(self, depth):
        return {"type": self.draw.choice(["boolean", "null", "boolean"])}

    def constant(self, depth):
        if self.draw.random() < 0.4:
            return {"const": self.draw.choice(VALUES)}
        return {"enum": self.draw.sample(VALUES, self.draw.randint(1, 5))}

    def several_types(self, depth):
        return {"type": self.draw.sample(["string", "integer", "null", "boolean", "number"], 2)}

    def object(self, depth):
        names = self.draw.sample(NAMES, self.draw.randint(0, 5))
        properties = {name: self.inner(depth) for name in names}
        schema = {"type": "object", "properties": properties}
        if self.draw.random() < 0.8:
            n = self.draw.randint(0, len(names))
            schema["required"] = self.draw.sample(names, n)
        kind = self.draw.randrange(5)
        if kind < 2:
            schema["additionalProperties"] = False
        elif kind == 2:
            schema["additionalProperties"] = self.schema(0)
        elif kind == 3:
            schema["patternProperties"] = {"^x_[a-z]+$": self.schema(0)}
        if not names:
            schema["maxProperties"] = self.draw.randint(1, 4)
            schema["minProperties"] = self.draw.randint(0, 1)
        return schema

    def inner(self, depth):
        """A schema of what is in an object or a list."""
        before = self.may_refer
        self.may_refer = True
        schema = self.schema(depth)
        self.may_refer = before
        return schema

    def array(self, depth):
        schema = {"type": "array", "items": self.inner(depth)}
        if self.draw.random() < 0.2:
            schema["prefixItems"] = [self.inner(depth) for _ in range(self.draw.randint(1, 2))]
        least = self.draw.randint(0, 2)
        if self.draw.random() < 0.5:
            schema["minItems"] = least
        if self.draw.random() < 0.6:
            schema["maxItems"] = least + self.draw.randint(0, 3)
        return schema

    def any_of(self, depth):
        return {"anyOf": [self.schema(depth) for _ in range(self.draw.randint(1, 3))]}

    def one_of(self, depth):
        """Of kinds that nothing is two of."""
        return {
            "oneOf": [self.string(depth), self.literal(depth), self.number(depth)][
                : self.draw.randint(1, 3)
            ]
        }

    def all_of(self, depth):
        name = self.draw.choice(NAMES)
        return {"allOf": [self.object(depth), {"type": "object", "properties": {name: True}}]}

    def reference(self, depth):
        return {"$ref": f"#/$defs/{self.draw.choice(self.definitions)}"}


# --------------------------------------------------------------------------------------------------
# Answers


def open_model(name):
    """(network, tokenizer) of a folder, or random weights with its tokenizer."""
    if not name.startswith("random:"):
        kind, _ = choose_dtype(torch.device("cpu"), "auto", n_embd=1024)
        return load(name, "cpu", kind)
    tok = Tokenizer.from_folder(name.removeprefix("random:"))
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_kv_head=1, head_dim=16, n_embd=32, n_hidden=64)
    net = GPT(GPTConfig(vocab_size=tok.n_vocab, n_ctx=1024, **sizes)).eval()
    return net, tok


def answers(engine, jobs_of, n):
    """Submit n jobs, jobs_of(listener), and wait: {index of a job: what went wrong, or None}."""
    errors = {}
    ended = threading.Event()

    def listen(update):
        if update.done:
            errors[update.job.number] = update.error
            if len(errors) == n:
                ended.set()

    jobs = jobs_of(listen)
    assert engine.submit(jobs)
    while not ended.wait(5):
        assert engine.is_alive()
    return jobs, errors


def judge(schema, text, finish_reason):
    """Words for an answer: "valid", "cut", or what is wrong with it."""
    import jsonschema

    if finish_reason == "length":
        return "cut"
    try:
        value = json.loads(text, parse_constant=lambda word: 1 / 0)
    except (ValueError, ZeroDivisionError) as error:
        return f"no JSON: {error}"
    validator = jsonschema.Draft202012Validator
    error = next(
        validator(schema, format_checker=validator.FORMAT_CHECKER).iter_errors(value), None
    )
    return "valid" if error is None else f"not valid: {error.message}"


def is_beginning(tok, grammar, ids):
    """Whether a text that was cut is the beginning of one that the grammar allows."""
    guide = grammar.begin()
    for id in ids:
        guide.take(id)
    return True


def fuzz(model, n, limit=80, seed=0, tell=print):
    """Answers to n schemas that can be held: a Counter of what they are."""
    net, tok = open_model(model)
    engine = Engine(net, tok, max_batch=16, max_len=256)
    engine.start()
    fuzzer = Fuzzer(seed)
    counts = Counter()
    pending = []
    try:
        while counts["schemas"] + len(pending) < n:
            schema = fuzzer.whole()
            try:
                grammar = compile_grammar(tok, "json_schema", schema)
            except UserError as error:
                counts[f"refused: {str(error)[:60]}"] += 1
                continue
            pending.append((schema, grammar))
            if len(pending) == 16 or counts["schemas"] + len(pending) == n:
                run(engine, tok, pending, limit, counts, tell)
                counts["schemas"] += len(pending)
                pending = []
                if counts["schemas"] % 50 < 16:
                    print({key: counts[key] for key in ("schemas", "valid", "cut")}, flush=True)
    finally:
        engine.stop()
    return counts


def run(engine, tok, pending, limit, counts, tell):
    """One answer to each (schema, Grammar); temperatures 1, 1.5 and 3 in turn."""

    def jobs_of(listener):
        jobs = []
        for i, (schema, grammar) in enumerate(pending):
            ids = prompt_of(tok, schema)
            sampling = Sampling(temperature=[1.0, 1.5, 3.0][i % 3], seed=counts["schemas"] + i)
            job = Job(tok, ids, limit, sampling, listener, ends=tok.eos_ids, guide=grammar.begin())
            job.number = i
            jobs.append(job)
        return jobs

    jobs, errors = answers(engine, jobs_of, len(pending))
    for job, (schema, grammar) in zip(jobs, pending):
        out = job.row.out
        said = errors[job.number] or judge(schema, out.text, out.finish_reason)
        if said == "cut":
            is_beginning(tok, grammar, out.ids)
        if said not in ("valid", "cut"):
            tell(f"{said}\n  {json.dumps(schema)}\n  {out.text!r}")
            said = said.split(":")[0]
        counts[said] += 1
        counts["tokens"] += len(out.ids)


def prompt_of(tok, schema):
    text = f"Answer in JSON by this schema: {json.dumps(schema)[:100]}"
    if tok.config.get("chat_template"):
        return tok.chat([{"role": "user", "content": text}], True)[0]
    return tok.prompt(text)


# --------------------------------------------------------------------------------------------------
# Speed

LISTS = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 500}


def speed(model, n_rows=4, length=96, rounds=4):
    """Tokens by second of this process's CPU time, which other processes do not change as they do
    the clock's, of free answers and of those by a schema, in turn, of one length."""
    net, tok = open_model(model)
    engine = Engine(net, tok, max_batch=n_rows, max_len=256)
    engine.start()
    compiled = []
    for i in range(20):
        schema = {**LISTS, "maxItems": 600 + i}
        begun = time.perf_counter()
        grammar = compile_grammar(tok, "json_schema", schema)
        middle = time.perf_counter()
        compile_grammar(tok, "json_schema", schema)
        compiled.append((middle - begun, time.perf_counter() - middle))
    first, *others = compiled
    print(f"the first schema, with the vocabulary: {first[0] * 1e3:.0f} ms")
    new = sorted(new for new, _ in others)[len(others) // 2]
    again = sorted(again for _, again in compiled)[len(compiled) // 2]
    print(f"a new schema {new * 1e3:.2f} ms, the same again {again * 1e3:.3f} ms")
    rates = {"free": [], "guided": []}
    for i in range(2 * rounds + 2):
        way = "guided" if i % 2 else "free"

        def jobs_of(listener, way=way):
            jobs = []
            for row in range(n_rows):
                guide = grammar.begin() if way == "guided" else None
                ids = prompt_of(tok, LISTS)
                job = Job(tok, ids, length, Sampling(seed=row), listener, guide=guide, goes_on=True)
                job.number = row
                jobs.append(job)
            return jobs

        begun = time.process_time()
        jobs, _ = answers(engine, jobs_of, n_rows)
        seconds = time.process_time() - begun
        if i > 1:  # the first ones warm up
            rates[way].append(sum(len(job.row.out.ids) for job in jobs) / seconds)
    for way, values in rates.items():
        print(f"{way}: {' '.join(f'{value:.1f}' for value in values)} tokens/s")
    ratios = [free / guided for free, guided in zip(rates["free"], rates["guided"])]
    print(f"free over guided: {' '.join(f'{ratio:.3f}' for ratio in ratios)}")
    engine.stop()


def main():
    options = dict(arg[2:].split("=") if "=" in arg else (arg[2:], 1) for arg in sys.argv[2:])
    torch.set_num_threads(1)
    if "speed" in options:
        speed(sys.argv[1], rounds=int(options["speed"]))
        return
    begun = time.monotonic()
    counts = fuzz(sys.argv[1], int(options.get("schemas", 500)), seed=int(options.get("seed", 0)))
    for name, n in sorted(counts.items()):
        print(f"{name}: {n}")
    print(f"seconds: {time.monotonic() - begun:.0f}")


if __name__ == "__main__":
    main()
