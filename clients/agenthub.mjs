// AgentHub for JavaScript: one ES module for Node 22 (20 with the package `ws`), Deno, Bun and browsers. Copy it.
// docs/javascript.md shows how to use it, docs/protocol.md is the protocol; objects from the hub keep its names.
//
// An Agent has one session after the other, a Task for each attempt that it works on, until the hub has its result, and
// a Handle for each task that it delegated, until its outcome. A request without a reply may or may not have been read,
// so only those that are safe to repeat are sent again on the next session: a delegation (the hub knows its task_id), a
// result (it names its attempt), a cancellation, a question (by its id), an answer. Progress and pieces may be missed.

const BACKOFF_FIRST_S = 0.5, BACKOFF_MAX_S = 30; // Limits of the random pause between two attempts to connect,
const BACKOFF_RETURN_S = 6, BACKOFF_STANDBY_S = 1.5, RETURN_S = 120; // while the hub, or a standby, is expected back.
const HANDSHAKE_S = 10, NEXT_HUB_S = 3, REPLY_S = 10; // For a socket, if there is another hub, and to be registered.
const LATE_REGISTRATION_S = 120, LATE_S = 5, LEAVING_S = 2; // For one that was given up, an outcome, and a farewell.
const TTL_MAX_S = 604_800, TASKS_MAX = 10_000, TEXT_MAX = 65_536, UNAUTHENTICATED_MAX = 16_000; // Limits of the hub.
const EVENTS_MAX = 1000, BUFFERED_MAX = 1 << 20; // Events for a slow loop; bytes in a slow socket.
const FINAL = ["completed", "failed", "timeout"], TOO_LATE = ["task_over", "unknown_task", "no_question"];
const FORGOTTEN = "the hub no longer knows this task";

/** @typedef {any} Json @typedef {{[field: string]: any}} Message @typedef {(input: any, task: Task) => any} Handler
 * @typedef {{text: string, schema?: Json, ask: number}} Question  `ask` counts the questions of a task from 1.
 * @typedef {{progress?: number | null, detail?: Json, piece?: Json, question?: Question, seq?: number}} TaskEvent
 * @typedef {{name: string, description?: string, input_schema?: Json, output_schema?: Json}} Capability
 * @typedef {{agent_id: string, name: string, description: string, running: number, max_tasks: number,
 *   metadata: Message, capabilities: Capability[], online_s?: number}} AgentInfo
 * @typedef {{url?: string, token?: string, description?: string, maxTasks?: number, metadata?: Message,
 *   agentId?: string, resume?: string, WebSocket?: any, log?: (text: string, error?: unknown) => void}} AgentOptions
 * @typedef {{ttl?: number, priority?: number, maxRetries?: number, wait?: boolean, agentId?: string, taskId?: string,
 *   parentId?: string, trace?: {[key: string]: string}, signal?: AbortSignal, answers?: boolean,
 *   onQuestion?: (question: Question, handle: Handle) => any}} TaskOptions  Times are in seconds.
 * @typedef {[capability: string | null, input?: Json, options?: TaskOptions]} Delegation  To a named worker: null. */

/** The base of all errors of this module. `code` is stable, for programs; `message` is for people. */
export class AgentHubError extends Error {
  /** @param {string} message @param {string} [code] @param {string} [taskId] @param {number} [closeCode] */
  constructor(message, code = "failed", taskId, closeCode) {
    super(message);
    this.name = new.target.name;
    this.code = code;
    this.taskId = taskId;
    this.closeCode = closeCode; // Of the WebSocket, if Disconnected has one.
  }
}
/** The hub rejected a request, which had no effect. */
export class Refused extends AgentHubError {}
/** The connection to the hub is lost. */
export class Disconnected extends AgentHubError {}
/** A task ended without an output. A handler throws it to fail its task with a code of its choice. */
export class TaskFailed extends AgentHubError {}
/** A task did not end within its time to live. */
export class TaskTimeout extends TaskFailed {}

const ignore = () => {};
const now = () => performance.now() / 1000;
const bytesOf = (/** @type {string} */ text) => new TextEncoder().encode(text).length;
const disconnected = (/** @type {string} */ why, code = 0) => new Disconnected(why, "hub_lost", undefined, code);
/** @returns {any} A promise with its functions `resolve` and `reject`; nobody has to wait for it. */
const deferred = (more = {}) => {
  const promise = new Promise((resolve, reject) => Object.assign(more, { resolve, reject }));
  promise.catch(ignore);
  return Object.assign(promise, more);
};
/** Return what a promise resolves to; undefined after so many seconds. */
const within = (/** @type {number} */ seconds, /** @type {Promise<any>} */ promise) => {
  const late = deferred();
  const timer = setTimeout(late.resolve, seconds * 1000);
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
};
/** Return a variable of the environment, which browsers lack and Deno may not allow to be read. */
const environment = (/** @type {string} */ name) => {
  try { return /** @type {any} */ (globalThis).process?.env?.[name]; } catch { return undefined; }
};
/** Return the text of whatever was thrown. @returns {string} */
const textOf = (/** @type {any} */ error) => {
  try { return String(error); } catch { return `${typeof error} without a text`; }
};
/** Return a value as JSON; undefined becomes null. Throws TypeError. @returns {string} */
const toJson = (/** @type {any} */ value) => {
  const text = JSON.stringify(value ?? null);
  if (text === undefined) throw new TypeError(`a ${typeof value} is not JSON`);
  return text;
};
/** Return a copy that stays the same when a value changes, because it may have to be sent again. */
const copyOf = (/** @type {any} */ value) => JSON.parse(toJson(value));
/** Return options with the names of the protocol, such as max_tasks for maxTasks. @returns {Message} */
const toWire = (/** @type {object} */ options) => Object.fromEntries(Object.entries(options).map(([name, value]) =>
  [name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`), value]));
/** Return the pieces of an output behind the first ones; null if these are not its beginning.
 * @param {Json} output @param {Json[]} got @returns {Json[] | null} */
const restOf = (output, got) => {
  if (!got.length) return [output ?? []].flat();
  const head = typeof output === "string" ? got.join("") : got;
  const isHead = toJson(output?.slice?.(0, head.length)) === toJson(head);
  return isHead ? [output.slice(head.length) || []].flat() : null;
};

/** A program on the hub: what it offers, and its way to delegate to others. It connects by `start`, or by its first
 * request, and keeps trying without a hub. */
export class Agent {
  /** The agent's id, which the hub issues. @type {string | undefined} */ agentId;
  /** The secret with which another agent can resume this one's session. @type {string | undefined} */ resume;
  /** Is called with each broadcast of others. @type {(message: Json, sender: string) => any} */ onBroadcast = ignore;
  /** The end of the agent: resolves after `close`, rejects with what made another attempt to connect pointless.
   * @type {Promise<void>} */ closed;
  /** @internal @type {(text: string, error?: unknown) => void} */ log;
  /** @internal @type {any} */ socket = null; // On which this agent is registered.
  /** @internal @type {any} */ ended; // Why there will be no other session.
  /** @internal @type {Message} */ hub = { maxBytes: 1 << 20 }; // Its limit and its features.
  /** @internal @type {Map<string, {offer: Message, handler: Handler}>} */ handlers = new Map();
  /** @internal @type {Map<string, Task>} */ tasks = new Map();
  /** @internal @type {Map<string, Handle>} */ handles = new Map();
  /** @type {Map<string, any>} */ #requests = new Map(); // By id, until the reply.
  /** @type {any} */ #running;
  #options;
  #joined = deferred(); #pause = deferred(); #closed = deferred(); // It is registered; it retries; it has ended.
  #lose = (/** @type {string} */ _) => {}; // Gives up the socket in use.
  #isLeaving = false;
  #ids = 0; #offered = 0; #receivedAt = 0; // The last id; how many capabilities the hub knows; when it was heard.
  #lateUntil = 0; // A registration that was given up may reach the hub until then.

  /** @param {string} name For people; several agents may have the same. @param {AgentOptions} [options] */
  constructor(name, { url, token, log = console.warn, WebSocket = globalThis.WebSocket, maxTasks = 16, ...more } = {}) {
    const all = url ?? (environment("AGENTHUB_URL") || "ws://127.0.0.1:8765");
    const urls = all.split(",").map((/** @type {string} */ one) => new URL(one.trim()).href);
    const isCount = Number.isInteger(maxTasks) && maxTasks > 0 && maxTasks <= TASKS_MAX;
    if (!/^(wss?:[^,]*(,|$))+$/.test(`${urls}`)) throw new TypeError(`not ws:// or wss://: ${all}`);
    if (!isCount) throw new RangeError(`maxTasks must be an integer from 1 to ${TASKS_MAX}`);
    if (!WebSocket) throw new TypeError("no WebSocket: use Node 22, or pass that of the package ws");
    const about = { name, maxTasks, ...more };
    this.#options = { urls, token: token ?? environment("AGENTHUB_TOKEN"), WebSocket, about };
    [this.agentId, this.resume, this.log, this.closed] = [more.agentId, more.resume, log, this.#closed];
  }
  /** Whether the agent is registered and has a connection just now. */
  get online() { return this.socket !== null; }

  /** Offer a capability. `schema` is the JSON Schema of its input; its `description` is the capability's, too.
   * @param {string} name @param {Message | Handler} schema @param {Handler} [handler] */
  capability(name, schema, handler = /** @type {Handler} */ (schema)) {
    if (typeof handler !== "function") throw new TypeError(`the handler of ${name} is not a function`);
    if (this.handlers.has(name)) throw new TypeError(`${name} has a handler already`);
    const offered = typeof schema === "function" ? {} : { description: schema.description, input_schema: schema };
    this.handlers.set(name, { offer: { name, ...offered }, handler });
    this.#announce();
    return this;
  }
  /** Connect; resolves when the hub has registered this agent. Throws what makes another attempt pointless.
   * @returns {Promise<void>} */
  start() {
    this.#running ??= this.#run().catch((error) => this.#end(error));
    return this.#joined;
  }
  /** Leave the hub; first wait up to `drain` seconds for running tasks to end. Handles of open tasks fail. */
  async close({ drain = 0 } = {}) {
    const leave = (/** @type {number} */ seconds, /** @type {boolean} */ drain) =>
      within(seconds, this.ask({ type: "deregister", drain }).catch(ignore));
    this.#isLeaving = true;
    const hasLeft = drain > 0 && (this.online || this.tasks.size) && (await leave(drain, true));
    if (!hasLeft && this.online) await leave(LEAVING_S, false);
    this.#end(disconnected("this agent was closed"));
  }
  /** Have another agent do a task, and return its output. Throws what `submit` and `Handle.result` throw.
   * @param {Delegation} delegation @returns {Promise<any>} */
  async delegate(...delegation) { return (await this.submit(...delegation)).result(); }
  /** Delegate a task, and return its handle when the hub has accepted it. Throws Refused with the hub's code,
   * TaskTimeout if it was not accepted within its ttl, TypeError if the input is not JSON, and what ended the agent.
   * @param {Delegation} delegation @returns {Promise<Handle>} */
  async submit(...[capability, input, options = {}]) {
    this.start();
    if (this.ended) throw this.ended;
    const handle = new Handle(this, capability, input, options);
    await handle.accepted;
    return handle;
  }
  /** Delegate a task, and yield the pieces of its output as they come; at the end the rest of it, if some were lost
   * with a connection or the loop is slow. Leaving the loop cancels the task. Throws TaskFailed, code `pieces_lost`,
   * if the task was begun again, and its output does not continue what was yielded.
   * @param {Delegation} delegation @returns {AsyncGenerator<any>} */
  async *stream(...delegation) {
    const handle = await this.submit(...delegation);
    let [last, isWhole, got] = [0, true, /** @type {Json[]} */ ([])];
    try {
      for await (const { seq, piece = null } of handle) {
        if (!seq) continue; // It is a question.
        if (!got.length) last = Math.max(last, handle.begunSeq);
        isWhole &&= seq === last + 1;
        last = seq;
        if (isWhole && piece !== null) yield (got.push(piece), piece);
      }
      const rest = restOf(await handle.result(), got);
      if (!rest && !isWhole) throw new TaskFailed("some pieces were lost", "pieces_lost", handle.taskId);
      yield* rest ?? [];
    } finally {
      handle.cancel("its requester stopped reading").catch(ignore);
    }
  }
  /** Find agents by a keyword, the best match first; the empty one finds all. @param {number} [limit] Up to 1000.
   * @returns {Promise<AgentInfo[]>} */
  async discover(capability = "", limit = 100) {
    return (await this.ask({ type: "discover", capability, limit })).agents;
  }
  /** Send any JSON to all other online agents (with that capability); return how many there are. Throws Disconnected if
   * the connection is lost before the hub replies: then it may have been sent or not.
   * @param {Json} message @param {string} [capability] @returns {Promise<number>} */
  async broadcast(message, capability) {
    return (await this.ask({ type: "broadcast", message: message ?? null, capability }, false)).recipients;
  }
  /** Return the hub's reply about itself (in `hub`), or about one task. Throws Refused with the code `unknown_task`.
   * @param {string} [taskId] @returns {Promise<Message>} */
  status(taskId) { return this.ask({ type: "status", task_id: taskId }); }

  /** Return the reply to a request, on this session or the next one; on a later one if it is safe to repeat.
   * @param {Message} message @internal */
  async ask(message, repeats = true) {
    const copy = { id: `${++this.#ids}`, ...copyOf(message) };
    for (;;) {
      await this.start();
      try { return await this.request(copy); } catch (error) {
        if (this.ended || !repeats || !(error instanceof Disconnected)) throw error;
      }
    }
  }
  /** Return the reply to a message that is sent now. Throws Refused, or Disconnected if the session is lost.
   * @param {Message} message @returns {Promise<any>} @internal */
  async request(message, socket = this.socket) {
    const { id = `${++this.#ids}` } = message;
    const [text, { maxBytes }] = [toJson({ id, ...message }), this.hub];
    const bytes = text.length * 3 > maxBytes ? bytesOf(text) : 0;
    if (bytes > maxBytes) throw new Refused(`${bytes} bytes: the hub takes ${maxBytes}`, "too_large");
    if (!socket) throw disconnected("no connection to the hub");
    this.#requests.set(id, deferred());
    socket.send(text);
    return this.#requests.get(id);
  }
  /** Connect again after each lost session, until another attempt would be pointless. The pause starts over only after
   * a session that lasted longer than its limit; otherwise agents would storm a hub that drops their connections. */
  async #run() {
    const { urls } = this.#options;
    for (let [limitS, lostAt, failures] = [BACKOFF_FIRST_S, -Infinity, 0]; !this.ended; ) {
      const begunAt = now();
      const error = await this.#converse(urls[0]).catch((failure) => failure);
      if (this.online && now() - begunAt > limitS) [limitS, lostAt] = [BACKOFF_FIRST_S, now()];
      failures = this.online ? 0 : failures + 1;
      if (this.online) this.#joined = deferred();
      else urls.push(urls.shift()); // The last good one is tried first.
      this.socket = null;
      for (const { reject } of this.#requests.values()) reject(error);
      this.#requests.clear();
      const isReplaced = error.closeCode === 4000 && now() > this.#lateUntil; // Otherwise perhaps by itself.
      if (!(error instanceof Disconnected) || error.closeCode === 1008 || isReplaced) this.#end(error);
      if (this.ended || failures % urls.length) continue;
      const [pauseS, backS] = [Math.random() * limitS, urls.length > 1 ? BACKOFF_STANDBY_S : BACKOFF_RETURN_S];
      limitS = Math.min(2 * limitS, now() - lostAt < RETURN_S ? backS : BACKOFF_MAX_S);
      if (!this.#isLeaving) this.log(`agenthub: ${error.message}; next attempt in ${pauseS.toFixed(1)} s`);
      await within(pauseS, (this.#pause = deferred()));
    }
  }
  /** Connect, register, and throw why the session was lost, or what makes another attempt pointless. */
  async #converse(/** @type {string} */ url) {
    const { WebSocket, token, urls } = this.#options;
    const [socket, opened, lost] = [/** @type {any} */ (new WebSocket(url)), deferred(), deferred()];
    const lose = (/** @type {string} */ why, closeCode = 0) => {
      lost.reject(disconnected(`${url}: ${why}`, closeCode));
      socket.onmessage = socket.onclose = socket.onerror = ignore; // Closing may call them at once.
      socket.terminate ? socket.terminate() : socket.close();
    };
    const inTime = (/** @type {Promise<any>} */ step, /** @type {number} */ limitS) => {
      const timer = setTimeout(lose, limitS * 1000, "no answer");
      return Promise.race([step, lost]).finally(() => clearTimeout(timer));
    };
    this.#lose = lose;
    socket.onopen = opened.resolve;
    socket.onerror = () => lose("no hub"); // In Node, no close follows if it cannot connect.
    socket.onclose = (/** @type {any} */ { code, reason }) => lose(`closed with ${code} ${reason}`, code);
    socket.onmessage = (/** @type {any} */ { data }) => {
      try { this.#receive(socket, JSON.parse(data)); } catch (error) { lose(`not of the protocol: ${error}`); }
    };
    let heartbeat;
    try {
      await inTime(opened, urls.length > 1 ? NEXT_HUB_S : HANDSHAKE_S);
      const registration = { ...this.#registration(), token };
      const isLong = token && toJson(registration).length * 3 > UNAUTHENTICATED_MAX;
      if (isLong) socket.send(toJson({ type: "status", token }));
      const { heartbeat_s } = await inTime(this.request(registration, socket), REPLY_S);
      const intervalS = Math.min(Math.max(0.01, heartbeat_s), 86_400);
      heartbeat = setInterval(() => {
        if (now() - this.#receivedAt > 3 * intervalS) lose("silent for three heartbeats");
        else this.request({ type: "heartbeat" }).catch(ignore);
      }, intervalS * 1000);
      return await lost;
    } catch (/** @type {any} */ error) {
      throw ["overloaded", "internal"].includes(error.code) ? disconnected(error.message) : error; // These pass.
    } finally {
      clearInterval(heartbeat);
      lose("given up");
      if (!this.online) this.#lateUntil = now() + LATE_REGISTRATION_S;
    }
  }
  /** @returns {Message} What this agent says of itself. */
  #registration() {
    const [{ agentId, resume }, capabilities] = [this, [...this.handlers.values()].map(({ offer }) => offer)];
    this.#offered = capabilities.length;
    return { ...toWire({ ...this.#options.about, agentId, resume }), type: "register", capabilities };
  }
  /** Register once more if there is a session and the agent offers more than before. */
  #announce() {
    if (!this.online || this.#offered === this.handlers.size) return;
    this.request(this.#registration()).catch((error) => this.log("agenthub: not registered again", error));
  }
  /** Use a socket from now on, before any message behind the reply to its registration is handled. Keep only those
   * tasks that the hub assigns here. @param {any} socket @param {Message} reply */
  #adopt(socket, { agent_id: agentId, resume, tasks, max_bytes, features = [] }) {
    const maxBytes = max_bytes - Math.min(1024, max_bytes >> 2); // The hub keeps the rest for what it adds.
    Object.assign(this, { socket, agentId, resume, hub: { maxBytes, features } });
    const assigned = new Map(tasks?.map((/** @type {Message} */ one) => [one.task_id, one.attempt]));
    for (const task of [...this.tasks.values()]) {
      assigned.get(task.taskId) === task.attempt ? task.post() : task.stop("cancelled");
    }
    for (const [task_id, attempt] of assigned) {
      if (this.tasks.has(task_id)) continue;
      new Task(this, { task_id, attempt, ttl: TTL_MAX_S }).fail("agent_lost", "the agent does not have this task");
    }
    this.#announce();
    for (const handle of [...this.handles.values()]) handle.sync();
    this.#joined.resolve();
  }
  /** Fail whatever waits: there will be no other session. @param {any} error */
  #end(error) {
    if (this.ended) return;
    this.ended = error;
    this.#lose(error.message);
    this.#pause.resolve();
    for (const { reject } of [this.#joined, ...this.#requests.values()]) reject(error);
    for (const handle of [...this.handles.values()]) handle.finish(error);
    for (const task of [...this.tasks.values()]) task.stop("cancelled");
    this.#isLeaving ? this.#closed.resolve() : this.#closed.reject(error);
  }
  /** @param {any} socket @param {Message} message */
  #receive(socket, message) {
    this.#receivedAt = now();
    const { type, reply_to, task_id, state, ask, question, code } = message;
    const [waiting, task] = [this.#requests.get(reply_to), this.tasks.get(task_id)];
    this.#requests.delete(reply_to);
    if (waiting && type === "register" && !this.online) this.#adopt(socket, message);
    if (waiting && type === "error") waiting.reject(new Refused(message.message, code, task_id));
    else if (type === "error") this.log(`agenthub: refused: ${code}: ${message.message}`);
    else if (waiting) waiting.resolve(message);
    else if (type === "broadcast") this.#hear(message);
    else if (type === "delegate" && task?.attempt !== message.attempt) {
      task?.stop("cancelled");
      new Task(this, message).run();
    } else if (type === "status" && FINAL.includes(state)) task?.stop(state);
    else if (type === "status" && ask && !question) task?.onAnswer(message);
    else this.handles.get(task_id)?.onNews(message);
  }
  async #hear(/** @type {Message} */ { message = null, sender }) {
    try { await this.onBroadcast(message, sender); } catch (error) { this.log("agenthub: onBroadcast failed", error); }
  }
}

/** A task, as its handler sees it. `signal` is aborted when the task ends without its handler. */
export class Task {
  #agent; #answers; #timer;
  #controller = new AbortController(); #ended = deferred(); // Rejects when the signal is aborted.
  #asking = Promise.resolve(); // The last question.
  #given = new Map(); // By the number of a question: a promise of its answer.
  /** @type {Message | undefined} */ #result; // Until the hub has replied.
  #refusals = 0; // Of a result that does not fit, which becomes a failure that may be refused, too.

  /** @param {Agent} agent @param {Message} message @internal */
  constructor(agent, { task_id, sender, capability, input = null, attempt, trace, ttl, answers }) {
    this.#agent = agent;
    this.#answers = answers === true; // Hubs that pass no questions on do not say so.
    this.#timer = setTimeout(() => this.stop("timeout"), ttl * 1000);
    agent.tasks.set(task_id, this);
    this.signal = this.#controller.signal;
    /** @type {string} */ this.taskId = task_id;
    /** The agent_id of the requester. @type {string} */ this.requester = sender;
    /** @type {string | undefined} */ this.capability = capability ?? undefined;
    /** @type {Json} */ this.input = input;
    /** Counts from 1. @type {number} */ this.attempt = attempt;
    /** @type {{[key: string]: string} | undefined} */ this.trace = trace ?? undefined;
    /** In seconds of performance.now(). @type {number} */ this.deadline = now() + ttl;
  }
  /** Report progress: a number from 0 to 1, and any JSON. Dropped without a connection, or if that is slow.
   * @param {number | null} progress @param {Json} [detail] */
  progress(progress, detail) {
    if (this.signal.aborted || !(this.#agent.socket?.bufferedAmount <= BUFFERED_MAX)) return;
    const message = { type: "status", task_id: this.taskId, progress, detail };
    this.#agent.request(message).catch(({ message }) => this.#agent.log(`agenthub: a report was lost: ${message}`));
  }
  /** Ask the requester, and return its answer; one question after the other. Throws TaskFailed with the code
   * `no_answers` if it did not delegate the task with `answers` or `onQuestion`.
   * @param {string} text @param {{schema?: Json}} [options] @returns {Promise<any>} */
  async ask(text, { schema } = {}) {
    if (!this.#answers) throw new TaskFailed("its requester cannot be asked", "no_answers");
    const message = { type: "status", task_id: this.taskId, question: { text, schema } };
    const answered = this.#asking.then(async () => {
      this.signal.throwIfAborted();
      const { ask } = await Promise.race([this.#agent.ask(message), this.#ended]);
      return Promise.race([this.#answerTo(ask), this.#ended]); // A repeated one may be answered before its reply.
    });
    this.#asking = answered.catch(ignore);
    return answered;
  }
  /** Delegate a subtask, as `Agent.delegate` does; it ends with this task at the latest.
   * @param {Delegation} delegation @returns {Promise<any>} */
  async delegate(...delegation) { return (await this.submit(...delegation)).result(); }
  /** Submit a subtask, as `Agent.submit` does. @param {Delegation} delegation */
  submit(...[capability, input, options]) {
    const { signal, trace, taskId: parentId } = this;
    return this.#agent.submit(capability, input, { signal, trace, ...options, parentId });
  }

  /** Do the task and send its result; none if the task has ended meanwhile. @internal */
  async run() {
    const { handlers, log } = this.#agent;
    try {
      const names = [...handlers.keys()];
      const { handler } = handlers.get(this.capability ?? (names.length === 1 ? names[0] : "")) ?? {};
      if (!handler) throw new TaskFailed(`this agent offers ${names.join(", ") || "nothing"}`, "no_handler");
      let output = await handler(this.input, this);
      if (typeof output?.[Symbol.asyncIterator] === "function") output = await this.#sendAll(output);
      this.#settle({ success: true, output: copyOf(output) });
    } catch (/** @type {any} */ error) {
      const isOwn = error instanceof TaskFailed && !error.taskId;
      if (!isOwn && !this.signal.aborted) log(`agenthub: the handler of ${this.capability} failed`, error);
      this.fail(isOwn ? error.code : "failed", isOwn ? error.message : textOf(error));
    }
  }
  /** Send what a generator yields as pieces, at the pace of the connection, and return it all: texts joined, or a list.
   * What was sent is always a beginning of the output, so no more are sent after a connection was lost.
   * @param {AsyncIterable<Json>} pieces */
  async #sendAll(pieces) {
    const [{ socket, hub }, parts] = [this.#agent, /** @type {string[]} */ ([])];
    const isOnline = () => socket && socket === this.#agent.socket;
    let [isText, bytes] = [true, 0];
    for await (const piece of pieces) {
      const part = toJson(piece);
      parts.push(part);
      isText &&= typeof piece === "string";
      if ((bytes += bytesOf(part)) > hub.maxBytes - 256) throw new TaskFailed("the output is too large", "too_large");
      while (isOnline() && socket.bufferedAmount > BUFFERED_MAX) await within(0.02, this.#ended);
      this.signal.throwIfAborted();
      const isSent = part !== "null" && isOnline() && hub.features.includes("stream");
      if (isSent) socket.send(`{"type":"status","task_id":"${this.taskId}","piece":${part}}`);
    }
    const all = JSON.parse(`[${parts}]`);
    return isText ? all.join("") : all;
  }
  /** @param {string} code @param {string} message @internal */
  fail(code, message) {
    this.#settle({ success: false, error: { code, message: message.replaceAll("\0", "\\x00").slice(0, TEXT_MAX) } });
  }
  #settle(/** @type {Message} */ result) {
    if (this.signal.aborted) return;
    this.#result = { type: "result", task_id: this.taskId, attempt: this.attempt, ...result };
    clearTimeout(this.#timer);
    this.post();
  }
  /** Send the result, if there is one; the agent does so on each session until the hub has replied. @internal */
  async post() {
    const result = this.#result;
    if (!result) return;
    const refusal = await this.#agent.request(result).then(ignore, (error) => error);
    if (refusal instanceof Disconnected || this.#result !== result) return;
    const code = { too_large: "too_large", invalid_message: "failed" }[/** @type {string} */ (refusal?.code)];
    code && !this.#refusals++ ? this.fail(code, `refused: ${refusal.message}`) : this.#forget();
  }
  #forget() {
    clearTimeout(this.#timer);
    this.#result = undefined;
    if (this.#agent.tasks.get(this.taskId) === this) this.#agent.tasks.delete(this.taskId);
  }
  /** Abort the handler: the task has ended without it. @param {string} state @internal */
  stop(state) {
    const reason = new TaskFailed(`the task has ended: ${state}`, state, this.taskId);
    this.#forget();
    this.#ended.reject(reason);
    this.#controller.abort(reason);
  }
  /** @param {Message} message @internal */
  onAnswer({ ask, answer = null }) { this.#answerTo(ask).resolve(answer); }
  #answerTo(/** @type {number} */ ask) { return this.#given.get(ask) ?? this.#given.set(ask, deferred()).get(ask); }
}

/** A task that this agent delegated. Iterate it (`for await`) for its events, until its outcome. */
export class Handle {
  /** @type {string} */ taskId;
  /** Whether the task has ended. */ done = false;
  /** @internal */ begunSeq = 0; // Of the report that the present attempt has begun.
  /** @internal */ accepted = deferred();
  #agent; #options; #deadline; // To be accepted; then that of the task.
  /** @type {Message} */ #message;
  /** @type {any} */ #timer;
  /** @type {TaskEvent[]} */ #events = [];
  #outcome = deferred(); #news = deferred(); // The next event.
  #isAccepted = false; #isCancelled = false;
  /** @type {string | undefined} */ #sentAs; // The agent_id with which it was last sent.
  #attempts = 1; // That the hub has begun, as far as it said.
  #asked = 0; // The number of the last question.
  #onAbort = () => this.#giveUp(this.#options.signal?.reason);

  /** @internal @param {Agent} agent @param {any} capability @param {Json} input @param {TaskOptions} options */
  constructor(agent, capability, input, options) {
    const { ttl = 300, taskId = `js-${crypto.randomUUID()}`, maxRetries = 0, signal, onQuestion, ...more } = options;
    const isTime = ttl > 0 && ttl <= TTL_MAX_S;
    if (!isTime) throw new RangeError(`ttl must be more than 0 and at most ${TTL_MAX_S} seconds`);
    if (agent.handles.has(taskId)) throw new TypeError(`this agent has an open task ${taskId}`);
    signal?.throwIfAborted();
    const terms = toWire({ taskId, capability, ttl, maxRetries, answers: onQuestion && true, ...more });
    this.#message = { ...terms, type: "delegate", input: copyOf(input) };
    this.#agent = agent;
    this.#options = options;
    this.#deadline = now() + ttl;
    this.taskId = taskId;
    agent.handles.set(taskId, this);
    signal?.addEventListener("abort", this.#onAbort);
    this.#wake(ttl);
    this.sync();
  }
  /** Return the output, when the task has completed. Throws TaskFailed, with the hub's code (`hub_lost` if the hub no
   * longer knows the task), TaskTimeout, the reason of the signal, or what ended the agent. @returns {Promise<any>} */
  result() { return this.#outcome; }
  /** Cancel the task: `result` then throws TaskFailed with the code `cancelled`. Without effect if it has ended. */
  async cancel(reason = "its requester stopped waiting") {
    this.#isCancelled = true;
    const error = { code: "cancelled", message: reason.slice(0, TEXT_MAX) };
    if (!this.done) await this.#send({ type: "result", success: false, error });
  }
  /** Answer the last question, or that of the number `ask`; return whether it still waited. @param {Json} answer */
  async answer(answer, ask = this.#asked) { return this.#send({ type: "status", ask, answer: answer ?? null }); }
  /** Return whether a message did not come too late. Throws Refused for another reason. @param {Message} message */
  async #send(message) {
    const refusal = await this.#agent.ask({ ...message, task_id: this.taskId }).then(ignore, (error) => error);
    if (refusal && !TOO_LATE.includes(refusal.code)) throw refusal;
    return !refusal;
  }
  /** @returns {AsyncGenerator<TaskEvent, void>} */
  async *[Symbol.asyncIterator]() {
    for (;;) {
      for (let event; (event = this.#events.shift()); ) yield event;
      if (this.done) return;
      await this.#news;
    }
  }

  /** Send the task until the hub has accepted it, then ask for its state: on each session, and when an outcome is late.
   * @internal */
  async sync(limitS = BACKOFF_FIRST_S) {
    const agent = this.#agent;
    if (!this.#isAccepted && this.#sentAs && this.#sentAs !== agent.agentId) this.#retry(); // Its reply was lost.
    if (this.done || !agent.online) return;
    try {
      if (this.#isAccepted) {
        const report = await agent.request({ type: "status", task_id: this.taskId });
        if (report.requester === agent.agentId) this.onNews(report);
        else this.#fail(FORGOTTEN);
      } else {
        this.#sentAs = agent.agentId;
        this.#accept(await agent.request(this.#message));
      }
    } catch (/** @type {any} */ error) {
      if (error instanceof Disconnected) return; // The next session continues.
      if (error.code === "unknown_task" && this.#isAccepted) this.#retry();
      else if (error.code === "overloaded") await within(Math.random() * limitS, this.#outcome.catch(ignore));
      else return this.finish(error);
      this.sync(Math.min(2 * limitS, BACKOFF_MAX_S));
    }
  }
  #accept(/** @type {Message} */ { attempt }) {
    if (this.done) return;
    this.#isAccepted = true;
    this.#attempts = Math.max(this.#attempts, attempt ?? 0);
    this.#deadline = now() + this.#message.ttl;
    this.#wake(this.#message.ttl + LATE_S);
    this.accepted.resolve();
  }
  /** Make sure that nobody waits forever for a hub that is gone. */
  #wake(/** @type {number} */ afterS) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      const late = new TaskTimeout("the hub did not accept it in time", "timeout", this.taskId);
      if (!this.#isAccepted) return this.#giveUp(late);
      if (!this.#agent.online) return this.#fail("no connection to the hub at the deadline");
      this.sync();
      this.#wake(LATE_S);
    }, afterS * 1000);
  }
  /** Have the task sent to a hub that has forgotten it, and whose workers may not be back, if an attempt is left. */
  #retry() {
    const [max_retries, ttl] = [this.#message.max_retries - this.#attempts, this.#deadline - now()];
    if (this.#isCancelled) return this.#fail("the task was cancelled", "cancelled");
    if (max_retries < 0 || ttl <= 0 || this.#message.parent_id) return this.#fail(FORGOTTEN);
    [this.#attempts, this.#asked, this.#isAccepted, this.#sentAs] = [1, 0, false, undefined];
    Object.assign(this.#message, { max_retries, ttl, wait: true });
    this.#wake(ttl);
  }
  /** Take progress, a piece, a question, or an outcome, which may also be in the reply to a status. @internal
   * @param {Message} news */
  onNews({ reply_to, state, attempt, seq, progress, detail, piece, ask, question, output = null, error }) {
    const { message = state, code = state } = error ?? {};
    this.#attempts = Math.max(this.#attempts, attempt ?? 0);
    if (state === "completed") this.finish(null, output);
    else if (state === "timeout") this.finish(new TaskTimeout(message, code, this.taskId));
    else if (state === "failed") this.#fail(message, code);
    else if (reply_to) return; // The reports were sent before.
    else if (question && ask > this.#asked) this.#onQuestion({ ...question, ask: (this.#asked = ask) });
    else if ((progress ?? detail ?? piece ?? null) !== null) this.#push({ progress, detail, piece, seq });
    else if (seq) this.begunSeq = seq;
  }
  async #onQuestion(/** @type {Question} */ question) {
    const { onQuestion } = this.#options;
    this.#push({ question });
    try {
      if (onQuestion) await this.answer(await onQuestion(question, this), question.ask);
    } catch (error) {
      if (this.#asked === question.ask) this.#giveUp(error, "its requester failed to answer");
    }
  }
  #push(/** @type {TaskEvent} */ event) {
    if (this.#events.push(event) > EVENTS_MAX) this.#events.shift(); // The loop over them is slow.
    this.#news.resolve();
    this.#news = deferred();
  }
  #giveUp(/** @type {any} */ error, /** @type {string | undefined} */ reason = undefined) {
    this.cancel(reason).catch(ignore);
    this.finish(error);
  }
  #fail(/** @type {string} */ message, code = "hub_lost") { this.finish(new TaskFailed(message, code, this.taskId)); }
  /** End with an error, or (null) an output. @param {any} error @param {Json} [output] @internal */
  finish(error, output) {
    if (this.done) return;
    this.done = true;
    clearTimeout(this.#timer);
    this.#agent.handles.delete(this.taskId);
    this.#options.signal?.removeEventListener("abort", this.#onAbort);
    for (const promise of [this.#outcome, this.accepted]) error ? promise.reject(error) : promise.resolve(output);
    this.#news.resolve();
  }
}
