"use strict";
// Completions: answers to the same prompts over time, and the numbers of each token.

// ---------------------------------------------------------------- answers over time

const FEW = 3; // number of cards that are shown before "Show all"

// Returns the evaluation prompts of a run, each with its answers in order: [{step, label, completion, score, gold}].
function answersOf(run) {
  const found = new Map();
  const add = (samples, step, label) => (samples ?? []).forEach((sample, i) => {
    const id = `${i} ${sample.prompt}`;
    if (!found.has(id)) found.set(id, { prompt: sample.prompt, answers: [] });
    found.get(id).answers.push({ ...sample, step, label });
  });
  for (const line of run.samples) {
    add(line.before, -1, "before");
    add(line.evaluation?.samples, line.step, `step ${line.step}`);
    add(line.after, 1e12, "after");
  }
  for (const entry of found.values()) entry.answers.sort((a, b) => a.step - b.step);
  return [...found.values()];
}

function answerItem(answer, last) {
  const gold = answer.gold == null ? [] : [" · gold ", el("b", {}, number(answer.gold))];
  return el("li", { class: last ? "last" : null }, el("span", { class: "step" }, answer.label), modelText(answer.completion.trim() || "(empty)"),
    el("span", { class: "score" }, "score ", el("b", {}, number(answer.score)), ...gold));
}

function answerCard({ prompt, answers }) {
  const list = el("ol"), ends = answers.length > 2 ? [answers[0], answers.at(-1)] : answers;
  const fill = (shown) => list.replaceChildren(...shown.map((answer) => answerItem(answer, answer === answers.at(-1))));
  fill(ends);
  const card = el("article", { class: "card" }, el("h3", { class: "text prompt", dir: "auto", tabindex: -1 }, prompt), list);
  if (answers.length > 2) {
    const button = el("button", { type: "button", "aria-expanded": "false", onclick: () => {
      const open = button.getAttribute("aria-expanded") === "false";
      button.setAttribute("aria-expanded", open);
      button.textContent = open ? "Show first and last" : `Show all ${answers.length} answers`;
      fill(open ? answers : ends);
    } }, `Show all ${answers.length} answers`);
    card.append(button);
  }
  return card;
}

function answers() {
  const able = RUNS.map((run, i) => [i, run.name]).filter(([i]) => answersOf(RUNS[i]).length);
  if (!able.length) return null;
  const cards = el("div", { class: "cards" }), more = el("button", { type: "button", class: "more" });
  const show = (i, all) => {
    const found = answersOf(RUNS[i]), few = all || found.length <= FEW ? found : found.slice(0, FEW);
    cards.replaceChildren(...few.map(answerCard));
    more.hidden = few.length === found.length;
    more.textContent = `Show all ${found.length} prompts`;
    more.onclick = () => { show(i, true); cards.children[FEW].querySelector("h3").focus(); };
  };
  show(able[0][0]);
  return [able.length > 1 ? el("div", { class: "controls" }, choose("Run", able, (i) => show(+i))) : null, cards, more];
}

// ---------------------------------------------------------------- tokens

const minus = (a, b) => (a && b ? a.map((x, i) => (x == null || b[i] == null ? null : x - b[i])) : null);
const VIEWS = {
  ratio: { text: "Ratio", about: "Log of the new probability divided by the old one. Blue tokens became more likely in this update, orange tokens less likely.", of: (s) => minus(s.new_logprobs, s.logprobs) },
  advantage: { text: "Advantage", about: "The credit of each token. Blue is better than the value model expected, orange is worse.", of: (s) => s.advantages },
  kl: { text: "KL", about: "Log of the policy's probability divided by the reference's. Blue tokens are more likely for the policy, orange tokens less likely.", of: (s) => minus(s.logprobs, s.ref_logprobs) },
  value: { text: "Value", about: "The return that the value model expects before the token. Blue is high, orange is low.", of: (s) => s.values },
};

// Returns all records that have tokens, in order: [{label, samples}].
function tokenLines(run) {
  const found = [];
  for (const line of run.samples) {
    if (line.samples) found.push({ step: line.step, label: `iteration ${line.step}`, samples: line.samples });
    if (line.evaluation?.samples) found.push({ step: line.step + .5, label: `evaluation, step ${line.step}`, samples: line.evaluation.samples });
    if (line.before) found.push({ step: -1, label: "evaluation, before PPO", samples: line.before });
    if (line.after) found.push({ step: 1e12, label: "evaluation, after PPO", samples: line.after });
  }
  return found.map((line) => ({ ...line, samples: line.samples.filter((s) => Array.isArray(s.tokens)) })).filter((line) => line.samples.length).sort((a, b) => a.step - b.step);
}

const visible = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");

const FACTS = { ratio: "log new/old", advantage: "advantage", kl: "log policy/ref.", value: "value" };

// Returns the index of the line whose probabilities an update changed most. This line is shown first.
function mostMoved(lines) {
  const moved = lines.map((line) => mean(line.samples.flatMap((s) => (VIEWS.ratio.of(s) ?? [0]).map((x) => Math.abs(x ?? 0)))));
  return moved.indexOf(Math.max(...moved));
}

function tokens() {
  const able = RUNS.map((run, i) => [i, run.name]).filter(([i]) => tokenLines(RUNS[i]).length);
  if (!able.length) return null;
  const state = { run: able[0][0], line: mostMoved(tokenLines(RUNS[able[0][0]])), view: "advantage" };
  const controls = el("div", { class: "controls", style: "margin-top:0" }), body = el("div");

  function render(focus) {
    const lines = tokenLines(RUNS[state.run]), line = lines[state.line], can = (name) => line.samples.some((s) => VIEWS[name].of(s));
    if (!can(state.view)) state.view = Object.keys(VIEWS).find(can) ?? "value";
    const pick = (name, label, options) => {
      const node = choose(label, options, (value) => { state[name] = +value; if (name === "run") state.line = mostMoved(tokenLines(RUNS[+value])); render(name); }, state[name]);
      node.dataset.name = name;
      return node;
    };
    controls.replaceChildren(
      ...(able.length > 1 ? [pick("run", "Run", able)] : []),
      pick("line", "When", lines.map((l, i) => [i, l.label])),
      el("fieldset", {}, el("legend", {}, "Colour by"), el("div", { class: "choice" }, Object.entries(VIEWS).map(([name, view]) => el("label", { "data-name": name },
        el("input", { type: "radio", name: "view", value: name, checked: name === state.view, disabled: !can(name), onchange: () => { state.view = name; render(name); } }), el("span", {}, view.text))))));
    body.replaceChildren(...creditView(line, VIEWS[state.view]));
    controls.querySelector(`[data-name="${focus}"] select, [data-name="${focus}"] input`)?.focus();
  }

  render();
  return el("div", { class: "panel" }, controls, body);
}

// Returns all completions of a line, coloured on one scale, beside the numbers of the selected token.
function creditView(line, view) {
  const sizes = line.samples.flatMap((s) => view.of(s) ?? []).filter((x) => x != null).map(Math.abs).sort((a, b) => a - b);
  const most = Math.max(quantile(sizes.length ? sizes : [0], .98), 1e-3);
  const facts = el("div", { class: "facts" }), details = el("details", {}, el("summary", {}, "All tokens as a table"));
  let marked = null;
  const show = (sample, i, span) => {
    const p = (logprob) => (logprob == null ? "–" : `${number(100 * Math.exp(logprob), 3)}%`);
    const pairs = [[`token ${i + 1} of ${sample.tokens.length}`, JSON.stringify(sample.tokens[i])], ["probability", p(sample.logprobs?.[i])],
      ...(sample.new_logprobs ? [["after the update", p(sample.new_logprobs[i])]] : []), ["reference", p(sample.ref_logprobs?.[i])],
      ...Object.entries(VIEWS).map(([name, v]) => [FACTS[name], v.of(sample)?.[i]]).filter(([, x]) => x != null).map(([name, x]) => [name, number(x)])];
    facts.replaceChildren(el("dl", {}, pairs.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", { dir: "auto" }, text)))));
    marked?.setAttribute("aria-selected", "false");
    (marked = span).setAttribute("aria-selected", "true");
  };
  const rows = line.samples.map((sample) => tokenRow(sample, view, most, show));
  rows[0].querySelector(".tok")?.dispatchEvent(new MouseEvent("mouseenter"));
  details.addEventListener("toggle", () => { if (details.open && details.children.length < 2) details.append(table("Tokens of the completions",
    [{ text: "token" }, ...Object.values(VIEWS).map((v) => ({ text: v.text, number: true }))],
    line.samples.flatMap((s) => { const all = Object.values(VIEWS).map((v) => v.of(s)); return s.tokens.map((text, i) => ({ cells: [JSON.stringify(text), ...all.map((x) => x?.[i] ?? "–")] })); }))); });
  return [el("div", { class: "scale" }, el("span", {}, number(-most)), el("i", { "aria-hidden": "true" }), el("span", {}, number(most)), el("span", {}, view.about)),
    el("div", { class: "credit" }, el("ol", {}, rows), facts), details];
}

function tokenRow(sample, view, most, show) {
  const values = view.of(sample) ?? [];
  const spans = sample.tokens.map((text, i) => {
    const x = values[i] ?? 0, depth = Math.min(1, Math.abs(x) / most), last = i === sample.tokens.length - 1;
    const span = el("span", { class: text === "" ? "tok empty" : "tok", role: "option", tabindex: i ? -1 : 0, "aria-selected": "false", "aria-label": `${JSON.stringify(text)}, ${view.text} ${number(x)}`,
      style: `background: rgba(var(--${x < 0 ? "low" : "high"}), calc(${depth.toFixed(3)} * var(--strength)))`,
      onmouseenter: () => show(sample, i, span), onfocus: () => show(sample, i, span), onclick: () => go(i) }, text === "" ? (last ? "end" : "·") : visible(text));
    return span;
  });
  const go = (i) => {
    const to = Math.max(0, Math.min(spans.length - 1, i));
    spans.forEach((span, j) => { span.tabIndex = j === to ? 0 : -1; });
    spans[to].focus();
  };
  const keydown = (event) => {
    const at = spans.indexOf(document.activeElement), to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    go(to);
  };
  const gold = sample.gold == null ? "" : ` · gold ${number(sample.gold)}`;
  return el("li", { class: "tokens" }, el("div", { class: "asked" }, el("b", {}, `score ${number(sample.score)}${gold}`), modelText(sample.prompt)),
    el("div", { class: "text", role: "listbox", "aria-orientation": "horizontal", "aria-label": "Tokens of a completion. The arrow keys move between tokens.", dir: "auto", onkeydown: keydown }, spans));
}
