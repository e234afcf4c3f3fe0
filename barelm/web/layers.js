// The view Layers: what each layer would say (the logit lens), what each part adds to a logit, and
// where two prompts part (activation patching).

import { $, bar, chooser, draw, make, number, option, percent, plural, table, visible,
  whole } from "./base.js";
import { ask, complain, debounced, events, guard, state } from "./server.js";

const picture = () => document.querySelector("[name=picture]:checked").value;
// A decoder says what comes after a token, an encoder what stands in its place.
const preposition = ({ part }) => (part === "encoder" ? "at" : "after");
const code = (text) => make("code", {}, visible(text));
// Rows of states: what is before the first layer, and what each layer leaves.
const stateName = (i) => (i ? String(i - 1) : "Embed");
function signed(x) {
  const size = Math.abs(x), text = size.toFixed(size < 9.995 ? 2 : 1);
  return Number(text) === 0 ? "0" : (x < 0 ? "\u2212" : "") + text;
}

// A table of cells { text, share from -1 to 1, name } in `box`, of which one can be chosen by a
// click or with the arrow keys. rows: their heads; fill(i, cells) gives row i what it shows.
function heat(box, label, corner, columns, rows, choose) {
  const lines = rows.map((head) => make("tr", {}, make("th", { scope: "row" }, head)));
  const head = make("tr", {}, make("th", { scope: "col" }, corner), ...columns.map((text) =>
    make("th", { scope: "col", className: "t", title: text }, text)));
  const grid = make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines));
  grid.setAttribute("role", "grid");
  grid.setAttribute("aria-label", label);
  box.replaceChildren(grid);
  let at = null;
  const cellAt = (i, j) => lines[i]?.cells[j + 1];
  function select(i, j, focus) {
    const cell = cellAt(i, j);
    if (!cell) return;
    at?.setAttribute("aria-selected", "false");
    if (at) at.tabIndex = -1;
    at = cell;
    at.tabIndex = 0;
    at.setAttribute("aria-selected", "true");
    if (focus) at.focus({ preventScroll: true });
    // The page itself moves only with who reads it: until then the table scrolls, and nothing else.
    if (focus) at.scrollIntoView({ block: "nearest", inline: "nearest" });
    else scrollWithin(box, at);
    choose(i, j);
  }
  const placeOf = (cell) => [lines.indexOf(cell.parentElement), cell.cellIndex - 1];
  grid.onclick = (event) => {
    const cell = event.target.closest("td");
    if (cell) select(...placeOf(cell), true);
  };
  grid.onkeydown = (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -columns.length], End: [0, columns.length], PageUp: [-rows.length, 0],
      PageDown: [rows.length, 0] }[event.key];
    if (!step || !at || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const [i, j] = placeOf(at), bound = (x, n) => Math.max(0, Math.min(x, n - 1));
    select(bound(i + step[0], filled()), bound(j + step[1], columns.length), true);
  };
  const filled = () => lines.filter((line) => line.cells.length > 1).length;
  function fill(i, cells) {
    const place = at && placeOf(at);
    while (lines[i].cells.length > 1) lines[i].lastElementChild.remove();
    for (const { text, share, name, mono } of cells) {
      const cell = make("td", { className: (share < 0 ? "against " : "") + (mono ? "t" : ""),
        tabIndex: -1, title: name ?? text }, text);
      cell.setAttribute("role", "gridcell");
      cell.style.setProperty("--share", Math.min(1, Math.abs(share)).toFixed(3));
      lines[i].append(cell);
    }
    if (place?.[0] === i) select(...place); // it was one of these
  }
  return { fill, select };
}

// Scroll a box so that a cell of its table is in sight, between the heads that stay.
function scrollWithin(box, cell) {
  const head = cell.closest("table").tHead.rows[0].cells[0], outer = box.getBoundingClientRect();
  const { left, right, top, bottom } = cell.getBoundingClientRect();
  const low = { x: outer.left + head.offsetWidth, y: outer.top + head.offsetHeight };
  const high = { x: outer.left + box.clientWidth, y: outer.top + box.clientHeight };
  if (right > high.x) box.scrollLeft += right - high.x;
  else if (left < low.x) box.scrollLeft -= low.x - left;
  if (bottom > high.y) box.scrollTop += bottom - high.y;
  else if (top < low.y) box.scrollTop -= low.y - top;
}

// ------------------------------------------------------------------ the logit lens

let seen = null, lensGrid = null, lensPlace = null;

function paintLens() {
  const byAnswer = $("lens-colour").value === "answer";
  seen.layers.forEach((row, i) => lensGrid.fill(i, row.top.map((tokens, j) => ({
    text: visible(tokens[0]), mono: true,
    share: byAnswer ? row.answer[j] : row.probabilities[j][0],
    name: `${visible(tokens[0])} ${percent(row.probabilities[j][0])}`,
  }))));
}
function showLensCell(i, j) {
  lensPlace = [i, j];
  const row = seen.layers[i], last = seen.layers.length - 1;
  sharesAt = j; // the other picture shows this position too
  const where = i === last ? `The model says, behind layer ${i - 1},`
    : i ? `Layer ${i - 1} would say` : "The embedding alone would say";
  const line = make("p", {}, `${where} ${preposition(seen)} `, code(seen.token_strs[j]), ` at ${j}:`);
  const best = row.top[j].map((text, n) => ({ cells: [[visible(text), "t"],
    [percent(row.probabilities[j][n]), "n"], [bar(row.probabilities[j][n]), "bar"]] }));
  const rank = row.rank[j] + 1;
  const about = make("p", { className: "note" });
  if (i < last) {
    about.append("The model's answer ", code(seen.answer_strs[j]), ` has ${percent(row.answer[j])}`
      + ` here and is number ${whole.format(rank)}. `);
  }
  about.append(`Entropy: ${row.entropy[j].toFixed(2)} bits.`);
  $("lens-cell").replaceChildren(line,
    table([["Token"], ["Probability", "n"], [""]], best), about);
}
function showLens() {
  const places = seen.token_strs.map(visible);
  lensGrid = heat($("lens-grid"), "What each layer would say at each position", "Layer", places,
    seen.layers.map((_, i) => stateName(i)), showLensCell);
  paintLens();
  const [i, j] = lensPlace ?? [];
  const known = i < seen.layers.length && j < places.length;
  lensGrid.select(...(known ? [i, j] : [seen.layers.length - 1, seen.position]));
}
function showNote({ part, mask, token_strs }) {
  const words = { decoder: " These are the decoder's; the text is what the encoder reads.",
    encoder: ` This model is an encoder: write ${mask} where it shall guess.` };
  $("lens-note").textContent = `${plural(token_strs.length, "token")}.${words[part] ?? ""}`;
}

const lookLens = debounced(async (signal) => {
  seen = await ask("/inspect/lens", reading(), signal);
  complain("");
  showNote(seen);
  showLens();
}, ["lens-grid", "lens-cell", "lens-note"], forget, 400);

function reading() {
  const body = { text: $("lens-text").value };
  if (isSeq2seq()) body.target = $("lens-target").value;
  return body;
}
const isSeq2seq = () => state.model?.config.n_encoder_layer > 0;

// ------------------------------------------------------------------ the shares of a logit

let shares = null, sharesAt = null;

// The parts of an answer: [{ name, value }], the columns of its table, and the rows of cells.
function partsOf({ before, layers, behind }) {
  const names = { token: "Embedding of the token", position: "Its position",
    bias: "Biases behind the last layer", rounding: "Rounding" };
  const parts = [...Object.entries(before), ...Object.entries(behind)]
    .map(([kind, value]) => ({ name: names[kind], value }));
  const columns = [];
  const column = (name, get, long) => {
    if (layers.some((layer) => get(layer) !== undefined)) columns.push({ name, get, long });
  };
  for (const [kind, prefix] of [["heads", ""], ["cross_heads", "\u00d7"]]) {
    const n = Math.max(0, ...layers.map((layer) => layer[kind]?.length ?? 0));
    for (let h = 0; h < n; h++) {
      column(prefix + h, (layer) => layer[kind]?.[h], `${prefix ? "cross head" : "head"} ${h}`);
    }
  }
  column("Attention", (layer) => layer.attention, "attention");
  column("\u00d7Attention", (layer) => layer.cross_attention, "cross attention");
  column("Bias", (layer) => layer.bias, "biases");
  column("MLP", (layer) => layer.mlp, "MLP");
  layers.forEach((layer, i) => columns.forEach(({ get, long }) => {
    if (get(layer) !== undefined) parts.push({ name: `Layer ${i}, ${long}`, value: get(layer) });
  }));
  return { parts, columns };
}
const total = (values) => values.reduce((sum, value) => sum + value, 0);

function showShares() {
  const { parts, columns } = partsOf(shares);
  const { layers, before, behind, logit, capped } = shares;
  const sizes = layers.flatMap((layer) => columns.map(({ get }) => Math.abs(get(layer) ?? 0)));
  const most = Math.max(...sizes, 1e-9);
  const what = shares.against === null ? "" : [" less that of ", code(shares.against_str)];
  const attention = total(layers.map((layer) => total([...layer.heads ?? [],
    ...layer.cross_heads ?? [], layer.attention ?? 0, layer.cross_attention ?? 0])));
  const biases = total(layers.map((layer) => layer.bias ?? 0)) + (behind.bias ?? 0);
  const sums = [["embedding", total(Object.values(before))], ["attention", attention],
    ["MLPs", total(layers.map((layer) => layer.mlp))], ["biases", biases],
    ["rounding", behind.rounding]];
  const terms = sums.filter(([, value]) => Math.abs(value) >= 5e-3)
    .map(([name, value]) => `${name} ${signed(value)}`);
  $("shares-sum").replaceChildren("The logit of ", code(shares.token_str), ...what, ` ${preposition(shares)} `,
    code(shares.token_strs[shares.position]), ` is ${signed(logit)} = ${terms.join(" + ")}.`,
    capped === null ? "" : ` That is before the cap of the logits, behind it ${signed(capped)}.`);
  const [low, , high] = document.querySelector("#shares-picture .key").children;
  low.textContent = signed(-most);
  high.textContent = "+" + signed(most);
  const sofar = []; // behind each layer
  const grid = heat($("shares-grid"), "Share of each part of each layer", "Layer",
    [...columns.map(({ name }) => name), "So far"], layers.map((_, i) => String(i)), (i, j) => {
      const [name, value] = j < columns.length ? [columns[j].long, columns[j].get(layers[i])]
        : ["all up to here, the embedding too", sofar[i]];
      $("shares-cell").textContent = `Layer ${i}, ${name}: ${number(value)}`;
    });
  layers.forEach((layer, i) => {
    const values = columns.map(({ get }) => get(layer) ?? 0);
    sofar.push((i ? sofar[i - 1] : total(Object.values(before))) + total(values));
    const cells = values.map((value) => ({ text: signed(value), share: value / most }));
    grid.fill(i, [...cells, { text: signed(sofar[i]), share: 0 }]);
  });
  const largest = parts.sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 12);
  const scale = Math.abs(largest[0].value) || 1;
  $("shares-largest").replaceChildren(table([["Largest shares"], ["Share", "n"], [""]],
    largest.map(({ name, value }) => ({
      cells: [[name], [signed(value), "n"], [balance(value / scale), "bar"]] }))));
  grid.select(layers.length - 1, columns.length);
  $("shares-grid").scrollLeft = 0;
}
// A share from -1 to 1 as a bar from the middle.
const balance = (share) => draw("svg", { viewBox: "-100 0 200 8", preserveAspectRatio: "none",
  "aria-hidden": "true" }, draw("rect", { class: share < 0 ? "fill against" : "fill",
  x: Math.min(0, 100 * share), width: Math.abs(100 * share), height: 8 }));

const lookShares = debounced(async (signal) => {
  const body = reading();
  if (sharesAt !== null) body.position = sharesAt;
  for (const name of ["token", "against"]) {
    if ($("shares-" + name).value) body[name] = $("shares-" + name).value;
  }
  shares = await ask("/inspect/shares", body, signal);
  complain("");
  showNote(shares);
  $("shares-tokens").replaceChildren(...shares.token_strs.map((text, j) => {
    const token = option("", visible(text));
    token.setAttribute("aria-selected", j === shares.position);
    return token;
  }));
  $("shares-result").hidden = false;
  showShares();
}, ["shares-result", "lens-note"], forget, 400);

chooser($("shares-tokens"), (token) => {
  sharesAt = [...$("shares-tokens").children].indexOf(token);
  lookShares();
});

// ------------------------------------------------------------------ two prompts

let running = null;
function patchWords(kind, i, j, names) {
  if (kind === "heads") return `head ${j} of layer ${i} at all positions`;
  const what = { residual: i ? `the residual stream behind layer ${i - 1}` : "the embedding",
    attention: `what attention adds in layer ${i}`, mlp: `what the MLP adds in layer ${i}` }[kind];
  return `${what} at position ${j} (${names[j].replace("\n", ", ")})`;
}

async function comparePrompts(signal) {
  const kind = $("patch-kind").value;
  const body = { kind, stream: true };
  if (isSeq2seq()) body.target = $("lens-target").value;
  for (const name of ["clean", "corrupted"]) body[name] = $("patch-" + name).value;
  for (const name of ["answer", "other"]) {
    if ($("patch-" + name).value) body[name] = $("patch-" + name).value;
  }
  let head = null, grid = null, rows = [];
  for await (const event of events("/inspect/patch", body, signal)) {
    signal.throwIfAborted();
    if (!head) {
      head = event;
      complain("");
      grid = showPatch(head, rows);
      continue;
    }
    rows.push(event.row);
    grid.fill(rows.length - 1, event.row.map((share) => ({
      text: String(Math.round(100 * share) || 0).replace("-", "\u2212"), share })));
    if (rows.length === 1) grid.select(0, 0);
  }
  grid.select(...placeToShow(head, rows));
}
// The layer in which the difference comes to the position that is read; else the largest share.
function placeToShow(head, rows) {
  const i = rows.findIndex((row) => row[head.position] >= 0.5);
  if (head.kind === "residual" && !isSeq2seq() && i > 0) return [i, head.position];
  let best = [0, 0];
  rows.forEach((row, i) => row.forEach((share, j) => {
    if (share > rows[best[0]][best[1]]) best = [i, j];
  }));
  return best;
}
function showPatch(head, rows) {
  const { kind, clean_strs: clean, corrupted_strs: corrupted } = head;
  const [own, others] = [head.answer_str, head.other_str].map(code);
  $("patch-sum").replaceChildren("The logit of ", own, " less that of ", others,
    `: ${signed(head.clean_difference)} in the clean prompt, ${
      signed(head.corrupted_difference)} in the corrupted one.`,
    head.part === "encoder" && isSeq2seq() ? " What is patched is the encoder." : "");
  $("patch-result").hidden = false;
  const names = clean.map((text, j) => visible(text)
    + (text === corrupted[j] ? "" : "\nnot " + visible(corrupted[j])));
  const label = (i) => (kind === "residual" ? stateName(i) : String(i));
  const heads = Array.from({ length: state.model.config.n_head }, (_, h) => String(h));
  const columns = kind === "heads" ? heads : names;
  return heat($("patch-grid"), "Share of the difference that each patch restores",
    kind === "heads" ? "Layer, head" : "Layer", columns,
    Array.from({ length: head.n_rows }, (_, i) => label(i)), (i, j) => {
      $("patch-cell").textContent = `With ${patchWords(kind, i, j, names)} from the clean prompt, ${
        (100 * rows[i][j]).toFixed(1).replace("-", "\u2212")}\u00a0% of the difference is restored.`;
    });
}
$("patch-go").onclick = async () => {
  running?.abort();
  const control = running = new AbortController();
  $("patch-stop").disabled = false;
  $("patch-result").hidden = true;
  $("patch-sum").textContent = "Both prompts are read\u2026";
  await guard(() => comparePrompts(control.signal));
  if (control !== running) return;
  $("patch-stop").disabled = true;
  if ($("patch-result").hidden) $("patch-sum").textContent = "";
};
$("patch-stop").onclick = () => running?.abort();

// ------------------------------------------------------------------ the view

const pictures = ["lens", "shares", "patch"];
function open() {
  const shown = picture();
  for (const name of pictures) $(name + "-picture").hidden = name !== shown;
  $("lens-fields").hidden = shown === "patch";
  if (shown === "lens") lookLens();
  if (shown === "shares") lookShares();
}
function forget() {
  seen = shares = null;
  $("lens-note").textContent = "";
  $("shares-result").hidden = true;
  for (const id of ["lens-grid", "lens-cell", "shares-tokens"]) $(id).replaceChildren();
}
$("picture").onchange = open;
$("lens-text").oninput = $("lens-target").oninput = () => {
  seen = sharesAt = lensPlace = null; // places of another text
  open();
};
$("lens-colour").onchange = () => seen && paintLens();
$("shares-token").oninput = $("shares-against").oninput = () => lookShares();

const ENGLISH = ["The capital of France is", "The capital of France is", "The capital of Italy is"];
const PYTHON = ["def add(a, b):\n    return a +", "for key in keys:\n    print(",
  "for row in rows:\n    print("];
export function show() {
  open();
}
export function reset() {
  forget();
  running?.abort();
  lensPlace = sharesAt = null;
  $("lens-written").hidden = !isSeq2seq();
  $("patch-result").hidden = true;
  $("patch-sum").textContent = "";
  // A small vocabulary is mostly that of a model of Python, as the default one is.
  const texts = state.model.config.vocab_size < 16384 ? PYTHON : ENGLISH;
  ["lens-text", "patch-clean", "patch-corrupted"].forEach((id, i) => $(id).value ||= texts[i]);
}
