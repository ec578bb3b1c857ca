// The received seconds, and the figures that follow from them.

const KEPT_S = 300;
const NOTHING = Object.freeze({});

export class Store {
  constructor() {
    this.ticks = [];
    this.hello = null;
    this.model = null;
    this.views = new WeakMap();
  }

  // Seconds from before a restart of the server stay.
  welcome(hello) {
    const first = hello.history[0]?.time ?? Infinity;
    this.hello = hello;
    this.ticks = this.ticks.filter((tick) => tick.time < first).concat(hello.history);
    if (!(this.model in hello.models)) this.model = Object.keys(hello.models)[0];
    if (this.last) Object.assign(this.last, { totals: hello.totals, timeline: hello.timeline });
    this.trim();
  }

  add(tick) {
    // Only the newest second needs a timeline.
    const before = this.ticks.at(-1);
    if (before) before.timeline = undefined;
    this.ticks.push(tick);
    this.trim();
  }

  trim() {
    const oldest = (this.ticks.at(-1)?.time ?? 0) - KEPT_S - 1;
    const from = this.ticks.findIndex((tick) => tick.time >= oldest);
    if (from > 0) this.ticks.splice(0, from);
  }

  get last() {
    return this.ticks.at(-1);
  }

  of(tick, model = this.model) {
    return tick?.models[model] ?? NOTHING;
  }

  // The seconds of a window as rates and shares, oldest first.
  seconds(windowS, model = this.model) {
    const now = this.last?.time ?? 0;
    const seen = this.ticks.filter((tick) => tick.time > now - windowS).map((tick) => this.view(tick, model));
    return spread(seen);
  }

  view(tick, model) {
    let views = this.views.get(tick);
    if (!views) this.views.set(tick, (views = {}));
    return (views[model] ??= this.derive(tick, this.of(tick, model)));
  }

  derive(tick, { delta = NOTHING, ...rest }) {
    const span = tick.span;
    const one = { ...delta, ...rest };
    const lost = sum(Object.values(delta.problems ?? NOTHING), (count) => count);
    const latency = new Latencies(this.hello.latency).add(one.latency);
    return {
      time: tick.time,
      span,
      loop: tick.loop ?? null,
      lag: tick.lag ?? 0,
      one,
      requests: (one.requests ?? 0) / span,
      rows: (one.rows ?? 0) / span,
      lost: lost / span,
      batch: one.batches ? one.rows / one.batches : null,
      waiting: (one.queue ?? 0) / span,
      queued: one.queued ?? 0,
      computeShare: (one.compute ?? 0) / span / (one.lanes || 1),
      packing: (one.input ?? 0) / span,
      delivery: (one.output ?? 0) / span,
      latency,
      p50: latency.at(0.5),
      p90: latency.at(0.9),
      p99: latency.at(0.99),
    };
  }
}

// A long run is counted in the second in which it ends; this spreads it over the seconds before.
function spread(seconds) {
  let carried = 0;
  for (let index = seconds.length - 1; index >= 0; index--) {
    const second = seconds[index];
    const busy = second.computeShare + carried;
    second.busy = Math.min(1, busy);
    carried = busy - second.busy;
  }
  return seconds;
}

export const sum = (list, of) => list.reduce((total, one) => total + of(one), 0);

// Sums {name: count} over seconds.
export function tally(seconds, name) {
  const total = {};
  for (const { one } of seconds) {
    for (const [key, value] of Object.entries(one[name] ?? NOTHING)) total[key] = (total[key] ?? 0) + value;
  }
  return total;
}

// Counts of latencies by bin, sent as [first bin, counts...]. Bin i is above edge i - 1 and at most edge i.
export class Latencies {
  constructor(edges) {
    this.edges = edges;
    this.bins = new Map();
    this.total = 0;
  }

  add(sent) {
    for (let index = 1; index < (sent?.length ?? 0); index++) {
      const bin = sent[0] + index - 1;
      if (sent[index]) this.bins.set(bin, (this.bins.get(bin) ?? 0) + sent[index]);
      this.total += sent[index];
    }
    return this;
  }

  upper(bin) {
    return this.edges[Math.min(bin, this.edges.length - 1)] * (bin < this.edges.length ? 1 : 1.1);
  }

  lower(bin) {
    return bin ? this.edges[bin - 1] : this.edges[0] / 1.1;
  }

  // The quantile, interpolated inside its bin.
  at(part) {
    if (!this.total) return null;
    let left = part * this.total;
    for (const bin of [...this.bins.keys()].sort((a, b) => a - b)) {
      const here = this.bins.get(bin);
      if (left <= here) return this.lower(bin) * (this.upper(bin) / this.lower(bin)) ** (left / here);
      left -= here;
    }
    return null;
  }
}

// The latencies of several seconds together.
export function latencyOf(seconds, bins) {
  const all = new Latencies(bins);
  for (const { one } of seconds) all.add(one.latency);
  return all;
}
