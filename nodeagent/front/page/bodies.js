// The bodies of one request and its answer, in a dialog. They may hold anything, and go in as text.

import { Failure, get } from "./api.js";
import { el, setText } from "./dom.js";
import { bytes } from "./format.js";

export function bodiesDialog(operator) {
  const title = el("h2", { id: "bodies-title" });
  const content = el("div", { class: "bodies" });
  const node = el("dialog", { class: "wide", "aria-labelledby": "bodies-title" }, title, content,
    el("div", { class: "buttons" }, el("button", { type: "button", onclick: close }, "Close")));
  let asked = 0;
  node.addEventListener("close", () => {
    asked += 1;
    content.replaceChildren(); // what people wrote does not stay in the document
  });
  return { node, open, close };

  function close() {
    node.close();
  }

  async function open({ id, path }) {
    const mine = (asked += 1);
    setText(title, `Request ${id}: ${path}`);
    content.replaceChildren(el("p", { class: "empty" }, "The bodies are asked for."));
    node.showModal();
    try {
      const record = await get(`/v1/node/activity/${id}`);
      if (mine === asked) content.replaceChildren(part("Request", record.request_body), part("Answer", record.answer_body));
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      if (mine !== asked) return;
      if (error.status === 401) operator.signOut();
      else content.replaceChildren(el("p", { class: "problem" }, error.message));
    }
  }
}

function part(name, body) {
  const facts = body
    ? [body.type, bytes(body.bytes), body.cut ? "cut: this is its beginning" : body.text === null ? "no text" : null].filter(Boolean).join(" · ")
    : "There is none, or it is not kept any more.";
  // Scrolled by the keyboard too.
  const text = body && body.text !== null ? el("pre", { tabindex: "0", role: "region", "aria-label": name }, body.text) : null;
  return el("section", {}, el("h3", {}, name), el("p", { class: "quiet small" }, facts), text);
}
