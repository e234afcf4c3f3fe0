"""How good is it, compared with what: reports, plans, and what was memorized.

python eval.py --compare out/a out/b                # a table, report.md and report.svg
python eval.py --plan --flops=1e18 > config/my.py   # a compute-optimal recipe for train.py
python eval.py --plan --hours=2 --device=h100 --devices=8
python eval.py --plan --compare out/a out/b out/c   # a scaling curve through finished runs
python eval.py --memorized --model=out/python       # text found word for word in the shards
"""

from config import configure

model = "out/python"  # a checkpoint folder
dataset = "python"  # data/<dataset>: the shards that text is looked for in, or a plan is for
seed = 0  # of the samples
device = "auto"  # auto, cpu, cuda, cuda:1; with --plan h100 (auto) and its like

# a report over finished runs
compare: str | list = ""  # their folders: out/a,out/b, or as words
report = "report.md"  # where it is written, with a picture (.svg) beside it

# a plan: one of the first four, or two that leave the third of C = 6 N D
plan = False  # print a recipe for a budget, or with --compare fit a scaling curve
flops: float | None = None  # FLOPs of the whole run
hours: float | None = None  # or hours on `devices` of `device` at `mfu`
params: float | None = None  # parameters
tokens: float | None = None  # training tokens
devices = 1  # how many of them
mfu = 0.4  # the fraction of their peak that training reaches

# verbatim overlap with the training shards
memorized = False  # measure it
num_texts = 100  # texts with a prompt from training, and as many without
prompt_tokens = 50  # tokens of such a prompt
text_tokens = 50  # tokens of a text; also what counts as reproduced
ngram = 8  # of how many tokens are the n-grams looked up

if __name__ == "__main__":
    configure(globals())

import html
import json
import math
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import torch

import model as core
from model import UserError

# --------------------------------------------------------------------------------------------------
# The report: runs side by side, and a picture


def runs_to_compare():
    """The folders that `compare` names, each once."""
    names = compare.split(",") if isinstance(compare, str) else compare
    return list(dict.fromkeys(str(name).strip().rstrip("/") for name in names if str(name).strip()))


def read_log(folder):
    """The rows of a run's log.jsonl; a line torn by a kill is left out."""
    path, rows = Path(folder) / "log.jsonl", []
    if not path.is_file():
        what = "no log.jsonl in this folder" if path.parent.is_dir() else "no such run"
        raise UserError(f"{folder}: {what} (train.py and finetune.py write out/NAME/log.jsonl)")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            rows += [row] if math.isfinite(row["step"]) else []
    if not rows:
        raise UserError(f"{path}: no row of a step in it: has the run begun?")
    return rows


def read_scores(folder):
    """{(task, metric): (value, standard error or None, n)} and the settings of a run's
    results.json; both empty where there is none."""
    path = Path(folder) / "results.json"
    try:
        found = core.read_json(path, {"scores": {}})
        cells = {(t, m): cell for t, ms in found["scores"].items() for m, cell in ms.items()}
        number = lambda x: None if x is None or not math.isfinite(x) else float(x)
        read = lambda cell: (number(cell["value"]), number(cell.get("stderr")), cell.get("n"))
        cells = {key: read(cell) for key, cell in cells.items()}
        cells = {key: cell for key, cell in cells.items() if cell[0] is not None}
        return cells, dict(found.get("settings", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not results of eval.py ({error!r}): evaluate again") from None


def curve(rows, key, x):
    """[(x, value)] of the rows that have both as finite numbers."""
    number = lambda v: isinstance(v, (int, float)) and math.isfinite(v)
    return [(row[x], row[key]) for row in rows if number(row.get(x)) and number(row.get(key))]


def smooth(points, parts=50):
    """The exponential mean over a `parts`-th of the points, at most 400 of them kept."""
    span, mean, weight, out = max(1, len(points) // parts), 0.0, 0.0, []
    for x, y in points:
        mean, weight = mean + (y - mean) / span, weight + (1 - weight) / span
        out.append((x, mean / weight))  # the first ones count in full (Kingma and Ba 2015, 3)
    return out[:: -(-len(out) // 400)] + out[-1:] if out else []


def lower_is_better(metric):
    return any(word in metric for word in ("loss", "perplexity", "ppl", "bpb", "bits_per"))


def verdict(key, scores):
    """(the best run of a score, a sentence: which of the others are beyond 2 standard errors of
    the difference; the runs count as independent, so that equal questions make it cautious)."""
    have = {run: cells[key] for run, cells in scores.items() if key in cells}
    best = (min if lower_is_better(key[1]) else max)(have, key=lambda run: have[run][0])
    value, error, _ = have.pop(best)
    told = []
    for run, (other, its_error, _) in have.items():
        gap = abs(value - other)
        if error is None or its_error is None:
            told.append(f"{run} is {gap:.4g} away, with no standard error to judge it by")
        elif gap > 2 * math.hypot(error, its_error):
            told.append(f"{run} is worse by {gap:.4g}, beyond 2 standard errors")
        else:
            told.append(f"{run} is not to be told apart ({gap:.4g}, within 2 standard errors)")
    return best, f"{' '.join(key)}: {best} is best" + "".join(f"; {line}" for line in told)


def table(rows):
    """Lines of a Markdown table, padded to be read as text too; the first row is the head."""
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = lambda row: "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |"
    return [line(rows[0]), line(["-" * w for w in widths]), *map(line, rows[1:])]


def compare_runs():
    """Print the table of scores and of losses; write them to `report` with a picture beside."""
    runs = runs_to_compare()
    logs, results = {run: read_log(run) for run in runs}, {run: read_scores(run) for run in runs}
    scores = {run: cells for run, (cells, _) in results.items()}
    keys = list(dict.fromkeys(key for cells in scores.values() for key in cells))
    verdicts = {key: verdict(key, scores) for key in keys}
    lines = [f"{run}: no results.json (python eval.py --model={run})" for run in runs]
    lines = [line for run, line in zip(runs, lines) if not scores[run]]
    settings = [found for _, found in results.values() if found]
    names = dict.fromkeys(name for found in settings for name in found if name != "model")
    differ = [k for k in names if any(found.get(k) != settings[0].get(k) for found in settings)]
    if differ:
        lines.append(f"evaluated with different settings: {', '.join(differ)}")

    def cell(run, key):
        if key not in scores[run]:
            return ""
        value, error, n = scores[run][key]
        text = f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
        return text + f" (n {n})" * (n is not None) + " *" * (verdicts[key][0] == run)

    out = ["# Runs compared", ""]
    if keys:
        rows = [[run] + [cell(run, key) for key in keys] for run in runs]
        out += [*table([["run", *map(" ".join, keys)], *rows]), ""]
        out += ["Value ± standard error; * marks the best.", ""]
    out += [f"- {line}" for line in lines + [line for _, line in verdicts.values()]] + [""]
    x = "tokens" if all(curve(rows, "loss", "tokens") for rows in logs.values()) else "step"
    columns = ("loss", "val_loss", "val_bpb")
    last = lambda points: f"{points[-1][1]:.4f}" if points else ""
    shown = [["run", "steps", "tokens", "loss (smoothed)", "val_loss", "val_bpb"]]
    for run, rows in logs.items():
        seen = curve(rows, "tokens", "tokens")
        ends = [
            last(smooth(curve(rows, "loss", x))),
            *(last(curve(rows, k, x)) for k in columns[1:]),
        ]
        shown.append([run, rows[-1]["step"], f"{seen[-1][0]:,}" if seen else "not logged", *ends])
    picture = Path(report).with_suffix(".svg")
    out += [*table(shown), "", f"![scores and losses](<{picture.name}>)"]
    panels = []
    for metric in dict.fromkeys(metric for _, metric in keys):
        tasks = [task for task, its in keys if its == metric]
        bars = []
        for run in filter(scores.get, runs):
            at = [(j, scores[run].get((task, metric))) for j, task in enumerate(tasks)]
            points = [(j, cell[0], cell[1]) for j, cell in at if cell]
            bars.append((run, runs.index(run), "bars", points))
        better = "lower" if lower_is_better(metric) else "higher"
        panels.append((f"{metric} ({better} is better; ± 1 standard error)", "", bars, tasks))
    lines = []
    begin = max(row.get(x, 0) for rows in logs.values() for row in rows) / 100  # all alike before
    for i, (run, rows) in enumerate(logs.items()):
        thin = [p for p in smooth(curve(rows, "loss", x)) if p[0] >= begin]
        lines.append(("", i, "thin", thin))
        lines.append((run, i, "line", curve(rows, "val_loss", x)))
    panels.append(("loss: thin in training, smoothed; thick in validation", x, lines, None))
    print("\n".join(out[2:-2]))
    write_report(Path(report), "\n".join(out) + "\n")
    write_report(picture, svg(panels))


def write_report(path, text):
    with core.whole_file(path) as file:
        file.write(text.encode())
    print(f"written: {path}")


PALETTE = """#0072b2 #d55e00 #00856a #b8518d #8a6d00 #3a6fd8 #7a5195 #666666
#4aa8e0 #ff8c42 #2fd0a0 #f0a0cc #e6c34a #9db8ff #c79be0 #bbbbbb""".split()  # light, then dark
STYLE = "text{fill:currentColor}.axis{stroke:currentColor}.grid{stroke:currentColor;opacity:.15}"
STYLE += ".line,.thin,.err{fill:none;stroke:currentColor;stroke-width:2}.dots,.bars{opacity:.85}"
STYLE += ".thin{stroke-width:1;opacity:.6}.err{color:#222}.dots,.bars{fill:currentColor}"


def short(x):
    """A number as an axis has it: 0.25, 3, 200k, 1.5M, 1e+15."""
    sizes = [(s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if s <= abs(x) < 1e12]
    size, unit = (sizes or [(1, "")])[0]
    return f"{x / size:.4g}{unit}"


def ticks(low, high, log):
    """Round numbers between low and high: some 1, 2, 5 of each decade, or evenly spaced ones."""
    if log and high / low > 5:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        every = -(-len(decades) // 8)
        parts = (1, 2, 5) if len(decades) < 4 else (1,)
        marks = [m * 10.0**e for e in [*decades][::every] for m in parts]
        return [x for x in [*marks, 10.0 ** decades[-1] * 10] if low <= x <= high * 1.0001]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= max(m for m in (1, 2, 5) if (high - low) / (m * step) >= 4)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def svg(panels, width=960, tall=320):
    """A picture of panels below each other. A panel: (title, name of x, series, names of x =
    0, 1, … for bars, or None); a series: (name, colour, "line" "thin" "dots" or "bars", points
    (x, y) or (x, y, standard error)). An axis is logarithmic where its values span a factor of 20
    (y: of 4) and are positive."""
    css = "svg{color:#222;font:13px sans-serif}.bg{fill:#fff}" + STYLE
    light, dark = (
        [f".c{i}{{color:{c}}}" for i, c in enumerate(PALETTE[k : k + 8])] for k in (0, 8)
    )
    night = "svg,.err{color:#ddd}.bg{fill:#14171a}" + "".join(dark)
    css += "".join(light) + f"@media(prefers-color-scheme:dark){{{night}}}"
    out, y0 = [], 0
    for title, x_name, series, names in panels:
        high = max(tall, 100 + 18 * len(series))
        out += draw_panel(html.escape(title), html.escape(x_name), series, names, y0, high)
        y0 += high
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y0}" role="img">'
    paper = '<rect class="bg" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{css}</style>", paper, *out, "</svg>\n"])


def draw_panel(title, x_name, series, names, y0, high, left=70, right=640):
    """The elements of one panel of `svg`, whose top is at y0."""
    top, bottom = y0 + 40, y0 + high - 60
    points = [(p[0], p[1], (p[2] if len(p) > 2 else None) or 0) for s in series for p in s[3]]
    if not points:
        return [f'<text x="{left}" y="{top}">{title}: nothing to show</text>']
    xs = [-0.5, len(names) - 0.5] if names else [p[0] for p in points]
    ys = [p[1] + sign * p[2] for p in points for sign in (-1, 1)] + [0.0] * bool(names)

    def axis(values, start, end, factor, padding):
        low, up = min(values), max(values)
        log = low > 0 and up / low > factor
        spare = (up - low or abs(up) or 1) * padding
        low, up = (
            (low, up * (up / low) ** padding) if log else (low - spare * (low != 0), up + spare)
        )
        f = math.log10 if log else float
        place = lambda v: start + (f(v) - f(low)) / (f(up) - f(low) or 1) * (end - start)
        return place, ticks(low, up, log)

    x_at, x_ticks = axis(xs, left, right, 20, 0 if names else 0.03)
    y_at, y_ticks = axis(ys, bottom, top, 4, 0.05)
    out = [f'<text x="{left}" y="{y0 + 24}" font-weight="bold">{title}</text>']
    for y in y_ticks:
        h = f"{y_at(y):.1f}"
        out.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{h}" y2="{h}"/>')
        out.append(f'<text x="{left - 6}" y="{h}" dy="4" text-anchor="end">{short(y)}</text>')
    for x, name in enumerate(names) if names else ((x, short(x)) for x in x_ticks):
        place = f'x="{x_at(x):.1f}" y="{bottom + 18}"'
        if names and 7 * len(name) > (right - left) / len(names):  # too long to lie flat
            place += f' transform="rotate(-20 {x_at(x):.1f} {bottom + 18})"'
        out.append(f'<text {place} text-anchor="middle">{html.escape(name)}</text>')
    out.append(f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>')
    out.append(f'<text x="{right}" y="{bottom + 40}" text-anchor="end">{x_name}</text>')
    slot = (right - left) / len(names) * 0.8 / len(series) if names else 0
    for k, (_, colour, kind, its) in enumerate(series):
        dash = ' stroke-dasharray="6 3"' * (colour // 8 % 2)  # colours come again after eight
        out.append(f'<g class="c{colour % 8}">')
        if kind in ("line", "thin") and its:
            path = "L".join(f"{x_at(p[0]):.1f} {y_at(p[1]):.1f}" for p in its)
            out.append(f'<path class="{kind}"{dash} d="M{path}"/>')
        for x, y, *error in its:
            h, w = y_at(y), x_at(x) + (k - len(series) / 2) * slot
            if kind == "bars":
                a, b = sorted((h, y_at(0)))
                size = f'width="{0.9 * slot:.1f}" height="{b - a:.1f}"'
                out.append(f'<rect class="bars" x="{w:.1f}" y="{a:.1f}" {size}/>')
            elif kind == "dots" or kind == "line" and len(its) < 30:
                out.append(f'<circle class="dots" cx="{x_at(x):.1f}" cy="{h:.1f}" r="3.5"/>')
            if error and error[0]:
                ends = f"{y_at(y - error[0]):.1f}V{y_at(y + error[0]):.1f}"
                out.append(f'<path class="err" d="M{w + 0.45 * slot:.1f} {ends}"/>')
        out.append("</g>")
    named = [(name, colour) for name, colour, _, its in series if name]
    for k, (name, colour) in enumerate(named):
        h = top + 18 * k
        out.append(f'<rect class="c{colour % 8} bars" x="{right + 20}" y="{h}" width="12" '
                   f'height="12"/><text x="{right + 38}" y="{h + 11}">'
                   f"{html.escape(name[-38:])}</text>")  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------
# Planning: how large a network and how much text for a budget; a curve through finished runs

# Expected loss E + A / N^alpha + B / D^beta of N parameters after D tokens: the form of Hoffmann et
# al. 2022 (Chinchilla), approach 3, with the constants that Besiroglu et al. 2024 found for it.
CHINCHILLA = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


def chinchilla_loss(n, d):
    """Nats per token of Chinchilla's tokenizer and data."""
    k = CHINCHILLA
    return k["E"] + k["A"] / n ** k["alpha"] + k["B"] / d ** k["beta"]


def chinchilla_params(c):
    """The N that minimizes the loss where 6 N D = c FLOPs (Hoffmann et al. 2022, equation 4)."""
    k = CHINCHILLA
    ratio = k["alpha"] * k["A"] / (k["beta"] * k["B"])
    return ratio ** (1 / (k["alpha"] + k["beta"])) * (c / 6) ** (1 / (1 + k["alpha"] / k["beta"]))


def budget(peak):
    """(N, D) that the settings ask for; what they leave open is compute-optimal."""
    given = {
        key: globals()[key] for key in ("flops", "hours", "params", "tokens", "devices", "mfu")
    }
    for key, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key}={value:g}: expected a number above 0")
    if mfu > 1:
        raise UserError(f"mfu={mfu}: expected a fraction of the peak, at most 1")
    wanted = [key for key in ("flops", "hours", "params", "tokens") if given[key]]
    if not 1 <= len(wanted) <= 2 or wanted == ["flops", "hours"]:
        raise UserError("--plan: expected --flops or --hours, --params or --tokens, or two of them")
    c = flops or (hours and 3600 * hours * peak * devices * mfu)
    if c is None and len(wanted) == 1:  # the budget for which this one is optimal
        low, high = 0.0, 60.0  # decades
        for _ in range(100):
            mid = (low + high) / 2
            n = chinchilla_params(10**mid)
            small = n < params if params else 10**mid / (6 * n) < tokens
            low, high = (mid, high) if small else (low, mid)
        c = 10**low
    n = params or (c / (6 * tokens) if tokens else chinchilla_params(c))
    return n, tokens or c / (6 * n), c


def peak_of(name):
    """(device, its peak FLOP/s) for a name in model.PEAK_TFLOPS, of any case."""
    known = {known.lower(): known for known in core.PEAK_TFLOPS}
    if name.lower() not in known:
        raise UserError(f"--device={name}: with --plan expected one of {', '.join(known.values())}")
    return known[name.lower()], 1e12 * core.PEAK_TFLOPS[known[name.lower()]]


def suggest_shape(n, vocab_size, seq_len):
    """The GPTConfig of about n parameters (at most 10 % off), near 64 of width a layer, which is
    GPT-2's; the loss hardly depends on it (Kaplan et al. 2020, 3.1)."""
    found = []
    head_dim, every = 32 if n < 5e6 else 64 if n < 3e9 else 128, 8 if n > 1e9 else 1
    for n_head in range(every, 257, every):
        shape = dict(vocab_size=vocab_size, n_ctx=seq_len, n_head=n_head, n_embd=head_dim * n_head)
        shape["n_kv_head"] = 8 if n > 1e9 else n_head
        with torch.device("meta"):  # networks without memory: what one layer adds, what none has
            one, two = (core.n_params(core.GPT(core.GPTConfig(n_layer=i, **shape))) for i in (1, 2))
        if one > 1.1 * n:  # and so are all wider ones
            break
        n_layer = max(1, round((n - one) / (two - one)) + 1)
        off = math.log((one + (n_layer - 1) * (two - one)) / n)
        if abs(off) < math.log(1.1):
            odd = abs(math.log(head_dim * n_head / n_layer / 64)) + 5 * abs(off)
            found.append((odd, n_layer, shape, one + (n_layer - 1) * (two - one)))
    if not found:
        why = f"no shape of {n:.3g} parameters with a vocabulary of {vocab_size:,}"
        raise UserError(f"{why}: ask for another size, or prepare data with a smaller --vocab_size")
    _, n_layer, shape, count = min(found, key=lambda f: f[:2])
    return core.GPTConfig(n_layer=n_layer, **shape), count


def make_plan():
    """Print a recipe for train.py, with what speaks for it as comments."""
    name, peak = peak_of("H100" if device == "auto" else device)
    n, d, c = budget(peak)
    meta = core.read_json(Path("data") / dataset / "meta.json", {})
    vocab_size = -(-meta.get("n_vocab", 50257) // 64) * 64
    seq_len = next((t for t, least in ((2048, 1e9), (1024, 5e7), (512, 1e7)) if n >= least), 256)
    shape, count = suggest_shape(n, vocab_size, seq_len)
    each = core.flops_per_token(shape, seq_len)
    if c and not tokens:
        d = c / each if not params or flops or hours else d  # the budget holds in real FLOPs
    total = each * d
    # Batch and peak rate by compute: Bi et al. 2024 (DeepSeek LLM), equation 1.
    unit = seq_len * devices
    batch = max(unit, round(2 ** round(math.log2(0.292 * total**0.3271)) / unit) * unit)
    steps = max(1, round(d / batch))
    fixed, window = core.memory_estimate(
        shape, count, 1, seq_len, torch.bfloat16, moments=1, device_type="cuda"
    )
    seconds = total / (peak * devices * mfu)
    k = CHINCHILLA
    source = f"that of data/{dataset}" if meta else f"GPT-2's: data/{dataset} is not prepared"
    told = [
        f"A plan for {total:.3g} FLOPs: {count:,} parameters on {d:.3g} tokens",
        "Chinchilla, approach 3 (Hoffmann et al. 2022; constants of Besiroglu et al. 2024):",
        f"  L(N, D) = {k['E']} + {k['A']} / N^{k['alpha']} + {k['B']} / D^{k['beta']}",
        f"  asked for or optimal: N = {n:.4g}, {d / count:.1f} tokens a parameter",
        f"  expected loss {chinchilla_loss(count, d):.3f}, in nats per token of their data and "
        "tokenizer:",
        "  compare plans by it; it is not the loss or the bits per byte that this run will have",
        f"FLOPs per token: {each:.4g} of this shape, {each / (6 * count):.2f} times 6 N",
        f"  (which leaves out the attention over {seq_len} tokens)",
        f"time: {core.duration(seconds)} on {devices} {name} at {100 * mfu:.0f} % of the peak",
        f"memory: {fixed / 2**30:.2f} GiB on each device + {window / 2**30:.3f} GiB a window of a "
        "micro-batch",
        f"vocabulary: {vocab_size:,}, {source}",
        "batch_tokens and learning_rate: Bi et al. 2024 (DeepSeek LLM), from 1e17 to 2e19 FLOPs",
    ]
    if meta:
        epochs = d / max(1, meta.get("train", {}).get("tokens", 0))
        told.append(f"data: {epochs:.2g} epochs of data/{dataset}"
                    + (": beyond 4, repeated text teaches little (Muennighoff et al. 2023)"
                       if epochs > 4 else ""))  # fmt: skip
    recipe = dict(dataset=dataset, out_dir="out/plan", n_layer=shape.n_layer, n_head=shape.n_head)
    recipe |= dict(n_kv_head=shape.n_kv_head, n_embd=shape.n_embd, n_hidden=shape.n_hidden)
    recipe |= dict(seq_len=seq_len, batch_tokens=batch, max_steps=None, max_tokens=steps * batch)
    recipe |= dict(learning_rate=float(f"{0.3118 * total**-0.125:.1e}"))
    recipe |= dict(warmup_steps=min(1000, steps // 20), eval_every=-(-steps // 20))
    recipe |= dict(save_every=-(-steps // 20))
    print(
        "\n".join([*(f"# {line}" for line in told), *(f"{a} = {b!r}" for a, b in recipe.items())])
    )


def finished(run):
    """(parameters, tokens, last validation loss, settings that the loss depends on) of a run."""
    if not (seen := curve(read_log(run), "val_loss", "tokens")):
        raise UserError(f"{run}: its log has no val_loss with tokens: only train.py's runs fit")
    path = Path(run) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{run}: no model.safetensors to count parameters in")
    with open(path, "rb") as file:
        tensors, _ = core.read_header(path, file)
    config = core.read_json(Path(run) / "run.json", {}).get("config", {})
    same = {key: config.get(key) for key in ("dataset", "seq_len", "eval_tokens")}
    return sum(math.prod(shape) for _, shape in tensors.values()), *seen[-1], same


def least_squares(columns, y):
    """(rms error, coefficients >= 0 of the columns (runs, k) that come nearest y): of every subset
    of the columns the best whose plain solution has no negative."""
    best = (math.inf, np.zeros(columns.shape[1]))
    for chosen in product((False, True), repeat=columns.shape[1]):
        part, solution = columns[:, list(chosen)], np.zeros(columns.shape[1])
        solution[list(chosen)] = np.linalg.lstsq(part, y, rcond=None)[0]
        error = float(np.sqrt(np.mean((columns @ solution - y) ** 2)))
        if solution.min() >= 0 and error < best[0]:
            best = error, solution
    return best


def fit_law(sizes, losses, powers=None):
    """Fit L = E + sum over k of A_k / size_k^a_k to sizes (runs, k), losses (runs,), in least
    squares; `powers` holds the exponents a. Returns (rms error, E and A, the exponents)."""
    middle = np.exp(np.log(sizes).mean(0))  # columns near 1 are solved exactly

    def at(exponents):
        columns = np.c_[np.ones(len(losses)), (middle / sizes) ** exponents]
        error, solution = least_squares(columns, losses)
        return error, solution * np.r_[1, middle**exponents], np.array(exponents)

    if powers is not None:
        return at(powers)
    grids = [np.linspace(0.05, 2, 24)] * sizes.shape[1]
    for spread in 0.09 * 0.4 ** np.arange(14):  # ever finer around the best
        best = min((at(exponents) for exponents in product(*grids)), key=lambda f: f[0])
        grids = [np.clip(a + spread * np.linspace(-1, 1, 7), 0.01, 3) for a in best[2]]
    return best


def predict(law, sizes):
    return law[1][0] + (law[1][1:] / np.asarray(sizes, float) ** law[2]).sum(-1)


def fit_runs():
    """Fit a scaling curve through the last validation losses of `compare`; print what it says and
    what it cannot, and draw it."""
    runs = runs_to_compare()
    if len(runs) < 3:
        raise UserError(f"a scaling curve needs 3 runs or more, not {len(runs)}")
    n, d, losses, same = zip(*map(finished, runs))
    if odd := [key for key in same[0] if any(s[key] != same[0][key] for s in same)]:
        raise UserError(f"the runs differ in {', '.join(odd)}: their losses are not comparable")
    all_sizes, losses = np.array([n, d], float).T, np.array(losses)
    varies = [k for k in (0, 1) if len(set(all_sizes[:, k])) > 1]
    if not varies:
        raise UserError("the runs are all of one size and length: nothing to fit")
    sizes, letters = all_sizes[:, varies], [("N", "D")[k] for k in varies]
    free = len(runs) > 1 + 2 * len(varies)
    powers = None if free else [CHINCHILLA[("alpha", "beta")[k]] for k in varies]
    unknowns = 1 + len(varies) * (2 if free else 1)
    if len(runs) <= unknowns:
        raise UserError(f"{len(runs)} runs that differ in N and D: expected {unknowns + 1} or more")
    law = fit_law(sizes, losses, powers)
    without = [fit_law(np.delete(sizes, i, 0), np.delete(losses, i), powers)
               for i in range(len(runs))]  # fmt: skip
    errors = np.array([abs(predict(w, sizes[i]) - losses[i]) for i, w in enumerate(without)])
    rows = [["run", "parameters N", "tokens D", "val_loss", "fitted", "predicted by the others"]]
    for i, run in enumerate(runs):
        made = [f"{losses[i]:.4f}", f"{predict(law, sizes[i]):.4f}"]
        rows.append([run, f"{n[i]:,}", f"{d[i]:,}", *made, f"{predict(without[i], sizes[i]):.4f}"])
    terms = [f"{a:.4g} / {x}^{p:.3f}" for a, x, p in zip(law[1][1:], letters, law[2])]
    far = predict(law, 10 * sizes.max(0)), [predict(w, 10 * sizes.max(0)) for w in without]
    held = (
        "" if free else f", exponents held at Chinchilla's for want of {2 + 2 * len(varies)} runs"
    )
    both = " and ".join(letters)
    told = [
        f"L = {' + '.join([f'{law[1][0]:.4f}', *terms])}, in nats per token of this data",
        f"{unknowns} unknowns from {len(runs)} runs{held}; rms error {law[0]:.4f}",
        f"Leave one out: a run is predicted by the others {errors.mean():.4f} off on average, "
        f"{errors.max():.4f} at worst, where the losses span {np.ptp(losses):.4f}.",
        f"At ten times the largest {both}: {far[0]:.3f}; without one of the runs {min(far[1]):.3f} "
        f"to {max(far[1]):.3f}.",
    ]
    if free:
        ranges = np.array([w[2] for w in without])
        told.append("Without one of the runs the exponent of " + ", of ".join(
            f"{x} is {low:.2f} to {high:.2f}"
            for x, low, high in zip(letters, ranges.min(0), ranges.max(0))))  # fmt: skip
    if law[1][0] == 0:
        told.append(
            "E is 0, the least it may be: these runs are too far from their floor to see it."
        )
    told += [
        f"It may be read between the smallest and the largest {both}, to about the error above.",
        "It does not show what E is (E and the exponents trade off), what holds far beyond the "
        "largest run,",
        "or a difference below the noise of one seed a size; and it blames the size for what a "
        "learning rate",
        "that fits one size better than another has done.",
    ]
    print("\n".join([*table(rows), "", *told]))
    series, x = [], varies[0]
    others = sorted({size[1 - x] for size in all_sizes})
    for colour, other in enumerate(others):
        its = [(s[x], loss) for s, loss in zip(all_sizes, losses) if s[1 - x] == other]
        along = np.geomspace(all_sizes[:, x].min() / 1.2, all_sizes[:, x].max() * 3, 60)
        line = [[size, other] if x == 0 else [other, size] for size in along]
        points = list(zip(along, predict(law, np.array(line)[:, varies])))
        label = f"{'DN'[x]} = {short(float(f'{other:.3g}'))}" if len(others) > 1 else "fit"
        series += [(label, colour, "thin", points), ("", colour, "dots", its)]
    name = "parameters" if x == 0 else "tokens"
    panel = (f"validation loss and L = {' + '.join(['E', *terms])}", name, series, None)
    write_report(Path(report).with_name("scaling.svg"), svg([panel]))


# --------------------------------------------------------------------------------------------------
# Memorization: generated text that stands word for word in the training shards

BASE = 0x9E3779B97F4A7C15  # odd, of 64 bits
PIECE = 1 << 20  # tokens of a shard looked through at once
GAP = np.uint32(2**32 - 1)  # between what is kept of the shards: no id of a token


def open_shards(kind):
    """The token shards of the dataset, train or val, as memory maps (llm.c's format)."""
    kinds = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
    paths, shards = sorted((Path("data") / dataset).glob(f"{kind}_*.bin")), []
    for path in paths:
        header = np.fromfile(path, dtype="<i4", count=256)
        width = kinds.get(tuple(header[:2].tolist()))
        if width is None or path.stat().st_size != 1024 + int(header[2]) * width.itemsize:
            raise UserError(f"{path}: not a whole token shard (python prepare.py makes them)")
        shards.append(np.memmap(path, width, "r", 1024, (int(header[2]),)))
    if not shards:
        raise UserError(f"data/{dataset}: no {kind} shards: python prepare.py --dataset={dataset}")
    return shards


def hashes(x, n):
    """A 64-bit hash of each n-gram of x: (len(x) - n + 1,) uint64. Its high bits are the best."""
    x, h = x.astype(np.uint64), np.zeros(max(0, len(x) - n + 1), np.uint64)
    for k in range(n):
        h = h * np.uint64(BASE) + x[k : k + len(h)] + np.uint64(1)
    return h * np.uint64(BASE)


def pieces(shards, longest):
    """The shards in pieces that overlap so that no text of up to `longest` tokens is cut."""
    for shard in shards:
        for start in range(0, len(shard), PIECE):
            yield np.asarray(shard[start : start + PIECE + longest - 1])


def look_up(parts, texts, n, keep=False):
    """Which n-grams of the texts, arrays of ids, stand in the parts of the shards, exactly: a list
    of bool arrays (len(text) - n + 1,). With `keep` also what these n-grams cover of each part.

    The texts are the index, not the shards, which are read through once, a piece at a time: about
    60 bytes a token of PIECE, whatever their size, beside what is kept (4 bytes a token).
    A filter of 2^22 bits and a binary search find candidates, each compared token by token."""
    mine = [hashes(text, n) for text in texts]
    windows = np.lib.stride_tricks.sliding_window_view
    grams = np.concatenate([windows(t, n) if len(t) >= n else t[:0].reshape(0, n) for t in texts])
    index, first, which = np.unique(np.concatenate(mine), return_index=True, return_inverse=True)
    if (grams[first][which] != grams).any():
        raise RuntimeError("two n-grams share a 64-bit hash: change BASE")
    grams, kept = grams[first], []
    seen, maybe = np.zeros(len(index), bool), np.zeros(1 << 22, bool)
    maybe[index >> np.uint64(42)] = True
    for piece in parts:
        h = hashes(piece, n)
        at = np.flatnonzero(maybe[h >> np.uint64(42)])
        found = np.searchsorted(index, h[at]).clip(max=len(index) - 1)
        good = index[found] == h[at]
        at, found = at[good], found[good]
        for k in range(n):
            good = piece[at + k] == grams[found, k]
            at, found = at[good], found[good]
        seen[found] = True
        if keep and len(at):
            kept.append(stretches(piece, at, n))
    return np.split(seen[which], np.cumsum([len(h) for h in mine])[:-1]), kept


def stretches(piece, at, n):
    """The tokens of `piece` that the n-grams at the ascending positions `at` cover, with GAP behind
    each stretch of positions in a row."""
    new = np.flatnonzero(np.diff(at, prepend=-2) > 1)
    starts, ends = at[new], at[np.append(new[1:], len(at)) - 1] + n
    sizes = ends - starts + 1
    begins = np.cumsum(sizes) - sizes
    index = np.arange(sizes.sum()) + np.repeat(starts - begins, sizes)
    out = piece[index.clip(max=len(piece) - 1)].astype(np.uint32)
    out[begins + sizes - 1] = GAP
    return out


def longest_runs(shards, texts, n):
    """For each text, an array of ids: (which of its n-grams stand in the shards; the length of its
    longest run of tokens that does). Runs longer than n are looked for only in what n-grams of the
    texts cover, which is less with each token."""
    texts = [np.asarray(text, np.uint32) for text in texts]
    runs, widest = np.zeros(len(texts), int), max(map(len, texts))
    found, kept = look_up(pieces(shards, widest), texts, n, keep=True)
    alive, hits, length = range(len(texts)), found, n
    while alive := [i for i, hit in zip(alive, hits) if hit.any()]:
        runs[alive], length = length, length + 1
        hits, kept = look_up(kept, [texts[i] for i in alive], length, keep=True)
    for length in range(n - 1, 0, -1):  # the others
        if alive := [i for i in range(len(texts)) if not runs[i]]:
            hits, _ = look_up(pieces(shards, length), [texts[i] for i in alive], length)
            runs[[i for i, hit in zip(alive, hits) if hit.any()]] = length
    return found, runs


def draw_windows(shards, size, many, without):
    """`many` windows of `size` tokens from anywhere in the shards, none with the id `without`."""
    rng, ends = np.random.default_rng(seed), np.cumsum([max(0, len(s) - size) for s in shards])
    windows = []
    for _ in range(20 * many if ends[-1] else 0):
        at = int(rng.integers(ends[-1]))
        s = int(np.searchsorted(ends, at, side="right"))
        at -= int(ends[s - 1]) if s else 0
        window = np.asarray(shards[s][at : at + size]).astype(np.int64)
        windows += [window] if without not in window else []
        if len(windows) == many:
            return windows
    raise UserError(f"data/{dataset}: too few stretches of {size} tokens within a document")


def measure_memorized():
    """Generate with prompts from training and without, look the texts up in the training shards,
    validation text beside them: {name: {value, stderr, n}}, as in results.json."""
    for key in ("num_texts", "prompt_tokens", "text_tokens", "ngram"):
        if globals()[key] < 1:
            raise UserError(f"{key}={globals()[key]}: expected 1 or more")
    if text_tokens < ngram:
        raise UserError(f"text_tokens={text_tokens}: expected {ngram} (ngram) or more")
    run, train, val = core.setup(device), open_shards("train"), open_shards("val")
    net, tok = core.load(model, run.device)
    theirs = core.Tokenizer.from_folder(Path("data") / dataset)
    if (theirs.bytes, theirs.eot_id) != (tok.bytes, tok.eot_id):
        raise UserError(f"data/{dataset} and {model} have different tokenizers")
    if prompt_tokens + text_tokens > net.config.n_ctx:
        raise UserError(f"prompt_tokens + text_tokens: over {net.config.n_ctx}, the context")
    windows = draw_windows(train, prompt_tokens + text_tokens, num_texts, tok.eot_id)
    made = []  # greedy behind prompts, drawn without
    for prompts, temperature in (
        ([w[:prompt_tokens].tolist() for w in windows], 0),
        ([[tok.eot_id]] * num_texts, 1),
    ):
        made.append([])
        for i in range(0, num_texts, 32):  # at once
            how = dict(max_new_tokens=text_tokens, temperature=temperature, seed=seed + i)
            texts = core.generate(net, tok, prompts[i : i + 32], **how)
            made[-1] += [np.array(g.ids, np.int64) for g in texts]
    whole = [np.array_equal(g, w[prompt_tokens:]) for g, w in zip(made[0], windows)]
    cut = [shard[i : i + text_tokens] for shard in val for i in range(0, len(shard), text_tokens)]
    made.append(cut[: PIECE // text_tokens])
    names = ["prompted by training", "without a prompt", "validation text"]
    found, runs = longest_runs(train, sum(made, []), ngram)
    rows = [
        ["text", "texts", "tokens", "longest run: median", "mean", "most", f"{ngram}-grams found"]
    ]
    scores, at = {}, 0
    for name, texts in zip(names, made):
        its, hits = runs[at : at + len(texts)], found[at : at + len(texts)]
        at += len(texts)
        hits = [h for h in hits if len(h)]
        total, hit = sum(map(len, hits)), sum(int(h.sum()) for h in hits)
        share = hit / max(1, total)  # of all n-grams; its error is that of a ratio over texts
        error = math.sqrt(sum((h.sum() - share * len(h)) ** 2 for h in hits)) / max(1, total)
        scores[f"{ngram}_grams, {name}"] = {"value": share, "stderr": error, "n": len(hits)}
        middle = [f"{np.median(its):g}", f"{its.mean():.1f}", int(its.max())]
        shown = f"{share:.4f} ± {error:.4f}"
        rows.append([name, len(texts), sum(map(len, texts)), *middle, shown])
    p = sum(whole) / num_texts
    error = math.sqrt(p * (1 - p) / num_texts)
    scores["reproduced"] = {"value": p, "stderr": error, "n": num_texts}
    print(f"{model} against {sum(map(len, train)):,} training tokens of data/{dataset}")
    print("\n".join(table(rows)))
    print(
        f"{sum(whole)} of {num_texts} continuations of {prompt_tokens} training tokens go on as "
        f"training does, word for word, for {text_tokens} tokens: {p:.4f} ± {error:.4f}"
    )
    return scores


def main():
    if plan:
        if compare and any((flops, hours, params, tokens)):
            raise UserError("--plan: either --compare, to fit a curve, or a budget, for a recipe")
        return fit_runs() if compare else make_plan()
    if compare:
        return compare_runs()
    if memorized:
        return measure_memorized()
    raise UserError("nothing to do: --compare, --plan or --memorized")


if __name__ == "__main__":
    main()
