// Formatting: colours of requests, times and numbers.

export const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

const THEMES = ["auto", "light", "dark"];

/** The button that switches themes; `changed` is called when the colours change. */
export function themeButton(button, changed) {
  const show = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    changed();
  };
  let theme = THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto";
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem("theme", theme);
    show(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  show(theme);
}

/** The present value of a custom property of the style sheet, for a canvas. */
export function colourOf(property) {
  const probe = document.createElement("i");
  probe.style.color = `var(${property})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

/** The colour of a request, derived from its id so that it is the same everywhere. */
export function requestColour(id) {
  let hash = 2166136261;
  for (let i = 0; i < id.length; i++) hash = Math.imul(hash ^ id.charCodeAt(i), 16777619);
  hash = Math.imul(hash ^ (hash >>> 15), 2246822519);
  hash ^= hash >>> 13;
  const hue = (hash >>> 0) % 360;
  const lightness = 0.66 + ((hash >>> 9) % 4) * 0.04;
  return `oklch(${lightness} 0.115 ${hue})`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.1) return `${(value * 1000).toPrecision(value < 0.01 ? 2 : 3)} ms`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) < 10 && !Number.isInteger(value)) return value.toFixed(1);
  return Math.abs(value) >= 10000 ? `${(value / 1000).toFixed(1)} k` : Math.round(value).toLocaleString("en");
}

export function ago(value) {
  if (value < 60) return `${Math.round(value)} s`;
  if (value < 3600) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

/** A request's id without the prefix and suffix that vLLM adds, shortened. */
export function shortId(id) {
  const bare = id.replace(/^(chat)?cmpl-/, "");
  return bare.length > 22 ? `${bare.slice(0, 10)}…${bare.slice(-9)}` : bare;
}

/** Creates an element with properties and children: `make("p", { className: "x" }, "text", child)`. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
