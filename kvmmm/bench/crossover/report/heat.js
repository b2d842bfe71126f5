// Winner and margin, layout by residency: a table of buttons, coloured, with the same said in text.

// lookup(layout, residency) -> {verdict: [ratio, low, high, winner], cell} or null.
function drawHeat(holder, { rows, columns, numerator, lookup, choose, chosen }) {
  const head = h("tr", {}, h("th", { scope: "col" }, "layout"),
    ...columns.map((column) => h("th", { scope: "col" }, column.name)));
  const body = rows.map((row) => h(
    "tr", {}, h("th", { scope: "row" }, row.name),
    ...columns.map((column) => {
      const verdict = lookup(row.index, column.index);
      if (!verdict) return h("td", { class: "none" }, "–");
      return heatCell(verdict, numerator, {
        label: `${row.name}, ${column.name}`,
        pressed: chosen(row.index, column.index),
        onclick: () => choose(row.index, column.index),
      });
    }),
  ));
  holder.replaceChildren(h("table", { class: "heat" }, h("thead", {}, head), h("tbody", {}, ...body)));
}

function heatCell(verdict, numerator, { label, pressed, onclick }) {
  const [ratio, low, high, winner] = verdict;
  const button = h(
    "button",
    {
      type: "button", onclick, class: winner === null ? "same" : ratio < 1 ? "asio" : "internal",
      "aria-pressed": String(pressed),
      "aria-label": `${label}: ${verdictText(verdict, numerator)}, ratio ${digits(ratio)} ${intervalText(low, high)}`,
    },
    h("b", {}, winner === null ? "≈" : DATA.pair_names[winner] || winner),
    h("span", {}, winner === null ? digits(ratio) : `${digits(ratio < 1 ? 1 / ratio : ratio)}×`),
    h("small", {}, intervalText(low, high)),
  );
  // Five steps: 0 no difference, 4 from eight times on.
  const step = winner === null ? 0 : Math.min(4, 1 + Math.floor(Math.abs(Math.log2(ratio))));
  button.dataset.step = step;
  return h("td", {}, button);
}
