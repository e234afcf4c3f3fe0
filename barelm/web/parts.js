// The view Model: what the network is made of.

import { $, bar, make, percent, short, whole } from "./base.js";
import { state } from "./server.js";

export function reset() {
  const { params, bytes, config, dtype, device, parts } = state.model;
  $("sum").textContent = `${whole.format(params)} parameters in ${
    short.format(bytes).replace(/(?=[A-Z]|$)/, " ")}B, computed in ${dtype} on ${device}.`;
  $("config").replaceChildren(...Object.entries(config).filter(([, v]) => v !== null)
    .map(([name, value]) => make("div", {}, make("dt", {}, name),
      make("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))));
  const line = (tag, name, part) => make(tag, { className: tag === "div" ? "part" : "" },
    make("span", {}, name),
    make("span", { className: "n shape" }, part.shape ? part.shape.join(" \u00d7 ") : ""),
    make("span", { className: "n" }, part.tied ? "shared" : whole.format(part.params)),
    make("span", { className: "n" }, part.tied ? "" : percent(part.params / params)),
    bar(part.params / params));
  const names = ["Part", "Shape", "Parameters", "Share"].map((name, i) =>
    make("span", { className: ["", "n shape", "n", "n"][i] }, name));
  const rows = [make("div", { className: "part head" }, ...names)], layers = new Map();
  for (const part of parts) {
    const [, i, inner] = part.name.match(/^model\.layers\.(\d+)\.(.*)$/) ?? [];
    if (i === undefined) {
      rows.push(line("div", part.name, part));
    } else if (layers.has(i)) {
      layers.get(i).push([inner, part]);
    } else {
      layers.set(i, [[inner, part]]);
      rows.push(make("details", { layer: i }));
    }
  }
  for (const group of rows.filter((row) => row.layer)) {
    const inner = layers.get(group.layer);
    const sum = inner.reduce((n, [, part]) => n + part.params, 0);
    group.append(line("summary", `model.layers.${group.layer}`, { params: sum }),
      ...inner.map(([name, part]) => line("div", name, part)));
  }
  $("part-rows").replaceChildren(...rows);
}

export function show() {}
