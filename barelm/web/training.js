// The view Training: one chart for each key of the log, all with one cursor.

import { $, draw, make, number, plural, whole } from "./base.js";
import { ask, guard, isGone, state } from "./server.js";

const KEYS = { loss: "Loss", lr: "Learning rate", tok_s: "Tokens a second",
  grad_norm: "Norm of the gradient", bpb: "Bits a byte" };
const LEFT_OUT = ["step", "tokens", "dt", "mem", "mfu", "val_ppl"];
let log = [], cursor = null;

async function follow() {
  const at = log.at(-1)?.step ?? 0; // of this step there may be more rows than there were
  const followed = state.model;
  const { rows, last } = await ask("/inspect/log?after=" + (at - 1));
  if (state.model !== followed) return; // the server was started anew meanwhile
  if (last < at || log.length + rows.length > 6000) {
    log = []; // a new run, or more than a chart can show: from the beginning, thinned
    if (last >= 0 && at) return follow();
  }
  const old = log.length;
  log = [...log.filter((row) => row.step < at), ...rows];
  if (log.length !== old || !old) showCharts();
}
setInterval(() => {
  if (state.model && !$("training").hidden && !document.hidden && !isGone()) guard(follow);
}, 2000);

// The ticks of an axis, [[value, label]]; least: the smallest step between them.
function ticks(low, high, logarithmic, count, least = 0) {
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

// What has a chart: the keys of KEYS in their order, then what else the log has numbers of.
function chartKeys() {
  const numbers = (row) => Object.keys(row).filter((key) => Number.isFinite(row[key]));
  const logged = [...new Set(log.flatMap(numbers))];
  const names = new Set(logged.map((key) => key.replace(/^val_/, "")));
  const ordered = new Set([...Object.keys(KEYS).filter((key) => names.has(key)), ...names]);
  return [...ordered].filter((k) => !LEFT_OUT.includes(k) && !LEFT_OUT.includes("val_" + k));
}

// The run in a sentence.
function runSummary() {
  if (!log.length) return "This model has no training log beside it.";
  const rowsWith = (key) => log.filter((row) => Number.isFinite(row[key]));
  let text = plural(log.at(-1).step, "step");
  const losses = rowsWith("loss").map((row) => row.loss);
  if (losses.length) {
    text += `; training loss ${number(losses[0])} to ${number(losses.at(-1))}`;
  }
  const evaluations = rowsWith("val_loss");
  if (evaluations.length) {
    const last = evaluations.at(-1);
    const best = Math.min(...evaluations.map((row) => row.val_loss));
    text += `; validation ${number(last.val_loss)} at step ${whole.format(last.step)}`;
    text += `, at best ${number(best)}`;
  }
  return text + ".";
}

function showCharts() {
  const shown = [...$("charts").children];
  const old = new Map(shown.map((figure) => [figure.key, figure]));
  const figures = chartKeys().map((key) => old.get(key) ?? newFigure(key));
  const changed = figures.length !== shown.length
    || figures.some((figure, i) => figure !== shown[i]);
  if (changed) $("charts").replaceChildren(...figures);
  $("logx").closest(".row").hidden = !log.length;
  if (log.length) figures.forEach(showChart);
  $("run").textContent = runSummary();
}

function newFigure(key) {
  const readout = make("span", { className: "note" });
  const svg = draw("svg", { tabindex: 0, role: "img" });
  const figure = make("figure", {}, make("figcaption", {},
    make("h2", {}, KEYS[key] ?? key.replaceAll("_", " ")), readout), svg);
  svg.onpointermove = (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    const off = (step) => Math.abs(figure.x(step) - x);
    moveCursor(log.reduce((best, { step }) => (off(step) < off(best) ? step : best), log[0].step));
  };
  svg.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!by) return;
    event.preventDefault();
    const steps = [...new Set(log.map((row) => row.step))];
    const i = cursor === null ? steps.length - 1 : steps.indexOf(cursor) + by;
    moveCursor(steps[Math.max(0, Math.min(i, steps.length - 1))]);
  };
  return Object.assign(figure, { key, readout, svg });
}

function showChart(figure) {
  const { key, svg } = figure, width = svg.clientWidth, height = svg.clientHeight;
  const logx = $("logx").checked, pad = { left: 44, top: 8, bottom: 20 }, right = width - 12;
  const series = [key, "val_" + key].map((name) => log.filter((row) => Number.isFinite(row[name]))
    .map((row) => [Math.max(row.step, logx ? 1 : 0), row[name], row.step]));
  const all = series.flat();
  const logy = $("logy").checked && all.every(([, y]) => y > 0);
  const scale = (values, logarithmic, from, to) => {
    const f = logarithmic ? Math.log : (v) => v, [low, high] = values;
    return (v) => from + (to - from) * (f(v) - f(low)) / (f(high) - f(low) || 1);
  };
  const range = (i) => all.reduce(([a, b], p) => [Math.min(a, p[i]), Math.max(b, p[i])],
    [Infinity, -Infinity]);
  const last = log.at(-1).step, spanY = range(1);
  const spanX = [Math.max(log[0].step, logx ? 1 : 0), Math.max(last, 1)];
  const x = scale(spanX, logx, pad.left, right);
  const y = scale(spanY, logy, height - pad.bottom, pad.top);
  figure.x = (step) => x(Math.max(step, logx ? 1 : 0));
  figure.series = series;
  const parts = [];
  for (const [t, text] of ticks(...spanY, logy, height / 36)) {
    parts.push(draw("line", { class: "grid", x1: pad.left, x2: right, y1: y(t), y2: y(t) }),
      draw("text", { x: pad.left - 6, y: y(t) + 4, "text-anchor": "end" }, text));
  }
  for (const [t, text] of ticks(...spanX, logx, width / 90, 1)) {
    parts.push(draw("text", { x: x(t), y: height - 4, "text-anchor": "middle" }, text));
  }
  series.forEach((points, i) => {
    const path = points.map(([px, py]) => `${x(px).toFixed(1)},${y(py).toFixed(1)}`).join(" ");
    const kind = i ? " val" : "";
    if (points.length) parts.push(draw("polyline", { class: "line" + kind, points: path }));
    if (i && points.length < 60) {
      parts.push(...points.map(([px, py]) => draw("circle", { class: "dot", cx: x(px), cy: y(py),
        r: 2.5 })));
    }
  });
  figure.mark = draw("line", { class: "cursor", y1: pad.top, y2: height - pad.bottom });
  svg.replaceChildren(...parts, figure.mark);
  showCursor(figure);
}

function showCursor(figure) {
  const here = figure.series.map((points) => cursor === null ? points.at(-1)
    : points.findLast((p) => p[2] <= cursor));
  const [train, val] = here.map((p) => p && number(p[1]));
  figure.readout.replaceChildren(`step ${whole.format(cursor ?? log.at(-1).step)}: `,
    train && val ? `training ${train}, ` : train ?? "",
    val ? make("span", { className: "val" }, `validation ${val}`) : train ? "" : "none yet");
  figure.svg.setAttribute("aria-label", `${figure.querySelector("h2").textContent}. ${
    figure.readout.textContent}`);
  const x = cursor === null ? -9 : figure.x(cursor);
  figure.mark.setAttribute("x1", x);
  figure.mark.setAttribute("x2", x);
  figure.mark.setAttribute("visibility", cursor === null ? "hidden" : "visible");
}
function moveCursor(step) {
  if (step === cursor) return;
  cursor = step;
  for (const figure of $("charts").children) showCursor(figure);
}
$("logx").onchange = $("logy").onchange = () => showCharts();

export function show() {
  guard(follow).then(showCharts);
}
export function reset() {
  log = []; // what is shown of another model goes
  cursor = null;
}
// The window has another width.
export function resize() {
  if (log.length) showCharts();
}
