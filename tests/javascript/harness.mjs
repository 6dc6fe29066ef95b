// For the tests of clients/agenthub.mjs: hubs as processes, a proxy that cuts connections, and agents that end with the test.

import { spawn } from "node:child_process";
import { once } from "node:events";
import net from "node:net";
import { createInterface } from "node:readline";

import { Agent } from "../../clients/agenthub.mjs";

export const WAIT_S = 20; // The limit of every wait: generous, because it is reached only when something is broken.
const PYTHON = process.env.AGENTHUB_TEST_PYTHON ?? "python3";
const OPTIONS = process.env.AGENTHUB_TEST_WS ? { WebSocket: (await import(process.env.AGENTHUB_TEST_WS)).default } : {};

const ENDINGS = new WeakMap();

/** Have something done at the end of a test, in reverse order: agents leave before their hub ends. */
export function atEnd(t, end) {
  if (!ENDINGS.has(t)) {
    ENDINGS.set(t, []);
    t.after(async () => { for (const one of ENDINGS.get(t).reverse()) await one(); });
  }
  ENDINGS.get(t).push(end);
}

/** Run a hub, which the end of the test ends if there is one. Its `kill` resolves when it is gone. */
export async function startHub(t, ...args) {
  const child = spawn(PYTHON, ["-m", "agenthub", "hub", "--port", "0", "--log-level", "error", ...args], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const kill = async (signal = "SIGKILL") => {
    if (child.exitCode !== null || child.signalCode !== null) return;
    child.kill(signal);
    await once(child, "exit");
  };
  if (t) atEnd(t, () => kill());
  const [line] = await within(once(createInterface({ input: child.stdout }), "line"), "the hub to listen");
  const url = line.split(" ").at(-1);
  return { url, port: Number(new URL(url).port), kill, child };
}

/** Make an agent that the end of the test closes. */
export function agent(t, name, url, options = {}) {
  const made = new Agent(name, { url, log: process.env.AGENTHUB_TEST_LOG ? console.warn : () => {}, ...OPTIONS, ...options });
  atEnd(t, () => made.close());
  return made;
}

/** Return what a promise resolves to; throw after WAIT_S. */
export async function within(promise, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited ${WAIT_S} s for ${what}`)), WAIT_S * 1000);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Wait until a condition holds. */
export async function until(condition, what) {
  let isOver = false;
  const poll = async () => {
    while (!isOver && !(await condition())) await new Promise((resolve) => setTimeout(resolve, 10));
  };
  try {
    await within(poll(), what);
  } finally {
    isOver = true;
  }
}

/** A gate that opens once. */
export function gate() {
  let open;
  const opened = new Promise((resolve) => { open = resolve; });
  return { opened, open };
}

/** Split what one end of a WebSocket sends into its handshake and its frames, whole ones only. */
class Frames {
  buffer = Buffer.alloc(0);
  isOpen = false;

  take(bytes) {
    this.buffer = Buffer.concat([this.buffer, bytes]);
    const taken = [];
    for (let length; (length = this.#length()) !== 0 && this.buffer.length >= length; ) {
      taken.push(this.buffer.subarray(0, length));
      this.buffer = this.buffer.subarray(length);
    }
    return taken;
  }

  /** The length of what comes next; 0 if that is not known yet. */
  #length() {
    const { buffer } = this;
    if (!this.isOpen) {
      const end = buffer.indexOf("\r\n\r\n") + 4;
      if (end < 4) return 0;
      this.isOpen = true;
      return end;
    }
    if (buffer.length < 2) return 0;
    const [short, masked] = [buffer[1] & 127, buffer[1] & 128 ? 4 : 0];
    if (short < 126) return 2 + masked + short;
    if (buffer.length < 10) return 0;
    return short === 126 ? 4 + masked + buffer.readUInt16BE(2) : 10 + masked + Number(buffer.readBigUInt64BE(2));
  }
}

/** A proxy before a hub, which forwards whole frames. It cuts the first connection at the frame `cutAt`, counted over
 * both directions: before it is forwarded, or right `after` it. `seen` counts frames of that connection. */
export class Proxy {
  seen = 0;
  connections = 0;
  isDeaf = false; // Forwards nothing, and closes nothing.
  isShut = false; // Accepts no connection.
  sockets = new Set();

  static async open(t, port, cutAt = Infinity, after = false) {
    const proxy = new Proxy();
    const server = net.createServer((near) => proxy.#join(near, net.connect(port, "127.0.0.1"), cutAt, after));
    atEnd(t, () => (server.close(), proxy.cut()));
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    proxy.url = `ws://127.0.0.1:${server.address().port}`;
    return proxy;
  }

  #join(near, far, cutAt, after) {
    if (this.isShut) return [near, far].forEach((socket) => socket.on("error", () => {}).destroy());
    const isFirst = this.connections++ === 0;
    const both = [near, far];
    const end = () => both.forEach((socket) => socket.destroy());
    for (const [from, to] of [[near, far], [far, near]]) {
      const frames = new Frames();
      this.sockets.add(from);
      from.setNoDelay(true);
      from.on("error", () => {});
      from.on("close", () => (this.sockets.delete(from), to.end()));
      from.on("data", (bytes) => {
        for (const frame of this.isDeaf ? [] : frames.take(bytes)) {
          if (isFirst) this.seen++;
          if (isFirst && this.seen === cutAt && !after) return end();
          to.write(frame);
          if (isFirst && this.seen === cutAt) return void to.end(() => end());
        }
      });
    }
  }

  /** Cut an agent's connection, and let none through while `during` runs. */
  async cutOff(agent, during) {
    this.isShut = true;
    this.cut();
    await until(() => !agent.online, "the cut");
    await during();
    this.isShut = false;
  }

  cut() {
    for (const socket of this.sockets) socket.destroy();
  }
}
