// Markdown as elements. marked (vendor/, its licence beside it) cuts a text into tokens; here they
// become elements, one kind a line of BLOCKS or INLINES. No HTML is ever parsed: a tag that a text
// has is shown as the text that it is, no picture is loaded, and a link leads to the web alone.

import { make } from "./base.js";
import { Lexer } from "./vendor/marked.js";

const MOST = 200_000; // characters; what is longer would take seconds, and is shown as it is
const OPTIONS = { gfm: true, breaks: true }; // a line that a model ended stays one

const entity = (name) =>
  new DOMParser().parseFromString(name, "text/html").documentElement.textContent;
const plain = (text) => text.replace(/&(#\d+|#x[\da-f]+|[a-z][a-z\d]*);/gi, entity);

const INLINES = {
  text: (token) => token.tokens ? inlines(token.tokens) : [plain(token.text)],
  escape: (token) => [token.text],
  html: (token) => [token.raw],
  br: () => [make("br")],
  codespan: (token) => [make("code", {}, token.text)],
  strong: (token) => [make("strong", {}, ...inlines(token.tokens))],
  em: (token) => [make("em", {}, ...inlines(token.tokens))],
  del: (token) => [make("del", {}, ...inlines(token.tokens))],
  checkbox: (token) => [token.checked ? "\u2611 " : "\u2610 "],
  link: (token) => link(token, inlines(token.tokens)),
  image: (token) => link(token, [plain(token.text) || token.href]),
};
const BLOCKS = {
  heading: (token) =>
    make("h3", { className: "level-" + token.depth }, ...inlines(token.tokens)),
  paragraph: (token) => make("p", {}, ...inlines(token.tokens)),
  text: (token) => make("p", {}, ...INLINES.text(token)),
  html: (token) => make("p", {}, token.raw.trimEnd()),
  hr: () => make("hr"),
  blockquote: (token) => make("blockquote", {}, ...blocks(token.tokens)),
  code: (token) => codeBlock(token.text, token.lang?.split(/\s/)[0] ?? ""),
  list,
  table,
};

function inlines(tokens) {
  return tokens.flatMap((token) => INLINES[token.type]?.(token) ?? [token.raw]);
}

function block(token) {
  return BLOCKS[token.type]?.(token) ?? make("p", {}, token.raw.trimEnd());
}

const isShown = (token) => token.type !== "space" && token.type !== "def";
const blocks = (tokens) => tokens.filter(isShown).map(block);

function link(token, content) {
  if (!/^(https?|mailto):/i.test(token.href)) return [token.raw];
  return [make("a", { href: token.href, title: token.title ?? "", target: "_blank",
    rel: "noopener noreferrer" }, ...content)];
}

function list(token) {
  const items = token.items.map((item) => {
    // The words of an item that has no paragraphs stand in it bare.
    const content = item.tokens.filter(isShown).flatMap((inner) =>
      (inner.type in INLINES && inner.type !== "html" ? INLINES[inner.type](inner)
        : [block(inner)]));
    return make("li", { className: item.task ? "task" : "" }, ...content);
  });
  if (!token.ordered) return make("ul", {}, ...items);
  return make("ol", { start: token.start === "" ? 1 : token.start }, ...items);
}

function table(token) {
  const row = (tag, cells) => make("tr", {}, ...cells.map((cell) =>
    make(tag, { className: cell.align ?? "" }, ...inlines(cell.tokens))));
  return make("div", { className: "wide-block", tabIndex: 0 }, make("table", {},
    make("thead", {}, row("th", token.header)),
    make("tbody", {}, ...token.rows.map((cells) => row("td", cells)))));
}

function codeBlock(text, language) {
  const button = make("button", { className: "quiet", type: "button" }, "Copy");
  button.ariaLabel = language ? `Copy this ${language} code` : "Copy this code";
  const code = make("code", {}, text);
  button.onclick = () => copy(code.textContent, button);
  return make("div", { className: "code" },
    make("div", { className: "code-head" }, make("span", {}, language), button),
    make("pre", { tabIndex: 0 }, code));
}

// Put a text on the clipboard; the button that asked says so for a moment.
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that came over plain HTTP from another machine has no clipboard
    const field = make("textarea", { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  const before = button.textContent;
  if (before === "Copied") return;
  button.textContent = "Copied";
  setTimeout(() => button.textContent = before, 1500);
}

// Show a text in `place` as Markdown. Called again with a longer one it leaves the blocks alone
// that are as they were: nothing jumps, and what is selected there stays so.
export function showMarkdown(place, text) {
  const shown = place.markdown ?? [];
  let tokens, elements, same = 0;
  try {
    if (text.length > MOST) throw new RangeError("too long");
    tokens = new Lexer(OPTIONS).lex(text).filter(isShown);
    while (same < shown.length && shown[same] === tokens[same]?.raw) same++;
    elements = tokens.slice(same).map(block);
  } catch { // nested beyond what can be followed, or more than an element takes at once
    tokens = [{ type: "html", raw: text }];
    same = 0;
    elements = tokens.map(block);
  }
  while (place.children.length > same) place.lastElementChild.remove();
  for (const element of elements) place.append(element);
  place.markdown = tokens.map((token) => token.raw);
}
