// What every part of the page stands on: elements, numbers as text, scales, the theme.

const SVG = "http://www.w3.org/2000/svg";

// An HTML element: h("p", {class: "note", onclick: f}, "text", child, ...).
function h(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

// The same for SVG.
function s(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

// ---- numbers as text ----

function bytesText(n) {
  if (n >= 1 << 20) return `${+(n / (1 << 20)).toPrecision(3)} MiB`;
  if (n >= 1024) return `${+(n / 1024).toPrecision(3)} KiB`;
  return `${Math.round(n)} B`;
}

function digits(x) {
  if (x >= 100) return String(Math.round(x));
  if (x < 0.1) return String(Number(x.toPrecision(2)));
  return x >= 10 ? x.toFixed(1) : x.toFixed(x >= 1 ? 2 : 3);
}

function nsText(ns) {
  if (ns === null || ns === undefined) return "–";
  if (Math.abs(ns) >= 1e6) return `${(ns / 1e6).toPrecision(3)} ms`;
  if (Math.abs(ns) >= 1e3) return `${(ns / 1e3).toPrecision(3)} µs`;
  return `${ns.toPrecision(3)} ns`;
}

function intervalText(low, high) {
  return `[${digits(low)}, ${digits(high)}]`;
}

// Who is faster and by how much, in words: [ratio, low, high, winner].
function verdictText([ratio, , , winner], numerator) {
  if (winner === null) return "no difference claimed";
  const factor = ratio < 1 ? 1 / ratio : ratio;
  return `${DATA.pair_names[winner] || numerator} ${digits(factor)}× faster`;
}

// ---- scales ----

function logScale(from, to, low, high) {
  const a = Math.log(from);
  const b = Math.log(to) - a || 1;
  return (value) => low + ((Math.log(value) - a) / b) * (high - low);
}

// 1, 2, 5, 10, ... inside [from, to]; powers of ten alone where these would crowd; even steps where they
// would be too few.
function logTicks(from, to) {
  if (to / from < 5) {
    const least = (to - from) / 9;
    const power = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].find((one) => one * power >= least) * power;
    const n = Math.floor(to / step) - Math.ceil(from / step) + 1;
    return Array.from({ length: n }, (_, i) => +((Math.ceil(from / step) + i) * step).toPrecision(6));
  }
  const steps = Math.log10(to / from) > 2.5 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let e = Math.floor(Math.log10(from)); e <= Math.ceil(Math.log10(to)); e++) {
    for (const step of steps) {
      const value = Number(`${step}e${e}`);
      if (value >= from * 0.999 && value <= to * 1.001) ticks.push(value);
    }
  }
  return ticks;
}

// Powers of two, at most about ten of them.
function byteTicks(from, to) {
  const low = Math.ceil(Math.log2(from));
  const high = Math.floor(Math.log2(to));
  const step = Math.max(1, Math.round((high - low) / 9));
  const ticks = [];
  for (let e = low; e <= high; e += step) ticks.push(2 ** e);
  return ticks;
}

// ---- the theme: the system's, until the reader says otherwise ----

function wireTheme() {
  const select = byId("theme");
  select.addEventListener("change", () => {
    if (select.value === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = select.value;
  });
}
