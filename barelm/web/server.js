// The server: questions to it, and what is said when something goes wrong.

import { $ } from "./base.js";

// What all views go by. model: what /inspect/model says, null before it did.
export const state = { model: null, restart: null };

// What this tab keeps until it is closed; a browser that forbids it keeps it until the page is left.
const kept = new Map();
export const tabStore = {
  get(name) {
    try {
      return sessionStorage.getItem(name);
    } catch {
      return kept.get(name) ?? null;
    }
  },
  set(name, value) {
    try {
      sessionStorage.setItem(name, value);
    } catch {
      kept.set(name, value);
    }
  },
};

export function complain(text) {
  $("error").hidden = !text;
  $("error").firstChild.textContent = text;
}

// Run f; what goes wrong is said in words, what was called off is not.
export async function guard(f) {
  try {
    return await f();
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  }
}

// f(signal, ...) once typing pauses; a newer call calls the older off. Until f is done what
// `places` show is pale, since it belongs to an older text; where f fails, forget() takes it away.
export function debounced(f, places, forget, wait = 200) {
  let timer, newest;
  const pale = (on) => places.forEach((id) => $(id).classList.toggle("pale", on));
  async function run(control, values) {
    try {
      await f(control.signal, ...values);
    } catch (error) {
      if (control === newest) forget();
      throw error;
    } finally {
      if (control === newest) pale(false);
    }
  }
  return (...values) => {
    clearTimeout(timer);
    newest?.abort();
    newest = new AbortController();
    pale(true);
    timer = setTimeout((control) => guard(() => run(control, values)), wait, newest);
  };
}

export async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = tabStore.get("key");
  if (key) headers.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(key));
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : gone("The server does not answer. Is it running?");
  }
  if (response.ok) return response;
  const { message: said, code } = (await response.json().catch(() => null))?.error ?? {};
  if (response.status === 401) $("keyform").hidden = false;
  if (code === "model_not_found") guard(state.restart); // another is served here by now
  const words = {
    401: key ? "The server does not accept this API key." : "This server wants an API key.",
    429: "The server is full: too many requests are waiting. Try again in a moment.",
  };
  const text = words[response.status] ?? said ?? `The server answered ${response.status}.`;
  throw Object.assign(new Error(text), { code });
}
export async function ask(path, body, signal) {
  const value = await (await call(path, body, signal)).json();
  signal?.throwIfAborted(); // a newer request may have begun meanwhile
  return value;
}

// The server went away: look every few seconds whether it is back.
let goneTimer = 0;
export const isGone = () => goneTimer !== 0;
export function gone(words) {
  if (!goneTimer) {
    $("status").textContent = "No connection";
    goneTimer = setInterval(async () => {
      if (!(await fetch("/health").catch(() => null))?.ok) return;
      clearInterval(goneTimer);
      goneTimer = 0;
      guard(state.restart); // it may be another model
    }, 3000);
  }
  return new Error(words);
}

// The events of a stream, parsed.
export async function* events(path, body, signal) {
  const reader = (await call(path, body, signal)).body.pipeThrough(new TextDecoderStream())
    .getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : gone("The connection broke off.");
    });
    if (done) throw gone("The connection broke off.");
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
