// The metrics of a job: fetched step by step, kept as curves, drawn as two charts and a row of figures.

import { api } from "./api.js";
import { LineChart } from "./chart.js";
import { h, setText } from "./dom.js";
import { duration, loss, percent, whole } from "./format.js";
import { figure, isFinal } from "./parts.js";
import { trailingMean } from "./scale.js";

const LOSS = { title: "Loss", unit: "nats per token, lower is better", floor: 0 };
const ACCURACY = { title: "Token accuracy", unit: "share of trained tokens that are the likeliest", share: true };
const PAIR_LOSS = { title: "Preference loss", unit: "nats a pair, lower is better", floor: 0 };
const MARGIN = { title: "Reward margin", unit: "preferred minus other answer, higher is better" };

/** What each method's two charts show: the keys of metrics.jsonl, training and validation. */
const METHODS = {
  supervised: [
    { ...LOSS, keys: ["train_loss", "valid_loss"] },
    { ...ACCURACY, floor: 0, ceiling: 1, keys: ["train_token_accuracy", "valid_token_accuracy"] },
  ],
  dpo: [
    { ...PAIR_LOSS, keys: ["train_loss", "valid_loss"] },
    { ...MARGIN, keys: ["rewards_margin", "valid_rewards_margin"] },
  ],
};

/** The metrics of one job, as points by key. A step that comes again, after a crash, takes the place of the first. */
export class Metrics {
  constructor(id) {
    this.id = id;
    this.total = 0;
    this.report = false;
    this.adapterBytes = null;
    this.last = null;
    this.points = new Map(); // key → Map step → value
  }

  /** Fetch what is new. */
  async refresh(signal) {
    // From the last step on, not after it: its validation may have been written since.
    const answer = await api.metrics(this.id, this.last === null ? null : this.last - 1, signal);
    this.total = answer.total_steps ?? this.total;
    this.report = answer.report ?? false;
    this.adapterBytes = answer.adapter_bytes ?? null;
    for (const line of answer.lines) this.take(line);
  }

  take(line) {
    this.last = Math.max(this.last ?? 0, line.step);
    for (const [name, value] of Object.entries(line)) {
      if (name === "step" || typeof value !== "number") continue;
      if (!this.points.has(name)) this.points.set(name, new Map());
      this.points.get(name).set(line.step, value);
    }
  }

  /** [[step, value]] by rising step. */
  curve(name) {
    return [...(this.points.get(name) ?? [])].sort((one, other) => one[0] - other[0]);
  }

  /** Tokens a second over the last steps; undefined before the first. */
  speed() {
    const last = this.curve("data_tokens_per_second").slice(-10);
    return last.length ? last.reduce((sum, [, value]) => sum + value, 0) / last.length : undefined;
  }

  /** The last step of training. */
  step() {
    return Math.max(0, ...(this.points.get("train_loss")?.keys() ?? []));
  }
}

/** Progress, figures and charts of a job: {element, update(job, metrics)}. */
export function curvesView(method) {
  const plan = METHODS[method] ?? METHODS.supervised;
  const charts = [];
  const figures = [];
  for (const one of plan) {
    const chart = new LineChart({
      ...one,
      series: [
        { name: "each step", look: "faint" },
        { name: "Training", look: "main" },
        { name: "Validation", look: "dots" },
      ],
      onCursor: (step) => charts.forEach((other) => other.chart !== chart && other.chart.setCursor(step)),
    });
    charts.push({ chart, keys: one.keys });
    const name = one.title.toLowerCase();
    const format = one.share ? percent : loss;
    figures.push({ ...figure(`Training ${name}`), key: one.keys[0], format, lone: one !== plan[0] });
    figures.push({ ...figure(`Validation ${name}`), key: one.keys[1], format, held: true });
  }
  const speed = figure("Tokens per second");
  const tokens = figure("Trained tokens");
  const note = h("p", { class: "note" });
  const element = h(
    "div",
    {},
    h(
      "dl",
      { class: "figures" },
      figures.map((each) => each.element),
      speed.element,
      tokens.element,
    ),
    h(
      "div",
      { class: "charts" },
      charts.map((each) => each.chart.element),
    ),
    note,
  );

  function update(job, metrics) {
    const held = Boolean(job.validation_file) || metrics.curve("valid_loss").length > 0;
    for (const each of figures) {
      setText(each.value, each.format(metrics.curve(each.key).at(-1)?.[1]));
      each.element.hidden = held ? Boolean(each.lone) : Boolean(each.held);
    }
    setText(speed.value, whole(metrics.speed()));
    setText(tokens.value, whole(job.trained_tokens));
    speed.element.hidden = Boolean(job.trained_tokens); // of a job under way; then what it came to
    tokens.element.hidden = !job.trained_tokens;
    const reach = Math.max(1, Math.round(metrics.total / 40));
    for (const { chart, keys } of charts) {
      const training = metrics.curve(keys[0]);
      const raw = reach > 1 ? training : [];
      const mean = reach > 1 ? trailingMean(training, reach) : training;
      chart.update([raw, mean, metrics.curve(keys[1])], metrics.total);
      chart.show("Validation", held);
    }
    setText(note, reach > 1 ? `Training is the mean of the last ${reach} steps; the faint line is each step.` : "");
  }

  return { element, update };
}

/** How far a job is: {element, update(job, metrics)}. */
export function progressView() {
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
  const where = h("span", { class: "where" });
  const left = h("span", { class: "left" });
  const element = h("div", { class: "run-progress" }, h("p", {}, where, left), bar);

  function update(job, metrics) {
    const { total } = metrics;
    const step = metrics.step();
    bar.hidden = isFinal(job.status);
    setText(where, total ? `Step ${whole(step)} of ${whole(total)}` : waiting(job.status));
    setText(left, remaining(job));
    bar.value = total ? step / total : 0;
    return total ? step / total : 0;
  }

  return { element, update };
}

function waiting(status) {
  if (status === "validating_files") return "Checking the files";
  return status === "queued" ? "Waiting for a free place" : "Starting";
}

function remaining(job) {
  const now = Date.now() / 1000;
  if (job.status === "running" && job.estimated_finish) {
    const seconds = job.estimated_finish - now;
    const time = new Date(job.estimated_finish * 1000).toLocaleTimeString("en-GB", {
      hour: "2-digit",
      minute: "2-digit",
    });
    return seconds > 5 ? `about ${duration(seconds)} left, done at ${time}` : "nearly done";
  }
  if (job.status === "paused") return "paused, resumes from here";
  return job.finished_at ? `took ${duration(job.finished_at - job.created_at)}` : "";
}
