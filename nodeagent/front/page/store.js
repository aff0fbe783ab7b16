// What the page knows of the node. It asks only while somebody looks: a hidden page costs the node nothing.

import { Failure, get, token } from "./api.js";

const POLL_MS = 2_000;
const RETRY_MAX_MS = 15_000;
// Soon after an event, so that several which come together cause one request.
const SOON_MS = 250;
const HISTORY_S = 300;

export class Store extends EventTarget {
  inventory = null; // of /v1/node/inventory
  lanes = new Map(); // of /v1/node/queue, by device; empty while no device is busy
  models = []; // of /v1/models
  isForChatAlone = false; // whether the key that was given is for inference, and no more
  isOpen = true; // whether the node serves everybody, or wants an API key
  history = new Map(); // by device: [{at, memory, utilization}], oldest first
  problem = null; // why the last request failed

  #timer = null;
  #running = false;
  #asking = false;
  #again = false;
  #failures = 0;
  #modelsOf = "";

  start() {
    if (this.#running) return;
    this.#running = true;
    if (!this.#asking) this.#ask();
  }

  stop() {
    this.#running = false;
    clearTimeout(this.#timer);
  }

  // Ask now or as soon as the request under way has ended.
  refresh() {
    if (!this.#running) return;
    if (this.#asking) this.#again = true;
    else this.#askIn(SOON_MS);
  }

  device(deviceId) {
    return this.inventory?.devices.find((device) => device.device_id === deviceId);
  }

  #askIn(delay) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ask(), delay);
  }

  async #ask() {
    this.#asking = true;
    const began = performance.now();
    try {
      await this.#read();
      this.problem = null;
      this.#failures = 0;
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      this.problem = error.message;
      this.#failures += 1;
    } finally {
      this.#asking = false;
    }
    this.dispatchEvent(new Event("change"));
    if (!this.#running) return;
    const pause = this.#failures ? Math.min(RETRY_MAX_MS, POLL_MS * 2 ** (this.#failures - 1)) : POLL_MS;
    this.#askIn(this.#again ? SOON_MS : Math.max(SOON_MS, pause - (performance.now() - began)));
    this.#again = false;
  }

  async #read() {
    const inventory = await this.#inventory();
    this.isForChatAlone = inventory === null;
    if (this.isForChatAlone) return this.#readModels("");
    const busy = inventory.devices.some(({ lane }) => lane.in_flight || lane.waiting);
    const { lanes } = busy ? await get("/v1/node/queue") : { lanes: [] };
    const models = JSON.stringify(inventory.models.map((model) => [model.model_id, model.size_bytes, inventory.incarnation]));
    await this.#readModels(models);
    this.lanes = new Map(lanes.map((lane) => [lane.device_id, lane]));
    this.inventory = inventory;
    this.#remember(inventory.devices);
  }

  // Null if an API key is for inference alone: then there is the chat.
  async #inventory() {
    try {
      const inventory = await get("/v1/node/inventory");
      if (!token()) this.isOpen = true;
      return inventory;
    } catch (error) {
      if (error.status === 401) this.isOpen = false;
      if (error.status === 403 && token()) return null;
      throw error;
    }
  }

  // `version` changes with what `/v1/models` says, but for the state that the inventory has too.
  async #readModels(version) {
    if (version && version === this.#modelsOf) return;
    this.models = (await get("/v1/models")).data;
    this.#modelsOf = version;
  }

  taskOf(modelId) {
    return this.models.find((model) => model.id === modelId)?.task ?? null;
  }

  #remember(devices) {
    const at = Date.now() / 1000;
    for (const { device_id: deviceId, metrics } of devices) {
      const points = this.history.get(deviceId) ?? [];
      const { memory_used_bytes: used, memory_total_bytes: total, utilization_ratio: utilization } = metrics;
      points.push({ at, memory: total && used !== null ? used / total : null, utilization });
      while (points[0].at < at - HISTORY_S) points.shift();
      this.history.set(deviceId, points);
    }
  }
}
