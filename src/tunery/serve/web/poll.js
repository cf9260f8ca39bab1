// Ask again and again, politely: slower in a hidden tab, at once when the tab is seen again or the server is back.

import { Refused, Unreachable } from "./api.js";
import { connection } from "./connection.js";

const HIDDEN = 15_000;
const AFTER_REFUSAL = [2_000, 4_000, 8_000, 15_000, 30_000];

/**
 * Run `task(signal)` now and then until `signal` is aborted.
 * @param task async; returns the ms until its next turn, or null: not before something wakes it.
 * @param onRefused called with the server's refusal; the task is tried again all the same, ever later.
 * @returns a function that runs the task at once
 */
export function poll(task, signal, onRefused = () => {}) {
  let timer = 0;
  let running = false;
  let again = false;
  let refusals = 0;

  async function turn() {
    if (signal.aborted) return;
    if (running) {
      again = true;
      return;
    }
    clearTimeout(timer);
    running = true;
    let pause = null;
    try {
      pause = await task(signal);
      refusals = 0;
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused) {
        onRefused(error);
        // without a key there is nothing to ask for until one is given, which wakes us
        if (error.status !== 401) pause = AFTER_REFUSAL[Math.min(refusals++, AFTER_REFUSAL.length - 1)];
      } else if (!(error instanceof Unreachable)) {
        throw error; // a mistake in this page; an unreachable server wakes us when it is back
      }
    } finally {
      running = false;
    }
    if (again) {
      again = false;
      turn();
    } else if (pause !== null && !signal.aborted) {
      timer = setTimeout(turn, document.hidden ? Math.max(pause, HIDDEN) : pause);
    }
  }

  const wake = () => document.hidden || turn();
  document.addEventListener("visibilitychange", wake, { signal });
  addEventListener("pageshow", (event) => event.persisted && turn(), { signal });
  addEventListener("online", wake, { signal });
  connection.addEventListener("up", turn, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  turn();
  return turn;
}
