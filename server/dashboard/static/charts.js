// Charts over time, drawn on canvases, with a common time axis and a common cursor.

import { element, setText } from "./dom.js";
import { ago } from "./format.js";
import { Plot } from "./plot.js";

// A figure with a title, a legend with values, and a canvas.
export class Figure {
  constructor(id, { title, note = "", legend = [], label }) {
    this.root = document.getElementById(id);
    this.note = element("span", {}, note);
    this.values = new Map();
    this.legend = element("ul", { class: "legend" });
    legend.forEach((entry) => this.legendEntry(entry));
    this.canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": `${title}. ${label}` });
    this.root.append(
      element("figcaption", {}, element("h2", {}, title, this.note), this.legend),
      this.canvas,
    );
    this.title = title;
    this.height = 0;
    new ResizeObserver(() => this.redraw?.()).observe(this.canvas);
  }

  legendEntry({ key, name, color, kind = "" }) {
    const value = element("b", {}, "");
    this.values.set(key, value);
    const swatch = color ? element("i", { class: `k${color} ${kind}` }) : null;
    this.legend.append(element("li", {}, swatch, name, value));
  }

  show(key, text) {
    setText(this.values.get(key), text);
  }

  // Clears the canvas and returns its context, in CSS pixels.
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

// `paint(plot, seconds)` draws the data; `tell(second)` fills the legend for one second and returns it in words.
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

  // The axis grows minute by minute with the data, up to the chosen window.
  draw(seconds, now, limitS) {
    const dataS = seconds.length ? now - seconds[0].time : 0;
    const windowS = Math.min(limitS, Math.max(60, 60 * Math.ceil(dataS / 60)));
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
    const when = at && this.cursor.time !== null ? ago(this.now - at.time) : "";
    if (when) plot.cursor(at.time);
    const words = at ? this.options.tell(at, this) : "no data yet";
    setText(this.note, when || (this.options.note ?? ""));
    this.say(when ? `${when}: ${words}` : words);
  }
}

// The second that all charts show; null is the newest.
export class Cursor {
  constructor() {
    this.time = null;
    this.charts = [];
  }

  second(seconds) {
    if (this.time === null) return seconds.at(-1);
    let nearest;
    for (const one of seconds) {
      if (!nearest || Math.abs(one.time - this.time) < Math.abs(nearest.time - this.time)) nearest = one;
    }
    return nearest;
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
