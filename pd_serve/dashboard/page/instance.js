// One instance: its map of KV blocks and its numbers.

import { BlockMap, layOut } from "./block_map.js";
import { make, number, reducedMotion } from "./look.js";

const FADE_MS = 350;

/** How an instance's freeness comes about. */
export function explained(row) {
  if (row.freeness === null) return "It drains: minus infinity, so that requests move away.";
  const parts = [
    [row.headroom_blocks, "headroom for requests of high priority"],
    [row.queued_blocks, "for the first queued request"],
    [row.expected_blocks, "for requests on their way here"],
  ].filter(([blocks]) => blocks).map(([blocks, what]) => ` − ${blocks} ${what}`);
  return `Freeness: (${row.free_blocks} free blocks${parts.join("")}) / ${row.batch} requests`;
}

/** The requests that stay on an instance until they end, a text for each reason. */
export function staying(row) {
  return Object.entries(row.unmovable).map(([reason, requests]) => `${requests} requests stay there until they end: ${reason}`);
}

/** What is unusual about an instance, in a few words. */
export function notesOf(row) {
  const state = row.state === "ready" ? "" : row.state;
  const moves = row.no_migration ? "cannot move" : "";
  return [state, moves, staying(row).length ? "some stay" : "", row.preempted ? `${row.preempted} preempted` : ""].filter(Boolean);
}

export class Instance {
  /** `page` has `requests` (by number: id, colour), `colours`, and `isDense`, `point(instance, request, event)`,
   * `open(request)`, `list(instance)`. */
  constructor(id, page) {
    this.id = id;
    this.page = page;
    this.held = [];
    this.arriving = new Set();
    this.lit = 0; // the request under the pointer
    this.name = make("button", { type: "button", textContent: id, title: `Requests on ${id}` });
    this.name.addEventListener("click", () => page.list(this));
    this.role = make("span", { className: "role" });
    this.chip = make("span", { className: "chip", hidden: true });
    this.used = make("span", { className: "used" });
    this.canvas = make("canvas", { tabIndex: 0, role: "img" });
    const facts = [];
    this.facts = {};
    for (const what of ["running", "queue", "free", "reserved", "freeness"]) {
      this.facts[what] = make("dd", { className: what }, "–");
      facts.push(make("dt", { className: what }, what), this.facts[what]);
    }
    const header = make("header", {}, make("h3", {}, this.name), this.role, this.chip, this.used);
    this.element = make("article", { "aria-label": id }, header, this.canvas, make("dl", {}, ...facts));
    this.element.dataset.id = id;
    this.canvas.addEventListener("pointermove", (event) => this.#light(this.#under(event), event));
    this.canvas.addEventListener("pointerleave", () => this.#light(0));
    this.canvas.addEventListener("blur", () => this.#light(0));
    this.canvas.addEventListener("click", (event) => this.#chosen(this.#under(event), event));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#fit()).observe(this.element);
  }

  /** Does nothing if it shows this already: most of many instances change little in half a second. */
  show(row, held) {
    const shown = JSON.stringify([row, held, this.page.isDense]);
    if (shown === this.shown) return;
    this.shown = shown;
    this.row = row;
    this.held = held;
    const arriving = held.filter((entry) => entry[2]).map((entry) => entry[0]);
    const sameArriving = arriving.length === this.arriving.size && arriving.every((one) => this.arriving.has(one));
    this.arriving = new Set(arriving);
    const used = row.total_blocks - row.free_blocks;
    const share = row.total_blocks ? Math.round((100 * used) / row.total_blocks) : 0;
    const reserved = held.reduce((sum, [, blocks, comes]) => sum + (comes ? blocks : 0), 0);
    this.element.className = `instance ${row.role} ${row.state}`;
    this.role.textContent = row.role === this.id.replace(/-\d+$/, "") ? "" : row.role;
    const notes = notesOf(row);
    this.chip.hidden = !notes.length;
    this.chip.textContent = notes.join(", ");
    this.chip.title = row.no_migration ?? staying(row).join("\n");
    this.canvas.hidden = !row.total_blocks;
    this.used.textContent = row.total_blocks ? `${share} % used` : "";
    this.facts.running.textContent = number(row.running);
    this.facts.queue.textContent = number(row.waiting);
    this.facts.free.textContent = number(row.free_blocks);
    this.facts.reserved.textContent = number(reserved);
    this.facts.freeness.textContent = row.freeness === null ? "−∞" : number(row.freeness);
    this.element.querySelectorAll(".freeness").forEach((part) => (part.title = explained(row)));
    this.element.classList.toggle("immovable", row.no_migration !== null);
    this.canvas.setAttribute(
      "aria-label",
      `${this.id}, ${row.state}: ${used} of ${row.total_blocks} KV blocks used, ${reserved} of them reserved; ` +
        `${held.length} requests. Arrow keys go through them, Enter shows one.`,
    );
    if (this.total !== row.total_blocks || this.dense !== this.page.isDense) this.#fit();
    if (this.map?.update(held, performance.now()) || !sameArriving) this.draw();
  }

  /** Creates the map again when the number of blocks or the width has changed. */
  #fit() {
    const width = Math.floor(this.canvas.clientWidth);
    const dense = this.page.isDense;
    if (!width || !this.row || (width === this.width && this.total === this.row.total_blocks && this.dense === dense)) return;
    [this.width, this.total, this.dense] = [width, this.row.total_blocks, dense];
    const height = this.page.isDense ? 46 : Math.min(210, Math.max(90, width * 0.62));
    this.layout = layOut(this.total, width, height);
    const { cells, rows, pitch, blocksPerCell } = this.layout;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.height = Math.ceil(rows * pitch * ratio);
    this.canvas.width = Math.ceil(width * ratio);
    this.canvas.style.height = `${rows * pitch}px`;
    this.canvas.title = blocksPerCell === 1 ? "" : `one square is ${blocksPerCell} blocks`;
    this.map = this.total ? new BlockMap(cells, blocksPerCell) : null;
    this.map?.update(this.held, -FADE_MS);
    this.draw();
  }

  draw() {
    if (!this.layout) return;
    const { cells, columns, pitch } = this.layout;
    const context = this.canvas.getContext("2d");
    const ratio = this.canvas.width / this.width;
    const now = performance.now();
    const size = pitch - Math.max(1, Math.min(2, pitch * 0.18));
    const shape = size < 6 ? context.rect : context.roundRect;
    const box = (cell, inset) => {
      const x = (cell % columns) * pitch + inset, y = Math.floor(cell / columns) * pitch + inset;
      shape.call(context, x, y, size - 2 * inset, size - 2 * inset, Math.min(2, size / 4));
    };
    const still = reducedMotion.matches || this.page.isDense;
    let fading = false;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.globalAlpha = 1;
    context.fillStyle = this.page.colours.cell;
    context.beginPath();
    for (let cell = 0; cell < (this.total ? cells : 0); cell++) box(cell, 0);
    context.fill();
    for (const [request, owned] of this.map?.cellsOf ?? []) {
      const dim = this.page.lit && this.page.lit !== request ? 0.22 : 1;
      const colour = this.page.requests.get(request)?.colour ?? this.page.colours.quiet;
      const arriving = this.arriving.has(request);
      const paint = (alpha, some) => {
        context.globalAlpha = dim * alpha;
        context.beginPath();
        for (const cell of some) box(cell, arriving ? 0.75 : 0);
        if (arriving) context.stroke();
        else context.fill();
      };
      context.fillStyle = context.strokeStyle = colour;
      const fresh = still ? [] : owned.filter((cell) => now - this.map.changedAt[cell] < FADE_MS);
      paint(1, fresh.length ? owned.filter((cell) => !fresh.includes(cell)) : owned);
      for (const cell of fresh) paint(0.15 + (0.85 * (now - this.map.changedAt[cell])) / FADE_MS, [cell]);
      fading ||= fresh.length > 0;
    }
    if (fading && !this.frame) {
      this.frame = requestAnimationFrame(() => {
        this.frame = 0;
        this.draw();
      });
    }
  }

  #under(event) {
    if (!this.map) return 0;
    const { columns, pitch, rows } = this.layout;
    const column = Math.floor(event.offsetX / pitch), row = Math.floor(event.offsetY / pitch);
    if (column < 0 || column >= columns || row < 0 || row >= rows) return 0;
    return this.map.owner[row * columns + column] ?? 0;
  }

  #light(request, event) {
    this.lit = request;
    this.page.point(this, request, event);
  }

  /** A tap shows the tooltip, a click or a second tap the timeline. */
  #chosen(request, event) {
    if (!request) return this.#light(0);
    const again = event.pointerType !== "touch" || this.tapped === request;
    this.tapped = request;
    if (again) this.page.open(request);
    else this.#light(request, event);
  }

  #key(event) {
    const requests = [...(this.map?.cellsOf.keys() ?? [])];
    const at = requests.indexOf(this.lit);
    if (event.key === "Enter" && this.lit) return this.page.open(this.lit);
    if (event.key === "Escape") return this.#light(0);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !requests.length) return;
    event.preventDefault();
    const next = at < 0 ? (step > 0 ? 0 : requests.length - 1) : (at + step + requests.length) % requests.length;
    this.#light(requests[next]);
  }

  /** The centre of a request's squares, or of the map, in page coordinates. */
  middleOf(request) {
    const box = this.canvas.getBoundingClientRect();
    const cells = this.map?.cellsOf.get(request);
    if (!cells?.length) return { x: box.left + box.width / 2, y: box.top + box.height / 2 };
    const { columns, pitch } = this.layout;
    const cell = cells[Math.floor(cells.length / 2)];
    return { x: box.left + ((cell % columns) + 0.5) * pitch, y: box.top + (Math.floor(cell / columns) + 0.5) * pitch };
  }
}
