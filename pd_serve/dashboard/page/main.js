// The page: updates all its parts from the events of the server.

import { Arcs } from "./arcs.js";
import { drawChart } from "./chart.js";
import { openInstance, openRequest } from "./dialogs.js";
import { Instance } from "./instance.js";
import { ago, colourOf, make, number, requestColour, seconds, shortId, themeButton } from "./look.js";
import { Stream } from "./stream.js";

const MAX_NAMES = 20000;
const MAX_MOVES = 60;
const MINUTES = 5;
const ROLES = ["prefill", "decode", "neutral"];
const REASONS = ["handoff", "balance", "defragment", "drain", "manual"];
const LINE_DOTS = 60;

const $ = (id) => document.getElementById(id);

const page = {
  requests: new Map(), // by number: { id, colour }
  instances: new Map(),
  colours: {},
  lit: 0,
  blockTokens: 0,

  /** Highlights a request everywhere and shows its tooltip. */
  point(instance, request, event) {
    if (this.lit !== request) {
      this.lit = request;
      for (const other of this.instances.values()) other.draw();
    }
    const tip = $("tip");
    tip.hidden = !request;
    if (!request) return;
    const known = this.requests.get(request);
    const [, blocks, arriving] = instance.held.find(([number]) => number === request) ?? [0, 0, 0];
    const mark = make("i");
    mark.style.background = known?.colour ?? "";
    const size = `${blocks} blocks, at most ${number(blocks * this.blockTokens)} tokens${arriving ? "; arriving" : ""}`;
    tip.replaceChildren(make("b", {}, mark, known?.id ?? "?"), size);
    const at = event ? { x: event.clientX, y: event.clientY } : instance.middleOf(request);
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(at.x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${at.y + box.height + 26 > innerHeight ? at.y - box.height - 12 : at.y + 16}px`;
  },

  open(request) {
    const known = this.requests.get(request);
    if (known) openRequest(known.id, known.colour);
  },

  list(instance) {
    openInstance(instance, this.requests, this.blockTokens, (request) => this.open(request));
  },
};

const arcs = new Arcs($("instances"), (id) => page.instances.get(id));
const slots = new Map(); // rows of latencies, by number
let loads = []; // [time in ms, running, waiting]
let moves = []; // newest first

function onEvent(event, isFirst) {
  if (isFirst) {
    page.requests.clear();
    slots.clear();
    $("moves").dataset.shown = "";
  }
  for (const [key, id] of Object.entries(event.names)) page.requests.set(Number(key), { id, colour: requestColour(id) });
  for (const key of page.requests.keys()) {
    if (page.requests.size <= MAX_NAMES) break;
    page.requests.delete(key);
  }
  page.blockTokens = event.block_tokens;
  showState(event);
  showInstances(event);
  showMoves(event);
  showDecisions(event.cluster.decisions ?? []);
  showNumbers(event);
}

function showState({ cluster, server }) {
  const { state, policy, restarts } = cluster.scheduler ?? { state: "unknown", policy: "unknown", restarts: 0 };
  $("scheduler").className = `state ${state === "alive" ? "good" : "bad"}`;
  $("scheduler").textContent = `scheduler ${state}${restarts ? `, ${restarts} restarts` : ""}`;
  $("policy").textContent = `policy ${policy}`;
  $("server").textContent = server;
}

function showInstances({ cluster, blocks }) {
  const rows = [...cluster.instances].sort(
    (a, b) => ROLES.indexOf(a.role) - ROLES.indexOf(b.role) || a.id.localeCompare(b.id, "en", { numeric: true }),
  );
  const container = $("instances");
  const here = new Set(rows.map((row) => row.id));
  for (const [id, instance] of page.instances) {
    if (here.has(id)) continue;
    instance.element.remove();
    page.instances.delete(id);
  }
  const least = rows.length <= 8 ? 270 : rows.length <= 20 ? 210 : 140;
  const most = Math.max(1, Math.floor((container.clientWidth + 14) / (least + 14)));
  // As many columns as fit, without a nearly empty last row.
  container.style.setProperty("--columns", Math.ceil(rows.length / Math.ceil(rows.length / most)) || 1);
  container.classList.toggle("dense", rows.length > 20);
  rows.forEach((row, place) => {
    let instance = page.instances.get(row.id);
    if (!instance) page.instances.set(row.id, (instance = new Instance(row.id, page)));
    if (container.children[place] !== instance.element) container.insertBefore(instance.element, container.children[place] ?? null);
    instance.show(row, blocks[row.id] ?? []);
  });
  const line = cluster.waiting_line;
  const dots = Array.from({ length: Math.min(line.requests, LINE_DOTS) }, () => make("i"));
  const words = line.requests
    ? `Waiting line: ${number(line.requests)} requests, ${number(line.tokens)} prompt tokens`
    : "Waiting line: empty";
  $("line").replaceChildren(make("span", {}, words), ...dots);
}

function showMoves(event) {
  arcs.show(event.moves, (request) => page.requests.get(request)?.colour ?? page.colours.quiet);
  arcs.showUnderWay(event.leaving);
  const now = Date.now();
  const known = (move) => page.requests.get(move.request) ?? { id: "?", colour: page.colours.quiet };
  moves = [...event.moves.map((move) => ({ ...move, ...known(move), at: now - 1000 * move.seconds_ago })).reverse(), ...moves];
  moves.length = Math.min(moves.length, MAX_MOVES);
  if (event.moves.length) {
    $("moves").replaceChildren(...moves.map(moveRow));
  }
  for (const time of $("moves").querySelectorAll("time")) time.textContent = ago((now - time.dataset.at) / 1000);
  const counts = event.cluster.migrations;
  $("reasons").replaceChildren(...REASONS.filter((reason) => counts[reason]?.committed).map((reason) =>
    make("span", { className: `reason ${reason}` }, `${reason} ${number(counts[reason].committed)}`)));
}

function moveRow(move) {
  const time = make("time");
  time.dataset.at = move.at;
  const name = make("button", { type: "button", title: move.id }, shortId(move.id));
  name.addEventListener("click", () => openRequest(move.id, move.colour));
  const way = ` ${move.source} → ${move.destination}${move.committed ? "" : `, aborted: ${move.why}`}`;
  const size = move.committed ? `${move.blocks} blocks, ${seconds(move.duration_s)}` : "";
  return make("li", {}, time,
    make("span", { className: "what" }, make("span", { className: `reason ${move.reason}` }, move.reason), " ", name, way),
    make("small", {}, size));
}

function showDecisions(decisions) {
  if (!decisions.length) return;
  $("decisions").replaceChildren(...decisions.map(({ seconds_ago, what }) =>
    make("li", {}, make("time", {}, ago(seconds_ago)), make("span", { className: "what" }, what))));
}

function showNumbers({ latency, cluster }) {
  for (const row of latency.slots) slots.set(row[0], row);
  const now = latency.now, slotS = latency.slot_s, begin = Math.floor(now - (60 * MINUTES) / slotS);
  for (const key of slots.keys()) if (key < begin) slots.delete(key);
  const series = (column) => {
    const values = [];
    for (let slot = begin + 1; slot <= Math.floor(now); slot++) {
      values.push([Math.max(0, (now - slot - 0.5) * slotS), slots.get(slot)?.[column] ?? null]);
    }
    return values;
  };
  const set = (tile, name, value) => ($(tile).querySelector(`[data-name=${name}]`).textContent = value);
  const chart = (tile, lines, options) => drawChart($(tile).querySelector("svg"), lines, { minutes: MINUTES, ...options });
  const sums = latency.summary;
  for (const [tile, p50, p99, column] of [["ttft", sums.ttft_p50, sums.ttft_p99, 2], ["itl", sums.itl_p50, sums.itl_p99, 4]]) {
    set(tile, "p50", seconds(p50));
    set(tile, "p99", seconds(p99));
    const label = `Last minute: P50 ${seconds(p50)}, P99 ${seconds(p99)}`;
    chart(tile, [{ values: series(column) }, { values: series(column + 1) }], { format: seconds, label });
  }
  set("tokens", "rate", number(sums.tokens_per_s));
  // Not the present slot: it is incomplete, so its rate would be too low.
  const rates = series(1).slice(0, -1).map(([age, tokens]) => [age, (tokens ?? 0) / slotS]);
  chart("tokens", [{ values: slots.size ? rates : [] }], { format: number, area: true, label: `${number(sums.tokens_per_s)} tokens per second` });

  const total = (name) => cluster.instances.reduce((sum, row) => sum + row[name], 0);
  const running = total("running"), waiting = total("waiting") + cluster.waiting_line.requests;
  set("requests", "running", number(running));
  set("requests", "waiting", number(waiting));
  const at = Date.now();
  loads = [...loads.filter(([then]) => at - then < 60000 * MINUTES), [at, running, waiting]];
  const over = (column) => loads.map((load) => [(at - load[0]) / 1000, load[column]]);
  chart("requests", [{ values: over(1) }, { values: over(2) }], { format: number, area: true, label: `${running} running, ${waiting} waiting` });
}

function onState(name, why) {
  const words = { live: "live", gone: "no connection", locked: "locked" };
  $("connection").textContent = words[name];
  $("connection").className = `state ${name === "live" ? "good" : "bad"}`;
  $("main").classList.toggle("stale", name !== "live");
  $("key-form").hidden = name !== "locked";
  $("trouble").hidden = name !== "gone";
  if (name === "gone") $("trouble").textContent = `No data from the server (${why}). The page shows old data; reconnecting.`;
}

const stream = new Stream("../cluster/live", { event: onEvent, state: onState });
themeButton($("theme"), () => {
  page.colours = { cell: colourOf("--cell"), quiet: colourOf("--quiet") };
  for (const instance of page.instances.values()) instance.draw();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  stream.setKey($("key").value);
  $("key").value = "";
});
stream.start();
