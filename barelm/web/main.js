// Views and the start. Each view is a module with show(), when its tab is opened, and reset(), when
// another model is there; resize(), if it draws by the window's width.

import * as attention from "./attention.js";
import { $, short, whole } from "./base.js";
import * as chat from "./chat.js";
import * as complete from "./complete.js";
import * as experts from "./experts.js";
import * as layers from "./layers.js";
import * as next from "./next.js";
import * as parts from "./parts.js";
import { hideChosen } from "./sampling.js";
import { ask, complain, guard, state, tabStore } from "./server.js";
import * as tokens from "./tokens.js";
import * as training from "./training.js";

// By the id of its panel.
const views = { chat, complete, tokens, next, attention, layers, experts, training, parts };
const tabs = [...document.querySelectorAll("[role=tab]")];
const panelOf = (tab) => tab.getAttribute("aria-controls");
const shownTabs = () => tabs.filter((tab) => !tab.hidden);
const current = () => tabs.find((tab) => tab.getAttribute("aria-selected") === "true");

function show(tab) {
  for (const t of tabs) {
    t.setAttribute("aria-selected", t === tab);
    t.tabIndex = t === tab ? 0 : -1;
    $(panelOf(t)).hidden = t !== tab;
  }
  const id = panelOf(tab), samples = id === "complete" || id === "chat";
  $("sampling").hidden = !samples;
  document.querySelector("main").classList.toggle("sampled", samples);
  history.replaceState(null, "", "#" + id);
  tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  hideChosen();
  if (state.model) views[id].show();
}

for (const tab of tabs) {
  const panel = $(panelOf(tab));
  tab.id = "tab-" + panel.id;
  panel.setAttribute("aria-labelledby", tab.id);
  tab.onclick = () => {
    isAsked = true;
    if ($("keyform").hidden) complain(""); // it was of the view that is left
    show(tab);
  };
  tab.onkeydown = (event) => {
    const all = shownTabs(), i = all.indexOf(tab);
    const to = { ArrowRight: i + 1, ArrowLeft: i + all.length - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const other = all.at(to < 0 ? to : to % all.length);
    show(other);
    other.focus();
  };
}
$("error").lastChild.onclick = () => complain("");
$("keyform").onsubmit = (event) => {
  event.preventDefault();
  tabStore.set("key", $("key").value);
  guard(start);
};
// Other weights of the same model are served: what was computed of the old ones goes.
document.addEventListener("weights", () => {
  for (const name of ["tokens", "next", "attention", "layers", "experts"]) views[name].reset();
});
// An address that was written by hand, or a link to a view.
addEventListener("hashchange", () => {
  const tab = shownTabs().find((tab) => "#" + panelOf(tab) === location.hash);
  if (tab && tab !== current()) tab.click();
});
let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => {
    if (state.model) views[panelOf(current())].resize?.();
  });
});

async function start() {
  state.model = await ask("/inspect/model");
  const { id, params, max_model_len: context, config } = state.model;
  $("tab-experts").hidden = !config.n_experts;
  $("keyform").hidden = true;
  complain("");
  document.title = `${id} \u2013 barelm`;
  $("name").textContent = `${id}, ${short.format(params)} parameters, context ${
    whole.format(context)}`;
  $("status").textContent = "Ready";
  for (const view of Object.values(views)) view.reset();
  if (!isAsked) show(state.model.chat.tuned ? $("tab-chat") : $("tab-complete"));
  else show(current().hidden ? tabs[0] : current());
  isAsked = true;
}
state.restart = start;
const asked = tabs.find((tab) => "#" + panelOf(tab) === location.hash);
let isAsked = Boolean(asked); // else the model says what it is for
show(asked ?? tabs[0]);
guard(start);
