// Weights from 0 to 1 as colours: how strong they are, the key that says so, and maps of them.

import { draw, make, visible } from "./base.js";

const SCALES = { // name: its label, what is drawn of a weight, the ticks of its key
  root: ["square root", Math.sqrt, [0, 0.01, 0.1, 0.25, 0.5, 1]],
  linear: ["linear", (weight) => weight, [0, 0.25, 0.5, 0.75, 1]],
};
let scale = "root"; // that shows small weights, too
const keys = []; // the keys that are shown, with what is drawn anew by another scale

// How strongly a weight is drawn: from 0, nothing, to 1, the full colour.
export const strength = (weight) => SCALES[scale][1](weight);
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

// Put the key of the colours into a place, with a switch between the scales; redraw() is called
// when another scale is chosen.
export function addKey(place, name, redraw) {
  const radios = Object.entries(SCALES).map(([value, [label]]) => {
    const radio = make("input", { type: "radio", name: name + "-scale", id: `${name}-${value}`,
      value });
    radio.onchange = () => {
      scale = value;
      for (const key of keys) key();
    };
    return make("span", { className: "check" }, radio,
      make("label", { htmlFor: radio.id }, `Colour: ${label}`));
  });
  const bar = draw("svg", { viewBox: "0 0 240 30", role: "img" });
  place.append(bar, ...radios);
  const show = () => {
    radios.forEach((element) => {
      element.firstChild.checked = element.firstChild.value === scale;
    });
    bar.replaceChildren(...keyParts());
    bar.setAttribute("aria-label", `Colours from the weight 0 to 1, by the ${SCALES[scale][0]}`
      + (scale === "root" ? " of the weight" : " weight"));
    redraw();
  };
  keys.push(show);
  show();
}
function keyParts() {
  const [, f, ticks] = SCALES[scale], left = 8, width = 216, n = 24, parts = [];
  for (let i = 0; i < n; i++) {
    parts.push(draw("rect", { class: "fill", "fill-opacity": (i + 0.5) / n, height: 12, y: 1,
      x: left + i * width / n, width: width / n }));
  }
  parts.push(draw("rect", { class: "frame", x: left, y: 1, width, height: 12 }));
  for (const tick of ticks) {
    const x = left + f(tick) * width;
    parts.push(draw("line", { class: "tick", x1: x, x2: x, y1: 13, y2: 16 }),
      draw("text", { x, y: 27, "text-anchor": "middle" }, String(tick)));
  }
  return parts;
}

// Bytes as small squares: a canvas of side x side points, each a byte by `strengths` (256).
export function paintBytes(canvas, bytes, at, side, strengths) {
  const [r, g, b] = colour("--accent-rgb").split(" ").map(Number);
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    image.data.set([r, g, b, 255 * strengths[bytes[at + i]]], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
// How strongly the bytes of a Grid (barelm/attention_maps.py) are drawn: b is (b / 255) ** 2.
export const byteStrengths = () => Array.from({ length: 256 }, (_, b) => strength((b / 255) ** 2));

// rows[i][j] as a map, cells `cell` CSS pixels wide, with a frame around that of `marked`, [i, j].
// names: of the rows, written right of their last weight where there is room among the columns.
export function paintMap(canvas, rows, columns, cell, marked, names) {
  const dots = devicePixelRatio, at = (i) => Math.round(i * cell * dots);
  const width = at(columns), height = at(rows.length);
  canvas.width = width;
  canvas.height = height;
  canvas.style.width = columns * cell + "px";
  const ink = canvas.getContext("2d");
  ink.fillStyle = `rgb(${colour("--accent-rgb")})`;
  rows.forEach((row, i) => row.forEach((weight, j) => {
    ink.globalAlpha = strength(weight);
    ink.fillRect(at(j), at(i), at(j + 1) - at(j), at(i + 1) - at(i));
  }));
  ink.globalAlpha = 1;
  ink.fillStyle = colour("--soft");
  ink.font = `${Math.min(0.6 * cell, 12) * dots}px ${colour("--mono")}`;
  ink.textBaseline = "middle";
  for (let i = 0; names && cell >= 10 && i < rows.length; i++) {
    const x = at(rows[i].length) + cell * dots / 4;
    if (x < width) ink.fillText(visible(names[i]), x, at(i + 0.5), width - x);
  }
  ink.strokeStyle = colour("--line");
  ink.strokeRect(0.5, 0.5, at(Math.max(...rows.map((row) => row.length))) - 1, height - 1);
  ink.strokeStyle = colour("--ink");
  ink.lineWidth = 1.5 * dots;
  ink.strokeRect(at(marked[1]), at(marked[0]), Math.max(at(1), 2), Math.max(at(1), 2));
}

// A canvas of which a cell is chosen by pointing, or with the arrow keys: choose(i, j) is given any
// whole numbers, size() tells [rows, columns], now() the chosen cell.
export function chooseCells(canvas, size, now, choose) {
  canvas.onpointermove = canvas.onpointerdown = (event) => {
    const [rows, columns] = size(), place = canvas.getBoundingClientRect();
    if (!rows) return;
    choose(Math.floor((event.clientY - place.top) / place.height * rows),
      Math.floor((event.clientX - place.left) / place.width * columns));
  };
  canvas.onkeydown = (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!step[event.key] || !size()[0]) return;
    event.preventDefault();
    const [i, j] = now();
    choose(i + step[event.key][0], j + step[event.key][1]);
  };
}
export const within = (i, n) => Math.max(0, Math.min(i, n - 1));
// Colours are others in the dark.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const key of keys) key();
});
