// A place for one file of examples: drop it, pick it, or take one uploaded before. It uploads at once.

import { Refused, Unreachable, api, upload } from "./api.js";
import { connection } from "./connection.js";
import { freshId, h, setText } from "./dom.js";
import { ago, bytes } from "./format.js";

/**
 * @param label, hint what the file is for
 * @param onChange called with {id, filename, bytes} once it is on the server, with null when there is none
 * @returns {element, file(), set(file), offer(files)}
 */
export function fileField({ label, hint, signal, onChange, limit = () => null }) {
  const id = freshId("file");
  let file = null; // as the server knows it
  let running = null; // AbortController of an upload under way
  const picker = h("input", { type: "file", id, class: "unseen", accept: ".jsonl,.json,.csv,.tsv,.txt,.parquet", "aria-describedby": `${id}-hint`, change: picked });
  const before = h("select", { id: `${id}-before`, change: takeOld });
  const beforeLine = h("p", { class: "before", hidden: true }, h("label", { for: `${id}-before` }, "or one uploaded before"), before);
  const zone = h(
    "div",
    { class: "zone" },
    picker,
    h("p", {}, h("label", { for: id, class: "button" }, "Choose a file", h("span", { class: "unseen" }, `, ${label}`)), h("span", { class: "or-drop" }, " or drop it here")),
    h("p", { class: "note", id: `${id}-hint` }, hint),
    beforeLine,
  );
  const bar = h("progress", { max: 1, value: 0, "aria-label": `Upload of the ${label.toLowerCase()}` });
  const name = h("span", { class: "filename" });
  const note = h("span", { class: "note" });
  const remove = h("button", { type: "button", class: "quiet", click: clear }, "Remove");
  const chosen = h("div", { class: "chosen", hidden: true }, h("p", {}, name, note, remove), bar);
  const error = h("p", { class: "error", role: "alert", hidden: true });
  const element = h("fieldset", { class: "file" }, h("legend", {}, label), zone, chosen, error);

  for (const kind of ["dragenter", "dragover"]) zone.addEventListener(kind, (event) => over(event, true));
  for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, (event) => over(event, false));
  zone.addEventListener("drop", (event) => event.dataTransfer.files[0] && send(event.dataTransfer.files[0]));

  function over(event, inside) {
    event.preventDefault();
    zone.classList.toggle("over", inside);
  }

  function picked() {
    if (picker.files[0]) send(picker.files[0]);
    picker.value = ""; // the same file, mended, can be picked again
  }

  function takeOld() {
    const found = offered.find((each) => each.id === before.value);
    if (found) accept(found);
  }

  async function send(local) {
    complain("");
    const most = limit();
    if (most && local.size > most) return complain(`${local.name} has ${bytes(local.size)}; the server takes up to ${bytes(most)}.`);
    running?.abort();
    const mine = (running = new AbortController());
    signal.addEventListener("abort", () => mine.abort());
    showChosen(local.name, "uploading", true);
    try {
      const uploaded = await upload(local, (share) => progress(share, local.size), mine.signal);
      if (running === mine) accept(uploaded);
    } catch (failure) {
      if (mine.signal.aborted) return;
      clear();
      if (failure instanceof Unreachable) {
        complain(`The server went away while ${local.name} was uploaded. It is sent again when the server is back.`);
        connection.addEventListener("up", () => file || running || send(local), { once: true, signal });
      } else if (failure instanceof Refused) complain(failure.message);
      else throw failure;
    }
  }

  function progress(share, size) {
    bar.value = share;
    setText(note, share < 1 ? `${Math.floor(share * 100)} % of ${bytes(size)}` : "being stored");
  }

  function accept(uploaded) {
    running = null;
    complain("");
    file = { id: uploaded.id, filename: uploaded.filename, bytes: uploaded.bytes };
    showChosen(file.filename, bytes(file.bytes), false);
    onChange(file);
  }

  function showChosen(text, about, uploading) {
    const hadFocus = zone.contains(document.activeElement);
    zone.hidden = true;
    chosen.hidden = false;
    bar.hidden = !uploading;
    bar.value = 0;
    setText(name, text);
    setText(note, about);
    if (hadFocus) remove.focus();
  }

  function clear() {
    const hadFocus = document.activeElement === remove;
    running?.abort();
    running = null;
    file = null;
    before.value = "";
    zone.hidden = false;
    chosen.hidden = true;
    if (hadFocus) picker.focus();
    onChange(null);
  }

  function complain(text) {
    setText(error, text);
    error.hidden = !text;
  }

  let offered = [];

  /** Files that are on the server already. */
  function offer(files) {
    offered = files;
    beforeLine.hidden = files.length === 0;
    before.replaceChildren(
      h("option", { value: "" }, "Choose…"),
      ...files.map((each) => h("option", { value: each.id }, `${each.filename}, ${bytes(each.bytes)}, ${ago(each.created_at)}`)),
    );
  }

  return { element, file: () => file, set: (known) => (known ? accept(known) : clear()), offer, complain };
}

/** The files that a job can be trained on, newest first. */
export async function uploadedBefore(signal) {
  return (await api.files(signal)).data.filter((file) => file.purpose === "fine-tune");
}
