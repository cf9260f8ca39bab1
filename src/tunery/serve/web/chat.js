// Two models answer the same message side by side, each going on from its own answers.

import { answerView, newAnswer, stream } from "./answer.js";
import { api } from "./api.js";
import { announce, h, problemBox, setText } from "./dom.js";
import { shortModel } from "./format.js";
import { modelOptions } from "./modelselect.js";
import { emptyState, pageHead } from "./parts.js";
import { poll } from "./poll.js";

const STORED = "tunery.chat";
const NEWEST_JOBS = 10; // whose checkpoints are offered
const FRESH = { system: "", temperature: 0.7, max_tokens: 256, models: ["", ""], turns: [], text: "" };

export const title = "Chat";

export function show(main, { query, signal }) {
  const state = restored();
  const holder = h("div", { class: "chat" }, h("p", { class: "note" }, "Loading…"));
  main.append(holder);
  let view = null;
  poll(async () => {
    const [server, models] = await Promise.all([api.server(signal), api.models(signal)]);
    const all = [...models.data, ...(await checkpoints(signal))];
    if (!view) {
      choose(state, query, server, models.data);
      history.replaceState(null, "", "#/chat"); // a refresh keeps what is chosen now, not what the link said
      view = chatView(state, signal);
      holder.replaceChildren(view.element);
      view.restore();
    }
    view.offer(all);
    return 30_000;
  }, signal, (error) => view || holder.replaceChildren(problemBox("The chat cannot be shown", error.message)));
}

// -------------------------------------------------------------------------- what is kept in the tab

function restored() {
  const state = { ...FRESH, ...JSON.parse(sessionStorage.getItem(STORED) ?? "{}") };
  for (const answer of state.turns.flatMap((turn) => turn.answers)) if (answer.state === "streaming") answer.state = "stopped";
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
  const newest = models.filter((model) => model.kind === "fine-tuned").sort((one, other) => other.created - one.created)[0];
  const base = query.get("base") ?? state.models[0] ?? "";
  state.models = [
    base || (newest?.base ?? server.default_model),
    query.get("tuned") ?? (state.models[0] ? state.models[1] : (newest?.id ?? "")),
  ];
}

async function checkpoints(signal) {
  const { data: jobs } = await api.jobs({ limit: NEWEST_JOBS }, signal);
  const lists = await Promise.all(jobs.filter((job) => job.status !== "failed").map((job) => api.checkpoints(job.id, {}, signal)));
  return lists.flatMap((list) => list.data).map((each) => ({ id: each.fine_tuned_model_checkpoint, kind: "checkpoint" }));
}

// -------------------------------------------------------------------------- the view

function chatView(state, signal) {
  const selects = [0, 1].map((side) => {
    const select = h("select", { id: `model-${side}`, change: () => pick(side, select.value) });
    return select;
  });
  const names = ["First model", "Second model"];
  const sampling = samplingFields(state, () => store(state));
  const turns = h("div", { class: "turns" });
  const nothing = emptyState("Ask both the same", "Your message goes to both models at once. Each goes on from its own answers.");
  const field = h("textarea", { id: "message", rows: 1, placeholder: "Message", "aria-label": "Message", enterkeyhint: "send", input: grow, keydown: keys });
  const send = h("button", { type: "submit", class: "primary" }, "Send");
  const stop = h("button", { type: "button", hidden: true, click: halt }, "Stop");
  const clear = h("button", { type: "button", click: startAfresh }, "New conversation");
  const element = h(
    "div",
    {},
    pageHead("Chat", { actions: clear }),
    h("div", { class: "sides" }, selects.map((select, side) => h("div", { class: "field" }, h("label", { for: select.id }, names[side]), select))),
    sampling.element,
    h("div", { class: "talk" }, nothing, turns),
    h("form", { class: "composer", submit: (event) => (event.preventDefault(), ask()) }, field, send, stop),
  );
  let running = null; // AbortController of the answers under way
  signal.addEventListener("abort", halt);
  addEventListener("pagehide", () => store(state), { signal });

  function pick(side, id) {
    state.models[side] = id;
    store(state);
  }

  function offer(models) {
    selects.forEach((select, side) => {
      const chosen = state.models[side];
      const options = modelOptions(models);
      if (side === 1) options.unshift(h("option", { value: "" }, "none"));
      if (chosen && !models.some((model) => model.id === chosen)) options.unshift(h("option", { value: chosen }, `${shortModel(chosen)} (not on the server)`));
      const now = JSON.stringify([models.map((model) => model.id), chosen]);
      if (select.dataset.offered === now) return; // an open menu would close
      select.dataset.offered = now;
      select.replaceChildren(...options);
      select.value = chosen;
    });
  }

  function restore() {
    for (const turn of state.turns) addTurn(turn);
    field.value = state.text;
    grow();
    if (state.turns.length) scrollTo(0, document.documentElement.scrollHeight);
  }

  function grow() {
    state.text = field.value;
    store(state);
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight / 3)}px`;
  }

  function keys(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) ask();
  }

  async function ask() {
    const text = field.value.trim();
    if (!text || running || !sampling.check()) return;
    const turn = { text, answers: [...new Set(state.models.filter(Boolean))].map(newAnswer) };
    state.turns.push(turn);
    field.value = "";
    grow();
    await run(turn, turn.answers, addTurn(turn));
  }

  /** Let `answers` of the last turn be answered at the same time. */
  async function run(turn, answers, views) {
    running = new AbortController();
    setBusy(true);
    const redraw = throttled(() => {
      const atEnd = innerHeight + scrollY > document.documentElement.scrollHeight - 60;
      views.forEach((view) => view.update(true));
      if (atEnd) scrollTo(0, document.documentElement.scrollHeight);
    });
    scrollTo(0, document.documentElement.scrollHeight);
    try {
      await Promise.all(answers.map(async (answer) => {
        await stream(answer, conversation(turn, answer), sampling.options(), redraw, running.signal);
        store(state);
        announce(`${shortModel(answer.model)}: ${answer.text || answer.note}`);
      }));
    } finally {
      running = null;
      setBusy(false);
      redraw();
      store(state);
    }
  }

  /** The messages that `answer` answers: its side's own answers, as far as they came. */
  function conversation(turn, answer) {
    const side = turn.answers.indexOf(answer);
    const messages = state.system ? [{ role: "system", content: state.system }] : [];
    for (const earlier of state.turns) {
      const question = { role: "user", content: earlier.text };
      if (earlier === turn) return [...messages, question];
      const own = earlier.answers.find((each) => each.model === answer.model) ?? earlier.answers[side] ?? earlier.answers[0];
      if (own.text) messages.push(question, { role: "assistant", content: own.text }); // else nothing came of it
    }
    return messages;
  }

  function addTurn(turn) {
    nothing.hidden = true;
    for (const button of turns.querySelectorAll(".answer button")) button.hidden = true; // only the last can be asked again
    const views = turn.answers.map((answer) => answerView(answer, () => !running && run(turn, [answer], views)));
    views.forEach((view) => view.update(turn === state.turns.at(-1)));
    turns.append(
      h(
        "article",
        { class: `turn${views.length === 1 ? " single" : ""}` },
        h("div", { class: "you" }, h("h2", {}, "You"), h("p", { class: "text" }, turn.text)),
        h("div", { class: "answers" }, views.map((view) => view.element)),
      ),
    );
    return views;
  }

  function setBusy(busy) {
    send.hidden = busy;
    stop.hidden = !busy;
    if (busy && document.activeElement === document.body) stop.focus();
    if (!busy && (document.activeElement === document.body || document.activeElement === stop)) field.focus();
  }

  function halt() {
    running?.abort();
  }

  function startAfresh() {
    halt();
    state.turns = [];
    turns.replaceChildren();
    nothing.hidden = false;
    store(state);
    field.focus();
  }

  return { element, offer, restore };
}

/** System message, temperature and the most tokens, folded away until they are wanted. */
function samplingFields(state, save) {
  const system = h("textarea", { id: "system", rows: 2, value: state.system, input: () => (state.system = system.value, changed()) });
  const temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: 0.1, value: state.temperature, input: changed });
  const most = h("input", { id: "max-tokens", type: "number", min: 1, max: 100_000, step: 1, value: state.max_tokens, input: changed });
  const summary = h("summary", {});
  const error = h("p", { class: "error", role: "alert", hidden: true });
  const element = h(
    "details",
    { class: "sampling" },
    summary,
    h("div", { class: "field wide" }, h("label", { for: "system" }, "System message"), system),
    h("div", { class: "field" }, h("label", { for: "temperature" }, "Temperature"), temperature),
    h("div", { class: "field" }, h("label", { for: "max-tokens" }, "Most tokens"), most),
    error,
  );

  function changed() {
    if (temperature.validity.valid && temperature.value) state.temperature = Number(temperature.value);
    if (most.validity.valid && most.value) state.max_tokens = Number(most.value);
    describe();
    save();
  }

  function describe() {
    const message = state.system ? "a system message" : "no system message";
    setText(summary, `Temperature ${state.temperature}, at most ${state.max_tokens} tokens, ${message}`);
  }

  function check() {
    const wrong = [temperature, most].find((input) => !input.validity.valid || !input.value);
    setText(error, wrong === temperature ? "Temperature: a number from 0 to 2." : "Most tokens: a whole number from 1.");
    error.hidden = !wrong;
    if (wrong) {
      element.open = true;
      wrong.focus();
    }
    return !wrong;
  }

  describe();
  return { element, check, options: () => ({ temperature: state.temperature, max_completion_tokens: state.max_tokens }) };
}

/** At most once a frame. */
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
