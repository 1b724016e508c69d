// The conversation: it is sent whole with each message, and its answers stream.

import { Problem, ask, events } from './api.js';
import { byId, short, whole } from './dom.js';
import * as settings from './settings.js';
import { Answered, Asked } from './turns.js';

const STORE = 'two-lives-conversation'; // of this tab
const NEARLY_FULL = 0.8;
const FULL = 0.95;

/** A conversation with one model at a time. */
export class Chat {
  /**
   * @param {Function} model returns the card of the model that is chosen
   * @param {Object} listeners onBusy(isBusy), onProblem(problem or null),
   *   onSaid(text)
   */
  constructor(model, { onBusy, onProblem, onSaid }) {
    Object.assign(this, { model, onBusy, onProblem, onSaid });
    this.turns = [];
    this.views = new Map(); // turn to its item
    this.spent = nothing(); // of answers that were replaced, too
    this.abort = null;
    this.prices = null; // of the server, once they are known
    this.#restore();
  }

  get isBusy() {
    return this.abort !== null;
  }

  /** Sends a message of the user. */
  async send(text, { replacesLast = false } = {}) {
    if (replacesLast) this.#cut(this.#lastAsked());
    this.#add({ role: 'user', text });
    await this.#answer();
  }

  /** Returns the text of the last message of the user. */
  lastText() {
    return this.turns[this.#lastAsked()]?.text ?? '';
  }

  /** Answers the last message again. */
  async again() {
    if (this.isBusy || !this.turns.length) return;
    if (this.turns.at(-1).role === 'assistant') this.#cut(this.turns.length - 1);
    await this.#answer();
  }

  /** Stops the answer; the server sees it by the closed connection. */
  stop() {
    this.abort?.abort();
  }

  /** Forgets the conversation. */
  clear() {
    this.stop();
    this.#cut(0);
    this.spent = nothing();
    this.onProblem(null);
    this.#changed();
  }

  async #answer() {
    this.onProblem(null);
    let fields;
    try {
      fields = settings.chosen();
    } catch (error) {
      this.onProblem(new Problem(error.message));
      this.#changed();
      return;
    }
    const abort = new AbortController();
    this.abort = abort;
    const turn = {
      role: 'assistant', model: this.model().id, text: '', reasoning: '',
      calls: [], chunks: 0, first: 0, seconds: 0, end: null,
      system: settings.system(),
    };
    this.#add(turn);
    this.onBusy(true);
    try {
      await this.#stream(turn, fields, abort.signal);
    } catch (error) {
      this.#fail(turn, error);
    } finally {
      // A conversation that was cleared meanwhile has no place for the answer.
      if (this.abort === abort) this.abort = null;
      turn.end ??= 'broken';
      if (turn.id) this.#count(turn); // it has begun
      const isAtEnd = atEnd();
      this.views.get(turn)?.update();
      this.onBusy(false);
      this.#changed();
      if (isAtEnd) toEnd();
    }
    if (turn.end !== 'broken' && this.views.has(turn)) {
      this.onSaid(`${turn.model}: ${turn.text || 'no text'}`);
    }
  }

  async #stream(turn, fields, signal) {
    const start = performance.now();
    const response = await ask('v1/chat/completions', {
      method: 'POST',
      signal,
      body: {
        model: turn.model,
        messages: this.#before(turn),
        ...fields,
        stream: true,
        stream_options: { include_usage: true },
      },
    });
    turn.request = response.headers.get('x-request-id');
    for await (const event of events(response)) {
      turn.id ??= event.id;
      if (event.usage) turn.usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      turn.accounting ??= choice.accounting;
      if (take(turn, choice.delta ?? {})) {
        const now = (performance.now() - start) / 1000;
        turn.first ||= now;
        turn.seconds = now - turn.first;
        turn.chunks += 1;
      }
      if (choice.finish_reason) turn.ending = choice.finish_reason;
      this.#draw(turn);
    }
    turn.end = turn.ending ?? 'stop';
    turn.flops = turn.accounting?.flops;
  }

  #fail(turn, error) {
    if (error.name === 'AbortError') {
      turn.end = 'stopped';
    } else {
      turn.end = 'broken';
      this.onProblem(error instanceof Problem
        ? error : new Problem(`This page failed: ${error.message}`));
    }
    const isEmpty = !turn.text && !turn.reasoning && !turn.calls.length;
    if (isEmpty && this.views.has(turn)) this.#cut(this.turns.indexOf(turn));
  }

  /** Shows a turn with the next frame: tokens may arrive faster. */
  #draw(turn) {
    if (turn.isDrawing) return;
    turn.isDrawing = true;
    requestAnimationFrame(() => {
      turn.isDrawing = false;
      const isAtEnd = atEnd();
      this.views.get(turn)?.update();
      if (isAtEnd) toEnd();
    });
  }

  /** Returns the conversation up to an answer, as the API has it. */
  #before(answer) {
    const { system } = answer;
    const turns = this.turns.slice(0, this.turns.indexOf(answer));
    return [
      ...(system ? [{ role: 'system', content: system }] : []),
      ...turns.map(messageOf),
    ];
  }

  #lastAsked() {
    return this.turns.findLastIndex((turn) => turn.role === 'user');
  }

  #add(turn) {
    const view = turn.role === 'assistant'
      ? new Answered(turn, {
          onAgain: () => this.again(),
          onRate: (thumb) => this.#rate(turn, thumb),
          onResults: (texts) => this.#sendResults(turn, texts),
        })
      : new Asked(turn, { onEdit: () => this.onEdit?.() });
    this.turns.push(turn);
    this.views.set(turn, view);
    byId('turns').append(view.item);
    if (view.update) view.update();
    this.#changed();
    toEnd();
  }

  #cut(start) {
    for (const turn of this.turns.splice(start)) {
      this.views.get(turn).item.remove();
      this.views.delete(turn);
    }
  }

  async #sendResults(turn, texts) {
    turn.calls.forEach((call, i) => this.#add({
      role: 'tool', id: call.id, name: call.name, text: texts[i],
    }));
    await this.#answer();
  }

  /** Sends a rating, or takes it back. */
  async #rate(turn, thumb, { preferred = '', comment = '' } = {}) {
    const view = this.views.get(turn);
    const isTakenBack = turn.thumb === thumb && !preferred && !comment;
    try {
      if (turn.feedback) {
        await ask(`v1/feedback/${turn.feedback}`, { method: 'DELETE' });
        turn.feedback = turn.thumb = null;
      }
      view.tell(isTakenBack ? 'Your rating is deleted.' : '');
      if (!isTakenBack) {
        const response = await ask('v1/feedback', {
          method: 'POST',
          body: {
            request_id: turn.request ?? turn.id, model: turn.model,
            messages: this.#before(turn), answer: turn.text, thumb,
            ...(preferred && { preferred }), ...(comment && { comment }),
          },
        });
        turn.feedback = (await response.json()).id;
        turn.thumb = thumb;
        if (thumb === 'down' && !preferred) {
          view.askBetter((better, why) =>
            this.#rate(turn, thumb, { preferred: better, comment: why }));
        } else {
          view.tell('Thank you. Your rating and this conversation are stored.');
        }
      }
    } catch (error) {
      view.tell(error.status === 403
        ? 'This server stores no ratings for you. Its operator can allow them.'
        : `Your rating was not stored. ${error.message}`);
    }
    view.update();
    this.#keep();
  }

  #count(turn) {
    const { usage } = turn;
    const { spent } = this;
    spent.answers += 1;
    if (!usage) {
      // Of an answer that was stopped the server sends no count.
      spent.unknown += 1;
      return;
    }
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    spent.read += usage.prompt_tokens;
    spent.cached += cached;
    spent.written += usage.completion_tokens;
    spent.flops += turn.accounting?.flops ?? 0;
    if (!this.prices) return;
    const { prompt, cached: known, completion, per_tokens: per } = this.prices;
    spent.price += ((usage.prompt_tokens - cached) * prompt + cached * known +
      usage.completion_tokens * completion) / per;
  }

  #changed() {
    byId('empty').hidden = this.turns.length > 0;
    byId('new-chat').hidden = !this.turns.length;
    const last = this.turns.length - 1;
    const lastAsked = this.#lastAsked();
    this.turns.forEach((turn, i) => this.views.get(turn).mark({
      isLast: i === last,
      isLastAsked: i === lastAsked,
      isBusy: this.isBusy,
    }));
    this.showAccount();
    this.#keep();
  }

  /** Shows the used share of the context, and the cost so far. */
  showAccount() {
    const answer = this.turns.findLast((turn) => turn.usage);
    const most = this.model()?.max_model_len ?? 0;
    const used = this.turns.length && answer ? answer.usage.total_tokens : 0;
    const share = most ? used / most : 0;
    const meter = byId('context');
    const percent = Math.min(100, Math.round(100 * share));
    meter.setAttribute('aria-valuenow', String(percent));
    meter.firstElementChild.style.width = `${percent}%`;
    meter.parentElement.dataset.level =
      share >= FULL ? 'full' : share >= NEARLY_FULL ? 'high' : 'low';
    byId('context-text').textContent = contextText(used, most, share);
    byId('cost').textContent = costText(this.spent);
  }

  #keep() {
    const turns = this.turns
      .filter((turn) => turn.role !== 'assistant' || turn.end)
      .map(({ isDrawing, ...turn }) => turn);
    try {
      sessionStorage.setItem(
        STORE, JSON.stringify({ turns, spent: this.spent }));
    } catch {
      // Too long to keep: it stays on the page until that is loaded again.
      sessionStorage.removeItem(STORE);
    }
  }

  #restore() {
    const kept = JSON.parse(sessionStorage.getItem(STORE) ?? 'null');
    this.spent = kept?.spent ?? nothing();
    for (const turn of kept?.turns ?? []) this.#add(turn);
    this.#changed();
  }
}

const nothing = () => ({
  answers: 0, unknown: 0, read: 0, cached: 0, written: 0, flops: 0, price: 0,
});

/** Adds a piece of an answer to its turn; returns whether it had any. */
function take(turn, delta) {
  turn.text += delta.content ?? '';
  turn.reasoning += delta.reasoning_content ?? '';
  for (const part of delta.tool_calls ?? []) {
    const call = (turn.calls[part.index ?? 0] ??= {
      id: '', name: '', arguments: '',
    });
    call.id = part.id ?? call.id;
    call.name += part.function?.name ?? '';
    call.arguments += part.function?.arguments ?? '';
  }
  return Boolean(
    delta.content || delta.reasoning_content || delta.tool_calls?.length);
}

/** Returns the message of a turn; reasoning is not sent again. */
function messageOf(turn) {
  if (turn.role === 'user') return { role: 'user', content: turn.text };
  if (turn.role === 'tool') {
    return { role: 'tool', tool_call_id: turn.id, content: turn.text };
  }
  const calls = turn.calls.map((call) => ({
    id: call.id,
    type: 'function',
    function: { name: call.name, arguments: call.arguments },
  }));
  // A call that broke off, or has no result, cannot be sent again.
  const hasCalls = calls.length && turn.end === 'tool_calls';
  const message = { role: 'assistant', content: turn.text };
  return hasCalls ? { ...message, tool_calls: calls } : message;
}

function contextText(used, most, share) {
  if (!most) return '';
  if (!used) return `Context: room for ${whole(most)} tokens`;
  const text = `Context: ${whole(used)} of ${whole(most)} tokens are sent again`;
  if (share >= FULL) return `${text}. It is full: begin a new conversation.`;
  if (share >= NEARLY_FULL) return `${text}. It is nearly full.`;
  return text;
}

function costText(spent) {
  if (!spent.answers) return '';
  const cached = spent.cached ? ` (${whole(spent.cached)} cached)` : '';
  const parts = [
    `So far ${whole(spent.read)} tokens read${cached}, ` +
      `${whole(spent.written)} written`,
  ];
  if (spent.flops) parts.push(`${short(spent.flops)}FLOP`);
  if (spent.price) parts.push(`price ${spent.price.toPrecision(3)}`);
  if (spent.unknown) parts.push(`${spent.unknown} without a count`);
  return parts.join(' · ');
}

function atEnd() {
  const page = document.documentElement;
  return page.scrollHeight - window.scrollY - window.innerHeight < 80;
}

function toEnd() {
  window.scrollTo(0, document.documentElement.scrollHeight);
}
