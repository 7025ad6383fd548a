"use strict";
// The sections of the page, from top to bottom.

const STAGE_NAMES = { sft: "SFT", reward_model: "Reward model", ppo: "PPO" };
const TILES = [["reward/score", "Reward", true], ["reward/gold", "Gold score", true], ["kl/k1", "KL, nats per completion", false], ["length/mean", "Tokens per completion", true]];

// Returns a number as text, with two decimals if it has the size of a score.
const short = (x) => (Math.abs(x) >= .01 && Math.abs(x) < 10 ? x.toFixed(2).replace("-", "−") : number(x));

function spark(values) {
  const low = Math.min(...values), span = Math.max(...values) - low || 1;
  const points = values.map((y, i) => `${(100 * i) / Math.max(1, values.length - 1)},${27 - 24 * ((y - low) / span)}`).join(" ");
  return svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("polyline", { points, fill: "none", "stroke-width": 1.8, "vector-effect": "non-scaling-stroke", style: "stroke: var(--accent)" }));
}

function tile(run, [name, label, both]) {
  const found = curve(run, "ppo", name), results = run.finished.ppo;
  const before = results?.before?.[name], after = results?.after?.[name];
  if (!found?.y.length && after == null) return null;
  const y = found?.y ?? [], ends = after != null;
  const from = ends ? before : mean(y.slice(0, 3)), to = ends ? after : mean(y.slice(-3));
  return el("div", { class: "tile" }, el("dt", {}, label), el("dd", {},
    el("div", { class: "figure" }, both && from != null ? el("s", {}, `${short(from)} → `) : null, short(to)),
    y.length > 2 ? spark(y) : null));
}

function stageItem(name, stage) {
  const of = stage.total ? `${stage.step.toLocaleString("en")} of ${stage.total.toLocaleString("en")}` : stage.step.toLocaleString("en");
  const state = stage.finished ? "finished" : stage.step ? "running" : "not started";
  const share = stage.finished ? 100 : stage.total ? Math.round((100 * stage.step) / stage.total) : stage.step ? 50 : 0;
  return el("li", {}, `${STAGE_NAMES[name] ?? name} `, el("small", {}, `${state}${stage.step ? ` · ${of} steps · ${duration(stage.seconds)}` : ""}`),
    el("div", { class: `progress${stage.finished ? " done" : ""}`, "aria-hidden": "true" }, el("i", { style: `width:${share}%` })));
}

function statusOf(run) {
  const stages = Object.entries(run.stages), spent = duration(stages.reduce((sum, [, s]) => sum + s.seconds, 0));
  const open = stages.find(([, s]) => !s.finished);
  if (!open) return `Finished in ${spent}`;
  const [name, stage] = open;
  return `${STAGE_NAMES[name] ?? name}, step ${stage.step}${stage.total ? ` of ${stage.total}` : ""}; ${spent} so far`;
}

function glance() {
  return RUNS.map((run, r) => {
    const tiles = TILES.map((t) => tile(run, t)).filter(Boolean), group = GROUPS.findIndex((g) => g.runs.includes(r));
    const rm = run.finished.reward_model?.heldout_accuracy ?? run.finished.reward_model?.accuracy, loss = run.finished.sft?.heldout_loss ?? run.finished.sft?.loss;
    const small = (label, x, note) => (x == null ? [] : [el("div", { class: "tile" }, el("dt", {}, label), el("dd", {}, el("div", { class: "figure" }, short(x)), el("div", { class: "note" }, note)))]);
    return el("article", { class: "run" },
      el("header", {}, el("h3", {}, RUNS.length > 1 ? [el("span", { class: "dot", style: `background: var(--c${group % 6})`, "aria-hidden": "true" }), run.name] : statusOf(run)),
        el("span", { class: "when" }, [RUNS.length > 1 ? statusOf(run) : null, run.changed ? `last step ${run.changed.slice(0, 16).replace("T", " ")} UTC` : null].filter(Boolean).join(" · "))),
      el("ul", { class: "stages" }, Object.entries(run.stages).map(([name, stage]) => stageItem(name, stage))),
      el("dl", { class: "tiles" }, tiles, small("Reward model accuracy", rm, "held-out pairs"), small("SFT loss", loss, "held-out rows")),
      tiles.length ? el("p", { class: "note" }, run.finished.ppo ? "Numbers: before and after PPO, on the evaluation prompts. Lines: during training." : "Numbers: at the first and the latest steps of training.") : null,
      run.warnings.length ? el("ul", { class: "warnings", "aria-label": "Warnings" }, run.warnings.map((text) => el("li", {}, text)))
        : Object.values(run.stages).some((s) => s.step) ? el("p", { class: "fine" }, "✓ No warnings.") : el("p", { class: "lead" }, "No step has been logged yet."));
  });
}

const both = (name, label) => [{ metric: name, label: label ?? "training" }, { metric: `evaluation/${name}`, label: "evaluation", points: true }];

function ppoCurves() {
  const c = (spec) => curves("ppo", spec);
  const parts = [...new Set(RUNS.flatMap((run) => Object.keys(run.stages.ppo?.metrics ?? {})))]
    .filter((name) => /^reward\//.test(name) && !/\/(score|score_std|gold|adjusted|shaped|drawn)$|abstained$/.test(name));
  return [
    c({ title: "Reward", about: "Mean score of the reward that PPO maximises.", series: both("reward/score") }),
    c({ title: "Gold score", about: "A score that no stage trains on. It measures true quality.", series: both("reward/gold") }),
    parts.length ? c({ title: "Parts of the reward", about: "Each reward of the sum, before it is multiplied by its weight.", series: parts.map((name) => ({ metric: name, label: name.slice(7) })) }) : null,
    c({ title: "KL to the reference", about: "How far the policy has moved from the reference, in nats per completion.", series: both("kl/k1") }),
    c({ title: "Entropy", about: "In nats per token. If it is near 0, the policy gives the same answer every time.", series: [{ metric: "policy/entropy", label: "entropy" }] }),
    c({ title: "Clipped tokens", about: "Share of tokens whose ratio left the clip range.", series: [{ metric: "policy/clip_high", label: "above" }, { metric: "policy/clip_low", label: "below" }], y: { tickformat: ".1~%", rangemode: "tozero" } }),
    c({ title: "Value fit", about: "Share of the returns' variance that the value model explains. 1 is perfect; a value below 0 is useless.", series: [{ metric: "value/explained_variance", label: "explained variance" }] }),
    c({ title: "Value loss", about: "Half the squared error of the value model.", series: [{ metric: "value/loss", label: "loss" }] }),
    c({ title: "Completion length", about: "Tokens per completion.", series: both("length/mean"), y: { rangemode: "tozero" } }),
    c({ title: "Ended completions", about: "Share of completions that end with a stop token.", series: both("length/eos_share"), y: { tickformat: ".0%", range: [-.03, 1.05] } }),
    c({ title: "Learning rate", about: "Learning rates of the policy and of the value model.", series: [{ metric: "optimizer/learning_rate", label: "policy" }, { metric: "optimizer/value_learning_rate", label: "value" }], y: { tickformat: ".1~e", rangemode: "tozero" } }),
    c({ title: "Gradient norm", about: "Norm of the gradient before clipping.", series: [{ metric: "optimizer/grad_norm", label: "policy" }, { metric: "optimizer/value_grad_norm", label: "value" }] }),
    c({ title: "Size of the update", about: "KL between the policy before and after an update, in nats per token.", series: [{ metric: "policy/approx_kl", label: "approximate KL" }] }),
    phases(),
  ];
}

const OPTIMIZER = (stage) => [
  curves(stage, { title: "Learning rate", about: "Learning rate at each optimizer step.", series: [{ metric: "optimizer/learning_rate", label: "learning rate" }], y: { tickformat: ".1~e", rangemode: "tozero" } }),
  curves(stage, { title: "Gradient norm", about: "Norm of the gradient before clipping.", series: [{ metric: "optimizer/grad_norm", label: "norm" }] }),
];

const rewardModel = () => [
  curves("reward_model", { title: "Loss", about: "Pairwise log-sigmoid loss. Guessing gives 0.693.", series: [{ metric: "reward_model/loss", label: "training" }, { metric: "evaluation/reward_model/loss", label: "evaluation", points: true }] }),
  curves("reward_model", { title: "Accuracy", about: "Share of pairs in which the chosen completion has the higher score.", series: [{ metric: "reward_model/accuracy", label: "training" }, { metric: "evaluation/reward_model/accuracy", label: "evaluation", points: true }], y: { tickformat: ".0%" } }),
  calibration(), margins(), ...OPTIMIZER("reward_model"),
];

const sft = () => [
  curves("sft", { title: "Loss", about: "Cross-entropy of the response, in nats per token.", series: [{ metric: "sft/loss", label: "training" }, { metric: "evaluation/sft/loss", label: "evaluation", points: true }] }),
  curves("sft", { title: "Perplexity", about: "Perplexity of held-out rows.", series: [{ metric: "evaluation/sft/perplexity", label: "perplexity", points: true }] }),
  ...OPTIMIZER("sft"),
];

function settings() {
  if (!DATA.settings.length) return null;
  const place = el("div"), state = { text: "", only: false };
  const differing = DATA.settings.filter((row) => row.differs).length;
  const show = () => {
    const rows = DATA.settings.filter((row) => (!state.only || row.differs) && row.key.includes(state.text));
    place.replaceChildren(rows.length ? table("Settings", [{ text: "setting" }, ...RUNS.map((run) => ({ text: run.name }))], rows.map((row) => ({ kind: row.differs ? "differs" : null, cells: [row.key, ...row.values] })), "settings")
      : el("p", { class: "lead" }, "No setting matches."));
  };
  const only = el("input", { type: "checkbox", onchange: () => { state.only = only.checked; show(); } });
  if (differing > 0) only.checked = state.only = true;
  const search = el("input", { type: "search", oninput: () => { state.text = search.value.trim(); show(); } });
  show();
  return el("div", { class: "panel" }, el("div", { class: "controls", style: "margin-top:0" }, el("label", {}, "Find a setting", search),
    RUNS.length > 1 ? el("label", { class: "inline" }, only, `Only the ${differing} settings that differ`) : null), place);
}

const charts = (found) => (found.some(Boolean) ? el("div", { class: "charts" }, found.filter(Boolean)) : null);
const SECTIONS = [
  ["glance", "At a glance", null, glance],
  ["answers", "Answers", "The same prompts, answered before, during and after training.", answers],
  ["curves", "PPO", "Every iteration of PPO. Runs with the same settings and different seeds are shown as their mean and range.", () => charts(ppoCurves())],
  ["frontier", "Frontier", "How much score the policy gained for its distance from the reference, and how the scores of a batch changed.", () => charts([frontier(),
    histograms("training", "Scores over time", "A stronger colour means that more completions of the batch have that score."), histograms("evaluation", "Scores of evaluations", "The same prompts each time. A stronger colour means that more completions have that score.")])],
  ["credit", "Credit", "Which tokens an update rewarded. Point at a token to see its numbers, or move with the arrow keys.", tokens],
  ["reward-model", "Reward model", "How well the reward model recognises the better completion.", () => charts(rewardModel())],
  ["sft", "SFT", "Supervised fine-tuning on demonstrations.", () => charts(sft())],
  ["metrics", "Every metric", null, anyMetric],
  ["settings", "Settings", null, settings],
];

function build() {
  const main = document.getElementById("main"), nav = document.getElementById("nav");
  document.getElementById("title").replaceChildren(el("small", {}, "jaxrlhf"), RUNS.length === 1 ? RUNS[0].name : `${RUNS.length} runs`);
  for (const [id, title, lead, make] of SECTIONS) {
    const content = [make()].flat().filter(Boolean);
    if (!content.length) continue;
    main.append(el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), lead ? el("p", { class: "lead" }, lead) : null, content));
    nav.append(el("a", { href: `#${id}` }, title));
  }
  document.getElementById("footer").textContent = `Written by jaxrlhf, ${DATA.made.slice(0, 16).replace("T", " ")} UTC`;
  const theme = () => { applyTheme(); redraw(); };
  document.getElementById("theme").addEventListener("click", () => {
    chosenTheme = isDark() ? "light" : "dark";
    try { localStorage.setItem("jaxrlhf-theme", chosenTheme); } catch { /* the choice is then not stored */ }
    theme();
  });
  system.addEventListener("change", theme);
  const links = new Map([...nav.children].map((link) => [link.getAttribute("href").slice(1), link]));
  const here = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) {
      for (const [id, link] of links) if (id === target.id) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
      const link = links.get(target.id);
      nav.scrollTo({ left: link.offsetLeft - nav.offsetLeft - 40 });
    }
  }, { rootMargin: "-25% 0px -65% 0px" });
  for (const section of main.querySelectorAll("section")) here.observe(section);
}

build();
