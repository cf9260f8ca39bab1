// The arithmetic behind a chart: round ticks, thinning, means. Numbers in, numbers out.
// A point is [x, y]; points come by rising x.

/** About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover `low` to `high`. */
export function niceTicks(low, high, count) {
  if (!(high > low)) {
    const pad = Math.abs(low) * 0.1 || 1;
    [low, high] = [low - pad, high + pad];
  }
  const raw = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => raw <= each * (1 + 1e-9));
  const digits = Math.max(0, Math.min(12, 1 - Math.floor(Math.log10(step))));
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toFixed(digits)));
}

/** Whole numbers from 0 to `last`, about `count` of them, for an axis of steps. */
export function stepTicks(last, count) {
  const ticks = niceTicks(0, Math.max(last, 1), count);
  return ticks.filter((tick) => tick <= last && Number.isInteger(tick));
}

/** At each point the mean over the last `reach` of x. It looks back only, so what is drawn already never moves. */
export function trailingMean(points, reach) {
  let sum = 0;
  let first = 0;
  return points.map(([x, y], index) => {
    sum += y;
    while (points[first][0] <= x - reach) {
      sum -= points[first][1];
      first += 1;
    }
    return [x, sum / (index + 1 - first)];
  });
}

/** At most `limit` points that look the same: the lowest and highest of each stretch, so that no spike is lost. */
export function thin(points, limit) {
  if (points.length <= limit) return points;
  const stretches = Math.floor(limit / 2);
  const kept = [];
  for (let index = 0; index < stretches; index += 1) {
    const from = Math.floor((index * points.length) / stretches);
    const to = Math.floor(((index + 1) * points.length) / stretches);
    let lowest = from;
    let highest = from;
    for (let at = from; at < to; at += 1) {
      if (points[at][1] < points[lowest][1]) lowest = at;
      if (points[at][1] > points[highest][1]) highest = at;
    }
    kept.push(points[Math.min(lowest, highest)]);
    if (lowest !== highest) kept.push(points[Math.max(lowest, highest)]);
  }
  return kept;
}

/** Index of the last point whose x is at most `x`; -1 if there is none. */
export function lastAt(points, x) {
  let low = 0;
  let high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** The point of `points` nearest to `x`; null if there are none. */
export function nearest(points, x) {
  const index = lastAt(points, x);
  const [before, after] = [points[index], points[index + 1]];
  if (!before || !after) return before ?? after ?? null;
  return x - before[0] <= after[0] - x ? before : after;
}

/** A range that only grows, to whole ticks, so that a live chart keeps still between rare steps. */
export function grownRange(old, values, count, floor = -Infinity, ceiling = Infinity) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return old;
  if (old && low >= old.low && high <= old.high) return old;
  const ticks = niceTicks(Math.min(low, old?.low ?? low), Math.max(high, old?.high ?? high), count);
  return { low: Math.max(ticks[0], floor), high: Math.min(ticks.at(-1), ceiling) };
}
