// Whether the server answers. One place tries again with growing pauses, so that every view need not.
//
// Events: "down" (detail: seconds to the next try), "up", "key" (a key is needed, or the one we have is refused).

export const connection = new EventTarget();

const PAUSES = [1, 2, 4, 8, 15];
let reachable = true;
let tries = 0;
let timer = 0;

/** A request got no answer: the server is gone, starting again, or the machine was asleep. */
export function unanswered() {
  if (!reachable) return;
  reachable = false;
  tries = 0;
  wait();
}

/** A request was answered, by whatever status. */
export function answered() {
  if (reachable) return;
  reachable = true;
  clearTimeout(timer);
  connection.dispatchEvent(new Event("up"));
}

function wait() {
  const seconds = PAUSES[Math.min(tries, PAUSES.length - 1)];
  tries += 1;
  connection.dispatchEvent(new CustomEvent("down", { detail: seconds }));
  clearTimeout(timer);
  timer = setTimeout(tryNow, seconds * 1000);
}

/** Ask the server for a sign of life. Any answer counts, a refusal for want of a key too. */
export async function tryNow() {
  if (reachable) return;
  clearTimeout(timer);
  try {
    const response = await fetch("/api/server", { cache: "no-store", signal: AbortSignal.timeout(10_000) });
    if (isGateway(response.status)) wait();
    else answered();
  } catch {
    wait();
  }
}

/** Statuses by which a proxy says that the server behind it is not there. */
export function isGateway(status) {
  return status === 502 || status === 503 || status === 504;
}

// Back from sleep or from no network: do not sit out the pause.
addEventListener("online", tryNow);
document.addEventListener("visibilitychange", () => document.hidden || tryNow());
