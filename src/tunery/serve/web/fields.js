// The fields of the form for a new job that are not files: a text, a number or auto, the method.

import { freshId, h, setText } from "./dom.js";

/** Hyperparameters, with the limits that OpenAI's API sets. */
export const NUMBERS = {
  n_epochs: { name: "Epochs", min: 1, max: 50, whole: true, hint: "1 to 50" },
  batch_size: { name: "Batch size", min: 1, max: 256, whole: true, hint: "1 to 256" },
  learning_rate_multiplier: { name: "Learning-rate multiplier", above: 0, hint: "above 0" },
  beta: { name: "Beta", above: 0, max: 2, hint: "above 0, up to 2", only: "dpo" },
};

/** A line of text with its name, a hint and a place for what is wrong with it. */
export class TextField {
  constructor(id, name, hint, props) {
    this.input = h("input", {
      id,
      type: "text",
      autocomplete: "off",
      spellcheck: "false",
      "aria-describedby": `${id}-hint ${id}-error`,
      ...props,
    });
    this.error = h("p", { class: "error", id: `${id}-error`, role: "alert", hidden: true });
    this.element = h(
      "div",
      { class: "field" },
      h("label", { for: id }, name),
      this.input,
      h("p", { class: "note", id: `${id}-hint` }, hint),
      this.error,
    );
  }

  get value() {
    return this.input.value.trim();
  }

  set value(text) {
    this.input.value = text;
  }

  /** @returns whether the value fits; if not, says so and goes there */
  check(pattern, text) {
    const fits = this.complain(pattern.test(this.value) ? "" : text);
    if (!fits) this.input.focus();
    return fits;
  }

  complain(text) {
    setText(this.error, text);
    this.error.hidden = !text;
    this.input.setAttribute("aria-invalid", String(Boolean(text)));
    return !text;
  }
}

/** A number, or nothing for auto; once the files are checked it says what auto comes to. */
export class NumberField extends TextField {
  constructor(key, change) {
    const rule = NUMBERS[key];
    super(freshId(key), rule.name, rule.hint, { placeholder: "auto", inputmode: "decimal", change });
    this.key = key;
    this.rule = rule;
  }

  fits() {
    const { min = -Infinity, max = Infinity, above = -Infinity, whole, hint } = this.rule;
    const number = Number(this.value);
    const inside = number >= min && number <= max && number > above && (!whole || Number.isInteger(number));
    const good = this.value === "" || inside; // not a number is not inside
    return this.complain(good ? "" : `${whole ? "A whole number" : "A number"}, ${hint}.`);
  }

  settle(number) {
    if (number !== undefined) this.input.placeholder = `auto: ${number}`;
  }
}

const METHODS = [
  ["supervised", "Supervised", "examples of good answers"],
  ["dpo", "DPO", "pairs of a better and a worse answer"],
];

/** Supervised or DPO. */
export class MethodField {
  constructor(change) {
    this.inputs = METHODS.map(([value]) =>
      h("input", {
        type: "radio",
        name: "method",
        id: `method-${value}`,
        value,
        checked: value === METHODS[0][0],
        change,
      }),
    );
    const labels = METHODS.map(([value, name, about], index) =>
      h(
        "label",
        { for: `method-${value}` },
        this.inputs[index],
        h("span", {}, h("b", {}, name), h("small", {}, about)),
      ),
    );
    this.element = h("fieldset", { class: "method" }, h("legend", {}, "Method"), labels);
  }

  get value() {
    return this.inputs.find((input) => input.checked).value;
  }

  set value(method) {
    for (const input of this.inputs) input.checked = input.value === method;
  }
}
