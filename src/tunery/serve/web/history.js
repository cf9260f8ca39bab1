// The events and the checkpoints of a job.

import { api } from "./api.js";
import { announce, copyButton, h, reconcile } from "./dom.js";
import { loss, moment, percent, whole } from "./format.js";

const KEPT = 2000; // more are fetched on request, and a long list would be slow to draw
const PAGES_AT_ONCE = 10;
const ENOUGH = 8; // messages that a first look shows; there may be a page of steps between two of them

/** Events, newest first: {element, refresh(signal) → whether there are new ones}. */
export function eventsView(id) {
  const list = h("ol", { class: "events", tabindex: 0, "aria-label": "Events, newest first" });
  const older = h("button", { type: "button", class: "quiet", hidden: true, click: showOlder }, "Show older events");
  const steps = h("input", { type: "checkbox", id: "show-steps", change: draw });
  const element = h(
    "section",
    { class: "card", "aria-labelledby": "events-title" },
    h("div", { class: "card-head" }, h("h2", { id: "events-title" }, "Events"), h("label", { for: "show-steps", class: "check" }, steps, "Each step")),
    list,
    older,
  );
  let events = [];
  let more = false;
  let first = true;

  async function refresh(signal) {
    const known = new Set(events.map((event) => event.id));
    let page = await api.events(id, {}, signal);
    const fresh = [];
    // After a sleep there may be more than a page of new ones: go back until the known ones.
    for (let count = 1; ; count += 1) {
      fresh.push(...page.data.filter((event) => !known.has(event.id)));
      const joined = !events.length || page.data.some((event) => known.has(event.id));
      if (!joined && page.has_more && count < PAGES_AT_ONCE) {
        page = await api.events(id, { after: page.data.at(-1).id }, signal);
        continue;
      }
      if (!joined && page.has_more) events = []; // too far behind to be worth joining
      if (!events.length) more = page.has_more;
      break;
    }
    if (!fresh.length) return false;
    if (!first) speak(fresh);
    first = false;
    events = [...fresh, ...events];
    for (let count = 1; more && messages().length < ENOUGH && count < PAGES_AT_ONCE; count += 1) await addOlder(signal);
    if (events.length > KEPT) {
      events = events.slice(0, KEPT);
      more = true;
    }
    draw();
    return true;
  }

  function speak(fresh) {
    const told = fresh.filter((event) => event.type !== "metrics" || event.level !== "info");
    if (told.length) announce(told.reverse().map((event) => event.message).join(". "));
  }

  async function addOlder(signal) {
    const page = await api.events(id, { after: events.at(-1).id }, signal);
    const known = new Set(events.map((event) => event.id));
    events = [...events, ...page.data.filter((event) => !known.has(event.id))];
    more = page.has_more;
  }

  async function showOlder() {
    const before = shown().length;
    for (let count = 0; more && shown().length === before && count < PAGES_AT_ONCE; count += 1) await addOlder();
    draw();
  }

  const messages = () => events.filter((event) => event.type !== "metrics");
  const shown = () => (steps.checked ? events : messages());

  function draw() {
    reconcile(list, shown(), (event) => event.id, makeEvent);
    older.hidden = !more;
  }

  return { element, refresh };
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
  const head = ["Step", "Training loss", "Validation loss", "Token accuracy"].map((name) => h("th", { scope: "col", class: "n" }, name));
  const table = h(
    "table",
    {},
    h("thead", {}, h("tr", {}, head, h("th", { scope: "col" }, h("span", { class: "unseen" }, "Actions")))),
    rows,
  );
  const none = h("p", { class: "note" }, "The first checkpoint comes with the first validation.");
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
  const accuracy = metrics.full_valid_mean_token_accuracy ?? metrics.valid_mean_token_accuracy ?? metrics.train_mean_token_accuracy;
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

