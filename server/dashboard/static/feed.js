// Reads the server's events, one per second. It uses fetch, because EventSource cannot send a token.

const FEED = "dashboard/events";
const KEY = "cobatch.token";
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 5000;
// The server sends an event per second; a connection that is silent for longer than this is dead.
const SILENCE_MS = 10000;

// A token goes into Authorization, a key with the prefix of API keys into X-API-Key.
export function credentials() {
  const token = sessionStorage.getItem(KEY);
  if (!token) return {};
  return token.startsWith("cb_") ? { "X-API-Key": token } : { Authorization: `Bearer ${token}` };
}

export function remember(token) {
  if (token) sessionStorage.setItem(KEY, token);
  else sessionStorage.removeItem(KEY);
}

export function hasToken() {
  return sessionStorage.getItem(KEY) !== null;
}

// Calls on.hello, on.tick, on.link("live" | "lost") and on.refused(status, problem). A refusal ends the feed.
export class Feed {
  constructor(on) {
    this.on = on;
    this.waitMs = FIRST_WAIT_MS;
    this.abort = null;
  }

  async start() {
    this.stop();
    const mine = (this.abort = new AbortController());
    while (!mine.signal.aborted) {
      try {
        const refused = await this.read(mine);
        if (refused) return;
      } catch (error) {
        if (mine.signal.aborted) return;
      }
      this.on.link("lost");
      await new Promise((resolve) => setTimeout(resolve, this.waitMs));
      this.waitMs = Math.min(LONGEST_WAIT_MS, this.waitMs * 2);
    }
  }

  stop() {
    this.abort?.abort();
    this.waitMs = FIRST_WAIT_MS;
  }

  async read(mine) {
    const headers = { Accept: "text/event-stream", ...credentials() };
    const silence = new AbortController();
    const signal = AbortSignal.any([mine.signal, silence.signal]);
    let timer = setTimeout(() => silence.abort(), SILENCE_MS);
    try {
      const response = await fetch(FEED, { headers, cache: "no-store", signal });
      if (response.status === 401 || response.status === 403) {
        this.on.refused(response.status, await response.json());
        return true;
      }
      if (!response.ok) throw new Error(`status ${response.status}`);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done || mine.signal.aborted) return false;
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), SILENCE_MS);
        const events = (text + value).split("\n\n");
        text = events.pop();
        events.forEach((event) => this.event(event));
      }
    } finally {
      clearTimeout(timer);
    }
  }

  event(text) {
    const fields = { event: "message", data: "" };
    for (const line of text.split("\n")) {
      const colon = line.indexOf(": ");
      if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
    }
    if (!fields.data) return;
    this.waitMs = FIRST_WAIT_MS;
    if (fields.event === "hello") this.on.hello(JSON.parse(fields.data));
    else if (fields.event === "tick") this.on.tick(JSON.parse(fields.data));
    this.on.link("live");
  }
}
