/** The server's API: OpenAI's completions, and states. */

/** An answer that is not 2xx, or an error in a stream. `message` is the server's own sentence. */
export class Refusal extends Error {
  name = "Refusal";

  constructor(status, { message, param = null, code = null }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }

  /** Whether the state that was named is not there, or no longer fits the model. */
  get lostState() {
    return this.code === "state_not_found" || this.param === "state";
  }
}

/** No answer at all. */
export class Unreachable extends Error {
  name = "Unreachable";
}

/** A stream that ended before it said so. */
export class Cut extends Error {
  name = "Cut";
}

/**
 * Server-sent events, as far as they are complete: their data, how much of the prompt is read if a comment says so
 * ({read, total} in tokens, else null), and the text that is left over for the next call.
 */
export function parseEvents(buffer) {
  const blocks = buffer.split(/\r?\n\r?\n/);
  const rest = blocks.pop();
  const [, read, total] = blocks.map((block) => /^: progress (\d+)\/(\d+)$/.exec(block)).findLast(Boolean) ?? [];
  const events = blocks
    .map((block) => block.split(/\r?\n/).filter((line) => line.startsWith("data:")))
    .filter((lines) => lines.length > 0)
    .map((lines) => lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n"));
  return { events, progress: total ? { read: Number(read), total: Number(total) } : null, rest };
}

export class Server {
  /** key: sent with every request, "" for none. */
  constructor(key = "") {
    this.key = key;
  }

  async models() {
    return (await this.#json("GET", "v1/models")).data;
  }

  /** All states of this key's owner, the newest first, up to `limit`; and whether these are all. */
  async states(limit = 1000) {
    const { data, has_more: more } = await this.#json("GET", `v1/states?limit=${limit}`);
    return { states: data, all: !more };
  }

  async state(id) {
    return this.#json("GET", `v1/states/${id}`);
  }

  /** Read {messages} or {prompt}, behind {state} if given, and keep the state. */
  async read(body, signal) {
    return this.#json("POST", "v1/states", { body, signal });
  }

  /** {messages: k} rewinds the copy to the first k messages. */
  async fork(id, body = {}) {
    return this.#json("POST", `v1/states/${id}/fork`, { body });
  }

  async remove(id) {
    return this.#json("DELETE", `v1/states/${id}`);
  }

  /** The state with its transcript, as one file; without one where the server knows none. {blob, kind: "tar"} */
  async exported(id) {
    const response = await this.#request("GET", `v1/states/${id}/export?transcript=true`);
    const [, kind] = /filename=".*\.(\w+)"/.exec(response.headers.get("content-disposition")) ?? [null, "tar"];
    return { blob: await response.blob(), kind };
  }

  async imported(file) {
    return this.#json("POST", "v1/states/import", { file });
  }

  /** The chunks of one answer as they come, and {progress} while its prompt is read. Cut without [DONE] at the end. */
  async *answer(body, signal) {
    const options = { stream: true, stream_options: { include_usage: true }, store: true };
    const response = await this.#request("POST", "v1/chat/completions", { body: { ...body, ...options }, signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    let complete = false;
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done && complete) return;
        if (done) throw new Cut();
        const { events, progress, rest } = parseEvents(buffer + value);
        buffer = rest;
        if (progress) yield { progress };
        for (const event of events) {
          if (event === "[DONE]") {
            complete = true;
            continue;
          }
          const chunk = JSON.parse(event);
          if (chunk.error) throw new Refusal(response.status, chunk.error);
          yield chunk;
        }
      }
    } catch (error) {
      // What is lost on the way; JSON that is none would be a SyntaxError.
      throw error instanceof TypeError ? new Cut() : error;
    } finally {
      reader.cancel().catch(() => {}); // it may have failed already, which was told
    }
  }

  async #json(method, path, content) {
    const response = await this.#request(method, path, content);
    return response.json().catch((error) => {
      throw error instanceof TypeError ? new Cut() : error;
    });
  }

  async #request(method, path, { body, file, signal } = {}) {
    const headers = {};
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    if (body) headers["content-type"] = "application/json";
    const content = body ? JSON.stringify(body) : file;
    const response = await fetch(path, { method, headers, body: content, signal }).catch((error) => {
      throw error instanceof TypeError ? new Unreachable() : error;
    });
    if (response.ok) return response;
    const unknown = { message: `the server answered ${response.status} ${response.statusText}` };
    const { error } = await response.json().catch(() => ({}));
    throw new Refusal(response.status, error ?? unknown, Number(response.headers.get("retry-after")) || null);
  }
}
