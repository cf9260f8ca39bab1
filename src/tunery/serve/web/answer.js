// One answer of a model: streamed into the page, asked again when the stream breaks, and kept as plain data.

import { Refused, Unreachable, streamChat } from "./api.js";
import { connection } from "./connection.js";
import { h, setText } from "./dom.js";
import { duration, plural, shortModel } from "./format.js";

const MOST_TRIES = 6;

/** A new answer, as it is kept in the tab: state is one of streaming, done, length, stopped, failed. */
export function newAnswer(model) {
  return { model, text: "", state: "streaming", note: "", tokens: null, first: null, seconds: null };
}

/**
 * Have `answer.model` answer, filling in `answer` as the text comes.
 * @param messages the conversation in OpenAI's form; @param options temperature, max_completion_tokens
 * @param onChange called on every change; @param signal ends it: the text so far stays
 */
export async function stream(answer, messages, options, onChange, signal) {
  for (let tries = 1; ; tries += 1) {
    const start = performance.now();
    Object.assign(answer, { text: "", state: "streaming", note: "", tokens: null, first: null });
    onChange();
    try {
      await read(answer, messages, options, onChange, signal, start);
      break;
    } catch (error) {
      if (signal.aborted) {
        answer.state = "stopped";
        break;
      }
      const busy = error instanceof Refused && error.status === 429;
      if (!(busy || error instanceof Unreachable)) {
        if (!(error instanceof Refused)) throw error;
        Object.assign(answer, { state: "failed", note: error.message });
        break;
      }
      if (tries === MOST_TRIES) {
        Object.assign(answer, { state: "failed", note: `${error.message} Tried ${MOST_TRIES} times.` });
        break;
      }
      answer.note = busy
        ? "The server is busy; asking again."
        : "The stream broke off; asking again when the server is back.";
      onChange();
      await (busy ? pause((error.retryAfter ?? tries) * 1000, signal) : back(signal));
      if (signal.aborted) {
        answer.state = "stopped";
        break;
      }
    }
  }
  onChange();
}

async function read(answer, messages, options, onChange, signal, start) {
  const calls = new Map();
  for await (const chunk of streamChat({ model: answer.model, messages, ...options }, signal)) {
    if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    for (const call of choice.delta?.tool_calls ?? []) gather(calls, call);
    if (choice.delta?.content) {
      answer.first ??= (performance.now() - start) / 1000;
      answer.text += choice.delta.content;
    }
    if (choice.finish_reason) answer.state = choice.finish_reason === "length" ? "length" : "done";
    onChange();
  }
  for (const { name, text } of calls.values()) answer.text += `${answer.text && "\n"}${name}(${text})`;
  if (answer.state === "streaming") answer.state = "done";
  answer.seconds = (performance.now() - start) / 1000;
}

/** Tool calls come in fragments; there are no tools in this chat, but a tuned model may call one all the same. */
function gather(calls, fragment) {
  const call = calls.get(fragment.index) ?? { name: "", text: "" };
  call.name += fragment.function?.name ?? "";
  call.text += fragment.function?.arguments ?? "";
  calls.set(fragment.index, call);
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** Resolves when the server answers again. */
function back(signal) {
  return new Promise((resolve) => {
    connection.addEventListener("up", resolve, { once: true });
    signal.addEventListener("abort", resolve, { once: true });
    setTimeout(resolve, 30_000); // it may have been this one stream only
  });
}

/** An answer on the page: {element, update()}. `again` is called when the reader asks for another try. */
export function answerView(answer, again) {
  const text = h("p", { class: "text" });
  const about = h("p", { class: "about" });
  const retry = h("button", { type: "button", class: "quiet", hidden: true, click: again }, "Ask again");
  const element = h(
    "section",
    { class: "answer", "aria-label": `Answer of ${shortModel(answer.model)}` },
    h("h3", { title: answer.model }, shortModel(answer.model)),
    text,
    about,
    retry,
  );

  function update(last) {
    setText(text, answer.text);
    element.dataset.state = answer.state;
    setText(about, describe(answer));
    retry.hidden = !(last && (answer.state === "failed" || answer.state === "stopped"));
  }

  return { element, update };
}

const milliseconds = (seconds) => `${Math.round(seconds * 1000)} ms`;

function describe({ state, note, text, tokens, first, seconds }) {
  if (state === "failed" || note) return note;
  if (state === "streaming") return text ? "" : "waiting for the first token";
  if (state === "stopped") return "stopped";
  const speed =
    tokens && seconds > first ? ` · ${(tokens / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} tokens/s` : "";
  const wait = first === null ? "" : ` · first after ${first < 1 ? milliseconds(first) : duration(first)}`;
  const parts = tokens === null ? "" : `${plural(tokens, "token")}${wait}${speed}`;
  return state === "length" ? `${parts}${parts && " · "}cut at the limit` : parts;
}
