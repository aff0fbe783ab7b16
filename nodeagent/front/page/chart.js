// A small chart of a ratio (0 to 1) over the last five minutes.

import { setAttribute, svg } from "./dom.js";
import { percent } from "./format.js";

const WIDTH = 300;
const HEIGHT = 60;
const SPAN_S = 300;
// A longer time without a reading (the page was hidden) is a gap.
const GAP_S = 8;

export function chart(name, read) {
  const area = svg("path", { class: "area" });
  const line = svg("path", { class: "line", "vector-effect": "non-scaling-stroke" });
  const middle = svg("path", { class: "grid", d: `M0 ${HEIGHT / 2}H${WIDTH}`, "vector-effect": "non-scaling-stroke" });
  const node = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }, middle, area, line);
  return {
    node,
    update(points) {
      const runs = split(points, read);
      setAttribute(line, "d", runs.map((run) => `M${run.map(place).join("L")}${run.length === 1 ? "h0.01" : ""}`).join(""));
      setAttribute(area, "d", runs.map((run) => `M${x(run[0])} ${HEIGHT}L${run.map(place).join("L")}V${HEIGHT}Z`).join(""));
      setAttribute(node, "aria-label", described(name, points.map(read)));
    },
  };
}

// Runs of points without a gap: {age, value}, from the newest point on.
function split(points, read) {
  const runs = [];
  const now = points.at(-1)?.at;
  let last = null;
  for (const point of points) {
    const value = read(point);
    if (value === null || value === undefined) {
      last = null;
      continue;
    }
    if (last === null || point.at - last > GAP_S) runs.push([]);
    runs.at(-1).push({ age: now - point.at, value });
    last = point.at;
  }
  return runs;
}

const x = ({ age }) => (WIDTH * (1 - age / SPAN_S)).toFixed(1);
const y = ({ value }) => (1 + (HEIGHT - 2) * (1 - Math.min(1, Math.max(0, value)))).toFixed(1);
const place = (point) => `${x(point)} ${y(point)}`;

function described(name, values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  if (!known.length) return `${name}: unknown`;
  return `${name}: ${percent(values.at(-1))} now, at most ${percent(Math.max(...known))} in the last minutes`;
}
