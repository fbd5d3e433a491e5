// Dialogs: the timeline of a request, and the requests of an instance.

import { explained, staying } from "./instance.js";
import { make, makeSvg, seconds } from "./look.js";
import { ask } from "./stream.js";

const STAGE_ALPHA = { dispatch: 0.25, queue: 0.35, prefill: 1, handoff: 0.6, decode: 0.8 };
const LANE = 26;
const LEFT = 92;

const dialog = document.getElementById("dialog");
const body = document.getElementById("dialog-body");

function show(title, ...content) {
  document.getElementById("dialog-title").textContent = title;
  body.replaceChildren(...content);
  if (!dialog.open) dialog.showModal();
}

export async function openRequest(id, colour) {
  show(id, make("p", {}, "loading …"));
  try {
    const response = await ask(`../cluster/requests/${encodeURIComponent(id)}`);
    const answer = await response.json();
    if (!response.ok) return show(id, make("p", {}, answer.error?.message ?? String(answer.error)));
    show(id, ...answer.requests.flatMap((request) => timeline(request, colour)));
  } catch (error) {
    show(id, make("p", {}, `The server does not answer: ${error.message}`));
  }
}

function timeline(request, colour) {
  const facts = {
    state: request.outcome ?? request.state,
    ...(request.instance ? { on: request.instance } : {}),
    prompt: `${request.prompt_tokens} tokens`,
    output: `${request.output_tokens} tokens`,
    "first token": seconds(request.ttft_s),
    "longest gap": seconds(request.longest_gap_s),
    moves: request.migrations.filter((move) => move.outcome === "committed").length,
  };
  if (request.recomputes) facts.recomputed = `${request.recomputes} times`;
  const entries = Object.entries(facts).map(([name, value]) => make("span", {}, `${name} `, make("b", {}, String(value))));
  return [make("p", { className: "facts" }, ...entries), lanes(request, colour), story(request)];
}

/** One lane per instance, one bar per stage, and a line for each move. */
function lanes(request, colour) {
  const stays = request.instances;
  const names = [...new Set(stays.map((stay) => stay.instance))];
  const ends = [...stays.map((stay) => stay.end_s), ...request.stages.map((stage) => stage.end_s)];
  const end = request.e2e_s ?? Math.max(Date.now() / 1000 - request.issued_at, 0.001, ...ends);
  const width = 640, height = names.length * LANE + 20;
  const x = (at) => LEFT + (at / end) * (width - LEFT);
  const y = (instance) => names.indexOf(instance) * LANE;
  const svg = makeSvg("svg", { class: "lanes", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const text = (content, attributes) => {
    const element = makeSvg("text", attributes);
    element.textContent = content;
    svg.append(element);
  };
  for (const name of names) {
    text(name, { x: 0, y: y(name) + 15 });
    svg.append(makeSvg("line", { class: "rule", x1: LEFT, x2: width, y1: y(name) + 11, y2: y(name) + 11 }));
  }
  const bars = [...request.stages];
  const last = stays[stays.length - 1];
  if (last && last.end_s === null) {
    const from = Math.max(last.begin_s, ...bars.filter((bar) => bar.instance === last.instance).map((bar) => bar.end_s));
    bars.push({ stage: request.state, instance: last.instance, begin_s: from, end_s: end });
  }
  for (const bar of bars) {
    if (!names.includes(bar.instance)) continue;
    const wide = Math.max(2, x(bar.end_s) - x(bar.begin_s));
    const rect = makeSvg("rect", { x: x(bar.begin_s), y: y(bar.instance) + 4, width: wide, height: 14, rx: 3, opacity: STAGE_ALPHA[bar.stage] ?? 0.8 });
    rect.style.fill = colour;
    svg.append(rect);
  }
  for (let i = 1; i < stays.length; i++) {
    const at = x(stays[i].begin_s);
    svg.append(makeSvg("path", { class: "hop", d: `M ${at} ${y(stays[i - 1].instance) + 11} V ${y(stays[i].instance) + 11}` }));
  }
  text("0", { x: LEFT, y: height - 4 });
  text(seconds(end), { x: width, y: height - 4, "text-anchor": "end" });
  return svg;
}

/** The same as a list. */
function story(request) {
  const entries = [
    ...request.stages.map((s) => [s.begin_s, `${s.stage} on ${s.instance}`, seconds(s.end_s - s.begin_s)]),
    ...request.migrations.map((m) => [
      m.begin_s,
      `${m.source} → ${m.destination}: ${m.reason}${m.outcome === "committed" ? "" : `, aborted: ${m.why}`}`,
      m.outcome === "committed" ? `${m.blocks} blocks${m.downtime_s === null ? "" : `, gap ${seconds(m.downtime_s)}`}` : "",
    ]),
  ].sort((a, b) => a[0] - b[0]);
  return make("ol", { className: "log" }, ...entries.map(([at, what, size]) =>
    make("li", {}, make("time", {}, seconds(at)), make("span", { className: "what" }, what), make("small", {}, size))));
}

/** All requests on an instance, largest first. */
export function openInstance(instance, requests, blockTokens, open) {
  const held = [...instance.held].sort((a, b) => b[1] - a[1]);
  const most = held[0]?.[1] ?? 1;
  const rows = held.map(([number, blocks, arriving]) => {
    const request = requests.get(number);
    const name = make("button", { type: "button" }, request?.id ?? "?");
    name.addEventListener("click", () => open(number));
    const bar = make("span", { className: "bar" });
    bar.style.width = `${(100 * blocks) / most}%`;
    bar.style.background = request?.colour ?? "";
    const size = `${blocks} blocks, ≤ ${blocks * blockTokens} tokens`;
    return make("li", {}, bar, make("span", { className: "what" }, name, arriving ? " (arriving)" : ""), make("small", {}, size));
  });
  const row = instance.row;
  const facts = `${row.role}, ${row.state}${row.node ? ` on ${row.node}, process ${row.pid}` : ""}`;
  const list = rows.length ? make("ol", { className: "log" }, ...rows) : make("p", {}, "No request holds blocks here.");
  const more = [facts, explained(row), row.no_migration ? `Requests cannot move: ${row.no_migration}` : "", ...staying(row)].filter(Boolean);
  show(instance.id, ...more.map((text) => make("p", { className: "facts" }, text)), list);
}
