// Node's clients of OpenAI's API, each by its ordinary use: node clients.mjs URL MODEL
import OpenAI from "openai";
import { generateObject, jsonSchema, generateText, streamText } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [baseURL, model] = process.argv.slice(2);
const apiKey = "none";
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Where do llamas live?" }];
let failed = 0;

async function check(name, run) {
  try {
    if (!(await run())) throw new Error("the answer is empty");
    console.log("ok", name);
  } catch (error) {
    failed += 1;
    console.log("FAILED", name, error.name, error.message);
  }
}

async function joined(stream, textOf) {
  let text = "";
  for await (const part of await stream) text += textOf(part) ?? "";
  return text;
}

async function raises(kind, run) {
  try {
    await run();
  } catch (error) {
    return error instanceof kind;
  }
  return false;
}

const { chat, completions, responses, models } = client;
const ask = { model, messages, max_tokens: 8 };
const complete = { model, prompt: "A llama", max_tokens: 8, temperature: 0 };
const respond = { model, input: "hi", max_output_tokens: 8 };
await check("openai: chat", async () => (await chat.completions.create(ask)).choices[0].message.content);
await check("openai: streamed chat", () =>
  joined(
    chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } }),
    (chunk) => chunk.choices[0]?.delta?.content,
  ));
await check("openai: chat.completions.stream", async () => (await chat.completions.stream(ask).finalChatCompletion()).id);
await check("openai: completion", async () => (await completions.create(complete)).choices[0].text);
await check("openai: streamed completion", () =>
  joined(completions.create({ ...complete, stream: true }), (chunk) => chunk.choices[0].text));
await check("openai: models", () => joined(models.list(), (found) => found.id));
await check("openai: a model", async () => (await models.retrieve(model)).id);
await check("openai: response", async () => (await responses.create(respond)).output_text);
await check("openai: streamed response", () =>
  joined(responses.create({ ...respond, stream: true }), (event) => event.type === "response.output_text.delta" && event.delta));
await check("openai: a stream is aborted", async () => {
  const stream = await chat.completions.create({ model, messages, stream: true });
  for await (const _ of stream) stream.controller.abort();
  return true;
});
await check("openai: BadRequestError", () => raises(OpenAI.BadRequestError, () => chat.completions.create({ ...ask, temperature: 9 })));
await check("openai: NotFoundError", () => raises(OpenAI.NotFoundError, () => models.retrieve("another")));
await check("openai: the request's id", async () => (await chat.completions.create(ask))._request_id);

const compatible = createOpenAICompatible({ name: "llama", baseURL, apiKey, includeUsage: true });
const structured = createOpenAICompatible({ name: "llama", baseURL, apiKey, supportsStructuredOutputs: true });
const schema = jsonSchema({
  type: "object",
  properties: { name: { enum: ["llama", "alpaca"] }, legs: { enum: [2, 4] } },
  required: ["name", "legs"],
  additionalProperties: false,
});
const openai = createOpenAI({ baseURL, apiKey });
const ways = {
  "openai-compatible chat": compatible(model),
  "openai-compatible completion": compatible.completionModel(model),
  "openai chat": openai.chat(model),
  "openai responses": openai(model),
  "openai completion": openai.completion(model),
};
for (const [name, way] of Object.entries(ways)) {
  const settings = { model: way, maxOutputTokens: 8, maxRetries: 0, temperature: 0 };
  await check(`ai: ${name}, generateText`, async () => (await generateText({ ...settings, prompt: "hi" })).text);
  await check(`ai: ${name}, streamText`, async () => {
    const streamed = streamText({ ...settings, prompt: "hi", onError: ({ error }) => { throw error; } });
    return (await joined(streamed.textStream, (text) => text)) && (await streamed.usage).totalTokens;
  });
  if (name.endsWith("completion")) continue;
  await check(`ai: ${name}, generateObject`, async () =>
    (await generateObject({ model: name.startsWith("openai-compatible") ? structured(model) : way, schema, prompt: "hi", maxRetries: 0 })).object.legs);
  const dialog = [
    { role: "user", content: "hi" },
    { role: "assistant", content: "hello" },
    { role: "user", content: [{ type: "text", text: "more" }] },
  ];
  const options = { topP: 0.9, seed: 3, presencePenalty: 0, frequencyPenalty: 0 };
  await check(`ai: ${name}, a dialog`, async () =>
    (await generateText({ ...settings, ...options, system: "Be brief.", messages: dialog })).finishReason);
}
process.exit(failed ? 1 : 0);
