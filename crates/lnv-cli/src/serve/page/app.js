// The page: the question's box, files that come in, the conversation, settings.
//
// Decision: plain modules without a framework or a build step; what the binary serves is what is written
// here. Nothing is fetched from elsewhere. A question that fails goes back into the box with its media.

import { Turn } from './chat.js';
import { el } from './dom.js';
import { Medium, mediumCard, settled, viewerFor } from './media.js';
import { Problem, answer, forgotten, key, modelName, onKeyWanted, stopped } from './server.js';

const $ = (id) => document.getElementById(id);
const SETTINGS = 'lnv-settings';
const CHAT = 'lnv-chat';
const DEFAULTS = { system: '', frames: '', maxTokens: '', temperature: '' };
const IDEAS = ['What happens in this video?', 'Describe the video.', 'How many are there?'];
const DEMO_IDEAS = ['Which way does it move?', 'What colour is it?', 'Describe the video.'];

let settings = { ...DEFAULTS };
let model = null;
let turns = [];
let media = [];
/** The AbortController of the answer that is under way. */
let asking = null;

const view = viewerFor($('viewer'));

// --- What is kept -----------------------------------------------------------------------------------

function read(storage, name) {
  try {
    return JSON.parse(storage.getItem(name));
  } catch {
    return null;
  }
}

function keep(storage, name, value) {
  try {
    // Where it is full, nothing is better than what was true before.
    storage.removeItem(name);
    storage.setItem(name, JSON.stringify(value));
  } catch {
    // Full or forbidden: the page works without.
  }
}

const keepChat = () => keep(sessionStorage, CHAT, turns.map((turn) => turn.kept()));

// --- Telling ----------------------------------------------------------------------------------------

function tell(message) {
  $('problem').querySelector('p').textContent = message;
  $('problem').hidden = !message;
}

/** For those who do not see the page change. */
const say = (message) => ($('spoken').textContent = message);

// --- Media ------------------------------------------------------------------------------------------

function addFiles(files) {
  for (const file of files) {
    if (!file.size) tell(`${file.name} is empty or a folder.`);
    else addMedium(new Medium({ file, frames: Number(settings.frames) || null }));
  }
  $('question').focus();
}

/** Asks for a link; the server fetches what is there. */
function addLink() {
  const dialog = $('linker');
  const field = dialog.querySelector('input');
  field.value = '';
  dialog.returnValue = '';
  dialog.onclose = () => {
    if (dialog.returnValue !== 'save') return;
    addMedium(new Medium({ link: field.value.trim(), frames: Number(settings.frames) || null }));
    $('question').focus();
  };
  dialog.showModal();
}

function addMedium(medium) {
  const card = mediumCard(medium, view, () => removeMedium(medium));
  media.push(medium);
  medium.card = card;
  $('tray').append(card);
  medium.addEventListener('change', announce);
  card.scrollIntoView({ block: 'nearest' });
  refresh();
}

function announce({ target: medium }) {
  if (!medium.busy) say(medium.error?.message ?? `${medium.name} is ready.`);
}

function removeMedium(medium) {
  media = media.filter((other) => other !== medium);
  medium.card.remove();
  $('question').focus();
  refresh();
}

function clearTray() {
  media = [];
  $('tray').replaceChildren();
}

// --- Asking -----------------------------------------------------------------------------------------

/** Sends what is in the box. */
function ask() {
  const question = $('question').value.trim();
  if (asking) return;
  if (!question) {
    tell(media.length ? 'Write a question about it.' : 'Write a question, or add a video.');
    $('question').focus();
    return;
  }
  const turn = new Turn({ question, media });
  $('question').value = '';
  clearTray();
  turns.push(turn);
  showTurn(turn);
  run(turn);
}

/** Asks the last question again. */
function askAgain(turn) {
  if (!asking && turn === turns.at(-1)) run(turn);
}

async function run(turn) {
  tell('');
  turns.filter((other) => other !== turn).forEach((other) => other.fold());
  asking = new AbortController();
  const { signal } = asking;
  turn.begin();
  refresh();
  scrollDown();
  let follow;
  try {
    const end = await answerWith(turn, signal);
    follow = atBottom();
    turn.finish('done', end.finish === 'length' ? 'The longest answer is reached; Settings has it.' : '', end);
  } catch (error) {
    follow = atBottom();
    const message = stopped(error) ? 'Stopped.' : plain(error);
    turn.finish(stopped(error) ? 'stopped' : 'failed', message, turn.answer ? { usage: turn.usage } : null);
    if (!turn.answer) putBack(turn);
    if (!stopped(error)) tell(message);
    say(message);
  }
  asking = null;
  keepChat();
  refresh();
  if (follow) scrollDown();
}

async function answerWith(turn, signal) {
  await settled(turn.media, signal);
  const on = {
    stage: (progress) => turn.progress(progress),
    text: (piece) => {
      const follow = atBottom();
      turn.append(piece);
      if (follow) scrollDown();
    },
    usage: (usage) => (turn.usage = usage),
  };
  try {
    return await answer(await body(turn, signal), signal, on);
  } catch (error) {
    // The server keeps so many files; those that it has dropped are sent again, once.
    const lost = turns.flatMap((each) => each.media).filter((medium) => medium.again);
    if (!forgotten(error) || turn.answer || !lost.length) throw error;
    lost.forEach((medium) => medium.send());
    await settled(lost, signal);
    return answer(await body(turn, signal), signal, on);
  }
}

/** The request: the conversation up to this turn. */
async function body(turn, signal) {
  model ??= await modelName(signal);
  const said = turns.filter((other) => other === turn || other.answer);
  const messages = said.flatMap((each) => each.messages());
  if (settings.system.trim()) messages.unshift({ role: 'system', content: settings.system.trim() });
  const request = { model, messages };
  if (settings.maxTokens !== '') request.max_tokens = Number(settings.maxTokens);
  if (settings.temperature !== '') request.temperature = Number(settings.temperature);
  return request;
}

function plain(error) {
  if (error instanceof Problem) return error.message;
  console.error(error);
  return `Something on this page went wrong: ${error.message}`;
}

/** A question without an answer goes back into the box; nothing that was typed is lost. */
function putBack(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.node.remove();
  const box = $('question');
  box.value = [turn.question, box.value].filter(Boolean).join('\n');
  const later = media;
  clearTray();
  [...turn.media, ...later].forEach(addMedium);
  grow();
  box.focus();
}

const stop = () => asking?.abort();

function newChat() {
  stop();
  for (const turn of turns) turn.node.remove();
  turns = [];
  tell('');
  keepChat();
  refresh();
  $('question').focus();
}

// --- Showing ----------------------------------------------------------------------------------------

function showTurn(turn) {
  const reuse = (medium) => {
    addMedium(medium.copy());
    $('question').focus();
  };
  $('chat').append(turn.show({ view, reuse, again: askAgain }));
}

function refresh() {
  const started = turns.length > 0;
  $('empty').hidden = started;
  $('empty').classList.toggle('chosen', media.length > 0);
  $('drop').hidden = media.length > 0;
  $('new-chat').disabled = !started;
  $('send').hidden = asking != null;
  $('stop').hidden = asking == null;
  document.body.classList.toggle('talking', started);
  $('question').placeholder = started || !media.length ? 'Ask something' : 'Ask about it';
  grow();
}

/** The box is as high as what is written in it. */
function grow() {
  const box = $('question');
  box.style.setProperty('height', 'auto');
  box.style.setProperty('height', `${box.scrollHeight}px`);
}

const atBottom = () => $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 80;

const scrollDown = () => ($('scroll').scrollTop = $('scroll').scrollHeight);

// --- Settings and the key ---------------------------------------------------------------------------

function fillSettings(values) {
  const fields = $('settings').querySelector('form').elements;
  for (const [name, value] of Object.entries(values)) fields[name].value = value;
}

function openSettings() {
  fillSettings({ ...settings, key: key.get() });
  $('settings').returnValue = '';
  $('settings').showModal();
}

function saveSettings() {
  if ($('settings').returnValue !== 'save') return;
  const fields = $('settings').querySelector('form').elements;
  settings = {
    system: fields.system.value,
    frames: fields.frames.value,
    maxTokens: fields.maxTokens.value,
    temperature: fields.temperature.value,
  };
  keep(localStorage, SETTINGS, settings);
  key.set(fields.key.value.trim());
  nameModel();
}

function askForKey() {
  const dialog = $('key-asker');
  const field = dialog.querySelector('input');
  field.value = '';
  dialog.querySelector('.wrong').hidden = !key.get();
  dialog.returnValue = '';
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      const given = dialog.returnValue === 'save' ? field.value.trim() : '';
      if (given) key.set(given);
      resolve(given !== '');
    };
  });
}

async function nameModel() {
  try {
    model = await modelName();
  } catch (error) {
    tell(plain(error));
    return;
  }
  const name = model.split('/').pop();
  $('model').textContent = name;
  $('model').title = model;
  const demo = /demo/i.test(model);
  $('ideas').replaceChildren(...(demo ? DEMO_IDEAS : IDEAS).map(idea));
}

const idea = (text) => {
  const onclick = () => {
    $('question').value = text;
    grow();
    $('question').focus();
  };
  return el('li', {}, el('button', { type: 'button', className: 'plain', onclick }, text));
};

// --- Wiring -----------------------------------------------------------------------------------------

function wireFiles() {
  const pick = () => $('files').click();
  $('attach').onclick = pick;
  $('link').onclick = addLink;
  $('drop').onclick = pick;
  $('files').onchange = () => {
    addFiles([...$('files').files]);
    $('files').value = '';
  };
  document.addEventListener('paste', (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    addFiles(files);
  });
  let depth = 0;
  const show = (by) => {
    depth = by ? depth + by : 0;
    $('dropping').hidden = depth === 0;
  };
  const holdsFiles = (event) => event.dataTransfer?.types.includes('Files');
  document.addEventListener('dragenter', (event) => holdsFiles(event) && show(1));
  document.addEventListener('dragleave', (event) => holdsFiles(event) && show(-1));
  document.addEventListener('dragover', (event) => holdsFiles(event) && event.preventDefault());
  document.addEventListener('drop', (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    show(0);
    addFiles([...event.dataTransfer.files]);
  });
}

function wireAsking() {
  $('composer').onsubmit = (event) => {
    event.preventDefault();
    ask();
  };
  $('question').oninput = grow;
  $('question').onkeydown = (event) => {
    // While letters are composed, Enter picks one of them.
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  };
  $('stop').onclick = () => {
    stop();
    $('question').focus();
  };
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape' && !document.querySelector('dialog[open]')) stop();
  });
  $('problem').querySelector('button').onclick = () => {
    tell('');
    $('question').focus();
  };
  $('new-chat').onclick = newChat;
}

function wireSettings() {
  $('open-settings').onclick = openSettings;
  $('settings').onclose = saveSettings;
  $('reset-settings').onclick = () => fillSettings(DEFAULTS);
  onKeyWanted(askForKey);
  for (const button of document.querySelectorAll('dialog .cancel')) {
    button.onclick = () => button.closest('dialog').close();
  }
}

function start() {
  settings = { ...DEFAULTS, ...read(localStorage, SETTINGS) };
  for (const kept of read(sessionStorage, CHAT) ?? []) {
    const turn = new Turn({ ...kept, media: kept.media.map((medium) => new Medium({ kept: medium })) });
    turns.push(turn);
    showTurn(turn);
    turn.fold();
  }
  wireFiles();
  wireAsking();
  wireSettings();
  window.addEventListener('pagehide', keepChat);
  refresh();
  scrollDown();
  nameModel();
}

start();
