// Elements, numbers as words, small tables: what every view is made of.

export const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// An element with its properties and children. Strings become text, never markup.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
export const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
export const whole = new Intl.NumberFormat("en");
export const plural = (n, noun) => `${whole.format(n)} ${noun}${n === 1 ? "" : "s"}`;
export const percent = (p) =>
  (p && p < 5e-5 ? "<\u00a00.01" : (100 * p).toFixed(p < 0.0995 ? 2 : 1)) + "\u00a0%";
export const number = (x) => (x && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5)
  ? x.toExponential(2) : String(+x.toPrecision(4)));
export const visible = (text) => text.replace(/^bytes:/, "")
  .replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5")
  .replace(/\t/g, "\u2192").replace(/\r/g, "\u240d") || "(nothing)";
// A share of 1 as a bar.
export const bar = (share) => draw("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none",
  "aria-hidden": "true" }, draw("rect", { class: "fill", width: 100 * share, height: 8 }));

// Tokens of which one can be chosen: by a click, or with the arrow keys

let numbered = 0;
export function chooser(list, choose) {
  let at = null;
  const select = (option) => {
    if (!option) return;
    at?.setAttribute("aria-selected", "false");
    at = option;
    at.id ||= "token-" + numbered++;
    at.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", at.id);
    choose(at);
    at.scrollIntoView({ block: "nearest" });
  };
  const options = () => [...list.querySelectorAll("[role=option]")];
  list.setAttribute("role", "listbox");
  list.tabIndex = 0;
  list.addEventListener("click", (event) => select(event.target.closest("[role=option]")));
  list.addEventListener("keydown", (event) => {
    const all = options(), i = at?.isConnected ? all.indexOf(at) : -1;
    const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i < 0 ? all.length - 1 : i - 1,
      ArrowUp: i - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    select(all[Math.max(0, Math.min(to, all.length - 1))]);
  });
}
export const option = (className, text, ...more) => {
  const element = make("span", { className, role: "option", ariaSelected: "false" }, text, ...more);
  if (!text.trim()) element.ariaLabel = `white space, ${plural(text.length, "character")}`;
  return element;
};

export function table(heads, rows) {
  const cell = (tag, [value, name]) => make(value ? tag : "td", { className: name ?? "" }, value);
  const body = rows.map(({ cells, here }) =>
    make("tr", { className: here ? "here" : "" }, ...cells.map((c) => cell("td", c))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((h) => cell("th", h)))),
    make("tbody", {}, ...body));
}
