// Draws one chart: maps times and values to places on a canvas.

import { theme } from "./dom.js";

const BOTTOM = 20;
const TOP = 8;
// A line has a gap between seconds that are further apart than this.
const GAP_S = 2.6;

export class Plot {
  constructor(context, width, height, now, windowS) {
    Object.assign(this, { context, width, height, now, windowS });
    this.bottom = height - BOTTOM;
    this.secondWidth = width / windowS;
  }

  x(time) {
    return this.width * (1 - (this.now - time) / this.windowS);
  }

  // Left edge and width of a second, which ends at its time.
  cell(second) {
    // Whole pixels, so that neighbours neither overlap nor leave a gap.
    const right = Math.round(Math.min(this.width, this.x(second.time)));
    const left = Math.round(Math.max(0, this.x(second.time - second.span)));
    return [left, Math.max(1, right - left)];
  }

  linear(largest) {
    const top = nice(Math.max(largest, 1e-9));
    this.y = (value) => this.bottom - (value / top) * (this.bottom - TOP);
    return top;
  }

  log(smallest, largest) {
    const low = Math.log(smallest);
    const span = Math.log(largest) - low;
    this.y = (value) => this.bottom - ((Math.log(Math.max(value, smallest)) - low) / span) * (this.bottom - TOP);
  }

  // Horizontal lines with their values.
  grid(values, text) {
    this.context.fillStyle = theme.get("line");
    for (const value of values) this.context.fillRect(0, Math.round(this.y(value)), this.width, 1);
    // Written after the data, so that it does not cover them.
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
      if (before - y < 15) continue; // it would overlap the previous one
      before = y;
      // Above its line, except at the top.
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

  // Splits the seconds at gaps.
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
      // A single second becomes a short line.
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
    this.context.globalAlpha = 0.6;
    this.context.fillStyle = theme.get("fg");
    this.context.fillRect(Math.round(this.x(time)), 0, 1, this.bottom);
    this.context.globalAlpha = 1;
  }
}

// The next larger number that is easy to halve.
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 6, 8, 10].find((step) => value <= step * power * 1.0001);
}
