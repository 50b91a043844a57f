/**
 * A conversation is a tree of messages; what is shown is the way from a root of it to its tip. Nothing in this file
 * touches the page, the network or the clock: functions take a conversation and give another one.
 *
 * Conversation: { id, nodes: { [id]: Node }, tip: id | null, at: when it was last changed, ms since 1970 }
 *
 * Node: { id, parent: id | null, role: "user" | "assistant" | "document", text, state, bytes, pace, fault, ... }
 * - text: what was said; null for a document whose text is not here
 * - state: { id, tokens, bytes, message_count } of the server's state after this message, null where it has none
 * - bytes, pace: points [tokens so far, bytes of the state] and [tokens so far, ms per token written]
 * - fault: what went wrong with this message, a sentence
 * - of a document: name, size and read, characters in all and those that `state` has read; null where it is only known
 *   that there was something
 * - of an answer: facts, a line about it
 */

const KEPT_TEXT = 20_000; // characters of a document that are kept in the browser

export function begin(id, at) {
  return { id, nodes: {}, tip: null, at };
}

/** Add a message behind the tip, and make it the tip. */
export function add(conversation, node) {
  const added = { text: null, state: null, bytes: [], pace: [], fault: null, ...node, parent: conversation.tip };
  return { ...conversation, nodes: { ...conversation.nodes, [node.id]: added }, tip: node.id };
}

export function change(conversation, id, changes) {
  const node = conversation.nodes[id];
  return node ? { ...conversation, nodes: { ...conversation.nodes, [id]: { ...node, ...changes } } } : conversation;
}

/** Take away a message that nothing follows. */
export function drop(conversation, id) {
  const { [id]: dropped, ...nodes } = conversation.nodes;
  return { ...conversation, nodes, tip: conversation.tip === id ? dropped.parent : conversation.tip };
}

export function rewind(conversation, tip) {
  return { ...conversation, tip };
}

/** The messages from the root to `id`. */
export function path(conversation, id = conversation.tip) {
  const nodes = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

/** What follows directly upon `id` (null: what begins the conversation), the oldest first. */
export function children(conversation, id) {
  return Object.values(conversation.nodes).filter((node) => node.parent === id);
}

/** The end of the newest continuation of `id`. */
export function leaf(conversation, id) {
  const newest = children(conversation, id).at(-1);
  return newest ? leaf(conversation, newest.id) : id;
}

/**
 * What the server has to be told to go on behind `id`: {state: the id of the nearest state or null, messages: those
 * behind it, unread: a message that cannot just be told and stands before them (a document), or null}.
 */
export function basis(conversation, id) {
  const messages = [];
  for (const node of path(conversation, id).reverse()) {
    if (node.state) return { state: node.state.id, messages, unread: null };
    if (node.role === "document") return { state: null, messages, unread: node };
    messages.unshift({ role: node.role, content: node.text });
  }
  return { state: null, messages, unread: null };
}

/**
 * A later state that has read `id`, and how many of its messages to keep for it to end there (0: what was read before
 * them); null if none has.
 */
export function rewindable(conversation, id) {
  const ahead = children(conversation, id).map((node) => [node, 1]);
  for (const [node, steps] of ahead) {
    if (node.role === "document") continue; // a document is no message to the server, which then counts from it
    const messages = (node.state?.message_count ?? 0) - steps;
    if (messages >= 0) return { state: node.state.id, messages };
    ahead.push(...children(conversation, node.id).map((child) => [child, steps + 1]));
  }
  return null;
}

/** The ids of all its states. */
export function states(conversation) {
  return Object.values(conversation.nodes).flatMap((node) => (node.state ? [node.state.id] : []));
}

/** Without the states for which `gone` holds. */
export function forget(conversation, gone) {
  const nodes = Object.entries(conversation.nodes).map(([id, node]) => [
    id,
    node.state && gone(node.state.id) ? { ...node, state: null } : node,
  ]);
  return { ...conversation, nodes: Object.fromEntries(nodes) };
}

/**
 * States that may be given up so that the rest take at most `room` bytes: the oldest of those inside a branch. Ends,
 * places where branches part, documents and the tip keep theirs; the others can be had again by rewinding a later one.
 */
export function surplus(conversation, room) {
  const held = Object.values(conversation.nodes).filter((node) => node.state);
  let over = held.reduce((sum, node) => sum + node.state.bytes, 0) - room;
  const spare = [];
  for (const node of held) {
    if (over <= 0) break;
    const inside = node.role !== "document" && children(conversation, node.id).length === 1;
    if (!inside || node.id === conversation.tip || !rewindable(conversation, node.id)) continue;
    over -= node.state.bytes;
    spare.push(node.state.id);
  }
  return spare;
}

/** A conversation of its own that has the messages up to `tip`; `own` maps message ids to states that are only its. */
export function excerpt(conversation, tip, { id, at, own }) {
  const nodes = path(conversation, tip).map((node) => [node.id, { ...node, state: own[node.id] ?? null }]);
  return { id, nodes: Object.fromEntries(nodes), tip, at };
}

/** A conversation from a state of the server's with its messages, null for one of plain text. `newId` makes ids. */
export function fromState(detail, { id, at, newId }) {
  const messages = detail.messages ?? [];
  let conversation = begin(id, at);
  if (detail.before !== 0) {
    const name = (messages.length === 0 && detail.title) || "A text";
    conversation = add(conversation, { id: newId(), role: "document", name, size: null, read: null });
  }
  for (const { role, content } of messages) conversation = add(conversation, { id: newId(), role, text: content });
  return change(conversation, conversation.tip, {
    state: remembered(detail),
    bytes: [[detail.tokens, detail.bytes]],
  });
}

/** What of the server's State object is kept. */
export function remembered({ id, tokens, bytes, message_count }) {
  return { id, tokens, bytes, message_count };
}

/** Points of memory and pace on the way to the tip, for the gauge. */
export function trail(conversation) {
  const nodes = path(conversation);
  return { bytes: nodes.flatMap((node) => node.bytes), pace: nodes.flatMap((node) => node.pace) };
}

/** How many tokens there are up to the tip, as far as the server has said; 0 where it has not. */
export function tokens(conversation) {
  return Math.max(0, ...path(conversation).flatMap((node) => node.bytes.map(([at]) => at)));
}

/** The first thing that was said or read here. */
export function title(conversation) {
  const nodes = path(conversation, leaf(conversation, null)).filter((node) => node.role !== "assistant");
  const first = nodes.find((node) => node.size !== null) ?? nodes[0];
  return first ? (first.name ?? first.text) : "";
}

/** What another tab has kept, with the messages that only this one has, or has made: those of `own`. */
export function merged(conversation, kept, own) {
  const mine = Object.entries(conversation.nodes).filter(([id]) => own.has(id));
  const nodes = { ...kept.nodes, ...Object.fromEntries(mine) };
  return { ...kept, nodes, tip: nodes[conversation.tip] ? conversation.tip : kept.tip };
}

/** What the browser keeps: everything but long texts of documents. */
export function lean(conversation) {
  const nodes = Object.entries(conversation.nodes).map(([id, node]) => {
    const long = node.role === "document" && node.text !== null && node.text.length > KEPT_TEXT;
    return [id, long ? { ...node, text: null } : node];
  });
  return { ...conversation, nodes: Object.fromEntries(nodes) };
}

/** What was kept, with answers that never began taken away. */
export function restored(kept) {
  const empty = Object.values(kept.nodes).filter((node) => node.role === "assistant" && !node.text && !node.state);
  return empty.reduce((conversation, node) => drop(conversation, node.id), kept);
}

/**
 * Milliseconds per token in an answer: points [tokens so far, ms per token], from when its pieces came. A piece may be
 * of several tokens, so what counts is their number in all. At most `bins` points, each over eight pieces and 200 ms at
 * least, for pieces come in bursts.
 */
export function paceOf(arrivals, { before, written, bins = 8 }) {
  const gaps = arrivals.length - 1;
  const took = arrivals.at(-1) - arrivals[0];
  const parts = Math.max(1, Math.min(bins, Math.floor(gaps / 8), Math.floor(took / 200)));
  const perPiece = written / arrivals.length;
  return Array.from({ length: gaps > 0 ? parts : 0 }, (_, part) => {
    const [from, to] = [Math.round((part * gaps) / parts), Math.round(((part + 1) * gaps) / parts)];
    const ms = (arrivals[to] - arrivals[from]) / ((to - from) * perPiece);
    return [Math.round(before + (to + 1) * perPiece), ms];
  });
}

/** Where to cut a text after at most `length` characters: behind a line, else a word, never inside a character. */
export function cut(text, from, length) {
  const end = from + length;
  if (end >= text.length) return text.length;
  const half = from + length / 2;
  const line = text.lastIndexOf("\n", end - 1) + 1;
  if (line > half) return line;
  const word = text.lastIndexOf(" ", end - 1); // a space belongs to the word behind it, for most tokenizers
  if (word > half) return word;
  return /[\uDC00-\uDFFF]/.test(text[end]) ? end + 1 : end;
}
