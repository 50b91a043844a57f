/**
 * What takes time: answers, reading, forks and files. One thing at a time in each conversation; the results and the
 * faults are put into the book, where they happened.
 */

import { newId } from "./book.js";
import * as tree from "./conversation.js";
import { sentence, Told } from "./format.js";

const ROOM = 1e9; // bytes of states that one conversation keeps on the server, before older ones are given up
const PIECE = { first: 8192, least: 2048, most: 1 << 20, ms: 1000 }; // characters of a document that are read at once
const KEEP_EVERY = 1000; // ms after which an answer in the making is kept again
const TITLE = 200; // characters of a title on the server
const POINTS = 64; // of memory, while one document is read

export class Work {
  #server;
  #book;
  #hooks;
  #running = new Map(); // conversation id -> AbortController

  /**
   * hooks: written(conversation, answer, {text, arrivals}) while an answer comes, and before it read(conversation,
   * answer, {read, total}) while the server reads what comes before it; failed(error); lost() where the server
   * has forgotten a conversation, which is read again; finished(conversation, message).
   */
  constructor(server, book, hooks) {
    this.#server = server;
    this.#book = book;
    this.#hooks = hooks;
  }

  busy(conversation) {
    return this.#running.has(conversation);
  }

  stop(conversation) {
    this.#running.get(conversation)?.abort();
  }

  /** Have message `question` answered. */
  async answer(at, question, { temperature, longest }) {
    const id = newId();
    this.#edit(at, (conversation) => {
      const open = tree.change(tree.rewind(conversation, question), question, { fault: null });
      return tree.add(open, { id, role: "assistant", text: "" });
    });
    const live = { text: "", arrivals: [], began: performance.now() };
    await this.#run(at, {
      work: async (signal) => {
        const sampling = { temperature, max_tokens: longest };
        for await (const chunk of this.#chunks(at, question, sampling, signal)) this.#take(at, id, live, chunk);
        this.#close(at, id, live);
        this.#thin(at);
      },
      failed: (fault) => {
        if (live.text) this.#close(at, id, { ...live, stopped: fault === null, fault });
        else this.#edit(at, (conversation) => tree.change(tree.drop(conversation, id), question, { fault }));
      },
    });
  }

  /** Add a document behind the tip, and read it. */
  async add(at, { name, text }) {
    const id = newId();
    const document = { id, role: "document", name, text, size: text.length, read: 0 };
    this.#edit(at, (conversation) => tree.add(conversation, document));
    await this.resume(at, id);
  }

  /** Read a document, or the rest of it. */
  async resume(at, id) {
    await this.#on(at, id, (signal) => this.#read(at, id, signal));
  }

  /** Go back to message `id`; what followed it is kept. */
  async rewind(at, id) {
    this.#edit(at, (conversation) => tree.rewind(conversation, id));
    if (id !== null) await this.#on(at, id, (signal) => this.#settle(at, id, signal));
  }

  /** A new conversation that begins as this one does up to `id`, with states of its own; its id. */
  async branch(at, id) {
    return this.#on(at, id, async (signal) => {
      await this.#settle(at, id, signal);
      const conversation = this.#book.get(at);
      const own = {};
      for (const node of tree.path(conversation, id)) {
        if (node.state && (node.id === id || node.role === "document")) {
          own[node.id] = tree.remembered(await this.#server.fork(node.state.id));
        }
      }
      const branch = tree.excerpt(conversation, id, { id: newId(), at: Date.now(), own });
      this.#book.put(branch);
      return branch.id;
    });
  }

  /** The file of the state after message `id`: {blob, kind}. */
  async save(at, id) {
    return this.#on(at, id, async (signal) => this.#server.exported(await this.#settle(at, id, signal)));
  }

  /** A new conversation that goes on from a state of the server's; its id. */
  async open(state) {
    const detail = await this.#server.state(state);
    const conversation = tree.fromState(detail, { id: newId(), at: Date.now(), newId });
    this.#book.put(conversation);
    return conversation.id;
  }

  /** The same from a file. */
  async load(file) {
    return this.open((await this.#server.imported(file)).id);
  }

  /** Remove a conversation, and its states from the server. */
  remove(at) {
    this.stop(at);
    this.#discard(tree.states(this.#book.get(at)));
    this.#book.remove(at);
  }

  // ---- one at a time

  /** As `#run`; a fault is told at message `id`. */
  #on(at, id, work) {
    this.#edit(at, (conversation) => tree.change(conversation, id, { fault: null }));
    return this.#run(at, {
      work,
      failed: (fault) => this.#edit(at, (conversation) => tree.change(conversation, id, { fault })),
    });
  }

  /** The result of `work`; undefined where it was stopped or failed. `failed` is told why, null: it was stopped. */
  async #run(at, { work, failed }) {
    const abort = new AbortController();
    this.#running.set(at, abort);
    this.#edit(at, (conversation) => conversation);
    try {
      return await work(abort.signal);
    } catch (error) {
      const stopped = error.name === "AbortError";
      failed(stopped ? null : sentence(error));
      if (!stopped) this.#hooks.failed(error);
      return undefined;
    } finally {
      this.#running.delete(at);
      this.#edit(at, (conversation) => conversation);
    }
  }

  #edit(at, change) {
    this.#book.edit(at, change);
  }

  // ---- answers

  /** The chunks of the answer to `question`. States that the server has lost are read again, once. */
  async *#chunks(at, question, sampling, signal) {
    for (let again = false; ; again = true) {
      const ground = await this.#ground(at, question, signal);
      try {
        yield* this.#server.answer({ ...ground, ...sampling }, signal);
        return;
      } catch (error) {
        if (again || !error.lostState) throw error;
        await this.#forgetLost(at, ground.state);
      }
    }
  }

  #take(at, id, live, { choices: [choice] = [], usage, progress }) {
    if (progress) this.#hooks.read(at, id, progress);
    live.usage = usage ?? live.usage;
    if (!choice) return;
    live.state = choice.state ?? live.state;
    if (!choice.delta.content) return;
    const now = performance.now();
    live.arrivals.push(now);
    live.text += choice.delta.content;
    if (now - (live.kept ?? live.began) > KEEP_EVERY) {
      live.kept = now;
      const conversation = this.#book.get(at);
      if (conversation) this.#book.keep(tree.change(conversation, id, { text: live.text }));
    }
    this.#hooks.written(at, id, live);
  }

  /** Put the answer into the book, whole or as far as it came. */
  #close(at, id, { text, arrivals, began, usage, state, stopped = false, fault = null }) {
    const written = usage?.completion_tokens ?? arrivals.length;
    const before = state ? state.tokens - written : this.#tokens(at);
    const pace = tree.paceOf(arrivals, { before, written });
    const facts = {
      tokens: written,
      ms: pace.length ? pace.reduce((sum, [, ms]) => sum + ms, 0) / pace.length : null,
      first: arrivals.length ? arrivals[0] - began : null,
      skipped: usage?.prompt_tokens_details?.cached_tokens ?? 0,
      stopped,
    };
    const kept = state ? { state: tree.remembered(state), bytes: [[state.tokens, state.bytes]] } : {};
    this.#edit(at, (conversation) => tree.change(conversation, id, { text, pace, facts, fault, ...kept }));
    this.#hooks.finished(at, id);
  }

  #tokens(at) {
    const conversation = this.#book.get(at);
    return conversation ? tree.tokens(conversation) : 0;
  }

  // ---- states

  /** {state, messages}: what a request that goes on behind message `id` says. */
  async #ground(at, id, signal) {
    const look = () => tree.basis(this.#book.get(at), id);
    const { unread } = look();
    if (unread && !(await this.#fork(at, id)) && !(await this.#fork(at, unread.id))) {
      await this.#read(at, unread.id, signal);
    }
    const { state, messages } = look();
    return { messages, ...(state && { state }) };
  }

  /** The id of the state after message `id`: its own, a fork of a later one, or one that is read now. */
  async #settle(at, id, signal) {
    const has = () => this.#book.get(at).nodes[id].state;
    if (has() || (await this.#fork(at, id))) return has().id;
    const ground = await this.#ground(at, id, signal);
    if (!has()) this.#hold(at, id, await this.#server.read(ground, signal));
    return has().id;
  }

  /** Rewind a later state to message `id`; whether there was one. */
  async #fork(at, id) {
    const later = tree.rewindable(this.#book.get(at), id);
    if (later) this.#hold(at, id, await this.#server.fork(later.state, { messages: later.messages }));
    return later !== null;
  }

  #hold(at, id, state) {
    const changes = { state: tree.remembered(state), bytes: [[state.tokens, state.bytes]] };
    this.#edit(at, (conversation) => tree.change(conversation, id, changes));
  }

  /** Read what is left of a document, piece by piece, each as large as can be read in about a second. */
  async #read(at, id, signal) {
    const node = () => this.#book.get(at).nodes[id];
    const { role, name, text, parent } = node();
    if (role !== "document") throw new Told("The server no longer has this conversation; begin another one.");
    if (text === null) throw new Told(`The text of ${name} is neither here nor on the server; add it again.`);
    const began = performance.now();
    let length = PIECE.first;
    let state = node().state?.id ?? (parent === null ? null : await this.#settle(at, parent, signal));
    const from = node().state ? node().read : 0;
    let done = from;
    while (done < text.length) {
      const end = tree.cut(text, done, length);
      const piece = (done === 0 && state ? "\n\n" : "") + text.slice(done, end);
      const started = performance.now();
      const title = name.slice(0, TITLE);
      const next = await this.#server.read({ prompt: piece, title, ...(state && { state }) }, signal);
      const ms = performance.now() - started;
      length = Math.min(PIECE.most, Math.max(PIECE.least, length * Math.min(4, Math.max(0.5, PIECE.ms / ms))));
      if (node().state) this.#discard([node().state.id]);
      const bytes = thinned([...node().bytes, [next.tokens, next.bytes]], POINTS);
      const left = ((performance.now() - began) * (text.length - end)) / (end - from);
      const changes = { state: tree.remembered(next), read: end, bytes, left };
      this.#edit(at, (conversation) => tree.change(conversation, id, changes));
      state = next.id;
      done = end;
    }
    const facts = { tokens: node().state.tokens, took: performance.now() - began };
    this.#edit(at, (conversation) => tree.change(conversation, id, { facts, fault: null }));
    this.#hooks.finished(at, id);
  }

  /** Forget states of a conversation that the server no longer has. */
  async #forgetLost(at, state) {
    const { states, all } = await this.#server.states();
    const there = new Set(states.map(({ id }) => id));
    this.#edit(at, (conversation) => tree.forget(conversation, (id) => id === state || (all && !there.has(id))));
    this.#hooks.lost();
  }

  #thin(at) {
    const conversation = this.#book.get(at);
    const spare = new Set(conversation ? tree.surplus(conversation, ROOM) : []);
    if (spare.size === 0) return;
    this.#edit(at, (before) => tree.forget(before, (id) => spare.has(id)));
    this.#discard(spare);
  }

  /** A state that cannot be removed now stays on the server's disk, and nothing here depends on it. */
  #discard(states) {
    for (const id of states) this.#server.remove(id).catch(() => {});
  }
}

/** At most `most` points: every second one goes, but the first and the last. */
function thinned(points, most) {
  return points.length <= most ? points : points.filter((_, place) => place % 2 === 0 || place === points.length - 1);
}
