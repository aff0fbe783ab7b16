// A chat to try a model: with a stop button, and what the answer took.

import { Failure, serverEvents, stream } from "./api.js";
import { el, list, setText } from "./dom.js";
import { count, milliseconds, rate, seconds } from "./format.js";

const PATH = "/v1/chat/completions";
const NEAR_END_PX = 60;

export function chatView({ store, operator }) {
  const messages = []; // as they are sent: {role, content}
  let answering = null;
  let isFilled = false;

  const models = el("select", { id: "chat-model" });
  const system = el("textarea", { id: "chat-system", rows: "2" });
  const maxTokens = el("input", { id: "chat-max-tokens", type: "number", min: "1", max: "1000000", placeholder: "no limit" });
  const temperature = el("input", { id: "chat-temperature", type: "number", min: "0", max: "5", step: "0.1", placeholder: "the model's" });
  const log = el("div", { class: "messages", role: "log", "aria-label": "Conversation", tabindex: "0" });
  const prompt = el("textarea", { id: "chat-prompt", rows: "3", placeholder: "Enter sends, Shift+Enter begins a new line", onkeydown: key });
  const send = el("button", { type: "submit", class: "primary" }, "Send");
  const stop = el("button", { type: "button", onclick: () => answering?.abort(), hidden: true }, "Stop");
  const fresh = el("button", { type: "button", onclick: begin }, "New chat");
  const form = el("form", { class: "composer", onsubmit: submit },
    el("label", { for: "chat-prompt", class: "unseen" }, "Message"), prompt,
    el("div", { class: "buttons" }, fresh, stop, send));
  const node = el("section", { "aria-label": "Chat" }, el("div", { class: "card chat" },
    el("div", { class: "tools" }, el("label", { for: "chat-model" }, "Model"), models,
      el("details", { class: "options" }, el("summary", {}, "Options"),
        el("div", { class: "fields" },
          el("label", { for: "chat-system" }, "System prompt"), system,
          el("label", { for: "chat-max-tokens" }, "Most tokens"), maxTokens,
          el("label", { for: "chat-temperature" }, "Temperature"), temperature))),
    log, form));
  return { node, update, show: () => prompt.focus({ preventScroll: true }) };

  function update() {
    const loaded = new Set((store.inventory?.models ?? []).filter((model) => model.loaded_on.length).map((model) => model.model_id));
    const fitting = store.models.filter(({ task }) => task === "chat" || !task);
    list(models, fitting, ({ id }) => id, ({ id }) => {
      const option = el("option", { value: id });
      return { node: option, update: () => setText(option, loaded.has(id) ? `${id} (loaded)` : id) };
    });
    if (isFilled || !fitting.length) return;
    isFilled = true;
    models.value = (fitting.find(({ id }) => loaded.has(id)) ?? fitting[0]).id;
  }

  function key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  }

  function begin() {
    answering?.abort();
    messages.length = 0;
    log.replaceChildren();
    prompt.focus();
  }

  async function submit(event) {
    event.preventDefault();
    const content = prompt.value.trim();
    if (!content || answering || !form.reportValidity()) return;
    prompt.value = "";
    messages.push({ role: "user", content });
    log.append(message("user", "You", content).node);
    const answer = message("assistant", models.value, "");
    log.append(answer.node);
    log.scrollTop = log.scrollHeight;
    answering = new AbortController();
    log.ariaBusy = "true"; // a reader hears the answer when it is complete
    send.disabled = true;
    stop.hidden = false;
    prompt.focus();
    try {
      await receive(answer, answering.signal);
    } finally {
      if (answer.text()) messages.push({ role: "assistant", content: answer.text() });
      else messages.pop(); // a question without an answer is not sent again
      if (!answer.node.isConnected) messages.length = 0; // a new chat has begun meanwhile
      answering = null;
      log.ariaBusy = null;
      send.disabled = false;
      if (document.activeElement === stop) prompt.focus();
      stop.hidden = true;
      store.refresh();
    }
  }

  function body() {
    const before = system.value.trim() ? [{ role: "system", content: system.value.trim() }] : [];
    return {
      model: models.value,
      messages: [...before, ...messages],
      stream: true,
      stream_options: { include_usage: true },
      ...(maxTokens.value ? { max_tokens: Number(maxTokens.value) } : {}),
      ...(temperature.value ? { temperature: Number(temperature.value) } : {}),
    };
  }

  async function receive(answer, signal) {
    const figures = new Figures();
    answer.note("waiting");
    try {
      const response = await stream(PATH, { method: "POST", body: body(), signal, accept: "text/event-stream" });
      figures.head(response.headers);
      for await (const event of serverEvents(response)) {
        if (event.comment) answer.note(event.comment);
        else if (event.data !== "[DONE]") take(JSON.parse(event.data), answer, figures);
      }
      answer.note(figures.text());
    } catch (error) {
      if (signal.aborted) return answer.note(`stopped · ${figures.text()}`);
      if (error instanceof Failure && error.status === 401) operator.signIn("The node wants a token for this.");
      answer.fail(error instanceof TypeError ? "The answer broke off." : error.message);
    }
  }

  function take(chunk, answer, figures) {
    if (chunk.error) throw new Failure(0, chunk.error.message);
    const delta = chunk.choices?.[0]?.delta ?? {};
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
    if (delta.reasoning_content) answer.think(delta.reasoning_content);
    if (delta.content) answer.write(delta.content);
    if (delta.content || delta.reasoning_content) {
      figures.token();
      answer.note(figures.text());
    }
    figures.end(chunk);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }
}

// One message on the page.
function message(role, name, content) {
  const text = el("div", { class: "text" }, content);
  const thoughts = el("pre");
  const thinking = el("details", { hidden: true }, el("summary", {}, "Reasoning"), thoughts);
  const note = el("p", { class: "quiet small" });
  const node = el("article", { class: `message ${role}` }, el("h2", {}, name), thinking, text, note);
  return {
    node,
    text: () => text.textContent,
    write: (piece) => text.append(piece),
    think(piece) {
      thinking.hidden = false;
      thoughts.append(piece);
    },
    note: (words) => setText(note, words),
    fail(words) {
      setText(note, words);
      note.className = "problem";
    },
  };
}

// What an answer took: from the server's own figures where its last chunk has them, else as seen here.
class Figures {
  #sent = performance.now();
  #first = null;
  #last = null;
  #tokens = 0;
  #rate = null;
  #where = [];

  head(headers) {
    const device = headers.get("X-Node-Device");
    if (!device) return; // the head of a stream that waited was sent before its device was known
    this.#where = [device];
    for (const [name, header] of [["queue", "X-Node-Queue-Ms"], ["load", "X-Node-Load-Ms"]]) {
      const value = Number(headers.get(header));
      if (value >= 1) this.#where.push(`${name} ${milliseconds(value)}`);
    }
  }

  token() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#tokens += 1;
  }

  end({ usage, timings }) {
    if (usage?.completion_tokens) this.#tokens = usage.completion_tokens;
    if (timings?.predicted_per_second) this.#rate = timings.predicted_per_second;
  }

  text() {
    const parts = [...this.#where];
    if (this.#first !== null) parts.push(`first token ${seconds((this.#first - this.#sent) / 1000)}`);
    parts.push(this.#tokens === 1 ? "1 token" : `${count(this.#tokens)} tokens`);
    const seen = this.#last > this.#first ? ((this.#tokens - 1) * 1000) / (this.#last - this.#first) : null;
    const speed = this.#rate ?? seen;
    if (speed !== null && this.#tokens > 1) parts.push(`${rate(speed)} tokens/s`);
    return parts.join(" · ");
  }
}
