// Talks to the server: the key, errors in plain words, uploads with progress, answers as they come.
//
// Decision: every address is relative, so that the page also works behind a proxy that adds a folder.

const KEY = 'lnv-api-key';

/** An error whose message is meant for a person. */
export class Problem extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

/** True where the user stopped it. */
export const stopped = (error) => error?.name === 'AbortError';

const abortion = () => new DOMException('stopped', 'AbortError');

/** True where the server no longer has a file that was sent. */
export const forgotten = (error) => error?.code === 'media_not_found';

/** The API key, kept until the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? '',
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

let askForKey = async () => false;

/** Says how to ask the user for the key; the function answers whether there is one now. */
export function onKeyWanted(ask) {
  let asking = null;
  // Several requests may be refused at the same time; the user is asked once.
  askForKey = () => (asking ??= ask().finally(() => (asking = null)));
}

const authorization = () => (key.get() ? { Authorization: `Bearer ${key.get()}` } : {});

/** With a capital but for an address, and only where it is text. */
function sentence(text) {
  if (typeof text !== 'string' || !text) return undefined;
  return /^\w+:\/\//.test(text) ? text : text[0].toUpperCase() + text.slice(1);
}

/** The server's own sentence, or one for what stands between here and it. */
function problem(status, text, retryAfter) {
  let error = null;
  try {
    error = JSON.parse(text).error ?? null;
  } catch {
    // A proxy answers in HTML.
  }
  const own = sentence(typeof error === 'string' ? error : error?.message);
  const code = error?.code ?? null;
  const param = error?.param ?? null;
  const wait = Number(retryAfter) > 0 ? ` Try again in ${retryAfter} s.` : ' Try again in a moment.';
  const plain = {
    401: own ?? 'The server did not take the API key.',
    413: own ?? 'That is more than the server takes. A shorter or smaller file may do.',
    429: `The server is busy.${wait}`,
    503: `The server is not ready.${wait}`,
  }[status];
  return new Problem(plain ?? own ?? `The server answered with status ${status}.`, {
    status,
    code,
    param,
  });
}

const unreachable = () => new Problem('The server cannot be reached. Is it still running?');

/** A request that asks for the key where the server wants one; answers a response that is fine. */
async function request(path, options = {}) {
  for (;;) {
    const sent = key.get();
    const headers = { ...options.headers, ...authorization() };
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: 'no-store' });
    } catch (error) {
      throw stopped(error) ? error : unreachable();
    }
    if (response.ok) return response;
    const failed = problem(response.status, await response.text(), response.headers.get('Retry-After'));
    if (response.status !== 401 || !(sent !== key.get() || (await askForKey()))) throw failed;
  }
}

/** The name of the model that is served. */
export async function modelName(signal) {
  const list = await (await request('v1/models', { signal })).json();
  return list.data?.[0]?.id ?? 'default';
}

function samplingQuery(sampling) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(sampling)) {
    if (value != null) query.set(name, value);
  }
  return query;
}

/** Sends a file; `onProgress` hears a share from 0 to 1. Answers the server's description of it. */
export async function upload(file, kind, sampling, signal, onProgress) {
  const query = samplingQuery(sampling);
  if (kind) query.set('kind', kind);
  for (;;) {
    const sent = key.get();
    // fetch() cannot tell how much has been sent.
    const answer = await new Promise((resolve, reject) => {
      const call = new XMLHttpRequest();
      call.open('POST', `v1/media?${query}`);
      call.setRequestHeader('Content-Type', file.type || 'application/octet-stream');
      for (const [name, value] of Object.entries(authorization())) call.setRequestHeader(name, value);
      call.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
      call.onload = () => resolve(call);
      call.onerror = () => reject(unreachable());
      call.onabort = () => reject(abortion());
      signal.addEventListener('abort', () => call.abort());
      if (signal.aborted) reject(abortion());
      else call.send(file);
    });
    if (answer.status >= 200 && answer.status < 300) return JSON.parse(answer.responseText);
    const failed = problem(answer.status, answer.responseText, answer.getResponseHeader('Retry-After'));
    if (answer.status !== 401 || !(sent !== key.get() || (await askForKey()))) throw failed;
  }
}

/** Has the server fetch what is at an address. Answers its description of it. */
export async function fetchLink(url, sampling, signal) {
  const response = await request(`v1/media?${samplingQuery(sampling)}`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ url }),
    signal,
  });
  return response.json();
}

/** The frames of a file that the server has, sampled another way. */
export async function describe(id, sampling, signal) {
  const path = `v1/media/${encodeURIComponent(id)}?${samplingQuery(sampling)}`;
  return (await request(path, { signal })).json();
}

/** The data of each server-sent event of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith('data:')) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Asks, and tells as it goes: `on.stage({stage, done, total})`, `on.text(piece)`, `on.usage(tokensSoFar)`.
 * Answers `{finish, usage, timings}`.
 */
export async function answer(body, signal, on) {
  const response = await request('v1/chat/completions', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      lnv: { progress: true },
    }),
    signal,
  });
  const end = { finish: null, usage: null, timings: null };
  let complete = false;
  try {
    for await (const data of events(response)) {
      if (data === '[DONE]') {
        complete = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw problem(Number(chunk.error.status) || 500, data, null);
      if (chunk.lnv?.stage) on.stage(chunk.lnv);
      if (chunk.lnv?.timings) end.timings = chunk.lnv.timings;
      if (chunk.usage) on.usage((end.usage = { ...end.usage, ...chunk.usage }));
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) on.text(choice.delta.content);
      if (choice?.finish_reason) end.finish = choice.finish_reason;
    }
  } catch (error) {
    if (stopped(error) || error instanceof Problem) throw error;
    throw new Problem('The connection broke before the answer was complete.');
  }
  if (!complete && !end.finish) throw new Problem('The connection broke before the answer was complete.');
  return end;
}
