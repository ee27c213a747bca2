// A video or picture: sent to the server, described by it, shown as the frames that the model will see.
//
// Decision: the server samples, never the browser, so that what is shown is what is asked about, for
// every format that the server reads. The file stays here too: it can be played, and be sent again
// where the server has dropped it; what is at a link is fetched by the server, and fetched again.

import { clock, count, el, iconButton } from './dom.js';
import { Problem, describe, fetchLink, forgotten, stopped, upload } from './server.js';

/** Changes of the frame count come in bursts. */
const SETTLE_MS = 250;
/** Where the server does not say how many frames may be asked for. */
const MAX_FRAMES = 512;

const kindOf = (file) => /^(video|image)\//.exec(file.type)?.[1] ?? null;

/** The last part of a link's path, as a person would call it. */
function nameOf(link) {
  const { hostname, pathname } = new URL(link);
  const last = pathname.split('/').filter(Boolean).pop() ?? hostname;
  try {
    return decodeURIComponent(last);
  } catch {
    return last;
  }
}

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener('abort', () => {
      clearTimeout(timer);
      reject(new DOMException('stopped', 'AbortError'));
    });
  });

export class Medium extends EventTarget {
  #job = null;

  /**
   * From a file that was just chosen, from a link, or as `kept()` gave it. `frames`: how many of a video, where a person
   * has said so; else as many as the server takes by itself, which a short clip need not have.
   */
  constructor({ file = null, link = null, frames = null, kept = null }) {
    super();
    this.file = file;
    this.link = link ?? kept?.link ?? null;
    this.name = file?.name || kept?.name || (link && nameOf(link)) || 'pasted';
    this.kind = kept?.kind ?? (file && kindOf(file));
    this.sampling = kept?.sampling ?? { num_frames: frames, start: null, end: null };
    this.about = kept?.about ?? null;
    this.progress = 0;
    this.busy = false;
    this.error = null;
    /** Settles when the server has the file and has said what is in it. */
    this.ready = Promise.resolve();
    if (!kept) this.send();
  }

  get isVideo() {
    return this.kind !== 'image';
  }

  /** What a later visit needs. */
  kept() {
    const { name, link, kind, sampling, about } = this;
    return { name, link, kind, sampling, about };
  }

  /** The same medium for another question, so that its frames can be chosen anew. */
  copy() {
    const copy = new Medium({ file: this.file, kept: structuredClone(this.kept()) });
    copy.source = this.source;
    return copy;
  }

  /** Whether the server can get it once more. */
  get again() {
    return this.file != null || this.link != null;
  }

  /** Has the server get it, again where it was there before. */
  send() {
    this.#run((signal) => this.#upload(signal));
  }

  /** Chooses frames; the thumbnails follow. */
  sample(change) {
    Object.assign(this.sampling, change);
    this.#run(async (signal) => {
      await pause(SETTLE_MS, signal);
      try {
        this.about = await describe(this.about.id, this.#query(), signal);
      } catch (error) {
        if (!forgotten(error) || !this.again) throw error;
        await this.#upload(signal);
      }
    });
  }

  async #upload(signal) {
    try {
      await this.#put(signal);
    } catch (error) {
      // A number from the settings that this clip has no frames for.
      if (error.param !== 'num_frames' || this.sampling.num_frames == null) throw error;
      this.sampling.num_frames = null;
      await this.#put(signal);
    }
  }

  async #put(signal) {
    const tell = (share) => {
      this.progress = share;
      this.#changed();
    };
    // How far the server is with a link, nobody knows.
    tell(this.file ? 0 : 1);
    const about = this.file
      ? await upload(this.file, this.kind, this.#query(), signal, tell)
      : await fetchLink(this.link, this.#query(), signal);
    this.about = about;
    this.kind = about.kind ?? this.kind;
  }

  /** Stops what is under way. */
  cancel() {
    this.#job?.abort();
  }

  /** As a part of a message. */
  part() {
    const { id } = this.about;
    return this.isVideo
      ? { type: 'video_url', video_url: { url: id, ...this.#query() } }
      : { type: 'image_url', image_url: { url: id } };
  }

  /** Something that the browser may play; null after the page was loaded again. */
  url() {
    if (!this.source && this.file) this.source = URL.createObjectURL(this.file);
    return this.source ?? null;
  }

  #query() {
    if (!this.isVideo) return {};
    return Object.fromEntries(Object.entries(this.sampling).filter(([, value]) => value != null));
  }

  #run(work) {
    this.#job?.abort();
    const job = (this.#job = new AbortController());
    this.busy = true;
    this.error = null;
    this.ready = work(job.signal)
      .catch((error) => {
        if (stopped(error)) throw error;
        // The server knows the file by its digest only.
        error.message = error.message.replace(/media:[0-9a-f]+/g, this.name);
        if (job === this.#job) this.error = error;
        throw error;
      })
      .finally(() => {
        if (job !== this.#job) return;
        this.busy = false;
        this.#changed();
      });
    // Whoever asks a question awaits it; until then nobody does.
    this.ready.catch(() => {});
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event('change'));
  }
}

/** Waits for uploads and samplings, also those that were begun while waiting. */
export async function settled(media, signal) {
  const stop = new Promise((_, reject) => {
    signal.addEventListener('abort', () => reject(new DOMException('stopped', 'AbortError')));
  });
  stop.catch(() => {});
  for (const medium of media) {
    let seen;
    do {
      seen = medium.ready;
      try {
        await Promise.race([seen, stop]);
      } catch (error) {
        if (signal.aborted) throw error;
        // A sampling that another has replaced.
        if (seen !== medium.ready) continue;
        // Why, its card says.
        throw new Problem(`${medium.name} cannot be asked about: see below, or remove it.`);
      }
    } while (seen !== medium.ready);
  }
}

/** One line about a medium. */
function summary({ about, isVideo, kind }) {
  if (!about) return { image: 'picture', video: 'video' }[kind] ?? '';
  const facts = [`${about.width}×${about.height}`];
  if (isVideo && about.duration_s != null) facts.push(clock(about.duration_s));
  if (isVideo) facts.push(count(about.frames.length, 'frame'));
  if (about.tokens != null) facts.push(count(about.tokens, 'token'));
  return facts.join(' · ');
}

/** The frames as thumbnails with their times. One tab stop; arrow keys move along it. */
function strip(medium, view) {
  const frames = medium.about?.frames ?? [];
  const label = medium.isVideo ? `Frames of ${medium.name}` : medium.name;
  const list = el('div', { className: 'strip', role: 'group', ariaLabel: label });
  frames.forEach((frame, at) => {
    const time = medium.isVideo && frame.time_s != null ? clock(frame.time_s) : null;
    const name = time ? `Frame ${at + 1} of ${frames.length}, at ${time}` : `Show ${medium.name}`;
    const picture = el('img', { src: frame.thumbnail, alt: '', decoding: 'async' });
    const button = el('button', { type: 'button', ariaLabel: name, tabIndex: at ? -1 : 0 }, picture);
    if (time) button.append(el('span', {}, time));
    button.onclick = () => view(medium, frame);
    list.append(button);
  });
  list.onkeydown = (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -frames.length, End: frames.length };
    const from = [...list.children].indexOf(document.activeElement);
    if (!(event.key in steps) || from < 0) return;
    event.preventDefault();
    const to = Math.min(Math.max(from + steps[event.key], 0), frames.length - 1);
    [...list.children].forEach((child, at) => (child.tabIndex = at === to ? 0 : -1));
    list.children[to].focus();
  };
  return list;
}

/** A medium within a message: its frames as they were asked about, and a way to ask about it again. */
export function mediumFigure(medium, view, again) {
  const reuse = iconButton('plus', `Ask about ${medium.name} again, with other frames`, again);
  const facts = el('span', { className: 'muted' });
  const place = el('div', { className: 'place' });
  const show = () => {
    facts.textContent = summary(medium);
    place.replaceChildren(strip(medium, view));
  };
  // It may have been asked about before it was sent.
  if (!medium.about) medium.addEventListener('change', () => medium.about && show());
  show();
  return el('figure', { className: 'medium' }, place, el('figcaption', {}, el('b', {}, medium.name), facts, reuse));
}

/** A medium that is about to be asked about. */
export function mediumCard(medium, view, remove) {
  const facts = el('span', { className: 'muted' });
  const bar = el('progress', { max: 1, ariaLabel: `${medium.file ? 'Sending' : 'Fetching'} ${medium.name}` });
  const place = el('div', { className: 'place' });
  const error = el('p', { className: 'wrong', role: 'alert' });
  const send = () => medium.send();
  const retry = el('button', { type: 'button', className: 'plain', onclick: send }, medium.file ? 'Send again' : 'Try again');
  const head = el(
    'div',
    { className: 'row' },
    el('b', {}, medium.name),
    facts,
    iconButton('close', `Remove ${medium.name}`, () => {
      medium.cancel();
      remove();
    }),
  );
  const card = el('li', { className: 'medium card' }, head, place, bar, error, retry);
  let controls = null;
  let shown = null;

  const show = () => {
    const { about, busy, progress } = medium;
    facts.textContent = summary(medium);
    card.classList.toggle('busy', busy);
    bar.hidden = !busy || about != null;
    // Once it is sent, the server looks at it for a time that nobody knows.
    if (progress < 1) bar.value = progress;
    else bar.removeAttribute('value');
    error.textContent = medium.error?.message ?? '';
    error.hidden = !medium.error;
    // What the server has refused, it refuses again; another's server may be back.
    const { status, code } = medium.error ?? {};
    const refused = status >= 400 && status < 429 && !/^media_(unreachable|timeout)$/.test(code);
    retry.hidden = !medium.error || refused || !medium.again;
    if (medium.isVideo && !controls && about) {
      controls = samplingControls(medium);
      card.insertBefore(controls, error);
    }
    if (about !== shown) {
      shown = about;
      place.replaceChildren(strip(medium, view));
    }
  };
  medium.addEventListener('change', show);
  show();
  return card;
}

function samplingControls(medium) {
  const most = medium.about.max_frames ?? MAX_FRAMES;
  const chosen = () => medium.sampling.num_frames ?? medium.about.frames.length;
  const frames = el('input', {
    type: 'number',
    inputMode: 'numeric',
    min: 1,
    max: most,
    value: chosen(),
    ariaLabel: `Frames of ${medium.name}`,
  });
  const choose = (value) => {
    const wanted = Math.min(Math.max(Math.round(value) || 1, 1), most);
    if (wanted === chosen()) return;
    medium.sample({ num_frames: wanted });
  };
  frames.oninput = () => frames.value && choose(frames.valueAsNumber);
  frames.onchange = () => {
    choose(frames.valueAsNumber);
    frames.value = chosen();
  };
  const step = (by) => () => {
    choose(chosen() + by);
    frames.value = chosen();
  };
  // Of another part of the clip the server may take another number.
  medium.addEventListener('change', () => {
    if (medium.sampling.num_frames == null) frames.value = chosen();
  });
  const counter = el(
    'div',
    { className: 'counter', role: 'group', ariaLabel: 'Frames' },
    iconButton('minus', 'Fewer frames', step(-1)),
    frames,
    iconButton('plus', 'More frames', step(1)),
  );

  const end = medium.about.duration_s;
  const bound = (name, label, hint) => {
    const field = el('input', {
      type: 'number',
      inputMode: 'decimal',
      min: 0,
      max: end,
      step: 'any',
      value: medium.sampling[name] ?? '',
      placeholder: hint,
    });
    field.oninput = () => {
      const value = field.valueAsNumber;
      medium.sample({ [name]: Number.isFinite(value) ? value : null });
    };
    return el('label', {}, label, field);
  };
  return el(
    'div',
    { className: 'sampling' },
    el('div', {}, el('span', { ariaHidden: 'true' }, 'Frames'), counter),
    el(
      'div',
      { role: 'group', ariaLabel: 'Part of the video' },
      bound('start', 'From second', '0'),
      bound('end', 'to', end == null ? 'end' : end.toFixed(1)),
    ),
  );
}

/** Shows one medium large, at a frame's time where the browser can play it. */
export function viewerFor(dialog) {
  const stage = dialog.querySelector('.stage');
  dialog.querySelector('button').onclick = () => dialog.close();
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.onclose = () => stage.replaceChildren();
  return (medium, frame) => {
    const time = frame.time_s;
    const title = medium.isVideo && time != null ? `${medium.name}, ${clock(time)}` : medium.name;
    dialog.querySelector('h2').textContent = title;
    const still = el('img', { src: frame.thumbnail, alt: `The frame that the model sees: ${title}` });
    const source = medium.url();
    stage.replaceChildren(still);
    if (source && !medium.isVideo) {
      const large = el('img', { src: source, alt: title });
      large.onload = () => stage.replaceChildren(large);
    } else if (source) {
      const player = el('video', { src: source, controls: true, muted: true, playsInline: true });
      player.currentTime = time ?? 0;
      // Formats that the browser does not know stay thumbnails.
      player.onloadeddata = () => stage.replaceChildren(player);
    }
    dialog.showModal();
  };
}

