// The charts over time.

import { TimeChart } from "./charts.js";
import { theme } from "./dom.js";
import { count, duration, percent } from "./format.js";
import { sum } from "./store.js";

// Dispatch reasons in the order of drawing, with their colours. The server sends the explanations.
const REASONS = { full: 3, idle: 1, delay: 2, deadline: 4, shape: 7, drain: 6, retry: 5, suspect: 8 };

const most = (seconds, of) => seconds.reduce((top, one) => Math.max(top, of(one) ?? 0), 0);

export function panels(cursor) {
  return [throughput(cursor), latency(cursor), sizes(cursor), reasons(cursor), busy(cursor), queue(cursor)];
}

function throughput(cursor) {
  return new TimeChart("c-throughput", {
    title: "Throughput",
    note: "per second",
    label: "Answered requests and rows, and requests without an answer, per second",
    legend: [
      { key: "requests", name: "requests", color: "1", kind: "line" },
      { key: "rows", name: "rows", color: "6", kind: "line" },
      { key: "lost", name: "not answered", color: "5" },
    ],
    paint(plot, seconds) {
      const top = plot.linear(most(seconds, (one) => Math.max(one.requests, one.rows, one.lost)) || 1);
      plot.grid([0, top / 2, top], count);
      const red = theme.get("c5");
      for (const one of seconds) if (one.lost) plot.block(one, plot.y(one.lost), plot.bottom, red, 0.75);
      if (seconds.some((one) => one.rows !== one.requests)) plot.line(seconds, (one) => one.rows, "c6", { width: 1.2 });
      plot.line(seconds, (one) => one.requests, "c1", { fill: true });
    },
    tell(one, chart) {
      chart.show("requests", count(one.requests));
      chart.show("rows", count(one.rows));
      chart.show("lost", count(one.lost));
      return `${count(one.requests)} requests, ${count(one.rows)} rows, ${count(one.lost)} not answered, per second`;
    },
  }, cursor);
}

function latency(cursor) {
  return new TimeChart("c-latency", {
    title: "Latency",
    note: "from complete headers to the written response",
    label: "50th, 90th and 99th percentile of the latency",
    legend: [
      { key: "p50", name: "p50", color: "1", kind: "line" },
      { key: "p90", name: "p90", color: "3", kind: "line" },
      { key: "p99", name: "p99", color: "2", kind: "line" },
      { key: "heat", name: "all requests", color: "heat" },
    ],
    paint(plot, seconds) {
      const bins = seconds.flatMap((one) => [...one.latency.bins.keys()]);
      const edge = seconds[0]?.latency;
      const least = bins.length ? edge.lower(Math.min(...bins)) : 1e-4;
      const longest = bins.length ? edge.upper(Math.max(...bins)) : 1e-1;
      const low = 10 ** Math.floor(Math.log10(least) + 0.15);
      const high = Math.max(low * 100, 10 ** Math.ceil(Math.log10(longest) - 0.05));
      plot.log(low, high);
      const lines = [];
      for (let value = low; value <= high * 1.01; value *= 10) lines.push(value);
      plot.grid(lines, duration);
      const heat = `rgb(${theme.get("heat")})`;
      for (const one of seconds) {
        const dense = Math.max(...one.latency.bins.values());
        for (const [bin, here] of one.latency.bins) {
          const alpha = 0.06 + 0.34 * Math.sqrt(here / dense);
          plot.block(one, plot.y(edge.upper(bin)), plot.y(edge.lower(bin)), heat, alpha);
        }
      }
      plot.line(seconds, (one) => one.p90, "c3", { width: 1.3 });
      plot.line(seconds, (one) => one.p99, "c2");
      plot.line(seconds, (one) => one.p50, "c1");
    },
    tell(one, chart) {
      for (const part of ["p50", "p90", "p99"]) chart.show(part, duration(one[part]));
      return one.latency.total
        ? `p50 ${duration(one.p50)}, p90 ${duration(one.p90)}, p99 ${duration(one.p99)}`
        : "no answered request";
    },
  }, cursor);
}

function sizes(cursor) {
  return new TimeChart("c-sizes", {
    title: "Batch sizes",
    note: "darker: more rows in batches of that size",
    label: "Rows per batch",
    legend: [
      { key: "mean", name: "mean", color: "fg", kind: "line" },
      { key: "usual", name: "most rows in" },
      { key: "full", name: "full at" },
    ],
    paint(plot, seconds, self) {
      const all = self.bins ?? [1];
      const largest = most(seconds, (one) => Math.max(0, ...Object.keys(one.one.sizes ?? {})));
      const bins = all.slice(0, Math.max(8, all.findIndex((upper) => upper >= largest) + 2));
      const height = (plot.bottom - 8) / bins.length;
      const lower = (index) => plot.bottom - index * height;
      plot.y = (rows) => {
        const index = bins.findIndex((upper) => rows <= upper);
        const from = index ? bins[index - 1] : 0;
        return lower(index + (rows - from) / (bins[index] - from) - 0.5);
      };
      const every = Math.ceil(bins.length / 5);
      plot.grid(bins.filter((_, index) => (bins.length - 1 - index) % every === 0), (rows) => count(rows));
      const heat = `rgb(${theme.get("heat")})`;
      for (const second of seconds) {
        const cells = sized(second);
        const rows = sum(cells, (cell) => cell.rows);
        for (const cell of cells) {
          const index = bins.indexOf(cell.upper);
          if (index >= 0) plot.block(second, lower(index + 1), lower(index), heat, 0.13 + 0.87 * Math.sqrt(cell.rows / rows));
        }
      }
      plot.line(seconds, (one) => one.batch, "fg", { width: 1.3 });
    },
    tell(one, self) {
      const cells = sized(one);
      const best = cells.reduce((top, cell) => (!top || cell.rows > top.rows ? cell : top), null);
      const index = best ? self.bins.indexOf(best.upper) : -1;
      const from = index > 0 ? self.bins[index - 1] + 1 : 1;
      const usual = best ? (from === best.upper ? `${from}` : `${from} to ${best.upper}`) : "–";
      self.show("mean", count(one.batch));
      self.show("usual", usual);
      self.show("full", count(one.one.full));
      return best ? `${count(one.batch)} rows per batch, most rows in batches of ${usual}` : "no batch";
    },
  }, cursor);
}

// Rows in batches of each size: about the bin's batches times its upper bound.
function sized(second) {
  return Object.entries(second.one.sizes ?? {}).map(([upper, batches]) => ({ upper: +upper, rows: upper * batches }));
}

function reasons(cursor) {
  const names = Object.keys(REASONS);
  return new TimeChart("c-reasons", {
    title: "Dispatch reasons",
    note: "share of the batches",
    label: "Share of batches by dispatch reason",
    legend: names.map((key) => ({ key, name: key, color: REASONS[key] })),
    paint(plot, seconds) {
      plot.linear(1);
      plot.grid([0, 0.5, 1], percent);
      for (const second of seconds) {
        const counts = second.one.reasons ?? {};
        const total = sum(Object.values(counts), (one) => one);
        let below = 0;
        for (const name of names) {
          const share = (counts[name] ?? 0) / total;
          if (share) plot.block(second, plot.y(below + share), plot.y(below), theme.get(`c${REASONS[name]}`), 0.85);
          below += share || 0;
        }
      }
    },
    tell(second, chart) {
      const counts = second.one.reasons ?? {};
      const total = sum(Object.values(counts), (one) => one);
      const seen = names.filter((name) => counts[name]);
      for (const name of names) {
        const entry = chart.values.get(name);
        chart.show(name, counts[name] ? percent(counts[name] / total) : "");
        entry.parentElement.title = chart.words?.[name] ?? "";
        entry.parentElement.hidden = !counts[name] && !chart.seconds.some((one) => one.one.reasons?.[name]);
      }
      return seen.map((name) => `${name} ${percent(counts[name] / total)}`).join(", ") || "no batch";
    },
  }, cursor);
}

function busy(cursor) {
  return new TimeChart("c-busy", {
    title: "Busy time",
    note: "share of each second",
    label: "Share of each second in which the engine computed, and the event loop worked, packed and delivered",
    legend: [
      { key: "compute", name: "engine", color: "1" },
      { key: "loop", name: "event loop", color: "fg", kind: "line" },
      { key: "packing", name: "packing", color: "2", kind: "line" },
      { key: "delivery", name: "delivery", color: "3", kind: "line" },
    ],
    paint(plot, seconds) {
      plot.linear(1);
      plot.grid([0, 0.5, 1], percent);
      for (const one of seconds) {
        plot.block(one, plot.y(1), plot.bottom, theme.get("track"));
        plot.block(one, plot.y(one.busy), plot.bottom, theme.get("c1"), 0.45);
      }
      plot.line(seconds, (one) => one.loop && Math.min(1, one.loop), "fg", { width: 1.2 });
      plot.line(seconds, (one) => Math.min(1, one.packing), "c2");
      plot.line(seconds, (one) => Math.min(1, one.delivery), "c3");
    },
    tell(one, chart) {
      chart.show("compute", percent(one.busy));
      chart.show("loop", percent(one.loop));
      chart.show("packing", percent(one.packing));
      chart.show("delivery", percent(one.delivery));
      return `engine ${percent(one.busy)}, event loop ${percent(one.loop)}, packing ${percent(one.packing)}, delivery ${percent(one.delivery)}`;
    },
  }, cursor);
}

function queue(cursor) {
  return new TimeChart("c-queue", {
    title: "Queue",
    label: "Waiting requests on average, and queued rows at the end of each second",
    legend: [
      { key: "waiting", name: "waiting requests, on average", color: "1", kind: "line" },
      { key: "queued", name: "queued rows, at the end", color: "2", kind: "line" },
    ],
    paint(plot, seconds) {
      const top = plot.linear(most(seconds, (one) => Math.max(one.waiting, one.queued)) || 1);
      plot.grid([0, top / 2, top], count);
      plot.line(seconds, (one) => one.queued, "c2", { width: 1.2 });
      plot.line(seconds, (one) => one.waiting, "c1", { fill: true });
    },
    tell(one, chart) {
      chart.show("waiting", count(one.waiting));
      chart.show("queued", count(one.queued));
      return `${count(one.waiting)} waiting requests on average, ${count(one.queued)} queued rows at the end`;
    },
  }, cursor);
}
