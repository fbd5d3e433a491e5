// The page: updates all its parts from the events of the server.

import { Arcs } from "./arcs.js";
import { drawChart } from "./chart.js";
import { openInstance, openRequest } from "./dialogs.js";
import { Instance, notesOf } from "./instance.js";
import { ago, colourOf, make, number, requestColour, seconds, shortId, themeButton } from "./look.js";
import { Stream } from "./stream.js";

const MAX_NAMES = 20000;
const MAX_MOVES = 60;
/** More hand-offs in a row than this are shown as one. */
const MAX_SINGLE = 3;
const MINUTES = 5;
const ROLES = ["prefill", "decode", "neutral"];
const REASONS = ["handoff", "balance", "defragment", "drain", "manual"];
const LINE_DOTS = 60;
/** Up to this many instances have no groups and no search. */
const FEW = 8;
/** With more instances than this their maps are small, and nothing fades in. */
const MANY = 20;

const $ = (id) => document.getElementById(id);

const page = {
  requests: new Map(), // by number: { id, colour }
  instances: new Map(),
  colours: {},
  lit: 0,
  blockTokens: 0,
  isDense: false,

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
const loads = new Map(); // [slot, running, waiting], by slot
let moves = []; // newest first
const hidden = new Set(); // reasons that the list of migrations leaves out
let cluster = { migrations: {} }; // the latest
let latest = null; // the latest event

function onEvent(event, isFirst) {
  if (isFirst) {
    page.requests.clear();
    slots.clear();
    loads.clear();
    moves = [];
  }
  for (const [key, id] of Object.entries(event.names)) page.requests.set(Number(key), { id, colour: requestColour(id) });
  for (const key of page.requests.keys()) {
    if (page.requests.size <= MAX_NAMES) break;
    page.requests.delete(key);
  }
  page.blockTokens = event.block_tokens;
  cluster = event.cluster;
  latest = event;
  showState(event);
  showInstances(event);
  showMoves(event);
  showDecisions(event.cluster.decisions ?? []);
  showNumbers(event);
}

function showState({ cluster, server, service, model }) {
  $("service").replaceChildren(make("b", {}, model), service ? ` · ${service}` : "");
  document.title = model ? `${model} · pd-serve` : "pd-serve";
  const { state, policy, restarts } = cluster.scheduler ?? { state: "unknown", policy: "unknown", restarts: 0 };
  $("scheduler").className = `state ${state === "alive" ? "good" : "bad"}`;
  $("scheduler").textContent = `scheduler ${state}${restarts ? `, ${restarts} restarts` : ""}`;
  $("policy").textContent = `policy ${policy}`;
  $("server").textContent = server;
}

const byName = (a, b) => a.id.localeCompare(b.id, "en", { numeric: true });
const byRole = (a, b) => ROLES.indexOf(a.role) - ROLES.indexOf(b.role);
/** Draining instances count as they are: their freeness is minus infinity, and no trouble. */
const trouble = (row) => [row.no_migration ? 0 : 1, row.total_blocks && !row.draining ? row.freeness / row.total_blocks : 2];
const worst = (a, b) => {
  const [one, two] = [trouble(a), trouble(b)];
  return one[0] - two[0] || one[1] - two[1] || byName(a, b);
};
const ORDERS = { role: (a, b) => byRole(a, b) || byName(a, b), worst: (a, b) => byRole(a, b) || worst(a, b), name: byName };

/** A heading for each role, with the pool's numbers. */
function heading(role, rows) {
  const sum = (name) => rows.reduce((total, row) => total + row[name], 0);
  const total = sum("total_blocks"), wanted = cluster.wanted?.[role];
  const ready = rows.filter((row) => row.pid).length;
  const facts = [
    wanted === undefined ? `${ready}` : `${ready} of ${wanted} wanted`,
    total ? `${Math.round((100 * (total - sum("free_blocks"))) / total)} % of KV blocks used` : "",
    sum("preempted") ? `${number(sum("preempted"))} preempted` : "",
  ].filter(Boolean);
  const late = wanted !== undefined && ready < wanted;
  return make("h3", { className: `group ${role}${late ? " late" : ""}` }, role, make("small", {}, facts.join(" · ")));
}

/** The instances that have all words of the search in their name, role, state, notes or node. */
function found(rows) {
  const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return rows;
  const text = (row) => `${row.id} ${row.role} ${row.node} ${notesOf(row).join(" ")} ${row.state}`.toLowerCase();
  return rows.filter((row) => words.every((word) => text(row).includes(word)));
}

function showInstances({ cluster, blocks }) {
  const order = $("order").value;
  const all = cluster.instances;
  const rows = [...found(all)].sort(ORDERS[order]);
  $("finding").hidden = all.length <= FEW && !$("find").value;
  $("shown").textContent = rows.length === all.length ? "" : `${rows.length} of ${all.length} shown`;
  const container = $("instances");
  const here = new Set(rows.map((row) => row.id));
  for (const [id, instance] of page.instances) {
    if (here.has(id)) continue;
    instance.element.remove();
    page.instances.delete(id);
  }
  const least = rows.length <= FEW ? 270 : rows.length <= 20 ? 210 : 140;
  const most = Math.max(1, Math.floor((container.clientWidth + 14) / (least + 14)));
  const groups = order === "name" ? [rows] : ROLES.map((role) => rows.filter((row) => row.role === role));
  // As many columns as fit, without a nearly empty last row.
  const longest = Math.max(1, ...groups.map((group) => group.length));
  const count = rows.length <= FEW ? rows.length : longest;
  container.style.setProperty("--columns", Math.min(most, Math.ceil(count / Math.ceil(count / most))) || 1);
  page.isDense = rows.length > MANY;
  container.classList.toggle("dense", page.isDense);
  for (const old of container.querySelectorAll(".group")) old.remove();
  let place = 0;
  const put = (element) => {
    if (container.children[place] !== element) container.insertBefore(element, container.children[place] ?? null);
    place++;
  };
  for (const group of groups) {
    if (group.length && all.length > FEW && order !== "name") {
      const { role } = group[0];
      put(heading(role, all.filter((row) => row.role === role)));
    }
    for (const row of group) {
      let instance = page.instances.get(row.id);
      if (!instance) page.instances.set(row.id, (instance = new Instance(row.id, page)));
      put(instance.element);
      instance.show(row, blocks[row.id] ?? []);
    }
  }
  const immovable = all.filter((row) => row.no_migration);
  $("immovable").hidden = !immovable.length;
  if (immovable.length) {
    const names = immovable.length === all.length ? "the instances" : immovable.map((row) => row.id).join(", ");
    $("immovable").textContent = `Requests cannot move from or to ${names}: ${immovable[0].no_migration}.`;
  }
  const line = cluster.waiting_line;
  const dots = Array.from({ length: Math.min(line.requests, LINE_DOTS) }, () => make("i"));
  const words = line.requests
    ? `Waiting line: ${number(line.requests)} requests, ${number(line.tokens)} prompt tokens`
    : "Waiting line: empty";
  const wanted = Object.entries(cluster.wanted ?? {}).filter(([, size]) => size);
  const sizes = wanted.map(([role, size]) => {
    const ready = all.filter((row) => row.role === role && row.pid).length;
    return make("span", { className: `size${ready < size ? " late" : ""}` }, `${role} ${ready} of ${size} wanted`);
  });
  const preempted = all.reduce((sum, row) => sum + row.preempted, 0);
  sizes.push(make("span", { className: `size${preempted ? " late" : ""}` }, `${number(preempted)} preempted`));
  $("line").replaceChildren(make("span", {}, words), ...dots, ...sizes);
}

function showMoves(event) {
  arcs.show(event.moves, (request) => page.requests.get(request)?.colour ?? page.colours.quiet);
  arcs.showUnderWay(event.leaving);
  const now = Date.now();
  const known = (move) => page.requests.get(move.request) ?? { id: "?", colour: page.colours.quiet };
  const fresh = [...(event.past_moves ?? []), ...event.moves];
  moves = [...fresh.map((move) => ({ ...move, ...known(move), at: now - 1000 * move.seconds_ago })).reverse(), ...moves];
  moves = keep(moves);
  if (fresh.length) listMoves();
  for (const time of $("moves").querySelectorAll("time")) time.textContent = ago((now - time.dataset.at) / 1000);
  showFilters();
}

/** The newest migrations: so many hand-offs, and so many others, which would be lost among them. */
function keep(all) {
  const left = { handoff: MAX_MOVES, other: MAX_MOVES };
  return all.filter((move) => left[move.reason === "handoff" ? "handoff" : "other"]-- > 0);
}

/** Hand-offs that follow one another are one row, which opens. */
function listMoves() {
  const open = new Set([...$("moves").querySelectorAll("details[open]")].map((row) => row.dataset.last));
  const rows = [];
  let run = [];
  const flush = () => {
    if (run.length <= MAX_SINGLE) rows.push(...run.map(moveRow));
    else rows.push(handoffRow(run, open));
    run = [];
  };
  for (const move of moves.filter((one) => !hidden.has(one.reason))) {
    if (move.reason === "handoff" && move.committed) run.push(move);
    else {
      flush();
      rows.push(moveRow(move));
    }
  }
  flush();
  if (!rows.length) rows.push(make("li", { className: "none" }, moves.length ? "None of these." : "None yet."));
  $("moves").replaceChildren(...rows);
}

function handoffRow(run, open) {
  const last = run[run.length - 1], time = make("time");
  time.dataset.at = run[0].at;
  const details = make("details", {}, make("summary", {}, make("span", { className: "reason handoff" }, `${run.length} hand-offs`)),
    make("ol", { className: "log inner" }, ...run.map(moveRow)));
  details.dataset.last = `${last.id} ${last.source}`;
  details.open = open.has(details.dataset.last);
  return make("li", { className: "run" }, time, details);
}

/** One button for each reason, with the number of migrations since the start; it hides them in the list. */
function showFilters() {
  const counts = cluster.migrations;
  const reasons = REASONS.filter((reason) => counts[reason]?.committed || counts[reason]?.aborted);
  const box = $("reasons");
  if (box.dataset.shown !== reasons.join()) {
    box.dataset.shown = reasons.join();
    box.replaceChildren(...reasons.map((reason) => {
      const button = make("button", { type: "button", className: `reason ${reason}` });
      button.setAttribute("aria-pressed", String(!hidden.has(reason)));
      button.addEventListener("click", () => {
        if (!hidden.delete(reason)) hidden.add(reason);
        button.setAttribute("aria-pressed", String(!hidden.has(reason)));
        listMoves();
        for (const time of $("moves").querySelectorAll("time")) time.textContent = ago((Date.now() - time.dataset.at) / 1000);
      });
      return button;
    }));
  }
  reasons.forEach((reason, place) => {
    const { committed, aborted } = counts[reason];
    box.children[place].textContent = `${reason} ${number(committed)}${aborted ? ` (${number(aborted)} aborted)` : ""}`;
  });
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

function showNumbers({ latency, cluster, outcomes, loads: rows }) {
  for (const row of latency.slots) slots.set(row[0], row);
  for (const row of rows) loads.set(row[0], row);
  const now = latency.now, slotS = latency.slot_s, begin = Math.floor(now - (60 * MINUTES) / slotS);
  for (const table of [slots, loads]) for (const key of table.keys()) if (key < begin) table.delete(key);
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
  set("requests", "errors", number(outcomes.errors));
  const { attainment, goodput } = cluster.targets;
  set("requests", "attainment", attainment === null ? "–" : `${(100 * attainment).toFixed(1)} %`);
  set("requests", "attainment-label", `within targets, ${number(goodput)}/s`);
  for (const name of ["attainment", "attainment-label"]) $("requests").querySelector(`[data-name=${name}]`).hidden = attainment === null;
  for (const name of ["errors", "errors-label"]) $("requests").querySelector(`[data-name=${name}]`).hidden = !outcomes.errors;
  // The past is what the server has recorded; now is what the instances have last reported.
  const past = [...loads.values()].sort((a, b) => a[0] - b[0]).filter(([slot]) => slot < Math.floor(now));
  const over = (column, value) => [...past.map((row) => [Math.max(0, (now - row[0] - 0.5) * slotS), row[column]]), [0, value]];
  chart("requests", [{ values: over(1, running) }, { values: over(2, waiting) }], { format: number, area: true, label: `${running} running, ${waiting} waiting` });
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
$("order").addEventListener("change", () => {
  localStorage.setItem("order", $("order").value);
  if (latest) showInstances(latest);
});
$("find").addEventListener("input", () => latest && showInstances(latest));
if (localStorage.getItem("order") in ORDERS) $("order").value = localStorage.getItem("order");
stream.start();
