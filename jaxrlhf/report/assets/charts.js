"use strict";
// Curves: each is a figure with a summary in words and a table. Plotly draws a figure when it scrolls into view.

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif';
const DASHES = ["solid", "dash", "dot", "dashdot"];

// Plotly is stored compressed. It is unpacked once, when the first chart is about to be seen.
let library = null;
function plotly() {
  library ??= (async () => {
    const bytes = Uint8Array.from(atob(document.getElementById("library").textContent), (c) => c.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
    return window.Plotly;
  })();
  return library;
}

function layout(x, y, more = {}) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"), ticks: "", exponentformat: "e", automargin: true, fixedrange: true,
    title: { font: { size: 12, color: css("--muted") }, standoff: 6 }, tickfont: { size: 11, color: css("--muted") } };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: FONT, size: 12, color: css("--text") },
    margin: { l: 8, r: 10, t: 6, b: 8 }, showlegend: false, hovermode: "x unified", dragmode: false,
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text"), size: 12, family: FONT } },
    xaxis: { ...axis, zeroline: false, nticks: 7, ...x, title: { ...axis.title, text: x.label ?? "" } },
    yaxis: { ...axis, nticks: 6, ...y, title: { ...axis.title, text: y?.label ?? "" } }, ...more };
}

const drawn = new Set(); // figures that have been drawn; a change of theme draws them again
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "250px" });

async function draw(plot) {
  try {
    const library = await plotly();
    const { traces, layout: shape } = plot.build();
    await library.react(plot, traces, shape, { displayModeBar: false, responsive: true });
    drawn.add(plot);
    plot.dataset.drawn = traces.length;
  } catch (error) {
    plot.classList.add("failed");
    plot.textContent = "This browser cannot draw the chart. The numbers of the chart are below.";
    console.error(error);
  }
}

function redraw() { for (const plot of drawn) draw(plot); }

// `rows()` makes the rows of the table when the table is opened. `keys()` makes the legend.
function figure({ title, about, build, summary, heads, rows, keys, wide }) {
  const plot = el("div", { class: "plot", role: "img", "aria-label": `${title}. ${summary}` });
  plot.build = build;
  const details = el("details", {}, el("summary", {}, "In words and numbers"), el("p", {}, summary));
  details.addEventListener("toggle", () => { if (details.open && details.children.length < 3) details.append(table(title, heads, rows())); });
  seen.observe(plot);
  return el("figure", { class: wide ?? null }, el("figcaption", {}, el("h3", {}, title), el("p", {}, about)),
    el("div", { class: "keys" }, keys?.()), plot, details);
}

function key(label, paint, dash = "solid") {
  const strokes = { solid: "", dash: "5 3", dot: "2 3", dashdot: "6 3 2 3" };
  const line = svg("svg", { width: 22, height: 8, "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 2.5, "stroke-dasharray": strokes[dash], style: `stroke: var(${paint})` }));
  return el("span", {}, line, label);
}

// ---------------------------------------------------------------- curves over steps

// The curves of a metric in a group: the curve of each run, and mean and range over runs at each step.
function groupCurves(group, stage, name) {
  const curves = group.runs.map((i) => curve(RUNS[i], stage, name)).filter(Boolean);
  const at = new Map();
  for (const { x, y } of curves) x.forEach((step, i) => at.set(step, [...(at.get(step) ?? []), y[i]]));
  const steps = [...at.keys()].sort((a, b) => a - b);
  return { curves, steps, means: steps.map((s) => mean(at.get(s))), lows: steps.map((s) => Math.min(...at.get(s))), highs: steps.map((s) => Math.max(...at.get(s))) };
}

// Returns a smoothed curve: centred means over about a twentieth of the values. Null for short curves.
function smooth(values) {
  const half = Math.floor(values.length / 40);
  if (values.length < 120) return null;
  return values.map((_, i) => mean(values.slice(Math.max(0, i - half), i + half + 1)));
}

const fade = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

// If there is one group of runs, each series has a colour. If there are several, each group has a colour, and each series a dash.
const paintOf = (group, series) => `--c${(GROUPS.length > 1 ? group : series) % 6}`;
const dashOf = (series) => DASHES[(GROUPS.length > 1 ? series : 0) % 4];

function lineTraces(stage, series) {
  const traces = [];
  GROUPS.forEach((group, g) => series.forEach(({ metric, label, points }, s) => {
    const { curves, steps, means, lows, highs } = groupCurves(group, stage, metric);
    if (!steps.length) return;
    const paint = css(paintOf(g, s)), name = GROUPS.length > 1 ? (series.length > 1 ? `${group.label}: ${label}` : group.label) : label;
    const quiet = { hoverinfo: "skip", showlegend: false, type: "scatter", mode: "lines" };
    if (curves.length > 1) traces.push({ ...quiet, x: [...steps, ...steps.slice().reverse()], y: [...highs, ...lows.slice().reverse()],
      fill: "toself", fillcolor: fade(paint, .16), line: { width: 0 } });
    const smoothed = smooth(means);
    if (smoothed) traces.push({ ...quiet, x: steps, y: means, line: { width: 1, color: fade(paint, .28) } });
    const alone = points || steps.length < 3;
    traces.push({ type: "scatter", mode: alone ? "lines+markers" : "lines", name: name.length > 34 ? `${name.slice(0, 33)}…` : name, x: steps, y: smoothed ?? means,
      line: { color: paint, width: 2, dash: dashOf(s) }, marker: { size: 6, color: paint }, hovertemplate: "%{y:.4~g}" });
  }));
  return traces;
}

function curveWords(stage, { metric, label }) {
  return GROUPS.map((group) => {
    const { steps, means } = groupCurves(group, stage, metric);
    if (!steps.length) return null;
    const top = means.indexOf(Math.max(...means)), name = GROUPS.length > 1 ? `${group.label}, ${label}` : label;
    return `${name}: ${number(means[0])} at step ${steps[0]}, ${number(means.at(-1))} at step ${steps.at(-1)}; highest ${number(means[top])} at step ${steps[top]}.`;
  }).filter(Boolean).join(" ");
}

// Returns a figure of curves over the steps of a stage, or null if no run has these curves.
function curves(stage, { title, about, series, y = {}, wide }) {
  const present = series.filter(({ metric }) => hasMetric(stage, metric));
  if (!present.length) return null;
  const columns = GROUPS.flatMap((group) => present.map((s) => ({ ...s, group })));
  return figure({
    title, about, wide, summary: present.map((s) => curveWords(stage, s)).join(" "),
    build: () => ({ traces: lineTraces(stage, present), layout: layout({ label: stage === "ppo" ? "iteration" : "optimizer step" }, y) }),
    keys: () => GROUPS.length > 1
      ? [...GROUPS.map((group, g) => key(group.label, paintOf(g, 0))), ...(present.length > 1 ? present.map((s, i) => key(s.label, "--muted", dashOf(i))) : [])]
      : present.length > 1 ? present.map((s, i) => key(s.label, paintOf(0, i))) : [],
    heads: [{ text: "step", number: true }, ...columns.map(({ label, group }) => ({ text: GROUPS.length > 1 ? `${group.label}: ${label}` : label, number: true }))],
    rows: () => {
      const found = columns.map(({ group, metric }) => groupCurves(group, stage, metric));
      const steps = [...new Set(found.flatMap((f) => f.steps))].sort((a, b) => a - b);
      const every = Math.max(1, Math.ceil(steps.length / 25));
      return steps.filter((_, i) => i % every === 0 || i === steps.length - 1)
        .map((step) => ({ cells: [String(step), ...found.map((f) => (f.steps.includes(step) ? number(f.means[f.steps.indexOf(step)], 4) : "–"))] }));
    },
  });
}
