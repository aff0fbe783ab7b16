// The devices: memory and utilisation over the last minutes, servers, and the queue.

import { chart } from "./chart.js";
import { el, list, pill, setAttribute, setText, table, textPart } from "./dom.js";
import { ago, bytes, count, percent, seconds } from "./format.js";

// An older reading is said to be old: a card that sleeps is not woken to be measured.
const OLD_READING_S = 30;

export function overview({ store }) {
  const devices = el("div", { class: "cards" });
  const node = el("section", { "aria-label": "Overview" }, devices);
  return {
    node,
    update() {
      list(devices, store.inventory?.devices ?? [], (device) => device.device_id, () => deviceCard(store));
    },
  };
}

function deviceCard(store) {
  const id = el("h2");
  const name = el("p", { class: "quiet" });
  const memory = figure("Memory", (point) => point.memory);
  const use = figure("Utilisation", (point) => point.utilization);
  const more = el("p", { class: "quiet small" });
  const servers = el("ul", { class: "servers" });
  const idle = el("p", { class: "empty" }, "No model is loaded.");
  const queueHead = el("p", { class: "quiet" });
  const queue = queueTable();
  const node = el("article", { class: "card device" },
    el("div", { class: "title" }, id, name),
    el("div", { class: "figures" }, memory.node, use.node), more,
    el("h3", {}, "Servers"), servers, idle,
    el("h3", {}, "Queue"), queueHead, queue.node);
  return {
    node,
    update(device) {
      const { metrics, lane } = device;
      const points = store.history.get(device.device_id) ?? [];
      setText(id, device.device_id);
      setText(name, `${device.name} · ${device.backend}`);
      const total = metrics.memory_total_bytes ?? device.memory_total_bytes;
      memory.update(points, metrics.memory_used_bytes === null ? "–" : `${bytes(metrics.memory_used_bytes)} of ${bytes(total)}`);
      use.update(points, percent(metrics.utilization_ratio));
      setText(more, further(metrics));
      more.hidden = !more.textContent;
      list(servers, device.servers, (server) => server.model_id, () => serverLine(store));
      idle.hidden = device.servers.length > 0;
      const { tickets } = store.lanes.get(device.device_id) ?? { tickets: [] };
      setText(queueHead, load(lane));
      queue.update(tickets.map((ticket) => ({ ...ticket, device, all: tickets })));
      queue.node.hidden = tickets.length === 0;
    },
  };
}

function figure(name, read) {
  const value = el("span", { class: "value" });
  const picture = chart(name, read);
  const node = el("figure", {}, el("figcaption", {}, el("span", {}, name), value), picture.node);
  return {
    node,
    update(points, text) {
      setText(value, text);
      picture.update(points);
    },
  };
}

function further({ temperature_celsius: temperature, power_watts: power, age_s: age }) {
  const facts = [];
  if (temperature !== null) facts.push(`${Math.round(temperature)} °C`);
  if (power !== null) facts.push(`${Math.round(power)} W`);
  if (age !== null && age > OLD_READING_S) facts.push(`measured ${seconds(age)} ago`);
  return facts.join(" · ");
}

function load({ in_flight: running, waiting, limit, estimated_wait_s: wait }) {
  const room = `${running} in flight, ${waiting} queued; room for ${limit}`;
  return wait > 0.05 ? `${room}. A new request would wait ${seconds(wait)}.` : `${room}.`;
}

function serverLine(store) {
  const model = el("strong");
  const state = pill();
  const facts = el("span", { class: "quiet" });
  const reason = el("p", { class: "reason" });
  return {
    node: el("li", {}, model, state.node, facts, reason),
    update(server) {
      setText(model, server.model_id);
      state.update(server.state);
      const parts = [];
      if (server.state !== "failed") {
        parts.push(`for ${ago(server.since, store.inventory.sent_at)}`, server.slots === 1 ? "1 slot" : `${server.slots} slots`);
      }
      if (server.slot_ctx_size) parts.push(`${count(server.slot_ctx_size)} tokens each`);
      if (server.ready_in_s !== null) parts.push(`may start in ${seconds(server.ready_in_s)}`);
      setText(facts, parts.join(" · "));
      setText(reason, server.reason);
      reason.hidden = !server.reason;
      setAttribute(reason, "class", server.state === "ready" ? "reason quiet" : "reason problem");
    },
  };
}

function queueTable() {
  const state = () => {
    const part = pill();
    const place = ({ position }) => (position ? `place ${position}` : "waiting");
    return {
      node: part.node,
      update: (ticket) => (isRunning(ticket) ? part.update("ready", "in flight") : part.update("waiting", place(ticket))),
    };
  };
  return table("Queue", [
    { name: "State", cell: state },
    { name: "Model", class: "name", cell: () => textPart((ticket) => ticket.model_id) },
    { name: "Priority", cell: () => textPart((ticket) => ticket.priority) },
    { name: "Since", class: "number", cell: () => textPart((ticket) => seconds(ticket.age_s)) },
    { name: "Starts in", class: "number", cell: () => textPart((ticket) => seconds(ticket.starts_in_s)) },
    { name: "Why", cell: () => textPart(why) },
    { name: "Request", cell: () => textPart((ticket) => ticket.request_id, { class: "id" }) },
  ], (ticket) => ticket.request_id);
}

const isRunning = (ticket) => ticket.state !== "waiting";

// For what a request waits, from the states of its device's servers.
export function why(ticket) {
  if (isRunning(ticket)) return "–";
  const { servers } = ticket.device;
  const own = servers.find((server) => server.model_id === ticket.model_id);
  const others = new Set(ticket.all.filter(isRunning).map((other) => other.model_id).filter((id) => id !== ticket.model_id));
  switch (own?.state) {
    case "starting":
      return "its model is loading";
    case "backing_off":
      return "its server ended and starts again";
    case "unhealthy":
    case "stopping":
      return "its server stops";
    case "failed":
      return "its model has failed here";
  }
  if (others.size) return `${[...others].join(", ")} is in use`;
  const busy = ticket.all.filter((other) => isRunning(other) && other.model_id === ticket.model_id).length;
  if (own && busy >= own.slots) return own.slots === 1 ? "the slot is busy" : `all ${own.slots} slots are busy`;
  const loading = servers.find((server) => server.state === "starting");
  if (loading) return `${loading.model_id} is loading`;
  return own ? "its turn comes next" : "its model is not loaded yet";
}
