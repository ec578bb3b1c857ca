// Charts over time, on canvases: one axis for all of them, one cursor through all of them.

import { ago } from "./format.js";

const BOTTOM = 20;
const TOP = 8;
// Seconds that are further apart than this are not joined: nothing is known of what lies between.
const GAP_S = 2.6;

// Colours come from the style sheet, so that light and dark are decided there alone.
export const theme = {
  read() {
    const style = getComputedStyle(document.documentElement);
    this.color = (name) => style.getPropertyValue(`--${name}`).trim();
    this.cache = Object.fromEntries(
      ["fg", "soft", "line", "track", "card", "heat", "c1", "c2", "c3", "c4", "c5", "c6", "c7"].map((name) => [name, this.color(name)]),
    );
    return this;
  },
  get(name) {
    return (this.cache ?? this.read().cache)[name];
  },
};

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export function setText(node, text) {
  if (node && node.textContent !== text) node.textContent = text;
}

// A figure with a title, a legend whose entries show values, and a canvas that knows its size.
export class Figure {
  constructor(id, { title, note = "", legend = [], label }) {
    this.root = document.getElementById(id);
    this.note = element("span", {}, note);
    this.values = new Map();
    this.legend = element("ul", { class: "legend" });
    legend.forEach((entry) => this.legendEntry(entry));
    this.label = label;
    this.canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": `${title}. ${label}` });
    this.root.append(
      element("figcaption", {}, element("h2", {}, title, this.note), this.legend),
      this.canvas,
    );
    this.title = title;
    this.height = 0;
    new ResizeObserver(() => this.redraw?.()).observe(this.canvas);
  }

  legendEntry({ key, name, color, kind = "", title }) {
    const value = element("b", {}, "");
    this.values.set(key, value);
    const swatch = color ? element("i", { class: `k${color} ${kind}` }) : null;
    this.legend.append(element("li", { title }, swatch, name, value));
  }

  show(key, text) {
    setText(this.values.get(key), text);
  }

  // A context in CSS pixels, cleared.
  begin() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = "11px system-ui, sans-serif";
    this.width = width;
    this.height = height;
    return context;
  }

  say(text) {
    this.canvas.setAttribute("aria-label", `${this.title}. ${text}`);
  }
}

// `paint(plot, seconds)` draws the data; `tell(second)` says one second's values in the legend and in words.
export class TimeChart extends Figure {
  constructor(id, options, cursor) {
    super(id, options);
    this.options = options;
    this.cursor = cursor;
    this.seconds = [];
    cursor.charts.push(this);
    this.canvas.addEventListener("pointermove", (event) => cursor.move(this.timeAt(event.offsetX)));
    this.canvas.addEventListener("pointerdown", (event) => cursor.move(this.timeAt(event.offsetX)));
    this.canvas.addEventListener("pointerleave", () => cursor.leave());
    this.canvas.addEventListener("blur", () => cursor.leave());
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    const ends = { Home: 0, End: this.seconds.length - 1 };
    if (event.key === "Escape") this.cursor.leave();
    else if (step !== undefined) this.cursor.step(this.seconds, step);
    else if (event.key in ends) this.cursor.move(this.seconds[ends[event.key]]?.time);
    else return;
    event.preventDefault();
  }

  timeAt(x) {
    return this.now - this.windowS * (1 - x / Math.max(1, this.width));
  }

  // The axis grows with what there is to show, a minute at a time, up to the window that was asked for.
  draw(seconds, now, mostS) {
    const knownS = seconds.length ? now - seconds[0].time : 0;
    const windowS = Math.min(mostS, Math.max(60, 60 * Math.ceil(knownS / 60)));
    Object.assign(this, { seconds, now, windowS });
    this.redraw();
  }

  redraw() {
    if (this.now === undefined) return;
    const context = this.begin();
    const plot = new Plot(context, this.width, this.height, this.now, this.windowS);
    this.options.paint(plot, this.seconds, this);
    plot.times();
    const at = this.cursor.second(this.seconds);
    if (at && this.cursor.time !== null) plot.cursor(at.time);
    const words = at ? this.options.tell(at, this) : "nothing yet";
    setText(this.note, this.cursor.time !== null && at ? ago(this.now - at.time) : this.options.note ?? "");
    this.say(`${this.cursor.time !== null && at ? ago(this.now - at.time) + ": " : ""}${words}`);
  }
}

// One moment, looked at in all charts; null is the newest second.
export class Cursor {
  constructor() {
    this.time = null;
    this.charts = [];
  }

  second(seconds) {
    if (this.time === null) return seconds.at(-1);
    let best;
    for (const one of seconds) {
      if (!best || Math.abs(one.time - this.time) < Math.abs(best.time - this.time)) best = one;
    }
    return best;
  }

  move(time) {
    if (time === undefined) return;
    this.time = time;
    this.redraw();
  }

  step(seconds, by) {
    const index = seconds.indexOf(this.second(seconds)) + (this.time === null && by > 0 ? 0 : by);
    this.move(seconds[Math.max(0, Math.min(seconds.length - 1, index))]?.time);
  }

  leave() {
    if (this.time === null) return;
    this.time = null;
    this.redraw();
  }

  redraw() {
    this.charts.forEach((chart) => chart.redraw());
  }
}

export class Plot {
  constructor(context, width, height, now, windowS) {
    Object.assign(this, { context, width, height, now, windowS });
    this.bottom = height - BOTTOM;
    this.secondWidth = width / windowS;
  }

  x(time) {
    return this.width * (1 - (this.now - time) / this.windowS);
  }

  // A second ends at its time: this is where its cell begins.
  cell(second) {
    // On whole pixels, so that neighbours neither overlap nor leave a line between them.
    const right = Math.round(Math.min(this.width, this.x(second.time)));
    const left = Math.round(Math.max(0, this.x(second.time - second.span)));
    return [left, Math.max(1, right - left)];
  }

  linear(most) {
    const top = nice(Math.max(most, 1e-9));
    this.y = (value) => this.bottom - (value / top) * (this.bottom - TOP);
    return top;
  }

  log(least, most) {
    const low = Math.log(least);
    const span = Math.log(most) - low;
    this.y = (value) => this.bottom - ((Math.log(Math.max(value, least)) - low) / span) * (this.bottom - TOP);
  }

  // Lines across, each with what it stands for.
  grid(values, text) {
    const { context } = this;
    context.lineWidth = 1;
    context.strokeStyle = theme.get("line");
    for (const value of values) {
      const y = Math.round(this.y(value)) + 0.5;
      context.beginPath();
      context.moveTo(0, y);
      context.lineTo(this.width, y);
      context.stroke();
    }
    // After the lines and before the data, which may cover them.
    this.labels = values.map((value) => [this.y(value), text(value)]);
  }

  writeLabels() {
    const { context } = this;
    context.textAlign = "left";
    context.lineJoin = "round";
    context.lineWidth = 3;
    context.strokeStyle = theme.get("card");
    context.fillStyle = theme.get("soft");
    let before = Infinity;
    for (const [y, text] of (this.labels ?? []).sort((one, other) => other[0] - one[0])) {
      if (before - y < 15) continue; // they would stand in each other
      before = y;
      // Above its line, but for the uppermost one.
      const above = y > 14;
      context.textBaseline = above ? "bottom" : "top";
      context.strokeText(text, 2, above ? y - 1 : y + 3);
      context.fillText(text, 2, above ? y - 1 : y + 3);
    }
  }

  times() {
    this.writeLabels();
    const { context } = this;
    const step = this.windowS > 120 ? 60 : this.windowS > 60 ? 30 : 15;
    context.fillStyle = theme.get("soft");
    context.textBaseline = "alphabetic";
    for (let back = 0; back < this.windowS; back += step) {
      context.textAlign = back === 0 ? "right" : "center";
      const text = back === 0 ? "now" : step === 60 ? `−${back / 60} min` : `−${back} s`;
      context.fillText(text, this.x(this.now - back), this.height - 5);
    }
  }

  // Runs of seconds without a gap.
  runs(seconds) {
    const runs = [];
    let before;
    for (const second of seconds) {
      if (!before || second.time - before.time > GAP_S) runs.push([]);
      runs.at(-1).push(second);
      before = second;
    }
    return runs;
  }

  line(seconds, of, color, { width = 1.6, fill = false } = {}) {
    const { context } = this;
    context.strokeStyle = context.fillStyle = theme.get(color);
    context.lineWidth = width;
    context.lineJoin = "round";
    for (const run of this.runs(seconds.filter((second) => of(second) != null))) {
      const points = run.map((second) => [this.x(second.time), this.y(of(second))]);
      // A second by itself is a line too.
      if (points.length === 1) points.unshift([points[0][0] - this.secondWidth, points[0][1]]);
      context.beginPath();
      points.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.stroke();
      if (fill) {
        context.lineTo(points.at(-1)[0], this.bottom);
        context.lineTo(points[0][0], this.bottom);
        context.globalAlpha = 0.14;
        context.fill();
        context.globalAlpha = 1;
      }
    }
  }

  block(second, upper, lower, color, alpha = 1) {
    const [x, width] = this.cell(second);
    this.context.globalAlpha = alpha;
    this.context.fillStyle = color;
    this.context.fillRect(x, upper, width, lower - upper);
    this.context.globalAlpha = 1;
  }

  cursor(time) {
    const x = Math.round(this.x(time)) + 0.5;
    this.context.strokeStyle = theme.get("fg");
    this.context.lineWidth = 1;
    this.context.globalAlpha = 0.6;
    this.context.beginPath();
    this.context.moveTo(x, 0);
    this.context.lineTo(x, this.bottom);
    this.context.stroke();
    this.context.globalAlpha = 1;
  }
}

// The next number above that people can halve.
export function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 6, 8, 10].find((step) => value <= step * power * 1.0001);
}
