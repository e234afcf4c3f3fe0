// Conversations: what they are made of, how they are kept in this browser, and what files of them
// look like. One is {id, changed, system, turns}. A turn is {role: "user", content} or
// {role: "assistant", versions, at}: the answers that were made here, of which number `at` counts;
// an answer is {content, count, seconds, first, reason, dropped, rating}.

const MOST = 50; // conversations that are kept of a model; the oldest go
const MOST_CHARACTERS = 2_000_000; // of all of them together, of the 5 MB that a browser gives
const MOST_TURNS = 2000; // of one from a file

export const begin = (system = "") =>
  ({ id: crypto.getRandomValues(new Uint32Array(2)).join("-"), changed: 0, system, turns: [] });
export const answerOf = (turn) => turn.versions[turn.at];
export const contentOf = (turn) => turn.role === "user" ? turn.content : answerOf(turn).content;

// As the API takes them, and prepare.py. dropped: so many turns at the beginning are left out.
export function messagesOf({ system, turns }, dropped = 0) {
  const said = turns.slice(dropped).map((turn) =>
    ({ role: turn.role, content: contentOf(turn) }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

export function titleOf({ turns }) {
  const words = turns.length ? contentOf(turns[0]).trim().replace(/\s+/g, " ") : "";
  return words.length > 60 ? words.slice(0, 59) + "\u2026" : words || "(empty)";
}

// ---------------------------------------------------------------------------------------------
// The browser's storage

const place = (model) => "barelm.chats." + model;

// The conversations of a model, the newest first.
export function kept(model) {
  try {
    const all = JSON.parse(localStorage.getItem(place(model)) ?? "[]");
    return all.filter(isConversation);
  } catch { // no storage, or something else in it
    return [];
  }
}

function isConversation(value) {
  const isAnswer = (answer) => typeof answer?.content === "string";
  const isTurn = (turn) => turn?.role === "user" ? typeof turn.content === "string"
    : turn?.role === "assistant" && Array.isArray(turn.versions)
      && turn.versions.every(isAnswer) && isAnswer(turn.versions[turn.at]);
  return typeof value?.id === "string" && typeof value.system === "string"
    && Array.isArray(value.turns) && value.turns.every(isTurn);
}

// Without what is of this page alone: the tokens of answers, and elements.
const STORED = ["id", "changed", "system", "turns", "role", "content", "versions", "at", "count",
  "seconds", "first", "reason", "dropped", "rating"];

function write(model, conversations) {
  const texts = conversations.slice(0, MOST).map((one) => JSON.stringify(one, STORED));
  let size = 0;
  const fitting = texts.filter((text) => { // one that is too large takes no other with it
    if (size + text.length > MOST_CHARACTERS) return false;
    size += text.length;
    return true;
  });
  for (; ; fitting.pop()) { // other models' may fill the storage
    try {
      localStorage.setItem(place(model), `[${fitting.join(",")}]`);
      return fitting.length === texts.length;
    } catch {
      if (!fitting.length) return false;
    }
  }
}

// Keep these as the newest; the others are read anew, as another tab may have written them. False:
// not all that was kept could be.
export function keep(model, ...conversations) {
  const ids = new Set(conversations.map((one) => one.id));
  return write(model, [...conversations, ...kept(model).filter((one) => !ids.has(one.id))]);
}
export const forget = (model, id) => write(model, kept(model).filter((one) => one.id !== id));
export const forgetAll = (model) => write(model, []);

// ---------------------------------------------------------------------------------------------
// Files: {"messages": [...]} in JSON, or one a line in JSONL

export const asJson = (conversation) =>
  JSON.stringify({ messages: messagesOf(conversation) }, null, 2) + "\n";
export const asJsonl = (conversations) => conversations.map((one) =>
  JSON.stringify({ messages: messagesOf(one) }) + "\n").join("");

// The conversations of a file's text: one object, a list of them or of messages, or lines.
export function read(text) {
  let values;
  try {
    const value = JSON.parse(text);
    values = Array.isArray(value) && !value[0]?.role ? value : [value];
  } catch {
    values = text.split("\n").filter((line) => line.trim()).map((line, i) => {
      try {
        return JSON.parse(line);
      } catch {
        throw new Error(`line ${i + 1} is no JSON`);
      }
    });
  }
  const read = values.map((value, i) => {
    try {
      return fromMessages(Array.isArray(value) ? value : value?.messages);
    } catch (error) {
      throw new Error(`conversation ${i + 1}: ${error.message}`);
    }
  });
  if (!read.length) throw new Error("no conversation in it");
  return read;
}

function fromMessages(messages) {
  if (!Array.isArray(messages) || !messages.length) {
    throw new Error('expected {"messages": [{"role", "content"}, ...]}');
  }
  if (messages.length > MOST_TURNS) throw new Error(`more than ${MOST_TURNS} messages`);
  const conversation = begin();
  messages.forEach((message, i) => {
    const { role, content } = message ?? {};
    if (typeof content !== "string") throw new Error(`message ${i + 1} has no text as content`);
    if (role === "system" && i === 0) {
      conversation.system = content;
    } else if (role === "user") {
      conversation.turns.push({ role, content });
    } else if (role === "assistant") {
      conversation.turns.push({ role, versions: [{ content, reason: "imported" }], at: 0 });
    } else {
      throw new Error(`message ${i + 1}: expected system (first), user or assistant as its role`);
    }
  });
  conversation.changed = Date.now();
  return conversation;
}
