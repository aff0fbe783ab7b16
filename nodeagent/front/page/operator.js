// What an operator does here: signing in, orders, questions before them, and notices of how they ended.

import { Failure, checkToken, forgetToken, isOperators, keepToken, post, token } from "./api.js";
import { el, setText } from "./dom.js";

const NOTICE_MS = 8_000;
const NOTICES_MAX = 4;

const byId = (id) => document.getElementById(id);

export class Operator extends EventTarget {
  #store;

  constructor(store) {
    super();
    this.#store = store;
  }

  get signedIn() {
    return token() !== null;
  }

  get mayOperate() {
    return isOperators();
  }

  signOut() {
    forgetToken();
    this.dispatchEvent(new Event("change"));
  }

  // Ask for the token, until there is one or the user gives up. `problem` says what was wrong with the last one.
  async signIn(problem = "") {
    const dialog = byId("token-dialog");
    const field = byId("token");
    if (dialog.open) return;
    setText(byId("token-problem"), problem);
    field.value = "";
    dialog.showModal();
    await new Promise((resolve) => {
      const end = new AbortController();
      const until = { signal: end.signal };
      dialog.addEventListener("close", () => { end.abort(); resolve(); }, until);
      dialog.querySelector("[data-answer=cancel]").addEventListener("click", () => dialog.close(), until);
      dialog.querySelector("form").addEventListener("submit", (event) => {
        event.preventDefault();
        this.#try(field, dialog);
      }, until);
    });
    this.dispatchEvent(new Event("change"));
  }

  async #try(field, dialog) {
    const value = field.value.trim();
    const problem = byId("token-problem");
    // A header has no others, and neither has a token.
    if (!/^[\x21-\x7e]+$/.test(value)) return setText(problem, "A token has only letters, digits and signs.");
    try {
      const mayOperate = await checkToken(value, this.#store.inventory?.devices[0]?.device_id ?? "cpu:0", this.#store.isOpen);
      if (mayOperate !== null) {
        keepToken(value, mayOperate);
        return dialog.close();
      }
      setText(problem, "The node does not know this token.");
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      setText(problem, error.message);
    }
    field.select();
  }

  // Send an order; its outcome is a notice. False if it failed or was given up.
  async order(path, { body, done }) {
    if (!this.mayOperate) await this.signIn();
    if (!this.mayOperate) return false;
    try {
      const answer = await post(path, body);
      this.notice(done(answer));
      return true;
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      if (error.status === 401) {
        this.signOut();
        await this.signIn("The node does not know this token any more. Sign in, then try again.");
      } else {
        this.notice(error.message, true);
      }
      return false;
    } finally {
      this.#store.refresh();
    }
  }

  // Ask, with these answers as {value: label}; null if the question was left.
  ask(title, text, answers) {
    const dialog = byId("question");
    setText(byId("question-title"), title);
    setText(byId("question-text"), text);
    const buttons = [["", "Cancel"], ...Object.entries(answers)].map(([value, label], index) =>
      el("button", { type: "button", class: index === 1 ? "primary" : null, onclick: () => dialog.close(value) }, label));
    byId("question-buttons").replaceChildren(...buttons);
    dialog.returnValue = "";
    dialog.showModal();
    return new Promise((resolve) => {
      dialog.addEventListener("close", () => resolve(dialog.returnValue || null), { once: true });
    });
  }

  notice(text, isProblem = false) {
    const box = byId("notices");
    const close = el("button", { type: "button", class: "plain", "aria-label": "Dismiss" }, "×");
    const node = el("div", { class: isProblem ? "notice problem" : "notice" }, el("span", {}, text), close);
    close.addEventListener("click", () => node.remove());
    // What failed stays until it is dismissed.
    if (!isProblem) setTimeout(() => node.remove(), NOTICE_MS);
    box.append(node);
    while (box.children.length > NOTICES_MAX) box.firstChild.remove();
  }
}

// What a view shows instead of what only operators see.
export function signInPrompt(operator, what) {
  return el("p", { class: "empty" }, `${what} only operators see. `,
    el("button", { type: "button", onclick: () => operator.signIn() }, "Sign in"));
}
