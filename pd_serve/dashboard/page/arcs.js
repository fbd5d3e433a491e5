// Migrations, drawn as arcs between the instances.

import { makeSvg, reducedMotion } from "./look.js";

const TRAVEL_MS = 1000;
const STAY_MS = 1900;
const MAX_ARCS = 24;

export class Arcs {
  /** `container` has the instances; `find(id)` returns one of them. */
  constructor(container, find) {
    this.find = find;
    this.svg = makeSvg("svg", { class: "arcs", "aria-hidden": "true" });
    this.container = container;
    this.underWay = new Map();
    container.append(this.svg);
  }

  /** Migrations that have ended; simultaneous ones between the same instances are one arc. */
  show(moves, colourOf) {
    const ways = new Map();
    for (const move of moves) {
      if (!move.committed) continue;
      const way = `${move.source} ${move.destination} ${move.reason}`;
      ways.set(way, [...(ways.get(way) ?? []), move]);
    }
    for (const [index, together] of [...ways.values()].entries()) {
      if (this.svg.querySelectorAll("g").length >= MAX_ARCS) return;
      this.#draw(together, colourOf(together[0].request), reducedMotion.matches ? 0 : index * 70);
    }
  }

  /** Migrations in progress: [request, source, destination, reason] each. */
  showUnderWay(leaving) {
    const now = new Map(leaving.map(([, source, destination, reason]) => [`${source} ${destination} ${reason}`, { source, destination, reason }]));
    for (const [way, path] of this.underWay) {
      if (!now.has(way)) {
        path.remove();
        this.underWay.delete(way);
      }
    }
    for (const [way, move] of now) {
      const d = this.#path(move, 0)?.d;
      if (!d) continue;
      const path = this.underWay.get(way) ?? makeSvg("path", { class: `under-way reason ${move.reason}` });
      path.setAttribute("d", d);
      this.underWay.set(way, path);
      this.svg.append(path);
    }
  }

  #draw(together, colour, delay) {
    const move = together[0];
    const way = this.#path(move, move.request);
    if (!way) return;
    const path = makeSvg("path", { d: way.d, class: `reason ${move.reason}` });
    const group = makeSvg("g", { opacity: 0 }, path);
    const key = `${move.source} ${move.destination} ${move.reason}`;
    // Hand-offs have no label, because every request has one; others have one label per pair of instances.
    if (move.reason !== "handoff" && !this.svg.querySelector(`g[data-key="${key}"] text`)) {
      const text = makeSvg("text", { x: way.middle.x, y: way.middle.y - 7 });
      text.textContent = together.length > 1 ? `${move.reason} ×${together.length}` : move.reason;
      group.append(text);
    }
    group.dataset.key = key;
    group.dataset.way = `${move.source} ${move.destination}`;
    if (!reducedMotion.matches) {
      const size = Math.min(22, 9 + Math.sqrt(together.reduce((sum, m) => sum + m.blocks, 0)));
      const block = makeSvg("rect", { x: -size / 2, y: -size / 2, width: size, height: size, rx: 3 });
      block.style.fill = colour;
      block.style.offsetPath = `path("${way.d}")`;
      block.style.offsetRotate = "0deg";
      group.append(block);
      block.animate({ offsetDistance: ["0%", "100%"] }, { duration: TRAVEL_MS, delay, easing: "cubic-bezier(0.5, 0, 0.3, 1)", fill: "both" });
      block.animate({ opacity: [1, 1, 0] }, { duration: 300, delay: delay + TRAVEL_MS, fill: "forwards" });
    }
    this.svg.append(group);
    const fade = group.animate({ opacity: [0, 1, 1, 0], offset: [0, 0.08, 0.6, 1] }, { duration: STAY_MS, delay });
    fade.finished.then(() => group.remove(), () => group.remove());
  }

  /** A curve between two maps, bent to one side so that the two directions do not overlap. */
  #path(move, request) {
    const from = this.find(move.source), to = this.find(move.destination);
    if (!from || !to) return null;
    const origin = this.container.getBoundingClientRect();
    const a = from.middleOf(0), b = to.middleOf(request);
    for (const point of [a, b]) {
      point.x -= origin.left;
      point.y -= origin.top;
    }
    const dx = b.x - a.x, dy = b.y - a.y, length = Math.hypot(dx, dy) || 1;
    const bend = Math.min(90, length * 0.22);
    const control = { x: (a.x + b.x) / 2 + (dy / length) * bend, y: (a.y + b.y) / 2 - (dx / length) * bend };
    const middle = { x: (a.x + b.x) / 4 + control.x / 2, y: (a.y + b.y) / 4 + control.y / 2 };
    const at = (point) => `${point.x.toFixed(1)} ${point.y.toFixed(1)}`;
    return { d: `M ${at(a)} Q ${at(control)} ${at(b)}`, middle };
  }
}
