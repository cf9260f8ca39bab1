// Small pieces that several views share.

import { download, key } from "./api.js";
import { copyButton, h } from "./dom.js";

// What a status is called, and how it looks: the mark's shape differs too, not its colour alone.
const STATUS = {
  validating_files: ["Checking files", "waiting"],
  queued: ["Queued", "waiting"],
  running: ["Running", "running"],
  paused: ["Paused", "paused"],
  succeeded: ["Succeeded", "good"],
  failed: ["Failed", "bad"],
  cancelled: ["Cancelled", "ended"],
};

export const isFinal = (status) => ["succeeded", "failed", "cancelled"].includes(status);

export function statusName(status) {
  return STATUS[status]?.[0] ?? status;
}

export function statusBadge() {
  return h("span", { class: "status" });
}

export function setStatus(badge, status) {
  if (badge.dataset.status === status) return;
  badge.dataset.status = status;
  badge.className = `status ${STATUS[status]?.[1] ?? "waiting"}`;
  badge.textContent = statusName(status);
}

/** The head of a view: its title, what goes under it, and buttons beside it. */
export function pageHead(title, { above, under, actions } = {}) {
  const heading = h("h1", { tabindex: -1 }, title);
  return h(
    "header",
    { class: "page-head" },
    h("div", { class: "titles" }, above, heading, under),
    actions && h("div", { class: "actions" }, actions),
  );
}

/** How a script is pointed here, with a button to copy it. */
export function scriptHint() {
  const lines = [
    `export OPENAI_BASE_URL=${location.origin}/v1`,
    key.get()
      ? "export OPENAI_API_KEY=…   # the server's key"
      : "export OPENAI_API_KEY=anything   # the client asks for one, the server does not",
    "python your_script.py",
  ];
  const text = lines.join("\n");
  return h(
    "div",
    { class: "shell" },
    h("pre", { tabindex: 0, "aria-label": "Shell lines" }, h("code", {}, text)),
    copyButton(text),
  );
}

/** A view with nothing to show yet: what to do about it. */
export function emptyState(title, text, ...more) {
  return h("div", { class: "empty" }, h("h2", {}, title), h("p", {}, text), ...more);
}

/** A link to a file of the server. With a key the browser cannot fetch it by itself, so then we do. */
export function fileLink(path, filename, text, props = {}) {
  const link = h("a", { href: path, download: filename, click: fetchIt, ...props }, text);
  async function fetchIt(event) {
    if (!key.get()) return;
    event.preventDefault();
    try {
      await download(path, filename);
    } catch (error) {
      message("The download failed", error.message);
    }
  }
  return link;
}

/** A list of name and value, from [[name, value], …]; values may be nodes. Pairs without a value are left out. */
export function facts(pairs) {
  const rows = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h(
    "dl",
    { class: "facts" },
    rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

/** A number with its name under which it is kept up to date: {element, value}. */
export function figure(name) {
  const value = h("dd", {}, "–");
  return { element: h("div", { class: "figure" }, h("dt", {}, name), value), value };
}

function openDialog(title, content, buttons) {
  const heading = h("h2", { id: "dialog-title" }, title);
  const dialog = h(
    "dialog",
    { "aria-labelledby": "dialog-title" },
    heading,
    content,
    h("div", { class: "actions" }, buttons),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask before something that cannot be undone. @returns a promise of true or false */
export function confirmed(title, text, yes, no = "Keep it") {
  return new Promise((resolve) => {
    const cancel = h("button", { type: "button", autofocus: true, click: () => dialog.close() }, no);
    const go = h("button", { type: "button", class: "danger", click: () => dialog.close("yes") }, yes);
    const dialog = openDialog(title, h("p", {}, text), [cancel, go]);
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"));
  });
}

/** Say that something failed. */
export function message(title, text) {
  const close = h("button", { type: "button", autofocus: true, click: () => dialog.close() }, "Close");
  const dialog = openDialog(title, h("p", { class: "text" }, text), [close]);
}

let asking = false;

/** Ask for the server's API key, once at a time. @returns a promise of true when one was given */
export function askForKey(reason) {
  if (asking) return Promise.resolve(false);
  asking = true;
  return new Promise((resolve) => {
    const field = h("input", {
      id: "api-key",
      type: "password",
      autocomplete: "off",
      spellcheck: "false",
      required: true,
      autofocus: true,
    });
    const form = h(
      "form",
      { submit: save },
      h(
        "p",
        {},
        key.get()
          ? reason
          : "This server asks for a key, one of its TUNERY_API_KEYS. It is kept in this tab until you close it.",
      ),
      h("label", { for: "api-key" }, "API key"),
      field,
      h("button", { type: "submit", class: "primary" }, "Go on"),
    );
    const dialog = openDialog("API key needed", form, []);
    function save(event) {
      event.preventDefault();
      key.set(field.value.trim());
      dialog.close("given");
    }
    dialog.addEventListener("close", () => {
      asking = false;
      resolve(dialog.returnValue === "given");
    });
  });
}
