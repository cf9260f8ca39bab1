// Numbers, sizes and times as people write them. English throughout, like the rest of the page.

const GROUPED = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const NONE = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** 12,345 */
export function whole(value) {
  return known(value) ? GROUPED.format(value) : NONE;
}

/** A loss: 0.512, and with more digits when it is tiny. */
export function loss(value) {
  if (!known(value)) return NONE;
  return value !== 0 && Math.abs(value) < 0.01 ? value.toPrecision(2) : value.toFixed(3);
}

/** A share: 78.1 % */
export function percent(value) {
  return known(value) ? `${(value * 100).toFixed(1)} %` : NONE;
}

/** A rate or a multiplier: 0.0002 → 2e-4, 1.8 → 1.8 */
export function rate(value) {
  if (!known(value)) return NONE;
  if (value !== 0 && Math.abs(value) < 0.01) return value.toExponential().replace(/(\.\d\d)\d*e/, "$1e");
  return String(Number(value.toPrecision(4)));
}

/** 1.2 MB */
export function bytes(value) {
  if (!known(value)) return NONE;
  if (value < 1000) return `${value} bytes`;
  const units = ["kB", "MB", "GB", "TB"];
  let size = value / 1000;
  let unit = 0;
  while (size >= 999.5 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${size < 9.95 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

/** 42 s, 3 min, 1 h 20 min */
export function duration(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const rest = minutes % 60;
  return `${Math.floor(minutes / 60)} h${rest ? ` ${rest} min` : ""}`;
}

const toDate = (seconds) => new Date(seconds * 1000);
const isToday = (date) => date.toDateString() === new Date().toDateString();

/** The time of day, with seconds, and the day if it is not today. */
export function moment(seconds) {
  if (!known(seconds)) return NONE;
  const date = toDate(seconds);
  const time = date.toLocaleTimeString("en-GB");
  return isToday(date) ? time : `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

/** 14:32, with the day if it is not today. */
export function clock(seconds) {
  return moment(seconds).replace(/:\d\d$/, "");
}

/** 24 Nov 2026, 14:32 */
export function day(seconds) {
  if (!known(seconds)) return NONE;
  return toDate(seconds).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/** just now, 3 min ago, 2 h ago, then the date */
export function ago(seconds) {
  if (!known(seconds)) return NONE;
  const passed = Date.now() / 1000 - seconds;
  if (passed < 60) return "just now";
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 24 * 3600) return `${Math.floor(passed / 3600)} h ago`;
  return toDate(seconds).toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });
}

/** 1 row, 2 rows */
export function plural(count, word) {
  return `${whole(count)} ${word}${count === 1 ? "" : "s"}`;
}

/** The part of a name that tells models apart: ft:base:local:reviews:Ab12:ckpt-step-88 → reviews Ab12, step 88 */
export function shortModel(id) {
  if (!id.startsWith("ft:")) return id;
  const parts = id.split(":");
  const step = /^ckpt-step-(\d+)$/.exec(parts.at(-1))?.[1];
  if (step) parts.pop();
  const [suffix, code] = parts.slice(-2);
  return `${suffix ? `${suffix} ` : ""}${code}${step ? `, step ${step}` : ""}`;
}

/** What to call a job: its suffix, else the end of its id. */
export function jobName(job) {
  const suffix = job.user_provided_suffix ?? job.fine_tuned_model?.split(":").at(-2);
  return suffix || `Job ${job.id.slice(-8)}`;
}
