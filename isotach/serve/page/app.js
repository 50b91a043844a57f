/** The page: what is shown of the book, and what clicks, keys and files do. */

import { Book, newId } from "./book.js";
import * as tree from "./conversation.js";
import { download, onChoice, onDrop, textOf } from "./files.js";
import { count, heading, plural, sentence, size, slug, time, Told } from "./format.js";
import { draw, median } from "./gauge.js";
import { Server } from "./server.js";
import * as store from "./store.js";
import { conversationItem, Messages, stateItem } from "./view.js";
import { Work } from "./work.js";

const PASTED = 20_000; // characters of a pasted text above which it is read as a document
const GAUGE_EVERY = 250; // ms

const $ = (id) => document.getElementById(id);

const server = new Server(store.loadKey());
const book = new Book({ changed, removed: (id) => work.stop(id), full });
const work = new Work(server, book, { read: reads, written, finished, failed, lost });
const messages = new Messages($("messages"));
let current = book.get(store.loadCurrent())?.id ?? book.list()[0]?.id ?? newId();
let edited = null; // where an earlier message is edited: {tip, text} to come back to
let model = null;
let sure = null; // the conversation that a second click deletes
let listing = false;
let gaugedAt = 0;

// ---- what is shown

function shown() {
  return book.get(current) ?? tree.begin(current, Date.now());
}

function changed(id) {
  if (id === current) showConversation();
  showList();
}

function showConversation() {
  const conversation = shown();
  const busy = work.busy(current);
  const nodes = tree.path(conversation);
  const title = heading(tree.title(conversation));
  $("title").textContent = title || "New conversation";
  document.title = title ? `${title} · Isotach` : "Isotach";
  $("welcome").hidden = nodes.length > 0;
  $("save").hidden = nodes.length === 0;
  $("save").disabled = busy;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("editing").hidden = edited === null;
  atEnd(() => messages.show(nodes, (node) => placeOf(conversation, node, busy)));
  showGauge(tree.trail(conversation), tree.tokens(conversation));
}

function placeOf(conversation, node, busy) {
  const versions = tree.children(conversation, node.parent);
  const last = node.id === conversation.tip;
  return {
    busy,
    last,
    answered: last && tree.children(conversation, node.id).length > 0,
    version: versions.indexOf(node) + 1,
    versions: versions.length,
    writing: busy && last,
  };
}

function showList() {
  const listed = book.list().map((conversation) => {
    const { id } = conversation;
    const tokens = tree.tokens(conversation);
    const note = work.busy(id) ? "at work" : tokens ? plural(tokens, "token") : "";
    return conversationItem({ id, title: tree.title(conversation), note, current: id === current, sure: id === sure });
  });
  const focused = document.activeElement?.closest("#conversations") && document.activeElement.dataset;
  listing = true; // what loses the focus now has not been left
  $("conversations").replaceChildren(...listed);
  listing = false;
  if (!focused) return;
  const [name, id] = Object.entries(focused)[0];
  $("conversations").querySelector(`[data-${name}="${id}"]`)?.focus();
}

function showGauge({ bytes, pace }, tokens) {
  const memory = bytes.at(-1)?.[1] ?? model?.state_bytes;
  const latest = median(pace.slice(-8).map(([, ms]) => ms));
  $("tokens").textContent = count(tokens);
  $("memory").textContent = memory === undefined ? "–" : size(memory);
  $("pace").textContent = latest === undefined ? "–" : time(latest);
  draw($("memory-plot"), bytes, { what: "Memory", value: size });
  draw($("pace-plot"), pace, { what: "Time per token", value: time });
}

/** States on the server that no conversation here has, without those that others went on from. */
function showElsewhere(states) {
  const here = new Set(book.list().flatMap(tree.states));
  const parents = new Set(states.map(({ parent }) => parent));
  const ends = states.filter(({ id }) => !here.has(id) && !parents.has(id));
  $("elsewhere").hidden = ends.length === 0;
  $("elsewhere").querySelector("ul").replaceChildren(...ends.slice(0, 20).map(stateItem));
}

/** Do something that may lengthen the messages, and stay at their end if that was in sight. */
function atEnd(change) {
  const box = $("scroll");
  const near = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  change();
  if (near) toEnd();
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function say(place, text) {
  $(place).textContent = text;
}

// ---- what work tells

function reads(at, id, { read: done, total }) {
  if (at === current) messages.write(id, `Reading, ${Math.floor((100 * done) / total)} % of ${plural(total, "token")}`);
}

function written(at, id, { text, arrivals }) {
  if (at !== current) return;
  atEnd(() => messages.write(id, text));
  const now = performance.now();
  if (now - gaugedAt < GAUGE_EVERY || arrivals.length < 2) return;
  gaugedAt = now;
  const conversation = shown();
  const before = tree.tokens(conversation);
  const pace = tree.paceOf(arrivals, { before, written: arrivals.length });
  const past = tree.trail(conversation);
  showGauge({ ...past, pace: [...past.pace, ...pace] }, before + arrivals.length);
}

function finished(at, id) {
  const node = book.get(at)?.nodes[id];
  if (at !== current || !node || node.fault) return;
  if (node.role === "assistant") say("announcer", `${node.facts.stopped ? "Stopped" : "Answer"}: ${node.text}`);
  else say("announcer", `${node.name} was read: ${plural(node.facts.tokens, "token")}`);
}

function failed(error) {
  if (error.status === 401) askForKey();
}

function lost() {
  say("notice", "The server no longer had this conversation in memory, so it was read again.");
}

function full(error) {
  const quota = error.name === "QuotaExceededError";
  const reason = quota ? "This browser has no room left for conversations" : "This browser keeps nothing";
  say("notice", `${reason}; save this one as a file, it will be gone when the page is closed.`);
}

/** Keep something small in the browser. */
function keep(saving) {
  try {
    saving();
  } catch (error) {
    full(error);
  }
}

// ---- what is typed

/** On a touch screen the field would bring up the keyboard unasked. */
function compose() {
  grow();
  if (matchMedia("(hover: hover)").matches) $("message").focus();
  else if (!$("stop").hidden) $("stop").focus();
}

/** Put a text into the field, to be gone on with. */
function write(text) {
  $("message").value = text;
  keepDraft();
  compose();
  $("message").setSelectionRange(text.length, text.length);
}

function grow() {
  const field = $("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function keepDraft() {
  keep(() => store.saveDraft(current, { text: $("message").value, edited }));
}

function takeDraft() {
  const draft = store.loadDraft(current);
  edited = draft.edited;
  $("message").value = draft.text;
}

/** The current conversation is in the book from its first message on. */
function ensure() {
  if (!book.get(current)) book.put(tree.begin(current, Date.now()));
  keep(() => store.saveCurrent(current));
}

async function send() {
  const text = $("message").value;
  if (!text.trim()) return;
  if (work.busy(current)) {
    say("composer-fault", "The answer before this one is not finished; stop it with Esc, or wait.");
    return;
  }
  ensure();
  const question = newId();
  book.edit(current, (conversation) => tree.add(conversation, { id: question, role: "user", text }));
  const aside = edited?.text ?? "";
  edited = null;
  write(aside);
  say("notice", "");
  say("composer-fault", "");
  toEnd();
  await answer(question);
}

async function answer(question) {
  await work.answer(current, question, store.loadSettings());
}

function edit(node) {
  edited ??= { tip: shown().tip, text: $("message").value };
  book.edit(current, (conversation) => tree.rewind(conversation, node.parent));
  write(node.text);
}

function leaveEditing() {
  if (edited === null) return;
  const { tip, text } = edited;
  edited = null;
  show(tip);
  write(text);
}

// ---- what is clicked

function open(id) {
  keepDraft();
  current = id;
  keep(() => store.saveCurrent(id));
  takeDraft();
  for (const place of ["notice", "composer-fault", "save-fault", "load-fault"]) say(place, "");
  showConversation();
  showList();
  toEnd();
  closeMenu();
  compose();
}

/** The first click asks, the second does it. */
function remove(id) {
  if (sure !== id) {
    sure = id;
    showList();
    return;
  }
  sure = null;
  work.remove(id);
  if (id === current) open(book.list()[0]?.id ?? newId());
}

const actions = {
  edit,
  answer: (node) => away(answer(node.id)),
  again: (node) => away(answer(node.parent)),
  resume: (node) => away(work.resume(current, node.id)),
  rewind: (node) => away(work.rewind(current, node.id)),
  save: (node) => save(node.id),
  async branch(node) {
    const branch = await work.branch(current, node.id);
    if (branch) open(branch);
  },
  forward: (node) => show(tree.leaf(shown(), node.id)),
  earlier: (node) => step(node, -1),
  later: (node) => step(node, 1),
};

/** What was clicked may be gone now, so the focus goes to where one goes on. */
function away(doing) {
  compose();
  return doing;
}

function show(tip) {
  book.edit(current, (conversation) => tree.rewind(conversation, tip));
}

function step(node, by) {
  const versions = tree.children(shown(), node.parent);
  const other = versions[versions.findIndex(({ id }) => id === node.id) + by];
  show(tree.leaf(shown(), other.id));
  const buttons = document.querySelectorAll(`[data-id="${other.id}"] .versions button:enabled`);
  buttons[by < 0 ? 0 : buttons.length - 1].focus(); // the same one, or the other at the end of the row
}

// ---- files

async function save(id) {
  const at = current;
  const file = await work.save(at, id);
  if (!file) return;
  const name = `${slug(tree.title(book.get(at)))}.${file.kind}`;
  download(file.blob, name);
  say("announcer", `Saved as ${name}`);
}

/** Texts are read into this conversation, states are gone on with in others. `place` is where faults are told. */
async function take(files, place) {
  for (const file of files) {
    say(place, "");
    try {
      if (/\.(tar|safetensors)$/i.test(file.name)) open(await work.load(file));
      else await read(file.name, await textOf(file));
    } catch (error) {
      say(place, sentence(error));
      failed(error);
    }
  }
}

async function read(name, text) {
  if (work.busy(current)) throw new Told(`${name} can be read when this is finished; add it again then.`);
  leaveEditing();
  ensure();
  const reading = work.add(current, { name, text });
  toEnd();
  compose();
  await reading;
}

// ---- the server and its key

async function greet() {
  try {
    [model] = await server.models();
    say("model", model.id);
    $("forget-key").hidden = !server.key;
    showConversation();
    const { states, all } = await server.states();
    showElsewhere(states);
    const conversation = shown();
    const { state } = tree.basis(conversation, conversation.tip);
    if (state && all && !states.some(({ id }) => id === state)) {
      say("notice", "The server does not have this conversation in memory; your next message has it read again.");
    }
  } catch (error) {
    if (error.status === 401) askForKey();
    else say("notice", sentence(error));
  }
}

function askForKey() {
  $("key-panel").hidden = false;
  $("forget-key").hidden = true;
  $("key").focus();
}

async function useKey() {
  const before = server.key;
  server.key = $("key").value.trim();
  try {
    await server.models();
  } catch (error) {
    server.key = before;
    say("key-fault", error.status === 401 ? "This is not a key of this server; try another." : sentence(error));
    return;
  }
  keep(() => store.saveKey(server.key));
  $("key").value = "";
  say("key-fault", "");
  $("key-panel").hidden = true;
  compose();
  await greet();
}

function forgetKey() {
  server.key = "";
  store.saveKey("");
  greet();
}

// ---- the menu of narrow screens

function openMenu() {
  document.body.classList.add("menu");
  $("menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}

function closeMenu() {
  if (!document.body.classList.contains("menu")) return;
  document.body.classList.remove("menu");
  $("menu").setAttribute("aria-expanded", "false");
  $("menu").focus();
}

// ---- clicks and keys

function listenToClicks() {
  const on = (id, does) => $(id).addEventListener("click", does);
  on("new", () => open(newId()));
  on("menu", openMenu);
  on("close-menu", closeMenu);
  on("shade", closeMenu);
  on("stop", () => work.stop(current));
  on("save", () => save(shown().tip));
  on("attach", () => $("text-file").click());
  on("load", () => $("state-file").click());
  on("leave-editing", leaveEditing);
  on("forget-key", forgetKey);
  on("messages", ({ target }) => {
    const chosen = target.closest("[data-action]");
    const node = chosen && shown().nodes[chosen.closest("li").dataset.id];
    if (node) actions[chosen.dataset.action](node);
  });
  on("conversations", ({ target }) => {
    const { open: opened, delete: deleted } = target.closest("button")?.dataset ?? {};
    if (opened) open(opened);
    if (deleted) remove(deleted);
  });
  on("elsewhere", async ({ target }) => {
    const chosen = target.closest("[data-state]");
    if (!chosen) return;
    try {
      open(await work.open(chosen.dataset.state));
      chosen.closest("li").remove();
    } catch (error) {
      say("load-fault", sentence(error));
    }
  });
  $("conversations").addEventListener("focusout", ({ relatedTarget }) => {
    if (listing || sure === null || relatedTarget?.dataset.delete === sure) return;
    sure = null;
    setTimeout(showList); // not while a click is on its way to what is shown now
  });
}

function listenToForms() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("key-panel").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey();
  });
  $("message").addEventListener("input", () => {
    grow();
    keepDraft();
  });
  $("message").addEventListener("paste", (event) => {
    const text = event.clipboardData.getData("text/plain");
    if (text.length <= PASTED || work.busy(current)) return;
    event.preventDefault();
    read("Pasted text", text);
  });
  for (const id of ["temperature", "longest"]) {
    const field = $(id);
    field.value = store.loadSettings()[id];
    field.addEventListener("change", () => {
      if (!field.value || !field.reportValidity()) return;
      keep(() => store.saveSettings({ ...store.loadSettings(), [id]: Number(field.value) }));
    });
  }
}

function listenToKeys() {
  $("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (document.body.classList.contains("menu")) closeMenu();
    else if (work.busy(current)) work.stop(current);
    else leaveEditing();
  });
}

listenToClicks();
listenToForms();
listenToKeys();
onChoice($("text-file"), (files) => take(files, "composer-fault"));
onChoice($("state-file"), (files) => take(files, "load-fault"));
onDrop((files) => take(files, "composer-fault"));
window.addEventListener("resize", showConversation);
takeDraft();
showConversation();
showList();
toEnd();
compose();
greet();
