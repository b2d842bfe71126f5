// Lines with intervals, both axes logarithmic: ratios against size with the parity band and gVisor's
// thresholds; or whatever other `axes` say.

const BOX = { width: 900, height: 430, left: 62, right: 18, top: 26, bottom: 46 };
const SHAPES = ["circle", "square", "triangle", "diamond", "down", "cross"];
const DASHES = ["", "7 4", "2 4", "10 4 2 4", "4 2", "1 3"];

// What a picture's axes are, and how its values read. `one`: values are ratios, 1 is parity.
const RATIO_AXES = {
  x: "bytes per operation", xText: bytesText, xTicks: byteTicks, said: digits, one: true,
  yText: (value) => `${value}×`, above: "↑ internal mappings faster", below: "↓ address space I/O faster",
  untold: "no difference claimed",
};

// series: [{name, index, points: [[bytes, ratio, low, high, winner, floor], ...]}].
// Colour, shape and dash of a line follow its index, so that a filter does not repaint the others.
// A point whose winner is null is hollow: nothing is claimed.
function drawLines(holder, series, { marks, title, readout, axes: kind = RATIO_AXES }) {
  const drawn = series.filter((one) => one.points.length);
  holder.replaceChildren();
  if (!drawn.length) {
    holder.append(h("p", { class: "empty" }, "Nothing was measured here."));
    readout.textContent = "";
    return;
  }
  const axes = axesOf(drawn, kind);
  const svg = s("svg", {
    viewBox: `0 0 ${BOX.width} ${BOX.height}`, class: "chart", role: "img", tabindex: 0,
    "aria-label": `${title}. Arrow keys read it point by point.`,
  });
  drawFrame(svg, axes, marks);
  for (const one of drawn) drawSeries(svg, one, axes);
  holder.append(svg);
  wireCursor(svg, drawn, axes, readout);
}

function axesOf(series, kind) {
  const points = series.flatMap((one) => one.points);
  const sizes = [...new Set(points.map((point) => point[0]))].sort((a, b) => a - b);
  // At each size the widest floor of what is drawn; where none is known, the band ends.
  const floors = sizes.map((bytes) => Math.max(...points.filter((p) => p[0] === bytes).map((p) => p[5] ?? 0)));
  const parity = kind.one ? [Math.exp(Math.max(...floors, 0.05) * 1.5)] : [];
  const low = Math.min(...parity.map((one) => 1 / one), ...points.map((point) => point[2])) / 1.1;
  const high = Math.max(...parity, ...points.map((point) => point[3])) * 1.1;
  const from = sizes[0] / 1.4;
  const to = sizes[sizes.length - 1] * 1.4;
  return {
    kind, sizes, floors, from, to, low, high,
    x: logScale(from, to, BOX.left, BOX.width - BOX.right),
    y: logScale(low, high, BOX.height - BOX.bottom, BOX.top),
  };
}

function drawFrame(svg, axes, marks) {
  const { kind, x, y, from, to, low, high, sizes } = axes;
  const left = BOX.left;
  const right = BOX.width - BOX.right;
  const bottom = BOX.height - BOX.bottom;
  if (kind.one) svg.append(s("path", { class: "parity", d: parityPath(axes, left, right) }));
  for (const tick of logTicks(low, high)) {
    svg.append(
      s("line", { class: kind.one && tick === 1 ? "one" : "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
      s("text", { class: "tick", x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, kind.yText(tick)),
    );
  }
  for (const tick of kind.xTicks ? kind.xTicks(from, to) : sizes) {
    svg.append(
      s("line", { class: "grid", x1: x(tick), x2: x(tick), y1: BOX.top, y2: bottom }),
      s("text", { class: "tick", x: x(tick), y: bottom + 17, "text-anchor": "middle" }, kind.xText(tick)),
    );
  }
  for (const mark of marks) {
    if (mark.bytes < from || mark.bytes > to) continue;
    const at = x(mark.bytes);
    svg.append(
      s("line", { class: "mark", x1: at, x2: at, y1: BOX.top - 6, y2: bottom }),
      s("text", { class: "mark-name", x: at, y: BOX.top - 10, "text-anchor": "middle" }, mark.name),
    );
  }
  const side = { class: "side", x: right - 4, "text-anchor": "end" };
  svg.append(
    kind.one && y(1) - BOX.top > 30 ? s("text", { ...side, y: BOX.top + 14 }, kind.above) : "",
    kind.one && bottom - y(1) > 30 ? s("text", { ...side, y: bottom - 6 }, kind.below) : "",
    s("text", { class: "axis", x: (left + right) / 2, y: BOX.height - 8, "text-anchor": "middle" }, kind.x),
  );
}

// What the same code, measured twice, differs by: nothing inside may be called a difference.
function parityPath({ sizes, floors, x, y }, left, right) {
  const xs = [left, ...sizes.map(x), right];
  const all = [floors[0], ...floors, floors[floors.length - 1]];
  const edge = (sign) => xs.map((at, i) => `${at.toFixed(1)} ${y(Math.exp(sign * all[i])).toFixed(1)}`);
  return `M${edge(1).join("L")}L${edge(-1).reverse().join("L")}Z`;
}

function drawSeries(svg, one, { x, y }) {
  const group = s("g", { class: `line c${one.index % 6}`, "data-name": one.name });
  const { points } = one;
  const path = (list) => list.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
  const over = points.map((p) => [x(p[0]), y(p[3])]);
  const under = points.map((p) => [x(p[0]), y(p[2])]).reverse();
  if (points.length > 1) group.append(s("path", { class: "spread", d: `${path([...over, ...under])}Z` }));
  group.append(s("path", {
    class: "stroke", d: path(points.map((p) => [x(p[0]), y(p[1])])),
    "stroke-dasharray": DASHES[one.index % DASHES.length],
  }));
  for (const [bytes, ratio, low, high, winner] of points) {
    group.append(
      s("line", { class: "bar", x1: x(bytes), x2: x(bytes), y1: y(low), y2: y(high) }),
      s("path", {
        class: winner === null ? "point open" : "point",
        d: shape(SHAPES[one.index % SHAPES.length], x(bytes), y(ratio), 4.6),
      }),
    );
  }
  svg.append(group);
}

function shape(name, x, y, r) {
  const at = (dx, dy) => `${(x + dx * r).toFixed(1)} ${(y + dy * r).toFixed(1)}`;
  switch (name) {
    case "square": return `M${at(-0.9, -0.9)}L${at(0.9, -0.9)}L${at(0.9, 0.9)}L${at(-0.9, 0.9)}Z`;
    case "triangle": return `M${at(0, -1.2)}L${at(1.1, 0.9)}L${at(-1.1, 0.9)}Z`;
    case "down": return `M${at(0, 1.2)}L${at(1.1, -0.9)}L${at(-1.1, -0.9)}Z`;
    case "diamond": return `M${at(0, -1.3)}L${at(1.3, 0)}L${at(0, 1.3)}L${at(-1.3, 0)}Z`;
    case "cross": return `M${at(-1, -1)}L${at(1, 1)}M${at(-1, 1)}L${at(1, -1)}`;
    default: return `M${at(-1, 0)}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
  }
}

// The pointer and the arrow keys choose a size; what the lines say there stands below as text.
function wireCursor(svg, series, { kind, sizes, x }, readout) {
  const line = s("line", { class: "cursor", y1: BOX.top, y2: BOX.height - BOX.bottom, visibility: "hidden" });
  svg.append(line);
  let index = -1;
  const show = (next) => {
    index = Math.max(0, Math.min(sizes.length - 1, next));
    const bytes = sizes[index];
    line.setAttribute("x1", x(bytes));
    line.setAttribute("x2", x(bytes));
    line.setAttribute("visibility", "visible");
    const parts = series.flatMap((one) => one.points.filter((point) => point[0] === bytes).map(
      ([, value, low, high, winner]) => `${one.name}: ${kind.said(value)} [${kind.said(low)}, ${kind.said(high)}]`
        + (winner === null ? ` (${kind.untold})` : ""),
    ));
    readout.textContent = `${kind.xText(bytes)} — ${parts.join("; ")}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * BOX.width;
    const away = sizes.map((bytes) => Math.abs(x(bytes) - at));
    show(away.indexOf(Math.min(...away)));
  });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) show(index < 0 && step < 0 ? sizes.length - 1 : index + step);
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(sizes.length - 1);
    else return;
    event.preventDefault();
  });
  readout.textContent = "";
}

// A legend in HTML, so that it wraps and prints; each entry shows colour, dash and shape.
function drawLegend(holder, series) {
  holder.replaceChildren(...series.filter((one) => one.points.length).map((one) => h(
    "li", {},
    s("svg", { viewBox: "0 0 40 14", class: `key line c${one.index % 6}`, "aria-hidden": "true" },
      s("path", { class: "stroke", d: "M0 7L40 7", "stroke-dasharray": DASHES[one.index % DASHES.length] }),
      s("path", { class: "point", d: shape(SHAPES[one.index % SHAPES.length], 20, 7, 4.6) })),
    one.name,
  )));
}
