// The small part of Markdown that models write: code, lists, headings, bold.
//
// Answers are untrusted. They become text nodes inside elements that are made
// here. Links and images stay text: they could carry a conversation away.

import { node } from './dom.js';

// Each expression takes time in proportion to its line, for any content.
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;

/** Shows a growing text; only blocks that changed are made again. */
export class Shown {
  constructor(parent) {
    this.parent = parent;
    this.sources = [];
  }

  /** Shows the whole text that has arrived. */
  update(text) {
    const found = blocks(text);
    let same = 0;
    while (
      same < found.length &&
      found[same].source === this.sources[same]
    ) {
      same += 1;
    }
    const { children } = this.parent;
    while (children.length > same) children[same].remove();
    this.parent.append(...found.slice(same).map(rendered));
    this.sources = found.map((block) => block.source);
  }
}

/** Returns the blocks of a text, each with its kind, lines and source. */
export function blocks(text) {
  const lines = text.split(/\r?\n/);
  const found = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const [kind, end] = blockAt(lines, i);
    const source = `${kind}\n${lines.slice(i, end).join('\n')}`;
    found.push({ kind, lines: lines.slice(i, end), source });
    i = end;
  }
  return found;
}

function blockAt(lines, start) {
  const line = lines[start];
  const fence = line.match(FENCE);
  let end = start + 1;
  if (fence) {
    while (end < lines.length && !closes(lines[end], fence[1])) end += 1;
    // Of an answer that is not finished, the end may be missing.
    return ['code', Math.min(end + 1, lines.length)];
  }
  if (RULE.test(line)) return ['rule', end];
  if (HEADING.test(line)) return ['heading', end];
  if (QUOTE.test(line)) {
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    return ['quote', end];
  }
  if (ITEM.test(line)) {
    while (end < lines.length && continuesList(lines, end)) end += 1;
    return ['list', end];
  }
  while (end < lines.length && lines[end].trim() && !begins(lines[end])) {
    end += 1;
  }
  return ['paragraph', end];
}

function closes(line, mark) {
  const text = line.trim();
  return text.startsWith(mark) && !text.replaceAll(mark[0], '');
}

const begins = (line) =>
  [FENCE, ITEM, HEADING, QUOTE, RULE].some((kind) => kind.test(line));

function continuesList(lines, i) {
  const line = lines[i];
  if (FENCE.test(line) || RULE.test(line)) return false;
  if (ITEM.test(line)) return true;
  if (line.trim()) return /^\s{2,}/.test(line) || lines[i - 1].trim() !== '';
  return i + 1 < lines.length && ITEM.test(lines[i + 1]);
}

function rendered({ kind, lines }) {
  if (kind === 'code') return code(lines);
  if (kind === 'rule') return node('hr');
  if (kind === 'list') return list(lines);
  const text = lines.join('\n');
  if (kind === 'heading') {
    // Not a heading of the page, whose outline is its own.
    return node('p.heading', {}, ...inline(text.match(HEADING)[1]));
  }
  if (kind === 'quote') {
    const inner = lines.map((line) => line.replace(QUOTE, '')).join('\n');
    return node('blockquote', {}, ...inline(inner));
  }
  return node('p', {}, ...inline(text));
}

function code(lines) {
  const [, mark, rest] = lines[0].match(FENCE);
  const language = rest.trim().split(/\s/)[0].slice(0, 24);
  const isClosed = lines.length > 1 && closes(lines.at(-1), mark);
  const text = lines.slice(1, isClosed ? -1 : undefined).join('\n');
  const copy = node('button', {
    type: 'button',
    'aria-label': `Copy the ${language || 'code'} block`,
    click: () => copied(copy, text),
  }, 'Copy');
  // Keyboard users scroll a long line with the arrow keys.
  const body = node('pre', { tabindex: '0' }, node('code', {}, text));
  return node('figure.code', {},
    node('figcaption', {}, node('span', {}, language || 'code'), copy), body);
}

/** Copies a text, and says so on the button for a moment. */
export async function copied(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = 'Copied';
  } catch {
    // A browser allows it only on https and localhost.
    button.textContent = 'Not allowed here';
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}

function list(lines) {
  const open = []; // lists that are open, outermost first
  let top = null;
  let item = null;
  for (const line of lines) {
    const found = line.match(ITEM);
    if (!found) {
      if (line.trim()) item.append('\n', ...inline(line.trim()));
      continue;
    }
    const indent = found[1].replaceAll('\t', '    ').length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    if (!open.length || (indent > open.at(-1).indent + 1 && open.length < 9)) {
      const isNumbered = /\d/.test(found[2]);
      const made = isNumbered
        ? node('ol', { start: String(Number.parseInt(found[2], 10)) })
        : node('ul');
      if (item) item.append(made);
      else top = made;
      open.push({ indent, made });
    }
    item = node('li', {}, ...inline(found[3]));
    open.at(-1).made.append(item);
  }
  return top;
}

const MARKS = [['`', 'code'], ['**', 'strong'], ['__', 'strong'], ['*', 'em']];

/** Returns the nodes of a text with code, bold and emphasis. */
export function inline(text, depth = 0) {
  const nodes = [];
  const missing = new Set(); // marks that do not occur again: look once
  let plain = '';
  for (let i = 0; i < text.length; ) {
    const [mark, tag] = markAt(text, i);
    const end = mark && !missing.has(mark) ? closing(text, i, mark) : null;
    if (end === -1) missing.add(mark);
    if (end === null || end < 0) {
      const step = mark?.length ?? 1;
      plain += text.slice(i, i + step);
      i += step;
      continue;
    }
    if (plain) nodes.push(plain);
    plain = '';
    const inner = text.slice(i + mark.length, end);
    const isText = tag === 'code' || depth > 3;
    nodes.push(
      node(tag, {}, ...(isText ? [inner] : inline(inner, depth + 1))));
    i = end + mark.length;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

const MARK_START = new Set(['`', '*', '_']);

function markAt(text, i) {
  if (!MARK_START.has(text[i])) return [null, null];
  return MARKS.find(([mark]) => text.startsWith(mark, i)) ?? [null, null];
}

/** Returns where a mark is closed; -1 if nowhere, null if it opens nothing. */
function closing(text, start, mark) {
  const first = start + mark.length;
  if (mark !== '`') {
    // '2 * 3 * 4' and snake__case__names are no emphasis.
    const isInWord = mark[0] === '_' && /\w/.test(text[start - 1] ?? ' ');
    if (isInWord || !/\S/.test(text[first] ?? ' ')) return null;
  }
  const end = text.indexOf(mark, first + 1);
  if (end < 0 || mark === '`') return end;
  return /\S/.test(text[end - 1]) ? end : null;
}
