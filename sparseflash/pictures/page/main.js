// What a person does, and the start.

const MARGIN = { left: 76, top: 26, end: 8 };  // CSS pixels, for the rulers
const pointers = new Map();  // the fingers or the button that are down: id -> [x, y] in CSS pixels of the canvas
const where = event => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
const inPlot = ([x, y]) => [x * dpr - left, y * dpr - top];

function byPointer() {
  atCentre = false;
  element("spoken").textContent = "";
}

canvas.addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  byPointer();
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, where(event));
  if (event.pointerType !== "mouse") probeAt(...where(event));
});

canvas.addEventListener("pointermove", event => {
  byPointer();
  const now = where(event), before = pointers.get(event.pointerId);
  if (!before) return probeAt(...now);
  if (now[0] === before[0] && now[1] === before[1]) return;
  canvas.classList.add("dragging");
  probe = null;
  showTooltip();
  const [x, y] = now;
  const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
  pointers.set(event.pointerId, now);
  if (!others.length) return pan((x - before[0]) * dpr, (y - before[1]) * dpr);
  const [ox, oy] = others[0], distance = ([px, py]) => Math.max(1, Math.hypot(px - ox, py - oy));
  pan((x - before[0]) / 2 * dpr, (y - before[1]) / 2 * dpr);
  zoom(distance(now) / distance(before), ...inPlot([(x + ox) / 2, (y + oy) / 2]));
});

const release = event => {
  pointers.delete(event.pointerId);
  if (!pointers.size) canvas.classList.remove("dragging");
};
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", () => { if (!atCentre) { probe = null; showTooltip(); redraw(); } });

canvas.addEventListener("wheel", event => {
  event.preventDefault();
  byPointer();
  const pixels = event.deltaY * [1, 20, 400][event.deltaMode];
  zoom(Math.exp(-clamp(pixels, -400, 400) * 0.002), ...inPlot(where(event)));
  probeAt(...where(event));
}, { passive: false });

canvas.addEventListener("dblclick", event => zoom(event.shiftKey ? 1 / 3 : 3, ...inPlot(where(event))));

canvas.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const part = event.shiftKey ? 0.9 : 0.1;
  const action = {
    ArrowLeft: () => pan(part * plotWidth, 0),
    ArrowRight: () => pan(-part * plotWidth, 0),
    ArrowUp: () => pan(0, part * plotHeight),
    ArrowDown: () => pan(0, -part * plotHeight),
    "+": () => zoom(1.5),
    "=": () => zoom(1.5),
    "-": () => zoom(1 / 1.5),
    0: fit,
  }[event.key];
  if (!action) return;
  event.preventDefault();
  atCentre = true;
  action();
});
canvas.addEventListener("blur", () => { if (atCentre) { byPointer(); probe = null; showTooltip(); redraw(); } });

element("zoom-in").addEventListener("click", () => zoom(2));
element("zoom-out").addEventListener("click", () => zoom(1 / 2));
element("fit").addEventListener("click", fit);
element("pattern").addEventListener("change", event => select(Number(event.target.value)));
element("go").addEventListener("submit", event => {
  event.preventDefault();
  // From far away one would not see the pair: come close enough to tell tokens apart.
  const near = plotWidth / dpr / 16;
  goTo(element("go-q").valueAsNumber, element("go-k").valueAsNumber, Math.min(near, plotWidth / view.sx));
});

function resize() {
  const first = canvas.dataset.state !== "ready", before = dpr, wasFit = !first && view.sx <= fitScale().sx;
  dpr = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * dpr));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * dpr));
  left = Math.round(MARGIN.left * dpr);
  top = Math.round(MARGIN.top * dpr);
  plotWidth = Math.max(1, canvas.width - left - Math.round(MARGIN.end * dpr));
  plotHeight = Math.max(1, canvas.height - top - Math.round(MARGIN.end * dpr));
  if (first || wasFit) fit();
  else place(view.x, view.y, view.sx * dpr / before, view.sy * dpr / before);
}

function start() {
  page.patterns.forEach((one, p) => element("pattern").add(new Option(`${p}: ${one.name}`, p)));
  element("choice").hidden = page.patterns.length < 2;
  for (const [id, low, length] of [["go-q", qOffset, qLen], ["go-k", 0, kvLen]]) {
    Object.assign(element(id), { min: low, max: low + length - 1, value: low });
  }
  showFigures();
  showLegend();
  resize();
  new ResizeObserver(resize).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  canvas.dataset.state = "ready";
}

/**
 * For scripts. Queries and keys are positions, as on screen: the first query stands at qOffset, the first key at 0.
 *
 * ready                       promise: the mask is decoded and about to be drawn
 * shape, block, qOffset       [queries, keys], [BQ, BK], position of the first query
 * patterns                    number of distinct patterns; the functions below are about the selected one
 * at(q, k)                    { block: [row, col], code: "EMPTY" | "FULL" | "PARTIAL", tile, density, allowed,
 *                               allowedPairs, pairs }, or null outside the mask
 * view()                      { queries: [first, last], keys: [first, last], pixelsPerToken: [y, x], pattern }
 * goTo(q, k, tokensAcross)    centre a pair, with so many keys across; without a number, at the present zoom
 * fit(), zoom(factor), select(pattern)
 * toClient(q, k)              [x, y] of the pair's centre in CSS pixels of the window
 * seen(q)                     draws what a query sees in its image; { start, inside, beside }: the image's first token,
 *                               and how many places of it and tokens beside it are seen; null without an image
 */
window.mask = Object.freeze({
  ready: load().then(start), shape: page.shape, block: page.block, qOffset, patterns: page.patterns.length,
  at, view: visible, goTo, fit, zoom: factor => zoom(factor), select, toClient,
  seen: q => images.length && q >= qOffset && q < qOffset + qLen ? drawSeen(q - qOffset) : null,
});
window.mask.ready.catch(error => {
  element("problem").hidden = false;
  element("problem").textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old to unpack the mask: Chromium 80, Firefox 113 and Safari 16.4 can."
    : `The mask cannot be shown: ${error.message}`;
});
