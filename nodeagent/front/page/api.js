// The node's public endpoints, with the operator's token where there is one.

const TOKEN = "rolemesh-token";
const OPERATOR = "rolemesh-operator";
const TIMEOUT_MS = 15_000;

// What went wrong with a request: `status` is 0 if there was no answer.
export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The token is in this tab's session storage alone: it goes when the tab is closed, and no cookie sends it.
export function token() {
  return sessionStorage.getItem(TOKEN);
}

// Whether it is an operator's. Where the node has API keys, others have a use too.
export function isOperators() {
  return sessionStorage.getItem(OPERATOR) === "yes";
}

export function keepToken(value, mayOperate) {
  sessionStorage.setItem(TOKEN, value);
  sessionStorage.setItem(OPERATOR, mayOperate ? "yes" : "no");
}

export function forgetToken() {
  sessionStorage.removeItem(TOKEN);
  sessionStorage.removeItem(OPERATOR);
}

async function request(path, { method = "GET", body, signal, accept, headers = {} } = {}) {
  const sent = { ...headers };
  if (token() && !sent.Authorization) sent.Authorization = `Bearer ${token()}`;
  if (accept) sent.Accept = accept;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, signal, headers: sent, cache: "no-store", redirect: "error",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, error.name === "TimeoutError" ? "The node did not answer in time." : "The node does not answer.");
  }
  if (!response.ok) throw new Failure(response.status, await messageOf(response));
  return response;
}

async function messageOf(response) {
  try {
    const { error } = await response.json();
    return error.message;
  } catch {
    return `The node answered ${response.status} ${response.statusText}.`;
  }
}

async function json(response) {
  try {
    return await response.json();
  } catch {
    throw new Failure(0, "The node's answer broke off.");
  }
}

export async function get(path) {
  return json(await request(path, { signal: AbortSignal.timeout(TIMEOUT_MS) }));
}

// An operator's order; it may take as long as a load does.
export async function post(path, body = {}) {
  return json(await request(path, { method: "POST", body }));
}

// Whether a token is an operator's (true), another that the node knows (false), or none (null). `open` is whether the
// node serves everybody, so that only operators need a token.
export async function checkToken(value, deviceId, open) {
  const headers = { Authorization: `Bearer ${value}` };
  try {
    await request(logsPath(deviceId, 0), { headers });
    return true;
  } catch (error) {
    if (error.status === 404) return true; // let in, but there is another device now
    if (!isRefusal(error)) throw error;
  }
  if (open) return null;
  try {
    await request("/v1/models", { headers });
    return false;
  } catch (error) {
    if (!isRefusal(error)) throw error;
    return null;
  }
}

// Whether a token is missing, wrong, or not one for this.
export function isRefusal(error) {
  return error.status === 401 || error.status === 403;
}

export function logsPath(deviceId, lines) {
  return `/v1/node/devices/${encodeURIComponent(deviceId)}/logs?lines=${lines}`;
}

export function modelPath(modelId, order) {
  return `/v1/node/models/${modelId.split("/").map(encodeURIComponent).join("/")}/${order}`;
}

// A streamed answer. EventSource can send no token, so this reads the body itself.
export function stream(path, options) {
  return request(path, options);
}

// The lines of a streamed answer as they come.
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const whole = (rest + value).split("\n");
      rest = whole.pop();
      for (const line of whole) yield line.endsWith("\r") ? line.slice(0, -1) : line;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => undefined); // it has failed already if the answer broke off
  }
}

// Server-sent events: {event, id, data}, and comments as {comment}.
export async function* serverEvents(response) {
  let fields = { event: "message", id: null, data: [] };
  for await (const line of lines(response)) {
    if (line === "") {
      if (fields.data.length) yield { ...fields, data: fields.data.join("\n") };
      fields = { event: "message", id: null, data: [] };
    } else if (line.startsWith(":")) {
      yield { comment: line.slice(1).trim() };
    } else {
      const colon = line.indexOf(":");
      const name = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (name === "data") fields.data.push(value);
      else if (name in fields) fields[name] = value;
    }
  }
}
