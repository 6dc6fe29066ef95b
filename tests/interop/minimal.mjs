// A client that knows nothing of our code, and follows the twelve steps of docs/protocol.md: node minimal.mjs.
// AGENTHUB_URL is the hub's. clients/conformance.py says what its capabilities do.

const BACKOFF_FIRST_MS = 500, BACKOFF_MAX_MS = 30_000;
const FINAL = ["completed", "failed", "timeout"];
const FOR_GOOD = [1008, 4000]; // Close codes after which it stays away.

let identity = {}, features = [], ids = 0, socket = null, isJoined = false;
const requests = new Map(); // By id: sent on each session until the reply.
const tasks = new Map(); // By task_id: those that are worked on, and those whose result is not yet acknowledged.
const handles = new Map(); // By task_id: those that were delegated, until their outcome.

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const deferred = () => {
  const functions = {};
  const promise = new Promise((resolve, reject) => Object.assign(functions, { resolve, reject }));
  return { promise, ...functions };
};
const failure = (code, message = code) => Object.assign(new Error(message), { code });
const send = (message) => isJoined && socket.send(JSON.stringify(message));

/** Return the reply to a message that is safe to repeat. */
function request(message) {
  return new Promise((resolve, reject) => {
    const id = `${++ids}`;
    requests.set(id, { message: { ...message, id }, resolve, reject });
    send(requests.get(id).message);
  });
}

// A worker

const HANDLERS = {
  echo: ({ input }) => input,
  sleep: async ({ input }) => (await pause(input * 1000), input),
  fail: () => { throw failure("own", "as it was asked to"); },
  relay: (task) => delegate("elsewhere", task),
  answer: (task) => delegate("elsewhere", task, (text) => text),
  ask: async (task) => {
    const answers = [];
    for (const text of task.input) answers.push(await ask(task, text));
    return answers;
  },
  stream: ({ task_id, input }) => {
    for (const piece of features.includes("stream") ? input : []) {
      if (piece !== null) send({ type: "status", task_id, piece });
    }
    return input;
  },
};

async function work(message) {
  const { task_id, attempt, capability } = message;
  if (tasks.get(task_id)?.attempt === attempt) return;
  const task = { ...message, given: new Map() };
  tasks.set(task_id, task);
  try {
    if (!HANDLERS[capability]) throw failure("no_handler");
    task.result = { success: true, output: await HANDLERS[capability](task) };
  } catch ({ code = "failed", message }) {
    task.result = { success: false, error: { code, message } };
  }
  report(task);
}

/** Send a result, unless the task has ended without it; `reconcile` sends it again if there is no reply. */
function report(task) {
  const { task_id, attempt, result } = task;
  if (tasks.get(task_id) !== task || !result || !isJoined) return;
  const id = `${++ids}`;
  const forget = () => tasks.get(task_id) === task && tasks.delete(task_id);
  requests.set(id, { resolve: forget, reject: forget });
  send({ type: "result", id, task_id, attempt, ...result });
}

const answerTo = ({ given }, ask) => given.get(ask) ?? given.set(ask, deferred()).get(ask);

async function ask(task, text) {
  if (!task.answers) throw failure("no_answers");
  const { ask } = await request({ type: "status", task_id: task.task_id, question: { text } });
  return answerTo(task, ask).promise;
}

function reconcile(assigned) {
  const attempts = new Map(assigned.map(({ task_id, attempt }) => [task_id, attempt]));
  for (const [task_id, { attempt }] of tasks) if (attempts.get(task_id) !== attempt) tasks.delete(task_id);
  for (const [task_id, attempt] of attempts) {
    const lost = { success: false, error: { code: "agent_lost", message: "the agent does not have it" } };
    if (!tasks.has(task_id)) tasks.set(task_id, { task_id, attempt, result: lost, given: new Map() });
    report(tasks.get(task_id));
  }
}

// A requester

async function delegate(capability, { task_id: parent_id, input }, onQuestion) {
  const task_id = crypto.randomUUID();
  const handle = { ...deferred(), onQuestion, asked: 0 };
  const message = { type: "delegate", task_id, parent_id, capability, input, answers: !!onQuestion };
  handles.set(task_id, handle);
  const submit = () => request(message).then(() => { handle.isAccepted = true; }, async (error) => {
    if (error.code !== "overloaded") return handle.reject(error);
    await pause(Math.random() * BACKOFF_FIRST_MS);
    return submit();
  });
  submit();
  return handle.promise.finally(() => handles.delete(task_id));
}

function hearOutcome({ task_id, state, output = null, error }) {
  if (state === "completed") handles.get(task_id)?.resolve(output);
  else handles.get(task_id)?.reject(failure(error?.code ?? state, error?.message));
}

async function hearQuestion({ task_id, ask, question }) {
  const handle = handles.get(task_id);
  if (!handle?.onQuestion || ask <= handle.asked) return;
  handle.asked = ask;
  const answer = await handle.onQuestion(question.text);
  request({ type: "status", task_id, ask, answer }).catch(() => {}); // no_question: the hub has it, or needs none.
}

// A connection

const ON = {
  delegate: work,
  result: hearOutcome,
  status(message) {
    const { task_id, state, ask, question, answer = null } = message;
    if (FINAL.includes(state)) tasks.delete(task_id);
    else if (question) hearQuestion(message);
    else if (ask && tasks.has(task_id)) answerTo(tasks.get(task_id), ask).resolve(answer);
  },
};

function join({ agent_id, resume, tasks: assigned, ...reply }) {
  const [unanswered, isRenewed] = [[...requests.values()], identity.agent_id && identity.agent_id !== agent_id];
  [identity, features, isJoined] = [{ agent_id, resume }, reply.features ?? [], true];
  reconcile(assigned);
  for (const [task_id, handle] of handles) {
    if (isRenewed) handle.reject(failure("hub_lost"));
    else if (handle.isAccepted) request({ type: "status", task_id }).then(hearState, handle.reject);
  }
  for (const { message } of unanswered) if (message) send(message);
}

function hearState(report) {
  if (FINAL.includes(report.state)) hearOutcome(report);
}

/** Hold a connection until it is lost; return its close code. */
function connect() {
  return new Promise((resolve) => {
    const line = (socket = new WebSocket(process.env.AGENTHUB_URL));
    const registration = { type: "register", id: "join", name: "minimal", capabilities: Object.keys(HANDLERS) };
    let heardAt = Date.now(), timer;
    const end = (code) => {
      clearInterval(timer);
      line.onmessage = line.onerror = line.onclose = null; // To close it may call them at once.
      line.close();
      resolve(code);
    };
    line.onopen = () => line.send(JSON.stringify({ ...registration, ...identity }));
    line.onerror = line.onclose = ({ code }) => end(code);
    line.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      const { type, reply_to, code, message: text } = message;
      heardAt = Date.now();
      if (reply_to === "join" && type === "error") end();
      if (reply_to === "join" && type === "register") {
        join(message);
        timer = setInterval(() => {
          if (Date.now() - heardAt > 3000 * message.heartbeat_s) end();
          else send({ type: "heartbeat", id: "heartbeat" });
        }, 1000 * message.heartbeat_s);
      } else if (requests.has(reply_to)) {
        const { resolve: succeed, reject } = requests.get(reply_to);
        requests.delete(reply_to);
        type === "error" ? reject(failure(code, text)) : succeed(message);
      } else if (!reply_to) ON[type]?.(message);
    };
  });
}

let limitMs = BACKOFF_FIRST_MS;
while (!FOR_GOOD.includes(await connect())) {
  if (isJoined) limitMs = BACKOFF_FIRST_MS;
  isJoined = false;
  await pause(Math.random() * limitMs);
  limitMs = Math.min(2 * limitMs, BACKOFF_MAX_MS);
}
