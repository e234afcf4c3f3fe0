"""What the server counts, in the text format that Prometheus reads."""

from __future__ import annotations

import math
from collections import Counter

# Upper ends of the histograms' buckets, in seconds.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, math.inf)
METRICS = {  # name: (type, what it counts)
    "requests_total": ("counter", "Requests answered."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "reused_tokens_total": ("counter", "Of these, those that the cache held already."),
    "generated_tokens_total": ("counter", "Tokens generated."),
    "steps_total": ("counter", "Steps of the engine."),
    "reloads_total": ("counter", "Times that newer weights were loaded."),
    "queue_length": ("gauge", "Sequences that wait for a place in the batch."),
    "batch_size": ("gauge", "Sequences in the batch."),
    "batch_limit": ("gauge", "Places in the batch."),
    "first_token_seconds": ("histogram", "From a sequence's arrival to its first token."),
    "between_tokens_seconds": ("histogram", "From one token of a sequence to its next."),
    "request_seconds": ("histogram", "From a generating request's arrival to its end."),
}


class Metrics:
    """Counters and histograms by the names of METRICS. Each is written by one thread alone, so that
    none needs a lock."""

    def __init__(self) -> None:
        self.counts = Counter()  # by the name with its labels: requests_total{status="200"}
        self.sums = Counter()  # seconds, of each histogram
        self.buckets = Counter()  # how many fell into the bucket (histogram, upper end)

    def add(self, name: str, n: int = 1) -> None:
        self.counts[name] += n

    def observe(self, name: str, seconds: float) -> None:
        self.sums[name] += seconds
        for bound in BOUNDS:
            if seconds <= bound:
                self.buckets[name, bound] += 1
                return

    def text(self, gauges: dict[str, int]) -> str:
        """Prometheus's text format, version 0.0.4. gauges: {name: the present value}."""
        values = Counter({**self.counts, **gauges})  # a copy, which no thread adds to meanwhile
        lines = []
        for name, (kind, meaning) in METRICS.items():
            lines.append(f"# HELP barelm_{name} {meaning}")
            lines.append(f"# TYPE barelm_{name} {kind}")
            if kind == "histogram":
                lines += self.histogram_lines(name)
                continue
            labelled = sorted(key for key in values if key.startswith(name + "{"))
            for key in labelled or [name]:
                lines.append(f"barelm_{key} {values[key]}")
        return "\n".join(lines) + "\n"

    def histogram_lines(self, name: str) -> list[str]:
        lines = []
        total = 0  # Prometheus's buckets each count all that lies below their end
        for bound in BOUNDS:
            total += self.buckets[name, bound]
            end = "+Inf" if bound == math.inf else bound
            lines.append(f'barelm_{name}_bucket{{le="{end}"}} {total}')
        lines.append(f"barelm_{name}_sum {self.sums[name]}")
        lines.append(f"barelm_{name}_count {total}")
        return lines
