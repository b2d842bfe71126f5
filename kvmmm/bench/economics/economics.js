// The page of first touches and exits: two filters, and the pictures drawn from them.

const state = { access: "", ways: new Set() };
const figuresByKey = new Map(DATA.figures.map((one) => [figureKey(one), one]));
let fillTable = null;

function figureKey({ part, of, access, b, name }) {
  return [part, of, access, b, name].join("|");
}

function figure(part, of, access, b, name) {
  return figuresByKey.get(figureKey({ part, of, access, b, name })) || null;
}

const windowAxes = { x: "window: bytes that a fault maps", xText: bytesText, said: nsText, yText: nsText };
const pagesText = (value) => `${digits(value)} ${digits(value) === "1.00" ? "page" : "pages"}`;
const percentText = (value) => `${digits(value * 100)} %`;
const evenAxes = {
  ...windowAxes, said: pagesText, yText: String, one: true, untold: "not told apart from 1",
  above: "↑ so many touched pages pay it", below: "↓ always pays",
};
const shareAxes = {
  ...windowAxes, said: percentText, yText: percentText, one: true, untold: "not told apart from 100 %",
  above: "↑ never pays", below: "↓ pays where more are touched",
};
const slotAxes = { ...windowAxes, x: "memslots in the VM", xText: (n) => n.toLocaleString("en") };

// Lines of ways that are shown; `lines` are [name, index, figure's name] of each way.
function wayLines(lines) {
  return DATA.ways.flatMap(({ key, name }, way) => lines.map(([suffix, offset, figureName]) => ({
    name: name + suffix, index: way + offset,
    points: state.ways.has(key) ? DATA.windows.map((b) => figure("faults", key, state.access, b, figureName))
      .filter(Boolean).map((one) => [one.b, one.v[0], one.v[1], one.v[2]]) : [],
  })));
}

function comparisonLines(question) {
  return DATA.ways.map(({ key, name }, index) => ({
    name, index,
    points: !state.ways.has(key) ? [] : DATA.comparisons
      .filter((one) => one.q === question && one.of === key && one.access === state.access && one.ref === 1)
      .map((one) => [one.b, one.v[0], one.v[1], one.v[2], one.told || null, one.floor]),
  }));
}

function slotLines() {
  const names = [["fault", "one fault"], ["map", "mapped beforehand"]];
  return names.flatMap(([figureName, text], i) => DATA.count_windows.map((b, k) => ({
    name: `${text}, window of ${bytesText(b)}`, index: 2 * i + k,
    points: DATA.counts.map((n) => [n, figure("memslots", String(n), "write", b, figureName)])
      .filter(([, one]) => one).map(([n, one]) => [n, one.v[0], one.v[1], one.v[2]]),
  })));
}

function draw(id, series, axes, title) {
  drawLines(byId(`${id}-chart`), series, { marks: [], readout: byId(`${id}-readout`), title, axes });
  drawLegend(byId(`${id}-legend`), series);
  const caption = byId(`${id}-caption`);
  if (caption) caption.textContent = `${state.access}s, ring 3, 4 KiB pages, frames resident`;
}

function redraw() {
  draw("page", wayLines([["", 0, "page"], ["; mapped beforehand", 3, "beforehand"]]), windowAxes,
    "Cost of a page against the window");
  draw("fault", wayLines([["", 0, "fault"]]), windowAxes, "Cost of one fault against the window");
  draw("even", comparisonLines("break-even"), evenAxes, "Touched pages that pay for a window");
  draw("share", comparisonLines("share"), shareAxes, "Share of windows from which mapping beforehand pays");
  drawTable();
}

function drawExits() {
  const bars = DATA.exits.map(({ key, name }) => {
    const whole = figure("exits", key, "exit", 1, "exit");
    const loop = figure("exits", key, "exit", 1, "floor");
    if (!whole) return null;
    const [total, low, high] = whole.v;
    const parts = loop ? [["loop", Math.min(loop.v[0], total)], ["ours", total - loop.v[0]]] : [["loop", total]];
    return { name, parts, total, low, high };
  }).filter(Boolean);
  drawBars(byId("exits-chart"), bars);
}

function drawTable() {
  const chosen = byId("figure").value;
  fillTable(DATA.figures.filter((one) => !chosen || one.name === chosen));
}

function tableColumns() {
  return [
    { name: "of", text: (one) => DATA.names[one.part][one.of] || one.of },
    { name: "figure", text: (one) => DATA.figure_names[one.name] },
    { name: "access", text: (one) => (one.part === "exits" ? "–" : one.access) },
    { name: "window", text: (one) => (one.part === "exits" ? "–" : bytesText(one.b)), sort: (one) => one.b, number: true },
    { name: "cost", text: (one) => nsText(one.v[0]), sort: (one) => one.v[0], number: true },
    { name: "95 % interval", text: (one) => `[${nsText(one.v[1])}, ${nsText(one.v[2])}]`, sort: (one) => one.v[1], number: true },
    { name: "A/A noise", text: (one) => (one.floor === null ? "–" : `${digits(100 * one.floor)} %`),
      sort: (one) => (one.floor === null ? Infinity : one.floor), number: true },
    { name: "rounds", text: (one) => String(one.rounds), sort: (one) => one.rounds, number: true },
  ];
}

function wireControls() {
  const access = byId("access");
  const accesses = ["write", "read"].filter((one) => DATA.figures.some((f) => f.part === "faults" && f.access === one));
  access.append(...accesses.map((one) => h("option", { value: one }, `${one}s`)));
  state.access = accesses[0] || "write";
  access.addEventListener("change", () => { state.access = access.value; redraw(); });
  for (const { key, name } of DATA.ways) {
    state.ways.add(key);
    const box = h("input", { type: "checkbox", id: `way-${key}`, checked: true });
    box.addEventListener("change", () => {
      if (box.checked) state.ways.add(key);
      else state.ways.delete(key);
      redraw();
    });
    byId("ways").append(h("label", { for: box.id }, box, ` ${name}`));
  }
  const names = Object.keys(DATA.figure_names).filter((name) => DATA.figures.some((one) => one.name === name));
  byId("figure").append(h("option", { value: "" }, "all figures"),
    ...names.map((name) => h("option", { value: name }, DATA.figure_names[name])));
  byId("figure").addEventListener("change", drawTable);
}

// What was not measured is not there, rather than empty.
function hideWhatIsNot() {
  const has = (part) => DATA.figures.some((one) => one.part === part);
  byId("windows").hidden = !has("faults");
  byId("slots").hidden = !has("memslots");
  byId("exits").hidden = !has("exits");
}

wireTheme();
if (DATA.figures.length) {
  hideWhatIsNot();
  wireControls();
  fillTable = sortedTable(byId("cells"), tableColumns());
  redraw();
  draw("slots", slotLines(), slotAxes, "Cost of a fault against memslots that are there");
  drawExits();
} else {
  byId("pictures").replaceChildren(h("p", { class: "empty" }, "The run holds no figures."));
}
document.documentElement.dataset.ready = "yes";
