// DOM nodes from values. Text becomes text nodes only, never HTML: text of a
// model cannot become an element or an attribute.

/**
 * Returns a new element.
 *
 * @param {string} tag its name, with classes after dots: 'p.small.hint'
 * @param {Object} attributes a function is an event listener, true an empty
 *   attribute; null and false are left out
 * @param {...(Node|string|null)} children strings become text
 */
export function node(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split('.');
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(' ');
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === 'function') made.addEventListener(key, value);
    else if (value === true) made.setAttribute(key, '');
    else if (value !== null && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Returns the element of an id. */
export const byId = (id) => document.getElementById(id);

const SUFFIXES = ['', 'k', 'M', 'G', 'T', 'P', 'E'];

/** Returns a number with a prefix for a unit: '1.2 T' of FLOP. */
export function short(value) {
  let power = 0;
  while (Math.abs(value) >= 1000 && power < SUFFIXES.length - 1) {
    value /= 1000;
    power += 1;
  }
  const digits = power && value < 100 ? 1 : 0;
  return `${value.toFixed(digits)} ${SUFFIXES[power]}`;
}

/** Returns a whole number with separators of thousands. */
export const whole = (value) => Math.round(value).toLocaleString('en');
