// The settings of the next answer. An empty field is not sent: the model's own
// recommendation counts then.

import { byId } from './dom.js';

const STORE = 'two-lives-settings'; // of this tab; no key is among them
const NUMBERS = {
  temperature: 'Temperature',
  top_p: 'Top p',
  top_k: 'Top k',
  max_tokens: 'Most tokens',
  seed: 'Seed',
};
const TEXTS = ['system', 'stop-strings', 'tools'];
const FIELDS = [...Object.keys(NUMBERS), ...TEXTS];

/** Fills the form with the settings of this tab, and keeps changes. */
export function start() {
  const kept = JSON.parse(sessionStorage.getItem(STORE) ?? '{}');
  for (const name of FIELDS) byId(name).value = kept[name] ?? '';
  const form = byId('settings-form');
  form.addEventListener('submit', (event) => event.preventDefault());
  form.addEventListener('input', keep);
  form.addEventListener('reset', () => setTimeout(keep));
}

function keep() {
  const values = FIELDS.map((name) => [name, byId(name).value]);
  sessionStorage.setItem(STORE, JSON.stringify(Object.fromEntries(values)));
}

/** Returns the system prompt. */
export const system = () => byId('system').value.trim();

/**
 * Returns the fields of a request body that the form chooses.
 *
 * @throws {Error} a value is wrong; the message says which and why
 */
export function chosen() {
  const fields = {};
  for (const [name, label] of Object.entries(NUMBERS)) {
    const input = byId(name);
    const value = input.valueAsNumber;
    if (!input.validity.valid) {
      input.focus();
      throw new Error(`${label}: ${input.validationMessage}`);
    }
    if (Number.isNaN(value)) continue;
    if (input.step === '1' && !Number.isSafeInteger(value)) {
      throw new Error(`${label}: ${input.value} is too large for this page.`);
    }
    fields[name] = value;
  }
  const stop = byId('stop-strings').value.split('\n').filter(Boolean);
  if (stop.length) fields.stop = stop;
  const tools = byId('tools').value.trim();
  if (tools) fields.tools = toolList(tools);
  return fields;
}

function toolList(text) {
  let tools = null;
  try {
    tools = JSON.parse(text);
  } catch {
    // Told below.
  }
  if (!Array.isArray(tools)) {
    throw new Error(
      'Tools: this is no JSON list. An example: [{"type": "function",' +
        ' "function": {"name": "weather", "parameters": {}}}]',
    );
  }
  return tools;
}
