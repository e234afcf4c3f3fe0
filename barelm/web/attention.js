// The view Attention: a grid of all layers and heads, small, and the one that is chosen from it.
// Layers, heads and positions count from 0, as in the code.

import { $, bar, chooser, make, option, percent, plural, table, visible } from "./base.js";
import { addKey, byteStrengths, chooseCells, paintBytes, paintMap, strength, within }
  from "./heat.js";
import { ask, complain, debounced } from "./server.js";

let grid = null; // what /inspect/grid says
let bytes = null; // its maps, the last of a layer the mean of its heads, the last layer of all
let chosen = [0, 0]; // which of them is opened: layer, head; n_layer and n_head: the means
let opened = null; // its weights: rows[i][j], how much token i looks at j, where causal up to i
let pair = [0, 0];

const layerName = (layer) => layer === grid.n_layer ? "mean" : String(layer);
const headName = (head) => head === grid.n_head ? "mean" : String(head);
function mapName([layer, head]) {
  const all = layer === grid.n_layer, mean = head === grid.n_head;
  if (all && mean) return "Mean of all layers and heads";
  if (all) return `Head ${head}, mean of all layers`;
  return mean ? `Layer ${layer}, mean of its heads` : `Layer ${layer}, head ${head}`;
}

// -------------------------------------------------------------------------------- all at a glance

const cellOf = ([layer, head]) => document.getElementById(`map-${layer}-${head}`);

function newCell(layer, head) {
  const name = mapName([layer, head]);
  const cell = make("td", { id: `map-${layer}-${head}`, tabIndex: -1, title: name },
    make("canvas"));
  cell.setAttribute("role", "gridcell");
  cell.setAttribute("aria-label", name);
  cell.onclick = () => open([layer, head]);
  return cell;
}

// The cells as a table: the longer side goes to the right where there is room for it.
function showGrid() {
  const { n_layer, n_head } = grid, width = $("grid").clientWidth;
  const layersDown = (n_layer < n_head) === (width > 640);
  const [n_rows, n_columns] = layersDown ? [n_layer, n_head] : [n_head, n_layer];
  const side = Math.max(20, Math.min(44, Math.floor((width - 56) / (n_columns + 1)) - 2));
  $("grid").style.setProperty("--side", side + "px");
  const range = (n) => Array.from({ length: n + 1 }, (_, i) => i);
  const [across, down] = layersDown ? [headName, layerName] : [layerName, headName];
  const corner = layersDown ? "layer \u2193 head \u2192" : "head \u2193 layer \u2192";
  const heading = (text, role) => {
    const element = make("th", {}, text);
    element.setAttribute("role", role);
    return element;
  };
  const top = make("tr", {}, heading(corner, "columnheader"),
    ...range(n_columns).map((j) => heading(across(j), "columnheader")));
  const rows = range(n_rows).map((i) => make("tr", {}, heading(down(i), "rowheader"),
    ...range(n_columns).map((j) => layersDown ? newCell(i, j) : newCell(j, i))));
  for (const row of [top, ...rows]) row.setAttribute("role", "row");
  const body = make("table", {}, ...[top, ...rows]);
  body.setAttribute("role", "grid");
  body.setAttribute("aria-label", "Attention of all layers and heads");
  $("grid").replaceChildren(body);
  $("grid").layersDown = layersDown;
  paintGrid();
  markChosen();
}
function paintGrid() {
  if (!grid) return;
  const { n_layer, n_head, side } = grid, strengths = byteStrengths();
  for (let layer = 0; layer <= n_layer; layer++) {
    for (let head = 0; head <= n_head; head++) {
      const at = (layer * (n_head + 1) + head) * side * side;
      paintBytes(cellOf([layer, head]).firstChild, bytes, at, side, strengths);
    }
  }
}
function markChosen() {
  for (const cell of $("grid").querySelectorAll("[role=gridcell]")) {
    const here = cell === cellOf(chosen);
    cell.setAttribute("aria-selected", here);
    cell.tabIndex = here ? 0 : -1;
  }
}
$("grid").onkeydown = (event) => {
  if (!grid || !event.target.matches("[role=gridcell]")) return;
  let step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    Home: [0, -1e9], End: [0, 1e9] }[event.key];
  if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  if (!$("grid").layersDown) step = [step[1], step[0]];
  open([within(chosen[0] + step[0], grid.n_layer + 1), within(chosen[1] + step[1],
    grid.n_head + 1)]);
  cellOf(chosen).focus();
};

// -------------------------------------------------------------------------------- the one opened

function open(which) {
  chosen = which;
  markChosen();
  load();
}
const load = debounced(async (signal) => {
  const [layer, head] = chosen, all = layer === grid.n_layer, mean = head === grid.n_head;
  const body = { ids: grid.tokens };
  if (!all) body.layer = layer;
  if (!mean) body.head = head;
  if (all || mean) body.mean = all && mean ? "both" : all ? "layers" : "heads";
  opened = (await ask("/inspect/attention", body, signal)).heads[0];
  complain("");
  const name = mapName([layer, head]);
  $("map-name").textContent = name;
  $("map").setAttribute("aria-label",
    `${name}, attention over ${plural(grid.tokens.length, "token")}`);
  $("looks").hidden = false;
  choosePair(...pair);
}, ["looks"], () => {
  opened = null;
  $("looks").hidden = true;
}, 0);

function showPair() {
  if (!opened) return;
  const [i, j] = pair, row = opened[i], n = opened.length, names = grid.token_strs;
  const name = (k) => visible(names[k]);
  const room = $("looks").clientWidth * (innerWidth > 736 ? 0.57 : 1);
  const cell = Math.max(1, Math.min(34, room / n));
  paintMap($("map"), opened, n, cell, pair, names);
  $("pair-text").replaceChildren(make("code", {}, name(i)), ` at ${i} looks at `,
    make("code", {}, name(j)), ` at ${j} with ${percent(row[j])} of its attention.`);
  [...$("looked-text").children].forEach((token, k) => {
    token.className = k >= row.length ? "given" : "";
    const weight = k >= row.length ? 0 : row[k];
    token.style.background = weight ? `rgb(var(--accent-rgb) / ${0.35 * strength(weight)})` : "";
    token.setAttribute("aria-selected", k === i);
  });
  const most = row.map((w, k) => [w, k]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  $("targets").replaceChildren(table([["Looks at"], ["Position", "n"], ["Weight", "n"], [""]],
    most.map(([w, k]) => ({ here: k === j,
      cells: [[name(k), "t"], [String(k), "n"], [percent(w), "n"], [bar(w), "bar"]] }))));
}
function choosePair(i, j) {
  if (!opened) return;
  i = within(i, opened.length);
  pair = [i, within(j, opened[i].length)];
  showPair();
}
chooser($("looked-text"), (token) => {
  const i = [...$("looked-text").children].indexOf(token);
  choosePair(i, opened[i].indexOf(Math.max(...opened[i])));
});
chooseCells($("map"), () => [opened?.length ?? 0, opened?.length], () => pair, (i, j) => {
  if (i !== pair[0] || Math.min(i, j) !== pair[1]) choosePair(i, j);
});

// -------------------------------------------------------------------------------- the text

const look = debounced(async (signal) => {
  const old = grid;
  grid = await ask("/inspect/grid", { text: $("looked").value }, signal);
  bytes = Uint8Array.from(atob(grid.maps), (letter) => letter.charCodeAt(0));
  complain("");
  const { tokens, block, n_layer, n_head } = grid;
  $("looked-note").textContent = `${plural(tokens.length, "token")}, ${
    plural(n_layer, "layer")} of ${plural(n_head, "head")}`
    + (block > 1 ? `; a point of the grid is the largest of ${block * block} weights.` : ".");
  $("heads").hidden = false;
  chosen = [within(chosen[0], n_layer + 1), within(chosen[1], n_head + 1)];
  if (old?.tokens.length !== tokens.length) pair = [tokens.length - 1, pair[1]];
  showGrid();
  $("looked-text").replaceChildren(...grid.token_strs.map((text) => option("", text)));
  load();
}, ["heads", "looks", "looked-note"], forgetMaps);
function forgetMaps() {
  grid = bytes = opened = null;
  $("looked-note").textContent = "";
  $("heads").hidden = $("looks").hidden = true;
}
$("looked").oninput = () => look();
$("looked").value = "def mean(values):\n    return sum(values) / len(values)\n";
addKey($("map-key"), "map", () => {
  paintGrid();
  showPair();
});

export function show() {
  look();
}
export function reset() {
  forgetMaps();
  chosen = [0, 0];
}
// The window has another width.
export function resize() {
  if (!grid) return;
  showGrid();
  showPair();
}
