// A peer that knows nothing of our code: a client of the hub, and a hub of its own. It runs in Node and in a browser.

const ENCODER = new TextEncoder();

/** A WebSocket that speaks JSON. One from the package `ws` can also ping, and say things in fragments. */
export class Line {
  constructor(socket) {
    this.socket = socket;
    this.inbox = [];
    this.pings = [];
    this.pongs = [];
    this.awake = () => {};
    this.opened = new Promise((resolve) => socket.addEventListener("open", resolve));
    this.closed = new Promise((resolve) => {
      socket.addEventListener("close", (event) => resolve([event.code, event.reason]));
    });
    socket.addEventListener("error", () => {}); // The close that follows it says more.
    socket.addEventListener("message", (event) => {
      this.inbox.push(JSON.parse(event.data));
      this.awake();
    });
    socket.on?.("pong", (payload) => {
      this.pongs.push(String(payload));
      this.awake();
    });
  }

  static async open(connect) {
    const line = new Line(connect());
    await line.until(line.opened);
    return line;
  }

  async until(event) {
    const ended = this.closed.then((end) => Promise.reject(new Error(`closed with ${end}`)));
    return Promise.race([event, ended]);
  }

  async news() {
    await this.until(new Promise((resolve) => { this.awake = resolve; }));
  }

  /** Send a message; in fragments with the first cut in the midst of a character, if it has a long one, and a ping. */
  async say(message, inFragments) {
    const text = JSON.stringify(message);
    if (!inFragments || !this.socket.ping) {
      this.socket.send(text);
      return;
    }
    const raw = ENCODER.encode(text);
    const cut = raw.findIndex((byte) => byte >= 0xc2) + 1 || raw.length >> 1;
    this.socket.send(raw.subarray(0, cut), { binary: false, fin: false });
    this.pings.push(`ping ${this.pings.length}`);
    this.socket.ping(this.pings.at(-1));
    while (this.pongs.length < this.pings.length) await this.news();
    this.socket.send(raw.subarray(cut), { binary: false, fin: false });
    this.socket.send("", { fin: true });
  }

  /** Return the next message of a type, passing over others. */
  async hear(type) {
    for (;;) {
      while (!this.inbox.length) await this.news();
      const message = this.inbox.shift();
      if (message.type === type) return message;
      if (message.type === "error") throw new Error(JSON.stringify(message));
    }
  }

  /** Answer the next task with its own input, and return that. */
  async echo(inFragments) {
    const { task_id, input, attempt } = await this.hear("delegate");
    await this.say({ type: "result", id: task_id, task_id, success: true, output: input, attempt }, inFragments);
    return input;
  }
}

/** Be an agent that delegates to itself; end some connections; do a last task for somebody else; return what was seen. */
export async function asClient(plan, connect) {
  const [inputs, outputs, closes] = [[], [], []];
  const line = await Line.open(connect);
  await line.say({ type: "register", id: "first", name: "peer" });
  const { agent_id } = await line.hear("register");
  for (const inFragments of [false, true]) {
    for (const input of plan.inputs) {
      const task_id = `own-${outputs.length}`;
      await line.say({ type: "delegate", id: task_id, task_id, agent_id, input }, inFragments);
      inputs.push(await line.echo(inFragments));
      outputs.push((await line.hear("result")).output);
    }
  }
  for (const { texts, close } of plan.endings) {
    const other = await Line.open(connect);
    for (const text of texts) other.socket.send(text);
    if (close) other.socket.close(...close);
    closes.push(await other.closed);
  }
  await line.say({ type: "register", id: "second", name: "peer", capabilities: ["last"] });
  inputs.push(await line.echo(true));
  closes.push(await line.closed);
  return { inputs, outputs, closes, pings: line.pings, pongs: line.pongs, extensions: line.socket.extensions };
}

/** Be a hub of one agent: give it tasks, go away, and turn it away when it comes back; return what was seen.
 *
 * `nextLine` resolves to the next connection.
 */
export async function asHub(plan, nextLine) {
  const [registers, outputs, closes] = [[], [], []];
  const welcome = async (line) => {
    registers.push(await line.hear("register"));
    await line.say({ ...plan.welcome, reply_to: registers.at(-1).id }, true);
  };
  const line = await nextLine();
  await welcome(line);
  for (const inFragments of [false, true]) {
    for (const input of plan.inputs) {
      await line.say({ ...plan.task, task_id: `task-${outputs.length}`, input }, inFragments);
      const { id, task_id, output } = await line.hear("result");
      outputs.push(output);
      await line.say({ type: "status", reply_to: id, task_id, state: "completed", attempt: 1 }, inFragments);
    }
  }
  line.socket.close(...plan.closes[0]);
  closes.push(await line.closed);
  const again = await nextLine();
  await welcome(again);
  again.socket.close(...plan.closes[1]);
  closes.push(await again.closed);
  return { registers, outputs, closes, pings: line.pings, pongs: line.pongs, extensions: line.socket.extensions };
}
