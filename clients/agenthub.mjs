// AgentHub for JavaScript: one ES module for Node 22 (20 with the package `ws`), Deno, Bun and browsers. Copy it.
// docs/javascript.md shows how to use it, docs/protocol.md is the protocol; objects from the hub keep its names.
//
//   Session  one socket           Core    what an agent keeps over all its sessions: requests without a reply, tasks
//   Task     for its handler      Handle  for the requester of a task      Agent  a name, its handlers, its requests
//
// A message without a reply may or may not have been read, so only those that are safe to repeat are sent again on the
// next session: a delegation (the hub knows its task_id), a result (it names its attempt), a cancellation, a question
// (by its id) and an answer. A broadcast is not; progress and pieces may be missed.

const BACKOFF_FIRST_S = 0.5, BACKOFF_MAX_S = 30; // Limits of the random pause between two attempts,
const BACKOFF_RETURN_S = 6, RETURN_MIN_S = 120, RETURN_MAX_S = 3600; // while a hub that was there is expected back,
const BACKOFF_TAKEOVER_S = 1.5, TAKEOVER_S = 30; // and while a standby is expected to take over.
const HANDSHAKE_S = 10, NEXT_HUB_S = 3; // For a socket to open; the same where there is another hub to try.
const REPLY_S = 10, LATE_REGISTRATION_S = 120; // For the reply to a registration; the hub may read a late one so long.
const LATE_S = 5, LEAVING_S = 2; // For an outcome after its deadline; for the hub to acknowledge that an agent leaves.
const TTL_MAX_S = 604_800, TASKS_MAX = 10_000, TASKS_OVER = 100; // A worker holds up to twice its maxTasks and so many.
const EVENTS_MAX = 1000, TEXT_MAX = 65_536; // Events kept for a slow consumer, the newest; characters of an error.
const BUFFERED_MAX = 1 << 20, UNAUTHENTICATED_MAX = 16_000; // Bytes waiting in a socket; of a message before the token.

/** @typedef {any} Json @typedef {{[field: string]: any}} Message @typedef {(input: any, task: Task) => any} Handler */
/** @typedef {{text: string, schema?: Json, ask: number}} Question  `ask` counts the questions of a task from 1. */
/** @typedef {{progress?: number | null, detail?: Json, piece?: Json, question?: Question, seq?: number}} TaskEvent */
/** @typedef {{name: string, description?: string, input_schema?: Json, output_schema?: Json}} Capability */
/** @typedef {{agent_id: string, name: string, description: string, running: number, max_tasks: number,
 *   metadata: Message, capabilities: Capability[], online_s?: number}} AgentInfo */
/** @typedef {{url?: string, token?: string, description?: string, maxTasks?: number, metadata?: Message,
 *   agentId?: string, resume?: string, WebSocket?: any, log?: (text: string, error?: unknown) => void}} AgentOptions */
/** @typedef {{ttl?: number, priority?: number, maxRetries?: number, wait?: boolean, agentId?: string, taskId?: string,
 *   parentId?: string, trace?: {[key: string]: string}, signal?: AbortSignal, answers?: boolean,
 *   onQuestion?: (question: Question, handle: Handle) => any}} TaskOptions  Times are in seconds. */
/** @typedef {[capability: string | null, input?: Json, options?: TaskOptions]} Delegation  To a named worker: null. */

/** The base of all errors of this module. `code` is stable, for programs; `message` is for people. */
export class AgentHubError extends Error {
  /** @type {number | undefined} */ closeCode; // Of the WebSocket, if Disconnected has one.
  /** @param {string} message @param {string} [code] @param {string} [taskId] */
  constructor(message, code = "failed", taskId) {
    super(message);
    this.name = new.target.name;
    this.code = code;
    this.taskId = taskId;
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

const FINAL = ["completed", "failed", "timeout"];
const now = () => performance.now() / 1000;
const ignore = () => {};
const bytesOf = (/** @type {string} */ text) => new TextEncoder().encode(text).length;
const disconnected = (/** @type {string} */ why, /** @type {number | undefined} */ closeCode = undefined) =>
  Object.assign(new Disconnected(why, "hub_lost"), { closeCode });
/** @returns {any} A promise with its functions `resolve` and `reject`; nobody has to wait for it. */
const deferred = (/** @type {any} */ more = {}) => {
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
/** Return the text of whatever was thrown. */
const textOf = (/** @type {any} */ error) => {
  try { return String(error); } catch { return `${typeof error} without a text`; }
};
/** Return a value as JSON; undefined becomes null. Throws TypeError. @returns {string} */
const toJson = (/** @type {any} */ value) => {
  const text = JSON.stringify(value ?? null);
  if (text === undefined) throw new TypeError(`a ${typeof value} is not JSON`);
  return text;
};

/** Open a socket. `lost` rejects when it is of no more use; nothing that arrives afterwards is heard.
 * @param {any} WebSocketClass @param {string} url @param {(session: any, text: string) => void} onText */
function openSession(WebSocketClass, url, onText) {
  const socket = new WebSocketClass(url);
  const lose = (/** @type {string} */ why, /** @type {number | undefined} */ closeCode = undefined) => {
    session.lost.reject(disconnected(why, closeCode));
    socket.onmessage = socket.onclose = socket.onerror = ignore; // Closing may call them at once.
    socket.terminate ? socket.terminate() : socket.close();
  };
  const session = { socket, lose, receivedAt: now(), opened: deferred(), lost: deferred() };
  socket.onopen = () => session.opened.resolve(true);
  socket.onerror = () => lose(`no hub at ${url}`); // In Node, no close follows if it cannot connect.
  socket.onclose = (/** @type {any} */ { code, reason }) => lose(`no hub at ${url}: ${code} ${reason}`, code);
  socket.onmessage = (/** @type {any} */ { data }) => {
    try { onText(session, data); } catch (error) { lose(`the hub sent what is not of the protocol: ${error}`); }
  };
  return session;
}

/** What an agent keeps over all its sessions: its tasks, and its requests without a reply. @param {Message} options */
function createCore({ name, description, maxTasks, metadata, urls, token, WebSocket, log, agentId, resume }) {
  const core = {
    /** @type {any} */ session: null,
    /** @type {any} */ ended: null, // Why there will be no other session.
    /** @type {string[]} */ features: [], // What the hub can do beyond the first version of the protocol.
    identity: { agent_id: agentId, resume }, // The hub issues both.
    /** @type {Map<string, {offer: Message, handler: Handler}>} */ handlers: new Map(),
    /** @type {Map<string, Handle>} */ handles: new Map(), // By task_id, until their outcome.
    /** @type {((message: Json, sender: string) => any) | null} */ onBroadcast: null,
    maxBytes: 1 << 20, isLeaving: false, started: deferred(), closed: deferred(),
    isBusy: () => running.size + results.size > 0,
    log, run, end, announce, request,
  };
  /** @type {Map<string, any>} */ const running = new Map(); // By task_id: the attempt, until its task has ended,
  /** @type {Map<string, any>} */ const results = new Map(); // and its result, until the hub has replied.
  /** @type {Map<string, any>} */ const requests = new Map(); // By id, in order, until the reply.
  let [ids, pause] = [0, deferred()];
  /** @type {any} */ let current; // The session in use, or the one that is being opened.
  let lateUntil = 0; // A registration that was given up may reach the hub until then.

  /** Connect again after each lost session, until another attempt would be pointless. The pause starts over only after
   * a session that lasted longer than its limit; otherwise agents would storm a hub that drops their connections. */
  async function run() {
    let [limitS, lastedS, lostAt] = [BACKOFF_FIRST_S, 0, -Infinity];
    while (!core.ended) {
      const begunAt = now();
      const error = await converse().catch((failure) => failure);
      if (core.session && now() - begunAt > limitS) {
        [limitS, lastedS, lostAt] = [BACKOFF_FIRST_S, now() - begunAt, now()];
      }
      release(error);
      const isReplaced = error.closeCode === 4000 && now() > lateUntil; // Otherwise perhaps by itself.
      if (!(error instanceof Disconnected) || error.closeCode === 1008 || isReplaced) end(error);
      if (core.ended) return;
      const [pauseS, awayS] = [Math.random() * limitS, now() - lostAt];
      const isTakenOver = awayS < TAKEOVER_S && urls.length > 1;
      const isExpected = awayS < Math.min(Math.max(RETURN_MIN_S, lastedS), RETURN_MAX_S);
      limitS = Math.min(2 * limitS, isTakenOver ? BACKOFF_TAKEOVER_S : isExpected ? BACKOFF_RETURN_S : BACKOFF_MAX_S);
      if (!core.isLeaving) log(`${error.message}; next attempt in ${pauseS.toFixed(1)} s`);
      await within(pauseS, (pause = deferred()));
    }
  }
  /** Open a session, register, and throw why it was lost, or what makes another attempt pointless. */
  async function converse() {
    const session = await connect();
    let heartbeat;
    try {
      const registration = register();
      const text = toJson({ ...registration, token });
      if (token && text.length * 3 > UNAUTHENTICATED_MAX) session.socket.send(toJson({ type: "status", token }));
      const registered = request(text, false, (reply) => adopt(session, registration, reply), session);
      const reply = await within(REPLY_S, Promise.race([registered, session.lost]));
      if (!reply) session.lose(`the hub did not answer within ${REPLY_S} s`);
      const intervalS = Math.min(Math.max(0.01, reply?.heartbeat_s), 86_400);
      heartbeat = setInterval(() => {
        if (now() - session.receivedAt > 3 * intervalS) session.lose("the hub was silent for three heartbeats");
        else request('{"type":"heartbeat"}', false).catch(ignore);
      }, intervalS * 1000);
      return await session.lost;
    } catch (/** @type {any} */ error) {
      throw ["overloaded", "internal"].includes(error.code) ? disconnected(error.message) : error; // These pass.
    } finally {
      clearInterval(heartbeat);
      session.lose("it is of no more use");
      if (core.session !== session) lateUntil = now() + LATE_REGISTRATION_S;
    }
  }
  /** Return a session with the first hub that accepts one; the last good one is tried first. */
  async function connect() {
    const reasons = [];
    for (const url of core.ended ? [] : [...urls]) {
      const session = (current = openSession(WebSocket, url, receive));
      const limitS = urls.length > 1 ? NEXT_HUB_S : HANDSHAKE_S;
      try {
        const isOpen = await within(limitS, Promise.race([session.opened, session.lost]));
        if (!isOpen) session.lose(`no answer from ${url}`);
        await Promise.race([session.lost, null]);
        urls.unshift(...urls.splice(urls.indexOf(url), 1));
        return session;
      } catch (/** @type {any} */ error) {
        reasons.push(error.message);
      }
    }
    throw disconnected(reasons.join("; "));
  }
  /** Return what this agent says of itself. @returns {Message} */
  function register() {
    const capabilities = [...core.handlers.values()].map(({ offer }) => offer);
    return { type: "register", name, description, max_tasks: maxTasks, metadata, capabilities, ...core.identity };
  }
  /** Register once more if there is a session, because what the agent offers has changed. */
  function announce() {
    if (core.session) request(toJson(register()), false).catch((error) => log("not registered again", error));
  }
  /** Use a session from now on, before any message behind the reply to its registration is handled. Keep only those
   * tasks that the hub assigns here. @param {any} session @param {Message} registration @param {Message} reply */
  function adopt(session, registration, { agent_id, resume, tasks, max_bytes, features = [] }) {
    if (core.ended) return;
    const maxBytes = max_bytes - Math.min(1024, max_bytes >> 2); // The hub keeps the rest for what it adds.
    Object.assign(core, { session, features, maxBytes, identity: { agent_id, resume } });
        const assigned = new Map(tasks?.map((/** @type {Message} */ ref) => [ref.task_id, ref.attempt]));
    for (const [id, { attempt }] of [...running]) if (assigned.get(id) !== attempt) stop(id, "cancelled");
    for (const [id, one] of [...results]) assigned.get(id) === one.attempt ? post(id, one) : results.delete(id);
    for (const [id, attempt] of assigned) {
      if (!running.has(id) && !results.has(id)) fail(id, attempt, "agent_lost", "the agent does not have this task");
    }
    if (registration.capabilities.length < core.handlers.size) announce(); // It offers more meanwhile.
    for (const handle of [...core.handles.values()]) handle.refresh();
    for (const [id, waiting] of [...requests]) if (!waiting.isSent) write(session, id, waiting);
    core.started.resolve();
  }
  /** Let the requests of a lost session wait for the next one, or fail. @param {Error} error */
  function release(error) {
    core.session = null;
    for (const [id, sent] of [...requests]) {
      if (sent.isSent && !sent.repeats && requests.delete(id)) sent.reject(error);
      sent.isSent = false;
    }
  }
  /** Fail whatever waits: there will be no other session. @param {Error} error */
  function end(error) {
    if (core.ended) return;
    core.ended = error;
    current?.lose(error.message);
    pause.resolve();
    for (const { reject } of requests.values()) reject(error);
    for (const handle of [...core.handles.values()]) handle.finish(error);
    for (const id of [...running.keys()]) stop(id, "cancelled");
    core.started.reject(error);
    core.isLeaving ? core.closed.resolve() : core.closed.reject(error);
  }
  /** Return the reply to a message, sent now or on the next session. Throws Refused, or what ended the agent.
   * @param {string | (() => string)} text Without the id; a function returns it for each session.
   * @param {boolean} [repeats] Whether it is safe to repeat; if not, throws Disconnected when its session is lost.
   * @param {(reply: Message) => void} [onReply] Is called before any message behind the reply is handled.
   * @returns {Promise<Message>} */
  async function request(text, repeats = true, onReply = ignore, session = core.session) {
    if (core.ended) throw core.ended;
    const [id, waiting] = [String(++ids), deferred({ text, repeats, onReply, isSent: false })];
    requests.set(id, waiting);
    if (session) write(session, id, waiting);
    return waiting;
  }
  /** @param {any} session @param {string} id @param {any} waiting */
  function write(session, id, waiting) {
    try {
      const text = `{"id":"${id}",${(typeof waiting.text === "string" ? waiting.text : waiting.text()).slice(1)}`;
      const bytes = text.length * 3 <= core.maxBytes ? 0 : bytesOf(text);
      if (bytes > core.maxBytes) throw new Refused(`${bytes} bytes: the hub takes ${core.maxBytes}`, "too_large");
      waiting.isSent = true;
      session.socket.send(text);
    } catch (error) {
      requests.delete(id);
      waiting.reject(error);
    }
  }
  /** @param {any} session @param {string} text */
  function receive(session, text) {
    session.receivedAt = now();
    const message = JSON.parse(text);
    const { type, reply_to, task_id, state, ask, question, code } = message;
    const [waiting, attempted] = [requests.get(reply_to), running.get(task_id)];
    requests.delete(reply_to);
    if (waiting && type === "error") waiting.reject(new Refused(message.message, code, task_id));
    else if (type === "error") log(`refused: ${code}: ${message.message}`);
    else if (waiting) waiting.resolve((waiting.onReply(message), message));
    else if (type === "delegate") assign(message);
    else if (type === "broadcast") hear(message);
    else if (type === "status" && FINAL.includes(state)) stop(task_id, state);
    else if (type !== "status" || !ask || question) core.handles.get(task_id)?.onNews(message);
    else if (attempted) attempted.onAnswer(message);
  }
  async function hear(/** @type {Message} */ { message = null, sender }) {
    try { await core.onBroadcast?.(message, sender); } catch (error) { log("onBroadcast failed", error); }
  }
  /** Start the handler of a task; not a second time for the same attempt. @param {Message} message */
  function assign(message) {
    const { task_id: id, attempt, ttl } = message;
    if (running.get(id)?.attempt === attempt) return;
    stop(id, "cancelled");
    const isTooMany = running.size + results.size >= 2 * maxTasks + TASKS_OVER;
    if (isTooMany) return core.session?.lose("the hub assigns more tasks than maxTasks allows");
    const timer = setTimeout(() => stop(id, "timeout"), ttl * 1000);
    const attempted = { attempt, timer, controller: new AbortController(), onAnswer: ignore };
    running.set(id, attempted);
    work(attempted, new Task(core, attempted, message));
  }
  /** Abort a task that has ended without its handler. @param {string} id @param {string} state */
  function stop(id, state) {
    const attempted = running.get(id);
    forget(id, attempted);
    attempted?.controller.abort(new TaskFailed(`the task has ended: ${state}`, state, id));
  }
  /** Return whether an attempt was not stopped before. @param {string} id @param {any} attempted */
  function forget(id, attempted) {
    clearTimeout(attempted?.timer);
    return running.get(id) === attempted && running.delete(id);
  }
  /** Do a task and send its result; none if the task has ended meanwhile. @param {any} attempted @param {Task} task */
  async function work(attempted, task) {
    const { taskId, attempt, capability, input } = task;
    try {
      const names = [...core.handlers.keys()];
      const { handler } = core.handlers.get(capability ?? (names.length === 1 ? names[0] : "")) ?? {};
      if (!handler) throw new TaskFailed(`this agent offers ${names.join(", ") || "nothing"}`, "no_handler");
      let output = await handler(input, task);
      if (typeof output?.[Symbol.asyncIterator] === "function") output = await task.sendAll(output);
      const text = toJson({ type: "result", task_id: taskId, attempt, success: true, output });
      if (forget(taskId, attempted)) post(taskId, { attempt, text });
    } catch (/** @type {any} */ error) {
      if (!forget(taskId, attempted)) return;
      const isOwn = error instanceof TaskFailed && !error.taskId;
      if (!isOwn) log(`the handler of ${capability} failed`, error);
      fail(taskId, attempt, isOwn ? error.code : "failed", isOwn ? error.message : textOf(error));
    }
  }
  /** @param {string} id @param {number} attempt @param {string} code @param {string} message */
  function fail(id, attempt, code, message, isLast = false) {
    const error = { code, message: message.replaceAll("\0", "\\x00").slice(0, TEXT_MAX) };
    post(id, { attempt, isLast, text: toJson({ type: "result", task_id: id, attempt, success: false, error }) });
  }
  /** Send a result, and keep it until the hub has replied; without a session, `adopt` sends it.
   * @param {string} id @param {any} result */
  function post(id, result) {
    results.set(id, result);
    const settle = (/** @type {any} */ reply) => {
      if (reply instanceof Disconnected || results.get(id) !== result) return;
      results.delete(id);
      const { code, message } = reply;
      const isUnfit = !result.isLast && (code === "invalid_message" || code === "too_large");
      if (isUnfit) fail(id, result.attempt, code === "too_large" ? code : "failed", `refused: ${message}`, true);
    };
    if (core.session) request(result.text, false).then(settle, settle);
  }
  return core;
}
/** @typedef {ReturnType<typeof createCore>} Core */

/** A task, as its handler sees it. `signal` is aborted when the task ends without its handler. */
export class Task {
  #core;
  #work;
  #answers;
  /** @type {any} */ #asking;
  /** @param {Core} core @param {any} work @param {Message} message @internal */
  constructor(core, work, message) {
    this.#core = core;
    this.#work = work;
    this.#answers = message.answers === true; // Hubs that pass no questions on do not say so.
    /** @type {AbortSignal} */ this.signal = work.controller.signal;
    /** @type {string} */ this.taskId = message.task_id;
    /** @type {string} */ this.requester = message.sender; // Its agent_id.
    /** @type {string | undefined} */ this.capability = message.capability ?? undefined;
    /** @type {Json} */ this.input = message.input ?? null;
    /** @type {number} */ this.attempt = message.attempt; // Counts from 1.
    /** @type {{[key: string]: string} | undefined} */ this.trace = message.trace ?? undefined;
    /** @type {number} */ this.deadline = now() + message.ttl; // In seconds of performance.now().
  }
  #isSlow = () => !(this.#core.session?.socket.bufferedAmount <= BUFFERED_MAX);
  #report = (/** @type {Message} */ report) =>
    this.#core.request(toJson({ type: "status", task_id: this.taskId, ...report }), false);

  /** Report progress: a number from 0 to 1, and any JSON. Dropped without a connection, or if that is slow.
   * @param {number | null} progress @param {Json} [detail] */
  progress(progress, detail) {
    const complain = (/** @type {Error} */ error) => this.#core.log(`a report was lost: ${error.message}`);
    if (!this.signal.aborted && !this.#isSlow()) this.#report({ progress, detail }).catch(complain);
  }
  /** Send what a generator yields as pieces, at the pace of the connection, and return it all: texts joined, or a list.
   * What was sent is always a beginning of the output, so no more are sent after a connection was lost.
   * @param {AsyncIterable<Json>} pieces @internal */
  async sendAll(pieces) {
    const [{ session, features, maxBytes }, parts] = [this.#core, /** @type {string[]} */ ([])];
    let [isText, size] = [true, 0];
    for await (const piece of pieces) {
      const part = toJson(piece);
      parts.push(part);
      isText &&= typeof piece === "string";
      if ((size += bytesOf(part)) > maxBytes - 256) throw new TaskFailed("the output is too large", "too_large");
      while (session && session === this.#core.session && this.#isSlow()) await within(0.02, deferred());
      this.signal.throwIfAborted();
      const isSent = part !== "null" && session && session === this.#core.session && features.includes("stream");
      if (isSent) session.socket.send(`{"type":"status","task_id":"${this.taskId}","piece":${part}}`);
    }
    const all = JSON.parse(`[${parts}]`);
    return isText ? all.join("") : all;
  }
  /** Ask the requester, and return its answer; one question after the other. Throws TaskFailed with the code
   * `no_answers` if it did not delegate the task with `answers` or `onQuestion`.
   * @param {string} text @param {{schema?: Json}} [options] @returns {Promise<any>} */
  async ask(text, { schema } = {}) {
    if (!this.#answers) throw new TaskFailed("the requester of this task cannot be asked", "no_answers");
    const [before, question] = [this.#asking, (this.#asking = deferred())];
    await before?.catch(ignore);
    this.signal.throwIfAborted();
    let [number, given] = [0, /** @type {any} */ (null)]; // A repeated question may be answered before its reply.
    const settle = () => given?.ask === number && question.resolve(given.answer ?? null);
    this.#work.onAnswer = (/** @type {Message} */ answer) => ((given = answer), settle());
    const message = toJson({ type: "status", task_id: this.taskId, question: { text, schema } });
    this.#core.request(message, true, ({ ask }) => ((number = ask), settle())).catch(question.reject);
    this.signal.addEventListener("abort", () => question.reject(this.signal.reason));
    return question;
  }
  /** Delegate a subtask, as `Agent.delegate` does; it ends with this task at the latest.
   * @param {Delegation} delegation @returns {Promise<any>} */
  async delegate(...delegation) {
    return (await this.submit(...delegation)).result();
  }
  /** Submit a subtask, as `Agent.submit` does. @param {Delegation} delegation */
  submit(...[capability, input, options]) {
    const { signal, trace, taskId: parentId } = this;
    return submit(this.#core, capability, input, { signal, trace, ...options, parentId });
  }
}

/** A task that this agent delegated. Iterate it (`for await`) for its events, until its outcome. */
export class Handle {
  /** Whether the task has ended. */ done = false;
  /** @internal */ begunSeq = 0; // Of the report that the present attempt has begun.
  /** @type {Core} */ #core;
  /** @type {Message} */ #message; // Without the input, which is sent as it was, and
  /** @type {string} */ #input;
  /** @type {TaskOptions} */ #options;
  /** @type {TaskEvent[]} */ #events = [];
  /** @type {any} */ #timer;
  /** @type {string | undefined} */ #sentAs; // The agent_id under which it was last sent.
  #outcome = deferred();
  #news = deferred();
  #deadline = Infinity; // Until the hub has accepted it.
  #isCancelled = false;
  #attempts = 1; // That the hub has begun, as far as it said.
  #asked = 0; // The number of the last question.
  #onAbort = () => (this.cancel().catch(ignore), this.finish(this.#options.signal?.reason));

  /** @param {Core} core @param {Message} message @param {string} input @param {TaskOptions} options @internal */
  constructor(core, message, input, options) {
    this.#core = core;
    this.#message = message;
    this.#input = input;
    this.#options = options;
    this.taskId = /** @type {string} */ (message.task_id);
    core.handles.set(this.taskId, this);
    options.signal?.addEventListener("abort", this.#onAbort);
  }

  /** Return the output, when the task has completed. Throws TaskFailed, with the hub's code (`hub_lost` if the hub no
   * longer knows the task), TaskTimeout, the reason of the signal, or what ended the agent. @returns {Promise<any>} */
  result() {
    return this.#outcome;
  }
  /** Cancel the task: `result` then throws TaskFailed with the code `cancelled`. Without effect if it has ended. */
  async cancel(reason = "its requester stopped waiting") {
    this.#isCancelled = true;
    const error = { code: "cancelled", message: reason.slice(0, TEXT_MAX) };
    if (!this.done) await this.#send({ type: "result", success: false, error }, "task_over", "unknown_task");
  }
  /** Answer the last question; return whether it still waited for its answer. @param {Json} answer */
  async answer(answer) {
    return this.#send({ type: "status", ask: this.#asked, answer: answer ?? null }, "no_question", "task_over");
  }
  /** Return whether the hub takes a message; throw a refusal with any other code. */
  async #send(/** @type {Message} */ message, /** @type {string[]} */ ...codes) {
    try { await this.#core.request(toJson({ ...message, task_id: this.taskId })); } catch (/** @type {any} */ error) {
      if (!codes.includes(error.code)) throw error;
      return false;
    }
    return true;
  }
  /** @returns {AsyncGenerator<TaskEvent, void>} */
  async *[Symbol.asyncIterator]() {
    for (;;) {
      for (let event; (event = this.#events.shift()); ) yield event;
      if (this.done) return;
      await this.#news;
    }
  }

  /** Send the task until the hub has accepted it, again while that is overloaded. Throws what `finish` was given.
   * @internal */
  async submit() {
    const last = now() + this.#message.ttl;
    const late = new TaskTimeout("the hub did not accept the task within its ttl", "timeout", this.taskId);
    this.#timer = setTimeout(() => (this.cancel().catch(ignore), this.finish(late)), this.#message.ttl * 1000);
    for (let limitS = BACKOFF_FIRST_S; ; limitS = Math.min(2 * limitS, BACKOFF_MAX_S)) {
      try {
        await this.#core.request(() => this.#text(), true, (reply) => this.#accept(reply));
        return;
      } catch (/** @type {any} */ error) {
        if (this.done || error.code !== "overloaded") throw this.finish(error);
        await within(Math.random() * limitS, this.#outcome);
        this.#message.ttl = Math.max(0.001, last - now()); // It has not begun, so it gets only what is left.
      }
    }
  }
  /** Return the message for this session. Throws TaskFailed if an earlier hub may have begun all attempts. */
  #text() {
    const { agent_id } = this.#core.identity;
    if (this.done) throw new TaskFailed("it has ended");
    if (this.#sentAs && this.#sentAs !== agent_id) this.#retry(); // Its reply was lost, and this hub does not know it.
    this.#sentAs = agent_id;
    return `${toJson(this.#message).slice(0, -1)},"input":${this.#input}}`;
  }
  #accept(/** @type {Message} */ { attempt }) {
    this.#attempts = Math.max(this.#attempts, attempt ?? 0);
    this.#deadline = now() + this.#message.ttl;
    this.#watch(this.#message.ttl);
  }
  /** Make sure that nobody waits forever for the outcome of a task whose hub is gone. */
  #watch(leftS = 0) {
    clearTimeout(this.#timer);
    if (!this.done) this.#timer = setTimeout(() => {
      if (!this.#core.session) this.#fail("the deadline passed without a connection to the hub");
      this.refresh();
      this.#watch();
    }, (leftS + LATE_S) * 1000);
  }
  /** Prepare the message for a hub that has forgotten the task, whose workers may not be back. Throws TaskFailed. */
  #retry() {
    const retries = this.#message.max_retries - this.#attempts;
    const text = "the hub no longer knows this task; delegate it again";
    if (retries < 0 || this.#message.parent_id) throw new TaskFailed(text, "hub_lost", this.taskId);
    if (this.#isCancelled) throw new TaskFailed("the task was cancelled", "cancelled", this.taskId);
    [this.#attempts, this.#asked] = [1, 0];
    Object.assign(this.#message, { max_retries: retries, wait: true });
  }
  /** Ask for the state of an accepted task, and submit it again if the hub has forgotten it. @internal */
  async refresh() {
    if (this.done || this.#deadline === Infinity) return;
    const { agent_id } = this.#core.identity;
    try {
      const report = await this.#core.request(toJson({ type: "status", task_id: this.taskId }), false);
      if (report.requester !== agent_id) this.#fail("the hub no longer knows that this agent delegated the task");
      else this.onNews(report);
    } catch (/** @type {any} */ error) {
      const leftS = this.#deadline - now();
      if (!(error instanceof Refused) || leftS === Infinity) return; // It asks on the next session, or is submitted.
      if (error.code !== "unknown_task" || leftS <= 0) return this.#fail(error.message);
      try { this.#retry(); } catch (failure) { return this.finish(failure); }
      [this.#deadline, this.#sentAs, this.#message.ttl] = [Infinity, undefined, leftS];
      clearTimeout(this.#timer);
      this.submit().catch(ignore);
    }
  }
  /** Take progress, a piece, a question, or an outcome. @param {Message} news @internal */
  onNews({ state, attempt, seq, progress, detail, piece, ask, question, output = null, error }) {
    this.#attempts = Math.max(this.#attempts, attempt ?? 0);
    if (state === "completed") this.finish(null, output);
    else if (state === "timeout") this.finish(new TaskTimeout(error?.message ?? state, state, this.taskId));
    else if (state === "failed") this.#fail(error?.message ?? state, error?.code ?? state);
    else if (question && ask > this.#asked) this.#onQuestion({ ...question, ask: (this.#asked = ask) });
    else if ((progress ?? detail ?? piece ?? null) !== null) this.#push({ progress, detail, piece, seq });
    else if (seq) this.begunSeq = seq;
  }
  async #onQuestion(/** @type {Question} */ question) {
    this.#push({ question });
    try {
      if (!this.#options.onQuestion) return;
      const answer = await this.#options.onQuestion(question, this);
      if (this.#asked === question.ask && !this.done) await this.answer(answer);
    } catch (error) {
      if (this.#asked !== question.ask) return; // A newer one has replaced it.
      this.cancel("its requester failed to answer").catch(ignore);
      this.finish(error);
    }
  }
  #push(/** @type {TaskEvent} */ event) {
    if (this.#events.push(event) > EVENTS_MAX) this.#events.shift();
    this.#news.resolve();
    this.#news = deferred();
  }
  #fail(/** @type {string} */ message, code = "hub_lost") {
    this.finish(new TaskFailed(message, code, this.taskId));
  }
  /** End with an error, or (null) an output; return the error. @param {any} error @param {Json} [output] @internal */
  finish(error, output) {
    if (this.done) return error;
    this.done = true;
    clearTimeout(this.#timer);
    this.#core.handles.delete(this.taskId);
    this.#options.signal?.removeEventListener("abort", this.#onAbort);
    error === null ? this.#outcome.resolve(output) : this.#outcome.reject(error);
    this.#news.resolve();
    return error;
  }
}

/** Return the pieces of an output behind the first ones; null if these are not its beginning.
 * @param {Json} output @param {Json[]} got @returns {Json[] | null} */
function restOf(output, got) {
  const count = got.length;
  if (Array.isArray(output)) return toJson(output.slice(0, count)) === toJson(got) ? output.slice(count) : null;
  if (!count) return output === null ? [] : [output];
  const isText = typeof output === "string" && got.every((piece) => typeof piece === "string");
  const head = isText ? got.join("") : null;
  return head === null || !output.startsWith(head) ? null : output === head ? [] : [output.slice(head.length)];
}

/** @param {Core} core @param {string | null} capability @param {Json} input @param {TaskOptions} options */
async function submit(core, capability, input, options) {
  const { ttl = 300, taskId = `js-${crypto.randomUUID()}`, maxRetries: max_retries = 0, onQuestion } = options;
  const { agentId: agent_id, parentId: parent_id, priority, wait, trace, answers = onQuestion && true } = options;
  if (!(ttl > 0 && ttl <= TTL_MAX_S)) throw new RangeError(`ttl must be more than 0 and at most ${TTL_MAX_S} seconds`);
  if (core.handles.has(taskId)) throw new TypeError(`this agent has an open task ${taskId}`);
  options.signal?.throwIfAborted();
  if (core.ended) throw core.ended;
  const route = { type: "delegate", task_id: taskId, capability, agent_id, parent_id, trace, answers };
  const handle = new Handle(core, { ...route, ttl, priority, max_retries, wait }, toJson(input), options);
  await Promise.race([handle.submit(), handle.result()]);
  return handle;
}

/** A program on the hub: what it offers, and its way to delegate to others. It connects by `start`, or by its first
 * request, and keeps trying without a hub. */
export class Agent {
  #core;
  #isStarted = false;

  /** @param {string} name For people; several agents may have the same. @param {AgentOptions} [options] */
  constructor(name, options = {}) {
    const { maxTasks = 16, url = environment("AGENTHUB_URL") || "ws://127.0.0.1:8765" } = options;
    const { token = environment("AGENTHUB_TOKEN"), WebSocket = globalThis.WebSocket } = options;
    const log = (/** @type {any[]} */ ...said) => console.warn("agenthub:", ...said);
    const urls = url.split(",").map((/** @type {string} */ one) => new URL(one.trim()).href);
    if (!/^(wss?:[^,]*(,|$))+$/.test(`${urls}`)) throw new TypeError(`not ws:// or wss://: ${url}`);
    const isCount = Number.isInteger(maxTasks) && maxTasks > 0 && maxTasks <= TASKS_MAX;
    if (!isCount) throw new RangeError(`maxTasks must be an integer from 1 to ${TASKS_MAX}`);
    if (!WebSocket) throw new TypeError("this runtime has no WebSocket: use Node 22, or pass that of the package ws");
    this.#core = createCore({ log, ...options, name, maxTasks, urls, token, WebSocket });
    /** The end of the agent: resolves after `close`, rejects with what made another attempt to connect pointless.
     * @type {Promise<void>} */
    this.closed = this.#core.closed;
  }
  /** The agent's id, which the hub issues. */
  get agentId() { return this.#core.identity.agent_id; }
  /** The secret with which another agent can resume this one's session. */
  get resume() { return this.#core.identity.resume; }
  /** Whether the agent is registered and has a connection just now. */
  get online() { return this.#core.session !== null; }
  /** @param {(message: Json, sender: string) => any} listener Is called with each broadcast of others. */
  set onBroadcast(listener) { this.#core.onBroadcast = listener; }

  /** Offer a capability. `schema` is the JSON Schema of its input; its `description` is the capability's, too.
   * @param {string} name @param {Message | Handler} schema @param {Handler} [handler] */
  capability(name, schema, handler = /** @type {Handler} */ (schema)) {
    if (typeof handler !== "function") throw new TypeError(`the handler of ${name} is not a function`);
    if (this.#core.handlers.has(name)) throw new TypeError(`${name} has a handler already`);
    const offered = typeof schema === "function" ? {} : { description: schema.description, input_schema: schema };
    this.#core.handlers.set(name, { offer: { name, ...offered }, handler });
    this.#core.announce();
    return this;
  }
  /** Connect; resolves when the hub has registered this agent. Throws what makes another attempt pointless. */
  async start() {
    if (!this.#isStarted) this.#core.run().catch((error) => this.#core.end(error));
    this.#isStarted = true;
    await this.#core.started;
  }
  /** Leave the hub; first wait up to `drain` seconds for running tasks to end. Handles of open tasks fail. */
  async close({ drain = 0 } = {}) {
    const core = this.#core;
    const leave = (/** @type {number} */ seconds, /** @type {Message} */ more) =>
      within(seconds, core.request(toJson({ type: "deregister", ...more })).catch(ignore));
    core.isLeaving = true;
    const hasLeft = drain > 0 && (this.online || core.isBusy()) && (await leave(drain, { drain: true }));
    if (!hasLeft && this.online) await leave(LEAVING_S, {});
    core.end(disconnected("this agent was closed"));
  }

  /** Have another agent do a task, and return its output. Throws what `submit` and `Handle.result` throw.
   * @param {Delegation} delegation @returns {Promise<any>} */
  async delegate(...delegation) {
    return (await this.submit(...delegation)).result();
  }
  /** Delegate a task, and return its handle when the hub has accepted it. Throws Refused with the hub's code,
   * TaskTimeout if it was not accepted within its ttl, TypeError if the input is not JSON, and what ended the agent.
   * @param {Delegation} delegation @returns {Promise<Handle>} */
  async submit(...[capability, input, options = {}]) {
    this.start().catch(ignore);
    return submit(this.#core, capability, input, options);
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
        isWhole &&= seq === ++last;
        if (isWhole && piece !== null) got.push(piece);
        if (isWhole && piece !== null) yield piece;
        last = seq;
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
    return (await this.#request({ type: "discover", capability, limit })).agents;
  }
  /** Send any JSON to all other online agents (with that capability); return how many there are. Throws Disconnected if
   * the connection is lost before the hub replies: then it may have been sent or not.
   * @param {Json} message @param {string} [capability] @returns {Promise<number>} */
  async broadcast(message, capability) {
    return (await this.#request({ type: "broadcast", message: message ?? null, capability }, false)).recipients;
  }
  /** Return the hub's reply about itself (in `hub`), or about one task. Throws Refused with the code `unknown_task`.
   * @param {string} [taskId] */
  status(taskId) {
    return this.#request({ type: "status", task_id: taskId });
  }
  #request(/** @type {Message} */ message, repeats = true) {
    this.start().catch(ignore);
    return this.#core.request(toJson(message), repeats);
  }
}
