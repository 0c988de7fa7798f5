// What programs in JavaScript do through their packages: node packages.mjs URL MODEL prints what failed, by name.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { ChatOllama } from "@langchain/ollama";
import { ChatOpenAI } from "@langchain/openai";
import { generateObject, generateText, streamText, tool } from "ai";
import { Ollama } from "ollama";
import { createOllama } from "ollama-ai-provider-v2";
import OpenAI from "openai";
import { z } from "zod";

const [root, model] = process.argv.slice(2);
const base = root + "/v1";
const messages = [{ role: "user", content: "Say hi to Zürich 🙂." }];
const parameters = { type: "object", properties: { city: { type: "string", maxLength: 9 } }, required: ["city"] };
const weather = { type: "function", function: { name: "weather", description: "Tells it.", parameters } };
const failed = {};
let tried = 0;

async function check(name, run) {
  tried += 1;
  try {
    await run();
  } catch (error) {
    failed[name] = String(error?.stack ?? error);
  }
}

const openai = new OpenAI({ baseURL: base, apiKey: "x", maxRetries: 0 });
const asked = { model, messages, max_tokens: 60 };
const once = { tools: [weather], tool_choice: "required", parallel_tool_calls: false };

await check("openai: stream helper", async () => {
  const stream = openai.chat.completions.stream({ ...asked, max_tokens: 8, stream_options: { include_usage: true } });
  const reply = await stream.finalChatCompletion();
  assert.ok(reply.choices[0].message.content && reply.usage.total_tokens > 8);
});
await check("openai: calls, streamed", async () => {
  const stream = openai.chat.completions.stream({ ...asked, ...once });
  const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
  assert.ok("city" in JSON.parse(call.function.arguments));
});
await check("openai: custom tools", async () => {
  const grammar = { syntax: "regex", definition: "[A-Z]{3}" };
  const custom = { name: "code", format: { type: "grammar", grammar } };
  const choice = { type: "custom", custom: { name: "code" } };
  const reply = await openai.chat.completions.create({ ...asked, tools: [{ type: "custom", custom }], tool_choice: choice });
  assert.match(reply.choices[0].message.tool_calls[0].custom.input, /^[A-Z]{3}$/);
});
await check("openai: responses, streamed", async () => {
  const reply = await openai.responses.stream({ model, input: "Hi", max_output_tokens: 8 }).finalResponse();
  assert.ok(reply.output_text && reply.usage.output_tokens === 8);
});
await check("openai: aborted", async () => {
  const stream = await openai.chat.completions.create({ model, messages, stream: true, ignore_eos: true });
  let seen = 0;
  for await (const _ of stream) if (++seen === 3) stream.controller.abort();
  assert.ok(seen < 100);
});
await check("openai: errors", async () => {
  await assert.rejects(openai.chat.completions.create({ ...asked, model: "nobody" }), OpenAI.NotFoundError);
});

const anthropic = new Anthropic({ baseURL: root, apiKey: "x", maxRetries: 0 });
await check("anthropic: calls, streamed", async () => {
  const tools = [{ name: "weather", input_schema: parameters }];
  const choice = { type: "any", disable_parallel_tool_use: true };
  const stream = anthropic.messages.stream({ model, max_tokens: 60, messages, tools, tool_choice: choice });
  const reply = await stream.finalMessage();
  assert.equal(reply.stop_reason, "tool_use");
  assert.ok("city" in reply.content.at(-1).input);
  assert.ok((await anthropic.messages.countTokens({ model, messages })).input_tokens > 8);
});

const ollama = new Ollama({ host: root });
await check("ollama: list, show, chat", async () => {
  assert.ok((await ollama.list()).models[0].modified_at && (await ollama.show({ model })).capabilities.length);
  let last;
  for await (const part of await ollama.chat({ model, messages, stream: true, options: { num_predict: 8 } })) last = part;
  assert.equal(last.done_reason, "length");
});
await check("ollama: create, copy, delete", async () => {
  await ollama.create({ model: "pirate", from: model, system: "You are a pirate.", parameters: { num_predict: 3 } });
  assert.equal((await ollama.chat({ model: "pirate", messages })).eval_count, 3);
  await ollama.copy({ source: "pirate", destination: "captain" });
  await ollama.delete({ model: "pirate" });
  await ollama.delete({ model: "captain" });
});

const kinds = {
  "openai-compatible": createOpenAICompatible({ name: "p", baseURL: base, includeUsage: true, supportsStructuredOutputs: true }),
  "openai, chat": createOpenAI({ baseURL: base, apiKey: "x" }).chat,
  "openai, responses": createOpenAI({ baseURL: base, apiKey: "x" }),
  anthropic: createAnthropic({ baseURL: base, apiKey: "x" }),
  ollama: createOllama({ baseURL: root + "/api" }),
};
const tools = { weather: tool({ description: "Tells it.", inputSchema: z.object({ city: z.string().max(9) }) }) };
for (const [kind, provider] of Object.entries(kinds)) {
  const given = { model: provider(model), maxRetries: 0, maxOutputTokens: 120 };
  await check(`AI SDK, ${kind}: streamed`, async () => {
    const reply = streamText({ ...given, prompt: "Hi", maxOutputTokens: 8, onError: ({ error }) => assert.fail(error) });
    assert.ok((await reply.text) && (await reply.usage).inputTokens > 8);
  });
  await check(`AI SDK, ${kind}: calls`, async () => {
    const reply = await generateText({ ...given, prompt: "Weather in Rome?", tools, toolChoice: "required" });
    assert.ok("city" in reply.toolCalls[0].input);
  });
  await check(`AI SDK, ${kind}: an object`, async () => {
    const schema = z.object({ b: z.boolean() });
    assert.equal(typeof (await generateObject({ ...given, schema, prompt: "Yes?" })).object.b, "boolean");
  });
}

await check("LangChain: ChatOpenAI", async () => {
  const chat = new ChatOpenAI({ model, apiKey: "x", configuration: { baseURL: base }, maxTokens: 60, maxRetries: 0 });
  const reply = await chat.bindTools([weather], { tool_choice: "weather" }).invoke("Rome?");
  assert.ok("city" in reply.tool_calls[0].args);
  assert.equal(typeof (await chat.withStructuredOutput(z.object({ b: z.boolean() })).invoke("Yes?")).b, "boolean");
});
await check("LangChain: ChatOllama", async () => {
  const chat = new ChatOllama({ model, baseUrl: root, numPredict: 20, checkOrPullModel: true });
  let text = "";
  for await (const part of await chat.stream("Hi")) text += part.content;
  assert.ok(text);
});

console.log(JSON.stringify({ tried, failed }));
process.exit(0);
