// What a person has set, for all chats and tabs, and the API key, for this tab alone.

export const SETTINGS = "llama-settings";
const KEY = "llama-key";
export const settings = { temperature: 0.6, top_p: 0.9, longest: "", system: "", theme: "auto" };
let onlyHere = "";  // the key, where the browser keeps nothing for this page

/** Changes a setting and keeps it; `onstorage` tells other tabs. */
export function set(name, value) {
  settings[name] = value;
  try { localStorage.setItem(SETTINGS, JSON.stringify(settings)); } catch { /* forbidden */ }
  applyTheme();
}

export function readSettings() {
  try { Object.assign(settings, JSON.parse(localStorage.getItem(SETTINGS)) || {}); } catch { /* damaged or forbidden */ }
  applyTheme();
}

export function applyTheme() {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = settings.theme === "auto" ? (isDark ? "dark" : "light") : settings.theme;
}

/** The API key, which is forgotten with the tab. */
export function key() { try { return sessionStorage.getItem(KEY) || ""; } catch { return onlyHere; } }

export function setKey(value) {
  onlyHere = value;
  try { sessionStorage.setItem(KEY, value); } catch { /* forbidden */ }
}
