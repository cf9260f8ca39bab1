// One job: its state, curves, checkpoints and events, and the buttons that steer it.

import { api, paths } from "./api.js";
import { checkView } from "./check.js";
import { curvesView, Metrics, progressView } from "./curves.js";
import { announce, copyButton, h, problemBox, setText } from "./dom.js";
import { bytes, day, jobName, loss, rate, shortModel, whole } from "./format.js";
import { chatLink, checkpointsView, EventsView } from "./history.js";
import { confirmed, facts, fileLink, isFinal, message, pageHead, setStatus, statusBadge, statusName } from "./parts.js";
import { poll } from "./poll.js";

const PAUSE = { running: 1_200, validating_files: 1_200, queued: 2_000, paused: 10_000 };

export const title = "Job";

export async function show(main, { id, signal, setTitle }) {
  const holder = h("div", { class: "job" }, h("p", { class: "note" }, "Loading…"));
  main.append(holder);
  const metrics = new Metrics(id);
  let view = null;
  let before = null;

  const refresh = poll(load, signal, (error) => {
    if (view) return;
    const back = h("a", { class: "button", href: "#/jobs" }, "All jobs");
    holder.replaceChildren(
      problemBox(error.status === 404 ? "There is no such job" : "The job cannot be shown", error.message, back),
    );
  });

  async function load() {
    const [job] = await Promise.all([api.job(id, signal), metrics.refresh(signal)]);
    if (!view) {
      view = new JobView(job, refresh);
      holder.replaceChildren(view.element);
    }
    const share = view.update(job, metrics);
    if (await view.events.refresh(signal)) await view.checkpoints.refresh(signal, job.model);
    if (before && before !== job.status) announce(`Job ${jobName(job)}: ${statusName(job.status)}`);
    const state = job.status === "running" ? `${Math.floor(share * 100)} %` : statusName(job.status);
    setTitle(`${state} · ${jobName(job)}`);
    const settled = isFinal(job.status) && before === job.status; // once more after the end, for what came last
    before = job.status;
    return settled ? null : (PAUSE[job.status] ?? 1_200);
  }
}

class JobView {
  constructor(job, refresh) {
    this.method = job.method?.type ?? "supervised";
    this.events = new EventsView(job.id);
    this.checkpoints = checkpointsView(job.id);
    this.progress = progressView();
    this.curves = curvesView(this.method);
    this.buttons = steering(job.id, refresh);
    this.trouble = h("div", {});
    this.results = h("div", {});
    this.settings = h("div", {});
    this.drawn = "";
    this.element = h("article", {}, this.head(job), this.trouble, this.results, this.body());
  }

  head(job) {
    this.badge = statusBadge();
    this.model = h("span", {});
    return pageHead(jobName(job), {
      above: h("p", { class: "crumbs" }, h("a", { href: "#/jobs" }, "Jobs")),
      under: h("p", { class: "under" }, this.badge, this.model),
      actions: this.buttons.nodes,
    });
  }

  body() {
    const curves = [this.progress.element, this.curves.element];
    this.training = h("section", { class: "card", "aria-label": "Training" }, curves);
    const heading = h("div", { class: "card-head" }, h("h2", { id: "settings-title" }, "Settings"));
    return [
      this.training,
      h("div", { class: "halves" }, this.checkpoints.element, this.events.element),
      h("section", { class: "card", "aria-labelledby": "settings-title" }, heading, this.settings),
    ];
  }

  /** @returns the share of the steps that are done */
  update(job, metrics) {
    setStatus(this.badge, job.status);
    setText(this.model, `${shortModel(job.model)}, ${this.method === "dpo" ? "DPO" : "supervised"}`);
    this.buttons.update(job);
    this.curves.update(job, metrics);
    const nothing = isFinal(job.status) && !metrics.step(); // it ended before the first step
    this.training.hidden = this.checkpoints.element.hidden = nothing;
    this.updateRare(job, metrics);
    return this.progress.update(job, metrics);
  }

  /** What changes rarely: drawn anew each second, a selection in it would be lost. */
  updateRare(job, metrics) {
    const { status, fine_tuned_model: model, method, hyperparameters, error, result_files: files } = job;
    const { report, adapterBytes } = metrics;
    const now = JSON.stringify([status, model, method, hyperparameters, error, files, report, adapterBytes]);
    if (now === this.drawn) return;
    this.drawn = now;
    showTrouble(this.trouble, job);
    showResults(this.results, job, metrics);
    showSettings(this.settings, job);
  }
}

// -------------------------------------------------------------------------- steering

function steering(id, refresh) {
  const pause = h("button", { type: "button", click: () => steer("pause") }, "Pause");
  const resume = h("button", { type: "button", class: "primary", click: () => steer("resume") }, "Resume");
  const cancel = h("button", { type: "button", click: () => steer("cancel") }, "Cancel job");
  const again = h("a", { class: "button", href: `#/new?from=${encodeURIComponent(id)}` }, "New job like this");
  const chat = h("a", { class: "button primary" }, "Chat");
  const buttons = [pause, resume, cancel];
  let busy = false; // not `disabled`, which would take the focus away

  async function steer(verb) {
    const text = "Training ends for good; the checkpoints made so far stay. To continue later, pause it instead.";
    if (verb === "cancel" && !(await confirmed("Cancel this job?", text, "Cancel job", "Let it run"))) return;
    if (busy) return;
    busy = true;
    try {
      await api.steer(id, verb);
    } catch (error) {
      message(
        `The job could not be ${{ pause: "paused", resume: "resumed", cancel: "cancelled" }[verb]}`,
        error.message,
      );
    }
    busy = false;
    refresh();
  }

  function update(job) {
    const focused = buttons.includes(document.activeElement) ? document.activeElement : null;
    pause.hidden = !["queued", "running", "validating_files"].includes(job.status);
    resume.hidden = job.status !== "paused";
    cancel.hidden = isFinal(job.status);
    again.hidden = !isFinal(job.status);
    chat.hidden = !job.fine_tuned_model;
    if (job.fine_tuned_model) chat.href = chatLink(job.model, job.fine_tuned_model);
    // Pause turns into Resume under the reader's finger; the focus must not fall off the page with it.
    if (focused?.hidden) [resume, pause, cancel, again].find((button) => !button.hidden)?.focus();
  }

  return { nodes: [pause, resume, cancel, again, chat], update };
}

// -------------------------------------------------------------------------- parts that change rarely

function showTrouble(place, job) {
  if (job.status !== "failed") {
    place.replaceChildren();
    return;
  }
  const param = job.error?.param;
  const details = h("div", {});
  place.replaceChildren(
    h(
      "div",
      { class: "problem", role: "alert" },
      h("h2", {}, "The job failed"),
      h("p", { class: "text" }, job.error?.message ?? "The server gave no reason."),
      job.error?.code && h("p", { class: "note" }, `Code ${job.error.code}${param ? `, in ${param}` : ""}`),
      details,
    ),
  );
  const file = param === "validation_file" ? job.validation_file : job.training_file;
  if (["training_file", "validation_file"].includes(param) && file) listProblems(details, file, job);
}

/** The problems of a failed job's file by line, as the check before a job shows them; without, if the file is gone. */
async function listProblems(place, file, job) {
  const use = file === job.training_file ? "training" : "validation";
  try {
    const [{ filename }, result] = await Promise.all([
      api.file(file),
      api.checkFile(file, { model: job.model, method: job.method?.type, use }),
    ]);
    if (result.problems.length) place.replaceChildren(checkView(result, filename, { short: true }));
  } catch (error) {
    console.info("no list of problems:", error.message);
  }
}

function showResults(place, job, metrics) {
  if (!job.fine_tuned_model) {
    place.replaceChildren();
    return;
  }
  const name = `${jobName(job)}-adapter.zip`;
  const size = metrics.adapterBytes ? ` (${bytes(metrics.adapterBytes)})` : "";
  const links = [
    fileLink(paths.adapter(job.id), name, `Download the adapter${size}`),
    ...job.result_files.map((id) => fileLink(paths.content(id), `${jobName(job)}-results.csv`, "Result file (CSV)")),
    metrics.report && reportLink(job),
  ];
  place.replaceChildren(
    h(
      "section",
      { class: "card result", "aria-label": "Result" },
      h(
        "p",
        {},
        h("span", { class: "label" }, "Fine-tuned model"),
        h("code", {}, job.fine_tuned_model),
        copyButton(job.fine_tuned_model),
      ),
      h("p", { class: "links" }, links),
    ),
  );
}

/** The report opens in a tab of its own. */
function reportLink(job) {
  const link = fileLink(paths.report(job.id), `${jobName(job)}-report.html`, "Report: base vs. tuned", {
    target: "_blank",
    rel: "noopener",
  });
  if (!sessionStorage.getItem("tunery.key")) link.removeAttribute("download");
  return link;
}

function showSettings(place, job) {
  const method = job.method?.type ?? "supervised";
  const numbers = job.method?.[method]?.hyperparameters ?? job.hyperparameters ?? {};
  const number = (value, format) => (value === "auto" || value === undefined ? "auto" : format(value));
  place.replaceChildren(
    facts([
      ["Model", job.model],
      ["Method", method === "dpo" ? "DPO (preferences)" : "Supervised"],
      ["Epochs", number(numbers.n_epochs, whole)],
      ["Batch size", number(numbers.batch_size, whole)],
      ["Learning-rate multiplier", number(numbers.learning_rate_multiplier, rate)],
      method === "dpo" ? ["Beta", number(numbers.beta, loss)] : [],
      ["Seed", job.seed === null || job.seed === undefined ? "" : String(job.seed)],
      ["Training file", filePart(job.training_file)],
      ["Validation file", job.validation_file && filePart(job.validation_file)],
      ["Created", day(job.created_at)],
      ["Finished", job.finished_at ? day(job.finished_at) : ""],
      ["Job", job.id],
      ...Object.entries(job.metadata ?? {}).map(([name, value]) => [name, value]),
    ]),
  );
}

/** A file by its name, to download; by its id once it has been deleted. */
function filePart(id) {
  const place = h("span", {}, id);
  api.file(id).then(
    ({ filename }) => place.replaceChildren(fileLink(paths.content(id), filename, filename)),
    () => setText(place, `${id}, deleted`),
  );
  return place;
}
