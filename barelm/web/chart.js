// A chart of curves: its axes, its lines, and a file of it.

import { draw } from "./base.js";

// The ticks of an axis, [[value, label]]; least: the smallest step between them.
export function ticks(low, high, logarithmic, count, least = 0) {
  if (low === high) return [[low, label(low, low / 1000)]];
  if (logarithmic) {
    const all = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) {
      for (const m of high / low > 300 ? [1] : [1, 2, 5]) all.push(+(m * 10 ** p).toPrecision(2));
    }
    const inside = all.filter((t) => t >= low && t <= high);
    if (inside.length > 1) return inside.map((t) => [t, label(t, t)]);
  }
  const rough = Math.max((high - low) / count, least), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const n = Math.floor((high - first * step) / step + 1e-9) + 1;
  return Array.from({ length: n }, (_, i) => +((first + i) * step).toPrecision(12))
    .map((t) => [t, label(t, step)]);
}
// A tick's number, with the digits that tell it from one a step away.
function label(t, step) {
  if (!t) return "0";
  const power = (x) => Math.floor(Math.log10(Math.abs(x)) + 1e-9);
  const digits = Math.max(1, Math.min(power(t) - power(step) + 1, 15));
  if (Math.abs(t) < 0.01) return (+t.toPrecision(digits)).toExponential();
  if (Math.abs(t) < 1e4) return String(+t.toPrecision(digits));
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: digits })
    .format(t);
}

// An exponential moving average of points {x, y}: each value keeps `weight` of the average before
// it. It is divided by what the weights so far add up to, so that the first ones count in full.
export function smoothed(points, weight) {
  let average = 0, sum = 0;
  return points.map((point) => {
    average = weight * average + (1 - weight) * point.y;
    sum = weight * sum + (1 - weight);
    return { ...point, y: average / sum };
  });
}

function scale([low, high], logarithmic, from, to) {
  const f = logarithmic ? Math.log : (v) => v;
  return (v) => from + (to - from) * (f(v) - f(low)) / (f(high) - f(low) || 1);
}

// [the least, the largest]; not Math.min(...), which takes so many values and no more.
export function range(values) {
  return values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
}

// Draw lines [{points: [{x, y}], kind, colour}] into an svg element: returns the function from x to
// pixels. kind: a class, "raw", "train" or "val"; span: the first and last x. A line of few
// evaluations has dots.
export function drawLines(svg, lines, { span, logx, logy, axis, least }) {
  const width = svg.clientWidth, height = svg.clientHeight;
  const pad = { left: 44, top: 8, bottom: 20 }, right = width - 12;
  let spanY = range(lines.flatMap(({ points }) => points.map((p) => p.y)));
  if (spanY[1] - spanY[0] < 1e-9 * Math.abs(spanY[1])) spanY = [spanY[0], spanY[0]]; // rounding
  const isLog = logy && spanY[0] > 0;
  const x = scale(span, logx, pad.left, right);
  const y = scale(spanY, isLog, height - pad.bottom, pad.top);
  const parts = [];
  for (const [t, text] of ticks(...spanY, isLog, height / 36)) {
    parts.push(draw("line", { class: "grid", x1: pad.left, x2: right, y1: y(t), y2: y(t) }),
      draw("text", { x: pad.left - 6, y: y(t) + 4, "text-anchor": "end" }, text));
  }
  for (const [t, text] of ticks(...span, logx, width / 90, least)) {
    parts.push(draw("text", { x: x(t), y: height - 4, "text-anchor": "middle" }, text));
  }
  parts.push(draw("text", { class: "axis", x: 0, y: height - 4 }, axis));
  for (const { points, kind, colour } of lines) {
    const places = points.map((p) => `${x(p.x).toFixed(1)},${y(p.y).toFixed(1)}`).join(" ");
    if (points.length) {
      parts.push(draw("polyline", { class: `line ${kind} ${colour}`, points: places }));
    }
    if (points.length === 1 || (kind === "val" && points.length < 60)) {
      parts.push(...points.map((p) => draw("circle", { class: `dot ${colour}`, cx: x(p.x),
        cy: y(p.y), r: 2.5 })));
    }
  }
  const mark = draw("line", { class: "cursor", y1: pad.top, y2: height - pad.bottom });
  svg.replaceChildren(...parts, mark);
  return { x, mark };
}

// ---------------------------------------------------------------------------------------------
// Files

const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity",
  "font-size", "font-family", "text-anchor"];

// An element with its children, and what the page's style makes of them as attributes: a file has
// no style sheet of ours.
function standalone(element) {
  const copy = element.cloneNode(false), style = getComputedStyle(element);
  for (const name of ["class", "tabindex", "role", "aria-label"]) copy.removeAttribute(name);
  if (style.display === "none" || style.visibility === "hidden") return draw("g");
  for (const name of STYLES) copy.setAttribute(name, style.getPropertyValue(name));
  for (const child of element.childNodes) {
    copy.append(child.nodeType === Node.ELEMENT_NODE ? standalone(child) : child.cloneNode());
  }
  return copy;
}

// One svg of charts below each other. charts: [{title, svg}]; legend: [{name, colour: a value}];
// note: what the lines are.
export function picture(charts, legend, note) {
  const style = getComputedStyle(document.body), margin = 16, line = 20;
  const text = (x, y, words, more = {}) => draw("text", { x, y, fill: style.color,
    "font-size": 13, "font-family": "system-ui, sans-serif", ...more }, words);
  const width = Math.max(...charts.map(({ svg }) => svg.clientWidth)) + 2 * margin;
  const parts = [];
  let y = margin;
  for (const { title, svg } of charts) {
    parts.push(text(margin, y + 13, title, { "font-weight": 600 }));
    const copy = standalone(svg);
    for (const [name, value] of Object.entries({ x: margin, y: y + line, width: svg.clientWidth,
      height: svg.clientHeight, overflow: "visible" })) copy.setAttribute(name, value);
    parts.push(copy);
    y += line + svg.clientHeight + margin;
  }
  for (const { name, colour } of legend) {
    parts.push(draw("rect", { x: margin, y: y + 3, width: 14, height: 4, fill: colour }),
      text(margin + 22, y + 10, name, { "font-size": 12 }));
    y += line;
  }
  parts.push(text(margin, y + 10, note, { "font-size": 12 }));
  y += line;
  const height = y + margin / 2;
  const ground = draw("rect", { width, height, fill: style.backgroundColor });
  return draw("svg", { width, height, viewBox: `0 0 ${width} ${height}` }, ground, ...parts);
}

export const svgBlob = (svg) =>
  new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" });

// The same in pixels, two for each of the page's.
export async function pngBlob(svg) {
  const address = URL.createObjectURL(svgBlob(svg)), image = new Image();
  try {
    image.src = address;
    await image.decode();
  } finally {
    URL.revokeObjectURL(address);
  }
  const canvas = document.createElement("canvas");
  canvas.width = 2 * svg.getAttribute("width");
  canvas.height = 2 * svg.getAttribute("height");
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
