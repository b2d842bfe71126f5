// The page of several runs: one line a run, and the cells side by side.

const sizes = [...new Set(DATA.cells.map((cell) => cell.b))].sort((a, b) => a - b);
const cellsByKey = new Map(DATA.cells.map((cell) => [`${cell.d.join()}|${cell.b}`, cell]));
let fillTable = null;

function redraw() {
  const pair = byId("pair").value;
  const series = DATA.runs.map((name, run) => ({
    name, index: run,
    points: sizes.map((bytes) => cellsByKey.get(`${state.d.join()}|${bytes}`))
      .filter((cell) => cell && cell.v[pair] && cell.v[pair][run])
      .map((cell) => [cell.b, ...cell.v[pair][run]]),
  }));
  const said = `${DATA.pair_names[pair]} ÷ ${DATA.pair_names.internal}; ${stateText()}`;
  byId("ratio-caption").textContent = said;
  drawLines(byId("ratio-chart"), series, {
    marks: DATA.marks, readout: byId("ratio-readout"), title: `Time ratio against size, ${said}`,
  });
  drawLegend(byId("ratio-legend"), series);
  drawTable(pair);
}

function drawTable(pair) {
  const everything = byId("all-cells").checked;
  const differing = byId("differing").checked;
  const rows = [];
  for (const cell of DATA.cells) {
    if (!everything && cell.d.join() !== state.d.join()) continue;
    for (const one of everything ? DATA.pairs : [pair]) {
      const differs = cell.differs.includes(one);
      if (cell.v[one] && (differs || !differing)) rows.push({ cell, pair: one, differs });
    }
  }
  fillTable(rows);
}

function tableColumns() {
  const ofRun = (row, run) => row.cell.v[row.pair][run];
  return [
    { name: "bytes", text: ({ cell }) => bytesText(cell.b), sort: ({ cell }) => cell.b, number: true },
    ...DATA.dims.map((dim, i) => ({
      name: dim.label.toLowerCase(), text: ({ cell }) => dim.names[cell.d[i]], sort: ({ cell }) => cell.d[i],
    })),
    { name: "pair", text: ({ pair }) => `${DATA.pair_names[pair]} ÷ ${DATA.pair_names.internal}` },
    ...DATA.runs.map((name, run) => ({
      name, number: true,
      text: (row) => {
        const verdict = ofRun(row, run);
        return verdict ? `${digits(verdict[0])} ${intervalText(verdict[1], verdict[2])}` : "–";
      },
      sort: (row) => (ofRun(row, run) ? ofRun(row, run)[0] : Infinity),
    })),
    { name: "beyond noise", text: ({ differs }) => (differs ? "differs" : "") },
  ];
}

wireTheme();
wireFilters(byId("filters"), byId("filter-status"), redraw);
byId("pair").append(...DATA.pairs.map((pair) => h("option", { value: pair }, DATA.pair_names[pair])));
for (const id of ["pair", "all-cells", "differing"]) byId(id).addEventListener("change", redraw);
fillTable = sortedTable(byId("cells"), tableColumns());
redraw();
document.documentElement.dataset.ready = "yes";
