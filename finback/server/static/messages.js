// One conversation's messages as elements: questions, answers with their folded thought, and the line of counts below.

import { element } from "./element.js";
import { seconds, t } from "./i18n.js";
import { MarkdownView } from "./markdown.js";
import { describeUsage } from "./usage.js";

/** A symbol out of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function iconButton(name, label, action) {
  return element("button", { type: "button", className: `icon ${name}`, title: label, "aria-label": label, onclick: action }, icon(name));
}

/** `actions` are {copy(text, button), edit(message) or null}. */
export function questionElement(message, actions) {
  const bar = element("div", { className: "actions" });
  if (actions.edit) bar.append(iconButton("edit", t("editQuestion"), () => actions.edit(message)));
  bar.append(iconButton("copy", t("copy"), (event) => actions.copy(message.content, event.currentTarget)));
  const heading = element("h2", { className: "hidden" }, t("you"));
  return element("article", { className: "user" }, heading, element("div", { className: "bubble" }, message.content), bar);
}

/** A question being changed, in place of its bubble. */
export function editElement(message, send, cancel) {
  const field = element("textarea", { value: message.content, rows: 3, "aria-label": t("editQuestion") });
  const form = element(
    "form",
    {
      className: "editing",
      onsubmit: (event) => {
        event.preventDefault();
        if (field.value.trim()) send(field.value.trim());
      },
      onkeydown: (event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          cancel();
        } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          form.requestSubmit();
        }
      },
    },
    field,
    element("button", { type: "button", className: "plain", onclick: cancel }, t("cancel")),
    element("button", { type: "submit", className: "primary" }, t("ask")),
  );
  return { form, field };
}

/** An answer, streaming or finished. `update()` shows what `message` holds by now; `finish()` adds what follows a complete one. */
export class AnswerView {
  /** `actions` are {copy(text, button), regenerate() or null}; `afterRender` is called when the text on the page has grown. */
  constructor(message, actions, afterRender) {
    this.message = message;
    this.actions = actions;
    this.afterRender = afterRender;
    this.summary = element("span");
    this.thoughtBody = element("div", { className: "thought-body prose" });
    this.thought = element(
      "details",
      { className: "thought", hidden: true },
      element("summary", {}, icon("fold"), this.summary),
      this.thoughtBody,
    );
    this.waiting = element("div", { className: "waiting" }, element("i"), element("i"), element("i"), element("span", { className: "hidden" }, t("waiting")));
    this.body = element("div", { className: "prose answer" });
    this.note = element("p", { className: "note", hidden: true });
    this.bar = element("div", { className: "actions" });
    this.root = element("article", { className: "assistant" }, element("h2", { className: "hidden" }, t("assistant")));
    this.root.append(this.thought, this.waiting, this.body, this.note, this.bar);
    this.thoughtView = null; // a folded thought costs nothing until it is opened
    this.bodyView = null;
    this.thought.addEventListener("toggle", () => this.showThought());
  }

  /** While it streams, the thought is open; `since` is when it began, in ms of performance.now(). */
  update(thinkingSince = null) {
    const { reasoning, content } = this.message;
    this.root.setAttribute("aria-busy", "true");
    this.waiting.hidden = Boolean(reasoning || content);
    if (reasoning && this.thought.hidden) {
      this.thought.hidden = false;
      this.thought.open = true;
    }
    if (reasoning) this.writeSummary(thinkingSince);
    this.showThought();
    if (content) {
      this.bodyView ??= new MarkdownView(this.body, this.afterRender);
      this.bodyView.write(content);
    }
  }

  writeSummary(thinkingSince) {
    let words = t("thoughtFor", { seconds: seconds(this.message.seconds ?? 0) });
    if (thinkingSince !== null) {
      const passed = Math.floor((performance.now() - thinkingSince) / 1000);
      words = passed < 1 ? t("thinking") : t("thinkingFor", { seconds: passed });
    }
    this.thought.classList.toggle("running", thinkingSince !== null);
    if (this.summary.textContent !== words) this.summary.textContent = words;
  }

  showThought() {
    if (!this.thought.open || !this.message.reasoning) return;
    this.thoughtView ??= new MarkdownView(this.thoughtBody, this.afterRender);
    this.thoughtView.write(this.message.reasoning);
    if (this.finished) this.thoughtView.end();
  }

  foldThought() {
    this.thought.open = false;
  }

  finish() {
    const { content, reasoning, usage, price, end, error } = this.message;
    this.finished = true;
    this.root.removeAttribute("aria-busy");
    this.waiting.hidden = true;
    this.thought.hidden = !reasoning;
    if (reasoning) this.writeSummary(null);
    this.thoughtView?.write(reasoning);
    this.thoughtView?.end();
    if (content) {
      this.bodyView ??= new MarkdownView(this.body, this.afterRender);
      this.bodyView.write(content);
      this.bodyView.end();
    }
    const note = error ? errorText(error) : endText(end);
    this.note.hidden = !note;
    this.note.classList.toggle("error", Boolean(error));
    this.note.textContent = note;
    this.bar.replaceChildren();
    if (content) this.bar.append(iconButton("copy", t("copy"), (event) => this.actions.copy(content, event.currentTarget)));
    if (this.actions.regenerate) {
      const again = iconButton("again", t(error ? "retry" : "regenerate"), this.actions.regenerate);
      if (error) again.append(element("span", {}, t("retry")));
      this.bar.append(again);
    }
    if (usage) this.bar.append(element("span", { className: "usage" }, this.usageText(usage, price)));
  }

  usageText(usage, price) {
    const { elapsed } = this.message;
    const rate = elapsed > 0.2 && usage.output > 1 ? (usage.output - 1) / elapsed : 0;
    const words = describeUsage(usage, price);
    return rate ? `${words} · ${t("speed", { rate: rate < 10 ? rate.toFixed(1) : Math.round(rate) }).replace(" ", "\u00a0")}` : words;
  }
}

/** How an answer ended, where that is worth a word; one without an end was cut off by a reload. */
function endText(end) {
  if (end === "stopped") return t("stopped");
  if (end === "length") return t("lengthEnd");
  return end ? "" : t("cutOff");
}

/** What went wrong, in the reader's language: {kind, status, message}. */
function errorText({ kind, status, message }) {
  if (kind !== "refused") return t(kind);
  if (status === 401) return t("failedKey", { message });
  if (status === 402) return t("failedBalance", { message });
  if (status === 429 || status === 503) return t("failedBusy", { message });
  return t("failed", { message });
}
