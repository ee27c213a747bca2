// One question and its answer: what is shown, what is sent again with the next question.
//
// Decision: the history is sent whole with every question, as the API wants it; the server finds what it
// has computed already. Answers are shown as text, never as HTML.

import { count, el, iconButton, inSeconds } from './dom.js';
import { mediumFigure } from './media.js';

/** The stages of an answer, in their order: name on the wire, while it runs, afterwards. */
const STAGES = [
  ['media', 'Reading media', 'Media'],
  ['vision', 'Looking', 'Looking'],
  ['prefill', 'Reading the prompt', 'Prompt'],
  ['decode', 'Answering', 'Answering'],
];

const TICK_MS = 100;

export class Turn {
  #parts = {};
  #timer = null;

  constructor({ question, media, answer = '', state = 'running', note = '', facts = null }) {
    Object.assign(this, { question, media, answer, state, note, facts });
    this.stage = null;
  }

  /** What a later visit needs. */
  kept() {
    const { question, answer, note, facts } = this;
    const state = this.state === 'running' ? 'stopped' : this.state;
    const media = this.media.filter((medium) => medium.about).map((medium) => medium.kept());
    return { question, answer, state, note, facts, media };
  }

  /** As messages of the API. */
  messages() {
    const parts = this.media.map((medium) => medium.part());
    const asked = { role: 'user', content: [...parts, { type: 'text', text: this.question }] };
    return this.answer ? [asked, { role: 'assistant', content: this.answer }] : [asked];
  }

  /** The item of the conversation. `on`: view, reuse, again. */
  show(on) {
    const asked = el('div', { className: 'asked' });
    asked.append(...this.media.map((medium) => mediumFigure(medium, on.view, () => on.reuse(medium))));
    asked.append(el('p', {}, el('span', { className: 'unseen' }, 'You: '), this.question));

    const parts = (this.#parts = {
      bars: STAGES.map(() => el('i')),
      stage: el('span'),
      time: el('span', { className: 'time', ariaHidden: 'true' }),
      text: el('p', { className: 'text' }),
      note: el('p', { className: 'muted note' }),
      facts: el('div'),
    });
    parts.waiting = el(
      'div',
      { className: 'waiting' },
      el('div', { className: 'bars', ariaHidden: 'true' }, ...parts.bars),
      el('p', {}, parts.stage, ' · ', parts.time),
    );
    const copy = iconButton('copy', 'Copy the answer', () => this.#copy(copy));
    const again = iconButton('again', 'Ask again', () => on.again(this));
    again.classList.add('again');
    parts.tools = el('div', { className: 'tools' }, copy, again, parts.facts);
    // While it is busy, a screen reader waits; it then reads the answer once, and whole.
    parts.live = el(
      'div',
      { className: 'answer', ariaLive: 'polite' },
      el('span', { className: 'unseen' }, 'Answer: '),
      parts.waiting,
      parts.text,
      parts.note,
    );
    this.node = el('li', { className: 'turn' }, asked, parts.live, parts.tools);
    this.#refresh();
    return this.node;
  }

  /** The answer is asked for. */
  begin() {
    Object.assign(this, { answer: '', state: 'running', note: '', facts: null, stage: null, usage: null });
    this.started = performance.now();
    this.first = null;
    this.#timer = setInterval(() => this.#tick(), TICK_MS);
    this.#refresh();
    this.#tick();
  }

  /** A stage goes on. */
  progress({ stage, done, total }) {
    this.stage = stage;
    const now = STAGES.findIndex(([name]) => name === stage);
    this.#parts.bars.forEach((bar, at) => {
      const share = at < now ? 1 : at > now ? 0 : total ? done / total : 0.5;
      bar.style.setProperty('--share', share);
    });
    const of = total > 1 ? ` ${done} of ${total}` : '';
    this.#parts.stage.textContent = `${STAGES[now]?.[1] ?? stage}${of}`;
  }

  /** The answer goes on. */
  append(piece) {
    this.first ??= performance.now();
    this.answer += piece;
    this.#parts.text.append(piece);
    this.#parts.waiting.hidden = true;
  }

  /** The answer is over: 'done', 'stopped' or 'failed'. */
  finish(state, note = '', end = null) {
    clearInterval(this.#timer);
    const now = performance.now();
    const { first } = this;
    this.facts = end && {
      usage: end.usage,
      timings: end.timings,
      first: first && (first - this.started) / 1000,
      whole: (now - this.started) / 1000,
      streaming: first && (now - first) / 1000,
    };
    Object.assign(this, { state, note });
    this.#refresh();
  }

  /** Shows only the sum of its figures. */
  fold() {
    const details = this.#parts.facts?.querySelector('details');
    if (details) details.open = false;
  }

  #tick() {
    this.#parts.time.textContent = `${((performance.now() - this.started) / 1000).toFixed(1)} s`;
  }

  #refresh() {
    const { live, waiting, stage, bars, text, note, facts, tools } = this.#parts;
    const running = this.state === 'running';
    live.ariaBusy = String(running);
    this.node.classList.toggle('running', running);
    waiting.hidden = !running || this.answer !== '';
    if (running) {
      stage.textContent = this.media.length ? 'Reading media' : 'Waiting for the model';
      bars.forEach((bar) => bar.style.setProperty('--share', 0));
    }
    text.textContent = this.answer;
    note.textContent = this.note;
    note.hidden = !this.note;
    tools.hidden = running;
    facts.replaceChildren(...(this.facts ? [figures(this.facts)] : []));
  }

  async #copy(button) {
    try {
      await navigator.clipboard.writeText(this.answer);
    } catch {
      // Without HTTPS there is no clipboard: the answer is marked, Ctrl+C does the rest.
      getSelection().selectAllChildren(this.#parts.text);
      return;
    }
    const done = iconButton('done', 'Copied');
    button.replaceWith(done);
    done.focus();
    setTimeout(() => {
      const focused = document.activeElement === done;
      done.replaceWith(button);
      if (focused) button.focus();
    }, 1500);
  }
}

/** Tokens and seconds of an answer. */
function figures({ usage, timings, first, whole, streaming }) {
  const tokens = usage?.completion_tokens ?? null;
  const steps = timings?.decode_steps ?? (tokens == null ? null : tokens - 1);
  const decoding = timings?.decode_s ?? streaming;
  const rate = steps > 0 && decoding > 0 ? steps / decoding : null;
  const line = [
    tokens == null ? null : count(tokens, 'token'),
    inSeconds(whole),
    rate && `${rate.toFixed(rate < 10 ? 2 : rate < 100 ? 1 : 0)}\u00a0tokens/s`,
  ];

  const rows = [];
  for (const [name, , label] of STAGES) {
    const seconds = timings?.[`${name}_s`];
    if (seconds != null) rows.push([label, inSeconds(seconds)]);
  }
  if (first != null) rows.push(['First word after', inSeconds(first)]);
  if (usage) {
    // Known at the end only, as the stages' seconds are.
    const cached = usage.prompt_tokens_details?.cached_tokens;
    rows.push(['Prompt tokens', usage.prompt_tokens.toLocaleString()]);
    if (cached != null) rows.push(['Of them cached', cached.toLocaleString()]);
    rows.push(['Answer tokens', tokens.toLocaleString()]);
  }
  const cells = rows.map(([label, value]) => el('div', {}, el('dt', {}, label), el('dd', {}, value)));
  const spent = STAGES.map(([name]) => Math.max(timings?.[`${name}_s`] ?? 0, 0));
  const total = spent.reduce((sum, one) => sum + one, 0) || 1;
  const shares = spent.map((one) => one / total);
  const bar = el('div', { className: 'shares', ariaHidden: 'true' });
  bar.append(
    ...shares.map((share) => {
      const piece = el('i');
      piece.style.setProperty('--share', share);
      return piece;
    }),
  );
  if (!timings) bar.hidden = true;
  return el(
    'details',
    { open: true },
    el('summary', {}, line.filter(Boolean).join(' · ')),
    bar,
    el('dl', {}, ...cells),
  );
}
