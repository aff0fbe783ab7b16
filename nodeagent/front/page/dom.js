// Builds and changes the document. Everything that comes from the node goes in as text: no string becomes HTML here.

const SVG = "http://www.w3.org/2000/svg";

// An element. `attributes` may have listeners (onclick), properties of the element (`properties`), and attributes;
// null, undefined and false leave an attribute out, true gives it without a value. Children are nodes or texts.
export function el(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") {
      node.addEventListener(name.slice(2), value);
    } else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Change a text or an attribute only if it is another one: what a user has selected or a reader reads stays.
export function setText(node, text) {
  const wanted = text === null || text === undefined ? "" : String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : value);
}

// Make the children of `parent` show `items` in their order, with one node for each key. `make(item)` returns a part:
// {node, update(item)}. Parts are kept, so that focus and selection are too.
export function list(parent, items, key, make) {
  const old = parent.parts ?? new Map();
  const parts = new Map();
  for (const item of items) {
    let name = String(key(item));
    while (parts.has(name)) name += " again"; // clients may give two requests one id
    const part = old.get(name) ?? make(item);
    parts.set(name, part);
    part.update?.(item);
  }
  for (const [name, part] of old) if (parts.get(name) !== part) part.node.remove();
  let place = parent.firstChild;
  for (const part of parts.values()) {
    if (part.node === place) place = place.nextSibling;
    else parent.insertBefore(part.node, place);
  }
  parent.parts = parts;
  return parts;
}

// A state as a coloured word. CSS colours it by `data-state`.
export function pill() {
  const node = el("span", { class: "pill" });
  return {
    node,
    update(state, text = state) {
      setText(node, String(text).replaceAll("_", " "));
      setAttribute(node, "data-state", state);
    },
  };
}

// A table whose rows become blocks on a narrow screen; each cell then has its column's name beside it. The roles stay
// when CSS changes how the parts are displayed. `columns` are {name, class, cell(): {node, update(item)}}.
export function table(caption, columns, key) {
  const body = el("tbody", { role: "rowgroup" });
  const heads = columns.map((column) =>
    el("th", { role: "columnheader", scope: "col", class: column.class }, column.name || el("span", { class: "unseen" }, "Actions")));
  const node = el("table", { role: "table" },
    el("caption", { class: "unseen" }, caption),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads)),
    body);
  const makeRow = () => {
    const cells = columns.map((column) => column.cell());
    const row = el("tr", { role: "row" }, ...cells.map((cell, index) =>
      el("td", { role: "cell", "data-label": columns[index].name, class: columns[index].class }, cell.node)));
    return { node: row, update: (item) => cells.forEach((cell) => cell.update(item)) };
  };
  return { node, update: (items) => list(body, items, key, makeRow) };
}

// A cell, or another part, that shows one text.
export function textPart(read, attributes = {}) {
  const node = el("span", attributes);
  return { node, update: (item) => setText(node, read(item)) };
}

// A cell with a text, and in smaller letters below it what belongs to that.
export function twoTexts(read, readBelow, attributes = {}) {
  const first = textPart(read);
  const second = textPart(readBelow, { class: "quiet small block" });
  return {
    node: el("span", attributes, first.node, second.node),
    update(item) {
      first.update(item);
      second.update(item);
    },
  };
}
