// The view Experts: which token went to which expert in which layer, and the load of each. Layers,
// experts and positions count from 0.

import { $, bar, chooser, make, option, percent, plural, table, visible } from "./base.js";
import { addKey, chooseCells, paintMap, strength, within } from "./heat.js";
import { ask, complain, debounced } from "./server.js";

let routes = null; // what /inspect/routing says
let layer = 0; // which of routes.layers is shown
let cell = [0, 0]; // token and expert

// The weights of a layer as a map: rows[token][expert], 0 where it was not chosen.
function weightsOf({ experts, weights }) {
  return experts.map((chosen, i) => {
    const row = Array(routes.n_experts).fill(0);
    chosen.forEach((expert, j) => row[expert] = weights[i][j]);
    return row;
  });
}
const NAMES = 110; // pixels beside the map, for the tokens' names
const columns = (size) => routes.n_experts + Math.floor(NAMES / size);
const mean = () => routes.tokens.length * routes.n_experts_per_token / routes.n_experts;

// -------------------------------------------------------------------------------- the load

// The load of all layers: a row of cells for each, which can be chosen.
function showLoads() {
  const most = Math.max(...routes.layers.flatMap(({ load }) => load));
  $("loads").replaceChildren(...routes.layers.map((route, i) => {
    const largest = Math.max(...route.load) / mean();
    const cells = route.load.map((load) => {
      const element = make("span");
      element.style.background = `rgb(var(--accent-rgb) / ${strength(load / most)})`;
      return element;
    });
    const strip = make("span", { className: "strip" }, ...cells);
    const element = option("", `layer ${route.layer}`, strip,
      make("small", {}, `largest ${largest.toFixed(2)} \u00d7 the mean`));
    element.number = i;
    return element;
  }));
  markLayer();
}
function markLayer() {
  for (const element of $("loads").children) {
    element.setAttribute("aria-selected", element.number === layer);
  }
}
chooser($("loads"), (element) => {
  layer = element.number;
  markLayer();
  showLayer();
});

// -------------------------------------------------------------------------------- a layer

function showLayer() {
  const route = routes.layers[layer], n = routes.tokens.length;
  $("route-name").textContent = `Layer ${route.layer}`;
  $("route-map").setAttribute("aria-label", `Experts of layer ${route.layer} over ${
    plural(n, "token")}`);
  const rows = route.load.map((load, expert) => ({ cells: [[String(expert)], [String(load), "n"],
    [percent(load / (n * routes.n_experts_per_token)), "n"],
    [bar(load / Math.max(...route.load)), "bar"]] }));
  $("load").replaceChildren(make("p", { className: "note" },
    `Where all are equal, each expert has ${+mean().toFixed(2)} tokens.`),
  table([["Expert"], ["Tokens", "n"], ["Share", "n"], [""]], rows));
  $("route-tokens").replaceChildren(...routes.token_strs.flatMap((text, i) => {
    const token = option("tint-" + route.experts[i][0] % 5, visible(text),
      make("small", {}, route.experts[i].join(" ")));
    token.number = i;
    return text.includes("\n") ? [token, make("span", { className: "break" })] : [token];
  }));
  showCell();
}
function showCell() {
  if (!routes) return;
  const [i, expert] = cell, route = routes.layers[layer], rows = weightsOf(route);
  const room = $("route-scroll").clientWidth - NAMES;
  const size = Math.max(6, Math.min(24, room / routes.n_experts));
  paintMap($("route-map"), rows, columns(size), size, cell, routes.token_strs);
  const name = make("code", {}, visible(routes.token_strs[i]));
  const weight = rows[i][expert];
  $("route-text").replaceChildren(name, ` at ${i} `, route.experts[i].includes(expert)
    ? `goes to expert ${expert} with the weight ${percent(weight)}.`
    : `does not go to expert ${expert}.`);
  for (const token of $("route-tokens").querySelectorAll("[role=option]")) {
    token.setAttribute("aria-selected", token.number === i);
  }
  $("route-layers").replaceChildren(table([["Layer"], ["Experts, their weights"]],
    routes.layers.map((other, k) => ({ here: k === layer, cells: [[String(other.layer)],
      [other.experts[i].map((e, j) => `${e} (${percent(other.weights[i][j])})`).join(", ")]] }))));
}
function chooseCell(i, expert) {
  if (!routes) return;
  cell = [within(i, routes.tokens.length), within(expert, routes.n_experts)];
  showCell();
}
const cellSize = () => $("route-map").clientHeight / routes.tokens.length;
const mapSize = () => (routes ? [routes.tokens.length, columns(cellSize())] : [0, 0]);
chooseCells($("route-map"), mapSize, () => cell,
  (i, expert) => {
    if (i !== cell[0] || within(expert, routes.n_experts) !== cell[1]) chooseCell(i, expert);
  });
chooser($("route-tokens"), (token) => {
  chooseCell(token.number, routes.layers[layer].experts[token.number][0]);
});

// -------------------------------------------------------------------------------- the text

const look = debounced(async (signal) => {
  routes = await ask("/inspect/routing", { text: $("routed").value }, signal);
  complain("");
  const { tokens, layers, n_experts, n_experts_per_token: k, n_shared_experts: shared } = routes;
  $("routed-note").textContent = `${plural(tokens.length, "token")}, each to ${k} of ${
    plural(n_experts, "expert")} in ${plural(layers.length, "layer")}`
    + (shared ? `, and to ${shared} that all tokens share.` : ".");
  $("routes").hidden = false;
  layer = within(layer, layers.length);
  const i = within(cell[0], tokens.length);
  cell = [i, layers[layer].experts[i][0]];
  showLoads();
  showLayer();
}, ["routes", "routed-note"], forgetRoutes);
function forgetRoutes() {
  routes = null;
  $("routed-note").textContent = "";
  $("routes").hidden = true;
}
$("routed").oninput = () => look();
$("routed").value = "def mean(values):\n    return sum(values) / len(values)\n";
addKey($("route-key"), "route", () => {
  if (!routes) return;
  showLoads();
  showCell();
});

export function show() {
  look();
}
export { forgetRoutes as reset };
export function resize() {
  showCell();
}
