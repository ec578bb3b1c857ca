// Helpers for the document: colours, elements, text.

// Colours come from the style sheet, which alone decides between light and dark.
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
