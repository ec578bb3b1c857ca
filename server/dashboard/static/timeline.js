// The last batches one by one: packing, run and answer of each, and the gaps of the engine.

import { Figure } from "./charts.js";
import { element, setText, theme } from "./dom.js";
import { count, duration, percent } from "./format.js";

// A batch as the server sends it (dashboard/seconds.py). Times are in microseconds since the first batch was gathered.
const FIELDS = [
  "gathered", "dispatched", "started", "finished", "answering", "answered",
  "rows", "requests", "reason", "lane", "slot", "oldest", "number", "failed", "id",
];
const LABEL = 74;
const TRACK = 26;
const SPACE = 10;
const AXIS = 22;

export class Timeline extends Figure {
  // `explain` is called with the id of a batch's first request.
  constructor(id, explain) {
    super(id, {
      title: "The last batches",
      label: "Times at which the last batches were packed, ran and were answered",
      legend: [
        { key: "packing", name: "packing", color: "2" },
        { key: "ready", name: "waits for engine", color: "6" },
        { key: "compute", name: "compute", color: "1" },
        { key: "delivery", name: "delivery", color: "3" },
        { key: "busy", name: "engine busy" },
        { key: "gaps", name: "idle gaps" },
      ],
    });
    this.about = element("p", { class: "about", role: "status" });
    this.root.append(this.about);
    this.explain = explain;
    this.limit = 40;
    this.root.querySelector("figcaption").append(this.zoom());
    this.words = {};
    this.batches = [];
    this.chosen = null;
    this.canvas.addEventListener("pointermove", (event) => this.choose(this.at(event.offsetX)));
    this.canvas.addEventListener("pointerdown", (event) => this.choose(this.at(event.offsetX)));
    this.canvas.addEventListener("click", () => this.ask());
    this.canvas.addEventListener("pointerleave", () => this.choose(null));
    this.canvas.addEventListener("blur", () => this.choose(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  zoom() {
    const sizes = [40, 20, 8];
    const buttons = sizes.map((size) => element("button", { type: "button", "aria-pressed": String(size === this.limit) }, String(size)));
    buttons.forEach((button, index) => button.addEventListener("click", () => {
      this.limit = sizes[index];
      buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
      this.redraw();
    }));
    return element("div", { class: "switch small", role: "group", "aria-label": "Number of batches" }, ...buttons);
  }

  ask() {
    if (this.chosen !== null) this.explain(this.shown[this.chosen].id);
  }

  // The timeline does not move while a batch is selected.
  take(sent) {
    if (this.chosen !== null) return;
    this.batches = (sent ?? []).map((values) => Object.fromEntries(FIELDS.map((name, index) => [name, values[index]])));
    this.redraw();
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.choose(null);
    else if (event.key === "Enter") this.ask();
    else if (event.key === "Home") this.choose(0);
    else if (event.key === "End") this.choose(this.shown.length - 1);
    else if (step !== undefined) this.choose((this.chosen ?? (step > 0 ? -1 : this.shown.length)) + step);
    else return;
    event.preventDefault();
  }

  choose(index) {
    const last = this.shown.length - 1;
    this.chosen = index === null || last < 0 ? null : Math.max(0, Math.min(last, index));
    this.redraw();
  }

  // The batch with the nearest run.
  at(x) {
    const time = ((x - LABEL) / Math.max(1, this.width - LABEL)) * this.span + this.from;
    let found = null;
    let nearest = Infinity;
    this.shown.forEach((one, index) => {
      const away = Math.max(one.started - time, time - one.finished, 0);
      if (away < nearest) [found, nearest] = [index, away];
    });
    return found;
  }

  get shown() {
    return this.batches.slice(-this.limit);
  }

  redraw() {
    if (!this.batches.length) return this.nothing();
    const batches = this.shown;
    this.lanes = [...new Set(batches.map((one) => one.lane))].sort();
    const tracks = 1 + this.lanes.length;
    this.canvas.style.height = `${tracks * (TRACK + SPACE) + AXIS}px`;
    const context = this.begin();
    this.from = Math.min(...batches.map((one) => one.gathered));
    this.span = Math.max(1, Math.max(...batches.map((one) => one.answered)) - this.from);
    this.axis(context);
    this.trackName(context, 0, "event loop");
    this.lanes.forEach((lane, index) => {
      this.trackName(context, index + 1, this.lanes.length > 1 ? `engine ${lane + 1}` : "engine");
      this.bar(context, index + 1, this.from, this.from + this.span, theme.get("track"));
    });
    batches.forEach((one, index) => this.batch(context, one, index));
    this.summary();
  }

  nothing() {
    this.begin();
    setText(this.about, "No batch has run yet.");
    this.say("No batch has run yet.");
  }

  x(time) {
    return LABEL + ((time - this.from) / this.span) * (this.width - LABEL);
  }

  bar(context, track, from, to, color, { alpha = 1, inset = 0, gap = 0 } = {}) {
    const x = this.x(from);
    context.globalAlpha = alpha;
    context.fillStyle = color;
    const width = Math.max(0.75, this.x(to) - x - gap);
    context.fillRect(x, track * (TRACK + SPACE) + inset, width, TRACK - 2 * inset);
    context.globalAlpha = 1;
    return [x, width];
  }

  batch(context, one, index) {
    const dim = this.chosen !== null && this.chosen !== index ? 0.28 : 1;
    const engine = 1 + this.lanes.indexOf(one.lane);
    this.bar(context, 0, one.gathered, one.dispatched, theme.get("c2"), { alpha: dim });
    this.bar(context, 0, one.answering, one.answered, theme.get("c3"), { alpha: dim });
    if (one.started > one.dispatched) {
      this.bar(context, engine, one.dispatched, one.started, theme.get("c6"), { alpha: 0.55 * dim, inset: 10 });
    }
    const color = theme.get(one.failed ? "c5" : "c1");
    const [x, width] = this.bar(context, engine, one.started, one.finished, color, { alpha: dim, gap: 1 });
    const text = count(one.rows);
    if (width > context.measureText(text).width + 8) {
      context.fillStyle = theme.get("card");
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillText(text, x + width / 2, engine * (TRACK + SPACE) + TRACK / 2 + 0.5);
    }
  }

  trackName(context, track, text) {
    context.fillStyle = theme.get("soft");
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillText(text, 3, track * (TRACK + SPACE) + TRACK / 2);
  }

  axis(context) {
    const bottom = (1 + this.lanes.length) * (TRACK + SPACE);
    const power = 10 ** Math.floor(Math.log10(this.span / 4));
    const step = [1, 2, 5, 10].map((one) => one * power).find((one) => this.span / one <= (this.width < 500 ? 4 : 8)) ?? this.span;
    context.textBaseline = "top";
    for (let time = 0; time <= this.span; time += step) {
      const x = this.x(this.from + time);
      if (x > this.width - 20) break;
      context.fillStyle = theme.get("line");
      context.fillRect(Math.round(x), 0, 1, bottom);
      context.fillStyle = theme.get("soft");
      context.textAlign = time ? "center" : "left";
      context.fillText(time ? duration(time / 1e6) : "0", x, bottom + 3);
    }
  }

  // A gap is the time between two runs of an engine.
  summary() {
    const gaps = [];
    let busy = 0;
    let whole = 0;
    for (const lane of this.lanes) {
      const runs = this.shown.filter((one) => one.lane === lane).sort((a, b) => a.started - b.started);
      busy += runs.reduce((total, one) => total + one.finished - one.started, 0);
      whole += runs.at(-1).finished - runs[0].started;
      runs.slice(1).forEach((one, index) => gaps.push(Math.max(0, one.started - runs[index].finished)));
    }
    const seen = gaps.filter((gap) => gap >= 1);
    const longest = Math.max(0, ...gaps);
    setText(this.note, `${count(this.shown.length)} batches in ${duration(this.span / 1e6)}`);
    this.show("busy", percent(whole ? busy / whole : 0));
    this.show("gaps", seen.length ? `${count(seen.length)}, longest ${duration(longest / 1e6)}` : "none");
    const about = this.chosen === null ? this.hint() : described(this.shown[this.chosen], this.words);
    setText(this.about, about);
    this.say(`${this.note.textContent}; the engine was busy ${percent(whole ? busy / whole : 0)}. ${about}`);
  }

  hint() {
    return "Point at a batch, or use the arrow keys, to see its times; click or press Enter to explain one of its requests.";
  }
}

const span = (from, to) => duration(Math.max(0, to - from) / 1e6);

function described(one, words) {
  const requests = one.requests === 1 ? "1 request" : `${count(one.requests)} requests`;
  const parts = [
    `Batch ${one.number}: ${count(one.rows)} rows of ${requests}`,
    `dispatched because ${words[one.reason] ?? one.reason}`,
    `longest wait in the queue ${duration(one.oldest / 1e6)}`,
    `packed in ${span(one.gathered, one.dispatched)}`,
    `waited for the engine ${span(one.dispatched, one.started)}`,
    one.failed ? `failed after ${span(one.started, one.finished)}` : `ran ${span(one.started, one.finished)}`,
    `waited for the event loop ${span(one.finished, one.answering)}`,
    `answered in ${span(one.answering, one.answered)}`,
  ];
  return parts.join(" · ");
}
