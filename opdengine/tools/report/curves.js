"use strict";
// Curves of all metrics, drawn by uPlot when they come into view; runs share the axes of a metric.
const view = { filter: "", smooth: 0, log: false };
const KEY_METRICS = ["loss", "eval/accuracy", "reward/mean", "gap/mean", "completions/mean_length", "grad_norm"];

function metricNames() {
  return [...new Set(runs().flatMap((run) => Object.keys(run.curves)))].sort();
}

function smoothed(values, weight) {
  let last = null;
  return values.map((value) => {
    if (value === null) return null;
    last = last === null ? value : weight * last + (1 - weight) * value;
    return last;
  });
}

/** The range of an axis; what never changes is in its middle. */
function around(_, low, high) {
  const pad = low === high ? Math.abs(low) / 10 || 0.1 : 0;
  return low === null ? [0, 1] : uPlot.rangeNum(low - pad, high + pad, 0.1, !pad);
}

function plot(name, box) {
  const shown = runs().filter((run) => run.curves[name]);
  const tables = shown.map((run) => {
    const [steps, values] = run.curves[name];
    const fit = view.log ? values.map((value) => value > 0 ? value : null) : values;
    return [steps, smoothed(fit, view.smooth)];
  });
  const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
  if (view.log && !data.slice(1).some((values) => values.some((value) => value > 0))) {
    box.append(el("p", { class: "dim" }, "no positive value"));
    return;
  }
  const steps = [1, 2, 5].flatMap((one) => Array.from({ length: 10 }, (_, power) => one * 10 ** power)).sort((a, b) => a - b);
  const axis = { stroke: css("--dim"), grid: { stroke: css("--grid"), width: 1 }, ticks: { stroke: css("--grid") }, font: "11px system-ui" };
  new uPlot({
    width: Math.max(box.clientWidth, 200), height: 170,
    scales: { x: { time: false }, y: view.log ? { distr: 3 } : { range: around } },
    axes: [{ ...axis, incrs: steps }, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => tick === null ? "" : short(tick)) }],
    cursor: { sync: { key: "steps" } },
    series: [{ label: "step" }, ...shown.map((run) => ({
      label: run.name.length > 26 ? `…${run.name.slice(-25)}` : run.name, stroke: color(run.index), width: 1.6, spanGaps: true,
      points: { show: run.curves[name][0].length < 30, size: 5 }, value: (_, value) => short(value),
    }))],
  }, data, box);
}

const observer = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (!entry.isIntersecting) return;
  observer.unobserve(entry.target);
  plot(entry.target.dataset.metric, entry.target);
}), { rootMargin: "300px" });

function chart(name) {
  const box = el("div", { class: "plot", "data-metric": name });
  observer.observe(box);
  return el("section", { class: "card" }, el("h3", null, name), box);
}

tab("curves", "Curves", () => {
  const box = el("div");
  function fill() {
    const wanted = view.filter.toLowerCase();
    const groups = {};
    for (const name of metricNames().filter((one) => one.toLowerCase().includes(wanted))) {
      const group = name.includes("/") ? name.split("/")[0] : "update";
      (groups[group] ||= []).push(name);
    }
    const order = Object.keys(groups).sort((a, b) => (b === "update") - (a === "update") || (b === "eval") - (a === "eval") || a.localeCompare(b));
    box.replaceChildren(...order.map((group) => el("section", null, el("h2", null, group, " ", el("span", { class: "dim" }, groups[group].length)), el("div", { class: "grid" }, groups[group].map(chart)))));
    if (!order.length) box.append(el("p", { class: "dim" }, "No metric has such a name."));
  }
  fill();
  const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, oninput: () => { view.smooth = Number(slider.value); fill(); } });
  slider.value = view.smooth;
  return [el("div", { class: "bar" }, search("metric", view.filter, (text) => { view.filter = text; fill(); }), el("label", null, "smoothing", slider), check("logarithmic", view.log, (on) => { view.log = on; fill(); })), box];
});
