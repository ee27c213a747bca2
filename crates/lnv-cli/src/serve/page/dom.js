// Makes elements. Text goes in as text: nothing on this page ever parses HTML at run time.

/** An element with properties and children; a property that the element lacks becomes an attribute. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value == null) continue;
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** One of the symbols of index.html. */
export function icon(name) {
  const space = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(space, 'svg');
  svg.setAttribute('aria-hidden', 'true');
  const use = document.createElementNS(space, 'use');
  use.setAttribute('href', `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon; `label` is for those who do not see it. */
export const iconButton = (name, label, onclick) =>
  el('button', { type: 'button', className: 'icon', ariaLabel: label, title: label, onclick }, icon(name));

/** 83.25 s as 1:23.3. */
export function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const minutes = Math.floor(tenths / 600);
  return `${minutes}:${String(Math.floor((tenths % 600) / 10)).padStart(2, '0')}.${tenths % 10}`;
}

/** A time with as many digits as a person reads. */
export function inSeconds(value) {
  if (value < 0.0995) return `${Math.round(value * 1000)}\u00a0ms`;
  return `${value.toFixed(value < 9.995 ? 2 : 1)}\u00a0s`;
}

/** A count, in the reader's own spelling. */
export const count = (value, one, many = `${one}s`) =>
  `${value.toLocaleString()}\u00a0${value === 1 ? one : many}`;
