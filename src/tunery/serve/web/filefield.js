// A place for one file of examples: drop it, pick it, or take one uploaded before. It uploads at once.

import { Refused, Unreachable, upload } from "./api.js";
import { connection } from "./connection.js";
import { freshId, h, setText } from "./dom.js";
import { ago, bytes } from "./format.js";

const ENDINGS = ".jsonl,.json,.csv,.tsv,.txt,.parquet";

export class FileField {
  /**
   * @param label, hint what the file is for; @param signal ends an upload
   * @param limit bytes that the server takes; @param onChange called once a file is on the server or taken away
   */
  constructor({ label, hint, signal, limit, onChange }) {
    Object.assign(this, { signal, limit, onChange });
    this.file = null; // {id, filename, bytes}, as the server knows it
    this.running = null; // AbortController of an upload under way
    this.offered = [];
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    const legend = h("legend", {}, label);
    this.element = h(
      "fieldset",
      { class: "file" },
      legend,
      this.buildZone(label, hint),
      this.buildChosen(label),
      this.error,
    );
  }

  buildZone(label, hint) {
    const id = freshId("file");
    this.picker = h("input", {
      type: "file",
      id,
      class: "unseen",
      accept: ENDINGS,
      "aria-describedby": `${id}-hint`,
      change: () => this.picked(),
    });
    this.before = h("select", { id: `${id}-before`, change: () => this.takeOld() });
    const beforeLabel = h("label", { for: `${id}-before` }, "or one uploaded before");
    this.beforeLine = h("p", { class: "before", hidden: true }, beforeLabel, this.before);
    const button = h(
      "label",
      { for: id, class: "button" },
      "Choose a file",
      h("span", { class: "unseen" }, `, ${label}`),
    );
    this.zone = h(
      "div",
      { class: "zone" },
      this.picker,
      h("p", {}, button, h("span", { class: "or-drop" }, " or drop it here")),
      h("p", { class: "note", id: `${id}-hint` }, hint),
      this.beforeLine,
    );
    const over = (event, inside) => {
      event.preventDefault();
      this.zone.classList.toggle("over", inside);
    };
    for (const kind of ["dragenter", "dragover"]) this.zone.addEventListener(kind, (event) => over(event, true));
    for (const kind of ["dragleave", "drop"]) this.zone.addEventListener(kind, (event) => over(event, false));
    this.zone.addEventListener("drop", ({ dataTransfer }) => dataTransfer.files[0] && this.send(dataTransfer.files[0]));
    return this.zone;
  }

  buildChosen(label) {
    this.name = h("span", { class: "filename" });
    this.note = h("span", { class: "note" });
    this.remove = h("button", { type: "button", class: "quiet", click: () => this.clear() }, "Remove");
    this.bar = h("progress", { max: 1, value: 0, "aria-label": `Upload of the ${label.toLowerCase()}` });
    this.chosen = h("div", { class: "chosen", hidden: true }, h("p", {}, this.name, this.note, this.remove), this.bar);
    return this.chosen;
  }

  picked() {
    if (this.picker.files[0]) this.send(this.picker.files[0]);
    this.picker.value = ""; // the same file, fixed, can be picked again
  }

  takeOld() {
    const found = this.offered.find((each) => each.id === this.before.value);
    if (found) this.accept(found);
  }

  async send(local) {
    this.complain("");
    if (this.limit && local.size > this.limit) {
      this.complain(`${local.name} has ${bytes(local.size)}; the server takes up to ${bytes(this.limit)}.`);
      return;
    }
    this.running?.abort();
    const mine = (this.running = new AbortController());
    this.show(local.name, "uploading", true);
    try {
      const both = AbortSignal.any([this.signal, mine.signal]);
      const uploaded = await upload(local, (share) => this.progress(share, local.size), both);
      if (this.running === mine) this.accept(uploaded);
    } catch (failure) {
      if (mine.signal.aborted || this.signal.aborted) return;
      this.clear();
      this.failed(failure, local);
    }
  }

  failed(failure, local) {
    if (failure instanceof Unreachable) {
      this.complain(`The server went away while ${local.name} was uploaded. It is sent again when the server is back.`);
      const again = () => this.file || this.running || this.send(local);
      connection.addEventListener("up", again, { once: true, signal: this.signal });
    } else if (failure instanceof Refused) this.complain(failure.message);
    else throw failure;
  }

  progress(share, size) {
    this.bar.value = share;
    setText(this.note, share < 1 ? `${Math.floor(share * 100)} % of ${bytes(size)}` : "being stored");
  }

  /** Take a file that the server has. */
  accept({ id, filename, bytes: size }) {
    this.running = null;
    this.complain("");
    this.file = { id, filename, bytes: size };
    this.show(filename, bytes(size), false);
    this.onChange();
  }

  show(name, about, uploading) {
    const hadFocus = this.zone.contains(document.activeElement);
    this.zone.hidden = true;
    this.chosen.hidden = false;
    this.bar.hidden = !uploading;
    this.bar.value = 0;
    setText(this.name, name);
    setText(this.note, about);
    if (hadFocus) this.remove.focus();
  }

  clear() {
    const hadFocus = document.activeElement === this.remove;
    this.running?.abort();
    this.running = null;
    this.file = null;
    this.before.value = "";
    this.zone.hidden = false;
    this.chosen.hidden = true;
    if (hadFocus) this.picker.focus();
    this.onChange();
  }

  complain(text) {
    setText(this.error, text);
    this.error.hidden = !text;
  }

  /** Files that are on the server already. */
  offer(files) {
    this.offered = files;
    this.beforeLine.hidden = files.length === 0;
    const options = files.map((each) =>
      h("option", { value: each.id }, `${each.filename}, ${bytes(each.bytes)}, ${ago(each.created_at)}`),
    );
    this.before.replaceChildren(h("option", { value: "" }, "Choose…"), ...options);
  }
}
