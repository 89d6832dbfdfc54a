"use strict";
// One interactive scatter of models on linear, log or logit axes, drawn by Chart.js: points by group, 95 % intervals,
// a readout of the model under the pointer, and the arrow keys.

const SCALES = {
  linear: { to: (v) => v, from: (t) => t, fits: () => true },
  log: { to: Math.log10, from: (t) => 10 ** t, fits: (values) => values.every((v) => v > 0) },
  logit: {
    to: (p) => { const q = Math.min(Math.max(p, 1e-3), 1 - 1e-3); return Math.log(q / (1 - q)); },
    from: (t) => 1 / (1 + Math.exp(-t)),
    fits: (values, unit) => unit === "percent" && values.every((v) => v >= 0 && v <= 1),
  },
};
const SHAPES = { vit: "circle", resnet: "rect", convnext: "triangle", other: "rectRot" };
const LOGIT_TICKS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.997, 0.999];
const MOST_BARS = 150;

function plain(value, unit) {
  if (unit === "percent") return (100 * value).toFixed(1);
  if (unit === "points") return (value > 0 ? "+" : "") + (100 * value).toFixed(1);
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}
// Such as "61.2 % [59.9, 62.5]".
function show(value, low, high, unit) {
  const sign = { percent: " %", points: " points", number: "" }[unit];
  return plain(value, unit) + sign + (low === null ? "" : ` [${plain(low, unit)}, ${plain(high, unit)}]`);
}

function tickLabel(value, unit) {
  if (unit !== "number") return String(Number((100 * value).toPrecision(3)));
  for (const [size, name] of [[1e9, " B"], [1e6, " M"], [1e3, " k"]])
    if (Math.abs(value) >= size) return Number((value / size).toPrecision(3)) + name;
  return String(Number(value.toPrecision(3)));
}

function evenTicks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= 0.7 * raw);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(k * step);
  return ticks;
}

function ticksOf(scale, low, high, most) {
  const { to, from } = SCALES[scale];
  let values = [];
  if (scale === "log")
    for (let power = Math.floor(low); power <= high; power++) values.push(...[1, 2, 5].map((s) => s * 10 ** power));
  if (scale === "logit") values = LOGIT_TICKS;
  values = values.filter((v) => to(v) >= low && to(v) <= high);
  if (values.length < 3) values = evenTicks(from(low), from(high), most);
  const kept = [];
  for (const value of values)
    if (!kept.length || to(value) - to(kept[kept.length - 1]) >= (high - low) / (most + 2)) kept.push(value);
  return kept.map((value) => ({ value: to(value), label: value }));
}

const bars = {
  id: "bars",
  beforeDatasetsDraw(chart) {
    const { plot } = chart.options, { x, y } = chart.scales, { ctx, chartArea: area } = chart;
    ctx.save();
    ctx.beginPath();
    ctx.rect(area.left, area.top, area.width, area.height);
    ctx.clip();
    for (const [index, set] of chart.data.datasets.entries()) {
      if (!chart.isDatasetVisible(index)) continue;
      ctx.strokeStyle = set.borderLine;
      ctx.lineWidth = set.strong ? 1.5 : 0.8;
      for (const p of set.data) {
        if (!set.strong && plot.crowded) continue;
        const px = x.getPixelForValue(p.x), py = y.getPixelForValue(p.y);
        ctx.beginPath();
        if (p.yl !== null) { ctx.moveTo(px, y.getPixelForValue(p.yl)); ctx.lineTo(px, y.getPixelForValue(p.yh)); }
        if (p.xl !== null) { ctx.moveTo(x.getPixelForValue(p.xl), py); ctx.lineTo(x.getPixelForValue(p.xh), py); }
        ctx.stroke();
      }
    }
    ctx.restore();
  },
};

class Plot {
  // `box` holds a canvas and a readout; `pick(model)` is called for a click or Enter, `speak(text)` for a key.
  constructor(box, data, pick, speak, small) {
    Object.assign(this, { box, data, pick, small, at: -1, points: [] });
    this.canvas = box.querySelector("canvas");
    this.readout = box.querySelector(".readout");
    const axis = () => ({
      type: "linear", kind: "linear", unit: "number", min: 0, max: 1,
      afterBuildTicks: (scale) => {
        const most = Math.max(3, Math.floor((scale.isHorizontal() ? scale.width || 500 : scale.height || 300) / 70));
        scale.ticks = ticksOf(scale.options.kind, scale.min, scale.max, Math.min(most, 7));
      },
      ticks: { callback(value, _, ticks) { return tickLabel(ticks.find((t) => t.value === value).label, this.options.unit); },
               maxRotation: 0, font: { size: small ? 10 : 12 } },
      title: { display: true, font: { size: small ? 11 : 13 } },
    });
    this.chart = new Chart(this.canvas, {
      type: "scatter",
      data: { datasets: [] },
      plugins: [bars],
      options: {
        animation: false, responsive: true, maintainAspectRatio: false, events: ["mousemove", "mouseout", "click", "touchstart"],
        interaction: { mode: "nearest", intersect: false, axis: "xy" },
        scales: { x: axis(), y: axis() },
        plot: { crowded: false },
        plugins: { legend: { display: false }, tooltip: { enabled: false, external: ({ tooltip }) => this.hover(tooltip) } },
        onClick: (event, found) => { if (this.near(event, found)) pick(found[0].element.$context.raw.m); },
      },
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event, speak));
    this.canvas.addEventListener("blur", () => this.leave());
  }

  near(event, found) {
    return found.length && Math.hypot(found[0].element.x - event.x, found[0].element.y - event.y) < 24;
  }

  // What to plot: quantities x and y, their scales, visible groups, what a search found (or null), models A and B.
  set({ x, y, xs, ys, visible, found, chosen }) {
    Object.assign(this, { x, y });
    const { models, groups } = this.data, look = getComputedStyle(document.documentElement);
    const [ink, line, rim] = ["--ink", "--line", "--rim"].map((name) => look.getPropertyValue(name));
    const sets = groups.map(([, colour]) => ({ data: [], backgroundColor: [], pointStyle: [], colour, borderLine: colour + "99" }));
    const marked = { data: [], backgroundColor: [], pointStyle: [], strong: true, borderLine: ink, order: -1 };
    const tx = SCALES[xs].to, ty = SCALES[ys].to;
    const value = (to, v) => (v === null ? null : to(v));
    this.points = [];
    for (const [m, i] of y.place) {
      const j = x.place.get(m), group = models.group[m];
      if (j === undefined || !visible[group]) continue;
      const point = { m, i, j, x: tx(x.v[j]), y: ty(y.v[i]), xl: value(tx, x.low(j)), xh: value(tx, x.high(j)),
                      yl: value(ty, y.low(i)), yh: value(ty, y.high(i)) };
      this.points.push(point);
      const stands = chosen.includes(m) || (found && found.has(m));
      const set = stands ? marked : sets[group];
      set.data.push(point);
      set.backgroundColor.push(groups[group][1] + (found && !stands ? "40" : ""));
      set.pointStyle.push(SHAPES[models.family[m]]);
    }
    this.points.sort((a, b) => a.x - b.x);
    const radius = (this.small ? 0.8 : 1) * (this.points.length > 600 ? 3 : this.points.length > 100 ? 4 : 6);
    for (const set of [...sets, marked]) set.hoverBackgroundColor = set.backgroundColor;
    for (const set of sets) Object.assign(set, { radius, hoverRadius: radius + 2, borderColor: rim, borderWidth: 0.8 });
    Object.assign(marked, { radius: radius + 2.5, hoverRadius: radius + 4, borderColor: ink, borderWidth: 1.5 });
    this.chart.data.datasets = [...sets, marked];
    const { options } = this.chart;
    options.plot.crowded = this.points.length > MOST_BARS;
    const ends = options.plot.crowded ? ["", "", ""] : ["", "l", "h"]; // what is drawn must fit: bars too
    for (const [name, quantity, kind] of [["x", x, xs], ["y", y, ys]]) {
      const axis = options.scales[name];
      const values = this.points.flatMap((p) => ends.map((end) => p[name + end])).filter((v) => v !== null);
      const low = Math.min(...values), high = Math.max(...values), pad = 0.06 * (high - low) || 0.1;
      Object.assign(axis, { kind, unit: quantity.u, min: values.length ? low - pad : 0, max: values.length ? high + pad : 1 });
      Object.assign(axis.title, { text: this.heading(quantity, kind, name), color: ink });
      axis.ticks.color = ink;
      axis.grid = { color: line };
    }
    this.at = -1;
    this.leave();
    this.chart.update("none");
    this.canvas.setAttribute("aria-label", `Scatter of ${this.points.length} models: ${y.t} against ${x.t}`);
  }

  // In a small plot the control above it names y.
  heading(quantity, kind, axis) {
    const unit = { percent: "%", points: "points", number: "" }[quantity.u];
    const notes = [unit, kind === "linear" ? "" : kind + " scale"].filter(Boolean).join(", ");
    if (this.small && axis === "y") return notes;
    const room = (axis === "x" ? this.box.clientWidth - 60 : this.box.clientHeight - 40) / (this.small ? 6 : 7.5);
    const most = Math.max(12, Math.floor(room) - notes.length - 3);
    const text = quantity.t.length > most ? quantity.t.slice(0, most - 1) + "…" : quantity.t;
    return notes ? `${text} (${notes})` : text;
  }

  hover(tooltip) {
    const point = tooltip.opacity && tooltip.dataPoints && tooltip.dataPoints[0];
    if (!point) return this.leave();
    const element = point.element;
    this.tell(point.raw, element.x, element.y);
  }

  lines(point) {
    const { x, y } = this, title = this.data.models.title[point.m];
    return [title, this.data.groups[this.data.models.group[point.m]][0], y.t + ": " + y.say(point.i), x.t + ": " + x.say(point.j)];
  }

  tell(point, px, py) {
    const lines = this.lines(point);
    this.readout.replaceChildren(...lines.map((text, k) => {
      const part = document.createElement(k ? "span" : "strong");
      part.textContent = text;
      return part;
    }));
    this.readout.hidden = false;
    const width = this.readout.offsetWidth, height = this.readout.offsetHeight, room = this.box.clientWidth;
    this.readout.style.left = Math.max(0, Math.min(px + 12, room - width)) + "px";
    this.readout.style.top = (py + 14 + height > this.box.clientHeight ? Math.max(0, py - height - 12) : py + 14) + "px";
  }

  leave() { this.readout.hidden = true; }

  key(event, speak) {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (event.key === "Escape") { this.at = -1; return this.leave(); }
    if (event.key === "Enter" && this.at >= 0) { event.preventDefault(); return this.pick(this.points[this.at].m); }
    if (!step || !this.points.length) return;
    event.preventDefault();
    this.at = (this.at + step + (this.at < 0 && step < 0 ? 1 : 0) + this.points.length) % this.points.length;
    const point = this.points[this.at], { x, y } = this.chart.scales;
    this.tell(point, x.getPixelForValue(point.x), y.getPixelForValue(point.y));
    speak(this.lines(point).join("; "));
  }
}
