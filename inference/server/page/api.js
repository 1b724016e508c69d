// Requests to the server that sent the page, and their errors in plain words.

const KEY = 'two-lives-key'; // in sessionStorage: gone when the tab closes

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? '',
  set: (value) =>
    value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY),
};

/** An error that is told to the user; `retryAfter` in seconds, or null. */
export class Problem extends Error {
  constructor(message, { status = 0, retryAfter = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, code });
  }
}

/**
 * Sends a request below the address of the page; returns the response.
 *
 * @throws {Problem} there is no answer, or it is an error
 */
export async function ask(path, { method = 'GET', body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers['content-type'] = 'application/json';
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    if (error instanceof TypeError && /header/i.test(error.message)) {
      throw new Problem('The key has a character that no key can have.');
    }
    throw new Problem(
      `No connection to ${location.host}. The server may have stopped, or the` +
        ' network is down.',
    );
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not from this server: a proxy in front of it, say.
  }
  const { status } = response;
  const retryAfter = Number.parseInt(response.headers.get('retry-after'), 10);
  const wait = Number.isFinite(retryAfter) ? retryAfter : null;
  const details = { status, code: error.code, retryAfter: wait };
  return new Problem(words(status, error, wait), details);
}

function words(status, error, wait) {
  const later = wait ? ` Try again in ${wait} s.` : ' Try again soon.';
  const reason = error.message ? ` The server says: ${error.message}` : '';
  if (status === 401) {
    return key.get()
      ? 'The server does not know this key. Enter another one.'
      : 'This server asks for an API key. Enter yours.';
  }
  if (status === 429) {
    return `The server has too many requests, or your limit is reached.${later}${reason}`;
  }
  if (status === 503 && error.code === 'not_ready') {
    return 'The model is still loading. Try again in a moment.';
  }
  if (status === 503) {
    return `The server takes no requests now.${later}${reason}`;
  }
  if (status >= 500) return `The server failed (${status}).${reason}`;
  return error.message ?? `The server refused the request (${status}).`;
}

/**
 * Yields the JSON events of a stream of server-sent events.
 *
 * A chunk of the network may end anywhere, inside a character too.
 *
 * @throws {Problem} the server reports an error, or the stream ends early
 */
export async function* events(response) {
  const reader = response.body
    .pipeThrough(new TextDecoderStream())
    .getReader();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) throw cut();
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith('data:')) continue; // a comment, an empty line
        const data = line.slice(5).trim();
        if (data === '[DONE]') return;
        const event = JSON.parse(data);
        if (event.error) {
          throw new Problem(
            `The answer ended with an error: ${event.error.message}`,
          );
        }
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === 'AbortError' ? error : cut();
  }
}

function cut() {
  return new Problem(
    'The connection broke before the answer ended. What had arrived is kept.',
  );
}
