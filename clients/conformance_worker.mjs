// The JavaScript client, as clients/conformance.py checks it: --client 'node clients/conformance_worker.mjs'.

import { Agent, TaskFailed } from "./agenthub.mjs";

const agent = new Agent("checked");
agent.capability("echo", (input) => input);
agent.capability("sleep", (seconds, task) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, seconds * 1000, seconds);
  task.signal.addEventListener("abort", () => (clearTimeout(timer), reject(task.signal.reason)));
}));
agent.capability("fail", () => { throw new TaskFailed("as it was asked to", "own"); });
agent.capability("relay", (input, task) => task.delegate("elsewhere", input));
agent.capability("answer", (input, task) => task.delegate("elsewhere", input, { onQuestion: ({ text }) => text }));
agent.capability("ask", async (texts, task) => {
  const answers = [];
  for (const text of texts) answers.push(await task.ask(text));
  return answers;
});
agent.capability("stream", async function* (items) { yield* items; });
await agent.start();
