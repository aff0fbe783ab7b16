// What happens on the node, as it comes. The stream also tells the other views when to look again.

import { Failure, serverEvents, stream } from "./api.js";
import { el, list, pill } from "./dom.js";
import { clock } from "./format.js";
import { signInPrompt } from "./operator.js";

const KEPT = 500;
const RETRY_MS = 5_000;
const TOGETHER_MS = 50;

// Follows `/v1/node/events` while somebody looks, from where it left off.
export class EventFeed extends EventTarget {
  events = []; // newest first
  #operator;
  #last = "0";
  #following = null;
  #telling = null;

  constructor(operator) {
    super();
    this.#operator = operator;
  }

  start() {
    if (this.#following || !this.#operator.mayOperate) return;
    this.#following = new AbortController();
    this.#follow(this.#following.signal);
  }

  stop() {
    this.#following?.abort();
    this.#following = null;
  }

  async #follow(signal) {
    while (!signal.aborted) {
      try {
        const response = await stream("/v1/node/events", { signal, headers: { "Last-Event-ID": this.#last } });
        for await (const event of serverEvents(response)) this.#take(event);
      } catch (error) {
        if (error.status === 401) {
          this.stop();
          this.#operator.signOut();
        } else if (!(error instanceof Failure) && !signal.aborted && !(error instanceof TypeError)) {
          throw error; // a stream that breaks off is a TypeError
        }
      }
      if (!signal.aborted) await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  #take({ event, id, data }) {
    if (!data || event === "missed") return;
    const what = JSON.parse(data);
    this.#last = id;
    this.events.unshift({ ...what, id: `${id} ${what.at}` }); // another run of the agent counts from 1 again
    if (this.events.length > KEPT) this.events.length = KEPT;
    // At first all that are kept come at once.
    this.#telling ??= setTimeout(() => {
      this.#telling = null;
      this.dispatchEvent(new Event("change"));
    }, TOGETHER_MS);
  }
}

export function eventsView({ feed, operator }) {
  const items = el("ol", { class: "events", reversed: true });
  const empty = el("p", { class: "empty" }, "Nothing has happened yet.");
  const prompt = signInPrompt(operator, "Events");
  const node = el("section", { "aria-label": "Events" }, el("div", { class: "card" }, prompt, empty, items));
  return {
    node,
    update() {
      prompt.hidden = operator.mayOperate;
      items.hidden = !operator.mayOperate;
      empty.hidden = !operator.mayOperate || feed.events.length > 0;
      list(items, operator.mayOperate ? feed.events : [], (event) => event.id, eventLine);
    },
  };
}

function eventLine(event) {
  const kind = pill();
  // An end that was asked for is nothing to look into.
  const isOrdinary = event.kind === "exited" && event.reason_code === "stopped";
  kind.update(isOrdinary ? "stopped" : event.kind, event.kind);
  const where = [event.model_id, event.device_id].filter(Boolean).join(" on ");
  const generation = event.generation ? `generation ${event.generation}` : null;
  const lines = event.last_lines.length
    ? el("details", {}, el("summary", {}, "What it printed last"), el("pre", {}, event.last_lines.join("\n")))
    : null;
  return {
    node: el("li", {},
      el("time", { datetime: event.at }, clock(event.at)), kind.node,
      el("span", {}, el("strong", {}, where || "node"), generation ? el("span", { class: "quiet" }, ` · ${generation}`) : null),
      event.reason ? el("p", { class: "reason" }, event.reason) : null, lines),
  };
}
