// Fine-tuned models: what they come from, how large they are; chat, download, delete.

import { api, paths } from "./api.js";
import { announce, copyButton, h, problemBox, reconcile } from "./dom.js";
import { bytes, day, shortModel } from "./format.js";
import { chatLink } from "./history.js";
import { confirmed, emptyState, fileLink, message, pageHead } from "./parts.js";
import { poll } from "./poll.js";

export const title = "Models";

export function show(main, { signal }) {
  const list = new ModelList(signal);
  main.append(pageHead(title), list.tuned, list.bases);
}

class ModelList {
  constructor(signal) {
    this.rows = h("ul", { class: "models", role: "list" });
    const text = "A job that succeeds leaves its adapter here, under a name that starts with ft:.";
    this.none = emptyState(
      "No fine-tuned models yet",
      text,
      h("a", { class: "button primary", href: "#/new" }, "New job"),
    );
    this.tuned = h("div", {}, h("p", { class: "note" }, "Loading…"));
    this.bases = h("section", { class: "bases", "aria-labelledby": "bases-title" });
    this.drawnBases = "";
    const trouble = (error) => this.tuned.replaceChildren(problemBox("The models cannot be shown", error.message));
    this.refresh = poll(() => this.load(signal), signal, trouble);
  }

  async load(signal) {
    const { data } = await api.models(signal);
    const tuned = data.filter((model) => model.kind === "fine-tuned");
    this.drawTuned(tuned.sort((one, other) => other.created - one.created));
    this.drawBases(data.filter((model) => model.kind !== "fine-tuned"));
    return 10_000;
  }

  drawTuned(models) {
    const shown = models.length ? this.rows : this.none;
    if (shown.parentNode !== this.tuned) this.tuned.replaceChildren(shown);
    reconcile(
      this.rows,
      models,
      (model) => model.id,
      (model) => makeRow(model, () => this.drop(model)),
    );
  }

  drawBases(models) {
    const now = JSON.stringify(models);
    if (now === this.drawnBases) return;
    this.drawnBases = now;
    const items = models.map(({ id, kind, base }) =>
      h("li", {}, h("code", {}, id), kind === "alias" && h("span", { class: "note" }, ` answers as ${base}`)),
    );
    const heading = h("h2", { id: "bases-title" }, "Base models and aliases");
    this.bases.replaceChildren(heading, h("ul", { class: "plain", role: "list" }, items));
  }

  async drop(model) {
    const name = shortModel(model.id);
    const text = `${model.id} stops answering, and its adapter is removed from the disk. The job and its curves stay.`;
    if (!(await confirmed(`Delete ${name}?`, text, "Delete"))) return;
    try {
      await api.deleteModel(model.id);
      announce(`${name} deleted`);
      document.querySelector("h1").focus(); // the row that had the focus is gone
    } catch (error) {
      message("The model could not be deleted", error.message);
    }
    this.refresh();
  }
}

function makeRow(model, drop) {
  const { id, base, job, created, bytes: size } = model;
  const name = shortModel(id);
  const about = [
    ["Base", base],
    ["Created", day(created)],
    ["Size", bytes(size)],
    ["Job", job && h("a", { href: `#/jobs/${job}` }, job)],
  ].filter(([, value]) => value);
  const file = `${name.replaceAll(" ", "-")}-adapter.zip`;
  const buttons = [
    h("a", { class: "button primary", href: chatLink(base, id), "aria-label": `Chat with ${name}` }, "Chat"),
    job && fileLink(paths.adapter(job), file, "Download", { class: "button", "aria-label": `Download ${name}` }),
    // what came with the server's start (--adapter) is not ours to delete
    job && h("button", { type: "button", class: "danger", "aria-label": `Delete ${name}`, click: drop }, "Delete"),
  ];
  return h(
    "li",
    {},
    h("h2", {}, name),
    h("p", { class: "id" }, h("code", {}, id), copyButton(id)),
    h(
      "dl",
      { class: "inline" },
      about.map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value))),
    ),
    h("div", { class: "actions" }, buttons),
  );
}
