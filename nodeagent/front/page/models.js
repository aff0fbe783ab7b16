// The models: what each is for, whether it fits, where it is loaded, and the orders that change that.

import { get, modelPath } from "./api.js";
import { el, pill, setText, table, textPart, twoTexts } from "./dom.js";
import { bytes, count, percent, seconds } from "./format.js";

export function modelsView({ store, operator }) {
  const busy = new Map(); // model id -> the order under way
  const models = table("Models", [
    { name: "Model", class: "name", cell: () => twoTexts((model) => model.model_id, otherNames) },
    { name: "Task", cell: () => textPart((model) => store.taskOf(model.model_id) ?? "–") },
    { name: "State", cell: stateCell },
    { name: "Loaded on", cell: () => textPart((model) => model.loaded_on.join(", ") || "–") },
    { name: "File", class: "number", cell: () => textPart((model) => bytes(model.size_bytes)) },
    { name: "Fit", class: "fit", cell: () => textPart((model) => fit(model, store.inventory.devices)) },
    { name: "Context", class: "number", cell: () => textPart((model) => count(model.ctx_size)) },
    { name: "Slots", class: "number", cell: () => textPart((model) => model.parallel) },
    { name: "Load time", class: "number", cell: () => textPart((model) => seconds(model.load_time_s)) },
    { name: "", class: "orders", cell: () => ordersCell({ store, operator, busy }) },
  ], (model) => model.model_id);
  const node = el("section", { "aria-label": "Models" }, el("div", { class: "card" }, models.node));
  return { node, update: () => models.update(store.inventory?.models ?? []) };
}

const otherNames = (model) => [...model.aliases.map((alias) => `also ${alias}`), ...model.roles].join(" · ");

function stateCell() {
  const state = pill();
  const problem = el("span", { class: "problem small block" });
  return {
    node: el("span", {}, state.node, problem),
    update(model) {
      state.update(stateOf(model));
      setText(problem, model.problem);
    },
  };
}

function stateOf(model) {
  if (model.loading_on.length) return "loading";
  if (model.loaded_on.length) return "loaded";
  return model.failed_on.length || model.problem ? "failed" : "unloaded";
}

// The part of each device's memory that a server of the model takes: by the estimate, else by its file alone.
export function fit(model, devices) {
  const parts = devices.flatMap((device) => {
    const total = device.memory_total_bytes;
    const fitHere = model.fits?.find((it) => it.device_id === device.device_id);
    const needed = fitHere?.memory_needed_bytes ?? model.size_bytes;
    if (!total || !needed) return [];
    const share = `${percent(needed / total)} of ${device.device_id}`;
    return [needed > total ? `too large for ${device.device_id}` : needed / total < 0.005 ? `under 1 % of ${device.device_id}` : share];
  });
  return parts.join(", ") || "–";
}

function ordersCell({ store, operator, busy }) {
  let shown;
  const devices = el("select", { "aria-label": "Device to load on" });
  // One that can't be used now keeps the focus, which a disabled button would lose.
  const button = (name, act) => el("button", {
    type: "button",
    onclick: ({ currentTarget }) => currentTarget.ariaDisabled || act(shown, devices.value || null),
  }, name);
  const load = button("Load", (model, device) => send(model, "load", device ? { device_id: device } : {}, ({ device_id: on }) =>
    `${model.model_id} is ready on ${on}.`));
  const unload = button("Unload", (model) => stop(model, "unload", ({ unloaded_from: from }) =>
    from.length ? `${model.model_id} was unloaded from ${from.join(", ")}.` : `${model.model_id} was not loaded.`));
  const restart = button("Restart", (model) => stop(model, "restart", ({ restarted_on: on }) =>
    on.length ? `${model.model_id} was restarted on ${on.join(", ")}.` : `${model.model_id} was not loaded.`));
  const node = el("span", { class: "buttons" }, devices, load, unload, restart);
  return { node, update };

  function update(model) {
    shown = model;
    const ids = store.inventory.devices.map((device) => device.device_id);
    if (devices.options.length !== ids.length + 1) {
      devices.replaceChildren(el("option", { value: "" }, "any device"), ...ids.map((id) => el("option", { value: id }, id)));
    }
    devices.hidden = ids.length < 2;
    const order = busy.get(model.model_id);
    const isThere = model.loaded_on.length + model.loading_on.length > 0;
    show(load, "Load", order, devices.hidden && isThere);
    show(unload, "Unload", order, !isThere);
    show(restart, "Restart", order, !isThere && !model.failed_on.length);
    for (const one of [load, unload, restart]) one.setAttribute("aria-label", `${one.textContent} ${model.model_id}`);
  }

  function show(one, name, order, isUseless) {
    const isUnderWay = order === name.toLowerCase();
    setText(one, isUnderWay ? `${name}ing…` : name);
    one.ariaDisabled = order !== undefined || isUseless ? "true" : null;
    one.ariaBusy = isUnderWay ? "true" : null;
  }

  async function send(model, order, body, done) {
    busy.set(model.model_id, order);
    update(shown);
    await operator.order(modelPath(model.model_id, order), { body, done });
    busy.delete(model.model_id);
    update(shown);
  }

  // Stopping waits for the model's requests; where there are some, the operator says whether to.
  async function stop(model, order, done) {
    const { lanes } = await get("/v1/node/queue");
    const running = lanes.flatMap((lane) => lane.tickets)
      .filter((ticket) => ticket.model_id === model.model_id && ticket.state !== "waiting").length;
    let answer = "wait";
    if (running) {
      const requests = running === 1 ? "A request is" : `${running} requests are`;
      answer = await operator.ask(`${order === "unload" ? "Unload" : "Restart"} ${model.model_id}?`, `${requests} in flight.`,
        { wait: "Wait for them", force: "End them now" });
    }
    if (answer) await send(model, order, answer === "force" ? { force: true } : {}, done);
  }
}
