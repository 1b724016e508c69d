// The status view: the metrics that Prometheus collects, and the models.

import { ask } from './api.js';
import { byId, node, short, whole } from './dom.js';

const EVERY = 2000; // milliseconds between two readings
const MOST_READINGS = 60;
const SVG = 'http://www.w3.org/2000/svg';
const SAMPLE = /^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Returns the samples of a text of Prometheus: name, labels and value. */
export function samples(text) {
  const found = [];
  for (const line of text.split('\n')) {
    const sample = line.startsWith('#') ? null : line.match(SAMPLE);
    if (!sample) continue;
    const labels = {};
    for (const [, key, value] of (sample[2] ?? '').matchAll(LABEL)) {
      labels[key] = value;
    }
    found.push({ name: sample[1], labels, value: Number(sample[3]) });
  }
  return found;
}

/** Returns the sum of a metric over the samples of all models. */
function total(reading, name, labels = {}) {
  const wanted = Object.entries(labels);
  return reading
    .filter((sample) => sample.name === name)
    .filter(({ labels: has }) => wanted.every(([k, v]) => has[k] === v))
    .reduce((sum, sample) => sum + sample.value, 0);
}

/** Reads and shows the status while its view is open. */
export class Status {
  constructor() {
    this.speeds = [];
    this.before = null;
    this.timer = null;
  }

  /** Starts to read, at once and then every two seconds. */
  open(models) {
    byId('models').replaceChildren(...models.map(modelCard));
    this.close();
    this.timer = setInterval(() => this.#read(), EVERY);
    this.#read();
  }

  /** Stops to read. */
  close() {
    clearInterval(this.timer);
    this.before = null;
  }

  async #read() {
    if (document.hidden) return;
    const problem = byId('status-problem');
    try {
      const response = await ask('metrics');
      const at = performance.now() / 1000;
      this.#show({ at, found: samples(await response.text()) });
      problem.hidden = true;
    } catch (error) {
      const text = error.status === 403
        ? 'Your key may not read the metrics; the key of an administrator may.'
        : error.message;
      // The same words again would be read aloud again.
      if (problem.hidden || problem.textContent !== text) {
        problem.textContent = text;
      }
      problem.hidden = false;
    }
  }

  #show({ at, found }) {
    const get = (name, labels) => total(found, name, labels);
    const before = this.before ?? { at: Number.NaN, found };
    const rate = (name) =>
      (get(name) - total(before.found, name)) / (at - before.at) || 0;
    const mean = (name) => get(`${name}_sum`) / get(`${name}_count`) || 0;
    const speed = rate('sampled_tokens_total');
    if (this.before) this.speeds.push(speed);
    this.speeds = this.speeds.slice(-MOST_READINGS);
    this.before = { at, found };
    const [used, idle, free] = ['used', 'idle', 'free']
      .map((kind) => get(`kv_pages_${kind}`));
    byId('figures').replaceChildren(
      figure('Queue', whole(get('running')), 'answers run now',
        `${whole(get('waiting'))} wait · ` +
        `${mean('queue_seconds').toFixed(2)} s mean wait`),
      figure('Throughput', speed.toFixed(1), 'tokens/s written',
        `${whole(rate('prefill_tokens_total'))} tokens/s read · ` +
        `${short(rate('flops_total'))}FLOP/s`, line(this.speeds)),
      figure('Pages', whole(used), 'of the KV cache in use',
        `${whole(idle)} hold known prompts · ${whole(free)} free`,
        bar(used, idle, free)),
      figure('First token', mean('time_to_first_token_seconds').toFixed(2),
        's, mean since start',
        `${(1000 * mean('inter_token_seconds')).toFixed(0)} ms per further token`),
      figure('Known prompts', percent(get('prefix_hit_rate')),
        'of prompt tokens found', `${whole(get('cached_tokens_total'))} tokens`),
      figure('Answers', whole(get('finished_total')), 'ended since start',
        ends(found)),
    );
  }
}

const percent = (share) => `${Math.round(100 * share)} %`;

function ends(found) {
  const parts = found
    .filter(({ name, value }) => name === 'finished_total' && value)
    .map(({ labels, value }) => `${whole(value)} ${labels.reason}`);
  const refused = total(found, 'refused_total');
  if (refused) parts.push(`${whole(refused)} refused`);
  return parts.join(' · ') || 'none yet';
}

function figure(title, value, unit, details, drawing = null) {
  return node('section.figure', {},
    node('h2', {}, title),
    node('p.value', {}, node('strong', {}, value), ` ${unit}`),
    drawing, node('p.small', {}, details));
}

/** Returns a drawing of the last readings, without axes. */
function line(values) {
  const most = Math.max(...values, 1);
  const points = values.map((value, i) =>
    `${(200 * i) / (MOST_READINGS - 1)},${38 - (36 * value) / most}`);
  const drawn = document.createElementNS(SVG, 'svg');
  const path = document.createElementNS(SVG, 'polyline');
  path.setAttribute('points', points.join(' '));
  drawn.setAttribute('viewBox', '0 0 200 40');
  drawn.setAttribute('preserveAspectRatio', 'none');
  drawn.setAttribute('class', 'line');
  drawn.setAttribute('aria-hidden', 'true'); // its last value is in words
  drawn.append(path);
  return drawn;
}

function bar(used, idle, free) {
  const all = used + idle + free || 1;
  const drawn = document.createElementNS(SVG, 'svg');
  drawn.setAttribute('viewBox', '0 0 200 10');
  drawn.setAttribute('preserveAspectRatio', 'none');
  drawn.setAttribute('class', 'bar');
  drawn.setAttribute('aria-hidden', 'true');
  let x = 0;
  for (const [count, kind] of [[used, 'used'], [idle, 'idle'], [free, 'free']]) {
    const part = document.createElementNS(SVG, 'rect');
    const width = (200 * count) / all;
    const place = { x, y: 0, width, height: 10, class: kind };
    for (const [name, value] of Object.entries(place)) {
      part.setAttribute(name, String(value));
    }
    drawn.append(part);
    x += width;
  }
  return drawn;
}

const WORDS = {
  weights_digest: 'Weights',
  num_params: 'Parameters',
  dtype: 'Numbers',
  experiment: 'Trained as',
  step: 'Step',
  tokens_seen: 'Tokens seen',
  code_commit: 'Code',
  knowledge_cutoff: 'Knowledge until',
  parents: 'Made from',
};

function modelCard(model) {
  const rows = [['Context', `${whole(model.max_model_len ?? 0)} tokens`]];
  for (const [key, value] of Object.entries(model.lineage ?? {})) {
    const text = worded(value);
    if (text) rows.push([WORDS[key] ?? key.replaceAll('_', ' '), text]);
  }
  return node('article.model-card', {},
    node('h3', {}, model.id),
    node('dl', {}, ...rows.flatMap(([name, text]) =>
      [node('dt', {}, name), node('dd', {}, text)])));
}

function worded(value) {
  if (value === null || value === '' || value === 0) return '';
  if (typeof value === 'number') return whole(value);
  if (typeof value !== 'object') return String(value);
  return Object.keys(value).length ? JSON.stringify(value) : '';
}
