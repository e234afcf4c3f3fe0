// How text is sampled: the fields, a request, its answer as tokens of which each has alternatives.

import { $, bar, make, option, percent, plural, table, visible } from "./base.js";
import { ask, complain, events, guard, isGone, state } from "./server.js";

const SAMPLING = [ // name in a request, label, value, least, most, step
  ["max_tokens", "Tokens, at most", 200, 1, null, 1],
  ["temperature", "Temperature", 0.8, 0, 2, 0.05],
  ["top_k", "Top k, 0: all", 50, 0, null, 1],
  ["top_p", "Top p", 1, 0.01, 1, 0.01],
  ["min_p", "Min p", 0, 0, 1, 0.01],
  ["seed", "Seed", "", 0, null, 1],
  ["presence_penalty", "Presence penalty", 0, -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", 0, -2, 2, 0.1],
  ["repetition_penalty", "Repetition penalty", 1, 0.1, 2, 0.05],
];
for (const [id, label, value, min, max, step] of SAMPLING) {
  const input = make("input", { id, type: "number", min, step, value, placeholder: "random" });
  if (max !== null) input.max = max;
  $("sampling").lastElementChild.append(
    make("div", { className: "field" }, make("label", { htmlFor: id }, label), input));
}
$("sampling").lastElementChild.append(
  make("div", { className: "field wide" },
    make("label", { htmlFor: "stop" }, "Stop at these texts, one a line (\\n: its end)"),
    make("textarea", { id: "stop", rows: 2, spellcheck: false })),
  make("div", { className: "check wide" },
    make("input", { id: "shade", type: "checkbox", checked: true }),
    make("label", { htmlFor: "shade" }, "Shade unlikely tokens")));
$("sampling").open = matchMedia("(min-width: 46rem)").matches;
$("shade").onchange = () => document.body.classList.toggle("shade", $("shade").checked);
$("shade").onchange();

export function sampling() {
  const chosen = { model: state.model?.id, stream: true };
  for (const [id, label] of SAMPLING) {
    if (!$(id).checkValidity()) throw new Error(`${label}: ${$(id).validationMessage}`);
    if ($(id).value !== "") chosen[id] = Number($(id).value);
  }
  const stop = $("stop").value.split("\n").filter(Boolean)
    .map((text) => text.replaceAll("\\n", "\n"));
  return stop.length ? { ...chosen, stop } : chosen;
}

// The tokens of a completion's chunk, and of a chat's, alike: {text, logprob, top: [same]}.
function tokensOf(choice) {
  if (choice.logprobs?.content) {
    return choice.logprobs.content.map((t) => ({ text: t.token, logprob: t.logprob,
      top: t.top_logprobs.map((o) => ({ text: o.token, logprob: o.logprob })) }));
  }
  return (choice.logprobs?.tokens ?? []).map((text, i) => ({ text,
    logprob: choice.logprobs.token_logprobs[i],
    top: Object.entries(choice.logprobs.top_logprobs[i] ?? {})
      .map(([text, logprob]) => ({ text, logprob })) }));
}

// The alternatives to the tokens that an element was made of, below the text that it is in.
export function showAlternatives(element) {
  const parts = element.tokens.flatMap((token) => {
    const all = token.top.some((o) => o.text === token.text) ? token.top : [...token.top, token];
    const rows = all.sort((a, b) => b.logprob - a.logprob).map((o) => ({
      here: o.text === token.text,
      cells: [[visible(o.text), "t"], [percent(Math.exp(o.logprob)), "n"],
        [bar(Math.exp(o.logprob)), "bar"]],
    }));
    return [table([[`In place of ${visible(token.text)}`], ["Probability", "n"], [""]], rows)];
  });
  $("chosen").replaceChildren(...parts, make("p", { className: "note" },
    "The model's own probabilities, before temperature and filters."));
  $("chosen").hidden = false;
}

// How many tokens the answer to a request may have: what was asked for, or the room that is left,
// none where the server does not even count what was sent.
export async function room(request, wanted, signal) {
  const { count, max_model_len: most } = await ask("/tokenize", request, signal).catch((error) => {
    if (error.code !== "context_length_exceeded") throw error;
    return { count: state.model.max_model_len, max_model_len: state.model.max_model_len };
  });
  return { left: most - count, fits: Math.min(wanted ?? most, most - count), most };
}

// Do the work of a button, work(signal), which says Stop meanwhile, and stops it.
export const toggle = (button, work) => guard(async () => {
  if (button.control) return button.control.abort();
  const label = button.textContent;
  button.control = new AbortController();
  button.textContent = "Stop";
  $("status").textContent = "Waiting";
  complain("");
  try {
    await work(button.control.signal);
  } finally {
    button.control = null;
    button.textContent = label;
    $("status").textContent = isGone() ? "No connection" : "Ready";
  }
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") [$("go"), $("send")].forEach((button) => button.control?.abort());
});

// Ask for text. show(pieces) is called once a frame with what is new: {text, tokens} each, of which
// one is often a token, and several where a character is made of them. What was made comes back.
export async function generate(path, body, signal, show) {
  const began = performance.now(), made = { text: "", count: 0, reason: "stopped" };
  let first = 0, waiting = [], held = [], frame = 0;
  const flush = () => {
    frame = 0;
    if (waiting.length) show(waiting);
    waiting = [];
    const rate = made.count > 1 ? (made.count - 1) / (performance.now() - first) * 1000 : 0;
    $("status").textContent = rate ? `${rate.toFixed(0)} tokens/s` : "Generating";
  };
  try {
    for await (const { choices } of events(path, body, signal)) {
      if (!choices?.length) continue; // usage
      const text = choices[0].text ?? choices[0].delta.content ?? "";
      const tokens = tokensOf(choices[0]);
      if (tokens.length) first ||= performance.now();
      made.count += tokens.length;
      held.push(...tokens);
      made.reason = choices[0].finish_reason ?? made.reason;
      if (!text) continue; // half a character, or what may become a stop text: with the next
      waiting.push(...piecesOf(text, held));
      held = [];
      made.text += text;
      frame ||= requestAnimationFrame(flush);
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    cancelAnimationFrame(frame);
    flush();
  }
  made.seconds = (performance.now() - began) / 1000;
  made.first = first ? (first - began) / 1000 : 0;
  return made;
}

// The pieces of a text that came at once: one of each token, where together they are the text.
function piecesOf(text, tokens) {
  if (tokens.map((token) => token.text).join("") !== text) return [{ text, tokens }];
  return tokens.map((token) => ({ text: token.text, tokens: [token] }));
}

// A piece as an element that can be chosen, the darker the less likely its tokens were.
export function pieceOption({ text, tokens }) {
  const least = Math.min(0, ...tokens.map((token) => token.logprob));
  const level = [-0.7, -1.6, -3, -5].filter((limit) => least < limit).length;
  return Object.assign(option("s" + level, text), { tokens });
}

const ENDS = { length: "ended at the limit", stop: "came to its end", stopped: "stopped" };
// What was made, in a line: its tokens, its time, how it ended.
export function summary({ count, seconds, first, reason }) {
  const time = seconds.toFixed(seconds < 10 ? 2 : 0);
  return `${plural(count, "token")} in ${time} s, the first after ${first.toFixed(2)} s; ${
    ENDS[reason] ?? reason}`;
}

// The alternatives are shown in one place, which goes where the chosen token is.
export function hideChosen() {
  $("chosen").hidden = true;
  document.body.append($("chosen"));
}
