// Explains a recent request by its id.

import { element } from "./dom.js";
import { credentials } from "./feed.js";
import { duration } from "./format.js";

// Field, name and colour of each stage, in their order.
const STAGES = [
  ["queue", "queue", 7], ["pack", "packing", 2], ["wait_for_engine", "waits for engine", 6], ["compute", "compute", 1],
  ["answer", "delivery", 3],
];

export class Explainer {
  constructor() {
    this.form = document.getElementById("explain");
    this.input = document.getElementById("request-id");
    this.output = document.getElementById("explained");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask(this.input.value.trim());
    });
  }

  show(id) {
    this.input.value = id;
    this.ask(id);
    this.form.scrollIntoView({ block: "nearest" });
  }

  async ask(id) {
    try {
      const response = await fetch(`v1/requests/${encodeURIComponent(id)}`, { headers: credentials(), cache: "no-store" });
      const result = await response.json();
      this.output.replaceChildren(...(response.ok ? this.explained(result) : [paragraph(result.detail ?? result.title)]));
    } catch {
      this.output.replaceChildren(paragraph("The server did not answer."));
    }
  }

  explained(result) {
    const times = result.times_us;
    const stages = STAGES.filter(([name]) => times[name] !== undefined);
    const parts = [];
    if (stages.length) {
      const bar = element("div", { class: "stages", "aria-hidden": "true" });
      for (const [name, , color] of stages) {
        const part = element("i", { class: `k${color}` });
        part.style.flexGrow = times[name];
        bar.append(part);
      }
      const legend = element("ul", { class: "legend" }, ...stages.map(([name, text, color]) =>
        element("li", {}, element("i", { class: `k${color}` }), text, element("b", {}, duration(times[name] / 1e6)))));
      parts.push(bar, legend);
    }
    return [...parts, ...result.in_words.map(paragraph)];
  }
}

function paragraph(text) {
  return element("p", { class: "small" }, text);
}
