// Light or dark: as the system, or as the user chooses.

import { byId } from './dom.js';

const STORE = 'two-lives-theme';
const KINDS = ['auto', 'light', 'dark'];

/** Applies the choice that was kept, and listens to the button. */
export function start() {
  apply(localStorage.getItem(STORE) ?? 'auto');
  byId('theme').addEventListener('click', () => {
    const now = document.documentElement.dataset.theme;
    apply(KINDS[(KINDS.indexOf(now) + 1) % KINDS.length]);
  });
}

function apply(kind) {
  const known = KINDS.includes(kind) ? kind : 'auto';
  document.documentElement.dataset.theme = known;
  localStorage.setItem(STORE, known);
  const button = byId('theme');
  button.textContent = `Theme: ${known}`;
}
