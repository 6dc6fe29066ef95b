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
const bytesOf = (/** @type {string} */ text) => new TextEncoder().encode(text).length;
/** @param {string} why @param {number} [code] */
const disconnected = (why, code) => new Disconnected(why, "hub_lost", undefined, code);
const checkRange = (/** @type {string} */ name, /** @type {number} */ value, /** @type {number} */ max) => {
  if (!(value > 0 && value <= max)) throw new RangeError(`${name} must be more than 0 and at most ${max}`);
};
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
/** Return what a promise resolves to; undefined after so many seconds. @param {Promise<any>} promise */
const within = (/** @type {number} */ seconds, promise) => {
  const late = deferred();
  const timer = setTimeout(late.resolve, seconds * 1000);
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
};
/** Return a value as JSON; undefined becomes null. Throws TypeError. @returns {string} */
const toJson = (/** @type {any} */ value) => {
  const text = JSON.stringify(value ?? null);
  if (!text) throw new TypeError(`a ${typeof value} is not JSON`);
  return text;
};
/** Return a copy that stays the same when a value changes, because it may have to be sent again. */
const copyOf = (/** @type {any} */ value) => JSON.parse(toJson(value));

/** A program on the hub: what it offers, and its way to delegate to others. It connects by `start`, or by its first
 * request, and keeps trying without a hub. */
export class Agent {
  #joined = deferred(); #closed = deferred(); // It is registered, or cannot be; it has ended.
  #requests = new Map(); #ids = 0; // By id: a promise of the reply.
  #WebSocket; #about; #offers = /** @type {Message[]} */ ([]);
  /** @type {string[]} */ #urls;
  /** @type {any} */ #running;
  /** @type {any} */ #lose = ignore; // Gives up the socket in use.
  /** The agent's id, which the hub issues. @type {string | undefined} */ agentId;
  /** The secret with which another agent can resume this one's session. @type {string | undefined} */ resume;
  /** Is called with each broadcast of others. @type {(message: Json, sender: string) => any} */ onBroadcast = ignore;
  /** The end of the agent: resolves after `close`, rejects with what made another attempt to connect pointless.
   * @type {Promise<void>} */ closed = this.#closed;
  /** @internal @type {any} */ log;
  /** @internal @type {any} */ socket = null; // On which this agent is registered.
  /** @internal @type {any} */ ended; // Why there will be no other session.
  /** @internal @type {Message} */ hub = { max_bytes: 1 << 20 }; // Its last reply to a registration.
  /** @internal @type {Map<string, Handler>} */ handlers = new Map();
  /** @internal @type {Map<string, Task>} */ tasks = new Map();
  /** @internal @type {Map<string, Handle>} */ handles = new Map();

  /** @param {string} name For people; several agents may have the same. @param {AgentOptions} [options] */
  constructor(name, { url, token, log = console.warn, WebSocket = globalThis.WebSocket, maxTasks = 16, ...more } = {}) {
    const { agentId, resume, ...about } = more;
    const all = url || environment("AGENTHUB_URL") || "ws://127.0.0.1:8765";
    this.#urls = all.split(",");
    if (!this.#urls.every((one) => /^\s*wss?:\/\/./.test(one))) throw new TypeError(`not ws:// or wss://: ${all}`);
    if (!WebSocket) throw new TypeError("pass a WebSocket");
    checkRange("integer maxTasks", maxTasks % 1 ? NaN : maxTasks, TASKS_MAX);
    token ??= environment("AGENTHUB_TOKEN");
    this.#WebSocket = WebSocket;
    this.#about = { type: "register", name, max_tasks: maxTasks, token, ...about };
    Object.assign(this, { agentId, resume, log });
  }
  /** Whether the agent is registered and has a connection just now. */
  get online() { return !!this.socket; }
  /** Offer a capability. `schema` is the JSON Schema of its input; its `description` is the capability's, too.
   * @param {string} name @param {Message | Handler} schema @param {Handler} [handler] */
  capability(name, schema, handler = /** @type {Handler} */ (schema)) {
    if (typeof handler !== "function" || this.handlers.has(name)) throw new TypeError(`${name} needs one function`);
    const { description } = /** @type {Message} */ (schema);
    this.#offers.push({ name, description, input_schema: schema }); // As JSON, without a schema that is a function.
    this.handlers.set(name, handler);
    if (this.socket) this.#register().catch((error) => this.log("agenthub: not registered", error));
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
    this.#end(disconnected("closed"));
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
   * with a connection. Leaving the loop cancels the task. Throws TaskFailed, code `pieces_lost`, if the task was begun
   * again, and its output does not continue what was yielded.
   * @param {Delegation} delegation @returns {AsyncGenerator<any>} */
  async *stream(...delegation) {
    const handle = await this.submit(...delegation);
    let [count, got] = [0, handle.pieces];
    try {
      for await (const _ of handle) while (count < got.length) yield got[count++];
      const output = await handle.result();
      const head = typeof output === "string" ? got.join("") : got;
      const isHead = toJson(output?.slice?.(0, head.length)) === toJson(head);
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
  /** Send any JSON to all other online agents (with that capability); return how many there are. Throws Disconnected if
   * the connection is lost before the hub replies: then it may have been sent or not.
   * @param {Json} message @param {string} [capability] @returns {Promise<number>} */
  async broadcast(message, capability) {
    await this.start();
    return (await this.request({ type: "broadcast", message: message ?? null, capability })).recipients;
  }
  /** Return the hub's reply about itself (in `hub`), or about one task. Throws Refused with the code `unknown_task`.
   * @param {string} [taskId] @returns {Promise<Message>} */
  status(taskId) { return this.ask({ type: "status", task_id: taskId }); }
  /** Repeat a message until its reply, which is returned. @internal @param {Message} message @returns {Promise<any>} */
  async ask(message, copy = copyOf(message)) {
    await this.start();
    return this.request(copy).catch((error) => {
      if (error instanceof Disconnected) return this.ask(message, copy);
      throw error;
    });
  }
  /** Return the reply to a message that is sent now. @internal @param {Message} message @returns {Promise<any>} */
  async request(message, socket = this.socket) {
    const [id, { max_bytes }, reply] = [(message.id ??= `${++this.#ids}`), this.hub, deferred()];
    const text = toJson({ id, ...message }); // The hub finds the id in front of anything that it rejects.
    if (bytesOf(text) > max_bytes) throw new Refused(`more than ${max_bytes} bytes`, "too_large");
    if (!socket) throw disconnected("no hub");
    this.#requests.set(id, reply);
    socket.send(text);
    return reply;
  }
  /** Connect again after each lost session, until another attempt would be pointless. The pause starts over only after
   * a session that lasted longer than its limit; otherwise agents would storm a hub that drops their connections. */
  async #run() {
    const [urls, backS] = [this.#urls, this.#urls.length > 1 ? BACKOFF_STANDBY_S : BACKOFF_RETURN_S];
    let [at, limitS, lostAt, lateUntil] = [0, BACKOFF_FIRST_S, -Infinity, 0];
    for (;;) {
      const begunAt = now();
      const error = await this.#converse(urls[at]).catch((failure) => failure);
      const { ended, socket } = this;
      if (ended) return;
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
    const [socket, lost] = [/** @type {any} */ (new this.#WebSocket(url)), deferred()];
    /** @param {string} [why] @param {number} [code] */
    const lose = (why = "no answer", code) => lost.reject(disconnected(`${url}: ${why}`, code));
    let [timer, unheard] = [setTimeout(lose, 1000 * (this.#urls.length > 1 ? NEXT_HUB_S : HANDSHAKE_S)), 0];
    const beat = () => (unheard++ < 3 ? this.request({ type: "heartbeat" }).catch(ignore) : lose());
    this.#lose = lose;
    socket.onopen = () => {
      clearTimeout(timer);
      timer = setTimeout(lose, 1000 * REPLY_S);
      this.#register(socket).then(({ heartbeat_s }) => {
        clearTimeout(timer);
        timer = setInterval(beat, 1000 * Math.min(heartbeat_s, TTL_MAX_S));
      }).catch(lost.reject);
    };
    socket.onerror = () => lose("no hub"); // In Node, no close follows if it cannot connect.
    socket.onclose = (/** @type {any} */ { code, reason }) => lose(`closed with ${code} ${reason}`, code);
    socket.onmessage = (/** @type {any} */ { data }) => {
      unheard = 0;
      try { this.#receive(socket, JSON.parse(data)); } catch (error) { lose(`bad message: ${error}`); }
    };
    return lost.finally(() => {
      setTimeout(() => clearTimeout(timer)); // It may just be replaced.
      socket.onmessage = ignore; // Some may still come.
      socket.terminate?.();
      socket.close();
    });
  }
  /** Return the hub's reply to what this agent offers now, as soon as it has it all. @returns {Promise<Message>} */
  async #register(socket = this.socket) {
    const [offers, { length }] = [this.#offers, this.#offers];
    const message = { ...this.#about, agent_id: this.agentId, resume: this.resume, capabilities: offers };
    const isLong = bytesOf(toJson(message)) > UNAUTHENTICATED_MAX;
    if (isLong) socket.send(toJson({ type: "status", token: message.token }));
    const reply = await this.request(message, socket);
    return length === offers.length ? reply : this.#register(socket);
  }
  /** Use a socket from now on, before any message behind the reply to its registration is handled. Keep only those
   * tasks that the hub assigns here. @param {any} socket @param {Message} hub Its reply. */
  #adopt(socket, hub) {
    Object.assign(this, { socket, hub, agentId: hub.agent_id, resume: hub.resume });
    const left = new Map(this.tasks);
    for (const { task_id, attempt } of hub.tasks ?? []) {
      const task = left.get(task_id);
      left.delete(task_id);
      if (task && task.attempt === attempt) task.post();
      else new Task(this, { task_id, attempt, ttl: TTL_MAX_S }).fail("agent_lost", "not here");
    }
    for (const task of left.values()) task.stop("cancelled");
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
    if (this.ended) return;
    this.ended = this.#running = error;
    this.#lose();
    this.#disconnect(error);
    this.#joined.reject(error);
    for (const handle of this.handles.values()) handle.finish(error);
    for (const task of this.tasks.values()) task.stop("cancelled");
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
    else if (state in FINAL) task?.stop(state);
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
  #refusals = 0; // Of a result that does not fit, which becomes a failure that may be refused, too.
  /** @type {any} */ #result; // Until the hub has replied.

  /** @param {Agent} agent @param {Message} message @internal */
  constructor(agent, { task_id, sender, capability, input = null, attempt, trace, ttl, answers }) {
    this.#agent = agent;
    this.#answers = answers;
    this.#timer = setTimeout(() => this.stop("timeout"), ttl * 1000);
    agent.tasks.get(task_id)?.stop("cancelled"); // An earlier attempt.
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
  /** Ask the requester, and return its answer; one question after the other. Throws TaskFailed with the code
   * `no_answers` if it did not delegate the task with `answers` or `onQuestion`.
   * @param {string} text @param {{schema?: Json}} [options] @returns {Promise<any>} */
  async ask(text, { schema } = {}) {
    if (!this.#answers) throw new TaskFailed("no answers", "no_answers");
    const answered = this.#asking.then(async () => {
      this.signal.throwIfAborted();
      const { ask } = await this.#agent.ask({ type: "status", task_id: this.taskId, question: { text, schema } });
      return this.answerTo(ask); // A repeated question may be answered before its reply.
    });
    this.#asking = answered.catch(ignore);
    return Promise.race([answered, this.#ended]);
  }
  /** Delegate a subtask, which ends with this task. @param {Delegation} delegation @returns {Promise<any>} */
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
      const [sole, ...others] = handlers.keys();
      const handler = handlers.get(this.capability ?? (others.length ? "" : sole));
      if (!handler) throw new TaskFailed("no handler", "no_handler");
      let output = await handler(this.input, this);
      if (output?.[Symbol.asyncIterator]) output = await this.#sendAll(output);
      this.post({ success: true, output: copyOf(output) });
    } catch (/** @type {any} */ error) {
      if (error instanceof TaskFailed && !error.taskId) return this.fail(error.code, error.message);
      if (!this.signal.aborted) log(`agenthub: ${this.capability} failed`, error);
      this.fail("failed", safely(() => String(error), `${typeof error} without a text`));
    }
  }
  /** Send a report, which gets no reply; return whether it could be sent. @param {Message} report @returns {boolean} */
  #report(report, { socket, hub } = this.#agent) {
    const text = toJson({ type: "status", task_id: this.taskId, ...report });
    const isSent = !this.signal.aborted && socket?.bufferedAmount <= BUFFERED_MAX && bytesOf(text) <= hub.max_bytes;
    if (isSent) socket.send(text);
    return isSent;
  }
  /** Send what a generator yields as pieces, and return it all: texts joined, or a list. What was sent is always a
   * beginning of the output, so no more are sent when one was not, or the connection was lost.
   * @param {AsyncIterable<Json>} pieces */
  async #sendAll(pieces) {
    const [all, { socket, hub }] = [/** @type {Json[]} */ ([]), this.#agent];
    let [bytes, isSent] = [256, hub.features?.includes("stream")];
    for await (const piece of pieces) {
      const text = toJson(piece);
      all.push(JSON.parse(text));
      bytes += bytesOf(text);
      if (bytes > hub.max_bytes) throw new TaskFailed("too large", "too_large");
      this.signal.throwIfAborted();
      isSent &&= socket === this.#agent.socket && (text === "null" || this.#report({ piece }));
    }
    return all.every((piece) => typeof piece === "string") ? all.join("") : all;
  }
  /** @param {string} code @param {string} text @internal */
  fail(code, text) {
    const message = text.replaceAll("\0", "\\0").slice(0, TEXT_MAX);
    this.post({ success: false, error: { code, message } });
  }
  /** Send the result, as on each session until the hub has replied. @internal @param {Message} [outcome] */
  async post(outcome) {
    if (outcome) this.#result = { type: "result", task_id: this.taskId, attempt: this.attempt, ...outcome };
    if (!this.#result || this.signal.aborted) return;
    const refusal = await this.#agent.request(this.#result).then(ignore, (error) => error);
    if (refusal instanceof Disconnected || this.signal.aborted) return;
    const code = { too_large: "too_large", invalid_message: "failed" }[/** @type {string} */ (refusal?.code)];
    code && !this.#refusals++ ? this.fail(code, `refused: ${refusal.message}`) : this.#forget();
  }
  #forget() {
    clearTimeout(this.#timer);
    this.#agent.tasks.delete(this.taskId);
  }
  /** Abort the handler: the task has ended without it. @param {string} state @internal */
  stop(state) {
    const reason = new TaskFailed(`it has ended: ${state}`, state, this.taskId);
    this.#forget();
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
  /** @type {boolean | null} */ #isAccepted = false; #isCancelled = false; // Null: it is sent again.
  #agent; #message; #onQuestion;
  #deadline = 0; // To be accepted; then that of the task.
  /** @type {string | undefined} */ #sentAs; // The agent_id with which it was last sent.
  /** @type {any} */ #timer;
  /** @type {string} */ taskId;
  /** Whether the task has ended. */ done = false;
  /** @internal */ accepted = deferred();
  /** @internal */ pieces = /** @type {Json[]} */ ([]); // The beginning of the output, without a gap.
  /** @internal */ lost = false; // Some reports were, so what comes after the pieces is not known.

  /** @internal @param {Agent} agent @param {any} capability @param {Json} input @param {TaskOptions} options */
  constructor(agent, capability, input, { ttl = 300, taskId = `js-${crypto.randomUUID()}`, signal, ...options }) {
    const { maxRetries: max_retries = 0, agentId: agent_id, parentId: parent_id, onQuestion, ...more } = options;
    checkRange("ttl", ttl, TTL_MAX_S);
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
    const error = { code: "cancelled", message: reason.slice(0, TEXT_MAX) };
    if (!this.done) await this.#send({ type: "result", success: false, error });
  }
  /** Answer the last question, or that of the number `ask`; return whether it still waited. @param {Json} answer */
  async answer(answer, ask = this.#asked) { return this.#send({ type: "status", ask, answer }); }
  /** Return whether a message did not come too late. Throws Refused for another reason. @param {Message} message */
  #send(message) {
    return this.#agent.ask({ ...message, task_id: this.taskId }).then(() => true, (/** @type {any} */ error) => {
      if (["task_over", "unknown_task", "no_question"].includes(error.code)) return false;
      throw error;
    });
  }
  /** @returns {AsyncGenerator<TaskEvent, void>} */
  async *[Symbol.asyncIterator]() {
    for (;;) {
      for (let event; (event = this.#events.shift()); ) yield event;
      if (this.done) return;
      await this.#news;
    }
  }
  /** Send the task, or ask for its state if the hub has it: on each session, and when an outcome is late. @internal */
  async sync(limitS = BACKOFF_FIRST_S) {
    const [agent, { agentId, socket }] = [this.#agent, this.#agent];
    if (this.#sentAs && this.#sentAs !== agentId) this.#retry(); // The hub is another one, or has forgotten this agent.
    if (this.done || !socket) return;
    try {
      if (this.#isAccepted) return this.onNews(await agent.request({ type: "status", task_id: this.taskId }));
      this.#sentAs = agentId;
      const { attempt } = await agent.request(this.#message);
      if (this.done) return;
      this.#isAccepted = true;
      this.onNews({ attempt });
      this.#expire(this.#message.ttl, LATE_S);
      this.accepted.resolve();
    } catch (/** @type {any} */ error) {
      if (error instanceof Disconnected) return; // The next session continues.
      if (error.code === "unknown_task" && this.#isAccepted) this.#retry();
      else if (error.code === "overloaded") await within(Math.random() * limitS, this.#outcome.catch(ignore));
      else {
        this.#isAccepted ?? this.#fail(); // The hub that it was sent to again has it from an agent that is forgotten.
        return this.finish(error);
      }
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
    this.finish(error);
  }
  #fail(message = "lost with its hub", code = "hub_lost", Kind = TaskFailed) {
    this.finish(new Kind(message, code, this.taskId));
  }
  /** End with an error, or (null) an output. @param {any} error @param {Json} [output] @internal */
  finish(error, output) {
    this.done = true;
    error ? this.#outcome.reject(error) : this.#outcome.resolve(output);
    this.accepted.resolve(this.#outcome);
    this.#news.resolve();
  }
}
