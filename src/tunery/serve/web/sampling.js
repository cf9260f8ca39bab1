// How the models of the chat answer: system message, temperature, the most tokens. Folded away until it is wanted.

import { h, setText } from "./dom.js";

export class Sampling {
  /** @param state holds system, temperature and max_tokens, and is kept up to date; @param onChange called after */
  constructor(state, onChange) {
    Object.assign(this, { state, onChange });
    const input = () => this.changed();
    const number = { type: "number", input };
    this.system = h("textarea", { id: "system", rows: 2, value: state.system, input });
    this.temperature = h("input", {
      id: "temperature",
      min: 0,
      max: 2,
      step: 0.1,
      value: state.temperature,
      ...number,
    });
    this.most = h("input", { id: "max-tokens", min: 1, max: 100_000, step: 1, value: state.max_tokens, ...number });
    this.summary = h("summary", {});
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.element = h(
      "details",
      { class: "sampling" },
      this.summary,
      h("div", { class: "field wide" }, h("label", { for: "system" }, "System message"), this.system),
      h("div", { class: "field" }, h("label", { for: "temperature" }, "Temperature"), this.temperature),
      h("div", { class: "field" }, h("label", { for: "max-tokens" }, "Most tokens"), this.most),
      this.error,
    );
    this.describe();
  }

  changed() {
    this.state.system = this.system.value;
    if (fits(this.temperature)) this.state.temperature = Number(this.temperature.value);
    if (fits(this.most)) this.state.max_tokens = Number(this.most.value);
    this.describe();
    this.onChange();
  }

  describe() {
    const { system, temperature, max_tokens: most } = this.state;
    const message = system ? "a system message" : "no system message";
    setText(this.summary, `Temperature ${temperature}, at most ${most} tokens, ${message}`);
  }

  /** @returns whether the numbers fit; if not, says so and goes there */
  check() {
    const wrong = [this.temperature, this.most].find((input) => !fits(input));
    const what =
      wrong === this.temperature ? "Temperature: a number from 0 to 2." : "Most tokens: a whole number from 1.";
    setText(this.error, what);
    this.error.hidden = !wrong;
    if (wrong) {
      this.element.open = true;
      wrong.focus();
    }
    return !wrong;
  }

  /** As the request has them. */
  options() {
    return { temperature: this.state.temperature, max_completion_tokens: this.state.max_tokens };
  }
}

const fits = (input) => input.value !== "" && input.validity.valid;
