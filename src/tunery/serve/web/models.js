// Fine-tuned models: what they come from, how large they are; chat, download, delete.

import { api, paths } from "./api.js";
import { announce, copyButton, h, problemBox, reconcile } from "./dom.js";
import { bytes, day, shortModel } from "./format.js";
import { chatLink } from "./history.js";
import { confirmed, emptyState, fileLink, message, pageHead } from "./parts.js";
import { poll } from "./poll.js";

export const title = "Models";

export function show(main, { signal }) {
  const rows = h("ul", { class: "models" });
  const body = h("div", {}, h("p", { class: "note" }, "Loading…"));
  const bases = h("section", { class: "bases", "aria-labelledby": "bases-title" });
  main.append(pageHead("Models"), body, bases);

  const refresh = poll(async () => {
    const { data } = await api.models(signal);
    drawTuned(data.filter((model) => model.kind === "fine-tuned").sort((one, other) => other.created - one.created));
    drawBases(data.filter((model) => model.kind !== "fine-tuned"));
    return 10_000;
  }, signal, (error) => body.replaceChildren(problemBox("The models cannot be shown", error.message)));

  function drawTuned(models) {
    if (!models.length) {
      const text = "A job that succeeds leaves its adapter here, under a name that starts with ft:.";
      body.replaceChildren(emptyState("No fine-tuned models yet", text, h("a", { class: "button primary", href: "#/new" }, "New job")));
      return;
    }
    if (rows.parentNode !== body) body.replaceChildren(rows);
    reconcile(rows, models, (model) => model.id, makeRow);
  }

  function makeRow(model) {
    const name = shortModel(model.id);
    const about = [
      ["Base", model.base],
      ["Created", day(model.created)],
      ["Size", bytes(model.bytes)],
      ["Job", model.job && h("a", { href: `#/jobs/${model.job}` }, model.job)],
    ].filter(([, value]) => value);
    const remove = h("button", { type: "button", class: "danger", "aria-label": `Delete ${name}`, click: () => drop(model, name) }, "Delete");
    return h(
      "li",
      {},
      h("div", { class: "model-head" }, h("h2", {}, name), h("p", { class: "id" }, h("code", {}, model.id), copyButton(model.id))),
      h("dl", { class: "inline" }, about.map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value)))),
      h(
        "div",
        { class: "actions" },
        h("a", { class: "button primary", href: chatLink(model.base, model.id), "aria-label": `Chat with ${name}` }, "Chat"),
        model.job && fileLink(paths.adapter(model.job), `${name.replaceAll(" ", "-")}-adapter.zip`, "Download", { class: "button", "aria-label": `Download ${name}` }),
        model.job && remove,
      ),
    );
  }

  async function drop(model, name) {
    const text = `${model.id} stops answering at once and its adapter is removed from the disk. The job and its curves stay.`;
    if (!(await confirmed(`Delete ${name}?`, text, "Delete"))) return;
    try {
      await api.deleteModel(model.id);
      announce(`${name} deleted`);
      main.querySelector("h1").focus(); // the row that had the focus is gone
    } catch (error) {
      message("The model could not be deleted", error.message);
    }
    refresh();
  }

  let drawnBases = "";

  function drawBases(models) {
    const now = JSON.stringify(models);
    if (now === drawnBases) return;
    drawnBases = now;
    bases.replaceChildren(
      h("h2", { id: "bases-title" }, "Base models and aliases"),
      h(
        "ul",
        { class: "plain" },
        models.map((model) => {
          const item = h("li", {}, h("code", {}, model.id));
          if (model.kind === "alias") item.append(h("span", { class: "note" }, ` answers as ${model.base}`));
          return item;
        }),
      ),
    );
  }
}
