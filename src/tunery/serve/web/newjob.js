// A new job: model, files, method, numbers; what the files hold; start.

import { api } from "./api.js";
import { checkView } from "./check.js";
import { connection } from "./connection.js";
import { announce, h, problemBox, setText } from "./dom.js";
import { MethodField, NUMBERS, NumberField, TextField } from "./fields.js";
import { FileField } from "./filefield.js";
import { plural } from "./format.js";
import { modelOptions } from "./modelselect.js";
import { pageHead } from "./parts.js";
import { poll } from "./poll.js";

const DRAFT = "tunery.draft";
const PAUSE = 350; // ms after a change before the files are looked at again

export const title = "New job";

export function show(main, { signal, query }) {
  const holder = h("div", {}, h("p", { class: "note" }, "Loading…"));
  main.append(pageHead(title), holder);
  let form = null;
  poll(load, signal, (error) => form || holder.replaceChildren(problemBox("The form cannot be shown", error.message)));

  async function load() {
    if (form) return null; // it is drawn once: what is filled in stays
    const [server, models, files] = await Promise.all([api.server(signal), api.models(signal), api.files(signal)]);
    form = new JobForm(server, models.data, files.data, signal);
    holder.replaceChildren(form.element);
    await form.restore(query.get("from"));
    return null;
  }
}

class JobForm {
  constructor(server, models, files, signal) {
    this.signal = signal;
    this.checking = null; // AbortController of the check under way
    this.checkedFor = ""; // what the check shown is of
    this.timer = 0;
    this.ready = false;
    this.restoring = false;
    const changed = () => this.changed();
    this.buildFields(server, models, changed);
    for (const field of [this.training, this.validation]) field.offer(files);
    for (const field of [this.suffix, this.seed]) field.input.addEventListener("input", () => this.save());
    this.result = h("section", { class: "card", "aria-label": "Check of the files" });
    this.note = h("p", { class: "note", id: "start-note" });
    this.start = h("button", { type: "submit", class: "primary", "aria-describedby": "start-note" }, "Start");
    this.error = h("div", {});
    this.element = this.layOut();
    // a check that the server was not there for
    connection.addEventListener("up", () => this.checkedFor === "" && this.changed(), { signal });
  }

  buildFields(server, models, changed) {
    this.model = h("select", { id: "model", change: changed }, modelOptions(models));
    if (models.some((each) => each.id === server.default_model)) this.model.value = server.default_model;
    this.method = new MethodField(changed);
    const shared = { signal: this.signal, limit: server.limits?.upload_bytes, onChange: changed };
    this.training = new FileField({
      label: "Training file",
      hint: "JSON lines with messages (or prompt and completion); pairs for DPO. At least 10 rows.",
      ...shared,
    });
    this.validation = new FileField({
      label: "Validation file (optional)",
      hint: "Rows that are not trained, to measure the validation loss on.",
      ...shared,
    });
    this.numbers = Object.keys(NUMBERS).map((key) => new NumberField(key, changed));
    const named = { maxlength: 64, placeholder: "none" };
    this.suffix = new TextField("suffix", "Name", "goes into the model's name; letters, digits, - or _", named);
    this.seed = new TextField("seed", "Seed", "same seed, same run", { inputmode: "numeric", placeholder: "auto" });
  }

  layOut() {
    const model = h("div", { class: "field" }, h("label", { for: "model" }, "Model"), this.model);
    const files = [model, this.method.element, this.training.element, this.validation.element];
    const numbers = h(
      "div",
      { class: "numbers" },
      this.numbers.map((each) => each.element),
      this.seed.element,
    );
    return h(
      "form",
      { class: "new-job", novalidate: true, submit: (event) => this.submit(event) },
      h(
        "div",
        { class: "halves" },
        h("div", { class: "card" }, files),
        h("div", { class: "card" }, h("h2", {}, "Settings"), this.suffix.element, numbers),
      ),
      this.result,
      this.error,
      h("div", { class: "start" }, this.start, this.note),
    );
  }

  /** Model, method and numbers, as the check takes them. */
  request() {
    const numbers = this.numbers.filter((each) => this.applies(each)).map((each) => [each.key, each.value]);
    return { model: this.model.value, method: this.method.value, ...Object.fromEntries(numbers) };
  }

  applies(number) {
    return !number.rule.only || number.rule.only === this.method.value;
  }

  // ------------------------------------------------------------------------ check

  changed() {
    if (this.restoring) return;
    this.save();
    for (const each of this.numbers) each.element.hidden = !this.applies(each);
    const wanted = JSON.stringify([this.training.file?.id, this.validation.file?.id, this.request()]);
    if (wanted === this.checkedFor) return;
    this.checkedFor = wanted;
    clearTimeout(this.timer);
    this.checking?.abort();
    this.error.replaceChildren();
    if (!this.training.file) {
      const what = "Once there is a training file, its problems or its first rows are shown here.";
      this.result.replaceChildren(h("p", { class: "note" }, what));
      this.setReady(false, "Choose a training file first.");
    } else if (this.numbers.some((each) => this.applies(each) && !each.fits())) {
      this.setReady(false, "One of the settings is out of range.");
    } else {
      this.setReady(false, "");
      this.timer = setTimeout(() => this.check(), PAUSE);
    }
  }

  async check() {
    const mine = (this.checking = new AbortController());
    const both = AbortSignal.any([this.signal, mine.signal]);
    const files = [this.training.file, this.validation.file].filter(Boolean);
    this.result.setAttribute("aria-busy", "true");
    if (!this.result.querySelector(".findings")) {
      this.result.replaceChildren(h("p", { class: "note" }, `Checking ${files[0].filename}…`));
    }
    try {
      const look = (file, use) => api.checkFile(file.id, { ...this.request(), use }, both);
      const found = await Promise.all(files.map((file, index) => look(file, index ? "validation" : "training")));
      this.showCheck(files, found);
    } catch (failure) {
      if (both.aborted) return;
      this.checkedFor = "";
      const again = h("button", { type: "button", click: () => this.changed() }, "Check again");
      this.result.replaceChildren(problemBox("The files could not be checked", failure.message, again));
    } finally {
      if (this.checking === mine) this.result.removeAttribute("aria-busy");
    }
  }

  showCheck(files, found) {
    const bad = found.filter((each) => each.problems.length);
    // of sound files only the training file has more to say than its name
    const shown = bad.length ? bad : found.slice(0, 1);
    this.result.replaceChildren(...shown.map((each) => checkView(each, files[found.indexOf(each)].filename)));
    if (bad.length) {
      const total = bad.reduce((sum, each) => sum + (each.problems_total ?? each.problems.length), 0);
      this.setReady(false, `${plural(total, "problem")} to put right first.`);
      this.result.scrollIntoView({ block: "nearest" });
      announce(this.note.textContent);
      return;
    }
    const [trained, held] = found;
    for (const each of this.numbers) each.settle(trained.hyperparameters?.[each.key]);
    this.setReady(true, held ? `Validated on ${plural(held.rows, "row")} of ${files[1].filename}.` : "");
    announce("No problems found. The job can be started.");
  }

  setReady(ready, text) {
    this.ready = ready;
    this.start.setAttribute("aria-disabled", String(!ready)); // it stays in the tab order, so that its reason is read
    setText(this.note, text);
  }

  // ------------------------------------------------------------------------ start

  async submit(event) {
    event.preventDefault();
    if (!this.ready) return announce(this.note.textContent);
    const seedFits = this.seed.check(/^\d*$/, "A whole number, or nothing.");
    if (!this.suffix.check(/^[\w.-]*$/, "Letters, digits, dots, - and _ only.") || !seedFits) return;
    this.setReady(false, "Starting…");
    try {
      const job = await api.createJob(this.body());
      sessionStorage.removeItem(DRAFT);
      location.hash = `#/jobs/${job.id}`;
    } catch (failure) {
      this.setReady(true, "");
      this.error.replaceChildren(problemBox("The job was not started", failure.message));
    }
  }

  body() {
    const { model, method, ...numbers } = this.request();
    const hyperparameters = Object.fromEntries(
      Object.entries(numbers)
        .filter(([, value]) => value !== "")
        .map(([key, value]) => [key, Number(value)]),
    );
    return {
      model,
      training_file: this.training.file.id,
      validation_file: this.validation.file?.id,
      suffix: this.suffix.value || undefined,
      seed: this.seed.value === "" ? undefined : Number(this.seed.value),
      method: { type: method, [method]: { hyperparameters } },
    };
  }

  // ------------------------------------------------------------------------ draft

  save() {
    const files = { training: this.training.file, validation: this.validation.file };
    const texts = { suffix: this.suffix.value, seed: this.seed.value };
    sessionStorage.setItem(DRAFT, JSON.stringify({ ...this.request(), ...files, ...texts }));
  }

  /** Fill in the settings of the job `from`, or else what was there before a refresh. */
  async restore(from) {
    const draft = from ? await settingsOf(from, this.signal) : JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
    this.restoring = true;
    if (draft) await this.fill(draft);
    this.restoring = false;
    this.changed();
  }

  async fill(draft) {
    if ([...this.model.options].some((option) => option.value === draft.model)) this.model.value = draft.model;
    this.method.value = draft.method ?? "supervised";
    for (const each of this.numbers) each.value = draft[each.key] ?? "";
    this.suffix.value = draft.suffix ?? "";
    this.seed.value = draft.seed ?? "";
    for (const name of ["training", "validation"]) {
      const known = draft[name] && (await api.file(draft[name].id, this.signal).catch(() => null));
      if (known) this[name].accept(known); // else it was deleted since
    }
  }
}

/** A job's settings as a draft; null if there is no such job. */
async function settingsOf(id, signal) {
  const job = await api.job(id, signal).catch(() => null);
  if (!job) return null;
  const method = job.method?.type ?? "supervised";
  const numbers = Object.entries(job.method?.[method]?.hyperparameters ?? {});
  return {
    model: job.model,
    method,
    ...Object.fromEntries(numbers.map(([name, value]) => [name, value === "auto" ? "" : String(value)])),
    suffix: job.user_provided_suffix ?? "",
    seed: String(job.seed ?? ""),
    training: { id: job.training_file },
    validation: job.validation_file && { id: job.validation_file },
  };
}
