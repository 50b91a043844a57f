/** The conversations of this browser, by id. Every change is kept at once. */

import { lean, merged, restored } from "./conversation.js";
import * as store from "./store.js";

/** Random enough for a name within this browser, also where the page did not come over HTTPS. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Other tabs of this browser have the same conversations. What they keep is taken in at once, and what this one has added
 * to it is kept again, so that no tab's messages are lost.
 */
export class Book {
  #conversations = new Map();
  #own = new Set(); // ids of the messages that were made in this tab
  #hooks;

  /**
   * changed(id): a conversation is another now. removed(id): another tab has removed it. full(error): the browser keeps
   * no more.
   */
  constructor(hooks) {
    this.#hooks = hooks;
    for (const kept of store.loadConversations()) this.#conversations.set(kept.id, restored(kept));
    store.onConversation((id, kept) => this.#taken(id, kept));
  }

  /** The last changed first. */
  list() {
    return [...this.#conversations.values()].sort((one, other) => other.at - one.at);
  }

  get(id) {
    return this.#conversations.get(id);
  }

  put(conversation) {
    this.keep(conversation);
    this.#hooks.changed(conversation.id);
  }

  /** Nothing happens to a conversation that was removed meanwhile. */
  edit(id, change) {
    const before = this.get(id);
    if (before) this.put({ ...change(before), at: Date.now() });
  }

  /** As `put`, without telling anybody. */
  keep(conversation) {
    const before = this.get(conversation.id)?.nodes ?? {};
    for (const id of Object.keys(conversation.nodes)) if (!before[id]) this.#own.add(id);
    this.#conversations.set(conversation.id, conversation);
    try {
      store.saveConversation(lean(conversation));
    } catch (error) {
      this.#hooks.full(error);
    }
  }

  remove(id) {
    this.#conversations.delete(id);
    store.removeConversation(id);
    this.#hooks.changed(id);
  }

  /** Another tab has kept a conversation, or removed it (null). */
  #taken(id, kept) {
    const before = this.get(id);
    if (kept === null) {
      this.#hooks.removed(id);
      this.#conversations.delete(id);
    } else {
      const both = before ? merged(before, kept, this.#own) : kept;
      this.#conversations.set(id, both);
      if (Object.keys(both.nodes).length > Object.keys(kept.nodes).length) this.keep(both);
    }
    this.#hooks.changed(id);
  }
}
