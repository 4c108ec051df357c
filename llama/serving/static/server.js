// The server's API, as the page uses it.

/** An error that the server answered with. */
export class ServerError extends Error {
  constructor(message, status, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function request(path, key, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}),
    ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let error = {};
  try { error = (await response.json()).error || {}; } catch { /* of a proxy */ }
  throw new ServerError(error.message || `the server answered ${response.status}`, response.status, error.code);
}

/** Raises ServerError or TypeError (no connection) unless the server can answer. */
export async function checkHealth() { await request("health"); }

/** The network that is served: { id, max_model_len }. */
export async function model(key) { return (await (await request("v1/models", key)).json()).data[0]; }

/** The events of a streamed answer. */
export async function* stream(body, key, signal) {
  const response = await request("v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer ended early: the connection was lost.");
    const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = events.pop();
    for (const text of events) {
      if (!text.startsWith("data: ")) continue;
      if (text === "data: [DONE]") return;
      const event = JSON.parse(text.slice(6));
      if (event.error) throw new ServerError(event.error.message, 200, event.error.code);
      yield event;
    }
  }
}
