// The events and the checkpoints of a job.

import { api } from "./api.js";
import { announce, copyButton, h, reconcile } from "./dom.js";
import { loss, moment, percent, whole } from "./format.js";

const KEPT = 2000; // more are fetched on request, and a long list would be slow to draw
const PAGES_AT_ONCE = 10;
const ENOUGH = 8; // messages that a first look shows; there may be a page of steps between two of them

/** Events, newest first. */
export class EventsView {
  constructor(id) {
    this.id = id;
    this.events = [];
    this.more = false; // older ones on the server
    this.list = h("ol", { class: "events", tabindex: 0, "aria-label": "Events, newest first" });
    this.older = h("button", { type: "button", class: "quiet", hidden: true }, "Show older events");
    this.older.addEventListener("click", () => this.showOlder());
    this.steps = h("input", { type: "checkbox", id: "show-steps", change: () => this.draw() });
    const choice = h("label", { for: "show-steps", class: "check" }, this.steps, "Each step");
    const head = h("div", { class: "card-head" }, h("h2", { id: "events-title" }, "Events"), choice);
    this.element = h("section", { class: "card", "aria-labelledby": "events-title" }, head, this.list, this.older);
  }

  /** Fetch what is new. @returns whether there is anything */
  async refresh(signal) {
    const first = !this.events.length;
    const fresh = await this.fetchNew(signal);
    if (!fresh.length) return false;
    if (!first) speak(fresh);
    this.events = [...fresh, ...this.events];
    for (let count = 1; this.more && this.messages().length < ENOUGH && count < PAGES_AT_ONCE; count += 1) {
      await this.fetchOlder(signal);
    }
    if (this.events.length > KEPT) {
      this.events = this.events.slice(0, KEPT);
      this.more = true;
    }
    this.draw();
    return true;
  }

  /** After a sleep there may be more than a page of new ones: go back until one that is known. */
  async fetchNew(signal) {
    const known = new Set(this.events.map((event) => event.id));
    const fresh = [];
    let after;
    for (let count = 0; count < PAGES_AT_ONCE; count += 1) {
      const page = await api.events(this.id, { after }, signal);
      fresh.push(...page.data.filter((event) => !known.has(event.id)));
      if (page.data.some((event) => known.has(event.id))) return fresh;
      this.more = page.has_more;
      if (!known.size || !page.has_more) return fresh;
      after = page.data.at(-1).id;
    }
    this.events = []; // too far behind to be joined; older ones can be asked for
    return fresh;
  }

  async fetchOlder(signal) {
    const page = await api.events(this.id, { after: this.events.at(-1).id }, signal);
    const known = new Set(this.events.map((event) => event.id));
    this.events = [...this.events, ...page.data.filter((event) => !known.has(event.id))];
    this.more = page.has_more;
  }

  async showOlder() {
    const before = this.shown().length;
    for (let count = 0; this.more && this.shown().length === before && count < PAGES_AT_ONCE; count += 1) {
      await this.fetchOlder();
    }
    this.draw();
  }

  messages() {
    return this.events.filter((event) => event.type !== "metrics");
  }

  shown() {
    return this.steps.checked ? this.events : this.messages();
  }

  draw() {
    reconcile(this.list, this.shown(), (event) => event.id, makeEvent);
    this.older.hidden = !this.more;
  }
}

function speak(fresh) {
  const told = fresh.filter((event) => event.type !== "metrics" || event.level !== "info");
  const texts = told.reverse().map((event) => event.message);
  if (texts.length) announce(texts.join(". "));
}

const LEVELS = { warn: "Warning", warning: "Warning", error: "Error" };

function makeEvent(event) {
  const level = LEVELS[event.level];
  return h(
    "li",
    { class: level ? `level-${event.level}` : event.type },
    h("time", { datetime: new Date(event.created_at * 1000).toISOString() }, moment(event.created_at)),
    h("span", { class: "text" }, level && h("b", {}, `${level}: `), event.message),
  );
}

/** Checkpoints, newest first: {element, refresh(signal)}. */
export function checkpointsView(id) {
  const rows = h("tbody", {});
  const head = ["Step", "Training loss", "Validation loss", "Token accuracy"].map((name) =>
    h("th", { scope: "col", class: "n" }, name),
  );
  const table = h(
    "table",
    {},
    h("thead", {}, h("tr", {}, head, h("th", { scope: "col" }, h("span", { class: "unseen" }, "Actions")))),
    rows,
  );
  const none = h("p", { class: "note" }, "No checkpoint yet.");
  const element = h(
    "section",
    { class: "card", "aria-labelledby": "checkpoints-title" },
    h("div", { class: "card-head" }, h("h2", { id: "checkpoints-title" }, "Checkpoints")),
    none,
    h("div", { class: "scroll" }, table),
  );
  table.hidden = true;

  async function refresh(signal, base) {
    const { data } = await api.checkpoints(id, {}, signal);
    none.hidden = data.length > 0;
    table.hidden = data.length === 0;
    const losses = data.map((each) => validLoss(each.metrics)).filter((value) => typeof value === "number");
    const best = losses.length > 1 ? Math.min(...losses) : null;
    reconcile(
      rows,
      data,
      (checkpoint) => checkpoint.id,
      (checkpoint) => makeCheckpoint(checkpoint, base),
      (row, checkpoint) => (row.best.hidden = best === null || validLoss(checkpoint.metrics) !== best),
    );
  }

  return { element, refresh };
}

const validLoss = (metrics) => metrics.full_valid_loss ?? metrics.valid_loss;

function makeCheckpoint(checkpoint, base) {
  const { metrics, step_number: step, fine_tuned_model_checkpoint: model } = checkpoint;
  const accuracy =
    metrics.full_valid_mean_token_accuracy ?? metrics.valid_mean_token_accuracy ?? metrics.train_mean_token_accuracy;
  const best = h("span", { class: "best", title: "The lowest validation loss of all checkpoints" }, "best");
  const row = h(
    "tr",
    {},
    h("th", { scope: "row", class: "n" }, whole(step)),
    h("td", { class: "n" }, loss(metrics.train_loss)),
    h("td", { class: "n" }, best, loss(validLoss(metrics))),
    h("td", { class: "n" }, percent(accuracy)),
    h(
      "td",
      { class: "buttons" },
      h("a", { class: "button quiet", href: chatLink(base, model), "aria-label": `Chat with step ${step}` }, "Chat"),
      named(copyButton(model, "Copy name"), `Copy the name of step ${step}`),
    ),
  );
  row.best = best;
  return row;
}

function named(button, label) {
  button.title = label;
  return button;
}

/** Where base and tuned are set side by side. */
export function chatLink(base, tuned) {
  return `#/chat?${new URLSearchParams({ base, tuned })}`;
}
