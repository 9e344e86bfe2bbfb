// The view: which part of the mask is seen, and how large. The plot is the canvas without the rulers.

const MAX_SCALE = 64;  // CSS pixels a token
const STRETCH = 8;     // a mask longer than this in one direction fills the plot instead of keeping its shape

const element = id => document.getElementById(id);
const canvas = element("plot");
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

let dpr = 1, plotWidth = 1, plotHeight = 1, left = 0, top = 0;  // device pixels
const view = { x: 0, y: 0, sx: 1, sy: 1 };  // the token at the plot's top left corner; device pixels a token
let probe = null;        // the token pair that is read out: { i, j, x, y }, x and y in CSS pixels of the canvas
let atCentre = false;    // read out the pair at the centre, as long as the keyboard moves the view
let scheduled = false;

const X = j => left + Math.round((j - view.x) * view.sx);
const Y = i => top + Math.round((i - view.y) * view.sy);

function fitScale() {
  const x = Math.min(plotWidth / kvLen, MAX_SCALE * dpr), y = Math.min(plotHeight / qLen, MAX_SCALE * dpr);
  const both = Math.min(x, y);
  return Math.max(x, y) <= STRETCH * both ? { sx: both, sy: both } : { sx: x, sy: y };
}

function place(x, y, sx, sy) {
  const least = fitScale();
  view.sx = clamp(sx, least.sx, MAX_SCALE * dpr);
  view.sy = clamp(sy, least.sy, MAX_SCALE * dpr);
  // The centre of the view stays on the mask, or the mask in the corner where it begins.
  const halfX = plotWidth / view.sx / 2, halfY = plotHeight / view.sy / 2;
  view.x = clamp(x, -halfX, Math.max(0, kvLen - halfX));
  view.y = clamp(y, -halfY, Math.max(0, qLen - halfY));
  if (atCentre) readCentre();
  redraw();
}

function fit() {
  const { sx, sy } = fitScale();
  place(0, 0, sx, sy);
}

/** Zoom by a factor; the token under a point of the plot (device pixels) stays where it is. */
function zoom(factor, px = plotWidth / 2, py = plotHeight / 2) {
  const j = view.x + px / view.sx, i = view.y + py / view.sy, least = fitScale();
  const sx = clamp(view.sx * factor, least.sx, MAX_SCALE * dpr), sy = clamp(view.sy * factor, least.sy, MAX_SCALE * dpr);
  place(j - px / sx, i - py / sy, sx, sy);
}

const pan = (dx, dy) => place(view.x - dx / view.sx, view.y - dy / view.sy, view.sx, view.sy);

function goTo(q, k, tokensAcross = plotWidth / view.sx) {
  const scale = plotWidth / Math.max(1, tokensAcross), least = fitScale();
  const sx = clamp(scale, least.sx, MAX_SCALE * dpr), sy = clamp(scale, least.sy, MAX_SCALE * dpr);
  place(k + 0.5 - plotWidth / sx / 2, q - qOffset + 0.5 - plotHeight / sy / 2, sx, sy);
}

function select(chosen) {
  if (!(Number.isInteger(chosen) && chosen >= 0 && chosen < page.patterns.length)) {
    throw new RangeError(`pattern must be 0 to ${page.patterns.length - 1}, got ${chosen}`);
  }
  pattern = chosen;
  element("pattern").value = String(chosen);
  showFigures();
  showTooltip();
  redraw();
}

function visible() {
  const span = (start, count, length) =>
    [clamp(Math.floor(start), 0, length - 1), clamp(Math.ceil(start + count) - 1, 0, length - 1)];
  return {
    queries: span(view.y, plotHeight / view.sy, qLen).map(i => i + qOffset),
    keys: span(view.x, plotWidth / view.sx, kvLen),
    pixelsPerToken: [view.sy / dpr, view.sx / dpr],
    pattern,
  };
}

function toClient(q, k) {
  const box = canvas.getBoundingClientRect();
  return [
    box.left + (left + (k + 0.5 - view.x) * view.sx) / dpr,
    box.top + (top + (q - qOffset + 0.5 - view.y) * view.sy) / dpr,
  ];
}
