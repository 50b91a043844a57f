/** Messages and lists as elements. Texts go in as text: nothing that a model or a file says is taken for HTML. */

import { count, heading, plural, size, time } from "./format.js";

const LONG = 6000; // characters of a message above which it is folded
const NAMES = { user: "You", assistant: "Model", document: "Text" };

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function button(action, text, { label = null, disabled = false } = {}) {
  return element("button", { type: "button", "data-action": action, "aria-label": label, disabled }, text);
}

/**
 * The list of messages. `show` makes anew only what has changed, so that what is being read out, selected or focused
 * stays; a button that is made anew keeps the focus.
 */
export class Messages {
  #list;
  #shown = new Map(); // id -> {item, node, place}

  constructor(list) {
    this.#list = list;
  }

  /** place: {busy, last, answered, version, versions, writing} of a message, as `item` wants it. */
  show(nodes, placeOf) {
    const focused = document.activeElement?.closest?.("#messages [data-action]");
    const focus = focused && { id: focused.closest("li").dataset.id, action: focused.dataset.action };
    const shown = new Map();
    for (const node of nodes) {
      const place = JSON.stringify(placeOf(node));
      const before = this.#shown.get(node.id);
      const same = before && before.node === node && before.place === place;
      shown.set(node.id, same ? before : { item: item(node, JSON.parse(place)), node, place });
    }
    const items = [...shown.values()].map(({ item: made }) => made);
    for (const [index, made] of items.entries()) {
      if (this.#list.children[index] !== made) this.#list.insertBefore(made, this.#list.children[index] ?? null);
    }
    while (this.#list.children.length > items.length) this.#list.lastChild.remove();
    this.#shown = shown;
    if (focus && !document.contains(focused)) this.#focus(focus);
  }

  /** The text of an answer that is being written, or how far it has come with what it reads before. */
  write(id, text) {
    const found = this.#shown.get(id)?.item.querySelector(".text");
    if (found) found.textContent = trimmed(text);
  }

  #focus({ id, action }) {
    const item = this.#shown.get(id)?.item;
    item?.querySelector(`[data-action="${action}"]:not(:disabled)`)?.focus();
  }
}

function item(node, place) {
  const { writing, busy, versions } = place;
  const made = element(
    "li",
    { "data-id": node.id, class: node.role, "aria-busy": writing ? "true" : null },
    element("h2", {}, NAMES[node.role]),
    node.role === "document" ? documentBody(node, writing) : textBody(node),
    node.fault ? element("p", { class: "fault", role: "alert" }, node.fault) : null,
    element("div", { class: "under" }, factsOf(node), busy ? null : actions(node, place)),
  );
  if (versions > 1) made.querySelector(".under").prepend(versionsOf(place));
  return made;
}

/** Without the empty lines around it, which models write and nobody reads. */
const trimmed = (text) => text.replace(/^\s*\n/, "").trimEnd();

function textBody(node) {
  const text = element("div", { class: "text" }, trimmed(node.text));
  if (node.role !== "user" || node.text.length <= LONG) return text;
  const summary = element("summary", {}, `${heading(node.text, 120)} (${plural(node.text.length, "character")})`);
  return element("details", {}, summary, text);
}

function documentBody(node, reading) {
  const name = element("strong", {}, node.name);
  if (node.size === null) return element("p", { class: "card" }, name, element("span", {}, "read before"));
  const share = node.read / node.size;
  const bar = element("progress", { max: 1, value: share, "aria-label": `Reading ${node.name}` });
  return element("div", { class: "card" }, name, element("span", {}, readingOf(node, reading)), reading ? bar : null);
}

function readingOf({ read, size: whole, left, facts }, reading) {
  const characters = plural(whole, "character");
  if (read === whole && facts) return `${characters}, ${plural(facts.tokens, "token")}, read in ${time(facts.took)}`;
  const percent = `${Math.floor((100 * read) / whole)} % of ${characters}`;
  if (!reading) return `${percent} read`;
  return left ? `reading, ${percent}, ${time(1000 * Math.ceil(left / 1000))} left` : `reading, ${percent}`;
}

function factsOf({ role, facts = null }) {
  if (role !== "assistant" || !facts) return null;
  const { tokens, ms, first, skipped, stopped } = facts;
  const told = [
    stopped ? "stopped" : null,
    plural(tokens, "token"),
    ms ? `${time(ms)} each` : null,
    first ? `first after ${time(first)}` : null,
    skipped ? `${count(skipped)} remembered` : null,
  ];
  return element("p", { class: "facts" }, told.filter((part) => part).join(" · "));
}

function actions({ role, parent, read, size: whole, text, name, fault }, { last, answered }) {
  const about = { user: "this message", assistant: "this answer", document: name }[role];
  const made = (action, word, label) => button(action, word, { label: `${word}: ${label}` });
  const unread = role === "document" && text !== null && read < whole;
  return element(
    "div",
    { class: "actions" },
    last && unread ? made("resume", "Go on reading", about) : null,
    last && role === "user" ? made("answer", fault ? "Send again" : "Answer", about) : null,
    role === "user" ? made("edit", "Edit", about) : null,
    role === "assistant" && parent !== null ? made("again", "Again", "another answer") : null,
    last ? null : made("rewind", "Rewind", `go back to ${about}`),
    made("branch", "Branch", `a new conversation from ${about} on`),
    made("save", "Save", `the memory after ${about}, as a file`),
    last && answered ? made("forward", "Show what followed", about) : null,
  );
}

function versionsOf({ busy, version, versions }) {
  const step = (action, sign, label, end) => button(action, sign, { label, disabled: busy || end });
  return element(
    "div",
    { class: "versions", role: "group", "aria-label": "Versions" },
    step("earlier", "‹", "Earlier version", version === 1),
    element("span", {}, `${version} of ${versions}`),
    step("later", "›", "Later version", version === versions),
  );
}

/** A conversation in the list at the side. */
export function conversationItem({ id, title, note, current, sure }) {
  const open = element(
    "button",
    { type: "button", "data-open": id, "aria-current": current ? "true" : null },
    element("span", { class: "name" }, heading(title) || "New conversation"),
    note ? element("span", { class: "note" }, note) : null,
  );
  const label = sure ? "Really delete it?" : "Delete";
  const remove = element(
    "button",
    { type: "button", "data-delete": id, class: sure ? "sure" : null, "aria-label": `${label} ${heading(title)}` },
    label,
  );
  return element("li", {}, open, remove);
}

/** A state on the server that is in no conversation here. */
export function stateItem({ id, title, tokens, bytes }) {
  const note = `${plural(tokens, "token")}, ${size(bytes)}`;
  return element(
    "li",
    {},
    element(
      "button",
      { type: "button", "data-state": id },
      element("span", { class: "name" }, title ?? "A text"),
      element("span", { class: "note" }, note),
    ),
  );
}
