/** The conversations of this browser, by id. Every change is kept at once. */

import { lean, restored } from "./conversation.js";
import * as store from "./store.js";

/** Random enough for a name within this browser, also where the page did not come over HTTPS. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Book {
  #conversations = new Map();
  #changed;
  #full;

  /** changed(id): a conversation is another now. full(error): the browser keeps no more. */
  constructor({ changed, full }) {
    this.#changed = changed;
    this.#full = full;
    for (const kept of store.loadConversations()) this.#conversations.set(kept.id, restored(kept));
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
    this.#changed(conversation.id);
  }

  /** Nothing happens to a conversation that was removed meanwhile. */
  edit(id, change) {
    const before = this.get(id);
    if (before) this.put({ ...change(before), at: Date.now() });
  }

  /** As `put`, without telling anybody. */
  keep(conversation) {
    this.#conversations.set(conversation.id, conversation);
    try {
      store.saveConversation(lean(conversation));
    } catch (error) {
      this.#full(error);
    }
  }

  remove(id) {
    this.#conversations.delete(id);
    store.removeConversation(id);
    this.#changed(id);
  }
}
