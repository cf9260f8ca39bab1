// The life of a fine-tuning job through the official JavaScript client, with only OPENAI_BASE_URL set.
// node life.mjs MODEL TRAINING_FILE → prints what happened, as JSON; any surprise throws.

import assert from "node:assert/strict";
import { createReadStream, readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

const [model, path] = process.argv.slice(2);
const client = new OpenAI({ maxRetries: 0 });
const messages = [{ role: "user", content: "hello there friend" }];

async function all(pages) {
  const items = [];
  for await (const item of await pages) items.push(item);
  return items;
}

async function fails(Kind, promise) {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof Kind, `${error?.constructor?.name}: ${error}`);
    return error;
  }
  throw new Error(`no ${Kind.name}`);
}

// Files
const file = await client.files.create({ file: createReadStream(path), purpose: "fine-tune" });
assert.equal(file.bytes, readFileSync(path).length);
const second = await client.files.create({
  file: await toFile(readFileSync(path), "again.jsonl"),
  purpose: "fine-tune",
  expires_after: { anchor: "created_at", seconds: 3600 },
});
assert.equal(second.expires_at, second.created_at + 3600);
assert.deepEqual((await client.files.retrieve(file.id)).filename, file.filename);
assert.equal(await (await client.files.content(file.id)).text(), readFileSync(path, "utf8"));
assert.ok((await all(client.files.list({ limit: 1 }))).some((entry) => entry.id === file.id));
assert.equal((await client.files.delete(second.id)).deleted, true);
await fails(OpenAI.NotFoundError, client.files.retrieve(second.id));

// A job
const jobs = client.fineTuning.jobs;
const created = await jobs.create({
  model,
  training_file: file.id,
  suffix: "from js",
  metadata: { from: "js" },
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1, batch_size: 4 } } },
});
let job = created;
const until = Date.now() + 600_000;
while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  assert.ok(Date.now() < until, `still ${job.status}`);
  await new Promise((resolve) => setTimeout(resolve, 200));
  job = await jobs.retrieve(created.id);
}
assert.equal(job.status, "succeeded", JSON.stringify(job.error));
assert.equal(job.hyperparameters.n_epochs, 1);
assert.deepEqual(
  (await all(jobs.list({ metadata: { from: "js" } }))).map((entry) => entry.id),
  [job.id],
);
const events = await all(jobs.listEvents(job.id, { limit: 2 }));
assert.equal(new Set(events.map((event) => event.id)).size, events.length);
assert.ok(events.some((event) => event.type === "metrics" && event.data.train_loss > 0));
const checkpoints = await all(jobs.checkpoints.list(job.id, { limit: 1 }));
assert.ok(checkpoints.every((entry) => entry.fine_tuning_job_id === job.id));
await fails(OpenAI.BadRequestError, jobs.cancel(job.id));

const other = await jobs.create({ model, training_file: file.id, hyperparameters: { n_epochs: 50, batch_size: 1 } });
assert.equal((await jobs.pause(other.id)).status, "paused");
assert.ok(["queued", "validating_files"].includes((await jobs.resume(other.id)).status));
assert.equal((await jobs.cancel(other.id)).status, "cancelled");

// Answers
const tuned = job.fine_tuned_model;
const answer = await client.chat.completions.create({ model: tuned, messages, max_tokens: 4, temperature: 0 });
const stream = await client.chat.completions.create({
  model: tuned,
  messages,
  max_tokens: 4,
  temperature: 0,
  stream: true,
  stream_options: { include_usage: true },
});
let text = "";
let usage = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, answer.choices[0].message.content);
assert.deepEqual(usage.total_tokens, answer.usage.total_tokens);
const helper = client.chat.completions.stream({ model: tuned, messages, max_tokens: 4, temperature: 0 });
assert.equal(await helper.finalContent(), text);
const plain = await client.completions.create({ model: tuned, prompt: "hello", max_tokens: 3 });
assert.equal(plain.object, "text_completion");

// Mistakes
const unknown = await fails(OpenAI.NotFoundError, client.chat.completions.create({ model: "gpt-9", messages }));
assert.equal(unknown.code, "model_not_found");
const wrong = await fails(
  OpenAI.BadRequestError,
  client.chat.completions.create({ model, messages, temprature: 1 }),
);
assert.equal(wrong.param, "temprature");

// Models
assert.ok((await all(client.models.list())).some((entry) => entry.id === tuned));
assert.equal((await client.models.retrieve(tuned)).id, tuned);
assert.equal((await client.models.delete(tuned)).deleted, true);
await fails(OpenAI.NotFoundError, client.models.retrieve(tuned));

console.log(JSON.stringify({ tuned, text, events: events.length, checkpoints: checkpoints.length }));
