// A table that sorts by any column and shows its first rows until asked for more.

const ROWS_AT_FIRST = 200;

// columns: [{name, text: (row) => string, sort: (row) => number | string, number: bool}].
function sortedTable(holder, columns) {
  const state = { rows: [], column: 0, descending: false, limit: ROWS_AT_FIRST };
  const head = h("tr", {});
  const body = h("tbody", {});
  const more = h("button", { type: "button", class: "no-print", onclick: () => { state.limit = Infinity; draw(); } });
  const caption = h("caption", {});
  holder.replaceChildren(h("table", { class: "cells" }, caption, h("thead", {}, head), body), more);

  columns.forEach((column, i) => {
    const button = h("button", { type: "button", onclick: () => {
      state.descending = state.column === i ? !state.descending : false;
      state.column = i;
      draw();
    } }, column.name);
    head.append(h("th", { scope: "col" }, button));
  });

  function draw() {
    const key = columns[state.column].sort || columns[state.column].text;
    const sign = state.descending ? -1 : 1;
    const sorted = state.rows.map((row) => [key(row), row]).sort(
      ([a], [b]) => sign * (a < b ? -1 : a > b ? 1 : 0)).map(([, row]) => row);
    const shown = sorted.slice(0, state.limit);
    body.replaceChildren(...shown.map((row) => h("tr", {}, ...columns.map(
      (column) => h("td", column.number ? { class: "number" } : {}, column.text(row))))));
    [...head.children].forEach((cell, i) => {
      if (i === state.column) cell.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    caption.textContent = `${shown.length} of ${sorted.length} rows`;
    more.hidden = shown.length === sorted.length;
    more.textContent = `show all ${sorted.length} rows`;
  }

  return (rows) => {
    state.rows = rows;
    state.limit = ROWS_AT_FIRST;
    draw();
  };
}

// A table of the page's text: its first rows, and a button for the rest.
function shortenTable(table, most) {
  const rest = [...table.tBodies[0].rows].slice(most);
  if (!rest.length) return;
  for (const row of rest) row.hidden = true;
  const more = h("button", { type: "button", class: "no-print", onclick: () => {
    for (const row of rest) row.hidden = false;
    more.remove();
  } }, `show all ${most + rest.length} rows`);
  table.parentElement.after(more);
}
