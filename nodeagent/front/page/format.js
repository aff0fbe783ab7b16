// Figures as people read them. What is unknown is a dash.

const NONE = "–";

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${size < 10 && unit > 0 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

export function percent(ratio) {
  return ratio === null || ratio === undefined ? NONE : `${Math.round(ratio * 100)} %`;
}

export function count(value) {
  return value === null || value === undefined ? NONE : value.toLocaleString("en");
}

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 100) return `${Math.round(value)} s`;
  const minutes = Math.round(value / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.round(minutes / 60);
  return hours < 48 ? `${hours} h` : `${Math.round(hours / 24)} days`;
}

export function milliseconds(value) {
  return seconds(value === null || value === undefined ? null : value / 1000);
}

export function rate(value) {
  return value === null || value === undefined ? NONE : value >= 99.5 ? String(Math.round(value)) : value.toFixed(1);
}

// How long ago a time (RFC 3339) was, by the clock `now`: of the node itself where its answer has one.
export function ago(time, now = new Date().toISOString()) {
  return seconds(Math.max(0, (Date.parse(now) - Date.parse(time)) / 1000));
}

// The time of day here; with the date if that is another one than today.
export function clock(time) {
  const moment = new Date(time);
  const day = moment.toDateString() === new Date().toDateString() ? "" : `${moment.toLocaleDateString()} `;
  return day + moment.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}
