// Starts the page: its views, its header, and looking at the node while the page is visible.

import { activityView } from "./activity.js";
import { chatView } from "./chat.js";
import { setAttribute, setText } from "./dom.js";
import { EventFeed, eventsView } from "./events.js";
import { ago } from "./format.js";
import { logsView } from "./logs.js";
import { modelsView } from "./models.js";
import { Operator } from "./operator.js";
import { overview } from "./overview.js";
import { Store } from "./store.js";

const byId = (id) => document.getElementById(id);

const store = new Store();
const operator = new Operator(store);
const feed = new EventFeed(operator);
const context = { store, operator, feed };
const views = {
  overview: overview(context),
  models: modelsView(context),
  chat: chatView(context),
  activity: activityView(context),
  events: eventsView(context),
  logs: logsView(context),
};
let current = null;

function showView() {
  const wanted = location.hash.slice(1);
  // `#main`, where the link to the content leads, is no view.
  if (current && !Object.hasOwn(views, wanted)) return;
  const name = current || Object.hasOwn(views, wanted) ? wanted : "overview";
  const links = document.querySelectorAll("nav a");
  for (const link of links) setAttribute(link, "aria-current", link.hash === `#${name}` ? "page" : null);
  if (views[name] === current) return;
  current?.hide?.();
  current = views[name];
  byId("main").replaceChildren(current.node);
  current.update();
  current.show?.();
}

function update() {
  updateHeader();
  current.update();
}

function updateHeader() {
  const { inventory, problem } = store;
  const alarm = byId("alarm");
  alarm.hidden = problem === null;
  setText(alarm, problem === null ? "" : inventory ? `${problem} What you see may be old.` : problem);
  setText(byId("sign-in"), operator.signedIn ? "Sign out" : "Sign in");
  byId("status").hidden = !inventory && store.isForChatAlone;
  if (!inventory) return setText(byId("facts"), store.isForChatAlone ? "This key is for inference: with it there is the chat." : "");
  document.title = `${inventory.node_name} · RoleMesh node`;
  setText(byId("node-name"), inventory.node_name);
  const status = byId("status");
  setText(status, inventory.status);
  setAttribute(status, "data-state", inventory.status);
  const facts = [`version ${inventory.agent_version}`, `up for ${ago(inventory.started_at, inventory.sent_at)}`, ...inventory.reasons];
  setText(byId("facts"), facts.join(" · "));
  const drain = byId("drain");
  drain.hidden = inventory.reason_codes.includes("shutting_down");
  setText(drain, isDrained(inventory) ? "Undrain" : "Drain");
}

const isDrained = (inventory) => inventory.reason_codes.includes("drained_by_operator");

async function drainOrBack() {
  const back = isDrained(store.inventory);
  const text = "It refuses new requests until you undrain it. Requests in flight go on.";
  if (!back && !(await operator.ask("Take the node out of service?", text, { drain: "Drain" }))) return;
  await operator.order(back ? "/v1/node/undrain" : "/v1/node/drain", { done: ({ status }) => `The node is ${status}.` });
}

function look() {
  if (document.hidden) {
    store.stop();
    feed.stop();
    current.hide?.();
  } else {
    store.start();
    feed.start();
    current.show?.();
  }
}

byId("drain").addEventListener("click", drainOrBack);
byId("sign-in").addEventListener("click", () => (operator.signedIn ? operator.signOut() : operator.signIn()));
store.addEventListener("change", update);
feed.addEventListener("change", () => {
  store.refresh();
  if (current === views.events) current.update();
});
operator.addEventListener("change", () => {
  if (operator.mayOperate) feed.start();
  else feed.stop();
  store.refresh();
  update();
});
window.addEventListener("hashchange", showView);
document.addEventListener("visibilitychange", look);
showView();
look();
