// A line chart that stays calm while it grows: the x axis is the whole run from the start, the y axis only ever widens
// (to round numbers, gliding there), and the elements are kept; only their shapes change.

import { h, s, setAttribute, setText } from "./dom.js";
import { NONE, loss, percent, whole } from "./format.js";
import { grownRange, lastAt, nearest, niceTicks, stepTicks, thin } from "./scale.js";

const HEIGHT = 232;
const TOP = 10;
const RIGHT = 10;
const BOTTOM = 26;
const GLIDE = 220; // ms
const MOST_POINTS = 700;

const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class LineChart {
  /**
   * @param title what is drawn; @param unit of the values; @param share true: values are shares, shown in percent
   * @param series [{name, look}] with look "main" (solid), "faint" (raw values behind a mean; not in the read-out) or
   *   "dots" (dashed, with a dot a point), so that no curve is told apart by colour alone
   * @param floor, ceiling ends that the y axis never passes
   * @param onCursor called with the step that is pointed at, or null
   */
  constructor({ title, unit, share = false, series, floor, ceiling, onCursor = () => {} }) {
    Object.assign(this, { title, share, floor, ceiling, onCursor, format: share ? percent : loss });
    this.series = series.map((one) => ({ ...one, points: [] }));
    this.total = 0;
    this.cursor = null;
    this.range = null; // where the y axis is going
    this.shown = null; // where it is now
    this.gliding = null;
    this.build(unit);
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.plot);
  }

  build(unit) {
    this.step = h("span", { class: "at" });
    const legend = this.series
      .filter((one) => one.look !== "faint")
      .map((one) => {
        one.value = h("b", {}, NONE);
        one.entry = h("span", { class: "entry" }, swatch(one), h("span", {}, one.name), one.value);
        return one.entry;
      });
    this.grid = s("g", { class: "grid" });
    this.guide = s("line", { class: "guide", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    for (const one of this.series) {
      one.path = s("path", { class: `curve ${one.look}` });
      one.dots = one.look === "dots" ? s("path", { class: "points" }) : null;
      one.mark = one.look === "faint" ? null : s("circle", { class: `mark ${one.look}`, r: 4, visibility: "hidden" });
    }
    const shapes = this.series.flatMap((one) => [one.path, one.dots, one.mark]);
    this.svg = s("svg", { height: HEIGHT, "aria-hidden": "true" }, this.grid, this.guide, shapes);
    this.empty = h("p", { class: "no-data" }, "Nothing measured yet");
    // A slider is what arrow keys move along steps; its text says the values there.
    this.plot = h(
      "div",
      {
        class: "plot",
        tabindex: 0,
        role: "slider",
        "aria-label": `${this.title} by step`,
        "aria-valuemin": 0,
        keydown: (event) => this.key(event),
        pointermove: (event) => this.point(event),
        pointerdown: (event) => this.point(event),
        pointerleave: () => this.moveTo(null),
        focus: () => this.speak(),
        blur: () => this.moveTo(null),
      },
      this.svg,
      this.empty,
    );
    this.element = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("h2", {}, this.title), h("span", { class: "unit" }, unit)),
      h("div", { class: "readout" }, this.step, legend),
      this.plot,
    );
  }

  /** New points: one list for each series, in their order. @param total steps of the whole run. */
  update(lists, total) {
    this.series.forEach((one, index) => (one.points = lists[index]));
    this.total = Math.max(total, ...this.series.map((one) => one.points.at(-1)?.[0] ?? 0));
    const values = this.series.flatMap((one) => one.points.map((point) => point[1]));
    const before = this.range;
    this.range = grownRange(before, values, 4, this.floor, this.ceiling);
    this.empty.hidden = this.range !== null;
    if (before && this.range !== before && !calm.matches && !document.hidden) this.glide();
    else if (!this.gliding) {
      this.shown = this.range;
      this.draw();
    }
    this.read();
  }

  /** Whether a curve is named in the legend and the read-out. */
  show(name, shown) {
    const one = this.series.find((each) => each.name === name);
    one.entry.hidden = !shown;
  }

  glide() {
    const from = this.shown;
    const start = performance.now();
    const mine = (this.gliding = {}); // a later glide takes over from where this one is
    const frame = (now) => {
      if (this.gliding !== mine) return;
      const part = Math.min(1, Math.max(0, now - start) / GLIDE);
      const eased = part * (2 - part);
      const { low, high } = this.range;
      this.shown = { low: from.low + (low - from.low) * eased, high: from.high + (high - from.high) * eased };
      this.draw();
      if (part < 1 && this.svg.isConnected) requestAnimationFrame(frame);
      else this.gliding = null;
    };
    requestAnimationFrame(frame);
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width || !this.shown) return;
    const { low, high } = this.shown;
    const labels = tickLabels(niceTicks(this.range.low, this.range.high, 4), this.share);
    const left = 12 + 7 * Math.max(...labels.map(([, text]) => text.length));
    this.x = (step) => left + (step / Math.max(this.total, 1)) * (width - left - RIGHT);
    this.y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    this.stepOf = (pixel) => ((pixel - left) / (width - left - RIGHT)) * this.total;
    setAttribute(this.svg, "width", width);
    setAttribute(this.svg, "viewBox", `0 0 ${width} ${HEIGHT}`);
    this.drawGrid(labels, left, width);
    for (const one of this.series) {
      const places = thin(one.points, MOST_POINTS).map(([x, y]) => [this.x(x).toFixed(1), this.y(y).toFixed(1)]);
      setAttribute(one.path, "d", places.map(([x, y], index) => `${index ? "L" : "M"}${x} ${y}`).join(""));
      if (one.dots) setAttribute(one.dots, "d", places.map(([x, y]) => `M${x} ${y}h0`).join(""));
    }
    this.drawCursor();
  }

  drawGrid(labels, left, width) {
    const bottom = HEIGHT - BOTTOM;
    const steps = stepTicks(this.total, Math.max(2, Math.min(6, Math.floor(width / 90))));
    const now = JSON.stringify([this.shown, steps, left, width, this.total]);
    if (now === this.drawnGrid) return; // nothing moved: leave it
    this.drawnGrid = now;
    const parts = [];
    for (const [tick, text] of labels) {
      const y = this.y(tick).toFixed(1);
      if (y < TOP - 1 || y > bottom + 1) continue;
      parts.push(s("line", { x1: left, x2: width - RIGHT, y1: y, y2: y }));
      parts.push(s("text", { x: left - 8, y: Number(y) + 4, "text-anchor": "end" }, text));
    }
    parts.push(s("line", { class: "axis", x1: left, x2: width - RIGHT, y1: bottom, y2: bottom }));
    // the label of a tick at the very end stays inside
    const end = this.x(steps.at(-1)) > width - RIGHT - 14 ? steps.at(-1) : null;
    for (const step of steps) {
      const x = this.x(step).toFixed(1);
      const anchor = step === end ? "end" : "middle";
      const at = step === end ? width - RIGHT : x;
      parts.push(s("line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      parts.push(s("text", { x: at, y: bottom + 18, "text-anchor": anchor }, step === 0 ? "step 0" : whole(step)));
    }
    this.grid.replaceChildren(...parts);
  }

  // ------------------------------------------------------------------------ read-out

  /** Show the values at `step`; null: the latest. Does not call onCursor. */
  setCursor(step) {
    if (step === this.cursor) return;
    this.cursor = step;
    this.read();
    this.drawCursor();
  }

  moveTo(step) {
    if (step === this.cursor) return;
    this.setCursor(step);
    this.speak();
    this.onCursor(step);
  }

  lead() {
    return this.series.find((one) => one.look === "main").points;
  }

  read() {
    const step = this.cursor ?? this.lead().at(-1)?.[0] ?? null;
    setText(this.step, step === null ? "" : `Step ${whole(step)}`);
    for (const one of this.series) if (one.value) setText(one.value, this.format(this.valueAt(one, step)));
  }

  valueAt(one, step) {
    return step === null ? undefined : one.points[lastAt(one.points, step)]?.[1];
  }

  /** Only when the reader moves, so that a screen reader is not told of every new step. */
  speak() {
    const step = this.cursor ?? this.lead().at(-1)?.[0] ?? 0;
    const values = this.series
      .filter((one) => one.value && !one.entry.hidden)
      .map((one) => `${one.name} ${this.format(this.valueAt(one, step))}`);
    this.plot.setAttribute("aria-valuemax", Math.max(this.total, 1));
    this.plot.setAttribute("aria-valuenow", step);
    this.plot.setAttribute("aria-valuetext", `Step ${step}: ${values.join(", ")}`);
  }

  drawCursor() {
    const step = this.cursor;
    setAttribute(this.guide, "visibility", step === null || !this.x ? "hidden" : "visible");
    if (this.x && step !== null) {
      setAttribute(this.guide, "x1", this.x(step));
      setAttribute(this.guide, "x2", this.x(step));
    }
    for (const one of this.series) {
      if (!one.mark) continue;
      const point = step === null || !this.x ? undefined : one.points[lastAt(one.points, step)];
      setAttribute(one.mark, "visibility", point ? "visible" : "hidden");
      if (point) {
        setAttribute(one.mark, "cx", this.x(point[0]));
        setAttribute(one.mark, "cy", this.y(point[1]));
      }
    }
  }

  point(event) {
    if (!this.stepOf) return;
    const step = this.stepOf(event.clientX - this.plot.getBoundingClientRect().left);
    this.moveTo(nearest(this.lead(), step)?.[0] ?? null);
  }

  key(event) {
    const points = this.lead();
    if (!points.length) return;
    const at = lastAt(points, this.cursor ?? Infinity);
    const page = Math.max(2, Math.round(points.length / 10));
    const moves = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1 };
    Object.assign(moves, { PageDown: at - page, PageUp: at + page, Home: 0, End: points.length - 1 });
    if (event.key === "Escape") this.moveTo(null);
    else if (event.key in moves) {
      this.moveTo(points[Math.max(0, Math.min(points.length - 1, moves[event.key]))][0]);
      event.preventDefault();
    }
  }
}

/** [[tick, text]], all with as many digits as the finest needs. */
function tickLabels(ticks, share) {
  const values = ticks.map((tick) => Number((share ? tick * 100 : tick).toPrecision(9)));
  const digits = Math.max(...values.map((value) => String(value).split(".")[1]?.length ?? 0));
  return ticks.map((tick, index) => [tick, values[index].toFixed(Math.min(digits, 6)) + (share ? " %" : "")]);
}

function swatch(one) {
  const line = s("path", { class: `curve ${one.look}`, d: "M1 6h22" });
  const dot = one.look === "dots" && s("path", { class: "points", d: "M12 6h0" });
  return s("svg", { class: "swatch", width: 24, height: 12, "aria-hidden": "true" }, line, dot);
}
