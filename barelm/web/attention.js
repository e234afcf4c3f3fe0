// The view Attention: which token looks at which, in each head.

import { $, bar, chooser, make, option, percent, plural, table, visible } from "./base.js";
import { ask, complain, debounced, state } from "./server.js";

// heads[h][i][j] is how much token i looks at token j, where it is causal up to i

let maps = null, pair = [0, 0];
const head = () => Number($("heads").querySelector("input:checked")?.value ?? 0);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function paint(canvas, rows, sized, marked) {
  const n = rows.length, side = sized * devicePixelRatio, cell = side / n;
  canvas.width = canvas.height = side;
  const ink = canvas.getContext("2d"), at = (i) => Math.round(i * cell);
  ink.fillStyle = `rgb(${colour("--accent-rgb")})`;
  rows.forEach((row, i) => row.forEach((weight, j) => {
    ink.globalAlpha = Math.sqrt(weight);
    ink.fillRect(at(j), at(i), at(j + 1) - at(j), at(i + 1) - at(i));
  }));
  ink.globalAlpha = 1;
  if (!marked) return;
  ink.fillStyle = colour("--soft"); // names stand where a row has no weights, right of its last one
  ink.font = `${Math.min(0.6 * cell, 12 * devicePixelRatio)}px ${colour("--mono")}`;
  ink.textBaseline = "middle";
  const causal = rows.every((row, i) => row.length === i + 1);
  for (let i = 0; causal && i < n && cell >= 10 * devicePixelRatio; i++) {
    const x = at(i + 1) + cell / 4;
    ink.fillText(visible(maps.token_strs[i]), x, (i + 0.5) * cell, side - x);
  }
  ink.strokeStyle = colour("--line");
  ink.strokeRect(0.5, 0.5, side - 1, side - 1);
  ink.strokeStyle = colour("--ink");
  ink.lineWidth = 1.5 * devicePixelRatio;
  ink.strokeRect(at(marked[1]), at(marked[0]), Math.max(cell, 2), Math.max(cell, 2));
}

function showPair() {
  const [i, j] = pair, row = maps.heads[head()][i], name = (k) => visible(maps.token_strs[k]);
  const room = $("map").parentElement.clientWidth * (innerWidth > 736 ? 0.58 : 1);
  $("map").style.width = Math.min(Math.floor(room), 34 * maps.token_strs.length) + "px";
  paint($("map"), maps.heads[head()], $("map").clientWidth, pair);
  $("pair-text").replaceChildren(make("code", {}, name(i)), ` at ${i + 1} looks at `,
    make("code", {}, name(j)), ` at ${j + 1} with ${percent(row[j])} of its attention.`);
  [...$("looked-text").children].forEach((token, k) => {
    const unseen = k >= row.length;
    const level = unseen ? 0 : [0.02, 0.1, 0.25, 0.5].filter((least) => row[k] >= least).length;
    token.className = "s" + level + (unseen ? " given" : "");
    token.setAttribute("aria-selected", k === i);
  });
  const most = row.map((w, k) => [w, k]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  $("targets").replaceChildren(table([["Looks at"], ["Position", "n"], ["Weight", "n"], [""]],
    most.map(([w, k]) => ({ here: k === j,
      cells: [[name(k), "t"], [String(k + 1), "n"], [percent(w), "n"], [bar(w), "bar"]] }))));
}
function choosePair(i, j) {
  if (!maps) return;
  i = Math.max(0, Math.min(i, maps.token_strs.length - 1));
  pair = [i, Math.max(0, Math.min(j, maps.heads[head()][i].length - 1))];
  showPair();
}
function showMaps() {
  const old = head();
  $("heads").replaceChildren($("heads").firstElementChild, ...maps.heads.map((rows, h) => {
    const small = make("canvas");
    paint(small, rows, 64);
    const radio = make("input", { type: "radio", name: "head", value: h, onchange: showPair });
    radio.checked = h === Math.min(old, maps.heads.length - 1);
    return make("label", {}, radio, small, String(h));
  }));
  $("looked-text").replaceChildren(...maps.token_strs.map((text) => option("", text)));
  choosePair(maps.token_strs.length - 1, pair[1]);
}
const look = debounced(async (signal) => {
  const layer = Number($("layer").value || 0);
  maps = await ask("/inspect/attention", { text: $("looked").value, layer }, signal);
  const count = plural(maps.token_strs.length, "token");
  $("map").setAttribute("aria-label", `Attention of layer ${layer} over ${count}`);
  $("looked-note").textContent = count;
  complain("");
  $("heads").hidden = $("looks").hidden = false;
  showMaps();
}, ["heads", "looks", "looked-note"], forgetMaps);
function forgetMaps() {
  maps = null;
  $("looked-note").textContent = "";
  $("heads").hidden = $("looks").hidden = true;
}
$("looked").oninput = $("layer").onchange = () => look();
chooser($("looked-text"), (token) => {
  const i = [...$("looked-text").children].indexOf(token);
  choosePair(i, maps.heads[head()][i].indexOf(Math.max(...maps.heads[head()][i])));
});
$("map").onpointermove = $("map").onpointerdown = (event) => {
  if (!maps) return;
  const n = maps.token_strs.length, place = $("map").getBoundingClientRect();
  const cell = (at, size) => Math.floor(at / size * n);
  const i = cell(event.clientY - place.top, place.height);
  const j = cell(event.clientX - place.left, place.width);
  if (i !== pair[0] || Math.min(i, j) !== pair[1]) choosePair(i, j);
};
$("map").onkeydown = (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!step[event.key]) return;
  event.preventDefault();
  choosePair(pair[0] + step[event.key][0], pair[1] + step[event.key][1]);
};

$("looked").value = "def mean(values):\n    return sum(values) / len(values)\n";
matchMedia("(prefers-color-scheme: dark)").onchange = () => maps && showMaps();
export function show() {
  look();
}
export function reset() {
  forgetMaps();
  $("layer").replaceChildren(...Array.from({ length: state.model.config.n_layer }, (_, i) =>
    make("option", { value: i }, String(i))));
}
// The window has another width.
export function resize() {
  if (maps) showPair();
}
