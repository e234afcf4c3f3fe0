// A turn of a conversation as elements: who speaks, what is said, as Markdown or as the tokens that
// it was made of, and what can be done with it.

import { $, chooser, draw, make } from "./base.js";
import { answerOf, contentOf } from "./conversations.js";
import { copy, showMarkdown } from "./markdown.js";
import { pieceOption, showAlternatives, summary } from "./sampling.js";

const pieces = new WeakMap(); // of an answer: what it was made of, until the page is left
export const piecesOf = (answer) => pieces.get(answer) ?? pieces.set(answer, []).get(answer);

const elements = new WeakMap(); // of a turn

export function elementOf(turn) {
  return elements.get(turn) ?? elements.set(turn, newElement(turn)).get(turn);
}

function newElement(turn) {
  const element = make("article", { className: "turn " + turn.role });
  const body = make("div", { className: turn.role === "user" ? "text" : "markdown" });
  const actions = make("div", { className: "actions" });
  element.append(make("h2", {}, turn.role === "user" ? "You" : "Model"), body, actions);
  return Object.assign(element, { body, actions, list: null, asTokens: false, shown: null });
}

// Show what is said. What is shown already stays.
export function showWords(turn) {
  const element = elementOf(turn);
  if (turn.role === "user") {
    element.body.textContent = turn.content;
    return;
  }
  const answer = answerOf(turn);
  if (element.shown !== answer) { // another version: nothing of the old one is in it
    element.list?.remove();
    element.list = null;
    element.shown = answer;
  }
  element.asTokens &&= piecesOf(answer).length > 0;
  element.body.hidden = element.asTokens;
  if (element.list) element.list.hidden = !element.asTokens;
  if (element.asTokens) {
    showTokens(element, answer);
  } else {
    showMarkdown(element.body, answer.content || "(nothing)");
  }
}

// The tokens of an answer, those that are not there yet behind the others.
function showTokens(element, answer) {
  if (!element.list) {
    element.list = make("div", { className: "text", ariaLabel: "Tokens of the answer" });
    chooser(element.list, (token) => {
      element.list.after($("chosen"));
      showAlternatives(token);
    });
    element.body.after(element.list);
  }
  const made = piecesOf(answer), { list } = element;
  list.append(...made.slice(list.children.length).map(pieceOption));
}

export function markBusy(turn, busy) {
  const { body } = elementOf(turn);
  if (busy) body.setAttribute("aria-busy", "true");
  else body.removeAttribute("aria-busy");
}

// ---------------------------------------------------------------------------------------------
// What can be done with a turn

const THUMB = "M2 9h3v10H2zM7 18V9.5L11 2c1.4.2 2.2 1.2 2 2.6L12.4 8H17c1.2 0 2 1 1.8 2.2l-1 6"
  + "c-.2 1.6-1.3 2.6-2.8 2.6H9z";
const thumb = (down) => draw("svg", { viewBox: "0 0 20 20", class: down ? "thumb down" : "thumb",
  "aria-hidden": "true" }, draw("path", { d: THUMB }));

// actions: {name: [label, f, more properties]}; a name stays with what it does, so that the
// keyboard's focus finds it again.
export function showActions(turn, note, actions) {
  const row = elementOf(turn).actions, focused = document.activeElement;
  const had = row.contains(focused) ? focused.dataset.name : null;
  const buttons = Object.entries(actions).map(([name, [label, f, more]]) => {
    const button = make("button", { className: "quiet", type: "button", onclick: f, ...more },
      label);
    button.dataset.name = name;
    return button;
  });
  row.replaceChildren(...(note ? [make("p", { className: "note" }, note)] : []), ...buttons);
  if (had) (buttons.find((b) => b.dataset.name === had && !b.disabled) ?? $("message")).focus();
}

// What was made and how: under each answer.
export function noteOf(turn) {
  const answer = answerOf(turn), parts = answer.count ? [summary(answer)] : [];
  if (answer.reason === "edited" || answer.reason === "imported") parts.push(answer.reason);
  if (answer.dropped) parts.push(`the first ${answer.dropped} turns no longer fit: left out`);
  const n = turn.versions.length, which = n > 1 ? `${turn.at + 1} of ${n}: ` : "";
  return which + parts.join("; ");
}

export function copyAction(turn) {
  return ["Copy", (event) => copy(contentOf(turn), event.currentTarget)];
}

export function tokensAction(turn) {
  const element = elementOf(turn), isThere = piecesOf(answerOf(turn)).length > 0;
  return ["Tokens", () => {
    element.asTokens = !element.asTokens;
    if (!element.asTokens && element.contains($("chosen"))) $("chosen").hidden = true;
    showWords(turn);
    element.actions.querySelector("[data-name=tokens]").ariaPressed = String(element.asTokens);
  }, { ariaPressed: String(element.asTokens), disabled: !isThere,
    title: isThere ? "The tokens, each with its alternatives"
      : "The tokens are forgotten when the page is left" }];
}

export function thumbAction(answer, rating, disabled, rate) {
  const name = rating > 0 ? "Good answer" : "Bad answer";
  return [thumb(rating < 0), () => rate(answer.rating === rating ? 0 : rating),
    { ariaLabel: name, title: name, ariaPressed: String(answer.rating === rating), disabled }];
}

// Edit what is said: done(text) where it was changed.
export function edit(turn, label, done) {
  const element = elementOf(turn);
  if (element.classList.contains("editing")) return;
  const before = contentOf(turn);
  const field = make("textarea", { value: before, ariaLabel: "Edit this message",
    rows: Math.min(12, before.split("\n").length + 1), spellcheck: false });
  const save = make("button", { className: "main", type: "button" }, label);
  const cancel = make("button", { type: "button" }, "Cancel");
  const form = make("div", { className: "edit" }, field,
    make("div", { className: "row" }, save, cancel));
  const close = () => {
    form.remove();
    element.classList.remove("editing");
    element.querySelector("[data-name=edit]")?.focus();
  };
  cancel.onclick = close;
  save.onclick = () => {
    const text = field.value.trim();
    if (!text) return field.focus();
    close();
    done(text);
  };
  field.onkeydown = (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save.click();
  };
  element.classList.add("editing");
  element.append(form);
  field.focus();
}
