// The view Complete: a text, and how it goes on.

import { $, chooser, plural, whole } from "./base.js";
import { answer, room, sampling, showAlternatives, toggle } from "./sampling.js";
import { complain, debounced, state } from "./server.js";
import { tokenize } from "./tokens.js";

let asked = "", written = ""; // what was completed last, and how
chooser($("made"), (element) => {
  $("result").append($("chosen"));
  showAlternatives(element);
});
$("made").setAttribute("aria-label", "Tokens of the completion");

const complete = (prompt) => toggle($("go"), async (signal) => {
  const body = { ...sampling(), prompt, logprobs: 5 };
  const { fits, most } = await room({ prompt }, body.max_tokens, signal);
  if (fits < 1) throw new Error(`This text fills the context of ${most} tokens.`);
  body.max_tokens = fits;
  $("chosen").hidden = true;
  $("result").hidden = false;
  $("given").textContent = asked = prompt;
  $("made").replaceChildren();
  $("again").disabled = $("onward").disabled = true;
  written = await answer("/v1/completions", body, $("made"), $("made-note"), signal);
  $("again").disabled = false;
  $("onward").disabled = !written;
});
$("go").onclick = () => complete($("prompt").value);
$("again").onclick = () => complete(asked);
$("onward").onclick = () => {
  $("prompt").value = asked + written;
  measure();
  complete($("prompt").value);
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) complete($("prompt").value);
};

const measure = debounced(async (signal) => {
  const { count } = await tokenize($("prompt").value, signal);
  $("prompt-size").textContent = `${plural(count, "token")} of ${
    whole.format(state.model.max_model_len)}`;
  complain("");
}, ["prompt-size"], () => $("prompt-size").textContent = "");
$("prompt").oninput = () => measure();

$("prompt").value = "import os\n\n\ndef ";
export function show() {
  $("result").append($("chosen"));
}
export function reset() {
  measure();
}
