/** Numbers and faults in words. */

const numbers = new Intl.NumberFormat("en");

/** "12,431" */
export function count(number) {
  return numbers.format(number);
}

/** "1 token", "12,431 tokens" */
export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

/** Three digits: 0.123, 1.23, 12.3, 123. */
function digits(value) {
  return value >= 100 ? count(Math.round(value)) : String(Number(value.toPrecision(3)));
}

/** "840 B", "1.21 MB" */
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${digits(value)} ${units[unit]}`;
}

/** "8.12 ms", "1.5 s", "3 min" */
export function time(ms) {
  if (ms < 1000) return `${digits(ms)} ms`;
  return ms < 120_000 ? `${digits(ms / 1000)} s` : `${digits(ms / 60_000)} min`;
}

/** The first words of a text, for a list. */
export function heading(text, length = 60) {
  const line = text.slice(0, 4 * length).trim().replace(/\s+/g, " ");
  return line.length <= length ? line : `${line.slice(0, length - 1).trimEnd()}…`;
}

/** A file name that says what it is: letters and digits of the title, joined by hyphens. */
export function slug(title) {
  const words = title.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  return words.join("-").slice(0, 40) || "conversation";
}

/** A fault that this page found itself; its message is for the reader. */
export class Told extends Error {
  name = "Told";
}

/** What went wrong, in one sentence for the reader. */
export function sentence(error) {
  if (error.name === "Told") return error.message;
  if (error.status === 401) return "This server asks for a key of its own; give it below and send again.";
  if (error.name === "Refusal") {
    const message = error.message.charAt(0).toUpperCase() + error.message.slice(1).replace(/\.$/, "");
    if (!error.retryAfter) return `${message}.`;
    return `${message.replace(/; try again later$/, "")}; try again in ${plural(error.retryAfter, "second")}.`;
  }
  if (error.name === "Cut") return "The connection broke in the middle of this; nothing before it is lost.";
  if (error.name === "Unreachable") return "The server cannot be reached; try again when it is running.";
  return `This page made a mistake (${error.message}); reload it and try again.`;
}
