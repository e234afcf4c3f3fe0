// The view Chat: a conversation, whose turns go to /v1/chat/completions each time. Nothing is
// changed before the server has said that what is asked fits, and what it does not answer is taken
// back: a turn that poisons those after it is never left behind.

import { $, make, plural } from "./base.js";
import * as store from "./conversations.js";
import { answerOf, contentOf, messagesOf } from "./conversations.js";
import { generate, hideChosen, room, sampling, toggle } from "./sampling.js";
import { ask, complain, guard, state, tabStore } from "./server.js";
import { copyAction, edit, elementOf, markBusy, noteOf, piecesOf, showActions, showWords,
  thumbAction, tokensAction } from "./turns.js";

let conversation = store.begin(), model = null; // model: the name of the one that it is kept for
const busy = () => Boolean($("send").control);

// ---------------------------------------------------------------------------------------------
// What is shown

function render() {
  if ($("chosen").closest("#turns")) hideChosen();
  const { turns } = conversation, shown = turns.map(elementOf);
  const isSame = shown.length === $("turns").children.length
    && shown.every((element, i) => element === $("turns").children[i]);
  if (!isSame) $("turns").replaceChildren(...shown);
  turns.forEach((turn, i) => {
    showWords(turn);
    if (turn.role === "user") {
      showActions(turn, "", userActions(turn, i));
    } else {
      showActions(turn, noteOf(turn), answerActions(turn, i));
    }
  });
  showList();
  for (const id of ["new-chat", "delete-one", "delete-all", "import", "conversations"]) {
    $(id).disabled = busy();
  }
  $("chat-note").textContent = turns.length ? "" : "Enter sends, Shift and Enter starts a line.";
}

function userActions(turn, i) {
  const disabled = busy(), isLast = i + 1 === conversation.turns.length;
  return {
    ...(isLast && !busy() ? { answer: ["Answer", () => again(i + 1)] } : {}),
    edit: ["Edit", () => edit(turn, "Send", (text) => editQuestion(i, text)), { disabled }],
    copy: copyAction(turn),
    delete: ["Delete", () => remove(i), { disabled, title: "This message and its answer" }],
  };
}

function answerActions(turn, i) {
  const answer = answerOf(turn), disabled = busy(), isLast = i + 1 === conversation.turns.length;
  const step = (by) => () => {
    turn.at += by;
    save();
    render();
  };
  const versions = turn.versions.length < 2 ? {} : {
    earlier: ["\u2039", step(-1), { ariaLabel: "Earlier answer", disabled: disabled || !turn.at }],
    later: ["\u203a", step(1), { ariaLabel: "Later answer",
      disabled: disabled || turn.at + 1 === turn.versions.length }],
  };
  const isCut = isLast && answer.content && answer.reason !== "stop";
  return {
    ...versions,
    tokens: tokensAction(turn),
    copy: copyAction(turn),
    again: ["Again", () => again(i), { disabled, title: "Another answer, from here" }],
    ...(isCut ? { continue: ["Continue", () => goOn(turn), { disabled }] } : {}),
    edit: ["Edit", () => edit(turn, "Save", (text) => editAnswer(turn, text)), { disabled }],
    delete: ["Delete", () => remove(i), { disabled }],
    ...(state.model.feedback ? {
      good: thumbAction(answer, 1, disabled, (rating) => rate(i, answer, rating)),
      bad: thumbAction(answer, -1, disabled, (rating) => rate(i, answer, rating)),
    } : {}),
  };
}

// The end of the conversation is in sight while the reader is there.
const below = () =>
  $("turns").getBoundingClientRect().bottom + $("composer").offsetHeight + 20 - innerHeight;
const follow = () => scrollBy(0, Math.max(0, below()));

function showList() {
  const all = store.kept(model), isKept = all.some((one) => one.id === conversation.id);
  const options = (isKept ? all : [conversation, ...all]).map((one) =>
    make("option", { value: one.id, selected: one.id === conversation.id },
      one.turns.length ? store.titleOf(one) : "New conversation"));
  $("conversations").replaceChildren(...options);
}

// ---------------------------------------------------------------------------------------------
// Asking

// The request for an answer to turns (continues: for more of the last one), without the oldest
// where they leave no room.
async function requestFor(turns, continues, signal) {
  const how = continues ? { continue_final_message: true, add_generation_prompt: false } : {};
  // A model's thoughts are shown as they come, with the rest.
  const body = { ...sampling(), ...how, logprobs: true, top_logprobs: 5, reasoning_format: "none" };
  const question = turns.findLastIndex((turn) => turn.role === "user");
  let dropped = 0, space;
  for (; ;) {
    body.messages = messagesOf({ system: conversation.system, turns }, dropped);
    space = await room({ messages: body.messages, ...how }, body.max_tokens, signal);
    const next = turns.findIndex((turn, i) => i > dropped && turn.role === "user");
    const enough = Math.min(body.max_tokens ?? Infinity, space.most / 2);
    if (space.left >= enough || next < 0 || next > question) break;
    dropped = next;
  }
  if (space.fits < 1) {
    const what = continues ? "This answer" : "This message";
    throw new Error(`${what} fills the context of ${plural(space.most, "token")}.`);
  }
  return { body: { ...body, max_tokens: space.fits }, dropped };
}

// Let the model write into the answer of a turn, behind what it has; whether anything came.
async function write(turn, body, signal) {
  const answer = answerOf(turn), before = answer.content;
  render();
  follow();
  markBusy(turn, true);
  const made = await generate("/v1/chat/completions", body, signal, (pieces) => {
    const isAtEnd = below() < 48;
    piecesOf(answer).push(...pieces);
    answer.content += pieces.map((piece) => piece.text).join("");
    showWords(turn);
    if (isAtEnd) follow();
  });
  markBusy(turn, false);
  if (!made.count) return false;
  const began = before ? answer : { count: 0, seconds: 0, first: made.first };
  answer.count = (began.count ?? 0) + made.count;
  answer.seconds = (began.seconds ?? 0) + made.seconds;
  answer.first = began.first ?? made.first;
  answer.reason = made.reason;
  delete answer.rating; // it was of other words
  return true;
}

const converse = (work) => toggle($("send"), async (signal) => {
  $("undo").hidden = true;
  await work(signal);
}).finally(() => {
  const isAtEnd = below() < 48;
  if (state.model) render(); // with the line of tokens and time, which it did not have yet
  if (isAtEnd) follow();
});

// Let the model answer `turns`, in `turn`, which follows them; where nothing comes all stays.
async function reply(turns, turn, { body, dropped }, signal) {
  const before = snapshot();
  turn.versions.push({ content: "", dropped });
  turn.at = turn.versions.length - 1;
  conversation.turns = [...turns, turn];
  const isWritten = await write(turn, body, signal);
  if (isWritten) {
    save();
  } else {
    turn.versions.pop();
    restore(before);
  }
  return { isWritten, before };
}
const newAnswer = () => ({ role: "assistant", versions: [], at: 0 });

const send = () => converse(async (signal) => {
  const text = $("message").value.trim();
  $("message").focus();
  if (!text) return;
  const question = { role: "user", content: text };
  const turns = [...conversation.turns, question];
  const request = await requestFor(turns, false, signal); // or the text stays where it is
  $("message").value = "";
  grow();
  const { isWritten } = await reply(turns, newAnswer(), request, signal);
  if (!isWritten && !$("message").value) $("message").value = text;
  grow();
});

// Another answer at place i, to what is before it; what comes behind it goes.
const again = (i) => converse(async (signal) => {
  const turn = conversation.turns[i] ?? newAnswer(), n = conversation.turns.length - i - 1;
  const turns = conversation.turns.slice(0, i), request = await requestFor(turns, false, signal);
  const { isWritten, before } = await reply(turns, turn, request, signal);
  if (isWritten && n > 0) offerUndo(`${plural(n, "later turn")} left out.`, before);
});

const editQuestion = (i, text) => converse(async (signal) => {
  const turns = [...conversation.turns.slice(0, i), { role: "user", content: text }];
  const request = await requestFor(turns, false, signal);
  const { isWritten, before } = await reply(turns, newAnswer(), request, signal);
  if (isWritten) offerUndo("Asked anew from here.", before);
});

function editAnswer(turn, text) {
  if (text === contentOf(turn)) return;
  turn.versions.push({ content: text, dropped: answerOf(turn).dropped, reason: "edited" });
  turn.at = turn.versions.length - 1;
  save();
  render();
}

const goOn = (turn) => converse(async (signal) => {
  const { body } = await requestFor(conversation.turns, true, signal);
  if (await write(turn, body, signal)) save();
});

// Take away a question with its answer, or an answer: at the end alone, else with its question.
function remove(i) {
  const before = snapshot(), { turns } = conversation, isQuestion = turns[i].role === "user";
  const isAlone = !isQuestion && (i + 1 === turns.length || turns[i - 1]?.role !== "user");
  const from = isQuestion || isAlone ? i : i - 1;
  const to = isQuestion && turns[i + 1]?.role === "assistant" ? i + 2 : i + 1;
  conversation.turns = [...turns.slice(0, from), ...turns.slice(to)];
  save();
  render();
  offerUndo(`${plural(to - from, "turn")} deleted.`, before);
  $("message").focus();
}

async function rate(i, answer, rating) {
  const messages = messagesOf({ ...conversation, turns: conversation.turns.slice(0, i) },
    answer.dropped);
  await guard(async () => {
    await ask("/feedback", { messages, response: answer.content, rating });
    answer.rating = rating;
    complain("");
    save();
    render();
  });
}

// ---------------------------------------------------------------------------------------------
// Back to what was before

function snapshot() {
  const { turns } = conversation;
  return { conversation, turns, places: turns.map((turn) => turn.at) };
}
function restore({ conversation: earlier, turns, places }) {
  conversation = earlier;
  conversation.turns = turns;
  turns.forEach((turn, i) => turn.role === "user" || (turn.at = places[i]));
}
function offerUndo(words, before) {
  $("undo").hidden = false;
  $("undo").firstElementChild.textContent = words;
  $("undo").lastElementChild.onclick = () => {
    restore(before);
    save();
    open(conversation);
  };
}

// ---------------------------------------------------------------------------------------------
// Conversations that are kept

function save() {
  if (!conversation.turns.length) {
    store.forget(model, conversation.id);
    return;
  }
  conversation.changed = Date.now();
  if (!store.keep(model, conversation)) {
    complain("This browser does not keep all conversations: its storage is full, or forbidden.");
  }
}

function open(one) {
  conversation = one;
  tabStore.set("chat", one.id);
  $("undo").hidden = true;
  $("system").value = one.system;
  showSystem();
  render();
  follow();
}

$("conversations").onchange = () => {
  const chosen = store.kept(model).find((one) => one.id === $("conversations").value);
  if (chosen) open(chosen);
};
$("new-chat").onclick = () => {
  open(store.begin(conversation.system));
  $("message").focus();
};
$("delete-one").onclick = () => {
  const before = snapshot();
  store.forget(model, conversation.id);
  open(store.begin(conversation.system));
  offerUndo("Conversation deleted.", before);
};
$("delete-all").onclick = () => {
  const n = store.kept(model).length;
  if (!n || !confirm(`Delete ${plural(n, "conversation")} with this model?`)) return;
  store.forgetAll(model);
  open(store.begin(conversation.system));
};

// Files

function download(text, name, type) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
$("export-one").onclick = () =>
  download(store.asJson(conversation), `${model}-chat.json`, "application/json");
$("export-all").onclick = () =>
  download(store.asJsonl(store.kept(model)), `${model}-chats.jsonl`, "application/jsonl");
$("import").onclick = () => $("import-file").click();
$("import-file").onchange = () => guard(async () => {
  const [file] = $("import-file").files;
  if (!file) return;
  $("import-file").value = ""; // so that the same file can be chosen again
  if (file.size > 5e6) throw new Error(`${file.name} has more than 5 MB`);
  let read;
  try {
    read = store.read(await file.text());
  } catch (error) {
    throw new Error(`${file.name}: ${error.message}`);
  }
  complain("");
  const isWhole = store.keep(model, ...read);
  open(read[0]);
  const note = isWhole ? "imported." : "read; not all of them could be kept.";
  $("chat-note").textContent = `${plural(read.length, "conversation")} ${note}`;
});

const menu = $("chat-menu");
menu.onclick = (event) => {
  if (!event.target.closest("button")) return;
  menu.open = false;
  menu.firstElementChild.focus();
};
menu.onkeydown = (event) => {
  if (event.key !== "Escape" || !menu.open) return;
  menu.open = false;
  menu.firstElementChild.focus();
};
addEventListener("click", (event) => {
  if (!menu.contains(event.target)) menu.open = false;
});

// ---------------------------------------------------------------------------------------------
// The system prompt, and the message in the making

function showSystem() {
  const { system: brought, opening } = state.model?.chat ?? { system: "", opening: "" };
  const own = $("system").value.trim(), words = (own || brought).replace(/\s+/g, " ");
  const whose = own || !brought ? "" : ", the template's own";
  $("system-brief").textContent = `${whose}: ${words || "none"}`;
  $("system").placeholder = brought || "None";
  $("opening-box").hidden = Boolean(own) || !opening;
  $("opening").textContent = opening;
}
$("system").oninput = () => {
  conversation.system = $("system").value.trim();
  showSystem();
};
$("system").onchange = () => conversation.turns.length && save();

function grow() { // the field with what is written in it
  $("message").style.height = "auto";
  $("message").style.height = $("message").scrollHeight + 2 + "px";
}
$("message").oninput = grow;
$("message").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!busy()) send();
};
$("send").onclick = () => send();
new ResizeObserver(() => { // what is chosen stands above it
  document.documentElement.style.setProperty("--composer", $("composer").offsetHeight + "px");
}).observe($("composer"));

export function show() {
  render();
  grow();
  follow();
}

// What the chat that is shown was, if it is this model's.
export function reset() {
  const { id, chat } = state.model;
  $("untuned").hidden = chat.tuned;
  $("untuned").textContent = chat.possible
    ? `This model has no chat training: ${chat.why}. It answers, but its answers may wander and `
      + "not end; Complete is what it learned."
    : `This model cannot chat: ${chat.why}. See Complete.`;
  $("send").disabled = $("message").disabled = !chat.possible;
  $("system-box").hidden = !chat.possible;
  if (model === id) return showSystem();
  model = id;
  const last = tabStore.get("chat");
  open(store.kept(model).find((one) => one.id === last) ?? store.begin());
}
