// The view Model: the network as a block diagram, in the order in which it computes. Each part
// opens to its tensors.

import { $, draw, make, percent, plural, short, whole } from "./base.js";
import { state } from "./server.js";

const KINDS = { embedding: "Embedding", attention: "Attention", mlp: "MLP", norm: "Norms",
  head: "Head", other: "Other" };
// 269e6 as "269 MFLOPs".
function flopsOf(n) {
  const power = Math.min(5, Math.max(0, Math.floor(Math.log10(n || 1) / 3)));
  return `${+(n / 1000 ** power).toPrecision(3)}\u00a0${["", "k", "M", "G", "T", "P"][power]}FLOPs`;
}

export function reset() {
  const { params, bytes, config, dtype, device, diagram } = state.model;
  $("sum").textContent = `${whole.format(params)} parameters in ${
    short.format(bytes).replace(/(?=[A-Z]|$)/, " ")}B, computed in ${dtype} on ${device}.`;
  const flops = Object.values(diagram.shares).reduce((sum, share) => sum + share.flops, 0);
  $("cost").textContent = `A token costs ${flopsOf(flops)} in a text of ${
    whole.format(diagram.length)} tokens, the whole context${
    config.n_encoder_layer ? ", behind a source as long" : ""}: the multiplications and additions of `
    + "products of matrices, in a forward pass.";
  $("shares").replaceChildren(...shareRows(diagram.shares, params, flops), $("cost"));
  $("network").replaceChildren(...diagram.flow.map((item) =>
    make("li", {}, item.blocks ? stackBox(item, params) : partBox(item, params))));
  $("config").replaceChildren(...Object.entries(config).filter(([, v]) => v !== null)
    .map(([name, value]) => make("div", {}, make("dt", {}, name),
      make("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))));
}

// Two bars, of parameters and of what a token costs, and what their colours mean.
function shareRows(shares, params, flops) {
  const kinds = Object.keys(shares);
  const stacked = (name, of) => {
    let x = 0;
    const rects = kinds.map((kind) => {
      const rect = draw("rect", { class: kind, x, width: 100 * of(kind), height: 8 });
      x += 100 * of(kind);
      return rect;
    });
    return make("div", {}, make("p", { className: "note" }, name), draw("svg", {
      viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" }, ...rects));
  };
  const ofParams = (kind) => shares[kind].params / params;
  const ofFlops = (kind) => shares[kind].flops / flops;
  const share = (part) => make("td", { className: "n" }, part ? percent(part) : "0");
  const rows = kinds.map((kind) => make("tr", {},
    make("th", { scope: "row" }, make("span", { className: `key ${kind}` }), " ", KINDS[kind]),
    share(ofParams(kind)), share(ofFlops(kind))));
  const head = make("tr", {}, make("td"), ...["Parameters", "FLOPs"].map((name) =>
    make("th", { className: "n" }, name)));
  return [stacked("Parameters", ofParams), stacked("FLOPs of a token", ofFlops),
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))];
}

// A part that opens to its tensors. prefix: what stands before their names in the file.
function partBox(part, params, prefix = "") {
  const share = part.params ? `${short.format(part.params)}, ${percent(part.params / params)}`
    : part.tensors.some((t) => t.tied) ? "shared with the embedding" : "no parameters";
  const summary = make("summary", {},
    make("span", { className: "name" }, part.name),
    make("span", { className: "note words" }, part.words),
    make("span", { className: "note n" }, share));
  return make("details", { className: `box ${part.kind}` }, summary, tensorTable(part, prefix));
}

function tensorTable(part, prefix) {
  const inner = prefix && part.tensors.length > 1; // then the part's own name is said once, below
  const rows = part.tensors.map((t) => make("tr", {},
    make("td", { className: "t" }, inner ? t.name.replace(/^[^.]*\./, "") : t.name),
    make("td", { className: "n" }, `${t.n > 1 ? `${t.n} of ` : ""}${t.shape.join(" \u00d7 ")}`),
    make("td", { className: "n" }, t.tied ? "shared" : whole.format(t.params))));
  const heads = ["Tensor", "Shape", "Parameters"].map((name, i) =>
    make("th", { className: i ? "n" : "" }, name));
  const notes = [];
  if (part.flops) notes.push(`${flopsOf(part.flops)} for a token.`);
  if (prefix) {
    const module = inner ? part.tensors[0].name.replace(/\..*/, ".\u2026") : part.tensors[0].name;
    notes.push(`In the file: ${prefix}.N.${module}, N the layer.`);
  }
  return make("div", { className: "tensors" }, make("table", {},
    make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)),
  make("p", { className: "note" }, notes.join(" ")));
}

// Equal blocks, one behind the other, drawn once.
function stackBox(stack, params) {
  const [first, last] = stack.layers, n = last - first + 1;
  const several = stack.blocks.length > 1;
  const title = `${stack.name ? stack.name + ": " : ""}${plural(n, "block")}`;
  const times = several && stack.repeat > 1 ? `, a pattern that comes ${stack.repeat} times` : "";
  const head = make("p", { className: "stack-head" }, make("span", { className: "name" }, title),
    make("span", { className: "note words" }, layerWords(first, last) + times),
    make("span", { className: "note n" }, `${short.format(stack.params)}, ${
      percent(stack.params / params)}`));
  const blocks = stack.blocks.map((block) => make("div", { className: "block" },
    ...(several ? [make("p", { className: "note" }, blockWords(block, stack))] : []),
    ...block.branches.map((branch) => branchBox(branch, params, stack.prefix))));
  return make("div", { className: "stack" }, head, ...blocks);
}
function blockWords({ n, layers: [first, last] }, { repeat }) {
  return `${plural(n, "block")}: ${layerWords(first, last)}${repeat > 1 ? ", and so on" : ""}`;
}
function layerWords(first, last) {
  return first === last ? `layer ${first}` : `layers ${first} to ${last}`;
}

// What is computed of the stream and added to it: the line beside it goes on, and joins below.
function branchBox({ parts, behind, adds }, params, prefix) {
  const inner = make("div", { className: "branch" },
    ...parts.map((part) => partBox(part, params, prefix)));
  const sum = adds ? [make("p", { className: "plus" }, make("span", { ariaHidden: "true" }, "+"),
    make("span", { className: "note" }, "added to the residual stream"))] : [];
  return make("div", { className: adds ? "residual" : "" }, inner, ...sum,
    ...behind.map((part) => partBox(part, params, prefix)));
}

export function show() {}
