// What something costs, taken apart: each part is the difference of two medians.

// bars: [{name, parts: [[key, ns]], total, low, high}]; low and high, the total's interval, may be missing.
function drawBars(holder, bars) {
  if (!bars.length) {
    holder.replaceChildren(h("p", { class: "empty" }, "Nothing was measured here."));
    return;
  }
  const width = 900;
  const left = 250;
  const row = 30;
  const height = bars.length * row + 30;
  const most = Math.max(...bars.map((bar) => bar.high || bar.total));
  const scale = (ns) => (Math.max(0, ns) / most) * (width - left - (bars.some((bar) => bar.high) ? 190 : 90));
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img",
    "aria-label": bars.map((bar) => `${bar.name}: ${totalText(bar)}`).join("; ") });
  bars.forEach((bar, i) => {
    const y = 6 + i * row;
    svg.append(s("text", { class: "tick", x: left - 8, y: y + 15, "text-anchor": "end" }, bar.name));
    let x = left;
    for (const [key, ns] of bar.parts) {
      const said = `${DATA.part_names[key]}: ${nsText(ns)}`;
      svg.append(s("rect", { class: `part ${key}`, x, y, height: row - 10, width: Math.max(0.5, scale(ns)) },
        s("title", {}, said)));
      x += scale(ns);
    }
    if (bar.high) {
      const [from, to] = [left + scale(bar.low), left + scale(bar.high)];
      const across = (at) => `M${at} ${y + 5}V${y + row - 15}`;
      svg.append(s("path", { class: "whisker", d: `M${from} ${y + row / 2 - 5}H${to}${across(from)}${across(to)}` }));
      x = Math.max(x, to);
    }
    svg.append(s("text", { class: "tick", x: x + 6, y: y + 15 }, totalText(bar)));
  });
  const keys = Object.keys(DATA.part_names).filter((key) => bars.some((bar) => bar.parts.some(([part]) => part === key)));
  const legend = h("ul", { class: "legend" }, ...keys.map((key) => h(
    "li", {}, s("svg", { viewBox: "0 0 16 14", class: "key swatch", "aria-hidden": "true" },
      s("rect", { class: `part ${key}`, width: 16, height: 14 })), DATA.part_names[key],
  )));
  holder.replaceChildren(svg, legend, partsTable(bars, keys));
}

function totalText(bar) {
  return bar.high ? `${nsText(bar.total)} [${nsText(bar.low)}, ${nsText(bar.high)}]` : nsText(bar.total);
}

function partsTable(bars, keys) {
  const rows = bars.map((bar) => h(
    "tr", {}, h("th", { scope: "row" }, bar.name),
    ...keys.map((key) => {
      const part = bar.parts.find(([name]) => name === key);
      return h("td", {}, part ? (part[1] < 0 ? `${nsText(part[1])} (noise)` : nsText(part[1])) : "");
    }),
    h("td", {}, totalText(bar)),
  ));
  return h("details", {}, h("summary", {}, "the same as numbers"), h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ""),
      ...keys.map((key) => h("th", { scope: "col" }, DATA.part_names[key])),
      h("th", { scope: "col" }, "all"))),
    h("tbody", {}, ...rows)));
}
