"""Charts as SVG, text that a browser shows as a picture: curves, dots and standard errors."""

import html
import math
from dataclasses import dataclass, field

PALETTE = "#2a7fc0 #d55e00 #00946a #c4609c #a07c00 #7a86f0 #9a62b8 #808080".split()
STYLE = """
svg { color: #222; font: 13px sans-serif } .paper { fill: #fff }
@media (prefers-color-scheme:dark) { svg { color: #ddd } .paper { fill: #14171a } }
text, circle { fill: currentColor } path { fill: none; stroke: currentColor }
.grid { opacity: .15 } .line, .err { stroke-width: 2 } .thin { opacity: .6 }
"""
LEFT, RIGHT, TOP = 70, 640, 40  # of the frame of a chart, in pixels; the legend is right of it
WIDTH = 960  # of the picture


@dataclass
class Series:
    """Points (x, y) or (x, y, standard error or None), drawn as a `line` (with dots, where it has
    few points), a `thin` line or `dots`; with a name it is in the legend."""

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


@dataclass
class Axis:
    """The values low to high, drawn from one pixel to another."""

    low: float
    high: float
    first_pixel: float
    last_pixel: float
    is_log: bool

    def pixel(self, value):
        scale = math.log10 if self.is_log else float
        span = scale(self.high) - scale(self.low) or 1
        share = (scale(value) - scale(self.low)) / span
        return self.first_pixel + share * (self.last_pixel - self.first_pixel)


def make_axis(values, first_pixel, last_pixel, factor, padding):
    """The Axis that shows all values, logarithmic where they are positive and span more than
    `factor`; padding: a share of their span that stays free at the ends."""
    low = min(values)
    high = max(values)
    is_log = low > 0 and high / low > factor
    if is_log:
        high *= (high / low) ** padding
    else:
        spare = (high - low or abs(high) or 1) * padding
        if low != 0:  # nothing below zero is shown where no value is
            low -= spare
        high += spare
    return Axis(low, high, first_pixel, last_pixel, is_log)


def ticks(low, high, is_log):
    """Round numbers between low and high: some 1, 2, 5 of each decade, or evenly spaced ones."""
    if is_log and high / low > 5:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = math.ceil(len(decades) / 8)  # at most eight of them
        mantissas = (1, 2, 5) if len(decades) < 5 else (1,)
        marks = []
        for exponent in decades[::every]:
            marks += [m * 10.0**exponent for m in mantissas]
        return [x for x in marks if low <= x <= high * 1.0001]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= max(m for m in (1, 2, 5) if (high - low) / (m * step) >= 4)  # four steps or more
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def short(x):
    """A number as an axis has it: 0.25, 3, 200k, 1.5M, 1e+15."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(x) < 1e12:
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"


def text(x, y, words, attributes=""):
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{html.escape(words)}</text>'


def picture(charts):
    """The text of an SVG file with the charts below each other."""
    elements = []
    y = 0
    for chart in charts:
        height = max(320, 100 + 18 * len(chart.series))  # room for a line of the legend each
        elements += [f'<g transform="translate(0 {y})">', *draw(chart, height - 60), "</g>"]
        y += height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img">'
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", paper, *elements, "</svg>\n"])


def draw(chart, bottom):
    """The elements of a chart whose frame ends at the pixel `bottom`."""
    elements = [text(LEFT, 24, chart.title, ' font-weight="bold"')]
    xs = []
    ys = []
    for series in chart.series:
        for x, y, *error in series.points:
            spread = (error[0] if error else None) or 0
            xs.append(x)
            ys += [y - spread, y + spread]
    if not xs:
        return [*elements, text(LEFT, TOP + 20, "nothing to show")]
    y_axis = make_axis(ys, bottom, TOP, factor=4, padding=0.05)
    if chart.names:
        x_axis = make_axis([-0.5, len(chart.names) - 0.5], LEFT, RIGHT, factor=20, padding=0)
        labels = list(enumerate(chart.names))
    else:
        x_axis = make_axis(xs, LEFT, RIGHT, factor=20, padding=0.03)
        labels = [(x, short(x)) for x in ticks(x_axis.low, x_axis.high, x_axis.is_log)]
    for y in ticks(y_axis.low, y_axis.high, y_axis.is_log):
        at = y_axis.pixel(y)
        elements.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{RIGHT}"/>')
        elements.append(text(LEFT - 6, at + 4, short(y), ' text-anchor="end"'))
    for x, label in labels:
        at = x_axis.pixel(x)
        is_long = chart.names and 7 * len(label) > (RIGHT - LEFT) / len(chart.names)
        turn = f"rotate({-20 if is_long else 0} {at:.1f} {bottom + 18})"
        place = f' text-anchor="middle" transform="{turn}"'
        elements.append(text(at, bottom + 18, label, place))
    elements.append(f'<path d="M{LEFT} {TOP}V{bottom}H{RIGHT}"/>')
    elements.append(text(RIGHT, bottom + 40, chart.x_name, ' text-anchor="end"'))
    legend_y = TOP
    for series in chart.series:
        elements += [
            f'<g color="{PALETTE[series.colour % 8]}">',
            *draw_series(series, x_axis, y_axis),
        ]
        if series.name:
            elements.append(f'<circle cx="{RIGHT + 24}" cy="{legend_y}" r="5"/>')
            elements.append(text(RIGHT + 38, legend_y + 4, series.name[-38:]))
            legend_y += 18
        elements.append("</g>")
    return elements


def draw_series(series, x_axis, y_axis):
    """The elements of a series: its line, then its dots and their standard errors."""
    elements = []
    points = series.points
    if series.kind != "dots" and points:
        path = "L".join(f"{x_axis.pixel(x):.1f} {y_axis.pixel(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 3"' * (series.colour // 8 % 2)  # colours return after eight
        elements.append(f'<path class="{series.kind}"{dash} d="M{path}"/>')
    if series.kind == "thin" or (series.kind == "line" and len(points) >= 30):
        return elements
    for x, y, *error in points:
        at = x_axis.pixel(x)
        elements.append(f'<circle cx="{at:.1f}" cy="{y_axis.pixel(y):.1f}" r="3.5"/>')
        if error and error[0]:
            ends = f"{y_axis.pixel(y - error[0]):.1f}V{y_axis.pixel(y + error[0]):.1f}"
            elements.append(f'<path class="err" d="M{at:.1f} {ends}"/>')
    return elements
