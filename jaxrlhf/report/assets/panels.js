"use strict";
// Other figures: frontier, time by phase, histograms, calibration, and a chosen metric.

const PHASES = [["time/rollout", "rollout"], ["time/reward", "reward"], ["time/annotate", "logprobs and values"], ["time/update", "update"], ["time/samples", "samples"]];

// Returns a figure of one run. If there are several runs, a drop-down list chooses the run.
function byRun(has, make) {
  const able = RUNS.map((run, i) => [i, run.name]).filter(([i]) => has(RUNS[i]));
  if (!able.length) return null;
  const place = el("div", { style: "display: contents" });
  const show = (i) => place.replaceChildren(make(RUNS[i], able.length > 1 ? choose("Run", able, (value) => { show(+value); place.querySelector("select").focus(); }, i) : null));
  show(able[0][0]);
  return place;
}

function withControls(node, ...controls) {
  const row = controls.filter(Boolean);
  if (row.length) node.querySelector("figcaption").prepend(el("div", { class: "aside" }, row));
  return node;
}

const frontierOf = (run, target) => {
  const kl = curve(run, "ppo", "kl/k1"), score = curve(run, "ppo", target);
  if (!kl || !score) return [];
  const at = new Map(kl.x.map((step, i) => [step, kl.y[i]]));
  return score.x.map((step, i) => ({ step, kl: at.get(step), score: score.y[i] })).filter((p) => p.kl != null);
};

function frontier() {
  const targets = [["reward/score", "reward"], ["reward/gold", "gold score"]].filter(([name]) => hasMetric("ppo", name));
  const paths = RUNS.flatMap((run, r) => targets.map(([name, label], s) => ({ run, r, s, label, points: frontierOf(run, name) }))).filter((p) => p.points.length);
  if (!paths.length) return null;
  const group = (r) => GROUPS.findIndex((g) => g.runs.includes(r));
  const words = paths.map(({ run, label, points }) => {
    const best = points.reduce((a, b) => (b.score > a.score ? b : a));
    return `${RUNS.length > 1 ? `${run.name}, ` : ""}${label}: highest ${number(best.score)} at a KL of ${number(best.kl)} nats, iteration ${best.step}.`;
  }).join(" ");
  return figure({
    title: "Reward against KL", about: "How much score the policy gains for its distance from the reference. Higher and further left is better. If the gold score bends down, the policy is over-optimised.",
    wide: RUNS.some((run) => scoresOf(run, "evaluation").length) ? "wide tall" : "double", summary: words,
    keys: () => [...(targets.length > 1 || GROUPS.length === 1 ? targets.map(([, label], s) => key(label, GROUPS.length > 1 ? "--muted" : `--c${s}`, dashOf(s))) : []),
      ...(GROUPS.length > 1 ? GROUPS.map((g, i) => key(g.label, `--c${i % 6}`)) : [])],
    build: () => ({
      traces: paths.map(({ run, r, s, label, points }) => {
        const paint = css(paintOf(group(r), s));
        return { type: "scatter", mode: "lines+markers", name: label, x: points.map((p) => p.kl), y: points.map((p) => p.score),
          line: { color: fade(paint, .35), width: 1.2, dash: dashOf(s) }, marker: { size: points.map((_, i) => 4 + 5 * (i / points.length)), color: paint, opacity: points.map((_, i) => .35 + .65 * (i / points.length)) },
          text: points.map((p) => `iteration ${p.step}`), hovertemplate: `%{text}<br>KL %{x:.3~g}, ${label} %{y:.3~g}<extra></extra>` };
      }),
      layout: layout({ label: "KL to the reference, nats per completion" }, {}, { hovermode: "closest" }),
    }),
    heads: [{ text: "run" }, { text: "iteration", number: true }, { text: "KL", number: true }, { text: "score", number: true }],
    rows: () => paths.flatMap(({ run, label, points }) => points.filter((_, i) => i % Math.ceil(points.length / 15) === 0)
      .map((p) => ({ cells: [`${run.name}, ${label}`, String(p.step), p.kl, p.score] }))),
  });
}

function phases() {
  const parts = (run) => PHASES.map(([name, label], i) => ({ label, paint: `--c${i}`, c: curve(run, "ppo", name) })).filter((p) => p.c);
  return byRun((run) => parts(run).length, (run, control) => {
    const found = parts(run), total = found.reduce((sum, p) => sum + mean(p.c.y) * p.c.y.length, 0);
    const share = (p) => Math.round((100 * mean(p.c.y) * p.c.y.length) / total);
    return withControls(figure({
      title: "Time by phase", about: "Seconds of each iteration, by phase. The first iterations include compilation.", wide: "wide",
      summary: `${found.map((p) => `${p.label} ${share(p)}%`).join(", ")} of ${duration(total)}.`,
      keys: () => found.map((p) => key(`${p.label} ${share(p)}%`, p.paint)),
      build: () => {
        const steps = found[0].c.x;
        const highest = steps.map((_, i) => found.reduce((sum, p) => sum + (p.c.y[p.c.x.indexOf(steps[i])] ?? 0), 0)).sort((a, b) => a - b);
        return { traces: found.map((p) => { const at = new Map(p.c.x.map((s, i) => [s, p.c.y[i]]));
          return { type: "scatter", mode: "lines", stackgroup: "time", name: p.label, x: steps, y: steps.map((s) => at.get(s) ?? 0),
            line: { width: .5, color: css(p.paint) }, fillcolor: fade(css(p.paint), .7), hovertemplate: "%{y:.3~g} s" }; }),
        layout: layout({ label: "iteration" }, { label: "", ticksuffix: " s", range: [0, 1.25 * highest[Math.floor(.95 * (highest.length - 1))]] }) };
      },
      heads: [{ text: "phase" }, { text: "total seconds", number: true }, { text: "share", number: true }],
      rows: () => found.map((p) => ({ cells: [p.label, number(mean(p.c.y) * p.c.y.length), `${share(p)}%`] })),
    }), control);
  });
}

function quantile(sorted, q) { return sorted[Math.min(sorted.length - 1, Math.round(q * (sorted.length - 1)))]; }

// Returns all scores of batches or evaluations, in order: [{step, scores}].
function scoresOf(run, kind) {
  const lines = run.samples.map((line) => ({ step: line.step, scores: kind === "training" ? line.scores : line.evaluation?.scores }));
  return lines.filter((line) => Array.isArray(line.scores) && line.scores.length).map((line) => ({ ...line, scores: line.scores.filter((x) => typeof x === "number") }));
}

function histograms(kind, title, about) {
  return byRun((run) => scoresOf(run, kind).length, (run, control) => {
    const lines = scoresOf(run, kind), all = lines.flatMap((line) => line.scores).sort((a, b) => a - b);
    const low = quantile(all, .002), high = quantile(all, .998), bins = 24, width = (high - low) / bins || 1;
    const shares = lines.map(({ scores }) => {
      const counts = Array(bins).fill(0);
      for (const x of scores) counts[Math.min(bins - 1, Math.max(0, Math.floor((x - low) / width)))] += 1;
      return counts.map((count) => count / scores.length);
    });
    const spread = ({ step, scores }) => { const s = [...scores].sort((a, b) => a - b); return [step, quantile(s, .05), quantile(s, .5), quantile(s, .95)]; };
    const first = spread(lines[0]), last = spread(lines.at(-1));
    return withControls(figure({
      title, about, wide: kind === "evaluation" ? "double" : "tall",
      summary: `Median ${number(first[2])} at iteration ${first[0]}, ${number(last[2])} at iteration ${last[0]}; 90% are between ${number(last[1])} and ${number(last[3])} at the end.`,
      build: () => ({
        traces: [{ type: "heatmap", x: lines.map((line) => String(line.step)), y: Array.from({ length: bins }, (_, b) => low + (b + .5) * width),
          z: Array.from({ length: bins }, (_, b) => shares.map((s) => s[b])), zmin: 0, xgap: 2, ygap: 0,
          colorscale: [[0, css("--s0")], [.25, css("--s1")], [.6, css("--s2")], [1, css("--s3")]],
          colorbar: { thickness: 9, len: .9, tickformat: ".0%", tickfont: { size: 11, color: css("--muted") }, outlinewidth: 0, ypad: 4 },
          hovertemplate: "iteration %{x}, score near %{y:.2f}: %{z:.0%}<extra></extra>" },
        { type: "scatter", mode: "lines+markers", x: lines.map((line) => String(line.step)), y: lines.map((line) => spread(line)[2]),
          line: { color: css("--c1"), width: 2 }, marker: { size: 5, color: css("--c1") }, hovertemplate: "median %{y:.3f}<extra></extra>" }],
        layout: layout({ label: "iteration", type: "category", showgrid: false, nticks: 10 }, { label: "score", showgrid: false }, { hovermode: "closest" }),
      }),
      keys: () => [key("median", "--c1")],
      heads: [{ text: "iteration", number: true }, { text: "5% below", number: true }, { text: "median", number: true }, { text: "5% above", number: true }],
      rows: () => lines.map((line) => ({ cells: spread(line).map((x, i) => (i ? x : String(x))) })),
    }), control);
  });
}

const calibrated = (run) => run.calibration.filter((line) => Array.isArray(line.calibration) && line.calibration.length);

function calibration() {
  return byRun((run) => calibrated(run).length, (run, control) => {
    const line = calibrated(run).at(-1), points = line.calibration, most = Math.max(...points.map((p) => p.pairs)), pairs = points.reduce((sum, p) => sum + p.pairs, 0);
    const error = points.reduce((sum, p) => sum + p.pairs * Math.abs(p.confidence - p.accuracy), 0) / pairs;
    return withControls(figure({
      title: "Calibration of the reward model", about: "How often the model is right at each confidence. On the dotted line the confidence equals the probability of being right. Below the line the model is overconfident. Bars show numbers of pairs.",
      summary: `Mean distance from the diagonal ${number(error)} over ${pairs} pairs, at step ${line.step}.`,
      keys: () => [key("accuracy", "--c0"), key("perfect", "--muted", "dot")],
      build: () => ({
        traces: [{ type: "bar", x: points.map((p) => p.confidence), y: points.map((p) => p.pairs), yaxis: "y2", width: .03, marker: { color: css("--grid") }, hovertemplate: "%{y} pairs<extra></extra>" },
          { type: "scatter", mode: "lines", x: [.5, 1], y: [.5, 1], line: { dash: "dot", color: css("--muted"), width: 1.5 }, hoverinfo: "skip" },
          { type: "scatter", mode: "lines+markers", x: points.map((p) => p.confidence), y: points.map((p) => p.accuracy), line: { color: css("--c0"), width: 2 },
            marker: { size: points.map((p) => 5 + 8 * Math.sqrt(p.pairs / most)), color: css("--c0") }, hovertemplate: "confidence %{x:.2f}, accuracy %{y:.2f}<extra></extra>" }],
        layout: layout({ label: "confidence", range: [.48, 1.02] }, { label: "accuracy", range: [-.03, 1.03] },
          { hovermode: "closest", yaxis2: { overlaying: "y", side: "right", showgrid: false, showticklabels: false, range: [0, 4 * most], fixedrange: true } }),
      }),
      heads: ["confidence", "accuracy", "pairs"].map((text) => ({ text, number: true })),
      rows: () => points.map((p) => ({ cells: [p.confidence, p.accuracy, String(p.pairs)] })),
    }), control);
  });
}

function margins() {
  const of = (run) => run.calibration.filter((line) => Array.isArray(line.margins) && line.margins.length).at(-1);
  return byRun(of, (run, control) => {
    const { margins: found, step } = of(run), right = found.filter((x) => x > 0).length;
    const sorted = [...found].sort((a, b) => a - b);
    return withControls(figure({
      title: "Margins", about: "Score of the chosen completion minus score of the rejected one, on held-out pairs. Above 0 the model agrees with the label.",
      summary: `${right} of ${found.length} pairs are above 0 at step ${step}; median ${number(quantile(sorted, .5))}.`,
      build: () => ({ traces: [{ type: "histogram", x: found, nbinsx: 30, marker: { color: css("--c0") }, hovertemplate: "%{x}: %{y} pairs<extra></extra>" }],
        layout: layout({ label: "margin", zeroline: true }, { label: "pairs" }, { bargap: .06, hovermode: "closest", shapes: [{ type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: css("--c1"), width: 2, dash: "dot" } }] }) }),
      heads: [{ text: "share of pairs below" }, { text: "margin", number: true }],
      rows: () => [.05, .25, .5, .75, .95].map((q) => ({ cells: [`${100 * q}%`, quantile(sorted, q)] })),
    }), control);
  });
}

function anyMetric() {
  const names = [...new Set(RUNS.flatMap((run) => Object.entries(run.stages).flatMap(([stage, of]) => Object.keys(of.metrics).map((name) => `${stage} · ${name}`))))].sort();
  if (!names.length) return null;
  const place = el("div", { class: "charts" });
  const show = (value) => {
    const [stage, name] = value.split(" · ");
    place.replaceChildren(curves(stage, { title: name, about: `Every value that the stage ${stage} has logged.`, wide: "wide tall", series: [{ metric: name, label: name }] }));
  };
  show(names[0]);
  return [el("div", { class: "controls" }, choose("Metric", names.map((name) => [name, name]), show, names[0])), place];
}
