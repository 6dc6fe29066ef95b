// Two agents that delegate to each other, each behind a proxy that splits, delays, stalls, half-closes and cuts what goes
// through it at any byte. AGENTHUB_TEST_SEED replays a run, as far as the network is concerned.

import assert from "node:assert/strict";
import { once } from "node:events";
import net from "node:net";
import { test } from "node:test";

import { agent, atEnd, startHub, within } from "./harness.mjs";

const SEED = Number(process.env.AGENTHUB_TEST_SEED ?? Math.floor(Math.random() * 2 ** 32));
const TASKS = 200; // In each direction.
const AT_ONCE = 20;
const MISHAPS = 25; // Of each proxy; afterwards it only forwards.
const BYTES = [1, 12_000]; // Between which a connection's mishap comes, counted over both directions.
const HEARTBEAT_S = 0.3; // A stalled connection is noticed after three of them.

/** Return a function that returns random numbers from 0 to 1 (mulberry32). */
function seeded(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** What happens to a connection: `from` is the end that has just sent something, `to` the other one. */
const ENDINGS = {
  cut: (from, to) => [from, to].forEach((socket) => socket.destroy()),
  reset: (from, to) => [from, to].forEach((socket) => socket.resetAndDestroy()),
  halfClose: (from, to) => to.end(), // It can still send, and is not read any more.
  stall: (from, to) => { to.write = () => true; }, // Nothing arrives there any more, and nothing is closed.
};

class HostileProxy {
  #random;
  #left = MISHAPS;
  #sockets = new Set();
  happened = [];

  static async open(t, port, random) {
    const proxy = new HostileProxy();
    proxy.#random = random;
    const server = net.createServer({ allowHalfOpen: true }, (near) => {
      const far = net.connect({ port, host: "127.0.0.1", allowHalfOpen: true });
      proxy.#join(near, far);
    });
    atEnd(t, () => (server.close(), proxy.#sockets.forEach((socket) => socket.destroy())));
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    proxy.url = `ws://127.0.0.1:${server.address().port}`;
    return proxy;
  }

  #pick = (low, high) => low + Math.floor(this.#random() * (high - low));

  #join(near, far) {
    const [names, isDoomed] = [Object.keys(ENDINGS), this.#left-- > 0];
    const ending = names[this.#pick(0, names.length)];
    let left = isDoomed ? this.#pick(...BYTES) : Infinity;
    for (const [from, to] of [[near, far], [far, near]]) {
      let sent = Promise.resolve();
      this.#sockets.add(from);
      from.setNoDelay(true);
      from.on("error", () => {});
      from.on("end", () => { sent = sent.then(() => to.end()); });
      from.on("close", () => (this.#sockets.delete(from), to.destroy()));
      from.on("data", (bytes) => { sent = sent.then(() => forward(bytes, from, to)); });
    }
    const forward = async (bytes, from, to) => {
      while (bytes.length && left > 0) {
        const part = bytes.subarray(0, Math.min(left, this.#pick(1, 2 * bytes.length + 1)));
        bytes = bytes.subarray(part.length);
        if (isDoomed && this.#random() < 0.3) await new Promise((resolve) => setTimeout(resolve, this.#pick(0, 4)));
        to.write(part);
        left -= part.length;
      }
      if (left > 0 || left === -1) return;
      left = -1; // Nothing more goes through, in either direction.
      this.happened.push(ending);
      ENDINGS[ending](from, to);
    };
  }
}

test(`tasks in both directions end once on a bad network (seed ${SEED})`, async (t) => {
  const hub = await startHub(t, "--heartbeat", String(HEARTBEAT_S), "--grace", "60");
  const random = seeded(SEED);
  Math.random = () => random() / 50; // Short pauses before the next attempt.
  const proxies = [await HostileProxy.open(t, hub.port, random), await HostileProxy.open(t, hub.port, random)];
  const runs = new Map(); // By task: how often its handler was started.
  const agents = proxies.map(({ url }, side) => {
    const made = agent(t, `side-${side}`, url, { maxTasks: AT_ONCE });
    made.capability(`work-${side}`, async (number, task) => {
      const key = `${side}:${number}`;
      runs.set(key, (runs.get(key) ?? 0) + 1);
      task.progress(0.5, "x".repeat(number));
      const answer = number % 4 === 0 ? await task.ask(`which ${number}?`) : null;
      return { number, answer, padding: "世".repeat(number) };
    });
    return made;
  });
  await within(Promise.all(agents.map((one) => one.start())), "both agents to join");
  const outcomes = { completed: 0, agent_lost: 0 };
  const begin = async (side, number) => {
    const isOnce = number % 2 === 0;
    const options = { wait: true, ttl: 120, maxRetries: isOnce ? 0 : 50, onQuestion: ({ text }) => text };
    try {
      const output = await agents[1 - side].delegate(`work-${side}`, number, options);
      const answer = number % 4 === 0 ? `which ${number}?` : null;
      assert.deepEqual(output, { number, answer, padding: "世".repeat(number) });
      outcomes.completed++;
    } catch (error) {
      assert.equal(error.code, "agent_lost", error.stack); // It was cut on its way to the worker.
      assert.ok(isOnce, `task ${number}, which could be retried, was lost`);
      assert.ok((runs.get(`${side}:${number}`) ?? 0) <= 1);
      outcomes.agent_lost++;
    }
  };
  const lane = async (side, first) => {
    for (let number = first; number < TASKS; number += AT_ONCE) await begin(side, number);
  };
  await Promise.all([0, 1].flatMap((side) => Array.from({ length: AT_ONCE }, (_, first) => lane(side, first))));
  assert.equal(outcomes.completed + outcomes.agent_lost, 2 * TASKS);
  assert.ok(outcomes.completed > TASKS, JSON.stringify(outcomes));
  const twice = [...runs].filter(([key, count]) => Number(key.split(":")[1]) % 2 === 0 && count > 1);
  assert.deepEqual(twice, []);
  const { tasks } = (await agents[0].status()).hub;
  assert.equal(tasks.pending + tasks.in_progress, 0);
  for (const name of Object.keys(ENDINGS)) {
    assert.ok(proxies.some(({ happened }) => happened.includes(name)), `no ${name} happened`);
  }
  if (process.env.AGENTHUB_TEST_LOG) console.warn(outcomes, proxies.map(({ happened }) => happened.length));
});
