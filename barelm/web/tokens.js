// The view Tokens: what a text is cut into, and the neighbours of a token.

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
}, ["raw-note", "pieces", "near"], forgetTokens);
function forgetTokens() {
  $("raw-note").textContent = "";
  $("pieces").replaceChildren();
  $("near").hidden = true;
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

$("raw").value = "def mean(values):\n    return sum(values) / len(values)\n";
export function show() {
  split();
}
export { forgetTokens as reset };
