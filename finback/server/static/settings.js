// What the reader chooses: model, temperature, limits, key, theme, language. Every change is kept at once.

import { count, setLanguage, t } from "./i18n.js";
import { loadKey, loadSettings, saveKey, saveSettings } from "./store.js";
import { getJson } from "./stream.js";
import { element } from "./element.js";

const $ = (id) => document.getElementById(id);

/** Wire the dialog; `changed(name)` is called after each change. Returns the live settings; `key` is among them, stored apart. */
export function wireSettings(changed) {
  const settings = { ...loadSettings(), key: loadKey() };
  const keep = (name, value) => {
    settings[name] = value;
    const { key, ...stored } = settings;
    if (name === "key") saveKey(key);
    else saveSettings(stored);
    changed(name);
  };
  $("temperature").addEventListener("input", (event) => {
    $("temperature-value").value = event.target.value;
    keep("temperature", Number(event.target.value));
  });
  $("max-tokens").addEventListener("change", (event) => {
    const value = Number.parseInt(event.target.value, 10);
    keep("maxTokens", value > 0 ? value : null);
    event.target.value = settings.maxTokens ?? "";
  });
  $("system").addEventListener("change", (event) => keep("system", event.target.value));
  $("key").addEventListener("change", (event) => keep("key", event.target.value.trim()));
  $("model").addEventListener("change", (event) => keep("model", event.target.value));
  $("theme").addEventListener("change", (event) => {
    applyTheme(event.target.value);
    keep("theme", event.target.value);
  });
  $("language").addEventListener("change", (event) => {
    setLanguage(event.target.value);
    keep("language", event.target.value);
  });
  return settings;
}

export function openSettings(settings, info) {
  $("temperature").value = settings.temperature;
  $("temperature-value").value = settings.temperature;
  $("max-tokens").value = settings.maxTokens ?? "";
  $("system").value = settings.system;
  $("key").value = settings.key;
  $("theme").value = settings.theme;
  $("language").value = settings.language;
  showLimits(info);
  $("settings").showModal();
  showBalance(settings.key);
}

export function showLimits(info) {
  $("max-tokens-help").textContent = info?.context ? t("maxTokensHelp", { context: count(info.context) }) : "";
  if (info?.context) $("max-tokens").max = info.context;
}

/** Fill the choice of models; a choice that the server no longer has falls back to the one that thinks, else to the first. */
export function showModels(models, settings) {
  $("model").replaceChildren(...models.map((name) => element("option", { value: name }, name)));
  if (!models.includes(settings.model)) settings.model = models.includes("deepseek-reasoner") ? "deepseek-reasoner" : (models[0] ?? "");
  $("model").value = settings.model;
}

/** What is left on the key, where the server counts money. Not knowing it is no error worth telling. */
export async function showBalance(key) {
  const place = $("balance");
  place.textContent = "";
  if (!key) return;
  try {
    const { balance_infos: balances = [] } = await getJson("/user/balance", key);
    const amounts = balances.map(({ currency, total_balance: total }) => `${currency === "CNY" ? "¥" : ""}${total} ${currency}`);
    if (amounts.length) place.textContent = t("balance", { amount: amounts.join(", ") });
  } catch (error) {
    place.textContent = error.status === 401 ? t("failedKey", { message: error.message }) : "";
  }
}

function applyTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
