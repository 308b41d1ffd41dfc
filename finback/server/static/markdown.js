// Model output to page: markdown, code and mathematics, with the output treated as data throughout.
//
// Three walls stand between a model's text and the page. marked writes no HTML that the text contains (it is shown as text);
// DOMPurify keeps a short list of tags and attributes of what marked writes; the page's Content-Security-Policy runs no
// script but its own. KaTeX and highlight.js get plain text and are not trusted with links either.

import { t } from "./i18n.js";

const { marked, DOMPurify, katex, hljs } = globalThis;

// The markdown parser sees at most this many characters at once, which bounds the time of its worst cases.
const WINDOW = 12_000;
const FRAME_MS = 8; // per frame for parsing, and as much again for mathematics: half of a frame stays for the page
const MAX_MATH = 3_000; // characters of one formula; a longer one is shown as its source
const MAX_HIGHLIGHT = 40_000; // characters of one code block
const MAX_OPEN_HIGHLIGHT = 6_000; // of one that still grows, and is highlighted anew in each frame

const PURIFY = {
  ALLOWED_TAGS:
    "a b blockquote br code del div em h1 h2 h3 h4 h5 h6 hr i img input kbd li ol p pre s span strong sub sup table tbody td th thead tr u ul".split(" "),
  ALLOWED_ATTR: ["align", "alt", "checked", "class", "data-display", "data-language", "disabled", "href", "src", "start", "title", "type"],
  // DOMPurify holds every attribute it does not know against the expression for addresses, unless it is named here.
  ADD_URI_SAFE_ATTR: ["align", "checked", "data-display", "data-language", "disabled", "start", "type"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|data:image\/(?:png|jpeg|gif|webp);base64,)/i,
  RETURN_DOM_FRAGMENT: true,
};
const HARMLESS_TAG = /^<(?:br|hr)\s*\/?>$|^<\/?(?:sub|sup|kbd|b|i|u|s|em|strong)>$/i;
const LINK = /^(?:https?:\/\/|mailto:)/i;
const DATA_IMAGE = /^data:image\/(?:png|jpeg|gif|webp);base64,/i;
// Quotes and lists in each other, dozens deep, recurse in the parser; nobody writes them in earnest.
const TOO_DEEP = /^(?:[ \t]*(?:>|[-*+][ \t]|\d{1,9}[.)][ \t])){24}/m;

function escapeHtml(text) {
  return text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

function mathHtml(token) {
  return `<code class="math"${token.display ? ' data-display="1"' : ""}>${escapeHtml(token.text)}</code>`;
}

// Bounded repeats: an opening sign without its end must not make the search run to the end of the text each time.
const BLOCK_MATH = /^ {0,3}(?:\$\$([^$]{1,3000})\$\$|\\\[([\s\S]{1,3000}?)\\\])[ \t]*(?:\n+|$)/;
const INLINE_DISPLAY = /^(?:\$\$([^$]{1,3000})\$\$|\\\[([\s\S]{1,3000}?)\\\])/;
const INLINE_MATH = /^(?:\$((?![\s$])(?:\\.|[^\\$\n]){1,1000}?)(?<!\s)\$(?![\d$])|\\\(([\s\S]{1,1000}?)\\\))/;

const mathematics = [
  {
    name: "blockMath",
    level: "block",
    start: (source) => source.match(/^ {0,3}(?:\$\$|\\\[)/m)?.index,
    tokenizer(source) {
      const match = BLOCK_MATH.exec(source);
      return match && { type: "blockMath", raw: match[0], text: match[1] ?? match[2], display: true };
    },
    renderer: (token) => `<div class="formula">${mathHtml(token)}</div>\n`,
  },
  {
    name: "inlineMath",
    level: "inline",
    start: (source) => source.match(/\$|\\[([]/)?.index,
    tokenizer(source) {
      const display = INLINE_DISPLAY.exec(source);
      const match = display ?? INLINE_MATH.exec(source);
      return match && { type: "inlineMath", raw: match[0], text: match[1] ?? match[2], display: display !== null };
    },
    renderer: mathHtml,
  },
];

marked.use({
  gfm: true,
  breaks: false,
  extensions: mathematics,
  renderer: {
    html: ({ text, block }) => (HARMLESS_TAG.test(text.trim()) ? text : block ? `<p>${escapeHtml(text)}</p>` : escapeHtml(text)),
    code: ({ text, lang }) => `<pre data-language="${escapeHtml((lang ?? "").split(/\s/)[0].slice(0, 30))}"><code>${escapeHtml(text)}</code></pre>\n`,
    link({ href, title, tokens }) {
      const inside = this.parser.parseInline(tokens);
      const tip = title ? ` title="${escapeHtml(title)}"` : "";
      return LINK.test(href) ? `<a href="${escapeHtml(href)}"${tip}>${inside}</a>` : inside;
    },
    // Nothing is fetched from outside: a picture that is not in the text itself becomes a link to it.
    image({ href, text }) {
      if (DATA_IMAGE.test(href)) return `<img src="${escapeHtml(href)}" alt="${escapeHtml(text)}">`;
      const words = escapeHtml(t("imageLink", { text: text || href.slice(0, 80) }));
      return LINK.test(href) ? `<a href="${escapeHtml(href)}">${words}</a>` : words;
    },
  },
});

/** Tokens to a clean fragment: links open elsewhere and tell nothing, code gets its frame, formulas wait for `typeset`. */
function fragmentOf(tokens, growing) {
  const fragment = DOMPurify.sanitize(marked.parser(tokens), PURIFY);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const box of fragment.querySelectorAll("input")) {
    box.type = "checkbox"; // the only one that marked writes, and then for show
    box.disabled = true;
  }
  for (const table of fragment.querySelectorAll("table")) wrap(table, "table");
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre, growing);
  return fragment;
}

function wrap(node, className) {
  const box = document.createElement("div");
  box.className = className;
  box.tabIndex = 0; // what scrolls sideways must be reachable by keyboard
  node.replaceWith(box);
  box.append(node);
}

function frameCode(pre, growing) {
  const code = pre.firstElementChild;
  const language = pre.dataset.language ?? "";
  const frame = document.createElement("div");
  frame.className = "code";
  const head = document.createElement("div");
  head.className = "code-head";
  const name = document.createElement("span");
  name.textContent = language;
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "copy-code";
  copy.textContent = t("copy");
  copy.setAttribute("aria-label", t("copyCode"));
  head.append(name, copy);
  pre.replaceWith(frame);
  pre.tabIndex = 0;
  frame.append(head, pre);
  if (code && hljs.getLanguage(language) && code.textContent.length < (growing ? MAX_OPEN_HIGHLIGHT : MAX_HIGHLIGHT)) {
    const html = hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value;
    code.replaceChildren(DOMPurify.sanitize(html, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }));
  }
}

const waitingForMath = [];

/** Typeset the formulas under `root` while the frame lasts; the others show their source until a later frame. */
function typeset(root) {
  const until = performance.now() + FRAME_MS;
  for (const node of root.querySelectorAll("code.math")) {
    if (performance.now() < until) typesetOne(node);
    else if (waitingForMath.push(node) === 1) requestAnimationFrame(typesetWaiting);
  }
}

function typesetWaiting() {
  const until = performance.now() + FRAME_MS;
  let done = 0;
  while (done < waitingForMath.length && performance.now() < until) {
    const node = waitingForMath[done++];
    if (node.isConnected) typesetOne(node);
  }
  waitingForMath.splice(0, done);
  if (waitingForMath.length) requestAnimationFrame(typesetWaiting);
}

function typesetOne(node) {
  const source = node.textContent;
  if (source.length > MAX_MATH) return;
  const place = document.createElement("span");
  const displayMode = node.dataset.display === "1";
  if (displayMode) {
    place.className = "display";
    place.tabIndex = 0;
  }
  try {
    // Building nodes instead of HTML keeps the page free of inline styles, which its policy forbids.
    katex.render(source, place, { displayMode, throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 200 });
  } catch (error) {
    // What is no formula to KaTeX, or so deep that the stack ends, stays as its source, with the reason as a tooltip.
    if (!(error instanceof RangeError || error instanceof katex.ParseError)) throw error;
    node.classList.add("failed");
    node.title = error.message.slice(0, 200);
    return;
  }
  node.replaceWith(place);
}

/** Plain text as a token, for what the parser cannot take. */
function plainToken(raw) {
  return [{ type: "paragraph", raw, tokens: [{ type: "text", raw, text: raw, escaped: false }] }];
}

function lex(text) {
  if (TOO_DEEP.test(text)) return plainToken(text);
  try {
    return marked.lexer(text);
  } catch {
    // marked gives up on some texts with a plain Error. The reader gets the text as it is rather than nothing.
    return plainToken(text);
  }
}

const OPENING_FENCE = /^ {0,3}(`{3,}|~{3,})([^\n]*)\n/;

/** Whether a block holds the beginning of a displayed formula whose end has not come: the next blocks may belong to it. */
function opensFormula(token) {
  if (token.type === "code") return false;
  if (/^ {0,3}\$\$/m.test(token.raw) && token.raw.split("$$").length % 2 === 0) return true;
  return /^ {0,3}\\\[/m.test(token.raw) && token.raw.lastIndexOf("\\[") > token.raw.lastIndexOf("\\]");
}

/** How many tokens at the front cannot change any more: all but the last that is not empty, and none from an open formula on. */
function completeBlocks(tokens) {
  let last = tokens.length - 1;
  while (last > 0 && tokens[last].type === "space") last -= 1;
  const open = tokens.findIndex(opensFormula);
  return Math.max(0, open >= 0 ? Math.min(last, open) : last);
}

/**
 * A text that grows, shown in `root`. Blocks that are complete are rendered once and never touched again; only the last one is
 * rendered anew as it grows. `write(text)` takes the whole text so far, `end()` says that it is complete. Work is done in
 * animation frames and stops when the frame's share is used up, so a text of any length leaves the page responsive.
 */
export class MarkdownView {
  constructor(root, afterRender = () => undefined) {
    this.afterRender = afterRender;
    this.text = "";
    this.done = 0; // characters rendered for good
    this.shown = -1; // characters that the last render saw
    this.openCode = null; // the element of a fenced block too long for one window, and the expression that ends it
    this.closingFence = null;
    this.complete = false;
    this.frame = 0;
    this.notBefore = 0;
    this.tail = document.createElement("div");
    this.tail.className = "tail";
    root.replaceChildren(this.tail);
  }

  write(text) {
    this.text = text.replace(/\r\n?/g, "\n"); // as the parser does, so that positions agree
    this.schedule();
  }

  end() {
    this.complete = true;
    this.notBefore = 0;
    this.schedule();
  }

  schedule() {
    this.frame ||= requestAnimationFrame(() => this.render());
  }

  render() {
    this.frame = 0;
    const began = performance.now();
    if (began < this.notBefore) return this.schedule();
    do this.step();
    while (this.pending() && performance.now() - began < FRAME_MS);
    // A block that is slow to render is rendered less often, so that the page keeps three quarters of the time.
    if (!this.complete) this.notBefore = performance.now() + 3 * (performance.now() - began);
    this.afterRender();
    if (this.pending()) this.schedule();
  }

  pending() {
    return this.complete ? this.done < this.text.length : this.shown < this.text.length;
  }

  /** Parse one window of the text; what is complete is placed for good, the rest becomes the tail. */
  step() {
    if (this.openCode) return this.stepCode();
    const window = this.text.slice(this.done, this.done + WINDOW);
    const seesAll = this.done + window.length === this.text.length;
    const tokens = lex(window);
    const keep = seesAll && this.complete ? tokens.length : completeBlocks(tokens);
    if (keep === 0 && !seesAll) return this.cut(window);
    const raw = tokens.slice(0, keep).map((token) => token.raw).join("");
    // Positions are the parser's word for it; should they ever disagree, the window is final as it stands and nothing is lost.
    const agree = window.startsWith(raw);
    if (!agree) this.place(tokens, window.length);
    else if (keep) this.place(tokens.slice(0, keep), seesAll && this.complete ? window.length : raw.length);
    if (!seesAll) return;
    this.shown = this.text.length;
    const rest = agree ? tokens.slice(keep) : [];
    if (!rest.length) return;
    this.tail.replaceChildren(fragmentOf(rest, true));
    typeset(this.tail);
  }

  /** A block larger than the window: code goes on as code, anything else is cut at its last line end. */
  cut(window) {
    const fence = OPENING_FENCE.exec(window);
    if (!fence) {
      const end = window.lastIndexOf("\n") + 1 || window.length;
      return this.place(lex(window.slice(0, end)), end);
    }
    this.place([{ type: "code", raw: fence[0], text: "", lang: fence[2].trim() }], fence[0].length);
    this.openCode = this.tail.previousElementSibling.querySelector("code");
    this.closingFence = new RegExp(`^ {0,3}\\${fence[1][0]}{${fence[1].length},}[ \\t]*(?:\\n|$(?![\\s\\S]))`, "m");
  }

  stepCode() {
    const window = this.text.slice(this.done, this.done + 4 * WINDOW);
    const seesAll = this.done + window.length === this.text.length;
    const closing = this.closingFence.exec(window);
    // The last line may yet turn out to be the closing fence, unless it is too long for one or the text is complete.
    let end = window.lastIndexOf("\n") + 1;
    if (closing) end = closing.index;
    else if (seesAll ? this.complete : end === 0) end = window.length;
    this.openCode.append(window.slice(0, end));
    this.done += closing ? end + closing[0].length : end;
    if (closing) this.openCode = null;
    if (seesAll && !closing) this.shown = this.text.length;
  }

  place(tokens, length) {
    const fragment = fragmentOf(tokens, false);
    typeset(fragment);
    this.tail.before(fragment);
    this.tail.replaceChildren();
    this.done += length;
  }
}
