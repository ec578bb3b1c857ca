// Charts over time, on canvases: one axis for all of them, one cursor through all of them.

import { element, setText } from "./dom.js";
import { ago } from "./format.js";
import { Plot } from "./plot.js";

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
