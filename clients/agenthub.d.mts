export type Json = any;
export type Message = {
    [field: string]: any;
};
export type Handler = (input: any, task: Task) => any;
export type Question = {
    text: string;
    schema?: Json;
    ask: number;
};
export type TaskEvent = {
    progress?: number | null;
    detail?: Json;
    piece?: Json;
    question?: Question;
    seq?: number;
};
export type Capability = {
    name: string;
    description?: string;
    input_schema?: Json;
    output_schema?: Json;
};
export type AgentInfo = {
    agent_id: string;
    name: string;
    description: string;
    running: number;
    max_tasks: number;
    metadata: Message;
    capabilities: Capability[];
    online_s?: number;
};
export type AgentOptions = {
    url?: string;
    token?: string;
    description?: string;
    maxTasks?: number;
    metadata?: Message;
    agentId?: string;
    resume?: string;
    WebSocket?: any;
    log?: (text: string, error?: unknown) => void;
};
export type TaskOptions = {
    ttl?: number;
    priority?: number;
    maxRetries?: number;
    wait?: boolean;
    agentId?: string;
    taskId?: string;
    parentId?: string;
    trace?: {
        [key: string]: string;
    };
    signal?: AbortSignal;
    answers?: boolean;
    onQuestion?: (question: Question, handle: Handle) => any;
};
export type Delegation = [capability: string | null, input?: Json, options?: TaskOptions];
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
export declare class AgentHubError extends Error {
    code: string;
    taskId: string | undefined;
    closeCode: number | undefined;
    /** @param {string} message @param {string} [code] @param {string} [taskId] @param {number} [closeCode] */
    constructor(message: string, code?: string, taskId?: string, closeCode?: number);
}
/** The hub rejected a request, which had no effect. */
export declare class Refused extends AgentHubError {
}
/** The connection to the hub is lost. */
export declare class Disconnected extends AgentHubError {
}
/** A task ended without an output. A handler throws it to fail its task with a code of its choice. */
export declare class TaskFailed extends AgentHubError {
}
/** A task did not end within its time to live. */
export declare class TaskTimeout extends TaskFailed {
}
/** A program on the hub. It connects by `start`, or by its first request, and keeps trying without a hub. */
export declare class Agent {
    #private;
    /** The agent's id, which the hub issues. @type {string | undefined} */ agentId: string | undefined;
    /** The secret with which another agent can resume this one's session. @type {string | undefined} */ resume: string | undefined;
    /** Is called with each broadcast of others. @type {(message: Json, sender: string) => any} */ onBroadcast: (message: Json, sender: string) => any;
    /** Resolves after `close`; rejects if connecting again is pointless. @type {Promise<void>} */ closed: Promise<void>;
    /** @param {string} name For people; several agents may have the same. @param {AgentOptions} [options] */
    constructor(name: string, { url, token, log, WebSocket, maxTasks, ...more }?: AgentOptions);
    /** Whether the agent is registered and has a connection just now. */
    get online(): boolean;
    /** Offer a capability. `schema` is the JSON Schema of its input; its `description` is the capability's, too.
     * @param {string} name @param {Message | Handler} schema @param {Handler} [handler] */
    capability(name: string, schema: Message | Handler, handler?: Handler): this;
    /** Connect, and register. Throws what makes another attempt pointless. @returns {Promise<void>} */
    start(): Promise<void>;
    /** Leave the hub; first wait up to `drain` seconds for running tasks to end. Handles of open tasks fail. */
    close({ drain }?: {
        drain?: number | undefined;
    }): Promise<void>;
    /** Delegate a task, and return its output. Throws like `submit` and `result`. @param {Delegation} delegation */
    delegate(...delegation: Delegation): Promise<any>;
    /** Delegate a task, and return its handle when the hub has accepted it. Throws Refused, TaskTimeout after the ttl,
     * TypeError if the input is not JSON, and what ended the agent. @param {Delegation} delegation */
    submit(...[capability, input, options]: Delegation): Promise<Handle>;
    /** Delegate a task, and yield the pieces of its output as they come; what a lost connection cost comes at the end.
     * Leaving the loop cancels the task. Throws TaskFailed, code `pieces_lost`, if the task was begun again, and what it
     * yields now does not continue that. @param {Delegation} delegation */
    stream(...delegation: Delegation): AsyncGenerator<any, void, unknown>;
    /** Find agents by a keyword, the best match first; the empty one finds all. @returns {Promise<AgentInfo[]>} */
    discover(capability?: string, limit?: number): Promise<AgentInfo[]>;
    /** Send any JSON to all other online agents (with that capability), and return their number. Disconnected: perhaps it
     * was not sent. @param {Json} message @param {string} [capability] @returns {Promise<number>} */
    broadcast(message: Json, capability?: string): Promise<number>;
    /** Return the hub's reply about itself (in `hub`), or about one task. Throws Refused with the code `unknown_task`.
     * @param {string} [taskId] @returns {Promise<Message>} */
    status(taskId?: string): Promise<Message>;
}
/** A task, as its handler sees it. `signal` is aborted when the task ends without its handler. */
export declare class Task {
    #private;
    signal: AbortSignal;
    /** @type {string} */ taskId: string;
    /** The agent_id of the requester. @type {string} */ requester: string;
    /** @type {string | undefined} */ capability: string | undefined;
    /** @type {Json} */ input: Json;
    /** Counts from 1. @type {number} */ attempt: number;
    /** @type {{[key: string]: string} | undefined} */ trace: {
        [key: string]: string;
    } | undefined;
    /** In seconds of performance.now(). @type {number} */ deadline: number;
    /** Report progress: a number from 0 to 1, and any JSON. Dropped without a connection, or if that is slow.
     * @param {number | null} progress @param {Json} [detail] */
    progress(progress: number | null, detail?: Json): void;
    /** Ask the requester, one question after the other, and return its answer. Throws TaskFailed, code `no_answers`, if
     * it gives none. @param {string} text @param {{schema?: Json}} [options] @returns {Promise<any>} */
    ask(text: string, { schema }?: {
        schema?: Json;
    }): Promise<any>;
    /** Delegate a subtask, which ends with this task. @param {Delegation} delegation */
    delegate(...delegation: Delegation): Promise<any>;
    /** Submit a subtask, as `Agent.submit` does. @param {Delegation} delegation */
    submit(...[capability, input, options]: Delegation): Promise<Handle>;
}
/** A task that this agent delegated. Iterate it (`for await`) for its events, until its outcome. */
export declare class Handle {
    #private;
    /** @type {string} */ taskId: string;
    /** Whether the task has ended. */ done: boolean;
    /** Return the output, when the task has completed. Throws TaskFailed, with the hub's code (`hub_lost` if the hub no
     * longer knows the task), TaskTimeout, the reason of the signal, or what ended the agent. @returns {Promise<any>} */
    result(): Promise<any>;
    /** Cancel the task: `result` then throws TaskFailed with the code `cancelled`. Without effect if it has ended. */
    cancel(reason?: string): Promise<void>;
    /** Answer the last question, or that of the number `ask`; return whether it still waited. @param {Json} answer */
    answer(answer: Json, ask?: number): Promise<boolean>;
    [Symbol.asyncIterator](): AsyncGenerator<TaskEvent, void, unknown>;
}
