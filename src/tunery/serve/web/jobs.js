// The list of jobs.

import { api } from "./api.js";
import { h, problemBox, reconcile, setAttribute, setText } from "./dom.js";
import { ago, clock, day, duration, jobName, plural, shortModel, whole } from "./format.js";
import { emptyState, isFinal, pageHead, scriptHint, setStatus, statusBadge } from "./parts.js";
import { poll } from "./poll.js";

export const title = "Jobs";

export function show(main, { signal }) {
  const more = h("button", { type: "button", hidden: true, click: showMore }, "Show older jobs");
  const list = h("ul", { class: "jobs" });
  const body = h("div", {}, h("p", { class: "note" }, "Loading…"));
  main.append(pageHead("Jobs", { actions: h("a", { class: "button primary", href: "#/new" }, "New job") }), body);

  const steps = new Map(); // job id → {step, total}, from its newest metrics event
  const names = new Map(); // file id → name
  let older = []; // pages after the first, fetched once: what is old does not change
  let last = null;

  const refresh = poll(load, signal, (error) => body.replaceChildren(problemBox("The jobs cannot be shown", error.message)));

  async function load() {
    const page = await api.jobs({}, signal);
    const active = page.data.filter((job) => job.status === "running" || job.status === "paused");
    await Promise.all([fileNames(page.data), ...active.map(lastStep)]);
    const first = new Set(page.data.map((job) => job.id));
    const jobs = [...page.data, ...older.filter((job) => !first.has(job.id))];
    last = older.length ? last : { id: page.data.at(-1)?.id, more: page.has_more };
    draw(jobs);
    return page.data.every((job) => isFinal(job.status)) ? 10_000 : 2_000;
  }

  async function lastStep(job) {
    const { data } = await api.events(job.id, { limit: 5 }, signal);
    const metrics = data.find((event) => event.type === "metrics")?.data;
    if (metrics?.step) steps.set(job.id, { step: metrics.step, total: metrics.total_steps });
  }

  async function fileNames(jobs) {
    if (jobs.every((job) => names.has(job.training_file))) return;
    for (const file of (await api.files(signal)).data) names.set(file.id, file.filename);
    for (const job of jobs) if (!names.has(job.training_file)) names.set(job.training_file, ""); // deleted since
  }

  async function showMore() {
    const page = await api.jobs({ after: last.id }, signal);
    older = [...older, ...page.data];
    last = { id: page.data.at(-1)?.id ?? last.id, more: page.has_more };
    refresh();
  }

  function draw(jobs) {
    more.hidden = !last.more;
    if (!jobs.length) {
      body.replaceChildren(
        emptyState(
          "No jobs yet",
          "Upload a file of examples and train an adapter on it, here or from a script that uses OpenAI's client:",
          scriptHint(),
          h("a", { class: "button primary", href: "#/new" }, "New job"),
        ),
      );
      return;
    }
    if (list.parentNode !== body) body.replaceChildren(list, more);
    reconcile(list, jobs, (job) => job.id, makeRow, updateRow);
  }

  function makeRow(job) {
    const row = h("li", {});
    row.parts = {
      name: h("span", { class: "name" }),
      under: h("span", { class: "under" }),
      badge: statusBadge(),
      bar: h("progress", { max: 1, value: 0, "aria-label": `Progress of ${jobName(job)}` }),
      state: h("span", { class: "state" }),
      when: h("time", { datetime: new Date(job.created_at * 1000).toISOString(), title: day(job.created_at) }),
    };
    const { name, under, badge, bar, state, when } = row.parts;
    row.append(
      h(
        "a",
        { href: `#/jobs/${job.id}` },
        h("span", { class: "who" }, name, under),
        badge,
        h("span", { class: "progress" }, bar, state),
        when,
      ),
    );
    return row;
  }

  function updateRow(row, job) {
    const { name, under, badge, bar, state, when } = row.parts;
    setText(name, jobName(job));
    setText(under, [shortModel(job.model), names.get(job.training_file)].filter(Boolean).join(" · "));
    setStatus(badge, job.status);
    const at = steps.get(job.id);
    bar.hidden = !(at?.total && (job.status === "running" || job.status === "paused"));
    if (!bar.hidden) setAttribute(bar, "value", at.step / at.total);
    setText(state, stateOf(job, at));
    setText(when, ago(job.created_at));
  }
}

/** What there is to say of a job in a few words. */
function stateOf(job, at) {
  if (job.status === "failed") return firstLine(job.error?.message ?? "");
  if (job.status === "succeeded") {
    return `${plural(job.trained_tokens, "token")} in ${duration(job.finished_at - job.created_at)}`;
  }
  if (!at || isFinal(job.status)) return "";
  const where = `Step ${whole(at.step)} of ${whole(at.total)}`;
  return job.status === "running" && job.estimated_finish ? `${where}, done about ${clock(job.estimated_finish)}` : where;
}

function firstLine(text) {
  return text.split("\n", 1)[0];
}
