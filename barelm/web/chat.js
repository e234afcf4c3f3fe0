// The view Chat: a conversation, whose turns go to /v1/chat/completions each time.

import { $, chooser, make } from "./base.js";
import { answer, hideChosen, room, sampling, showAlternatives, toggle } from "./sampling.js";

const turns = []; // {role, content, element}
function addTurn(role, content) {
  const list = make("div", { className: "text" }, content);
  const element = make("div", { className: "turn " + role },
    make("h2", {}, role === "user" ? "You" : "Model"), list);
  if (role === "assistant") {
    list.setAttribute("aria-label", "Tokens of the answer");
    chooser(list, (token) => {
      element.append($("chosen"));
      showAlternatives(token);
    });
  }
  $("turns").append(element);
  turns.push({ role, content, element });
  return list;
}
function dropTurn() {
  if ($("chosen").closest(".turn")) hideChosen();
  turns.pop().element.remove();
}

async function reply(signal) {
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []),
    ...turns.map(({ role, content }) => ({ role, content }))];
  const body = { ...sampling(), messages, logprobs: true, top_logprobs: 5 };
  let space = await room({ messages }, body.max_tokens, signal), dropped = 0;
  const enough = Math.min(body.max_tokens ?? Infinity, space.most / 2);
  while (space.left < enough && messages.length > (system ? 3 : 2)) {
    dropped += messages.splice(system ? 1 : 0, 2).length; // the oldest question and its answer
    space = await room({ messages }, body.max_tokens, signal);
  }
  if (space.fits < 1) throw new Error(`This message fills the context of ${space.most} tokens.`);
  body.max_tokens = space.fits;
  const place = addTurn("assistant", ""), turn = turns.at(-1);
  turn.content = await answer("/v1/chat/completions", body, place, $("chat-note"), signal);
  if (!place.textContent) dropTurn();
  if (dropped) $("chat-note").append(` The first ${dropped} turns no longer fit: left out.`);
}
const converse = (begin) => toggle($("send"), async (signal) => {
  if (begin() === false) return;
  $("retry").disabled = $("clear").disabled = true;
  await reply(signal).finally(() => $("retry").disabled = $("clear").disabled = false);
});
$("send").onclick = () => converse(() => {
  const text = $("message").value.trim();
  $("message").focus();
  sampling(); // complains before the message is gone
  if (!text) return false;
  addTurn("user", text);
  $("message").value = "";
});
$("retry").onclick = () => converse(() => {
  if (turns.at(-1)?.role === "assistant") dropTurn();
});
$("clear").onclick = () => {
  while (turns.length) dropTurn();
  $("retry").disabled = $("clear").disabled = true;
  $("chat-note").textContent = "";
  $("message").focus();
};
$("message").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!$("send").control) $("send").click();
};

export function show() {}
export function reset() {}
