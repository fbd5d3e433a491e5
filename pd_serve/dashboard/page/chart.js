// A small line chart over the last minutes.

import { makeSvg } from "./look.js";

const WIDTH = 300;
const HEIGHT = 74;
const BOTTOM = 12;
const TOP = 5;
const LEFT = 38;

/** The smallest round number that is not below `value`. */
export function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 2, 3, 5, 10].find((step) => step * power >= value) * power;
}

/**
 * Draws into `svg`.
 *
 * lines: [{ name, values: [[age in s, value or null], …], oldest first }]; the second line is less prominent.
 */
export function drawChart(svg, lines, { minutes, format, label, area = false }) {
  const box = svg.getBoundingClientRect();
  const width = box.width || WIDTH, height = box.height || HEIGHT;
  const values = lines.flatMap((line) => line.values.map(([, value]) => value)).filter((value) => value !== null);
  const most = niceAbove(Math.max(...values, 0));
  const x = (age) => width - (age / (minutes * 60)) * (width - LEFT);
  const y = (value) => TOP + (1 - value / most) * (height - TOP - BOTTOM);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", label);
  const parts = [];
  for (const value of values.length ? [0, most / 2, most] : [0]) {
    parts.push(makeSvg("line", { class: "rule", x1: LEFT, x2: width, y1: y(value), y2: y(value) }));
    if (value || !values.length) continue;
  }
  const text = (content, attributes) => {
    const element = makeSvg("text", attributes);
    element.textContent = content;
    parts.push(element);
  };
  if (values.length) {
    text(format(most), { x: LEFT - 6, y: TOP + 4, "text-anchor": "end" });
    text("0", { x: LEFT - 6, y: height - BOTTOM + 3, "text-anchor": "end" });
  }
  text(`−${minutes} min`, { x: LEFT, y: height - 1 });
  text("now", { x: width, y: height - 1, "text-anchor": "end" });
  lines.forEach((line, index) => {
    for (const run of runs(line.values)) {
      const points = run.map(([age, value]) => `${x(age).toFixed(1)} ${y(value).toFixed(1)}`);
      const end = `L ${x(run[run.length - 1][0])} ${y(0)} L ${x(run[0][0])} ${y(0)} Z`;
      if (area && !index) parts.push(makeSvg("path", { class: "area", d: `M ${points.join(" L ")} ${end}` }));
      const d = points.length > 1 ? `M ${points.join(" L ")}` : `M ${points[0]} h 0.01`;
      parts.push(makeSvg("path", { class: index ? "high" : "low", d }));
    }
  });
  svg.replaceChildren(...parts);
}

/** Splits values at nulls. */
function runs(values) {
  const found = [[]];
  for (const point of values) {
    if (point[1] === null) found.push([]);
    else found[found.length - 1].push(point);
  }
  return found.filter((run) => run.length);
}
