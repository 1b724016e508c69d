// Light or dark: as the system, or as the user chooses.

import { byId } from './dom.js';

const STORE = 'two-lives-theme';
const NAMES = { auto: 'Auto', light: 'Light', dark: 'Dark' };

/** Applies the choice that was kept, and listens to the button. */
export function start() {
  apply(localStorage.getItem(STORE) ?? 'auto');
  byId('theme').addEventListener('click', () => {
    const kinds = Object.keys(NAMES);
    const now = document.documentElement.dataset.theme;
    apply(kinds[(kinds.indexOf(now) + 1) % kinds.length]);
  });
}

function apply(kind) {
  const known = kind in NAMES ? kind : 'auto';
  document.documentElement.dataset.theme = known;
  localStorage.setItem(STORE, known);
  const button = byId('theme');
  button.textContent = NAMES[known];
  button.setAttribute(
    'aria-label',
    `Theme: ${known === 'auto' ? 'as the system' : known}; change`,
  );
}
