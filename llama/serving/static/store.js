// The chats that the browser keeps, each a record of its own, so that tabs never overwrite each other's.
//
// A chat: { id, created, changed, title?, system, from?, deleted?, turns, removed }. `changed` is the time of the last
// change of everything but the turns; `from` the id of the first turn that is sent to the server; `removed` has the ids
// of turns that were taken out. A turn: { id, created, changed, user, answer, error?, busy?, ... }.

const DATABASE = "llama-chats", STORE = "chats", FORGET_MS = 24 * 3600 * 1000;
const channel = new BroadcastChannel(DATABASE);
let database = null;  // null: the browser keeps nothing for this page
const onlyHere = new Map();  // the chats in that case

export function newId() { return `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`; }

/** Two versions of a chat as one: the newer settings, and every turn in its newest form unless one removed it. */
export function merge(a, b) {
  if (!a || !b) return a || b;
  const newer = b.changed >= a.changed ? b : a;
  const removed = [...new Set([...a.removed, ...b.removed])], turns = new Map();
  for (const turn of [...a.turns, ...b.turns]) {
    const known = turns.get(turn.id);
    if (!removed.includes(turn.id) && (!known || turn.changed >= known.changed)) turns.set(turn.id, turn);
  }
  return { ...newer, removed, turns: [...turns.values()].sort((x, y) => x.created - y.created) };
}

/** Opens what is kept, and returns it; deleted chats are gone for good a day later. */
export async function open() {
  try {
    database = await new Promise((resolve, reject) => {
      const opening = indexedDB.open(DATABASE, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = opening.onblocked = () => reject(opening.error);
    });
  } catch { return { chats: [], keeps: false }; }
  const all = await read((store) => store.getAll());
  for (const { id } of all.filter((chat) => chat.deleted < Date.now() - FORGET_MS)) await change(id, () => null);
  return { chats: all.filter((chat) => !chat.deleted), keeps: true };
}

export async function get(id) { return database ? read((store) => store.get(id)) : onlyHere.get(id); }

/** Merges a chat into what is kept; returns the result, which other tabs are told of. */
export async function save(chat) {
  const merged = await change(chat.id, (stored) => merge(stored, chat));
  channel.postMessage({ changed: chat.id });
  return merged;
}

/** Removes the content of a chat that is deleted; what is left keeps other tabs from bringing it back. */
export async function forget(id) {
  await change(id, (chat) => chat?.deleted ? { ...chat, title: "", system: "", turns: [],
    removed: [...chat.removed, ...chat.turns.map((turn) => turn.id)] } : chat);
}

/** Adds the chats of an export, merged with those of the same id; returns them. */
export async function importChats(text) {
  const { chats } = JSON.parse(text);
  if (!Array.isArray(chats)) throw new Error("it has no list of chats");
  const found = chats.map(checked);
  for (const chat of found) {
    await change(chat.id, (stored) => !stored || stored.deleted ? chat : merge(stored, chat));
    channel.postMessage({ changed: chat.id });
  }
  return found;
}

export function exportChats(chats) { return JSON.stringify({ format: "llama-chats", version: 1, chats }, null, 1); }

/** Calls `act` with each message of the other tabs. */
export function listen(act) { channel.onmessage = (event) => act(event.data); }

export function tell(message) { channel.postMessage(message); }

/** A chat of an export with nothing in it but what a chat has. */
function checked(chat) {
  const text = (value) => typeof value === "string" ? value : "", time = (value) => Number(value) || Date.now();
  if (!text(chat?.id) || !Array.isArray(chat.turns)) throw new Error("a chat has no id, or no turns");
  const turns = chat.turns.filter((turn) => text(turn?.id)).map((turn) => ({
    id: turn.id, created: time(turn.created), changed: time(turn.changed), user: text(turn.user),
    answer: text(turn.answer), error: text(turn.error), cut: Boolean(turn.cut),
  }));
  return { id: chat.id, created: time(chat.created), changed: time(chat.changed), title: text(chat.title),
    system: text(chat.system), turns, removed: [] };
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function read(ask) { return finished(ask(database.transaction(STORE).objectStore(STORE))); }

/** Replaces a record by what `make` returns for it, in one transaction; null removes it. */
async function change(id, make) {
  if (!database) {
    const made = make(onlyHere.get(id));
    onlyHere.set(id, structuredClone(made));
    return made;
  }
  const store = database.transaction(STORE, "readwrite").objectStore(STORE);
  const made = make(await finished(store.get(id)));
  if (made === null) await finished(store.delete(id));
  else if (made) await finished(store.put(made));
  return made;
}
