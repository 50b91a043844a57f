/** What this browser keeps: conversations, drafts, settings and the key. */

const PREFIX = "isotach/";

function load(name, otherwise) {
  const kept = localStorage.getItem(PREFIX + name);
  return kept === null ? otherwise : JSON.parse(kept);
}

/** Throws where the browser has no room left. */
function save(name, value) {
  localStorage.setItem(PREFIX + name, JSON.stringify(value));
}

function remove(name) {
  localStorage.removeItem(PREFIX + name);
}

export const loadConversations = () =>
  Object.keys(localStorage)
    .filter((name) => name.startsWith(`${PREFIX}conversation/`))
    .map((name) => load(name.slice(PREFIX.length)));
export const saveConversation = (conversation) => save(`conversation/${conversation.id}`, conversation);
export const removeConversation = (id) => {
  remove(`conversation/${id}`);
  remove(`draft/${id}`);
};
/** take(id, conversation), null for one that was removed: what other tabs of this browser do. */
export const onConversation = (take) => {
  const begin = `${PREFIX}conversation/`;
  window.addEventListener("storage", ({ key, newValue }) => {
    if (key?.startsWith(begin)) take(key.slice(begin.length), newValue === null ? null : JSON.parse(newValue));
  });
};

export const loadCurrent = () => load("current", null);
export const saveCurrent = (id) => save("current", id);

/** {text, edited}: what is typed, and where an earlier message is edited {tip, text}, what that has put aside. */
export const loadDraft = (id) => load(`draft/${id}`, { text: "", edited: null });
export const saveDraft = (id, draft) => (draft.text || draft.edited ? save(`draft/${id}`, draft) : remove(`draft/${id}`));

export const loadSettings = () => ({ temperature: 0.8, longest: 512, ...load("settings", {}) });
export const saveSettings = (settings) => save("settings", settings);

export const loadKey = () => load("key", "");
export const saveKey = (key) => (key ? save("key", key) : remove("key"));
