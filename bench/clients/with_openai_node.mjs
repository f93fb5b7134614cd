// The openai package for Node.
import { appendFileSync } from "node:fs";
import { createRequire } from "node:module";
import { parseArgs } from "node:util";
import assert from "node:assert";

const OpenAI = createRequire(process.env.NODE_PATH + "/")("openai").OpenAI;
const text = { type: "string" };
const given = parseArgs({ options: { url: text, model: text, scratch: text, record: text } }).values;
const client = new OpenAI({ baseURL: given.url + "/v1", apiKey: "none", timeout: 600_000, maxRetries: 0 });
const model = "smollm2";
const messages = [{ role: "user", content: "What is the capital of France? Answer in one word." }];
const chats = { model, messages, max_completion_tokens: 16, temperature: 0 };

const checks = {
  "models": async () => (await client.models.list()).data.map((one) => one.id),
  "chat": async () => (await client.chat.completions.create(chats)).choices[0].message.content,
  "chat streamed with usage": async () => {
    const whole = await client.chat.completions.create(chats);
    const stream = await client.chat.completions.create({ ...chats, stream: true, stream_options: { include_usage: true } });
    let said = "", usage = null;
    for await (const chunk of stream) {
      said += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(said, whole.choices[0].message.content);
    assert.deepEqual(usage, whole.usage);
    return said;
  },
  "chat through the stream helper": async () => await client.chat.completions.stream(chats).finalContent(),
  "a stream that is broken off": async () => {
    const stream = await client.chat.completions.create({ ...chats, max_completion_tokens: 500, stream: true });
    for await (const chunk of stream) if (chunk.choices[0]?.delta?.content) { stream.controller.abort(); break; }
    return "aborted";
  },
  "chat with logprobs": async () => {
    const choice = (await client.chat.completions.create({ ...chats, logprobs: true, top_logprobs: 2 })).choices[0];
    const bytes = choice.logprobs.content.flatMap((token) => token.bytes);
    const said = new TextDecoder().decode(new Uint8Array(bytes)).replace("<|im_end|>", "");
    assert.equal(said, choice.message.content);
    return said;
  },
  "completion": async () => (await client.completions.create({ model, prompt: "One, two,", max_tokens: 8 })).choices[0].text,
  "completion streamed": async () => {
    const asked = { model, prompt: "Ünïcödé 🙂 日本", max_tokens: 24, temperature: 0 };
    const whole = await client.completions.create(asked);
    let said = "";
    for await (const chunk of await client.completions.create({ ...asked, stream: true })) said += chunk.choices[0].text;
    assert.equal(said, whole.choices[0].text);
    return said;
  },
  "completion with echo and logprobs": async () => {
    const asked = { model, prompt: "One, two, three, four", max_tokens: 1, echo: true, logprobs: 1 };
    const told = (await client.completions.create(asked)).choices[0].logprobs;
    assert.equal(told.token_logprobs[0], null);
    return told.tokens;
  },
  "another model": async () => {
    await assert.rejects(client.chat.completions.create({ ...chats, model: "gpt-4o" }), OpenAI.NotFoundError);
    return "NotFoundError";
  },
  "tools": async () => {
    const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object", properties: {} } } }];
    return (await client.chat.completions.create({ ...chats, tools })).choices[0].message.content;
  },
  "json schema": async () => {
    const schema = { name: "city", schema: { type: "object", properties: { city: { type: "string" } } } };
    const response_format = { type: "json_schema", json_schema: schema };
    return (await client.chat.completions.create({ ...chats, response_format })).choices[0].message.content;
  },
  "responses": async () => (await client.responses.create({ model, input: "Hello" })).output_text,
};

for (const [what, check] of Object.entries(checks)) {
  const began = Date.now() / 1000;
  let told = null, error = null;
  try {
    told = await check();
  } catch (raised) {
    console.error(raised);
    error = `${raised?.constructor?.name}: ${raised?.message}`;
  }
  appendFileSync(given.record, JSON.stringify({ what, began, ended: Date.now() / 1000, told, error }) + "\n");
}
