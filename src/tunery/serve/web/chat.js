// Two models answer the same message side by side, each going on from its own answers.

import { answerView, newAnswer, stream } from "./answer.js";
import { api } from "./api.js";
import { announce, h, problemBox } from "./dom.js";
import { shortModel } from "./format.js";
import { modelOptions } from "./modelselect.js";
import { emptyState, pageHead } from "./parts.js";
import { poll } from "./poll.js";
import { Sampling } from "./sampling.js";

const STORED = "tunery.chat";
const NEWEST_JOBS = 10; // whose checkpoints are offered
const FRESH = { system: "", temperature: 0.7, max_tokens: 256, models: ["", ""], turns: [], text: "" };

export const title = "Chat";

export function show(main, { query, signal }) {
  const state = restored();
  const holder = h("div", { class: "chat" }, h("p", { class: "note" }, "Loading…"));
  main.append(holder);
  let view = null;
  poll(load, signal, (error) => view || holder.replaceChildren(problemBox("The chat cannot be shown", error.message)));

  async function load() {
    const [server, models] = await Promise.all([api.server(signal), api.models(signal)]);
    const all = [...models.data, ...(await checkpoints(signal))];
    if (!view) {
      choose(state, query, server, models.data);
      history.replaceState(null, "", "#/chat"); // a refresh keeps what is chosen now, not what the link said
      view = new ChatView(state, signal);
      holder.replaceChildren(view.element);
      view.restore();
    }
    view.offer(all);
    return 30_000;
  }
}

// -------------------------------------------------------------------------- what is kept in the tab

function restored() {
  const state = { ...structuredClone(FRESH), ...JSON.parse(sessionStorage.getItem(STORED) ?? "{}") };
  const answers = state.turns.flatMap((turn) => turn.answers);
  for (const answer of answers) if (answer.state === "streaming") answer.state = "stopped";
  return state;
}

function store(state) {
  try {
    sessionStorage.setItem(STORED, JSON.stringify(state));
  } catch {
    // full: the conversation goes on, and is not there after a refresh
  }
}

/** Which two models: those of the link, else those of before, else the base and the newest fine-tuned model. */
function choose(state, query, server, models) {
  const tuned = models.filter((model) => model.kind === "fine-tuned");
  const newest = tuned.sort((one, other) => other.created - one.created)[0];
  const [first, second] = state.models;
  state.models = [
    query.get("base") ?? (first || (newest?.base ?? server.default_model)),
    query.get("tuned") ?? (first ? second : (newest?.id ?? "")),
  ];
}

async function checkpoints(signal) {
  const { data } = await api.jobs({ limit: NEWEST_JOBS }, signal);
  const jobs = data.filter((job) => job.status !== "failed");
  const lists = await Promise.all(jobs.map((job) => api.checkpoints(job.id, {}, signal)));
  const all = lists.flatMap((list) => list.data);
  return all.map((each) => ({ id: each.fine_tuned_model_checkpoint, kind: "checkpoint" }));
}

// -------------------------------------------------------------------------- the view

class ChatView {
  constructor(state, signal) {
    this.state = state;
    this.running = null; // AbortController of the answers under way
    this.sampling = new Sampling(state, () => store(state));
    this.selects = [0, 1].map((side) => h("select", { id: `model-${side}`, change: () => this.pick(side) }));
    this.turns = h("div", { class: "turns" });
    const how = "Your message goes to both models at once. Each goes on from its own answers.";
    this.nothing = emptyState("Ask both the same", how);
    this.element = h("div", {}, this.head(), h("div", { class: "talk" }, this.nothing, this.turns), this.composer());
    signal.addEventListener("abort", () => this.halt());
    addEventListener("pagehide", () => store(state), { signal });
  }

  head() {
    const names = ["First model", "Second model"];
    const clear = h("button", { type: "button", click: () => this.startAfresh() }, "New conversation");
    const sides = this.selects.map((select, side) =>
      h("div", { class: "field" }, h("label", { for: select.id }, names[side]), select),
    );
    return [pageHead(title, { actions: clear }), h("div", { class: "sides" }, sides), this.sampling.element];
  }

  composer() {
    this.field = h("textarea", {
      id: "message",
      rows: 1,
      placeholder: "Message",
      "aria-label": "Message",
      enterkeyhint: "send",
      input: () => this.grow(),
      keydown: (event) => this.key(event),
    });
    this.send = h("button", { type: "submit", class: "primary" }, "Send");
    this.stop = h("button", { type: "button", hidden: true, click: () => this.halt() }, "Stop");
    const submit = (event) => {
      event.preventDefault();
      this.ask();
    };
    return h("form", { class: "composer", submit }, this.field, this.send, this.stop);
  }

  // ------------------------------------------------------------------------ models

  pick(side) {
    this.state.models[side] = this.selects[side].value;
    store(this.state);
  }

  /** Renew the lists of models, unless they are the same: an open menu would close. */
  offer(models) {
    this.selects.forEach((select, side) => {
      const chosen = this.state.models[side];
      const now = JSON.stringify([models.map((model) => model.id), chosen]);
      if (select.dataset.offered === now) return;
      select.dataset.offered = now;
      const options = modelOptions(models);
      if (side === 1) options.unshift(h("option", { value: "" }, "none"));
      if (chosen && !models.some((model) => model.id === chosen)) {
        options.unshift(h("option", { value: chosen }, `${shortModel(chosen)} (not on the server)`));
      }
      select.replaceChildren(...options);
      select.value = chosen;
    });
  }

  // ------------------------------------------------------------------------ messages

  restore() {
    for (const turn of this.state.turns) this.addTurn(turn);
    this.field.value = this.state.text;
    this.grow();
    if (this.state.turns.length) toTheEnd();
  }

  grow() {
    this.state.text = this.field.value;
    store(this.state);
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight + 2, innerHeight / 3)}px`;
  }

  key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.ask();
  }

  async ask() {
    const text = this.field.value.trim();
    if (!text || this.running || !this.sampling.check()) return;
    // one answer if both sides are the same model
    const turn = { text, answers: [...new Set(this.state.models.filter(Boolean))].map(newAnswer) };
    this.state.turns.push(turn);
    this.field.value = "";
    this.grow();
    await this.run(turn, turn.answers, this.addTurn(turn));
  }

  /** Let `answers` of the last turn be answered at the same time. */
  async run(turn, answers, views) {
    const { signal } = (this.running = new AbortController());
    this.setBusy(true);
    const redraw = throttled(() => {
      const atEnd = innerHeight + scrollY > document.documentElement.scrollHeight - 60;
      views.forEach((view) => view.update(true));
      if (atEnd) toTheEnd();
    });
    toTheEnd();
    try {
      await Promise.all(
        answers.map(async (answer) => {
          await stream(answer, this.conversation(turn, answer), this.sampling.options(), redraw, signal);
          announce(`${shortModel(answer.model)}: ${answer.text || answer.note}`);
        }),
      );
    } finally {
      this.running = null;
      this.setBusy(false);
      redraw();
      store(this.state);
    }
  }

  /** The messages that `answer` answers: its side's own answers, as far as they came. */
  conversation(turn, answer) {
    const side = turn.answers.indexOf(answer);
    const messages = this.state.system ? [{ role: "system", content: this.state.system }] : [];
    for (const earlier of this.state.turns) {
      const question = { role: "user", content: earlier.text };
      if (earlier === turn) return [...messages, question];
      const same = earlier.answers.find((each) => each.model === answer.model);
      const own = same ?? earlier.answers[side] ?? earlier.answers[0];
      if (own.text) messages.push(question, { role: "assistant", content: own.text }); // else nothing came of it
    }
    return messages;
  }

  addTurn(turn) {
    this.nothing.hidden = true;
    // only what the last turn has can be asked again
    for (const button of this.turns.querySelectorAll(".answer button")) button.hidden = true;
    const views = turn.answers.map((answer) =>
      answerView(answer, () => this.running || this.run(turn, [answer], views)),
    );
    for (const view of views) view.update(turn === this.state.turns.at(-1));
    const you = h("div", { class: "you" }, h("h2", {}, "You"), h("p", { class: "text" }, turn.text));
    const answers = h(
      "div",
      { class: "answers" },
      views.map((view) => view.element),
    );
    this.turns.append(h("article", { class: `turn${views.length === 1 ? " single" : ""}` }, you, answers));
    return views;
  }

  // ------------------------------------------------------------------------ stop and clear

  setBusy(busy) {
    this.send.hidden = busy;
    this.stop.hidden = !busy;
    const at = document.activeElement; // the body, if the button that had the focus was hidden
    if (busy && at === document.body) this.stop.focus();
    if (!busy && (at === document.body || at === this.stop)) this.field.focus();
  }

  halt() {
    this.running?.abort();
  }

  startAfresh() {
    this.halt();
    this.state.turns = [];
    this.turns.replaceChildren();
    this.nothing.hidden = false;
    store(this.state);
    this.field.focus();
  }
}

function toTheEnd() {
  scrollTo(0, document.documentElement.scrollHeight);
}

/** `action`, at most once a frame. */
function throttled(action) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      action();
    });
  };
}
