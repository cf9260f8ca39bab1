// The server, as functions: /v1 is OpenAI's API, /api what this page needs besides.

import { answered, connection, isGateway, unanswered } from "./connection.js";

const KEY = "tunery.key";
const SLOW = 120_000; // reading a large file and counting its tokens
const QUICK = 20_000;

/** The server said no. `message` is meant to be read by people. */
export class Refused extends Error {
  constructor(status, error = {}, retryAfter = null) {
    super(error.message || `The server answered with status ${status}.`);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.retryAfter = retryAfter;
  }
}

/** The server did not answer. */
export class Unreachable extends Error {
  constructor() {
    super("The server is not reachable.");
  }
}

// The key stays in this tab and is gone when it closes.
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

function authorization() {
  return key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const error = new Refused(response.status, body?.error, Number(response.headers.get("Retry-After")) || null);
  if (response.status === 401) connection.dispatchEvent(new CustomEvent("key", { detail: error.message }));
  return error;
}

/**
 * One request; the response, once its status is good.
 * @param signal the caller's: when it is aborted, the AbortError goes to the caller as it is.
 * @param timeout in ms; null for a stream, which may take as long as it likes.
 */
async function send(path, { method = "GET", json, signal, timeout = QUICK } = {}) {
  const signals = [signal, timeout && AbortSignal.timeout(timeout)].filter(Boolean);
  const headers = { ...authorization(), ...(json && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: json && JSON.stringify(json),
      cache: "no-store",
      signal: signals.length ? AbortSignal.any(signals) : undefined,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    unanswered();
    throw new Unreachable();
  }
  if (isGateway(response.status)) {
    unanswered();
    throw new Unreachable();
  }
  answered();
  if (!response.ok) throw await refusal(response);
  return response;
}

async function ask(path, options) {
  const response = await send(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (options?.signal?.aborted) throw error;
    unanswered(); // cut off in the middle of its answer
    throw new Unreachable();
  }
}

/** ?a=1&b=2 from an object; what is null, undefined or "" is left out. */
function query(values) {
  const kept = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return kept.length ? `?${new URLSearchParams(kept)}` : "";
}

const part = encodeURIComponent;
const job = (id) => `/v1/fine_tuning/jobs/${part(id)}`;

export const api = {
  server: (signal) => ask("/api/server", { signal }),
  models: (signal) => ask("/api/models", { signal }),
  deleteModel: (id) => ask(`/v1/models/${part(id)}`, { method: "DELETE" }),

  files: (signal) => ask(`/v1/files${query({ purpose: "fine-tune", limit: 50, order: "desc" })}`, { signal }),
  file: (id, signal) => ask(`/v1/files/${part(id)}`, { signal }),
  deleteFile: (id) => ask(`/v1/files/${part(id)}`, { method: "DELETE" }),
  checkFile: (id, values, signal) =>
    ask(`/api/files/${part(id)}/check${query(values)}`, { method: "POST", signal, timeout: SLOW }),

  jobs: (page, signal) => ask(`/v1/fine_tuning/jobs${query({ limit: 50, ...page })}`, { signal }),
  job: (id, signal) => ask(job(id), { signal }),
  createJob: (body) => ask("/v1/fine_tuning/jobs", { method: "POST", json: body }),
  /** @param verb pause, resume or cancel */
  steer: (id, verb) => ask(`${job(id)}/${verb}`, { method: "POST" }),
  events: (id, page, signal) => ask(`${job(id)}/events${query({ limit: 100, ...page })}`, { signal }),
  checkpoints: (id, page, signal) => ask(`${job(id)}/checkpoints${query({ limit: 50, ...page })}`, { signal }),
  metrics: (id, after, signal) => ask(`/api/jobs/${part(id)}/metrics${query({ after })}`, { signal }),
};

export const paths = {
  adapter: (id) => `/api/jobs/${part(id)}/adapter.zip`,
  report: (id) => `/api/jobs/${part(id)}/report`,
  content: (id) => `/v1/files/${part(id)}/content`,
};

/**
 * Upload a file; `onProgress(share)` is called on the way. XMLHttpRequest, since fetch tells nothing of an upload.
 * @returns OpenAI's file object
 */
export function upload(file, onProgress, signal) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file);
  const request = new XMLHttpRequest();
  request.open("POST", "/v1/files");
  request.responseType = "json";
  for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
  return new Promise((resolve, reject) => {
    request.upload.addEventListener("progress", (event) => event.total && onProgress(event.loaded / event.total));
    request.addEventListener("load", () => {
      if (request.status < 300 && request.response) return resolve(request.response);
      const error = new Refused(request.status, request.response?.error);
      if (error.status === 401) connection.dispatchEvent(new CustomEvent("key", { detail: error.message }));
      return reject(error);
    });
    request.addEventListener("error", () => {
      unanswered();
      reject(new Unreachable());
    });
    request.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

/** Fetch a file with the key and hand it to the browser as a download: a plain link cannot carry the key. */
export async function download(path, filename) {
  const response = await send(path, { timeout: null });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/**
 * Stream a chat completion: yields the chunks of OpenAI's API as they come.
 * @throws Refused, also for an error sent in the middle of the stream; Unreachable when the stream breaks off.
 */
export async function* streamChat(body, signal) {
  const json = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("/v1/chat/completions", { method: "POST", json, signal, timeout: null });
  for await (const data of serverEvents(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.status ?? 500, chunk.error);
    yield chunk;
  }
  unanswered(); // the end came without [DONE]
  throw new Unreachable();
}

/** The data of each server-sent event. */
async function* serverEvents(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read().catch((error) => {
      if (signal?.aborted) throw error;
      unanswered();
      throw new Unreachable();
    });
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop(); // perhaps half a line
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
