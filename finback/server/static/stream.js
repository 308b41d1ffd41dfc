// The wire: requests to the server, and its stream of server-sent events as plain objects.

/** What the server answered when it refused: its HTTP status (0 inside a stream), its own words, and their type ("" where it has none). */
export class ServerError extends Error {
  constructor(status, message, type = "") {
    super(message);
    this.status = status;
    this.type = type;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** GET a JSON document. Throws ServerError when refused, TypeError when the server cannot be reached. */
export async function getJson(path, key) {
  const response = await fetch(path, { headers: headers(key), cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/**
 * Ask for a chat completion and yield its events as they come: {reasoning, content, end, usage}, each "" or null where absent; usage is
 * what was used until then.
 * Throws ServerError when refused, TypeError when the connection fails, AbortError when `signal` stops it.
 * Returns true if the stream ended as it should, with [DONE].
 */
export async function* chat(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.getReader();
  try {
    for await (const data of events(reader)) {
      if (data === "[DONE]") return true;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(0, String(chunk.error.message ?? data), chunk.error.type);
      const choice = chunk.choices?.[0];
      yield {
        reasoning: choice?.delta?.reasoning_content ?? "",
        content: choice?.delta?.content ?? "",
        end: choice?.finish_reason ?? null,
        usage: chunk.usage ?? null,
      };
    }
    return false;
  } finally {
    // Leaving early, for whatever reason, must end the request: the server stops computing only when it is told.
    await reader.cancel().catch(() => undefined);
  }
}

/** The data of each event: lines may be cut anywhere, end in \n or \r\n, and lines that begin with a colon are comments. */
export async function* events(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/\r$/, "");
      if (data.startsWith("data:")) yield data.slice(5).trim();
    }
  }
}

async function refusal(response) {
  const text = await response.text();
  let message = text.slice(0, 300) || response.statusText;
  try {
    const error = JSON.parse(text).error;
    message = String(error?.message ?? error ?? message);
  } catch {
    // Not JSON (a proxy's page, say): its own words are the best there are.
  }
  return new ServerError(response.status, message);
}
