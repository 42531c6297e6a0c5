const MARKS = [  // one per run, so that runs differ by more than their colour
  "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0", "M-3,-3h6v6h-6z", "M0,-4l4,7h-8z",
  "M0,-4.5l4,4.5l-4,4.5l-4,-4.5z", "M0,4l4,-7h-8z",
];
const PANELS = {
  kept_share: "Tokens kept by the mask", zero_advantage_share: "Nodes with zero advantage",
  reward_mean: "Mean reward", entropy: "Entropy", clipfrac: "Clipped tokens",
  grad_norm: "Gradient norm",
};
const SHARES = new Set(["kept_share", "zero_advantage_share", "clipfrac"]);
const KEYS = ["iteration", "seconds", "generated_tokens"];
const runColour = (i) => `var(--run${i % 6})`;
const charts = [];
const hiddenParts = new Set();  // "greedy", "sampled", other parts and indices of runs

function niceTicks(low, high, count) {
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 2.5, 5, 10].find((m) => m * size >= raw * 0.999);
  const ticks = [];
  const last = Math.floor(high / step + 1e-9);
  for (let i = Math.ceil(low / step - 1e-9); i <= last; i++) ticks.push(i * step);
  return ticks;
}

// Seconds tick at whole minutes or hours.
function timeTicks(low, high, count) {
  const unit = high >= 5400 ? 3600 : high >= 90 ? 60 : 1;
  return niceTicks(low / unit, high / unit, count).map((t) => t * unit);
}

function makeSeries(stage, key, xKey, part) {
  return data.runs.map((run, i) => {
    const columns = run[stage], points = [];
    (columns[key] || []).forEach((y, row) => {
      const x = columns[xKey][row], e = (columns[key + "_stderr"] || [])[row];
      if (isNumber(x) && isNumber(y)) points.push({ x, y, e: isNumber(e) ? e : 0 });
    });
    return { run: i, part, points: points.sort((a, b) => a.x - b.x) };
  }).filter((s) => s.points.length);
}

function addChart(host, spec) {
  const figure = el("figure", {}, el("figcaption", {}, el("b", {}, spec.title), " " + spec.note));
  host.append(figure);
  const chart = { ...spec, figure, cursor: null };
  chart.plot = svg("svg", { tabindex: 0, role: "img" });
  figure.append(chart.plot);
  chart.plot.addEventListener("pointermove", (event) => {
    const x = event.clientX - chart.plot.getBoundingClientRect().left;
    point(chart, nearest(chart.xs, chart.unscale(x)), event.clientY);
  });
  chart.plot.addEventListener("pointerleave", () => point(chart, null));
  chart.plot.addEventListener("blur", () => point(chart, null));
  chart.plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !chart.xs.length) return;
    event.preventDefault();
    const before = step > 0 ? -1 : chart.xs.length;
    const at = chart.cursor === null ? before : chart.xs.indexOf(chart.cursor);
    point(chart, chart.xs[Math.max(0, Math.min(chart.xs.length - 1, at + step))]);
  });
  charts.push(chart);
  draw(chart);
}

const nearest = (xs, x) =>
  xs.reduce((best, c) => (best === null || Math.abs(c - x) < Math.abs(best - x) ? c : best), null);

function draw(chart) {
  const width = chart.figure.clientWidth, height = chart.height;
  if (!width) return;
  const visible = chart.series.filter((s) => !hiddenParts.has(s.run) && !hiddenParts.has(s.part));
  const points = visible.flatMap((s) => s.points);
  chart.visible = visible;
  chart.xs = [...new Set(points.map((p) => p.x))].sort((a, b) => a - b);
  let [low, high] = points.reduce(([l, h], p) => [Math.min(l, p.y - p.e), Math.max(h, p.y + p.e)],
    [Infinity, -Infinity]);
  if (!points.length) [low, high] = [0, 1];
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  [low, high] = [low < 0 ? low - pad : Math.max(0, low - pad), high + pad];
  const yTicks = niceTicks(low, high, height > 200 ? 5 : 3).map((y) => [y, chart.yTick(y)]);
  const left = 14 + 7 * Math.max(...yTicks.map(([, text]) => text.length));
  const box = { left, right: width - 12, top: 8, bottom: height - 24 };
  const first = chart.xs[0] ?? 0, last = chart.xs.length > 1 ? chart.xs.at(-1) : first + 1;
  const sx = (x) => box.left + ((x - first) / (last - first)) * (box.right - box.left);
  const sy = (y) => box.bottom - ((y - low) / (high - low)) * (box.bottom - box.top);
  chart.unscale = (px) => first + ((px - box.left) / (box.right - box.left)) * (last - first);
  Object.assign(chart, { sx, sy, box });
  chart.plot.replaceChildren();
  chart.plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const ends = (s) => [s.points[0], s.points.at(-1)].map((p) => chart.yFormat(p.y)).join(" to ");
  chart.plot.setAttribute("aria-label", `${chart.title} ${chart.note}. ` +
    visible.map((s) => `${label(s)}: ${ends(s)}`).join("; "));
  for (const [y, text] of yTicks) {
    const [x1, x2, y1] = [box.left, box.right, sy(y)];
    chart.plot.append(svg("line", { class: "grid", x1, x2, y1, y2: y1 }),
      svg("text", { class: "tick", x: box.left - 6, y: sy(y) + 4, "text-anchor": "end" }, text));
  }
  const xTicks = chart.xs.length === 1 ? [first]
    : (chart.xTicks || niceTicks)(first, last, Math.max(2, width / 110));
  for (const x of xTicks) {
    const anchor = sx(x) > box.right - 20 ? "end" : "middle";
    chart.plot.append(svg("text", { class: "tick", x: sx(x), y: height - 6, "text-anchor": anchor },
      chart.xFormat(x)));
  }
  for (const s of visible) drawSeries(chart, s);
  chart.overlay = svg("g");
  chart.plot.append(chart.overlay);
  if (!visible.length) chart.plot.append(svg("text", { class: "tick", x: width / 2, y: height / 2,
    "text-anchor": "middle" }, "nothing to show"));
}

const label = (s) => data.runs[s.run].name + (s.part ? ", " + s.part : "");

function drawSeries(chart, s) {
  const { sx, sy } = chart, at = (p, e) => `${sx(p.x).toFixed(1)},${sy(p.y + e).toFixed(1)}`;
  const colour = runColour(s.run);
  const line = (attributes) => {
    const node = svg("path", attributes);
    node.style.setProperty("--run", colour);
    chart.plot.append(node);
  };
  if (s.points.length === 1) {
    const [p] = s.points;
    line({ class: "line", d: `M${at(p, p.e)}L${at(p, -p.e)}` });
  } else if (s.points.some((p) => p.e)) {
    const upper = s.points.map((p) => at(p, p.e)), lower = s.points.map((p) => at(p, -p.e));
    line({ class: "band", d: "M" + [...upper, ...lower.reverse()].join("L") + "Z" });
  }
  line({ class: "line " + (s.part || "plain"), d: "M" + s.points.map((p) => at(p, 0)).join("L") });
  if (s.part || s.points.length === 1) for (const p of s.points)
    line({ class: "mark", d: MARKS[s.run % MARKS.length], transform: `translate(${at(p, 0)})` });
}

function point(chart, x, y) {
  chart.cursor = x;
  chart.overlay.replaceChildren();
  if (x === null) return hideTip();
  const { sx, sy, box } = chart, rows = [], x1 = sx(x);
  chart.overlay.append(svg("line", { class: "cursor", x1, x2: x1, y1: box.top, y2: box.bottom }));
  for (const s of chart.visible) {
    const p = closest(s.points, x);
    if (Math.abs(sx(p.x) - x1) > 24) continue;
    const ring = svg("circle", { class: "ring", cx: sx(p.x), cy: sy(p.y), r: 5 });
    ring.style.setProperty("--run", runColour(s.run));
    chart.overlay.append(ring);
    rows.push(el("div", { class: "tiprow" }, swatch(s.run, s.part), label(s),
      el("b", {}, chart.yFormat(p.y) + (p.e ? " ± " + fixed(100 * p.e, 1) : ""))));
  }
  const bounds = chart.plot.getBoundingClientRect();
  const head = el("div", { class: "tiphead" }, chart.xLabel(x));
  showTip(bounds.left + x1, y ?? bounds.top + 20, head, ...rows);
}

const closest = (points, x) =>
  points.reduce((best, p) => (Math.abs(p.x - x) < Math.abs(best.x - x) ? p : best));

function swatch(run, part) {
  const icon = svg("svg", { class: "swatch", viewBox: "-11 -6 22 12", "aria-hidden": "true" },
    svg("path", { class: "line " + (part || "plain"), d: "M-11,0H11" }));
  if (isNumber(run)) icon.append(svg("path", { class: "mark", d: MARKS[run % MARKS.length] }));
  icon.style.setProperty("--run", isNumber(run) ? runColour(run) : "currentColor");
  return icon;
}

function drawCurves() {
  const has = (stage, key) => data.runs.some((run) => (run[stage][key] || []).some(isNumber));
  // Keys of an evaluation: SET/PART, or PART alone for the recipe's own set.
  const split = (key) => [key.slice(0, Math.max(0, key.indexOf("/"))), key.split("/").at(-1)];
  const scored = [...new Set(data.runs.flatMap((run) => Object.keys(run.eval)))].filter((key) =>
    has("eval", key) && (["greedy", "sampled"].includes(key) || has("eval", key + "_stderr")));
  const parts = [...new Set(scored.map((key) => split(key)[1]))];
  const sets = [...new Set(scored.map((key) => split(key)[0]))];
  const toggle = (key, icon, text) => el("button", { "aria-pressed": "true", onclick: (event) => {
    hiddenParts.delete(key) || hiddenParts.add(key);
    event.currentTarget.setAttribute("aria-pressed", String(!hiddenParts.has(key)));
    charts.forEach(draw);
  } }, icon, text);
  $("curves").hidden = false;
  $("legend").append(...data.runs.map((run, i) => toggle(i, swatch(i), run.name)),
    ...(parts.length > 1 ? parts.map((part) => toggle(part, swatch(null, part), part)) : []));
  $("accuracy-table").hidden = !parts.length;
  for (const set of sets) for (const [xKey, name, xFormat, xTicks] of [
    ["generated_tokens", "against generated tokens", compact],
    ["seconds", "against wall time", duration, timeTicks],
  ]) {
    const series = scored.filter((key) => split(key)[0] === set)
      .flatMap((key) => makeSeries("eval", key, xKey, split(key)[1]));
    if (!series.length) continue;
    const title = "Accuracy" + (set && ", " + set);
    addChart($("accuracy"), { title, note: name, series, height: 300, xFormat, xTicks,
      xLabel: (x) => (xKey === "seconds" ? duration(x) : compact(x) + " tokens"),
      yFormat: percent, yTick: (y) => compact(100 * y) + " %" });
  }
  const small = (host, key, title) => {
    const format = SHARES.has(key) ? (y) => compact(100 * y) + " %" : compact;
    const series = makeSeries("train", key, "iteration");
    addChart(host, { title, note: "by iteration", series, height: 150, xFormat: compact,
      xLabel: (x) => "iteration " + x, yFormat: format, yTick: format });
  };
  for (const [key, title] of Object.entries(PANELS))
    if (has("train", key)) small($("training"), key, title);
  if (!charts.length) $("accuracy").append(el("p", {}, "No metrics have been written yet."));
  const others = [...new Set(data.runs.flatMap((run) => Object.keys(run.train)))]
    .filter((key) => !(key in PANELS) && !KEYS.includes(key) && has("train", key));
  $("more").hidden = !others.length;
  $("more").addEventListener("toggle", () => {
    if (!$("others").childElementCount) for (const key of others) small($("others"), key, key);
  });
  let frame = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => charts.forEach(draw));
  }).observe($("curves"));
}

if (data.runs.length) drawCurves();
