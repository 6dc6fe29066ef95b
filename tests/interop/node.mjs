// node node.mjs ws-client|ws-hub|undici-client FOLDER: the plan comes in on stdin, what was seen goes out on stdout.

import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

import { asClient, asHub, Line } from "./peer.mjs";

const [role, folder] = process.argv.slice(2);
const plan = JSON.parse(await text(process.stdin));

async function asHubOfWs({ WebSocketServer }) {
  const lines = [];
  let awake = () => {};
  const server = new WebSocketServer({ host: "127.0.0.1", port: 0, perMessageDeflate: true });
  server.on("connection", (socket) => {
    lines.push(new Line(socket));
    awake();
  });
  server.on("listening", () => process.stdout.write(`${server.address().port}\n`));
  const report = await asHub(plan, async () => {
    while (!lines.length) await new Promise((resolve) => { awake = resolve; });
    return lines.shift();
  });
  server.close();
  return report;
}

async function asClientOfWs({ WebSocket }) {
  return asClient(plan, () => new WebSocket(plan.url, { perMessageDeflate: true }));
}

const roles = {
  "ws-hub": () => asHubOfWs(createRequire(`${folder}/`)("ws")),
  "ws-client": () => asClientOfWs(createRequire(`${folder}/`)("ws")),
  "undici-client": () => asClient(plan, () => new WebSocket(plan.url)),
};
process.stdout.write(JSON.stringify(await roles[role]()));
