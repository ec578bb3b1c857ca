// Helpers for the document: colours, elements, text.

// Colours come from the style sheet, which alone decides between light and dark.
export const theme = {
  read() {
    this.style = getComputedStyle(document.documentElement);
    this.colors = {};
  },
  get(name) {
    if (!this.style) this.read();
    return (this.colors[name] ??= this.style.getPropertyValue(`--${name}`).trim());
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
