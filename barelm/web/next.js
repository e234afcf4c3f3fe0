// The view Next token: its distribution, and what temperature, top k, top p and min p make of it.

import { $, draw, make, percent, plural, visible, whole } from "./base.js";
import { ask, complain, debounced, guard } from "./server.js";

const FILTERS = [ // name in a request, label, value, least, most, step
  ["temperature", "Temperature", 0.8, 0, 2, 0.05],
  ["top_k", "Top k, 0: all", 20, 0, 100, 1],
  ["top_p", "Top p", 0.95, 0, 1, 0.01],
  ["min_p", "Min p", 0, 0, 1, 0.01],
];
const fieldOf = (name) => $("next-" + name);
// Once the view is opened, or asked before the server has said what its model is.
function makeFilters() {
  if ($("next-seed")) return;
  for (const [name, label, value, min, max, step] of FILTERS) {
    const input = make("input", { type: "range", id: "next-" + name, min, max, step, value });
    const output = make("output", { htmlFor: input.id }, String(value));
    input.oninput = () => {
      output.value = input.value;
      live();
    };
    $("next-filters").append(make("div", { className: "field" },
      make("span", { className: "slider" }, make("label", { htmlFor: input.id }, label), output),
      input));
  }
  $("next-filters").append(make("div", { className: "field" },
    make("label", { htmlFor: "next-seed" }, "Seed"),
    make("input", { type: "number", id: "next-seed", min: 0, step: 1, placeholder: "random" })));
}

let then = []; // the ids that were appended to the text
let shown = null; // what the server said last

function request(more = {}) {
  makeFilters();
  const body = { text: $("next-text").value, then, n: 30, ...more };
  for (const [name] of FILTERS) body[name] = Number(fieldOf(name).value);
  if (!$("next-seed").checkValidity()) throw new Error(`Seed: ${$("next-seed").validationMessage}`);
  if ($("next-seed").value !== "") body.seed = Number($("next-seed").value);
  return body;
}

// -------------------------------------------------------------------------------- what is drawn

const BAR = 200; // the width of the largest bar

// What is left and what was: the probability after the temperature as a frame, what is drawn by as
// a bar in it, the model's own as a line.
function bars(candidate, most) {
  const x = (p) => BAR * p / most;
  const box = { viewBox: `0 0 ${BAR} 12`, preserveAspectRatio: "none", "aria-hidden": "true" };
  return draw("svg", box,
    draw("rect", { class: "fill", y: 1, width: x(candidate.drawn), height: 10 }),
    draw("rect", { class: "scaled", y: 1, width: x(candidate.scaled), height: 10 }),
    draw("line", { class: "own", x1: x(candidate.probability), x2: x(candidate.probability), y1: 0,
      y2: 12 }));
}
const CUTS = {
  temperature: () => "temperature 0: the likeliest alone",
  top_k: ({ top_k: left }) => {
    const k = Number(fieldOf("top_k").value), more = left - k;
    return `top k ends here: the ${k} likeliest` + (more > 0 ? `, and ${more} as likely` : "");
  },
  top_p: (left) => `top p ends here: ${plural(left.top_p, "token")} reach ${
    fieldOf("top_p").value} together`,
  min_p: () => `min p ends here: what follows is below ${fieldOf("min_p").value} of the likeliest`,
};

function showRows() {
  const { candidates, left } = shown, rows = [];
  const most = Math.max(...candidates.flatMap((c) => [c.drawn, c.scaled, c.probability]));
  let cut = null;
  for (const candidate of candidates) {
    if (candidate.cut !== cut) {
      cut = candidate.cut;
      rows.push(make("tr", { className: "end" }, make("td", { colSpan: 5 }, CUTS[cut](left))));
    }
    const button = make("button", { type: "button" }, visible(candidate.text));
    button.setAttribute("aria-label", `Append ${visible(candidate.text)}`);
    button.onclick = () => append(candidate, true);
    const cell = (className, value) => make("td", { className }, value);
    rows.push(make("tr", { className: cut ? "cut" : "" }, cell("t", button),
      cell("n own", percent(candidate.probability)), cell("n scaled", percent(candidate.scaled)),
      cell("n", cut ? "cut" : percent(candidate.drawn)), cell("bar", bars(candidate, most))));
  }
  const heads = [["Token", ""], ["Model", "n own"], ["Temperature", "n scaled"], ["Drawn by", "n"],
    ["", ""]];
  const heading = heads.map(([text, className]) => make(text ? "th" : "td", { className }, text));
  return make("table", {}, make("thead", {}, make("tr", {}, ...heading)),
    make("tbody", {}, ...rows));
}

function showNext() {
  const { candidates, left, vocabulary, covered, entropy, entropy_drawn: drawn } = shown;
  $("next-sum").textContent = `${whole.format(left.min_p)} of ${whole.format(vocabulary)} tokens `
    + `can be drawn, to which the model gives ${percent(covered)}. Entropy: ${entropy.toFixed(2)} `
    + `bits, after the filters ${drawn.toFixed(2)} bits.`;
  $("next-rows").replaceChildren(showRows());
  const more = left.min_p - candidates.length;
  $("next-rest").textContent = `${whole.format(candidates.length)} likeliest tokens; `
    + (more > 0 ? `${whole.format(more)} more can be drawn. ` : "no other can be drawn. ")
    + "A bar is what is drawn by, the frame the probability after the temperature, the line the "
    + "model's own.";
  const [given, added] = $("next-then").children;
  $("next-then").hidden = !then.length;
  given.textContent = $("next-text").value.slice(-400);
  added.replaceChildren(...shown.then_strs.map((text, i) =>
    make("mark", { className: "tint-" + i % 5 }, text.replace(/^bytes:/, ""))));
  $("next-back").disabled = $("next-clear").disabled = !then.length;
}

// -------------------------------------------------------------------------------- questions

async function load(signal) {
  shown = await ask("/inspect/next", request(), signal);
  complain("");
  $("next-note").textContent = plural(shown.count, "token");
  $("next-all").hidden = false;
  showNext();
}
const look = debounced(load, ["next-all"], forget);
const lookNow = debounced(load, ["next-all"], forget, 0);
function forget() {
  shown = null;
  $("next-note").textContent = "";
  $("next-all").hidden = $("next-then").hidden = true;
}

// While a slider moves: one question at a time, and after it the newest.
let asking = false, waiting = false;
async function live() {
  waiting = true;
  if (asking) return;
  asking = true;
  const of = $("next-text").value, at = then;
  while (waiting) {
    waiting = false;
    await guard(async () => {
      const answer = await ask("/inspect/next", request());
      if ($("next-text").value !== of || then !== at) return; // another text is asked about by now
      shown = answer;
      complain("");
      $("next-all").hidden = false;
      showNext();
    });
  }
  asking = false;
}

// Another token behind the text; focus: on the likeliest of those that follow it.
async function append({ token, text }, focus = false) {
  then = [...then, token];
  await guard(async () => {
    try {
      await load();
    } catch (error) {
      then = then.slice(0, -1); // it does not fit
      throw error;
    }
    $("next-note").textContent = `${visible(text)} was appended: ${plural(shown.count, "token")}`;
    if (focus) $("next-rows").querySelector("button").focus();
  });
}
$("next-draw").onclick = () => guard(async () => {
  $("next-draw").disabled = true;
  try {
    await append((await ask("/inspect/next", request({ draw: true }))).token);
  } finally {
    $("next-draw").disabled = false;
    $("next-draw").focus();
  }
});
$("next-back").onclick = () => {
  then = then.slice(0, -1);
  lookNow();
};
$("next-clear").onclick = () => {
  then = [];
  lookNow();
};
// Up and down among the tokens.
$("next-rows").onkeydown = (event) => {
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const all = [...$("next-rows").querySelectorAll("button")];
  all[all.indexOf(document.activeElement) + step]?.focus();
};
$("next-text").oninput = () => {
  then = [];
  look();
};
$("next-text").value = "def mean(values):\n    return";

export function show() {
  makeFilters();
  lookNow();
}
export function reset() {
  then = [];
  forget();
}
