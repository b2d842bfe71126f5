// The page of one run: state from the filters, and the four pictures drawn from it.

const cellsByKey = new Map(DATA.cells.map((cell) => [`${cell.d.join()}|${cell.b}`, cell]));
const sizes = [...new Set(DATA.cells.map((cell) => cell.b))].sort((a, b) => a - b);
let fillTable = null;

function cellAt(d, bytes) {
  return cellsByKey.get(`${d.join()}|${bytes}`) || null;
}

function withDim(key, value) {
  const d = state.d.slice();
  d[dimIndex(key)] = value;
  return d;
}

// One line: all sizes of a combination, for one pair.
function pointsOf(d, pair) {
  return sizes.map((bytes) => [bytes, cellAt(d, bytes)])
    .filter(([, cell]) => cell && cell.v[pair])
    .map(([bytes, cell]) => [bytes, ...cell.v[pair]]);
}

function seriesNow() {
  if (state.overlay) {
    const dim = DATA.dims[dimIndex(state.overlay)];
    const pair = DATA.pairs.find((one) => state.pairs.has(one)) || DATA.pairs[0];
    return dim.names.map((name, value) => ({
      name: `${DATA.pair_names[pair]}, ${name}`, index: value, points: pointsOf(withDim(state.overlay, value), pair),
    }));
  }
  return DATA.pairs.map((pair, index) => ({
    name: `${DATA.pair_names[pair]} ÷ ${DATA.pair_names.internal}`, index,
    points: state.pairs.has(pair) ? pointsOf(state.d, pair) : [],
  }));
}

function drawRatio() {
  const series = seriesNow();
  byId("ratio-caption").textContent = stateText();
  drawLines(byId("ratio-chart"), series, {
    marks: DATA.marks, readout: byId("ratio-readout"),
    title: `Time ratio against size, ${stateText()}`,
  });
  drawLegend(byId("ratio-legend"), series);
  const lines = DATA.curves.filter((curve) => state.pairs.has(curve.pair) && curve.d.join() === state.d.join());
  byId("ratio-verdict").replaceChildren(...lines.map(
    (curve) => h("li", {}, `${DATA.pair_names[curve.pair]} ÷ ${DATA.pair_names.internal}: ${curve.text}`)));
}

// Sizes that the map has with these filters. The slider goes over them, and keeps the nearest.
function showSizes() {
  const here = sizes.filter((bytes) => DATA.cells.some((cell) => cell.b === bytes && sameMap(cell.d, state.d)));
  const away = here.map((bytes) => Math.abs(Math.log(bytes / state.bytes)));
  const size = byId("size");
  size.max = here.length - 1;
  size.value = away.indexOf(Math.min(...away));
  size.oninput = () => {
    state.bytes = here[Number(size.value)];
    drawMap(state.bytes);
    drawCold(state.bytes);
  };
  return here[Number(size.value)];
}

function drawMap(bytes) {
  byId("size-text").textContent = bytesText(bytes);
  byId("size").setAttribute("aria-valuetext", bytesText(bytes));
  byId("heat-caption").textContent = `${stateText()}; ${bytesText(bytes)}`;
  const all = (key) => DATA.dims[dimIndex(key)].names.map((name, index) => ({ name, index }));
  const at = (layout, residency) => {
    const d = withDim("layout", layout);
    d[dimIndex("residency")] = residency;
    return d;
  };
  drawHeat(byId("heat-chart"), {
    rows: all("layout"), columns: all("residency"), numerator: state.heat,
    lookup: (layout, residency) => {
      const cell = cellAt(at(layout, residency), bytes);
      return (cell && cell.v[state.heat]) || null;
    },
    chosen: (layout, residency) => at(layout, residency).join() === state.d.join(),
    choose: (layout, residency) => {
      state.d = at(layout, residency);
      byId("filter-status").textContent = "";
      showFilters();
      redraw();
      const again = byId("heat-chart").querySelector("button[aria-pressed=true]");
      if (again) again.focus();
    },
  });
}

function drawCold(bytes) {
  const residencies = DATA.dims[dimIndex("residency")];
  byId("cold-caption").textContent = `${stateText()}; ${bytesText(bytes)}; medians`;
  const bars = [];
  for (const variant of ["internal", ...DATA.mechanisms]) {
    residencies.names.forEach((name, value) => {
      const cell = cellAt(withDim("residency", value), bytes);
      // What a variant does not go through cannot be cold for it.
      if (residencies.keys[value] === (variant === "mirror" ? "linear-cold" : "mirror-cold")) return;
      const parts = cell && cell.parts[variant];
      if (parts) bars.push({ name: `${DATA.pair_names[variant]}, ${name}`, parts, total: cell.ns[variant] });
    });
  }
  drawBars(byId("cold-chart"), bars);
}

function drawTable() {
  const rows = [];
  for (const cell of DATA.cells) {
    if (!state.all && cell.d.join() !== state.d.join()) continue;
    for (const pair of DATA.pairs) {
      if (state.pairs.has(pair) && cell.v[pair]) rows.push({ cell, pair, verdict: cell.v[pair] });
    }
  }
  fillTable(rows);
}

function redraw() {
  const bytes = showSizes();
  drawRatio();
  drawMap(bytes);
  drawCold(bytes);
  drawTable();
}

function tableColumns() {
  const dims = DATA.dims.map((dim, i) => ({
    name: dim.label.toLowerCase(), text: ({ cell }) => dim.names[cell.d[i]], sort: ({ cell }) => cell.d[i],
  }));
  return [
    { name: "bytes", text: ({ cell }) => bytesText(cell.b), sort: ({ cell }) => cell.b, number: true },
    ...(state.all ? dims : []),  // the filters say them
    { name: "pair", text: ({ pair }) => `${DATA.pair_names[pair]} ÷ ${DATA.pair_names.internal}` },
    { name: "ratio", text: ({ verdict }) => digits(verdict[0]), sort: ({ verdict }) => verdict[0], number: true },
    { name: "95 % interval", text: ({ verdict }) => intervalText(verdict[1], verdict[2]),
      sort: ({ verdict }) => verdict[1], number: true },
    { name: "verdict", text: ({ verdict, pair }) => verdictText(verdict, DATA.pair_names[pair]) },
    { name: "time", text: ({ cell, pair }) => nsText(cell.ns[pair]), sort: ({ cell, pair }) => cell.ns[pair], number: true },
    { name: "internal", text: ({ cell }) => nsText(cell.ns.internal), sort: ({ cell }) => cell.ns.internal, number: true },
  ];
}

function wireControls() {
  state.pairs = new Set(DATA.pairs.filter((pair) => DATA.mechanisms.includes(pair)));
  if (!state.pairs.size) state.pairs = new Set(DATA.pairs);
  state.heat = [...state.pairs][0];
  byId("pairs").append(...DATA.pairs.map((pair) => {
    const box = h("input", { type: "checkbox", id: `pair-${pair}`, checked: state.pairs.has(pair) });
    box.addEventListener("change", () => {
      if (box.checked) state.pairs.add(pair);
      else state.pairs.delete(pair);
      redraw();
    });
    return h("label", { for: box.id }, box, ` ${DATA.pair_names[pair]}`);
  }));
  const overlay = byId("overlay");
  overlay.append(...DATA.dims.map((dim) => h("option", { value: dim.key }, `every ${dim.label.toLowerCase()}`)));
  overlay.addEventListener("change", () => { state.overlay = overlay.value; redraw(); });
  const heat = byId("heat-pair");
  heat.append(...DATA.pairs.map((pair) => h("option", { value: pair }, DATA.pair_names[pair])));
  heat.value = state.heat;
  heat.addEventListener("change", () => { state.heat = heat.value; redraw(); });
  byId("all-cells").addEventListener("change", (event) => {
    state.all = event.target.checked;
    fillTable = sortedTable(byId("cells"), tableColumns());
    drawTable();
  });
}

wireTheme();
if (DATA.cells.length) {
  wireFilters(byId("filters"), byId("filter-status"), redraw);
  wireControls();
  fillTable = sortedTable(byId("cells"), tableColumns());
  redraw();
} else {
  byId("pictures").replaceChildren(h("p", { class: "empty" }, "The run holds no cells."));
}
for (const id of ["h-curves", "h-thresholds"]) {
  for (const table of byId(id).parentElement.querySelectorAll("table")) shortenTable(table, 30);
}
document.documentElement.dataset.ready = "yes";
