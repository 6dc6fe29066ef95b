// Two workers and a requester whose connections are cut at random for some seconds.

import assert from "node:assert/strict";
import { test } from "node:test";

import { agent, Proxy, startHub } from "./harness.mjs";

const TASKS = 400;
const CUT_MS = 400; // Between two cuts: a session that is shorter than the pause before it doubles the next one.
const CHAOS_MS = 6000;

test("each task ends once, and none without a retry is done twice", async (t) => {
  const hub = await startHub(t);
  const proxies = await Promise.all([1, 2, 3].map(() => Proxy.open(t, hub.port)));
  const counts = new Map();
  for (const proxy of proxies.slice(1)) {
    const worker = agent(t, "worker", proxy.url);
    worker.capability("job", async (number, task) => {
      task.progress(0.1);
      await new Promise((resolve) => setTimeout(resolve, Math.random() * 100));
      const answer = number % 5 === 0 ? await task.ask(`which ${number}?`) : null;
      counts.set(number, (counts.get(number) ?? 0) + 1);
      return [number, answer];
    });
    worker.start().catch(() => {});
  }
  const me = agent(t, "requester", proxies[0].url);
  const chaos = setInterval(() => proxies[Math.floor(Math.random() * proxies.length)].cut(), CUT_MS);
  setTimeout(() => clearInterval(chaos), CHAOS_MS);
  const codes = await Promise.all(Array.from({ length: TASKS }, async (_, number) => {
    await new Promise((resolve) => setTimeout(resolve, (number * CHAOS_MS) / TASKS));
    const options = { wait: true, maxRetries: number % 2 ? 0 : 9, onQuestion: ({ text }) => text };
    try {
      const output = await me.delegate("job", number, options);
      assert.deepEqual(output, [number, number % 5 === 0 ? `which ${number}?` : null]);
      return "completed";
    } catch (error) {
      assert.equal(error.code, "agent_lost", error.stack);
      assert.equal(number % 2, 1, "a task with retries left was lost");
      return error.code;
    }
  }));
  assert.ok(codes.filter((code) => code === "completed").length > TASKS / 2);
  assert.deepEqual([...counts].filter(([number, count]) => number % 2 && count > 1), []);
});
