"""Charts as SVG, text that a browser shows as a picture: curves, dots and standard errors."""

import html
import math
from dataclasses import dataclass, field, replace

from barelm.scores import is_finite

PALETTE = "#2a7fc0 #d55e00 #00946a #c4609c #a07c00 #7a86f0 #9a62b8 #808080".split()
STYLE = """
svg { color: #222; font: 13px sans-serif } .paper { fill: #fff }
@media (prefers-color-scheme:dark) { svg { color: #ddd } .paper { fill: #14171a } }
text, circle { fill: currentColor } path { fill: none; stroke: currentColor }
.grid { opacity: .15 } .line, .err { stroke-width: 2 } .thin { opacity: .6 } .raw { opacity: .35 }
"""
WIDTH = 960  # of the picture


@dataclass
class Series:
    """Points (x, y) or (x, y, standard error or None), drawn as a `line` (with dots, where it has
    few points), a `thin` or faint `raw` line, or `dots`; with a name it is in the legend."""

    name: str
    colour: int
    kind: str
    points: list


@dataclass
class Chart:
    """A frame with its series. names: what stands at x = 0, 1, … where x is no number."""

    title: str
    x_name: str
    series: list
    names: list = field(default_factory=list)
    is_small: bool = False  # two of these stand side by side, without a legend
    log_x: bool = True  # whether an axis is logarithmic where its values span much
    log_y: bool = True
    span: tuple = ()  # what the axis of x has to show, whatever the points


@dataclass(frozen=True)
class Frame:
    """Where the axes of a chart are, in pixels from its upper left corner."""

    left: float
    right: float
    top: float
    bottom: float
    has_legend: bool  # right of it


LARGE = Frame(70, 640, 40, 260, True)
SMALL = Frame(70, 450, 40, 160, False)


@dataclass
class Axis:
    """The values low to high, drawn from one pixel to another."""

    low: float
    high: float
    first_pixel: float
    last_pixel: float
    is_log: bool

    def pixel(self, value: float) -> float:
        scale = math.log10 if self.is_log else float
        span = scale(self.high) - scale(self.low) or 1  # of a single value any will do
        share = (scale(value) - scale(self.low)) / span  # 0 at low, 1 at high
        return self.first_pixel + share * (self.last_pixel - self.first_pixel)


def make_axis(
    values: list, first_pixel: float, last_pixel: float, factor: float, padding: float
) -> Axis:
    """The Axis that shows all values, logarithmic where they are positive and span more than
    `factor`; padding: a share of their span that stays free at the ends."""
    low = min(values)
    high = max(values)
    is_log = low > 0 and high / low > factor
    if is_log:
        high *= (high / low) ** padding  # above alone: the lowest values are what matters
    else:
        span = high - low
        if span <= 1e-6 * abs(high):  # one value, but for rounding
            span = abs(high) or 1
        spare = span * padding
        if low != 0:  # nothing below zero is shown where no value is
            low -= spare
        high += spare
    return Axis(low, high, first_pixel, last_pixel, is_log)


def ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Round numbers between low and high: some 1, 2, 5 of each decade, or evenly spaced ones."""
    if is_log and high / low > 5:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = math.ceil(len(decades) / 8)  # at most eight of them
        mantissas = (1, 2, 5) if len(decades) < 5 else (1,)
        marks = []
        for exponent in decades[::every]:
            marks += [m * 10.0**exponent for m in mantissas]
        return [x for x in marks if low <= x <= high * 1.0001]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))  # a power of ten at first
    step *= max(m for m in (1, 2, 5) if (high - low) / (m * step) >= 4)  # four steps or more
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def short(x: float) -> str:
    """A number as an axis has it: 0.25, 3, 200k, 1.5M, 1e+15."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(x) < 1e12:
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"


def text(x: float, y: float, words: str, attributes: str = "") -> str:
    # Escaped: a run's name is a folder's, which may hold < and &.
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{html.escape(words)}</text>'


def picture(charts: list[Chart]) -> str:
    """The text of an SVG file with the charts below each other, small ones two in a row."""
    elements = []
    x, y = 0, 0
    row_height = 0
    for chart in charts:
        frame = frame_of(chart)
        height = frame.bottom + 60
        if x == 0 or not chart.is_small or row_height != height:  # it begins a row
            y += row_height
            x = 0
        elements.append(f'<g transform="translate({x} {y})">')
        elements += [*draw(chart, frame), "</g>"]
        row_height = height
        x = WIDTH // 2 if chart.is_small and x == 0 else 0
    y += row_height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">'
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", paper, *elements, "</svg>\n"])


def frame_of(chart: Chart) -> Frame:
    if chart.is_small:
        return SMALL
    legend = 18 * len(chart.series)  # pixels: 18 are a line
    return replace(LARGE, bottom=max(LARGE.bottom, 40 + legend))


def draw(chart: Chart, frame: Frame) -> list[str]:
    """The elements of a chart in a frame."""
    left, right, top, bottom = frame.left, frame.right, frame.top, frame.bottom
    elements = [text(left, 24, chart.title, ' font-weight="bold"')]
    xs = []
    ys = []
    for series in chart.series:
        for x, y, *error in series.points:
            spread = (error[0] if error else None) or 0
            xs.append(x)
            ys += [y - spread, y + spread]
    if not xs:
        return [*elements, text(left, top + 20, "nothing to show")]
    # SVG counts pixels downwards: the axis begins at the bottom.
    y_axis = make_axis(ys, bottom, top, factor=4 if chart.log_y else math.inf, padding=0.05)
    if chart.names:
        x_axis = make_axis([-0.5, len(chart.names) - 0.5], left, right, factor=20, padding=0)
        labels = list(enumerate(chart.names))
    else:
        xs += chart.span
        x_axis = make_axis(xs, left, right, factor=20 if chart.log_x else math.inf, padding=0.03)
        labels = [(x, short(x)) for x in ticks(x_axis.low, x_axis.high, x_axis.is_log)]
    for y in ticks(y_axis.low, y_axis.high, y_axis.is_log):
        at = y_axis.pixel(y)
        elements.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/>')
        elements.append(text(left - 6, at + 4, short(y), ' text-anchor="end"'))
    for x, label in labels:
        at = x_axis.pixel(x)
        is_long = chart.names and 7 * len(label) > (right - left) / len(chart.names)
        turn = f"rotate({-20 if is_long else 0} {at:.1f} {bottom + 18})"
        place = f' text-anchor="middle" transform="{turn}"'
        elements.append(text(at, bottom + 18, label, place))
    elements.append(f'<path d="M{left} {top}V{bottom}H{right}"/>')
    elements.append(text(right, bottom + 40, chart.x_name, ' text-anchor="end"'))
    legend_y = top
    for series in chart.series:
        elements += [
            f'<g color="{PALETTE[series.colour % 8]}">',
            *draw_series(series, x_axis, y_axis),
        ]
        if series.name and frame.has_legend:
            elements.append(f'<circle cx="{right + 24}" cy="{legend_y}" r="5"/>')
            # Of a long name its end, in which folders differ.
            elements.append(text(right + 38, legend_y + 4, series.name[-38:]))
            legend_y += 18
        elements.append("</g>")
    return elements


def draw_series(series: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    """The elements of a series: its line, then its dots and their standard errors."""
    elements = []
    points = series.points
    if series.kind != "dots" and points:
        path = "L".join(f"{x_axis.pixel(x):.1f} {y_axis.pixel(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 3"' * (series.colour // 8 % 2)  # colours return after eight
        elements.append(f'<path class="{series.kind}"{dash} d="M{path}"/>')
    if series.kind in ("thin", "raw") or (series.kind == "line" and len(points) >= 30):
        return elements
    for x, y, *error in points:
        at = x_axis.pixel(x)
        elements.append(f'<circle cx="{at:.1f}" cy="{y_axis.pixel(y):.1f}" r="3.5"/>')
        if error and error[0]:
            ends = f"{y_axis.pixel(y - error[0]):.1f}V{y_axis.pixel(y + error[0]):.1f}"
            elements.append(f'<path class="err" d="M{at:.1f} {ends}"/>')
    return elements


# --------------------------------------------------------------------------------------------------
# The curves of a run


def curve(rows: list[dict], key: str, x: str) -> list[tuple]:
    """[(x, value)] of the rows that have both as finite numbers."""
    points = []
    for row in rows:  # a row of validation has no loss, one of training no val_loss
        if is_finite(row.get(x)) and is_finite(row.get(key)):
            points.append((row[x], row[key]))
    return points


def smooth(points: list[tuple], parts: int = 50) -> list[tuple]:
    """The exponential mean over a `parts`-th of the points, at most 400 of them kept. The first
    ones count in full: the bias correction of Adam (Kingma and Ba 2015, section 3)."""
    if not points:
        return []
    span = max(1, len(points) // parts)
    average = 0.0  # biased towards this zero,
    weight = 0.0  # by what the weights of the points so far lack of 1
    smoothed = []
    for x, y in points:
        average += (y - average) / span
        weight += (1 - weight) / span
        smoothed.append((x, average / weight))
    every = math.ceil(len(smoothed) / 400)  # more than a picture shows
    return smoothed[::every] + smoothed[-1:]


TITLES = {
    "loss": "Loss",
    "ppl": "Perplexity",
    "bpb": "Bits per byte",
    "acc": "Accuracy",
    "accuracy": "Accuracy",
    "f1": "F1",
    "reward": "Reward",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "tok_s": "Tokens a second",
    "dt": "Seconds a step",
    "length": "Tokens of an answer",
    "entropy": "Entropy",
    "approx_kl": "KL divergence from the policy that sampled",
    "clipfrac": "Share of clipped ratios",
    "margin": "Margin of the rewards",
    "value_loss": "Loss of the values",
    "explained_variance": "Explained variance of the returns",
    "mtp_loss": "Loss of the tokens further ahead",
    "load_max": "Largest load of an expert, over the mean",
    "balance_loss": "Load-balancing loss",
    "z_loss": "Router z-loss",
    "router_entropy": "Router entropy",
}
NO_CURVE = ("step", "tokens", "ppl", "mfu", "mem", "dropped")  # or that of another
OF_THE_MACHINE = ("lr", "grad_norm", "tok_s", "dt")  # these stand last
MOST_CURVES = 12  # small ones


def run_charts(rows: list[dict]) -> list[Chart]:
    """The Charts of a run's log, a list of rows: the loss (of rl.py the reward) with its validation
    large, all else that the log has small."""
    keys = {}  # {what is measured: its keys in the log}, in the log's order
    for row in rows:
        for key in row:
            name = key.removeprefix("val_").partition(".")[0]  # val_loss.web is a loss
            names = keys.setdefault(name, [])
            if key not in names:
                names.append(key)
    steps = [row["step"] for row in rows]
    span = (min(steps, default=0), max(steps, default=0))
    large = "reward" if "reward" in keys else "loss"
    others = [name for name in keys if name not in (large, *OF_THE_MACHINE, *NO_CURVE)]
    others.sort(key=lambda name: not any(key.startswith("val_") for key in keys[name]))
    order = [large, *others]
    order += [name for name in OF_THE_MACHINE if name in keys]
    if "tok_s" in keys:
        order.remove("dt")  # its inverse
    charts = [run_chart(rows, large, sorted(keys.get(large, [])), span)]
    for name in order[1:]:
        chart = run_chart(rows, name, sorted(keys[name]), span)
        if chart.series and len(charts) <= MOST_CURVES:
            chart.is_small = True
            charts.append(chart)
    return charts


def thin(points: list, most: int) -> list:
    """At most about so many of the points, the last one among them: more than a picture shows."""
    every = math.ceil(len(points) / most)
    return points[:-1:every] + points[-1:]


def running_mean(points: list, part: int = 20) -> list:
    """The exponential mean over a 20th of the points so far: the end is smooth, and the steep
    beginning is where it is."""
    means = []
    mean = 0.0
    for i, (x, y) in enumerate(points, 1):
        mean += (y - mean) / max(1, i / part)
        means.append((x, mean))
    return means


def run_chart(rows: list[dict], name: str, keys: list[str], span: tuple) -> Chart:
    """The Chart of what some keys of the log say of one figure, over the steps of `span`: in
    training faint, and smoothed; in validation with dots."""
    chart = Chart(TITLES.get(name, name), "step", [], log_x=False, log_y=name == "grad_norm")
    chart.span = span
    for key in keys:
        points = curve(rows, key, "step")
        if key == "loss":  # at first it is high, and would flatten all that comes
            points = [point for point in points if point[0] >= span[1] / 100]
        if not points:
            continue
        of_source = key.partition(".")[2]
        if key.startswith("val_"):
            colour = 1 + len(chart.series) if of_source else 1
            words = f"validation{of_source and f', {of_source}'}: {points[-1][1]:.4g}"
            chart.series.append(Series(words, colour, "line", points))
        elif len(points) < 30:
            chart.series.append(Series(f"training: {points[-1][1]:.4g}", 0, "line", points))
        else:
            thinned = thin(points, 2000)
            smoothed = thin(running_mean(points), 400)
            if name == "lr":  # it has no noise
                smoothed = thinned
            else:
                chart.series.append(Series("", 0, "raw", thinned))
            words = f"training, smoothed: {smoothed[-1][1]:.4g}"
            chart.series.append(Series(words, 0, "line", smoothed))
    return chart
