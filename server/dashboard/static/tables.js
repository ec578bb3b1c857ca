// Tiles of the last ten seconds, and tables: tenants, refusals, totals, settings.

import { element, setText } from "./dom.js";
import { count, duration, long, percent, whole } from "./format.js";
import { latencyOf, sum, tally } from "./store.js";

const TILE_S = 10;
const byId = (id) => document.getElementById(id);
const mean = (list, of) => (list.length ? sum(list, of) / list.length : 0);

// Replaces the content only if it changed, so that selections and screen readers are not disturbed.
function fill(node, rows) {
  const made = element("div");
  made.append(...rows);
  if (node.innerHTML !== made.innerHTML) node.replaceChildren(...made.childNodes);
}

function big(id, text) {
  const [figure, unit] = text.split(" ");
  const node = byId(id);
  if (node.textContent !== text) node.replaceChildren(figure, ...(unit ? [element("small", {}, ` ${unit}`)] : []));
}

export function tiles(store, seconds) {
  const last = seconds.filter((one) => one.time > store.last.time - TILE_S);
  const now = store.of(store.last);
  const latency = latencyOf(last, store.hello.latency);
  const lost = mean(last, (one) => one.lost);
  const batches = sum(last, (one) => one.one.batches ?? 0);
  const rows = sum(last, (one) => one.one.rows ?? 0);
  big("t-requests", `${count(mean(last, (one) => one.requests))} /s`);
  setText(byId("s-requests"), `${count(mean(last, (one) => one.rows))} rows per second`);
  big("t-latency", duration(latency.at(0.5)));
  setText(byId("s-latency"), latency.total ? `p99 ${duration(latency.at(0.99))}` : "no answers");
  big("t-batch", batches ? `${count(rows / batches)} rows` : "–");
  setText(byId("s-batch"), now.full ? `full at ${count(now.full)} · ${count(mean(last, (one) => (one.one.batches ?? 0) / one.span))}/s` : "");
  big("t-busy", percent(mean(last, (one) => one.busy)));
  const loop = mean(last, (one) => one.loop ?? 0);
  const lag = last.reduce((worst, one) => Math.max(worst, one.lag), 0);
  setText(byId("s-busy"), `loop ${percent(loop)} · lag ${duration(lag)}`);
  big("t-queue", `${count(now.queued ?? 0)} rows`);
  setText(byId("s-queue"), `${count(now.running ?? 0)} ${now.running === 1 ? "batch" : "batches"} running`);
  big("t-lost", `${count(lost)} /s`);
  byId("t-lost").classList.toggle("bad", lost > 0);
  const kinds = Object.entries(tally(last, "problems")).sort((a, b) => b[1] - a[1]);
  setText(byId("s-lost"), kinds.length ? kinds.map(([slug]) => slug).join(", ") : "no errors");
}

// Requests without rows: by kind of problem, which has a page, and those of disconnected clients.
const LEFT = "client-left";

export function refusals(store, seconds, windowName) {
  const recent = tally(seconds, "problems");
  const since = store.last.totals?.[store.model]?.problems ?? {};
  const kinds = store.hello.kinds;
  const slugs = Object.keys({ ...since, ...recent }).sort((a, b) => (since[b] ?? 0) - (since[a] ?? 0));
  setText(byId("n-refusals"), slugs.length ? "" : "No errors so far.");
  byId("refusals").hidden = !slugs.length;
  const name = (slug) => (slug === LEFT ? "The client disconnected before the answer" : kinds[slug] ?? slug);
  const rows = slugs.map((slug) =>
    element("tr", {},
      element("td", {}, slug in kinds ? element("a", { href: `problems/${slug}` }, name(slug)) : name(slug)),
      element("td", { class: "n" }, whole(recent[slug] ?? 0)),
      element("td", { class: "n", "data-problem": slug }, whole(since[slug] ?? 0)),
    ));
  fill(byId("refusals"), [
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Problem"),
      element("th", { class: "n", scope: "col" }, windowName), element("th", { class: "n", scope: "col" }, "total"))),
    element("tbody", {}, ...rows),
  ]);
}

export function tenants(store, windowS) {
  const now = store.last.time;
  const recent = store.ticks.filter((tick) => tick.time > now - windowS);
  const known = new Map();
  for (const tick of recent) {
    for (const [name, one] of Object.entries(tick.tenants ?? {})) {
      const sofar = known.get(name) ?? { engine: 0, rows: 0, requests: 0, refused: 0 };
      for (const key of ["engine", "rows", "requests", "refused"]) sofar[key] += one[key] ?? 0;
      known.set(name, Object.assign(sofar, { weight: one.weight, queued: one.queued ?? 0, seen: tick }));
    }
  }
  const list = [...known].sort((a, b) => b[1].engine - a[1].engine);
  const engine = sum(list, ([, one]) => one.engine);
  const weights = sum(list, ([, one]) => one.weight ?? 0);
  const spanS = sum(recent, (tick) => tick.span);
  byId("tenants").hidden = !list.length;
  const note = store.hello.auth ? "No requests in this window." : "There are no tenants without [auth].";
  setText(byId("n-tenants"), list.length ? "Share of the engines' time. The mark is the share by weight." : note);
  const rows = list.map(([name, one]) =>
    element("tr", {},
      element("td", { class: "name", title: name }, name),
      element("td", {}, bar(engine ? one.engine / engine : 0, weights && one.weight ? one.weight / weights : null)),
      element("td", { class: "n" }, percent(engine ? one.engine / engine : 0)),
      element("td", { class: "n" }, one.weight == null ? "–" : count(one.weight)),
      element("td", { class: "n" }, count(one.requests / spanS)),
      element("td", { class: "n" }, count(one.seen === store.last ? one.queued : 0)),
    ));
  const heads = [["Tenant", ""], ["Engine time", ""], ["", "n"], ["weight", "n"], ["requests/s", "n"], ["queued rows", "n"]];
  fill(byId("tenants"), [
    element("thead", {}, element("tr", {}, ...heads.map(([text, kind]) => element("th", { class: kind || null, scope: "col" }, text)))),
    element("tbody", {}, ...rows),
  ]);
  // Widths are set here, because the content security policy forbids style attributes.
  byId("tenants").querySelectorAll("[data-part]").forEach((node) => {
    node.style[node.tagName === "I" ? "width" : "left"] = `${node.dataset.part}%`;
  });
}

// With several processes: a row for each front, below that of the process with the engines.
export function processes(store) {
  const numbers = Object.keys(store.last.fronts ?? {});
  byId("processes-card").hidden = !numbers.length;
  if (!numbers.length) return;
  const last = store.ticks.filter((tick) => tick.time > store.last.time - TILE_S);
  const row = (name, number, of) => {
    const seconds = last.map((tick) => ({ span: tick.span, ...of(tick) }));
    const worst = seconds.reduce((longest, one) => Math.max(longest, one.lag ?? 0), 0);
    const front = number !== null;
    return element("tr", { "data-front": number },
      element("td", {}, name),
      element("td", { class: "n" }, front ? count(mean(seconds, (one) => (one.requests ?? 0) / one.span)) : "–"),
      element("td", { class: "n" }, front ? whole(of(store.last).connections ?? 0) : "–"),
      element("td", { class: "n" }, percent(mean(seconds, (one) => one.loop ?? 0))),
      element("td", { class: "n" }, duration(worst)));
  };
  const heads = [["Process", ""], ["requests/s", "n"], ["connections", "n"], ["event loop", "n"], ["longest lag", "n"]];
  fill(byId("processes"), [
    element("thead", {}, element("tr", {}, ...heads.map(([text, kind]) => element("th", { class: kind || null, scope: "col" }, text)))),
    element("tbody", {}, row("engines", null, (tick) => tick),
      ...numbers.map((number) => row(`front ${number}`, number, (tick) => tick.fronts?.[number] ?? {}))),
  ]);
}

function bar(share, weight) {
  const mark = weight === null ? null : element("b", { "data-part": (weight * 100).toFixed(1) });
  return element("div", { class: "bar", "aria-hidden": "true" }, element("i", { "data-part": (share * 100).toFixed(1) }), mark);
}

const TOTALS = [
  ["requests", "requests"], ["rows", "rows"], ["batches", "batches"], ["problems", "not answered"],
  ["cancelled", "disconnected"], ["retries", "retried runs"], ["hung", "hung runs"],
];

export function totals(store) {
  const all = store.last.totals?.[store.model];
  if (!all) return;
  const value = (one) => (typeof one === "object" ? sum(Object.values(one), (count) => count) : one ?? 0);
  const pairs = TOTALS.map(([name, text]) =>
    element("div", {}, element("dt", {}, text), element("dd", { "data-total": name }, whole(value(all[name])))));
  fill(byId("totals"), pairs);
}

export function settings(hello) {
  const entry = ([name, value], own) =>
    element("div", { class: own.includes(name) ? "own" : null }, element("span", {}, name), element("em", {}, shown(value)));
  const group = (title, values, own, note) =>
    element("details", {},
      element("summary", {}, title, element("span", {}, ` ${own.filter((name) => name in values).length} of ${Object.keys(values).length} set`)),
      note ? element("p", {}, note) : null,
      element("div", { class: "settings" }, ...Object.entries(values)
        .sort(([one], [other]) => own.includes(other) - own.includes(one))
        .map((pair) => entry(pair, own))));
  const models = Object.entries(hello.models).map(([name, one]) =>
    group(`${one.kind === "pipeline" ? "Pipeline" : "Model"} ${name}${one.platform ? ` (${one.platform})` : ""}`, one.settings, one.own, one.batching && `Batching is ${one.batching}.`));
  byId("settings").replaceChildren(...models, group("Server", hello.settings, hello.own));
}

function shown(value) {
  if (value === null) return "–";
  if (value === true) return "yes";
  if (value === false) return "no";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

export function node(hello, now) {
  setText(byId("node"), `${hello.host} · ${hello.version} · up ${long(Math.max(0, now - hello.started))}`);
}
