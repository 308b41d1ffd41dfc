// Conversations and settings in localStorage: one entry per conversation, so that saving one never rewrites the others.
//
// A conversation is {id, title, updated, messages, spent}: spent is {usage, price} of all its answers, those that were replaced too, or
// null. A message is {role: "user", content} or
// {role: "assistant", content, reasoning, seconds, elapsed, model, usage, price, end, error}. Nothing here touches the page.

import { totalUsage } from "./usage.js";

const PREFIX = "finback.conversation.";
const SETTINGS = "finback.settings";
const KEY = "finback.key";

/** All readable conversations, the latest first, and how many entries were broken. Storage that is closed holds none. */
export function loadConversations() {
  const found = [];
  let broken = 0;
  const names = attempt(() => Object.keys(localStorage), []);
  for (const name of names.filter((each) => each.startsWith(PREFIX))) {
    const conversation = readable(localStorage.getItem(name));
    if (conversation && PREFIX + conversation.id === name) found.push(conversation);
    else broken += 1;
  }
  found.sort((a, b) => b.updated - a.updated);
  return { conversations: found, broken };
}

/** One conversation as it is stored, or null: what another tab has made of it. */
export function loadConversation(id) {
  return readable(attempt(() => localStorage.getItem(PREFIX + id), null));
}

/** The id of the conversation that a storage event is about, or null. */
export function conversationOf(storageKey) {
  return storageKey && storageKey.startsWith(PREFIX) ? storageKey.slice(PREFIX.length) : null;
}

/** Returns "" when it is stored, "quota" when there is no room, "closed" when the browser stores nothing for this page. */
export function saveConversation(conversation) {
  return write(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function deleteConversation(id) {
  attempt(() => localStorage.removeItem(PREFIX + id), null);
}

export function newConversation() {
  return { id: `${Date.now().toString(36)}-${randomText()}`, title: "", updated: Date.now(), messages: [], spent: null };
}

export function loadSettings() {
  const defaults = { theme: "system", language: "", model: "", temperature: 0.6, maxTokens: null, system: "" };
  const stored = parse(attempt(() => localStorage.getItem(SETTINGS), null));
  if (typeof stored !== "object" || stored === null) return defaults;
  const settings = { ...defaults };
  for (const name of ["theme", "language", "model", "system"]) if (typeof stored[name] === "string") settings[name] = stored[name];
  if (stored.temperature >= 0 && stored.temperature <= 2) settings.temperature = Number(stored.temperature);
  if (Number.isInteger(stored.maxTokens) && stored.maxTokens > 0) settings.maxTokens = stored.maxTokens;
  return settings;
}

export function saveSettings(settings) {
  return write(SETTINGS, JSON.stringify(settings));
}

/** The API key lives as long as the tab: a secret does not belong among the things that a browser keeps for good. */
export function loadKey() {
  return attempt(() => sessionStorage.getItem(KEY), null) || "";
}

export function saveKey(key) {
  attempt(() => sessionStorage.setItem(KEY, key), null);
}

/** A stored conversation, or null if it is none. One of the time before sums were kept has that of the answers in it. */
function readable(text) {
  const conversation = parse(text);
  if (!wellFormed(conversation)) return null;
  conversation.spent ??= totalUsage(conversation.messages);
  return conversation;
}

function wellFormed(conversation) {
  return (
    typeof conversation === "object" && conversation !== null && typeof conversation.id === "string" &&
    typeof conversation.title === "string" && Number.isFinite(conversation.updated) && Array.isArray(conversation.messages) &&
    ((conversation.spent ?? null) === null || isSum(conversation.spent)) &&
    conversation.messages.every(
      (message) =>
        message && typeof message.content === "string" &&
        (message.role === "user" || (message.role === "assistant" && typeof message.reasoning === "string")),
    )
  );
}

function isSum({ usage, price }) {
  const counts = ["hit", "miss", "output", "thought"].map((name) => usage?.[name]);
  return counts.every(Number.isFinite) && (price === null || Number.isFinite(price));
}

function write(name, text) {
  try {
    localStorage.setItem(name, text);
    return "";
  } catch (error) {
    return error.name === "QuotaExceededError" || error.name === "NS_ERROR_DOM_QUOTA_REACHED" ? "quota" : "closed";
  }
}

// A browser may refuse any touch of its storage with a SecurityError (cookies blocked): the page then works without memory.
function attempt(action, otherwise) {
  try {
    return action();
  } catch (error) {
    if (error instanceof DOMException) return otherwise;
    throw error;
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function randomText() {
  return Array.from(crypto.getRandomValues(new Uint8Array(6)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
