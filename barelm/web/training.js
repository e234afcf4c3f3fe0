// The view Training: runs and how far they are; one chart for each key of their logs, all with one
// cursor.

import { $, make, draw, number, plural, whole } from "./base.js";
import { download, drawLines, picture, pngBlob, range, smoothed, svgBlob } from "./chart.js";
import { ask, call, complain, guard, isGone, state } from "./server.js";

// The words that people search for, in the order of the charts.
const TITLES = {
  loss: "Loss", reward: "Reward", accuracy: "Accuracy", acc: "Accuracy",
  f1: "F1 score", mrr: "Mean reciprocal rank (MRR)", bpb: "Bits per byte", lr: "Learning rate",
  grad_norm: "Gradient norm", tok_s: "Tokens per second", margin: "Reward margin",
  reward_chosen: "Reward of chosen answers", reward_rejected: "Reward of rejected answers",
  approx_kl: "KL divergence (approximate)", entropy: "Entropy of the policy",
  clipfrac: "Clip fraction", length: "Length of answers (tokens)", value_loss: "Value loss",
  return: "Return", explained_variance: "Explained variance",
  mtp_loss: "Loss of tokens further ahead (multi-token prediction)",
  load_max: "Expert load, largest over mean", balance_loss: "Load balancing loss",
  z_loss: "Router z-loss", router_entropy: "Router entropy",
  // from here on behind "More charts"
  ppl: "Perplexity", dt: "Seconds per step", mem: "Memory (GiB)",
  mfu: "Model FLOPs utilization (MFU)", dropped: "Dropped tokens",
  alone_min: "Seconds of the fastest process", alone_median: "Seconds of the median process",
  alone_max: "Seconds of the slowest process", slowest: "Slowest process (rank)",
};
const MORE = Object.keys(TITLES).slice(Object.keys(TITLES).indexOf("ppl"));
const UNITS = { mem: 2 ** 30 };
const LEFT_OUT = ["step", "tokens"];
const SMOOTH = ["lr", "mem"]; // by themselves: an average would only be late
const COLOURS = 8;

let served = null, names = [], weights = null, busy = false; // as the server told
let chosen = null; // the names of the runs that are shown
let cursor = null, cursorAxis = ""; // where it stands, in the unit of its axis
let logs = new Map(); // by name: { entries: [{row, seconds}], every, standing }
const colours = new Map(); // by name: a number, for as long as the page is open

// ---------------------------------------------------------------------------------------------
// What the server tells

async function follow() {
  if (busy) return;
  busy = true;
  try {
    const followed = state.model, told = await ask("/inspect/runs");
    ({ served, runs: names, weights } = told);
    chosen ??= new Set(names.includes(served) ? [served] : []);
    const changed = await Promise.all(shownNames().map(followLog));
    if (state.model !== followed) return; // the server was started anew meanwhile
    showRuns();
    showWeights();
    showSummary();
    if (changed.some(Boolean) || !$("charts").children.length) showCharts();
  } finally {
    busy = false;
  }
}

const shownNames = () => names.filter((name) => chosen.has(name));
const shownLogs = () => shownNames().map((name) => ({ name, ...logs.get(name) }))
  .filter((log) => log.entries?.length);

// Take in what is new of a run's log: whether something is.
async function followLog(name) {
  let log = logs.get(name) ?? { entries: [], every: 1 };
  const at = log.entries.at(-1)?.row.step ?? 0; // of it there may be more rows than there were
  const told = await ask(`/inspect/log?run=${encodeURIComponent(name)}&after=${at - 1}`);
  if (told.last < at || log.entries.length + told.rows.length > 6000) {
    logs.delete(name); // a new run, or more than a chart can show: from the beginning, thinned
    if (told.last >= 0 && at) return followLog(name);
    log = { entries: [], every: 1 };
  }
  const old = log.entries.length;
  const entries = told.rows.map((row, i) => ({ row, seconds: told.seconds[i] }));
  log.entries = [...log.entries.filter(({ row }) => row.step < at), ...entries];
  log.every = Math.max(log.every, told.every);
  log.standing = told.standing;
  logs.set(name, log);
  return log.entries.length !== old;
}
setInterval(() => {
  if (state.model && !$("training").hidden && !document.hidden && !isGone()) guard(follow);
}, 2000);

// ---------------------------------------------------------------------------------------------
// In words

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// How far a run is.
function standingWords({ state: how, progress, seconds_left: left, age, step, seconds }) {
  const part = progress === null ? "" : `, ${Math.floor(100 * progress)} %`;
  const steps = plural(step, "step");
  if (how === "running") {
    let rest = left === null ? "" : `, about ${duration(left)} left`;
    if (age > 60) rest = `, nothing new for ${duration(age)}`;
    return `Running: ${steps}${part}${rest}`;
  }
  if (how === "stopped") return `Stopped before its end: ${steps}${part}`;
  return `${how === "finished" ? "Finished" : "Not running"}: ${steps}${
    seconds ? ` in ${duration(seconds)}` : ""}`;
}

// The model's run in a sentence.
function showSummary() {
  const log = logs.get(served);
  $("run-progress").hidden = log?.standing?.state !== "running" || log.standing.progress === null;
  if (!log?.entries.length) {
    $("run").textContent = names.includes(served) ? "The log of this model's run is not shown."
      : "This model has no training log beside it.";
    return;
  }
  let text = standingWords(log.standing);
  const withKey = (key) => log.entries.map(({ row }) => row)
    .filter((row) => Number.isFinite(row[key]));
  const losses = withKey("loss").map((row) => row.loss);
  if (losses.length) text += `; training loss ${number(losses[0])} to ${number(losses.at(-1))}`;
  const evaluations = withKey("val_loss");
  if (evaluations.length) {
    const last = evaluations.at(-1), best = Math.min(...evaluations.map((row) => row.val_loss));
    text += `; validation ${number(last.val_loss)} at step ${whole.format(last.step)}`;
    text += `, at best ${number(best)}`;
  }
  $("run").textContent = text + ".";
  $("run-progress").value = log.standing.progress ?? 0;
}

// Which weights answer, where the run has others.
function showWeights() {
  const line = $("weights"), button = $("reload");
  const last = logs.get(served)?.entries.at(-1)?.row.step;
  const step = weights?.step, onDisk = weights?.step_on_disk;
  let text = "";
  if (weights?.are_new) {
    const own = step === null ? "older than those in the folder" : `of step ${whole.format(step)}`;
    text = `The weights that answer here are ${own}.`;
    if (onDisk !== null) text += ` The folder holds those of step ${whole.format(onDisk)} by now.`;
  } else if (weights && step !== null && last > step) {
    text = `The weights that answer here are of step ${whole.format(step)}, the last save.`;
  }
  line.hidden = !text;
  line.firstChild.textContent = text;
  button.hidden = !weights?.are_new || !weights.can_reload;
  button.disabled = Boolean(weights?.busy);
  button.textContent = weights?.busy ? "Loading\u2026" : "Load the newer weights";
}
$("reload").onclick = () => guard(async () => {
  weights.busy = true;
  showWeights();
  try {
    await ask("/inspect/reload", {});
    complain("");
    document.dispatchEvent(new Event("weights")); // what was computed of the old ones goes
  } finally {
    weights.busy = false;
    await follow();
  }
});

// The runs to choose from, each with its colour.
function showRuns() {
  for (const name of names) if (!colours.has(name)) colours.set(name, colours.size);
  $("runs").hidden = !names.some((name) => name !== served);
  const old = new Map([...$("run-list").children].map((row) => [row.name, row]));
  const rows = names.map((name) => old.get(name) ?? newRun(name));
  if (rows.length !== old.size || rows.some((row, i) => row !== $("run-list").children[i])) {
    $("run-list").replaceChildren(...rows);
  }
  for (const row of rows) {
    const standing = chosen.has(row.name) ? logs.get(row.name)?.standing : null;
    row.box.checked = chosen.has(row.name);
    row.words.textContent = standing ? standingWords(standing) : "";
  }
}
function newRun(name) {
  const box = make("input", { type: "checkbox", id: `run-${colours.get(name)}` });
  const label = make("label", { htmlFor: box.id }, name + (name === served ? " (this model)" : ""));
  const swatch = draw("svg", { class: "swatch", viewBox: "0 0 16 4", "aria-hidden": "true" },
    draw("rect", { class: colourOf(name), width: 16, height: 4 }));
  const words = make("span", { className: "note" });
  box.onchange = () => {
    if (box.checked) chosen.add(name);
    else chosen.delete(name);
    guard(async () => {
      if (box.checked) await followLog(name);
      showRuns();
      showSummary();
      showCharts();
    });
  };
  return Object.assign(make("div", { className: "check" }, box, swatch, label, words),
    { name, box, words });
}
const colourOf = (name) => `run-${(colours.get(name) ?? 0) % COLOURS}`;

// ---------------------------------------------------------------------------------------------
// The axis

const AXES = {
  step: { words: "steps", of: ({ row }) => row.step },
  tokens: { words: "tokens", of: ({ row }) => row.tokens },
  time: { words: "seconds", of: ({ seconds }) => seconds },
};
const UNITS_OF_TIME = [[1, "seconds"], [60, "minutes"], [3600, "hours"]];
// The axis that is asked for, if all runs have it; of time its unit.
function axisOf(all) {
  const has = (key) => all.every((log) => log.entries.some((e) => AXES[key].of(e) > 0));
  for (const option of $("x-axis").options) {
    option.disabled = option.value !== "step" && !(all.length && has(option.value));
  }
  if ($("x-axis").selectedOptions[0].disabled) $("x-axis").value = "step";
  const name = $("x-axis").value;
  if (name !== "time") return { ...AXES[name], name };
  const most = Math.max(...all.map((log) => log.entries.at(-1).seconds));
  const fits = UNITS_OF_TIME.filter(([seconds]) => seconds === 1 || most >= 2 * seconds);
  const [unit, words] = fits.at(-1);
  return { name, words, of: ({ seconds }) => seconds / unit };
}

// ---------------------------------------------------------------------------------------------
// The charts

const titleOf = (key) => TITLES[key] ?? (key.startsWith("loss.") ? `Loss on ${key.slice(5)}`
  : key.replaceAll("_", " "));

// What has a chart: the keys of TITLES in their order, then what else the logs have numbers of.
function chartKeys(all) {
  const names = new Set();
  for (const { entries } of all) {
    for (const { row } of entries) {
      for (const key in row) if (Number.isFinite(row[key])) names.add(key.replace(/^val_/, ""));
    }
  }
  const ordered = new Set([...Object.keys(TITLES).filter((key) => names.has(key)), ...names]);
  return [...ordered].filter((key) => !LEFT_OUT.includes(key));
}

function showCharts() {
  const all = shownLogs(), axis = axisOf(all);
  if (axis.words !== cursorAxis) cursor = null; // it stood in another unit
  cursorAxis = axis.words;
  const shown = new Map([...document.querySelectorAll("#training figure")].map((f) => [f.key, f]));
  const figures = chartKeys(all).map((key) => shown.get(key) ?? newFigure(key));
  const isMore = (figure) => MORE.includes(figure.key);
  place($("charts"), figures.filter((figure) => !isMore(figure)));
  place($("more-charts"), figures.filter(isMore));
  $("more").hidden = !figures.some(isMore);
  $("chart-settings").hidden = $("downloads").hidden = !all.length;
  showChoices(figures);
  const weight = Number($("smoothing").value);
  $("smoothing-value").textContent = weight.toFixed(2);
  $("chart-note").textContent = all.length ? chartNote(all, axis, weight) : "";
  if (all.length) figures.forEach((figure) => showChart(figure, all, axis, weight));
}
function place(list, figures) {
  if (figures.length !== list.children.length
    || figures.some((figure, i) => figure !== list.children[i])) list.replaceChildren(...figures);
}

// What is drawn, in words.
function chartNote(all, axis, weight) {
  const words = [all.length > 1 ? "Of each run a thin line is training, and a thick one validation."
    : "The thin line is training, the thick one validation."];
  if (weight) {
    words.push("Training is smoothed, by an exponential moving average over the rows: each keeps "
      + `${weight.toFixed(2)} of the average before it, corrected for its beginning. The pale line `
      + "behind is the log's own.");
  }
  if (axis.name === "time") {
    words.push("Time is what the steps took: validation, saves and pauses are left out.");
  }
  const thinned = all.filter((log) => log.every > 1);
  if (thinned.length) {
    const each = thinned.map(({ name, every }) =>
      (all.length > 1 ? `${name}: ` : "") + `one in ${every}`);
    words.push(`Of long logs some rows of training are shown, and averaged (${each.join(", ")}).`);
  }
  return words.join(" ");
}

function newFigure(key) {
  const readout = make("span", { className: "note readout" });
  const svg = draw("svg", { tabindex: 0, role: "img" });
  const figure = make("figure", {}, make("figcaption", {},
    make("h2", {}, titleOf(key)), readout), svg);
  svg.onpointermove = (event) => {
    const place = event.clientX - svg.getBoundingClientRect().left;
    const off = (x) => Math.abs(figure.x(x) - place);
    moveCursor(stops().reduce((best, x) => (off(x) < off(best) ? x : best)));
  };
  svg.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!by) return;
    event.preventDefault();
    const all = stops(); // without a cursor the last values are shown
    const i = cursor === null ? all.length - 1 : all.findLastIndex((x) => x <= cursor);
    moveCursor(all[Math.max(0, Math.min(i + by, all.length - 1))]);
  };
  return Object.assign(figure, { key, readout, svg });
}
// Where the cursor may stand: at the first shown run's rows.
function stops() {
  const all = shownLogs(), axis = axisOf(all);
  const own = all.find((log) => log.name === served) ?? all[0];
  return [...new Set(own.entries.map(axis.of).filter(Number.isFinite))];
}

// Of a run and a key: what is logged in training, and in validation.
function pointsOf(log, key, axis, floor) {
  const unit = UNITS[key] ?? 1;
  return [key, "val_" + key].map((name) => log.entries
    .filter((e) => Number.isFinite(e.row[name]) && Number.isFinite(axis.of(e)))
    .map((e) => ({ x: Math.max(axis.of(e), floor), at: axis.of(e), y: e.row[name] / unit })));
}

function showChart(figure, all, axis, weight) {
  if (!figure.svg.clientWidth) return; // within what is closed
  const logx = $("logx").checked;
  const xs = all.flatMap((log) => log.entries.map(axis.of)).filter(Number.isFinite);
  const [lowest, last] = range(xs), [least] = range(xs.filter((x) => x > 0));
  const floor = logx ? (axis.name === "step" ? 1 : least) : 0;
  const first = Math.max(lowest, floor);
  figure.series = [];
  const lines = [];
  for (const log of all) {
    const [training, validation] = pointsOf(log, figure.key, axis, floor);
    const colour = all.length > 1 ? colourOf(log.name) : "alone";
    const averages = weight && training.length > 2 && !SMOOTH.includes(figure.key);
    const smooth = averages ? smoothed(training, weight) : null;
    figure.series.push({ name: log.name, colour, training, smooth, validation });
    lines.push({ points: training, kind: smooth ? "raw" : "train", colour });
    if (smooth) lines.push({ points: smooth, kind: "train", colour });
    lines.push({ points: validation, kind: "val", colour });
  }
  const options = { span: [first, Math.max(last, axis.name === "step" ? 1 : first)], logx,
    logy: $("logy").checked, axis: axis.words, least: axis.name === "step" ? 1 : 0 };
  const { x, mark } = drawLines(figure.svg, lines, options);
  Object.assign(figure, { mark, axis, last, x: (value) => x(Math.max(value, floor)) });
  showCursor(figure);
}

// The values at the cursor, or the last ones.
function showCursor(figure) {
  const { axis, series } = figure, at = cursor ?? figure.last;
  const runs = series.filter(({ training, validation }) => training.length || validation.length);
  const parts = runs.map((run) => {
    const words = valuesAt(run, at);
    if (series.length === 1) return make("span", {}, ...words);
    return make("span", { className: "of-run" },
      make("span", { className: `val ${run.colour}` }, run.name), " ", ...words);
  });
  const place = axis.name === "step" ? `step ${whole.format(at)}: `
    : `${whole.format(+at.toPrecision(4))} ${axis.words}: `;
  figure.readout.replaceChildren(place, ...parts.flatMap((part) => [part, " "]));
  figure.svg.setAttribute("aria-label", `${figure.querySelector("h2").textContent}. ${
    figure.readout.textContent}`);
  const x = cursor === null ? -9 : figure.x(cursor);
  figure.mark.setAttribute("x1", x);
  figure.mark.setAttribute("x2", x);
  figure.mark.setAttribute("visibility", cursor === null ? "hidden" : "visible");
}
// What a run has at a place of the axis, in words and elements.
function valuesAt({ colour, training, smooth, validation }, at) {
  const here = (points) => points?.findLast((p) => p.at <= at)?.y;
  const [train, soft, val] = [training, smooth, validation].map(here);
  const words = [];
  if (train !== undefined) words.push((validation.length ? "training " : "") + number(train));
  if (soft !== undefined) words.push(`smoothed ${number(soft)}`);
  if (val !== undefined) {
    words.push(make("span", { className: `val ${colour}` }, `validation ${number(val)}`));
  }
  if (!words.length) words.push("none yet");
  return words.flatMap((word, i) => (i ? [", ", word] : [word]));
}
function moveCursor(x) {
  if (x === cursor) return;
  cursor = x;
  for (const figure of drawnFigures()) showCursor(figure);
}
const drawnFigures = () => [...document.querySelectorAll("#training figure")]
  .filter((figure) => figure.mark && figure.svg.clientWidth);

for (const id of ["logx", "logy", "x-axis"]) $(id).onchange = () => showCharts();
$("smoothing").oninput = () => showCharts();
$("more").ontoggle = () => showCharts();

// ---------------------------------------------------------------------------------------------
// Files

function showChoices(figures) {
  const options = [["", "All charts"], ...figures.map(({ key }) => [key, titleOf(key)])];
  const select = $("which-chart"), old = select.value;
  if (select.options.length === options.length) return;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  select.value = options.some(([value]) => value === old) ? old : "";
}
async function save(kind) {
  const key = $("which-chart").value, all = shownLogs();
  const figures = drawnFigures().filter((figure) => !key || figure.key === key);
  if (!figures.length) throw new Error("This chart is folded: open More charts first.");
  const charts = figures.map((f) => ({ title: titleOf(f.key), svg: f.svg }));
  const legend = all.length < 2 ? [] : all.map(({ name }) => {
    const swatch = $("run-list").querySelector("." + colourOf(name));
    return { name, colour: getComputedStyle(swatch).fill };
  });
  const svg = picture(charts, legend, "thin: training; thick: validation");
  const name = `${all.map((log) => log.name).join("-")}${key && "-" + key}.${kind}`;
  download(kind === "svg" ? svgBlob(svg) : await pngBlob(svg), name);
}
$("save-svg").onclick = () => guard(() => save("svg"));
$("save-png").onclick = () => guard(() => save("png"));
$("save-csv").onclick = () => guard(async () => {
  const all = shownNames(), query = all.map((name) => "run=" + encodeURIComponent(name)).join("&");
  download(await (await call("/inspect/log.csv?" + query)).blob(), `${all.join("-")}.csv`);
});

export function show() {
  guard(follow).then(showCharts);
}
export function reset() {
  logs = new Map(); // what is shown of another model goes
  chosen = cursor = null;
  names = [];
}
// The window has another width.
export function resize() {
  if (shownLogs().length) showCharts();
}
