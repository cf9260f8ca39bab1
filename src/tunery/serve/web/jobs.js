// The list of jobs.

import { api } from "./api.js";
import { h, problemBox, reconcile, setAttribute, setText } from "./dom.js";
import { ago, clock, day, duration, jobName, plural, shortModel, whole } from "./format.js";
import { emptyState, isFinal, pageHead, scriptHint, setStatus, statusBadge } from "./parts.js";
import { poll } from "./poll.js";

export const title = "Jobs";

export function show(main, { signal }) {
  const list = new JobList(signal);
  main.append(pageHead(title, { actions: newJobLink() }), list.element);
}

const newJobLink = () => h("a", { class: "button primary", href: "#/new" }, "New job");

class JobList {
  constructor(signal) {
    this.signal = signal;
    this.steps = new Map(); // job id → {step, total}, from its newest metrics event
    this.names = new Map(); // file id → name
    this.older = []; // pages after the first, fetched once: what is old does not change
    this.last = null; // {id, more}: where the next page begins
    this.rows = h("ul", { class: "jobs", role: "list" });
    this.more = h("button", { type: "button", hidden: true, click: () => this.showMore() }, "Show older jobs");
    this.full = h("div", {}, this.rows, this.more);
    const what =
      "Upload a file of examples and train an adapter on it, here or from a script that uses OpenAI's client:";
    this.none = emptyState("No jobs yet", what, scriptHint(), newJobLink());
    this.element = h("div", {}, h("p", { class: "note" }, "Loading…"));
    this.refresh = poll(
      () => this.load(),
      signal,
      (error) => this.element.replaceChildren(problemBox("The jobs cannot be shown", error.message)),
    );
  }

  async load() {
    const page = await api.jobs({}, this.signal);
    const active = page.data.filter((job) => job.status === "running" || job.status === "paused");
    await Promise.all([this.fileNames(page.data), ...active.map((job) => this.lastStep(job))]);
    const first = new Set(page.data.map((job) => job.id));
    if (!this.older.length) this.last = { id: page.data.at(-1)?.id, more: page.has_more };
    this.draw([...page.data, ...this.older.filter((job) => !first.has(job.id))]);
    return page.data.every((job) => isFinal(job.status)) ? 10_000 : 2_000;
  }

  async lastStep(job) {
    const { data } = await api.events(job.id, { limit: 5 }, this.signal);
    const metrics = data.find((event) => event.type === "metrics")?.data;
    if (metrics?.step) this.steps.set(job.id, { step: metrics.step, total: metrics.total_steps });
  }

  async fileNames(jobs) {
    const missing = jobs.map((job) => job.training_file).filter((id) => !this.names.has(id));
    if (!missing.length) return;
    for (const id of missing) this.names.set(id, ""); // stays so if the file was deleted since
    for (const file of (await api.files(this.signal)).data) this.names.set(file.id, file.filename);
  }

  async showMore() {
    const page = await api.jobs({ after: this.last.id }, this.signal);
    this.older = [...this.older, ...page.data];
    this.last = { id: page.data.at(-1)?.id ?? this.last.id, more: page.has_more };
    this.refresh();
  }

  draw(jobs) {
    this.more.hidden = !this.last.more;
    const shown = jobs.length ? this.full : this.none;
    if (shown.parentNode !== this.element) this.element.replaceChildren(shown);
    const update = (row, job) => updateRow(row, job, this.steps.get(job.id), this.names.get(job.training_file));
    reconcile(this.rows, jobs, (job) => job.id, makeRow, update);
  }
}

function makeRow(job) {
  const parts = {
    name: h("span", { class: "name" }),
    under: h("span", { class: "under" }),
    badge: statusBadge(),
    bar: h("progress", { max: 1, value: 0, "aria-label": `Progress of ${jobName(job)}` }),
    state: h("span", { class: "state" }),
    when: h("time", { datetime: new Date(job.created_at * 1000).toISOString(), title: day(job.created_at) }),
  };
  const { name, under, badge, bar, state, when } = parts;
  const who = h("span", { class: "who" }, name, under);
  const progress = h("span", { class: "progress" }, bar, state);
  const row = h("li", {}, h("a", { href: `#/jobs/${job.id}` }, who, badge, progress, when));
  row.parts = parts;
  return row;
}

function updateRow(row, job, at, filename) {
  const { name, under, badge, bar, state, when } = row.parts;
  setText(name, jobName(job));
  setText(under, [shortModel(job.model), filename].filter(Boolean).join(" · "));
  setStatus(badge, job.status);
  bar.hidden = !(at?.total && (job.status === "running" || job.status === "paused"));
  if (!bar.hidden) setAttribute(bar, "value", at.step / at.total);
  setText(state, stateOf(job, at));
  setText(when, ago(job.created_at));
}

/** What there is to say of a job in a few words. */
function stateOf(job, at) {
  if (job.status === "failed") return firstLine(job.error?.message ?? "");
  if (job.status === "succeeded") {
    return `${plural(job.trained_tokens, "token")} in ${duration(job.finished_at - job.created_at)}`;
  }
  if (!at || isFinal(job.status)) return "";
  const where = `Step ${whole(at.step)} of ${whole(at.total)}`;
  return job.status === "running" && job.estimated_finish
    ? `${where}, done about ${clock(job.estimated_finish)}`
    : where;
}

function firstLine(text) {
  return text.split("\n", 1)[0];
}
