// Server-sent events by fetch, because EventSource cannot send a key. Reconnects until it succeeds.

const SILENT_MS = 15000;
const RETRY_MS = 500;
const MAX_RETRY_MS = 10000;
const KEY = "pd-serve key";

/** Sends a request to the API server; the response may be an error. */
export function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  return fetch(path, { ...options, cache: "no-store", headers: key ? { Authorization: `Bearer ${key}` } : {} });
}

export class Stream {
  /** `on` has the callbacks `event(data, isFirst)` and `state(name, why)`; names are live, connecting, gone, locked. */
  constructor(path, on) {
    this.path = path;
    this.on = on;
    this.retry = RETRY_MS;
    this.abort = null;
    this.timer = null;
    // A hidden page needs no data: instances are not asked for their blocks.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
  }

  setKey(key) {
    sessionStorage.setItem(KEY, key);
    this.stop();
    this.start();
  }

  stop() {
    clearTimeout(this.timer);
    this.abort?.abort();
    this.abort = null;
  }

  async start() {
    if (this.abort) return;
    const abort = (this.abort = new AbortController());
    let why = "the stream has ended";
    try {
      await this.read(abort);
    } catch (error) {
      why = error.message;
    }
    if (this.abort !== abort) return; // stopped, or started anew
    this.stop();
    if (why === "locked") return this.on.state("locked");
    this.on.state("gone", why);
    this.timer = setTimeout(() => this.start(), this.retry);
    this.retry = Math.min(2 * this.retry, MAX_RETRY_MS);
  }

  async read(abort) {
    let silent = setTimeout(() => abort.abort(), SILENT_MS);
    try {
      const response = await ask(this.path, { signal: abort.signal });
      if (response.status === 401) throw new Error("locked");
      if (!response.ok) {
        const body = await response.json().catch(() => ({}));
        throw new Error(body.error?.message ?? `the server answered ${response.status}`);
      }
      const decoder = new TextDecoder();
      let rest = "";
      let isFirst = true;
      for (const reader = response.body.getReader(); ; ) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(silent);
        silent = setTimeout(() => abort.abort(), SILENT_MS);
        const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
        rest = parts.pop();
        for (const part of parts) {
          this.retry = RETRY_MS;
          this.on.state("live");
          this.on.event(JSON.parse(part.slice("data: ".length)), isFirst);
          isFirst = false;
        }
      }
    } finally {
      clearTimeout(silent);
    }
  }
}
