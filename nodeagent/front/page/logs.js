// What the servers of a device print, as it comes.

import { lines, logsPath, stream } from "./api.js";
import { el, list, setText } from "./dom.js";
import { signInPrompt } from "./operator.js";

const LINES = 500;
const KEPT = 2_000;
// Close enough to the end to go on with it.
const NEAR_END_PX = 40;

export function logsView({ store, operator }) {
  const devices = el("select", { id: "log-device", onchange: restart });
  const state = el("span", { class: "quiet", role: "status" });
  const output = el("pre", { class: "log", tabindex: "0", role: "log", "aria-label": "Output of the servers", "aria-live": "off" });
  const prompt = signInPrompt(operator, "Logs");
  const bar = el("div", { class: "tools" }, el("label", { for: "log-device" }, "Device"), devices, state);
  const node = el("section", { "aria-label": "Logs" }, el("div", { class: "card" }, prompt, bar, output));
  let following = null;
  return { node, update, show: update, hide: stop };

  function update() {
    prompt.hidden = operator.mayOperate;
    bar.hidden = output.hidden = !operator.mayOperate;
    list(devices, store.inventory?.devices ?? [], (device) => device.device_id, (device) =>
      ({ node: el("option", { value: device.device_id }, `${device.device_id} (${device.name})`) }));
    if (!operator.mayOperate) stop();
    else if (!following && node.isConnected && !document.hidden && devices.value) follow();
  }

  function stop() {
    following?.abort();
    following = null;
  }

  function restart() {
    stop();
    update();
  }

  async function follow() {
    const { signal } = (following = new AbortController());
    output.replaceChildren();
    setText(state, "following");
    try {
      const response = await stream(`${logsPath(devices.value, LINES)}&follow=true`, { signal });
      for await (const line of lines(response)) append(line);
      setText(state, "The stream has ended.");
    } catch (error) {
      if (signal.aborted) return;
      setText(state, error.status === 401 ? "" : `The stream broke off: ${error.message}`);
      if (error.status === 401) operator.signOut();
    }
    // The next look begins again.
    if (following?.signal === signal) following = null;
  }

  function append(line) {
    const isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < NEAR_END_PX;
    output.append(`${line}\n`);
    while (output.childNodes.length > KEPT) output.firstChild.remove();
    if (isAtEnd) output.scrollTop = output.scrollHeight;
  }
}
