// The view Tokens: what a text is cut into, the neighbours of a token, and how tokens were made.

import { $, bar, chooser, make, option, plural, table, visible, whole } from "./base.js";
import { ask, complain, debounced } from "./server.js";

export const tokenize = (text, signal) => ask("/tokenize",
  { prompt: text, add_special_tokens: false, return_token_strs: true }, signal);

const MOST = 2000; // tokens shown
const split = debounced(async (signal) => {
  const text = $("raw").value;
  const { count, tokens, token_strs: names } = await tokenize(text, signal);
  complain("");
  $("near").hidden = true; // of a token that goes
  const bytes = new TextEncoder().encode(text).length;
  $("raw-note").textContent = `${plural(count, "token")}, ${plural(bytes, "byte")}`
    + (count ? `, ${(bytes / count).toFixed(2)} bytes a token` : "")
    + (count > MOST ? `; the first ${whole.format(MOST)} are shown.` : ".");
  $("pieces").replaceChildren(...tokens.slice(0, MOST).flatMap((id, i) => {
    const token = option("tint-" + (i % 5), visible(names[i]), make("small", {}, String(id)));
    Object.assign(token, { number: id, name: names[i] });
    return names[i].includes("\n") ? [token, make("span", { className: "break" })] : [token];
  }));
  showSteps(await ask("/inspect/steps", { text }, signal), count);
}, ["raw-note", "pieces", "near", "steps"], forgetTokens);
function forgetTokens() {
  steps = null;
  $("raw-note").textContent = "";
  $("pieces").replaceChildren();
  $("near").hidden = $("steps").hidden = true;
}
$("raw").oninput = () => split();
const showNear = debounced(async (signal, token) => {
  const { neighbours } = await ask("/inspect/neighbours", { token: token.number, n: 12 }, signal);
  if (!token.isConnected) return; // the text is another by now
  const rows = neighbours.map(({ token, text, cosine }) => ({
    cells: [[visible(text), "t"], [String(token), "n"], [cosine.toFixed(3), "n"],
      [bar(Math.max(0, cosine)), "bar"]],
  }));
  $("near").hidden = false;
  $("near").firstElementChild.textContent = `Nearest to ${visible(token.name)}`;
  $("near").querySelector("table")?.remove();
  $("near").append(table([["Token"], ["Id", "n"], ["Cosine", "n"], [""]], rows));
}, ["near"], () => $("near").hidden = true, 0);
chooser($("pieces"), (token) => showNear(token));

// -------------------------------------------------------------------------------- step by step

let steps = null; // what /inspect/steps says of the text

function showSteps(answer, count) {
  steps = answer;
  $("steps").hidden = !count;
  $("steps-words").textContent = steps.words;
  const isBpe = steps.kind === "BPE" && steps.pieces !== null;
  $("merging").hidden = !isBpe;
  $("step-table").hidden = isBpe || steps.pieces === null;
  if (isBpe) {
    $("step").max = steps.merges.length;
    $("step").value = steps.merges.length; // all are made
    $("step").disabled = !steps.merges.length;
    showStep();
  } else if (steps.pieces) {
    showPieces();
  }
}

// A piece's ids with one merge made wherever it stands, from the left: [[id, whether it is new]].
function merged(symbols, [, left, right, made]) {
  const result = [];
  for (let i = 0; i < symbols.length; i++) {
    const joins = symbols[i][0] === left && i + 1 < symbols.length && symbols[i + 1][0] === right;
    result.push(joins ? [made, true] : [symbols[i][0], false]);
    if (joins) i++;
  }
  return result;
}

// The text after so many merges.
function showStep() {
  const n = Number($("step").value), { pieces, merges, names } = steps;
  const name = (id) => visible(names[id]);
  let rows = pieces.map((ids) => ids.map((id) => [id, false]));
  for (const merge of merges.slice(0, n)) rows = rows.map((symbols) => merged(symbols, merge));
  const count = rows.flat().length, places = rows.flat().filter(([, isNew]) => isNew).length;
  $("step-count").value = `${whole.format(n)} of ${whole.format(merges.length)}`;
  $("step").setAttribute("aria-valuetext", `${n} of ${merges.length} merges`);
  if (n) {
    const [rank, left, right, made] = merges[n - 1];
    $("step-text").replaceChildren(`Rank ${whole.format(rank)}: `, make("code", {}, name(left)),
      " + ", make("code", {}, name(right)), " \u2192 ", make("code", {}, name(made)),
      `, token ${made}, in ${plural(places, "place")}; ${plural(count, "token")} now.`);
  } else {
    $("step-text").textContent = `${plural(pieces.length, "piece")}, no merge yet: ${
      plural(count, "token")}.`;
  }
  $("step-pieces").replaceChildren(...rows.flatMap((symbols, i) => {
    const tokens = symbols.map(([id, isNew]) => make("span",
      { className: `symbol tint-${i % 5}` + (isNew ? " new" : "") }, name(id)));
    const ends = symbols.some(([id]) => names[id].includes("\n"));
    const piece = make("span", { className: "piece" }, ...tokens);
    return ends ? [piece, make("span", { className: "break" })] : [piece];
  }));
}
$("step").oninput = () => steps?.merges && showStep();

// Of a tokenizer without merges: each piece with its tokens, and the sums that decide.
function showPieces() {
  const sum = (row) => row.scores.reduce((a, b) => a + b, 0).toFixed(2);
  const tokens = (row) => row.texts.map(visible).join(" | ");
  const scored = steps.pieces.some((row) => row.scores);
  const heads = [["Tokens of a piece"], ["Ids", "n"]];
  if (scored) heads.push(["Sum of scores", "n"], ["Next best cut"], ["Sum", "n"]);
  const rows = steps.pieces.map((row) => {
    const cells = [[tokens(row), "t"], [row.ids.join(" "), "n"]];
    if (scored) {
      cells.push([sum(row), "n"], [row.other ? tokens(row.other) : "none", "t"],
        [row.other ? sum(row.other) : "", "n"]);
    }
    return { cells };
  });
  $("step-table").replaceChildren(table(heads, rows));
}

$("raw").value = "def mean(values):\n    return sum(values) / len(values)\n";
export function show() {
  split();
}
export { forgetTokens as reset };
