// Line charts on a canvas: hover, zoom, smoothing, log axis, legend, PNG and CSV. Loaded by copd_nb.view.charts.
const LEFT = 58, RIGHT = 12, TOP = 24, BOTTOM = 36, GAP = 30;

function made(tag, props = {}, ...children) {
  const e = Object.assign(document.createElement(tag), props);
  e.append(...children);
  return e;
}

export function ticks(low, high, most) {
  const raw = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= raw) ?? raw, found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(+v.toPrecision(12));
  return found;
}

function logTicks(low, high) {  // exponents of ten; fewer than two of them: ordinary ticks
  const found = [];
  for (let e = Math.ceil(low - 1e-9); e <= high + 1e-9; e++) found.push(e);
  return found.length > 1 ? found : ticks(10 ** low, 10 ** high, 4).filter(v => v > 0).map(Math.log10);
}

export function short(v) {
  const size = Math.abs(v);
  if (!Number.isFinite(v)) return "–";
  if (size >= 1e4 || (size && size < 1e-3)) return v.toExponential(1).replace("e+", "e");
  return String(+v.toPrecision(4));
}

export function smooth(y, weight) {  // exponential moving average without the bias of its start, as in TensorBoard
  let mean = 0, share = 0;
  return weight ? y.map(v => Number.isFinite(v)
    ? (mean = weight * mean + (1 - weight) * v, share = weight * share + 1 - weight, mean / share) : v) : y;
}

function unpacked(spec, bytes) {
  const sum = (spec.panels ?? []).flatMap(p => p.lines).reduce((s, l) => s + l.n * (l.band ? 4 : 2), 0);
  if (!bytes || sum * 8 !== bytes.byteLength) return null;  // names and numbers of two moments
  // float64: x, y and, with a band, low, high of each line, one after the other
  const all = new Float64Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  let at = 0;
  const next = n => all.slice(at, at += n);
  return (spec.panels ?? []).map(p => ({...p, lines: p.lines.map(l => ({...l, x: next(l.n), y: next(l.n),
    low: l.band ? next(l.n) : null, high: l.band ? next(l.n) : null}))}));
}

function nearest(xs, x) {  // position of the value next to x in a sorted array
  let a = 0, b = xs.length - 1;
  while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < x) a = m; else b = m; }
  return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
}

class Chart {
  constructor(model, el) {
    Object.assign(this, {model, el, hidden: new Set(), zoom: null, cursor: null, drag: null, weight: 0, log: false});
    this.canvas = made("canvas", {tabIndex: 0});
    this.canvas.setAttribute("role", "img");
    this.said = made("output", {className: "said"});
    this.tip = made("div", {className: "tip", hidden: true});
    this.legend = made("div", {className: "legend"});
    this.legend.setAttribute("role", "group");
    this.legend.setAttribute("aria-label", "lines");
    const box = made("div", {className: "box"}, this.canvas, this.tip);
    el.classList.add("copd", "copd-chart");
    el.append(this.toolbar(), box, this.said, this.legend);
    this.listen();
    this.take();
  }

  toolbar() {
    const range = made("input", {type: "range", min: 0, max: 0.99, step: 0.01, value: 0});
    const log = made("input", {type: "checkbox"}), shown = made("span", {textContent: "0"});
    range.oninput = () => { this.weight = +range.value; shown.textContent = range.value; this.take(); };
    log.onchange = () => { this.log = log.checked; this.draw(); };
    const button = (name, title, act) => {
      const b = made("button", {type: "button", textContent: name, title, onclick: act});
      b.setAttribute("aria-label", title);
      return b;
    };
    const bar = made("div", {className: "bar-of-chart"}, made("label", {}, "smoothing ", range, shown),
      made("label", {}, log, " log axis"), button("+", "zoom in", () => this.scale(0.5)),
      button("−", "zoom out", () => this.scale(2)), button("all", "show all steps", () => this.reset()),
      button("PNG", "save the picture as PNG", () => this.png()), button("CSV", "save the values as CSV",
      () => this.csv()));
    bar.onkeydown = e => e.stopPropagation();  // JupyterLab takes arrow keys away from sliders
    bar.setAttribute("role", "toolbar");
    bar.setAttribute("aria-label", "chart");
    return bar;
  }

  listen() {
    const c = this.canvas, at = e => e.clientX - c.getBoundingClientRect().left;
    c.onpointerdown = e => { this.drag = [at(e), at(e)]; c.setPointerCapture(e.pointerId); };
    c.onpointermove = e => {
      if (this.drag) this.drag[1] = at(e);
      this.cursor = this.value(at(e));
      this.height = e.clientY - c.getBoundingClientRect().top;
      this.draw();
    };
    c.onpointerup = () => {
      const [a, b] = (this.drag ?? [0, 0]).map(v => this.value(v)).sort((m, n) => m - n);
      if (this.drag && Math.abs(this.drag[0] - this.drag[1]) > 5) this.zoom = [a, b];
      this.drag = null;
      this.draw();
    };
    c.onpointerleave = () => { if (!this.drag) { this.cursor = null; this.draw(); } };
    c.ondblclick = () => this.reset();
    c.onblur = () => { this.cursor = null; this.said.textContent = ""; this.draw(); };
    c.onkeydown = e => {
      const act = {ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1), Home: () => this.step(-Infinity),
        End: () => this.step(Infinity), "+": () => this.scale(0.5), "-": () => this.scale(2),
        Escape: () => this.reset()}[e.key];
      if (!act) return;
      e.preventDefault();
      e.stopPropagation();
      act();
    };
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.el);
    const themed = () => { this.ink = undefined; this.filled = ""; this.fill(); this.draw(); };
    this.themes = new MutationObserver(themed);
    this.themes.observe(document.body, {attributes: true, attributeFilter: ["data-jp-theme-light", "class"]});
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.scheme.onchange = themed;
    this.changed = () => this.take();
    for (const name of ["spec", "data"]) this.model.on(`change:${name}`, this.changed);
  }

  close() {
    this.sizes.disconnect();
    this.themes.disconnect();
    this.scheme.onchange = null;
    for (const name of ["spec", "data"]) this.model.off(`change:${name}`, this.changed);
  }

  take() {  // what the kernel sent
    const spec = this.model.get("spec"), data = this.model.get("data");
    const panels = unpacked(spec, data);
    if (!panels && this.panels) return;
    [this.spec, this.panels] = [spec, panels ?? []];
    for (const line of this.panels.flatMap(p => p.lines)) line.shown = smooth(line.y, this.weight);
    this.fill();
    this.draw();
  }

  fill() {  // the legend
    const looks = new Map(this.panels.flatMap(p => p.lines).map(l => [l.name, l]));
    const state = JSON.stringify([[...looks.values()].map(l => [l.name, l.color, l.dash]), [...this.hidden]]);
    if (state === this.filled) return;
    this.filled = state;
    this.legend.replaceChildren(...[...looks.values()].map(line => {
      const b = made("button", {type: "button", title: "show or hide; double-click shows this line alone"});
      b.setAttribute("aria-pressed", !this.hidden.has(line.name));
      b.append(this.swatch(line), line.name);
      b.onclick = () => { this.hidden.delete(line.name) || this.hidden.add(line.name); this.refill(b); };
      b.ondblclick = () => {
        this.hidden = new Set([...looks.keys()].filter(n => n !== line.name));
        this.refill(b);
      };
      return b;
    }));
  }

  refill(button) {
    const place = [...this.legend.children].indexOf(button);
    this.fill();
    this.legend.children[place]?.focus();
    this.paint();
  }

  swatch(line) {
    const c = made("canvas", {width: 44, height: 16}), ctx = c.getContext("2d");
    c.setAttribute("aria-hidden", "true");
    c.style.verticalAlign = "middle";
    this.pen(ctx, line, 2);
    ctx.beginPath();
    ctx.moveTo(0, 8);
    ctx.lineTo(44, 8);
    ctx.stroke();
    return c;
  }

  color(line) { return line.color === "#000000" ? this.ink ?? getComputedStyle(this.el).color : line.color; }

  pen(ctx, line, width) {
    ctx.strokeStyle = this.color(line);
    ctx.setLineDash(line.dash.map(v => v * width));
    ctx.lineWidth = width;
  }

  value(px) { return this.from + (px - LEFT) / (this.wide - LEFT - RIGHT) * (this.to - this.from); }
  place(x) { return LEFT + (x - this.from) / (this.to - this.from) * (this.wide - LEFT - RIGHT); }
  visible(panel) { return panel.lines.filter(l => !this.hidden.has(l.name)); }

  extent() {
    let low = Infinity, high = -Infinity;
    for (const line of this.panels.flatMap(p => this.visible(p))) if (line.n) {
      low = Math.min(low, line.x[0]);
      high = Math.max(high, line.x[line.n - 1]);
    }
    return low < high ? [low, high] : Number.isFinite(low) ? [low - 1, low + 1] : [0, 1];
  }

  reset() { this.zoom = null; this.draw(); }

  scale(factor) {
    const [low, high] = this.extent(), middle = this.cursor ?? (this.from + this.to) / 2;
    const half = (this.to - this.from) * factor / 2;
    const a = Math.max(low, middle - half), b = Math.min(high, middle + half);
    this.zoom = a <= low && b >= high ? null : b > a ? [a, b] : this.zoom;
    this.draw();
  }

  step(by) {  // the cursor to the next value
    [this.from, this.to] = this.zoom ?? this.extent();
    const xs = [...new Set(this.panels.flatMap(p => this.visible(p)).flatMap(l => [...l.x]))]
      .filter(x => x >= this.from && x <= this.to).sort((a, b) => a - b);
    if (!xs.length) return;
    const now = this.cursor === null ? (by > 0 ? -1 : xs.length) : nearest(xs, this.cursor);
    this.cursor = xs[Math.max(0, Math.min(xs.length - 1, now + by))];
    this.height = null;
    this.paint();
    this.said.textContent = this.tip.innerText.replaceAll("\n", ", ");
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.paint());
  }

  paint(ctx = null) {
    const begin = performance.now(), canvas = this.canvas, ratio = devicePixelRatio || 1;
    const tall = 250 + 165 * (Math.max(1, this.panels.length) - 1);
    this.wide = Math.max(240, canvas.parentElement.clientWidth);
    [canvas.width, canvas.height] = [this.wide * ratio, tall * ratio];
    canvas.style.height = tall + "px";
    ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    const style = getComputedStyle(this.el);
    [this.ink, this.paper] = [style.color, style.backgroundColor];
    [this.from, this.to] = this.zoom ?? this.extent();
    ctx.fillStyle = this.paper;
    ctx.fillRect(0, 0, this.wide, tall);
    ctx.font = "12px system-ui, sans-serif";
    const each = (tall - TOP - BOTTOM - GAP * (this.panels.length - 1)) / Math.max(1, this.panels.length);
    this.areas = this.panels.map((panel, i) => this.panel(ctx, panel, TOP + i * (each + GAP), each));
    this.bottom(ctx, tall);
    this.pointer(ctx, tall);
    canvas.setAttribute("aria-label", this.words());
    this.el.dataset.painted = (performance.now() - begin).toFixed(1);
  }

  words() {
    const names = [...new Set(this.panels.flatMap(p => this.visible(p)).map(l => l.name))];
    const first = names.slice(0, 6).join(", ") + (names.length > 6 ? ` and ${names.length - 6} more` : "");
    const what = this.panels.map(p => p.label).join("; ");
    return `${what} by ${this.spec.xlabel}: ${first}. Arrow keys read values, + and − zoom, Escape shows all.`;
  }

  bounds(panel) {
    let low = Infinity, high = -Infinity;
    for (const line of this.visible(panel)) for (const values of [line.shown, line.low, line.high]) {
      if (!values || (values !== line.shown && this.weight)) continue;
      for (let i = 0; i < line.n; i++) {
        const v = values[i];
        if (line.x[i] < this.from || line.x[i] > this.to || !Number.isFinite(v) || (this.log && v <= 0)) continue;
        if (v < low) low = v;
        if (v > high) high = v;
      }
    }
    if (low > high) [low, high] = this.log ? [0.1, 1] : [0, 1];
    if (this.log) [low, high] = [Math.log10(low), Math.log10(high)];
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 0.5;
    return [low - room, high + room];
  }

  panel(ctx, panel, top, tall) {
    const [low, high] = this.bounds(panel), right = this.wide - RIGHT;
    const y = v => top + tall - ((this.log ? Math.log10(v) : v) - low) / (high - low) * tall;
    ctx.save();
    ctx.beginPath();
    ctx.rect(LEFT, top, right - LEFT, tall);
    ctx.clip();
    ctx.fillStyle = "rgba(214,175,60,.2)";
    for (const [a, b] of panel.shades) ctx.fillRect(this.place(a), top, this.place(b) - this.place(a), tall);
    ctx.restore();
    ctx.fillStyle = ctx.strokeStyle = this.ink;
    ctx.textAlign = "right";
    ctx.textBaseline = "middle";
    for (const t of this.log ? logTicks(low, high) : ticks(low, high, tall / 34)) {
      const at = top + tall - (t - low) / (high - low) * tall;
      this.rule(ctx, LEFT, at, right, at, 0.18);
      ctx.fillText(short(this.log ? 10 ** t : t), LEFT - 6, at);
    }
    ctx.textAlign = "left";
    ctx.textBaseline = "top";
    ctx.save();
    ctx.beginPath();
    ctx.rect(LEFT, top, right - LEFT, tall);
    ctx.clip();
    for (const m of panel.marks) this.rule(ctx, this.place(m), top, this.place(m), top + tall, 0.7, [2, 3]);
    for (const line of this.visible(panel)) {
      if (line.low && !this.weight) this.band(ctx, line, y);
      if (this.weight) { ctx.globalAlpha = 0.22; this.line(ctx, line, line.y, y, 1); ctx.globalAlpha = 1; }
      this.line(ctx, line, line.shown, y, line.name === this.near ? 3.2 : 1.8);
    }
    ctx.restore();
    ctx.setLineDash([]);
    ctx.fillStyle = this.ink;
    ctx.textBaseline = "bottom";
    ctx.fillText(panel.label, LEFT, top - 5);
    return {panel, top, tall, y};
  }

  rule(ctx, x, y, x2, y2, alpha, dash = []) {
    ctx.save();
    ctx.globalAlpha = alpha;
    ctx.setLineDash(dash);
    ctx.lineWidth = 1;
    ctx.strokeStyle = this.ink;
    ctx.beginPath();
    ctx.moveTo(x, y);
    ctx.lineTo(x2, y2);
    ctx.stroke();
    ctx.restore();
  }

  line(ctx, line, values, y, width) {  // first, lowest, highest and last value of each column of pixels
    this.pen(ctx, line, width);
    ctx.beginPath();
    let column = null, open = false, low, high, last;
    const to = (px, v) => { open ? ctx.lineTo(px, y(v)) : ctx.moveTo(px, y(v)); open = true; };
    const flush = () => {
      if (column !== null && (low !== last || high !== last)) for (const v of [low, high, last]) to(column, v);
    };
    const dense = line.n > 2 * (this.wide - LEFT - RIGHT);
    for (let i = 0; i < line.n; i++) {
      const v = values[i];
      if (!Number.isFinite(v) || (this.log && v <= 0)) { flush(); column = null; open = false; continue; }
      const px = this.place(line.x[i]), at = dense ? Math.round(px) : px;
      if (at !== column) { flush(); to(at, v); column = at; low = high = v; }
      low = Math.min(low, v);
      high = Math.max(high, v);
      last = v;
    }
    flush();
    ctx.stroke();
    if (line.n < 2 && line.n) { ctx.fillStyle = this.color(line); ctx.fillRect(this.place(line.x[0]) - 3,
      y(values[0]) - 3, 6, 6); }
  }

  band(ctx, line, y) {
    ctx.save();
    ctx.globalAlpha = 0.16;
    ctx.fillStyle = this.color(line);
    ctx.beginPath();
    for (let i = 0; i < line.n; i++) ctx.lineTo(this.place(line.x[i]), y(line.high[i]));
    for (let i = line.n - 1; i >= 0; i--) ctx.lineTo(this.place(line.x[i]), y(line.low[i]));
    ctx.fill();
    ctx.restore();
  }

  bottom(ctx, tall) {
    ctx.textAlign = "center";
    ctx.textBaseline = "top";
    for (const t of ticks(this.from, this.to, (this.wide - LEFT) / 80)) {
      this.rule(ctx, this.place(t), tall - BOTTOM, this.place(t), tall - BOTTOM + 4, 0.7);
      ctx.fillText(short(t), this.place(t), tall - BOTTOM + 6);
    }
    ctx.fillText(this.spec.xlabel ?? "", (LEFT + this.wide) / 2, tall - 14);
    if (this.spec.shading) {
      ctx.textAlign = "right";
      ctx.fillText(this.spec.shading, this.wide - RIGHT, tall - 14);
    }
  }

  found() {  // value of each visible line next to the cursor, the nearest to the pointer first
    return this.areas.flatMap(({panel, top, tall, y}) => this.visible(panel).filter(l => l.n).map(l => {
      const i = nearest(l.x, this.cursor), v = l.shown[i];
      const inside = this.height == null || (this.height >= top - GAP / 2 && this.height <= top + tall + GAP / 2);
      return {line: l, panel, x: l.x[i], v, py: y(v), far: this.height == null ? 0 : Math.abs(y(v) - this.height), inside};
    })).filter(f => f.inside && Number.isFinite(f.v));
  }

  pointer(ctx, tall) {
    if (this.drag && Math.abs(this.drag[0] - this.drag[1]) > 5) {
      ctx.fillStyle = "rgba(120,120,120,.3)";
      ctx.fillRect(Math.min(...this.drag), TOP, Math.abs(this.drag[0] - this.drag[1]), tall - TOP - BOTTOM);
    }
    this.tip.hidden = true;
    this.near = null;
    if (this.cursor === null || !this.areas.length) return;
    const all = this.found();
    if (!all.length) return;
    const x = all.reduce((a, f) => Math.abs(f.x - this.cursor) < Math.abs(a - this.cursor) ? f.x : a, all[0].x);
    const most = 9, near = all.filter(f => f.x === x).sort((a, b) => a.far - b.far);
    this.near = this.height == null ? null : near[0].line.name;
    this.rule(ctx, this.place(x), TOP, this.place(x), tall - BOTTOM, 0.5);
    for (const f of near.slice(0, most)) {
      ctx.fillStyle = this.color(f.line);
      ctx.beginPath();
      ctx.arc(this.place(f.x), f.py, 3.5, 0, 7);
      ctx.fill();
    }
    const rows = near.slice(0, most).map(f => made("div", {}, this.swatch(f.line), ` ${f.line.name}: ${short(f.v)}`
      + (this.panels.length > 1 && this.height == null ? ` (${f.panel.label})` : "")));
    if (near.length > most) rows.push(made("div", {}, `and ${near.length - most} more`));
    this.tip.replaceChildren(made("b", {}, `${this.spec.xname ?? "step"} ${short(x)}`), ...rows);
    this.tip.hidden = false;
    const left = this.place(x) + 14 + this.tip.offsetWidth > this.wide;
    this.tip.style.left = (left ? this.place(x) - this.tip.offsetWidth - 14 : this.place(x) + 14) + "px";
  }

  save(blob, ending) {
    const a = made("a", {href: URL.createObjectURL(blob), download: `${this.spec.file ?? "chart"}.${ending}`});
    document.body.append(a);
    a.click();
    a.remove();
    setTimeout(() => URL.revokeObjectURL(a.href), 5000);
  }

  png() {  // with a legend below
    const looks = [...new Map(this.panels.flatMap(p => this.visible(p)).map(l => [l.name, l])).values()];
    const ratio = devicePixelRatio || 1, row = 20, per = Math.max(1, Math.floor(this.wide / 260));
    const out = made("canvas", {width: this.canvas.width,
      height: this.canvas.height + Math.ceil(looks.length / per) * row * ratio + 8}), ctx = out.getContext("2d");
    ctx.fillStyle = this.paper;
    ctx.fillRect(0, 0, out.width, out.height);
    ctx.drawImage(this.canvas, 0, 0);
    ctx.scale(ratio, ratio);
    ctx.font = "12px system-ui, sans-serif";
    looks.forEach((line, i) => {
      const x = 10 + i % per * 260, y = this.canvas.height / ratio + 10 + Math.floor(i / per) * row;
      this.pen(ctx, line, 2);
      ctx.beginPath();
      ctx.moveTo(x, y);
      ctx.lineTo(x + 34, y);
      ctx.stroke();
      ctx.fillStyle = this.ink;
      ctx.fillText(line.name, x + 42, y + 4, 210);
    });
    out.toBlob(blob => this.save(blob, "png"));
  }

  csv() {  // the values as logged, of the lines that are shown
    const cell = v => /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v;
    const rows = [["metric", "line", this.spec.xname ?? "step", "value"]];
    for (const p of this.panels) for (const l of this.visible(p))
      for (let i = 0; i < l.n; i++) rows.push([p.name, l.name, l.x[i], l.y[i]]);
    this.save(new Blob([rows.map(r => r.map(cell).join(",")).join("\n") + "\n"], {type: "text/csv"}), "csv");
  }
}

export default {render({model, el}) { const chart = new Chart(model, el); return () => chart.close(); }};
