// A new job: model, files, method, numbers; what the files hold; start.

import { Refused, api } from "./api.js";
import { checkView } from "./check.js";
import { connection } from "./connection.js";
import { announce, freshId, h, setText } from "./dom.js";
import { plural } from "./format.js";
import { fileField, uploadedBefore } from "./filefield.js";
import { emptyState, pageHead } from "./parts.js";
import { modelOptions } from "./modelselect.js";
import { poll } from "./poll.js";

const DRAFT = "tunery.draft";
const NUMBERS = {
  n_epochs: { name: "Epochs", min: 1, max: 50, step: 1, hint: "1 to 50" },
  batch_size: { name: "Batch size", min: 1, max: 256, step: 1, hint: "1 to 256" },
  learning_rate_multiplier: { name: "Learning-rate multiplier", above: 0, step: "any", hint: "above 0" },
  beta: { name: "Beta", above: 0, max: 2, step: "any", hint: "above 0, up to 2", only: "dpo" },
};

export const title = "New job";

export function show(main, context) {
  const { signal } = context;
  const holder = h("div", {}, h("p", { class: "note" }, "Loading…"));
  main.append(pageHead("New job"), holder);
  let started = false;
  // The form is drawn once; after that a wake-up only renews the lists it offers.
  poll(async () => {
    const [server, models, files] = await Promise.all([api.server(signal), api.models(signal), uploadedBefore(signal)]);
    if (!started) {
      started = true;
      const form = jobForm(server, models.data, context);
      form.offer(files);
      holder.replaceChildren(form.element);
      await form.restore(context.query);
    }
    return null;
  }, signal, (error) => started || holder.replaceChildren(emptyState("The form cannot be shown", error.message)));
}

function jobForm(server, models, { signal }) {
  const model = h("select", { id: "model", change: changed }, modelOptions(models));
  if (models.some((each) => each.id === server.default_model)) model.value = server.default_model;
  const upTo = () => server.limits?.upload_bytes;
  const training = fileField({ label: "Training file", hint: "JSON lines with messages (or prompt and completion); pairs for DPO. At least 10 rows.", signal, onChange: changed, limit: upTo });
  const validation = fileField({ label: "Validation file (optional)", hint: "Rows that are not trained, to measure the validation loss on.", signal, onChange: changed, limit: upTo });
  const method = methodChoice(changed);
  const numbers = Object.entries(NUMBERS).map(([key, rule]) => numberField(key, rule, changed));
  const suffix = textField("suffix", "Name", "goes into the model's name; letters, digits, - or _", { maxlength: 64, placeholder: "none" });
  const seed = textField("seed", "Seed", "same seed, same run", { inputmode: "numeric", placeholder: "auto" });
  for (const each of [suffix, seed]) each.input.addEventListener("input", save);
  const result = h("section", { class: "card", "aria-label": "Check of the files", "aria-live": "polite" });
  const start = h("button", { type: "submit", class: "primary", "aria-describedby": "start-note" }, "Start");
  const note = h("p", { class: "note", id: "start-note" });
  const error = h("div", {});
  const element = h(
    "form",
    { class: "new-job", novalidate: true, submit },
    h(
      "div",
      { class: "halves" },
      h(
        "div",
        { class: "card" },
        h("div", { class: "field" }, h("label", { for: "model" }, "Model"), model),
        method.element,
        training.element,
        validation.element,
      ),
      h(
        "div",
        { class: "card" },
        h("h2", {}, "Settings"),
        suffix.element,
        h("div", { class: "numbers" }, numbers.map((each) => each.element), seed.element),
      ),
    ),
    result,
    error,
    h("div", { class: "start" }, start, note),
  );
  let check = null; // AbortController of the check under way
  let timer = 0;
  let ready = false;
  let restoring = false;
  let checkedFor = "";

  // ------------------------------------------------------------------------ check

  function changed() {
    if (restoring) return;
    save();
    for (const each of numbers) each.element.hidden = each.only ? each.only !== method.value() : false;
    const wanted = JSON.stringify([training.file()?.id, validation.file()?.id, request()]);
    if (wanted === checkedFor) return;
    checkedFor = wanted;
    clearTimeout(timer);
    check?.abort();
    setReady(false, training.file() ? "" : "Choose a training file first.");
    error.replaceChildren();
    if (!training.file()) return result.replaceChildren(h("p", { class: "note" }, "Once there is a training file, its problems or its first rows are shown here."));
    if (numbers.some((each) => !each.check())) return setReady(false, "One of the settings is out of range.");
    timer = setTimeout(runCheck, 350);
  }

  function request() {
    const chosen = numbers.filter((each) => !each.only || each.only === method.value());
    return { model: model.value, method: method.value(), ...Object.fromEntries(chosen.map((each) => [each.key, each.value()])) };
  }

  async function runCheck() {
    const mine = (check = new AbortController());
    const both = AbortSignal.any([signal, mine.signal]);
    result.setAttribute("aria-busy", "true");
    if (!result.querySelector(".findings")) result.replaceChildren(h("p", { class: "note" }, `Checking ${training.file().filename}…`));
    try {
      const files = [training.file(), validation.file()].filter(Boolean);
      const [trained, held] = await Promise.all(files.map((file) => api.checkFile(file.id, request(), both)));
      showCheck(trained, held);
    } catch (failure) {
      if (both.aborted) return;
      checkedFor = "";
      const retry = h("button", { type: "button", click: changed }, "Check again");
      result.replaceChildren(h("div", { class: "problem", role: "alert" }, h("h2", {}, "The files could not be checked"), h("p", {}, failure.message), retry));
      if (!(failure instanceof Refused)) setReady(false, "");
    } finally {
      if (check === mine) result.removeAttribute("aria-busy");
    }
  }

  function showCheck(trained, held) {
    const bad = [trained, held].filter((each) => each?.problems.length);
    const views = [];
    if (trained.problems.length || !bad.length) views.push(checkView(trained, training.file().filename));
    if (held?.problems.length) views.push(checkView(held, validation.file().filename));
    result.replaceChildren(...views);
    if (bad.length) {
      result.scrollIntoView({ block: "nearest" });
      const total = bad.reduce((sum, each) => sum + (each.problems_total ?? each.problems.length), 0);
      setReady(false, `${plural(total, "problem")} to put right first.`);
    } else {
      setReady(true, held ? `Validated on ${plural(held.rows, "row")} of ${validation.file().filename}.` : "");
      for (const each of numbers) each.settle(trained.hyperparameters?.[each.key]);
      announce("No problems found. The job can be started.");
    }
  }

  function setReady(yes, text) {
    ready = yes;
    start.setAttribute("aria-disabled", String(!yes)); // stays in the tab order, so that its reason can be read
    setText(note, text);
  }

  // ------------------------------------------------------------------------ start

  async function submit(event) {
    event.preventDefault();
    if (!ready) return announce(note.textContent);
    if (!seed.check(/^\d*$/, "A whole number, or nothing.") || !suffix.check(/^[\w.-]*$/, "Letters, digits, dots, - and _ only.")) return;
    setReady(false, "Starting…");
    try {
      const job = await api.createJob(body());
      sessionStorage.removeItem(DRAFT);
      location.hash = `#/jobs/${job.id}`;
    } catch (failure) {
      setReady(true, "");
      error.replaceChildren(h("div", { class: "problem", role: "alert" }, h("h2", {}, "The job was not started"), h("p", { class: "text" }, failure.message)));
    }
  }

  function body() {
    const kind = method.value();
    const { model: base, method: _, ...chosen } = request();
    const hyperparameters = Object.fromEntries(Object.entries(chosen).filter(([, value]) => value !== ""));
    return {
      model: base,
      training_file: training.file().id,
      validation_file: validation.file()?.id,
      suffix: suffix.input.value || undefined,
      seed: seed.input.value === "" ? undefined : Number(seed.input.value),
      method: { type: kind, [kind]: { hyperparameters } },
    };
  }

  // ------------------------------------------------------------------------ draft

  function save() {
    const draft = { ...request(), training: training.file(), validation: validation.file(), suffix: suffix.input.value, seed: seed.input.value };
    sessionStorage.setItem(DRAFT, JSON.stringify(draft));
  }

  /** What was filled in before a refresh, or the settings of the job named in the address. */
  async function restore(query) {
    const draft = query.get("from") ? await settingsOf(query.get("from"), signal) : JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
    restoring = true;
    if (draft) {
      if ([...model.options].some((option) => option.value === draft.model)) model.value = draft.model;
      method.set(draft.method ?? "supervised");
      for (const each of numbers) each.set(draft[each.key] ?? "");
      suffix.input.value = draft.suffix ?? "";
      seed.input.value = draft.seed ?? "";
      const known = await Promise.all([draft.training, draft.validation].map((file) => file && api.file(file.id, signal).catch(() => null)));
      if (known[0]) training.set(known[0]);
      if (known[1]) validation.set(known[1]);
    }
    restoring = false;
    changed();
  }

  // a check that the server was not there for
  connection.addEventListener("up", () => checkedFor === "" && changed(), { signal });

  function offer(files) {
    training.offer(files);
    validation.offer(files);
  }

  return { element, restore, offer };
}

/** A job's settings as a draft. */
async function settingsOf(id, signal) {
  const job = await api.job(id, signal).catch(() => null);
  if (!job) return null;
  const method = job.method?.type ?? "supervised";
  const numbers = job.method?.[method]?.hyperparameters ?? {};
  const plain = Object.fromEntries(Object.entries(numbers).map(([name, value]) => [name, value === "auto" ? "" : String(value)]));
  const file = (fileId) => fileId && { id: fileId };
  return { model: job.model, method, ...plain, suffix: job.user_provided_suffix ?? "", seed: String(job.seed ?? ""), training: file(job.training_file), validation: file(job.validation_file) };
}

// -------------------------------------------------------------------------- fields

function methodChoice(change) {
  const kinds = [
    ["supervised", "Supervised", "examples of good answers"],
    ["dpo", "DPO", "pairs of a better and a worse answer"],
  ];
  const inputs = kinds.map(([value]) => h("input", { type: "radio", name: "method", id: `method-${value}`, value, checked: value === "supervised", change }));
  const element = h(
    "fieldset",
    { class: "method" },
    h("legend", {}, "Method"),
    kinds.map(([value, name, about], index) => h("label", { for: `method-${value}` }, inputs[index], h("span", {}, h("b", {}, name), h("small", {}, about)))),
  );
  return {
    element,
    value: () => inputs.find((input) => input.checked).value,
    set: (value) => inputs.forEach((input) => (input.checked = input.value === value)),
  };
}

function textField(id, name, hint, props) {
  const error = h("p", { class: "error", id: `${id}-error`, role: "alert", hidden: true });
  const input = h("input", { id, type: "text", autocomplete: "off", spellcheck: "false", "aria-describedby": `${id}-hint ${id}-error`, ...props });
  const element = h("div", { class: "field" }, h("label", { for: id }, name), input, h("p", { class: "note", id: `${id}-hint` }, hint), error);
  function complain(text) {
    setText(error, text);
    error.hidden = !text;
    input.setAttribute("aria-invalid", String(Boolean(text)));
    return !text;
  }
  function check(pattern, text) {
    const fits = complain(pattern.test(input.value.trim()) ? "" : text);
    if (!fits) input.focus();
    return fits;
  }
  return { element, input, check, complain };
}

/** A number, or nothing for auto; once the files are checked it says what auto comes to. */
function numberField(key, rule, change) {
  const field = textField(freshId(key), rule.name, rule.hint, { placeholder: "auto", inputmode: "decimal", change });
  const value = () => field.input.value.trim();
  function check() {
    const number = Number(value());
    const fits = Number.isFinite(number) && (rule.min === undefined || number >= rule.min) && (rule.above === undefined || number > rule.above) && number <= (rule.max ?? Infinity) && (rule.step !== 1 || Number.isInteger(number));
    return field.complain(value() === "" || fits ? "" : `${rule.step === 1 ? "A whole number" : "A number"}, ${rule.hint}.`);
  }
  return {
    key,
    element: field.element,
    only: rule.only,
    value,
    check,
    set: (text) => (field.input.value = text),
    settle: (number) => number !== undefined && (field.input.placeholder = `auto: ${number}`),
  };
}
