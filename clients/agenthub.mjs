// AgentHub for JavaScript: one ES module for Node 22 (20 with the package `ws`), Deno, Bun and browsers. Copy it.
// docs/javascript.md shows how to use it, docs/protocol.md is the protocol; objects from the hub keep its names.
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

/** The errors of final states. @type {{[state: string]: any}} */
const FINAL = { completed: null, failed: TaskFailed, timeout: TaskTimeout };
const ignore = () => {};
const now = () => performance.now() / 1000;
const newTaskId = () => `js-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`; // Pages by http lack randomUUID.
const bytesOf = (/** @type {string} */ text) => new TextEncoder().encode(text).length;
/** Return what a function returns, or something else if it throws. @param {() => any} get @param {any} [otherwise] */
const safely = (get, otherwise) => { try { return get(); } catch { return otherwise; } };
/** Return a variable of the environment, which browsers lack and Deno may not allow to be read. */
const environment = (/** @type {string} */ name) => safely(() => /** @type {any} */ (globalThis).process.env[name]);
/** Return a promise with its functions `resolve` and `reject`; nobody has to wait for it. @returns {any} */
const deferred = (more = {}) => {
  const promise = new Promise((resolve, reject) => Object.assign(more, { resolve, reject }));
  promise.catch(ignore);
  return Object.assign(promise, more);
};
/** Return what the first of two promises resolves to. After so many seconds, `expire` settles the second one, by
 * default with undefined. @param {number} seconds @param {any} promise */
const within = (seconds, promise, late = deferred(), expire = late.resolve) => {
  const timer = setTimeout(expire, seconds * 1000);
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
};
/** Return a copy of what is JSON, to be sent again though the value changes; undefined is null. Throws TypeError. */
const copyOf = (/** @type {any} */ value) => {
  const text = JSON.stringify(value ?? null);
  if (!text) throw new TypeError(`a ${typeof value} is not JSON`);
  return JSON.parse(text);
};
/** Return a result without an output. @param {string} code @param {string} text @returns {Message} */
const failure = (code, text) =>
  ({ type: "result", success: false, error: { code, message: text.replaceAll("\0", "\\0").slice(0, TEXT_MAX) } });

/** A program on the hub. It connects by `start`, or by its first request, and keeps trying without a hub. */
export class Agent {
  #joined = deferred(); #closed = deferred(); // It is registered, or cannot be; it has ended.
  #requests = new Map(); #ids = 0; // By id: a promise of the reply.
  #WebSocket; #about; #urls = /** @type {string[]} */ ([]);
  #running = /** @type {any} */ (null); #ended = /** @type {any} */ (null); // Why there will be no other session.
  #lose = /** @type {any} */ (ignore); // Gives up the socket in use.
  /** The agent's id, which the hub issues. @type {string | undefined} */ agentId;
  /** The secret with which another agent can resume this one's session. @type {string | undefined} */ resume;
  /** Is called with each broadcast of others. @type {(message: Json, sender: string) => any} */ onBroadcast = ignore;
  /** Resolves after `close`; rejects if connecting again is pointless. @type {Promise<void>} */ closed = this.#closed;
  /** @internal @type {any} */ log;
  /** @internal @type {any} */ socket = null; // On which this agent is registered.
  /** @internal @type {Message} */ hub = { max_bytes: 1 << 20 }; // Its last reply to a registration.
  /** @internal @type {Map<any, Message>} */ offers = new Map(); // Capabilities, with their handlers.
  /** @internal @type {Map<string, Task>} */ tasks = new Map();
  /** @internal @type {Map<string, Handle>} */ handles = new Map();

  /** @param {string} name For people; several agents may have the same. @param {AgentOptions} [options] */
  constructor(name, { url, token, log = console.warn, WebSocket = globalThis.WebSocket, maxTasks = 16, ...more } = {}) {
    const { agentId, resume, ...about } = more;
    const all = url || environment("AGENTHUB_URL") || "ws://127.0.0.1:8765";
    const isRight = Number.isInteger(maxTasks) && maxTasks > 0 && maxTasks <= TASKS_MAX;
    if (!isRight) throw new RangeError(`maxTasks must be a positive integer up to ${TASKS_MAX}`);
    if (!WebSocket) throw new TypeError("pass a WebSocket");
    this.#urls = all.split(",");
    if (!this.#urls.every((one) => /^\s*wss?:\/\/./.test(one))) throw new TypeError(`not ws:// or wss://: ${all}`);
    token ??= environment("AGENTHUB_TOKEN");
    this.#about = { type: "register", name, max_tasks: maxTasks, token, ...about };
    this.#WebSocket = WebSocket;
    Object.assign(this, { agentId, resume, log });
  }
  /** Whether the agent is registered and has a connection just now. */
  get online() { return !!this.socket; }
  /** Offer a capability. `schema` is the JSON Schema of its input; its `description` is the capability's, too.
   * @param {string} name @param {Message | Handler} schema @param {Handler} [handler] */
  capability(name, schema, handler = /** @type {Handler} */ (schema)) {
    if (typeof handler !== "function" || this.offers.has(name)) throw new TypeError(`${name} needs one function`);
    const { description } = /** @type {Message} */ (schema);
    this.offers.set(name, { name, description, input_schema: schema, handler }); // JSON omits functions.
    this.#announce();
    return this;
  }
  /** Connect, and register. Throws what makes another attempt pointless. @returns {Promise<void>} */
  start() {
    this.#running ??= this.#run().catch((error) => this.#end(error));
    return this.#joined;
  }
  /** Leave the hub; first wait up to `drain` seconds for running tasks to end. Handles of open tasks fail. */
  async close({ drain = 0 } = {}) {
    const leave = (/** @type {number} */ seconds, isDraining = false) =>
      within(seconds, this.ask({ type: "deregister", drain: isDraining }).catch(ignore));
    const hasLeft = drain > 0 && (this.socket || this.tasks.size) && (await leave(drain, true));
    if (!hasLeft && this.socket) await leave(LEAVING_S);
    this.#closed.resolve();
    this.#end(new Disconnected("closed", "hub_lost"));
  }
  /** Delegate a task, and return its output. Throws like `submit` and `result`. @param {Delegation} delegation */
  async delegate(...delegation) { return (await this.submit(...delegation)).result(); }
  /** Delegate a task, and return its handle when the hub has accepted it. Throws Refused, TaskTimeout after the ttl,
   * TypeError if the input is not JSON, and what ended the agent. @param {Delegation} delegation */
  async submit(...[capability, input, options = {}]) {
    this.start();
    if (this.#ended) throw this.#ended;
    const handle = new Handle(this, capability, input, options);
    await handle.accepted;
    return handle;
  }
  /** Delegate a task, and yield the pieces of its output as they come; what a lost connection cost comes at the end.
   * Leaving the loop cancels the task. Throws TaskFailed, code `pieces_lost`, if the task was begun again, and what it
   * yields now does not continue that. @param {Delegation} delegation */
  async *stream(...delegation) {
    const handle = await this.submit(...delegation);
    let [count, got] = [0, handle.pieces];
    try {
      for await (const _ of handle) while (count < got.length) yield got[count++];
      const output = await handle.result();
      const head = typeof output === "string" ? got.join("") : got;
      const isHead = JSON.stringify(output?.slice?.(0, head.length)) === JSON.stringify(head);
      if (!count) yield* [output ?? []].flat();
      else if (isHead) yield* [output.slice(head.length) || []].flat();
      else if (handle.lost) throw new TaskFailed("pieces lost", "pieces_lost", handle.taskId);
    } finally {
      handle.cancel().catch(ignore);
    }
  }
  /** Find agents by a keyword, the best match first; the empty one finds all. @returns {Promise<AgentInfo[]>} */
  async discover(capability = "", limit = 100) {
    return (await this.ask({ type: "discover", capability, limit })).agents;
  }
  /** Send any JSON to all other online agents (with that capability), and return their number. Disconnected: perhaps it
   * was not sent. @param {Json} message @param {string} [capability] @returns {Promise<number>} */
  async broadcast(message, capability) {
    await this.start();
    return (await this.request({ type: "broadcast", message: message ?? null, capability })).recipients;
  }
  /** Return the hub's reply about itself (in `hub`), or about one task. Throws Refused with the code `unknown_task`.
   * @param {string} [taskId] @returns {Promise<Message>} */
  status(taskId) { return this.ask({ type: "status", task_id: taskId }); }
  /** Return the reply to a message, which is sent on each session until then, but not after a signal is aborted.
   * @param {Message} message @param {AbortSignal} [signal] @returns {Promise<any>} @internal */
  async ask(message, signal) {
    await this.start();
    signal?.throwIfAborted();
    return this.request(message).catch((error) => {
      if (error instanceof Disconnected) return this.ask(message, signal);
      throw error;
    });
  }
  /** Return the reply to a message that is sent now. @param {Message} message @returns {Promise<any>} @internal */
  async request(message, socket = this.socket) {
    const [id, { max_bytes }, reply] = [(message.id ??= `${++this.#ids}`), this.hub, deferred()];
    const text = JSON.stringify({ id, ...message }); // The hub finds the id in front of anything that it rejects.
    if (bytesOf(text) > max_bytes) throw new Refused(`more than ${max_bytes} bytes`, "too_large");
    if (!socket) throw new Disconnected("no hub", "hub_lost");
    this.#requests.set(id, reply);
    socket.send(text);
    return reply;
  }
  /** Connect again after each lost session, until that is pointless. The pause starts over only after a session that
   * lasted longer than its limit; otherwise agents would storm a hub that drops their connections. */
  async #run() {
    const [urls, backS] = [this.#urls, this.#urls.length > 1 ? BACKOFF_STANDBY_S : BACKOFF_RETURN_S];
    let [at, limitS, lostAt, lateUntil] = [0, BACKOFF_FIRST_S, -Infinity, 0];
    for (;;) {
      const begunAt = now();
      const error = await this.#converse(urls[at]).catch((reason) => reason);
      const { socket } = this;
      if (this.#ended) return;
      if (socket && now() - begunAt > limitS) [limitS, lostAt] = [BACKOFF_FIRST_S, now()];
      if (!socket) [at, lateUntil] = [(at + 1) % urls.length, now() + LATE_REGISTRATION_S]; // It may still be read.
      this.#disconnect(error);
      const isReplaced = error.closeCode === 4000 && now() > lateUntil; // Otherwise perhaps by itself.
      const canPass = error instanceof Disconnected || ["overloaded", "internal"].includes(error.code);
      if (!canPass || error.closeCode === 1008 || isReplaced) throw error;
      if (at && !socket) continue; // There is another hub to try.
      const pauseS = Math.random() * limitS;
      limitS = Math.min(2 * limitS, now() - lostAt < RETURN_S ? backS : BACKOFF_MAX_S);
      this.log(`agenthub: ${error.message}; reconnecting`);
      await within(pauseS, this.#joined); // It rejects at the end of the agent.
    }
  }
  /** Connect, register, and throw why the session was lost, or what makes another attempt pointless. */
  async #converse(/** @type {string} */ url) {
    const [socket, opened, lost] = [/** @type {any} */ (new this.#WebSocket(url)), deferred(), deferred()];
    /** @param {string} [why] @param {number} [code] */
    const lose = (why = "no answer", code) =>
      lost.reject(new Disconnected(`${url}: ${why}`, "hub_lost", undefined, code));
    let timer = 0, unheard = 0; // Heartbeats since the last message.
    const beat = () => (unheard++ < 3 ? this.request({ type: "heartbeat" }).catch(ignore) : lose());
    this.#lose = lose;
    socket.onopen = opened.resolve;
    socket.onerror = () => lose("no hub"); // In Node, no close follows if it cannot connect.
    socket.onclose = (/** @type {any} */ { code, reason }) => lose(`closed with ${code} ${reason}`, code);
    socket.onmessage = (/** @type {any} */ { data }) => {
      unheard = 0;
      try { this.#receive(socket, JSON.parse(data)); } catch (error) { lose(`bad message: ${error}`); }
    };
    try {
      await within(this.#urls.length > 1 ? NEXT_HUB_S : HANDSHAKE_S, opened, lost, lose);
      const { heartbeat_s } = await within(REPLY_S, this.#register(socket), lost, lose);
      timer = setInterval(beat, 1000 * Math.min(heartbeat_s, TTL_MAX_S));
      await lost;
    } finally {
      clearInterval(timer);
      socket.onmessage = ignore; // Some may still come.
      socket.terminate?.();
      socket.close();
    }
  }
  /** Register what this agent offers, and return the hub's reply. What is added meanwhile can be rejected by itself. */
  async #register(socket = this.socket) {
    const { agentId: agent_id, resume, offers } = this;
    const message = { ...this.#about, agent_id, resume, capabilities: [...offers.values()] };
    const isLong = bytesOf(JSON.stringify(message)) > UNAUTHENTICATED_MAX;
    if (isLong) socket.send(JSON.stringify({ type: "status", token: message.token }));
    const reply = await this.request(message, socket);
    if (message.capabilities.length < offers.size) this.#announce();
    return reply;
  }
  #announce() {
    if (this.socket) this.#register().catch((error) => this.log("agenthub: not registered", error));
  }
  /** Use a socket from now on, before any message behind the reply to its registration is handled. Keep only those
   * tasks that the hub assigns here. @param {any} socket @param {Message} hub Its reply. */
  #adopt(socket, hub) {
    Object.assign(this, { socket, hub, agentId: hub.agent_id, resume: hub.resume });
    const assigned = new Map(hub.tasks?.map((/** @type {Message} */ { task_id, attempt }) => [task_id, attempt]));
    for (const [id, task] of this.tasks) if (assigned.get(id) !== task.attempt) task.end("cancelled");
    for (const [task_id, attempt] of assigned) {
      const lost = { ...failure("agent_lost", "not here"), task_id, attempt };
      if (!this.tasks.has(task_id)) this.request(lost).catch(ignore);
    }
    for (const handle of this.handles.values()) handle.sync();
    this.#joined.resolve();
  }
  /** Leave the session, if there is one. @param {any} error What its open requests fail with. */
  #disconnect(error) {
    if (this.socket) this.#joined = deferred();
    this.socket = null;
    for (const { reject } of this.#requests.values()) reject(error);
    this.#requests.clear();
  }
  /** Fail whatever waits: there will be no other session. @param {any} error */
  #end(error) {
    this.#ended = this.#running = error;
    this.#lose();
    this.#disconnect(error);
    this.#joined.reject(error);
    for (const handle of this.handles.values()) handle.finish(error);
    for (const task of this.tasks.values()) task.end("cancelled");
    this.#closed.reject(error);
  }
  /** @param {any} socket @param {Message} news */
  #receive(socket, news) {
    const { type, reply_to, task_id, state, seq, ask, question, code, message, sender } = news;
    const [waiting, task] = [this.#requests.get(reply_to), this.tasks.get(task_id)];
    this.#requests.delete(reply_to);
    if (type === "register" && !this.socket) this.#adopt(socket, news);
    if (waiting) type === "error" ? waiting.reject(new Refused(message, code, task_id)) : waiting.resolve(news);
    else if (type === "error") this.log(`agenthub: refused: ${code}: ${message}`);
    else if (type === "broadcast") this.#hear(message ?? null, sender);
    else if (type === "delegate") task?.attempt === news.attempt || new Task(this, news).run();
    else if (type === "result" || seq || question) this.handles.get(task_id)?.onNews(news);
    else if (ask) task?.answerTo(ask).resolve(news.answer ?? null);
    else if (state in FINAL) task?.end(state);
  }
  async #hear(/** @type {Json} */ message, /** @type {string} */ sender) {
    try { await this.onBroadcast(message, sender); } catch (error) { this.log("agenthub: onBroadcast failed", error); }
  }
}

/** A task, as its handler sees it. `signal` is aborted when the task ends without its handler. */
export class Task {
  #controller = new AbortController(); #ended = deferred(); // Rejects when the signal is aborted.
  #agent; #answers; #timer;
  #asking = Promise.resolve(); // The last question.
  #given = new Map(); // By the number of a question: a promise of its answer.

  /** @param {Agent} agent @param {Message} message @internal */
  constructor(agent, { task_id, sender, capability, input = null, attempt, trace, ttl, answers }) {
    this.#agent = agent;
    this.#answers = answers;
    this.#timer = setTimeout(() => this.end("timeout"), ttl * 1000);
    agent.tasks.get(task_id)?.end("cancelled"); // An earlier attempt.
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
  progress(progress, detail) { this.#report({ progress, detail }); }
  /** Ask the requester, one question after the other, and return its answer. Throws TaskFailed, code `no_answers`, if
   * it gives none. @param {string} text @param {{schema?: Json}} [options] @returns {Promise<any>} */
  async ask(text, { schema } = {}) {
    if (!this.#answers) throw new TaskFailed("no answers", "no_answers");
    const question = copyOf({ text, schema });
    const answered = this.#asking.then(async () => {
      const { ask } = await this.#send({ type: "status", question });
      return this.answerTo(ask); // A repeated question may be answered before its reply.
    });
    this.#asking = answered.catch(ignore);
    return Promise.race([answered, this.#ended]);
  }
  /** Delegate a subtask, which ends with this task. @param {Delegation} delegation */
  async delegate(...delegation) { return (await this.submit(...delegation)).result(); }
  /** Submit a subtask, as `Agent.submit` does. @param {Delegation} delegation */
  submit(...[capability, input, options]) {
    const { signal, trace, taskId: parentId } = this;
    return this.#agent.submit(capability, input, { signal, trace, ...options, parentId });
  }
  /** Do the task and send its result, or why the hub refused that; none if the task has ended meanwhile. @internal */
  async run() {
    const [result, { attempt }] = [await this.#work(), this];
    const refusal = await this.#send({ ...result, attempt }).catch((error) => error);
    const code = { too_large: "too_large", invalid_message: "failed" }[/** @type {string} */ (refusal.code)];
    if (code) await this.#send({ ...failure(code, `refused: ${refusal.message}`), attempt }).catch(ignore);
    if (!this.signal.aborted) this.end();
  }
  /** Return the result of the handler. @returns {Promise<Message>} */
  async #work() {
    const { offers, log } = this.#agent;
    try {
      const [sole] = offers.size === 1 ? offers.keys() : [];
      const offer = offers.get(this.capability ?? sole);
      if (!offer) throw new TaskFailed("no handler", "no_handler");
      let output = await offer.handler(this.input, this);
      if (output?.[Symbol.asyncIterator]) output = await this.#sendAll(output);
      return { type: "result", success: true, output: copyOf(output) };
    } catch (/** @type {any} */ error) {
      if (error instanceof TaskFailed && !error.taskId) return failure(error.code, error.message);
      if (!this.signal.aborted) log(`agenthub: ${this.capability} failed`, error);
      return failure("failed", safely(() => String(error), `${typeof error} without a text`));
    }
  }
  /** Return the reply to a message, which is sent until the task has ended. @param {Message} message */
  #send(message) { return this.#agent.ask({ ...message, task_id: this.taskId }, this.signal); }
  /** Send a report, which gets no reply; return whether it could be sent. @param {Message} report @returns {boolean} */
  #report(report, { socket, hub } = this.#agent) {
    const text = JSON.stringify({ type: "status", task_id: this.taskId, ...report });
    const isSent = !this.signal.aborted && socket?.bufferedAmount <= BUFFERED_MAX && bytesOf(text) <= hub.max_bytes;
    if (isSent) socket.send(text);
    return isSent;
  }
  /** Send what a generator yields, and return it all: texts joined, or a list. What was sent is always its beginning:
   * nothing more is when a piece was not, or the connection was lost. @param {AsyncIterable<Json>} pieces */
  async #sendAll(pieces) {
    const [all, { socket, hub }] = [/** @type {Json[]} */ ([]), this.#agent];
    let [bytes, isSent] = [256, hub.features?.includes("stream")];
    for await (const yielded of pieces) {
      const piece = copyOf(yielded);
      all.push(piece);
      bytes += bytesOf(JSON.stringify(piece));
      if (bytes > hub.max_bytes) throw new TaskFailed("too large", "too_large");
      this.signal.throwIfAborted();
      isSent &&= socket === this.#agent.socket && (piece === null || this.#report({ piece }));
    }
    return all.every((piece) => typeof piece === "string") ? all.join("") : all;
  }
  /** Forget the task, which has ended; abort its handler if that was without it. @param {string} [state] @internal */
  end(state) {
    clearTimeout(this.#timer);
    this.#agent.tasks.delete(this.taskId);
    if (!state) return;
    const reason = new TaskFailed(`it has ended: ${state}`, state, this.taskId);
    this.#ended.reject(reason);
    this.#controller.abort(reason);
  }
  /** Return a promise of the answer to a question. @param {number} ask @internal */
  answerTo(ask) { return this.#given.get(ask) ?? this.#given.set(ask, deferred()).get(ask); }
}

/** A task that this agent delegated. Iterate it (`for await`) for its events, until its outcome. */
export class Handle {
  #outcome = deferred(); #news = deferred(); // The next event.
  #events = /** @type {TaskEvent[]} */ ([]);
  #attempts = 1; #asked = 0; #seq = 0; // The numbers of the last attempt, question and report, as far as the hub said.
  /** @type {boolean | null} */ #isAccepted = false; #isCancelled = false; // Null: by a hub that has forgotten it.
  #agent; #message; #onQuestion;
  #deadline = 0; #timer = /** @type {any} */ (0); // To be accepted; then that of the task.
  /** @type {string | undefined} */ #sentAs; // The agent_id with which it was last sent.
  /** @type {string} */ taskId;
  /** Whether the task has ended. */ done = false;
  /** @internal */ accepted = deferred();
  /** @internal */ pieces = /** @type {Json[]} */ ([]); // The beginning of the output, without a gap.
  /** @internal */ lost = false; // Some reports were, so what comes after the pieces is not known.

  /** @internal @param {Agent} agent @param {any} capability @param {Json} input @param {TaskOptions} options */
  constructor(agent, capability, input, { ttl = 300, taskId = newTaskId(), signal, ...options }) {
    const { maxRetries: max_retries = 0, agentId: agent_id, parentId: parent_id, onQuestion, ...more } = options;
    if (!(ttl > 0 && ttl <= TTL_MAX_S)) throw new RangeError(`ttl must be positive, up to ${TTL_MAX_S}`);
    if (agent.handles.has(taskId)) throw new TypeError(`${taskId} is open`);
    signal?.throwIfAborted();
    const terms = { ttl, max_retries, agent_id, parent_id, capability, answers: !!onQuestion, ...more };
    this.#message = /** @type {Message} */ ({ type: "delegate", task_id: taskId, input: copyOf(input), ...terms });
    this.#agent = agent;
    this.#onQuestion = onQuestion;
    this.taskId = taskId;
    const onAbort = () => this.#giveUp(signal?.reason);
    signal?.addEventListener("abort", onAbort);
    agent.handles.set(taskId, this);
    this.#outcome.finally(() => { // Before whoever waits for it goes on, and may use the id again.
      clearTimeout(this.#timer);
      agent.handles.delete(taskId);
      signal?.removeEventListener("abort", onAbort);
    }).catch(ignore);
    this.#expire(ttl);
    this.sync();
  }
  /** Return the output, when the task has completed. Throws TaskFailed, with the hub's code (`hub_lost` if the hub no
   * longer knows the task), TaskTimeout, the reason of the signal, or what ended the agent. @returns {Promise<any>} */
  result() { return this.#outcome; }
  /** Cancel the task: `result` then throws TaskFailed with the code `cancelled`. Without effect if it has ended. */
  async cancel(reason = "its requester stopped waiting") {
    this.#isCancelled = true;
    if (!this.done) await this.#send(failure("cancelled", reason));
  }
  /** Answer the last question, or that of the number `ask`; return whether it still waited. @param {Json} answer */
  async answer(answer, ask = this.#asked) { return this.#send({ type: "status", ask, answer: copyOf(answer) }); }
  /** Return whether a message did not come too late. Throws Refused for another reason. @param {Message} message */
  #send(message) {
    return this.#agent.ask({ ...message, task_id: this.taskId }).then(() => true, (/** @type {any} */ error) => {
      if (["task_over", "unknown_task", "no_question"].includes(error.code)) return false;
      throw error;
    });
  }
  async *[Symbol.asyncIterator]() {
    while (this.#events.length || !this.done) {
      if (this.#events.length) yield /** @type {TaskEvent} */ (this.#events.shift());
      else await this.#news;
    }
  }
  /** Send the task, or ask for its state if the hub has it: on each session, and when an outcome is late. @internal */
  async sync(limitS = BACKOFF_FIRST_S) {
    const { agentId, socket } = this.#agent;
    if (this.#sentAs && this.#sentAs !== agentId) this.#retry(); // The hub is another one, or has forgotten this agent.
    if (this.done || !socket) return;
    try {
      if (this.#isAccepted) return this.onNews(await this.#agent.request({ type: "status", task_id: this.taskId }));
      this.#sentAs = agentId;
      const { attempt } = await this.#agent.request(this.#message);
      if (this.done) return;
      this.#isAccepted = true;
      this.onNews({ attempt });
      this.#expire(this.#message.ttl, LATE_S);
      this.accepted.resolve();
    } catch (/** @type {any} */ error) {
      if (error instanceof Disconnected) return; // The next session continues.
      if (error.code === "unknown_task" && this.#isAccepted) this.#retry();
      else if (error.code === "overloaded") await within(Math.random() * limitS, this.#outcome.catch(ignore));
      else return this.#isAccepted === null ? this.#fail() : this.finish(error);
      this.sync(Math.min(2 * limitS, BACKOFF_MAX_S));
    }
  }
  /** Make sure that nobody waits forever for a hub that is gone. @param {number} ttl */
  #expire(ttl, graceS = 0) {
    this.#deadline = now() + ttl;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      if (!this.#isAccepted) return this.#giveUp(new TaskTimeout("not accepted", "timeout", this.taskId));
      if (!this.#agent.socket) return this.#fail();
      this.sync();
      this.#expire(0, LATE_S);
    }, (ttl + graceS) * 1000);
  }
  /** Have the task sent to a hub that has forgotten it, and whose workers may not be back, if an attempt is left. */
  #retry() {
    const [max_retries, ttl] = [this.#message.max_retries - this.#attempts, this.#deadline - now()];
    if (this.#isCancelled) return this.#fail("cancelled", "cancelled");
    if (max_retries < 0 || ttl <= 0 || this.#message.parent_id) return this.#fail();
    [this.#attempts, this.#asked, this.#isAccepted, this.#sentAs] = [1, 0, null, undefined];
    Object.assign(this.#message, { max_retries, ttl, wait: true });
    this.#expire(ttl);
  }
  /** Take a report or an outcome, which may also be in the reply to a status. @internal @param {Message} news */
  onNews({ reply_to, state, attempt = 0, seq, progress, detail, piece, ask, question, output = null, error }) {
    const { message = state, code = state } = error ?? {};
    if (state) this.accepted.resolve();
    this.#attempts = Math.max(this.#attempts, attempt);
    if (state === "completed") return this.finish(null, output);
    if (state in FINAL) return this.#fail(message, code, FINAL[state]);
    if (reply_to) return; // The reports were sent before.
    if (ask > this.#asked) this.#hear({ ...question, ask });
    if (!seq) return;
    const isBegun = (progress ?? detail ?? piece) == null; // Another attempt.
    this.lost = isBegun ? this.pieces.length > 0 : this.lost || seq !== this.#seq + 1;
    this.#seq = seq;
    if (piece != null && !this.lost) this.pieces.push(piece);
    if (!isBegun) this.#push({ progress, detail, piece, seq });
  }
  async #hear(/** @type {Question} */ question) {
    this.#asked = question.ask;
    this.#push({ question });
    try {
      if (this.#onQuestion) await this.answer(await this.#onQuestion(question, this), question.ask);
    } catch (error) {
      if (this.#asked === question.ask) this.#giveUp(error);
    }
  }
  #push(/** @type {TaskEvent} */ event) {
    if (this.#events.push(event) > EVENTS_MAX) this.#events.shift(); // The loop over them is slow.
    this.#news.resolve();
    this.#news = deferred();
  }
  #giveUp(/** @type {any} */ error) {
    this.cancel().catch(ignore);
    error == null ? this.#fail("cancelled", "cancelled") : this.finish(error);
  }
  #fail(message = "lost with its hub", code = "hub_lost", Kind = TaskFailed) {
    this.finish(new Kind(message, code, this.taskId));
  }
  /** End with an error, or (null) an output. @param {any} error @param {Json} [output] @internal */
  finish(error, output) {
    this.done = true;
    error === null ? this.#outcome.resolve(output) : this.#outcome.reject(error);
    this.accepted.resolve(this.#outcome);
    this.#news.resolve();
  }
}
