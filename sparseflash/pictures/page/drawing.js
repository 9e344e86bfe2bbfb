// Drawing: cells, grid lines, rulers, and the outline of the block that is read out.

const context = canvas.getContext("2d", { alpha: false });

function redraw() {
  if (!scheduled) requestAnimationFrame(draw);
  scheduled = true;
}

/** The finest level of which no cell is smaller than a pixel, so that scaling drops none. */
function levelOf() {
  if (view.sx >= 1 && view.sy >= 1) return { name: "tokens", tokens: true, cellX: 1, cellY: 1 };
  const width = 2 ** Math.max(0, Math.ceil(-Math.log2(view.sx * bk) - 1e-6));
  const height = 2 ** Math.max(0, Math.ceil(-Math.log2(view.sy * bq) - 1e-6));
  return { name: `${width} ${height}`, tokens: false, width, height, cellX: bk * width, cellY: bq * height };
}

function drawCells() {
  const level = levelOf(), { cellX, cellY } = level;
  const x1 = Math.min(kvLen, view.x + plotWidth / view.sx), y1 = Math.min(qLen, view.y + plotHeight / view.sy);
  const px0 = Math.floor(Math.max(0, view.x) / cellX / PATCH), px1 = Math.ceil(x1 / cellX / PATCH);
  const py0 = Math.floor(Math.max(0, view.y) / cellY / PATCH), py1 = Math.ceil(y1 / cellY / PATCH);
  const keep = Math.max(256, 2 * (px1 - px0) * (py1 - py0));
  context.imageSmoothingEnabled = false;
  for (let py = py0; py < py1; py++) {
    for (let px = px0; px < px1; px++) {
      const x0 = px * PATCH * cellX, y0 = py * PATCH * cellY;
      const c0 = Math.max(0, Math.floor((view.x - x0) / cellX)), c1 = Math.min(PATCH, Math.ceil((x1 - x0) / cellX));
      const r0 = Math.max(0, Math.floor((view.y - y0) / cellY)), r1 = Math.min(PATCH, Math.ceil((y1 - y0) / cellY));
      if (c0 >= c1 || r0 >= r1) continue;
      const dx = X(x0 + c0 * cellX), dy = Y(y0 + r0 * cellY);
      context.drawImage(patch(level, px, py, keep), c0, r0, c1 - c0, r1 - r0,
        dx, dy, X(x0 + c1 * cellX) - dx, Y(y0 + r1 * cellY) - dy);
    }
  }
}

function drawLines(stepX, stepY, colour) {
  const right = Math.min(X(kvLen), left + plotWidth), bottom = Math.min(Y(qLen), top + plotHeight);
  context.fillStyle = colour;
  for (let j = Math.max(0, Math.floor(view.x / stepX)) * stepX; X(j) < right; j += stepX) {
    context.fillRect(X(j), Y(0), 1, Y(qLen) - Y(0));
  }
  for (let i = Math.max(0, Math.floor(view.y / stepY)) * stepY; Y(i) < bottom; i += stepY) {
    context.fillRect(X(0), Y(i), X(kvLen) - X(0), 1);
  }
}

function drawRulers(ink) {
  context.fillStyle = context.strokeStyle = ink;
  context.font = `${12 * dpr}px system-ui, sans-serif`;
  const step = scale => 2 ** Math.max(0, Math.ceil(Math.log2(90 * dpr / scale)));
  const ticks = (start, scale, size, length, offset, draw) => {
    const by = step(scale), first = Math.max(0, Math.floor(start));
    for (let p = Math.ceil((first + offset) / by) * by; p - offset < length; p += by) {
      const pixel = (p - offset + Math.min(0.5, 0.5 * by) - start) * scale;
      if (pixel > size) break;
      if (pixel >= 0) draw(Math.round(pixel), number(p));
    }
  };
  context.textBaseline = "alphabetic";
  context.textAlign = "left";
  ticks(view.x, view.sx, plotWidth, kvLen, 0, (pixel, text) => {
    context.fillRect(left + pixel, top - 6 * dpr, 1, 6 * dpr);
    context.fillText(text, left + pixel + 3 * dpr, top - 7 * dpr);
  });
  context.textAlign = "right";
  ticks(view.y, view.sy, plotHeight, qLen, qOffset, (pixel, text) => {
    context.fillRect(left - 6 * dpr, top + pixel, 6 * dpr, 1);
    context.fillText(text, left - 8 * dpr, top + pixel + 12 * dpr);
  });
  context.textAlign = "left";
  context.fillText("query \u2193 key \u2192", 4 * dpr, 14 * dpr, left - 8 * dpr);
}

function draw() {
  scheduled = false;
  const style = getComputedStyle(canvas);
  context.fillStyle = style.backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.save();
  context.beginPath();
  context.rect(left, top, plotWidth, plotHeight);
  context.clip();
  context.beginPath();
  context.rect(X(0), Y(0), X(kvLen) - X(0), Y(qLen) - Y(0));
  context.fillStyle = `rgb(${EMPTY_COLOUR.join(" ")})`;
  context.fill();
  context.save();
  context.clip();
  drawCells();
  if (Math.min(view.sx, view.sy) >= 8 * dpr) drawLines(1, 1, "#0000001c");
  if (Math.min(view.sx * bk, view.sy * bq) >= 10 * dpr) drawLines(bk, bq, "#00000070");
  context.restore();
  context.strokeStyle = "#808080";
  context.strokeRect(X(0) - 0.5, Y(0) - 0.5, X(kvLen) - X(0) + 1, Y(qLen) - Y(0) + 1);
  if (probe) {
    const col = Math.floor(probe.j / bk), row = Math.floor(probe.i / bq), x = X(col * bk), y = Y(row * bq);
    context.lineWidth = 2 * dpr;
    context.strokeStyle = "#000";
    context.strokeRect(x, y, Math.max(2, X((col + 1) * bk) - x), Math.max(2, Y((row + 1) * bq) - y));
    if (atCentre) {
      context.fillStyle = "#000";
      const middleX = left + Math.floor(plotWidth / 2), middleY = top + Math.floor(plotHeight / 2);
      context.fillRect(middleX - 12 * dpr, middleY, 24 * dpr, dpr);
      context.fillRect(middleX, middleY - 12 * dpr, dpr, 24 * dpr);
    }
    context.lineWidth = 1;
  }
  context.restore();
  drawRulers(style.color);
  const { queries, keys } = visible(), stretch = view.sy / view.sx;
  element("range").textContent = `queries ${queries.map(number).join(" to ")}, keys ${keys.map(number).join(" to ")}`
    + (Math.abs(stretch - 1) > 1e-9 ? `; a query is drawn ${Number(stretch.toPrecision(2))} times as high as a key is wide`
      : "");
}
