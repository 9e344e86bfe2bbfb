// What a person reads: tooltip, spoken text, figures, legend.

const number = x => x.toLocaleString("en-US");
const percent = x => x === 0 ? "0%" : `${Number((100 * x).toPrecision(3))}%`;

function describe(i, j) {
  const found = at(i + qOffset, j);
  const name = found.code === "PARTIAL" ? `PARTIAL, tile ${number(found.tile)}` : found.code;
  return `query ${number(i + qOffset)}, key ${number(j)}: ${found.allowed ? "allowed" : "not allowed"}\n`
    + `block (${number(found.block[0])}, ${number(found.block[1])}): ${name}\n`
    + `block density ${percent(found.density)}: ${number(found.allowedPairs)} of ${number(found.pairs)} pairs`;
}

function probeAt(x, y) {
  const j = Math.floor(view.x + (x * dpr - left) / view.sx), i = Math.floor(view.y + (y * dpr - top) / view.sy);
  const inside = x * dpr >= left && y * dpr >= top && i >= 0 && i < qLen && j >= 0 && j < kvLen;
  probe = inside ? { i, j, x, y } : null;
  showTooltip();
  redraw();
}

let speaking = 0;
function readCentre() {
  probeAt((left + plotWidth / 2) / dpr, (top + plotHeight / 2) / dpr);
  clearTimeout(speaking);
  speaking = setTimeout(() => { element("spoken").textContent = probe ? describe(probe.i, probe.j) : ""; }, 200);
}

function showTooltip() {
  const box = element("tooltip");
  showSeen();
  box.hidden = !probe;
  if (!probe) return;
  box.textContent = describe(probe.i, probe.j);
  const { offsetWidth: width, offsetHeight: height } = box, { clientWidth, clientHeight } = canvas;
  const x = probe.x + 16 + width > clientWidth ? probe.x - 16 - width : probe.x + 16;
  const y = probe.y + 16 + height > clientHeight ? probe.y - 16 - height : probe.y + 16;
  box.style.transform = `translate(${Math.max(0, x)}px, ${Math.max(0, y)}px)`;
}

function showFigures() {
  const one = page.patterns[pattern], several = page.patterns.length > 1;
  const lines = [
    ...(page.expression && page.expression !== page.title ? [["pattern", page.expression]] : []),
    ["tokens", `${number(qLen)} queries x ${number(kvLen)} keys`],
    ...(qOffset === kvLen - qLen ? [] : [["first query", `at ${number(qOffset)}`]]),
    ["block", `${bq} x ${bk}`],
    ["grid", `${number(rows)} x ${number(cols)} blocks`],
    ["stored", `${number(one.blocks)} blocks: ${number(one.full_blocks)} full, `
      + `${number(one.blocks - one.full_blocks)} partial`],
    ["density", percent(one.density)],
    ["tokens allowed", percent(one.token_density)],
    ["tiles", number(page.tiles)],
    ...(several ? [["all heads", `density ${percent(page.density)}, tokens ${percent(page.token_density)}`]] : []),
  ];
  element("figures").replaceChildren(...lines.flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

function showLegend() {
  const entries = [
    [FULL_COLOUR, "FULL: every pair allowed"],
    [PARTIAL_COLOUR, "PARTIAL: some pairs; close up, the allowed ones"],
    [MASKED_COLOUR, "close up: not allowed, inside a PARTIAL block"],
    [EMPTY_COLOUR, "EMPTY: never visited"],
  ];
  element("legend").replaceChildren(...entries.map(([colour, text]) => {
    const item = document.createElement("li"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `rgb(${colour.join(" ")})`;
    item.append(swatch, text);
    return item;
  }));
}
