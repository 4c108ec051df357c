// The elements of the page that come and go: turns of a chat, items of the list.

import { markdown } from "./markdown.js";

export function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export function button(text, act, { title = "", label = "", icon = "" } = {}) {
  const node = element("button", icon ? "icon" : "", icon ? undefined : text);
  if (icon) node.append(iconNode(icon));
  node.type = "button";
  if (title) node.title = title;
  if (label) node.setAttribute("aria-label", label);
  node.onclick = act;
  return node;
}

function iconNode(name) {
  const space = "http://www.w3.org/2000/svg", node = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  node.setAttribute("aria-hidden", "true");
  node.append(use);
  return node;
}

async function copy(text, node) {
  const before = node.textContent;
  try { await navigator.clipboard.writeText(text); } catch {  // plain http on another machine has no clipboard
    const area = element("textarea", "", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  node.textContent = "Copied";
  setTimeout(() => { node.textContent = before; }, 1200);
}

/** What stands above a block of code. */
function codeBar(language, source) {
  const bar = element("div", "bar"), copying = button("Copy", () => copy(source, copying), { label: "Copy the code" });
  bar.append(element("span", "language", language), copying);
  return bar;
}

/** Shows an answer as far as it has come. */
export function drawAnswer(node, turn) {
  node.classList.toggle("busy", Boolean(turn.busy));
  node.replaceChildren(markdown(turn.answer, codeBar));
  if (turn.busy && !turn.answer) node.append(element("p", "waiting", ""));
}

/**
 * One question and its answer.
 *
 * state: { isLast, isEditing, isChatBusy, count, note, canShorten }.
 * act: { edit, send, cancel, regenerate, shorten }.
 */
export function turnNode(turn, state, act) {
  const node = element("article", "turn"), answer = element("div", "answer");
  node.dataset.turn = turn.id;
  node.append(state.isEditing ? editor(turn, act) : question(turn, state, act), answer);
  drawAnswer(answer, turn);
  if (turn.error) {
    const box = element("div", "error", turn.error);
    box.setAttribute("role", "alert");
    node.append(box);
  }
  if (!turn.busy) node.append(below(turn, state, act));
  return node;
}

function question(turn, state, act) {
  const box = element("div", "question"), user = element("div", "user", turn.user);
  box.append(user);
  if (!state.isChatBusy) box.append(button("Edit", act.edit, { label: "Edit the question and ask again" }));
  return box;
}

function editor(turn, act) {
  const box = element("div", "editor"), area = element("textarea"), buttons = element("div", "buttons");
  area.value = turn.user;
  area.setAttribute("aria-label", "Question");
  area.rows = Math.min(12, turn.user.split("\n").length + 1);
  const send = () => { if (area.value.trim()) act.send(area.value.trim()); };
  area.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "Escape") { event.stopPropagation(); act.cancel(); }
  };
  const sending = button("Ask again", send);
  sending.classList.add("primary");
  buttons.append(button("Cancel", act.cancel), sending);
  box.append(area, buttons);
  return box;
}

function below(turn, state, act) {
  const meta = element("div", "meta");
  if (turn.answer) {
    const copying = button("Copy", () => copy(turn.answer, copying), { label: "Copy the answer" });
    meta.append(copying);
  }
  if (state.isLast && !state.isChatBusy) {
    meta.append(button(turn.error ? "Retry" : "Regenerate", act.regenerate, { title: "Alt+R" }));
    if (state.canShorten) {
      const shorten = button("Continue without the older turns", act.shorten);
      shorten.classList.add("primary");
      meta.append(shorten);
    }
  }
  meta.append(element("span", "count", [state.count, state.note].filter(Boolean).join(" · ")));
  return meta;
}

/** state: { title, isCurrent, isBusy, isRenaming }. act: { open, rename, renamed, remove }. */
export function chatItem(state, act) {
  const item = element("li");
  if (state.isRenaming) {
    const input = element("input");
    input.value = state.title;
    input.setAttribute("aria-label", "Name of the chat");
    input.onkeydown = (event) => {
      if (event.key === "Enter") act.renamed(input.value.trim());
      if (event.key === "Escape") { event.stopPropagation(); act.renamed(null); }
    };
    input.onblur = () => act.renamed(input.value.trim());
    item.append(input);
    return item;
  }
  const opening = button(state.title, act.open, { title: state.title });
  opening.className = "open";
  opening.setAttribute("aria-current", state.isCurrent);
  if (state.isBusy) opening.append(element("span", "dot", " is answering"));
  item.append(opening,
    button("", act.rename, { icon: "rename", label: `Rename the chat ${state.title}`, title: "Rename" }),
    button("", act.remove, { icon: "delete", label: `Delete the chat ${state.title}`, title: "Delete" }));
  return item;
}
