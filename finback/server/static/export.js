// A conversation as a file, and text to the clipboard.

import { seconds, t } from "./i18n.js";

/** For reading: questions and answers under headings, the thought in a quote above its answer. */
export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title.replace(/\s+/g, " ")}`];
  for (const message of conversation.messages) {
    parts.push(`## ${t(message.role === "user" ? "you" : "assistant")}`);
    if (message.reasoning) {
      const thought = message.reasoning.trim().split("\n").map((line) => `> ${line}`.trimEnd());
      parts.push(`> **${t("thoughtFor", { seconds: seconds(message.seconds ?? 0) })}**\n>\n${thought.join("\n")}`);
    }
    parts.push(message.content.trim());
  }
  return `${parts.filter(Boolean).join("\n\n")}\n`;
}

export function toJson(conversation) {
  return `${JSON.stringify(conversation, null, 2)}\n`;
}

/** Offer `text` as a download; letters of any script stay in the file's name, the rest becomes dashes. */
export function download(title, extension, type, text) {
  const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "conversation";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = `${name}.${extension}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** True if the text is on the clipboard. The clipboard API exists on https and localhost only; elsewhere a selection is copied. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
    }
  }
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "hidden";
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}
