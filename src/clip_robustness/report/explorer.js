"use strict";
// The explorer: what is chosen (the state) comes from the controls or from the address, and all plots follow it.

(function () {
  const source = document.getElementById("explorer-data");
  if (!source || typeof Chart === "undefined") return;
  const data = JSON.parse(source.textContent), { models } = data;
  const at = (id) => document.getElementById(id);

  for (const q of data.quantities) {
    q.place = new Map(q.m.map((m, i) => [m, i]));
    q.low = (i) => (q.l ? q.l[i] : null);
    q.high = (i) => (q.h ? q.h[i] : null);
    q.count = (i) => (Array.isArray(q.n) ? q.n[i] : q.n);
    q.say = (i) => show(q.v[i], q.low(i), q.high(i), q.u) + (q.count(i) === null ? "" : `, n = ${q.count(i).toLocaleString("en")}`);
    q.scales = Object.keys(SCALES).filter((name) => SCALES[name].fits(q.v, q.u));
    q.name = q.t + (q.c ? ` · ${q.c.replaceAll("_", " ")}` : "");
  }
  const byKey = new Map(data.quantities.map((q) => [q.k, q]));
  const counts = new Map();
  for (const title of models.title) counts.set(title, (counts.get(title) || 0) + 1);
  const names = models.title.map((title, m) => (counts.get(title) > 1 ? `${title} (${models.id[m]})` : title));
  const byName = new Map(names.map((name, m) => [name, m]));
  const byId = new Map(models.id.map((id, m) => [id, m]));
  const haystack = models.title.map((title, m) => `${title} ${models.id[m]}`.toLowerCase());

  const usual = (q) => (q.scales.includes("logit") ? "logit" : q.k.startsWith("model.") && q.scales.includes("log") ? "log" : "linear");
  function fresh() {
    const x = byKey.get(data.start.x), y = byKey.get(data.start.y);
    return { x, y, xs: usual(x), ys: usual(y), visible: data.groups.map(() => true), q: "", chosen: [], panels: data.panels.map((k) => byKey.get(k)) };
  }
  let state = fresh();

  // The address: everything that differs from the start, by names that stay.
  function address() {
    const start = fresh(), parts = new URLSearchParams();
    for (const axis of ["x", "y"]) {
      if (state[axis] !== start[axis]) parts.set(axis, state[axis].k);
      if (state[axis + "s"] !== usual(state[axis])) parts.set(axis + "s", state[axis + "s"]);
    }
    const hidden = data.groups.filter((_, g) => !state.visible[g]).map(([title]) => title);
    if (hidden.length) parts.set("hide", hidden.join("|"));
    if (state.q) parts.set("q", state.q);
    state.chosen.forEach((m, k) => parts.set("ab"[k], models.id[m]));
    state.panels.forEach((q, k) => { if (q.k !== data.panels[k]) parts.set("p" + k, q.k); });
    return parts.toString();
  }
  function remember() {
    const hash = "#" + address();
    if (hash !== location.hash && (hash !== "#" || location.hash.includes("="))) history.replaceState(null, "", hash);
  }
  function recall() {
    if (!location.hash.includes("=")) return false;
    const parts = new URLSearchParams(location.hash.slice(1));
    state = fresh();
    for (const axis of ["x", "y"]) {
      state[axis] = byKey.get(parts.get(axis)) || state[axis];
      const scale = parts.get(axis + "s");
      state[axis + "s"] = state[axis].scales.includes(scale) ? scale : usual(state[axis]);
    }
    const hidden = (parts.get("hide") || "").split("|");
    state.visible = data.groups.map(([title]) => !hidden.includes(title));
    state.q = parts.get("q") || "";
    state.chosen = ["a", "b"].map((k) => byId.get(parts.get(k))).filter((m) => m !== undefined);
    state.panels = state.panels.map((q, k) => byKey.get(parts.get("p" + k)) || q);
    return true;
  }

  function element(tag, text, facts) {
    const made = Object.assign(document.createElement(tag), facts || {});
    if (text !== undefined && text !== null) made.textContent = text;
    return made;
  }
  // `about` says what the options are of: they are made anew only when that changes.
  function fill(select, about, values, chosen) {
    if (select.dataset.about !== about) select.replaceChildren(...values().map(([value, text]) => element("option", text, { value })));
    select.dataset.about = about;
    select.value = chosen;
  }
  const ofAxis = (axis) => data.quantities.filter((q) => q.a === axis);

  function controls() {
    for (const axis of ["x", "y"]) {
      const q = state[axis];
      fill(at(axis + "-axis"), "axes", () => data.axes.map((a) => [a, a]), q.a);
      fill(at(axis + "-quantity"), q.a, () => ofAxis(q.a).map((o) => [o.k, `${o.name} (${o.m.length})`]), q.k);
      fill(at(axis + "-scale"), q.scales.join(), () => q.scales.map((s) => [s, s]), state[axis + "s"]);
    }
    at("groups").querySelectorAll("input").forEach((box, g) => { box.checked = state.visible[g]; });
    if (at("search").value !== state.q) at("search").value = state.q;
    ["model-a", "model-b"].forEach((id, k) => { at(id).value = state.chosen[k] === undefined ? "" : names[state.chosen[k]]; });
  }
  function choose(axis, q) {
    state[axis] = q;
    state[axis + "s"] = usual(q);
  }
  function pick(m) {
    if (state.chosen.includes(m)) state.chosen = state.chosen.filter((other) => other !== m);
    else state.chosen = [...state.chosen, m].slice(-2);
    at("spoken").textContent = `compared: ${state.chosen.map((other) => names[other]).join(" and ") || "none"}`;
    controls();
    render();
  }

  function search() {
    const wanted = state.q.trim().toLowerCase();
    if (!wanted) return null;
    const words = wanted.split(/\s+/);
    return new Set(haystack.flatMap((text, m) => (words.every((word) => text.includes(word)) ? [m] : [])));
  }

  // Plots: those on the screen follow at once, the others when they come into view.
  const plots = [];
  let later = 0;
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const plot = plots.find((p) => p.box === target);
      plot.seen = isIntersecting;
      if (isIntersecting) refresh(plot);
    }
  }, { rootMargin: "100px" });
  function refresh(plot) {
    if (!plot.stale) return;
    plot.stale = false;
    if (!plot.drawn) plot.drawn = new Plot(plot.box, data, pick, (text) => { at("spoken").textContent = text; }, plot.small);
    plot.drawn.set({ ...state, ...plot.what(), found: plot.found });
  }
  function addPlot(box, what, small) {
    plots.push({ box, what, small, stale: true, found: null, seen: false });
    watcher.observe(box);
  }

  function render() {
    const found = search();
    for (const plot of plots) Object.assign(plot, { stale: true, found });
    refresh(plots[0]);
    requestAnimationFrame(() => plots.filter((plot) => plot.seen).forEach(refresh));
    const shown = plots[0].drawn.points.length;
    at("summary").textContent = `${shown} of ${models.id.length} models have both values and are shown: ${state.y.name} against ${state.x.name}.`;
    at("found").textContent = found ? `${found.size} found: ${[...found].slice(0, 8).map((m) => names[m]).join(", ")}${found.size > 8 ? ", …" : ""}` : "";
    compare();
    clearTimeout(later);
    later = setTimeout(() => { if (at("plotted-details").open) plotted(); }, 80); // after what moves has been painted
    remember();
  }

  function row(tag, cells) {
    const line = element("tr");
    line.append(...cells.map((cell) => {
      const made = element(tag, cell instanceof Node ? null : cell);
      if (tag === "th") made.scope = "col";
      if (cell instanceof Node) made.append(cell);
      return made;
    }));
    return line;
  }
  function tabulate(table, title, head, rows) {
    const top = element("thead"), body = element("tbody");
    top.append(row("th", head));
    body.append(...rows.map((cells) => row("td", cells)));
    for (const line of body.children) [...line.children].forEach((cell, k) => { cell.dataset.label = head[k]; });
    table.replaceChildren(element("caption", title), top, body);
  }
  function button(m) {
    const made = element("button", names[m], { type: "button", className: "plain", title: "compare" });
    made.setAttribute("aria-pressed", state.chosen.includes(m));
    made.addEventListener("click", () => pick(m));
    return made;
  }
  function plotted() {
    const { x, y } = state, points = [...plots[0].drawn.points].sort((a, b) => y.v[b.i] - y.v[a.i]);
    tabulate(at("plotted"), `${points.length} models, the highest y first. A name adds the model to the comparison.`,
      ["model", "group", "y: " + y.name, "x: " + x.name, "card"],
      points.map((p) => [button(p.m), data.groups[models.group[p.m]][0], y.say(p.i), x.say(p.j),
        models.card[p.m] ? element("a", "card", { href: models.card[p.m] }) : ""]));
  }

  // Two intervals as lines on one scale, as wide as both together.
  function strip(values) {
    const make = (tag, facts) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
      return made;
    };
    const all = values.flat().filter((v) => v !== null), low = Math.min(...all), span = Math.max(...all) - low || 1;
    const svg = make("svg", { width: 120, height: 20, viewBox: "0 0 120 20", "aria-hidden": "true" });
    const place = (v) => 4 + (112 * (v - low)) / span;
    values.forEach(([v, l, h], k) => {
      const y = 6 + 8 * k, name = "strip-" + "ab"[k];
      if (l !== null) svg.append(make("line", { x1: place(l), x2: place(h), y1: y, y2: y, class: name }));
      svg.append(make("circle", { cx: place(v), cy: y, r: 3, class: name }));
    });
    return svg;
  }
  function differences() {
    const [a, b] = state.chosen;
    const wanted = at("every").checked ? data.quantities : data.panels.map((k) => byKey.get(k));
    return wanted.filter((q) => q.place.has(a) && q.place.has(b)).map((q) => {
      const i = q.place.get(a), j = q.place.get(b), d = q.v[i] - q.v[j];
      const known = q.low(i) !== null && q.low(j) !== null;
      const low = known ? d - Math.hypot(q.v[i] - q.low(i), q.high(j) - q.v[j]) : null;
      const high = known ? d + Math.hypot(q.high(i) - q.v[i], q.v[j] - q.low(j)) : null;
      return { q, i, j, d, low, high };
    });
  }
  function compare() {
    at("comparison").hidden = state.chosen.length < 2;
    if (state.chosen.length < 2) return;
    const [a, b] = state.chosen;
    at("h-comparison").textContent = `${names[a]} against ${names[b]}`;
    const unit = (q) => (q.u === "percent" ? "points" : q.u);
    tabulate(at("compared"), "A minus B, with 95 % intervals", ["axis", "quantity", "A: " + names[a], "B: " + names[b], "A − B", "A above, B below"],
      differences().map(({ q, i, j, d, low, high }) => [q.a, q.name, q.say(i), q.say(j),
        show(d, low, high, unit(q)),
        strip([[q.v[i], q.low(i), q.high(i)], [q.v[j], q.low(j), q.high(j)]])]));
  }

  function download(name, rows) {
    // A cell that a spreadsheet would run as a formula is made text.
    const cell = (v) => {
      if (v === null || v === undefined) return "";
      const text = typeof v === "string" && /^[=+\-@\t\r]/.test(v) ? "'" + v : String(v);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const blob = new Blob([rows.map((cells) => cells.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" });
    const link = element("a", null, { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  const HEAD = ["model", "title", "group", "axis", "quantity", "convention", "value", "low", "high", "n"];
  const line = (m, q, i) => [models.id[m], models.title[m], data.groups[models.group[m]][0], q.a, q.t, q.c, q.v[i], q.low(i), q.high(i), q.count(i)];

  function start() {
    for (const id of ["controls", "main-plot", "plot-help", "plotted-details"]) at(id).hidden = false;
    data.groups.forEach(([title, colour], g) => {
      const size = models.group.filter((other) => other === g).length;
      const label = element("label", null, { className: "check" }), box = element("input", null, { type: "checkbox" });
      const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      swatch.setAttribute("class", "swatch");
      swatch.setAttribute("aria-hidden", "true");
      swatch.setAttribute("fill", colour);
      swatch.append(document.createElementNS("http://www.w3.org/2000/svg", "circle"));
      box.addEventListener("change", () => { state.visible[g] = box.checked; render(); });
      label.append(box, swatch, ` ${title} (${size})`);
      at("groups").append(label);
    });
    at("model-names").append(...names.map((value) => element("option", null, { value })));
    for (const axis of ["x", "y"]) {
      at(axis + "-axis").addEventListener("change", (event) => {
        const key = data.panels.find((k) => byKey.get(k).a === event.target.value);
        choose(axis, byKey.get(key) || ofAxis(event.target.value)[0]);
        controls();
        render();
      });
      at(axis + "-quantity").addEventListener("change", (event) => { choose(axis, byKey.get(event.target.value)); controls(); render(); });
      at(axis + "-scale").addEventListener("change", (event) => { state[axis + "s"] = event.target.value; render(); });
    }
    at("search").addEventListener("input", (event) => { state.q = event.target.value; render(); });
    ["model-a", "model-b"].forEach((id, k) => at(id).addEventListener("change", () => {
      const named = ["model-a", "model-b"].map((other) => byName.get(at(other).value));
      state.chosen = [...new Set(named.filter((m) => m !== undefined))];
      if (named[k] === undefined) controls();
      render();
    }));
    at("controls").addEventListener("submit", (event) => event.preventDefault());
    at("clear").addEventListener("click", () => { state = fresh(); controls(); panels(); render(); });
    at("every").addEventListener("change", compare);
    at("plotted-details").addEventListener("toggle", () => { if (at("plotted-details").open) plotted(); });
    at("download").addEventListener("click", () => download("plotted.csv",
      [HEAD, ...plots[0].drawn.points.flatMap((p) => [line(p.m, state.y, p.i), line(p.m, state.x, p.j)])]));
    at("download-comparison").addEventListener("click", () => download("comparison.csv",
      [HEAD, ...differences().flatMap(({ q, i, j }) => [line(state.chosen[0], q, i), line(state.chosen[1], q, j)])]));
    window.addEventListener("hashchange", () => { if (recall()) { controls(); panels(); render(); at("explorer").scrollIntoView(); } });
    const themes = [matchMedia("(prefers-color-scheme: dark)"), matchMedia("print")];
    for (const theme of themes) theme.addEventListener("change", render);
    addPlot(at("main-plot"), () => ({}), false);
    const linked = recall();
    controls();
    panels();
    render();
    if (linked) at("explorer").scrollIntoView();
  }

  // One small plot an axis; all share the x-axis.
  function panels() {
    if (!at("panels").children.length)
      data.panels.forEach((_, k) => {
        const box = element("div", null, { className: "plot" }), select = element("select", null, { id: "panel-" + k });
        const label = element("label", byKey.get(data.panels[k]).a + " "), figure = element("div", null, { className: "panel" });
        const canvas = element("canvas", null, { tabIndex: 0 });
        canvas.setAttribute("role", "application");
        canvas.setAttribute("aria-roledescription", "scatter plot");
        canvas.setAttribute("aria-label", "Scatter of " + byKey.get(data.panels[k]).a);
        box.append(canvas, element("div", null, { className: "readout", hidden: true }));
        label.append(select);
        figure.append(label, box);
        at("panels").append(figure);
        select.addEventListener("change", () => { state.panels[k] = byKey.get(select.value); render(); });
        addPlot(box, () => ({ y: state.panels[k], ys: usual(state.panels[k]) }), true);
      });
    data.panels.forEach((_, k) => {
      const q = state.panels[k];
      fill(at("panel-" + k), q.a, () => ofAxis(q.a).map((o) => [o.k, o.name]), q.k);
    });
  }
  start();
})();
