"""Runs side by side: their logs and scores as tables and charts.

A log is the list of rows of a log.jsonl; scores are {(task, metric): (value, standard error or
None, n)} of a results.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

from barelm.chart import Chart, Series, curve, smooth
from barelm.run import UserError
from barelm.scores import is_finite


def read_log(folder: Path | str) -> list[dict]:
    """The rows of a run's log.jsonl; a line torn by a kill is left out."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        what = "no log.jsonl in this folder" if path.parent.is_dir() else "no such run"
        raise UserError(f"{folder}: {what} (train.py and finetune.py write out/NAME/log.jsonl)")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            if is_finite(row["step"]):
                rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):  # whatever a torn line is
            continue
    if not rows:
        raise UserError(f"{path}: no row of a step in it: has the run begun?")
    return rows


def lower_is_better(metric: str) -> bool:
    return any(word in metric for word in ("loss", "perplexity", "ppl", "bpb", "bits_per"))


def cell(score: tuple[float, float, int] | None, best: tuple[float, float, int]) -> str:
    """A (value, standard error, n) as the table shows it, * the best one, ~ what is not told apart
    from it: within 2 standard errors of their difference, if the runs are independent."""
    if score is None:
        return ""
    value, error, _ = score
    spread = "" if error is None else f" ± {error:.2g}"
    mark = ""
    if score is best:
        mark = " *"
    elif error is not None and best[1] is not None:  # else nothing is told of their difference
        of_difference = math.hypot(error, best[1])  # variances add up
        if abs(value - best[0]) <= 2 * of_difference:
            mark = " ~"
    return f"{value:.4g}{spread}{mark}"


def table(rows: list) -> list[str]:
    """Lines of a Markdown table, padded to be read as text too; the first row is the head."""
    cells = []
    for row in rows:  # a bar or a line end would end the cell
        cells.append([str(value).replace("|", "\\|").replace("\n", " ") for value in row])
    widths = [max(len(value) for value in column) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        padded = [value.ljust(width) for value, width in zip(row, widths)]
        lines.append("| " + " | ".join(padded) + " |")
    return lines


def score_lines(scores: dict[str, dict]) -> list[str]:
    """The table of {run: its scores}: a row for each (task, metric) that several runs have, a
    column for each run that has any; below it in words what is not in it."""
    scored = {run: its_scores for run, its_scores in scores.items() if its_scores}
    lines = []
    if scored:
        several = min(2, len(scored))
        shared = []
        for key in all_scores(scored):
            if sum(key in its_scores for its_scores in scored.values()) >= several:
                shared.append(key)
        lines += shared_lines(scored, shared)
        lines += alone_lines(scored, shared)
    lines += absent_lines(scores)
    return [*lines, ""] if lines else []


def shared_lines(scored: dict[str, dict], shared: list[tuple[str, str]]) -> list[str]:
    """The table of these (task, metric) with its legend; nothing where there are none."""
    if not shared:
        return []
    rows = [["score", *scored, "n"]]
    for task, metric in shared:
        row = [f"{task} {metric}"]
        present = [s[task, metric] for s in scored.values() if (task, metric) in s]
        best_of = min if lower_is_better(metric) else max
        best = best_of(present, key=lambda score: score[0])  # by its value
        for its_scores in scored.values():
            row.append(cell(its_scores.get((task, metric)), best))
        counts = dict.fromkeys(f"{n:,}" for _, _, n in present)
        row.append(" / ".join(counts))
        rows.append(row)
    legend = "Value ± standard error, of n questions, documents or windows"
    if len(scored) > 1:
        legend += "; * the best, ~ not told apart from it (within 2 standard errors)"
    return [*table(rows), "", f"{legend}."]


def alone_lines(scored: dict[str, dict], shared: list[tuple[str, str]]) -> list[str]:
    """What one run alone has, and which tasks a run of the table has not, a line each."""
    lines = []
    for run, its_scores in scored.items():
        for (task, metric), (value, error, n) in its_scores.items():
            if (task, metric) not in shared:
                spread = "" if error is None else f" ± {error:.2g}"
                lines.append(f"{run} alone: {task} {metric} {value:.4g}{spread} (n {n:,})")
        lacks = dict.fromkeys(task for task, metric in shared if (task, metric) not in its_scores)
        if lacks:
            lines.append(f"{run}: not scored on {', '.join(lacks)}")
    return lines


def absent_lines(scores: dict[str, dict]) -> list[str]:
    """The command that scores a run which has no scores yet, a line each."""
    from config import command_of  # here, since the scripts alone need it

    lines = []
    for run, its_scores in scores.items():
        if not its_scores:
            lines.append(f"{run}: no results.json ({command_of('eval')} --model={run})")
    return lines


def score_record(scores: dict[str, dict]) -> dict:
    """{run: its scores} as JSON has them: {run: {"task metric": {value, stderr, n}}}."""
    record = {}
    for run, its_scores in scores.items():
        figures = {}
        for (task, metric), (value, error, n) in its_scores.items():
            figures[f"{task} {metric}"] = {"value": value, "stderr": error, "n": n}
        record[run] = figures
    return record


def all_scores(scores: dict[str, dict]) -> list[tuple[str, str]]:
    """The (task, metric) that any of {run: its scores} has, in their order."""
    columns = {}  # a dict, since a set has no order
    for its_scores in scores.values():
        columns |= dict.fromkeys(its_scores)
    return list(columns)


# Of a run's log, what the table has where any run logged it.
LAST_FIGURES = ("loss", "val_loss", "val_bpb", "val_acc", "reward", "val_reward")


def loss_lines(logs: dict[str, list[dict]], x: str) -> list[str]:
    """The table of the last figures of {run: rows of its log}, over x: step or tokens."""
    columns = {"run": list(logs), "steps": [log[-1]["step"] for log in logs.values()]}
    columns["tokens"] = []
    for log in logs.values():
        seen = curve(log, "tokens", "tokens")
        columns["tokens"].append(f"{seen[-1][0]:,}" if seen else "")
    for key in LAST_FIGURES:
        is_validation = key.startswith("val_")
        cells = columns[key if is_validation else f"{key} (smoothed)"] = []
        for log in logs.values():
            points = curve(log, key, x)
            if not is_validation:
                points = smooth(points)
            cells.append(f"{points[-1][1]:.4f}" if points else "")
    if any(columns["tokens"]):  # else no run counts them
        columns["tokens"] = [cell or "not logged" for cell in columns["tokens"]]
    shown = {head: cells for head, cells in columns.items() if any(cell != "" for cell in cells)}
    return table([list(shown), *zip(*shown.values())])


def score_charts(scores: dict[str, dict]) -> list[Chart]:
    """A chart for each metric of {run: its scores}: the tasks along x, the runs side by side."""
    columns = all_scores(scores)
    charts = []
    for metric in dict.fromkeys(metric for _, metric in columns):
        tasks = [task for task, its_metric in columns if its_metric == metric]
        all_series = []
        for i, (run, its_scores) in enumerate(scores.items()):
            beside = 0.6 * ((i + 0.5) / len(scores) - 0.5)  # within 0.3 of the task's place
            points = []
            for j, task in enumerate(tasks):
                if (task, metric) in its_scores:
                    value, error, _ = its_scores[task, metric]
                    points.append((j + beside, value, error))
            if points:
                all_series.append(Series(run, i, "dots", points))
        better = "lower" if lower_is_better(metric) else "higher"
        title = f"{metric} ({better} is better; ± 1 standard error)"
        charts.append(Chart(title, "", all_series, tasks))
    return charts


def length_lines(losses: dict[str, list]) -> list:
    """The table of {run: its (length, loss, error)}: a column for each length of a window."""
    columns = sorted({length for points in losses.values() for length, _, _ in points})
    if not columns:
        return []
    rows = [["run", *(f"loss at {length:,}" for length in columns)]]
    for run, points in losses.items():
        by_length = {length: loss for length, loss, _ in points}
        cells = [f"{by_length[length]:.4f}" if length in by_length else "" for length in columns]
        rows.append([run, *cells])
    return [*table(rows), ""]


def length_chart(losses: dict[str, list]) -> Chart:
    """The chart of the same: a line for each run."""
    all_series = []
    for i, (run, points) in enumerate(losses.items()):
        all_series.append(Series(run, i, "line", [(length, loss) for length, loss, _ in points]))
    return Chart("loss by the length of a window", "tokens", all_series)


def loss_chart(logs: dict[str, list[dict]], x: str) -> Chart:
    """The chart of the losses of {run: rows of its log} over x."""
    ends = []
    for log in logs.values():
        ends += [end for end, _ in curve(log, x, x)]
    begin = max(ends, default=0) / 100  # before, all are alike: high
    all_series = []
    for i, (run, log) in enumerate(logs.items()):
        training = [point for point in smooth(curve(log, "loss", x)) if point[0] >= begin]
        all_series.append(Series("", i, "thin", training))
        all_series.append(Series(run, i, "line", curve(log, "val_loss", x)))
    return Chart("loss: thin in training, smoothed; thick in validation", x, all_series)
