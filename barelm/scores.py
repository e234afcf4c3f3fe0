"""Scores, {metric: (value, standard error or None)}, and results.json, the file that keeps them."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from barelm.checkpoint import find
from barelm.files import read_json, write_json
from barelm.run import UserError

if TYPE_CHECKING:
    from barelm.mesh import Sizes


def mean(amounts: list[float] | np.ndarray, sizes: Sizes = 1) -> tuple[float | None, float | None]:
    """sum(amounts) / sum(sizes) over independent pieces and its standard error, linearised (a
    ratio estimator's: Cochran 1977, section 2.11); of right and wrong that is
    sqrt(p (1 - p) / (n - 1)). (None, None) of nothing, no error of a single piece."""
    a, b = np.broadcast_arrays(np.array(amounts, np.float64), np.array(sizes, np.float64))
    if len(a) == 0:
        return None, None
    ratio = float(a.sum() / b.sum())
    n = len(a)
    if n < 2:
        return ratio, None
    # n - 1: the ratio itself was estimated from the same pieces.
    spread = math.sqrt(((a - ratio * b) ** 2).sum() / (n - 1))
    return ratio, float(spread / math.sqrt(n) / b.mean())


def perplexity(nats: tuple[float, float]) -> tuple[float, float]:
    """exp of a mean and of its error, to the first order."""
    mean_nats, error = nats
    value = math.exp(min(mean_nats, 700))  # the largest that float holds
    return value, None if error is None else value * error


def divided(score: tuple[float, float], by: float) -> tuple[float, float]:
    """A score and its error in another unit."""
    value, error = score
    return value / by, None if error is None else error / by


def flat(scores: dict) -> dict[str, float | None]:
    """{metric: value, metric_stderr: its standard error}, as results.json has them."""
    entry = {}
    for metric, (value, error) in scores.items():
        entry[metric] = value
        entry[f"{metric}_stderr"] = error
    return entry


def metrics_of(entry: dict) -> list[str]:
    """The names of the scores of a task's entry, each of which has a standard error beside it."""
    return [key for key in entry if f"{key}_stderr" in entry]


def is_finite(value: Any) -> bool:
    """Whether a value of a JSON file is a number that float holds, its square aside; not NaN."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)  # True is an int
    return number and abs(value) < 1e300


def read_results(folder: Path | str) -> tuple[str | None, dict[str, dict]]:
    """(the mark of the model, {task: its entry}) of a folder's results.json; one of another form is
    refused, before an evaluation would add to it."""
    path = Path(folder) / "results.json"
    try:
        record = read_json(path, {"results": {}})
        results = record.get("results")
        if not isinstance(results, dict):
            raise UserError(f"{path}: not results of eval.py: no `results`")
        for task, entry in results.items():
            if not isinstance(entry, dict):
                raise UserError(f"{path}: not results of eval.py: {task} is no object")
            for metric in metrics_of(entry):
                for key in (metric, f"{metric}_stderr", "n"):
                    if not is_figure(entry, metric, key):
                        shown = f"{task}: {key}={entry.get(key)!r}"[:100]
                        raise UserError(f"{path}: not results of eval.py: {shown}")
    except UserError as error:
        raise UserError(f"{error}: remove it, and evaluate again") from None
    return record.get("identity"), results


def is_figure(entry: dict, metric: str, key: str) -> bool:
    """Whether an entry has for this key what eval.py writes: a number (a loss may be NaN, an error
    and a count are not below 0), or null where there is no score or no error."""
    value = entry.get(key)
    if value is None:
        return key != "n"
    if not isinstance(value, float) and not is_finite(value):
        return False
    return key == metric or not value < 0


def read_scores(folder: str) -> dict[tuple[str, str], tuple[float, float, int]]:
    """{(task, metric): (value, standard error or None, n)} of a run's results.json, or {}."""
    scores = {}
    for task, entry in read_results(folder)[1].items():
        for metric in metrics_of(entry):
            value = entry[metric]
            error = entry[f"{metric}_stderr"]
            if is_finite(value):
                scores[task, metric] = value, error if is_finite(error) else None, entry["n"]
        scores |= parts_of_core(task, entry)
    return scores


def parts_of_core(task: str, entry: dict) -> dict[tuple[str, str], tuple]:
    """{(task, metric): (value, standard error or None, n)} of the tasks that CORE is the mean of,
    which are of interest each, or {} of another entry."""
    by = entry.get("by")
    parts = {}
    if "core_metric" in entry and isinstance(by, dict):
        for name, figures in by.items():
            value = figures.get("centered") if isinstance(figures, dict) else None
            if is_finite(value) and is_finite(figures.get("n")):
                error = figures.get("centered_stderr")
                error = error if is_finite(error) else None
                parts[f"{task}.{name}", "centered"] = value, error, figures["n"]
    return parts


def read_lengths(folder: str) -> list:
    """[(length, loss, standard error or None)] of a run's results.json, by the length of a window
    (eval.py --lengths), or []."""
    _, results = read_results(folder)
    points = []
    by = results.get("loss", {}).get("by")
    for name, figures in (by if isinstance(by, dict) else {}).items():
        length = name.removeprefix("length ")
        if name == length or not length.isdecimal() or not isinstance(figures, dict):
            continue
        if is_finite(figures.get("loss")):
            error = figures.get("loss_stderr")
            points.append((int(length), figures["loss"], error if is_finite(error) else None))
    return sorted(points)


def model_mark(model: str, dtype: torch.dtype, quantize: str | None, fast: bool = True,
               deterministic: bool = False, rope_scaling: str | None = None) -> str:  # fmt: skip
    """What tells this model's results from another's, 16 hex digits: its files, and what it
    computes in and by."""
    parts = [str(dtype), quantize, model]
    if not fast:  # whose sums differ in their last bits
        parts.append("plain")
    if deterministic:
        parts.append("deterministic")
    if rope_scaling:
        parts.append(rope_scaling)
    # Sizes and times stand for what is in the files: to read those would take long.
    for path in sorted(find(model).glob("*")):
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"):
            parts += [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def write_results(folder: Path, model: str, mark: str, results: dict[str, dict]) -> None:
    """Write results.json, whose reader is `read_results`."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    record = {"model": model, "identity": mark, "results": results, "versions": versions}
    write_json(Path(folder) / "results.json", record)
