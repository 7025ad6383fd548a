"use strict";
// Elements, numbers and themes. Text enters the document only as text nodes, never as HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs, GROUPS = DATA.groups;

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Text of a model or of data. It has its own text direction, so that it cannot change the direction of other text.
const modelText = (text, tag = "div", kind = "text") => el(tag, { class: kind, dir: "auto" }, text);

function number(x, digits = 3) {
  if (x == null || !isFinite(x)) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return x.toExponential(2).replace("-", "−").replace("e−", "e−");
  const places = size >= 1000 ? 0 : Math.max(0, digits - 1 - Math.max(0, Math.floor(Math.log10(size || 1))));
  return x.toLocaleString("en", { minimumFractionDigits: Math.min(places, 2), maximumFractionDigits: Math.max(places, size < 1 ? 3 : places) }).replace("-", "−");
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (index) => css(`--c${index % 6}`);

const curve = (run, stage, name) => run.stages[stage]?.metrics[name];
const hasMetric = (stage, name) => RUNS.some((run) => curve(run, stage, name));

// Returns a drop-down list with a label. `options` holds pairs [value, text]. `change` is called with the chosen value.
function choose(label, options, change, chosen) {
  const select = el("select", { onchange: () => change(select.value) },
    options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
  return el("label", { class: label === "Run" ? "inline" : null }, label, select);
}

function table(caption, heads, rows, kind = "") {
  const cell = (tag, text, i) => el(tag, { class: typeof text === "number" || heads[i].number ? "n" : null, scope: tag === "th" ? (kind ? "row" : "col") : null },
    typeof text === "number" ? number(text, 4) : text);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, el("table", { class: kind },
    el("caption", { class: "hidden" }, caption),
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col", class: head.number ? "n" : null }, head.text)))),
    el("tbody", {}, rows.map((row) => el("tr", { class: row.kind }, row.cells.map((text, i) => cell(kind && i === 0 ? "th" : "td", text, i)))))));
}

// ---------------------------------------------------------------- themes

const system = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
try { chosenTheme = localStorage.getItem("jaxrlhf-theme"); } catch { /* some browsers have no storage for files */ }
const isDark = () => (chosenTheme ? chosenTheme === "dark" : system.matches);

function applyTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  const button = document.getElementById("theme");
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
}
applyTheme();
