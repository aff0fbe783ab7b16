// The last requests, with where their time went, and the bodies of one where the node keeps them.

import { Failure, get, serverEvents, stream } from "./api.js";
import { bodiesDialog } from "./bodies.js";
import { el, pill, setText, table, textPart, twoTexts } from "./dom.js";
import { clock, count, milliseconds, rate } from "./format.js";
import { signInPrompt } from "./operator.js";

const PATH = "/v1/node/activity";
const SHOWN = 50;
const RETRY_MS = 5_000;

export function activityView({ operator }) {
  const bodies = bodiesDialog(operator);
  const prompt = signInPrompt(operator, "Activity");
  const empty = el("p", { class: "empty" });
  const requests = table("The last requests", [
    { name: "Time", cell: () => twoTexts((it) => clock(it.time), client, { class: "client" }) },
    { name: "Status", cell: statusCell },
    { name: "Model", class: "name", cell: () => twoTexts((it) => it.model_id ?? "–", (it) => it.path) },
    { name: "Device", cell: () => textPart((it) => it.device_id ?? "–") },
    { name: "Queue", class: "number", cell: () => textPart((it) => milliseconds(it.queue_ms)) },
    { name: "Load", class: "number", cell: () => textPart((it) => milliseconds(it.load_ms)) },
    { name: "First token", class: "number", cell: () => textPart((it) => milliseconds(it.first_token_ms)) },
    { name: "Duration", class: "number", cell: () => textPart((it) => milliseconds(it.duration_ms)) },
    { name: "Prompt", class: "number", cell: () => twoTexts((it) => count(it.prompt_tokens), cached) },
    { name: "Answer", class: "number", cell: () => textPart((it) => count(it.completion_tokens)) },
    { name: "Tokens/s", class: "number", cell: () => textPart((it) => rate(it.tokens_per_s)) },
    { name: "", class: "orders", cell: () => bodiesCell(bodies) },
  ], (it) => `${it.id} ${it.request_id}`);
  const node = el("section", { "aria-label": "Activity" }, el("div", { class: "card" }, prompt, empty, requests.node), bodies.node);
  let following = null;
  let records = [];
  return { node, update, show: update, hide: stop };

  function update() {
    prompt.hidden = operator.mayOperate;
    if (operator.mayOperate) {
      if (!following && node.isConnected && !document.hidden) follow();
    } else {
      stop();
      bodies.close();
      empty.hidden = requests.node.hidden = true;
    }
  }

  function stop() {
    following?.abort();
    following = null;
  }

  // The last requests, then each that ends.
  async function follow() {
    const { signal } = (following = new AbortController());
    while (!signal.aborted) {
      try {
        take((await get(`${PATH}?limit=${SHOWN}`)).activity, []);
        const response = await stream(`${PATH}?follow=true&since=${records[0]?.id ?? 0}`, { signal });
        for await (const { data } of serverEvents(response)) if (data && !signal.aborted) take([JSON.parse(data)], records);
      } catch (error) {
        if (signal.aborted) return;
        if (!(error instanceof Failure) && !(error instanceof TypeError)) throw error; // a stream that breaks off is one
        if (error.status === 401) return operator.signOut();
        show(error.status === 404 ? "This node keeps no activity." : error.message);
        if (error.status === 404) return; // until the next visit
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  function take(newer, older) {
    records = [...newer, ...older].slice(0, SHOWN);
    requests.update(records);
    show(records.length ? "" : "There was no request yet.");
  }

  function show(text) {
    setText(empty, text);
    empty.hidden = !text;
    requests.node.hidden = Boolean(text);
  }
}

function statusCell() {
  const status = pill();
  return {
    node: status.node,
    update(it) {
      const isWell = it.status !== null && it.status < 400 && !it.error;
      status.update(isWell ? "ready" : "failed", [it.status, it.error].filter((part) => part !== null && part !== undefined).join(" "));
    },
  };
}

function bodiesCell(bodies) {
  let shown;
  const button = el("button", { type: "button", onclick: () => bodies.open(shown) }, "Bodies");
  const node = el("span");
  return {
    node,
    update(it) {
      shown = it;
      if (it.has_bodies && !button.isConnected) node.append(button);
    },
  };
}

const client = (it) => [it.key_name, it.user_agent].filter(Boolean).join(" · ");
const cached = (it) => (it.cached_tokens ? `${count(it.cached_tokens)} cached` : "");
