// The turns of a conversation as list items. Each item is made once, and then
// shows the changes of its turn.

import { node, short, whole } from './dom.js';
import { Shown, copied } from './markdown.js';

const ENDS = {
  stop: null,
  length: 'stopped at the limit of tokens; raise “Most tokens” for more',
  tool_calls: 'waits for the result of a tool',
  stopped: 'stopped by you',
  broken: 'broke off',
  error: 'ended by an error of the model',
};

/** Returns a button of a turn. */
function action(label, name, listener) {
  return node('button', { type: 'button', 'data-do': name, click: listener },
    label);
}

/** The item of a user's message, or of a tool's result. */
export class Asked {
  constructor(turn, { onEdit }) {
    const isTool = turn.role === 'tool';
    this.edit = action('Edit', 'edit', onEdit);
    const copy = action('Copy', 'copy', () => copied(copy, turn.text));
    this.item = node(`li.turn.${turn.role}`, {},
      node('h2.who', {}, isTool ? `Result of ${turn.name}` : 'You'),
      node('div.words', {}, node('p.plain', {}, turn.text)),
      node('div.actions', {}, copy, isTool ? null : this.edit));
  }

  /** Shows which actions the last message has. */
  mark({ isLastAsked, isBusy }) {
    this.edit.hidden = !isLastAsked;
    this.edit.disabled = isBusy;
  }
}

/** The item of an answer, which grows while it streams. */
export class Answered {
  constructor(turn, { onAgain, onRate, onResults }) {
    this.turn = turn;
    this.onResults = onResults;
    this.words = node('div.words.answer');
    this.shown = new Shown(this.words);
    this.thinking = node('details.fold', { hidden: true },
      node('summary', {}, 'Reasoning'), node('p.plain'));
    this.calls = node('div.calls');
    this.figures = node('p.figures-line');
    this.again = action('Regenerate', 'again', onAgain);
    const copy = action('Copy', 'copy', () => copied(copy, turn.text));
    this.up = rating('Thumbs up', 'up', () => onRate('up'));
    this.down = rating('Thumbs down', 'down', () => onRate('down'));
    this.better = node('div');
    this.actions = node('div.actions', { hidden: true },
      copy, this.again, this.up, this.down);
    this.item = node('li.turn.assistant', { 'aria-busy': 'true' },
      node('h2.who', {}, turn.model), this.thinking, this.words, this.calls,
      this.figures, this.actions, this.better);
  }

  /** Shows the turn as it is now. */
  update() {
    const { turn } = this;
    this.shown.update(turn.text);
    this.thinking.hidden = !turn.reasoning;
    this.thinking.lastChild.textContent = turn.reasoning;
    if (turn.calls.length) this.#showCalls();
    this.item.setAttribute('aria-busy', String(!turn.end));
    this.item.classList.toggle('waiting', !turn.end && !turn.first);
    this.figures.textContent = figures(turn);
    this.actions.hidden = !turn.end;
    for (const [button, kind] of [[this.up, 'up'], [this.down, 'down']]) {
      button.setAttribute('aria-pressed', String(turn.thumb === kind));
      button.hidden = !turn.id || turn.end === 'broken';
    }
  }

  /** Shows which actions the last answer has. */
  mark({ isLast, isBusy }) {
    this.again.hidden = !isLast;
    this.again.disabled = isBusy;
    for (const button of this.calls.querySelectorAll('form button')) {
      button.disabled = isBusy;
    }
    if (!isLast) this.calls.querySelector('form')?.remove();
  }

  /** Offers to send a better answer along with a rating. */
  askBetter(onSend) {
    const preferred = node('textarea', { rows: '3' });
    const comment = node('input', { type: 'text', maxlength: '2000' });
    const form = node('form.better', {
      submit: (event) => {
        event.preventDefault();
        onSend(preferred.value.trim(), comment.value.trim());
      },
    },
      node('label', {}, 'A better answer would be', preferred),
      node('label', {}, 'Comment', comment),
      node('button', { type: 'submit' }, 'Send both'));
    this.better.replaceChildren(form);
  }

  /** Shows the result of a rating. */
  tell(text) {
    this.better.replaceChildren(
      ...(text ? [node('p.small', { role: 'status' }, text)] : []));
  }

  #showCalls() {
    const { turn } = this;
    const form = turn.end === 'tool_calls' ? this.#resultForm() : null;
    const folds = turn.calls.map((call) =>
      node('details.fold', {},
        node('summary', {}, `Tool call: ${call.name}`),
        node('pre', { tabindex: '0' }, node('code', {}, call.arguments))));
    this.calls.replaceChildren(...folds, ...(form ? [form] : []));
  }

  #resultForm() {
    const { turn } = this;
    const inputs = turn.calls.map(() => node('textarea', { rows: '2' }));
    const labels = turn.calls.map((call, i) =>
      node('label', {}, `Result of ${call.name}`, inputs[i]));
    return node('form.better', {
      submit: (event) => {
        event.preventDefault();
        this.onResults(inputs.map((input) => input.value));
      },
    }, ...labels, node('button', { type: 'submit' }, 'Send results'));
  }
}

function rating(label, kind, listener) {
  const button = action(label, kind, listener);
  button.setAttribute('aria-pressed', 'false');
  button.title = 'Sends this conversation and your rating to the operator';
  return button;
}

/** Returns the speed and the end of an answer in words. */
function figures(turn) {
  const parts = [];
  if (turn.first) parts.push(`first token after ${turn.first.toFixed(2)} s`);
  const speed = perSecond(turn);
  if (speed) parts.push(`${speed.toFixed(1)} tokens/s`);
  if (turn.end) {
    const count = turn.usage?.completion_tokens;
    if (count !== undefined) parts.push(`${whole(count)} tokens`);
    if (turn.flops) parts.push(`${short(turn.flops)}FLOP`);
    if (ENDS[turn.end]) parts.push(ENDS[turn.end]);
  }
  return parts.join(' · ');
}

/** Returns tokens per second after the first token, or 0. */
function perSecond(turn) {
  // While it streams, a chunk is about a token.
  const count = turn.usage?.completion_tokens ?? turn.chunks;
  return turn.seconds > 0 && count > 1 ? (count - 1) / turn.seconds : 0;
}
