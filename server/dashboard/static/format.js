// Formats numbers.

const NONE = "–";

export function count(value) {
  if (value == null || Number.isNaN(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e6) return trim(value / 1e6) + "M";
  if (size >= 1e4) return trim(value / 1e3) + "k";
  if (size >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return trim(value);
}

export function whole(value) {
  return Math.round(value).toLocaleString("en");
}

export function duration(seconds) {
  if (seconds == null || Number.isNaN(seconds)) return NONE;
  if (seconds <= 0) return "0";
  if (seconds < 0.9995e-3) return trim(seconds * 1e6) + " µs";
  if (seconds < 0.9995) return trim(seconds * 1e3) + " ms";
  if (seconds < 120) return trim(seconds) + " s";
  return long(seconds);
}

// A duration in whole units.
export function long(seconds) {
  if (seconds < 120) return Math.round(seconds) + " s";
  if (seconds < 7200) return Math.round(seconds / 60) + " min";
  if (seconds < 172800) return trim(seconds / 3600) + " h";
  return Math.round(seconds / 86400) + " days";
}

export function percent(share) {
  if (share == null || Number.isNaN(share)) return NONE;
  const value = share * 100;
  return (value > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)) + " %";
}

export function ago(seconds) {
  return seconds < 1.5 ? "now" : `${long(seconds)} ago`;
}

// Three digits without trailing zeros.
function trim(value) {
  const size = Math.abs(value);
  const digits = size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
  return String(Number(value.toFixed(digits)));
}
