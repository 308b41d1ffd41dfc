// Runs before the first paint, so that a chosen theme or language never flashes into place. Everything else is a module.
(() => {
  let settings = {};
  try {
    settings = JSON.parse(localStorage.getItem("finback.settings")) || {};
  } catch {
    // Storage is closed or holds something else: the system's theme and the browser's language are right then.
  }
  if (settings.theme === "light" || settings.theme === "dark") document.documentElement.dataset.theme = settings.theme;
  const chosen = settings.language || (navigator.language || "en");
  document.documentElement.lang = chosen.toLowerCase().startsWith("zh") ? "zh" : "en";
})();
