// What the server found in an uploaded file: its problems by line, or what would be trained. Nothing has run yet.

import { h } from "./dom.js";
import { duration, percent, plural, rate, whole } from "./format.js";
import { facts } from "./parts.js";

/**
 * @param result of /api/files/{id}/check
 * @param short true: the problems alone, without the words on what to do next
 */
export function checkView(result, filename, { short = false } = {}) {
  return result.problems.length ? problems(result, filename, short) : sound(result, filename);
}

function problems(result, filename, short) {
  const total = result.problems_total ?? result.problems.length;
  const lines = new Set(result.problems.map((problem) => problem.line)).size;
  const cut = total > result.problems.length;
  const rows = result.problems.map(({ line, field, message, fix }) =>
    h(
      "tr",
      {},
      h("th", { scope: "row", class: "n" }, line ? whole(line) : "file"),
      h("td", { class: "path" }, h("code", {}, field)),
      h("td", { class: "what" }, message),
      h("td", { class: "fix" }, fix),
    ),
  );
  const heads = ["Line", "Field", "Problem", "What to do"];
  return h(
    "div",
    { class: "findings bad" },
    h("h3", {}, `${plural(total, "problem")} in ${filename}`, !cut && lines > 1 && `, on ${whole(lines)} lines`),
    !short && h("p", {}, "Nothing was started. Put these right and choose the file again."),
    h(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": `Problems in ${filename}` },
      h("table", { class: "problems" }, h("thead", {}, h("tr", {}, heads.map((head, index) => h("th", { scope: "col", class: index ? "" : "n" }, head)))), h("tbody", {}, rows)),
    ),
    cut && h("p", { class: "note" }, `These are the first ${whole(result.problems.length)}.`),
  );
}

function sound(result, filename) {
  const { rows, tokens, trained_tokens: trained, steps, seconds_estimate: seconds, hyperparameters: numbers = {} } = result;
  const unit = result.kind === "preference" ? "pair" : "row";
  return h(
    "div",
    { class: "findings good" },
    h("h3", {}, `No problems in ${filename}`),
    h(
      "dl",
      { class: "figures" },
      number(unit === "pair" ? "Pairs" : "Rows", whole(rows)),
      number("Tokens", whole(tokens)),
      number("Trained tokens", whole(trained), tokens ? percent(trained / tokens) : ""),
      steps !== undefined && number("Steps", whole(steps), seconds ? `about ${duration(seconds)}` : ""),
    ),
    steps !== undefined &&
      facts([
        ["Epochs", numbers.n_epochs && whole(numbers.n_epochs)],
        ["Batch size", numbers.batch_size && whole(numbers.batch_size)],
        ["Learning rate", numbers.learning_rate && rate(numbers.learning_rate)],
      ]),
    result.previews?.length > 0 && previews(result.previews),
  );
}

function number(name, value, note) {
  return h("div", { class: "figure" }, h("dt", {}, name), h("dd", {}, value, note && h("small", {}, note)));
}

function previews(list) {
  return h(
    "div",
    { class: "previews" },
    h("h3", {}, "What the model sees"),
    h("p", { class: "note" }, "The ", h("mark", {}, "underlined"), " tokens are trained; the others are only read."),
    list.map((preview) => {
      const name = `Line ${whole(preview.line)}${preview.title ? `, ${preview.title}` : ""}`;
      const text = preview.pieces.map((piece) => (piece.trained ? h("mark", {}, piece.text) : piece.text));
      return h(
        "figure",
        { class: "preview" },
        h("figcaption", {}, name),
        h("p", { class: "text", tabindex: 0, role: "region", "aria-label": `${name}, as the model sees it` }, text),
      );
    }),
  );
}
