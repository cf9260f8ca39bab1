// What the server found in an uploaded file: its problems by line, or what would be trained. Nothing has run yet.

import { h } from "./dom.js";
import { duration, percent, plural, rate, whole } from "./format.js";

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
      { role: "row" }, // roles are said outright: the narrow layout makes blocks of the cells, which takes them away
      h("th", { scope: "row", role: "rowheader", class: "n" }, line ? whole(line) : "file"),
      h("td", { role: "cell", class: "path" }, h("code", {}, field)),
      h("td", { role: "cell", class: "what" }, message),
      h("td", { role: "cell", class: "fix" }, fix),
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
      h(
        "table",
        { class: "problems", role: "table" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            heads.map((head, index) => h("th", { scope: "col", class: index ? "" : "n" }, head)),
          ),
        ),
        h("tbody", {}, rows),
      ),
    ),
    cut && h("p", { class: "note" }, `These are the first ${whole(result.problems.length)}.`),
  );
}

function sound(result, filename) {
  const {
    rows,
    tokens,
    trained_tokens: trained,
    steps,
    seconds_estimate: seconds,
    hyperparameters: numbers = {},
  } = result;
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
    steps !== undefined && numbers.n_epochs && h("p", { class: "note plan" }, plan(numbers, unit)),
    result.notes?.length > 0 &&
      h(
        "ul",
        { class: "notes" },
        result.notes.map((note) => h("li", {}, note)),
      ),
    result.previews?.length > 0 && previews(result.previews),
  );
}

/** 3 epochs in batches of 12 rows, learning-rate multiplier 1 */
function plan({ n_epochs: epochs, batch_size: batch, learning_rate_multiplier: multiplier, beta }, unit) {
  const rest = [multiplier && `learning-rate multiplier ${rate(multiplier)}`, beta && `beta ${rate(beta)}`];
  return [`${plural(epochs, "epoch")} in batches of ${plural(batch, unit)}`, ...rest].filter(Boolean).join(", ");
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
