// The chat page: what is open, what is being answered, and what the controls do.

import * as server from "./server.js";
import { applyTheme, key, readSettings, set, setKey, settings, SETTINGS } from "./settings.js";
import * as store from "./store.js";
import { chatItem, drawAnswer, element, turnNode } from "./view.js";

const $ = (id) => document.getElementById(id);
const FULL = "context_length_exceeded";
const TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"];
const DRAW_MS = 60, KEEP_MS = 300, ALIVE_MS = 400, UNDO_MS = 10000;
const chats = new Map();  // by id
const running = new Map();  // the answers that this tab receives, by turn id: { control, chatId, turn }
const saving = new Map();  // timers of chats that will be kept soon, by id
const claims = new Map();  // when another tab said that it receives an answer, by turn id
let current = null, editing = null, renaming = null;  // ids
let context = null;  // tokens that the server has room for
let drawing = null, toastTimer = null, toastExpired = () => {};

// ---- chats ----

const chatOf = (id) => chats.get(id);
const isBusy = (chat) => chat.turns.some((turn) => turn.busy);
const lastUse = (chat) => Math.max(chat.created, ...chat.turns.map((turn) => turn.created));
const byUse = () => [...chats.values()].sort((a, b) => lastUse(b) - lastUse(a));
const titleOf = (chat) => chat.title || chat.turns[0]?.user.slice(0, 80) || "New chat";

/** Takes over a chat as it is kept; turns that changed here since then stay as they are here. */
function adopt(kept) {
  if (kept.deleted) {
    for (const { control, chatId } of running.values()) if (chatId === kept.id) control.abort();
    chats.delete(kept.id);
    return;
  }
  const chat = store.merge(kept, chatOf(kept.id));
  chats.set(kept.id, { ...chat, turns: chat.turns.map((turn) => running.get(turn.id)?.turn || turn) });
}

async function keep(id) {
  clearTimeout(saving.get(id));
  saving.delete(id);
  try { adopt(await store.save(chatOf(id))); } catch (error) { $("status").textContent = `not saved: ${error.message}`; }
}

function keepSoon(id) {
  if (!saving.has(id)) saving.set(id, setTimeout(() => keep(id), KEEP_MS));
}

function newChat() {
  const now = Date.now();
  const chat = { id: store.newId(), created: now, changed: now, title: "", system: settings.system, turns: [], removed: [] };
  chats.set(chat.id, chat);
  openChat(chat.id);
  if (matchMedia("(hover: hover)").matches) $("input").focus();
}

function openChat(id, { isBack = false } = {}) {
  current = id;
  editing = renaming = null;
  for (const chat of [...chats.values()]) if (!chat.turns.length && chat.id !== id) chats.delete(chat.id);
  if (!isBack) history.pushState(null, "", `#${id}`);
  closeMenu();
  show();
  $("log").scrollTop = $("log").scrollHeight;
}

function openNewest() {
  const [newest] = byUse();
  newest ? openChat(newest.id) : newChat();
}

function rename(id, title) {
  renaming = null;
  if (title !== null && title !== titleOf(chatOf(id))) {
    Object.assign(chatOf(id), { title, changed: Date.now() });
    keep(id);
  }
  showList();
}

async function deleteChat(id) {
  const chat = chatOf(id), now = Date.now();
  await keep(id);
  adopt(await store.save({ ...chat, deleted: now, changed: now }));
  offerUndo("Chat deleted", async () => {
    const back = { ...chat, deleted: 0, changed: Date.now() };
    chats.set(id, back);
    await keep(id);
    openChat(id);
  }, () => store.forget(id));
  if (current === id) openNewest(); else showList();
}

function removeTurns(chat, turns) {
  chat.removed.push(...turns.map((turn) => turn.id));
  chat.turns = chat.turns.filter((turn) => !turns.includes(turn));
  for (const turn of turns) running.get(turn.id)?.control.abort();
}

// ---- answers ----

function newTurn(user) {
  const now = Date.now();
  return { id: store.newId(), created: now, changed: now, user, answer: "" };
}

/** The turns before `turn` that the server gets. */
function sentBefore(chat, turn) {
  const turns = chat.turns.slice(0, chat.turns.indexOf(turn));
  return turns.slice(Math.max(0, turns.findIndex((earlier) => earlier.id === chat.from)))
    .filter((earlier) => earlier.answer && !earlier.error);
}

function messagesFor(chat, turn) {
  const quoted = (text) => TAGS.reduce((rest, tag) => rest.replaceAll(tag, `${tag[0]} ${tag.slice(1)}`), text);
  const messages = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  for (const { user, answer } of sentBefore(chat, turn))
    messages.push({ role: "user", content: user }, { role: "assistant", content: quoted(answer) });
  return [...messages, { role: "user", content: turn.user }];
}

/** Leaves out the oldest turns that are sent, `n` of them; returns false if there are none. */
function leaveOut(chat, turn, n) {
  const sent = sentBefore(chat, turn);
  if (!sent.length) return false;
  Object.assign(chat, { from: (sent[n] || turn).id, changed: Date.now() });
  return true;
}

async function answer(chatId, turnId, { shorten = false } = {}) {
  const turn = chatOf(chatId).turns.find(({ id }) => id === turnId), control = new AbortController();
  Object.assign(turn, { answer: "", error: "", code: "", note: "", usage: null, cut: false, busy: true, changed: Date.now() });
  running.set(turn.id, { control, chatId, turn });
  keep(chatId);
  show({ toEnd: true });
  if (shorten) leaveOut(chatOf(chatId), turn, Math.ceil(sentBefore(chatOf(chatId), turn).length / 2));
  try {
    for (;;) {
      try { await receive(chatId, turn, control.signal); break; } catch (error) {
        if (!shorten || error.code !== FULL || !leaveOut(chatOf(chatId), turn, 1)) throw error;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(chatId, turn, error);
  }
  Object.assign(turn, { busy: false, changed: Date.now() });
  running.delete(turn.id);
  if (chatOf(chatId)) await keep(chatId);
  if (current === chatId) $("announcer").textContent = turn.error ? "" : "The answer is complete.";
  show();
}

async function receive(chatId, turn, signal) {
  const body = { messages: messagesFor(chatOf(chatId), turn), temperature: Number(settings.temperature),
    top_p: Number(settings.top_p), stream: true, stream_options: { include_usage: true } };
  if (Number(settings.longest) > 0) body.max_completion_tokens = Number(settings.longest);
  let first = 0;
  for await (const event of server.stream(body, key(), signal)) {
    const choice = event.choices[0];
    if (choice?.delta.content) { first ||= performance.now(); turn.answer += choice.delta.content; }
    if (choice?.finish_reason === "length") turn.cut = true;
    if (event.usage) turn.usage = event.usage;
    turn.seconds = first ? (performance.now() - first) / 1000 : 0;
    turn.changed = Date.now();
    keepSoon(chatId);
    drawing ||= setTimeout(draw, DRAW_MS);
  }
}

function fail(chatId, turn, error) {
  const isOffline = error instanceof TypeError;
  turn.error = isOffline ? "The server cannot be reached." : error.message;
  turn.code = error.code || "";
  if (isOffline) watchServer();
  if (error.status === 401) askForKey(() => answer(chatId, turn.id));
}

function send() {
  const text = $("input").value.trim(), chat = chatOf(current);
  if (!text || isBusy(chat)) return;
  $("input").value = "";
  const turn = newTurn(text);
  chat.turns.push(turn);
  answer(chat.id, turn.id);
}

function stop() {
  const turn = chatOf(current).turns.find((one) => one.busy);
  if (!turn) return;
  const mine = running.get(turn.id);
  if (mine) return mine.control.abort();
  store.tell({ stop: turn.id });
  findInterrupted();
}

function regenerate(options) {
  const chat = chatOf(current), turn = chat.turns.at(-1);
  if (turn && !isBusy(chat)) answer(chat.id, turn.id, options);
}

function askAgain(turn, text) {
  const chat = chatOf(current), replaced = chat.turns.slice(chat.turns.indexOf(turn)), fresh = newTurn(text);
  editing = null;
  removeTurns(chat, replaced);
  chat.turns.push(fresh);
  answer(chat.id, fresh.id);
  offerUndo(replaced.length > 1 ? `${replaced.length} turns replaced` : "Question replaced", async () => {
    const back = chatOf(chat.id), now = Date.now();
    if (!back) return;
    removeTurns(back, back.turns.filter(({ id }) => id === fresh.id));
    back.turns.push(...replaced.map((old) => ({ ...old, id: store.newId(), changed: now })));
    await keep(chat.id);
    show();
  });
}

// ---- what is shown ----

function show({ toEnd = false } = {}) {
  const chat = chatOf(current), log = $("log"), follows = toEnd || isAtEnd();
  const nodes = chat.turns.map((turn, i) => turnNode(turn, stateOf(chat, turn, i), {
    edit: () => { editing = turn.id; show(); log.querySelector(".editor textarea").focus(); },
    cancel: () => { editing = null; show(); },
    send: (text) => askAgain(turn, text),
    regenerate: () => regenerate(),
    shorten: () => regenerate({ shorten: true }),
  }));
  const from = chat.turns.findIndex((turn) => turn.id === chat.from);
  if (from > 0) nodes.splice(from, 0, element("p", "divider", "The turns above are no longer sent"));
  if (!nodes.length) nodes.push(element("p", "empty", "Ask something."));
  log.replaceChildren(...nodes);
  if (follows) log.scrollTop = log.scrollHeight;
  showList();
  showSend();
}

function stateOf(chat, turn, i) {
  const isFull = turn.code === FULL || (turn.cut && context && turn.usage?.total_tokens >= context);
  return { isLast: i === chat.turns.length - 1, isEditing: editing === turn.id, isChatBusy: isBusy(chat), count: counts(turn),
    note: turn.note, canShorten: isFull && sentBefore(chat, turn).length > 0 };
}

function counts(turn) {
  if (!turn.usage) return "";
  const { prompt_tokens: prompt, completion_tokens: generated } = turn.usage;
  const rate = turn.seconds > 0.5 ? `, ${((generated - 1) / turn.seconds).toFixed(1)} per second` : "";
  return `${prompt} + ${generated} tokens${context ? ` of ${context}` : ""}${rate}${turn.cut ? " (cut at the limit)" : ""}`;
}

function isAtEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function draw() {
  drawing = null;
  const follows = isAtEnd();
  for (const { turn, chatId } of running.values()) {
    const node = chatId === current && document.querySelector(`[data-turn="${turn.id}"] .answer`);
    if (node) drawAnswer(node, turn);
  }
  if (follows) $("log").scrollTop = $("log").scrollHeight;
}

function showList() {
  const wanted = $("search").value.trim().toLowerCase();
  const has = (chat) => [chat.title, ...chat.turns.flatMap(({ user, answer }) => [user, answer])]
    .some((text) => text?.toLowerCase().includes(wanted));
  const found = byUse().filter((chat) => !wanted || has(chat));
  $("chats").replaceChildren(...found.map(({ id }) => chatItem(
    { title: titleOf(chatOf(id)), isCurrent: id === current, isBusy: isBusy(chatOf(id)), isRenaming: renaming === id },
    {
      open: () => openChat(id),
      rename: () => { renaming = id; showList(); $("chats").querySelector("input").select(); },
      renamed: (title) => { if (renaming === id) rename(id, title); },
      remove: () => deleteChat(id),
    },
  )));
  $("nothing").hidden = found.length > 0;
}

function showSend() {
  const busy = isBusy(chatOf(current)), input = $("input");
  $("send").textContent = busy ? "Stop" : "Send";
  $("send").disabled = !busy && !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function offerUndo(text, undo, expired = () => {}) {
  hideToast();
  toastExpired = expired;
  $("toast-text").textContent = text;
  $("undo").onclick = () => { toastExpired = () => {}; hideToast(); undo(); };
  $("toast").hidden = false;
  toastTimer = setTimeout(hideToast, UNDO_MS);
}

function hideToast() {
  clearTimeout(toastTimer);
  $("toast").hidden = true;
  toastExpired();
  toastExpired = () => {};
}

function closeMenu() {
  document.body.classList.remove("menu");
  $("menu").setAttribute("aria-expanded", "false");
}

// ---- settings, key, server ----

function showSettings() {
  for (const name of ["temperature", "top_p", "longest", "theme"]) $(name).value = settings[name];
  for (const name of ["temperature", "top_p"]) $(`${name}-shown`).value = Number(settings[name]).toFixed(2);
  $("system").value = chatOf(current).system;
  $("key").value = key();
}

function askForKey(then) {
  $("asked-key").value = key();
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    setKey($("asked-key").value.trim());
    $("key-dialog").close();
    watchServer();
    then();
  };
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

/** Shows what is wrong with the server until it is ready; then what it serves. */
async function watchServer() {
  for (;;) {
    try { await server.checkHealth(); break; } catch (error) {
      $("status").textContent = error instanceof TypeError ? "the server cannot be reached" : error.message;
    }
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
  try {
    const model = await server.model(key());
    context = model.max_model_len;
    $("model").textContent = document.title = model.id;
    $("status").textContent = "";
  } catch (error) {
    $("status").textContent = error.message;
    if (error.status === 401) askForKey(() => {});
  }
  show();
}

// ---- other tabs ----

async function hear(message) {
  if (message.ask) store.tell({ alive: [...running.keys()] });
  message.alive?.forEach((id) => claims.set(id, Date.now()));
  if (message.stop) running.get(message.stop)?.control.abort();
  if (message.closing) findInterrupted();
  if (!message.changed) return;
  const kept = await store.get(message.changed);
  if (!kept) return;
  adopt(kept);
  if (!chatOf(current)) openNewest();
  else if (kept.id === current && !editing) show();
  else if (!renaming) showList();
}

/** Marks the answers that no tab receives any more: their page was closed, or loaded anew. */
async function findInterrupted() {
  const isElsewhere = (turn) => turn.busy && !running.has(turn.id);
  const elsewhere = new Set([...chats.values()].flatMap((chat) => chat.turns.filter(isElsewhere)).map(({ id }) => id));
  if (!elsewhere.size) return;
  const asked = Date.now();
  store.tell({ ask: true });
  await new Promise((resolve) => setTimeout(resolve, ALIVE_MS));
  const isLost = (turn) => isElsewhere(turn) && elsewhere.has(turn.id) && !(claims.get(turn.id) >= asked);
  for (const chat of chats.values()) {
    const lost = chat.turns.filter(isLost);
    for (const turn of lost) Object.assign(turn, { busy: false, note: "interrupted: the page was closed", changed: Date.now() });
    if (lost.length) keep(chat.id);
  }
  show();
}

// ---- controls ----

function connectControls() {
  $("form").onsubmit = (event) => { event.preventDefault(); isBusy(chatOf(current)) ? stop() : send(); };
  $("input").oninput = showSend;
  $("input").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  };
  $("new").onclick = newChat;
  $("search").oninput = showList;
  $("menu").onclick = () => $("menu").setAttribute("aria-expanded", document.body.classList.toggle("menu"));
  $("scrim").onclick = closeMenu;
  window.onpopstate = () => { if (chatOf(location.hash.slice(1))) openChat(location.hash.slice(1), { isBack: true }); };
  window.onpagehide = () => store.tell({ closing: true });
  window.onresize = showSend;
  window.onstorage = (event) => { if (event.key === SETTINGS) readSettings(); };
  document.onkeydown = (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) { stop(); closeMenu(); }
    if (event.altKey && event.code === "KeyN") { event.preventDefault(); newChat(); }
    if (event.altKey && event.code === "KeyR") { event.preventDefault(); regenerate(); }
  };
}

function connectSettings() {
  $("open-settings").onclick = () => { closeMenu(); showSettings(); $("settings").showModal(); };
  for (const node of document.querySelectorAll("dialog .close")) node.onclick = () => node.closest("dialog").close();
  for (const name of ["temperature", "top_p"]) {
    $(name).oninput = () => { set(name, Number($(name).value)); $(`${name}-shown`).value = settings[name].toFixed(2); };
  }
  $("longest").oninput = () => set("longest", $("longest").value);
  $("theme").onchange = () => set("theme", $("theme").value);
  $("system").oninput = () => {
    const chat = chatOf(current);
    Object.assign(chat, { system: $("system").value, changed: Date.now() });
    set("system", chat.system);
    if (chat.turns.length) keepSoon(chat.id);
  };
  $("key").onchange = () => { setKey($("key").value.trim()); watchServer(); };
  $("export").onclick = exportAll;
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = importFile;
  matchMedia("(prefers-color-scheme: dark)").onchange = applyTheme;
}

function exportAll() {
  const link = element("a"), kept = byUse().filter((chat) => chat.turns.length);
  link.href = URL.createObjectURL(new Blob([store.exportChats(kept)], { type: "application/json" }));
  link.download = `chats-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function importFile() {
  const [file] = $("import-file").files;
  if (!file) return;
  try {
    const imported = await store.importChats(await file.text());
    for (const { id } of imported) adopt(await store.get(id));
    $("import-result").textContent = `${imported.length} chats imported`;
  } catch (error) { $("import-result").textContent = `The file has no chats of this page: ${error.message}`; }
  $("import-file").value = "";
  show();
}

async function start() {
  readSettings();
  const kept = await store.open();
  for (const chat of kept.chats) chats.set(chat.id, chat);
  connectControls();
  connectSettings();
  const asked = location.hash.slice(1);
  chats.has(asked) ? openChat(asked, { isBack: true }) : openNewest();
  store.listen(hear);
  findInterrupted();
  await watchServer();
  if (!kept.keeps) $("status").textContent = "chats are not kept: this browser forbids it";
}

start();
