// Tokens and money: what an answer used, what a conversation used, and how to say it.

import { count, t } from "./i18n.js";

/** The counts that matter out of the server's usage object; zero where it is silent. */
export function readUsage(usage) {
  const prompt = usage.prompt_tokens ?? 0;
  const hit = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
  return {
    hit,
    miss: usage.prompt_cache_miss_tokens ?? prompt - hit,
    output: usage.completion_tokens ?? 0,
    thought: usage.completion_tokens_details?.reasoning_tokens ?? 0,
  };
}

/**
 * Yuan for one answer that ends now, by what the server says of itself: `prices` are yuan per million tokens, lower by `off_peak`'s
 * discount between two minutes of the day in UTC. Null where the server sells nothing.
 */
export function priceOf(usage, info, now = new Date()) {
  const prices = info?.prices;
  if (!prices) return null;
  const full = (usage.hit * prices.hit + usage.miss * prices.miss + usage.output * prices.output) / 1e6;
  return isOffPeak(info.off_peak, now) ? full * (1 - info.off_peak.discount) : full;
}

function isOffPeak(hours, now) {
  if (!hours) return false;
  const minute = now.getUTCHours() * 60 + now.getUTCMinutes();
  const { start, end } = hours;
  return start <= end ? start <= minute && minute < end : minute >= start || minute < end;
}

/** What was spent, {usage, price} or null for nothing, with one more answer. */
export function addUsage(spent, { usage, price }) {
  const sum = { hit: 0, miss: 0, output: 0, thought: 0, ...spent?.usage };
  for (const name of Object.keys(sum)) sum[name] += usage[name] ?? 0;
  return { usage: sum, price: typeof price === "number" ? (spent?.price ?? 0) + price : (spent?.price ?? null) };
}

/** Sum over the answers that have a usage; null if none has. */
export function totalUsage(messages) {
  return messages.filter((message) => message.usage).reduce((spent, message) => addUsage(spent, message), null);
}

/** "1,234 in (1,024 cached) · 356 out · 211 thought · ¥0.0012"; the thought is part of what is out. */
export function describeUsage(usage, price) {
  const fields = { input: count(usage.hit + usage.miss), cached: count(usage.hit), output: count(usage.output) };
  const parts = [t(usage.hit ? "usageCached" : "usage", fields)];
  if (usage.thought) parts.push(t("usageThought", { thought: count(usage.thought) }));
  if (typeof price === "number") parts.push(yuan(price));
  return parts.join(" · ");
}

/** Two significant digits of small amounts, two decimals of large ones. */
export function yuan(amount) {
  if (amount >= 1 || amount === 0) return `¥${amount.toFixed(2)}`;
  return `¥${amount.toFixed(Math.min(8, 1 - Math.floor(Math.log10(amount))))}`;
}
