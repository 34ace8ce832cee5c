"use strict";
// What all parts of the page share. Foreign text becomes text nodes only, never markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#2f6fdd", "#e07b28", "#2a9d5c", "#c2437f", "#7a5bd6", "#1795a3", "#a67c1b", "#d1453b"];
const state = { hidden: new Set(), tab: "overview" };
const tabs = [];

/** An element with attributes, listeners (on...) and children; strings are text. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false).map((child) => child instanceof Node ? child : String(child)));
  return node;
}

const color = (index) => COLORS[index % COLORS.length];
const runs = () => DATA.runs.map((run, index) => ({ ...run, index })).filter((run) => !state.hidden.has(run.index));
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A number in about four digits. */
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function seconds(value) {
  if (value >= 5400) return `${short(value / 3600)} h`;
  return value >= 90 ? `${short(value / 60)} min` : `${short(value)} s`;
}

const dot = (index) => el("span", { class: "dot", style: `background:${color(index)}` });
const badge = (text, kind) => el("span", { class: `badge ${kind || "dim"}` }, text);
const says = (text) => el("pre", { class: "says", tabindex: "0" }, text);
const message = (role, text) => el("div", { class: `message ${role === "assistant" ? "assistant" : ""}` }, el("div", { class: "meta" }, role), says(text));

function select(label, options, value, change) {
  const box = el("select", { name: label, onchange: () => change(box.value) }, options.map(([key, text]) => el("option", { value: key }, text)));
  box.value = value;
  return el("label", null, label, box);
}

function search(label, value, change) {
  const box = el("input", { type: "search", size: 16, oninput: () => change(box.value) });
  box.value = value;
  return el("label", null, label, box);
}

function check(label, value, change) {
  const box = el("input", { type: "checkbox", onchange: () => change(box.checked) });
  box.checked = value;
  return el("label", null, box, label);
}

/** A list beside what is chosen in it. */
function browser(rows, title, show, empty) {
  if (!rows.length) return el("p", { class: "dim" }, empty);
  const detail = el("div", { class: "detail" });
  const buttons = rows.map((row) => el("button", { type: "button", onclick: () => choose(row) }, title(row)));
  function choose(row) {
    buttons.forEach((button, i) => rows[i] === row ? button.setAttribute("aria-current", "true") : button.removeAttribute("aria-current"));
    detail.replaceChildren(show(row));
  }
  choose(rows[0]);
  return el("div", { class: "split" }, el("div", { class: "card list" }, buttons), detail);
}

function tab(key, title, draw) { tabs.push({ key, title, draw }); }

function draw() {
  const wanted = location.hash.slice(1);
  const current = tabs.find((one) => one.key === wanted) || tabs[0];
  document.getElementById("tabs").replaceChildren(...tabs.map((one) => el("a", { href: `#${one.key}`, "aria-current": one === current ? "page" : null }, one.title)));
  document.getElementById("runs").replaceChildren(...DATA.runs.map((run, i) => el("button", {
    type: "button", class: "chip", title: run.path, "aria-pressed": String(!state.hidden.has(i)),
    onclick: () => { state.hidden.has(i) ? state.hidden.delete(i) : state.hidden.add(i); draw(); },
  }, dot(i), el("span", null, run.name))));
  const main = document.getElementById("main");
  main.replaceChildren();
  main.append(...[current.draw()].flat());
}

function start() {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = dark.matches ? "dark" : "light";
  dark.addEventListener("change", () => { root.dataset.theme = dark.matches ? "dark" : "light"; draw(); });
  document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; draw(); });
  window.addEventListener("hashchange", draw);
  draw();
  if (DATA.watch) watch();
}

/** Ask the server that made the page whether the runs have gone on. */
function watch() {
  let seen = null;
  setInterval(async () => {
    try {
      const now = await (await fetch("stamp")).text();
      if (seen !== null && now !== seen) location.reload();
      seen = now;
    } catch { /* the server has ended; the page stays as it is */ }
  }, 4000);
}
