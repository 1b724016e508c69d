// The page: its views, the model, the key and the message box.

import { ask, key } from './api.js';
import { Chat } from './chat.js';
import { byId, node } from './dom.js';
import * as settings from './settings.js';
import { Status } from './status.js';
import * as theme from './theme.js';

const IDEAS = [
  'Explain in three sentences what a language model does.',
  'Write a Python function that counts the words of a text.',
  'What should I ask before I buy a used bicycle?',
];
const RETRY = 1500; // milliseconds between two questions whether it is ready

let models = [];
let isReady = false;
let isWaiting = false;
let isEditing = false;

const chat = new Chat(
  () => models.find(({ id }) => id === byId('model').value) ?? models[0],
  {
    onBusy: showBusy,
    onProblem: showProblem,
    onSaid: (text) => { byId('said').textContent = text; },
  },
);
const status = new Status();
const text = byId('composer-text');

function showBusy(isBusy) {
  byId('stop').hidden = !isBusy;
  byId('send').hidden = isBusy;
  byId('model').disabled = isBusy;
  // The button that had the focus is gone.
  if (document.activeElement === document.body) text.focus();
}

function showProblem(problem) {
  byId('problem').hidden = !problem;
  byId('problem-text').textContent = problem?.message ?? '';
  byId('retry').hidden = !chat.turns.length || problem?.status === 400;
  if (problem?.status === 401) askForKey(problem.message);
  if (problem?.code === 'not_ready') waitUntilReady();
}

// ---------------------------------------------------------------- message box

function grow() {
  text.style.height = 'auto';
  const border = text.offsetHeight - text.clientHeight;
  text.style.height = `${text.scrollHeight + border}px`;
}

async function submit(event) {
  event?.preventDefault();
  const message = text.value.trim();
  if (!message || chat.isBusy || !isReady) return;
  const replacesLast = isEditing;
  leaveEditing();
  text.value = '';
  grow();
  await chat.send(message, { replacesLast });
}

chat.onEdit = () => {
  isEditing = true;
  byId('editing').hidden = false;
  text.value = chat.lastText();
  grow();
  text.focus();
};

function leaveEditing() {
  if (isEditing) text.value = '';
  isEditing = false;
  byId('editing').hidden = true;
}

text.addEventListener('input', grow);
text.addEventListener('keydown', (event) => {
  // While a word is composed, Enter belongs to the input method.
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) submit(event);
});
byId('composer').addEventListener('submit', submit);
byId('stop').addEventListener('click', () => chat.stop());
byId('retry').addEventListener('click', () => chat.again());
byId('cancel-edit').addEventListener('click', () => {
  leaveEditing();
  text.focus();
});
byId('new-chat').addEventListener('click', () => {
  leaveEditing();
  chat.clear();
  text.focus();
});
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || byId('key-dialog').open) return;
  if (chat.isBusy) chat.stop();
  else leaveEditing();
});
byId('ideas').append(...IDEAS.map((idea) => node('li', {},
  node('button', {
    type: 'button',
    click: () => {
      text.value = idea;
      grow();
      text.focus();
    },
  }, idea))));

// ---------------------------------------------------------------- model

async function loadModels() {
  try {
    const response = await ask('v1/models');
    models = (await response.json()).data;
    chat.prices = await (await ask('v1/prices')).json();
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else notice(`${error.message} Load the page again.`);
    return;
  }
  const before = byId('model').value;
  byId('model').replaceChildren(...models.map(({ id }) =>
    node('option', { value: id, selected: id === before }, id)));
  showModel();
  waitUntilReady();
}

function showModel() {
  const { id, lineage, max_model_len: most } = chat.model();
  const size = (lineage?.num_params ?? 0) / 1e6;
  byId('about').textContent =
    `${id} has ${size < 10 ? size.toFixed(1) : Math.round(size)} million` +
    ` parameters and reads up to ${most.toLocaleString('en')} tokens.` +
    (size < 1000 ? ' A model of this size is often wrong: check what it says.'
      : '');
  chat.showAccount();
}

async function waitUntilReady() {
  if (isWaiting) return;
  isWaiting = true;
  isReady = false;
  byId('send').disabled = true;
  for (;;) {
    const state = await readiness();
    if (state === 'ok') break;
    notice(state);
    await new Promise((wake) => { setTimeout(wake, RETRY); });
  }
  isWaiting = false;
  isReady = true;
  byId('send').disabled = false;
  notice('');
}

async function readiness() {
  try {
    const response = await fetch('ready');
    if (response.ok) return 'ok';
    const { status: state } = await response.json();
    return state === 'failed'
      ? 'The model failed to load; the log of the server says why.'
      : `The model is not ready yet: ${state}. You can write meanwhile.`;
  } catch {
    return `No connection to ${location.host}. The page tries again.`;
  }
}

function notice(words) {
  const place = byId('notice');
  if (place.textContent !== words) place.textContent = words;
  place.hidden = !words;
}

byId('model').addEventListener('change', showModel);

// ---------------------------------------------------------------- key

function askForKey(why) {
  byId('key-why').textContent =
    `${why} It stays in this tab and is forgotten when the tab is closed.`;
  openKey();
}

function openKey() {
  byId('key').value = key.get();
  if (!byId('key-dialog').open) byId('key-dialog').showModal();
}

byId('open-key').addEventListener('click', openKey);
byId('forget-key').addEventListener('click', () => {
  key.set('');
  byId('key-dialog').close();
});
byId('key-dialog').addEventListener('close', () => {
  // Chromium gives the focus back without a caret: keys would do nothing.
  if (document.activeElement === text) {
    text.setSelectionRange(text.value.length, text.value.length);
  }
});
byId('key-form').addEventListener('submit', (event) => {
  if (event.submitter?.value === 'cancel') return;
  key.set(byId('key').value.trim());
  byId('problem').hidden = true;
  loadModels();
});

// ---------------------------------------------------------------- views

function show(view) {
  const isChat = view === 'chat';
  byId('chat').hidden = byId('settings').parentElement.hidden = !isChat;
  byId('status').hidden = isChat;
  for (const name of ['chat', 'status']) {
    const button = byId(`show-${name}`);
    if (name === view) button.setAttribute('aria-current', 'page');
    else button.removeAttribute('aria-current');
  }
  if (isChat) status.close();
  else status.open(models);
}

byId('show-chat').addEventListener('click', () => show('chat'));
byId('show-status').addEventListener('click', () => show('status'));

theme.start();
settings.start();
byId('settings').open = matchMedia('(min-width: 64rem)').matches;
loadModels();
text.focus();
