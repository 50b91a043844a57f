/** Files from and to the person's disk. */

import { Told } from "./format.js";

/** A file's text. Told where it is none. */
export async function textOf(file) {
  const bytes = await file.arrayBuffer().catch(() => {
    throw new Told(`${file.name} cannot be opened; is it still there?`);
  });
  if (bytes.byteLength === 0) throw new Told(`${file.name} is empty; add another file.`);
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Told(`${file.name} is not text in UTF-8; save it as that and add it again.`);
  }
}

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // some browsers begin to read it later
}

/** Call `take` with the files that are chosen with an input, or dropped anywhere on the page. */
export function onChoice(input, take) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = ""; // so that the same file can be chosen again
    take(files);
  });
}

export function onDrop(take) {
  const over = (shows) => document.body.classList.toggle("dropping", shows);
  const handle = (event, act) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    act(event.dataTransfer);
  };
  window.addEventListener("dragover", (event) => handle(event, () => over(true)));
  window.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) over(false);
  });
  window.addEventListener("drop", (event) =>
    handle(event, ({ files }) => {
      over(false);
      take([...files]);
    }),
  );
}
