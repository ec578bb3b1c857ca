// Connects the feed with the charts and tables.

import { Cursor } from "./charts.js";
import { element, setText, theme } from "./dom.js";
import { Explainer } from "./explain.js";
import { Feed, hasToken, remember } from "./feed.js";
import { count, duration, percent } from "./format.js";
import { panels } from "./panels.js";
import { latencyOf, Store } from "./store.js";
import { node, processes, refusals, settings, tenants, tiles, totals } from "./tables.js";
import { Timeline } from "./timeline.js";

const byId = (id) => document.getElementById(id);
const store = new Store();
const cursor = new Cursor();
const charts = panels(cursor);
const explainer = new Explainer();
const timeline = new Timeline("c-timeline", (id) => explainer.show(id));
const page = { windowS: 300, paused: false, link: "waiting" };

const feed = new Feed({
  hello(hello) {
    store.welcome(hello);
    const wanted = decodeURIComponent(location.hash.slice(1));
    if (wanted in hello.models) store.model = wanted;
    charts.forEach((chart) => Object.assign(chart, { bins: hello.models[store.model].sizes, words: hello.reasons }));
    timeline.words = hello.reasons;
    document.title = `cobatch on ${hello.host}`;
    byId("login").hidden = true;
    byId("main").hidden = byId("tools").hidden = false;
    byId("forget").hidden = !hasToken();
    settings(hello);
    draw(true);
  },
  tick(tick) {
    store.add(tick);
    draw();
  },
  link,
  refused,
});

function link(state) {
  page.link = state;
  const model = store.last && store.of(store.last).state;
  const unready = model && model !== "ready";
  const text = { waiting: "connecting", lost: "no connection, retrying", live: "live" }[state];
  const chip = byId("link");
  const shown = page.paused && state === "live" ? "paused" : state === "live" && unready ? "waiting" : state;
  chip.dataset.state = shown;
  setText(chip, shown === "paused" ? "paused" : unready && state === "live" ? model : text);
  document.body.classList.toggle("stale", state === "lost");
}

function refused(status, problem) {
  byId("main").hidden = byId("tools").hidden = true;
  byId("login").hidden = false;
  byId("forget").hidden = true;
  const why = status === 403 ? "This token lacks the permission admin." : hasToken() ? problem.detail ?? "The token was not accepted." : "";
  setText(byId("why"), why);
  byId("link").dataset.state = "waiting";
  setText(byId("link"), "not signed in");
  remember(null);
  byId("token").value = "";
  byId("token").focus();
}

function draw(whole = false) {
  if (!store.last || document.hidden || (page.paused && !whole)) return;
  const seconds = store.seconds(page.windowS);
  charts.forEach((chart) => chart.draw(seconds, store.last.time, page.windowS));
  timeline.take(store.last.timeline?.[store.model]);
  tiles(store, seconds);
  tenants(store, page.windowS);
  refusals(store, seconds, page.windowS === 60 ? "1 min" : "5 min");
  totals(store);
  processes(store);
  node(store.hello, store.last.time);
  models();
}

// With several models: a button for each, with its figures.
function models() {
  const names = Object.keys(store.hello.models);
  const root = byId("models");
  root.hidden = names.length < 2;
  if (root.hidden) return;
  if (root.children.length !== names.length) root.replaceChildren(...names.map(modelButton));
  for (const button of root.children) {
    const name = button.dataset.model;
    const last = store.seconds(10, name);
    const requests = last.reduce((total, one) => total + one.requests, 0) / Math.max(1, last.length);
    const busy = last.reduce((total, one) => total + one.busy, 0) / Math.max(1, last.length);
    const slow = latencyOf(last, store.hello.latency).at(0.99);
    button.setAttribute("aria-pressed", String(name === store.model));
    const { state } = store.of(store.last, name);
    const figures = `${count(requests)}/s · p99 ${duration(slow)} · busy ${percent(busy)}`;
    setText(button.querySelector("small"), state === "ready" ? figures : state);
  }
}

function modelButton(name) {
  const button = element("button", { type: "button", "data-model": name }, element("strong", {}, name), element("small"));
  button.addEventListener("click", () => {
    store.model = name;
    charts.forEach((chart) => (chart.bins = store.hello.models[name].sizes));
    history.replaceState(null, "", `#${encodeURIComponent(name)}`);
    draw(true);
    link(page.link);
  });
  return button;
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  remember(byId("token").value.trim());
  feed.start();
});

byId("forget").addEventListener("click", () => {
  remember(null);
  feed.start();
});

byId("pause").addEventListener("click", (event) => {
  page.paused = !page.paused;
  event.currentTarget.setAttribute("aria-pressed", String(page.paused));
  link(page.link);
  draw(true);
});

for (const button of document.querySelectorAll("[data-window]")) {
  button.addEventListener("click", () => {
    page.windowS = Number(button.dataset.window);
    document.querySelectorAll("[data-window]").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    draw(true);
  });
}

document.addEventListener("visibilitychange", () => draw(true));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  theme.read();
  draw(true);
});
feed.start();
