// The filters: one value of each dimension, and always a combination that was measured.

// DATA.dims: [{key, label, names}]; a cell's `d` holds one index a dimension.
const state = { d: [], bytes: 4096, pairs: new Set(), heat: "mirror", overlay: "", all: false };
const selects = [];

function wireFilters(holder, status, redraw) {
  DATA.dims.forEach((dim, i) => {
    const options = dim.names.map((name, value) => h("option", { value }, name));
    const select = h("select", { id: `filter-${dim.key}` }, ...options);
    select.addEventListener("change", () => {
      choose(i, Number(select.value), status);
      redraw();
    });
    selects.push(select);
    holder.append(h("label", { for: select.id }, h("span", {}, dim.label), select));
  });
  state.d = startCombination();
  showFilters();
}

function combinations() {
  const seen = new Map();
  for (const cell of DATA.cells) seen.set(cell.d.join(), (seen.get(cell.d.join()) || 0) + 1);
  return [...seen].map(([key, sizes]) => ({ d: key.split(",").map(Number), sizes }));
}

// Whether two combinations belong to one map: they differ in layout and residency at most.
function sameMap(a, b) {
  return DATA.dims.every(({ key }, i) => a[i] === b[i] || key === "layout" || key === "residency");
}

// The one that the address names; else one whose map holds the most cells, at most sizes; of these the first.
function startCombination() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const wanted = DATA.dims.map((dim) => dim.names.indexOf(hash.get(dim.key)));
  const all = combinations();
  const same = all.find(({ d }) => d.every((value, i) => value === wanted[i]));
  if (same) return same.d;
  for (const one of all) {
    one.map = all.reduce((n, other) => n + (sameMap(one.d, other.d) ? other.sizes : 0), 0);
  }
  const inOrder = (a, b) => a.d.map((value, i) => value - b.d[i]).find(Boolean) || 0;
  all.sort((a, b) => b.map - a.map || b.sizes - a.sizes || inOrder(a, b));
  return all[0].d.slice();
}

// Set one dimension; where that was not measured with the others, move the fewest of these.
function choose(i, value, status) {
  const before = state.d;
  const near = (d) => d.filter((other, k) => other === before[k]).length;
  const fitting = combinations().filter(({ d }) => d[i] === value);
  state.d = fitting.reduce((best, one) => (near(one.d) > near(best.d) ? one : best)).d.slice();
  const moved = DATA.dims.filter((_, k) => k !== i && state.d[k] !== before[k]);
  status.textContent = moved.length
    ? `${moved.map((dim) => `${dim.label} set to ${dim.names[state.d[DATA.dims.indexOf(dim)]]}`).join(", ")}: `
      + "the rest was not measured together."
    : "";
  showFilters();
}

// Options that would move another filter say so.
function showFilters() {
  const measured = new Set(combinations().map(({ d }) => d.join()));
  selects.forEach((select, i) => {
    select.value = state.d[i];
    [...select.options].forEach((option, value) => {
      const d = state.d.slice();
      d[i] = value;
      const name = DATA.dims[i].names[value];
      option.textContent = measured.has(d.join()) ? name : `${name} (moves other filters)`;
    });
  });
  try {
    const hash = new URLSearchParams(DATA.dims.map((dim, i) => [dim.key, dim.names[state.d[i]]]));
    history.replaceState(null, "", `#${hash}`);
  } catch (error) {
    if (error.name !== "SecurityError") throw error;  // some browsers refuse it for files
  }
}

function stateText() {
  return DATA.dims.map((dim, i) => `${dim.label.toLowerCase()} ${dim.names[state.d[i]]}`).join(", ");
}

function dimIndex(key) {
  return DATA.dims.findIndex((dim) => dim.key === key);
}
