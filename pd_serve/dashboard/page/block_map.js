// Assigns the squares of an instance's map to requests. A request keeps its squares as long as it holds the blocks,
// so that changes are visible.

const NICE = [1, 2, 5];

/** Columns, rows, pixels per square and blocks per square of a map with this width and about this height. */
export function layOut(totalBlocks, width, height) {
  for (let step = 0; ; step++) {
    const blocksPerCell = NICE[step % 3] * 10 ** Math.floor(step / 3);
    const cells = Math.max(1, Math.ceil(totalBlocks / blocksPerCell));
    const pitch = Math.min(12, Math.sqrt((width * height) / cells));
    if (pitch < 6 && step < 30) continue;
    const columns = Math.max(1, Math.min(cells, Math.floor(width / pitch)));
    return { blocksPerCell, cells, columns, rows: Math.ceil(cells / columns), pitch: width / columns };
  }
}

export class BlockMap {
  constructor(cells, blocksPerCell) {
    this.blocksPerCell = blocksPerCell;
    this.owner = new Int32Array(cells); // a request's number; 0 is free
    this.changedAt = new Float64Array(cells);
    this.cellsOf = new Map(); // by request, in the order in which it got them
  }

  /** Takes [request, blocks, arriving] of all requests with blocks. Returns whether anything has changed. */
  update(held, now) {
    const wanted = this.#wanted(held);
    this.changed = false;
    for (const [request, cells] of this.cellsOf) {
      const keep = wanted.get(request) ?? 0;
      while (cells.length > keep) this.#set(cells.pop(), 0, now);
      if (!keep) this.cellsOf.delete(request);
    }
    for (const [request, count] of wanted) {
      const cells = this.cellsOf.get(request) ?? [];
      this.cellsOf.set(request, cells);
      let at = cells.length ? cells[cells.length - 1] : this.#gap(count) - 1;
      while (cells.length < count && (at = this.#nextFree(at)) >= 0) {
        this.#set(at, request, now);
        cells.push(at);
      }
    }
    return this.changed;
  }

  #set(cell, request, now) {
    this.owner[cell] = request;
    this.changedAt[cell] = now;
    this.changed = true;
  }

  /** Squares by request: at least one each. Shared blocks count for every request, as far as there is room. */
  #wanted(held) {
    const wanted = new Map();
    let sum = 0;
    for (const [request, blocks] of held) {
      const cells = Math.max(1, Math.round(blocks / this.blocksPerCell));
      sum += cells - (wanted.get(request) ?? 0);
      wanted.set(request, cells);
    }
    if (sum > this.owner.length) {
      const scale = this.owner.length / sum;
      for (const [request, cells] of wanted) wanted.set(request, Math.max(1, Math.floor(cells * scale)));
    }
    return wanted;
  }

  #nextFree(after) {
    const cells = this.owner.length;
    for (let i = 1; i <= cells; i++) {
      const cell = (after + i + cells) % cells;
      if (!this.owner[cell]) return cell;
    }
    return -1;
  }

  /** The start of the first gap of this length, or else of the longest gap. */
  #gap(length) {
    let best = 0, bestLength = 0, begin = 0;
    for (let cell = 0; cell <= this.owner.length; cell++) {
      if (cell < this.owner.length && !this.owner[cell]) continue;
      if (cell - begin > bestLength) [best, bestLength] = [begin, cell - begin];
      if (bestLength >= length) return best;
      begin = cell + 1;
    }
    return best;
  }
}
