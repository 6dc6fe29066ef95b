// The JavaScript client against the real hub. tests/test_javascript.py runs it: node --test tests/javascript

import assert from "node:assert/strict";
import http from "node:http";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { after, before, test } from "node:test";

import { Agent, AgentHubError, Disconnected, Refused, TaskFailed, TaskTimeout } from "../../clients/agenthub.mjs";
import { agent, atEnd, gate, Proxy, startHub, until, within } from "./harness.mjs";

const failsWith = (kind, code) => (error) => error instanceof kind && error.code === code;
let hub;
before(async () => { hub = await startHub(null); });
after(() => hub.kill());

/** An agent with the capabilities that most tests use. */
async function worker(t, url = hub.url, prefix = "", options = {}) {
  const made = agent(t, "worker", url, options);
  made.capability(`${prefix}echo`, { type: "object", description: "Returns its input" }, (input) => input);
  made.capability(`${prefix}count`, async function* (to) {
    for (let number = 0; number < to; number++) yield { number };
  });
  made.capability(`${prefix}ask`, async (input, task) => ["you said", await task.ask(input, { schema: { type: "string" } })]);
  made.capability(`${prefix}wait`, (input, task) => new Promise((_, reject) => {
    task.signal.addEventListener("abort", () => reject(task.signal.reason));
  }));
  await within(made.start(), "the worker to join");
  return made;
}

test("a task has one outcome, which is any JSON", async (t) => {
  await worker(t, hub.url, "one-");
  const me = agent(t, "requester", hub.url);
  for (const value of [null, false, 0, "", "Grüße 世界 😀 \u2028", [], { a: [{ b: null }] }, "x".repeat(900_000)]) {
    assert.deepEqual(await me.delegate("one-echo", value), value);
  }
  assert.equal(await me.delegate("one-echo"), null);
});

test("a failure has the code and the message that the handler chose", async (t) => {
  const made = agent(t, "failing", hub.url);
  made.capability("own", () => { throw new TaskFailed("not today", "closed"); });
  made.capability("other", async () => { throw new RangeError("too far"); });
  made.capability("nothing", () => { throw undefined; });
  made.capability("symbol", () => { throw Symbol("odd"); });
  made.capability("textless", () => { throw Object.create(null); });
  made.capability("subtask", async (input, task) => task.delegate("own"));
  made.capability("big", () => 10n);
  made.capability("deep", () => JSON.parse("[".repeat(100) + "]".repeat(100)));
  made.capability("long", () => "x".repeat(2_000_000));
  made.capability("code", () => { throw new TaskFailed("no", "bad\ncode"); });
  made.capability("refused", () => { throw new TaskFailed("refused: no", "bad\ncode"); });
  await made.start();
  const me = agent(t, "requester", hub.url);
  await assert.rejects(me.delegate("own"), { code: "closed", message: "not today", name: "TaskFailed" });
  await assert.rejects(me.delegate("other"), { code: "failed", message: "RangeError: too far" });
  await assert.rejects(me.delegate("nothing"), { code: "failed" });
  await assert.rejects(me.delegate("symbol"), { code: "failed", message: "Symbol(odd)" });
  await assert.rejects(me.delegate("textless"), { code: "failed", message: "object without a text" });
  await assert.rejects(me.delegate("subtask"), { code: "failed", message: /no slot for "own"/ });
  await assert.rejects(me.delegate("big"), { code: "failed", message: /BigInt/ });
  await assert.rejects(me.delegate("deep"), { code: "failed", message: /refused/ });
  await assert.rejects(me.delegate("long"), { code: "too_large" });
  for (const name of ["code", "refused"]) await assert.rejects(me.delegate(name), { code: "failed", message: /refused/ });
  await assert.rejects(me.delegate(null, null, { agentId: made.agentId }), failsWith(TaskFailed, "no_handler"));
});

test("what cannot be sent is refused at once", async (t) => {
  const me = agent(t, "requester", hub.url);
  await assert.rejects(me.delegate("none"), failsWith(Refused, "no_agent"));
  await assert.rejects(me.delegate("none", "x".repeat(2_000_000)), failsWith(Refused, "too_large"));
  await assert.rejects(me.delegate("none", 10n), TypeError);
  await assert.rejects(me.delegate("none", () => {}), TypeError);
  for (const ttl of [0, -1, NaN, 1e9, "60x"]) await assert.rejects(me.delegate("none", null, { ttl }), RangeError);
  await assert.rejects(me.delegate("none", null, { signal: AbortSignal.abort() }), { name: "AbortError" });
  const waiting = await me.submit("later", null, { wait: true, taskId: "js-twice" });
  await assert.rejects(me.submit("later", null, { wait: true, taskId: "js-twice" }), TypeError);
  await waiting.cancel();
  await assert.rejects(waiting.result(), failsWith(TaskFailed, "cancelled"));
  await waiting.cancel();
  for (const url of ["http://127.0.0.1:1", "127.0.0.1", "ws://a,b"]) assert.throws(() => new Agent("x", { url }), TypeError);
  for (const maxTasks of [0, 1.5, 10_001, NaN]) assert.throws(() => new Agent("x", { maxTasks }), RangeError);
  assert.throws(() => me.capability("x", {}), TypeError);
  me.capability("x", () => 1);
  assert.throws(() => me.capability("x", () => 1), TypeError);
});

test("a handle yields progress, in order, until the outcome", async (t) => {
  const made = agent(t, "reporting", hub.url);
  made.capability("report", async (input, task) => {
    task.progress(0.5, "half");
    task.progress(null, { lines: 2 });
    assert.ok(task.deadline > 0 && task.requester && task.attempt === 1);
    return task.trace;
  });
  await made.start();
  const handle = await agent(t, "requester", hub.url).submit("report", null, { trace: { traceparent: "00-1" } });
  const events = [];
  for await (const event of handle) events.push([event.seq, event.progress ?? null, event.detail]);
  assert.deepEqual(events, [[1, 0.5, "half"], [2, null, { lines: 2 }]]);
  assert.deepEqual(await handle.result(), { traceparent: "00-1" });
  assert.equal(handle.done, true);
});

async function all(pieces) {
  const found = [];
  for await (const piece of pieces) found.push(piece);
  return found;
}

test("an async generator streams pieces of its output, which is the whole", async (t) => {
  const made = await worker(t, hub.url, "gen-");
  let isClosed = false;
  made.capability("gen-drip", async function* () {
    try {
      for (let number = 0; ; number++) yield await new Promise((resolve) => setTimeout(resolve, 5, number));
    } finally {
      isClosed = true;
    }
  });
  made.capability("gen-text", async function* () { yield* ["Grüße, ", "", "世界"]; });
  made.capability("gen-nothing", async function* () {});
  made.capability("gen-mixed", async function* () { yield* ["a", null, 1, { b: 2 }]; });
  const me = agent(t, "requester", hub.url);
  const numbers = Array.from({ length: 500 }, (_, number) => ({ number }));
  assert.deepEqual(await all(me.stream("gen-count", 500)), numbers);
  assert.deepEqual(await me.delegate("gen-count", 500), numbers);
  assert.deepEqual((await all(me.stream("gen-text"))).join(""), "Grüße, 世界");
  assert.equal(await me.delegate("gen-text"), "Grüße, 世界");
  assert.equal(await me.delegate("gen-nothing"), "");
  assert.deepEqual(await me.delegate("gen-mixed"), ["a", null, 1, { b: 2 }]);
  assert.deepEqual(await all(me.stream("gen-echo", [1, 2])), [1, 2]);
  assert.deepEqual(await all(me.stream("gen-echo", { a: 1 })), [{ a: 1 }]);
  assert.deepEqual(await all(me.stream("gen-echo", null)), []);
  for await (const piece of me.stream("gen-drip")) if (piece === 3) break;
  await until(() => isClosed, "the generator to be closed");
});

test("an output of pieces that becomes too large fails its task", async (t) => {
  const made = agent(t, "streaming", hub.url);
  made.capability("large", async function* () { for (;;) yield "x".repeat(100_000); });
  made.capability("huge", async function* () { yield "世".repeat(400_000); });
  await made.start();
  const me = agent(t, "requester", hub.url);
  for (const capability of ["large", "huge"]) await assert.rejects(all(me.stream(capability)), { code: "too_large" });
  assert.equal((await me.status()).hub.closed["1009"], undefined);
});

test("a slow loop over a stream gets all pieces in the end", async (t) => {
  await worker(t, hub.url, "slow-");
  const me = agent(t, "requester", hub.url);
  const found = [];
  for await (const piece of me.stream("slow-count", 2_000)) {
    if (!found.length) await until(async () => (await me.status()).hub.tasks.in_progress === 0, "the end of the task");
    found.push(piece.number);
  }
  assert.deepEqual(found, Array.from({ length: 2_000 }, (_, number) => number));
});

test("the rest of a stream comes with the output after a lost connection", async (t) => {
  for (const side of [0, 1]) {
    const proxy = await Proxy.open(t, hub.port);
    const urls = side === 0 ? [proxy.url, hub.url] : [hub.url, proxy.url];
    const made = agent(t, "streaming", urls[0]);
    const go = gate();
    made.capability(`rest-${side}`, async function* () {
      yield* ["a", "b"];
      await go.opened;
      yield* ["c", "d"];
    });
    await made.start();
    const me = agent(t, "requester", urls[1]);
    const found = [];
    for await (const piece of me.stream(`rest-${side}`)) {
      found.push(piece);
      if (found.length === 2) {
        await proxy.cutOff(side === 0 ? made : me, go.open);
      }
    }
    assert.equal(found.join(""), "abcd");
  }
});

test("a stream whose first pieces were lost yields all of the output", async (t) => {
  const proxy = await Proxy.open(t, hub.port);
  const made = agent(t, "streaming", hub.url);
  const [begun, first, second] = [gate(), gate(), gate()];
  made.capability("lost-first", async function* () {
    begun.open();
    await first.opened;
    yield "a";
    await second.opened;
    yield "b";
  });
  await made.start();
  const me = agent(t, "requester", proxy.url);
  const stream = all(me.stream("lost-first"));
  await begun.opened;
  await proxy.cutOff(me, first.open);
  await until(() => me.online, "the requester to be back");
  second.open();
  assert.equal((await within(stream, "the stream")).join(""), "ab");
});

test("a stream whose task is begun again goes on where it can", async (t) => {
  const me = agent(t, "requester", hub.url);
  for (const [name, before, after, found] of [
    ["again-none", [], ["x", "y"], ["x", "y"]],
    ["again-same", ["a"], ["ab", "c"], ["a", "bc"]],
    ["again-other", ["a"], ["x", "y"], null],
  ]) {
    const begun = gate();
    const [first, second] = [agent(t, "first", hub.url), agent(t, "second", hub.url)];
    first.capability(name, async function* (input, task) {
      yield* before;
      begun.open();
      await new Promise((resolve) => task.signal.addEventListener("abort", resolve));
    });
    second.capability(name, async function* () { yield* after; });
    await first.start();
    const stream = all(me.stream(name, null, { maxRetries: 1 }));
    await begun.opened;
    await second.start();
    await first.close();
    if (found) assert.deepEqual(await within(stream, "the stream"), found);
    else await assert.rejects(within(stream, "the error"), failsWith(TaskFailed, "pieces_lost"));
  }
});

test("a worker asks its requester", async (t) => {
  await worker(t, hub.url, "ask-");
  const me = agent(t, "requester", hub.url);
  const onQuestion = async ({ text, schema, ask }) => [text, schema, ask];
  const answer = await me.delegate("ask-ask", "which?", { onQuestion });
  assert.deepEqual(answer, ["you said", ["which?", { type: "string" }, 1]]);
  await assert.rejects(me.delegate("ask-ask", "which?"), failsWith(TaskFailed, "no_answers"));
  const handle = await me.submit("ask-ask", "which?", { answers: true });
  for await (const { question } of handle) assert.equal(await handle.answer(question.text.length), true);
  assert.deepEqual(await handle.result(), ["you said", 6]);
  assert.equal(await handle.answer("late"), false);
  const made = agent(t, "curious", hub.url);
  made.capability("two", async (input, task) => [await Promise.all([task.ask("a"), task.ask("b")]), task.trace]);
  made.capability("outer", (input, task) => task.delegate("ask-ask", "sub", { onQuestion: () => task.ask("passed on") }));
  await made.start();
  const both = await me.delegate("two", null, { onQuestion: ({ text, ask }) => [text, ask], trace: { a: "b" } });
  assert.deepEqual(both, [[["a", 1], ["b", 2]], { a: "b" }]);
  assert.deepEqual(await me.delegate("outer", null, { onQuestion: ({ text }) => text }), ["you said", "passed on"]);
  const failing = me.delegate("ask-ask", "which?", { onQuestion: () => { throw new RangeError("mine"); } });
  await assert.rejects(failing, RangeError);
  await until(async () => (await me.status()).hub.tasks.in_progress === 0, "the task to be cancelled");
});

test("a handler is aborted when its task ends without it", async (t) => {
  const made = agent(t, "waiting", hub.url);
  const reasons = [];
  made.capability("abort", (input, task) => new Promise((_, reject) => {
    task.signal.addEventListener("abort", () => (reasons.push(task.signal.reason.code), reject(task.signal.reason)));
  }));
  await made.start();
  const me = agent(t, "requester", hub.url);
  await assert.rejects(me.delegate("abort", null, { ttl: 0.1 }), failsWith(TaskTimeout, "timeout"));
  await assert.rejects(me.delegate("abort", null, { signal: AbortSignal.timeout(50) }), { name: "TimeoutError" });
  const handle = await me.submit("abort");
  await handle.cancel("enough");
  await assert.rejects(handle.result(), { code: "cancelled", message: "enough" });
  await until(() => reasons.length === 3, "the handlers to be aborted");
  assert.equal(reasons[0], "timeout");
});

test("a subtask ends with its parent task", async (t) => {
  await worker(t, hub.url, "sub-");
  const made = agent(t, "parent", hub.url);
  made.capability("sub-parent", async (input, task) => task.delegate("sub-wait"));
  made.capability("sub-double", async (input, task) => [await task.delegate("sub-echo", input), task.signal.aborted]);
  await made.start();
  const me = agent(t, "requester", hub.url);
  assert.deepEqual(await me.delegate("sub-double", 7), [7, false]);
  await assert.rejects(me.delegate("sub-parent", null, { ttl: 0.2 }), failsWith(TaskTimeout, "timeout"));
  await until(async () => (await me.status()).hub.tasks.in_progress === 0, "the subtask to end");
});

test("agents discover each other and broadcast", async (t) => {
  const [me, other] = [agent(t, "requester", hub.url), agent(t, "unique-name", hub.url, { metadata: { a: 1 }, description: "d" })];
  const heard = gate();
  other.onBroadcast = (message, sender) => heard.open([message, sender]);
  other.capability("unique-capability", { description: "Unique", type: "object" }, () => 1);
  await other.start();
  const [found] = await me.discover("unique-capability");
  assert.deepEqual([found.agent_id, found.metadata, found.capabilities[0].description], [other.agentId, { a: 1 }, "Unique"]);
  other.capability("unique-later", () => 1);
  await until(async () => (await me.discover("unique-later")).length === 1, "the new capability");
  assert.equal(await me.broadcast({ deploy: 2 }, "unique-capability"), 1);
  assert.deepEqual(await within(heard.opened, "the broadcast"), [{ deploy: 2 }, me.agentId]);
  await assert.rejects(me.status("js-unknown"), failsWith(Refused, "unknown_task"));
});

test("a thousand tasks at once", async (t) => {
  await worker(t, hub.url, "many-");
  const me = agent(t, "requester", hub.url);
  const numbers = Array.from({ length: 1000 }, (_, number) => number);
  assert.deepEqual(await Promise.all(numbers.map((number) => me.delegate("many-echo", number))), numbers);
});

/** A task with progress, a question and an outcome, with both agents behind a proxy each; return how often it was done. */
async function converse(t, name, workerUrl, requesterUrl) {
  const made = agent(t, `worker-${name}`, workerUrl);
  let done = 0;
  made.capability(`talk-${name}`, async (input, task) => {
    task.progress(0.5);
    const answer = await task.ask("which?");
    done++;
    return [input, answer];
  });
  const me = agent(t, `requester-${name}`, requesterUrl);
  await within(made.start(), `worker-${name} to join`);
  const asked = [];
  const onQuestion = ({ ask }) => (asked.push(ask), "blue");
  const output = await within(me.delegate(`talk-${name}`, name, { maxRetries: 1, onQuestion }), `the outcome of ${name}`);
  assert.deepEqual(output, [name, "blue"]);
  assert.deepEqual(asked, [1]);
  await within(Promise.all([me.close(), made.close()]), `the agents of ${name} to leave`);
  return done;
}

test("a task that was accepted is done once, wherever a connection is cut", async (t) => {
  const probes = [await Proxy.open(t, hub.port), await Proxy.open(t, hub.port)];
  await converse(t, "uncut", probes[0].url, probes[1].url);
  const cases = [];
  for (const [side, probe] of probes.entries()) {
    assert.ok(probe.seen >= 10, `${probe.seen} frames`);
    for (let cutAt = 1; cutAt <= probe.seen; cutAt++) for (const after of [false, true]) cases.push([side, cutAt, after]);
  }
  await Promise.all(cases.map(async ([side, cutAt, after]) => {
    const proxy = await Proxy.open(t, hub.port, cutAt, after);
    const urls = side === 0 ? [proxy.url, hub.url] : [hub.url, proxy.url];
    assert.equal(await converse(t, `${["worker", "requester"][side]}-${cutAt}-${after}`, ...urls), 1);
  }));
});

test("a result waits for the next connection", async (t) => {
  const proxy = await Proxy.open(t, hub.port);
  const [begun, go] = [gate(), gate()];
  const made = agent(t, "offline", proxy.url);
  made.capability("offline", async (input, task) => {
    begun.open();
    await go.opened;
    return "kept";
  });
  await made.start();
  const { agentId } = made;
  const handle = await agent(t, "requester", hub.url).submit("offline");
  await begun.opened;
  await proxy.cutOff(made, go.open);
  assert.equal(await within(handle.result(), "the result"), "kept");
  assert.equal(made.agentId, agentId);
});

test("a hub that falls silent is left after three heartbeat intervals", async (t) => {
  const quick = await startHub(t, "--heartbeat", "0.2");
  const proxy = await Proxy.open(t, quick.port);
  const made = await worker(t, proxy.url);
  const former = made.agentId;
  proxy.isDeaf = true;
  await until(() => !made.online, "the agent to notice");
  proxy.isDeaf = false;
  await until(() => made.online, "the agent to be back");
  assert.equal(made.agentId, former);
  assert.equal(await agent(t, "requester", quick.url).delegate("echo", 1), 1);
});

async function restarted(t, args) {
  const first = await startHub(t, ...args);
  return { first, again: () => startHub(t, ...args, "--port", String(first.port)) };
}

test("tasks survive a hub with a journal", async (t) => {
  const folder = await mkdtemp(path.join(os.tmpdir(), "agenthub-"));
  atEnd(t, () => rm(folder, { recursive: true }));
  const { first, again } = await restarted(t, ["--db", path.join(folder, "hub.db")]);
  const [me, made] = [agent(t, "requester", first.url), agent(t, "worker", first.url)];
  const [go, numbers] = [gate(), Array.from({ length: 100 }, (_, number) => number)];
  const counts = new Map();
  made.capability("hold", async (input) => {
    await go.opened;
    counts.set(input, (counts.get(input) ?? 0) + 1);
    return input;
  });
  made.capability("asks", (input, task) => task.ask("which?"));
  await made.start();
  const handles = await Promise.all(numbers.map((number) => me.submit("hold", number)));
  const [asked, answered] = [gate(), gate()];
  const asking = me.delegate("asks", null, { priority: 1, onQuestion: () => (asked.open(), answered.opened) });
  await first.kill();
  go.open();
  await again();
  assert.deepEqual(await within(Promise.all(handles.map((handle) => handle.result())), "the outcomes"), numbers);
  assert.deepEqual([...counts.values()], numbers.map(() => 1));
  await within(asked.opened, "the question");
  answered.open("blue");
  assert.equal(await within(asking, "the answer"), "blue");
});

test("a hub without a journal loses tasks, and those with a retry are submitted again", async (t) => {
  const { first, again } = await restarted(t, []);
  const [me, made] = [agent(t, "requester", first.url), agent(t, "worker", first.url)];
  let [begun, aborted] = [0, 0];
  made.capability("hang", (input, task) => input === "again" && aborted ? "done" : new Promise((_, reject) => {
    begun++;
    task.signal.addEventListener("abort", () => (aborted++, reject(task.signal.reason)));
  }));
  await made.start();
  const lost = await me.submit("hang", "lost");
  const retried = await me.submit("hang", "again", { maxRetries: 1 });
  const cancelled = await me.submit("hang", "cancelled", { maxRetries: 1 });
  const former = [made.agentId, me.agentId];
  await until(() => begun === 3, "the handlers to begin");
  await first.kill();
  cancelled.cancel().catch(() => {});
  await again();
  await assert.rejects(within(lost.result(), "hub_lost"), failsWith(TaskFailed, "hub_lost"));
  assert.equal(await within(retried.result(), "the second attempt"), "done");
  await assert.rejects(within(cancelled.result(), "the cancellation"), failsWith(TaskFailed, "cancelled"));
  assert.equal(aborted, 3);
  assert.ok(!former.includes(made.agentId) && !former.includes(me.agentId));
});

test("a task that nobody can submit times out, and one without a hub ends", async (t) => {
  const me = agent(t, "requester", "ws://127.0.0.1:9");
  await assert.rejects(within(me.delegate("x", null, { ttl: 0.2 }), "the timeout"), failsWith(TaskTimeout, "timeout"));
  const waiting = me.delegate("x");
  await me.close();
  await assert.rejects(waiting, failsWith(Disconnected, "hub_lost"));
  await me.closed;
  await assert.rejects(me.delegate("x"), failsWith(Disconnected, "hub_lost"));
});

test("an agent that was closed rejects requests", async (t) => {
  const made = agent(t, "closed", hub.url);
  await made.start();
  await made.close();
  assert.equal(made.online, false);
  for (const request of [made.start(), made.status(), made.discover(), made.broadcast(1), made.delegate("x")]) {
    await assert.rejects(within(request, "the error"), failsWith(Disconnected, "hub_lost"));
  }
});

/** Start an agent with two capabilities: the first, and one that is added right after the registration was sent. */
async function startEager(t, first, second, options = {}) {
  const Base = process.env.AGENTHUB_TEST_WS ? (await import(process.env.AGENTHUB_TEST_WS)).default : WebSocket;
  let [made, isAdded] = [null, false];
  class Eager extends Base {
    send(text) {
      super.send(text);
      if (isAdded || !text.includes('"register"')) return;
      isAdded = true;
      made.capability(second, () => 2);
    }
  }
  made = agent(t, "eager", hub.url, { WebSocket: Eager, ...options });
  made.capability(first, () => 1);
  await made.start();
  return made;
}

test("a capability that is added while the agent registers is registered, too", async (t) => {
  await startEager(t, "first", "eager");
  assert.equal(await agent(t, "requester", hub.url).delegate("eager", null, { wait: true }), 2);
});

test("a capability that the hub rejects while the agent registers does not end its session", async (t) => {
  const logged = gate();
  const made = await startEager(t, "accepted", "bad\nname", { log: (text, error) => logged.open([text, error]) });
  const [text, error] = await within(logged.opened, "the refusal to be logged");
  assert.match(text, /not registered/);
  assert.equal(error.code, "invalid_message");
  assert.equal(await agent(t, "requester", hub.url).delegate("accepted"), 1);
  assert.ok(made.online);
});

test("a task that is given up has an error, whatever the reason is", async (t) => {
  await worker(t, hub.url, "reasons-");
  const me = agent(t, "requester", hub.url);
  for (const reason of [null, 0, "", false, "enough"]) {
    const controller = new AbortController();
    const handle = await me.submit("reasons-wait", null, { signal: controller.signal });
    controller.abort(reason);
    const isRight = (error) => (reason === null ? error.code === "cancelled" : error === reason);
    await assert.rejects(within(handle.result(), "the outcome"), isRight);
  }
  const asking = me.delegate("reasons-ask", "which?", { onQuestion: () => { throw undefined; } });
  await assert.rejects(within(asking, "the outcome"), failsWith(TaskFailed, "cancelled"));
});

test("a page that was not loaded by https can delegate", async (t) => {
  await worker(t, hub.url, "http-");
  Object.defineProperty(crypto, "randomUUID", { value: undefined, configurable: true }); // There is none in such a page.
  atEnd(t, () => delete crypto.randomUUID);
  assert.equal(await agent(t, "requester", hub.url).delegate("http-echo", 1), 1);
});

test("the id of a task is free as soon as its result is there", async (t) => {
  await worker(t, hub.url, "id-");
  const me = agent(t, "requester", hub.url);
  const handle = await me.submit("id-echo", 1, { taskId: "used-again" });
  await handle.result();
  await me.submit("id-echo", 1, { taskId: "used-again" });
});

test("a task is cancelled for any reason", async (t) => {
  await worker(t, hub.url, "reason-");
  const handle = await agent(t, "requester", hub.url).submit("reason-wait", null);
  await handle.cancel("x".repeat(70_000));
  await assert.rejects(within(handle.result(), "the outcome"), failsWith(TaskFailed, "cancelled"));
  const other = await agent(t, "requester", hub.url).submit("reason-wait", null);
  await other.cancel("a\0b");
  await assert.rejects(within(other.result(), "the outcome"), { code: "cancelled", message: "a\\0b" });
});

test("a task whose agent was forgotten, but that the hub has, is lost with or without retries", async (t) => {
  await worker(t, hub.url, "forgotten-");
  for (const maxRetries of [0, 1]) {
    const me = agent(t, "requester", hub.url);
    const handle = await me.submit("forgotten-wait", null, { maxRetries });
    me.agentId = me.resume = undefined;
    (me.socket.terminate ?? me.socket.close).call(me.socket);
    await assert.rejects(within(handle.result(), "the outcome"), failsWith(TaskFailed, "hub_lost"));
  }
});

test("a connection that is lost with the reply to its registration leaves no timer", async (t) => {
  let count = 0, heartbeats = 0;
  class Fake {
    bufferedAmount = 0;
    constructor() { this.isFirst = !count++; setTimeout(() => this.onopen({})); }
    send(text) {
      const { type, id } = JSON.parse(text);
      heartbeats += type === "heartbeat";
      const reply = { type, reply_to: id, agent_id: "a", resume: "r", heartbeat_s: 0.05, max_bytes: 1e6, features: [] };
      setTimeout(() => {
        this.onmessage?.({ data: JSON.stringify(reply) });
        if (this.isFirst) this.onmessage?.({ data: "{" });
      });
    }
    close() {}
  }
  const made = agent(t, "timers", "ws://127.0.0.1:1", { WebSocket: Fake });
  await made.start();
  await until(() => made.online && count === 2, "the second connection");
  await made.close();
  heartbeats = 0;
  await new Promise((resolve) => setTimeout(resolve, 200));
  assert.equal(heartbeats, 0);
  assert.equal(process.getActiveResourcesInfo().filter((kind) => kind === "Timeout").length, 0);
});

test("an agent that was closed connects no more", async (t) => {
  let connections = 0;
  const server = net.createServer((socket) => (connections++, socket.on("error", () => {}).destroy()));
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  atEnd(t, () => server.close());
  const url = `ws://127.0.0.1:${server.address().port}`;
  const pausing = gate();
  const made = agent(t, "pausing", url, { log: () => pausing.open() });
  made.start();
  await within(pausing.opened, "the pause");
  const before = connections;
  await made.close();
  const unused = agent(t, "unused", url);
  await unused.close();
  for (const closed of [made, unused]) await assert.rejects(within(closed.start(), "the error"), failsWith(Disconnected, "hub_lost"));
  await new Promise((resolve) => setTimeout(resolve, 600)); // Longer than the first pause.
  assert.equal(connections, before);
});

test("an agent that is closed while it connects lets go of its socket", async (t) => {
  const sockets = [];
  const mute = net.createServer((socket) => sockets.push(socket.on("error", () => {})));
  await new Promise((resolve) => mute.listen(0, "127.0.0.1", resolve));
  atEnd(t, () => mute.close());
  const made = agent(t, "impatient", `ws://127.0.0.1:${mute.address().port}`);
  const starting = made.start();
  await until(() => sockets.length === 1, "the connection");
  const gone = new Promise((resolve) => sockets[0].resume().on("close", resolve));
  await made.close();
  await assert.rejects(starting, failsWith(Disconnected, "hub_lost"));
  await made.closed;
  await within(gone, "the socket to be closed");
});

test("the next URL is tried when a hub does not accept connections", async (t) => {
  const standby = http.createServer((_, response) => response.writeHead(503).end());
  standby.on("upgrade", (_, socket) => socket.end("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"));
  await new Promise((resolve) => standby.listen(0, "127.0.0.1", resolve));
  atEnd(t, () => standby.close());
  const { first, again } = await restarted(t, []);
  const made = await worker(t, `ws://127.0.0.1:${standby.address().port}, ${first.url}`);
  assert.ok(made.online);
  await first.kill();
  await again();
  await until(() => made.online, "the agent to be back");
});

test("a token is sent with the first message, which may be long", async (t) => {
  const token = "a-token-of-the-tests-with-enough-characters";
  const folder = await mkdtemp(path.join(os.tmpdir(), "agenthub-"));
  atEnd(t, () => rm(folder, { recursive: true }));
  await writeFile(path.join(folder, "token"), token, { mode: 0o600 });
  const guarded = await startHub(t, "--token-file", path.join(folder, "token"));
  const wrong = agent(t, "wrong", guarded.url, { token: "wrong" });
  await assert.rejects(within(wrong.start(), "the refusal"), failsWith(Refused, "unauthorized"));
  await assert.rejects(wrong.closed, failsWith(Refused, "unauthorized"));
  const none = agent(t, "none", guarded.url);
  await assert.rejects(within(none.delegate("x"), "the refusal"), failsWith(Refused, "unauthorized"));
  const long = agent(t, "long", guarded.url, { token });
  for (let number = 0; number < 20; number++) {
    long.capability(`long-${number}`, { description: "x".repeat(1000), type: "object" }, () => number);
  }
  await within(long.start(), "the long registration");
  assert.equal(await agent(t, "requester", guarded.url, { token }).delegate("long-7"), 7);
});

test("an agent that cannot describe itself, or whose log fails, ends with that error", async (t) => {
  const odd = agent(t, "odd", hub.url, { metadata: { big: 10n } });
  await assert.rejects(within(odd.start(), "the error"), TypeError);
  await assert.rejects(odd.closed, TypeError);
  const mute = agent(t, "mute", "ws://127.0.0.1:9", { log: () => { throw new RangeError("no log"); } });
  await assert.rejects(within(mute.start(), "the error"), RangeError);
});

test("another connection replaces an agent, which does not come back", async (t) => {
  const first = agent(t, "first", hub.url);
  await first.start();
  const second = agent(t, "second", hub.url, { agentId: first.agentId, resume: first.resume });
  await second.start();
  assert.equal(second.agentId, first.agentId);
  await assert.rejects(within(first.closed, "the end"), (error) => error.closeCode === 4000);
});

test("an agent that drains ends its tasks and takes no other", async (t) => {
  const made = agent(t, "draining", hub.url);
  const [begun, go] = [gate(), gate()];
  made.capability("drain", async () => (begun.open(), await go.opened, "done"));
  await made.start();
  const me = agent(t, "requester", hub.url);
  const handle = await me.submit("drain");
  await begun.opened;
  const closing = made.close({ drain: 20 });
  await until(async () => (await me.discover("drain")).length === 0, "the agent to drain");
  go.open();
  assert.equal(await handle.result(), "done");
  await within(closing, "the agent to leave");
  await made.closed;
  const slow = agent(t, "slow", hub.url);
  let reason;
  slow.capability("never", (input, task) => new Promise(() => task.signal.addEventListener("abort", () => { reason = task.signal.reason; })));
  await slow.start();
  const never = await me.submit("never");
  await slow.close({ drain: 0.1 });
  await assert.rejects(never.result(), failsWith(TaskFailed, "agent_lost"));
  assert.ok(reason instanceof AgentHubError);
});
