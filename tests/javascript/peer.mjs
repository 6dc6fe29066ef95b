// One end of a conversation with the Python SDK: node peer.mjs worker|requester; AGENTHUB_URL is the hub's.

import { Agent, TaskFailed } from "../../clients/agenthub.mjs";

const OPTIONS = process.env.AGENTHUB_TEST_WS ? { WebSocket: (await import(process.env.AGENTHUB_TEST_WS)).default } : {};
const agent = new Agent("peer", OPTIONS);

async function work() {
  agent.capability("double", { type: "object", required: ["value"] }, ({ value }, task) => {
    task.progress(0.5, value);
    return [value, value];
  });
  agent.capability("refuse", () => { throw new TaskFailed("not today", "closed"); });
  agent.capability("wait", (_, task) => new Promise((_, reject) => {
    task.signal.addEventListener("abort", () => reject(task.signal.reason));
  }));
  process.once("SIGTERM", () => agent.close({ drain: 10 }));
  await agent.start();
  console.log("ready");
  await agent.closed;
}

async function request() {
  const numbers = Array.from({ length: 1000 }, (_, number) => number);
  const doubled = await Promise.all(numbers.map((value) => agent.delegate("double", { value }, { wait: true })));
  const handle = await agent.submit("double", { value: "Grüße 😀" });
  const events = [];
  for await (const { progress, detail } of handle) events.push([progress, detail]);
  const failures = [];
  for (const [capability, options] of [["refuse", {}], ["wait", { ttl: 0.1 }], ["none", {}], ["double", {}]]) {
    await agent.delegate(capability, null, options).catch(({ name, code }) => failures.push([name, code]));
  }
  console.log(JSON.stringify({ doubled, events, output: await handle.result(), failures }));
  await agent.close();
}

await { worker: work, requester: request }[process.argv[2]]();
